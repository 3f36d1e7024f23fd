"""The names of the classes that a model predicts, kept in files beside its weights."""

import json
from typing import Any

from beitv2_jax.convert.files import read_config, run_directory

INPUTS_FILE = "inputs.json"
"""File of a run that holds the class names of its data."""


def class_names_of(path: str, num_classes: int) -> tuple[str, ...]:
    """Return the names of the classes of the weights at `path`, in the order of the outputs; () if there are none.

    They stand in the `inputs.json` of a run, as `id2label` in the config.json of Hugging Face and as `label_names` in
    that of timm, which may be synsets with a description of each in `label_descriptions`.
    """
    if not num_classes:
        return ()
    inputs = run_directory(path) / INPUTS_FILE
    if inputs.is_file():
        names = json.loads(inputs.read_text())["train"]["classes"]
    else:
        config: dict[str, Any] = read_config(path) or {}
        labels = config.get("id2label") or config.get("label_names") or []
        if isinstance(labels, dict):
            labels = [labels[str(number)] for number in range(num_classes) if str(number) in labels]
        descriptions = config.get("label_descriptions") or {}
        names = [descriptions.get(name, name) for name in labels]
    return tuple(names) if len(names) == num_classes else ()
