"""Which decoder and which resize: images a second and core, each stage apart and whole chains, and how exact they are.

    pip install -e '.[benchmarks]'
    python -m benchmarks.decode --images=DIR_OR_TAR [--threads] [--out=table.md] [--quick]

Writes the tables of docs/decoding.md. All candidates of a table take turns in one
process that is pinned to one core, several rounds long; a rate is images per second of processor time, the median of
the rounds with their range, so that what else the machine does moves it little. Packages that are not installed are
left out. `--threads` measures, unpinned and by the clock, how many images a second several threads prepare.

TURBOJPEG, in the environment, names a libturbojpeg of version 2 for the candidates that decode only the crop.
"""

import argparse
import importlib
import io
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from beitv2_jax.data import augment, masking
from beitv2_jax.data.decode import decode_image
from beitv2_jax.data.randaugment import RandAugment
from beitv2_jax.rng import host_rng
from benchmarks.photos import (
    SIZE,
    Photo,
    cut,
    draws,
    pillow_decode,
    pillow_jitter,
    pillow_resize,
    pillow_rows_first,
    read_photos,
)

TURN = 10
"""Items that a candidate works on before the next one has its turn."""

REFERENCE = "Pillow, published order"


def _optional(name: str):
    """Return a package, None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


cv2, kornia_rs, simplejpeg = (_optional(name) for name in ("cv2", "kornia_rs", "simplejpeg"))


def _turbojpeg():
    """Return the library that cuts JPEGs without decoding, None where it is not there."""
    module, library = _optional("turbojpeg"), os.environ.get("TURBOJPEG")
    return module.TurboJPEG(library) if module and library else None


def kornia_resize(box: np.ndarray, interpolation: str = "bicubic") -> np.ndarray:
    """Resize to `SIZE` by kornia-rs."""
    return kornia_rs.imgproc.resize(box, (SIZE, SIZE), interpolation)


def kornia_decode(encoded: bytes) -> np.ndarray:
    """Decode by kornia-rs."""
    return np.asarray(kornia_rs.io.decode_image_jpeg(encoded))


def cv2_decode(encoded: bytes, flag: str = "IMREAD_COLOR_RGB") -> np.ndarray:
    """Decode by OpenCV."""
    return cv2.imdecode(np.frombuffer(encoded, np.uint8), getattr(cv2, flag))


def cv2_resize(box: np.ndarray, interpolation: str) -> np.ndarray:
    """Resize to `SIZE` by OpenCV."""
    return cv2.resize(box, (SIZE, SIZE), interpolation=getattr(cv2, f"INTER_{interpolation}"))


def cv2_area_or_cubic(box: np.ndarray) -> np.ndarray:
    """Resize by OpenCV: average where the box shrinks, else cubic."""
    return cv2_resize(box, "AREA" if min(box.shape[:2]) > SIZE else "CUBIC")


def half_scale_decode(photo: Photo) -> np.ndarray:
    """Decode at half the size, which the inverse cosine transform gives for less."""
    height, width = (-(-length // 2) for length in photo.pixels.shape[:2])
    return simplejpeg.decode_jpeg(photo.encoded, "RGB", min_height=height, min_width=width)


def half_scale_box(photo: Photo) -> np.ndarray:
    """Cut the box, out of the picture at half its size where that leaves the box large enough."""
    if min(photo.view.height, photo.view.width) < 2 * SIZE:
        return cut(simplejpeg.decode_jpeg(photo.encoded, "RGB"), photo.view)
    return cut(half_scale_decode(photo), augment.View(*(number // 2 for number in photo.view[:4]), False))


def only_the_crop(turbojpeg, photo: Photo) -> np.ndarray:
    """Cut the blocks around the box out of the JPEG without decoding, decode these, and cut the box."""
    top, left, height, width, _ = photo.view
    # 16 is the side of a block with halved colours
    x, y = left // 16 * 16, top // 16 * 16
    part = turbojpeg.crop(photo.encoded, x, y, left + width - x, top + height - y)
    pixels = simplejpeg.decode_jpeg(part, "RGB")
    return np.ascontiguousarray(pixels[top - y : top - y + height, left - x : left - x + width])


def published_chain(photo: Photo) -> np.ndarray:
    """Pillow alone, in the published order: jitter of the whole image, flip, crop, resize."""
    view, factors, order = draws(photo.index, *photo.pixels.shape[:2])
    with Image.open(io.BytesIO(photo.encoded)) as image:
        image = pillow_jitter(image.convert("RGB"), factors, order)
    left = view.left
    if view.flip:
        image, left = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image.width - view.left - view.width
    box = image.crop((left, view.top, left + view.width, view.top + view.height))
    return np.asarray(box.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def chain(decode: Callable[[Photo], np.ndarray], resize: Callable[[np.ndarray], np.ndarray]):
    """Return a chain without jitter: decode and cut the box (`decode`), resize, flip."""

    def run(photo: Photo) -> np.ndarray:
        view, _, _ = draws(photo.index, *photo.pixels.shape[:2])
        resized = resize(decode(photo))
        return kornia_rs.imgproc.horizontal_flip(resized) if view.flip else resized

    return run


def our_chain(photo: Photo) -> np.ndarray:
    """What the data pipeline does: the jitter itself follows on the device, from the numbers drawn here."""
    image = decode_image(photo.encoded)
    view, factors, order = draws(photo.index, *image.shape[:2])
    augment.jitter_gray(image, factors, order)
    return augment.crop_resize(image, view, SIZE)


def with_randaugment(photo: Photo) -> np.ndarray:
    """What the data pipeline does when fine-tuning."""
    return RandAugment()(our_chain(photo), host_rng(0, "randaugment", photo.index, 0))


def decoders() -> dict[str, Callable[[Photo], object]]:
    """Return the ways of decoding a photo that are installed."""
    found = {"Pillow": lambda photo: pillow_decode(photo.encoded)}
    if simplejpeg:
        found["simplejpeg"] = lambda photo: simplejpeg.decode_jpeg(photo.encoded, "RGB")
    found["decode_image"] = lambda photo: decode_image(photo.encoded)
    if cv2:
        found["OpenCV"] = lambda photo: cv2_decode(photo.encoded)
    if kornia_rs:
        found["kornia-rs"] = lambda photo: kornia_decode(photo.encoded)
    found["Pillow, draft at half scale"] = lambda photo: pillow_decode(
        photo.encoded, tuple(length // 2 for length in photo.pixels.shape[1::-1])
    )
    if simplejpeg:
        found["simplejpeg, half scale"] = half_scale_decode
        turbojpeg = _turbojpeg()
        if turbojpeg:
            found["libturbojpeg, only the crop"] = lambda photo: only_the_crop(turbojpeg, photo)
    return found


def resizers() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Return the ways of resizing a box that are installed."""
    found = {"Pillow": pillow_resize, "Pillow, rows before columns": pillow_rows_first}
    if kornia_rs:
        found["kornia-rs"] = kornia_resize
    if cv2:
        found["OpenCV cubic"] = lambda box: cv2_resize(box, "CUBIC")
        found["OpenCV area down, cubic up"] = cv2_area_or_cubic
    return found


