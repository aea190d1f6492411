"""Reading every shape, and masks that hold what the assistant said and nothing else."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import decoders

from data.conversations import Skipped, Tokens, prompt_ids, tokenize, tokenize_all
from data.datamodule import ConversationData
from data.reading.files import Place
from data.reading.rows import Conversation, load_conversations
from tests.fakes import tiny_target, tiny_tokenizer

END, USER, ASSISTANT = 0, 1, 2
PAIR = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture()
def tokenizer() -> Any:
    """One token per character; decoding gives the text back exactly."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


def said(tokens: Tokens, tokenizer: Any) -> str:
    """The masked tokens as text."""
    return tokenizer.decode(tokens.input_ids[tokens.loss_mask])


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def test_a_hub_data_set_is_loaded_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(name: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        return datasets.Dataset.from_list([{"question": "hi", "answer": "yes"}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(list(load_conversations("someone/chats:main", limit=2, split="test"))) == 2
    assert asked == [("someone/chats", "main", "test", True)]


def test_a_hub_data_set_is_streamed_no_further_than_the_budget_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    read: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for number in range(1000):
            read.append(number)
            yield {"question": f"say {number}", "answer": "yes " * 10}

    asked: list[bool] = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, split, streaming: asked.append(streaming) or rows()
    )
    data = ConversationData("someone/chats", max_length=64, max_response_tokens=100)
    data.read(tiny_target())
    assert (
        asked == [True]
        and 2 <= len(read) < 20
        and 100
        <= data.response_tokens + sum(document.response_tokens for document in data.held_out)
        < 150
    )
    del read[:]
    data = ConversationData("someone/chats", max_length=64)
    data.read(tiny_target())
    assert asked == [True, False] and len(read) == 1000


def test_an_unreachable_hub_data_set_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"'someone/chats' .*no route$"):
        next(load_conversations("someone/chats"))


def test_the_mask_decodes_to_what_the_assistant_said(tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "be kind"},
        *PAIR,
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "so, and so"},
    ]
    (tokens,) = tokenize(Conversation(turns), tokenizer, 100).documents
    assert said(tokens, tokenizer) == "yes<|end|>so, and so<|end|>"
    assert tokenizer.decode(tokens.input_ids) == tokenizer.apply_chat_template(
        turns, tokenize=False
    )
    assert tokens.prompt == prompt_ids(turns[:2], tokenizer)
    assert tokens.prompt[-1] == ASSISTANT


def test_glue_behind_the_end_of_turn_is_not_masked(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|end|>'", "'<|end|>\n'")
    (tokens,) = tokenize(Conversation([*PAIR, *PAIR]), tokenizer, 100).documents
    assert said(tokens, tokenizer) == "yes<|end|>yes<|end|>"
    assert int(tokens.input_ids[-1]) == END


def test_exact_ids_win_when_they_are_this_tokenizers(tokenizer: Any) -> None:
    exact = [*tokenizer("yes", add_special_tokens=False)["input_ids"], END]
    foreign = [token + 1 for token in exact]
    unfinished = exact[:-1]
    for ids, finished, expected in (
        (exact, True, exact),
        (foreign, True, exact),
        (unfinished, False, unfinished),
        (None, False, unfinished),
    ):
        (tokens,) = tokenize(Conversation(PAIR, ids, finished), tokenizer, 100).documents
        assert tokens.input_ids[tokens.loss_mask].tolist() == expected


def test_truncation_cuts_the_end(tokenizer: Any) -> None:
    (whole,) = tokenize(Conversation(PAIR), tokenizer, 100).documents
    (cut,) = tokenize(Conversation(PAIR), tokenizer, len(whole) - 2).documents
    assert cut.input_ids.tolist() == whole.input_ids[:-2].tolist()
    assert said(cut, tokenizer) == "ye"


def test_skips_are_counted_and_logged(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    silent = Conversation(PAIR[:1], place=Place("a.jsonl", "line", 7))
    long = Conversation([{"role": "user", "content": "x" * 50}, PAIR[1]])
    with caplog.at_level(logging.WARNING):
        kept = tokenize_all(
            [silent, Conversation(PAIR), long, silent, Conversation(PAIR)], tokenizer, 20
        )
    assert len(kept) == 1
    assert caplog.messages == [
        "skipped 2 conversations: no assistant turn (first: 'a.jsonl' line 7)",
        "skipped 1 conversation: prompt longer than the context (20 tokens)",
        "skipped 1 conversation: seen before",
    ]


def test_nothing_left_is_one_line(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="1 × no assistant turn"):
        tokenize_all([Conversation(PAIR[:1])], tokenizer, 20)
    with pytest.raises(ValueError, match="it is empty"):
        tokenize_all([], tokenizer, 20)


def test_a_template_that_refuses_is_a_skip_and_none_is_an_error(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(Skipped, match="refused by the chat template"):
        tokenize(Conversation(PAIR), tokenizer, 20)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        tokenize(Conversation(PAIR), tokenizer, 20)


def test_the_budget_stops_in_order(tokenizer: Any) -> None:
    answers = [
        Conversation([PAIR[0], {"role": "assistant", "content": letter * 3}]) for letter in "abcdef"
    ]
    kept = tokenize_all(answers, tokenizer, 50, max_response_tokens=9)
    assert [said(tokens, tokenizer) for tokens in kept] == [
        "aaa<|end|>",
        "bbb<|end|>",
        "ccc<|end|>",
    ]
