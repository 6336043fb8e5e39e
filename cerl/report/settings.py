"""What the runs of a report were trained as: their options, and the labels that follow from them.

A run states its options in its rows, or beside them in its config.yaml. Runs with equal options
have one `config_hash`, so a table of rows keeps its options by that hash, in its metadata.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cerl.config import ConfigError, preset
from cerl.config.labels import Label, Setting, differing, exists, labelled, value_of
from cerl.record import results
from cerl.record.folder import FILE, fixed_hash, load_file
from cerl.report import stored
from cerl.text import few, visible

# Keys of the metadata of a table of rows of several runs.
_OPTIONS, _TOGETHER = b"cerl.options.by_hash", b"cerl.evaluated.together"

Options = Mapping[str, Any]  # as from `results.scoring`


class Group(NamedTuple):
    """Rows of one preset on one environment, trained with one set of options."""

    env: str  # family/name
    preset: str
    config_hash: str


def trained_with(file: Path, table: pa.Table) -> dict[str, Any] | None:
    """The options of a run that influence its scores, as this version of cerl calls them.

    Rows state them (`results.options_of`). Those of some versions hold only a hash that the version
    computed, or options that it may have called otherwise; then they are read from config.yaml, or
    else from the configs.json of a stored study.

    Args:    file of the rows; table, its content.
    Returns: the options, see `results.scoring`; None where the rows state none and the folder has
             no config.yaml, or one of another run, or one that cannot be read, and no configs.json
             has the run.
    """
    if (options := results.options_of(table)) is not None:
        return options
    path = file.parent / FILE
    try:
        if path.is_file() and results.made_by(table) == fixed_hash(file.parent):
            return results.scoring(load_file(path))
    except (ConfigError, OSError):
        pass
    found = _stored(file, table)
    return None if found is None else found.options


def seeds_alone(file: Path, table: pa.Table) -> bool:
    """Whether the evaluations of a seed did not depend on the seeds beside it. Early versions drew
    their random numbers for all seeds together; a configs.json marks their runs.

    Args: file of the rows; table, its content.
    """
    found = _stored(file, table)
    return found is None or found.seeds_alone


def _stored(file: Path, table: pa.Table) -> stored.Stored | None:
    if not table.num_rows:
        return None
    return stored.find(file, table["config_hash"][table.num_rows - 1].as_py() or "")


def with_options(
    table: pa.Table, known: Mapping[str, Options], together: Sequence[str] = ()
) -> pa.Table:
    """A table of rows with a column for each option that differs between its runs.

    Args:    known, the options of runs by their `config_hash`; together, the values of `run` for
             which `seeds_alone` is false.
    Returns: the table; its metadata holds both, for `options_by_hash` and `evaluated_together`.
    """
    values: list[Options | None] = [*known.values()]
    hashes = pa.array(known, pa.string())
    at = pc.index_in(table["config_hash"], value_set=hashes)  # pyright: ignore
    for name, column in option_columns(values).items():
        table = table.append_column(name, column.take(at))
    content = {_OPTIONS: json.dumps(known), _TOGETHER: json.dumps(together)}
    return table.replace_schema_metadata(content)


def options_by_hash(table: pa.Table) -> dict[str, Options]:
    """The options of the runs of a table, where known, by their `config_hash`."""
    return json.loads((table.schema.metadata or {}).get(_OPTIONS, b"{}"))


def evaluated_together(table: pa.Table) -> list[str]:
    """A note on the runs of a table whose evaluations depended on the seeds beside each other."""
    runs = json.loads((table.schema.metadata or {}).get(_TOGETHER, b"[]"))
    if not runs:
        return []
    every = len(set(table["run"].to_pylist()))
    which = "all runs" if len(runs) == every else few([*run_names(runs).values()])
    return [
        f"an early version made the evaluations of {which}: there the random numbers of a seed's "
        "episodes depended on the seeds that trained beside it"
    ]


def option_columns(settings: Sequence[Options | None]) -> dict[str, pa.Array]:
    """A typed column for each option that differs between some settings, by dotted key.

    Lists are texts such as `[64, 64]`, so that rows can be grouped by them.

    Args:    settings, options for each row; None: unknown.
    Returns: columns with a value for each row; null where it is unknown or the run has no such
             option.
    """
    known = [options for options in settings if options is not None]
    return {key: _column([_value(o, key) for o in settings]) for key in differing(known)}


def _value(options: Options | None, key: str) -> Any:
    return value_of(options, key) if options is not None and exists(options, key) else None


def _column(values: Sequence[Any]) -> pa.Array:
    """Values as a column of the type that fits all of them; texts if they have several."""
    plain = [preset.as_word(v) if isinstance(v, list | tuple | dict) else v for v in values]
    kinds = {type(value) for value in plain if value is not None}
    for kind, allowed in ((pa.bool_(), {bool}), (pa.int64(), {int}), (pa.float64(), {int, float})):
        if kinds and kinds <= allowed:
            return pa.array(plain, kind)
    texts = [v if v is None or isinstance(v, str) else preset.as_word(v) for v in plain]
    return pa.array(texts, pa.string())


def groups(table: pa.Table) -> tuple[list[Group], pa.Array]:
    """The groups of rows, in the order in which they first come, and the index of each row's."""
    code, parts = np.zeros(table.num_rows, dtype=np.int64), []
    for name in Group._fields:
        column = pc.fill_null(table[name], "").combine_chunks().dictionary_encode()
        parts.append(column.dictionary.to_pylist())
        code = code * len(parts[-1]) + column.indices.to_numpy()
    coded = pa.array(code).dictionary_encode()
    sizes = [len(part) for part in parts]
    places = np.unravel_index(coded.dictionary.to_numpy(), sizes)
    # Names come from files that anybody may have written; control characters must not reach the
    # terminal by way of tables, notes and plots.
    found = [
        Group(*(visible(part[k]) for part, k in zip(parts, place, strict=True)))
        for place in zip(*places, strict=True)
    ]
    return found, coded.indices.cast(pa.int64())


