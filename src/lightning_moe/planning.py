"""One layer to be: planned in full, and filled from its dense FFN."""

import zlib
from dataclasses import dataclass

import torch

from lightning_moe.config import UpcycleConfig
from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNWeights
from lightning_moe.initializers import ExpertInit, FFNStates, experts_like, trainable_like
from lightning_moe.layer import MoELayer, plain_name
from lightning_moe.receipt import expert_similarity
from lightning_moe.routers import Router


@dataclass(frozen=True)
class LayerPlan:
    """A layer that lacks nothing but the experts' weights: they are on the meta device yet.

    Args:
        layer: with its router as it will be.
        init: fills the experts.
        generator: the layer's own source of random numbers.
        scale: what the routed experts' outputs are multiplied by.
        shared_scale: the same for the shared experts.
    """

    layer: MoELayer
    init: ExpertInit
    generator: torch.Generator
    scale: float
    shared_scale: float

    def fill(self, dense: FFNWeights, states: FFNStates | None) -> None:
        """Gives the experts memory and weights; nothing, if the dense FFN has none either."""
        if dense.up.is_meta:
            return
        experts, shared = self.layer.experts, self.layer.shared_experts
        # the activation may have weights of its own, which stay
        experts.to_empty(device=dense.up.device, recurse=False)
        self.init(experts, dense, self.generator, states)
        _scale_output(experts, self.scale)
        if shared is not None:
            shared.to_empty(device=dense.up.device, recurse=False)
            self.init.fill_shared(shared, dense, self.generator, states)
            _scale_output(shared, self.shared_scale)

    def similarity(self) -> float | None:
        """The mean cosine of the weights of two experts, see `expert_similarity`."""
        experts = self.layer.experts
        # copies are alike by what they are: to read all of their weights again takes longer than writing them
        if self.init.copies_dense and experts.num_experts > 1 and not experts.down_proj.is_meta:
            return 1.0
        return expert_similarity(experts)


def check_sizes(name: str, dense: FFNWeights, config: UpcycleConfig, init: ExpertInit) -> tuple[int, int]:
    """The widths of one expert and of one shared expert in the place of an FFN.

    Raises:
        ValueError: if the FFN cannot be shared out so; the message names it.
    """
    sizes = dense.expert_size, config.num_experts, config.num_shared_experts
    try:
        return init.expert_size(*sizes), init.shared_size(*sizes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def plan_layer(
    name: str, dense: FFNWeights, config: UpcycleConfig, init: ExpertInit, seed: int, states: FFNStates | None
) -> LayerPlan:
    """Plans the layer that will take the place of one FFN.

    Args:
        name: of the FFN in its model.
        dense: the FFN.
        config: what to make of it.
        init: the initialiser, of the whole model.
        seed: of the whole model.
        states: what passed through the FFN, for initialisers that need it.

    Raises:
        TypeError: if ``config.router`` makes no router.
        ValueError: if router or initialiser do not fit the FFN; the message names it.
    """
    if not name:
        raise ValueError("The model itself is one FFN; put it into a module, as nn.Sequential(ffn).")
    init = init.for_layer(name)
    generator = torch.Generator().manual_seed(layer_seed(seed, name))
    num_experts, num_shared = config.num_experts, config.num_shared_experts
    expert_size, shared_size = check_sizes(name, dense, config, init)
    try:
        router = _build_router(dense, config, generator, states, layer_seed(seed, name))
        init.init_router(router, generator)
        experts = init.new_experts(num_experts, expert_size, dense)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    layer = MoELayer(
        router,
        experts,
        shared_experts=trainable_like(dense, experts_like(dense, num_shared, shared_size, Experts))
        if num_shared
        else None,
        capacity_factor=config.capacity_factor,
        dropout=dense.dropout,
        name=name,
    )
    weights_sum = 1.0 if router.weights_sum is None else router.weights_sum
    return LayerPlan(layer, init, generator, *init.scales(weights_sum, num_experts, num_shared))


def layer_seed(seed: int, name: str) -> int:
    """The seed of one layer's own random numbers; that of a compiled layer is that of the plain one."""
    # crc32 and not hash(), which differs from process to process
    return (seed * 2654435761 + zlib.crc32(plain_name(name).encode())) % 2**63


def _build_router(
    dense: FFNWeights,
    config: UpcycleConfig,
    generator: torch.Generator,
    states: FFNStates | None,
    seed: int,
) -> Router:
    # The router draws from the global generator, as any module does: give it this layer's own numbers, then put the
    # global state back, so that upcycling shifts nobody else's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = config.router(dense.hidden_size, config.num_experts)
    if not isinstance(router, Router):
        raise TypeError(
            f"router={config.router!r} made a {type(router).__name__}, not a Router. Pass a Router class or a callable "
            "(hidden_size, num_experts) -> Router."
        )
    router = router.to(dense.up.device, dense.up.dtype)
    # without weights there are no hidden states either
    if config.router_init is not None and not (config.router_init.needs_inputs and dense.up.is_meta):
        config.router_init(router, generator, None if states is None else states.batches)
    return router


@torch.no_grad()
def _scale_output(experts: Experts, factor: float) -> None:
    if factor != 1:
        experts.down_proj.mul_(factor)
        if experts.down_proj_bias is not None:
            experts.down_proj_bias.mul_(factor)
