"""Encoder-decoder targets: the stock model's own tokens, through trees, batches and caches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from modules.contracts.drafter import DraftState
from modules.contracts.sampling import Sampling
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import TokenTree, Topology
from modules.contracts.verification import Accepted
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.medusa import Medusa
from modules.drafters.retrieval.base import TextDrafter, TextState, chains
from modules.drafters.retrieval.input_guided import InputGuided
from modules.drafters.retrieval.prompt_lookup import PromptLookup
from modules.target.loading import load_target, outline
from modules.target.seq2seq.pairs import Pairs
from modules.target.seq2seq.target import Seq2SeqTarget
from tests.fakes import SEQ2SEQ, ids_by_batch, many_prompts, tiny_batch, tiny_seq2seq
from tests.modules.conformance import (
    check_batches,
    check_gradients,
    check_greedy,
    check_loss,
    check_sampled,
    check_target_unchanged,
)

TARGETS = {arch: tiny_seq2seq(arch) for arch in SEQ2SEQ}
PROMPTS = [[7, 8, 9, 7, 8], [20, 30], [40, 41, 42, 40, 41, 42, 40, 50, 51]]


@pytest.fixture(params=SEQ2SEQ)
def target(request: pytest.FixtureRequest) -> Seq2SeqTarget:
    return TARGETS[request.param]


def stock_logits(target: Seq2SeqTarget, prompt: list[int], answer: list[int]) -> Tensor:
    """The stock model's logits [N+1,V] after the start token and each token of an answer."""
    read = torch.tensor([[target.architecture.start_id, *answer]])
    return target.stock(input_ids=torch.tensor([prompt]), decoder_input_ids=read).logits[0]


def stock_answer(target: Seq2SeqTarget, prompt: list[int], limit: int) -> list[int]:
    config = GenerationConfig(
        max_new_tokens=limit,
        use_cache=False,
        do_sample=False,
        eos_token_id=0,
        pad_token_id=0,
        decoder_start_token_id=target.architecture.start_id,
    )
    return target.stock.generate(torch.tensor([prompt]), generation_config=config)[0, 1:].tolist()


def test_plain_decoding_is_the_stock_models_also_in_ragged_batches(target: Seq2SeqTarget) -> None:
    prompts = PROMPTS + many_prompts(5)
    traces = SpeculativeDecoder(target).decode(prompts, Sampling(), 12)
    for prompt, trace in zip(prompts, traces, strict=True):
        assert trace.ids == stock_answer(target, prompt, 12)


def test_every_path_of_a_tree_has_the_logits_of_the_stock_model(target: Seq2SeqTarget) -> None:
    """Positions and visibility of branches, after answers of different lengths."""
    session = target.open(3, 40)
    ids = torch.tensor([prompt + [0] * (9 - len(prompt)) for prompt in PROMPTS])
    first_BV, _ = session.prefill(ids, torch.tensor([len(prompt) for prompt in PROMPTS]))
    for prompt, logits in zip(PROMPTS, first_BV, strict=True):
        assert torch.allclose(logits, stock_logits(target, prompt, [])[-1])
    # 1. Commit one, two and three tokens of a chain.
    chain = TokenTree.chain(torch.tensor([[60, 61, 62], [70, 71, 72], [80, 81, 82]]))
    session.verify(chain)
    lengths = torch.tensor([1, 2, 3])
    session.commit(Accepted(torch.arange(3).expand(3, -1), lengths, lengths))
    # 2. Every node of a tree with two branches, of which a later one is committed.
    parents = torch.tensor([-1, 0, 0, 1, 2, 4]).expand(3, -1)
    tree = TokenTree(torch.tensor([[90, 91, 92, 93, 94, 95]] * 3), Topology(parents))
    paths = {3: [90, 91, 93], 5: [90, 92, 94, 95]}
    committed = [[60], [70, 71], [80, 81, 82]]
    verified = session.verify(tree, (1, "pre_norm", "final"))
    for row, (prompt, before) in enumerate(zip(PROMPTS, committed, strict=True)):
        for node, path in paths.items():
            expected = stock_logits(target, prompt, [*before, *path])[-1]
            assert torch.allclose(verified.logits_BNV[row, node], expected)
    assert torch.allclose(target.final_norm(verified.states["pre_norm"]), verified.states["final"])
    path = torch.tensor([[0, 2, 4, 5]] * 3)
    session.commit(Accepted(path, torch.tensor([4] * 3), torch.tensor([96] * 3)))
    # 3. Sequences that stay, and copies of them.
    for rows in ([2, 0], [0, 0]):
        part = session.select(torch.tensor(rows))
        after = part.verify(TokenTree.root(torch.tensor([96, 96]))).logits_BNV[:, 0]
        for row, logits in zip(rows, after, strict=True):
            text = [*committed[row], *paths[5], 96]
            assert torch.allclose(logits, stock_logits(target, PROMPTS[row], text)[-1])
    session.keep([1])
    after = session.verify(TokenTree.root(torch.tensor([96]))).logits_BNV[0, 0]
    assert torch.allclose(after, stock_logits(target, PROMPTS[1], [70, 71, *paths[5], 96])[-1])


