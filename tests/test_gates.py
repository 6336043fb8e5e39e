"""Measurements of forget gates against slow loops over pairs of rows."""

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from cerl.kernels.attention import forgetting_attention
from cerl.nets.gates import gauges, prunable_pairs, survival

S, N, B, H, D = 2, 2, 3, 2, 8
LEAD = (S, N, B)


class Case:
    """Random rows, and what the operator gives for them."""

    def __init__(
        self,
        rows: int,
        *,
        often: float,
        window: int,
        pruned: bool,
        gate: float = 2.0,
        rule: Any = "static",
    ) -> None:
        generator = torch.Generator().manual_seed(rows)
        shape = (S * N * B, rows, H, D)
        self.q, self.k, self.v = (torch.randn(shape, generator=generator) for _ in range(3))
        logit = torch.randn(shape[:3], generator=generator) + torch.tensor([gate, gate + 3.0])
        self.log_f = torch.nn.functional.logsigmoid(logit)
        self.start = torch.rand(shape[:2], generator=generator) < often
        self.window, self.bound, self.pruned, self.rule = window, torch.tensor(3.0), pruned, rule

    def found(self, log_eps: float = -10.0) -> dict[str, Tensor]:
        bound = self.bound if self.pruned else None
        _, lse, skipped = forgetting_attention(
            *(self.q, self.k, self.v, self.log_f),
            start=self.start,
            window=self.window,
            bound=bound,
            log_eps=log_eps,
            rule=self.rule,
            return_lse=True,
            return_skipped=True,
        )
        return gauges(
            self.q,
            self.k,
            self.log_f,
            lse=lse,
            skipped=skipped,
            start=self.start,
            window=self.window,
            bound=self.bound,
            log_eps=log_eps,
            lead=LEAD,
        )

    def first(self, g: int, i: int) -> int:
        """The first row that row i sees."""
        begin = max(j for j in range(i + 1) if j == 0 or self.start[g, j])
        return max(begin, i - self.window + 1)

    def decay(self, g: int, h: int, i: int, j: int) -> float:
        return float(self.log_f[g, j + 1 : i + 1, h].double().sum())


def streams(s: int, n: int) -> range:
    first = (s * N + n) * B
    return range(first, first + B)


@pytest.mark.parametrize("window", [5, 40])
@pytest.mark.parametrize("often", [0.0, 0.15])
def test_shares_are_those_of_loops_over_pairs(window, often):
    case = Case(17, often=often, window=window, pruned=False, gate=-1.0)
    case.bound = torch.tensor(0.2)
    limit = -(2 * 0.2 + math.log(17)) - 1.0
    found = case.found(log_eps=-1.0)
    for s in range(S):
        for n in range(N):
            for h in range(H):
                prunable, pairs, own = 0, 0, []
                for g in streams(s, n):
                    for i in range(17):
                        seen = range(case.first(g, i), i + 1)
                        decays = [case.decay(g, h, i, j) for j in seen]
                        prunable += sum(decay < limit for decay in decays)
                        pairs += len(decays)
                        scores = case.k[g, list(seen), h].double() @ case.q[g, i, h].double()
                        p = (scores / math.sqrt(D) + torch.tensor(decays).double()).softmax(0)
                        own.append(float(p[-1]))
                assert float(found["prunable_share"][s, n, h]) == pytest.approx(prunable / pairs)
                assert float(found["self_share"][s, n, h]) == pytest.approx(
                    statistics.mean(own), rel=1e-5
                )
    assert 0.01 < found["prunable_share"].mean() < 0.9
    assert (found["skipped_share"] == 0).all()  # so few rows are one block


def test_half_lives_of_constant_gates_by_hand():
    """Gates of time scale 10 and 100: a half is forgotten after 7 steps, and after 70."""
    rows = 40
    case = Case(rows, often=0.0, window=rows, pruned=False)
    case.log_f = torch.tensor([-1 / 10, -1 / 100]).expand_as(case.log_f)
    found = case.found()
    assert (found["gate_half_life"][..., 0] == 7).all()
    assert (found["gate_half_life"][..., 1] == rows).all()  # nobody has died in the window
    assert (found["gate_half_life_spread"] == 0).all()


