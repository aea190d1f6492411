"""Generation with a large vocabulary: merged tokens are predicted, and searched for, like base
tokens (Feher et al. 2024, arXiv 2411.18553). Lossy: it is another model of the text.

Shape legend: N rows of one call, H hidden size, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from modules.acceptance.rules import Draws
from modules.contracts.drafter import Part
from modules.contracts.rows import causal_rows
from modules.contracts.sampling import Sampling
from modules.contracts.verification import Accepted
from modules.decoding.loop import Trace
from modules.decoding.lossy.several_answers import check_one_prompt
from modules.decoding.timing import Clock
from modules.drafters.retrieval.suffix_array import Datastore
from modules.target.session import Session
from modules.target.target import Target
from modules.tokenization.transfer.base_units import Unit, UnitRules
from modules.tokenization.transfer.frozen_base import Base
from modules.tokenization.transfer.hypernetwork import load_network
from modules.tokenization.transfer.large_vocabulary import LargeVocabulary
from modules.tokenization.transfer.nearest_rows import EXACT, NearestRows


class UnitText:
    """A text in a KV cache.

    Args:
        vocabulary: of units.
        session: of one sequence.
        merged: a unit is one position; else each of its base tokens is.
    """

    def __init__(self, vocabulary: LargeVocabulary, session: Session, merged: bool) -> None:
        self.vocabulary, self.session, self.merged = vocabulary, session, merged
        self._word: list[Unit] = []
        """Units since the last word began, which the cache holds at its end."""

    def read(self, units: Sequence[Unit]) -> Tensor:
        """The final state [H] after more units."""
        if not self.merged:
            units = [(i,) for unit in units for i in unit]
        state_H = None
        for start in range(0, len(units), self.session.prompt_rows):
            state_H = self._call(units[start : start + self.session.prompt_rows])
        assert state_H is not None, "there is at least one unit"
        return state_H

    def _call(self, units: Sequence[Unit]) -> Tensor:
        session, count = self.session, len(units)
        target = session.target
        # 1. One pass over their embeddings.
        vectors_NH = self.vocabulary.embeddings(units).to(target.dtype)
        rows = causal_rows(session.lengths_B, count)
        layers = target.shape.num_layers
        seen = session.run_layers(rows, vectors_NH[None], 0, layers, ("final",))
        # 2. All of them are committed.
        order_1N = torch.arange(count, device=target.device)[None]
        counts_1 = torch.tensor([count], device=target.device)
        session.commit(Accepted(order_1N, counts_1, counts_1))
        return seen["final"][0, -1]

    def append(self, unit: Unit) -> Tensor:
        """The final state [H] after one more unit of an answer. Where it begins a word, the word
        before it is written anew in the longest units, and read again if these are others.
        """
        if not self.merged or not self.vocabulary.begins_word(unit):
            self._word.append(unit)
            return self.read([unit])
        usual = self.vocabulary.segmented([i for part in self._word for i in part])
        again = usual if usual != self._word else []
        if again:
            self.session.rewind(self.session.lengths_B - len(self._word))
        self._word = [unit]
        return self.read([*again, unit])


class MergedVocabularyDecoder:
    """Writes units of a large vocabulary: base tokens, and merged tokens of a corpus. A call of the
    target gives the next unit, whatever its length, which is chosen among the candidates that the
    index finds.

    Args:
        target: the model.
        datastore: folder that `python -m data.datastore` wrote, whose text is merged.
        transfer: folder of `python -m train.tokenizer_transfer` with the hypernetwork of this
            model, which predicts embeddings and rows of the LM head for merged tokens. None takes
            means of their base tokens', whose logits never exceed all of those tokens': then
            greedy decoding is the target's own.
        merges: of the corpus, at most.
        least: times that a pair must occur to be merged.
        boundary: that no unit crosses: `word`, `word_hyphen` or `sentence`.
        candidates: units of highest logit that the softmax is over.
        index: `exact`, or a faiss index factory such as `IVF1024,Flat`; search: its settings, such
            as `nprobe=32`. See `NearestRows`.
        merged_inputs: the model reads a unit as one position. Else it reads base tokens, several
            in a call.
        merged_prompt: the same for the prompt.

    Raises:
        ValueError: a setting out of range, no such folder, an index that cannot be made, a target
            that is no byte-level BPE (with `transfer`) or scales its embeddings.
    """

    name = "merged_vocabulary"
    claims_lossless: ClassVar[bool] = False
    batched: ClassVar[bool] = False

    def __init__(
        self,
        target: Target,
        datastore: str,
        transfer: str | None = None,
        merges: int = 10000,
        least: int = 2,
        boundary: str = "word",
        candidates: int = 64,
        index: str = EXACT,
        search: str = "",
        merged_inputs: bool = True,
        merged_prompt: bool = False,
    ) -> None:
        if candidates < 1 or merges < 0:
            raise ValueError(
                f"candidates must be at least 1 and merges at least 0, got {candidates} and "
                f"{merges}"
            )
        if merged_prompt and not merged_inputs:
            raise ValueError("merged_prompt needs merged_inputs: set both, or none")
        self.target, self.candidates = target, candidates
        self.merged_inputs, self.merged_prompt = merged_inputs, merged_prompt
        self.places = {"datastore": datastore} | ({"transfer": transfer} if transfer else {})
        # 1. The vocabulary.
        rules = UnitRules.of(target.tokenizer, boundary)
        texts = Datastore.load(datastore, target.shape.vocab_size).documents()
        base = Base(target)
        network = None
        if transfer is not None:
            network = load_network(Path(transfer), base.embedding.float(), base.head)
            network.to(target.device)
        units = dict.fromkeys(unit for row in rules.merged(texts, merges, least) for unit in row)
        self.vocabulary = LargeVocabulary(base, network, units)
        # 2. Its index.
        self.nearest = NearestRows(self.vocabulary.rows(), index, search)

    def parts(self) -> Mapping[str, Part]:
        """The folders that it is made from."""
        return {name: Path(place) for name, place in self.places.items()}

    @torch.no_grad()
    def decode(self, prompts: list[list[int]], sampling: Sampling, limit: int) -> list[Trace]:
        """Continue one prompt by at most `limit` base tokens.

        Raises:
            ValueError: as `check_one_prompt`.
        """
        # 1. Refuse what cannot be decoded; min-p is a warper.
        check_one_prompt(self.name, self.target, prompts, sampling, limit, ("min_p",))
        trace, clock = Trace(len(prompts[0])), Clock(self.target.device)
        generator = torch.Generator(self.target.device).manual_seed(sampling.seed)
        draws = Draws(sampling, [generator])
        session = self.target.open(1, len(prompts[0]) + limit + 1)
        text = UnitText(self.vocabulary, session, self.merged_inputs)
        # 2. The prompt.
        prompt: list[Unit] = [(i,) for i in prompts[0]]
        if self.merged_prompt:
            prompt = self.vocabulary.segmented(prompts[0])
        with clock.phase("prefill"):
            unit = self._next(text.read(prompt), draws)
        trace.time_to_first_token = clock.elapsed()
        trace.ids += unit
        # 3. One unit a call.
        lengths = [len(unit)]
        while len(trace.ids) < limit and unit[-1] not in self.target.eos_ids:
            with clock.phase("verify"):
                unit = self._next(text.append(unit), draws)
            lengths.append(len(unit))
            trace.ids += unit
        # 4. The last unit may exceed the limit.
        lengths[-1] -= max(0, len(trace.ids) - limit)
        del trace.ids[limit:]
        trace.drafted = [False] * len(trace.ids)
        trace.accepted, trace.offered = lengths[1:], [length - 1 for length in lengths[1:]]
        trace.seconds = clock.snapshot()
        return [trace]

    def _next(self, state_H: Tensor, draws: Draws) -> Unit:
        """The next unit by the final state before it."""
        query_W = self.vocabulary.query(state_H)
        logits_K, units_K = self.nearest.search(query_W, self.candidates)
        return self.vocabulary.units[int(units_K[draws.choose(logits_K[None, None])[0, 0]])]

    def quality_of(self, traces: Sequence[Trace]) -> dict[str, float]:
        """Base tokens of a unit, mean over all but the first of each answer
        (`tokens_per_unit`)."""
        lengths = [length for trace in traces for length in trace.accepted]
        return {"tokens_per_unit": fmean(lengths)} if lengths else {}
