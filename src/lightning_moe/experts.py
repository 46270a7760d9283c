"""Stacked expert weights and their compute: dispatch, grouped GEMM, combine.

The experts of a layer are three-dimensional tensors, never a list of modules: an expert without a token still gets a
(zero) gradient on every rank, so nothing hangs or drifts under DDP, FSDP and DeepSpeed. Beside the fast path stands
`Experts.loop`, the slow, obvious one, which is the reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_moe.four_bit import Weight4bit, linear, weight_of
from lightning_moe.routing import Routing


@dataclass(frozen=True)
class Dispatched:
    """The assignments in the order of their experts.

    Args:
        x: hidden states, one row per assignment, sorted by expert.
        order: the number of the assignment behind each row.
        expert_ids: the expert of each row, ascending.
        offsets: where each expert's rows end.
    """

    x: Float[Tensor, "N D"]
    order: Int[Tensor, " N"]
    expert_ids: Int[Tensor, " N"]
    offsets: Int[Tensor, " E"]


class Exchange(Protocol):
    """What stands between the tokens of a rank and the experts of a layer, where these live on several ranks."""

    def local(self, weight: Tensor) -> Tensor:
        """This rank's experts of a stacked weight."""

    def send(self, rows: Dispatched) -> tuple[Dispatched, Callable[[Tensor], Tensor]]:
        """Brings all ranks' rows to their experts.

        Returns:
            The rows of this rank's experts, and what brings these experts' outputs back into the order of ``rows``.
        """


def dispatch(x: Float[Tensor, "T D"], routing: Routing) -> Dispatched:
    """Copies each token to its experts, rows sorted by expert.

    What is dropped, or goes to no FFN, gets no row and costs no GEMM; finding out how many these are waits for the
    device.

    Args:
        x: hidden states of the tokens.
        routing: where they go.

    Returns:
        One row per computed assignment. Within one expert the rows keep the order of the tokens.

    Example:
        >>> routing = Routing(torch.arange(3), torch.tensor([2, 0, 2]), torch.ones(3), *torch.zeros(2, 3, 3), top_k=1)
        >>> dispatched = dispatch(torch.tensor([[1.0], [2.0], [3.0]]), routing)
        >>> dispatched.x.flatten().tolist(), dispatched.offsets.tolist()
        ([2.0, 1.0, 3.0], [1, 1, 3])
    """
    computed = routing.computed()
    if computed is None:
        expert_ids, order = torch.sort(routing.expert_ids, stable=True)
    else:
        rows = computed.nonzero().squeeze(1)
        expert_ids, order = torch.sort(routing.expert_ids.index_select(0, rows), stable=True)
        order = rows.index_select(0, order)
    experts = torch.arange(routing.num_experts, device=x.device, dtype=expert_ids.dtype)
    # a binary search in the sorted ids: deterministic, and no host sync, unlike bincount
    offsets = torch.searchsorted(expert_ids, experts, right=True).to(torch.int32)
    # index_select and not x[...]: its backward is an index_add_ and not the slower index_put_
    return Dispatched(x.index_select(0, routing.token_ids.index_select(0, order)), order, expert_ids, offsets)


def combine(y: Float[Tensor, "N D"], dispatched: Dispatched, routing: Routing) -> Float[Tensor, "T D"]:
    """Brings the experts' outputs back to their tokens and sums them by their weights, in float32.

    Args:
        y: experts' outputs in the order of ``dispatched``.
        dispatched: what `dispatch` returned.
        routing: the routing behind it. A token may have the same expert twice: both contributions add up.

    Returns:
        The weighted sum per token, in the dtype of ``y``; zeros for a token without an expert.
    """
    if routing.top_k is not None and routing.computed() is None:
        weights = routing.weights.view(-1, routing.top_k)
        return _CombineTopK.apply(y, weights, dispatched.order)  # type: ignore[no-any-return]
    weighted = y * routing.weights.index_select(0, dispatched.order).unsqueeze(-1)  # float32
    out = weighted.new_zeros(routing.num_tokens, y.shape[1])
    return out.index_add_(0, routing.token_ids.index_select(0, dispatched.order), weighted).to(y.dtype)


