"""Where images come from: TFDS sets in ArrayRecord form, plain image folders, and the project's own embedded set.

A source is random access by example id (its index), gives encoded bytes, and is pickled as the recipe to open it.
It is the first station of the data pipeline.
"""

import hashlib
import os
import pathlib
from typing import Any, Protocol

import numpy as np

from beitv2_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_EVALUATION_SPLITS = ("validation", "val", "test")


class Source(Protocol):
    """Random access to encoded images.

    Attributes:
      name: identity of the data, the same wherever a copy of it lies.
      split: name of the split as the data set itself calls it.
      num_classes: number of labels, 0 if there are none.
      class_names: their names, in label order.
    """

    name: str
    split: str
    num_classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of examples."""

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        """Return `image` (encoded bytes), `label` (-1 = unknown), `example_id` and `where` (words for errors)."""


def open_source(spec: str, split: str, data_dir: str = "") -> Source:
    """Open `tfds:NAME[/CONFIG][:VERSION]`, `folder:PATH` or `embedded[/CONFIG]`.

    `data_dir` is the TFDS directory ("" = TFDS's default); a folder does not need it. Of the split names
    validation, val and test, the others are tried when the one asked for does not exist. TFDS slices such as
    `train[:10%]` work for TFDS sets.

    Raises:
      UserError: unknown kind of source, data not there, or no such split.
    """
    kind, _, rest = spec.partition(":")
    if kind == "folder" and rest:
        return FolderSource(rest, split)
    if kind == "tfds" and rest:
        return TfdsSource(_find_tfds(rest, data_dir), split)
    family, _, config = spec.partition("/")
    if family == "embedded":
        # imported here: the generator of the embedded images is only needed by those who use them
        from beitv2_jax.data import embedded

        return TfdsSource(embedded.prepare(data_dir, config or "scenes"), split)
    raise UserError(
        f"There is no data source {spec!r}.",
        "data.source in the config lacks its kind, or the kind is misspelt",
        "tfds:NAME (a prepared TFDS set), folder:PATH (class folders of images) or embedded",
    )


def _resolve_split(split: str, available: tuple[str, ...], where: str) -> str:
    """Return the name under which `available` holds `split`; a slice `[...]` after the name is kept."""
    name, bracket, tail = split.partition("[")
    synonyms = _EVALUATION_SPLITS if name in _EVALUATION_SPLITS else ()
    for candidate in (name, *synonyms):
        if candidate in available:
            return candidate + bracket + tail
    raise UserError(
        f"{where} has no split {split!r}; it has {', '.join(sorted(available)) or 'none'}.",
        "data.train_split or data.eval_split names a split of another data set",
        f"one of: {', '.join(sorted(available)) or 'a data set with splits'}",
    )


class FolderSource:
    """Images in class folders: `PATH/<split>/<class>/*`, or `PATH/<class>/*` for the split "train".

    Labels number the sorted class names, example ids the sorted files of the sorted classes. A split beside
    `train` takes its class names from there, so that a class missing in it shifts no label. The name carries a
    digest of the relative file names: it follows the data when they are moved and changes when files do.
    """

    def __init__(self, path: str, split: str):
        root = pathlib.Path(path).expanduser()
        self._path, self._asked = path, split
        self.split, directory, class_directory = _folder_of_split(root, split)
        self.class_names = _folders(class_directory)
        unknown = sorted(set(_folders(directory)) - set(self.class_names))
        if unknown:
            raise UserError(
                f"{directory} has the class folder {unknown[0]!r}, which {class_directory} has not.",
                "the splits hold different classes, so their labels would not agree",
                f"the same class folders in both, or remove {directory / unknown[0]}",
            )
        files = [(label, file) for label, name in enumerate(self.class_names) for file in _images(directory / name)]
        if not files:
            raise UserError(
                f"There are no images in {directory}.",
                f"the images do not lie in class folders, or end in something else than {' '.join(IMAGE_SUFFIXES)}",
                f"{directory}/<class>/<image>; for images without classes one folder, say {directory}/all/",
            )
        self._root = directory
        self._labels = np.array([label for label, _ in files], np.int32)
        self._files = [file for _, file in files]
        self.num_classes = len(self.class_names)
        names = "\n".join(f"{self.class_names[label]}/{file}" for label, file in files)
        digest = hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
        self.name = f"folder:{root.resolve().name}@{digest}"

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        label = int(self._labels[example_id])
        path = self._root / self.class_names[label] / self._files[example_id]
        return {
            "image": path.read_bytes(),
            "label": label,
            "example_id": int(example_id),
            "where": f"{path} (example {example_id})",
        }

    def __reduce__(self):
        return FolderSource, (self._path, self._asked)


def _folders(directory: pathlib.Path) -> tuple[str, ...]:
    """Return the sorted names of the visible folders in `directory`; none if it does not exist."""
    if not directory.is_dir():
        return ()
    return tuple(sorted(e.name for e in os.scandir(directory) if e.is_dir() and not e.name.startswith(".")))


def _images(directory: pathlib.Path) -> list[str]:
    if not directory.is_dir():
        return []
    names = (e.name for e in os.scandir(directory) if e.is_file() and not e.name.startswith("."))
    return sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))


def _folder_of_split(root: pathlib.Path, split: str) -> tuple[str, pathlib.Path, pathlib.Path]:
    """Return the split's name, its folder, and the folder whose sub-folders number the classes."""
    if not root.is_dir():
        raise UserError(
            f"The image folder {root} does not exist.",
            "data.source=folder:PATH is misspelt or relative to another directory",
            f"a folder of images; now in {pathlib.Path.cwd()}",
        )
    if "[" in split:
        raise UserError(
            f"The image folder {root} cannot be cut to {split!r}.",
            "slices of a split exist for TFDS sets only",
            f"the split {split.partition('[')[0]!r}, or a folder that holds just these images",
        )
    splits = tuple(name for name in ("train", *_EVALUATION_SPLITS) if (root / name).is_dir())
    if (root / split).is_dir():
        splits = (*splits, split)
    if not splits and split == "train":
        return "train", root, root
    found = _resolve_split(split, splits, f"The image folder {root}")
    return found, root / found, root / ("train" if "train" in splits else found)


class TfdsSource:
    """A prepared TFDS directory in a random-access format, read without TensorFlow.

    Needs a feature `image`; a feature `label` is used if it is there. Other features are not decoded.
    """

    def __init__(self, directory: str | os.PathLike, split: str):
        import tensorflow_datasets as tfds

        self._directory, self._asked = os.fspath(directory), split
        builder = tfds.builder_from_directory(self._directory)
        features = dict(builder.info.features)
        self.name = f"tfds:{builder.info.full_name}"
        self.split = _resolve_split(split, tuple(builder.info.splits), f"The TFDS set {builder.info.full_name}")
        if "image" not in features:
            raise UserError(
                f"The TFDS set {builder.info.full_name} has no feature 'image'; it has {', '.join(features)}.",
                "it is not a set of images",
                "a TFDS set for image classification, such as tfds:imagenette",
            )
        encoded = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
        decoders = {key: tfds.decode.SkipDecoding() for key in encoded}
        try:
            self._records = builder.as_data_source(self.split, decoders=decoders)
        except NotImplementedError as error:
            raise UserError(
                f"The TFDS set in {self._directory} has the format {builder.info.file_format.value}, which has no "
                "random access.",
                "it was prepared by TFDS with its default format",
                f"remove it and prepare it again: {_preparation(builder.name)}",
            ) from error
        except ValueError as error:
            raise UserError(
                f"The split {split!r} cannot be cut: {error}",
                "a slip in the slice",
                "train[:10%] or train[100:200], for example",
            ) from error
        self._has_label = isinstance(features.get("label"), tfds.features.ClassLabel)
        self.class_names = tuple(features["label"].names) if self._has_label else ()
        self.num_classes = len(self.class_names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        record = self._records[example_id]
        return {
            "image": record["image"],
            "label": int(record["label"]) if self._has_label else -1,
            "example_id": int(example_id),
            "where": f"{self.name}, split {self.split}, example {example_id}",
        }

    def __reduce__(self):
        return TfdsSource, (self._directory, self._asked)


def _preparation(name: str, data_dir: str = "") -> str:
    place = f", data_dir='{data_dir}'" if data_dir else ""
    return (
        f'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}'{place}, file_format='array_record').download_and_prepare()\" "
        "(some sets need TensorFlow installed for this one step)"
    )


def _find_tfds(name: str, data_dir: str) -> str:
    """Return the directory of a prepared TFDS set, without loading the code that generated it."""
    from tensorflow_datasets.core import read_only_builder, registered

    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except registered.DatasetNotFoundError as error:
        raise UserError(
            f"The TFDS set {name!r} is not prepared in {data_dir or 'the TFDS default directory'}.",
            "it was never prepared, lies in another directory, or has a config that must be named (NAME/CONFIG)",
            f"set data.data_dir, or prepare it: {_preparation(name, data_dir)}",
        ) from error
    except ValueError as error:
        raise UserError(
            f"The TFDS set {name!r} cannot be looked up: {error}",
            "a slip in the name, or the set lies in several TFDS directories",
            "tfds:NAME, tfds:NAME/CONFIG or tfds:NAME/CONFIG:VERSION, and data.data_dir",
        ) from error
    return os.fspath(builder.data_dir)
