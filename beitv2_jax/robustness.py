"""Measure a classifier of ImageNet-1k on its successors: beitv2 robustness WEIGHTS --imagenet_a=DATA ... [--out=FILE].

One row for each benchmark that is given, beside the published accuracies of the four released classifiers. DATA is
folder:PATH, as the benchmark is published, or the tfds:NAME of a prepared set.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from beitv2_jax.command_line import Parser, add_input_options, check_out, positive, report_errors
from beitv2_jax.errors import UserError
from beitv2_jax.runtime import launch
from beitv2_jax.runtime.atomic_files import write_json

_EXAMPLES = """\
examples:
  beitv2 robustness beitv2_base_patch16_224_pt1k_ft1k.pth --imagenet_a=folder:imagenet-a --imagenet_r=folder:imagenet-r
  beitv2 robustness runs/finetune --imagenet=folder:ILSVRC/val --imagenet_real=real.json --imagenet_c=folder:ImageNet-C
  beitv2 robustness runs/finetune --imagenet_v2=tfds:imagenet_v2 --imagenet_sketch=tfds:imagenet_sketch
"""
_HELP = {
    "imagenet": "its validation images: class folders named by WordNet ids, or tfds:imagenet2012",
    "imagenet_v2": "class folders named by numbers, or tfds:imagenet_v2",
    "imagenet_a": "class folders, or tfds:imagenet_a",
    "imagenet_r": "class folders, or tfds:imagenet_r",
    "imagenet_sketch": "class folders, or tfds:imagenet_sketch",
    "imagenet_c": "CORRUPTION/SEVERITY/CLASS folders, or tfds:imagenet2012_corrupted",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what `argv` asks for, and return the exit code."""
    return launch.ended(_main(argv))


@report_errors
def _main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    _check(options)
    launch.start_jax(None, "")
    # imported here: a mistake in an argument is reported before jax is loaded
    import jax

    from beitv2_jax import api
    from beitv2_jax.evaluation.classes import NUM_IMAGENET_CLASSES
    from beitv2_jax.runners import robustness
    from beitv2_jax.runners.evaluate import Passing

    network = api.load(options.weights, image_size=options.image_size, normalization=options.normalization)
    num_classes = network.weights.arguments.get("num_classes")
    if network.weights.kind != "classifier" or num_classes != NUM_IMAGENET_CLASSES:
        raise UserError(
            f"{options.weights} is no classifier of the 1000 classes of ImageNet-1k.",
            "Did you mean a fine-tuned run, or another file?",
            "Write the path of a classifier that was fine-tuned on ImageNet-1k.",
        )
    # all are opened before the first is gone over, which may take an hour
    sources = {
        name: robustness.open_benchmark(spec, options.data_dir)
        for name in _HELP
        if name != "imagenet_c" and (spec := getattr(options, name))
    }
    corruptions = robustness.open_corruptions(options.imagenet_c, options.data_dir) if options.imagenet_c else ()
    passing = Passing(batch_size=options.batch_size, max_bad_fraction=options.max_bad_fraction, dtype=options.dtype)
    crop_fraction = options.crop_fraction or network.weights.crop_fraction
    classifier = robustness.Classifier(network.weights, network.class_names, passing, crop_fraction)
    found = {}
    for name, source in sources.items():
        if name == "imagenet" and options.imagenet_real:
            real = robustness.evaluate_real(classifier, source, options.imagenet_real)
            found["imagenet"], found["imagenet_real"] = real
        else:
            found[name] = robustness.evaluate_images(classifier, source, masked=name in robustness.MASKED)
    if corruptions:
        found["imagenet_c"] = robustness.evaluate_corruptions(classifier, corruptions)
    if jax.process_index() != 0:
        return
    print(_table(found))
    if options.out:
        report = {name: {"value": one.value, "images": one.num_examples, **one.details} for name, one in found.items()}
        write_json(
            Path(options.out), {"weights": options.weights, "crop_fraction": crop_fraction, "benchmarks": report}
        )
        print(f"written to {options.out}")


def _table(found) -> str:
    from beitv2_jax.evaluation.robustness import PUBLISHED, TITLES
    from beitv2_jax.report.page import markdown_table

    rows = [("top-1 accuracy", "images", "measured", *PUBLISHED)]
    for number, (name, title) in enumerate(TITLES.items()):
        if name in found:
            is_error = name == "imagenet_c"
            figures = ["" if is_error else f"{published[number]:.2%}" for published in PUBLISHED.values()]
            label = f"{title}, mean corruption error" if is_error else title
            rows.append((label, f"{found[name].num_examples:,}", f"{found[name].value:.2%}", *figures))
    return markdown_table(rows)


def _check(options) -> None:
    if options.imagenet_real and not options.imagenet:
        raise UserError(
            "ImageNet-ReaL has labels alone; its images are the validation images of ImageNet.",
            "Did you forget where these are?",
            "Write --imagenet=folder:PATH with their class folders.",
        )
    if not any(getattr(options, name) for name in _HELP):
        raise UserError(
            "There is no benchmark to go over.",
            "Did you forget where the images are?",
            f"Write one or more of {', '.join(f'--{name}=folder:PATH' for name in _HELP)}.",
        )
    check_out(options.out, "Did you measure these weights before?")
    if not 0 <= options.crop_fraction <= 1 or not 0 <= options.max_bad_fraction <= 1:
        raise UserError(
            "One of the options --crop_fraction and --max_bad_fraction is out of range.",
            "Did you write a percentage?",
            "Write fractions between 0 and 1.",
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="beitv2 robustness", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("weights", metavar="WEIGHTS", help="classifier: run, weights file, Hugging Face or timm folder")
    for name, help_text in _HELP.items():
        parser.add_argument(f"--{name}", default="", metavar="DATA", help=help_text)
    parser.add_argument(
        "--imagenet_real", default="", metavar="FILE", help="real.json, labels for the --imagenet images"
    )
    parser.add_argument("--out", default="", metavar="FILE", help="new JSON file, with the errors of every corruption")
    parser.add_argument("--data_dir", default="", help="directory of prepared TFDS sets")
    add_input_options(parser)
    parser.add_argument(
        "--crop_fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="of the shorter side that the central crop keeps (default: as `beitv2 evaluate`; ImageNet-C: always 1)",
    )
    parser.add_argument("--batch_size", type=positive, default=64, metavar="N", help="images computed at once")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    parser.add_argument(
        "--max_bad_fraction", type=float, default=0.001, metavar="F", help="of unreadable images (default: 0.001)"
    )
    return parser
