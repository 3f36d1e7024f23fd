"""Layouts of the state dicts of published vision transformers, one `Family` per way of naming the entries.

A family says which entries identify it, which entry holds each of our arrays, and what the weights alone do not show:
input normalisation, activation, epsilon, and how the network's own code resizes position embeddings. Linear weights are
transposed; patch convolutions become (height, width, in, out).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

UNUSUAL_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}
"""Width -> number of heads of published networks whose heads are not 64 wide (So400m, H, g, G, e)."""
PREFIXES = (
    *("visual.trunk.", "vision_model.", "vision_encoder.", "dinov2.", "dinov2_with_registers.", "vit.", "deit."),
    "",
)
"""Prefixes of the network's names inside a larger model; '' is none."""

TEXT = (
    r"(text_model|text_encoder|text|transformer|token_embedding|ln_final|text_projection|positional_embedding)(\.|$)",
    "text encoder",
)
CONTRASTIVE = (r"(logit_(scale|bias)|temperature)$", "constant of the contrastive loss")
SIZES = (r"(input_resolution|context_length|vocab_size)$", "sizes, which the arrays show")
POSITION_IDS = (r"embeddings\.position_ids$", "the numbers 0, 1, 2, ...")
MASK_TOKEN = (r"(embeddings\.)?mask_token$", "for masked patches, but a teacher sees complete images")
HEAD = (
    r"(head|head_dist|classifier|cls_classifier|distillation_classifier|pooler)\.",
    "head; the features are the tokens before it",
)
POOLING = (r"(attn_pool|head)\.", "attention pooling; the features are the tokens before it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One way of naming the entries of a vision transformer, and properties of the networks with these names.

    Attributes:
        title: name for messages.
        has, lacks: regular expressions; each of `has` must match the start of an entry, none of `lacks` may.
        num_registers: number of register tokens where it tells the family from another one with its names; else 0.
        trunk: our path, or our module, -> its name, outside the blocks.
        block: the same inside a block; a tuple names arrays that are concatenated in ours.
        blocks: name of block i.
        gated: names that replace those of `block` if the MLP is gated.
        arguments: arguments of `VisionTransformer` other than sizes.
        flat_tokens: the class token is 'd' and the positions 'n d', without a leading axis of 1.
        normalization, activation: '' if networks of the family differ in it.
        position_resize: how the network's own code resizes position embeddings, one of `choices.POSITION_RESIZES`.
        projected: whether the published features include the projection.
        config_activation: activation if Hugging Face's config.json has none; '' for families without a config.json.
        config_heads: number of heads if Hugging Face's config.json has none.
        config_image_size: the same of the image size, for families whose arrays do not show it.
        dropped: (pattern, reason) of entries that a teacher does not use.
    """

    title: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    num_registers: int = 0
    trunk: Mapping[str, Any]
    block: Mapping[str, Any]
    blocks: str
    gated: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    flat_tokens: bool = False
    normalization: str = ""
    activation: str = "gelu"
    position_resize: str = "bicubic"
    projected: bool = False
    config_activation: str = ""
    config_heads: int = 12
    config_image_size: int = 0
    dropped: tuple[tuple[str, str], ...] = ()

    def names(self, path: str, *, gated: bool = False) -> tuple[str, ...]:
        """Return the name of the entry, or entries, that hold our parameter at `path` ('backbone/cls_token')."""
        block = re.fullmatch(r"backbone/blocks_(\d+)/(.+)", path)
        table, stem, inner = self.trunk, "", path
        if block:
            table = {**self.block, **self.gated} if gated else self.block
            stem, inner = self.blocks.format(block[1]), block[2]
        if inner in table:
            theirs, leaf = table[inner], ""
        else:
            module, _, leaf = inner.rpartition("/")
            theirs, leaf = table[module], ".bias" if leaf == "bias" else ".weight"
        return tuple(f"{stem}{name}{leaf}" for name in ((theirs,) if isinstance(theirs, str) else theirs))


_CLIP = dict(
    trunk={
        "backbone/cls_token": "visual.class_embedding",
        "backbone/pos_embed": "visual.positional_embedding",
        "backbone/patch_embed": "visual.conv1",
        "backbone/pre_norm": "visual.ln_pre",
        "norm": "visual.ln_post",
        "projection/kernel": "visual.proj",
    },
    block={
        "norm1": "ln_1",
        "attn/qkv/kernel": "attn.in_proj_weight",
        "attn/qkv/bias": "attn.in_proj_bias",
        "attn/proj": "attn.out_proj",
        "norm2": "ln_2",
        "mlp/fc1": "mlp.c_fc",
        "mlp/fc2": "mlp.c_proj",
    },
    blocks="visual.transformer.resblocks.{}.",
    arguments={"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5},
    flat_tokens=True,
    normalization="clip",
    position_resize="offset",
    projected=True,
    dropped=(TEXT, CONTRASTIVE, SIZES),
)
_TIMM = dict(
    trunk={
        "backbone/cls_token": "cls_token",
        "backbone/pos_embed": "pos_embed",
        "backbone/register_tokens": "reg_token",
        "backbone/distillation_token": "dist_token",
        "backbone/patch_embed": "patch_embed.proj",
        "backbone/pre_norm": "norm_pre",
        "norm": "norm",
    },
    block={
        "norm1": "norm1",
        "attn/qkv": "attn.qkv",
        "attn/proj": "attn.proj",
        "gamma_1": "ls1.gamma",
        "norm2": "norm2",
        "mlp/fc1": "mlp.fc1",
        "mlp/fc2": "mlp.fc2",
        "gamma_2": "ls2.gamma",
    },
    blocks="blocks.{}.",
    position_resize="antialias",
    dropped=(HEAD, TEXT, CONTRASTIVE),
)
_DINOV2 = _TIMM | dict(
    trunk=_TIMM["trunk"] | {"backbone/register_tokens": "register_tokens"},
    gated={"mlp/fc1": "mlp.w12", "mlp/fc2": "mlp.w3"},
    arguments={"layer_scale_init": 1.0},
    normalization="imagenet",
    dropped=(HEAD, MASK_TOKEN),
)
_TIPS = _DINOV2 | dict(
    num_registers=1,  # the second of its two global tokens
    normalization="unit",
    position_resize="bilinear",
    config_activation="gelu",
    dropped=(HEAD, MASK_TOKEN, TEXT, CONTRASTIVE),
)
_HF_CONTRASTIVE = dict(
    trunk={
        "backbone/cls_token": "embeddings.class_embedding",
        "backbone/pos_embed": "embeddings.position_embedding.weight",
        "backbone/patch_embed": "embeddings.patch_embedding",
        "backbone/pre_norm": "pre_layrnorm",
        "norm": "post_layernorm",
        "projection": "visual_projection",
    },
    block={
        "norm1": "layer_norm1",
        "attn/qkv/kernel": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
        "attn/qkv/bias": tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
        "attn/proj": "self_attn.out_proj",
        "norm2": "layer_norm2",
        "mlp/fc1": "mlp.fc1",
        "mlp/fc2": "mlp.fc2",
    },
    blocks="encoder.layers.{}.",
    flat_tokens=True,
)
_HF_VIT = dict(
    trunk={
        "backbone/cls_token": "embeddings.cls_token",
        "backbone/pos_embed": "embeddings.position_embeddings",
        "backbone/register_tokens": "embeddings.register_tokens",
        "backbone/distillation_token": "embeddings.distillation_token",
        "backbone/patch_embed": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    },
    block={
        "norm1": "layernorm_before",
        "attn/qkv/kernel": tuple(f"attention.attention.{part}.weight" for part in ("query", "key", "value")),
        "attn/qkv/bias": tuple(f"attention.attention.{part}.bias" for part in ("query", "key", "value")),
        "attn/proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp/fc1": "intermediate.dense",
        "mlp/fc2": "output.dense",
    },
    blocks="encoder.layer.{}.",
    config_activation="gelu",
    dropped=(HEAD, MASK_TOKEN),
)
_HF_DINOV2 = _HF_VIT | dict(
    block=_HF_VIT["block"]
    | {
        "norm1": "norm1",
        "norm2": "norm2",
        "gamma_1": "layer_scale1.lambda1",
        "gamma_2": "layer_scale2.lambda1",
        "mlp/fc1": "mlp.fc1",
        "mlp/fc2": "mlp.fc2",
    },
    gated={"mlp/fc1": "mlp.weights_in", "mlp/fc2": "mlp.weights_out"},
    arguments={"layer_scale_init": 1.0},
    normalization="imagenet",
)
_HF_DINOV3 = dict(
    trunk={
        "backbone/cls_token": "embeddings.cls_token",
        "backbone/register_tokens": "embeddings.register_tokens",
        "backbone/patch_embed": "embeddings.patch_embeddings",
        "norm": "norm",
    },
    block={
        "norm1": "norm1",
        "attn/qkv/kernel": tuple(f"attention.{part}_proj.weight" for part in "qkv"),
        "attn/q_bias": "attention.q_proj.bias",
        "attn/v_bias": "attention.v_proj.bias",
        "attn/proj": "attention.o_proj",
        "gamma_1": "layer_scale1.lambda1",
        "norm2": "norm2",
        "mlp/fc1": "mlp.up_proj",
        "mlp/fc2": "mlp.down_proj",
        "gamma_2": "layer_scale2.lambda1",
    },
    gated={
        "mlp/fc1/kernel": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "mlp/fc1/bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    },
    blocks="layer.{}.",
    arguments={"position": "none", "rotary": True, "qkv_bias": "qv", "layer_scale_init": 1.0, "norm_eps": 1e-5},
    normalization="imagenet",
    config_activation="gelu",
    config_heads=6,
    config_image_size=224,
    dropped=(HEAD, MASK_TOKEN),
)

FAMILIES = (
    Family(
        title="OpenAI CLIP",
        has=(r"visual\.transformer\.resblocks\.", r"input_resolution$"),
        **_CLIP | {"activation": "quick_gelu"},
    ),
    # these networks have GELU or QuickGELU, and the file does not show which
    Family(
        title="OpenCLIP",
        has=(r"visual\.transformer\.resblocks\.",),
        **_CLIP | {"activation": "", "position_resize": "antialias"},
    ),
    Family(
        title="Hugging Face CLIP",
        has=(r"encoder\.layers\.\d+\.self_attn\.", r"(pre_layrnorm|embeddings\.class_embedding)"),
        **_HF_CONTRASTIVE,
        arguments={"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5},
        normalization="clip",
        activation="",
        projected=True,
        config_activation="quick_gelu",
        dropped=(TEXT, CONTRASTIVE, POSITION_IDS),
    ),
    Family(
        title="Hugging Face SigLIP",
        has=(r"encoder\.layers\.\d+\.self_attn\.",),
        **_HF_CONTRASTIVE,
        arguments={"class_token": False},
        normalization="half",
        activation="gelu_tanh",
        config_activation="gelu_tanh",
        dropped=(TEXT, CONTRASTIVE, POSITION_IDS, POOLING),
    ),
    Family(
        title="Hugging Face DINOv2 with registers",
        has=(r"encoder\.layer\.\d+\.layer_scale", r"embeddings\.register_tokens"),
        **_HF_DINOV2 | {"position_resize": "antialias"},
    ),
    Family(title="Hugging Face DINOv2", has=(r"encoder\.layer\.\d+\.layer_scale",), **_HF_DINOV2),
    Family(
        title="Hugging Face ViT",
        has=(r"encoder\.layer\.\d+\.layernorm_before",),
        **_HF_VIT | {"arguments": {"norm_eps": 1e-12}},
    ),
    Family(title="Hugging Face DINOv3", has=(r"layer\.\d+\.attention\.q_proj\.", r"embeddings\."), **_HF_DINOV3),
    Family(title="TIPS", has=(r"blocks\.\d+\.ls\d\.", r"register_tokens$"), lacks=(r".*\.c_fc\.",), **_TIPS),
    Family(
        title="TIPS as transformers stores it",
        has=(r"blocks\.\d+\.mlp\.c_fc\.", r"register_tokens$"),
        **_TIPS | {"block": _TIPS["block"] | {"mlp/fc1": "mlp.c_fc", "mlp/fc2": "mlp.c_proj"}},
    ),
    Family(title="DINOv2 with registers", has=(r"blocks\.\d+\.ls\d\.", r"register_tokens$"), **_DINOV2),
    Family(title="DINOv2", has=(r"blocks\.\d+\.ls\d\.", r"mask_token$"), **_DINOV2 | {"position_resize": "offset"}),
    Family(
        title="TIPS in timm's names",
        has=(r"blocks\.\d+\.ls\d\.", r"reg_token$"),
        num_registers=1,
        **_TIMM | {"arguments": {"layer_scale_init": 1.0}, "normalization": "unit"},
    ),
    Family(
        title="DINOv2 in timm's names",
        has=(r"blocks\.\d+\.ls\d\.",),
        **_TIMM | {"arguments": {"layer_scale_init": 1.0}, "normalization": "imagenet"},
    ),
    Family(
        title="CLIP in timm's names",
        has=(r"blocks\.\d+\.attn\.qkv\.", r"norm_pre\."),
        **_TIMM | {"arguments": {"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5}, "normalization": "clip"},
        activation="",
    ),
    # the activation it was trained with, also in Hugging Face; timm uses exact GELU for B/16, L/16 and So400m/14
    Family(
        title="SigLIP in timm's names",
        has=(r"blocks\.\d+\.attn\.qkv\.", r"attn_pool\."),
        **_TIMM
        | {"arguments": {"class_token": False}, "normalization": "half", "dropped": (*_TIMM["dropped"], POOLING)},
        activation="gelu_tanh",
    ),
    Family(
        title="ViT without class token in timm's names",
        has=(r"blocks\.\d+\.attn\.qkv\.",),
        lacks=(r"cls_token$",),
        **_TIMM | {"arguments": {"class_token": False}},
        activation="",
    ),
    Family(
        title="DINO, or a ViT in timm's names without its head",
        has=(r"blocks\.\d+\.attn\.qkv\.",),
        lacks=(r"head(_dist)?\.",),
        **_TIMM | {"position_resize": "offset"},
    ),
    Family(title="ViT in timm's names", has=(r"blocks\.\d+\.attn\.qkv\.",), **_TIMM),
)
"""All families; the first one that matches a state dict is used."""
