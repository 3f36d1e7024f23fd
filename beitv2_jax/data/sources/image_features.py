"""Features of a TFDS set of images: the encoded image and the label of a record, and nothing else decoded."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from beitv2_jax.data.array_files import RecordError
from beitv2_jax.errors import UserError
from beitv2_jax.runtime.buckets import as_path

NAMES_FILE = "labels.txt"
"""Beside the records: the names of the classes, one a line, where the data set does not give them."""
UNKNOWN_NAME = -2
"""Label of a text that is none of the class names."""


class ImageFeatures:
    """What the sources need of a TFDS `FeaturesDict` with a feature `image` and maybe a `label`.

    Labels are class labels, or whole numbers or texts where `NAMES_FILE` lies in `directory`; a text is the name of its
    class. Labels of another kind are not used.

    Attributes:
      decoders: TFDS's argument that leaves images encoded.
      class_names: of the labels; empty if there are none.

    Raises:
      UserError: no feature `image`; `where` begins the sentence.
    """

    def __init__(self, features, where: str, directory: str | os.PathLike):
        import tensorflow_datasets as tfds

        if "image" not in features:
            raise UserError(
                f"{where} has no feature 'image'; it has {', '.join(features)}.",
                "Is it a data set of something else than images?",
                "Write --config.data.source=tfds:NAME of a set for image classification, such as tfds:imagenette.",
            )
        self._features = features
        encoded = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
        self.decoders = {key: tfds.decode.SkipDecoding() for key in encoded}
        label = dict(features).get("label")
        self.class_names, self._numbers = (), None
        if isinstance(label, tfds.features.ClassLabel):
            self.class_names = tuple(label.names)
        elif isinstance(label, tfds.features.Text):
            self.class_names = listed_class_names(directory)
            self._numbers = {name.encode(): number for number, name in enumerate(self.class_names)}
        elif isinstance(label, tfds.features.Tensor) and label.shape == () and np.dtype(label.np_dtype).kind in "biu":
            self.class_names = listed_class_names(directory)

    def image_and_label(self, example: Mapping[str, Any]) -> tuple[bytes, int]:
        """Return the encoded image and the label (-1 = none) of a deserialized record."""
        if not self.class_names:
            return example["image"], -1
        label = example["label"]
        return example["image"], int(label) if self._numbers is None else self._numbers.get(label, UNKNOWN_NAME)

    def read(self, record: bytes) -> tuple[bytes, int]:
        """Return the encoded image and the label of a serialized record; raises as `deserialized` does."""
        example = self.deserialized(record)
        if example["image"] is None or (self.class_names and example["label"] is None):
            raise RecordError("the record has no image or no label")
        return self.image_and_label(example)

    def deserialized(self, record: bytes) -> Mapping[str, Any]:
        """Return the features of a serialized record, images encoded.

        Raises:
          RecordError: it is no record of this set.
        """
        try:
            return self._features.deserialize_example_np(record, decoders=self.decoders)
        except Exception as error:  # what TFDS and protobuf raise on unknown bytes is not documented
            raise RecordError(f"the record is none of this data set ({error!r})") from error


def listed_class_names(directory: str | os.PathLike) -> tuple[str, ...]:
    """Return the class names in `NAMES_FILE`, in the order of their numbers; none if there is no such file."""
    file = as_path(directory) / NAMES_FILE
    return tuple(file.read_text(encoding="utf-8").rstrip("\n").split("\n")) if file.is_file() else ()


def label_fault(label: int, num_classes: int) -> str:
    """Return why a record with `label` cannot be used; "" if it can, or if its data set has no classes."""
    return "" if not num_classes or -1 <= label < num_classes else f"its label is none of the {num_classes} classes"
