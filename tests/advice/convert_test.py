"""Every error about weights: provoked, its advice followed, and then it is gone."""

import dataclasses
import json
import shutil
import sys
import types

import numpy as np
import pytest
import teacher_cases
import torch_files
from convert_states import arguments_of, drawn_state, drawn_weights
from paths import GOLDEN
from safetensors.numpy import load_file, save_file
from user_errors import check_all_provoked, flag, provoked

from beitv2_jax.convert import files, functions, hub, wrappers
from beitv2_jax.convert.adapt import adapt_weights
from beitv2_jax.convert.beit import huggingface
from beitv2_jax.convert.input_statistics import normalization_of
from beitv2_jax.convert.positions import resize_position_embedding, resize_relative_table
from beitv2_jax.convert.runs import check_stage, read_run
from beitv2_jax.convert.teachers.load import load_teacher
from beitv2_jax.convert.teachers.weights import classifier_from_state, from_state
from beitv2_jax.convert.torch_files import writer
from beitv2_jax.convert.weights import Weights, read, read_backbone
from beitv2_jax.convert.writing import write

CASES = teacher_cases.read(GOLDEN / "teachers.npz")


def stored(directory, state, name="w.npz") -> str:
    directory.mkdir(parents=True, exist_ok=True)
    np.savez(directory / name, **state)
    return str(directory / name)


# files


def test_files_that_are_not_there_or_of_another_kind(tmp_path):
    right = stored(tmp_path, {"a": np.ones(2)})
    (tmp_path / "w.onnx").touch()
    (tmp_path / "folder").mkdir()
    for wrong, advice in (
        ("missing.npz", "Pass an existing weights file"),
        ("folder", "the folder of a Hugging Face model"),
        ("w.onnx", "Pass a file of one of these formats"),
    ):
        with provoked(advice):
            files.read_weights(str(tmp_path / wrong))
    files.read_weights(right)
    shutil.copy(right, tmp_path / "folder")
    (tmp_path / "folder" / "w.npz").unlink()
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "folder" / "model.safetensors")
    files.read_weights(str(tmp_path / "folder"))


def test_files_that_are_damaged_or_hold_something_else(tmp_path):
    right = stored(tmp_path / "right", {"a": np.ones(2)})
    for content, advice in (
        (b"no zip file", "Copy or download it again"),
        ((tmp_path / "right" / "w.npz").read_bytes()[:50], "Copy or download it again"),
    ):
        (tmp_path / "w.npz").write_bytes(content)
        with provoked(advice):
            files.read_weights(str(tmp_path / "w.npz"))
        shutil.copy(right, tmp_path)
        files.read_weights(str(tmp_path / "w.npz"))
    with provoked("Save the state dict alone, as a map from names to tensors"):
        files.read_weights(stored(tmp_path / "text", {"a": np.ones(2), "about": np.array("words")}))


def test_folders_of_shards(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for content in ("{", "[]"):
        index.write_text(content)
        with provoked("Copy or download it again"):
            files.read_weights(str(tmp_path))
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    with provoked("Download the folder with all its files"):
        files.read_weights(str(tmp_path))
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "part.safetensors")
    assert list(files.read_weights(str(tmp_path)).arrays) == ["a"]


def test_a_pickle_with_a_foreign_class(tmp_path):
    """It names the class; the weights alone, saved as it says, are read."""
    body = torch_files.mapping(
        {"model": torch_files.tensor(), "args": torch_files.call(torch_files.glob("my.config", "Config"))}
    )
    (tmp_path / "w.pth").write_bytes(torch_files.zip_file(body))
    with provoked("torch.save(model.state_dict(), FILE), and pass FILE") as caught:
        files.read_weights(str(tmp_path / "w.pth"))
    assert "w.pth needs my.config.Config, which is refused" in caught.value.happened
    writer.save(tmp_path / "weights.pth", {"a": np.ones((2, 3), np.float32)})
    assert list(files.read_weights(str(tmp_path / "weights.pth")).arrays) == ["a"]
    (tmp_path / "w.pth").write_bytes((tmp_path / "weights.pth").read_bytes()[:100])
    with provoked("or get the weights in .safetensors format"):
        files.read_weights(str(tmp_path / "w.pth"))
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "w.safetensors")
    files.read_weights(str(tmp_path / "w.safetensors"))


