"""Draw the ten object classes of the embedded data set, which differ by parts and patterns and never by colours.

`OBJECTS` maps class name -> (draw function, largest tilt in degrees); `data.embedded.scenes` chooses pose, place and
surroundings. Every function fills about [-1, 1] x [-1, 1] (x right, y down), takes all colours from the one palette
and varies the proportions, the number of parts and the density of its pattern.
"""

from collections.abc import Callable

import numpy as np

from beitv2_jax.data.embedded import drawing
from beitv2_jax.data.embedded.drawing import Palette, Pen, darker, ellipse, ellipses, lighter, mix, smooth
from beitv2_jax.data.embedded.scene_animals import draw_bird, draw_butterfly, draw_cat, draw_fish

Rng = np.random.Generator


def draw_flower(pen: Pen, rng: Rng, palette: Palette) -> None:
    """Petals around a seeded disc, each petal with veins; often a stalk and a leaf."""
    count, disc = int(rng.integers(6, 12)), rng.uniform(0.24, 0.36)
    if rng.random() < 0.6:
        pen.begin("flower stalk")
        pen.stroke([[0, 0], [0.05, 0.6], [rng.uniform(-0.2, 0.2), 1.3]], palette.third, 0.09)
        pen.begin("flower leaf")
        leaf = ellipse(0.3, 0.95, 0.3, 0.12, -0.5)
        pen.part(leaf, palette.third, darker(palette.third, 0.4))
    width = rng.uniform(1.0, 1.4) * np.pi * 0.55 / count
    tip, rows = rng.choice([0.7, 1.0]), int(rng.integers(1, 3))
    pen.begin("flower petal")
    for row in range(rows):
        length = 0.95 - 0.25 * row
        color = palette.main if row == 0 else lighter(palette.main, 0.3)
        along = np.array([0.1, 0.35, 0.7, 0.95, 1.0, 0.95, 0.7, 0.35, 0.1]) * length
        across = np.array([-0.3, -0.6, -1.0, -0.55 * tip, 0, 0.55 * tip, 1.0, 0.6, 0.3]) * width
        outline = np.stack([along, across], -1)
        veins = np.array([[[0.2, v * width * 0.3], [0.9 * length, v * width * 0.55]] for v in (-1, 0, 1)])
        for petal in range(count):
            angle = 2 * np.pi * (petal + 0.5 * row) / count + rng.normal(0, 0.05)
            turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            pen.part(outline @ turn, color, palette.line)
            pen.stroke(veins @ turn, darker(color, 0.45), 0.035)
    pen.begin("flower disc")
    pen.part(ellipse(0, 0, disc, disc), palette.second, palette.dark, 0.04)
    seeds = drawing.staggered((-disc, -disc, disc, disc), 0.12, 0.1)
    seeds = seeds[np.hypot(*seeds.T) < disc]
    pen.fill(ellipses(seeds, [[0.035, 0.035]], points=5), darker(palette.second, 0.55))


def draw_mushroom(pen: Pen, rng: Rng, palette: Palette) -> None:
    """Domed cap with round raised spots, fine gills under its rim, thick stem with a ring."""
    rim, top, stem = rng.uniform(-0.05, 0.2), rng.uniform(-0.98, -0.8), rng.uniform(0.16, 0.27)
    foot = 1.35 * stem
    stalk = smooth([[-stem, rim], [stem, rim], [stem, 0.6], [foot, 0.98], [-foot, 0.98], [-stem, 0.6]])
    pale = lighter(palette.second, 0.5)
    pen.begin("mushroom stem")
    pen.part(stalk, pale, palette.line)
    pen.pattern(
        stalk,
        drawing.wavy_lines(rng, (-foot, rim, foot, 1), 0.09, angle=np.pi / 2, wave=0.02),
        darker(pale, 0.3),
        width=0.025,
    )
    sag = rng.uniform(0.14, 0.24)
    under = ellipse(0, rim, 0.93, sag)
    pen.begin("mushroom gills")
    pen.part(under, darker(pale, 0.25), palette.line)
    turn = np.linspace(0, np.pi, 23)
    gills = np.stack(
        [
            np.stack([0.25 * np.cos(turn), rim + 0.0 * turn], -1),
            np.stack([0.93 * np.cos(turn), rim + sag * np.sin(turn)], -1),
        ],
        1,
    )
    pen.pattern(under, gills, darker(pale, 0.65), width=0.03)
    collar = smooth([[-stem - 0.02, 0.3], [stem + 0.02, 0.3], [stem + 0.12, 0.46], [0, 0.52], [-stem - 0.12, 0.46]])
    pen.begin("mushroom ring")
    pen.part(collar, pale, palette.line)
    cap = smooth(
        [
            [-1.0, rim],
            [-0.9, 0.5 * (rim + top)],
            [-0.45, top],
            [0.45, top],
            [0.9, 0.5 * (rim + top)],
            [1.0, rim],
            [0.5, rim + 0.1],
            [-0.5, rim + 0.1],
        ]
    )
    pen.begin("mushroom cap")
    pen.part(cap, palette.main, palette.line)
    step = rng.uniform(0.32, 0.48)
    spots = drawing.staggered((-0.9, top + 0.08, 0.95, rim), step, 0.7 * step)
    spots = spots + rng.normal(0, 0.05, spots.shape)
    size = np.repeat(rng.uniform(0.07, 0.15, (len(spots), 1)), 2, 1) * [1.0, 0.8]
    pen.pattern(cap, ellipses(spots + np.array([0.02, 0.03]), size), palette.line)
    pen.pattern(cap, ellipses(spots, size), palette.light)


