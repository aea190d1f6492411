"""`python -m eval.analysis.dynamic_prefill --transfer runs/zett --prompts chats.jsonl`: shorter
prompts by merging their tokens, and what the answers' likelihood loses.

Dynamic tokenization (Feher et al. 2024, arXiv 2411.18553, section 4.2): the prompt's tokens are
merged, the answer's are not, and positions count merged tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from checkpoints.folders import write_json
from configs.command_line.loading import exit_with, flags
from configs.command_line.outputs import new_file
from data.chat_tokens import answer_ids
from data.reading.rows import load_conversations
from eval.metrics.bootstrap import mean_interval
from modules.runtime.files import read_object
from modules.target.loading import load_target
from modules.tokenization.transfer.frozen_base import Base
from modules.tokenization.transfer.hypernetwork import Hypernetwork, load_network
from modules.tokenization.transfer.merging import (
    DynamicEmbeddings,
    Piece,
    merge,
    pieces_of_ids,
    validity,
)


@dataclass(frozen=True)
class Prefill:
    """What is measured.

    Args:
        transfer: folder of `python -m train.tokenizer_transfer`, with its hypernetwork.
        prompts: chats with answers; see `data.reading`.
        limit: chats.
        merges: numbers of merges of the batch of all prompts, each a row of the result.
        boundary: `pretoken`, `word`, `word_hyphen` or `sentence`.
        originals: single tokens keep the model's own embeddings; else all are predicted.
        output: a new `.json` file to write; by default nothing is written.
    """

    transfer: str
    prompts: str
    limit: int = 32
    merges: tuple[int, ...] = (0, 25, 50, 100, 200, 400)
    boundary: str = "word"
    originals: bool = True
    output: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot run, before a model is loaded."""
        if not self.merges or min(self.merges) < 0:
            raise ValueError(f"merges {list(self.merges)} must be numbers of 0 or more")
        if self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        validity(self.boundary)


@dataclass(frozen=True)
class Line:
    """One number of merges: the prompts' length relative to no merges, and nats per token of the
    answers, more than without merges, with a 95 % interval over chats.
    """

    merges: int
    length: float
    nats: float
    more_nats: float
    interval: tuple[float, float]


@torch.no_grad()
def answer_nats(
    base: Base, dynamic: DynamicEmbeddings, prompt: list[Piece], said: list[int]
) -> float:
    """Mean nats of an answer's tokens behind a merged prompt."""
    vectors = torch.cat([dynamic.vectors(prompt), base.embedding[said[:-1]]])
    hidden = base.model.base_model(inputs_embeds=vectors[None], use_cache=False).last_hidden_state
    head = base.embedding if base.head is None else base.head
    logits = hidden[0, len(prompt) - 1 :] @ head.T
    return float(nn.functional.cross_entropy(logits.float(), torch.tensor(said).to(logits.device)))


def measure(
    base: Base,
    network: Hypernetwork,
    chats: Sequence[tuple[list[int], list[int]]],
    asked_for: Prefill,
) -> list[Line]:
    """A line for each number of merges.

    Args:
        base: the frozen model.
        network: its hypernetwork.
        chats: ids of prompts and answers.
        asked_for: the settings.
    """
    dynamic = DynamicEmbeddings(network, base, asked_for.originals)
    prompts = [pieces_of_ids(base, prompt) for prompt, _ in chats]
    whole = sum(map(len, prompts))
    plain = [answer_nats(base, dynamic, prompt, said) for prompt, (_, said) in zip(prompts, chats)]
    lines = []
    for merges in asked_for.merges:
        merged = merge(prompts, merges, validity(asked_for.boundary))
        nats = [answer_nats(base, dynamic, row, said) for row, (_, said) in zip(merged, chats)]
        more = [new - old for new, old in zip(nats, plain, strict=True)]
        lines.append(
            Line(
                merges,
                sum(map(len, merged)) / whole,
                sum(nats) / len(nats),
                sum(more) / len(more),
                mean_interval(more),
            )
        )
    return lines


def run(asked_for: Prefill) -> list[Line]:
    """Load everything, and measure.

    Raises:
        ValueError: no hypernetwork in the folder, or no chat with an answer.
    """
    folder = Path(asked_for.transfer)
    settings = read_object(folder / "metrics.json").get("settings") or {}
    if "target" not in settings:
        raise ValueError(f"transfer {asked_for.transfer!r} is no run of train.tokenizer_transfer")
    conversations = list(load_conversations(asked_for.prompts, asked_for.limit))
    base = Base(load_target(str(settings["target"]), "float32"))
    network = load_network(folder, base.embedding.float(), base.head)
    chats = []
    for chat in conversations:
        answer = answer_ids(
            chat, len(chat.messages) - 1, base.target.tokenizer, set(base.target.eos_ids)
        )
        if answer.said:
            chats.append((list(answer.prompt), list(answer.said)))
    if not chats:
        raise ValueError(f"prompts {asked_for.prompts!r} hold no answers: name chats with answers")
    return measure(base, network, chats, asked_for)


def command(arguments: Sequence[str]) -> int:
    """Parse the command line, measure, and print a table."""
    title = "Shorter prompts by merged tokens, and what that costs."
    asked_for = Prefill(**flags(Prefill, arguments, "eval.analysis.dynamic_prefill", title))
    # A place that cannot be written to is refused before anything is measured.
    with new_file(asked_for.output):
        lines = run(asked_for)
        if asked_for.output is not None:
            write_json(Path(asked_for.output), [asdict(line) for line in lines])
    print("| merges | length | nats per token | more than without |\n|---:|---:|---:|---:|")
    for line in lines:
        low, high = line.interval
        print(
            f"| {line.merges} | {line.length:.3f} | {line.nats:.3f} | {line.more_nats:+.3f} "
            f"({low:+.3f} to {high:+.3f}) |"
        )
    return 0


if __name__ == "__main__":
    exit_with(command)
