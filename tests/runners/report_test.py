"""Reports of workdirs that are written here by hand: what they show, of one run, of a pipeline and of several."""

import base64
import json
import re

import pytest
from PIL import Image

from beitv2_jax import config as config_lib
from beitv2_jax.report.key_metrics import key_metrics
from beitv2_jax.runners import closing, report, workdirs

METRICS = {"loss": 2.5, "eval/accuracy": 0.75, "eval/loss": 0.9, "eval/examples": 100, "steps": 20, "seconds": 61.0}

TEACHERS = [{"name": "dinov3", "license": "dinov3-license", "origin": "unknown"}]


def write_run(workdir, stage="finetune", *, metrics=METRICS, ended=True, **changes):
    """Write what a run leaves: evaluations at steps 10 and 20, of which the first has the better accuracy."""
    (workdir / "checkpoints" / "10").mkdir(parents=True)
    (workdir / "checkpoints" / "20").mkdir()
    config = config_lib.load(f"configs/{stage}.py")
    config.data.source = "folder:birds"
    config.update_from_flattened_dict(changes)
    (workdir / "config.json").write_text(config_lib.to_json(config))
    if ended:
        summary = {"stage": config.stage, "seconds": 61.0, "metrics": metrics}
        (workdir / "summary.json").write_text(json.dumps(summary))
    lines = [
        {"step": 10, "loss": 3.5, "learning_rate": 0.001, "nonfinite_steps": 0},
        {"step": 10, "eval/accuracy": 0.875, "eval/loss": 1.5, "eval/examples": 100},
        {"step": 20, "loss": 2.5, "learning_rate": 0.0, "nonfinite_steps": 0},
        {"step": 20, "eval/accuracy": 0.75, "eval/loss": 0.9, "eval/examples": 100},
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"source": "folder:birds@1", "split": "train", "examples": 1234, "classes": ["crow", "owl"], "digest": ""}
    inputs = {"train": data, "eval": {**data, "split": "val", "examples": 100}, "teachers": TEACHERS}
    (workdir / "inputs.json").write_text(json.dumps(inputs))
    workdirs.write_started(str(workdir), config, config_lib.load(f"configs/{stage}.py"))
    Image.new("RGB", (20, 10), "red").save(workdir / "examples.jpg")
    return workdir


def page(folder):
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def rows(markdown, first):
    """Return the cells of the lines of tables that begin with the cell `first`."""
    lines = [re.split(r" *\| *", line.strip("| ")) for line in markdown.splitlines() if line.startswith("|")]
    return [line[1:] for line in lines if line[0] == first]


def test_a_run_is_shown_with_metrics_curves_data_settings_and_start(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs.sys, "orig_argv", ["python", "-m", "beitv2_jax.main", "--config=x.py", "--a=b c"])
    workdir = write_run(tmp_path / "birds", **{"optim.peak_lr": 0.25, "run.keep_best": "eval/accuracy"})
    assert report.write_report([workdir], workdir) == workdir / "report.html"
    markdown, html = page(workdir)
    assert "accuracy 75.0% on validation (train loss 2.500)" in markdown
    assert "best eval/accuracy, 0.875 at step 10," in markdown
    assert rows(markdown, "optim.peak_lr")[0] == ["0.25", "0.0005"]
    assert rows(markdown, "train") == [["1,234", "2", "folder:birds@1"]]
    unknown = "unknown (teacher.license and teacher.origin of the stage that reads the teacher state them)"
    assert rows(markdown, "dinov3") == [["dinov3-license", unknown]] and "dinov3-license" in html
    assert "python -m beitv2_jax.main \\\n  --config=x.py \\\n  '--a=b c'" in markdown
    assert f"jax {workdirs.metadata.version('jax')}" in rows(markdown, "versions")[0][0]
    assert "![curves](curves.svg)" in markdown and (workdir / "curves.svg").read_text().startswith("<svg")
    assert "nonfinite_steps" not in (workdir / "curves.svg").read_text()
    for kept in ("accuracy 75.0% on validation", "optim.peak_lr", "evaluation: 0.75 at step 20", "1,234"):
        assert kept in html
    # one file: pictures are inside
    data = base64.b64encode((workdir / "examples.jpg").read_bytes()).decode()
    assert f'src="data:image/jpeg;base64,{data}"' in html
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_a_pipeline_is_its_stages_in_the_order_they_began(tmp_path):
    for name, stage, time in (("a_late", "mim", "2026-01-02"), ("b_early", "finetune", "2026-01-01")):
        metrics = METRICS | {"final_loss": 1.0, "eval/final_accuracy": 0.5, "eval/majority_accuracy": 0.25}
        workdir = write_run(tmp_path / name, stage, metrics=metrics, **{"data.source": "folder:x"})
        started = json.loads((workdir / "started.json").read_text())
        (workdir / "started.json").write_text(json.dumps(started | {"time": time}))
    report.write_report([tmp_path], tmp_path)
    markdown, _ = page(tmp_path)
    assert re.findall("^## (.*)", markdown, re.MULTILINE) == ["b_early", "a_late"]
    assert rows(markdown, "b_early") == [["61", "accuracy 75.0% on validation (train loss 2.500)"]]
    assert rows(markdown, "total")[0][0] == "122"
    assert "(b_early/examples.jpg)" in markdown and "(a_late/examples.jpg)" not in markdown  # the same picture
    ended = closing.of_pipeline(str(tmp_path))
    assert f"--workdir={tmp_path}-probe --config.backbone.run={tmp_path}/a_late" in ended


