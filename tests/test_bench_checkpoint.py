"""The benchmark of checkpoints prints its rows, with all measurements in them."""

import json

import pytest

from cerl import __main__ as command
from cerl.record import spool


@pytest.mark.parametrize("placement", ["device", "host"])
def test_writing_beside_training_saving_and_loading_are_timed(tmp_path, monkeypatch, placement):
    monkeypatch.setattr(spool, "PIECE", 2**16)
    out = tmp_path / "rows.json"
    words = [
        "--preset",
        "catch/ddqn",
        "--seeds",
        "2",
        "--capacity",
        "4000",
        "--device",
        "cpu",
        "--megabytes",
        "0.5",
    ]
    words += ["--pace", "0", "20", "--folder", str(tmp_path), "--placement", placement]
    command.main(["bench", "checkpoint", *words, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["what"], row["pace MB/s"]) for row in rows] == [
        (what, pace) for what in ("frames", "noise") for pace in ("none", "20")
    ]
    for row in rows:
        assert 0 < row["on disk MB"] < 1.2 * row["ring MB"]
        assert row["streamed MB/s"] > 0 and row["save ms"] > 0 and row["load ms"] > 0
        assert row["pause max ms"] >= row["call us"] / 1e3
    assert list(tmp_path.iterdir()) == [out]
