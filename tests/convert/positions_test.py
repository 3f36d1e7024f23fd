"""Position tables and embeddings on another grid: results of the released loader and calculations by hand."""

import json

import numpy as np
import pytest

from beitv2_jax.convert.positions import resize_position_embedding, resize_relative_table
from beitv2_jax.errors import UserError

TABLE = "relative_position_bias_table"
TOLERANCE = 1e-6


@pytest.fixture
def loader(golden_dir):
    """Return the arrays of what the released fine-tuning loader does."""
    with np.load(golden_dir / "relpos_interp.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def table_of(values):
    """Return a table with the heads `values` 'rows columns nh' and recognisable [CLS] rows."""
    heads = values.shape[-1]
    return np.concatenate([values.reshape(-1, heads), np.arange(3.0 * heads).reshape(3, heads)])


def coordinates(count, ratio):
    """Return the offsets 0, ±1, ±(1 + q), ... of `count` steps to either side."""
    steps = [sum(ratio**power for power in range(step)) for step in range(1, count + 1)]
    return np.array([-step for step in reversed(steps)] + [0.0] + steps)


def test_tables_and_embeddings_equal_those_of_the_released_loader(loader):
    cases = json.loads(str(loader["config"]))["cases"]
    compared = 0
    for name, expected in loader.items():
        kind, _, rest = name.partition("/")
        case, _, entry = rest.partition("/")
        if kind != "out" or entry.endswith("index"):
            continue
        grid = (cases[case]["dst"],) * 2
        if entry == "pos_embed":
            found = resize_position_embedding(loader[f"in/{case}/pos_embed"], grid)
        else:
            source = f"rel_pos_bias.{TABLE}" if cases[case]["shared"] else entry
            found = resize_relative_table(loader[f"in/{case}/{source}"], grid)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max(), err_msg=name)
        compared += 1
    assert compared == 13


def test_the_published_gaussian():
    rows, columns = np.indices((27, 27)) - 13
    table = table_of(np.exp(-(rows**2 + 0.5 * columns**2) / 50)[:, :, None])
    resized = resize_relative_table(table, (24, 24))
    np.testing.assert_array_equal(resized[-3:], table[-3:])
    grid = resized[:-3].reshape(47, 47)
    expected = {(0, 0): 0.00628242, (0, 23): 0.03404745, (23, 0): 0.18451952, (23, 23): 1.0}
    expected |= {(10, 17): 0.15501147, (40, 30): 0.07161328}
    for place, value in expected.items():
        assert grid[place] == pytest.approx(value, abs=6e-9)
    assert grid.sum() == pytest.approx(439.587132, abs=6e-7)


@pytest.mark.parametrize(
    "side, ratio",
    [(12, 1.0100009), (16, 1.0234928), (24, 1.0903074), (28, 1.1144276), (32, 1.1349178), (40, 1.1685036)],
)
def test_a_plane_is_evaluated_at_the_integers(side, ratio):
    # a spline reproduces the plane 2 x + 3 y, so the result shows the coordinates of the entries
    known = coordinates(13, ratio)
    plane = np.stack([2 * known[:, None] + 3 * known, np.zeros((27, 27))], axis=-1)
    resized = resize_relative_table(table_of(plane), (side, side))[:-3].reshape(2 * side - 1, 2 * side - 1, 2)
    wanted = np.clip(np.arange(2 * side - 1) - (side - 1), known[0], known[-1])
    # the ratios are published to seven digits; the error of the outermost coordinate is up to 500 times larger
    np.testing.assert_allclose(resized[:, :, 0], 2 * wanted[:, None] + 3 * wanted, atol=5e-4)
    assert not resized[:, :, 1].any()