def test_runs_are_compared(tmp_path, capsys):
    write_run(tmp_path / "a" / "run", **{"optim.peak_lr": 0.25})
    write_run(tmp_path / "b" / "run", metrics=METRICS | {"eval/accuracy": 0.5}, **{"optim.peak_lr": 0.5})
    write_run(tmp_path / "c" / "run", ended=False, **{"optim.peak_lr": 0.5})
    out = tmp_path / "out"
    workdirs = [str(tmp_path / name / "run") for name in "abc"]
    assert report.main([*workdirs, f"--out={out}"]) == 0
    assert capsys.readouterr().out == f"{out}/report.html\n"
    markdown, html = page(out)
    assert rows(markdown, "metric") == [["a/run", "b/run", "c/run"]]
    assert rows(markdown, "eval/accuracy") == [["0.75", "0.5", "0.75"]]
    section = markdown.partition("## Settings that differ")[2].partition("##")[0]
    assert rows(section, "optim.peak_lr") == [["0.25", "0.5", "0.5"]]
    assert len([line for line in section.splitlines() if line.startswith("|")]) == 3
    assert "Not finished: step 20 is the last one logged." in markdown
    assert all(f"{name}/run: 3.5 at step 10" in html for name in "abc")


@pytest.mark.parametrize("given", [["nowhere"], ["run", "run"], ["s3://bucket/run"], ["other"], ["damaged"]])
def test_what_is_no_workdir_is_refused_and_nothing_written(tmp_path, monkeypatch, capsys, given):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    for folder, text in (("other", '{"model_type": "beit"}'), ("damaged", '{"stage": "mi')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(text)
    assert report.main([*given, "--out=new"]) == 2
    assert capsys.readouterr().err.startswith("Error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "other", "run"]


def test_the_end_of_a_stage_names_its_result_its_files_and_the_next_command(tmp_path):
    metrics = {"reconstruction_loss": 0.5, "eval/reconstruction_loss": 0.25}
    metrics |= {"eval/codebook_usage": 0.5, "eval/codebook_perplexity": 99.0}
    changes = {"views.image_size": 64, "views.num_views": 3, "run.keep_best": "eval/accuracy"}
    workdir = str(write_run(tmp_path / "tokenizer", "vqkd", metrics=metrics, **changes))
    best = f"{workdir}/checkpoints/10"
    common = "--config.data.source=folder:birds --config.views.image_size=64"
    assert closing.of_stage(workdir).splitlines() == [
        "vqkd: finished in 61 s",
        "  reconstruction loss 0.250 (train 0.500)",
        "  codebook usage 50% of 8192, perplexity 99",
        f"  best eval/accuracy, 0.875 at step 10, is {best}",
        f"  in {workdir}: checkpoints/, metrics.jsonl, summary.json, examples.jpg",
        f"  next: python -m beitv2_jax.main --config=configs/mim.py --workdir={workdir}-mim "
        f"--config.tokenizer.run={best} {common}",
        f"  next: python -m beitv2_jax.main --config=configs/tokenize.py --workdir={workdir}-tokenize "
        f"--config.tokenizer.run={best} {common}",
    ]
    assert "next:" not in closing.of_stage(workdir, alone=False)


def test_a_probe_shows_every_accuracy_of_its_protocol():
    config = config_lib.load("configs/probe.py")
    config.probe.protocol = "dinov3"
    metrics = {"train_examples": 9, "pretrained/cls/knn_10": 0.5, "pretrained/cls/knn_20": 0.25}
    metrics |= {"pretrained/cls_normed/logistic": 0.75, "chosen/pretrained/cls_normed/logistic_c": 0.1}
    summary = {"stage": "probe", "metrics": metrics}
    assert key_metrics(summary, config) == [
        "pretrained cls: knn_10 50.0%, knn_20 25.0%",
        "pretrained cls_normed: logistic 75.0%",
    ]
    metrics = {"pretrained/cls/linear": 0.5, "pretrained/cls/knn": 0.25, "chosen/pretrained/cls/linear_rate": 0.1}
    config.probe.protocol = "ours"
    lines = key_metrics({"stage": "probe", "metrics": metrics}, config)
    assert lines == ["pretrained cls: linear 50.0%, kNN 25.0%"]
