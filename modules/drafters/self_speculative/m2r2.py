"""M2R2, mixture of multi-rate residuals: an accelerated residual stream guesses the last layer's
state at an early gate (Bhendawade et al. 2025, arXiv 2502.02040). It drafts for the target here;
`early_exit.py` decodes with it alone. What the abstract does not say is inferred.

Shape legend: B sequences, T tokens of a packed row, W frontier nodes, M training rows, J states of
an interval, H hidden size, C latent size, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import TreeBuilder
from modules.contracts.losses import Losses, Mean
from modules.contracts.rows import Rows
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.trainable import Footprint, Stage, TrainingResult
from modules.drafters.self_speculative.accelerated import (
    AcceleratedStream,
    GateLabels,
    Streams,
    normalised,
)
from modules.drafters.self_speculative.base import SelfSpeculative, SelfState
from modules.drafters.self_speculative.gate_report import GateReport
from modules.losses.averages import SharedCount
from modules.losses.chunked import Head
from modules.trees.confident import ConfidentChain
from modules.trees.static import StaticTree

if TYPE_CHECKING:
    from modules.contracts.target import Target


class LatentRouter(nn.Module):
    """Accelerated residual latent attention (ARLA): from how a residual moved across the layers of
    an interval, the logit of the probability that the gate's best token is the target's.

    c_j = W_c norm(a^j); a single head attends from the last c_j to all of them.

    Args:
        size: H of the states.
        latent: C.
    """

    def __init__(self, size: int, latent: int) -> None:
        super().__init__()
        self.compress = nn.Linear(size, latent, bias=False)
        self.query, self.key, self.value = (nn.Linear(latent, latent, bias=False) for _ in range(3))
        self.out = nn.Linear(latent, 1)

    def forward(self, states_MJH: Tensor) -> Tensor:
        """States of an interval, its gate's last [..., J, H] -> logits [...]."""
        latent = self.compress(normalised(states_MJH.to(self.compress.weight.dtype)))
        query = self.query(latent[..., -1:, :])
        scores = (query * self.key(latent)).sum(-1) / latent.shape[-1] ** 0.5
        mixed = (scores.softmax(-1)[..., None] * self.value(latent)).sum(-2)
        return self.out(mixed)[..., 0]


