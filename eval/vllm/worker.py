"""One vLLM engine in a process of its own, asked and answering in lines of JSON: `python -m
eval.vllm.worker`.

The first line says how the engine is made, every other one asks for answers. vLLM's own output goes
to stderr. `eval.vllm.engine` is the other side.
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
"""Of `LLM.get_metrics`: calls with drafts, drafts accepted in them, calls that accepted at least 1,
2, … drafts.
"""


def counters(llm: Any) -> dict[str, list[int]]:
    """vLLM's counters of speculative decoding since it started; zeros for an engine without a
    drafter.
    """
    found = {name: [0] for name in COUNTERS}
    for metric in llm.get_metrics():
        name = metric.name.removeprefix(_PREFIX)
        if metric.name.startswith(_PREFIX) and name in found:
            found[name] = [
                int(value) for value in getattr(metric, "values", None) or [metric.value]
            ]
    return found


def difference(
    before: Mapping[str, list[int]], after: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """What was counted in between. A vector may be longer after its first count."""
    return {
        name: [
            value - (before[name][i] if i < len(before[name]) else 0)
            for i, value in enumerate(values)
        ]
        for name, values in after.items()
    }


def answer(llm: Any, sampling_params: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Decode one batch.

    Args:
        llm: the engine.
        sampling_params: vLLM's class of that name.
        asked: `prompts` (token ids) and `sampling` (one set of arguments per prompt).

    Returns:
        `ids` of each answer; `first_tokens`, seconds from the call to each answer's first token;
        `seconds` of the call; `counted`, what vLLM's counters rose by; `peak`, bytes that this
        process has held at most.
    """
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    parameters = [sampling_params(**arguments) for arguments in asked["sampling"]]
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
    """On a GPU what torch has allocated at most, vLLM's KV cache included; on a CPU the process's
    own peak.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def serve(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Replies to the lines: `{}` once the engine is there, then one reply per question."""
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
    """Write the replies; a failure is a last reply with `error`, in one line. Returns the exit
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
    """Keep stdout for replies: what vLLM prints goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.exit(respond(iter(sys.stdin), channel))


if __name__ == "__main__":
    main()
