"""The reader of chats, questions and answers in rows of data.

Training, preference pairs, labels, regeneration and evaluation all use it, so that they accept the
same shapes. An unreadable row raises `Skipped` with a reason that names the key and its value's
kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

from data.reading.files import LONGEST_LINE, Place, Skipped, Tally, kind, read_rows

CHATS = ("messages", "conversations", "conversation")
"""Keys of a whole chat, a list of turns."""
ASKED = ("prompt", "question", "instruction", "query")
ANSWERED = ("response", "completion", "answer", "output")
SHAPES = (
    "`messages` or `conversations` (turns with role/content or from/value), `turns`, or "
    "`prompt`, `question` or `instruction` with `response`, `completion`, `answer` or "
    "`output`"
)
_SYSTEM = ("system", "system_prompt")
_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
    "developer": "system",
    **{role: role for role in ("user", "assistant", "system", "tool")},
}
_CALLING = ("function_call", "tool_call")
"""Roles of turns whose text is a tool call as JSON."""
_KEPT_TEXTS = ("tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
_KEPT = ("tool_calls", "response_ids", *_KEPT_TEXTS)
"""Further keys of a turn: those that chat templates may render, and an answer's recorded tokens."""
TEMPLATE_ARGUMENTS = "chat_template_kwargs"
"""Key of a row's own arguments of the chat template, as in requests to vLLM and SGLang."""
Message = dict[str, Any]
"""A turn: `role`, `content` (text; null only with `tool_calls`), and optionally `_KEPT` keys and
`weight` 0, an assistant's turn that is not trained on (OpenAI's format for fine-tuning)."""


@dataclass(frozen=True)
class Conversation:
    """Turns, as returned by `read_message`.

    response_ids: the exact tokens of the last assistant message, end-of-turn token included if it
        was emitted.
    finished: whether the last answer ended by itself; if not, no end of turn is trained on.
    tools: descriptions of the functions that the assistant may call, for templates with tools.
    place: of the row.
    template: the row's own arguments of the chat template, for instance `enable_thinking`.
    prompt_ids: the exact tokens that a server had before the last answer.
    """

    messages: list[Message]
    response_ids: list[int] | None = None
    finished: bool = True
    tools: list[Any] | None = None
    place: Place | None = None
    template: dict[str, Any] | None = None
    prompt_ids: list[int] | None = None


def load_conversations(
    source: str,
    limit: int | None = None,
    split: str = "train",
    streaming: bool = False,
    tally: Tally | None = None,
) -> Iterator[Conversation]:
    """Read conversations lazily.

    Args:
        source: see `data.reading.files.read_rows`.
        limit: read at most this many rows.
        split: split of a Hub data set.
        streaming: whether a Hub data set is only downloaded as far as it is read; always true with
            a limit.
        tally: counts unreadable rows; without one, the first of them is an error.

    Raises:
        ValueError: a missing or empty file or data set or, without a tally, an unreadable row.
    """
    any_row = False
    # An empty source is an error, skipped rows are not.
    for row in islice(read_rows(source, split, streaming or limit is not None, tally), limit):
        any_row = True
        try:
            yield read_conversation(row.content, row.place)
        except Skipped as reason:
            if tally is None:
                raise ValueError(f"{row.place}: {reason}") from None
            tally.skip(str(reason), row.place)
    if not any_row and not (tally and tally.skipped):
        raise ValueError(f"data set {source!r} is empty: give one with at least one conversation")


def read_conversation(row: Mapping[str, Any], place: Place | None = None) -> Conversation:
    """The conversation of a row. Raises Skipped for an unreadable one."""
    return Conversation(
        chat_of(row),
        token_ids(row.get("response_ids")),
        bool(row.get("finished", True)),
        tools_of(row),
        place,
        template_of(row),
        token_ids(row.get("prompt_ids"), "prompt_ids"),
    )


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """`tools` of a row in OpenAI's form; None without any.

    The list or its items may be JSON text, an item may be the function alone.

    Raises:
        Skipped: no list, or an item that is no function with a `name`.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = json_of(tools) if tools.strip() else None
    if tools and not isinstance(tools, list):
        raise Skipped(f"`tools` is {kind(row['tools'])}, expected a list")
    return [_tool(tool) for tool in tools or []] or None


def _tool(tool: Any) -> dict[str, Any]:
    described = json_of(tool) if isinstance(tool, str) else tool
    if not _is_call(described):
        raise Skipped(f"`tools` holds {kind(described)} that is no function with a `name`")
    return described if "function" in described else {"type": "function", "function": described}


def template_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row's own arguments of the chat template, perhaps as JSON text; None without any. Nulls,
    which Parquet files put for what a row lacks, are left out.

    Raises:
        Skipped: no object.
    """
    arguments = row.get(TEMPLATE_ARGUMENTS)
    if isinstance(arguments, str):
        arguments = json_of(arguments) if arguments.strip() else None
    if arguments is not None and not isinstance(arguments, Mapping):
        raise Skipped(f"`{TEMPLATE_ARGUMENTS}` is {kind(arguments)}, expected an object")
    return {key: value for key, value in (arguments or {}).items() if value is not None} or None


