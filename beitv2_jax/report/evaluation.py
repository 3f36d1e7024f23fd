"""Tables and pictures of an evaluation: metrics beside published ones, classes, confusions, confident mistakes."""

import csv
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont

from beitv2_jax.data.augment import center_crop
from beitv2_jax.data.sources import Source
from beitv2_jax.data.transform import readable_image
from beitv2_jax.errors import UserError
from beitv2_jax.report.captions import fitted
from beitv2_jax.report.page import markdown_table
from beitv2_jax.tasks.multi_label import THRESHOLD

_TITLES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_class_accuracy": "mean accuracy of the classes",
    "mean_average_precision": "mAP (mean average precision)",
    "macro_f1": "mean F1 of the classes",
    "micro_f1": "F1 of all decisions",
    "nll": "negative log-likelihood (nats)",
    "calibration_error": "calibration error",
    "reconstruction_loss": "reconstruction loss (1 - cosine)",
    "codebook_usage": "codes in use",
    "codebook_perplexity": "perplexity of the codes",
    "codebook_entropy": "entropy of the codes (nats)",
    "nmi_class": "mutual information of codes and classes",
    "purity_class": "purity of the codes, classes",
    "majority_class": "patches of the most frequent class",
    "pixels_nmi_class": "mutual information of clusters of pixels and classes",
    "pixels_purity_class": "purity of clusters of pixels, classes",
    "nmi_mask": "mutual information of codes and label maps",
    "purity_mask": "purity of the codes, label maps",
    "majority_mask": "patches of the most frequent label",
    "pixels_nmi_mask": "mutual information of clusters of pixels and label maps",
    "pixels_purity_mask": "purity of clusters of pixels, label maps",
    "nmi_part": "mutual information of codes and parts",
    "purity_part": "purity of the codes, parts",
    "majority_part": "patches of the most frequent part",
    "pixels_nmi_part": "mutual information of clusters of pixels and parts",
    "pixels_purity_part": "purity of clusters of pixels, parts",
    "codebook_top_share": "patches on the most used 1 % of the codes",
    "codebook_dead": "dead codes (below 1/100 of the uniform share)",
    "codebook_tokens": "patches counted",
    "quantization_distance": "mean squared distance to the code",
    "loss": "loss (nats)",
    "final_loss": "loss, final layer (nats)",
    "aggregation_loss": "loss, aggregation head (nats)",
    "final_accuracy": "masked accuracy, final layer",
    "aggregation_accuracy": "masked accuracy, aggregation head",
    "majority_accuracy": "accuracy of the most frequent code",
    "masked_patches": "masked patches",
    "mean_iou": "mean IoU",
    "mean_accuracy": "mean class accuracy",
    "pixel_accuracy": "pixel accuracy",
}
"""Metric -> its row in the table, in this order."""
_AMONG = "among_"
_PLAIN = (
    *("nll", "loss", "reconstruction_loss", "final_loss", "aggregation_loss"),
    *("codebook_entropy", "quantization_distance"),
)
_COUNTS = ("masked_patches", "codebook_dead", "codebook_tokens")
MAX_TICKS = 40
"""Classes up to which a picture of confusions names them."""
NUM_MISTAKES = 24
TILE, _CAPTION, _IN_ROW = 192, 50, 6


class Mistake(NamedTuple):
    """An image whose class was predicted wrongly: its id and place in the data, both classes, and the probability."""

    example_id: int
    where: str
    true: str
    predicted: str
    probability: float


def metrics_table(metrics: Mapping[str, float], published: Mapping[str, float] | None, num_among: int) -> str:
    """Return the metrics as a table, with a column of published ones if there are any.

    `num_among` is the number of classes of metrics that begin with 'among_'.
    """
    rows = [("metric", "measured", *(["published"] if published else []))]
    for start in ("", _AMONG):
        for name, title in _TITLES.items():
            if start + name in metrics:
                title = f"{title}, among the {num_among} classes of the data" if start else title
                shown = [_shown(name, metrics[start + name])]
                if published:
                    shown.append(_shown(name, published[name]) if not start and name in published else "")
                rows.append((title, *shown))
    return markdown_table(rows)


def _shown(name: str, value: float) -> str:
    if name in _PLAIN:
        return f"{value:.4f}"
    if name in _COUNTS:
        return f"{value:,.0f}"
    if "nmi_" in name:
        return f"{value:.3f}"
    return f"{value:.1f}" if name == "codebook_perplexity" else f"{value:.2%}"


def write_csv(path: Path, rows: Sequence[Sequence]) -> None:
    """Write a CSV file whose first row names the columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def require_matplotlib() -> None:
    """Raise UserError, before anything is computed, if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "The picture of the confusion matrix needs matplotlib, which is not installed.",
            "Did you install the package without the extra that draws?",
            'Run pip install "beitv2_jax[evaluate]", or leave out --out to see the table alone.',
        )


