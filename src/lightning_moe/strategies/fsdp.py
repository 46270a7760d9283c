"""FSDP1, the older of torch's two fully sharded engines."""

from typing import Any, Literal

import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.wrap import CustomPolicy

from lightning_moe.atomic import AtomicSave
from lightning_moe.blocks import moe_blocks, moe_modules
from lightning_moe.quantization import four_bit_weights


class MoEFSDPStrategy(AtomicSave, FSDPStrategy):
    """Fully sharded data parallelism (FSDP1): wrapped at each MoE layer and at each block around one.

    An expert is never wrapped: one that no token of a rank goes to would make the ranks wait for each other, or drift.
    Clipping by norm, which Lightning refuses with FSDP1, is done by the engine. It runs on the CPU too, to try a
    configuration out. For new work take `MoEFSDP2Strategy`.

    Args:
        state_dict_type: ``"full"`` gathers all on rank 0, which writes one file; ``"sharded"`` writes a directory.
        kwargs: of `FSDPStrategy` and of torch's `FullyShardedDataParallel`; ``use_orig_params`` stays True.

    Raises:
        MisconfigurationException: if ``auto_wrap_policy`` is given, or ``use_orig_params`` is False; at setup, if there
            are weights in 4 bit.

    Example:
        >>> MoEFSDPStrategy(sharding_strategy="SHARD_GRAD_OP").sharding_strategy.name
        'SHARD_GRAD_OP'
    """

    reads = ("file", "model")

    def __init__(self, *, state_dict_type: Literal["full", "sharded"] = "full", **kwargs: Any) -> None:
        if kwargs.pop("auto_wrap_policy", None) is not None:
            raise MisconfigurationException(
                "moe_fsdp: what is wrapped is this strategy's to say. For a policy of your own take FSDPStrategy, and "
                "let it wrap MoELayer and never an expert."
            )
        if not kwargs.pop("use_orig_params", True):
            raise MisconfigurationException(
                "moe_fsdp: use_orig_params=False would flatten trained and frozen parameters into one. Leave it out."
            )
        self._units: set[int] = set()
        self._policy = CustomPolicy(lambda part: id(part) in self._units)
        super().__init__(state_dict_type=state_dict_type, auto_wrap_policy=self._policy, **kwargs)  # type: ignore[arg-type]
        # Lightning wants one for HYBRID_SHARD, and warns of one where the model is wrapped already, as ours will be
        del self.kwargs["auto_wrap_policy"]

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if four_bit_weights(model):
            raise MisconfigurationException(
                "moe_fsdp: FSDP1 flattens parameters of one dtype, and weights in 4 bit are bytes. Take moe_fsdp2 or "
                "moe_ddp, or leave quantize out."
            )
        if not any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
            self._units = {id(part) for part in (*moe_modules(model).values(), *moe_blocks(model))}
            model = FullyShardedDataParallel(
                model,
                auto_wrap_policy=self._policy,
                cpu_offload=self.cpu_offload,
                mixed_precision=self.mixed_precision_config,
                sharding_strategy=self.sharding_strategy,
                # Lightning gives the number of the device; the CPU has none
                device_id=self.root_device,
                **self.kwargs,
            )
        self.precision_plugin.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]
        wrapped: nn.Module = super()._setup_model(model)
        return wrapped

    def _clip_by_norm(self, optimizer: Any, clip_val: int | float) -> None:
        assert isinstance(self.model, FullyShardedDataParallel)
        self.model.clip_grad_norm_(clip_val)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Collects the weights, on the CPU as well."""
        if self.root_device.type != "cpu" or self._state_dict_type != "full":
            return super().lightning_module_state_dict()
        assert self.model is not None
        # torch's offloading to the CPU is none there: the tensors would be views of storage that is given back
        whole = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, whole):
            state: dict[str, Any] = self.model.state_dict()
            return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
