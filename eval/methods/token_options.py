"""Options of a command that change which tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from modules.acceptance.processors import check_ids
from modules.constraints.grammar import check_file, read_constraint
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
        constraint: file of what answers must be: a JSON schema (.json), a regular expression
            (.regex), a grammar (.lark), or texts, one a line (.txt).
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
    constraint: str | None = None
    generation_config: bool = False

    def sampling(self, temperature: float, top_k: int, top_p: float, seed: int) -> Sampling:
        """These options with a temperature, top-k, top-p and a seed; the constraint needs a target.

        Raises:
            ValueError: a value that cannot be, or a file that is no constraint.
        """
        if self.constraint is not None:
            check_file(self.constraint)
        extra = {name: getattr(self, name) for name in EXTRA_OPTIONS if name != "constraint"}
        return Sampling(temperature, top_k, top_p, seed, **extra)

    def on_target(self, sampling: Sampling, target: Target) -> Sampling:
        """The sampling with the constraint, and with what the target's `generation_config` says, if
        that is asked for.

        Raises:
            ValueError: a setting there that is not supported, a token that the target has not, or
                a constraint that cannot be used.
        """
        if self.generation_config:
            sampling = with_config(sampling, target.model.generation_config)
        check_ids(sampling, target.shape.vocab_size)
        if self.constraint is None:
            return sampling
        return replace(sampling, constraint=read_constraint(self.constraint, target))

    def applied_by(self, engine: str, tasks: list[Any]) -> list[Any]:
        """The tasks.

        Raises:
            ValueError: options, or schemas of prompts, that another engine does not apply; a
                constraint beside such schemas.
        """
        schemas = [prompt.schema for task in tasks for prompt in task.prompts if prompt.schema]
        names = [*self.changed_options(), *(["schema"] if schemas else [])]
        if names and engine != "slipstream":
            raise ValueError(
                f"{names[0]} is for this project's own loop and Hugging Face's: leave it out with "
                f"engine {engine!r}"
            )
        if schemas and self.constraint is not None:
            raise ValueError(
                f"constraint {self.constraint!r}: the prompts have JSON schemas of their own: "
                "leave it out, or name other prompts"
            )
        return tasks

    def changed_options(self) -> dict[str, Any]:
        """The options that are not at their defaults, for a report."""
        names = [*EXTRA_OPTIONS, "generation_config"]
        defaults = TokenOptions()
        return {
            name: getattr(self, name)
            for name in names
            if getattr(self, name) != getattr(defaults, name)
        }