def draw_tree(pen: Pen, rng: Rng, palette: Palette) -> None:
    """Trunk with bark and branches under a crown of many small leaves, round or in tiers."""
    thick, fork = rng.uniform(0.09, 0.17), rng.uniform(0.0, 0.25)
    bark = darker(palette.second, 0.45)
    trunk = np.array(
        [
            [-thick, -0.2],
            [thick, -0.2],
            [1.1 * thick, 0.6],
            [1.9 * thick, 1.0],
            [-1.9 * thick, 1.0],
            [-1.1 * thick, 0.6],
        ]
    )
    pen.begin("tree trunk")
    pen.part(trunk, bark, darker(bark, 0.5))
    pen.pattern(
        trunk,
        drawing.wavy_lines(rng, (-0.4, 0, 0.4, 1), 0.07, angle=np.pi / 2, wave=0.03),
        darker(bark, 0.5),
        width=0.03,
    )
    pen.stroke([[[0, 0.45], [-0.5, fork - 0.1]], [[0, 0.35], [0.5, fork - 0.2]]], bark, 0.09)
    if rng.random() < 0.65:
        lumps = int(rng.integers(4, 7))
        middle = np.array([0.0, -0.42])
        angle = rng.uniform(0, 6.3) + np.arange(lumps) * 2 * np.pi / lumps
        centers = middle + np.stack([0.5 * np.cos(angle), 0.3 * np.sin(angle)], -1)
        clumps = [
            drawing.blob(rng, *middle, 0.5, 0.4, 0.1),
            *(drawing.blob(rng, x, y, 0.42, 0.32, 0.12) for x, y in centers),
        ]
    else:
        tiers = int(rng.integers(3, 5))
        base = np.linspace(0.35, -0.45, tiers)
        clumps = [
            np.array([[0, y - 0.75], [0.85 - 0.15 * k, y], [0.3, y + 0.06], [-0.3, y + 0.06], [-0.85 + 0.15 * k, y]])
            for k, y in enumerate(base)
        ]
    shade = [darker(palette.main, 0.75), darker(palette.main, 0.4), palette.main, lighter(palette.main, 0.5)]
    pen.begin("tree crown")
    for clump in clumps:
        pen.fill(clump, shade[1])
    size = rng.uniform(0.075, 0.105)
    for clump in clumps:
        low, high = clump.min(0), clump.max(0)
        leaves = rng.uniform(low, high, (45, 2))
        # darker leaves below, lighter above, as under a high sun
        order = np.argsort(leaves[:, 1] + rng.normal(0, 0.12, len(leaves)))[::-1]
        middle = clump.mean(0)
        leaves = middle + 0.92 * (leaves - middle)
        radii = np.array([[size, 0.55 * size]])
        for color, chosen in zip((shade[0], shade[2], shade[3]), np.array_split(order, 3), strict=True):
            pen.pattern(
                middle + 1.12 * (clump - middle),
                ellipses(leaves[chosen], radii, rng.uniform(0, np.pi, len(chosen)), points=6),
                color,
            )


