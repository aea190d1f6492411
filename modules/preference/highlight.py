"""A self-contained page that shades the tokens of responses by how critical they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from modules.runtime.html_page import html_page

SHOWN = 24
"""Maximum number of responses on a page."""
STYLE = """
body { line-height: 1.7; }
.quiet { white-space: pre-line; }
.response { white-space: pre-wrap; border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem 1.2rem; }
.response span { border-radius: 2px; } .lowest { outline: 2px solid #b3261e; outline-offset: 1px; }
.error { text-decoration: underline wavy #0072b2 2px; text-underline-offset: 3px; }
article { margin: 2rem 0; }
figcaption { color: var(--quiet); font-size: .85rem; margin-top: .3rem; }
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
    """HTML without external resources: at most `SHOWN` responses, each token shaded by 1 − s, the
    lowest score outlined.
    """
    shown = responses[:SHOWN]
    legend = (
        f'<p class="quiet">{len(shown)} of {len(responses)} held-out wrong responses. The '
        "darker a token, the lower its score s: the more it belongs to wrong trajectories "
        "rather than right ones. The lowest score of each response is outlined, a known "
        "error underlined; point at a token to read its score.</p>"
    )
    articles = (_article(number, response) for number, response in enumerate(shown, 1))
    return html_page(title, [legend, *articles], STYLE)


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
