"""Arguments of a target's chat template, for instance `enable_thinking: false`; every chat is
rendered with them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

_OF_THE_CHAT = ("messages", "tools", "documents", "bos_token", "eos_token")


def give_arguments(tokenizer: Any, arguments: Mapping[str, Any], name: str) -> None:
    """Render every chat of this tokenizer with these arguments.

    Raises:
        ValueError: no chat template, one that reads no such argument, or a name that means
            something else.
    """
    check_arguments(tokenizer, arguments, "chat_template", f" of target {name!r}")
    tokenizer.chat_template_arguments = dict(arguments)


def check_arguments(
    tokenizer: Any, arguments: Mapping[str, Any], key: str, whose: str = ""
) -> None:
    """Raise ValueError for arguments under `key` that the tokenizer's chat template does not read,
    or whose names mean something else."""
    if not arguments:
        return
    taken = {*_OF_THE_CHAT, *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in arguments:
        if name in taken:
            raise ValueError(f"{key}.{name} is not an argument of a template's own: leave it out")
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template or "")):
            raise ValueError(
                f"{key}.{name}: the chat template{whose} reads no {name!r}: leave it out, or "
                "correct its name"
            )


def arguments_of(tokenizer: Any) -> dict[str, Any]:
    """The arguments that its chats are rendered with."""
    return dict(getattr(tokenizer, "chat_template_arguments", {}))
