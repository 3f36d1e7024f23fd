"""Images with label maps: folders in the published layout of ADE20K, and TFDS sets; sources for segmentation."""

import os
import pathlib
from typing import Any

from beitv2_jax.data.array_files import RecordError
from beitv2_jax.data.decode import CorruptImageError
from beitv2_jax.data.segmentation.label_maps import decode_label_map
from beitv2_jax.data.sources import open_with
from beitv2_jax.data.sources.folders import IMAGE_SUFFIXES, digest_of_names, listed_images
from beitv2_jax.data.sources.splits import refuse_slice, resolve_split
from beitv2_jax.data.sources.tfds import TfdsSource
from beitv2_jax.data.sources.unreadable import file_bytes, unreadable
from beitv2_jax.errors import UserError

IMAGES, MAPS = "images", "annotations"
MAP_FEATURES = ("annotation", "segmentation_mask")
"""Names under which TFDS sets keep their label maps, the first one first."""
_FOLDER_NAMES = {"train": ("train", "training"), "training": ("training", "train")}


class FolderLabelMaps:
    """`PATH/images/<split>/<stem>.jpg` with `PATH/annotations/<split>/<stem>.png`, as ADE20K is published.

    The splits train and training are tried for each other, and so are validation, val and test. Examples are the
    sorted images. The name follows the data when they are moved, and changes when files do.

    Raises:
      UserError: no such folder or split, no images, or an image without its map.
    """

    def __init__(self, path: str, split: str):
        root = pathlib.Path(path).expanduser()
        self._path, self._asked = path, split
        refuse_slice(split, f"The folder {root}")
        if not (root / IMAGES).is_dir() or not (root / MAPS).is_dir():
            raise UserError(
                f"{root} has no folders {IMAGES} and {MAPS}.",
                "data.source=folder:PATH is misspelt, relative to another directory, or names one of the two",
                f"the folder that holds {IMAGES}/<split>/*.jpg and {MAPS}/<split>/*.png; now in {pathlib.Path.cwd()}",
            )
        available = sorted(entry.name for entry in (root / IMAGES).iterdir() if entry.is_dir())
        asked = next((name for name in _FOLDER_NAMES.get(split, (split,)) if name in available), split)
        self.split = resolve_split(asked, available, f"The folder {root / IMAGES}")
        self._images, self._maps = root / IMAGES / self.split, root / MAPS / self.split
        self._files = listed_images(self._images)
        if not self._files:
            raise UserError(
                f"There are no images in {self._images}.",
                f"they lie deeper, or end in something else than {' '.join(IMAGE_SUFFIXES)}",
                f"{self._images}/<stem>.jpg",
            )
        maps = set(os.listdir(self._maps)) if self._maps.is_dir() else set()
        if missing := [file for file in self._files if _map_of(file) not in maps]:
            raise UserError(
                f"{len(missing)} of {len(self._files)} images in {self._images} have no label map, {missing[0]} one.",
                "the maps were not unpacked, or have other names",
                f"{self._maps / _map_of(missing[0])}",
            )
        self.num_classes, self.class_names = 0, ()
        self.name = f"folder:{root.resolve().name}@{digest_of_names(self._files)}"

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        path = self._images / self._files[example_id]
        where = f"{path} (example {example_id})"
        try:
            image, label_map = file_bytes(path), file_bytes(self._maps / _map_of(path.name))
        except RecordError as error:
            return {**unreadable(example_id, where, error), "label_map": b""}
        return {"image": image, "label_map": label_map, "example_id": int(example_id), "where": where}

    def __reduce__(self):
        return FolderLabelMaps, (self._path, self._asked)


def _map_of(file: str) -> str:
    return f"{pathlib.PurePath(file).stem}.png"


class TfdsLabelMaps(TfdsSource):
    """A TFDS set with an image feature of one of `MAP_FEATURES` beside `image`.

    Raises:
      UserError: none of them, or maps that hold something else than one number a pixel.
    """

    def __init__(self, directory: str | os.PathLike, split: str):
        super().__init__(directory, split)
        self._map = next((name for name in MAP_FEATURES if name in self._features.decoders), "")
        if not self._map:
            raise UserError(
                f"{self.name} has no label maps; its images are {', '.join(self._features.decoders)}.",
                "it is a set for classification",
                f"a TFDS set with an image feature {' or '.join(map(repr, MAP_FEATURES))}, or folder:PATH",
            )
        try:
            decode_label_map(self._features.deserialized(self._records[0])[self._map], f"{self.name}, example 0")
        except RecordError:
            pass  # it is listed when it is met
        except CorruptImageError as error:
            raise UserError(
                f"The label maps of {self.name} cannot be used: {error.cause}.",
                "TFDS prepares scene_parse150 1.0.0 from the instance maps of 2017, which are no scene parsing",
                "folder:PATH of ADEChallengeData2016 as published, or a TFDS set prepared from it",
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
        return TfdsLabelMaps, (self._directory, self._asked)


def open_label_maps(spec: str, split: str, data_dir: str = "") -> FolderLabelMaps | TfdsLabelMaps:
    """Open `folder:PATH`, `tfds:NAME[/CONFIG][:VERSION]` or `embedded[/CONFIG]` with its label maps.

    Raises:
      UserError: another kind of source, data not there, without maps, or no such split.
    """
    source = open_with({"folder": FolderLabelMaps, "tfds": TfdsLabelMaps}, spec, split, data_dir)
    if source is None:
        raise UserError(
            f"There is no source of label maps {spec!r}.",
            "data.source lacks its kind, or is of a kind that has images alone",
            "folder:PATH (images/ and annotations/), tfds:NAME (a prepared TFDS set with label maps) or embedded",
        )
    return source
