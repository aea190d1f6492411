"""`python -m eval.analysis.language_text --model runs/hierarchical --texts embedded`: what a
small language model of bytes, words or subwords does on other text than the one it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from checkpoints.folders import write_json
from configs.command_line.loading import exit_with, flags
from configs.command_line.outputs import new_file
from data.reading.texts import read_texts
from modules.target.loading import own_device
from modules.tokenization.contract import PAD, LanguageModel, Score
from modules.tokenization.saved import load_language_model
from modules.tokenization.words import with_typos


@dataclass(frozen=True)
class Reading:
    """What is read, by which model.

    Args:
        model: folder of `python -m train.language_model`.
        texts: a `.txt` file, one document; or conversations: a file, a pattern of files, a Hub data
            set, or `embedded`.
        limit: documents read at most.
        batch: rows at a time.
        typos: share of the words with two letters swapped, in the second text.
        output: a new `.json` file to write; by default nothing is written.
    """

    model: str
    texts: str = "embedded"
    limit: int | None = None
    batch: int = 8
    typos: float = 0.2
    output: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot run, before a model is loaded."""
        if self.batch < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"batch and limit must be at least 1, got {self.batch}, {self.limit}")
        if not 0 <= self.typos <= 1:
            raise ValueError(f"typos must be from 0 to 1, got {self.typos}")


@dataclass
class Report:
    """What a trained model does on held-out text.

    bits_per_byte, word_accuracy: of the text that is predicted, of masked models the masked words;
    with_typos: of the same text with errors. backbone_steps_per_byte: positions of the widest part,
    per byte of text. multiply_adds_per_byte: of one forward pass, per byte. details: the model's
    own.
    """

    parameters: int
    bits_per_byte: float
    word_accuracy: float | None
    bits_per_byte_with_typos: float
    word_accuracy_with_typos: float | None
    backbone_steps_per_byte: float
    multiply_adds_per_byte: float
    details: dict[str, float]


@contextmanager
def unfused() -> Iterator[None]:
    """Encoders and attention by their plain operators, as multiply-adds of fused ones are not
    counted.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@torch.no_grad()
def evaluate(model: LanguageModel, texts: Sequence[str], batch: int) -> tuple[Score, int, int]:
    """The score of texts, with the same masks and vectors at every call; also positions of the
    backbone and multiply-adds.

    Raises:
        ValueError: nothing is predicted, as of empty texts.
    """
    model.eval()
    rows = [row for text in texts for row in model.rows(text)]
    device = model.unit_bytes.device
    draws, total, steps = torch.Generator(device).manual_seed(0), None, 0
    counter = FlopCounterMode(display=False)
    with unfused(), counter:
        for start in range(0, len(rows), batch):
            stacked = model.stacked(rows[start : start + batch]).to(device)
            score = model.score(stacked, draws)
            total = score if total is None else total + score
            present_BT = stacked.reshape(*stacked.shape[:2], -1)[..., 0] != PAD
            steps += model.pooled * int(present_BT.sum())
    if total is None or not total.bytes:
        raise ValueError("the texts have nothing to predict: name longer ones")
    return total, steps, counter.get_total_flops() // 2


def report(model: LanguageModel, texts: Sequence[str], batch: int, typos: float) -> Report:
    """Bits per byte and word accuracy on texts, and on the same texts with typos; and the model's
    own figures.

    Args:
        model: in evaluation afterwards.
        texts: not trained on.
        batch: rows at a time.
        typos: share of the words with two letters swapped, in the second text.
    """
    score, steps, work = evaluate(model, texts, batch)
    size = len("".join(texts).encode())
    spoiled = [with_typos(text, typos, i) for i, text in enumerate(texts)]
    with_errors, _, _ = evaluate(model, spoiled, batch)
    rows = model.stacked([row for text in texts for row in model.rows(text)])
    return Report(
        sum(weights.numel() for weights in model.parameters()),
        score.bits_per_byte,
        score.word_accuracy,
        with_errors.bits_per_byte,
        with_errors.word_accuracy,
        steps / size,
        work / size,
        model.details(rows.to(model.unit_bytes.device)),
    )


def command(arguments: Sequence[str]) -> int:
    """Parse the command line, read the texts, and print the figures."""
    title = "Bits per byte and word accuracy of a small language model on other text."
    reading = Reading(**flags(Reading, arguments, "eval.analysis.language_text", title))
    # A place that cannot be written to is refused before anything is measured.
    with new_file(reading.output):
        texts = read_texts(reading.texts, reading.limit, "texts")
        model = load_language_model(reading.model).to(own_device())
        figures = asdict(report(model, texts, reading.batch, reading.typos))
        if reading.output is not None:
            write_json(Path(reading.output), figures)
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    exit_with(command)
