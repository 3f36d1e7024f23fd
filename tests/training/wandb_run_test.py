"""A service that fails, or is not installed, in place of Weights & Biases."""

import sys
import types

import pytest

from beitv2_jax.errors import UserError
from beitv2_jax.training import wandb_run
from beitv2_jax.training.writer import MetricWriter, read_metrics


class Service:
    """The part of the package wandb that is used; `fails` names the call that raises an error."""

    Settings = types.SimpleNamespace

    def __init__(self, fails=""):
        self._fails, self.calls = fails, []

    def _call(self, name, *args):
        if name == self._fails:
            raise RuntimeError("the service is not there")
        self.calls.append((name, *args))

    def init(self, **arguments):
        self._call("init", arguments["project"], arguments["id"])
        return self

    def log(self, metrics, step):
        self._call("log", step, metrics)

    def finish(self):
        self._call("finish")


def write(workdir, service, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", service)
    writer = MetricWriter(workdir, service=wandb_run.WandbRun("birds", workdir, {}))
    writer.write(1, {"loss": 2.0})
    writer.write(2, {"loss": 1.0})
    writer.close()


def test_every_line_is_sent_and_the_identity_is_kept(tmp_path, monkeypatch):
    services = Service(), Service()
    for service in services:
        write(tmp_path, service, monkeypatch)
        identity = (tmp_path / "wandb_id.txt").read_text()
        assert service.calls == [
            ("init", "birds", identity),
            ("log", 1, {"loss": 2.0}),
            ("log", 2, {"loss": 1.0}),
            ("finish",),
        ]


@pytest.mark.parametrize("fails, calls", [("init", []), ("log", ["init"]), ("finish", ["init", "log", "log"])])
def test_errors_of_the_service_are_logged_and_the_run_goes_on(tmp_path, monkeypatch, caplog, fails, calls):
    service = Service(fails)
    write(tmp_path, service, monkeypatch)
    assert [name for name, *_ in service.calls] == calls
    assert caplog.text.count("the service is not there") == 1
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_a_project_needs_the_package(monkeypatch):
    def version(name):
        raise wandb_run.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(wandb_run.metadata, "version", version)
    wandb_run.check("")
    with pytest.raises(UserError, match=r"pip install .beitv2_jax\[wandb\]"):
        wandb_run.check("birds")
