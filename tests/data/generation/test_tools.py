"""Chats with tools are answered again with their calls, and servers give tokens and calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import decoders

from data.conversations import tokenize
from data.endpoint import regenerate_by
from data.generation.answering import placed
from data.reading.files import Tally
from data.reading.rows import load_conversations
from data.regenerate import Generation, regenerate
from tests.data.test_endpoint import PROMPTS, Handler, Server, endpoint, server
from tests.data.test_regenerate import scripted, turns
from tests.fakes import tiny_target

__all__ = ["server"]

CALLING = (
    "{% if tools %}{{ '<|system|>' ~ tools[0].function.name ~ '<|end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|' + (m.role if m.role != 'tool' else 'user') + '|>' }}"
    "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if short %}ok {% endif %}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {}}}


def test_tool_calls_with_results_are_kept_and_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt has the tools and the row's own template arguments."""
    target = tiny_target()
    target.tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    target.tokenizer.chat_template = CALLING
    asked = scripted(monkeypatch, target, ["one", "two"])
    called = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm"}
    told = {"role": "tool", "content": "sunny"}
    row = {
        "messages": [*turns("a"), called, told, *turns("", "old", "c", "old")[1:]],
        "tools": [CALL["function"]],
        "chat_template_kwargs": {"short": True},
    }
    output = regenerate(target, placed([row]), tmp_path / "a.jsonl", Generation(9), progress=False)
    first = (
        "<|system|>weather<|end|><|user|>a<|end|><|assistant|>weather<|end|><|user|>sunny<|end|>"
        "<|assistant|>"
    )
    second = f"{first}one<|end|><|user|>c<|end|><|assistant|>ok "
    assert asked == [f"{first}ok ", second]
    (conversation,) = load_conversations(str(output))
    kept = {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0}
    assert conversation.messages[1:3] == [kept, told]
    documents = tokenize(conversation, target.tokenizer, 400).documents
    said = [
        target.tokenizer.decode(document.input_ids[document.loss_mask]) for document in documents
    ]
    assert said == ["one<|end|>", "two<|end|>"]
    assert [target.tokenizer.decode(document.prompt) for document in documents] == asked


def test_a_chat_ends_at_an_answer_that_calls_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny_target()
    target.tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    target.tokenizer.chat_template = CALLING
    asked = scripted(monkeypatch, target, ["so weather"])
    row = {"messages": turns("a", "old", "b", "old"), "tools": [CALL["function"]]}
    tally = Tally("prompt")
    output = regenerate(
        target, placed([row]), tmp_path / "a.jsonl", Generation(9), progress=False, tally=tally
    )
    (conversation,) = load_conversations(str(output))
    assert len(asked) == 1 and len(conversation.messages) == 2
    assert list(tally.changed) == ["ended before its last question"]


def test_tokens_calls_and_tools_go_both_ways(server: Server, tmp_path: Path) -> None:
    """The server's tokens are kept, also those of a call, which ends the chat."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    told = {"role": "tool", "content": "sunny", "tool_call_id": "c"}
    asked = [{"role": "user", "content": text} for text in "ab"]
    chat = [asked[0], called, told, {"role": "assistant", "content": "old"}, *asked[1:]]
    rows = placed([{"messages": chat, "tools": [tool], "chat_template_kwargs": {"thinking": True}}])
    ids = {"prompt_token_ids": [1, 2, 3]}
    for count, message, tokens in ((1, {"content": "warm"}, [4, 0]), (2, called, [5, 0])):
        choice = {"message": message, "finish_reason": "tool_calls", "token_ids": tokens}
        server.raw[count] = json.dumps({"choices": [choice], **ids}).encode()
    template = {"thinking": False, "style": "short"}
    output = regenerate_by(
        endpoint(server, chat_template=template), rows, tmp_path / "a.jsonl", Generation(9)
    )
    assert [body["messages"] for body in server.asked] == [
        [asked[0], called, told],
        [asked[0], called, told, {"role": "assistant", "content": "warm"}, asked[1]],
    ]
    for body in server.asked:
        assert body["tools"] == [tool] and body["return_token_ids"] is True
        assert body["chat_template_kwargs"] == {"thinking": True, "style": "short"}
    (conversation,) = load_conversations(str(output))
    assert conversation.response_ids == [5, 0] and conversation.prompt_ids == [1, 2, 3]
    assert conversation.messages[3]["response_ids"] == [4, 0] and conversation.finished
    assert conversation.messages[-1] == called and conversation.messages[1]["weight"] == 0
    assert conversation.tools == [tool] and conversation.template == {"thinking": True}
    server.unknown = ("return_token_ids",)
    with pytest.raises(ValueError, match="return_token_ids: set endpoint.token_ids to false"):
        regenerate_by(endpoint(server), PROMPTS, tmp_path / "b.jsonl")
    regenerate_by(endpoint(server, token_ids=False), PROMPTS, tmp_path / "b.jsonl")
    assert "return_token_ids" not in server.asked[-1]


def test_no_key_is_sent_where_there_is_none(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    post = Handler.do_POST

    def noted(self: Any) -> None:
        seen.append(self.headers["Authorization"])
        post(self)

    monkeypatch.setattr(Handler, "do_POST", noted)
    for key, name in (("", "a"), ("sk-good-key-12345", "b")):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        regenerate_by(endpoint(server), PROMPTS[:1], tmp_path / f"{name}.jsonl")
    assert seen == [None, "Bearer sk-good-key-12345"]
