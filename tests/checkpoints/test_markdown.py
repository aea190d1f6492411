"""Names, commands and figures of strangers are text in cards and reports: no HTML, links, headings,
fences or cells.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from checkpoints.card import Publishing, model_card
from checkpoints.markdown import block, code, plain
from checkpoints.pretrained import Provenance, describe
from modules.drafters.heads.medusa import Medusa
from tests.fakes import tiny_target

HOSTILE = (
    "x<script>alert(1)</script>\n\n# heading\n```\n<img src=x onerror=1> "
    "[a](http://b) ![c](d) | e | `f` &lt;"
)
STARTS = re.compile(r"^(# heading|<img|<script|!\[)", re.MULTILINE)


def harmless(page: str) -> bool:
    """Whether what a stranger wrote stands in no place where Markdown or HTML would obey it."""
    fenced = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    shown = "\n".join(
        re.sub(r"(?<!\\)`[^`]*`", "", line) for line in fenced.splitlines() if line[:4] != "    "
    )
    link = re.search(r"(?<!\\)\[a(?<!\\)\]", shown)
    return not (STARTS.search(shown) or "<script" in shown or "<img" in shown or link)


@pytest.mark.parametrize(
    "field",
    [
        "command",
        "data",
        "data name",
        "git_revision",
        "packages",
        "package name",
        "target",
        "fingerprint",
        "measured",
        "created",
    ],
)
def test_no_field_of_a_provenance_is_markup_in_a_card(field: str) -> None:
    target = tiny_target()
    drafter = Medusa(target.shape, heads=2)
    whole = Provenance.of(target, data={"train": "x"}, measured={"val/loss": 1.0})
    changed: dict[str, dict[str, Any]] = {
        "command": {"command": HOSTILE},
        "data": {"data": {"train": HOSTILE}},
        "data name": {"data": {HOSTILE: 1}},
        "git_revision": {"git_revision": HOSTILE},
        "packages": {"packages": {"torch": HOSTILE}},
        "package name": {"packages": {HOSTILE: "1"}},
        "target": {"target": {**whole.target, "name": HOSTILE}},
        "fingerprint": {"target": {**whole.target, "fingerprint": HOSTILE}},
        "measured": {"measured": {HOSTILE: 1.0}},
        "created": {"created": HOSTILE},
    }
    provenance = replace(whole, **changed[field])
    card = model_card(
        drafter, describe(drafter, whole), provenance, Publishing("ada/heads", "other")
    )
    body = card.split("\n---\n", 1)[1]
    print(body)
    assert harmless(body) and body.count("\n```") == model_card(
        drafter, describe(drafter, whole), whole, Publishing("ada/heads", "other")
    ).count("\n```")


def test_plain_code_and_block_are_one_place_each() -> None:
    assert plain(HOSTILE).count("\n") == 0 and "<" not in plain(HOSTILE) and "\\|" in plain(HOSTILE)
    assert code(HOSTILE).count("`") == 2 and "\n" not in code(HOSTILE)
    assert all(line.startswith("    ") for line in block(HOSTILE).splitlines())
    assert plain("token_recycling at 0.7, 4 at once") == "token_recycling at 0.7, 4 at once"
