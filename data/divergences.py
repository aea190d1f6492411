"""Labels mined from where a drafter leaves its target: does the answer change if the draft is kept?

AutoJudge's way to a judge's data without annotators (Garipov et al. 2025, arXiv 2504.20039, section 3): at each
mismatch the drafted token replaces the target's, the target finishes, and the final answers are compared. A token that
changes nothing is right (and stays in the text that is looked at next), one that changes the answer is wrong.
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
    """A drafted token that the target rejected.

    text: new tokens before it. drafted, chosen: the drafter's token and the target's own.
    """

    text: list[int]
    drafted: int
    chosen: int


class FirstRejection(GreedyRule):
    """The greedy rule for one sequence, which remembers the first draft it rejects and how many tokens stood before."""

    def __init__(self) -> None:
        self.emitted, self.position, self.drafted = 1, -1, -1

    def __call__(self, tree: TokenTree, verified: Verified, draws: Draws) -> Accepted:
        """Accept greedily; look for a candidate below the last accepted node."""
        accepted = super().__call__(tree, verified, draws)
        self.emitted += int(accepted.lengths_B)
        below = (tree.parents_BN[0] == accepted.last_B) & tree.acceptable_BN[0]
        if self.position < 0 and bool(below.any()):
            self.position, self.drafted = self.emitted - 1, int(tree.tokens_BN[0, below][0])
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
    """Labelled rows `{prompt, response, spans}` for `data.labelled`, one per mismatch, `most` of them at most.

    Args:
        target: whose answers they are.
        drafter: what it is served by.
        messages: the question.
        limit: new tokens per answer.
        most: mismatches looked at.
    """
    prompt = prompt_ids(messages, target.tokenizer)
    answer = final_number(_written(target, _finished(target, prompt, [], limit)))
    text: list[int] = []
    for _ in range(most):
        found = first_divergence(target, drafter, prompt + text, limit - len(text)) if len(text) < limit else None
        if found is None:
            return
        text = text + found.text
        kept = [*text, found.drafted]
        same = final_number(_written(target, _finished(target, prompt, kept, limit))) == answer
        start, end = len(_written(target, text)), len(_written(target, kept))
        if start < end:
            yield {"prompt": messages, "response": _written(target, kept), "spans": [[start, end, int(same)]]}
        text = kept if same else [*text, found.chosen]
        if text[-1] in target.eos_ids:
            return


def final_number(text: str) -> str | None:
    """The last number of a text, without separators; None if it has none."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def _finished(target: Target, prompt: list[int], text: list[int], limit: int) -> list[int]:
    """`text` and what the target says behind it, greedily."""
    if len(text) >= limit or (text and text[-1] in target.eos_ids):
        return text
    return text + SpeculativeDecoder(target).decode([prompt + text], Sampling(), limit - len(text))[0].ids


def _written(target: Target, ids: list[int]) -> str:
    return target.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
