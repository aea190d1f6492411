"""`python -m eval.analysis.cipher_probe`: whether the states of a lexinvariant model tell which
character (unit) a drawn vector stands for. Every row draws its vectors anew, so the model reads an
unknown substitution cipher (Huang et al. 2023, arXiv 2305.16349).

Shape legend: B rows, T tokens of a row, N of all rows, S distinct symbols, H width, V characters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from configs.command_line.loading import exit_with, flags
from modules.runtime.files import read_text
from modules.target.loading import own_device
from modules.tokenization.lexinvariant import Lexinvariant
from modules.tokenization.saved import load_language_model
from modules.tokenization.words import spaced_words

NAMES = "probe, at each token", "probe, summed", "frequency matching", "most frequent character"


@dataclass(frozen=True)
class CipherProbe:
    """What is probed, and how.

    Args:
        model: folder of `python -m train.language_model` with a lexinvariant model.
        texts: a text file, best the one that the model was trained on.
        held_out: share of the text, its end, that the probe is judged on; as in the training.
        rows: that the probe is judged on, at most; it is fitted to all of the first part.
        state_layer: of the states: 0 the drawn vectors, which tell nothing; by default the last.
        layers: of the probe, an MLP.
        width: of its hidden layers.
        steps: of AdamW, each on `batch` rows with new vectors: no row's key can be learnt by heart.
        batch: rows of a step.
        lr: of AdamW; it falls to 0.
        untrained: give the model its weights before training, drawn anew, for comparison.
        seed: of rows, vectors and weights.
    """

    model: str
    texts: str
    held_out: float = 0.1
    rows: int = 100
    state_layer: int | None = None
    layers: int = 2
    width: int = 512
    steps: int = 250
    batch: int = 4
    lr: float = 2e-3
    untrained: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot run, before a model is loaded."""
        for name in ("rows", "layers", "width", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")


def shares(guesses_BT: Tensor, tokens_BT: Tensor) -> list[float]:
    """Guessed right: of the tokens in each quarter of the rows, of all tokens, and of a row's
    distinct symbols, where a symbol with several guesses counts by the share of them.
    """
    right_BT, symbols = (guesses_BT == tokens_BT).double(), []
    for right_T, tokens_T in zip(right_BT, tokens_BT, strict=True):
        _, symbol_T, count_S = tokens_T.unique(return_inverse=True, return_counts=True)
        right_S = right_T.new_zeros(len(count_S)).index_add(0, symbol_T, right_T)
        symbols.append(float((right_S / count_S).mean()))
    quarters = [float(part.mean()) for part in right_BT.tensor_split(4, 1)]
    return [*quarters, float(right_BT.mean()), fmean(symbols)]


@torch.no_grad()
def read(
    model: Lexinvariant, rows_BT: Tensor, layer: int | None, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """States [B,T-1,H], with new vectors, at every token [B,T-1] but the last, which no training
    reads either.
    """
    before_BT = nn.functional.pad(rows_BT[:, :-1], (1, 0), value=model.end)
    states_BTH = model.states(before_BT, model.tables(len(rows_BT), draws), layer)
    return states_BTH[:, 1:].float(), rows_BT[:, :-1]


def fit(
    model: Lexinvariant, rows_BT: Tensor, settings: CipherProbe, draws: torch.Generator
) -> nn.Module:
    """A trained probe; the norm before it makes the scale of a layer's states irrelevant."""
    torch.manual_seed(settings.seed)
    sizes = pairwise([model.width, *[settings.width] * (settings.layers - 1), model.units.size])
    parts = [part for size in sizes for part in (nn.Linear(*size), nn.GELU())]
    probe = nn.Sequential(nn.LayerNorm(model.width), *parts[:-1]).to(rows_BT.device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, settings.steps)
    for _ in range(settings.steps):
        chosen_B = torch.randint(len(rows_BT), (settings.batch,)).to(rows_BT.device)
        states_BTH, tokens_BT = read(model, rows_BT[chosen_B], settings.state_layer, draws)
        loss = nn.functional.cross_entropy(probe(states_BTH).flatten(0, 1), tokens_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe


def key_by_sum(log_probs_TV: Tensor, tokens_T: Tensor) -> Tensor:
    """Guesses [T]: for each symbol the likeliest character by all of its tokens together."""
    distinct_S, symbol_T = tokens_T.unique(return_inverse=True)
    sums_SV = log_probs_TV.new_zeros(len(distinct_S), log_probs_TV.shape[1])
    return sums_SV.index_add(0, symbol_T, log_probs_TV).argmax(-1)[symbol_T]


def key_by_frequency(tokens_T: Tensor, ranking: Sequence[int]) -> Tensor:
    """Guesses [T]: for the row's most frequent symbol the ranking's first character, and so on; of
    equally frequent symbols the earlier one comes first, as a cipher tells no more.
    """
    ranked = [symbol for symbol, _ in Counter(tokens_T.tolist()).most_common()]
    key = dict(zip(ranked, ranking, strict=False))
    return torch.tensor([key[symbol] for symbol in tokens_T.tolist()]).to(tokens_T)


def measure(
    model: Lexinvariant, fitted_BT: Tensor, judged_BT: Tensor, settings: CipherProbe
) -> dict[str, list[float]]:
    """The `shares` of the probe, fitted to full rows and judged on others, and without a model."""
    # 1. The probe, and characters in order of frequency.
    draws = torch.Generator(fitted_BT.device).manual_seed(settings.seed)
    probe = fit(model, fitted_BT, settings, draws)
    counts_V = fitted_BT[:, :-1].flatten().bincount(minlength=model.units.size)
    ranking = counts_V.argsort(descending=True, stable=True).tolist()
    # 2. Guesses, row by row.
    guesses = []
    for row_1T in judged_BT.split(1):
        states_1TH, tokens_1T = read(model, row_1T, settings.state_layer, draws)
        log_probs_TV, tokens_T = probe(states_1TH)[0].log_softmax(-1).detach(), tokens_1T[0]
        keys = key_by_sum(log_probs_TV, tokens_T), key_by_frequency(tokens_T, ranking)
        always_T = torch.full_like(tokens_T, ranking[0])
        guesses.append((log_probs_TV.argmax(-1), *keys, always_T))
    columns = map(torch.stack, zip(*guesses))
    return {name: shares(column, judged_BT[:, :-1]) for name, column in zip(NAMES, columns)}


def load(settings: CipherProbe) -> Lexinvariant:
    """The model; ValueError where not all of its vectors are drawn, or without the layer."""
    try:
        model = load_language_model(settings.model)
    except ValueError as error:
        raise ValueError(f"model {settings.model!r} cannot be loaded: {error}") from error
    if not isinstance(model, Lexinvariant) or model.random_share < 1 or model.length < 5:
        raise ValueError(
            f"model {settings.model!r} is no lexinvariant model of random_share 1 and length 5 or "
            "more: train one with `--config tokenization/lexinvariant_small.yaml`"
        )
    layer, last = settings.state_layer, model.settings["layers"]
    if layer is not None and not 0 <= layer <= last:
        raise ValueError(f"state_layer must be from 0 to {last} for this model, got {layer}")
    if settings.untrained:
        torch.manual_seed(settings.seed)
        model = Lexinvariant(model.units, **model.settings).eval()
    return model.to(own_device())


def rows_of(model: Lexinvariant, settings: CipherProbe) -> tuple[Tensor, Tensor]:
    """Full rows [B,T] to fit the probe to and others to judge it on; ValueError without a row."""
    words = spaced_words(read_text(Path(settings.texts), "texts"))
    # Cut as `train.language_model` cuts a single document.
    cut, parts = len(words) - int(len(words) * settings.held_out), []
    for text in (words[:cut], words[cut:]):
        full = [row for row in model.rows("".join(text)) if len(row) == model.length]
        if not full:
            raise ValueError(
                f"texts {settings.texts!r}: {len(text)} words, by held_out, are no row of "
                f"{model.length} tokens: give a longer file or another held_out"
            )
        parts.append(torch.stack(full).to(model.unit_bytes.device))
    order = torch.randperm(len(parts[1]), generator=torch.Generator().manual_seed(settings.seed))
    return parts[0], parts[1][order[: settings.rows]]


def command(arguments: Sequence[str]) -> int:
    """Parse the command line, measure, and print a table."""
    name, title = "eval.analysis.cipher_probe", "Whether a lexinvariant model deciphers its rows."
    settings = CipherProbe(**flags(CipherProbe, arguments, name, title))
    fitted_BT, judged_BT = rows_of(model := load(settings), settings)
    print(f"probe of {len(fitted_BT)} rows, judged on {len(judged_BT)}, {settings.model}")
    print("| guesses | 1st quarter | 2nd | 3rd | 4th | text | symbols |\n|---|" + "---:|" * 6)
    for name, figures in measure(model, fitted_BT, judged_BT, settings).items():
        print(f"| {name} | " + " | ".join(f"{share:.3f}" for share in figures) + " |")
    return 0


if __name__ == "__main__":
    exit_with(command)
