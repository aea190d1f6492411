"""Acceptance rules: which tokens of a verified tree are accepted, and which token follows.

A rule is a function (tree, verified, draws) -> Accepted that declares whether it keeps the target's
distribution and which draft distributions it may be paired with.

Shape legend: B sequences, N nodes, A accepted rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from modules.acceptance.rejection import (
    Round,
    Rounds,
    children_of,
    families,
    k_sequential_rounds,
    recursive_rounds,
    twins_of,
)
from modules.contracts.rows import rows_at
from modules.contracts.sampling import Sampling, likeliest, sample_probs, warped_probs
from modules.contracts.shapes import StateName
from modules.contracts.token_tree import SiblingDraw, TokenTree
from modules.contracts.verification import Accepted, Verified

EVERY_DRAW = frozenset(SiblingDraw)


class Draws:
    """The randomness of a decoding run: the warped target distribution and draws from it, one
    generator per sequence.

    Args:
        sampling: temperature and warpers, applied to the target before anything is accepted.
        generators: one per sequence of the batch.
    """

    def __init__(self, sampling: Sampling, generators: list[torch.Generator]) -> None:
        self.sampling, self.generators = sampling, generators

    def select(self, sequences: list[int]) -> Draws:
        """The draws of these sequences alone."""
        return Draws(self.sampling, [self.generators[i] for i in sequences])

    def probs(self, logits: Tensor) -> Tensor:
        """The warped distribution [..., V] in float64; at temperature 0 all its mass is on the
        argmax.
        """
        if self.sampling.temperature == 0:
            return torch.nn.functional.one_hot(likeliest(logits), logits.shape[-1]).double()
        return warped_probs(logits, self.sampling)

    def uniform(self, sequence: int, count: int = 1) -> Tensor:
        """float64 [count] in [0, 1) for one sequence."""
        generator = self.generators[sequence]
        return torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)

    def choose(self, logits_BNV: Tensor) -> Tensor:
        """One token per row, int64 [B,N]: the argmax at temperature 0, else drawn from the warped
        distribution.
        """
        if self.sampling.temperature == 0:
            return likeliest(logits_BNV)
        uniform_BN = torch.stack(
            [self.uniform(b, logits_BNV.shape[1]) for b in range(logits_BNV.shape[0])]
        )
        return sample_probs(self.probs(logits_BNV), uniform_BN.to(logits_BNV.device))


class AcceptanceRule(Protocol):
    """A rule, see the module's docstring. `states` are the target states it reads from
    `verified`."""

    name: str
    lossless: bool
    sibling_draws: frozenset[SiblingDraw]
    states: tuple[StateName, ...]

    def __call__(self, tree: TokenTree, verified: Verified, draws: Draws) -> Accepted:
        """The accepted path of each sequence and the token after it."""
        ...


class GreedyRule:
    """Longest path on which every token is the target's argmax (temperature 0 only; any draft
    distribution).
    """

    name, lossless = "greedy", True
    sibling_draws: frozenset[SiblingDraw] = EVERY_DRAW
    states: tuple[StateName, ...] = ()

    def __call__(self, tree: TokenTree, verified: Verified, draws: Draws) -> Accepted:
        """Match every node against its parent's argmax."""
        if draws.sampling.temperature != 0:
            raise ValueError(
                "rule 'greedy' needs temperature 0: use 'point' or 'ratio' when sampling"
            )
        return _follow(tree, likeliest(verified.logits_BNV))


class PointRule:
    """One draw of the target per prefix; a child that equals it is accepted (chosen by value).

    Acceptance at a node is the target's mass on its children. Lossless because the draw does not
    look at the tree. Siblings of one token, and the same paths below them, share their draws
    (`TokenTree.first_BN`): with a draw for each, the tree would be accepted too often.
    """

    name, lossless = "point", True
    sibling_draws: frozenset[SiblingDraw] = frozenset({SiblingDraw.BY_VALUE})
    states: tuple[StateName, ...] = ()
    rounds: Rounds = staticmethod(recursive_rounds)
    """The same acceptance, child by child, for `node_chances`."""

    def __call__(self, tree: TokenTree, verified: Verified, draws: Draws) -> Accepted:
        """Match every node against the draw after its parent's prefix."""
        return _follow(tree, choices(tree, verified, draws))


