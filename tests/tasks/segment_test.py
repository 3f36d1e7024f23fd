"""The segmentation stage: rows that do not count, metrics by hand, starts from pre-training, a run on a folder."""

import jax
import numpy as np
import pytest
from convert_states import drawn_weights
from flax import traverse_util
from paths import CONFIGS
from PIL import Image
from without_data import FakeSource

from beitv2_jax import config as config_lib
from beitv2_jax.convert.positions import resize_relative_table
from beitv2_jax.convert.weights import read
from beitv2_jax.convert.writing import write
from beitv2_jax.data.bad_records import read_bad_records
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Compute
from beitv2_jax.report.segmentation import class_colors
from beitv2_jax.runners import stages
from beitv2_jax.tasks import inputs, segment

BATCH, CLASSES, SIDE = 5, 7, 32


def small(**model):
    config = config_lib.load(f"{CONFIGS / 'segment.py'}:smoke").unlock()
    config.views.update(image_size=SIDE, long_side=96, short_side=40)
    config.evaluation.update(long_side=96, short_side=40, stride=20)
    config.model.update(width=8, depth=1, num_heads=2, mlp_dim=12, num_classes=CLASSES, patch_size=8)
    config.model.update(out_layers=(1, 1, 1, 1), channels=5, aux_channels=3, drop_path_rate=0.0, dropout_rate=0.0)
    config.model.update(model)
    return config


def made(config):
    initial = inputs.initial_variables(config, "segmenter", segment.make_model(config, Compute()))
    return segment.make_task(config, inputs.Opened((FakeSource(0),) * 2, initial=initial))


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "images": rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8),
        "label_maps": rng.choice([*range(CLASSES), 255], (BATCH, SIDE, SIDE)).astype(np.uint8),
        "sizes": np.array([[32, 32], [20, 32], [32, 7], [32, 32], [11, 13]], np.int32),
        "distortion": np.tile(np.float32([9, 1.1, 0.8, 0.05, 1]), (BATCH, 1)),
        "weight": np.ones(BATCH, np.float32),
    }


@pytest.fixture(scope="module")
def learning():
    """Return the compiled function batch -> loss and the statistics after it, and the variables before."""
    task = made(small())
    variables = jax.jit(task.init)(jax.random.key(0))

    @jax.jit
    def learn(rows):
        total, parts = task.loss(variables["params"], variables["model_state"], {}, rows, jax.random.key(1), 0)
        statistics, _ = task.finish(variables["model_state"], parts.statistics, 0)
        return {"loss": total, "weight": parts.weight, "metrics": parts.metrics, "moved": statistics}

    return learn, variables


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_rows_that_do_not_count_have_no_influence(learning):
    """That they leave nothing in the means either is shown of the loss and of batch norm where these are tested."""
    learn, variables = learning
    rows = batch()
    full = learn(rows)
    assert full["weight"] == BATCH * SIDE * SIDE
    rows["weight"][[2, 4]] = 0
    found = learn(rows)
    assert found["weight"] == 3 * SIDE * SIDE and found["loss"] < full["loss"]
    assert np.any(found["moved"]["fpn1"]["norm"]["mean"] != full["moved"]["fpn1"]["norm"]["mean"])
    rows["images"][[2, 4]], rows["label_maps"][[2, 4]], rows["distortion"][2] = 128, 255, 0
    assert_same(learn(rows), found)
    nothing = learn(rows | {"weight": np.zeros(BATCH, np.float32)})
    assert_same(nothing["moved"], variables["model_state"])
    assert nothing["loss"] == nothing["weight"] == 0


def test_what_lies_beyond_an_image_has_no_influence(learning):
    learn, _ = learning
    rows = batch()
    expected = learn(rows)
    rows["images"][1, 20:], rows["images"][2, :, 7:], rows["images"][4, :11, 13:] = 3, 200, 77
    assert_same(learn(rows), expected)


def test_metrics_by_hand():
    # classes: never there but predicted once, always hit, half hit, neither there nor predicted
    confusion = np.array([[0, 0, 0, 0], [0, 6, 0, 0], [1, 1, 2, 0], [0, 0, 0, 0]], float)
    metrics = segment.summarize({"confusion": confusion})
    np.testing.assert_allclose(metrics["mean_iou"], np.mean([0, 6 / 7, 2 / 4]))
    np.testing.assert_allclose(metrics["mean_accuracy"], np.mean([1.0, 0.5]))
    np.testing.assert_allclose(metrics["pixel_accuracy"], 8 / 10)
    of_classes = {name: value for name, value in metrics.items() if name.startswith("iou/")}
    assert of_classes == pytest.approx({"iou/0": 0, "iou/1": 6 / 7, "iou/2": 2 / 4})
    nothing = segment.summarize({"confusion": np.zeros((3, 3))})
    assert nothing == dict.fromkeys(metrics.keys() - of_classes.keys(), 0.0)


def test_decay_and_rates_are_those_of_the_released_recipe():
    task = made(small(depth=3))
    names = traverse_util.flatten_dict(jax.eval_shape(task.init, jax.random.key(0))["params"], sep="/")
    spared = {name for name in names if task.no_decay(name)}
    assert {names[name].ndim for name in spared} == {1}
    assert {name for name in names if names[name].ndim == 1} == spared
    assert "backbone/cls_token" not in spared
    layers = {name: task.layer_of(name) for name in names}
    assert layers["backbone/cls_token"] == layers["backbone/patch_embed/kernel"] == 0
    assert layers["backbone/blocks_1/attn/rel_pos_bias/table"] == 2
    assert {layer for name, layer in layers.items() if not name.startswith("backbone/")} == {4}
    assert task.num_layers == 3


