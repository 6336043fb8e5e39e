"""Counts the bytes that code would allocate, without allocating them.

On torch's `meta` device tensors have a shape but no memory. A `Ledger` sees every operation there.
It counts the bytes of a tensor from its creation until it and all views of it are deleted.
"""

import functools
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
_aten = torch.ops.aten


class Ledger(TorchDispatchMode):
    """A context that counts the bytes of meta tensors, by account.

    A tensor belongs to the `account` that was set when it was created. `live` are the bytes in use
    by account, `peak` their largest values; `total` and `highest` are the same for all accounts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.account = ""
        self.live: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = defaultdict(int)
        self.total = 0
        self.highest, self.highest_in = 0, ""  # peak of `total`, and the account at that time
        self._known: dict[int, weakref.ref] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # with True torch would import its compiler, which takes a second

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is None and torch.Tag.pointwise in func.tags and "out" not in kwargs:
            rule = _in_place if func._schema.is_mutable else _broadcast
        if rule is not None and (rule is _arange or any(x.is_meta for x in _tensors(args))):
            out = rule(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        for tensor in _tensors(out if isinstance(out, tuple | list) else (out,)):
            if tensor.is_meta:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size, account = storage._cdata, storage.nbytes(), self.account
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.live[account] -= size
            self.total -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live[account] += size
        self.peak[account] = max(self.peak[account], self.live[account])
        self.total += size
        if self.total > self.highest:
            self.highest, self.highest_in = self.total, account


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """All tensors in arguments or results, also those inside lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


# For many operations on meta tensors torch computes the shapes of the results in Python code whose
# first call imports its compiler. That would add a second to the start of every run, so the
# functions below compute the results of those operations that runs use.


def _broadcast(func: Any, args: tuple, kwargs: dict) -> Any:
    """Elementwise operations: results have the shape that the inputs broadcast to. The operation on
    tensors of one element on the CPU tells the types."""
    shape = torch.broadcast_shapes(*(x.shape for x in _tensors(args)))
    small = [torch.ones([1] * x.dim(), dtype=x.dtype) if isinstance(x, Tensor) else x for x in args]
    return _like(func(*small, **kwargs), lambda _: shape)


def _in_place(func: Any, args: tuple, kwargs: dict) -> Tensor:
    """Operations in place: the result is the first input."""
    return args[0]


def _reduced(func: Any, args: tuple, kwargs: dict) -> Any:
    """Reductions and scans: the result has some of the axes of the first input.

    To find out which, the operation runs on a small CPU tensor whose axes all have different sizes.
    """
    sizes = range(2, 2 + args[0].dim())
    whole = dict(zip(sizes, args[0].shape, strict=True)) | {1: 1}
    small = func(torch.ones(tuple(sizes), dtype=args[0].dtype), *args[1:], **kwargs)
    return _like(small, lambda shape: [whole[size] for size in shape])


def _like(small: Any, shape: Callable[[Sequence[int]], Sequence[int]]) -> Any:
    if isinstance(small, Tensor):
        return torch.empty(shape(small.shape), dtype=small.dtype, device=META)
    return tuple(_like(one, shape) for one in small)


def _cat(func: Any, args: tuple, kwargs: dict) -> Tensor:
    parts, axis = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    full = [x for x in parts if x.shape != (0,)] or parts  # torch.cat ignores tensors of shape (0,)
    shape = list(full[0].shape)
    shape[axis] = sum(x.shape[axis] for x in full)
    return torch.empty(shape, dtype=_promoted(parts), device=META)


def _stack(func: Any, args: tuple, kwargs: dict) -> Tensor:
    parts, axis = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    shape = list(parts[0].shape)
    shape.insert(axis % (len(shape) + 1), len(parts))
    return torch.empty(shape, dtype=_promoted(parts), device=META)


def _arange(func: Any, args: tuple, kwargs: dict) -> Tensor:
    if kwargs.get("device") != META:
        return func(*args, **kwargs)
    start, end, step = (0, *args, 1) if len(args) == 1 else (*args, 1)[:3]
    whole = all(isinstance(number, int) for number in args)
    dtype = kwargs.get("dtype") or (torch.int64 if whole else torch.get_default_dtype())
    return torch.empty(max(0, math.ceil((end - start) / step)), dtype=dtype, device=META)


def _promoted(parts: Sequence[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in parts))


def _each(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    together = zip(*(part for part in args if isinstance(part, tuple | list)), strict=True)
    return [torch.empty(x[0].shape, dtype=_promoted(x), device=META) for x in together]


_RULES: dict[Any, Callable[[Any, tuple, dict], Any]] = {
    **dict.fromkeys((_aten.arange.default, _aten.arange.start, _aten.arange.start_step), _arange),
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    **dict.fromkeys(
        (
            _aten.floor_divide.default,
            _aten.log_sigmoid_forward.default,
            _aten.log_sigmoid_backward.default,
            _aten.softplus_backward.default,
            _aten._softmax_backward_data.default,
        ),
        _broadcast,
    ),
    **dict.fromkeys(
        (
            _aten.all.default,
            _aten.any.dim,
            _aten.cumprod.default,
            _aten.cumsum.default,
            _aten.linalg_vector_norm.default,
            _aten.logsumexp.default,
            _aten.mean.dim,
            _aten.std.correction,
            _aten._safe_softmax.default,
        ),
        _reduced,
    ),
    **dict.fromkeys((_aten._foreach_div.List, _aten._foreach_sqrt.default), _each),
}
