"""Compare teachers with transformers, timm and open_clip: random weights, real patch sizes, other image sizes."""

import numpy as np
import pytest
import teacher_cases
import teacher_oracles as oracles
import timm
import torch
import transformers

from beitv2_jax.convert.positions import resize_position_embedding
from beitv2_jax.convert.teachers.load import load_teacher

DINOV2 = [f"vit_{size}_patch14{reg}_dinov2" for size in ("small", "giant") for reg in ("", "_reg4")]
TIMM = {
    "vit_base_patch16_224": ("half", {"normalization": "half"}),
    "vit_base_patch8_224.dino": ("imagenet", {"normalization": "imagenet"}),
    "deit_base_distilled_patch16_224": ("imagenet", {"normalization": "imagenet"}),
    "deit3_base_patch16_224": ("imagenet", {}),
    "vit_small_patch14_dinov2": ("imagenet", {"position_resize": "antialias"}),
    "vit_giant_patch14_reg4_dinov2": ("imagenet", {}),
    "vit_base_patch14_reg1_tipsv2": ("unit", {}),
    "vit_base_patch16_siglip_224": ("half", {"activation": "gelu"}),
    "vit_so400m_patch14_siglip_378": ("half", {"activation": "gelu"}),
    "vit_so400m_patch16_siglip_256.v2_webli": ("half", {}),
    "vit_base_patch16_siglip_gap_224": ("half", {"normalization": "half", "activation": "gelu"}),
    "vit_base_patch16_clip_224": ("clip", {"activation": "gelu"}),
    "vit_base_patch16_clip_quickgelu_224": ("clip", {"activation": "quick_gelu"}),
}


def check(case, folder, **options):
    assert case.error(folder, **options) < teacher_cases.TOLERANCE


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.mark.parametrize("patch", [14, 16, 32])
@pytest.mark.parametrize("grid", [3, 4])
def test_hugging_face_clip(rng, tmp_path, patch, grid):
    check(oracles.hf_clip(rng, patch, grid=grid), tmp_path)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_hugging_face_clip_as_part_of_the_whole_model(rng, tmp_path, act):
    check(oracles.hf_clip(rng, act=act, whole=True), tmp_path)


def test_hugging_face_clip_without_projection(rng, tmp_path):
    check(oracles.hf_clip(rng, projection=False), tmp_path)


@pytest.mark.parametrize("patch, side, grid", [(16, 3, 3), (14, 3, 5), (14, 5, 3)])
@pytest.mark.parametrize("whole", [False, True])
def test_hugging_face_siglip(rng, tmp_path, patch, side, grid, whole):
    check(oracles.hf_siglip(rng, patch, side, grid, whole), tmp_path)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("grid", [3, 5, 6])
def test_hugging_face_dinov2(rng, tmp_path, registers, swiglu, grid):
    check(oracles.hf_dinov2(rng, grid=grid, registers=registers, swiglu=swiglu), tmp_path)


@pytest.mark.parametrize("grid", [1, 3, 5, 14])
@pytest.mark.parametrize("gated", [False, True])
def test_hugging_face_dinov3(rng, tmp_path, grid, gated):
    check(oracles.hf_dinov3(rng, grid=grid, gated=gated), tmp_path)


def test_hugging_face_dinov3_without_biases_in_attention(rng, tmp_path):
    """As in the 7B network."""
    check(oracles.hf_dinov3(rng, gated=True, biases=False, heads=4), tmp_path)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("grid", [3, 5, 7])
def test_hugging_face_tips(rng, tmp_path, swiglu, grid):
    check(oracles.hf_tips(rng, grid=grid, swiglu=swiglu), tmp_path)


@pytest.mark.parametrize("published", [False, True])
def test_hugging_face_tips_as_part_of_the_whole_model(rng, tmp_path, published):
    check(oracles.hf_tips(rng, grid=4, whole=True, published=published), tmp_path)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("grid", [3, 4])
def test_hugging_face_vit_and_deit(rng, tmp_path, distilled, grid):
    check(oracles.hf_vit(rng, 16, grid=grid, distilled=distilled), tmp_path)


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("grid", [3, 5])
def test_timm(rng, tmp_path, name, grid):
    """On another grid, timm resizes with antialiasing; files of DINO have the same names but do not."""
    normalization, options = TIMM[name]
    options = {"position_resize": "antialias", **options}
    check(oracles.timm_vit(rng, name, 8, 3, grid, normalization, options), tmp_path)


@pytest.mark.parametrize("name", DINOV2)
def test_official_dinov2(rng, tmp_path, name):
    check(oracles.official_dinov2(rng, name), tmp_path)


