"""ActQKV: blocks of the past, recalled by a probe of unusual queries (Xiao et al. 2025, arXiv
2502.13542).

A prompt is read in windows. Blocks of tokens before the window are scored by their mean keys
against one probe query, and the best are read beside the first and the newest tokens. The probe
weighs each query by its distance from the window's mean, in standard deviations; a plain mean is
the ablation. How many blocks a layer recalls follows the entropy of its block scores: flat scores
get more, and all layers together a fixed number. Of the paper only abstract and reviews were at
hand: the exact weights (a softmax of the squared distance per dimension), scores (the heads' mean)
and densities (entropy) are inferred.

Shape legend: B sequences, Q query heads, K key/value heads, D head size, L layers, C blocks, Y
recalled blocks, N rows of one call, J rows since the last commit, R rows that score, S slots, X
slots, E = Q times D.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from modules.contracts.target import Target
from modules.sparse_kv.policy import LayerCall, Policy, Selection, checked, widened

SPREAD = 1e-6
"""The least standard deviation that a distance is divided by."""


def activation_weights(states_BNE: Tensor, real_BN: Tensor, temperature: float) -> Tensor:
    """[B,N]: softmax over the real rows of ‖(h − μ) / σ‖² / E / temperature, with mean and standard
    deviation over these rows.
    """
    states, real = widened(states_BNE), real_BN[..., None].to(widened(states_BNE).dtype)
    count = real.sum(1, keepdim=True).clamp(min=1)
    mean = (states * real).sum(1, keepdim=True) / count
    variance = ((states - mean).square() * real).sum(1, keepdim=True) / count
    bias_BN = ((states - mean) / variance.sqrt().clamp(min=SPREAD)).square().mean(-1)
    logits = (bias_BN / temperature).masked_fill(~real_BN, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0)


def block_share(
    left: Tensor, density: Tensor, later: Tensor, layers: int, present: Tensor
) -> Tensor:
    """int64 [...]: how many of the blocks that are left a layer recalls, in proportion to its
    density; evenly where nothing is known of later layers. Every layer takes what those after it
    cannot, and none more than there are.

    Args:
        left: int64 [...], blocks that no layer before it has taken.
        density: of this layer [...].
        later: summed over the layers after it [...].
        layers: this one and those after it.
        present: int64 [...], blocks that a layer can recall.
    """
    whole = density + later
    share = torch.where(later > 0, density / whole.clamp(min=1e-30), 1.0 / layers)
    count = (left * share).round().long()
    return count.maximum(left - (layers - 1) * present).minimum(present)


def entropy(scores_BRC: Tensor) -> Tensor:
    """[B,R]: in nats, of the softmax; 0 where there is no block."""
    probs = scores_BRC.softmax(-1).nan_to_num(0.0)
    return -torch.special.xlogy(probs, probs).sum(-1)


@dataclass
class BlockMemory:
    """A layer's blocks: mean keys, and which blocks are complete."""

    means_BKCD: Tensor
    complete_BC: Tensor

    def select(self, sequences_S: Tensor) -> BlockMemory:
        """Those of these sequences alone (int64 [S])."""
        return BlockMemory(self.means_BKCD[sequences_S], self.complete_BC[sequences_S])


