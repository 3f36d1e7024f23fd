"""Where images come from: TFDS sets, ArrayRecord files, image folders, and the project's own embedded set.

A source is random access by example id (its index), gives encoded bytes, and is pickled as the recipe to open it.
It is the first station of the data pipeline. None needs TensorFlow.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from beitv2_jax.data.sources.array_records import ArrayRecordSource
from beitv2_jax.data.sources.folders import FolderSource
from beitv2_jax.data.sources.tfds import TfdsSource, find_tfds
from beitv2_jax.errors import UserError


class Source(Protocol):
    """Random access to encoded images.

    Attributes:
      name: identity of the data, the same wherever a copy of it lies.
      split: name of the split as the data set itself calls it.
      num_classes: number of labels, 0 if there are none.
      class_names: their names, in label order.
    """

    name: str
    split: str
    num_classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of examples."""

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        """Return `image` (encoded bytes), `label` (-1 = unknown), `example_id` and `where` (words for errors).

        Where the file or record cannot be read there is a `fault` that says why, and `image` is empty.
        """


def open_source(spec: str, split: str, data_dir: str = "") -> Source:
    """Open `tfds:NAME[/CONFIG][:VERSION]`, `arrayrecord:GLOB`, `folder:PATH` or `embedded[/CONFIG]`.

    `data_dir` is the TFDS directory ("" = TFDS's default); only `tfds` and `embedded` look there. Of the split names
    validation, val and test, the others are tried when the one asked for does not exist. TFDS slices such as
    `train[:10%]` work for TFDS sets.

    Raises:
      UserError: unknown kind of source, data not there, or no such split.
    """
    readers = {"folder": FolderSource, "arrayrecord": ArrayRecordSource, "tfds": TfdsSource}
    if (source := open_with(readers, spec, split, data_dir)) is None:
        raise UserError(
            f"There is no data source {spec!r}.",
            "data.source in the config lacks its kind, or the kind is misspelt",
            "tfds:NAME (a prepared TFDS set), arrayrecord:GLOB (ArrayRecord files), folder:PATH (images) or embedded",
        )
    return source


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
