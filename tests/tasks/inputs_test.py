"""Common to all stages: which implementations can run on a platform, and data with fewer than two classes."""

import importlib

import pytest
from paths import CONFIGS, ROOT

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.models.ops.implementations import obstacle
from beitv2_jax.runners.stages import run_stage
from beitv2_jax.tasks import finetune, inputs


@pytest.mark.parametrize("stage", ["vqkd", "mim", "finetune", "segment"])
def test_an_implementation_that_cannot_run_here_is_refused_before_anything_is_opened(stage):
    config = config_lib.load(f"{ROOT / 'configs' / stage}.py:smoke").unlock()
    inputs.check_implementations(config)
    config.efficiency.attention = "cudnn"
    with pytest.raises(UserError, match=r"efficiency\.attention='cudnn' cannot run here: cuDNN needs") as raised:
        importlib.import_module(f"beitv2_jax.tasks.{stage}").build(config)
    assert raised.value.instead.endswith("attention=auto, or one of those that run here: reference, pallas.")
    config.efficiency.attention = "reference"
    inputs.check_implementations(config)


def test_a_pipeline_is_refused_before_its_first_stage(tmp_path):
    config = config_lib.load(f"{ROOT / 'configs' / 'quickstart'}.py:smoke").unlock()
    config.efficiency.attention = "cudnn"
    with pytest.raises(UserError, match="cuDNN needs"):
        run_stage(config, str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_cudnn_needs_a_gpu_short_types_and_fitting_heads():
    fitting = {"platform": "gpu", "dtype": "bfloat16", "head_widths": [64, 128]}
    assert obstacle("cudnn", **fitting) == ""
    for change, named in (
        ({"platform": "tpu"}, "runs on tpu"),
        ({"dtype": "float32"}, "efficiency.dtype is float32"),
        ({"head_widths": [64, 60]}, "they are 60 wide"),
        ({"head_widths": [136]}, "they are 136 wide"),
    ):
        assert named in obstacle("cudnn", **{**fitting, **change})
        assert obstacle("pallas", **{**fitting, **change}) == ""


@pytest.mark.parametrize(
    ("files", "num_classes"),
    [(["train/x.png", "val/x.png"], 0), (["train/owl/x.png", "val/owl/x.png"], 1), (["train/owl/x.png"], 1)],
)
def test_fewer_than_two_classes_are_nothing_to_classify(files, num_classes, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"not decoded here")
    if len(files) == 1:  # two folders, one of them without images
        (tmp_path / "train" / "wren").mkdir()
    config = config_lib.load(str(CONFIGS / "finetune.py")).unlock()
    config.data.update(source=f"folder:{tmp_path}", eval_split="val" if len(files) > 1 else "train")
    with pytest.raises(UserError, match=f"has {num_classes} classes with images in its split train"):
        finetune.build(config)
