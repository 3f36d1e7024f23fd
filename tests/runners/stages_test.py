"""Whole stages on a small folder of images: chaining, resuming, refusing; stored targets against live networks."""

import functools
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from paths import ROOT
from PIL import Image

from beitv2_jax import config as config_lib
from beitv2_jax.data.bad_records import read_bad_records
from beitv2_jax.data.sources import open_source
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.errors import UserError
from beitv2_jax.runners import stages

CONFIGS = ROOT / "configs"
INT8_FIRST_LOSS_BOUND, INT8_LOSS_BOUND = 2e-4, 1e-2
"""Largest relative difference of the first and of any loss, from int8 features against the live teacher."""
STAGES = ("teacher", "extract", "vqkd", "tokenize", "mim", "probe")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Two classes of smooth random images, 13 + 5 each, in class folders."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 13), ("validation", 5)):
        for label in ("checked", "plain"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                low = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
                size = (int(rng.integers(90, 140)), int(rng.integers(90, 140)))
                resample = Image.Resampling.NEAREST if label == "checked" else Image.Resampling.BICUBIC
                Image.fromarray(low).resize(size, resample).save(folder / f"{index:02d}.jpg", quality=95)
    return root


def miniature(image_folder) -> ConfigDict:
    config = config_lib.load(f"{CONFIGS / 'quickstart.py'}:smoke").unlock()
    config.data.source = f"folder:{image_folder}"
    config.stages.teacher.model.num_classes = 2
    config.stages.extract.output.dtype = "float32"
    config.mim_views.color_jitter = 0.4
    config.stages.teacher.model.depth = config.stages.vqkd.model.encoder.depth = 1
    return config.lock()


@pytest.fixture(scope="module")
def pipeline(image_folder, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("pipeline"))
    return workdir, stages.run_stage(miniature(image_folder), workdir)


def stage_config(image_folder, workdir, name) -> ConfigDict:
    return config_lib.resolve(miniature(image_folder).stages[name], workdir).unlock()


def losses(workdir, name="loss"):
    lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]


def test_every_stage_leaves_its_metrics_and_the_report(pipeline):
    workdir, summary = pipeline
    assert tuple(summary["metrics"]) == STAGES
    for name in STAGES:
        metrics = stages.read_summary(os.path.join(workdir, name))["metrics"]
        assert metrics == summary["metrics"][name]["metrics"]
        assert all(np.isfinite(value) for value in metrics.values())
    report = pathlib.Path(workdir, "report.md").read_text()
    assert all(f"| {name} " in report for name in STAGES)
    with Image.open(os.path.join(workdir, "tokenize", "codes.png")) as picture:
        assert picture.width > 500


def test_a_finished_pipeline_runs_nothing_again(pipeline, image_folder, tmp_path, monkeypatch, caplog):
    workdir, summary = pipeline
    monkeypatch.setattr(stages, "RUNNERS", dict.fromkeys(stages.RUNNERS, None))
    (tmp_path / "link").symlink_to(workdir)
    for folder in (workdir, str(tmp_path / "link")):
        assert stages.run_stage(miniature(image_folder), folder) == summary
    assert "config changed" not in caplog.text


@pytest.mark.long
def test_an_interrupted_pipeline_goes_on_where_it_stopped_in_another_folder(pipeline, image_folder, tmp_path):
    workdir, summary = pipeline
    for name in STAGES[:4]:
        shutil.copytree(os.path.join(workdir, name), tmp_path / name)
    again = stages.run_stage(miniature(image_folder), str(tmp_path))
    for name in STAGES[:4]:
        assert again["metrics"][name] == summary["metrics"][name]
    for name in STAGES[4:]:
        timeless = [
            {key: value for key, value in metrics["metrics"].items() if "second" not in key and "wait" not in key}
            for metrics in (again["metrics"][name], summary["metrics"][name])
        ]
        assert timeless[0] == timeless[1]


def test_another_config_is_refused(pipeline, image_folder):
    workdir, _ = pipeline
    config = stage_config(image_folder, workdir, "mim")
    config.optim.peak_lr = 1.0
    with pytest.raises(UserError, match=r"another config \(optim.peak_lr"):
        stages.run_stage(config, os.path.join(workdir, "mim"))


@pytest.mark.parametrize("layers", [(2, 4), (0, 3)])
def test_the_probe_refuses_layers_that_the_backbone_does_not_have(pipeline, image_folder, tmp_path, layers):
    workdir, _ = pipeline
    config = stage_config(image_folder, workdir, "probe")
    config.probe.layers = layers
    refused(config, str(tmp_path / "probe"), r"probe.layers=.* has 3 blocks.*\n.*\n.*--config.probe.layers='\(2, 3\)'")


