"""Stages that fill a target cache, with small untrained networks: verified, extended, used in part, refused."""

import json
import os

import pytest
from testing import variables_of

from beitv2_jax import config as config_lib
from beitv2_jax.convert.runs import write_run
from beitv2_jax.errors import UserError
from beitv2_jax.runners import stages
from beitv2_jax.tasks import finetune, vqkd
from tests.runners.stages_test import image_folder, stage_config  # noqa: F401


@pytest.fixture(scope="module")
def networks(image_folder, tmp_path_factory):  # noqa: F811
    """A workdir with runs of a teacher and of a tokenizer as they are before training."""
    workdir = tmp_path_factory.mktemp("networks")
    for name, build in (("teacher", finetune.build), ("vqkd", vqkd.build)):
        config = stage_config(image_folder, str(workdir), name)
        if name == "vqkd":
            config.teacher.update(features="", weights=str(workdir / "teacher"))
        variables = variables_of(build(config))
        write_run(str(workdir / name), json.loads(config_lib.to_json(config)), variables)
    return str(workdir)


@pytest.fixture
def extract(networks, image_folder, tmp_path):  # noqa: F811
    """A target cache of int8 features in three shards: (its config, its workdir)."""
    config = stage_config(image_folder, networks, "extract")
    config.output.update(dtype="int8", shard_examples=11, verify_examples=13)
    stages.run_stage(config, str(tmp_path / "extract"))
    return config, tmp_path / "extract"


def test_a_good_cache_passes_the_task_verify(extract):
    config, workdir = extract
    report = stages.verify_stage(config, str(workdir))
    assert json.loads((workdir / "verify.json").read_text()) == report
    for part, sample in (("views", 13), ("centre", 10)):
        assert report[part]["sample"] == sample and report[part]["bound"] == 0.9995
        assert 0.9995 < report[part]["min_cosine"] <= report[part]["mean_cosine"] < 1


def test_stored_codes_are_those_of_the_live_tokenizer(networks, image_folder, tmp_path):  # noqa: F811
    config = stage_config(image_folder, networks, "tokenize")
    config.output.shard_examples = 7
    stages.run_stage(config, str(tmp_path / "codes"))
    report = stages.verify_stage(config, str(tmp_path / "codes"))
    assert report["views"] == {"sample": 26, "bound": 0.99, "agreement": 1.0}
    with pytest.raises(UserError, match=r"no finished|no targets"):
        stages.verify_stage(config, str(tmp_path / "nowhere"))


def test_records_that_were_mixed_up_fail_the_task_verify(extract):
    """Two shards of one length change places: every file is whole, and what they hold belongs to other images."""
    config, workdir = extract
    first, second = sorted((workdir / "views").glob("*_v0*"))[:2]
    first.rename(workdir / "aside")
    second.rename(first)
    (workdir / "aside").rename(second)
    with pytest.raises(UserError, match=r"worst_view_cosine is -?0\.\d+ over 13 of them, and must be at least 0.9995"):
        stages.verify_stage(config, str(workdir))
    report = json.loads((workdir / "verify.json").read_text())
    assert report["views"]["worst_view_cosine"] < 0.9995 < report["centre"]["worst_view_cosine"]


def test_a_cache_is_extended_where_the_number_of_views_is_raised(extract, tmp_path):
    config, workdir = extract
    config.views.num_views = 3
    assert stages.run_stage(config, str(workdir))["metrics"]["views_per_example"] == 3
    stages.run_stage(config, str(tmp_path / "at_once"))
    for part in ("views", "centre"):
        grown, at_once = (
            {path.name: path.read_bytes() for path in (root / part).iterdir()}
            for root in (workdir, tmp_path / "at_once")
        )
        assert grown == at_once
    config.views.num_views = 2
    with pytest.raises(UserError, match=r"views\.num_views: 3 -> 2"):
        stages.run_stage(config, str(workdir))


def test_a_run_may_use_fewer_views_than_a_cache_has_and_not_more(extract, networks, image_folder):  # noqa: F811
    extract_config, workdir = extract
    extract_config.views.num_views = 2
    stages.run_stage(extract_config, str(workdir))
    config = stage_config(image_folder, networks, "vqkd")
    config.teacher.features = str(workdir)
    vqkd.build(config)
    config.views.num_views = 3
    with pytest.raises(UserError, match="num_views = 2, this run has 3"):
        vqkd.build(config)


def test_parts_of_two_networks_are_refused(extract, networks, image_folder):  # noqa: F811
    _, workdir = extract
    path = workdir / "centre" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "teacher_hash": "another"}))
    config = stage_config(image_folder, networks, "vqkd")
    config.teacher.features = str(workdir)
    with pytest.raises(UserError, match=r"made with teacher_hash = .* and 'another'"):
        vqkd.build(config)


def test_only_caches_can_be_verified(networks, image_folder):  # noqa: F811
    config = stage_config(image_folder, networks, "vqkd")
    with pytest.raises(UserError, match="stage 'vqkd' cannot be verified"):
        stages.verify_stage(config, os.path.join(networks, "vqkd"))
