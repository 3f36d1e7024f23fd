"""The step benchmarks run where nothing that reads data is installed, and count their work as the compiler does."""

import json
import subprocess
import sys

import pytest
from paths import CONFIGS, ROOT

from beitv2_jax import config as config_lib
from beitv2_jax.tasks import inputs
from benchmarks import cases, recipes

STEPS = [name for name, case in cases.CASES.items() if isinstance(case, cases.StepCase) and "large" not in name]
SIZES = {
    "views.image_size": 64,
    "run.batch_size": 3,
    **{f"{part}.{key}": value for part in ("model", "model.encoder", "tokenizer.encoder", "teacher")
       for key, value in {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}.items()},
    **{f"{part}.{key}": value for part in ("model.decoder", "tokenizer.decoder")
       for key, value in {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24}.items()},
    "model.early_layer": 1, "model.head_depth": 1, "model.codebook_size": 29, "tokenizer.codebook_size": 29,
    "model.num_classes": 7, "model.out_layers": (1, 1, 2, 2), "model.channels": 8, "model.aux_channels": 4,
}  # fmt: skip
PROGRAM = """
import sys
BLOCKED = {"ml_collections", "grain", "orbax", "PIL", "simplejpeg", "kornia_rs", "array_record", "tensorflow_datasets",
           "safetensors", "tensorboardX", "tqdm", "scipy.stats", "tensorflow", "torch"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name in BLOCKED or name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)
sys.meta_path.insert(0, Block())
import json
from benchmarks import cases
found, (sizes, names) = {}, json.load(sys.stdin)
for name in names:
    step = cases.step_of(name, {"quick": True, "changes": sizes})
    found[name] = {
        "parameters": step.parameters, "images": step.images, "traced": step.traced_flops,
        "by_arithmetic": sum(part.params for part in step.parts),
        "arithmetic": step.images * sum(part.flops for part in step.parts),
    }
from benchmarks import growth, parts, timing
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def built():
    """Every step, built in a process in which whatever reads data cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps([SIZES, STEPS]), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_step_is_built_without_what_reads_data(built):
    assert set(built) == set(STEPS) and len(STEPS) == 8
    assert all(step["images"] == 3 for step in built.values())


@pytest.mark.parametrize("name", STEPS)
def test_the_arithmetic_is_that_of_the_program(built, name):
    step = built[name]
    # in which order jax resizes along rows and columns is its own choice
    exact = 1e-3 if name == "segment" else 0.0
    assert step["traced"] == pytest.approx(step["arithmetic"], rel=exact, abs=0.0) and step["arithmetic"] > 0
    if name not in ("tokenize", "extract"):  # theirs is frozen
        assert step["parameters"] == step["by_arithmetic"]


@pytest.mark.parametrize(
    ("name", "stage", "sections"),
    [
        ("mim_base", "mim", ("model", "optim")),
        ("mim_large", "mim:large", ("model",)),
        ("vqkd", "vqkd", ("model", "optim")),
        ("finetune", "finetune", ("model", "augment")),
        ("segment", "segment", ("model", "loss")),
    ],
)
def test_recipes_are_those_of_the_configs(name, stage, sections):
    stem, _, arg = stage.partition(":")
    config, found = config_lib.load(f"{CONFIGS / stem}.py:{arg}"), recipes.recipe(name)
    assert found.stage == config.stage and found.views.image_size == config.views.image_size
    assert found.normalization == config.get("normalization", "imagenet")
    for section in sections:
        published = config[section].to_dict()
        for key, value in _flat(found[section]).items():
            if key in _flat(published) or section != "augment":
                assert _flat(published)[key] == value, f"{section}.{key}"
        if section == "model":
            assert set(_flat(found.model)) == set(_flat(published))
    assert set(found.efficiency) == set(inputs.COMPUTE_KEYS) >= set(config.efficiency) - {"accumulation_steps"}
    if config.stage == "mim":
        assert found.masking.num_masked == config.masking.num_masked


def test_a_tokenizer_in_the_step_is_the_one_that_is_trained():
    mim, vqkd = recipes.recipe("mim_base"), recipes.recipe("vqkd")
    assert {**mim.tokenizer.encoder} == {**vqkd.model.encoder}
    assert {**mim.tokenizer.decoder} == {**vqkd.model.decoder}
    assert mim.tokenizer.codebook_size == mim.model.codebook_size == vqkd.model.codebook_size


def _flat(values, prefix=""):
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
    return flat
