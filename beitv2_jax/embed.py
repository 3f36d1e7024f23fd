"""Write the features of images to a file: beitv2 embed WEIGHTS DATA --out=features.npz.

The file holds one array for each kind of token, and `labels` (-1 where there are none), `example_ids`, `readable` and,
for a folder, `files`, with one entry for each image, and `class_names`, those of the labels.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from beitv2_jax.choices import NORMALIZATIONS
from beitv2_jax.command_line import Parser, report_errors
from beitv2_jax.data.augment import eval_crop_fraction
from beitv2_jax.data.pipeline import eval_batches
from beitv2_jax.data.sources import open_source
from beitv2_jax.errors import UserError, print_error
from beitv2_jax.runtime.atomic_files import replacing
from beitv2_jax.training.writer import Progress

TOKENS = ("cls", "mean", "patches")
_EXAMPLES = """\
examples:
  # [CLS] and the mean patch token of every image in class folders
  beitv2 embed runs/mim folder:photos --split=train --out=features.npz
  # all patch tokens after block 9
  beitv2 embed runs/mim tfds:imagenette --split=validation --tokens=patches --layer=9 --out=patches.npz
"""


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Write the features that `argv` asks for."""
    options = _parser().parse_args(argv)
    wanted = options.tokens.split(",")
    if unknown := [name for name in wanted if name not in TOKENS]:
        raise UserError(
            f"There are no tokens {unknown[0]!r}.",
            "Did you separate the names by commas?",
            f"Write --tokens=NAMES with some of {','.join(TOKENS)}.",
        )
    if not options.out.endswith(".npz") or not Path(options.out).absolute().parent.is_dir():
        raise UserError(
            f"--out={options.out} is not an .npz file in a folder that exists.",
            "Did you mistype the path?",
            "Write --out=FOLDER/features.npz.",
        )
    source = open_source(options.data, options.split, options.data_dir, options.train_split)
    # imported here: a mistake in an argument is reported before jax is loaded
    from beitv2_jax import api

    backbone = api.load_backbone(options.weights, image_size=options.image_size, normalization=options.normalization)
    layer = options.layer or backbone.depth
    batches = eval_batches(
        source,
        image_size=backbone.image_size,
        batch_size=api.BATCH_SIZE,
        crop_fraction=eval_crop_fraction(backbone.image_size),
        num_threads=os.cpu_count() or 1,
    )
    found: dict[str, list[np.ndarray]] = {}
    progress = Progress(len(source), "embed", "images")
    for batch in batches:
        rows = min(len(source) - progress.done, len(batch["weight"]))
        tokens = backbone.tokens(batch["images"], layer)[:rows]
        patches = tokens[:, backbone.num_prefix_tokens :]
        parts = {"cls": tokens[:, 0], "mean": patches.mean(axis=1), "patches": patches}
        arrays = {name: parts[name] for name in wanted} | {
            "labels": batch["labels"][:rows],
            "example_ids": batch["example_ids"][:rows],
            "readable": batch["weight"][:rows] > 0,
        }
        for name, array in arrays.items():
            found.setdefault(name, []).append(array)
        progress.advance(rows)
        progress.show({})
    progress.close()
    joined = {name: np.concatenate(arrays) for name, arrays in found.items()}
    joined["class_names"] = np.array(source.class_names, str)
    if path_of := getattr(source, "path_of", None):
        joined["files"] = np.array([str(path_of(i)) for i in range(len(source))])
    with replacing(options.out, "wb") as file:
        np.savez(file, **joined)
    if bad := int((~joined["readable"]).sum()):
        print_error(f"{bad} of {len(source)} images cannot be read; `readable` is False for them.")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="beitv2 embed", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("weights", metavar="WEIGHTS", help="run directory, weights file or Hugging Face folder")
    parser.add_argument("data", metavar="DATA", help="folder:PATH, tfds:NAME, arrayrecord:GLOB or embedded")
    parser.add_argument("--out", required=True, help=".npz file to write")
    parser.add_argument("--split", default="train", help="of the data (default: train)")
    parser.add_argument(
        "--train_split", default="train", help="of a folder: the split whose classes number the labels (default: train)"
    )
    parser.add_argument("--data_dir", default="", help="directory of prepared TFDS sets")
    parser.add_argument("--tokens", default="cls,mean", help=f"some of {','.join(TOKENS)} (default: cls,mean)")
    parser.add_argument("--layer", type=int, default=0, metavar="N", help="block, from 1 (default: the last one)")
    parser.add_argument("--image_size", type=int, metavar="PIXELS", help="resize positions to this image size")
    parser.add_argument(
        "--normalization", choices=NORMALIZATIONS, help="of the input, for weights that do not state it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
