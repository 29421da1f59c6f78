"""Imports run downward: through the rooms, through the rooms inside them, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each room may import. Inside a room, its front (the files that lie in it) may import all of
# its sub-rooms; a sub-room imports what stands here, a file of the front among it by its name.
ROOMS = {
    "kernels": set(),
    "data": set(),
    "parallel": {"kernels"},
    "train": {"kernels", "data", "parallel"},
    "kernels.chunked": {"kernels.backend", "kernels.packing"},
    "kernels.triton": {"kernels.packing"},
    "kernels.tools": {"kernels"},
    "data.sources": {"data.settings"},
    "data.tokens": {"data.regular", "data.settings", "data.sources"},
    "data.storing": {
        "data.config",
        "data.regular",
        "data.settings",
        "data.sources",
        "data.tokens",
    },
    "data.ordering": {"data.batch", "data.config", "data.settings", "data.storing"},
    "parallel.planning": {"parallel.config"},
    "parallel.travel": {
        "parallel.planning",
        "parallel.config",
        "parallel.peers",
        "parallel.timing",
    },
    "parallel.simulation": {"parallel.planning"},
    "train.model": set(),
    "train.optimiser": set(),
    "train.survival": {"train.config", "train.engine"},
    "train.monitor": {"train.config", "train.model.balance", "train.model.config"},
    "train.pretrained": {
        "train.config",
        "train.engine",
        "train.model",
        "train.survival.manifest",
    },
    "train.forecast": {
        "train.config",
        "train.engine",
        "train.experts",
        "train.memory",
        "train.model",
        "train.monitor",
        "train.optimiser",
        "train.planning",
    },
    "train.evaluation": {
        "train.config",
        "train.engine",
        "train.model",
        "train.monitor",
        "train.pretrained",
        "train.survival.manifest",
    },
}
TOP = [room for room in ROOMS if "." not in room]


def modules() -> dict[str, Path]:
    """Every module of the rooms, by its dotted name."""
    found = {}
    for room in TOP:
        for path in (ROOT / room).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str, at_start: bool = False) -> set[str]:
    """The modules of the rooms that one names, anywhere in it or only where it is imported."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are written in full"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
    return (found & MODULES.keys()) - {module}


def within(module: str, rooms: set[str]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def room_of(module: str, rooms: list[str]) -> str:
    """The innermost of the rooms that a module lies in."""
    return max((room for room in rooms if within(module, {room})), key=len)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    top = module.split(".", maxsplit=1)[0]
    room = room_of(module, list(ROOMS))
    for imported in imports(module):
        if not within(imported, {top}):
            assert within(imported, ROOMS[top]), f"{module} imports {imported}"
        elif room != top:
            assert within(imported, {room} | ROOMS[room]), f"{module} imports {imported}"


def test_every_sub_room_has_a_rule_and_says_what_it_is_for() -> None:
    folders = {path.parent for path in MODULES.values()}
    for folder in sorted(folders):
        room = ".".join(folder.relative_to(ROOT).parts)
        assert room_of(room, list(ROOMS)) != room.split(".", maxsplit=1)[0] or room in TOP, room
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert said or room == "train", room


def test_no_module_imports_itself_by_way_of_others() -> None:
    TopologicalSorter({module: imports(module) for module in MODULES}).prepare()


def test_settings_and_plans_import_no_torch() -> None:
    """A typo in a config answers at once, and plans are made where no torch is installed."""
    for start in ("train.config", "parallel.planning.planner", "parallel.simulation.simulate"):
        reached, left = {start}, [start]
        while left:
            module = left.pop()
            text = MODULES[module].read_text(encoding="utf-8")
            for node in ast.parse(text).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                assert not any(name.split(".")[0] == "torch" for name in names), module
            new = imports(module, at_start=True) - reached
            reached |= new
            left += new
