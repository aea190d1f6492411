"""`python -m eval.analysis.selection_recall`: how many of the slots with the largest attention
weights a policy of `modules.sparse_kv` finds, by layer.

A prompt is read once, in full; then the target writes its answer with full attention, and every
policy chooses by the true queries of each layer. `recall` is the share of the true top-k, k as many
slots as the policy chose, of a key/value head (weights summed over its query heads); `mass` is the
attention weight on the chosen slots.

Shape legend: K key/value heads, Q query heads, h heads with a choice of their own, X chosen slots,
S slots, T prompt tokens, O observed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from configs.command_line.class_paths import Kind
from configs.command_line.loading import exit_with, flags
from configs.command_line.outputs import new_file
from data.conversations import prompt_ids
from data.corpora.long_context import generated
from eval.methods.rows import construct
from modules.contracts.target import Session, Target
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted
from modules.sparse_kv.policy import LayerCall, Policy, Selection, Step
from modules.sparse_kv.reader import Phase, SparseReader
from modules.sparse_kv.session import check_hooked
from modules.target.loading import AUTO, load_target

_PACKAGE = "modules.sparse_kv."


def specs_at(budget: int) -> dict[str, dict[str, Any]]:
    """The policies at about so many slots a row, by name."""
    initial = max(1, budget // 8)
    local = budget // 4
    chosen = budget - initial - local
    exact = {"budget": budget, "heads": "key_value"}
    act_qkv = {"blocks": 5, "block": initial, "initial": initial, "local": local}
    token_select = {"budget": chosen, "initial": initial, "local": local, "chunk": 2048}
    return {
        "exact": {"class_path": f"{_PACKAGE}exact.ExactTopK", "init_args": exact},
        "window": {
            "class_path": f"{_PACKAGE}window.Window",
            "init_args": {"window": budget - 4, "sinks": 4},
        },
        "tidal": {"class_path": f"{_PACKAGE}tidal.TidalDecode", "init_args": {"budget": budget}},
        "token_select": {
            "class_path": f"{_PACKAGE}token_select.TokenSelect",
            "init_args": token_select,
        },
        "sentence_kv": {
            "class_path": f"{_PACKAGE}sentence_kv.SentenceKV",
            "init_args": {"budget": budget},
        },
        "act_qkv": {"class_path": f"{_PACKAGE}act_qkv.ActQKV", "init_args": act_qkv},
    }


@dataclass
class Figures:
    """Of one policy in one layer: a value for each token and head."""

    recall: list[float] = field(default_factory=list)
    mass: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)

    def add(self, weights_hS: Tensor, chosen_hS: Tensor) -> None:
        """One token's attention weights, and which slots it would have read."""
        for weights_S, chosen_S in zip(weights_hS, chosen_hS, strict=True):
            count = int(chosen_S.sum())
            top = weights_S.topk(count).indices
            self.recall.append(float(chosen_S[top].float().mean()))
            self.mass.append(float(weights_S[chosen_S].sum() / weights_S.sum()))
            self.share.append(count / len(chosen_S))


def chosen_slots(call: LayerCall, slots_BhRX: Tensor | None) -> Tensor:
    """bool [h,S] of the only sequence's newest row: the slots that a choice reads."""
    size = call.slots
    if slots_BhRX is None:
        return torch.ones(1, size, dtype=torch.bool)
    chosen_hX = slots_BhRX[0, :, -1]
    read_hS = torch.zeros(len(chosen_hX), size + 1, dtype=torch.bool)
    read_hS.scatter_(1, torch.where(chosen_hX < 0, size, chosen_hX), True)
    # A row always reads itself.
    read_hS[:, call.row_slots_BN[0, -1]] = True
    return read_hS[:, :size]


@dataclass
class Watching(Selection):
    """Reads everything, and asks several selections what they would have read.

    figures: by name of the policy and layer.
    """

    selections: dict[str, Selection]
    figures: dict[str, list[Figures]]

    def choose(self, call: LayerCall) -> Tensor | None:
        """All slots, once every selection has chosen."""
        weights_QS = call.probabilities_BKGNS[0, ..., -1, :]
        heads = weights_QS.shape[0]
        for name, selection in self.selections.items():
            read_hS = chosen_slots(call, selection.choose(call))
            # Heads that share a choice are judged by the weights of a key/value head.
            alone = len(read_hS) > heads
            weights_hS = weights_QS.flatten(0, 1) if alone else weights_QS.sum(1)
            read_hS = read_hS.expand(len(weights_hS), -1)
            self.figures[name][call.layer].add(weights_hS, read_hS)
        return None

    def commit(self, step: Step) -> None:
        """Tell all of them."""
        for selection in self.selections.values():
            selection.commit(step)


def begin(session: Session, selection: Selection, policy: Policy, ids_BT: Tensor) -> None:
    """Show a selection prompts that an open session has read in full."""
    length = ids_BT.shape[1]
    counts_B = torch.tensor([length], device=ids_BT.device)
    selection.read_prompt(ids_BT, counts_B)
    if policy.observed:
        # It looks at the newest queries, which are computed once more.
        newest_BO = ids_BT[:, -policy.observed :]
        looked_B = torch.full_like(counts_B, newest_BO.shape[1])
        session.rewind(counts_B - looked_B)
        reader = SparseReader(session.cache, selection)
        reader.enter(Phase.WATCHED, newest_BO, looked_B)
        session.attend_by(reader)
        session.prefill(newest_BO, looked_B)
    layers = session.target.shape.num_layers
    selection.end_prompt(session.cache.layer_keys(layers), counts_B)


