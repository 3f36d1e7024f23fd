"""Predict every published recipe on 8 to 1024 chips: does it fit, what is the bottleneck, how does efficiency fall.

    python -m benchmarks.scaling [--kind=v5e] [--compile=NAME,...] [--chips=64,...] [--docs=docs/scaling.md]

Writes the tables of docs/scaling.md between its markers; one that has no marker there is printed. A plan is estimated
from the traced step in seconds, or compiled in some minutes: `--compile` names the recipes whose plans are compiled for
`--kind` at the numbers of `--chips`. Compiled metrics are kept in docs/scaling.json and taken from there by the next
call, as long as recipe, target, batch, remat and accumulation are the same.
"""

import functools
import json
import resource
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

from beitv2_jax.errors import UserError
from beitv2_jax.planning import planner, topologies
from beitv2_jax.planning.chips import CHIPS
from beitv2_jax.planning.prediction import Prediction
from beitv2_jax.report.page import markdown_table
from beitv2_jax.runtime.launch import start_logging
from benchmarks.configs import open_config
from benchmarks.pages import write_between

ROOT = Path(__file__).parents[1]
GIB, GIGA, TERA = 2**30, 1e9, 1e12
IMAGENET22K = {"data.source": "folder:imagenet22k"}
IMAGENET21K = {"data.source": "folder:imagenet21k"}
RECIPES = {
    "VQ-KD base": ("vqkd", {}),
    "MIM base 300": ("mim:300ep", {}),
    "MIM base 1600": ("mim", {}),
    "MIM large 300": ("mim:large,300ep", {}),
    "MIM large 1600": ("mim:large", {}),
    "MIM large, ImageNet-22k": ("mim:large", {**IMAGENET22K, "run.duration": "150 epochs"}),
    "fine-tuning base, ImageNet-22k": ("finetune:21kbase", IMAGENET21K),
    "fine-tuning large, ImageNet-22k": ("finetune:21klarge", IMAGENET21K),
    "fine-tuning base, ImageNet-1k": ("finetune", {}),
    "segmentation base": ("segment", {}),
}
"""Name -> (config, changed keys). The paper gives no schedule for MIM on ImageNet-22k: 150 epochs are an example."""
SAME_STEP = {"MIM large, ImageNet-22k": "MIM large 1600"}
"""Recipes whose compiled step is that of another; they differ in data and length alone."""
GRADIENTS = {"efficiency.gradient_dtype": "bfloat16"}
CHANGES = tuple(
    {"efficiency.remat": remat, "efficiency.accumulation_steps": steps}
    for remat in ("none", "full")
    for steps in (1, 2, 4, 8, 16)
)
"""What is tried where a step does not fit as it is."""
NUMBERS = (8, 64, 256, 512, 1024)
OTHERS = ("v4:64", "v5e:64", "v5p:64", "v6e:64", "h100:8", "h100:64", "a100:64")
OTHERS_RECIPE = "MIM base 1600"
KEPT = (
    "memory_per_chip",
    "flops_per_chip",
    "bytes_moved_per_chip",
    "collectives",
    "roofline_seconds",
    "step_seconds",
    "images_per_second",
    "source",
    "compile_seconds",
)
_KIND = flags.DEFINE_string("kind", "v5e", "Chip of the first two tables.")
_COMPILE = flags.DEFINE_list("compile", [], "Recipes whose fixed-batch plans are compiled; 'all' for every one.")
_CHIPS = flags.DEFINE_list("chips", [str(count) for count in NUMBERS], "Numbers of chips for which they are.")
_DOCS = flags.DEFINE_string("docs", str(ROOT / "docs" / "scaling.md"), "File whose tables are written.")


def config_of(name: str, **keys):
    """Return the config of a recipe."""
    spec, changes = RECIPES[name]
    config = open_config(spec)
    config.update_from_flattened_dict({**changes, **GRADIENTS, **keys})
    return config.lock()


@functools.cache
def step_of(name: str, platform: str = "tpu") -> planner.PlannedStep:
    """Return the step of a recipe."""
    return planner.prepare(config_of(name), platform=platform)


def key_of(name: str, target: topologies.Target, config) -> str:
    """Return what identifies a plan in docs/scaling.json."""
    efficiency = config.efficiency
    key = f"{SAME_STEP.get(name, name)}, {target.name}, batch {config.run.batch_size}"
    key += f", remat {efficiency.remat}" if efficiency.remat != "none" else ""
    return key + (f", {efficiency.accumulation_steps} micro-batches" if efficiency.accumulation_steps > 1 else "")


