"""The regress stage on a small folder of images, of pixels and of stored features, and what takes its runs."""

import pytest
from paths import ROOT
from testing import write_dark_and_light

import beitv2_jax
from beitv2_jax import config as config_lib
from beitv2_jax.convert.weights import read as read_weights
from beitv2_jax.convert.writing import write
from beitv2_jax.errors import UserError
from beitv2_jax.planning import abstract_task
from beitv2_jax.runners import stages

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("regress")
    write_dark_and_light(root / "images", train=6, validation=3)
    return root


def stage(folder, name, preset="smoke", **changes):
    config = config_lib.load(f"{ROOT / 'configs' / name}.py:{preset}").unlock()
    config.data.source = f"folder:{folder / 'images'}"
    config.update_from_flattened_dict({"views.image_size": 12, **changes})
    return config.lock()


@pytest.fixture(scope="module")
def features(folder):
    """Features of the teacher without a network."""
    given = {"teacher.weights": "pixels", "teacher.tokenizer_patch_size": 4, "output.dtype": "float32"}
    stages.run_stage(stage(folder, "extract", **given), str(folder / "extract"))
    return str(folder / "extract")


@pytest.fixture(scope="module", params=["pixels", "features"])
def run(request, folder, features):
    sizes = {"model.patch_size": 4, "masking.num_masked": 4, "masking.min_patches": 1}
    given = {"teacher.features": features, "views.num_views": 1, "views.min_scale": 0.08}
    config = stage(folder, "regress", **sizes, **(given if request.param == "features" else {}))
    workdir = str(folder / request.param)
    return workdir, config, stages.run_stage(config, workdir)["metrics"]


def test_it_is_planned_and_measured(run):
    _, config, metrics = run
    assert 0 < metrics["eval/final_loss"] < 5 and 0 < metrics["eval/aggregation_loss"] < 5
    complete, _ = abstract_task.complete(config)
    described = abstract_task.describe(complete, 12)
    assert ("teacher_features" in described.batch) == bool(config.teacher.features)


def test_later_stages_take_it(run, folder, tmp_path):
    workdir, _, _ = run
    probed = stages.run_stage(stage(folder, "probe", **{"backbone.run": workdir}), str(tmp_path / "probe"))
    assert 0 <= probed["metrics"]["pretrained/cls/linear"] <= 1
    tuned = stage(folder, "finetune", "", **{"init_from": workdir, "data.num_threads": 2, "run.duration": "2 steps"})
    with tuned.unlocked():
        tuned.optim.warmup, tuned.run.batch_size, tuned.efficiency.dtype = "1 step", 8, "float32"
        tuned.run.update(checkpoint_every="2 steps", eval_every="2 steps")
    stages.run_stage(tuned, str(tmp_path / "finetune"))
    tokens = beitv2_jax.load_backbone(workdir)(sorted((folder / "images" / "validation").rglob("*.png"))[:2])
    assert len(tokens.cls) == 2
    weights = read_weights(workdir)
    write(weights, str(tmp_path / "copy"), "run")
    assert read_weights(str(tmp_path / "copy")).arguments["target_width"] == 48
    for layout in ("official", "timm", "huggingface"):
        with pytest.raises(UserError, match="pixels or features"):
            write(weights, str(tmp_path / layout / "w.npz"), layout)


def test_its_features_are_clustered_without_a_network(folder, features):
    given = {"teacher.features": features, "model.patch_size": 4, "model.codebook_size": 5}
    stages.run_stage(stage(folder, "cluster", **given), str(folder / "cluster"))
    tokenizer = beitv2_jax.load_tokenizer(str(folder / "cluster"))
    ids = tokenizer.encode(sorted((folder / "images" / "train").rglob("*.png")))
    assert ids.shape == (12, 3, 3) and ids.max() < 5
