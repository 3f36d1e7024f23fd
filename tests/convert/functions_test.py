"""Exported functions, run in a process that has jax and not this package, give the numbers of the Python API."""

import datetime
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from convert_states import drawn_weights

from beitv2_jax import api
from beitv2_jax.convert import functions
from beitv2_jax.convert.writing import write
from beitv2_jax.data.augment import center_crop
from beitv2_jax.data.segmentation.windows import Sliding
from beitv2_jax.errors import UserError

_USER = """
import sys
import numpy as np
from jax import export

crops, outputs = np.load("crops.npy"), {}
for kind in sys.argv[1:]:
    with open(f"{kind}/model.stablehlo", "rb") as file:
        exported = export.deserialize(file.read())
    assert exported.platforms == ("cpu", "cuda", "tpu")
    for rows in (1, len(crops)):  # any size of batch
        outputs |= {f"{kind}/{rows}/{name}": array for name, array in exported.call(crops[:rows]).items()}
assert "beitv2_jax" not in sys.modules
np.savez("outputs.npz", **outputs)
"""


@pytest.mark.parametrize("kinds", [("vqkd", "classifier"), pytest.param(("mim", "segmenter"), marks=pytest.mark.long)])
def test_functions_run_without_this_package(tmp_path, kinds):
    rng = np.random.default_rng(3)
    pictures = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((12, 17, 3), (20, 11, 3), (9, 9, 3))]
    crops = np.stack([center_crop(picture, 9) for picture in pictures])
    np.save(tmp_path / "crops.npy", crops)
    networks = {}
    for kind in kinds:
        weights = drawn_weights(kind, position="absolute" if kind == "vqkd" else "relative")
        write(weights, str(tmp_path / kind), "stablehlo")
        networks[kind] = {"vqkd": api.Tokenizer, "mim": api.Backbone, "classifier": api.Classifier}.get(
            kind, api.Segmenter
        )(weights, "", "float32")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", _USER, *kinds], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "outputs.npz")

    def compare(name: str, expected: np.ndarray) -> None:
        for rows in (1, len(crops)):
            kind, output = name.split("/")
            answer = found[f"{kind}/{rows}/{output}"]
            assert answer.dtype == expected.dtype
            np.testing.assert_allclose(answer, expected[:rows], rtol=1e-5, atol=1e-5 * np.abs(expected).max())

    if kinds == ("vqkd", "classifier"):
        compare("vqkd/code_ids", networks["vqkd"].encode(pictures))
        compare("classifier/logits", networks["classifier"].logits(pictures))
    else:
        features = networks["mim"](pictures)
        compare("mim/cls", features.cls)
        compare("mim/patches", features.patches)
        # one window that is the whole image
        networks["segmenter"].__dict__["sliding"] = Sliding(crop=9, stride=6, long_side=9, short_side=9)
        np.testing.assert_array_equal(found["segmenter/3/logits"].argmax(-1), networks["segmenter"].predict(crops))


def test_the_manifest_says_what_the_function_takes_and_returns(tmp_path):
    weights = drawn_weights("classifier", stem="conv", patch_size=4)
    write(weights, str(tmp_path / "w"), "stablehlo")
    manifest = json.loads((tmp_path / "w" / "manifest.json").read_text())
    assert manifest["input"]["shape"] == ["b", 12, 12, 3] and manifest["input"]["dtype"] == "uint8"
    assert manifest["input"]["resize_shorter_side_to"] == 13  # int(12 / 0.875)
    assert manifest["outputs"]["logits"]["shape"] == ["b", 17]
    assert manifest["jax_version"] == jax.__version__ and f"jax {jax.__version__} reads it" in manifest["expiry"]


@pytest.mark.parametrize(
    "written, until",
    [
        (datetime.date(2026, 1, 31), "2026-07-31"),
        (datetime.date(2026, 8, 31), "2027-02-28"),
        (datetime.date(2026, 12, 1), "2027-06-01"),
    ],
)
def test_the_window_of_jax_is_given_as_a_date(written, until):
    assert f"a release after {until} may refuse it" in functions._expiry(written)


@pytest.mark.parametrize(
    "layout, package, extra", (("stablehlo", "flatbuffers", "export"), ("onnx", "jax2onnx", "onnx"))
)
def test_a_missing_package_is_named_with_its_extra(layout, package, extra, tmp_path, monkeypatch):
    monkeypatch.setattr(functions.importlib.util, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(UserError, match=rf"{package}, which is not installed(.|\n)*beitv2_jax\[{extra}\]"):
        write(drawn_weights("classifier"), str(tmp_path / "w"), layout)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_too_large_for_one_file_are_refused_before_the_export(tmp_path, monkeypatch):
    monkeypatch.setattr(functions, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="can have 2 GiB"):
        write(drawn_weights("classifier"), str(tmp_path / "w"), "stablehlo")
    assert not list(tmp_path.iterdir())
