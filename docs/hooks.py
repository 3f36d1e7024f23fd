"""What the documentation site has besides the pages in docs/: files of the repository, and pages made from the source.

MkDocs calls the functions `on_*` (mkdocs.yml); `tests/docs_test.py` calls the others. MkDocs itself is imported only
where it is the caller.
"""

import ast
import functools
import json
import os
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from beitv2_jax import config as config_lib

ROOT = Path(__file__).parents[1]
STAGES = (
    "vqkd", "mim", "regress", "finetune", "segment", "probe", "dense", "segment_linear", "extract", "cluster",
    "tokenize", "teacher", "pipeline", "quickstart", "study",
)  # fmt: skip
"""The config files, in the order of the reference."""
REPOSITORY_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "launch/README.md": "launch.md",
}
"""File outside of docs/ -> the page of the site that shows it, or stands for it."""
SECTIONS = ROOT / "beitv2_jax" / "config" / "sections.py"
CONFIGURATION_MARK = "<!-- every key -->"


# --- called by MkDocs


def on_files(files, config):
    """Add the pages that are not files of docs/."""
    from mkdocs.structure.files import File

    pages = {REPOSITORY_PAGES[name]: name for name in REPOSITORY_PAGES if name != "README.md"}
    made = {page: site_links((ROOT / name).read_text(), Path(name).parent) for page, name in pages.items()}
    made["errors.md"] = errors_page()
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        made[f"notebooks/{notebook.stem}.md"] = notebook_page(notebook)
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill in the configuration reference, and let links to files outside of docs/ lead to their pages."""
    if CONFIGURATION_MARK in markdown:
        markdown = markdown.replace(CONFIGURATION_MARK, configuration_page())
    if page.file.generated_by:
        return markdown
    return site_links(markdown, Path("docs") / Path(page.file.src_uri).parent)


# --- links


def site_links(markdown: str, folder: Path) -> str:
    """Return the text of a file in `folder` (from the root) with its relative links as the site needs them.

    A link to a file that the site does not show becomes its text.
    """

    def replaced(match: re.Match) -> str:
        mark, text, target = match.groups()
        address, hash_, anchor = target.partition("#")
        if not address or re.match(r"\w+:", address):
            return match[0]
        path = os.path.normpath(folder / address)
        if path in REPOSITORY_PAGES:
            return f"{mark}[{text}]({REPOSITORY_PAGES[path]}{hash_}{anchor})"
        if path.startswith("docs/"):
            page = os.path.relpath(path, folder if folder.parts[:1] == ("docs",) else "docs")
            return f"{mark}[{text}]({page}{hash_}{anchor})"
        return text

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", replaced, markdown)


# --- the configuration reference


def configuration_page() -> str:
    """Return a section for each config file: its presets, and every key with its default and its comment."""
    return "\n".join(_config_section(stage) for stage in STAGES)


def _config_section(stage: str) -> str:
    path = ROOT / "configs" / f"{stage}.py"
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    lines = [f"## configs/{stage}.py", "", docstring.partition("\n")[0], ""]
    if presets := presets_of(docstring):
        lines += ["| preset | |", "|---|---|", *(f"| `{name}` | {_cell(text)} |" for name, text in presets.items()), ""]
    lines += ["| key | default | |", "|---|---|---|"]
    comments = key_comments(path)
    values = config_lib.flatten(config_lib.resolve(config_lib.load(str(path)), "{workdir}"))
    sections = set()
    for key, value in values.items():
        if key.startswith("stages."):
            continue
        section = key.rpartition(".")[0]
        if section and section not in sections and section in comments:
            lines.append(f"| **{section}** | | {_cell(comments[section])} |")
        sections.add(section)
        lines.append(f"| `{key}` | `{_cell(json.dumps(value))}` | {_cell(comments.get(key, ''))} |")
    if stages := config_lib.load(str(path)).get("stages"):
        names = ", ".join(f"`{name}`" for name in stages)
        lines += [
            "",
            f"`stages.NAME.KEY` are the keys of the stages {names}; `--print_config` shows their values here.",
        ]
    return "\n".join([*lines, ""])


def presets_of(docstring: str) -> dict[str, str]:
    """Return {preset: description} of the list at the end of a config's docstring."""
    found: dict[str, str] = {}
    for line in docstring.partition("\nPresets\n")[2].splitlines():
        if match := re.fullmatch(r"  (\S+) +(.+)", line):
            found[match[1]] = match[2]
        elif found:
            found[list(found)[-1]] += " " + line.strip()
    return found


