"""The head table is compared with the definitions of the variants, next values with loops."""

import pytest
import torch

from cerl.config import EnsembleConfig
from cerl.head_kinds import HEAD_KINDS, HeadKind, Source
from cerl.heads import double_q, head_table, next_action_values, next_values, of_choosers


def table_of(kind, members=3, gamma=0.99, horizons=10):
    config = EnsembleConfig(members=members, heads=kind, horizons=horizons)
    return head_table(config, gamma=gamma, device="cpu")


# (member, head) whose greedy action is taken and (member, head) that values it; m = (i + j) mod N
RULES = {
    "own": lambda i, j, m: ((i, 0), (i, 0)),
    "cerl": lambda i, j, m: ((m, 0), (m, 0)),
    "own_target": lambda i, j, m: ((m, 0), (i, j)),
    "single_actor": lambda i, j, m: ((0, 0), (m, 0)),
    "multi_horizon": lambda i, j, m: ((i, 0), (i, j)),
}


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("members", [1, 2, 5])
def test_every_head_names_the_action_and_value_of_its_definition(kind, members: int):
    table = table_of(kind, members, horizons=4)
    fixed = {"own": 1, "multi_horizon": 4}
    heads = fixed.get(kind, members)
    assert table.heads == heads and table.gamma.shape == (heads,)
    (places,) = table.places  # one gather makes all targets
    assert places.chooser.shape == places.value.shape == (members, heads)
    for i in range(members):
        for j in range(heads):
            action, value = RULES[kind](i, j, (i + j) % members)
            assert (int(places.chooser[i, j]), 0) == action
            assert divmod(int(places.value[i, j]), table.value_heads) == value


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("members", [1, 3])
def test_a_table_is_crossed_where_a_head_values_an_action_of_another_member(kind, members: int):
    table, rule = table_of(kind, members=members), RULES[kind]
    pairs = [(i, j) for i in range(members) for j in range(table.heads)]
    found = [rule(i, j, (i + j) % members) for i, j in pairs]
    assert table.crossed == any(action[0] != value[0] for action, value in found)


def test_head_0_is_always_the_members_own():
    for kind in ("own", "cerl", "own_target", "multi_horizon"):
        table = table_of(kind, 4)
        (places,) = table.places
        own = [(i, 0) for i in range(4)]
        assert places.chooser[:, 0].tolist() == [0, 1, 2, 3]
        assert float(table.gamma[0]) == pytest.approx(table.own_gamma, rel=1e-6)
        assert [divmod(int(x), table.value_heads) for x in places.value[:, 0]] == own


def test_the_ten_horizons_are_the_originals():
    gammas = [0.99, 0.98889, 0.9875, 0.98571, 0.98333, 0.98, 0.975, 0.96667, 0.95, 0.90]
    assert table_of("multi_horizon").gamma.tolist() == pytest.approx(gammas, abs=5e-6)
    for kind in ("own", "cerl", "own_target", "single_actor"):
        assert table_of(kind, gamma=0.97).gamma.tolist() == pytest.approx(
            [0.97] * table_of(kind).heads
        )


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("atoms", [(), (6,)])
def test_next_values_equal_a_loop_over_heads(kind, atoms):
    seeds, members, batch, learnt, actions = 2, 3, 4, 2, 5
    table = table_of(kind, members, horizons=4)
    generator = torch.Generator().manual_seed(1)
    lead = (seeds, members, batch, learnt)
    choose = torch.randn(*lead, 1, actions, generator=generator)
    value = torch.randn(*lead, table.value_heads, actions, *atoms, generator=generator)
    got = next_values(table, choose, value)
    assert got.shape == (*lead, table.heads, *atoms)
    for s in range(seeds):
        for i in range(members):
            for b in range(batch):
                for t in range(learnt):
                    for j in range(table.heads):
                        chooser, valuer = RULES[kind](i, j, (i + j) % members)
                        greedy = choose[s, chooser[0], b, t, chooser[1]].tolist()
                        best = greedy.index(max(greedy))
                        want = value[s, valuer[0], b, t, valuer[1], best]
                        assert torch.equal(got[s, i, b, t, j], want)


def test_double_q_values_the_action_that_the_other_network_chooses():
    table = table_of("cerl", 2)
    # Member 0 chooses action 1, member 1 action 0; a head asks both of one member.
    choose = torch.tensor([[1.0, 2.0], [4.0, 3.0]]).view(1, 2, 1, 1, 1, 2)
    value = torch.tensor([[10.0, 20.0], [30.0, 40.0]]).view(1, 2, 1, 1, 1, 2).requires_grad_()
    reward = torch.tensor([0.5, 1.0]).view(1, 1, 1, 1, 2)
    discount = torch.tensor([0.5, 0.25]).view(1, 1, 1, 1, 2)
    y = double_q(table, reward=reward, discount=discount, choose=choose, value=value)
    # Head 0: 0.5 + 0.5 V(own); head 1: 1 + 0.25 V(the other), with V of member 0 = 20, of 1 = 30.
    assert y.flatten(1).tolist() == [[10.5, 8.5, 15.5, 6.0]] and not y.requires_grad
    spread = torch.stack([value - 1, value + 1], -1)  # a distribution of two atoms
    both = double_q(table, reward=reward, discount=discount, choose=choose, value=spread)
    assert both[0, 0, 0, 0].tolist() == [[10.0, 11.0], [8.25, 8.75]]


def test_ties_of_the_next_action_go_to_the_first():
    table = table_of("own", 1)
    choose = torch.tensor([1.0, 3.0, 3.0, 3.0]).view(1, 1, 1, 1, 1, 4)
    value = torch.arange(4.0).view(1, 1, 1, 1, 1, 4)
    assert float(next_values(table, choose, value)) == 1.0


