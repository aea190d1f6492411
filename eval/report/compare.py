"""`python eval.py --compare A.json B.json`: changes by method, and whether they exceed noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from eval.report.markdown import Figures, fitted_table, lossless_word, noise_lines, number, times

_IGNORED = {"skipped", "limit", "left_out", "task_table"}
"""Settings that may differ: what was asked is in `tasks` and in each method's number of prompts."""


def pairs(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[tuple[Figures, Figures]]:
    """The methods that both reports have, by name.

    Raises:
        ValueError: no method is in both.
    """
    others = {method["name"]: method for method in right["methods"]}
    matches = [
        (method, others[method["name"]]) for method in left["methods"] if method["name"] in others
    ]
    if not matches:
        raise ValueError(
            "compare: the two reports have no method in common: give reports of the same methods"
        )
    return matches


def comparison_table(left: Mapping[str, Any], right: Mapping[str, Any], width: int = 120) -> Table:
    """Two reports side by side, by method name, at most `width` characters wide.

    Where not everything fits, tokens/s and then τ are left out.

    Raises:
        ValueError: no method is in both.
    """
    both, rows = pairs(left, right), []
    # One row a method: speed, acceptance and losslessness, before and after.
    for first, second in both:
        margin = math.hypot(noise_margin(left, first), noise_margin(right, second))
        rows.append(
            [
                first["name"],
                _arrow(times, first["speedup"]["micro"], second["speedup"]["micro"]),
                verdict(first["speedup"], second["speedup"], margin),
                _arrow(number, first["mean_accepted_tokens"], second["mean_accepted_tokens"]),
                tau_verdict(first, second),
                _arrow(_one_digit, first["tokens_per_second"], second["tokens_per_second"]),
                f"{lossless_word(first)} → {lossless_word(second)}",
            ]
        )
    # Losslessness that got lost is shown in red.
    styles = [
        "red" if first["lossless"] is True and second["lossless"] is False else None
        for first, second in both
    ]
    header = ("method", "speedup", "verdict", "τ", "", "tokens/s", "lossless")
    return fitted_table(
        "First report → second report",
        header,
        rows,
        styles,
        width,
        spare=("tokens/s", "", "τ"),
        words=("method", "verdict", "lossless"),
    )


def _one_digit(value: float | None) -> str:
    return number(value, 1)


def _arrow(written: Any, before: float | None, after: float | None) -> str:
    return f"{written(before)} → {written(after)}"


def verdict(first: Mapping[str, Any], second: Mapping[str, Any], margin: float = 0.0) -> str:
    """Faster or slower, or a tie when the intervals of the two speedups overlap or the difference
    is below the noise.

    Args:
        first, second: `speedup` entries (`micro`, `ci95`).
        margin: log of the largest ratio that noise of the two runs explains.
    """
    if None in (first["ci95"], second["ci95"]) or not first["micro"] or not second["micro"]:
        return "unknown"
    if overlap(first["ci95"], second["ci95"]):
        return "tie"
    if abs(math.log(second["micro"] / first["micro"])) <= margin:
        return "tie (noise)"
    return "faster" if second["micro"] > first["micro"] else "slower"


def tau_verdict(first: Figures, second: Figures) -> str:
    """More or fewer tokens per call, a tie when the intervals overlap, `?` without intervals."""
    bounds = first.get("mean_accepted_tokens_ci95"), second.get("mean_accepted_tokens_ci95")
    if bounds[0] is None or bounds[1] is None:
        return "same" if first["mean_accepted_tokens"] == second["mean_accepted_tokens"] else "?"
    if overlap(bounds[0], bounds[1]):
        return "same" if first["mean_accepted_tokens"] == second["mean_accepted_tokens"] else "tie"
    return "more" if second["mean_accepted_tokens"] > first["mean_accepted_tokens"] else "fewer"


def overlap(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two closed intervals have a point in common."""
    return first[0] <= second[1] and second[0] <= first[1]


def overlap_line(left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    """How many methods' speedups agree; two runs of one evaluation should agree for 9 of 10."""
    # Only methods with an interval in both reports count.
    intervals = [
        (first["speedup"]["ci95"], second["speedup"]["ci95"])
        for first, second in pairs(left, right)
        if first["speedup"]["ci95"] is not None and second["speedup"]["ci95"] is not None
    ]
    same = sum(overlap(first, second) for first, second in intervals)
    share = f" ({same / len(intervals):.0%})" if intervals else ""
    return (
        f"speedup intervals overlap for {same} of {len(intervals)} methods that have them in both "
        f"reports{share}"
    )


def noise_margin(report: Mapping[str, Any], method: Figures) -> float:
    """Log of the largest ratio of the method's baseline against itself; 0 where not measured."""
    # Noise is measured on baselines with the same target, temperature and batch size.
    same = ("target", "temperature", "batch_size")
    noises = [
        other["quality"]["noise"]
        for other in report["methods"]
        if "noise" in other["quality"] and all(other[key] == method[key] for key in same)
    ]
    ratios = [
        ratio for noise in noises for ratio in (noise["micro"], *(noise["ci95"] or ())) if ratio
    ]
    return max((abs(math.log(ratio)) for ratio in ratios), default=0.0)


def comparison_lines(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterable[str]:
    """Lines under the table: overlapping intervals, different settings, methods in only one report,
    noise.
    """
    yield overlap_line(left, right)
    yield from _differences(left, right)
    # Methods that only one report has.
    names = [{method["name"] for method in report["methods"]} for report in (left, right)]
    for which, missing in (("first", names[0] - names[1]), ("second", names[1] - names[0])):
        if missing:
            yield f"only in the {which} report: {', '.join(sorted(missing))}"
    # Noise of both reports.
    for which, report in (("first", left), ("second", right)):
        yield from (f"{which} report, {line}" for line in noise_lines(report))
    yield (
        "tie: the 95% intervals overlap; tie (noise): they do not, but plain decoding against "
        "itself differs as much. Tokens/s also depend on the speed of the machine."
    )


def _differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterable[str]:
    before, after = _conditions(left), _conditions(right)
    for key in (key for key in {**before, **after} if before.get(key) != after.get(key)):
        yield f"not the same {key}: {_short(before.get(key))}, then {_short(after.get(key))}"


def _conditions(report: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in report["settings"].items() if key not in _IGNORED}
    targets = [
        f"{target['name']} {target['dtype']} {target['fingerprint']}"
        for target in report["targets"]
    ]
    counts = sorted({method["prompts"] for method in report["methods"]})
    return {
        **settings,
        "number of prompts": counts,
        "device": report["environment"]["device"],
        "targets": targets,
    }


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
