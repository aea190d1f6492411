"""`python -m train.memory`: peak memory of training, measured on this machine's CPU in fresh
processes.

It answers two questions. How much does the chunked LM head save (`modules.losses.chunked` never
computes all logits at once)? Is `--plan` accurate? `python -m train.memory --config clover.yaml
--data.rows 1` trains three steps of that recipe and prints the planned and the measured peak, and
with `--lengths "[1024,2048,4096,8192]"` does so for rows of each of these lengths
(`--trainer.activation_checkpointing true` and every other key as in `train.py`). Linux only: the
peak is the kernel's (`VmHWM`), reset just before the measurement.

Shape legend: T rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F

from configs.command_line.loading import exit_with, parse
from modules.losses import chunked as losses
from modules.target.loading import load_target
from train.cli import make_parser, recipe_of
from train.plan import GIB, in_effect, measure, memory, processes
from train.run import Place, build, train

HIDDEN, VOCABULARY, ROWS = 576, 49152, (2048, 8192)
"""SmolLM2's dimensions, and the numbers of training rows."""
STEPS = 3
_HEAD, _RECIPE, _LENGTHS = "--of-head", "--of-recipe", "--lengths"


def resident(field: str) -> int:
    """Memory of this process in bytes: `VmRSS` now, `VmHWM` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def give_back() -> None:
    """Give freed memory back to the system: what the allocator keeps of a released model is used
    again later, and would not be counted as the training's.
    """
    gc.collect()
    with suppress(AttributeError):
        # Of glibc; other C libraries keep little.
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> int:
    """Reset the peak; returns the bytes in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


# -- the LM head -----------------------------------------------------------------------------------


def head_figures(rows: int, chunked: bool, learning: bool = False) -> dict[str, float]:
    """Peak bytes above those in use before, and CPU seconds, of cross-entropy over V tokens,
    forward and backward.

    Args:
        rows: T.
        chunked: as in training; otherwise all logits [T,V] at once.
        learning: the head gets gradients too (Medusa, EAGLE-3); otherwise only the features do
            (Clover, EAGLE).
    """
    if not chunked:
        losses.MAX_LOGITS = 1 << 62
    torch.set_num_threads(1)
    weight_VH = (torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5).requires_grad_(learning)
    features_TH = torch.randn(rows, HIDDEN, requires_grad=True)
    labels_T = torch.randint(VOCABULARY, (rows,))
    # The peak counts from here, without weights and inputs.
    before, began = forget_peak(), time.process_time()
    losses_T, _ = losses.cross_entropy(
        features_TH, lambda hidden: F.linear(hidden, weight_VH), labels_T, VOCABULARY
    )
    losses_T.mean().backward()
    return {"bytes": resident("VmHWM") - before, "seconds": time.process_time() - began}


def head_table(repeats: int = 1, learning: bool = False) -> list[str]:
    """Table of chunked and naive, measured in turn; the minimum of each figure over the repeats.
    The bytes of a learning head include the gradient of its weights.
    """
    name, extra = ("learning", ["learning"]) if learning else ("frozen", [])
    lines = [
        f"{name} LM head {VOCABULARY:,} x {HIDDEN}, float32, one thread, both ways, least of "
        f"{repeats}:",
        f"{'rows':>6} {'naive MiB':>10} {'chunked MiB':>12} {'lower':>7} {'naive s':>8} "
        f"{'chunked s':>10}",
    ]
    # Each figure comes from a fresh process.
    for rows in ROWS:
        taken = [
            [_fresh([_HEAD, str(rows), kind, *extra]) for kind in ("naive", "chunked")]
            for _ in range(repeats)
        ]
        naive, chunked = (
            {key: min(pair[i][key] for pair in taken) for key in ("bytes", "seconds")}
            for i in (0, 1)
        )
        lines.append(
            f"{rows:>6} {naive['bytes'] / 2**20:>10.0f} {chunked['bytes'] / 2**20:>12.0f} "
            f"{naive['bytes'] / chunked['bytes']:>6.1f}x {naive['seconds']:>8.1f} "
            f"{chunked['seconds']:>10.1f}"
        )
    return lines


# -- a recipe --------------------------------------------------------------------------------------


class Peak(Callback):
    """The peak of training steps only: no loading, no validation, no probe."""

    bytes = 0

    def on_train_batch_start(self, *_: Any) -> None:
        """Reset the peak before every step; from the second one the optimiser has its state."""
        forget_peak()

    def on_train_batch_end(self, *_: Any) -> None:
        """Store the highest peak so far."""
        self.bytes = max(self.bytes, resident("VmHWM"))


