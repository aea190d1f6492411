"""`make bench-gpu`, or `python -m eval.bench_gpu`: what one GPU needs for the parts of this
project, in less than ten minutes, with PyTorch and transformers alone.

Weights are random and of a known model's shape, so nothing is downloaded and no draft is accepted:
figures are times of calls, steps and phases, from which follows how many tokens a step must yield.
Sections that no longer fit into the time are left out and named. The result is `report.md` and
`report.json`. Nobody has run it on a GPU yet; the tests run it on a CPU with a tiny shape.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from modules.contracts.batches import TextBatch
from modules.contracts.sampling import Sampling
from modules.cost_model.latency_table import measure_latency
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.heads.medusa import Medusa
from modules.drafters.trained import TrainedDrafter
from modules.target.target import Target

GIB = 2**30
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
"""Llama's dimensions by name; `1b` and `8b` are those of Llama 3."""
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
GRAPHS = (1, 8, 64)
BUDGETS = (8, 32, 60)
PHASES = ("draft", "verify", "accept", "commit", "other")
ENDLESS: frozenset[int] = frozenset()


@dataclass
class Table:
    """A section of the report: its title, a sentence, and a table. seconds: it took."""

    title: str
    text: str
    header: Sequence[str] = ()
    rows: list[list[str]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Bench:
    """What is measured on.

    target: with random weights. drafted: size of the draft vocabulary. context: tokens before a
    call. length: of a training row. tokens: of an answer. repeats: of each call.
    """

    target: Target
    drafted: int
    context: int
    length: int
    tokens: int
    repeats: int

    @property
    def device(self) -> torch.device:
        """The device of the target."""
        return self.target.device

    def drafters(self) -> dict[str, TrainedDrafter]:
        """Two families: independent heads, and a layer that drafts step by step."""
        made = {
            "Medusa": Medusa(self.target.shape, 4, draft_vocabulary=self.drafted),
            "EAGLE-3": Eagle3(self.target.shape, draft_vocabulary=self.drafted),
        }
        for drafter in made.values():
            drafter.set_vocabulary(torch.arange(self.drafted))
            drafter.to(self.device)
            drafter.initialise(self.target)
        return made


def random_target(shape: str, device: torch.device, dtype: torch.dtype) -> Target:
    """A Llama of a shape with random weights."""
    rope = {"rope_type": "default", "rope_theta": 5e5}
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=1 << 16, rope_parameters=rope)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Target(model, None, shape)


# -- sections --------------------------------------------------------------------------------------


def calls(bench: Bench) -> Table:
    """Time of the target's calls by rows, and how many tokens each must yield."""
    table = measure_latency(bench.target, WIDTHS, bench.context, bench.repeats, stock=True)
    first = table.seconds[1]
    rows = [
        [str(width), _ms(taken), f"{taken / first:.2f}", _ms(table.spread[width])]
        for width, taken in table.seconds.items()
    ]
    assert table.stock is not None
    return Table(
        "Calls of the target",
        f"After {bench.context} tokens. transformers' own call of one row: {_ms(table.stock)} ms. "
        "A tree pays where a step yields more tokens than the break-even, drafting left out.",
        ("rows", "ms", "break-even τ", "spread, ms"),
        rows,
    )


