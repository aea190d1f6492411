"""Strategies of several processes by name, with DeepSpeed's ZeRO stages on GPUs and CPUs.

The frozen target is not part of the module that a strategy wraps: it is replicated, never optimised
and never saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from checkpoints.pretrained import assign_weights
from modules.contracts.trainable import Trainable
from train.settings import DEEPSPEED

_COMPILED_COLLECTIVE = "deepspeed_shm_comm"
SUB_GROUP = 10**9
"""Parameters that stage 3 updates together."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, each tensor of the parameter's size."""


class ConsolidatedDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed with ordinary checkpoints: one file with whole weights and whole optimiser states.

    A drafter is small compared with its target (tens of millions to a few thousand millions of
    parameters), so its shards are gathered, one parameter at a time, in rank 0's host memory. Rank
    0 writes `last.ckpt` as any other strategy does: atomically (a kill leaves the previous file),
    readable without DeepSpeed, and able to resume on any number of processes, at any stage, under
    DDP or in a single process. DeepSpeed's own folder of shards has none of these properties, and
    its universal format would be a second conversion of the same numbers. The dynamic loss scale of
    float16 is not saved; it is found again within a few steps.
    """

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole float32 weights and the buffers, on rank 0; every rank takes part."""
        module = cast(nn.Module, self.lightning_module)
        state = {
            name: buffer.detach().cpu()
            for name, buffer in module.named_buffers()
            if name in _saved_names(module)
        }
        # Tied weights are gathered once and saved under all of their names.
        first: dict[int, str] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            shared = first.setdefault(id(parameter), name)
            if shared == name:
                self._collect(state, name, _whole(parameter))
            elif shared in state:
                state[name] = state[shared]
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """AdamW's state as `torch.optim.AdamW.state_dict` gives it without sharding, on rank 0."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[int, dict[str, Tensor]] = {}
        # Before the first step there is no state.
        steps = self._steps_taken()
        if steps is not None:
            self._link_optimiser_state()
        for index, parameter in enumerate(self._optimised) if steps is not None else ():
            moments = state.setdefault(index, {"step": cast(Tensor, steps).cpu().clone()})
            for key in _MOMENTS:
                self._collect(moments, key, safe_get_full_optimizer_state(parameter, key))
        return {"state": state, "param_groups": self._numbered_groups()}

    def _collect(self, into: dict[Any, Any], name: Any, tensor: Tensor | None) -> None:
        if self.is_global_zero and tensor is not None:
            into[name] = tensor.detach().cpu().clone()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write one file, from rank 0."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The content of the file, on every rank."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy the weights into every rank's shards, and into its float32 master weights."""
        from deepspeed.runtime.zero import GatheredParameters

        module, state = cast(nn.Module, self.lightning_module), checkpoint["state_dict"]
        # A gathered parameter is written by rank 0 and scattered again by DeepSpeed.
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                with GatheredParameters(
                    [parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")
                ):
                    parameter.copy_(state[name])
                self._scatter(parameter, state[name], None)
            for name, buffer in module.named_buffers():
                if name in state:
                    buffer.copy_(state[name])

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: the optimiser's states come from the checkpoint file."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Copy the optimiser's state into every rank's shards, and set the learning rates."""
        # 1. Learning rates of the groups.
        saved = checkpoint["optimizer_states"][0]
        base = self._zero.optimizer
        for group, entry in zip(base.param_groups, saved["param_groups"], strict=True):
            group["lr"], group["initial_lr"] = entry["lr"], entry.get("initial_lr", entry["lr"])
        if not saved["state"]:
            return
        # 2. Empty states of the flat shards, which parameters then link to.
        for flat in self._flat_parts():
            blank = {key: torch.zeros_like(flat) for key in _MOMENTS}
            base.state[flat] = {
                "step": saved["state"][0]["step"].to(flat.device, copy=True),
                **blank,
            }
        # 3. The saved moments of each parameter.
        self._link_optimiser_state()
        for index, parameter in enumerate(self._optimised):
            for key in _MOMENTS:
                self._scatter(parameter, saved["state"][index][key], key)

    # -- steps -------------------------------------------------------------------------------------

    @property
    def handles_gradient_accumulation(self) -> bool:
        """False: Lightning decides when to take an optimiser step, as under every other strategy.

        DeepSpeed's own count continues from one epoch to the next, and takes no step with the
        remaining batches at the end of an epoch.
        """
        return False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set DeepSpeed's flag: whether an optimiser step follows this batch."""
        loop = cast(Any, self.lightning_module).trainer.fit_loop
        self.deepspeed_engine.set_gradient_accumulation_boundary(not loop._should_accumulate())

    def block_backward_sync(self) -> Any:
        """No context for accumulated batches: DeepSpeed exchanges gradients by its own flag."""
        return nullcontext()

    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **options: Any
    ) -> Tensor:
        """Compute gradients; Lightning has already divided the loss by the number of accumulated
        batches.
        """
        loss = super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **options)
        if not self.deepspeed_engine.is_gradient_accumulation_boundary():
            self.deepspeed_engine.step()
        return loss

    def optimizer_step(
        self, optimizer: Optimizer, closure: Any, model: Any = None, **options: Any
    ) -> Any:
        """Take a step; DeepSpeed skips it by itself if its gradient is not finite, at every
        precision.
        """
        output = super().optimizer_step(optimizer, closure, model, **options)
        cast(Any, self.lightning_module).count_update(self.deepspeed_engine.was_step_applied())
        return output

    # -- DeepSpeed's parts -------------------------------------------------------------------------

    @property
    def _zero(self) -> Any:
        return self.deepspeed_engine.optimizer

    def _flat_parts(self) -> list[Tensor]:
        """This rank's flat float32 masters, per group (stages 1, 2) or sub-group (stage 3)."""
        name = (
            "fp32_partitioned_groups_flat"
            if self.zero_stage_3
            else "single_partition_of_fp32_groups"
        )
        return list(getattr(self._zero, name))

    def _steps_taken(self) -> Tensor | None:
        states = [self._zero.optimizer.state.get(flat, {}) for flat in self._flat_parts()]
        return next((state["step"] for state in states if "step" in state), None)

    @property
    def _optimised(self) -> list[nn.Parameter]:
        return cast(Any, self.lightning_module).optimised

    def _numbered_groups(self) -> list[dict[str, Any]]:
        """`param_groups` of a state dict, with parameters as numbers."""
        numbered, start = [], 0
        sizes = cast(Any, self.lightning_module).group_sizes
        for size, current in zip(sizes, self._zero.optimizer.param_groups, strict=True):
            settings = {
                key: value for key, value in current.items() if key != "params" and _plain(value)
            }
            numbered.append({**settings, "params": list(range(start, start + size))})
            start += size
        return numbered

    def _link_optimiser_state(self) -> None:
        """Link parameters of stages 1 and 2 to their part of the state.

        DeepSpeed links them when its first group has taken its first step; the other groups then
        have no state yet.
        """
        if not self.zero_stage_3:
            from deepspeed.utils import lazy_init_hp_params_optimizer_state

            for group, flat in zip(self._zero.bit16_groups, self._flat_parts(), strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, self._zero.optimizer.state)

    def _scatter(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Write this rank's part of a whole tensor: the master weight, or the optimiser's state
        `key`.
        """
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        # Stage 3 sets this rank's part, stages 1 and 2 pass the whole tensor.
        if not parameter.requires_grad:
            return
        value, sharded = value.to(self.root_device, torch.float32), self.zero_stage_3
        if sharded:
            value = _share(value, self.global_rank, self.world_size)
        if key is None:
            (safe_set_local_fp32_param if sharded else safe_set_full_fp32_param)(parameter, value)
        else:
            (safe_set_local_optimizer_state if sharded else safe_set_full_optimizer_state)(
                parameter, value, key
            )


class CpuDeepSpeedStrategy(ConsolidatedDeepSpeedStrategy):
    """DeepSpeed over gloo. Lightning's strategy refuses CPUs, but runs on them unchanged."""

    def setup_environment(self) -> None:
        """As the parent, without requiring a GPU."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """As the parent, without comparing GPU indices.

        DeepSpeed would first compile a shared-memory collective. A process killed during that
        leaves a lock on which every later run waits indefinitely; gloo does not need it.
        """
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__[_COMPILED_COLLECTIVE] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        """The CPU with an index, which DeepSpeed requires."""
        return torch.device("cpu", 0)


def _whole(parameter: nn.Parameter) -> Tensor:
    """A parameter gathered from its shards; the float32 master weight where there is one."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master
    with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict with weights gathered from their shards, on every process; all
    processes must call it.
    """
    from deepspeed.runtime.zero import GatheredParameters

    whole: dict[int, Tensor] = {}
    state = module.state_dict(keep_vars=True)
    for tensor in state.values():
        if id(tensor) not in whole:
            with GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                whole[id(tensor)] = tensor.detach().clone()
    return {name: whole[id(tensor)] for name, tensor in state.items()}


def unsharded(trainable: Trainable) -> Trainable:
    """The component, or for sharded weights (stage 3) a copy with whole ones, for use outside of
    training's forward passes.

    Sharded modules gather and release their weights in every call, and weights that are read
    without a call of their module are absent.
    """
    sharded = [parameter for parameter in trainable.parameters() if hasattr(parameter, "ds_id")]
    if not sharded:
        return trainable
    device = sharded[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        fresh = type(trainable)(**trainable.arguments)
    assign_weights(fresh, whole_weights(trainable), "what is trained")
    return fresh.to(device).train(trainable.training)


def _saved_names(module: nn.Module) -> set[str]:
    """Names in the module's state dict."""
    return set(nn.Module.state_dict(module))


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float, bool, str, tuple, type(None)))


