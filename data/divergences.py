"""Labels mined from where a drafter leaves its target: does the answer change if the draft is kept?

AutoJudge's way to a judge's data without annotators (Garipov et al. 2025, arXiv 2504.20039, section 3): at each
mismatch a drafted token replaces the target's, the target finishes, and the final answers are compared. A token that
changes nothing is right (the first such stays in the text that is looked at next), one that changes the answer is
wrong. Only answers that end of themselves are compared: where one was cut short there is no label.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.conversations import Message, prompt_ids
from modules.core.drafter import Accepted, Drafter, Sampling, Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.rules import Draws, GreedyRule
from modules.trees.tree import TokenTree

if TYPE_CHECKING:
    from modules.core.target import Target

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Divergence:
    """A place where the target rejected all that was drafted.

    text: new tokens before it. drafted: the tokens drafted there, in the tree's order. chosen: the target's own.
    """

    text: list[int]
    drafted: list[int]
    chosen: int


class FirstRejection(GreedyRule):
    """The greedy rule for one sequence; it remembers the first drafts it rejects and how many tokens stood before."""

    def __init__(self) -> None:
        self.emitted, self.position = 1, -1
        self.drafted: list[int] = []

    def __call__(self, tree: TokenTree, verified: Verified, draws: Draws) -> Accepted:
        """Accept greedily; look for candidates below the last accepted node."""
        accepted = super().__call__(tree, verified, draws)
        self.emitted += int(accepted.lengths_B)
        below = (tree.parents_BN[0] == accepted.last_B) & tree.acceptable_BN[0]
        if self.position < 0 and bool(below.any()):
            self.position, self.drafted = self.emitted - 1, tree.tokens_BN[0, below].tolist()
        return accepted


def first_divergence(target: Target, drafter: Drafter, ids: list[int], limit: int) -> Divergence | None:
    """The first mismatch when the target continues `ids` greedily by at most `limit` tokens; None if there is none."""
    rule, text = FirstRejection(), []
    for token, _ in SpeculativeDecoder(target, drafter, rule).stream(ids, Sampling(), limit):
        text.append(token)
        if 0 <= rule.position < len(text):
            return Divergence(text[:rule.position], rule.drafted, text[rule.position])
    return None


def mine(target: Target, drafter: Drafter, messages: list[Message], limit: int, most: int) -> Iterator[dict[str, Any]]:
    """Labelled rows `{prompt, response, response_ids, spans}` for `data.labelled`, one per drafted token at each
    mismatch. None where the target's own answer is cut at `limit` or holds no number.

    Args:
        target: whose answers they are.
        drafter: what it is served by.
        messages: the question.
        limit: new tokens per answer.
        most: mismatches looked at.
    """
    prompt, text = prompt_ids(messages, target.tokenizer), list[int]()
    answer, = _answers(target, prompt, [text], limit)
    for _ in range(most if answer else 0):
        found = first_divergence(target, drafter, prompt + text, limit - len(text)) if len(text) < limit else None
        if found is None:
            return
        text = text + found.text
        drafts = [token for token in found.drafted if token not in target.eos_ids]
        said = _answers(target, prompt, [[*text, token] for token in drafts], limit)
        for token, other in zip(drafts, said, strict=True):
            if other is not None:
                yield _row(target, messages, [*text, token], other == answer)
        text = [*text, next((token for token, other in zip(drafts, said) if other == answer), found.chosen)]
        if text[-1] in target.eos_ids:
            return


def _row(target: Target, messages: list[Message], ids: list[int], right: bool) -> dict[str, Any]:
    """The last token is what the label is about."""
    return {"prompt": messages, "response": _written(target, ids), "response_ids": ids,
            "spans": [[len(ids) - 1, len(ids), int(right)]]}


def final_number(text: str) -> str | None:
    """The last number of a text, without separators; None if it has none."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def _answers(target: Target, prompt: list[int], texts: list[list[int]], limit: int) -> list[str | None]:
    """The final number when the target goes on greedily from each of some texts of one length; empty if it ends without
    one, None if it is cut at `limit`."""
    if not texts or len(texts[0]) >= limit:
        return [None] * len(texts)
    traces = SpeculativeDecoder(target).decode([prompt + text for text in texts], Sampling(), limit - len(texts[0]))
    return [(final_number(_written(target, text + trace.ids)) or "") if trace.ids[-1] in target.eos_ids else None
            for text, trace in zip(texts, traces, strict=True)]


def _written(target: Target, ids: list[int]) -> str:
    return target.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
