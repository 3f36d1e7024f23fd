"""Draw filled and patterned shapes under an affine pose, for the embedded data set.

Serves `scene_objects` (what a class looks like) and `scenes` (the picture around it). Shapes are arrays of
points `p 2`, many shapes of one kind `k p 2`; x points right, y down, an object fills about [-1, 1] in both.
"""

import colorsys
import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageChops, ImageDraw

from beitv2_jax import rng as streams
from beitv2_jax.data.embedded.parts import PART_NAMES

ATLAS_SIZE = 512
Color = tuple[int, int, int]
Points = Float[np.ndarray, "p 2"]
Shapes = Float[np.ndarray, "k p 2"]


class Palette(NamedTuple):
    """The colours of one object, from one distribution for all classes, so that colour does not reveal the class."""

    main: Color
    second: Color
    third: Color
    dark: Color
    light: Color
    line: Color


def random_color(
    rng: np.random.Generator,
    hue: float | None = None,
    *,
    luma: tuple[float, float] = (0.4, 0.75),
    saturation: float = 0.6,
) -> Color:
    """Draw a colour of any hue (or about the given one) with `luma` brightness (0..1) and up to that saturation."""
    hue = rng.random() if hue is None else hue + rng.normal(0.0, 0.03)
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(0.1, saturation), 1.0)
    scale = 255 * rng.uniform(*luma) / (0.3 * red + 0.59 * green + 0.11 * blue)
    return tuple(min(255, int(scale * channel)) for channel in (red, green, blue))


def mix(color: Color, other: Color, share: float) -> Color:
    """Return (1 - share) color + share other; a share beyond [0, 1] is clipped to the colour cube."""
    return tuple(min(255, max(0, round(a + share * (b - a)))) for a, b in zip(color, other, strict=True))


def darker(color: Color, share: float) -> Color:
    """Mix `share` of black into the colour."""
    return mix(color, (0, 0, 0), share)


def lighter(color: Color, share: float) -> Color:
    """Mix `share` of white into the colour."""
    return mix(color, (255, 255, 255), share)


def random_palette(rng: np.random.Generator, avoid: Color) -> Palette:
    """Draw the colours of one object, its main colour visibly apart from `avoid`, the mean of the background."""

    def distance(color: Color) -> int:
        return sum(abs(a - b) for a, b in zip(color, avoid, strict=True))

    main = max((random_color(rng, luma=(0.55, 0.78)) for _ in range(3)), key=distance)
    hue = colorsys.rgb_to_hsv(*(channel / 255 for channel in main))[0]
    return Palette(
        main=main,
        second=random_color(rng, hue + rng.choice([0.0, 0.12, 0.33, 0.5]), luma=(0.45, 0.68)),
        third=random_color(rng),
        dark=random_color(rng, luma=(0.05, 0.15)),
        light=random_color(rng, luma=(0.85, 0.97), saturation=0.25),
        line=random_color(rng, hue, luma=(0.06, 0.2)),
    )


@functools.lru_cache(maxsize=1)
def _noise_atlas() -> tuple[Image.Image, ...]:
    """Three fixed fields of 1/f^beta noise, smooth to grainy; every scene cuts its own pieces out of them."""
    frequency = np.hypot(np.fft.fftfreq(ATLAS_SIZE)[:, None], np.fft.rfftfreq(ATLAS_SIZE)[None, :])
    frequency[0, 0] = 1.0
    fields = []
    for index, beta in enumerate((1.9, 1.4, 0.9)):
        white = streams.host_rng(0, "scene noise atlas", index).standard_normal((ATLAS_SIZE, ATLAS_SIZE))
        field = np.fft.irfft2(np.fft.rfft2(white) * frequency**-beta, s=white.shape)
        field = 127.5 + 50.0 * (field - field.mean()) / field.std()
        fields.append(Image.fromarray(np.clip(field, 0, 255).astype(np.uint8)))
    return tuple(fields)


