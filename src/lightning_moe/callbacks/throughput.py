"""How fast training is: tokens, and the floating-point operations of the parameters that are active."""

import time
from collections.abc import Mapping

import torch
from jaxtyping import Float
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_moe.layer import RoutedLayer
from lightning_moe.operations import TokenOperations

_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16}


class Throughput:
    """Measures tokens per second, and from these the operations per second and their share of the device's peak.

    The operations are those of `TokenOperations`.

    Args:
        module: what is trained, before its parameters are sharded.
        layers: its MoE layers.
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, RoutedLayer]) -> None:
        self._operations = TokenOperations(module, layers)
        # of a sharded parameter the whole size is not known here
        self._known = all(parameter.numel() > 0 for parameter in module.parameters())
        self.start()

    def start(self) -> None:
        """Begins to count seconds."""
        self._since = time.perf_counter()
        self._paused: float | None = None

    def pause(self) -> None:
        """Stops the clock, as for validation."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Lets the clock run again."""
        if self._paused is not None:
            self._since += time.perf_counter() - self._paused
            self._paused = None

    def operations_per_token(self, active: Float[Tensor, " L"], sequence_length: int) -> float:
        """Floating-point operations per token of training.

        Args:
            active: experts that compute for a token, on average, in each layer.
            sequence_length: S.
        """
        return self._operations.training(active.tolist(), sequence_length)

    def measures(
        self, trainer: Trainer, module: LightningModule, tokens: float, active: Float[Tensor, " L"], length: int
    ) -> dict[str, float]:
        """What was reached since the last time, and begins anew.

        Args:
            trainer: knows the number of devices and the precision.
            module: knows the device.
            tokens: real tokens of all ranks since then.
            active: see `operations_per_token`.
            length: of a sequence.
        """
        seconds = max(time.perf_counter() - self._since, 1e-9)
        self.start()
        found = {"tokens_per_second": tokens / seconds}
        if self._known:
            flops = self.operations_per_token(active, length) * tokens / seconds / trainer.world_size
            found["tflops_per_second"] = flops / 1e12
            if peak := _peak(trainer, module):
                found["mfu"] = flops / peak
        return found


def _peak(trainer: Trainer, module: LightningModule) -> int | None:
    if module.device.type == "cpu":
        return None
    kind = str(trainer.precision).split("-")[0]
    return get_available_flops(module.device, _DTYPES.get(kind, torch.float32))
