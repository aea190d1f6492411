"""Labels mined from mismatches of drafter and target: does accepting the draft change the answer?

This is AutoJudge's method to label a judge's training data without annotators (Garipov et al. 2025,
arXiv 2504.20039, section 3). Every position of the target's answer is drafted; at each mismatch a
drafted token replaces the target's, the target finishes, and the final answers are compared. A
token that does not change the answer is right (the first of them stays in the text for the next
position), one that changes it is wrong. The search continues at the next position. Only complete
answers are compared: a truncated one gives no label.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from data.conversations import prompt_ids
from data.reading.rows import Message
from modules.acceptance.rules import Draws, GreedyRule, check_pairing
from modules.contracts.drafter import Context, Drafter, DraftState, proposal
from modules.contracts.sampling import Sampling
from modules.contracts.verification import Accepted
from modules.decoding.decoder import SpeculativeDecoder
from modules.runtime.numbers import final_number

if TYPE_CHECKING:
    from modules.contracts.target import Session, Target


@dataclass(frozen=True)
class Divergence:
    """A position where the target rejected all drafted tokens.

    text: new tokens before it. drafted: the rejected tokens, in the tree's order. chosen: the
    target's token.
    """

    text: list[int]
    drafted: list[int]
    chosen: int


@torch.no_grad()
def first_divergence(
    target: Target, drafter: Drafter, ids: list[int], limit: int
) -> Divergence | None:
    """The first mismatch when the target continues `ids` greedily by at most `limit` tokens; None
    if there is none before an end of sequence.

    Every position is drafted, including the first one after `ids`. If a whole path was right,
    drafting continues from its last draft, not from the bonus token, because no token was drafted
    at that position.
    """
    rule, draws, text = GreedyRule(), Draws(Sampling(), [torch.Generator(target.device)]), []
    check_pairing(rule, drafter.sibling_draw)
    state, session = _begin(target, drafter, ids, limit)
    while len(text) < limit:
        # 1. Draft and verify one tree.
        tree = proposal(drafter, state, drafter.default_budget)
        verified = session.verify(tree, drafter.decoding_states)
        accepted = rule(tree, verified, draws)
        # 2. Accepted drafts, and the drafts below them that were rejected.
        path, chosen = accepted.paths[0], int(accepted.next_B)
        drafts = tree.tokens_BN[0, path[1:]].tolist()
        below = tree.acceptable_BN[0] & (tree.parents_BN[0] == path[-1])
        rejected = tree.tokens_BN[0, below].tolist()
        text += drafts if drafts or rejected else [chosen]
        if target.eos_ids & set(text) or len(text) >= limit:
            return None
        if rejected:
            return Divergence(text, rejected, chosen)
        # 3. The last draft becomes the next root, so that the bonus token's position is drafted.
        if drafts:
            accepted = Accepted(
                accepted.path_BA[:, : len(drafts)],
                accepted.lengths_B - 1,
                tree.tokens_BN[:, path[-1]],
            )
        session.commit(accepted)
        state = drafter.absorb(state, verified, accepted)
    return None


def _begin(
    target: Target, drafter: Drafter, ids: list[int], limit: int
) -> tuple[DraftState, Session]:
    """A state and a session after all ids but the last, which is the root of the first tree."""
    assert len(ids) > 1, "a chat template leaves more than one token"
    read = torch.tensor([ids[:-1]], device=target.device)
    lengths_B = torch.tensor([len(ids) - 1], device=target.device)
    session = target.open(1, len(ids) + limit + drafter.default_budget + 1)
    _, states = session.prefill(read, lengths_B, drafter.decoding_states)
    newest_B = torch.tensor(ids[-1:], device=target.device)
    context = Context(target, read, lengths_B, newest_B, states, session=session)
    return drafter.start(context), session


def mine(
    target: Target, drafter: Drafter, messages: list[Message], limit: int, most: int
) -> Iterator[dict[str, Any]]:
    """Labelled rows `{prompt, response, response_ids, spans}` for `data.labelled.labelled`, one per
    drafted token at each mismatch. No rows if the target's own answer is truncated at `limit` or
    has no number.

    Args:
        target: the model that answers.
        drafter: its drafter.
        messages: the question.
        limit: new tokens per answer.
        most: number of mismatches to label, from the beginning of the answer.
    """
    # 1. The target's own answer, which all others are compared with.
    prompt, text = prompt_ids(messages, target.tokenizer), list[int]()
    (answer,) = _answers(target, prompt, [text], limit)
    for _ in range(most if answer else 0):
        mismatch = first_divergence(target, drafter, prompt + text, limit - len(text))
        if mismatch is None:
            return
        text = text + mismatch.text
        drafts = [token for token in mismatch.drafted if token not in target.eos_ids]
        # 2. Finish the answer after each rejected draft, and label it.
        said = _answers(target, prompt, [[*text, token] for token in drafts], limit)
        for token, other in zip(drafts, said, strict=True):
            if other is not None:
                yield _row(target, messages, [*text, token], other == answer)
        # 3. Continue with the first draft that keeps the answer, or the target's token.
        text = [
            *text,
            next((token for token, other in zip(drafts, said) if other == answer), mismatch.chosen),
        ]
        if text[-1] in target.eos_ids:
            return


def _row(target: Target, messages: list[Message], ids: list[int], right: bool) -> dict[str, Any]:
    """A row whose label belongs to the last token."""
    return {
        "prompt": messages,
        "response": _written(target, ids),
        "response_ids": ids,
        "spans": [[len(ids) - 1, len(ids), int(right)]],
    }


def _answers(
    target: Target, prompt: list[int], texts: list[list[int]], limit: int
) -> list[str | None]:
    """The final number of the target's greedy continuation of each text; all have one length. Empty
    if there is no number, None if the answer is truncated at `limit`."""
    if not texts or len(texts[0]) >= limit:
        return [None] * len(texts)
    traces = SpeculativeDecoder(target).decode(
        [prompt + text for text in texts], Sampling(), limit - len(texts[0])
    )
    return [
        (final_number(_written(target, text + trace.ids)) or "")
        if trace.ids[-1] in target.eos_ids
        else None
        for text, trace in zip(texts, traces, strict=True)
    ]


def _written(target: Target, ids: list[int]) -> str:
    return target.tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
