"""Configs of every stage that trains, with networks so small that a test traces or compiles their step in seconds."""

from paths import CONFIGS

from beitv2_jax import config as config_lib
from beitv2_jax.models.ops import implementations
from beitv2_jax.planning import abstract_task

SMALL = {
    "mim": {
        "views.image_size": 48,
        "masking.num_masked": 5,
        "masking.min_patches": 2,
        "model.width": 24,
        "model.depth": 3,
        "model.num_heads": 3,
        "model.mlp_dim": 40,
        "model.codebook_size": 29,
        "model.early_layer": 2,
        "tokenizer.codes": "somewhere",
        "run.batch_size": 7,
    },
    "vqkd": {
        "views.image_size": 48,
        "model.encoder.width": 24,
        "model.encoder.depth": 3,
        "model.encoder.num_heads": 3,
        "model.encoder.mlp_dim": 40,
        "model.decoder.width": 20,
        "model.decoder.depth": 2,
        "model.decoder.num_heads": 5,
        "model.decoder.mlp_dim": 36,
        "model.codebook_size": 29,
        "model.code_dim": 6,
        "teacher.features": "somewhere",
        "run.batch_size": 7,
    },
    "finetune": {
        "views.image_size": 48,
        "model.width": 24,
        "model.depth": 3,
        "model.num_heads": 3,
        "model.mlp_dim": 40,
        "model.num_classes": 13,
        "run.batch_size": 7,
    },
    "segment": {
        "views.image_size": 160,  # a map of 5 x 5 at the coarsest, which no pooling leaves as it is
        "model.width": 24,
        "model.depth": 3,
        "model.num_heads": 3,
        "model.mlp_dim": 40,
        "model.num_classes": 13,
        "model.out_layers": (1, 2, 2, 3),
        "model.channels": 20,
        "model.aux_channels": 12,
        "run.batch_size": 7,
    },
    "segment_linear": {
        "views.image_size": 48,
        "evaluation.stride": 32,
        "model.num_classes": 13,
        "run.batch_size": 7,
    },
}


def small(stage, dtype="float32", **keys):
    """Return the small config of a stage with changed keys, complete and with the implementations of a TPU."""
    config = config_lib.load(f"{CONFIGS / stage}.py").copy_and_resolve_references().unlock()
    config.update_from_flattened_dict({**SMALL[stage], "efficiency.dtype": dtype, **keys})
    config.efficiency.update(implementations.resolve_auto(config.efficiency, "tpu"))
    return abstract_task.complete(config.lock())[0]
