"""Features of any teacher: equal to those of the extract stage with the same network, and to those from files."""

import json

import jax
import numpy as np
import pytest

from beitv2_jax import config as config_lib
from beitv2_jax.convert.runs import write_run
from beitv2_jax.convert.teachers.load import load_teacher
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.errors import UserError
from beitv2_jax.runners import stages
from beitv2_jax.runners.features import fixed_views, write_features
from beitv2_jax.tasks import finetune, vqkd
from tests.runners.stages_test import image_folder, stage_config  # noqa: F401

SPLITS = {"views": "train", "centre": "validation"}


@pytest.fixture
def config(image_folder, tmp_path):  # noqa: F811
    """The config of a vqkd stage with two stored views of 26 + 10 images, on a grid of 4 x 4 patches."""
    config = stage_config(image_folder, str(tmp_path), "vqkd")
    config.views.num_views = 2
    return config


def mean_colors(crops):
    """Return a teacher's features by hand: the mean colour of every patch, in units of 255."""
    patches = crops.images.reshape(-1, 4, 16, 4, 16, 3)
    return patches.mean((2, 4)) / 255


def stored(directory, part):
    reader = TargetReader(str(directory / part), SPLITS[part])
    views = reader.manifest["num_views"]
    return np.stack([[reader[example, view] for view in range(views)] for example in range(len(reader))])


@pytest.mark.long
def test_features_equal_those_of_the_extract_stage(config, image_folder, tmp_path):  # noqa: F811
    teacher_config = stage_config(image_folder, str(tmp_path), "teacher")
    variables = jax.tree.map(np.asarray, jax.jit(finetune.build(teacher_config).init)(jax.random.key(0)))
    write_run(str(tmp_path / "teacher"), json.loads(config_lib.to_json(teacher_config)), variables)
    extract = stage_config(image_folder, str(tmp_path), "extract")
    extract.views.num_views = 2
    stages.run_stage(extract, str(tmp_path / "extract"))
    network, params = load_teacher(str(tmp_path / "teacher"), image_size=64)
    features = jax.jit(network.features)

    def teacher(crops):
        return np.asarray(features(params, crops.images)).reshape(len(crops.images), 4, 4, -1)

    counts = write_features(config, str(tmp_path / "own"), teacher, name="own", dtype="float32", shard_examples=11)
    assert counts == {"train_examples": 26, "eval_examples": 10, "views_per_example": 2, "unreadable_examples": 0}
    for part in SPLITS:
        expected = stored(tmp_path / "extract", part)
        np.testing.assert_allclose(stored(tmp_path / "own", part), expected, atol=2e-6 * np.abs(expected).max())
    config.teacher.features = str(tmp_path / "own")
    assert vqkd.build(config).num_train_examples == 26


def test_features_from_files_are_those_of_the_function(config, tmp_path):
    write_features(config, str(tmp_path / "function"), mean_colors, name="colors", dtype="bfloat16")
    np.testing.assert_allclose(
        stored(tmp_path / "function", "centre")[0, 0].reshape(4, 4, 3),
        mean_colors(next(crops for crops in fixed_views(config) if crops.part == "centre"))[0],
        rtol=2**-8,
    )
    # another program would do this
    counts = {"views": 26, "centre": 10}
    arrays = {
        f"{part}_{view}": np.zeros((counts[part], 4, 4, 3))
        for part, view in (("views", 0), ("views", 1), ("centre", 0))
    }
    for crops in fixed_views(config):
        arrays[f"{crops.part}_{crops.view}"][crops.example_ids] = mean_colors(crops)
    np.savez(tmp_path / "features.npz", **arrays)
    found = np.load(tmp_path / "features.npz")

    def from_file(crops):
        return found[f"{crops.part}_{crops.view}"][crops.example_ids]

    write_features(config, str(tmp_path / "file"), from_file, name="colors", dtype="bfloat16")
    for part in SPLITS:
        one, other = (
            {path.name: path.read_bytes() for path in (tmp_path / at / part).iterdir()} for at in ("function", "file")
        )
        assert one == other and len(one) > 3


def test_unreadable_images_are_not_shown_to_the_teacher(config, image_folder, tmp_path):  # noqa: F811
    path = sorted((image_folder / "train" / "plain").iterdir())[3]
    whole = path.read_bytes()
    shown = []

    def teacher(crops):
        shown.extend(zip([crops.part] * len(crops.images), crops.example_ids.tolist(), strict=True))
        return mean_colors(crops)

    config.data.max_bad_fraction = 0.1
    try:
        path.write_bytes(b"no picture")
        counts = write_features(config, str(tmp_path / "own"), teacher, name="colors")
    finally:
        path.write_bytes(whole)
    assert counts["unreadable_examples"] == 1
    assert {example for part, example in shown if part == "views"} == set(range(26)) - {13 + 3}
    assert not stored(tmp_path / "own", "views")[13 + 3].any()


def test_what_does_not_fit_is_refused(config, image_folder, tmp_path):  # noqa: F811
    def refused(match, teacher=mean_colors, name="colors", directory="own", given=config):
        with pytest.raises(UserError, match=match):
            write_features(given, str(tmp_path / directory), teacher, name=name)

    refused(r"shape \(1, 17, 3\).* which is not \(1, 4, 4, width\)", lambda crops: np.zeros((len(crops.images), 17, 3)))
    assert not (tmp_path / "own").exists()
    refused("not finite", lambda crops: mean_colors(crops) * np.nan, directory="nan")
    write_features(config, str(tmp_path / "own"), mean_colors, name="colors")
    refused("teacher", name="others")
    refused("stage 'extract'", given=stage_config(image_folder, str(tmp_path), "extract"))
    config.views.num_views = 0
    refused("num_views=0")
