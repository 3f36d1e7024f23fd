"""The model card of exported weights, filled from their run and from the runs that it was made from.

It states nothing that the runs do not know. Of paths it has the last part only.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from beitv2_jax import __version__
from beitv2_jax.convert.class_names import INPUTS_FILE
from beitv2_jax.convert.files import located, read_config
from beitv2_jax.convert.runs import is_run
from beitv2_jax.convert.teachers.terms import rows_of, teachers_of_run
from beitv2_jax.models.preprocess import NORMALIZATIONS

CARD_FILE = "README.md"


class Licenses(NamedTuple):
    """Licences, as the Hugging Face hub has them ('apache-2.0'), and the origin of the teacher; '' is not stated."""

    weights: str = ""
    teacher: str = ""
    origin: str = ""


NOTHING_STATED = Licenses()

_KINDS = {
    "classifier": ("An image classifier", "image-classification"),
    "mim": ("A vision transformer pre-trained by masked image modelling", "image-feature-extraction"),
    "backbone": ("A vision transformer without a head", "image-feature-extraction"),
    "segmenter": ("A semantic segmentation network (UPerNet)", "image-segmentation"),
}
"""Kind -> what it is, its task on the Hugging Face hub."""
_USE = {
    ("transformers", "classifier"): """\
from transformers import pipeline

classify = pipeline("image-classification", model="FOLDER")
print(classify("photo.jpg"))""",
    ("transformers", "mim"): """\
from PIL import Image
from transformers import AutoImageProcessor, BeitModel

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = BeitModel.from_pretrained("FOLDER", add_pooling_layer=False).eval()
tokens = model(**processor(Image.open("photo.jpg"), return_tensors="pt")).last_hidden_state""",
    ("transformers", "backbone"): """\
from PIL import Image
from transformers import AutoImageProcessor, BeitModel

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = BeitModel.from_pretrained("FOLDER").eval()
features = model(**processor(Image.open("photo.jpg"), return_tensors="pt")).pooler_output""",
    ("transformers", "segmenter"): """\
from transformers import pipeline

segment = pipeline("image-segmentation", model="FOLDER")
print(segment("photo.jpg"))""",
    ("timm", "classifier"): """\
import timm
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
probabilities = model(transform(Image.open("photo.jpg"))[None]).softmax(-1)""",
    ("timm", "mim"): """\
import timm
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(Image.open("photo.jpg"))[None])  # the normalised [CLS]""",
    ("timm", "backbone"): """\
import timm
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(Image.open("photo.jpg"))[None])""",
}
_STAGES = {
    "finetune": "Training of the classifier",
    "segment": "Training of the segmentation network",
    "mim": "Pre-training by masked image modelling",
    "tokenize": "Code ids",
    "vqkd": "Training of the tokenizer",
    "cluster": "Clusters of teacher features",
    "extract": "Teacher features",
}
"""Stage -> heading of its table."""
_MADE_FROM = ("init_from", "tokenizer.run", "tokenizer.codes", "teacher.features", "teacher.weights")
"""Keys of a config that name weights or targets that a run was made from."""
_CACHE_MANIFEST = os.path.join("views", "manifest.json")
_RECIPE = {
    "run.duration": "duration",
    "run.batch_size": "batch size",
    "optim.peak_lr": "peak learning rate",
    "optim.warmup": "warm-up",
    "optim.weight_decay": "weight decay",
    "optim.layer_decay": "layer decay",
    "model.drop_path_rate": "stochastic depth",
    "views.image_size": "image size",
    "views.num_views": "stored views per image",
    "model.codebook_size": "codes",
    "seed": "seed",
}
"""Key of a config -> what the card calls it."""


@dataclasses.dataclass(frozen=True)
class _Run:
    directory: str

    @property
    def config(self) -> dict:
        return read_config(self.directory) or {}

    def json(self, name: str) -> dict:
        return (read_config(self.directory, name) or {}) if (located(self.directory) / name).is_file() else {}

    def path(self, key: str) -> str:
        """Return the path that a key of the config names; '' for none."""
        pipeline = os.path.dirname(os.path.abspath(self.directory))
        return str(_value(self.config, key) or "").replace("{workdir}", pipeline)


