"""The slow, obvious truth: Python loops over tokens and experts, nothing shared with the package."""

import math
from dataclasses import dataclass

import torch
from scipy.stats import entropy
from torch.nn import functional as F

# --- experts ---


@dataclass
class Expert:
    """One expert as the separate weights of two or three linear layers, each a leaf of the graph."""

    activation: object
    up: torch.Tensor
    down: torch.Tensor
    gate: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None

    def __call__(self, x):
        up = F.linear(x, self.up, self.up_bias)
        hidden = self.activation(up)
        if self.gate is not None:
            hidden = self.activation(F.linear(x, self.gate, self.gate_bias)) * up
        return F.linear(hidden, self.down, self.down_bias)


def unstack(experts):
    """The stacked tensors of an `Experts`, copied into one `Expert` each."""
    first = experts.gate_up_proj if experts.gated else experts.up_proj
    first_bias = experts.gate_up_proj_bias if experts.gated else experts.up_proj_bias
    width = experts.expert_size

    def leaf(tensor):
        return tensor.detach().clone().requires_grad_()

    result = []
    for e in range(experts.num_experts):
        expert = Expert(experts.activation, up=leaf(first[e][-width:]), down=leaf(experts.down_proj[e]))
        if experts.gated:
            expert.gate = leaf(first[e][:width])
        if first_bias is not None:
            expert.up_bias = leaf(first_bias[e][-width:])
            if experts.gated:
                expert.gate_bias = leaf(first_bias[e][:width])
        if experts.down_proj_bias is not None:
            expert.down_bias = leaf(experts.down_proj_bias[e])
        result.append(expert)
    return result


def stacked_gradients(experts):
    """The gradients of a list of `Expert`, stacked under the names that `Experts` gives its parameters."""

    def grad(tensor):
        return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad

    gated = experts[0].gate is not None
    prefix = "gate_up_proj" if gated else "up_proj"
    result = {"down_proj": torch.stack([grad(e.down) for e in experts])}
    result[prefix] = torch.stack([torch.cat([grad(e.gate), grad(e.up)]) if gated else grad(e.up) for e in experts])
    if experts[0].up_bias is not None:
        result[f"{prefix}_bias"] = torch.stack(
            [torch.cat([grad(e.gate_bias), grad(e.up_bias)]) if gated else grad(e.up_bias) for e in experts]
        )
    if experts[0].down_bias is not None:
        result["down_proj_bias"] = torch.stack([grad(e.down_bias) for e in experts])
    return result


def moe(x, token_ids, expert_ids, weights, experts):
    """``y[t] = sum of weights[n] * expert_{expert_ids[n]}(x[t])`` over the assignments n of token t."""
    rows = []
    for t in range(x.shape[0]):
        y = 0 * x[t].to(torch.promote_types(x.dtype, weights.dtype))  # part of the graph, even without an expert
        for n, (token, expert) in enumerate(zip(token_ids.tolist(), expert_ids.tolist(), strict=True)):
            if token == t:
                y = y + weights[n] * experts[expert](x[t])
        rows.append(y.to(x.dtype))
    return torch.stack(rows) if rows else x * 1


# --- what a routing comes to ---


def real_tokens(routing):
    """Numbers of the tokens that are no padding."""
    mask = [True] * routing.num_tokens if routing.token_mask is None else routing.token_mask.tolist()
    return [t for t, real in enumerate(mask) if real]


def real_assignments(routing):
    """(token, expert) of the assignments whose token is no padding."""
    real = set(real_tokens(routing))
    pairs = zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True)
    return [(token, expert) for token, expert in pairs if token in real]


def load(routings):
    """Assignments per expert over several routings."""
    counts = [0] * routings[0].num_experts
    for routing in routings:
        for _, expert in real_assignments(routing):
            counts[expert] += 1
    return counts


# --- losses, as autograd differentiates them ---


def load_balancing_loss(routing):
    """``E * sum_e f_e P_e``, term by term."""
    tokens, pairs = real_tokens(routing), real_assignments(routing)
    total = routing.scores.new_zeros(())
    for e in range(routing.num_experts):
        f = sum(expert == e for _, expert in pairs) / len(pairs)
        p = sum(routing.scores[t, e] / routing.scores[t].sum() for t in tokens) / len(tokens)
        total = total + f * p
    return routing.num_experts * total


def z_loss(routing):
    """Mean of ``log(sum_e exp(logits_e))^2``, token by token."""
    tokens = real_tokens(routing)
    return sum(routing.logits[t].exp().sum().log() ** 2 for t in tokens) / len(tokens)


# --- metrics ---


def max_violation(routings):
    counts = load(routings)
    return max(counts) / (sum(counts) / len(counts)) - 1


def dead_experts(routings):
    return load(routings).count(0)


def load_entropy(routings):
    return float(entropy(load(routings))) / math.log(routings[0].num_experts)


def routing_entropy(routings):
    rows = [routing.scores[t].detach().double().numpy() for routing in routings for t in real_tokens(routing)]
    return sum(float(entropy(row)) for row in rows) / len(rows) / math.log(routings[0].num_experts)
