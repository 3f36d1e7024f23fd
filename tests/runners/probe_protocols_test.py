"""The protocols `ep` and `capi` through the probe stage: what they report and what they keep."""

import json

import jax
import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from beitv2_jax import config as config_lib
from beitv2_jax.convert.runs import write_run
from beitv2_jax.evaluation.protocols import capi
from beitv2_jax.runners import stages
from beitv2_jax.tasks import finetune


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder of 24 + 10 images, red and blue, and the untrained run of a small ViT of 4 patches."""
    root, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 5)):
        for label, channel in (("blue", 2), ("red", 0)):
            folder = root / "images" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                image = rng.integers(0, 100, (32, 32, 3), dtype=np.uint8)
                image[..., channel] += 150
                Image.fromarray(image).save(folder / f"{index:02d}.png")
    config = config_lib.load(f"{ROOT / 'configs/teacher.py'}:smoke").unlock()
    config.data.source = f"folder:{root / 'images'}"
    config.views.image_size = 32
    config.model.update(depth=1, num_classes=2)
    variables = jax.tree.map(np.asarray, jax.jit(finetune.build(config).init)(jax.random.key(0)))
    write_run(str(root / "run"), json.loads(config_lib.to_json(config)), variables)
    return root


def probed(inputs, workdir, protocol, **settings):
    config = config_lib.load(f"{ROOT / 'configs/probe.py'}:smoke").unlock()
    config.data.source, config.backbone.run = f"folder:{inputs / 'images'}", str(inputs / "run")
    config.views.image_size = 32
    config.probe.update(protocol=protocol, layers=(1,), **settings)
    config.run.batch_size = 8
    return stages.run_stage(config, str(workdir))["metrics"]


@pytest.mark.long
def test_ep_reports_the_last_epoch_and_the_best_beside_it(inputs, tmp_path):
    metrics = probed(inputs, tmp_path, "ep", duration="9 steps", batch_size=8)
    kinds = {
        name.removeprefix("pretrained/"): value for name, value in metrics.items() if name.startswith("pretrained/")
    }
    assert set(kinds) == {
        *(f"{name}/knn_{count}" for name in ("cls", "cls_normed") for count in (5, 10, 15, 20, 24)),
        *(f"{head}{suffix}" for head in ("cls/linear", "patches/efficient") for suffix in ("", "_best_on_validation")),
    }
    for head in ("cls/linear", "patches/efficient"):
        assert kinds[head] <= kinds[f"{head}_best_on_validation"]
        assert metrics[f"chosen/pretrained/{head}_best_epoch"] in (1, 2, 3)
    assert all(value in np.arange(11) / 10 for value in kinds.values())
    assert metrics["train_examples"] == 24 and metrics["eval_examples"] == 10
    tokens = {path.parent.name.partition(".")[0]: np.load(path) for path in tmp_path.glob("features/*/patches.npy")}
    assert {name: (array.shape, array.dtype) for name, array in tokens.items()} == {
        "pretrained_train": ((24, 1, 4, 64), np.float16),
        "pretrained_validation": ((10, 1, 4, 64), np.float16),
    }


@pytest.mark.long
def test_capi_separates_two_colours_and_reports_what_it_chose(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        capi, "KINDS", {kind: capi.KINDS[kind] for kind in ("cls_and_mean_normed/linear", "patches_normed/attentive")}
    )
    metrics = probed(inputs, tmp_path, "capi", duration="200 steps", batch_size=16)
    for kind in capi.KINDS:
        assert metrics[f"pretrained/{kind}"] >= 0.9
        assert metrics[f"chosen/pretrained/{kind}_rate"] in capi.RATES
        assert metrics[f"chosen/pretrained/{kind}_weight_decay"] in capi.WEIGHT_DECAYS
        assert metrics[f"chosen/pretrained/{kind}_held_out"] in (0.0, 0.5, 1.0)
