"""The base of decoders that give several answers to a prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import fmean
from typing import ClassVar

import torch

from modules.contracts.sampling import Sampling
from modules.decoding.loop import Trace, check_context, check_limit
from modules.decoding.timing import Clock
from modules.target.target import Target


def distinct_share(answers: Sequence[Sequence[int]], length: int) -> float:
    """Different n-grams of all answers together over the number of all, 0 without any."""
    grams = [
        tuple(ids[start : start + length])
        for ids in answers
        for start in range(len(ids) - length + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def check_one_prompt(
    name: str,
    target: Target,
    prompts: list[list[int]],
    sampling: Sampling,
    limit: int,
    supported: tuple[str, ...] = (),
) -> None:
    """Refuse what a decoder outside of the speculative loop cannot do.

    Args:
        name: of the decoder.
        target, prompts, sampling, limit: what it is asked for.
        supported: settings of the sampling beside temperature, top-k and top-p that it follows.

    Raises:
        ValueError: a limit below 1; several prompts at once, or one without tokens; another setting
            of the sampling; a prompt that leaves no room for an answer.
    """
    check_limit(limit)
    if len(prompts) != 1:
        raise ValueError(
            f"{name} decodes one prompt at a time: set batch_size to 1 or leave it out"
        )
    if not prompts[0]:
        raise ValueError("a prompt has no tokens: give at least one")
    unknown = sorted(set(sampling.extra_options()) - set(supported))
    if unknown:
        raise ValueError(f"{name} does not follow {unknown[0]}: leave it out")
    check_context(target, len(prompts[0]), limit)


class SeveralAnswers(ABC):
    """Gives several answers to one prompt at a time, without drawing any.

    Args:
        target: the model that answers.
    """

    name: str = "several_answers"
    claims_lossless: ClassVar[bool] = False
    batched: ClassVar[bool] = False

    def __init__(self, target: Target) -> None:
        self.target = target

    @abstractmethod
    def answer(self, prompt: list[int], limit: int, trace: Trace, clock: Clock) -> None:
        """Fill in `trace.answers`, best first, of at most `limit` tokens each."""

    @torch.no_grad()
    def decode(self, prompts: list[list[int]], sampling: Sampling, limit: int) -> list[Trace]:
        """The answers to one prompt; the trace's ids are the best one's.

        Raises:
            ValueError: as `check_one_prompt`; a temperature above 0.
        """
        # 1. Refuse what cannot be decoded.
        check_one_prompt(self.name, self.target, prompts, sampling, limit)
        if sampling.temperature > 0:
            raise ValueError(
                f"{self.name} draws nothing: give the row temperature 0, got "
                f"{sampling.temperature:g}"
            )
        # 2. Answer; nothing can be shown before the best answer is known.
        trace, clock = Trace(len(prompts[0])), Clock(self.target.device)
        self.answer(prompts[0], limit, trace, clock)
        trace.ids = trace.answers[0]
        trace.drafted = [False] * len(trace.ids)
        trace.seconds, trace.time_to_first_token = clock.snapshot(), clock.elapsed()
        return [trace]

    def quality_of(self, traces: Sequence[Trace]) -> dict[str, float]:
        """Figures of the answers for a report, means over prompts: different n-grams of a prompt's
        answers over all of them (`distinct_1`, `distinct_2`, `distinct_4`), and what the decoder
        measured itself."""
        answered = [trace for trace in traces if trace.answers]
        if not answered:
            return {}
        names = dict.fromkeys(name for trace in answered for name in trace.figures)
        values = {
            name: [value for trace in answered for value in trace.figures.get(name, [])]
            for name in names
        }
        return {
            **{
                f"distinct_{n}": fmean(distinct_share(trace.answers, n) for trace in answered)
                for n in (1, 2, 4)
            },
            **{name: fmean(measured) for name, measured in values.items() if measured},
        }
