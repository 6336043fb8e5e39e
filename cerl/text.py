"""Makes text from files, users and libraries safe to print, and long lists short."""

from collections.abc import Iterable, Sequence

FEW = 5  # names of a list that a sentence tells


def visible(text: str, *, lines: bool = False) -> str:
    """The text with every character that is not printable written as an escape, e.g. \\x1b.

    So a name from a file can neither colour the terminal, nor move its cursor, nor look like a line
    that cerl printed. Args: lines, keep line feeds.
    """
    return "".join(
        char
        if char.isprintable() or (lines and char == "\n")
        else char.encode("unicode_escape").decode()
        for char in text
    )


def few(names: Sequence[object], *, most: int = FEW, between: str = ", ") -> str:
    """The first names of a list, and how many others there are: "a, b, c, d, e and 3 more".

    Args: most, how many names are told; between, what separates them.
    """
    shown = between.join(str(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def ranges(numbers: Iterable[int], *, least: int = 3) -> list[str]:
    """Whole numbers in ascending order as texts, with consecutive ones as a range, e.g. 0..4 and 7.

    Args: least, how many consecutive numbers make a range; fewer are told one by one.
    """
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    out = []
    for part in parts:
        out += [f"{part[0]}..{part[-1]}"] if len(part) >= least else [str(n) for n in part]
    return out
