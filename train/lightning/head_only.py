"""A training whose states are all cached reads embedding, final norm and LM head of its target."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything

from data.feature_cache.cache import read_manifest
from modules.contracts.trainable import Trainable
from modules.target.head_only.target import WithoutLayers, load_head
from modules.target.target import Target

logger = logging.getLogger(__name__)


def reads_the_cache_alone(recipe: Any, trainable: Trainable) -> bool:
    """Whether a training needs no layer of its target once its states are cached: no probe decodes,
    and neither the component nor an objective runs the target.
    """
    return (
        recipe.data.features is not None
        and not recipe.probe.prompts
        and recipe.objective is None
        and not trainable.online
        and bool(trainable.training_states)
    )


def on_head(
    recipe: Any, device: str, build: Callable[[Target], Trainable]
) -> tuple[Target, Trainable] | None:
    """The recipe's target without its layers, and the component built on it; None where layers are
    needed: documents lack states, or the component starts from what only the model has.
    """
    head = head_of(recipe, device)
    if head is None:
        return None
    try:
        # The same random numbers as with the whole target.
        seed_everything(recipe.seed, verbose=False)
        return head, build(head)
    except WithoutLayers:
        seed_everything(recipe.seed, verbose=False)
        return None


def head_of(recipe: Any, device: str) -> Target | None:
    """The head of the recipe's target, or None where the whole target is needed or its states were
    cached from other weights.

    The cache's manifest has the target's fingerprint, and a digest of its head, which is compared.
    """
    folder = recipe.data.features
    if folder is None or recipe.probe.prompts or "{" in folder:
        return None
    try:
        manifest = read_manifest(Path(folder))
        if manifest["target"] != recipe.target or not manifest.get("head"):
            return None
        target = load_head(
            recipe.target, manifest["fingerprint"], recipe.dtype, device, recipe.chat_template
        )
    except (ValueError, WithoutLayers):
        # No cache yet, or nothing that can be loaded in parts: `load_target` tells what is wrong.
        return None
    with torch.device("meta"):
        trainable = recipe.drafter(target.shape)
    if not reads_the_cache_alone(recipe, trainable) or target.head_digest() != manifest["head"]:
        return None
    logger.info("target %r: its states are cached, so its layers are left out", recipe.target)
    return target