def json_of(text: str) -> Any:
    """The value of a JSON text; the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def chat_of(row: Mapping[str, Any]) -> list[Message]:
    """All turns of a row: its chat, or its question and, if it has one, the answer.

    Raises:
        Skipped: no turns, or unreadable ones.
    """
    key = next((key for key in CHATS if row.get(key) is not None), None)
    if key is not None:
        return after_system(row, read_turns(row[key], key))
    question = asked_of(row)
    key = next((key for key in ANSWERED if row.get(key) is not None), None)
    return question if key is None else [*question, *spoken(row[key], key, "assistant")]


def questions_of(row: Mapping[str, Any]) -> list[list[Message]]:
    """The questions of a row without its answers: for each one the turns after the previous answer.
    A system prompt belongs to the question after it, and so do tool calls with their results, which
    no other answer can replace: they are kept with `weight` 0 and without reasoning.

    Raises:
        Skipped: no question, or unreadable turns.
    """
    # 1. In a chat, questions end at answers; in a list of texts, each is a question.
    chat = any(row.get(key) is not None for key in CHATS)
    alone = not chat and any(_texts(row.get(key)) for key in ("turns", *ASKED))
    questions: list[list[Message]] = [[]]
    turns = chat_of(row) if chat else asked_of(row)
    for turn, later in zip_longest(turns, turns[1:]):
        in_prompt = bool(turn.get("tool_calls")) and later is not None and later["role"] == "tool"
        asks = any(earlier["role"] == "user" for earlier in questions[-1])
        if asks and not in_prompt and (alone or turn["role"] == "assistant"):
            questions.append([])
        if in_prompt or turn["role"] != "assistant":
            questions[-1].append(_kept_call(turn) if in_prompt else turn)
    # 2. Drop turns after the last question, and refuse empty ones.
    if not any(message["role"] == "user" for message in questions[-1]):
        del questions[-1]
    last = [message for turns in questions for message in turns[-1:]]
    if not all(message["role"] == "tool" or str(message["content"]).strip() for message in last):
        raise Skipped("an empty question")
    if not questions:
        raise Skipped("no question: no turn of role user")
    return questions


def _kept_call(turn: Message) -> Message:
    dropped = ("response_ids", "reasoning_content", "reasoning", "thinking")
    return {**{key: value for key, value in turn.items() if key not in dropped}, "weight": 0}


def opening_of(row: Mapping[str, Any]) -> list[Message]:
    """All turns before answers under other keys (`chosen`, a labelled `response`): the question, or
    the chat without an answer at its end. Raises Skipped for unreadable turns."""
    chat = not any(row.get(key) for key in ("turns", *ASKED)) and any(row.get(key) for key in CHATS)
    turns = chat_of(row) if chat else asked_of(row)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    return turns


def asked_of(row: Mapping[str, Any]) -> list[Message]:
    """The question under `turns` or the first key of `ASKED`, after the row's system prompt.

    Raises:
        Skipped: no such key, or an unreadable value.
    """
    keys = ("turns", *ASKED)
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        null = next((key for key in (*CHATS, *keys) if key in row), None)
        raise Skipped(
            f"`{null}` is null, expected text or turns"
            if null
            else f"the row has keys {', '.join(row) or '(none)'}: expected {SHAPES}"
        )
    # Alpaca's `input` belongs to its `instruction`.
    turns = spoken(row[key], key, "user", several=key == "turns")
    extra = row.get("input")
    if key == "instruction" and isinstance(extra, str) and extra.strip():
        turns[-1]["content"] += f"\n\n{extra}"
    return after_system(row, turns)


def after_system(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """The turns after the row's system prompt, if it has one and they do not."""
    system = next((row[key] for key in _SYSTEM if isinstance(row.get(key), str)), "")
    if not system.strip() or any(turn["role"] == "system" for turn in turns):
        return turns
    return [{"role": "system", "content": system}, *turns]


def spoken(value: Any, key: str, role: str, several: bool = False) -> list[Message]:
    """Turns under `key`: one text of `role`, one turn, or a list of turns (perhaps as JSON text);
    with `several`, also a list of texts. Raises Skipped for anything else."""
    # A list of texts, then one text, then turns.
    if _texts(value) and not several:
        raise Skipped(f"`{key}` is a list of texts, expected text or turns")
    if _texts(value):
        return [{"role": role, "content": _short(text)} for text in value]
    if isinstance(value, str):
        turns = _listed(value)
        return (
            [{"role": role, "content": _short(value)}] if turns is None else read_turns(turns, key)
        )
    if not isinstance(value, dict | list):
        raise Skipped(f"`{key}` is {kind(value)}, expected text or turns")
    return read_turns([value] if isinstance(value, dict) else value, key)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def read_turns(value: Any, key: str) -> list[Message]:
    """The turns of a list, perhaps as JSON text. Raises Skipped for anything else."""
    turns = _listed(value) if isinstance(value, str) else value
    if not isinstance(turns, list):
        raise Skipped(f"`{key}` is {kind(value)}, expected a list of turns")
    return [read_message(turn) for turn in turns]


