"""How many nodes to draft: the tree size that is worth most on this device for this drafter.

With a budget of n drafted nodes a call takes t(rows), with the rows that it really computes, and
the drafting, and gives τ(n) tokens; the best n maximises τ(n) / (t(rows) + drafting) (the cost
model of Sequoia, Chen et al. 2024, arXiv 2402.12374, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from modules.contracts.sampling import Sampling
from modules.cost_model.latency_table import LatencyTable
from modules.decoding.decoder import SpeculativeDecoder

BUDGETS = (1, 2, 3, 5, 7, 11, 15, 23)
WIDE_BUDGETS = (31, 47, 63)
"""Also tried on a GPU."""
PAST_PEAK = 0.93
"""Two sizes in turn below this share of the best speedup are beyond the peak, rather than noise of
a few prompts."""


def budgets_on(device: torch.device) -> tuple[int, ...]:
    """The tree sizes to try on a device."""
    return (*BUDGETS, *WIDE_BUDGETS) if device.type == "cuda" else BUDGETS


@dataclass(frozen=True)
class BudgetTrial:
    """Measurements of one tree size: tokens per call, drafting seconds per call, and the predicted
    speedup.
    """

    budget: int
    tokens_per_call: float
    draft_seconds: float
    predicted_speedup: float


def try_budgets(
    decoder: SpeculativeDecoder,
    latency: LatencyTable,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    limit: int = 32,
    budgets: Sequence[int] | None = None,
    batch: int = 1,
) -> list[BudgetTrial]:
    """Decode a few prompts with every tree size, and predict its speedup from the measured times of
    the target's calls.

    Args:
        decoder: whose drafter, builder and rule are tried.
        latency: of the same target, up to the largest budget + 1 rows.
        prompts: token ids to decode; none that will be evaluated.
        sampling: as decoding will sample.
        limit: new tokens per prompt.
        budgets: the tree sizes, ascending, by default those of the device; sizes too small for the
            drafter are left out, and those beyond the peak.
        batch: prompts decoded together; `latency` is of calls of so many sequences.

    Raises:
        ValueError: the drafter needs more nodes than any of the sizes has.
    """
    budgets = budgets_on(decoder.target.device) if budgets is None else budgets
    least = 1 if decoder.drafter is None else decoder.drafter.least_budget
    possible = [budget for budget in budgets if budget >= least]
    if not possible:
        raise ValueError(
            f"budget 'auto' tries at most {max(budgets)} nodes, {decoder.name} needs {least}: give "
            "its budget as a number"
        )
    trials: list[BudgetTrial] = []
    for budget in possible:
        trials.append(
            _try(replace(decoder.fresh(), budget=budget), latency, prompts, sampling, limit, batch)
        )
        best = max(trial.predicted_speedup for trial in trials)
        # More rows cost more, and deeper nodes are accepted less: beyond the peak comes no other.
        if max(trial.predicted_speedup for trial in trials[-2:]) < PAST_PEAK * best:
            break
    return trials


def best_budget(trials: Sequence[BudgetTrial]) -> int:
    """The tree size with the highest predicted speedup, the smallest of equals; 0, which is plain
    decoding, where none is predicted to be faster."""
    best = max(trials, key=lambda trial: (trial.predicted_speedup, -trial.budget))
    return best.budget if best.predicted_speedup > 1 else 0


def _try(
    decoder: SpeculativeDecoder,
    latency: LatencyTable,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    limit: int,
    batch: int,
) -> BudgetTrial:
    assert decoder.budget is not None
    # 1. Tokens per call of a sequence, and drafting time per call of a batch.
    parts = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    batches = [decoder.decode(list(part), sampling, limit) for part in parts]
    traces = [trace for together in batches for trace in together]
    tokens = sum(sum(trace.accepted) for trace in traces)
    tokens /= max(1, sum(len(trace.accepted) for trace in traces))
    longest = [max(together, key=lambda trace: len(trace.accepted)) for together in batches]
    drafting = sum(trace.seconds.get("draft", 0.0) for trace in longest)
    drafting /= max(1, sum(len(trace.accepted) for trace in longest))
    # 2. Time of the target's calls, by the rows they really had.
    rows = [rows for trace in traces for rows in trace.rows] or [decoder.budget + 1]
    call = sum(map(latency.at, rows)) / len(rows) + drafting
    return BudgetTrial(decoder.budget, tokens, drafting, tokens * latency.seconds[1] / call)
