"""Tokenizers and a tiny model of one of them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = ["The cat sat on the mat. ", "Ünïcode and the caterpillar, 123 times!"] * 8
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<end>{% endfor %}"


def bpe(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with an end of text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    made.chat_template = TEMPLATE
    return made


BASE = bpe(TEXTS, 290)


def model_folder(folder: Path, steps: int) -> Path:
    """A tiny model after so many steps on its text, with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=290,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    rows = [BASE(text, return_tensors="pt").input_ids for text in TEXTS[:2]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = torch.stack([model(input_ids=ids, labels=ids).loss for ids in rows]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    BASE.save_pretrained(folder)
    return folder
