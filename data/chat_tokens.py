"""One answer of a chat as tokens: the prompt exactly as in decoding, and the answer's tokens.

Text is encoded as a whole and split at the end of the prompt's ids. Encoding the parts separately
is wrong for tokenizers that add a space before every text (SentencePiece's dummy prefix).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError

from data.reading.files import Skipped
from data.reading.rows import TEMPLATE_ARGUMENTS, Conversation, json_of
from modules.target.tokenizers.chat_template import arguments_of, check_arguments

Turn = Mapping[str, Any]
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn's reasoning in servers and templates; most templates read the first."""
_OURS = ("response_ids", "weight")
"""Keys of a turn that no template reads."""
_FORMS = (True, False)
"""Forms of tool calls by preference: whether their arguments are objects, or JSON text, which
DeepSeek's templates concatenate."""
_OPENING_TAG = re.compile(r"\s*(<[^<>\s]+>)\s*")
_OPENED_TAG = re.compile(r"<(\w*(?:think|thought|reason)\w*)>(\s*)$")
_CLOSED_TAG = re.compile(r"</\w*(?:think|thought|reason)\w*>")
_CLOSED_THOUGHT = re.compile(r"\s*(?:</[^<>\s]+>|<\|[^<>|\s]+\|>)")
"""The end of a thought: a closing tag, or a special token (`<|end|>` of gpt-oss's channels)."""
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
    messages: Sequence[Turn],
    tokenizer: Any,
    tools: Sequence[Any] | None = None,
    template: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a chat up to the start of the assistant's answer.

    Args:
        tools: descriptions of the functions that the assistant may call.
        template: the row's own arguments of the chat template, beside the tokenizer's.

    Raises:
        Skipped: messages that the template refuses, or whose tools or tool calls it leaves out.
    """
    text = render(messages, tokenizer, True, tools, template)
    offered, arguments = list(tools or ()) or None, dict(template or {})
    chat = Conversation([dict(turn) for turn in messages], tools=offered, template=arguments)
    _refuse_left_out(chat, messages, text, tokenizer, generate=True)
    return encode(text, tokenizer)


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
    template: Mapping[str, Any] | None = None,
) -> str:
    """A chat as rendered by the tokenizer's template; `generate` opens the assistant's next turn.

    Turns are passed to the template with their tool calls and reasoning. Tool calls are passed in
    the first of `_FORMS` that the template writes.

    Raises:
        ValueError: a tokenizer without a template.
        Skipped: no messages, messages that the template refuses, or an argument that it does not
            read.
    """
    # Errors of the tokenizer end the run, errors of a template skip the row.
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template: use an instruction-tuned "
            "target"
        )
    if not messages:
        raise Skipped("there is nothing before the answer")
    arguments = {**arguments_of(tokenizer), **_own_arguments(tokenizer, template)}
    texts: list[str] = []
    refusals: list[Exception] = []
    calls = any(turn.get("tool_calls") for turn in messages)
    for form in _FORMS if calls else _FORMS[:1]:
        try:
            text = _applied(messages, tokenizer, generate, tools, arguments, form)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            refusals.append(error)
            continue
        if not calls:
            return text
        # Whether the calls are in it.
        bare = [_without(turn, "tool_calls") for turn in messages]
        try:
            if _applied(bare, tokenizer, generate, tools, arguments, form) != text:
                return text
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
            return text
        texts.append(text)
    if texts:
        return texts[0]
    raise Skipped(f"refused by the chat template ({refusals[0]})") from refusals[0]


def _own_arguments(tokenizer: Any, template: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The row's own arguments. Raises Skipped for one that the template does not read."""
    try:
        check_arguments(tokenizer, template or {}, TEMPLATE_ARGUMENTS)
    except ValueError as error:
        raise Skipped(str(error)) from None
    return template or {}


