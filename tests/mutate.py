"""Changes the structure of trees of plain data and tensors, as a damaged or hostile file would.

Nodes are replaced by others, deleted, renamed or doubled. The numbers in tensors stay as they are.
"""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]

LEAVES: list[tuple[str, Callable[[], Any]]] = [
    ("a text", lambda: "x\x1b[31m"),
    ("None", lambda: None),
    ("a number", lambda: 7),
    ("a huge number", lambda: 10**5000),
    ("a fraction", lambda: float("nan")),
    ("a flag", lambda: True),
    ("bytes", lambda: b"\x00"),
    ("an empty list", list),
    ("an empty dict", dict),
    ("a deep list", lambda: deep(200)),
    ("a scalar tensor", lambda: torch.zeros((), dtype=torch.int16)),
    ("an empty tensor", lambda: torch.zeros(0)),
    ("a tensor without content", lambda: torch.zeros(2, device="meta")),
    ("a sparse tensor", lambda: torch.zeros(2, 2).to_sparse()),
]
TENSORS: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("another type", lambda x: x.to(torch.float64 if x.dtype != torch.float64 else torch.int8)),
    ("one axis more", lambda x: x.unsqueeze(0)),
    ("a row more", lambda x: torch.cat([x, x[:1]]) if x.dim() else x.expand(2)),
    ("flat", lambda x: x.flatten() if x.dim() > 1 else x.view(1, -1)),
    ("no content", lambda x: x.to("meta")),
    ("gradients", lambda x: x.double().requires_grad_()),
]


def deep(levels: int) -> list:
    tree: list = []
    for _ in range(levels):
        tree = [tree]
    return tree


def places(tree: Any, path: Path = ()) -> Iterator[Path]:
    """The paths of all nodes below the root."""
    if isinstance(tree, dict):
        children: Any = tree.items()
    elif isinstance(tree, list | tuple):
        children = enumerate(tree)
    else:
        return
    for key, value in children:
        yield (*path, key)
        yield from places(value, (*path, key))


def found(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def changed(tree: Any, path: Path, change: Callable[[Any], Any]) -> Any:
    """A copy of a tree with one node replaced by `change(node)`; all other nodes are shared."""
    if not path:
        return change(tree)
    key, rest = path[0], path[1:]
    if isinstance(tree, dict):
        return type(tree)((k, changed(v, rest, change) if k == key else v) for k, v in tree.items())
    return type(tree)(changed(v, rest, change) if k == key else v for k, v in enumerate(tree))


def mutations(
    tree: Any, count: int, *, seed: int = 0, beside: tuple[Path, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """Changed copies of a tree, each with a text that says what was changed where.

    Nodes are taken in random order, each of them before any is taken again.

    Args: count, how many copies; beside, paths of nodes that are not changed, nor any below them.
    """
    dice = random.Random(seed)
    nodes = [p for p in places(tree) if not any(p[: len(b)] == b for b in beside)]
    dice.shuffle(nodes)
    for number in range(count):
        path = nodes[number % len(nodes)]
        what, change = _change(found(tree, path), dice)
        if what in ("deleted", "renamed", "doubled"):
            path, key = path[:-1], path[-1]
            yield f"{path} {key!r} {what}", changed(tree, path, _of_parent(what, key))
        else:
            yield f"{path} becomes {what}", changed(tree, path, change)


def _change(node: Any, dice: random.Random) -> tuple[str, Callable[[Any], Any]]:
    kinds: list[tuple[str, Callable[[Any], Any]]] = [
        (name, lambda _, make=make: make()) for name, make in LEAVES
    ]
    if isinstance(node, Tensor):
        kinds += 2 * TENSORS
    if isinstance(node, dict):
        kinds += [("longer", lambda x: {**x, "\x1b[2J": 1}), ("ordered", OrderedDict)]
    if isinstance(node, list | tuple):
        kinds += [("longer", lambda x: type(x)([*x, 0])), ("shorter", lambda x: x[:-1])]
    if dice.random() < 0.4:
        return dice.choice(["deleted", "renamed", "doubled"]), lambda x: x
    return dice.choice(kinds)


def _of_parent(what: str, key: Any) -> Callable[[Any], Any]:
    def change(parent: Any) -> Any:
        if not isinstance(parent, dict):
            rest = [v for k, v in enumerate(parent) if k != key]
            return type(parent)(rest if what == "deleted" else [*parent, parent[key]])
        rest = {k: v for k, v in parent.items() if k != key}
        if what == "deleted":
            return rest
        return {**(rest if what == "renamed" else parent), f"{key}x": parent[key]}

    return change
