"""Draw the four animals among the classes of the embedded data set: fish, bird, butterfly and cat.

Same rules as in `data.embedded.scene_objects`, which lists them with the other classes for `data.embedded.scenes`.
"""

import numpy as np

from beitv2_jax.data.embedded import drawing
from beitv2_jax.data.embedded.drawing import Palette, Pen, darker, ellipse, ellipses, lighter, mix, smooth

Rng = np.random.Generator


def draw_fish(pen: Pen, rng: Rng, palette: Palette) -> None:
    """Body covered with rows of round scales, forked tail, rayed fins, one eye."""
    height, nose = rng.uniform(0.38, 0.62), rng.uniform(0.85, 1.0)
    fork, dorsal = rng.uniform(0.0, 0.3), rng.uniform(0.2, 0.42)
    tail = np.array([[-0.5, 0], [-1.0, -rng.uniform(0.4, 0.6)], [-1.0 + fork, 0], [-1.0, rng.uniform(0.4, 0.6)]])
    top = smooth(
        [[-0.4, -0.4 * height], [-0.3, -height - dorsal * 0.7], [0.15, -height - dorsal], [0.4, -0.6 * height]]
    )
    low = np.array([[-0.1, 0.7 * height], [-0.3, height + dorsal * 0.8], [0.25, 0.85 * height]])
    pen.begin("fish fin")
    for fin in (tail, top, low):
        pen.part(fin, palette.second, palette.line)
        middle = fin.mean(0)
        root = middle * 0.3
        rays = np.stack(
            [np.broadcast_to(root, (9, 2)), root + 1.4 * (fin[np.linspace(0, len(fin) - 1, 9).astype(int)] - root)], 1
        )
        pen.pattern(fin, rays, palette.line, width=0.025)
    turn = np.linspace(0, 2 * np.pi, 30, endpoint=False)
    body = np.stack([0.14 + 0.76 * nose * np.cos(turn), height * np.sin(turn) * (0.75 + 0.25 * np.cos(turn))], -1)
    pen.begin("fish body")
    pen.part(body, palette.main)
    belly = body * [1.0, 0.5] + [0.0, 0.55 * height]
    pen.pattern(body, belly[None], lighter(palette.main, 0.4), opacity=0.7)
    step = rng.uniform(0.24, 0.32)
    centers = drawing.staggered((-height, -0.7, height, 0.42), step, 0.5 * step)[:, ::-1]
    arc = np.linspace(np.pi / 2, 3 * np.pi / 2, 7)
    scales = centers[:, None] + 0.52 * step * np.stack([np.cos(arc), np.sin(arc)], -1)
    pen.pattern(body, scales, palette.line, width=0.055)
    head = ellipse(0.95 * nose, 0, 0.5, 1.3 * height)
    pen.begin("fish head")
    pen.pattern(body, head[None], mix(palette.main, palette.second, 0.35))
    pen.pattern(body, head[None], palette.line, width=0.05)
    pen.begin("fish body")
    pen.stroke(np.concatenate([body, body[:2]]), palette.line, 0.035)
    eye = rng.uniform(0.09, 0.14)
    pen.begin("fish eye")
    pen.fill(ellipse(0.62, -0.25 * height, eye, eye), palette.light)
    pen.fill(ellipse(0.64, -0.25 * height, 0.55 * eye, 0.55 * eye), palette.dark)
    pen.begin("fish mouth")
    pen.stroke([[0.14 + 0.74 * nose, 0.12], [0.66, 0.2 * height]], palette.dark, 0.04)


