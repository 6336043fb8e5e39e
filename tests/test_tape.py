"""Tapes: every call is the step that the function would make, or no tape is played."""

import numpy as np
import pytest
import torch

from cerl import graph, wiring
from cerl.config import load
from cerl.replay import fill_randomly
from cerl.tape import plan as plans
from cerl.tape import taped
from cerl.tape.plan import plan
from cerl.tape.record import record
from cerl.tape.taped import WARM_UP, Taped

CALLS = WARM_UP + 5
aten = torch.ops.aten


def both(make):
    """Results of a function that runs as it is written, and of its tape, after every call.

    Args: make(state) gives the function that changes `state`, a tensor [6].
    """
    histories, last = [], None
    for wrap in (lambda step: step, Taped):
        state = torch.linspace(-1.0, 1.0, 6)
        last = wrap(make(state))
        history = []
        for _ in range(CALLS):
            last()
            history.append(state.clone())
        histories.append(torch.stack(history))
    assert isinstance(last, Taped)
    return *histories, last


def check_played(make):
    plain, played, tape = both(make)
    assert torch.equal(plain.view(torch.int32), played.view(torch.int32))
    assert tape.tape is not None and not tape.why, tape.why
    return tape.tape


def test_gradients_views_and_changes_in_place_are_repeated():
    def make(state):
        weight = torch.ones(2, 3, 3, requires_grad=True)
        moment = torch.zeros(2, 3, 3)

        def step():
            x = state.view(2, 3).unsqueeze(1)
            y = torch.relu(x @ weight).transpose(1, 2).squeeze()
            (grad,) = torch.autograd.grad((y.sum(1) - x[:, 0, 1]).square().sum(), [weight])
            with torch.no_grad():
                aten._foreach_lerp_([moment], [grad], 0.1)
                root = aten._foreach_sqrt([moment.square() + 1e-3])
                aten._foreach_sub_([weight], aten._foreach_div([moment], root), alpha=0.01)
                (moment2,) = aten._foreach_div([moment], 2.0)
                state.add_(moment2.sum())
                state.copy_((0.9 * state + 0.1 * weight.sum(0).flatten()[:6]).clamp(-2, 2))

        return step

    check_played(make)


def test_an_argument_that_is_read_later_is_not_overwritten():
    def make(state):
        def step():
            a = state * 0.5
            b = a + 1.0  # cannot lie where `a` does, which the last line reads
            c = torch.tanh(b)  # may lie where `b` does
            state.copy_(c - a)

        return step

    check_played(make)


def test_a_tensor_that_is_filled_in_place_starts_anew_every_time():
    def make(state):
        def step():
            total = torch.zeros(6)
            total.add_(state)
            total[2:4].mul_(3.0)
            state.copy_(torch.where(total > 1.0, -total, total + 0.25))

        return step

    check_played(make)


def test_the_same_operation_counts_anew_after_its_argument_changed():
    def make(state):
        def step():
            before = state.exp()
            state.mul_(0.5)
            after = state.exp()  # the same call, of other numbers
            state.copy_(after - before)

        return step

    check_played(make)


def test_what_is_constant_unread_or_made_twice_is_not_played():
    state = torch.ones(4)

    def step():
        scale = torch.arange(4) * 2.0 + 1.0  # constant
        state.exp().log().sum()  # nobody reads it
        one, two = state * scale, state * scale
        state.copy_(one + two)

    found = record(step)
    assert not isinstance(found, str) and len(found.calls) > 6
    assert [name.split(".")[1] for name in plan(found).names] == ["mul", "add", "copy_"]


def test_operations_with_several_results_and_with_lists():
    def make(state):
        def step():
            value, place = state.view(2, 3).max(1)
            parts = torch.cat([value, state[:1], place.float()]).split([2, 3])
            state.copy_(torch.stack([parts[0].sum(), *parts[1], *parts[0]]) * 0.3)

        return step

    check_played(make)


def test_whole_numbers_hash_as_they_do_without_a_tape():
    def make(state):
        counter = torch.zeros((), dtype=torch.int64)

        def step():
            z = counter * 0x9E3779B9 + torch.arange(6)
            z = (z ^ (z >> 7)) * 0x5DEECE66D
            state.copy_(((z & 0xFFFF) % 97).float() / (5.0 - (z & 3).float()))
            counter.add_(1)

        return step

    check_played(make)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: float(x[0]),
        lambda x: x.tolist()[0],
        lambda x: float(x.numpy()[0]),
        lambda x: float(np.asarray(x)[0]),
        lambda x: float(len(x[x > 0])),
    ],
    ids=["item", "tolist", "numpy", "asarray", "mask"],
)
def test_a_function_that_reads_numbers_runs_as_it_is_written(read):
    def make(state):
        def step():
            state.add_(0.1 * read(state))

        return step

    plain, played, tape = both(make)
    assert torch.equal(plain, played)
    assert tape.tape is None and tape.why


