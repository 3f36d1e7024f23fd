"""What lies where in the official ILSVRC 2012 archives: the devkit's classes, and every image's place in its tar.

Read by `data.prepare.imagenet`, which writes the images as a TFDS data set. Only headers are read here: an image stays
where it is, known by its offset, so that no archive has to be unpacked or held in memory.
"""

import dataclasses
import io
import pathlib
import posixpath
import tarfile
import zlib
from collections.abc import Iterator

import numpy as np

from beitv2_jax.data.prepare.progress import progress
from beitv2_jax.data.prepare.tars import tar_files
from beitv2_jax.errors import UserError

TRAIN = "ILSVRC2012_img_train.tar"
VALIDATION = "ILSVRC2012_img_val.tar"
TESTS = ("ILSVRC2012_img_test_v10102019.tar", "ILSVRC2012_img_test.tar")
"""Names of the test archive: that of the download, and the one that TFDS wants."""
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_META = "data/meta.mat"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"


@dataclasses.dataclass(frozen=True)
class Devkit:
    """The contents of the development kit.

    Attributes:
      synset_of_id: {ILSVRC2012_ID: synset such as "n01440764"} of the classes, not of the synsets above them.
      num_train: {synset: number of training images}; empty if the kit does not list them.
      truth: ILSVRC2012_ID of every validation image, in the order of their names.
    """

    synset_of_id: dict[int, str]
    num_train: dict[str, int]
    truth: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of one split inside its archive, in archive order.

    Attributes:
      archive: uncompressed tar that holds their bytes, possibly inside nested tars.
      names: file name of each.
      synsets: class of each; "" = unknown.
      offsets, sizes: first byte of each in the archive, and number of bytes.
    """

    archive: pathlib.Path
    names: list[str]
    synsets: list[str]
    offsets: np.ndarray
    sizes: np.ndarray


def read_devkit(path: pathlib.Path) -> Devkit:
    """Read ILSVRC2012_devkit_t12.tar.gz.

    Raises:
      UserError: not there, cut off, or not the devkit of this challenge.
    """
    _check_there(path)
    try:
        with tarfile.open(path, "r:gz") as tar:
            files = {
                end: tar.extractfile(member).read()
                for member in tar
                for end in (_META, _TRUTH)
                if member.isfile() and posixpath.normpath(member.name).endswith(end)
            }
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    if missing := {_META, _TRUTH} - set(files):
        raise _wrong(path, f"has no {min(missing)}")
    try:
        synset_of_id, num_train = _synsets(files[_META])
        truth = tuple(int(line) for line in files[_TRUTH].split())
    except (ValueError, TypeError, KeyError, IndexError, NotImplementedError) as error:
        raise _wrong(path, f"cannot be understood: {error}") from error
    if unknown := set(truth) - set(synset_of_id):
        raise _wrong(path, f"gives validation images the class {min(unknown)}, which {_META} does not have")
    return Devkit(synset_of_id, num_train, truth)


def _synsets(meta: bytes) -> tuple[dict[int, str], dict[str, int]]:
    # imported here: it takes a while, and only this needs it
    import scipy.io

    rows = np.atleast_1d(scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
    leaves = [row for row in rows if int(row["num_children"]) == 0]
    synset_of_id = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
    if "num_train_images" not in rows.dtype.names:
        return synset_of_id, {}
    return synset_of_id, {str(row["WNID"]): int(row["num_train_images"]) for row in leaves}


def train_images(path: pathlib.Path, devkit: Devkit) -> Images:
    """Find the training images: a tar of one tar a class, named after its synset.

    Raises:
      UserError: missing, truncated, or other classes or numbers of images than in the devkit.
    """
    expected = set(devkit.synset_of_id.values())
    names, synsets, offsets, sizes = [], [], [], []
    found: dict[str, int] = {}
    with _open_tar(path) as tar:
        for member in progress(_files(tar, path, ".tar"), f"reading {path.name}", len(expected), "classes"):
            synset = member.name.removesuffix(".tar")
            if synset not in expected:
                raise _wrong(path, f"holds {member.name}, which is no class of the devkit")
            with _open_tar(path, tar.extractfile(member), member.name) as inner:
                images = list(_files(inner, path, ".JPEG", inside=member.name))
            found[synset] = len(images)
            names += [image.name for image in images]
            synsets += [synset] * len(images)
            offsets += [member.offset_data + image.offset_data for image in images]
            sizes += [image.size for image in images]
    if missing := sorted(expected - set(found)):
        raise _wrong(path, f"lacks {len(missing)} of the {len(expected)} classes of the devkit, such as {missing[0]}")
    for synset, count in sorted(devkit.num_train.items()):
        if found[synset] != count:
            raise _wrong(path, f"has {found[synset]} images of {synset}, the devkit says {count}")
    return Images(path, names, synsets, np.array(offsets, np.int64), np.array(sizes, np.int64))


def validation_images(path: pathlib.Path, devkit: Devkit) -> Images:
    """Find the validation images; their classes are the devkit's.

    Raises:
      UserError: not there, cut off, or other images than the devkit has classes for.
    """
    synset_of_name = {
        f"ILSVRC2012_val_{number:08d}.JPEG": devkit.synset_of_id[class_id]
        for number, class_id in enumerate(devkit.truth, 1)
    }
    images = _flat_images(path, len(synset_of_name), synset_of_name)
    if missing := sorted(set(synset_of_name) - set(images.names)):
        raise _wrong(path, f"lacks {len(missing)} of {len(synset_of_name)} images, such as {missing[0]}")
    return dataclasses.replace(images, synsets=[synset_of_name[name] for name in images.names])


def test_images(path: pathlib.Path) -> Images:
    """Find the test images, which have no published classes.

    Raises:
      UserError: not there, or cut off.
    """
    return _flat_images(path, 100_000, None)


def _flat_images(path: pathlib.Path, total: int, known: dict[str, str] | None) -> Images:
    names, offsets, sizes = [], [], []
    with _open_tar(path) as tar:
        for image in progress(_files(tar, path, ".JPEG"), f"reading {path.name}", total, "images"):
            if known is not None and image.name not in known:
                raise _wrong(path, f"holds {image.name}, for which the devkit has no class")
            names.append(image.name)
            offsets.append(image.offset_data)
            sizes.append(image.size)
    return Images(path, names, [""] * len(names), np.array(offsets, np.int64), np.array(sizes, np.int64))


def _open_tar(path: pathlib.Path, stream=None, what: str = "") -> tarfile.TarFile:
    if stream is None:
        _check_there(path)
    try:
        return tarfile.open(None if stream else path, "r:", stream)
    except tarfile.TarError as error:
        raise _damaged(path, f"{what}: {error}" if what else str(error)) from error


def _files(tar: tarfile.TarFile, path: pathlib.Path, ending: str, inside: str = "") -> Iterator[tarfile.TarInfo]:
    """Yield every visible file of a tar; `inside` is the name of the member of `path` that the tar is."""
    where = f"{inside}: " if inside else ""
    names = set()
    try:
        for member in tar_files(tar):
            if not member.name.endswith(ending):
                raise _wrong(path, f"holds {where}{member.name}, where only *{ending} belongs")
            if member.name in names:
                raise _wrong(path, f"holds {where}{member.name} twice")
            names.add(member.name)
            yield member
    except tarfile.TarError as error:
        raise _damaged(path, f"{where}{error}") from error


def _check_there(path: pathlib.Path) -> None:
    if not path.is_file():
        raise UserError(
            f"There is no {path}.",
            "Was it not downloaded, does it have another name, or does --archives name another directory?",
            f"Put {TRAIN}, {VALIDATION} and {DEVKIT} (and {TESTS[0]} if you want it) from image-net.org into one "
            "directory, without unpacking them, and write --archives=DIR.",
        )


def _damaged(path: pathlib.Path, cause: str) -> UserError:
    return UserError(
        f"{path} is damaged: {cause}.",
        "Did its download break off, or is it another kind of file?",
        "Download it again and compare its MD5 sum with the one on image-net.org.",
    )


def _wrong(path: pathlib.Path, difference: str) -> UserError:
    return UserError(
        f"{path} {difference}.",
        "Does it belong to another challenge or task, was it packed anew, or does it lie beside another devkit?",
        f"Use {TRAIN}, {VALIDATION} and {DEVKIT} as image-net.org offers them for ILSVRC 2012, tasks 1 and 2.",
    )
