"""Folders that tests refer to."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
HELPERS = TESTS / "helpers"
CONFIGS = ROOT / "configs"
GOLDEN = TESTS / "golden"
