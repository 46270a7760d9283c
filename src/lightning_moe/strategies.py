"""Strategies that know what to shard of a Mixture of Experts, by class and by name: ``Trainer(strategy="moe_fsdp2")``.

The names are known once a part of this package that needs Lightning has been imported, as `MoEUpcycleCallback`.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_moe.layer import RoutedLayer


class MoEFSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2) for any LightningModule, without a ``configure_model`` of the user's.

    After the upcycling each decoder block that holds a MoE layer, and each of its siblings, becomes a unit that gathers
    its parameters for its own forward and backward; so do what is left of a Hugging Face model around them, and every
    other module that has parameters of its own. An expert is never a unit: one that no token of a rank goes to would
    make the ranks wait for each other, or drift. A module that shards itself in ``configure_model`` is left as it is.

    Args:
        data_parallel_size: processes to shard over; ``"auto"`` takes all.
        reshard_after_forward: whether a unit lets go of its parameters between forward and backward, which saves memory
            and costs another gathering.
        save_distributed_checkpoint: whether each rank writes its shard into a directory; False gathers all on rank 0,
            which writes one file.
        process_group_backend: of ``torch.distributed``; None takes that of the device.
        timeout: of the process group.

    Raises:
        MisconfigurationException: at setup, if the LightningModule itself has a parameter, that no submodule holds.

    Example:
        >>> MoEFSDP2Strategy(save_distributed_checkpoint=False).reshard_after_forward
        True
    """

    def __init__(
        self,
        data_parallel_size: int | Literal["auto"] = "auto",
        *,
        reshard_after_forward: bool = True,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(data_parallel_size, 1, save_distributed_checkpoint, process_group_backend, timeout)
        self.reshard_after_forward = reshard_after_forward

    def setup_environment(self) -> None:
        """Makes the mesh, of all processes where nothing else was asked for."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Any) -> None:
        """Shards the module, if it has not done so itself, and makes the optimizers."""
        module = self.lightning_module
        assert module is not None
        if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            mesh = self.device_mesh["data_parallel"]
            for unit in _units(module):
                fully_shard(unit, mesh=mesh, reshard_after_forward=self.reshard_after_forward)
            _check_sharded(module)
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


def _units(module: nn.Module) -> Iterator[nn.Module]:
    # inner ones first, as fully_shard wants it
    yielded: set[int] = set()

    def new(unit: nn.Module) -> Iterator[nn.Module]:
        if id(unit) not in yielded and any(True for _ in unit.parameters()):
            yielded.add(id(unit))
            yield unit

    for blocks in _block_lists(module):
        for block in blocks:
            yield from new(block)
    for path, layer in module.named_modules():
        if isinstance(layer, RoutedLayer) and not _parents(module, path) & yielded:
            yield from new(layer)
    models = {id(part) for part in module.modules() if isinstance(part, PreTrainedModel)}
    for path, part in module.named_modules():
        if id(part) in models and not _parents(module, path) & models:
            yield from new(part)
    for path, part in module.named_modules():
        has_own = any(True for _ in part.parameters(recurse=False))
        # whatever stands inside of a unit is sharded with it
        if part is not module and has_own and not _parents(module, path) & yielded:
            yield from new(part)


def _block_lists(module: nn.Module) -> list[nn.ModuleList]:
    # the innermost list around each MoE layer
    found: dict[int, nn.ModuleList] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, RoutedLayer):
            for above in reversed(list(_above(path))):
                part = module.get_submodule(above)
                if isinstance(part, nn.ModuleList):
                    found[id(part)] = part
                    break
    return list(found.values())


def _above(path: str) -> Iterator[str]:
    # the paths of all modules around this one, the outermost first
    parts = path.split(".")
    yield from (".".join(parts[:end]) for end in range(len(parts)))


def _parents(module: nn.Module, path: str) -> set[int]:
    return {id(module.get_submodule(above)) for above in _above(path)}


def _check_sharded(module: nn.Module) -> None:
    left = [name for name, parameter in module.named_parameters() if not isinstance(parameter, DTensor)]
    if left:
        raise MisconfigurationException(
            f"moe_fsdp2: {left[0]} is a parameter of {type(module).__name__} itself, or is shared by parts that are "
            "sharded apart, so the ranks would train different ones. Put it into a submodule whose forward uses it, or "
            "shard the module yourself in configure_model()."
        )


def register_strategies() -> None:
    """Makes the strategies known to Trainers by their names."""
    if "moe_fsdp2" not in StrategyRegistry.available_strategies():
        StrategyRegistry.register(
            "moe_fsdp2", MoEFSDP2Strategy, description="FSDP2 that shards a Mixture of Experts block by block"
        )


register_strategies()
