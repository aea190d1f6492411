"""One answer of a chat as tokens: the prompt exactly as in decoding, and the answer's tokens.

Text is encoded as a whole and split at the end of the prompt's ids. Encoding the parts separately
is wrong for tokenizers that add a space before every text (SentencePiece's dummy prefix).
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
"""Keys of a turn's reasoning in servers and templates; most templates read the first."""
_OPENING_TAG = re.compile(r"\s*(<[^<>\s]+>)\s*")
_OPENED_TAG = re.compile(r"<(\w*(?:think|thought|reason)\w*)>\s*$")
_ANCHORS = ("\n", "x", "")
"""Prefixes that stand in for a prompt whose end would merge with the beginning of the text."""


@dataclass(frozen=True)
class Answer:
    """An answer as tokens.

    prompt: `prompt_ids` of the turns before it. said: the assistant's tokens after the prompt,
    including the end-of-turn token if there is one.
    """

    prompt: list[int]
    said: list[int]


def prompt_ids(
    messages: Sequence[Turn], tokenizer: Any, tools: Sequence[Any] | None = None
) -> list[int]:
    """Token ids of a chat up to the start of the assistant's answer."""
    return encode(render(messages, tokenizer, generate=True, tools=tools), tokenizer)


def encode(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text that already contains its special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_after(prompt: str, text: str, tokenizer: Any) -> list[int]:
    """Token ids of `text` as encoded after `prompt`."""
    before = _before(prompt, text, tokenizer)
    return encode(before + text, tokenizer)[len(encode(before, tokenizer)) :]


def _before(prompt: str, text: str, tokenizer: Any) -> str:
    """The prefix to encode `text` after: `prompt`, or else the first anchor, whose ids do not
    change when `text` follows.
    """
    for before in (prompt, *_ANCHORS):
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
    """A chat as rendered by the tokenizer's template; `generate` opens the assistant's next turn.

    Turns are passed to the template with their tool calls and reasoning.

    Raises:
        ValueError: a tokenizer without a template.
        Skipped: no messages, or messages that the template refuses.
    """
    # Errors of the tokenizer end the run, errors of a template skip the row.
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template: use an instruction-tuned "
            "target"
        )
    if not messages:
        raise Skipped("there is nothing before the answer")
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
    """A turn as templates expect it: an empty text for missing content, arguments as objects."""
    made = {**turn, "content": "" if turn.get("content") is None else turn["content"]}
    if made.get("tool_calls"):
        made["tool_calls"] = [_parsed_call(call) for call in made["tool_calls"]]
    # Reasoning goes under the key that the template reads.
    source = next((key for key in _REASONING if made.get(key)), _REASONING[0])
    if source != _REASONING[0] and _REASONING[0] in template:
        made[_REASONING[0]] = made.pop(source)
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

    Recorded ids of the last answer are used unchanged. Any other answer is rendered by the
    template. Where the rendered chat does not begin with the prompt (templates that open `<think>`
    only in the prompt) or lacks a part of the answer, the tokens are those of the answer's text
    (after its reasoning, if the prompt opens it) and of the template's end of turn.

    Args:
        ends: tokens that end an answer.

    Raises:
        Skipped: nothing before the answer, no answer, or a template that refuses the turns or
            leaves out tool calls, tools or this answer's reasoning.
    """
    messages, tools = conversation.messages[:turn], conversation.tools
    # 1. The prompt, exactly as in decoding.
    prompt_text = render(messages, tokenizer, generate=True, tools=tools)
    _refuse_left_out(messages, tools, prompt_text, tokenizer, generate=True)
    prompt, last = encode(prompt_text, tokenizer), turn == len(conversation.messages) - 1
    # 2. The answer: recorded ids, or the template's text through its end.
    if last and (exact := _recorded(conversation, tokenizer)):
        return Answer(prompt, exact)
    text, end = _written(conversation, turn, prompt_text, tokenizer, ends)
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    said = _through_end(encode_after(prompt_text, text, tokenizer) + end, ends, special)
    # 3. An answer that was cut off has no end of turn; an answer of only such tokens is empty.
    if last and not conversation.finished and said and (said[-1] in ends or said[-1] in special):
        said = said[:-1]
    if all(token in ends or token in special for token in said) and not conversation.messages[
        turn
    ].get("tool_calls"):
        raise Skipped("empty answer")
    return Answer(prompt, said)


def _written(
    conversation: Conversation, turn: int, prompt_text: str, tokenizer: Any, ends: Collection[int]
) -> tuple[str, list[int]]:
    """The text after the prompt, and the end-of-turn token that it lacks."""
    messages, answer = conversation.messages[: turn + 1], conversation.messages[turn]
    through, content = (
        render(messages, tokenizer, tools=conversation.tools),
        answer.get("content") or "",
    )
    # 1. The answer's text, with its reasoning if the prompt opened that.
    thought = next((answer[key] for key in _REASONING if answer.get(key)), "")
    opened = _OPENED_TAG.search(prompt_text)
    text = _unopened(content, prompt_text)
    if opened and thought and not answer.get("tool_calls"):
        text = f"{thought.rstrip()}\n</{opened[1]}>\n\n{content.lstrip()}"
    else:
        _refuse_left_out(messages, conversation.tools, through, tokenizer)
    if through.startswith(prompt_text) and text.strip() in through[len(prompt_text) :]:
        # 2. The template's own text, if it continues the prompt and holds the answer.
        return through[len(prompt_text) :], []
    if answer.get("tool_calls") or (thought and not opened):
        raise Skipped(
            "the chat template writes reasoning or tool calls otherwise than its prompt asks for "
            "them"
        )
    # 3. Otherwise the answer's text, with the template's last end token.
    ids = encode(through, tokenizer)
    ending = [token for token in ids if token in ends] or [
        token
        for token in ids
        if token in tokenizer.all_special_ids and token != tokenizer.unk_token_id
    ]
    return text.rstrip(), ending[-1:]


def _unopened(content: str, prompt_text: str) -> str:
    """An answer's text without a leading tag that the prompt has already opened."""
    tag = _OPENING_TAG.match(content)
    return content[tag.end() :] if tag and prompt_text.rstrip().endswith(tag[1]) else content