def noise(rng: np.random.Generator, size: int, *, grain: int | None = None) -> Float[np.ndarray, "size size"]:
    """Cut a turned, stretched piece of fractal noise, mean about 0, standard deviation about 0.4, range [-1, 1].

    `grain` 0 is smooth as clouds, 1 as stone, 2 as sand; None draws one.
    """
    field = _noise_atlas()[int(rng.integers(3)) if grain is None else grain]
    angle, zoom, stretch = rng.uniform(0.0, np.pi), rng.uniform(0.6, 1.3), rng.uniform(0.55, 1.0)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b, d, e = zoom * cos, -zoom * stretch * sin, zoom * sin, zoom * stretch * cos
    # the piece reaches at most zoom * sqrt(2) / 2 * size from its centre
    margin = 0.75 * zoom * size
    x, y = rng.uniform(margin, ATLAS_SIZE - margin, size=2)
    corner = (a, b, x - (a + b) * size / 2, d, e, y - (d + e) * size / 2)
    piece = field.transform((size, size), Image.Transform.AFFINE, corner, resample=Image.Resampling.BILINEAR)
    return np.asarray(piece, np.float32) / 127.5 - 1.0


def ellipses(centers: Points, radii: Points, angles=0.0, *, points: int = 12) -> Shapes:
    """Return k ellipses: centres `k 2`, half axes `k 2` and turning angles `k` in radians (or one of these for all)."""
    turn = np.linspace(0.0, 2 * np.pi, points, endpoint=False)
    centers = np.atleast_2d(centers)
    radii = np.broadcast_to(radii, centers.shape)
    x, y = radii[:, :1] * np.cos(turn), radii[:, 1:] * np.sin(turn)
    angles = np.broadcast_to(np.asarray(angles, float), len(x))[:, None]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([centers[:, :1] + cos * x - sin * y, centers[:, 1:] + sin * x + cos * y], axis=-1)


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0, *, points: int = 28) -> Points:
    """Return one ellipse with centre (x, y) and half axes rx, ry, turned by `angle` radians."""
    return ellipses([[x, y]], [[rx, ry]], angle, points=points)[0]


def smooth(points) -> Points:
    """Round the corners of a closed outline (two passes of Chaikin's corner cutting)."""
    points = np.asarray(points, float)
    for _ in range(2):
        following = np.roll(points, -1, axis=0)
        points = np.stack([0.75 * points + 0.25 * following, 0.25 * points + 0.75 * following], 1).reshape(-1, 2)
    return points


def blob(rng: np.random.Generator, x: float, y: float, rx: float, ry: float, roughness: float = 0.2) -> Points:
    """Return a rounded irregular outline about (x, y); its radius varies by `roughness` standard deviations."""
    corners = int(rng.integers(6, 10))
    turn = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
    radius = 1.0 + roughness * np.clip(rng.standard_normal(corners), -1.5, 1.5)
    return smooth(np.stack([x + rx * radius * np.cos(turn), y + ry * radius * np.sin(turn)], -1))


def wavy_lines(
    rng: np.random.Generator,
    box: tuple[float, float, float, float],
    spacing: float,
    *,
    angle: float = 0.0,
    wave: float = 0.0,
) -> Shapes:
    """Return parallel lines that cover the box (left, top, right, bottom), `wave` being the height of their waves."""
    x0, y0, x1, y1 = box
    reach = 0.5 * np.hypot(x1 - x0, y1 - y0)
    offsets = np.arange(-reach + rng.uniform(0, spacing), reach, spacing)
    along = np.linspace(-reach, reach, 9 if wave else 2)
    swing = wave * np.sin(along * rng.uniform(3, 6) + rng.uniform(0, 6))
    u, v = np.broadcast_to(along, (len(offsets), len(along))), offsets[:, None] + swing
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([(x0 + x1) / 2 + cos * u - sin * v, (y0 + y1) / 2 + sin * u + cos * v], axis=-1)


