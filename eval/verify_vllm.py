"""Check that vLLM serves exported drafters as they were trained: `python -m eval.verify_vllm
--drafters runs/eagle3` (slow).

For every drafter: vLLM loads it without a missing or unused tensor; greedy answers are those of
vLLM without it; and its mean accepted tokens are within 5 % of this project's own loop with the
same chain on the same prompts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from jsonargparse import ArgumentParser
from rich.console import Console

from configs.command_line.loading import exit_with, parse
from configs.command_line.outputs import claimed, write_whole
from configs.command_line.progress import quieten
from eval.evaluation import Evaluation, evaluate
from eval.methods.rows import Method, load_drafter
from eval.vllm.engine import ENGINE, Worker, engine_arguments, export_for_vllm
from modules.contracts.target import Target
from modules.target.loading import load_target

TOLERANCE = 0.05
"""Largest relative difference between vLLM's mean accepted tokens and ours."""
LEAST_ACCEPTED = 1 / (1 - TOLERANCE)
"""Mean accepted tokens up to which a drafter without a single accepted draft would be within the
tolerance, so that the comparison proves nothing.
"""
_CHAIN = "modules.trees.static.StaticTree"
_COLUMNS = (
    "drafter",
    "tensors",
    "missing",
    "unused",
    "same tokens as without drafter",
    "τ in vLLM",
    "τ here",
    "ratio",
    "acceptance by depth in vLLM",
    "here",
    "verdict",
)


@dataclass(frozen=True)
class Verification:
    """Settings of `python -m eval.verify_vllm`.

    Args:
        drafters: run folders, drafter folders or Hub ids.
        target: Hub id, folder, .gguf file or smollm2-135m; by default what the first drafter was
            trained for.
        prompts: as `eval.py` takes them.
        limit: prompts per task.
        tokens: drafted in a chain.
        max_new_tokens: per answer.
        batch_size: prompts decoded together.
        output: folder of both reports and of the table, `serving.md`.
    """

    drafters: list[str] = field(default_factory=list)
    target: str | None = None
    prompts: list[str] = field(default_factory=lambda: ["embedded"])
    limit: int | None = None
    tokens: int = 3
    max_new_tokens: int = 64
    batch_size: int = 1
    output: str = "runs/verify_vllm"

    def evaluation(self, engine: str) -> Evaluation:
        """The evaluation of the drafters with a chain of `tokens`, in vLLM or in our loop."""
        paths = [[0] * (depth + 1) for depth in range(self.tokens)]
        chain = None if engine == ENGINE else {"class_path": _CHAIN, "init_args": {"paths": paths}}
        methods = [
            Method(drafter=name, builder=chain, budget=self.tokens) for name in self.drafters
        ]
        return Evaluation(
            target=self.target,
            methods=methods,
            prompts=self.prompts,
            limit=self.limit,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            engine=cast(Any, engine),
        )


@dataclass(frozen=True)
class Finding:
    """Results of one drafter: how vLLM loaded it, its row in vLLM and its row in our loop."""

    loaded: Mapping[str, Any]
    theirs: Mapping[str, Any]
    ours: Mapping[str, Any]

    @property
    def ratio(self) -> float:
        """vLLM's mean accepted tokens over ours; 0 where nothing was drafted."""
        theirs, ours = self.theirs["mean_accepted_tokens"], self.ours["mean_accepted_tokens"]
        return theirs / ours if theirs and ours else 0.0

    def faults(self) -> list[str]:
        """One line per failed check; empty if all passed."""
        name = self.theirs["name"]
        # Tensors that vLLM did not load.
        faults = [
            f"{name}: {kind} tensors: {', '.join(self.loaded[kind])}"
            for kind in ("missing", "unused")
            if self.loaded[kind]
        ]
        # Tokens, in both loops.
        if not self.theirs["lossless"]:
            faults.append(
                f"{name}: answers differ from vLLM's without the drafter: "
                f"{self.theirs['first_divergence']}"
            )
        if not self.ours["lossless"]:
            faults.append(
                f"{name}: answers differ from plain decoding in our own loop: "
                f"{self.ours['first_divergence']}"
            )
        # Acceptance; at too few accepted tokens the ratio proves nothing.
        here = self.ours["mean_accepted_tokens"] or 0.0
        if here <= LEAST_ACCEPTED:
            faults.append(
                f"{name}: mean accepted tokens here are {here:.3f}, which proves nothing, for "
                f"drafts that all miss come as near: train it until they are above "
                f"{LEAST_ACCEPTED:.2f}"
            )
        elif abs(self.ratio - 1) > TOLERANCE:
            faults.append(
                f"{name}: mean accepted tokens are {self.ratio:.3f} times ours, more than "
                f"{TOLERANCE:.0%} off"
            )
        return faults

    def cells(self) -> list[str]:
        """The drafter's line of the table."""
        row = self.theirs
        # vLLM's figures first, then ours.
        ties = f", {row['tie_divergences']} ties" if row["tie_divergences"] else ""
        depths = [
            ", ".join(f"{share:.3f}" for share in figures["acceptance_by_depth"])
            for figures in (row, self.ours)
        ]
        counts = [str(len(self.loaded[kind])) for kind in ("missing", "unused")]
        return [
            row["name"],
            str(self.loaded["shipped"]),
            *counts,
            f"{row['identical_outputs']} of {row['prompts']}{ties}",
            *(f"{figures['mean_accepted_tokens'] or 0:.3f}" for figures in (row, self.ours)),
            f"{self.ratio:.3f}",
            *depths,
            "wrong" if self.faults() else "right",
        ]


