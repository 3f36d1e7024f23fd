"""Tables and plot of docs/performance.md out of what `benchmarks.run` measured.

    python -m benchmarks.report FILE.json [--docs=docs/performance.md]

Replaces what stands between the markers of the page and writes the plot beside it; the plot needs matplotlib. Metrics
of a CPU are shown as ratios alone: which machine it was, and what else it did, moves the rest.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beitv2_jax.report.page import markdown_table
from benchmarks.pages import write_between

DOCS = Path(__file__).parents[1] / "docs" / "performance.md"
SECTION = "measured, written by benchmarks.report"
COMPARISONS = (
    ("MIM base step: ours over PyTorch", "mim_base_stored", "torch_mim", 1.5),
    ("VQ-KD base step: ours over PyTorch", "vqkd_stored", "torch_vqkd", 1.5),
    ("MIM base step: stored code ids over tokenizer in the step", "mim_base_stored", "mim_base_live", 1.2),
    ("MIM large step: stored code ids over tokenizer in the step", "mim_large_stored", "mim_large_live", None),
    ("VQ-KD step: stored features over teacher in the step", "vqkd_stored", "vqkd_live", None),
)
"""Words, the faster and the slower measurement, and the least ratio of images a second that is aimed at on a GPU."""
UTILISATIONS = (
    ("MIM base, stored code ids", "mim_base_stored", 0.55),
    ("MIM large, stored code ids", "mim_large_stored", 0.60),
    ("VQ-KD base, stored features", "vqkd_stored", 0.50),
)
WAITING = 0.02
"""Largest share of time that the loop may wait for data."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="what benchmarks.run wrote")
    parser.add_argument("--docs", default=str(DOCS), help="page to write into")
    arguments = parser.parse_args(argv)
    measured, docs = json.loads(Path(arguments.file).read_text()), Path(arguments.docs)
    plot = docs.with_suffix(".svg")
    write_between(docs, SECTION, page(measured, plot.name))
    draw(measured, plot)


def page(measured: Mapping[str, Any], plot: str) -> str:
    """Return the Markdown of all tables, with the plot between them."""
    results = measured["results"]
    on_cpu = measured["environment"]["platform"] == "cpu"
    sections = [_provenance(measured), goals(results, on_cpu)]
    if not on_cpu:
        sections.append(speeds(results))
    sections += [
        work(results),
        chosen(results),
        implementations(results),
        over_sizes(results),
        loading(results, on_cpu),
    ]
    sections += [growth(results), f"![How cost grows]({plot})", missing(results)]
    return "\n\n".join(filter(None, sections))


