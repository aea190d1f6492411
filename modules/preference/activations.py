"""Activations of the reference model, from which token masks are read.

Shape legend: L layers, A activations, B sequences, T tokens of a row, H size of an activation, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.contracts.shapes import StateName
from modules.losses.chunked import most_logits

if TYPE_CHECKING:
    from modules.contracts.target import Target

Group = Literal["residual", "attention", "feed_forward", "logits"]
GROUPS: tuple[Group, ...] = get_args(Group)


def residual_states(target: Target) -> tuple[StateName, ...]:
    """Names of the residual stream after each layer, the last after the final norm: Hugging Face's
    `hidden_states[1:]`, which the released code's learned masks read.
    """
    return (*range(1, target.shape.num_layers), "final")


@torch.no_grad()
def mean_activations(
    target: Target, batch: TextBatch, groups: Sequence[Group] = GROUPS
) -> list[Tensor]:
    """One tensor [A,B,T] per group: its activations, each averaged over its dimension H.

    The groups of the released code (SparsePO, `--activation_hook=all`), of each layer of a
    Llama-type target:

    - attention: queries, keys and values, and the heads' outputs before their projection. Rotated
      queries and keys are left out: no module of a stock model returns them.
    - feed_forward: the inner activations, which enter the down projection.
    - residual: the stream before attention, between attention and MLP and after the layer; the
      outputs of the two norms, of attention and of the MLP; the embeddings, and the states after
      the final norm.
    - logits: the logits, once.

    Only means are stored: 12 numbers per token and layer for all groups.

    Raises:
        ValueError: the target's layers have other submodules.
    """
    means: dict[Group, list[Tensor]] = {group: [] for group in GROUPS}
    # 1. One forward pass with hooks on every part that is read.
    with ExitStack() as hooks:
        for layer in target.architecture.layers:
            for group in groups:
                for part, entering in _points(layer, group, target.name):
                    hooks.callback(_watch(part, entering, means[group]).remove)
        final_BTH = target.features(batch, ("final",))["final"]
    # 2. Groups with values outside of the layers.
    if "residual" in groups:
        means["residual"] = [means["residual"][0], *means["residual"], _mean(final_BTH)]
    if "logits" in groups:
        means["logits"] = [_mean_logits(target, final_BTH)]
    return [torch.stack(means[group]) for group in groups]


def _points(layer: Any, group: Group, name: str) -> list[tuple[nn.Module, bool]]:
    """Submodules of a layer whose activations are read, and for each whether its input (True) or
    its output is read.
    """
    try:
        attention = layer.self_attn
        middle = getattr(layer, "pre_feedforward_layernorm", None) or layer.post_attention_layernorm
        points: dict[Group, list[tuple[nn.Module, bool]]] = {
            "attention": [
                (attention.q_proj, False),
                (attention.k_proj, False),
                (attention.v_proj, False),
                (attention.o_proj, True),
            ],
            "feed_forward": [(layer.mlp.down_proj, True)],
            "residual": [
                (layer.input_layernorm, True),
                (layer.input_layernorm, False),
                (attention, False),
                (middle, True),
                (middle, False),
                (layer.mlp, False),
                (layer, False),
            ],
            "logits": [],
        }
    except AttributeError as error:
        raise ValueError(
            f"activations {group!r}: {error}: target {name!r} is not a Llama-type "
            "one, use masks 'ones' or 'random'"
        ) from None
    return points[group]


def _watch(part: nn.Module, entering: bool, means: list[Tensor]) -> Any:
    """A hook that appends the mean [B,T] of a submodule's input or output at its next call."""
    if entering:
        return part.register_forward_pre_hook(lambda _, inputs: means.append(_mean(inputs[0])))
    return part.register_forward_hook(_keep_output(means))


def _keep_output(means: list[Tensor]) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        means.append(_mean(output[0] if isinstance(output, tuple) else output))

    return hook


def _mean(activation_BTH: Tensor) -> Tensor:
    """Mean over H, in at least float32."""
    return activation_BTH.mean(-1, dtype=torch.promote_types(activation_BTH.dtype, torch.float32))


def _mean_logits(target: Target, final_BTH: Tensor) -> Tensor:
    """Mean over V of the logits [B,T], with at most `most_logits` in memory at a time."""
    rows = final_BTH.flatten(0, 1).split(
        max(1, most_logits(final_BTH.device) // target.shape.vocab_size)
    )
    return torch.cat([_mean(target.logits(part)) for part in rows]).view(final_BTH.shape[:2])
