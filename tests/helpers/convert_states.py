"""State dicts in released names for tests of the converters: drawn small ones, and the published files' shapes."""

import jax
import numpy as np
from flax import traverse_util
from hypothesis import strategies as st

from beitv2_jax.convert.arguments import shapes
from beitv2_jax.convert.beit.official import to_official
from beitv2_jax.convert.weights import Weights
from beitv2_jax.models.layers import relative_position_index

FILES = {"mim_cls_unshared": "mim", "finetune": "classifier", "upernet": "segmenter", "train10_vqkd": "vqkd"}
"""Stored state dicts of the released code -> their kind."""
KINDS = ("vqkd", "mim", "classifier", "segmenter")
SIZES = dict(
    kind=st.sampled_from(KINDS),
    position=st.sampled_from(("absolute", "relative", "relative_shared")),
    patch_size=st.sampled_from((1, 3, 5)),
    grid=st.integers(2, 5),
    heads=st.integers(1, 4),
    depth=st.integers(1, 3),
    layer_scale=st.booleans(),
)
"""Hypothesis strategies for the kind of a model and the sizes that `arguments_of` takes."""


def arguments_of(
    kind, *, position="absolute", patch_size=3, grid=3, heads=2, head_width=5, depth=2, layer_scale=True, stem="linear"
) -> dict:
    """Return arguments of a small model; all sizes that could be taken for one another differ."""
    width = heads * head_width
    vit = dict(width=width, depth=depth, num_heads=heads, mlp_dim=3 * width + 1, position=position)
    vit["layer_scale_init"] = 0.1 if layer_scale else 0.0
    vit |= {"stem": stem} if stem != "linear" else {}
    sizes = dict(image_size=patch_size * grid)
    if kind == "vqkd":
        decoder = vit | dict(width=3 * heads, depth=1)
        return sizes | dict(
            encoder=vit | {"patch_size": patch_size},
            decoder={name: value for name, value in decoder.items() if name != "stem"},
            codebook_size=19,
            code_dim=4,
            teacher_width=23,
        )
    sizes |= vit | {"patch_size": patch_size}
    if kind == "mim":
        return sizes | dict(codebook_size=19, early_layer=1, head_depth=2, shared_head=depth != 2)
    if kind == "regressor":
        return sizes | dict(target_width=13, early_layer=1, head_depth=2, shared_head=depth != 2)
    if kind == "classifier":
        return sizes | dict(num_classes=17, pooling="cls" if position == "absolute" else "mean")
    return sizes | dict(num_classes=17, channels=13, aux_channels=11, out_layers=(1, 1, 1, depth))


def drawn_weights(kind, *, seed=3, arguments=None, **sizes) -> Weights:
    """Return weights of that model with normal entries of visible size; `arguments` take the place of `sizes`."""
    arguments = arguments or arguments_of(kind, **sizes)
    rng = np.random.default_rng(seed)
    flat = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes(kind, arguments).items()}
    for path in flat:
        if path.endswith("window_counts"):
            flat[path] = np.zeros_like(flat[path])
        if path.endswith("/var"):
            flat[path] = np.abs(flat[path]) + np.float32(0.5)
    variables = {"params": {}, "codebook": {}} | traverse_util.unflatten_dict(flat, sep="/")
    normalization = "" if kind == "vqkd" else "imagenet"
    return Weights(kind=kind, arguments=arguments, variables=variables, layout="run", normalization=normalization)


def drawn_state(kind, **sizes) -> dict[str, np.ndarray]:
    """Return a released state dict of that model."""
    return to_official(kind, drawn_weights(kind, **sizes).variables)