class M2R2(SelfSpeculative):
    """An accelerated stream with gates, and a router that says where a token may leave.

    Two stages: first the stream's adapters (`AcceleratedStream`), then, with those fixed, a router
    per gate. Loss of the second: the binary cross-entropy of whether the gate's best token is the
    target's, mean over the gates.

    Drafts come from the first gate. The slow rows of a draft run the layers up to there as
    verification does, in the same call as the accelerated ones, and are handed over with the tree.

    Args:
        shape: the target's dimensions.
        gates, rank, query_rank, cheap_layers, cheap, kl, feature, weights: of the stream, see
            `AcceleratedStream`.
        stream_epochs, stream_lr: epochs and peak learning rate of its training.
        latent: C, size of the router's states.
        draft_vocabulary: how many token ids can be drafted; null for all. Training and early exits
            use all.
        draft_length: tokens of a chain at most.
        least_confidence: drafting stops where no token is as probable; 0 never stops.
    """

    def __init__(
        self,
        shape: TargetShape,
        gates: list[int] | int = 4,
        rank: int = 64,
        query_rank: int = 16,
        cheap_layers: list[int] | None = None,
        cheap: Literal["attention", "feed_forward", "layer"] = "feed_forward",
        kl: float = 1.0,
        feature: float = 0.1,
        weights: Literal["depth", "equal"] = "depth",
        stream_epochs: int = 2,
        stream_lr: float = 2e-4,
        latent: int = 64,
        draft_vocabulary: int | None = None,
        draft_length: int = 4,
        least_confidence: float = 0.0,
    ) -> None:
        # 1. Check the settings.
        if min(stream_epochs, latent, draft_length) < 1 or stream_lr <= 0:
            raise ValueError(
                "stream_epochs, latent and draft_length must be at least 1 and stream_lr above 0, "
                f"got {stream_epochs}, {latent}, {draft_length} and {stream_lr}"
            )
        if not 0 <= least_confidence <= 1:
            raise ValueError(f"least_confidence must be from 0 to 1, got {least_confidence}")
        super().__init__(shape, 1, draft_vocabulary, decay=1.0)
        # 2. The stream, which has a stage of its own, and the routers.
        self.stream = AcceleratedStream(
            shape, gates, rank, query_rank, cheap_layers, cheap, kl, feature, weights
        )
        self.stream.requires_grad_(False)
        self.stream_epochs, self.stream_lr = stream_epochs, stream_lr
        self.routers = nn.ModuleList(
            LatentRouter(shape.hidden_size, latent) for _ in self.stream.intervals
        )
        # 3. A chain of drafts.
        self._builder: TreeBuilder = (
            ConfidentChain(draft_length, least_confidence)
            if least_confidence
            else StaticTree.chain(draft_length)
        )
        self._budget = draft_length

    def initialise(self, target: Target) -> None:
        """Refuse a target whose layers lack parts that the adapters change."""
        self.stream.check(target)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stream is trained before the routers."""
        return (Stage("stream", self.stream, self.stream_epochs, self.stream_lr),)

    @property
    def trained_size(self) -> int:
        """Numbers in the routers and in the stream's adapters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def head(self, depth: int, target: Target) -> Head:
        """The target's LM head on the accelerated stream."""
        return lambda final: target.logits(final, self.vocabulary_D)

    # -- training ----------------------------------------------------------------------------------

    def footprint(self, rows: int, length: int) -> Footprint:
        """That of the stream's stage, which is the larger one."""
        return self.stream.footprint(rows, length)

    @property
    def training_states(self) -> tuple[StateName, ...]:
        """No cached states: both streams run in every step."""
        return ()

    @property
    def online(self) -> bool:
        """True: both streams pass through the target in every step."""
        return True

    def teacher_forced(self, batch: TextBatch, target: Target, rows: Any) -> Iterator[Tensor]:
        """The LM head's inputs [M,H] at the first gate: a single draft step."""
        streams = self._streams(batch, target)
        final = target.final_norm(streams.accelerated[0][-1])
        yield final.flatten(0, 1)[rows.flat_MK1[:, 1]]

    @torch.no_grad()
    def _streams(self, batch: TextBatch, target: Target) -> Streams:
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            return self.stream.streams(batch, target)

    def routed(
        self, streams: Streams, labels: GateLabels, target: Target
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Gate by gate: the router's logits [M], and whether the best token is the target's [M]."""
        for router, states in zip(self.routers, streams.accelerated, strict=True):
            chosen = [state.flatten(0, 1)[labels.flat_M] for state in states]
            yield router(torch.stack(chosen, dim=1)), labels.agrees(chosen[-1], target)

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The routers' binary cross-entropy; as metrics how often gates agree with the target, with
        the stream and in validation without it (`lens`).
        """
        streams = self._streams(batch, target)
        labels = GateLabels.of(batch, streams, target)
        total, metrics = torch.zeros((), device=batch.input_ids.device), {}
        count = torch.as_tensor(len(labels.flat_M), device=total.device)
        shared, gates = SharedCount(count), self.stream.gates
        for gate, (logits_M, right_M) in zip(gates, self.routed(streams, labels, target)):
            wanted_M = right_M.to(logits_M.dtype)
            losses_M = F.binary_cross_entropy_with_logits(logits_M, wanted_M, reduction="none")
            total = total + losses_M.sum() / shared.divisor() / len(self.routers)
            metrics[f"router_loss_{gate}"] = Mean(losses_M.detach().sum(), count)
            metrics[f"router_top1_{gate}"] = Mean(((logits_M > 0) == right_M).sum(), count)
            metrics[f"agreement_{gate}"] = Mean(right_M.sum(), count)
            if not self.training:
                slow_MH = streams.slow[gate].flatten(0, 1)[labels.flat_M]
                metrics[f"lens_agreement_{gate}"] = Mean(
                    labels.agrees(slow_MH, target).sum(), count
                )
        return Losses(total, metrics)

    @torch.no_grad()
    def finish(self, batches: Iterable[TextBatch], target: Target) -> TrainingResult:
        """Agreement and calibration of every gate on the held-out batches, and a page of both
        streams layer by layer.
        """
        report = GateReport(self.stream.gates)
        for batch in batches:
            streams = self._streams(batch, target)
            labels = GateLabels.of(batch, streams, target)
            for gate, (logits_M, right_M) in enumerate(self.routed(streams, labels, target)):
                report.add_routed(gate, logits_M.sigmoid(), right_M)
            report.add_layers(streams, labels, target)
        return report.result()

    # -- decoding ----------------------------------------------------------------------------------

    @property
    def shared_layers(self) -> int:
        """The layers up to the first gate."""
        return self.stream.gates[0]

    def run(self, state: SelfState, rows: Rows, embeddings_BWH: Tensor) -> tuple[Tensor, Tensor]:
        """The slow stream at the first gate, and the normalised accelerated one."""
        count, gate = embeddings_BWH.shape[1], self.shared_layers
        reached, accelerated = self.stream.decoded(
            state.session, rows, embeddings_BWH, count, 0, gate
        )
        return reached, state.context.target.final_norm(accelerated[-1])
