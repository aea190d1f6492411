"""What `eval.vllm.worker` uses of vLLM, with tokens that follow from the prompt and drafts accepted
by a fixed pattern.

`FAKE_VLLM` chooses a fault: `refuses` to load, `lies` about tokens when drafting, or `dies` when
asked.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FAULT = os.environ.get("FAKE_VLLM", "")
ACCEPTED = (2, 0, 3, 1)
"""Drafts that one call after another accepts, as far as they were drafted."""


@dataclass
class Counter:
    name: str
    value: int


@dataclass
class Vector:
    name: str
    values: list[int]


class SamplingParams:
    def __init__(
        self,
        max_tokens: int,
        temperature: float,
        stop_token_ids: list[int],
        detokenize: bool,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        self.max_tokens, self.stop_token_ids = max_tokens, stop_token_ids
        self.shift = 0 if seed is None else seed + top_k
        assert detokenize is False and (temperature > 0) == (seed is not None) and 0 < top_p <= 1


class LLM:
    def __init__(
        self,
        model: str,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        enable_prefix_caching: bool,
        disable_log_stats: bool,
        enforce_eager: bool,
        speculative_config: dict[str, Any] | None = None,
    ) -> None:
        print("vLLM writes to stdout, which must not reach the channel")
        assert (
            not enable_prefix_caching
            and not disable_log_stats
            and enforce_eager
            and max_model_len > 0
        )
        if FAULT == "refuses":
            raise RuntimeError("layers.0.hidden_norm.weight\nhas no place")
        self.most, self.seen = max_num_seqs, 0
        self.tokens = speculative_config["num_speculative_tokens"] if speculative_config else 0
        self.drafts, self.reached = 0, [0] * self.tokens
        if speculative_config:
            assert (Path(speculative_config["model"]) / "model.safetensors").is_file()
            log = os.environ["FAKE_VLLM_LOG"]
            config = json.loads((Path(speculative_config["model"]) / "config.json").read_text())
            with open(log, "a") as file:
                file.write(
                    json.dumps({**speculative_config, "dtype": dtype, "config": config}) + "\n"
                )

    def generate(
        self, prompts: list[dict[str, list[int]]], parameters: list[SamplingParams], use_tqdm: bool
    ) -> list[Any]:
        assert use_tqdm is False and len(prompts) == len(parameters) <= self.most
        if FAULT == "dies" and self.tokens:
            sys.exit(9)
        began = time.monotonic()
        answers = [
            self._answer(prompt["prompt_token_ids"], one)
            for prompt, one in zip(prompts, parameters)
        ]
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=ids)],
                metrics=SimpleNamespace(first_token_ts=began + 1e-6),
            )
            for ids in answers
        ]

    def _answer(self, prompt: list[int], parameters: SamplingParams) -> list[int]:
        ids = [
            5 + (sum(prompt) + 7 * i + parameters.shift) % 60 for i in range(parameters.max_tokens)
        ]
        emitted = 1
        while self.tokens and emitted < len(ids):
            accepted = min(ACCEPTED[self.seen % len(ACCEPTED)], self.tokens)
            self.seen, self.drafts, emitted = self.seen + 1, self.drafts + 1, emitted + accepted + 1
            self.reached = [count + (depth < accepted) for depth, count in enumerate(self.reached)]
        if FAULT == "lies" and self.tokens:
            ids[len(ids) // 2] += 1
        return ids

    def get_metrics(self) -> list[Any]:
        if not self.tokens:
            return [Counter("vllm:num_preemptions", 0)]
        prefix = "vllm:spec_decode_num_"
        return [
            Counter(prefix + "drafts", self.drafts),
            Counter(prefix + "draft_tokens", self.drafts * self.tokens),
            Counter(prefix + "accepted_tokens", sum(self.reached)),
            Vector(prefix + "accepted_tokens_per_pos", list(self.reached)),
        ]
