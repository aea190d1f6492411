"""Conversations from files or the Hub, and their tokens with a loss mask on what the assistant says.

Shape legend: T tokens of a document.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
EMBEDDED_ANSWERS = Path(__file__).parent / "prompts" / "answers.jsonl.gz"
SHAPES = "`messages`, `conversations` (from/value), `prompt` + `response`, or `question` + `answer`"
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
          "model": "assistant", "bot": "assistant"}
Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """Messages of `{role, content}`.

    response_ids: the exact tokens of the last assistant message, end-of-turn token included if it was emitted.
    finished: whether the last answer ended by itself; if not, nothing teaches the model to stop there.
    """

    messages: list[Message]
    response_ids: list[int] | None = None
    finished: bool = True


@dataclass(frozen=True)
class Tokens:
    """A tokenised document: ids int64 [T] and loss mask bool [T], true on the assistant's tokens."""

    input_ids: Tensor
    loss_mask: Tensor

    def __len__(self) -> int:
        """T."""
        return self.input_ids.shape[0]

    @property
    def response_tokens(self) -> int:
        """How many tokens are trained on."""
        return int(self.loss_mask.sum())

    @property
    def prompt(self) -> list[int]:
        """The ids before the assistant's first token."""
        return self.input_ids[:int(self.loss_mask.int().argmax())].tolist()

    @cached_property
    def key(self) -> str:
        """Hash of the token ids: what cached states are found by."""
        return hash_ids(self.input_ids)


def hash_ids(ids: Tensor | Sequence[int]) -> str:
    """128 bits of the SHA-256 of token ids, in hexadecimal."""
    return hashlib.sha256(torch.as_tensor(ids, dtype=torch.int64).numpy().tobytes()).hexdigest()[:32]


class Skipped(ValueError):
    """A conversation that cannot be trained on; the message is the reason it is counted under."""


# -- reading ----------------------------------------------------------------------------------------------------


def load_conversations(source: str, limit: int | None = None, split: str = "train", streaming: bool = False
                       ) -> Iterator[Conversation]:
    """Read conversations, one after the other as they are asked for.

    Args:
        source: a `.jsonl`, `.jsonl.gz` or `.parquet` file, a Hub data set (`owner/name`, `owner/name:config`), or
            `embedded` (the answers shipped with this package).
        limit: read at most this many.
        split: split of a Hub data set.
        streaming: whether a Hub data set is downloaded no further than it is read; with a limit it always is so.

    Raises:
        ValueError: no such file or data set, a row of an unknown shape, or nothing in it.
    """
    number = 0
    for number, row in enumerate(islice(read_rows(source, split, streaming or limit is not None), limit), 1):
        yield _conversation(row, f"{source!r} row {number}")
    if not number:
        raise ValueError(f"data set {source!r} is empty: give one with at least one conversation")


def local_file(source: str) -> Path | None:
    """The file that `source` names; None for a Hub data set. ValueError: it does not exist or is of an unknown kind."""
    path = EMBEDDED_ANSWERS if source == EMBEDDED else Path(source)
    if path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        if not path.is_file():
            raise ValueError(f"data file {str(path)!r} does not exist: check the path")
        return path
    if path.is_file():
        raise ValueError(f"data file {source!r} is of an unknown kind: use .jsonl, .jsonl.gz or .parquet")
    return None


