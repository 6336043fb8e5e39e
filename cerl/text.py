"""Text that is not ours (of files, users and libraries), shown so that a reader sees what it is."""


def visible(text: str, *, lines: bool = False) -> str:
    """The text with control characters, other line ends and undecodable bytes written as escapes.

    So a name from a file can neither colour a terminal, nor move its cursor, nor pretend to be a
    line of ours. With `lines`, line feeds stay.
    """
    return "".join(
        char
        if char.isprintable() or (lines and char == "\n")
        else char.encode("unicode_escape").decode()
        for char in text
    )