def _share(value: Tensor, rank: int, world: int) -> Tensor:
    """The rank's part of a flattened tensor, padded with zeros to a multiple of the ranks."""
    flat = value.flatten()
    size = -(-len(flat) // world)
    return nn.functional.pad(flat, (0, size * world - len(flat)))[rank * size : (rank + 1) * size]


def check_shards(strategy: str, trainable: Trainable) -> None:
    """Raise ValueError if stage 3 cannot train this component."""
    match = DEEPSPEED.fullmatch(strategy)
    if match is not None and match[1] == "3" and trainable.uneven_calls:
        raise ValueError(
            f"trainer.strategy is {strategy}, but {trainable.uneven_calls}, and ZeRO stage 3 waits "
            "for all processes at every call of a module: use deepspeed_2 or ddp"
        )


def strategy_named(name: str, accelerator: str) -> str | Strategy:
    """A strategy for Lightning's Trainer.

    Offloaded states are updated by the same `torch.optim.AdamW` on the host: DeepSpeed requires its
    own compiled optimiser unless configured otherwise. Offloading has not been run on a GPU.

    Args:
        name: `deepspeed_1`, `deepspeed_2`, `deepspeed_3` (ZeRO stages; with `_offload`, the
            optimiser's state lives in host memory), or one of Lightning's own names.
        accelerator: `auto`, `cpu` or `cuda`.
    """
    match = DEEPSPEED.fullmatch(name)
    if match is None:
        return name
    # A name of ours: the ZeRO stage, on a GPU optionally with offloading.
    cuda = accelerator != "cpu" and torch.cuda.is_available()
    options: dict[str, Any] = {
        "stage": int(match[1]),
        "logging_batch_size_per_gpu": 1,
        "offload_optimizer": cuda and bool(match[2]),
        # Stage 3 updates one group at a time: without a limit all weights are copied at once.
        "sub_group_size": SUB_GROUP,
        "pin_memory": cuda,
    }
    if cuda:
        strategy: DeepSpeedStrategy = ConsolidatedDeepSpeedStrategy(**options)
        cast(Any, strategy.config)["zero_force_ds_cpu_optimizer"] = False
    else:
        strategy = CpuDeepSpeedStrategy(**options, process_group_backend="gloo")
    # Sums of gradients, over batches and processes, keep float32's digits under bf16-mixed. Those
    # over batches do not at stage 1: DeepSpeed would take another optimiser, with other parts.
    config = cast(Any, strategy.config)
    config["communication_data_type"] = "fp32"
    if match[1] != "1":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return strategy
