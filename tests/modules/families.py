"""The families of learned drafters and their ablations, and the data that tests feed them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState, Frontier
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted
from modules.drafters.blocks.falcon import Falcon
from modules.drafters.feature.eagle import Eagle
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.feature.fspad import Fspad
from modules.drafters.feature.mtp import MTP
from modules.drafters.feature.peagle import PEagle
from modules.drafters.heads.chimera import Chimera
from modules.drafters.heads.clover import Clover
from modules.drafters.heads.clover2 import Clover2
from modules.drafters.heads.hydra import Hydra
from modules.drafters.heads.medusa import Medusa
from modules.drafters.trained import TrainedDrafter
from modules.target.target import Target

Build = Callable[[TargetShape], TrainedDrafter]
DRAFTED = 40

FAMILIES: dict[str, Build] = {
    "medusa": lambda shape: Medusa(shape, 3, 2, draft_vocabulary=DRAFTED),
    "medusa_shared": lambda shape: Medusa(shape, 3, lm_head="shared"),
    "clover": lambda shape: Clover(shape, 3, draft_vocabulary=DRAFTED),
    "clover_cosine": lambda shape: Clover(shape, 3, gate="cosine"),
    "clover_mlp_fusion": lambda shape: Clover(shape, 3, fusion="mlp"),
    "clover_no_token": lambda shape: Clover(shape, 3, token_input=False),
    "clover_attention_block": lambda shape: Clover(shape, 3, augmenting="attention"),
    "clover_mlp_block": lambda shape: Clover(shape, 3, augmenting="mlp"),
    "clover_no_block": lambda shape: Clover(shape, 3, augmenting="none", tree="narrow"),
    "clover2": lambda shape: Clover2(shape, 3, draft_vocabulary=DRAFTED),
    "clover2_released": lambda shape: Clover2(
        shape,
        3,
        draft_vocabulary=DRAFTED,
        map_lr_scale=1.0,
        map_bias=True,
        start_norm="final",
        token_scale="head",
    ),
    "clover2_label_mask": lambda shape: Clover2(
        shape, 3, label_top_k=8, label_top_p=0.8, tree="eagle_25"
    ),
    "hydra": lambda shape: Hydra(shape, 3, draft_vocabulary=DRAFTED),
    "hydra_released": lambda shape: Hydra(
        shape,
        3,
        draft_vocabulary=DRAFTED,
        prefix_start="random",
        dropout_at="every_block",
        shared_block=True,
    ),
    "eagle": lambda shape: Eagle(shape, draft_vocabulary=DRAFTED, steps=3),
    "eagle3": lambda shape: Eagle3(shape, draft_vocabulary=DRAFTED),
    "eagle3_one_layer": lambda shape: Eagle3(
        shape, fused_layers=[1], norm_before_residual=True, norm_output=True, fc_norm=True
    ),
    "eagle31": lambda shape: Eagle3(
        shape,
        draft_vocabulary=DRAFTED,
        norm_before_fc=True,
        norm_output=True,
        norm_before_residual=True,
    ),
    "eagle31_window": lambda shape: Eagle3(
        shape, draft_vocabulary=DRAFTED, norm_output=True, fc_norm=True, qk_norm=True, window=4
    ),
    "peagle": lambda shape: PEagle(shape, 3, draft_vocabulary=DRAFTED),
    "peagle_own": lambda shape: PEagle(
        shape, 3, 3, fused_layers=[1], embeddings="own", norm_before_fc=True, qk_norm=True
    ),
    "mtp": lambda shape: MTP(shape, draft_vocabulary=DRAFTED, divergence="cross_entropy"),
    "mtp_on_policy": lambda shape: MTP(
        shape, post_norm=False, norm_output=False, on_policy=True, divergence="cross_entropy"
    ),
    "fspad": lambda shape: Fspad(shape, draft_vocabulary=DRAFTED, steps=3),
    "fspad_sampling": lambda shape: Fspad(shape, partial_alignment=False, steps=3),
    "fspad_alignment": lambda shape: Fspad(shape, feature_sampling=False, steps=3),
    "falcon": lambda shape: Falcon(shape, 3, draft_vocabulary=DRAFTED, tree=None),
    "falcon_linear": lambda shape: Falcon(shape, 3, lstm=False),
    "falcon_causal": lambda shape: Falcon(shape, 3, relaxed_mask=False),
    "chimera": lambda shape: Chimera(shape, 3, draft_vocabulary=DRAFTED),
    "chimera_tied": lambda shape: Chimera(
        shape, 3, "tied", trigrams=False, block_start="target", labels="greedy"
    ),
    "chimera_small": lambda shape: Chimera(
        shape, 3, "shared", attention=False, labels="soft", detach=False, memo=0
    ),
    "hydra_shared": lambda shape: Hydra(shape, 3, prefix=False, lm_head="shared"),
}


def built(name: str, target: Target, shake: float = 0.0) -> TrainedDrafter:
    """A drafter of the family in float64, started from the target, its parameters then shaken by
    Gaussian noise.
    """
    torch.manual_seed(1)
    drafter = FAMILIES[name](target.shape).double()
    if drafter.vocabulary_D is not None:
        drafter.set_vocabulary(torch.randperm(target.shape.vocab_size)[:DRAFTED])
    drafter.initialise(target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=shake)
    return drafter.eval()


def documents(rows: list[list[int]], labels_from: int = 0) -> TextBatch:
    """One document a row, right-padded, every token from `labels_from` on a label."""
    length = max(map(len, rows))
    ids, documents = (
        torch.zeros(len(rows), length, dtype=torch.long),
        torch.full((len(rows), length), -1),
    )
    for b, row in enumerate(rows):
        ids[b, : len(row)], documents[b, : len(row)] = torch.tensor(row), 0
    positions = torch.arange(length).expand(len(rows), -1).clone()
    return TextBatch(ids, (documents == 0) & (positions >= labels_from), positions, documents)


def filled(batch: TextBatch, drafter: TrainedDrafter, target: Target) -> TextBatch:
    """The batch with the states that the drafter's loss reads."""
    batch.states = target.features(batch, drafter.training_states)
    return batch


