"""Images with label maps: folders in the published layout of ADE20K, and TFDS sets; sources for segmentation."""

import functools
import itertools
import os
import pathlib
import unicodedata
from typing import Any, NamedTuple

from beitv2_jax.data.array_files import RecordError
from beitv2_jax.data.bad_records import LeftOut
from beitv2_jax.data.decode import IMAGE_SUFFIXES, CorruptImageError
from beitv2_jax.data.segmentation.label_maps import MAP_SUFFIXES, decode_label_map
from beitv2_jax.data.sources import Source, open_source, open_with
from beitv2_jax.data.sources.folders import (
    class_folders,
    digest_of_names,
    digest_of_sizes,
    first_left_out,
    list_images,
)
from beitv2_jax.data.sources.image_features import listed_class_names
from beitv2_jax.data.sources.splits import refuse_slice, resolve_split
from beitv2_jax.data.sources.tfds import TfdsSource
from beitv2_jax.data.sources.unreadable import file_bytes, unreadable
from beitv2_jax.errors import UserError

IMAGES, MAPS = "images", "annotations"
MAP_FEATURES = ("annotation", "segmentation_mask")
"""Names under which TFDS sets keep their label maps, the first one first."""
PART_MAPS = ("part_map",)
"""Name under which the embedded set keeps which part of its object a pixel is of."""
ADE_NAMES_FILE = "objectInfo150.txt"
"""In the folder of ADE20K: a line of titles, then one for each class, whose last column is its name."""


class Layout(NamedTuple):
    """How a data set of images and label maps lies in folders.

    Attributes:
      images, maps: folders of both, in which `{split}` stands for the name of a split.
      image_end, map_end: what follows the stem that an image and its map have in common, before the endings.
      lists: file of the stems of a split, one a line; '' where a split has a folder.
    """

    images: str
    maps: str
    image_end: str = ""
    map_end: str = ""
    lists: str = ""

    def splits(self, root: pathlib.Path) -> list[str]:
        """Return the splits that a folder has in this layout."""
        if self.lists:
            return sorted(file.stem for file in (root / self.lists).parent.glob("*.txt"))
        folders = class_folders(root / self.images.partition("{split}")[0])
        names = itertools.chain.from_iterable(folders.values())
        return [name for name in names if (root / self.maps.format(split=name)).is_dir()]

    def fits(self, root: pathlib.Path) -> bool:
        """Tell whether a folder is one of this layout."""
        fixed = [part.partition("{split}")[0] for part in (self.images, self.maps)]
        return all((root / part).is_dir() for part in fixed) and (all(fixed) or bool(self.splits(root)))


LAYOUTS = (
    Layout(f"{IMAGES}/{{split}}", f"{MAPS}/{{split}}"),  # ADE20K, and the one to write for data of one's own
    Layout("leftImg8bit/{split}", "gtFine/{split}", "_leftImg8bit", "_gtFine_labelIds"),  # Cityscapes
    Layout("JPEGImages", "SegmentationClass", lists="ImageSets/Segmentation/{split}.txt"),  # PASCAL VOC
    Layout("{split}", "{split}annot"),  # CamVid
)
"""Layouts that are recognised, in this order."""
_FOLDER_NAMES = {"train": ("train", "training"), "training": ("training", "train")}


