"""Prepare a data set once, for `data.sources` to open: python -m beitv2_jax.data.prepare imagenet2012 --archives=DIR.

TensorFlow is not needed. Large sets of many archives have their own command, `beitv2_jax.data.prepare.beam`.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from absl import logging

from beitv2_jax.command_line import report_errors
from beitv2_jax.config.paths import refuse_remote


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Prepare the data set that `argv` names."""
    options = _parser().parse_args(argv)
    logging.set_verbosity(logging.INFO)
    # imported here: a mistake in an argument is reported before TFDS is loaded
    from beitv2_jax.data.prepare import imagenet

    for name in ("archives", "data_dir"):
        refuse_remote(f"--{name}", vars(options)[name])
    directory = imagenet.prepare(options.archives, options.data_dir)
    print(f"{directory} is ready: --config.data.source=tfds:imagenet2012{_data_dir_flag(options.data_dir)}")


def _data_dir_flag(data_dir: str) -> str:
    return f" --config.data.data_dir={os.path.abspath(data_dir)}" if data_dir else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m beitv2_jax.data.prepare", description=__doc__.partition("\n\n")[0])
    sets = parser.add_subparsers(required=True, metavar="SET")
    imagenet = sets.add_parser("imagenet2012", help="ImageNet-1k from the official archives of ILSVRC 2012")
    imagenet.add_argument(
        "--archives",
        required=True,
        help="directory of the tars for training and validation, the devkit, and maybe the test images",
    )
    imagenet.add_argument("--data_dir", default="", help="TFDS directory to write to; TFDS's own default if left out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
