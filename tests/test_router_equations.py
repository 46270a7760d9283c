"""Each router against its paper: examples worked by hand, and the equations written out over tokens and experts.

The written-out equations share nothing with the package: Python loops over single numbers, which autograd follows.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
import reference
import torch
from catalogue import FAMILY_ROWS, ROUTER_ROWS, logits
from jaxtyping import config
from lightning_fixtures import batches, tiny_llama
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers import DeepseekV3Config, Glm4MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from lightning_moe import (
    ROUTERS,
    BASERouter,
    CosineRouter,
    DenseMixerRouter,
    ExpertChoiceRouter,
    Experts,
    GShardRouter,
    HashRouter,
    HyperRouter,
    LossFreeRouter,
    MoELayer,
    MoEPlusPlusRouter,
    NoisyTopKRouter,
    NullExpertsRouter,
    PerturbedCosineRouter,
    ReMoERouter,
    Routing,
    SigmoidRouter,
    SinkhornRouter,
    SparseMixerRouter,
    TCMoERouter,
    Tokens,
    TopKRouter,
    TopPRouter,
    UniformRouter,
    UpcycleConfig,
    XMoERouter,
    expert_load,
    moe_layers,
    record_routing,
    upcycle,
)
from lightning_moe.experts import dispatch
from lightning_moe.routers.base_layer import assign_evenly
from lightning_moe.routers.sinkhorn import log_prices
from lightning_moe.routing import limit_capacity

D, E, F, T = 6, 5, 4, 7
# float32 sums of a handful of products, in another order
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}
# the same in float64, with room for quotients of small numbers
FLOAT64 = {"rtol": 1e-9, "atol": 1e-12}


def column_ids(routing):
    """The router's choice behind each assignment."""
    return routing.expert_ids if routing.choice_ids is None else routing.choice_ids


def in_order(routing):
    """Numbers of the assignments, sorted by token and column."""
    tokens, columns = routing.token_ids.tolist(), column_ids(routing).tolist()
    return sorted(range(len(tokens)), key=lambda n: (tokens[n], columns[n]))


def pairs(routing):
    """(token, column) of the assignments, sorted."""
    return sorted(zip(routing.token_ids.tolist(), column_ids(routing).tolist(), strict=True))


# --- by hand ---


def log_odds(*scores):
    """Gate rows whose sigmoid at x = 1 is these scores."""
    return [[math.log(score / (1 - score))] for score in scores]


def log(*numbers):
    """Gate rows whose softmax at x = 1 is proportional to these numbers."""
    return [[math.log(number)] for number in numbers]


@dataclass(frozen=True)
class Example:
    make: Callable[[], Any]
    set: dict[str, Any]
    """Parameters and buffers."""
    rows: list[tuple[int, int, Any]]
    """Token, expert, weight."""
    x: list[list[float]] = field(default_factory=lambda: [[1.0]])
    training: bool = False
    ids: list[int] | None = None


HALVES = Fraction(1, 2), Fraction(3, 4), Fraction(1, 5)
EXAMPLES = {
    # scores 1/6, 3/6, 2/6
    "top_k": Example(
        lambda: TopKRouter(1, 3), {"gate": log(1, 3, 2)}, [(0, 1, Fraction(3, 5)), (0, 2, Fraction(2, 5))]
    ),
    # cosines of (3, 4) with (1, 0), (0, 2), (-5, 0): 3/5, 4/5, -3/5; over tau = 1/5: 3, 4, -3
    "cosine": Example(
        lambda: CosineRouter(2, 3, projection_size=2),
        {"projection": [[1.0, 0], [0, 1]], "gate": [[1.0, 0], [0, 2], [-5, 0]], "log_scale": math.log(5)},
        [(0, 0, 1 / (1 + math.e)), (0, 1, math.e / (1 + math.e))],
        x=[[3.0, 4.0]],
    ),
    # 3 / ((5 + 1) (1 + 1)) = 1/4, 8 / ((5 + 1) (2 + 1)) = 4/9, -15 / 36; over tau = 1/36: 9, 16, -15
    "perturbed_cosine": Example(
        lambda: PerturbedCosineRouter(2, 3, projection_size=2, offset=1.0, top_k=2),
        {"projection": [[1.0, 0], [0, 1]], "gate": [[1.0, 0], [0, 2], [-5, 0]], "log_scale": math.log(36)},
        [(0, 0, 1 / (1 + math.exp(7))), (0, 1, 1 / (1 + math.exp(-7)))],
        x=[[3.0, 4.0]],
    ),
    # the cosines above over tau = 1/10: 6, 8, -6; the raw score of the best
    "xmoe": Example(
        lambda: XMoERouter(2, 3, top_k=1, normalize=False),
        {"projection": [[1.0, 0], [0, 1]], "gate": [[1.0, 0], [0, 2], [-5, 0]], "tau": 0.1},
        [(0, 1, 1 / (1 + math.exp(-2) + math.exp(-14)))],
        x=[[3.0, 4.0]],
    ),
    # of 1/2, 3/4, 1/5 the two largest sum to 5/4
    "sigmoid": Example(
        lambda: SigmoidRouter(1, 3), {"gate": log_odds(*HALVES)}, [(0, 0, Fraction(2, 5)), (0, 1, Fraction(3, 5))]
    ),
    # relu((1 + 2, -1)) = (3, 0); the gate is 3 times the first column, so the scores are 1/6, 3/6, 2/6
    "hyper": Example(
        lambda: HyperRouter(1, 3, embedding_size=2, network_size=2),
        {
            "embedding": [1.0, 1.0],
            "input_weight": [[1.0, 2.0], [-1.0, 0.0]],
            "output_weight": [[math.log(n) / 3, 7.0] for n in (1, 3, 2)],
        },
        [(0, 1, Fraction(3, 5)), (0, 2, Fraction(2, 5))],
    ),
    # 1/2 + 0, 3/4 - 3/10, 1/5 + 31/100: the last and the first are chosen; 5/2 times 2/7 and 5/7
    "loss_free": Example(
        lambda: LossFreeRouter(1, 3, routed_scaling=2.5),
        {"gate": log_odds(*HALVES), "expert_bias": [0.0, -0.3, 0.31]},
        [(0, 0, Fraction(25, 14)), (0, 2, Fraction(5, 7))],
    ),
    # an FFN, a zero, a copy and a constant expert of scores 2/10, 4/10, 3/10, 1/10; without the zero 2 : 3
    "moe_plus_plus": Example(
        lambda: MoEPlusPlusRouter(1, 1, top_k=3, num_constant_experts=1),
        {"gate": log(2, 4, 3, 1)},
        [(0, 0, Fraction(2, 5)), (0, 1, 0), (0, 2, Fraction(3, 5))],
    ),
    # columns +0, +1, -0, -1, null of 1/10, 4/10, 3/10, 1/10, 1/10: +1 and -0, over 4/10 + 3/10 + 1/10
    "tc_moe": Example(
        lambda: TCMoERouter(1, 2, num_null_choices=1, negative_offset=0.0, null_offset=0.0),
        {"gate": log(1, 4, 3, 1, 1)},
        [(0, 0, Fraction(-3, 8)), (0, 1, Fraction(1, 2))],
    ),
    # 3, -3, 6
    "remoe": Example(lambda: ReMoERouter(1, 3), {"gate": [[1.0], [-1.0], [2.0]]}, [(0, 0, 3), (0, 2, 6)], x=[[3.0]]),
    # exp(logits) 1, 3, 2, and the softmax over the two best
    "noisy_top_k": Example(
        lambda: NoisyTopKRouter(1, 3), {"gate": log(1, 3, 2)}, [(0, 1, Fraction(3, 5)), (0, 2, Fraction(2, 5))]
    ),
    # in training the second, 2/5, is kept for sure
    "gshard": Example(
        lambda: GShardRouter(1, 3, second_threshold=0.4),
        {"gate": log(1, 3, 2)},
        [(0, 1, Fraction(3, 5)), (0, 2, Fraction(2, 5))],
        training=True,
    ),
    # scores of token 0: 3/4, 1/4, of token 1: 1/2, 1/2; one place each: the better token takes it
    "expert_choice": Example(
        lambda: ExpertChoiceRouter(2, 2, capacity_factor=1.0),
        {"gate": [[math.log(3), 0.0], [0.0, 0.0]]},
        [(0, 0, Fraction(3, 4)), (1, 1, Fraction(1, 2))],
        x=[[1.0, 0.0], [0.0, 1.0]],
    ),
    # exp(logits) ((4, 1), (2, 1)): both prefer expert 0; the even plan ((a, b), (b, a)) keeps the cross ratio
    # a^2 / b^2 = 4 * 1 / (1 * 2) = 2, so a > b; the weights are sigmoid(log 4) and sigmoid(0)
    "sinkhorn": Example(
        lambda: SinkhornRouter(2, 2, top_k=1, normalize=False),
        {"gate": [[math.log(4), math.log(2)], [0.0, 0.0]]},
        [(0, 0, Fraction(4, 5)), (1, 1, Fraction(1, 2))],
        x=[[1.0, 0.0], [0.0, 1.0]],
        training=True,
    ),
    # log 4 + 0 is more than 0 + log 2
    "base": Example(
        lambda: BASERouter(2, 2),
        {"gate": [[math.log(4), math.log(2)], [0.0, 0.0]]},
        [(0, 0, Fraction(4, 5)), (1, 1, Fraction(1, 2))],
        x=[[1.0, 0.0], [0.0, 1.0]],
        training=True,
    ),
    # 3 * 5 + 1 = 16 = 1 mod 3; 2 * 5 + 1 = 11 = 1 mod 2: of the steps 1 and 2 to another expert the second, to 0
    "hash": Example(
        lambda: HashRouter(1, 3, top_k=2),
        {"keys": [3, 1, 2, 1]},
        [(0, 0, Fraction(1, 2)), (0, 1, Fraction(1, 2))],
        ids=[5],
    ),
    # scores 1/6, 3/6, 2/6: 3/6 is less than 0.7, 5/6 suffices
    "top_p": Example(
        lambda: TopPRouter(1, 3, top_p=0.7, normalize=False),
        {"gate": log(1, 3, 2)},
        [(0, 1, Fraction(3, 6)), (0, 2, Fraction(2, 6))],
    ),
    # two true experts and a null one of 1/6, 3/6, 2/6
    "null_experts": Example(
        lambda: NullExpertsRouter(1, 2, top_k=2, num_null_experts=1),
        {"gate": log(1, 3, 2)},
        [(0, 1, 1), (0, 2, 0)],
    ),
    # (3/2 - 29/20) / (3/2) = 1/30 is within 2/10, (3/2 - 1) / (3/2) = 1/3 is not; then (29/20 - 1) / (29/20) is not
    "sparse_mixer": Example(
        lambda: SparseMixerRouter(1, 3, threshold=0.1),
        {"gate": [[1.0], [1.5], [1.45]]},
        [(0, 1, 1 / (1 + math.exp(-0.05))), (0, 2, 1)],
    ),
    # chosen are 3/6 and 2/6; the third is there for its gradient
    "dense_mixer": Example(
        lambda: DenseMixerRouter(1, 3),
        {"gate": log(1, 3, 2)},
        [(0, 0, 0), (0, 1, Fraction(3, 5)), (0, 2, Fraction(2, 5))],
        training=True,
    ),
    # token 0: 0, 1/2, 1/4; token 1: 1/2, 5/8, 1/4 + 3/4 = 0 mod 1
    "uniform": Example(
        lambda: UniformRouter(1, 3),
        {"keys": [[0, 1 / 2, 1 / 4], [1 / 2, 1 / 8, 3 / 4]]},
        [(0, 1, 0.5), (0, 2, 0.5), (1, 0, 0.5), (1, 1, 0.5)],
        x=[[1.0], [1.0]],
    ),
}


