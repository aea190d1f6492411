"""The proof, when a target is loaded, that our passes over its layers compute what its library's
model computes.

A few short calls on random tokens: states against `output_hidden_states`, a tree against the chains
that it holds, the KV cache after a commit against a prompt read anew. Windows of attention are
shortened meanwhile, so that a dozen tokens reach beyond them.

Shape legend: B sequences, T tokens, R chains, N nodes, V vocabulary, X any width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.shapes import StateName
from modules.contracts.target import Session, Target
from modules.contracts.token_tree import TokenTree, Topology
from modules.contracts.verification import Accepted

LENGTHS = (6, 9)
"""Tokens of the two prompts."""
PARENTS = (-1, 0, 0, 1, 2)
"""The tree behind each prompt: two chains of three nodes, which share the first."""
CHAINS = ((0, 1, 3), (0, 2, 4))
WINDOW = 4
"""Positions that layers with a window see during the proof."""
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Relative distance of each row from the library's; sums in another order differ less."""
COARSE = 0.2
"""The same at 16 bits and less, of the median row: there an expert near a tie may change a row."""
_WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True)
class Reference:
    """What the library's model gives for the two chains behind each of the prompts.

    ids_RT: prompt and chain, padded on the right; chain c of prompt b is row 2 b + c. states: of
    each layer's input and the final one, [R,T,H]. logits_RTV: its logits.
    """

    ids_RT: Tensor
    states: tuple[Tensor, ...]
    logits_RTV: Tensor

    def nodes(self, values_RTX: Tensor) -> Tensor:
        """The values [B,N,X] at the nodes of the trees."""
        chosen = []
        for b, length in enumerate(LENGTHS):
            for node in range(len(PARENTS)):
                chain = next(c for c, nodes in enumerate(CHAINS) if node in nodes)
                place = length + CHAINS[chain].index(node)
                chosen.append(values_RTX[2 * b + chain, place])
        return torch.stack(chosen).unflatten(0, (len(LENGTHS), -1))


@torch.no_grad()
def prove(target: Target) -> None:
    """Compare a target's passes with its library's.

    Raises:
        ValueError: they differ, or cannot be run; the message names the first part that does.
    """
    with _short_windows(target):
        reference = _named(target, "its library's model", lambda: _reference(target))
        _named(target, "a pass without a KV cache", lambda: _prove_states(target, reference))
        _named(target, "decoding with a KV cache", lambda: _prove_decoding(target, reference))


def _named(target: Target, part: str, run: Any) -> Any:
    """The result of `run`, whose errors are refusals that name the part."""
    try:
        return run()
    except _Differs as difference:
        raise ValueError(f"{_refusal(target)}: {difference}") from None
    except Exception as error:
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(
            f"{_refusal(target)}: {part} stops with {type(error).__name__} {line}".rstrip()
        ) from error


def _refusal(target: Target) -> str:
    kind = target.architecture.config.model_type
    return (
        f"target {target.name!r} (architecture {kind!r}) is not supported: it fails the proof that "
        "drafts would be verified as its library computes them"
    )


class _Differs(Exception):
    """A part computes something else than the library's model."""


def _compare(target: Target, part: str, ours: Tensor, expected: Tensor) -> None:
    """Compare rows [...,X]. Raises `_Differs` with the part's name."""
    # Recurrent layers compute in float32 at any higher precision.
    recurrent = target.architecture.recurrence.modules and target.dtype == torch.float64
    dtype = torch.float32 if recurrent else target.dtype
    expected = expected.to(ours.device)
    ours_RX, expected_RX = ours.double().flatten(0, -2), expected.double().flatten(0, -2)
    scale_R = expected_RX.norm(dim=-1).clamp(min=1e-12)
    distance_R = (ours_RX - expected_RX).norm(dim=-1) / scale_R
    exact = TOLERANCES.get(dtype)
    worst = float(distance_R.max() if exact else distance_R.median())
    limit = exact or COARSE
    if not worst <= limit:
        raise _Differs(f"{part} differs by {worst:.2g} of its length, more than {limit:g}")


