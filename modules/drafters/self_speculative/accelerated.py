"""A second, accelerated residual through the target's layers (M2R2, Bhendawade et al. 2025, arXiv
2502.02040), with trained adapters. The paper's equations are not public: those below are inferred.

In the interval of layers E_{g−1} … E_g the accelerated stream starts from the slow one, a = h, and
runs the same frozen layers with
    a ← a + Attn(W_q norm(a) + adapter; K, V of the slow stream) + MLP(norm(·)) + B SiLU(C norm(a)).
At gate E_g it should be where the slow stream is behind the last layer L: rate L / E_g.

Shape legend: B sequences, T tokens of a packed row, N rows of a call, M training rows, H hidden
size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.batches import TextBatch
from modules.contracts.losses import Losses, Mean
from modules.contracts.rows import Rows
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.trainable import Footprint, GradientLayers, Trainable
from modules.drafters.heads.base import refuse_unknown
from modules.losses.averages import SharedCount
from modules.losses.chunked import (
    Distributions,
    accuracy,
    cross_entropy,
    greedy_tokens,
    next_token_rows,
    smooth_l1,
    target_distributions,
)
from modules.losses.divergences import forward_kl
from modules.target.adapters import LowRank
from modules.target.kv_cache import AppendedCache

if TYPE_CHECKING:
    from modules.contracts.target import Session, Target

RunInterval = Callable[[Tensor, int, int], dict[StateName, Tensor]]
"""Rows [B,N,H], first layer and gate -> the `interval_states` of accelerated rows."""
PARTS = {"attention": ("self_attn",), "feed_forward": ("mlp",), "layer": ("self_attn", "mlp")}
"""Modules of a layer that a cheap layer of the stream leaves out."""


def normalised(hidden: Tensor) -> Tensor:
    """States [..., H] divided by their root mean square."""
    return F.rms_norm(hidden, hidden.shape[-1:])


class StreamAdapter(nn.Module):
    """What the accelerated stream adds to one layer: nothing at the start."""

    def __init__(self, shape: TargetShape, rank: int, query_rank: int) -> None:
        super().__init__()
        size, width = shape.hidden_size, shape.num_heads * shape.head_dim
        self.residual = LowRank(size, size, rank)
        self.query = LowRank(size, width, query_rank) if query_rank else None

    def added(self, hidden: Tensor) -> Tensor:
        """B SiLU(C norm(a)), [..., H]."""
        states = normalised(hidden.to(self.residual.down.dtype))
        inner = F.silu(F.linear(states, self.residual.down))
        return F.linear(inner, self.residual.up).to(hidden.dtype)

    def queries(self, normed: Tensor) -> Tensor:
        """What is added to the queries of normalised states [..., H]."""
        assert self.query is not None
        states = normed.to(self.query.down.dtype)
        return F.linear(F.linear(states, self.query.down), self.query.up).to(normed.dtype)


class _Nothing(nn.Module):
    """Replaces attention or the feed-forward network where only the rest of a layer runs."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.pair else nothing


@dataclass(frozen=True)
class Streams:
    """Both streams over the rows of a batch.

    slow: h^l [B,T,H] by layer, `pre_norm` behind the last one. accelerated: a^l by interval (from 0
    on), each from the interval's start to its gate.
    """

    slow: Mapping[StateName, Tensor]
    accelerated: Sequence[Sequence[Tensor]]

    @property
    def last_BTH(self) -> Tensor:
        """The slow stream behind the last layer."""
        return self.slow["pre_norm"]


