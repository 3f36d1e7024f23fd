"""Weights on the Hugging Face hub, read from a cache that is made here; nothing is asked of the network."""

import json
import logging as python_logging
import sys

import huggingface_hub
import pytest
from convert_states import assert_same, drawn_weights
from huggingface_hub import constants, errors
from ml_collections import ConfigDict

from beitv2_jax import api, predict
from beitv2_jax.config.paths import HubAddress, parse_hub
from beitv2_jax.convert import hub
from beitv2_jax.convert.__main__ import main as convert
from beitv2_jax.convert.teachers.load import load_teacher
from beitv2_jax.convert.weights import read
from beitv2_jax.convert.writing import write
from beitv2_jax.errors import UserError
from beitv2_jax.runners.provenance import describe_networks

COMMITS = ("1" * 40, "2" * 40)
IMAGENET = {"pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Return a cache of the hub: two revisions of 'org/timm', 'org/files' of three weights, and the run 'org/run'."""
    root = tmp_path_factory.mktemp("hub")

    def snapshot(name, commit=COMMITS[0]):
        repository = root / f"models--org--{name}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(COMMITS[0])
        (repository / "snapshots" / commit).mkdir(parents=True)
        return repository / "snapshots" / commit

    for seed, commit in enumerate(COMMITS):
        folder = snapshot("timm", commit)
        weights = drawn_weights("classifier", position="relative", seed=seed)
        write(weights, str(folder / "model.safetensors"), "timm")
        labels = {"label_names": [f"n{number}" for number in range(17)], "label_descriptions": {"n1": "a cat"}}
        (folder / "config.json").write_text(json.dumps(IMAGENET | labels))
    folder = snapshot("files")
    for seed, name in enumerate(("a.pth", "b.pth", "c/d.pth")):
        write(drawn_weights("mim", position="relative", seed=seed), str(folder / name), "official")
    write(drawn_weights("mim", position="relative", seed=7), str(snapshot("run") / "written"), "run")
    folder = root / "models--org--run" / "snapshots" / COMMITS[0]
    for part in list((folder / "written").iterdir()):
        part.rename(folder / part.name)
    (folder / "written").rmdir()
    snapshot("empty")
    return root


@pytest.fixture(autouse=True)
def _offline(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub._fetched.cache_clear()
    yield
    hub._fetched.cache_clear()


def mim(seed):
    return drawn_weights("mim", position="relative", seed=seed).variables["params"]


def test_a_repository_of_timm_is_a_classifier_with_the_names_of_its_classes():
    classifier = api.load_classifier("hf:org/timm")
    expected = drawn_weights("classifier", position="relative", seed=0)
    assert_same(classifier.weights.variables["params"], expected.variables["params"])
    assert (classifier.weights.layout, classifier.weights.normalization_known) == ("timm", True)
    assert classifier.class_names == ("n0", "a cat", *(f"n{number}" for number in range(2, 17)))


def test_a_revision_and_a_file_choose(caplog):
    expected = drawn_weights("classifier", position="relative", seed=1)
    assert_same(read(f"hf:org/timm@{COMMITS[1]}").variables["params"], expected.variables["params"])
    with caplog.at_level(python_logging.INFO):
        assert_same(read("hf:org/files").variables["params"], mim(0))
    assert "a.pth; not read: b.pth, c/d.pth" in caplog.text
    assert_same(read("hf:org/files/b.pth").variables["params"], mim(1))
    assert_same(read("hf:org/files/c/d.pth").variables["params"], mim(2))


def test_a_run_is_read_and_every_place_that_takes_weights_takes_an_address(tmp_path, capsys):
    assert_same(read("hf:org/run").variables["params"], mim(7))
    config = ConfigDict({"backbone": {"run": "hf:org/run"}, "teacher": {"weights": "hf:org/files", "state_dict": ""}})
    found = describe_networks(config)
    assert found["backbone.run"].startswith("step 0, weights ") and found["teacher.weights"].startswith("weights ")
    teacher, params = load_teacher("hf:org/run", image_size=9)
    assert_same(params["backbone"], mim(7)["backbone"])
    assert teacher.grid == (3, 3)
    assert convert(["hf:org/files/b.pth", str(tmp_path / "run")]) == 0
    assert_same(read(str(tmp_path / "run")).variables["params"], mim(1))
    (tmp_path / "x.png").touch()
    assert predict.main(["hf:org/files", str(tmp_path / "x.png")]) == 2
    assert "kind 'mim', which predict no classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "happened", "instead"),
    [
        ("hf:org/nothing", "not in the cache, and the Hugging Face hub cannot be reached", "hf download org/nothing"),
        ("hf:org/timm@v2", "not in the cache", "hf download org/timm"),
        ("hf:org/files/e.pth", "has no file e.pth", "hf:org/files/FILE"),
        ("hf:org/empty", "has no weights file", "a repository with a file"),
        ("hf:timm", "is no address", "hf:OWNER/NAME"),
        ("hf://org/timm", "is no address", "hf:OWNER/NAME"),
    ],
)
def test_what_is_not_there_is_named(address, happened, instead):
    with pytest.raises(UserError) as caught:
        api.load_backbone(address)
    assert happened in caught.value.happened and instead in caught.value.instead


@pytest.mark.parametrize(
    ("name", "happened"),
    [
        ("GatedRepoError", "only to users who have asked for access"),
        ("RepositoryNotFoundError", "has no repository org/new"),
        ("RevisionNotFoundError", "has no revision 'v3'"),
    ],
)
def test_what_the_hub_answers_is_explained(monkeypatch, name, happened):
    error_class = getattr(errors, name)

    def refuse(*args, **options):
        raise error_class.__new__(error_class)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=happened):
        read("hf:org/new@v3")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install \"beitv2_jax\[hub\]\""):
        read("hf:org/timm")


def test_the_parts_of_an_address():
    assert parse_hub("W", "hf:microsoft/beit-base") == HubAddress("microsoft/beit-base", None, None)
    assert parse_hub("W", "hf:a/b@v1.0/c/d.pth") == HubAddress("a/b", "v1.0", "c/d.pth")
    assert parse_hub("W", "hf:timm/beitv2_base.in1k/x.bin") == HubAddress("timm/beitv2_base.in1k", None, "x.bin")


def test_other_paths_stay_as_they_are():
    assert hub.local_path("runs/x") == "runs/x" and hub.local_path("/a/hf:b/c") == "/a/hf:b/c"
