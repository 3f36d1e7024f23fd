"""Where images come from: TFDS sets, ArrayRecord files, image folders, and the project's own embedded set.

A source is random access by example id (its index), gives encoded bytes, and is pickled as the recipe to open it.
It is the first station of the data pipeline. None needs TensorFlow.
"""

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
        """Return `image` (encoded bytes), `label` (-1 = unknown), `example_id` and `where` (words for errors)."""


def open_source(spec: str, split: str, data_dir: str = "") -> Source:
    """Open `tfds:NAME[/CONFIG][:VERSION]`, `arrayrecord:GLOB`, `folder:PATH` or `embedded[/CONFIG]`.

    `data_dir` is the TFDS directory ("" = TFDS's default); only `tfds` and `embedded` look there. Of the split names
    validation, val and test, the others are tried when the one asked for does not exist. TFDS slices such as
    `train[:10%]` work for TFDS sets.

    Raises:
      UserError: unknown kind of source, data not there, or no such split.
    """
    kind, _, rest = spec.partition(":")
    if kind == "folder" and rest:
        return FolderSource(rest, split)
    if kind == "arrayrecord" and rest:
        return ArrayRecordSource(rest, split)
    if kind == "tfds" and rest:
        return TfdsSource(find_tfds(rest, data_dir), split)
    family, _, config = spec.partition("/")
    if family == "embedded":
        # imported here: the generator of the embedded images is only needed by those who use them
        from beitv2_jax.data import embedded

        return TfdsSource(embedded.prepare(data_dir, config or "scenes"), split)
    raise UserError(
        f"There is no data source {spec!r}.",
        "data.source in the config lacks its kind, or the kind is misspelt",
        "tfds:NAME (a prepared TFDS set), arrayrecord:GLOB (ArrayRecord files), folder:PATH (images) or embedded",
    )
