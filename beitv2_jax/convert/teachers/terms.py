"""Licence and origin of the teachers that a run learns from, directly or through tokenizers and initial weights.

A run keeps them in its `inputs.json` as a list of {"name", "license", "origin"}, and a target cache of features in its
manifest. What is not stated is 'unknown'.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beitv2_jax import config as config_lib
from beitv2_jax.config.paths import HUB, PIXELS
from beitv2_jax.convert.class_names import INPUTS_FILE
from beitv2_jax.convert.files import located, read_config, run_directory
from beitv2_jax.convert.runs import is_run
from beitv2_jax.data.target_cache.manifest import MANIFEST_FILE
from beitv2_jax.runtime.buckets import AnyPath

UNKNOWN = "unknown"
OWN = "own network, trained by a run of this package"
HOW_TO_STATE = "teacher.license and teacher.origin of the stage that reads the teacher state them"
CARD, LICENSES = "README.md", ("LICENSE", "LICENSE.md", "LICENSE.txt", "COPYING")
"""Files beside weights that state their licence."""
_THROUGH = ("init_from", "backbone.run", "tokenizer.run", "tokenizer.codes")
"""Keys of a config that name runs which may have learnt from a teacher."""
_LEARN_FROM_TEACHERS = ("vqkd", "cluster", "mim")
_CACHED = re.compile(r"models--(.+?)--(.+?)/snapshots/([0-9a-f]{7,40})(/|$)")
"""Where the hub's library keeps OWNER/NAME at a commit."""


def terms_of_weights(weights: str, *, license: str = "", origin: str = "") -> dict[str, str]:
    """Return {"name", "license", "origin"} of teacher weights at a path or an address of the Hugging Face hub.

    `license` and `origin` are what the user states. Without them the licence is the one in the head of README.md, the
    title of a LICENSE file or what timm's config.json has, beside the weights; the origin is the address on the hub, of
    files in its cache too, or the name that config.json gives. Of a run of this package they follow from the run.
    """
    if weights == PIXELS:
        return _entry(PIXELS, license or "that of the images", origin or "the images themselves")
    place = located(weights)
    if place.exists() and is_run(weights):
        found = _terms_of_run(weights)
    elif place.exists():
        found = _license_beside(place, weights), _origin_of(place, weights)
    else:
        found = "", ""
    return _entry(Path(weights).name, license or found[0], origin or found[1])


def teachers_of(config: Mapping[str, Any], *, fetch: bool = True) -> list[dict[str, str]]:
    """Return the teachers that a run with this config, whose paths are complete, learns from: {"name", ...} of each.

    Without `fetch`, of weights on the hub the address alone is known.
    """
    flat = config_lib.flatten(config)
    paths = {key: flat.get(key) or "" for key in (*_THROUGH, "teacher.features")}
    weights = flat.get("teacher.weights") or ""
    stated = {name: flat.get(f"teacher.{name}") or "" for name in ("license", "origin")}
    found = [entry for key in _THROUGH if paths[key] for entry in _teachers_behind(key, paths[key])]
    if paths["teacher.features"]:
        first, *others = _teachers_of_features(paths["teacher.features"])
        found += [{**first, **{name: _line(text) for name, text in stated.items() if text}}, *others]
    elif weights and (fetch or not weights.startswith(HUB)):
        found += [terms_of_weights(weights, **stated), *_teachers_behind("teacher.weights", weights)]
    elif weights:
        found.append(_entry(Path(weights).name, stated["license"], stated["origin"] or weights))
    return [entry for place, entry in enumerate(found) if entry not in found[:place]]


def teachers_of_run(directory: str) -> list[dict[str, str]]:
    """Return the teachers that a run learnt from, as it has recorded them, else as far as its config leads to them."""
    recorded = (read_config(directory, INPUTS_FILE) or {}).get("teachers")
    if recorded is not None:
        return recorded
    root = run_directory(directory)
    config = config_lib.flatten(read_config(directory) or {})
    texts = {key: value for key, value in config.items() if isinstance(value, str)}
    complete = {key: text.replace("{workdir}", str(root.parent)) for key, text in texts.items()}
    found = teachers_of(complete, fetch=False)
    return found or ([_unknown_of(root.name)] if texts["stage"] in _LEARN_FROM_TEACHERS else [])


