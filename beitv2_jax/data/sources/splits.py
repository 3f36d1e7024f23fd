"""Names of splits: what a config calls validation may be called val or test by a data set."""

from collections.abc import Iterable

from beitv2_jax.errors import UserError

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
    raise UserError(
        f"{where} has no split {split!r}; it has {', '.join(known) or 'none'}.",
        "data.train_split or data.eval_split names a split of another data set",
        f"one of: {', '.join(known) or 'a data set with splits'}",
    )


def refuse_slice(split: str, what: str) -> None:
    """Raise a UserError if `split` is a slice, which only TFDS sets can be cut to; `what` names the data."""
    if "[" in split:
        raise UserError(
            f"{what} cannot be cut to {split!r}.",
            "slices of a split exist for TFDS sets only",
            f"the split {split.partition('[')[0]!r}, or data that are just these images",
        )
