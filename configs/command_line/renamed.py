"""Class paths of earlier versions in configs, and their current names."""

from __future__ import annotations

import re
from typing import Any

_DRAFTERS = "modules.drafters"
RENAMED = {
    "modules.language_models.sorted.Sorted": f"{_DRAFTERS}.small_models.s2d.S2D",
    "modules.language_models.sorted": f"{_DRAFTERS}.small_models.s2d",
    "modules.language_models": f"{_DRAFTERS}.small_models",
    "modules.heads": f"{_DRAFTERS}.heads",
    "modules.feature_drafters.falcon": f"{_DRAFTERS}.blocks.falcon",
    "modules.feature_drafters": f"{_DRAFTERS}.feature",
    "modules.training_free.suffix": f"{_DRAFTERS}.retrieval.suffix_automaton",
    "modules.training_free": f"{_DRAFTERS}.retrieval",
    "modules.trees.beam": "modules.trees.sampled.stochastic_beam",
    "modules.trees.chain": "modules.trees.sampled.chain",
    "modules.trees.drawn": "modules.trees.sampled.branching",
    "modules.trees.dynamic": "modules.trees.threshold",
    "modules.trees.dyspec": "modules.trees.sampled.dyspec",
    "modules.trees.rerank": "modules.trees.reranked",
    "modules.trees.sequoia": "modules.trees.sampled.sequoia",
    "modules.decoding.relaxed": "modules.acceptance.relaxed",
    "modules.decoding.rules": "modules.acceptance.rules",
    "modules.verifiers": "modules.judges",
    "modules.alignment": "modules.preference",
    "data.labelled.LabelledData": "data.labelled.labelled.LabelledData",
    "eval.baselines": "eval.methods.huggingface",
}
"""Packages, modules and classes by their names of version 0.1; the longest match counts."""
_EARLIER = re.compile(
    "(" + "|".join(map(re.escape, sorted(RENAMED, key=len, reverse=True))) + r")(?=$|\.)"
)


def current_names(values: Any) -> Any:
    """The values of a config with class paths of earlier versions replaced by current ones."""
    if isinstance(values, dict):
        return {key: current_names(value) for key, value in values.items()}
    if isinstance(values, list):
        return [current_names(value) for value in values]
    match = _EARLIER.match(values) if isinstance(values, str) else None
    return values if match is None else RENAMED[match[1]] + values[match.end() :]
