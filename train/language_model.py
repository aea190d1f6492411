"""`python -m train.language_model --config tokenization/hierarchical.yaml --output DIR`: a small
language model of bytes, words or subwords, trained from scratch on text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from checkpoints.folders import write_json
from configs.command_line.class_paths import Kind
from configs.command_line.loading import config_parser, exit_with, parse
from configs.command_line.outputs import claimed
from data.reading.texts import read_texts
from eval.analysis.language_text import Report, report
from eval.methods.rows import class_of, construct
from modules.tokenization.contract import LanguageModel
from modules.tokenization.saved import save_language_model
from modules.tokenization.units import check_units, make_units
from modules.tokenization.words import spaced_words, unicode_words
from train.cli import quieten
from train.lightning.steps import Precision, fit_steps

METRICS = "metrics.json"


@dataclass
class LanguageModelSettings:
    """Model, text and training.

    Args:
        model: `{class_path, init_args}` of a class of `modules/tokenization/`.
        train: a `.txt` file, one document; or conversations: a file, a pattern of files, a Hub data
            set, or `embedded`.
        units: `bytes`, `characters` or `subwords`; of Byte2Word what it predicts.
        vocabulary: characters, or pieces of the BPE, made of the training text.
        held_out: share of the documents that is only evaluated (of a single one: its end).
        limit: documents read at most; a `.txt` file is read whole.
        steps: of the optimiser.
        batch: rows per step.
        lr: peak learning rate of AdamW, with linear warm-up and a cosine down to 0.
        warmup_steps: of the learning rate.
        typos: share of the words with two letters swapped, in the evaluation's second text.
        precision: of the training, as Lightning names it (`32-true`, `bf16-mixed`); figures are
            always in float32.
        seed: of weights, order and draws.
    """

    model: dict[str, Any]
    train: str = "embedded"
    units: str = "bytes"
    vocabulary: int = 2048
    held_out: float = 0.1
    limit: int | None = None
    steps: int = 1000
    batch: int = 8
    lr: float = 1e-3
    warmup_steps: int = 50
    typos: float = 0.2
    precision: Precision = "32-true"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot run, before any text is read."""
        least = {"steps": 1, "batch": 1, "vocabulary": 1, "limit": 1, "warmup_steps": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")
        if not 0 <= self.typos <= 1:
            raise ValueError(f"typos must be from 0 to 1, got {self.typos}")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        check_units(self.units, self.vocabulary)
        # `--settings.model.init_args.width 64` arrives as a key beside `init_args`.
        spec = {key: self.model[key] for key in ("class_path", "init_args") if key in self.model}
        beside = {key: value for key, value in self.model.items() if key not in spec}
        if beside:
            self.model = {**spec, "init_args": {**(spec.get("init_args") or {}), **beside}}
        class_of(self.model, "model", Kind.LANGUAGE_MODEL, 1)


class LanguageModelModule(LightningModule):
    """Nats per prediction of the model's rows."""

    def __init__(self, model: LanguageModel, settings: LanguageModelSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.draws: torch.Generator | None = None

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """The loss of one batch; masks and vectors are drawn anew."""
        if self.draws is None:
            self.draws = torch.Generator(self.device).manual_seed(self.settings.seed)
        loss = self.model.score(batch, self.draws).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> tuple[list[Optimizer], list[dict[str, Any]]]:
        """AdamW and its schedule."""
        settings = self.settings
        optimizer = AdamW(self.model.parameters(), lr=settings.lr, betas=(0.9, 0.95))
        schedule: LambdaLR = get_cosine_schedule_with_warmup(
            optimizer, settings.warmup_steps, settings.steps
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def held_out_documents(
    train: str, share: float, limit: int | None, seed: int
) -> tuple[list[str], list[str]]:
    """Texts for training and held-out ones.

    Args:
        train: as in the settings.
        share: of the documents that is held out; of a single one, its end.
        limit: documents read at most.
        seed: of their order.

    Raises:
        ValueError: no text that can be read, or none left to train on.
    """
    texts = read_texts(train, limit, "train")
    # Of one document its last words are held out, of many some documents.
    if len(texts) == 1:
        words = spaced_words(texts[0])
        cut = len(words) - int(len(words) * share)
        texts, held_out = ["".join(words[:cut])], ["".join(words[cut:])]
    else:
        random.Random(seed).shuffle(texts)
        cut = max(1, int(len(texts) * share))
        texts, held_out = texts[cut:], texts[:cut]
    if not any(texts) or not any(held_out):
        raise ValueError(f"train {train!r} has too little text: name a larger file")
    return texts, held_out


def documents(settings: LanguageModelSettings) -> tuple[list[str], list[str]]:
    """The settings' texts for training and held-out ones; see `held_out_documents`."""
    return held_out_documents(settings.train, settings.held_out, settings.limit, settings.seed)


def make_model(settings: LanguageModelSettings, texts: Iterable[str]) -> LanguageModel:
    """The model with random weights, and units made of the texts."""
    words = (word for text in texts for word in unicode_words(text))
    units = make_units(settings.units, words, settings.vocabulary)
    return construct(settings.model, "model", Kind.LANGUAGE_MODEL, units)


def train(settings: LanguageModelSettings, output: Path) -> Report:
    """Train, evaluate, and write the model with `metrics.json`."""
    # 1. Text and model.
    seed_everything(settings.seed, verbose=False)
    texts, held_out = documents(settings)
    model = make_model(settings, texts)
    rows = [row for text in texts for row in model.rows(text)]
    order = torch.Generator().manual_seed(settings.seed)
    loader = DataLoader(
        rows,  # type: ignore[arg-type]
        settings.batch,
        shuffle=True,
        collate_fn=model.stacked,
        generator=order,
    )
    # 2. As many steps as were asked for, over shuffled rows.
    module = LanguageModelModule(model, settings)
    fit_steps(module, loader, settings.steps, precision=settings.precision)
    # 3. Held-out figures beside the weights.
    figures = report(model, held_out, settings.batch, settings.typos)
    save_language_model(model.cpu(), output / "model", asdict(settings))
    write_json(output / METRICS, asdict(figures))
    return figures


def add_output(parser: ArgumentParser) -> None:
    """Add the flags that `fresh_output` reads."""
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run in the same output"
    )


@contextmanager
def fresh_output(config: Namespace) -> Iterator[None]:
    """Claim the output of a training inside of the `with` block.

    Raises:
        ValueError: it has a finished run, and `--overwrite` was not given.
    """
    with claimed(config.output):
        if (config.output / METRICS).exists() and not config.overwrite:
            raise ValueError(
                f"output {str(config.output)!r} already holds a run: add --overwrite, or give "
                "another --output"
            )
        yield


def command(arguments: Sequence[str]) -> int:
    """Parse the command line, train, and print the figures."""
    parser = config_parser(
        "python -m train.language_model", "Train a small language model from scratch."
    )
    add_output(parser)
    parser.add_class_arguments(LanguageModelSettings, "settings", fail_untyped=True)
    config = parse(parser, arguments)
    settings = parser.instantiate(config).settings
    quieten()
    with fresh_output(config):
        figures = train(settings, config.output)
    print(json.dumps(asdict(figures), indent=2))
    print(f"{config.output / 'model'}")
    return 0


def main() -> None:
    """Entry point; exit status 2 after a user's mistake."""
    exit_with(command)


if __name__ == "__main__":
    main()