def assert_same(one, other) -> None:
    """Compare two trees bit for bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def published(name) -> tuple[str, dict[str, np.ndarray]]:
    """Return (kind, state dict) of a published file: its names and shapes over a single number, from facts 7a to 7c."""
    size = {"base": (768, 12, 12), "large": (1024, 24, 16)}
    if name.startswith("vqkd"):
        depth, teacher = int(name[5]), name.rpartition("_")[2]
        return "vqkd", _tokenizer(depth, teacher)
    width, depth, heads = size[name.partition("_")[0]]
    entries = {"cls_token": (1, 1, width)} | _linear("patch_embed.proj", width, (3, 16, 16))
    if "_ft" in name:
        entries |= _blocks("blocks", depth, width, scale=True, table=heads)
        classes = 21_841 if name.endswith("21k") else 1000
        return "classifier", _arrays(entries | _norm("fc_norm", width) | _linear("head", classes, (width,)))
    entries |= _blocks("blocks", depth, width, scale=True) | {"mask_token": (1, 1, width)} | _norm("norm", width)
    entries |= {"rel_pos_bias.relative_position_bias_table": (732, heads)}
    entries |= {"rel_pos_bias.relative_position_index": (197, 197)} | _linear("lm_head", 8192, (width,))
    if "v1" not in name:
        entries |= _blocks("cls_pt_layers", 2, width, scale=True)
    if "unshared" in name:
        entries |= _norm("cls_pt_norm", width) | _linear("cls_pt_lm_head", 8192, (width,))
    return "mim", _arrays(entries)


def _tokenizer(decoder_depth: int, teacher: str) -> dict[str, np.ndarray]:
    entries = {}
    for side, channels, patch, depth in (("encoder", 3, 16, 12), ("decoder", 32, 1, decoder_depth)):
        entries |= {f"{side}.cls_token": (1, 1, 768), f"{side}.pos_embed": (1, 197, 768)}
        entries |= _linear(f"{side}.patch_embed.proj", 768, (channels, patch, patch)) | _norm(f"{side}.fc_norm", 768)
        entries |= _blocks(f"{side}.blocks", depth, 768)
    entries |= {"quantize.cluster_size": (8192,), "quantize.embedding.weight": (8192, 32)}
    entries |= {"quantize.embedding.cluster_size": (8192,), "quantize.embedding.embed_avg": (8192, 32)}
    entries |= {"quantize.embedding.initted": (1,)}
    for task, features in (("encode", 32), ("decode", 512 if teacher == "clip" else 768)):
        entries |= _linear(f"{task}_task_layer.0", 768, (768,)) | _linear(f"{task}_task_layer.2", features, (768,))
    entries |= {"scaling_layer.shift": (1, 3, 1, 1), "scaling_layer.scale": (1, 3, 1, 1)}
    entries |= {f"teacher_model.entry_{index}": (1,) for index in range(302 if teacher == "clip" else 150)}
    return _arrays(entries)


def _blocks(stem, depth, width, *, scale=False, table=0) -> dict[str, tuple[int, ...]]:
    entries = {}
    for index in range(depth):
        block = _norm("norm1", width) | _norm("norm2", width) | {"attn.qkv.weight": (3 * width, width)}
        block |= {"attn.q_bias": (width,), "attn.v_bias": (width,)} | _linear("attn.proj", width, (width,))
        block |= _linear("mlp.fc1", 4 * width, (width,)) | _linear("mlp.fc2", width, (4 * width,))
        block |= {"gamma_1": (width,), "gamma_2": (width,)} if scale else {}
        if table:
            block |= {"attn.relative_position_bias_table": (732, table), "attn.relative_position_index": (197, 197)}
        entries |= {f"{stem}.{index}.{name}": shape for name, shape in block.items()}
    return entries


def _linear(stem, features, inputs) -> dict[str, tuple[int, ...]]:
    return {f"{stem}.weight": (features, *inputs), f"{stem}.bias": (features,)}


def _norm(stem, width) -> dict[str, tuple[int, ...]]:
    return {f"{stem}.weight": (width,), f"{stem}.bias": (width,)}


def _arrays(entries) -> dict[str, np.ndarray]:
    index = relative_position_index((14, 14)).astype(np.int64)
    zero = np.float32(0)
    return {name: index if shape == index.shape else np.broadcast_to(zero, shape) for name, shape in entries.items()}
