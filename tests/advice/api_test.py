"""Every error of the Python API and of the verbs: provoked, its advice followed, and then it is gone."""

import os
import re
import shlex
import sys

import numpy as np
import pytest
from convert_states import KINDS, drawn_weights
from PIL import Image
from user_errors import check_all_provoked, provoked

import beitv2_jax
from beitv2_jax import cli
from beitv2_jax.command_line import check_out
from beitv2_jax.convert import __main__ as convert
from beitv2_jax.convert.writing import write


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        write(drawn_weights(kind, position="absolute" if kind == "vqkd" else "relative"), str(root / kind), "run")
    return root


LOADERS = {
    "vqkd": beitv2_jax.load_tokenizer,
    "classifier": beitv2_jax.load_classifier,
    "segmenter": beitv2_jax.load_segmenter,
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_kind(kind, runs):
    for wanted, load in LOADERS.items():
        if wanted == kind:
            load(runs / kind)
            continue
        with provoked("Pass the path of a ") as caught:
            load(runs / kind)
        if "load_backbone" in caught.value.instead:
            beitv2_jax.load_backbone(runs / kind)


def test_images(runs, tmp_path):
    classifier = beitv2_jax.load_classifier(runs / "classifier")
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    right = [tmp_path / "a.png", np.zeros((20, 20, 3), np.uint8)]
    for wrong, advice in (
        ([], "Pass at least one image"),
        (tmp_path / "b.png", "Pass the path of an image file"),
        (np.zeros((20, 20, 3), np.float32), "Pass arrays of the shape (height, width, 3) and the type uint8"),
        (np.zeros((20, 20, 1), np.uint8), "Pass arrays of the shape (height, width, 3) and the type uint8"),
    ):
        with provoked(advice):
            classifier.logits(wrong)
    assert classifier.logits(right).shape == (2, 17)


def test_code_ids(runs):
    tokenizer = beitv2_jax.load_tokenizer(runs / "vqkd")
    with provoked("Pass an array of the shape (images, 3, 3), as encode returns it"):
        tokenizer.decode(np.zeros((3, 3), int))
    with provoked("Pass ids from 0 to ") as caught:
        tokenizer.decode(np.full((1, 3, 3), 19))
    largest = int(re.search(r"to (\d+)\.", caught.value.instead)[1])
    assert tokenizer.decode(np.full((1, 3, 3), largest)).shape == (1, 3, 3, 23)


def test_layers(runs):
    backbone = beitv2_jax.load_backbone(runs / "mim")
    for layer in (0, 3):
        with provoked("Pass layers from 1 to 2") as caught:
            backbone.token_function(["cls"], [layer])
        assert "Did you mean layer 2" in caught.value.meant
    backbone.token_function(["cls"], [1, 2])


def test_verbs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["beitv2", "trian"])
    assert cli.main() == 2
    printed = capsys.readouterr().err
    assert "Did you mean 'train'?" in printed
    assert re.search(r"one of (.*)\.", printed)[1].split(", ") == list(cli.VERBS)


def test_a_command_line_that_is_not_valid(runs, tmp_path, capsys):
    assert convert.main(["--layuot=official"]) == 2
    advised = re.search(r"Write python -m beitv2_jax.convert (.*), or see", capsys.readouterr().err)[1]
    names = {"SOURCE": str(runs / "mim"), "DEST": os.fspath(tmp_path / "w.npz")}
    assert convert.main([*(names[name] for name in shlex.split(advised)), "--layout=official"]) == 0


def test_the_place_of_results(tmp_path):
    out = tmp_path / "new" / "results.json"
    with provoked("Write --out in a folder that exists"):
        check_out(str(out), "Did you measure these weights before?")
    out.parent.mkdir()
    out.touch()
    with provoked("Write another --out, or delete the old one") as caught:
        check_out(str(out), "Did you measure these weights before?")
    assert caught.value.meant == "Did you measure these weights before?"
    out.unlink()
    check_out(str(out), "")


def test_every_error_of_the_api_and_the_verbs_was_provoked(request):
    check_all_provoked(request, "api.py", "cli.py", "command_line.py")
