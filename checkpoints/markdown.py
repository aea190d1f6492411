"""Escapes untrusted text for Markdown: literal, on one line, without markup and HTML."""

from __future__ import annotations

import re

_SPECIAL = re.compile(r"([\\`\[\]|])")


def plain(text: object) -> str:
    """Text that a Markdown page shows literally: HTML, links, code, table cells and headings are
    escaped.
    """
    line = " ".join(str(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)


def code(text: object) -> str:
    """Text between backticks, on one line; its backticks become quotes."""
    return f"`{' '.join(str(text).split()).replace('`', chr(39))}`"


def block(text: object) -> str:
    """Text as an indented code block, which no line of the text can end."""
    return "\n".join(f"    {line}" for line in str(text).splitlines())
