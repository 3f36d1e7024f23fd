"""What the classes are that a model predicts, kept in files beside its weights."""

import json
from typing import Any

from beitv2_jax.convert.files import read_config, run_directory

INPUTS_FILE = "inputs.json"
"""File of a run that holds the class names of its data."""
PROBLEM_TYPE = {"problem_type": "multi_label_classification"}
"""What the config.json of Hugging Face says of a classifier whose classes do not exclude each other."""


def class_names_of(path: str, num_classes: int) -> tuple[str, ...]:
    """Return the names of the classes of the weights at `path`, in the order of the outputs; () if there are none.

    They stand in the `inputs.json` of a run, as `id2label` in the config.json of Hugging Face and as `label_names` in
    that of timm, which may be synsets with a description of each in `label_descriptions`.
    """
    if not num_classes:
        return ()
    if (train := _data_of_run(path)) is not None:
        names = train["classes"]
    else:
        config: dict[str, Any] = read_config(path) or {}
        labels = config.get("id2label") or config.get("label_names") or []
        if isinstance(labels, dict):
            labels = [labels[str(number)] for number in range(num_classes) if str(number) in labels]
        descriptions = config.get("label_descriptions") or {}
        names = [descriptions.get(name, name) for name in labels]
    return tuple(names) if len(names) == num_classes else ()


def is_multi_label(path: str) -> bool:
    """Return whether the weights at `path` say that an image may have several of their classes.

    A run says it in its `inputs.json`, a folder of Hugging Face or of `beitv2 convert` for timm by its `problem_type`.
    """
    if (train := _data_of_run(path)) is not None:
        return train.get("multi_label", False)
    return PROBLEM_TYPE.items() <= (read_config(path) or {}).items()


def _data_of_run(path: str) -> dict[str, Any] | None:
    """Return what a run keeps of its training data; None for other weights."""
    inputs = run_directory(path) / INPUTS_FILE
    return json.loads(inputs.read_text())["train"] if inputs.is_file() else None
