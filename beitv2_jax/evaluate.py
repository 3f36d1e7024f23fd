"""Evaluate trained weights on a data set: beitv2 evaluate WEIGHTS DATA [--out=DIR].

What is measured follows from the weights: accuracies of a classifier, or average precision where images have several
classes, reconstruction and codes of a tokenizer, accuracy on hidden patches of a masked model, IoU of a segmentation
network. The metrics are printed as a table; --out also writes them as JSON, with CSV files and pictures.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.choices import NORMALIZATIONS
from beitv2_jax.command_line import Parser, add_input_options, check_out, positive, report_errors
from beitv2_jax.errors import UserError, listed, print_error
from beitv2_jax.runtime import launch
from beitv2_jax.runtime.atomic_files import json_text, write_json
from beitv2_jax.runtime.buckets import absolute

MAX_LINES = 40
"""Classes up to which the IoU of each is printed."""
_EXAMPLES = """\
examples:
  # a fine-tuned run on its validation split, with confusion matrix and mistakes in a folder
  beitv2 evaluate runs/finetune folder:photos --out=runs/finetune_evaluation
  # a released classifier on ImageNet
  beitv2 evaluate beitv2_base_patch16_224_pt1k_ft1k.pth tfds:imagenet2012
  # a ViT of timm, prepared as it was trained
  beitv2 evaluate vit_tiny.safetensors folder:photos --normalization=half --crop_fraction=0.9
  # a tokenizer against its teacher, and a masked model on the codes of its tokenizer
  beitv2 evaluate tokenizer.pth folder:photos --teacher=clip.safetensors
  beitv2 evaluate beitv2_base_patch16_224_pt1k.pth folder:photos --tokenizer=tokenizer.pth
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate what `argv` asks for."""
    return launch.ended(_main(argv))


class _Evaluated(NamedTuple):
    """What there is to show and to write of an evaluation.

    Attributes:
        result: the metrics, an `evaluate.Result`.
        source: the data.
        lines: what is said before the table.
        write: writes CSV files and pictures into a folder.
        extra: further entries of metrics.json.
        num_among: classes of the data, where the weights have more.
    """

    result: Any
    source: Any
    lines: Sequence[str] = ()
    write: Callable[[Path], None] = lambda folder: None
    extra: Mapping[str, Any] = MappingProxyType({})
    num_among: int = 0


@report_errors
def _main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    _check(options)
    launch.start_jax(None, "")
    # imported here: a mistake in an argument is reported before jax is loaded
    import jax

    from beitv2_jax import api
    from beitv2_jax.convert.published import recognise
    from beitv2_jax.report.evaluation import metrics_table

    network = api.load(options.weights, image_size=options.image_size, normalization=options.normalization)
    kinds = {"classifier": _classifier, "mim": _masked_model, "regressor": _regressor, "segmenter": _segmenter}
    found = kinds.get(network.weights.kind, _tokenizer)(network, options)
    if jax.process_index() != 0:
        return
    published = recognise(options.weights, network.weights.kind)
    result, source = found.result, found.source
    for record in result.bad_records[:10]:
        print_error(f"{record['where']} cannot be read: {record['cause']}")
    if source.left_out:
        first = source.left_out[0]
        print_error(f"{len(source.left_out)} files are left out, such as {first.where}: {first.cause}")
    if bad := len(result.bad_records):
        print_error(f"{bad} of {len(source)} images cannot be read; no metric has them.")
    print(f"{options.weights} on {result.num_examples} images, split {source.split} of {source.name}")
    for line in found.lines:
        print(line)
    print(metrics_table(result.metrics, published and published.metrics, found.num_among))
    if published:
        print(f"published: {published.name} on {published.on}")
    if options.out:
        _write(Path(options.out), network, options, found, published)
        print(f"written to {options.out}")


def _classifier(network, options) -> _Evaluated:
    from beitv2_jax.data.sources import LabelledSource, open_source
    from beitv2_jax.data.sources.label_sets import is_multi_label
    from beitv2_jax.evaluation.classes import match_classes, read_class_names
    from beitv2_jax.report import evaluation as report
    from beitv2_jax.runners import evaluate

    source = open_source(options.data, options.split, options.data_dir, options.train_split)
    if not source.class_names:
        raise UserError(
            f"{source.name} has no classes.",
            "Did you mean a data set with labels, or the folder above this one?",
            "Write folder:PATH with one folder for each class, or tfds:NAME of a labelled data set.",
        )
    names = network.class_names
    if options.classes:
        names = read_class_names(options.classes, len(names))
    classes = match_classes(names, source.class_names)
    source = LabelledSource(source)
    if is_multi_label(source):
        return _multi_label(network, options, source, classes)
    if network.multi_label:
        raise UserError(
            f"An image may have several of the classes of {options.weights}, and those of {source.name} have one each.",
            "Did you mean the data set that the weights were trained on?",
            "Write the DATA with several classes an image, such as folder:PATH with a labels.csv in every split.",
        )
    if options.out:
        report.require_matplotlib()
    result = evaluate.evaluate_classifier(
        network.weights, source, classes, _passing(options, 64), crop_fraction=_crop_fraction(network, options)
    )
    data_names, details = source.class_names, result.details

    def write(folder: Path) -> None:
        confusion, accuracies = details["confusion"], details["class_accuracy"]
        report.write_csv(folder / "classes.csv", report.class_rows(data_names, classes.numbers, confusion, accuracies))
        header = ("true \\ predicted", *data_names, "another class")
        rows = [(name, *counts) for name, counts in zip(data_names, confusion.tolist(), strict=True)]
        report.write_csv(folder / "confusion.csv", [header, *rows])
        report.draw_confusion(confusion, data_names, folder / "confusion.png")
        mistakes = report.most_confident_mistakes(source, details, classes.names)
        report.write_csv(folder / "mistakes.csv", [report.Mistake._fields, *mistakes])
        if mistakes:
            report.draw_mistakes(source, mistakes, folder / "mistakes.png")

    accuracy = dict(zip(data_names, details["class_accuracy"].tolist(), strict=True))
    lines = [f"classes: {classes.stated}"]
    extra = {"classes": classes.stated, "class_accuracy": accuracy}
    return _Evaluated(result, source, lines, write, extra, num_among=len(data_names))


def _multi_label(network, options, source, classes) -> _Evaluated:
    from beitv2_jax.report import evaluation as report
    from beitv2_jax.runners import evaluate

    result = evaluate.evaluate_multi_label(
        network.weights, source, classes, _passing(options, 64), crop_fraction=_crop_fraction(network, options)
    )
    names, details = source.class_names, result.details

    def write(folder: Path) -> None:
        columns = ("positives", "average_precision", "precision", "recall", "f1")
        values = zip(*(details[name].tolist() for name in columns), strict=True)
        rows = [
            (name, int(number), *("" if np.isnan(value) else value for value in of_class))
            for name, number, of_class in zip(names, classes.numbers, values, strict=True)
        ]
        report.write_csv(folder / "classes.csv", [("class", "number", *columns), *rows])
        mistakes = report.most_probable_absent(source, details)
        report.write_csv(folder / "mistakes.csv", [report.Mistake._fields, *mistakes])
        if mistakes:
            report.draw_mistakes(source, mistakes, folder / "mistakes.png")

    lines = [f"classes: {classes.stated}"]
    if not network.multi_label:
        lines.append("the weights do not say that an image may have several classes; each logit is taken by itself")
    if empty := [name for name, count in zip(names, details["positives"], strict=True) if not count]:
        counted = len(names) - len(empty)
        lines.append(f"the means are over {counted} of {len(names)} classes; no image has: {listed(empty)}")
    average_precision = dict(zip(names, details["average_precision"].tolist(), strict=True))
    return _Evaluated(result, source, lines, write, {"classes": classes.stated, "average_precision": average_precision})


def _collapse(metrics: dict[str, float], codebook_size: int, quantizer: str) -> list[str]:
    """Return a line on a codebook of which few codes are in use, with what to write; none for any other."""
    from beitv2_jax.models.quantizer import collapse_of
    from beitv2_jax.tasks.vqkd import codebook_of, fitting_codebook_size

    if not (collapse := collapse_of(metrics, codebook_size)):
        return []
    fitting = fitting_codebook_size(metrics)
    smaller = f"{codebook_of(quantizer, fitting)}, or with " if fitting < codebook_size else ""
    return [
        f"a codebook of which little is in use: {collapse} On data like these train a tokenizer with {smaller}"
        "--config=configs/vqkd.py:own_data."
    ]


def _tokenizer(network, options) -> _Evaluated:
    from beitv2_jax.data.segmentation.sources import open_with_label_maps
    from beitv2_jax.runners import evaluate

    source, label_maps = open_with_label_maps(options.data, options.split, options.data_dir, options.train_split)
    if options.compare_pixels:
        _check_number_of_patches(network, source)
    passing = _passing(options, 64, network)
    teacher, lines = _teacher(network, options, passing.dtype)
    result = evaluate.evaluate_tokenizer(
        network.weights,
        source,
        teacher,
        passing,
        crop_fraction=_crop_fraction(network, options),
        label_maps=label_maps,
        compare_pixels=options.compare_pixels,
    )
    counts = result.details["counts"].astype(np.int64)
    lines += _collapse(result.metrics, len(counts), network.weights.arguments.get("quantizer", "ema"))

    def write(folder: Path) -> None:
        from beitv2_jax.report.evaluation import write_csv

        write_csv(folder / "codes.csv", [("code", "patches"), *enumerate(counts.tolist())])

    return _Evaluated(result, source, lines, write)


def _check_number_of_patches(network, source) -> None:
    arguments = network.weights.arguments
    patches = (network.image_size // arguments.get("encoder", arguments)["patch_size"]) ** 2
    if len(source) * patches < arguments["codebook_size"]:
        raise UserError(
            f"The {len(source)} images have {patches} patches each, fewer than the {arguments['codebook_size']} codes, "
            "and --compare_pixels makes as many clusters of their pixels.",
            "Did you mean a larger split?",
            "Write --split=NAME of one with more images, or leave out --compare_pixels.",
        )


def _teacher(network, options, dtype: str):
    """Return the teacher of a tokenizer, or None, and the line that says which one it is."""
    from beitv2_jax.convert.files import located
    from beitv2_jax.convert.teachers.load import load_teacher
    from beitv2_jax.tasks.targets import TEACHER_CHOICES

    if network.weights.kind == "cluster":
        own = network.weights.arguments["teacher"]["name"]
        if options.teacher:
            raise UserError(
                f"The tokenizer {options.weights} has its own teacher, {own}.",
                "Did you mean another tokenizer?",
                "Leave out --teacher.",
            )
        return None, [f"teacher: {own}"]
    settings = _teacher_of_run(options.weights)
    if options.teacher:
        settings = {"weights": options.teacher, "normalization": options.teacher_normalization or ""}
    if not settings.get("weights") or not located(settings["weights"]).exists():
        if options.teacher:
            raise UserError(
                f"There are no teacher weights at {options.teacher}.",
                "Did you mistype the path?",
                "Write --teacher=PATH of a run or of the weights of a published network.",
            )
        return None, ["no reconstruction loss: it needs the teacher, --teacher=PATH"]
    image_size = network.weights.arguments["image_size"]
    grid = (image_size // network.weights.arguments["encoder"]["patch_size"],) * 2
    chosen = {name: value for name, value in settings.items() if name in ("weights", "state_dict", *TEACHER_CHOICES)}
    teacher, params = load_teacher(**chosen, image_size=image_size, grid=grid, dtype=dtype)
    if teacher.width != network.weights.arguments["teacher_width"]:
        raise UserError(
            f"The teacher {teacher.name} has features of {teacher.width} numbers, and the tokenizer reconstructs "
            f"{network.weights.arguments['teacher_width']}.",
            "Was the tokenizer trained with another teacher?",
            "Write --teacher=PATH with the teacher of the tokenizer.",
        )
    return (teacher, params), [f"teacher: {teacher.name}"]


def _teacher_of_run(path: str) -> dict[str, Any]:
    """Return the section `teacher` of a vqkd run, or of the run that stored its features; {} where there is none."""
    config = _run_config(path)
    section = config.get("teacher", {})
    return _teacher_of_run(section["features"]) if section.get("features") else section


def _regressor(network, options) -> _Evaluated:
    raise UserError(
        f"{options.weights} is a run of the stage 'regress', whose loss on the evaluation split is in its own report.",
        "Did you mean to ask what its features know of the classes?",
        f"Run beitv2 train --config=configs/probe.py --workdir=DIR --config.backbone.run={options.weights}.",
    )


def _masked_model(network, options) -> _Evaluated:
    from beitv2_jax.convert.files import located
    from beitv2_jax.convert.weights import TOKENIZER_STAGES, read
    from beitv2_jax.data.sources import open_source
    from beitv2_jax.runners import evaluate
    from beitv2_jax.sizes import MASKED_FRACTION

    config = _run_config(options.weights)
    section = config.get("tokenizer", {})
    path = options.tokenizer or section.get("run")
    if not path and section.get("codes"):
        path = _run_config(section["codes"]).get("tokenizer", {}).get("run")
    if not path or not located(path).exists():
        raise UserError(
            f"There is no tokenizer at {path}." if path else f"{options.weights} does not say which tokenizer it has.",
            "A masked model is evaluated on the codes that its tokenizer gives the hidden patches.",
            "Write --tokenizer=PATH of a vqkd run or of a released tokenizer.",
        )
    arguments = network.weights.arguments
    tokenizer = read(path, image_size=config.get("views", {}).get("tokenizer_image_size") or None)
    if tokenizer.kind not in TOKENIZER_STAGES:
        raise UserError(
            f"{path} holds weights of kind {tokenizer.kind!r}, which are no tokenizer.",
            "Did you mean the path of another run or file?",
            "Write --tokenizer=PATH of a run of stage vqkd or cluster, or of a released tokenizer.",
        )
    source = open_source(options.data, options.split, options.data_dir, options.train_split)
    masking = config.get("masking", {})
    num_patches = (arguments["image_size"] // arguments["patch_size"]) ** 2
    num_masked = masking.get("num_masked", max(1, round(MASKED_FRACTION * num_patches)))
    result = evaluate.evaluate_masked_model(
        network.weights,
        source,
        tokenizer,
        evaluate.Masking(
            num_masked=num_masked,
            min_patches=masking.get("min_patches", min(16, num_masked)),
            max_patches=masking.get("max_patches", 0) or None,
            seed=config.get("seed", 0),
        ),
        _passing(options, 64, network),
        crop_fraction=_crop_fraction(network, options),
    )
    return _Evaluated(result, source, [f"tokenizer: {path}; {num_masked} of {num_patches} patches are hidden"])


def _segmenter(network, options) -> _Evaluated:
    from beitv2_jax.data.segmentation.label_maps import LabelIds
    from beitv2_jax.data.segmentation.sources import open_label_maps
    from beitv2_jax.evaluation.classes import read_class_names
    from beitv2_jax.report import evaluation as report
    from beitv2_jax.report.segmentation import draw_segmentations
    from beitv2_jax.runners import evaluate
    from beitv2_jax.tasks.segment import class_counts, iou_of_classes

    num_classes = network.weights.arguments["num_classes"]
    names = network.class_names
    if names == tuple(map(str, range(num_classes))):
        names = tuple(f"class {number}" for number in range(num_classes))
    if options.classes:
        names = read_class_names(options.classes, num_classes)
    source = open_label_maps(options.data, options.split, options.data_dir)
    published = {"offset": 1, "ignored": (0, 255)}  # of ADE20K, which the released networks are for
    ids = LabelIds(num_classes, **_run_config(options.weights).get("labels", published))
    result, rows, predict = evaluate.evaluate_segmenter(
        network.weights, source, ids, network.sliding, _passing(options, 8, network)
    )
    iou, (hits, true, predicted) = iou_of_classes(result.metrics), class_counts(result.details["confusion"])
    summary = {name: value for name, value in result.metrics.items() if not name.startswith("iou/")}

    def write(folder: Path) -> None:
        counts = zip(names, hits.tolist(), true.tolist(), predicted.tolist(), strict=True)
        lines = [
            (number, name, iou.get(number, ""), hit / there if there else "", int(there), int(said))
            for number, (name, hit, there, said) in enumerate(counts)
        ]
        header = ("number", "class", "iou", "accuracy", "pixels", "predicted_pixels")
        report.write_csv(folder / "classes.csv", [header, *lines])
        draw_segmentations(rows, predict, os.fspath(folder / "segmentation.png"), iou=iou, names=names)

    extra = {"class_iou": {names[number]: value for number, value in iou.items()}}
    lines = [f"{names[number]}: IoU {value:.1%}" for number, value in iou.items()]
    if len(lines) > MAX_LINES:
        lines = [f"IoU of {len(lines)} classes: in classes.csv of --out"]
    return _Evaluated(result._replace(metrics=summary), source, lines, write, extra)


def _run_config(path: str) -> dict[str, Any]:
    """Return the config of a run with its paths resolved; {} for other weights."""
    from beitv2_jax.convert.files import read_config
    from beitv2_jax.convert.runs import is_run

    if not path or not is_run(path):
        return {}
    config = config_lib.from_json(read_config(path))
    return config_lib.resolve(config, os.path.dirname(absolute(path))).to_dict()


def _passing(options, batch_size: int, network=None):
    from beitv2_jax.runners.evaluate import Passing

    of_run = _run_config(options.weights).get("efficiency", {}).get("dtype", "float32")
    return Passing(
        batch_size=options.batch_size or batch_size,
        max_bad_fraction=options.max_bad_fraction,
        dtype=options.dtype or of_run,
    )


def _crop_fraction(network, options) -> float:
    return options.crop_fraction or network.weights.crop_fraction


def _write(out: Path, network, options, found: _Evaluated, published) -> None:
    """Write the folder `out`, which appears when all of it is written."""
    result, source, weights = found.result, found.source, network.weights
    unfinished = out.absolute().with_name(f".unfinished-{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        report = {
            "weights": options.weights,
            "kind": weights.kind,
            "data": source.name,
            "split": source.split,
            "examples": result.num_examples,
            "unreadable": len(result.bad_records),
            "image_size": network.image_size,
            "normalization": weights.normalization,
            "metrics": result.metrics,
            **found.extra,
        }
        if published:
            report["published"] = published._asdict()
        write_json(unfinished / "metrics.json", report)
        left_out = [{"split": source.split, "example_id": None, **entry._asdict()} for entry in source.left_out]
        if records := [*left_out, *result.bad_records]:
            (unfinished / "bad_records.jsonl").write_text("".join(json_text(record) + "\n" for record in records))
        found.write(unfinished)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check(options) -> None:
    check_out(options.out, "Did you evaluate these weights before?")
    if not 0 <= options.crop_fraction <= 1 or not 0 <= options.max_bad_fraction <= 1:
        raise UserError(
            "One of the options --crop_fraction and --max_bad_fraction is out of range.",
            "Did you write a percentage?",
            "Write fractions between 0 and 1.",
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="beitv2 evaluate", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("weights", metavar="WEIGHTS", help="run directory, weights file, Hugging Face or timm folder")
    parser.add_argument("data", metavar="DATA", help="folder:PATH, tfds:NAME, arrayrecord:GLOB or embedded")
    parser.add_argument("--out", default="", metavar="DIR", help="new folder for metrics.json, CSV files and pictures")
    parser.add_argument("--split", default="validation", help="of the data (default: validation)")
    parser.add_argument(
        "--train_split", default="train", help="of a folder: the split whose classes number the labels (default: train)"
    )
    parser.add_argument("--data_dir", default="", help="directory of prepared TFDS sets")
    parser.add_argument(
        "--classes", default="", metavar="FILE", help="names of the classes of the weights, one a line in their order"
    )
    parser.add_argument("--teacher", default="", metavar="PATH", help="of a tokenizer (default: that of the run)")
    parser.add_argument("--teacher_normalization", choices=NORMALIZATIONS, help="of a --teacher that does not state it")
    parser.add_argument(
        "--compare_pixels", action="store_true", help="of a tokenizer: also cluster the pixels of the patches"
    )
    parser.add_argument("--tokenizer", default="", metavar="PATH", help="of a masked model (default: that of the run)")
    add_input_options(parser)
    parser.add_argument(
        "--crop_fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="of the shorter side that the central crop keeps (default: as the run or the folder of timm or Hugging "
        "Face states it; else 0.875, from 384 pixels on 1, as released)",
    )
    parser.add_argument("--batch_size", type=positive, metavar="N", help="images computed at once")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of matrix products (default: that of the run)"
    )
    parser.add_argument(
        "--max_bad_fraction", type=float, default=0.001, metavar="F", help="of unreadable images (default: 0.001)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
