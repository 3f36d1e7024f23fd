"""Checkpoints of a run: state and data position written together, asynchronously, restored onto any mesh.

One step is four Orbax items: `params` and `codebook` (absent when empty) so that later stages read them alone, `train`
(step, optimizer, averages) and `data` (the position in the data, as JSON that any number of processes can read).
A folder named by its step is complete: it is renamed to that last of all, with the checksums of its files inside. In a
bucket, which cannot rename, it has that name at once and is complete when Orbax's file for that is in it.
"""

import contextlib
import shutil
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN, PreservationPolicy

from beitv2_jax.errors import UserError
from beitv2_jax.runtime import buckets
from beitv2_jax.runtime.buckets import AnyPath
from beitv2_jax.runtime.checksums import find_damage, write_checksums
from beitv2_jax.runtime.disk_checks import agreed, cause_of, free_space, remedy, reserved
from beitv2_jax.training.sharding import path_name
from beitv2_jax.training.state import TrainState
from beitv2_jax.typing import PyTree

KEPT = 2
STRAGGLER_SECONDS = 10.0
"""After a save that failed, how long what Orbax still writes of it is waited for."""
COMPLETE_FILE = "commit_success.txt"
"""What Orbax writes last into the folder of a checkpoint in a bucket."""
CLEARINGS, QUIET_LOOKS, CLEARING_SECONDS = 40, 4, 0.05


ITEMS = ("params", "model_state", "averaged_params", "train")
"""Parts of a checkpoint that are trees of arrays; the position in the data is JSON."""


