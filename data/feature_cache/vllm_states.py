"""States of a target that vLLM runs, for targets that are too large for one device.

vLLM extracts the residual stream by its method `extract_hidden_states`: state k before layer k, as
`Target.features` names it, and `pre_norm` after the last layer. `final` is computed here from
`pre_norm`.

Shape legend: S tokens of a shard, T tokens of a document, K states, H hidden size.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.command_line.work_share import Share
from data.conversations import Tokens
from modules.contracts.shapes import StateName
from modules.target.head_only.target import HeadTarget
from modules.target.loading import locate, outline
from modules.target.target import Target, add_to_digest

Computed = Callable[[Sequence[Tokens], Callable[[int], None]], dict[str, Tensor]]
"""Gives the states [S,H] of documents by name, and counts the documents that are done."""
_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector"
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Defaults that the environment overrides: GiB of KV cache on a CPU, an engine in a process of its
own, which goes on writing states after the last answer, no usage statistics."""


def check_vllm_states(dtype: str, device: str | None, precision: str) -> None:
    """Refuse settings that vLLM cannot run, before anything is loaded.

    Raises:
        ValueError: vLLM is not installed, or a setting of our own target.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "engine 'vllm': vLLM is not installed in this Python: use an environment that has it "
            "(`make verify-vllm` makes one), or leave --engine out"
        )
    if Share.of_process().count > 1:
        raise ValueError(
            "engine 'vllm' computes in one process: leave out torchrun, and give --vllm "
            "'{tensor_parallel_size: N}', or --shard to several"
        )
    if device is not None:
        raise ValueError(
            f"device {device!r}: vLLM runs on what it was built for: leave `device` out"
        )
    if precision != "32-true":
        raise ValueError(
            f"precision {precision!r} belongs to this project's own target: give vLLM a --dtype"
        )
    if dtype == "float64":
        raise ValueError("dtype 'float64': vLLM does not compute in it: use float32 or bfloat16")


class VllmStates:
    """Computes the states of documents in vLLM.

    Prefix caching and chunked prefill are off: every state is computed in one pass over its whole
    document.

    Args:
        target: its head alone (`modules.target.head_only`); it gets the fingerprint of the stored
            weights.
        names: of the states.
        longest: tokens of the longest document.
        arguments: further arguments of `vllm.LLM`, for instance `tensor_parallel_size` or
            `quantization`.

    Raises:
        ValueError: a checkpoint whose weights cannot be read one by one or, when called, a vLLM
            that cannot be started, for instance because it extracts no states of this architecture.
    """

    def __init__(
        self,
        target: HeadTarget,
        names: Sequence[StateName],
        longest: int,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.target, self.names = target, list(names)
        # 1. The fingerprint, and vLLM's numbers of the states.
        target.set_fingerprint(stored_fingerprint(target))
        self.layers = sorted({self._layer(name) for name in names})
        # 2. The engine leaves states in a folder of files; it starts with the first document.
        self._files = tempfile.TemporaryDirectory(prefix="vllm-states-")
        self._arguments = {
            **engine_arguments(locate(target.name), target, self.layers, longest, self._files.name),
            **(arguments or {}),
        }
        self._engine: Any = None

    def __call__(
        self, group: Sequence[Tokens], advance: Callable[[int], None]
    ) -> dict[str, Tensor]:
        """The states [S,H] of a shard's documents in order, by name."""
        self._engine = self._engine or self._started()
        prompts = [{"prompt_token_ids": document.input_ids.tolist()} for document in group]
        # One token must be sampled; its own state is not extracted.
        once = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        answers = self._engine.generate(prompts, once, use_tqdm=False)
        states_TKH = []
        for document, answer in zip(group, answers, strict=True):
            states_TKH.append(self._read(document, answer.kv_transfer_params["hidden_states_path"]))
            advance(1)
        states_SKH = torch.cat(states_TKH)
        return {str(name): self._named(name, states_SKH) for name in self.names}

    def _started(self) -> Any:
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        self._vllm: Any = importlib.import_module("vllm")
        self._connector: Any = importlib.import_module(_CONNECTOR)
        try:
            return self._vllm.LLM(**self._arguments)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"engine 'vllm': {self.target.name!r} cannot be run: {type(error).__name__}: "
                f"{reason}"
            ) from error

    def _read(self, document: Tokens, path: str) -> Tensor:
        """The states [T,K,H] of one document, whose file is removed."""
        loaded = self._connector.load_hidden_states(path)
        self._connector.cleanup_hidden_states(path)
        states_TKH = loaded["hidden_states"]
        if loaded["token_ids"].tolist() != document.input_ids.tolist() or (
            states_TKH.shape[0] != len(document)
        ):
            raise ValueError(
                f"engine 'vllm' gave states of {states_TKH.shape[0]} tokens for a document of "
                f"{len(document)}: its extraction does not fit this version"
            )
        return states_TKH

    def _named(self, name: StateName, states_SKH: Tensor) -> Tensor:
        states_SH = states_SKH[:, self.layers.index(self._layer(name))].contiguous()
        return self.target.final_norm(states_SH) if name == "final" else states_SH

    def _layer(self, name: StateName) -> int:
        """vLLM's number of a state: that of the layer behind it."""
        return name if isinstance(name, int) else self.target.shape.num_layers


def stored_fingerprint(target: HeadTarget) -> str:
    """`Target.fingerprint` of the whole target, whose layers are read one weight at a time.

    Raises:
        ValueError: a checkpoint that names a weight otherwise than the model.
    """
    architecture: Any = target.architecture
    stored, head = architecture.stored, target.model.state_dict()
    start, digest = f"{stored.prefix}.", hashlib.sha256()
    names = outline(target.name, str(target.dtype).removeprefix("torch.")).model.state_dict()
    for name in sorted(names):
        try:
            tensor = head[name] if name in head else stored.read(name.removeprefix(start))
        except KeyError:
            raise ValueError(
                f"target {target.name!r}: its checkpoint holds no {name!r}: its states can only be "
                "computed without --engine"
            ) from None
        add_to_digest(digest, name, tensor)
    return digest.hexdigest()[:16]


def engine_arguments(
    folder: str, target: Target, layers: Sequence[int], longest: int, files: str
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that extract states before these layers into a folder of files."""
    connector: dict[str, Any] = {"kv_connector": "ExampleHiddenStatesConnector"}
    if not torch.cuda.is_available():
        connector = {
            "kv_connector": "SynchronousConnector",
            "kv_connector_module_path": "data.feature_cache.vllm_connector",
        }
    return {
        "model": folder,
        "dtype": str(target.dtype).removeprefix("torch."),
        "max_model_len": longest + 1,
        "max_num_batched_tokens": max(longest + 1, 2048),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "enforce_eager": True,
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}},
        },
        "kv_transfer_config": {
            **connector,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(Path(files))},
        },
    }
