"""Documents of plain text, as language models that are trained from scratch read them."""

from __future__ import annotations

from pathlib import Path

from data.reading.rows import load_conversations
from modules.runtime.files import read_text


def read_texts(source: str, limit: int | None, key: str) -> list[str]:
    """Documents: a conversation is one of its turns.

    Args:
        source: a `.txt` file, one document; or conversations: a file, a pattern of files, a Hub
            data set, or `embedded`.
        limit: conversations read at most; a `.txt` file is read whole.
        key: the setting's name, for errors.

    Raises:
        ValueError: no text that can be read.
    """
    if source.endswith(".txt"):
        return [read_text(Path(source), key)]
    return [
        "\n\n".join(str(turn["content"]) for turn in conversation.messages)
        for conversation in load_conversations(source, limit)
    ]
