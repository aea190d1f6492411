"""vLLM's connector that writes extracted hidden states, for builds without CUDA streams. vLLM
imports this module itself (`kv_connector_module_path`).
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from safetensors.torch import save_file

_STOCK: Any = importlib.import_module(
    "vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector"
)


class _Written:
    """In place of the event of a copy that has ended."""

    def query(self) -> bool:
        """Whether it has ended."""
        return True


class SynchronousConnector(_STOCK.ExampleHiddenStatesConnector):
    """`ExampleHiddenStatesConnector` that copies and writes a request's states at once."""

    def _submit_async_write(self, pending: Any) -> None:
        """Write the states of a finished request, then release its lock."""
        if not self._is_tp_rank_zero:
            return
        # 1. The request's slots in the cache, block by block.
        size, count = self._block_size, pending.token_ids.shape[0]
        starts = torch.tensor(pending.block_ids, dtype=torch.long) * size
        slots = (starts[:, None] + torch.arange(size)).flatten()
        states = _STOCK.extract_from_kv_cache(self._kv_cache, slots, count)
        # 2. The file, and the lock that its reader waits for.
        os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
        tensors = {"hidden_states": states.contiguous(), "token_ids": pending.token_ids.clone()}
        try:
            save_file(tensors, pending.filename)
        finally:
            lock = self._lock_fds.pop(pending.req_id, None)
            if lock is not None:
                os.close(lock)
        self._req_copy_events[pending.req_id] = _Written()