def contexts(bench: Bench) -> Table:
    """Whether verification costs more behind a long context."""
    rows = []
    for length in (bench.context, 8 * bench.context, 32 * bench.context):
        table = measure_latency(bench.target, (1, 8), length, max(2, bench.repeats // 3))
        first, eight = table.seconds[1], table.seconds[8]
        rows.append([str(length), _ms(first), _ms(eight), f"{eight / first:.2f}"])
    return Table(
        "Behind long contexts",
        "Keys and values are read by every call; the ratio should hardly grow.",
        ("tokens before", "1 row, ms", "8 rows, ms", "ratio"),
        rows,
    )


def graphs(bench: Bench) -> Table:
    """CUDA graphs through torch.compile, against calls that launch kernel by kernel."""
    plain = measure_latency(bench.target, GRAPHS, bench.context, bench.repeats)
    bench.target.compile_calls()
    rows = []
    try:
        for width in GRAPHS:
            began = time.perf_counter()
            measure_latency(bench.target, (width,), bench.context, 1)
            compiling = time.perf_counter() - began
            taken = measure_latency(bench.target, (width,), bench.context, bench.repeats)
            before, after = plain.seconds[width], taken.seconds[width]
            rows.append(
                [str(width), _ms(before), _ms(after), f"{before / after:.2f}×", f"{compiling:.0f}"]
            )
    finally:
        bench.target.stop_compiling()
    return Table(
        "CUDA graphs",
        "`--compile true`: one graph for each width and buffer size.",
        ("rows", "eager, ms", "compiled, ms", "gain", "seconds to compile"),
        rows,
    )


def engine(bench: Bench) -> Table:
    """Decoding steps by phase, plain and with trees of several sizes."""
    prompt = [list(range(5, 69))]
    rows, first = [], 0.0
    drafters: dict[str, tuple[TrainedDrafter | None, int | None]] = {"plain decoding": (None, None)}
    for name, drafter in bench.drafters().items():
        drafter.to(bench.target.dtype).eval()
        drafters |= {f"{name}, {budget} nodes": (drafter, budget) for budget in BUDGETS}
    for name, (drafter, budget) in drafters.items():
        decoder = SpeculativeDecoder(bench.target, drafter, budget=budget, stop_ids=ENDLESS)
        decoder.decode(prompt, Sampling(), 8)
        trace = decoder.decode(prompt, Sampling(), bench.tokens)[0]
        steps = len(trace.accepted)
        spent = [trace.seconds.get(phase, 0.0) / steps for phase in PHASES]
        first = first or sum(spent)
        rows.append([name, _ms(sum(spent)), *map(_ms, spent), f"{sum(spent) / first:.2f}"])
    return Table(
        "Decoding steps",
        "Milliseconds of a step by phase. Random weights accept nothing: a trained drafter pays "
        "where its τ is above the last column.",
        ("drafter", "step", *PHASES, "break-even τ"),
        rows,
    )


def training(bench: Bench) -> Table:
    """One training step by part, and its memory."""
    rows = []
    for name, drafter in bench.drafters().items():
        drafter.train()
        optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-4)
        before = _allocated(bench.device)
        # The first step makes the optimiser's states.
        _training_step(bench, drafter, optimizer)
        _reset_peak(bench.device)
        parts = _training_step(bench, drafter, optimizer)
        whole = sum(parts)
        rows.append(
            [
                name,
                *(_ms(part) for part in parts),
                f"{bench.length / whole:,.0f}",
                _gib(before),
                _gib(_peak(bench.device)),
            ]
        )
        del drafter, optimizer
    return Table(
        "Training steps",
        f"One row of {bench.length} tokens in documents of {bench.length // 4}, bf16-mixed, AdamW "
        "in float32. Memory in GiB: allocated before the step's tensors, and the most in it.",
        ("drafter", "target, ms", "forward", "backward", "optimiser", "tokens/s", "before", "peak"),
        rows,
    )


def _training_step(bench: Bench, drafter: TrainedDrafter, optimizer: Any) -> list[float]:
    """Seconds of the target's pass, the loss, the backward pass and the optimiser."""
    length, device = bench.length, bench.device
    place = torch.arange(length, device=device)
    documents = place // (length // 4)
    ids = torch.randint(5, bench.target.shape.vocab_size, (1, length), device=device)
    counted = (place % (length // 4) > length // 16)[None]
    batch = TextBatch(ids, counted, (place % (length // 4))[None], documents[None])
    seconds: list[float] = []

    def timed(part: Callable[[], Any]) -> Any:
        began = _now(device)
        result = part()
        seconds.append(_now(device) - began)
        return result

    batch.states = timed(lambda: bench.target.features(batch, drafter.training_states))
    batch.states = {name: state.float() for name, state in batch.states.items()}
    with torch.autocast(device.type, torch.bfloat16):
        loss = timed(lambda: drafter.loss(batch, bench.target, 0.5).total)
    timed(loss.backward)
    timed(optimizer.step)
    optimizer.zero_grad(set_to_none=True)
    return seconds


# -- time and memory -------------------------------------------------------------------------------


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _allocated(device: torch.device) -> float | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _peak(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


def _gib(count: float | None) -> str:
    return "–" if count is None else f"{count / GIB:.2f}"


# -- the report ------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[Callable[[Bench], Table], float]] = {
    "calls": (calls, 40.0),
    "engine": (engine, 60.0),
    "training": (training, 60.0),
    "contexts": (contexts, 60.0),
    "graphs": (graphs, 240.0),
}
"""In order of importance, with the seconds that each may take on a GPU with the largest shape."""


def measure(
    bench: Bench, names: Sequence[str], minutes: float, began: float
) -> tuple[list[Table], list[str]]:
    """The sections that fit into the time since `began`, and why others are missing."""
    tables, missing = [], []
    for name in names:
        section, needed = SECTIONS[name]
        left = 60 * minutes - (time.monotonic() - began)
        if left < needed:
            missing.append(f"{name}: {left:.0f} s are left and it may take {needed:.0f} s")
            continue
        start = time.monotonic()
        try:
            tables.append(section(bench))
        except Exception as error:  # one part that fails does not hide what the others measured
            reason = " ".join(str(error).split())[:300]
            missing.append(f"{name}: {type(error).__name__}: {reason}")
            continue
        tables[-1].seconds = time.monotonic() - start
    return tables, missing


def environment(device: torch.device) -> dict[str, str]:
    """The device, and versions of what runs."""
    where = platform.processor() or platform.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
    return {
        "device": where,
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def markdown(facts: dict[str, str], tables: Sequence[Table], missing: Sequence[str]) -> str:
    """The report as a page."""
    lines = [
        "# Slipstream on one GPU",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    for table in tables:
        lines += [
            "",
            f"## {table.title}",
            "",
            f"{table.text} Measured in {table.seconds:.0f} s.",
            "",
        ]
        for row in (table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows):
            lines.append(f"| {' | '.join(row)} |")
    if missing:
        lines += ["", "## Left out", "", *(f"- {line}" for line in missing)]
    return "\n".join([*lines, ""])


def bench_of(shape: str, device: torch.device) -> Bench:
    """What is measured on a device: small enough for a CPU if the shape is `tiny`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    target = random_target(shape, device, dtype)
    if shape == "tiny":
        return Bench(target, 64, 16, 64, 12, 2)
    return Bench(target, 32000, 512, 2048, 128, 20)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench_gpu",
        description="Measure calls, steps, training and memory on one GPU, with random weights.",
    )
    parser.add_argument("--shape", choices=list(SHAPES), help="of the target [8b; 1b below 40 GiB]")
    parser.add_argument("--device", default=None, help="a torch device [cuda]")
    parser.add_argument("--minutes", type=float, default=9.5, help="that it may take")
    parser.add_argument(
        "--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="NAME"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench_gpu"), help="folder")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the report; exit status 1 if a section failed, 2 without a GPU."""
    chosen, began = parsed(arguments), time.monotonic()
    if chosen.device is None and not torch.cuda.is_available():
        print(
            "bench_gpu: no GPU is here (torch.cuda.is_available() is False): give --device cpu "
            "--shape tiny to try it",
            file=sys.stderr,
        )
        sys.exit(2)
    device = torch.device(chosen.device or "cuda")
    shape = chosen.shape
    if shape is None:
        large = (
            device.type == "cuda" and torch.cuda.get_device_properties(0).total_memory > 40 * GIB
        )
        shape = "8b" if large else "1b"
    facts = {**environment(device), "shape": shape}
    tables, missing = measure(bench_of(shape, device), chosen.sections, chosen.minutes, began)
    facts["seconds"] = f"{time.monotonic() - began:.0f}"
    page = markdown(facts, tables, missing)
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "report.md").write_text(page, encoding="utf-8")
    stored = {"facts": facts, "tables": [vars(table) for table in tables], "missing": missing}
    (chosen.output / "report.json").write_text(json.dumps(stored, indent=1) + "\n")
    print(page)
    print(f"report: {chosen.output / 'report.md'}")
    sys.exit(1 if any("Error" in line for line in missing) else 0)


if __name__ == "__main__":
    main()
