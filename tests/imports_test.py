"""Who may import whom, read from the source: every module belongs to one layer, and imports go to lower layers only."""

import ast
import functools

import pytest
from paths import ROOT

PACKAGE = "beitv2_jax"
LAYERS = {
    "typing": 0,
    "choices": 0,
    "errors": 0,
    "rng": 0,
    "sizes": 0,
    "command_line": 1,
    "config": 1,
    "runtime": 1,
    "data": 2,
    "models.ops": 3,
    "models.backbone": 3,
    "models.layers": 3,
    "models.quantizer": 3,
    "models": 4,
    "convert": 5,
    "tasks": 6,
    "training": 7,
    "evaluation": 7,
    "report": 7,
    "runners": 8,
    "api": 8,
    "atlas": 9,
    "embed": 9,
    "evaluate": 9,
    "planning": 9,
    "predict": 9,
    "robustness": 9,
    "main": 10,
    "cli": 11,
}
ACCELERATOR = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}


def layer(module: str) -> int:
    """Return the layer of 'beitv2_jax.models.vit'; the package itself (its docstring and version) is below all."""
    name = module.removeprefix(PACKAGE).lstrip(".")
    while name and name not in LAYERS:
        name = name.rpartition(".")[0]
    assert name or module == PACKAGE, f"{module} belongs to no layer: add it to LAYERS"
    return LAYERS[name] if name else -1


def part_of(module: str) -> str:
    """Return the folder or file right below the package: 'models' for 'beitv2_jax.models.vit'."""
    return module.split(".")[1] if "." in module else ""


def _own_imports(nodes, known):
    """Yield the modules that import statements name; `from package import module` counts as that module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                # jaxtyping loads jax when its Array is asked for
                yield "jax" if full == "jaxtyping.Array" else full if full in known else node.module


def imports(source: str, known=frozenset(), *, at_import: bool = False) -> set[str]:
    """Return the modules that `source` imports anywhere, or only those loaded as soon as it is imported itself."""
    tree = ast.parse(source)
    if not at_import:
        return set(_own_imports(ast.walk(tree), known))
    pending, reached = [tree], []
    while pending:
        node = pending.pop()
        reached.append(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))
    return set(_own_imports(reached, known))


@functools.cache
def modules() -> dict[str, str]:
    """Return {module name: source} of the package."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def upward_imports(module: str, source: str, known) -> list[str]:
    """Return the imports of `source` of higher layers, and of other parts of the same layer."""
    own = [name for name in imports(source, known) if name.split(".")[0] == PACKAGE]
    return [
        name
        for name in own
        if layer(name) > layer(module) or (layer(name) == layer(module) > 0 and part_of(name) != part_of(module))
    ]


def test_the_package_is_found():
    assert {f"{PACKAGE}.config", f"{PACKAGE}.data.pipeline", f"{PACKAGE}.models.vit", PACKAGE} <= set(modules())


def test_imports_go_down():
    known = set(modules())
    found = {module: upward_imports(module, source, known) for module, source in modules().items()}
    assert {module: upward for module, upward in found.items() if upward} == {}


def test_data_never_imports_jax():
    known = set(modules())
    for module in (name for name in modules() if part_of(name) == "data"):
        written = imports(modules()[module], known)
        pending, loaded = [module], set()
        while pending:
            name = pending.pop()
            loaded.add(name)
            if name in known:
                pending += imports(modules()[name], known, at_import=True) - loaded
        assert not {name for name in written | loaded if name.split(".")[0] in ACCELERATOR}, module


def test_nothing_imports_benchmarks():
    users = {
        module
        for module, source in modules().items()
        if any(name.split(".")[0] == "benchmarks" for name in imports(source))
    }
    assert users == set()


def test_configs_import_only_config_and_sizes():
    allowed = {f"{PACKAGE}.config", f"{PACKAGE}.config.sections", f"{PACKAGE}.sizes"}
    for path in sorted((ROOT / "configs").glob("*.py")):
        assert imports(path.read_text(), allowed) <= {*allowed, "ml_collections"}, path


def test_config_dicts_stop_at_tasks():
    for module in (name for name in modules() if layer(name) < LAYERS["tasks"] and part_of(name) != "config"):
        source = modules()[module]
        assert not {name for name in imports(source) if name.split(".")[0] == "ml_collections"}, module
        names = {getattr(node, "id", None) or getattr(node, "attr", None) for node in ast.walk(ast.parse(source))}
        assert "ConfigDict" not in names, module


@pytest.mark.parametrize(
    "module, source, expected",
    [
        ("models.vit", "from beitv2_jax.models import layers", []),
        ("models.vit", "from beitv2_jax import rng", []),
        ("models.layers", "from beitv2_jax.models import vit", ["beitv2_jax.models.vit"]),
        ("models.layers", "def f():\n    import beitv2_jax.models.vit", ["beitv2_jax.models.vit"]),
        ("data.masking", "from beitv2_jax.models import layers", ["beitv2_jax.models.layers"]),
        ("tasks.mim", "from beitv2_jax.training.loop import train", ["beitv2_jax.training.loop"]),
        ("tasks.mim", "from beitv2_jax.tasks import inputs", []),
        ("rng", "from beitv2_jax import typing", []),
        ("rng", "from beitv2_jax.data import masking", ["beitv2_jax.data.masking"]),
    ],
)
def test_upward_imports_are_found(module, source, expected):
    known = {
        f"{PACKAGE}.{name}" for name in ("models.layers", "models.vit", "data.masking", "tasks.inputs", "rng", "typing")
    }
    assert upward_imports(f"{PACKAGE}.{module}", source, known) == expected


def test_imports_at_import_time_are_distinguished_from_later_ones():
    source = "try:\n    import a\nexcept ImportError:\n    import b\ndef f():\n    import c\nclass K:\n    import d\n"
    assert imports(source, at_import=True) == {"a", "b", "d"}
    assert imports(source) == {"a", "b", "c", "d"}
    assert imports("from jaxtyping import Array, Float") == {"jax", "jaxtyping"}
