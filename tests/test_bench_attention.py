"""Inputs, rows and plots of the attention benchmarks, with a fake clock."""

import gc
import json
import math
import os
import sys
import time
import types
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from matplotlib import image
from rounding import assert_agree
from torch.nn.attention.flex_attention import flex_attention

from cerl import __main__ as command
from cerl.bench import attention, other_attention, pruning
from cerl.bench import tiles as bench_tiles
from cerl.bench.attention_work import Calls, Shape, Work, skipped_share
from cerl.bench.clock import Spent, compiled, stopwatch
from cerl.bench.other_attention import Others
from cerl.bench.table import Output, Table
from cerl.kernels.attention import forgetting_attention
from cerl.kernels.attention import step as attention_step
from cerl.kernels.attention.plan import Tiles, make_plan
from cerl.kernels.attention.pruning import visited
from cerl.record import results

CPU = torch.device("cpu")


@pytest.fixture
def on_cpu(monkeypatch):
    """The commands run on the CPU; every call takes 2 ms in a graph and 5 ms as called."""
    for module in (attention, bench_tiles, pruning):
        monkeypatch.setattr(module, "needed_device", lambda: CPU)
        monkeypatch.setattr(module, "stopwatch", lambda repeats: two_and_five)


def two_and_five(call):
    call()
    return Spent(2.0, 5.0)


@pytest.mark.parametrize("gate, share", [("none", 0.0), ("s70", 0.7), ("s90", 0.9)])
@pytest.mark.parametrize("width", [64, 128])
def test_gates_prune_the_pairs_that_their_names_say(gate, share, width):
    shape = Shape(1, 1024, 2, width)
    log_f = attention.gates(gate, shape, device=CPU)
    limit = attention.threshold(shape)
    assert limit == pytest.approx(-(2 * math.sqrt(width) + math.log(1024)) - 10)
    sums = log_f.double().cumsum(1)[0, :, 0]
    below = (sums[:, None] - sums[None, :] < limit).tril().double().sum() / (1024 * 1025 / 2)
    assert float(below) == pytest.approx(share, abs=0.01)
    assert skipped_share(log_f, Tiles(1, 1), limit) == pytest.approx(share, abs=0.01)
    # A tile goes only when its last pair may: fewer of them, by about one tile a row.
    block = make_plan(1024, width, torch.bfloat16).tiles
    skipped = skipped_share(log_f, block, limit)
    slack = (block.rows + block.columns) / 1024 * 1.5
    assert share - slack <= skipped <= share + 1e-9


def test_mild_gates_and_logits_stay_in_their_bounds():
    shape = Shape(2, 300, 3, 40)
    q, k, v, do = attention.inputs(shape, device=CPU, dtype=torch.float32)
    assert {x.shape for x in (q, k, v, do)} == {torch.Size(shape)}
    torch.testing.assert_close(q.norm(dim=3), torch.full((2, 300, 3), math.sqrt(40)))
    torch.testing.assert_close(k.norm(dim=3), torch.full((2, 300, 3), math.sqrt(40)))
    assert float(v.std()) == pytest.approx(1.0, abs=0.05)
    gates = attention.gates("mild", shape, device=CPU).exp()
    assert 0.98 < float(gates.min()) < float(gates.max()) < 0.9998


def test_shapes_and_cases_are_read():
    works = attention.parsed(("4,4096,16,64", "step:64,1024,8,64"), ("none", "s90+acp"))
    assert works == [
        Work(False, Shape(4, 4096, 16, 64), "none", False),
        Work(False, Shape(4, 4096, 16, 64), "s90", True),
        Work(True, Shape(64, 1024, 8, 64), "none", False),
        Work(True, Shape(64, 1024, 8, 64), "s90", True),
    ]
    assert works[3].what == "step:64,1024,8,64"
    assert works[3].case == "s90+acp"
    usual = attention.parsed(tuple(attention.TABLE), ())
    assert len(usual) == 21
    (running,) = attention.parsed(("4,4096,16,64",), ("s70+running",))
    assert running == Work(False, Shape(4, 4096, 16, 64), "s70", True, True)
    assert running.case == "s70+running"
    assert len(attention.parsed(("1,2,3,4",), ())) == 4


@pytest.mark.parametrize("shape", ["4,4096,16", "4,4096,16,x", "4,0,16,64", "", "4,4096,16,64,1"])
def test_a_wrong_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"four sizes B,T,H,D .* got '" + shape):
        attention.parsed((shape,), ())


