"""The labels of a whole source: how many images each class has, and a draw of a few images of each."""

import concurrent.futures
import hashlib
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int

from beitv2_jax.data.sources.label_sets import LabelSets, is_multi_label
from beitv2_jax.errors import UserError, listed
from beitv2_jax.rng import host_rng

_AT_ONCE = 32
_PART = 1024
"""Records that a thread reads one after the other."""
ONE_SIDED = 0.9
"""Fraction of the images in one class above which a split is called one-sided."""


class Subset:
    """Some examples of a source, in their order there.

    An example keeps the id that it has in the source, and with it everything that is drawn for that image. The name
    ends in what was chosen; the other attributes are those of the source.
    """

    def __init__(
        self, source, indices: Int[np.ndarray, "n"], labels: Int[np.ndarray, "n"] | LabelSets | None, chosen: str
    ):
        self._source, self._indices, self._chosen = source, indices, chosen
        self.labels = labels
        self.name = f"{source.name}, {chosen}"
        if labels is not None:
            counts = class_counts(self)
            self.empty_classes = tuple(name for label, name in enumerate(source.class_names) if not counts[label])

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._indices[index])]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __reduce__(self):
        return Subset, (self._source, self._indices, self.labels, self._chosen)


def few_labels(source, *, seed: int, fraction: float = 0.0, shots: int = 0) -> Subset:
    """Draw a part of the images of every class: a `fraction` of them, rounded, but at least one, or `shots` of them.

    The images of class c are the first of a permutation that is a function of (seed, "few_labels", c) alone, so a
    larger part holds a smaller one. Images without a label are left out. Of a multi-label source it is a `fraction` of
    all images, in the same way.

    Raises:
      UserError: no image has a label, or `shots` of a multi-label source are asked for.
    """
    if is_multi_label(source):
        return _few_label_sets(source, seed, fraction, shots)
    labels = labels_of(source)
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    chosen, short = [], []
    for label, members in zip(present.tolist(), np.split(order, starts[1:]), strict=True):
        if label < 0:
            continue
        wanted = shots or max(1, round(fraction * len(members)))
        chosen.append(host_rng(seed, "few_labels", label).permutation(members)[:wanted])
        if len(members) < wanted:
            short.append(source.class_names[label])
    if not chosen:
        raise UserError(
            f"No image of the split {source.split} of {source.name} has a label, so none can be chosen by class.",
            "Did you mean a data set with labels?",
            "Write --config.data.train_labels='' to use all images, or another --config.data.source.",
        )
    if short:
        text = "split %s: classes with fewer than %d images, all of which are used: %s"
        logging.warning(text, source.split, shots, listed(short))
    indices = np.sort(np.concatenate(chosen))
    amount = f"{shots}" if shots else f"{100 * fraction:g}%"
    return Subset(source, indices, labels[indices], f"{amount} per class (draw {_digest(indices)})")


def _few_label_sets(source, seed: int, fraction: float, shots: int) -> Subset:
    if shots:
        raise UserError(
            f"The images of {source.name} may have several classes, so {shots} of each cannot be drawn: an image "
            "brings its other classes with it.",
            "Did you mean a part of all images?",
            "Write --config.data.train_labels=10%, for example.",
        )
    count = max(1, round(fraction * len(source)))
    indices = np.sort(host_rng(seed, "few_labels").permutation(len(source))[:count])
    labels = getattr(source, "labels", None)
    labels = None if labels is None else labels.taken(indices)
    return Subset(source, indices, labels, f"{100 * fraction:g}% (draw {_digest(indices)})")


def _digest(indices: Int[np.ndarray, "n"]) -> str:
    return hashlib.blake2b(indices.astype("<i8").tobytes(), digest_size=6).hexdigest()


def labels_of(source) -> Int[np.ndarray, "n"] | LabelSets:
    """Return the label of every example, -1 for none; where the source does not list them, every record is read.

    Of a multi-label source they are its `LabelSets`, empty where an example cannot be read.
    """
    if (listed := getattr(source, "labels", None)) is not None:
        return listed
    logging.info("reading the labels of the %d records of the split %s of %s", len(source), source.split, source.name)

    several = is_multi_label(source)

    def read(start: int) -> list[Any]:
        examples = (source[index] for index in range(start, min(start + _PART, len(source))))
        if several:
            return [np.flatnonzero(example["label"]) for example in examples]
        return [-1 if example.get("fault") else example["label"] for example in examples]

    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        labels = [label for part in pool.map(read, range(0, len(source), _PART)) for label in part]
    return LabelSets(labels, source.num_classes) if several else np.array(labels, np.int32)


def class_counts(source) -> Int[np.ndarray, "k"]:
    """Return how many examples each class has."""
    labels = labels_of(source)
    if isinstance(labels, LabelSets):
        return labels.counts()
    return np.bincount(labels[labels >= 0], minlength=source.num_classes)


def log_classes(train, evaluation) -> None:
    """Log how the images of the training split are spread over the classes, and what a user may not expect of them.

    Nothing is read for it: of a split that does not list its labels nothing is said.
    """
    counts = {}
    for source in (train, evaluation):
        if getattr(source, "labels", None) is None:
            continue
        counts[source.split] = found = class_counts(source)
        smallest, largest = source.class_names[found.argmin()], source.class_names[found.argmax()]
        several = is_multi_label(source)
        images = len(source) if several else found.sum()
        text = "split %s: %d images in %d classes; smallest class %s with %d, median %g, largest %s with %d"
        numbers = (smallest, found.min(), np.median(found), largest, found.max())
        logging.info(text, source.split, images, len(found), *numbers)
        if several:
            text = "split %s: %d labels, %.3g an image"
            logging.info(text, source.split, found.sum(), found.sum() / max(1, images))
        elif found.max() > ONE_SIDED * images:
            percent = 100 * found.max() / images
            text = "split %s: %.3g%% of the images are of the class %s, so always answering %s is right as often"
            logging.warning(text, source.split, percent, largest, largest)
    if len(counts) == 2:
        unseen = np.flatnonzero((counts[train.split] == 0) & (counts[evaluation.split] > 0))
        if len(unseen):
            text = "split %s: classes without training images, which are never predicted: %s"
            logging.warning(text, evaluation.split, listed([train.class_names[label] for label in unseen]))
