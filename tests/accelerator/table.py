"""What shipped recipes cost a GPU's host, counted on the pretend accelerator:
`python -m tests.accelerator.table [RECIPE ...]` prints a table.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from modules.contracts.batches import TextBatch
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.timing import Clock
from modules.layers import hanging_attention
from modules.losses import chunked
from modules.target.target import Target
from tests.accelerator.pretend import DEVICE, LOG, Log, pretending
from tests.fakes import tiny_batch, tiny_target

SHOWN = [
    "medusa",
    "medusa2",
    "hydra",
    "clover",
    "clover2",
    "chimera",
    "eagle",
    "eagle3",
    "fspad",
    "dflash",
    "dspark",
    "gad",
    "s2d",
    "ppd",
    "independent",
]
"""Others need operators that the pretend device lacks."""
CONFIGS = Path(__file__).resolve().parents[2] / "configs/drafters"
STEP = ("draft", "verify", "accept", "commit")
PROMPT, ENDLESS, TOKENS = [[7, 8, 9, 10, 11, 12]], frozenset({-1}), 24


@contextmanager
def phases() -> Iterator[None]:
    """While it lasts the decoder's phases are the log's; draws come from the CPU's generators."""
    timed, generator = Clock.phase, torch.Generator

    @contextmanager
    def phase(self: Clock, name: str) -> Iterator[None]:
        outer, LOG.phase = LOG.phase, name
        try:
            with timed(self, name):
                yield
        finally:
            LOG.phase = outer

    changed: Any = (Clock, torch)
    changed[0].phase, changed[1].Generator = phase, lambda device="cpu": generator("cpu")
    try:
        yield
    finally:
        changed[0].phase, changed[1].Generator = timed, generator


def component(recipe: str, target: Target) -> Any:
    """The recipe's component in float32, with 48 tokens where it drafts some of the target's, its
    weights moved off their beginnings.
    """
    named = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())["drafter"]
    module, name = named["class_path"].rsplit(".", 1)
    arguments = dict(named["init_args"])
    if arguments.get("draft_vocabulary"):
        arguments["draft_vocabulary"] = 48
    torch.manual_seed(0)
    made = getattr(importlib.import_module(module), name)(target.shape, **arguments)
    if arguments.get("draft_vocabulary"):
        made.set_vocabulary(torch.randperm(target.shape.vocab_size)[:48])
    made.initialise(target)
    with torch.no_grad():
        for parameter in made.declared_parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return made.float()


def moved(target: Target) -> Target:
    """The same model on the device, with the kernels that it has there."""
    return Target(target.stock.to(DEVICE), target.tokenizer, target.name)


def on(device: torch.device, batch: TextBatch) -> TextBatch:
    """The batch there, without states."""
    parts = (batch.input_ids, batch.loss_mask, batch.position_ids, batch.document_ids)
    ids, mask, positions, documents = (part.to(device) for part in parts)
    return TextBatch(ids, mask, positions, documents)


def waits(log: Log) -> int:
    """In the phases of a step."""
    return sum(count for (phase, _, _), count in log.waits.items() if phase in STEP)


@dataclass(frozen=True)
class Costs:
    """Of a decoding step, means over an answer: launches of the draft, of acceptance with commit,
    and waits for the device. Of a training step (a loss and its gradients): launches on two rows of
    24 tokens, on a row of 64 with limits of a few rows for what a CPU computes at once, and waits;
    with the target's own only where the recipe runs it itself.
    """

    draft: float
    accept: float
    waits: float
    training: int
    parts: int
    training_waits: int


def costs(recipe: str) -> Costs:
    """Those of a recipe for a tiny Llama of two layers."""
    drafter = component(recipe, tiny_target("llama", torch.float32))
    with pretending() as log, phases():
        target, drafter = moved(tiny_target("llama", torch.float32)), drafter.to(DEVICE)
        # 1. Training steps on states that are there, behind one that makes what is made once.
        step(drafter, target, tiny_batch(target))
        step(drafter, target, tiny_batch(target))
        training, training_waits = sum(log.launches.values()), sum(log.waits.values())
        limits = chunked.MAX_LOGITS, hanging_attention.MAX_SCORES
        chunked.MAX_LOGITS, hanging_attention.MAX_SCORES = 300, 1000
        step(drafter, target, tiny_batch(target, rows=1, length=64))
        parts = sum(log.launches.values())
        chunked.MAX_LOGITS, hanging_attention.MAX_SCORES = limits
        # 2. An answer, likewise.
        decoder = SpeculativeDecoder(drafter.eval().adapt(target), drafter, stop_ids=ENDLESS)
        for tokens in (6, TOKENS):
            log.clear()
            steps = len(decoder.decode(PROMPT, Sampling(), tokens)[0].accepted)
        draft, _, accept, commit = (log.launches[name] / steps for name in STEP)
    waited = waits(log) / steps
    return Costs(draft, accept + commit, waited, training, parts, training_waits)


def step(drafter: Any, target: Target, batch: TextBatch) -> None:
    """A loss and its gradients on the device; the log holds this alone."""
    batch = on(DEVICE, batch)
    if not drafter.online:
        batch.states = dict(target.features(batch, drafter.training_states))
    LOG.clear()
    drafter.loss(batch, target, 0.5).total.backward()


def main(names: list[str]) -> None:
    """Print the table."""
    print("| recipe | draft | accept | waits | training | long rows | waits |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in names or SHOWN:
        print(f"| {name} | {' | '.join(f'{each:.0f}' for each in astuple(costs(name)))} |")


if __name__ == "__main__":
    main(sys.argv[1:])