def draw_bird(pen: Pen, rng: Rng, palette: Palette) -> None:
    """Drop-shaped body on two legs, round head with a pointed beak, a wing and tail of long feathers."""
    head_x, head_y, head = rng.uniform(0.4, 0.6), rng.uniform(-0.72, -0.5), rng.uniform(0.24, 0.32)
    tail_y, drop = rng.uniform(-0.05, 0.45), rng.uniform(0.36, 0.5)
    pen.begin("bird leg")
    pen.stroke([[[0.0, 0.4], [0.08, 1.0]], [[0.2, 0.4], [0.3, 1.0]]], palette.dark, 0.05)
    pen.stroke([[[-0.08, 1.0], [0.2, 1.0]], [[0.15, 1.0], [0.45, 1.0]]], palette.dark, 0.05)
    spread = np.linspace(-0.12, 0.16, int(rng.integers(3, 6)))[:, None]
    ends = np.concatenate([-0.95 + 0.3 * np.abs(spread), tail_y + spread], 1)
    middle, angles = 0.5 * (ends + np.array([-0.3, 0.15])), np.arctan2(ends[:, 1] - 0.15, ends[:, 0] + 0.3)
    length = 0.5 * np.hypot(ends[:, 0] + 0.3, ends[:, 1] - 0.15)
    pen.begin("bird tail")
    for feather in ellipses(middle, np.stack([length, np.full(len(ends), 0.085)], 1), angles):
        pen.part(feather, palette.second, palette.line)
    body = smooth(
        [
            [head_x + 0.1, head_y],
            [0.62, 0.0],
            [0.35, drop],
            [-0.15, drop],
            [-0.65, 0.2],
            [-0.3, -0.25],
            [head_x - 0.25, head_y],
        ]
    )
    pen.begin("bird body")
    pen.part(body, palette.main, palette.line)
    breast = ellipse(0.35, 0.3, 0.32, 0.42, -0.4)
    pen.pattern(body, breast[None], lighter(palette.main, 0.5))
    marks = drawing.staggered((0.05, -0.3, 0.75, 0.6), 0.17, 0.13)
    left, right = np.array([-0.05, -0.06]), np.array([0.05, -0.06])
    pen.pattern(body, np.stack([marks + left, marks, marks + right], 1), palette.line, width=0.04)
    pen.begin("bird beak")
    pen.fill(
        [
            [head_x + 0.7 * head, head_y - 0.11],
            [head_x + head + rng.uniform(0.18, 0.4), head_y + 0.06],
            [head_x + 0.7 * head, head_y + 0.13],
        ],
        palette.third,
    )
    pen.begin("bird head")
    pen.part(
        ellipse(head_x, head_y, head, 0.93 * head),
        mix(palette.main, palette.second, rng.choice([0.0, 0.5])),
        palette.line,
    )
    pen.begin("bird eye")
    pen.fill(ellipse(head_x + 0.1, head_y - 0.05, 0.08, 0.08), palette.light)
    pen.fill(ellipse(head_x + 0.11, head_y - 0.05, 0.05, 0.05), palette.dark)
    count, lift = int(rng.integers(4, 7)), rng.uniform(-0.15, 0.25)
    pen.begin("bird wing")
    for row, reach in ((0, 1.0), (1, 0.62)):
        angle = np.pi + 0.25 * row - lift + np.linspace(-0.75, 0.28, count)
        length = reach * np.linspace(0.4, 0.62, count)[:, None]
        root = np.array([0.28, -0.12])
        tips = root + length * np.stack([np.cos(angle), np.sin(angle)], -1)
        sizes = np.concatenate([0.75 * length, np.full((count, 1), 0.115)], 1)
        color = palette.second if row == 0 else mix(palette.second, palette.main, 0.4)
        for feather in ellipses(tips, sizes, angle):
            pen.part(feather, color, palette.line)


def draw_butterfly(pen: Pen, rng: Rng, palette: Palette) -> None:
    """Two pairs of mirrored wings with dark margins, veins and ringed eye spots; thin body, two feelers."""
    spread, droop = rng.uniform(0.8, 1.0), rng.uniform(0.5, 0.9)
    fore = smooth(
        [[0.02, -0.1], [0.25, -0.55], [0.75 * spread, -0.95], [spread, -0.7], [0.85 * spread, -0.1], [0.3, 0.12]]
    )
    hind = smooth(
        [
            [0.02, 0.0],
            [0.5, -0.02],
            [0.85 * spread, 0.25],
            [0.7 * spread, droop],
            [0.35, 0.8 * droop + 0.15],
            [0.1, 0.4],
        ]
    )
    spots = int(rng.integers(1, 3))
    size = rng.uniform(0.11, 0.17)
    beads = int(rng.integers(5, 8))
    for side in (-1, 1):
        mirror = np.array([side, 1])
        pen.begin("butterfly wing")
        for wing, color in ((hind, palette.second), (fore, palette.main)):
            middle = wing.mean(0)
            pen.part(wing * mirror, palette.dark)
            inner = middle + 0.8 * (wing - middle) - 0.07 * middle
            pen.fill(inner * mirror, color)
            ends = wing[np.linspace(4, len(wing) - 4, 6).astype(int)]
            veins = np.stack([np.zeros_like(ends) + 0.2 * middle, ends], 1)
            pen.pattern(inner * mirror, veins * mirror, palette.dark, width=0.025)
            edge = middle + 0.9 * (wing[np.linspace(5, len(wing) - 6, beads).astype(int)] - middle)
            pen.fill(ellipses(edge * mirror, [[0.04, 0.04]], points=6), palette.light)
            away = middle / np.hypot(*middle)
            for spot in range(spots):
                x, y = (middle + away * (0.18 - 0.36 * spot)) * mirror
                for share, ring in ((1.0, palette.dark), (0.75, palette.light), (0.45, palette.third)):
                    radius = (share - 0.3 * spot * share) * size
                    pen.fill(ellipse(x, y, radius, radius), ring)
        pen.begin("butterfly feeler")
        pen.stroke(np.array([[0.02, -0.4], [0.12, -0.7], [0.28, -0.9]]) * mirror, palette.dark, 0.03)
    pen.begin("butterfly body")
    pen.fill(ellipse(0, 0.05, 0.07, 0.5), palette.dark)
    pen.fill(ellipse(0, -0.42, 0.08, 0.09), palette.dark)


