"""Go over the successors of ImageNet with one classifier, in the layouts in which they are published.

Images are seen as in `runners.evaluate`, those of ImageNet-C whole, as they are cropped already.
"""

import bisect
import itertools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from beitv2_jax.convert.weights import Weights
from beitv2_jax.data.sources import LabelledSource, Source, open_source
from beitv2_jax.data.sources.folders import FolderSource, class_folders
from beitv2_jax.data.sources.splits import EVALUATION_SPLITS
from beitv2_jax.errors import UserError
from beitv2_jax.evaluation.classes import NUM_IMAGENET_CLASSES, ClassMap, imagenet_ids, match_classes
from beitv2_jax.evaluation.robustness import ALEXNET_ERRORS, SEVERITIES, corruption_errors, real_accuracy
from beitv2_jax.runners.evaluate import Passing, evaluate_classifier

MASKED = ("imagenet_a", "imagenet_r")
"""Benchmarks whose predictions are limited to the classes that they have."""
CORRUPTIONS = [(name, severity) for name in ALEXNET_ERRORS for severity in SEVERITIES]
_IMAGE_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.")


class Found(NamedTuple):
    """What a benchmark gave: `value` is what the table shows, `num_examples` of how many images, `details` the rest."""

    value: float
    num_examples: int
    details: Mapping[str, Any] = MappingProxyType({})


class Classifier(NamedTuple):
    """A classifier of ImageNet-1k and how it sees images: the names of its classes, `evaluate_classifier`'s options."""

    weights: Weights
    class_names: Sequence[str]
    passing: Passing
    crop_fraction: float


def open_benchmark(spec: str, data_dir: str = "") -> Source:
    """Open the images of a benchmark: `tfds:NAME`, or `folder:PATH` of class folders or of the split that has them.

    Raises:
        UserError: as `open_source`, or there are no labels.
    """
    kind, _, location = spec.partition(":")
    split = "validation"
    if kind == "folder" and location:
        folders = class_folders(pathlib.Path(location).expanduser())
        split = "train" if set(EVALUATION_SPLITS).isdisjoint(folders) else split
    source = open_source(spec, split, data_dir, split)
    if not source.class_names:
        raise UserError(
            f"{source.name} has no classes.",
            "Did you mean the folder above this one, or one below it?",
            "Write folder:PATH with one folder for each class, named by its WordNet id.",
        )
    return source


def matched(class_names: Sequence[str], source: Source) -> ClassMap:
    """Return which class of a classifier each class of a benchmark is; the folders of ImageNet-V2 are numbers.

    Raises:
        UserError: a class is none of the classifier's.
    """
    names, ids = source.class_names, imagenet_ids()
    if all(name.isdecimal() and int(name) < NUM_IMAGENET_CLASSES for name in names):
        names = [ids[int(name)] for name in names]
    return match_classes(class_names, names)


def evaluate_images(classifier: Classifier, source: Source, *, masked: bool = False) -> Found:
    """Return the top-1 accuracy; `masked` looks for the largest logit among the classes that have images."""
    classes = matched(classifier.class_names, source)
    if masked:
        present = _present(source)
        source = _Relabelled(source, present)
        classes = classes._replace(numbers=classes.numbers[present])
    result = _pass(classifier, source, classes)
    metrics = result.metrics
    value = metrics.get("among_top1", metrics["top1"]) if masked else metrics["top1"]
    return Found(value, result.num_examples, {"classes": len(classes.numbers), "unreadable": len(result.bad_records)})


def evaluate_real(classifier: Classifier, source: Source, path: str) -> tuple[Found, Found]:
    """Return the top-1 accuracy on the validation images of ImageNet, by their own labels and by those of ReaL.

    `path` is that of real.json, whose entry n has the labels of the image ILSVRC2012_val_(n + 1); numbers are those of
    the ImageNet order.

    Raises:
        UserError: there is no such file, or the names of the images do not have their numbers.
    """
    labels, numbers = _real_labels(path), _image_numbers(source)
    if len(labels) < max(numbers):
        raise UserError(
            f"{path} has the labels of {len(labels)} images, and {source.name} has the image {max(numbers)}.",
            "Is it the file real.json of all 50,000 validation images?",
            "Write --imagenet_real=FILE with the path of real.json.",
        )
    result = _pass(classifier, source, matched(classifier.class_names, source))
    of_imagenet = match_classes(classifier.class_names, imagenet_ids()).numbers
    rows = zip(result.details["example_ids"].tolist(), result.details["predicted"], strict=True)
    shown = [(labels[numbers[example_id] - 1], guess) for example_id, guess in rows]
    own = [of_imagenet[np.asarray(of_image, int)].tolist() for of_image, _ in shown]
    accuracy, count = real_accuracy(np.array([guess for _, guess in shown]), own)
    return Found(result.metrics["top1"], result.num_examples), Found(accuracy, count)