class RatioRule:
    """Recursive rejection by the ratio of residual to draft distribution (`recursive_rounds`), for
    every tree that was drawn.

    Each sibling is judged by the distribution that the tree carries for it. `multi_round` and
    `recursive` are this rule for one kind of sibling draw.
    """

    name, lossless = "ratio", True
    sibling_draws: frozenset[SiblingDraw] = frozenset(
        {SiblingDraw.WITHOUT_REPLACEMENT, SiblingDraw.INDEPENDENT}
    )
    states: tuple[StateName, ...] = ()
    rounds: Rounds = staticmethod(recursive_rounds)

    def __call__(self, tree: TokenTree, verified: Verified, draws: Draws) -> Accepted:
        """Walk down from node 0, sequence by sequence.

        Raises:
            ValueError: the tree carries another distribution than its builder promised.
        """
        for draw in tree.draws_carried:
            check_pairing(self, draw)
        walks = [walk(tree, verified, draws, b, self.rounds) for b in range(len(tree.tokens_BN))]
        return accepted_paths(walks, tree.tokens_BN.device)


class MultiRoundRule(RatioRule):
    """SpecInfer's multi-round rule (Miao et al. 2023): independent siblings, each against the
    residual of those before it.
    """

    name = "multi_round"
    sibling_draws: frozenset[SiblingDraw] = frozenset({SiblingDraw.INDEPENDENT})


class RecursiveRule(RatioRule):
    """Recursive rejection of siblings drawn without replacement (RSD, Jeon et al. 2024; DySpec;
    Sequoia).
    """

    name = "recursive"
    sibling_draws: frozenset[SiblingDraw] = frozenset({SiblingDraw.WITHOUT_REPLACEMENT})


class KSequentialRule(RatioRule):
    """SpecTr's K-SEQ (Sun et al. 2023): one threshold for all independent siblings
    (`k_sequential_rounds`).

    With K chains from node 0, those that drew the accepted token go on together.
    """

    name = "k_seq"
    sibling_draws: frozenset[SiblingDraw] = frozenset({SiblingDraw.INDEPENDENT})
    rounds: Rounds = staticmethod(k_sequential_rounds)


def walk(
    tree: TokenTree,
    verified: Verified,
    draws: Draws,
    sequence: int,
    rounds: Rounds,
    good_N: Sequence[bool] = (),
) -> tuple[list[int], int]:
    """One sequence's path by rejection from node 0 down, and the token after it.

    Args:
        tree, verified, draws, sequence: what is judged, and for which sequence.
        rounds: of the siblings after one prefix.
        good_N: nodes that are accepted although all rounds failed, the first of several siblings.
    """
    nodes, family = [0], families(tree, sequence)
    while True:
        # 1. One round per child of the current prefix.
        probs_V = draws.probs(verified.logits_BNV[sequence, nodes[0]])
        children = children_of(family, nodes)
        tried = rounds(tree, sequence, children, probs_V)
        chosen, residual_V = first_accepted(tried, probs_V, draws, sequence)
        # 2. Without an accepted child, the first good one.
        if chosen is None and good_N:
            chosen = next((node for node in children if good_N[node]), None)
        if chosen is None:
            # 3. The path ends here: draw the next token.
            path_N = tree.topology.ancestors[sequence, nodes[0]]
            token = int(sample_probs(residual_V, draws.uniform(sequence)[0]))
            return path_N.nonzero()[:, 0].tolist(), token
        # 4. Go on below the accepted token.
        nodes = twins_of(tree, sequence, chosen, children)


