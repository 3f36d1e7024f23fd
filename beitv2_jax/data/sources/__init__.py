"""Where images come from: TFDS sets, ArrayRecord files, image folders, and the project's own embedded set.

A source is random access by example id (its index), gives encoded bytes, and is pickled as the recipe to open it.
It is the first station of the data pipeline. None needs TensorFlow.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from beitv2_jax.data.bad_records import LeftOut
from beitv2_jax.data.sources.array_records import ArrayRecordSource
from beitv2_jax.data.sources.folders import FolderSource, class_names_of, divided_folder
from beitv2_jax.data.sources.tfds import TfdsSource, find_tfds
from beitv2_jax.errors import UserError


class Source(Protocol):
    """Random access to encoded images.

    Attributes:
      name: identity of the data, the same wherever a copy of it lies.
      split: name of the split as the data set itself calls it.
      num_classes: number of labels, 0 if there are none.
      class_names: their names, in label order.
      left_out: files that were found but are no examples.
      empty_classes: names of the classes without examples, where that is known without reading the data.

    A source that knows the label of every example without reading the data lists them as `labels`. One whose examples
    may have several classes has `multi_label` True; its labels are vectors of 0 and 1, `labels` a `LabelSets`.
    """

    name: str
    split: str
    num_classes: int
    class_names: tuple[str, ...]
    left_out: Sequence[LeftOut]
    empty_classes: Sequence[str]

    def __len__(self) -> int:
        """Return the number of examples."""

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        """Return `image` (encoded bytes), `label` (-1 = unknown), `example_id`, `where` (words for errors).

        Where the example cannot be read or used, `fault` says why; `image` is empty if nothing could be read.
        """


class LabelledSource:
    """A source for stages that learn labels: an example without one counts as unreadable.

    The attributes are those of the source it is made of.
    """

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        example = self._source[example_id]
        unlabelled = np.ndim(example["label"]) == 0 and example["label"] < 0 and not example.get("fault")
        return {**example, "fault": "it has no label"} if unlabelled else example

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __reduce__(self):
        return LabelledSource, (self._source,)


def open_source(spec: str, split: str, data_dir: str = "", train_split: str = "train") -> Source:
    """Open `tfds:NAME[/CONFIG][:VERSION]`, `arrayrecord:GLOB`, `folder:PATH` or `embedded[/CONFIG]`.

    `data_dir` is the TFDS directory ("" = TFDS's default); only `tfds` and `embedded` look there. Of the split names
    validation, val and test, the others are tried when the one asked for does not exist. TFDS slices such as
    `train[:10%]` work for TFDS sets. The folders of `train_split` number the classes of an image folder.

    Raises:
      UserError: unknown kind of source, data not there, or no such split.
    """
    folder = functools.partial(FolderSource, train_split=train_split)
    readers = {"folder": folder, "arrayrecord": ArrayRecordSource, "tfds": TfdsSource}
    if (source := open_with(readers, spec, split, data_dir)) is None:
        raise UserError(
            f"There is no data source {spec!r}.",
            "Did you leave out the kind of the source, or mistype it?",
            "Write folder:PATH (images), tfds:NAME (a prepared TFDS set), arrayrecord:GLOB (ArrayRecord files) or "
            "embedded; for a stage --config.data.source=folder:PATH, for example.",
        )
    return source


def class_names(spec: str, train_split: str, data_dir: str = "") -> tuple[str, ...]:
    """Return the names of the classes of a data set, as `open_source` numbers them.

    Images in folders are not listed for it, and those of the embedded set not generated.

    Raises:
      UserError: as `open_source`.
    """
    if spec.partition("/")[0] == "embedded":
        from beitv2_jax.data.embedded import scenes

        return scenes.CLASS_NAMES
    kind, _, location = spec.partition(":")
    if kind == "folder" and location:
        return class_names_of(location, train_split)
    return tuple(open_source(spec, train_split, data_dir, train_split).class_names)


def open_splits(spec: str, train_split: str, eval_split: str, data_dir: str = "") -> tuple[Source, Source]:
    """Open the training and the evaluation split as `open_source` does.

    Of an image folder without splits every tenth image of every class is for evaluation, the others for training.
    """
    kind, _, location = spec.partition(":")
    if kind == "folder" and (divided := divided_folder(location, train_split, eval_split)):
        return divided
    return tuple(open_source(spec, split, data_dir, train_split) for split in (train_split, eval_split))


def open_with(readers: Mapping[str, Callable], spec: str, split: str, data_dir: str = "") -> Any:
    """Return what the reader of the kind of source in `spec` opens; None if `spec` has no kind, or it has no reader.

    Args:
        readers: kind of source ('tfds', 'folder', ...) -> (location, split) -> source; that of 'tfds' also opens
            embedded[/CONFIG].
    """
    kind, _, location = spec.partition(":")
    if kind in readers and location:
        return readers[kind](find_tfds(location, data_dir) if kind == "tfds" else location, split)
    family, _, config = spec.partition("/")
    if family != "embedded":
        return None
    # imported here: the generator of the embedded images is only needed by those who use them
    from beitv2_jax.data import embedded

    return readers["tfds"](embedded.prepare(data_dir, config or "scenes"), split)
