"""Common to the command lines of this package: the parser, and how mistakes are reported."""

import argparse
import functools
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from beitv2_jax.choices import NORMALIZATIONS
from beitv2_jax.errors import UserError, print_error


class Parser(argparse.ArgumentParser):
    """A parser that raises `UserError` for arguments that are not valid, and shows its texts as they are written."""

    def __init__(self, **arguments: str):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **arguments)

    def error(self, message: str) -> NoReturn:
        needed = [action.metavar or action.dest for action in self._actions if not action.option_strings]
        raise UserError(
            f"The command line is not valid: {message}.",
            "An argument may be missing or misspelled.",
            f"Write {' '.join([self.prog, *needed])}, or see {self.prog} --help.",
        )


def positive(text: str) -> int:
    """Return the whole number from 1 on that an argument holds; the `type` of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def probability(text: str) -> float:
    """Return the number from 0 to 1 that an argument holds; the `type` of an option."""
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")


def add_input_options(parser: Parser) -> None:
    """Add the options that say how a network sees images."""
    parser.add_argument("--image_size", type=int, metavar="PIXELS", help="resize positions to this image size")
    parser.add_argument(
        "--normalization", choices=NORMALIZATIONS, help="of the input, for weights that do not state it"
    )


def check_out(out: str, done_before: str) -> None:
    """Check the value of --out, unless it is ''; `done_before` asks whether the command was given before.

    Raises:
        UserError: it exists, or its folder does not.
    """
    if out and Path(out).exists():
        raise UserError(f"{out} exists already.", done_before, "Write another --out, or delete the old one.")
    if out and not Path(out).absolute().parent.is_dir():
        raise UserError(
            f"The folder {Path(out).absolute().parent} does not exist.",
            "Did you mistype the path?",
            "Write --out in a folder that exists.",
        )


def report_errors(main: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """Let `main` return 0, 2 after a `UserError` was printed, or 130 after Ctrl-C."""

    @functools.wraps(main)
    def reported(argv: Sequence[str] | None = None) -> int:
        try:
            main(argv)
        except UserError as error:
            print_error(f"Error: {error}")
            return 2
        except KeyboardInterrupt:
            print_error("Interrupted.")
            return 128 + signal.SIGINT
        return 0

    return reported
