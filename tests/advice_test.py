"""Every error about a config: provoked through the command line, its advice followed, and then it is gone.

A case names the flags of a run that is refused. What the error says to write is added to them, each alternative by
itself, and the run must then be accepted. The list of cases is held against the source: an error without a case fails.
"""

import contextlib
import json
import re
import shlex
import types

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict
from paths import ROOT
from user_errors import check_all_provoked, note_errors, provoked
from without_data import FakeSource

from beitv2_jax import config as config_lib
from beitv2_jax.config.flags import parse_flags
from beitv2_jax.convert import runs, weights
from beitv2_jax.errors import UserError
from beitv2_jax.runners import stages
from beitv2_jax.tasks import cluster, dense, finetune, fit, inputs, mim, probe, segment, tokenize

MIM = "--config=configs/mim.py --workdir=w"
FLAGS = {
    "cluster": "--config=configs/cluster.py:smoke --config.teacher.features=DIR",
    "extract": "--config=configs/extract.py:smoke --config.teacher.weights=FILE",
    "finetune": "--config=configs/finetune.py:smoke",
    "live": "--config=configs/mim.py:smoke --config.tokenizer.run=vqkd",
    "mim": "--config=configs/mim.py:smoke --config.tokenizer.codes=DIR --config.views.num_views=1",
    "dense": "--config=configs/dense.py:smoke --config.backbone.run=mim --config.backbone.layer=3",
    "pipeline": "--config=configs/pipeline.py --config.teacher.weights=FILE",
    "probe": "--config=configs/probe.py:smoke --config.backbone.run=mim",
    "quickstart": "--config=configs/quickstart.py:smoke",
    "segment": "--config=configs/segment.py:smoke",
    "tokenize": "--config=configs/tokenize.py:smoke --config.tokenizer.run=vqkd",
    "vqkd": "--config=configs/vqkd.py:smoke --config.teacher.weights=FILE",
}
CONFIGS = [
    ("finetune", "--config.data.source=folder:gs://bucket/images"),
    ("finetune", "--config.init_from=hf:beitv2"),
    ("mim", "--config.tokenizer.codes=hf:owner/codes"),
    ("mim", "--config.efficiency.dtype=bf16"),
    ("mim", "--config.efficiency.dtype=x"),
    ("segment", "--config.evaluation.batch_size=0"),
    ("vqkd", "--config.model.code_dim=0"),
    ("mim", "--config.model.drop_path_rate=10.0"),
    ("mim", "--config.data.max_bad_fraction=-500.0"),
    ("mim", "--config.run.duration=5"),
    ("mim", "--config.run.duration='5 epcohs'"),
    ("mim", "--config.run.log_every='5 x'"),
    ("mim", "--config.run.duration='0 steps'"),
    ("probe", "--config.probe.duration='0 epochs'"),
    ("vqkd", "--config.usage_window='0 steps'"),
    ("vqkd", "--config.kmeans_tokens=-1"),
    ("vqkd", "--config.kmeans_tokens=50 --config.kmeans_start=False"),
    ("vqkd", "--config.kmeans_again='4 steps'"),
    ("mim", "--config.optim.warmup='4 steps'"),
    ("mim", "--config.optim.warmup='50 steps' --config.run.duration='40 steps'"),
    ("mim", "--config.optim.warmup='2 epochs' --config.run.duration='1 epoch'"),
    ("mim", "--config.optim.warmup='1 epoch' --config.run.duration='100 steps'"),
    ("mim", "--config.run.batch_size=2000 --config.run.duration='1 epoch' --config.optim.warmup='0 steps'"),
    ("mim", "--config.run.batch_size=2000 --config.run.eval_every='1 epoch'"),
    ("mim", "--config.model.num_heads=0"),
    ("vqkd", "--config.model.encoder.num_heads=5"),
    ("mim", "--config.model.patch_size=16 --config.views.image_size=100"),
    ("mim", "--config.optim.betas=(0.9,1.0)"),
    ("mim", "--config.model.patch_size=16 --config.masking.num_masked=37"),
    ("mim", "--config.model.patch_size=16 --config.masking.num_masked=2 --config.views.image_size=16"),
    ("vqkd", "--config.model.encoder.stem=conv --config.model.encoder.patch_size=24"),
    ("vqkd", "--config.model.codebook_size=1000"),
    ("vqkd", "--config.model.quantizer=simqv"),
    ("vqkd", "--config.model.quantizer=fsq"),
    ("vqkd", "--config.model.fsq_levels='(1, 32)'"),
    ("vqkd", "--config.model.fsq_levels='(8, 4)'"),
    ("vqkd", "--config.model.quantizer=fsq --config.model.fsq_levels='(8, 5, 5, 5)'"),
    ("vqkd", "--config.model.quantizer=simvq --config.revive=True"),
    ("vqkd", "--config.model.quantizer=simvq --config.kmeans_again='2 steps'"),
    (
        "vqkd",
        "--config.model.quantizer_gradient=rotation --config.model.quantizer=fsq --config.model.fsq_levels='(8, 4)' "
        "--config.model.code_dim=2",
    ),
    ("cluster", "--config.clustering.max_tokens=31"),
    ("cluster", "--config.clustering.components=-1"),
    ("cluster", "--config.clustering.iterations=0"),
    ("cluster", "--config.teacher.features=''"),
    ("mim", "--config.model.early_layer=4"),
    ("segment", "--config.model.out_layers=(1,2,3,4)"),
    ("segment", "--config.model.out_layers=(1,)"),
    ("mim", "--config.data.num_workers=-1"),
    ("probe", "--config.data.train_labels=10"),
    ("finetune", "--config.data.train_labels=110%"),
    ("finetune", "--config.data.train_labels='0 shots'"),
    ("finetune", "--config.class_weights=balance"),
    ("finetune", "--config.evaluation.crop_fraction=95.0"),
    ("mim", "--config.optim.spike_factor=0.5"),
    ("mim", "--config.run.hang_timeout=-1"),
    ("probe", "--config.probe.learning_rates=()"),
    ("probe", "--config.probe.protocol=dino"),
    ("probe", "--config.probe.validation_fraction=1.0"),
    ("probe", "--config.probe.knn_temperature=0.0"),
    ("dense", "--config.dense.neighbors=(0,3)"),
    ("dense", "--config.dense.strengths=()"),
    ("dense", "--config.dense.validation_fraction=1.0"),
    ("dense", "--config.dense.max_patches=-1"),
    ("dense", "--config.backbone.run=''"),
    ("mim", "--config.efficiency.accumulation_steps=3"),
    ("segment", "--config.evaluation.stride=0"),
    ("segment", "--config.views.short_side=2000"),
    ("segment", "--config.evaluation.scales=()"),
    ("segment", "--config.views.min_ratio=0.4 --config.views.max_ratio=0.3"),
    ("segment", "--config.views.max_ratio=0.0"),
    ("segment", "--config.views.max_class_fraction=2.0"),
    ("extract", "--config.teacher.weights=''"),
    ("finetune", "--config.data.source=''"),
    ("mim", "--config.tokenizer.codes=''"),
    ("mim", "--config.tokenizer.run=DIR"),
    ("vqkd", "--config.teacher.weights=''  --config.views.num_views=1"),
    ("mim", "--config.views.num_views=0"),
    # the keys of a pipeline: shared ones where stages share them
    ("pipeline", "--config.teacher.weights=''"),
    ("pipeline", "--config.teacher.weights=https://hub/clip.pt"),
    ("pipeline", "--config.tokenizer_views.image_size=100"),
    ("quickstart", "--config.efficiency.dtype=bf16"),
    ("quickstart", "--config.stages.mim.run.batch_size=0"),
]
"""What `config.validate` refuses, with 1000 training images."""