def draw_house(pen: Pen, rng: Rng, palette: Palette) -> None:
    """Walls of courses of brick, tiled gable roof with a chimney, a door and windows with glazing bars."""
    eaves, wide, peak = rng.uniform(-0.3, 0.0), rng.uniform(0.72, 0.88), rng.uniform(-0.98, -0.8)
    side = rng.choice([-1, 1])
    chimney = np.array([[side * 0.4, eaves], [side * 0.4, -0.95], [side * 0.6, -0.95], [side * 0.6, eaves]])
    pen.begin("house chimney")
    pen.part(chimney, darker(palette.main, 0.3), palette.line)
    wall = np.array([[-wide, eaves], [wide, eaves], [wide, 0.98], [-wide, 0.98]])
    pen.begin("house wall")
    pen.part(wall, palette.main, palette.line)
    course = rng.uniform(0.16, 0.22)
    rows = drawing.wavy_lines(rng, (-1, eaves, 1, 1), course)
    pen.pattern(wall, rows, palette.line, width=0.04)
    joints = drawing.staggered((-1, rows[0, 0, 1], 1, 1), 2 * course, course)
    pen.pattern(wall, np.stack([joints, joints + np.array([0, course])], 1), palette.line, width=0.04)
    ridge = rng.uniform(0.0, 0.6)
    roof = np.array([[-1.0, eaves + 0.04], [-ridge, peak], [ridge, peak], [1.0, eaves + 0.04]])
    pen.begin("house roof")
    pen.part(roof, palette.second, darker(palette.second, 0.6))
    tile = rng.uniform(0.16, 0.22)
    tiles = drawing.staggered((-1, peak, 1, eaves), tile, 0.8 * tile)
    tiles = tiles[:, None] + tile * np.array([[-0.5, 0], [-0.5, 0.7], [0.5, 0.7], [0.5, 0]])
    pen.pattern(roof, tiles, darker(palette.second, 0.7), width=0.045)
    frame, pane = palette.light, rng.choice([0, 1])
    door = rng.choice([-0.5, 0.0, 0.5]) * wide
    panel = np.array([[door - 0.15, 0.4], [door + 0.15, 0.4], [door + 0.15, 0.98], [door - 0.15, 0.98]])
    pen.begin("house door")
    pen.part(panel, palette.third, frame, 0.06)
    pen.fill(ellipse(door + 0.08, 0.7, 0.03, 0.03, points=6), palette.dark)
    columns = int(rng.integers(2, 4))
    half = np.array([rng.uniform(0.13, 0.17), rng.uniform(0.13, 0.19)])
    pen.begin("house window")
    for x in np.linspace(-wide + 0.27, wide - 0.27, columns):
        for y in (eaves + 0.3, 0.66):
            if (
                y - eaves < 0.28
                or (y > 0.4 and abs(x - door) < 0.36)
                or (y < 0.4 and eaves > -0.1 and abs(x - door) < 0.3)
            ):
                continue
            glass = np.array([x, y]) + half * [[-1, -1], [1, -1], [1, 1], [-1, 1]]
            pen.part(glass, palette.dark if pane else mix(palette.dark, palette.light, 0.3), frame, 0.06)
            pen.stroke([[[x - half[0], y], [x + half[0], y]], [[x, y - half[1]], [x, y + half[1]]]], frame, 0.045)


def draw_car(pen: Pen, rng: Rng, palette: Palette) -> None:
    """Low body with a glazed cabin on two dark tyres with spoked rims; lamps and door seams."""
    roof, front, back = rng.uniform(-0.62, -0.42), rng.uniform(0.25, 0.55), rng.uniform(-0.8, -0.45)
    bonnet, floor = rng.uniform(-0.1, 0.05), 0.38
    body = smooth(
        [
            [-1.0, floor],
            [-1.0, -0.05],
            [back - 0.15, -0.1],
            [back + 0.12, roof],
            [front - 0.25, roof],
            [front + 0.1, -0.1],
            [0.92, bonnet],
            [1.0, 0.15],
            [1.0, floor],
        ]
    )
    pen.begin("car body")
    pen.part(body, palette.main, palette.line)
    pen.pattern(body, np.array([[[-1.1, 0.2], [1.1, 0.2], [1.1, 0.5], [-1.1, 0.5]]]), darker(palette.main, 0.35))
    cabin = np.array([[back + 0.02, -0.08], [back + 0.2, roof + 0.1], [front - 0.3, roof + 0.1], [front - 0.02, -0.08]])
    pen.begin("car window")
    pen.part(cabin, palette.dark, palette.line)
    glint = np.array([[[x, 0.0], [x + 0.3, -0.7], [x + 0.42, -0.7], [x + 0.12, 0.0]] for x in (back, back + 0.55)])
    pen.pattern(cabin, glint, palette.light, opacity=0.7)
    middle = 0.5 * (back + front) + rng.uniform(-0.1, 0.1)
    pen.begin("car body")
    pen.stroke([[middle, roof + 0.05], [middle, floor - 0.1]], palette.main, 0.1)
    pen.stroke(
        [[[middle, -0.1], [middle, floor - 0.05]], [[front, -0.05], [front - 0.05, floor - 0.05]]], palette.line, 0.03
    )
    pen.stroke([[middle - 0.22, 0.03], [middle - 0.08, 0.03]], palette.light, 0.05)
    pen.begin("car lamp")
    pen.fill(ellipse(0.93, 0.1, 0.07, 0.09), palette.light)
    pen.fill(ellipse(-0.96, 0.08, 0.05, 0.1), palette.third)
    radius, spokes = rng.uniform(0.23, 0.3), int(rng.integers(4, 9))
    pen.begin("car wheel")
    for x in (-0.55 + rng.uniform(-0.08, 0.05), 0.57 + rng.uniform(-0.05, 0.08)):
        y = floor
        pen.fill(ellipse(x, y, 1.18 * radius, 1.18 * radius), darker(palette.main, 0.75))
        pen.fill(ellipse(x, y, radius, radius), darker(palette.dark, 0.5))
        pen.fill(ellipse(x, y, 0.62 * radius, 0.62 * radius), palette.light)
        angle = rng.uniform(0, 6.3) + np.arange(spokes) * 2 * np.pi / spokes
        ends = np.stack([np.cos(angle), np.sin(angle)], -1) * 0.6 * radius + [x, y]
        pen.stroke(np.stack([np.broadcast_to([x, y], ends.shape), ends], 1), palette.dark, 0.045)
        pen.fill(ellipse(x, y, 0.16 * radius, 0.16 * radius), palette.dark)