class _CombineTopK(torch.autograd.Function):
    # Same result as indexing in plain autograd, without its scatter-add and its saved float32 copy of y.
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, order)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        if y.dtype == weights.dtype:
            # gathers, weighs and sums in one pass
            return F.embedding_bag(inverse.view_as(weights), y, per_sample_weights=weights, mode="sum")
        per_token = y.index_select(0, inverse).view(*weights.shape, y.shape[1])  # (T, K, D)
        return (per_token * weights.unsqueeze(-1)).sum(1).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        y, weights, order = ctx.saved_tensors
        top_k = weights.shape[1]
        dtype = torch.promote_types(y.dtype, weights.dtype)
        grad = grad_out.index_select(0, order.div(top_k, rounding_mode="floor")).to(dtype)  # (N, D)
        grad_weights = torch.empty_like(weights.reshape(-1))
        grad_weights[order] = (torch.linalg.vecdot(grad, y) if y.dtype == dtype else (grad * y).sum(-1)).to(
            weights.dtype
        )
        grad_y = grad.mul_(weights.reshape(-1).index_select(0, order).unsqueeze(-1)).to(y.dtype)
        return grad_y, grad_weights.view_as(weights), None


class _SwiGLU(torch.autograd.Function):
    # silu(gate) * up of a fused (N, 2F) tensor. Plain autograd would keep silu(gate), one of the largest tensors of the
    # layer, and cat the two halves of the gradient; this computes silu anew and writes the gradient in place.
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        ctx.save_for_backward(gate_up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=grad_up)
        grad_up.mul_(grad)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate_up


def _is_silu(activation: Callable[[Tensor], Tensor]) -> bool:
    # transformers has its own SiLUActivation
    return activation is F.silu or type(activation).__name__ in ("SiLU", "SiLUActivation")


def _can_group(x: Tensor, weight: Tensor) -> bool:
    # What torch 2.13's kernel takes: three dtypes, rows whose stride is a multiple of 16 bytes; and no dimension of 0.
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or x.shape[0] == 0:
        return False
    return all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])


def grouped_linear(
    x: Float[Tensor, "N I"], weight: Float[Tensor, "E O I"], offsets: Int[Tensor, " E"]
) -> Float[Tensor, "N O"]:
    """Multiplies each expert's rows by that expert's weight: ``y[n] = weight[expert of n] x[n]``.

    One grouped GEMM where torch's kernel takes the dtype and the widths, a loop over the experts elsewhere.

    Args:
        x: rows sorted by expert.
        weight: one matrix per expert.
        offsets: where each expert's rows end.
    """
    if not _can_group(x, weight):
        return _loop_linear(x, weight, None, offsets)
    # TODO: drop _untraced_grouped_mm once torch traces its kernel in every dtype that it runs in
    grouped_mm = F.grouped_mm if x.dtype == torch.bfloat16 else _untraced_grouped_mm
    return grouped_mm(x, weight.transpose(1, 2), offs=offsets)


@torch.compiler.disable
def _untraced_grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    # torch 2.13 runs float32 and float16, and refuses to trace them: a graph break under torch.compile
    return F.grouped_mm(x, weight, offs=offs)


