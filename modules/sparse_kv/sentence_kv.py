"""SentenceKV: sentences of the prompt by their mean keys (Zhu et al. 2025, arXiv 2504.00970).

A prompt is read in full. Of its tokens those stay that its newest queries attend to most, and every
one of them belongs to a sentence, whose mean key stands for it. A row reads the first tokens, the
newest ones, and the sentences whose mean keys are nearest to the mean query of the sentence that is
being written, until its budget is full. A written sentence that has ended joins the others. Sets
are per key/value head, by the sum over its query heads.

Shape legend: B sequences, Q query heads, K key/value heads, G query heads per key/value head, D
head size, T prompt tokens, O observed queries, M tokens that stay, C sentences, P written
sentences, N rows of one call, J rows since the last commit, S slots, X slots, A accepted rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.rows import rows_at
from modules.contracts.target import Target
from modules.sparse_kv.policy import (
    LayerCall,
    Policy,
    Selection,
    Step,
    checked,
    gathered_rows,
    highest,
    widened,
)
from modules.target.tokenizers.sentences import MARKS, Endings, ending_ids


@dataclass
class LayerMemory:
    """What a layer remembers of its sequences.

    slots_BKM: prompt tokens that stay, ascending, -1 where there are fewer. sentence_BKM: the
    sentence of each. means_BKCD: mean keys, the prompt's sentences first. filled_BKC: whether the
    sentence has tokens. sum_BKD: of the queries of the sentence that is being written, at least in
    float32.
    """

    slots_BKM: Tensor
    sentence_BKM: Tensor
    means_BKCD: Tensor
    filled_BKC: Tensor
    sum_BKD: Tensor

    def select(self, sequences_S: Tensor) -> LayerMemory:
        """The memory of these sequences alone (int64 [S])."""
        return LayerMemory(*(part[sequences_S] for part in vars(self).values()))


@dataclass
class PendingRows:
    """Rows since the last commit.

    query_BJX: their queries, summed over each group, X = K times D. ends_BJ: whether each ends a
    sentence. ended_BJ: how many rows above it do.
    """

    query_BJX: Tensor
    ends_BJ: Tensor
    ended_BJ: Tensor

    def select(self, sequences_S: Tensor) -> PendingRows:
        """The rows of these sequences alone (int64 [S])."""
        return PendingRows(*(part[sequences_S] for part in vars(self).values()))


@dataclass
class Observed:
    """The newest queries of a prompt [B,Q,O,D]; those of tokens before the text are zeros."""

    query_BQOD: Tensor
    scaling: float

    def add(self, call: LayerCall) -> Observed:
        """With the rows of one more call that are no padding."""
        count = self.query_BQOD.shape[2]
        both = torch.cat([self.query_BQOD, call.query_BQND], 2)
        index_BO = call.counts_B[:, None] + torch.arange(count, device=call.counts_B.device)
        index = index_BO[:, None, :, None].expand(-1, both.shape[1], -1, both.shape[3])
        return Observed(both.gather(2, index), call.scaling)

    def select(self, sequences_S: Tensor) -> Observed:
        """Those of these sequences alone (int64 [S])."""
        return Observed(self.query_BQOD[sequences_S], self.scaling)


def importance(observed: Observed, keys_BKSD: Tensor, lengths_B: Tensor, kernel: int) -> Tensor:
    """[B,K,S]: attention of the newest queries of a prompt to every slot, summed over them and over
    the heads of a group, the maximum over `kernel` neighbours.
    """
    batch, heads, count, size = observed.query_BQOD.shape
    kv_heads, slots = keys_BKSD.shape[1:3]
    query = observed.query_BQOD.reshape(batch, kv_heads, -1, size)
    logits = widened(query @ keys_BKSD.transpose(2, 3)) * observed.scaling
    logits = logits.view(batch, kv_heads, heads // kv_heads, count, slots)
    # Row i is token length - O + i, and sees what is no later.
    place_BO = lengths_B[:, None] - count + torch.arange(count, device=lengths_B.device)
    seen_BOS = torch.arange(slots, device=lengths_B.device) <= place_BO[..., None]
    weights = logits.masked_fill(~seen_BOS[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return F.max_pool1d(weights.sum((2, 3)), kernel, stride=1, padding=kernel // 2)


@dataclass
class SentenceSelection(Selection):
    """Sentences of the prompt and of the answer.

    ends_BT: whether each committed token ends a sentence. layers: memories. observed, pending: by
    layer. answer_B: the slot where the answer begins. open_B: the slot where the sentence that is
    being written begins. count_B: its tokens.
    written_BP2: first slot of each written sentence that has ended, and the slot after it; empty
    where a sequence has fewer. sentences: C of the prompt alone.
    """

    policy: SentenceKV
    endings: Endings
    ends_BT: Tensor
    answer_B: Tensor
    open_B: Tensor
    count_B: Tensor
    written_BP2: Tensor
    sentences: int = 0
    layers: dict[int, LayerMemory] = field(default_factory=dict)
    observed: dict[int, Observed] = field(default_factory=dict)
    pending: dict[int, PendingRows] = field(default_factory=dict)

    # -- the prompt --------------------------------------------------------------------------------

    def read_prompt(self, ids_BT: Tensor, lengths_B: Tensor) -> None:
        """Remember where its sentences end, after the committed tokens."""
        start_B = self.open_B + self.count_B
        width = ids_BT.shape[1]
        ends = F.pad(self.ends_BT, (0, int(start_B.max()) + width - self.ends_BT.shape[1]))
        # Sentences of an earlier answer have ended at these slots.
        last_BP = self.written_BP2[..., 1] - 1
        ends = ends.scatter(
            1, last_BP.clamp(min=0), ends.gather(1, last_BP.clamp(min=0)) | (last_BP >= 0)
        )
        place = start_B[:, None] + torch.arange(width, device=ids_BT.device)
        self.ends_BT = ends.scatter(1, place, self.endings.of(ids_BT))
        self.observed = {}

    def choose_prompt(self, call: LayerCall) -> Tensor | None:
        """All slots; remembers the newest queries."""
        before = self.observed.get(call.layer)
        if before is None:
            shape = (*call.query_BQND.shape[:2], self.policy.observed, call.query_BQND.shape[3])
            before = Observed(call.query_BQND.new_zeros(shape), call.scaling)
        self.observed[call.layer] = before.add(call)
        return None

    def end_prompt(self, keys: list[Tensor], lengths_B: Tensor) -> None:
        """Choose the tokens that stay, and take the mean keys of their sentences."""
        slots = keys[0].shape[2]
        inside = torch.arange(slots, device=lengths_B.device) < lengths_B[:, None]
        ends_BS = self.ends_BT[:, :slots] & inside
        sentence_BS = ends_BS.cumsum(1) - ends_BS.long()
        self.sentences = int(sentence_BS.max()) + 1
        for layer, stored in enumerate(keys):
            key = stored.to(lengths_B.device)
            scores = importance(self.observed[layer], key, lengths_B, self.policy.kernel)
            self.layers[layer] = self._memory(key, scores, sentence_BS, lengths_B)
        # The answer begins a sentence.
        self.answer_B = self.open_B = lengths_B.clone()
        self.count_B = torch.zeros_like(lengths_B)
        self.written_BP2 = lengths_B.new_zeros(len(lengths_B), 0, 2)
        self.ends_BT, self.observed, self.pending = ends_BS, {}, {}

    def _memory(
        self, keys_BKSD: Tensor, scores_BKS: Tensor, sentence_BS: Tensor, lengths_B: Tensor
    ) -> LayerMemory:
        policy, (batch, kv_heads, slots, size) = self.policy, keys_BKSD.shape
        # 1. The prefix tokens of highest importance, and all observed ones.
        place_S = torch.arange(slots, device=lengths_B.device)
        newest_BS = place_S >= lengths_B[:, None] - policy.observed
        scores = scores_BKS.masked_fill(newest_BS[:, None], torch.inf)
        scores = scores.masked_fill((place_S >= lengths_B[:, None])[:, None], -torch.inf)
        count = min(slots, max(policy.observed, int(policy.factor * policy.budget)))
        values, stay = highest(scores, count, ties=True)
        stay = torch.where(values > -torch.inf, stay, slots).sort(-1).values
        real = stay < slots
        # 2. Mean keys.
        index = stay.clamp(max=slots - 1)
        sentence = sentence_BS[:, None].expand(-1, kv_heads, -1).gather(2, index)
        number = self.sentences
        # At 16 bits a sum of hundreds of keys, and even their number, would stop growing.
        stored = keys_BKSD.gather(2, index[..., None].expand(-1, -1, -1, size))
        key = widened(stored) * real[..., None]
        sums = key.new_zeros(batch, kv_heads, number, size)
        sums = sums.scatter_add(2, sentence[..., None].expand_as(key), key)
        tokens = key.new_zeros(batch, kv_heads, number).scatter_add(2, sentence, real.to(key.dtype))
        means = sums / tokens.clamp(min=1)[..., None]
        return LayerMemory(
            torch.where(real, stay, -1),
            sentence,
            means.to(stored.dtype),
            tokens > 0,
            torch.zeros_like(means[:, :, 0]),
        )

    # -- the answer --------------------------------------------------------------------------------

    def choose(self, call: LayerCall) -> Tensor | None:
        """The first, the newest, and the tokens of the nearest sentences, of each row."""
        policy, pending = self.policy, self._pending(call)
        if min(policy.budget, int(policy.factor * policy.budget)) >= call.slots:
            return None
        memory = self._with_written(call, self.layers[call.layer])
        # 1. Nearness of every sentence to the mean query of each row's own.
        query_BKND, count_BN = self._mean_queries(call, pending, memory)
        near = torch.einsum("bknd,bkcd->bknc", query_BKND, memory.means_BKCD)
        call.reads.selection += memory.means_BKCD.numel() * memory.means_BKCD.element_size()
        near = near.masked_fill(~memory.filled_BKC[:, :, None], -torch.inf)
        # 2. Tokens in the order of their sentences.
        slots_BKX, near_BKNX = self._candidates(call, memory, near)
        newest = call.newest_slots(policy.recent)
        newest = torch.where(newest < policy.start_tokens, -1, newest)
        tokens = self._elected(call, slots_BKX, near_BKNX, count_BN)
        both = torch.cat([call.first_slots(policy.start_tokens), newest], 3)
        return torch.cat([both.expand(-1, tokens.shape[1], -1, -1), tokens], 3)

    def _pending(self, call: LayerCall) -> PendingRows:
        """Rows since the last commit, with those of this call."""
        # 1. Sums over groups; the sum and the mean order sentences alike.
        query = call.grouped_BKGND.sum(2).transpose(1, 2).flatten(2)
        ends = self.endings.of(call.tokens_BN)
        earlier = call.pending - query.shape[1]
        rows = self.pending.get(call.layer)
        if rows is None or not earlier:
            none = query[:, :0]
            rows = PendingRows(none, ends[:, :0], ends[:, :0].long())
        rows = PendingRows(*(part[:, :earlier] for part in vars(rows).values()))
        # 2. How many sentences end above each row.
        ends_BJ = torch.cat([rows.ends_BJ, ends], 1)
        above = call.path_BNJ.clone()
        itself = earlier + torch.arange(query.shape[1], device=above.device)
        above[:, torch.arange(query.shape[1]), itself] = False
        ended = (above & ends_BJ[:, None]).sum(-1)
        rows = PendingRows(
            torch.cat([rows.query_BJX, query], 1), ends_BJ, torch.cat([rows.ended_BJ, ended], 1)
        )
        self.pending[call.layer] = rows
        return rows

    def _mean_queries(
        self, call: LayerCall, rows: PendingRows, memory: LayerMemory
    ) -> tuple[Tensor, Tensor]:
        """Mean query [B,K,N,D] of the sentence that each row is in, the row included, and its
        number of tokens [B,N].
        """
        ended_BN = rows.ended_BJ[:, -call.path_BNJ.shape[1] :]
        # Rows of the path that no end of a sentence separates from the row.
        same = call.path_BNJ & (rows.ended_BJ[:, None] == ended_BN[..., None])
        going_on = (ended_BN == 0).to(rows.query_BJX.dtype)
        total = same.to(rows.query_BJX.dtype) @ rows.query_BJX
        total = total + going_on[..., None] * memory.sum_BKD.flatten(1)[:, None]
        count_BN = same.sum(-1) + torch.where(ended_BN == 0, self.count_B[:, None], 0)
        mean = (total / count_BN[..., None]).to(memory.means_BKCD.dtype)
        batch, kv_heads, size = memory.sum_BKD.shape
        return mean.view(batch, -1, kv_heads, size).transpose(1, 2), count_BN

    def _candidates(
        self, call: LayerCall, memory: LayerMemory, near_BKNC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Slots [B,K,X] of the prompt's tokens and of the answer's, and the nearness of their
        sentences [B,K,N,X]; tokens of the sentence that is being written are nearest.
        """
        batch, kv_heads, rows = near_BKNC.shape[:3]
        first_B = self.answer_B
        width = int((call.lengths_B - first_B).max())
        slot_BX = first_B[:, None] + torch.arange(width, device=first_B.device)
        # 1. The sentence of each written token, after the prompt's.
        inside = (slot_BX[..., None] >= self.written_BP2[:, None, :, 0]) & (
            slot_BX[..., None] < self.written_BP2[:, None, :, 1]
        )
        sentence_BX = (
            self.sentences + inside.int().argmax(-1) if self.written_BP2.shape[1] else slot_BX * 0
        )
        # 2. Nearness by sentence.
        index = torch.cat([memory.sentence_BKM, sentence_BX[:, None].expand(-1, kv_heads, -1)], 2)
        near = near_BKNC.gather(3, index[:, :, None].expand(-1, -1, rows, -1))
        closed_BX = slot_BX < self.open_B[:, None]
        written = near[..., memory.sentence_BKM.shape[2] :]
        written = torch.where(closed_BX[:, None, None], written, torch.inf)
        near = torch.cat([near[..., : memory.sentence_BKM.shape[2]], written], 3)
        slot_BX = torch.where(slot_BX < call.lengths_B[:, None], slot_BX, -1)
        slots = torch.cat([memory.slots_BKM, slot_BX[:, None].expand(-1, kv_heads, -1)], 2)
        return slots, near

    def _elected(
        self, call: LayerCall, slots_BKX: Tensor, near_BKNX: Tensor, count_BN: Tensor
    ) -> Tensor:
        """int64 [B,K,N,X]: tokens of the nearest sentences between the first and the newest, as
        many as the budget leaves; all of them where a sentence begins.
        """
        policy = self.policy
        age = call.positions_BN[:, None, :, None] - slots_BKX[:, :, None]
        between = (slots_BKX >= policy.start_tokens)[:, :, None] & (age >= policy.recent)
        near = near_BKNX.masked_fill(~between, -torch.inf)
        order = torch.argsort(near, dim=-1, descending=True, stable=True)
        room = min(near.shape[-1], policy.budget - policy.start_tokens - policy.recent)
        begins = count_BN <= 1
        if bool(begins.any()):
            within = torch.arange(near.shape[-1], device=near.device) < room
            taken = between.gather(3, order) & (within | begins[:, None, :, None])
        else:
            order = order[..., :room]
            taken = between.gather(3, order)
        chosen = slots_BKX[:, :, None].expand(-1, -1, near.shape[2], -1).gather(3, order)
        return torch.where(taken, chosen, -1)

    def _with_written(self, call: LayerCall, memory: LayerMemory) -> LayerMemory:
        """The layer's memory with the mean keys of sentences that have ended since."""
        missing = self.sentences + self.written_BP2.shape[1] - memory.means_BKCD.shape[2]
        if missing:
            means, filled = self._means(call, self.written_BP2[:, -missing:])
            memory = replace(
                memory,
                means_BKCD=torch.cat([memory.means_BKCD, means], 2),
                filled_BKC=torch.cat([memory.filled_BKC, filled], 2),
            )
            self.layers[call.layer] = memory
        return memory

    def _means(self, call: LayerCall, ranges_BP2: Tensor) -> tuple[Tensor, Tensor]:
        """Mean keys [B,K,P,D] of slots from a first one to one before another, and whether there
        are any.
        """
        batch, count = ranges_BP2.shape[:2]
        sizes_BP = ranges_BP2[..., 1] - ranges_BP2[..., 0]
        order = torch.arange(int(sizes_BP.max()), device=ranges_BP2.device)
        inside = order < sizes_BP[..., None]
        slots = torch.where(inside, ranges_BP2[..., :1] + order, 0)
        place, heads = slots.flatten(1)[:, None, None], call.keys_BKSD.shape[1]
        keys = gathered_rows(call.keys_BKSD, place, heads).to(slots.device)
        call.reads.selection += keys.numel() * keys.element_size()
        keys = keys.view(batch, keys.shape[1], count, -1, keys.shape[-1])
        weights = inside.to(keys.dtype) / sizes_BP.clamp(min=1)[..., None]
        means = (keys * weights[:, None, ..., None]).sum(3)
        return means, (sizes_BP > 0)[:, None].expand(-1, means.shape[1], -1)

    def commit(self, step: Step) -> None:
        """Advance the sentence that is being written; what has ended joins the others."""
        batch, width = step.path_BA.shape
        order = torch.arange(width, device=step.path_BA.device)
        real_BA = order < step.counts_B[:, None]
        ends_BA = self.endings.of(step.tokens_BA) & real_BA
        last_B = torch.where(ends_BA, order + 1, 0).amax(1)
        # 1. Queries after the last end.
        after_BA = (real_BA & (order >= last_B[:, None]))[..., None]
        going_on = (last_B == 0)[:, None, None]
        for layer, rows in self.pending.items():
            memory, accepted = self.layers[layer], rows_at(rows.query_BJX, step.path_BA)
            added = (accepted * after_BA).sum(1).view_as(memory.sum_BKD)
            self.layers[layer] = replace(memory, sum_BKD=memory.sum_BKD * going_on + added)
        # 2. Sentences that have ended, in their order.
        for column in order[ends_BA.any(0)].tolist():
            end_B = step.lengths_B + column + 1
            now = ends_BA[:, column]
            span = torch.stack([self.open_B, end_B], 1) * now[:, None]
            self.written_BP2 = torch.cat([self.written_BP2, span[:, None]], 1)
            self.open_B = torch.where(now, end_B, self.open_B)
        self.count_B = step.lengths_B + step.counts_B - self.open_B
        self.pending = {}


