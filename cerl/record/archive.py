"""The archive of a checkpoint: reads its content without running code, and verifies its checksums.

`torch.load` does not verify the checksums of its archive; `verify` does. What a run folder holds of
such files is up to `cerl/record/checkpoint.py`.
"""

import os
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from cerl import __version__
from cerl.record import files as safe
from cerl.record import pieces
from cerl.record.pieces import Manifest
from cerl.state import CheckpointError, lost, plain

FORMAT = 5  # raised whenever the structure of the content of a checkpoint changes
# Errors that the standard library raises for an archive with wrong bytes.
_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(EOFError, ValueError, RuntimeError, KeyError, OverflowError),
)


class Damaged(CheckpointError):
    """A checkpoint that cannot be used. The message is the end of a sentence: "damaged (...)"."""


def verify(file: Path) -> None:
    """Checks every byte of an archive.

    Raises: Damaged; CheckpointError if it cannot be read for a reason that may pass, e.g. rights.
    """
    try:
        with safe.read(file) as raw:
            size = os.fstat(raw.fileno()).st_size
            with zipfile.ZipFile(raw) as archive:
                _check_stored(archive)
                bad = archive.testzip()
    except OSError as error:
        raise Damaged(f"damaged ({lost(file, error)})") from error
    except _BROKEN as error:
        if isinstance(error, Damaged):
            raise
        reason = plain(str(error))
        raise Damaged(f"damaged ({size:,} bytes, not a whole archive: {reason})") from error
    if bad is not None:
        raise Damaged(f"damaged (checksum of {plain(bad)} does not agree)")


def _check_stored(archive: zipfile.ZipFile) -> None:
    """Refuses compressed content. torch never compresses, and a small compressed file could fill
    the memory when it is read."""
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise Damaged("intact, but no checkpoint of cerl: its content is compressed")


def content(file: Path, device: torch.device) -> tuple[dict[str, Any], Manifest | None]:
    """The state in a checkpoint, and the manifest of its rows of replay; verifies no checksums.

    Raises: Damaged; CheckpointError if it has another format or cannot be read.
    """
    foreign = "intact, but no checkpoint of cerl"
    try:
        with safe.read(file) as raw, zipfile.ZipFile(raw) as archive:
            _check_stored(archive)
    except OSError as error:
        raise Damaged(f"damaged ({lost(file, error)})") from error
    except zipfile.BadZipFile as error:
        raise Damaged(f"damaged (not a whole archive: {plain(str(error))})") from error
    try:
        held = torch.load(file, map_location=device, weights_only=True, mmap=device.type == "cpu")
    except (torch.cuda.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise Damaged(f"{foreign}: {_refusal(error)}") from error
    found = held.get("format") if isinstance(held, dict) else None
    if not isinstance(held, dict) or type(found) is not int:
        raise Damaged(foreign)
    if found != FORMAT:
        version = held.get("cerl")
        raise CheckpointError(
            f"{file}: checkpoint format {found if abs(found) < 10**9 else 'unknown'}, written by "
            f"cerl {plain(version, 20) if isinstance(version, str) else 'unknown'}; this is cerl "
            f"{__version__}, which reads format {FORMAT}. Use the version that wrote it (the run "
            "folder's versions.yaml)"
        )
    if not isinstance(held.get("state"), dict) or "replay" not in held:
        raise Damaged(foreign)
    replay = held["replay"]
    try:
        return held["state"], None if replay is None else pieces.manifest(replay)
    except CheckpointError as error:
        raise Damaged(f"{foreign}: {error}") from error


def _refusal(error: Exception) -> str:
    """Why torch refused to load an archive, for an error message."""
    asked = re.search(r"GLOBAL ([\w.]{1,80})", str(error))
    if asked is not None:
        return f"it would run code ({asked.group(1)}), which a checkpoint never does; refused"
    if isinstance(error, pickle.UnpicklingError):
        return "it contains more than plain data and tensors; refused"
    return plain(str(error).strip().partition("\n")[0])
