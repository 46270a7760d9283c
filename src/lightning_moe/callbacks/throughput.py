"""How fast training is: tokens, and the floating-point operations of the parameters that are active."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_moe.four_bit import Weight4bit
from lightning_moe.layer import RoutedLayer

_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16}


class Throughput:
    """Measures tokens per second, and from these the operations per second and their share of the device's peak.

    A token of training takes ``6 * N + 12 * num_layers * D * S`` operations: a parameter that it is multiplied with
    takes two in the forward and four in the backward, or two where it is frozen; the second term is attention. N counts
    what is active: of the experts those that computed, of embeddings none but one that is the output layer too.

    Reference: Chowdhery et al., *PaLM*, 2022, appendix B, https://arxiv.org/abs/2204.02311. An estimate: a frozen part
    with nothing trainable before it takes less, and an attention window less.

    Args:
        module: what is trained, before its parameters are sharded.
        layers: its MoE layers.
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, RoutedLayer]) -> None:
        self._per_expert = [
            layer.parameters_per_expert * max(map(_operations, layer.experts.parameters())) for layer in layers.values()
        ]
        all_experts = sum(layer.num_experts * per for layer, per in zip(layers.values(), self._per_expert, strict=True))
        four_bit = sum(4 * part.numel() for part in module.modules() if isinstance(part, Weight4bit))
        self._fixed = sum(_operations(p) * p.numel() for p in _multiplied(module)) + four_bit - all_experts
        self._attention = _attention_width(module)
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
        routed = sum(number * per for number, per in zip(active.tolist(), self._per_expert, strict=True))
        return float(self._fixed + routed + 12 * self._attention * sequence_length)

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


def _operations(parameter: nn.Parameter) -> int:
    return 6 if parameter.requires_grad else 4


def _multiplied(module: nn.Module) -> list[nn.Parameter]:
    # all but those that are only looked up
    used = {
        id(parameter)
        for part in module.modules()
        for parameter in part._parameters.values()
        if not isinstance(part, (nn.Embedding, Weight4bit))
    }
    return [parameter for parameter in module.parameters() if id(parameter) in used]


def _attention_width(module: nn.Module) -> int:
    # layers times channels of the first Hugging Face model inside, in whose configuration they stand
    for part in module.modules():
        config: Any = getattr(part, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        if hasattr(config, "num_hidden_layers") and hasattr(config, "hidden_size"):
            return int(config.num_hidden_layers * config.hidden_size)
    return 0


def _peak(trainer: Trainer, module: LightningModule) -> int | None:
    if module.device.type == "cpu":
        return None
    kind = str(trainer.precision).split("-")[0]
    return get_available_flops(module.device, _DTYPES.get(kind, torch.float32))