def chains() -> dict[str, Callable[[Photo], np.ndarray]]:
    """Return whole preparations of a photo, the published one first."""

    def pillow(photo):
        return cut(pillow_decode(photo.encoded), photo.view)

    def fast(photo):
        return cut(simplejpeg.decode_jpeg(photo.encoded, "RGB"), photo.view)

    found = {REFERENCE: published_chain, "Pillow, no jitter": chain(pillow, pillow_resize)}
    if simplejpeg:
        found["simplejpeg, Pillow"] = chain(fast, pillow_resize)
        found["simplejpeg, kornia-rs"] = chain(fast, kornia_resize)
        found["simplejpeg at half scale where possible, kornia-rs"] = chain(half_scale_box, kornia_resize)
        turbojpeg = _turbojpeg()
        if turbojpeg:
            found["only the crop, kornia-rs"] = chain(lambda photo: only_the_crop(turbojpeg, photo), kornia_resize)
    if cv2:
        found["OpenCV, kornia-rs"] = chain(lambda photo: cut(cv2_decode(photo.encoded), photo.view), kornia_resize)
    return {**found, "this project": our_chain}


def stages() -> dict[str, Callable[[Photo], object]]:
    """Return what else costs time: jitter of either kind, draws, flips, RandAugment."""
    found = {
        "jitter, Pillow, whole image": lambda p: pillow_jitter(Image.fromarray(p.pixels), p.factors, p.order),
        "jitter, grey level for the device": lambda p: augment.jitter_gray(p.pixels, p.factors, p.order),
        "cut the box": lambda p: cut(p.pixels, p.view),
        "draw view and jitter": lambda p: draws(p.index, *p.pixels.shape[:2]),
        "draw mask": lambda p: masking.block_mask(host_rng(0, "mask", p.index, 0), (14, 14), 75),
        "flip, NumPy": lambda p: np.ascontiguousarray(p.resized[:, ::-1]),
        "RandAugment": lambda p: RandAugment()(p.resized, host_rng(0, "randaugment", p.index, 0)),
    }
    if kornia_rs:
        found["flip, kornia-rs"] = lambda p: kornia_rs.imgproc.horizontal_flip(p.resized)
    return found


