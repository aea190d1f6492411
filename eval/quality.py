"""Quality of answers, for methods that change them: pure functions of texts."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_WORD = re.compile(r"[a-z0-9]+")


def final_number(text: str) -> float | None:
    """The number behind `####` (GSM8K's mark of the answer), else the last number of the text; None without any."""
    marked = text.rpartition("####")[2] if "####" in text else text
    found = _NUMBER.findall(marked) or _NUMBER.findall(text)
    if not found:
        return None
    chosen = found[0] if "####" in text and _NUMBER.findall(marked) else found[-1]
    return float(chosen.replace(",", ""))


def same_number(answer: str, solution: str) -> bool:
    """Whether an answer ends in the solution's number (Cobbe et al. 2021, GSM8K)."""
    given, wanted = final_number(answer), final_number(solution)
    return given is not None and wanted is not None and abs(given - wanted) < 1e-6


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, lower case (Lin 2004, ROUGE-L with β = 1)."""
    left, right = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    if not left or not right:
        return 0.0
    common = _common_subsequence(left, right)
    return 2 * common / (len(left) + len(right))


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for index, other in enumerate(right, 1):
            diagonal, row[index] = row[index], diagonal + 1 if word == other else max(row[index], row[index - 1])
    return row[-1]


def passes(program: str, test: str, seconds: float = 5.0, memory: int = 1 << 30) -> bool:
    """Whether a program and its test run to the end in a process of their own (Chen et al. 2021, HumanEval).

    The process has a time limit, a memory limit in bytes, an empty folder as its home and nothing of our environment.
    That keeps accidents in, not attackers: run programs of models you do not trust in a container.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "candidate.py"
        script.write_text(f"{program}\n\n{test}\n", encoding="utf-8")
        limits = _Limits(int(seconds) + 1, memory)
        try:
            ended = subprocess.run([sys.executable, "-I", str(script)], cwd=folder, env={"HOME": folder},
                                   timeout=seconds, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, preexec_fn=limits, check=False)
        except subprocess.TimeoutExpired:
            return False
        return ended.returncode == 0


class _Limits:
    """Sets the limits in the child, before the program begins."""

    def __init__(self, seconds: int, memory: int) -> None:
        self.seconds, self.memory = seconds, memory

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (self.seconds, self.seconds))
        resource.setrlimit(resource.RLIMIT_AS, (self.memory, self.memory))
