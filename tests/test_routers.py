import copy
import dataclasses
import inspect
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from catalogue import ROUTER_ROWS
from torch import nn
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from lightning_moe import ROUTERS, Router, Tokens, TopKRouter
from lightning_moe.routers.base import init_arguments, top_k_assignment

D, E, T = 6, 5, 7
SIZES = {"odd": T, "one_token": 1, "no_token": 0, "many": 64}
# float32 sums of six products, in another order
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}

every_router = pytest.mark.parametrize("row", ROUTER_ROWS.values(), ids=ROUTER_ROWS)


def test_routers_have_rows():
    assert {row.cls for row in ROUTER_ROWS.values()} == set(ROUTERS)


# --- the contract ---


def known(num_tokens, **others):
    """What a router may be told of its tokens: ids, no two alike."""
    return Tokens(ids=torch.arange(num_tokens) * 7 % 101, **others)


def with_previous(router, x, tokens):
    """Adds the logits of a layer before, for the routers that build on them."""
    if not router.uses_previous_logits:
        return tokens
    choices = router(x, tokens).num_choices
    generator = torch.Generator().manual_seed(1)
    return dataclasses.replace(tokens, previous_logits=torch.randn(len(x), choices, generator=generator))


def of_tokens(routing, chosen):
    """The computed assignments of some tokens: a sorted list of (token, expert, weight)."""
    dropped = [False] * routing.token_ids.numel() if routing.dropped is None else routing.dropped.tolist()
    rows = zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), routing.weights.tolist(), dropped, strict=True)
    return sorted(row[:3] for row in rows if row[0] in chosen and not row[3])


def same(one, other):
    """Whether two lists of `of_tokens` are equal, up to a few float32 roundings of the weights."""
    if [row[:2] for row in one] != [row[:2] for row in other]:
        return False
    return [row[2] for row in one] == pytest.approx([row[2] for row in other], rel=1e-5, abs=1e-6)


@every_router
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_tokens", SIZES.values(), ids=SIZES)
def test_a_routing_is_well_formed(row, num_tokens, training):
    router = row(D, E).train(training)
    routing = router(torch.randn(num_tokens, D), known(num_tokens))
    N = routing.token_ids.numel()
    assert routing.expert_ids.shape == routing.weights.shape == (N,)
    assert routing.logits.shape == routing.scores.shape == (num_tokens, routing.num_choices)
    assert (routing.num_tokens, routing.num_experts) == (num_tokens, E)
    assert routing.logits.dtype == routing.scores.dtype == routing.weights.dtype == torch.float32
    assert all(0 <= t < num_tokens for t in routing.token_ids.tolist())
    computed = routing.computed()
    assert all(0 <= e < E for e in routing.expert_ids[slice(None) if computed is None else computed].tolist())
    choices = routing.expert_ids if routing.choice_ids is None else routing.choice_ids
    assert all(0 <= c < routing.num_choices for c in choices.tolist())
    assert row.signed or bool((routing.weights >= 0).all())
    assert bool((routing.scores >= 0).all())
    assert bool(routing.weights.isfinite().all())
    assert routing.weights.requires_grad == router.learned
    if routing.gradient_only is not None:
        assert not routing.weights[routing.gradient_only].any()


@every_router
def test_the_gradient_reaches_every_parameter_and_the_input(row):
    router = row(D, E)
    if not router.learned:
        assert not list(router.parameters())
        return
    x = torch.randn(16, D, requires_grad=True)
    routing = router(x, with_previous(router, x, known(16)))
    (routing.weights * torch.arange(1.0, 1 + routing.weights.numel())).sum().backward()
    for name, parameter in router.named_parameters():
        if name in row.without_gate_gradient:
            continue
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    assert bool(x.grad.any())


@every_router
def test_rows_are_regular_where_it_says_so(row):
    routing = row(D, E)(torch.randn(T, D), known(T))
    if routing.top_k is not None:
        assert routing.token_ids.tolist() == [t for t in range(T) for _ in range(routing.top_k)]


