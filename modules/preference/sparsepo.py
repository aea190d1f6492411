"""SparsePO: token masks on the reward and on the divergence of DPO (Christopoulou et al. 2024,
arXiv 2410.05102).

Shape legend: B pairs, T tokens of a row, M tokens that count, L layers, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.batches import PreferenceBatch, TextBatch
from modules.contracts.losses import Mean
from modules.contracts.shapes import StateName, TargetShape
from modules.losses.chunked import cross_entropy, entropies, next_token_rows, target_distributions
from modules.preference.activations import GROUPS, Group, mean_activations, residual_states
from modules.preference.losses import Side, activation_mask, sparse_loss
from modules.preference.policy import PreferenceTrainable, Response, RowCache, at_tokens, counted

if TYPE_CHECKING:
    from modules.contracts.target import Target

Masks = Literal["learned", "activations", "binarised", "random", "ones"]
MASK_DROPOUT = 0.01


class MaskHead(nn.Module):
    """A learned mask: m_t = ReLU(vᵀ a_t) with a_j,t = ReLU(w_jᵀ LayerNorm(h_j,t) + b_j) of each
    layer's state.

    Dropout acts before each ReLU. m_t is at least 0, and exactly 0 where its units are off, which
    makes it sparse. It starts close to 1, where SparsePO equals TDPO: w small, b = 1, v = 1/L. (In
    the released code all weights start at random around 0, so about half of a mask's values are
    exactly 0 and the others near 0.) The norm has no weights, since w and b include them.
    """

    def __init__(self, shape: TargetShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(shape.num_layers, shape.hidden_size))
        self.bias = nn.Parameter(torch.ones(shape.num_layers))
        self.mix = nn.Parameter(torch.full((1, shape.num_layers), 1 / shape.num_layers))

    def forward(self, states_LBTH: Tensor) -> Tensor:
        """The reference's residual states [L,B,T,H] -> mask [B,T]."""
        normal_LBTH = F.layer_norm(states_LBTH, states_LBTH.shape[-1:])
        units_LBT = (
            torch.einsum("lbth,lh->lbt", normal_LBTH, self.weight) + self.bias[:, None, None]
        )
        units_LBT = F.relu(F.dropout(units_LBT, MASK_DROPOUT, self.training))
        mixed_BT = torch.einsum("lbt,l->bt", units_LBT, self.mix[0])
        return F.relu(F.dropout(mixed_BT, MASK_DROPOUT, self.training))


def at_predicted(values_BT: Tensor) -> Tensor:
    """Values [..., T] moved from each row to the token that it predicts. The first token gets 0 and
    never counts.
    """
    return F.pad(values_BT, (1, 0))[..., :-1]


def signs(mask_BT: Tensor) -> Tensor:
    """1 where a mask is above 0, else 0 [B,T], with the mask's gradient (straight through)."""
    return mask_BT.detach().sign() + (mask_BT - mask_BT.detach())


class TokenMasks(NamedTuple):
    """m^u and m^d [B,T], 0 where no token counts."""

    reward_BT: Tensor
    divergence_BT: Tensor


