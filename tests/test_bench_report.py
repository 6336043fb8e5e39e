"""The benchmark of reports, in small."""

import json

from cerl import __main__ as command


def test_every_part_of_a_report_has_its_row_and_nothing_is_left_behind(tmp_path):
    out = tmp_path / "rows.jsonl"
    words = ["--limit", "2", "--seeds", "3", "--evaluations", "4", "--samples", "50"]
    words += ["--presets", "atari/paper-ddqn", "atari/paper-cerl", "--parts", "parts"]
    assert (
        command.main(["bench", "report", *words, "--folder", str(tmp_path), "--out", str(out)]) == 0
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["runs"] == 4 and row["s"] > 0 and row["cpu s"] >= 0 for row in rows)
    told = [row["what"] for row in rows]
    figures = [what.removeprefix("figure ") for what in told if what.startswith("figure ")]
    assert {"curves", "profile", "iqm", "improvement", "own-data", "diagnostics"} <= {*figures}
    assert rows[-1]["what"].startswith("page") and rows[-1]["file MB"] > 0
    assert list(tmp_path.iterdir()) == [out]


def test_numbers_that_measure_nothing_are_refused(tmp_path, capsys):
    words = ["bench", "report", "--seeds", "0", "--folder", str(tmp_path)]
    assert command.main(words) == 2
    assert capsys.readouterr().err.startswith("error: --seeds: expected a number")
