"""Reading, resizing and writing weights of every layout, and initialising other models from them."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import teacher_cases
from convert_states import KINDS, SIZES, arguments_of, assert_same, drawn_state, drawn_weights, published
from flax import traverse_util
from hypothesis import given, settings
from paths import GOLDEN

from beitv2_jax.convert import writing
from beitv2_jax.convert.adapt import adapt_weights
from beitv2_jax.convert.arguments import fill_unknown, infer_arguments, shapes
from beitv2_jax.convert.beit.official import from_official
from beitv2_jax.convert.positions import resize_position_embedding, resize_relative_table
from beitv2_jax.convert.weights import read
from beitv2_jax.convert.writing import write
from beitv2_jax.errors import UserError
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.preprocess import NORMALIZATIONS, normalize, to_unit_range
from beitv2_jax.models.vqkd import VQKD


def flat(variables):
    return traverse_util.flatten_dict(variables, sep="/")


@pytest.mark.parametrize(
    "kind, sizes, not_stored",
    [
        ("classifier", dict(position="absolute"), {"num_heads"}),  # two heads of 5, which the file does not show
        ("classifier", dict(position="relative"), set()),  # the tables show them
        ("classifier", dict(position="absolute", heads=1, head_width=64), set()),  # as published
        ("mim", dict(position="relative_shared", depth=5), {"early_layer"}),  # layer 1, read as 5 - 3
        ("mim", dict(position="relative_shared", depth=4), set()),
        ("segmenter", dict(position="relative", depth=3), {"out_layers"}),  # layers 1, 1, 1, 3, read as 1, 1, 2, 3
        ("segmenter", dict(position="relative", depth=2), set()),
    ],
)
def test_arguments_that_a_released_file_cannot_store_are_reported(kind, sizes, not_stored, tmp_path):
    assert write(drawn_weights(kind, **sizes), str(tmp_path / "weights.npz"), "official").keys() == not_stored


@pytest.mark.parametrize("ending", ("safetensors", "npz", "pth"))
@pytest.mark.parametrize("kind", KINDS)
def test_official_files_round_trip_exactly(kind, ending, tmp_path):
    weights = drawn_weights(kind)
    path = str(tmp_path / f"weights.{ending}")
    left_out = write(weights, path, "official")
    counters = {name for name in left_out if "window_counts" in name}
    assert bool(counters) == (kind == "vqkd") and set(left_out) - counters <= {"num_heads"}
    again = read(path, num_heads=2 if kind != "vqkd" else 1)
    assert (again.kind, again.layout, again.num_params) == (kind, "official", weights.num_params)
    assert_same(again.variables, weights.variables)
    assert list(tmp_path.iterdir()) == [tmp_path / f"weights.{ending}"]


@pytest.mark.parametrize("position", ("absolute", "relative", "relative_shared"))
@pytest.mark.parametrize("kind", KINDS)
def test_runs_round_trip_exactly(kind, position, tmp_path):
    weights = drawn_weights(kind, position=position)
    weights = dataclasses.replace(weights, arguments=weights.arguments | ({} if kind == "vqkd" else {"norm_eps": 1e-5}))
    assert write(weights, str(tmp_path / "run"), "run") == {}
    again = read(str(tmp_path / "run"))
    assert (again.kind, again.arguments, again.normalization) == (kind, weights.arguments, weights.normalization)
    assert_same(again.variables, weights.variables)


@settings(deadline=None, max_examples=10)
@given(**SIZES)
def test_arguments_are_inferred_from_the_arrays(kind, **sizes):
    weights = drawn_weights(kind, **sizes)
    inferred = infer_arguments(kind, {path: array.shape for path, array in flat(weights.variables).items()})
    expected = arguments_of(kind, **sizes)
    unknown = {"early_layer", "out_layers"} | ({"num_heads"} if sizes["position"] == "absolute" else set())
    for part in (expected, *(value for value in expected.values() if isinstance(value, dict))):
        part |= dict.fromkeys(part.keys() & unknown)
    inferred.pop("patch_aggregation", None)
    assert inferred == expected


def test_unknown_arguments_get_the_published_values():
    for name, early_layer, num_heads in (("base_pt1k", 9, 12), ("large_pt1k", 21, 16)):
        kind, state = published(name)
        known = {path: array.shape for path, array in flat(from_official(kind, state)).items()}
        arguments, assumed = fill_unknown(infer_arguments(kind, known))
        assert (arguments["early_layer"], arguments["num_heads"]) == (early_layer, num_heads)
        assert (arguments["image_size"], arguments["patch_size"], arguments["codebook_size"]) == (224, 16, 8192)
        assert [text.partition(":")[0] for text in assumed] == [f"early_layer={early_layer}"]
    kind, state = published("vqkd_3x768x12_clip")
    known = {path: array.shape for path, array in flat(from_official(kind, state)).items()}
    arguments, assumed = fill_unknown(infer_arguments(kind, known))
    assert (arguments["encoder"]["num_heads"], arguments["decoder"]["num_heads"]) == (12, 12)
    assert assumed == ("num_heads=12: heads of width 64, as in every published model",)
    for depth, layers in ((12, (4, 6, 8, 12)), (24, (8, 12, 16, 24))):
        assert fill_unknown({"out_layers": None, "depth": depth})[0]["out_layers"] == layers


def test_heads_that_do_not_fit_are_refused(tmp_path):
    write(drawn_weights("mim"), str(tmp_path / "absolute.npz"), "official")
    with pytest.raises(UserError, match=r"A width of 10 cannot be divided into heads of width 64") as raised:
        read(str(tmp_path / "absolute.npz"))
    assert "--num_heads=N" in raised.value.instead
    with pytest.raises(UserError, match="into 3 heads"):
        read(str(tmp_path / "absolute.npz"), num_heads=3)
    write(drawn_weights("mim", position="relative"), str(tmp_path / "relative.npz"), "official")
    assert read(str(tmp_path / "relative.npz"), num_heads=2).arguments["num_heads"] == 2
    with pytest.raises(UserError, match="num_heads is 5, but the relative position tables have 2 heads"):
        read(str(tmp_path / "relative.npz"), num_heads=5)


@pytest.mark.parametrize(
    "kind, position", [("vqkd", "absolute"), ("mim", "relative_shared"), ("classifier", "relative")]
)
def test_another_image_size_resizes_only_the_positions(kind, position, tmp_path):
    weights = drawn_weights(kind, position=position, grid=3)
    write(weights, str(tmp_path / "run"), "run")
    larger = read(str(tmp_path / "run"), image_size=15)
    assert larger.arguments == weights.arguments | {"image_size": 15}
    expected = shapes(kind, larger.arguments)
    moved = flat(larger.variables)
    assert {path: array.shape for path, array in moved.items()} == expected
    resized = 0
    for path, array in flat(weights.variables).items():
        if path.endswith("/table"):
            array = resize_relative_table(array, (5, 5))
            resized += 1
        elif path.endswith("/pos_embed"):
            array = resize_position_embedding(array, (5, 5))
            resized += 1
        np.testing.assert_array_equal(moved[path], array, err_msg=path)
    assert resized == {"vqkd": 2, "mim": 1, "classifier": 2}[kind]
    with pytest.raises(UserError, match=r"Images of 16 pixels cannot be divided into patches of 3") as raised:
        read(str(tmp_path / "run"), image_size=16)
    assert raised.value.instead == "Write --image_size=15, or --config.views.image_size=15 for a training run."


def test_a_model_without_positions_needs_its_image_size(tmp_path):
    state = drawn_state("classifier")
    del state["pos_embed"]
    np.savez(tmp_path / "none.npz", **state)
    with pytest.raises(UserError, match=r"image size of .*none\.npz is unknown"):
        read(str(tmp_path / "none.npz"), num_heads=2)
    weights = read(str(tmp_path / "none.npz"), num_heads=2, image_size=12)
    assert (weights.arguments["image_size"], weights.arguments["position"]) == (12, "none")


def test_no_file_is_overwritten_or_left_incomplete(tmp_path, monkeypatch):
    weights = drawn_weights("classifier")
    with pytest.raises(UserError, match=r"run\[1\], because the path has the character '\['"):
        write(weights, str(tmp_path / "run[1]"), "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"there already exists"):
        write(weights, str(tmp_path / "there"), "run")
    with pytest.raises(UserError, match=r"ends in none of \.safetensors, \.npz, \.pth"):
        write(weights, str(tmp_path / "weights.bin"), "official")
    headless = {name: array for name, array in drawn_state("classifier").items() if not name.startswith("head.")}
    np.savez(tmp_path / "there" / "headless.npz", **headless)
    with pytest.raises(UserError, match="has no head"):
        write(read(str(tmp_path / "there" / "headless.npz"), num_heads=2), str(tmp_path / "run"), "run")

    def fails(path):
        Path(path).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(writing, "write_safetensors", lambda path, state: fails(path))
    with pytest.raises(UserError, match="disk full"):
        write(weights, str(tmp_path / "weights.safetensors"), "official")
    monkeypatch.setattr(writing, "write_run", lambda path, *_: (Path(path).mkdir(), fails(Path(path) / "x")))
    with pytest.raises(UserError, match="disk full"):
        write(weights, str(tmp_path / "run"), "run")
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]


def test_files_have_the_permissions_of_the_umask(tmp_path):
    weights = drawn_weights("classifier", position="relative")
    before = os.umask(0o027)
    try:
        write(weights, str(tmp_path / "w.safetensors"), "official")
        write(weights, str(tmp_path / "hub"), "huggingface")
    finally:
        os.umask(before)
    for name in ("w.safetensors", "hub/model.safetensors", "hub/config.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640, name


@pytest.mark.parametrize("layout, kept", [("run", True), ("huggingface", True), ("official", False), ("timm", False)])
def test_the_normalization_is_kept_or_said_to_be_lost(layout, kept, tmp_path):
    weights = dataclasses.replace(drawn_weights("classifier", position="relative"), normalization="half")
    path = str(tmp_path / "weights.npz") if layout in ("official", "timm") else str(tmp_path / "weights")
    lost = write(weights, path, layout)
    again = read(path)
    assert (again.normalization, again.normalization_known) == (("half", True) if kept else ("imagenet", False))
    assert ("normalization" in lost) != kept
    assert read(path, normalization="half").normalization == "half"


def test_a_run_of_another_stage_is_refused(tmp_path):
    (tmp_path / "probe").mkdir()
    write(drawn_weights("mim"), str(tmp_path / "mim"), "run")
    config = json.loads((tmp_path / "mim" / "config.json").read_text())
    (tmp_path / "mim" / "config.json").write_text(json.dumps(config | {"stage": "probe"}))
    with pytest.raises(UserError, match="stage 'probe', but a run of stage 'vqkd' or 'cluster' or 'mim'"):
        read(str(tmp_path / "mim"))
    shutil.rmtree(tmp_path / "mim" / "checkpoints")  # as such a stage leaves it
    with pytest.raises(UserError, match="stage 'probe', but a run of stage 'vqkd' or 'cluster' or 'mim'"):
        read(str(tmp_path / "mim"))


# --- initialising another model


def started(source, kind, **changes):
    """Return what `source` gives a model of `kind` like it, and that model's shapes."""
    position = source.arguments.get("position", "absolute")
    arguments = arguments_of(kind, position=position) | changes
    return (
        flat(adapt_weights(source, kind, arguments).variables),
        shapes(kind, arguments),
        adapt_weights(source, kind, arguments),
    )