class SparsePO(PreferenceTrainable):
    """−log σ(β [(u_w − u_l) − (d_w − d_l)]) with u = Σ m^u_t r_t and d = −Σ m^d_t KL(π_ref ‖
    π_θ)_t.

    Masks are learned with the policy from the reference's states, or computed from its activations
    without parameters. m_t is the weight of y_t and comes from the row that predicts it, as the KL
    does.

    `"binarised"` masks are the sign of learned masks, 0 or 1. The sign has no gradient, so its
    gradient is passed to the learned mask unchanged (straight through, Bengio et al. 2013). The
    released code passes none, and its binary masks never change. `"random"` masks are drawn from
    [0, 1) at every call.

    Args:
        shape: the target's dimensions (Llama-type layers only).
        rank, alpha, dropout: of the policy's adapters, on every linear layer.
        beta: strength of the constraint to the reference.
        masks: `"learned"`, `"activations"` (MaPO), or the ablations `"binarised"`, `"random"` and
            `"ones"` (TDPO).
        activations: which of the reference's activations MaPO reads, of `residual`, `attention`,
            `feed_forward` and `logits` (see `mean_activations`); null: all, as the released recipes
            do.
        common_mask: whether the reward and the divergence share one mask (those of activations are
            always common).
        sparsity: λ of the L1 penalty on the learned masks, summed over the tokens of both responses
            of a pair.
        mask_lr_scale, mask_weight_decay: of the learned masks' parameters.
        detach_chosen: no gradient through the chosen side's divergence (TDPO's second form).
    """

    method: ClassVar[str] = "sparsepo"

    def __init__(
        self,
        shape: TargetShape,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        beta: float = 0.1,
        masks: Masks = "learned",
        activations: list[Group] | None = None,
        common_mask: bool = True,
        sparsity: float = 0.0,
        mask_lr_scale: float = 1.0,
        mask_weight_decay: float = 0.01,
        detach_chosen: bool = False,
    ) -> None:
        super().__init__(shape, rank, alpha, dropout, beta)
        self.groups: list[Group] = list(GROUPS) if activations is None else activations
        _check(masks, self.groups, sparsity)
        self.masks, self.sparsity, self.detach_chosen = masks, sparsity, detach_chosen
        self.mask_lr_scale, self.mask_weight_decay = mask_lr_scale, mask_weight_decay
        self.common_mask = common_mask
        heads = 0 if masks not in ("learned", "binarised") else 1 if common_mask else 2
        self.mask_heads = nn.ModuleList(MaskHead(shape) for _ in range(heads))
        self._fixed = RowCache()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The policy, and the masks with their own learning rate and weight decay."""
        groups = [{"params": list(self.policy.parameters()), "lr_scale": 1.0}]
        if self.mask_heads:
            groups.append(
                {
                    "params": list(self.mask_heads.parameters()),
                    "lr_scale": self.mask_lr_scale,
                    "weight_decay": self.mask_weight_decay,
                }
            )
        return groups

    # -- masks -------------------------------------------------------------------------------------

    def reference_states(self, text: TextBatch, target: Target) -> dict[StateName, Tensor]:
        """The reference's `final` states of one side, and for learned masks its residual stream."""
        return target.features(
            text, (*(residual_states(target) if self.mask_heads else ()), "final")
        )

    def token_masks(
        self, text: TextBatch, counted_BT: Tensor, states: dict[StateName, Tensor], target: Target
    ) -> TokenMasks:
        """The two masks of one side: learned from the reference's states, computed from its
        activations, or drawn.
        """
        # 1. Masks without parameters; a common mask serves both purposes.
        ones_BT = counted_BT.to(torch.promote_types(target.dtype, torch.float32))
        if self.masks == "ones":
            return TokenMasks(ones_BT, ones_BT)
        if self.masks == "activations":
            mask_BT = self._fixed(text, target, self._activation_mask)
            return TokenMasks(mask_BT, mask_BT)
        if self.masks == "random":
            count = 1 if self.common_mask else 2
            masks = [torch.rand_like(ones_BT) * ones_BT for _ in range(count)]
            return TokenMasks(masks[0], masks[-1])
        # 2. Learned masks, one head for both purposes or one each.
        precision = self.mask_heads[0].get_parameter("weight").dtype
        states_LBTH = torch.stack([states[name] for name in residual_states(target)]).to(precision)
        masks = [at_predicted(head(states_LBTH)) * counted_BT for head in self.mask_heads]
        masks = [signs(mask_BT) for mask_BT in masks] if self.masks == "binarised" else masks
        return TokenMasks(masks[0], masks[-1])

    def _activation_mask(self, text: TextBatch, target: Target) -> Tensor:
        groups = [at_predicted(group) for group in mean_activations(target, text, self.groups)]
        return activation_mask(groups, counted(text))

    # -- loss --------------------------------------------------------------------------------------

    def divergences(
        self, text: TextBatch, response: Response, reference_BTH: Tensor, target: Target
    ) -> Tensor:
        """KL(π_ref ‖ π_θ) over the vocabulary at each counted token [B,T], from the reference's
        `final` states.
        """
        # KL is the cross-entropy less the entropy of the reference.
        flat_M, labels_M = next_token_rows(text)
        size, twin = self.shape.vocab_size, self.policy.twin(target)
        distributions = target_distributions(target.unrounded_logits, reference_BTH, flat_M, size)
        features_MH = response.final_BTH.flatten(0, 1)[flat_M]
        cross_M = cross_entropy(
            features_MH, twin.unrounded_logits, labels_M, size, distributions, flat_M
        )[0]
        return at_tokens(text, cross_M - entropies(distributions, flat_M, size))

    def pair_losses(
        self, batch: PreferenceBatch, chosen: Response, rejected: Response, target: Target
    ) -> tuple[Tensor, dict[str, Mean]]:
        """`sparse_loss` plus the masks' L1 penalty [B]; metrics are each side's divergence and, in
        validation, its sparsity.
        """
        sides, masks = [], []
        metrics: dict[str, Mean] = {}
        for name, text, response in (
            ("chosen", batch.chosen, chosen),
            ("rejected", batch.rejected, rejected),
        ):
            # Masks and divergences of one side, both from the reference's states.
            states = self.reference_states(text, target)
            masks.append(self.token_masks(text, response.counted_BT, states, target))
            divergence_BT = self.divergences(text, response, states["final"], target)
            sides.append(Side(response.ratio_BT, divergence_BT, *masks[-1]))
            metrics[f"{name}_divergence"] = Mean(
                divergence_BT.detach().sum(), response.counted_BT.any(1).sum()
            )
            if not self.training:  # dropout's zeros are not sparsity
                metrics |= _sparsity(name, masks[-1], response.counted_BT)
        losses_B = sparse_loss(sides[0], sides[1], self.beta, self.detach_chosen)
        return losses_B + self.sparsity * self._penalty(masks), metrics

    def _penalty(self, masks: list[TokenMasks]) -> Tensor | float:
        """Σ_t |m^u_t| + Σ_t |m^d_t| over both responses of each pair [B]; a common mask counts
        once, masks without parameters not at all.

        A sum over tokens as in the released code, not a mean, so long responses have a larger
        penalty.
        """
        if not self.mask_heads:
            return 0.0
        both_B = sum(mask_BT.abs().sum(1) for side in masks for mask_BT in side)
        return both_B * len(self.mask_heads) / 2


def _sparsity(side: str, masks: TokenMasks, counted_BT: Tensor) -> dict[str, Mean]:
    """Shares of the response's tokens that a mask leaves out."""
    tokens = counted_BT.sum()
    return {
        f"{side}_{name}_sparsity": Mean(((mask == 0) & counted_BT).sum(), tokens)
        for name, mask in (("reward", masks.reward_BT), ("divergence", masks.divergence_BT))
    }


def _check(masks: str, groups: list[Group], sparsity: float) -> None:
    if masks not in get_args(Masks):
        raise ValueError(f"masks must be one of {', '.join(get_args(Masks))}, got {masks!r}")
    unknown = [group for group in groups if group not in GROUPS]
    if unknown or not groups:
        raise ValueError(f"activations must be among {', '.join(GROUPS)}, got {unknown or groups}")
    if sparsity < 0:
        raise ValueError(f"sparsity must be 0 or above, got {sparsity}")
