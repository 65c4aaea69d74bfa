"""The rooms of the package, and that imports run one way."""

from __future__ import annotations

import ast
from pathlib import Path

import megatron_sharpness

PACKAGE = Path(megatron_sharpness.__file__).parent

#: Rooms from the top floor down, as docs/guarantees.md draws them. A room imports from floors below
#: its own alone.
FLOORS = (
    ("cli",),
    ("megatron", "trainers", "sweeps", "verify", "estimate"),
    ("pytorch", "adaptive_mix", "arguments", "processes"),
    ("data", "reference", "report"),
    ("sinks",),
    ("core",),
)

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    ours = (name.split(".") for name in names if name.startswith("megatron_sharpness."))
    return {parts[1] for parts in ours}


def test_every_room_has_its_floor() -> None:
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE}
    rooms |= {room_of(path) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    assert rooms == set(FLOOR)


def test_imports_run_down() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "__init__.py":  # the face
            continue
        room = room_of(path)
        for other in imported(path) - {room}:
            assert FLOOR[other] > FLOOR[room], f"{path.relative_to(PACKAGE)} imports {other}"


def test_the_page_draws_them() -> None:
    page = (PACKAGE.parent / "docs" / "guarantees.md").read_text()
    drawn = page.split("## The code")[1].split("```")[1]
    floors = [line.split("  ")[0] for line in drawn.strip().splitlines()]
    assert [tuple(floor.split(" · ")) for floor in floors] == list(FLOORS)
