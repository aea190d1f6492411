"""`python train.py --plan`: memory and disk of a training by arithmetic, before anything is loaded.

Nothing is measured here. With P trainable parameters, F frozen ones and N processes, AdamW in
float32 costs 4P bytes of weights (and 2P of their copies under autocast), 4P of gradients and 8P of
optimiser state per process; DeepSpeed
in 16 bits costs 2P, 2P and 12P (with the float32 master weights). ZeRO stage 1 divides the
optimiser's part by N, stage 2 the gradients too, stage 3 the weights too (Rajbhandari et al. 2020,
section 3). The target is replicated: F times the bytes of its dtype.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data.feature_cache.rounding import state_bytes
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.trainable import Footprint, GradientLayers, Trainable
from modules.layers.hanging_attention import SCORES_ON_A_DEVICE
from modules.losses.chunked import LOGITS_ON_A_DEVICE, MAX_LOGITS, MAX_PROBS
from modules.runtime.host_memory import available_memory
from train.lightning.head_only import reads_the_cache_alone
from train.settings import DEEPSPEED, TrainerSettings

GIB = 2**30
HIDDEN_PER_LAYER, INNER_PER_LAYER = 11, 4
"""Values of hidden width and of feed-forward width that a decoder layer stores per token for its
backward pass. Counted on Llama layers: 10.4 and 4 if all weights are trained, 8.6 and 4 with
adapters.
"""
HIDDEN_PER_DROPOUT, INNER_PER_DROPOUT = 7.5, 1.25
"""Additional values for adapters with dropout: their inputs, and masks of one byte."""
ALTERNATIVES = ("deepspeed_2", "deepspeed_3", "deepspeed_2_offload", "deepspeed_3_offload")
"""Strategies to try, in this order, if the chosen one does not fit."""


@dataclass(frozen=True, kw_only=True)
class Size(Footprint):
    """Inputs of the arithmetic: the component's footprint, and the target's sizes.

    trainable, frozen: numbers of parameters.
    target_bytes: bytes per value of the target.
    shape: the target's dimensions.
    names: states that the loss reads.
    recomputed: whether activations are recomputed instead of stored.
    on_gpu: whether more logits and scores are computed at once (`most_logits`).
    """

    trainable: int
    frozen: int
    target_bytes: int
    shape: TargetShape
    names: tuple[StateName, ...]
    recomputed: bool = False
    on_gpu: bool = False

    @property
    def chunk(self) -> int:
        """Logits that are computed at once."""
        return MAX_LOGITS * (LOGITS_ON_A_DEVICE if self.on_gpu else 1)

    @property
    def part(self) -> int:
        """Attention scores that are computed at once."""
        return self.most_scores * (SCORES_ON_A_DEVICE if self.on_gpu else 1)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device by use; `host` are bytes of host memory."""

    target: float
    parameters: float
    gradients: float
    optimiser: float
    activations: float
    features: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on the device in all."""
        return (
            self.target
            + self.parameters
            + self.gradients
            + self.optimiser
            + self.activations
            + self.features
        )


def memory(size: Size, strategy: str, precision: str, world: int) -> Memory:
    """Bytes per device of one training step."""
    # 1. Bytes per parameter of weights, gradients and optimiser states, by precision.
    match = DEEPSPEED.fullmatch(strategy)
    stage, offload = (int(match[1]), bool(match[2])) if match else (0, False)
    if precision.startswith("64"):
        parameters, gradients, optimiser = 8.0, 8.0, 16.0
    elif match and precision.startswith(("16", "bf16")):
        parameters, gradients, optimiser = 2.0, 2.0, 12.0
    elif precision.endswith("mixed"):
        # Autocast keeps a copy of all weights in 16 bits until the backward pass has ended.
        parameters, gradients, optimiser = 6.0, 4.0, 8.0
    else:
        parameters, gradients, optimiser = 4.0, 4.0, 8.0
    # 2. ZeRO divides each of them by the number of processes from its stage on.
    shares = [world if stage >= least else 1 for least in (3, 2, 1)]
    each = (parameters, gradients, optimiser)
    parts = [size.trainable * part / share for part, share in zip(each, shares, strict=True)]
    # 3. Activations: draft steps, logits and scores, and layers that run with a gradient.
    value = 2 if precision.startswith(("16", "bf16")) else 8 if precision.startswith("64") else 4
    wide = 2 if value == 8 else 1
    hidden = size.tokens * size.shape.hidden_size
    running = (
        size.target_bytes
        * size.tokens
        * (4 * size.shape.hidden_size + 3 * size.shape.intermediate_size)
    )
    # A recomputed step stores its inputs, and one step at a time the rest.
    each = size.step_bytes[1 if value == 2 else 0] * wide
    stored = each + size.steps * size.input_bytes * wide if size.recomputed else size.steps * each
    activations = stored * hidden
    activations += wide * (logit_bytes(size) + score_bytes(size)) + max(
        running, 4 * size.tokens * size.row
    )
    deep = layer_values(size.layers, size.recomputed)
    activations += max(value, size.target_bytes) * deep * size.tokens
    return Memory(
        size.frozen * size.target_bytes,
        parts[0],
        parts[1],
        0.0 if offload else parts[2],
        activations,
        value * hidden * len(size.names),
        parts[2] if offload else 0.0,
    )


def logit_bytes(size: Size) -> float:
    """Bytes of logits, their gradients and the target's distributions in float32: of one chunk, or,
    where a trained LM head's rows fit in one chunk, of every step until its backward pass.
    """
    wanted, distributions = size.tokens * size.width, 1 if size.soft else 0
    transient = 4.0 * (3 + distributions) * min(wanted, size.chunk)
    if size.own_head and wanted <= size.chunk:
        transient += 4.0 * (1 + distributions) * (size.steps - 1) * wanted
    return transient + 4.0 * distributions * (wanted if wanted <= MAX_PROBS else 0)


def score_bytes(size: Size) -> float:
    """Bytes of stored attention scores (EAGLE), raw, masked and normalised: of every step, or of
    one part.
    """
    wanted = size.row * size.row * size.score_heads
    if wanted > size.part:
        return 4.0 * 3 * size.part
    return 4.0 * 3 * wanted * (size.tokens / size.row) * (1 if size.recomputed else size.steps)


def measure(
    trainable: Trainable,
    target: Any,
    rows: int,
    length: int,
    recomputed: bool = False,
    on_gpu: bool = False,
) -> Size:
    """The size of a component and its target (either may be on the meta device)."""
    return Size(
        **vars(trainable.footprint(rows, length)),
        trainable=trainable.trained_size,
        frozen=sum(parameter.numel() for parameter in target.parameters()),
        target_bytes=next(target.parameters()).dtype.itemsize,
        shape=target.shape,
        names=trainable.training_states,
        recomputed=recomputed,
        on_gpu=on_gpu,
    )


def head_parameters(target: Any) -> int:
    """Parameters of a target's embedding, final norm and LM head, tied ones counted once."""
    parts = (target.architecture.embedding, target.architecture.norm, target.architecture.head)
    weights = {id(p): p.numel() for part in parts if part is not None for p in part.parameters()}
    return sum(weights.values())


