"""How every published recipe runs on more and more chips: does it fit, what binds, and how efficiency falls.

    python -m benchmarks.scaling [--kind=v5e] [--compile=NAME,...] [--docs=docs/scaling.md]

Writes the tables of docs/scaling.md between its markers. A plan is computed by arithmetic in seconds, or compiled in
about a minute each on an idle machine: `--compile` names the recipes whose plans are compiled at the chip counts of
`--chips`. Compiled figures are kept in docs/scaling.json and taken from there by the next call, so that the tables can
be made a part at a time; they are kept as long as recipe, target and batch are the same.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.main import start_logging
from beitv2_jax.planning import planner, topologies
from beitv2_jax.report.pipeline import markdown_table

ROOT = Path(__file__).parents[1]
IMAGENET22K = {"data.source": "folder:imagenet22k"}
LARGE = {"efficiency.remat": True}
RECIPES = {
    "VQ-KD base": ("vqkd", {}),
    "MIM base 300": ("mim:300ep", {}),
    "MIM base 1600": ("mim", {}),
    "MIM large 300": ("mim:large,300ep", {}),
    "MIM large 1600": ("mim:large", {}),
    "MIM large, ImageNet-22k": ("mim:large", {**IMAGENET22K, "run.duration": "150 epochs"}),
    "fine-tuning base, ImageNet-22k": ("finetune:21kbase", {"data.source": "folder:imagenet21k"}),
    "fine-tuning large, ImageNet-22k": ("finetune:21klarge", {"data.source": "folder:imagenet21k"}),
}
"""Name -> (config, changed keys). The paper gives no schedule for MIM on ImageNet-22k: 150 epochs are an example."""
CHIPS = (8, 64, 256, 512, 1024)
KEPT = (
    "memory_per_chip",
    "flops_per_chip",
    "bytes_moved_per_chip",
    "collectives",
    "roofline_seconds",
    "step_seconds",
    "images_per_second",
    "hours",
    "chip_hours",
    "source_of_figures",
    "compile_seconds",
)
_KIND = flags.DEFINE_string("kind", "v5e", "Chip of the tables.")
_COMPILE = flags.DEFINE_list("compile", [], "Recipes whose fixed-batch plans are compiled; 'all' for every one.")
_CHIPS = flags.DEFINE_list("chips", [str(count) for count in CHIPS], "Chip counts at which they are.")
_DOCS = flags.DEFINE_string("docs", str(ROOT / "docs" / "scaling.md"), "File whose tables are written.")


def stage_of(name: str, **keys) -> planner.Stage:
    """Return a recipe, described."""
    spec, changes = RECIPES[name]
    stem, _, arg = spec.partition(":")
    config = config_lib.load(f"{ROOT / 'configs' / stem}.py:{arg}").copy_and_resolve_references().unlock()
    config.update_from_flattened_dict({**changes, **keys})
    return planner.prepare(config.lock())


def key_of(name: str, target: topologies.Target, stage: planner.Stage) -> str:
    """Return what identifies a plan in docs/scaling.json."""
    remat = ", remat" if stage.config.efficiency.remat else ""
    return f"{name}, {target.name}, batch {stage.config.run.batch_size}{remat}"


def plans(name: str, kind: str, known: dict, *, growing: bool) -> Iterator[tuple[topologies.Target, dict | str]]:
    """Yield (target, figures) of a recipe at every chip count; words where there is no plan.

    `growing` batches keep the images of a chip at those of 64 chips, or what the recipe's batch gives 8.
    """
    plain = stage_of(name)
    per_chip = plain.config.run.batch_size // 64
    for count in CHIPS:
        target = topologies.parse(f"{kind}:{count}")
        stage = planner.estimated(plain, **{"run.batch_size": per_chip * count}) if growing else plain
        try:
            plan = planner.compute(stage, target)
        except UserError as error:
            yield target, error.happened
            continue
        if not plan.fits:
            remat = planner.estimated(stage, **{"efficiency.remat": True})
            plan = planner.compute(remat, target)
            stage = remat
        compiled = known.get(key_of(name, target, stage))
        yield target, {**plan.figures(), **(compiled or {})}


def rows_of(name: str, kind: str, known: dict, *, growing: bool) -> list[tuple[str, ...]]:
    """Return the rows of a table for one recipe."""
    rows, best = [], None
    for target, figures in plans(name, kind, known, growing=growing):
        if isinstance(figures, str):
            rows.append((name, str(target.count), figures, *[""] * 8))
            continue
        memory, bounds = figures["memory_per_chip"], figures["roofline_seconds"]
        per_chip = figures["images_per_second"] / target.count
        best = best or per_chip
        needs = f"{memory['peak'] / 2**30:.1f} GiB" + (", remat" if figures["efficiency"]["remat"] else "")
        rows.append(
            (
                name,
                str(target.count),
                f"{figures['batch_size']} ({figures['images_per_chip']:g} a chip)",
                needs if memory["fits"] else f"{needs}: {memory['over'] / 2**30:.1f} over",
                *(f"{1e3 * bounds[bound]:.1f}" for bound in ("compute", "HBM", "interconnect")),
                f"{figures['images_per_second']:,.0f}",
                f"{per_chip / best:.0%}",
                f"{figures['hours']:,.1f} / {figures['chip_hours']:,.0f}",
                figures["source_of_figures"],
            )
        )
    return rows


HEADER = (
    "recipe", "chips", "batch", "memory of a chip", "compute ms", "HBM ms", "exchange ms", "images/s",
    "images/s of a chip", "hours / chip-hours", "",
)  # fmt: skip


def compile_plans(names: list[str], counts: list[int], kind: str, path: Path) -> None:
    """Compile the fixed-batch plans that are not known yet, and keep each as soon as it is made."""
    for name in RECIPES if names == ["all"] else names:
        for count in counts:
            known = json.loads(path.read_text()) if path.exists() else {}
            target, stage = topologies.parse(f"{kind}:{count}"), stage_of(name)
            try:
                if not planner.compute(stage, target).fits:
                    stage = stage_of(name, **LARGE)
                key = key_of(name, target, stage)
                if key in known:
                    continue
                figures = planner.make(stage, target).figures()
            except UserError as error:
                print(f"{name}, {target.name}: {error.happened}")
                continue
            known[key] = {field: figures[field] for field in KEPT}
            path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
            print(f"{key}: {figures['compile_seconds']:.0f} s", flush=True)


def main(argv: list[str]) -> None:
    """Compile what is asked for and write the tables."""
    del argv
    start_logging(False)
    planner.start_compilers()
    docs, kind = Path(_DOCS.value), _KIND.value
    path = docs.with_suffix(".json")
    compile_plans(_COMPILE.value, [int(count) for count in _CHIPS.value], kind, path)
    known = json.loads(path.read_text()) if path.exists() else {}
    for title, growing in (("fixed", False), ("growing", True)):
        rows = [row for name in RECIPES for row in rows_of(name, kind, known, growing=growing)]
        write_between(docs, f"{title} batch, {kind}", markdown_table([HEADER, *rows]))


def write_between(path: Path, name: str, table: str) -> None:
    """Replace what stands between the markers `<!-- name -->` and `<!-- end -->` of a Markdown file."""
    text = path.read_text()
    marker = f"<!-- {name} -->"
    if marker not in text:
        sys.exit(f"{path} has no {marker}")
    before, after = text.split(marker, 1)
    path.write_text(f"{before}{marker}\n\n{table}\n\n<!-- end -->{after.split('<!-- end -->', 1)[1]}")


if __name__ == "__main__":
    app.run(main)
