"""Loading a mixture's experts ahead of time: an accelerated residual says which ones later layers
will need (M2R2, Bhendawade et al. 2025, arXiv 2502.02040). How is inferred from its abstract.

At rate R the accelerated stream behind layer l stands for the slow one before layer R·l. The frozen
routers of layers R·l … R·l + R − 1 read it, and their experts are loaded while the layers between
compute. The stream leaves out the experts of the layers that it passes.

Shape legend: M rows of text, E experts, K experts per token, H hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modules.contracts.batches import PADDING_DOCUMENT, TextBatch
from modules.contracts.losses import Losses, Mean
from modules.contracts.shapes import TargetShape
from modules.contracts.trainable import Footprint, Trainable, TrainingResult
from modules.drafters.self_speculative.accelerated import AcceleratedStream, Streams
from modules.losses.averages import SharedCount

if TYPE_CHECKING:
    from modules.contracts.target import Target

Experts = frozenset[int]


@dataclass(frozen=True)
class Loading:
    """A device whose fast memory holds some of the experts.

    slots: experts that it holds, of all layers together. transfer: seconds to load one expert.
    compute: seconds of a layer.
    """

    slots: int
    transfer: float
    compute: float

    def __post_init__(self) -> None:
        """Refuse sizes that no device has."""
        if self.slots < 1 or min(self.transfer, self.compute) < 0:
            raise ValueError(
                f"slots must be at least 1, transfer and compute at least 0 seconds: {self}"
            )


@dataclass(frozen=True)
class Simulated:
    """What loading costs: seconds of all tokens, experts that were needed, and those of them that
    were there when their layer began.
    """

    seconds: float
    needed: int
    hits: int

    @property
    def hit_rate(self) -> float:
        """Share of the needed experts that were there."""
        return self.hits / max(1, self.needed)


class FastMemory:
    """Experts by (layer, expert); the least recently used one makes room."""

    def __init__(self, slots: int) -> None:
        self.slots, self._held = slots, OrderedDict[tuple[int, int], None]()

    def holds(self, layer: int, expert: int) -> bool:
        """Whether an expert is there; it is then the most recently used one."""
        there = (layer, expert) in self._held
        if there:
            self._held.move_to_end((layer, expert))
        return there

    def load(self, layer: int, expert: int) -> None:
        """Put an expert there."""
        self._held[layer, expert] = None
        self._held.move_to_end((layer, expert))
        if len(self._held) > self.slots:
            self._held.popitem(last=False)


def simulate(
    needed: Sequence[Sequence[Experts]],
    predicted: Sequence[Mapping[int, Mapping[int, Experts]]],
    loading: Loading,
) -> Simulated:
    """Decode tokens one after the other: at each layer, experts that are missing are loaded before
    it computes, and predicted ones of later layers while it does, which takes
    max(compute, transfer).

    Args:
        needed: experts of every token and layer.
        predicted: of every token, by the layer at which they are known, the experts of later
            layers; empty without prediction.
        loading: sizes and times.
    """
    memory, seconds, count, hits = FastMemory(loading.slots), 0.0, 0, 0
    for token, layers in enumerate(needed):
        for layer, experts in enumerate(layers):
            # 1. Wait for what is missing.
            missing = [expert for expert in sorted(experts) if not memory.holds(layer, expert)]
            for expert in missing:
                memory.load(layer, expert)
            count, hits = count + len(experts), hits + len(experts) - len(missing)
            # 2. Compute, and load ahead.
            ahead = [
                (later, expert)
                for later, guessed in predicted[token].get(layer, {}).items()
                for expert in sorted(guessed)
                if not memory.holds(later, expert)
            ]
            for later, expert in ahead:
                memory.load(later, expert)
            seconds += len(missing) * loading.transfer
            seconds += max(loading.compute, len(ahead) * loading.transfer)
    return Simulated(seconds, count, hits)


class ExpertPredictor(Trainable):
    """Adapters of an accelerated stream that predicts the experts of later layers; the routers are
    the target's, which stays as it is.

    Loss: −(1/K) Σ log p(e) over a layer's true experts e, with p its router's distribution on the
    accelerated state; the mean over rows and layers.

    Args:
        shape: the target's dimensions (a Mixtral-type model).
        rate: R, how many times faster the stream moves.
        rank, query_rank: of its adapters, as in `AcceleratedStream`.
        slots: experts that fast memory holds in the report's simulation.
        transfer: seconds to load one expert there, in units of a layer's compute.
    """

    def __init__(
        self,
        shape: TargetShape,
        rate: int = 2,
        rank: int = 64,
        query_rank: int = 16,
        slots: int = 16,
        transfer: float = 1.0,
    ) -> None:
        super().__init__()
        depth = shape.num_layers
        if not 2 <= rate < depth:
            raise ValueError(
                f"rate must lie between 2 and {depth - 1}, below the {depth} layers, got {rate}"
            )
        self.shape, self.rate, self.loading = shape, rate, Loading(slots, transfer, 1.0)
        # The stream ends where it stands for the last layer.
        passed = (depth - 1) // rate
        self.stream = AcceleratedStream(
            shape, [passed, depth], rank, query_rank, list(range(passed)), "feed_forward"
        )

    def initialise(self, target: Target) -> None:
        """ValueError for a target without a mixture of experts."""
        self.stream.check(target)
        routers(target)

    @property
    def online(self) -> bool:
        """True: both streams pass through the target in every step."""
        return True

    def footprint(self, rows: int, length: int) -> Footprint:
        """That of the stream."""
        return self.stream.footprint(rows, length)

    def guesses(self, streams: Streams, target: Target) -> Iterator[tuple[int, int, Tensor]]:
        """The layer behind which a guess is known, the one that it is about, and that one's
        router's logits [...,E] on the accelerated state.
        """
        for reached, state in enumerate(streams.accelerated[0][1:], start=1):
            for layer in range(self.rate * reached, self.rate * (reached + 1)):
                if layer < self.shape.num_layers:
                    block = target.architecture.layers[layer]
                    logits = block.mlp.gate(block.post_attention_layernorm(state))[0]
                    yield reached, layer, logits.unflatten(0, state.shape[:-1])

    def both(self, batch: TextBatch, target: Target) -> tuple[Streams, list[Tensor]]:
        """Both streams, and the experts [B,T,K] that every layer of the slow one chose."""
        with torch.autocast(batch.input_ids.device.type, enabled=False), recorded(target) as chosen:
            streams = self.stream.streams(batch, target)
        # The routers ran in the slow stream only.
        return streams, [experts.unflatten(0, batch.input_ids.shape) for experts in chosen]

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The cross-entropy of the true experts; by layer, how many of them are guessed."""
        streams, chosen = self.both(batch, target)
        real_BT = batch.document_ids != PADDING_DOCUMENT
        total, metrics = torch.zeros((), device=real_BT.device), {}
        listed, count = list(self.guesses(streams, target)), SharedCount(real_BT.sum())
        for _, layer, logits in listed:
            experts_MK, logits_ME = chosen[layer][real_BT], logits[real_BT]
            losses_M = -logits_ME.log_softmax(-1).gather(1, experts_MK).mean(1)
            total = total + losses_M.sum() / count.divisor() / len(listed)
            guessed_MK = logits_ME.topk(experts_MK.shape[1], dim=-1).indices
            right = (guessed_MK[..., None] == experts_MK[:, None]).any(1).sum()
            metrics[f"hit_rate_{layer}"] = Mean(right, experts_MK.numel() * torch.ones_like(right))
        return Losses(total, metrics)

    @torch.no_grad()
    def finish(self, batches: Iterable[TextBatch], target: Target) -> TrainingResult:
        """Hit rates and simulated seconds of the held-out text, with predictions and without."""
        needed: list[list[Experts]] = []
        predicted: list[dict[int, dict[int, Experts]]] = []
        for batch in batches:
            streams, chosen = self.both(batch, target)
            real_BT = batch.document_ids != PADDING_DOCUMENT
            sets = [experts[real_BT].tolist() for experts in chosen]
            needed += [[frozenset(row) for row in layers] for layers in zip(*sets, strict=True)]
            count, width = len(sets[0]), chosen[0].shape[-1]
            guessed: list[dict[int, dict[int, Experts]]] = [{} for _ in range(count)]
            for reached, layer, logits in self.guesses(streams, target):
                best = logits[real_BT].topk(width, dim=-1).indices.tolist()
                for token, experts in zip(guessed, best, strict=True):
                    token.setdefault(reached, {})[layer] = frozenset(experts)
            predicted += guessed
        ahead = simulate(needed, predicted, self.loading)
        demand = simulate(needed, [{}] * len(needed), self.loading)
        return TrainingResult(
            {
                "held_out/hit_rate": ahead.hit_rate,
                "held_out/hit_rate_on_demand": demand.hit_rate,
                "held_out/loading_speedup": demand.seconds / max(ahead.seconds, 1e-12),
            }
        )


def routers(target: Target) -> list[nn.Module]:
    """The router of every layer. ValueError: the layers have none."""
    listed = [getattr(layer.mlp, "gate", None) for layer in target.architecture.layers]
    if any(router is None for router in listed):
        raise ValueError(
            f"target {target.name!r} has layers without a router of experts: use a Mixtral-type one"
        )
    return [router for router in listed if router is not None]


@contextmanager
def recorded(target: Target) -> Iterator[list[Tensor]]:
    """The experts [M,K] that each layer's router chooses, in the order of the layers."""
    chosen: list[Tensor] = []

    def hook(_: nn.Module, __: Any, out: tuple[Tensor, ...]) -> None:
        chosen.append(out[2])

    with ExitStack() as undo:
        for router in routers(target):
            undo.callback(router.register_forward_hook(hook).remove)
        yield chosen
