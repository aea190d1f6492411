"""The frozen target: a stock Hugging Face causal LM, its weights and its passes over rows.

Shape legend: B sequences, T prompt tokens, N rows of one call, S cache slots, H hidden size, V
vocabulary, D draft vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.contracts.float32_buffers import SteadyBuffers
from modules.contracts.rows import AuxiliaryRows, DocumentRows, Rows
from modules.contracts.shapes import StateName, TargetShape
from modules.layers.document_attention import document_attention, in_parts
from modules.runtime.phase_timer import phase
from modules.target.architecture import Architecture
from modules.target.beside import gradient_beside, rows_beside
from modules.target.kernels.attention_hook import (
    AttentionHook,
    LayerAttention,
    attending,
    current_hook,
)
from modules.target.kernels.compiled_calls import CompiledCalls
from modules.target.kernels.cpu_kernels import (
    narrow_linear,
    use_grouped_attention,
    use_narrow_kernels,
    uses_grouped_attention,
)
from modules.target.kernels.fused_blocks import use_fused_blocks
from modules.target.kv_cache import SlotCache
from modules.target.session import Session

SLICED_HEADS = 4
"""Draft vocabularies whose LM-head rows are kept at a time."""
_NO_MASK = torch.ones(1, 1, 1, dtype=torch.bool)
"""Stands for the mask of texts whose attention is computed in parts."""
WIDENED_ROWS = 8192
"""Rows of an LM head that are widened to float32 at a time."""


class _Skip(nn.Module):
    """Replaces a layer outside the range that a call runs."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def add_to_digest(digest: Any, name: str, tensor: Tensor) -> None:
    """Add a weight's name, shape and float32 values to a hash."""
    digest.update(f"{name}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())


class Target(SteadyBuffers):
    """A frozen causal LM. Its weights are reached only through the methods below, so that it may be
    sharded, quantised or soft-capped.

    Args:
        model: a Hugging Face causal LM of a supported architecture (ValueError for others).
        tokenizer: its tokenizer.
        name: what reports call it.
    """

    architecture_type: ClassVar[type[Architecture]] = Architecture

    def __init__(self, model: nn.Module, tokenizer: Any, name: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        # 1. State of the hooks and of what is computed once.
        self.architecture = self.architecture_type(model)
        _use_exact_experts(model)
        self._wanted: frozenset[StateName] = frozenset()
        self._seen: dict[StateName, Tensor] = {}
        self._sliced: dict[tuple[int, torch.dtype], tuple[Tensor, tuple[Any, ...], Tensor]] = {}
        self._fingerprint: str | None = None
        self._compiled: CompiledCalls | None = None
        # 2. The library's own copy, before kernels and hooks are changed.
        whole = self.device.type != "meta" and not self.quantisation
        self._stock: tuple[Any] = (_sharing_weights(model) if whole else model,)
        # 3. Kernels and hooks.
        use_grouped_attention(model)
        if self.device.type == "cpu":
            use_narrow_kernels(model)
            use_fused_blocks(model)
        self.layer_devices = [next(layer.parameters()).device for layer in self.architecture.layers]
        """Where each layer computes."""
        self._watch()

    # -- identity ----------------------------------------------------------------------------------

    @property
    def shape(self) -> TargetShape:
        """The dimensions of the model."""
        return self.architecture.shape

    @property
    def stock(self) -> Any:
        """The model as its library runs it, without our kernels and hooks; the weights are the same
        tensors. Of a quantised target it is the model itself: packed layers keep a state of their
        own beside the weights."""
        return self._stock[0]

    @property
    def device(self) -> torch.device:
        """The device of its embedding."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its weights."""
        return next(self.model.parameters()).dtype

    @property
    def max_positions(self) -> int:
        """The longest context, in tokens."""
        return self.shape.max_positions

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(
            i for i in [*ids, getattr(self.tokenizer, "eos_token_id", None)] if i is not None
        )

    @property
    def quantisation(self) -> str:
        """How its linear layers are packed: `4bit`, `8bit`, another method's name, or nothing."""
        config = getattr(self.model.config, "quantization_config", None)
        settings = config if isinstance(config, dict) or config is None else config.to_dict()
        if not settings:
            return ""
        bits = [name for name in ("4bit", "8bit") if settings.get(f"load_in_{name}")]
        return bits[0] if bits else str(settings.get("quant_method", "quantised"))

    @property
    def parameter_count(self) -> int:
        """Numbers in the model, packed ones counted one by one."""
        model: Any = self.model
        return model.num_parameters()

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and float32 values of the weights: the same at any precision
        that holds them.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for name, tensor in sorted(self.model.state_dict().items()):
                add_to_digest(digest, name, tensor)
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def set_fingerprint(self, fingerprint: str) -> None:
        """Set the fingerprint of a target that is only partly here."""
        self._fingerprint = fingerprint

    def head_digest(self) -> str:
        """SHA-256 over the float32 values of embedding, final norm and LM head."""
        digest = hashlib.sha256()
        parts = (self.architecture.embedding, self.architecture.norm, self.architecture.head)
        for part in parts:
            for name, tensor in sorted((part.state_dict() if part is not None else {}).items()):
                add_to_digest(digest, name, tensor)
        return digest.hexdigest()[:16]

    # -- weights -----------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., H] of token ids."""
        return self.architecture.embedding(ids)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """`final` states from `pre_norm` ones, at their precision (identity for models without a
        final norm).
        """
        norm = self.architecture.norm
        return hidden if norm is None else norm(hidden.to(self.dtype)).to(hidden.dtype)

    def logits(
        self,
        hidden: Tensor,
        vocabulary_D: Tensor | None = None,
        precision: torch.dtype | None = None,
    ) -> Tensor:
        """LM head on `final` states [..., H]: logits [..., V], or [..., D] over the given token
        ids.

        The rows of the vocabularies in use are cached, so a trimmed draft head costs D rows, not V.
        They are computed at `precision`, the drafter's, where that is lower than the target's.
        """
        head = self.architecture.head
        coarse = precision is not None and precision.itemsize < self.dtype.itemsize
        trimmed = vocabulary_D is not None and isinstance(head, nn.Linear)
        hidden = hidden.to(precision if coarse and trimmed else self.dtype)
        if vocabulary_D is None:
            logits = head(hidden)
        elif not isinstance(head, nn.Linear):
            logits = head(hidden)[..., vocabulary_D]
        else:
            bias = None if head.bias is None else head.bias[vocabulary_D].to(hidden.dtype)
            logits = narrow_linear(hidden, self._head_rows(vocabulary_D, hidden.dtype), bias)
        return self.capped(logits.to(hidden.device))

    def unrounded_logits(self, hidden: Tensor, vocabulary_D: Tensor | None = None) -> Tensor:
        """`logits` computed in float32 for a target of 16 bits, under autocast too: in bfloat16,
        logits of 16 to 32 have steps of an eighth. For wider targets the same as `logits`."""
        head = self.architecture.head
        if (
            self.dtype.itemsize > 2
            or not isinstance(head, nn.Linear)
            or not head.weight.is_floating_point()
        ):
            return self.logits(hidden, vocabulary_D)
        weight = head.weight if vocabulary_D is None else self._head_rows(vocabulary_D, self.dtype)
        wide, device = hidden.to(weight.device, torch.float32), hidden.device
        with torch.autocast(weight.device.type, enabled=False):
            # Only a part of the weights is in float32 at a time.
            logits = torch.cat(
                [wide @ rows.float().T for rows in weight.split(WIDENED_ROWS)], dim=-1
            )
        if head.bias is not None:
            logits += head.bias if vocabulary_D is None else head.bias[vocabulary_D]
        return self.capped(logits.to(device))

    def capped(self, logits: Tensor) -> Tensor:
        """Logits after the model's scale and soft cap, if it has them."""
        logits, cap = self.architecture.scaled(logits), self.architecture.softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _head_rows(self, vocabulary_D: Tensor, dtype: torch.dtype) -> Tensor:
        weight = self.architecture.head.weight
        if weight.requires_grad and torch.is_grad_enabled():
            return weight[vocabulary_D].to(dtype)
        # Cached rows are valid while vocabulary and weights do not change.
        state = (vocabulary_D._version, weight._version, weight.data_ptr(), weight.dtype)
        entry = self._sliced.get((id(vocabulary_D), dtype))
        if entry is None or entry[0] is not vocabulary_D or entry[1] != state:
            if len(self._sliced) >= SLICED_HEADS:
                self._sliced.clear()
            rows = weight[vocabulary_D].contiguous().to(vocabulary_D.device, dtype)
            entry = self._sliced[id(vocabulary_D), dtype] = (vocabulary_D, state, rows)
        return entry[2]

    def lm_head_rows(self, ids: Tensor) -> Tensor:
        """LM-head weight rows [..., H] of token ids (Clover's token vectors), with the model's
        scale of logits.
        """
        rows = torch.nn.functional.embedding(ids, self.architecture.head.weight)
        return self.architecture.scaled(rows)

    def copy_weight(self, name: str) -> Tensor:
        """A copy of one weight by its canonical name: `embed`, `lm_head`, `norm` or `layers.K.…` as
        the model has it (of a norm, the factor it multiplies by).

        Raises KeyError when the target has no such weight, ValueError when it is packed into few
        bits.
        """
        weight = self.architecture.weight(name)
        if not weight.is_floating_point():
            raise ValueError(
                f"the target's weight {name!r} is packed ({self.quantisation}): use dtype bfloat16"
            )
        return weight.detach().clone()

    def layer_weights(self, layer: int) -> list[str]:
        """Names of the weights of one layer, as in `copy_weight`, without `layers.K.`."""
        return self.architecture.layer_weights(layer)

    # -- forward passes ----------------------------------------------------------------------------

    def features(
        self,
        batch: TextBatch,
        names: Sequence[StateName],
        gradient: bool = False,
        auxiliary: AuxiliaryRows | None = None,
    ) -> dict[StateName, Tensor]:
        """States `{name: [B,T,H]}` of a packed batch, without a KV cache; with a gradient if
        `gradient` is set.

        Auxiliary rows come after the tokens: [B,T+P,H], and [B,T,H] below the layer where they
        enter.
        """
        if gradient:
            return self._features(batch, names, auxiliary)
        with torch.no_grad(), phase("target states"):
            return self._features(batch, names, auxiliary)

    def _features(
        self, batch: TextBatch, names: Sequence[StateName], auxiliary: AuxiliaryRows | None
    ) -> dict[StateName, Tensor]:
        embeddings, rows = self.embed(batch.input_ids), batch.rows()
        if auxiliary is None:
            return self.forward_rows(embeddings, rows, names)
        # Tokens do not see auxiliary rows: no gradient reaches them where the model does not learn.
        learns = any(parameter.requires_grad for parameter in self.model.parameters())
        if torch.is_grad_enabled() and not learns:
            return gradient_beside(self, embeddings, rows, names, auxiliary)
        return self.forward_beside(embeddings, rows, names, auxiliary)

    def open(self, batch_size: int, capacity: int) -> Session:
        """New sequences with an empty KV cache of `capacity` tokens each (at most
        `max_positions`).
        """
        if self._compiled is not None and batch_size == 1:
            return Session(self, self._compiled.open(capacity))
        whole = not self.architecture.recurrence.modules
        return Session(
            self,
            SlotCache(
                self.shape.num_layers, batch_size, capacity, self.layer_devices, apart=not whole
            ),
        )

    @property
    def compiled(self) -> CompiledCalls | None:
        """The compiled calls, if there are any."""
        return self._compiled

    def compile_calls(self, autotune: bool = False) -> None:
        """Run calls over trees of one sequence through `torch.compile` from the next `open` on.

        Raises:
            ValueError: a target that cannot be compiled whole.
        """
        if self.architecture.recurrence.modules:
            raise ValueError(
                f"compile: {self.name} has recurrent layers, whose states have no fixed place: "
                "leave it out"
            )
        if len(set(self.layer_devices)) > 1 or self.quantisation:
            raise ValueError(
                f"compile: {self.name} is {self.quantisation or 'on several devices'}: leave it "
                "out, or load the target on one device with a dtype of 16 bits or more"
            )
        self._compiled = CompiledCalls(self, autotune)

    def stop_compiling(self) -> None:
        """Run calls as before `compile_calls`, from the next `open` on."""
        self._compiled = None

    def forward_rows(
        self,
        hidden_BNH: Tensor,
        rows: Rows,
        names: Sequence[StateName],
        cache: SlotCache | None = None,
        layers: tuple[int, int] | None = None,
        rotary_RBN: Tensor | None = None,
    ) -> dict[StateName, Tensor]:
        """States `{name: [B,N,H]}` of one pass over rows.

        Args:
            hidden_BNH: input embeddings, or the input of a later first layer.
            rows: their positions and what they see.
            names: the states.
            cache: read, and written after the committed rows.
            layers: first layer, and the one before which the pass ends; None for all.
            rotary_RBN: positions of the rotary embedding, of one axis or three; None: those of the
                rows, behind images as far on as these ended.

        Raises:
            ValueError: rows that see chosen committed tokens alone, of a model with recurrent
                layers, whose state holds all of them.
        """
        if self.architecture.recurrence.modules and rows.committed_BS is not None:
            raise ValueError(
                f"{self.name} has recurrent layers, whose state holds the whole context: leave out "
                "what lets rows see chosen tokens alone"
            )
        # 1. Slots and mask; long texts have none of all pairs of tokens.
        if cache is not None:
            cache.begin(rows)
        parts = (
            cache is None
            and in_parts(rows)
            and uses_grouped_attention(self.model)
            and not self.architecture.has_chunks
        )
        hook = _long_texts(rows, self.architecture) if parts else current_hook()
        masked = (
            Rows(rows.position_ids_BN[:, :1], _NO_MASK.to(hidden_BNH.device)) if parts else rows
        )
        mask = self.architecture.mask(masked, cache, hidden_BNH)
        positions = rows.position_ids_BN.expand(hidden_BNH.shape[0], -1)
        if rotary_RBN is not None:
            positions = rotary_RBN[0] if len(rotary_RBN) == 1 else rotary_RBN
        elif cache is not None and cache.offsets_B is not None:
            positions = positions + cache.offsets_B[:, None]
        # 2. Run, and record the states.
        with (
            self.watching(names),
            self._restricted(layers, hidden_BNH),
            attending(hook),
            self.architecture.recurrence.reading(rows),
        ):
            states = self.layer_states(hidden_BNH, positions, mask, cache, names)
        return {
            name: state.to(hidden_BNH.device) for name, state in zip(names, states, strict=True)
        }

    def forward_beside(
        self,
        hidden_BNH: Tensor,
        rows: Rows,
        names: Sequence[StateName],
        auxiliary: AuxiliaryRows,
        cache: SlotCache | None = None,
    ) -> dict[StateName, Tensor]:
        """States `{name: [B,N+P,H]}` of one pass over rows followed by auxiliary rows.

        States below the layer where auxiliary rows enter are of the N rows alone.
        """
        return rows_beside(self, hidden_BNH, rows, names, auxiliary, cache)

    @contextmanager
    def _restricted(self, layers: tuple[int, int] | None, hidden_BNH: Tensor) -> Iterator[None]:
        """Run a pass through these layers alone: the others return their input, and the first one
        reads `hidden_BNH`."""
        if layers is None:
            yield
            return
        whole, (start, stop) = self.architecture.layers, layers
        chosen = [layer if start <= k < stop else _Skip() for k, layer in enumerate(whole)]
        hook = None
        if start:
            # The model may scale embeddings; the input of a later layer is not one.
            hook = chosen[start].register_forward_pre_hook(
                _replace_hidden(hidden_BNH), with_kwargs=True, prepend=True
            )
        self.architecture.layers = nn.ModuleList(chosen)
        try:
            yield
        finally:
            self.architecture.layers = whole
            if hook is not None:
                hook.remove()

    def layer_states(
        self,
        embeddings_BNH: Tensor,
        position_ids_BN: Tensor,
        mask: Any,
        cache: Any,
        names: Sequence[StateName],
    ) -> list[Tensor]:
        """States of one pass through the stock layers, in the order of `names`; to be called while
        `watching` them.
        """
        final = self.architecture.decoder(
            inputs_embeds=embeddings_BNH,
            position_ids=position_ids_BN,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        self._seen.setdefault("pre_norm", final)
        return [final if name == "final" else self._seen[name] for name in names]

    @contextmanager
    def watching(self, names: Sequence[StateName]) -> Iterator[None]:
        """Record the states of these names while the block lasts."""
        valid: list[StateName] = [*range(self.shape.num_layers), "pre_norm", "final"]
        wrong = [name for name in names if name not in valid]
        if wrong:
            raise ValueError(
                f"state {wrong[0]!r} is not one of 0 … {self.shape.num_layers - 1}, 'pre_norm', "
                "'final'"
            )
        self._wanted, self._seen = frozenset(names), {}
        try:
            yield
        finally:
            self._wanted, self._seen = frozenset(), {}

    # -- recording states --------------------------------------------------------------------------

    def _watch(self) -> None:
        for k, layer in enumerate(self.architecture.layers):
            layer.register_forward_pre_hook(self._at_layer(k), with_kwargs=True)
        if self.architecture.norm is not None:
            self.architecture.norm.register_forward_pre_hook(self._at_norm)

    def _at_layer(self, k: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if k in self._wanted:
                self._seen[k] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _at_norm(self, _: nn.Module, args: tuple) -> None:
        if "pre_norm" in self._wanted:
            self._seen["pre_norm"] = args[0]


def _long_texts(rows: Rows, architecture: Architecture) -> AttentionHook:
    """The attention of texts that are too long for one mask."""
    assert isinstance(rows, DocumentRows)

    def attend(call: LayerAttention) -> Tensor:
        window = architecture.window(call.layer)
        mixed = document_attention(
            call.query_BQND, call.key_BKSD, call.value_BKSD, rows, call.scaling, window
        )
        return mixed.transpose(1, 2).contiguous()

    return attend


def _use_exact_experts(model: Any) -> None:
    """Experts one by one in float64, for which the library's grouped kernel does not exist."""
    if model.dtype == torch.float64 and type(model)._can_set_experts_implementation():
        model.set_experts_implementation("eager")


def _sharing_weights(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _replace_hidden(hidden_BNH: Tensor) -> Callable[..., tuple[tuple, dict]]:
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (hidden_BNH, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden_BNH}

    return hook
