"""Configs: common sections, presets, durations, text form, and the checks made before any computation.

A config is a locked `ConfigDict` that a file in `configs/` builds. This package knows the keys of configs, but no
model, task or loop, and does not import jax.
"""

from beitv2_jax.config.checks import validate
from beitv2_jax.config.durations import UNITS, parse_duration, steps
from beitv2_jax.config.load import (
    HARMLESS,
    apply_presets,
    changed,
    expand_home,
    flatten,
    from_json,
    link,
    load,
    resolve,
    to_json,
)
from beitv2_jax.config.paths import refuse_remote
from beitv2_jax.config.pipelines import stage_errors
from beitv2_jax.config.settings import decided, undecided

__all__ = [
    "HARMLESS",
    "UNITS",
    "apply_presets",
    "changed",
    "decided",
    "expand_home",
    "flatten",
    "from_json",
    "link",
    "load",
    "parse_duration",
    "refuse_remote",
    "resolve",
    "stage_errors",
    "steps",
    "to_json",
    "undecided",
    "validate",
]
