"""Generation with merged tokens: what is searched, read and written."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from modules.acceptance.rules import Draws
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.lossy.merged_vocabulary import MergedVocabularyDecoder, UnitText
from modules.drafters.retrieval.suffix_array import Datastore
from modules.target.loading import load_target
from modules.target.target import Target
from modules.tokenization.transfer.base_units import Unit
from modules.tokenization.transfer.frozen_base import Base
from modules.tokenization.transfer.hypernetwork import Hypernetwork, save_network
from tests.modules.tokenization.folders import BASE, model_folder

CORPUS = "The quick wolf and the cat under a full moon, jumping zebras, quilted owls. " * 2
PROMPT = BASE.encode("The cat under a moon")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = model_folder(tmp_path_factory.mktemp("base"), 0)
    made = load_target(str(folder), "float32", "cpu")
    # Weights that are large enough for answers that vary.
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, target: Target) -> tuple[str, str]:
    """A datastore, and a folder with an untrained hypernetwork."""
    place = tmp_path_factory.mktemp("folders")
    Datastore.build([BASE.encode(CORPUS)], target.shape.vocab_size).save(place / "store")
    torch.manual_seed(4)
    network = Hypernetwork(Base(target).embedding.float(), None, 16, 1, 2, length=4, bias=True)
    # Merged tokens are chosen about as often as base tokens.
    assert network.bias is not None
    network.bias.bias.data.fill_(6.0)
    (place / "run").mkdir()
    save_network(network, place / "run")
    return str(place / "store"), str(place / "run")


def test_means_of_pieces_never_beat_the_pieces(target: Target, folders: tuple[str, str]) -> None:
    plain = SpeculativeDecoder(target).decode([PROMPT], Sampling(), 20)[0].ids
    for merged_inputs in (True, False):
        decoder = MergedVocabularyDecoder(target, folders[0], merged_inputs=merged_inputs)
        assert len(decoder.vocabulary.units) > target.shape.vocab_size
        trace = decoder.decode([PROMPT], Sampling(), 20)[0]
        assert trace.ids == plain and decoder.quality_of([trace]) == {"tokens_per_unit": 1.0}


def expected_units(decoder: MergedVocabularyDecoder, prompt: list[Unit], calls: int) -> list[Unit]:
    """The answer's units, by the whole text read anew for each."""
    vocabulary, rows = decoder.vocabulary, decoder.vocabulary.rows()
    words: list[list[Unit]] = []
    for _ in range(calls):
        # Words that are over are written in the longest units.
        read = [vocabulary.segmented([i for unit in word for i in unit]) for word in words[:-1]]
        units = [*prompt, *(unit for word in [*read, *words[-1:]] for unit in word)]
        hidden = vocabulary.base.model.base_model(inputs_embeds=vocabulary.embeddings(units)[None])
        best = rows @ vocabulary.query(hidden.last_hidden_state[0, -1])
        unit = vocabulary.units[int(best.argmax())]
        if vocabulary.begins_word(unit) or not words:
            words.append([])
        words[-1].append(unit)
    return [unit for word in words for unit in word]


@pytest.mark.parametrize("merged_prompt", [False, True])
def test_units_are_read_as_one_position_each(
    target: Target, folders: tuple[str, str], merged_prompt: bool
) -> None:
    decoder = MergedVocabularyDecoder(target, *folders, merged_prompt=merged_prompt)
    prompt = decoder.vocabulary.segmented(PROMPT) if merged_prompt else [(i,) for i in PROMPT]
    assert (len(prompt) < len(PROMPT)) == merged_prompt
    trace = decoder.decode([PROMPT], Sampling(), 40)[0]
    units = expected_units(decoder, prompt, len(trace.accepted) + 1)
    ids = [i for unit in units for i in unit]
    assert trace.ids == ids[:40] and len(trace.ids) == len(trace.drafted) == 40
    assert trace.accepted[:-1] == [len(unit) for unit in units[1:-1]]
    assert decoder.quality_of([trace])["tokens_per_unit"] > 1


def test_a_finished_word_is_read_again_in_the_longest_units(
    target: Target, folders: tuple[str, str]
) -> None:
    decoder = MergedVocabularyDecoder(target, *folders)
    vocabulary = decoder.vocabulary
    unit = next(u for u in vocabulary.units if len(u) > 1 and vocabulary.begins_word(u))
    pieces: list[Unit] = [(i,) for i in unit]
    session = target.open(1, 40)
    text = UnitText(vocabulary, session, merged=True)
    text.read([(i,) for i in PROMPT])
    for part in pieces:
        text.append(part)
    assert int(session.lengths_B) == len(PROMPT) + len(pieces)
    state = text.append(unit)
    assert int(session.lengths_B) == len(PROMPT) + 2
    fresh = UnitText(vocabulary, target.open(1, 40), merged=True)
    torch.testing.assert_close(state, fresh.read([*((i,) for i in PROMPT), unit, unit]))
    # A word that was written so already stays.
    torch.testing.assert_close(text.append(unit), fresh.read([unit]))
    assert int(session.lengths_B) == len(PROMPT) + 3


def test_draws_are_from_the_softmax_over_the_candidates(
    target: Target, folders: tuple[str, str]
) -> None:
    decoder = MergedVocabularyDecoder(target, *folders, candidates=3)
    state_H = torch.randn(32, generator=torch.Generator().manual_seed(0))
    logits_K, units_K = decoder.nearest.search(decoder.vocabulary.query(state_H), 3)
    draws = Draws(Sampling(temperature=1.0), [torch.Generator().manual_seed(0)])
    drawn = [decoder._next(state_H, draws) for _ in range(2000)]
    counts = [drawn.count(decoder.vocabulary.units[i]) for i in units_K.tolist()]
    assert sum(counts) == 2000
    assert stats.chisquare(counts, 2000 * logits_K.double().softmax(0).numpy()).pvalue > 1e-4
    # One candidate is greedy decoding.
    alone = MergedVocabularyDecoder(target, *folders, candidates=1)
    sampled = alone.decode([PROMPT], Sampling(temperature=1.0), 12)[0].ids
    assert sampled == decoder.decode([PROMPT], Sampling(), 12)[0].ids


def test_an_index_that_looks_everywhere_is_exact(target: Target, folders: tuple[str, str]) -> None:
    exact = MergedVocabularyDecoder(target, *folders)
    indexed = MergedVocabularyDecoder(target, *folders, index="IVF4,Flat", search="nprobe=4")
    assert (
        indexed.decode([PROMPT], Sampling(), 24)[0].ids
        == exact.decode([PROMPT], Sampling(), 24)[0].ids
    )


def test_mistakes_are_refused(target: Target, folders: tuple[str, str]) -> None:
    for wrong, words in (
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"merges": -1}, "merges at least 0, got 64 and -1"),
        ({"merged_prompt": True, "merged_inputs": False}, "merged_prompt needs merged_inputs"),
        ({"boundary": "line"}, "boundary 'line' is unknown"),
    ):
        with pytest.raises(ValueError, match=words):
            MergedVocabularyDecoder(target, *folders, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds no hypernetwork|hypernetwork.json"):
        MergedVocabularyDecoder(target, folders[0], folders[0])
    decoder = MergedVocabularyDecoder(target, *folders)
    with pytest.raises(ValueError, match="does not follow repetition_penalty"):
        decoder.decode([PROMPT], Sampling(repetition_penalty=2.0), 4)