@dataclass
class ActSelection(Selection):
    """Blocks of every layer, and how many of them it recalls.

    A layer's share of the blocks that are left is by its own density against those that the layers
    after it had in the newest window of the prompt, so that a row's shares do not depend on other
    rows.

    densities_BL: of the newest window. left_BR: blocks that the layers of this call have not taken.
    """

    policy: ActQKV
    densities_BL: Tensor
    left_BR: Tensor
    memories: dict[int, BlockMemory] = field(default_factory=dict)

    # -- blocks ------------------------------------------------------------------------------------

    def _memory(self, call: LayerCall) -> BlockMemory:
        """The layer's blocks, with the mean keys of those that are complete by now."""
        policy = self.policy
        count = max(0, call.slots - policy.initial) // policy.block
        end_C = policy.initial + policy.block * torch.arange(
            1, count + 1, device=call.lengths_B.device
        )
        complete_BC = end_C <= call.lengths_B[:, None]
        memory = self.memories.get(call.layer)
        batch, kv_heads, _, size = call.keys_BKSD.shape
        if memory is None:
            none = call.keys_BKSD.new_zeros(batch, kv_heads, 0, size)
            memory = BlockMemory(none, complete_BC[:, :0])
        # 1. Columns for new blocks.
        more = count - memory.complete_BC.shape[1]
        if more > 0:
            blank = call.keys_BKSD.new_zeros(batch, kv_heads, more, size)
            means = torch.cat([memory.means_BKCD, blank], 2)
            done = torch.cat([memory.complete_BC, torch.zeros_like(complete_BC[:, :more])], 1)
            memory = BlockMemory(means, done)
        # 2. Mean keys of those that became complete.
        width = memory.complete_BC.shape[1]
        complete_BC = complete_BC[:, :width]
        complete_BC = torch.cat([complete_BC, memory.complete_BC[:, complete_BC.shape[1] :]], 1)
        new_C = (complete_BC & ~memory.complete_BC).any(0)
        if bool(new_C.any()):
            first, last = (int(i) for i in new_C.nonzero()[[0, -1], 0])
            start, stop = (policy.initial + policy.block * i for i in (first, last + 1))
            keys = call.keys_BKSD[:, :, start:stop]
            call.reads.selection += keys.numel() * keys.element_size()
            means = memory.means_BKCD.clone()
            fresh = keys.unflatten(2, (-1, policy.block)).mean(3)
            stale = memory.complete_BC[:, None, first : last + 1, None]
            means[:, :, first : last + 1] = torch.where(stale, means[:, :, first : last + 1], fresh)
            memory = BlockMemory(means, complete_BC)
        self.memories[call.layer] = memory
        return memory

    def _scores(
        self, call: LayerCall, probe_BKGRD: Tensor, before_BR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The heads' mean product [B,R,C] with each block's mean key, -inf for blocks that are not
        complete or do not end by `before_BR`; and the slot [B,R] where the newest such block ends.
        """
        policy, memory = self.policy, self._memory(call)
        call.reads.selection += memory.means_BKCD.numel() * memory.means_BKCD.element_size()
        products = torch.einsum("bkgrd,bkcd->bkgrc", probe_BKGRD, memory.means_BKCD)
        scores_BRC = widened(products).mean((1, 2)) * call.scaling
        order = torch.arange(1, memory.complete_BC.shape[1] + 1, device=before_BR.device)
        end_C = policy.initial + policy.block * order
        past_BRC = memory.complete_BC[:, None] & (end_C <= before_BR[..., None])
        number_BR = past_BRC.sum(-1)
        return scores_BRC.masked_fill(
            ~past_BRC, -torch.inf
        ), policy.initial + policy.block * number_BR

    def _share(self, call: LayerCall, density_BR: Tensor, scores_BRC: Tensor) -> Tensor:
        """int64 [B,R]: blocks that each row recalls in this layer."""
        layers = self.densities_BL.shape[1]
        if call.layer == 0:
            self.left_BR = torch.full_like(density_BR, self.policy.blocks * layers).long()
        later_B1 = self.densities_BL[:, call.layer + 1 :].sum(1, keepdim=True)
        present_BR = (scores_BRC > -torch.inf).sum(-1)
        count_BR = block_share(self.left_BR, density_BR, later_B1, layers - call.layer, present_BR)
        self.left_BR = self.left_BR - count_BR
        return count_BR

    def _recalled(self, scores_BRC: Tensor, count_BR: Tensor) -> Tensor:
        """int64 [B,R,X]: slots of the best blocks, as many as each row recalls, and as reach the
        mass.
        """
        policy = self.policy
        width = min(int(count_BR.max()), scores_BRC.shape[-1])
        values, blocks = scores_BRC.topk(width, dim=-1)
        taken = (torch.arange(width, device=count_BR.device) < count_BR[..., None]) & (
            values > -torch.inf
        )
        if policy.mass < 1:
            top = scores_BRC.softmax(-1).nan_to_num(0.0).gather(-1, blocks)
            taken = taken & (top.cumsum(-1) - top < policy.mass)
        inner = torch.arange(policy.block, device=count_BR.device)
        slots = policy.initial + blocks[..., None] * policy.block + inner
        return torch.where(taken[..., None], slots, -1).flatten(2)

    # -- the prompt --------------------------------------------------------------------------------

    def choose_prompt(self, call: LayerCall) -> Tensor | None:
        """Blocks that the window's probe recalls, one choice for all of its rows."""
        policy, before_B1 = self.policy, call.lengths_B[:, None]
        # 1. The probe of the rows that are no padding.
        rows = call.query_BQND.shape[2]
        real_BN = torch.arange(rows, device=before_B1.device) < call.counts_B[:, None]
        states_BNE = call.query_BQND.transpose(1, 2).flatten(2)
        weights = policy.weights(states_BNE, real_BN).to(states_BNE.dtype)
        probe = torch.einsum("bkgnd,bn->bkgd", call.grouped_BKGND, weights)[..., None, :]
        # 2. Scores and their density.
        scores_B1C, ends_B1 = self._scores(call, probe, before_B1 - policy.local)
        density_B1 = entropy(scores_B1C).to(self.densities_BL.dtype)
        count_B1 = self._share(call, density_B1, scores_B1C)
        column = self.densities_BL[:, call.layer]
        self.densities_BL = self.densities_BL.clone()
        self.densities_BL[:, call.layer] = torch.where(call.counts_B > 0, density_B1[:, 0], column)
        if int(call.lengths_B.max()) <= policy.initial + policy.local + policy.block:
            return None
        # 3. Beside the first slots and those after the newest block.
        slots = self._recalled(scores_B1C, count_B1)[:, None]
        first = call.first_slots(policy.initial)[:, :, :1]
        recent_BX = ends_B1 + torch.arange(policy.local + policy.block, device=ends_B1.device)
        recent = torch.where(recent_BX < before_B1, recent_BX, -1)[:, None, None]
        return torch.cat([first, slots, recent], 3)

    # -- the answer --------------------------------------------------------------------------------

    def choose(self, call: LayerCall) -> Tensor | None:
        """Blocks that each row's own query recalls."""
        policy = self.policy
        before_BN = call.positions_BN + 1 - policy.local
        scores_BNC, ends_BN = self._scores(call, call.grouped_BKGND, before_BN)
        density_BN = entropy(scores_BNC).to(self.densities_BL.dtype)
        count_BN = self._share(call, density_BN, scores_BNC)
        if call.slots <= policy.initial + policy.local + policy.block:
            return None
        # The first slots, the recalled ones, and those after the newest block.
        newest = call.newest_slots(policy.local + policy.block)
        newest = torch.where(newest < ends_BN[:, None, :, None], -1, newest)
        slots = self._recalled(scores_BNC, count_BN)[:, None]
        return torch.cat([call.first_slots(policy.initial), slots, newest], 3)


class ActQKV(Policy):
    """Recall of blocks by activation-aware probes.

    Args:
        blocks: that a layer recalls on average; the layers together recall that times their
            number.
        block: tokens of a block.
        initial: first slots.
        local: newest positions before a window, or of a row, its own included; at least the depth
            of a tree, whose rows are in no block before they are committed.
        window: tokens of a prompt that recall together.
        temperature: of the softmax over activation biases.
        probe: `bias` weights, or the plain `mean` of the window.
        mass: a layer recalls no more blocks once their softmax scores reach this sum.

    Raises:
        ValueError: a setting below its least value, or an unknown probe.
    """

    def __init__(
        self,
        blocks: int = 16,
        block: int = 128,
        initial: int = 128,
        local: int = 512,
        window: int = 512,
        temperature: float = 1.0,
        probe: Literal["bias", "mean"] = "bias",
        mass: float = 1.0,
    ) -> None:
        checked(blocks=(blocks, 1), block=(block, 1), initial=(initial, 0))
        checked(local=(local, 1), window=(window, 1))
        if probe not in ("bias", "mean"):
            raise ValueError(f"probe {probe!r} is unknown: use bias or mean")
        if temperature <= 0 or mass <= 0:
            raise ValueError(f"temperature {temperature} and mass {mass} must be above 0")
        self.blocks, self.block, self.initial, self.local = blocks, block, initial, local
        self.prompt_rows, self.temperature, self.probe, self.mass = window, temperature, probe, mass
        # Where a prompt was read in full, its newest window still tells the layers' densities.
        self.observed = window

    def weights(self, states_BNE: Tensor, real_BN: Tensor) -> Tensor:
        """[B,N]: of the window's queries in its probe."""
        if self.probe == "bias":
            return activation_weights(states_BNE, real_BN, self.temperature)
        return real_BN / real_BN.sum(1, keepdim=True).clamp(min=1)

    def start(self, target: Target, batch: int) -> ActSelection:
        """A selection without blocks, whose first window divides them evenly."""
        layers = target.shape.num_layers
        densities = torch.zeros(batch, layers, dtype=torch.float32, device=target.device)
        return ActSelection(self, densities, torch.zeros_like(densities[:, :1]).long())
