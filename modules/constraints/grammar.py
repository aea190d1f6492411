"""Constraints of JSON schemas, regular expressions, grammars and lists of texts, by llguidance.

llguidance computes which tokens may follow; its states are copied for the nodes of a tree.

Shape legend: V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from modules.contracts.target import Target

_TOKENIZERS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""llguidance's view of a target's tokenizer; seconds to make."""
COMPACT = {"whitespace_flexible": False}
"""JSON without spaces between its parts, so that an answer cannot be made of them."""


class GrammarState:
    """A state of llguidance's matcher, which is only ever copied.

    Args:
        matcher: after the text. vocabulary: V. eos_ids: end tokens.
    """

    def __init__(self, matcher: Any, vocabulary: int, eos_ids: frozenset[int]) -> None:
        self._matcher, self._vocabulary, self._eos_ids = matcher, vocabulary, eos_ids

    @cached_property
    def _mask_V(self) -> Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(bits, bitorder="little", count=self._vocabulary)
        return torch.from_numpy(mask.astype(bool))

    def allowed(self) -> Tensor:
        """bool [V]: tokens that may follow."""
        return self._mask_V

    def allows(self, token: int) -> bool:
        """Whether the token may follow."""
        # The matcher's own answer leaves out end tokens, which its masks have.
        if "_mask_V" in self.__dict__ or token in self._eos_ids:
            return bool(self._mask_V[token])
        return self._matcher.validate_tokens([token]) == 1

    def advance(self, token: int) -> GrammarState | None:
        """The state after one more token; None if it may not follow."""
        matcher = self._matcher.deep_copy()
        taken = matcher.consume_token(token)
        return GrammarState(matcher, self._vocabulary, self._eos_ids) if taken else None

    def forced(self) -> list[int]:
        """Tokens of the text that must follow."""
        return list(self._matcher.compute_ff_tokens())


class Grammar:
    """Answers of a grammar, in tokens of a target.

    Args:
        grammar: as llguidance takes it; `json_schema`, `regex`, `lark` and `one_of` make it.
        target: whose tokens they are.

    Raises:
        ValueError: llguidance is not installed, or does not take the grammar; a target without end
            tokens.
    """

    def __init__(self, grammar: str, target: Target) -> None:
        self.grammar = grammar
        self._vocabulary = target.shape.vocab_size
        matcher = _library().LLMatcher(_tokenizer(target), grammar)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise ValueError(f"constraint: the grammar cannot be used: {reason}")
        self._start = GrammarState(matcher, self._vocabulary, target.eos_ids)

    def start(self) -> GrammarState:
        """The state before the answer."""
        return self._start


def json_schema(schema: str | Mapping[str, Any], target: Target) -> Grammar:
    """Answers that are JSON of a schema, without spaces between its parts.

    Raises:
        ValueError: no JSON, or a schema that llguidance does not take.
    """
    try:
        made = _library().LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT)
    except ValueError as error:
        raise ValueError(f"constraint: the JSON schema cannot be read: {error}") from None
    return Grammar(made, target)


def regex(pattern: str, target: Target) -> Grammar:
    """Answers that a regular expression matches as a whole (Rust's `regex` syntax).

    Raises:
        ValueError: a pattern that cannot be used.
    """
    return Grammar(_library().LLMatcher.grammar_from_regex(pattern), target)


def lark(rules: str, target: Target) -> Grammar:
    """Answers of a context-free grammar in Lark's syntax, whose first rule is `start`.

    Raises:
        ValueError: a grammar that cannot be used.
    """
    return Grammar(_library().LLMatcher.grammar_from_lark(rules), target)


def one_of(texts: Sequence[str], target: Target) -> Grammar:
    """Answers that are one of the texts.

    Raises:
        ValueError: no text.
    """
    if not texts:
        raise ValueError("constraint: the list has no text: give one a line")
    return lark(
        "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts), target
    )


READERS = {
    ".json": json_schema,
    ".regex": lambda text, target: regex(text.strip("\n"), target),
    ".lark": lark,
    ".txt": lambda text, target: one_of([line for line in text.splitlines() if line], target),
}
"""How a file is read, by its ending."""


def check_file(name: str) -> None:
    """ValueError for a file of no constraint, or without llguidance; before a target is loaded."""
    if Path(name).suffix not in READERS or not Path(name).is_file():
        raise ValueError(
            f"constraint {name!r} is no file of a constraint: give a JSON schema (.json), a "
            "regular expression (.regex), a grammar (.lark) or texts, one a line (.txt)"
        )
    _library()


def read_constraint(name: str, target: Target) -> Grammar:
    """The constraint of a file, by its ending.

    Raises:
        ValueError: another ending, no such file, or content that cannot be used.
    """
    check_file(name)
    try:
        return READERS[Path(name).suffix](Path(name).read_text(encoding="utf-8"), target)
    except ValueError as error:
        raise ValueError(f"constraint {name!r}: {error}") from None


def _library() -> Any:
    if importlib.util.find_spec("llguidance") is None:
        raise ValueError("constraint: run `pip install llguidance`, which computes allowed tokens")
    import llguidance

    return llguidance


def _tokenizer(target: Target) -> Any:
    if not target.eos_ids:
        raise ValueError(
            "constraint: the target has no token that ends an answer: give its tokenizer an "
            "eos_token"
        )
    if target.tokenizer not in _TOKENIZERS:
        _library()
        import llguidance.hf

        _TOKENIZERS[target.tokenizer] = llguidance.hf.from_tokenizer(
            target.tokenizer, n_vocab=target.shape.vocab_size, eos_token=sorted(target.eos_ids)
        )
    return _TOKENIZERS[target.tokenizer]
