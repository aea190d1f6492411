"""Diverse beam search: groups of beams that are kept apart (Vijayakumar et al. 2016, arXiv
1610.02424).

Shape legend: R beams that run, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from modules.decoding.loop import Trace
from modules.decoding.lossy.several_answers import SeveralAnswers
from modules.decoding.timing import Clock
from modules.target.target import Target


@dataclass(frozen=True)
class Beam:
    """Tokens so far, and their log-probability without any penalty. row: its parent's row of the
    last call.
    """

    ids: tuple[int, ...]
    log_prob: float
    row: int = 0


@dataclass
class Group:
    """Beams that compete with each other. `finished` beams ended with a stop token."""

    beams: list[Beam]
    finished: list[Beam] = field(default_factory=list)

    def finish(self, beam: Beam, width: int) -> None:
        """Add an ended beam, and keep the `width` likeliest."""
        self.finished = likeliest([*self.finished, beam])[:width]

    def done(self, width: int) -> bool:
        """Whether no running beam can become one of the `width` likeliest."""
        if not self.beams or len(self.finished) < width:
            return not self.beams
        best = max(beam.log_prob for beam in self.beams)
        return best <= self.finished[-1].log_prob


def likeliest(beams: Sequence[Beam]) -> list[Beam]:
    """The beams by falling log-probability; of equal ones the first."""
    return sorted(beams, key=lambda beam: -beam.log_prob)


class DiverseBeamSearch(SeveralAnswers):
    """Beam search in groups, one after another in every step (algorithm 1 of the paper). A beam of
    a later group pays for what the earlier groups chose in the same step:

    - `hamming`: λ times the number of their beams that chose the same token;
    - `cumulative`: λ Σ_h exp(-d_h / Γ) over the earlier groups h, d_h the number of places, over
      all beams of h, where their tokens differ from this beam's, its new token included.

    The penalty chooses the tokens of a step only. Running scores and the ranking of the answers are
    plain log-probabilities, without a length penalty. (Hugging Face's group beam search carries the
    penalties of all steps along.) Groups that are done have no say any more.

    Args:
        target: the model that answers.
        beams: of all groups together; as many answers are given.
        groups: 1 is beam search; as many as beams are most diverse.
        diversity: λ; published values are 0.2 to 0.8.
        dissimilarity: see above.
        forgetting: Γ of `cumulative`, in tokens.

    Raises:
        ValueError: beams that cannot be divided into the groups, or a setting out of range.
    """

    name = "diverse_beam"

    def __init__(
        self,
        target: Target,
        beams: int = 4,
        groups: int = 4,
        diversity: float = 0.5,
        dissimilarity: Literal["hamming", "cumulative"] = "hamming",
        forgetting: float = 4.0,
    ) -> None:
        super().__init__(target)
        if min(beams, groups) < 1 or beams % groups:
            raise ValueError(f"beams must be a multiple of groups, got {beams} and {groups}")
        if dissimilarity not in ("hamming", "cumulative"):
            raise ValueError(
                f"dissimilarity {dissimilarity!r} is unknown: use 'hamming' or 'cumulative'"
            )
        if diversity < 0 or forgetting <= 0:
            raise ValueError(
                "diversity must be 0 or above and forgetting above 0, got "
                f"{diversity} and {forgetting}"
            )
        self.width, self.groups, self.diversity = beams // groups, groups, diversity
        self.cumulative, self.forgetting = dissimilarity == "cumulative", forgetting

    def answer(self, prompt: list[int], limit: int, trace: Trace, clock: Clock) -> None:
        """Search until every group is done or its beams are as long as the limit."""
        # 1. Every group begins with the prompt.
        target = self.target
        with clock.phase("prefill"):
            session = target.open(1, len(prompt) + limit)
            ids_BT = torch.tensor([prompt], device=target.device)
            one_B = torch.ones(1, dtype=torch.long, device=target.device)
            logits_RV, _ = session.prefill(ids_BT, one_B * len(prompt))
        groups = [Group([Beam((), 0.0)]) for _ in range(self.groups)]
        # 2. One token a step, group by group.
        for length in range(1, limit + 1):
            with clock.phase("accept"):
                self._step(groups, logits_RV.double().log_softmax(-1))
            running = [beam for group in groups for beam in group.beams]
            if not running or length == limit:
                break
            with clock.phase("commit"):
                session.keep([beam.row for beam in running])
            # Beams are numbered as they stand in the next call.
            rows = iter(range(len(running)))
            for group in groups:
                group.beams = [Beam(b.ids, b.log_prob, next(rows)) for b in group.beams]
            with clock.phase("verify"):
                newest_R1 = torch.tensor([beam.ids[-1:] for beam in running], device=target.device)
                logits_RV, _ = session.prefill(newest_R1, torch.ones_like(newest_R1[:, 0]))
        # 3. What was not finished ends at the limit.
        ended = [
            beam
            for group in groups
            for beam in likeliest(group.finished + group.beams)[: self.width]
        ]
        trace.answers = [list(beam.ids) for beam in likeliest(ended)]
        trace.figures["log_prob_of_the_best"] = [max(beam.log_prob for beam in ended)]
        trace.figures["log_prob_of_all"] = [sum(beam.log_prob for beam in ended) / len(ended)]

    def _step(self, groups: list[Group], log_probs_RV: Tensor) -> None:
        """Give every beam of every group that is not done one more token."""
        chosen: list[list[Beam]] = []
        for group in groups:
            ended = self._extend(group, log_probs_RV, chosen)
            chosen.append([*group.beams, *ended])
            if group.done(self.width):
                group.beams = []

    def _extend(self, group: Group, log_probs_RV: Tensor, chosen: list[list[Beam]]) -> list[Beam]:
        """The best continuations of a group become its beams; those that end are returned.

        Args:
            group: whose beams are continued.
            log_probs_RV: after every beam that runs, of all groups.
            chosen: beams of the earlier groups, this step's tokens included.
        """
        if not group.beams:
            return []
        # 1. Plain and penalised scores of every continuation.
        parents, stops = group.beams, self.target.eos_ids
        before = torch.tensor([beam.log_prob for beam in parents], dtype=torch.double)
        plain_RV = (
            log_probs_RV[[beam.row for beam in parents]] + before.to(log_probs_RV.device)[:, None]
        )
        scores_RV = self._penalised(plain_RV, parents, chosen)
        # 2. Enough of the best that `width` of them go on, whichever stop.
        count = min(self.width * (1 + len(stops)), scores_RV.numel())
        best = scores_RV.flatten().topk(count).indices
        plain, size = plain_RV.flatten()[best].tolist(), scores_RV.shape[1]
        group.beams, ended = [], []
        for rank, (place, log_prob) in enumerate(zip(best.tolist(), plain, strict=True)):
            parent, token = parents[place // size], place % size
            beam = Beam((*parent.ids, token), log_prob, parent.row)
            if token not in stops:
                group.beams.append(beam)
            elif rank < self.width:
                ended.append(beam)
                group.finish(beam, self.width)
            if len(group.beams) == self.width:
                break
        return ended

    def _penalised(
        self, plain_RV: Tensor, parents: Sequence[Beam], chosen: Sequence[Sequence[Beam]]
    ) -> Tensor:
        """The scores after the penalties for what the earlier groups chose."""
        scores_RV = plain_RV.clone()
        for beams in chosen:
            counts = Counter(beam.ids[-1] for beam in beams)
            for row, parent in enumerate(parents):
                if not self.cumulative:
                    for token, count in counts.items():
                        scores_RV[row, token] -= self.diversity * count
                    continue
                # Places that differ before this step, and with any other token in it.
                earlier = sum(
                    a != b for beam in beams for a, b in zip(parent.ids, beam.ids[:-1], strict=True)
                )
                other = math.exp(-(earlier + len(beams)) / self.forgetting)
                scores_RV[row] -= self.diversity * other if beams else 0.0
                for token, count in counts.items():
                    same = other * math.exp(count / self.forgetting)
                    scores_RV[row, token] -= self.diversity * (same - other)
        return scores_RV