def test_a_function_whose_operations_change_is_found_out_by_the_check():
    calls = [0]

    def make(state):
        calls[0] = 0

        def step():
            calls[0] += 1
            state.add_(1.0 if calls[0] != WARM_UP + 2 else 2.0)

        return step

    plain, played, tape = both(make)
    assert torch.equal(plain, played)
    assert tape.tape is None and "bits" in tape.why


def test_a_function_that_changes_too_much_to_check_runs_as_it_is_written(monkeypatch):
    monkeypatch.setattr(taped, "MOST_CHECKED", 23)
    plain, played, tape = both(lambda state: lambda: state.add_(1.0))
    assert torch.equal(plain, played)
    assert tape.tape is None and "too much" in tape.why


def test_a_large_ring_of_which_rows_are_written_is_not_copied_for_the_check(monkeypatch):
    monkeypatch.setattr(plans, "LARGE", 1000)
    ring = torch.zeros(1000)
    at = torch.zeros(1, dtype=torch.int64)

    def make(state):
        def step():
            ring.index_copy_(0, at, state[:1])
            state.add_(1.0)
            at.add_(1)

        return step

    tape = check_played(make)
    assert sorted(map(len, tape.writes)) == [8, 24]
    written = torch.arange(CALLS) - 1.0  # after as many rows of the function that has no tape
    assert torch.equal(ring[: 2 * CALLS], torch.cat([written, written]))


def test_a_tape_that_cannot_be_played_leaves_the_state_to_the_function(monkeypatch):
    def fails(*args, out):
        raise RuntimeError("no such thing")

    monkeypatch.setitem(plans._LISTS, "_foreach_sqrt", fails)

    def make(state):
        def step():
            state.add_(1.0)
            state.copy_(aten._foreach_sqrt([state])[0] + 1.0)

        return step

    plain, played, tape = both(make)
    assert torch.equal(plain, played)
    assert tape.tape is None and tape.why


def test_random_numbers_of_a_generator_cannot_be_repeated():
    def step() -> None:
        torch.zeros(2).copy_(torch.rand(2))

    tape = Taped(step)
    for _ in range(CALLS):
        tape()
    assert tape.tape is None and "rand" in tape.why


def test_an_environment_variable_turns_tapes_off(monkeypatch):
    monkeypatch.setenv("CERL_EAGER", "1")
    calls = []
    run = Taped(lambda: calls.append(None))
    for _ in range(CALLS):
        run()
    assert len(calls) == CALLS and "CERL_EAGER" in run.why


def test_an_error_of_the_function_is_raised_and_the_next_call_goes_on():
    state, calls = torch.zeros(1), []

    def step():
        calls.append(None)
        if len(calls) == WARM_UP + 1:  # the call that is recorded
            raise ValueError("this once")
        state.add_(1.0)

    run = Taped(step)
    for _ in range(WARM_UP):
        run()
    with pytest.raises(ValueError, match="this once"):
        run()
    for k in range(5):
        run()
        assert float(state) == WARM_UP + k + 1
    assert run.tape is not None


@pytest.mark.parametrize(
    "name", ["catch/cerl", "minatar/qrdqn", "memory/fox-cerl", "point_mass/cerl", "gym/cartpole"]
)
def test_updates_and_agent_steps_of_presets_are_played(name, monkeypatch):
    made: list[Taped] = []

    class Kept(Taped):
        def __init__(self, step):
            super().__init__(step)
            made.append(self)

    monkeypatch.setattr(graph, "Taped", Kept)
    small = {"seeds": (1,), "ensemble.members": 2, "replay.batch": 4, "replay.capacity": 2_000}
    small |= {"eval.episodes": 1, "device": "cpu", "net.hidden": (8, 8)}
    small |= {"replay.start": 500, "eval.time_limit": 20}
    parts = wiring.assemble(load(name, small))
    fill_randomly(parts.replay, parts.env.spec, 2)
    update = graph.captured(parts.learner.update, parts.device)
    for _ in range(CALLS):
        parts.collector.step(update)
    evaluator = parts.evaluator.player
    evaluator.restart(1, steps=0)
    for _ in range(CALLS):
        evaluator.step()
    wiring.close(parts)
    used = [tape for tape in made if tape.calls]
    assert len(used) >= 3
    assert [tape.why for tape in used] == [""] * len(used)
    assert all(tape.tape is not None and tape.checked for tape in used)