def first_accepted(
    rounds: Iterator[Round], probs_V: Tensor, draws: Draws, sequence: int
) -> tuple[int | None, Tensor]:
    """Draw for each round in turn: the accepted node (None: none) and the distribution [V] of the
    next token.
    """
    for node, chance, residual_V in rounds:
        if draws.uniform(sequence)[0] < chance:
            return node, probs_V
        probs_V = residual_V
    return None, probs_V


class TypicalRule:
    """Medusa's typical acceptance, lossy: keep x while p(x) > min(epsilon, delta * exp(-H(p))).

    Cai et al. 2024, section 2.3.1. Of the longest accepted paths the likeliest wins. The next token
    is the target's argmax, as in the release; at temperature 0 this is argmax matching, unless
    `soft`. Nothing is drawn, so that siblings of one token are judged alike.

    Args:
        epsilon, delta: above.
        soft: at temperature 0, look at the target's unwarped distribution.
    """

    name, lossless = "typical", False
    sibling_draws: frozenset[SiblingDraw] = EVERY_DRAW
    states: tuple[StateName, ...] = ()

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3, soft: bool = False) -> None:
        self.epsilon, self.delta, self.soft = epsilon, delta, soft

    def __call__(self, tree: TokenTree, verified: Verified, draws: Draws) -> Accepted:
        """Threshold every node by its parent's entropy."""
        # 1. The threshold at each node.
        unwarped = self.soft and draws.sampling.temperature == 0
        probs_BNV = (
            verified.logits_BNV.double().softmax(-1)
            if unwarped
            else draws.probs(verified.logits_BNV)
        )
        entropy_BN = -(probs_BNV * (probs_BNV + 1e-5).log()).sum(-1)
        threshold_BN = torch.minimum(
            torch.full_like(entropy_BN, self.epsilon), self.delta * (-entropy_BN).exp()
        )
        # 2. The probability of each node's token, at its parent.
        parents = tree.parents_BN.clamp(min=0)
        probability_BN = probs_BNV[
            torch.arange(len(parents), device=parents.device)[:, None], parents, tree.tokens_BN
        ]
        # 3. Longest path, then the likeliest.
        score_BN = (tree.topology.ancestors * probability_BN.clamp(min=1e-30).log()[:, None]).sum(
            -1
        )
        typical_BN = probability_BN > threshold_BN.gather(1, parents)
        return longest_path(tree, typical_BN, likeliest(verified.logits_BNV), score_BN)


RULES: dict[str, Callable[[], AcceptanceRule]] = {
    rule.name: rule
    for rule in (
        GreedyRule,
        PointRule,
        RatioRule,
        MultiRoundRule,
        RecursiveRule,
        KSequentialRule,
        TypicalRule,
    )
}
WRONG = {
    "per_row": (
        "a draw per candidate row, and a fresh one on a mismatch, gives drafts too much",
        "point",
    ),
    "value_ratio": (
        "children chosen by value were not drawn from q, so p/q means nothing",
        "point",
    ),
    "unnormalised": (
        "siblings without replacement were drawn from q without the earlier ones",
        "recursive",
    ),
    "skip_duplicates": (
        "skipping a duplicate's round lets the value decide whether there was a draw",
        "multi_round",
    ),
    "unordered": (
        "siblings without replacement must be tried in the order in which they were drawn",
        "recursive",
    ),
    "raw_bonus": (
        "what follows the last accepted draft comes from the warped distribution, not from raw "
        "logits",
        "ratio",
    ),
}
"""Published ways to verify that change the distribution, why, and what to use instead.
"""
_DRAWN = {
    SiblingDraw.BY_VALUE: "tokens chosen by value",
    SiblingDraw.WITHOUT_REPLACEMENT: "siblings drawn without replacement",
    SiblingDraw.INDEPENDENT: "siblings drawn independently",
}