def test_a_pre_trained_model_initialises_a_classifier():
    source = drawn_weights("mim", position="relative_shared")
    given, expected, weights = started(source, "classifier", position="relative", pooling="mean")
    theirs = flat(source.variables)
    fresh = {"params/fc_norm/scale", "params/fc_norm/bias", "params/head/kernel", "params/head/bias"}
    assert expected.keys() - given.keys() == fresh
    for path, array in given.items():
        name = "params/backbone/rel_pos_bias/table" if path.endswith("/table") else path
        np.testing.assert_array_equal(array, theirs[name], err_msg=path)
    assert sum(path.endswith("/table") for path in given) == 2
    left = {path for path in theirs if not path.startswith("params/backbone/")} | {"params/backbone/mask_token"}
    assert weights.dropped.keys() == left and all(weights.dropped.values())


def test_shared_tables_are_copied_and_resized():
    source = drawn_weights("mim", position="relative_shared", grid=3)
    given, _, _ = started(source, "classifier", position="relative", pooling="mean", image_size=15)
    table = resize_relative_table(source.variables["params"]["backbone"]["rel_pos_bias"]["table"], (5, 5))
    for index in range(2):
        np.testing.assert_array_equal(given[f"params/backbone/blocks_{index}/attn/rel_pos_bias/table"], table)