def _provenance(measured: Mapping[str, Any]) -> str:
    machine = measured["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    size = "small sizes, float32" if measured["options"]["quick"] else "sizes of the published recipes, bfloat16"
    where = f"{machine['device']}, " if machine["platform"] != "cpu" else ""
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    return (
        f"Measured on {machine['date']} on {where}{machine['cores']} cores of {machine['processor']}{driver}; {size}; "
        f"Python {machine['python']}, {versions}; commit {machine['commit'] or 'unknown'}.\n\n"
        f"    {measured['command']}"
    )


def rounds(results: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the rounds of a measurement that were made; [] if there are none."""
    found = results.get(name, {}).get("rounds", [])
    return [one for one in found if not any(isinstance(one.get(word), str) for word in ("skipped", "failed"))]


def ratio(results: Mapping[str, Any], first: str, second: str) -> tuple[float, float, float] | None:
    """Return median, lowest and highest ratio of images a second, from the medians of the rounds in which both ran.

    Of a single round the lowest is that of the lowest sample over the highest, and the other way round.
    """
    pairs = [
        (a["images_per_second"], b["images_per_second"])
        for a, b in zip(rounds(results, first), rounds(results, second), strict=False)
    ]
    if not pairs:
        return None
    ratios = [a["median"] / b["median"] for a, b in pairs]
    if len(pairs) > 1:
        return statistics.median(ratios), min(ratios), max(ratios)
    ((a, b),) = pairs
    return ratios[0], a["low"] / b["high"], a["high"] / b["low"]


def goals(results: Mapping[str, Any], on_cpu: bool) -> str:
    """Return the table of what is aimed at and what was reached."""
    rows = [("what", "measured", "range", "goal on one H200")]
    for words, first, second, goal in COMPARISONS:
        found = ratio(results, first, second)
        aimed = f"{goal:g}" if goal else ""
        rows.append((words, *(_times(*found) if found else ("not measured", "")), aimed))
    for words, name, goal in UTILISATIONS:
        found = [one["utilisation"]["median"] for one in rounds(results, name) if one["utilisation"]]
        shown = (f"{statistics.median(found):.1%}", f"{min(found):.1%} to {max(found):.1%}") if found else None
        why = "not measured: a CPU has no peak to compare with" if on_cpu else "not measured"
        rows.append((f"model FLOP utilisation, {words}", *(shown or (why, "")), f"{goal:.0%}"))
    waits = [one["data_wait_share"] for one in rounds(results, "loop")]
    shown = (f"{statistics.median(waits):.1%}", "") if waits else ("not measured", "")
    rows.append(("share of the loop that waits for data", *shown, f"under {WAITING:.0%}"))
    words = "No goal is met or missed by these metrics: they are a CPU's." if on_cpu else ""
    return "\n\n".join(filter(None, [markdown_table(rows), words]))


def _times(median: float, low: float, high: float) -> tuple[str, str]:
    return f"{median:.2f}", f"{low:.2f} to {high:.2f}"


def speeds(results: Mapping[str, Any]) -> str:
    """Return the table of rates of all steps, ours and the peers'."""
    rows = [("step", "batch", "images/s", "range", "utilisation", "memory in use at most", "compile s")]
    for name in results:
        for found in rounds(results, name)[-1:]:
            if "images_per_second" not in found:
                continue
            rate, used = found["images_per_second"], found.get("utilisation")
            memory = found["peak_memory"]
            rows.append(
                (
                    f"{found['what']} (`{name}`)",
                    str(found["batch_size"]),
                    f"{rate['median']:,.0f}",
                    f"{rate['low']:,.0f} to {rate['high']:,.0f}",
                    f"{used['median']:.1%}" if used else "",
                    f"{memory['bytes'] / 2**30:.1f} GiB" if memory else "",
                    f"{found['compile_seconds']:.0f}" if found["compile_seconds"] else "",
                )
            )
    return markdown_table(rows) if len(rows) > 1 else ""


def work(results: Mapping[str, Any]) -> str:
    """Return the table of FLOPs by arithmetic beside the counts of the traced and of the compiled program."""
    rows = [
        (
            "step",
            "batch",
            "GFLOPs an image",
            "of which",
            "traced / arithmetic",
            "compiled / arithmetic",
            "planned memory",
        )
    ]
    for name in results:
        for found in rounds(results, name)[-1:]:
            if "flops" not in found:
                continue
            flops, total = found["flops"], sum(found["flops"]["per_image"].values())
            largest = sorted(flops["per_image"].items(), key=lambda item: -item[1])[:3]
            rows.append(
                (
                    found["what"],
                    str(found["batch_size"]),
                    f"{total / 1e9:.2f}",
                    ", ".join(f"{part} {amount / total:.0%}" for part, amount in largest),
                    f"{flops['traced_ratio']:.3f}",
                    f"{flops['compiler_ratio']:.3f}" if flops["compiler_ratio"] else flops["compiler_source"],
                    f"{found['peak_memory']['planned'] / 2**20:,.0f} MiB",
                )
            )
    return markdown_table(rows) if len(rows) > 1 else ""


def chosen(results: Mapping[str, Any]) -> str:
    """Return which implementations the steps took, one line for all that took the same."""
    steps: dict[str, list[str]] = {}
    for name in results:
        for found in rounds(results, name)[-1:]:
            if "chosen" in found:
                taken = ", ".join(f"{part.replace('_', ' ')} {chosen}" for part, chosen in found["chosen"].items())
                steps.setdefault(taken, []).append(found["what"])
    return "\n".join(
        f"- Implementations in {'all steps' if len(steps) == 1 else '; '.join(of)}: {taken}."
        for taken, of in steps.items()
    )


def implementations(results: Mapping[str, Any]) -> str:
    """Return the table of the parts alone: each implementation's speed and memory relative to the reference."""
    rows = [("part alone", "at", "implementation", "speed over reference", "range", "memory over reference")]
    for name in results:
        for found in rounds(results, name)[-1:]:
            if "implementations" not in found:
                continue
            reference = found["implementations"]["reference"]
            sizes = ", ".join(f"{key} {value}" for key, value in found["sizes"].items())
            for name, metrics in found["implementations"].items():
                if name == "reference":
                    continue
                shown = _speed_over(reference, metrics)
                memory = f"{metrics['planned_bytes'] / reference['planned_bytes']:.2f}"
                rows.append((found["what"], sizes, name, *shown, memory))
            for name, why in found["skipped"].items():
                rows.append((found["what"], sizes, name, f"not measured: {why}", "", ""))
    return markdown_table(rows) if len(rows) > 1 else ""


def over_sizes(results: Mapping[str, Any]) -> str:
    """Return the table of the parts that were measured at several sizes, relative to the reference."""
    over = "speed over reference", "range", "memory over reference", "memory of the reference"
    rows = [("of", "size", "implementation", *over)]
    for name in results:
        for found in rounds(results, name)[-1:]:
            curves = {name: curve["growth"] for name, curve in found.get("implementations_growth", {}).items()}
            for number, reference in enumerate(curves.pop("reference", ())):
                for name, points in curves.items():
                    shown = _speed_over(reference, points[number])
                    ratio = f"{points[number]['bytes'] / reference['bytes']:.2f}"
                    memory = ratio, f"{reference['bytes'] / 2**20:,.0f} MiB"
                    rows.append((found["what"], f"{reference['size']:,}", name, *shown, *memory))
    return markdown_table(rows) if len(rows) > 1 else ""


def _speed_over(reference: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, str]:
    ratios = [a / b for a, b in zip(reference["seconds"]["samples"], other["seconds"]["samples"], strict=True)]
    return _times(statistics.median(ratios), min(ratios), max(ratios))


def loading(results: Mapping[str, Any], on_cpu: bool) -> str:
    """Return a sentence on input and loop."""
    found = rounds(results, "loop")
    if not found:
        return ""
    last = found[-1]
    step_rate = last["step_images_per_second"]
    ratio_to_step, share = last["input_images_per_second"] / step_rate, last["loop_images_per_second"] / step_rate
    rates = "" if on_cpu else f" ({last['input_images_per_second']:,.0f} images/s from {last['threads']} threads)"
    return (
        f"Real input ({last['images']}): the input alone gives {ratio_to_step:.2f} times the images that the step "
        f"takes alone{rates}; the loop runs at {share:.2f} of the step's rate and waits {last['data_wait_share']:.1%} "
        f"of the time. "
        f"{last['cores_to_keep_the_step_busy']:.2f} cores keep this step busy."
    )


def growth(results: Mapping[str, Any]) -> str:
    """Return the table of exponents."""
    rows = [
        ("cost of", "over", "from", "to", "exponent of time", "between neighbours", "exponent of memory", "of FLOPs")
    ]
    for words, along, found in curves(results):
        fits, points = found["fits"], found["growth"]
        time, memory = fits["seconds"], fits["bytes"]
        rows.append(
            (
                words,
                along,
                str(points[0]["size"]),
                str(points[-1]["size"]),
                _exponent(time),
                ", ".join(f"{value:.2f}" for value in time["between_neighbours"]),
                _exponent(memory),
                _exponent(fits["flops"]) if "flops" in fits else "",
            )
        )
    return markdown_table(rows) if len(rows) > 1 else ""


def _exponent(fit: Mapping[str, Any]) -> str:
    error = f" ± {fit['standard_error']:.2f}" if fit["standard_error"] is not None else ""
    return f"{fit['exponent']:.2f}{error}"


def curves(results: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (words, along what, growth) of every curve that was measured."""
    found = []
    for name in results:
        for last in rounds(results, name)[-1:]:
            if "growth" in last:
                found.append((last["what"], last["along"], last))
            for name, curve in last.get("implementations_growth", {}).items():
                found.append((f"{last['what']}, {name}", curve["along"], curve))
    return found


def missing(results: Mapping[str, Any]) -> str:
    """Return a list of what was not measured and why."""
    lines = []
    for name, entry in results.items():
        for found in entry["rounds"][-1:]:
            for word in ("skipped", "failed"):
                if isinstance(found.get(word), str):
                    lines.append(f"- `{name}` {word}: {found[word].splitlines()[-1]}")
            for implementation, why in (found.get("skipped_implementations") or {}).items():
                lines.append(f"- `{name}`, {implementation}: {why}")
    return "Not measured:\n\n" + "\n".join(lines) if lines else ""


def draw(measured: Mapping[str, Any], path: Path) -> None:
    """Draw ratios and growth into an SVG."""
    import matplotlib

    matplotlib.use("svg")
    # without these two every run would give another file
    matplotlib.rcParams["svg.hashsalt"], metadata = "beitv2_jax", {"Date": None}
    from matplotlib import pyplot

    results, on_cpu = measured["results"], measured["environment"]["platform"] == "cpu"
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 5), layout="constrained")
    bars = [(words, ratio(results, first, second), goal) for words, first, second, goal in COMPARISONS]
    bars = [bar for bar in reversed(bars) if bar[1]]
    for place, (_, (median, low, high), goal) in enumerate(bars):
        left.barh(place, median, color="#4477aa")
        left.plot([low, high], [place, place], color="black", linewidth=1.5)
        if goal and not on_cpu:
            left.plot([goal, goal], [place - 0.4, place + 0.4], color="#cc3311", linewidth=2)
    left.axvline(1.0, color="grey", linewidth=0.8)
    left.set_yticks(range(len(bars)), [words.replace(": ", ":\n") for words, _, _ in bars], fontsize=8)
    left.set_xlabel("ratio of images/s" + ("" if on_cpu else " (red: goal on one H200)"))
    for axes, key, words in ((middle, "seconds", "time"), (right, "bytes", "memory")):
        for label, _, found in curves(results):
            points = found["growth"]
            costs = [point[key]["median"] if key == "seconds" else point[key] for point in points]
            sizes = [point["size"] / points[0]["size"] for point in points]
            exponent = found["fits"][key]["exponent"]
            axes.plot(sizes, [cost / costs[0] for cost in costs], marker="o", label=f"{label}: {exponent:.2f}")
        axes.set(
            xscale="log", yscale="log", xlabel="size over the smallest", ylabel=f"{words} over that of the smallest"
        )
        if axes.lines:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15)}
            axes.legend(fontsize=7, title="exponent", title_fontsize=7, **below)
    figure.savefig(path, metadata=metadata)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
