"""FSDP2 for any LightningModule, with or without expert parallelism."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from lightning_moe.atomic import AtomicSave
from lightning_moe.blocks import sharding_units
from lightning_moe.expert_parallel import parallelize_experts


class MoEFSDP2Strategy(AtomicSave, ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2) for any LightningModule, without a ``configure_model`` of the user's.

    After the upcycling each decoder block that holds a MoE layer, and each of its siblings, becomes a unit that gathers
    its parameters for its own forward and backward; so do what is left of a Hugging Face model around them, and every
    other module that has parameters of its own. An expert is never a unit: one that no token of a rank goes to would
    make the ranks wait for each other, or drift. A module that shards itself in ``configure_model`` is left as it is.

    With expert parallelism the experts are not gathered: each rank of a group of ``expert_parallel_size`` keeps its
    share of them, and tokens travel instead, see `parallelize_experts`. The groups are of neighbouring ranks, so of one
    machine where they fit there; over the groups the experts are sharded as all else.

    Args:
        data_parallel_size: processes to shard over; ``"auto"`` takes all.
        expert_parallel_size: ranks that share the experts of a layer; 1 spreads none. Divides both the number of
            processes and that of the experts.
        reshard_after_forward: whether a unit lets go of its parameters between forward and backward, which saves memory
            and costs another gathering.
        save_distributed_checkpoint: whether each rank writes its shard into a directory; False gathers all on rank 0,
            which writes one file.
        process_group_backend: of ``torch.distributed``; None takes that of the device.
        timeout: of the process group.

    Raises:
        ValueError: if ``expert_parallel_size`` is below 1; at setup, if it divides neither the processes nor the
            experts, or if a layer cannot be spread.
        MisconfigurationException: at setup, if the LightningModule itself has a parameter, that no submodule holds.

    Example:
        >>> MoEFSDP2Strategy(save_distributed_checkpoint=False).reshard_after_forward
        True
    """

    def __init__(
        self,
        data_parallel_size: int | Literal["auto"] = "auto",
        *,
        expert_parallel_size: int = 1,
        reshard_after_forward: bool = True,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if expert_parallel_size < 1:
            raise ValueError(f"expert_parallel_size={expert_parallel_size}: wanted a number of ranks, 1 or more.")
        super().__init__(data_parallel_size, 1, save_distributed_checkpoint, process_group_backend, timeout)
        self.expert_parallel_size = expert_parallel_size
        self.reshard_after_forward = reshard_after_forward
        self.expert_mesh: DeviceMesh | None = None
        """The mesh of the experts, with the dimensions ``data`` and ``expert``; None without expert parallelism."""

    def setup_environment(self) -> None:
        """Makes the meshes, of all processes where nothing else was asked for."""
        processes = self.num_nodes * self.num_processes
        if self._data_parallel_size == "auto":
            self._data_parallel_size = processes
        if processes % self.expert_parallel_size:
            raise ValueError(
                f"expert_parallel_size={self.expert_parallel_size} does not divide the {processes} processes of this "
                "run; choose a divisor."
            )
        super().setup_environment()
        if self.expert_parallel_size > 1:
            shape = (processes // self.expert_parallel_size, self.expert_parallel_size)
            self.expert_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("data", "expert"))

    def setup(self, trainer: Any) -> None:
        """Shards the module, if it has not done so itself, and makes the optimizers."""
        module = self.lightning_module
        assert module is not None
        if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            self._shard(module)
            _check_sharded(module)
        if self.expert_mesh is not None:
            # torch's own does not add up norms over different meshes
            self.precision_plugin.clip_grad_by_norm = _clip_by_norm  # type: ignore[method-assign]
        if "configure_model" in module.__dict__:
            super().setup(trainer)
            return
        # Lightning asks for one that was overridden; by now there is nothing left to do in it
        hook = module.configure_model
        module.__dict__["configure_model"] = lambda: hook()
        try:
            super().setup(trainer)
        finally:
            del module.__dict__["configure_model"]

    def _shard(self, module: nn.Module) -> None:
        spread: set[nn.Parameter] = set()
        if self.expert_mesh is not None:
            groups = self.expert_mesh["data"]
            for layer in parallelize_experts(module, self.expert_mesh["expert"]).values():
                if groups.size() == 1:
                    spread.update(layer.experts.parameters())
                else:
                    _shard_over_groups(layer.experts, groups, self.reshard_after_forward)
        mesh = self.device_mesh["data_parallel"]
        for unit in sharding_units(module):
            fully_shard(
                unit, mesh=mesh, reshard_after_forward=self.reshard_after_forward, ignored_params=spread or None
            )


def _shard_over_groups(experts: nn.Module, mesh: DeviceMesh, reshard_after_forward: bool) -> None:
    def along(parameter: nn.Parameter) -> Shard:
        # not over the experts again where that can be: a rank has few of them, and the groups may be many
        return Shard(1 if parameter.dim() > 1 and parameter.shape[1] % mesh.size() == 0 else 0)

    fully_shard(experts, mesh=mesh, reshard_after_forward=reshard_after_forward, shard_placement_fn=along)


def _check_sharded(module: nn.Module) -> None:
    left = [name for name, parameter in module.named_parameters() if not isinstance(parameter, DTensor)]
    if left:
        raise MisconfigurationException(
            f"moe_fsdp2: {left[0]} is a parameter of {type(module).__name__} itself, or is shared by parts that are "
            "sharded apart, so the ranks would train different ones. Put it into a submodule whose forward uses it, or "
            "shard the module yourself in configure_model()."
        )


def _clip_by_norm(optimizer: Optimizer, clip_val: int | float) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_mesh.setdefault(parameter.grad.device_mesh, []).append(parameter)
    total = torch.linalg.vector_norm(torch.stack([_norm(p.grad for p in group) for group in by_mesh.values()]))
    for group in by_mesh.values():
        clip_grads_with_norm_(group, clip_val, total)


def _norm(gradients: Iterable[Any]) -> Tensor:
    norm = get_total_norm(list(gradients))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