@pytest.mark.parametrize("num_classes", (17, 16))
def test_a_head_for_other_classes_is_newly_initialised(num_classes):
    source = drawn_weights("classifier", position="relative")
    given, expected, weights = started(source, "classifier", num_classes=num_classes)
    fresh = {"params/head/kernel", "params/head/bias"} if num_classes == 16 else set()
    assert expected.keys() - given.keys() == fresh == weights.dropped.keys()


def test_the_encoder_of_a_tokenizer_initialises_a_classifier():
    source = drawn_weights("vqkd", layer_scale=False)
    given, expected, weights = started(source, "classifier", pooling="mean", layer_scale_init=0.0)
    params = source.variables["params"]
    assert expected.keys() - given.keys() == {"params/head/kernel", "params/head/bias"}
    assert_same(weights.variables["params"]["backbone"], params["encoder"])
    assert_same(weights.variables["params"]["fc_norm"], params["encoder_norm"])
    given, expected, _ = started(source, "classifier", pooling="cls", layer_scale_init=0.0)
    assert {path.split("/")[1] for path in expected.keys() - given.keys()} == {"norm", "head"}


def test_a_tokenizer_initialises_a_tokenizer():
    source = drawn_weights("vqkd")
    given, expected, weights = started(source, "vqkd")
    windows = {f"codebook/quantizer/{name}" for name in ("window_counts", "last_window_counts")}
    assert expected.keys() - given.keys() == windows == weights.dropped.keys()
    given, expected, _ = started(source, "vqkd", teacher_width=29)
    fresh = {"params/decode_task/fc2/kernel", "params/decode_task/fc2/bias"}
    assert expected.keys() - given.keys() == windows | fresh
    with pytest.raises(UserError, match=r"codebook/quantizer/.*\(19"):
        started(source, "vqkd", codebook_size=23)


