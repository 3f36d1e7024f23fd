"""The model card states what the runs know: of the run itself, and of those that it was made from."""

import json
import shutil

import pytest
from convert_states import drawn_weights
from paths import ROOT

from beitv2_jax import config as config_lib
from beitv2_jax.convert.model_card import Licenses
from beitv2_jax.convert.runs import write_run
from beitv2_jax.convert.weights import read
from beitv2_jax.convert.writing import write


def leave_run(directory, config, *, inputs=None, metrics=None, variables=None):
    """Leave what a run leaves: config, inputs, summary and, if there are `variables`, a checkpoint."""
    content = json.loads(config_lib.to_json(config))
    if variables:
        write_run(str(directory), content, variables)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(content))
    if inputs:
        (directory / "inputs.json").write_text(json.dumps({"train": inputs}))
    if metrics:
        summary = {"stage": config.stage, "seconds": 1.0, "metrics": metrics}
        (directory / "summary.json").write_text(json.dumps(summary))


def smoke(name, **changes):
    config = config_lib.load(f"{ROOT / 'configs' / name}.py:smoke").unlock()
    for key, value in changes.items():
        section, _, field = key.partition("__")
        setattr(config[section] if field else config, field or section, value)
    return config


@pytest.fixture
def classifier(tmp_path):
    """A finetune run that began with a mim run, whose codes are of a tokenizer, which learned from stored features."""
    root = tmp_path / "private" / "pipeline"
    weights = drawn_weights("classifier", position="relative", depth=2)
    birds = {"source": "folder:birds@12", "split": "train", "examples": 1234, "classes": ["ant"] * 17}
    config = smoke("finetune", init_from="{workdir}/mim", views__image_size=9)
    config.model = {**weights.arguments, "drop_path_rate": 0.1}
    variables = {"params": weights.variables["params"], "model_state": {}}
    metrics = {"eval/accuracy": 0.8125, "steps": 4}
    leave_run(root / "finetune", config, inputs=birds, metrics=metrics, variables=variables)
    leave_run(
        root / "mim", smoke("mim", tokenizer__codes=str(root / "tokenize")), metrics={"eval/final_accuracy": 0.25}
    )
    leave_run(root / "tokenize", smoke("tokenize", tokenizer__run="{workdir}/vqkd"), metrics={"train_examples": 1234})
    used = {"eval/codebook_usage": 0.96875, "eval/codebook_perplexity": 21.5}
    leave_run(root / "vqkd", smoke("vqkd", teacher__features="{workdir}/extract"), metrics=used)
    extract = smoke("extract", teacher__weights=str(tmp_path / "private" / "ViT-B-16.pt"))
    leave_run(root / "extract", extract)
    return root / "finetune"


def test_the_card_follows_the_runs_back_to_the_teacher(classifier, tmp_path):
    weights = read(str(classifier))
    write(weights, str(tmp_path / "hub"), "huggingface", Licenses("apache-2.0", "mit"))
    card = (tmp_path / "hub" / "README.md").read_text()
    header = card.split("---")[1]
    assert 'license: "apache-2.0"' in header and 'pipeline_tag: "image-classification"' in header
    headings = [line[3:] for line in card.splitlines() if line.startswith("## ")]
    assert headings == [
        "How to use",
        "Input",
        "Training of the classifier",
        "Pre-training by masked image modelling",
        "Code ids",
        "Training of the tokenizer",
        "Teacher features",
        "Teacher",
    ]
    for fact in (
        "| images | 1,234 of folder:birds@12, split train |",
        "| eval/accuracy | 0.8125 |",
        "| init_from | mim |",
        "| eval/final_accuracy | 0.25 |",
        "| eval/codebook_usage | 0.96875 |",
        "| eval/codebook_perplexity | 21.5 |",
        "| codes | 32 |",
        "| weights | ViT-B-16.pt |",
        "| licence | mit |",
        "| origin | unknown (teacher.license and teacher.origin of the stage that reads the teacher state them) |",
        "| state | not finished when it was exported |",  # extract has no summary
    ):
        assert fact in card, fact
    assert "private" not in card


def test_what_is_not_known_is_not_stated(classifier, tmp_path):
    write(read(str(classifier)), str(tmp_path / "hub"), "timm")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "license:" not in card.split("---")[1]
    assert "| licence | unknown (teacher.license and" in card
    source = tmp_path / "hub" / "model.safetensors"
    write(read(str(source)), str(tmp_path / "again"), "huggingface")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "Converted from model.safetensors, which does not say how they were trained." in card
    assert "## Teacher" not in card


def test_a_teacher_of_ones_own_is_named_as_its_features_are(classifier, tmp_path):
    manifest = classifier.parent / "own" / "views" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"teacher": "my network", "teacher_license": "mit", "teacher_origin": "our lab"}))
    leave_run(classifier.parent / "vqkd", smoke("vqkd", teacher__features="{workdir}/own"))
    write(read(str(classifier)), str(tmp_path / "hub"), "huggingface")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| weights | my network |\n| licence | mit |\n| origin | our lab |" in card and "ViT-B-16" not in card


def test_what_the_run_has_kept_of_its_teacher_is_stated(classifier, tmp_path):
    """Also where the runs that it was made from are gone, and in the run directory that it is converted to."""
    teacher = {"name": "dinov3", "license": "dinov3-license", "origin": "hf:facebook/dinov3"}
    inputs = json.loads((classifier / "inputs.json").read_text())
    (classifier / "inputs.json").write_text(json.dumps(inputs | {"teachers": [teacher]}))
    shutil.rmtree(classifier.parent / "mim")
    write(read(str(classifier)), str(tmp_path / "hub"), "timm")
    stated = "## Teacher\n\n| | |\n|---|---|\n| weights | dinov3 |\n| licence | dinov3-license |\n"
    assert f"{stated}| origin | hf:facebook/dinov3 |" in (tmp_path / "hub" / "README.md").read_text()
    write(read(str(classifier)), str(tmp_path / "copy"), "run")
    assert json.loads((tmp_path / "copy" / "inputs.json").read_text())["teachers"] == [teacher]
