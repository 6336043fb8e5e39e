"""Docstrings of this package as Markdown, for the page of functions (an extension of griffe).

A docstring here has parts that begin with a word at the start of a line, `Args:` or `Returns:`,
whose further lines are indented. Each becomes a paragraph that begins with that word in bold.
"""

import re
from typing import Any

import griffe

PART = re.compile(r"^(Args|Attributes|Returns|Raises|Source):\s+", re.MULTILINE)


def as_markdown(text: str) -> str:
    """The docstring with a paragraph for each part, and no indented line, which would be code."""
    head, *parts = PART.split(text)
    named = zip(parts[::2], parts[1::2], strict=True)
    paragraphs = [f"**{word}:** {' '.join(body.split())}" for word, body in named]
    return "\n\n".join([head.strip(), *paragraphs])


class Docstrings(griffe.Extension):
    """Rewrites the docstring of every function, class and attribute that griffe finds."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
