"""The MIM and the VQ-KD step in PyTorch, out of transformers' BEiT modules: what the same hardware gives a peer.

As a competent user would write them: masked tokens gathered before the output layer, torch.compile, scaled dot product
attention, fused AdamW, bfloat16 autocast with float32 parameters on a GPU. Same sizes, batch, precision and number of
parameters as ours (`mim`, `vqkd` raise AssertionError otherwise). Only the documented interface of transformers is
used: `BeitConfig`, `BeitModel` and the modules that it holds.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import nn
from torch.nn import functional
from transformers import BeitConfig, BeitModel

from beitv2_jax.models.preprocess import IMAGENET_MEAN, IMAGENET_STD
from beitv2_jax.planning.abstract_task import TEACHER_WIDTH
from benchmarks import steps, timing

SEED = 0


def mim(config: ConfigDict, *, effort: timing.Effort, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return rates of the MIM step on stored code ids."""
    rng, count = torch.Generator().manual_seed(SEED), config.run.batch_size
    side, size = config.views.image_size // config.model.patch_size, config.views.image_size
    hidden = torch.rand((count, side * side), generator=rng).argsort(1)[:, : config.masking.num_masked]
    batch = {
        "images": torch.randint(0, 256, (count, 3, size, size), generator=rng, dtype=torch.uint8),
        "positions": hidden.sort(1).values,
        "mask": torch.zeros((count, side * side), dtype=torch.bool).scatter(1, hidden, True),
        "ids": torch.randint(0, config.model.codebook_size, hidden.shape, generator=rng),
    }
    return _measure(MaskedImageModel(config), batch, config, effort)


