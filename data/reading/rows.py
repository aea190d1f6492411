"""What a row says: the one reader of chats, questions and answers, for all that reads rows.

Training, preference pairs, labels, regeneration and evaluation read rows through it, so that a
shape that one of them takes all of them take. A row that cannot be read raises `Skipped` with a
reason that names the key and what was found there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
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
"""Roles of turns whose text is a call as JSON, not something that is said."""
_KEPT_TEXTS = ("tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
_KEPT = ("tool_calls", *_KEPT_TEXTS)
"""What a turn may hold besides, for chat templates that write it."""
Message = dict[str, Any]
"""A turn: `role` and `content` (text; null only beside `tool_calls`), and `_KEPT` where given."""


@dataclass(frozen=True)
class Conversation:
    """Turns, as `read_message` makes them.

    response_ids: the exact tokens of the last assistant message, end-of-turn token included if it
        was emitted.
    finished: whether the last answer ended by itself; if not, nothing teaches the model to stop
        there.
    tools: descriptions of the functions that the assistant may call, for templates that take them.
    place: where it was read.
    """

    messages: list[Message]
    response_ids: list[int] | None = None
    finished: bool = True
    tools: list[Any] | None = None
    place: Place | None = None


def load_conversations(
    source: str,
    limit: int | None = None,
    split: str = "train",
    streaming: bool = False,
    tally: Tally | None = None,
) -> Iterator[Conversation]:
    """Read conversations, one after the other as they are asked for.

    Args:
        source: see `data.reading.files.read_rows`.
        limit: read at most this many rows.
        split: split of a Hub data set.
        streaming: whether a Hub data set is downloaded no further than it is read; with a limit it
            always is so.
        tally: counts rows that cannot be read; without one, the first of them ends it.

    Raises:
        ValueError: no such file or data set, nothing in it, or, without a tally, a row that cannot
            be read.
    """
    found = False
    for row in islice(read_rows(source, split, streaming or limit is not None, tally), limit):
        found = True
        try:
            yield read_conversation(row.content, row.place)
        except Skipped as reason:
            if tally is None:
                raise ValueError(f"{row.place}: {reason}") from None
            tally.skip(str(reason), row.place)
    if not found and not (tally and tally.skipped):
        raise ValueError(f"data set {source!r} is empty: give one with at least one conversation")


def read_conversation(row: Mapping[str, Any], place: Place | None = None) -> Conversation:
    """The conversation that a row holds. Skipped: it holds none that can be read."""
    return Conversation(
        chat_of(row),
        token_ids(row.get("response_ids")),
        bool(row.get("finished", True)),
        tools_of(row),
        place,
    )


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """`tools` of a row, which may be written as JSON text; None without any. Skipped: no list."""
    given = row.get("tools")
    if isinstance(given, str):
        given = json_of(given) if given.strip() else None
    if given and not isinstance(given, list):
        raise Skipped(f"`tools` is {kind(row['tools'])}, expected a list")
    return given or None


def json_of(text: str) -> Any:
    """What a text holds as JSON; the text itself where that is nothing."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def chat_of(row: Mapping[str, Any]) -> list[Message]:
    """All turns of a row: its chat, or what it asks and, where it has one, the answer.

    Raises:
        Skipped: no turns, or some that cannot be read.
    """
    key = next((key for key in CHATS if row.get(key) is not None), None)
    if key is not None:
        return behind_system(row, read_turns(row[key], key))
    asked = asked_of(row)
    key = next((key for key in ANSWERED if row.get(key) is not None), None)
    return asked if key is None else [*asked, *spoken(row[key], key, "assistant")]


def questions_of(row: Mapping[str, Any]) -> list[list[Message]]:
    """What a row asks, without its answers: for each question the turns behind the answer to the
    one before. A system prompt stands with the question behind it.

    Raises:
        Skipped: no question, tool calls, or turns that cannot be read.
    """
    chat = any(row.get(key) is not None for key in CHATS)
    alone = not chat and any(_texts(row.get(key)) for key in ("turns", *ASKED))
    questions: list[list[Message]] = [[]]
    for turn in chat_of(row) if chat else asked_of(row):
        if turn["role"] == "tool" or turn.get("tool_calls"):
            raise Skipped("a chat with tool calls, whose answers cannot be made anew")
        asks = any(one["role"] == "user" for one in questions[-1])
        if asks and (alone or turn["role"] == "assistant"):
            questions.append([])
        if turn["role"] != "assistant":
            questions[-1].append(turn)
    if not any(one["role"] == "user" for one in questions[-1]):
        del questions[-1]
    if not all(str(one["content"]).strip() for turns in questions for one in turns[-1:]):
        raise Skipped("an empty question")
    if not questions:
        raise Skipped("no question: no turn of role user")
    return questions


def opening_of(row: Mapping[str, Any]) -> list[Message]:
    """All turns before the answers that a row holds elsewhere (`chosen`, a labelled `response`):
    what it asks, or its chat without an answer at the end. Skipped: none that can be read."""
    chat = not any(row.get(key) for key in ("turns", *ASKED)) and any(row.get(key) for key in CHATS)
    turns = chat_of(row) if chat else asked_of(row)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    return turns


