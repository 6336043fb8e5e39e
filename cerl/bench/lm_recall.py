"""Multi-query associative recall by the kind of attention: `cerl bench lm-recall`.

A sequence lists pairs of a key and a value, and then asks for the values of its keys in another
order. Only the answers are scored, an answer at a time (Arora et al. 2023, arXiv:2312.04927).
"""

import time
from typing import Literal

import torch
from torch import Tensor

from cerl.bench.clock import device_name
from cerl.bench.lm import BETAS, CLIP, DECAY, schedule
from cerl.bench.lm_model import Kind, LanguageModel, Size
from cerl.bench.table import Output, Rows, Table
from cerl.device.pick import pick

KEYS = 128  # bytes 0 to 127 are keys, the others values
TESTS = 512  # sequences whose answers are scored


def lm_recall(
    *,
    kinds: tuple[Kind, ...] = ("fox-pro", "fox-llama", "transformer", "fixed"),
    pairs: tuple[int, ...] = (8, 16, 32, 64),
    length: int = 256,
    updates: int = 2000,
    rows: int = 64,
    layers: int = 2,
    width: int = 128,
    heads: int = 2,
    rate: float = 1e-3,
    precision: Literal["bf16", "fp32"] = "fp32",
    device: str = "auto",
    output: Output = Output(),
) -> Rows:
    """Trains a small model for each kind of attention and number of pairs; exact match of answers.

    Args:
        kinds: as for `cerl bench lm`
        pairs: pairs of a key and a value in a sequence
        length: bytes of a sequence
        updates: updates of each model
        rows: sequences of an update
        layers: residual blocks
        width: features of a byte
        heads: attention heads
        rate: largest learning rate
        precision: of activations
        device: cpu, cuda, cuda:N or auto
    """
    for count in pairs:
        if not 1 <= count <= KEYS or 4 * count > length:
            raise ValueError(
                f"--pairs: expected 1 to {KEYS}, at most a quarter of --length {length} (a pair "
                f"and its question take four bytes), got {count}"
            )
    chosen = pick(device)
    table = Table("lm-recall", output, device=device_name(chosen), title="associative recall")
    for count in pairs:
        for kind in kinds:
            begin = time.monotonic()
            model = LanguageModel(
                kind, Size(layers, width, heads), length=length, precision=precision
            ).to(chosen)
            optimiser = torch.optim.AdamW(model.groups(DECAY), lr=rate, betas=BETAS)
            for number in range(1, updates + 1):
                for group in optimiser.param_groups:
                    group["lr"] = rate * schedule(number / updates)
                tokens, asked = sequences(rows, count, length, seed=number, device=chosen)
                optimiser.zero_grad(set_to_none=True)
                losses = model.losses(tokens)
                losses[asked[:, 1:]].mean().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimiser.step()
            table.add(
                {
                    "kind": kind,
                    "pairs": count,
                    "length": length,
                    "updates": updates,
                    "exact match": exact_match(model, count, length, chosen),
                    "s": time.monotonic() - begin,
                }
            )
    return table.finished()


def sequences(
    rows: int, pairs: int, length: int, *, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Random sequences.

    Keys of a sequence differ. Every key is asked for once, at a random place after all pairs; the
    places between are filled with values that are no answers.

    Returns: tokens [rows, length + 1] int64; asked, of the same shape, True at every answer.
    """
    generator = torch.Generator().manual_seed(seed)

    def order(count: int, most: int) -> Tensor:
        return torch.rand(rows, most, generator=generator).argsort(1)[:, :count]

    keys = order(pairs, KEYS)
    values = torch.randint(KEYS, 256, (rows, pairs), generator=generator)
    tokens = torch.randint(KEYS, 256, (rows, length + 1), generator=generator)
    tokens[:, : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    room = (length + 1 - 2 * pairs) // 2
    places = 2 * pairs + 2 * order(pairs, room).sort(1).values
    turn = order(pairs, pairs)
    tokens.scatter_(1, places, keys.gather(1, turn))
    tokens.scatter_(1, places + 1, values.gather(1, turn))
    asked = torch.zeros(rows, length + 1, dtype=torch.bool)
    asked.scatter_(1, places + 1, True)
    return tokens.to(device), asked.to(device)


@torch.no_grad()
def exact_match(model: LanguageModel, pairs: int, length: int, device: torch.device) -> float:
    """Share of right answers in sequences that were not learnt from."""
    right = total = 0
    for number in range(TESTS // 64):
        tokens, asked = sequences(64, pairs, length, seed=-1 - number, device=device)
        guess = model(tokens[:, :-1]).argmax(2)
        hits = (guess == tokens[:, 1:])[asked[:, 1:]]
        right, total = right + int(hits.sum()), total + hits.numel()
    return right / total