def draw_sailboat(pen: Pen, rng: Rng, palette: Palette) -> None:
    """Planked hull, tall mast, two triangular sails with slanting seams, a pennant."""
    mast, deck = rng.uniform(-0.15, 0.15), rng.uniform(0.5, 0.62)
    pen.begin("sailboat mast")
    pen.stroke([[mast, -0.98], [mast, deck]], palette.dark, 0.06)
    pen.begin("sailboat pennant")
    pen.fill([[mast, -1.0], [mast - 0.28, -0.92], [mast, -0.84]], palette.third)
    belly, boom = rng.uniform(0.02, 0.16), rng.uniform(0.32, 0.44)
    main_sail = np.array([[mast - 0.05, -0.82], [mast - 0.35 - belly, -0.2], [-0.85, boom], [mast - 0.05, boom]])
    jib = np.array(
        [
            [mast + 0.06, -rng.uniform(0.55, 0.85)],
            [mast + 0.45 + belly, -0.05],
            [0.95, boom],
            [mast + 0.08, boom - 0.06],
        ]
    )
    slant, seam = rng.uniform(0.0, 0.5), rng.uniform(0.16, 0.26)
    striped = rng.random() < 0.8
    pen.begin("sailboat sail")
    for sail, sign, color in ((main_sail, 1, palette.main), (jib, -1, mix(palette.main, palette.light, 0.5))):
        pen.part(sail, color, palette.line)
        lines = drawing.wavy_lines(rng, (-1.1, -1.0, 1.1, 0.6), seam, angle=sign * slant)
        pen.pattern(sail, lines, palette.line, width=0.05)
        if striped:
            pen.pattern(sail, lines[::2], palette.dark, width=0.7 * seam)
    pen.begin("sailboat mast")
    pen.stroke([[mast, boom + 0.03], [-0.9, boom + 0.03]], palette.dark, 0.045)
    hull = smooth([[-0.95, deck], [1.05, deck - 0.06], [0.7, 0.98], [-0.72, 0.98]])
    pen.begin("sailboat hull")
    pen.part(hull, palette.second, palette.line)
    planks = drawing.wavy_lines(rng, (-1, deck, 1, 1), rng.uniform(0.08, 0.12))
    pen.pattern(hull, planks, darker(palette.second, 0.5), width=0.025)
    rim = np.array([[-0.9, deck], [0.95, deck - 0.04], [0.95, deck + 0.06], [-0.9, deck + 0.09]])
    pen.fill(rim, palette.light)


OBJECTS: dict[str, tuple[Callable[[Pen, Rng, Palette], None], float]] = {
    "bird": (draw_bird, 18.0),
    "butterfly": (draw_butterfly, 30.0),
    "car": (draw_car, 12.0),
    "cat": (draw_cat, 20.0),
    "fish": (draw_fish, 18.0),
    "flower": (draw_flower, 20.0),
    "house": (draw_house, 9.0),
    "mushroom": (draw_mushroom, 18.0),
    "sailboat": (draw_sailboat, 15.0),
    "tree": (draw_tree, 12.0),
}
