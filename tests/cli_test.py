"""The command `beitv2`, and configs that are found away from the repository."""

import importlib
import json
import re

import pytest
from absl import flags
from paths import CONFIGS

import beitv2_jax
from beitv2_jax import cli, main
from beitv2_jax.config.flags import parse_flags
from beitv2_jax.errors import UserError


def run(monkeypatch, *arguments):
    monkeypatch.setattr(cli.sys, "argv", ["beitv2", *arguments])
    return cli.main()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_verb_and_the_version(monkeypatch, capsys, arguments):
    assert run(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^  {verb} +\w", printed, re.MULTILINE) for verb in cli.VERBS)
    assert beitv2_jax.__version__ in printed


def test_a_mistyped_verb_is_corrected(monkeypatch, capsys):
    assert run(monkeypatch, "trian", "--config=x") == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_hands_its_arguments_to_its_program(monkeypatch, verb):
    module = importlib.import_module(cli.VERBS[verb][0])
    monkeypatch.setattr(module, "main", lambda: (7, list(cli.sys.argv)))
    assert run(monkeypatch, verb, "--a", "b") == (7, [f"beitv2 {verb}", "--a", "b"])


def test_configs_that_came_with_the_package_are_found_in_any_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for given in (["--config=configs/mim.py:tiny"], ["--config", "configs/mim.py:tiny"]):
        values = flags.FlagValues()
        flags.DEFINE_integer("verbosity", 0, "", flag_values=values)
        parse_flags(["program", *given, "--print_config", "--config.seed=5"], values)
        monkeypatch.setattr(main.flags, "FLAGS", values)
        main.run([])
        printed = json.loads(capsys.readouterr().out)
        assert (printed["stage"], printed["model"]["width"], printed["seed"]) == ("mim", 192, 5)
    assert list(tmp_path.iterdir()) == []


def test_configs_of_the_present_folder_come_first_and_other_folders_are_not_replaced(monkeypatch, tmp_path):
    (tmp_path / "configs").mkdir()
    text = (CONFIGS / "mim.py").read_text().replace('"seed": 0,', '"seed": 77,')
    (tmp_path / "configs" / "mim.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    values = flags.FlagValues()
    parse_flags(["program", "--config=configs/mim.py", "--workdir=w"], values)
    assert values.config.seed == 77
    with pytest.raises(UserError, match="no config file mine/vqkd"):
        parse_flags(["program", "--config=mine/vqkd.py", "--workdir=w"], flags.FlagValues())