@pytest.mark.long
def test_vqkd_from_stored_features_equals_vqkd_with_the_live_teacher(pipeline, image_folder, tmp_path):
    workdir, _ = pipeline
    config = stage_config(image_folder, workdir, "vqkd")
    config.teacher.update(features="", weights=os.path.join(workdir, "teacher"))
    stages.run_stage(config, str(tmp_path / "live"))
    stored, live = losses(os.path.join(workdir, "vqkd")), losses(tmp_path / "live")
    assert len(stored) == 4
    np.testing.assert_allclose(live, stored, rtol=2e-6)
    name = "eval/reconstruction_loss"
    np.testing.assert_allclose(losses(tmp_path / "live", name), losses(os.path.join(workdir, "vqkd"), name), rtol=2e-6)


@pytest.mark.long
def test_mim_from_stored_codes_equals_mim_with_the_live_tokenizer(pipeline, image_folder, tmp_path):
    workdir, _ = pipeline
    config = stage_config(image_folder, workdir, "mim")
    config.tokenizer.update(codes="", run=os.path.join(workdir, "vqkd"))
    stages.run_stage(config, str(tmp_path / "live"))
    for name in ("loss", "final_accuracy", "eval/aggregation_loss"):
        np.testing.assert_allclose(
            losses(tmp_path / "live", name), losses(os.path.join(workdir, "mim"), name), rtol=2e-6
        )


def test_a_tokenizer_may_have_a_view_of_its_own(pipeline, image_folder, tmp_path):
    """The student sees larger patches, resized otherwise; stored or live, the codes are those of the same boxes."""
    from beitv2_jax.tasks import common, mim

    workdir, _ = pipeline
    config = stage_config(image_folder, workdir, "mim")
    views = {"image_size": 128, "interpolation": "lanczos"}
    config.views.update(**views, tokenizer_image_size=64, tokenizer_interpolation="bicubic")
    config.model.update(patch_size=32, depth=1, early_layer=1, patch_aggregation=False)
    live = config.copy_and_resolve_references()
    live.tokenizer.update(codes="", run=os.path.join(workdir, "vqkd"))
    tasks = mim.build(config), mim.build(live)
    tokenizer, frozen = mim.load_tokenizer(live.tokenizer.run, 64, "float32")
    pixels = functools.partial(common.view_pixels, view="tokenizer_images")
    encode = jax.jit(lambda frozen, batch: tokenizer.encode(frozen, pixels(batch)))
    for read in (lambda task: next(task.train_batches(0, 1)), lambda task: next(iter(task.eval_batches(0, 1)))):
        stored, seen = (read(task) for task in tasks)
        np.testing.assert_array_equal(stored["images"], seen["images"])
        seen.pop("faults")
        np.testing.assert_array_equal(encode(frozen, seen), stored["code_ids"])
    # and it is these codes that the student has to predict
    shapes = jax.eval_shape(tasks[0].init, jax.random.key(0))["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: 0.1 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    counts = [
        jax.jit(task.evaluate)(params, {}, task.frozen, {k: v for k, v in batch.items() if k != "faults"})["counts"]
        for task, batch in zip(tasks, (stored, seen), strict=True)
    ]
    assert counts[0].sum() > 0
    np.testing.assert_array_equal(*counts)
    # the tokenizer's view is what the cache must have been made from
    for key, value, field in (
        ("tokenizer_image_size", 128, "image_size"),
        ("tokenizer_interpolation", "lanczos", "interpolation"),
    ):
        other = config.copy_and_resolve_references()
        other.views[key] = value
        refused(other, str(tmp_path / "other"), rf"{field} = .*this run has '?{value}")


