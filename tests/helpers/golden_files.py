"""One file of golden numbers: its arrays, the comparison with what we compute, and the record for the parity table.

A comparison ticks its array off; `check_nothing_left` fails for a stored result that no check asked for.
"""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np

# what float32 may cost: 20 times the fixture's own distance from float64, within these bounds. Above the upper one the
# tanh form of GELU (7e-5 or more) and most wrong epsilons would pass
FACTOR, LOWEST, HIGHEST = 20.0, 1e-5, 2e-5
# of a parameter after some steps, absolute: Adam divides by the size of the gradient, so rounding does not scale
PARAMETER_TOLERANCE = 1e-5
QUANTITIES = {
    r"^g\d+/": "statistics of the stored masks",
    r"^schedule/": "schedules",
    r"^final/": "parameters after ten steps",
    r"^after\d/": "parameters after one to three steps",
    r"^per_step/": "metrics of ten steps",
    r"(^|/)grad(/|_)": "gradients",
    r"^hidden/": "tokens after each block",
    r"/after\d/": "moving statistics after one and three steps",
    r"loss|acc(_|$)|total": "losses and accuracies",
    r"": "outputs",
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`error` of array `name` in `unit`: relative to the array's largest magnitude, absolute, equal, or z scores."""

    file: str
    quantity: str
    name: str
    error: float
    tolerance: float
    unit: str


class Golden:
    """The arrays of a fixture by name, `config` as a dict, `state` the official state dict."""

    def __init__(self, directory, name):
        self.name = name
        with np.load(directory / f"{name}.npz", allow_pickle=False) as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}
        self.config = json.loads(str(self.arrays.pop("config")))
        self.state = self.section("sd/")
        self.comparisons: list[Comparison] = []

    @property
    def images(self):
        return channels_last(self.arrays["in/image"])

    def section(self, prefix):
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}

    def check(self, name, value, tolerance=None):
        """Compare with out/`name`: integers exactly, other arrays relative to their largest magnitude."""
        expected = self._take(name, value)
        if expected.dtype.kind in "biu":
            self.note(name, int(np.sum(np.asarray(value) != expected)), 0, "unequal")
            return
        scale = max(np.abs(expected).max(), np.finfo(np.float32).tiny)
        self.note(name, _distance(value, expected) / scale, tolerance or self._tolerance(name), "relative")

    def check_absolute(self, name, value, tolerance=PARAMETER_TOLERANCE):
        self.note(name, _distance(value, self._take(name, value)), tolerance, "absolute")

    def check_gradients(self, official, prefix="grad/"):
        """Compare every stored gradient with `official` (names and layouts of the state dict), and none may miss."""
        expected = {key.removeprefix(prefix) for key in self.section("out/") if key.startswith(prefix)}
        assert {key for key in official if not key.endswith("relative_position_index")} == expected
        for key in sorted(expected):
            self.check(f"{prefix}{key}", official[key])

    def check_unmoved(self, name, start):
        """Tick off an array that the released code carries along and never reads or moves."""
        np.testing.assert_array_equal(self.arrays.pop(f"out/{name}"), start, err_msg=name)

    def take(self, name):
        """Return out/`name`, ticked off: a statistic that a check combines with others."""
        return self.arrays.pop(f"out/{name}")

    def note(self, name, error, tolerance, unit, quantity=None):
        """Record the comparison of `name` and fail beyond the tolerance."""
        quantity = quantity or ("integers" if unit == "unequal" else _quantity(name))
        self.comparisons.append(Comparison(self.name, quantity, name, error, tolerance, unit))
        assert error <= tolerance, f"{name}: {error:.1e} {unit}, allowed {tolerance:.1e}"

    def check_nothing_left(self):
        assert not self.section("out/"), "stored numbers that no check used"

    def _take(self, name, value):
        expected = self.arrays.pop(f"out/{name}")
        assert expected.shape == np.shape(value), f"{name}: {np.shape(value)} instead of {expected.shape}"
        return expected

    def _tolerance(self, name):
        return float(np.clip(FACTOR * self._own_error(name), LOWEST, HIGHEST))

    def _own_error(self, name):
        """Return the stored result's distance from float64, relative to its largest magnitude."""
        metrics = self.config.get("f32_vs_f64", {})
        if name in metrics:
            return metrics[name]["max_abs_diff"] / max(metrics[name]["max_abs"], np.finfo(np.float32).tiny)
        groups = [key for key in metrics if key.endswith("*") and name.startswith(key[:-1])]
        return metrics[groups[0]]["worst_relative"] if groups else 0.0


def channels_last(images):
    """Return (..., channel, height, width) as float32 (..., height, width, channel)."""
    return jnp.asarray(np.moveaxis(images, -3, -1), jnp.float32)


def _distance(value, expected):
    return float(np.abs(np.asarray(value, np.float64) - expected).max())


def _quantity(name):
    return next(quantity for pattern, quantity in QUANTITIES.items() if re.search(pattern, name))
