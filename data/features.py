"""`python -m data.features`: cache the target's states that a recipe's training reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from configs.command_line.loading import accept_recipes, config_parser, exit_with, parse
from configs.command_line.work_share import Share
from data.datamodule import ConversationData
from data.feature_cache.vllm_states import VllmStates, check_vllm_states
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.trainable import Trainable
from modules.target.head_only.target import HeadTarget, load_head
from modules.target.loading import AUTO, load_target
from modules.target.target import Target


def cache(
    data: ConversationData,
    target: str = "smollm2-135m",
    dtype: str = AUTO,
    drafter: Callable[[TargetShape], Trainable] | None = None,
    states: list[StateName] | None = None,
    shard: str | None = None,
    device: str | None = None,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    chat_template: dict[str, Any] | None = None,
    engine: Literal["slipstream", "vllm"] = "slipstream",
    vllm: dict[str, Any] | None = None,
) -> None:
    """Compute the states of a frozen target over a data set, once.

    Processes started by torchrun or SLURM divide the work and end when all of it is done.

    Args:
        data: the data set; `data.features` is the folder to write.
        target: Hub id, folder, .gguf file or smollm2-135m.
        dtype: of the target: float32, bfloat16, float16 or float64; auto is bfloat16 on a GPU that
            multiplies it and float32 elsewhere.
        drafter: the component whose states are wanted.
        states: state names instead of the drafter's.
        shard: `I/N` only computes part I (from 0) of N; N processes, here or elsewhere, fill one
            folder.
        device: that the target runs on; null is this process's GPU, or the CPU.
        precision: bf16-mixed multiplies matrices in bfloat16, twice as fast on some processors.
        chat_template: arguments of the target's chat template, as in the recipe.
        engine: vllm for targets that are too large for one device, quantised or in parallel.
        vllm: further arguments of `vllm.LLM`, for instance {tensor_parallel_size: 4}.

    Raises:
        ValueError: no folder, no states, or no such part.
    """
    # 1. Settings, before the target is loaded.
    share = None if shard is None else Share.parse(shard, "--shard")
    if data.features is None:
        raise ValueError(
            "data.features is not set: give the folder to write, as --data.features FOLDER"
        )
    if drafter is None and not states:
        raise ValueError("states is not set: give --states '[final]', or a --config with a drafter")
    if engine == "vllm":
        check_vllm_states(dtype, device, precision)
    elif vllm:
        raise ValueError("vllm: arguments of vLLM have no effect: add --engine vllm")
    # 2. The states, from the drafter's class if they are not named.
    loaded = (
        load_head(target, "", dtype, "cpu", chat_template)
        if engine == "vllm"
        else load_target(target, dtype, device, chat_template)
    )
    names = states or (drafter(loaded.shape).training_states if drafter else ())
    # 3. Compute what is missing, or one part of it.
    if engine == "vllm":
        _write_from_vllm(data, loaded, names, share, vllm)
    else:
        _write(data, loaded, names, share, precision)
    print(_summary(data, shard))


def _summary(data: ConversationData, shard: str | None) -> str:
    part = "" if shard is None else f", of which part {shard} is written"
    return (
        f"{len(data.documents)} training documents, {data.response_tokens} response tokens{part}: "
        f"{data.features}"
    )


def _write(
    data: ConversationData,
    target: Target,
    names: Sequence[StateName],
    share: Share | None,
    precision: str,
) -> None:
    """Write the states that the target computes here."""
    with torch.autocast(target.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        if share is None:
            data.bind(target, names)
        else:
            data.read(target)
            data.write_features(target, names, share)


def _write_from_vllm(
    data: ConversationData,
    target: Target,
    names: Sequence[StateName],
    share: Share | None,
    arguments: dict[str, Any] | None,
) -> None:
    """Write the states that vLLM computes."""
    assert isinstance(target, HeadTarget)
    data.read(target)
    longest = max(len(document) for document in [*data.documents, *data.held_out])
    data.write_features(target, names, share, VllmStates(target, names, longest, arguments))


def command(arguments: Sequence[str]) -> int:
    """Parse a recipe's config and flags, and cache; returns the exit status."""
    parser = config_parser("python -m data.features", "Cache the target's states over a data set.")
    parser.add_function_arguments(cache, fail_untyped=True)
    accept_recipes(parser, reads=("data", "drafter"))
    built = parser.instantiate(parse(parser, arguments))
    cache(
        built.data,
        built.target,
        built.dtype,
        built.drafter,
        built.states,
        built.shard,
        built.device,
        built.precision,
        built.chat_template,
        built.engine,
        built.vllm,
    )
    return 0


def main() -> None:
    """Entry point; exit status 2 after a user's mistake."""
    exit_with(command)


if __name__ == "__main__":
    main()
