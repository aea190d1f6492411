"""Decoding with a part of the KV cache and no verification: lossy, at any policy of
`modules.sparse_kv`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from modules.contracts.drafter import Drafter, Part
from modules.contracts.sampling import Sampling
from modules.contracts.shapes import TargetShape
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.loop import Trace
from modules.drafters.self_speculative.lossy import OpensAs
from modules.sparse_kv.offload import HostCache
from modules.sparse_kv.policy import Policy
from modules.sparse_kv.session import SparseSession
from modules.target.kv_cache import SlotCache
from modules.target.target import Target

ANY_LENGTH = 1 << 30
"""Tokens of a text under a policy for texts of any length."""


def whole_bytes(shape: TargetShape, itemsize: int, trace: Trace) -> list[int]:
    """Bytes of keys and values that full attention reads in each call of an answer.

    Args:
        shape: the target's dimensions.
        itemsize: bytes of one number.
        trace: the answer.
    """
    slot = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * itemsize
    # A call reads what is committed and its own rows; the newest token is not committed yet.
    emitted = [sum(trace.accepted[:i]) for i in range(len(trace.accepted))]
    return [
        (trace.prompt_tokens + tokens + rows) * slot
        for tokens, rows in zip(emitted, trace.rows, strict=True)
    ]


class SparseDecoder:
    """Decodes as the target would with the slots that a policy chooses; what it says is not
    verified.

    Args:
        target: the model.
        policy: which slots are read.
        drafter: drafts for it, if there is one; its drafts are verified with the same slots.
        budget: of the drafter, if not its own.
        offload: keep keys and values in host memory, for policies that choose without them.

    Raises:
        ValueError: a target whose attention cannot be replaced, or a policy that reads keys where
            they lie on the host.
    """

    name: str = "sparse_kv"
    claims_lossless: ClassVar[bool] = False

    def __init__(
        self,
        target: Target,
        policy: Policy,
        drafter: Drafter | None = None,
        budget: int | None = None,
        offload: bool = False,
    ) -> None:
        self.target, self.policy, self.drafter, self.budget = target, policy, drafter, budget
        self.offload = offload
        # What does not fit is refused before anything is decoded.
        self.opened(1, 1)

    def opened(self, batch_size: int, capacity: int) -> SparseSession:
        """New sequences under the policy."""
        target = self.target
        kind = HostCache if self.offload else SlotCache
        cache = kind(target.shape.num_layers, batch_size, capacity, target.layer_devices)
        return SparseSession(target, cache, self.policy)

    def parts(self) -> Mapping[str, Part]:
        """The drafter, if there is one."""
        return {} if self.drafter is None else {"drafter": self.drafter}

    def decode(self, prompts: list[list[int]], sampling: Sampling, limit: int) -> list[Trace]:
        """Continue every prompt by at most `limit` tokens, as one batch."""
        most = ANY_LENGTH if self.policy.any_length else None
        target = cast(Any, OpensAs(self.target, self.opened, most))
        decoder = SpeculativeDecoder(
            target,
            self.drafter,
            budget=self.budget,
            name=self.name,
            stop_ids=self.target.eos_ids,
        )
        return decoder.decode(prompts, sampling, limit)

    def quality_of(self, traces: Sequence[Trace]) -> dict[str, float]:
        """Figures of these answers for a report: `kv_bytes_per_call` of a sequence, and
        `kv_share`, these over what full attention reads in the same calls.
        """
        calls = sum(len(trace.kv_bytes) for trace in traces)
        if not calls:
            return {}
        read = sum(sum(trace.kv_bytes) for trace in traces)
        shape, size = self.target.shape, self.target.dtype.itemsize
        whole = sum(sum(whole_bytes(shape, size, trace)) for trace in traces)
        return {"kv_bytes_per_call": read / calls, "kv_share": read / whole}
