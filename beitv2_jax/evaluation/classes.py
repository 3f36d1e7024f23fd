"""Which class of a classifier each class of a data set is."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from beitv2_jax.errors import UserError, nearest

NUM_IMAGENET_CLASSES = 1000
_MAX_LISTED = 5


class ClassMap(NamedTuple):
    """Which class of a classifier each class of a data set is.

    Attributes:
        numbers: class of the classifier, by class of the data.
        names: of all classes of the classifier, those of the data as the data call them.
        stated: how it was found, as a sentence without an end.
    """

    numbers: Int[np.ndarray, "k"]
    names: tuple[str, ...]
    stated: str


def read_class_names(path: str, num_classes: int) -> tuple[str, ...]:
    """Return the names of a classifier's classes in a text file, one a line in the order of their numbers.

    Raises:
        UserError: there is no such file, or it has another number of lines.
    """
    if not Path(path).is_file():
        raise UserError(
            f"There is no file {path}.",
            "Did you mistype the path?",
            "Write --classes=FILE with a text file of one class name a line.",
        )
    names = tuple(Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n"))
    if len(names) != num_classes:
        raise UserError(
            f"{path} has {len(names)} lines, and the weights have {num_classes} classes.",
            "Does it list the classes of the data in place of those of the weights?",
            "Write one line for each class of the weights, in the order of their numbers.",
        )
    return names


def match_classes(names: Sequence[str], data_names: Sequence[str]) -> ClassMap:
    """Find each class of a data set among the classes of a classifier.

    Names are compared. A classifier whose classes have numbers alone has 'str(number)' as names; then, and where its
    1000 classes have other names, folders called by WordNet ids are looked up in the ImageNet order, and otherwise
    as many classes as the classifier has are taken in their order.

    Args:
        names: of the classifier's classes, in order.
        data_names: of the data's classes, in order.

    Raises:
        UserError: a class of the data is none, or several, of the classifier's.
    """

    def found(numbers: Sequence[int], stated: str, names: Sequence[str] = names) -> ClassMap:
        of_data = dict(zip(numbers, data_names, strict=True))
        shown = tuple(of_data.get(number, name) for number, name in enumerate(names))
        return ClassMap(np.array(numbers), shown, stated)

    in_order = range(len(names))
    if tuple(names) == tuple(data_names):
        return found(in_order, "the data have the classes of the weights, in the same order")
    places: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        places.setdefault(name, []).append(number)
    unknown = [name for name in data_names if name not in places]
    has_names = tuple(names) != tuple(map(str, range(len(names))))
    if unknown and len(names) == NUM_IMAGENET_CLASSES and set(data_names) <= set(ids := imagenet_ids()):
        stated = f"the {_count(data_names)} of the data are WordNet ids, counted in the ImageNet order"
        return found([ids.index(name) for name in data_names], stated, names if has_names else ids)
    if unknown and not has_names and len(data_names) == len(names):
        return found(in_order, "the weights do not name their classes; those of the data are taken in their order")
    if unknown:
        listed = ", ".join(map(repr, unknown[:_MAX_LISTED])) + (", ..." if len(unknown) > _MAX_LISTED else "")
        guess = nearest(unknown[0], names) if has_names else None
        raise UserError(
            f"{len(unknown)} of {len(data_names)} classes of the data are none of the {len(names)} classes of the "
            f"weights: {listed}.",
            f"Did you mean the class {guess!r}?" if guess else "The weights may name their classes otherwise, or not.",
            "Write --classes=FILE with one line for each class of the weights, its name in the data, in the order of "
            "their numbers.",
        )
    if several := [name for name in data_names if len(places[name]) > 1]:
        raise UserError(
            f"The weights have {len(places[several[0]])} classes called {several[0]!r}.",
            "Some data sets give two classes one name, as ImageNet does with 'crane'.",
            "Write --classes=FILE with a name of its own for each class, those of the data among them.",
        )
    relation = "in another order" if len(names) == len(data_names) else f"among the {len(names)} of the weights"
    numbers = [places[name][0] for name in data_names]
    return found(numbers, f"the {_count(data_names)} of the data were found by name, {relation}")


def imagenet_ids() -> tuple[str, ...]:
    """Return the WordNet ids of the classes of ImageNet-1k in their order, as TFDS lists them."""
    # found without being imported, which takes seconds
    (package,) = importlib.util.find_spec("tensorflow_datasets").submodule_search_locations
    return tuple(Path(package, "datasets", "imagenet2012", "labels.txt").read_text().split())


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} class{'' if len(names) == 1 else 'es'}"