class _TheBest(PreservationPolicy):
    """Preserve the checkpoint of `step`, which changes while the manager is open."""

    step: int | None = None

    def should_preserve(self, checkpoints, *, context):
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpointer:
    """Write and read the checkpoints under `directory`; the last 2 stay, and all at multiples of `keep_every`.

    So does the one that `preserve` names, until the next one that it names.

    A damaged checkpoint that is newer than the newest whole one is renamed, `12` to `12.corrupt`, and named in the log.
    A save that fails leaves nothing behind and the others as they were; it is logged, or an error where
    `stop_on_failure` says so. It is noticed at the next `check` of a lone process, at the next `save` of several.

    Raises:
        UserError: there are checkpoints, and none is whole; then they are left as they are.
    """

    def __init__(self, directory: str | AnyPath, *, keep_every: int = 0, stop_on_failure: bool = False):
        self._directory = buckets.as_path(buckets.absolute(directory))
        self._keep_every, self._stop_on_failure = keep_every, stop_on_failure
        self._saving: int | None = None
        self._best = _TheBest()
        _clear_unfinished(self._directory)
        _quarantine_corrupt(self._directory)
        self._manager: ocp.CheckpointManager | None = self._open()
        self._newest = self._manager.latest_step()

    def latest_step(self) -> int | None:
        """Return the number of finished steps in the newest complete checkpoint, None if there is none."""
        return self._newest

    def steps(self) -> list[int]:
        """Return the number of finished steps of every complete checkpoint."""
        self._settle()
        return [] if self._manager is None else list(self._manager.all_steps())

    def preserve(self, step: int) -> bool:
        """Let the checkpoint of `step` stay, in place of the one before; False if there is none, and nothing changes.

        A save that is under way is waited for.
        """
        if step not in self.steps():
            return False
        self._best.step = step
        return True

    def save(
        self,
        step: int,
        state: TrainState,
        position: dict[str, int],
        *,
        last: bool = False,
        trouble: Exception | None = None,
    ) -> None:
        """Start writing `state` after `step` finished steps, with the `position` in the data at the same step.

        Returns once the arrays are copied to the host; they may then be donated and the data moved on.

        Args:
            last: no save will follow, so this one is waited for, and is an error if it fails.
            trouble: what kept this process from writing that which has to be on the disk before the checkpoint.

        Raises:
            UserError: a save failed: this one or, with `stop_on_failure`, the one before.
        """
        self._settle()
        cause = cause_of(trouble) if trouble else None
        if jax.process_count() > 1:
            # all reserve their space at the same time, because it may be the same disk
            with reserved(self._directory, state) as missing:
                cause = agreed(cause or missing)
        if cause is not None:
            self._fail(step, cause, last)
            return
        try:
            self._start(step, state, position)
        except Exception as error:
            _wait_for_stragglers()
            # several processes cannot agree here, so none of them can continue
            self._fail(step, cause_of(error), last or jax.process_count() > 1)
        if last:
            self._settle(last=True)

    def check(self) -> None:
        """Notice, in a lone process, that the save in the background has failed.

        Raises:
            UserError: it has, and `stop_on_failure` is set.
        """
        if jax.process_count() == 1 and self._saving is not None and not self._manager.is_saving_in_progress():
            self._settle()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, int]]:
        """Return the newest state, laid out as `abstract` says, and the `position` saved with it.

        Args:
            abstract: shapes, dtypes and shardings of the state of this run.

        Raises:
            UserError: the checkpoint holds another structure.
        """
        step = self.latest_step()
        self.check_structure(abstract)
        wanted = _items(abstract)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        found = self._manager.restore(step, args=ocp.args.Composite(**items, data=ocp.args.JsonRestore()))
        restored = abstract.replace(
            params=found["params"],
            model_state=found.get("model_state", abstract.model_state),
            averaged_params=found.get("averaged_params"),
            **found["train"],
        )
        return restored, found["data"]

    def position(self) -> dict[str, int]:
        """Return what was saved with the newest state: the position in the data, and the schedule it belongs to."""
        return self._manager.restore(self.latest_step(), args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]

    def check_structure(self, abstract: TrainState) -> None:
        """Compare names, shapes and dtypes of the newest checkpoint with those of `abstract`.

        Raises:
            UserError: they differ; the first array that does is named.
        """
        step, wanted = self.latest_step(), _items(abstract)
        metadata = self._manager.item_metadata(step)
        trees = {name: metadata[name].tree for name in ITEMS if metadata.get(name) is not None}
        stored, expected = _leaves(trees), _leaves(wanted)
        for path in [*expected, *stored]:
            if stored.get(path) != expected.get(path):
                raise UserError(
                    f"The checkpoint {self._directory / str(step)} has {_say(stored, path)}, "
                    f"this run has {_say(expected, path)}.",
                    "The model or the optimizer may have changed since this workdir was started.",
                    "Use a new --workdir, or the settings in the config.json of the workdir.",
                )

    def reached_preemption(self, step: int) -> bool:
        """Return whether the processes of a run, one of which must end, agreed to save after `step`."""
        return ocp.utils.reached_preemption(step)

    def close(self) -> None:
        """Wait until everything is written and free the threads; what fails now is logged."""
        if (cause := self._wait()) is not None:
            logging.error("%s", self._failure(self._saving, cause, goes_on=False))
        self._drop()
        if cause is not None:
            _clear_unfinished(self._directory, QUIET_LOOKS)

    def _open(self) -> ocp.CheckpointManager:
        policies = [LatestN(KEPT), self._best] + ([EveryNSteps(self._keep_every)] if self._keep_every else [])
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for item in ITEMS:
            handler = ocp.StandardCheckpointHandler()
            registry.add(item, ocp.args.StandardSave, handler)
            registry.add(item, ocp.args.StandardRestore, handler)
        position = ocp.JsonCheckpointHandler()
        registry.add("data", ocp.args.JsonSave, position)
        registry.add("data", ocp.args.JsonRestore, position)
        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies),
                async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
            ),
            handler_registry=registry,
        )

    def _start(self, step: int, state: TrainState, position: dict[str, int]) -> None:
        if self._manager is None:
            _clear_unfinished(self._directory)
            self._manager = self._open()
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        self._saving = step
        self._manager.save(step, args=ocp.args.Composite(**items, data=ocp.args.JsonSave(position)))

    def _settle(self, *, last: bool = False) -> None:
        """Wait for the save in the background, if there is one, and take note how it ended."""
        if self._saving is None:
            return
        step, cause = self._saving, agreed(self._wait())
        self._saving = None
        if cause is None:
            self._newest = step
        else:
            self._fail(step, cause, last)

    def _wait(self) -> str | None:
        """Return why the save in the background failed, None if it did not or there is none."""
        if self._saving is None:
            return None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            _wait_for_stragglers()
            if not is_complete(self._directory / str(self._saving)):
                return cause_of(error)
            logging.warning("an old checkpoint in %s could not be deleted: %s", self._directory, cause_of(error))
        return None

    def _fail(self, step: int, cause: str, last: bool) -> None:
        # what failed stays with Orbax's manager and would make the next save fail: that one opens another
        self._saving = None
        self._drop()
        _clear_unfinished(self._directory, QUIET_LOOKS)
        failure = self._failure(step, cause, goes_on=not (last or self._stop_on_failure))
        if last or self._stop_on_failure:
            raise failure
        logging.error("%s", failure)

    def _drop(self) -> None:
        """Free the manager and its threads."""
        if self._manager is not None:
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = None

    def _failure(self, step: int, cause: str, *, goes_on: bool) -> UserError:
        whole = (
            "there is no valid one yet" if self._newest is None else f"the newest valid one is of step {self._newest}"
        )
        meant, instead = remedy(cause)
        return UserError(
            f"The checkpoint of step {step} could not be written to {self._directory}: {cause} "
            f"({free_space(self._directory)}); {whole}.",
            meant,
            f"{instead} "
            + (
                "The run continues and tries again at its next save."
                if goes_on
                else "The same command resumes the run."
            ),
        )

    def _add_checksums(self) -> None:
        # Orbax calls this when all files of all processes are written, before the rename that makes them valid
        if jax.process_index() == 0:
            (unfinished,) = (
                path
                for path in _unfinished(self._directory)
                if path.name.partition(ocp.utils.TMP_DIR_SUFFIX)[0] == str(self._saving)
            )
            _read_back(unfinished)
            write_checksums(unfinished)


