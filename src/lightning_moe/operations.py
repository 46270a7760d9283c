"""What one token uses of a model: parameters, and floating-point operations."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_moe.four_bit import Weight4bit
from lightning_moe.layer import RoutedLayer
from lightning_moe.receipt import num_parameters


class TokenOperations:
    """Counts the floating-point operations of a token.

    A forward takes ``2 * N + 4 * num_layers * D * S``, training ``6 * N + 12 * num_layers * D * S``: a parameter that a
    token is multiplied with takes two in the forward and four in the backward, or two where it is frozen; the second
    term is attention. N counts what is active: of the experts those that compute, of embeddings none but one that is
    the output layer too.

    Reference: Chowdhery et al., *PaLM*, 2022, appendix B, https://arxiv.org/abs/2204.02311. An estimate: a frozen part
    with nothing trainable before it takes less, and an attention window less; recomputed activations take one forward
    more.

    Args:
        module: the model, or what holds it, before its parameters are sharded.
        layers: its MoE layers.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3, bias=False))
        >>> operations = TokenOperations(model, {})
        >>> operations.forward([], sequence_length=8), operations.training([], sequence_length=8)
        (24.0, 72.0)
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, RoutedLayer]) -> None:
        multiplied = _multiplied(module)
        sizes = [layer.parameters_per_expert for layer in layers.values()]
        costs = [max(map(_operations, layer.experts.parameters())) for layer in layers.values()]
        totals = [layer.num_experts * size for layer, size in zip(layers.values(), sizes, strict=True)]
        self._forward = [2 * size for size in sizes]
        self._training = [cost * size for cost, size in zip(costs, sizes, strict=True)]
        four_bit = sum(part.numel() for part in module.modules() if isinstance(part, Weight4bit))
        experts = sum(cost * total for cost, total in zip(costs, totals, strict=True))
        self._fixed_forward = 2 * (sum(p.numel() for p in multiplied) + four_bit - sum(totals))
        self._fixed_training = sum(_operations(p) * p.numel() for p in multiplied) + 4 * four_bit - experts
        self._attention = _attention_width(module)

    def forward(self, active: Sequence[int | float], sequence_length: int) -> float:
        """Operations per token of a forward.

        Args:
            active: experts that compute for a token, on average, in each layer.
            sequence_length: S.
        """
        routed = sum(number * cost for number, cost in zip(active, self._forward, strict=True))
        return float(self._fixed_forward + routed + 4 * self._attention * sequence_length)

    def training(self, active: Sequence[int | float], sequence_length: int) -> float:
        """Operations per token of a forward and a backward; the arguments are those of `forward`."""
        routed = sum(number * cost for number, cost in zip(active, self._training, strict=True))
        return float(self._fixed_training + routed + 12 * self._attention * sequence_length)


def experts_per_token(layer: RoutedLayer) -> float:
    """How many experts compute for a token, shared ones left out; routers of Hugging Face call it ``top_k``."""
    router: Any = layer.router
    return float(getattr(router, "experts_per_token", None) or router.top_k)


def active_parameters(model: nn.Module, layers: Mapping[str, RoutedLayer]) -> int:
    """The parameters that one token uses: all, but for the experts that it is not sent to."""
    idle = (layer.parameters_per_expert * (layer.num_experts - experts_per_token(layer)) for layer in layers.values())
    return num_parameters(model) - sum(map(round, idle))


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
