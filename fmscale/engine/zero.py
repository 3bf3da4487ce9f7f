"""DeepSpeed ZeRO 1, 2 and 3 behind five verbs: forward, backward, step, pieces, refresh.

This file alone knows DeepSpeed. It knows nothing of images, text or flow.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fmscale.distributed import World, free_port, rank_environment, world_from_environment
from fmscale.engine.optim import EMA_PREFIX, AdamWEMA
from fmscale.engine.sharding import check_raw
from fmscale.engine.tail import Tail
from fmscale.errors import UserError

WEIGHT = "weight"
Fill = Callable[[str, Tensor], object]


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that this rank owns.

    Attributes:
        name: of the parameter, as in the model's `named_parameters`.
        start: of the piece in the flattened parameter.
        tensors: live views, 1-D fp32, all of the same length: `weight`, `exp_avg`, `exp_avg_sq` and the averages.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]


def init_process_group(world: World) -> None:
    """Join the job's process group, for as long as this process lives: NCCL on GPUs, gloo on CPUs.

    DeepSpeed keeps groups of its own across engines, so a second group in one process would not work.

    Raises:
        RuntimeError: the other ranks could not be found.
    """
    if torch.distributed.is_initialized():
        return
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if world.world_size == 1 and "MASTER_ADDR" not in os.environ:
        os.environ.update(rank_environment(world, "127.0.0.1", free_port()))
    os.environ.setdefault("RANK", str(world.rank))
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    os.environ.setdefault("WORLD_SIZE", str(world.world_size))
    import deepspeed

    # On a CPU DeepSpeed would compile a shared-memory collective, for up to two minutes; gloo needs none.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    deepspeed.init_distributed("nccl" if world.device.type == "cuda" else "gloo", verbose=False)
    atexit.register(torch.distributed.destroy_process_group)


def deepspeed_config(
    zero_stage: int, dtype: str, micro_batch: int, offload: str = "none", raw: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The settings DeepSpeed runs with.

    Args:
        zero_stage: 1, 2 or 3.
        dtype: `bf16` or `fp32`.
        micro_batch: images per rank and backward.
        offload: `optimizer` keeps fp32 weights, moments and averages in host memory, `none` on the device.
        raw: DeepSpeed's own settings, laid over these.

    Raises:
        UserError: `raw` has a key that fmscale decides.
    """
    several_gpus = torch.cuda.is_available() and world_from_environment().world_size > 1
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,  # the loop says where a step ends: see `Engine.backward`
        "gradient_clipping": 0.0,  # `Tail` clips
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
        "zero_optimization": {
            "stage": zero_stage,
            "use_multi_rank_bucket_allreduce": False,  # reduce each rank's part to it, not everything to all
            "overlap_comm": several_gpus,  # costs a wait for the device after each backward pass
        },
    }
    if offload == "optimizer":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        config["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed would compile an AdamW of its own, without averages
    if dtype == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}  # `Tail` finds what is not finite
        if zero_stage > 1:  # under stage 1 fp32 accumulation would select an optimizer with unsharded gradients
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    check_raw(raw or {})
    return _laid_over(config, raw or {})


