"""Models in ONNX, run by onnxruntime, give the numbers of the Python API."""

import json

import numpy as np
import onnxruntime
import pytest
from convert_states import KINDS, drawn_weights

from beitv2_jax import api
from beitv2_jax.convert.writing import write
from beitv2_jax.data.augment import center_crop
from beitv2_jax.data.segmentation.windows import Sliding

PICTURES = [
    np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8) for shape in ((12, 17, 3), (20, 11, 3), (9, 9, 3))
]
CROPS = np.stack([center_crop(picture, 9) for picture in PICTURES])


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_gives_our_numbers(kind, tmp_path):
    weights = drawn_weights(kind, position="absolute" if kind == "vqkd" else "relative")
    write(weights, str(tmp_path / "model"), "onnx")
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    session = onnxruntime.InferenceSession(tmp_path / "model" / "model.onnx")
    batches = [CROPS[index : index + 1] for index in range(3)] if kind == "segmenter" else [CROPS[:1], CROPS[1:]]
    names = list(manifest["outputs"])
    answers = [session.run(names, {"images": batch}) for batch in batches]
    found = {name: np.concatenate(parts) for name, *parts in zip(names, *answers, strict=True)}
    for name, array in found.items():
        assert list(array.shape[1:]) == manifest["outputs"][name]["shape"][1:]
        assert str(array.dtype) == manifest["outputs"][name]["dtype"]
    if kind == "segmenter":
        network = api.Segmenter(weights, "", "float32")
        # one window that is the whole image
        network.__dict__["sliding"] = Sliding(crop=9, stride=6, long_side=9, short_side=9)
        np.testing.assert_array_equal(found["logits"].argmax(-1), network.predict(CROPS))
        return
    if kind == "vqkd":
        np.testing.assert_array_equal(found["code_ids"], api.Tokenizer(weights, "", "float32").encode(PICTURES))
        return
    if kind == "mim":
        expected = api.Backbone(weights, "", "float32")(PICTURES)._asdict()
    else:
        expected = {"logits": api.Classifier(weights, "", "float32").logits(PICTURES)}
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5 * np.abs(expected[name]).max())


def test_a_convolutional_stem(tmp_path):
    weights = drawn_weights("classifier", stem="conv", patch_size=4)
    write(weights, str(tmp_path / "model"), "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model" / "model.onnx")
    crops = np.stack([center_crop(picture, 12) for picture in PICTURES])
    (found,) = session.run(["logits"], {"images": crops})
    expected = api.Classifier(weights, "", "float32").logits(PICTURES)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