class FolderLabelMaps:
    """`PATH/images/<split>/**/<stem>.jpg` with `PATH/annotations/<split>/**/<stem>.png`, or another of `LAYOUTS`.

    The names of the classes stand in `PATH/labels.txt`, one a line, or in the file of ADE20K; without them there are
    none. Images and maps may have any ending of `IMAGE_SUFFIXES` and `MAP_SUFFIXES`. The splits train and training are
    tried for each other, and so are validation, val and test. Examples are the sorted images. The name follows the data
    when they are moved, and changes when files do. `sizes` is a digest of the sizes of images and maps.

    Raises:
      UserError: no such folder or split, no images, or an image without its map.
    """

    empty_classes = ()

    def __init__(self, path: str, split: str):
        root = pathlib.Path(path).expanduser()
        self.class_names = listed_class_names(root) or _names_of_ade(root)
        self.num_classes = len(self.class_names)
        self._path, self._asked = path, split
        refuse_slice(split, f"The folder {root}")
        layout = next((layout for layout in LAYOUTS if layout.fits(root)), None)
        if layout is None:
            raise UserError(
                f"{root} has no folders {IMAGES} and {MAPS}, and not those of Cityscapes, PASCAL VOC or CamVid.",
                f"Did you mean a folder below {pathlib.Path.cwd()}, where the program runs, or name one of the two?",
                f"Write --config.data.source=folder:PATH with the folder of {IMAGES}/<split>/ and {MAPS}/<split>/.",
            )
        available = layout.splits(root)
        asked = next((name for name in _FOLDER_NAMES.get(split, (split,)) if name in available), split)
        self.split = resolve_split(asked, available, f"The folder {root}")
        self._images, self._maps = (root / part.format(split=self.split) for part in (layout.images, layout.maps))
        images, maps = list_images(self._images), list_images(self._maps)
        self._files = images.images
        if layout.lists:
            listed = set((root / layout.lists.format(split=self.split)).read_text(encoding="utf-8").split())
            self._files = [file for file in self._files if _stem(file) in listed]
        if not self._files:
            raise UserError(
                f"There are no images in {self._images}{first_left_out(images.left_out)}.",
                f"Did you mean another folder, or images whose names end in {' '.join(IMAGE_SUFFIXES)}?",
                f"Put the images into {self._images}.",
            )
        found = [file for file in maps.images if _stem(file).endswith(layout.map_end)]
        stems = {file: _stem(file).removesuffix(layout.map_end) for file in found}
        map_of = {stems[file]: file for suffix in MAP_SUFFIXES for file in found if file.lower().endswith(suffix)}
        of_image = {file: _stem(file).removesuffix(layout.image_end) for file in self._files}
        if missing := [file for file, stem in of_image.items() if stem not in map_of]:
            raise UserError(
                f"{len(missing)} of {len(self._files)} images in {self._images} have no label map, {missing[0]} one.",
                "Were the label maps not unpacked, or do they have other names?",
                f"Give {missing[0]} the label map {self._maps / (of_image[missing[0]] + layout.map_end)}.png, and "
                "the others theirs, or move these images away.",
            )
        self._map_files = [map_of[stem] for stem in of_image.values()]
        # where splits are lists, the others' maps lie in the same folder
        extra = () if layout.lists else sorted(set(found) - set(self._map_files))
        unused = [os.fspath(self._maps / file) for file in extra]
        self.left_out = (
            *images.left_out,
            *maps.left_out,
            *(LeftOut(file, f"no image in {self._images} has this label map") for file in unused),
        )
        self.name = f"folder:{root.resolve().name}@{digest_of_names(self._files)}"

    @functools.cached_property
    def sizes(self) -> str:
        """Digest of the files' sizes, which are looked up when it is asked for."""
        pairs = zip(self._files, self._map_files, strict=True)
        return digest_of_sizes(
            itertools.chain.from_iterable((self._images / image, self._maps / label_map) for image, label_map in pairs)
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        path = self._images / self._files[example_id]
        where = f"{path} (example {example_id})"
        try:
            image, label_map = file_bytes(path), file_bytes(self._maps / self._map_files[example_id])
        except RecordError as error:
            return {**unreadable(example_id, where, error), "label_map": b""}
        return {"image": image, "label_map": label_map, "example_id": int(example_id), "where": where}

    def __reduce__(self):
        return FolderLabelMaps, (self._path, self._asked)


def _names_of_ade(root: pathlib.Path) -> tuple[str, ...]:
    file = root / ADE_NAMES_FILE
    lines = file.read_text(encoding="utf-8").splitlines()[1:] if file.is_file() else []
    return tuple(line.rpartition("\t")[2].strip() for line in lines if line.strip())


def _stem(file: str) -> str:
    """Return a path without its ending, in the one of Unicode's spellings that image and map are compared in."""
    return unicodedata.normalize("NFC", os.path.splitext(file)[0])


class TfdsLabelMaps(TfdsSource):
    """A TFDS set with an image feature of one of the names `maps` beside `image`.

    The names of the classes stand in `labels.txt` beside its files, one a line; the labels of its images are not used.

    Raises:
      UserError: none of them, or maps that hold something else than one number a pixel.
    """

    def __init__(self, directory: str | os.PathLike, split: str, maps: tuple[str, ...] = MAP_FEATURES):
        super().__init__(directory, split)
        self._maps = maps
        self.class_names = listed_class_names(directory)
        self.num_classes = len(self.class_names)
        self._map = next((name for name in maps if name in self._features.decoders), "")
        if not self._map:
            raise UserError(
                f"{self.name} has no label maps; its images are {', '.join(self._features.decoders)}.",
                "Is it a data set for classification?",
                "Write --config.data.source=tfds:NAME of a set with an image feature "
                f"{' or '.join(map(repr, MAP_FEATURES))}, or folder:PATH.",
            )
        try:
            decode_label_map(self._features.deserialized(self._records[0])[self._map], f"{self.name}, example 0")
        except RecordError:
            pass  # it is listed when it is met
        except CorruptImageError as error:
            raise UserError(
                f"The label maps of {self.name} cannot be used: {error.cause}.",
                "Is it scene_parse150 1.0.0, which TFDS prepares from the instance maps of 2017?",
                "Write --config.data.source=folder:PATH of ADEChallengeData2016 as published, or tfds:NAME of a set "
                "prepared from it.",
            ) from error

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        where = f"{self._records.where(example_id)} (example {example_id})"
        try:
            record = self._features.deserialized(self._records[example_id])
        except RecordError as error:
            return {**unreadable(example_id, where, error), "label_map": b""}
        return {
            "image": record["image"],
            "label_map": record[self._map],
            "example_id": int(example_id),
            "where": where,
        }

    def __reduce__(self):
        return TfdsLabelMaps, (self._directory, self._asked, self._maps)


class WithoutLabels:
    """A source of label maps as one of images, none of which has a class; the attributes are those of the source."""

    num_classes, class_names = 0, ()

    def __init__(self, source: "FolderLabelMaps"):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        return {**self._source[example_id], "label": -1}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __reduce__(self):
        return WithoutLabels, (self._source,)


def open_with_label_maps(
    spec: str, split: str, data_dir: str = "", train_split: str = "train"
) -> tuple[Source, dict[str, "FolderLabelMaps | TfdsLabelMaps"]]:
    """Open a source of images as `open_source` does, and the sources of its label maps: 'mask' and 'part', if any.

    A folder with label maps is one in the layout of `FolderLabelMaps`.
    """
    kind, _, location = spec.partition(":")
    root = pathlib.Path(location).expanduser()
    if kind == "folder" and (root / IMAGES).is_dir() and (root / MAPS).is_dir():
        maps = FolderLabelMaps(location, split)
        return WithoutLabels(maps), {"mask": maps}
    source = open_source(spec, split, data_dir, train_split)
    found = source.image_features if isinstance(source, TfdsSource) else ()
    features = {"mask": MAP_FEATURES, "part": PART_MAPS}
    readers = {
        name: functools.partial(TfdsLabelMaps, maps=maps) for name, maps in features.items() if set(maps) & set(found)
    }
    return source, {name: open_with({"tfds": reader}, spec, split, data_dir) for name, reader in readers.items()}


def open_label_maps(spec: str, split: str, data_dir: str = "") -> FolderLabelMaps | TfdsLabelMaps:
    """Open `folder:PATH`, `tfds:NAME[/CONFIG][:VERSION]` or `embedded[/CONFIG]` with its label maps.

    Raises:
      UserError: another kind of source, data not there, without maps, or no such split.
    """
    source = open_with({"folder": FolderLabelMaps, "tfds": TfdsLabelMaps}, spec, split, data_dir)
    if source is None:
        raise UserError(
            f"There is no source of label maps {spec!r}.",
            "Did you leave out the kind of the source, or write one of images alone?",
            "Write --config.data.source=folder:PATH (with images/ and annotations/ in it), tfds:NAME (a prepared TFDS "
            "set with label maps) or embedded.",
        )
    return source