def fitting(name: str, target: topologies.Target, **keys) -> tuple[Prediction, dict[str, object]]:
    """Return the estimate of a recipe and the changed keys: as it is if it fits, else the fastest that does.

    Of plans none of which fits it is the one that needs least memory.

    Raises:
        UserError: the batch cannot be divided over the target.
    """
    as_it_is = estimated(name, target, **keys)
    if as_it_is.fits:
        return as_it_is, keys
    tried = [(as_it_is, keys)]
    for changes in CHANGES:
        changed = {**keys, **changes}
        try:
            tried.append((estimated(name, target, **changed), changed))
        except UserError:
            continue  # no image is left to divide
    fits = [(plan.step_s, number) for number, (plan, _) in enumerate(tried) if plan.fits]
    needs = [(plan.memory.peak, number) for number, (plan, _) in enumerate(tried)]
    return tried[min(fits or needs)[1]]


def estimated(name: str, target: topologies.Target, **keys) -> Prediction:
    """Return the plan of a recipe estimated from its traced step, with changed keys."""
    return planner.predict(planner.varied(step_of(name), **keys), target)


def plan_metrics(name: str, target: topologies.Target, known: dict, **keys) -> dict | str:
    """Return the metrics of a plan, compiled where they are known; a message where the batch cannot be divided."""
    try:
        prediction, _ = fitting(name, target, **keys)
    except UserError:
        return "cannot be divided"
    metrics = {**prediction.metrics(), **known.get(key_of(name, target, prediction.config), {})}
    hours = prediction.num_steps * metrics["step_seconds"] / 3600
    return {**metrics, "hours": hours, "chip_hours": hours * target.count}


