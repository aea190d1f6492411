"""vLLM as a decoder that the harness measures: `python eval.py --engine vllm --drafters …`.

Every row is a vLLM engine in a separate process, started for the first prompt and alive until the
end, so rows are interleaved prompt by prompt like all others. A process holds one engine, because
vLLM's counters, process groups and threads belong to the process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from checkpoints.export import trainable_class_of, write
from checkpoints.formats.known import FORMATS, formats_of, unserved
from eval.methods.rows import AUTOREGRESSIVE, EXPORT_NOTES, Method, Row, load_drafter, unique_labels
from modules.contracts.drafter import Drafter
from modules.contracts.sampling import Sampling
from modules.contracts.target import Target
from modules.decoding.decoder import Trace
from modules.target.loading import locate

ENGINE = "vllm"


@dataclass(frozen=True)
class Served:
    """How vLLM serves an export format.

    method: vLLM's name of it. parallel: whether all tokens are drafted in one pass, of a method
    that has others too. whole_block: whether drafts depend on how many are drafted, so that only
    the trained number gives those of training.
    """

    method: str
    parallel: bool = False
    whole_block: bool = False


SERVED = {
    "speculators": Served("eagle3"),
    "peagle_speculators": Served("eagle3", parallel=True),
    "dflash_speculators": Served("dflash", whole_block=True),
    "dspark_speculators": Served("dspark", whole_block=True),
    "eagle": Served("eagle"),
    "medusa": Served("medusa"),
    "hf": Served("draft_model"),
}
"""Export formats that vLLM reads. EAGLE-3.1 is EAGLE-3's, with flags."""
DTYPES = ("float32", "bfloat16", "float16")
_ROOT = Path(__file__).resolve().parents[2]
_DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Defaults that the environment overrides: GiB of KV cache for each engine on a CPU, an engine in a
single process, no usage statistics.
"""


# -- what can run ----------------------------------------------------------------------------------


def check_vllm(methods: Sequence[Method], dtype: str, device: str | None) -> None:
    """Refuse settings that vLLM cannot run, before anything is loaded.

    Raises:
        ValueError: vLLM is not installed, a drafter that it does not serve, or a setting that
            belongs to our own loop.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "engine 'vllm': vLLM is not installed in this Python: use an environment that has it "
            "(`make verify-vllm` makes one), or leave --engine out"
        )
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype {dtype!r}: vLLM does not compute in it: use one of {', '.join(DTYPES)}"
        )
    if device is not None:
        raise ValueError(
            f"device {device!r}: vLLM runs on what it was built for: leave `device` out"
        )
    for method in methods:
        _check_method(method, f"methods: {method.label}")


def _check_method(method: Method, where: str) -> None:
    # Settings of this project's loop.
    for key in ("decoder", "builder", "rule", "control", "precision"):
        if getattr(method, key):
            raise ValueError(
                f"{where}: `{key}` belongs to this project's own loop: leave it out with engine "
                "'vllm'"
            )
    if method.budget == "auto":
        raise ValueError(
            f"{where}: budget 'auto' belongs to this project's own loop: give a number of drafted "
            "tokens"
        )
    # Only trained drafters have an export, and only some classes a format that vLLM reads.
    if not isinstance(method.drafter, str):
        raise ValueError(
            f"{where}: a drafter without training has no export: give a trained one with engine "
            "'vllm'"
        )
    format_for(trainable_class_of(method.drafter), where)


def format_for(kind: type, where: str) -> str:
    """The export format in which vLLM serves drafters of this class.

    Raises:
        ValueError: there is none.
    """
    served_format = next((name for name in formats_of(kind) if name in SERVED), None)
    if served_format is None:
        reason = unserved(kind) or f"vLLM serves no {kind.__name__}"
        raise ValueError(
            f"{where}: {reason}: leave it out, or leave out --engine to measure it with this "
            "project's own loop"
        )
    return served_format


# -- the process -----------------------------------------------------------------------------------


