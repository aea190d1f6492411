"""A second language model as the drafter: whatever the tree, it reads the text, and no token of the
target changes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained
from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, Frontier
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.small_models.independent import Independent
from modules.drafters.small_models.on_policy import document_prompts, written
from modules.losses.chunked import training_rows
from modules.losses.divergences import DIVERGENCES, UNNORMALISED
from modules.target.target import Target
from modules.trees.reranked import RerankedTree
from modules.trees.sampled.chain import SampledChain
from modules.trees.static import StaticTree
from modules.trees.threshold import ThresholdTree
from tests.fakes import tiny_batch, tiny_target, tiny_tokenizer
from tests.modules.families import Reader, documents

TARGET = tiny_target(layers=4)
PROMPTS = [[7, 8, 9, 10], [20, 30], [40, 41, 42, 43, 44]]
BUILDERS = {
    "chain": StaticTree.chain(3),
    "static": StaticTree([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]),
    "reranked": RerankedTree(3, 2),
    "threshold": ThresholdTree(3, 3, 0.99, 0.01),
    "sampled": SampledChain(3),
}


def drafter(target: Target = TARGET, shake: float = 0.05, **arguments: Any) -> Independent:
    """In float64, its weights moved off the target's."""
    torch.manual_seed(0)
    made = Independent(target.shape, **arguments)
    if made.vocabulary_D is not None:
        made.set_vocabulary(torch.randperm(target.shape.vocab_size)[: made.draft_size])
    made.initialise(target)
    made.double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += shake * torch.randn_like(parameter)
    return made.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plain Hugging Face folder of a small GPT-2 with the tiny tokenizer."""
    path = str(tmp_path_factory.mktemp("gpt2"))
    tiny_target("gpt2", seed=5).stock.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


# -- decoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_batch_drafts_what_each_prompt_alone_does(name: str, temperature: float) -> None:
    decoder, sampling = (
        SpeculativeDecoder(TARGET, drafter(), builder=BUILDERS[name], budget=6),
        Sampling(temperature),
    )
    together = decoder.decode(PROMPTS, sampling, 16)
    for index, prompt in enumerate(PROMPTS):
        alone = decoder.decode([prompt], Sampling(temperature, seed=index), 16)[0]
        assert (together[index].ids, together[index].accepted) == (alone.ids, alone.accepted)
    if not temperature:
        plain = SpeculativeDecoder(TARGET).decode(PROMPTS, sampling, 16)
        assert [trace.ids for trace in together] == [trace.ids for trace in plain]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "opt", "qwen3"])
@pytest.mark.parametrize("name", ["reranked", "threshold"])
def test_every_kind_of_model_reads_a_tree_as_it_reads_text(
    arch: str, name: str, monkeypatch: Any
) -> None:
    """Each row of each proposal gets the logits that the stock model gives to the same text without
    a cache.
    """
    target = tiny_target(arch)
    made, expand, checked = drafter(target), Independent.expand, []
    text: list[int] = []

    def checking(self: Independent, state: Any, frontier: Frontier) -> torch.Tensor:
        found = expand(self, state, frontier)
        rows = [[]] if frontier.depth == 0 else state.paths
        if frontier.depth == 0:
            state.paths = [[]]
            text[:] = [*state.context.input_ids_BT[0].tolist(), *state.written]
        else:
            state.paths += [
                rows[parent] + [token]
                for token, parent in zip(
                    frontier.tokens_BW[0].tolist(), frontier.parents_BW[0].tolist(), strict=True
                )
            ]
        for column, path in enumerate(state.paths[-frontier.tokens_BW.shape[1] :]):
            expected = self.stock.double()(torch.tensor([text + path])).logits[0, -1]
            torch.testing.assert_close(found[0, column], expected, atol=1e-5, rtol=1e-4)
            checked.append(path)
        return found

    def start(self: Independent, context: Context) -> Any:
        state: Any = original_start(self, context)
        state.written = context.newest_B.tolist()
        return state

    def absorb(self: Independent, state: Any, verified: Any, accepted: Any) -> Any:
        after: Any = original_absorb(self, state, verified, accepted)
        after.written = (
            state.written + accepted.emitted(verified.tree)[0, : accepted.lengths_B[0]].tolist()
        )
        return after

    original_start, original_absorb = Independent.start, Independent.absorb
    for method, replacement in (("expand", checking), ("start", start), ("absorb", absorb)):
        monkeypatch.setattr(Independent, method, replacement)
    decoder = SpeculativeDecoder(
        target, made, builder=BUILDERS[name], budget=12, stop_ids=frozenset({-1})
    )
    decoder.decode([3 * PROMPTS[0]], Sampling(), 10)
    assert max(map(len, checked)) == 2 and len(checked) > checked.count([]) > 0


def test_the_target_itself_as_its_drafter_is_always_right() -> None:
    twin = drafter(shake=0.0, layers=4)
    trace = SpeculativeDecoder(TARGET, twin).decode([PROMPTS[0]], Sampling(), 17)[0]
    assert trace.accepted == [4] * 4
    losses = twin.loss(tiny_batch(TARGET), TARGET, 0.0)
    assert float(losses.total.detach()) == pytest.approx(0, abs=1e-12)
    assert float(losses.metrics["acceptance_0"].total) == pytest.approx(
        int(losses.metrics["acceptance_0"].count)
    )


def test_tokens_that_it_never_drafted_are_read_too() -> None:
    batch = documents(
        [
            torch.randint(5, 128, (n,), generator=torch.Generator().manual_seed(1)).tolist()
            for n in (22, 19)
        ]
    )
    made = drafter(draft_vocabulary=40)
    reader = Reader(made, TARGET, batch, [5, 3])
    for lengths in ([1, 3], [2, 2], [3, 1]):
        reader.accept(lengths)
    found = reader.logits()[:, 0]
    for b, read in enumerate(reader.read.tolist()):
        whole = made.stock.double()(batch.input_ids[b : b + 1, : read + 1]).logits[0, -1]
        torch.testing.assert_close(found[b], whole[made.vocabulary_D], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("draft_vocabulary", [None, 8])
def test_the_sampled_distribution_is_the_targets(draft_vocabulary: int | None) -> None:
    """Chi-square of the second token's frequencies behind a fixed first one, through the whole
    loop.
    """
    target = tiny_target(vocab=12)
    made = drafter(target, shake=0.3, draft_vocabulary=draft_vocabulary)
    decoder = SpeculativeDecoder(target, made, builder=SampledChain(2))
    traces = decoder.decode([[7, 8]] * 3000, Sampling(1.0, seed=7), 2)
    firsts = torch.tensor([trace.ids[0] for trace in traces])
    first = int(firsts[firsts > max(target.eos_ids)].mode().values)
    seconds = torch.tensor([trace.ids[1] for trace in traces if trace.ids[0] == first])
    probs = target.stock(torch.tensor([[7, 8, first]])).logits[0, -1].softmax(-1)
    expected, found = probs * len(seconds), seconds.bincount(minlength=12)
    common = expected > 5
    statistic = ((found - expected) ** 2 / expected)[common].sum()
    assert len(seconds) > 300 and float(statistic) < 35


# -- training --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_row_learns_the_distribution_of_the_token_that_follows_what_it_read() -> None:
    """On the target's greedy text, the distribution that a row is held against is surest of the
    token that it is to draft.
    """
    trace = SpeculativeDecoder(TARGET).decode([[7, 8, 9]], Sampling(), 20)[0]
    batch = documents([[7, 8, 9, *trace.ids]], labels_from=3)
    made = drafter()
    batch.states = TARGET.features(batch, ("final",))
    rows = training_rows(batch, 1)
    distributions = made.distributions(batch, TARGET, rows)
    assert distributions is not None
    surest_M = distributions(rows.flat_MK1[:, 1].contiguous()).argmax(-1)
    assert surest_M.tolist() == made.labels(batch, TARGET, rows)[:, 0].tolist() == trace.ids


@torch.no_grad()
def expected_acceptance(made: Independent, batch: TextBatch) -> list[float]:
    """Σ_v min(p, q) of every token of the assistant, one by one, by the stock models."""
    model, vocabulary, found = made.stock.double(), made.vocabulary_D, []
    for row in range(len(batch.input_ids)):
        for place in batch.loss_mask[row].nonzero()[:, 0].tolist():
            own = batch.document_ids[row] == batch.document_ids[row, place]
            text = batch.input_ids[row, :place][own[:place]]
            if len(text) < 2:
                continue
            p, q = TARGET.stock(text[None]).logits[0, -1].softmax(-1), torch.zeros(128).double()
            q[vocabulary] = model(text[None]).logits[0, -1, vocabulary].softmax(-1)
            found.append(float(torch.minimum(p, q).sum()))
    return found


@torch.no_grad()
def covered_mass(made: Independent, batch: TextBatch) -> float:
    """Mean mass of the target's distributions on the draft vocabulary: the most that can be
    accepted.
    """
    rows = training_rows(batch, 1)
    final = TARGET.features(batch, ("final",))["final"].flatten(0, 1)[rows.flat_MK1[:, 1]]
    assert made.vocabulary_D is not None
    return float(TARGET.logits(final).softmax(-1)[:, made.vocabulary_D].sum(-1).mean())


def test_acceptance_counts_what_the_draft_vocabulary_leaves_out() -> None:
    """Every token of the assistant, the target's whole distribution: how often the ratio rule
    accepts.
    """
    made, batch = drafter(draft_vocabulary=40), tiny_batch(TARGET)
    expected = expected_acceptance(made, batch)
    metric = made.loss(batch, TARGET, 0.0).metrics["acceptance_0"]
    assert int(metric.count) == len(expected)
    assert float(metric.total) == pytest.approx(sum(expected), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_total_variation_is_how_often_the_ratio_rule_rejects(training: bool) -> None:
    made, batch = drafter(draft_vocabulary=40, divergence="total_variation"), tiny_batch(TARGET)
    expected = expected_acceptance(made, batch)
    losses = made.train(training).loss(batch, TARGET, 0.0)
    rejected = 1 - sum(expected) / len(expected)
    assert float(losses.total.detach()) == pytest.approx(rejected, rel=1e-6)
    metric = losses.metrics["total_variation_0"]
    assert float(metric.total) / int(metric.count) == pytest.approx(float(losses.total.detach()))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_brings_it_closer_to_the_target(divergence: str) -> None:
    made, batch = drafter(layers=2, divergence=divergence, draft_vocabulary=40), tiny_batch(TARGET)
    optimizer = torch.optim.Adam(made.declared_parameters(), 3e-3)
    before = made.loss(batch, TARGET, 0.0)
    for _ in range(30):
        optimizer.zero_grad()
        made.train().loss(batch, TARGET, 0.0).total.backward()
        optimizer.step()
    after = made.eval().loss(batch, TARGET, 0.0)
    # Some losses have a least value above 0: entropies, and what lies outside the vocabulary.
    assert bool(after.total < before.total)
    if divergence not in UNNORMALISED | {"cross_entropy"}:
        assert bool(after.total < 0.7 * before.total)
    assert after.metrics["acceptance_0"].total > before.metrics["acceptance_0"].total


def test_a_frozen_embedding_stays_and_takes_a_tied_head_with_it() -> None:
    made = drafter(frozen_embedding=True)
    made.loss(tiny_batch(TARGET), TARGET, 0.0).total.backward()
    assert {name for name, p in made.named_parameters() if p.grad is None} == {
        "model.model.embed_tokens.weight"
    }


def test_its_own_text_continues_the_batchs_prompts_by_its_own_distribution() -> None:
    batch = tiny_batch(TARGET)
    prompts = document_prompts(batch)
    assert [len(prompt) for prompt in prompts] == [4, 3, 4, 3]
    assert prompts[1].tolist() == batch.input_ids[0, 12:15].tolist()
    made = drafter(draft_vocabulary=40)
    vocabulary = made.vocabulary_D
    assert vocabulary is not None
    text = written(made.language_model, prompts, 6, vocabulary)
    for b, prompt in enumerate(prompts):
        assert text.input_ids[b, : len(prompt)].tolist() == prompt.tolist()
        assert text.loss_mask[b].nonzero()[:, 0].tolist() == list(
            range(len(prompt), len(prompt) + 6)
        )
    assert bool(torch.isin(text.input_ids[text.loss_mask], vocabulary).all())
    torch.manual_seed(3)
    drawn = written(made.language_model, [prompts[0]] * 4000, 1, vocabulary).input_ids[:, -1]
    probs = made.stock.double()(prompts[0][None]).logits[0, -1].detach()[vocabulary].softmax(-1)
    shares = torch.searchsorted(vocabulary, drawn).bincount(minlength=40) / 4000
    assert float((shares - probs).abs().max()) < 0.035


def test_it_learns_from_its_own_text_when_asked() -> None:
    made = drafter(own_text=1.0, own_tokens=5).train()
    seen: list[Any] = []
    made.steps = lambda batch, target: (seen.append(batch), Independent.steps(made, batch, target))[
        1
    ]
    made.loss(tiny_batch(TARGET), TARGET, 0.0).total.backward()
    assert made.online and int(seen[0].loss_mask.sum()) == 4 * 5
    assert all(
        parameter.grad is not None and bool(parameter.grad.any())
        for parameter in made.declared_parameters()
    )
    made.eval().loss(tiny_batch(TARGET), TARGET, 0.0)
    assert torch.equal(seen[1].input_ids, tiny_batch(TARGET).input_ids)


# -- which model -----------------------------------------------------------------------------------


def test_a_named_model_drafts_and_is_saved_whole(folder: str, tmp_path: Any) -> None:
    made = drafter(shake=0.01, model=folder)
    save_pretrained(made, tmp_path / "drafter", Provenance.of(TARGET))
    loaded = load_pretrained(tmp_path / "drafter", TARGET)
    assert isinstance(loaded, Independent) and loaded.stock.config.model_type == "gpt2"
    ids = torch.tensor([[7, 8, 9]])
    assert torch.equal(loaded.stock.double()(ids).logits, made.stock.double()(ids).logits)
    plain = SpeculativeDecoder(TARGET).decode(PROMPTS, Sampling(), 12)
    drafted = SpeculativeDecoder(loaded.adapt(TARGET), loaded.double()).decode(
        PROMPTS, Sampling(), 12
    )
    assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]


def test_a_plain_hugging_face_folder_gives_the_same_model_back(tmp_path: Any) -> None:
    made = drafter().float()
    made.stock.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ids = torch.tensor([[7, 8, 9]])
    again = Independent(TARGET.shape, model=str(tmp_path))
    again.initialise(TARGET)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(stock(ids).logits, made.stock(ids).logits)
    assert torch.equal(again.eval().stock(ids).logits, stock(ids).logits)


def test_random_weights_of_a_config_of_ones_own() -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    made = drafter(shake=0.0, model=config)
    assert made.language_model.shape.hidden_size == 16 and made.language_model.shape.num_layers == 1
    assert Independent(**made.arguments).config() == made.config()


def test_what_does_not_fit_is_refused(folder: str, tmp_path: Any) -> None:
    shape = TARGET.shape
    other = tiny_target()
    other.tokenizer = _shifted()
    with pytest.raises(ValueError, match="another tokenizer than the target"):
        Independent(shape, model=folder).initialise(other)
    with pytest.raises(ValueError, match="same tokenizer"):
        drafter().adapt(other)
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"layers": 5}, "between 1 and 4"),
        ({"divergence": "x"}, "divergence 'x' is unknown"),
        ({"own_text": 2.0}, "own_text"),
        ({"width": 0}, "at least 1"),
        ({"model": str(tmp_path)}, "no config.json"),
        ({"model": {}}, "model_type is None"),
    ]
    for arguments, words in mistakes:
        with pytest.raises(ValueError, match=words):
            Independent(shape, **arguments)


def _shifted() -> Any:
    """A tokenizer of as many pieces, two of them exchanged."""
    tokenizer = tiny_tokenizer()
    vocabulary = tokenizer.get_vocab()
    first, second = vocabulary["a"], vocabulary["b"]
    tokenizer.get_vocab = lambda: {**vocabulary, "a": second, "b": first}
    return tokenizer
