"""`python -m train.memory`: what training needs at its peak, measured on this machine's CPU in
fresh processes.

Two questions. What does the chunked LM head save (`modules.losses.chunked`: logits never exist in
full)? Is `--plan` right? `python -m train.memory --config clover.yaml --data.rows 1` trains
three steps of that recipe and puts the arithmetic beside the peak, and with `--lengths
"[1024,2048,4096,8192]"` does so for rows of each of these lengths
(`--trainer.activation_checkpointing true` and every other key as in `train.py`). Linux only: the
peak is the kernel's (`VmHWM`), set back just before what is measured.

Shape legend: T rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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
"""SmolLM2's dimensions, and how many training rows."""
STEPS = 3
_HEAD, _RECIPE, _LENGTHS = "--of-head", "--of-recipe", "--lengths"


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> int:
    """Begin a new peak; returns the bytes in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


# -- the LM head -----------------------------------------------------------------------------------


def head_figures(rows: int, chunked: bool, learning: bool = False) -> dict[str, float]:
    """Peak bytes above what was there before, and CPU seconds, of cross-entropy over V tokens,
    forward and backward.

    Args:
        rows: T.
        chunked: as training does; if not, all logits [T,V] at once.
        learning: the head gets gradients too (Medusa, EAGLE-3); if not, the features alone (Clover,
            EAGLE).
    """
    if not chunked:
        losses.MAX_LOGITS = 1 << 62
    torch.set_num_threads(1)
    weight_VH = (torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5).requires_grad_(learning)
    features_TH = torch.randn(rows, HIDDEN, requires_grad=True)
    labels_T = torch.randint(VOCABULARY, (rows,))
    before, began = forget_peak(), time.process_time()
    found, _ = losses.cross_entropy(
        features_TH, lambda hidden: F.linear(hidden, weight_VH), labels_T, VOCABULARY
    )
    found.mean().backward()
    return {"bytes": resident("VmHWM") - before, "seconds": time.process_time() - began}


def head_table(repeats: int = 1, learning: bool = False) -> list[str]:
    """Chunked beside naive, in turn; the least of each figure over the repeats. Of a learning head
    the bytes hold the gradient of its weights too."""
    name, extra = ("learning", ["learning"]) if learning else ("frozen", [])
    lines = [
        f"{name} LM head {VOCABULARY:,} x {HIDDEN}, float32, one thread, both ways, least of "
        f"{repeats}:",
        f"{'rows':>6} {'naive MiB':>10} {'chunked MiB':>12} {'lower':>7} {'naive s':>8} "
        f"{'chunked s':>10}",
    ]
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
    """The peak of the training steps alone: no loading, no validation, no probe."""

    bytes = 0

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin with the second step: the optimiser has its state then."""
        forget_peak()

    def on_train_batch_end(self, *_: Any) -> None:
        """The highest so far."""
        self.bytes = max(self.bytes, resident("VmHWM"))


def recipe_figures(arguments: Sequence[str]) -> dict[str, float]:
    """Bytes of a recipe's training steps above the process with its libraries, and what `--plan`
    says.

    The target is loaded and released once before: the code that comes with it (70 MiB here) is not
    the training's.
    """
    parser = make_parser()
    recipe = recipe_of(parser, parse(parser, arguments))
    recipe.trainer.max_steps, recipe.trainer.max_epochs, recipe.probe.prompts = STEPS, -1, 0
    load_target(recipe.target, recipe.dtype, "cpu")
    gc.collect()
    peak, before = Peak(), resident("VmRSS")
    setattr(sys.modules["train.run"], "RunProgress", lambda: peak)  # noqa: B010
    target = load_target(recipe.target, recipe.dtype, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        train(recipe, Place(Path(folder) / "run"), target)
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
    """Measured beside planned."""
    found = _fresh([_RECIPE, *arguments])
    return [
        f"measured above the process {found['measured'] / GIB:.2f} GiB, planned "
        f"{found['planned'] / GIB:.2f} GiB ({found['planned'] / found['measured'] - 1:+.0%})"
    ]


def length_table(arguments: Sequence[str], lengths: Sequence[int]) -> list[str]:
    """Measured beside planned for rows of each length, every one in a process of its own, as
    Markdown.
    """
    lines = ["| tokens of a row | measured GiB | planned GiB | off |", "|---:|---:|---:|---:|"]
    for length in lengths:
        found = _fresh([_RECIPE, *arguments, "--data.max_length", str(length)])
        lines.append(
            f"| {length:,} | {found['measured'] / GIB:.2f} | {found['planned'] / GIB:.2f} | "
            f"{found['planned'] / found['measured'] - 1:+.0%} |"
        )
    return lines


def asked_lengths(arguments: Sequence[str]) -> tuple[list[str], list[int]]:
    """The arguments without `--lengths`, and what it lists. ValueError: it is no list of numbers
    above 0.
    """
    rest = list(arguments)
    if _LENGTHS not in rest:
        return rest, []
    at = rest.index(_LENGTHS)
    given = rest[at + 1] if at + 1 < len(rest) else ""
    try:
        lengths = json.loads(given)
        if not lengths or any(type(length) is not int or length < 1 for length in lengths):
            raise ValueError
    except (ValueError, TypeError):
        raise ValueError(
            f'{_LENGTHS} {given}: give tokens of a row as a list, such as "[1024,2048]"'
        ) from None
    return rest[:at] + rest[at + 2 :], lengths


# -- the command -----------------------------------------------------------------------------------


def _fresh(arguments: Sequence[str]) -> dict[str, float]:
    """Figures from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "train.memory", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(
            f"measuring {' '.join(arguments)} failed: {done.stderr.strip().splitlines()[-1]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def command(arguments: Sequence[str]) -> int:
    """A table, or, in a process that another one started, figures as JSON."""
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
        rest, lengths = asked_lengths(arguments)
        print("\n".join(length_table(rest, lengths) if lengths else recipe_table(rest)))
    return 0


if __name__ == "__main__":
    exit_with(command)
