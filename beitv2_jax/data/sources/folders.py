"""Images as files in folders, one folder a class or all in one: a source of `data.sources`."""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from beitv2_jax.data.array_files import RecordError
from beitv2_jax.data.sources.splits import EVALUATION_SPLITS, refuse_slice, resolve_split
from beitv2_jax.data.sources.unreadable import file_bytes, unreadable
from beitv2_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class FolderSource:
    """Images in class folders, `PATH/<split>/<class>/*`, or without classes, `PATH/<split>/*`.

    `<split>/` may be missing for the split "train". Labels number the sorted class names, example ids the sorted
    files of the sorted classes; without classes the label is -1. A split beside `train` takes its class names from
    there, so that a class missing in it shifts no label. The name carries a digest of the relative file names: it
    follows the data when they are moved and changes when files do.

    Costs 8 bytes and its name a file in every process: 0.4 GB for 14 million.
    """

    def __init__(self, path: str, split: str):
        root = pathlib.Path(path).expanduser()
        self._path, self._asked = path, split
        self.split, self._root, class_directory = _folder_of_split(root, split)
        self.class_names = _class_folders(class_directory)
        self.num_classes = len(self.class_names)
        _check_classes(self._root, class_directory, self.class_names)
        folders = self.class_names or ("",)
        self._files = _Names(listed_images(self._root / folder) for folder in folders)
        if not len(self._files):
            raise UserError(
                f"There are no images in {self._root}.",
                f"they lie deeper, or end in something else than {' '.join(IMAGE_SUFFIXES)}",
                f"{self._root}/<class>/<image>, or {self._root}/<image> for images without classes",
            )
        prefixes = [os.fsencode(f"{name}/") for name in self.class_names] or [b""]
        self.name = f"folder:{root.resolve().name}@{self._files.digest(prefixes)}"

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        label, file = self._files[example_id]
        path = self._root / (self.class_names[label] if self.class_names else "") / file
        where = f"{path} (example {example_id})"
        try:
            image = file_bytes(path)
        except RecordError as error:
            return unreadable(example_id, where, error)
        return {
            "image": image,
            "label": label if self.class_names else -1,
            "example_id": int(example_id),
            "where": where,
        }

    def __reduce__(self):
        return FolderSource, (self._path, self._asked)


class _Names:
    """File names in groups, held as one string of bytes: Python's own strings would take three times the room."""

    def __init__(self, groups: Iterable[list[str]]):
        text, lengths, ends = bytearray(), [], [0]
        for names in groups:
            encoded = [os.fsencode(name) for name in names]
            text += b"".join(encoded)
            lengths.append(np.fromiter(map(len, encoded), np.uint16, len(encoded)))
            ends.append(ends[-1] + len(encoded))
        self._text, self._group_ends = text, np.array(ends)
        self._ends = np.concatenate([np.zeros(1, np.uint16), *lengths]).cumsum(dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[int, str]:
        """Return the number of the group and the name."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        group = int(np.searchsorted(self._group_ends, index, side="right")) - 1
        return group, os.fsdecode(self._name(index))

    def _name(self, index: int) -> bytes:
        return bytes(self._text[self._ends[index] : self._ends[index + 1]])

    def digest(self, prefixes: list[bytes]) -> str:
        """Return a digest of all names, each behind the prefix of its group."""
        hasher, separator = hashlib.blake2b(digest_size=6), b""
        for prefix, start, end in zip(prefixes, self._group_ends[:-1], self._group_ends[1:], strict=True):
            for index in range(start, end):
                hasher.update(separator + prefix + self._name(index))
                separator = b"\n"
        return hasher.hexdigest()


def digest_of_names(names: list[str]) -> str:
    """Return a digest of file names."""
    return _Names([names]).digest([b""])


def _visible(directory: pathlib.Path) -> Iterator[os.DirEntry]:
    if directory.is_dir():
        with os.scandir(directory) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))


def _class_folders(directory: pathlib.Path) -> tuple[str, ...]:
    """Return the sorted names of the visible folders in `directory`; none if it does not exist."""
    return tuple(sorted(entry.name for entry in _visible(directory) if entry.is_dir()))


def listed_images(directory: pathlib.Path) -> list[str]:
    """Return the sorted names of the visible images in `directory`; none if it does not exist."""
    return sorted(
        entry.name for entry in _visible(directory) if entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file()
    )


def _check_classes(directory: pathlib.Path, class_directory: pathlib.Path, class_names: tuple[str, ...]) -> None:
    """Raise a UserError unless every image of the split belongs to a class, or none does."""
    unknown = sorted(set(_class_folders(directory)) - set(class_names))
    if unknown:
        raise UserError(
            f"{directory} has the class folder {unknown[0]!r}, which {class_directory} has not.",
            "the splits hold different classes, so their labels would not agree",
            f"the same class folders in both, or remove {directory / unknown[0]}",
        )
    if class_names and (loose := listed_images(directory)):
        raise UserError(
            f"{directory} holds class folders and, beside them, {len(loose)} images such as {loose[0]}.",
            "images without a class got among those with one",
            "move them away, or all images into one folder to use them without classes",
        )


def _folder_of_split(root: pathlib.Path, split: str) -> tuple[str, pathlib.Path, pathlib.Path]:
    """Return the split's name, its folder, and the folder whose sub-folders number the classes."""
    if not root.is_dir():
        raise UserError(
            f"The image folder {root} does not exist.",
            "data.source=folder:PATH is misspelt or relative to another directory",
            f"a folder of images; now in {pathlib.Path.cwd()}",
        )
    refuse_slice(split, f"The image folder {root}")
    splits = tuple(name for name in ("train", *EVALUATION_SPLITS) if (root / name).is_dir())
    if (root / split).is_dir():
        splits = (*splits, split)
    if not splits and split == "train":
        return "train", root, root
    found = resolve_split(split, splits, f"The image folder {root}")
    return found, root / found, root / ("train" if "train" in splits else found)