def recipe_figures(arguments: Sequence[str]) -> dict[str, float]:
    """Peak bytes of a recipe's training steps above the process with its libraries, and the plan.

    The target is loaded and released once before, so that the libraries it imports (70 MiB here)
    do not count.
    """
    # 1. The recipe for a few steps, without the probe.
    parser = make_parser()
    recipe = recipe_of(parser, parse(parser, arguments))
    recipe.trainer.max_steps, recipe.trainer.max_epochs, recipe.probe.prompts = STEPS, -1, 0
    # 2. Train it, with the measurement in place of the progress bar.
    load_target(recipe.target, recipe.dtype, "cpu")
    give_back()
    peak, before = Peak(), resident("VmRSS")
    target = load_target(recipe.target, recipe.dtype, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        train(recipe, Place(Path(folder) / "run"), target, peak)
    # 3. The same by arithmetic.
    size = measure(
        build(recipe, target),
        target,
        recipe.data.rows,
        recipe.data.max_length,
        recipe.trainer.activation_checkpointing,
    )
    settings = recipe.trainer
    planned = memory(
        size, in_effect(settings.strategy, settings), settings.precision, processes(settings)
    ).total
    return {"measured": peak.bytes - before, "planned": planned}


def recipe_table(arguments: Sequence[str]) -> list[str]:
    """One line: measured and planned memory in GiB."""
    figures = _fresh([_RECIPE, *arguments])
    return [
        f"measured above the process {figures['measured'] / GIB:.2f} GiB, planned "
        f"{figures['planned'] / GIB:.2f} GiB ({figures['planned'] / figures['measured'] - 1:+.0%})"
    ]


def length_table(arguments: Sequence[str], lengths: Sequence[int]) -> list[str]:
    """Markdown table of measured and planned memory per row length, each in a fresh process."""
    lines = ["| tokens of a row | measured GiB | planned GiB | off |", "|---:|---:|---:|---:|"]
    for length in lengths:
        figures = _fresh([_RECIPE, *arguments, "--data.max_length", str(length)])
        lines.append(
            f"| {length:,} | {figures['measured'] / GIB:.2f} | "
            f"{figures['planned'] / GIB:.2f} | "
            f"{figures['planned'] / figures['measured'] - 1:+.0%} |"
        )
    return lines


def split_lengths(arguments: Sequence[str]) -> tuple[list[str], list[int]]:
    """The arguments without `--lengths`, and the lengths that it lists.

    Raises ValueError unless it is a list of positive numbers.
    """
    rest = list(arguments)
    if _LENGTHS not in rest:
        return rest, []
    at = rest.index(_LENGTHS)
    listed = rest[at + 1] if at + 1 < len(rest) else ""
    try:
        lengths = json.loads(listed)
        if not lengths or any(type(length) is not int or length < 1 for length in lengths):
            raise ValueError
    except (ValueError, TypeError):
        raise ValueError(
            f'{_LENGTHS} {listed}: give tokens of a row as a list, such as "[1024,2048]"'
        ) from None
    return rest[:at] + rest[at + 2 :], lengths


# -- the command -----------------------------------------------------------------------------------


def _fresh(arguments: Sequence[str]) -> dict[str, float]:
    """Figures that a fresh process prints as JSON."""
    done = subprocess.run(
        # Behind `slipstream`, which finds the package in an installation too.
        [sys.executable, "-m", "slipstream", "train.memory", *arguments],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(
            f"measuring {' '.join(arguments)} failed: {done.stderr.strip().splitlines()[-1]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def command(arguments: Sequence[str]) -> int:
    """Print a table, or in a process that `_fresh` started figures as JSON."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
    elif arguments[:1] == [_HEAD]:
        print(
            json.dumps(
                head_figures(
                    int(arguments[1]), arguments[2] == "chunked", arguments[3:] == ["learning"]
                )
            )
        )
    elif arguments[:1] == [_RECIPE]:
        print(json.dumps(recipe_figures(arguments[1:])))
    elif not arguments:
        print("\n".join([*head_table(), "", *head_table(learning=True)]))
    else:
        rest, lengths = split_lengths(arguments)
        print("\n".join(length_table(rest, lengths) if lengths else recipe_table(rest)))
    return 0


if __name__ == "__main__":
    exit_with(command)