def asked_of(row: Mapping[str, Any]) -> list[Message]:
    """What a row asks under `turns` or the first of `ASKED` that it has, behind its system prompt.

    Raises:
        Skipped: nothing there, or something that cannot be read.
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
    asked = spoken(row[key], key, "user", several=key == "turns")
    given = row.get("input")
    if key == "instruction" and isinstance(given, str) and given.strip():
        asked[-1]["content"] += f"\n\n{given}"
    return behind_system(row, asked)


def behind_system(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """Turns behind the row's system prompt, if it has one and they do not."""
    system = next((row[key] for key in _SYSTEM if isinstance(row.get(key), str)), "")
    if not system.strip() or any(turn["role"] == "system" for turn in turns):
        return turns
    return [{"role": "system", "content": system}, *turns]


def spoken(value: Any, key: str, role: str, several: bool = False) -> list[Message]:
    """Turns under `key`: one text that `role` says, one turn, or a list of turns (which may be
    written as JSON text); where `several`, also a list of texts. Skipped: nothing of these."""
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
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def read_turns(value: Any, key: str) -> list[Message]:
    """A list of turns, which may be written as JSON text. Skipped: it is none."""
    turns = _listed(value) if isinstance(value, str) else value
    if not isinstance(turns, list):
        raise Skipped(f"`{key}` is {kind(value)}, expected a list of turns")
    return [read_message(turn) for turn in turns]


def _listed(text: str) -> list[Any] | None:
    """The list of turns that a text holds as JSON, if it does."""
    if not text.lstrip().startswith("["):
        return None
    found = json_of(text)
    return (
        found
        if isinstance(found, list)
        and all(isinstance(one, dict) and one.keys() & {"role", "from"} for one in found)
        else None
    )


def read_message(turn: Any) -> Message:
    """A turn with its role as chat templates name it, and its text in one piece.

    Raises:
        Skipped: no role or no text, or something in it that is not text.
    """
    if not isinstance(turn, Mapping):
        raise Skipped(f"a turn is {kind(turn)}, expected an object with `role` and `content`")
    role = next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)
    if not isinstance(role, str):
        raise Skipped(f"a turn has no `role` or `from` that is text (its keys: {_keys(turn)})")
    kept = {key: turn[key] for key in _KEPT if turn.get(key)}
    _check_kept(kept)
    key = next((key for key in ("content", "value") if turn.get(key) is not None), None)
    if role.strip().lower() in _CALLING:
        return {"role": "assistant", "content": None, "tool_calls": _calls(turn.get(key or ""))}
    if turn.get("function_call"):
        kept.setdefault("tool_calls", _calls(turn["function_call"]))
    speaker = _ROLES.get(role.strip().lower())
    if speaker is None:
        raise Skipped(
            f"a turn of role {role[:40]!r}, expected user, assistant, system or tool, or a usual "
            "name of these"
        )
    if key is None and "tool_calls" not in kept:
        raise Skipped(f"a turn has no text under `content` or `value` (its keys: {_keys(turn)})")
    return {"role": speaker, "content": None if key is None else _text(turn[key], key), **kept}


def _check_kept(kept: Mapping[str, Any]) -> None:
    """Skipped: what stands beside a turn's text is not of the kind that chat templates write."""
    for key in _KEPT_TEXTS:
        if not isinstance(kept.get(key, ""), str):
            raise Skipped(f"`{key}` of a turn is {kind(kept[key])}, expected text")
    calls = kept.get("tool_calls", [])
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        found = "a list with something else" if isinstance(calls, list) else kind(calls)
        raise Skipped(f"`tool_calls` of a turn is {found}, expected a list of calls with a `name`")


def _is_call(call: Any) -> bool:
    """Whether it is a call as OpenAI writes it, or its function alone."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls of what older data sets hold: a call, or several, perhaps as JSON text."""
    found = json_of(value) if isinstance(value, str) else value
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise Skipped("a tool call without a `name`")
    return [{"type": "function", "function": call} for call in calls]


def _keys(turn: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} (null)" if turn[key] is None else str(key) for key in turn) or "none"


def _text(value: Any, key: str) -> str:
    """The text of a turn: as it is, or in parts of type text."""
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
    found = part.get("type") if isinstance(part, Mapping) else kind(part)
    raise Skipped(f"a turn with a part of type {found}, expected text alone")


def _short(text: str) -> str:
    if len(text) > LONGEST_LINE:
        raise Skipped(f"a text of more than {LONGEST_LINE >> 20} Mi characters")
    return text


def token_ids(value: Any) -> list[int] | None:
    """`response_ids` of a row: token ids, or None. Skipped: something else."""
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(
        type(one) is int and 0 <= one < 2**31 for one in value
    ):
        raise Skipped(
            f"`response_ids` is {kind(value)}"
            + (
                " with something else than token ids"
                if isinstance(value, list)
                else ", expected a list of token ids"
            )
        )
    return value
