"""One evaluation from its settings to its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from checkpoints.pretrained import find_folder, read_config
from configs.command_line.class_paths import Kind
from configs.command_line.endings import resumable
from configs.command_line.progress import progress_of
from data.reading.files import Tally
from eval.methods.rows import Method, Precision, Row, build_rows, class_of, unique_labels
from eval.methods.templates import chat_arguments
from eval.methods.token_options import TokenOptions
from eval.methods.variants import vary
from eval.metrics.speed_model import explanations, is_baseline
from eval.report.answer_quality import (
    Quality,
    Scoring,
    constraint_lines,
    control_lines,
    program_lines,
)
from eval.report.html import Sample
from eval.report.markdown import (
    build_report,
    device_name,
    export_lines,
    failures,
    main_table,
    noise_lines,
)
from eval.report.output_folder import JOURNAL, PAGE, REPORTS, begun, taken, write
from eval.report.summary import Summary, summarise
from eval.report.token_pieces import pieces
from eval.run.harness import Harness, fitting, units
from eval.run.identity import known_before, known_loaded
from eval.run.journal import Journal, Record, journaled_budgets, refuse_changes
from eval.run.processes import Share, shared_out
from eval.serving.benchmark import measure, report_of
from eval.serving.settings import ENGINE as SERVER
from eval.serving.settings import Serving, check_server
from eval.tasks.contamination import note_overlaps
from eval.tasks.task_files import Turns
from eval.tasks.tasks import Task, asked_of, load_tasks
from eval.vllm.engine import ENGINE, check_vllm, vllm_rows
from modules.contracts.sampling import Sampling
from modules.contracts.target import Target
from modules.decoding.decoder import SpeculativeDecoder
from modules.target.loading import AUTO, check_loading, check_room, chosen_dtype, load_target
from modules.target.loading import EMBEDDED as EMBEDDED_TARGET

AUTOTUNE = "max-autotune"


@dataclass(frozen=True)
class Evaluation(TokenOptions):
    """What is measured, on what.

    Args:
        target: Hub id, folder, .gguf file or smollm2-135m; by default what the first drafter was
            trained for.
        drafters: run folders, drafter folders or Hub ids, each with `budget: auto`.
        engine: slipstream is this project's loop; vllm (if installed) serves exported drafters,
            budget tokens a chain; openai is a running server under load.
        url: of that server, up to `/v1`: vLLM, SGLang, llama.cpp or another with OpenAI's protocol.
        serving: its load, see eval/serving/settings.py.
        methods: rows in full: name, drafter or decoder, builder, rule, budget, temperature.
        prompts: tasks (`tasks/gsm8k`, `tasks/gsm8k=PATH`), files with `turns`, `prompt` or
            `question`, or `embedded`.
        turns: `first`, or `all` to ask later turns too.
        quality: whose answers are scored: of `lossy` methods and their baselines, of `all`, or of
            `none`.
        run_code: let HumanEval's pass@1 run the programs that models write (in a limited process,
            not a sandbox).
        limit: prompts per task.
        max_new_tokens: per answer.
        temperature: 0 is greedy; a list such as [0, 0.5, 1] measures every row at each.
        top_k: sample among the k likeliest tokens; 0 is all.
        top_p: sample within this probability mass.
        batch_size: prompts decoded together; a list such as [1, 4, 16] measures every row in each.
        repeats: passes over all prompts; medians are reported.
        share_prompts: read a prompt once for all rows that read it alike (for long prompts; the
            report counts its seconds in each).
        draft_precision: of drafters' weights: float32, bfloat16 or float16; by default the
            target's.
        dtype: of the target: float32, float64, bfloat16, float16; 8bit or 4bit where bitsandbytes
            is installed; auto is bfloat16 on a GPU that multiplies it and float32 elsewhere.
        chat_template: arguments of the target's chat template; by default those the first drafter
            was trained with.
        device: a torch device; by default the GPU if there is one; `auto` spreads the target over
            all of them.
        compile: let the target's calls over trees go through torch.compile (`max-autotune` also
            tries kernels). Batches run uncompiled.
        threads: of the CPU; by default as torch chooses.
        seed: of sampling; every prompt has its own, the same for all methods.
    """

    target: str | None = None
    drafters: list[str] = field(default_factory=list)
    engine: Literal["slipstream", "vllm", "openai"] = "slipstream"
    url: str | None = None
    serving: Serving = field(default_factory=Serving)
    methods: list[Method] = field(default_factory=list)
    prompts: list[str] = field(default_factory=lambda: ["embedded"])
    turns: Turns = "first"
    quality: Quality = "lossy"
    run_code: bool = False
    limit: int | None = None
    max_new_tokens: int = 64
    temperature: float | list[float] = 0.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int | list[int] = 1
    repeats: int = 1
    share_prompts: bool = False
    draft_precision: Precision | None = None
    dtype: str = AUTO
    chat_template: dict[str, Any] | None = None
    device: str | None = None
    compile: bool | Literal["max-autotune"] = False
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Resolve the dtype `auto`."""
        object.__setattr__(self, "dtype", chosen_dtype(self.dtype, self.device))

    @property
    def rows(self) -> list[Method]:
        """The drafters in shorthand, as many nodes as pay here, then the methods in full."""
        # vLLM drafts chains of the drafter's own length.
        budget = None if self.engine == ENGINE else "auto"
        return [*(Method(drafter=name, budget=budget) for name in self.drafters), *self.methods]

    @property
    def samplings(self) -> list[Sampling]:
        """How tokens are chosen, for every temperature."""
        heats = self.temperature if isinstance(self.temperature, list) else [self.temperature]
        return [self.sampling(heat, self.top_k, self.top_p, self.seed) for heat in heats]

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes in ascending order."""
        return sorted(self.batch_size) if isinstance(self.batch_size, list) else [self.batch_size]

    def check(self, tally: Tally | None = None) -> list[Task]:
        """Refuse what cannot run, before anything is loaded; returns the tasks.

        Raises:
            ValueError: the key, its value and the fix.
        """
        # Values of single keys.
        for name in ("max_new_tokens", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._check_variants()
        self._check_server()
        check_loading(self.dtype, self.device)
        # Every method alone, then their labels together.
        for temperature in (method.temperature for method in self.methods):
            Sampling(temperature or 0.0)
        for method in self.rows:
            method.check()
        unique_labels(self.rows)
        # What the chosen engine can run.
        self.applied_by(self.engine, [])
        if self.compile and self.engine == ENGINE:
            raise ValueError(
                f"compile {self.compile} is for this project's own loop: leave it out with engine "
                "'vllm'"
            )
        if self.engine == ENGINE:
            check_vllm(self.rows, self.dtype, self.device)
        return self.applied_by(self.engine, load_tasks(self.prompts, self.limit, self.turns, tally))

    def _check_server(self) -> None:
        """Refuse what only another engine reads."""
        if self.engine != SERVER:
            if self.url is not None or self.serving != Serving():
                raise ValueError(
                    f"url and serving are for engine 'openai', got engine {self.engine!r}: add "
                    "--engine openai, or leave them out"
                )
            return
        check_server(self.url, self.serving)
        if self.rows or self.compile or self.turns != "first" or isinstance(self.temperature, list):
            raise ValueError(
                "engine 'openai' asks a server as it runs: leave out drafters, methods, compile, "
                "turns and lists of temperatures (its load is serving.concurrency and "
                "serving.request_rate)"
            )

    def _check_variants(self) -> None:
        for name, value in (("batch_size", self.batch_size), ("temperature", self.temperature)):
            if isinstance(value, list) and (not value or len(set(value)) < len(value)):
                raise ValueError(f"{name} {value} must name each value once, and at least one")
        if self.batch_sizes[0] < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_sizes[0]}")
        assert self.samplings
        # Decoders without batches need a row of batch size 1.
        for method in self.methods if self.batch_sizes[0] > 1 else ():
            if method.decoder is not None and not getattr(
                class_of(method.decoder, "methods", Kind.DECODER, 1), "batched", True
            ):
                raise ValueError(
                    f"methods: {method.label} decodes one prompt at a time: give batch_size 1, a "
                    "list with 1 in it, or leave the method out"
                )

    def target_name(self) -> str:
        """The configured target, by default the first drafter's, else the embedded model."""
        trained = next(
            (method.drafter for method in self.rows if isinstance(method.drafter, str)), None
        )
        if self.target is not None or trained is None:
            return self.target or EMBEDDED_TARGET
        return read_config(find_folder(trained))["target"]["name"]


