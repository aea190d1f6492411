"""FSPAD: feature sampling and partial alignment distillation on top of EAGLE (Gui et al. 2024,
arXiv 2408.15562).

Shape legend: N rows of one call, H hidden size, I intermediate size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.shapes import TargetShape
from modules.drafters.feature.eagle import Eagle
from modules.layers.decoder_layer import DecoderLayer

if TYPE_CHECKING:
    from modules.contracts.target import Target


class Fspad(Eagle):
    """EAGLE with two changes, each its own flag.

    Feature sampling: z + W_down(SiLU(W_gate e) ⊙ W_up RMSNorm(z)) in place of z = W [e ; f]: the
    token's embedding selects what the next step needs of the feature. W_down starts at zero, so
    training starts from EAGLE's fusion. Partial alignment: the layer outputs [ô ; f̂]; the LM head
    reads ô, the next step and the feature loss read f̂.

    Args:
        shape: the target's dimensions.
        draft_vocabulary: how many token ids can be drafted; None for all.
        feature_sampling: the gated fusion (False: ablation).
        partial_alignment: the split output (False: ablation).
        bias: whether W has a bias.
        feature_weight, token_weight, noise: as EAGLE's.
        steps: draft steps unrolled in training; 1 is the paper's teacher forcing.
        decay: step j weighs decay^j.
        depth, tree, divergence: as EAGLE's.
    """

    stored_bytes: ClassVar[tuple[float, float, float]] = (180.0, 100.0, 97.0)

    def __init__(
        self,
        shape: TargetShape,
        draft_vocabulary: int | None = None,
        feature_sampling: bool = True,
        partial_alignment: bool = True,
        bias: bool = True,
        feature_weight: float = 1.0,
        token_weight: float = 0.1,
        noise: float = 0.1,
        steps: int = 1,
        decay: float = 0.8,
        depth: int = 5,
        tree: list[list[int]] | str | None = None,
        divergence: str = "cross_entropy",
    ) -> None:
        super().__init__(
            shape,
            draft_vocabulary,
            bias,
            feature_weight,
            token_weight,
            noise,
            steps,
            decay,
            depth,
            tree,
            divergence,
        )
        size, inner = shape.hidden_size, shape.intermediate_size
        self.feature_sampling, self.partial_alignment = feature_sampling, partial_alignment
        if feature_sampling:
            self.norm = nn.RMSNorm(size, shape.norm_eps)
            self.gate, self.up = (nn.Linear(size, inner, bias=False) for _ in range(2))
            self.down = nn.Linear(inner, size, bias=False)
            nn.init.zeros_(self.down.weight)
        if partial_alignment:
            self.layer = DecoderLayer(shape, input_norm=False, output_width=2)

    def copy_layer(self, target: Target) -> None:
        """As EAGLE; a layer with a split output copies all weights but the output projection, which
        has another shape.
        """
        if not self.partial_alignment:
            return super().copy_layer(target)
        plain = DecoderLayer(self.shape, input_norm=False).to(self.precision)
        if plain.copy_from(target):
            shared = {
                name: weight
                for name, weight in plain.state_dict().items()
                if name != "mlp.down_proj.weight"
            }
            self.layer.load_state_dict(shared, strict=False)
        return None

    def fuse(self, vectors_NH: Tensor, features_NH: Tensor) -> tuple[Tensor, Tensor]:
        """The fused vector as the input of attention and as the residual."""
        fused, _ = super().fuse(vectors_NH, features_NH)
        if self.feature_sampling:
            fused = fused + self.down(F.silu(self.gate(vectors_NH)) * self.up(self.norm(fused)))
        return fused, fused

    def outputs(self, hidden_NY: Tensor) -> tuple[Tensor, Tensor]:
        """ô for the LM head, f̂ for the next step."""
        if not self.partial_alignment:
            return hidden_NY, hidden_NY
        logit_feature, feature = hidden_NY.chunk(2, dim=-1)
        return logit_feature, feature
