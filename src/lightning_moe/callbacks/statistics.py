"""What is counted of each layer's routing between two logs, and the measures made of it."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_moe.metrics import load_entropy, max_violation, num_dead_experts, router_margin, token_entropy
from lightning_moe.routing import Routing, expert_load

_SUMS = ("forwards", "tokens", "entropy", "margin", "margins", "assignments", "dropped", "computed")


class RoutingStatistics:
    """Sums over the forwards of each layer: the load, and what the measures are means of; all exact, in float64.

    Args:
        num_experts: of each layer, by name.
        losses: the names of each layer's balance losses.
    """

    def __init__(self, num_experts: Mapping[str, int], losses: Mapping[str, Collection[str]]) -> None:
        self.num_experts = dict(num_experts)
        self.losses = dict(losses)
        self.loss_names = list(dict.fromkeys(name for names in losses.values() for name in names))
        self._load: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, routing: Routing, losses: Mapping[str, Tensor]) -> None:
        """Adds one forward of one layer."""
        entropy, tokens = token_entropy(routing)
        margins, has_margin = router_margin(routing)
        counted, computed = routing.counted(), routing.computed()
        # in the order of _SUMS
        values = [
            torch.ones_like(entropy),
            tokens,
            entropy,
            margins.sum(),
            has_margin.sum(),
            counted.sum(),
            counted.new_zeros(()) if routing.dropped is None else (counted * routing.dropped).sum(),
            counted.sum() if computed is None else (counted * computed).sum(),
            *(losses.get(loss, torch.zeros_like(entropy)) for loss in self.loss_names),
        ]
        sums = torch.stack([value.detach().double() for value in values])
        load = expert_load(routing).double()
        self._load[name] = self._load[name] + load if name in self._load else load
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def reset(self) -> None:
        """Begins anew."""
        self._load, self._sums = {}, {}

    def totals(self, device: torch.device) -> Float[Tensor, "L columns"]:
        """All sums of this rank in one tensor, to be reduced at once: the load first, then the others."""
        width = max(self.num_experts.values())
        both = torch.zeros(len(self.num_experts), width + self._num_sums, dtype=torch.float64, device=device)
        for row, name in enumerate(self.num_experts):
            if name in self._load:
                both[row, : self._load[name].numel()] = self._load[name]
                both[row, width:] = self._sums[name]
        return both

    def split(self, totals: Float[Tensor, "L columns"]) -> tuple[Float[Tensor, "L E"], dict[str, Float[Tensor, " L"]]]:
        """Takes reduced totals apart: the load, nan where a layer has fewer experts; and the other sums by name."""
        width = max(self.num_experts.values())
        names, load = (*_SUMS, *self.loss_names), totals[:, :width].clone()
        for row, size in zip(load, self.num_experts.values(), strict=True):
            row[size:] = torch.nan
        return load, dict(zip(names, totals[:, width:].unbind(1), strict=True))

    def measures(self, load: Float[Tensor, "L E"], sums: Mapping[str, Tensor]) -> dict[str, Float[Tensor, " L"]]:
        """The measures of each layer, under the names they are logged by; nan where a layer has no such loss."""

        def mean(total: str, count: str) -> Tensor:
            return sums[total] / sums[count].clamp(min=1)

        losses = self.loss_names
        rows = [row[:size] for row, size in zip(load, self.num_experts.values(), strict=True)]
        return {
            "max_violation": torch.stack([max_violation(row) for row in rows]),
            "dead_experts": torch.stack([num_dead_experts(row) for row in rows]),
            "load_entropy": torch.stack([load_entropy(row) for row in rows]),
            "routing_entropy": mean("entropy", "tokens"),
            "router_margin": mean("margin", "margins"),
            "drop_rate": mean("dropped", "assignments"),
            **{name: torch.where(self._has(name, load.device), mean(name, "forwards"), torch.nan) for name in losses},
        }

    def _has(self, loss: str, device: torch.device) -> Tensor:
        return torch.tensor([loss in self.losses.get(name, ()) for name in self.num_experts], device=device)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The sums of this rank."""
        return {"load": dict(self._load), "sums": dict(self._sums)}

    def set_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Goes back to sums of its own."""
        self._load, self._sums = dict(state["load"]), dict(state["sums"])

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on from saved sums; those of other losses, or of an earlier version, do not add up with what comes."""
        if all(tensor.numel() == self._num_sums for tensor in state["sums"].values()):
            for own, saved in ((self._load, state["load"]), (self._sums, state["sums"])):
                own.update({name: tensor.to(device) for name, tensor in saved.items() if name in self.num_experts})

    @property
    def _num_sums(self) -> int:
        return len(_SUMS) + len(self.loss_names)