def _applied(
    messages: Sequence[Turn],
    tokenizer: Any,
    generate: bool,
    tools: Sequence[Any] | None,
    arguments: Mapping[str, Any],
    parsed: bool,
) -> str:
    """The template's text of turns with tool calls in one of `_FORMS`."""
    return tokenizer.apply_chat_template(
        [_for_template(turn, str(tokenizer.chat_template), parsed) for turn in messages],
        tools=list(tools) if tools else None,
        tokenize=False,
        add_generation_prompt=generate,
        **arguments,
    )


def _for_template(turn: Turn, template: str, parsed: bool) -> dict[str, Any]:
    """A turn as templates expect it, see `_FORMS`; an empty text for missing content."""
    made = _without(turn, *_OURS)
    if made.get("content") is None:
        made["content"] = ""
    if made.get("tool_calls"):
        made["tool_calls"] = [_call(call, parsed) for call in made["tool_calls"]]
    # Reasoning goes under the first key that the template reads.
    source = next((key for key in _REASONING if made.get(key)), None)
    read = [key for key in _REASONING if re.search(rf"\b{key}\b", template)]
    if source and read and source not in read:
        made[read[0]] = made.pop(source)
    return made


def _call(call: Any, parsed: bool) -> Any:
    """A call in OpenAI's form, with its arguments as an object or as JSON text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if parsed and isinstance(arguments, str):
        value = json_of(arguments)
        arguments = value if isinstance(value, dict) else arguments
    if not parsed and isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    made = {**function, "arguments": arguments} if "arguments" in function else function
    return {"type": "function", **(call if "function" in call else {}), "function": made}


# -- answers ---------------------------------------------------------------------------------------


def answer_ids(
    conversation: Conversation, turn: int, tokenizer: Any, ends: Collection[int]
) -> Answer:
    """Turn number `turn` of a conversation, which is the assistant's, as tokens.

    Recorded ids are used unchanged: those of answers, and those that a server had before the last
    one. Any other answer is rendered by the template. Where the rendered chat does not begin with
    the prompt (templates that open `<think>` only in the prompt) or lacks a part of the answer, the
    tokens are those of the answer's text (after its reasoning, if the prompt opens it) and of the
    template's end of turn.

    Args:
        ends: tokens that end an answer.

    Raises:
        Skipped: nothing before the answer, no answer, or a template that refuses the turns or
            leaves out tool calls, tools or this answer's reasoning.
    """
    messages, last = conversation.messages[:turn], turn == len(conversation.messages) - 1
    exact = _recorded(conversation, turn, tokenizer)
    # 1. The prompt: what a server had, or exactly as in decoding.
    if last and exact and (had := _recorded_prompt(conversation, tokenizer)):
        return Answer(had, exact)
    prompt_text = render(messages, tokenizer, True, conversation.tools, conversation.template)
    _refuse_left_out(conversation, messages, prompt_text, tokenizer, generate=True)
    prompt = encode(prompt_text, tokenizer)
    # 2. The answer: recorded ids, or the template's text through its end.
    if exact:
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
        render(messages, tokenizer, False, conversation.tools, conversation.template),
        answer.get("content") or "",
    )
    # 1. The answer's text, with its reasoning if the prompt opened that.
    thought = next((answer[key] for key in _REASONING if answer.get(key)), "")
    opened = _OPENED_TAG.search(prompt_text)
    text = _unopened(content, prompt_text)
    if opened and thought and not answer.get("tool_calls"):
        # Line breaks as the prompt has them: R1 puts tags on lines of their own, V3.1 does not.
        line, gap = ("\n", "\n\n") if opened[2] else ("", "")
        text = f"{thought.rstrip()}{line}</{opened[1]}>{gap}{content.lstrip()}"
    else:
        _refuse_left_out(conversation, messages, through, tokenizer)
    start = (
        len(prompt_text)
        if through.startswith(prompt_text)
        else _start(conversation, messages, through, prompt_text, tokenizer)
    )
    if start and text.strip() in through[start:]:
        # 2. The template's own text, if it continues the prompt and holds the answer.
        return through[start:], []
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


def _start(
    conversation: Conversation,
    messages: Sequence[Turn],
    through: str,
    prompt_text: str,
    tokenizer: Any,
) -> int:
    """Where the last turn starts in a chat whose earlier turns the template writes otherwise after
    it (gpt-oss drops the analysis before a call once a final answer follows); 0 if it is not found.
    """
    tools, template = conversation.tools, conversation.template
    # The text that opens an answer, in what the chat has in common with one of another answer.
    other = {
        "role": "assistant",
        "content": "-" if str(messages[-1]["content"])[:1] != "-" else "+",
    }
    try:
        before = render(messages[:-1], tokenizer, False, tools, template)
        changed = render([*messages[:-1], other], tokenizer, False, tools, template)
    except Skipped:
        return 0
    header = prompt_text[len(before) :] if prompt_text.startswith(before) else ""
    place = commonprefix([through, changed]).rfind(header) if header else -1
    return place + len(header) if place >= 0 else 0


def _unopened(content: str, prompt_text: str) -> str:
    """An answer's text without a leading tag that the prompt has already opened."""
    tag = _OPENING_TAG.match(content)
    return content[tag.end() :] if tag and prompt_text.rstrip().endswith(tag[1]) else content


