"""Schedules to the last digits, and decay and rate of every parameter of the full-size models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from golden_files import Golden
from golden_models import position_of
from paths import CONFIGS
from without_data import no_data

from beitv2_jax import config as config_lib
from beitv2_jax.convert.beit.official import official_name, to_official
from beitv2_jax.models.quantizer import TRAINING_COUNTERS
from beitv2_jax.sizes import SIZES
from beitv2_jax.tasks import finetune, mim, vqkd
from beitv2_jax.training import optim
from beitv2_jax.training.sharding import path_name

SCHEDULE_TOLERANCE = 1e-12  # relative to the largest value of the schedule
MOVE_TOLERANCE = 1e-5  # relative: what 1 - 0.999 in Adam's correction loses in float32


def check_schedules(golden: Golden):
    for case, settings in golden.config["schedules"].items():
        golden.check(f"schedule/{case}", schedule(settings), SCHEDULE_TOLERANCE)
    for group in golden.config["groups"]:
        check_group(golden, group)


def num_warmup_steps(settings):
    """Return the length of the warm-up in released arguments: steps replace epochs where they are positive."""
    steps = settings.get("warmup_steps", -1)
    return steps if steps > 0 else settings.get("warmup_epochs", 0) * settings["niter_per_ep"]


def schedule(settings):
    """Return the values of a released schedule from ours; a weight decay is one without warm-up."""
    assert settings.get("start_warmup_value", 0) == 0, "our warm-up starts at 0, as every published one"
    num_steps, warmup_steps = settings["epochs"] * settings["niter_per_ep"], num_warmup_steps(settings)
    base_value, final_value = settings["base_value"], settings["final_value"]
    steps = np.arange(num_steps)
    if not warmup_steps:
        return optim.cosine(steps, start=base_value, end=final_value, num_steps=num_steps)
    return optim.learning_rate(
        steps, peak_lr=base_value, min_lr=final_value, warmup_steps=warmup_steps, num_steps=num_steps
    )


def build(settings, shapes):
    """Return the kind of a group's model, and task and config of the stage that trains it, with the group's sizes."""
    arguments, name = settings["model_args"], settings["model"]
    size = "large" if "large" in name else "base"
    width = shapes["decode_task_layer.2.weight"][0] if name == "vqkd" else 0
    with no_data(teacher_width=width):
        if name == "vqkd":
            config = config_lib.load(f"{CONFIGS / 'vqkd'}.py")
            config.model.decoder.depth = arguments["dec_depth"]
            config.teacher.features = "somewhere"
            return "vqkd", vqkd.build(config), config
        common = dict(position=position_of(arguments), layer_scale_init=arguments["init_values"])
        if "cls_pt" in name:
            config = config_lib.load(f"{CONFIGS / 'mim'}.py:{size}")
            config.model.update(early_layer=arguments["early_layers"], head_depth=arguments["head_layers"], **common)
            config.model.update(shared_head=arguments["shared_lm_head"], codebook_size=shapes["lm_head.weight"][0])
            config.tokenizer.codes = "somewhere"
            return "mim", mim.build(config), config
        config = config_lib.load(f"{CONFIGS / 'teacher'}.py")
        config.views.image_size = 224
        config.model.update(SIZES[size], num_classes=arguments["num_classes"], **common)
        return "classifier", finetune.build(config), config


def by_path(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def check_group(golden, group):
    """Compare names, shapes, decay and layer of every parameter, and how far one step moves it.

    Of equal gradients Adam's part is 1 in the first step, so a parameter of 1 moves by -rate * scale * (1 + decay).
    """
    settings = golden.config["groups"][group]
    released = json.loads(str(golden.take(f"groups/{group}")))
    entries = released["params"]
    kind, task, config = build(settings, released["shapes"])
    config.optim.update(layer_decay=settings["layer_decay"] or 1.0, weight_decay=settings["weight_decay"])
    made = jax.eval_shape(task.init, jax.random.key(0))
    for counter in TRAINING_COUNTERS:
        made["model_state"].get("quantizer", {}).pop(counter, None)
    variables = {"params": made["params"], "codebook": made["model_state"]}
    names = {path: official_name(kind, f"params/{path}") for path in by_path(variables["params"])}
    assert set(names.values()) == set(entries)
    arrays = to_official(kind, jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), variables))
    assert {name: list(arrays[name].shape) for name in entries} == {name: released["shapes"][name] for name in entries}

    optimizer, rate = optim.for_task(task, config.optim, warmup_steps=2, num_steps=7)
    ones = jax.tree.map(lambda leaf: jnp.ones(()), variables["params"])
    moves, _ = optimizer.update(ones, optimizer.init(ones), ones, step=1)
    scale_error = move_error = 0.0
    for path, move in by_path(moves).items():
        entry, layer = entries[names[path]], task.layer_of(path)
        assert task.no_decay(path) != entry["decay"], path
        assert layer == entry.get("layer_id"), path
        scale = optim.layer_scale(layer, layer_decay=config.optim.layer_decay, num_layers=task.num_layers)
        expected = -float(rate(1)) * entry["lr_scale"] * (1.0 + entry["weight_decay"])
        scale_error = max(scale_error, abs(scale / entry["lr_scale"] - 1.0))
        move_error = max(move_error, abs(float(move) / expected - 1.0))
    golden.note(f"groups/{group}", scale_error, SCHEDULE_TOLERANCE, "relative", "rate scale of every parameter")
    golden.note(f"groups/{group}", move_error, MOVE_TOLERANCE, "relative", "first move of every parameter")
