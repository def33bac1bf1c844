"""The rooms' arrows point down: a module imports only from rooms on lower floors, or from its own."""

import ast
from pathlib import Path

import bonetune

ROOT = Path(bonetune.__file__).parent
# From the ground up. Rooms on one floor do not know each other.
FLOORS = [
    {"errors"},
    {"files", "diagnostics", "torch_files"},
    {"spec"},
    {"ops"},
    {"tuner"},
    {"data", "rwkv"},
    {"losses", "metrics", "models"},
    {"formats"},
    {"certificates"},
    {"merging", "conversion", "hub", "evaluation", "training", "tokenization"},
    {"demonstration", "experiments"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            assert not name.startswith("bonetune_cli"), f"{path} imports the command line"
            if name.startswith("bonetune."):
                yield name.split(".")[1]


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in ROOT.rglob("*.py")} - {"__init__"}
    assert rooms == set(FLOOR)


def test_arrows_point_down():
    upward = [
        f"{path.relative_to(ROOT)} imports {room}"
        for path in ROOT.rglob("*.py")
        if room_of(path) != "__init__"
        for room in imported_rooms(path)
        if room != room_of(path) and FLOOR[room] >= FLOOR[room_of(path)]
    ]
    assert not upward


def test_only_the_tuner_knows_pefts_internals():
    public = ("peft", "peft.optimizers")
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and room_of(path) != "tuner":
                module = node.module or ""
                assert module in public or not module.startswith("peft."), f"{path.relative_to(ROOT)} imports {module}"


def test_ops_need_torch_alone_and_their_kernels_triton():
    standard = {"math", "os", "typing", "collections", "contextlib", "dataclasses", "functools", "importlib"}
    for path in (ROOT / "ops").rglob("*.py"):
        allowed = standard | {"torch", "bonetune"} | ({"triton"} if path.parent.name == "kernels" else set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] in allowed, node.module
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