COMMANDS = [
    ("--workdir=w", "", "--config=configs/quickstart.py", "--config=configs/quickstart.py"),
    ("--config=configs/mim.py", "", "--workdir=runs/NAME", "--workdir=runs/NAME"),
    ("--workdir=w", "--config=mim:large", "--config=configs/mim.py:large", "--config=configs/mim.py:large"),
    ("--workdir=w", "--config=mmi", "configs/mim.py", "--config=configs/mim.py"),
    ("--workdir=w", "--config=configs/mmi.py", "configs/mim.py", "--config=configs/mim.py"),
    ("--workdir=w", "--config=beitv2_jax/sizes.py", "--config=configs/NAME.py", "--config=configs/mim.py"),
    ("--workdir=w", "--config=configs/mim.py:lrge", "large", "--config=configs/mim.py:large"),
    (
        "--workdir=w",
        "--config.seed=1 --config=configs/mim.py",
        "--config=FILE --config.seed=1",
        f"{MIM} --config.seed=1",
    ),
    (MIM, "--config.optim.peek_lr=1", "--config.optim.peak_lr=1", "--config.optim.peak_lr=1"),
    (MIM, "--config.optim.foo=1", "eps", "--config.optim.eps=1"),
    (MIM, "--config.run=1", "--config.run.", "--config.run.batch_size=1"),
    (MIM, "--config.run.batch_size=many", "--config.run.batch_size=2048", "--config.run.batch_size=2048"),
    (MIM, "--config.optim.betas='(.9, x'", "'(0.9, 0.999)'", "--config.optim.betas='(0.9, 0.999)'"),
    (MIM, "--plan_examples=many", "--help", "--plan_examples=1"),
    ("--config=configs/mim.py", "--wrkdir=w", "--workdir=VALUE", "--workdir=w"),
    ("--config=configs/mim.py", "--workdir=s3://b/w", "--workdir=/mnt/b/w", "--workdir=/mnt/b/w"),
    (MIM, "--foo=w", "--plan", "--plan=v5e:4"),
    (MIM, "--config.run.duration=4 steps", "in quotes", "--config.run.duration='4 steps'"),
    (MIM, "--flagfile=nowhere", "--flagfile=PATH", "--flagfile=/dev/null"),
]
"""Flags that are right, others that are not, what the advice must hold, and the others as the advice has them."""

