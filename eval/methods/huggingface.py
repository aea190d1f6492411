"""Hugging Face's decoding methods, as decoders that the harness measures.

They run on the target's weights with the library's kernels and cache, as its users run it. Like our
loop they ignore the target's `generation_config` (`modules.target.generation_config`). Prefill
ends, as in our loop, with the first token; a streamer records the times, so nothing is patched.

Shape legend: B sequences, T tokens, H hidden size, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from checkpoints.pretrained import load_pretrained
from modules.contracts.drafter import Drafter
from modules.contracts.sampling import Sampling
from modules.contracts.target import Target
from modules.decoding.decoder import Trace
from modules.decoding.loop import kept_calls
from modules.runtime.phase_timer import now
from modules.target.generation_config import stock_generate
from modules.target.loading import load_target, truncated_config
from modules.target.target import Target as LoadedTarget
from modules.target.tokenizers.vocabulary import first_difference


class _Stopwatch:
    """A streamer that records when tokens arrive, and how many at a time. The first call passes the
    prompt.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, then with the tokens of each call (already on the
        CPU).
        """
        if self._prompt_seen:
            self.times.append(time.perf_counter())
            self.counts.append(value.shape[-1] if value.dim() > 1 else 1)
        self._prompt_seen = True

    def end(self) -> None:
        """Called by `generate` at the end."""


class HuggingFaceGenerate:
    """Plain `generate`: one token per call. The row `hf_generate`.

    Args:
        target: the target whose model is called.
    """

    engine: ClassVar[str] = "transformers"
    name = "hf_generate"
    batched: ClassVar[bool] = True

    def __init__(self, target: Target) -> None:
        self.target = target

    def options(self) -> dict[str, Any]:
        """Options that this method adds to the generation config."""
        return {}

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that this method adds to the call of `generate`."""
        return {}

    def decode(self, prompts: list[list[int]], sampling: Sampling, limit: int) -> list[Trace]:
        """Continue every prompt by at most `limit` tokens, as one batch.

        Raises:
            ValueError: several prompts at once for a decoder that takes one.
        """
        # Speculation of `generate` takes one sequence.
        if len(prompts) > 1 and not self.batched:
            raise ValueError(
                f"{self.name} decodes one prompt at a time: set batch_size to 1 or leave it out"
            )
        watch, began = _Stopwatch(), now(self.target.device)
        rows = stock_generate(
            self.target.stock,
            prompts,
            sampling,
            limit,
            self.target.eos_ids,
            self.options(),
            self.target.tokenizer,
            streamer=watch,
            **self.arguments(),
        )
        # The first token ends the prefill.
        ended = now(self.target.device)
        prefill = watch.times[0] - began
        seconds = {"prefill": prefill, "other": ended - watch.times[0]}
        return [
            self._trace(prompt, row, watch, seconds)
            for prompt, row in zip(prompts, rows, strict=True)
        ]

    def _trace(
        self, prompt: list[int], ids: list[int], watch: _Stopwatch, seconds: dict[str, float]
    ) -> Trace:
        """A trace with two phases, prefill and other; `generate` does not report more."""
        return Trace(len(prompt), ids, [False] * len(ids), [], [], [], seconds, seconds["prefill"])


class _HuggingFaceSpeculation(HuggingFaceGenerate):
    """Base of the two speculative modes: one sequence, several tokens per call."""

    batched = False

    def _trace(
        self, prompt: list[int], ids: list[int], watch: _Stopwatch, seconds: dict[str, float]
    ) -> Trace:
        drafted = [position < count - 1 for count in watch.counts for position in range(count)]
        drafted, calls = drafted[: len(ids)], kept_calls(watch.counts, len(ids))[1:]
        return Trace(len(prompt), ids, drafted, calls, [], [], seconds, seconds["prefill"])


class HuggingFacePromptLookup(_HuggingFaceSpeculation):
    """`generate(prompt_lookup_num_tokens=…)`: drafts copied from the text so far. The row
    `hf_prompt_lookup`.

    Args:
        target: the target whose model is called.
        tokens: drafted tokens per call at most.
        longest: longest n-gram to look up.
    """

    name = "hf_prompt_lookup"

    def __init__(self, target: Target, tokens: int = 10, longest: int = 2) -> None:
        super().__init__(target)
        self.tokens, self.longest = tokens, longest

    def options(self) -> dict[str, Any]:
        """The options that enable prompt lookup."""
        return {"prompt_lookup_num_tokens": self.tokens, "max_matching_ngram_size": self.longest}


class HuggingFaceAssisted(_HuggingFaceSpeculation):
    """`generate(assistant_model=…)`, with the target's own first layers or a trained drafter as the
    assistant. The row `hf_assisted`.

    Args:
        target: the target whose model is called.
        layers: number of the target's layers in the assistant (weights are shared), if no
            assistant is named.
        tokens: drafted tokens per call.
        assistant: run, folder or Hub id of a trained `Independent` drafter, whose model becomes
            the assistant.
    """

    name = "hf_assisted"

    def __init__(
        self, target: Target, layers: int = 4, tokens: int = 4, assistant: str | None = None
    ) -> None:
        super().__init__(target)
        # The assistant: the target's first layers, or a trained drafter's model.
        if assistant is None and not 0 < layers < target.shape.num_layers:
            raise ValueError(
                f"layers {layers} must lie between 1 and {target.shape.num_layers - 1} for "
                f"{target.name}"
            )
        self.assistant = (
            truncated_copy(target.stock, layers)
            if assistant is None
            else trained(assistant, target)
        )
        self._named = assistant
        _draft_steadily(self.assistant, tokens)

    def parts(self) -> Mapping[str, Path]:
        """The folder of the trained drafter, if one was named."""
        return {} if self._named is None else {"assistant": Path(self._named)}

    def arguments(self) -> dict[str, Any]:
        """The assistant as a keyword argument of `generate`."""
        return {"assistant_model": self.assistant}


