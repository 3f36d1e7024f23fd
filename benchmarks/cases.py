"""What there is to measure, by name; what a measurement needs is imported when it runs, so that listing costs nothing.

`measure` runs in a process of its own, that `benchmarks.run` starts.
"""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from beitv2_jax.errors import UserError, did_you_mean

INPUT_LIBRARIES = ("ml_collections", "grain", "PIL", "orbax")
TORCH_LIBRARIES = ("torch", "transformers")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "timm", "grain")


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: words on it, the function that makes it, what that needs installed, whether it must be named."""

    what: str
    run: Callable[[Mapping[str, Any]], dict[str, Any]]
    needs: tuple[str, ...] = ()
    only_named: bool = False


@dataclasses.dataclass(frozen=True)
class StepCase(Case):
    """The measurement of a step; `make` builds the step alone, which is what a profile needs."""

    make: Callable[[Mapping[str, Any]], Any] | None = None


@dataclasses.dataclass(frozen=True)
class PartCase(Case):
    """The measurement of a part alone; `make` builds its implementations."""

    make: Callable[[Mapping[str, Any]], Any] | None = None


def _step(what: str, kind: str, config: str, **arguments: Any) -> StepCase:
    def make(options: Mapping[str, Any]) -> Any:
        from benchmarks import steps

        return getattr(steps, kind)(_config(config, options), **arguments)

    def run(options: Mapping[str, Any]) -> dict[str, Any]:
        from benchmarks import timing

        return timing.measure_step(make(options), _effort(options))

    return StepCase(what, run, make=make)


def _part(what: str, kind: str, config: str) -> PartCase:
    def make(options: Mapping[str, Any]) -> Any:
        from benchmarks import parts

        return getattr(parts, kind)(_config(config, options))

    def run(options: Mapping[str, Any]) -> dict[str, Any]:
        from benchmarks import parts

        return parts.measure(make(options), _effort(options))

    return PartCase(what, run, make=make)


def _other(module: str, kind: str, *configs: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    def run(options: Mapping[str, Any]) -> dict[str, Any]:
        function = getattr(importlib.import_module(f"benchmarks.{module}"), kind)
        return function(*(_config(name, options) for name in configs), effort=_effort(options), options=options)

    return run


def _config(name: str, options: Mapping[str, Any]):
    from benchmarks.configs import load_config

    return load_config(name, quick=options["quick"], changes=options["changes"], device=options.get("device"))


def _effort(options: Mapping[str, Any]):
    from benchmarks import timing

    return timing.QUICK if options["quick"] else timing.FULL


CASES = {
    "mim_base_stored": _step("MIM step, base, stored code ids", "mim", "mim_base"),
    "torch_mim": Case("the same in PyTorch", _other("torch_steps", "mim", "mim_base"), TORCH_LIBRARIES),
    "mim_base_live": _step("MIM step, base, tokenizer in the step", "mim", "mim_base", live=True),
    "mim_large_stored": _step("MIM step, large, stored code ids", "mim", "mim_large"),
    "mim_large_live": _step("MIM step, large, tokenizer in the step", "mim", "mim_large", live=True),
    "vqkd_stored": _step("VQ-KD step, base, stored features", "vqkd", "vqkd"),
    "torch_vqkd": Case("the same in PyTorch", _other("torch_steps", "vqkd", "vqkd"), TORCH_LIBRARIES),
    "vqkd_live": _step("VQ-KD step, base, teacher in the step", "vqkd", "vqkd", live=True),
    "tokenize": _step("code ids of a batch", "tokenize", "mim_base"),
    "extract": _step("teacher features of a batch", "extract", "vqkd"),
    "finetune": _step("fine-tuning step, base", "finetune", "finetune"),
    "segment": _step("segmentation step, base, UPerNet", "segment", "segment"),
    "quantizer": _part("lookup, sums and update of the codebook alone", "quantizer", "vqkd"),
    "attention": _part("attention of one block alone, forward and backward", "attend", "mim_base"),
    "cross_entropy": _part("output layer and cross entropy alone, likewise", "cross_entropy", "mim_base"),
    "optimizer": _part("update of all parameters alone", "optimizer", "mim_base"),
    "jitter": _part("colour jitter of a batch alone", "jitter", "mim_base"),
    "input": Case(
        "batches of the mim stage from JPEGs alone", _other("loading", "input_alone", "mim_base"), INPUT_LIBRARIES
    ),
    "loop": Case("the mim stage with real input", _other("loading", "whole_loop", "mim_base"), INPUT_LIBRARIES),
    "pace": Case(
        "the loop with real input and a step that only takes time",
        _other("loading", "paced_loop", "mim_base"),
        INPUT_LIBRARIES,
        only_named=True,
    ),
    "growth_batch": Case("MIM step over the batch size", _other("growth", "over_batch", "mim_base")),
    "growth_length": Case("MIM step over the sequence length", _other("growth", "over_length", "mim_base")),
    "growth_depth": Case("MIM step over the depth", _other("growth", "over_depth", "mim_base")),
    "growth_codes": Case("codebook over its size, to 65 536", _other("growth", "over_codes", "vqkd")),
}


def step_of(name: str, options: Mapping[str, Any]) -> Any:
    """Return the step of that name.

    Raises:
        UserError: there is none.
    """
    steps = {key: case for key, case in CASES.items() if isinstance(case, StepCase)}
    if name not in steps:
        raise UserError(f"There is no step '{name}'.", did_you_mean(name, steps), f"Write one of {', '.join(steps)}.")
    return steps[name].make(options)


def lowered(name: str, options: Mapping[str, Any]) -> Any:
    """Return the program of a step or of one implementation of a part ("optimizer:joined") for the device in `options`.

    Raises:
        UserError: there is none.
    """
    name, _, implementation = name.partition(":")
    if not implementation:
        return step_of(name, options).lowered
    import jax

    case = CASES.get(name)
    implementations = case.make(options).implementations if isinstance(case, PartCase) else {}
    if implementation not in implementations or isinstance(implementations[implementation], str):
        raise UserError(
            f"There is no implementation '{implementation}' of '{name}'.",
            "Did you mean an implementation of this part?",
            f"Write one of {', '.join(implementations)}.",
        )
    function, arguments = implementations[implementation]
    device = jax.sharding.SingleDeviceSharding(options.get("device") or jax.devices()[0])
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device), arguments)
    return jax.jit(function).lower(*shapes)


def measure(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of one measurement, or {"skipped": why}."""
    case = CASES[name]
    missing = [package for package in case.needs if importlib.util.find_spec(package) is None]
    if missing:
        return {"what": case.what, "skipped": f"{', '.join(missing)} not installed"}
    return {"what": case.what, **case.run(options)}


def describe() -> dict[str, Any]:
    """Return what results depend on beside the sizes: device, versions, machine, state of the code, date."""
    import jax

    from benchmarks.run import today

    versions = {}
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "driver": _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _line("git", "rev-parse", "--short", "HEAD"),
        "date": today(),
    }


def _line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
