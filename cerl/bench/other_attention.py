"""Attention of others, timed beside ours on the same inputs: `cerl bench attention`.

The authors' operator, torch's attention, torch's FlexAttention with the gate as a change of the
scores, and the forgetting attention of the package flash-linear-attention.
"""

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.bench.attention_work import (
    Calls,
    Work,
    decay_rate,
    gates,
    inputs,
    paired,
    skipped_share,
    threshold,
)
from cerl.kernels.attention.plan import Tiles

GATE_GRADIENT = 4096  # longest T at which FlexAttention's gradient of the gates is timed


class Others(NamedTuple):
    """The implementations of others that are timed."""

    official: Path | None = None  # folder with the authors' file
    sdpa: bool = False
    flex: bool = False
    fla: bool = False

    def names(self, work: Work) -> list[str]:
        """Those of them that can do a work. Only the authors' operator can prune."""
        found = ["official"] if self.official is not None and not work.running else []
        if work.pruned:
            return found
        if self.sdpa and work.gate == "none":
            found += ["flash", "cudnn"]
        if self.flex:
            found.append("flex")
            if not work.step and work.shape.length <= GATE_GRADIENT:
                found.append("flex+gate")
        return found + (["fla"] if self.fla else [])

    def calls(self, name: str, work: Work, device: torch.device) -> Calls:
        """Prepares the calls of one of `names`."""
        if name == "official":
            assert self.official is not None, "its name is in `names` only with a folder"
            make = official_step_calls if work.step else official_calls
            return make(_loaded(self.official), work, device)
        if name in ("flash", "cudnn"):
            return sdpa_calls(name, work, device)
        if name == "fla":
            return fla_calls(work, device)
        return flex_calls(work, device, gate_gradient=name == "flex+gate")


def installed_fla() -> bool:
    """Whether flash-linear-attention can be imported; prints a sentence if not."""
    found = importlib.util.find_spec("fla") is not None
    if not found:
        print(
            "--fla: the package fla is not installed, so its rows are left out; "
            "`pip install flash-linear-attention` brings it",
            flush=True,
        )
    return found


