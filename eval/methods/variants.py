"""The same rows at several temperatures and batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from eval.methods.rows import Row, automatic_budget
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder


def vary(
    rows: Sequence[Row], samplings: Sequence[Sampling], batch_sizes: Sequence[int]
) -> list[Row]:
    """Rows of the first sampling and batch size under their names, then the others, with suffixes.

    A row with its own temperature keeps it. A decoder that takes one prompt at a time is left out
    of batches.

    Args:
        rows: as `eval.methods.rows.build_rows` makes them, for the first sampling.
        samplings: at least one.
        batch_sizes: ascending, at least one.

    Raises:
        ValueError: a rule that cannot be used at one of the temperatures.
    """
    # The first sampling and batch size, then the other temperatures.
    varied = {row.name: replace(row, batch_size=batch_sizes[0]) for row in rows}
    for sampling in samplings[1:]:
        for row in (row for row in rows if row.sampling == rows[0].sampling):
            warmer = at_temperature(replace(row, batch_size=batch_sizes[0]), sampling)
            varied.setdefault(warmer.name, warmer)
    # Larger batches of every row that can decode them.
    batched = [row for row in varied.values() if getattr(row.decoder, "batched", True)]
    return [
        *varied.values(),
        *(in_batches(row, size) for size in batch_sizes[1:] for row in batched),
    ]


def at_temperature(row: Row, sampling: Sampling) -> Row:
    """The row with another sampling, compared with the baseline of that sampling."""
    suffix = f" at {sampling.temperature:g}"
    changed = replace(
        row, name=row.name + suffix, baseline=row.baseline + suffix, sampling=sampling
    )
    if not isinstance(row.decoder, SpeculativeDecoder):
        return changed
    # The default rule depends on the temperature, and so does the size of tree that pays most.
    rule = row.decoder.rule_for(sampling)
    if rule.name == "greedy" and sampling.temperature > 0:
        raise ValueError(
            f"methods: {row.name}: rule 'greedy' does not sample at temperature "
            f"{sampling.temperature:g}: leave `rule` out, or give the method a `temperature` of 0"
        )
    changed = replace(changed, rule=rule.name, claims_lossless=rule.lossless)
    if not row.measured_budget:
        return changed
    return with_measured_budget(changed)


def with_measured_budget(row: Row) -> Row:
    """The row with the tree size that pays most at its sampling and batch size."""
    assert isinstance(row.decoder, SpeculativeDecoder)
    budget = automatic_budget(row.decoder, row.sampling, row.batch_size)
    return replace(row, decoder=replace(row.decoder, budget=budget), budget=budget)


def in_batches(row: Row, size: int) -> Row:
    """The row with `size` prompts at once; its tokens are compared with the baseline's in the
    smallest batch.
    """
    suffix = f", {size} at once"
    changed = replace(
        row,
        name=row.name + suffix,
        baseline=row.baseline + suffix,
        batch_size=size,
        yardstick=row.baseline,
    )
    # The more sequences a call has, the more its further rows cost.
    return with_measured_budget(changed) if row.measured_budget else changed