def _read_back(folder: AnyPath) -> None:
    """Open every array of a checkpoint that was just written; raise an error if one is not there."""
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        for item in (path for name in ITEMS if (path := folder / name).is_dir()):
            try:
                handler.metadata(item)
            except Exception as error:
                raise RuntimeError(f"{item.name} cannot be read back: {error}") from error


def _wait_for_stragglers() -> None:
    """Wait for the threads in which Orbax still writes the other items of a save, one of which failed."""
    until = time.monotonic() + STRAGGLER_SECONDS
    for thread in threading.enumerate():
        if type(thread).__module__.partition(".")[0] == "orbax":
            with contextlib.suppress(Exception):  # what the thread raised: join raises it again
                thread.join(max(0.0, until - time.monotonic()))


def is_complete(checkpoint: AnyPath) -> bool:
    """Tell whether a folder with the name of a step is that of a save which reached its end."""
    return (checkpoint / COMPLETE_FILE).exists() if buckets.is_remote(checkpoint) else checkpoint.is_dir()


def _unfinished(directory: AnyPath) -> list[AnyPath]:
    """Return the folders of saves that are under way, or that failed or were killed."""
    if buckets.is_remote(directory):
        return [path for path in directory.glob("*") if path.name.isdecimal() and not is_complete(path)]
    return list(directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"))


def _clear_unfinished(directory: AnyPath, quiet_looks: int = 1) -> None:
    """Delete, where possible, what failed and killed saves left; process 0 does it for all.

    Ends when `quiet_looks` looks in a row find nothing: after a thread has ended, the file system may still create
    files, and their folders with them.
    """
    if jax.process_index() != 0:
        return
    quiet = 0
    with contextlib.suppress(OSError), buckets.os_errors():
        for _ in range(CLEARINGS):
            left = _unfinished(directory)
            for unfinished in left:
                if buckets.is_remote(unfinished):
                    unfinished.rmtree(missing_ok=True)
                else:
                    shutil.rmtree(unfinished, ignore_errors=True)
            quiet = 0 if left else quiet + 1
            if quiet == quiet_looks:
                break
            time.sleep(CLEARING_SECONDS)


def _quarantine_corrupt(directory: AnyPath) -> None:
    """Rename the damaged checkpoints that are newer than the newest whole one; process 0 does it for all."""
    damage = _newest_damage(directory) if jax.process_index() == 0 else {}
    none_is_whole = bool(damage) and None not in damage.values()
    if jax.process_count() > 1:
        none_is_whole = bool(multihost_utils.broadcast_one_to_all(np.bool_(none_is_whole)))
    if none_is_whole:
        listed = "; ".join(f"{step}: {found}" for step, found in damage.items()) or "see the log of process 0"
        raise UserError(
            f"Every checkpoint in {directory} is corrupt ({listed}).",
            "The disk may have failed, or files may have been deleted or copied only in part.",
            f"Restore the missing files, or delete {directory} to start at step 0.",
        )
    for step, found in damage.items():
        if found is not None:
            quarantined = directory / f"{step}.corrupt"
            while quarantined.exists():
                quarantined = quarantined.with_name(f"{quarantined.name}+")
            logging.error("the checkpoint at step %d is corrupt (%s) and quarantined as %s", step, found, quarantined)
            (directory / str(step)).rename(quarantined)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("corrupt checkpoints are quarantined")


def _newest_damage(directory: AnyPath) -> dict[int, str | None]:
    """Return {step: what is wrong with its checkpoint}, newest first, up to the first that is whole."""
    steps = (int(path.name) for path in directory.glob("*") if path.name.isdecimal())
    damage: dict[int, str | None] = {}
    for step in sorted(steps, reverse=True):
        damage[step] = find_damage(directory / str(step))
        if damage[step] is None:
            break
    return damage


def _items(state: TrainState) -> dict[str, PyTree]:
    train = {"step": state.step, "opt_state": state.opt_state, "spikes": state.spikes}
    items = {"params": state.params, "train": train}
    # Orbax cannot save an empty tree
    if jax.tree.leaves(state.model_state):
        items["model_state"] = state.model_state
    if state.averaged_params is not None:
        items["averaged_params"] = state.averaged_params
    return items


def _leaves(tree: PyTree) -> dict[str, str]:
    return {
        path_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _say(leaves: dict[str, str], path: str) -> str:
    return f"{path} {leaves[path]}" if path in leaves else f"no {path}"
