"""The optimisers of a training: AdamW, or Muon for the matrices of hidden layers and AdamW for the
rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from modules.contracts.trainable import Trainable
from train.settings import OptimizerSettings

Groups = list[dict[str, Any]]


def adamw(groups: list[dict[str, Any]], settings: OptimizerSettings) -> AdamW:
    """Fused AdamW: one pass over each parameter, on a CPU a fifth of the time of a loop over
    operations.

    Fused AdamW can unscale float16's gradients itself, but Lightning then refuses to clip them, so
    that is switched off.
    """
    optimizer = AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def decay_groups(declared: Mapping[str, Any], settings: OptimizerSettings) -> list[dict[str, Any]]:
    """One declared group as one or two optimiser groups: only matrices are decayed, by the group's
    `weight_decay` or else the recipe's.
    """
    decay = declared.get("weight_decay", settings.weight_decay)
    parameters, rate = list(declared["params"]), settings.lr * declared.get("lr_scale", 1.0)
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return [{**group, "lr": rate} for group in groups if group["params"]]


def hidden_matrices(trainable: Trainable) -> list[Tensor]:
    """The weights that Muon trains: of linear layers between hidden states. Embeddings and LM heads
    have a row per token; a matrix of one row or column is a vector.
    """
    shape, drafted = trainable.arguments.get("shape"), trainable.arguments.get("draft_vocabulary")
    parts = list(trainable.modules())
    vocabularies = {part.num_embeddings for part in parts if isinstance(part, nn.Embedding)}
    vocabularies |= {drafted, getattr(shape, "vocab_size", None)}
    weights = (part.weight for part in parts if isinstance(part, nn.Linear))
    return [
        weight
        for weight in weights
        if weight.requires_grad and weight.shape[0] not in vocabularies and min(weight.shape) > 1
    ]


def split_hidden(declared: Sequence[Mapping[str, Any]], trainable: Trainable) -> tuple[Any, Groups]:
    """The declared groups without hidden matrices, and the groups of these.

    Raises:
        ValueError: the component has no hidden matrix.
    """
    wanted = {id(weight) for weight in hidden_matrices(trainable)}
    rest, hidden = [], []
    for group in declared:
        inside = [each for each in group["params"] if id(each) in wanted]
        outside = [each for each in group["params"] if id(each) not in wanted]
        hidden += [{**group, "params": inside}] if inside else []
        rest += [{**group, "params": outside}] if outside else []
    if not hidden:
        raise ValueError(
            f"optimizer.muon_lr is set, but {type(trainable).__name__} has no matrices between "
            "hidden states: set it to null"
        )
    return rest, hidden


def with_muon(hidden: Groups, groups: Groups, settings: OptimizerSettings) -> Optimizer:
    """Muon on the declared groups `hidden`, AdamW on the optimiser groups `groups`."""
    assert settings.muon_lr is not None
    matrices = [
        {
            "params": group["params"],
            "lr": settings.muon_lr * group.get("lr_scale", 1.0),
            "weight_decay": group.get("weight_decay", settings.weight_decay),
        }
        for group in hidden
    ]
    muon = Muon(matrices, lr=settings.muon_lr, adjust_lr_fn="match_rms_adamw")
    return Together([muon, adamw(groups, settings)] if groups else [muon])


class Together(Optimizer):
    """Optimisers of different parameters as one: a list of groups, a state, a step. Lightning,
    schedules, clipping, loss scaling and checkpoints see no difference.

    Args:
        parts: the optimisers; their groups and states become those of the whole.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let every part use the whole's state, and its own of the whole's groups."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[start:end]
            start = end

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """A step of every part, after the closure, whose result is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also hand the new groups and states to the parts."""
        super().load_state_dict(state_dict)
        self._share()