def names(found: Sequence[Group], known: Mapping[str, Options]) -> tuple[list[Label], list[str]]:
    """The label of each group, and notes for the reader of a report.

    Groups of one environment whose options are not all known may have the same label. Their labels
    then end in the first digits of their hashes.

    Args: found, from `groups`; known, from `options_by_hash`.
    """
    settings = [Setting(own.preset, own.env, known.get(own.config_hash)) for own in found]
    labels = labelled(settings)
    counts: dict[tuple[str, str], int] = {}
    for group, label in zip(found, labels, strict=True):
        place = group.env, label.text
        counts[place] = counts.get(place, 0) + 1
    notes = [
        f"{name} on {env} was run with {count} different configurations; each has lines of its "
        "own, under the first digits of its config_hash"
        for (env, name), count in counts.items()
        if count > 1
    ]
    mixed = {name for (env, name), count in counts.items() if count > 1}
    for name in sorted(mixed):
        if len({env for env, other in counts if other == name}) > 1:
            notes.append(
                f"{name}: rows do not say what differs between its configurations, so there are no "
                "lines over tasks; a config.yaml beside the rows of each run tells it"
            )
    for k, (group, label) in enumerate(zip(found, labels, strict=True)):
        if counts[group.env, label.text] > 1:
            labels[k] = Label(f"{label.text} [{group.config_hash[:6]}]", {})
    return labels, notes


def forks(
    found: Sequence[Group], labels: Sequence[Label], known: Mapping[str, Options]
) -> dict[int, str]:
    """A sentence on each group whose runs are forks, by its index: where its curves begin.

    Args: found, from `groups`; labels, theirs; known, from `options_by_hash`.
    """
    texts = {(own.env, own.config_hash): name.text for own, name in zip(found, labels, strict=True)}
    out = {}
    for k, (group, label) in enumerate(zip(found, labels, strict=True)):
        options = known.get(group.config_hash, {})
        if at := options.get("origin.forked_at"):
            parent = texts.get((group.env, options.get("origin.options", "")))
            source = parent or "a run that is not in this report"
            out[k] = (
                f"{label.text} on {group.env} begins at agent step {at:,}, where it was forked "
                f"from {source}; up to there they are one run"
            )
    return out


def named_rows(table: pa.Table) -> pa.Table:
    """All rows of a report, as results.parquet has them: with the column `label`, and with the name
    of the run's folder in the column `run`.

    Args: table, from `curves.load_rows`.
    """
    found, indices = groups(table)
    labels, _ = names(found, options_by_hash(table))
    texts = pa.array([label.text for label in labels], pa.string()).take(indices)
    run = table["run"].combine_chunks().dictionary_encode()
    short = run_names(run.dictionary.to_pylist())
    short = pa.array(map(visible, short.values()), pa.string()).take(run.indices)
    table = table.set_column(table.schema.get_field_index("run"), "run", short)
    table = table.add_column(len(results.ROWS), "label", texts)
    return table.replace_schema_metadata()


def run_names(files: Iterable[str]) -> dict[str, str]:
    """{file of rows: name of its run folder}; with the folders above it where two are named alike.

    Args: files, absolute paths.
    """
    parts = {file: Path(file).parent.parts for file in files}
    length = dict.fromkeys(parts, 1)
    while True:
        found = {file: "/".join(parts[file][-length[file] :]) for file in parts}
        told = [*found.values()]
        counts = {name: 0 for name in told}
        for name in told:
            counts[name] += 1
        longer = [f for f in parts if counts[found[f]] > 1 and length[f] < len(parts[f])]
        if not longer:
            return found
        for file in longer:
            length[file] += 1
