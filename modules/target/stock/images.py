"""Prompts with images: what a vision-language model's own code hands to its text decoder.

The library's model runs up to its decoder, whose arguments are taken: embeddings with those of the
images in their places, rotary positions, and which tokens see which. Nothing depends on how a model
reads its images.

Shape legend: B sequences, T prompt tokens, R axes of rotary positions (1, or 3 of Qwen's), H hidden
size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.target import Target

Images = Mapping[str, Any]
"""What a model's processor gives beside `input_ids`: `pixel_values`, sizes, token types."""
_TAKEN = ("input_ids", "inputs_embeds", "position_ids", "attention_mask")
_TYPES = ("token_type_ids", "mm_token_type_ids", "cache_position")


@dataclass(frozen=True)
class PromptRows:
    """Right-padded prompts as the decoder reads them.

    embeddings_BTH: its input. rotary_RBT: int64, positions of the rotary embedding. visible_BTT:
    bool, which tokens see which. offsets_B: int64, how far rotary positions behind a prompt are
    from the number of its tokens.
    """

    embeddings_BTH: Tensor
    rotary_RBT: Tensor
    visible_BTT: Tensor
    offsets_B: Tensor


@torch.no_grad()
def rows_with_images(
    target: Target, ids_BT: Tensor, lengths_B: Tensor, images: Sequence[Images | None]
) -> PromptRows:
    """The rows of prompts, each with its images or without.

    Raises:
        ValueError: not as many entries as prompts; images that do not fit their prompt; a model
            whose decoder reads more of its images than embeddings.
    """
    if len(images) != len(ids_BT):
        raise ValueError(
            f"images has {len(images)} entries for {len(ids_BT)} prompts: give one for each, None "
            "where a prompt has none"
        )
    width = ids_BT.shape[1]
    read = [
        _of_one(target, ids_T[:length][None], pictures)
        for ids_T, length, pictures in zip(ids_BT, lengths_B.tolist(), images, strict=True)
    ]
    axes = max(len(rotary_RT) for _, rotary_RT, _ in read)
    short = [width - len(visible_TT) for _, _, visible_TT in read]
    itself_TT = torch.eye(width, dtype=torch.bool, device=ids_BT.device)
    ends = zip(read, lengths_B.tolist(), strict=True)
    return PromptRows(
        torch.stack([F.pad(each[0], (0, 0, 0, n)) for each, n in zip(read, short, strict=True)]),
        torch.stack(
            [F.pad(each[1].expand(axes, -1), (0, n)) for each, n in zip(read, short, strict=True)],
            dim=1,
        ),
        torch.stack(
            [F.pad(each[2], (0, n, 0, n)) | itself_TT for each, n in zip(read, short, strict=True)]
        ),
        torch.stack([each[1].max() + 1 - length for each, length in ends]),
    )


def _of_one(target: Target, ids_1T: Tensor, images: Images | None) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [T,H], rotary positions [R,T] and visibility [T,T] of one prompt."""
    order_T = torch.arange(ids_1T.shape[1], device=ids_1T.device)
    causal_TT = order_T[:, None] >= order_T
    if not images:
        return target.embed(ids_1T)[0], order_T[None], causal_TT
    # 1. What the decoder is given.
    arguments = _decoder_arguments(target, ids_1T, images)
    more = [
        name
        for name, value in arguments.items()
        if name not in (*_TAKEN, *_TYPES) and _holds(value)
    ]
    if more:
        raise ValueError(
            f"images: the decoder of {target.name!r} reads {', '.join(more)} beside embeddings, "
            "which is not supported: give prompts without images"
        )
    # 2. Positions; a fourth axis, the first one, counts text.
    rotary_RT = order_T[None]
    if arguments.get("position_ids") is not None:
        positions = arguments["position_ids"]
        rotary_RT = positions if positions.dim() == 2 else positions[-3:, 0]
    # 3. Tokens of an image may see later ones of it.
    mask = arguments.get("attention_mask")
    mask = mask.get("full_attention") if isinstance(mask, Mapping) else mask
    if mask is not None and mask.dim() == 4:
        causal_TT = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
    return arguments["inputs_embeds"][0], rotary_RT, causal_TT


def _holds(value: Any) -> bool:
    """Whether an argument has tensors."""
    if isinstance(value, list | tuple):
        return any(_holds(each) for each in value)
    return isinstance(value, Tensor)


class _Reached(Exception):
    """The decoder was called."""


def _decoder_arguments(target: Target, ids_1T: Tensor, images: Images) -> dict[str, Any]:
    """The arguments of the decoder, which does not run."""
    taken: dict[str, Any] = {}

    def take(_: torch.nn.Module, __: tuple, options: dict[str, Any]) -> None:
        taken.update(options)
        raise _Reached

    moved = {
        name: value.to(target.device) if isinstance(value, Tensor) else value
        for name, value in images.items()
    }
    hook = target.architecture.stack.register_forward_pre_hook(take, with_kwargs=True)
    try:
        target.model(input_ids=ids_1T, use_cache=False, **moved)
    except _Reached:
        return taken
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(f"images do not fit the prompt or {target.name!r}: {line}") from error
    finally:
        hook.remove()
    raise AssertionError("the model did not call its decoder")