def test_every_router_has_an_example():
    assert {type(example.make()) for example in EXAMPLES.values()} == set(ROUTERS)


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_worked_example(example):
    router = example.make().train(example.training)
    names = router.state_dict(keep_vars=True)
    for name, value in example.set.items():
        names[name].data.copy_(torch.tensor(value))
    routing = router(torch.tensor(example.x), Tokens(ids=None if example.ids is None else torch.tensor(example.ids)))
    rows = zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), routing.weights.tolist(), strict=True)
    found = sorted(rows)
    assert [row[:2] for row in found] == [row[:2] for row in example.rows]
    # logarithms and exponentials of float32 numbers
    assert [row[2] for row in found] == pytest.approx([float(row[2]) for row in example.rows], rel=1e-5)


# --- the equations ---


@dataclass
class Known:
    """What the equations may use beside the hidden states."""

    ids: list[int]
    real: list[int]
    """The tokens that are no padding."""
    previous: list[list[torch.Tensor]] | None = None


def plain(value):
    """A number that no gradient goes through."""
    return value.item() if isinstance(value, torch.Tensor) else value


def numbers(matrix):
    """A matrix as lists of single numbers."""
    return [list(row) for row in matrix]


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


def products(rows, x):
    """Each token's products with the rows of a matrix."""
    rows = numbers(rows)
    return [[dot(row, token) for row in rows] for token in x]


def softmax(z):
    total = sum(value.exp() for value in z)
    return [value.exp() / total for value in z]


def sigmoid(z):
    return [1 / (1 + (-value).exp()) for value in z]


def best(values, count):
    """Where the largest of the values are."""
    return sorted(range(len(values)), key=lambda i: -plain(values[i]))[:count]


def shared_out(weights, normalize):
    total = sum(weights)
    if normalize is True:
        return [w / total for w in weights]
    if normalize == "straight_through":
        return [w + (w / total - w).detach() for w in weights]
    return weights


def choose(scores, choosers, count, normalize):
    """Each token's best columns by its chooser, weighted by its scores."""
    rows = []
    for t, (score, chooser) in enumerate(zip(scores, choosers, strict=True)):
        chosen = best(chooser, count)
        weights = shared_out([score[e] for e in chosen], normalize)
        rows += [(t, e, w) for e, w in zip(chosen, weights, strict=True)]
    return rows


def softmax_choice(router, z):
    return choose([softmax(row) for row in z], z, router.top_k, router.normalize)


def drawn(*shape):
    return torch.empty(*shape, dtype=torch.float64)


def top_k(router, p, x, known):
    if router.training and router.jitter:
        factors = drawn(len(x), D).uniform_(1 - router.jitter, 1 + router.jitter)
        x = [[v * u for v, u in zip(token, row, strict=True)] for token, row in zip(x, factors, strict=True)]
    z = chooser = [[v / router.temperature for v in row] for row in products(p["gate"], x)]
    if router.training and router.noise_std:
        noise = drawn(len(x), E).normal_()
        chooser = [
            [v + router.noise_std * n for v, n in zip(*rows, strict=True)] for rows in zip(z, noise, strict=True)
        ]
    return choose([softmax(row) for row in z], chooser, router.top_k, router.normalize)


def cosine_logits(p, x, offset=0.0):
    def length(vector):
        return sum(v * v for v in vector).sqrt() + offset

    projected, embeddings = products(p["projection"], x), numbers(p["gate"])
    return [[dot(token, e) / (length(token) * length(e)) for e in embeddings] for token in projected]


def cosine(router, p, x, known):
    tau = 1 / p["log_scale"].exp()
    return softmax_choice(router, [[c / tau for c in row] for row in cosine_logits(p, x)])


def perturbed_cosine(router, p, x, known):
    tau = 1 / p["log_scale"].exp()
    return softmax_choice(router, [[c / tau for c in row] for row in cosine_logits(p, x, router.offset)])


def xmoe(router, p, x, known):
    return softmax_choice(router, [[c / p["tau"] for c in row] for row in cosine_logits(p, x)])


def sigma(router, p, x, known):
    scores = [sigmoid(row) for row in products(p["gate"], x)]
    off = [[False] * E for _ in x]
    if router.training and router.expert_dropout:
        off = (torch.rand(len(x), E, dtype=torch.float64) < router.expert_dropout).tolist()
    rows = []
    for t, score in enumerate(scores):
        ranked = sorted(range(E), key=lambda e: (off[t][e], -plain(score[e])))[: router.top_k]
        weights = shared_out([score[e] for e in ranked], router.normalize)
        rows += [(t, e, w) for e, w in zip(ranked, weights, strict=True)]
    return rows


def hyper(router, p, x, known):
    hidden = [dot(row, p["embedding"]).clamp(min=0) for row in router.input_weight]
    gate = [dot(row, hidden) for row in router.output_weight]  # E * D numbers, an expert's D of them together
    z = [[dot(gate[e * D : (e + 1) * D], token) for e in range(E)] for token in x]
    return softmax_choice(router, z)


def loss_free(router, p, x, known):
    scores = [sigmoid(row) for row in products(p["gate"], x)]
    biased = [[s + b for s, b in zip(row, router.expert_bias, strict=True)] for row in scores]
    rows = choose(scores, biased, router.top_k, router.normalize)
    return [(t, e, router.routed_scaling * w) for t, e, w in rows]


def plus_plus_logits(p, x, previous):
    z = products(p["gate"], x)
    if previous is None:
        return z
    residual = products(p["residual_gate"], previous)
    return [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(z, residual, strict=True)]


def plus_plus_weights(router, z):
    """(column, weight) of a token's choices."""
    scores = softmax(z)
    zeros = range(router.num_experts, router.num_experts + router.num_zero_experts)
    chosen = best(z, router.top_k)
    kept = [c for c in chosen if c not in zeros]
    weights = dict(zip(kept, shared_out([scores[c] for c in kept], router.normalize), strict=True))
    return [(c, weights.get(c, 0 * scores[c])) for c in chosen]