def plans(name: str, kind: str, known: dict, *, growing: bool) -> Iterator[tuple[topologies.Target, dict | str]]:
    """Yield (target, metrics) of a recipe for every number of chips.

    `growing` batches keep the images of a chip at those of 64 chips, or what the recipe's batch gives 8.
    """
    per_chip = max(step_of(name).config.run.batch_size // 64, 1)
    for count in NUMBERS:
        target = topologies.parse(f"{kind}:{count}")
        keys = {"run.batch_size": per_chip * count} if growing else {}
        yield target, plan_metrics(name, target, known, **keys)


HEADER = (
    "chips", "batch", "memory per chip", "compute ms", "HBM ms", "collectives ms", "bottleneck", "images/s",
    "hours / chip-hours", "source",
)  # fmt: skip


def cells(target: topologies.Target, metrics: dict | str) -> tuple[str, ...]:
    """Return what stands in a row of a table below HEADER."""
    if isinstance(metrics, str):
        return (str(target.count), metrics, *[""] * (len(HEADER) - 2))
    memory, bounds, efficiency = metrics["memory_per_chip"], metrics["roofline_seconds"], metrics["efficiency"]
    steps = efficiency["accumulation_steps"]
    needs = f"{memory['peak'] / GIB:.1f} GiB" + (", remat" if efficiency["remat"] != "none" else "")
    needs += f", {steps} micro-batches" if steps > 1 else ""
    return (
        str(target.count),
        f"{metrics['batch_size']} ({metrics['images_per_chip']:g} per chip)",
        needs if memory["fits"] else f"{needs}: {memory['excess'] / GIB:.1f} GiB are missing",
        *(f"{1e3 * bounds[bound]:.1f}" for bound in ("compute", "HBM", "interconnect")),
        bounds["bottleneck"],
        f"{metrics['images_per_second']:,.0f}",
        f"{metrics['hours']:,.1f} / {metrics['chip_hours']:,.0f}",
        metrics["source"],
    )


def scaling_table(kind: str, known: dict, *, growing: bool) -> str:
    """Return the table of all recipes; its column 'per chip' is relative to the first plan of each recipe."""
    rows = [("recipe", *HEADER[:-2], "per chip", *HEADER[-2:])]
    for name in RECIPES:
        best = None
        for target, metrics in plans(name, kind, known, growing=growing):
            row, fraction = cells(target, metrics), ""
            if isinstance(metrics, dict):
                per_chip = metrics["images_per_second"] / target.count
                best = best or per_chip
                fraction = f"{per_chip / best:.0%}"
            rows.append((name, *row[:-2], fraction, *row[-2:]))
    return markdown_table(rows)


def others_table(known: dict) -> str:
    """Return the table of one recipe on every kind of chip."""
    rows = [("target", *HEADER)]
    for text in OTHERS:
        target = topologies.parse(text)
        rows.append((target.name, *cells(target, plan_metrics(OTHERS_RECIPE, target, known))))
    return markdown_table(rows)


def differences_table(known: dict) -> str:
    """Return, for everything that was compiled, how far the estimates are above or below it."""
    header = ("plan", "peak GiB", "traced", "TFLOPs", "traced", "GB moved", "traced", "collectives ms", "traced")
    rows = [header]
    for key, metrics in sorted(known.items()):
        name, target, keys = _parsed(key)
        estimate = estimated(name, target, **keys)
        flops = metrics["flops_per_chip"]["compiled"]
        rows.append(
            (
                key,
                f"{metrics['memory_per_chip']['peak'] / GIB:.2f}",
                _percent(estimate.memory.peak, metrics["memory_per_chip"]["peak"]),
                f"{flops / TERA:.2f}",
                _percent(estimate.traced_flops, flops),
                f"{metrics['bytes_moved_per_chip'] / GIGA:.1f}",
                _percent(estimate.bytes_moved, metrics["bytes_moved_per_chip"]),
                f"{1e3 * metrics['roofline_seconds']['interconnect']:.1f}",
                _percent(estimate.interconnect_s, metrics["roofline_seconds"]["interconnect"]),
            )
        )
    return markdown_table(rows)


def _parsed(key: str) -> tuple[str, topologies.Target, dict[str, object]]:
    """Return recipe, target and changed keys of a plan that `key_of` named."""
    name = max((name for name in RECIPES if key.startswith(name + ", ")), key=len)
    target, batch, *changes = key.removeprefix(name + ", ").split(", ")
    keys: dict[str, object] = {"run.batch_size": int(batch.removeprefix("batch "))}
    for change in changes:
        if change.startswith("remat "):
            keys["efficiency.remat"] = change.removeprefix("remat ")
        else:
            keys["efficiency.accumulation_steps"] = int(change.removesuffix(" micro-batches"))
    return name, topologies.parse(target), keys


def _percent(estimate: float, compiled: float) -> str:
    return f"{estimate / compiled - 1:+.0%}"


def chips_table() -> str:
    """Return the table of peak rates with their sources."""
    rates = ("bfloat16 TFLOP/s", "float32 TFLOP/s", "memory GiB", "memory GB/s", "link GB/s", "network GB/s")
    rows = [("chip", *rates, "source")]
    for chip in CHIPS.values():
        rates = (chip.hbm_rate, chip.link_rate, chip.network_rate)
        rows.append(
            (
                chip.name,
                f"{chip.flops / TERA:g}",
                f"{chip.exact_flops / TERA:.1f}",
                f"{chip.hbm_bytes / GIB:.0f}",
                *(f"{rate / GIGA:g}" for rate in rates),
                chip.source,
            )
        )
    return markdown_table(rows)


def compile_plans(names: list[str], numbers: list[int], kind: str, path: Path) -> None:
    """Compile the fixed-batch plans that are not known yet, and write each as soon as it is made."""
    for name in RECIPES if names == ["all"] else names:
        for number in numbers:
            known, target = read(path), topologies.parse(f"{kind}:{number}")
            try:
                prediction, changed = fitting(name, target)
                key = key_of(name, target, prediction.config)
                if key in known:
                    continue
                metrics = planner.compile_and_predict(
                    planner.varied(step_of(name, target.chip.platform), **changed), target
                ).metrics()
            except UserError as error:
                print(f"{name}, {target.name}: {error.happened}")
                continue
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of this process so far
            known[key] = {**{field: metrics[field] for field in KEPT}, "compiler_memory": memory}
            path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
            print(f"{key}: {metrics['compile_seconds']:.0f} s", flush=True)


def read(path: Path) -> dict:
    """Return the compiled metrics that are kept."""
    return json.loads(path.read_text()) if path.exists() else {}


def main(argv: list[str]) -> None:
    """Compile what is asked for and write the tables."""
    del argv
    start_logging(False)
    planner.start_compilers()
    docs, kind = Path(_DOCS.value), _KIND.value
    path = docs.with_suffix(".json")
    compile_plans(_COMPILE.value, [int(count) for count in _CHIPS.value], kind, path)
    known = read(path)
    for name, table in {
        f"fixed batch, {kind}": scaling_table(kind, known, growing=False),
        f"growing batch, {kind}": scaling_table(kind, known, growing=True),
        "other chips": others_table(known),
        "compiled and estimated": differences_table(known),
        "chips": chips_table(),
    }.items():
        write_between(docs, name, table)


if __name__ == "__main__":
    app.run(main)
