"""`python -m train.throughput`: tokens per second of EAGLE-3's training step, compared with
SpecForge's where it is installed.

Forward and backward of three unrolled steps over one packed row, the same random ids, states,
weights and soft cross-entropy over the same draft vocabulary, the two in turn. SpecForge's drafter
is its `LlamaForCausalLMEagle3` (sdpa backend) called as its trainer calls it; its compiled Triton
loss needs a GPU, so the same sum is written out here. Equal losses are checked before anything is
timed. The package goes into this project's environment: `pip install --no-deps
specforge==0.2.0`.

Shape legend: B rows (1), T tokens, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from configs.command_line.loading import config_parser, exit_with, parse
from modules.contracts.batches import TextBatch
from modules.contracts.target import Target
from modules.drafters.feature.eagle3 import Eagle3
from modules.runtime.phase_timer import now
from modules.target.loading import load_target

Step = Callable[[], Tensor]
"""Forward and backward; returns the loss."""


@dataclass(frozen=True)
class Comparison:
    """Settings of the comparison.

    Args:
        target: the model that gives the shapes.
        tokens: T of the row.
        vocabulary: D.
        steps: draft steps unrolled.
        assistant: share of trained tokens, at the end of the row.
        precision: float32, or bfloat16 for matrix products under autocast.
        repeats: timed passes of each.
        device: a torch device; by default the GPU if there is one.
    """

    target: str = "smollm2-135m"
    tokens: int = 1024
    vocabulary: int = 8192
    steps: int = 3
    assistant: float = 1.0
    precision: str = "float32"
    repeats: int = 9
    device: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range."""
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision {self.precision!r} is unknown: use float32 or bfloat16")
        if not 0 < self.assistant <= 1:
            raise ValueError(f"assistant must lie in (0, 1], got {self.assistant}")


def packed_row(settings: Comparison, target: Target, names: Sequence[Any]) -> TextBatch:
    """One document of random tokens that fills the row, all in the draft vocabulary, with random
    states.
    """
    ids_BT = torch.randint(settings.vocabulary, (1, settings.tokens))
    order = torch.arange(settings.tokens)[None]
    states = {
        name: torch.randn(1, settings.tokens, target.shape.hidden_size, device=target.device)
        for name in names
    }
    counted_BT = order >= settings.tokens * (1 - settings.assistant)
    parts = [
        part.to(target.device) for part in (ids_BT, counted_BT, order, torch.zeros_like(order))
    ]
    return TextBatch(parts[0], parts[1], parts[2], parts[3], states)


def our_drafter(settings: Comparison, target: Target) -> Eagle3:
    """EAGLE-3 with the first D tokens as draft vocabulary."""
    drafter = Eagle3(target.shape, settings.vocabulary, steps=settings.steps)
    drafter.set_vocabulary(range(settings.vocabulary))
    drafter.initialise(target)
    return drafter.to(target.device)


def our_step(drafter: Eagle3, batch: TextBatch, target: Target, precision: str) -> Step:
    """A step with this project's loss."""

    def step() -> Tensor:
        drafter.zero_grad()
        with torch.autocast(target.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = drafter.loss(batch, target, 0.5).total
        loss.backward()
        return loss.detach()

    return step


# -- SpecForge -------------------------------------------------------------------------------------


def their_drafter(ours: Eagle3, target: Target) -> nn.Module:
    """SpecForge's drafter with the weights of `ours`."""
    # 1. A model of the same dimensions.
    module = importlib.import_module("specforge.modeling.draft.llama3_eagle")
    shape = target.shape
    kind: Any = LlamaConfig
    config = kind(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.norm_eps,
        rope_parameters=dict(shape.rope),
        head_dim=shape.head_dim,
        draft_vocab_size=ours.draft_size,
        pad_token_id=0,
    )
    drafter = module.LlamaForCausalLMEagle3(config, attention_backend="sdpa")
    # 2. Weights under its names, and the target's frozen embedding.
    weights = {
        _their_name(name): weight
        for name, weight in ours.state_dict().items()
        if name != "vocabulary"
    }
    weights["embed_tokens.weight"] = target.copy_weight("embed")
    missing, unexpected = drafter.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"t2d", "d2t"}, (missing, unexpected)
    drafter.embed_tokens.requires_grad_(False)
    return drafter.to(target.device)


def _their_name(name: str) -> str:
    if name.startswith(("input_layernorm", "hidden_norm")):
        return f"midlayer.{name}"
    return name.replace("layer.", "midlayer.", 1) if name.startswith("layer.") else name