def test_dtypes_that_torch_lacks(tmp_path):
    array = np.ones(2, np.uint16)
    with provoked("Convert the arrays to one of") as caught:
        writer.save(tmp_path / "w.pth", {"a": array})
    for name in caught.value.instead.partition("one of ")[2].strip(".").split(", "):
        writer.save(tmp_path / "w.pth", {"a": array.astype(name)})


NETWORK = {"cls_token": np.zeros(1), "blocks.0.norm1.weight": np.zeros(1)}


def unwrapped(tree, chosen=""):
    return wrappers.unwrap(wrappers.select(tree, chosen, "w.pth"), "w.pth").arrays


@pytest.mark.parametrize(
    "tree, chosen, meant",
    [
        ({"model": NETWORK, "model_ema": {**NETWORK}}, "model_emma", "Did you mean 'model_ema'?"),
        ({"model": NETWORK, "model_ema": {**NETWORK}}, "xyz", "None of the valid names is spelled like it."),
        ({"learner": NETWORK}, "", "Did you mean 'learner'?"),
        ({f"teacher.{name}": array for name, array in NETWORK.items()}, "techer", "Did you mean 'teacher'?"),
    ],
)
def test_state_dicts_by_name(tree, chosen, meant):
    with provoked("--state_dict=") as caught:
        unwrapped(tree, chosen)
    assert caught.value.meant == meant
    for key in ("state_dict", "teacher.state_dict"):
        assert unwrapped(tree, flag(caught.value.instead, key).partition(" ")[0]).keys() == NETWORK.keys()


def test_a_name_where_there_is_one_network():
    with provoked("Leave the name of the state dict out"):
        unwrapped({"a": np.zeros(1)}, "teacher")
    unwrapped({"a": np.zeros(1)})


@pytest.mark.parametrize("kind", ["beit", "teacher"])
def test_a_network_behind_an_unknown_prefix(kind, tmp_path):
    state = drawn_state("classifier", position="relative") if kind == "beit" else CASES["timm_deit"].state
    path = stored(tmp_path, {f"learner.net.{name}": array for name, array in state.items()})
    given = {} if kind == "beit" else {"image_size": 32, "num_heads": 2, "normalization": "half"}
    reader = read if kind == "beit" else load_teacher
    with provoked("--state_dict=learner.net") as caught:
        reader(path, **given)
    reader(path, **given, state_dict=flag(caught.value.instead, "state_dict"))


# BEiT's layouts


def test_other_architectures(tmp_path):
    with provoked("Pass weights of a tokenizer, masked image model, classifier or UPerNet"):
        read(stored(tmp_path, {"layer1.0.conv1.weight": np.ones(3)}))
    path = teacher_cases.read(GOLDEN / "teachers.npz")["timm_deit"].store(tmp_path)
    with provoked(f"Write --config.teacher.weights={path} for a vqkd or extract stage") as caught:
        read(path)
    load_teacher(flag(caught.value.instead, "teacher.weights"), image_size=32, num_heads=2, normalization="half")
    state = drawn_state("classifier", position="relative")
    for name in (state.keys() - {"head.bias"}, [*state, "blocks.7.extra"]):
        with provoked("Pass a complete state dict of one of the kinds"):
            read(stored(tmp_path, {key: state.get(key, np.ones(1)) for key in name}))
    read(stored(tmp_path, state))


def test_heads_and_sizes(tmp_path):
    absolute = stored(tmp_path / "absolute", drawn_state("classifier"))
    with provoked("with --num_heads=N, the number of heads that it was trained with"):
        read(absolute)
    with provoked("Write --num_heads=N with a number that divides 10"):
        read(absolute, num_heads=3)
    read(absolute, num_heads=2)
    relative = stored(tmp_path / "relative", drawn_state("classifier", position="relative"))
    with provoked("Leave out --num_heads"):
        read(relative, num_heads=5)
    read(relative)
    with provoked() as caught:
        read(relative, image_size=16)
    assert read(relative, image_size=int(flag(caught.value.instead, "image_size"))).arguments["image_size"] == 15
    without = {name: array for name, array in drawn_state("classifier").items() if name != "pos_embed"}
    without = stored(tmp_path / "without", without)
    with provoked("with --image_size=N, the image size that it was trained with"):
        read(without, num_heads=2)
    read(without, num_heads=2, image_size=9)


