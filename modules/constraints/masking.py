"""States of constraints after the prefixes of a batch, and masks from them.

Shape legend: B sequences, N nodes, W frontier nodes, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from modules.contracts.drafter import Drafter, DraftState, Frontier
from modules.contracts.sampling import Constraint, ConstraintState, Prefixes
from modules.contracts.token_tree import SiblingDraw, TokenTree

Path = tuple[int, ...]


@dataclass
class _Answer:
    """How far a sequence's answer has been followed, and states below that."""

    state: ConstraintState | None
    length: int = 0
    below: dict[Path, ConstraintState | None] = field(default_factory=dict)


class States:
    """States of each sequence's constraint after its answer and after paths below it.

    Args:
        constraints: one for each sequence; None where anything may follow.
        eos_ids: end tokens.
    """

    def __init__(
        self, constraints: Sequence[Constraint | None], eos_ids: Collection[int] = ()
    ) -> None:
        self.eos_ids = eos_ids
        self._answers = {
            sequence: _Answer(constraint.start())
            for sequence, constraint in enumerate(constraints)
            if constraint is not None
        }

    def follow(self, sequence: int, answer: Sequence[int]) -> int | None:
        """Go on to the end of an answer. Returns how many tokens further the answer has been
        followed; None where the sequence has no constraint."""
        if sequence not in self._answers:
            return None
        followed = self._answers[sequence]
        if len(answer) > followed.length:
            added = tuple(answer[followed.length :])
            followed.state = self.after(sequence, added)
            followed.length, followed.below = len(answer), {}
        return followed.length - len(answer)

    def after(self, sequence: int, path: Path) -> ConstraintState | None:
        """The state after the answer and a path; None where the path is not allowed."""
        followed = self._answers[sequence]
        if not path:
            return followed.state
        if path not in followed.below:
            above = self.after(sequence, path[:-1])
            ended = path[-1] in self.eos_ids
            followed.below[path] = None if above is None or ended else above.advance(path[-1])
        return followed.below[path]

    def copy(self, ancestors: Sequence[int]) -> None:
        """Replace the state of sequence i by that of sequence `ancestors[i]`."""
        before = self._answers
        self._answers = {
            i: replace(before[ancestor], below={})
            for i, ancestor in enumerate(ancestors)
            if ancestor in before
        }


class ConstraintProcessor:
    """Tokens that a constraint does not allow after a prefix have probability 0. Where it allows
    none, only an end token is left: the answer ends there, and is not whole.

    Args:
        states: of the batch. eos_ids: end tokens.

    `masks` and `seconds` count what masks of each sequence cost.
    """

    def __init__(self, states: States, eos_ids: Collection[int]) -> None:
        self.states, self.eos_ids = states, sorted(token for token in eos_ids if token >= 0)
        self.masks, self.seconds = Counter[int](), defaultdict[int, float](float)

    def __call__(self, logits_BNV: Tensor, prefixes: Sequence[Prefixes]) -> Tensor:
        """Masked logits [B,N,V]; rows whose own path is not allowed stay as they are.

        Raises:
            ValueError: a constraint of another vocabulary; nothing is allowed, and no token ends
                an answer.
        """
        masked_BNV = logits_BNV.clone()
        for b, texts in enumerate(prefixes):
            began = time.perf_counter()
            further = self.states.follow(texts.sequence, texts.answer)
            for node, path in enumerate(texts.paths if further is not None else ()):
                state = self.states.after(texts.sequence, tuple(path[further:]))
                if state is not None:
                    self._mask(masked_BNV[b, node], state)
                    self.masks[texts.sequence] += 1
            self.seconds[texts.sequence] += time.perf_counter() - began
        return masked_BNV

    def _mask(self, logits_V: Tensor, state: ConstraintState) -> None:
        allowed_V = state.allowed()
        if allowed_V.shape != logits_V.shape:
            raise ValueError(
                f"constraint: it knows {len(allowed_V)} tokens, the target {len(logits_V)}: make "
                "it with the target's shape.vocab_size"
            )
        logits_V.masked_fill_(~allowed_V.to(logits_V.device), -torch.inf)
        if logits_V.max() == -torch.inf:
            if not self.eos_ids:
                raise ValueError(
                    "constraint: no token may follow, and none ends an answer: give end tokens"
                )
            logits_V[self.eos_ids[0]] = 0


class MaskedDrafter:
    """A drafter as tree builders see it, whose distributions are masked by the states of the nodes
    that they follow.

    Args:
        drafter: that drafts. states: of the batch, followed to its newest tokens.
        sequences: numbers of the rows.
    """

    def __init__(self, drafter: Drafter, states: States, sequences: Sequence[int]) -> None:
        self._drafter, self._states, self._sequences = drafter, states, sequences
        self._paths: list[list[Path]] = []

    def __getattr__(self, name: str) -> object:
        """What the drafter has under this name."""
        return getattr(self._drafter, name)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D], -inf where a token is not allowed. A node that allows no draft keeps its
        own."""
        logits_BWD = self._drafter.expand(state, frontier).clone()
        if frontier.depth == 0:
            self._paths = [[] for _ in self._sequences]
        tokens, parents = frontier.tokens_BW.tolist(), frontier.parents_BW.tolist()
        vocabulary_D = self._drafter.vocabulary_D
        for b, sequence in enumerate(self._sequences):
            # 1. The paths of these rows; the newest token is part of the answer.
            rows = self._paths[b]
            above = [rows[parent] if parent >= 0 else None for parent in parents[b]]
            paths = [
                () if path is None else (*path, token)
                for path, token in zip(above, tokens[b], strict=True)
            ]
            rows += paths
            # 2. Masks over the draft vocabulary.
            if self._states.follow(sequence, ()) is None:
                continue
            for row, path in enumerate(paths):
                node = self._states.after(sequence, path)
                mask_D = None if node is None else node.allowed().to(logits_BWD.device)
                if mask_D is not None and vocabulary_D is not None:
                    mask_D = mask_D[vocabulary_D]
                if mask_D is not None and mask_D.any():
                    logits_BWD[b, row].masked_fill_(~mask_D, -torch.inf)
        return logits_BWD


def allowed_tree(tree: TokenTree, states: States, sequences: Sequence[int]) -> TokenTree:
    """A tree chosen by value without the nodes that are not allowed. Drawn trees stay: which of
    their nodes remain must not depend on the drawn tokens. So do trees with rows that only compute,
    whose places their drafter knows."""
    plain = tree.candidate_BN is None and tree.auxiliary is None
    if tree.size == 1 or not plain or tree.draws_used != {SiblingDraw.BY_VALUE}:
        return tree
    real = (~tree.topology.padding).expand_as(tree.tokens_BN).tolist()
    parents = tree.parents_BN.expand_as(tree.tokens_BN).tolist()
    for b, (sequence, tokens) in enumerate(zip(sequences, tree.tokens_BN.tolist(), strict=True)):
        if states.follow(sequence, ()) is None:
            continue
        paths: list[Path] = [()]
        for node in range(1, tree.size):
            parent = parents[b][node]
            paths.append((*paths[parent], tokens[node]) if parent < node else ())
            real[b][node] = (
                real[b][node]
                and real[b][parent]
                and allows(states.after(sequence, paths[parent]), tokens[node])
            )
    return tree.only(torch.tensor(real, device=tree.tokens_BN.device))


def allows(state: ConstraintState | None, token: int) -> bool:
    """Whether the token may follow this state."""
    return state is not None and state.allows(token)