def make_card(
    kind: str,
    arguments: Mapping[str, Any],
    normalization: str,
    crop_fraction: float,
    source: str,
    library: str,
    licenses,
    *,
    multi_label: bool = False,
) -> str:
    """Return the card of weights of this `kind`.

    Args:
        kind: one of `_KINDS`.
        arguments: of the model, complete.
        normalization: name of the input normalisation.
        crop_fraction: fraction of the resized shorter side that the central crop keeps.
        source: path that the weights were read from; '' if there is none.
        library: 'transformers' or 'timm', which reads the folder.
        licenses: what the user stated.
        multi_label: whether an image may have several of the classes.
    """
    title, task = _KINDS[kind]
    use = _USE[library, kind]
    if multi_label:
        title, use = "A multi-label image classifier", use.replace(".softmax(-1)", ".sigmoid()")
    header = {"library_name": library, "pipeline_tag": task, "tags": ["beit", "beitv2", "vision-transformer"]}
    header |= {"license": licenses.weights} if licenses.weights else {}
    size, (mean, std) = arguments["image_size"], NORMALIZATIONS[normalization]
    short = int(size / crop_fraction)
    resized = (
        f"The network was evaluated on windows of {size} x {size} pixels that slide over the image; this folder "
        "stretches the whole image to one window."
        if kind == "segmenter"
        else f"Resize the shorter side to {short} pixels (bicubic) and cut the central {size} x {size} pixels."
    )
    parts = [
        "---\n" + "\n".join(f"{name}: {json.dumps(value)}" for name, value in header.items()) + "\n---",
        f"# {Path(source).name or 'BEiT v2'}",
        f"{title}: ViT with patches of {arguments['patch_size']} pixels, width {arguments['width']}, "
        f"{arguments['depth']} blocks and {arguments['num_heads']} heads. The method is BEiT v2 "
        f"([arXiv 2208.06366](https://arxiv.org/abs/2208.06366)); the folder was written by beitv2_jax {__version__}.",
        f"## How to use\n\n```python\n{use}\n```"
        + "\n\nAn image may have several classes or none: each has a probability of its own, the sigmoid of its logit."
        * multi_label,
        f"## Input\n\n{resized} Then scale the values to 0..1 and normalise with mean {list(mean)} and standard "
        f"deviation {list(std)}; the files beside this card say the same.",
        *_origin(source, licenses),
    ]
    return "\n\n".join(parts) + "\n"


def _origin(source: str, licenses: Licenses) -> list[str]:
    """Return the sections on how the weights were made."""
    if not is_run(source):
        return [
            f"## Origin\n\nConverted from {Path(source).name or 'weights'}, which does not say how they were trained."
        ]
    sections = [f"## {_STAGES[run.config['stage']]}\n\n{_table(_facts(run))}" for run in _lineage(_Run(source))]
    for name, licence, origin in rows_of(teachers_of_run(source)):
        facts = {"weights": name, "licence": licenses.teacher or licence, "origin": licenses.origin or origin}
        sections.append(f"## Teacher\n\n{_table(facts)}")
    return sections


def _lineage(first: _Run) -> list[_Run]:
    """Return the runs that `first` was made from, itself first, as far as they are there."""
    runs, pending, seen = [], [first], set()
    while pending:
        run = pending.pop(0)
        if os.path.abspath(run.directory) in seen:
            continue
        seen.add(os.path.abspath(run.directory))
        runs.append(run)
        for key in _MADE_FROM:
            path = run.path(key)
            if path and is_run(path) and read_config(path)["stage"] in _STAGES:
                pending.append(_Run(path))
    return runs


def _facts(run: _Run) -> dict[str, str]:
    """Return what a run knows of itself: its data, its recipe, what it was made from and its final figures."""
    config, summary = run.config, run.json("summary.json")
    train = run.json(INPUTS_FILE).get("train", {})
    facts = {}
    if train.get("source"):
        facts["images"] = f"{train['examples']:,} of {train['source']}, split {train['split']}"
    if train.get("classes"):
        facts["classes"] = str(len(train["classes"]))
    facts |= {title: str(_value(config, key)) for key, title in _RECIPE.items() if _value(config, key) is not None}
    if facts.get(_RECIPE["views.num_views"]) == "0":
        facts[_RECIPE["views.num_views"]] = "none, a new view each epoch"
    for key in _MADE_FROM:
        if run.path(key):
            facts[key] = Path(run.path(key)).name
    manifest = run.json(_CACHE_MANIFEST)
    facts |= {name: str(manifest[name]) for name in ("teacher", "teacher_output", "dtype") if name in manifest}
    metrics = summary.get("metrics", {})
    if "run" not in config:
        facts["origin"] = "weights that were converted; how they were trained is not recorded"
    elif not metrics:
        facts["state"] = "not finished when it was exported"
    names = [name for name in metrics if name.startswith("eval/") or name in ("steps", "train_examples")]
    return facts | {name: f"{metrics[name]:.5g}" for name in names}


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _table(facts: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])