def vqkd(config: ConfigDict, *, effort: timing.Effort, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return rates of the VQ-KD step on stored features."""
    rng, count = torch.Generator().manual_seed(SEED), config.run.batch_size
    side, size = config.views.image_size // config.model.encoder.patch_size, config.views.image_size
    batch = {
        "images": torch.randint(0, 256, (count, 3, size, size), generator=rng, dtype=torch.uint8),
        "features": torch.randn((count, side * side, TEACHER_WIDTH), generator=rng),
    }
    return _measure(Tokenizer(config), batch, config, effort)


class MaskedImageModel(nn.Module):
    """BeitModel, two more of its layers as patch-aggregation head, one output layer for both predictions."""

    def __init__(self, config: ConfigDict):
        super().__init__()
        model = config.model
        self.config = _config(
            model,
            config.views.image_size,
            drop_path_rate=model.drop_path_rate,
            layer_scale_init_value=model.layer_scale_init,
            use_mask_token=True,
            use_shared_relative_position_bias=True,
        )
        self.backbone = BeitModel(self.config, add_pooling_layer=False)
        # layers are made by a model of their number, so that only its documented class is called
        head = _config(
            model,
            config.views.image_size,
            num_hidden_layers=model.head_depth,
            drop_path_rate=model.drop_path_rate,
            layer_scale_init_value=model.layer_scale_init,
        )
        self.aggregation = BeitModel(head, add_pooling_layer=False).layers
        self.output = nn.Linear(model.width, model.codebook_size)
        self.early_layer, self.grid = model.early_layer, (config.views.image_size // model.patch_size,) * 2

    def forward(self, images, mask, positions, ids):
        tokens = self.backbone.embeddings(normalised(images), mask)
        bias = self.backbone.shared_position_bias(self.grid)
        if torch.is_autocast_enabled(images.device.type):
            bias = bias.to(torch.get_autocast_dtype(images.device.type))
        for number, layer in enumerate(self.backbone.layers, 1):
            tokens = layer(tokens, attention_mask=bias)
            if number == self.early_layer:
                early = tokens
        aggregated = torch.cat([tokens[:, :1], early[:, 1:]], dim=1)
        for layer in self.aggregation:
            aggregated = layer(aggregated, attention_mask=bias)
        index = positions[..., None].expand(-1, -1, tokens.shape[-1])
        losses = []
        for branch in (tokens, aggregated):
            logits = self.output(self.backbone.layernorm(branch[:, 1:].gather(1, index)))
            losses.append(functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()))
        return sum(losses)


class Tokenizer(nn.Module):
    """Two BeitModels with a quantizer between them; the codebook is state that moves with every step."""

    def __init__(self, config: ConfigDict):
        super().__init__()
        model = config.model
        self.side = config.views.image_size // model.encoder.patch_size
        absolute = {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0}
        self.encoder = BeitModel(_config(model.encoder, config.views.image_size, **absolute), add_pooling_layer=False)
        codes = _config({**model.decoder, "patch_size": 1}, self.side, num_channels=model.code_dim, **absolute)
        self.decoder = BeitModel(codes, add_pooling_layer=False)
        self.to_codes = _task_layer(model.encoder.width, model.code_dim)
        self.to_features = _task_layer(model.decoder.width, TEACHER_WIDTH)
        self.ema_decay = model.ema_decay
        self.register_buffer("codebook", functional.normalize(torch.randn(model.codebook_size, model.code_dim)))
        self.register_buffer("cluster_counts", torch.zeros(model.codebook_size))

    def forward(self, images, features):
        encoded = self.encoder(images.float() / 127.5 - 1.0).last_hidden_state[:, 1:]
        with torch.autocast(images.device.type, enabled=False):
            unit = functional.normalize(self.to_codes(encoded.float()), dim=-1)
            flat = unit.detach().flatten(0, 1)
            ids = (self.codebook.square().sum(1) - 2.0 * flat @ self.codebook.T).argmin(1)
            nearest = self.codebook[ids].view_as(unit)
            self._move(flat, ids)
            commitment = functional.mse_loss(unit, nearest)
            codes = unit + (nearest - unit).detach()
        image = codes.transpose(1, 2).reshape(len(images), -1, self.side, self.side)
        decoded = self.decoder(image).last_hidden_state[:, 1:]
        distance = 1.0 - functional.cosine_similarity(self.to_features(decoded).float(), features, dim=-1)
        return distance.mean() + commitment

    @torch.no_grad()
    def _move(self, unit, ids):
        counts = torch.zeros_like(self.cluster_counts).index_add_(0, ids, torch.ones_like(ids, dtype=unit.dtype))
        sums = torch.zeros_like(self.codebook).index_add_(0, ids, unit)
        means = functional.normalize(sums / counts.clamp(min=1.0)[:, None])
        moved = functional.normalize(self.ema_decay * self.codebook + (1.0 - self.ema_decay) * means)
        self.codebook.copy_(torch.where(counts[:, None] > 0, moved, self.codebook))
        self.cluster_counts.mul_(self.ema_decay).add_(counts, alpha=1.0 - self.ema_decay)


def _config(sizes: Mapping[str, Any], image_size: int, **more: Any) -> BeitConfig:
    values = {
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["num_heads"],
        "intermediate_size": sizes["mlp_dim"],
        "image_size": image_size,
        "patch_size": sizes["patch_size"],
        "layer_norm_eps": 1e-6,
        "drop_path_rate": 0.0,
        "use_mean_pooling": False,
        "attn_implementation": "sdpa",
    }
    return BeitConfig(**{**values, **more})


def _task_layer(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Return the network's input of pixels 0..255, channels first."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255.0 - mean) / std


def _measure(model: nn.Module, batch, config: ConfigDict, effort: timing.Effort) -> dict[str, Any]:
    """Return rates of the eager and of the compiled step, which take turns; the faster one is the peer."""
    parameters = sum(tensor.numel() for tensor in model.parameters())
    ours = getattr(steps, config.stage)(config).parameters
    assert parameters == ours, f"{parameters} parameters, ours has {ours}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    model, batch = model.to(device).train(), {name: tensor.to(device) for name, tensor in batch.items()}
    optimizer = _optimizer(model, config, device)

    def step(forward: Callable) -> None:
        optimizer.zero_grad(set_to_none=True)
        with _precision(device, config):
            loss = forward(**batch)
        loss.backward()
        if config.optim.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()

    modes, skipped, compile_seconds = {"eager": model}, {}, None
    if config.torch.compile:
        started = time.perf_counter()
        try:
            compiled = torch.compile(model)
            step(compiled)
            _wait(device)
            modes["compiled"], compile_seconds = compiled, time.perf_counter() - started
        except Exception as error:  # a missing compiler shows as one of many kinds of error
            skipped["compiled"] = str(error).strip().splitlines()[0][:200]
    else:
        skipped["compiled"] = "left out of --quick"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = _in_turns({name: lambda mode=mode: step(mode) for name, mode in modes.items()}, device, effort)
    best = min(found, key=lambda name: timing.spread(found[name])["median"])
    return {
        "batch_size": config.run.batch_size,
        "parameters": parameters,
        "device": str(torch.cuda.get_device_name()) if device.type == "cuda" else "cpu",
        "dtype": config.efficiency.dtype,
        "threads": torch.get_num_threads(),
        "fastest": best,
        "seconds": timing.spread(found[best]),
        "images_per_second": timing.rates(found[best], config.run.batch_size),
        "all": {name: timing.rates(seconds, config.run.batch_size) for name, seconds in found.items()},
        "skipped_forms": skipped,
        "compile_seconds": compile_seconds,
        "peak_memory": {"bytes": torch.cuda.max_memory_allocated(), "source": "device"}
        if device.type == "cuda"
        else None,
    }


def _optimizer(model: nn.Module, config: ConfigDict, device: torch.device) -> torch.optim.Optimizer:
    decayed = [tensor for tensor in model.parameters() if tensor.ndim > 1]
    plain = [tensor for tensor in model.parameters() if tensor.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=config.optim.min_lr, betas=tuple(config.optim.betas), eps=config.optim.eps, fused=True
    )


def _precision(device: torch.device, config: ConfigDict):
    if config.efficiency.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def _in_turns(runs: Mapping[str, Callable[[], None]], device, effort: timing.Effort) -> dict[str, Sequence[float]]:
    def seconds(run, count):
        _wait(device)
        started = time.perf_counter()
        for _ in range(count):
            run()
        _wait(device)
        return (time.perf_counter() - started) / count

    counts = {}
    for name, run in runs.items():
        seconds(run, 2)
        counts[name] = max(1, round(effort.seconds / seconds(run, 1)))
    found = {name: [] for name in runs}
    for _ in range(effort.samples):
        for name, run in runs.items():
            found[name].append(seconds(run, counts[name]))
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