def rule_named(name: str) -> AcceptanceRule:
    """A rule by name, with its default settings."""
    if name in WRONG:
        reason, instead = WRONG[name]
        raise ValueError(f"rule {name!r} is refused, it is not lossless: {reason}; use {instead!r}")
    if name not in RULES:
        raise ValueError(f"rule {name!r} is unknown: use one of {', '.join(RULES)}")
    return RULES[name]()


def default_rule(draw: SiblingDraw, sampling: Sampling) -> AcceptanceRule:
    """The lossless rule for trees of this distribution: greedy at temperature 0, else point or
    ratio.
    """
    if sampling.temperature == 0:
        return GreedyRule()
    return PointRule() if draw is SiblingDraw.BY_VALUE else RatioRule()


def check_pairing(rule: AcceptanceRule, draw: SiblingDraw) -> None:
    """Refuse, by name, a rule that may not verify trees of this distribution."""
    if draw not in rule.sibling_draws:
        fitting = ", ".join(
            name
            for name, made in RULES.items()
            if (kind := made()).lossless and draw in kind.sibling_draws
        )
        raise ValueError(
            f"rule {rule.name!r} cannot verify {draw.name.lower()} trees ({_DRAWN[draw]}), which "
            f"are not what it compares with: use one of {fitting}"
        )


def choices(tree: TokenTree, verified: Verified, draws: Draws) -> Tensor:
    """The target's token after each node, int64 [B,N]: the argmax at temperature 0, else one draw
    for all nodes with the same prefix."""
    choice_BN = draws.choose(verified.logits_BNV)
    if draws.sampling.temperature == 0 or tree.size == 1:
        return choice_BN
    return choice_BN.gather(1, tree.first_BN)


def _follow(tree: TokenTree, choice_BN: Tensor) -> Accepted:
    """Accept the nodes that equal what the target chose at their parents."""
    wanted_BN = choice_BN.gather(1, tree.parents_BN.clamp(min=0))
    return longest_path(tree, tree.tokens_BN == wanted_BN, choice_BN)


def longest_path(
    tree: TokenTree, good_BN: Tensor, next_BN: Tensor, score_BN: Tensor | None = None
) -> Accepted:
    """The deepest node whose whole path is good (the first such; or the one of highest score), and
    its path.
    """
    if tree.size == 1:
        only_B1 = torch.zeros_like(tree.tokens_BN)
        return Accepted(only_B1, only_B1[:, 0] + 1, next_BN[:, 0])
    # 1. Nodes whose whole path is good.
    topology = tree.topology
    good_BN = good_BN & tree.acceptable_BN
    good_BN[:, 0] = True
    whole_BN = (good_BN[:, None] | ~topology.ancestors).all(-1)
    # 2. The deepest of them, or the deepest with the highest score.
    depth_BN = torch.where(whole_BN, topology.depth, -1)
    deepest_B1, last_B1 = depth_BN.max(1, keepdim=True)
    if score_BN is not None:
        last_B1 = score_BN.masked_fill(depth_BN < deepest_B1, -torch.inf).argmax(1, keepdim=True)
    # 3. Its path as indices, which rise with the depth; others become 0 at the end.
    on_path_BN = rows_at(topology.ancestors, last_B1)[:, 0]
    nodes = torch.arange(tree.size, device=last_B1.device)
    path_BA = torch.where(on_path_BN, nodes, tree.size).sort(1).values % tree.size
    return Accepted(path_BA, deepest_B1[:, 0] + 1, next_BN.gather(1, last_B1)[:, 0])


def accepted_paths(walks: Sequence[tuple[list[int], int]], device: torch.device) -> Accepted:
    """Paths and next tokens of walks down the trees, one per sequence, as one acceptance."""
    # Pad the paths with node 0.
    width = max(len(path) for path, _ in walks)
    padded = [path + [0] * (width - len(path)) for path, _ in walks]
    lengths, tokens = [len(path) for path, _ in walks], [token for _, token in walks]
    return Accepted(
        torch.tensor(padded, device=device),
        torch.tensor(lengths, device=device),
        torch.tensor(tokens, device=device),
    )
