"""tf.train.Example, the record that TFDS and TensorFlow's own tools write, without TensorFlow."""

from typing import Any

_IMAGE_KEYS = ("image", "image/encoded")
_LABEL_KEYS = ("label", "image/class/label")


def in_fixed_order(record: bytes) -> bytes:
    """Return a serialized tf.train.Example with its features in the order of their names.

    Without this their order, and so the bytes of a file, would differ from process to process.
    """
    return _parse(record).SerializeToString(deterministic=True)


def image_and_label(record: bytes) -> tuple[bytes, int] | None:
    """Return the encoded image and the label (-1 = none) of a serialized tf.train.Example; None if it has no image.

    The image is the feature `image` or `image/encoded`, the label `label` or `image/class/label`.
    """
    try:
        features = _parse(record).features.feature
    except Exception:  # the parser's errors belong to whichever protobuf library is installed
        return None
    images = [features[key].bytes_list.value for key in _IMAGE_KEYS if key in features]
    if not images or len(images[0]) != 1:
        return None
    labels = [features[key].int64_list.value for key in _LABEL_KEYS if key in features]
    return images[0][0], int(labels[0][0]) if labels and labels[0] else -1


def _parse(record: bytes) -> Any:
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(record)