NOT_BY_FLAGS = (
    'config/load.py: UserError( f"The home directory',
    'tasks/targets.py: UserError( f"The parts views and centre',
    "tasks/cluster.py: UserError( f\"The stage 'cluster' runs in one process",
)
"""Beginnings of errors whose remedy is not a flag."""


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def parsed(*arguments: str) -> ConfigDict:
    values = flags.FlagValues()
    parse_flags(["program", "--workdir=w", *arguments], values)
    return values.config


def alternatives(advice: str) -> list[list[str]]:
    """Return the arguments that an error says to write, each alternative as a list."""
    parts = re.split(r",? or (?=--)", advice)
    found = [re.findall(r"--[\w.]+=(?:'[^']*'|[^\s',;]*[^\s',;.:])", part) for part in parts]
    # FILE, DIR and PATH stand for what only the user knows
    return [shlex.split(" ".join(part)) for part in found if part]


@pytest.fixture(autouse=True)
def _note_errors(monkeypatch):
    note_errors(monkeypatch)


def follow(arguments: list[str], check, remedy: str | None = None) -> None:
    """Let `check` refuse the config of `arguments`, and accept it with each alternative that the error offers.

    `remedy` is the flag of an alternative that names a DIR or PATH of the user.
    """
    with provoked() as caught:
        check(parsed(*arguments))
    offered = alternatives(caught.value.instead)
    if remedy is not None:
        assert [flag.partition("=")[0] for flag in offered[0]] == [remedy.partition("=")[0]]
        offered = [[remedy]]
    assert offered, caught.value.instead
    for advice in offered:
        try:
            check(parsed(*arguments, *advice))
        except UserError as error:
            raise AssertionError(f"{' '.join(advice)} was advised, and then: {error}") from error


def validate(config: ConfigDict) -> None:
    without_loop = ("pipeline", "extract", "cluster", "tokenize", "probe", "dense")
    config_lib.validate(config, None if config.stage in without_loop else 1000)


@pytest.mark.parametrize("name, mistake", CONFIGS)
def test_advice_about_a_config(name, mistake):
    validate(parsed(*shlex.split(FLAGS[name])))
    follow([*shlex.split(FLAGS[name]), *shlex.split(mistake)], validate)


@pytest.mark.parametrize("right, mistake, advice, remedy", COMMANDS)
def test_advice_about_the_command_line(right, mistake, advice, remedy):
    with provoked() as caught:
        parse_flags(["program", *shlex.split(right), *shlex.split(mistake)], flags.FlagValues())
    assert advice in caught.value.instead
    parse_flags(["program", *shlex.split(right), *shlex.split(remedy)], flags.FlagValues())


def run_of(spec: str, **changes):
    """Return what `read_run` gives of a run with the config of `spec`; its weights hold the teacher's width alone."""
    config = parsed(spec, *(f"--config.{key}={value}" for key, value in changes.items()))
    params = {"decode_task": {"fc2": {"kernel": np.zeros((1, 3))}}, "backbone": {}}
    return types.SimpleNamespace(
        name="run@1", config=config_lib.to_json(config), params=params, model_state={}, weights_hash=""
    )