def draw_cat(pen: Pen, rng: Rng, palette: Palette) -> None:
    """Round face with pointed ears, slit eyes, muzzle and whiskers; tabby bars and short fur strokes."""
    wide, ear = rng.uniform(0.75, 0.9), rng.uniform(0.0, 0.14)
    pen.begin("cat ear")
    for side in (-1, 1):
        tip = [side * (0.62 + ear), -0.98]
        pen.part(np.array([[side * 0.86 * wide, -0.15], tip, [side * 0.12, -0.55]]), palette.main, palette.line)
        pen.fill(
            np.array([[side * 0.75 * wide, -0.3], [side * (0.59 + ear), -0.8], [side * 0.27, -0.55]]), palette.third
        )
    face = smooth(
        [
            [0, -0.68],
            [0.6 * wide, -0.62],
            [wide, -0.1],
            [0.9 * wide, 0.45],
            [0.4, 0.85],
            [0, 0.9],
            [-0.4, 0.85],
            [-0.9 * wide, 0.45],
            [-wide, -0.1],
            [-0.6 * wide, -0.62],
        ]
    )
    pen.begin("cat face")
    pen.part(face, palette.main, palette.line)
    starts = rng.uniform([-wide, -0.7], [wide, 0.9], (90, 2))
    fur = np.stack([starts, starts * 1.12 + [0, 0.03]], 1)
    pen.pattern(face, fur[::2], darker(palette.main, 0.3), width=0.03)
    pen.pattern(face, fur[1::2], lighter(palette.main, 0.35), width=0.03)
    bars = int(rng.integers(1, 3))
    x = np.arange(-bars, bars + 1) * 0.16
    forehead = np.stack([np.stack([x, np.full_like(x, -0.75)], 1), np.stack([0.6 * x, np.full_like(x, -0.34)], 1)], 1)
    y = np.array([0.02, 0.22, 0.42])
    cheek = np.stack([np.stack([np.full(3, 1.0), y - 0.06], 1), np.stack([np.full(3, 0.56), y], 1)], 1)
    pen.pattern(face, forehead, palette.line, width=0.09)
    pen.pattern(face, np.concatenate([cheek, cheek * [-1, 1]]), palette.line, width=0.085)
    open_, away = rng.uniform(0.13, 0.2), rng.uniform(0.34, 0.42)
    muzzle = lighter(palette.main, 0.6)
    pen.begin("cat muzzle")
    pen.fill(ellipses([[-0.16, 0.48], [0.16, 0.48]], [[0.24, 0.2]]), muzzle)
    for side in (-1, 1):
        pen.begin("cat eye")
        pen.part(ellipse(side * away, -0.06, 0.2, open_, side * -0.3), palette.light, palette.dark, 0.04)
        pen.fill(ellipse(side * away, -0.06, 0.06, open_), palette.dark)
        root, tips = np.array([side * 0.2, 0.5]), np.array([[side * 1.0, 0.3], [side * 1.02, 0.5], [side * 0.98, 0.72]])
        pen.begin("cat whisker")
        pen.stroke(np.stack([np.broadcast_to(root, (3, 2)), tips], 1), palette.light, 0.025)
    pen.begin("cat nose")
    pen.fill([[-0.11, 0.27], [0.11, 0.27], [0, 0.4]], palette.dark)
    pen.begin("cat muzzle")
    pen.stroke([[-0.22, 0.6], [0, 0.55], [0.22, 0.6]], palette.dark, 0.035)
    pen.stroke([[0, 0.38], [0, 0.56]], palette.dark, 0.035)
