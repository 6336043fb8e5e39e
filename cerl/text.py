"""Makes text from files, users and libraries safe to print."""


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
