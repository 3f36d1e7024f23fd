"""Write the features of images to a file: beitv2 embed WEIGHTS DATA --out=features.npz.

The result has one entry for each image and kind of token, and `labels` (-1 where there are none), `example_ids`,
`readable` and, for a folder, `files`; further the `class_names`, those of the labels, and `made_from`, which identifies
the weights and the data. It is an .npz file, a .parquet file, or a folder of ArrayRecord files whose records are .npz
files of one image each.

Several processes of one run share the images. A command that was killed continues with the parts that it left beside
--out.
"""

import argparse
import functools
import importlib.util
import io
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from beitv2_jax.command_line import Parser, add_input_options, positive, report_errors
from beitv2_jax.data.sources import Source, open_source
from beitv2_jax.data.transform import EvalRow, EvalTransform
from beitv2_jax.errors import UserError, print_error
from beitv2_jax.runtime import launch
from beitv2_jax.runtime.atomic_files import replacing, sync, write_json

TOKENS = ("cls", "mean", "patches")
PART_ROWS, PART_BYTES = 256, 1 << 26
"""Most rows and bytes of a part, which is what a kill may lose and what is held in memory."""
SHARD_BYTES = 1 << 28
"""Size of an ArrayRecord file."""
_EXAMPLES = """\
examples:
  # [CLS] and the mean patch token of every image in class folders, or in one folder
  beitv2 embed runs/mim folder:photos --out=features.npz
  # all patch tokens after two blocks, as cls_6, cls_9, patches_6 and patches_9
  beitv2 embed runs/mim tfds:imagenette --split=validation --tokens=cls,patches --layers=6,9 --out=tokens.parquet
  # as ArrayRecord files, by four processes of this machine
  python launch/processes.py 4 0 -m beitv2_jax.embed runs/mim folder:photos --out=features
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the features that `argv` asks for, and return the exit code."""
    code = _embed(argv)
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        launch.leave(code)
    return code


