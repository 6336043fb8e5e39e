"""The house: which file may import which, and how long a file may be.

A room is a package of cerl or a file beside them; `agents` and `envs` are rooms too.
"""

import ast
import functools
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES, KERNEL_LINES, LOOP_LINES = 450, 600, 120
# What kernels may import beside each other: they are of use without the rest of cerl.
FOUNDATION = {"torch", "triton", "numpy"}
# Only these put the parts of a run together, so only they know agents.
KNOW_AGENTS = {"cerl.wiring"}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module by its name, e.g. cerl.agents.dqn for agents/dqn.py."""
    found = {}
    for top, prefix in (("cerl", ()), ("agents", ("cerl",)), ("envs", ("cerl",))):
        for path in (ROOT / top).rglob("*.py"):
            parts = (*prefix, *path.relative_to(ROOT).with_suffix("").parts)
            if top == "cerl" and parts[1] in ("agents", "envs", "configs"):
                continue  # links to the folders beside cerl/
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imports(module: str) -> frozenset[str]:
    """What a module imports, anywhere in its text, as names of modules."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules() else node.module)
    return frozenset(found - {module})


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "cerl"


def ours(module: str) -> set[str]:
    """The modules of cerl that a module imports.

    The front door, `cerl` itself, is left out: it imports what it names when that is first used.
    """
    if module == "cerl":
        return set()
    return {name for name in imports(module) if name in modules()}


def check_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("circle of imports: " + " <- ".join(error.args[1]))


def test_the_walk_sees_every_kind_of_import():
    assert len(modules()) > 150
    assert {"cerl.collect", "cerl.agents.dqn", "cerl.envs"} <= ours("cerl.wiring")
    assert "cerl.kernels.conv_triton" in ours("cerl.kernels.conv")  # an import within a function
    with pytest.raises(pytest.fail.Exception, match="a <- b|b <- a"):
        check_no_circle({"a": {"b"}, "b": {"a"}})


def test_no_circle_of_modules():
    check_no_circle({module: ours(module) for module in modules()})


def test_arrows_between_rooms_point_one_way():
    graph: dict[str, set[str]] = {}
    for module in modules():
        others = {room(name) for name in ours(module)} - {room(module), "cerl"}
        graph.setdefault(room(module), set()).update(others)
    check_no_circle(graph)


def test_kernels_stand_alone():
    for module in modules():
        if not module.startswith("cerl.kernels"):
            continue
        for name in imports(module):
            top = name.partition(".")[0]
            alone = name.startswith("cerl.kernels") or top in FOUNDATION
            standard = top in sys.stdlib_module_names
            assert alone or standard, f"{module} imports {name}"


def test_only_the_wiring_knows_agents_and_nobody_imports_the_command_line():
    for module in modules():
        for name in ours(module):
            assert name != "cerl.__main__", f"{module} imports the command line"
            if name.startswith("cerl.agents") and not module.startswith("cerl.agents"):
                assert module in KNOW_AGENTS, f"{module} imports {name}"


def test_no_file_is_too_long():
    for module, path in modules().items():
        kernel = module.startswith("cerl.kernels")
        most = KERNEL_LINES if kernel else LOOP_LINES if module == "cerl.training" else LINES
        count = len(path.read_text().splitlines())
        assert count <= most, f"{path}: {count} lines, expected at most {most}"
