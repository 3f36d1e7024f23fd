"""Parity with the released code on stored numbers (golden/README.md): one test a file, every array compared.

The suite compares the files chosen for `tests/golden`; `--golden-dir=DIR` compares the whole set, and with
`--parity-table=FILE` also writes down how close every quantity came.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from golden_files import Golden
from golden_masks import check_masks
from golden_models import check_classifier, check_mim
from golden_positions import check_relpos_interp
from golden_schedules import check_schedules
from golden_table import render
from golden_teachers import check_clip_teacher, check_dino_teacher
from golden_training import check_train10, check_train10_finetune, check_train10_vqkd
from golden_upernet import check_upernet
from golden_vqkd import check_quantizer, check_vqkd
from paths import GOLDEN

CHECKS = {
    "vqkd": check_vqkd,
    "quantizer": check_quantizer,
    "mim_cls": check_mim,
    "mim_cls_unshared": check_mim,
    "mim_v1": check_mim,
    "mim_v1_abs": check_mim,
    "finetune": check_classifier,
    "finetune_abs": check_classifier,
    "relpos_interp": check_relpos_interp,
    "clip_teacher": check_clip_teacher,
    "dino_teacher": check_dino_teacher,
    "schedules": check_schedules,
    "masks": check_masks,
    "train10": check_train10,
    "train10_vqkd": check_train10_vqkd,
    "train10_finetune": check_train10_finetune,
    "upernet": check_upernet,
}
CHOSEN = (
    "quantizer",
    "mim_cls_unshared",
    "finetune",
    "relpos_interp",
    "clip_teacher",
    "dino_teacher",
    "schedules",
    "masks",
    "train10",
    "train10_vqkd",
    "upernet",
)
MEGABYTES = 12


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--golden-dir") is not None
        metafunc.parametrize("name", CHECKS if whole else CHOSEN)


@pytest.fixture(scope="module")
def comparisons(request):
    """Return what the checks note, by file; `--parity-table` shows it unless one of them failed or did not run."""
    noted = {}
    yield noted
    table = request.config.getoption("--parity-table")
    if table:
        assert noted.keys() == CHECKS.keys(), "the table is made of the whole set: give --golden-dir, without -k"
        assert not request.session.testsfailed, "no table is made of a comparison that failed"
        Path(table).write_text(render(noted))


def test_golden(name, golden_dir, comparisons):
    golden = Golden(golden_dir, name)
    comparisons[name] = golden.comparisons
    CHECKS[name](golden)
    golden.check_nothing_left()


def test_another_set_is_compared_by_its_own_sizes(tmp_path):
    """Parameter groups of the stored file with the classes and the decay of another, and a warm-up in steps."""
    with np.load(GOLDEN / "schedules.npz") as stored:
        released = json.loads(str(stored["out/groups/finetune_base"]))
        settings = json.loads(str(stored["config"]))["groups"]["finetune_base"]
    settings["model_args"]["num_classes"], settings["weight_decay"] = 7, 0.03
    released["shapes"] |= {"head.weight": [7, 768], "head.bias": [7]}
    for entry in released["params"].values():
        entry["weight_decay"] *= 0.03 / 0.05
    warmup = {"warmup_epochs": 1, "warmup_steps": 3, "start_warmup_value": 0}
    schedules = {"steps": {"base_value": 0.2, "final_value": 0.1, "epochs": 2, "niter_per_ep": 4} | warmup}
    decline = [0.15 + 0.05 * math.cos(math.pi * step / 5) for step in range(5)]
    arrays = {"out/schedule/steps": np.array([0.0, 0.1, 0.2, *decline])}
    arrays["out/groups/finetune_base"] = json.dumps(released)
    config = {"schedules": schedules, "groups": {"finetune_base": settings}}
    np.savez(tmp_path / "schedules.npz", config=json.dumps(config), **arrays)
    golden = Golden(tmp_path, "schedules")
    check_schedules(golden)
    golden.check_nothing_left()


def test_the_chosen_files_are_here_and_small():
    files = {path.stem: path.stat().st_size for path in GOLDEN.glob("*.npz")}
    assert set(CHOSEN) <= files.keys()
    assert not set(CHECKS).difference(CHOSEN) & files.keys(), "a file that the suite does not compare"
    assert sum(size for name, size in files.items() if name in CHOSEN) <= MEGABYTES * 1e6
