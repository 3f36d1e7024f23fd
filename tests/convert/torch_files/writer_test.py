"""Writing PyTorch files without PyTorch; peers/beit_test.py reads them with real torch."""

import zipfile

import numpy as np
import pytest

from beitv2_jax.convert.torch_files.reader import read_torch
from beitv2_jax.convert.torch_files.writer import save
from beitv2_jax.errors import UserError

TYPES = ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")


def test_every_dtype_and_shape_round_trips_exactly(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 2, (3, 5, 7)).astype(name) for name in TYPES}
    arrays |= {"scalar": np.float32(2.5), "empty": np.zeros((0, 3), np.float32), "größe.λ": np.arange(11)}
    arrays["transposed"] = np.arange(6, dtype=np.float32).reshape(2, 3).T
    arrays["big endian"] = np.arange(5, dtype=">f4")
    save(tmp_path / "weights.pth", {"model": arrays, "module": {}})
    with zipfile.ZipFile(tmp_path / "weights.pth") as archive:
        assert archive.namelist()[0] == "archive/data.pkl" and archive.testzip() is None
    back = read_torch(tmp_path / "weights.pth")
    assert back["module"] == {} and back["model"].keys() == arrays.keys()
    for name, array in arrays.items():
        assert back["model"][name].dtype == np.asarray(array).dtype.newbyteorder("="), name
        np.testing.assert_array_equal(back["model"][name], array, err_msg=name)
        assert back["model"][name].shape == np.shape(array), name


def test_dtypes_that_torch_lacks_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot hold arrays of dtype complex64"):
        save(tmp_path / "weights.pth", {"model": {"x": np.zeros(3, np.complex64)}})
    assert not list(tmp_path.iterdir())
