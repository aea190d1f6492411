"""A self-contained page that shades the tokens of responses by how critical they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

SHOWN = 24
"""Responses on a page at most."""
STYLE = """
:root { color-scheme: light; --ink: #1d2330; --quiet: #5b6577; --line: #e3e7ee; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 56rem; color: var(--ink);
  background: #fff;
  font: 15px/1.7 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; letter-spacing: -.01em; }
.quiet { color: var(--quiet); white-space: pre-line; }
.response { white-space: pre-wrap; border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem 1.2rem; }
.response span { border-radius: 2px; } .lowest { outline: 2px solid #b3261e; outline-offset: 1px; }
.error { text-decoration: underline wavy #0072b2 2px; text-underline-offset: 3px; }
article { margin: 2rem 0; }
figcaption { color: var(--quiet); font-size: .85rem; margin-top: .3rem; }
figure { margin: 0; }
"""


@dataclass(frozen=True)
class TokenScores:
    """A response: its prompt, the text of each token, each token's contrastive score in [0, 1]
    (low: critical), and whether it is known to be wrong."""

    prompt: str
    tokens: Sequence[str]
    scores: Sequence[float]
    errors: Sequence[bool]


def highlight_page(title: str, responses: Sequence[TokenScores]) -> str:
    """HTML without outside parts: at most `SHOWN` responses, each token shaded by 1 − s, the lowest
    score outlined.
    """
    shown = responses[:SHOWN]
    return (
        "\n".join(
            [
                "<!doctype html>",
                '<html lang="en"><head><meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{escape(title)}</title>",
                f"<style>{STYLE}</style></head><body>",
                f"<h1>{escape(title)}</h1>",
                f'<p class="quiet">{len(shown)} of {len(responses)} held-out wrong responses. The '
                "darker a token, the lower its score s: the more it belongs to wrong trajectories "
                "rather than right ones. The lowest score of each response is outlined, a known "
                "error underlined; point at a token to read its score.</p>",
                *(_article(number, response) for number, response in enumerate(shown, 1)),
                "</body></html>",
            ]
        )
        + "\n"
    )


def _article(number: int, response: TokenScores) -> str:
    lowest = min(range(len(response.scores)), key=lambda i: response.scores[i])
    rows = zip(response.tokens, response.scores, response.errors, strict=True)
    spans = "".join(
        _span(token, score, i == lowest, error) for i, (token, score, error) in enumerate(rows)
    )
    mean = sum(response.scores) / len(response.scores)
    return (
        f'<article><p class="quiet">{escape(response.prompt.strip())}</p><figure>'
        f'<div class="response">{spans}</div>'
        f"<figcaption>Response {number}: mean score {mean:.2f}, lowest "
        f"{response.scores[lowest]:.3f} at token {lowest + 1} of {len(response.scores)}"
        "</figcaption></figure></article>"
    )


def _span(token: str, score: float, lowest: bool, error: bool) -> str:
    classes = " ".join(name for name, holds in (("lowest", lowest), ("error", error)) if holds)
    mark = f' class="{classes}"' if classes else ""
    return (
        f'<span{mark} style="background: rgba(213, 94, 0, {max(0.0, 1 - score) * 0.6:.3f})" '
        f'title="s = {score:.3f}">{escape(token)}</span>'
    )
