"""Every error of training: provoked, its advice followed, and then it is gone."""

import contextlib
import shutil
import types

import jax
import pytest
import training_toy as toy
from user_errors import check_all_provoked, flag, provoked

from beitv2_jax.training import loop, optim, sharding, state, stop_rules, wandb_run
from beitv2_jax.training.best import check_metric
from beitv2_jax.training.checkpoint import Checkpointer
from beitv2_jax.training.schedule import Schedule


def test_meshes():
    for wrong, advice in (((0, 1, 1), "over all devices"), ((-1, -1, 1), "over all devices"), ((3, 3, 1), "divides 8")):
        with provoked(advice) as caught:
            sharding.make_mesh(*wrong)
        advised = {axis: int(flag(caught.value.instead, f"mesh.{axis}")) for axis in ("data", "fsdp", "tensor")}
        assert sharding.make_mesh(**advised).size == 8


def test_meshes_of_several_slices(monkeypatch):
    devices = [types.SimpleNamespace(platform="tpu", slice_index=index // 4) for index in range(8)]
    monkeypatch.setattr(sharding.mesh_utils, "create_hybrid_device_mesh", lambda *_, **__: jax.devices())
    monkeypatch.setattr(sharding, "Mesh", lambda devices, *_, **__: devices)
    with provoked("Write a --config.mesh.data that is a multiple of 2"):
        sharding.make_mesh(1, 8, 1, devices)
    sharding.make_mesh(2, 4, 1, devices)


def test_batches_on_meshes(monkeypatch):
    mesh = sharding.make_mesh(2, 2, 1)
    with provoked("a multiple of 4, or a smaller --config.mesh.data"):
        sharding.check_rows(6, mesh)
    sharding.check_rows(8, mesh)
    sharding.check_rows(6, sharding.make_mesh(1, 2, 1))
    with provoked() as caught:
        sharding.check_micro_batches(24, mesh.shape, 4)
    steps = int(flag(caught.value.instead, "efficiency.accumulation_steps"))
    sharding.check_micro_batches(24, mesh.shape, steps)
    with monkeypatch.context() as patch, provoked("Choose mesh sizes whose product is 8") as caught:
        patch.setattr(jax, "process_index", lambda: 1)
        sharding.row_share(mesh)
    advised = {axis: int(flag(caught.value.instead, f"mesh.{axis}")) for axis in ("data", "fsdp", "tensor")}
    assert sharding.row_share(sharding.make_mesh(**advised)) == (0, 1)


def test_layer_decay_of_a_stage_without_layers():
    settings = dict(schedule=lambda step: 0.1, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1, clip_norm=0.0)
    settings |= dict(no_decay=lambda path: False)
    with provoked() as caught:
        optim.make_optimizer(**settings, layer_decay=0.9)
    optim.make_optimizer(**settings, layer_decay=float(flag(caught.value.instead, "optim.layer_decay")))


def test_the_metric_of_the_best_checkpoint():
    task = toy.make_task()
    with provoked("--config.run.keep_best=NAME with one of ") as caught:
        check_metric(task, "eval/acuracy", True, (0, 1))
    assert caught.value.meant == "Did you mean 'eval/accuracy'?"
    names = caught.value.instead.partition("with one of ")[2].partition(", or leave it out")[0].split(", ")
    for metric in ("", *names):
        check_metric(task, metric, True, (0, 1))


def test_a_service_that_is_not_installed(monkeypatch):
    def version(name):
        raise wandb_run.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch, provoked("or leave --config.run.wandb out"):
        patch.setattr(wandb_run.metadata, "version", version)
        wandb_run.check("birds")
    wandb_run.check("")
    monkeypatch.setattr(wandb_run.metadata, "version", lambda name: "1")
    wandb_run.check("birds")


SCHEDULE = Schedule.from_config(toy.config(), toy.NUM_EXAMPLES)


def test_steps_that_change_nothing():
    rules = stop_rules.StopRules(SCHEDULE, max_nonfinite_steps=2, max_bad_fraction=0.0, workdir="w")

    def check(step, skipped):
        metrics = {"nonfinite_steps": skipped, "unreadable": 0, "loss": 1.0, "grad_norm": 1.0}
        rules.check(step, metrics, jax.numpy.arange(2))

    check(1, 1)
    # that a lower rate gives finite steps is shown by every run that trains
    with provoked("Lower --config.optim.peak_lr, write --config.optim.clip_norm=3.0, or check the data"):
        check(2, 2)
    check(3, 2)


def test_another_schedule():
    def resume(**saved):
        position = {"next_batch": 3, **SCHEDULE.meaning_of_a_step(), **saved}
        loop._check_schedule(SCHEDULE, types.SimpleNamespace(latest_step=lambda: 3, position=lambda: position), "w")

    with provoked("Write the former run.batch_size, run.duration and optim.warmup") as caught:
        resume(batch_size=2)
    assert "--config.init_from=w" in caught.value.instead
    resume()
    loop._check_schedule(SCHEDULE, types.SimpleNamespace(latest_step=lambda: None), "another")


def make(*, create, clip_norm=1.0):
    task = toy.make_task()
    settings = dict(schedule=lambda step: 0.1, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    optimizer = optim.make_optimizer(**settings, no_decay=task.no_decay, clip_norm=clip_norm)
    return (state.create if create else state.abstract)(task, optimizer, sharding.make_mesh(), seed=5)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a checkpoint, and the state in it."""
    directory, saved = tmp_path_factory.mktemp("run") / "checkpoints", make(create=True)
    with contextlib.closing(Checkpointer(directory)) as checkpointer:
        checkpointer.save(3, saved, {"next_batch": 3}, last=True)
    return directory, saved


def test_a_checkpoint_of_another_model(written, tmp_path):
    abstract = make(create=False)
    with contextlib.closing(Checkpointer(written[0])) as checkpointer:
        with provoked("Use a new --workdir, or the settings in the config.json of the workdir"):
            checkpointer.check_structure(abstract.replace(params={**abstract.params, "fc1": {}}))
        checkpointer.check_structure(abstract)
    with contextlib.closing(Checkpointer(tmp_path / "new")) as checkpointer:
        assert checkpointer.latest_step() is None


def test_checkpoints_that_are_all_corrupt(written, tmp_path):
    directory = shutil.copytree(written[0], tmp_path / "checkpoints")
    (lost,) = directory.glob("3/params/manifest.ocdbt")
    lost.unlink()
    with provoked(f"Restore the missing files, or delete {directory} to start at step 0"):
        Checkpointer(directory)
    shutil.copy(written[0] / "3" / "params" / "manifest.ocdbt", lost)
    with contextlib.closing(Checkpointer(directory)) as checkpointer:
        assert checkpointer.latest_step() == 3
    lost.unlink()
    shutil.rmtree(directory)
    with contextlib.closing(Checkpointer(directory)) as checkpointer:
        assert checkpointer.latest_step() is None


def test_a_save_without_space(written, tmp_path, monkeypatch):
    directory = tmp_path / "checkpoints"
    with contextlib.closing(Checkpointer(directory)) as checkpointer:
        trouble = OSError(28, "No space left on device")
        with provoked("Free space or repair the folder. The same command resumes the run."):
            checkpointer.save(3, written[1], {"next_batch": 3}, last=True, trouble=trouble)
        checkpointer.save(3, written[1], {"next_batch": 3}, last=True)
        assert checkpointer.latest_step() == 3


def test_every_error_of_training_was_provoked(request):
    check_all_provoked(request, "training")