def _refuse_left_out(
    conversation: Conversation,
    messages: Sequence[Turn],
    text: str,
    tokenizer: Any,
    generate: bool = False,
) -> None:
    """Raise Skipped if the template ignores tools, tool calls or the last answer's reasoning, so
    that its text is the same without them.
    """
    tools = conversation.tools

    def same(changed: Sequence[Turn], offered: Sequence[Any] | None) -> bool:
        try:
            return render(changed, tokenizer, generate, offered, conversation.template) == text
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


def _recorded(conversation: Conversation, turn: int, tokenizer: Any) -> list[int] | None:
    """The recorded ids of an answer, if this tokenizer decodes them to its parts."""
    message = conversation.messages[turn]
    row_ids = conversation.response_ids if turn == len(conversation.messages) - 1 else None
    exact, content = message.get("response_ids") or row_ids, message.get("content") or ""
    if not exact or max(exact) >= len(tokenizer):
        return None
    # Beside reasoning and calls, which a server gives apart, content is only a part of the text.
    said = _decoded(exact, tokenizer)
    apart = [str(message[key]) for key in _REASONING if message.get(key)]
    apart += _names(message.get("tool_calls") or ())
    if not apart:
        return exact if content and said.strip() == content.strip() else None
    return exact if all(part.strip() in said for part in (content, *apart)) else None


def _recorded_prompt(conversation: Conversation, tokenizer: Any) -> list[int] | None:
    """The recorded ids before the last answer, if this tokenizer decodes them to text with the last
    message."""
    had = conversation.prompt_ids
    if not had or max(had) >= len(tokenizer) or len(conversation.messages) < 2:
        return None
    question = conversation.messages[-2].get("content") or ""
    return had if question.strip() in _decoded(had, tokenizer) else None


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def reasoning_length(message: Turn, said: Sequence[int], tokenizer: Any) -> int:
    """How many of an answer's tokens are its reasoning, including the tag or token that ends it.

    Args:
        message: the answer's turn; its reasoning is under a key of its own, or before a closing tag
            in the text.
        said: the answer's tokens.
    """

    def text_of(count: int) -> str:
        return tokenizer.decode(list(said[:count]), clean_up_tokenization_spaces=False)

    # 1. Characters of the text up to the end of the reasoning.
    text = text_of(len(said))
    thought = next((str(message[key]).strip() for key in _REASONING if message.get(key)), "")
    tag = _OPENING_TAG.match(text)
    place = text.find(thought, tag.end() if tag else 0) if thought else -1
    start = place + len(thought) if place >= 0 else 0
    closed = _CLOSED_THOUGHT.match(text, start) if start else _CLOSED_TAG.search(text)
    end = closed.end() if closed else start
    # 2. The fewest tokens whose text reaches that far.
    least, most = 0, len(said)
    while least < most:
        middle = (least + most) // 2
        least, most = (
            (least, middle) if text_of(middle).startswith(text[:end]) else (middle + 1, most)
        )
    return least


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
