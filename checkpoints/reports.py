"""Reading and checking a `report.json` that may come from elsewhere."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.command_line.shapes import AtLeast, Each, Maybe, mismatch

SCHEMA = 1
REPORT = "report.json"
_REPORT_KEYS = ("environment", "targets", "settings", "methods")
_METHOD_KEYS = (
    "name",
    "target",
    "temperature",
    "batch_size",
    "prompts",
    "claims_lossless",
    "lossless",
    "speedup",
    "mean_accepted_tokens",
    "tokens_per_second",
    "quality",
)
_COUNT, _AMOUNT = AtLeast(int, 0), AtLeast(float, 0)
_BOUNDS = Maybe((_AMOUNT, _AMOUNT))
_RATIO = {"micro": Maybe(_AMOUNT), "ci95": _BOUNDS}
_PAIRED = {
    "difference": float,
    "ci95": Maybe((float, float)),
    "verdict": str,
    "win": _COUNT,
    "tie": _COUNT,
    "loss": _COUNT,
}
_QUALITY = {
    "noise?": _RATIO,
    "flip_rate?": Maybe(float),
    "drafted_nodes_per_call?": Maybe(_AMOUNT),
    "draft_seconds_per_node?": Maybe(_AMOUNT),
    "likelihood_against_plain?": Maybe(_PAIRED),
}
_METHOD = {
    "name": str,
    "target": str,
    "temperature": _AMOUNT,
    "batch_size": AtLeast(int, 1),
    "prompts": _COUNT,
    "claims_lossless": bool,
    "lossless": Maybe(bool),
    "identical_outputs?": Maybe(_COUNT),
    "tie_divergences?": Maybe(_COUNT),
    "speedup": {**_RATIO, "macro?": Maybe(_AMOUNT)},
    "mean_accepted_tokens": Maybe(_AMOUNT),
    "mean_accepted_tokens_ci95?": _BOUNDS,
    "tokens_per_second": _AMOUNT,
    "drafter_parameters?": Maybe(_COUNT),
    "speed_model?": Maybe({"rows_per_call": _AMOUNT}),
    "acceptance_by_depth?": Maybe([float]),
    "conditional_acceptance_by_depth?": Maybe([float]),
    "quality": _QUALITY,
    "by_task?": Maybe(Each({"speedup?": Maybe(_AMOUNT), "ci95?": _BOUNDS})),
}
_SHAPE = {
    "environment": {
        "device": str,
        "packages?": Each(str),
        "command?": str,
        "git_revision?": Maybe(str),
        "system?": str,
    },
    "targets": [{"name": str, "parameters": _COUNT, "dtype": str, "fingerprint": str}],
    "settings": {
        "tasks?": [str],
        "prompts?": [str],
        "max_new_tokens?": _COUNT,
        "threads?": _COUNT,
        "task_table?": Each(
            {
                "prompts": _COUNT,
                "language": Maybe(str),
                "thinking": Maybe(str),
                "metric": Maybe(str),
            }
        ),
    },
    "methods": [_METHOD],
}
"""Keys and types that readers of schema 1 (comparison, projection, publishing) rely on; older
reports lack optional keys.
"""


def load_report(path: str | Path, needed: Any = None) -> dict[str, Any]:
    """Read a `report.json`.

    Args:
        path: the file, or its folder.
        needed: further keys that this reader needs, as a shape.

    Raises:
        ValueError: a missing file, no JSON, another schema, or a wrong value; one line with the
            file and the key.
    """
    path = Path(path) / REPORT if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"report {str(path)!r} does not exist: give a report.json or its folder")
    # 1. JSON of a known schema.
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise ValueError(
            f"report {str(path)!r} is not JSON ({reason}): give a report.json"
        ) from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise ValueError(
            f"report {str(path)!r} has schema {str(schema)[:40]}, only {SCHEMA} can be read: give "
            "a report.json that eval.py wrote"
        )
    # 2. Keys, then types and ranges of the values.
    _check_whole(report, path)
    _check_shape(report, path, needed or {})
    return report


def _check_whole(report: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError for a report that lacks a required key."""
    missing = [key for key in _REPORT_KEYS if key not in report]
    methods = report.get("methods")
    if not missing and not methods:
        missing = ["methods"]
    # Types are checked later, so a method may be anything here.
    for number, method in enumerate(methods if isinstance(methods, list) else (), 1):
        missing += [
            f"methods[{number}].{key}"
            for key in _METHOD_KEYS
            if isinstance(method, dict) and key not in method
        ]
    if missing:
        raise ValueError(
            f"report {str(path)!r} has no `{missing[0]}`: it is not whole, measure it again"
        )


def _check_shape(report: Mapping[str, Any], path: Path, needed: Any) -> None:
    """Raise ValueError for a report with values that eval.py does not write."""
    wrong = mismatch(report, _SHAPE) or mismatch(report, needed)
    # Readers look methods up by name.
    if wrong is None:
        twice = [
            name
            for name, count in Counter(method["name"] for method in report["methods"]).items()
            if count > 1
        ]
        wrong = f"two methods are named {twice[0]!r}" if twice else None
    if wrong is not None:
        raise ValueError(
            f"report {str(path)!r}: {wrong}: eval.py did not write it so, measure it again"
        )