def staggered(box: tuple[float, float, float, float], step_x: float, step_y: float) -> Points:
    """Return the points of a brick-wise staggered lattice that covers the box (left, top, right, bottom)."""
    x0, y0, x1, y1 = box
    ys = np.arange(y0, y1 + step_y, step_y)
    xs = np.arange(x0 - step_x, x1 + step_x, step_x)
    x = xs[None, :] + 0.5 * step_x * (np.arange(len(ys)) % 2)[:, None]
    return np.stack([x, np.broadcast_to(ys[:, None], x.shape)], axis=-1).reshape(-1, 2)


class Pen:
    """Draw on an RGBA canvas through an affine pose; the alpha channel records where the object is visible.

    Everything drawn with `visible=255` belongs to the object, with 0 to its surroundings, whatever its colour. What is
    drawn after `begin` is also drawn into the map `parts`, if there is one, in the number of that part.
    """

    def __init__(
        self,
        canvas: Image.Image,
        matrix: Float[np.ndarray, "2 2"],
        offset,
        *,
        visible: int,
        parts: Image.Image | None = None,
    ):
        self.parts, self.number = parts, 0
        self.canvas = canvas
        self.draw = ImageDraw.Draw(canvas)
        self.matrix = matrix
        self.offset = np.asarray(offset, float)
        self.visible = visible
        self.unit = float(np.sqrt(abs(np.linalg.det(matrix))))

    def _pixels(self, shapes, offset=None) -> list[list[float]]:
        pixels = np.asarray(shapes, float) @ self.matrix.T + (self.offset if offset is None else offset)
        return pixels.reshape(-1, pixels.shape[-2] * 2).tolist()

    def _width(self, width: float) -> int:
        return max(1, round(width * self.unit))

    def begin(self, part: str) -> None:
        """Say which part, one of `PART_NAMES`, is drawn from now on."""
        self.number = PART_NAMES.index(part)

    def fill(self, shapes, color: Color) -> None:
        """Fill one outline `p 2` or many `k p 2`."""
        for flat in self._pixels(shapes):
            self.draw.polygon(flat, fill=(*color, self.visible))
            if self.parts is not None:
                ImageDraw.Draw(self.parts).polygon(flat, fill=self.number)

    def stroke(self, lines, color: Color, width: float) -> None:
        """Draw one line `p 2` or many `k p 2`, `width` in object units."""
        for flat in self._pixels(lines):
            self.draw.line(flat, fill=(*color, self.visible), width=self._width(width))
            if self.parts is not None:
                ImageDraw.Draw(self.parts).line(flat, fill=self.number, width=self._width(width))

    def part(self, outline: Points, color: Color, line: Color | None = None, width: float = 0.04) -> None:
        """Fill one outline and, given `line`, go round it."""
        self.fill(outline, color)
        if line is not None:
            self.stroke(np.concatenate([outline, outline[:2]]), line, width)

    def pattern(self, outline: Points, shapes, color: Color, *, opacity: float = 1.0, width: float = 0.0) -> None:
        """Fill (or with a `width` trace) shapes `k p 2` only where they lie inside the outline."""
        edge = np.asarray(outline, float) @ self.matrix.T + self.offset
        low = np.maximum(np.floor(edge.min(0)), 0).astype(int)
        high = np.minimum(np.ceil(edge.max(0)) + 1, self.canvas.size).astype(int)
        if (high <= low).any():
            return
        # only the box around the outline is touched: the pattern costs what it covers
        size = tuple((high - low).tolist())
        inside, pattern = Image.new("L", size), Image.new("L", size)
        ImageDraw.Draw(inside).polygon((edge - low).ravel().tolist(), fill=255)
        draw, value = ImageDraw.Draw(pattern), round(255 * opacity)
        for flat in self._pixels(shapes, self.offset - low):
            if width:
                draw.line(flat, fill=value, width=self._width(width))
            else:
                draw.polygon(flat, fill=value)
        box = (*low.tolist(), *high.tolist())
        covered = ImageChops.multiply(inside, pattern)
        self.canvas.paste((*color, self.visible), box, covered)
        if self.parts is not None:
            self.parts.paste(self.number, box, covered.point(lambda value: 255 * (value > 0)))