def read_rows(source: str, split: str = "train", streaming: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of a file or of a Hub data set, see `load_conversations`."""
    path = local_file(source)
    if path is None:
        return _hub_rows(source, split, streaming)
    return _parquet_rows(path) if path.suffix == ".parquet" else read_jsonl(path)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a `.jsonl` or `.jsonl.gz` file; a line that is not a JSON object raises ValueError with its number."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parsed(line, path, number)


def _parsed(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} line {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{str(path)!r} line {number} is not a JSON object: one object per line is expected")
    return row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _hub_rows(source: str, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"data set {source!r} (split {split!r}) is neither a file nor loadable: {reason}") from error
    return (dict(row) for row in loaded)


def _conversation(row: dict[str, Any], where: str) -> Conversation:
    if isinstance(turns := row.get("messages"), list):
        messages = [read_message(turn, "role", "content", where) for turn in turns]
    elif isinstance(turns := row.get("conversations"), list):
        messages = [read_message(turn, "from", "value", where) for turn in turns]
    else:
        messages = _pair(row, where)
    ids = row.get("response_ids")
    return Conversation(messages, list(ids) if ids else None, bool(row.get("finished", True)))


def read_message(turn: Any, role: str, content: str, where: str) -> Message:
    """A turn with its role named as chat templates name it; `role` and `content` are its keys, `where` the row."""
    if not isinstance(turn, dict) or not isinstance(turn.get(role), str) or not isinstance(turn.get(content), str):
        raise ValueError(f"{where}: a turn must hold text under `{role}` and `{content}`, got {str(turn)[:80]}")
    speaker: str = turn[role]
    return {"role": _ROLES.get(speaker, speaker), "content": turn[content]}


def _pair(row: dict[str, Any], where: str) -> list[Message]:
    for asked, answered in (("prompt", "response"), ("question", "answer")):
        if isinstance(row.get(asked), str) and isinstance(row.get(answered), str):
            return [{"role": "user", "content": row[asked]}, {"role": "assistant", "content": row[answered]}]
    raise ValueError(f"{where} has keys {', '.join(row) or '(none)'}: expected {SHAPES}")


# -- tokens -----------------------------------------------------------------------------------------------------


def prompt_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Token ids of a chat up to where the assistant is to speak."""
    return _encode(render(messages, tokenizer, generate=True), tokenizer)


def tokenize(conversation: Conversation, tokenizer: Any, max_length: int,
             end_ids: Collection[int] | None = None) -> Tokens:
    """Apply the target's chat template; the mask covers the assistant's tokens and the end-of-turn tokens it emits.

    Each turn is tokenised behind the previous ones as in decoding, so the prompt's tokens are exactly `prompt_ids`.
    A document longer than `max_length` loses its end. Turns behind a template that rewrites earlier ones are left out.

    Args:
        end_ids: tokens that end an answer (default: the tokenizer's EOS).

    Raises:
        Skipped: no assistant turn, a prompt that fills `max_length`, or a template that refuses the messages.
    """
    messages = conversation.messages
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise Skipped("no assistant turn")
    ends = frozenset(end_ids or {tokenizer.eos_token_id})
    ids: list[int] = []
    mask: list[bool] = []
    text = ""
    for turn in answers:
        prompt = render(messages[:turn], tokenizer, generate=True)
        through = render(messages[:turn + 1], tokenizer)
        if not prompt.startswith(text) or not through.startswith(prompt):
            break
        asked = _encode(prompt[len(text):], tokenizer)
        said, glue = _split_answer(_encode(through[len(prompt):], tokenizer), ends, tokenizer)
        if turn == len(messages) - 1:
            said, glue = _exact_answer(said, conversation, ends, tokenizer), []
        ids += asked + said + glue
        mask += [False] * len(asked) + [True] * len(said) + [False] * len(glue)
        text = through
        if len(ids) >= max_length:
            break
    return _document(ids, mask, max_length)


def _document(ids: list[int], mask: list[bool], max_length: int) -> Tokens:
    if not any(mask):
        raise Skipped("empty answers, or a chat template that rewrites earlier turns")
    last = max(i for i, masked in enumerate(mask) if masked) + 1
    if not any(mask[:max_length]):
        raise Skipped(f"prompt longer than the context ({max_length} tokens)")
    end = min(last, max_length)
    return Tokens(torch.tensor(ids[:end]), torch.tensor(mask[:end]))


def render(messages: Sequence[Message], tokenizer: Any, generate: bool = False) -> str:
    """A chat as the tokenizer's template writes it; `generate` opens the assistant's turn behind it.

    Raises ValueError for a tokenizer without a template, `Skipped` for messages that it refuses.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no chat template: use an instruction-tuned target")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
    except TemplateError as error:
        raise Skipped(f"refused by the chat template ({error})") from error


def _encode(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _split_answer(ids: list[int], ends: Collection[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """The answer through its end-of-turn token, and the template's glue behind it."""
    for stops in (ends, tokenizer.all_special_ids):
        for i, token in enumerate(ids):
            if token in stops:
                return ids[:i + 1], ids[i + 1:]
    return ids, []


def _exact_answer(said: list[int], conversation: Conversation, ends: Collection[int], tokenizer: Any) -> list[int]:
    """The last answer as it was generated: its recorded ids when they are this tokenizer's, no EOS if it was cut."""
    exact = conversation.response_ids
    content = conversation.messages[-1]["content"].strip()
    if exact and max(exact) < len(tokenizer) and _decode(exact, tokenizer).strip() == content:
        return exact
    cut = not conversation.finished and said and (said[-1] in ends or said[-1] in tokenizer.all_special_ids)
    return said[:-1] if cut else said


def _decode(ids: Iterable[int], tokenizer: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def tokenize_all(conversations: Iterable[Conversation], tokenizer: Any, max_length: int,
                 max_response_tokens: int | None = None, end_ids: Collection[int] | None = None) -> list[Tokens]:
    """Documents of all usable conversations in order, up to a budget of response tokens.

    Skips are counted by reason and logged. A document seen before (the same tokens) is kept once.

    Raises:
        ValueError: nothing is left.
    """
    documents: dict[str, Tokens] = {}
    skips: Counter[str] = Counter()
    spent = 0
    for conversation in conversations:
        if max_response_tokens is not None and spent >= max_response_tokens:
            break
        try:
            document = tokenize(conversation, tokenizer, max_length, end_ids)
        except Skipped as reason:
            skips[str(reason)] += 1
            continue
        if document.key in documents:
            skips["seen before"] += 1
            continue
        documents[document.key] = document
        spent += document.response_tokens
    for reason, count in skips.items():
        logger.warning("skipped %d conversation%s: %s", count, "s" * (count != 1), reason)
    if not documents:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in skips.items()) or "it is empty"
        raise ValueError(f"no conversation of the data set can be trained on: {reasons}")
    return list(documents.values())
