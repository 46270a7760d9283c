import copy
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


@every_router
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_tokens", SIZES.values(), ids=SIZES)
def test_a_routing_is_well_formed(row, num_tokens, training):
    router = row(D, E).train(training)
    routing = router(torch.randn(num_tokens, D))
    N = routing.token_ids.numel()
    assert routing.expert_ids.shape == routing.weights.shape == (N,)
    assert routing.logits.shape == routing.scores.shape == (num_tokens, E)
    assert (routing.num_tokens, routing.num_experts) == (num_tokens, E)
    assert routing.logits.dtype == routing.scores.dtype == routing.weights.dtype == torch.float32
    assert all(0 <= t < num_tokens for t in routing.token_ids.tolist())
    assert all(0 <= e < E for e in routing.expert_ids.tolist())
    assert bool((routing.weights >= 0).all())
    assert bool((routing.scores >= 0).all())
    assert routing.weights.requires_grad


@every_router
def test_the_gradient_reaches_every_parameter_and_the_input(row):
    router = row(D, E)
    x = torch.randn(T, D, requires_grad=True)
    (router(x).weights * torch.arange(1.0, 1 + router(x).weights.numel())).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    assert bool(x.grad.any())


@every_router
def test_rows_are_regular_where_it_says_so(row):
    routing = row(D, E)(torch.randn(T, D))
    if routing.top_k is not None:
        assert routing.token_ids.tolist() == [t for t in range(T) for _ in range(routing.top_k)]


@every_router
def test_experts_per_token_is_the_mean_number_of_rows(row):
    router = row(D, E)
    routing = router(torch.randn(64, D))
    if router.static_shapes:
        assert routing.token_ids.numel() == router.experts_per_token * 64


@every_router
def test_weights_sum_to_one_is_kept_or_not_promised(row):
    router = row(D, E)
    routing = router(torch.randn(64, D))
    sums = torch.zeros(64).index_add(0, routing.token_ids, routing.weights)
    # a handful of float32 roundings
    is_one = torch.allclose(sums, torch.ones(64), atol=1e-6)
    assert is_one == router.weights_sum_to_one


@every_router
def test_low_precision_input_gives_float32_routing(row):
    router = row(D, E).eval()
    x = torch.randn(T, D).bfloat16()
    low = copy.deepcopy(router).bfloat16()
    routing = low(x)
    assert routing.logits.dtype == routing.scores.dtype == routing.weights.dtype == torch.float32
    router.load_state_dict(low.state_dict())  # the same numbers, each a bfloat16 one
    exact = router(x.float())
    # nothing but the parameters and the input is rounded
    torch.testing.assert_close(routing.logits, exact.logits, **FLOAT32)
    assert routing.expert_ids.tolist() == exact.expert_ids.tolist()


@every_router
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(row, dtype):
    router = row(D, E).eval()
    x = torch.randn(T, D).to(dtype)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = router(x)
    for name in ("logits", "scores", "weights"):
        assert getattr(autocast, name).dtype == torch.float32
        torch.testing.assert_close(getattr(autocast, name), getattr(plain, name), rtol=0, atol=0)
    assert autocast.expert_ids.tolist() == plain.expert_ids.tolist()


@every_router
def test_evaluation_is_deterministic_and_leaves_the_generator_alone(row):
    router = row(D, E).eval()
    x = torch.randn(T, D)
    before = torch.get_rng_state()
    first, second = router(x), router(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.expert_ids, second.expert_ids)
    assert torch.equal(first.weights, second.weights)


@every_router
def test_the_input_is_left_as_it_was(row):
    x = torch.randn(T, D)
    before = x.clone()
    row(D, E)(x)
    assert torch.equal(x, before)


@every_router
def test_training_repeats_with_the_seed(row):
    router, x = row(D, E).train(), torch.randn(T, D)

    def run():
        torch.manual_seed(3)
        return router(x)

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
    router, other = row(D, E), row(D, E)
    x = torch.randn(T, D)
    assert not torch.equal(router.eval()(x).logits, other.eval()(x).logits)
    other.load_state_dict(router.state_dict())
    assert torch.equal(router(x).weights, other(x).weights)
    assert torch.equal(router(x).expert_ids, other(x).expert_ids)


@every_router
def test_causal_is_kept(row):
    router = row(D, E).eval()
    assert isinstance(router.causal, bool)
    if not router.causal:
        return
    x = torch.randn(T, D)
    before = router(x)
    for changed in range(T):
        other = x.clone()
        other[changed:] = 10 * torch.randn(T - changed, D)
        after = router(other)
        for routing in (before, after):
            assert routing.token_ids.numel() > 0
        kept, still = before.token_ids < changed, after.token_ids < changed
        assert before.expert_ids[kept].tolist() == after.expert_ids[still].tolist()
        # the same row in a matrix product of the same shape
        torch.testing.assert_close(before.weights[kept], after.weights[still], **FLOAT32)


@every_router
def test_the_padding_mask_is_passed_on(row):
    router = row(D, E)
    x, mask = torch.randn(3, D), torch.tensor([True, False, True])
    assert router(x).token_mask is None
    assert router(x, Tokens()).token_mask is None
    assert router(x, Tokens(mask=mask)).token_mask.tolist() == mask.tolist()


@every_router
def test_padding_changes_no_other_token(row):
    router = row(D, E).eval()
    x, mask = torch.randn(3, D), torch.tensor([True, True, False])
    other = torch.cat([x[:2], 10 * torch.randn(1, D)])
    before, after = router(x, Tokens(mask=mask)), router(other, Tokens(mask=mask))
    kept, still = before.token_ids < 2, after.token_ids < 2
    assert before.expert_ids[kept].tolist() == after.expert_ids[still].tolist()
    torch.testing.assert_close(before.weights[kept], after.weights[still], **FLOAT32)


def compile_and_compare():
    for row in ROUTER_ROWS.values():
        router = row(D, E).eval()
        if not router.static_shapes:
            continue
        torch.compiler.reset()
        compiled = torch.compile(router, backend="eager", fullgraph=True)
        x, twin = (t.requires_grad_() for t in torch.randn(T, D).repeat(2, 1, 1).unbind())
        mine, theirs = router(x), compiled(twin)
        assert torch.equal(mine.expert_ids, theirs.expert_ids)
        torch.testing.assert_close(mine.weights, theirs.weights, **FLOAT32)
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