@every_router
def test_experts_per_token_is_the_mean_number_of_computed_rows(row):
    router = row(D, E).eval()
    routing = router(torch.randn(100, D), known(100))
    if router.static_shapes:
        assert routing.token_ids.numel() == pytest.approx(router.experts_per_token * 100)
    assert 0 < router.experts_per_token <= E


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_weights_sum_is_kept_or_not_promised(row, training):
    router = row(D, E).train(training)
    routing = router(torch.randn(64, D), known(64))
    # what computes nothing adds nothing of the dense FFN
    computed = 1 if routing.computed() is None else routing.computed()
    sums = torch.zeros(64).index_add(0, routing.token_ids, routing.weights * computed)
    wanted = float("nan") if router.weights_sum is None else router.weights_sum
    # a handful of float32 roundings
    constant = torch.allclose(sums, torch.full((64,), wanted), atol=1e-6)
    assert constant == (router.weights_sum is not None)
    assert router.weights_sum_to_one == (router.weights_sum == 1)


@every_router
def test_low_precision_input_gives_float32_routing(row):
    router = row(D, E).eval()
    x = torch.randn(T, D).bfloat16()
    low = copy.deepcopy(router).bfloat16()
    routing = low(x, known(T))
    assert routing.logits.dtype == routing.scores.dtype == routing.weights.dtype == torch.float32
    router.load_state_dict(low.state_dict())  # the same numbers, each a bfloat16 one
    exact = router(x.float(), known(T))
    # nothing but the parameters and the input is rounded
    torch.testing.assert_close(routing.logits, exact.logits, **FLOAT32)
    assert routing.expert_ids.tolist() == exact.expert_ids.tolist()


@every_router
def test_buffers_keep_their_precision(row):
    router = row(D, E)
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    for name, buffer in router.bfloat16().named_buffers():
        assert torch.equal(buffer, before[name]), name
        assert buffer.dtype == before[name].dtype, name


@every_router
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(row, dtype):
    router = row(D, E).eval()
    x = torch.randn(T, D).to(dtype)
    tokens = with_previous(router, x, known(T))
    plain = router(x, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = router(x, tokens)
    for name in ("logits", "scores", "weights"):
        assert getattr(autocast, name).dtype == torch.float32
        torch.testing.assert_close(getattr(autocast, name), getattr(plain, name), rtol=0, atol=0)
    assert autocast.expert_ids.tolist() == plain.expert_ids.tolist()


@every_router
def test_evaluation_is_deterministic_and_leaves_the_generator_alone(row):
    router = row(D, E).eval()
    x = torch.randn(T, D)
    before = torch.get_rng_state()
    first, second = router(x, known(T)), router(x, known(T))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.expert_ids, second.expert_ids)
    assert torch.equal(first.weights, second.weights)


@every_router
def test_the_input_is_left_as_it_was(row):
    x = torch.randn(T, D)
    before = x.clone()
    row(D, E)(x, known(T))
    assert torch.equal(x, before)


@every_router
def test_training_repeats_with_the_seed(row):
    router, x = row(D, E).train(), torch.randn(T, D)

    def run():
        torch.manual_seed(3)
        return router(x, known(T))

    first, second = run(), run()
    assert torch.equal(first.expert_ids, second.expert_ids)
    assert torch.equal(first.weights, second.weights)


@every_router
def test_arguments_are_kept_under_their_own_names(row):
    router = row(D, E)
    wanted = {
        name: parameter.default
        for name, parameter in inspect.signature(row.cls.__init__).parameters.items()
        if name not in ("self", "hidden_size", "num_experts")
    } | row.arguments
    assert init_arguments(router) == {"hidden_size": D, "num_experts": E, **wanted}
    again = row.cls(**init_arguments(router))
    assert init_arguments(again) == init_arguments(router)


@every_router
def test_the_state_dict_is_complete(row):
    x = torch.randn(64, D)
    torch.manual_seed(1)
    router = row(D, E).eval()
    torch.manual_seed(2)
    other = row(D, E).eval()
    tokens = with_previous(router, x, known(64))
    assert not same(of_tokens(router(x, tokens), range(64)), of_tokens(other(x, tokens), range(64)))
    other.load_state_dict(router.state_dict())
    assert torch.equal(router(x, tokens).weights, other(x, tokens).weights)
    assert torch.equal(router(x, tokens).expert_ids, other(x, tokens).expert_ids)


def changes_earlier_tokens(router, training, changed, num_tokens=16):
    """Whether a change of the tokens from ``changed`` on changes the routing of one before."""
    x, other = torch.randn(num_tokens, D), 10 * torch.randn(num_tokens, D)
    other[:changed] = x[:changed]

    def route(inputs):
        torch.manual_seed(3)
        # the ids change with the tokens, and so do the logits of the layer before
        tokens = with_previous(router, inputs, known(num_tokens))
        return of_tokens(router.train(training)(inputs, tokens), range(changed))

    return not same(route(x), route(other))


