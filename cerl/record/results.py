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

from cerl import __version__
from cerl.config import Config, OriginConfig
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
        ("updates", pa.int64()),  # gradient steps so far; 0 in imported rows
        ("episodes", pa.int64()),  # number of episodes that the next three columns are means over
        ("return", pa.float64()),  # mean undiscounted, unclipped return
        ("return_std", pa.float64()),  # over the episodes, divisor `episodes`; null: not recorded
        ("length", pa.float64()),  # mean agent steps of an episode; null: unknown
        ("wall_seconds", pa.float64()),  # that the run has trained, without pauses; null: unknown
        ("members", pa.int64()),  # N
        ("config_hash", pa.string()),  # `config_hash`: runs that differ only in seeds share it
        ("version", pa.string()),  # of cerl; or `IMPORTED` and the program that trained the run
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


# Keys of a file's metadata: the hash of its content, the hash of the run's options, the options
# that influence scores (`scoring`), as JSON, and of a fork the run that it comes from, as JSON.
_CONTENT, _RUN, _OPTIONS, _ORIGIN = b"cerl.content", b"cerl.run", b"cerl.options", b"cerl.origin"

# Rows of runs that another program trained have its name behind this in the column `version`. Their
# rows of policy train are all that is known of runs that were not evaluated.
IMPORTED = "imported from "

ABSENT = {"diverged": False}  # columns that files of older versions lack, and their value then


class RowsError(RuntimeError):
    """Result rows that cannot be read or written; the message says which file, and what to do."""


# Options that do not influence scores: names, length of the run, device, and what it writes.
# `diverged` only changes rows of diverged seeds, which are marked. A fork is told by the step and
# the options of the run that it comes from.
ASIDE = ("preset", "seeds", "device", "threads", "env.threads", "out", "log", "diverged")
ASIDE += ("schedule.steps", "origin.run", "origin.checkpoint")


def scoring(config: Config) -> dict[str, Any]:
    """The options of a run that influence its scores and differ from their defaults
    (`cerl.config.effects.differences`), without those of `ASIDE`: plain values by dotted key."""
    return {
        key: value
        for key, value in differences(config).items()
        if not any(key == name or key.startswith(f"{name}.") for name in ASIDE)
    }


def config_hash(config: Config) -> str:
    """A hash (twelve hex digits) of all options that influence scores, without the seeds.

    It covers the options of `scoring`, so a new option changes the hash only of runs that set it.
    """
    return hash_of(scoring(config))


# Versions whose rows state options under the names that they have now. Rows of 0.1 that state
# options at all have these names.
SAME_NAMES = ("0.1.0", __version__)


def hash_of(options: Mapping[str, Any]) -> str:
    """The `config_hash` of a run. Args: options, its `scoring`."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]


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
        # One large read, since Arrow would otherwise call Python for each of many small ones.
        with files.read(path) as file:
            content = pa.BufferReader(file.read())
            whole = pq.ParquetFile(content, page_checksum_verification=True)
            table = whole.read(use_threads=False)  # most files are small, and many are read
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
    there = set(table.column_names)
    missing = [name for name in schema.names if name not in there]
    if missing:
        raise RowsError(
            f"{path}: expected the columns {', '.join(schema.names)}; got none named "
            f"{', '.join(missing)}: it is not a table of cerl, or one of another version"
        )
    try:
        table = table.select(schema.names)
        same = table.schema.equals(schema)
        return table if same else table.cast(schema.with_metadata(table.schema.metadata))
    except pa.ArrowException as error:
        raise RowsError(f"{path}: a column has another type than expected: {error}") from error


def content_hash(table: pa.Table) -> str:
    """SHA-256 (hex digits) of the names, types and values of a table's columns.

    Parquet has checksums of its pages only; the footer, which says how to read them, has none.
    """
    digest = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        digest.update(f"{name} {column.type} {len(column)}\n".encode())
        whole = column.null_count == 0  # then there is nothing to mark or to fill
        digest.update(bytes(len(column)) if whole else column.is_null().to_numpy())
        if pa.types.is_string(column.type):
            coded = column.combine_chunks().dictionary_encode()
            digest.update("\0".join(coded.dictionary.to_pylist()).encode())
            indices = coded.indices if whole else coded.indices.fill_null(-1)
            digest.update(indices.to_numpy(zero_copy_only=False))
        else:
            empty = pa.scalar(0).cast(column.type)
            values = column if whole else column.fill_null(empty)
            digest.update(values.to_numpy().tobytes())
    return digest.hexdigest()


def made_by(table: pa.Table) -> str | None:
    """The `cerl.record.folder.fixed_hash` of the run that wrote a table; None if it has none."""
    return _known(table, _RUN)


def options_of(table: pa.Table) -> dict[str, Any] | None:
    """The `scoring` of the run that wrote a table of `ROWS`.

    The metadata of a parquet file has no checksum. So its options only count if their hash stands
    in rows of a version of `SAME_NAMES`; another version may call options otherwise.

    Returns: the options; None if the table has none, or none that this version can rely on.
    """
    try:
        found = json.loads(_known(table, _OPTIONS) or "null")
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    # A file that several versions have continued has the rows of the newest one last.
    last = table.num_rows - 1
    if last < 0 or table["version"][last].as_py() not in SAME_NAMES:
        return None
    return found if table["config_hash"][last].as_py() == hash_of(found) else None


def _known(table: pa.Table, key: bytes) -> str | None:
    """An entry of a table's metadata; None if it is missing."""
    value = (table.schema.metadata or {}).get(key)
    return None if value is None else value.decode(errors="replace")


class Rows:
    """One growing table and its file.

    Args of the constructor: path of the file; schema, ROWS or METRICS. Written to the metadata of
    the file: run, hash of the options of the run; options, its `scoring`; origin of a fork.
    """

    def __init__(
        self,
        path: Path,
        schema: pa.Schema,
        *,
        run: str = "",
        options: Mapping[str, Any] | None = None,
        origin: OriginConfig | None = None,
    ) -> None:
        self.path, self.schema, self.run = path, schema, run
        self.options = {} if options is None else {_OPTIONS: json.dumps(options, sort_keys=True)}
        if origin is not None and origin.forked_at:
            self.options[_ORIGIN] = origin.model_dump_json()
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
        facts = {_CONTENT: content_hash(table), _RUN: self.run, **self.options}
        table = table.replace_schema_metadata(facts)
        how: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
        files.write_atomically(self.path, lambda file: pq.write_table(table, file, **how))
        self.table, self.pending, self.owned = table, [], True