def their_step(
    drafter: Any, batch: TextBatch, target: Target, ours: Eagle3, precision: str
) -> Step:
    """The unrolled steps as SpecForge's trainer takes them: every position of the row, with ids and
    distributions shifted by one more token in each step, and a cache of earlier steps' keys and
    values.
    """
    module = importlib.import_module("specforge.modeling.draft.llama3_eagle")
    fused_BTX = torch.cat([batch.states[layer] for layer in ours.fused_layers], dim=-1)
    mask_B1TT = module.prepare_decoder_attention_mask(
        torch.ones_like(batch.loss_mask), batch.input_ids.shape, fused_BTX, 0
    )

    def step() -> Tensor:
        drafter.zero_grad()
        with torch.autocast(target.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            probs_BTD = (
                target.logits(batch.states["final"], ours.vocabulary_D).float().softmax(-1).detach()
            )
            hidden_BTH = drafter.project_hidden_states(fused_BTX)
            cache, total = [[], []], torch.zeros(())
            # Step by step on its own outputs; only drafted tokens of the assistant count.
            for depth in range(ours.draft_steps):
                embedded = drafter.embed_input_ids(_shifted(batch.input_ids, depth + 1))
                hidden_BTH = drafter.backbone(
                    embedded, hidden_BTH, cache, mask_B1TT, batch.position_ids
                )
                logs_BTD = drafter.compute_logits(hidden_BTH).float().log_softmax(-1)
                counted_BT = _shifted(
                    batch.loss_mask & (batch.input_ids < ours.draft_size), depth + 2
                )
                losses_BT = -(_shifted(probs_BTD, depth + 1) * logs_BTD).sum(-1)
                total = (
                    total + ours.decay**depth * (losses_BT * counted_BT).sum() / counted_BT.sum()
                )
        total.backward()
        return total.detach()

    return step


def _shifted(rows_BTX: Tensor, places: int) -> Tensor:
    """Rows shifted to the left and padded with zeros."""
    return torch.cat([rows_BTX[:, places:], torch.zeros_like(rows_BTX[:, :places])], dim=1)


# -- the measurement -------------------------------------------------------------------------------


def alternating_seconds(
    steps: dict[str, Step], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every pass; the steps run in turn, after one warm-up pass each."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            began = now(device)
            step()
            if repeat:
                taken[name].append(now(device) - began)
    return taken


def compare(settings: Comparison) -> list[str]:
    """Lines of the result.

    Raises:
        ValueError: the losses of both drafters differ.
    """
    # 1. The same row, target and weights for both.
    torch.manual_seed(0)
    target = load_target(settings.target, "float32", settings.device)
    ours = our_drafter(settings, target).train()
    batch = packed_row(settings, target, ours.training_states)
    steps = {"slipstream": our_step(ours, batch, target, settings.precision)}
    if importlib.util.find_spec("specforge"):
        steps["specforge"] = their_step(
            their_drafter(ours, target).train(), batch, target, ours, settings.precision
        )
        _same(*(float(step()) for step in steps.values()))
    # 2. Time them in turn.
    taken = alternating_seconds(steps, settings.repeats, target.device)
    lines = [
        f"EAGLE-3, forward and backward, {settings.steps} steps, {settings.tokens} tokens, "
        f"{settings.assistant:.0%} of them the assistant's, draft vocabulary "
        f"{settings.vocabulary}, {settings.precision}, {torch.get_num_threads()} threads, median "
        f"of {settings.repeats}:"
    ]
    lines += [
        f"{name:<12} {settings.tokens / statistics.median(seconds):8.0f} tokens/s  (fastest "
        f"{min(seconds):.3f} s, slowest {max(seconds):.3f} s)"
        for name, seconds in taken.items()
    ]
    # 3. Ratios of paired passes.
    if len(taken) > 1:
        ratios = sorted(
            theirs / ours_seconds
            for ours_seconds, theirs in zip(taken["slipstream"], taken["specforge"], strict=True)
        )
        lines.append(
            f"slipstream over specforge {statistics.median(ratios):.2f}x "
            f"({ratios[0]:.2f}-{ratios[-1]:.2f})"
        )
    return lines


def _same(ours: float, theirs: float, tolerance: float = 0.02) -> None:
    if abs(ours - theirs) > tolerance * abs(theirs):
        raise ValueError(
            f"the two losses differ ({ours:.4f} and {theirs:.4f}): they do not do the same work"
        )


def command(arguments: Sequence[str]) -> int:
    """Parse, measure and print the comparison."""
    parser = config_parser(
        "python -m train.throughput", "Tokens per second of EAGLE-3's training step."
    )
    parser.add_class_arguments(Comparison, fail_untyped=True)
    values = vars(parse(parser, arguments))
    values.pop("config", None)
    print("\n".join(compare(Comparison(**values))))
    return 0


if __name__ == "__main__":
    exit_with(command)
