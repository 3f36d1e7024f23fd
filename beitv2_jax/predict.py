"""Predict the classes of images: beitv2 predict WEIGHTS IMAGES [--out=FILE].

Classifiers give the most probable classes of each image, as JSON lines or CSV, multi-label ones every class that is
probable enough; segmentation networks give the class of every pixel, as PNG files. A command with --out that was killed
continues with the parts that it left beside it.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beitv2_jax.command_line import Parser, add_input_options, check_out, positive, probability, report_errors
from beitv2_jax.data.array_files import RecordError
from beitv2_jax.data.decode import CorruptImageError, decode_image
from beitv2_jax.data.sources.folders import digest_of_sizes, list_images
from beitv2_jax.data.sources.unreadable import file_bytes, unreadable
from beitv2_jax.data.transform import EvalRow, EvalTransform
from beitv2_jax.errors import UserError, print_error
from beitv2_jax.runtime.atomic_files import replacing
from beitv2_jax.training.writer import Progress

PART_ROWS = 256
"""Images of a part: what a kill may lose."""
_EXAMPLES = """\
examples:
  # the five most probable classes of every image below a folder
  beitv2 predict runs/finetune photos --out=classes.csv
  # every class of at least 30 %, with a classifier whose images may have several
  beitv2 predict runs/multi_label photos --threshold=0.3
  # the class of every pixel: NAME.png with class numbers, NAME.overlay.png to look at
  beitv2 predict runs/segment photos --out=maps
"""


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Predict what `argv` asks for."""
    options = _parser().parse_args(argv)
    files = _files(Path(options.images))
    check_out(options.out, "Did you predict these images before?")
    # imported here: a mistake in an argument is reported before jax is loaded
    from beitv2_jax import api
    from beitv2_jax.convert.runs import weights_hash

    network = api.load(options.weights, image_size=options.image_size, normalization=options.normalization)
    if not isinstance(network, api.Classifier | api.Segmenter):
        raise UserError(
            f"{options.weights} holds weights of kind {network.weights.kind!r}, which predict no classes.",
            "Did you mean the run of finetune or segment that was started from them?",
            "Pass the path of a classifier or of a segmentation network.",
        )
    is_segmenter = isinstance(network, api.Segmenter)
    if is_segmenter and not options.out:
        raise UserError(
            "The option --out is missing.",
            "A segmentation network writes one picture for each image.",
            "Write --out=FOLDER with a folder that does not exist yet.",
        )
    made_from = {
        "weights": weights_hash(network.weights.variables),
        "model": network.weights.arguments,
        "normalization": network.weights.normalization,
        "crop_fraction": network.weights.crop_fraction,
        "files": hashlib.sha256(os.fsencode("\0".join(map(str, files)))).hexdigest(),
        "sizes": digest_of_sizes(files),
        "top": options.top,
        "threshold": options.threshold,
    }
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(options.out or f"{temporary}/predictions.jsonl")
        predict = _segment if is_segmenter else _classify
        bad = predict(network, files, out, made_from, show=bool(options.out))
        if not options.out:
            sys.stdout.write(out.read_text())
    if bad:
        print_error(f"{bad} of {len(files)} images cannot be read; they have no prediction.")


