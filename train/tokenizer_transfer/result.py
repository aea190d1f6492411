"""A language model with another tokenizer, and how well it predicts text."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from modules.byte_level.vocabulary import token_bytes
from modules.runtime.files import whole_folder
from modules.tokenization.transfer.frozen_base import Base
from modules.tokenization.transfer.hypernetwork import Hypernetwork, mean_of_pieces, pieces_of

ROLES = ("eos_token", "bos_token", "pad_token")
"""Of special tokens, as the configs of models name them."""
Tables = tuple[Tensor, Tensor, Tensor | None]
"""Embedding [V,H], LM head [V,H] and perhaps biases [V] of a vocabulary."""


def original_tables(base: Base) -> Tables:
    """Those of the base model."""
    return base.embedding, base.embedding if base.head is None else base.head, None


def predicted_tables(network: Hypernetwork, base: Base, tokenizer: Any, size: int) -> Tables:
    """Embeddings of every token of a tokenizer by the hypernetwork.

    Args:
        network: trained.
        base: the model it was trained for.
        tokenizer: a fast tokenizer of base_ids bytes.
        size: rows; those without a token have the mean embedding.
    """
    ids, pieces_VL = _spelled(base, tokenizer, network.length)
    network.to(base.source_TS.device)  # Lightning leaves it on the CPU
    embeddings, rows, biases = network.all_of(base.source_TS, pieces_VL.to(base.source_TS.device))
    bias_V = None
    if biases is not None:
        bias_V = biases.new_zeros(size)
        bias_V[ids] = biases
    return (
        _placed(base, tokenizer, 0, ids, embeddings, size),
        _placed(base, tokenizer, -1, ids, rows, size),
        bias_V,
    )


def mean_tables(base: Base, tokenizer: Any, size: int, length: int = 16) -> Tables:
    """Embeddings without training: the mean of a token's base pieces."""
    ids, pieces_VL = _spelled(base, tokenizer, length)
    pieces_VL = pieces_VL.to(base.source_TS.device)
    tables = [mean_of_pieces(table.float(), pieces_VL) for table in base.tables]
    return (
        _placed(base, tokenizer, 0, ids, tables[0], size),
        _placed(base, tokenizer, -1, ids, tables[-1], size),
        None,
    )


def _spelled(base: Base, tokenizer: Any, length: int) -> tuple[Tensor, Tensor]:
    spelled = {i: data for i, data in sorted(token_bytes(tokenizer).items()) if data}
    ids = torch.tensor(list(spelled))
    return ids, pieces_of(spelled.values(), base.target.tokenizer, length)


def _placed(base: Base, tokenizer: Any, which: int, ids: Tensor, rows: Tensor, size: int) -> Tensor:
    """A table of `size` rows. Special tokens of one name keep the base model's embedding. So does
    the token that begins texts, and the one that ends them, under another name; an end token
    that has the name of another special token of the base is its end token, if that has no
    namesake. Other ids without bytes have the mean.
    """
    table = base.tables[which].float()
    placed = table.mean(0).expand(size, -1).clone()
    placed[ids] = rows.float()
    for i, base_id in _origins(base.target.tokenizer, tokenizer, set(ids.tolist())).items():
        placed[i] = table[base_id]
    return placed


def _origins(old: Any, new: Any, spelled: set[int]) -> dict[int, int]:
    """The base's special token for special tokens of the new tokenizer.

    Args:
        old: the base's tokenizer.
        new: the new one.
        spelled: ids of the new one that have bytes.
    """
    names = old.get_vocab()
    named = [(name, i) for name, i in new.get_vocab().items() if i not in spelled]
    origins = {i: names[name] for name, i in named if name in names}
    end, base_end = new.eos_token_id, old.eos_token_id
    if end is not None and base_end is not None and base_end not in origins.values():
        origins[end] = base_end
    for i, base_id in ((end, base_end), (new.bos_token_id, old.bos_token_id)):
        if i is not None and base_id is not None:
            origins.setdefault(i, base_id)
    return origins


@torch.no_grad()
def bits_per_byte(
    base: Base, tables: Tables, tokenizer: Any, texts: Sequence[str], length: int
) -> tuple[float, float]:
    """Of texts in a tokenizer, in rows of at most `length` tokens (their first token is not
    counted, nor its bytes); also tokens per byte.
    """
    embedding_VH, head_VH, bias_V = tables
    spelled = token_bytes(tokenizer)
    nats = count = size = 0.0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        for start in range(0, len(ids), length):
            row = ids[start : start + length]
            if len(row) < 2:
                continue
            ids_BT = torch.tensor([row], device=embedding_VH.device)
            nats += float(base.losses(ids_BT, embedding_VH, head_VH, bias_V).sum())
            size += sum(len(spelled.get(token, b"")) for token in row[1:])
            count += len(row) - 1
    return nats / math.log(2) / max(1.0, size), count / max(1.0, size)


def save_model(base: Base, tables: Tables, tokenizer: Any, folder: Path) -> Path:
    """A plain Hugging Face folder of the base model with the new tokenizer and embeddings; an
    ordinary small model of that tokenizer (`independent`).

    Raises:
        ValueError: biases of tokens, for which the stock model has no room.
    """
    embedding_VH, head_VH, bias_V = tables
    if bias_V is not None:
        raise ValueError("a stock model has no biases of tokens: train with bias: false")
    model = copy.deepcopy(base.model)
    model.resize_token_embeddings(len(embedding_VH), mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(embedding_VH)
    if base.head is not None:
        model.get_output_embeddings().weight.data.copy_(head_VH)
    ids = {f"{role}_id": getattr(tokenizer, f"{role}_id") for role in ROLES}
    for name, i in ids.items():
        setattr(model.config, name, i)
    model.generation_config = GenerationConfig(**ids)
    with whole_folder(folder) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    return folder
