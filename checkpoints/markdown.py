"""Text of strangers in Markdown: as it is, on one line, without markup and HTML."""

from __future__ import annotations

import re

_SPECIAL = re.compile(r"([\\`\[\]|])")


def plain(text: object) -> str:
    """Text that a Markdown page shows as it is: HTML, links, code, table cells and headings of its
    own are escaped.
    """
    line = " ".join(str(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)


def code(text: object) -> str:
    """Text between backticks, on one line; backticks of its own become quotes."""
    return f"`{' '.join(str(text).split()).replace('`', chr(39))}`"


def block(text: object) -> str:
    """Text as a block of code, which no line of it can end."""
    return "\n".join(f"    {line}" for line in str(text).splitlines())
