"""Images as files in folders, one folder a class, with a label file or without labels: a source of `data.sources`."""

import functools
import hashlib
import itertools
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from beitv2_jax.data.array_files import RecordError
from beitv2_jax.data.bad_records import LeftOut
from beitv2_jax.data.decode import IMAGE_SUFFIXES
from beitv2_jax.data.sources.label_files import LabelFile, comparable, read_label_file
from beitv2_jax.data.sources.label_sets import LabelSets
from beitv2_jax.data.sources.splits import EVALUATION_SPLITS, candidates, refuse_slice, resolve_split
from beitv2_jax.data.sources.unreadable import file_bytes, unreadable
from beitv2_jax.errors import UserError

_OF_SERVERS = {"@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot"}
SYSTEM_FOLDERS = _OF_SERVERS | {"__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__"}
"""Folders that operating systems and file servers make among those of the user."""


class FolderSource:
    """Images in class folders, `PATH/<split>/<class>/**`, or without classes, `PATH/<split>/*`.

    With a label file `PATH/<split>/labels.csv` or `labels.jsonl` the source is multi-label: its examples are the images
    below the folder that the file names, and their classes what it says of them.

    `<split>/` may be missing for the training split, which then has all images; `divided_folder` divides them. Labels
    number the sorted class names, example ids the sorted files of the sorted classes; without classes the label is -1.
    Every split takes its class names from the training split, so that a class missing in it shifts no label. The name
    carries a digest of the relative file names and of the classes without images: it follows the data when they are
    moved and changes when they do.

    `sizes` is a digest of the sizes of the files, which are looked up when it is asked for, and `digest` one of the
    label file.

    Costs 8 bytes and its name a file in every process: 0.4 GB for 14 million.

    Args:
      path: folder of the splits.
      split: the one to open.
      train_split: the one whose folders number the classes.
      part: of a folder without splits, what to take of the images of every class: 'evaluation' every tenth, beginning
        with the second, 'training' the others, '' all.

    Raises:
      UserError: no such folder or split, no images, images beside the class folders, a class that the training split
        has not, or a label file that cannot be used.
    """

    def __init__(self, path: str, split: str, train_split: str = "train", part: str = ""):
        root = pathlib.Path(path).expanduser()
        self._arguments = (path, split, train_split, part)
        found, self._root, class_directory = _folder_of_split(root, "train" if part else split, train_split)
        self.split = split if part else found
        listed = read_label_file(class_directory)
        own = listed if class_directory == self._root else read_label_file(self._root)
        self.multi_label, self.digest = listed is not None, own.digest if own else ""
        self.class_names = listed.class_names if listed else tuple(class_folders(class_directory))
        self.num_classes = len(self.class_names)
        folders_here = class_folders(self._root)
        listing = list_images(self._root, deep=self.multi_label)
        folders: list[tuple[int, str]] = []
        if listed or own:
            listing = _named_by(own, listed, listing, self._root, class_directory)
        else:
            _check_classes(self._root, folders_here, listing.images, class_directory, self.class_names)
            # what holds images: of each class the folders of its name, all there is if there are no classes
            folders = [
                (label, file) for label, name in enumerate(self.class_names) for file in folders_here.get(name, ())
            ]
        self._labels, self._folders = zip(*folders or [(-1, "")], strict=True)
        left_out = [*listing.left_out]

        def images_of(folder: str) -> list[str]:
            found = list_images(self._root / folder)
            left_out.extend(found.left_out)
            return _part_of(found.images, part)

        # folder by folder, as Python's strings take three times the memory of `_Names`
        self._files = _Names(map(images_of, self._folders) if folders else [_part_of(listing.images, part)])
        self.left_out = tuple(left_out)
        if not len(self._files) and part == "evaluation":
            raise UserError(
                f"{self._root} has no folders for its splits and too few images to take every tenth for evaluation.",
                "Did you mean another folder?",
                f"Put at least two images of one class into {self._root}, or images into {self._root}/train and "
                f"{self._root}/validation.",
            )
        if not len(self._files):
            raise UserError(
                f"There are no images in {self._root}{first_left_out(self.left_out)}.",
                f"Did you mean another folder, or images whose names end in {' '.join(IMAGE_SUFFIXES)}?",
                f"Put the images into {self._root}/<class>/, or into {self._root} itself to use them without classes.",
            )
        if own:
            number = {name: number for number, name in enumerate(self.class_names)}
            classes = (own.classes[comparable(file)] for _, file in self._files)
            self._label_sets = LabelSets(([number[name] for name in of_file] for of_file in classes), self.num_classes)
            present = set(np.flatnonzero(self._label_sets.counts()).tolist())
        else:
            present = {label for label, count in zip(self._labels, self._files.group_sizes, strict=True) if count}
        self.empty_classes = tuple(name for label, name in enumerate(self.class_names) if label not in present)
        prefixes = [f"{self.class_names[label]}/" if folders else "" for label in self._labels]
        self.name = f"folder:{root.resolve().name}@{self._files.digest(prefixes, () if own else self.empty_classes)}"

    @property
    def labels(self) -> Int32[np.ndarray, "n"] | LabelSets:
        """Label, or labels, of every image."""
        if self.multi_label:
            return self._label_sets
        return np.repeat(np.array(self._labels, np.int32), self._files.group_sizes)

    @functools.cached_property
    def sizes(self) -> str:
        """Digest of the files' sizes: an image that was replaced under its name has another, nearly always."""
        folders = [os.path.join(self._root, folder) for folder in self._folders]
        return digest_of_sizes(os.path.join(folders[group], file) for group, file in self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        group, _ = self._files[example_id]
        path = self.path_of(example_id)
        where = f"{path} (example {example_id})"
        try:
            image = file_bytes(path)
        except RecordError as error:
            return unreadable(example_id, where, error, self.num_classes if self.multi_label else 0)
        return {
            "image": image,
            "label": self._label_sets[example_id] if self.multi_label else self._labels[group],
            "example_id": int(example_id),
            "where": where,
        }

    def path_of(self, example_id: int) -> pathlib.Path:
        """Return the path of an image."""
        group, file = self._files[example_id]
        return self._root / self._folders[group] / file

    def __reduce__(self):
        return FolderSource, self._arguments


def divided_folder(path: str, train_split: str, eval_split: str) -> tuple[FolderSource, FolderSource] | None:
    """Return both splits of a folder that has no folder for any split; None if it has, or other splits are asked for.

    Every tenth image of every class, beginning with the second, is for evaluation, the others are for training.
    """
    root = pathlib.Path(path).expanduser()
    if train_split != "train" or eval_split not in EVALUATION_SPLITS or not root.is_dir() or _has_splits(root):
        return None
    return FolderSource(path, train_split, train_split, "training"), FolderSource(
        path, eval_split, train_split, "evaluation"
    )


def _part_of(images: list[str], part: str) -> list[str]:
    if not part:
        return images
    return [image for number, image in enumerate(images) if (number % 10 == 1) == (part == "evaluation")]


class _Names:
    """File names in groups, held as one string of bytes: Python's own strings would take three times the memory."""

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

    @property
    def group_sizes(self) -> list[int]:
        """Number of names in each group."""
        return np.diff(self._group_ends).tolist()

    def __getitem__(self, index: int) -> tuple[int, str]:
        """Return the number of the group and the name."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        group = int(np.searchsorted(self._group_ends, index, side="right")) - 1
        return group, os.fsdecode(self._name(index))

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for group, (start, end) in enumerate(itertools.pairwise(self._group_ends)):
            for index in range(start, end):
                yield group, os.fsdecode(self._name(index))

    def _name(self, index: int) -> bytes:
        return bytes(self._text[self._ends[index] : self._ends[index + 1]])

    def digest(self, prefixes: Iterable[str], empty: Iterable[str] = ()) -> str:
        """Return a digest of all names, each after the prefix of its group, and of the names of `empty` folders."""
        hasher, separator = hashlib.blake2b(digest_size=6), b""
        for prefix, start, end in zip(prefixes, self._group_ends[:-1], self._group_ends[1:], strict=True):
            encoded = os.fsencode(prefix)
            for index in range(start, end):
                hasher.update(separator + encoded + self._name(index))
                separator = b"\n"
        for folder in empty:
            hasher.update(separator + os.fsencode(f"{folder}/"))
        return hasher.hexdigest()


def digest_of_names(names: list[str]) -> str:
    """Return a digest of file names."""
    return _Names([names]).digest([""])


def digest_of_sizes(paths: Iterable[str | os.PathLike]) -> str:
    """Return a digest of the sizes of files, in their order; one that is gone counts as empty."""
    hasher = hashlib.blake2b(digest_size=6)
    for path in paths:
        try:
            size = os.stat(path).st_size
        except OSError:  # it is counted as unreadable where it is read
            size = 0
        hasher.update(b"%d\n" % size)
    return hasher.hexdigest()


def class_names_of(path: str, train_split: str) -> tuple[str, ...]:
    """Return the names of the classes in a folder, in the order of their labels; none if its images have no classes.

    Raises:
      UserError: no such folder or split, or a label file that cannot be used.
    """
    _, _, directory = _folder_of_split(pathlib.Path(path).expanduser(), train_split, train_split)
    listed = read_label_file(directory)
    return listed.class_names if listed else tuple(class_folders(directory))


class Listing(NamedTuple):
    """What a folder holds: paths of images below it, sorted, and what else is there."""

    images: list[str]
    left_out: list[LeftOut]


def list_images(directory: pathlib.Path, *, deep: bool = True) -> Listing:
    """List the visible images in `directory` and, if `deep`, in the folders below it; none if it does not exist."""
    images, left_out = [], []
    pending: list[tuple[str, tuple[str, ...]]] = [("", ())]
    while pending:
        below, above = pending.pop()
        here = (*above, os.path.realpath(directory / below))
        for entry in _visible(directory / below):
            is_folder = entry.is_dir()
            if is_folder and os.path.realpath(entry.path) in here:
                cause = "it is a link to a folder that holds it"
            else:
                cause = _cause_to_leave_out(entry)
            if cause:
                left_out.append(LeftOut(entry.path, cause))
            elif not is_folder:
                images.append(below + entry.name)
            elif deep:
                pending.append((f"{below}{entry.name}/", here))
    return Listing(sorted(images), sorted(left_out))


def _cause_to_leave_out(entry: os.DirEntry) -> str:
    """Return why an entry is neither an image nor a folder of images; "" if it is one."""
    if entry.is_dir():
        return "it is a folder of the operating system or the file server" if entry.name in SYSTEM_FOLDERS else ""
    if not entry.is_file():
        return "it is a link to nothing, or no ordinary file"
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return ""
    return f"its name ends in {suffix}, which is no image format that is read" if suffix else "its name has no ending"


def _visible(directory: pathlib.Path) -> Iterator[os.DirEntry]:
    if not directory.is_dir():
        return
    try:
        with os.scandir(directory) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"The folder {directory} cannot be listed: {error.strerror}.",
            "Is its file system still there, and may this user read it?",
            f"Make {directory} readable, or write another --config.data.source.",
        ) from error


def class_folders(directory: pathlib.Path) -> dict[str, list[str]]:
    """Return the folders of each class in `directory`, sorted by class; none if it does not exist.

    A class is a visible folder; the two spellings of an accented letter in Unicode, NFC and NFD, which file systems
    choose between, are one.
    """
    names: dict[str, list[str]] = {}
    for entry in _visible(directory):
        if entry.is_dir() and entry.name not in SYSTEM_FOLDERS:
            names.setdefault(unicodedata.normalize("NFC", entry.name), []).append(entry.name)
    return {name: sorted(names[name]) for name in sorted(names)}


def first_left_out(left_out: Sequence[LeftOut]) -> str:
    """Return the end of a sentence that says what lies in a folder without images."""
    return f"; {len(left_out)} files are left out, such as {left_out[0].where}: {left_out[0].cause}" if left_out else ""


def _check_classes(
    directory: pathlib.Path,
    folders: Iterable[str],
    beside: list[str],
    class_directory: pathlib.Path,
    class_names: tuple[str, ...],
) -> None:
    """Raise a UserError unless every image of the split belongs to a class, or none does."""
    unknown = sorted(set(folders) - set(class_names))
    if unknown:
        raise UserError(
            f"{directory} has the class folder {unknown[0]!r}, which the training split {class_directory} has not.",
            "Did you give the class another name in one of the splits, or is --config.data.train_split another one?",
            f"Make the folder {class_directory / unknown[0]}, or move {directory / unknown[0]} away.",
        )
    if class_names and beside:
        raise UserError(
            f"{directory} holds class folders and, beside them, {len(beside)} images such as {beside[0]}.",
            "Did images without a class get among those with one?",
            f"Move these images out of {directory}, or all images into one folder to use them without classes.",
        )


def _named_by(
    own: LabelFile | None,
    of_training: LabelFile | None,
    listing: Listing,
    directory: pathlib.Path,
    class_directory: pathlib.Path,
) -> Listing:
    """Return the images that the label file of a split names; what it or the folder alone has is left out.

    Raises:
      UserError: this split or the training split has no label file, or this one has a class that that one has not.
    """
    if own is None or of_training is None:
        has, lacks = (class_directory, directory) if own is None else (directory, class_directory)
        raise UserError(
            f"{has} has a file of labels, and {lacks} has none.",
            "Did you label one of the splits alone, or is --config.data.train_split another one?",
            f"Put labels.csv or labels.jsonl into every split's folder, {lacks} too.",
        )
    if unknown := [name for name in own.class_names if name not in of_training.class_names]:
        raise UserError(
            f"{own.path} has the class {unknown[0]!r}, which the training split's {of_training.path} has not.",
            "Did you give the class another name in one of the splits?",
            f"Write the name of {of_training.path.name} into {own.path}, or add the class to {of_training.path}.",
        )
    named = [name for name in listing.images if comparable(name) in own.classes]
    beside = {comparable(name) for name in listing.images}
    left_out = [entry for entry in listing.left_out if entry.where != str(own.path)]
    left_out += [
        LeftOut(str(directory / name), f"{own.path.name} has no line for it")
        for name in listing.images
        if comparable(name) not in own.classes
    ]
    left_out += [
        LeftOut(str(directory / name), f"{own.path.name} has a line for it, and there is no such image")
        for name in own.classes
        if name not in beside
    ]
    return Listing(named, left_out)


def _has_splits(root: pathlib.Path) -> bool:
    return not {"train", *EVALUATION_SPLITS}.isdisjoint(class_folders(root))


def _folder_of_split(root: pathlib.Path, split: str, train_split: str) -> tuple[str, pathlib.Path, pathlib.Path]:
    """Return the split's name, its folder, and the folder whose sub-folders number the classes."""
    if not root.is_dir():
        raise UserError(
            f"The image folder {root} does not exist.",
            f"Did you mean a folder below {pathlib.Path.cwd()}, where the program runs, or mistype the path?",
            "Write --config.data.source=folder:PATH with the absolute path of a folder of images.",
        )
    refuse_slice(split, f"The image folder {root}")
    if split == "train" and not _has_splits(root):
        return split, root, root
    folders = [folder for spellings in class_folders(root).values() for folder in spellings]
    found = resolve_split(split, folders, f"The image folder {root}")
    return found, root / found, root / next((name for name in candidates(train_split) if name in folders), found)