RUNS = {
    "vqkd": lambda: run_of("--config=configs/vqkd.py:smoke"),
    "vqkd160": lambda: run_of("--config=configs/vqkd.py:smoke", **{"views.image_size": 160}),
    "mim": lambda: run_of("--config=configs/mim.py:smoke"),
}
TASKS = [
    ("finetune", finetune.build, "--config.model.num_classes=9"),
    ("finetune", finetune.build, "--config.efficiency.attention=cudnn"),
    ("finetune", finetune.build, "--config.data.source=folder:unlabelled", "--config.data.source=folder:PATH"),
    ("probe", probe.build, "--config.data.source=folder:one_class", "--config.data.source=folder:PATH"),
    ("probe", probe.build, "--config.data.source=folder:several", "--config.data.source=SOURCE"),
    ("probe", probe.build, "--config.probe.layers=(0,2)"),
    ("probe", probe.build, "--config.probe.protocol=dinov3"),
    ("probe", probe.build, "--config.probe.batch_size=2000 --config.probe.duration='1 epoch'"),
    ("dense", dense.build, "--config.backbone.layer=9"),
    ("tokenize", tokenize.build, "--config.tokenizer.run=mim", "--config.tokenizer.run=vqkd"),
    ("tokenize", tokenize.build, "--config.tokenizer.run=vqkd160"),
    ("cluster", cluster.build, "--config.model.codebook_size=40000"),
    ("cluster", cluster.build, "--config.clustering.components=9"),
    ("cluster", cluster.build, "--config.teacher.features=own_program", "--config.teacher.features=DIR"),
    ("cluster", cluster.build, "--config.teacher.weights=other", "--config.teacher.weights=PATH"),
    ("live", mim.open_inputs, "--config.tokenizer.run=vqkd160"),
    ("live", mim.open_inputs, "--config.views.tokenizer_image_size=160"),
    ("live", mim.open_inputs, "--config.model.patch_size=32 --config.masking.num_masked=1"),
    ("live", mim.open_inputs, "--config.model.codebook_size=33"),
]
"""What is refused when the data and the runs of other stages are open; the last column replaces DIR and PATH."""


PATCHES_OF_32 = "--config.stages.mim.model.patch_size=32 --config.stages.mim.masking.num_masked=2"
PIPELINES = [
    ("quickstart", "--config.tokenizer_views.image_size=80"),
    ("quickstart", "--config.mim_views.image_size=96"),
    ("quickstart", "--config.stages.tokenize.views.image_size=96"),
    ("quickstart", "--config.stages.vqkd.views.image_size=96"),
    ("quickstart", "--config.stages.mim.views.image_size=96"),
    ("quickstart", "--config.stages.vqkd.model.encoder.patch_size=32 --config.stages.mim.masking.num_masked=2"),
    ("quickstart", f"--config.stages.extract.teacher.tokenizer_patch_size=32 {PATCHES_OF_32}"),
    ("quickstart", "--config.stages.mim.model.patch_size=8"),
    ("quickstart", "--config.stages.mim.model.codebook_size=12"),
    ("quickstart", "--config.stages.vqkd.views.num_views=3"),
    ("quickstart", "--config.stages.mim.views.num_views=3"),
    ("quickstart", "--config.stages.mim.views.color_jitter=0.4"),
    ("quickstart", "--config.stages.vqkd.views.min_scale=0.4"),
    ("quickstart", "--config.stages.mim.views.interpolation=bilinear"),
    ("quickstart", "--config.stages.mim.seed=3"),
    ("quickstart", "--config.stages.extract.teacher.normalization=half"),
    ("quickstart", "--config.stages.mim.mesh.data=16"),
    ("quickstart", "--config.stages.probe.probe.layers=(2,4)"),
    ("quickstart", "--config.stages.probe.backbone.run={workdir}/vqkd --config.stages.vqkd.model.encoder.depth=2"),
    (
        "quickstart",
        "--config.stages.probe.backbone.run={workdir}/tokenize",
        "--config.stages.probe.backbone.run={workdir}/mim",
    ),
    (
        "quickstart",
        "--config.stages.probe.backbone.run={workdir}/mmi",
        "--config.stages.probe.backbone.run={workdir}/mim",
    ),
    (
        "quickstart",
        "--config.stages.mim.tokenizer.codes={workdir}/extract",
        "--config.stages.mim.tokenizer.codes={workdir}/tokenize",
    ),
    (
        "quickstart",
        "--config.stages.vqkd.teacher.features={workdir}/teacher",
        "--config.stages.vqkd.teacher.features={workdir}/extract",
    ),
    (
        "quickstart",
        "--config.stages.tokenize.tokenizer.run={workdir}/teacher",
        "--config.stages.tokenize.tokenizer.run={workdir}/vqkd",
    ),
    (
        "quickstart",
        "--config.stages.extract.teacher.weights={workdir}/vqkd",
        "--config.stages.extract.teacher.weights={workdir}/teacher",
    ),
    ("quickstart", "--config.stages.vqkd.init_from={workdir}/extract", "--config.stages.vqkd.init_from="),
    ("live", "--config.tokenizer_views.image_size=112 --config.stages.mim.masking.num_masked=19"),
    ("live", "--config.stages.mim.views.tokenizer_image_size=112"),
    ("live", "--config.stages.mim.model.patch_size=32 --config.stages.mim.masking.num_masked=10"),
    ("live", "--config.stages.mim.model.codebook_size=80"),
]
"""What a pipeline refuses before its first stage, as a later stage would; the last column replaces DIR and PATH."""
PIPELINE_FLAGS = {
    "quickstart": "--config=configs/quickstart.py:smoke",
    "live": "--config=configs/pipeline.py:mini,live --config.teacher.weights=LICENSE",
}


