"""Conversations as batches: read, tokenised with the target's template, packed, optionally with
cached states.

Shape legend: B rows, T tokens of a row, D draft vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from configs.command_line.work_share import Share
from data.conversations import Tokens, TrainOn, hash_ids, tokenize_all
from data.feature_cache.cache import CacheDtype, FeatureCache, cache_features
from data.feature_cache.vllm_states import Computed
from data.packing import collate, generator, pack
from data.reading.files import Tally, local_files
from data.reading.rows import load_conversations
from data.vocabulary import frequent_tokens
from modules.contracts.batches import TextBatch
from modules.contracts.shapes import StateName

if TYPE_CHECKING:
    from modules.contracts.target import Target

logger = logging.getLogger(__name__)


PREFETCHED = 4
"""Batches that each worker process has ready."""


class Batches:
    """Batches of packed rows in an order that depends on (seed, epoch) and can be resumed at any
    batch.

    Lightning calls `sampler.set_epoch` before each epoch and saves and restores `state_dict` with
    its checkpoints, so a resumed training continues after the last batch. Rows are packed once;
    their order changes with the epoch. Each rank takes every world-th batch; if the number of
    batches is not divisible, the last step repeats batches from the beginning with an empty loss
    mask, so that they have no weight, also in validation. Two ranks of `rows` therefore see, step
    by step, the rows of one rank of `2 * rows`, and a training can be resumed with either.

    Args:
        documents: documents to pack.
        max_length: tokens per row.
        rows: rows per batch.
        cache: feature cache with the documents' states, if any.
        shuffle: whether the order changes with the epoch; if not, rows come in the order they were
            packed.
        workers: processes that prepare batches.
    """

    def __init__(
        self,
        documents: Sequence[Any],
        max_length: int,
        rows: int,
        cache: FeatureCache | None = None,
        seed: int = 0,
        shuffle: bool = True,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.documents, self.cache, self.seed, self.shuffle, self.workers = (
            documents,
            cache,
            seed,
            shuffle,
            workers,
        )
        self.rank, self.world, self.rows = rank, world, rows
        self.packed = self._pack(max_length)
        self.sampler, self.batch_sampler = self, None
        self.epoch = self.batch = self._start = 0

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        return math.ceil(len(self.packed) / (self.rows * self.world))

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch, unless a restored state is in the middle of it."""
        if epoch != self.epoch:
            self.epoch, self.batch, self._start = epoch, 0, 0

    def order(self, epoch: int) -> list[list[int]]:
        """This rank's batches of an epoch, as indices of packed rows."""
        count = len(self.packed)
        shuffled = torch.randperm(count, generator=generator(self.seed + 1, epoch)).tolist()
        order = shuffled if self.shuffle else list(range(count))
        batches = [order[start : start + self.rows] for start in range(0, count, self.rows)]
        return [batches[(self.rank + k * self.world) % len(batches)] for k in range(len(self))]

    def __iter__(self) -> Iterator[Any]:
        """The epoch's batches; after a restored state, only the remaining ones."""
        # 1. Continue after the last batch, once.
        self.batch = self._start if self._start < len(self) else 0
        self._start = 0
        first, remaining = self.batch, self.order(self.epoch)[self.batch :]
        loader = DataLoader(
            cast(Any, self),
            batch_sampler=remaining,
            num_workers=self.workers,
            prefetch_factor=PREFETCHED if self.workers else None,
            # Copies to a GPU then go on beside its work.
            pin_memory=torch.cuda.is_available(),
            collate_fn=self._collate,
        )
        # 2. Count batches for the state; repeated ones have no weight.
        for step, batch in enumerate(loader, first):
            self.batch += 1
            for text in self._texts(batch) if self._repeated(step) else ():
                text.loss_mask = torch.zeros_like(text.loss_mask)
            yield batch

    def _repeated(self, step: int) -> bool:
        """Whether this rank's batch was already used in an earlier step."""
        return (self.rank + step * self.world) * self.rows >= len(self.packed)

    def _texts(self, batch: Any) -> tuple[TextBatch, ...]:
        """The texts of a batch."""
        return (batch,)

    def __getitem__(self, row: int) -> list[Any]:
        """The documents of one packed row."""
        return [self.documents[i] for i in self.packed[row]]

    def _pack(self, max_length: int) -> list[list[int]]:
        return pack([len(document) for document in self.documents], max_length, self.seed)

    def _collate(self, rows: list[list[Any]]) -> Any:
        if self.cache is None:
            return collate(rows)
        return collate(rows, [[self.cache.read(document.key) for document in row] for row in rows])

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the next batch and a fingerprint of the order."""
        return {"epoch": self.epoch, "batch": self.batch, "order": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Raises ValueError for other data or another order."""
        if state["order"] != self._fingerprint():
            raise ValueError(
                "--resume: data.* or data.rows times the number of processes changed since "
                "the checkpoint: restore them, or start a new run with --init_from"
            )
        self.epoch, self.batch, self._start = state["epoch"], state["batch"], state["batch"]

    def _fingerprint(self) -> str:
        keys = "".join(self.documents[i].key for row in self.packed for i in row)
        return hashlib.sha256(f"{keys}{self.rows * self.world}{self.seed}".encode()).hexdigest()[
            :16
        ]


