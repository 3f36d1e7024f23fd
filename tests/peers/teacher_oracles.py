"""Small teachers of transformers, timm and open_clip with random weights, and their features.

Used by teachers_test.py and make_teacher_fixtures.py. The libraries are not changed and run in float64. A case has the
files that a user would have (the arrays with the published names and, if there is one, config.json), and pixels.
"""

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # its compiled operators belong to another build of torch; none of them is used
    _library = torch.library.Library("torchvision", "DEF")
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm
import transformers
from safetensors.numpy import load_file
from teacher_cases import Case
from timm.models.vision_transformer import checkpoint_filter_fn

MEANS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
WIDTH, DEPTH, HEADS, MLP, PROJECTED = 16, 2, 2, 24, 5
SMALL = 0.05
"""Scale of the additions to the residual stream: variances are small, so a wrong layer norm epsilon is detected."""

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def randomise(state: dict[str, torch.Tensor], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Return random values that affect the features for every entry; all are exact in half precision."""
    drawn = {}
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        vector = len(shape) < 2
        if not tensor.is_floating_point():
            drawn[name] = tensor
            continue
        if vector and any(part in name for part in ("norm", "ln_")) and name.endswith("weight"):
            values = rng.uniform(0.5, 1.5, shape)
        elif name.endswith(("gamma", "lambda1")):
            values = rng.uniform(0.4, 1.2, shape)
        elif vector or name.endswith("token"):
            values = rng.normal(0, 0.3, shape)
        else:
            values = rng.normal(0, 1.5 / np.sqrt(np.prod(shape[1:])), shape)
        written = ("proj.", "out_proj", "output.dense", "fc2", "c_proj", "w3.", "weights_out", "position", "pos_embed")
        written += ("token", "class_embedding", "conv1", "patch_embed", "projection.")
        if any(part in name for part in written) and "visual_projection" not in name:
            values = SMALL * values
        drawn[name] = torch.from_numpy(values.astype(np.float16).astype(np.float32))
    return drawn


def draw_pixels(rng, size):
    return rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)


def normalised(pixels, normalization):
    mean, std = (np.array(numbers) for numbers in MEANS[normalization])
    return torch.from_numpy(((pixels / 255.0 - mean) / std).transpose(0, 3, 1, 2).copy())


def _finish(model, rng):
    model.load_state_dict(randomise(model.state_dict(), rng))
    return model.eval()


def _features(forward, model, pixels, normalization):
    with torch.no_grad():
        return forward(model.double(), normalised(pixels, normalization)).numpy()


def _arrays(model):
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def _saved(model):
    """Return the output of `save_pretrained`: arrays with the published names, and config.json."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors"), json.loads((Path(folder) / "config.json").read_text())


def _sizes(patch, side):
    return dict(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        image_size=side * patch,
        patch_size=patch,
    )


def hf_clip(rng, patch=16, side=3, grid=3, act="quick_gelu", whole=False, projection=True):
    sizes = _sizes(patch, side) | {"hidden_act": act}
    config = transformers.CLIPVisionConfig(**sizes, projection_dim=PROJECTED)
    if whole:
        text = dict(hidden_size=8, intermediate_size=9, num_hidden_layers=1, num_attention_heads=2, vocab_size=7)
        text |= dict(bos_token_id=1, eos_token_id=2)
        config = transformers.CLIPConfig(vision_config=sizes, text_config=text, projection_dim=PROJECTED)
        model = transformers.CLIPModel(config)
    else:
        model = (transformers.CLIPVisionModelWithProjection if projection else transformers.CLIPVisionModel)(config)
    model = _finish(model, rng)
    state, saved_config = _saved(model)
    pixels = draw_pixels(rng, grid * patch)

    def forward(model, images):
        vision = getattr(model, "vision_model", model)
        tokens = vision.post_layernorm(vision(images, interpolate_pos_encoding=True).last_hidden_state)[:, 1:]
        return model.visual_projection(tokens) if projection else tokens

    options = {} if projection else {"output": "tokens"}
    return Case(state, saved_config, options, pixels, _features(forward, model, pixels, "clip"))


