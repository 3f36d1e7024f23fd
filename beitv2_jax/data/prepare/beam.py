"""Prepare a large set of images with Apache Beam: python -m beitv2_jax.data.prepare.beam --input=DIR --name=NAME.

Needs the extra `beam`, but no TensorFlow. Arguments that are not its own go to Beam, such as --runner=DataflowRunner.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from absl import logging

from beitv2_jax.errors import UserError, print_error


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the data set that `argv` describes; return 0, or 2 after a UserError was printed."""
    options, beam_arguments = _parser().parse_known_args(argv)
    logging.set_verbosity(logging.WARNING)
    try:
        directory, summary = _module().prepare(
            options.input, options.name, options.data_dir, options.split, options.num_shards, beam_arguments
        )
    except UserError as error:
        print_error(f"Error: {error}")
        return 2
    counted = ", ".join(f"{summary[name]} {name}" for name in ("written", "unreadable", "duplicates"))
    print(f"{summary['files']} files: {counted}")
    data_dir = f" --config.data.data_dir={os.path.abspath(options.data_dir)}" if options.data_dir else ""
    print(f"{directory} is ready: --config.data.source=tfds:{options.name}{data_dir}")
    return 0


def _module():
    try:
        from beitv2_jax.data.prepare import beam_images
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "apache_beam":
            raise
        raise UserError(
            "Apache Beam is not installed.",
            "Did you install the project without the extra 'beam'?",
            "Run pip install -e '.[beam]', or set EXTRAS=beam for the launch scripts.",
        ) from error
    return beam_images


def _parser() -> argparse.ArgumentParser:
    text = f"{__doc__.partition(': ')[0]}. Arguments that are not listed here go to Beam."
    parser = argparse.ArgumentParser(
        prog="python -m beitv2_jax.data.prepare.beam", description=text, allow_abbrev=False
    )
    parser.add_argument(
        "--input", required=True, help="glob of <class>.tar, or a directory of tars or of class folders"
    )
    parser.add_argument("--name", required=True, help="of the TFDS data set: lower case, digits, underscores")
    parser.add_argument("--data_dir", default="", help="TFDS directory to write to; TFDS's own default if left out")
    parser.add_argument("--split", default="train", help="name of the one split that is written")
    parser.add_argument("--num_shards", type=int, help="number of files; chosen by TFDS if left out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
