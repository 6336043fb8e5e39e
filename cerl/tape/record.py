"""Records the tensor operations of a function while it runs, below autograd.

A tensor is known by its place: the memory that it lies in, and its sizes and strides there. So a
view needs no operation of its own when the tape is played: the place is all there is to it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# A recording keeps everything alive that the function computes, at most so many bytes.
MOST_BYTES = 1 << 30
# Calls that read numbers on the host. What they return may differ the next time.
_READS = {
    torch.Tensor.__array__,
    torch.Tensor.__dlpack__,
    torch.Tensor.data_ptr,
    torch.Tensor.numpy,
    torch.Tensor.tolist,
}
# Operations that read numbers, so that the host may branch on them, or draw random ones.
_UNREPEATABLE = {torch.Tag.data_dependent_output, torch.Tag.nondeterministic_seeded}
_recording = False


def recording() -> bool:
    """Whether a function is being recorded, so that it must not read numbers on the host."""
    return _recording


class Place(NamedTuple):
    """A tensor as a part of a memory."""

    memory: int  # its number in `Recording.memories`
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # in elements


class Memory(NamedTuple):
    """A memory that tensors lie in."""

    bytes: int
    # Whether the function allocated it; if not, it existed before and the function may change it.
    inner: bool
    tensor: Tensor  # one of the tensors that lie in it, which keeps it alive


class Call(NamedTuple):
    """An operation. In arguments and results a tensor is replaced by its `Place`."""

    operation: Any  # torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Any, ...]  # flat
    writes: tuple[int, ...]  # memories that it changes


class Recording(NamedTuple):
    """All operations of a function, in order."""

    calls: list[Call]
    memories: list[Memory]


class _Reads(TorchFunctionMode):
    """Notices calls that read numbers on the host and that `_Recorder` does not see."""

    read = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.read |= func in _READS
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.memories: list[Memory] = []
        self.numbers: dict[int, int] = {}  # of memories, by their address
        self.bytes, self.trouble = 0, ""

    def made(self, func, types, args=(), kwargs=None):
        """Makes an operation and notes it."""
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if not self.trouble:
            self._note(func, args, kwargs, results)
        return results

    def _note(self, func: Any, args: Any, kwargs: Any, results: Any) -> None:
        if not _UNREPEATABLE.isdisjoint(func.tags) or _sized_by_numbers(func, args):
            self.trouble = f"{func} gives what no tape can repeat"
        given = zip(func._schema.arguments, args, strict=False)
        named = {argument.name: argument for argument in func._schema.arguments}
        written = [v for a, v in given if a.alias_info is not None and a.alias_info.is_write]
        for name, value in kwargs.items():
            info = named[name].alias_info
            if info is not None and info.is_write:
                written.append(value)
        mine = mapped((args, kwargs), self._place_of_input)
        writes = {place.memory for place in flat(mapped(written, self._place_of_input))}
        found = tuple(flat(mapped(results, self._place_of_result)))
        self.calls.append(Call(func, mine[0], mine[1], found, tuple(sorted(writes))))
        if self.bytes > MOST_BYTES:
            self.trouble = "it computes too much to keep"
            self.calls, self.memories = [], []

    def _place_of_input(self, tensor: Tensor) -> Place:
        return self._place(tensor, inner=False)

    def _place_of_result(self, tensor: Tensor) -> Place:
        return self._place(tensor, inner=True)

    def _place(self, tensor: Tensor, *, inner: bool) -> Place:
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_conj() or tensor.is_neg():
            self.trouble = "it works with tensors that are not plain ones on the CPU"
            return Place(-1, tensor.dtype, (), (), 0)
        storage = tensor.untyped_storage()
        number = self.numbers.get(storage._cdata)
        if number is None:
            number = self.numbers[storage._cdata] = len(self.memories)
            # Without its graph, the tensor keeps no other memory alive.
            self.memories.append(Memory(storage.nbytes(), inner, tensor.detach()))
            self.bytes += storage.nbytes() if inner else 0
        size, stride = tuple(tensor.shape), tensor.stride()
        return Place(number, tensor.dtype, size, stride, int(tensor.storage_offset()))


def _sized_by_numbers(operation: Any, args: Any) -> bool:
    """Whether the shape of a result depends on numbers in a tensor."""
    if torch.Tag.dynamic_output_shape not in operation.tags:
        return False
    if operation is not torch.ops.aten.index.Tensor:
        return True
    # Indices of whole numbers give a result of their own shape, flags one of as many as are True.
    return any(index is not None and not index.dtype.is_signed for index in args[1])


# Set after the class is made: in a class with this name torch would wrap the method so that its
# first call imports the compiler, which takes seconds.
_Recorder.__torch_dispatch__ = _Recorder.made


def mapped(tree: Any, function: Callable[[Any], Any], leaf: type = Tensor) -> Any:
    """Nested tuples, lists and dicts with `function` of every leaf of a type."""
    if isinstance(tree, leaf):
        return function(tree)
    if type(tree) in (tuple, list):
        return type(tree)(mapped(part, function, leaf) for part in tree)
    if isinstance(tree, dict):
        return {name: mapped(part, function, leaf) for name, part in tree.items()}
    return tree


def flat(tree: Any) -> list[Place]:
    """All places in nested tuples, lists and dicts, in order."""
    found: list[Place] = []
    mapped(tree, found.append, Place)
    return found


def record(function: Callable[[], None]) -> Recording | str:
    """Runs a function and records its operations.

    The function has run to its end even where it cannot be repeated.

    Returns: the recording, or a sentence that says why the function cannot be repeated from one.
    """
    global _recording
    recorder, reads, before = _Recorder(), _Reads(), _recording
    _recording = True
    try:
        with reads, recorder:
            function()
    finally:
        _recording = before
    if reads.read:
        return "it reads numbers of tensors on the host"
    return recorder.trouble or Recording(recorder.calls, recorder.memories)
