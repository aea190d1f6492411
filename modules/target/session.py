"""Decoding with the target: open sequences and their KV cache.

Shape legend: B sequences, T prompt tokens, N rows of one call, M rows that have run before, H
hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from modules.contracts.rows import Rows, causal_rows
from modules.contracts.shapes import StateName
from modules.contracts.target import Target
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.target.kernels.attention_hook import AttentionHook, attending
from modules.target.kv_cache import PROMPTS_IN_USE, SlotCache
from modules.target.stock.images import Images, rows_with_images

PROMPT_ROWS = 2048
"""Rows of a prompt that one call reads, so that no mask or score of a whole long prompt exists."""


class Session:
    """Sequences that one target decodes together, from `Target.open` on.

    Rows of a call are written after the committed ones; `commit` keeps those that were accepted.
    Several sessions of one target do not see each other.

    Args:
        target: whose layers run.
        cache: keys and values of these sequences.
    """

    prompt_rows: int = PROMPT_ROWS

    def __init__(self, target: Target, cache: SlotCache) -> None:
        self.target, self.cache = target, cache
        self._hook: AttentionHook | None = None

    @property
    def lengths_B(self) -> Tensor:
        """int64 [B]: committed tokens, on the target's device."""
        return self.cache.lengths_tensor(self.target.device)

    @torch.no_grad()
    def prefill(
        self, ids_BT: Tensor, lengths_B: Tensor, states: Sequence[StateName] = ()
    ) -> tuple[Tensor, dict[StateName, Tensor]]:
        """Append right-padded tokens after the committed ones (also for second turns).

        A call reads `prompt_rows` tokens of each. Returns the logits [B,V] of each sequence's last
        token and the requested states [B,T,H]. What a `PromptMemory` in use holds is not read
        again.
        """
        memory = PROMPTS_IN_USE.get()
        if memory is None or not self._like_any_other():
            return self._read_prompts(ids_BT, lengths_B, states)
        recalled = memory.recall(self.target.model, self.cache, ids_BT, lengths_B, states)
        if recalled is not None:
            return recalled
        began = time.perf_counter()
        read = self._read_prompts(ids_BT, lengths_B, states)
        memory.keep(self.target.model, self.cache, ids_BT, read, time.perf_counter() - began)
        return read

    def _like_any_other(self) -> bool:
        """Whether the next prompt leaves here what it leaves in any new session: the session is
        empty, layers attend to all of it, and their keys and values are all that they keep.
        """
        stateless = not self.target.architecture.recurrence.modules
        return (
            stateless
            and self._hook is None
            and type(self.cache) is SlotCache
            and not any(self.cache.lengths)
        )

    def _read_prompts(
        self, ids_BT: Tensor, lengths_B: Tensor, states: Sequence[StateName]
    ) -> tuple[Tensor, dict[StateName, Tensor]]:
        names: list[StateName] = [*dict.fromkeys((*states, "final"))]
        parts: dict[StateName, list[Tensor]] = {name: [] for name in states}
        last_BH = None
        for start in range(0, ids_BT.shape[1], self.prompt_rows):
            # 1. Some tokens of every prompt, after what is committed.
            some_BN = ids_BT[:, start : start + self.prompt_rows]
            width = some_BN.shape[1]
            counts_B = (lengths_B - start).clamp(0, width)
            seen = self._prompt_part(some_BN, counts_B, names)
            for name, part in parts.items():
                part.append(seen[name])
            # 2. The state of each prompt's last token so far.
            newest_BH = seen["final"][
                torch.arange(len(ids_BT), device=ids_BT.device), (counts_B - 1).clamp(min=0)
            ]
            if last_BH is None:
                last_BH = newest_BH
            last_BH = torch.where((counts_B > 0)[:, None], newest_BH, last_BH)
        assert last_BH is not None, "a prompt has at least one token"
        whole = {
            name: part[0] if len(part) == 1 else torch.cat(part, 1) for name, part in parts.items()
        }
        return self.target.logits(last_BH), whole

    def _prompt_part(
        self, ids_BN: Tensor, counts_B: Tensor, names: Sequence[StateName]
    ) -> dict[StateName, Tensor]:
        """States of tokens after the committed ones; the first `counts_B` of each are committed."""
        rows = causal_rows(self.lengths_B, ids_BN.shape[1])
        seen = self._forward(self.target.embed(ids_BN), rows, names)
        order = torch.arange(ids_BN.shape[1], device=ids_BN.device)
        self.cache.commit(Accepted(order.expand(len(ids_BN), -1), counts_B, counts_B))
        return seen

    @torch.no_grad()
    def prefill_with_images(
        self,
        ids_BT: Tensor,
        lengths_B: Tensor,
        states: Sequence[StateName],
        images: Sequence[Images | None],
    ) -> tuple[Tensor, dict[StateName, Tensor]]:
        """`prefill` of an empty session with images: for each sequence what its model's processor
        gives beside the ids, or None.

        Raises:
            ValueError: as `modules.target.stock.images.rows_with_images`; a session that is not
                empty.
        """
        if any(self.cache.lengths):
            raise ValueError("images: give them with the first prompt of a session")
        read = rows_with_images(self.target, ids_BT, lengths_B, images)
        self.cache.offsets_B = read.offsets_B
        rows = replace(causal_rows(self.lengths_B, ids_BT.shape[1]), visible_BNJ=read.visible_BTT)
        seen = self.target.forward_rows(
            read.embeddings_BTH,
            rows,
            [*states, "final"],
            self.cache,
            rotary_RBN=read.rotary_RBT,
        )
        order = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        last = seen["final"][torch.arange(len(ids_BT), device=ids_BT.device), lengths_B - 1]
        self.cache.commit(Accepted(order.expand(len(ids_BT), -1), lengths_B, lengths_B))
        return self.target.logits(last), {name: seen[name] for name in states}

    def attend_by(self, hook: AttentionHook | None) -> None:
        """From the next call on, layers attend by `hook`; None: as the model does."""
        self._hook = hook

    def _forward(
        self,
        hidden_BNH: Tensor,
        rows: Rows,
        names: Sequence[StateName],
        layers: tuple[int, int] | None = None,
    ) -> dict[StateName, Tensor]:
        """One pass over rows, as `Target.forward_rows`, with this session's attention."""
        with attending(self._hook):
            return self.target.forward_rows(hidden_BNH, rows, names, self.cache, layers)

    @torch.no_grad()
    def read(self, ids_BN: Tensor, rows: Rows) -> Tensor:
        """`final` states [B,N,H] of tokens at the positions of `rows`. Nothing is committed."""
        embeddings = self.target.embed(ids_BN)
        return self._forward(embeddings, self._inside(rows), ("final",))["final"]

    @torch.no_grad()
    def run_layers(
        self,
        rows: Rows,
        hidden_BNH: Tensor,
        start: int,
        stop: int,
        states: Sequence[StateName] = ("pre_norm",),
    ) -> dict[StateName, Tensor]:
        """Call the layers `start … stop-1` alone. Nothing is committed.

        Args:
            rows: positions and visibility; rows that earlier calls wrote at these layers come first
                in the columns.
            hidden_BNH: input of layer `start`; for layer 0 embeddings as `Target.embed` gives them.
            start, stop: the range of layers; these alone read and write the KV cache.
            states: names of states to return [B,N,H]. `"pre_norm"` is the output of layer
                `stop - 1`, `"final"` that output after the final norm.
        """
        return self._forward(hidden_BNH, self._inside(rows), states, (start, stop))

    @torch.no_grad()
    def verify(
        self,
        tree: TokenTree,
        states: Sequence[StateName] = (),
        vocabulary_D: Tensor | None = None,
    ) -> Verified:
        """One call over all rows of a tree: logits [B,N,V], or [B,N,D] over the given token ids,
        and states. Nothing is committed yet.

        Raises:
            ValueError: a requested state lies below the layer to which rows have run already; a
                tree with both such rows and auxiliary ones.
        """
        # 1. Rows and embeddings of all nodes.
        target = self.target
        rows = self._inside(tree.rows(self.lengths_B))
        embeddings, names = target.embed(tree.tokens_BN), (*states, "final")
        # 2. Run them, as the tree and the target allow.
        compiled = target.compiled
        if tree.auxiliary is not None:
            return self._beside(tree, rows, embeddings, states, vocabulary_D)
        if tree.already_run is not None:
            seen = self._complete(tree, rows, embeddings, names)
        elif self._hook is None and compiled is not None and compiled.takes(tree.size, self.cache):
            seen = compiled(embeddings, rows, self.cache, names)
        else:
            seen = self._forward(embeddings, rows, names)
        logits = target.logits(seen["final"], vocabulary_D)
        return Verified(tree, logits, {name: seen[name] for name in states})

    def _beside(
        self,
        tree: TokenTree,
        rows: Rows,
        embeddings_BNH: Tensor,
        states: Sequence[StateName],
        vocabulary_D: Tensor | None,
    ) -> Verified:
        """The verification of a tree with auxiliary rows."""
        target, auxiliary = self.target, tree.auxiliary
        assert auxiliary is not None
        if tree.already_run is not None:
            raise ValueError("a tree carries rows that ran in part, or auxiliary rows, not both")
        # 1. Room and positions for the auxiliary rows.
        last, names = target.max_positions - 1, (*states, "final")
        positions = auxiliary.position_ids_BP.clamp(max=last)
        auxiliary = replace(auxiliary, position_ids_BP=positions)
        self.cache.reserve(tree.computed)
        # 2. One pass; split its states again.
        with attending(self._hook):
            seen = target.forward_beside(embeddings_BNH, rows, names, auxiliary, self.cache)
        nodes = {name: seen[name][:, : tree.size] for name in states}
        others = {name: seen[name][:, tree.size :] for name in states}
        logits = target.logits(seen["final"][:, : tree.size], vocabulary_D)
        return Verified(tree, logits, nodes, others)

    def _complete(
        self, tree: TokenTree, rows: Rows, embeddings_BNH: Tensor, names: Sequence[StateName]
    ) -> dict[StateName, Tensor]:
        """States of a tree whose first rows have run through the first layers."""
        assert tree.already_run is not None
        hidden, layer = tree.already_run.hidden_BMH, tree.already_run.layer
        early = [name for name in names if isinstance(name, int) and name < layer]
        if early:
            raise ValueError(
                f"state {early[0]} is asked for of rows that have passed it: the drafter hands "
                f"over rows that have run to layer {layer}"
            )
        # 1. Run the remaining nodes through the first layers, after those that have run.
        count = hidden.shape[1]
        if count < tree.size:
            rest = Rows(rows.position_ids_BN[:, count:], rows.visible_BNJ[:, count:])
            rest_BMH = self.run_layers(rest, embeddings_BNH[:, count:], 0, layer)["pre_norm"]
            hidden = torch.cat([hidden, rest_BMH], dim=1)
        # 2. Run all nodes through the other layers.
        return self.run_layers(rows, hidden, layer, self.target.shape.num_layers, names)

    def commit(self, accepted: Accepted) -> None:
        """Keep the accepted rows of the last call in the KV cache."""
        self.cache.commit(accepted)

    def rewind(self, lengths_B: Tensor) -> None:
        """Forget committed tokens after the first `lengths_B`, and rows that are not committed.
        Reads the device.
        """
        self.cache.rewind(lengths_B.tolist())

    def keep(self, sequences: list[int]) -> None:
        """Keep only these sequences, which may repeat."""
        self.cache.keep(sequences)

    def reserve(self, width: int) -> None:
        """Make room for `width` rows after the longest sequence."""
        self.cache.reserve(width)

    def select(self, sequences_S: Tensor) -> Session:
        """A session of these sequences alone (int64 [S]), without rows that are not committed."""
        return Session(self.target, self.cache.select(sequences_S))

    def _inside(self, rows: Rows) -> Rows:
        """The rows with positions limited to those of the target."""
        last = self.target.max_positions - 1
        return rows.at(rows.position_ids_BN.clamp(max=last))
