"""Sequences that a target decodes with a part of its KV cache.

Shape legend: B sequences, T prompt tokens, N rows of one call, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modules.contracts.rows import Rows
from modules.contracts.shapes import StateName
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.sparse_kv.offload import Fetcher, HostCache
from modules.sparse_kv.policy import Policy, Selection
from modules.sparse_kv.reader import Phase, SparseReader
from modules.target.kernels.cpu_kernels import uses_grouped_attention
from modules.target.kv_cache import SlotCache
from modules.target.session import Session


def check_hooked(target: Any) -> None:
    """ValueError for a target whose attention cannot be replaced."""
    name = getattr(target.model.config, "_attn_implementation", None)
    if not uses_grouped_attention(target.model) or getattr(
        target.model.config, "is_encoder_decoder", False
    ):
        raise ValueError(
            f"sparse KV caches need a decoder-only target with sdpa attention, {target.name!r} has "
            f"{name}: load another target"
        )


class SparseSession(Session):
    """Sequences whose calls read what a policy chooses.

    Args:
        target: whose layers run.
        cache: keys and values of these sequences.
        policy: which chooses.

    Raises:
        ValueError: a target whose attention cannot be replaced, or that the policy does not fit.
    """

    def __init__(self, target: Any, cache: SlotCache, policy: Policy) -> None:
        super().__init__(target, cache)
        check_hooked(target)
        self.prompt_rows, self.any_length = policy.prompt_rows, policy.any_length
        selection = policy.start(target, cache.batch_size)
        self.reader = SparseReader(cache, selection)
        if isinstance(cache, HostCache):
            if not policy.without_keys:
                raise ValueError(
                    f"offload: {type(policy).__name__} reads keys to choose by, which must then "
                    "lie on the device: set it to false, or use SentenceKV or Window"
                )
            self.reader.fetcher = Fetcher()
        self.attend_by(self.reader)
        self._tokens_BN: Tensor | None = None

    @torch.no_grad()
    def prefill(
        self, ids_BT: Tensor, lengths_B: Tensor, states: Sequence[StateName] = ()
    ) -> tuple[Tensor, dict[StateName, Tensor]]:
        """Append right-padded tokens, as the policy reads prompts."""
        self.reader.selection.read_prompt(ids_BT, lengths_B)
        logits_BV, seen = super().prefill(ids_BT, lengths_B, states)
        keys = self.cache.layer_keys(self.target.shape.num_layers)
        self.reader.selection.end_prompt(keys, self.lengths_B)
        return logits_BV, seen

    def use(self, selection: Selection) -> None:
        """Choose by another selection from the next call on."""
        self.reader.selection = selection

    def rewind(self, lengths_B: Tensor) -> None:
        """Raises ValueError: what a selection remembers cannot be taken back."""
        raise ValueError("a session of a sparse KV cache does not rewind: open another one")

    def _like_any_other(self) -> bool:
        """Whether the policy reads prompts in full, and does not look on."""
        whole = type(self.reader.selection).choose_prompt is Selection.choose_prompt
        hook, self._hook = self._hook, None
        try:
            return whole and super()._like_any_other()
        finally:
            self._hook = hook

    def _prompt_part(
        self, ids_BN: Tensor, counts_B: Tensor, names: Sequence[StateName]
    ) -> dict[StateName, Tensor]:
        self.reader.enter(Phase.PROMPT, ids_BN, counts_B)
        return super()._prompt_part(ids_BN, counts_B, names)

    @torch.no_grad()
    def read(self, ids_BN: Tensor, rows: Rows) -> Tensor:
        """`final` states [B,N,H] of tokens, from the chosen slots. Nothing is committed."""
        assert rows.committed_BS is None, "the policy chooses the slots"
        self.reader.enter(Phase.SPARSE, ids_BN)
        return super().read(ids_BN, rows)

    @torch.no_grad()
    def verify(
        self,
        tree: TokenTree,
        states: Sequence[StateName] = (),
        vocabulary_D: Tensor | None = None,
    ) -> Verified:
        """One call over all rows of a tree, from the chosen slots.

        Raises:
            ValueError: a tree with auxiliary rows, or rows that have run in part.
        """
        if tree.auxiliary is not None or tree.already_run is not None:
            raise ValueError("a sparse KV cache verifies whole trees: use another drafter")
        self._tokens_BN = tree.tokens_BN
        self.reader.enter(Phase.SPARSE, tree.tokens_BN)
        return super().verify(tree, states, vocabulary_D)

    def commit(self, accepted: Accepted) -> None:
        """Keep the accepted rows of the last call."""
        assert self._tokens_BN is not None, "verify a tree first"
        self.reader.commit(accepted, self._tokens_BN, self.lengths_B)
        super().commit(accepted)

    def keep(self, sequences: list[int]) -> None:
        """Keep only these sequences, which may repeat."""
        super().keep(sequences)
        self.reader = self.reader.select(torch.tensor(sequences, device=self.target.device))
        self.attend_by(self.reader)

    def _inside(self, rows: Rows) -> Rows:
        """The rows, at positions beyond the target's context too if the policy reads none there."""
        return rows if self.any_length else super()._inside(rows)
