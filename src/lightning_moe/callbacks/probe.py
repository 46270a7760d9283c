"""How much the routers have changed: the same hidden states, routed at two logs."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_moe.calibration import evaluating
from lightning_moe.metrics import routing_overlap
from lightning_moe.routers import Router
from lightning_moe.routing import Routing, is_recomputing

_TOKENS = 128


class SelectionProbe:
    """Keeps some hidden states of each router at one log, and routes them again at the next.

    Inside the router's own forward, where a sharded router has its weights, and in evaluation mode, so that no noise is
    drawn. A router that needs more than hidden states (token ids, the logits of the layer before) is left out.

    Args:
        routers: by the name of their layer.
    """

    def __init__(self, routers: Mapping[str, Router]) -> None:
        self._routers = {
            name: router
            for name, router in routers.items()
            if not (router.uses_token_ids or router.uses_previous_logits)
        }
        self._kept: dict[str, tuple[Tensor, Routing]] = {}
        self._changed: dict[str, Tensor] = {}
        self._waiting: set[str] = set()
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Listens to the routers."""
        self._handles = [
            router.register_forward_pre_hook(partial(self._look, name)) for name, router in self._routers.items()
        ]

    def detach(self) -> None:
        """Ends it."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._kept, self._waiting = [], {}, set()

    def look(self) -> None:
        """Looks at the next forward of each router."""
        self._waiting = set(self._routers)

    def totals(self, device: torch.device) -> Tensor:
        """Of each layer in a row: the sum over tokens of the share of choices that changed, and the tokens; (L, 2)."""
        found = [self._changed.pop(name, torch.zeros(2)).to(device, torch.float64) for name in self._routers]
        return torch.stack(found) if found else torch.zeros(0, 2, dtype=torch.float64, device=device)

    @property
    def names(self) -> list[str]:
        """The layers whose routers it looks at."""
        return list(self._routers)

    @torch.compiler.disable
    @torch.no_grad()
    def _look(self, name: str, router: Router, given: tuple[Any, ...]) -> None:
        if name not in self._waiting or is_recomputing():
            return
        self._waiting.discard(name)
        x, mask = given[0].detach(), getattr(given[1] if len(given) > 1 else None, "mask", None)
        x = (x if mask is None else x[mask])[:_TOKENS].clone()
        with evaluating(router):
            # the hook runs once more, and waits for nothing any more
            route: Callable[[Tensor], Routing] = router
            if name in self._kept:
                before = self._kept[name]
                overlap, counts = routing_overlap(route(before[0]), before[1])
                changed = torch.where(counts, 1 - overlap, 0)
                self._changed[name] = torch.stack([changed.sum(), counts.sum()]).double()
            self._kept[name] = (x, route(x).detach())
