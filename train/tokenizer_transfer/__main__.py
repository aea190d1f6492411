"""`python -m train.tokenizer_transfer --config tokenization/zett.yaml --output DIR`: a hypernetwork
that gives a language model the tokenizer of another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader, TensorDataset

from checkpoints.folders import write_json
from configs.command_line.loading import config_parser, exit_with, parse
from modules.target.loading import load_target, locate
from modules.target.outline import read_tokenizer
from modules.tokenization.blocks import check_sizes
from modules.tokenization.transfer.frozen_base import Base
from modules.tokenization.transfer.hypernetwork import Hypernetwork, check_byte_level, save_network
from modules.tokenization.transfer.sampled_tokenizers import TokenizerSampler
from modules.tokenization.units import BYTES
from train.cli import quieten
from train.language_model import (
    METRICS,
    add_output,
    fresh_output,
    held_out_documents,
)
from train.lightning.steps import Precision, fit_steps
from train.tokenizer_transfer.result import (
    Tables,
    bits_per_byte,
    mean_tables,
    original_tables,
    predicted_tables,
    save_model,
)
from train.tokenizer_transfer.stages import IdentityStage, TransferStage

CLIP = 0.1
"""Largest norm of the gradients, as in the paper."""
COUNTS = "steps", "batch", "pieces", "every", "identity_tokens", "buffer", "limit"
"""Settings of at least one."""


@dataclass
class TransferSettings:
    """Model, tokenizer, text and training.

    Args:
        target: the language model, of a byte-level BPE tokenizer: Hub id, folder, .gguf file or
            smollm2-135m. It is frozen.
        tokenizer: of which it gets the tokenizer: Hub id, folder or .gguf file.
        train: text; see `train.language_model`.
        held_out: share of the documents for the figures.
        limit: documents read at most.
        width: of the hypernetwork.
        layers: of its transformer.
        heads: of its attention.
        pieces: of a token that are read.
        residual: predict what is added to the mean of a token's pieces; tokens that the base model
            has keep their embeddings.
        identity_steps: of the first stage, which `residual` does without.
        identity_lr: its peak learning rate.
        identity_tokens: per step.
        steps: of the second stage.
        lr: its peak learning rate.
        batch: texts per step.
        length: tokens of a text.
        vocabulary: tokens of a drawn tokenizer.
        buffer: texts it is made of.
        negatives: tokens besides a batch's that the loss chooses among.
        every: steps with one tokenizer.
        lexical: weight of the regression on tokens of both vocabularies; without `residual` only.
        precision: of the training, `32-true` or `bf16-mixed` (the paper's); figures are always in
            float32.
        seed: of weights, order and draws.
    """

    tokenizer: str
    target: str = "smollm2-135m"
    train: str = "embedded"
    held_out: float = 0.05
    limit: int | None = None
    width: int = 512
    layers: int = 3
    heads: int = 8
    pieces: int = 7
    residual: bool = False
    identity_steps: int = 300
    identity_lr: float = 3e-4
    identity_tokens: int = 4096
    steps: int = 300
    lr: float = 6e-5
    batch: int = 8
    length: int = 128
    vocabulary: int = 16384
    buffer: int = 2048
    negatives: int = 2048
    every: int = 8
    lexical: float = 0.5
    precision: Precision = "32-true"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot run, before anything is loaded."""
        least = {"identity_steps": 0 if self.residual else 1, "negatives": 0, "length": 2}
        least |= {"vocabulary": BYTES, **dict.fromkeys(COUNTS, 1)}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        check_sizes(self.width, self.layers, self.heads)
        for name in ("lr", "identity_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.residual and self.identity_steps:
            raise ValueError(
                f"identity_steps must be 0 with residual, got {self.identity_steps}: tokens of the "
                "base model keep their embeddings"
            )
        if self.lexical < 0:
            raise ValueError(f"lexical must not be negative, got {self.lexical}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")


def transfer(settings: TransferSettings, output: Path) -> dict[str, float]:
    """Train the hypernetwork and write it, the model with the new tokenizer, and `metrics.json`.

    Raises:
        ValueError: a model or tokenizer that cannot be used, or too little text.
    """
    # 1. Text, the tokenizer, and the frozen model.
    seed_everything(settings.seed, verbose=False)
    texts, held_out = held_out_documents(
        settings.train, settings.held_out, settings.limit, settings.seed
    )
    tokenizer = read_tokenizer(
        settings.tokenizer, locate(settings.tokenizer), chats=False, what="settings.tokenizer"
    )
    base = Base(load_target(settings.target, "float32"))
    check_byte_level(base.target.tokenizer)
    network = Hypernetwork(
        base.embedding.float(),
        None if base.head is None else base.head.float(),
        settings.width,
        settings.layers,
        settings.heads,
        settings.pieces,
        residual=settings.residual,
    )
    figures = _Figures(settings, base, tokenizer, network, held_out)
    # 2. Identity, then text in tokenizers drawn at random.
    shared = (network, base, settings.identity_lr, settings.identity_steps // 10)
    identity = IdentityStage(
        *shared, settings.identity_steps, tokens=settings.identity_tokens, seed=settings.seed
    )
    if settings.identity_steps:
        steps = TensorDataset(torch.zeros(settings.identity_steps))
        fit_steps(identity, DataLoader(steps), settings.identity_steps, CLIP, settings.precision)
        figures.add("identity")
    fit_on_text(settings, base, network, texts, tokenizer)
    figures.add("transferred")
    # 3. Write everything.
    tables = predicted_tables(network, base, tokenizer, figures.size)
    save_model(base, tables, tokenizer, output / "model")
    save_network(network, output)
    write_json(output / METRICS, {**figures.found_so_far, "settings": asdict(settings)})
    return figures.found_so_far


def fit_on_text(
    settings: TransferSettings,
    base: Base,
    network: Hypernetwork,
    texts: Sequence[str],
    tokenizer: Any,
) -> None:
    """The second stage, over shuffled texts; drawn tokenizers have words as GPT-2's or as the new
    tokenizer's.
    """
    buffer = texts[: settings.buffer]
    sampler = TokenizerSampler(buffer, settings.vocabulary, settings.seed, tokenizer)
    stage = TransferStage(
        network,
        base,
        settings.lr,
        settings.steps // 10,
        settings.steps,
        sampler=sampler,
        lexical=settings.lexical,
        negatives=settings.negatives,
        every=settings.every,
        length=settings.length,
        seed=settings.seed,
    )
    order = torch.Generator().manual_seed(settings.seed)
    loader = DataLoader(
        texts,  # type: ignore[arg-type]
        settings.batch,
        shuffle=True,
        collate_fn=list,
        generator=order,
    )
    fit_steps(stage, loader, settings.steps, CLIP, settings.precision)


class _Figures:
    """Bits per byte on held-out text: of the base model in its own tokenizer, of the mean of
    pieces, and of the hypernetwork in both tokenizers after each stage.
    """

    def __init__(
        self,
        settings: TransferSettings,
        base: Base,
        tokenizer: Any,
        network: Hypernetwork,
        texts: Sequence[str],
    ) -> None:
        self.settings, self.base, self.tokenizer = settings, base, tokenizer
        self.network, self.texts = network, texts
        self.size = max(tokenizer.get_vocab().values()) + 1
        base_tokenizer = base.target.tokenizer
        self.found_so_far: dict[str, float] = {}
        self._add("original", original_tables(base), base_tokenizer)
        self._add("mean_of_pieces", mean_tables(base, tokenizer, self.size), tokenizer)

    def add(self, name: str) -> None:
        """The hypernetwork as it is now."""
        base_tokenizer = self.base.target.tokenizer
        rows = len(self.base.source_TS)
        for label, tokenizer, size in (
            (name, self.tokenizer, self.size),
            (f"{name}_own_tokenizer", base_tokenizer, rows),
        ):
            tables = predicted_tables(self.network, self.base, tokenizer, size)
            self._add(label, tables, tokenizer)

    def _add(self, name: str, tables: Tables, tokenizer: Any) -> None:
        bits, tokens = bits_per_byte(self.base, tables, tokenizer, self.texts, self.settings.length)
        self.found_so_far[f"bits_per_byte_{name}"] = bits
        self.found_so_far[f"tokens_per_byte_{name}"] = tokens
        print(f"{name}: {bits:.3f} bits per byte, {tokens:.3f} tokens per byte", flush=True)


def command(arguments: Sequence[str]) -> int:
    """Parse the command line and train."""
    parser = config_parser(
        "python -m train.tokenizer_transfer", "Give a language model another tokenizer."
    )
    add_output(parser)
    parser.add_class_arguments(TransferSettings, "settings", fail_untyped=True)
    config: Namespace = parse(parser, arguments)
    settings = parser.instantiate(config).settings
    quieten()
    with fresh_output(config):
        figures = transfer(settings, config.output)
    print(json.dumps(figures, indent=2))
    print(f"{config.output / 'model'}")
    return 0


if __name__ == "__main__":
    exit_with(command)
