"""vLLM as a decoder that the harness measures: `python eval.py --engine vllm --drafters …`.

Every row is a vLLM engine in a process of its own, started when it is first asked and kept until
the end, so rows are interleaved prompt by prompt as all others are. A process holds one engine,
because vLLM's counters, its process groups and its threads belong to the process.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from checkpoints.export import trainable_class_of, write
from checkpoints.formats.known import FORMATS, formats_of
from eval.methods.rows import AUTOREGRESSIVE, EXPORT_NOTES, Method, Row, load_drafter, unique_labels
from modules.contracts.drafter import Drafter
from modules.contracts.sampling import Sampling
from modules.contracts.target import Target
from modules.decoding.decoder import Trace
from modules.target.loading import locate

ENGINE = "vllm"
SERVED = {"speculators": "eagle3", "eagle": "eagle", "medusa": "medusa", "hf": "draft_model"}
"""Export formats that vLLM reads, and what it calls the method."""
DTYPES = ("float32", "bfloat16", "float16")
_ROOT = Path(__file__).resolve().parents[2]
_DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Unless the environment says otherwise: GiB of KV cache for each engine on a CPU, all of an engine
in one process.
"""


# -- what can run ----------------------------------------------------------------------------------


def check_vllm(methods: Sequence[Method], dtype: str, device: str | None) -> None:
    """Refuse, before anything is loaded, what vLLM cannot run.

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
    found = next((name for name in formats_of(kind) if name in SERVED), None)
    if found is None:
        raise ValueError(
            f"{where}: vLLM serves no {kind.__name__}: leave it out, or leave out --engine to "
            "measure it with this project's own loop"
        )
    return found


# -- the process -----------------------------------------------------------------------------------


@dataclass
class Worker:
    """A process with one vLLM engine (`eval.vllm.worker`).

    Args:
        engine: arguments of `vllm.LLM`.
        where: what errors speak of.
        watch: an exported drafter's folder, to learn what becomes of its tensors.

    Raises:
        ValueError: the engine cannot be made; the message names vLLM's log.
    """

    engine: Mapping[str, Any]
    where: str
    watch: str = ""
    loaded: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """Start the process and wait until its engine is there."""
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
            ValueError: vLLM failed or ended; its log is kept.
        """
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
        """Whether the process was still running, and has ended now."""
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
    """The environment of a vLLM process: this one's, with as many threads as torch uses here."""
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

    Of speculation vLLM counts, per batch, the calls that drafted and how many of them accepted at
    least 1, 2, … drafts. From these each call's tokens follow, though not whose they were, so a
    batch's calls stand in its first trace. They are counted before answers are cut at their end,
    which `cut_off` makes up for. Prefill ends with the batch's first token.

    Args:
        name: what reports call it.
        target: whose text it is; vLLM loads it by itself.
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
    found = {
        "max_tokens": limit,
        "temperature": sampling.temperature,
        "stop_token_ids": sorted(target.eos_ids),
        "detokenize": False,
    }
    if sampling.temperature == 0:
        return found
    return {
        **found,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": sampling.seed + index,
    }


def traces(
    prompts: Sequence[Sequence[int]], reply: Mapping[str, Any], drafting: bool
) -> list[Trace]:
    """Traces of one batch from what `eval.vllm.worker.answer` says of it."""
    prefill = min(reply["first_tokens"])
    seconds = {"prefill": prefill, "other": reply["seconds"] - prefill}
    after_first = sum(max(0, len(ids) - 1) for ids in reply["ids"])
    together = emitted_by_calls(reply["counted"]) if drafting else []
    together = cut_off(together, after_first, len(prompts))
    found: list[Trace] = []
    for prompt, ids, first in zip(prompts, reply["ids"], reply["first_tokens"], strict=True):
        calls = ([] if found else together) if drafting else [1] * (len(ids) - 1)
        found.append(Trace(len(prompt), ids, [False] * len(ids), calls, [], [], seconds, first))
    return found