def layer_values(layers: GradientLayers | None, recomputed: bool = False) -> float:
    """Values per token that decoder layers with a gradient store; 0 without such layers.

    Recomputed layers store their inputs, and one layer at a time its other activations. The
    target's layers under adapters are never recomputed.
    """
    if layers is None:
        return 0.0
    # One layer, then all of them or their inputs.
    shape = layers.shape
    each = HIDDEN_PER_LAYER * shape.hidden_size + INNER_PER_LAYER * shape.intermediate_size
    if layers.dropout:
        each += HIDDEN_PER_DROPOUT * shape.hidden_size + INNER_PER_DROPOUT * shape.intermediate_size
    if recomputed and not layers.adapted:
        return each + shape.num_layers * shape.hidden_size
    return float(each * shape.num_layers)


def processes(settings: TrainerSettings) -> int:
    """Number of processes, as far as it is known before they start."""
    devices = settings.devices
    if devices in ("auto", -1, "-1"):
        devices = torch.cuda.device_count() if _on_gpu(settings) else 1
    return int(devices) * settings.num_nodes


def _on_gpu(settings: TrainerSettings) -> bool:
    return settings.accelerator != "cpu" and torch.cuda.is_available()


def available(settings: TrainerSettings) -> float:
    """Free bytes for one process: of the GPU, or its share of the host's memory."""
    if _on_gpu(settings):
        return float(torch.cuda.mem_get_info()[0])
    return available_memory() / max(1, processes(settings) // settings.num_nodes)


def in_effect(strategy: str, settings: TrainerSettings) -> str:
    """A strategy as this machine runs it: a CPU does not offload."""
    return strategy if _on_gpu(settings) else strategy.removesuffix("_offload")


def alternatives(settings: TrainerSettings) -> list[str]:
    """`ALTERNATIVES` that differ from one another on this machine."""
    return list(dict.fromkeys(in_effect(name, settings) for name in ALTERNATIVES))


def check_fits(size: Size, settings: TrainerSettings, room: float) -> None:
    """Raise ValueError if a training needs more than `room` bytes per device, with a fix.

    Raises:
        ValueError: more memory is needed; the message names settings that fit.
    """
    world = processes(settings)
    strategy = in_effect(settings.strategy, settings)
    needed = memory(size, strategy, settings.precision, world).total
    if needed <= room:
        return
    # 1. Another strategy, or a lower precision.
    tried = [
        (name, settings.precision)
        for name in alternatives(settings)
        if world > 1 or name.endswith("offload")
    ]
    tried = [(strategy, "bf16-mixed"), *tried, *((name, "bf16-mixed") for name, _ in tried)]
    fix = next(
        (
            f"set trainer.strategy {name} and trainer.precision {precision}"
            for name, precision in tried
            if memory(size, name, precision, world).total <= room
        ),
        None,
    )
    # 2. Fewer rows per batch, then shorter rows, then another target.
    smaller = replace(size, tokens=size.row * size.sides)
    if fix is None and memory(smaller, strategy, settings.precision, world).total <= room:
        fix = "lower data.rows and raise trainer.accumulate_grad_batches"
    fix = (
        fix
        or _shorter_rows(size, settings, world, room)
        or "use a smaller target, or a 16-bit dtype for it"
    )
    raise ValueError(
        f"trainer.strategy {settings.strategy} needs {needed / GIB:.1f} GiB per device and "
        f"{room / GIB:.1f} are free: {fix}"
    )


def _shorter_rows(
    size: Size, settings: TrainerSettings, world: int, room: float, least: int = 128
) -> str | None:
    """A fix with the largest half, quarter, … of the row length that fits; None: none does."""
    lengths = [
        size.row >> halvings
        for halvings in range(1, size.row.bit_length())
        if size.row >> halvings >= least
    ]
    # Tokens per batch shrink with the length of a row.
    fits = (
        length
        for length in lengths
        if memory(
            replace(size, tokens=size.tokens * length // size.row, row=length),
            in_effect(settings.strategy, settings),
            settings.precision,
            world,
        ).total
        <= room
    )
    length = next(fits, None)
    return None if length is None else f"lower data.max_length to {length}"


def check_disk(needed: float, folder: Path, gib: float | None = None) -> None:
    """Raise ValueError if a feature cache of `needed` bytes exceeds the user's limit or the disk of
    `folder`.
    """
    if gib is not None and needed > gib * GIB:
        raise ValueError(
            f"data.features_gib is {gib:g}, but data.features needs {needed / GIB:.4g} GiB: raise "
            "it, set data.features_dtype int8, or lower data.max_response_tokens"
        )
    # The folder may not exist yet: its disk is that of the first parent that does.
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"data.features needs {needed / GIB:.2f} GiB in {str(folder)!r} and {free / GIB:.2f} "
            "are free: set data.features_dtype int8, lower data.max_response_tokens, or set no "
            "data.features"
        )


def described(size: Size, settings: TrainerSettings, room: float) -> list[str]:
    """The plan as lines of text."""
    world = processes(settings)
    # Sizes first, then one row per strategy; the chosen one has a star.
    lines = [
        f"trainable parameters  {size.trainable:,}",
        f"frozen parameters     {size.frozen:,}",
        f"processes             {world}",
        f"tokens per step       {size.tokens * world * settings.accumulate_grad_batches:,} "
        "(padding included)",
        f"free per device       {room / GIB:.2f} GiB",
        "",
        f"GiB per device, {settings.precision}, by arithmetic:",
        f"  {'strategy':<20} target  weights  gradients  optimiser  activations  features   total  "
        "host",
    ]
    for name in dict.fromkeys((settings.strategy, "deepspeed_1", *alternatives(settings))):
        each = memory(size, in_effect(name, settings), settings.precision, world)
        chosen = "*" if name == settings.strategy else " "
        lines.append(
            f"{chosen} {name:<20} {each.target / GIB:6.2f}  {each.parameters / GIB:7.2f}  "
            f"{each.gradients / GIB:9.2f}  {each.optimiser / GIB:9.2f}  "
            f"{each.activations / GIB:11.2f}  {each.features / GIB:8.2f}  {each.total / GIB:6.2f}  "
            f"{each.host / GIB:4.2f}"
        )
    return lines


def cache_bytes(tokens: int, size: Size, dtype: str) -> float:
    """Bytes on disk of the states of so many tokens."""
    return float(tokens * len(size.names) * state_bytes(size.shape.hidden_size, dtype))


def print_plan(recipe: Any, target: Any, gib: float | None = None) -> None:
    """Print the memory and disk that a recipe needs, and refuse what does not fit.

    Args:
        recipe: what is trained.
        target: may be on the meta device.
        gib: memory of a GPU that is not here; None plans for this machine.

    Raises:
        ValueError: too little memory or disk, with the fix.
    """
    if gib is not None and not gib > 0:
        raise ValueError(f"--plan_gib must be above 0, got {gib:g}")
    data, settings = recipe.data, recipe.trainer
    data.check_length(target)
    with torch.device("meta"):
        trainable = recipe.drafter(target.shape)
    size = measure(
        trainable,
        target,
        data.rows,
        data.max_length,
        settings.activation_checkpointing,
        gib is not None or _on_gpu(settings),
    )
    if reads_the_cache_alone(recipe, trainable):
        size = replace(size, frozen=head_parameters(target))
    # The plan is printed before it is refused.
    room = available(settings) if gib is None else gib * GIB
    lines = described(size, settings, room)
    if data.features is not None and not trainable.online:
        disk = _cache_disk(data, target, size)
        lines += [
            "",
            f"feature cache         {disk / GIB:.2f} GiB ({data.features_dtype}), less what is "
            "there already",
        ]
    print("\n".join(lines))
    check_fits(size, settings, room)
    if data.features is not None and not trainable.online:
        check_disk(disk, Path(data.features.split("{")[0]), data.features_gib)


def _cache_disk(data: Any, target: Any, size: Size) -> float:
    data.read(target)
    lengths = {document.key: len(document) for document in (*data.documents, *data.held_out)}
    return cache_bytes(sum(lengths.values()), size, data.features_dtype)