@pytest.mark.parametrize("patch, side, grid", [(16, 3, 3), (32, 2, 2), (14, 3, 3), (8, 4, 3), (8, 3, 5)])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clip(rng, tmp_path, patch, side, grid, quick_gelu):
    check(oracles.open_clip(rng, patch, side, grid, quick_gelu), tmp_path)


def test_a_torchscript_archive_as_openai_released_clip(rng, tmp_path):
    """The archive has half precision, the text encoder and the sizes; names are those of the traced modules."""
    case = oracles.open_clip(rng, 16, quick_gelu=True, openai=True)
    root = torch.nn.Module()
    for name, array in case.state.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.register_buffer(leaf, torch.from_numpy(array.astype(np.float16) if array.ndim else array))
    torch.jit.script(root).save(str(tmp_path / "ViT-B-16.pt"))
    teacher, params = load_teacher(str(tmp_path / "ViT-B-16.pt"), image_size=48, num_heads=oracles.HEADS)
    assert (teacher.name, teacher.width) == ("ViT-B-16", oracles.PROJECTED)
    error = np.abs(teacher.features(params, case.pixels) - case.features).max() / np.abs(case.features).max()
    assert error < teacher_cases.TOLERANCE


@pytest.mark.parametrize(
    "how, options",
    [
        ("bicubic", {}),
        ("antialias", {"antialias": True}),
        ("bilinear", {"mode": "bilinear", "antialias": True}),
        ("offset", None),
    ],
)
@pytest.mark.parametrize("source, target", [(37, 14), (37, 16), (14, 28), (7, 14)])
def test_position_embeddings_are_resized_as_torch_does(rng, how, options, source, target):
    embedding = rng.normal(size=(1, 1 + source**2, 6)).astype(np.float32)
    maps = torch.from_numpy(embedding[:, 1:].reshape(1, source, source, 6)).permute(0, 3, 1, 2)
    wanted = {"size": (target, target)} if options is not None else {"scale_factor": ((target + 0.1) / source,) * 2}
    resized = torch.nn.functional.interpolate(maps, **{"mode": "bicubic", **wanted, **(options or {})})
    expected = resized.permute(0, 2, 3, 1).reshape(1, -1, 6).numpy()
    ours = resize_position_embedding(embedding, (target, target), method=how)
    np.testing.assert_array_equal(ours[:, 0], embedding[:, 0])
    np.testing.assert_allclose(ours[:, 1:], expected, atol=1e-5 * np.abs(expected).max())


def counted(model, *excluded):
    names = model.named_parameters()
    return sum(p.numel() for name, p in names if not any(part in name for part in excluded))


@pytest.mark.parametrize("name", teacher_cases.SIZES)
def test_published_sizes_have_as_many_parameters_there(name):
    arguments, projection_dim, count = teacher_cases.SIZES[name]
    sizes = dict(
        hidden_size=arguments["width"],
        num_hidden_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        image_size=arguments["image_size"],
        patch_size=arguments["patch_size"],
    )
    with torch.device("meta"):
        if name.startswith("CLIP"):
            config = transformers.CLIPVisionConfig(
                **sizes, intermediate_size=arguments["mlp_dim"], projection_dim=projection_dim
            )
            model = transformers.CLIPVisionModelWithProjection(config)
        elif name.startswith("SigLIP"):
            config = transformers.SiglipVisionConfig(**sizes, intermediate_size=arguments["mlp_dim"])
            model = transformers.SiglipVisionModel(config)
        elif name.startswith("DINOv2"):
            swiglu, registers = "g/14" in name, arguments.get("num_registers", 0)
            kind = "Dinov2WithRegisters" if registers else "Dinov2"
            more = {"num_register_tokens": registers} if registers else {}
            config = getattr(transformers, f"{kind}Config")(**sizes, use_swiglu_ffn=swiglu, **more)
            model = getattr(transformers, f"{kind}Model")(config)
        elif name.startswith("DINOv3"):
            more = {"intermediate_size": arguments["mlp_dim"], "num_register_tokens": 4}
            model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes, **more))
        elif name.startswith("TIPS"):
            more = {"mlp_ratio": arguments["mlp_dim"] / arguments["width"]}
            model = transformers.Tipsv2VisionModel(transformers.Tipsv2VisionConfig(**sizes, **more))
        else:
            size = {384: "small", 768: "base"}[arguments["width"]]
            model = timm.create_model(f"vit_{size}_patch{arguments['patch_size']}_224.dino")
    assert counted(model, "mask_token", "head.") == count
