"""One answer of a chat as tokens: the prompt exactly as decoding sends it, and what is said behind
it.

Text is encoded whole and split where the prompt's ids end. Encoding the pieces one by one is wrong
for tokenizers that put a space before every text they are given (SentencePiece's dummy prefix).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from data.reading.files import Skipped
from data.reading.rows import Conversation
from modules.target.tokenizers.chat_template import arguments_of

Turn = Mapping[str, Any]
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""What servers and templates call the reasoning of a turn; most templates read the first."""
_OPENING_TAG = re.compile(r"\s*(<[^<>\s]+>)\s*")
_OPENED_TAG = re.compile(r"<(\w*(?:think|thought|reason)\w*)>\s*$")
_ANCHORS = ("\n", "x", "")
"""Behind these a text is encoded as inside of one, where its beginning merges with the prompt's
end.
"""


@dataclass(frozen=True)
class Answer:
    """An answer as tokens.

    prompt: `prompt_ids` of the turns before it. said: the assistant's tokens behind it, the
    end-of-turn token included where there is one.
    """

    prompt: list[int]
    said: list[int]


def prompt_ids(
    messages: Sequence[Turn], tokenizer: Any, tools: Sequence[Any] | None = None
) -> list[int]:
    """Token ids of a chat up to where the assistant is to speak."""
    return encode(render(messages, tokenizer, generate=True, tools=tools), tokenizer)


def encode(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text that holds its special tokens already."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_behind(asked: str, text: str, tokenizer: Any) -> list[int]:
    """Token ids of `text` where the ids of `asked` stand before it."""
    before = _before(asked, text, tokenizer)
    return encode(before + text, tokenizer)[len(encode(before, tokenizer)) :]


def _before(asked: str, text: str, tokenizer: Any) -> str:
    """What to encode `text` behind: `asked`, or the first anchor, if its ids are the same with
    `text` and without.
    """
    for before in (asked, *_ANCHORS):
        ids = encode(before, tokenizer)
        if encode(before + text, tokenizer)[: len(ids)] == ids:
            return before
    raise AssertionError("no text merges with the empty one")


# -- templates -------------------------------------------------------------------------------------


def render(
    messages: Sequence[Turn],
    tokenizer: Any,
    generate: bool = False,
    tools: Sequence[Any] | None = None,
) -> str:
    """A chat as the tokenizer's template writes it; `generate` opens the assistant's turn behind
    it.

    Turns reach the template whole, with their tool calls and reasoning.

    Raises:
        ValueError: a tokenizer without a template.
        Skipped: no messages, or some that the template refuses.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template: use an instruction-tuned "
            "target"
        )
    if not messages:
        raise Skipped("nothing stands before the answer")
    turns = [_for_template(turn, str(tokenizer.chat_template)) for turn in messages]
    try:
        return tokenizer.apply_chat_template(
            turns,
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=generate,
            **arguments_of(tokenizer),
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise Skipped(f"refused by the chat template ({error})") from error


def _for_template(turn: Turn, template: str) -> dict[str, Any]:
    """A turn as templates expect it: text for absent content, arguments of calls as objects."""
    made = {**turn, "content": "" if turn.get("content") is None else turn["content"]}
    if made.get("tool_calls"):
        made["tool_calls"] = [_parsed_call(call) for call in made["tool_calls"]]
    given = next((key for key in _REASONING if made.get(key)), _REASONING[0])
    if given != _REASONING[0] and _REASONING[0] in template:
        made[_REASONING[0]] = made.pop(given)
    return made


def _parsed_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return (
        {**call, "function": {**function, "arguments": arguments}}
        if isinstance(arguments, dict)
        else call
    )


# -- answers ---------------------------------------------------------------------------------------


def answer_ids(
    conversation: Conversation, turn: int, tokenizer: Any, ends: Collection[int]
) -> Answer:
    """Turn number `turn` of a conversation, which is the assistant's, as tokens.

    The last answer's recorded ids are taken as they are. Any other answer is what the template
    writes; where it does not write the prompt's own beginning again (templates that open `<think>`
    in the prompt alone), or leaves out a part of the answer, the answer's text (behind its
    reasoning, if that is what the prompt opens) and the template's end of turn.

    Args:
        ends: tokens that end an answer.

    Raises:
        Skipped: nothing before the answer, no answer, or a template that refuses the turns or
            leaves out tool calls, tools or this answer's reasoning.
    """
    messages, tools = conversation.messages[:turn], conversation.tools
    asked = render(messages, tokenizer, generate=True, tools=tools)
    _refuse_left_out(messages, tools, asked, tokenizer, generate=True)
    prompt, last = encode(asked, tokenizer), turn == len(conversation.messages) - 1
    if last and (exact := _recorded(conversation, tokenizer)):
        return Answer(prompt, exact)
    text, end = _written(conversation, turn, asked, tokenizer, ends)
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    said = _through_end(encode_behind(asked, text, tokenizer) + end, ends, special)
    if last and not conversation.finished and said and (said[-1] in ends or said[-1] in special):
        said = said[:-1]
    if all(token in ends or token in special for token in said) and not conversation.messages[
        turn
    ].get("tool_calls"):
        raise Skipped("empty answer")
    return Answer(prompt, said)


def _written(
    conversation: Conversation, turn: int, asked: str, tokenizer: Any, ends: Collection[int]
) -> tuple[str, list[int]]:
    """The text behind the prompt, and the end-of-turn token that it lacks."""
    messages, answer = conversation.messages[: turn + 1], conversation.messages[turn]
    through, content = (
        render(messages, tokenizer, tools=conversation.tools),
        answer.get("content") or "",
    )
    thought = next((answer[key] for key in _REASONING if answer.get(key)), "")
    opened = _OPENED_TAG.search(asked)
    text = _unopened(content, asked)
    if opened and thought and not answer.get("tool_calls"):
        text = f"{thought.rstrip()}\n</{opened[1]}>\n\n{content.lstrip()}"
    else:
        _refuse_left_out(messages, conversation.tools, through, tokenizer)
    if through.startswith(asked) and text.strip() in through[len(asked) :]:
        return through[len(asked) :], []
    if answer.get("tool_calls") or (thought and not opened):
        raise Skipped(
            "the chat template writes reasoning or tool calls otherwise than its prompt asks for "
            "them"
        )
    ids = encode(through, tokenizer)
    ending = [token for token in ids if token in ends] or [
        token
        for token in ids
        if token in tokenizer.all_special_ids and token != tokenizer.unk_token_id
    ]
    return text.rstrip(), ending[-1:]


def _unopened(content: str, asked: str) -> str:
    """An answer's text without the tag at its beginning that the prompt has opened already."""
    tag = _OPENING_TAG.match(content)
    return content[tag.end() :] if tag and asked.rstrip().endswith(tag[1]) else content


