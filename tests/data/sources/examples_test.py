"""tf.train.Example without TensorFlow: any bytes give an image and a label, or nothing; features have a fixed order."""

import subprocess
import sys

import hypothesis
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from beitv2_jax.data.sources.examples import image_and_label, in_fixed_order


def _example(features: dict) -> tf_example_pb2.Example:
    example = tf_example_pb2.Example()
    for key, value in features.items():
        kind = example.features.feature[key]
        (kind.int64_list if isinstance(value, int) else kind.bytes_list).value.append(value)
    return example


@hypothesis.given(st.binary(max_size=200))
def test_any_bytes_are_answered(record):
    found = image_and_label(record)
    assert found is None or (isinstance(found[0], bytes) and isinstance(found[1], int))


@hypothesis.given(
    st.binary(max_size=50),
    st.none() | st.integers(-(2**63), 2**63 - 1),
    st.sampled_from(["image", "image/encoded"]),
    st.sampled_from(["label", "image/class/label"]),
    st.dictionaries(st.text("abc", min_size=1), st.binary(max_size=9)),
)
def test_image_and_label_come_back(image, label, image_key, label_key, others):
    features = {**others, image_key: image, **({} if label is None else {label_key: label})}
    record = _example(features).SerializeToString()
    assert image_and_label(record) == (image, -1 if label is None else label)
    assert image_and_label(in_fixed_order(record)) == (image, -1 if label is None else label)


def test_an_example_without_image_is_none():
    assert image_and_label(_example({"label": 3}).SerializeToString()) is None
    assert image_and_label(_example({"image": 3}).SerializeToString()) is None
    assert image_and_label(b"") is None


SERIALIZE = """
import sys
from tensorflow_datasets.proto import tf_example_pb2
from beitv2_jax.data.sources.examples import in_fixed_order
example = tf_example_pb2.Example()
for key in sys.argv[1:]:
    example.features.feature[key].bytes_list.value.append(key.encode())
sys.stdout.buffer.write(in_fixed_order(example.SerializeToString()))
"""


def test_every_process_writes_the_same_bytes():
    # the order that protobuf chooses by itself hangs on a seed that each process draws
    keys = [f"feature {i}" for i in range(9)]
    written = {
        subprocess.run([sys.executable, "-c", SERIALIZE, *order], capture_output=True, check=True).stdout
        for order in (keys, keys, keys[::-1])
    }
    assert len(written) == 1 and len(written.pop()) > 100