class Reader:
    """Feeds a drafter known text as decoding would: a prompt, then accepted chains of given
    lengths.
    """

    def __init__(
        self, drafter: TrainedDrafter, target: Target, batch: TextBatch, lengths: list[int]
    ) -> None:
        self.drafter, self.target, self.ids = (
            drafter,
            target,
            torch.nn.functional.pad(batch.input_ids, (0, 8)),
        )
        self.read = torch.tensor(lengths)
        self.session = target.open(len(lengths), 64 + max(lengths))
        prompts = self.ids[:, : max(lengths)]
        _, states = self.session.prefill(prompts, self.read, drafter.decoding_states)
        context = Context(target, prompts, self.read, self.token(0), states, session=self.session)
        self.state: DraftState = drafter.start(context)

    def token(self, ahead: int) -> Tensor:
        """The token `ahead` places behind the newest [B]."""
        return self.ids.gather(1, self.read[:, None] + ahead)[:, 0]

    def accept(self, lengths: list[int]) -> None:
        """One verification that lets the next `lengths` tokens through."""
        width = max(lengths) + 1
        tree = TokenTree.chain(torch.stack([self.token(i) for i in range(width)], 1))
        verified = self.session.verify(tree, self.drafter.decoding_states)
        counts = torch.tensor(lengths)
        self.read = self.read + counts
        path = torch.arange(max(lengths)).expand(len(lengths), -1)
        accepted = Accepted(path * (path < counts[:, None]), counts, self.token(0))
        self.session.commit(accepted)
        self.state = self.drafter.absorb(self.state, verified, accepted)

    def logits(self) -> Tensor:
        """Draft logits [B,K,D] of every step, each told the text's own tokens."""
        parent = torch.full_like(self.read, -1)[:, None]
        return torch.cat(
            [
                self.drafter.expand(self.state, Frontier(self.token(d)[:, None], parent + d, d))
                for d in range(self.drafter.draft_steps)
            ],
            1,
        )