def _listed(text: str) -> list[Any] | None:
    """The list of turns in a JSON text; None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    items = json_of(text)
    return (
        items
        if isinstance(items, list)
        and all(isinstance(item, dict) and item.keys() & {"role", "from"} for item in items)
        else None
    )


def read_message(turn: Any) -> Message:
    """A turn with the role of chat templates, and its text joined.

    Raises:
        Skipped: no role, no text, or content that is not text.
    """
    if not isinstance(turn, Mapping):
        raise Skipped(f"a turn is {kind(turn)}, expected an object with `role` and `content`")
    # 1. The role, under either name.
    role = next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)
    if not isinstance(role, str):
        raise Skipped(f"a turn has no `role` or `from` that is text (its keys: {_keys(turn)})")
    # 2. Further keys, for templates that render them.
    extras = {key: turn[key] for key in _KEPT if turn.get(key)}
    if isinstance(extras.get("tool_calls"), str):
        extras["tool_calls"] = json_of(extras["tool_calls"])
    _check_kept(extras)
    if turn.get("weight") is not None:
        extras |= _weight(turn["weight"])
    # 3. Tool calls of older data sets.
    key = next((key for key in ("content", "value") if turn.get(key) is not None), None)
    if role.strip().lower() in _CALLING:
        return {"role": "assistant", "content": None, "tool_calls": _calls(turn.get(key or ""))}
    if turn.get("function_call"):
        extras.setdefault("tool_calls", _calls(turn["function_call"]))
    # 4. The speaker and the text.
    speaker = _ROLES.get(role.strip().lower())
    if speaker is None:
        raise Skipped(
            f"a turn of role {role[:40]!r}, expected user, assistant, system or tool, or a usual "
            "name of these"
        )
    if key is None and "tool_calls" not in extras:
        raise Skipped(f"a turn has no text under `content` or `value` (its keys: {_keys(turn)})")
    return {"role": speaker, "content": None if key is None else _text(turn[key], key), **extras}


def _check_kept(extras: Mapping[str, Any]) -> None:
    """Raise Skipped if further keys of a turn have values that chat templates cannot render."""
    for key in _KEPT_TEXTS:
        if not isinstance(extras.get(key, ""), str):
            raise Skipped(f"`{key}` of a turn is {kind(extras[key])}, expected text")
    token_ids(extras.get("response_ids"))
    calls = extras.get("tool_calls", [])
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        actual = "a list with something else" if isinstance(calls, list) else kind(calls)
        raise Skipped(f"`tool_calls` of a turn is {actual}, expected a list of calls with a `name`")
    for call in calls:
        arguments = call.get("function", call).get("arguments")
        if not isinstance(arguments, str | Mapping | None):
            raise Skipped(
                f"`arguments` in `tool_calls` of a turn is {kind(arguments)}, expected an object "
                "or its JSON text"
            )


def _weight(value: Any) -> dict[str, int]:
    if value not in (0, 1):
        raise Skipped(f"`weight` of a turn is {str(value)[:40]!r}, expected 0 or 1")
    return {} if value else {"weight": 0}


def _is_call(call: Any) -> bool:
    """Whether a value is a call in OpenAI's form, or only its function."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls in the form of older data sets: one call, or several, perhaps as JSON text."""
    parsed = json_of(value) if isinstance(value, str) else value
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise Skipped("a tool call without a `name`")
    return [{"type": "function", "function": call} for call in calls]


def _keys(turn: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} (null)" if turn[key] is None else str(key) for key in turn) or "none"


def _text(value: Any, key: str) -> str:
    """The text of a turn, which may consist of several parts of type text."""
    if isinstance(value, str):
        return _short(value)
    if not isinstance(value, list):
        raise Skipped(f"`{key}` of a turn is {kind(value)}, expected text")
    return _short("".join(map(_part, value)))


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if (
        isinstance(part, Mapping)
        and isinstance(part.get("text"), str)
        and (part.get("type") in (None, "text", "input_text", "output_text"))
    ):
        return part["text"]
    actual = part.get("type") if isinstance(part, Mapping) else kind(part)
    raise Skipped(f"a turn with a part of type {actual}, expected text alone")


def _short(text: str) -> str:
    if len(text) > LONGEST_LINE:
        raise Skipped(f"a text of more than {LONGEST_LINE >> 20} Mi characters")
    return text


def token_ids(value: Any, key: str = "response_ids") -> list[int] | None:
    """Token ids under `key` of a row, or None. Raises Skipped for anything else."""
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(
        type(token) is int and 0 <= token < 2**31 for token in value
    ):
        raise Skipped(
            f"`{key}` is {kind(value)}"
            + (
                " with something else than token ids"
                if isinstance(value, list)
                else ", expected a list of token ids"
            )
        )
    return value