def _refuse_left_out(
    messages: Sequence[Turn],
    tools: Sequence[Any] | None,
    text: str,
    tokenizer: Any,
    generate: bool = False,
) -> None:
    """Raise Skipped if the template ignores tools, tool calls or the last answer's reasoning, so
    that its text is the same without them.
    """

    def same(changed: Sequence[Turn], offered: Sequence[Any] | None) -> bool:
        try:
            return render(changed, tokenizer, generate, offered) == text
        except Skipped:
            return False

    # Names must occur as well, since some templates only write a count or a header.
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
    """The names of functions in OpenAI's form, or of bare function objects."""
    bare = [
        function.get("function", function)
        for function in functions
        if isinstance(function, Mapping)
    ]
    return [
        str(function["name"])
        for function in bare
        if isinstance(function, Mapping) and "name" in function
    ]


def _through_end(ids: list[int], ends: Collection[int], special: Collection[int]) -> list[int]:
    """The answer up to its end-of-turn token, without what the template adds after it."""
    for stops in (ends, special):
        for i, token in enumerate(ids):
            if token in stops:
                return ids[: i + 1]
    return ids


def _recorded(conversation: Conversation, tokenizer: Any) -> list[int] | None:
    """The recorded ids of the last answer, if this tokenizer decodes them to its text."""
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
    """The last turn, which is the assistant's, as token ids after its prompt, up to the end of its
    content.

    Returns:
        The ids, and the characters [start, end) of the content of each (below 0: text that the
        template adds before it).
    """
    # 1. The text after the prompt, and the content in it.
    prompt_text = render(messages[:-1], tokenizer, generate=True)
    content, whole = messages[-1]["content"], Conversation([dict(turn) for turn in messages])
    text, _ = _written(whole, len(messages) - 1, prompt_text, tokenizer, ())
    said = _unopened(content, prompt_text).strip()
    # 2. Offsets of the tokenizer, shifted to characters of the content.
    before = _before(prompt_text, text, tokenizer)
    first, shift = (
        len(encode(before, tokenizer)),
        len(before) + text.index(said) - content.index(said),
    )
    encoded = tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [(start - shift, end - shift) for start, end in encoded["offset_mapping"][first:]]
    # 3. Tokens after the content are left out.
    count = sum(start < content.index(said) + len(said) for start, _ in spans)
    return encoded["input_ids"][first : first + count], spans[:count]
