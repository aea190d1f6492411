"""Stream the answer to one prompt with its drafted tokens shaded: `python -m eval.generate
--drafter runs/clover --prompt "…"`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.text import Text

from checkpoints.pretrained import find_folder, read_config
from configs.command_line.loading import exit_with, parse
from configs.command_line.progress import quieten
from data.conversations import check_ids, prompt_ids
from data.reading.files import clean
from eval.methods.rows import Precision, load_drafter
from eval.methods.templates import chat_arguments
from eval.methods.token_options import TokenOptions
from eval.report.token_pieces import pieces
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.runtime.phase_timer import now
from modules.target.loading import AUTO, check_room, load_target

DRAFTED = "black on light_sky_blue1"
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Generation(TokenOptions):
    """Settings of `python -m eval.generate`.

    Args:
        drafter: run folder, drafter folder or Hub id.
        prompt: the user's question.
        target: Hub id, folder or .gguf file; by default what the drafter was trained for.
        max_new_tokens: of the answer.
        temperature: 0 is greedy.
        top_k: sample among the k likeliest tokens; 0 is all.
        top_p: sample within this probability mass.
        seed: of sampling.
        budget: drafted nodes per call at most; by default the drafter's own.
        draft_precision: of the drafter's weights: float32, bfloat16 or float16; by default the
            target's.
        dtype: float32, float64, bfloat16 or float16; 8bit or 4bit where bitsandbytes is installed;
            auto is bfloat16 on a GPU that multiplies it and float32 elsewhere.
        device: a torch device; by default the GPU if there is one.
        chat_template: arguments of the target's chat template; by default those the drafter was
            trained with.
        compare: decode once more without the drafter, to compare speed and tokens.
    """

    drafter: str
    prompt: str
    target: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    budget: int | None = None
    draft_precision: Precision | None = None
    dtype: str = AUTO
    device: str | None = None
    compare: bool = True
    chat_template: dict[str, Any] | None = None


class Stopwatch:
    """Passes a stream of tokens on, records them, and times the wait for each except the first
    (the prefill). Work of the consumer between two tokens is not counted.
    """

    def __init__(self, stream: Iterator[tuple[int, bool]], device: torch.device) -> None:
        self.tokens: list[tuple[int, bool]] = []
        self.seconds = 0.0
        self._stream, self._device = stream, device

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        """The stream's tokens, each with a flag for drafted ones."""
        while True:
            began = now(self._device)
            token = next(self._stream, None)
            if self.tokens:
                self.seconds += now(self._device) - began
            if token is None:
                return
            self.tokens.append(token)
            yield token

    @property
    def tokens_per_second(self) -> float:
        """Speed of the tokens after the first; 0 without any."""
        return (
            (len(self.tokens) - 1) / self.seconds
            if self.seconds > 0 and len(self.tokens) > 1
            else 0.0
        )


def generate(settings: Generation, console: Console) -> None:
    """Stream the answer, then print the speed with and without the drafter.

    Raises:
        ValueError: an empty prompt, no such drafter, another target's drafter, a prompt longer than
            the context.
    """
    # 1. Load the target and the drafter, and check the prompt.
    if not settings.prompt.strip():
        raise ValueError("prompt is empty: give a question")
    sampling = settings.sampling(
        settings.temperature, settings.top_k, settings.top_p, settings.seed
    )
    name = settings.target or read_config(find_folder(settings.drafter))["target"]["name"]
    check_room(name, settings.max_new_tokens)
    target = load_target(
        name,
        settings.dtype,
        settings.device,
        chat_arguments(settings.chat_template, [settings.drafter]),
    )
    sampling = settings.on_target(sampling, target)
    drafter = load_drafter(settings.drafter, target, precision=settings.draft_precision)
    adapted = drafter.adapt(target)
    drafting = SpeculativeDecoder(adapted, drafter, budget=settings.budget)
    ids = prompt_ids([{"role": "user", "content": clean(settings.prompt)}], adapted.tokenizer)
    check_ids(ids, adapted.tokenizer, adapted.shape.vocab_size)
    # 2. Decode with the drafter, and without it for comparison.
    with_drafter = answer(drafting, ids, sampling, settings.max_new_tokens, console)
    report(with_drafter, "with the drafter", console)
    if settings.compare:
        plain = answer(SpeculativeDecoder(adapted), ids, sampling, settings.max_new_tokens, None)
        report(plain, "without", console)
        console.print(comparison(with_drafter, plain, sampling), highlight=False)


def answer(
    decoder: SpeculativeDecoder,
    ids: list[int],
    sampling: Sampling,
    limit: int,
    console: Console | None,
) -> Stopwatch:
    """Decode one prompt after a short warm-up; the text is streamed to the console, if any."""
    decoder.decode([ids], sampling, min(limit, WARM_UP_TOKENS))
    watch = Stopwatch(decoder.stream(ids, sampling, limit), decoder.target.device)
    for text, drafted in pieces(watch, decoder.target.tokenizer):
        if console is not None:
            console.print(Text(text, style=DRAFTED if drafted else ""), end="", soft_wrap=True)
    if console is not None:
        console.print()
    return watch


def report(watch: Stopwatch, label: str, console: Console) -> None:
    """Print one line with speed, tokens and the share of drafted ones."""
    drafted, count = sum(drafted for _, drafted in watch.tokens), len(watch.tokens)
    share = f", {drafted / count:.0%} drafted" if drafted else ""
    console.print(
        f"{label}: {watch.tokens_per_second:.1f} tokens/s ({count} tokens{share})", highlight=False
    )


def comparison(drafting: Stopwatch, plain: Stopwatch, sampling: Sampling) -> str:
    """The speedup, and whether the tokens agree (greedy decoding only)."""
    ratio = (
        f"{drafting.tokens_per_second / plain.tokens_per_second:.2f}×"
        if plain.tokens_per_second
        else "–"
    )
    if sampling.temperature > 0:
        return f"{ratio} (sampled: the two answers differ, their distribution is the same)"
    same = [token for token, _ in drafting.tokens] == [token for token, _ in plain.tokens]
    other = "other tokens (a tie in rounding, or a lossy drafter)"
    return f"{ratio}, {'the same tokens' if same else other}"


def command(arguments: Sequence[str]) -> int:
    """Parse the command line and generate; returns the exit status."""
    parser = ArgumentParser(
        prog="python -m eval.generate", exit_on_error=False, description=__doc__
    )
    parser.add_class_arguments(Generation, fail_untyped=True)
    values = parse(parser, arguments).as_dict()
    quieten()
    generate(Generation(**values), Console())
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m eval.generate` and exit with its status."""
    exit_with(command, arguments)


if __name__ == "__main__":
    main()
