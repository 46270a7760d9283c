"""What an initialiser is, and the functions that initialisers share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNFamily, FFNWeights
from lightning_moe.routers import Router


@dataclass(frozen=True)
class FFNStates:
    """What passed through one dense FFN on the calibration batches, padding left out.

    Args:
        batches: hidden states that reached the FFN, one tensor for each batch; empty where no initialiser asked for it.
        saliency: ``h * dL/dh`` of each neuron's activation h, the first-order change of the loss if it were 0, for the
            tokens of all batches; None where no initialiser asked for it.
    """

    batches: Sequence[Float[Tensor, "_ D"]]
    saliency: Float[Tensor, "T F"] | None = None

    @property
    def inputs(self) -> Float[Tensor, "T D"]:
        """The hidden states of all batches."""
        return torch.cat(list(self.batches))

    def to(self, device: torch.device | str) -> "FFNStates":
        """The same on another device."""
        saliency = None if self.saliency is None else self.saliency.to(device)
        return FFNStates([batch.to(device) for batch in self.batches], saliency)


class ExpertInit(ABC):
    """Fills the experts of one layer from the dense FFN that they replace.

    Every argument of ``__init__`` is kept unchanged under its own name.
    """

    copies_dense: ClassVar[bool] = False
    """Every expert computes exactly what the dense FFN does."""

    needs_inputs: ClassVar[bool] = False
    """Looks at hidden states of a calibration batch, see `upcycle`."""

    needs_saliency: ClassVar[bool] = False
    """Looks at gradients of the loss on the calibration batches; for a causal language model these need no labels."""

    routes_nothing: ClassVar[bool] = False
    """At step 0 the routed experts add nothing, whatever the router does."""

    def for_model(self, model: nn.Module, names: Sequence[str], family: FFNFamily | None) -> "ExpertInit":
        """The initialiser for one model, before anything of it is changed; most are the same for all.

        Args:
            model: still dense.
            names: of the FFNs that will be replaced.
            family: what these were looked for as, see `find_ffns`.

        Raises:
            ValueError: if it does not fit the model.
        """
        return self

    def for_layer(self, name: str) -> "ExpertInit":
        """The initialiser of one layer, by its name in the model; most are the same for all."""
        return self

    def expert_size(self, dense_size: int, num_experts: int, num_shared: int = 0) -> int:
        """The width of one expert, for a dense FFN of width ``dense_size``.

        Raises:
            ValueError: if the FFN cannot be shared out so.
        """
        return dense_size

    def shared_size(self, dense_size: int, num_experts: int, num_shared: int) -> int:
        """The width of one shared expert."""
        return dense_size

    def new_experts(self, num_experts: int, expert_size: int, dense: FFNWeights) -> Experts:
        """Makes the layer's experts, yet without weights: on the meta device. A frozen FFN becomes frozen experts."""
        return trainable_like(dense, experts_like(dense, num_experts, expert_size, Experts))

    def scales(self, weights_sum: float, num_experts: int, num_shared: int) -> tuple[float, float]:
        """What the outputs of the routed and of the shared experts are to be multiplied by, to be one dense FFN's.

        Args:
            weights_sum: what a token's combine weights sum to.
            num_experts: E.
            num_shared: number of shared experts.
        """
        # the shared experts together count S times, the routed ones together as often as their weights say
        whole = num_shared + weights_sum
        return 1 / whole, 1 / whole

    def init_router(self, router: Router, generator: torch.Generator) -> None:
        """Changes the router to what the experts need of it; most need nothing."""
        return

    def step_zero(self, router: Router) -> tuple[bool, str]:
        """Whether the experts together compute the dense FFN at step 0, and why, or why not.

        What the router's weights sum to is not the question here: `upcycle` asks the router.
        """
        name = type(self).__name__
        return (True, "every expert is a copy") if self.copies_dense else (False, f"{name} changes the experts")

    @abstractmethod
    def __call__(
        self, experts: Experts, dense: FFNWeights, generator: torch.Generator, states: FFNStates | None
    ) -> None:
        """Writes the experts' parameters in place.

        Args:
            experts: what `new_experts` made, uninitialised.
            dense: the weights of the FFN that they replace.
            generator: the layer's own source of random numbers, on the CPU.
            states: what passed through the FFN, for initialisers that need it.
        """

    def fill_shared(
        self, shared: Experts, dense: FFNWeights, generator: torch.Generator, states: FFNStates | None
    ) -> None:
        """Writes the parameters of the shared experts in place, after those of the others: mostly copies."""
        for expert in range(shared.num_experts):
            copy_neurons(shared, expert, dense, slice(None))

    def finish(self, model: nn.Module) -> None:
        """Changes what is not an expert, once all layers are in; most change nothing."""
        return


