"""The exceptions that end the program without a traceback, and what helps to word and to tell them."""

import difflib
import sys
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the entry of `valid` that is spelled most like `name` (ties: alphabetical order)."""
    return max(sorted(valid), key=lambda candidate: difflib.SequenceMatcher(None, name, candidate).ratio())


class UserError(Exception):
    """Say what happened, what was probably meant and what to write instead.

    `beitv2_jax.main` prints the three parts and exits with code 2; nothing else catches it.
    """

    def __init__(self, happened: str, meant: str, instead: str):
        super().__init__(happened, meant, instead)
        self.happened = happened
        self.meant = meant
        self.instead = instead

    def __str__(self) -> str:
        return f"{self.happened}\n  Probably: {self.meant}\n  Instead:  {self.instead}"


class Preempted(Exception):
    """Say that a run was told to end, has saved, and goes on where it is when it is started again.

    `beitv2_jax.main` prints it and exits with `EXIT_CODE`, on which the launchers start a run again.
    """

    EXIT_CODE = 75


def tell(message: object) -> None:
    """Write `message` to stderr in one piece, as `print` does not: the processes of a run may share that stream."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
