"""The command line of the converter: its output, its errors, and run directories that later stages can read."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from beit_peers import peer
from convert_states import assert_same, drawn_state, drawn_weights
from paths import ROOT
from safetensors.numpy import load_file

from beitv2_jax import config as config_lib
from beitv2_jax.convert.__main__ import _parser, main, summary
from beitv2_jax.convert.runs import read_run
from beitv2_jax.convert.torch_files import writer
from beitv2_jax.convert.weights import read
from beitv2_jax.convert.writing import write
from beitv2_jax.errors import UserError
from beitv2_jax.models.preprocess import to_unit_range
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.runners.stages import run_stage
from beitv2_jax.tasks.tokenize import load_tokenizer

CONFIGS = ROOT / "configs"


def test_the_summary_is_printed(tmp_path, capsys):
    source, dest = tmp_path / "mim.npz", tmp_path / "run"
    write(drawn_weights("mim", position="relative_shared", depth=3), str(source), "official")
    assert main([str(source), str(dest)]) == 0
    printed = capsys.readouterr().out
    for part in (
        f"mim in layout official -> {dest} in layout run",
        "num_heads: 2",
        "early_layer: 1",
        "not read: rel_pos_bias.relative_position_index (computed from the grid)",
        "assumed: early_layer=1: three layers before the last",
        "assumed: normalization=imagenet",
    ):
        assert part in printed, (part, printed)
    assert f"{read(str(dest)).num_params:,} parameters" in printed
    assert main([str(dest), str(tmp_path / "hf"), "--layout=huggingface"]) == 0
    assert "and 29 more (no Hugging Face model has the patch-aggregation head)" in capsys.readouterr().out


def test_options_reach_the_weights(tmp_path, capsys):
    source = tmp_path / "absolute.npz"
    write(drawn_weights("classifier", grid=3), str(source), "official")
    options = ["--image_size=12", "--num_heads=5", "--normalization=half"]
    assert main([str(source), str(tmp_path / "run"), *options]) == 0
    assert "assumed" not in capsys.readouterr().out
    run = read_run(str(tmp_path / "run"))
    assert run.config["views"] == {"image_size": 12} and run.config["normalization"] == "half"
    assert run.config["model"]["num_heads"] == 5
    assert run.params["backbone"]["pos_embed"].shape == (1, 17, 10)


def test_one_of_several_state_dicts_can_be_chosen(tmp_path, capsys):
    trained, average = (drawn_state("classifier", position="relative", seed=seed) for seed in (1, 2))
    wrapped = {f"_orig_mod.model.{name}": array for name, array in trained.items()}
    writer.save(tmp_path / "w.pth", {"model": wrapped, "model_ema": average})
    for options, expected, said in (
        ([], trained, ["assumed: state_dict=model: the file also has model_ema"]),
        (["--state_dict=model_ema"], average, []),
    ):
        dest = tmp_path / f"run{len(options)}"
        assert main([str(tmp_path / "w.pth"), str(dest), *options]) == 0
        assert [line for line in capsys.readouterr().out.splitlines() if "state_dict=" in line] == said
        np.testing.assert_array_equal(read_run(str(dest)).params["head"]["kernel"], expected["head.weight"].T)
    strange = {f"learner.net.{name}": array for name, array in trained.items()}
    np.savez(tmp_path / "strange.npz", **strange)
    assert main([str(tmp_path / "strange.npz"), str(tmp_path / "run")]) == 2
    assert "Write --state_dict=learner.net " in capsys.readouterr().err
    assert main([str(tmp_path / "strange.npz"), str(tmp_path / "run"), "--state_dict=learner.net"]) == 0


def test_errors_have_three_sentences_and_leave_no_files(tmp_path):
    np.savez(tmp_path / "wrong.npz", extra=np.ones(3))
    command = [sys.executable, "-m", "beitv2_jax.convert", str(tmp_path / "wrong.npz"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 3
    assert "'extra'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.npz"]


def test_a_reader_that_closes_the_pipe_does_no_harm(tmp_path):
    write(drawn_weights("classifier", position="relative"), str(tmp_path / "w.npz"), "official")
    command = [sys.executable, "-m", "beitv2_jax.convert", str(tmp_path / "w.npz"), str(tmp_path / "run")]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert read(str(tmp_path / "run")).kind == "classifier"


@pytest.mark.parametrize(
    "argv, named",
    [
        (["weights.pth"], "DEST"),
        (["weights.pth", "run", "--layout=tim"], "'timm'"),
        (["weights.pth", "run", "--image_size=large"], "'large'"),
        (["absent.pth", "run"], "absent.pth"),
    ],
)
def test_wrong_arguments_end_with_three_sentences(argv, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    printed = capsys.readouterr().err
    assert named in printed
    for line in printed.splitlines():
        assert line[-1] in ".?", line
    assert len(printed.splitlines()) == 3 and not list(tmp_path.iterdir())


def test_a_destination_that_cannot_be_written_leaves_no_files(tmp_path, capsys):
    source = tmp_path / "mim.npz"
    write(drawn_weights("mim", position="relative_shared"), str(source), "official")
    (tmp_path / "file").write_text("not a folder")
    for dest, options in ((tmp_path / "file" / "run", []), (tmp_path / "file" / "out.pth", ["--layout=official"])):
        assert main([str(source), str(dest), *options]) == 2
        assert capsys.readouterr().err.startswith(f"Error: Cannot write {dest}: ")
    assert {path.name for path in tmp_path.iterdir()} == {"mim.npz", "file"}


def test_help_shows_an_example_that_parses(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    examples = [line.split()[3:] for line in printed.splitlines() if line.startswith("  python -m beitv2_jax.convert")]
    assert len(examples) == 4
    for example in examples:
        assert _parser().parse_args(example).source == example[0]


@pytest.mark.parametrize("layout", ("official", "timm", "huggingface", "run"))
def test_conversion_between_any_two_layouts(layout, tmp_path):
    source = peer("huggingface_relative").write(tmp_path / "theirs")
    weights = read(source)
    middle = str(tmp_path / ("middle.safetensors" if layout in ("official", "timm") else "middle"))
    assert main([source, middle, f"--layout={layout}"]) == 0
    assert main([middle, str(tmp_path / "back"), "--layout=huggingface"]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert_same(back, peer("huggingface_relative").state)
    assert_same(read(middle).variables["params"], weights.variables["params"])


def test_a_converted_tokenizer_computes_the_codes_of_the_model(tmp_path):
    weights = drawn_weights("vqkd", patch_size=3, grid=3)
    write(weights, str(tmp_path / "tokenizer"), "run")
    tokenizer, variables = load_tokenizer(str(tmp_path / "tokenizer"), 9, "float32")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 3)).astype(np.float32)
    expected = VQKD.from_arguments(weights.arguments).apply(
        weights.variables, to_unit_range(jnp.asarray(pixels)), method="encode"
    )
    ids = tokenizer.encode(variables, jnp.asarray(pixels))
    assert len(set(np.asarray(ids).ravel())) > 1
    np.testing.assert_array_equal(ids, expected)


def test_training_does_not_start_in_a_converted_directory(tmp_path):
    write(drawn_weights("mim"), str(tmp_path / "run"), "run")
    config = config_lib.load(f"{CONFIGS / 'mim.py'}:smoke").unlock()
    config.tokenizer.run = "nowhere"
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match="another config"):
        run_stage(config, str(tmp_path / "run"))
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_long_lists_are_shortened():
    weights = drawn_weights("classifier", position="relative")
    text = summary(weights, "dest", "timm", {"a": "why", "b": "why", "c": "else"})
    assert "not written: a and 1 more (why)" in text and "not written: c (else)" in text