def evaluate_corruptions(classifier: Classifier, sources: Sequence[Source]) -> Found:
    """Return the mean corruption error over sources in the order of `CORRUPTIONS`; all of them are one pass."""
    joined = _Joined(sources)
    maps = [matched(classifier.class_names, source) for source in sources]
    if any(other.numbers.tolist() != maps[0].numbers.tolist() for other in maps):
        raise UserError(
            "The parts of ImageNet-C do not all have the same classes.",
            "Were some of its archives unpacked only in part?",
            "Unpack all archives of ImageNet-C again, and write --imagenet_c=folder:PATH.",
        )
    result = _pass(classifier._replace(crop_fraction=1.0), joined, maps[0])
    details = result.details
    parts = np.searchsorted(joined.ends, details["example_ids"], side="right")
    wrong = details["predicted"] != details["labels"]
    errors = {name: [] for name in ALEXNET_ERRORS}
    for number, (name, _) in enumerate(CORRUPTIONS):
        errors[name].append(float(wrong[parts == number].mean()))
    relative = corruption_errors(errors)
    return Found(
        float(np.mean(list(relative.values()))),
        result.num_examples,
        {"corruption_errors": relative, "errors": errors, "unreadable": len(result.bad_records)},
    )


def open_corruptions(spec: str, data_dir: str = "") -> list[Source]:
    """Open the parts of ImageNet-C in the order of `CORRUPTIONS`: CORRUPTION/SEVERITY folders, or configs of TFDS.

    The folders of the corruptions may lie in those of their archives (noise, blur, weather, digital).

    Raises:
        UserError: a corruption or a severity is missing.
    """
    kind, _, location = spec.partition(":")
    if kind != "folder":
        return [open_benchmark(f"{spec}/{name}_{severity}", data_dir) for name, severity in CORRUPTIONS]
    root = pathlib.Path(location).expanduser()
    places = {path.name: path for path in itertools.chain(root.glob("*/*"), root.glob("*")) if path.is_dir()}
    folders = {(name, severity): places.get(name, root / name) / str(severity) for name, severity in CORRUPTIONS}
    if missing := [f"{name}/{severity}" for (name, severity), folder in folders.items() if not folder.is_dir()]:
        raise UserError(
            f"{location} lacks {len(missing)} of the {len(CORRUPTIONS)} folders of ImageNet-C, such as {missing[0]}.",
            "Are all its archives (noise, blur, weather, digital) unpacked in this folder?",
            "Write --imagenet_c=folder:PATH of a folder with CORRUPTION/SEVERITY/CLASS/*.JPEG.",
        )
    return [open_benchmark(f"folder:{folder}") for folder in folders.values()]


def _pass(classifier: Classifier, source: Source, classes: ClassMap):
    return evaluate_classifier(
        classifier.weights,
        LabelledSource(source),
        classes,
        classifier.passing,
        crop_fraction=classifier.crop_fraction,
    )


def _present(source: Source) -> list[int]:
    """Return the labels that examples of a source have, in order."""
    if isinstance(source, FolderSource):
        return [label for label, name in enumerate(source.class_names) if name not in source.empty_classes]
    return sorted({label for number in range(len(source)) if (label := source[number]["label"]) >= 0})


class _Relabelled:
    """A source whose labels count the `present` ones; the other attributes are those of the source it is made of."""

    def __init__(self, source: Source, present: Sequence[int]):
        self._source, self._present = source, present
        self.class_names = tuple(source.class_names[label] for label in present)
        self.num_classes = len(present)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        example = self._source[example_id]
        place = bisect.bisect_left(self._present, example["label"])
        return {**example, "label": place if example["label"] >= 0 else -1}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __reduce__(self):
        return _Relabelled, (self._source, self._present)


class _Joined:
    """The examples of several sources, one source after the other; `ends` are their running counts."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = tuple(sources)
        self.ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        number = int(np.searchsorted(self.ends, example_id, side="right"))
        source = self._sources[number]
        example = source[int(example_id - self.ends[number] + len(source))]
        return {**example, "example_id": int(example_id)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sources[0], name)

    def __reduce__(self):
        return _Joined, (self._sources,)


def _real_labels(path: str) -> list[list[int]]:
    try:
        return [list(map(int, of_image)) for of_image in json.loads(pathlib.Path(path).read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as the labels of ReaL: {error}.",
            "Is it the file real.json, a list with the labels of each validation image?",
            "Write --imagenet_real=FILE with the path of real.json.",
        ) from error


def _image_numbers(source: Source) -> list[int]:
    """Return the numbers of the validation images of ImageNet, from 1, by example id."""
    names = [source.path_of(number).name for number in range(len(source))] if isinstance(source, FolderSource) else [""]
    found = [_IMAGE_NUMBER.search(name) for name in names]
    if not all(found):
        raise UserError(
            f"The images of {source.name} do not have the names of the validation images of ImageNet.",
            "Were they renamed, or are they in a data set in place of a folder?",
            "Write --imagenet=folder:PATH with class folders of images such as ILSVRC2012_val_00000001.JPEG.",
        )
    return [int(match[1]) for match in found]
