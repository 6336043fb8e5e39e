"""Tables of result rows: a damaged file is refused, whichever bit was flipped."""

import pyarrow.parquet as pq
import pytest

from cerl import __version__
from cerl.config import load
from cerl.record import results


def written(path, *, run: str = "") -> results.Rows:
    table = results.Rows(path, results.METRICS, run=run)
    values = [0.5, None, float("nan"), 3.25, -1e300]
    for step in (10, 20, 30):
        facts = {"step": [step] * 5, "seed": [1] * 5, "member": [0, 1, 2, 3, -1]}
        table.append({**facts, "name": list("abcde"), "value": values})
    table.flush()
    return table


def test_no_flipped_bit_is_read_as_another_number(tmp_path):
    path, copy = tmp_path / "metrics.parquet", tmp_path / "copy.parquet"
    written(path)
    whole, content = path.read_bytes(), repr(results.read(path, results.METRICS).to_pydict())
    refused = 0
    for bit in range(0, 8 * len(whole), 83):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        copy.write_bytes(flipped)
        try:
            assert repr(results.read(copy, results.METRICS).to_pydict()) == content, bit
        except results.RowsError as error:
            assert "damaged" in str(error) or "expected" in str(error)
            refused += 1
    assert refused > len(whole) * 8 / 83 / 2


def test_rows_of_another_run_are_not_taken_over(tmp_path):
    path = tmp_path / "metrics.parquet"
    written(path, run="one")
    with pytest.raises(results.RowsError, match="rows made with other options"):
        results.Rows(path, results.METRICS, run="other").keep_until(20)
    table = results.Rows(path, results.METRICS, run="one")
    assert table.keep_until(20) == 5 and len(table.table) == 10
    assert pq.read_schema(path).metadata[b"cerl.run"] == b"one"


def run_of(path, config, *, hash_in_rows: str = "", version: str = __version__):
    """The table of a run with one row. Args: hash_in_rows, the right one by default."""
    options = results.scoring(config)
    table = results.Rows(path, results.ROWS, options=options)
    row = {name: [None] for name in results.ROWS.names} | {
        "config_hash": [hash_in_rows or results.hash_of(options)],
        "version": [version],
    }
    table.append(row)
    table.flush()
    return results.read(path, results.ROWS)


def test_rows_state_the_options_that_influence_their_scores(tmp_path):
    config = load("catch/bootdqn", {"seeds": [3, 4], "log.every": 7, "ensemble.members": 3})
    found = results.options_of(run_of(tmp_path / "rows.parquet", config))
    assert found == results.scoring(config) and found is not None
    assert found["ensemble.members"] == 3 and not {"seeds", "log.every"} & found.keys()
    assert results.hash_of(found) == results.config_hash(config)


def test_options_count_only_if_rows_of_a_known_version_have_their_hash(tmp_path):
    path, config = tmp_path / "rows.parquet", load("catch/cerl")
    for version in ("0.1.0", __version__):
        assert results.options_of(run_of(path, config, version=version)) is not None
        path.unlink()
    assert results.options_of(run_of(path, config, hash_in_rows="0123456789ab")) is None
    path.unlink()
    assert results.options_of(run_of(path, config, version="0.0.1")) is None
    path.unlink()
    table = run_of(path, config)
    assert results.options_of(table.slice(0, 0)) is None
    for text in (b"", b"[1]", b"{", b'{"agent.name": "sac"}'):
        changed = table.replace_schema_metadata({b"cerl.options": text})
        assert results.options_of(changed) is None


def test_nothing_is_read_through_a_link(tmp_path):
    written(tmp_path / "metrics.parquet")
    (tmp_path / "link.parquet").symlink_to(tmp_path / "metrics.parquet")
    with pytest.raises(results.RowsError, match="link"):
        results.read(tmp_path / "link.parquet", results.METRICS)
