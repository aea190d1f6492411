"""`python -m eval.analysis.cipher_probe`: states whose answer is clear, and the command."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.analysis.cipher_probe import (
    NAMES,
    CipherProbe,
    command,
    key_by_frequency,
    key_by_sum,
    load,
    measure,
    rows_of,
    shares,
)
from modules.tokenization.lexinvariant import Lexinvariant
from modules.tokenization.saved import save_language_model
from modules.tokenization.subword import Subword
from modules.tokenization.units import CharacterUnits

UNITS = CharacterUnits("abcdefghijklmno ")
SIZES: dict[str, Any] = {"width": 32, "layers": 2, "heads": 2, "length": 65}
QUICK: dict[str, Any] = {"width": 32, "steps": 60, "batch": 16, "lr": 1e-2}


class Known(Lexinvariant):
    """States that show the character from a position on; or a symbol of the row in its place."""

    start, ciphered = 0, False

    def states(self, before_BT: Tensor, tables_BVH: Tensor, layer: int | None = None) -> Tensor:
        if self.ciphered:
            before_BT = tables_BVH[..., 0].argsort(1).gather(1, before_BT)
        states_BTH = torch.nn.functional.one_hot(before_BT, self.width).float()
        states_BTH[:, : self.start] = 0
        return states_BTH


def rows(count: int, seed: int) -> Tensor:
    """Rows [count,65] of characters, some more frequent than others."""
    weights = torch.linspace(1, 4, UNITS.size)
    draws = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights.expand(count, -1), SIZES["length"], True, generator=draws)


def measured(model: Lexinvariant, **settings: Any) -> list[list[float]]:
    figures = measure(model, rows(120, 0), rows(60, 1), CipherProbe("", "", **QUICK, **settings))
    assert list(figures) == list(NAMES)
    return list(figures.values())


def test_characters_that_the_states_show_are_read_at_their_positions() -> None:
    model = Known(UNITS, **SIZES)
    # Behind the end's token stand 64 characters, 16 in each quarter.
    model.start = 33
    by_token, by_sum, _, always = measured(model)
    assert by_token[2:4] == [1, 1]
    assert by_token[:2] == pytest.approx(always[:2], abs=0.03)
    # Symbols of the second half are deciphered in the first half too.
    halves = [row[:64].view(2, 32) for row in rows(60, 1)]
    seen = [float(torch.isin(first[:16], second).double().mean()) for first, second in halves]
    assert by_sum[2:4] == [1, 1] and by_sum[0] == pytest.approx(fmean(seen), abs=0.02)
    assert always[0] + 0.3 < by_sum[0] < 1


def test_symbols_of_the_row_alone_tell_nothing() -> None:
    """A probe that beats this has seen the rows' own keys."""
    model = Known(UNITS, **SIZES)
    model.ciphered = True
    by_token, by_sum, _, always = measured(model)
    assert by_token[4] == pytest.approx(always[4], abs=0.03) and by_sum[4] < always[4] + 0.03


def test_drawn_vectors_tell_nothing() -> None:
    """They would if rows shared them."""
    torch.manual_seed(0)
    by_token, _, _, always = measured(Lexinvariant(UNITS, **SIZES), state_layer=0)
    assert by_token[4] == pytest.approx(always[4], abs=0.03)


def test_keys() -> None:
    ranking = [1, 0, 2]
    # Of symbols that occur equally often the one that is read first.
    assert key_by_frequency(torch.tensor([2, 0, 2, 1]), ranking).tolist() == [1, 0, 1, 2]
    assert key_by_frequency(torch.tensor([2, 1, 2, 0]), ranking).tolist() == [1, 0, 1, 2]
    log_probs = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.01, 0.99]]).log()
    assert key_by_sum(log_probs, torch.tensor([1, 0, 1])).tolist() == [1, 0, 1]


def test_shares_of_quarters_text_and_symbols() -> None:
    tokens = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 2], [3] * 8])
    guesses = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0], [3, 1] * 4])
    expected = [3 / 4, 2 / 4, 1 / 4, 2 / 4, 8 / 16, ((1 / 2 + 1 + 0) / 3 + 1 / 2) / 2]
    assert shares(guesses, tokens) == pytest.approx(expected)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models with random weights, and a text."""
    folder, draw = tmp_path_factory.mktemp("probe"), random.Random(0)
    torch.manual_seed(7)
    save_language_model(Lexinvariant(UNITS, **SIZES), folder / "run" / "model", {})
    save_language_model(Lexinvariant(UNITS, **SIZES, random_share=0.2), folder / "partly", {})
    save_language_model(Subword(UNITS, **SIZES), folder / "other", {})
    words = ("".join(draw.choices(UNITS.alphabet[:-1], k=draw.randint(1, 6))) for _ in range(900))
    (folder / "text.txt").write_text(" ".join(words))
    return folder


def test_the_command_prints_the_same_table_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--texts", str(place / "text.txt"), "--rows", "5", "--steps", "20"]
    printed = []
    for folder in ("run", "run/model"):
        assert command([*arguments, "--model", str(place / folder)]) == 0
        printed.append(capsys.readouterr().out.splitlines()[1:])
    lines = [line.strip("| ").split(" | ") for line in printed[0][2:]]
    assert printed[0] == printed[1] and [line[0] for line in lines] == list(NAMES)
    assert all(len(line) == 7 and all(0 <= float(x) <= 1 for x in line[1:]) for line in lines)


def test_an_untrained_model_has_other_weights(place: Path) -> None:
    trained, untrained = (
        load(CipherProbe(str(place / "run"), "", untrained=untrained))
        for untrained in (False, True)
    )
    assert trained.settings == untrained.settings and not untrained.training
    weights = zip(trained.parameters(), untrained.parameters())
    assert all(torch.equal(a, b) == (a.dim() == 1) for a, b in weights)


def test_rows_are_of_both_parts_of_the_text(place: Path) -> None:
    (place / "two.txt").write_text("ab " * 900 + "cd " * 100)
    settings = CipherProbe(str(place / "run"), str(place / "two.txt"), rows=3)
    fitted, judged = rows_of(load(settings), settings)
    assert fitted.shape == (2700 // 65, 65) and judged.shape == (3, 65)
    assert set(UNITS.decode(fitted.flatten().tolist())) == set("ab ")
    assert set(UNITS.decode(judged.flatten().tolist())) == set("cd ")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "other"}, "other' is no lexinvariant model .*: train one with"),
        ({"model": "partly"}, "partly' is no lexinvariant model of random_share 1"),
        ({"model": "nowhere"}, "model .*nowhere' cannot be loaded"),
        ({"state_layer": 3}, "state_layer must be from 0 to 2 for this model, got 3"),
        ({"held_out": 0.001}, "texts .*: give a longer file or another held_out"),
        ({"texts": "none.txt"}, "texts: .*none.txt cannot be read"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"held_out": 1.0}, "held_out must be between 0 and 1"),
        ({"lr": -1.0}, "lr must be above 0, got -1.0"),
    ],
)
def test_mistakes_name_the_key(place: Path, settings: dict[str, Any], words: str) -> None:
    texts = str(place / settings.pop("texts", "text.txt"))
    with pytest.raises(ValueError, match=words):
        asked = CipherProbe(str(place / settings.pop("model", "run")), texts, **settings)
        rows_of(load(asked), asked)