def measure(candidates: dict[str, Callable], items: list, rounds: int) -> dict[str, list[float]]:
    """Return the rates of every candidate, one a round, in images per second of processor time.

    Within a round they take turns after every few items, so that all meet the same state of the machine.
    """
    rates = {name: [] for name in candidates}
    for number in range(rounds + 1):
        spent = dict.fromkeys(candidates, 0.0)
        for first in range(0, len(items), TURN):
            for name, run in candidates.items():
                start = time.process_time()
                for item in items[first : first + TURN]:
                    run(item)
                spent[name] += time.process_time() - start
        if number:  # the first round only warms up
            for name, seconds in spent.items():
                rates[name].append(len(items) / seconds)
    return rates


def rate_table(title: str, rates: dict[str, list[float]], reference: str) -> list[str]:
    """Return the lines of a table of rates with their ratios to the candidate `reference`."""
    lines = [f"| {title} | images/s per core | range | x {reference} |", "|---|---|---|---|"]
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates[reference], strict=True))
        lines.append(
            f"| {name} | {statistics.median(values):.0f} | {min(values):.0f}-{max(values):.0f} | {ratio:.2f} |"
        )
    return [*lines, ""]


def exactness_table(photos: list[Photo], views: int) -> list[str]:
    """Compare every resize with Pillow's bicubic, over random boxes, those that shrink and those that grow apart."""
    lines = [
        "| resize | boxes | mean | 99.9 % | largest | mean of the worst image |",
        "|---|---|---|---|---|---|",
    ]
    candidates = {name: (pillow_resize, resize) for name, resize in resizers().items() if name != "Pillow"}
    if kornia_rs:
        candidates["kornia-rs against Pillow, rows before columns"] = (pillow_rows_first, kornia_resize)
        candidates["kornia-rs lanczos against Pillow's, rows before columns"] = (
            lambda box: pillow_rows_first(box, "lanczos"),
            lambda box: kornia_resize(box, "lanczos"),
        )
    for name, (expected, resize) in candidates.items():
        counts, means = {"down": np.zeros(256, int), "up": np.zeros(256, int)}, []
        for photo in photos:
            for index in range(views):
                rng = host_rng(0, "view", photo.index, index)
                view = augment.random_view(rng, *photo.pixels.shape[:2], min_scale=0.08)
                box = cut(photo.pixels, view)
                apart = np.abs(resize(box).astype(int) - expected(box))
                means.append(apart.mean())
                kind = "down" if view.height * view.width > SIZE**2 else "up"
                counts[kind] += np.bincount(apart.ravel(), minlength=256)
        counts = {"all": counts["down"] + counts["up"], **counts}
        for kind, histogram in counts.items():
            if histogram.any():
                share = np.cumsum(histogram) / histogram.sum()
                mean, high = histogram @ np.arange(256) / histogram.sum(), int(np.argmax(share >= 0.999))
                worst = f"{max(means):.3f}" if kind == "all" else ""
                lines.append(f"| {name} | {kind} | {mean:.4f} | {high} | {np.flatnonzero(histogram)[-1]} | {worst} |")
    return [*lines, ""]