def hf_siglip(rng, patch=16, side=3, grid=3, whole=False):
    sizes = _sizes(patch, side)
    if whole:
        text = dict(hidden_size=WIDTH, intermediate_size=9, num_hidden_layers=1, num_attention_heads=2, vocab_size=7)
        model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=sizes, text_config=text))
    else:
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes))
    model = _finish(model, rng)
    state, config = _saved(model)
    pixels = draw_pixels(rng, grid * patch)

    def forward(model, images):
        vision = getattr(model, "vision_model", model)
        return vision(images, interpolate_pos_encoding=True).last_hidden_state

    return Case(state, config, {}, pixels, _features(forward, model, pixels, "half"))


def hf_dinov2(rng, patch=14, side=5, grid=5, registers=0, swiglu=False):
    sizes = {key: value for key, value in _sizes(patch, side).items() if key != "intermediate_size"}
    sizes |= dict(mlp_ratio=2, use_swiglu_ffn=swiglu)
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    model = _finish(model, rng)
    state, config = _saved(model)
    pixels = draw_pixels(rng, grid * patch)

    def forward(model, images):
        return model(images).last_hidden_state[:, 1 + registers :]

    return Case(state, config, {}, pixels, _features(forward, model, pixels, "imagenet"))


def hf_dinov3(rng, patch=16, side=3, grid=3, heads=HEADS, gated=False, biases=True):
    """Build DINOv3; the position of a patch turns its queries and keys, so another grid needs nothing resized."""
    sizes = _sizes(patch, side) | dict(num_attention_heads=heads, num_register_tokens=4)
    sizes |= dict(use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", query_bias=biases, value_bias=biases)
    model = _finish(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes)), rng)
    state, config = _saved(model)
    pixels = draw_pixels(rng, grid * patch)

    def forward(model, images):
        return model(images).last_hidden_state[:, 5:]

    return Case(state, config, {}, pixels, _features(forward, model, pixels, "imagenet"))


def hf_tips(rng, patch=14, side=5, grid=5, swiglu=False, whole=False, published=False):
    """Build TIPSv2, alone or with its text encoder.

    `published` gives it the names and the config.json of the folders on the hub, which transformers reads and does not
    write: the MLP has other names, and the config none of the sizes of the image network.
    """
    sizes = {key: value for key, value in _sizes(patch, side).items() if key != "intermediate_size"}
    sizes |= dict(mlp_ratio=2 if swiglu else 1.5, use_swiglu_ffn=swiglu)
    if whole:
        text = dict(hidden_size=WIDTH, intermediate_size=9, num_hidden_layers=1, num_attention_heads=2, vocab_size=7)
        model = transformers.Tipsv2Model(transformers.Tipsv2Config(vision_config=sizes, text_config=text))
    else:
        model = transformers.Tipsv2VisionModel(transformers.Tipsv2VisionConfig(**sizes))
    model = _finish(model, rng)
    state, config = _saved(model)
    options = {}
    if published:
        vision = re.compile(r"(vision_encoder\.blocks\.\d+\.mlp\.)c_(fc|proj)")
        names = {"fc": "fc1", "proj": "fc2"}
        state = {vision.sub(lambda found: found[1] + names[found[2]], name): array for name, array in state.items()}
        config = {"model_type": "tipsv2", "vision_fn": "vit_base", "patch_size": patch, "img_size": side * patch}
        options["num_heads"] = HEADS
    pixels = draw_pixels(rng, grid * patch)

    def forward(model, images):
        return getattr(model, "vision_model", model)(images).last_hidden_state[:, 2:]

    return Case(state, config, options, pixels, _features(forward, model, pixels, "unit"))


