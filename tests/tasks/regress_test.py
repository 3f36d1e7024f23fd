"""The regression of hidden patches: both losses by hand, the student that masked image modelling has, and pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_states import arguments_of, drawn_weights
from paths import CONFIGS
from testing import variables_of
from without_data import no_data

import beitv2_jax
from beitv2_jax import config as config_lib
from beitv2_jax.convert.adapt import adapt_weights
from beitv2_jax.convert.teachers.load import load_teacher
from beitv2_jax.convert.weights import backbone_of, read_backbone
from beitv2_jax.convert.writing import write
from beitv2_jax.tasks import regress
from tests.training import laws_test as laws

IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])


def task_of(features):
    config = config_lib.load(f"{CONFIGS / 'regress'}.py")
    config.views.image_size, config.masking.num_masked = laws.SIZE, 4
    config.model.update(laws.ENCODER, early_layer=1, head_depth=1)
    config.teacher.features = features
    config.efficiency.dtype = "float32"
    with no_data(laws.TEACHER):
        if features:
            return regress.build(config)
        return regress.make_task(config, regress.inputs.Opened(regress.inputs.open_sources(config)))


def patches(images):
    """Return the patches of images, one after the other, as the rows of a loop."""
    side = laws.ENCODER["patch_size"]
    places = [(row, column) for row in range(0, laws.SIZE, side) for column in range(0, laws.SIZE, side)]
    return np.stack([[image[r : r + side, c : c + side].reshape(-1) for r, c in places] for image in images])


def by_hand(batch, bias, features):
    """Return the loss of every hidden patch where `bias` is predicted everywhere, in float64."""
    if features:
        targets = batch["teacher_features"].astype(np.float64)
        cosine = targets @ bias / np.linalg.norm(targets, axis=-1) / np.linalg.norm(bias)
        return (1 - cosine)[batch["mask"]].reshape(laws.BATCH, 4)
    targets = patches((batch["images"] / 255.0 - IMAGENET[0]) / IMAGENET[1])
    targets = (targets - targets.mean(-1, keepdims=True)) / np.sqrt(targets.var(-1, keepdims=True) + 1e-6)
    return np.mean((bias - targets) ** 2, axis=-1)[batch["mask"]].reshape(laws.BATCH, 4)


@pytest.mark.parametrize("features", ["", "somewhere"])
def test_the_loss_is_that_of_numpy(features):
    task, batch = task_of(features), laws.batch_of(3)
    batch["images"][1, :4, :4] = 77  # a patch of one colour has no variance
    batch["weight"][5] = 0.0
    params = variables_of(task)["params"]
    bias = np.random.default_rng(2).normal(size=params["regression_head"]["bias"].shape)
    assert bias.shape == ((laws.TEACHER,) if features else (48,))
    # without a kernel, the output is the bias, whatever the transformer says
    params["regression_head"] = {"kernel": jnp.zeros_like(params["regression_head"]["kernel"]), "bias": jnp.array(bias)}

    @jax.jit
    def both(params, batch):
        loss = task.loss(params, {}, {}, batch, jax.random.key(0), jnp.int32(0))
        return loss, task.evaluate(params, {}, {}, batch)

    (total, parts), sums = both(params, batch)
    expected = by_hand(batch, bias, features)[batch["weight"] > 0].mean(axis=-1).sum()
    for name in ("final_loss", "aggregation_loss"):
        assert parts.metrics[name] == pytest.approx(expected, rel=1e-5)
    assert total == pytest.approx(2 * expected, rel=1e-5) and parts.weight == laws.BATCH - 1
    metrics = task.summarize(jax.device_get(sums))
    assert metrics == pytest.approx(dict.fromkeys(parts.metrics, expected / (laws.BATCH - 1)), rel=1e-5)


def test_the_student_is_that_of_masked_image_modelling():
    shapes = [
        jax.tree.map(np.shape, jax.eval_shape(task.init, jax.random.key(0))["params"])
        for task in (task_of("somewhere"), laws.mim_task()[0])
    ]
    heads = [shapes[0].pop("regression_head"), shapes[1].pop("lm_head")]
    assert shapes[0] == shapes[1]
    assert [head["bias"] for head in heads] == [(laws.TEACHER,), (laws.CODES,)]


def test_pixels_are_a_teacher_without_a_network():
    images = np.random.default_rng(0).integers(0, 256, (2, laws.SIZE, laws.SIZE, 3), dtype=np.uint8)
    teacher, params = load_teacher("pixels", image_size=laws.SIZE, grid=(3, 3))
    assert params == {} and teacher.width == 48
    np.testing.assert_allclose(teacher.features(params, images), patches(images / 255.0), atol=1e-6)


def test_other_stages_start_from_its_runs(tmp_path):
    for source in ("regressor", "mim"):
        write(drawn_weights(source), str(tmp_path / source), "run")
    own = read_backbone(str(tmp_path / "regressor"))
    assert own.arguments["target_width"] == 13 and backbone_of(own).depth == 2
    blocks = {"backbone", "norm", *(f"aggregation_{number}" for number in range(2))}
    for kind, source, kept in (
        ("mim", "regressor", blocks | {"aggregation_norm"}),
        ("regressor", "mim", blocks | {"aggregation_norm"}),
        ("regressor", "regressor", {*own.variables["params"]}),
        ("classifier", "regressor", {"backbone", "norm"}),
    ):
        found = adapt_weights(read_backbone(str(tmp_path / source)), kind, arguments_of(kind))
        assert set(found.variables["params"]) == kept, (kind, source)
    tokens = beitv2_jax.load_backbone(str(tmp_path / "regressor"))(np.zeros((1, 12, 12, 3), np.uint8))
    assert tokens.cls.shape == (1, 10) and tokens.patches.shape == (1, 3, 3, 10)
