"""A large vocabulary: its units, their rows, and the search for the nearest ones."""

from __future__ import annotations

import sys

import pytest
import torch

from modules.target.loading import load_target
from modules.tokenization.transfer.frozen_base import Base
from modules.tokenization.transfer.hypernetwork import Hypernetwork, pieces_of
from modules.tokenization.transfer.large_vocabulary import LargeVocabulary
from modules.tokenization.transfer.nearest_rows import NearestRows
from tests.modules.tokenization.folders import BASE, model_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = model_folder(tmp_path_factory.mktemp("base"), 0)
    return Base(load_target(str(folder), "float32", "cpu"))


def letters(text: str) -> tuple[int, ...]:
    names = BASE.get_vocab()
    return tuple(names[letter] for letter in text.replace(" ", "Ġ"))


def test_units_are_base_tokens_and_new_strings(base: Base) -> None:
    whole = next(i for i, data in base.spelled.items() if data == b"at")
    units = [letters("at"), letters("xyz"), (*letters("xy"), *letters("z")), letters(" q")]
    vocabulary = LargeVocabulary(base, None, [*units, (whole, *letters("z")), letters("atz")])
    size = len(base.embedding)
    assert vocabulary.units[size:] == [letters("xyz"), letters(" q"), (whole, *letters("z"))]
    assert vocabulary.segmented(letters("xyzxy q")) == [
        letters("xyz"), letters("x"), letters("y"), letters(" q"),
    ]  # fmt: skip
    assert vocabulary.begins_word(letters(" q")) and not vocabulary.begins_word(letters("xyz"))
    assert vocabulary.begins_word((BASE.eos_token_id,))
    rows = vocabulary.rows()
    assert torch.equal(rows[:size], base.embedding)
    assert torch.allclose(rows[size], base.embedding[[*letters("xyz")]].mean(0))
    assert torch.equal(vocabulary.embeddings(vocabulary.units[size:])[0], rows[size])


def test_rows_of_a_hypernetwork_with_biases(base: Base) -> None:
    network = Hypernetwork(base.embedding.float(), None, 16, 1, 2, length=4, bias=True).eval()
    vocabulary = LargeVocabulary(base, network, [letters("xyz")])
    rows, state = vocabulary.rows(), torch.randn(32)
    pieces = pieces_of([b"xyz"], BASE, 4)
    _, predicted, bias = network(base.source_TS, pieces)
    products = rows @ vocabulary.query(state)
    assert torch.allclose(products[:-1], base.embedding @ state, atol=1e-5)
    assert torch.allclose(products[-1], predicted[0] @ state + bias[0], atol=1e-5)
    first, last = vocabulary.embeddings([(5,), letters("xyz")])
    assert torch.equal(first, base.embedding[5]) and torch.allclose(last, predicted[0])
    assert len(LargeVocabulary(base, network, []).rows()) == len(base.embedding)


def test_nearest_rows_by_an_index() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, query = torch.randn(200, 8, generator=generator), torch.randn(8, generator=generator)
    exact = NearestRows(rows)
    products, numbers = exact.search(query, 5)
    assert torch.equal(numbers, (rows @ query).argsort(descending=True)[:5])
    for index, settings in (("IVF4,Flat", "nprobe=4"), ("Flat", "")):
        found, same = NearestRows(rows, index, settings).search(query, 5)
        assert torch.equal(same, numbers) and torch.allclose(found, products, atol=1e-5)
    # A single list does not hold as many.
    few, _ = NearestRows(rows, "IVF64,Flat", "nprobe=1").search(query, 200)
    assert 0 < len(few) < 200 and few.isfinite().all()
    assert len(exact.search(query, 500)[0]) == 200


def test_mistakes_with_indices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(40, 8)
    with pytest.raises(ValueError, match="index 'Nothing' with search ''"):
        NearestRows(rows, "Nothing")
    with pytest.raises(ValueError, match="index 'IVF4,Flat' with search 'depth=3'"):
        NearestRows(rows, "IVF4,Flat", "depth=3")
    with pytest.raises(ValueError, match="exact search has no settings"):
        NearestRows(rows, settings="nprobe=4")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="needs faiss: install the extra `index`"):
        NearestRows(rows, "Flat")