class AcceleratedStream(Trainable):
    """Adapters of the accelerated stream, one for each layer below the last gate but one.

    Loss: Σ_g w_g [CE(gate g, data) + kl · KL(p ‖ gate g) + feature · SmoothL1(a, h^L)] over the
    gates below the last layer, with p the target's distribution and gate g's the frozen norm and LM
    head on a. The slow stream has no gradient.

    Args:
        shape: the target's dimensions.
        gates: layers at which the stream may be read, ascending to the last layer; or how many,
            evenly spaced.
        rank: of B and C.
        query_rank: of the adapter of the queries; 0 for none. It needs layers with `self_attn`.
        cheap_layers: layers, counted from 0, where the stream leaves out a frozen part.
        cheap: that part: `attention`, `feed_forward`, or both (`layer`).
        kl, feature: weights of the two further terms.
        weights: w_g: `depth` is g / Σ g, `equal` the same for all.
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
    ) -> None:
        super().__init__()
        # 1. Check the settings.
        refuse_unknown("cheap", cheap, tuple(PARTS))
        refuse_unknown("weights", weights, ("depth", "equal"))
        if rank < 1 or min(kl, feature) < 0:
            raise ValueError(
                f"rank must be at least 1, kl and feature at least 0: {rank}, {kl}, {feature}"
            )
        self.gates = checked_gates(gates, shape.num_layers)
        self.cheap_layers, self.cheap = frozenset(cheap_layers or ()), cheap
        wrong = [layer for layer in self.cheap_layers if not 0 <= layer < self.adapted_layers]
        if wrong:
            raise ValueError(
                f"cheap_layers has {wrong[0]}: name layers from 0 to {self.adapted_layers - 1}, "
                "which the stream passes"
            )
        # 2. An adapter for each layer that the stream passes.
        self.shape, self.kl, self.feature, self.weights = shape, kl, feature, weights
        self.adapters = nn.ModuleList(
            StreamAdapter(shape, rank, query_rank) for _ in range(self.adapted_layers)
        )

    @property
    def adapted_layers(self) -> int:
        """Layers below the last gate that the stream reaches; at the last layer it is the slow
        stream.
        """
        return self.gates[-2]

    @property
    def intervals(self) -> list[tuple[int, int]]:
        """First layer and gate of every interval that the stream runs."""
        return list(pairwise([0, *self.gates[:-1]]))

    @property
    def gate_weights(self) -> list[float]:
        """The weight w_g of every gate below the last layer."""
        count = len(self.intervals)
        depths = [g + 1.0 if self.weights == "depth" else 1.0 for g in range(count)]
        return [depth / sum(depths) for depth in depths]

    def check(self, target: Target) -> None:
        """ValueError for layers without the parts that the adapters change."""
        needed = {"self_attn.q_proj"} if self.adapters[0].query is not None else set()
        needed |= set(PARTS[self.cheap]) if self.cheap_layers else set()
        names = {name for name, _ in target.architecture.layers[0].named_modules()}
        if missing := sorted(needed - names):
            raise ValueError(
                f"target {target.name!r} has no {missing[0]} in its layers: set query_rank to 0 "
                "and leave out cheap_layers, or use a Llama-type target"
            )

    # -- running both streams ----------------------------------------------------------------------

    @contextmanager
    def attached(self, target: Target, start: int, stop: int, rows: int) -> Iterator[None]:
        """While it lasts, the last `rows` rows of a call through these layers are the accelerated
        stream's.
        """
        with ExitStack() as undo:
            for index in range(start, stop):
                layer, adapter = target.architecture.layers[index], self.adapters[index]
                added = layer.register_forward_hook(_adding(adapter.added, rows), with_kwargs=True)
                undo.callback(added.remove)
                if adapter.query is not None:
                    module = layer.self_attn.q_proj
                    queried = module.register_forward_hook(
                        _adding(adapter.queries, rows), with_kwargs=True
                    )
                    undo.callback(queried.remove)
            yield

    @contextmanager
    def thinned(self, target: Target, start: int, stop: int) -> Iterator[None]:
        """While it lasts, the cheap ones of these layers run without their frozen part."""
        with ExitStack() as undo:
            for index in self.cheap_layers & set(range(start, stop)):
                layer = target.architecture.layers[index]
                for name in PARTS[self.cheap]:
                    undo.callback(layer.register_module, name, layer.get_submodule(name))
                    layer.register_module(name, _Nothing(name == "self_attn"))
            yield

    def streams(self, batch: TextBatch, target: Target) -> Streams:
        """Both streams over a batch; only the accelerated one has a gradient."""
        ids, rows, depth = batch.input_ids, batch.rows(), self.shape.num_layers
        embeddings, names = target.embed(ids), (*range(1, depth), "pre_norm")
        # 1. The slow stream, whose keys and values stay in a cache.
        cache = AppendedCache(depth, len(ids), 2 * ids.shape[1])
        with torch.no_grad():
            slow: dict[StateName, Tensor] = {
                0: embeddings,
                **target.forward_rows(embeddings, rows, names, cache),
            }
        # 2. The accelerated one sees the slow rows alone, also at its own position.
        beside = beside_slow(rows, ids.shape[1])

        def run(hidden_BNH: Tensor, start: int, stop: int) -> dict[StateName, Tensor]:
            names = interval_states(start, stop)
            return target.forward_rows(hidden_BNH, beside, names, cache, (start, stop))

        accelerated = [
            self.interval(target, slow[start], start, stop, run) for start, stop in self.intervals
        ]
        return Streams(slow, accelerated)

    def interval(
        self, target: Target, slow_BNH: Tensor, start: int, stop: int, run: RunInterval
    ) -> list[Tensor]:
        """a^l [B,N,H] from the start of an interval to its gate, by a call of its own."""
        with (
            self.attached(target, start, stop, slow_BNH.shape[1]),
            self.thinned(target, start, stop),
        ):
            states = run(slow_BNH, start, stop)
        return [slow_BNH, *(states[name] for name in interval_states(start, stop))]

    def decoded(
        self, session: Session, rows: Rows, slow_BNH: Tensor, last: int, start: int, stop: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Both streams of an interval behind committed text: the slow one of all rows [B,N,H] at
        the gate, and a^l of the last ones [B,last,H] from the start to the gate.

        One call runs both, so that weights are read once; a cheap layer needs a call for each.
        """
        target, names, count = session.target, interval_states(start, stop), slow_BNH.shape[1]
        some = Rows(rows.position_ids_BN[:, count - last :], rows.visible_BNJ[:, count - last :])
        beside, first_BNH = beside_slow(some, last), slow_BNH[:, count - last :]
        session.reserve(beside.visible_BNJ.shape[2])
        # 1. A cheap layer: the slow rows first.
        if self.cheap_layers & set(range(start, stop)):
            reached = session.run_layers(rows, slow_BNH, start, stop)["pre_norm"]

            def run(hidden_BNH: Tensor, start: int, stop: int) -> dict[StateName, Tensor]:
                return session.run_layers(beside, hidden_BNH, start, stop, names)

            return reached, self.interval(target, first_BNH, start, stop, run)
        # 2. Otherwise slow rows, and accelerated ones after them.
        visible = torch.cat([F.pad(rows.visible_BNJ, (0, last)), beside.visible_BNJ], dim=1)
        positions = torch.cat([rows.position_ids_BN, beside.position_ids_BN], dim=1)
        hidden = torch.cat([slow_BNH, first_BNH], dim=1)
        with self.attached(target, start, stop, last):
            states = session.run_layers(Rows(positions, visible), hidden, start, stop, names)
        accelerated = [states[name][:, count:] for name in names]
        return states["pre_norm"][:, :count], [first_BNH, *accelerated]

    # -- training ----------------------------------------------------------------------------------

    @property
    def online(self) -> bool:
        """True: both streams pass through the target in every step."""
        return True

    def footprint(self, rows: int, length: int) -> Footprint:
        """The layers that the accelerated stream passes, which have a gradient."""
        layers = GradientLayers(self.shape, adapted=True)
        width = self.shape.vocab_size
        return Footprint(
            rows * length, length, len(self.intervals), width, soft=True, layers=layers
        )

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The weighted losses of the gates; their agreement with the target as metrics."""
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            streams = self.streams(batch, target)
        labels = GateLabels.of(batch, streams, target)
        total, metrics = torch.zeros((), device=batch.input_ids.device), {}
        count = torch.as_tensor(len(labels.flat_M), device=total.device)
        shared = SharedCount(count)
        for (_, gate), weight, states in zip(
            self.intervals, self.gate_weights, streams.accelerated, strict=True
        ):
            reached_MH = states[-1].flatten(0, 1)[labels.flat_M]
            losses_M, agreement = labels.compare(reached_MH, target, self.kl)
            if self.feature:
                losses_M = losses_M + self.feature * smooth_l1(reached_MH, labels.last_MH)
            total = total + weight * losses_M.sum() / shared.divisor()
            metrics[f"loss_{gate}"] = Mean(losses_M.detach().sum(), count)
            metrics[f"agreement_{gate}"] = agreement
        return Losses(total, metrics)


def interval_states(start: int, stop: int) -> tuple[StateName, ...]:
    """Names of the states behind each layer of an interval, in a call of these layers alone."""
    return (*range(start + 1, stop), "pre_norm")


def beside_slow(rows: Rows, count: int) -> Rows:
    """Accelerated rows at the places of slow ones: they see what those see, these included, and no
    accelerated row (the last `count` columns).
    """
    return Rows(rows.position_ids_BN, F.pad(rows.visible_BNJ, (0, count)))


@dataclass(frozen=True)
class GateLabels:
    """What a gate is compared with at the rows of a batch that predict an assistant token.

    flat_M: their flat positions. labels_M: the data's next tokens. greedy_M: the target's.
    last_MH: the slow stream behind the last layer. distributions: the target's.
    """

    flat_M: Tensor
    labels_M: Tensor
    greedy_M: Tensor
    last_MH: Tensor
    distributions: Distributions
    size: int

    @staticmethod
    def of(batch: TextBatch, streams: Streams, target: Target) -> GateLabels:
        """Those of a batch."""
        flat_M, labels_M = next_token_rows(batch)
        final_BTH, size = target.final_norm(streams.last_BTH), target.shape.vocab_size
        greedy_M = greedy_tokens(target.unrounded_logits, final_BTH.flatten(0, 1)[flat_M], size)
        last_MH = streams.last_BTH.flatten(0, 1)[flat_M]
        distributions = target_distributions(target.unrounded_logits, final_BTH, flat_M, size)
        return GateLabels(flat_M, labels_M, greedy_M, last_MH, distributions, size)

    def compare(self, reached_MH: Tensor, target: Target, kl: float) -> tuple[Tensor, Mean]:
        """CE + kl · KL of a gate's states [M,H], per row, and how often its best token is the
        target's.
        """
        final_MH, head = target.final_norm(reached_MH), target.unrounded_logits
        losses_M = cross_entropy(final_MH, head, self.labels_M, self.size)[0]
        divergences_M, ranks_M = cross_entropy(
            final_MH, head, self.greedy_M, self.size, self.distributions, self.flat_M, forward_kl
        )
        agreement = accuracy(ranks_M, torch.ones_like(ranks_M, dtype=torch.bool), 1)
        return losses_M + kl * divergences_M, agreement

    def agrees(self, reached_MH: Tensor, target: Target) -> Tensor:
        """bool [M]: whether the best token behind these states is the target's."""
        final_MH = target.final_norm(reached_MH)
        return greedy_tokens(target.unrounded_logits, final_MH, self.size) == self.greedy_M


def _adding(change: Any, rows: int) -> Any:
    """A hook that adds `change` of a module's last input rows to its last output rows."""

    def hook(_: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
        hidden = args[0] if args else kwargs["hidden_states"]
        first = hidden.shape[1] - rows
        return torch.cat([out[:, :first], out[:, first:] + change(hidden[:, first:])], dim=1)

    return hook


def checked_gates(gates: list[int] | int, layers: int) -> list[int]:
    """Gates as layers, ascending to the last one.

    Raises:
        ValueError: fewer than two, or not ascending to the last layer.
    """
    if isinstance(gates, int):
        # Shallow models have fewer layers than gates.
        evenly = {max(1, round(layers * (g + 1) / gates)) for g in range(gates)}
        gates = sorted(evenly)
    if len(gates) < 2 or gates != sorted(set(gates)) or gates[0] < 1 or gates[-1] != layers:
        raise ValueError(
            f"gates must be at least two layers that ascend to {layers}, the target's last one, "
            f"got {gates}"
        )
    return gates