def _laid_over(config: dict[str, Any], raw: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    for key, value in raw.items():
        inner = config.get(key)
        if isinstance(inner, dict):
            if not isinstance(value, Mapping):
                raise UserError(f"engine.deepspeed: {within}{key} is a section; give a mapping, not {value!r}")
            value = _laid_over({**inner}, value, f"{key}.")
        config[key] = value
    return config


def gather_whole(module: nn.Module) -> None:
    """Let ZeRO-3 gather a module's parameters all at once, before it runs, by no hooks within it."""
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(module, True)


def _import_muon() -> None:
    """Import DeepSpeed's Muon, for which it looks in any optimizer, but leave its kernels as they are.

    They are marked for torch.compile, and to mark them imports all of it: seconds in every process.
    """
    from deepspeed.runtime import compiler

    marks = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = marks


class _Filling(nn.Module):
    """Gives the parameters of a model on the meta device one by one, and fills each when it is asked for.

    DeepSpeed goes through them, and keeps this rank's part of one before it takes the next.
    """

    def __init__(self, model: nn.Module, fill: Fill, dtype: torch.dtype) -> None:
        super().__init__()
        self._named = list(model.named_parameters())
        self._fill, self._dtype = fill, dtype

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As of any module; the optimizer, which has the same parameters, sees them filled too."""
        for name, parameter in self._named:
            values = torch.empty(parameter.shape)
            if torch.distributed.get_rank() == 0:  # whose values DeepSpeed sends to all
                self._fill(name, values)
            torch.utils.swap_tensors(parameter, nn.Parameter(values.to(self._dtype)))
            yield parameter


class Engine:
    """A model under ZeRO.

    Args:
        model: on any device, with fp32 weights; or, under stage 3, on the meta device.
        optimizer: over the model's parameters; under ZeRO it sees flat fp32 partitions.
        config: from `deepspeed_config`.
        clip_norm: largest global gradient norm, 0 for none.
        fill: writes a parameter's first values, fp32, given its name: for a model on the meta device, of which no rank
            ever holds more than its part and one parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AdamWEMA,
        config: dict[str, Any],
        clip_norm: float,
        fill: Fill | None = None,
    ) -> None:
        import deepspeed

        self.optimizer = optimizer
        self._shows_average = False
        self.stage: int = config["zero_optimization"]["stage"]
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.shapes = {
            name: tuple(p.shape) for name, p in zip(self.names, self.params, strict=True)
        }  # ZeRO-3 hides them
        _import_muon()
        if self.stage < 3:  # ZeRO-3 leaves one that cannot be differentiated forwards to all that follows in a process
            torch.nn.functional.linear = torch._C._nn.linear
        if fill is not None:
            dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
            deepspeed.zero.Init(module=_Filling(model, fill, dtype), config_dict_or_path=config)
        self.engine, self.zero, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for flat in self._flat_partitions():
            optimizer.init_state(flat)
        self.tail = Tail(self.zero, self.stage, self._flat_partitions(), optimizer, clip_norm, self.params[0].device)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model's forward pass."""
        return self.engine(*inputs, **named)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the loss's gradient, averaged over ranks, to the step's.

        Args:
            loss: scalar.
            last: True for the last micro-batch of the step; the number of them may change from step to step.
        """
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss)

    def step(self, lr: float, look: Callable[[dict[str, Tensor]], None] | None = None) -> Tensor:
        """Clip, update weights, moments and averages, and clear the gradients.

        Args:
            lr: learning rate.
            look: is shown this rank's pieces of the gradient by parameter, before clipping, flat and fp32, one
                partition after another; of a step that is not applied too.

        Returns:
            bool scalar, which the host need not wait for: False where a gradient was not finite on any rank. Then
            nothing was changed anywhere.
        """
        assert not self._shows_average, "the gradient is that of averaged weights; call `refresh` first"
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.optimizer.look = None if look is None else lambda flats: look(self._gradients(flats))
        self.engine.step()
        return self.tail.applied

    def tune(self, *, betas: tuple[float, float], eps: float, weight_decay: float, clip_norm: float) -> None:
        """Go on with other settings of the optimizer; arguments as of `AdamWEMA` and `Engine`."""
        for group in self.zero.param_groups:
            decay = weight_decay if group["decays"] else 0.0
            group.update(betas=betas, eps=eps, weight_decay=decay)
        self.tail.clip_norm = clip_norm

    @property
    def grad_norm(self) -> Tensor:
        """Global norm of the last step's gradient, before clipping; a scalar on the device."""
        return self.tail.norm

    @property
    def updates(self) -> int:
        """Optimizer updates that were applied so far."""
        return self.optimizer.updates(self._flat_partitions()[0])

    @updates.setter
    def updates(self, count: int) -> None:
        for flat in self._flat_partitions():
            self.optimizer.set_updates(flat, count)

    def pieces(self) -> Iterator[Piece]:
        """What this rank owns, parameter by parameter; the tensors are views, so writing to them restores state."""
        for name, (flat, offset, length, start) in self._places():
            state = {key: value for key, value in self.optimizer.state[flat].items() if key in self._state_names}
            tensors = {key: value.narrow(0, offset, length) for key, value in {WEIGHT: flat.detach(), **state}.items()}
            yield Piece(name, start, tensors)

    def _gradients(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """What this rank owns of the gradients of these fp32 tensors, by parameter: views of them."""
        wanted = {id(flat): flat.grad for flat in flats}
        places = ((name, wanted.get(id(flat)), offset, length) for name, (flat, offset, length, _) in self._places())
        return {name: grad.narrow(0, offset, length) for name, grad, offset, length in places if grad is not None}

    def _places(self) -> Iterator[tuple[str, tuple[Tensor, int, int, int]]]:
        """Parameter name, and (flat partition, offset in it, length, start in the parameter) of what this rank owns."""
        locate = self._locate_stage3 if self.stage == 3 else self._locate_stage12
        for name, param in zip(self.names, self.params, strict=True):
            if (place := locate(param)) is not None:
                yield name, place

    @property
    def _state_names(self) -> set[str]:
        state = self.optimizer.state[self._flat_partitions()[0]]
        return {"exp_avg", "exp_avg_sq"} | {key for key in state if key.startswith(EMA_PREFIX)}

    def _flat_partitions(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer works on."""
        if self.stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        return list(self.zero.single_partition_of_fp32_groups)

    def _locate_stage12(self, param: Any) -> tuple[Tensor, int, int, int] | None:
        """As in `_places`, or None where this rank owns nothing of the parameter."""
        mapping = param._hp_mapping
        if mapping is None:
            return None
        flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        return (
            flat,
            mapping.hp_fragment_address.start,
            mapping.hp_fragment_address.numel,
            mapping.lp_fragment_address.start,
        )

    def _locate_stage3(self, param: Any) -> tuple[Tensor, int, int, int] | None:
        group, offset, size = self.zero.grad_position[self.zero.get_param_id(param)]
        start = size * torch.distributed.get_rank()
        length = min(size, param.ds_numel - start)  # the last ranks hold padding
        return (self.zero.fp32_partitioned_groups_flat[group], offset, length, start) if length > 0 else None

    def refresh(self) -> None:
        """Bring the weights of the forward pass in line with the fp32 pieces, after these were written to."""
        self._show(lambda flat: flat)
        self._shows_average = False

    @contextmanager
    def averaged(self, kind: str) -> Iterator[None]:
        """The forward pass uses averaged weights while the block runs; afterwards all is as it was, to the bit.

        Only the weights of the forward pass change, which are a rounded copy of the fp32 ones; every rank enters. If
        the block raises, the averages stay where they are, and no step can be taken before a `refresh` on every rank:
        that is a collective, in which one rank that has failed would wait for others that are still in the block.

        Args:
            kind: name of the average, from `ema_names`.
        """
        self._shows_average = True
        self._show(lambda flat: self.optimizer.state[flat][kind])
        yield
        self.refresh()

    @torch.no_grad()
    def _show(self, source: Callable[[Tensor], Tensor]) -> None:
        """Make what `source` gives for each fp32 partition the weights of the forward pass."""
        if self.stage == 3:
            self._show_stage3(source)
            return
        from deepspeed.runtime.utils import all_gather_dp_groups

        rank = torch.distributed.get_rank()
        for partitions, flat in zip(self.zero.parallel_partitioned_bit16_groups, self._flat_partitions(), strict=True):
            partitions[rank].copy_(source(flat))
        all_gather_dp_groups(
            groups_flat=self.zero.bit16_groups_flat,
            partitioned_param_groups=self.zero.parallel_partitioned_bit16_groups,
            dp_process_group=self.zero.real_dp_process_group,
            start_alignment_factor=self.zero.nccl_start_alignment_factor,
            allgather_bucket_size=self.zero.allgather_bucket_size,
        )

    def _show_stage3(self, source: Callable[[Tensor], Tensor]) -> None:
        param: Any
        for param in self.params:
            group, offset, size = self.zero.grad_position[self.zero.get_param_id(param)]
            flat = self.zero.fp32_partitioned_groups_flat[group]
            param.ds_tensor.data.copy_(source(flat).narrow(0, offset, size))
        if persistent := self.zero.persistent_parameters:  # small ones, which stay whole on every rank between steps
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
