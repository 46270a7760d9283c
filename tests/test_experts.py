import copy

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock

from lightning_moe import Experts, MoELayer, Routing, TopKRouter, combine, dispatch
from lightning_moe.experts import _can_group

# Two float32 sums of at most 32 products of size about 1, in another order.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
# bfloat16 keeps 8 bits, so each rounding is a relative 2^-9; a result passes about four, and the loop rounds elsewhere.
BFLOAT16 = {"rtol": 2e-2, "atol": 2e-2}


def experts_of(num_experts=5, hidden_size=6, expert_size=10, dtype=torch.float32, **settings):
    experts = Experts(num_experts, hidden_size, expert_size, dtype=dtype, **settings)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return experts


def routing_of(pairs, num_tokens, num_experts, top_k=None, weights_dtype=torch.float32):
    """A routing of (token, expert) pairs with random weights that are a leaf of the graph."""
    tokens, chosen = [t for t, _ in pairs], [e for _, e in pairs]
    weights = (torch.rand(len(pairs), dtype=weights_dtype) + 0.1).requires_grad_()
    table = torch.zeros(num_tokens, num_experts)
    ids = {"token_ids": torch.tensor(tokens, dtype=torch.int64), "expert_ids": torch.tensor(chosen, dtype=torch.int64)}
    return Routing(**ids, weights=weights, logits=table, scores=table, top_k=top_k)


def regular(num_tokens, num_experts, top_k, **settings):
    chosen = [torch.randperm(num_experts)[:top_k].tolist() for _ in range(num_tokens)]
    pairs = [(t, e) for t, row in enumerate(chosen) for e in row]
    return routing_of(pairs, num_tokens, num_experts, top_k, **settings)


ROUTINGS = {
    "odd": lambda: regular(7, 5, 2),
    "all_experts": lambda: regular(3, 5, 5),
    "one_expert_each": lambda: regular(7, 5, 1),
    "one_token": lambda: regular(1, 5, 2),
    "no_token": lambda: regular(0, 5, 2),
    "empty_experts": lambda: routing_of([(t, e) for t in range(4) for e in (1, 3)], 4, 5, top_k=2),
    "all_on_the_last": lambda: routing_of([(t, 4) for t in range(4)], 4, 5, top_k=1),
    "same_expert_twice": lambda: routing_of([(0, 2), (0, 2), (1, 0), (1, 2), (2, 4), (2, 4)], 3, 5, top_k=2),
    # tokens with three, no, one and two assignments, in no order
    "irregular": lambda: routing_of([(3, 1), (0, 4), (0, 0), (2, 1), (0, 1), (3, 3)], 4, 5),
    "irregular_same_expert_twice": lambda: routing_of([(0, 2), (1, 0), (0, 2)], 3, 5),
    "no_assignment": lambda: routing_of([], 3, 5),
}
LAYOUTS = {
    "swiglu": {},
    "swiglu_module": {"activation": nn.SiLU()},
    "swiglu_biases": {"up_bias": True, "down_bias": True},
    "geglu": {"activation": nn.GELU()},
    "gelu": {"activation": nn.GELU(), "gated": False},
    "relu_biases": {"activation": F.relu, "gated": False, "up_bias": True, "down_bias": True},
    "down_bias_only": {"activation": torch.tanh, "gated": False, "down_bias": True},
}
# Rows of 6, 10 and 20 float32 are no multiples of 16 bytes: the loop. Of 8, 16 and 32 they are: torch's grouped kernel.
SIZES = {"loop": (6, 10), "grouped": (8, 16)}