@pytest.mark.parametrize("case", ["s80", "none+", "none+pruned", "acp"])
def test_a_wrong_case_is_named(case):
    with pytest.raises(ValueError, match="none, mild, s70, s90"):
        attention.parsed(("1,2,3,4",), (case,))
    with pytest.raises(ValueError, match="not mild for a step"):
        attention.parsed(("step:1,2,3,4",), ("mild",))
    with pytest.raises(ValueError, match=r"\+running \(not for a step"):
        attention.parsed(("step:1,2,3,4",), ("s70+running",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    "line", ["attention", "attention-tiles --key forward,64,2", "acp --folder nowhere"]
)
def test_no_cuda_is_an_error(line, capsys):
    assert command.main(["bench", *line.split()]) == 2
    assert "found no CUDA device" in capsys.readouterr().err
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("call_ms, calls, repeats", [(0.5, 20, 20), (3.0, 6, 11), (30.0, 1, 6)])
def test_the_stopwatch_divides_by_the_calls(call_ms, calls, repeats, monkeypatch):
    """On a device whose clock only calls move; a graph of calls takes 0.8 of their time."""
    now, costs, replays, streams = [0.0], [], [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return end.at - self.at

    class Graph:
        def replay(self):
            replays.append(1)
            now[0] += costs[-1]

    @contextmanager
    def capture(graph):
        begin = now[0]
        yield
        costs.append(0.8 * (now[0] - begin))
        now[0] = begin

    stream = types.SimpleNamespace(wait_stream=streams.append)
    for name, value in {
        "Event": Event, "CUDAGraph": Graph, "graph": capture, "synchronize": lambda: None,
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": nullcontext,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    collecting = []

    def call():
        now[0] += call_ms
        collecting.append(gc.isenabled())

    spent = stopwatch(20)(call)
    assert spent == pytest.approx((0.8 * call_ms, call_ms))
    assert collecting[0] and not collecting[-1] and gc.isenabled()
    assert costs == pytest.approx([0.8 * call_ms * calls])
    assert len(replays) == repeats + 1
    assert len(streams) == 2
    with pytest.raises(ValueError, match="--repeats: expected a number from 1 on, got 0"):
        stopwatch(0)


def official(folder, body):
    folder.mkdir(parents=True)
    text = (
        "from einops import rearrange\n\n\ndef get_fwd_config(*sizes):\n    return 32, 16, 1, 4\n"
    )
    (folder / "forgetting_attention.py").write_text(text + body)


LIKE_OURS = """
from cerl.kernels import attention

def forgetting_attention(q, k, v, log_f, *, adaptive_threshold=None):
    assert rearrange(q, "b t h d -> b h t d").shape[1] == q.shape[2]
    return attention.forgetting_attention(q, k, v, log_f, threshold=adaptive_threshold)
"""


def test_the_official_file_loads_with_and_without_einops(tmp_path, monkeypatch):
    official(tmp_path / "src/forgetting_transformer/ops", LIKE_OURS)
    attention.load_official(tmp_path)
    module = attention.load_official(tmp_path / "src/forgetting_transformer/ops")
    find = other_attention.importlib.util.find_spec
    nothing = {"einops": None}
    monkeypatch.setattr(
        other_attention.importlib.util, "find_spec", lambda name: nothing.get(name, find(name))
    )
    known = sys.modules.get("einops")
    module = attention.load_official(tmp_path)
    assert module.rearrange(torch.zeros(1, 2, 3, 4), "b t h d -> b h t d").shape == (1, 3, 2, 4)
    assert sys.modules.get("einops") in (known, None)
    with pytest.raises(ValueError, match=r"--official: .* forgetting_attention.py"):
        attention.load_official(tmp_path / "src")


def test_attention_writes_a_row_for_each_implementation(on_cpu, tmp_path, capsys):
    official(tmp_path / "theirs", LIKE_OURS)
    out = tmp_path / "rows.jsonl"
    measured = attention.attention(
        shapes=("2,256,2,16", "step:2,16,2,16"),
        cases=("none", "s90+acp"),
        official=tmp_path / "theirs",
        output=Output(out=out),
    )
    assert [(row["shape"], row["case"], row["what"]) for row in measured] == [
        (shape, case, what)
        for shape in ("2,256,2,16", "step:2,16,2,16")
        for case in ("none", "s90+acp")
        for what in ("ours", *(["one query"] if shape.startswith("step") else []), "official")
    ]
    ours, theirs = measured[2:4]
    log_f = attention.gates("s90", Shape(2, 256, 2, 16), device=CPU)
    limit = attention.threshold(Shape(2, 256, 2, 16))
    wanted = []
    for block in (make_plan(256, 16, torch.bfloat16).tiles, Tiles(32, 16)):
        kept = visited(log_f, queries=256, tiles=block, threshold=limit).sum()
        causal = sum(
            -(-min(row + block.rows, 256) // block.columns) for row in range(0, 256, block.rows)
        )
        wanted.append(1.0 - float(kept) / (4 * causal))
    assert [ours["skipped"], theirs["skipped"]] == pytest.approx(wanted)
    assert wanted[1] > 0.5
    assert ours["fwd graph"] == ours["fwd+bwd graph"] == 2.0
    assert ours["fwd eager"] == ours["fwd+bwd eager"] == 5.0
    assert theirs["graph/ours"] == theirs["eager/ours"] == 1.0
    step = measured[4]
    assert step["fwd graph"] == 2.0
    assert step["fwd+bwd graph"] is step["skipped"] is None
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for row, line in zip(measured, lines, strict=True):
        assert line | row == line
        assert line["bench"] == "attention" and line["units"]["fwd graph"] == "ms"
    assert "s90+acp" in capsys.readouterr().out


def dense_flex(q, k, v, *, score_mod, block_mask):
    """FlexAttention in plain torch, because torch's has no gradient on a CPU."""
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    places = torch.meshgrid(*map(torch.arange, (batch, heads, queries, keys)), indexing="ij")
    scores = score_mod(q.float() @ k.float().mT / math.sqrt(width), *places)
    if block_mask is not None:
        scores = scores.masked_fill(~block_mask, -math.inf)
    return (scores.softmax(3) @ v.float()).to(q.dtype)


def install_fla(monkeypatch):
    """A package fla in which our own operator does the work."""
    whole, decoding = types.ModuleType("fla.ops.forgetting_attn"), types.ModuleType("decoding")
    vars(whole)["parallel_forgetting_attn"] = forgetting_attention

    def decode(q, k, v, g, *, cu_seqlens):
        assert cu_seqlens.tolist() == list(range(0, k.shape[1] + 1, k.shape[1] // q.shape[1]))
        k, v, g = (x.unflatten(1, (q.shape[1], -1))[0] for x in (k, v, g))
        return forgetting_attention(q.transpose(0, 1), k, v, g).transpose(0, 1)

    vars(decoding)["attn_decoding_one_step"] = decode
    for name, module in (("forgetting_attn", whole), ("attn.decoding", decoding)):
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)
    for name in ("fla", "fla.ops", "fla.ops.attn"):
        package = types.ModuleType(name)
        package.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, package)


@pytest.fixture
def others(monkeypatch):
    """Flex, flash and cuDNN attention of a CPU, and a package fla."""
    monkeypatch.setattr(
        other_attention,
        "fused_flex",
        lambda device: (dense_flex, lambda length: torch.ones(length, length).tril().bool()),
    )
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda kind: nullcontext())
    install_fla(monkeypatch)


def test_attention_of_others_is_timed_where_it_can_do_the_work(on_cpu, others):
    measured = attention.attention(
        shapes=("2,80,2,16", "step:2,16,2,16"),
        cases=("none", "s90", "s90+acp"),
        sdpa=True,
        flex=True,
        fla=True,
    )
    found = {}
    for row in measured:
        found.setdefault((row["shape"], row["case"]), []).append(row["what"])
    whole, step = "2,80,2,16", "step:2,16,2,16"
    assert found == {
        (whole, "none"): ["ours", "flash", "cudnn", "flex", "flex+gate", "fla"],
        (whole, "s90"): ["ours", "flex", "flex+gate", "fla"],
        (whole, "s90+acp"): ["ours"],
        (step, "none"): ["ours", "one query", "flash", "cudnn", "flex", "fla"],
        (step, "s90"): ["ours", "one query", "flex", "fla"],
        (step, "s90+acp"): ["ours", "one query"],
    }
    for row in measured:
        if row["what"] == "ours" or row["shape"] == step:
            assert row["difference"] is None
        else:
            assert 0.0 <= row["difference"] < 0.02, row
        assert row["fwd graph"] == 2.0 and (row["fwd+bwd graph"] is None) == (row["shape"] == step)


def test_the_gradients_that_are_timed_are_those_of_ours(others):
    work = Work(False, Shape(2, 40, 3, 16), "s70", False)
    wanted = attention.sequence_calls(work, CPU)
    assert wanted.both is not None
    exact = wanted.both()
    for name, count in (("flex", 3), ("flex+gate", 4), ("fla", 4)):
        calls = Others(flex=True, fla=True).calls(name, work, CPU)
        assert calls.both is not None
        grads = calls.both()
        assert len(grads) == count
        for got, want in zip(grads, exact, strict=False):
            got = got.transpose(1, 2) if got.dim() == 4 and calls.heads_first else got
            error = float((got.float() - want.float()).abs().max())
            assert error < 0.03 * float(want.float().abs().max()), name


def test_steps_of_others_are_the_last_row_of_a_sequence(others):
    work = Work(True, Shape(2, 16, 3, 16), "s70", False)
    q, k, v, _ = attention.inputs(work.shape, device=CPU)
    log_f = other_attention.work_gates(work, CPU)
    assert torch.equal(log_f, log_f[:1, :1, :1].expand(2, 16, 3)) and float(log_f.max()) < 0.0
    want = forgetting_attention(q[:, -1:], k, v, log_f)[:, 0].float()
    for name in ("flex", "fla"):
        got = Others(flex=True, fla=True).calls(name, work, CPU).forward().float()
        got = got[:, :, 0] if name == "flex" else got[0]
        torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)
    got = attention.one_query_calls(work, CPU).forward()[:, 0].float()
    torch.testing.assert_close(got, want)
    pruned = attention.one_query_calls(work._replace(pruned=True), CPU).forward()[:, 0].float()
    torch.testing.assert_close(pruned, want, atol=0.02, rtol=0.02)
    free = work._replace(gate="none")
    got = Others(sdpa=True).calls("flash", free, CPU).forward()[:, :, 0].float()
    want = forgetting_attention(q[:, -1:], k, v, torch.zeros_like(log_f))[:, 0].float()
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_of_torch_adds_the_decay_to_the_scores():
    """The change of the scores and the mask in torch's own FlexAttention, uncompiled."""
    _, mask = other_attention.fused_flex(CPU)
    q, k, v, _ = (x.float() for x in attention.inputs(Shape(1, 48, 2, 16), device=CPU))
    log_f = attention.gates("s70", Shape(1, 48, 2, 16), device=CPU)
    gated = other_attention.gated_flex(flex_attention, mask(48))
    got = gated(*(x.transpose(1, 2) for x in (q, k, v)), log_f).transpose(1, 2)
    assert_agree(got, forgetting_attention(q, k, v, log_f))


def test_without_fla_its_rows_are_left_out(on_cpu, capsys, monkeypatch):
    find = other_attention.importlib.util.find_spec
    monkeypatch.setattr(
        other_attention.importlib.util,
        "find_spec",
        lambda name: None if name == "fla" else find(name),
    )
    rows = attention.attention(shapes=("1,16,1,16",), cases=("none",), fla=True)
    assert [row["what"] for row in rows] == ["ours"]
    assert "the package fla is not installed, so its rows are left out" in capsys.readouterr().out


def test_a_failure_leaves_the_other_rows(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    work = Work(False, Shape(1, 2, 3, 4), "none", False)

    def fails():
        raise RuntimeError("out of shared memory\nand more")

    good = lambda: Calls(lambda: torch.ones(1), tuple, 0.25)  # noqa: E731
    table = Table("attention", Output(out=out), device="GPU")
    attention.measure(table, work, {"ours": good, "a": fails, "b": good}, two_and_five)
    kept = out.read_text().splitlines()
    attention.measure(table, work, {"ours": good}, two_and_five, end=0.0)
    assert [json.loads(line)["what"] for line in kept] == ["ours", "a", "b"]
    assert json.loads(kept[1])["error"] == "RuntimeError: out of shared memory"
    assert [row["what"] for row in table.rows] == ["ours", "b"]
    assert "left out: no time" in capsys.readouterr().out
    assert out.read_text().splitlines() == kept
    with pytest.raises(RuntimeError, match="1 of 3 rows failed, the first with RuntimeError: out"):
        table.finished()


def test_steps_are_timed_on_a_full_cache(monkeypatch):
    made = []
    new = attention_step.Cache.new
    keep = lambda **sizes: made.append(new(**sizes)) or made[-1]  # noqa: E731
    monkeypatch.setattr(attention_step.Cache, "new", keep)
    work = Work(True, Shape(2, 8, 3, 16), "s70", True)
    calls = attention.step_calls(work, CPU, dtype=torch.float32)
    assert made[0].length.tolist() == [[8] * 3] * 2
    value = made[0].v[:, :, 0]
    torch.testing.assert_close(calls.forward(), value)  # all values are alike
    rate = attention.decay_rate("s70", work.shape)
    fall = made[0].decay.sum(2)
    assert float((fall[..., 1] - fall[..., 2]).mean()) == pytest.approx(rate, rel=1e-4)


def test_what_is_compiled_ahead_depends_on_no_gate(on_cpu, monkeypatch, tmp_path):
    official(tmp_path / "theirs", LIKE_OURS)
    asked = []
    monkeypatch.setattr(attention, "compiled", lambda task, given, **options: asked.extend(given))
    attention.attention(
        shapes=("1,16,1,16",),
        cases=("none", "s70+acp", "s90+acp"),
        official=tmp_path / "theirs",
        jobs=2,
    )
    assert [(work.pruned, name) for work, name, _ in asked] == [
        (False, "ours"), (False, "official"), (True, "ours"), (True, "official"),
    ]  # fmt: skip
    for given in asked:
        attention.call(*given)


def test_compiling_ahead_outlives_what_fails(tmp_path, capsys):
    folder = tmp_path / "made"
    compiled(os.mkdir, [(folder,), (folder,)], jobs=1, seconds=60.0)
    assert folder.is_dir()
    out = capsys.readouterr().out
    assert "FileExistsError" in out
    assert "compiling ahead took" in out
    compiled(time.sleep, [(30.0,)], jobs=1, seconds=0.1)
    assert "out of time" in capsys.readouterr().out


Launch = namedtuple("Launch", "rows columns warps stages registers", defaults=(None,))
TABLE = {("forward", 64, 2): Launch(128, 64, 8, 3), ("keys", 64, 2): Launch(64, 64, 4, 2)}


def test_entries_are_those_of_the_table_and_functions_with_a_launch():
    kernels = types.ModuleType("kernels")
    pair = (Launch(1, 1, 1, 1), Launch(2, 2, 2, 2))  # of a function that takes `launch`
    vars(kernels)["CONFIGS"] = table = TABLE | {("forward", 16, 2): pair}
    vars(kernels)["forward"] = lambda x, *, launch=None: (x, launch)
    vars(kernels)["other"] = lambda x: x
    known = bench_tiles.entries(kernels)
    assert known == {
        "forward,64,2": Launch(128, 64, 8, 3),
        "keys,64,2": Launch(64, 64, 4, 2),
        "forward": None,
    }
    before = kernels.forward
    with pytest.raises(KeyError), bench_tiles.replaced(kernels, "keys,64,2", "another"):
        assert table == TABLE | {("forward", 16, 2): pair, ("keys", 64, 2): "another"}
        raise KeyError
    assert table == TABLE | {("forward", 16, 2): pair}
    with bench_tiles.replaced(kernels, "forward", "another"):
        assert kernels.forward(3) == (3, "another")
    assert kernels.forward is before


def test_candidates_are_read(tmp_path):
    default = TABLE["keys", 64, 2]
    texts = ("64,64,4,2", "32,64,4,2,168", "32,64,4,2,None")
    given = bench_tiles.parsed_configs(texts, Launch, default)
    assert given == [default, Launch(32, 64, 4, 2, 168), Launch(32, 64, 4, 2)]
    file = tmp_path / "configs.json"
    file.write_text("[[32, 64, 4, 2, 168], [32, 64, 4, 2]]")
    assert bench_tiles.parsed_configs((str(file),), Launch, default) == given
    grid = bench_tiles.parsed_configs((), Launch, default)
    assert grid[0] == default
    assert len(grid) == len(set(grid)) == 36
    assert {launch.registers for launch in grid} == {None}
    grid = bench_tiles.parsed_configs((), Launch, Launch(64, 64, 4, 2, 168))
    assert {launch.registers for launch in grid} == {168}
    assert bench_tiles.parsed_configs(("1,2,3,4",), Launch, None) == [None, Launch(1, 2, 3, 4)]
    both = bench_tiles.combined_configs(("32,64,4,2,168+1,2,3,4",), Launch, [default, default])
    assert both == [(default, default), (given[1], Launch(1, 2, 3, 4))]
    with pytest.raises(ValueError, match="2 parts"):
        bench_tiles.combined_configs(("1,2,3,4",), Launch, [default, default])


def test_wrong_candidates_are_named(on_cpu):
    with pytest.raises(ValueError, match=r"expected one of forward,64,2 .* got 'forward,7'"):
        bench_tiles.attention_tiles(key="forward,7")
    with pytest.raises(ValueError, match="values of rows, columns, warps, stages"):
        bench_tiles.parsed_configs(("64,64",), Launch, None)
    with pytest.raises(ValueError, match="got '64,x,4,2'"):
        bench_tiles.parsed_configs(("64,x,4,2",), Launch, None)


def test_the_sweep_ranks_what_agrees_with_the_entry(on_cpu, monkeypatch, capsys):
    kernels = types.ModuleType("cerl.kernels.stand_in")
    vars(kernels)["CONFIGS"], vars(kernels)["Launch"] = dict(TABLE), Launch
    table = vars(kernels)["CONFIGS"]
    monkeypatch.setitem(sys.modules, "cerl.kernels.stand_in", kernels)
    speed = {128: 3.0, 64: 1.0, 32: 9.0, 16: 0.5}

    def calls(work, device):
        launch = table["forward", 64, 2]
        if launch.warps == 1:
            raise RuntimeError("out of resource: registers")
        wrong = float("nan") if launch.rows == 16 else 0.001 * launch.rows
        result = torch.tensor([1.0, 40.0 + wrong])
        return Calls(lambda: result, lambda: (result,), 0.0)

    def timer(call):
        call()
        return Spent(speed[table["forward", 64, 2].rows], 0.0)

    monkeypatch.setattr(bench_tiles, "sequence_calls", calls)
    monkeypatch.setattr(bench_tiles, "stopwatch", lambda repeats: timer)
    measured = bench_tiles.attention_tiles(
        key="forward,64,2",
        module="stand_in",
        configs=("64,64,4,2", "64,64,1,2", "32,64,4,2", "16,64,4,2"),
        jobs=0,
    )
    assert [row["forward"] for row in measured] == [3.0, 1.0, 9.0]
    assert table == TABLE
    out = capsys.readouterr().out
    assert "out of resource: registers" in out
    assert "results differ" in out
    ranked = out.partition("fastest first")[2].splitlines()[2:]
    assert [line.split()[4].split(",")[0] for line in ranked] == ["64", "128", "32"]


def test_differences_are_shares_of_the_largest_value():
    wanted = [torch.tensor([1.0, -10.0]), torch.zeros(2)]
    assert bench_tiles.difference(wanted, wanted) == 0.0
    assert bench_tiles.difference([torch.tensor([2.0, -10.0]), wanted[1]], wanted) == 0.1
    assert bench_tiles.difference([torch.tensor([math.nan, -10.0]), wanted[1]], wanted) > 1e300


@pytest.mark.slow
def test_the_pruning_study_writes_rows_and_a_plot(on_cpu, tmp_path, capsys):
    measured = pruning.acp(
        folder=tmp_path / "acp",
        lengths=(64, 512),
        decays=(1e-3, 0.3),
        positions=512,
        heads=2,
        width=16,
    )
    table = results.read(tmp_path / "acp/rows.parquet", pruning.SCHEMA)
    assert table.to_pylist() == measured
    keys = [(row["length"], row["decay"], row["pruned"]) for row in measured]
    assert keys == [(t, d, p) for d in (1e-3, 0.3) for t in (64, 512) for p in (False, True)]
    off, on = measured[-2:]
    assert (on["batch"], on["heads"], on["width"], on["dtype"]) == (1, 2, 16, "bfloat16")
    assert off["skipped"] == 0.0
    assert off["error"] is off["threshold"] is off["allowed"] is None
    assert on["forward"] == on["both"] == 2.0
    log_f = pruning.gates(Shape(1, 512, 2, 16), 0.3, CPU)
    assert float(log_f.mean()) == pytest.approx(-0.3, rel=0.05)
    block = make_plan(512, 16, torch.bfloat16).tiles
    assert on["skipped"] == pytest.approx(skipped_share(log_f, block, on["threshold"]))
    assert on["skipped"] > 0.4
    assert measured[3]["skipped"] == measured[3]["error"] == 0.0
    assert 0.0 <= on["error_fp32"] <= on["allowed"] + 1e-5  # for rounding
    assert on["allowed"] == pytest.approx(2 * math.exp(-10) * float(loud(on)))
    picture = image.imread(tmp_path / "acp/acp.png")
    assert picture.shape[1] == 1100  # 5.5 inches at 200 dots an inch
    assert picture[..., :3].std() > 0.05
    # With differences there is a second line of panels.
    some = [row | {"error": 1e-3, "error_fp32": 1e-6} if row["pruned"] else row for row in measured]
    pruning.draw(some, tmp_path / "some.png")
    pruning.draw([row | {"error": 0.0, "error_fp32": 0.0} for row in measured], tmp_path / "no.png")
    with_panel, without = (image.imread(tmp_path / name) for name in ("some.png", "no.png"))
    assert with_panel.shape[0] > 1.5 * without.shape[0]
    assert "skipped" in capsys.readouterr().out


def loud(row):
    shape = Shape(row["batch"], row["length"], row["heads"], row["width"])
    return attention.inputs(shape, device=CPU)[2].abs().amax()


def test_the_error_is_that_of_the_pruned_output():
    q, k, v, _ = attention.inputs(Shape(1, 512, 1, 16), device=CPU, dtype=torch.float32)
    log_f = torch.full((1, 512, 1), -0.01)
    weights = (q[0, :, 0] @ k[0, :, 0].T / 4 + (log_f.cumsum(1)[0] - log_f.cumsum(1)[0].T)).exp()
    size = make_plan(512, 16, q.dtype).tiles
    kept = visited(log_f, queries=512, tiles=size, threshold=-1.0)[0, 0]
    kept = kept.repeat_interleave(size.rows, 0).repeat_interleave(size.columns, 1)[:512, :512]
    whole, pruned = (
        w / w.sum(1, keepdim=True) @ v[0, :, 0] for w in (weights.tril(), weights.tril() * kept)
    )
    wanted = float((whole - pruned).abs().amax())
    assert wanted > 0.01
    assert pruning.output_error(q, k, v, log_f, -1.0) == pytest.approx(wanted, rel=1e-3)


def test_the_study_refuses_what_it_cannot_draw(on_cpu, tmp_path):
    with pytest.raises(ValueError, match=r"divisors of 512 positions, got \[100\]"):
        pruning.acp(folder=tmp_path, lengths=(64, 100), positions=512)
    with pytest.raises(ValueError, match="means above 0"):
        pruning.acp(folder=tmp_path, lengths=(64,), decays=(0.0,), positions=512)


def test_time_runs_out_between_points(on_cpu, tmp_path, capsys):
    measured = pruning.acp(
        folder=tmp_path, lengths=(64,), decays=(0.1,), positions=64, heads=1, width=16, seconds=-1.0
    )
    assert measured == []
    assert "left out: no time" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_operators_agree_with_a_pruned_call():
    work = Work(False, Shape(1, 256, 1, 16), "s90", True)
    calls = attention.sequence_calls(work, CPU, dtype=torch.float32)
    q, k, v, do = attention.inputs(work.shape, device=CPU, dtype=torch.float32)
    log_f = attention.gates("s90", work.shape, device=CPU)
    leaves = [x.requires_grad_() for x in (q, k, v, log_f)]
    o = forgetting_attention(*leaves, threshold=attention.threshold(work.shape))
    assert calls.both is not None
    for ours, wanted in zip(calls.both(), torch.autograd.grad(o, leaves, do), strict=True):
        assert_agree(ours, wanted)
    assert_agree(calls.forward(), o.detach())


def test_the_examples_of_the_guide_run():
    text = (Path(__file__).parent.parent / "docs/attention.md").read_text()
    blocks = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    names: dict[str, torch.Tensor] = {}
    exec("\n".join(blocks), names)
    assert names["q"].grad is not None
    assert names["skipped"].shape == (2, 4)
    assert names["o"].shape == (2, 300, 4, 64)
    assert 0.0 < float(names["difference"].detach()) < 0.02
