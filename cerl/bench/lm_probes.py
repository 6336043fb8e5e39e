"""Measurements of a trained model in `cerl bench lm`, besides its loss."""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from cerl.bench.lm_corpus import Corpus, Document, heads_of
from cerl.bench.lm_model import (
    FURTHER,
    LanguageModel,
    Pruning,
    half_lives,
    watched,
    with_official,
    without_attention,
)

BANDS = 16  # in which losses by position are averaged, for each length that is learnt
KEY_DIGITS = 5
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def held_out_loss(model: LanguageModel, rows: Tensor) -> float:
    """Mean loss of rows [B, T + 1], in nats a byte, one row after the other."""
    return statistics.fmean(float(model.losses(row.unsqueeze(0)).mean()) for row in rows)


@torch.no_grad()
def attention_by_head(model: LanguageModel, rows: Tensor) -> list[dict[str, Any]]:
    """The half-lives of gates and the share of skipped tiles, for each layer and head.

    Args:    rows [B, T + 1].
    Returns: dicts with layer, head, skipped (share of tiles), half_life (median over rows that have
             one, bytes) and its quartiles, undecided (share of rows that forget less than half of
             all before them).
    """
    with watched() as seen:
        for row in rows:
            model(row[None, :-1])
    layers = len(model.attentions)
    found = []
    for layer in range(layers):
        own = seen[layer::layers]
        skipped = torch.stack([part.skipped for part in own]).mean(0)  # [H]
        steps = torch.cat([half_lives(part.log_f) for part in own]).flatten(0, 1)  # [rows, H]
        finite = steps.isfinite()
        for head in range(steps.shape[1]):
            known = steps[finite[:, head], head]
            points = known.quantile(known.new_tensor([0.25, 0.5, 0.75])) if len(known) else None
            low, middle, high = (math.inf,) * 3 if points is None else points.tolist()
            found.append(
                {
                    "layer": layer,
                    "head": head,
                    "skipped": float(skipped[head]),
                    "half_life": middle,
                    "quartiles": (low, high),
                    "undecided": 1.0 - float(finite[:, head].float().mean()),
                }
            )
    return found


@torch.no_grad()
def loss_by_position(
    model: LanguageModel, corpus: Corpus, *, length: int, most: int, device: torch.device
) -> tuple[list[tuple[int, float]], list[Document]]:
    """Mean loss of held-out documents by position, from their first byte to FURTHER x T.

    Args:    length, T; most, documents that are read.
    Returns: pairs of a position (the end of a band of positions) and the mean loss of the band, in
             nats a byte; the documents, of at least FURTHER x T bytes each.
    """
    documents = corpus.long(FURTHER * length)[:most]
    if not documents:
        return [], []
    total = torch.zeros(FURTHER * length, dtype=torch.float64, device=device)
    for document in documents:
        total += model.losses(heads_of([document], FURTHER * length, device))[0]
    bands = (total / len(documents)).view(FURTHER * BANDS, -1).mean(1).tolist()
    width = length // BANDS
    return [(width * (number + 1), loss) for number, loss in enumerate(bands)], documents


@torch.no_grad()
def largest_difference(model: LanguageModel, rows: Tensor, pruning: Pruning) -> float:
    """Largest difference of a logit between attention that is pruned and that is not."""
    model.prune("off")
    whole = model(rows[:1, :-1])
    model.prune(pruning)
    return float((model(rows[:1, :-1]) - whole).abs().max())


@torch.no_grad()
def pass_keys(
    model: LanguageModel,
    corpus: Corpus,
    *,
    length: int,
    depth: float,
    tries: int,
    device: torch.device,
) -> float:
    """Share of hidden numbers that the model finds again, digit by digit without a fault.

    A line `PASS_KEY = 38125` stands in held-out text, at `depth` of its length. The text ends with
    the same words, and the most probable next bytes are compared with the number.

    Args:    length, of the text in bytes; tries, texts with different numbers.
    Returns: NaN if no held-out document is long enough.
    """
    documents = corpus.long(length)
    if not documents:
        return math.nan
    generator = torch.Generator().manual_seed(length)
    right = 0
    for number in range(tries):
        key = int(torch.randint(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS, (), generator=generator))
        document = documents[number % len(documents)]
        text = with_pass_key(document.content, str(key).encode(), length=length, depth=depth)
        tokens = torch.tensor([list(text)], device=device)
        logits = model(tokens[:, :-1])[0, -KEY_DIGITS:]
        right += bool((logits.argmax(1) == tokens[0, -KEY_DIGITS:]).all())
    return right / tries


def with_pass_key(content: bytes, key: bytes, *, length: int, depth: float) -> bytes:
    """Text of `length` bytes that states a number at a depth and ends with it.

    Args: content, at least that long; depth, share of the text before the statement.
    """
    line, question = b"\nPASS_KEY = " + key + b"\n", b"\nassert PASS_KEY == " + key
    room = length - len(line) - len(question)
    cut = int(depth * room)
    # The statement stands between two lines of the text, if there is a line end before.
    cut = max(content.rfind(b"\n", 0, cut), 0) or cut
    return content[:cut] + line + content[cut:room] + question


def speeds(
    model: LanguageModel,
    update: Callable[[], object],
    *,
    tokens: int,
    repeats: int,
    official: Any,
    device: torch.device,
) -> dict[str, float]:
    """Bytes a second of training with each way to compute attention, on the same parameters.

    The ways take turns, so that all are measured under the same conditions.

    Args:    update, one update of the model that leaves its parameters as they are; tokens, bytes
             of an update; repeats, updates of each way; official, the authors' module or None.
    Returns: {way: bytes a second, median}. "no attention" hands the values on, so it shows how much
             of the time is not attention.
    """
    ways: dict[str, tuple[Pruning, Callable[[], Any]]] = {"off": ("off", nullcontext)}
    if model.gated:
        ways["static"] = "static", nullcontext
        ways["running"] = "running", nullcontext
    if model.attentions:
        ways["no attention"] = "off", without_attention
    if official is not None and model.gated:
        ways["official off"] = "off", lambda: with_official(official, "off")
        ways["official static"] = "static", lambda: with_official(official, "static")
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(repeats + 1):  # the first round compiles and is not counted
        for way, (pruning, context) in ways.items():
            model.prune(pruning)
            with context():
                seconds = _seconds(update, device)
            if number:
                spent[way].append(seconds)
    return {way: tokens / statistics.median(times) for way, times in spent.items()}


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of a call until the device has finished it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
