"""Mean activations of the reference model, which masks are read from.

Shape legend: L layers, B sequences, T tokens of a row, H size of an activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from modules.core.batches import StateName, TextBatch

if TYPE_CHECKING:
    from modules.core.target import Target

Group = Literal["residual", "attention", "feed_forward", "logits"]
GROUPS: tuple[Group, ...] = get_args(Group)
_PARTS: dict[Group, tuple[str, ...]] = {"attention": ("self_attn", "attn"), "feed_forward": ("mlp", "fc2")}


def residual_states(target: Target) -> tuple[StateName, ...]:
    """Names of the residual stream behind each layer."""
    return (*range(1, target.shape.num_layers), "pre_norm")


@torch.no_grad()
def mean_activations(target: Target, batch: TextBatch, groups: Sequence[Group] = ("residual",)) -> list[Tensor]:
    """One tensor [L,B,T] per group: activations averaged over their dimension H (one "layer" for the logits).

    Raises ValueError when the target's layers have no such part.
    """
    names = residual_states(target)
    with ExitStack() as hooks:
        watched = {group: list(_watch(target, group, hooks)) for group in groups if group in _PARTS}
        states = target.features(batch, (*names, "final"))
    found = {str(group): torch.stack([means[0] for means in layers]) for group, layers in watched.items()}
    if "residual" in groups:
        found["residual"] = torch.stack([states[name].mean(-1) for name in names])
    if "logits" in groups:
        found["logits"] = target.logits(states["final"]).mean(-1)[None]
    return [found[group] for group in groups]


def _watch(target: Target, group: Group, hooks: ExitStack) -> Iterator[list[Tensor]]:
    """Per layer, a list that the next forward fills with the part's mean activation [B,T]."""
    for layer in target.anatomy.layers:
        part = next((getattr(layer, name) for name in _PARTS[group] if hasattr(layer, name)), None)
        if part is None:
            raise ValueError(f"activations {group!r}: the layers of target {target.name!r} have none of "
                             f"{', '.join(_PARTS[group])}: use 'residual'")
        means: list[Tensor] = []
        hooks.enter_context(part.register_forward_hook(_keep_mean(means)))
        yield means


def _keep_mean(means: list[Tensor]) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        means.append((output[0] if isinstance(output, tuple) else output).mean(-1))
    return hook
