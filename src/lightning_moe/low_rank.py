"""Experts that share one frozen dense FFN and differ by low-rank changes of its projections.

What the experts share is linear on both sides of the activation. `LowRankExperts.forward` therefore computes the first
projection once per token, and the down projection once per token too, of the weighted sum of the hidden activations.
`Experts.loop`, the reference, takes every expert's weights written out.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.checks import check_positive, check_whole
from lightning_moe.experts import Dispatched, Experts, combine, dispatch, grouped_linear
from lightning_moe.four_bit import Weight4bit, linear, to_autocast
from lightning_moe.routing import Routing


class LowRankExperts(Experts):
    """One frozen dense FFN, of which each expert changes every projection by a matrix of low rank.

    ``W_e = W + (alpha / rank) * B_e A_e`` for each of gate, up and down, with B and A of their own; the biases are
    shared. The inherited ``gate_up_proj`` or ``up_proj``, ``down_proj`` and biases hold the dense FFN, as one expert
    that does not train. Trained are ``first_a`` (E, P*rank, D) and ``first_b`` (E, P*F, rank), with P = 2 and the
    gate's rows first where there is a gate, else P = 1, and ``down_a`` (E, rank, F) and ``down_b`` (E, D, rank).

    With B = 0 every expert is the dense FFN, and so is the layer where a token's weights sum to one: in half precision
    to the last bit on the CPU (elsewhere as far as the GEMMs are the same), because the weighted sums are taken in
    float32 and round back to what the dense FFN computes; in float32 up to rounding. In that first step A gets a
    gradient of zeros and B does not; the experts differ from then on, as their A and their tokens do.

    Reference: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021, https://arxiv.org/abs/2106.09685,
    for the change of a projection; Li et al., *MixLoRA*, 2024, https://arxiv.org/abs/2404.15159, for experts made so
    of a frozen FFN. Differs from MixLoRA: it shares the product of the first projections between experts, this the one
    of the down projection as well; and there is no dropout on the low-rank branch. Wu et al., *Parameter-Efficient
    Sparsity Crafting*, 2024, https://arxiv.org/abs/2401.02731, also share the FFN, but put an adapter with an
    activation of its own behind it, which cannot be merged into the weights.

    Args:
        num_experts: number of experts E.
        hidden_size: D.
        expert_size: F, the width of the dense FFN.
        rank: of each change, >= 1. A multiple of 16 bytes is what torch's grouped kernel takes: 8 in half precision.
        alpha: the changes are multiplied by ``alpha / rank``, > 0; None means ``rank``.
        activation: the function between the projections.
        gated: whether there is a gate.
        up_bias: whether the gate and up projections have biases.
        down_bias: whether the down projection has biases.
        inner_dropout: probability of the dropout before the down projection.
        device: of the parameters.
        dtype: of the parameters.

    Parameters are left uninitialised: the inherited ones are to be filled from the dense FFN, the others by
    `reset_low_rank`.

    Raises:
        ValueError: if ``rank`` is below 1 or ``alpha`` is not above 0.

    Example:
        >>> experts = LowRankExperts(4, hidden_size=8, expert_size=32, rank=2)
        >>> {name: tuple(p.shape) for name, p in experts.named_parameters() if p.requires_grad}
        {'first_a': (4, 4, 8), 'first_b': (4, 64, 2), 'down_a': (4, 2, 32), 'down_b': (4, 8, 2)}
        >>> [tuple(p.shape) for p in experts.parameters() if not p.requires_grad]
        [(1, 64, 8), (1, 8, 32)]
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        expert_size: int,
        *,
        rank: int,
        alpha: float | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        gated: bool = True,
        up_bias: bool = False,
        down_bias: bool = False,
        inner_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_rank(rank, alpha)
        # the one expert of the base class is what all share
        super().__init__(
            1,
            hidden_size,
            expert_size,
            activation=activation,
            gated=gated,
            up_bias=up_bias,
            down_bias=down_bias,
            inner_dropout=inner_dropout,
            device=device,
            dtype=dtype,
        )
        self.num_experts = num_experts
        self.rank = rank
        self.alpha = alpha
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)
        self._add_changes(2 if gated else 1, device, dtype)

    def _add_changes(self, parts: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        def trained(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(self.num_experts, *shape, device=device, dtype=dtype))

        self.first_a = trained(parts * self.rank, self.hidden_size)
        self.first_b = trained(parts * self.expert_size, self.rank)
        self.down_a = trained(self.rank, self.expert_size)
        self.down_b = trained(self.hidden_size, self.rank)

    @property
    def scale(self) -> float:
        """``alpha / rank``, what each ``B_e A_e`` is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def parameters_per_expert(self) -> float:
        """How many parameters one expert has to itself."""
        return sum(p.numel() for p in self.changes()) / self.num_experts

    def parameters_for(self, part: str) -> list[nn.Parameter]:
        """The low-rank parameters that change one of the dense FFN's; biases have none."""
        if part.endswith("bias"):
            return []
        return [self.down_a, self.down_b] if part.startswith("down") else [self.first_a, self.first_b]

    def changes(self) -> tuple[nn.Parameter, ...]:
        """What the experts have for themselves: A and B of the first and of the down projection."""
        return self.first_a, self.first_b, self.down_a, self.down_b

    def extra_repr(self) -> str:
        """The sizes, for ``print(model)``."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"

    @torch.no_grad()
    def reset_low_rank(self, generator: torch.Generator) -> None:
        """Starts every expert as the dense FFN: ``B = 0``, and A normal of variance ``1 / in_features``.

        Args:
            generator: source of the random numbers, on the CPU: they are the same on every device and dtype.
        """
        for a in (self.first_a, self.down_a):
            a.copy_(torch.randn(a.shape, generator=generator) * a.shape[-1] ** -0.5)
        self.first_b.zero_()
        self.down_b.zero_()

    def forward(self, x: Float[Tensor, "T D"], routing: Routing | None = None) -> Float[Tensor, "T D"]:
        """Computes ``y[t] = sum_n weights[n] * expert_{expert_ids[n]}(x[t])`` over the assignments n of token t.

        With h_n the hidden activation of assignment n, s the scale and e the assignment's expert:
        ``y[t] = W sum_n weights[n] h_n + bias sum_n weights[n] + sum_n weights[n] s B_e A_e h_n``.

        Without a routing every token goes through every expert, and the outputs are summed: what shared experts do.
        """
        if routing is None:
            routing = self._all_to_all(x)
        hidden, rows = self._hidden(x, routing)  # (N, F)
        added = combine(self._change(hidden, self.down_a, self.down_b, rows.offsets), rows, routing)  # (T, D)
        if self.down_proj_bias is not None:
            ones = routing.weights.new_ones(hidden.shape[0], 1)
            weights_sum = combine(ones, rows, routing)  # (T, 1), 0 for a token without an assignment
            added = (added + weights_sum * to_autocast(self.down_proj_bias)).to(added.dtype)
        down, combined = self._shared("down_proj"), combine(hidden, rows, routing)
        if isinstance(down, Weight4bit):
            return linear(combined, down, index=0) + added
        # addmm and not a sum behind F.linear: what is added enters before the product is rounded to half precision, as
        # the bias of a dense layer does
        return torch.addmm(added, combined, to_autocast(down).t())

    def outputs(self, x: Float[Tensor, "T D"], routing: Routing) -> tuple[Float[Tensor, "M D"], Dispatched]:
        """Computes each expert's outputs, unweighted, in the order of their experts, and says which rows these are."""
        hidden, rows = self._hidden(x, routing)
        bias = None if self.down_proj_bias is None else self.down_proj_bias[0]
        shared = linear(hidden, self._shared("down_proj"), bias, index=0)  # (N, D)
        return shared + self._change(hidden, self.down_a, self.down_b, rows.offsets), rows

    def _hidden(self, x: Float[Tensor, "T D"], routing: Routing) -> tuple[Float[Tensor, "N F"], Dispatched]:
        x = to_autocast(x)
        rows = dispatch(x, routing)
        bias = None if self.first_proj_bias is None else self.first_proj_bias[0]
        shared = linear(x, self._shared("gate_up_proj" if self.gated else "up_proj"), bias, index=0)  # (T, P*F)
        tokens = routing.token_ids.index_select(0, rows.order)
        change = self._change(rows.x, self.first_a, self.first_b, rows.offsets)
        return self.activate(shared.index_select(0, tokens) + change), rows

    def _shared(self, name: str) -> Tensor | Weight4bit:
        weight = self.projections[name]
        return weight[0] if isinstance(weight, Tensor) else weight

    def _change(self, x: Float[Tensor, "N I"], a: Tensor, b: Tensor, offsets: Int[Tensor, " E"]) -> Tensor:
        # s B_e A_e x. The scale multiplies the smallest tensor of the three.
        inner = (grouped_linear(x, to_autocast(a), offsets) * self.scale).split(self.rank, dim=-1)  # P of (N, rank)
        parts = zip(inner, to_autocast(b).chunk(len(inner), dim=1), strict=True)
        changes = [grouped_linear(part, weight, offsets) for part, weight in parts]
        return changes[0] if len(changes) == 1 else torch.cat(changes, dim=-1)

    def _all_to_all(self, x: Float[Tensor, "T D"]) -> Routing:
        num_tokens, experts = x.shape[0], torch.arange(self.num_experts, device=x.device)
        tokens = torch.arange(num_tokens, device=x.device).repeat_interleave(self.num_experts)
        table = torch.zeros(num_tokens, self.num_experts, device=x.device, dtype=torch.float32)
        weights = torch.ones_like(table).view(-1)
        return Routing(tokens, experts.repeat(num_tokens), weights, table, table, top_k=self.num_experts)

    def written_out(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Every expert's weights, part of the graph, which takes E times the memory of the dense FFN."""
        first, down, *_ = super().written_out()
        first = first + self.scale * _products(self.first_a, self.first_b, self.rank)
        down = down + self.scale * _products(self.down_a, self.down_b, self.rank)
        first_bias, down_bias = (
            None if bias is None else bias.expand(self.num_experts, -1)
            for bias in (self.first_proj_bias, self.down_proj_bias)
        )
        return first, down, first_bias, down_bias

    def merged(self) -> Experts:
        """Makes ordinary experts of these weights, all of them trainable; E times the memory of the dense FFN."""
        experts = Experts(
            self.num_experts,
            self.hidden_size,
            self.expert_size,
            activation=self.activation,
            gated=self.gated,
            up_bias=self.up_bias,
            down_bias=self.down_bias,
            inner_dropout=self.inner_dropout,
            device=self.down_proj.device,
            dtype=self.down_proj.dtype,
        ).train(self.training)
        with torch.no_grad():
            for parameter, weight in zip(experts.weights(), self.weights(), strict=True):
                parameter.copy_(weight)
        return experts


def check_rank(rank: int, alpha: float | None) -> None:
    """Raises a `ValueError` if a rank is no whole number of 1 or more, or an alpha not above 0."""
    check_whole(rank=rank)
    if alpha is not None:
        check_positive(alpha=alpha)


def _products(a: Tensor, b: Tensor, rank: int) -> Tensor:
    # B_e A_e of every expert, of each projection of its own
    parts = a.split(rank, dim=1)
    return torch.cat([w @ part for part, w in zip(parts, b.chunk(len(parts), dim=1), strict=True)], dim=1)