def test_steps_until_a_half_are_those_of_a_loop_and_end_with_the_episode():
    case = Case(30, often=0.1, window=30, pruned=False, gate=0.0)
    log_f = case.log_f.double()
    forgotten = -log_f.masked_fill(case.start.unsqueeze(2), 0.0).cumsum(1).transpose(1, 2)
    lived, died = survival(forgotten.contiguous(), case.start)
    ends = 0
    for g in range(len(log_f)):
        for h in range(H):
            for t in range(30):
                steps, over = 0, False
                while t + steps + 1 < 30 and not case.start[g, t + steps + 1] and not over:
                    steps += 1
                    over = case.decay(g, h, t + steps, t) <= -math.log(2.0)
                assert (int(lived[g, h, t]), bool(died[g, h, t])) == (steps, over)
                ends += not over
    assert 0 < ends < died.numel()


def kaplan_meier(lived: list[int], died: list[bool], rows: int, part: float) -> int:
    alive = 1.0
    for step in range(1, rows + 1):
        risk = sum(one >= step for one in lived)
        if risk:
            dead = sum(one == step and gone for one, gone in zip(lived, died, strict=True))
            alive *= 1.0 - dead / risk
        if alive <= 1.0 - part + 1e-9:
            return step
    return rows


def test_half_lives_are_estimated_as_survival_times():
    case = Case(30, often=0.1, window=30, pruned=False, gate=0.0)
    found = case.found()
    forgotten = -case.log_f.double().masked_fill(case.start.unsqueeze(2), 0.0).cumsum(1)
    lived, died = survival(forgotten.transpose(1, 2).contiguous(), case.start)
    for s in range(S):
        for n in range(N):
            for h in range(H):
                steps, gone = (part[streams(s, n), h].flatten().tolist() for part in (lived, died))
                lower, median, upper = (kaplan_meier(steps, gone, 30, q) for q in (0.25, 0.5, 0.75))
                assert float(found["gate_half_life"][s, n, h]) == median
                assert float(found["gate_half_life_spread"][s, n, h]) == upper - lower
    assert (found["gate_half_life_spread"] > 0).any()


@pytest.mark.parametrize("rule", ["static", "running"])
def test_what_long_windows_skip_is_nearly_all_that_may_be(rule):
    case = Case(1300, often=0.0, window=1300, pruned=True, gate=-1.0, rule=rule)
    case.log_f[..., 1] = -0.02
    found = case.found()
    skipped, prunable = found["skipped_share"], found["prunable_share"]
    assert (prunable[..., 0] > 0.8).all() and (skipped[..., 0] > 0.8 * prunable[..., 0]).all()
    assert (skipped < prunable + 0.05).all() or rule == "running"
    # Tiles that lie outside of the episode are computed by nobody, so they are not skipped either.
    apart = Case(700, often=0.02, window=64, pruned=True, gate=8.0)
    assert (apart.found()["skipped_share"].abs() < 1e-6).all()


def test_prunable_pairs_by_hand():
    forgotten = torch.tensor([[[0.0, 1.0, 3.0, 6.0]]], dtype=torch.float64)
    left = torch.tensor([[[0, 0, 0, 1]]])
    prunable, pairs = prunable_pairs(forgotten, left, torch.tensor([[-2.5]]))
    # Row 2 to row 0 has decayed by 3; row 3 to rows 1 and 2 by 5 and 3, and it does not see row 0.
    assert (int(prunable), int(pairs)) == (3, 9)


def test_rows_without_gates_have_only_their_own_share():
    case = Case(9, often=0.1, window=9, pruned=False)
    case.log_f = torch.zeros_like(case.log_f)
    whole = case.found()
    _, lse = forgetting_attention(
        case.q, case.k, case.v, case.log_f, start=case.start, window=9, return_lse=True
    )
    found = gauges(
        case.q,
        case.k,
        None,
        lse=lse,
        skipped=torch.zeros(S * N * B, H),
        start=case.start,
        window=9,
        bound="measured",
        log_eps=-10.0,
        lead=LEAD,
    )
    assert found.keys() == {"self_share"} and torch.equal(found["self_share"], whole["self_share"])


def test_a_broken_seed_leaves_the_others_alone():
    case = Case(20, often=0.1, window=20, pruned=False)
    want = case.found()
    for part in (case.q, case.log_f):
        part[: N * B] = torch.nan
    found = case.found()
    for name, value in found.items():
        assert value[0].isnan().all() and torch.equal(value[1], want[name][1]), name
