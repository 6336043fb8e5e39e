"""Result rows: what a run scored, in two long tables beside its config; their only definition.

`rows.parquet` has one row for each score (seed, member or aggregate, policy, step);
`metrics.parquet` one for each diagnostic. Files are replaced whole: a reader never sees half a one.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cerl.config import Config
from cerl.config.effects import differences
from cerl.record import files
from cerl.text import visible

ROWS = pa.schema(
    [
        ("preset", pa.string()),  # name of the preset the run started from
        ("agent", pa.string()),  # dqn, quantile, sac
        ("env", pa.string()),  # family/name, e.g. minatar/breakout, atari/Pong
        ("seed", pa.int64()),  # the user's number
        ("member", pa.int64()),  # 0..N-1; -1: an aggregate, or a member drawn for each episode
        ("role", pa.string()),  # member, active, passive (tandem), aggregate, random
        ("policy", pa.string()),  # one of eval.policies, or train
        ("step", pa.int64()),  # agent steps of one seed, reset rows included: the clock of a run
        ("frames", pa.int64()),  # emulator frames that this seed played: real_steps x frame skip
        ("real_steps", pa.int64()),  # agent steps of this seed without reset rows
        ("updates", pa.int64()),  # gradient steps so far
        ("episodes", pa.int64()),  # how many the next three are over
        ("return", pa.float64()),  # mean undiscounted, unclipped return
        ("return_std", pa.float64()),  # over the episodes, divisor `episodes`; null: not recorded
        ("length", pa.float64()),  # mean agent steps of an episode
        ("wall_seconds", pa.float64()),  # since the run began, all sessions, pauses excluded
        ("members", pa.int64()),  # N
        ("config_hash", pa.string()),  # `config_hash`: runs that differ only in seeds share it
        ("version", pa.string()),  # of cerl
        ("diverged", pa.bool_()),  # from when the watch saw that this seed's numbers went wrong
    ]
)

METRICS = pa.schema(
    [
        ("step", pa.int64()),  # agent steps of one seed
        ("seed", pa.int64()),
        ("member", pa.int64()),  # -1: one value for the seed
        ("name", pa.string()),
        ("value", pa.float64()),  # null: not measured at this step; NaN: measured, not a number
    ]
)


# Keys of what a file says of itself: the hash of its content, and whose rows it holds.
_CONTENT, _RUN = b"cerl.content", b"cerl.run"

ABSENT = {"diverged": False}  # columns that older files lack, and what they then hold


class RowsError(RuntimeError):
    """Result rows that cannot be read or written: says which file, and what to do."""


# Options that decide no score: names, how long a run is, where it runs and what it writes. The rows
# of a seed that `diverged` concerns are marked.
ASIDE = ("preset", "seeds", "device", "threads", "env.threads", "out", "log", "diverged")
ASIDE += ("schedule.steps",)


def config_hash(config: Config) -> str:
    """Twelve hex digits of everything that decides a score, seeds excepted.

    Of options that differ from their defaults (`cerl.config.effects.differences`), so that a new
    option leaves the hash of every run alone that does not set it. Left out are those of `ASIDE`.
    """
    found = {
        key: value
        for key, value in differences(config).items()
        if not any(key == name or key.startswith(f"{name}.") for name in ASIDE)
    }
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]


def env_name(config: Config) -> str:
    """family/name, as in `ROWS`; the name alone where both are the same. A memory task's name comes
    with its size, so that mazes of two lengths are two environments."""
    family, name = config.env.family, config.env.title
    return name if name == family else f"{family}/{name}"


def read(path: Path, schema: pa.Schema) -> pa.Table:
    """A table of this schema, columns in its order; other columns are left out.

    Raises: RowsError if the file is missing, damaged, or lacks a column that is not of `ABSENT`.
    """
    if not path.is_file():
        raise RowsError(f"{path}: no such file; expected the rows of a run")
    advice = "restore it from a copy, or move it away to go on without its rows"
    try:
        with files.read(path) as file:
            table = pq.read_table(file, memory_map=False, page_checksum_verification=True)
            known = _known(table, _CONTENT)
            damaged = known is not None and known != content_hash(table)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = visible(str(error).strip().partition("\n")[0])
        raise RowsError(
            f"{path}: damaged, not a readable parquet file ({reason}); {advice}"
        ) from error
    if damaged:
        raise RowsError(f"{path}: damaged: its checksum does not agree; {advice}")
    for name, value in ABSENT.items():
        if name in schema.names and name not in table.column_names:
            table = table.append_column(name, pa.repeat(value, table.num_rows))
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise RowsError(
            f"{path}: expected the columns {', '.join(schema.names)}; got none named "
            f"{', '.join(missing)}: it is not a table of cerl, or of a version too far away"
        )
    try:
        return table.select(schema.names).cast(schema.with_metadata(table.schema.metadata))
    except pa.ArrowException as error:
        raise RowsError(f"{path}: a column has another type than expected: {error}") from error


def content_hash(table: pa.Table) -> str:
    """SHA-256 of the names, types and values of a table's columns.

    Parquet has checksums of its pages, but none of its footer, which says how to read them.
    """
    digest = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        digest.update(f"{name} {column.type} {len(column)}\n".encode())
        digest.update(column.is_null().to_numpy().tobytes())
        if pa.types.is_string(column.type):
            coded = column.combine_chunks().dictionary_encode()
            digest.update("\0".join(coded.dictionary.to_pylist()).encode())
            digest.update(coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).tobytes())
        else:
            empty = pa.scalar(0).cast(column.type)
            digest.update(column.fill_null(empty).to_numpy().tobytes())
    return digest.hexdigest()


def made_by(table: pa.Table) -> str | None:
    """What the file of a table says of the run that made it (`cerl.record.folder.fixed_hash`)."""
    return _known(table, _RUN)


def _known(table: pa.Table, key: bytes) -> str | None:
    """What a file says of itself."""
    value = (table.schema.metadata or {}).get(key)
    return None if value is None else value.decode(errors="replace")


class Rows:
    """One growing table and its file.

    Args of the constructor: run, hash of the options of the run whose rows they are; it stands in
    the file.
    """

    def __init__(self, path: Path, schema: pa.Schema, *, run: str = "") -> None:
        self.path, self.schema, self.run = path, schema, run
        self.table = schema.empty_table()
        self.pending: list[pa.Table] = []
        self.owned = False  # whether the file, if there is one, is this table's

    def append(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Adds rows, given by column; every column of the schema, all of the same length."""
        self.pending.append(pa.table(dict(columns), schema=self.schema))

    def keep_until(self, step: int) -> int:
        """Takes over the file's rows up to a step and forgets later ones.

        Returns: how many were dropped.
        """
        self.owned = True
        if not self.path.is_file():
            return 0
        table = read(self.path, self.schema)
        run = made_by(table)
        if self.run and run is not None and run != self.run:
            raise RowsError(
                f"{self.path}: expected rows of the run of this folder's config.yaml, got those of "
                "a run with other options; put back the one that belongs to the other"
            )
        self.table = table.filter(pc.field("step") <= step).replace_schema_metadata()
        self.pending = []
        return table.num_rows - self.table.num_rows

    def flush(self) -> None:
        """Writes everything.

        Raises: RowsError if the file is another run's; OSError (the file is then as it was and
                the rows stay in memory for the next attempt).
        """
        if not self.owned and self.path.exists():
            raise RowsError(
                f"{self.path}: there are rows of another run in this folder; resume that run, or "
                "start this one in a new folder"
            )
        if not self.pending and self.path.exists():
            return
        table = pa.concat_tables([self.table, *self.pending]).combine_chunks()
        table = table.replace_schema_metadata({_CONTENT: content_hash(table), _RUN: self.run})
        how: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
        files.write_atomically(self.path, lambda file: pq.write_table(table, file, **how))
        self.table, self.pending, self.owned = table, [], True
