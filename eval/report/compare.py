"""`python eval.py --compare A.json B.json`: what changed per method, and whether it is more than
noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from eval.report.markdown import Figures, fitted_table, lossless_word, noise_lines, number, times

_IGNORED = {"skipped", "limit", "left_out"}
"""Settings that may differ: what was asked is in `tasks` and in each method's number of prompts."""


def pairs(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[tuple[Figures, Figures]]:
    """The methods that both reports have, by name.

    Raises:
        ValueError: no method is in both.
    """
    others = {method["name"]: method for method in right["methods"]}
    found = [
        (method, others[method["name"]]) for method in left["methods"] if method["name"] in others
    ]
    if not found:
        raise ValueError(
            "compare: the two reports have no method in common: give reports of the same methods"
        )
    return found


def comparison_table(left: Mapping[str, Any], right: Mapping[str, Any], width: int = 120) -> Table:
    """Two reports side by side, by method name, at most so many characters wide.

    Where not all fits, tokens/s and then τ are left out.

    Raises:
        ValueError: no method is in both.
    """
    both, rows = pairs(left, right), []
    for one, two in both:
        margin = math.hypot(noise_margin(left, one), noise_margin(right, two))
        rows.append(
            [
                one["name"],
                _arrow(times, one["speedup"]["micro"], two["speedup"]["micro"]),
                verdict(one["speedup"], two["speedup"], margin),
                _arrow(number, one["mean_accepted_tokens"], two["mean_accepted_tokens"]),
                tau_verdict(one, two),
                f"{number(one['tokens_per_second'], 1)} → {number(two['tokens_per_second'], 1)}",
                f"{lossless_word(one)} → {lossless_word(two)}",
            ]
        )
    styles = [
        "red" if one["lossless"] is True and two["lossless"] is False else None for one, two in both
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


def _arrow(written: Any, before: float | None, after: float | None) -> str:
    return f"{written(before)} → {written(after)}"


def verdict(one: Mapping[str, Any], two: Mapping[str, Any], margin: float = 0.0) -> str:
    """Faster or slower, or a tie when the intervals of the two speedups overlap or they differ by
    less than noise.

    Args:
        one, two: `speedup` entries (`micro`, `ci95`).
        margin: log of the ratio that the two runs' noise alone may give.
    """
    if None in (one["ci95"], two["ci95"]) or not one["micro"] or not two["micro"]:
        return "unknown"
    if overlap(one["ci95"], two["ci95"]):
        return "tie"
    if abs(math.log(two["micro"] / one["micro"])) <= margin:
        return "tie (noise)"
    return "faster" if two["micro"] > one["micro"] else "slower"


def tau_verdict(one: Figures, two: Figures) -> str:
    """More or fewer tokens per call, a tie when the intervals overlap; a report without intervals
    cannot tell.
    """
    bounds = one.get("mean_accepted_tokens_ci95"), two.get("mean_accepted_tokens_ci95")
    if bounds[0] is None or bounds[1] is None:
        return "same" if one["mean_accepted_tokens"] == two["mean_accepted_tokens"] else "?"
    if overlap(bounds[0], bounds[1]):
        return "same" if one["mean_accepted_tokens"] == two["mean_accepted_tokens"] else "tie"
    return "more" if two["mean_accepted_tokens"] > one["mean_accepted_tokens"] else "fewer"


def overlap(one: Sequence[float], two: Sequence[float]) -> bool:
    """Whether two closed intervals have a point in common."""
    return one[0] <= two[1] and two[0] <= one[1]


def overlap_line(left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    """How many methods' speedups agree: two runs of the same evaluation should overlap in at least
    nine of ten.
    """
    known = [
        (one["speedup"]["ci95"], two["speedup"]["ci95"])
        for one, two in pairs(left, right)
        if one["speedup"]["ci95"] is not None and two["speedup"]["ci95"] is not None
    ]
    same = sum(overlap(one, two) for one, two in known)
    share = f" ({same / len(known):.0%})" if known else ""
    return (
        f"speedup intervals overlap for {same} of {len(known)} methods that have them in both "
        f"reports{share}"
    )


def noise_margin(report: Mapping[str, Any], method: Figures) -> float:
    """Log of the largest ratio that the method's baseline showed against itself; 0 where no noise
    was measured.
    """
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
    """What the table cannot show: intervals that overlap, settings that differ, methods in one
    report only, noise.
    """
    yield overlap_line(left, right)
    yield from _differences(left, right)
    names = [{method["name"] for method in report["methods"]} for report in (left, right)]
    for which, missing in (("first", names[0] - names[1]), ("second", names[1] - names[0])):
        if missing:
            yield f"only in the {which} report: {', '.join(sorted(missing))}"
    for which, report in (("first", left), ("second", right)):
        yield from (f"{which} report, {line}" for line in noise_lines(report))
    yield (
        "tie: the 95% intervals overlap; tie (noise): they do not, but plain decoding against "
        "itself differs as much. Tokens/s of two runs also tell how fast the machine was."
    )


def _differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterable[str]:
    before, after = _conditions(left), _conditions(right)
    for key in (key for key in {**before, **after} if before.get(key) != after.get(key)):
        yield f"not the same {key}: {_short(before.get(key))}, then {_short(after.get(key))}"


def _conditions(report: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in report["settings"].items() if key not in _IGNORED}
    targets = [f"{one['name']} {one['dtype']} {one['fingerprint']}" for one in report["targets"]]
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