@pytest.mark.parametrize(
    "kind, layout, changes",
    [
        ("vqkd", "huggingface", {}),
        ("vqkd", "timm", {}),
        ("segmenter", "huggingface", {}),
        ("segmenter", "huggingface", {"channels": 10}),
    ],
)
def test_layouts_that_lack_a_model(kind, layout, changes, tmp_path):
    weights = drawn_weights(kind)
    changed = dataclasses.replace(weights, arguments=weights.arguments | changes)
    target = tmp_path / ("hub" if layout == "huggingface" else "w.npz")
    with provoked("Write --layout=") as caught:
        write(changed, str(target), layout)
    write(weights, str(tmp_path / "w.npz"), flag(caught.value.instead, "layout"))
    if layout == "timm":
        write(drawn_weights("classifier"), str(tmp_path / "classifier.npz"), "timm")


def test_a_variable_that_the_released_models_lack(tmp_path):
    weights = drawn_weights("classifier")
    weights.variables["params"]["extra"] = {"kernel": np.ones((2, 2), np.float32)}
    with provoked("--layout=run, which stores every model"):
        write(weights, str(tmp_path / "w.npz"), "official")
    write(weights, str(tmp_path / "run"), "run")


def test_a_classifier_without_a_head(tmp_path):
    state = {name: array for name, array in drawn_state("classifier").items() if not name.startswith("head.")}
    weights = read(stored(tmp_path, state), num_heads=2)
    with provoked("Write --layout=huggingface or --layout=timm"):
        write(weights, str(tmp_path / "run"), "run")
    write(weights, str(tmp_path / "hub"), "huggingface")
    write(weights, str(tmp_path / "timm.npz"), "timm")


def test_the_place_of_the_new_weights(tmp_path, monkeypatch):
    weights = drawn_weights("classifier")
    with provoked("Write ") as caught:
        write(weights, str(tmp_path / "w.bin"), "official")
    advised = caught.value.instead.removeprefix("Write ").removesuffix(".")
    write(weights, advised, "official")
    with provoked("Pass another path, or remove the existing one first"):
        write(weights, advised, "official")
    (tmp_path / "w.safetensors").unlink()
    write(weights, advised, "official")
    (tmp_path / "file").touch()
    with provoked("pass a path in a folder that you can write to"):
        write(weights, str(tmp_path / "file" / "w.npz"), "official")
    write(weights, str(tmp_path / "new" / "w.npz"), "official")


def test_hugging_face_folders(tmp_path):
    write(drawn_weights("mim", position="relative_shared"), str(tmp_path / "hub"), "huggingface")
    path, config = tmp_path / "hub" / "model.safetensors", tmp_path / "hub" / "config.json"
    whole, settings = path.read_bytes(), config.read_text()
    state = load_file(path)
    save_file(
        {name: array for name, array in state.items() if not name.endswith("layer.0.attention.attention.key.weight")},
        path,
    )
    with provoked("Copy or download it again"):
        read(str(tmp_path / "hub"))
    path.write_bytes(whole)
    read(str(tmp_path / "hub"))
    config.write_text(settings.replace('"gelu"', '"relu"'))
    with provoked("Pass a folder whose model is a BEiT"):
        read(str(tmp_path / "hub"))
    config.write_text(settings)
    read(str(tmp_path / "hub"))
    assert huggingface.read_settings({"model_type": "beit"})


def test_statistics_of_the_images(tmp_path):
    path = stored(tmp_path, {"a": np.ones(1)})
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}))
    asked = {"usual": "imagenet", "option": "--normalization"}
    with provoked("to use that instead") as caught:
        normalization_of(path, given="", **asked)
    for name in caught.value.instead.partition("one of ")[2].partition(" to use")[0].split(", "):
        assert normalization_of(path, given=name, **asked) == name
    file.write_text(json.dumps({"image_mean": 0.5, "image_std": [1, 1, 1]}))
    with provoked("Correct the file, or move it away"):
        normalization_of(path, given="", **asked)
    file.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    assert normalization_of(path, given="", **asked) == "half"
    file.unlink()
    assert normalization_of(path, given="", **asked) == "imagenet"


