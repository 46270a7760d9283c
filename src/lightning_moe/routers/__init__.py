"""The catalogue of routers."""

from lightning_moe.routers.base import Router, top_k_assignment
from lightning_moe.routers.top_k import TopKRouter

ROUTERS: tuple[type[Router], ...] = (TopKRouter,)

__all__ = ["ROUTERS", "Router", "TopKRouter", "top_k_assignment"]
