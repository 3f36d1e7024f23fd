"""CIFAR-10 with 6 bits a channel as a TFDS data set in ArrayRecord form, from the .npz files of the study.

    python -m benchmarks.study_data --cifar=FOLDER

FOLDER holds cifar10_train_{1..5}of5.npz and cifar10_test.npz. In each, `labels` uint8 [n] are the classes and `delta`
uint8 [n, 3, 32, 32] holds differences along the rows, modulo 64, of the planes (R - G, G, B - G). The images are kept
as PNG, so no pixel changes. They are interleaved by class in the files, so that the beginning of a split has as many
of each class. Afterwards `tfds:cifar10_6bit` opens the data set.
"""

import argparse
import io
import os
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLITS = {"train": [f"cifar10_train_{part}of5.npz" for part in range(1, 6)], "test": ["cifar10_test.npz"]}
SIDE = 32


class Cifar106bit(tfds.core.GeneratorBasedBuilder):
    """Write the data set; `folder` holds the .npz files."""

    name = "cifar10_6bit"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, folder: str = "", **arguments):
        self._folder = Path(folder)
        super().__init__(**arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=CLASSES),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="CIFAR-10 with the upper 6 bits of each channel; a pixel differs by at most 2 of 255.",
            features=features,
            supervised_keys=("image", "label"),
            # keys are numbers in order: a prefix of a split has as many images of each class
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(files) for split, files in SPLITS.items()}

    def _generate_examples(self, files: list[str]):
        key = 0
        for name in files:
            with np.load(self._folder / name) as arrays:
                images, labels = decoded(arrays["delta"]), arrays["labels"]
            for image, label in zip(images, labels, strict=True):
                encoded = io.BytesIO()
                Image.fromarray(image).save(encoded, "PNG")
                yield key, {"image": encoded.getvalue(), "label": int(label)}
                key += 1


def decoded(delta: np.ndarray) -> np.ndarray:
    """Return the images 'b H W 3' of differences 'b 3 H W', all uint8; a pixel is the middle of its 4 values."""
    delta = delta.copy()
    delta[..., 0] = np.cumsum(delta[..., 0], axis=-1, dtype=np.uint8)  # the first column runs down
    planes = np.cumsum(delta, axis=-1, dtype=np.uint8)
    planes[:, 0] += planes[:, 1]
    planes[:, 2] += planes[:, 1]
    return ((planes & 63) * 4 + 2).transpose(0, 2, 3, 1)


def main() -> None:
    """Write the data set that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", required=True, metavar="FOLDER", help="folder of the .npz files")
    parser.add_argument("--data_dir", default="", help="TFDS directory; its own default where this is left out")
    options = parser.parse_args()
    folder = Path(options.cifar)
    if missing := [name for names in SPLITS.values() for name in names if not (folder / name).is_file()]:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}. Write --cifar=FOLDER of the folder that has them.")
    data_dir = os.path.expanduser(options.data_dir) or None
    builder = Cifar106bit(folder=str(folder), data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    print(f"{builder.data_path}: read it by --config.data.source=tfds:{builder.name}")


if __name__ == "__main__":
    main()
