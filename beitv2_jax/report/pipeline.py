"""The report of a finished pipeline: one table of seconds and metrics, and the picture of the codes."""

import math
import os

from beitv2_jax.data.sources import open_source
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.report.codes import draw_code_rows
from beitv2_jax.runtime.atomic_files import write_text


def write_pipeline_report(stages: dict, summaries: dict, workdir: str) -> str:
    """Write `report.md` and, where the pipeline has a tokenize stage, `codes.png`; return the table as text."""
    rows = [("stage", "seconds", "metrics")]
    for name, summary in summaries.items():
        # null in JSON is a number that is not finite
        metrics = {key: math.nan if value is None else value for key, value in summary["metrics"].items()}
        described = DESCRIPTIONS[summary["stage"]](metrics, stages[name])
        rows += [
            (name if not i else "", f"{summary['seconds']:.0f}" if not i else "", line)
            for i, line in enumerate(described)
        ]
    rows.append(("total", f"{sum(s['seconds'] for s in summaries.values()):.0f}", ""))
    table = markdown_table(rows)
    text = f"# Pipeline report\n\n{table}\n"
    for name, stage in stages.items():
        if stage.stage == "tokenize":
            data = stage.data
            source = open_source(data.source, data.eval_split, data.data_dir, data.train_split)
            reader = TargetReader(os.path.join(workdir, name, "centre"), source.split)
            draw_code_rows(source, reader, os.path.join(workdir, "codes.png"))
            text += "\nThe 16 most used codes on the evaluation images, one row each:\n\n![codes](codes.png)\n"
    write_text(os.path.join(workdir, "report.md"), text)
    return table


def markdown_table(rows: list[tuple[str, ...]]) -> str:
    """Lay out rows (the first one is the header) as an aligned Markdown table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _finetune(metrics: dict, stage) -> list[str]:
    return [f"accuracy {metrics['eval/accuracy']:.1%} on {stage.data.eval_split} (train loss {metrics['loss']:.3f})"]


def _extract(metrics: dict, stage) -> list[str]:
    return [f"{metrics['train_examples']} images x {metrics['views_per_example']} views"]


def _vqkd(metrics: dict, stage) -> list[str]:
    return [
        f"reconstruction loss {metrics['eval/reconstruction_loss']:.3f} (train {metrics['reconstruction_loss']:.3f})",
        f"codebook usage {metrics['eval/codebook_usage']:.0%} of {stage.model.codebook_size}, "
        f"perplexity {metrics['eval/codebook_perplexity']:.0f}",
    ]


def _mim(metrics: dict, stage) -> list[str]:
    lines = [
        f"loss {metrics['loss']:.3f} (final layer {metrics['final_loss']:.3f})",
        f"masked accuracy {metrics['eval/final_accuracy']:.1%} (chance {1 / stage.model.codebook_size:.1%}, "
        f"most frequent code {metrics['eval/majority_accuracy']:.1%})",
    ]
    if "eval/aggregation_accuracy" in metrics:
        lines.append(f"through the aggregation head {metrics['eval/aggregation_accuracy']:.1%}")
    return lines


def _probe(metrics: dict, stage) -> list[str]:
    lines = []
    for name in dict.fromkeys(key.rsplit("/", 1)[0] for key in metrics if "/" in key):
        title = "raw pixels" if name == "pixels/pixels" else name.replace("/", " ")
        lines.append(f"{title}: linear {metrics[f'{name}/linear']:.1%}, kNN {metrics[f'{name}/knn']:.1%}")
    return lines


DESCRIPTIONS = {
    "finetune": _finetune,
    "extract": _extract,
    "vqkd": _vqkd,
    "tokenize": _extract,
    "mim": _mim,
    "probe": _probe,
}
"""Stage name -> its lines in the table, from (metrics, config)."""
