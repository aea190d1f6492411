"""A process with one vLLM engine, which reads requests and writes replies as lines of JSON: `python
-m eval.vllm.worker`.

The first line holds the engine's arguments, every other line is a request. vLLM's own output goes
to stderr. `eval.vllm.engine` is the client.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

_PREFIX = "vllm:spec_decode_num_"
COUNTERS = ("drafts", "accepted_tokens", "accepted_tokens_per_pos")
"""Counters of `LLM.get_metrics`: calls with drafts, accepted drafts, and calls that accepted at
least 1, 2, … drafts.
"""


def counters(llm: Any) -> dict[str, list[int]]:
    """vLLM's counters of speculative decoding since it started; zeros for an engine without a
    drafter.
    """
    counts = {name: [0] for name in COUNTERS}
    for metric in llm.get_metrics():
        name = metric.name.removeprefix(_PREFIX)
        if metric.name.startswith(_PREFIX) and name in counts:
            counts[name] = [
                int(value) for value in getattr(metric, "values", None) or [metric.value]
            ]
    return counts


def difference(
    before: Mapping[str, list[int]], after: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """Differences of two readings of the counters. A vector may be longer in the second one."""
    return {
        name: [
            value - (before[name][i] if i < len(before[name]) else 0)
            for i, value in enumerate(values)
        ]
        for name, values in after.items()
    }


def answer(llm: Any, sampling_params: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """Decode one batch.

    Args:
        llm: the engine.
        sampling_params: vLLM's class of that name.
        request: `prompts` (token ids) and `sampling` (one set of arguments per prompt).

    Returns:
        `ids` of each answer; `first_tokens`, seconds from the call to each answer's first token;
        `seconds` of the call; `counted`, the increase of vLLM's counters; `peak`, the process's
        peak memory in bytes.
    """
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    parameters = [sampling_params(**arguments) for arguments in request["sampling"]]
    # Counters are read around the call, times are from its start.
    before, began = counters(llm), time.monotonic()
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    seconds = time.monotonic() - began
    return {
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
        "first_tokens": [output.metrics.first_token_ts - began for output in outputs],
        "seconds": seconds,
        "counted": difference(before, counters(llm)),
        "peak": _peak(),
    }


def _peak() -> int:
    """Peak memory in bytes: on a GPU what torch allocated, vLLM's KV cache included; on a CPU the
    process's resident memory.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def serve(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Replies to the lines: the record of loading once the engine runs, then one per request."""
    settings = json.loads(next(lines))
    loaded: dict[str, Any] = {}
    if settings["watch"]:
        loaded = importlib.import_module("eval.vllm.loading").watch(settings["watch"])
    vllm = importlib.import_module("vllm")
    llm = vllm.LLM(**settings["engine"])
    yield loaded
    for line in lines:
        yield answer(llm, vllm.SamplingParams, json.loads(line))


def respond(lines: Iterator[str], channel: TextIO) -> int:
    """Write the replies; a failure becomes a last reply with `error` in one line. Returns the exit
    status.
    """
    try:
        for reply in serve(lines):
            channel.write(json.dumps(reply) + "\n")
            channel.flush()
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(str(error).split()) or "no reason given"
        channel.write(json.dumps({"error": f"{type(error).__name__}: {reason[:300]}"}) + "\n")
        channel.flush()
        return 1
    return 0


def main() -> None:
    """Serve on stdin and stdout; output that vLLM prints goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.exit(respond(iter(sys.stdin), channel))


if __name__ == "__main__":
    main()
