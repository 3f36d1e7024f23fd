"""Remote addresses: refused by every flag and config key that takes a path, unless it is a bucket where one may be."""

import pytest
from absl import flags
from paths import CONFIGS, ROOT

from beitv2_jax import config as config_lib
from beitv2_jax.config.checks import _CHOICES, _DURATION_KEYS
from beitv2_jax.config.flags import parse_flags
from beitv2_jax.config.paths import PATH_KEYS, WEIGHT_KEYS, refuse_remote
from beitv2_jax.convert.__main__ import main as convert
from beitv2_jax.data.prepare.__main__ import main as prepare
from beitv2_jax.errors import UserError
from beitv2_jax.runners import stages

NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))
REMOTE = "s3://bucket/some/where"
BUCKET = "gs://bucket/some/where"
NAMES_OF_PARTS = (
    *("data.train_split", "data.eval_split", "data.train_labels"),
    *("teacher.state_dict", "teacher.license", "teacher.origin"),
    *("run.keep_best", "run.wandb"),
)


def stages_of(name):
    config = config_lib.load(f"{CONFIGS / name}.py")
    if name == "pipeline":
        config.teacher.weights = "FILE"
    return config, dict(config.stages.items()) if "stages" in config else {"": config}


@pytest.fixture(autouse=True)
def _nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_text_in_a_config_is_a_path_or_something_else_that_is_known(name):
    for stage in stages_of(name)[1].values():
        flat = config_lib.flatten(stage)
        texts = {key for key, value in flat.items() if isinstance(value, str)}
        durations = {key for key in flat if key.split(".")[-1] in _DURATION_KEYS}
        assert texts <= {*PATH_KEYS, *_CHOICES, *durations, *NAMES_OF_PARTS}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "study"])  # eleven stages that others have too
def test_every_key_that_holds_a_path_refuses_a_remote_one(name):
    for part, keys in {part: config_lib.flatten(stage) for part, stage in stages_of(name)[1].items()}.items():
        for key in set(PATH_KEYS) & set(keys):
            config, own = stages_of(name)
            value = f"folder:{REMOTE}" if key == "data.source" else REMOTE
            own[part].update_from_flattened_dict({key: value})
            with pytest.raises(UserError, match="is a remote address") as caught:
                config_lib.validate(config)
            assert f"{key}={value}" in caught.value.happened
            assert f"{key}={value.replace('s3://', '/mnt/')}." in caught.value.instead


def test_addresses_of_the_hub_pass_for_weights_alone():
    stages_of_name = {key: name for name in NAMES for key in PATH_KEYS if key in config_lib.flatten(stages_of(name)[0])}
    assert set(stages_of_name) == set(PATH_KEYS)
    for key, name in stages_of_name.items():
        config, _ = stages_of(name)
        config.update_from_flattened_dict({key: "hf:org"})
        expected = "is no address of the" if key in WEIGHT_KEYS else "from which weights alone are read"
        with pytest.raises(UserError, match=expected) as caught:
            config_lib.validate(config)
        assert f"{key}=hf:org" in caught.value.happened
    for address in ("hf:org/name", "hf:org/name@v1/file.pth"):
        refuse_remote("--config.init_from", address, weights=True)


@pytest.mark.parametrize("flag", ["--workdir", "--compilation_cache", "--config"])
@pytest.mark.parametrize("scheme", ["s3", "https", "file"])
def test_every_flag_that_takes_a_path_refuses_a_remote_one(flag, scheme):
    given = {"--config": f"{ROOT}/configs/finetune.py", "--workdir": "w", flag: f"{scheme}://bucket/x"}
    with pytest.raises(UserError, match="is a remote address") as caught:
        parse_flags(["program", *map("=".join, given.items())], flags.FlagValues())
    assert caught.value.instead.endswith(f"write {flag}=/mnt/bucket/x.")


@pytest.mark.parametrize(
    "name, keys",
    [
        ("finetune", {"init_from": BUCKET}),
        ("finetune", {"data.source": f"arrayrecord:{BUCKET}/*.array_record"}),
        ("finetune", {"data.source": "tfds:imagenette", "data.data_dir": BUCKET}),
        ("vqkd", {"teacher.weights": BUCKET}),
        ("mim", {"tokenizer.run": BUCKET}),
        ("probe", {"backbone.run": BUCKET}),
    ],
)
def test_a_bucket_passes_where_it_can_be_read(name, keys):
    config = config_lib.load(f"{CONFIGS / name}.py:smoke").unlock()
    config.update_from_flattened_dict(keys)
    config_lib.validate(config)


@pytest.mark.parametrize(
    "name, keys",
    [
        ("mim", {"tokenizer.codes": BUCKET, "views.num_views": 1}),
        ("vqkd", {"teacher.features": BUCKET, "views.num_views": 1}),
        ("finetune", {"data.source": f"folder:{BUCKET}"}),
        ("finetune", {"data.source": "embedded/tiny", "data.data_dir": BUCKET}),
    ],
)
def test_a_bucket_is_refused_where_it_cannot_be_read(name, keys):
    config = config_lib.load(f"{CONFIGS / name}.py:smoke").unlock()
    config.update_from_flattened_dict(keys)
    with pytest.raises(UserError, match="only mounted file systems are read and written there"):
        config_lib.validate(config)


def test_flags_take_buckets_but_for_the_config():
    given = [f"--config={ROOT}/configs/finetune.py", f"--workdir={BUCKET}", f"--compilation_cache={BUCKET}"]
    parse_flags(["program", *given], flags.FlagValues())
    with pytest.raises(UserError, match="is a remote address"):
        parse_flags(["program", f"--config={BUCKET}.py", "--workdir=w"], flags.FlagValues())


def test_functions_and_other_commands_refuse_it_too(capsys):
    with pytest.raises(UserError, match="is a remote address"):
        stages.run_stage(config_lib.load(f"{CONFIGS / 'finetune.py'}:smoke"), REMOTE)
    for command, arguments in (
        (convert, [REMOTE, "there"]),
        (convert, ["here", REMOTE]),
        (prepare, ["imagenet2012", f"--archives={REMOTE}"]),
        (prepare, ["imagenet2012", "--archives=here", f"--data_dir={REMOTE}"]),
    ):
        assert command(arguments) == 2
        assert f"{REMOTE} is a remote address" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["", "runs/x", "/a:b/c", "folder:/a//b", "tfds:imagenet2012", "arrayrecord:/a/*.x"])
def test_other_paths_pass(path):
    refuse_remote("--workdir", path)
