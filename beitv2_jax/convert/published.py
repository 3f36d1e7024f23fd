"""Published figures of released weights, to be shown beside measured ones.

A classifier or a segmentation network is recognised by the name of its file or folder, a tokenizer by the SHA-256 of
its file, whose first eight digits are part of the published name.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from beitv2_jax.convert.hub import local_path


class Published(NamedTuple):
    """A released model: its `name`, its published `metrics` by the names of an evaluation, and the data `on` which."""

    name: str
    metrics: dict[str, float]
    on: str


_IMAGENET, _ADE20K = "ImageNet-1k validation, 224 pixels", "ADE20K validation"
_CLASSIFIERS = {
    "beitv2_base_patch16_224_pt1k_300e_ft1k": {"top1": 0.850},
    "beitv2_base_patch16_224_pt1k_ft1k": {"top1": 0.855, "top5": 0.975},
    "beitv2_base_patch16_224_pt1k_ft21kto1k": {"top1": 0.86458, "top5": 0.97978, "nll": 0.569},
    "beitv2_large_patch16_224_pt1k_300e_ft1k": {"top1": 0.866},
    "beitv2_large_patch16_224_pt1k_ft1k": {"top1": 0.873, "top5": 0.982},
    "beitv2_large_patch16_224_pt1k_ft21kto1k": {"top1": 0.88370, "top5": 0.98578, "nll": 0.493},
}
_SEGMENTERS = {
    "beitv2_base_patch16_224_pt1k_ftade20k": {"mean_iou": 0.531},
    "beitv2_base_patch16_224_pt1k_ft21ktoade20k": {"mean_iou": 0.535},
    "beitv2_large_patch16_224_pt1k_ftade20k": {"mean_iou": 0.567},
    "beitv2_large_patch16_224_pt1k_ft21ktoade20k": {
        "mean_iou": 0.5754,
        "mean_accuracy": 0.6878,
        "pixel_accuracy": 0.8622,
    },
}
_TOKENIZERS = {
    "vqkd_encoder_base_decoder_1x768x12_clip-d93179da": {"codebook_usage": 1.0},
    "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7": {"codebook_usage": 0.97},
    "vqkd_encoder_base_decoder_1x768x12_dino-663c55d7": {"codebook_usage": 1.0},
}
_IN_TIMM = {
    "beitv2_base_patch16_224.in1k_ft_in1k": (0.85596, 0.9),
    "beitv2_base_patch16_224.in1k_ft_in22k_in1k": (0.86494, 0.9),
    "beitv2_large_patch16_224.in1k_ft_in1k": (0.87414, 0.95),
    "beitv2_large_patch16_224.in1k_ft_in22k_in1k": (0.88406, 0.95),
}
"""Name of a classifier in timm -> top-1 accuracy and crop in timm's own table (results-imagenet.csv)."""


def recognise(path: str, kind: str) -> Published | None:
    """Return what was published of the weights at `path`; None where they are not recognised, or nothing was."""
    if kind == "vqkd":
        file = local_path(path)
        digest = _sha256(file)[:8] if Path(file).is_file() else ""
        name = next((name for name in _TOKENIZERS if digest and name.endswith(digest)), None)
        return name and Published(name, _TOKENIZERS[name], "ImageNet-1k validation")
    name = re.sub(r"\.(pth|safetensors|npz|bin|pt)$", "", Path(path).name)
    if name in _IN_TIMM and kind == "classifier":
        top1, crop_fraction = _IN_TIMM[name]
        return Published(name, {"top1": top1}, f"{_IMAGENET}, by timm with --crop_fraction={crop_fraction}")
    for figures, on in ((_CLASSIFIERS, _IMAGENET), (_SEGMENTERS, _ADE20K)):
        if name in figures and (kind == "segmenter") == (figures is _SEGMENTERS):
            return Published(name, figures[name], on)
    return None


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