def moe_plus_plus(router, p, x, known):
    z = plus_plus_logits(p, x, known.previous)
    return [(t, c, w) for t, row in enumerate(z) for c, w in plus_plus_weights(router, row)]


def tc_moe(router, p, x, known):
    rows = []
    for t, z in enumerate(products(p["gate"], x)):
        lowered = [v - (router.negative_offset if E <= c < 2 * E else 0) for c, v in enumerate(z)]
        lowered = [v - (router.null_offset if c >= 2 * E else 0) for c, v in enumerate(lowered)]
        scores, chosen = softmax(lowered), best(lowered, router.top_k)
        total = sum(scores[c] for c in chosen if c < 2 * E) + sum(scores[2 * E :])
        for c in chosen:
            sign = 0 if c >= 2 * E else -1 if c >= E else 1
            rows.append((t, c, sign * scores[c] / total))
    return rows


def remoe(router, p, x, known):
    rows = []
    for t, z in enumerate(products(p["gate"], x)):
        on = [e for e in range(E) if z[e] > 0]
        rows += [(t, e, w) for e, w in zip(on, shared_out([z[e] for e in on], router.normalize), strict=True)]
    return rows


def noisy_logits(router, p, x):
    """Clean logits, standard deviations, noisy logits."""
    clean = products(p["gate"], x)
    stds = [[(1 + v.exp()).log() + 0.01 for v in row] for row in products(p["noise_gate"], x)]
    noise = drawn(len(x), E).normal_() if router.training else torch.zeros(len(x), E)
    noisy = [[c + n * s for c, n, s in zip(*rows, strict=True)] for rows in zip(clean, noise, stds, strict=True)]
    return clean, stds, noisy


def noisy_top_k(router, p, x, known):
    _, _, noisy = noisy_logits(router, p, x)
    # the softmax over the kept logits
    return choose([[v.exp() for v in row] for row in noisy], noisy, router.top_k, True)


def gshard(router, p, x, known):
    luck = torch.rand(len(x), 2, dtype=torch.float64)[:, 1] if router.training else torch.zeros(len(x))
    rows = []
    for t, z in enumerate(products(p["gate"], x)):
        g = softmax(z)
        first, second = best(z, 2)
        g1, g2 = shared_out([g[first], g[second]], True)
        rows.append((t, first, g1))
        if luck[t] < g2 / router.second_threshold:
            rows.append((t, second, g2))
    return rows


def expert_choice(router, p, x, known):
    scores = [softmax(z) for z in products(p["gate"], x)]
    capacity = math.ceil(Fraction(router.capacity_factor) * len(known.real) / E)
    rows = []
    for e in range(E):
        ranked = sorted(known.real, key=lambda t: -plain(scores[t][e]))
        rows += [(t, e, scores[t][e]) for t in ranked[:capacity]]
    return rows


def sinkhorn_plan(z, real, iterations):
    """``diag(u) exp(z) diag(v)`` of plain numbers."""
    exps = {t: [math.exp(plain(v)) for v in z[t]] for t in real}
    v = [1.0] * E
    for _ in range(iterations):
        u = {t: 1 / len(real) / dot(exps[t], v) for t in real}
        v = [1 / E / sum(u[t] * exps[t][e] for t in real) for e in range(E)]
    return {t: [u[t] * exps[t][e] * v[e] for e in range(E)] for t in real}, v


def sinkhorn(router, p, x, known):
    z = products(p["gate"], x)
    choosers = z
    if router.training:
        _, v = sinkhorn_plan(z, known.real, router.num_iterations)
        choosers = [[math.exp(plain(a)) * b for a, b in zip(row, v, strict=True)] for row in z]
    scores = [sigmoid(row) if router.top_k == 1 else softmax(row) for row in z]
    return choose(scores, choosers, router.top_k, router.normalize)


def optimal_assignment(values):
    """The best assignment of rows to columns with ``ceil(T / E)`` places each: a column for each row."""
    num_rows, num_columns = len(values), len(values[0])
    places = math.ceil(num_rows / num_columns)
    repeated = [[plain(value) for value in row for _ in range(places)] for row in values]
    _, slots = linear_sum_assignment(repeated, maximize=True)
    return [int(slot) // places for slot in slots]


def base(router, p, x, known):
    z = products(p["gate"], x)
    experts = [best(row, 1)[0] for row in z]
    if router.training:
        for t, e in zip(known.real, optimal_assignment([z[t] for t in known.real]), strict=True):
            experts[t] = e
    weights = [shared_out([sigmoid(row)[e]], router.normalize)[0] for row, e in zip(z, experts, strict=True)]
    return [(t, e, w) for t, (e, w) in enumerate(zip(experts, weights, strict=True))]


def hashed(router, p, x, known):
    a, b, c, d = router.keys.tolist()
    prime, rows = 2**31 - 1, []
    for t, token in enumerate(known.ids):
        first = (a * token + b) % prime % E
        others = [(first + step) % E for step in range(1, E)]
        start = (c * token + d) % prime % (E - 1)
        experts = [first] + [others[(start + j) % (E - 1)] for j in range(router.top_k - 1)]
        rows += [(t, e, torch.tensor(1 / router.top_k, dtype=torch.float64)) for e in experts]
    return rows


def top_p(router, p, x, known):
    rows = []
    for t, z in enumerate(products(p["gate"], x)):
        scores = softmax(z)
        subsets = [s for size in range(1, E + 1) for s in itertools.combinations(range(E), size)]
        enough = [s for s in subsets if sum(plain(scores[e]) for e in s) >= router.top_p]
        fewest = min(len(s) for s in enough)
        chosen = max((s for s in enough if len(s) == fewest), key=lambda s: sum(plain(scores[e]) for e in s))
        weights = shared_out([scores[e] for e in chosen], router.normalize)
        rows += [(t, e, w) for e, w in zip(chosen, weights, strict=True)]
    return rows


def null_experts(router, p, x, known):
    rows = []
    for t, z in enumerate(products(p["gate"], x)):
        scores, chosen = softmax(z), best(z, router.top_k)
        true = [e for e in chosen if e < E]
        rows += [(t, e, w) for e, w in zip(true, shared_out([scores[e] for e in true], router.normalize), strict=True)]
        rows += [(t, e, 0 * scores[e]) for e in chosen if e >= E]
    return rows


def sparse_mixer(router, p, x, known):
    z, rows = products(p["gate"], x), []
    taken = [set() for _ in x]
    for _ in range(router.top_k):
        gumbel, luck = torch.zeros(len(x), E), torch.ones(len(x))
        if router.training:
            gumbel = -drawn(len(x), E).exponential_().log()
            luck = torch.rand(len(x), 1, dtype=torch.float64)[:, 0]
        for t, row in enumerate(z):
            left = [e for e in range(E) if e not in taken[t]]
            top = max(left, key=lambda e: plain(row[e]))
            near = [e for e in left if (row[top] - row[e]) <= 2 * router.threshold * max(abs(row[e]), row[top])]
            pi = dict(zip(near, softmax([row[e] for e in near]), strict=True))
            pick = max(near, key=lambda e: plain(row[e] + gumbel[t][e])) if router.training else top
            third = pick != top and luck[t] <= 0.75
            value = pi[pick] / 3 if third else pi[pick]
            rows.append((t, pick, pi[pick] + (value - pi[pick]).detach()))
            taken[t].add(pick)
    return rows


def dense_mixer(router, p, x, known):
    z, rows = products(p["gate"], x), []
    if not router.training:
        return softmax_choice(router, z)
    for t, row in enumerate(z):
        scores, chosen = softmax(row), best(row, router.top_k)
        total = sum(scores[e] for e in chosen) if router.normalize else torch.ones(())
        for e in range(E):
            surrogate = scores[e] / (total if e in chosen or not router.normalize else total.detach())
            value = surrogate if e in chosen else 0 * surrogate
            rows.append((t, e, surrogate + (value - surrogate).detach()))
    return rows


def uniform(router, p, x, known):
    if router.training:
        lots = torch.rand(len(x), E, dtype=torch.float64).tolist()
    else:
        start, turn = router.keys.tolist()
        lots = [[(start[e] + t * turn[e]) % 1 for e in range(E)] for t in range(len(x))]
    return [
        (t, e, torch.tensor(1 / router.top_k, dtype=torch.float64))
        for t, row in enumerate(lots)
        for e in best(row, router.top_k)
    ]


EQUATIONS = {
    TopKRouter: top_k,
    CosineRouter: cosine,
    PerturbedCosineRouter: perturbed_cosine,
    XMoERouter: xmoe,
    SigmoidRouter: sigma,
    HyperRouter: hyper,
    LossFreeRouter: loss_free,
    MoEPlusPlusRouter: moe_plus_plus,
    TCMoERouter: tc_moe,
    ReMoERouter: remoe,
    NoisyTopKRouter: noisy_top_k,
    GShardRouter: gshard,
    ExpertChoiceRouter: expert_choice,
    SinkhornRouter: sinkhorn,
    BASERouter: base,
    HashRouter: hashed,
    TopPRouter: top_p,
    NullExpertsRouter: null_experts,
    SparseMixerRouter: sparse_mixer,
    DenseMixerRouter: dense_mixer,
    UniformRouter: uniform,
}


def exact(router):
    """The router in float64, its buffers too, so that the comparison is sharp."""
    router = router.double()
    for name, buffer in list(router.named_buffers()):
        if buffer.is_floating_point():
            setattr(router, name, buffer.double())
    if isinstance(router, LossFreeRouter):
        router.expert_bias.normal_(std=0.3)
    if isinstance(router, BASERouter):
        # no other assignment comes as close to the best one
        router.tolerance = 1e-7
    return router


def leaves(module):
    return {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}


def gradients(output, inputs):
    return torch.autograd.grad(output, inputs, allow_unused=True, materialize_grads=True)


def test_every_router_has_an_equation():
    assert set(EQUATIONS) == set(ROUTERS)


@pytest.mark.parametrize("situation", ["evaluation", "training", "padding"])
@pytest.mark.parametrize("row", ROUTER_ROWS.values(), ids=ROUTER_ROWS)
def test_equals_the_equation(row, situation):
    router = exact(row(D, E)).train(situation != "evaluation")
    x, ids = torch.randn(T, D).double().requires_grad_(), torch.arange(T) * 7 % 31
    mask = torch.arange(T) % 3 > 0 if situation == "padding" else None
    previous = None
    if router.uses_previous_logits:
        previous = torch.randn(T, router(x).num_choices).double().requires_grad_()
    inputs = {"x": x, **dict(router.named_parameters()), **({} if previous is None else {"previous": previous})}
    twins = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    known = Known(
        ids=ids.tolist(),
        real=list(range(T)) if mask is None else mask.nonzero().flatten().tolist(),
        previous=None if previous is None else numbers(twins["previous"]),
    )
    torch.manual_seed(3)
    routing = router(x, Tokens(ids=ids, mask=mask, previous_logits=previous))
    torch.manual_seed(3)
    rows = sorted(EQUATIONS[row.cls](router, twins, numbers(twins["x"]), known), key=lambda r: r[:2])
    assert pairs(routing) == [r[:2] for r in rows]
    weights, wanted = routing.weights[in_order(routing)], torch.stack([r[2] for r in rows])
    torch.testing.assert_close(weights, wanted, **FLOAT64)
    if not router.learned:
        assert not weights.requires_grad
        return
    upstream = torch.randn(len(rows)).double()
    ours = gradients((weights * upstream).sum(), list(inputs.values()))
    theirs = gradients((wanted * upstream).sum(), list(twins.values()))
    for name, one, other in zip(inputs, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **FLOAT64, msg=lambda text, name=name: f"{name}: {text}")


# --- a layer around the router ---


def layer_of(router, **options):
    """A layer in float64 whose experts differ."""
    layer = MoELayer(router, Experts(router.num_experts, D, F), **options).double()
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter)
    return layer


