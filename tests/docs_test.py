"""The documentation: commands are valid, code runs, links lead somewhere, and pages made from the source are complete.

A block that cannot be checked has a comment in the line before it: <!-- not run: the reason -->.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from absl import flags
from convert_states import drawn_weights
from paths import CONFIGS, ROOT
from PIL import Image

from beitv2_jax import cli
from beitv2_jax import config as config_lib
from beitv2_jax.config.flags import parse_flags
from beitv2_jax.convert.writing import write

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
EXTRAS = {"apache_beam", "cv2", "onnxruntime", "timm", "torch", "transformers"}
"""Modules that the documentation needs and the tests do not install; with one missing, only imports are checked."""
RUNS = {
    "runs/vqkd": "vqkd",
    "runs/quickstart/vqkd": "vqkd",
    "runs/mim": "mim",
    "runs/quickstart/mim": "mim",
    "runs/finetune": "classifier",
    "runs/segment": "segmenter",
}
"""Run directory of the examples -> what kind of weights the fixture writes there."""
IMAGES = ("photo.jpg", "a.jpg", "b.png", "photos/1.jpg", "photos/2.jpg")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


@functools.cache
def blocks() -> list[Block]:
    """Return all fenced blocks that are to be checked."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
            before = text[: match.start()].rstrip().rpartition("\n")[2]
            if not before.startswith("<!-- not run: "):
                content = "\n".join(line.removeprefix(match[1]) for line in match[3].splitlines())
                line = text[: match.start()].count("\n") + 1
                found.append(Block(str(page.relative_to(ROOT)), line, match[2], content))
    return found


def of_language(*languages):
    return [block for block in blocks() if block.language in languages]


# --- shell


def commands(text: str) -> list[list[str]]:
    """Return the commands of a shell text as lists of words, variables filled in, settings before a command removed."""
    text = re.sub(r"(^|\s)#.*", r"\1", text.replace("\\\n", " "))
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&\n")
    lexer.whitespace, lexer.whitespace_split = " \t", True
    found, words, variables = [], [], {}
    for token in [*lexer, ";"]:
        if set(token) <= set(";|&\n"):
            while words and (match := re.fullmatch(r"(\w+)=(.*)", words[0], re.DOTALL)):
                variables[match[1]] = match[2]
                words.pop(0)
            found += [words] if words else []
            words = []
        elif re.fullmatch(r"\$\w+", token):
            words += shlex.split(variables.get(token[1:], token))
        else:
            words.append(token)
    return found


def check_command(words: list[str]) -> None:
    """Parse the arguments of a program of this project as the program does; check that the files of others exist."""
    program, *arguments = words
    name = Path(program).name
    if name == "sh" or name.endswith((".sh", ".sbatch")):
        script, *arguments = arguments if name == "sh" else words
        assert (ROOT / script).is_file(), f"there is no {script}"
        if script == "launch/local.sh":
            check_run([argument for argument in arguments if argument != "--dry-run"])
        elif script == "launch/test.sh":
            check_paths(arguments)
    elif name == "beitv2" and arguments[0] in cli.VERBS:
        verb, *arguments = arguments
        check_program(cli.VERBS[verb][0], arguments)
    elif name == "beitv2":
        assert arguments[0] in ("--help", "--version"), f"there is no verb {arguments[0]}"
    elif name.startswith("python") and arguments[:1] == ["-c"]:
        check_imports(arguments[1])
    elif name.startswith("python") and arguments[:1] == ["-m"]:
        module, *arguments = arguments[1:]
        if module == "pytest":
            check_paths(arguments)
        elif module.startswith(("beitv2_jax", "benchmarks")):
            check_program(module, arguments)
    elif name == "pip" and (extras := re.search(r"\.\[([\w,-]+)\]", " ".join(arguments))):
        known = re.findall(r'^        "([\w-]+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
        assert set(extras[1].split(",")) <= set(known)
    elif program.startswith((".ci/", "launch/")):
        assert (ROOT / program).is_file(), f"there is no {program}"


def check_paths(arguments: list[str]) -> None:
    for path in (argument for argument in arguments if argument.endswith(".py")):
        assert list(ROOT.glob(path)), f"there is no {path}"


def check_run(arguments: list[str]) -> None:
    """Parse flags and resolve the config, without running anything."""
    values = flags.FlagValues()
    parse_flags(["docs", *arguments], values)
    if values.task == "run" and not values.print_config and not values.plan:
        config_lib.validate(values.config)
    config_lib.resolve(values.config, "workdir")


class Parsed(Exception):
    """The arguments of a program are valid."""


@contextlib.contextmanager
def only_parsing(monkeypatch):
    """Let every program of argparse end with `Parsed` when its arguments are parsed."""
    nested = []
    originals = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args

    def parse_args(self, *given):
        nested.append(True)
        originals[0](self, *given)
        raise Parsed

    def parse_known_args(self, *given):
        found = originals[1](self, *given)
        if not nested:
            raise Parsed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        yield patch


def check_program(name: str, arguments: list[str]) -> None:
    if name == "beitv2_jax.main":
        return check_run(arguments)
    try:
        spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError:  # it is no package
        spec = None
    try:
        module = importlib.import_module(spec.name if spec else name)
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] in EXTRAS, f"{name}: {error}"
        return None
    if hasattr(module, "define_flags"):
        values = flags.FlagValues()
        module.define_flags(values, ["docs", *arguments])
        values(["docs", *arguments])
        return None
    if hasattr(module, "flags"):
        names = {re.match(r"--(?:no)?(\w+)", argument)[1] for argument in arguments}
        assert names <= set(flags.FLAGS), f"{name} has no flag {names - set(flags.FLAGS)}"
        return None
    with pytest.MonkeyPatch.context() as monkeypatch, only_parsing(monkeypatch) as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(Parsed):
            ended = module.main()
            pytest.fail(f"{name} refuses {' '.join(arguments)} ({ended})")
    return None