@dataclass
class Worker:
    """A process with one vLLM engine (`eval.vllm.worker`).

    Args:
        engine: arguments of `vllm.LLM`.
        where: prefix of error messages.
        watch: an exported drafter's folder, to check how its tensors are loaded.

    Raises:
        ValueError: the engine cannot be made; the message names vLLM's log.
    """

    engine: Mapping[str, Any]
    where: str
    watch: str = ""
    loaded: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """Start the process and wait for its engine."""
        # Requests and replies go through pipes, vLLM's own output into the log.
        handle, log = tempfile.mkstemp(prefix="vllm-", suffix=".log")
        self.log = Path(log)
        with os.fdopen(handle, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "eval.vllm.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env=environment(),
            )
        self.loaded = self.ask({"engine": dict(self.engine), "watch": self.watch})

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to one question.

        Raises:
            ValueError: vLLM failed or ended; its log is not removed.
        """
        # A process that ended has no reply.
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        reply = (
            json.loads(line)
            if line
            else {"error": f"its process ended with status {self.process.wait()}"}
        )
        if "error" in reply:
            self._end()
            raise ValueError(
                f"{self.where}: vLLM failed: {reply['error']} (all it said: {self.log})"
            )
        return reply

    def close(self) -> None:
        """End the process and remove its log."""
        if self._end():
            self.log.unlink(missing_ok=True)

    def _end(self) -> bool:
        """End the process; whether it was still running."""
        # Closing stdin ends the worker's loop.
        if self.process.stdin is None or self.process.stdin.closed:
            return False
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            return False
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return True


def environment() -> dict[str, str]:
    """The environment of a vLLM process: this process's, with the same number of threads."""
    # Bind to the first cores, and let the project's packages be imported.
    threads = torch.get_num_threads()
    cores = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(threads))
    )
    bound = ",".join(map(str, cores[:threads]))
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    return {
        "VLLM_CPU_OMP_THREADS_BIND": bound,
        **_DEFAULTS,
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
    }


# -- the decoder -----------------------------------------------------------------------------------


class VllmDecoder:
    """Answers through a vLLM engine, with an exported drafter or without.

    vLLM counts, per batch, the calls that drafted and how many of them accepted at least 1, 2, …
    drafts. These give the tokens of each call, but not the prompt they belong to, so all calls of
    a batch are in its first trace. vLLM counts before answers are truncated at their end;
    `cut_off` corrects for that. Prefill ends with the batch's first token.

    Args:
        name: label in reports.
        target: the target; vLLM loads its weights itself.
        engine: arguments of `vllm.LLM`.
        drafter: the drafter that was exported.
    """

    engine: ClassVar[str] = ENGINE
    batched: ClassVar[bool] = True

    def __init__(
        self, name: str, target: Target, engine: Mapping[str, Any], drafter: Drafter | None = None
    ) -> None:
        self.name, self.target, self.arguments, self.drafter = name, target, engine, drafter
        self.peak_memory: int | None = None
        self._worker: Worker | None = None

    def decode(self, prompts: list[list[int]], sampling: Sampling, limit: int) -> list[Trace]:
        """Continue every prompt by at most `limit` tokens, as one batch.

        Raises:
            ValueError: vLLM failed.
        """
        self._worker = self._worker or Worker(self.arguments, self.name)
        arguments = [
            sampling_arguments(sampling, i, limit, self.target) for i in range(len(prompts))
        ]
        reply = self._worker.ask({"prompts": prompts, "sampling": arguments})
        self.peak_memory = reply["peak"]
        return traces(prompts, reply, self.drafter is not None)

    def close(self) -> None:
        """End the engine's process, if it was started."""
        if self._worker is not None:
            self._worker.close()


