"""Features of a TFDS set of images: the encoded image and the label of a record, and nothing else decoded."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from beitv2_jax.data.array_files import RecordError
from beitv2_jax.data.sources.label_sets import multi_hot
from beitv2_jax.errors import UserError
from beitv2_jax.runtime.buckets import as_path

NAMES_FILE = "labels.txt"
"""Beside the records: the names of the classes, one a line, where the data set does not give them."""
UNKNOWN_NAME = -2
"""Label of a text that is none of the class names."""


class ImageFeatures:
    """What the sources need of a TFDS `FeaturesDict` with a feature `image` and maybe labels.

    The feature `label` is a class label, or a whole number or a text where `NAMES_FILE` lies in `directory`; a text is
    the name of its class. Where it is none of these, several classes an image are read from the first of `label`,
    `labels` and `objects` that is a sequence of class labels (of objects: their `label`, as in detection sets) or a
    vector with 0 or 1 for each class of `NAMES_FILE`. Labels of another kind are not used.

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
        found = dict(features)
        label = found.get("label")
        self.class_names, self._numbers, self._label_set = (), None, None
        if isinstance(label, tfds.features.ClassLabel):
            self.class_names = tuple(label.names)
        elif isinstance(label, tfds.features.Text):
            self.class_names = listed_class_names(directory)
            self._numbers = {name.encode(): number for number, name in enumerate(self.class_names)}
        elif isinstance(label, tfds.features.Tensor) and label.shape == () and np.dtype(label.np_dtype).kind in "biu":
            self.class_names = listed_class_names(directory)
        else:
            self.class_names, self._label_set = _label_sets(found, listed_class_names(directory))

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes."""
        return self._label_set is not None

    def image_and_label(self, example: Mapping[str, Any]) -> tuple[bytes, Any]:
        """Return the encoded image and the label of a deserialized record: -1 for none, or 0 and 1 for every class.

        Raises:
          RecordError: one of several classes is none of the data set.
        """
        if not self.class_names:
            return example["image"], -1
        if self._label_set is not None:
            numbers, count = np.asarray(self._label_set(example), int), len(self.class_names)
            if not ((numbers >= 0) & (numbers < count)).all():
                raise RecordError(f"one of its labels is none of the {count} classes")
            return example["image"], multi_hot(numbers, count)
        label = example["label"]
        return example["image"], int(label) if self._numbers is None else self._numbers.get(label, UNKNOWN_NAME)

    def read(self, record: bytes) -> tuple[bytes, Any]:
        """Return `image_and_label` of a serialized record; raises as that and `deserialized` do."""
        example = self.deserialized(record)
        has_one = self.class_names and not self.multi_label
        if example["image"] is None or (has_one and example["label"] is None):
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


def _label_sets(
    features: Mapping[str, Any], names: tuple[str, ...]
) -> tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Any] | None]:
    """Return the classes of a set with several an image, and example -> their numbers; ((), None) of other sets.

    `names` are those of `NAMES_FILE`, which a vector of 0 and 1 has one number for each of.
    """
    import tensorflow_datasets as tfds

    for key in ("label", "labels", "objects"):
        feature = features.get(key)
        if isinstance(feature, tfds.features.Sequence):
            of_one = feature.feature
            if isinstance(of_one, tfds.features.ClassLabel):
                return tuple(of_one.names), lambda example, key=key: example[key]
            objects = dict(of_one) if isinstance(of_one, tfds.features.FeaturesDict) else {}
            if key == "objects" and isinstance(objects.get("label"), tfds.features.ClassLabel):
                return tuple(objects["label"].names), lambda example: example["objects"]["label"]
        elif isinstance(feature, tfds.features.Tensor) and names and feature.shape == (len(names),):
            return names, lambda example, key=key: _places(example[key])
    return (), None


def _places(vector: np.ndarray) -> np.ndarray:
    if not np.isin(vector, (0, 1)).all():
        raise RecordError("one of its labels is neither 0 nor 1")
    return np.flatnonzero(vector)


def listed_class_names(directory: str | os.PathLike) -> tuple[str, ...]:
    """Return the class names in `NAMES_FILE`, in the order of their numbers; none if there is no such file."""
    file = as_path(directory) / NAMES_FILE
    return tuple(file.read_text(encoding="utf-8").rstrip("\n").split("\n")) if file.is_file() else ()


def label_fault(label: Any, num_classes: int) -> str:
    """Return why a record with `label` cannot be used; "" if it can, or if its data set has no or several classes."""
    if not num_classes or np.ndim(label) or -1 <= label < num_classes:
        return ""
    return f"its label is none of the {num_classes} classes"