class HuggingFaceUniversal(_HuggingFaceSpeculation):
    """`generate(assistant_model=…, assistant_tokenizer=…)`: an assistant of another tokenizer. At
    temperature 0 its string is written anew in the target's tokens, above it drafts the tokens that
    both vocabularies have. The row `hf_universal`.

    Args:
        target: the target whose model is called.
        assistant: Hub id, folder or .gguf file of a causal LM, or the loaded model.
        tokens: drafted tokens per call, in the assistant's tokens.

    Raises:
        ValueError: an assistant with the target's tokenizer.
    """

    name = "hf_universal"

    def __init__(self, target: Target, assistant: str | LoadedTarget, tokens: int = 4) -> None:
        super().__init__(target)
        precision, device = str(target.dtype).removeprefix("torch."), str(target.device)
        loaded = (
            assistant
            if isinstance(assistant, LoadedTarget)
            else load_target(assistant, precision, device, chats=False)
        )
        if first_difference(loaded.tokenizer, target) is None:
            raise ValueError(
                f"assistant {loaded.name!r} has the target's tokenizer: use hf_assisted, or give "
                "another one"
            )
        self.assistant, self._tokenizer = loaded.stock, loaded.tokenizer
        _draft_steadily(self.assistant, tokens)

    def arguments(self) -> dict[str, Any]:
        """The assistant and its tokenizer."""
        return {"assistant_model": self.assistant, "assistant_tokenizer": self._tokenizer}


def _draft_steadily(assistant: Any, tokens: int) -> None:
    """Draft a constant number of tokens, so that rows are comparable."""
    assistant.generation_config = GenerationConfig(
        num_assistant_tokens=tokens,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )


class TrimmedHead(nn.Module):
    """An LM head over the draft vocabulary, with the interface of a stock model: all other tokens
    get probability 0.

    Args:
        head: the full head, whose rows are copied.
        vocabulary_D: token ids that can be drafted.
        size: size of the full vocabulary.
    """

    def __init__(self, head: nn.Linear, vocabulary_D: Tensor, size: int) -> None:
        super().__init__()
        self.register_buffer("vocabulary", vocabulary_D)
        self.weight = nn.Parameter(head.weight[vocabulary_D].detach(), requires_grad=False)
        self.bias = (
            None
            if head.bias is None
            else nn.Parameter(head.bias[vocabulary_D].detach(), requires_grad=False)
        )
        self.size = size

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """Logits over the full vocabulary: [B,T,H] -> [B,T,V]."""
        logits = nn.functional.linear(hidden_BTH, self.weight, self.bias)
        whole = logits.new_full((*logits.shape[:-1], self.size), torch.finfo(logits.dtype).min)
        return whole.index_copy_(-1, self.get_buffer("vocabulary"), logits)


def trained(name: str, target: Target) -> Any:
    """The stock model of a trained drafter, which drafts the same tokens as it does in our loop.

    Raises:
        ValueError: a missing folder, another kind of component, or another tokenizer than the
            target's.
    """
    drafter = load_pretrained(name, target)
    if not isinstance(drafter, Drafter) or drafter.stock is None:
        raise ValueError(
            f"assistant {name!r} is a {type(drafter).__name__}: give a trained Independent drafter"
        )
    drafter.adapt(target)
    # Cast by the drafter, which keeps its rotary frequencies; the stock model shares its weights.
    stock = drafter.to(target.device, target.dtype).stock
    model = stock.to(target.device).eval().requires_grad_(False)
    # A trimmed draft vocabulary becomes a head over all tokens.
    if drafter.tokens_D is not None:
        size, drafted_D = target.shape.vocab_size, drafter.tokens_D.to(target.device)
        model.set_output_embeddings(TrimmedHead(model.get_output_embeddings(), drafted_D, size))
        model.config.vocab_size = size
    return model


def truncated_copy(model: Any, layers: int) -> Any:
    """A model of the same class with the first `layers` layers, which shares the original's
    weights.
    """
    config = truncated_config(model.config, layers)
    with torch.device("meta"):
        shallow = AutoModelForCausalLM.from_config(config)
    missing, _ = shallow.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not missing, missing
    shallow.tie_weights()
    _copy_buffers(model, shallow)
    return shallow.eval().requires_grad_(False)


def _copy_buffers(source: nn.Module, into: nn.Module) -> None:
    """Take buffers that are in no state dict (rotary frequencies) from the original; they are still
    on the meta device.
    """
    originals = dict(source.named_buffers())
    for name, buffer in list(into.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            into.get_submodule(owner)._buffers[leaf] = originals[name]