def sampling_arguments(
    sampling: Sampling, index: int, limit: int, target: Target
) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams` for one prompt of a batch."""
    arguments = {
        "max_tokens": limit,
        "temperature": sampling.temperature,
        "stop_token_ids": sorted(target.eos_ids),
        "detokenize": False,
    }
    if sampling.temperature == 0:
        return arguments
    return {
        **arguments,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": sampling.seed + index,
    }


def traces(
    prompts: Sequence[Sequence[int]], reply: Mapping[str, Any], drafting: bool
) -> list[Trace]:
    """Traces of one batch, from a reply of `eval.vllm.worker.answer`."""
    # Times are those of the batch, the same in every trace.
    prefill = min(reply["first_tokens"])
    seconds = {"prefill": prefill, "other": reply["seconds"] - prefill}
    # Tokens of all calls, which go into the first trace.
    after_first = sum(max(0, len(ids) - 1) for ids in reply["ids"])
    together = emitted_by_calls(reply["counted"]) if drafting else []
    together = cut_off(together, after_first, len(prompts))
    batch: list[Trace] = []
    for prompt, ids, first in zip(prompts, reply["ids"], reply["first_tokens"], strict=True):
        calls = ([] if batch else together) if drafting else [1] * (len(ids) - 1)
        batch.append(Trace(len(prompt), ids, [False] * len(ids), calls, [], [], seconds, first))
    return batch


def emitted_by_calls(counted: Mapping[str, Sequence[int]]) -> list[int]:
    """Tokens emitted by each drafting call (fewest first), from vLLM's counters.

    `accepted_tokens_per_pos[d]` calls accepted more than d drafts, so the difference of neighbours
    is the number of calls that accepted exactly d; a call emits one token more than it accepts.
    """
    reached = [counted["drafts"][0], *counted["accepted_tokens_per_pos"], 0]
    emitted = [
        accepted + 1
        for accepted in range(len(reached) - 1)
        for _ in range(reached[accepted] - reached[accepted + 1])
    ]
    assert sum(emitted) == counted["accepted_tokens"][0] + counted["drafts"][0], (
        "vLLM's counters contradict each other"
    )
    return emitted


def cut_off(emitted: Sequence[int], tokens: int, answers: int) -> list[int]:
    """Emitted tokens by call, without those after the ends of answers, at most `tokens` in all.

    vLLM does not report which call was an answer's last and how many tokens were dropped, so an
    even share per answer is subtracted from the shortest call that is long enough. The sum, and so
    τ, is right where all calls drafted; calls without drafts have no counter, and then too little
    is subtracted.
    """
    # The excess, shared evenly by the answers.
    left, cut, excess = sorted(emitted), [], max(0, sum(emitted) - tokens)
    for answer in range(answers):
        share = excess // answers + (answer < excess % answers)
        long_enough = next((place for place, count in enumerate(left) if count > share), None)
        if share and long_enough is not None:
            cut.append(left.pop(long_enough) - share)
    return sorted(left + cut)


# -- rows ------------------------------------------------------------------------------------------


@contextmanager
def vllm_rows(
    methods: Sequence[Method], target: Target, sampling: Sampling, dtype: str, batch: int
) -> Iterator[list[Row]]:
    """Rows in vLLM, alive inside the `with` block: `autoregressive` without a drafter, and one per
    method.

    Args:
        methods: methods that passed `check_vllm`.
        target: the target they draft for.
        sampling: the evaluation's; a method may have its own temperature.
        dtype: of the target.
        batch: prompts at once at most.

    Raises:
        ValueError: a drafter of another target, or one whose settings its format cannot hold.
    """
    # 1. One engine without a drafter serves the baselines at every temperature.
    common = engine_arguments(target, dtype, batch, len(methods) + 1)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-drafters-")))
        plain = VllmDecoder(AUTOREGRESSIVE, target, common)
        stack.callback(plain.close)
        rows = [_plain_row(plain, sampling, sampling)]
        # 2. One engine per method, with its drafter exported.
        for method, label in zip(methods, unique_labels(methods)):
            row_sampling = (
                sampling
                if method.temperature is None
                else replace(sampling, temperature=method.temperature)
            )
            baseline = _plain_row(plain, row_sampling, sampling)
            rows += [] if baseline.name in {row.name for row in rows} else [baseline]
            rows.append(
                _drafter_row(
                    method,
                    label,
                    target,
                    row_sampling,
                    common,
                    scratch / str(len(rows)),
                    baseline.name,
                )
            )
            stack.callback(rows[-1].decoder.close)  # type: ignore[attr-defined]
        yield rows


def engine_arguments(target: Target, dtype: str, batch: int, engines: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that all rows share.

    Prefixes are not cached, because baselines read every prompt twice. Graphs are compiled only on
    a GPU, whose memory is divided among the engines.
    """
    gpu = torch.cuda.is_available()
    return {
        "model": locate(target.name),
        "dtype": dtype,
        "max_model_len": target.max_positions,
        "max_num_seqs": batch,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "enforce_eager": not gpu,
        **({"gpu_memory_utilization": round(0.9 / (engines + 1), 3)} if gpu else {}),
    }


def _plain_row(decoder: VllmDecoder, sampling: Sampling, first: Sampling) -> Row:
    name = AUTOREGRESSIVE if sampling == first else f"{AUTOREGRESSIVE} at {sampling.temperature:g}"
    return Row(name, decoder, decoder.target, sampling, name, engine=ENGINE, budget=0)


def _drafter_row(
    method: Method,
    label: str,
    target: Target,
    sampling: Sampling,
    common: Mapping[str, Any],
    folder: Path,
    baseline: str,
) -> Row:
    # Export the drafter, and let vLLM draft a chain with it.
    where = f"methods: {label}"
    drafter = load_drafter(method.drafter or "", target, where)
    tokens = drafted_tokens(
        drafter, method.budget if isinstance(method.budget, int) else None, where
    )
    speculation, notes = export_for_vllm(drafter, target, folder, tokens, where)
    decoder = VllmDecoder(label, target, {**common, "speculative_config": speculation}, drafter)
    return Row(
        label,
        decoder,
        target,
        sampling,
        baseline,
        engine=ENGINE,
        builder="chain",
        budget=tokens,
        drafter_parameters=drafter.trained_size,
        quality={EXPORT_NOTES: list(notes)} if notes else {},
    )


def export_for_vllm(
    drafter: Drafter, target: Target, folder: Path, tokens: int, where: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Write the drafter in vLLM's format; returns vLLM's `speculative_config` for so many drafted
    tokens, and notes on how the export differs from the drafter.

    Raises:
        ValueError: vLLM cannot serve this drafter, or its settings.
    """
    form = format_for(type(drafter), where)
    try:
        with torch.no_grad():
            exported = FORMATS[form].exported(drafter, target)
            write(exported, folder)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    served = SERVED[form]
    speculation: dict[str, Any] = {"method": served.method, "model": str(folder)}
    if served.parallel:
        speculation["parallel_drafting"] = True
    return {**speculation, "num_speculative_tokens": tokens}, exported.notes


def drafted_tokens(drafter: Drafter, budget: int | None, where: str) -> int:
    """Tokens of vLLM's chain: `budget`, by default the depth of the drafter's own tree.

    Raises:
        ValueError: the budget exceeds the drafter's depth, or cuts a block whose tokens depend on
            its length.
    """
    whole = SERVED[format_for(type(drafter), where)].whole_block
    if whole and budget is not None and budget < (drafter.max_depth or 0):
        raise ValueError(
            f"{where}: budget {budget}: vLLM would fill blocks of {budget} tokens, and those of "
            f"this drafter were trained with {drafter.max_depth}: give {drafter.max_depth}"
        )
    if budget is not None and drafter.max_depth is not None and budget > drafter.max_depth:
        raise ValueError(
            f"{where}: budget {budget}: vLLM drafts a chain, and the drafter has "
            f"{drafter.max_depth} {drafter.depth_unit}: give {drafter.max_depth} at most"
        )
    return budget or (drafter.max_depth if whole else None) or drafter.builder.depth
