"""How much the routers have changed: the same hidden states, routed at two logs."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_moe.calibration import evaluating
from lightning_moe.callbacks.base import on
from lightning_moe.layer import RoutedLayer
from lightning_moe.metrics import routing_overlap
from lightning_moe.native import NativeMoE
from lightning_moe.routing import Routing, is_recomputing

_TOKENS = 128


class SelectionProbe:
    """Keeps some hidden states of each router at one log, and routes them again at the next.

    Inside the router's own forward, where a sharded router has its weights, and in evaluation mode, so that no noise is
    drawn. A router that needs more than hidden states (token ids, the logits of the layer before) is left out.

    Args:
        layers: by name.
    """

    def __init__(self, layers: Mapping[str, RoutedLayer]) -> None:
        self._layers = {name: layer for name, layer in layers.items() if layer.routes_by_states}
        self._kept: dict[str, tuple[Tensor, Routing]] = {}
        self._changed: dict[str, Tensor] = {}
        self._waiting: set[str] = set()
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Listens to the routers."""
        self._handles = [
            layer.router.register_forward_pre_hook(partial(self._look, name)) for name, layer in self._layers.items()
        ]

    def detach(self) -> None:
        """Ends it."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._waiting = [], set()

    def look(self) -> None:
        """Looks at the next forward of each router."""
        self._waiting = set(self._layers)

    @property
    def kept(self) -> dict[str, tuple[Tensor, Routing]]:
        """The hidden states of the last log, and how they were routed then."""
        return dict(self._kept)

    def keep(self, kept: Mapping[str, tuple[Tensor, Routing]]) -> None:
        """Goes back to what ``kept`` was, and to nothing compared with it yet."""
        self._kept, self._changed = dict(kept), {}

    def totals(self, device: torch.device) -> Tensor:
        """Of each layer in a row: the sum over tokens of the share of choices that changed, and the tokens; (L, 2)."""
        found = [self._changed.pop(name, torch.zeros(2)).to(device, torch.float64) for name in self._layers]
        return torch.stack(found) if found else torch.zeros(0, 2, dtype=torch.float64, device=device)

    @property
    def names(self) -> list[str]:
        """The layers whose routers it looks at."""
        return list(self._layers)

    @staticmethod
    def to_state(kept: Mapping[str, tuple[Tensor, Routing]]) -> dict[str, Any]:
        """``kept`` as what a checkpoint can hold without pickled classes: up to 128 hidden states of each layer."""
        return {name: {"states": x, "routing": vars(routing)} for name, (x, routing) in kept.items()}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Keeps what `to_state` gave."""
        known = {name: saved for name, saved in state.items() if name in self._layers}
        self.keep(
            {
                name: (on(saved["states"], device), Routing(**on(saved["routing"], device)))
                for name, saved in known.items()
            }
        )

    @torch.compiler.disable
    @torch.no_grad()
    def _look(self, name: str, router: nn.Module, given: tuple[Any, ...]) -> None:
        if name not in self._waiting or is_recomputing():
            return
        self._waiting.discard(name)
        layer = self._layers[name]
        x = given[0].detach().reshape(-1, given[0].shape[-1])
        tokens = layer.tokens(len(x)) if isinstance(layer, NativeMoE) else given[1]
        mask = None if tokens is None else tokens.mask
        x = (x if mask is None else x[mask])[:_TOKENS].clone()
        with evaluating(router):
            # the hook runs once more, and waits for nothing any more
            if name in self._kept:
                before = self._kept[name]
                overlap, counts = routing_overlap(layer.route(before[0]), before[1])
                changed = torch.where(counts, 1 - overlap, 0)
                self._changed[name] = torch.stack([changed.sum(), counts.sum()]).double()
            self._kept[name] = (x, layer.route(x).detach())
