"""The study: its runs and their order, its tables from made-up results, and the pixels of its data set."""

import csv
import json

import numpy as np
import pytest
from paths import CONFIGS
from safetensors.numpy import save_file

from beitv2_jax import config as config_lib
from beitv2_jax.tasks import fit
from benchmarks import study
from benchmarks.study_data import decoded


@pytest.mark.long
def test_every_run_comes_once_and_after_what_it_needs():
    names = study.all_runs()
    assert len(names) == len(set(names))
    for number, name in enumerate(names):
        assert set(study.needed_by(name)) <= set(names[:number]), name
    assert {"vqkd", "vqkd-seed1", "pixels-seed2", "teacher"} <= set(names) and "teacher-seed1" not in names
    assert study.chosen_runs("cluster") == ["features", "tokenizer_cluster", "cluster"]
    with pytest.raises(SystemExit, match="clusterr"):
        study.chosen_runs("clusterr")


def test_seeds_share_tokenizers_and_not_features():
    assert study.needed_by("vqkd-seed1") == ["tokenizer"] and study.needed_by("regress-seed1") == ["features-seed1"]
    assert study.needed_by("vqkd-dim8") == study.needed_by("vqkd-dim8-seed1") == ["tokenizer-dim8"]
    assert study.needed_by("tokenizer_cluster") == ["features"]


def test_students_of_the_same_codes_read_the_same_ids():
    assert study.needed_by("vqkd-no_head-seed1") == ["vqkd-seed1"] and study.needed_by("vqkd-bfloat16") == ["vqkd"]
    stages = study.config_of("vqkd-no_head-seed1").stages
    assert list(stages) == ["mim", "probe"] and stages.mim.tokenizer.codes == "../vqkd-seed1/tokenize"
    assert stages.mim.views == study.config_of("vqkd-seed1").stages.mim.views
    assert study.needed_by("vqkd-no_head-dim8") == ["tokenizer-dim8"]  # other codes than those of vqkd


@pytest.fixture
def vit_ti16(tmp_path):
    """Return a file of ViT-Ti/16 in the layout of timm, all zeros."""
    shapes = {"cls_token": (1, 1, 192), "pos_embed": (1, 197, 192), "patch_embed.proj.weight": (192, 3, 16, 16)}
    linear = {"attn.qkv": (576, 192), "attn.proj": (192, 192), "mlp.fc1": (768, 192), "mlp.fc2": (192, 768)}
    shapes |= {f"blocks.{n}.{name}.weight": shape for n in range(12) for name, shape in linear.items()}
    shapes |= {f"blocks.{n}.{name}.weight": (192,) for n in range(12) for name in ("norm1", "norm2")}
    shapes |= {"norm.weight": (192,)}
    biases = {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items() if "weight" in name}
    path = tmp_path / "vit_ti16.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in (shapes | biases).items()}, path)
    return str(study.placed_teacher(tmp_path, path))


@pytest.mark.long
def test_every_stage_fits_what_it_finds_in_other_runs(vit_ti16):
    earlier, checked = {}, 0
    names = [name for name in study.all_runs() if name not in ("classifier", "teacher")]
    for name in ("classifier", *names):
        config = config_lib.load(f"{CONFIGS / 'study'}.py:{study.presets_of(name)}")
        config.teacher.weights = vit_ti16
        for key, stage in config_lib.resolve(config, f"/study/{name}").stages.items():
            if name == "vqkd" or stage.stage != "finetune":  # slow, and the same for every student
                fit.check(stage, earlier)
                checked += 1
            earlier[f"/study/{name}/{key}"] = stage
    assert checked > 200


@pytest.mark.long
def test_every_preset_has_a_run():
    used = {preset for name in study.all_runs() for preset in study.presets_of(name).split(",")}
    text = (CONFIGS / "study.py").read_text().partition("\nPresets\n")[2].partition('"""')[0]
    documented = {line.split()[0] for line in text.splitlines() if line.strip()}
    assert documented - used == {"smoke"} and used - documented == {""}


def finished(workdir, name, stage, **metrics):
    folder = workdir / name / stage
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"stage": stage, "seconds": 60.0, "metrics": metrics}))


def logged(workdir, name, stage, *lines):
    folder = workdir / name / stage
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def evaluated(workdir, name, usage, perplexity, loss, information):
    folder = workdir / name / "evaluation"
    folder.mkdir(parents=True)
    metrics = {"codebook_usage": usage, "codebook_perplexity": perplexity, "nmi_class": information}
    (folder / "metrics.json").write_text(json.dumps({"metrics": metrics | {"reconstruction_loss": loss}}))


