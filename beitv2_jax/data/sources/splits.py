"""Names of splits: what a config calls validation may be called val or test by a data set."""

from collections.abc import Iterable

from beitv2_jax.errors import UserError, did_you_mean, listed

EVALUATION_SPLITS = ("validation", "val", "test")


def candidates(split: str) -> tuple[str, ...]:
    """Return the names under which to look for `split`, best first."""
    others = EVALUATION_SPLITS if split in EVALUATION_SPLITS else ()
    return split, *(name for name in others if name != split)


def resolve_split(split: str, available: Iterable[str], where: str) -> str:
    """Return the name under which `available` holds `split`; a slice `[...]` after the name is kept.

    Raises:
      UserError: `where` (words for the data set) has no such split.
    """
    name, bracket, tail = split.partition("[")
    known = sorted(available)
    for candidate in candidates(name):
        if candidate in known:
            return candidate + bracket + tail
    if not known:
        raise UserError(
            f"{where} has no split {split!r}, and no other one.",
            "Did you mean another data set?",
            "Write --config.data.source=SOURCE of a data set with splits.",
        )
    raise UserError(
        f"{where} has no split {split!r}; it has {listed(known, 10)}.",
        did_you_mean(name, known),
        "Write --config.data.train_split=NAME and --config.data.eval_split=NAME, each with one of these names; "
        "beitv2 evaluate, embed and atlas take --split=NAME.",
    )


def refuse_slice(split: str, what: str) -> None:
    """Raise a UserError if `split` is a slice, which only TFDS sets can be cut to; `what` names the data."""
    if "[" in split:
        raise UserError(
            f"{what} cannot be cut to {split!r}.",
            "Did you expect slices of a split, which exist for TFDS sets only?",
            f"Write {split.partition('[')[0]!r} for the whole split, or prepare a data set of just these images.",
        )