def official_calls(reference: Any, work: Work, device: torch.device) -> Calls:
    """The calls of the authors' operator on the same inputs, under the same threshold."""
    shape = work.shape
    log_f = work_gates(work, device)
    limit = torch.full((shape.heads,), threshold(shape), device=device) if work.pruned else None

    def attend(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> Tensor:
        return reference.forgetting_attention(q, k, v, log_f, adaptive_threshold=limit)

    q, k, v, do = inputs(shape, device=device)
    skipped = 0.0
    if work.pruned:
        batch, length, heads, width = shape
        sizes = reference.get_fwd_config(batch, heads, length, length, width, True)
        skipped = skipped_share(log_f, Tiles(*sizes[:2]), threshold(shape))
    return paired(attend, (q, k, v, log_f), do, skipped)


def official_step_calls(reference: Any, work: Work, device: torch.device) -> Calls:
    """The call of the authors' operator with one query and all keys; no key is appended."""
    shape = work.shape
    log_f = work_gates(work, device)
    limit = torch.full((shape.heads,), threshold(shape), device=device) if work.pruned else None
    q, k, v, _ = inputs(shape, device=device)
    last = q[:, -1:].contiguous()

    def step() -> Tensor:
        with torch.no_grad():
            return reference.forgetting_attention(last, k, v, log_f, adaptive_threshold=limit)

    return Calls(step, None, None)


def sdpa_calls(name: str, work: Work, device: torch.device) -> Calls:
    """The calls of torch's attention, which has no gate. Args: name, flash or cudnn."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kinds[name]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=not work.step)

    q, k, v, do = heads_first(work, device)
    if not work.step:
        return paired(attend, (q, k, v), do, 0.0, heads_first=True)
    last = q[:, :, -1:].contiguous()
    return Calls(torch.no_grad()(lambda: attend(last, k, v)), None, None)


def flex_calls(work: Work, device: torch.device, *, gate_gradient: bool = False) -> Calls:
    """The calls of FlexAttention, which adds the decay to every score.

    Args: gate_gradient, the gates get a gradient too. It is summed by atomic additions, one for
          each score. Without, the calls forward and backward compute less than ours.
    """
    flex, mask = fused_flex(device)
    log_f = work_gates(work, device)
    attend = gated_flex(flex, None if work.step else mask(work.shape.length))
    q, k, v, do = heads_first(work, device)
    if work.step:
        last = q[:, :, -1:].contiguous()
        return Calls(torch.no_grad()(lambda: attend(last, k, v, log_f)), None, None)
    if gate_gradient:
        return paired(attend, (q, k, v, log_f), do, 0.0, heads_first=True)
    fixed = lambda q, k, v: attend(q, k, v, log_f)  # noqa: E731
    return paired(fixed, (q, k, v), do, 0.0, heads_first=True)


def gated_flex(flex: Callable[..., Any], mask: Any) -> Callable[..., Tensor]:
    """FlexAttention with a forget gate: q, k, v [B, H, T, D], log_f [B, T, H] -> [B, H, T, D].

    Args: flex, FlexAttention, compiled or not; mask of it, or None; the queries are the last ones.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor) -> Tensor:
        sums = log_f.transpose(1, 2).cumsum(2)
        # FlexAttention refuses to read one captured tensor twice if it requires a gradient.
        of_query, of_key = 1.0 * sums[:, :, -q.shape[2] :], 1.0 * sums

        def gated(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + (of_query[b, h, i] - of_key[b, h, j])

        return flex(q, k, v, score_mod=gated, block_mask=mask)

    return attend


def fused_flex(device: torch.device) -> tuple[Callable[..., Any], Callable[[int], Any]]:
    """FlexAttention, compiled, and a function that makes the causal mask of T positions."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask(length: int) -> Any:
        return create_block_mask(
            lambda b, h, i, j: i >= j, None, None, length, length, device=str(device)
        )

    # A function is compiled for a few shapes only and then runs uncompiled, without a message.
    # So the functions that were compiled for other shapes are dropped first.
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False), functools.cache(mask)


def fla_calls(work: Work, device: torch.device) -> Calls:
    """The calls of flash-linear-attention's forgetting attention, which does not prune."""
    q, k, v, do = inputs(work.shape, device=device)
    log_f = work_gates(work, device)
    if not work.step:
        attend = importlib.import_module("fla.ops.forgetting_attn").parallel_forgetting_attn
        return paired(attend, (q, k, v, log_f), do, 0.0)
    # All sequences lie one after the other on one axis of time, [1, B R, H, D].
    decode = importlib.import_module("fla.ops.attn.decoding").attn_decoding_one_step
    batch, ring = work.shape[:2]
    ends = torch.arange(0, (batch + 1) * ring, ring, device=device)
    last = q[:, -1].unsqueeze(0).contiguous()  # [1, B, H, D]
    k, v, log_f = (x.flatten(0, 1).unsqueeze(0) for x in (k, v, log_f))
    call = lambda: decode(last, k, v, log_f, cu_seqlens=ends)  # noqa: E731
    return Calls(torch.no_grad()(call), None, None)


def heads_first(work: Work, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs of a work as [B, H, T, D], contiguous."""
    q, k, v, do = (x.transpose(1, 2).contiguous() for x in inputs(work.shape, device=device))
    return q, k, v, do


def work_gates(work: Work, device: torch.device) -> Tensor:
    """The gates of a work [B, T, H]; those of a step are the same number at every position."""
    if not work.step:
        return gates(work.gate, work.shape, device=device)
    return torch.full(work.shape[:3], -decay_rate(work.gate, work.shape), device=device)


def load_official(folder: Path) -> types.ModuleType:
    """Imports the authors' forgetting_attention.py from a folder.

    The file needs only torch, triton and einops. einops need not be installed: one function of it
    is replaced here.

    Raises: ValueError if the folder does not have the file.
    """
    places = [folder / below for below in ("", "src/forgetting_transformer/ops")]
    found = [place / "forgetting_attention.py" for place in places]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise ValueError(
            f"--official: expected a folder with forgetting_attention.py, got {folder}; give the "
            "root of the forgetting-transformer repository, or the folder of that file"
        )
    spec = importlib.util.spec_from_file_location("official_forgetting_attention", path)
    assert spec is not None and spec.loader is not None, f"{path} is a Python file"
    module = importlib.util.module_from_spec(spec)
    # The file uses one function of einops, `rearrange`, and only to swap time and heads.
    missing = importlib.util.find_spec("einops") is None
    if missing:
        sys.modules["einops"] = types.ModuleType("einops")
        vars(sys.modules["einops"])["rearrange"] = lambda x, pattern: x.transpose(1, 2)
    try:
        spec.loader.exec_module(module)
    finally:
        if missing:
            del sys.modules["einops"]
    return module


_loaded = functools.cache(load_official)
