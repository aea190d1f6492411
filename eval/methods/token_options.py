"""Options of a command that change which tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from modules.acceptance.processors import check_ids
from modules.contracts.sampling import EXTRA_OPTIONS, Sampling
from modules.contracts.target import Target
from modules.target.generation_config import with_config


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """What changes the target's distribution by the text before a token.

    Args:
        min_p: leave out tokens below this share of the likeliest one's probability.
        repetition_penalty: divides logits of tokens of prompt and answer; 1 is off.
        presence_penalty: subtracted from logits of tokens of the answer.
        frequency_penalty: subtracted as often as a token occurs in the answer.
        logit_bias: added to the logits of tokens, by id.
        suppress_tokens: ids of tokens that are never chosen.
        min_new_tokens: no end token before so many.
        stop_strings: texts that end an answer.
        generation_config: take these settings, top_k and top_p from the target's
            generation_config where they are left at their defaults; what is not supported is
            refused.
    """

    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    suppress_tokens: list[int] = field(default_factory=list)
    min_new_tokens: int = 0
    stop_strings: list[str] = field(default_factory=list)
    generation_config: bool = False

    def sampling(self, temperature: float, top_k: int, top_p: float, seed: int) -> Sampling:
        """These options with a temperature, top-k, top-p and a seed."""
        extra = {name: getattr(self, name) for name in EXTRA_OPTIONS}
        return Sampling(temperature, top_k, top_p, seed, **extra)

    def on_target(self, sampling: Sampling, target: Target) -> Sampling:
        """The sampling with what the target's `generation_config` says, if that is asked for.

        Raises:
            ValueError: a setting there that is not supported, or a token that the target has not.
        """
        if self.generation_config:
            sampling = with_config(sampling, target.model.generation_config)
        check_ids(sampling, target.shape.vocab_size)
        return sampling

    def changed_options(self) -> dict[str, Any]:
        """The options that are not at their defaults, for a report."""
        names = [*EXTRA_OPTIONS, "generation_config"]
        defaults = TokenOptions()
        return {
            name: getattr(self, name)
            for name in names
            if getattr(self, name) != getattr(defaults, name)
        }