def test_values_that_do_not_fit_the_table_are_refused():
    table = table_of("cerl", 3)
    fits = torch.zeros(1, 3, 2, 1, 1, 4)
    next_values(table, fits, fits)
    with pytest.raises(ValueError, match="3 members"):
        next_values(table, torch.zeros(1, 2, 2, 1, 1, 4), fits)
    with pytest.raises(ValueError, match="3 members"):
        next_values(table, fits, torch.zeros(1, 1, 2, 1, 1, 4))
    with pytest.raises(ValueError, match="heads"):
        next_values(table, fits, torch.zeros(1, 3, 2, 1, 3, 4))
    with pytest.raises(ValueError, match="heads"):
        next_values(table_of("own_target", 3), fits, fits)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("crossed", [False, True])
def test_next_action_values_equal_a_loop_over_heads(kind, crossed):
    seeds, members, rows = 2, 3, 5
    table = table_of(kind, members, horizons=4)
    generator = torch.Generator().manual_seed(1)
    count = members if crossed else 1
    value = torch.randn(seeds, members, count, rows, table.value_heads, generator=generator)
    assert table.crossed == (kind in ("own_target", "single_actor"))
    if table.crossed and not crossed:
        with pytest.raises(ValueError, match="other members; expected 3 actions, got 1"):
            next_action_values(table, value)
        return
    got = next_action_values(table, value)
    log_p = torch.randn(seeds, members, rows, generator=generator)
    entropy = of_choosers(table, log_p)
    assert got.shape == entropy.shape == (seeds, members, rows, table.heads)
    for i in range(members):
        for j in range(table.heads):
            (actor, _), (owner, head) = RULES[kind](i, j, (i + j) % members)
            want = value[:, owner, actor if crossed else 0, :, head]
            assert torch.equal(got[:, i, :, j], want)
            assert torch.equal(entropy[:, i, :, j], log_p[:, actor])


def test_action_values_that_do_not_fit_the_table_are_refused():
    with pytest.raises(ValueError, match="needs 1 heads of each at 1 or 3 actions"):
        next_action_values(table_of("cerl"), torch.zeros(1, 3, 2, 5, 1))


def register(monkeypatch, target, **options):
    """A kind of heads of the test's own; the configuration is not asked for it."""
    monkeypatch.setitem(HEAD_KINDS, "of_a_test", HeadKind("a test's", target, **options))
    config = EnsembleConfig(members=3).model_copy(update={"heads": "of_a_test"})
    return head_table(config, gamma=0.9, device="cpu")


def smallest_of_two(values):
    """The smaller one of what a member and the next one expect of the member's choice."""
    mine = values.take(lambda i, j: Source(i, i))
    theirs = values.take(lambda i, j: Source(i, (i + 1) % values.members))
    return mine.minimum(theirs)


def test_a_kind_may_compute_with_what_it_takes(monkeypatch):
    table = register(monkeypatch, smallest_of_two, heads="one")
    assert (table.heads, table.value_heads, table.crossed, len(table.places)) == (1, 1, True, 2)
    generator = torch.Generator().manual_seed(1)
    choose, value = (torch.randn(2, 3, 4, 2, 1, 5, generator=generator) for _ in range(2))
    got = next_values(table, choose, value)
    for i in range(3):
        best = choose[:, i].argmax(-1, keepdim=True)
        two = [value[:, owner].gather(-1, best).squeeze(-1) for owner in (i, (i + 1) % 3)]
        assert torch.equal(got[:, i], torch.minimum(*two))
    proposed = torch.randn(2, 3, 3, 4, 1, generator=generator)
    got = next_action_values(table, proposed)
    for i in range(3):
        assert torch.equal(got[:, i], proposed[:, i, i].minimum(proposed[:, (i + 1) % 3, i]))


@pytest.mark.parametrize("atoms", [(), (6,)])
def test_heads_of_kind_mean_equal_a_loop_over_members(atoms):
    seeds, members, batch, learnt, actions = 2, 3, 4, 2, 5
    table, generator = table_of("mean"), torch.Generator().manual_seed(1)
    assert (table.heads, table.value_heads, table.crossed) == (1, 1, False)
    lead = (seeds, members, batch, learnt, 1, actions)
    choose = torch.randn(lead, generator=generator)
    value = torch.randn(*lead, *atoms, generator=generator)
    got = next_values(table, choose, value)
    assert got.shape == (*lead[:5], *atoms)
    for s in range(seeds):
        for b in range(batch):
            for t in range(learnt):
                total = torch.zeros(atoms, dtype=torch.float64)
                for m in range(members):
                    greedy = choose[s, m, b, t, 0].tolist()
                    total += value[s, m, b, t, 0, greedy.index(max(greedy))].double()
                for i in range(members):
                    assert (got[s, i, b, t, 0] - total / members).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            lambda values: values.take(lambda i, j: Source(i, i + 1)),
            "names owner 3, expected 0 to 2",
        ),
        (lambda values: values.take(lambda i, j: Source(i, i, 3)), "names head 3, expected 0 to 2"),
        (lambda values: values.take(lambda i, j: Source(i, i)).mean(1), "has to make targets"),
    ],
)
def test_a_kind_that_makes_no_targets_is_refused(monkeypatch, target, message):
    with pytest.raises(ValueError, match=message):
        register(monkeypatch, target)


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_targets_are_one_graph_for_the_compiler(kind):
    table = table_of(kind, horizons=4)
    value = torch.randn(1, 3, 2, 1, table.value_heads, 4)
    compiled = torch.compile(next_values, fullgraph=True, dynamic=False, backend="eager")
    choose = value[..., :1, :]
    assert torch.equal(compiled(table, choose, value), next_values(table, choose, value))
