"""The few numbers that say how a stage went, as lines of text."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def key_metrics(summary: Mapping[str, Any], config: ConfigDict) -> list[str]:
    """Return the lines for the summary {stage, seconds, metrics} of a finished stage with this config."""
    # null in JSON is a number that is not finite, and one that is missing must not end a run that has finished
    given = {key: math.nan if value is None else value for key, value in summary["metrics"].items()}
    metrics = defaultdict(lambda: math.nan, given)
    return DESCRIPTIONS.get(summary["stage"], _evaluation)(metrics, config)


def _evaluation(metrics: dict, stage) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith("eval/")]


def _finetune(metrics: dict, stage) -> list[str]:
    if "eval/mean_average_precision" in metrics:
        return [
            f"mAP {metrics['eval/mean_average_precision']:.1%}, F1 {metrics['eval/micro_f1']:.1%} of all decisions, "
            f"{metrics['eval/macro_f1']:.1%} in the mean over the classes, on {stage.data.eval_split} "
            f"(train loss {metrics['loss']:.3f})"
        ]
    return [f"accuracy {metrics['eval/accuracy']:.1%} on {stage.data.eval_split} (train loss {metrics['loss']:.3f})"]


def _extract(metrics: dict, stage) -> list[str]:
    return [f"{metrics['train_examples']} images x {metrics['views_per_example']} views"]


def _vqkd(metrics: dict, stage) -> list[str]:
    return [
        f"reconstruction loss {metrics['eval/reconstruction_loss']:.3f} (train {metrics['reconstruction_loss']:.3f})",
        f"codebook usage {metrics['eval/codebook_usage']:.0%} of {stage.model.codebook_size}, "
        f"perplexity {metrics['eval/codebook_perplexity']:.0f}",
    ]


def _cluster(metrics: dict, stage) -> list[str]:
    return [
        f"reconstruction loss {metrics['eval/reconstruction_loss']:.3f} "
        f"(the {metrics['tokens']:,} clustered tokens {metrics['reconstruction_loss']:.3f})",
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


def _regress(metrics: dict, stage) -> list[str]:
    what = "cosine distance of features" if stage.teacher.features else "squared error of normalised pixels"
    branches = {"final layer": "final", "aggregation head": "aggregation"}
    found = [
        f"{title} {metrics[f'eval/{name}_loss']:.3f}"
        for title, name in branches.items()
        if f"eval/{name}_loss" in metrics
    ]
    return [f"loss {metrics['loss']:.3f}", f"{what} of hidden patches: {', '.join(found)}"]


def _probe(metrics: dict, stage) -> list[str]:
    accuracies = {key: value for key, value in metrics.items() if "/" in key and not key.startswith("chosen/")}
    lines = []
    if stage.probe.get("protocol", "ours") != "ours":
        for name in dict.fromkeys(key.rsplit("/", 1)[0] for key in accuracies):
            found = [
                f"{key.rpartition('/')[2]} {value:.1%}"
                for key, value in accuracies.items()
                if key.startswith(f"{name}/")
            ]
            lines.append(f"{name.replace('/', ' ')}: {', '.join(found)}")
        return lines
    for name in dict.fromkeys(key.rsplit("/", 1)[0] for key in accuracies):
        title = "raw pixels" if name == "pixels/pixels" else name.replace("/", " ")
        lines.append(f"{title}: linear {metrics[f'{name}/linear']:.1%}, kNN {metrics[f'{name}/knn']:.1%}")
    return lines


def _dense(metrics: dict, stage) -> list[str]:
    lines = []
    for name in dict.fromkeys(key.split("/")[0] for key in metrics if "/" in key):
        title = "raw pixels" if name == "pixels" else name
        knn, logistic = (metrics[f"{name}/{classifier}/mean_iou"] for classifier in ("knn", "logistic"))
        lines.append(f"{title}: mean IoU by nearest patches {knn:.1%}, by logistic regression {logistic:.1%}")
    return lines


def _segment(metrics: dict, stage) -> list[str]:
    return [
        f"mean IoU {metrics['eval/mean_iou']:.1%}, mean accuracy {metrics['eval/mean_accuracy']:.1%}, "
        f"pixel accuracy {metrics['eval/pixel_accuracy']:.1%} on {stage.data.eval_split}"
    ]


DESCRIPTIONS = {
    "finetune": _finetune,
    "extract": _extract,
    "vqkd": _vqkd,
    "cluster": _cluster,
    "tokenize": _extract,
    "mim": _mim,
    "regress": _regress,
    "probe": _probe,
    "dense": _dense,
    "segment_linear": _segment,
    "segment": _segment,
}
"""Stage -> its lines, from (metrics, config); of any other stage they are the metrics of its evaluation."""
