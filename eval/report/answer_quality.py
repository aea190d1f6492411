"""The `quality` of a method in the report: scores of its answers, and their likelihood under the
target.

Shape legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from eval.methods.rows import Row
from eval.metrics.losslessness import teacher_forced
from eval.metrics.repetition import repetition
from eval.run.journal import Record
from eval.tasks.answer_checks import RUNS_CODE, Check, common_prefix, paired_outcome, score
from eval.tasks.programs import isolation
from modules.contracts.target import Target
from modules.decoding.loop import Trace

Quality = Literal["lossy", "all", "none"]
Answers = Mapping[str, Record]


@dataclass(frozen=True)
class Scoring:
    """Which answers are scored, and how.

    which: `lossy` rows and the plain decoding that they are compared with, `all` rows, or `none`.
    checks: by prompt.
    run_code: whether programs that the model wrote may run.
    """

    which: Quality = "lossy"
    checks: Mapping[str, Check] = field(default_factory=dict)
    run_code: bool = False

    @property
    def usable(self) -> dict[str, Check]:
        """The checks that may run."""
        return {
            name: check
            for name, check in self.checks.items()
            if self.run_code or check.metric not in RUNS_CODE
        }

    def chosen(self, rows: Sequence[Row]) -> set[str]:
        """Names of the rows whose quality is measured."""
        if self.which == "all":
            return {row.name for row in rows}
        lossy = [row for row in rows if not row.claims_lossless] if self.which == "lossy" else []
        return {name for row in lossy for name in (row.name, row.baseline)}


@dataclass(frozen=True)
class Agreement:
    """How far the target agrees with an answer, summed over its tokens.

    likelihood: log probability at temperature 1. first_choices: tokens that are the argmax.
    """

    likelihood: float
    first_choices: float
    tokens: int


def agreements(target: Target, answers: Answers) -> dict[str, Agreement]:
    """The agreement of every non-empty answer, by prompt."""
    return {
        prompt: _agreement(target, answer) for prompt, answer in answers.items() if answer.trace.ids
    }


def _agreement(target: Target, answer: Record) -> Agreement:
    forced = teacher_forced(target, answer.prompt_ids, answer.trace.ids)
    return Agreement(
        float(forced.log_probs_T.sum()), float(forced.first_T.sum()), len(answer.trace.ids)
    )


@dataclass(frozen=True)
class Answered:
    """One row's answers, and the target's agreement with them."""

    answers: Answers
    agreements: Mapping[str, Agreement]


def quality_figures(
    target: Target, method: Answered, plain: Answered, checks: Mapping[str, Check]
) -> dict[str, Any]:
    """Scores by metric against plain decoding's, and agreement with the target.

    target_log_likelihood: mean natural log probability, at temperature 1, that the target gives to
    an emitted token.
    likelihood_against_plain: the mean of each answer, less that of plain decoding's answer to the
    same prompt.
    argmax_share: of the emitted tokens that are the target's first choice after what was emitted
    before.
    common_prefix: mean share of plain decoding's answer before the first difference.
    repetition: mean share of an answer's runs of four tokens that stood in it before.
    oracle, beside a metric's mean: that of the best of all answers of decoders that give several.
    """
    # Agreement first, then the scores of the tasks' own metrics.
    figures: dict[str, Any] = {
        **_likelihoods(method.agreements, plain.agreements),
        "common_prefix": fmean(
            common_prefix(answer.trace.ids, plain.answers[prompt].trace.ids)
            for prompt, answer in method.answers.items()
        ),
        "repetition": fmean(repetition(answer.trace.ids) for answer in method.answers.values()),
    }
    figures |= _scored(target, method.answers, plain.answers, checks)
    return figures


def _likelihoods(method: Mapping[str, Agreement], plain: Mapping[str, Agreement]) -> dict[str, Any]:
    tokens = sum(agreement.tokens for agreement in method.values())
    if not tokens:
        return {"target_log_likelihood": None, "argmax_share": None}
    # Answers without a token have no mean, so only prompts with both are paired.
    both = [prompt for prompt in method if prompt in plain]
    means, others = (
        [agreements[prompt].likelihood / agreements[prompt].tokens for prompt in both]
        for agreements in (method, plain)
    )
    return {
        "target_log_likelihood": sum(agreement.likelihood for agreement in method.values())
        / tokens,
        "likelihood_against_plain": paired_outcome(means, others) if both else None,
        "argmax_share": sum(agreement.first_choices for agreement in method.values()) / tokens,
    }


def _scored(
    target: Target, answers: Answers, plain: Answers, checks: Mapping[str, Check]
) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for metric in dict.fromkeys(check.metric for check in checks.values()):
        # The prompts that are scored with this metric.
        prompts = [
            prompt for prompt in answers if prompt in checks and checks[prompt].metric == metric
        ]
        if prompts:
            method_scores, plain_scores = (
                [score(_text(target, texts[prompt]), checks[prompt]) for prompt in prompts]
                for texts in (answers, plain)
            )
            scores[metric] = {
                "mean": fmean(method_scores),
                "prompts": len(prompts),
                **paired_outcome(method_scores, plain_scores),
            }
            if any(answers[prompt].trace.answers for prompt in prompts):
                scores[metric]["oracle"] = fmean(
                    max(
                        score(text, checks[prompt])
                        for text in _texts(target, answers[prompt].trace)
                    )
                    for prompt in prompts
                )
            if metric in RUNS_CODE:
                scores[metric]["programs_ran_in"] = isolation()
    return scores


def _text(target: Target, answer: Record) -> str:
    return target.tokenizer.decode(answer.trace.ids, skip_special_tokens=True)


METRIC_NAMES = {
    "exact_match": "exact match",
    "math_answer": "boxed answer",
    "tool_calls": "tool calls",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "pass_at_1": "pass@1",
    "named_share": "named share",
    "same_line": "next line",
    "json_schema": "valid JSON",
}


def _texts(target: Target, trace: Trace) -> list[str]:
    """All answers of a decoder that gives several."""
    return [
        target.tokenizer.decode(ids, skip_special_tokens=True)
        for ids in trace.answers or [trace.ids]
    ]


def quality_table(methods: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the methods whose quality was measured; without any, no lines."""
    measured = [method for method in methods if "target_log_likelihood" in method["quality"]]
    # A column for each metric that any method has.
    metrics = [
        name for name in METRIC_NAMES if any(name in method["quality"] for method in measured)
    ]
    # Earlier reports did not count repetitions.
    repeated = any("repetition" in method["quality"] for method in measured)
    header = [
        "method",
        *(f"{METRIC_NAMES[name]} (win/tie/loss)" for name in metrics),
        "log likelihood per token",
        "against plain decoding (win/tie/loss)",
        "target's first choice",
        "same beginning",
        *(["repeated runs"] if repeated else []),
    ]
    return header, [
        [
            method["name"],
            *(_score_cell(method["quality"].get(name)) for name in metrics),
            *_agreement_cells(method["quality"]),
            *([_number_cell(method["quality"].get("repetition"))] if repeated else []),
        ]
        for method in measured
    ]