class ConversationData(LightningDataModule):
    """Training and validation conversations for one target.

    Args:
        train: `.jsonl`, `.json` (each also with `.gz`) or `.parquet` file, a pattern of such
            (`answers/*.jsonl`), Hub data set (`owner/name[:config]`), or `embedded`.
        validation: the same; null holds out `validation_fraction` of `train`, whole prompts at a
            time.
        split: split of a Hub data set to train on.
        validation_split: split of a Hub data set to validate on.
        validation_fraction: share of the prompts held out when `validation` is null.
        max_length: tokens of a packed row; conversations are truncated there.
        rows: packed rows per batch.
        max_response_tokens: stop reading after this many response tokens (null: read all), held-out
            ones included. A Hub data set is then streamed and only downloaded so far.
        max_validation_tokens: the same for `validation`.
        features: folder of the feature cache; missing documents are added before training.
            `{target}` is replaced by the target's fingerprint and `{states}` by the states, so
            that runs can share it. null: computed online.
        features_dtype: of the cache; a folder has one dtype.
        features_gib: largest size of the cache's folder; more is refused before anything is
            computed (null: as much as the disk has free).
        seed: of packing and order.
        workers: processes that prepare batches.
        max_training_tokens: train on this many response tokens, from the beginning of what is not
            held out (null: all).
        train_on: which of the assistant's tokens: all, those of its last turn, or all but those of
            its reasoning (which stays before the answer).
    """

    batches: ClassVar[type[Batches]] = Batches
    """The class that puts documents into batches."""

    def __init__(
        self,
        train: str = "embedded",
        validation: str | None = None,
        split: str = "train",
        validation_split: str = "validation",
        validation_fraction: float = 0.05,
        max_length: int = 1024,
        rows: int = 2,
        max_response_tokens: int | None = None,
        max_validation_tokens: int | None = None,
        features: str | None = None,
        features_dtype: CacheDtype = "bfloat16",
        seed: int = 0,
        workers: int = 0,
        max_training_tokens: int | None = None,
        features_gib: float | None = None,
        train_on: TrainOn = "all",
    ) -> None:
        # What to read.
        super().__init__()
        self.train, self.validation, self.split, self.validation_split = (
            train,
            validation,
            split,
            validation_split,
        )
        self.validation_fraction, self.max_length, self.rows = validation_fraction, max_length, rows
        self.max_response_tokens, self.max_validation_tokens = (
            max_response_tokens,
            max_validation_tokens,
        )
        self.max_training_tokens = max_training_tokens
        # How to batch it, and where states are cached.
        self.features, self.seed, self.workers = features, seed, workers
        self.features_dtype: CacheDtype = features_dtype
        self.features_gib = features_gib
        self.train_on: TrainOn = train_on
        # Filled by `bind`.
        self.documents: list[Tokens] = []
        self.held_out: list[Tokens] = []
        self.tallies: list[Tally] = []
        self._target: Target | None = None
        self._cache: FeatureCache | None = None
        self._check()

    def _check(self) -> None:
        # Lower bounds, then the shares, then the files.
        for name, least in (
            ("max_length", 2),
            ("rows", 1),
            ("workers", 0),
            ("max_response_tokens", 1),
            ("max_validation_tokens", 1),
            ("max_training_tokens", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name} must be {least} or above, got {value}")
        if self.features_gib is not None and self.features_gib <= 0:
            raise ValueError(f"data.features_gib must be above 0, got {self.features_gib:g}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction must lie in (0, 1), got {self.validation_fraction}"
            )
        for source in (self.train, self.validation):
            if source is not None:
                local_files(source)

    # -- reading -----------------------------------------------------------------------------------

    def bind(self, target: Target, states: Sequence[StateName] = ()) -> None:
        """Read and tokenise the data for `target`, and cache the training states. Call it before
        fit.

        Args:
            target: gives tokenizer, chat template and context length.
            states: `Trainable.training_states`; none are cached for a component that runs the
                target itself.

        Raises:
            ValueError: `max_length` beyond the target's context, no usable conversation, or a
                cache of another target.
        """
        self.read(target)
        self._cache = self._open_cache(target, states) if self.features and states else None

    def read(self, target: Target) -> None:
        """Read and tokenise the data for `target`; only its tokenizer and context length are used.

        Raises:
            ValueError: `max_length` beyond the target's context, or no usable conversation.
        """
        self.check_length(target)
        self._target, self.tallies = target, []
        documents = self._tokenized(self.train, self.split, self.max_response_tokens)
        if self.validation is None:
            self.documents, self.held_out = hold_out(documents, self.validation_fraction)
        else:
            self.documents = documents
            self.held_out = self._tokenized(
                self.validation, self.validation_split, self.max_validation_tokens
            )
        self.documents = first_tokens(self.documents, self.max_training_tokens)

    def check_length(self, target: Target) -> None:
        """Raise ValueError if a row would be longer than the target's context."""
        if self.max_length > target.max_positions:
            raise ValueError(
                f"data.max_length is {self.max_length}, but the context of target {target.name!r} "
                f"has {target.max_positions} positions: lower it"
            )

    def _tokenized(self, source: str, split: str, budget: int | None) -> list[Tokens]:
        assert self._target is not None
        tally = self._tally("conversation")
        conversations = load_conversations(
            source, split=split, streaming=budget is not None, tally=tally
        )
        return tokenize_all(
            conversations,
            self._target.tokenizer,
            self.max_length,
            budget,
            self._target.eos_ids,
            self._target.shape.vocab_size,
            tally,
            self.train_on,
        )

    def _tally(self, word: str) -> Tally:
        """A new tally for the next source."""
        self.tallies.append(Tally(word))
        return self.tallies[-1]

    def _open_cache(self, target: Target, states: Sequence[StateName]) -> FeatureCache | None:
        # Every process writes its share first; then all wait for the whole cache.
        share = Share.of_process()
        if share.count > 1:
            self.write_features(target, states, share)
        cache = FeatureCache(self.write_features(target, states), target.fingerprint(), states)
        cache.require([*self.documents, *self.held_out])
        return cache

    def write_features(
        self,
        target: Target,
        states: Sequence[StateName],
        share: Share | None = None,
        computed: Computed | None = None,
    ) -> Path:
        """Add missing documents, or a share of them, to the feature cache; returns its folder.
        `computed` gives their states instead of the target."""
        assert self.features is not None
        folder = self.features.replace("{target}", target.fingerprint()).replace(
            "{states}", "+".join(map(str, states))
        )
        return cache_features(
            target,
            [*self.documents, *self.held_out],
            states,
            folder,
            self.features_dtype,
            share=share,
            gib=self.features_gib,
            computed=computed,
        )

    # -- batches -----------------------------------------------------------------------------------

    def train_dataloader(self) -> Batches:
        """Shuffled batches of the training documents."""
        return self._batches(self.documents, shuffle=True)

    def val_dataloader(self) -> Batches:
        """Batches of the held-out documents, always in the same order."""
        return self._batches(self.held_out, shuffle=False)

    def for_stages(self) -> ConversationData:
        """The data of earlier training stages (`Trainable.stages`)."""
        return self

    def held_out_batches(self) -> Batches:
        """Batches of all held-out documents, on the calling process."""
        return self._batches(self.held_out, shuffle=False, alone=True)

    def _batches(self, documents: Sequence[Tokens], shuffle: bool, alone: bool = False) -> Batches:
        assert self._target is not None, "bind() the data to a target first"
        # Without a trainer there is one rank.
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size)
            if self.trainer and not alone
            else (0, 1)
        )
        return self.batches(
            documents,
            self.max_length,
            self.rows,
            self._cache,
            self.seed,
            shuffle,
            self.workers,
            rank,
            world,
        )

    # -- what it holds -----------------------------------------------------------------------------

    @property
    def response_tokens(self) -> int:
        """Number of response tokens in the training documents."""
        return sum(document.response_tokens for document in self.documents)

    def fingerprint(self) -> str:
        """Hash of all documents and their masks."""
        parts = (
            document.key + hash_ids(document.loss_mask.long())
            for document in [*self.documents, *self.held_out]
        )
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]

    def summary(self) -> dict[str, Any]:
        """The data's entry in provenance and model card. `left_out` and `validation_left_out` are
        present only if rows were skipped (by reason: `count`, and the place of the `first`)."""
        names = ("left_out", "validation_left_out")
        left_out = {
            name: entry for name, tally in zip(names, self.tallies) if (entry := tally.as_dict())
        }
        return {
            "train": self.train,
            "validation": self.validation,
            "documents": len(self.documents),
            "response_tokens": self.response_tokens,
            "held_out_documents": len(self.held_out),
            "max_length": self.max_length,
            "fingerprint": self.fingerprint(),
            **left_out,
        }

    def probe_prompts(self, count: int) -> list[list[int]]:
        """Token ids of up to `count` held-out prompts, spread over the held-out documents, for
        decoding.
        """
        prompts = list(dict.fromkeys(tuple(document.prompt) for document in self.held_out))
        step = max(1.0, len(prompts) / max(1, count))
        return [list(prompts[int(k * step)]) for k in range(min(count, len(prompts)))]

    def vocabulary(self, size: int) -> Tensor:
        """The `size` most frequent assistant tokens of the training documents (end of turn
        included), ids [D].
        """
        assert self._target is not None, "bind() the data to a target first"
        return frequent_tokens(
            self.documents, size, self._target.shape.vocab_size, self._target.eos_ids
        )


def first_tokens(documents: Sequence[Tokens], most: int | None) -> list[Tokens]:
    """The first documents whose response tokens reach `most`."""
    before = accumulate((document.response_tokens for document in documents), initial=0)
    return [
        document for document, tokens in zip(documents, before) if most is None or tokens < most
    ]


def hold_out(documents: Sequence[Tokens], fraction: float) -> tuple[list[Tokens], list[Tokens]]:
    """(training, held-out) documents, split by the hash of the conversation's first prompt, so all
    answers to it are on one side, and more data never move a document to the other side.

    Raises:
        ValueError: the data have only one prompt.
    """
    hashes = [int(document.group[:8], 16) / 2**32 for document in documents]
    if len(set(hashes)) < 2:
        raise ValueError(
            "the data set has one prompt only, so nothing can be held out: name a data.validation "
            "set"
        )
    # Both sides get at least one prompt.
    threshold = min(max(fraction, min(hashes)), sorted(set(hashes))[-2])
    training = [
        document for document, value in zip(documents, hashes, strict=True) if value > threshold
    ]
    held = [
        document for document, value in zip(documents, hashes, strict=True) if value <= threshold
    ]
    return training, held
