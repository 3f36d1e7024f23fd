"""The Python API: the numbers of the stages, from any kind of image, and errors that say what to pass."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_states import arguments_of, drawn_weights
from paths import CONFIGS, ROOT
from PIL import Image

import beitv2_jax
from beitv2_jax import api
from beitv2_jax import config as config_lib
from beitv2_jax.convert.arguments import MODELS
from beitv2_jax.convert.writing import write
from beitv2_jax.data.pipeline import eval_batches
from beitv2_jax.data.segmentation.sources import FolderLabelMaps
from beitv2_jax.data.sources import open_source
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.preprocess import IMAGENET_MEAN, IMAGENET_STD
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.tasks import segment, tokenize

NUM_IMAGES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of different sizes, which the stages read as a data set."""
    root = tmp_path_factory.mktemp("images")
    (root / "train").mkdir()
    for number in range(NUM_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 31 - number, 3), np.uint8)
        Image.fromarray(pixels).save(root / "train" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run directory of each kind of weights, with sizes that all differ."""
    root = tmp_path_factory.mktemp("runs")
    for kind in MODELS:
        write(drawn_weights(kind, position="absolute" if kind == "vqkd" else "relative"), str(root / kind), "run")
    return root


def paths_of(folder):
    return sorted((folder / "train").glob("*.png"))


def staged(folder, image_size, crop_fraction=0.875):
    """Return the pixels of all images as the evaluation of the stages prepares them."""
    source = open_source(f"folder:{folder}", "train")
    (batch,) = eval_batches(source, image_size=image_size, batch_size=NUM_IMAGES, crop_fraction=crop_fraction)
    return batch["images"]


def normalised(pixels):
    return (pixels / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)


def test_a_classifier_gives_the_logits_of_the_stages_for_every_kind_of_image(folder, runs):
    classifier = beitv2_jax.load_classifier(runs / "classifier")
    weights = drawn_weights("classifier", position="relative")
    model = MODELS["classifier"].from_arguments(weights.arguments)
    pixels = staged(folder, classifier.image_size)
    expected = model.apply({"params": weights.variables["params"]}, jnp.float32(normalised(pixels)))
    paths = paths_of(folder)
    arrays = [np.asarray(Image.open(path)) for path in paths]
    for images in (paths, [str(path) for path in paths], [Image.open(path) for path in paths], arrays):
        np.testing.assert_allclose(classifier.logits(images), expected, rtol=2e-5, atol=2e-5)
    for image in (paths[2], arrays[2], Image.open(paths[2]), arrays[2][None]):
        np.testing.assert_allclose(classifier.logits(image), expected[2:3], rtol=2e-5, atol=2e-5)
    # the crop that goes with the weights
    object.__setattr__(classifier, "weights", dataclasses.replace(classifier.weights, stated_crop_fraction=0.5))
    pixels = staged(folder, classifier.image_size, 0.5)
    expected = model.apply({"params": weights.variables["params"]}, jnp.float32(normalised(pixels)))
    np.testing.assert_allclose(classifier.logits(paths), expected, rtol=2e-5, atol=2e-5)


def test_predictions_are_sorted_probabilities_under_the_names_of_the_run(folder, runs, tmp_path):
    names = [f"class {number}" for number in range(17)]
    write(drawn_weights("classifier"), str(tmp_path / "run"), "run")
    (tmp_path / "run" / "inputs.json").write_text(json.dumps({"train": {"classes": names}}))
    classifier = beitv2_jax.load_classifier(tmp_path / "run")
    predictions = classifier.predict(paths_of(folder), top=3)
    logits = classifier.logits(paths_of(folder)).astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert [[p.name for p in row] for row in predictions] == [
        [names[k] for k in np.argsort(-row)[:3]] for row in probabilities
    ]
    np.testing.assert_allclose([[p.probability for p in row] for row in predictions], -np.sort(-probabilities)[:, :3])
    assert beitv2_jax.load_classifier(runs / "classifier").class_names == tuple(map(str, range(17)))


def test_a_tokenizer_gives_the_ids_of_the_stages_and_decodes_them(folder, runs):
    tokenizer = beitv2_jax.load_tokenizer(runs / "vqkd")
    pixels = staged(folder, tokenizer.image_size)
    own, variables = tokenize.load_tokenizer(str(runs / "vqkd"), tokenizer.image_size, "float32")
    ids = tokenizer.encode(paths_of(folder))
    assert ids.shape == (NUM_IMAGES, 3, 3)
    np.testing.assert_array_equal(ids.reshape(NUM_IMAGES, -1), own.encode(variables, jnp.float32(pixels)))
    model = VQKD.from_arguments(drawn_weights("vqkd").arguments)
    whole = model.apply(variables, jnp.float32(pixels) / 127.5 - 1.0, train=False)
    features = tokenizer.decode(ids)
    assert features.shape == (NUM_IMAGES, 3, 3, 23)
    np.testing.assert_allclose(features.reshape(NUM_IMAGES, 9, 23), whole.reconstruction, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(
        tokenizer.codebook, drawn_weights("vqkd").variables["codebook"]["quantizer"]["codebook"]
    )


@pytest.mark.parametrize(
    "options", [{"quantizer": "simvq"}, {"quantizer": "fsq", "fsq_levels": [3, 2, 5], "code_dim": 3}]
)
def test_tokenizers_without_a_table_of_codes_decode_what_they_encode(folder, tmp_path, options):
    arguments = {**arguments_of("vqkd"), "codebook_size": 30, **options}
    weights = drawn_weights("vqkd", arguments=arguments)
    write(weights, str(tmp_path / "w"), "run")
    tokenizer = beitv2_jax.load_tokenizer(tmp_path / "w")
    model = VQKD.from_arguments(arguments)
    pixels = jnp.float32(staged(folder, tokenizer.image_size))
    whole = jax.jit(lambda: model.apply(weights.variables, pixels / 127.5 - 1.0, train=False))()
    ids = tokenizer.encode(paths_of(folder))
    np.testing.assert_array_equal(ids.reshape(NUM_IMAGES, 9), whole.code_ids)
    np.testing.assert_allclose(tokenizer.codebook[ids].reshape(whole.codes.shape), whole.codes, atol=1e-5)
    features = tokenizer.decode(ids).reshape(whole.reconstruction.shape)
    np.testing.assert_allclose(features, whole.reconstruction, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_a_backbone_gives_tokens_hidden_layers_and_attention(folder, runs, kind):
    backbone = beitv2_jax.load_backbone(runs / kind)
    assert backbone.depth == 2
    found = backbone(paths_of(folder), layers=(1, 2), attention=(1, 2))
    assert found.cls.shape == (NUM_IMAGES, 10) and found.patches.shape == (NUM_IMAGES, 3, 3, 10)
    np.testing.assert_array_equal(found.cls, found.hidden[2][:, 0])
    np.testing.assert_array_equal(found.patches.reshape(NUM_IMAGES, 9, 10), found.hidden[2][:, 1:])
    np.testing.assert_allclose(found.attention[1].sum(axis=-1), 1.0, rtol=1e-5)
    # the second block by hand: its attention is that of the tokens after the first
    params = drawn_weights(kind, position="absolute" if kind == "vqkd" else "relative").variables["params"]
    block = params["encoder" if kind == "vqkd" else "backbone"]["blocks_1"]
    tokens = found.hidden[1].astype(np.float64)
    spread = tokens - tokens.mean(axis=-1, keepdims=True)
    normed = spread / np.sqrt((spread**2).mean(axis=-1, keepdims=True) + 1e-6)
    normed = normed * block["norm1"]["scale"] + block["norm1"]["bias"]
    queries, keys, _ = np.split(normed @ block["attn"]["qkv"]["kernel"], 3, axis=-1)
    queries = queries + block["attn"]["q_bias"]
    queries, keys = (part.reshape(NUM_IMAGES, 10, 2, 5).transpose(0, 2, 1, 3) for part in (queries, keys))
    logits = queries @ keys.transpose(0, 1, 3, 2) / np.sqrt(5)
    if kind != "vqkd":
        logits = logits + relative_bias(block["attn"]["rel_pos_bias"]["table"])
    expected = np.exp(logits - logits.max(axis=-1, keepdims=True))
    np.testing.assert_allclose(found.attention[2], expected / expected.sum(axis=-1, keepdims=True), atol=2e-4)


def relative_bias(table, side=3):
    """Return the bias 'nh l l' of a table; its last rows are [CLS] to patch, patch to [CLS], [CLS] to [CLS]."""
    bias = np.empty((table.shape[1], side * side + 1, side * side + 1))
    for i in range(side * side):
        for j in range(side * side):
            down, right = i // side - j // side + side - 1, i % side - j % side + side - 1
            bias[:, 1 + i, 1 + j] = table[down * (2 * side - 1) + right]
    bias[:, 0, 1:], bias[:, 1:, 0], bias[:, 0, 0] = table[-3][:, None], table[-2][:, None], table[-1]
    return bias


def test_the_last_norm_is_applied_on_request(folder, runs):
    backbone = beitv2_jax.load_backbone(runs / "mim")
    plain, normed = backbone(paths_of(folder)), backbone(paths_of(folder), norm=True)
    params = drawn_weights("mim", position="relative").variables["params"]["norm"]
    spread = plain.cls - plain.cls.mean(axis=-1, keepdims=True)
    expected = spread / np.sqrt((spread**2).mean(axis=-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]
    np.testing.assert_allclose(normed.cls, expected, rtol=1e-4, atol=1e-4)


def test_a_segmenter_gives_the_label_maps_of_the_stage(tmp_path):
    arguments = dict(position="relative", patch_size=8, grid=4)
    write(drawn_weights("segmenter", **arguments), str(tmp_path / "run"), "run")
    for part in ("images", "annotations"):
        (tmp_path / "data" / part / "train").mkdir(parents=True)
    image = np.random.default_rng(0).integers(0, 256, (43, 61, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "data/images/train/1.png")
    Image.fromarray(image[..., 0] % 17).save(tmp_path / "data/annotations/train/1.png")
    config = config_lib.load(f"{CONFIGS / 'segment'}.py").unlock()
    config.views.image_size = 32
    config.evaluation.update(stride=21)
    assert beitv2_jax.load_segmenter(tmp_path / "run").sliding == segment.sliding_of(config)  # as published
    config.evaluation.update(long_side=80, short_side=50)
    file = tmp_path / "run" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"evaluation": config.evaluation.to_dict()}))
    segmenter = beitv2_jax.load_segmenter(tmp_path / "run")
    config.model.num_classes = 17
    config.labels.update(offset=0, ignored=())
    (batch,) = segment.EvalBatches(config, FolderLabelMaps(str(tmp_path / "data"), "train"))(0, 1)
    batch = {name: array[:1] for name, array in batch.items() if name != "faults"}
    weights = drawn_weights("segmenter", **arguments)
    model = segment.Segmenter.from_arguments(weights.arguments, Compute())
    states = weights.variables["params"], weights.variables["batch_stats"]
    expected = segment.predict(model, "imagenet", segment.sliding_of(config), *states, batch).label_maps
    (found,) = segmenter.predict(image)
    assert found.shape == (43, 61) and len(np.unique(found)) > 1
    np.testing.assert_array_equal(found, np.asarray(expected)[0, :43, :61])


def test_many_images_are_computed_in_few_sizes_of_batches(runs, monkeypatch):
    monkeypatch.setattr(api, "BATCH_SIZE", 8)
    classifier, sizes = beitv2_jax.load_classifier(runs / "classifier"), []
    images = np.random.default_rng(1).integers(0, 256, (21, 12, 12, 3), np.uint8)
    run = classifier._logits
    classifier.__dict__["_logits"] = lambda variables, pixels: sizes.append(len(pixels)) or run(variables, pixels)
    logits = classifier.logits(images)
    assert logits.shape == (21, 17) and sizes == [8, 8, 8]
    np.testing.assert_allclose(logits[17], classifier.logits(images[17])[0], rtol=1e-5, atol=1e-5)
    assert len(jax.local_devices()) == 8 == sizes[-1]  # one row a device


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda runs: beitv2_jax.load_tokenizer(runs / "mim"), "kind 'mim', which is not a tokenizer"),
        (lambda runs: beitv2_jax.load_classifier("nowhere"), "no weights file at nowhere"),
        (lambda runs: beitv2_jax.load_classifier(runs / "classifier").logits("nowhere.jpg"), "no image nowhere.jpg"),
        (lambda runs: beitv2_jax.load_classifier(runs / "classifier").logits([]), "no images"),
        (
            lambda runs: beitv2_jax.load_classifier(runs / "classifier").logits(np.zeros((4, 4, 3))),
            r"shape \(4, 4, 3\) and the type float64",
        ),
        (lambda runs: beitv2_jax.load_backbone(runs / "mim")(np.zeros((4, 4, 3), np.uint8), layers=(3,)), "no layer 3"),
        (lambda runs: beitv2_jax.load_tokenizer(runs / "vqkd").decode(np.zeros((1, 2, 3), int)), r"\(1, 2, 3\)"),
        (lambda runs: beitv2_jax.load_tokenizer(runs / "vqkd").decode(np.full((1, 3, 3), 19)), "between 19 and 19"),
    ],
)
def test_mistakes_are_named(runs, call, message):
    with pytest.raises(UserError, match=message):
        call(runs)


def test_importing_the_package_loads_nothing_heavy():
    program = (
        "import sys, beitv2_jax; assert not {'jax', 'numpy', 'flax'} & sys.modules.keys(); "
        "print(beitv2_jax.load_backbone.__name__, beitv2_jax.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["load_backbone", beitv2_jax.__version__]
