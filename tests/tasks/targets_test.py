"""Stored targets in an evaluation: what was unreadable when they were made, or is damaged now, does not count."""

import numpy as np
from target_caches import CODE_MANIFEST, fill

from beitv2_jax.tasks.targets import stored_views


def test_targets_that_cannot_be_read_leave_their_example_out(tmp_path):
    def ids(example_id, view):
        return np.full(21, example_id % 13)

    corrupt = {"split": "train", "example_id": 3, "where": "3.jpg", "cause": "empty"}
    reader = fill(tmp_path / "views", CODE_MANIFEST, ids, unreadable=[corrupt])
    # example 9 is record 2 of the second of the shards of 7
    (path,) = (tmp_path / "views").glob("*train_v0*00001-of-*")
    path.unlink()
    batch = {
        "example_ids": np.array([2, 3, 9, 4, 4]),
        "weight": np.array([1, 1, 1, 0, 0], np.float32),
        "faults": np.array(["", "", "", "4.jpg: empty", ""]),
    }
    found = batch | stored_views(reader)(batch)
    assert found["weight"].tolist() == [1, 0, 0, 0, 0]
    assert found["faults"][0] == "" and found["faults"][3:].tolist() == ["4.jpg: empty", ""]
    assert found["faults"][1] == "example 3: unreadable when the stored targets were made"
    assert f"damaged, {path}, record 2: " in found["faults"][2]
    np.testing.assert_array_equal(found["code_ids"][0], ids(2, 0))
    assert found["code_ids"].shape == (5, 21)
