"""Keys that somebody has set, and those that weights, stored targets and data decide."""

import copy

import pytest
from absl import flags
from paths import CONFIGS

from beitv2_jax import config as config_lib
from beitv2_jax.config.flags import parse_flags
from beitv2_jax.config.settings import DECIDED
from beitv2_jax.errors import UserError


def load(spec, **values):
    config = config_lib.load(str(CONFIGS / spec))
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return config


def test_only_what_names_something_decides():
    assert config_lib.undecided(load("mim.py")) == set()
    assert config_lib.undecided(load("mim.py", tokenizer__run="x")) == {
        *("views.image_size", "model.patch_size", "model.codebook_size", "masking.num_masked", "masking.min_patches")
    }
    assert config_lib.undecided(load("probe.py", backbone__run="x")) == {"views.image_size", "probe.layers"}
    assert config_lib.undecided(load("probe.py", probe__protocol="ep")) == {"probe.duration", "probe.batch_size"}
    assert config_lib.undecided(load("finetune.py")) == {"model.num_classes"}


@pytest.mark.parametrize(
    "spec, key", [("finetune.py:base1600", "model.width"), ("finetune.py:21kbase", "model.num_classes")]
)
def test_a_preset_decides_although_it_sets_the_declared_value(spec, key):
    plain, preset = (load(name, init_from="x") for name in ("finetune.py", spec))
    assert key in config_lib.undecided(plain) and key not in config_lib.undecided(preset)
    assert "model.position" in config_lib.undecided(preset)


def test_a_flag_decides_although_it_sets_the_declared_value():
    values = flags.FlagValues()
    arguments = [f"--config={CONFIGS}/finetune.py", "--workdir=w", "--config.init_from=x", "--config.model.width=768"]
    parse_flags(["program", *arguments], values)
    found = config_lib.undecided(values.config)
    assert "model.width" not in found and "model.depth" in found
    assert config_lib.undecided(copy.deepcopy(values.config)) == found


def test_nothing_is_taken_from_an_earlier_stage_of_a_pipeline():
    stages = load("pipeline.py", teacher__weights="x").stages
    assert all(config_lib.undecided(stage) == set() for stage in stages.values())
    stages.mim.init_from = "x"
    assert "model.width" in config_lib.undecided(stages.mim)


def test_a_config_that_was_written_leaves_nothing_open():
    config = load("segment.py", init_from="x")
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.undecided(again) == set() != config_lib.undecided(config)
    done = config_lib.decided(config, {"model.width": 96, "model.out_layers": [1, 1, 2, 3]})
    assert config_lib.undecided(done) == set()
    assert config_lib.changed(config, done) == [
        ("model.out_layers", [4, 6, 8, 12], [1, 1, 2, 3]),
        ("model.width", 768, 96),
    ]


def test_every_key_that_can_be_decided_is_a_key_of_some_stage():
    known = {key for path in CONFIGS.glob("*.py") for key in config_lib.flatten(load(path.name))}
    assert {*DECIDED, *(key for keys in DECIDED.values() for key in keys if "coder" not in key)} - known <= {
        "model.code_dim"
    }


def test_sizes_that_will_be_decided_are_not_compared_with_declared_ones():
    """A given early layer may be one that the weights have; a given depth may not have it."""
    config = load("mim.py", tokenizer__run="x", init_from="x", model__early_layer=20)
    config_lib.validate(config)
    config.model.depth = 12
    with pytest.raises(UserError, match=r"model\.early_layer=20"):
        config_lib.validate(config)
