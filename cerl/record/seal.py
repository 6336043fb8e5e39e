"""The seal of a run's config.yaml: its last line, by which a cut or changed file is noticed.

    # seal: <HMAC-SHA256 of the text above, or -> <SHA-256 of all that stands before it in the file>

The hash guards against accidents: anybody can compute it. The HMAC is made with a key that only
this user has, and tells runs of this user from those of others (`cerl/record/trust.py`). A file
system cannot: whoever unpacks an archive owns what was in it.
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
_LARGEST = 1 << 20  # bytes of a config.yaml, at most
_KEY_BYTES = 32


class Opened(NamedTuple):
    """A sealed text that is whole."""

    text: str  # without its seal
    own: bool  # sealed with this user's key


def sealed(text: str, *, own: bool = True) -> str:
    """A text with its seal below it; not `own`: as a run of somebody else's."""
    code = (_code(text.encode()) if own else None) or "-"
    head = f"{text}{_MARK}{code} "
    return f"{head}{hashlib.sha256(head.encode()).hexdigest()}\n"


def opened(path: Path) -> Opened:
    """The text of a sealed file. Raises: ConfigError if it cannot be read, was changed or cut."""
    try:
        content, _ = files.read_small(path, most=_LARGEST)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    return unsealed(content, path)


def unsealed(content: bytes, path: Path) -> Opened:
    """The text in the content of a sealed file. Raises: ConfigError if it was changed or cut."""
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
    """All lines but the last one, and that."""
    at = content.rfind(b"\n", 0, -1) + 1
    return content[:at], content[at:]


def _changed(path: Path, expected: str, got: str) -> str:
    return (
        f"{path}: changed or cut since the run wrote it: expected {expected}, got {got}; to change "
        f"an option of a run use `cerl train --resume {path.parent} --schedule.steps 2_000_000`, "
        f"to start another run from it `cerl train {path}`"
    )


def _code(text: bytes) -> str | None:
    """The HMAC of a text; None where this user has no key."""
    try:
        return hmac.new(key(), text, hashlib.sha256).hexdigest()
    except (OSError, RuntimeError):
        return None


def key_file() -> Path:
    """Where this user's key lies. Raises: RuntimeError if the user has no home."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (state if state.is_absolute() else Path.home() / ".local" / "state") / "cerl" / "key"


def key() -> bytes:
    """This user's secret, made when it is first asked for.

    Raises: OSError if it cannot be made, or somebody else could have read or made it; RuntimeError
            if the user has no home.
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
    """A new key, unless another process is first: a link to a whole file appears or fails."""
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
