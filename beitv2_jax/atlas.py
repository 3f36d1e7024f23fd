"""Write an atlas of a tokenizer's codes: beitv2 atlas TOKENIZER [TOKENIZER] DATA --out=DIR.

DIR/atlas.html shows every code with how often it is used, its nearest codes, the class it occurs with and patches of
different images, and every image with its codes; it is one file that needs no network. Two tokenizers are shown side by
side. PNG files beside it show the most used codes, rare ones, and the use of all.
"""

import argparse
import functools
import io
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from beitv2_jax.command_line import Parser, positive, report_errors
from beitv2_jax.data.augment import center_crop, eval_crop_fraction
from beitv2_jax.data.sources import Source, open_source
from beitv2_jax.data.transform import readable_image
from beitv2_jax.errors import UserError, print_error
from beitv2_jax.report import atlas as report
from beitv2_jax.report import codes
from beitv2_jax.training.writer import Progress

if TYPE_CHECKING:
    from beitv2_jax.api import Tokenizer

CHUNK = 64
"""Images that are prepared and computed at once."""
NUM_SAMPLES = 16
"""Images by which the size of the thumbnails is chosen."""
NUM_ROWS = 24
"""Codes in a picture of rows."""
PATCH_PIXELS = 28
"""Side of a patch in these pictures, before it is drawn with its context."""
QUALITY = 75
"""Of the thumbnails, which are WebP."""
_EXAMPLES = """\
examples:
  # up to 5,000 images of the validation split, evenly spread
  beitv2 atlas runs/vqkd folder:photos --out=atlas
  # two tokenizers side by side
  beitv2 atlas runs/vqkd tokenizer.pth folder:photos --out=atlas
"""


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Write the atlas that `argv` asks for."""
    options = _parser().parse_args(argv)
    _check(options)
    source = open_source(options.data, options.split, options.data_dir, options.train_split)
    # imported here: a mistake in an argument is reported before jax is loaded
    from beitv2_jax import api

    tokenizers = [api.load_tokenizer(path, image_size=options.image_size) for path in options.tokenizers]
    fractions = {eval_crop_fraction(tokenizer.image_size) for tokenizer in tokenizers}
    if len(fractions) > 1:
        sizes = [tokenizer.image_size for tokenizer in tokenizers]
        raise UserError(
            f"The tokenizers take images of {sizes[0]} and {sizes[1]} pixels, which are cropped differently.",
            "Did you mean to compare them on the same part of every image?",
            f"Write --image_size={min(sizes)}.",
        )
    out = options.out
    unfinished = out.with_name(f".unfinished-{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        _write(unfinished, tokenizers, options, source, fractions.pop())
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"written to {out}: open {out / 'atlas.html'} in a browser")


def _write(folder: Path, tokenizers: Sequence["Tokenizer"], options, source: Source, fraction: float) -> None:
    """Compute the code ids of the images, and write the page and the pictures into `folder`."""
    wanted = np.unique(np.linspace(0, len(source) - 1, options.max_images).astype(int)).tolist()
    code_ids: list[list[np.ndarray]] = [[] for _ in tokenizers]
    read, thumbnails = [], []
    progress = Progress(len(wanted), "atlas", "images")
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        side = _side(tokenizers, source, fraction, wanted, threads)
        for start in range(0, len(wanted), CHUNK):
            chunk = wanted[start : start + CHUNK]
            prepared = list(threads.map(lambda index: _prepared(source, index, side, fraction), chunk))
            for fault in (row.fault for row in prepared if row.fault):
                print_error(f"cannot be read: {fault}")
            readable = [row for row in prepared if not row.fault]
            for ids, tokenizer in zip(code_ids, tokenizers, strict=True):
                ids += list(tokenizer.encode([row.image for row in readable])) if readable else []
            read += [row.example for row in readable]
            thumbnails += [row.thumbnail for row in readable]
            progress.advance(len(chunk))
            progress.show({})
    progress.close()
    if not read:
        raise UserError(
            f"None of the {len(wanted)} images of {source.name} can be read.",
            "Are they damaged, or did you mean another folder or split?",
            "Write DATA and --split of a data set whose images can be read.",
        )
    of_tokenizers = [
        report.Codes(str(path), np.stack(ids), tokenizer.codebook)
        for path, ids, tokenizer in zip(options.tokenizers, code_ids, tokenizers, strict=True)
    ]
    indices = [example["example_id"] for example in read]
    # the page shows one class an image, or none
    labels = np.array([-1 if np.ndim(example["label"]) else example["label"] for example in read], np.int32)
    path_of = getattr(source, "path_of", "example {}".format)
    names = [os.path.basename(str(path_of(index))).encode("utf-8", "replace").decode() for index in indices]
    num_shown = report.write_page(
        folder / "atlas.html",
        of_tokenizers,
        report.Pictures(thumbnails, side, labels, names),
        class_names=source.class_names,
        data=f"{source.name}, split {source.split}",
        num_unreadable=len(wanted) - len(read),
    )
    for number, found in enumerate(of_tokenizers, 1):
        ending = f"_{number}" if len(of_tokenizers) > 1 else ""
        _draw(folder, ending, found, lambda row, size: _crop(source, indices[row], size, fraction))
    if bad := len(wanted) - len(read):
        print_error(f"{bad} of {len(wanted)} images cannot be read; they are left out.")
    if num_shown < len(read):
        print(f"the codes are counted on {len(read)} images, of which {num_shown} fit into the page")


def _draw(folder: Path, ending: str, found: report.Codes, crop: Callable[[int, int], np.ndarray]) -> None:
    """Draw rows of the most used and of rare codes, and the use of all."""
    code_ids, grid = found.code_ids.reshape(len(found.code_ids), -1), found.code_ids.shape[1:]
    counts = np.bincount(code_ids.ravel(), minlength=len(found.codebook))
    ordered = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist()
    size = max(grid) * PATCH_PIXELS
    number = min(NUM_ROWS, -(-len(ordered) // 2))
    for name, chosen in (("most_used", ordered[:number]), ("rare", ordered[::-1][:number])):
        path = os.fspath(folder / f"{name}{ending}.png")
        codes.draw_rows(code_ids, lambda row: crop(row, size), grid, chosen, path)
    report.draw_usage(counts, os.fspath(folder / f"usage{ending}.png"))


class _Prepared(NamedTuple):
    """An image, or why it cannot be read."""

    example: dict[str, Any]
    image: UInt8[np.ndarray, "H W 3"]
    thumbnail: bytes
    fault: str


def _prepared(source: Source, index: int, side: int, fraction: float) -> _Prepared:
    example = source[index]
    image, fault = readable_image(example, side)
    buffer = io.BytesIO()
    Image.fromarray(center_crop(image, side, fraction)).save(buffer, "WEBP", quality=QUALITY)
    return _Prepared(example, image, buffer.getvalue(), fault)


def _side(
    tokenizers: Sequence["Tokenizer"], source: Source, fraction: float, wanted: list[int], threads: ThreadPoolExecutor
) -> int:
    """Return the largest side of thumbnails with which, by some images, all of `wanted` fit into the page."""
    num_patches = sum(math.prod(tokenizer.grid) for tokenizer in tokenizers)
    num_codes = sum(len(tokenizer.codebook) for tokenizer in tokenizers)
    some = wanted[:: -(-len(wanted) // NUM_SAMPLES)]
    for side in report.SIDES:
        prepared = threads.map(functools.partial(_prepared, source, side=side, fraction=fraction), some)
        size = np.mean([len(row.thumbnail) for row in prepared])
        if report.estimated_bytes(len(wanted), size, num_patches, num_codes) < report.LIMIT_BYTES:
            return side
    return report.SIDES[-1]


def _crop(source: Source, index: int, size: int, fraction: float) -> np.ndarray:
    return center_crop(readable_image(source[index], size)[0], size, fraction)


def _check(options) -> None:
    if len(options.tokenizers) > 2:
        raise UserError(
            f"There are {len(options.tokenizers)} tokenizers and the data {options.data!r}.",
            "Did you mean an atlas of each? One page shows one or two tokenizers.",
            "Write beitv2 atlas TOKENIZER DATA or beitv2 atlas TOKENIZER TOKENIZER DATA.",
        )
    if not options.out.parent.is_dir() or options.out.exists():
        raise UserError(
            f"--out={options.out} is not the name of a new folder in one that exists.",
            "Did you give this command before, or mistype the path?",
            "Write --out in a folder that exists, with a name that is not taken.",
        )


def _folder(text: str) -> Path:
    return Path(text).absolute()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="beitv2 atlas", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("tokenizers", nargs="+", metavar="TOKENIZER", help="run directory or released tokenizer")
    parser.add_argument("data", metavar="DATA", help="folder:PATH, tfds:NAME, arrayrecord:GLOB or embedded")
    parser.add_argument(
        "--out", required=True, type=_folder, metavar="DIR", help="new folder for the page and pictures"
    )
    parser.add_argument("--split", default="validation", help="of the data (default: validation)")
    parser.add_argument(
        "--train_split", default="train", help="of a folder: the split whose classes number the labels (default: train)"
    )
    parser.add_argument("--data_dir", default="", help="directory of prepared TFDS sets")
    parser.add_argument("--image_size", type=int, metavar="PIXELS", help="resize positions to this image size")
    parser.add_argument(
        "--max_images", type=positive, default=5000, metavar="N", help="images, evenly spread (default: 5000)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