def routed(layer, x):
    with record_routing() as window:
        out = layer(x)
    return out, window["moe"]


def same_expert_gradients(layer, experts):
    """Whether the stacked gradients are those of the written-out experts."""
    grads = reference.stacked_gradients(experts)
    for name, parameter in layer.experts.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], **FLOAT64)


# --- noisy top-k ---


def phi(value):
    """Standard normal distribution function."""
    return 0.5 * (1 + (value / math.sqrt(2)).erf())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count", [2, 4, E])
def test_expected_load_is_the_written_out_formula(count, training):
    router = NoisyTopKRouter(D, E, top_k=count, init_std=0.5).double().train(training)
    x, mask = torch.randn(T, D).double().requires_grad_(), torch.tensor([True] * 5 + [False, True])
    p, twin = leaves(router), x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    load = router(x, Tokens(mask=mask)).expected_load
    torch.manual_seed(3)
    clean, stds, noisy = noisy_logits(router, p, numbers(twin))
    wanted = [torch.zeros((), dtype=torch.float64) for _ in range(E)]
    for t in mask.nonzero().flatten().tolist():
        for e in range(E):
            if count == E:
                wanted[e] = wanted[e] + 1
                continue
            # equation 9: the k-th largest of the others' noisy logits
            others = [noisy[t][i] for i in range(E) if i != e]
            threshold = others[best(others, count)[-1]]
            wanted[e] = wanted[e] + phi((clean[t][e] - threshold) / stds[t][e])
    torch.testing.assert_close(load, torch.stack(wanted), **FLOAT64)
    if count < E:
        upstream = torch.randn(E).double()
        ours = gradients((load * upstream).sum(), [x, router.gate, router.noise_gate])
        theirs = gradients((torch.stack(wanted) * upstream).sum(), [twin, p["gate"], p["noise_gate"]])
        torch.testing.assert_close(ours, theirs, **FLOAT64)


def test_expected_load_is_the_chance_when_one_noise_is_drawn_anew():
    router = NoisyTopKRouter(D, E, top_k=2, init_std=0.7).double()
    x, draws = torch.randn(T, D).double(), 20_000
    p = leaves(router)
    torch.manual_seed(3)
    load = router(x).expected_load
    torch.manual_seed(3)
    clean, stds, noisy = (torch.tensor([[plain(v) for v in r] for r in m]) for m in noisy_logits(router, p, numbers(x)))
    estimate = []
    for e in range(E):
        others = noisy[:, [i for i in range(E) if i != e]]
        anew = clean[:, e] + stds[:, e] * torch.randn(draws, T)
        better = (others > anew.unsqueeze(-1)).sum(-1)  # (draws, T)
        estimate.append((better < 2).float().mean(0).sum())
    # the mean of 20,000 draws is off by at most 0.0036 per token, one standard deviation; seven tokens, five deviations
    torch.testing.assert_close(load.float(), torch.stack(estimate), rtol=0, atol=5 * 0.0036 * math.sqrt(T))


def test_expected_load_is_the_mean_load():
    router = NoisyTopKRouter(D, E, top_k=2, init_std=0.5)
    copies = 20_000
    routing = router(torch.randn(1, D).expand(copies, D))
    load, expected = expert_load(routing), routing.expected_load
    assert load.min() < 0.5 * load.max(), "the load is even whatever happens; the test shows nothing"
    # a count of 20,000 has a standard deviation of 71 or less, its estimate has less; five times that
    torch.testing.assert_close(load, expected, rtol=0, atol=5 * 71 * math.sqrt(2))


# --- loss-free ---


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("experts", "groups", "top_groups", "count", "scaling"), [(5, 1, 1, 2, 1.0), (6, 3, 2, 3, 2.5), (9, 3, 1, 2, 1.5)]
)
def test_loss_free_equals_transformers(family, normalize, experts, groups, top_groups, count, scaling):
    config_cls, cls = {
        "deepseek_v3": (DeepseekV3Config, DeepseekV3TopkRouter),
        "glm4_moe": (Glm4MoeConfig, Glm4MoeTopkRouter),
    }[family]
    theirs = cls(
        config_cls(
            hidden_size=D,
            n_routed_experts=experts,
            num_experts_per_tok=count,
            n_group=groups,
            topk_group=top_groups,
            norm_topk_prob=normalize,
            routed_scaling_factor=scaling,
        )
    )
    options = {"top_k": count, "normalize": normalize, "num_groups": groups, "top_k_groups": top_groups}
    ours = LossFreeRouter(D, experts, routed_scaling=scaling, **options)
    nn.init.normal_(theirs.weight)
    # biased scores below 0: what stands outside the groups must still be behind them
    theirs.e_score_correction_bias.normal_(mean=-1.0)
    ours.gate.data.copy_(theirs.weight.data)
    ours.expert_bias.copy_(theirs.e_score_correction_bias)
    x, their_x = (t.requires_grad_() for t in torch.randn(50, D).repeat(2, 1, 1).unbind())
    routing, (their_logits, weights, ids) = ours(x), theirs(their_x)
    torch.testing.assert_close(routing.logits, their_logits, **FLOAT32)
    # theirs are in no order
    ids, order = ids.sort(dim=1)
    weights = weights.gather(1, order).flatten()
    assert pairs(routing) == [(t, e) for t, row in enumerate(ids.tolist()) for e in row]
    found = routing.weights[in_order(routing)]
    torch.testing.assert_close(found, weights, **FLOAT32)
    upstream = torch.randn_like(weights)
    mine = gradients((found * upstream).sum(), [x, ours.gate])
    torch.testing.assert_close(mine, gradients((weights * upstream).sum(), [their_x, theirs.weight]), **FLOAT32)


def test_loss_free_chooses_within_the_best_groups():
    router = LossFreeRouter(1, 6, top_k=2, num_groups=3, top_k_groups=1)
    # sums of the two best per group: 0.9 + 0.1, 0.6 + 0.5, 0.7 + 0.3: the second, though the others hold better ones
    router.gate.data = torch.tensor(log_odds(0.9, 0.1, 0.6, 0.5, 0.7, 0.3))
    assert pairs(router(torch.ones(1, 1))) == [(0, 2), (0, 3)]


