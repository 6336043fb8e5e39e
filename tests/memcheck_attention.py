"""Runs the attention kernels at small odd shapes under NVIDIA's memory checker. Not a test; use

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    python tests/memcheck_attention.py          # compiles the kernels; slow under the checker
    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/memcheck_attention.py

Without torch's caching allocator every tensor is an allocation of its own, so the checker sees each
access beyond the end of a tensor.
"""

import os
import sys

import torch
from torch import Tensor

from cerl.kernels.attention import forgetting_attention
from cerl.kernels.attention.step import Cache, forgetting_attention_step

# B, M, N, Hq, Hkv, D, window. They cover all three regimes: short (one block), medium (one launch)
# and long, the last with lengths below and above a chunk of its scans, and with and without the
# copy engine.
SHAPES = (
    (3, 63, 63, 4, 2, 32, None),
    (1, 5, 100, 2, 2, 24, 7),
    (2, 200, 200, 2, 1, 64, None),
    (2, 131, 255, 2, 2, 40, 90),
    (1, 300, 300, 4, 2, 64, None),
    (1, 257, 515, 2, 2, 128, 200),
    (1, 700, 1027, 2, 2, 48, None),
    (1, 4097, 4161, 1, 1, 64, None),
)


def run(shape: tuple, dtype: torch.dtype, pruned: bool) -> None:
    batch, queries, keys, heads, key_heads, width, window = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device="cuda").to(dtype).requires_grad_()

    q = draw(batch, queries, heads, width)
    k, v = draw(batch, keys, key_heads, width), draw(batch, keys, key_heads, width)
    log_f = (-0.3 * torch.rand(batch, keys, heads, device="cuda")).requires_grad_()
    start = torch.rand(batch, keys, device="cuda") < 0.01
    o, lse = forgetting_attention(
        q,
        k,
        v,
        log_f,
        start=start,
        window=window,
        return_lse=True,
        bound="measured" if pruned else None,
    )
    grads = torch.autograd.grad((o, lse), (q, k, v, log_f), (torch.randn_like(o), lse.detach()))
    assert all(bool(grad.isfinite().all()) for grad in grads), shape


def run_step(width: int, ring: int, dtype: torch.dtype) -> None:
    sizes = dict(batch=3, heads=4, key_heads=2, ring=ring, width=width)
    cache = Cache.new(**sizes, dtype=dtype, device=torch.device("cuda"))
    for _ in range(3):
        q, k, v = (torch.randn(3, h, width, device="cuda").to(dtype) for h in (4, 2, 2))
        log_f = -torch.rand(3, 4, device="cuda")
        start = torch.rand(3, device="cuda") < 0.3
        o = forgetting_attention_step(q, k, v, log_f, cache, start=start)
    assert bool(o.isfinite().all())


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing to check", file=sys.stderr)
        return 1
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        print("set PYTORCH_NO_CUDA_MEMORY_CACHING=1: else the checker misses writes past an end")
        return 1
    torch.manual_seed(0)
    for number, shape in enumerate(SHAPES):
        run(shape, torch.bfloat16, pruned=number % 2 == 0)
    run(SHAPES[4], torch.float32, pruned=True)
    run_step(24, 37, torch.bfloat16)
    torch.cuda.synchronize()
    print(f"{len(SHAPES) + 2} shapes ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