def test_another_codebook_size_needs_a_new_head():
    source = drawn_weights("mim")
    given, expected, _ = started(source, "mim", codebook_size=23)
    heads = {f"params/{head}/{leaf}" for head in ("lm_head", "aggregation_lm_head") for leaf in ("kernel", "bias")}
    assert expected.keys() - given.keys() == heads
    plain = drawn_weights("classifier")
    given, expected, _ = started(plain, "mim", layer_scale_init=0.1)
    assert {path.split("/")[1].partition("_")[0] for path in expected.keys() - given.keys()} == {
        *("backbone", "lm", "aggregation")
    }


@pytest.mark.parametrize("changes", [dict(head_depth=1), dict(head_depth=3), dict(shared_head=True)])
def test_an_aggregation_head_that_differs_is_refused(changes):
    with pytest.raises(UserError, match="aggregation_"):
        started(drawn_weights("mim"), "mim", **changes)
    given, expected, weights = started(drawn_weights("mim"), "mim", patch_aggregation=False)
    assert given.keys() == expected.keys()
    assert weights.dropped and all(path.startswith("params/aggregation") for path in weights.dropped)


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(width=12, num_heads=2), "width=10"),
        (dict(depth=1), "depth=2"),
        (dict(depth=3), "depth=2"),
        (dict(position="absolute"), "position='relative_shared'"),
        (dict(layer_scale_init=0.0), "layer_scale_init=0.1"),
        (dict(patch_size=9), "patch_size=3"),
        (dict(qkv_bias="full"), "qkv_bias='qv'"),
    ],
)
def test_another_network_is_refused_with_both_values(changes, named):
    source = drawn_weights("mim", position="relative_shared")
    name, value = next(iter(changes.items()))
    with pytest.raises(UserError) as raised:
        started(source, "classifier", **({"position": "relative", "pooling": "mean"} | changes))
    assert f"they have {named}, the config {name}={value!r}." in raised.value.happened
    assert f"Write --config.model.{named.replace(chr(39), '')}, or leave out" in raised.value.instead


def test_a_tokenizer_that_does_not_fit_is_named_as_one():
    with pytest.raises(UserError, match=r"those of a tokenizer, do not fit a classifier") as raised:
        started(drawn_weights("vqkd"), "classifier", position="relative", pooling="mean")
    assert "a run of stage 'mim'" in raised.value.instead


@pytest.mark.parametrize("name, title", [("timm_deit", "ViT in timm's names"), ("hf_clip", "Hugging Face CLIP")])
def test_weights_of_a_transformer_that_is_no_beit_are_named(name, title, tmp_path):
    path = teacher_cases.read(GOLDEN / "teachers.npz")[name].store(tmp_path)
    with pytest.raises(UserError, match=rf"not a BEiT \({title}\)") as raised:
        read(path)
    assert f"--config.teacher.weights={path} " in raised.value.instead


@pytest.mark.parametrize("normalization", ("imagenet", "half"))
def test_a_classifier_gives_a_tokenizer_its_encoder(normalization):
    arguments = arguments_of("classifier") | {"qkv_bias": "full"}
    teacher = dataclasses.replace(drawn_weights("classifier", arguments=arguments), normalization=normalization)
    sizes = arguments_of("vqkd")
    start = adapt_weights(teacher, "vqkd", sizes)
    assert {path.split("/")[1] for path in flat(start.variables)} == {"encoder", "encoder_norm"}
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 3)).astype(np.uint8)
    normalised = normalize(images, *NORMALIZATIONS[normalization])
    params = {"params": teacher.variables["params"]}
    theirs = Classifier.from_arguments(arguments).apply(params, normalised, method=Classifier.features)
    drawn = drawn_weights("vqkd", seed=4).variables
    drawn["params"] |= start.variables["params"]
    ours = VQKD.from_arguments(sizes).apply(drawn, to_unit_range(images), train=False).encoder_features
    np.testing.assert_allclose(ours, theirs[:, 1:], atol=2e-5)


def test_a_masked_image_model_does_not_initialise_a_tokenizer():
    with pytest.raises(UserError, match="those of a masked image model, which cannot initialise a tokenizer"):
        started(drawn_weights("mim"), "vqkd")
