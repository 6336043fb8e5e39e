"""Turns a recording into a list of calls to make, with the memory that they need.

Left out are operations that only view tensors, whose results are the same every time, that were
made before with the same arguments, and whose results nobody reads. All others write their results
into memory that is allocated once; parts of it that are free are used again.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from cerl.tape.record import Call, Memory, Place, Recording, flat, mapped

# Operations without arithmetic between elements at different places: their result may be written
# over an argument of the same shape.
_POINTWISE = {
    *("add", "sub", "mul", "div", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "tanh", "relu"),
    *("clamp", "clamp_min", "threshold_backward", "tanh_backward", "where", "lerp", "addcmul"),
    *("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "__rshift__", "rsub", "pow"),
    *("remainder", "floor_divide", "reciprocal", "cos", "sigmoid", "sgn", "logical_not"),
}
# Functions of `torch` that make the operation of the same name, faster than the operator itself.
_FAST = {
    *("abs", "add", "addcmul", "argmax", "bitwise_and", "bitwise_not", "bitwise_or"),
    *("bitwise_xor", "bmm", "cat", "clamp", "cos", "div", "eq", "exp", "floor_divide"),
    *("gather", "ge", "gt", "index_select", "le", "lerp", "log", "lt", "mm", "mul", "ne"),
    *("neg", "pow", "reciprocal", "remainder", "rsqrt", "sgn", "sqrt", "sub", "tanh", "where"),
}

LARGE = 16 << 20  # bytes

_aten = torch.ops.aten
_ALLOCATING = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty}
_ALLOCATING |= {_aten.new_empty_strided}
_COPYING = {_aten._to_copy, _aten.clone}

# Operations with a number that cannot write into given memory, and the function that can.
_WITH_NUMBER: dict[str, Callable[..., Any]] = {
    "rsub": lambda x, number, *, out: torch.sub(number, x, out=out),
    "__rshift__": torch.bitwise_right_shift,
    "bitwise_and": torch.bitwise_and,
    "remainder": torch.remainder,
}
# Operations on lists of tensors that are made one tensor after the other on a CPU, as by PyTorch.
_LISTS = {"_foreach_sqrt": torch.sqrt, "_foreach_div": torch.div}


class Tape(NamedTuple):
    """A function as a list of calls without arguments."""

    calls: list[Callable[[], object]]
    names: list[str]  # of the operations that the calls make
    bytes: int  # memory that the tape holds between two plays
    # Memory outside it that it changes, as bytes; without large memories of which it only writes
    # single rows, such as those of replay.
    writes: list[torch.Tensor]

    def play(self) -> None:
        """Does what the recorded function did."""
        with torch.inference_mode():
            for call in self.calls:
                call()


def plan(recording: Recording) -> Tape:
    """The tape of a recording."""
    memories = recording.memories
    calls = _useful(_distinct(_computing(recording.calls), memories), memories)
    constant = _constants(calls, memories)
    calls = [call for call in calls if not _made(call) or not _made(call) <= constant]
    slots = _slots(calls, memories, constant)
    tensors = _Tensors(memories, slots)
    steps = [(str(call.operation), step) for call in calls for step in _steps(call, tensors)]
    writes = [_as_bytes(memories[k]) for k in _changed(calls, memories)]
    return Tape([step for _, step in steps], [name for name, _ in steps], slots.bytes, writes)


def _made(call: Call) -> set[int]:
    """Memories that a call allocates."""
    read = {place.memory for place in flat((call.args, call.kwargs))}
    return {place.memory for place in call.results} - read


def _touched(call: Call) -> set[int]:
    """Memories that a call reads, or changes in part."""
    return {place.memory for place in flat((call.args, call.kwargs))}


def _computing(calls: Iterable[Call]) -> list[Call]:
    """Calls that do more than view a tensor."""
    return [call for call in calls if call.writes or _made(call)]


def _distinct(calls: list[Call], memories: Sequence[Memory]) -> list[Call]:
    """Without calls that repeat an earlier one with the same arguments."""
    changed = {memory for call in calls for memory in call.writes}
    versions = [0] * len(memories)
    instead: dict[int, int] = {}  # memory of a repeated result -> that of the first one
    seen: dict[Any, Call] = {}
    kept = []
    for call in calls:
        call = _moved(call, instead)
        for memory in call.writes:
            versions[memory] += 1
        mine = _made(call)
        if call.writes or mine & changed:
            kept.append(call)
            continue
        state = tuple(sorted((k, versions[k]) for k in _touched(call)))
        key = repr((call.operation, call.args, call.kwargs, state))
        first = seen.setdefault(key, call)
        if first is call:
            kept.append(call)
        else:
            pairs = zip(call.results, first.results, strict=True)
            instead |= {new.memory: old.memory for new, old in pairs}
    return kept


def _moved(call: Call, instead: dict[int, int]) -> Call:
    """A call with other memories in the places of its arguments."""

    def other(place: Place) -> Place:
        return place._replace(memory=instead.get(place.memory, place.memory))

    return call._replace(
        args=mapped(call.args, other, Place), kwargs=mapped(call.kwargs, other, Place)
    )


def _useful(calls: list[Call], memories: Sequence[Memory]) -> list[Call]:
    """Without calls whose results nobody reads."""
    needed, kept = set[int](), []
    for call in reversed(calls):
        outer = any(not memories[k].inner for k in call.writes)
        if outer or not needed.isdisjoint((*call.writes, *_made(call))):
            needed |= _touched(call)
            kept.append(call)
    return kept[::-1]


def _constants(calls: Iterable[Call], memories: Sequence[Memory]) -> set[int]:
    """Memories whose content is the same at every play: made of numbers in the code alone."""
    changed = {memory for call in calls for memory in call.writes}
    constant: set[int] = set()
    for call in calls:
        mine = _made(call)
        if not call.writes and _touched(call) <= constant and mine.isdisjoint(changed):
            constant |= mine
    return constant


class _Slots(NamedTuple):
    """Where memories that the function allocates lie while its tape is played."""

    of: dict[int, torch.Tensor]  # number of a memory -> uint8 [at least its bytes]
    bytes: int


def _slots(calls: Sequence[Call], memories: Sequence[Memory], constant: set[int]) -> _Slots:
    """Gives every memory that is not constant a slot from its first to its last use."""
    last = {k: number for number, call in enumerate(calls) for k in (*_touched(call), *_made(call))}
    free: list[torch.Tensor] = []
    of: dict[int, torch.Tensor] = {}
    total = 0
    for number, call in enumerate(calls):
        mine = [k for k in sorted(_made(call)) if k not in constant]
        ends = {k for k in _touched(call) if last[k] == number and k in of}
        over = _overwritten(call, ends, memories) if len(mine) == 1 else None
        for k in mine:
            need = memories[k].bytes
            if over is not None:
                of[k] = of[over]
                ends.discard(over)
                continue
            fits = [s for s in free if need <= len(s) <= 2 * need + 512]
            slot = min(fits, key=len, default=None)
            if slot is None:
                slot = torch.empty(max(need, 1), dtype=torch.uint8)
                total += need
            else:
                free = [other for other in free if other is not slot]
            of[k] = slot
        ends |= {k for k in mine if last[k] == number}
        free += [of[k] for k in sorted(ends)]
    return _Slots(of, total)


def _overwritten(call: Call, ends: set[int], memories: Sequence[Memory]) -> int | None:
    """An argument that nobody reads later and that a pointwise result may be written over."""
    name = call.operation.overloadpacket.__name__
    if name not in _POINTWISE or len(call.results) != 1:
        return None
    result = call.results[0]
    places = flat((call.args, call.kwargs))
    for place in places:
        same = place._replace(memory=result.memory) == result
        alone = sum(other.memory == place.memory for other in places) == 1
        whole = memories[place.memory].bytes == memories[result.memory].bytes
        if place.memory in ends and same and alone and whole:
            return place.memory
    return None


class _Tensors:
    """The tensors at places; each is made once."""

    def __init__(self, memories: Sequence[Memory], slots: _Slots) -> None:
        self.memories, self.slots = memories, slots
        self.made: dict[Place, torch.Tensor] = {}

    def at(self, place: Place) -> torch.Tensor:
        """The tensor at a place."""
        if place not in self.made:
            slot = self.slots.of.get(place.memory)
            base = self.memories[place.memory].tensor
            storage = (base if slot is None else slot).untyped_storage()
            tensor = torch.empty(0, dtype=place.dtype)
            tensor.set_(storage, place.offset, place.size, place.stride)
            self.made[place] = tensor
        return self.made[place]


def _steps(call: Call, tensors: _Tensors) -> list[Callable[[], object]]:
    """What has to be called to make an operation."""
    args, kwargs = (mapped(tree, tensors.at, Place) for tree in (call.args, call.kwargs))
    results = [tensors.at(place) for place in call.results]
    operation = call.operation
    if call.writes:
        if _made(call):
            raise NotImplementedError(f"{operation} changes one tensor and allocates another")
        return [functools.partial(operation._op, *args, **kwargs)]
    if operation.overloadpacket in _ALLOCATING:
        return []
    if operation.overloadpacket in _COPYING:
        return [functools.partial(torch.Tensor.copy_, results[0], args[0])]
    name = operation.overloadpacket.__name__
    if name in _LISTS and all(isinstance(arg, list) for arg in args):
        parts = zip(*(arg for arg in args if isinstance(arg, list)), results, strict=True)
        return [functools.partial(_LISTS[name], *part[:-1], out=part[-1]) for part in parts]
    if name == "relu":
        return [functools.partial(torch.clamp_min, *args, 0, out=results[0])]
    if name in _WITH_NUMBER and len(args) == 2 and not kwargs and _of_kind(args[1], args[0].dtype):
        number = torch.tensor(args[1], dtype=args[0].dtype)
        return [functools.partial(_WITH_NUMBER[name], args[0], number, out=results[0])]
    out = _out_variant(operation)
    if out is None:
        return [functools.partial(_copied, operation._op, args, kwargs, results)]
    fast = name in _FAST and not kwargs and len(results) == 1
    function = getattr(torch, name) if fast else out[0]._op
    names = ["out"] if fast else out[1]
    listed: Any = results
    if out[0]._schema.arguments[-1].type.kind() == "ListType":
        listed = [results]
    known = {argument.name for argument in out[0]._schema.arguments}
    kwargs = {key: value for key, value in kwargs.items() if key in known}
    return [functools.partial(function, *args, **kwargs, **dict(zip(names, listed, strict=True)))]


def _of_kind(number: Any, dtype: torch.dtype) -> bool:
    """Whether a number is a plain one that a tensor of a type can hold without being rounded."""
    if type(number) is int:
        return dtype == torch.int64
    return type(number) is float and dtype in (torch.float32, torch.float64)


def _copied(
    operation: Callable[..., Any], args: Any, kwargs: Any, results: list[torch.Tensor]
) -> None:
    """Makes an operation that cannot write into given memory, and copies its results there."""
    found = operation(*args, **kwargs)
    found = found if isinstance(found, tuple | list) else (found,)
    for mine, new in zip(results, found, strict=True):
        mine.copy_(new)


@functools.cache
def _out_variant(operation: Any) -> tuple[Any, list[str]] | None:
    """The overload that writes into given tensors, with the names of those; None without one."""
    packet = operation.overloadpacket
    mine = [(a.name, str(a.type)) for a in operation._schema.arguments]
    for name in packet.overloads():
        other = getattr(packet, name)
        arguments = other._schema.arguments
        outs = [a.name for a in arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in arguments if not a.is_out]
        if outs and sorted(rest) == sorted(_sized(mine, rest)):
            return other, outs
    return None


def _sized(mine: list[tuple[str, str]], rest: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without the options of factories (dtype, layout, ...), where the other overload has none."""
    names = {name for name, _ in rest}
    factory = {"dtype", "layout", "device", "pin_memory"}
    return [(name, kind) for name, kind in mine if name in names or name not in factory]


def _changed(calls: Sequence[Call], memories: Sequence[Memory]) -> list[int]:
    """Memories that existed before and are changed, as `Tape.writes` lists them."""
    by: dict[int, set[Any]] = {}
    for call in calls:
        for k in call.writes:
            by.setdefault(k, set()).add(call.operation)
    outer = [k for k in sorted(by) if not memories[k].inner]
    rows = {_aten.index_copy_.default}
    return [k for k in outer if memories[k].bytes < LARGE or not by[k] <= rows]


def _as_bytes(memory: Memory) -> torch.Tensor:
    storage = memory.tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (memory.bytes,), (1,))