def program_lines(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    """How generated programs were isolated, if any ran."""
    places = {
        method["quality"][name]["programs_ran_in"]
        for method in methods
        for name in METRIC_NAMES
        if isinstance(method["quality"].get(name), Mapping)
        and "programs_ran_in" in method["quality"][name]
    }
    return [f"programs for pass@1 ran in: {place}" for place in sorted(places)]


def constraint_lines(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    """How constrained answers ended, what was forced, and what the masks cost, by method."""
    ends = [
        f"{method['name']}: {quality['whole_share']:.0%} of the answers ended as their constraint "
        f"allows, {quality['cut_share']:.0%} were cut before, {quality['dead_share']:.0%} ended "
        "where it allowed nothing"
        for method in methods
        if "whole_share" in (quality := method["quality"])
    ]
    return ends + [
        f"{method['name']}: {quality['forced_share']:.0%} of the tokens were forced and drafted "
        f"for free; {quality['masks_per_token']:.2f} masks a token took "
        f"{quality['mask_ms_per_token']:.3f} ms"
        for method in methods
        if "mask_ms_per_token" in (quality := method["quality"])
    ]


def _score_cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    return (
        f"{entry['mean']:.3f} ({entry['win']}/{entry['tie']}/{entry['loss']}: {entry['verdict']})"
    )


def _number_cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _agreement_cells(quality: Mapping[str, Any]) -> list[str]:
    keys = ("target_log_likelihood", "argmax_share", "common_prefix")
    cells = [_number_cell(quality[key]) for key in keys]
    return [cells[0], _difference_cell(quality.get("likelihood_against_plain")), *cells[1:]]


def _difference_cell(entry: Mapping[str, Any] | None) -> str:
    """The mean difference, its interval, the verdict, and the numbers of wins, ties and losses."""
    if entry is None:
        return "–"
    bounds = "" if entry["ci95"] is None else " ({:+.3f} to {:+.3f})".format(*entry["ci95"])
    counts = "/".join(str(entry[kind]) for kind in ("win", "tie", "loss"))
    return f"{entry['difference']:+.3f}{bounds}: {entry['verdict']} ({counts})"


def control_lines(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    """Per negative control (`Method.control`): whether the target's log likelihood separates it
    from plain decoding.

    Where it does not, the measure cannot separate bad answers from good ones on these prompts.
    """
    # Controls whose likelihood was compared with plain decoding's.
    controls = [
        (method["name"], method["quality"]["likelihood_against_plain"])
        for method in methods
        if method["quality"].get("control") and method["quality"].get("likelihood_against_plain")
    ]
    return [
        f"control: {name} is {'found worse' if entry['verdict'] == 'loss' else 'NOT found worse'} "
        f"than plain decoding, log likelihood per token {_difference_cell(entry)}"
        + (
            ""
            if entry["verdict"] == "loss"
            else "; do not rely on the quality figures, ask more prompts"
        )
        for name, entry in controls
    ]
