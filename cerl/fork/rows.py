"""Gives the saved rows of replay to a fork: as they are, in another ring, or to other members.

Files that need no change are linked, since pieces are never written twice; where the file system
has no links they are copied. Other pieces are written anew.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cerl.fork.members import places
from cerl.record import files, pieces
from cerl.record.pieces import Manifest, Piece
from cerl.sampler import BLOCK
from cerl.state import CheckpointError

NOBODY = -1  # the member of rows whose member is not in the fork


class Ring(NamedTuple):
    """How the rows of a run become those of its fork."""

    rows: int  # R of the fork
    first: int  # the oldest row that the fork has, as the run counts rows
    shift: int  # the fork counts rows from this one on


def ring(held: Manifest, *, rows: int) -> Ring:
    """The ring of a fork that holds the newest rows of a run.

    A larger ring than the run's, after rows were overwritten, counts rows anew from the oldest one:
    it must not hold places for rows that nobody has.

    Args: rows, R of the fork.
    """
    first = max(0, held.total - min(held.rows, rows))
    return Ring(rows, first, first if rows > held.rows else 0)


def taken(
    source: Path, folder: Path, held: Manifest, to: Ring, *, picked: Sequence[int], count: int
) -> Manifest:
    """Puts the rows of a checkpoint into the folder of a fork.

    Args:    source, folder of the run; folder of the fork; held, the rows of the checkpoint; picked
             and count, as in `cerl.fork.members.moved`.
    Returns: the rows of the fork.
    Raises:  CheckpointError if a piece is damaged or gone; OSError if it cannot be written.
    """
    if (reason := pieces.damage(source, held)) is not None:
        raise CheckpointError(f"{source}: damaged ({reason})")
    files.own_folder(folder / pieces.FOLDER)
    same = tuple(picked) == tuple(range(count)) and not to.shift
    found = []
    for piece in held.pieces:
        if piece.last <= to.first:
            continue
        if same and piece.last - piece.first <= to.rows:
            _link(source / pieces.FOLDER / piece.name, folder / pieces.FOLDER / piece.name)
            found.append(piece)
        else:
            found.append(_rewritten(source, folder, held, piece, to, picked, count))
    files.sync_folder(folder / pieces.FOLDER)
    made = held._replace(total=held.total - to.shift, rows=to.rows, pieces=found)
    return pieces.manifest(made.state())


def _link(old: Path, new: Path) -> None:
    """A second name for a file, or a copy of it."""
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise
        with files.read(old) as read:
            files.write_atomically(new, lambda write: shutil.copyfileobj(read, write))


def _rewritten(
    source: Path,
    folder: Path,
    held: Manifest,
    piece: Piece,
    to: Ring,
    picked: Sequence[int],
    count: int,
) -> Piece:
    """Writes a piece with the rows that the fork has of another one."""
    fields = pieces.layout_of(held)
    rows = piece.last - piece.first
    flat = torch.zeros(rows * pieces.width(fields), dtype=torch.uint8)
    pieces.unpack(source, piece, flat)
    begin = max(piece.first, to.first)
    kept = piece.last - begin
    made = torch.zeros(kept * pieces.width(fields), dtype=torch.uint8)
    new = dict(pieces.split(made, fields, kept))
    for name, block in pieces.split(flat, fields, rows):
        own = block[:, begin - piece.first :]
        if name == "member":
            own = places(own, picked, count=count, gone=NOBODY)
        new[name].copy_(own)
    first, last = begin - to.shift, piece.last - to.shift
    name = f"{first:012d}-{last:012d}-{secrets.token_hex(6)}.rows"
    size, checksum = pieces.write(folder / pieces.FOLDER / name, made.numpy().data)
    return Piece(name, first, last, size, checksum)


def priorities(
    sampler: Mapping[str, Any], held: Manifest, to: Ring, *, envs: int
) -> dict[str, Any]:
    """The state of a sampler for the ring of a fork: every row keeps its priority.

    Args: sampler, its state in the checkpoint ({} if it has none); envs, E.
    """
    if "units" not in sampler:
        return dict(sampler)
    units: Tensor = sampler["units"]  # [S, blocks, BLOCK]; row (t, e) lies at (t % R) * E + e
    blocks = -(-to.rows * envs // BLOCK)
    made = torch.zeros(len(units), blocks, BLOCK, dtype=units.dtype)
    row = torch.arange(to.first, held.total).view(-1, 1)
    env = torch.arange(envs)
    old = ((row % held.rows) * envs + env).flatten()
    new = (((row - to.shift) % to.rows) * envs + env).flatten()
    made.flatten(1)[:, new] = units.flatten(1)[:, old]
    return {**sampler, "units": made}