class DataAreOpened(Exception):
    """Stands for the end of the checks of a pipeline."""

    @classmethod
    def raised(cls, config):
        raise cls


@pytest.mark.parametrize("name, mistake, remedy", [(*case, *[None] * (3 - len(case))) for case in PIPELINES])
def test_advice_about_stages_that_do_not_fit(name, mistake, remedy, monkeypatch, tmp_path):
    """Each is refused before the data are opened, and nothing is written."""
    monkeypatch.setattr(inputs, "open_sources", DataAreOpened.raised)
    monkeypatch.setattr(fit, "read_teacher", lambda **options: None)

    def start(config):
        with contextlib.suppress(DataAreOpened):
            stages.run_stage(config, str(tmp_path / "run"))

    follow([*shlex.split(PIPELINE_FLAGS[name]), *shlex.split(mistake)], start, remedy)
    assert not (tmp_path / "run").exists()


def open_features(monkeypatch) -> None:
    """Let DIR and PATH be features of ten images of 36 patches by an extract stage, and own-program ones by none."""
    manifest = {"teacher": "owl", "teacher_hash": "1", "teacher_width": 8}
    reader = FakeSource(10)
    reader.unreadable = ()
    extract = config_lib.to_json(parsed(*shlex.split(FLAGS["extract"])))

    def read_teacher(weights, **options):
        return {"weights_hash": "2" if weights == "other" else "1"}, {}

    monkeypatch.setattr(cluster.targets, "manifest_of", lambda folder, target: manifest)
    monkeypatch.setattr(cluster.targets, "check_targets", lambda *arguments: None)
    monkeypatch.setattr(cluster.targets, "open_cache", lambda *arguments: (reader, reader))
    monkeypatch.setattr(cluster, "is_run", lambda folder: folder != "own_program")
    monkeypatch.setattr(cluster, "read_config", lambda folder: json.loads(extract))
    monkeypatch.setattr(cluster, "read_teacher", read_teacher)


@pytest.mark.parametrize("name, build, mistake, remedy", [(*case, *[None] * (4 - len(case))) for case in TASKS])
def test_advice_about_data_and_runs(name, build, mistake, remedy, monkeypatch):
    def open_sources(config):
        source = FakeSource({"folder:unlabelled": 0, "folder:one_class": 1}.get(config.data.source, 10))
        source.multi_label = config.data.source == "folder:several"
        return source, source

    monkeypatch.setattr(FakeSource, "__len__", lambda source: 1000)
    monkeypatch.setattr(inputs, "open_sources", open_sources)
    monkeypatch.setattr(finetune, "make_task", lambda config, opened: None)
    monkeypatch.setattr(segment, "check_numbers", lambda *_, **__: None)
    monkeypatch.setattr(probe.jax, "jit", lambda function: lambda key: {"params": {"backbone": {}}})
    for module in (runs, weights):
        monkeypatch.setattr(module, "is_run", RUNS.__contains__)
        monkeypatch.setattr(module, "read_config", lambda run: json.loads(RUNS[run]().config))
    for module in (weights, tokenize):
        monkeypatch.setattr(module, "read_run", lambda run, average=False: RUNS[run]())
    open_features(monkeypatch)
    right, wrong = shlex.split(FLAGS[name]), shlex.split(mistake)
    build(parsed(*right))
    follow([*right, *wrong], lambda config: (config_lib.validate(config), build(config)), remedy)


def test_every_error_about_a_config_was_provoked(request):
    """Stands last: the tests before it have noted where each error came from."""
    check_all_provoked(request, "config", "tasks", except_for=NOT_BY_FLAGS)