def test_loss_free_bias_moves_by_the_sign_of_the_violation():
    router = LossFreeRouter(D, E, bias_rate=0.25)
    router.adapt(torch.tensor([10.0, 0.0, 4.0, 2.0, 4.0]))
    router.adapt(torch.tensor([4.0, 4.0, 4.0, 4.0, 4.0]))
    router.adapt(torch.tensor([0.0, 0.0, 0.0, 0.0, 20.0]))
    assert router.expert_bias.tolist() == [0.0, 0.5, 0.25, 0.5, -0.25]
    before = router.gate.detach().clone()
    router(torch.randn(T, D)).weights.square().sum().backward()
    assert torch.equal(router.gate, before)
    assert not router.expert_bias.requires_grad


# --- SparseMixer ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threshold", [0.01, 0.3])
def test_sparse_mixer_equals_phimoe(monkeypatch, training, threshold):
    router = SparseMixerRouter(D, E, threshold=threshold, init_std=0.5).train(training)
    p, x = leaves(router), torch.randn(200, D).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    routing = router(x)
    torch.manual_seed(3)
    with monkeypatch.context() as patch:
        # their second pick draws twice and keeps the second number: let it keep the first, as ours
        patch.setattr(torch.Tensor, "uniform_", lambda tensor: tensor)
        weights, ids = sparsemixer(twin @ p["gate"].T, threshold, training)
    assert routing.expert_ids.view(-1, 2).tolist() == ids.tolist()
    # they write 0.3333 for a third
    torch.testing.assert_close(routing.weights.view(-1, 2), weights, rtol=1e-3, atol=1e-6)
    upstream = torch.randn_like(weights)
    ours = gradients((routing.weights.view(-1, 2) * upstream).sum(), [x, router.gate])
    torch.testing.assert_close(ours, gradients((weights * upstream).sum(), [twin, p["gate"]]), **FLOAT32)
    if training and threshold == 0.3:
        best_first = routing.logits.argmax(1) == routing.expert_ids.view(-1, 2)[:, 0]
        assert 20 < best_first.sum() < 180, "all draws agree; the test shows nothing"


def test_sparse_mixer_samples_from_the_softmax_of_the_near():
    router = SparseMixerRouter(1, 3, top_k=1, threshold=0.2)
    router.gate.data = torch.tensor([[1.0], [2.0], [1.5]])
    routing = router(torch.ones(20_000, 1))
    load = expert_load(routing)
    assert load[0] == 0  # (2 - 1) / 2 is above 0.4
    chance = 1 / (1 + math.exp(-0.5))
    # five standard deviations of a count of 20,000
    assert abs(load[1].item() - 20_000 * chance) < 5 * 71
    seconds = routing.weights[routing.expert_ids == 2]
    thirds = (seconds < 0.9 * (1 - chance)).float().mean().item()
    torch.testing.assert_close(seconds.max().item(), 1 - chance, rtol=1e-5, atol=0)
    torch.testing.assert_close(seconds.min().item(), (1 - chance) / 3, rtol=1e-5, atol=0)
    assert abs(thirds - 0.75) < 5 * 0.5 / math.sqrt(len(seconds))


def test_sparse_mixer_weights_may_sum_to_little():
    # five equal logits: 1/5 and 1/4, in training perhaps a third of each
    router = SparseMixerRouter(D, E, init_std=0.0)
    sums = router(torch.randn(200, D)).weights.view(-1, 2).sum(1)
    assert sums.min().item() == pytest.approx((1 / 5 + 1 / 4) / 3)
    assert sums.max().item() == pytest.approx(1 / 5 + 1 / 4)


# --- Sinkhorn ---


@pytest.mark.parametrize("num_tokens", [T, 64])
def test_sinkhorn_plan_has_even_marginals(num_tokens):
    z = torch.randn(num_tokens, E).double() + torch.tensor([2.0, 0, 0, 0, -2])
    plan = (z + log_prices(z, 200)).exp()
    plan = plan / plan.sum(1, keepdim=True) / num_tokens
    torch.testing.assert_close(plan.sum(0), torch.full((E,), 1 / E, dtype=torch.float64), **FLOAT64)
    # the default of 20 iterations has come close
    plan = (z + log_prices(z, 20)).softmax(1) / num_tokens
    torch.testing.assert_close(plan.sum(0), torch.full((E,), 1 / E, dtype=torch.float64), rtol=1e-6, atol=0)


def megatron_sinkhorn(cost, tolerance=1e-4):
    """Megatron-LM's iteration, until it moves no more; lists of plain numbers."""
    cost = [[math.exp(v) for v in row] for row in cost]
    rows, columns = len(cost), len(cost[0])
    d1, moved = [1.0] * columns, math.inf
    while moved > tolerance:
        d0 = [1 / rows / (dot(d1, row) + 1e-8) for row in cost]
        d1_before, d1 = (
            d1,
            [1 / columns / (sum(d0[t] * cost[t][e] for t in range(rows)) + 1e-8) for e in range(columns)],
        )
        moved = sum(abs(a - b) for a, b in zip(d1, d1_before, strict=True)) / columns
    return [[d1[e] * row[e] * d0[t] for e in range(columns)] for t, row in enumerate(cost)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("num_tokens", [T, 65])
def test_sinkhorn_chooses_as_megatron(count, num_tokens):
    router = SinkhornRouter(D, E, top_k=count, normalize=False, init_std=1.0).double()
    x = torch.randn(num_tokens, D).double() + 0.5
    routing = router(x)
    plan = megatron_sinkhorn(routing.logits.tolist())
    assert pairs(routing) == sorted((t, e) for t, row in enumerate(plan) for e in best(row, count))
    z = routing.logits
    scores = 1 / (1 + (-z).exp()) if count == 1 else z.exp() / z.exp().sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights, scores[routing.token_ids, routing.expert_ids], **FLOAT64)
    if num_tokens == 65:
        greedy = torch.bincount(z.topk(count).indices.flatten(), minlength=E)
        assert expert_load(routing).max() < greedy.max()


# --- BASE ---


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts"), [(7, 5), (10, 5), (11, 5), (1, 5), (3, 5), (64, 4), (65, 5), (7, 1), (6, 2)]
)
def test_base_assignment_is_near_the_optimum(num_tokens, num_experts, tolerance):
    values = torch.randn(num_tokens, num_experts) + torch.arange(num_experts)
    columns = assign_evenly(values, tolerance)
    assert torch.bincount(columns, minlength=num_experts).max() <= math.ceil(num_tokens / num_experts)
    wanted = torch.tensor(optimal_assignment(values.tolist()))
    rows, spread = torch.arange(num_tokens), values.max() - values.min()
    shortfall = (values[rows, wanted].double().sum() - values[rows, columns].double().sum()).item()
    assert -1e-9 < shortfall <= num_tokens * tolerance * spread + 1e-9


@pytest.mark.parametrize("value", [0.0, -3.0, 1e8])
@pytest.mark.parametrize("num_tokens", [1, 7, 10, 200])
def test_base_assignment_of_equal_values_ends_and_is_even(num_tokens, value):
    columns = assign_evenly(torch.full((num_tokens, E), value), 1e-2)
    assert torch.bincount(columns, minlength=E).max() <= math.ceil(num_tokens / E)


def test_base_assignment_of_two_equal_groups():
    # all tokens alike, one expert far better: the price war must end too
    columns = assign_evenly(torch.tensor([1000.0, 0.0, 0.0, 0.0, 0.0]).expand(100, E), 1e-2)
    assert torch.bincount(columns, minlength=E).tolist() == [20] * E


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_base_ends_where_training_has_diverged(bad):
    router = BASERouter(D, E, init_std=0.5)
    x = torch.randn(T, D)
    x[2, 1] = bad
    # the weight of the bad token says what happened; the other tokens are assigned as ever
    routing = router(x)
    assert torch.bincount(routing.expert_ids, minlength=E).max() <= math.ceil(T / E)
    assert bool(routing.weights[torch.arange(T) != 2].isfinite().all())


# --- DenseMixer ---