@pytest.fixture(scope="module")
def corrupt_folder(image_folder, tmp_path_factory):
    """The folder of images with one in each split cut off, and one in the train split empty."""
    root = tmp_path_factory.mktemp("corrupt") / "images"
    shutil.copytree(image_folder, root)
    for name in ("train/plain/03.jpg", "validation/checked/02.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:500])
    (root / "train/checked/07.jpg").write_bytes(b"")
    return root


def test_the_probe_leaves_unreadable_images_out_and_lists_them(corrupt_folder, tmp_path):
    from beitv2_jax.runners import probe
    from beitv2_jax.tasks.frozen import FeatureSet
    from beitv2_jax.tasks.probe import raw_pixels

    config = stage_config(corrupt_folder, str(tmp_path), "probe")
    pixels = FeatureSet("pixels", raw_pixels, {})
    sources = {split: open_source(config.data.source, split) for split in ("train", "validation")}
    with pytest.raises(UserError, match=r"2 of 26 images of split train are unreadable"):
        probe.cached_features(pixels, sources["train"], config, str(tmp_path))
    config.data.max_bad_fraction = 0.15
    for source, rows in zip(sources.values(), (24, 9), strict=True):
        features = probe.cached_features(pixels, source, config, str(tmp_path))
        assert {len(array) for array in (features.labels, *features.arrays.values())} == {rows}
    listed = {(r["split"], r["where"].partition(" (")[0]) for r in read_bad_records(tmp_path)}
    corrupt = ("train/plain/03.jpg", "train/checked/07.jpg", "validation/checked/02.jpg")
    assert listed == {(name.partition("/")[0], str(corrupt_folder / name)) for name in corrupt}


@pytest.mark.long  # tests/training/metric_log_test.py shows it of the loop
def test_too_many_unreadable_images_stop_the_run(corrupt_folder, tmp_path):
    config = stage_config(corrupt_folder, str(tmp_path), "teacher")
    config.run.duration = "2 epochs"
    with pytest.raises(UserError, match=r"data\.max_bad_fraction allows 0\.100%") as caught:
        stages.run_stage(config, str(tmp_path / "run"))
    assert str(tmp_path / "run" / "bad_records.jsonl") in caught.value.instead
    assert len(read_bad_records(tmp_path / "run")) >= 1


@pytest.mark.long
def test_vqkd_from_int8_features_follows_the_live_teacher(pipeline, image_folder, tmp_path):
    workdir, _ = pipeline
    extract = stage_config(image_folder, workdir, "extract")
    extract.output.dtype = "int8"
    stages.run_stage(extract, str(tmp_path / "extract"))
    config = stage_config(image_folder, workdir, "vqkd")
    config.teacher.features = str(tmp_path / "extract")
    stages.run_stage(config, str(tmp_path / "stored"))
    for name in ("loss", "eval/reconstruction_loss"):
        live = losses(os.path.join(workdir, "vqkd"), name)  # from float32 features, which equal the live teacher's
        stored = losses(tmp_path / "stored", name)
        assert stored != live
        np.testing.assert_allclose(stored, live, rtol=INT8_LOSS_BOUND)
        np.testing.assert_allclose(stored[0], live[0], rtol=INT8_FIRST_LOSS_BOUND)


def test_tfds_opens_the_caches(pipeline):
    import tensorflow_datasets as tfds

    workdir, _ = pipeline
    for name, feature, dtype, shape in (
        ("extract", "teacher_features", np.float32, (16, 32)),
        ("tokenize", "packed_code_ids", np.uint8, (8,)),  # 16 ids of 4 bits
    ):
        source = tfds.builder_from_directory(os.path.join(workdir, name, "views")).as_data_source("train_v0")
        assert len(source) == 26
        assert source[0][feature].dtype == dtype and source[0][feature].shape == shape


def test_stored_features_follow_the_view(pipeline, image_folder):
    """The cache's record of an example is the teacher's answer to exactly the pixels the pipeline draws for it."""
    from beitv2_jax.convert.teachers.load import load_teacher
    from beitv2_jax.tasks import inputs

    workdir, _ = pipeline
    config = stage_config(image_folder, workdir, "vqkd")
    source, _ = inputs.open_sources(config)
    iterator = inputs.train_batches(config, source)(0, 1)
    batch = next(iterator)
    teacher, params = load_teacher(os.path.join(workdir, "teacher"), image_size=64)
    expected = np.asarray(teacher.features(params, batch["images"]))
    reader = TargetReader(os.path.join(workdir, "extract", "views"), "train")
    stored = [reader[int(i), int(v)] for i, v in zip(batch["example_ids"], batch["views"], strict=True)]
    np.testing.assert_allclose(stored, expected, atol=2e-6 * np.abs(expected).max())


def refused(config, workdir, match):
    before = sorted(path for path in pathlib.Path(workdir).rglob("*")) if os.path.exists(workdir) else None
    with pytest.raises(UserError, match=match) as caught:
        stages.run_stage(config, workdir)
    after = sorted(path for path in pathlib.Path(workdir).rglob("*")) if os.path.exists(workdir) else None
    assert before == after, "a refused run left something behind"
    assert all((caught.value.happened, caught.value.meant, caught.value.instead))


def test_a_missing_data_set_is_refused(image_folder, tmp_path):
    config = config_lib.load(f"{CONFIGS / 'teacher.py'}:smoke").unlock()
    config.data.source = f"folder:{tmp_path / 'nowhere'}"
    refused(config, str(tmp_path / "run"), "nowhere")


def test_an_image_size_that_the_patches_do_not_divide_is_refused(image_folder, tmp_path):
    config = stage_config(image_folder, str(tmp_path), "teacher")
    config.views.image_size = 97
    refused(config, str(tmp_path / "run"), "views.image_size=97")


def test_more_masked_patches_than_patches_are_refused(image_folder, tmp_path):
    config = stage_config(image_folder, str(tmp_path), "mim")
    config.masking.num_masked = 17
    refused(config, str(tmp_path / "run"), "num_masked=17.*16 patches")


def test_a_teacher_of_other_patches_is_brought_to_the_tokenizer_s_grid(pipeline, image_folder):
    from beitv2_jax.convert.teachers.load import load_teacher
    from beitv2_jax.tasks import targets

    workdir, _ = pipeline
    config = stage_config(image_folder, workdir, "vqkd")
    config.teacher.weights = os.path.join(workdir, "teacher")
    for grid_match, input_size in (("resize_input", 32), ("resample_features", 64)):
        config.teacher.grid_match = grid_match
        teacher, _ = load_teacher(**targets.teacher_arguments(config, patch_size=32))
        assert (teacher.grid, teacher.input_size, teacher.image_size) == ((2, 2), input_size, 64)


def test_a_cache_made_with_other_choices_is_refused(pipeline, image_folder, tmp_path):
    workdir, _ = pipeline
    choices = {"normalization": "clip", "output": "projected", "activation": "quick_gelu", "num_heads": 7}
    choices |= {"grid_match": "resample_features", "position_resize": "offset"}
    for key, value in choices.items():
        config = stage_config(image_folder, workdir, "vqkd")
        config.teacher[key] = value
        refused(config, str(tmp_path / "run"), rf"teacher_{key} = .*this run has '?{value}")


def test_a_cache_of_another_grid_or_other_views_is_refused(pipeline, image_folder, tmp_path):
    workdir, _ = pipeline
    config = stage_config(image_folder, workdir, "vqkd")
    config.model.encoder.patch_size = 32
    refused(config, str(tmp_path / "run"), "grid")
    config = stage_config(image_folder, workdir, "vqkd")
    config.views.min_scale *= 0.9
    refused(config, str(tmp_path / "run"), "min_scale")


def test_a_tokenizer_with_another_number_of_codes_is_refused(pipeline, image_folder, tmp_path):
    workdir, _ = pipeline
    config = stage_config(image_folder, workdir, "mim")
    config.model.codebook_size = 17
    refused(config, str(tmp_path / "run"), "16 codes, the model predicts 17")


def test_a_live_tokenizer_of_another_grid_is_refused(pipeline, image_folder, tmp_path):
    workdir, _ = pipeline
    config = stage_config(image_folder, workdir, "mim")
    config.tokenizer.update(codes="", run=os.path.join(workdir, "vqkd"))
    config.model.patch_size = 32
    config.masking.update(num_masked=1, min_patches=1)
    refused(
        config,
        str(tmp_path / "run"),
        r"4x4 codes at 64 pixels, the model has 2x2 patches.*\n.*\n.*model\.patch_size=16",
    )


def test_a_run_of_another_stage_is_no_tokenizer(pipeline, image_folder, tmp_path):
    workdir, _ = pipeline
    config = stage_config(image_folder, workdir, "tokenize")
    config.tokenizer.run = os.path.join(workdir, "teacher")
    refused(config, str(tmp_path / "run"), "stage 'finetune', but a run of stage 'vqkd' or 'cluster' is needed")


def test_a_workdir_that_is_no_folder_is_refused(image_folder, tmp_path):
    (tmp_path / "file").write_text("")
    config = stage_config(image_folder, str(tmp_path), "teacher")
    with pytest.raises(UserError, match="cannot be written"):
        stages.run_stage(config, str(tmp_path / "file" / "run"))


def test_the_folder_is_read_as_two_classes(image_folder):
    source = open_source(f"folder:{image_folder}", "train")
    assert len(source) == 26 and tuple(source.class_names) == ("checked", "plain")