def _reference(target: Target) -> Reference:
    # 1. Random tokens; ids of images and other media are at the end of a vocabulary.
    generator = torch.Generator().manual_seed(0)
    most = min(target.shape.vocab_size, 1000)
    ids_BT = torch.randint(most // 10, most, (2, max(LENGTHS) + len(PARENTS)), generator=generator)
    rows = []
    for b, length in enumerate(LENGTHS):
        for chain in CHAINS:
            ids = [*ids_BT[b, :length], *(ids_BT[b, max(LENGTHS) + node] for node in chain)]
            rows.append(torch.stack(ids))
    ids_RT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(target.device)
    # 2. The library's model on all chains.
    output = target.stock(input_ids=ids_RT, output_hidden_states=True, use_cache=False)
    return Reference(ids_RT, output.hidden_states, output.logits)


def _prove_states(target: Target, reference: Reference) -> None:
    """Two chains in one row of a packed batch."""
    # 1. The first chain of each prompt, one after the other.
    ends = [length + len(CHAINS[0]) for length in LENGTHS]
    chosen = [(2 * b, slice(0, end)) for b, end in enumerate(ends)]
    ids_1T = torch.cat([reference.ids_RT[row, span] for row, span in chosen])[None]
    order = [torch.arange(end, device=ids_1T.device) for end in ends]
    documents = torch.cat([torch.full_like(places, b) for b, places in enumerate(order)])
    mask = torch.ones_like(ids_1T, dtype=torch.bool)
    batch = TextBatch(ids_1T, mask, torch.cat(order)[None], documents[None])
    # 2. Every state, and what follows from the last ones.
    names: list[StateName] = [*range(target.shape.num_layers), "pre_norm", "final"]
    states = target.features(batch, names)

    def expected(values_RTX: Tensor) -> Tensor:
        return torch.cat([values_RTX[row, span] for row, span in chosen])[None]

    parts = ["the embedding"] + [f"layer {k}" for k in range(target.shape.num_layers - 1)]
    for part, name, values in zip(parts, names, reference.states, strict=False):
        _compare(target, part, states[name], expected(values))
    last = f"layer {target.shape.num_layers - 1} or the final norm"
    _compare(target, last, states["final"], expected(reference.states[-1]))
    final = target.final_norm(states["pre_norm"])
    _compare(target, "the final norm", final, states["final"])
    logits = target.logits(states["final"])
    _compare(target, "the LM head", logits, expected(reference.logits_RTV))


def _prove_decoding(target: Target, reference: Reference) -> None:
    """Prompts of different lengths, a tree behind each, and what follows an accepted path."""
    # 1. The prompts.
    lengths_B = torch.tensor(LENGTHS, device=target.device)
    prompts_BT = reference.ids_RT[::2, : max(LENGTHS)]
    session = target.open(len(LENGTHS), max(LENGTHS) + 2 * len(PARENTS))
    logits_BV, _ = session.prefill(prompts_BT, lengths_B)
    ends = [reference.logits_RTV[2 * b, length - 1] for b, length in enumerate(LENGTHS)]
    _compare(target, "prefill", logits_BV, torch.stack(ends))
    # 2. A tree.
    tokens_BN = reference.nodes(reference.ids_RT[..., None])[..., 0]
    topology = Topology(torch.tensor(PARENTS, device=target.device).expand(len(LENGTHS), -1))
    verified = session.verify(TokenTree(tokens_BN, topology))
    expected_BNV = reference.nodes(reference.logits_RTV)
    _compare(target, "tree attention", verified.logits_BNV, expected_BNV)
    # 3. The second chain is accepted but for its last node, which is the next call.
    _prove_commit(target, session, reference, tokens_BN)


def _prove_commit(
    target: Target, session: Session, reference: Reference, tokens_BN: Tensor
) -> None:
    *accepted, last = CHAINS[1]
    path_BA = torch.tensor(accepted, device=target.device).expand(len(LENGTHS), -1)
    counts_B = torch.full((len(LENGTHS),), len(accepted), device=target.device)
    session.commit(Accepted(path_BA, counts_B, tokens_BN[:, last]))
    again = session.verify(TokenTree.root(tokens_BN[:, last])).logits_BNV[:, 0]
    expected_BV = reference.nodes(reference.logits_RTV)[:, last]
    _compare(target, "the KV cache after a commit", again, expected_BV)


@contextmanager
def _short_windows(target: Target) -> Iterator[None]:
    """Shorten the windows of attention, of the target and its library's model, for a while."""
    configs = [target.architecture.config, target.stock.config.get_text_config()]
    before = [
        (config, name, getattr(config, name))
        for config in configs
        for name in _WINDOWS
        if getattr(config, name, None)
    ]
    for config, name, size in before:
        setattr(config, name, min(WINDOW, size))
    try:
        yield
    finally:
        for config, name, size in before:
            setattr(config, name, size)