def emitted_by_calls(counted: Mapping[str, Sequence[int]]) -> list[int]:
    """Tokens that each drafting call emitted (fewest first), from vLLM's counters.

    `accepted_tokens_per_pos[d]` calls accepted more than d drafts, so exactly d were accepted by
    the difference of its neighbours; a call emits one token more than it accepts.
    """
    reached = [counted["drafts"][0], *counted["accepted_tokens_per_pos"], 0]
    found = [
        accepted + 1
        for accepted in range(len(reached) - 1)
        for _ in range(reached[accepted] - reached[accepted + 1])
    ]
    assert sum(found) == counted["accepted_tokens"][0] + counted["drafts"][0], (
        "vLLM's counters contradict each other"
    )
    return found


def cut_off(emitted: Sequence[int], tokens: int, answers: int) -> list[int]:
    """Calls without the tokens behind the ends of answers, so that no more than `tokens` are left.

    Which call was an answer's last, and how much it lost, vLLM does not report: every answer takes
    an even share off the shortest call that is long enough. The sum, and so τ, is right where all
    calls drafted; calls without drafts have no counter, and then too little is taken off.
    """
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
    """Rows through vLLM while the block lasts: `autoregressive` without a drafter, and every
    method's.

    Args:
        methods: as `check_vllm` lets them through.
        target: what they serve.
        sampling: the evaluation's; a method may have its own temperature.
        dtype: of the target.
        batch: prompts at once at most.

    Raises:
        ValueError: a drafter of another target, or one whose settings its format cannot hold.
    """
    common = engine_arguments(target, dtype, batch, len(methods) + 1)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-drafters-")))
        plain = VllmDecoder(AUTOREGRESSIVE, target, common)
        stack.callback(plain.close)
        rows = [_plain_row(plain, sampling, sampling)]
        for method, label in zip(methods, unique_labels(methods)):
            own = (
                sampling
                if method.temperature is None
                else Sampling(method.temperature, sampling.top_k, sampling.top_p, sampling.seed)
            )
            baseline = _plain_row(plain, own, sampling)
            rows += [] if baseline.name in {row.name for row in rows} else [baseline]
            rows.append(
                _drafter_row(
                    method, label, target, own, common, scratch / str(len(rows)), baseline.name
                )
            )
            stack.callback(rows[-1].decoder.close)  # type: ignore[attr-defined]
        yield rows


def engine_arguments(target: Target, dtype: str, batch: int, engines: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that all rows share. No prefix is cached, because every row reads the
    same prompts, and a baseline reads them twice. Graphs are compiled on a GPU only, whose memory
    the engines share out."""
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
    where = f"methods: {label}"
    drafter = load_drafter(method.drafter or "", target, where)
    method_name, notes = export_for_vllm(drafter, target, folder, where)
    tokens = drafted_tokens(
        drafter, method.budget if isinstance(method.budget, int) else None, where
    )
    speculation = {"method": method_name, "model": str(folder), "num_speculative_tokens": tokens}
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
    drafter: Drafter, target: Target, folder: Path, where: str
) -> tuple[str, tuple[str, ...]]:
    """Write the drafter as vLLM reads it; returns what vLLM calls the method, and how the export
    differs from the drafter.

    Raises:
        ValueError: vLLM does not serve it, or not with its settings.
    """
    form = format_for(type(drafter), where)
    try:
        with torch.no_grad():
            exported = FORMATS[form].exported(drafter, target)
            write(exported, folder)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return SERVED[form], exported.notes


def drafted_tokens(drafter: Drafter, budget: int | None, where: str) -> int:
    """Tokens of vLLM's chain: `budget`, by default as many as the drafter's own tree is deep.

    Raises:
        ValueError: more than the drafter drafts in a row.
    """
    if budget is not None and drafter.max_depth is not None and budget > drafter.max_depth:
        raise ValueError(
            f"{where}: budget {budget}: vLLM drafts a chain, and the drafter has "
            f"{drafter.max_depth} {drafter.depth_unit}: give {drafter.max_depth} at most"
        )
    return budget or drafter.builder.depth
