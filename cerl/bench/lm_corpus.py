"""The corpus of `cerl bench lm`: text files of a folder as bytes, and batches of consecutive bytes.

The default folder is that of the installed Python packages, so every machine has a corpus, and two
machines with the same packages have the same one. A document is a file. Whole packages are held
out, so that no file of a package that is learnt from is a test.
"""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SUFFIXES = (".py", ".pyi")
SEPARATOR = 0  # the byte between two documents; text has none of this value
HELD_OUT = 0.04  # share of all bytes that is held out at least
LARGEST_PACKAGE = 0.1  # a package with a larger share of all bytes is never held out
LARGEST_FILE = 4_000_000  # bytes; larger files hold data rather than text
VOCABULARY = 256


class Document(NamedTuple):
    """A text file of the corpus."""

    name: str  # path below the folder, with / between its parts
    content: bytes

    @property
    def package(self) -> str:
        """The first part of its path."""
        return self.name.partition("/")[0]


class Corpus(NamedTuple):
    """Documents to learn from and documents that are held out."""

    train: Tensor  # [bytes] uint8 on the CPU: all documents, a SEPARATOR before each
    held_out: tuple[Document, ...]
    packages: tuple[str, ...]  # the names of those held out
    documents: int  # in `train`
    digest: (
        str  # SHA-256 (first 16 hex digits) of all names and contents, and of which are held out
    )

    def long(self, size: int) -> list[Document]:
        """Held-out documents of at least `size` bytes, in an order that their names decide.

        The order is that of a hash, so the first documents are of several packages.
        """
        found = [document for document in self.held_out if len(document.content) >= size]
        return sorted(found, key=lambda document: _rank(document.name))


def load(folder: Path | None = None, *, most: int = 0, seed: int = 0) -> Corpus:
    """Reads the text files below a folder.

    Files with the same content count once. Packages follow each other in an order that `seed`
    decides, and the files of a package in the order of their names.

    Args:   folder, by default that of the installed packages; most, bytes to learn from, after
            which the rest is left out (0: no limit).
    Raises: ValueError if the folder has too few texts to hold some out.
    """
    root = Path(sysconfig.get_paths()["purelib"]) if folder is None else folder
    documents = list(_documents(root))
    by_package: dict[str, list[Document]] = {}
    for document in documents:
        by_package.setdefault(document.package, []).append(document)
    sizes = {
        name: sum(len(document.content) for document in group) for name, group in by_package.items()
    }
    total = sum(sizes.values())
    if len(sizes) < 2:
        raise ValueError(
            f"--texts: expected at least two packages (folders or files) with texts "
            f"({', '.join(SUFFIXES)}) in {root}, got {len(sizes)}; one of them is held out"
        )
    held = _held_out(sizes, total)
    order = sorted(set(sizes) - held, key=lambda name: _rank(f"{seed}/{name}"))
    content, count = bytearray(), 0
    for document in (document for name in order for document in by_package[name]):
        if most and len(content) + len(document.content) >= most:
            break
        content.append(SEPARATOR)
        content += document.content
        count += 1
    digest = hashlib.sha256(content)
    tests = tuple(document for name in sorted(held) for document in by_package[name])
    for document in tests:
        digest.update(document.name.encode() + b"\0" + document.content)
    return Corpus(
        torch.frombuffer(content, dtype=torch.uint8),
        tests,
        tuple(sorted(held)),
        count,
        digest.hexdigest()[:16],
    )


def _documents(root: Path) -> Iterator[Document]:
    """The texts below a folder, by name; of files with equal content the first."""
    if not root.is_dir():
        raise ValueError(f"--texts: expected a folder with texts, got {root}")
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*")):
        if path.suffix not in SUFFIXES or path.is_symlink() or not path.is_file():
            continue
        try:
            content = path.read_bytes()
            content.decode()
        except (OSError, UnicodeDecodeError):
            continue
        mark = hashlib.sha256(content).digest()
        if 0 < len(content) <= LARGEST_FILE and SEPARATOR not in content and mark not in seen:
            seen.add(mark)
            yield Document(path.relative_to(root).as_posix(), content)


def _held_out(sizes: dict[str, int], total: int) -> set[str]:
    """Packages with at least HELD_OUT of all bytes together, drawn by a hash of their names."""
    held: set[str] = set()
    for name in sorted(sizes, key=_rank):
        if sum(sizes[other] for other in held) >= HELD_OUT * total:
            break
        if sizes[name] <= LARGEST_PACKAGE * total or not held:
            held.add(name)
    if len(held) == len(sizes):
        held.remove(max(held, key=lambda name: sizes[name]))
    return held


def _rank(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


class Batches:
    """Batches of a stream of bytes, which depend on nothing but the seed and their number.

    Args of the constructor: stream [bytes] uint8; length, T, predictions of a row; rows, B.

    Raises: ValueError if the stream has fewer bytes than a row needs.
    """

    def __init__(
        self, stream: Tensor, *, length: int, rows: int, device: torch.device, seed: int = 0
    ) -> None:
        if len(stream) < length + 2:
            raise ValueError(
                f"--length: expected less than the {len(stream):,} bytes that the corpus has to "
                f"learn from, got {length:,}; choose a shorter length or a larger folder"
            )
        self.stream, self.length, self.rows = stream.to(device), length, rows
        self.device, self.seed = device, seed

    def batch(self, number: int) -> Tensor:
        """Rows of consecutive bytes from random places: [B, T + 1] int64."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        first = torch.randint(
            len(self.stream) - self.length, (self.rows, 1), generator=generator
        ).to(self.device)
        return self.stream[first + torch.arange(self.length + 1, device=self.device)].long()


def heads_of(documents: Sequence[Document], size: int, device: torch.device) -> Tensor:
    """The first `size` bytes of documents, after a SEPARATOR: [documents, 1 + size] int64."""
    rows = [
        torch.frombuffer(bytearray([SEPARATOR]) + document.content[:size], dtype=torch.uint8)
        for document in documents
    ]
    return torch.stack(rows).to(device).long()
