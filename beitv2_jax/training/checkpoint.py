"""Checkpoints of a run: state and data position written together, asynchronously, restored onto any mesh.

One step is four Orbax items: `params` and `codebook` (absent when empty) so that later stages read them alone, `train`
(step, optimizer, averages) and `data` (the position in the data, as JSON that any number of processes can read).
"""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from beitv2_jax.errors import UserError
from beitv2_jax.training.sharding import path_name
from beitv2_jax.training.state import TrainState
from beitv2_jax.typing import PyTree

KEPT = 2


class Checkpointer:
    """Write and read the checkpoints under `directory`; the last 2 stay, and all at multiples of `keep_every`."""

    def __init__(self, directory: str | Path, *, keep_every: int = 0):
        self._directory = Path(directory).absolute()
        policies = [LatestN(KEPT)] + ([EveryNSteps(keep_every)] if keep_every else [])
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for item in ("params", "codebook", "train"):
            handler = ocp.StandardCheckpointHandler()
            registry.add(item, ocp.args.StandardSave, handler)
            registry.add(item, ocp.args.StandardRestore, handler)
        position = ocp.JsonCheckpointHandler()
        registry.add("data", ocp.args.JsonSave, position)
        registry.add("data", ocp.args.JsonRestore, position)
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(preservation_policy=AnyPreservationPolicy(policies)),
            handler_registry=registry,
        )

    def latest_step(self) -> int | None:
        """Return the number of finished steps in the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: dict[str, int]) -> None:
        """Start writing `state` after `step` finished steps, with the `position` in the data at the same step.

        Returns once the arrays are copied to the host; they may then be donated and the data moved on.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        self._manager.save(step, args=ocp.args.Composite(**items, data=ocp.args.JsonSave(position)))

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, int]]:
        """Return the newest state, laid out as `abstract` says, and the position saved with it.

        Args:
            abstract: shapes, dtypes and shardings of the state of this run.

        Raises:
            UserError: the checkpoint holds another structure.
        """
        step = self.latest_step()
        wanted = _items(abstract)
        self._check(step, wanted)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        found = self._manager.restore(step, args=ocp.args.Composite(**items, data=ocp.args.JsonRestore()))
        restored = abstract.replace(
            params=found["params"], codebook=found.get("codebook", abstract.codebook), **found["train"]
        )
        return restored, found["data"]

    def close(self) -> None:
        """Wait until everything is written and free the threads."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _check(self, step: int, wanted: dict[str, PyTree]) -> None:
        metadata = self._manager.item_metadata(step)
        trees = {
            name: metadata[name].tree for name in ("params", "codebook", "train") if metadata.get(name) is not None
        }
        stored, expected = _leaves(trees), _leaves(wanted)
        for path in [*expected, *stored]:
            if stored.get(path) != expected.get(path):
                raise UserError(
                    f"the checkpoint {self._directory / str(step)} has {_say(stored, path)}, "
                    f"this run has {_say(expected, path)}",
                    "the model or the optimizer was changed since this workdir was started",
                    "use a new --workdir, or the configuration that stands in the workdir's config.json",
                )


def _items(state: TrainState) -> dict[str, PyTree]:
    train = {"step": state.step, "opt_state": state.opt_state}
    if state.ema_params is not None:
        train["ema_params"] = state.ema_params
    codebook = {"codebook": state.codebook} if jax.tree.leaves(state.codebook) else {}
    return {"params": state.params, **codebook, "train": train}


def _leaves(tree: PyTree) -> dict[str, str]:
    return {
        path_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _say(leaves: dict[str, str], path: str) -> str:
    return f"{path} {leaves[path]}" if path in leaves else f"no {path}"
