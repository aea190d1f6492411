"""The arguments of the chat template that prompts are rendered with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoints.pretrained import find_folder, read_config

logger = logging.getLogger(__name__)


def chat_arguments(configured: Mapping[str, Any] | None, drafters: Sequence[str]) -> dict[str, Any]:
    """The configured arguments, by default those that the first drafter was trained with; a warning
    names every drafter that was trained with others.

    Args:
        configured: None for the first drafter's.
        drafters: run folders, drafter folders or Hub ids.
    """
    # The drafters' arguments, by name.
    trained = {
        name: dict(read_config(find_folder(name))["target"].get("chat_template") or {})
        for name in drafters
    }
    chosen = dict(next(iter(trained.values()), {}) if configured is None else configured)
    # Another template than in training lowers acceptance.
    for name, arguments in trained.items():
        if arguments != chosen:
            logger.warning(
                "drafter %r was trained with chat_template %s, prompts have %s",
                name,
                arguments,
                chosen,
            )
    return chosen