def test_layers_can_run_in_two_parts(target: Seq2SeqTarget) -> None:
    session = target.open(1, 20)
    session.prefill(torch.tensor([PROMPTS[0]]), torch.tensor([5]))
    tree = TokenTree.chain(torch.tensor([[60, 61, 62]]))
    whole = session.verify(tree).logits_BNV
    rows = tree.rows(session.lengths_B)
    early = session.run_layers(rows, target.embed(tree.tokens_BN), 0, 1)["pre_norm"]
    halves = tree.with_run_rows(tree.tokens_BN, tree.parents_BN, early, 1)
    assert torch.allclose(session.verify(halves).logits_BNV, whole)


def test_the_source_is_read_once(target: Seq2SeqTarget) -> None:
    """The encoder runs once, and so do the keys and values of its output."""
    layer: Any = target.architecture.layers[0]
    cross = getattr(layer, "encoder_attn", None) or layer.layer[1].EncDecAttention
    keys: nn.Module = cross.k_proj if hasattr(cross, "k_proj") else cross.k
    calls: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: calls.append(module))
        for module in (target.architecture.encoder, keys)
    ]
    try:
        decoder = SpeculativeDecoder(target, InputGuided(target.shape))
        assert len(decoder.decode(PROMPTS, Sampling(), 20)[0].accepted) > 2
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == [target.architecture.encoder, keys]


def test_training_states_are_those_of_decoding(target: Seq2SeqTarget) -> None:
    batch = tiny_batch(target)
    names = (0, 1, "pre_norm", "final")
    states = target.features(batch, names)
    pairs = Pairs.of(batch)
    assert pairs is not None and len(pairs.places_P) == 4
    seen = torch.zeros_like(batch.loss_mask)
    for row in range(2):
        for document in (0, 1):
            inside = (batch.document_ids[row] == document).nonzero()[:, 0]
            answer = inside[batch.loss_mask[row, inside]]
            prompt = batch.input_ids[row, inside[0] : answer[0]]
            # What decoding gives for the prompt, then for the answer as a chain.
            session = target.open(1, 40)
            _, first = session.prefill(prompt[None], torch.tensor([len(prompt)]), names)
            tree = TokenTree.chain(batch.input_ids[row, answer][None])
            chain = session.verify(tree, names).states
            for name in names:
                assert torch.allclose(states[name][row, answer], chain[name][0])
                assert torch.allclose(states[name][row, answer[0] - 1], first[name][0, -1])
                assert not first[name][0, :-1].any()
            seen[row, answer], seen[row, answer[0] - 1] = True, True
    assert not states["final"][~seen].any()
    blank = target.features(replace(batch, loss_mask=torch.zeros_like(seen)), ("final",))
    assert blank["final"].shape == states["final"].shape and not blank["final"].any()


def test_all_turns_of_a_document_are_pairs() -> None:
    batch = tiny_batch(TARGETS["t5"], rows=1)
    batch.document_ids[:] = 0
    batch.position_ids[:] = torch.arange(24)
    batch.loss_mask[:] = False
    batch.loss_mask[0, [0, 4, 5, 9, 10, 11]] = True
    ids = batch.input_ids[0].tolist()
    pairs = Pairs.of(batch)
    assert pairs is not None
    cut = [
        (source[:count].tolist(), answer[:length].tolist())
        for source, count, answer, length in zip(
            pairs.sources_PS,
            pairs.source_lengths_P.tolist(),
            pairs.answers_PN,
            pairs.answer_lengths_P.tolist(),
            strict=True,
        )
    ]
    assert cut == [(ids[:4], ids[4:6]), (ids[:9], ids[9:12])]
    # Documents that touch are two answers.
    batch.document_ids[0, 5:] = 1
    batch.position_ids[0, 5:] = torch.arange(1, 20)
    pairs = Pairs.of(batch)
    assert pairs is not None and pairs.places_P.tolist() == [4, 5, 9]