@every_router
def test_causal_is_kept(row):
    router = row(D, E)
    assert isinstance(router.causal, bool)
    found = [changes_earlier_tokens(router, training, t) for training in (True, False) for t in range(1, 16)]
    assert any(found) == (not router.causal)


@every_router
def test_the_padding_mask_is_passed_on(row):
    router = row(D, E)
    x, mask = torch.randn(3, D), torch.tensor([True, False, True])
    assert router(x, known(3)).token_mask is None
    assert router(x, known(3, mask=mask)).token_mask.tolist() == mask.tolist()


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_no_other_token(row, training):
    router = row(D, E).train(training)
    mask = torch.arange(16) % 3 > 0
    real = set(mask.nonzero().flatten().tolist())
    x, noise = torch.randn(16, D), 10 * torch.randn(16, D)

    def route(inputs):
        torch.manual_seed(3)
        return of_tokens(router(inputs, known(16, mask=mask)), real)

    assert same(route(x), route(torch.where(mask.unsqueeze(1), x, noise)))


def compile_and_compare():
    for row in ROUTER_ROWS.values():
        router = row(D, E).eval()
        if not router.static_shapes:
            continue
        torch.compiler.reset()
        compiled = torch.compile(router, backend="eager", fullgraph=True)
        x, twin = (t.requires_grad_() for t in torch.randn(T, D).repeat(2, 1, 1).unbind())
        tokens = with_previous(router, x.detach(), known(T))
        mine, theirs = router(x, tokens), compiled(twin, tokens)
        assert torch.equal(mine.expert_ids, theirs.expert_ids)
        torch.testing.assert_close(mine.weights, theirs.weights, **FLOAT32)
        if router.learned:
            upstream = torch.randn_like(mine.weights)
            mine.weights.backward(upstream)
            theirs.weights.backward(upstream)
            torch.testing.assert_close(x.grad, twin.grad, **FLOAT32)


@pytest.mark.slow
def test_compiles_in_one_graph():
    # in a process of its own: TorchDynamo cannot trace the shape checks of the test run
    code = "import test_routers; test_routers.compile_and_compare(); print('compared')"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.stdout.strip() == "compared", run.stderr


@every_router
def test_gate_is_no_linear_that_a_plugin_would_quantise(row):
    assert not any(isinstance(module, nn.Linear) for module in row(D, E).modules())


# --- top-k by hand ---


def by_hand(top_k, normalize):
    router = TopKRouter(1, 3, top_k=top_k, normalize=normalize)
    # the scores of x = 1 are 1/6, 3/6, 2/6
    router.gate.data = torch.tensor([[1.0], [3.0], [2.0]]).log()
    return router(torch.ones(1, 1))


def test_worked_example():
    routing = by_hand(2, normalize=True)
    torch.testing.assert_close(routing.scores, torch.tensor([[1 / 6, 3 / 6, 2 / 6]]))
    torch.testing.assert_close(routing.logits, torch.tensor([[0.0, math.log(3), math.log(2)]]))
    assert routing.expert_ids.tolist() == [1, 2]
    assert routing.token_ids.tolist() == [0, 0]
    torch.testing.assert_close(routing.weights, torch.tensor([3 / 5, 2 / 5]))
    assert routing.top_k == 2


def test_worked_example_raw():
    routing = by_hand(2, normalize=False)
    assert routing.expert_ids.tolist() == [1, 2]
    torch.testing.assert_close(routing.weights, torch.tensor([3 / 6, 2 / 6]))


def test_worked_example_switch():
    routing = by_hand(1, normalize=False)
    assert routing.expert_ids.tolist() == [1]
    torch.testing.assert_close(routing.weights, torch.tensor([3 / 6]))


def test_top_k_assignment_is_in_token_order():
    token_ids, expert_ids = top_k_assignment(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]]), 2)
    assert token_ids.tolist() == [0, 0, 1, 1]
    assert expert_ids.tolist() == [1, 2, 0, 2]