def test_the_tables_hold_the_metrics_of_the_runs(tmp_path, capsys):
    probes = {"vqkd": 0.5, "vqkd-seed1": 0.6, "random": 0.2, "vqkd-no_head": 0.4}
    for name, accuracy in probes.items():
        finished(tmp_path, name, "probe", **{study.CURVE: accuracy})
    (tmp_path / "vqkd-seed2").mkdir()  # begun, nothing measured
    finished(tmp_path, "vqkd", "probe300", **{study.CURVE: 0.3})
    finished(tmp_path, "vqkd", "probe_last", **{study.CURVE: 0.45})
    finished(tmp_path, "tokenizer", "vqkd")
    evaluated(tmp_path, "tokenizer", 0.9, 123.4, 0.45, 0.1234)
    evaluated(tmp_path, "tokenizer-fsq", 1.0, 50.0, 0.5, 0.2)  # its student has not been trained
    logged(tmp_path, "tokenizer-fsq", "vqkd", {"step": 50, "reconstruction_loss": 0.6, "codebook_perplexity": 9.5})
    for name in ("vqkd", "vqkd-seed1"):
        logged(
            tmp_path, name, "mim", {"step": 50, "final_loss": 5.0, "final_accuracy": 0.25}, {"step": 50, "eval/x": 1}
        )
    study.table(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "study.md").read_text()
    assert "| MIM: VQ-KD codes | 2 | 55.0 ± 7.1 |" in text and "| random initialisation | 1 | 20.0 |" in text
    head, fsq = text.partition("## Claim 3")[2].split("## Claim 8")
    assert "Claim" not in head + fsq
    assert head.splitlines()[4:] == [
        "| vqkd | 90.0 | 123 | 0.450 | 0.123 | 2 | 55.0 ± 7.1 |  |  |",
        "| vqkd-no_head | 90.0 | 123 | 0.450 | 0.123 | 1 | 40.0 |  |  |",
        "",
    ]
    assert fsq.splitlines()[5:] == ["| vqkd-fsq | 100.0 | 50 | 0.500 | 0.200 | 0 |  |  |  |"]
    with open(tmp_path / "out" / "runs.csv") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {*probes, "tokenizer", "tokenizer-fsq"}
    assert (rows["vqkd-no_head"]["sgd"], rows["tokenizer-fsq"]["perplexity"]) == ("0.4000", "50.0000")
    with open(tmp_path / "out" / "curve.csv") as file:
        assert list(csv.reader(file))[1:] == [["vqkd", "300", "30.0000"], ["vqkd", "1500", "45.0000"]]
    for number, rows in {
        3: ["run,step,final_loss,final_accuracy", "vqkd,50,5.0000,0.2500", "vqkd-seed1,50,5.0000,0.2500"],
        8: ["run,step,reconstruction_loss,codebook_perplexity", "tokenizer-fsq,50,0.6000,9.5000"],
    }.items():
        assert (tmp_path / "out" / f"claim{number}.csv").read_text().splitlines() == rows
    for name in ("curve", "claim3", "claim8"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000
    missing = study.missing_stages(tmp_path, "vqkd")
    assert "probe" not in missing and missing[:2] == ["tokenize", "mim"]
    assert study.seconds_left(tmp_path, ["vqkd"]) == 60.0 * len(missing)
    assert study.missing_stages(tmp_path, "tokenizer") == []
    assert study.missing_stages(tmp_path, "tokenizer-dim8") == ["vqkd", "evaluation"]


def test_a_table_of_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"No run in .*runz has results"):
        study.table(tmp_path / "runz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_stored_differences_are_those_of_the_pixels():
    images = np.random.default_rng(0).integers(0, 64, (3, 32, 32, 3)) * 4 + 2
    planes = (images >> 2).transpose(0, 3, 1, 2)
    planes = np.stack([planes[:, 0] - planes[:, 1], planes[:, 1], planes[:, 2] - planes[:, 1]], axis=1)
    delta = np.diff(planes, axis=-1, prepend=0)
    delta[..., 0] = np.diff(planes[..., 0], axis=-1, prepend=0)
    np.testing.assert_array_equal(decoded((delta % 64).astype(np.uint8)), images)
