"""Imports run one way. The graph is drawn from the source, imports inside functions included."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nar_t2i"
# From the bottom to the top. A module imports from its own room and from lower layers; a row holds rooms side by side,
# which do not import each other.
LAYERS = [
    ["errors", "liveness", "nar_t2i"],
    ["recipe", "hardware", "provenance", "hashing", "files"],
    ["types", "noise", "schedules", "parts", "pixels"],
    ["folders"],
    ["data"],
    ["networks"],  # whose shared layers text encoders are made of
    ["tokenizers", "text"],
    ["learning", "inference"],
    ["pipeline", "editing", "pictures"],
    ["prepare"],
    ["evaluation"],
    ["training", "generate"],
    ["quickstart", "ablate", "evaluate", "suite", "amused"],
    ["cli"],
    ["__main__"],
]
# Rooms at the bottom that lean on each other, file by file; the test for circles still holds there.
TOGETHER = {"types", "noise", "schedules", "parts", "pixels"}


def imports(tree, module, is_package):
    """Dotted names that a module imports, at its top and inside functions; not those under TYPE_CHECKING."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, node.module] if node.module else parts)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def read(folder):
    """Each module of a package and the modules of it that it imports."""
    files = {}
    for path in folder.rglob("*.py"):
        parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for module, path in files.items():
        named = imports(ast.parse(path.read_text(encoding="utf-8")), module, path.name == "__init__.py")
        targets = set()
        for name in named:
            while name and name not in files:  # `from package.module import name` → package.module
                name = name.rpartition(".")[0]
            if name and name != module:
                targets.add(name)
        graph[module] = targets
    return graph


def circle(graph):
    """One circle of modules, or None. A package's __init__ gathers its modules, which is no arrow."""
    done, path = set(), []

    def walk(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        path.append(module)
        for target in sorted(graph.get(module, ())):
            if found := walk(target):
                return found
        path.pop()
        done.add(module)
        return None

    return next((found for module in sorted(graph) if (found := walk(module))), None)


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def wrong_arrows(graph, layers=LAYERS, together=TOGETHER):
    height = {name: level for level, names in enumerate(layers) for name in names}
    wrong = []
    for module, targets in graph.items():
        for target in targets:
            here, there = room(module), room(target)
            if here == there or {here, there} <= together:
                continue
            if here not in height or there not in height:
                wrong.append(f"{module} → {target}: a room without a layer")
            elif height[there] >= height[here]:
                wrong.append(f"{module} → {target}")
    return wrong


def test_no_arrow_points_upwards():
    assert wrong_arrows(read(PACKAGE)) == []


def test_there_is_no_circle():
    assert circle(read(PACKAGE)) is None


def test_every_room_has_a_layer():
    named = {name for names in LAYERS for name in names}
    rooms = {path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    rooms |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= named


def test_recipe_imports_errors_only():
    assert read(PACKAGE)["nar_t2i.recipe"] <= {"nar_t2i.errors"}


@pytest.fixture
def package(tmp_path):
    def write(**files):
        folder = tmp_path / "nar_t2i"
        for name, text in files.items():
            path = folder / (name.replace("__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            (path.parent / "__init__.py").touch()
        (folder / "__init__.py").touch()
        return read(folder)

    return write


def test_control_a_circle_is_found(package):
    graph = package(learning__a="from nar_t2i.learning import b", learning__b="def f():\n    from .a import x")
    assert circle(graph) == ["nar_t2i.learning.a", "nar_t2i.learning.b", "nar_t2i.learning.a"]


@pytest.mark.parametrize(
    "files, wrong",
    [
        ({"data__a": "import nar_t2i.networks.b", "networks__b": ""}, "nar_t2i.data.a → nar_t2i.networks.b"),
        (
            {"learning__a": "def f():\n    from nar_t2i.inference.b import x", "inference__b": ""},
            "nar_t2i.learning.a → nar_t2i.inference.b",
        ),
        ({"inference__a": "from ..learning import b", "learning__b": ""}, "nar_t2i.inference.a → nar_t2i.learning.b"),
        ({"types": "from nar_t2i.data import b", "data__b": ""}, "nar_t2i.types → nar_t2i.data.b"),
        ({"evaluation__a": "from nar_t2i.training.b import x", "training__b": ""}, "nar_t2i.evaluation.a → nar_t2i.training.b"),
        ({"attic__a": "from nar_t2i import errors", "errors": ""}, "nar_t2i.attic.a → nar_t2i.errors: a room without a layer"),
    ],
)
def test_control_a_wrong_arrow_is_found(package, files, wrong):
    assert wrong_arrows(package(**files)) == [wrong]


def test_control_right_arrows_and_type_checking_pass(package):
    graph = package(
        networks__a="from nar_t2i.types import x\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from nar_t2i.learning import b",
        learning__b="from nar_t2i.networks.a import y",
        types="",
    )
    assert wrong_arrows(graph) == [] and circle(graph) is None
    assert graph["nar_t2i.learning.b"] == {"nar_t2i.networks.a"}
