"""Entropy adaptive decoding: the next token's entropy chooses between a small and a large model
(Simonds 2025, arXiv 2502.06833). Lossy: nothing is verified.

Shape legend: V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from operator import ne
from typing import ClassVar

import torch
from torch import Tensor

from modules.acceptance.rules import Draws
from modules.contracts.sampling import Sampling
from modules.decoding.loop import Trace, check_context, check_limit
from modules.decoding.timing import Clock
from modules.target.loading import load_target
from modules.target.session import Session
from modules.target.target import Target
from modules.target.tokenizers.vocabulary import check_tokenizer


def entropy_bits(logits_V: Tensor) -> float:
    """Entropy of the unwarped distribution, in bits (float32)."""
    log_V = logits_V.float().log_softmax(-1)
    return float(-(log_V.exp() * log_V).sum()) / math.log(2)


class EntropyAdaptive:
    """The large model begins; after at least `shortest_run` tokens the mean entropy of the last
    `window` ones decides which model continues. After a change, the model first reads what the
    other wrote.

    Args:
        large: the target, whose text is approximated.
        small: a smaller model of the same tokenizer, however its vocabulary is padded: Hub id or
            folder, or the loaded target.
        threshold: bits; above it the large model writes.
        window: entropies averaged. shortest_run: tokens between two changes at least.

    Raises:
        ValueError: a small model of another tokenizer.
    """

    name = "entropy_adaptive"
    claims_lossless: ClassVar[bool] = False
    batched: ClassVar[bool] = False

    def __init__(
        self,
        large: Target,
        small: str | Target,
        threshold: float = 1.0,
        window: int = 5,
        shortest_run: int = 10,
    ) -> None:
        if min(window, shortest_run) < 1:
            raise ValueError(
                f"window and shortest_run must be at least 1, got {window} and {shortest_run}"
            )
        # The small model is loaded as the large one was.
        precision, device = str(large.dtype).removeprefix("torch."), str(large.device)
        other = (
            small
            if isinstance(small, Target)
            else load_target(small, precision, device, chats=False)
        )
        check_tokenizer(other.tokenizer, f"small {other.name!r}", large)
        self.large, self.small = large, other
        self.threshold, self.window, self.shortest_run = threshold, window, shortest_run

    @torch.no_grad()
    def decode(self, prompts: list[list[int]], sampling: Sampling, limit: int) -> list[Trace]:
        """Continue one prompt; `drafted` marks the tokens that the small model wrote, `entropies`
        the bits that each was chosen at, by whichever model wrote it.

        Raises:
            ValueError: settings that depend on the text; several prompts at once; a limit below 1;
                a prompt without tokens, or one that leaves one of the models no room for an answer.
        """
        # 1. Refuse what cannot be decoded.
        check_limit(limit)
        if unused := set(sampling.extra_options()) - {"min_p"}:
            raise ValueError(f"{self.name} does not apply {min(unused)}: leave it out")
        if len(prompts) != 1:
            raise ValueError(
                f"{self.name} decodes one prompt at a time: set batch_size to 1 or leave it out"
            )
        if not prompts[0]:
            raise ValueError("a prompt has no tokens: give at least one")
        for model in (self.large, self.small):
            check_context(model, len(prompts[0]), limit, model.name)
        # 2. Both models keep a cache of the same text.
        trace, clock = Trace(len(prompts[0])), Clock(self.large.device)
        draws = Draws(sampling, [torch.Generator(self.large.device).manual_seed(sampling.seed)])
        capacity = len(prompts[0]) + limit
        sessions = [model.open(1, capacity) for model in (self.large, self.small)]
        small, run, entropies = False, 0, deque[float](maxlen=self.window)
        # 3. One token at a time.
        while len(trace.ids) < limit and not (trace.ids and trace.ids[-1] in self.large.eos_ids):
            with clock.phase("verify" if trace.ids else "prefill"):
                logits_V = self._read(sessions[small], [*prompts[0], *trace.ids])
                trace.ids.append(int(draws.choose(logits_V[None, None])))
            if len(trace.ids) == 1:
                trace.time_to_first_token = clock.elapsed()
            trace.drafted.append(small)
            trace.entropies.append(entropy_bits(logits_V))
            entropies.append(trace.entropies[-1])
            run += 1
            # 4. Change the model when the mean entropy crosses the threshold.
            wanted = sum(entropies) / len(entropies) <= self.threshold
            if run >= self.shortest_run and wanted != small:
                small, run = wanted, 0
        trace.seconds = clock.snapshot()
        return [trace]

    def _read(self, session: Session, text: list[int]) -> Tensor:
        """Logits [V] after the text, over the large model's ids. Only tokens that the model has not
        seen are read; padding ids of the other model are read as its own last id."""
        model = session.target
        unseen = torch.tensor([text[session.cache.lengths[0] :]], device=model.device)
        unseen = unseen.clamp(max=model.shape.vocab_size - 1)
        count_B = torch.tensor([unseen.shape[1]], device=model.device)
        logits_BV, _ = session.prefill(unseen, count_B)
        return logits_BV[0, : self.large.shape.vocab_size]

    def quality_of(self, traces: Sequence[Trace]) -> dict[str, float]:
        """Figures of these answers for a report: the shares of their tokens that either model wrote
        (`large_share`, `small_share`); `relative_cost`, the parameters that wrote them over those
        of the large model alone, which is the paper's cost and leaves out the next two; `switches`
        between the models; `catch_up_tokens`, what a model had to read after a change beside the
        newest token; and `mean_entropy` in bits."""
        # Shares are of all tokens, not means over answers.
        tokens = sum(len(trace.ids) for trace in traces)
        if not tokens:
            return {}
        small = sum(sum(trace.drafted) for trace in traces) / tokens
        weight = self.small.parameter_count / self.large.parameter_count
        return {
            "large_share": 1 - small,
            "small_share": small,
            "relative_cost": 1 - small + small * weight,
            "switches": sum(sum(map(ne, trace.drafted, trace.drafted[1:])) for trace in traces),
            "catch_up_tokens": sum(map(catch_up_tokens, traces)),
            "mean_entropy": sum(sum(trace.entropies) for trace in traces) / tokens,
        }


def catch_up_tokens(trace: Trace) -> int:
    """Tokens that a model had to read after a change, the newest left out; the small one begins
    with the prompt.
    """
    seen, count = {False: trace.prompt_tokens, True: 0}, 0
    for written, small in enumerate(trace.drafted):
        length = trace.prompt_tokens + written
        count += max(0, length - seen[small] - 1)
        seen[small] = length
    return count