def verify(verification: Verification, console: Console) -> list[Finding]:
    """Run all checks; reports and the table are written into the output folder.

    Raises:
        ValueError: vLLM is not installed, or it cannot serve or load a drafter.
    """
    if not verification.drafters:
        raise ValueError(
            "drafters: [] names none: give trained runs, such as `--drafters runs/eagle3 "
            "runs/medusa`"
        )
    # 1. Refuse early what vLLM cannot run.
    evaluation = verification.evaluation(ENGINE)
    evaluation.check()
    output = Path(verification.output)
    with claimed(output):
        # 2. Load every export once, with its tensors watched.
        target = load_target(evaluation.target_name(), "float32", "cpu")
        loaded = {
            method.label: loading(method, target, verification.tokens) for method in evaluation.rows
        }
        # 3. The same prompts through vLLM and through our loop.
        theirs = evaluate(evaluation, output / ENGINE, console=console, overwrite=True)
        our_evaluation = verification.evaluation("slipstream")
        ours = evaluate(our_evaluation, output / "slipstream", console=console, overwrite=True)
        # 4. Pair the rows by name.
        rows = [
            {method["name"]: method for method in report["methods"]} for report in (theirs, ours)
        ]
        findings = [Finding(loaded[name], rows[0][name], rows[1][name]) for name in loaded]
        write_whole({output / "serving.md": document(findings, theirs)})
    return findings


def loading(method: Method, target: Target, tokens: int) -> dict[str, Any]:
    """How vLLM loads an exported drafter's tensors: numbers and names, see `eval.vllm.loading`."""
    where = f"drafters: {method.label}"
    drafter = load_drafter(method.drafter or "", target, where)
    # One engine only to load the export; nothing is decoded.
    with tempfile.TemporaryDirectory(prefix="vllm-drafter-") as scratch:
        folder = Path(scratch) / "drafter"
        speculation, _ = export_for_vllm(drafter, target, folder, tokens, where)
        common = engine_arguments(target, "float32", 1, 1)
        worker = Worker({**common, "speculative_config": speculation}, where, str(folder))
        worker.close()
    if "shipped" not in worker.loaded:
        raise ValueError(
            f"{where}: vLLM has not loaded the drafter through its usual loader: nothing was "
            "compared"
        )
    return worker.loaded


def document(findings: Sequence[Finding], report: Mapping[str, Any]) -> str:
    """The table in Markdown, with prompts, command, revision, machine and packages."""
    environment, settings = report["environment"], report["settings"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    lines = [list(_COLUMNS), ["---"] * len(_COLUMNS), *(finding.cells() for finding in findings)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    first, target = report["methods"][0], report["targets"][0]
    conditions = (
        f"{first['prompts']} prompts ({', '.join(settings['prompts'])}), {first['batch_size']} at "
        f"once, up to {settings['max_new_tokens']} new tokens, greedy, {target['name']} in "
        f"{target['dtype']}."
    )
    facts = [
        f"command: `{environment['command']}`",
        f"revision: {environment['git_revision']}",
        f"machine: {environment['device']}, {environment['cores']} cores",
        f"packages: {packages}",
    ]
    return "\n\n".join([table, conditions, "\n".join(f"- {fact}" for fact in facts)]) + "\n"


def command(arguments: Sequence[str]) -> int:
    """Verify, print the table and failed checks; returns the exit status."""
    parser = ArgumentParser(
        prog="python -m eval.verify_vllm", exit_on_error=False, description=__doc__
    )
    # Lists may be given as several words, so they are added separately.
    parser.add_argument(
        "--drafters",
        nargs="+",
        type=str,
        default=[],
        help="run folders, drafter folders or Hub ids",
    )
    parser.add_argument(
        "--prompts", nargs="+", type=str, default=["embedded"], help="as eval.py takes them"
    )
    parser.add_class_arguments(Verification, skip={"drafters", "prompts"}, fail_untyped=True)
    verification = Verification(**parse(parser, arguments).as_dict())
    quieten()
    findings = verify(verification, Console())
    faults = [fault for finding in findings for fault in finding.faults()]
    print((Path(verification.output) / "serving.md").read_text(encoding="utf-8"))
    print("\n".join(faults) or "vLLM serves every drafter as it was trained")
    return 1 if faults else 0


if __name__ == "__main__":
    exit_with(command)