def test_positions():
    table = np.zeros((28, 2), np.float32)
    with provoked("(2 * side - 1)^2 + 3 rows"):
        resize_relative_table(table[:-1], (5, 5))
    with provoked("Use a square image size"):
        resize_relative_table(table, (5, 6))
    with provoked("at least 3 x 3 patches"):
        resize_relative_table(table[: 3**2 + 3], (5, 5))
    assert resize_relative_table(table, (5, 5)).shape == (84, 2)
    with provoked("(1, prefix + side^2, width)"):
        resize_position_embedding(np.zeros((1, 7, 4), np.float32), (3, 3))
    assert resize_position_embedding(np.zeros((1, 1 + 4, 4), np.float32), (3, 3)).shape == (1, 10, 4)


# initial weights


def test_initial_weights_of_another_model():
    vqkd, mim = arguments_of("vqkd"), arguments_of("mim")
    with provoked("a run of stage 'vqkd'"):
        adapt_weights(drawn_weights("mim"), "vqkd", vqkd)
    adapt_weights(drawn_weights("vqkd"), "vqkd", vqkd)
    classifier = arguments_of("classifier", position="relative") | {"pooling": "mean"}
    tokenizer = drawn_weights("vqkd", layer_scale=False)
    with provoked("such as a run of stage 'mim'") as caught:
        adapt_weights(tokenizer, "classifier", classifier)
    followed = {name: flag(caught.value.instead, f"model.{name}") for name in ("position", "layer_scale_init")}
    followed["layer_scale_init"] = float(followed["layer_scale_init"])
    adapt_weights(tokenizer, "classifier", classifier | followed)
    adapt_weights(drawn_weights("mim", position="relative"), "classifier", classifier)
    source = drawn_weights("mim")
    with provoked("with the values that `python -m beitv2_jax.convert SOURCE DEST` prints"):
        adapt_weights(source, "mim", mim | {"shared_head": True})
    adapt_weights(source, "mim", source.arguments)
    with provoked("or another --config.init_from: a BEiT model, or a plain ViT"):
        adapt_weights(Weights("vit", **PLAIN | {"arguments": PLAIN["arguments"] | {"num_registers": 1}}), "mim", mim)
    adapt_weights(source, "mim", mim)


PLAIN = {
    "arguments": dict(image_size=9, patch_size=3, width=10, depth=2, num_heads=2, mlp_dim=31, position="absolute"),
    "variables": {"params": {}},
    "layout": "plain",
    "normalization": "imagenet",
}


# the hub


