"""Exported folders as users of transformers and timm open them: pictures in, our own probabilities out."""

import dataclasses
import json
import re

import numpy as np
import pytest
import timm
import torch
import transformers
from beit_test import drawn
from PIL import Image

from beitv2_jax import api
from beitv2_jax.convert.writing import write
from beitv2_jax.data.augment import center_crop

NAMES = ("ant", "bee", "cat", "dog", "eel")
SIZES = dict(image_size=64, patch_size=16, width=48, depth=2, num_heads=3, mlp_dim=100, num_classes=len(NAMES))
"""Sizes of no published model; 100 / 48 is a fraction that timm must multiply back."""


@pytest.fixture(scope="module", params=("relative", "relative_shared", "absolute"))
def classifier(request, tmp_path_factory):
    """(our classifier, the folder that its layouts are written to); [CLS] pools where positions are absolute."""
    root = tmp_path_factory.mktemp("exported")
    pooling = "cls" if request.param == "absolute" else "mean"
    weights = drawn("classifier", **SIZES, position=request.param, layer_scale_init=0.1, pooling=pooling)
    weights = dataclasses.replace(weights, class_names=NAMES)
    write(weights, str(root / "transformers"), "huggingface")
    write(weights, str(root / "timm"), "timm")
    return api.Classifier(weights, "", "float32"), root


def picture(width: int, height: int) -> Image.Image:
    """Return a smooth random picture."""
    low = np.random.default_rng(5).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [picture(120, 90), picture(73, 73), picture(150, 211)]
SHIFTED = picture(81, 97)
"""Resized to 73 x 87: 23 rows are cut off, 11.5 above the crop, which we round to 12 and transformers to 11."""


def ours(network) -> np.ndarray:
    logits = network.logits(PICTURES).astype(np.float64)
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def in_our_order(found: list[dict]) -> list[float]:
    scores = {entry["label"]: entry["score"] for entry in found}
    return [scores[name] for name in NAMES]


@pytest.mark.parametrize("backend, bound", (("pil", 1e-5), ("torchvision", 3e-3)))
def test_the_pipeline_of_transformers(classifier, backend, bound):
    """With Pillow the pixels are ours; torchvision, the default, rounds some to the next level of 255."""
    network, root = classifier
    folder = str(root / "transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend=backend)
    classify = transformers.pipeline("image-classification", model=folder, image_processor=processor, device="cpu")
    found = np.array([in_our_order(answer) for answer in classify(PICTURES, top_k=len(NAMES))])
    expected = ours(network)
    assert np.ptp(expected, axis=1).min() > 0.05
    np.testing.assert_allclose(found, expected, atol=bound)


def test_the_pixels_of_transformers(classifier):
    _, root = classifier

    def crops(image: Image.Image, backend: str) -> tuple[np.ndarray, np.ndarray]:
        """Return their crop and ours, in levels of 255."""
        processor = transformers.AutoImageProcessor.from_pretrained(root / "transformers", backend=backend)
        theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        return 255 * ([0.229, 0.224, 0.225] * theirs + [0.485, 0.456, 0.406]), center_crop(np.asarray(image), 64)

    for image in PICTURES:
        for backend, bound in (("pil", 1e-3), ("torchvision", 1.001)):
            theirs, mine = crops(image, backend)
            np.testing.assert_allclose(theirs, mine, atol=bound)
    theirs, mine = crops(SHIFTED, "pil")
    np.testing.assert_allclose(theirs[1:], mine[:-1], atol=1e-3)


def test_create_model_of_timm(classifier):
    network, root = classifier
    model = timm.create_model(f"local-dir:{root / 'timm'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config)
    images = torch.stack([transform(picture) for picture in PICTURES])
    with torch.no_grad():
        found = model(images).softmax(-1).numpy()
    np.testing.assert_allclose(found, ours(network), atol=1e-5)
    assert model.pretrained_cfg["label_names"] == list(NAMES)
    assert json.loads((root / "timm" / "config.json").read_text())["model_args"]["num_heads"] == 3


BACKBONE = {name: size for name, size in SIZES.items() if name != "num_classes"}
CARDS = {
    "classifier": ("classifier", dict(SIZES)),
    "backbone": ("classifier", {**SIZES, "num_classes": 0}),
    "mim": ("mim", dict(BACKBONE, codebook_size=17, early_layer=1, head_depth=1)),
    "segmenter": (
        "segmenter",
        dict(BACKBONE, depth=5, num_classes=7, out_layers=(1, 2, 3, 4), channels=48, aux_channels=9),
    ),
}


@pytest.mark.parametrize(
    "layout, name",
    [(layout, name) for layout in ("huggingface", "timm") for name in CARDS if name + layout != "segmentertimm"],
)
def test_the_code_in_the_model_card_runs(layout, name, tmp_path, monkeypatch):
    kind, arguments = CARDS[name]
    weights = drawn(kind, **arguments)
    write(weights, str(tmp_path / "model"), layout)
    PICTURES[0].save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.+?)```", (tmp_path / "model" / "README.md").read_text(), re.DOTALL)
    found: dict = {}
    exec(code.replace("FOLDER", "model"), found)
    if name in ("mim", "backbone"):
        given = np.asarray(Image.open("photo.jpg"))
        tokens = api.Backbone(weights, "", "float32")(given, norm=name == "mim")
        theirs = found.get("tokens", found.get("features")).detach().numpy()
        if layout == "huggingface" and name == "mim":  # transformers does not normalise these
            tokens = api.Backbone(weights, "", "float32")(given)
            theirs = theirs[:, 0]
        expected = tokens.cls if name == "mim" else fc_normed(weights, tokens.patches.mean((1, 2)))
        # torchvision rounds some pixels of transformers to the next level of 255
        np.testing.assert_allclose(theirs, expected, atol=2e-2 if layout == "huggingface" else 1e-4)


def fc_normed(weights, features: np.ndarray) -> np.ndarray:
    norm = weights.variables["params"]["fc_norm"]
    features = features - features.mean(-1, keepdims=True)
    return features / np.sqrt(features.var(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]
