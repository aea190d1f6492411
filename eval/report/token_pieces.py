"""Token ids as text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def pieces(tokens: Iterable[tuple[int, bool]], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The text that each token adds, as tokens come, with the token's flag (whether it was
    drafted).

    A token that ends inside a character adds nothing; the token that completes it adds the
    character. Special tokens add nothing. The pieces joined are the decoded text.
    """
    ids: list[int] = []
    shown, flag = "", False
    for token, flag in tokens:
        ids.append(token)
        text = _decode(ids, tokenizer)
        if not text.endswith(_INCOMPLETE) and len(text) > len(shown):
            yield text[len(shown) :], flag
            shown = text
    rest = _decode(ids, tokenizer)[len(shown) :]
    if rest:
        yield rest, flag


def _decode(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