@pytest.fixture
def hub_files(tmp_path, monkeypatch):
    """A folder that stands for the files of a repository, and a list of what the hub answers."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    answers = []

    def download(*_, **__):
        if answers:
            raise answers.pop()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "_fetched", hub._fetched.__wrapped__)
    return tmp_path, answers


def test_the_hub(hub_files):
    from huggingface_hub import errors

    folder, answers = hub_files
    with provoked("Write hf:OWNER/NAME of a repository with a file"):
        hub.local_path("hf:a/b")
    stored(folder, {"a": np.ones(2)})
    with provoked("Write hf:a/b/FILE with a file of the repository, or hf:a/b"):
        hub.local_path("hf:a/b/x.npz")
    for address in ("hf:a/b/w.npz", "hf:a/b"):
        assert hub.local_path(address) == str(folder / "w.npz")
    response = types.SimpleNamespace(headers={}, request=None)
    for kind, advice in (
        (errors.GatedRepoError, "Accept them there and run hf auth login, or set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "Write hf:OWNER/NAME as its page shows it"),
        (errors.RevisionNotFoundError, "or leave @v9 out"),
        (None, "Run hf download a/b where there is a network, copy the cache"),
    ):
        answers.append(OSError("no network.") if kind is None else kind("no", response=response))
        with provoked(advice):
            hub.local_path("hf:a/b@v9")
        assert hub.local_path("hf:a/b@v9") == str(folder / "w.npz")


def test_the_hub_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with provoked('Run pip install "beitv2_jax[hub]"'):
        hub._fetched.__wrapped__("hf:a/b")


# exported functions and plain classifiers


def test_exports(monkeypatch, tmp_path):
    weights = drawn_weights("classifier")
    with provoked('Run pip install "beitv2_jax[export]"'):
        functions._check(weights, "no_such_package", "export")
    with monkeypatch.context() as patch, provoked("Write another --layout, or export a smaller model"):
        patch.setattr(functions, "MAX_BYTES", 1000)
        functions._check(weights, "json", "export")
    functions._check(weights, "json", "export")
    convolutional = drawn_weights("classifier", stem="conv", patch_size=4)
    with provoked("Write --layout=stablehlo, which holds every model"):
        write(convolutional, str(tmp_path / "w.npz"), "official")
    functions._check(convolutional, "json", "export")
    write(weights, str(tmp_path / "w.npz"), "official")


def test_plain_classifiers(tmp_path):
    state = CASES["timm_deit"].state
    plain = {name: array for name, array in state.items() if not name.startswith(("head", "dist"))}
    plain["pos_embed"] = state["pos_embed"][:, 1:] if "dist_token" in state else state["pos_embed"]
    width = plain["cls_token"].shape[-1]
    plain |= {"head.weight": np.ones((3, width), np.float32), "head.bias": np.ones(3, np.float32)}
    with provoked("Pass a classifier with one linear head, or use the network as a teacher"):
        classifier_from_state({name: array for name, array in plain.items() if name != "head.bias"}, num_heads=2)
    assert classifier_from_state(plain, num_heads=2).arguments["num_classes"] == 3
    path = stored(tmp_path, plain)
    with provoked("Write --normalization=half (AugReg and most of timm), imagenet (DeiT, MAE) or clip"):
        read(path, num_heads=2, plain_vit=True)
    for name in ("half", "imagenet", "clip"):
        assert read(path, num_heads=2, plain_vit=True, normalization=name).normalization == name


# runs


def test_runs(tmp_path):
    with provoked("Pass the directory (--workdir) of a run that has saved a checkpoint"):
        read_run(str(tmp_path / "missing"))
    file = stored(tmp_path / "file", drawn_state("classifier", position="relative"))
    with provoked(f"Run python -m beitv2_jax.convert {file} RUN, then pass RUN") as caught:
        read_run(file)
    assert caught.value.meant == "Did you mean the run that it can be converted to?"
    run = tmp_path / "run"
    write(read(file), str(run), "run")
    read_run(str(run))
    with provoked("Leave --weights=average out"):
        read_run(str(run), average=True)
    with provoked("the directory of a run of stage 'vqkd'") as caught:
        check_stage(str(run), ("vqkd",), "config.tokenizer.run")
    assert "--config.tokenizer.run=PATH" in caught.value.instead
    check_stage(str(run), ("finetune",), "config.tokenizer.run")
    shutil.copytree(run / "checkpoints" / "0", run / "checkpoints" / "1")
    shutil.rmtree(run / "checkpoints" / "1" / "params")
    with provoked(f"move {run}/checkpoints/1 away to use the checkpoint before it"):
        read_run(str(run))
    shutil.rmtree(run / "checkpoints" / "1")
    assert read_run(str(run)).step == 0
    shutil.rmtree(run / "checkpoints" / "0" / "params")
    with provoked(f"delete {run}/checkpoints/0 and give the command of this run again"):
        read_run(str(run))
    shutil.rmtree(run / "checkpoints" / "0")
    with provoked("of a run that has saved a checkpoint"):
        read_run(str(run))


# teachers


def loaded(path, **options):
    return load_teacher(str(path), **({"image_size": 32, "num_heads": 2, "normalization": "half"} | options))[0]


def test_a_teacher_from_a_file(tmp_path):
    path = CASES["timm_deit"].store(tmp_path)
    with provoked("--config.teacher.weights=PATH with the directory of a run or the weights of a published network"):
        loaded(tmp_path / "missing.npz")
    with provoked("--config.teacher.num_heads=N"):
        loaded(path, num_heads=0)
    with provoked("--config.teacher.normalization=imagenet (DINO, DeiT), half (AugReg) or clip"):
        loaded(path, normalization="")
    for key in ("normalization", "output", "grid_match", "position_resize"):
        with provoked(f"--config.teacher.{key}=") as caught:
            loaded(path, **{key: "xyz"})
        assert caught.value.meant == "None of the valid names is spelled like it."
        if key != "output":
            loaded(path, **{key: flag(caught.value.instead, f"teacher.{key}")})
    with provoked("--config.teacher.output=tokens"):
        loaded(path, output="projected")
    loaded(path, output="tokens")
    with provoked() as caught:
        loaded(path, image_size=33)
    loaded(path, image_size=int(flag(caught.value.instead, "views.image_size")))
    loaded(path, image_size=33, grid=(2, 2))  # as --config.teacher.tokenizer_patch_size gives


def test_a_teacher_from_a_run(tmp_path):
    run = tmp_path / "run"
    write(drawn_weights("classifier"), str(run), "run")
    given = {"image_size": 9, "num_heads": 0, "normalization": ""}
    with provoked("--config.teacher.output=tokens"):
        loaded(run, **given, output="projected")
    with provoked() as caught:
        loaded(run, **given | {"normalization": "clip"})
    loaded(run, **given | {"normalization": flag(caught.value.instead, "teacher.normalization")}, output="tokens")


def test_what_is_no_teacher(tmp_path):
    for kind, advice in (
        ("vqkd", "with the weights of a vision transformer"),
        ("mim", "Run python -m beitv2_jax.convert"),
    ):
        state = drawn_state(kind, position="relative" if kind == "mim" else "absolute")
        with provoked(advice):
            from_state(state)
    file = stored(tmp_path, state)
    write(read(file), str(tmp_path / "run"), "run")
    loaded(tmp_path / "run", image_size=9, num_heads=0, normalization="")
    with provoked("Pass weights of one of these families"):
        from_state({"layer1.0.conv1.weight": np.ones(3)})
    state = CASES["timm_deit"].state
    with provoked("Pass the unchanged weights of a network of this family"):
        from_state({name: array for name, array in state.items() if name != "norm.weight"}, num_heads=2)
    from_state(state, num_heads=2)
    case = CASES["hf_siglip"]
    key = "vision_model.embeddings.patch_embedding.weight"
    with provoked("siglip2-base-patch16-224"):
        from_state(case.state | {key: case.state[key].reshape(len(case.state[key]), -1)}, case.config)
    from_state(case.state, case.config)


def test_an_unknown_activation():
    state = CASES["open_clip"].state
    with provoked("--config.teacher.activation=quick_gelu (OpenAI CLIP") as caught:
        from_state(state, num_heads=2)
    for name in ("quick_gelu", "gelu", "gelu_tanh"):
        assert name in caught.value.instead
        assert from_state(state, num_heads=2, activation=name).arguments["activation"] == name


def test_what_a_cluster_tokenizer_is_not(tmp_path):
    description = {"name": "deit"}
    arguments = {"image_size": 32, "patch_size": 8, "codebook_size": 2, "teacher": description}
    codebook = {"quantizer": {"codebook": np.eye(2, dtype=np.float32)}, "mean": np.zeros(2, np.float32)}
    weights = Weights(
        "cluster", arguments, {"params": {"cls_token": np.ones(3, np.float32)}, "codebook": codebook}, "run"
    )
    with provoked("--layout=run") as caught:
        write(weights, str(tmp_path / "w.pth"), "official")
    assert "--layout=stablehlo or --layout=onnx" in caught.value.instead
    write(weights, str(tmp_path / "run"), "run")
    run = str(tmp_path / "run")
    with provoked("Pass the weights of the teacher") as caught:
        read_backbone(run)
    assert caught.value.meant == "Did you mean its teacher, deit?"
    with provoked("Write 32, or run the stages extract and cluster at 48 pixels"):
        read(run, image_size=48)
    assert read(run, image_size=32).arguments["teacher"] == description


def test_a_regression_that_no_layout_holds(tmp_path):
    weights = drawn_weights("regressor")
    with provoked("--layout=stablehlo or --layout=onnx") as caught:
        write(weights, str(tmp_path / "w.pth"), "official")
    assert "--config.init_from" in caught.value.instead
    write(weights, str(tmp_path / "run"), "run")
    assert read(str(tmp_path / "run")).kind == "regressor"


def test_pixels_in_place_of_a_network(tmp_path):
    for options in ({"grid": (8, 8)}, {"num_heads": 0, "normalization": ""}):  # of a network, and without a grid
        with provoked("--config.teacher.weights=./pixels"):
            loaded("pixels", **options)
    assert loaded("pixels", num_heads=0, normalization="", grid=(8, 8)).width == 48


def test_a_quantizer_that_a_layout_cannot_hold(tmp_path):
    weights = drawn_weights("vqkd", arguments={**arguments_of("vqkd"), "quantizer": "simvq"})
    with provoked("--layout=run") as caught:
        write(weights, str(tmp_path / "w.pth"), "official")
    assert "--layout=stablehlo or --layout=onnx" in caught.value.instead
    write(weights, str(tmp_path / "run"), "run")


def test_every_error_about_weights_was_provoked(request):
    check_all_provoked(request, "convert")