@pytest.mark.parametrize("page", sorted({block.page for block in of_language("sh")}))
def test_commands_are_valid(page, capsys):
    wrong = {}
    for block in (block for block in of_language("sh") if block.page == page):
        for words in commands(block.text):
            try:
                check_command(words)
            except (Exception, SystemExit, pytest.fail.Exception) as error:
                wrong[f"{block}: {shlex.join(words)}"] = f"{type(error).__name__}: {error} {capsys.readouterr().err}"
    assert not wrong


@pytest.mark.parametrize(
    "text, message",
    [
        ("beitv2 train --config=configs/mim.py:nope --workdir=w", "no preset"),
        ("python -m beitv2_jax.main --config=configs/mim.py --workdir=w --config.optim.peak=1", "no key"),
        ("beitv2 embed runs/mim", "SystemExit|refuses"),
        ("python -m benchmarks.run --nope", "SystemExit"),
        ("sh launch/nope.sh", "no launch/nope.sh"),
        ("pip install -e '.[nope]'", "assert"),
        ("V=--config.seed=x\nbeitv2 train --config=configs/mim.py \\\n  --workdir=w $V", "seed"),
    ],
)
def test_wrong_commands_are_found(text, message):
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception)) as found:
        for words in commands(text):
            check_command(words)
    assert re.search(message, f"{found.type.__name__}: {found.value}")


# --- Python


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the runs and images that the examples name."""
    folder = tmp_path_factory.mktemp("workplace")
    for run, kind in RUNS.items():
        options = {"patch_size": 8, "grid": 4, "position": "relative"} if kind == "segmenter" else {}
        write(drawn_weights(kind, **options), str(folder / run), "run")
    (folder / "photos").mkdir()
    for number, name in enumerate(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50 + number, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.mark.parametrize("page", sorted({block.page for block in of_language("python")}))
def test_python_runs(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    names, missing = {"beitv2_jax": importlib.import_module("beitv2_jax")}, ""
    for block in (block for block in of_language("python") if block.page == page):
        code = compile(block.text, str(block), "exec")
        try:
            if not missing:
                exec(code, names)
        except ModuleNotFoundError as error:
            missing = error.name.partition(".")[0]
            assert missing in EXTRAS, f"{block}: {error}"
        if missing:  # then nothing that follows has what it needs
            check_imports(block.text)


def check_imports(code: str) -> None:
    """Check that what `code` imports from this project is there."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("beitv2_jax", "benchmarks"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_python_that_is_not_run_is_valid():
    for page in PAGES:
        for match in re.finditer(
            r"^<!-- not run: .*\n+```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
        ):
            check_imports(match[1])


