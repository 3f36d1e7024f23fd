"""Reading state dicts from files of every format: wrappers, dtypes, Hugging Face folders, and refused files."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_files import SIX, call, glob, mapping, number, program, storage, tensor, text, zip_file

from beitv2_jax.convert import files
from beitv2_jax.convert.files import read_config
from beitv2_jax.errors import UserError

WEIGHTS = {"a.weight": np.arange(6.0).reshape(2, 3), "b": np.array([0.5, -2.0]), "steps": np.array(2**40)}


def read_weights(path):
    return files.read_weights(path).arrays


def save(path, state):
    """Write `state` to a .npz or .safetensors file."""
    if path.suffix == ".npz":
        np.savez(path, **state)
    else:
        save_file(state, path)


def same(found, expected):
    """Check names, shapes and numbers, and that the arrays are writable."""
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.flags.writeable
        np.testing.assert_array_equal(array, np.asarray(expected[name], array.dtype), name, strict=True)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floating_point_becomes_float32_and_integers_stay(tmp_path, suffix, dtype):
    state = {"a": np.arange(6).reshape(2, 3).astype(dtype), "i": np.array([2**40, -1]), "t": np.array([True, False])}
    save(tmp_path / f"weights{suffix}", state)
    found = read_weights(str(tmp_path / f"weights{suffix}"))
    same(found, state)
    assert [found[name].dtype for name in "ait"] == [np.float32, np.int64, np.bool_]


def test_bfloat16_of_every_container_becomes_float32(tmp_path):
    numbers = np.array([1.0, -2.5, 3e38]).astype(ml_dtypes.bfloat16)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + numbers.tobytes())
    body = mapping({"w": tensor(storage("BFloat16Storage", length=3), shape=(3,), strides=(1,))})
    (tmp_path / "w.pth").write_bytes(zip_file(body, {"0": numbers.tobytes()}))
    for suffix in ("safetensors", "pth"):
        found = read_weights(str(tmp_path / f"w.{suffix}"))["w"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, numbers.astype(np.float32))


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".pt", ".bin", ".ckpt"])
def test_torch_files_are_read_and_copied(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(
        zip_file(
            mapping({"w": tensor(), "v": tensor(storage("LongStorage", "1", 2), shape=(2,), strides=(1,))}),
            {"0": SIX, "1": np.array([7, -7]).tobytes()},
        )
    )
    found = read_weights(str(path))
    assert all(array.flags.writeable for array in found.values())
    path.write_bytes(b"")
    same(found, {"w": np.arange(6).reshape(2, 3), "v": np.array([7, -7])})
    assert [found[name].dtype for name in "wv"] == [np.float32, np.int64]


@pytest.mark.parametrize(
    "keys, taken",
    [
        ("model", "model"),
        ("module", "module"),
        ("state_dict", "state_dict"),
        ("state_dict module model", "model"),
        ("state_dict module", "module"),
    ],
)
def test_wrappers_are_opened_in_order(tmp_path, keys, taken):
    inner = {key: mapping({key: tensor()}) for key in keys.split()}
    rest = {"epoch": number(3), "optimizer": mapping({"state": mapping({})}), "meta": text("x")}
    (tmp_path / "w.pth").write_bytes(zip_file(mapping({**rest, **inner})))
    assert list(read_weights(str(tmp_path / "w.pth"))) == [taken]


def test_a_tensor_called_model_is_not_unwrapped(tmp_path):
    (tmp_path / "w.pth").write_bytes(zip_file(mapping({"model": tensor(), "module.x": tensor()})))
    assert read_weights(str(tmp_path / "w.pth")).keys() == {"model", "module.x"}


def test_the_prefix_of_parallel_training_is_removed_if_all_names_have_it(tmp_path):
    save(tmp_path / "w.npz", {"module.a": np.ones(2), "module.module.b": np.ones(3)})
    assert read_weights(str(tmp_path / "w.npz")).keys() == {"a", "module.b"}
    (tmp_path / "w.pth").write_bytes(zip_file(mapping({"model": mapping({"module.a": tensor()})})))
    assert read_weights(str(tmp_path / "w.pth")).keys() == {"a"}


@pytest.mark.parametrize(
    "body, found",
    [
        (mapping({"w": tensor(), "epoch": number(3)}), "'epoch'"),
        (mapping({"model": mapping({"w": tensor(), "names": b"]"})}), "'names'"),
        (mapping({"learner": mapping({"w": tensor()})}), "'learner'"),
        (b"}" + number(3) + tensor() + b"s", "3, which is not a tensor"),
        (b"]" + tensor() + b"a", "a list"),
        (tensor(), "a ndarray"),
        (b"N", "a NoneType"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, body, found):
    (tmp_path / "w.pth").write_bytes(zip_file(body))
    with pytest.raises(UserError, match=found) as caught:
        read_weights(str(tmp_path / "w.pth"))
    assert "w.pth" in caught.value.happened


def test_pickles_never_run(tmp_path):
    marker = tmp_path / "marker"
    hostile = call(glob("os", "system"), text(f"touch {marker}"))
    for suffix in (".pth", ".pt", ".bin", ".ckpt", ".npz", ".safetensors"):
        for content in (zip_file(mapping({"w": hostile})), program(hostile)):
            (tmp_path / f"w{suffix}").write_bytes(content)
            with pytest.raises(UserError, match=rf"w\{suffix}"):
                read_weights(str(tmp_path / f"w{suffix}"))
    np.savez(tmp_path / "object.npz", w=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match=r"object\.npz"):
        read_weights(str(tmp_path / "object.npz"))
    assert not marker.exists()


def test_missing_and_unknown_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no weights file"):
        read_weights(str(tmp_path / "absent.npz"))
    with pytest.raises(UserError, match="no weights file"):
        read_weights(str(tmp_path))
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.onnx"):
        read_weights(str(tmp_path / "model.onnx"))
    np.savez(tmp_path / "text.npz", config=np.array("{}"), w=np.ones(2))
    with pytest.raises(UserError, match="'config'"):
        read_weights(str(tmp_path / "text.npz"))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_damaged_file_is_named(tmp_path, suffix):
    save(tmp_path / f"whole{suffix}", WEIGHTS)
    content = (tmp_path / f"whole{suffix}").read_bytes()
    for length in range(0, len(content) - 1, 7):
        (tmp_path / f"cut{suffix}").write_bytes(content[:length])
        with pytest.raises(UserError, match="cut"):
            read_weights(str(tmp_path / f"cut{suffix}"))


# --- Hugging Face folders


def test_a_folder_with_one_file(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(zip_file(mapping({"w": tensor()})))
    same(read_weights(str(tmp_path)), {"w": np.arange(6).reshape(2, 3)})
    # if both exist, safetensors is read
    save(tmp_path / "model.safetensors", WEIGHTS)
    same(read_weights(str(tmp_path)), WEIGHTS)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_folder_of_shards(tmp_path, kind):
    if kind == "bin":
        shards = ["pytorch_model-1.bin", "pytorch_model-2.bin"]
        (tmp_path / shards[0]).write_bytes(zip_file(mapping({"a": tensor(), "spare": tensor()})))
        (tmp_path / shards[1]).write_bytes(zip_file(mapping({"b": tensor(shape=(6,), strides=(1,))})))
    else:
        shards = ["model-1.safetensors", "model-2.safetensors"]
        save(tmp_path / shards[0], {"a": np.arange(6.0).reshape(2, 3), "spare": np.ones(1)})
        save(tmp_path / shards[1], {"b": np.arange(6.0)})
    index = {"metadata": {"total_size": 48}, "weight_map": {"a": shards[0], "b": shards[1]}}
    name = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (tmp_path / name).write_text(json.dumps(index))
    same(read_weights(str(tmp_path)), {"a": np.arange(6).reshape(2, 3), "b": np.arange(6)})


@pytest.mark.parametrize(
    "place", ["../w.safetensors", "deeper/w.safetensors", "absent.safetensors", "/etc/passwd", "..", ""]
)
def test_an_index_that_reaches_outside_its_folder_is_refused(tmp_path, place):
    (tmp_path / "model" / "deeper").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "model" / "deeper"):
        save(folder / "w.safetensors", WEIGHTS)
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": place}}))
    with pytest.raises(UserError, match="which is not in the same folder") as caught:
        read_weights(str(tmp_path / "model"))
    assert repr(place) in caught.value.happened


@pytest.mark.parametrize(
    "content, named",
    [
        ("{", "index"),
        ("[]", "JSON object"),
        ("[" * 100_000, "index"),
        ('{"weight_map": ["w.safetensors"]}', "weight_map"),
        ('{"weight_map": {"b": 3}}', "weight_map"),
        ('{"weight_map": {"c": "w.safetensors"}}', "'c'"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, content, named):
    save(tmp_path / "w.safetensors", WEIGHTS)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=named):
        read_weights(str(tmp_path))


def test_the_config_lies_in_the_folder_or_beside_the_file(tmp_path):
    save(tmp_path / "model.safetensors", WEIGHTS)
    assert read_config(str(tmp_path)) is None
    assert read_config(str(tmp_path / "model.safetensors")) is None
    (tmp_path / "config.json").write_text('{"hidden_size": 768}')
    assert read_config(str(tmp_path)) == {"hidden_size": 768}
    assert read_config(str(tmp_path / "model.safetensors")) == {"hidden_size": 768}
    for content in (b"{", b"\xff", b"3"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"config\.json"):
            read_config(str(tmp_path))
