"""Write tests/golden/torch_files with real torch: python tests/peers/make_torch_files.py.

The files are small, one or more for each format of torch. expected.npz has their contents: arrays by name and path,
which do not depend on the format, and everything else as JSON with the key 'plain'.
"""

import argparse
import collections
import json
import pathlib
import sys

import jax
import numpy as np
import torch

DIRECTORY = pathlib.Path(__file__).parents[1] / "golden" / "torch_files"


class Tower(torch.nn.Module):
    """Two layers and a buffer, nested like the image encoder of CLIP."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 5, 2, bias=False)
        self.blocks = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7))
        self.class_embedding = torch.nn.Parameter(torch.randn(5))

    def forward(self, images):
        return self.blocks(self.conv1(images).mean((2, 3)) + self.class_embedding)


class Network(torch.nn.Module):
    """An image encoder, and attributes of the types that TorchScript stores beside tensors."""

    def __init__(self):
        super().__init__()
        self.visual = Tower()
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.5))
        self.register_buffer("input_resolution", torch.tensor(224))
        self.sizes = [3, 5]
        self.names = {"a": 1}
        self.title = "network"

    def forward(self, images):
        return self.visual(images) * self.logit_scale


def tensors() -> dict:
    """Return tensors of every dtype and memory layout that occurs in checkpoints."""
    base = torch.arange(42.0)
    dtypes = (torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.uint8)
    dtypes += (torch.int8, torch.int16, torch.int32, torch.int64)
    named = {str(dtype): (torch.randn(2, 3) * 5).abs().to(dtype) for dtype in dtypes}
    tagged = torch.nn.Parameter(torch.randn(3))
    tagged.decayed = False
    return named | {
        "bool": torch.tensor([[True, False, True]]),
        "scalar": torch.tensor(-0.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.view(6, 7).t(),
        "permuted": base.view(2, 3, 7).permute(2, 0, 1),
        "sliced": base[5:17].view(3, 4),
        "strided": base[1::4],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "tagged": tagged,
        "integers": torch.tensor([-(2**62), 2**62]),
    }


def checkpoint() -> dict:
    """Return a checkpoint like those of training scripts."""
    network = Tower()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    return {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(
            lr=1.5e-3,
            betas=(0.9, 0.99),
            output=pathlib.PosixPath("runs/first"),
            device=torch.device("cuda", 1),
            dtype=torch.float16,
            names=["a", "b"],
            resume=None,
            compile=False,
            seed=-(2**40),
        ),
        "scaler": {"scale": 65536.0, "_growth_tracker": 17},
        "accuracy": np.float64(0.25),
        "count": np.int64(-7),
        "flag": np.bool_(True),
        "shape": torch.Size([3, 5]),
        "milestones": collections.Counter({30: 1, 60: 2}),
        "seen": {11},
        "names": collections.OrderedDict([("kitten", 1), ("puppy", 2)]),
        "raw": b"\x00\xff",
    }


def plain(value: object) -> object:
    """Return `value` as `read_torch` should return it."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, argparse.Namespace):
        return plain(vars(value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, torch.device):
        return (value.type, value.index)
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, pathlib.PurePath):
        return value.parts
    if isinstance(value, list | tuple | set):
        items = [plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def leaves(tree: object) -> dict[str, object]:
    """Return {path: leaf}; None is a leaf."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)
    return {jax.tree_util.keystr(path): leaf for path, leaf in found}


def main() -> None:
    torch.manual_seed(0)
    DIRECTORY.mkdir(exist_ok=True)
    expected, scalars = {}, {}
    contents = {"tensors": tensors(), "checkpoint": checkpoint()}
    for name, content in contents.items():
        torch.save(content, DIRECTORY / f"{name}_zip.pth")
        torch.save(content, DIRECTORY / f"{name}_legacy.pth", _use_new_zipfile_serialization=False)
    network = Network().half()
    torch.jit.save(torch.jit.script(network), DIRECTORY / "script.pt")
    contents["script"] = dict(network.state_dict())
    for name, content in contents.items():
        found = leaves(plain(content))
        expected |= {f"{name}{path}": leaf for path, leaf in found.items() if isinstance(leaf, np.ndarray | np.generic)}
        scalars[name] = {
            path: repr(leaf) for path, leaf in found.items() if not isinstance(leaf, np.ndarray | np.generic)
        }
    np.savez_compressed(DIRECTORY / "expected.npz", plain=json.dumps(scalars), **expected)
    print(
        f"torch {torch.__version__}: {sum(file.stat().st_size for file in DIRECTORY.iterdir())} bytes", file=sys.stderr
    )


if __name__ == "__main__":
    main()
