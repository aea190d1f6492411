"""`python -m train.encoder_decoder --config targets/editing_t5.yaml --output DIR`: a small T5, with
a tokenizer of its own, trained from scratch on pairs of prompts and answers.

It is a target for encoder-decoder methods, where none can be downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, seed_everything
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    get_cosine_schedule_with_warmup,
)

from configs.command_line.loading import config_parser, exit_with, parse
from configs.command_line.outputs import claimed
from data.chat_tokens import answer_ids
from data.reading.rows import Conversation, load_conversations
from train.lightning.steps import fit_steps

SPECIAL, END = ["<pad>", "</s>", "<unk>"], 1
"""Pieces 0, 1 and 2, as in every T5, and the one that ends a text."""
TEMPLATE = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
"""A chat as the encoder reads it: the turns, each with an end."""


@dataclass
class EncoderDecoderSettings:
    """Model and training.

    Args:
        train: pairs: a file or pattern of files, or a Hub data set.
        model: settings of Hugging Face's T5Config besides the vocabulary, for instance `d_model`.
        vocabulary: pieces of the byte-level BPE that is made of the pairs' text.
        steps: of the optimiser.
        batch: pairs per step.
        lr: peak learning rate of AdamW, with linear warm-up and a cosine down to 0.
        warmup_steps: of the learning rate.
        smoothing: of the labels (0.1 in the paper).
        limit: pairs read at most.
        seed: of weights, order and dropout.
    """

    train: str
    model: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = 1024
    steps: int = 3000
    batch: int = 32
    lr: float = 3e-3
    warmup_steps: int = 100
    smoothing: float = 0.1
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse counts below one."""
        for name in ("steps", "batch", "vocabulary"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class EncoderDecoderModule(LightningModule):
    """Label-smoothed cross-entropy of the answers."""

    def __init__(self, model: T5ForConditionalGeneration, settings: EncoderDecoderSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def training_step(self, batch: Any, index: int) -> Tensor:
        """The loss of one batch, padding left out."""
        logits = self.model(**batch).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1),
            batch["labels"].flatten(),
            label_smoothing=self.settings.smoothing,
        )
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> tuple[list[Optimizer], list[dict[str, Any]]]:
        """AdamW and its schedule."""
        settings = self.settings
        optimizer = AdamW(self.model.parameters(), lr=settings.lr, betas=(0.9, 0.98))
        schedule: LambdaLR = get_cosine_schedule_with_warmup(
            optimizer, settings.warmup_steps, settings.steps
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def make_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the texts, with T5's special tokens and a chat template."""
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(
        texts, vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        unk_token=SPECIAL[2],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(settings: EncoderDecoderSettings, vocabulary: int) -> T5ForConditionalGeneration:
    """A T5 with random weights."""
    ids = {"pad_token_id": 0, "eos_token_id": END, "decoder_start_token_id": 0}
    settings_of_t5: dict[str, Any] = {**settings.model, **ids, "vocab_size": vocabulary}
    return T5ForConditionalGeneration(T5Config(**settings_of_t5))


def encoded(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerFast
) -> list[dict[str, list[int]]]:
    """Prompts as `input_ids` and answers as `labels`, as decoding has them."""
    rows = []
    for conversation in conversations:
        turn = len(conversation.messages) - 1
        answer = answer_ids(conversation, turn, tokenizer, {END})
        rows.append({"input_ids": answer.prompt, "labels": answer.said})
    return rows


def train(settings: EncoderDecoderSettings, output: Path) -> None:
    """Train, and write the model and its tokenizer to a folder that `target` may name.

    Raises:
        ValueError: no pairs.
    """
    # 1. Pairs and tokenizer.
    seed_everything(settings.seed, verbose=False)
    conversations = list(load_conversations(settings.train, settings.limit, "train"))
    if not conversations:
        raise ValueError(f"train {settings.train!r} has no pairs: name another file")
    texts = (str(turn["content"]) for each in conversations for turn in each.messages)
    tokenizer = make_tokenizer(texts, settings.vocabulary)
    model = make_model(settings, len(tokenizer))
    # 2. As many steps as asked for, over shuffled pairs.
    collate = DataCollatorForSeq2Seq(tokenizer, model=model)
    loader = DataLoader(
        encoded(conversations, tokenizer),  # type: ignore[arg-type]
        settings.batch,
        shuffle=True,
        collate_fn=collate,
    )
    fit_steps(EncoderDecoderModule(model, settings), loader, settings.steps)
    # 3. A folder like any other model's.
    model.eval().cpu().save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{model.num_parameters():,} parameters: {output}")


def command(arguments: Sequence[str]) -> int:
    """Parse the command line and train."""
    parser = config_parser("python -m train.encoder_decoder", "Train a small T5 from scratch.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_class_arguments(EncoderDecoderSettings, "settings", fail_untyped=True)
    config = parse(parser, arguments)
    settings = parser.instantiate(config).settings
    with claimed(config.output):
        train(settings, config.output)
    return 0


def main() -> None:
    """Entry point; exit status 2 after a user's mistake."""
    exit_with(command)


if __name__ == "__main__":
    main()