def hf_vit(rng, patch=16, side=3, grid=3, distilled=False):
    kind = "DeiT" if distilled else "ViT"
    config = getattr(transformers, f"{kind}Config")(**_sizes(patch, side))
    model = _finish(getattr(transformers, f"{kind}Model")(config), rng)
    state, config = _saved(model)
    pixels = draw_pixels(rng, grid * patch)

    def forward(model, images):
        return model(images, interpolate_pos_encoding=True).last_hidden_state[:, 1 + distilled :]

    return Case(state, config, {"normalization": "imagenet"}, pixels, _features(forward, model, pixels, "imagenet"))


def _timm_model(name, patch, side, **sizes):
    sizes = dict(embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=1.5) | sizes
    model = timm.create_model(name, img_size=side * patch, patch_size=patch, **sizes)
    if model.num_classes:
        model.reset_classifier(3)
    return model


def timm_vit(rng, name, patch=16, side=3, grid=3, normalization="half", options=None):
    """Build a small vision transformer of timm; on another grid, timm resizes the position embedding."""
    model = _finish(_timm_model(name, patch, side), rng)
    state = _arrays(model)
    if grid != side:
        model = _timm_model(name, patch, grid).eval()
        model.load_state_dict(checkpoint_filter_fn({key: torch.from_numpy(v) for key, v in state.items()}, model))
    pixels = draw_pixels(rng, grid * patch)

    def forward(model, images):
        return model.forward_features(images)[:, model.num_prefix_tokens :]

    features = _features(forward, model, pixels, normalization)
    return Case(state, None, {"num_heads": HEADS, **(options or {})}, pixels, features)


def official_dinov2(rng, name, patch=14, side=5):
    """Build DINOv2 with its released names; timm, which reads them, computes the features."""
    model = _timm_model(name, patch, side)
    names = {"reg_token": "register_tokens"}
    swiglu = "giant" in name
    state = {}
    for ours, tensor in model.state_dict().items():
        theirs = names.get(ours, ours)
        if swiglu:
            theirs = theirs.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        state[theirs] = tensor
    state["pos_embed"] = torch.zeros(1, side**2 + 1, WIDTH)
    state["mask_token"] = torch.zeros(1, WIDTH)
    state = randomise(state, rng)
    model.load_state_dict(checkpoint_filter_fn({key: tensor.clone() for key, tensor in state.items()}, model))
    pixels = draw_pixels(rng, side * patch)

    def forward(model, images):
        return model.forward_features(images)[:, model.num_prefix_tokens :]

    features = _features(forward, model.eval(), pixels, "imagenet")
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    return Case(arrays, None, {"num_heads": HEADS}, pixels, features)


def open_clip(rng, patch=16, side=3, grid=3, quick_gelu=False, openai=False):
    """Build CLIP with OpenAI's names and its text encoder; `openai` adds the sizes in the released archives."""
    import open_clip as library

    def build(side):
        vision = dict(image_size=side * patch, layers=DEPTH, width=WIDTH, head_width=WIDTH // HEADS)
        vision |= dict(patch_size=patch, mlp_ratio=1.5, output_tokens=True)
        text = dict(context_length=5, vocab_size=7, width=8, heads=2, layers=1)
        return library.CLIP(embed_dim=PROJECTED, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu)

    model = _finish(build(side), rng)
    state = _arrays(model)
    if grid != side:
        resized = {key: torch.from_numpy(array.copy()) for key, array in state.items()}
        model = build(grid).eval()
        library.model.resize_pos_embed(resized, model)
        model.load_state_dict(resized)
    pixels = draw_pixels(rng, grid * patch)

    def forward(model, images):
        return model.visual(images)[1] @ model.visual.proj

    options = {"num_heads": HEADS}
    if openai:
        state |= {name: np.array(5) for name in ("input_resolution", "context_length", "vocab_size")}
    else:
        options["activation"] = "quick_gelu" if quick_gelu else "gelu"
    return Case(state, None, options, pixels, _features(forward, model, pixels, "clip"))