def assert_equals_reference(experts, x, routing, compute=None, **tolerance):
    """Output and every gradient, those of the routing weights included, against the loop over tokens."""
    slow = reference.unstack(experts)
    slow_x = x.detach().clone().requires_grad_()
    slow_weights = routing.weights.detach().clone().requires_grad_()
    x = x.detach().clone().requires_grad_()
    truth = reference.moe(slow_x, routing.token_ids, routing.expert_ids, slow_weights, slow)
    y = (compute or experts)(x, routing)
    assert y.dtype == truth.dtype
    torch.testing.assert_close(y, truth, **tolerance)
    upstream = torch.randn_like(truth)
    truth.backward(upstream)
    y.backward(upstream)
    torch.testing.assert_close(x.grad, slow_x.grad, **tolerance)
    if slow_weights.grad is not None:
        torch.testing.assert_close(routing.weights.grad, slow_weights.grad, **tolerance)
    wanted = reference.stacked_gradients(slow)
    assert wanted.keys() == dict(experts.named_parameters()).keys()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, f"{name} must get a gradient of zeros where no token went"
        torch.testing.assert_close(parameter.grad, wanted[name], **tolerance)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["swiglu", "relu_biases"])
def test_fast_equals_slow_for_every_routing(layout, size, routing):
    routing = ROUTINGS[routing]()
    hidden_size, expert_size = SIZES[size]
    experts = experts_of(5, hidden_size, expert_size, **LAYOUTS[layout])
    assert_equals_reference(experts, torch.randn(routing.num_tokens, hidden_size), routing, **FLOAT32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fast_equals_slow_for_every_layout(layout, size):
    hidden_size, expert_size = SIZES[size]
    experts = experts_of(5, hidden_size, expert_size, **LAYOUTS[layout])
    assert_equals_reference(experts, torch.randn(7, hidden_size), regular(7, 5, 2), **FLOAT32)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", ["swiglu", "relu_biases"])
def test_the_loop_that_ships_equals_the_reference(layout, routing):
    routing = ROUTINGS[routing]()
    experts = experts_of(**LAYOUTS[layout])
    x = torch.randn(routing.num_tokens, 6)
    assert_equals_reference(experts, x, routing, compute=experts.loop, **FLOAT32)


@pytest.mark.parametrize(("size", "calls"), [("loop", 0), ("grouped", 2)])
def test_the_grouped_kernel_runs_where_it_can(monkeypatch, size, calls):
    seen = spy_on_grouped_mm(monkeypatch)
    hidden_size, expert_size = SIZES[size]
    experts_of(5, hidden_size, expert_size)(torch.randn(7, hidden_size), regular(7, 5, 2))
    assert len(seen) == calls


def spy_on_grouped_mm(monkeypatch):
    seen, grouped_mm = [], F.grouped_mm

    def spy(x, weight, **kwargs):
        seen.append((x.dtype, weight.dtype))
        return grouped_mm(x, weight, **kwargs)

    monkeypatch.setattr(F, "grouped_mm", spy)
    return seen


@pytest.mark.parametrize("routing", ["odd", "empty_experts", "same_expert_twice", "irregular", "one_token", "no_token"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["swiglu", "relu_biases"])
def test_bfloat16(layout, size, routing):
    routing = ROUTINGS[routing]()
    hidden_size, expert_size = SIZES[size]
    experts = experts_of(5, hidden_size, expert_size, dtype=torch.bfloat16, **LAYOUTS[layout])
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.mul_(0.5)  # keeps every number of the test near 1, where the absolute tolerance is meant
    x = torch.randn(routing.num_tokens, hidden_size, dtype=torch.bfloat16)
    assert_equals_reference(experts, x, routing, **BFLOAT16)


def test_bfloat16_combines_in_float32():
    # 256 + 1 is no bfloat16 number: summing in bfloat16 would lose each of the ones
    y = torch.tensor([[256.0]] + [[1.0]] * 4, dtype=torch.bfloat16)
    for top_k in (5, None):
        routing = routing_of([(0, e) for e in range(5)], 1, 5, top_k=top_k)
        routing.weights.data.fill_(1.0)
        out = combine(y, dispatch(torch.zeros(1, 1, dtype=torch.bfloat16), routing), routing)
        assert out.dtype == torch.bfloat16
        assert out.item() == 260.0


@pytest.mark.parametrize("top_k", [2, None])
def test_gradcheck_in_float64(top_k):
    pairs = [(0, 2), (0, 2), (1, 0), (1, 2), (2, 0), (2, 2)]  # expert 1 is empty, token 0 has expert 2 twice
    experts = experts_of(3, 4, 3, dtype=torch.float64, up_bias=True, down_bias=True)
    routing = routing_of(pairs, 3, 3, top_k=top_k, weights_dtype=torch.float64)
    names = [name for name, _ in experts.named_parameters()]

    def compute(x, weights, *parameters):
        given = Routing(routing.token_ids, routing.expert_ids, weights, routing.logits, routing.scores, None, top_k)
        return torch.func.functional_call(experts, dict(zip(names, parameters, strict=True)), (x, given))

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(compute, (x, routing.weights, *experts.parameters()))


# Without biases the same bfloat16 products are summed: nothing differs. A dense layer adds its bias before it rounds to
# bfloat16, ours after: numbers up to 4 then differ by 2^-6, and 16 of them are summed with weights of 0.5.
@pytest.mark.parametrize(("layout", "atol"), [("swiglu", 0), ("relu_biases", 16**0.5 * 2**-6)])
def test_autocast_computes_what_a_dense_ffn_does_under_autocast(monkeypatch, layout, atol):
    seen = spy_on_grouped_mm(monkeypatch)
    experts = experts_of(5, 8, 16, **LAYOUTS[layout])
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].clone().expand_as(parameter))
    dense = reference.unstack(experts)[0]
    routing = regular(7, 5, 2)
    routing.weights.data.copy_(torch.tensor([0.25, 0.75]).repeat(7))
    x, dense_x = (t.requires_grad_() for t in torch.randn(7, 8).repeat(2, 1, 1).unbind())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, wanted = experts(x, routing), dense(dense_x)
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 2
    assert y.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted, rtol=0, atol=atol)
    upstream = torch.randn_like(wanted)
    y.backward(upstream)
    wanted.backward(upstream)
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, dense_x.grad, rtol=2e-2, atol=5e-2)
    # what the experts get adds up to what the one dense FFN gets: each token's weights sum to one
    assert experts.down_proj.grad.dtype == torch.float32
    torch.testing.assert_close(experts.down_proj.grad.sum(0), dense.down.grad, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_activation_checkpointing_changes_nothing(size, use_reentrant):
    hidden_size, expert_size = SIZES[size]
    experts = experts_of(5, hidden_size, expert_size)

    def compute(x, routing):
        def inner(x, weights):
            ids = routing.token_ids, routing.expert_ids
            return experts(x, Routing(*ids, weights, routing.logits, routing.scores, None, routing.top_k))

        return checkpoint(inner, x, routing.weights, use_reentrant=use_reentrant)

    assert_equals_reference(experts, torch.randn(7, hidden_size), regular(7, 5, 2), compute=compute, **FLOAT32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("routing", ["odd", "irregular"])
def test_expanded_gradients(routing, size):
    # y.sum() sends back one number expanded with stride 0, which a grouped kernel must not take for a matrix
    routing = ROUTINGS[routing]()
    hidden_size, expert_size = SIZES[size]
    experts = experts_of(5, hidden_size, expert_size)
    slow, x = reference.unstack(experts), torch.randn(routing.num_tokens, hidden_size)
    experts(x, routing).sum().backward()
    reference.moe(x, routing.token_ids, routing.expert_ids, routing.weights.detach(), slow).sum().backward()
    for name, wanted in reference.stacked_gradients(slow).items():
        torch.testing.assert_close(experts.get_parameter(name).grad, wanted, **FLOAT32)


def test_strided_input():
    # what a transposed activation looks like
    experts, routing = experts_of(5, 8, 16), regular(7, 5, 2)
    x = torch.randn(8, 7).t()
    assert not x.is_contiguous()
    torch.testing.assert_close(experts(x, routing), experts(x.contiguous(), routing), rtol=0, atol=0)


def test_dispatch_sorts_by_expert_and_keeps_the_order_of_the_tokens():
    routing = routing_of([(0, 2), (0, 0), (1, 2), (1, 1), (2, 2), (2, 0)], 3, 4, top_k=2)
    rows = dispatch(torch.tensor([[0.0], [1.0], [2.0]]), routing)
    assert rows.expert_ids.tolist() == [0, 0, 1, 2, 2, 2]
    assert rows.x.flatten().tolist() == [0, 2, 1, 0, 1, 2]
    assert rows.offsets.tolist() == [2, 3, 6, 6]


@pytest.mark.parametrize(
    ("dtype", "shape", "can"),
    [
        (torch.float32, (16, 8), True),
        (torch.float32, (16, 6), False),
        (torch.float32, (6, 8), False),
        (torch.bfloat16, (16, 8), True),
        (torch.bfloat16, (16, 4), False),
        (torch.float64, (16, 8), False),
    ],
)
def test_what_the_kernel_takes(dtype, shape, can):
    x, weight = torch.zeros(3, shape[1], dtype=dtype), torch.zeros(2, *shape, dtype=dtype)
    assert _can_group(x, weight) == can
    offsets = torch.tensor([1, 3], dtype=torch.int32)
    if can:
        F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)


# --- transformers ---


def mixtral(hidden_size, expert_size):
    config = MixtralConfig(
        hidden_size=hidden_size, intermediate_size=expert_size, num_local_experts=5, num_experts_per_tok=2
    )
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def copied(block, hidden_size, expert_size):
    experts = Experts(5, hidden_size, expert_size)
    experts.load_state_dict(block.experts.state_dict())
    router = TopKRouter(hidden_size, 5, top_k=2)
    router.load_state_dict({"gate": block.gate.weight})
    return MoELayer(router, experts)


@pytest.mark.parametrize("size", SIZES)
def test_experts_equal_those_of_mixtral(size):
    hidden_size, expert_size = SIZES[size]
    theirs = mixtral(hidden_size, expert_size).experts
    assert isinstance(theirs, MixtralExperts)
    ours = Experts(5, hidden_size, expert_size)
    ours.load_state_dict(theirs.state_dict())
    routing = regular(7, 5, 2)
    x = torch.randn(7, hidden_size)
    y = ours(x, routing)
    wanted = theirs(x, routing.expert_ids.view(7, 2), routing.weights.view(7, 2))
    torch.testing.assert_close(y, wanted, **FLOAT32)
    upstream = torch.randn_like(y)
    own_grads = torch.autograd.grad(y, [routing.weights, *ours.parameters()], upstream)
    their_grads = torch.autograd.grad(wanted, [routing.weights, *theirs.parameters()], upstream)
    for own, their in zip(own_grads, their_grads, strict=True):
        torch.testing.assert_close(own, their, **FLOAT32)


@pytest.mark.parametrize("size", SIZES)
def test_a_layer_equals_the_block_of_mixtral(size):
    hidden_size, expert_size = SIZES[size]
    block = mixtral(hidden_size, expert_size)
    layer = copied(block, hidden_size, expert_size)
    x, their_x = (t.requires_grad_() for t in torch.randn(2, 7, hidden_size).repeat(2, 1, 1, 1).unbind())
    y, wanted = layer(x), block(their_x)
    torch.testing.assert_close(y, wanted, **FLOAT32)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(x.grad, their_x.grad, **FLOAT32)
    # the gate's gradient sums over 14 tokens what is itself a sum over D
    torch.testing.assert_close(layer.router.gate.grad, block.gate.weight.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in layer.experts.named_parameters():
        torch.testing.assert_close(parameter.grad, block.experts.get_parameter(name).grad, **FLOAT32)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 8), (7, 8), (2, 7, 8), (2, 0, 8), (2, 3, 7, 8)])
def test_a_layer_keeps_the_shape(shape):
    layer = copied(mixtral(8, 16), 8, 16)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    torch.testing.assert_close(y, layer(x.reshape(-1, 8)).view(shape), **FLOAT32)
    y.sum().backward()
    assert layer.router.gate.grad is not None


def test_a_layer_refuses_a_router_of_other_experts():
    with pytest.raises(ValueError, match="router of 4 experts cannot serve 5"):
        MoELayer(TopKRouter(8, 4), Experts(5, 8, 16))


def test_a_copied_layer_trains_by_itself():
    layer = copied(mixtral(8, 16), 8, 16)
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 8)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    twin(x).sum().backward()
    assert layer.experts.down_proj.grad is None