def draw_confusion(confusion: Int[np.ndarray, "k k_and_other"], names: Sequence[str], path: Path) -> None:
    """Write a picture of a confusion matrix: the fraction of each class's images (row) by predicted class (column).

    The last column, other classes than those of the data, is left out where it is empty.
    """
    # without pyplot, which would choose a window system and keep the figure
    from matplotlib.figure import Figure

    columns = [*names, "another class"]
    if not confusion[:, -1].any():
        confusion, columns = confusion[:, :-1], columns[:-1]
    fractions = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    is_named = len(names) <= MAX_TICKS
    side = 3.2 + (0.34 * len(names) if is_named else 6.0)
    figure = Figure(figsize=(side + 1.0, side), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(fractions, cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest", aspect="auto")
    if is_named:
        axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=9)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        for row, column in np.argwhere(confusion):
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, confusion[row, column], ha="center", va="center", color=color, fontsize=8)
    numbered = "" if is_named else ", numbered as the rows of classes.csv"
    axes.set_xlabel(f"predicted class{numbered}")
    axes.set_ylabel(f"true class{numbered}")
    figure.colorbar(picture, label="fraction of the images of the true class", shrink=0.7)
    figure.savefig(path, dpi=110)


def most_confident_mistakes(
    source: Source,
    details: Mapping[str, np.ndarray],
    names: Sequence[str],
    count: int = NUM_MISTAKES,
) -> list[Mistake]:
    """Return the wrong predictions of highest probability; `names` are those of the classifier's classes."""
    wrong = np.flatnonzero(details["labels"] != details["predicted"])
    order = wrong[np.argsort(-details["confidence"][wrong], kind="stable")][:count]
    return [
        _mistake(
            source,
            details["example_ids"][row],
            names[details["labels"][row]],
            names[details["predicted"][row]],
            details["confidence"][row],
        )
        for row in order
    ]


def most_probable_absent(source: Source, details: Mapping[str, np.ndarray], count: int = NUM_MISTAKES) -> list[Mistake]:
    """Return the images and classes of highest probability where the image has not the class, of a multi-label set."""
    logits = np.where(details["labels"] > 0, -np.inf, details["logits"])
    order = np.argsort(-logits, axis=None, kind="stable")[:count]
    mistakes = []
    for row, label in zip(*np.unravel_index(order, logits.shape), strict=True):
        true = ", ".join(source.class_names[number] for number in np.flatnonzero(details["labels"][row]))
        probability = 1 / (1 + np.exp(-logits[row, label]))
        if probability >= THRESHOLD:
            name = source.class_names[label]
            mistakes.append(_mistake(source, details["example_ids"][row], true or "none", name, probability))
    return mistakes


def _mistake(source: Source, example_id: int, true: str, predicted: str, probability: float) -> Mistake:
    path_of = getattr(source, "path_of", None)
    where = str(path_of(example_id)) if path_of else f"{source.name} split {source.split}, example {example_id}"
    return Mistake(int(example_id), where, true, predicted, float(probability))


def draw_mistakes(source: Source, mistakes: Sequence[Mistake], path: Path) -> None:
    """Write a contact sheet of images that were predicted wrongly, each over its true and its predicted class."""
    num_rows = -(-len(mistakes) // _IN_ROW)
    sheet = Image.new("RGB", (min(len(mistakes), _IN_ROW) * TILE, num_rows * (TILE + _CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for number, mistake in enumerate(mistakes):
        left, top = number % _IN_ROW * TILE, number // _IN_ROW * (TILE + _CAPTION)
        image, _ = readable_image(source[mistake.example_id], TILE)
        sheet.paste(Image.fromarray(center_crop(image, TILE - 8, 1.0)), (left + 4, top + 4))
        lines = [
            (f"true: {mistake.true}", "black"),
            (f"{mistake.probability:.0%}: {mistake.predicted}", (190, 30, 30)),
        ]
        for place, (text, color) in enumerate(lines):
            draw.text((left + 6, top + TILE - 2 + 18 * place), fitted(text, font, TILE - 12), fill=color, font=font)
    sheet.save(path)


def class_rows(
    names: Sequence[str],
    numbers: Sequence[int],
    confusion: Int[np.ndarray, "k k_and_other"],
    accuracies: Float[np.ndarray, "k"],
) -> list[Sequence]:
    """Return the rows of a CSV of classes: name, number in the weights, images and accuracy."""
    totals = confusion.sum(axis=1)
    return [
        ("class", "number", "images", "accuracy"),
        *(
            (name, int(number), int(total), "" if np.isnan(accuracy) else float(accuracy))
            for name, number, total, accuracy in zip(names, numbers, totals, accuracies, strict=True)
        ),
    ]
