"""Predict the classes of images: beitv2 predict WEIGHTS IMAGES [--out=FILE].

Classifiers give the most probable classes of each image, as JSON lines or CSV; segmentation networks give the class of
every pixel, as PNG files.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beitv2_jax.choices import NORMALIZATIONS
from beitv2_jax.command_line import Parser, report_errors
from beitv2_jax.data.decode import CorruptImageError, decode_image
from beitv2_jax.data.sources.folders import list_images
from beitv2_jax.errors import UserError, print_error
from beitv2_jax.runtime.atomic_files import write_text
from beitv2_jax.training.writer import Progress

_EXAMPLES = """\
examples:
  # the five most probable classes of every image below a folder
  beitv2 predict runs/finetune photos --out=classes.csv
  # the class of every pixel: NAME.png with class numbers, NAME.overlay.png to look at
  beitv2 predict runs/segment photos --out=maps
"""


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Predict what `argv` asks for."""
    options = _parser().parse_args(argv)
    files = _files(Path(options.images))
    _check_out(options.out)
    # imported here: a mistake in an argument is reported before jax is loaded
    from beitv2_jax import api

    network = api.load(options.weights, image_size=options.image_size, normalization=options.normalization)
    if isinstance(network, api.Segmenter):
        _segment(network, files, options)
    elif isinstance(network, api.Classifier):
        _classify(network, files, options)
    else:
        raise UserError(
            f"{options.weights} holds weights of kind {network.weights.kind!r}, which predict no classes.",
            "Did you mean the run of finetune or segment that was started from them?",
            "Pass the path of a classifier or of a segmentation network.",
        )


def _classify(network, files: list[Path], options) -> None:
    from beitv2_jax.api import BATCH_SIZE

    lines, bad, progress = [], 0, Progress(len(files), "predict", "images", enabled=bool(options.out))
    for chunk in _chunks(files, BATCH_SIZE):
        images = {path: image for path in chunk if (image := _decoded(path)) is not None}
        predicted = iter(network.predict(list(images.values()), options.top) if images else [])
        for path in chunk:
            classes = [prediction._asdict() for prediction in next(predicted)] if path in images else None
            lines.append({"file": str(path), "classes": classes})
        bad += len(chunk) - len(images)
        progress.advance(len(chunk))
        progress.show({})
    progress.close()
    text = _as_csv(lines, options.top) if options.out.endswith(".csv") else "".join(json.dumps(x) + "\n" for x in lines)
    if options.out:
        write_text(options.out, text)
    else:
        sys.stdout.write(text)
    _report(len(files), bad)


def _as_csv(lines: list[dict[str, Any]], top: int) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["file", *(f"{part}_{place}" for place in range(1, top + 1) for part in ("class", "probability"))])
    for line in lines:
        classes = line["classes"] or []
        writer.writerow([line["file"], *(value for found in classes for value in found.values())])
    return buffer.getvalue()


def _segment(network, files: list[Path], options) -> None:
    from beitv2_jax.report.segmentation import class_colors

    if not options.out:
        raise UserError(
            "The option --out is missing.",
            "A segmentation network writes one picture for each image.",
            "Write --out=FOLDER with a folder that does not exist yet.",
        )
    folder, colors, bad = Path(options.out), class_colors(), 0
    folder.mkdir(parents=True)
    progress = Progress(len(files), "predict", "images")
    for number, path in enumerate(files):
        image = _decoded(path)
        bad += image is None
        if image is not None:
            (label_map,) = network.predict(image)
            name = f"{number:06d}_{path.stem}"
            Image.fromarray(label_map).save(folder / f"{name}.png")
            blended = (image.astype(np.uint16) + colors[label_map]) // 2
            Image.fromarray(blended.astype(np.uint8)).save(folder / f"{name}.overlay.png")
        progress.advance()
        if (number + 1) % 10 == 0:
            progress.show({})
    progress.close()
    _report(len(files), bad)


def _files(images: Path) -> list[Path]:
    if images.is_file():
        return [images]
    listing = list_images(images)
    if not listing.images:
        raise UserError(
            f"There are no images in {images}." if images.is_dir() else f"There is no file or folder {images}.",
            "Did you mistype the path?",
            "Pass the path of an image, or of a folder with images in it.",
        )
    return [images / name for name in listing.images]


def _check_out(out: str) -> None:
    if out and Path(out).exists():
        raise UserError(
            f"{out} exists already.",
            "Did you predict these images before?",
            "Write another --out, or delete the old one.",
        )
    if out and not Path(out).absolute().parent.is_dir():
        raise UserError(
            f"The folder {Path(out).absolute().parent} does not exist.",
            "Did you mistype the path?",
            "Write --out in a folder that exists.",
        )


def _decoded(path: Path) -> np.ndarray | None:
    try:
        return decode_image(path.read_bytes(), str(path))
    except (CorruptImageError, OSError) as error:
        print_error(f"{path} cannot be read: {getattr(error, 'cause', error)}")
        return None


def _chunks(files: list[Path], size: int) -> Iterator[list[Path]]:
    yield from (files[start : start + size] for start in range(0, len(files), size))


def _report(count: int, bad: int) -> None:
    if bad:
        print_error(f"{bad} of {count} images cannot be read; they have no prediction.")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="beitv2 predict", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("weights", metavar="WEIGHTS", help="run directory, weights file or Hugging Face folder")
    parser.add_argument("images", metavar="IMAGES", help="image, or folder that is searched for images at any depth")
    parser.add_argument(
        "--out", default="", help=".csv or .jsonl file; for segmentation a folder (default: JSON lines on the terminal)"
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes of each image (default: 5)")
    parser.add_argument("--image_size", type=int, metavar="PIXELS", help="resize positions to this image size")
    parser.add_argument(
        "--normalization", choices=NORMALIZATIONS, help="of the input, for weights that do not state it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
