"""Checks the content of a checkpoint: nested dicts, lists and tuples of plain data and tensors.

The whole tree is compared with the one that the run expects before any part of it is used, so that
the functions that load the parts can rely on its structure.
"""

import errno
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SCALARS = (int, float, bool, str, bytes, type(None))
SHOWN = 5  # most differences that an error message lists
_DICTS = (dict, OrderedDict)
# Errors that mean that a file is damaged: it is a link or no regular file, the disk cannot read it,
# or offsets in an archive are wrong (None).
_LOST = (None, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EIO)


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read. Files on the disk are unchanged."""


def anything(value: Any) -> str | None:
    """A check for `Free` that accepts everything: the function that loads the subtree checks it."""
    return None


def numbers(value: Any) -> str | None:
    """A check for `Free` that accepts a dict from names to numbers.

    Returns: what is wrong with a value; None if nothing.
    """
    fine = type(value) in _DICTS and all(
        type(key) is str and type(number) in (int, float) for key, number in value.items()
    )
    return None if fine else f"expected numbers by name, got {kind(value)}"


class Free(NamedTuple):
    """Marks a subtree of an expected tree whose content may vary.

    `check` gets the loaded subtree and returns what is wrong with it ("expected ..., got ..."), or
    None.
    """

    check: Callable[[Any], str | None] = anything


def match(expected: Any, got: Any, where: str = "checkpoint") -> None:
    """Compares a loaded tree with an expected one, e.g. the state that this run would save.

    Dicts must have the same keys, lists and tuples the same length, tensors the same shape and type
    (devices may differ), other leaves the same type. A `Free` in the expected tree applies its own
    check.

    Args:   where, what the error message calls the tree.
    Raises: CheckpointError that names the first differences.
    """
    found = list(islice(_differences(expected, got, ""), SHOWN + 1))
    if found:
        more = "; and more" if len(found) > SHOWN else ""
        raise CheckpointError(
            f"{where}: {'; '.join(found[:SHOWN])}{more}. It belongs to a run with other options, "
            "or to another version of cerl: use the one in the run folder's versions.yaml"
        )


def _differences(expected: Any, got: Any, path: str) -> Iterator[str]:
    name = path[1:] or "its root"
    if isinstance(expected, Free):
        complaint = expected.check(got)
        if complaint is not None:
            yield f"{name}: {complaint}"
    elif isinstance(expected, dict):
        if type(got) not in _DICTS:
            yield f"expected {name} with {len(expected)} keys, got {kind(got)}"
            return
        for key in got:
            if key not in expected:
                shown = plain(repr(key)) if isinstance(key, str) else kind(key)
                yield f"expected nothing else in {name}, got {shown}"
        for key, value in expected.items():
            if key in got:
                yield from _differences(value, got[key], f"{path}.{key}")
            else:
                yield f"expected {path[1:]}{'.' if path else ''}{key}, got none"
    elif isinstance(expected, list | tuple):
        if type(got) is not type(expected) or len(got) != len(expected):
            yield f"expected {name}, {kind(expected)}, got {kind(got)}"
            return
        for index, (mine, other) in enumerate(zip(expected, got, strict=True)):
            yield from _differences(mine, other, f"{path}.{index}")
    elif isinstance(expected, Tensor):
        if not _same(expected, got):
            yield f"expected {name} of {_shape(expected)}, got {kind(got)}"
    elif type(got) is not type(expected):
        yield f"expected {name} to be {kind(expected)}, got {kind(got)}"


def _same(expected: Tensor, got: Any) -> bool:
    """Whether a value is a plain tensor of the expected shape and type."""
    return (
        isinstance(got, Tensor)
        and got.layout is torch.strided
        and not (got.is_meta or got.is_nested or got.requires_grad)
        and got.shape == expected.shape
        and got.dtype == expected.dtype
    )


def _shape(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)} and {str(tensor.dtype).removeprefix('torch.')}"


def kind(value: Any) -> str:
    """The type and size of a value, as text for error messages, without its content."""
    if isinstance(value, Tensor):
        if value.is_nested or value.layout is not torch.strided:
            return f"a tensor of layout {str(value.layout).removeprefix('torch.')}"
        where = " without content" if value.is_meta else ""
        where += " that requires gradients" if value.requires_grad else ""
        return f"{_shape(value)}{where}"
    if type(value) in _DICTS:
        return f"a dict of {len(value)} keys"
    if type(value) in (list, tuple):
        return f"a {type(value).__name__} of length {len(value)}"
    return "None" if value is None else type(value).__name__


def plain(text: str, limit: int = 100) -> str:
    """Text from a file, made safe to print: on one line, control characters escaped, cut off after
    `limit` characters."""
    shown = text[:limit] + ("..." if len(text) > limit else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def lost(path: Path, error: OSError) -> str:
    """Why a file counts as damaged, after reading it failed with `error`.

    Raises: CheckpointError if the file may be intact, since the reason may pass (rights, memory,
            number of open files).
    """
    if error.errno == errno.ENOENT:
        return "the file is gone"
    if error.errno in _LOST:
        return error.strerror or str(error)
    raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All leaves of a tree (what is no dict, list or tuple), each with its path, e.g. "a.0.b"."""
    if type(node) in _DICTS:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif type(node) in (list, tuple):
        for index, value in enumerate(node):
            yield from leaves(value, f"{path}.{index}" if path else str(index))
    else:
        yield path, node


def size(tree: dict[str, Any]) -> int:
    """Bytes of all tensors of a tree; memory that tensors share counts once.

    Raises: ValueError if the tree has a leaf that could not be loaded again.
    """
    storages = {}
    for path, leaf in leaves(tree):
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()
            storages[leaf.device, storage.data_ptr()] = storage.nbytes()
        elif type(leaf) not in SCALARS:
            raise ValueError(
                f"checkpoint state at {path or 'its root'}: expected tensors, numbers, "
                "strings, bytes or None in dicts, lists and tuples, got "
                f"{type(leaf).__name__}, which could not be loaded again (arrays: torch.from_numpy)"
            )
    return sum(storages.values())


def put(mine: Tensor, saved: Tensor, *, what: str) -> None:
    """Copies a saved tensor into `mine`, in place.

    Args:   what, what the error message calls the tensor.
    Raises: CheckpointError if the saved one has another shape or type.
    """
    if mine.shape != saved.shape or mine.dtype != saved.dtype:
        raise CheckpointError(
            f"checkpoint: expected {what} of shape {list(mine.shape)} and {mine.dtype}, got "
            f"{list(saved.shape)} and {saved.dtype}; it belongs to a run with other options"
        )
    with torch.no_grad():
        mine.copy_(saved)


def put_net(net: nn.Module, saved: Mapping[str, Tensor], *, what: str) -> None:
    """Copies a saved state of a network into it, in place.

    Args:   what, what the error message calls the network.
    Raises: CheckpointError if the saved state has other tensors, shapes or types.
    """
    mine = net.state_dict()
    missing, left = sorted(mine.keys() - saved.keys()), sorted(saved.keys() - mine.keys())
    if missing or left:
        raise CheckpointError(
            f"checkpoint: expected {', '.join(missing) or 'nothing else'} in {what}, got "
            f"{', '.join(left) or 'nothing'} instead; it belongs to a run with other options, or "
            "to another version of cerl: use the one in the run folder's versions.yaml"
        )
    for name, tensor in mine.items():
        put(tensor, saved[name], what=f"{what}.{name}")
