"""An MTP head in the files of its target, where vLLM reads it (method `mtp`).

The export is the whole target: the files that hold the head are written again with the trained
tensors, under their names and in their dtypes; all others are copied. A head that was not trained
gives the target's own bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from checkpoints.folders import CONFIG
from checkpoints.formats.exported import Exported, trimmed_note
from modules.drafters.feature.mtp import MTP
from modules.drafters.feature.native_head import Stored, stored_head, weight_files
from modules.runtime.files import read_object

if TYPE_CHECKING:
    from modules.contracts.target import Target

DRAFTER = MTP
ENGINES = ("vLLM",)
_COPIED = {".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken"}
"""Endings of a model folder's files without code and pickles."""
_USAGE = (
    "vllm serve FOLDER --speculative-config "
    '\'{{"method": "mtp", "num_speculative_tokens": {tokens}}}\''
)


def exported(drafter: MTP, target: Target) -> Exported:
    """The target's files with this head.

    Raises:
        ValueError: the files hold no such head, or vLLM would feed it other states.
    """
    # 1. Where its tensors lie.
    stored, state = stored_head(target), drafter.state_dict()
    state.pop("vocabulary", None)
    if not stored:
        raise ValueError(
            f"the files of {target.name} hold no head for later tokens, so vLLM loads none: use "
            "this project's decoder, or train eagle31.yaml"
        )
    if stored.keys() != state.keys():
        odd = ", ".join(sorted(stored.keys() ^ state.keys())[:4])
        raise ValueError(f"the head in the files of {target.name} is another one ({odd})")
    _refuse_other_states(drafter, stored)
    # 2. The files with it, and the others as they are.
    files = {each.file for each in stored.values()}
    shards = {file.name: load_file(file) for file in files}
    for ours, each in stored.items():
        shards[each.file.name][each.name] = each.bits_of(state[ours].cpu())
    folder = weight_files(target.name)[0].parent
    copied = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.suffix in _COPIED and file.name not in {CONFIG, *shards}
    ]
    return Exported(
        read_object(folder / CONFIG),
        {},
        weights=(),
        shards=shards,
        copied=tuple(copied),
        usage=usage(drafter, target.name),
        notes=trimmed_note(drafter),
    )


def usage(drafter: MTP, name: str) -> str:
    """The command that starts an engine with it."""
    return _USAGE.format(tokens=drafter.arguments["steps"])


def _refuse_other_states(drafter: MTP, stored: Mapping[str, Stored]) -> None:
    """vLLM feeds the target's normalised states, and to later steps the head's output: behind its
    norm in Qwen's layout, before it in DeepSeek's.
    """
    qwen = stored["eh_proj.weight"].name.startswith("mtp.")
    expected = {"post_norm": True, "norm_output": qwen}
    for key, value in expected.items():
        if drafter.arguments[key] != value:
            layout = "Qwen's" if qwen else "DeepSeek's"
            raise ValueError(
                f"{key} is {drafter.arguments[key]}, and vLLM runs heads of {layout} layout with "
                f"{value}: train it so"
            )


def recognises(config: Mapping[str, Any]) -> bool:
    """Never: a whole model is a target, whose head a training takes."""
    return False
