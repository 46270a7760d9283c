"""Which experts come together, counted between two pictures."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_moe.metrics import chosen_experts, coactivation
from lightning_moe.routing import Routing

_MAX_LAYERS = 12


class Coactivation:
    """Counts pairs of experts of one token, in up to 12 layers spread over the depth of the model.

    Args:
        num_experts: of each layer, by name.
    """

    def __init__(self, num_experts: Mapping[str, int]) -> None:
        names = list(num_experts)
        stride = -(-len(names) // _MAX_LAYERS) if names else 1
        self._num_experts = {name: num_experts[name] for name in names[::stride]}
        self._together: dict[str, Tensor] = {}

    def add(self, name: str, routing: Routing) -> None:
        """Adds one forward of one layer."""
        if name in self._num_experts:
            chosen = chosen_experts(routing).float()
            # exact in float32 up to 16 million tokens of one forward
            pairs = (chosen.T @ chosen).double()
            self._together[name] = self._together[name] + pairs if name in self._together else pairs

    def shares(self, trainer: Trainer, device: torch.device) -> dict[str, Float[Tensor, "E E"]]:
        """How often expert j comes with expert i, over all ranks, in each layer; and begins anew."""
        found = {}
        for name, size in self._num_experts.items():
            pairs = self._together.get(name, torch.zeros(size, size, dtype=torch.float64)).to(device)
            found[name] = coactivation(trainer.strategy.reduce(pairs, reduce_op="sum"))
        self._together = {}
        return found

    def state_dict(self) -> dict[str, Any]:
        """The counts of this rank."""
        return dict(self._together)

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to counts of its own."""
        self._together = dict(state)

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on from saved counts."""
        self._together = {name: pairs.to(device) for name, pairs in state.items() if name in self._num_experts}
