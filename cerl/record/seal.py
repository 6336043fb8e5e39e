"""The seal of a run's config.yaml: its last line, which shows whether the file was changed.

    # seal: <HMAC-SHA256 of the lines above, or -> <SHA-256 of everything before it in the file>

The SHA-256 guards against accidental changes; anybody can compute it. The HMAC needs a secret key
of this user, so it tells this user's own runs from those of others (`cerl/record/trust.py`). The
owner of the file does not tell, since whoever unpacks an archive owns the files in it.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import NamedTuple

from cerl.config import ConfigError
from cerl.record import files
from cerl.text import visible

_MARK = "# seal: "
_LARGEST = 1 << 20  # most bytes of a config.yaml
_KEY_BYTES = 32


class Opened(NamedTuple):
    """The content of a sealed file whose seal is right."""

    text: str  # without the seal
    own: bool  # whether it was sealed with this user's key


def sealed(text: str, *, own: bool = True) -> str:
    """A text with its seal as last line. Args: own, whether to use this user's key."""
    code = (_code(text.encode()) if own else None) or "-"
    head = f"{text}{_MARK}{code} "
    return f"{head}{hashlib.sha256(head.encode()).hexdigest()}\n"


def opened(path: Path) -> Opened:
    """Reads a sealed file.

    Raises: ConfigError if it cannot be read, was edited or is incomplete.
    """
    try:
        content, _ = files.read_small(path, most=_LARGEST)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    return unsealed(content, path)


def unsealed(content: bytes, path: Path) -> Opened:
    """The text in the content of a sealed file.

    Args:   path of the file, for error messages.
    Raises: ConfigError if the file was edited or is incomplete.
    """
    text, line = _split(content)
    words = line.decode("ascii", "replace").removeprefix(_MARK).removesuffix("\n").split(" ")
    if not line.startswith(_MARK.encode()) or len(words) != 2:
        raise ConfigError(_changed(path, "a seal in its last line", "none"))
    expected = hashlib.sha256(content[: -len(words[1]) - 1]).hexdigest()
    if not content.endswith(f" {expected}\n".encode()):
        got = visible(f"{words[1][:12]}")
        raise ConfigError(_changed(path, f"seal {expected[:12]}...", f"{got}..."))
    code = _code(text)
    own = code is not None and hmac.compare_digest(code.encode(), words[0].encode())
    return Opened(text.decode(errors="replace"), own)


def _split(content: bytes) -> tuple[bytes, bytes]:
    """All lines but the last one, and the last one."""
    at = content.rfind(b"\n", 0, -1) + 1
    return content[:at], content[at:]


def _changed(path: Path, expected: str, got: str) -> str:
    return (
        f"{path}: changed or cut since the run wrote it: expected {expected}, got {got}; to change "
        f"an option of a run use `cerl train --resume {path.parent} --schedule.steps 2_000_000`, "
        f"to start another run from it `cerl train {path}`"
    )


def _code(text: bytes) -> str | None:
    """The HMAC of a text with this user's key, in hex digits; None if there is no key."""
    try:
        return hmac.new(key(), text, hashlib.sha256).hexdigest()
    except (OSError, RuntimeError):
        return None


def key_file() -> Path:
    """The file of this user's key. Raises: RuntimeError if the user has no home folder."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (state if state.is_absolute() else Path.home() / ".local" / "state") / "cerl" / "key"


def key() -> bytes:
    """This user's secret key, created at its first use.

    Raises: OSError if it cannot be created, or if others could have read or made its file;
            RuntimeError if the user has no home folder.
    """
    path = key_file()
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make(path)
    content, facts = files.read_small(path, most=_KEY_BYTES)
    if len(content) != _KEY_BYTES:
        raise OSError(f"{path}: expected {_KEY_BYTES} bytes, got {len(content)}; delete it")
    if os.name == "posix" and (facts.st_uid != os.geteuid() or facts.st_mode & 0o077):
        raise OSError(f"{path}: expected a file that is yours and that only you may read")
    return content


def _make(path: Path) -> None:
    """Creates a key file. It is written under another name and then hard-linked to `path`, so that
    of two processes one wins and no half-written key is ever seen."""
    fresh = files.temporary(path)
    try:
        with files.create(fresh, mode=0o600) as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
