"""Compare our reader with torch.load on files of random tensors: every format, dtype and memory layout."""

import numpy as np
import pytest
import torch
from make_torch_files import Network, checkpoint, leaves, plain, tensors

from beitv2_jax.convert.torch_files.reader import read_torch

CONTAINERS = {
    "zip": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "protocol 4": {"pickle_protocol": 4},
    "legacy, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}
DTYPES = (torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int8)
DTYPES += (torch.int16, torch.int32, torch.int64, torch.bool)


def random_tensor(rng):
    """Return a tensor with a random dtype and a random view of its storage."""
    shape = tuple(int(size) for size in rng.integers(0, 6, rng.integers(0, 5)))
    tensor = (torch.randn(shape) * 100).to(DTYPES[rng.integers(len(DTYPES))])
    for _ in range(rng.integers(0, 4)):
        if tensor.ndim:
            tensor = random_view(tensor, int(rng.integers(tensor.ndim)), rng.integers(6))
    return tensor


def random_view(tensor, axis, kind):
    """Return one of six kinds of view along `axis`."""
    size = tensor.shape[axis]
    if kind == 0:
        return tensor.transpose(axis, 0)
    if kind == 1:
        return tensor.narrow(axis, size // 2, size - size // 2)
    if kind == 2:
        return tensor[..., ::2]
    if kind == 3:
        return tensor.unsqueeze(axis).expand(*tensor.shape[:axis], 3, *tensor.shape[axis:])
    if kind == 4:
        return tensor.unfold(axis, min(2, size), 1)
    return tensor.select(axis, size - 1) if size else tensor


def compare(path):
    """Check that our reader and torch.load return equal values."""
    found, expected = leaves(read_torch(str(path))), leaves(plain(torch.load(path, weights_only=False)))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            # bfloat16 tensors of torch are compared as float32, because NumPy has no bfloat16
            np.testing.assert_array_equal(found[name].astype(value.dtype), value, name, strict=True)
            assert found[name].dtype.itemsize == value.dtype.itemsize or found[name].dtype.name == "bfloat16"
        else:
            assert (type(found[name]), found[name]) == (type(value), value), name


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("seed", range(25))
def test_random_tensors(tmp_path, container, seed):
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    content = {f"tensor {index}": random_tensor(rng) for index in range(40)}
    base = torch.randn(7, 11)
    content |= {"base": base, "part": base[2:5, ::3], "list": [base.t(), (base[0], torch.nn.Parameter(base[1]))]}
    torch.save(content, tmp_path / "weights.pth", **CONTAINERS[container])
    compare(tmp_path / "weights.pth")


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("make", [tensors, checkpoint])
def test_the_stored_files_are_those_that_torch_writes_now(tmp_path, container, make):
    torch.save(make(), tmp_path / "weights.pth", **CONTAINERS[container])
    compare(tmp_path / "weights.pth")


def test_torchscript(tmp_path):
    for seed, dtype in enumerate((torch.float16, torch.float32, torch.bfloat16)):
        torch.manual_seed(seed)
        network = Network().to(dtype)
        torch.jit.save(torch.jit.script(network), tmp_path / "scripted.pt")
        traced = torch.jit.trace(network.float(), torch.randn(2, 3, 4, 4), check_trace=False).to(dtype)
        torch.jit.save(traced, tmp_path / "traced.pt")
        for name in ("scripted.pt", "traced.pt"):
            found = read_torch(str(tmp_path / name))
            expected = plain(dict(torch.jit.load(tmp_path / name).state_dict()))
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                np.testing.assert_array_equal(found[key].astype(value.dtype), value, key, strict=True)
