"""Trains small language models of bytes: `cerl bench lm`.

It shows on learnt gates what papers on forgetting attention claim: how much of attention pruning
skips, what that saves, whether it changes the loss, how the loss behaves beyond the length that was
learnt, how long gates remember, and whether a hidden number is found again. Lin et al. 2025
(arXiv:2503.02130, arXiv:2504.06949). Models and data are far smaller than in these papers.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro

from cerl.arguments import maybe
from cerl.bench import lm_probes
from cerl.bench.attention import load_official
from cerl.bench.clock import device_name
from cerl.bench.lm_corpus import Batches, Corpus, load
from cerl.bench.lm_model import FURTHER, SIZES, Kind, LanguageModel, Pruning
from cerl.bench.table import Output, Row, Table
from cerl.device.pick import pick
from cerl.record.files import write_atomically

WARMUP = 0.05  # share of the updates in which the learning rate rises
FLOOR = 0.1  # the learning rate at the end, as a share of the largest
DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0
READ = 8  # rows of held-out text on which losses and gates are measured
DOCUMENTS = 16  # most held-out documents of which losses by position are measured
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("size", "kind", "pruning", "what", "way")),
        ("length", pa.int64()),  # T, bytes of a sequence that is learnt
        ("tokens", pa.int64()),  # bytes learnt so far
        *((name, pa.int64()) for name in ("layer", "head", "at")),  # -1 where it does not apply
        ("depth", pa.float64()),
        ("value", pa.float64()),
    ]
)
# The numbers of a row: {what: (unit, meaning)}.
WHATS = {
    "loss": ("nats a byte", "loss of training, mean since the row before"),
    "held-out": ("nats a byte", "loss of held-out text"),
    "speed": ("bytes a second", "training on the trained parameters, by way of attention"),
    "skipped": ("share", "tiles of attention up to the diagonal that were skipped"),
    "half-life": ("bytes", "median over rows of how far back half is forgotten"),
    "half-life low": ("bytes", "the lower quartile over rows"),
    "half-life high": ("bytes", "the upper quartile over rows"),
    "undecided": ("share", "rows that forget less than half of all before them"),
    "by position": ("nats a byte", "loss of held-out documents, `at` is the end of the band"),
    "difference": ("logits", "largest difference between pruned and unpruned, same parameters"),
    "pass key": ("share", "hidden numbers found; `at` is the length, `depth` the place"),
}


class Plan(NamedTuple):
    """How every model is trained."""

    size: str
    length: int  # T
    updates: int
    rows: int  # B, of an update
    micro: int  # rows that are computed at once
    rate: float  # largest learning rate
    precision: str
    minutes: float  # after which training is cut off
    every: int  # updates between two measurements

    @property
    def tokens(self) -> int:
        """Bytes of an update."""
        return self.rows * self.length


def lm(
    *,
    folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER")],
    kinds: tuple[Kind, ...] = ("fox-pro", "fox-llama", "transformer", "fixed"),
    pruning: tuple[Pruning, ...] = ("off", "static"),
    size: Literal["tiny", "3M", "25M", "125M"] = "25M",
    length: int = 4096,
    tokens: int = 100_000_000,
    update_tokens: int = 131_072,
    micro_tokens: int = 32_768,
    rate: float = 1e-3,
    texts: Annotated[Path | None, maybe("FOLDER")] = None,
    official: Annotated[Path | None, maybe("FOLDER")] = None,
    precision: Literal["bf16", "fp32"] = "bf16",
    device: str = "auto",
    minutes: float = 10.0,
    points: int = 20,
    repeats: int = 5,
    tries: int = 20,
    output: Output = Output(),
) -> list[Row]:
    """Trains language models of bytes and measures what their attention does.

    Writes rows.parquet (a number a row) and figures into a folder; kinds that it holds already are
    kept, so several commands can fill one folder.

    Args:
        folder: the folder for rows and figures
        kinds: fox-pro, fox-llama; transformer (rotary positions) and transformer-pro (fox-pro
            without a gate, with rotary positions); fixed (fox-pro whose gates are constants)
        pruning: how attention is pruned while it learns; kinds without gates are trained once
        size: about the number of parameters
        length: bytes of a sequence that is learnt, T
        tokens: bytes to learn from
        update_tokens: bytes of an update
        micro_tokens: bytes that are computed at once, less if memory is short
        rate: largest learning rate
        texts: folder of texts to learn from; by default the installed Python packages
        official: folder with the authors' forgetting_attention.py, whose speed is then measured too
        precision: of activations
        device: cpu, cuda, cuda:N or auto
        minutes: after which a model is trained no further
        points: measurements while a model learns
        repeats: timings of each way to compute attention
        tries: hidden numbers for each length and depth
    """
    chosen = pick(device)
    rows = max(1, update_tokens // length)
    updates = max(1, tokens // (rows * length))
    plan = Plan(
        size,
        length,
        updates,
        rows,
        max(1, min(rows, micro_tokens // length)),
        rate,
        precision,
        minutes,
        max(1, updates // points),
    )
    for name, value in {"length": length - lm_probes.BANDS, "points": points - 1}.items():
        if value < 0:
            least = lm_probes.BANDS if name == "length" else 1
            raise ValueError(f"--{name}: expected at least {least}, got {value + least}")
    reference = None if official is None else load_official(official)
    corpus = load(texts)
    described(corpus, plan)
    folder.mkdir(parents=True, exist_ok=True)
    table = Table("lm", output, device=device_name(chosen), title=f"language models, {size}")
    found: list[Row] = []
    for kind in kinds:
        for way in pruning:
            if way != pruning[0] and kind.startswith("transformer"):
                continue
            run = Trained(kind, way, plan, corpus, chosen)
            run.train()
            run.probe(reference, repeats=repeats, tries=tries)
            found += run.rows
            for row in run.summary():
                table.add(row)
            saved(run.rows, folder / "rows.parquet")
    from cerl.bench.lm_plots import draw

    draw(folder / "rows.parquet", folder)
    table.finished()
    return found


def described(corpus: Corpus, plan: Plan) -> None:
    """Prints what the corpus is, and which held-out documents are long."""
    print(
        f"corpus {corpus.digest}: {corpus.documents:,} documents, {len(corpus.train):,} bytes to "
        f"learn from; held out: {len(corpus.held_out):,} documents of {len(corpus.packages)} "
        f"packages ({', '.join(corpus.packages)})"
    )
    long = corpus.long(FURTHER * plan.length)
    names = ", ".join(document.name for document in long[:DOCUMENTS])
    print(
        f"{len(long)} held-out documents have at least {FURTHER} x {plan.length} bytes"
        + (f": {names}{', ...' if len(long) > DOCUMENTS else ''}" if long else "")
    )
    print(
        f"{plan.updates:,} updates of {plan.rows} x {plan.length} bytes, {plan.micro} rows at once",
        flush=True,
    )


class Trained:
    """A model, its training, and the rows that it gives."""

    def __init__(
        self, kind: Kind, pruning: Pruning, plan: Plan, corpus: Corpus, device: torch.device
    ) -> None:
        self.kind, self.plan = kind, plan
        self.pruning: Pruning = pruning
        self.corpus, self.device = corpus, device
        size = SIZES[plan.size]
        model = LanguageModel(kind, size, length=plan.length, precision=plan.precision)
        self.model = model.to(device)
        self.model.prune(pruning)
        self.batches = Batches(
            corpus.train, length=plan.length, rows=plan.rows, device=device, seed=1
        )
        tests = torch.cat(
            [
                torch.frombuffer(bytearray(b"\0" + d.content), dtype=torch.uint8)
                for d in corpus.held_out
            ]
        )
        self.tests = Batches(tests, length=plan.length, rows=READ, device=device, seed=2).batch(0)
        self.optimiser = torch.optim.AdamW(
            self.model.groups(DECAY), lr=plan.rate, betas=BETAS, fused=device.type == "cuda"
        )
        self.rows: list[Row] = []
        self.learnt = 0

    def train(self) -> None:
        """Trains to the last update, or until the time is over, which is then said."""
        plan, begin, since = self.plan, time.monotonic(), []
        for number in range(1, plan.updates + 1):
            for group in self.optimiser.param_groups:
                group["lr"] = plan.rate * schedule(number / plan.updates)
            since.append(self.update(number))
            self.learnt = number * plan.tokens
            last = number == plan.updates or time.monotonic() - begin > 60.0 * plan.minutes
            if number % plan.every == 0 or number == 1 or last:
                self.note("loss", float(torch.stack(since).mean()))
                self.note("held-out", lm_probes.held_out_loss(self.model, self.tests))
                self.gates()
                since.clear()
                print(
                    f"  {self.kind}, pruning {self.pruning}: {self.learnt:,} bytes, "
                    f"{time.monotonic() - begin:.0f} s, held-out loss "
                    f"{self.rows_of('held-out')[-1]:.4f}",
                    flush=True,
                )
            if last:
                break
        if self.learnt < plan.updates * plan.tokens:
            print(f"  cut off after {plan.minutes:g} minutes", flush=True)

    def update(self, number: int, *, move: bool = True) -> torch.Tensor:
        """One update. Args: move, False to leave the parameters. Returns: the mean loss."""
        self.optimiser.zero_grad(set_to_none=True)
        batch, losses = self.batches.batch(number), []
        parts = batch.split(self.plan.micro)
        for part in parts:
            loss = self.model.losses(part).mean() * (len(part) / len(batch))
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        if move:
            self.optimiser.step()
        return torch.stack(losses).sum()

    def gates(self) -> None:
        """Notes what the gates of each layer and head do by now."""
        if not self.model.gated:
            return
        for part in lm_probes.attention_by_head(self.model, self.tests):
            place = {"layer": part["layer"], "head": part["head"]}
            if self.pruning != "off":
                self.note("skipped", part["skipped"], **place)
            self.note("half-life", part["half_life"], **place)
            for name, value in zip(("low", "high"), part["quartiles"], strict=True):
                self.note(f"half-life {name}", value, **place)
            self.note("undecided", part["undecided"], **place)

    def probe(self, official: Any, *, repeats: int, tries: int) -> None:
        """Measures the trained model."""
        plan, model, device = self.plan, self.model, self.device
        spent = lm_probes.speeds(
            model,
            lambda: self.update(0, move=False),
            tokens=plan.tokens,
            repeats=repeats,
            official=official,
            device=device,
        )
        for name, speed in spent.items():
            self.note("speed", speed, way=name)
        if model.gated:
            pruned: tuple[Pruning, ...] = "static", "running"
            for rule in pruned:
                difference = lm_probes.largest_difference(model, self.tests, rule)
                self.note("difference", difference, way=rule)
        model.prune(self.pruning)
        found, _ = lm_probes.loss_by_position(
            model, self.corpus, length=plan.length, most=DOCUMENTS, device=device
        )
        for at, loss in found:
            self.note("by position", loss, at=at)
        for length in (plan.length // 4, plan.length // 2, plan.length, 2 * plan.length):
            for depth in lm_probes.DEPTHS:
                share = lm_probes.pass_keys(
                    model, self.corpus, length=length, depth=depth, tries=tries, device=device
                )
                self.note("pass key", share, at=length, depth=depth)

    def note(self, what: str, value: float, **place: Any) -> None:
        """Adds a row. Args: what, one of WHATS; place, the columns that it has."""
        assert what in WHATS, what
        head = {"size": self.plan.size, "kind": self.kind, "pruning": self.pruning, "what": what}
        empty = {"way": "", "layer": -1, "head": -1, "at": -1, "depth": math.nan}
        size = {"length": self.plan.length, "tokens": self.learnt}
        self.rows.append(head | empty | size | place | {"value": value})

    def rows_of(self, what: str) -> list[float]:
        """The values of all rows of a kind, in their order."""
        return [row["value"] for row in self.rows if row["what"] == what]

    def summary(self) -> Iterator[Row]:
        """The lines of the table: one for each way to compute attention."""
        skipped = [
            row["value"]
            for row in self.rows
            if row["what"] == "skipped" and row["tokens"] == self.learnt
        ]
        found = {row["way"]: row["value"] for row in self.rows if row["what"] == "speed"}
        for way, speed in found.items():
            yield {
                "kind": self.kind,
                "trained": self.pruning,
                "length": self.plan.length,
                "attention": way,
                "ms": 1e3 * self.plan.tokens / speed,
                "updates/s": speed / self.plan.tokens,
                "ratio": speed / found["off"],
                "skipped": sum(skipped) / len(skipped) if skipped else None,
                "held-out loss": self.rows_of("held-out")[-1],
            }


def schedule(done: float) -> float:
    """The learning rate after a share of the updates, as a share of the largest one."""
    if done < WARMUP:
        return done / WARMUP
    cosine = 0.5 * (1.0 + math.cos(math.pi * (done - WARMUP) / (1.0 - WARMUP)))
    return FLOOR + (1.0 - FLOOR) * cosine


def saved(rows: list[Row], path: Path) -> None:
    """Adds the rows of a model to a file, in place of those it holds of the same model."""
    table = pa.Table.from_pylist(rows, SCHEMA)
    if path.is_file():
        own = {(row["size"], row["kind"], row["pruning"], row["length"]) for row in rows}
        kept = [
            row
            for row in pq.read_table(path).to_pylist()
            if (row["size"], row["kind"], row["pruning"], row["length"]) not in own
        ]
        table = pa.concat_tables([pa.Table.from_pylist(kept, SCHEMA), table])
    write_atomically(path, lambda file: pq.write_table(table, file, compression="zstd"))