@pytest.mark.parametrize(
    ("count", "normalize"), [(2, True), (1, True), (2, False), (1, False), (3, "straight_through"), (E, True)]
)
def test_dense_mixer_layer_is_the_authors_straight_through(count, normalize):
    router = DenseMixerRouter(D, E, top_k=count, normalize=normalize, init_std=0.5)
    layer = layer_of(router)
    x, upstream = torch.randn(T, D).double().requires_grad_(), torch.randn(T, D).double()
    gate, experts = router.gate.detach().clone().requires_grad_(), reference.unstack(layer.experts)
    twin = x.detach().clone().requires_grad_()
    rows = []
    for token in twin:
        scores = (gate @ token).softmax(0)
        chosen = best(scores, count)
        total = sum(scores[e] for e in chosen)
        sparse, dense = 0, 0
        for e in range(E):
            # what was not chosen gets no gradient, as their hook says
            y = experts[e](token) if e in chosen else experts[e](token).detach()
            kept = scores[e] / (total if e in chosen else total.detach()) if normalize is True else scores[e]
            dense = dense + kept * y
            if e in chosen:
                sparse = sparse + (scores[e] / total if normalize else scores[e]) * y
        if normalize == "straight_through":
            # the experts learn with the weights of the forward, the router with the plain scores
            frozen = sum(scores[e] * experts[e](token).detach() for e in range(E))
            given = sum((scores[e] / total).detach() * experts[e](token) for e in chosen)
            rows.append(given + frozen - frozen.detach())
        else:
            rows.append(sparse.detach() + dense - dense.detach())
    out, wanted = layer(x), torch.stack(rows)
    torch.testing.assert_close(out, wanted, **FLOAT64)
    out.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(x.grad, twin.grad, **FLOAT64)
    torch.testing.assert_close(router.gate.grad, gate.grad, **FLOAT64)
    same_expert_gradients(layer, experts)


@pytest.mark.parametrize("normalize", [True, False])
def test_dense_mixer_trains_its_experts_as_top_k(normalize):
    layer = layer_of(DenseMixerRouter(D, E, normalize=normalize, init_std=0.5))
    plain_layer = copy.deepcopy(layer)
    plain_layer.router = TopKRouter(D, E, normalize=normalize).double()
    plain_layer.router.load_state_dict(layer.router.state_dict())
    x, upstream = torch.randn(T, D).double(), torch.randn(T, D).double()
    out, routing = routed(layer, x)
    plain_out, plain_routing = routed(plain_layer, x)
    torch.testing.assert_close(out, plain_out, **FLOAT64)
    out.backward(upstream)
    plain_out.backward(upstream)
    for one, other in zip(layer.experts.parameters(), plain_layer.experts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, **FLOAT64)
    assert not torch.allclose(layer.router.gate.grad, plain_layer.router.gate.grad)
    assert torch.equal(expert_load(routing), expert_load(plain_routing))
    assert dispatch(x, routing).x.shape[0] == E * T
    assert dispatch(x, layer.eval().router(x)).x.shape[0] == 2 * T


# --- TC-MoE ---


def test_tc_moe_adds_both_signs_of_one_expert():
    layer = layer_of(TCMoERouter(D, 2, num_null_choices=1, negative_offset=0.0, null_offset=0.0))
    x = torch.randn(1, D).double().requires_grad_()
    # columns +0, +1, -0, -1, null: scores 5/10, 1/10, 2/10, 1/10, 1/10 of this token
    wanted = torch.tensor([5.0, 1, 2, 1, 1]).double().log()
    layer.router.gate.data = torch.outer(wanted, x.detach()[0]) / x.detach().square().sum()
    out, routing = routed(layer, x)
    assert pairs(routing) == [(0, 0), (0, 2)]
    assert routing.expert_ids.tolist() == [0, 0]
    expert = reference.unstack(layer.experts)[0]
    torch.testing.assert_close(out[0], (5 / 8 - 2 / 8) * expert(x[0]), **FLOAT64)
    assert expert_load(routing).tolist() == [2, 0]


def test_tc_moe_layer_equals_the_loop():
    router = TCMoERouter(D, E, top_k=6, num_null_choices=2, negative_offset=0.25, null_offset=0.125, init_std=0.5)
    layer = layer_of(router)
    x, upstream = torch.randn(T, D).double().requires_grad_(), torch.randn(T, D).double()
    p, twin, experts = leaves(router), x.detach().clone().requires_grad_(), reference.unstack(layer.experts)
    rows = tc_moe(router, p, numbers(twin), None)
    experts_of = [[c % E for t, c, _ in rows if t == token and c < 2 * E] for token in range(T)]
    assert any(len(set(e)) < len(e) for e in experts_of), "no expert has both signs; the test shows nothing"
    assert any(c >= 2 * E for _, c, _ in rows), "nothing is null; the test shows nothing"
    outs = [sum(w * experts[c % E](twin[t]) for t, c, w in rows if t == token and c < 2 * E) for token in range(T)]
    out, routing = routed(layer, x)
    torch.testing.assert_close(out, torch.stack(outs), **FLOAT64)
    assert dispatch(x, routing).x.shape[0] == sum(c < 2 * E for _, c, _ in rows)
    out.backward(upstream)
    torch.stack(outs).backward(upstream)
    torch.testing.assert_close(x.grad, twin.grad, **FLOAT64)
    torch.testing.assert_close(router.gate.grad, p["gate"].grad, **FLOAT64)
    same_expert_gradients(layer, experts)


# --- MoE++ ---


class WrittenOut(nn.Module):
    """An MoE++ layer token by token; the layers of a model leave their logits in one list."""

    def __init__(self, layer, passed_on):
        super().__init__()
        self.settings, self.p = layer.router, leaves(layer.router)
        self.experts, self.passed_on = reference.unstack(layer.experts), passed_on

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        router = self.settings
        before = self.passed_on[-1] if self.passed_on else None
        z = plus_plus_logits(self.p, numbers(x), before)
        self.passed_on.append(z)
        first_copy = router.num_experts + router.num_zero_experts
        rows = []
        for t, token in enumerate(x):
            out = 0 * token
            for c, w in plus_plus_weights(router, z[t]):
                if c < router.num_experts:
                    out = out + w * self.experts[c](token)
                elif c >= first_copy + router.num_copy_experts:
                    j = c - first_copy - router.num_copy_experts
                    parts = softmax([dot(self.p["constant_gate"][2 * j + i], token) for i in (0, 1)])
                    out = out + w * (parts[0] * token + parts[1] * self.p["constants"][j])
                elif c >= first_copy:
                    out = out + w * token
            rows.append(out)
        return torch.stack(rows).view(hidden_states.shape)


@pytest.mark.parametrize("normalize", [True, False, "straight_through"])
@pytest.mark.parametrize(
    ("zeros", "copies", "constants", "count"), [(1, 1, 2, 3), (2, 1, 1, 1), (0, 2, 0, 3), (3, 0, 0, 2), (0, 0, 3, 4)]
)
def test_moe_plus_plus_layer_equals_the_loop(zeros, copies, constants, count, normalize):
    sizes = {"num_zero_experts": zeros, "num_copy_experts": copies, "num_constant_experts": constants}
    router = MoEPlusPlusRouter(D, 2, top_k=count, normalize=normalize, init_std=0.5, constant_std=1.0, **sizes)
    layer = layer_of(router)
    x, upstream = torch.randn(T, D).double().requires_grad_(), torch.randn(T, D).double()
    written, twin = WrittenOut(layer, []), x.detach().clone().requires_grad_()
    out, routing = routed(layer, x)
    wanted = written(twin)
    torch.testing.assert_close(out, wanted, **FLOAT64)
    # nothing but the two FFNs has rows
    assert dispatch(x, routing).x.shape[0] == (routing.expert_ids < 2).sum() < routing.expert_ids.numel()
    out.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(x.grad, twin.grad, **FLOAT64)
    for name, parameter in router.named_parameters():
        other = written.p[name].grad
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, torch.zeros_like(found) if other is None else other, **FLOAT64)
    same_expert_gradients(layer, written.experts)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_moe_plus_plus_residual_between_the_layers_of_a_model(checkpointing):
    model = tiny_llama()
    upcycle(model, UpcycleConfig(num_experts=3, router=functools.partial(MoEPlusPlusRouter, top_k=3, init_std=0.3)))
    layers = list(moe_layers(model.double()).values())
    written, passed_on = copy.deepcopy(model), []
    for block, layer in zip(written.model.layers, layers, strict=True):
        block.mlp = WrittenOut(layer, passed_on)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(None))
    batch = {"input_ids": batches(1)[0]["input_ids"]}
    out, wanted = logits(model, batch), logits(written, batch)
    torch.testing.assert_close(out, wanted, **FLOAT64)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    wanted.backward(upstream)
    assert len(calls) == 1 + checkpointing
    for layer, block in zip(layers, written.model.layers, strict=True):
        for name, parameter in layer.router.named_parameters():
            other = block.mlp.p[name].grad
            if other is None:
                # the first layer has nothing before it
                assert (layer, name) == (layers[0], "residual_gate")
                assert parameter.grad is None or not parameter.grad.any()
            else:
                torch.testing.assert_close(parameter.grad, other, **FLOAT64)
        same_expert_gradients(layer, block.mlp.experts)
    embedding, other = (m.get_input_embeddings().weight.grad for m in (model, written))
    torch.testing.assert_close(embedding, other, **FLOAT64)


# --- null experts ---