def key_comments(path: Path) -> dict[str, str]:
    """Return {'section.key': comment} of a config file; the common sections bring their own comments."""
    module = ast.parse(path.read_text())
    comments = _comments(path)
    (function,) = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "get_config")
    found: dict[str, str] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ConfigDict" and node.args:
            _collect(node.args[0], "", comments, found)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("config."):
            key = ast.unparse(node.targets[0]).removeprefix("config.")
            if node.lineno - 1 in comments:
                found[key] = comments[node.lineno - 1]
    return found


def _collect(node: ast.expr, prefix: str, comments: dict[int, str], found: dict[str, str]) -> None:
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if key is not None:
                _add(prefix + key.value, comments.get(key.lineno, ""), value, comments, found)
            elif match := re.match(r"(\w+)(?::| is) (.+)", comments.get(value.lineno, "")):
                found[prefix + match[1]] = match[2]  # **changes,  # min_scale: what it is
            else:
                _collect(value, prefix, comments, found)
    elif isinstance(node, ast.Call) and (section := _common_sections().get(ast.unparse(node.func).split(".")[-1])):
        _collect(section.body[-1].value, prefix, _comments(SECTIONS), found)
        for keyword in node.keywords:
            if keyword.arg is None:
                _collect(keyword.value, prefix, comments, found)
            elif keyword.lineno > node.lineno:
                _add(prefix + keyword.arg, comments.get(keyword.lineno, ""), keyword.value, comments, found)


def _add(key: str, comment: str, value: ast.expr, comments: dict[int, str], found: dict[str, str]) -> None:
    _collect(value, f"{key}.", comments, found)
    section = isinstance(value, ast.Dict | ast.Call)
    if section and (match := re.match(r"(\w+): (.+)", comment)):
        found[f"{key}.{match[1]}"] = match[2]
    elif comment:
        found[key] = comment


@functools.cache
def _common_sections() -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(SECTIONS.read_text()).body if isinstance(node, ast.FunctionDef)}


@functools.cache
def _comments(path: Path) -> dict[int, str]:
    with path.open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    return {token.start[0]: token.string[1:].strip() for token in tokens if token.type == tokenize.COMMENT}


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- the error messages


def errors_page() -> str:
    """Return every message of a `UserError` in the package, with its cause and remedy, by part of the package."""
    parts: dict[str, set[str]] = {}
    for path in sorted((ROOT / "beitv2_jax").rglob("*.py")):
        part = path.relative_to(ROOT / "beitv2_jax").parts[0].removesuffix(".py")
        parts.setdefault(part, set()).update(_messages(ast.parse(path.read_text())))
    lines = ["# Error messages", ""]
    lines += ["For everyone who searches for a message of the program. What changes from case to case is shown as `…`."]
    lines += ["The program prints the three sentences below each other and exits with code 2.", ""]
    for part, messages in parts.items():
        if messages:
            lines += [f"## {part}", "", *sorted(messages), ""]
    return "\n".join(lines)


def _messages(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or len(node.args) < 3:
            continue
        happened, meant, instead = map(_text, node.args[:3])
        if ast.unparse(node.func) == "refuse":  # (key, problem, meant, values)
            yield f"- **{happened}=… is not valid: {meant}.** {instead} Write --config.{happened}=…."
        elif ast.unparse(node.func) == "UserError" and re.search(r"\w{3}", happened):  # not a text from elsewhere
            yield f"- **{happened}** {meant} {instead}"


def texts(path: Path) -> str:
    """Return all texts in a file's source, one a line, with '…' for what is known only when the program runs."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.JoinedStr | ast.Constant)]
    return "\n".join(map(_text, nodes)).replace("\\", "") + "\n"


def _text(node: ast.expr) -> str:
    """Return the text of an expression; what is known only when the program runs is '…'."""
    if isinstance(node, ast.Constant):
        return re.sub(r"([*_<\[`|])", r"\\\1", str(node.value))
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.IfExp):
        return f"{_text(node.body)} / {_text(node.orelse)}"
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "did_you_mean":
        return "Did you mean …?"
    return "…"


# --- notebooks


def notebook_page(path: Path) -> str:
    """Return a notebook as Markdown: its texts, its code, and the outputs that it was saved with."""
    blocks = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
            continue
        blocks.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                blocks.append(f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                blocks.append(f"```text\n{text}\n```")
    blocks.append(f"This page is the notebook `docs/notebooks/{path.name}`.")
    return "\n\n".join(blocks)