# --- names in the text


@functools.cache
def config_keys() -> set[str]:
    configs = [config_lib.load(str(path)) for path in CONFIGS.glob("*.py")]
    return {key for config in configs for key in config_lib.flatten(config)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_configs_presets_and_files_exist(page):
    text = page.read_text()
    keys = config_keys()
    wrong = []
    for key in re.findall(r"--config\.([\w.]+)", text):
        key = key.rstrip(".")
        if not re.search(r"[A-Z]", key) and not any(known == key or known.startswith(f"{key}.") for known in keys):
            wrong.append(f"--config.{key}")
    for name, presets in re.findall(r"configs/([a-z_]+)\.py(?::([a-z0-9_,]+)\b)?", text):
        try:
            config_lib.load(f"{CONFIGS / name}.py:{presets}")
        except Exception as error:
            wrong.append(f"configs/{name}.py:{presets}: {error}")
    for path in re.findall(r"`((?:beitv2_jax|tests|docs|launch|benchmarks)/[\w/.-]+\.\w+)`", text):
        if not (ROOT / path).exists():
            wrong.append(path)
    for path in re.findall(r"`((?:models|tasks|training|data|convert|runners)/[\w/]+\.py)`", text):
        if not (ROOT / "beitv2_jax" / path).exists():
            wrong.append(path)
    assert not wrong


# --- links


@functools.cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    made = {ROOT / "docs" / "errors.md"}  # by docs/hooks.py
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):
            continue
        address, _, anchor = target.partition("#")
        path = (page.parent / address).resolve() if address else page
        if path in made:
            continue
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(target)
    assert not wrong


# --- pages made from the source


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_reference_has_every_config_key_preset_and_comment(hooks):
    assert {f"{name}.py" for name in hooks.STAGES} == {path.name for path in CONFIGS.glob("*.py")}
    sections = dict(re.findall(r"^## configs/(\w+)\.py\n(.*?)(?=^## |\Z)", hooks.configuration_page(), re.M | re.S))
    for name, text in sections.items():
        listed = re.findall(r"^\| `([^`]+)` \| `", text, re.MULTILINE)
        config = config_lib.load(f"{CONFIGS / name}.py")
        assert set(listed) == {key for key in config_lib.flatten(config) if not key.startswith("stages.")}
    for line in (
        "| `masking.num_masked` | `75` | exact number of hidden patches per image |",  # in the file
        "| `views.min_scale` | `0.2` | smallest fraction of the image's area in a crop |",  # of a common section
        '| `teacher.features` | `""` | workdir of the extract stage; give it or weights |',  # beside its section
        "| **tokenizer** | | exactly one |",
        "| `300ep` | the short schedule: 300 epochs, second beta 0.98, no stochastic depth |",
        "| `run.batch_size` | `2048` | the global one |",
    ):
        assert any(line in text for text in sections.values()), line


def test_error_messages_are_listed_and_the_quoted_ones_exist(hooks):
    listed = hooks.errors_page().replace("\\", "")
    assert "- **The flag --workdir is missing.** It names the directory" in listed
    assert "- **optim.betas=… is not valid: Adam takes two decay rates in [0, 1).** Did you mean the usual" in listed
    sources = "".join(hooks.texts(path) for path in (ROOT / "beitv2_jax").rglob("*.py")) + listed
    table = (ROOT / "docs" / "troubleshooting.md").read_text().partition("\n| message |")[2]
    rows = re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE)
    assert len(rows) > 15
    for quoted in re.findall(r"`([^`]+)`", " ".join(rows)):
        for part in quoted.split("..."):
            assert part.strip(" '.") in sources, quoted


def test_links_of_repository_files_fit_the_site(hooks):
    convert = hooks.site_links
    assert convert("[a](docs/data.md#x) [b](CONTRIBUTING.md)", Path(".")) == "[a](data.md#x) [b](contributing.md)"
    assert convert("![c](../docs/x.svg) [d](env/h200.env)", Path("launch")) == "![c](x.svg) d"
    assert convert("[e](../launch/README.md#y) [f](#z)", Path("docs")) == "[e](launch.md#y) [f](#z)"