class SentenceKV(Policy):
    """Sentences by their mean keys.

    Args:
        budget: τ, slots that a row reads.
        factor: r; ⌊r·τ⌋ tokens of a prompt stay.
        observed: N, newest queries of a prompt whose attention decides which.
        kernel: neighbours over which importance is the maximum, odd.
        start_tokens: first slots.
        recent: newest positions, the row's own included.
        marks: characters that end a sentence.

    Raises:
        ValueError: a setting below its least value, an even kernel, or a budget that the first and
            the newest slots fill.
    """

    without_keys = True

    def __init__(
        self,
        budget: int = 1024,
        factor: float = 3.0,
        observed: int = 32,
        kernel: int = 7,
        start_tokens: int = 32,
        recent: int = 32,
        marks: str = MARKS,
    ) -> None:
        checked(observed=(observed, 1), kernel=(kernel, 1), recent=(recent, 1))
        checked(start_tokens=(start_tokens, 0), budget=(budget, start_tokens + recent + 1))
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that it is centred, got {kernel}")
        if factor <= 0:
            raise ValueError(f"factor must be above 0, got {factor}")
        self.budget, self.factor, self.observed, self.kernel = budget, factor, observed, kernel
        self.start_tokens, self.recent, self.marks = start_tokens, recent, marks

    def start(self, target: Target, batch: int) -> SentenceSelection:
        """A selection without sentences.

        Raises:
            ValueError: a tokenizer without a token that ends a sentence.
        """
        ids = ending_ids(target.tokenizer, self.marks)
        if not ids:
            raise ValueError(f"marks {self.marks!r}: no token of {target.name!r} is one: add some")
        zeros = torch.zeros(batch, dtype=torch.int64, device=target.device)
        return SentenceSelection(
            self,
            Endings(ids, target.shape.vocab_size, target.device),
            torch.zeros(batch, 0, dtype=torch.bool, device=target.device),
            zeros,
            zeros,
            zeros,
            zeros.new_zeros(batch, 0, 2),
        )