def rows_of(teachers: Sequence[Mapping[str, str]]) -> list[tuple[str, str, str]]:
    """Return (name, licence, origin) of each teacher, as a page shows them."""
    how = f"{UNKNOWN} ({HOW_TO_STATE})"
    texts = ([teacher[name] for name in ("name", "license", "origin")] for teacher in teachers)
    return [tuple(how if text == UNKNOWN else text for text in row) for row in texts]


def _teachers_behind(key: str, path: str) -> list[dict[str, str]]:
    """Return the teachers of what `key` of a config names, if that is a run of this package."""
    if not path.startswith(HUB) and is_run(path):
        return teachers_of_run(path)
    return [_unknown_of(Path(path).name)] if key.startswith("tokenizer.") else []


def _teachers_of_features(directory: str) -> list[dict[str, str]]:
    """Return the teacher of a target cache, and where that is a run its own teachers; one entry at least."""
    if is_run(directory) and (found := teachers_of_run(directory)):
        return found
    file = Path("views") / MANIFEST_FILE
    manifest = read_config(directory, str(file)) if (located(directory) / file).is_file() else None
    if manifest is None:
        return [_unknown_of(Path(directory).name)]
    return [_entry(manifest["teacher"], manifest.get("teacher_license", ""), manifest.get("teacher_origin", ""))]


def _terms_of_run(directory: str) -> tuple[str, str]:
    config = read_config(directory)
    root = run_directory(directory)
    if "run" not in config:
        return "", f"weights that were converted to the run {root.name}"
    source = (read_config(directory, INPUTS_FILE) or {}).get("train", {}).get("source", "")
    license = "" if config.get("init_from") else OWN
    return license, f"run {root.name} of the stage {config['stage']}{source and f', trained on {source}'}"


def _license_beside(place: AnyPath, weights: str) -> str:
    folder = place if place.is_dir() else place.parent
    if stated := _license_of_card(_read(folder / CARD)):
        return stated
    for name in LICENSES:
        if title := next((line for line in _read(folder / name).splitlines() if line.strip(" #*=-")), ""):
            return f"{title.strip(' #*=-')} ({name} beside the weights)"
    return str(((read_config(weights) or {}).get("pretrained_cfg") or {}).get("license", ""))


def _license_of_card(text: str) -> str:
    """Return the licence in the head of a model card, the lines between two rules: its name where it is 'other'."""
    head = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    fields = {}
    for name, value, items in re.findall(
        r"^(license\w*):[ \t]*(.*)((?:\n[ \t]*- .*)*)", head[1] if head else "", re.MULTILINE
    ):
        parts = re.split(r"[\n,]", items if items else value.strip("[] \r"))
        fields[name] = ", ".join(part for part in (part.strip(" \t\r-'\"") for part in parts) if part)
    stated, name = fields.get("license", ""), fields.get("license_name", "")
    stated = name if name and stated in ("", "other") else stated
    link = fields.get("license_link", "")
    return f"{stated} ({link})" if stated and link.startswith("http") else stated


def _origin_of(place: AnyPath, weights: str) -> str:
    if cached := _CACHED.search(str(place)):
        return f"{HUB}{cached[1]}/{cached[2]}@{cached[3]}"
    if weights.startswith(HUB):
        return weights
    name = str((read_config(weights) or {}).get("_name_or_path", ""))
    return f"{HUB}{name}" if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) else ""


def _read(file: AnyPath) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _unknown_of(name: str) -> dict[str, str]:
    return _entry(f"teacher of {name}", "", "")


def _entry(name: str, license: str, origin: str) -> dict[str, str]:
    return {"name": _line(name), "license": _line(license) or UNKNOWN, "origin": _line(origin) or UNKNOWN}


def _line(text: str) -> str:
    """Return a text on one line, without the sign that divides cells of tables."""
    return " ".join(text.replace("|", "/").split())
