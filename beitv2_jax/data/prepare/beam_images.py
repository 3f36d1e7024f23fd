"""A TFDS data set of images from one tar or folder a class, made by Apache Beam on one machine or many.

For sets of the size of ImageNet-22k; `beitv2_jax.data.prepare.beam` is its command and `data.sources` opens the result.
TFDS's Beam writer hashes the file names, gives every shard a range of the hashes, sorts it and moves it in place whole,
so the records depend neither on the runner nor on its workers. Every file that does not become a record is listed.
"""

import collections
import hashlib
import json
import os
import pathlib
import posixpath
import re
import shutil
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import tensorflow_datasets as tfds
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from tensorflow_datasets.core import writer

from beitv2_jax.data.decode import CorruptImageError, decode_image
from beitv2_jax.data.prepare.tars import tar_files
from beitv2_jax.data.sources.examples import in_fixed_order
from beitv2_jax.data.sources.folders import class_folders, list_images
from beitv2_jax.errors import UserError

REPORT, SUMMARY = "report.jsonl", "summary.json"
"""Beside the records: a line for every file that was left out; and how many files became what."""


def find_classes(pattern: str) -> dict[str, str]:
    """Return {class name: tar or folder} for a glob of tars (local or gs://), a folder of tars or of class folders.

    Raises:
      UserError: nothing there, or one class twice.
    """
    tars = pattern if pattern.endswith(".tar") else f"{pattern.rstrip('/')}/*.tar"
    paths = [found.path for match in FileSystems.match([tars]) for found in match.metadata_list]
    if not paths and os.path.isdir(pattern):
        folders = class_folders(pathlib.Path(pattern)).values()
        paths = [os.path.join(pattern, folder) for spellings in folders for folder in spellings]
    classes: dict[str, str] = {}
    for path in sorted(paths):
        name = unicodedata.normalize("NFC", posixpath.basename(path).removesuffix(".tar"))
        if name in classes:
            raise UserError(
                f"The class {name} is there twice: {classes[name]} and {path}.",
                "Do two collections match the same glob, or two spellings of one name?",
                "Write a glob of one of them, or rename one.",
            )
        classes[name] = path
    if not classes:
        raise UserError(
            f"{pattern} holds neither tars nor class folders.",
            "Did you mistype the glob, did the shell expand it, or can the folder not be seen from here?",
            "Write --input='DIR/*.tar' in quotes, or --input=DIR of a folder with one tar or folder a class.",
        )
    return classes


class ImagesBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Write the images of `classes` as the one split of a TFDS data set; `prepare` is the short way."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "As prepared."}  # noqa: RUF012

    def __init__(self, *, classes: dict[str, str], split: str, **kwargs: Any):
        self._classes, self._split = classes, split
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=list(self._classes)),
                "file_name": tfds.features.Text(),
            }
        )
        description = f"Images of {len(self._classes)} classes; files left out are listed in {REPORT}."
        return tfds.core.DatasetInfo(
            builder=self, description=description, features=features, supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager, pipeline):
        del dl_manager
        return {self._split: _examples(pipeline, self._classes, os.fspath(self.data_path))}

    def _generate_examples(self):
        """Not used: Beam generates them."""

    def _example_writer(self) -> writer.ExampleWriter:
        return _FixedOrderWriter(self.info.file_format)

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        # still in the directory that gets its name only after this
        summary = json.loads((self.data_path / SUMMARY).read_text())
        written = self.info.splits[self._split].num_examples
        if written != summary["written"]:
            raise RuntimeError(f"{written} records were written of {summary['written']} images")


def prepare(
    pattern: str,
    name: str,
    data_dir: str = "",
    split: str = "train",
    num_shards: int | None = None,
    beam_arguments: Sequence[str] = (),
) -> tuple[pathlib.Path, dict[str, int]]:
    """Prepare <data_dir>/<name>/1.0.0 unless it is there; return it, and how many files became what.

    Args:
      pattern: what `find_classes` takes.
      name: of the data set: lower case, digits, underscores.
      data_dir: TFDS directory, seen by all workers; "" = TFDS's default.
      split: name of the one split.
      num_shards: number of files; None lets TFDS choose by size.
      beam_arguments: such as "--runner=DataflowRunner".

    Raises:
      UserError: no classes found.
    """
    builder_class = type("Builder", (ImagesBuilder,), {"name": name}, skip_registration=True)
    builder = builder_class(
        classes=find_classes(pattern), split=split, data_dir=data_dir or None, file_format="array_record"
    )
    beam_options = PipelineOptions(list(beam_arguments))
    options = tfds.download.DownloadConfig(beam_options=beam_options, num_shards=num_shards)
    with tempfile.TemporaryDirectory() as nothing:  # TFDS makes folders for downloads, of which there are none
        builder.download_and_prepare(download_dir=nothing, download_config=options)
    return builder.data_path, json.loads((builder.data_path / SUMMARY).read_text())


