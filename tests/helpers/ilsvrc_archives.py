"""Archives to the official layout of ILSVRC 2012, with a few small images: what the tests of its preparation read."""

import io
import pathlib
import tarfile

import numpy as np
import scipy.io
from PIL import Image

SYNSETS = {"n02077923": 3, "n02105855": 2, "n01440764": 5}
"""Training images of each class that are drawn, in the order of the archive; the first two also re-encoded ones."""
CMYK, PNG = "n02077923_14822.JPEG", "n02105855_2933.JPEG"
MARKED = {CMYK: ("JPEG", "CMYK"), PNG: ("PNG", "RGB")}
"""Two of the official images that are no plain JPEG: name -> format and mode."""
TRUTH = ("n01440764", "n02105855", "n02077923", "n01440764", "n02105855", "n02077923", "n01440764")
NUM_TEST = 3
CLASS_IDS = {"n02105855": 1, "n01440764": 2, "n02077923": 3}
_META = [
    "ILSVRC2012_ID",
    "WNID",
    "words",
    "gloss",
    "num_children",
    "children",
    "wordnet_height",
    "num_train_images",
]


def encode(seed: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """Return a smooth picture of 31 x 23 pixels, a different one for each seed."""
    levels = np.random.default_rng(seed).integers(0, 256, (3, 4, len(mode)), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels.squeeze(), mode).resize((31, 23), Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def pack(files: dict[str, bytes], mode: str = "w") -> bytes:
    """Return a tar of `files` in their order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def train_files() -> dict[str, dict[str, bytes]]:
    """Return {synset: {file name: image}}; names are in no order and one image is grey."""
    files, seed = {}, 0
    for synset, count in SYNSETS.items():
        files[synset] = {}
        for number in range(count, 0, -1):
            seed += 1
            files[synset][f"{synset}_{37 * number}.JPEG"] = encode(seed, mode="L" if seed == 2 else "RGB")
        for name, (kind, mode) in MARKED.items():
            if name.startswith(synset):
                files[synset][name] = encode(100 + len(files), kind, mode)
    return files


def validation_files() -> dict[str, bytes]:
    """Return {file name: image}, in no order."""
    numbers = [(3 * i) % len(TRUTH) + 1 for i in range(len(TRUTH))]
    return {f"ILSVRC2012_val_{number:08d}.JPEG": encode(200 + number) for number in numbers}


def devkit(class_ids=CLASS_IDS, truth=TRUTH, num_train=None) -> bytes:
    """Return the devkit's archive: synsets with one above them, and the class of every validation image."""
    num_train = num_train or {synset: len(files) for synset, files in train_files().items()}
    none = np.zeros(0)
    rows = [
        (number, synset, "words", "gloss", 0, none, 0, num_train.get(synset, 0)) for synset, number in class_ids.items()
    ]
    rows.append((len(rows) + 1, "n00001740", "entity", "everything", 2, np.array([1.0, 2.0]), 9, 0))
    buffer = io.BytesIO()
    synsets = np.array(rows, dtype=[(name, object) for name in _META]).reshape(-1, 1)
    scipy.io.savemat(buffer, {"synsets": synsets})
    root = "ILSVRC2012_devkit_t12"
    lines = "".join(f"{class_ids[synset]}\n" for synset in truth)
    files = {
        f"{root}/readme.txt": b"words",
        f"{root}/data/meta.mat": buffer.getvalue(),
        f"{root}/data/ILSVRC2012_validation_ground_truth.txt": lines.encode(),
    }
    return pack(files, "w:gz")


def make(directory: pathlib.Path, *, test: bool = True) -> pathlib.Path:
    """Write the archives to `directory` and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    train = {f"{synset}.tar": pack(files) for synset, files in train_files().items()}
    (directory / "ILSVRC2012_img_train.tar").write_bytes(pack(train))
    (directory / "ILSVRC2012_img_val.tar").write_bytes(pack(validation_files()))
    (directory / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit())
    if test:
        files = {f"test/ILSVRC2012_test_{number:08d}.JPEG": encode(300 + number) for number in range(1, NUM_TEST + 1)}
        (directory / "ILSVRC2012_img_test_v10102019.tar").write_bytes(pack(files))
    return directory