def test_null_experts_compute_nothing():
    router = NullExpertsRouter(D, E, top_k=2, num_null_experts=3, init_std=0.5)
    layer = layer_of(router)
    x = torch.randn(64, D).double()
    out, routing = routed(layer, x)
    null = routing.expert_ids >= E
    assert not routing.weights[null].any()
    true_rows = int((~null).sum())
    assert 0 < true_rows < 2 * 64
    assert dispatch(x, routing).x.shape[0] == true_rows
    nothing = null.view(64, 2).all(1)
    assert 0 < nothing.sum() < 64
    assert not out[nothing].any()
    assert bool(out[~nothing].any(1).all())
    kept = [n for n in range(128) if not null[n]]
    wanted = reference.moe(
        x,
        *(t[kept] for t in (routing.token_ids, routing.expert_ids, routing.weights)),
        reference.unstack(layer.experts),
    )
    torch.testing.assert_close(out, wanted, **FLOAT64)
    assert expert_load(routing).sum() == true_rows


# --- HyperRouter ---


def test_hyper_router_trains_its_embedding_only():
    router = HyperRouter(D, E, init_std=0.5)
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (router(torch.randn(T, D)).weights * torch.randn(2 * T)).sum().backward()
        optimizer.step()
    after = router.state_dict()
    assert set(after) == {"embedding", "input_weight", "output_weight"}
    assert torch.equal(after["input_weight"], before["input_weight"])
    assert torch.equal(after["output_weight"], before["output_weight"])
    assert not (after["embedding"] == before["embedding"]).any()


def test_hyper_router_starts_with_the_std_of_other_gates():
    stds = torch.stack([HyperRouter(64, E, init_std=0.3).gate_rows().std() for _ in range(30)])
    # one gate's is off by about a sixth, the mean of 30 by a thirtieth; four times that
    assert stds.mean().item() == pytest.approx(0.3, rel=4 / 30)


# --- hash ---


def test_hash_is_of_the_id_alone():
    router = HashRouter(D, E, top_k=3)
    ids = torch.randint(0, 50_000, (500,)).repeat(2)
    routing = router(torch.randn(1000, D), Tokens(ids=ids))
    experts = routing.expert_ids.view(1000, 3)
    assert torch.equal(experts[:500], experts[500:])
    alone = router(torch.randn(1, D), Tokens(ids=ids[:1])).expert_ids
    assert torch.equal(alone, experts[0])
    assert all(len(set(row)) == 3 for row in experts.tolist())
    assert len({tuple(row) for row in experts.tolist()}) > E


@pytest.mark.parametrize("count", [1, 3, E])
def test_hash_is_roughly_even(count):
    ids = torch.arange(10_000)
    for _ in range(5):
        load = expert_load(HashRouter(1, E, top_k=count)(torch.zeros(10_000, 1), Tokens(ids=ids)))
        # a fair lot would be off by 40, one standard deviation
        assert (load - 10_000 * count / E).abs().max() <= (0 if count == E else 200)


def test_hash_differs_from_layer_to_layer():
    model = FAMILY_ROWS["llama"].build()
    upcycle(model, UpcycleConfig(num_experts=E, router=HashRouter))
    ids = torch.arange(60)
    first, second = (
        layer.router(torch.zeros(60, 16), Tokens(ids=ids)).expert_ids for layer in moe_layers(model).values()
    )
    same = (first == second).float().mean().item()
    assert same < 0.5  # by chance a fifth


@pytest.mark.parametrize("tokens", [None, Tokens(), Tokens(mask=torch.ones(T, dtype=torch.bool))])
def test_hash_without_ids_says_so(tokens):
    with pytest.raises(ValueError, match="input_ids"):
        HashRouter(D, E)(torch.randn(T, D), tokens)


# --- chance ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_uniform_is_roughly_even(count, training):
    routing = UniformRouter(1, E, top_k=count).train(training)(torch.zeros(5000, 1))
    assert all(len(set(row)) == count for row in routing.expert_ids.view(-1, count).tolist())
    # of 5000 fair lots the count has a standard deviation of 35 or less; five times that
    assert (expert_load(routing) - 5000 * count / E).abs().max() < 175
    assert bool((routing.weights == 1 / count).all())


@pytest.mark.parametrize("threshold", [0.2, 0.5, 1.0, 3.0])
def test_gshard_keeps_the_second_by_its_weight(threshold):
    router = GShardRouter(1, 3, second_threshold=threshold)
    router.gate.data = torch.tensor(log(1, 3, 2))  # g1 = 3/5, g2 = 2/5
    count = 20_000
    routing = router(torch.ones(count, 1))
    load = expert_load(routing)
    assert load[0] == 0
    assert load[1] == count
    chance = min(1, 0.4 / threshold)
    assert abs(load[2].item() - chance * count) <= 5 * math.sqrt(count * chance * (1 - chance))
    seconds = routing.weights[routing.expert_ids == 2]
    torch.testing.assert_close(seconds, torch.full_like(seconds, 0.4), **FLOAT32)
    assert expert_load(router.eval()(torch.ones(count, 1)))[2] == count


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_sigmoid_expert_dropout_has_its_rate_and_leaves_enough(rate):
    x, count = torch.randn(1, D), 20_000
    one = SigmoidRouter(D, E, top_k=1, normalize=False, expert_dropout=rate, init_std=0.5)
    favourite = one(x).scores.argmax()
    load = expert_load(one(x.expand(count, D)))
    # it stays, or all are gone and it is the best of those
    chance = 1 - rate + rate**E
    assert abs(load[favourite].item() - chance * count) < 5 * math.sqrt(count * chance * (1 - chance))
    many = SigmoidRouter(D, E, top_k=3, expert_dropout=rate)(x.expand(500, D))
    assert all(len(set(row)) == 3 for row in many.expert_ids.view(-1, 3).tolist())
    everyone = SigmoidRouter(D, E, top_k=E, expert_dropout=rate)(x.expand(500, D))
    assert expert_load(everyone).tolist() == [500] * E
    assert expert_load(one.eval()(x.expand(500, D)))[favourite] == 500


# --- temperatures ---


@pytest.mark.parametrize(
    ("cls", "name", "value", "largest"),
    [
        (CosineRouter, "log_scale", 10.0, 100.0),
        (PerturbedCosineRouter, "log_scale", 10.0, 100.0),
        (XMoERouter, "tau", -0.5, 100.0),
    ],
)
def test_temperature_is_bounded(cls, name, value, largest):
    router = cls(D, E, projection_size=3, temperature=0.2)
    assert router(torch.randn(200, D)).logits.abs().max() <= 1 / 0.2 * 1.0001
    getattr(router, name).data.fill_(value)
    found = router(torch.randn(200, D)).logits.abs().max().item()
    assert 0.5 * largest < found <= largest * 1.0001


# --- capacity ---


def routing_of(token_ids, expert_ids, num_tokens, num_experts, mask=None, **others):
    tables = torch.zeros(2, num_tokens, num_experts)
    mask = None if mask is None else torch.tensor(mask)
    token_ids, expert_ids = torch.tensor(token_ids), torch.tensor(expert_ids)
    return Routing(token_ids, expert_ids, torch.ones(len(token_ids)), *tables, mask, **others)


def test_capacity_by_hand():
    # six assignments, three experts: ceil(1 * 6 / 3) = 2 places each; the third and fourth to expert 0 are too late
    routing = routing_of([0, 1, 2, 3, 4, 5], [0, 1, 0, 0, 0, 2], 6, 3)
    assert limit_capacity(routing, 1.0).dropped.tolist() == [False, False, False, True, True, False]
    # ceil(1.5 * 6 / 3) = 3
    assert limit_capacity(routing, 1.5).dropped.tolist() == [False, False, False, False, True, False]
    # ceil(0.1 * 6 / 3) = 1
    assert limit_capacity(routing, 0.1).dropped.tolist() == [False, False, True, True, True, False]


def test_padding_takes_no_place():
    # four real assignments, two experts: two places each; the padding before and between takes none
    mask = [False, True, False, True, True, True]
    routing = routing_of([0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 1], 6, 2, mask)
    assert limit_capacity(routing, 1.0).dropped.tolist() == [False, False, False, False, True, False]


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.25, 2.0])
@pytest.mark.parametrize("kind", ["plain", "padding", "null", "gradient_only", "dropped"])
def test_capacity_equals_the_loop(factor, kind):
    num_tokens, K = 23, 3
    mask = (torch.rand(num_tokens) < 0.7).tolist() if kind == "padding" else None
    ids = torch.randint(0, E, (num_tokens * K,)).square() // E  # uneven
    marks = torch.rand(num_tokens * K) < 0.3
    others = {"null": {"num_ffn_experts": 3}, "gradient_only": {kind: marks}, "dropped": {kind: marks}}.get(kind, {})
    tokens = [t for t in range(num_tokens) for _ in range(K)]
    routing = routing_of(tokens, ids.tolist(), num_tokens, E, mask, top_k=K, **others)
    num_experts = others.get("num_ffn_experts", E)
    counted = [
        n for n, t in enumerate(tokens) if (mask is None or mask[t]) and not (kind == "gradient_only" and marks[n])
    ]
    capacity = math.ceil(Fraction(factor) * len(counted) / num_experts)
    places, wanted = [0] * E, [kind == "dropped" and bool(mark) for mark in marks]
    for n in counted:
        expert = int(ids[n])
        if expert < num_experts and not wanted[n]:
            places[expert] += 1
            wanted[n] = places[expert] > capacity
    limited = limit_capacity(routing, factor)
    assert limited.dropped.tolist() == wanted
    assert torch.equal(expert_load(limited), expert_load(routing))