def _examples(pipeline, classes: dict[str, str], directory: str):
    """Return the (key, example) of every image to write; report and summary go to `directory`."""
    files = (
        pipeline
        | "Classes" >> beam.Create(list(classes.items()))
        | "Spread" >> beam.Reshuffle()
        | "Read" >> beam.FlatMap(_read)
    )
    checked = files | "Check" >> beam.ParDo(_Check()).with_outputs("left_out", main="readable")
    unique = (
        checked.readable
        | "SameContent" >> beam.GroupByKey()
        | "KeepFirst" >> beam.ParDo(_KeepFirst()).with_outputs("left_out", main="kept")
    )
    left_out = (checked.left_out, unique.left_out) | "LeftOut" >> beam.Flatten()
    _ = (
        left_out
        | "Lines" >> beam.Map(lambda entry: json.dumps(entry, sort_keys=True))
        | "AllLines" >> beam.combiners.ToList()
        | "Report" >> beam.Map(_write_lines, path=posixpath.join(directory, REPORT))
    )
    counts = {
        "files": files,
        "written": unique.kept,
        "unreadable": checked.left_out,
        "duplicates": unique.left_out,
    }
    singletons = {
        name: beam.pvalue.AsSingleton(collection | f"Count {name}" >> beam.combiners.Count.Globally())
        for name, collection in counts.items()
    }
    _ = (
        pipeline
        | "Once" >> beam.Create([posixpath.join(directory, SUMMARY)])
        | "Summary" >> beam.Map(_write_summary, **singletons)
    )
    return unique.kept


def _read(named: tuple[str, str]) -> Iterator[tuple[str, str, bytes | None]]:
    """Yield (class, file name, content) of all files of a class; a tar that breaks off ends with content None."""
    name, path = named
    if not path.endswith(".tar"):
        images, left_out = list_images(pathlib.Path(path))
        for file in sorted([os.path.join(path, image) for image in images] + [entry.where for entry in left_out]):
            if os.path.isfile(file):
                yield name, os.path.relpath(file, path), pathlib.Path(file).read_bytes()
        return
    seen: collections.Counter[str] = collections.Counter()
    try:
        with (
            FileSystems.open(path, compression_type="uncompressed") as stream,
            tarfile.open(fileobj=stream, mode="r:") as tar,
        ):
            for member in tar_files(tar):
                seen[member.name] += 1
                again = f"#{seen[member.name]}" if seen[member.name] > 1 else ""
                yield name, member.name + again, tar.extractfile(member).read()
    except tarfile.TarError:
        yield name, posixpath.basename(path), None


class _Check(beam.DoFn):
    """(class, file name, content) -> (digest, (key, class, content)) of those that can be decoded."""

    def process(self, element: tuple[str, str, bytes | None]):
        name, file, content = element
        key = f"{name}/{file}"
        try:
            if content is None:
                raise CorruptImageError(key, "the tar breaks off here")
            decode_image(content, key)
        except CorruptImageError as error:
            cause = re.sub(r" at 0x[0-9a-f]+", "", error.cause)
            yield beam.pvalue.TaggedOutput("left_out", {"file": key, "problem": "unreadable", "cause": cause})
        else:
            yield hashlib.blake2b(content, digest_size=16).digest(), (key, name, content)


class _KeepFirst(beam.DoFn):
    """Of files with one content keep that of the smallest key."""

    def process(self, group: tuple[bytes, Iterable[tuple[str, str, bytes]]]):
        kept, others = None, []
        for entry in group[1]:
            if kept is None or entry[0] < kept[0]:
                kept, entry = entry, kept
            if entry is not None:
                others.append(entry[0])
        key, name, content = kept
        yield key, {"image": content, "label": name, "file_name": key}
        for other in others:
            yield beam.pvalue.TaggedOutput("left_out", {"file": other, "problem": "duplicate", "of": key})


def _write_lines(lines: list[str], path: str) -> None:
    with FileSystems.create(path, compression_type="uncompressed") as file:
        file.write("".join(f"{line}\n" for line in sorted(lines)).encode())


def _write_summary(path: str, **counts: int) -> None:
    if counts["files"] != counts["written"] + counts["unreadable"] + counts["duplicates"]:
        raise RuntimeError(f"files were lost: {counts}")
    _write_lines([json.dumps(counts)], path)


class _FixedOrderWriter(writer.ExampleWriter):
    """TFDS's writer of one shard, with the features of a record always in the same order.

    A remote path is written through Beam, because the ArrayRecord library knows local files only.
    """

    def write(self, path, examples):
        ordered = ((key, in_fixed_order(record)) for key, record in examples)
        if "://" not in os.fspath(path):
            return super().write(path, ordered)
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, "shard")
            super().write(local, ordered)
            with (
                open(local, "rb") as source,
                FileSystems.create(os.fspath(path), compression_type="uncompressed") as copy,
            ):
                shutil.copyfileobj(source, copy)
        return None