def experts_like(dense: FFNWeights, num_experts: int, expert_size: int, kind: Callable[..., Experts]) -> Experts:
    """Makes experts of the layout of a dense FFN, on the meta device.

    Args:
        dense: the FFN.
        num_experts: how many.
        expert_size: how wide each is.
        kind: their class, or one with more arguments bound.
    """
    return kind(
        num_experts,
        dense.hidden_size,
        expert_size,
        activation=dense.activation,
        gated=dense.gate is not None,
        up_bias=dense.up_bias is not None,
        down_bias=dense.down_bias is not None,
        inner_dropout=dense.inner_dropout,
        device="meta",
        dtype=dense.up.dtype,
    )


def trainable_like(dense: FFNWeights, experts: Experts) -> Experts:
    """Freezes experts where the dense FFN is frozen."""
    return experts.requires_grad_(any(source.requires_grad for _, source in dense.sources))


@torch.no_grad()
def copy_neurons(experts: Experts, expert: int, dense: FFNWeights, neurons: Int[Tensor, " F"] | slice) -> None:
    """Makes one expert of some of the dense FFN's neurons; the down projection's bias goes along whole.

    Args:
        experts: whose weights are written.
        expert: which one.
        dense: the FFN.
        neurons: rows of the up projection, as many as the expert is wide.
    """
    up, gate = dense.up[neurons], None if dense.gate is None else dense.gate[neurons]
    write(experts.first_proj[expert], [up] if gate is None else [gate, up])
    experts.down_proj[expert].copy_(dense.down[:, neurons])
    if experts.first_proj_bias is not None:
        biases = [dense.up_bias] if dense.gate is None else [dense.gate_bias, dense.up_bias]
        write(experts.first_proj_bias[expert], [bias[neurons] for bias in biases if bias is not None])
    if experts.down_proj_bias is not None and dense.down_bias is not None:
        experts.down_proj_bias[expert].copy_(dense.down_bias)


@torch.no_grad()
def write(target: Tensor, parts: Iterable[Tensor]) -> None:
    """Copies tensors one after the other into the rows of another, without a copy of them all in between."""
    start = 0
    for part in parts:
        target[start : start + len(part)].copy_(part)
        start += len(part)


def randn(shape: Iterable[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal numbers that are the same on every device and dtype."""
    return torch.randn(tuple(shape), generator=generator).to(like.device, like.dtype)


def gate_parameter(router: Router, num_experts: int) -> nn.Parameter | None:
    """The router's parameter with one row per expert; None if it has none."""
    gate = getattr(router, "gate", None)
    return gate if isinstance(gate, nn.Parameter) and gate.shape[0] == num_experts else None


@torch.no_grad()
def weighs_groups_evenly(router: Router, group_size: int) -> bool:
    """Whether each of some random tokens gives the same weight to all experts of a group, in training and evaluation.

    Args:
        router: one that reads hidden states; on the meta device it is believed.
        group_size: experts ``g * group_size`` and those that follow are group g.
    """
    gate = next(router.parameters(), torch.zeros(()))
    if gate.is_meta:
        return True
    x = torch.randn(64, router.hidden_size, generator=torch.Generator().manual_seed(0)).to(gate.device, gate.dtype)
    was_training = router.training
    try:
        for training in (True, False):
            with torch.random.fork_rng(devices=[]):
                routing = router.train(training)(x)
            table = routing.weights.new_zeros(64, router.num_experts // group_size, group_size)
            ffns = routing.expert_ids < router.num_experts
            rows = routing.token_ids[ffns] * router.num_experts + routing.expert_ids[ffns]
            table.view(-1).index_add_(0, rows, routing.weights[ffns])
            # up to a rounding of the gate's products
            if not torch.allclose(table, table.mean(-1, keepdim=True).expand_as(table), rtol=1e-4, atol=1e-7):
                return False
    finally:
        router.train(was_training)
    return True
