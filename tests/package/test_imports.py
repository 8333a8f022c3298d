"""Imports go one way, those for the type checker included: no module imports, by whatever way, one that imports it, and each
layer imports only layers below."""

import ast
import graphlib
from pathlib import Path

import pytest

import kto_kernels

ROOT = Path(kto_kernels.__file__).parent
# From the bottom up. A package is one layer with all its modules; what lies in none is named with its package.
LAYERS = [
    ("reference", "checks", "releases", "_requirements", "_version"),
    ("scalars",),
    ("options",),
    ("records",),
    ("backends",),
    ("parallel",),
    ("objectives",),
    ("terms",),
    ("pairs",),
    ("linear",),
    ("ops",),
    ("inputs", "output"),
    ("engine",),
    ("loss", "preference", "stages"),
    ("modules",),
    ("integrations", "selftest"),
    ("__init__",),
    ("__main__",),
]


def name_of(path: Path) -> str:
    """The name of a module, below `kto_kernels`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


EXTENSIONS = ("_cpu", "_cuda", "_cuda_emulation")
MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in its text."""
    path = MODULES[name]
    package = path.parent.relative_to(ROOT).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.ImportFrom) and node.level):
            continue
        base = ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module])))
        for alias in node.names:
            inside = f"{base}.{alias.name}" if base else alias.name
            if inside in EXTENSIONS:
                continue
            found.add(inside if inside in MODULES else base or "__init__")
    return found - {name}


def layer(name: str) -> int:
    (found,) = (i for i, names in enumerate(LAYERS) if name.split(".")[0] in names)
    return found


def test_no_module_is_imported_in_a_circle():
    graph = {name: imports(name) for name in MODULES}
    assert sum(map(len, graph.values())) > 100  # the walk sees imports at all
    assert not {"__init__"} & set().union(*(graph[name] for name in MODULES if name != "__main__"))
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_each_layer_imports_only_layers_below():
    for name in MODULES:
        for other in imports(name):
            same_package = name.split(".")[0] == other.split(".")[0]
            assert layer(other) < layer(name) or (layer(other) == layer(name) and same_package), (name, other)
