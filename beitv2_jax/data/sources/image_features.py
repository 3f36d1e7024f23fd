"""Features of a TFDS set of images: the encoded image and the label of a record, and nothing else decoded."""

from collections.abc import Mapping
from typing import Any

from beitv2_jax.data.array_files import RecordError
from beitv2_jax.errors import UserError


class ImageFeatures:
    """What the sources need of a TFDS `FeaturesDict` with a feature `image` and maybe a `label`.

    Attributes:
      decoders: TFDS's argument that leaves images encoded.
      class_names: of the labels; empty if there are none.

    Raises:
      UserError: no feature `image`; `where` begins the sentence.
    """

    def __init__(self, features, where: str):
        import tensorflow_datasets as tfds

        if "image" not in features:
            raise UserError(
                f"{where} has no feature 'image'; it has {', '.join(features)}.",
                "it is not a set of images",
                "a TFDS set for image classification, such as tfds:imagenette",
            )
        self._features = features
        encoded = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
        self.decoders = {key: tfds.decode.SkipDecoding() for key in encoded}
        label = dict(features).get("label")
        self.class_names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()

    def image_and_label(self, example: Mapping[str, Any]) -> tuple[bytes, int]:
        """Return the encoded image and the label (-1 = none) of a deserialized record."""
        return example["image"], int(example["label"]) if self.class_names else -1

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
        except Exception as error:  # what TFDS and protobuf raise on foreign bytes is not documented
            raise RecordError(f"the record is none of this data set ({error!r})") from error