def _classify(network, files: list[Path], out: Path, made_from: dict[str, Any], *, show: bool) -> int:
    """Write a file of predictions, and return how many images cannot be read."""
    from beitv2_jax.api import BATCH_SIZE
    from beitv2_jax.runners.parts import Parts

    top, threshold = made_from["top"], made_from["threshold"]

    def save(path: Path, part: dict[str, np.ndarray]) -> None:
        predictions = network.best(part["logits"], top, threshold)
        with replacing(path) as file:
            for number, weight, best in zip(part["example_ids"], part["weight"], predictions, strict=True):
                classes = [prediction._asdict() for prediction in best] if weight else None
                file.write(json.dumps({"file": str(files[number]), "classes": classes}) + "\n")

    made_from = made_from | {"classes": network.class_names, "multi_label": network.multi_label}
    parts = Parts(out, made_from, len(files), PART_ROWS, ".jsonl")
    parts.fill(
        EvalRow(_Files(files), EvalTransform(network.image_size, network.weights.crop_fraction)),
        lambda variables, batch: {"logits": network.logits_function(variables, batch["images"])},
        network.weights.variables,
        save,
        batch_size=BATCH_SIZE,
        num_threads=os.cpu_count() or 1,
        label="predict",
        show=show,
    )
    bad = 0
    with replacing(parts.joined) as file:
        writer = csv.writer(file, lineterminator="\n") if out.suffix == ".csv" else None
        if writer:
            most = top or max((len(json.loads(text)["classes"] or ()) for text in _lines(parts.paths)), default=0)
            ranks = range(1, most + 1)
            writer.writerow(["file", *(f"{part}_{rank}" for rank in ranks for part in ("class", "probability"))])
        for text in _lines(parts.paths):
            line = json.loads(text)
            bad += line["classes"] is None
            if writer:
                values = (value for prediction in line["classes"] or [] for value in prediction.values())
                writer.writerow([line["file"], *values])
            else:
                file.write(text)
    parts.finish()
    return bad


def _lines(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        with path.open() as file:
            yield from file


class _Files:
    """Image files as a source of data."""

    def __init__(self, files: list[Path]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> dict[str, Any]:
        where = str(self._files[number])
        try:
            image = file_bytes(self._files[number])
        except RecordError as error:
            return unreadable(number, where, error)
        return {"image": image, "label": -1, "example_id": number, "where": where}


def _segment(network, files: list[Path], out: Path, made_from: dict[str, Any], *, show: bool) -> int:
    """Write a folder of pictures, and return how many images cannot be read."""
    import jax

    from beitv2_jax.report.segmentation import class_colors
    from beitv2_jax.runners.parts import Parts

    names = [f"{number:06d}_{path.stem}" for number, path in enumerate(files)]
    made_from = made_from | {"sliding": dataclasses.asdict(network.sliding)}
    folder, colors, bad = Parts(out, made_from, len(files), 1, ".png").folder, class_colors(), 0
    folder.mkdir(exist_ok=True)
    missing = [number for number, name in enumerate(names) if not (folder / f"{name}.png").exists()]
    progress = Progress(len(files), "predict", "images", done=len(files) - len(missing), enabled=show)
    at_once = jax.local_device_count()
    for chunk in (missing[start : start + at_once] for start in range(0, len(missing), at_once)):
        images = {number: image for number in chunk if (image := _decoded(files[number])) is not None}
        bad += len(chunk) - len(images)
        label_maps = network.predict(list(images.values())) if images else []
        for (number, image), label_map in zip(images.items(), label_maps, strict=True):
            overlay = ((image.astype(np.uint16) + colors[label_map]) // 2).astype(np.uint8)
            # the map last: where it is, the image is done
            for ending, pixels in ((".overlay.png", overlay), (".png", label_map)):
                with replacing(folder / f"{names[number]}{ending}", "wb") as file:
                    Image.fromarray(pixels).save(file, "PNG")
        progress.advance(len(chunk))
        progress.show({})
    progress.close()
    folder.rename(out)
    return bad


def _decoded(path: Path) -> np.ndarray | None:
    try:
        return decode_image(file_bytes(path), str(path))
    except (CorruptImageError, RecordError) as error:
        print_error(f"cannot be read: {path}: {getattr(error, 'cause', error)}")
        return None


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


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="beitv2 predict", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="run directory, weights file, Hugging Face or timm folder, or hf:OWNER/NAME"
    )
    parser.add_argument("images", metavar="IMAGES", help="image, or folder that is searched for images at any depth")
    parser.add_argument(
        "--out", default="", help=".csv or .jsonl file; for segmentation a folder (default: JSON lines on the terminal)"
    )
    parser.add_argument(
        "--top",
        type=positive,
        metavar="N",
        help="most classes of each image (default: 5; of a multi-label classifier all)",
    )
    parser.add_argument(
        "--threshold",
        type=probability,
        metavar="P",
        help="smallest probability of a class (default: 0; of a multi-label classifier 0.5)",
    )
    add_input_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
