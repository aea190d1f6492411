"""What verification computes anyway, recorded for training and for the acceptance rate.

Online speculative decoding (Liu et al. 2023, arXiv 2310.07177): where a draft is rejected, the
target's distribution is there already. The row that produces token j of a text is row j - 1.

Shape legend: B sequences (one), A accepted rows, T prompt tokens, H hidden size, V target
vocabulary, P positions whose distribution is recorded, K probabilities of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modules.acceptance.rejection import (
    children_of,
    families,
    recursive_rounds,
    sibling_probs,
    twins_of,
)
from modules.acceptance.rules import Draws
from modules.contracts.sampling import Sampling
from modules.contracts.shapes import StateName
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.losses.chunked import full_precision
from train.online.buffer import Item
from train.online.settings import LearningSettings


class Recorder:
    """Observes the decoding of one answer.

    Args:
        prompt: its tokens.
        sampling: of the answer, under which drafts are accepted.
        learning: which positions are recorded, and how much of each.
        states: target states that the loss reads.
    """

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        learning: LearningSettings,
        states: tuple[StateName, ...] = (),
    ) -> None:
        self.prompt, self.learning, self.states = prompt, learning, states
        self._draws = Draws(sampling, [])
        self._next = len(prompt)
        self._positions: list[int] = []
        self._tokens_PK: list[Tensor] = []
        self._probs_PK: list[Tensor] = []
        self._states: dict[StateName, list[Tensor]] = {name: [] for name in states}
        self._tested: list[tuple[int, float]] = []

    def begin(self, logits_BV: Tensor, states: dict[StateName, Tensor]) -> None:
        """Record the prompt's states, and with `all` the distribution of the first token."""
        if self.learning.positions == "all":
            self._record([self._next], logits_BV)
        for name in self.states:
            self._states[name].append(states[name][0, : self._next])
        self._next += 1

    def step(self, sequences: list[int], verified: Verified, accepted: Accepted) -> None:
        """Record the accepted rows of one call, each of which produced a token."""
        path = accepted.paths[0]
        rejected = self._test(verified, path)
        # 1. All emitted tokens, or the last one: a correction, or the bonus.
        last = len(path) - 1
        learnt = [last] if rejected or self.learning.bonus else []
        if self.learning.positions == "all":
            learnt = list(range(len(path)))
        rows_A = torch.tensor(path, device=verified.logits_BNV.device)
        if learnt:
            positions = [self._next + i for i in learnt]
            self._record(positions, verified.logits_BNV[0, rows_A[learnt]])
        # 2. The states of the rows, which are those before the emitted tokens.
        for name in self.states:
            self._states[name].append(verified.states[name][0, rows_A])
        self._next += len(path)

    def _test(self, verified: Verified, path: list[int]) -> bool:
        """Record how likely a draft was accepted after each row of the path that has one; whether
        its last row has one, which was rejected.
        """
        tree, family, nodes, children = verified.tree, families(verified.tree, 0), [0], []
        for i, node in enumerate(path):
            nodes = twins_of(tree, 0, node, children) if i else nodes
            children = children_of(family, nodes)
            if children:
                probs_V = self._draws.probs(verified.logits_BNV[0, node])
                self._tested.append((self._next + i, acceptance(tree, children, probs_V)))
        return bool(children)

    def _record(self, positions: list[int], logits_PV: Tensor) -> None:
        probs_PV = full_precision(logits_PV).softmax(-1)
        size = probs_PV.shape[-1]
        probs_PK, tokens_PK = probs_PV.topk(min(self.learning.top_k or size, size))
        if self.learning.remainder == "drop":
            probs_PK = probs_PK / probs_PK.sum(-1, keepdim=True)
        self._positions += positions
        self._tokens_PK.append(tokens_PK.cpu())
        self._probs_PK.append(probs_PK.cpu())

    def item(self, number: int, answer: list[int]) -> Item:
        """What updates need of the answer, which may have been cut at its end."""
        text = [*self.prompt, *answer]
        count = sum(position < len(text) for position in self._positions)
        tokens, probs = self._tokens_PK or [torch.zeros(0, 1).long()], self._probs_PK
        return Item(
            number,
            torch.tensor(text),
            torch.tensor(self._positions[:count], dtype=torch.long),
            torch.cat(tokens)[:count],
            torch.cat(probs or [torch.zeros(0, 1)])[:count],
            {name: torch.cat(rows)[: len(text) - 1].cpu() for name, rows in self._states.items()},
        )

    def tested(self, answer: list[int]) -> list[float]:
        """For each tested position of the answer, the probability that its draft is accepted."""
        end = len(self.prompt) + len(answer)
        return [chance for position, chance in self._tested if position < end]


def acceptance(tree: TokenTree, children: list[int], probs_V: Tensor) -> float:
    """How likely a draft among siblings is accepted, under the target's distribution [V] of their
    place: for one child drawn from q it is Σ_v min(p, q), whichever token was drawn.
    """
    if len(children) == 1:
        draft_V = sibling_probs(tree, 0, children[0], [], probs_V)
        return float(torch.minimum(probs_V, draft_V).sum())
    # Several: one less the probability that every one in turn is rejected.
    rejected = 1.0
    for turn in recursive_rounds(tree, 0, children, probs_V):
        rejected *= 1 - turn.chance
    return 1 - rejected