def test_bfloat16_logits_that_would_collide_are_told_apart():
    router = TopKRouter(2, 2, top_k=1, normalize=False).bfloat16()
    # 256 and 256 + 0.5 are one bfloat16 number
    router.gate.data = torch.tensor([[256.0, 0.0], [256.0, 0.5]], dtype=torch.bfloat16)
    routing = router(torch.ones(1, 2, dtype=torch.bfloat16))
    assert routing.expert_ids.tolist() == [1]


def test_float64_stays_float64():
    routing = TopKRouter(D, E).double()(torch.randn(T, D, dtype=torch.float64))
    assert routing.logits.dtype == torch.float64


def test_init_std():
    gate = TopKRouter(500, 20, init_std=0.3).gate
    # the standard deviation of 10,000 numbers is off by less than 0.3 / sqrt(20,000) = 0.002; five times that
    assert abs(gate.std().item() - 0.3) < 0.01
    assert not TopKRouter(D, E, init_std=0.0).gate.any()


# --- noise ---


def test_jitter_scales_the_input_in_training_only():
    router = TopKRouter(1, 3, top_k=1, normalize=False, jitter=0.25)
    router.gate.data = torch.ones(3, 1)
    x = torch.ones(2000, 1)
    logits = router(x).logits
    assert 0.75 <= logits.min().item() < 0.76  # of 2000 uniform numbers, one is near either end
    assert 1.24 < logits.max().item() <= 1.25
    assert bool((router.eval()(x).logits == 1).all())


def test_noise_moves_the_choice_and_not_the_scores():
    noisy, plain = TopKRouter(D, E, noise_std=5.0), TopKRouter(D, E)
    plain.load_state_dict(noisy.state_dict())
    x = torch.randn(64, D)
    first, second, without = noisy(x), noisy(x), plain(x)
    assert not torch.equal(first.expert_ids, second.expert_ids)
    torch.testing.assert_close(first.scores, without.scores, rtol=0, atol=0)
    chosen = first.scores[first.token_ids, first.expert_ids].view(64, 2)
    torch.testing.assert_close(first.weights.view(64, 2), chosen / chosen.sum(1, keepdim=True), **FLOAT32)
    assert torch.equal(noisy.eval()(x).expert_ids, without.expert_ids)


# --- transformers ---


def their_router(family, norm_topk_prob):
    sizes = {"hidden_size": D, "num_experts_per_tok": 2}
    if family == "mixtral":
        return MixtralTopKRouter(MixtralConfig(**sizes, num_local_experts=E))
    if family == "olmoe":
        return OlmoeTopKRouter(OlmoeConfig(**sizes, num_experts=E, norm_topk_prob=norm_topk_prob))
    return Qwen3MoeTopKRouter(Qwen3MoeConfig(**sizes, num_experts=E, norm_topk_prob=norm_topk_prob))


@pytest.mark.parametrize(
    ("family", "normalize"),
    [("mixtral", True), ("olmoe", True), ("olmoe", False), ("qwen3_moe", True), ("qwen3_moe", False)],
)
def test_equals_the_router_of_transformers(family, normalize):
    theirs, ours = their_router(family, normalize), TopKRouter(D, E, top_k=2, normalize=normalize)
    nn.init.normal_(theirs.weight)
    ours.gate.data.copy_(theirs.weight.data)
    x, their_x = (t.requires_grad_() for t in torch.randn(T, D).repeat(2, 1, 1).unbind())
    routing, (logits, weights, expert_ids) = ours(x), theirs(their_x)
    torch.testing.assert_close(routing.logits, logits, **FLOAT32)
    torch.testing.assert_close(routing.weights.view(T, 2), weights, **FLOAT32)
    assert routing.expert_ids.view(T, 2).tolist() == expert_ids.tolist()
    upstream = torch.randn(T, 2)
    routing.weights.view(T, 2).backward(upstream)
    weights.backward(upstream)
    torch.testing.assert_close(x.grad, their_x.grad, **FLOAT32)
    torch.testing.assert_close(ours.gate.grad, theirs.weight.grad, **FLOAT32)


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 6}, "top_k=6 with num_experts=5"),
        ({"top_k": 0}, "top_k=0 with num_experts=5"),
        ({"top_k": 1}, "normalize=False"),
        ({"jitter": -0.1}, "jitter=-0.1"),
        ({"noise_std": -1.0}, "noise_std=-1.0"),
        ({"init_std": -1.0}, "init_std=-1.0"),
    ],
)
def test_refuses_in_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(D, E, **arguments)


def test_router_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Router(D, E)
