"""The code's rooms: imports point one way, and a name means one thing."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sppnet_jax"
# A room may import those of the floors above it in this list, and itself.
FLOORS = (
    {"run", "pyramid", "exported"},
    {"data", "network"},
    {"buckets"},
    {"training"},
    {"classification"},
    {"detection"},
    {"exports"},
    {"benchmarks"},
)
COMMANDS = {
    *("train", "evaluate", "predict", "features", "detect", "export", "bench"),
    "inspect",
}
# On top of all rooms; commands may use these, and not each other.
ABOVE = {"cli", "ablation", "__init__"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(file: Path) -> set[str]:
    """The project's modules that a file imports, wherever in it: "pyramid.pooling"."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports hide where they lead"
            module = node.module or ""
            for alias in node.names:
                inner = PACKAGE.parent / Path(*module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                found.add(f"{module}.{alias.name}" if is_module else module)
    return {
        name.removeprefix("sppnet_jax.")
        for name in found
        if name.startswith("sppnet_jax.")
    }


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    room, *inner = file.relative_to(PACKAGE).with_suffix("").parts
    for module in sorted(imports_of(file)):
        used = module.split(".")[0]
        if not inner:
            if room in COMMANDS:
                assert used not in COMMANDS - {room}, f"a command imports {module}"
            continue
        assert used not in COMMANDS | ABOVE, f"{room} imports {module}, which is above"
        if used != room:
            below = floor_of(used) < floor_of(room)
            assert below, f"{room} imports {module}, a room that is not below it"
    if room == "pyramid":
        assert all(module.startswith("pyramid") for module in imports_of(file))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_config_object_below_the_commands(file):
    if file.parent != PACKAGE:
        assert "ml_collections" not in file.read_text()


def test_few_files_lie_on_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_a_class_name_stands_for_one_thing():
    places = defaultdict(list)
    for file in [*FILES, *sorted((PACKAGE.parent / "experiments").glob("*.py"))]:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(file.relative_to(PACKAGE.parent)))
    assert not {name: files for name, files in places.items() if len(files) > 1}


def test_a_module_name_stands_for_one_thing():
    places = defaultdict(list)
    for file in FILES:
        name = file.parent.name if file.stem == "__init__" else file.stem
        # Rooms have pictures of their own, and all of them are just that.
        if name != "pictures":
            places[name].append(str(file.relative_to(PACKAGE)))
    assert not {name: files for name, files in places.items() if len(files) > 1}