def evaluate(
    evaluation: Evaluation,
    output: Path,
    resume: bool = False,
    console: Console | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure, and write `report.json`, `.md` and `.html` into `output`; returns the report.

    Under `torchrun` every process measures its share, and all of them return the same report.

    Args:
        evaluation: what is measured.
        output: folder, locked during the evaluation.
        resume: continue an earlier evaluation in this folder, if there is one.
        console: where progress and the table are shown.
        overwrite: replace an earlier evaluation in this folder.

    Raises:
        ValueError: settings that cannot run, or an output that cannot be written (before anything
            is loaded); a drafter that does not fit the target.
    """
    # 1. Check the settings, before anything is loaded.
    tally = Tally("prompt")
    tasks = evaluation.check(tally)
    if resume and evaluation.engine == SERVER:
        raise ValueError("--resume: a load test is measured in one go, leave it out")
    if resume and overwrite:
        raise ValueError("--resume and --overwrite contradict each other: give one")
    if evaluation.threads is not None:
        torch.set_num_threads(evaluation.threads)
    # 2. Measure this process's share, with the output folder locked.
    with shared_out() as share:
        if share.count > 1 and evaluation.engine in (ENGINE, SERVER):
            raise ValueError(
                f"engine {evaluation.engine!r} measures in one process, {share.count} were "
                "started: leave out torchrun"
            )
        console = console or Console(quiet=not share.first)
        with taken(output, resume or overwrite, share), resumable(lambda: "go on with --resume"):
            if evaluation.engine == SERVER:
                return _load_test(evaluation, tasks, output, console, tally)
            return _evaluate(evaluation, tasks, output, resume, console, share, tally)


def _load_test(
    evaluation: Evaluation, tasks: list[Task], output: Path, console: Console, tally: Tally
) -> dict[str, Any]:
    """The report of a server under load."""
    assert evaluation.url is not None
    for name in (*REPORTS, JOURNAL):
        (output / name).unlink(missing_ok=True)
    # Fields that servers read besides OpenAI's.
    extra: dict[str, Any] = {"top_k": evaluation.top_k} if evaluation.top_k else {}
    if evaluation.chat_template:
        extra["chat_template_kwargs"] = evaluation.chat_template
    rows, model = measure(
        evaluation.url,
        evaluation.serving,
        tasks,
        evaluation.samplings[0],
        evaluation.max_new_tokens,
        extra,
        lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
    )
    settings = {
        **asked_of(tasks, evaluation.chat_template),
        "engine": evaluation.engine,
        "url": evaluation.url,
        "serving": asdict(evaluation.serving),
        **settings_of(evaluation),
        "limit": evaluation.limit,
    }
    settings |= {"left_out": tally.as_dict()} if tally.as_dict() else {}
    report = report_of(rows, model, settings)
    write(report, output, None)
    show(report, output, console)
    return report


def _evaluate(
    evaluation: Evaluation,
    tasks: list[Task],
    output: Path,
    resume: bool,
    console: Console,
    share: Share,
    tally: Tally,
) -> dict[str, Any]:
    """One process's part: measure its share of the prompts; the first process then makes the report
    of all.
    """
    # 1. Compare a resumed journal with what needs no model.
    place, requested = share.journal(output / JOURNAL, resume), tasks
    named = [method.drafter for method in evaluation.rows if isinstance(method.drafter, str)]
    evaluation = replace(evaluation, chat_template=chat_arguments(evaluation.chat_template, named))
    settings, limit = settings_of(evaluation), {"limit": evaluation.limit}
    settings |= {"processes": share.count} if share.count > 1 else {}
    header = known_before({**settings, **limit}, evaluation.rows, tasks, device_name())
    if resume:
        refuse_changes(place, header, part=True)
    # 2. Load the target, and with it every row.
    check_room(evaluation.target_name(), evaluation.max_new_tokens)
    target = load_target(
        evaluation.target_name(), evaluation.dtype, evaluation.device, evaluation.chat_template
    )
    if evaluation.compile:
        target.compile_calls(evaluation.compile == AUTOTUNE)
    with opened_rows(evaluation, target, most_together(tasks)) as rows:
        # 3. Fit the prompts to the context, vary the rows, print what was left out.
        tasks, skipped = fitting(tasks, rows, evaluation.max_new_tokens)
        note_overlaps(rows, evaluation.rows, tasks)
        rows = vary(rows, samplings_on(evaluation, target), evaluation.batch_sizes)
        agree_on_budgets(rows, share)
        if resume:
            keep_budgets(rows, journaled_budgets(place))
        if skipped:
            console.print(
                f"skipped, longer than the context: {', '.join(skipped)}",
                highlight=False,
                markup=False,
            )
        for line in tally.lines():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        for line in small_batches(tasks, evaluation.batch_sizes):
            console.print(line, style="yellow", highlight=False, markup=False)
        # 4. Decode, with every finished unit written to the journal.
        journal = begun(place, header | known_loaded(rows, requested), resume, share)
        records = _measure(evaluation, tasks, rows, journal, console, share)
    # 5. Summarise and write the report, in the first process only.
    summaries = []
    if share.first:
        summaries = summarise(rows, records, scoring_of(evaluation, tasks), most_together(tasks))
    named = {**settings, **limit, "skipped": skipped, **asked_of(tasks, evaluation.chat_template)}
    named |= {"left_out": tally.as_dict()} if tally.as_dict() else {}
    report = build_report(summaries, named)
    if share.first:
        write(report, output, choose_sample(summaries, tasks))
        show(report, output, console)
    return share.agreed(report)


def most_together(tasks: Sequence[Task]) -> int:
    """Prompts of the largest batch that there can be, because a batch holds prompts of one task."""
    return max(len(task.prompts) for task in tasks)


def small_batches(tasks: Sequence[Task], sizes: Sequence[int]) -> list[str]:
    """A line for each batch size that no task can fill."""
    most = most_together(tasks)
    return [
        f"batch_size {size}: no task has more than {most} prompts, so no batch is larger: raise "
        "--limit, or give a file with more prompts of one task"
        for size in sizes
        if size > most
    ]


def agree_on_budgets(rows: Sequence[Row], share: Share) -> None:
    """Give every process the budgets of the first: `budget: auto` measures, and may differ."""
    for row, budget in zip(rows, share.agreed([row.budget for row in rows]), strict=True):
        if isinstance(row.decoder, SpeculativeDecoder) and row.decoder.drafter is not None:
            row.budget = row.decoder.budget = budget


def keep_budgets(rows: Sequence[Row], budgets: Mapping[str, int]) -> None:
    """Give rows with `budget: auto` the budgets that the resumed evaluation measured."""
    for row in rows:
        decoder = row.decoder
        if row.measured_budget and row.name in budgets and isinstance(decoder, SpeculativeDecoder):
            row.budget = decoder.budget = budgets[row.name]


@contextmanager
def opened_rows(evaluation: Evaluation, target: Target, most: int) -> Iterator[list[Row]]:
    """All rows at the first temperature, for at most `most` prompts at once; another engine's
    processes run inside the `with` block."""
    sampling = samplings_on(evaluation, target)[0]
    most = min(most, evaluation.batch_sizes[-1])
    if evaluation.engine == ENGINE:
        with vllm_rows(evaluation.rows, target, sampling, evaluation.dtype, most) as rows:
            yield rows
    else:
        yield build_rows(
            evaluation.rows, target, sampling, evaluation.draft_precision, evaluation.batch_sizes[0]
        )


def samplings_on(evaluation: Evaluation, target: Target) -> list[Sampling]:
    """How tokens of this target are chosen, for every temperature."""
    return [evaluation.on_target(sampling, target) for sampling in evaluation.samplings]


def scoring_of(evaluation: Evaluation, tasks: Sequence[Task]) -> Scoring:
    """How these tasks' answers are scored."""
    checks = {
        prompt.id: prompt.check
        for task in tasks
        for prompt in task.prompts
        if prompt.check is not None
    }
    return Scoring(evaluation.quality, checks, evaluation.run_code)


def settings_of(evaluation: Evaluation) -> dict[str, Any]:
    """The report's `settings` that a resumed journal must share."""
    chosen = (
        "max_new_tokens",
        "seed",
        "repeats",
        "temperature",
        "top_k",
        "top_p",
        "batch_size",
        "turns",
    )
    # Optional keys are left out at their default, so that older reports still compare.
    engine = {} if evaluation.engine != ENGINE else {"engine": ENGINE}
    optional = ("compile", "chat_template", "share_prompts")
    engine |= {name: getattr(evaluation, name) for name in optional if getattr(evaluation, name)}
    return {
        "prompts": [Path(name).name for name in evaluation.prompts],
        **engine,
        **evaluation.changed_options(),
        **{name: getattr(evaluation, name) for name in chosen},
        "threads": torch.get_num_threads(),
    }


def _measure(
    evaluation: Evaluation,
    tasks: Sequence[Task],
    rows: Sequence[Row],
    journal: Journal,
    console: Console,
    share: Share,
) -> list[Record]:
    # Work by batch size: rows are interleaved within one size.
    work = {size: units(tasks, size, evaluation.repeats) for size in evaluation.batch_sizes}
    mine = [unit for batches in work.values() for unit in share.of(batches)]
    done = sum(unit.key in journal.done for unit in mine)
    with progress_of(
        f"{len(rows)} rows", "batches of prompts", done, len(mine), console=console
    ) as advance:
        # One harness per batch size, over this process's batches.
        for size, batches in work.items():
            harness = Harness(
                [row for row in rows if row.batch_size == size],
                evaluation.max_new_tokens,
                evaluation.seed,
                lambda unit: advance(1),
                evaluation.share_prompts,
            )
            harness.run(share.of(batches), journal)
    # Records of all processes, in the order of one process.
    every = share.merged(journal.done)
    return [record for batches in work.values() for unit in batches for record in every[unit.key]]


def choose_sample(summaries: Sequence[Summary], tasks: Sequence[Task]) -> Sample | None:
    """The fastest method's answer with most accepted drafts, among embedded prompts; None without
    a drafting method or an embedded prompt.
    """
    prompts = {prompt.id: prompt for task in tasks for prompt in task.prompts if prompt.embedded}
    # Candidates: drafting rows with at least one accepted draft.
    drafting = [
        summary
        for summary in summaries
        if not is_baseline(summary.figures)
        and any(any(answer.trace.drafted) for answer in summary.answers.values())
    ]
    if not prompts or not drafting:
        return None
    # Of the fastest row, the embedded prompt with most drafted tokens.
    best = max(drafting, key=lambda summary: summary.figures["speedup"]["micro"] or 0.0)
    shown = [answer for answer in best.answers.values() if answer.prompt in prompts]
    answer = max(shown, key=lambda answer: sum(answer.trace.drafted))
    tokens = zip(answer.trace.ids, answer.trace.drafted)
    return Sample(
        best.row.name,
        prompts[answer.prompt].turns[0],
        list(pieces(tokens, best.row.target.tokenizer)),
    )


def show(report: Mapping[str, Any], output: Path, console: Console) -> None:
    """Print the main table, noise, failed methods and the path of the report."""
    console.print(main_table(report, console.width))
    # Details under the table, then failures.
    methods = report["methods"]
    for line in (
        *noise_lines(report),
        *export_lines(methods),
        *control_lines(methods),
        *program_lines(methods),
        *constraint_lines(methods),
        *explanations(methods),
    ):
        console.print(line, highlight=False, markup=False)
    for name in failures(report):
        line = f"{name} promises the autoregressive row's tokens and gave others"
        console.print(line, style="bold red", markup=False)
    place = output / PAGE
    console.print(f"report: {place}", highlight=False, markup=False, soft_wrap=True)