def test_capacity_in_a_layer():
    layer = layer_of(TopKRouter(D, E, top_k=2, init_std=0.5), capacity_factor=0.75)
    x, upstream = torch.randn(T, D).double().requires_grad_(), torch.randn(T, D).double()
    out, routing = routed(layer, x)
    capacity = 3  # ceil(0.75 * 14 / 5)
    full = layer.router(x)
    assert torch.equal(expert_load(routing), expert_load(full))
    assert expert_load(full).max() > capacity
    places, kept = [0] * E, []
    for n, expert in enumerate(full.expert_ids.tolist()):
        places[expert] += 1
        if places[expert] <= capacity:
            kept.append(n)
    assert (~routing.dropped).nonzero().flatten().tolist() == kept
    assert dispatch(x, routing).x.shape[0] == len(kept) < 2 * T
    twin, experts, gate = x.detach().clone().requires_grad_(), reference.unstack(layer.experts), leaves(layer.router)
    rows = {(t, e): w for t, e, w in top_k(layer.router, gate, numbers(twin), None)}
    weights = [rows[full.token_ids[n].item(), full.expert_ids[n].item()] for n in kept]
    wanted = reference.moe(twin, full.token_ids[kept], full.expert_ids[kept], torch.stack(weights), experts)
    torch.testing.assert_close(out, wanted, **FLOAT64)
    out.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(x.grad, twin.grad, **FLOAT64)
    torch.testing.assert_close(layer.router.gate.grad, gate["gate"].grad, **FLOAT64)
    same_expert_gradients(layer, experts)
    _, routing = routed(layer.eval(), x)
    assert routing.dropped is None


# --- what is refused ---

CHOOSES_K = [
    CosineRouter,
    SigmoidRouter,
    HyperRouter,
    PerturbedCosineRouter,
    XMoERouter,
    LossFreeRouter,
    ReMoERouter,
    NoisyTopKRouter,
    SinkhornRouter,
    HashRouter,
    SparseMixerRouter,
    DenseMixerRouter,
    UniformRouter,
]
ONE_WEIGHT = [
    CosineRouter,
    SigmoidRouter,
    HyperRouter,
    PerturbedCosineRouter,
    XMoERouter,
    LossFreeRouter,
    SinkhornRouter,
]
HAS_INIT_STD = [
    *(SigmoidRouter, HyperRouter, LossFreeRouter, MoEPlusPlusRouter, TCMoERouter, ReMoERouter, NoisyTopKRouter),
    *(GShardRouter, ExpertChoiceRouter, SinkhornRouter, BASERouter, TopPRouter, NullExpertsRouter, SparseMixerRouter),
    DenseMixerRouter,
]
REFUSED = [
    *((cls, {"top_k": 6}, "top_k=6 with num_experts=5") for cls in CHOOSES_K),
    *((cls, {"top_k": 0}, "top_k=0 with num_experts=5") for cls in CHOOSES_K),
    *((cls, {"top_k": 1}, "top_k=1 with normalize=True: .*normalize=False") for cls in ONE_WEIGHT),
    *((cls, {"init_std": -1.0}, "init_std=-1.0: wanted a number >= 0") for cls in HAS_INIT_STD),
    *((cls, {"temperature": 0.0}, "temperature=0.0") for cls in (CosineRouter, PerturbedCosineRouter, XMoERouter)),
    *((cls, {"projection_size": 0}, "projection_size=0") for cls in (CosineRouter, PerturbedCosineRouter, XMoERouter)),
    (PerturbedCosineRouter, {"offset": 0.0}, "offset=0.0: wanted a number > 0"),
    (SigmoidRouter, {"expert_dropout": 1.0}, "expert_dropout=1.0: wanted a probability below 1"),
    (SigmoidRouter, {"expert_dropout": -0.1}, "expert_dropout=-0.1"),
    (HyperRouter, {"embedding_size": 0}, "embedding_size=0"),
    (HyperRouter, {"network_size": -1}, "network_size=-1"),
    (LossFreeRouter, {"bias_rate": -1.0}, "bias_rate=-1.0"),
    (LossFreeRouter, {"routed_scaling": 0.0}, "routed_scaling=0.0"),
    (LossFreeRouter, {"num_groups": 0}, "num_groups=0"),
    (LossFreeRouter, {"top_k_groups": 0}, "top_k_groups=0"),
    (LossFreeRouter, {"num_groups": 2}, "num_groups=2 with num_experts=5: .*Choose a divisor"),
    (LossFreeRouter, {"num_groups": 5}, "num_groups=5 with num_experts=5: .*two or more"),
    (LossFreeRouter, {"top_k_groups": 2}, "top_k_groups=2 of num_groups=1"),
    (MoEPlusPlusRouter, {"top_k": 10}, "top_k=10 with num_experts=5 and 4 experts without"),
    (MoEPlusPlusRouter, {"top_k": 0}, "top_k=0 with num_experts=5"),
    (MoEPlusPlusRouter, {"num_zero_experts": -1}, "num_zero_experts=-1"),
    (MoEPlusPlusRouter, {"num_copy_experts": -1}, "num_copy_experts=-1"),
    (MoEPlusPlusRouter, {"num_constant_experts": -1}, "num_constant_experts=-1"),
    (MoEPlusPlusRouter, {"zero_computation_weight": 0.0}, "zero_computation_weight=0.0"),
    (MoEPlusPlusRouter, {"zero_computation_weight": 1.5}, "zero_computation_weight=1.5"),
    (MoEPlusPlusRouter, {"constant_std": -1.0}, "constant_std=-1.0"),
    (TCMoERouter, {"top_k": 13, "num_null_choices": 2}, "top_k=13 with num_experts=5: .*12 choices"),
    (TCMoERouter, {"top_k": 0, "num_null_choices": 1}, "top_k=0 with num_experts=5"),
    (TCMoERouter, {"num_null_choices": 0}, "num_null_choices=0"),
    (TCMoERouter, {"negative_offset": -1.0}, "negative_offset=-1.0"),
    (TCMoERouter, {"null_offset": -1.0}, "null_offset=-1.0"),
    (NoisyTopKRouter, {"top_k": 1}, "top_k=1: .*Set top_k to 2 or more"),
    (GShardRouter, {"second_threshold": 0.0}, "second_threshold=0.0"),
    (ExpertChoiceRouter, {"capacity_factor": 0.0}, "capacity_factor=0.0: wanted a number > 0"),
    (ExpertChoiceRouter, {"capacity_factor": 5.5}, "capacity_factor=5.5 with num_experts=5"),
    (SinkhornRouter, {"num_iterations": 0}, "num_iterations=0"),
    (BASERouter, {"normalize": True}, "normalize=True: .*normalize=False"),
    (BASERouter, {"tolerance": 0.0}, "tolerance=0.0"),
    (TopPRouter, {"top_p": 0.0}, "top_p=0.0: wanted a number above 0 and up to 1"),
    (TopPRouter, {"top_p": 1.1}, "top_p=1.1"),
    (NullExpertsRouter, {"top_k": 8}, "top_k=8 with num_experts=5 and num_null_experts=2"),
    (NullExpertsRouter, {"top_k": 0}, "top_k=0 with num_experts=5"),
    (NullExpertsRouter, {"num_null_experts": 0}, "num_null_experts=0"),
    (SparseMixerRouter, {"threshold": -0.1}, "threshold=-0.1"),
]


def test_every_router_refuses_something():
    # TopKRouter has its own table
    assert {cls for cls, _, _ in REFUSED} | {TopKRouter} == set(ROUTERS)


@pytest.mark.parametrize(("cls", "arguments", "message"), REFUSED)
def test_refuses_in_words(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(D, E, **arguments)


@pytest.mark.parametrize(
    "cls",
    [
        *(TopKRouter, *ONE_WEIGHT, MoEPlusPlusRouter, ReMoERouter),
        *(BASERouter, TopPRouter, NullExpertsRouter, DenseMixerRouter),
    ],
)
def test_refuses_an_unknown_normalize(cls):
    # without the type checks of the test run, which come first and are not there for users
    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match="normalize='yes': wanted one of True, False, 'straight_through'"):
            cls(D, E, normalize="yes")
    finally:
        config.update("jaxtyping_disable", False)


def test_groups_must_hold_what_a_token_chooses():
    with pytest.raises(ValueError, match=r"top_k_groups=1 of num_groups=3 hold 2 experts, .*top_k=3"):
        LossFreeRouter(D, 6, top_k=3, num_groups=3, top_k_groups=1)


def test_gshard_needs_a_second_expert():
    with pytest.raises(ValueError, match="num_experts=1: GShardRouter chooses two"):
        GShardRouter(D, 1)
