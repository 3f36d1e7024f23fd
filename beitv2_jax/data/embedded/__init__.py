"""The data set that needs no download: 9 000 drawn scenes with ten classes of objects, as a TFDS data set.

For the quickstart and for tests. Every picture, 96 x 96 pixels, shows one object (bird, butterfly, car, cat, fish,
flower, house, mushroom, sailboat or tree) in varied surroundings and comes with its class, a segmentation mask and a
map of its parts (`data.embedded.parts`). Classes differ by parts and patterns; pose, colours, background, light,
distractors and occluders are drawn from the same distribution for all (`data.embedded.scenes`,
`data.embedded.scene_objects`). `data.sources` opens it as `embedded[/CONFIG]`.

Example `index` of a split is a pure function of (seed, split, index): the same bytes in every run and for every number
of processes. The class is index % 10, so each is equally frequent.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import multiprocessing
import os
import pathlib
from collections.abc import Iterator

import tensorflow_datasets as tfds
from absl import logging
from PIL import Image
from tqdm import tqdm

from beitv2_jax import rng as streams
from beitv2_jax.data.embedded import scenes
from beitv2_jax.data.embedded.parts import PART_NAMES
from beitv2_jax.errors import UserError, did_you_mean

JPEG_QUALITY = 92
# below this, starting worker processes takes longer than drawing
_MIN_PER_PROCESS = 500
_CHUNK = 50


@dataclasses.dataclass(kw_only=True)
class ScenesConfig(tfds.core.BuilderConfig):
    """Sizes of the splits and the seed of their scenes; a smaller split is the beginning of a larger one."""

    num_train: int
    num_test: int
    seed: int = 0


class Beitv2Scenes(tfds.core.GeneratorBasedBuilder):
    """Write the scenes as a TFDS data set in ArrayRecord form; `prepare` is the short way."""

    name = "beitv2_scenes"
    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES = {  # noqa: RUF012
        "1.2.0": "part_map, the part of each pixel; the images are those of 1.1.0.",
        "1.1.0": "Stronger light and backgrounds, more places: raw pixels reveal less of the class.",
    }
    BUILDER_CONFIGS = [  # noqa: RUF012
        ScenesConfig(name="scenes", description="8 000 + 1 000 scenes", num_train=8000, num_test=1000),
        ScenesConfig(name="tiny", description="400 + 100 scenes, for smoke tests", num_train=400, num_test=100),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE)
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(*shape, 3), encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=scenes.CLASS_NAMES),
                "segmentation_mask": tfds.features.Image(shape=(*shape, 1), encoding_format="png"),
                "part_map": tfds.features.Image(shape=(*shape, 1), encoding_format="png"),
            }
        )
        description = (
            "Procedurally drawn scenes with one object of ten classes each. "
            "segmentation_mask: 0 surroundings, label + 1 object. part_map: 0 surroundings, then the parts of the "
            f"objects, {', '.join(PART_NAMES[1:])}."
        )
        return tfds.core.DatasetInfo(
            builder=self, description=description, features=features, supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        config = self.builder_config
        counts = {"train": config.num_train, "test": config.num_test}
        return {split: self._generate_examples(split, count) for split, count in counts.items()}

    def _generate_examples(self, split: str, count: int):
        examples = generate(self.builder_config.seed, split, count, processes=_usable_processes(count))
        # disable=None: the bar shows on a terminal only
        yield from enumerate(tqdm(examples, f"drawing {self.name} {split}", count, unit=" images", disable=None))


def _usable_processes(count: int) -> int:
    return max(1, min(os.cpu_count() or 1, count // _MIN_PER_PROCESS))


def encode_example(seed: int, split: str, index: int) -> dict[str, bytes | int]:
    """Draw example `index` of a split and encode it: `image` JPEG, `segmentation_mask` and `part_map` PNG, `label`."""
    label = index % len(scenes.CLASS_NAMES)
    scene = scenes.draw_scene(streams.host_rng(seed, f"scene {split}", index), label)
    image, mask, parts = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray(scene.image).save(image, "JPEG", quality=JPEG_QUALITY)
    Image.fromarray(scene.segmentation_mask).save(mask, "PNG")
    Image.fromarray(scene.part_map).save(parts, "PNG")
    maps = {"segmentation_mask": mask.getvalue(), "part_map": parts.getvalue()}
    return {"image": image.getvalue(), "label": label, **maps}


def generate(seed: int, split: str, count: int, *, processes: int = 1) -> Iterator[dict[str, bytes | int]]:
    """Yield the first `count` examples of a split in order, drawn by `processes` processes."""
    encode = functools.partial(encode_example, seed, split)
    if processes == 1:
        yield from map(encode, range(count))
        return
    # spawned, not forked: the caller may already hold the threads of jax
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(encode, range(count), chunksize=_CHUNK)


def prepare(data_dir: str | os.PathLike = "", config: str = "scenes") -> pathlib.Path:
    """Return the TFDS directory of the embedded data set, drawing it first where it does not exist.

    `data_dir` is the TFDS directory ("" = TFDS's default); `config` is "scenes" or "tiny". The directory appears
    complete or not at all. `tfds.builder_from_directory` opens it.

    Raises:
      UserError: no such config, or the directory cannot be written.
    """
    names = [entry.name for entry in Beitv2Scenes.BUILDER_CONFIGS]
    if config not in names:
        raise UserError(
            f"The embedded data set has no config {config!r}.",
            did_you_mean(config, names),
            f"Write --config.data.source={' or '.join(f'embedded/{name}' for name in names)}.",
        )
    builder = Beitv2Scenes(data_dir=os.fspath(data_dir) or None, config=config, file_format="array_record")
    directory = pathlib.Path(builder.data_path)
    if directory.parts[0] == "~":
        raise UserError(
            f"The embedded data set cannot be drawn into {directory}, because the home directory is unknown.",
            "The variable HOME may not be set, as in some containers.",
            "Set HOME, or write --config.data.data_dir=PATH.",
        )
    if os.path.exists(directory):
        return directory
    logging.info("drawing the embedded data set '%s' into %s (once) ...", config, directory)
    tfds.disable_progress_bar()  # one bar of ours says more than its four
    try:
        # its words on stdout speak of a download
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except OSError as error:
        # another process may have drawn the same set meanwhile: its directory is as good as ours
        if not os.path.exists(directory):
            raise UserError(
                f"The embedded data set cannot be drawn into {directory}: {error.strerror or error}.",
                "May this user not write there (by default it lies below the home directory), or is the disk full?",
                "Write --config.data.data_dir=DIR of a folder that you may write to and that has 100 MB of free space.",
            ) from error
    finally:
        tfds.enable_progress_bar()
    return directory
