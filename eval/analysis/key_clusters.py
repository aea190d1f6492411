"""`python -m eval.analysis.key_clusters`: whether tokens near the likeliest one in the LM head are
right more often than others of the same rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from configs.command_line.loading import called, exit_with
from data.reading.files import read_jsonl
from modules.contracts.target import Target
from modules.decoding.lossy.key_clusters import Ranked, k_means, precision, ranked_tokens
from modules.target.loading import AUTO, load_target

PROBES = Path(__file__).resolve().parents[2] / "data" / "prompts" / "several_right.jsonl"
BANDS = ((2, 5), (6, 10), (11, 20), (21, 50))
"""Ranks whose precision is printed together."""


def right_tokens(tokenizer: Any, answers: Sequence[str]) -> set[int]:
    """First tokens of the answers, with a space before them or without."""
    texts = [text for answer in answers for text in (answer, f" {answer}")]
    return {tokenizer.encode(text, add_special_tokens=False)[0] for text in texts}


@torch.no_grad()
def probe(target: Target, clusters: int, probes: Sequence[dict[str, Any]]) -> list[Ranked]:
    """The tokens that the model ranks after every probe, with their clusters."""
    ids = torch.arange(target.shape.vocab_size, device=target.device)
    cluster_V = k_means(target.lm_head_rows(ids), clusters).to(target.device)
    tokens = []
    for row in probes:
        prompt = target.tokenizer.encode(row["prompt"])
        ids_BT = torch.tensor([prompt], device=target.device)
        session = target.open(1, len(prompt))
        logits_BV, _ = session.prefill(ids_BT, torch.tensor([len(prompt)]).to(ids_BT))
        right = right_tokens(target.tokenizer, row["answers"])
        tokens += ranked_tokens(logits_BV[0], cluster_V, right, BANDS[-1][1])
    return tokens


def _complete(row: dict[str, Any]) -> bool:
    answers = row.get("answers")
    texts = [row.get("prompt"), *answers] if isinstance(answers, list) and answers else []
    return bool(texts) and all(isinstance(text, str) and text for text in texts)


def compare(
    target: str,
    clusters: int = 1000,
    probes: str | None = None,
    dtype: str = AUTO,
    device: str | None = None,
) -> None:
    """Print the precision inside and outside of the likeliest token's cluster.

    Args:
        target: Hub id, folder or .gguf file.
        clusters: of the LM head's rows, by k-means.
        probes: JSONL file of rows with `prompt` and its right `answers`; by default embedded ones.
        dtype: of the target: float32, bfloat16, float16 or float64.
        device: a torch device; by default the GPU if there is one.

    Raises:
        ValueError: fewer than one cluster, or a row of `probes` without these keys, or with an
            empty text.
    """
    if clusters < 1:
        raise ValueError(f"clusters must be at least 1, got {clusters}")
    rows = list(read_jsonl(PROBES if probes is None else Path(probes)))
    if not rows or not all(map(_complete, rows)):
        raise ValueError(
            f"probes {probes!r}: give rows with a text `prompt` and a list of texts `answers`, "
            "none of them empty"
        )
    tokens = probe(load_target(target, dtype, device, chats=False), clusters, rows)
    print(f"{len(rows)} probes, {clusters} clusters, {target}")
    for first, last in BANDS:
        share = precision(tokens, first, last)
        print(
            f"ranks {first}-{last}: right inside of the cluster {share[True][0]:.3f} of "
            f"{share[True][1]}, outside {share[False][0]:.3f} of {share[False][1]}"
        )


def command(arguments: Sequence[str]) -> int:
    """Parse the command line and compare; returns the exit status."""
    return called(
        compare,
        arguments,
        "eval.analysis.key_clusters",
        "Compare tokens of the likeliest one's key cluster with others.",
    )


if __name__ == "__main__":
    exit_with(command)
