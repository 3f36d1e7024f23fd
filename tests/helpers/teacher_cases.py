"""What a user of a foreign teacher has, and the features it should give; kept in tests/golden/teachers.npz.

Made by tests/peers/make_teacher_fixtures.py, compared by convert_teachers_test.py; the peers compare fresh ones.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from beitv2_jax.convert.teachers.load import load_teacher

TOLERANCE = 1e-5
"""Largest difference allowed, of the largest feature; the libraries' own float32 is 5e-7 off their float64."""


def _vit(width, depth, patch_size, image_size=224, **arguments):
    sizes = dict(width=width, depth=depth, num_heads=width // 64, mlp_dim=4 * width)
    return dict(image_size=image_size, patch_size=patch_size, qkv_bias="full") | sizes | arguments


_CLIP = dict(pre_norm=True, patch_bias=False, activation="quick_gelu", norm_eps=1e-5)
_DINOV2 = dict(patch_size=14, image_size=518, layer_scale_init=1.0)
_GIANT = dict(width=1536, depth=40, mlp_dim=4096, activation="swiglu")
_DINOV3 = dict(
    patch_size=16, position="none", rotary=True, qkv_bias="qv", layer_scale_init=1.0, norm_eps=1e-5, num_registers=4
)
_TIPS = dict(patch_size=14, image_size=448, layer_scale_init=1.0, num_registers=1)
_SO400M = dict(num_heads=16, mlp_dim=4304)
_SIGLIP = dict(class_token=False, activation="gelu_tanh")
SIZES = {
    "CLIP ViT-B/32": (_vit(768, 12, 32, **_CLIP), 512, 87_849_216),
    "CLIP ViT-B/16": (_vit(768, 12, 16, **_CLIP), 512, 86_192_640),
    "CLIP ViT-L/14": (_vit(1024, 24, 14, **_CLIP), 768, 303_966_208),
    "DINO ViT-S/16": (_vit(384, 12, 16), 0, 21_665_664),
    "DINO ViT-B/16": (_vit(768, 12, 16), 0, 85_798_656),
    "DINO ViT-B/8": (_vit(768, 12, 8), 0, 85_807_872),
    "DINOv2 ViT-S/14": (_vit(384, 12, **_DINOV2), 0, 22_056_192),
    "DINOv2 ViT-B/14": (_vit(768, 12, **_DINOV2), 0, 86_579_712),
    "DINOv2 ViT-L/14": (_vit(1024, 24, **_DINOV2), 0, 304_367_616),
    "DINOv2 ViT-g/14": (_vit(**_DINOV2, **_GIANT), 0, 1_136_479_232),
    "DINOv2 ViT-S/14 with registers": (_vit(384, 12, **_DINOV2, num_registers=4), 0, 22_057_728),
    "DINOv2 ViT-B/14 with registers": (_vit(768, 12, **_DINOV2, num_registers=4), 0, 86_582_784),
    "DINOv2 ViT-L/14 with registers": (_vit(1024, 24, **_DINOV2, num_registers=4), 0, 304_371_712),
    "DINOv2 ViT-g/14 with registers": (_vit(**_DINOV2, **_GIANT, num_registers=4), 0, 1_136_485_376),
    "DINOv3 ViT-S/16": (_vit(384, 12, **_DINOV3), 0, 21_596_160),
    "DINOv3 ViT-B/16": (_vit(768, 12, **_DINOV3), 0, 85_659_648),
    "DINOv3 ViT-L/16": (_vit(1024, 24, **_DINOV3), 0, 303_128_576),
    "TIPSv2 B/14": (_vit(768, 12, **_TIPS), 0, 86_315_520),
    "TIPSv2 L/14": (_vit(1024, 24, **_TIPS), 0, 304_015_360),
    "TIPSv2 So400m/14": (_vit(1152, 27, **_TIPS, **_SO400M), 0, 413_392_752),
    "SigLIP ViT-B/16": (_vit(768, 12, 16, **_SIGLIP), 0, 85_797_120),
    "SigLIP ViT-L/16": (_vit(1024, 24, 16, 256, **_SIGLIP), 0, 303_361_024),
    "SigLIP So400m/14": (_vit(1152, 27, 14, 378, **_SIGLIP, **_SO400M), 0, 412_987_248),
}
"""Arguments and projection of published teachers, and their parameters: without text tower, pooling and mask token."""


@dataclasses.dataclass
class Case:
    """A state dict, its config.json, options of `load_teacher`, pixels 'b H W 3' and the features 'b n t' they have."""

    state: dict
    config: dict | None
    options: dict
    pixels: np.ndarray
    features: np.ndarray

    def store(self, folder: Path) -> str:
        """Store what a user would have in `folder`; return the path of the weights."""
        state = {name: np.ascontiguousarray(array) for name, array in self.state.items()}
        save_file(state, folder / "model.safetensors")
        if self.config is not None:
            (folder / "config.json").write_text(json.dumps(self.config))
        return str(folder if self.config is not None else folder / "model.safetensors")

    def load(self, folder: Path, **options):
        """Store the weights in `folder` and load the teacher from there."""
        side = round(self.features.shape[1] ** 0.5)
        given = {"image_size": self.pixels.shape[1], "grid": (side, side), **self.options, **options}
        return load_teacher(self.store(folder), **given)

    def error(self, folder: Path, **options) -> float:
        """Return how far our features are from the stored ones, relative to the largest."""
        teacher, params = self.load(folder, **options)
        features = jax.jit(teacher.features)(params, self.pixels)
        assert features.shape == self.features.shape and features.dtype == np.float32
        return float(np.abs(features - self.features).max() / np.abs(self.features).max())


def write(path: Path, cases: dict[str, Case]) -> None:
    """Store cases; arrays of all weights lie in one vector of half precision a case, which holds them exactly."""
    arrays = {}
    for name, case in cases.items():
        shapes = {key: list(array.shape) for key, array in case.state.items()}
        vector = np.concatenate([array.reshape(-1) for array in case.state.values()]).astype(np.float16)
        np.testing.assert_array_equal(vector, np.concatenate([array.reshape(-1) for array in case.state.values()]))
        arrays[f"{name}/weights"], arrays[f"{name}/pixels"] = vector, case.pixels
        arrays[f"{name}/features"] = case.features.astype(np.float32)
        arrays[f"{name}/about"] = json.dumps({"shapes": shapes, "config": case.config, "options": case.options})
    np.savez_compressed(path, **arrays)


def read(path: Path) -> dict[str, Case]:
    """Return the cases that `write` stored."""
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    cases = {}
    for name in sorted({key.partition("/")[0] for key in arrays}):
        about = json.loads(str(arrays[f"{name}/about"]))
        shapes = about.pop("shapes")
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
        parts = np.split(arrays[f"{name}/weights"].astype(np.float32), ends[:-1])
        state = {key: part.reshape(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}
        cases[name] = Case(state, pixels=arrays[f"{name}/pixels"], features=arrays[f"{name}/features"], **about)
    return cases
