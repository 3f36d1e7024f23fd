"""Exceptions that end the program without a traceback, and helpers for their messages."""

import difflib
import sys
from collections.abc import Iterable, Sequence


def nearest(name: str, valid: Iterable[str], *, least: float = 0.6) -> str | None:
    """Return the entry of `valid` that is spelled most like `name` (ties: alphabetical order); None if none is close.

    Close is a likeness of at least `least`, where 1 is equal but for capitals, and 0 has no letter in common.
    """

    def likeness(candidate: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), candidate.lower()).ratio()

    best = max(sorted(valid), key=likeness, default=None)
    return best if best is not None and likeness(best) >= least else None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return the question for the entry of `valid` that is close to `name`, or the sentence that none is."""
    guess = nearest(name, valid)
    return f"Did you mean '{guess}'?" if guess else "None of the valid names is spelled like it."


def listed(names: Sequence[str], most: int = 20) -> str:
    """Return the first `most` names with commas between them, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class UserError(Exception):
    """A mistake that the user can correct; `beitv2_jax.main` prints it without a traceback and exits with code 2.

    Args:
        happened: what is wrong, a full sentence: "The config has no key 'optim.peak_rl'."
        meant: the most likely intention, a question: "Did you mean 'optim.peak_lr', whose value is 0.0015?"
        instead: what to write or do, an instruction: "Write --config.optim.peak_lr=0.0015."
    """

    def __init__(self, happened: str, meant: str, instead: str):
        super().__init__(happened, meant, instead)
        self.happened = happened
        self.meant = meant
        self.instead = instead

    def __str__(self) -> str:
        return f"{self.happened}\n  {self.meant}\n  {self.instead}"


class Resumable(Exception):
    """A run ended early, through no mistake of the user; the same command resumes it.

    `beitv2_jax.main` prints it and exits with `EXIT_CODE`, on which the launchers start a run again.
    """

    EXIT_CODE = 75


class Preempted(Resumable):
    """A run that was asked to stop has saved its state."""


def print_error(message: object) -> None:
    """Write `message` to stderr in one call, so that lines of several processes on one stream stay whole."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
