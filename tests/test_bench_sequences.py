"""Benchmarks of sequence networks print their rows, and time the networks that they name."""

import json

import pytest
import torch

from cerl import __main__ as command
from cerl.bench import sequences
from cerl.bench.sequences import NETS, Sizes

SMALL = ["--members", "2", "--width", "32", "--precision", "fp32", "--device", "cpu"]


def measured(tmp_path, *words):
    out = tmp_path / "rows.json"
    command.main(["bench", *words, *SMALL, "--calls", "1", "--out", str(out)])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_updates_of_every_network_are_timed_and_attention_is_a_share(tmp_path):
    nets = ["fox-llama", "mlp", "transformer torch", "transformer-pro", "fox-pro definition"]
    rows = measured(tmp_path, "memory-update", "--nets", *nets, "--windows", "12", "--batch", "2")
    assert [row["what"] for row in rows] == nets
    assert all(row["microseconds"] > 0 for row in rows)
    assert rows[0]["attention"] > 0 and rows[1]["attention"] is None


def test_acting_is_timed_with_caches_and_by_recomputing(tmp_path):
    words = ["--nets", "fox-pro", "gru", "--length", "9", "--envs", "6"]
    rows = measured(tmp_path, "memory-acting", *words)
    assert [row["streams"] for row in rows] == ["duty 6", "all 12"] * 2
    for row in rows:
        assert row["ratio"] == pytest.approx(row["recomputed us"] / row["cached us"])
        assert row["cache MiB"] > 0


@pytest.mark.slow
def test_lengths_are_timed_with_and_without_pruning(tmp_path):
    words = ["--nets", "fox-llama", "gru", "--lengths", "8", "12", "--batch", "2"]
    rows = measured(tmp_path, "memory-length", *words)
    assert [(row["what"], row["W"], row["pruned"]) for row in rows] == [
        ("fox-llama", 8, False),
        ("fox-llama", 8, True),
        ("fox-llama", 12, False),
        ("fox-llama", 12, True),
        ("gru", 8, False),
        ("gru", 12, False),
    ]


def test_learners_read_windows_of_one_endless_episode():
    sizes = Sizes(members=2, layers=1, width=32, heads=2, precision="fp32")
    for name in NETS:
        learner = sequences._learner(name, torch.device("cpu"), sizes, window=12, batch=1)
        assert learner.sample().reward.shape == (1, 1, 1, 12)
        assert not learner.replay.terminated.any() and learner.replay.real.all()
        assert getattr(learner.config.encoder, "prune", 0.0) == 0.0
    with pytest.raises(ValueError, match="nets: expected some of fox-llama.*; got 'fix'"):
        sequences._learner("fix", torch.device("cpu"), sizes, window=12, batch=1)
