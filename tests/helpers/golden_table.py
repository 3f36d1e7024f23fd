"""The parity table: what the golden checks compared, and how close it came."""

import platform
from importlib.metadata import version

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy")
UNITS = {"relative": "", "absolute": " absolute", "z": " standard deviations", "unequal": " unequal"}


def render(comparisons):
    """Return the page as Markdown; `comparisons` are the lists of `Comparison` by file."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    lines = [
        "# Parity with the released code",
        "",
        "For everyone who compares this code with the released PyTorch code. The table is made by",
        "",
        "    python -m pytest tests/golden_test.py --golden-dir=DIR --parity-table=docs/parity.md",
        "",
        f"on a CPU ({platform.machine()}) in float32, Python {platform.python_version()}, {versions}.",
        "",
        "Each row is one kind of numbers in one file of `DIR` (`tests/golden/README.md` says what the files hold and",
        "which of them the test suite carries): how many arrays, the largest error among them with the array it occurs",
        "in, and what is allowed. Errors are relative to the largest magnitude of the array unless marked; `absolute`",
        "is for parameters after optimizer steps, `standard deviations` for statistics of random masks, measured in",
        "their sampling noise, and `unequal` counts integers that differ. A tolerance is 20 times the file's own",
        "distance between float32 and float64, at least 1e-5 and at most 2e-5 (the largest of a row is shown): the",
        "tanh form of GELU moves outputs by 7e-5 or more. Every result in every file is compared; buffers that the",
        "released code carries along and never reads are only shown to stay as they were.",
        "",
        "| file | quantity | arrays | largest error | in | tolerance |",
        "|---|---|---:|---:|---|---:|",
    ]
    for file, found in comparisons.items():
        for (quantity, unit), group in _grouped(found).items():
            worst = max(group, key=lambda comparison: comparison.error)
            where = "-" if unit == "unequal" else f"`{worst.name}`"
            tolerance = max(comparison.tolerance for comparison in group)
            cells = (file, quantity, len(group), _number(worst.error, unit), where, _number(tolerance, unit))
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _grouped(comparisons):
    groups = {}
    for comparison in comparisons:
        groups.setdefault((comparison.quantity, comparison.unit), []).append(comparison)
    return groups


def _number(value, unit):
    shown = f"{value:.1f}" if unit == "z" else f"{value:.1e}" if value else "0"
    return f"{shown}{UNITS[unit]}"
