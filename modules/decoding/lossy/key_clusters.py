"""Clusters of the keys of a vocabulary: are tokens near the likeliest one right more often, or only
ranked higher (Peng et al. 2024, arXiv 2410.02284, section 3)?

Shape legend: V vocabulary, H hidden size, K clusters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 4096
"""Keys whose distances are computed at a time."""


def nearest(keys_VH: Tensor, centres_KH: Tensor) -> Tensor:
    """The centre, int64 [V], at the least Euclidean distance of each key."""
    half_K = centres_KH.square().sum(1) / 2
    parts = [(half_K - rows @ centres_KH.T).argmin(1) for rows in keys_VH.split(CHUNK)]
    return torch.cat(parts)


@torch.no_grad()
def k_means(keys_VH: Tensor, clusters: int, rounds: int = 20, seed: int = 0) -> Tensor:
    """The cluster of every key, int64 [V], by Lloyd's algorithm from random keys. A cluster without
    keys keeps its centre. Ends early where nothing changes.

    Raises:
        ValueError: fewer keys than clusters.
    """
    if not 1 <= clusters <= len(keys_VH):
        raise ValueError(f"clusters must lie between 1 and {len(keys_VH)} keys, got {clusters}")
    generator = torch.Generator().manual_seed(seed)
    keys_VH = keys_VH.float()
    centres_KH = keys_VH[torch.randperm(len(keys_VH), generator=generator)[:clusters]].clone()
    cluster_V = nearest(keys_VH, centres_KH)
    for _ in range(rounds):
        # 1. Centres are the means of their keys.
        sums_KH = torch.zeros_like(centres_KH).index_add(0, cluster_V, keys_VH)
        counts_K = torch.bincount(cluster_V, minlength=clusters)
        centres_KH = torch.where(
            counts_K[:, None] > 0, sums_KH / counts_K.clamp(min=1)[:, None], centres_KH
        )
        # 2. Keys go to the nearest centre.
        moved_V = nearest(keys_VH, centres_KH)
        if torch.equal(moved_V, cluster_V):
            break
        cluster_V = moved_V
    return cluster_V


@dataclass(frozen=True)
class Ranked:
    """A token that the model ranks below its likeliest one. rank: 2 for the next one. inside:
    whether it is in the likeliest one's cluster. right: whether it begins a right answer.
    """

    rank: int
    inside: bool
    right: bool


def ranked_tokens(
    logits_V: Tensor, cluster_V: Tensor, right: Collection[int], ranks: int
) -> Iterator[Ranked]:
    """The tokens of ranks 2 to `ranks`."""
    order = logits_V.topk(ranks).indices
    inside = (cluster_V[order] == cluster_V[order[0]]).tolist()
    for place, token in enumerate(order.tolist()[1:], 1):
        yield Ranked(place + 1, inside[place], token in right)


def precision(tokens: Sequence[Ranked], first: int, last: int) -> dict[bool, tuple[float, int]]:
    """Share of right tokens inside (True) and outside of the cluster, and how many there are, of
    the ranks `first` to `last`. To compare equal ranks, only ranks that have both count; both sides
    of a rank weigh as many tokens as the smaller one has.
    """
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    count = {True: 0, False: 0}
    for rank in range(first, last + 1):
        here = {
            side: [t.right for t in tokens if t.rank == rank and t.inside is side] for side in sums
        }
        weight = min(map(len, here.values()))
        for side, hits in here.items():
            if weight:
                sums[side][0] += weight * sum(hits) / len(hits)
                sums[side][1] += weight
                count[side] += len(hits)
    return {
        side: (hit / total if total else 0.0, count[side]) for side, (hit, total) in sums.items()
    }