@torch.no_grad()
def measure(
    target: Target, policies: Mapping[str, Policy], prompts: Sequence[list[int]], tokens: int
) -> dict[str, list[Figures]]:
    """Figures of every policy and layer over greedy answers of so many tokens.

    Raises:
        ValueError: a target whose attention cannot be replaced, or settings that do not fit it.
    """
    check_hooked(target)
    layers, one_B = range(target.shape.num_layers), torch.ones(1, dtype=torch.int64)
    figures = {name: [Figures() for _ in layers] for name in policies}
    for prompt in prompts:
        # 1. The prompt, in full, and every policy's memory of it.
        ids_BT = torch.tensor([prompt], device=target.device)
        session = target.open(1, len(prompt) + tokens + 1)
        counts_B = torch.tensor([len(prompt)], device=target.device)
        logits_BV, _ = session.prefill(ids_BT, counts_B)
        selections = {name: policy.start(target, 1) for name, policy in policies.items()}
        for name, selection in selections.items():
            begin(session, selection, policies[name], ids_BT)
        # 2. The answer, in full, while all of them choose.
        reader = SparseReader(session.cache, Watching(selections, figures))
        session.attend_by(reader)
        for _ in range(tokens):
            tree = TokenTree.root(logits_BV.argmax(-1))
            reader.enter(Phase.REFRESH, tree.tokens_BN)
            logits_BV = session.verify(tree).logits_BNV[:, -1]
            accepted = Accepted(torch.zeros_like(tree.tokens_BN), one_B, one_B)
            reader.commit(accepted, tree.tokens_BN, session.lengths_B)
            session.commit(accepted)
    return figures


def table(figures: Mapping[str, Sequence[Figures]]) -> str:
    """A Markdown table of the policies: over all layers, and recall by layer."""
    lines = [
        "| policy | slots read | recall | mass | recall by layer |",
        "|---|---:|---:|---:|---|",
    ]
    for name, layers in figures.items():
        mean = {
            what: fmean(fmean(getattr(layer, what)) for layer in layers)
            for what in ("share", "recall", "mass")
        }
        by_layer = " ".join(f"{fmean(layer.recall):.2f}" for layer in layers)
        lines.append(
            f"| {name} | {mean['share']:.1%} | {mean['recall']:.3f} | {mean['mass']:.3f} | "
            f"{by_layer} |"
        )
    return "\n".join(lines)


def ids_within(target: Target, length: int, texts: Sequence[str], tokens: int) -> list[list[int]]:
    """Prompts of a length as tokens; ValueError where one and its answer exceed the context."""
    rows = [prompt_ids([{"role": "user", "content": text}], target.tokenizer) for text in texts]
    longest = max(map(len, rows)) + tokens
    if longest > target.max_positions:
        raise ValueError(
            f"lengths: {length} gives a prompt and answer of {longest} tokens, the target's "
            f"context holds {target.max_positions}: lower it"
        )
    return rows


def compare(
    target: str = "smollm2-135m",
    kind: str = "needle",
    lengths: list[int] | None = None,
    budgets: list[int] | None = None,
    prompts: int = 1,
    tokens: int = 16,
    output: str | None = None,
    dtype: str = AUTO,
    device: str | None = None,
    seed: int = 0,
) -> None:
    """Print a table for every length and budget.

    Args:
        target: Hub id, folder, .gguf file or smollm2-135m.
        kind: of the prompts, as in `data.corpora.long_context`.
        lengths: of the prompts, about, in tokens; by default 4096.
        budgets: slots that a row reads; by default 256 and 1024.
        prompts: of each length.
        tokens: of an answer.
        output: a new Markdown file that gets the tables as well.
        dtype: of the target; auto is bfloat16 on a GPU that multiplies it and float32 elsewhere.
        device: a torch device; by default the GPU if there is one.
        seed: of the prompts.

    Raises:
        ValueError: a count below its least, an unknown kind, or a prompt longer than the target's
            context.
    """
    for name, value in (("prompts", prompts), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for length in lengths or ():
        if length < 1:
            raise ValueError(f"lengths must be at least 1, got {length}")
    policies = {
        f"{name}, {budget}": construct(spec, f"budgets: {name} of {budget}", Kind.POLICY)
        for budget in budgets or [256, 1024]
        for name, spec in specs_at(budget).items()
    }
    # Every prompt is made and checked before any of them is read.
    texts = {
        length: [prompt.text for prompt in generated(kind, length, prompts, seed)]
        for length in lengths or [4096]
    }
    loaded, parts = load_target(target, dtype, device), list[str]()
    rows = {length: ids_within(loaded, length, each, tokens) for length, each in texts.items()}
    for ids in rows.values():
        title = f"{kind}, {max(map(len, ids))} tokens, {prompts} prompts of {tokens} tokens"
        parts.append(f"{title}\n\n{table(measure(loaded, policies, ids, tokens))}\n")
        print(parts[-1], flush=True)
        if output is not None:
            Path(output).write_text("\n".join(parts), encoding="utf-8")


def command(arguments: Sequence[str]) -> int:
    """Parse the command line and compare; returns the exit status."""
    title = "Recall of the largest attention weights by policies of sparse KV caches."
    settings = flags(compare, arguments, "eval.analysis.selection_recall", title)
    # A place that cannot be written to is refused before anything is measured.
    with new_file(settings["output"]):
        compare(**settings)
    return 0


if __name__ == "__main__":
    exit_with(command)
