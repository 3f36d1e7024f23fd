"""Small Beit models of timm and transformers with random weights, and their outputs.

Used by beit_test.py and make_beit_fixtures.py. The libraries are not changed and run in float64. A case has the files
that a user would have: the arrays with the published names and, if there is one, config.json.
"""

import json
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

import transformers
from beit_peers import Peer
from safetensors.numpy import load_file
from timm.models.beit import Beit

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

WIDTH, DEPTH, HEADS, MLP, CLASSES, CODES = 9, 2, 3, 14, 7, 11
SMALL = 0.05
"""Scale of the additions to the residual stream: variances are small, so a wrong layer norm epsilon is detected."""


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Set every parameter and running statistic to a random value that affects the outputs."""
    rng = np.random.default_rng(seed)
    state = model.state_dict()
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        shape = tuple(tensor.shape)
        if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            value = rng.uniform(0.5, 1.5, shape)
        elif tensor.ndim == 1:
            value = rng.normal(0, 0.3, shape)
        elif "table" in name or "token" in name or "pos" in name:
            value = rng.normal(0, 0.5, shape)
        else:
            value = rng.normal(0, 1.3 / np.sqrt(np.prod(shape[1:])), shape)
        if any(part in name for part in ("embed", "token", "mlp.fc2", "attn.proj", "o_proj")):
            value = value * SMALL
        state[name] = torch.from_numpy(np.float32(value))
    model.load_state_dict(state)
    model.eval()


def images_for(size: int, seed: int) -> np.ndarray:
    """Return two normalised random images, channels last."""
    return np.random.default_rng(seed).normal(size=(2, size, size, 3)).astype(np.float32)


def mask_for(grid: int, seed: int) -> np.ndarray:
    """Return a mask with the same number of masked patches in both rows."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(grid * grid) < grid for _ in range(2)])


def channels_first(images: np.ndarray) -> torch.Tensor:
    """Return images with channels first, as PyTorch tensors in float64."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2)).double()


def timm_arguments(name: str) -> dict:
    """Return the arguments of timm's Beit for a case: own tables, one shared table, or absolute and [CLS]."""
    shared = dict(img_size=12, patch_size=4, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=MLP / WIDTH)
    return (
        shared
        | {
            "timm_relative": dict(num_classes=CLASSES, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
            "timm_shared": dict(
                num_classes=CLASSES, use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1
            ),
            "timm_absolute": dict(num_classes=CLASSES, global_pool="token"),
            "timm_features": dict(num_classes=0, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
        }[name]
    )


def timm_case(name: str) -> Peer:
    """Return timm's model of that name."""
    model = Beit(**timm_arguments(name))
    randomise(model, seed=3)
    images = images_for(12, seed=4)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    with torch.no_grad():
        outputs = {"logits": model.double()(channels_first(images)).numpy()}
    return Peer(state, None, {"images": images}, outputs)


def huggingface_arguments(name: str) -> tuple[type, dict]:
    """Return the class and the config of a case of transformers."""
    shared = dict(
        image_size=12,
        patch_size=4,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        num_labels=CLASSES,
        vocab_size=CODES,
    )
    kind, own = {
        "huggingface_relative": (transformers.BeitForImageClassification, dict(use_relative_position_bias=True)),
        "huggingface_absolute": (
            transformers.BeitForImageClassification,
            dict(
                use_absolute_position_embeddings=True,
                use_mean_pooling=False,
                layer_scale_init_value=0.0,
                layer_norm_eps=1e-6,
            ),
        ),
        "huggingface_mim": (
            transformers.BeitForMaskedImageModeling,
            dict(use_shared_relative_position_bias=True, use_mask_token=True),
        ),
        "huggingface_features": (transformers.BeitModel, dict(use_relative_position_bias=True)),
        "huggingface_segmenter": (
            transformers.BeitForSemanticSegmentation,
            dict(
                image_size=16,
                num_hidden_layers=5,
                use_relative_position_bias=True,
                out_indices=[2, 3, 4, 5],
                auxiliary_channels=5,
            ),
        ),
    }[name]
    return kind, shared | own


def huggingface_case(name: str) -> Peer:
    """Return the model of transformers of that name, as `save_pretrained` writes it."""
    kind, arguments = huggingface_arguments(name)
    model = kind(transformers.BeitConfig(**arguments))
    randomise(model, seed=5)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        state = load_file(Path(directory) / "model.safetensors")
        config = json.loads((Path(directory) / "config.json").read_text())
    inputs = {"images": images_for(arguments["image_size"], seed=6)}
    if name == "huggingface_mim":
        inputs["mask"] = mask_for(3, seed=7)
    return Peer(state, config, inputs, huggingface_outputs(model, inputs))


def huggingface_outputs(model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the outputs of a model of transformers, channels last, in float64."""
    model = model.double().eval()
    extra = {"bool_masked_pos": torch.from_numpy(inputs["mask"])} if "mask" in inputs else {}
    with torch.no_grad():
        output = model(channels_first(inputs["images"]), **extra)
    if isinstance(model, transformers.BeitModel):
        return {"logits": output.pooler_output.numpy()}
    logits = output.logits.numpy()
    return {"logits": np.moveaxis(logits, 1, -1) if logits.ndim == 4 else logits}


TIMM = ("timm_relative", "timm_shared", "timm_absolute", "timm_features")
HUGGINGFACE = (
    "huggingface_relative",
    "huggingface_absolute",
    "huggingface_mim",
    "huggingface_features",
    "huggingface_segmenter",
)


def case(name: str) -> Peer:
    """Return the case of that name."""
    return timm_case(name) if name in TIMM else huggingface_case(name)