class Copies(TextDrafter):
    """Drafts the answers that plain decoding has given, a quarter of their tokens at random."""

    def __init__(self, shape: TargetShape, answers: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__(shape)
        self.answers, self.coin = answers, torch.Generator().manual_seed(0)

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """Three more tokens of the answer."""
        assert isinstance(state, TextState)
        prompts = state.context.lengths_B.tolist()
        drafts = []
        for text, prompt in zip(state.texts(), prompts, strict=True):
            answer, emitted = self.answers[tuple(text[:prompt])], len(text) - prompt
            draft = torch.tensor((answer + [0] * 3)[emitted : emitted + 3])
            wrong = torch.rand(3, generator=self.coin) < 0.25
            other = torch.randint(self.shape.vocab_size, (3,), generator=self.coin)
            drafts.append(torch.where(wrong, other, draft))
        return chains(state.newest_B, drafts)


@pytest.fixture(scope="module")
def thousand() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and what plain decoding of the tiny T5 answers."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (1000,), generator=generator).tolist()
    prompts = [torch.randint(5, 128, (n,), generator=generator).tolist() for n in lengths]
    answers = ids_by_batch(SpeculativeDecoder(TARGETS["t5"]), prompts, 250, 6)
    assert len(set(map(tuple, answers))) > 500
    return prompts, answers


@pytest.mark.parametrize("kind", ["input", "lookup", "copies"])
def test_a_thousand_answers_are_plain_decodings(
    kind: str, thousand: tuple[list[list[int]], list[list[int]]]
) -> None:
    (prompts, answers), target = thousand, TARGETS["t5"]
    known = dict(zip(map(tuple, prompts), answers, strict=True))
    drafter = {
        "input": lambda: InputGuided(target.shape),
        "lookup": lambda: PromptLookup(target.shape),
        "copies": lambda: Copies(target.shape, known),
    }[kind]()
    assert ids_by_batch(SpeculativeDecoder(target, drafter), prompts, 250, 6) == answers


@pytest.mark.parametrize("arch", SEQ2SEQ)
def test_drafters_keep_greedy_and_sampled_text(arch: str) -> None:
    target, small = TARGETS[arch], tiny_seq2seq(arch, vocab=6, seed=2)
    for build in (InputGuided, Medusa):
        check_greedy(build(target.shape).double(), target)
        check_batches(build(target.shape).double(), target)
    check_sampled(Medusa(small.shape).double(), small)


def test_heads_learn_on_its_states(target: Seq2SeqTarget) -> None:
    for check in (check_loss, check_gradients, check_target_unchanged):
        check(Medusa(target.shape).double(), target)


def test_a_folder_loads_as_an_encoder_decoder_target(tmp_path: Path) -> None:
    made = TARGETS["t5"]
    made.stock.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    loaded = load_target(str(tmp_path), "float64", "cpu")
    assert isinstance(loaded, Seq2SeqTarget) and loaded.fingerprint() == made.fingerprint()
    answers = [SpeculativeDecoder(each).decode(PROMPTS, Sampling(), 8) for each in (made, loaded)]
    assert [trace.ids for trace in answers[0]] == [trace.ids for trace in answers[1]]
    shape = outline(str(tmp_path), "float32").shape
    assert shape == loaded.shape and shape.num_layers == 2 and shape.head_dim == 6


def test_what_it_cannot_do_is_refused_by_name() -> None:
    made = tiny_seq2seq("bart", vocab=8)
    with pytest.raises(ValueError, match="compile: tiny-bart is an encoder-decoder model"):
        made.compile_calls()
    made.stock.final_logits_bias.fill_(1)
    with pytest.raises(ValueError, match="final_logits_bias"):
        Seq2SeqTarget(made.stock, made.tokenizer, "biased")
    made.stock.final_logits_bias.fill_(0)
    made.stock.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="'blank' has no decoder_start_token_id"):
        Seq2SeqTarget(made.stock, made.tokenizer, "blank")