def decoder_exactness(photos: list[Photo]) -> list[str]:
    """Return the lines of a table of how far every decoder is from Pillow."""
    lines = ["| decoder | images with another pixel than Pillow's | mean | largest |", "|---|---|---|---|"]
    whole = {name: run for name, run in decoders().items() if "half" not in name and "crop" not in name}
    for name, run in whole.items():
        apart = [
            np.abs(np.asarray(run(photo)).astype(int) - photo.pixels) for photo in photos if photo.pixels.ndim == 3
        ]
        different = sum(bool(a.any()) for a in apart)
        mean = np.mean([a.mean() for a in apart])
        lines.append(f"| {name} | {different} of {len(photos)} | {mean:.3f} | {max(a.max() for a in apart)} |")
    return [*lines, ""]


def thread_table(photos: list[Photo], rounds: int) -> list[str]:
    """Measure images per second by the clock for several threads at once."""
    cores = len(os.sched_getaffinity(0))
    counts = [count for count in (1, 2, 4, 8, 16, 32) if count <= 2 * cores]
    candidates = {"this project": our_chain, "this project, with RandAugment": with_randaugment}
    lines = ["| chain | threads | images/s | range |", "|---|---|---|---|"]
    rates = {(name, count): [] for name in candidates for count in counts}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            for count in counts:
                with ThreadPoolExecutor(count) as pool:
                    start = time.perf_counter()
                    list(pool.map(run, photos))
                    if number:
                        rates[name, count].append(len(photos) / (time.perf_counter() - start))
    for (name, count), values in rates.items():
        lines.append(f"| {name} | {count} | {statistics.median(values):.0f} | {min(values):.0f}-{max(values):.0f} |")
    return [f"{cores} cores.", "", *lines, ""]


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder or tar of JPEGs")
    parser.add_argument("--out", default="", help="Markdown file to write; else they are printed")
    parser.add_argument("--threads", action="store_true", help="measure threads instead")
    parser.add_argument("--quick", action="store_true", help="few images and rounds")
    options = parser.parse_args(argv)
    limit, rounds = (24, 2) if options.quick else (150, 7)
    photos = read_photos(options.images, limit)
    if options.threads:
        lines = thread_table(photos, rounds)
    else:
        boxes = [cut(photo.pixels, photo.view) for photo in photos]
        lines = rate_table("chain", measure(chains(), photos, rounds), REFERENCE)
        lines += rate_table("decode", measure(decoders(), photos, rounds), "Pillow")
        lines += rate_table("resize of the box", measure(resizers(), boxes, rounds), "Pillow")
        lines += rate_table("else", measure(stages(), photos, rounds), "jitter, Pillow, whole image")
        lines += decoder_exactness(photos)
        lines += exactness_table(photos, 1 if options.quick else 4)
    head = f"{len(photos)} photographs, Pillow {Image.__version__}, Python {sys.version.split()[0]}."
    text = "\n".join([head, "", *lines])
    if options.out:
        Path(options.out).write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    if "--threads" not in sys.argv:
        # before any library counts the cores to start its threads
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    main()
