"""The frame of a self-contained HTML page: head, common style, title."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

STYLE = """
:root { color-scheme: light; --ink: #1d2330; --quiet: #5b6577; --line: #e3e7ee; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 56rem; color: var(--ink);
  background: #fff;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; letter-spacing: -.01em; }
.quiet { color: var(--quiet); } figure { margin: 0; } svg { max-width: 100%; height: auto; }
"""


def html_page(title: str, parts: Iterable[str], style: str = "", heading: str | None = None) -> str:
    """An HTML page that loads nothing.

    Args:
        title: of the page, as text.
        parts: HTML of the body, in order.
        style: CSS after the common one.
        heading: as text; None is the title.
    """
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{style}</style></head><body>",
        f"<h1>{escape(title if heading is None else heading)}</h1>",
        *parts,
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"
