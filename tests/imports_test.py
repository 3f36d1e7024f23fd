"""Who may import whom, read from the source: every module stands on one floor and imports go down only."""

import ast
import functools

import pytest
from paths import ROOT

PACKAGE = "beitv2_jax"
ROOMS = {
    "typing": 0,
    "errors": 0,
    "rng": 0,
    "sizes": 0,
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
    "planning": 9,
    "main": 10,
}
ACCELERATOR = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}


def floor(module: str) -> int:
    """Return the floor of 'beitv2_jax.models.vit'; the package itself (its docstring) is below all."""
    name = module.removeprefix(PACKAGE).lstrip(".")
    while name and name not in ROOMS:
        name = name.rpartition(".")[0]
    assert name or module == PACKAGE, f"{module} stands on no floor: add it to ROOMS"
    return ROOMS[name] if name else -1


def room(module: str) -> str:
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


def climbs(module: str, source: str, known) -> list[str]:
    """Return the imports of `source` that go up, or sideways into another room of the same floor."""
    own = [name for name in imports(source, known) if name.split(".")[0] == PACKAGE]
    return [
        name
        for name in own
        if floor(name) > floor(module) or (floor(name) == floor(module) > 0 and room(name) != room(module))
    ]


def test_the_package_is_found():
    assert {f"{PACKAGE}.config", f"{PACKAGE}.data.pipeline", f"{PACKAGE}.models.vit", PACKAGE} <= set(modules())


def test_imports_go_down():
    known = set(modules())
    found = {module: climbs(module, source, known) for module, source in modules().items()}
    assert {module: upward for module, upward in found.items() if upward} == {}


def test_data_never_imports_jax():
    known = set(modules())
    for module in (name for name in modules() if room(name) == "data"):
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
    allowed = {f"{PACKAGE}.config", f"{PACKAGE}.sizes"}
    for path in sorted((ROOT / "configs").glob("*.py")):
        assert imports(path.read_text(), allowed) <= {*allowed, "ml_collections"}, path


def test_config_dicts_stop_at_tasks():
    for module in (name for name in modules() if floor(name) < ROOMS["tasks"] and room(name) != "config"):
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
def test_the_walk_sees_what_it_should(module, source, expected):
    known = {
        f"{PACKAGE}.{name}" for name in ("models.layers", "models.vit", "data.masking", "tasks.inputs", "rng", "typing")
    }
    assert climbs(f"{PACKAGE}.{module}", source, known) == expected


def test_imports_at_import_time_are_told_from_later_ones():
    source = "try:\n    import a\nexcept ImportError:\n    import b\ndef f():\n    import c\nclass K:\n    import d\n"
    assert imports(source, at_import=True) == {"a", "b", "d"}
    assert imports(source) == {"a", "b", "c", "d"}
    assert imports("from jaxtyping import Array, Float") == {"jax", "jaxtyping"}