def _refuse_left_out(
    messages: Sequence[Turn],
    tools: Sequence[Any] | None,
    text: str,
    tokenizer: Any,
    generate: bool = False,
) -> None:
    """`Skipped` when a template writes the same text without the tools, the calls, or the last
    answer's reasoning.
    """

    def same(changed: Sequence[Turn], known: Sequence[Any] | None) -> bool:
        try:
            return render(changed, tokenizer, generate, known) == text
        except Skipped:
            return False

    if tools and (same(messages, None) or not all(name in text for name in _names(tools))):
        raise Skipped("the chat template leaves out `tools`")
    calls = [call for turn in messages for call in turn.get("tool_calls") or ()]
    if calls and (
        same([_without(turn, "tool_calls") for turn in messages], tools)
        or not all(name in text for name in _names(calls))
    ):
        raise Skipped("the chat template leaves out `tool_calls`")
    key = next((key for key in _REASONING if messages[-1].get(key)), None)
    if key and not generate and same([*messages[:-1], _without(messages[-1], *_REASONING)], tools):
        raise Skipped(f"the chat template leaves out `{key}`")


def _without(turn: Turn, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in turn.items() if key not in keys}


def _names(functions: Sequence[Any]) -> list[str]:
    """The names of functions in OpenAI's form, or given bare."""
    bare = [one.get("function", one) for one in functions if isinstance(one, Mapping)]
    return [str(one["name"]) for one in bare if isinstance(one, Mapping) and "name" in one]


def _through_end(ids: list[int], ends: Collection[int], special: Collection[int]) -> list[int]:
    """The answer through its end-of-turn token, without the template's glue behind it."""
    for stops in (ends, special):
        for i, token in enumerate(ids):
            if token in stops:
                return ids[: i + 1]
    return ids


def _recorded(conversation: Conversation, tokenizer: Any) -> list[int] | None:
    """The ids of the last answer as it was generated, when they are this tokenizer's."""
    exact, content = conversation.response_ids, conversation.messages[-1].get("content")
    if not exact or not isinstance(content, str) or max(exact) >= len(tokenizer):
        return None
    said = tokenizer.decode(
        list(exact), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return exact if said.strip() == content.strip() else None


def answer_spans(
    messages: Sequence[Turn], tokenizer: Any
) -> tuple[list[int], list[tuple[int, int]]]:
    """The last turn, which is the assistant's, as token ids behind its prompt, up to the end of its
    content.

    Returns:
        The ids, and which characters [start, end) of the content each stands for (below 0: what the
        template writes before it).
    """
    asked = render(messages[:-1], tokenizer, generate=True)
    content, whole = messages[-1]["content"], Conversation([dict(turn) for turn in messages])
    text, _ = _written(whole, len(messages) - 1, asked, tokenizer, ())
    said = _unopened(content, asked).strip()
    before = _before(asked, text, tokenizer)
    first, shift = (
        len(encode(before, tokenizer)),
        len(before) + text.index(said) - content.index(said),
    )
    encoded = tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [(start - shift, end - shift) for start, end in encoded["offset_mapping"][first:]]
    count = sum(start < content.index(said) + len(said) for start, _ in spans)
    return encoded["input_ids"][first : first + count], spans[:count]