def test_beyond_the_outermost_offset_the_border_is_repeated():
    # at the largest ratio, 1.5, the three steps of a 4 x 4 grid reach 1 + 1.5 + 2.25 = 4.75
    rng = np.random.default_rng(0)
    table = table_of(rng.normal(size=(7, 7, 2)))
    grid = resize_relative_table(table, (9, 9))[:-3].reshape(17, 17, 2)
    for outer in range(3):
        np.testing.assert_array_equal(grid[outer], grid[3])
        np.testing.assert_array_equal(grid[:, -1 - outer], grid[:, -4])
    corners = grid[[0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_allclose(corners, table[:-3].reshape(7, 7, 2)[[0, 0, -1, -1], [0, -1, 0, -1]], atol=1e-12)


@pytest.mark.parametrize("resize, length", [(resize_relative_table, (2 * 5 - 1) ** 2 + 3), (None, 26)])
def test_the_same_grid_returns_the_input(resize, length):
    array = np.random.default_rng(0).normal(size=(length, 3)).astype(np.float32)
    if resize is None:
        assert resize_position_embedding(array[None], (5, 5), method="offset").tobytes() == array.tobytes()
    else:
        assert resize(array, (5, 5)).tobytes() == array.tobytes()


def test_a_doubled_embedding_equals_a_calculation_by_hand():
    # 2 -> 4 is evaluated at -1/4, 1/4, 3/4, 5/4; the cubic (a = -3/4) at distances 1/4, 3/4, 5/4, 7/4 from a patch
    quarter, three, five, seven = 0.87890625, 0.26171875, -0.10546875, -0.03515625
    weights = np.array([[seven + three + quarter, five], [five + quarter, three + seven]])  # edges repeated
    weights = np.concatenate([weights, weights[::-1, ::-1]])
    square = np.random.default_rng(0).normal(size=(2, 2, 3))
    prefix = np.full((1, 2, 3), 7.0)
    embedding = np.concatenate([prefix, square.reshape(1, 4, 3)], axis=1)
    resized = resize_position_embedding(embedding, (4, 4), num_prefix=2)
    np.testing.assert_array_equal(resized[:, :2], prefix)
    expected = np.einsum("ih,jw,hwd->ijd", weights, weights, square)
    np.testing.assert_allclose(resized[0, 2:].reshape(4, 4, 3), expected, atol=1e-12)


def test_rows_and_columns_are_not_swapped():
    rows = np.repeat(np.arange(5.0), 5)
    embedding = np.stack([rows, rows.reshape(5, 5).T.ravel()], axis=-1)[None]
    resized = resize_position_embedding(embedding, (3, 7), num_prefix=0).reshape(3, 7, 2)
    np.testing.assert_allclose(resized[:, :, 0], resized[:, :1, 0] + np.zeros((3, 7)), atol=1e-12)
    np.testing.assert_allclose(resized[:, :, 1], resized[:1, :, 1] + np.zeros((3, 7)), atol=1e-12)
    assert (np.diff(resized[:, 0, 0]) > 1).all() and (np.diff(resized[0, :, 1]) > 0).all()


def cubic(distance):
    """Return the weight of a patch at `distance`, for a = -3/4."""
    if distance <= 1:
        return 1.25 * distance**3 - 2.25 * distance**2 + 1
    return -0.75 * distance**3 + 3.75 * distance**2 - 6 * distance + 3 if distance < 2 else 0.0


@pytest.mark.parametrize("method, offset", [("bicubic", 0.0), ("offset", 0.1)])
@pytest.mark.parametrize("size", [3, 7, 11])
def test_each_position_is_a_weighted_sum_of_four_neighbours(size, method, offset):
    signal = np.random.default_rng(0).normal(size=5)
    embedding = np.repeat(signal, 5).reshape(1, 25, 1)
    resized = resize_position_embedding(embedding, (size, 5 + size), num_prefix=0, method=method)
    for index, value in enumerate(resized.reshape(size, 5 + size)[:, 0]):
        position = (index + 0.5) * 5 / (size + offset) - 0.5
        near = range(int(np.floor(position)) - 1, int(np.floor(position)) + 3)
        expected = sum(cubic(abs(position - patch)) * signal[min(max(patch, 0), 4)] for patch in near)
        # the positions are float32
        assert value == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("rows", [0, 2, 3, 7, 84 + 1, 4**2 + 3, 8**2 + 3])
def test_a_table_without_a_square_grid_is_refused(rows):
    with pytest.raises(UserError, match=rf"\({rows}, 2\)"):
        resize_relative_table(np.zeros((rows, 2)), (5, 5))


def test_grids_that_the_method_does_not_cover_are_refused():
    with pytest.raises(UserError, match="5 x 6"):
        resize_relative_table(np.zeros((84, 2)), (5, 6))
    with pytest.raises(UserError, match="too small"):
        resize_relative_table(np.zeros((12, 2)), (5, 5))
    assert resize_relative_table(np.zeros((84, 2)), (1, 1)).shape == (4, 2)


@pytest.mark.parametrize("shape, prefix", [((1, 26, 3), 0), ((1, 26, 3), 2), ((1, 1, 3), 1), ((26, 3), 1)])
def test_an_embedding_without_a_square_grid_is_refused(shape, prefix):
    with pytest.raises(UserError, match="square"):
        resize_position_embedding(np.zeros(shape), (4, 4), num_prefix=prefix)
