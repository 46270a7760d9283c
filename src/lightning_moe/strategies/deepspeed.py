"""DeepSpeed's ZeRO, set up for a Mixture of Experts."""

from typing import Any, Literal

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_moe.atomic import AtomicSave
from lightning_moe.blocks import moe_modules
from lightning_moe.checkpoints import RECIPE_KEY, kind_of, read_checkpoint, zero_layout
from lightning_moe.saving import check_recipe
from lightning_moe.strategies.zero_filling import fill_optimizer, fill_weights


class MoEDeepSpeedStrategy(AtomicSave, DeepSpeedStrategy):
    """DeepSpeed's ZeRO: optimizer states (stage 1), gradients (2) and parameters (3) are sharded over the ranks.

    With stage 3 a MoE layer is a leaf: its parameters are gathered together, whichever of its experts a rank's tokens
    go to. Under accumulation Lightning divides the loss by the number of batches and DeepSpeed does so once more, which
    makes the gradients that many times too small (Lightning issue 6170); here they are divided once. It runs on the CPU
    too, to try a configuration out, with ``DS_ACCELERATOR=cpu`` in the environment.

    Args:
        stage: of ZeRO, 0 to 3.
        kwargs: of `DeepSpeedStrategy`.

    Raises:
        MisconfigurationException: if DeepSpeed is not installed.
    """

    reads = ("zero",)

    def __init__(self, *, stage: Literal[0, 1, 2, 3] = 2, **kwargs: Any) -> None:
        # Lightning would ask the loader for it, which not every loader can tell; only DeepSpeed's own timing wants it
        kwargs.setdefault("logging_batch_size_per_gpu", 1)
        super().__init__(stage=stage, **kwargs)
        self._group_names: list[list[str]] = []

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads what DeepSpeed wrote with any stage, on any number of processes, and what any other strategy did.

        Raises:
            ValueError: if the checkpoint is of another module, or is none.
        """
        if self.load_full_weights or self._is_own(checkpoint_path):
            return super().load_checkpoint(checkpoint_path, weights_only)
        checkpoint = read_checkpoint(self.broadcast(str(checkpoint_path)))
        module = self.lightning_module
        assert module is not None
        weights, states = checkpoint.pop("state_dict"), checkpoint.pop("optimizer_states", [])
        check_recipe(module, checkpoint.get(RECIPE_KEY), weights)
        if missing := [name for name, _ in module.named_parameters() if name not in weights]:
            raise ValueError(f"{checkpoint_path} holds no {missing[0]}: it is not of {type(module).__name__}.")
        with torch.no_grad():
            fill_weights(module, weights, self.global_rank)
            if module.trainer.state.fn == TrainerFn.FITTING and states:
                fill_optimizer(self.optimizers[0], module, states[0], self._group_names, self.global_rank)
        return checkpoint

    def _is_own(self, path: Any) -> bool:
        if kind_of(path) != "zero":
            return False
        assert isinstance(self.config, dict)
        stage = self.config.get("zero_optimization", {}).get("stage", 0)
        return zero_layout(path) == (stage, self.world_size)

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> Any:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        if optimizer is not None:
            # DeepSpeed flattens the groups
            self._group_names = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    def setup_environment(self) -> None:
        """Also on the CPU, where Lightning refuses."""
        if isinstance(self.accelerator, CPUAccelerator):
            super(DeepSpeedStrategy, self).setup_environment()
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        """Also on the CPU, where Lightning looks for the numbers of GPUs."""
        if isinstance(self.accelerator, CPUAccelerator):
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()

    @property
    def root_device(self) -> torch.device:
        """With a number, which DeepSpeed asks for on the CPU too."""
        device = super().root_device
        return torch.device("cpu", self.local_rank) if device.type == "cpu" else device

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        from deepspeed.utils import set_z3_leaf_modules

        layers = {type(layer) for layer in moe_modules(model).values()}
        if self.zero_stage_3 and layers:
            set_z3_leaf_modules(model, list(layers))
        ready: nn.Module = super()._setup_model(model)
        return ready

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Does not let DeepSpeed divide what Lightning has divided."""
        result: Tensor = super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)
        return result