def _loop_linear(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    ends = offsets.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    # unbind and not weight[e]: indexing makes autograd add a full-size zero tensor per expert
    biases = [None] * len(weight) if bias is None else bias.unbind(0)
    return torch.cat([F.linear(*parts) for parts in zip(x.split(sizes), weight.unbind(0), biases, strict=True)])


def _linear(x: Tensor, weight: Tensor | Weight4bit, bias: Tensor | None, rows: Dispatched) -> Tensor:
    if isinstance(weight, Weight4bit):
        y = weight.multiply(x, partial(grouped_linear, offsets=rows.offsets))
        return y if bias is None else y + bias.index_select(0, rows.expert_ids)
    if bias is None:
        return grouped_linear(x, weight, rows.offsets)
    # A dense layer adds its bias before it rounds to half precision. Torch's grouped kernel takes no bias, and on the
    # CPU it is a loop itself, so ours is about as fast and rounds as the dense layer does. On other devices, and under
    # autocast, the difference is one more rounding.
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled("cpu"):
        return _loop_linear(x, weight, bias, rows.offsets)
    return grouped_linear(x, weight, rows.offsets) + bias.index_select(0, rows.expert_ids)


def _to(weight: Tensor | Weight4bit, dtype: torch.dtype) -> Tensor | Weight4bit:
    # one in 4 bit is dequantised to the dtype of what it multiplies
    return weight.to(dtype) if isinstance(weight, Tensor) else weight


class Experts(nn.Module):
    """The FFNs of a layer's experts, stacked into three-dimensional tensors.

    Gated: ``y = down_e (act(gate_e x) * up_e x)``, else ``y = down_e act(up_e x)``, with biases where the dense FFN has
    them. Weights lie as transformers 5 stacks its own experts: ``gate_up_proj`` (E, 2F, D), the gate's rows first, or
    ``up_proj`` (E, F, D), and ``down_proj`` (E, D, F).

    Args:
        num_experts: number of experts E.
        hidden_size: D.
        expert_size: F, the width of one expert.
        activation: the function between the projections.
        gated: whether there is a gate.
        up_bias: whether the gate and up projections have biases.
        down_bias: whether the down projection has biases.
        inner_dropout: probability of the dropout before the down projection.
        device: of the parameters.
        dtype: of the parameters.

    Parameters are left uninitialised: an `ExpertInit` fills them from the dense FFN. A frozen projection may be a
    `Weight4bit`, which `quantize_frozen` puts in the parameter's place.
    """

    activation: Callable[[Tensor], Tensor]
    gate_up_proj: nn.Parameter
    up_proj: nn.Parameter
    down_proj: nn.Parameter
    gate_up_proj_bias: nn.Parameter | None
    up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        expert_size: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.silu,
        gated: bool = True,
        up_bias: bool = False,
        down_bias: bool = False,
        inner_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.expert_size = expert_size
        self.activation = activation
        self.gated = gated
        self.up_bias = up_bias
        self.down_bias = down_bias
        self.inner_dropout = inner_dropout
        # set by `parallelize_experts`
        self.exchange: Exchange | None = None
        rows = 2 * expert_size if gated else expert_size
        prefix = "gate_up" if gated else "up"

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.register_parameter(f"{prefix}_proj", parameter(rows, hidden_size))
        self.register_parameter("down_proj", parameter(hidden_size, expert_size))
        self.register_parameter(f"{prefix}_proj_bias", parameter(rows) if up_bias else None)
        self.register_parameter("down_proj_bias", parameter(hidden_size) if down_bias else None)

    @property
    def projections(self) -> dict[str, Tensor | Weight4bit]:
        """The first and the down projection, by name, as they are stored."""
        names = ("gate_up_proj" if self.gated else "up_proj", "down_proj")
        return {name: getattr(self, name) for name in names}

    @property
    def first_proj(self) -> Tensor:
        """``gate_up_proj`` or ``up_proj``, whichever these experts have; of one in 4 bit what it stands for."""
        first, _ = self.projections.values()
        return weight_of(first)

    @property
    def first_proj_bias(self) -> nn.Parameter | None:
        """The bias beside `first_proj`."""
        return self.gate_up_proj_bias if self.gated else self.up_proj_bias

    @property
    def parameters_per_expert(self) -> float:
        """How many parameters one expert has."""
        biases = (bias for bias in (self.first_proj_bias, self.down_proj_bias) if bias is not None)
        return sum(weight.numel() for weight in (*self.projections.values(), *biases)) / self.num_experts

    def written_out(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The first and the down projection and the biases of both, each tensor with one entry per expert."""
        first, down = map(weight_of, self.projections.values())
        return first, down, self.first_proj_bias, self.down_proj_bias

    def weights(self) -> list[Float[Tensor, "E ..."]]:
        """What of `written_out` these experts have."""
        return [weight for weight in self.written_out() if weight is not None]

    def parameters_for(self, part: str) -> list[nn.Parameter]:
        """The parameters that took the place of one of the dense FFN's; none for a weight in 4 bit.

        Args:
            part: its name in `FFNWeights`, such as ``"up"`` or ``"down_bias"``.
        """
        first, down = self.projections.values()
        if part.startswith("down"):
            found = self.down_proj_bias if part.endswith("bias") else down
        else:
            found = self.first_proj_bias if part.endswith("bias") else first
        return [found] if isinstance(found, nn.Parameter) else []

    def extra_repr(self) -> str:
        """The sizes, for ``print(model)``."""
        return f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, expert_size={self.expert_size}"

    def forward(self, x: Float[Tensor, "T D"], routing: Routing | None = None) -> Float[Tensor, "T D"]:
        """Computes ``y[t] = sum_n weights[n] * expert_{expert_ids[n]}(x[t])`` over the assignments n of token t.

        Without a routing every token goes through every expert, and the outputs are summed: what shared experts do.
        """
        if routing is None:
            return self._sum(x)
        y, rows = self.outputs(x, routing)
        return combine(y, rows, routing)

    def outputs(self, x: Float[Tensor, "T D"], routing: Routing) -> tuple[Float[Tensor, "M D"], Dispatched]:
        """Computes each expert's outputs, unweighted, in the order of their experts, and says which rows these are."""
        first, down = self.projections.values()
        first_bias: Tensor | None = self.first_proj_bias
        down_bias: Tensor | None = self.down_proj_bias
        if self.exchange is not None:
            assert isinstance(first, Tensor)
            assert isinstance(down, Tensor)
            first, down = self.exchange.local(first), self.exchange.local(down)
            first_bias, down_bias = (
                None if bias is None else self.exchange.local(bias) for bias in (first_bias, down_bias)
            )
        if torch.is_autocast_enabled(x.device.type):
            # grouped_mm is no autocast operation: without this it would silently run in float32
            dtype = torch.get_autocast_dtype(x.device.type)
            x, first, down = x.to(dtype), _to(first, dtype), _to(down, dtype)
            first_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in (first_bias, down_bias))
        rows = dispatch(x, routing)
        if self.exchange is None:
            return self._compute(rows, first, down, first_bias, down_bias), rows
        here, give_back = self.exchange.send(rows)
        return give_back(self._compute(here, first, down, first_bias, down_bias)), rows

    def _compute(
        self,
        rows: Dispatched,
        first: Tensor | Weight4bit,
        down: Tensor | Weight4bit,
        first_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Float[Tensor, "N D"]:
        hidden = _linear(rows.x, first, first_bias, rows)  # (N, 2F) or (N, F)
        return _linear(self.activate(hidden), down, down_bias, rows)  # (N, D)

    def _sum(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        stored = (*self.projections.values(), self.first_proj_bias, self.down_proj_bias)
        total: Tensor | None = None
        for e, (first, down, *biases) in enumerate(zip(*map(self._one_by_one, stored), strict=True)):
            y = linear(self.activate(linear(x, first, biases[0], index=e)), down, biases[1], index=e)
            total = y if total is None else total + y
        return x.new_zeros(x.shape) if total is None else total

    def _one_by_one(self, weight: Tensor | Weight4bit | None) -> Sequence[Any]:
        # one in 4 bit is dequantised as a whole, for every expert anew: shared experts are few
        return weight.unbind(0) if isinstance(weight, Tensor) else [weight] * self.num_experts

    def activate(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N F"]:
        """Applies to the first projection's output the activation, and gate and inner dropout where there are any."""
        return F.dropout(self._activate(hidden), self.inner_dropout, self.training and self.inner_dropout > 0)

    def _activate(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N F"]:
        if not self.gated:
            return self.activation(hidden)
        if _is_silu(self.activation):
            return _SwiGLU.apply(hidden)  # type: ignore[no-any-return]
        gate, up = hidden.chunk(2, dim=-1)
        return self.activation(gate) * up

    def loop(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """The reference for `forward`: one expert after the other, in plain autograd, without dropout."""
        first, down, *biases = self.written_out()
        out = x.new_zeros(x.shape)
        for expert in range(self.num_experts):
            chosen = routing.expert_ids == expert
            if routing.dropped is not None:
                chosen = chosen & ~routing.dropped
            rows = x[routing.token_ids[chosen]]
            first_bias, down_bias = (None if bias is None else bias[expert] for bias in biases)
            hidden = F.linear(rows, first[expert], first_bias)
            if self.gated:
                gate, up = hidden.chunk(2, dim=-1)
                hidden = self.activation(gate) * up
            else:
                hidden = self.activation(hidden)
            y = F.linear(hidden, down[expert], down_bias) * routing.weights[chosen].unsqueeze(-1)
            out = out.index_add(0, routing.token_ids[chosen], y.to(out.dtype))
        return out