def pre_trained(config, **changes):
    """Give the model the sizes of `convert_states.arguments_of`, for larger images."""
    config.views.image_size = 15
    sizes = dict(patch_size=3, width=10, num_heads=2, mlp_dim=31, depth=2, out_layers=(1, 1, 2, 2))
    config.model.update(sizes | changes)
    return config


def test_pre_training_starts_segmentation_with_tables_enlarged(tmp_path):
    source = drawn_weights("mim", position="relative_shared")
    write(source, str(tmp_path / "mim"), "run")
    config = pre_trained(small())
    config.init_from = str(tmp_path / "mim")
    task = made(config)
    given = traverse_util.flatten_dict(task.initial["params"], sep="/")
    assert all(name.startswith("backbone/") for name in given) and task.initial.keys() == {"params"}
    table = resize_relative_table(source.variables["params"]["backbone"]["rel_pos_bias"]["table"], (5, 5))
    for index in range(2):
        np.testing.assert_array_equal(given[f"backbone/blocks_{index}/attn/rel_pos_bias/table"], table)
    fresh = traverse_util.flatten_dict(jax.eval_shape(task.init, jax.random.key(0))["params"], sep="/")
    assert {name for name in fresh if name.startswith("backbone/")} == given.keys()
    config.model.depth = 1
    config.model.out_layers = (1, 1, 1, 1)
    with pytest.raises(UserError, match="they have depth=2, the config depth=1"):
        made(config)


def test_a_segmentation_model_starts_another_with_its_statistics(tmp_path):
    source = drawn_weights("segmenter", position="relative")
    write(source, str(tmp_path / "segment.npz"), "official")
    config = pre_trained(small(), num_classes=17, channels=13, aux_channels=11, out_layers=(1, 1, 1, 2))
    config.views.image_size = 9
    config.init_from = str(tmp_path / "segment.npz")
    initial = made(config).initial
    assert_same(initial["model_state"], source.variables["batch_stats"])
    assert_same(initial["params"], source.variables["params"])
    config.model.num_classes = 16
    initial = made(config).initial
    assert "classes" not in initial["params"]["decode_head"] and "classes" not in initial["params"]["auxiliary_head"]


def write_folder(root):
    """Write 9 + 3 pictures, dark on the left and light on the right, of several sizes; the map says which is which."""
    rng = np.random.default_rng(0)
    for split, count in (("training", 9), ("validation", 3)):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for index in range(count):
            height, width = rng.integers(40, 70, 2)
            light = np.broadcast_to(np.arange(width) > width * rng.uniform(0.3, 0.7), (height, width))
            pixels = np.where(light[..., None], 190, 40) + rng.integers(0, 40, (height, width, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / split / f"{index}.jpg")
            numbers = np.where(light, 2, 1).astype(np.uint8)
            numbers[:3] = 0
            Image.fromarray(numbers).save(root / "annotations" / split / f"{index}.png")
    (root / "annotations" / "validation" / "1.png").write_bytes(b"corrupt")
    (root / "images" / "training" / "notes.txt").write_text("no image")


def test_a_run_learns_reports_and_can_be_exported(tmp_path):
    write_folder(tmp_path / "halves")
    config = small(num_classes=2)
    config.data.update(source=f"folder:{tmp_path / 'halves'}", max_bad_fraction=0.5)
    config.labels.update(offset=1, ignored=(0,))
    config.optim.update(peak_lr=2e-2, layer_decay=1.0)
    config.evaluation.batch_size = 8
    config.run.update(duration="40 steps", log_every="20 steps", eval_every="40 steps", checkpoint_every="40 steps")
    config.run.keep_every = "40 steps"
    workdir = tmp_path / "run"
    metrics = stages.run_stage(config_lib.resolve(config, str(workdir)), str(workdir))["metrics"]
    assert metrics["eval/mean_iou"] > 0.7 and metrics["eval/pixel_accuracy"] > 0.8
    assert metrics["loss"] < 0.6
    left_out, bad = read_bad_records(workdir)
    assert left_out["where"].endswith("training/notes.txt") and left_out["example_id"] is None
    assert bad["split"] == "validation" and "none of PNG" in bad["cause"]
    assert metrics["eval/mean_iou"] == pytest.approx((metrics["eval/iou/0"] + metrics["eval/iou/1"]) / 2)
    with Image.open(workdir / "segmentation.png") as picture:
        assert picture.width > 1000 and picture.height > 300
        legend = np.asarray(picture)[-11]  # through the middle of its row: a square of each class, then words
    first, second, third = (np.flatnonzero((legend == color).all(axis=-1)) for color in class_colors()[:3])
    assert first.size and second.size and not third.size
    assert (legend[first[-1] + 1 : second[0]] < 128).any() and (legend[second[-1] + 1 :] < 128).any()
    weights = read(str(workdir))
    assert (weights.kind, weights.normalization, weights.arguments["out_layers"]) == ("segmenter", "imagenet", (1,) * 4)
    assert write(weights, str(tmp_path / "segment.pth"), "official") == {}
    again = read(str(tmp_path / "segment.pth"))
    for collection in ("params", "batch_stats"):
        assert_same(again.variables[collection], weights.variables[collection])
