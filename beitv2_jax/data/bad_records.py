"""The list of what a stage could not use: `bad_records.jsonl` in its workdir, each example and each file once.

Beside the data pipeline: it takes the host batches on their way to the device and reads their `faults`, and from the
sources the files that are no examples.
"""

import collections
import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from beitv2_jax.errors import UserError
from beitv2_jax.runtime import buckets


class LeftOut(NamedTuple):
    """A file or folder of a data set that is no example of it: its path, and the cause in words ("its name ...")."""

    where: str
    cause: str


class BadRecords:
    """Append every unreadable example, and every file that is left out, to a file, once in the life of the workdir.

    Process k of several writes `bad_records-k.jsonl`, since appends of several machines to one file can be lost;
    process 0 and a lone process write `bad_records.jsonl`. An example is listed in one of the files only.
    """

    def __init__(self, workdir: str | os.PathLike, process_index: int = 0):
        self._workdir = buckets.as_path(workdir)
        self.path = self._workdir / (f"bad_records-{process_index}.jsonl" if process_index else "bad_records.jsonl")
        self._known = {_key(record) for record in read_bad_records(workdir)}
        self._unwritten: list[dict[str, Any]] = []

    def note(self, batch: dict[str, np.ndarray], split: str) -> None:
        """Record the faults of a host batch of `split`, and log one warning if there are new ones."""
        faults = batch.get("faults")
        if faults is None or not any(faults):
            return
        met = [
            bad_record(split, int(example_id), str(fault))
            for example_id, fault in zip(batch["example_ids"], faults, strict=True)
            if fault
        ]
        if not {_key(record) for record in met} - self._known:
            return
        self._known |= {_key(record) for record in read_bad_records(self._workdir)}  # what other processes found
        new = list({_key(record): record for record in met if _key(record) not in self._known}.values())
        if new:
            self._known |= {_key(record) for record in new}
            self._unwritten += new
            try:
                self._append(self._unwritten)
                self._unwritten = []
            except OSError as error:  # they are written with the next ones
                logging.warning("%s is not written: %s", self.path, error.strerror)
            logging.warning(
                "%d unreadable records so far, the newest %s: %s; listed in %s",
                len(self._known),
                new[-1]["where"],
                new[-1]["cause"],
                self.path,
            )

    def note_left_out(self, source) -> None:
        """Log which files of an opened source are no examples, and why, and which classes have none; list the files."""
        what = f"split {source.split} of {source.name}"
        causes = collections.Counter(entry.cause for entry in source.left_out)
        for cause, count in causes.most_common():
            first = next(entry.where for entry in source.left_out if entry.cause == cause)
            logging.warning(
                "%s: %d files or folders are left out, such as %s: %s; listed in %s",
                *(what, count, first, cause, self.path),
            )
        if source.empty_classes:
            names = ", ".join(source.empty_classes[:20]) + (", ..." if len(source.empty_classes) > 20 else "")
            count = len(source.empty_classes)
            logging.warning("%s: %d of %d classes have no images: %s", what, count, source.num_classes, names)
        records = [{"split": source.split, "example_id": None, **entry._asdict()} for entry in source.left_out]
        if new := [record for record in records if _key(record) not in self._known]:
            self._append(new)

    def noted(self, batches: Iterable[dict], split: str) -> Iterator[dict]:
        """Yield `batches` as they are, recording their faults."""
        for batch in batches:
            self.note(batch, split)
            yield batch

    def _append(self, records: list[dict[str, Any]]) -> None:
        self._workdir.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(record) + "\n" for record in records)
        if buckets.is_remote(self.path):  # nothing can be appended
            with buckets.os_errors():
                former = self.path.read_text() if self.path.exists() else ""
            buckets.write_object(self.path, (former + text).encode())
            return
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            text = "\n" + text  # a line cut off by a crash is left behind, not glued to the next one
        with self.path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def read_bad_records(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Return what all processes of a stage recorded, as {"split", "example_id", "where", "cause"}.

    The example id of a file that was left out is None.
    """
    records = []
    for path in sorted(buckets.as_path(workdir).glob("bad_records*.jsonl")):
        for line in path.read_bytes().decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that a crash cut off or garbled
                record = json.loads(line)
                _key(record)
                records.append(record)
    return records


def _key(record: dict[str, Any]) -> tuple[str, int | str]:
    example_id = record["example_id"]
    return record["split"], record["where"] if example_id is None else example_id


def bad_record(split: str, example_id: int, fault: str) -> dict[str, Any]:
    """Return the line of an unreadable example, from its `faults` entry."""
    where, _, cause = fault.partition(": ")
    return {"split": split, "example_id": example_id, "where": where, "cause": cause}


def refuse_too_many(
    unreadable: int,
    count: int,
    max_bad_fraction: float,
    *,
    of: str,
    listed: str,
    flag: str = "--config.data.max_bad_fraction",
) -> None:
    """Raise UserError if more than `max_bad_fraction` of `count` images are unreadable, or all of them.

    Args:
        of: which images were counted: "of split validation".
        listed: where the unreadable ones can be found: "listed in PATH".
        flag: what sets `max_bad_fraction`.
    """
    if unreadable <= max_bad_fraction * count and unreadable < count:
        return
    enough = math.ceil(unreadable / count * 1000) / 1000  # rounded up: the advice must be enough
    leave_out = f", or leave them out with {flag}={enough:g}" if unreadable < count else ""
    raise UserError(
        f"{unreadable} of {count} images {of} are unreadable; {flag.removeprefix('--config.')} allows "
        f"{max_bad_fraction:.3%}, and at least one has to be readable.",
        "The data set may be damaged or copied only in part.",
        f"Repair or replace the files {listed}{leave_out}.",
    )
