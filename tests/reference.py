"""The slow, obvious truth: Python loops over tokens and experts, nothing shared with the package."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from scipy.spatial.distance import cosine
from scipy.special import logsumexp
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score
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
    """Selections of each expert that is an FFN, over several routings."""
    counts = [0] * routings[0].num_experts
    for routing in routings:
        for n, _, _ in selections(routing):
            expert = int(routing.expert_ids[n])
            if expert < routing.num_experts:
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


def _scaled_scores(routing, t):
    return routing.scores[t] / routing.scores[t].sum()


def heterogeneous_load_balancing_loss(routing, zero_computation_weight):
    """``sum_c eta_c f_c P_c``, 1 where f_c goes as 1 / eta_c."""
    tokens, pairs = real_tokens(routing), real_assignments(routing)
    etas = [1.0 if c < routing.num_ffn_experts else zero_computation_weight for c in range(routing.num_choices)]
    total = routing.scores.new_zeros(())
    for c, eta in enumerate(etas):
        f = sum(choice == c for _, choice in pairs) / len(pairs)
        total = total + eta * f * sum(_scaled_scores(routing, t)[c] for t in tokens) / len(tokens)
    return total * sum(1 / eta for eta in etas)


def importance_loss(routing):
    """1 + squared coefficient of variation (of a population) of the summed weights."""
    tokens = set(real_tokens(routing))
    sums = [routing.weights.new_zeros(()) for _ in range(routing.num_experts)]
    for n, (t, e) in enumerate(zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True)):
        if t in tokens:
            sums[e] = sums[e] + routing.weights[n]
    return 1 + torch.stack(sums).var(unbiased=False) / torch.stack(sums).mean() ** 2


def load_loss(routing):
    load = routing.expected_load
    return 1 + load.var(unbiased=False) / load.mean() ** 2


def _entropy_of(probabilities):
    return -sum(p * p.log() for p in probabilities) / math.log(len(probabilities))


def token_entropy_loss(routing):
    tokens = real_tokens(routing)
    return sum(_entropy_of(_scaled_scores(routing, t)) for t in tokens) / len(tokens)


def mutual_information_loss(routing, token_weight):
    tokens = real_tokens(routing)
    mean = sum(_scaled_scores(routing, t) for t in tokens) / len(tokens)
    return 1 - _entropy_of(mean) + token_weight * token_entropy_loss(routing)


def expert_orthogonality_loss(routing):
    """Mean squared length of the projection of one output of a token on another."""
    tokens, lengths = set(real_tokens(routing)), []
    rows = routing.token_ids.tolist()
    for i, t in enumerate(rows):
        for j, other in enumerate(rows):
            if i != j and t == other and t in tokens:
                a, b = routing.outputs[i], routing.outputs[j]
                lengths.append(((a @ b) / (b @ b + 1e-9) * b).square().sum())
    return sum(lengths) / len(lengths) if lengths else 0 * routing.outputs.sum()


def router_orthogonality_loss(routing):
    total = 0
    for i, row in enumerate(routing.gate):
        for j, other in enumerate(routing.gate):
            total = total + (row @ other - (1.0 if i == j else 0.0)).abs()
    return total


def adaptive_l1_loss(routing, top_k):
    """Before the first step, where the multiplier is 1."""
    tokens, pairs = real_tokens(routing), real_assignments(routing)
    total = routing.scores.new_zeros(())
    for e in range(routing.num_experts):
        f = routing.num_experts * sum(expert == e for _, expert in pairs) / (top_k * len(tokens))
        total = total + f * sum(routing.scores[t, e] for t in tokens) / len(tokens)
    return total


def null_reward_loss(routing):
    tokens = real_tokens(routing)
    return 1 - sum(_scaled_scores(routing, t)[routing.num_ffn_experts :].sum() for t in tokens) / len(tokens)


# --- metrics ---


def _shares(routings):
    """The load in units of its mean."""
    counts = np.array(load(routings), dtype=float)
    return counts / counts.mean()


def max_violation(routings):
    counts = load(routings)
    return max(counts) / (sum(counts) / len(counts)) - 1


def batch_max_violation(routings):
    return np.mean([max_violation([routing]) for routing in routings if sum(load([routing]))])


def min_violation(routings):
    return 1 - min(_shares(routings))


def average_violation(routings):
    return sum(abs(share - 1) for share in _shares(routings)) / routings[0].num_experts


def load_imbalance(routings):
    return max(_shares(routings))


def utilization_quantiles(routings):
    return np.percentile(_shares(routings), [25, 50, 75])


def coefficient_of_variation(routings):
    return stats.variation(load(routings))


def squared_coefficient_of_variation(routings):
    return np.var(load(routings)) / np.mean(load(routings)) ** 2


def gini_coefficient(routings):
    counts = load(routings)
    differences = sum(abs(a - b) for a in counts for b in counts)
    return differences / (2 * len(counts) * sum(counts))


def dead_experts(routings):
    return load(routings).count(0)


def nearly_dead_experts(routings):
    return sum(share <= 0.5 for share in _shares(routings))


def load_entropy(routings):
    return float(entropy(load(routings))) / math.log(routings[0].num_experts)


def effective_experts(routings):
    return math.exp(entropy(load(routings)))


def selections(routing):
    """(number of the row, token, column) of what was chosen for a real token."""
    columns = routing.expert_ids if routing.choice_ids is None else routing.choice_ids
    real, found = set(real_tokens(routing)), []
    for n, (token, column) in enumerate(zip(routing.token_ids.tolist(), columns.tolist(), strict=True)):
        if token in real and (routing.gradient_only is None or not routing.gradient_only[n]):
            found.append((n, token, column))
    return found


def column_sets(routing, top_k=None):
    """The set of the columns that each real token chose, or of the `top_k` with the highest scores."""
    sets = {token: set() for token in real_tokens(routing)}
    for _, token, column in selections(routing):
        sets[token].add(column)
    for token, columns in sets.items():
        ranked = sorted(sorted(columns), key=lambda column: float(routing.scores[token, column]), reverse=True)
        sets[token] = set(ranked[:top_k])
    return sets


def expert_sets(routing, top_k=None):
    """The set of the experts that are FFNs and that each real token chose."""
    columns, sets = column_sets(routing, top_k), {token: set() for token in real_tokens(routing)}
    for n, token, column in selections(routing):
        expert = int(routing.expert_ids[n])
        if column in columns[token] and expert < routing.num_experts:
            sets[token].add(expert)
    return sets


def routing_entropy(routings):
    rows = [routing.scores[t].detach().double().numpy() for routing in routings for t in real_tokens(routing)]
    return sum(float(entropy(row)) / math.log(len(row)) for row in rows) / len(rows)


def routing_confidence(routings):
    shares = []
    for routing in routings:
        for token, columns in column_sets(routing).items():
            row = routing.scores[token].tolist()
            shares.append(sum(row[column] for column in columns) / sum(row))
    return np.mean(shares)


def router_margin(routings):
    margins = []
    for routing in routings:
        for token, columns in column_sets(routing).items():
            row = sorted(routing.logits[token].tolist(), reverse=True)
            if 0 < len(columns) < len(row):
                margins.append(row[len(columns) - 1] - row[len(columns)])
    return np.mean(margins)


def router_logit_norm(routings):
    return np.mean([logsumexp(r.logits[t].double().numpy()) ** 2 for r in routings for t in real_tokens(r)])


def max_router_logit(routings):
    return max(abs(z) for routing in routings for t in real_tokens(routing) for z in routing.logits[t].tolist())


def drop_rate(routings):
    rows = [(routing, n) for routing in routings for n, _, _ in selections(routing)]
    return sum(routing.dropped is not None and bool(routing.dropped[n]) for routing, n in rows) / len(rows)


def active_experts(routings):
    active = 0
    for routing in routings:
        for n, _, _ in selections(routing):
            kept = routing.dropped is None or not routing.dropped[n]
            active += kept and int(routing.expert_ids[n]) < routing.num_experts
    return active / sum(len(real_tokens(routing)) for routing in routings)


def router_saturation(routings, others, top_k=None):
    shares = []
    for routing, other in zip(routings, others, strict=True):
        sets, other_sets = column_sets(routing, top_k), column_sets(other, top_k)
        for token in sets.keys() & other_sets.keys():
            if size := max(len(sets[token]), len(other_sets[token])):
                shares.append(len(sets[token] & other_sets[token]) / size)
    return np.mean(shares)


def top_1_saturation(routings, others):
    return router_saturation(routings, others, top_k=1)


def routing_change_rate(routings, others):
    return 1 - router_saturation(routings, others)


def expert_coactivation(routings):
    num_experts = routings[0].num_experts
    alone, together = np.zeros(num_experts), np.zeros((num_experts, num_experts))
    for routing in routings:
        for experts in expert_sets(routing).values():
            alone[list(experts)] += 1
            for i, j in itertools.permutations(experts, 2):
                together[i, j] += 1
    return [[together[i, j] / max(alone[i], 1) for j in range(num_experts)] for i in range(num_experts)]


def _grouped(routings, groups, num_groups, top_k=None):
    """Tokens of each group that chose each expert, and tokens of each group."""
    routed, tokens = np.zeros((num_groups, routings[0].num_experts)), np.zeros(num_groups)
    for routing, numbers in zip(routings, groups, strict=True):
        for token, experts in expert_sets(routing, top_k).items():
            group = int(numbers[token])
            if group >= 0:
                tokens[group] += 1
                routed[group, list(experts)] += 1
    return routed, tokens


def domain_specialization(routings, domains):
    routed, tokens = _grouped(routings, domains, 4)
    return routed / np.maximum(tokens, 1)[:, None]


def domain_total_variation(routings, domains):
    rows = [row / row.sum() for row in _grouped(routings, domains, 4)[0] if row.sum()]
    pairs = [np.abs(a - b).sum() / 2 for a, b in itertools.combinations(rows, 2)]
    return np.mean(pairs) if pairs else 0


def domain_mutual_information(routings, domains):
    routed, _ = _grouped(routings, domains, 4)
    return mutual_info_score(None, None, contingency=routed) if routed.any() else 0


def vocabulary_specialization(routings, token_ids, top_k=1, min_count=2):
    routed, tokens = _grouped(routings, token_ids, 9, top_k)
    found = [max(row) / count for row, count in zip(routed, tokens, strict=True) if count >= min_count]
    return np.mean(found) if found else 0


def vocabulary_specialization_of_all(routings, token_ids):
    return vocabulary_specialization(routings, token_ids, top_k=None, min_count=1)


def _vectors(weights):
    """One long vector per expert."""
    return [np.concatenate([w[e].double().numpy().ravel() for w in weights]) for e in range(len(weights[0]))]


def _pair_cosines(vectors):
    return [1 - cosine(a, b) if a.any() and b.any() else 0 for a, b in itertools.combinations(vectors, 2)]


def expert_weight_cosine(weights):
    return np.mean([c for layer in weights for c in _pair_cosines(_vectors(layer))])


def expert_weight_distance(weights, initial):
    distances = []
    for layer, layer_before in zip(weights, initial, strict=True):
        for now, before in zip(_vectors(layer), _vectors(layer_before), strict=True):
            distances.append(np.linalg.norm(now - before) / np.linalg.norm(before))
    return np.mean(distances)


def output_similarity(outputs, masks):
    found = []
    for batch, mask in zip(outputs, masks, strict=True):
        for t in mask.nonzero().flatten().tolist():
            found += _pair_cosines([expert[t].double().numpy() for expert in batch])
    return np.mean(found)


def _linear_cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return np.linalg.norm(y.T @ x) ** 2 / norm


def output_cka(outputs, masks):
    found = []
    for batch, mask in zip(outputs, masks, strict=True):
        if mask.sum() > 1:
            real = [expert[mask].double().numpy() for expert in batch]
            found += [_linear_cka(x, y) for x, y in itertools.combinations(real, 2)]
    return np.mean(found) if found else 0


def router_row_cosine(gates):
    return np.mean([c for gate in gates for c in _pair_cosines(gate.double().numpy())])


def counterfactual_routing_gain(log_probs, counterfactual_log_probs, masks):
    gains = []
    for own, other, mask in zip(log_probs, counterfactual_log_probs, masks, strict=True):
        gains += [float(other[t]) - float(own[t]) for t in range(len(mask)) if mask[t]]
    return np.mean(gains)
