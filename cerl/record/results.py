"""The two tables of a run folder: result rows (scores) and metrics. Their only definition.

`rows.parquet` has one row for each score (seed, member or aggregate, policy, step), and
`metrics.parquet` has one row for each value of a metric. Files are replaced as a whole, so a reader
never sees a half-written one.
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
        ("episodes", pa.int64()),  # number of episodes that the next three columns are means over
        ("return", pa.float64()),  # mean undiscounted, unclipped return
        ("return_std", pa.float64()),  # over the episodes, divisor `episodes`; null: not recorded
        ("length", pa.float64()),  # mean agent steps of an episode
        ("wall_seconds", pa.float64()),  # seconds that the run has trained, without pauses
        ("members", pa.int64()),  # N
        ("config_hash", pa.string()),  # `config_hash`: runs that differ only in seeds share it
        ("version", pa.string()),  # of cerl
        ("diverged", pa.bool_()),  # true from the step on at which the seed was found diverged
    ]
)

METRICS = pa.schema(
    [
        ("step", pa.int64()),  # agent steps of one seed
        ("seed", pa.int64()),
        ("member", pa.int64()),  # -1: one value for the whole seed
        ("name", pa.string()),  # of the metric
        ("value", pa.float64()),  # null: not measured at this step; NaN: measured, not a number
    ]
)


# Keys of a file's metadata: the hash of its content, and the hash of the run's options.
_CONTENT, _RUN = b"cerl.content", b"cerl.run"

ABSENT = {"diverged": False}  # columns that files of older versions lack, and their value then


class RowsError(RuntimeError):
    """Result rows that cannot be read or written; the message says which file, and what to do."""


# Options that do not influence scores: names, length of the run, device, and what it writes.
# `diverged` only changes rows of diverged seeds, which are marked.
ASIDE = ("preset", "seeds", "device", "threads", "env.threads", "out", "log", "diverged")
ASIDE += ("schedule.steps",)


def config_hash(config: Config) -> str:
    """A hash (twelve hex digits) of all options that influence scores, without the seeds.

    It covers the options that differ from their defaults (`cerl.config.effects.differences`),
    except those of `ASIDE`. So a new option changes the hash only of runs that set it.
    """
    found = {
        key: value
        for key, value in differences(config).items()
        if not any(key == name or key.startswith(f"{name}.") for name in ASIDE)
    }
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]


def env_name(config: Config) -> str:
    """The column `env`: family/name, or the name alone if both are equal.

    The name of a memory task includes its size, so mazes of two lengths are two environments.
    """
    family, name = config.env.family, config.env.title
    return name if name == family else f"{family}/{name}"


def read(path: Path, schema: pa.Schema) -> pa.Table:
    """Reads a table with the columns of `schema`, in this order; other columns are left out.

    Raises: RowsError if the file is missing or damaged, or lacks a column that is not in `ABSENT`.
    """
    if not path.is_file():
        raise RowsError(f"{path}: no such file; expected the rows of a run")
    advice = "restore it from a copy, or move it away to continue without its rows"
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
            f"{', '.join(missing)}: it is not a table of cerl, or one of another version"
        )
    try:
        return table.select(schema.names).cast(schema.with_metadata(table.schema.metadata))
    except pa.ArrowException as error:
        raise RowsError(f"{path}: a column has another type than expected: {error}") from error


def content_hash(table: pa.Table) -> str:
    """SHA-256 (hex digits) of the names, types and values of a table's columns.

    Parquet has checksums of its pages only; the footer, which says how to read them, has none.
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
    """The `cerl.record.folder.fixed_hash` of the run that wrote a table; None if it has none."""
    return _known(table, _RUN)


def _known(table: pa.Table, key: bytes) -> str | None:
    """An entry of a table's metadata; None if it is missing."""
    value = (table.schema.metadata or {}).get(key)
    return None if value is None else value.decode(errors="replace")


class Rows:
    """One growing table and its file.

    Args of the constructor: path of the file; schema, ROWS or METRICS; run, hash of the options of
    the run, which is written to the file.
    """

    def __init__(self, path: Path, schema: pa.Schema, *, run: str = "") -> None:
        self.path, self.schema, self.run = path, schema, run
        self.table = schema.empty_table()
        self.pending: list[pa.Table] = []
        self.owned = False  # whether an existing file belongs to this table and may be replaced

    def append(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Appends rows in memory. Args: columns {name: values}, all columns of the schema."""
        self.pending.append(pa.table(dict(columns), schema=self.schema))

    def keep_until(self, step: int) -> int:
        """Reads the rows of the file up to a step; later ones are dropped.

        Returns: how many were dropped.
        Raises:  RowsError if the file is damaged, or has rows of another run.
        """
        self.owned = True
        if not self.path.is_file():
            return 0
        table = read(self.path, self.schema)
        run = made_by(table)
        if self.run and run is not None and run != self.run:
            raise RowsError(
                f"{self.path}: expected rows made with this folder's config.yaml, got rows made "
                "with other options; put back the file that belongs to the folder"
            )
        self.table = table.filter(pc.field("step") <= step).replace_schema_metadata()
        self.pending = []
        return table.num_rows - self.table.num_rows

    def flush(self) -> None:
        """Writes all rows to the file.

        Raises: RowsError if the file belongs to another run; OSError (the file is then unchanged,
                and the rows stay in memory for the next attempt).
        """
        if not self.owned and self.path.exists():
            raise RowsError(
                f"{self.path}: this folder has rows of another run; resume that run, or start this "
                "one in a new folder"
            )
        if not self.pending and self.path.exists():
            return
        table = pa.concat_tables([self.table, *self.pending]).combine_chunks()
        table = table.replace_schema_metadata({_CONTENT: content_hash(table), _RUN: self.run})
        how: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
        files.write_atomically(self.path, lambda file: pq.write_table(table, file, **how))
        self.table, self.pending, self.owned = table, [], True