@report_errors
def _embed(argv: Sequence[str] | None) -> None:
    options = _parser().parse_args(argv)
    wanted, out = _checked_tokens(options.tokens), Path(options.out)
    join = _checked_format(out)
    source = open_source(options.data, options.split, options.data_dir, options.train_split)
    if launch.in_cluster(os.environ):
        launch.start_jax(True, "")
    # imported here: a mistake in an argument is reported before jax is loaded
    import jax

    from beitv2_jax import api
    from beitv2_jax.convert.runs import weights_hash
    from beitv2_jax.runners.parts import Parts
    from beitv2_jax.runners.provenance import describe_data, refuse_disagreement

    backbone = api.load_backbone(options.weights, image_size=options.image_size, normalization=options.normalization)
    layers = options.layers or [backbone.depth]
    apply = backbone.token_function(wanted, layers)
    made_from = {
        "weights": weights_hash(backbone.weights.variables),
        "model": backbone.weights.arguments,
        "normalization": backbone.weights.normalization,
        "crop_fraction": backbone.weights.crop_fraction,
        "data": {"location": options.data, **describe_data((source,))["train"]},
        "tokens": wanted,
        "layers": layers,
    }
    refuse_disagreement(made_from)
    rows_per_part = max(1, min(PART_ROWS, PART_BYTES // _bytes_per_image(backbone, apply)))
    parts = Parts(out, made_from, len(source), rows_per_part, ".npz")
    parts.fill(
        EvalRow(source, EvalTransform(backbone.image_size, backbone.weights.crop_fraction)),
        apply,
        backbone.weights.variables,
        functools.partial(_save, source),
        batch_size=options.batch_size,
        num_threads=os.cpu_count() or 1,
        label="embed",
    )
    if jax.process_index() > 0:
        return
    print(f"joining {len(parts.paths)} parts", flush=True)
    bad = sum(int((~_array(path, "readable")).sum()) for path in parts.paths)
    join(parts.joined, parts.paths, {"class_names": list(source.class_names), "made_from": made_from})
    parts.finish()
    print(f"{out} holds the features of {len(source)} images")
    if bad:
        print_error(f"{bad} of {len(source)} images cannot be read; `readable` is False for them.")


def _bytes_per_image(backbone, apply: Callable) -> int:
    import jax

    image = jax.ShapeDtypeStruct((1, backbone.image_size, backbone.image_size, 3), np.uint8)
    features = jax.eval_shape(apply, backbone.weights.variables, {"images": image})
    return sum(feature.size * feature.dtype.itemsize for feature in features.values())


def _save(source: Source, path: Path, part: dict[str, np.ndarray]) -> None:
    """Write a part: its features, and what identifies its images."""
    arrays = {name: array for name, array in part.items() if name != "weight"}
    arrays["readable"] = part["weight"] > 0
    if path_of := getattr(source, "path_of", None):
        # names that are no Unicode are possible on Linux
        names = [str(path_of(number)).encode("utf-8", "replace").decode() for number in part["example_ids"]]
        arrays["files"] = np.array(names, str)
    with replacing(path, "wb") as file:
        np.savez(file, **arrays)


def _join_npz(out: Path, paths: list[Path], about: dict) -> None:
    """Write one .npz file, array by array and part by part: it may be larger than the memory."""
    rows = sum(len(_array(path, "labels")) for path in paths)
    with replacing(out, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in _names(paths[0]):
            found = [_array(path, name).dtype for path in paths] if name == "files" else [_array(paths[0], name).dtype]
            dtype = np.result_type(*found)
            shape = (rows, *_array(paths[0], name).shape[1:])
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_2_0(entry, header)
                for path in paths:
                    entry.write(_array(path, name).astype(dtype, copy=False).tobytes())
        for name, value in {"class_names": about["class_names"], "made_from": json.dumps(about["made_from"])}.items():
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, np.array(value, str))


def _join_parquet(out: Path, paths: list[Path], about: dict) -> None:
    """Write one Parquet file with a row group for each part; features are fixed-shape tensors."""
    import pyarrow as pa
    from pyarrow import parquet

    def column(array: np.ndarray) -> pa.Array:
        is_tensor = array.ndim > 1
        return (
            pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(array)) if is_tensor else pa.array(array)
        )

    def tables() -> Iterator[pa.Table]:
        metadata = {name: json.dumps(value) for name, value in about.items()}
        for path in paths:
            columns = {name: column(_array(path, name)) for name in _names(path)}
            yield pa.table(columns).replace_schema_metadata(metadata)

    with replacing(out, "wb") as file:
        writer = None
        for table in tables():
            writer = writer or parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
        writer.close()


def _join_array_records(out: Path, paths: list[Path], about: dict) -> None:
    """Write a folder of ArrayRecord files, one record an image, and `about.json`."""
    from array_record.python.array_record_module import ArrayRecordWriter

    shutil.rmtree(out, ignore_errors=True)  # what a process left that was killed here
    out.mkdir()
    parts_per_shard = max(1, SHARD_BYTES // paths[0].stat().st_size)
    shards = [paths[first : first + parts_per_shard] for first in range(0, len(paths), parts_per_shard)]
    for number, shard in enumerate(shards):
        file = out / f"features-{number:05d}-of-{len(shards):05d}.array_record"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for path in shard:
            arrays = {name: _array(path, name) for name in _names(path)}
            for row in range(len(arrays["labels"])):
                record = io.BytesIO()
                np.savez(record, **{name: array[row] for name, array in arrays.items()})
                writer.write(record.getvalue())
        writer.close()
        sync(file)
    write_json(out / "about.json", about)


def _names(path: Path) -> list[str]:
    with np.load(path) as file:
        return file.files


def _array(path: Path, name: str) -> np.ndarray:
    with np.load(path) as file:
        return file[name]


_JOINS: dict[str, Callable[[Path, list[Path], dict], None]] = {
    ".npz": _join_npz,
    ".parquet": _join_parquet,
    "": _join_array_records,
}
"""Ending of --out -> the function that writes it from the parts."""


def _checked_format(out: Path) -> Callable[[Path, list[Path], dict], None]:
    if out.suffix not in _JOINS or not out.absolute().parent.is_dir():
        raise UserError(
            f"--out={out} is neither an .npz nor a .parquet file nor a name without ending, in a folder that exists.",
            "Did you mistype the path?",
            "Write --out=FOLDER/features.npz, --out=FOLDER/features.parquet or --out=FOLDER/features.",
        )
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            f"--out={out} cannot be written: the library pyarrow is not installed.",
            "Did you install the package without its extra for Parquet files?",
            'Run pip install "beitv2_jax[parquet]", or write --out=FOLDER/features.npz.',
        )
    return _JOINS[out.suffix]


def _checked_tokens(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in TOKENS]:
        raise UserError(
            f"There are no tokens {unknown[0]!r}.",
            "Did you separate the names by commas?",
            f"Write --tokens=NAMES with some of {','.join(TOKENS)}.",
        )
    return names


def _layers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",") if number]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 6,9") from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="beitv2 embed", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="run directory, weights file, folder of Hugging Face or timm, or hf:OWNER/NAME",
    )
    parser.add_argument("data", metavar="DATA", help="folder:PATH, tfds:NAME, arrayrecord:GLOB or embedded")
    parser.add_argument("--out", required=True, help=".npz or .parquet file, or new folder for ArrayRecord files")
    parser.add_argument("--split", default="train", help="of the data (default: train)")
    parser.add_argument(
        "--train_split", default="train", help="of a folder: the split whose classes number the labels (default: train)"
    )
    parser.add_argument("--data_dir", default="", help="directory of prepared TFDS sets")
    parser.add_argument("--tokens", default="cls,mean", help=f"some of {','.join(TOKENS)} (default: cls,mean)")
    parser.add_argument(
        "--layers", type=_layers, default=[], metavar="N,N", help="blocks, from 1 (default: the last one)"
    )
    add_input_options(parser)
    parser.add_argument(
        "--batch_size", type=positive, default=64, metavar="N", help="images at once in a process (default: 64)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
