import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from test_experts import LAYOUTS, ROUTINGS, SIZES, regular, routing_of, spy_on_grouped_mm
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_moe import Experts, MoELayer, TopKRouter, combine
from lightning_moe.low_rank import LowRankExperts

# Float32 sums of at most 32 products of size about 1, in another order, and two of them in a row.
FLOAT32 = {"rtol": 1e-5, "atol": 2e-5}
# bfloat16 keeps 8 bits, so each rounding is a relative 2^-9; a result passes about six.
BFLOAT16 = {"rtol": 2e-2, "atol": 3e-2}
LOW_RANK = {"first_a", "first_b", "down_a", "down_b"}
# A rank of 3 goes through the loop, one of 4 through torch's grouped kernel where the widths do: 16 bytes of float32.
RANKS = {"loop": 3, "grouped": 4}


def low_rank_of(hidden_size=6, expert_size=10, rank=3, num_experts=5, std=0.4, **settings):
    experts = LowRankExperts(num_experts, hidden_size, expert_size, rank=rank, alpha=2.0, **settings)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=std)
    return experts


def of_size(size, **settings):
    return low_rank_of(*SIZES[size], RANKS[size], **settings)


def written_out(experts, dtype=None):
    """Leaves for the low-rank parameters, and each expert as ``W + alpha / rank * B A`` of these."""
    own = {name: p.detach().to(dtype or p.dtype).clone() for name, p in experts.named_parameters()}
    leaves = {name: own[name].requires_grad_() for name in LOW_RANK}
    prefix, width, rank, scale = "gate_up" if experts.gated else "up", experts.expert_size, experts.rank, 2.0
    first, bias, down = own[f"{prefix}_proj"][0], own.get(f"{prefix}_proj_bias"), own["down_proj"][0]
    result = []
    for e in range(experts.num_experts):
        a, b = leaves["first_a"][e], leaves["first_b"][e]
        expert = reference.Expert(
            experts.activation,
            up=first[-width:] + scale / rank * b[-width:] @ a[-rank:],
            down=down + scale / rank * leaves["down_b"][e] @ leaves["down_a"][e],
        )
        if experts.gated:
            expert.gate = first[:width] + scale / rank * b[:width] @ a[:rank]
        if bias is not None:
            expert.up_bias = bias[0, -width:]
            expert.gate_bias = bias[0, :width] if experts.gated else None
        if experts.down_proj_bias is not None:
            expert.down_bias = own["down_proj_bias"][0]
        result.append(expert)
    return leaves, result


def assert_equals_written_out(experts, x, routing, compute=None, dtype=None, **tolerance):
    """Output and every gradient against the loop over tokens and the weights written out; none for what is shared."""
    leaves, slow = written_out(experts, dtype)
    slow_x = x.detach().to(dtype or x.dtype).clone().requires_grad_()
    slow_weights = routing.weights.detach().clone().requires_grad_()
    kept = torch.ones_like(routing.expert_ids, dtype=torch.bool) if routing.computed() is None else routing.computed()
    truth = reference.moe(slow_x, routing.token_ids[kept], routing.expert_ids[kept], slow_weights[kept], slow)
    x = x.detach().clone().requires_grad_()
    y = (compute or experts)(x, routing)
    torch.testing.assert_close(y, truth.to(x.dtype), **tolerance)
    upstream = torch.randn_like(y)
    truth.backward(upstream.to(truth.dtype))
    y.backward(upstream)
    torch.testing.assert_close(x.grad, slow_x.grad.to(x.dtype), **tolerance)
    if slow_weights.grad is not None:
        torch.testing.assert_close(routing.weights.grad, slow_weights.grad, **tolerance)
    for name, parameter in experts.named_parameters():
        if name not in LOW_RANK:
            assert parameter.grad is None, f"{name} is frozen"
            continue
        assert parameter.grad is not None, f"{name} must get a gradient of zeros where no token went"
        wanted = torch.zeros_like(parameter) if leaves[name].grad is None else leaves[name].grad.to(parameter.dtype)
        torch.testing.assert_close(parameter.grad, wanted, **tolerance)


def by_outputs(experts):
    def compute(x, routing):
        y, rows = experts.outputs(x, routing)
        return combine(y, rows, routing)

    return compute


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["swiglu", "relu_biases"])
def test_fast_equals_written_out_for_every_routing(layout, size, routing):
    experts, routing = of_size(size, **LAYOUTS[layout]), ROUTINGS[routing]()
    x = torch.randn(routing.num_tokens, experts.hidden_size)
    assert_equals_written_out(experts, x, routing, **FLOAT32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fast_equals_written_out_for_every_layout(layout, size):
    experts = of_size(size, **LAYOUTS[layout])
    assert_equals_written_out(experts, torch.randn(7, experts.hidden_size), regular(7, 5, 2), **FLOAT32)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("way", ["outputs", "loop"])
@pytest.mark.parametrize("layout", ["swiglu_biases", "gelu"])
def test_outputs_and_the_loop_that_ships_equal_written_out(layout, way, routing):
    experts, routing = low_rank_of(**LAYOUTS[layout]), ROUTINGS[routing]()
    compute = experts.loop if way == "loop" else by_outputs(experts)
    assert_equals_written_out(experts, torch.randn(routing.num_tokens, 6), routing, compute=compute, **FLOAT32)


@pytest.mark.parametrize("way", ["forward", "outputs", "loop"])
@pytest.mark.parametrize("routing", ["odd", "irregular"])
@pytest.mark.parametrize("size", SIZES)
def test_dropped_assignments_add_nothing(size, routing, way):
    experts, routing = of_size(size, **LAYOUTS["swiglu_biases"]), ROUTINGS[routing]()
    dropped = torch.arange(len(routing.expert_ids)) % 3 == 0
    dropped |= routing.token_ids == 0  # token 0 loses every expert, and with them the down bias
    routing = replace(routing, dropped=dropped)
    compute = {"forward": experts, "outputs": by_outputs(experts), "loop": experts.loop}[way]
    x = torch.randn(routing.num_tokens, experts.hidden_size)
    assert torch.equal(compute(x, routing)[0], torch.zeros(experts.hidden_size))
    assert_equals_written_out(experts, x, routing, compute=compute, **FLOAT32)


@pytest.mark.parametrize("size", SIZES)
def test_assignments_to_no_ffn_add_nothing(size):
    experts = of_size(size, **LAYOUTS["relu_biases"])
    routing = replace(routing_of([(t, e) for t in range(3) for e in (t, 5)], 3, 6, top_k=2), num_ffn_experts=5)
    assert_equals_written_out(experts, torch.randn(3, experts.hidden_size), routing, **FLOAT32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_ordinary_experts_of_the_same_weights(layout):
    experts = of_size("grouped", **LAYOUTS[layout])
    _, slow = written_out(experts)
    ordinary = Experts(5, 8, 16, **LAYOUTS[layout])
    with torch.no_grad():
        for e, expert in enumerate(slow):
            ordinary.first_proj[e].copy_(torch.cat([expert.gate, expert.up]) if experts.gated else expert.up)
            ordinary.down_proj[e].copy_(expert.down)
            if ordinary.first_proj_bias is not None:
                biases = [expert.gate_bias, expert.up_bias] if experts.gated else [expert.up_bias]
                ordinary.first_proj_bias[e].copy_(torch.cat(biases))
            if ordinary.down_proj_bias is not None:
                ordinary.down_proj_bias[e].copy_(expert.down_bias)
    x, routing = torch.randn(7, 8), regular(7, 5, 2)
    torch.testing.assert_close(experts(x, routing), ordinary(x, routing), **FLOAT32)
    merged, weights = experts.merged(), experts.weights()
    assert type(merged) is Experts
    assert all(p.requires_grad for p in merged.parameters())
    assert len(weights) == len(ordinary.state_dict())
    for (name, wanted), weight in zip(ordinary.state_dict().items(), weights, strict=True):
        torch.testing.assert_close(merged.get_parameter(name).detach(), wanted, **FLOAT32)
        torch.testing.assert_close(weight.detach(), wanted, **FLOAT32)
    merged(x, routing).sum().backward()
    assert merged.down_proj.grad.shape == (5, 8, 16)
    assert experts.down_proj.grad is None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_routing_every_expert_is_summed(layout, size):
    experts = of_size(size, num_experts=3, **LAYOUTS[layout])
    x = torch.randn(7, experts.hidden_size)
    leaves, slow = written_out(experts)
    y, truth = experts(x), sum(expert(x) for expert in slow)
    torch.testing.assert_close(y, truth, **FLOAT32)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    truth.backward(upstream)
    for name in LOW_RANK:
        torch.testing.assert_close(experts.get_parameter(name).grad, leaves[name].grad, **FLOAT32)


def test_without_a_routing_or_tokens():
    x = torch.randn(0, 6)
    assert torch.equal(low_rank_of()(x), x)


@pytest.mark.parametrize("top_k", [2, None])
def test_gradcheck_in_float64(top_k):
    pairs = [(0, 2), (0, 2), (1, 0), (1, 2), (2, 0), (2, 2)]  # expert 1 is empty, token 0 has expert 2 twice
    experts = low_rank_of(4, 3, 2, num_experts=3, dtype=torch.float64, up_bias=True, down_bias=True)
    routing = routing_of(pairs, 3, 3, top_k=top_k, weights_dtype=torch.float64)

    def compute(x, weights, *parameters):
        given = dict(zip(sorted(LOW_RANK), parameters, strict=True))
        return torch.func.functional_call(experts, given, (x, replace(routing, weights=weights)))

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    trained = [experts.get_parameter(name) for name in sorted(LOW_RANK)]
    assert torch.autograd.gradcheck(compute, (x, routing.weights, *trained))


@pytest.mark.parametrize("routing", ["odd", "irregular", "same_expert_twice"])
@pytest.mark.parametrize("size", SIZES)
def test_expanded_gradients(size, routing):
    # y.sum() sends back one number expanded with stride 0, which a grouped kernel must not take for a matrix
    experts, routing = of_size(size), ROUTINGS[routing]()
    x = torch.randn(routing.num_tokens, experts.hidden_size)
    leaves, slow = written_out(experts)
    experts(x, routing).sum().backward()
    reference.moe(x, routing.token_ids, routing.expert_ids, routing.weights.detach(), slow).sum().backward()
    for name in LOW_RANK:
        torch.testing.assert_close(experts.get_parameter(name).grad, leaves[name].grad, **FLOAT32)


def test_strided_input():
    # what a transposed activation looks like
    experts, routing = of_size("grouped"), regular(7, 5, 2)
    x = torch.randn(8, 7).t()
    assert not x.is_contiguous()
    # a processor may sum the two in another order
    torch.testing.assert_close(experts(x, routing), experts(x.contiguous(), routing), **FLOAT32)


def test_an_expert_without_a_token_gets_a_zero_gradient():
    for size in SIZES:
        experts, routing = of_size(size), ROUTINGS["empty_experts"]()
        experts(torch.randn(4, experts.hidden_size), routing).sum().backward()
        for name in LOW_RANK:
            grad = experts.get_parameter(name).grad
            assert [bool(g.any()) for g in grad] == [False, True, False, True, False]


# --- the dense FFN ---


def fresh(dense_seed=1, dtype=torch.float32, size=(8, 16), **settings):
    """Experts as they start, and the dense FFN that they hold."""
    torch.manual_seed(dense_seed)
    experts = low_rank_of(*size, 4, dtype=dtype, **settings)
    experts.reset_low_rank(torch.Generator().manual_seed(0))
    first, bias, width = experts.first_proj[0], experts.first_proj_bias, experts.expert_size

    def dense(x):
        hidden = F.linear(x, first, None if bias is None else bias[0])
        hidden = (
            experts.activate(hidden) if not experts.gated else experts.activation(hidden[:, :width]) * hidden[:, width:]
        )
        return F.linear(hidden, experts.down_proj[0], None if not experts.down_bias else experts.down_proj_bias[0])

    return experts, dense


def summing_to_one(num_tokens, top_k=2):
    routing = regular(num_tokens, 5, top_k)
    weights = routing.weights.detach().view(-1, top_k)
    return replace(routing, weights=(weights / weights.sum(1, keepdim=True)).view(-1))


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["forward", "outputs"])
def test_starts_as_the_dense_ffn(way, layout, top_k):
    experts, dense = fresh(**LAYOUTS[layout])
    routing, x = summing_to_one(64, top_k), torch.randn(64, 8)
    compute = experts if way == "forward" else by_outputs(experts)
    torch.testing.assert_close(compute(x, routing), dense(x), rtol=1e-5, atol=1e-5)


# The weighted sum of K equal bfloat16 numbers is taken in float32, with weights that sum to 1 up to 2^-23, and rounds
# back to that number; the products are those of the dense FFN. So nothing may differ, K odd or even. SwiGLU computes
# silu(gate) * up as the plain product does.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_starts_as_the_dense_ffn_to_the_last_bit_of_half_precision(layout, top_k, dtype):
    experts, dense = fresh(dtype=dtype, **LAYOUTS[layout])
    routing, x = summing_to_one(64, top_k), torch.randn(64, 8, dtype=dtype)
    torch.testing.assert_close(experts(x, routing), dense(x), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["swiglu", "relu_biases"])
def test_autocast_starts_as_the_dense_ffn_under_autocast(monkeypatch, layout):
    seen = spy_on_grouped_mm(monkeypatch)
    experts, dense = fresh(size=(8, 16), **LAYOUTS[layout])
    routing, x = summing_to_one(64), torch.randn(64, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, wanted = experts(x, routing), dense(x)
        outputs, _ = experts.outputs(x, routing)
    assert set(seen) <= {(torch.bfloat16, torch.bfloat16)}
    assert y.dtype == wanted.dtype == outputs.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["forward", "outputs"])
@pytest.mark.parametrize("layout", ["swiglu", "relu_biases"])
def test_autocast_computes_in_bfloat16(monkeypatch, layout, way):
    seen = spy_on_grouped_mm(monkeypatch)
    experts = low_rank_of(8, 16, 8, std=0.25, **LAYOUTS[layout])
    compute = experts if way == "forward" else by_outputs(experts)

    def under_autocast(x, routing):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = compute(x, routing)
        assert y.dtype == torch.bfloat16
        return y.float()

    assert_equals_written_out(experts, torch.randn(7, 8), regular(7, 5, 2), compute=under_autocast, **BFLOAT16)
    assert seen == [(torch.bfloat16, torch.bfloat16)] * (5 if experts.gated else 4)


@pytest.mark.parametrize("routing", ["odd", "empty_experts", "same_expert_twice", "irregular", "one_token", "no_token"])
@pytest.mark.parametrize("size", [(6, 10, 3), (8, 16, 8)])
# no ReLU: its derivative jumps where a rounding changes a sign
@pytest.mark.parametrize("layout", ["swiglu_biases", "gelu", "down_bias_only"])
def test_bfloat16(layout, size, routing):
    experts = low_rank_of(*size, std=0.25, dtype=torch.bfloat16, **LAYOUTS[layout])
    routing = ROUTINGS[routing]()
    x = torch.randn(routing.num_tokens, size[0], dtype=torch.bfloat16)
    # the truth is computed in float32, from the same bfloat16 numbers
    assert_equals_written_out(experts, x, routing, dtype=torch.float32, **BFLOAT16)


# --- what is trained, drawn, kept ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_changes_train(layout):
    experts = low_rank_of(**LAYOUTS[layout])
    assert {name for name, p in experts.named_parameters() if p.requires_grad} == LOW_RANK
    assert all(p.is_contiguous() for p in experts.parameters())
    parts = 2 if experts.gated else 1
    assert sum(experts.get_parameter(n).numel() for n in LOW_RANK) == 5 * 3 * (parts * (6 + 10) + (10 + 6))
    assert sum(p.numel() for p in experts.parameters() if not p.requires_grad) == sum(
        p.numel() for p in Experts(1, 6, 10, **LAYOUTS[layout]).parameters()
    )


def test_training_reaches_every_low_rank_parameter_and_nothing_else():
    experts, _ = fresh()
    before = copy.deepcopy(experts.state_dict())
    optimizer = torch.optim.SGD([p for p in experts.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        experts(torch.randn(32, 8), regular(32, 5, 2)).square().mean().backward()
        optimizer.step()
    changed = {name for name, tensor in experts.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == LOW_RANK
    assert (experts.first_b[0] - experts.first_b[1]).abs().max() > 0


def test_reset_draws_the_same_numbers_from_the_same_generator():
    one, other = (LowRankExperts(4, 64, 256, rank=16) for _ in range(2))
    half = LowRankExperts(4, 64, 256, rank=16, dtype=torch.bfloat16)
    for experts in (one, other, half):
        torch.rand(3)  # the global generator plays no part
        experts.reset_low_rank(torch.Generator().manual_seed(7))
    for name in LOW_RANK:
        assert torch.equal(one.get_parameter(name), other.get_parameter(name))
        assert torch.equal(one.get_parameter(name).to(torch.bfloat16), half.get_parameter(name))
    # 8192 and 16384 draws: three standard errors of the standard deviation are below 3 %
    assert one.first_a.std().item() == pytest.approx(64**-0.5, rel=0.03)
    assert one.down_a.std().item() == pytest.approx(256**-0.5, rel=0.03)
    assert not one.first_b.any()
    assert not one.down_b.any()
    other.reset_low_rank(torch.Generator().manual_seed(8))
    assert not torch.equal(one.first_a, other.first_a)


def test_state_dict_round_trip():
    experts, twin = low_rank_of(up_bias=True, down_bias=True), low_rank_of(up_bias=True, down_bias=True)
    x, routing = torch.randn(7, 6), regular(7, 5, 2)
    assert not torch.equal(experts(x, routing), twin(x, routing))
    twin.load_state_dict(experts.state_dict())
    assert torch.equal(experts(x, routing), twin(x, routing))
    assert {name for name, p in twin.named_parameters() if p.requires_grad} == LOW_RANK


def test_arguments_are_kept_and_checked():
    experts = LowRankExperts(5, 6, 10, rank=3)
    assert (experts.rank, experts.alpha, experts.scale, experts.num_experts) == (3, None, 1.0, 5)
    assert LowRankExperts(5, 6, 10, rank=4, alpha=8.0).scale == 2
    assert "num_experts=5" in repr(experts)
    assert "rank=3" in repr(experts)
    with pytest.raises(ValueError, match="rank=0"):
        LowRankExperts(5, 6, 10, rank=0)
    with pytest.raises(ValueError, match=r"alpha=0\.0"):
        LowRankExperts(5, 6, 10, rank=2, alpha=0.0)


def test_alpha_multiplies_the_change():
    experts = low_rank_of()
    twin = LowRankExperts(5, 6, 10, rank=3, alpha=1.0)
    twin.load_state_dict(experts.state_dict())
    with torch.no_grad():
        twin.first_b.mul_(2)
        twin.down_b.mul_(2)
    x, routing = torch.randn(7, 6), regular(7, 5, 2)
    torch.testing.assert_close(experts(x, routing), twin(x, routing), **FLOAT32)


@pytest.mark.parametrize("layout", ["swiglu_biases", "gelu"])
def test_inner_dropout_acts_per_assignment(layout):
    # Experts draws one mask for the hidden activations of all assignments, in the same order
    experts = low_rank_of(inner_dropout=0.5, **LAYOUTS[layout])
    ordinary, x, routing = experts.merged(), torch.randn(7, 6), regular(7, 5, 2)
    dry = experts.eval()(x, routing)
    assert torch.equal(dry, experts(x, routing))
    experts.train()
    results = []
    for compute in (experts, ordinary, by_outputs(experts)):
        torch.manual_seed(3)
        results.append(compute(x, routing))
    assert not torch.allclose(results[0], dry)
    torch.testing.assert_close(results[0], results[1], **FLOAT32)
    torch.testing.assert_close(results[0], results[2], **FLOAT32)


def test_inside_a_layer():
    experts, dense = fresh()
    shared, shared_dense = fresh(dense_seed=2, num_experts=2)
    layer = MoELayer(TopKRouter(8, 5, top_k=2), experts, shared_experts=shared)
    x = torch.randn(2, 7, 8)
    # two shared experts that are both the dense FFN
    wanted = dense(x.view(-1, 8)) + 2 * shared_dense(x.view(-1, 8))
    torch.testing.assert_close(layer(x).view(-1, 8), wanted, **FLOAT32)
    layer(x).sum().backward()
    assert layer.router.gate.grad is not None


# --- cost ---


def flops(compute, *arguments):
    # in float64 the grouped products are looped over, and torch counts what each multiplication costs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        compute(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_forward_costs_one_dense_ffn_and_the_changes(top_k):
    T, D, F_, rank = 32, 64, 256, 8
    experts = low_rank_of(D, F_, rank, num_experts=4, dtype=torch.float64)
    x, routing = torch.randn(T, D, dtype=torch.float64), regular(T, 4, top_k)
    dense = 2 * 3 * D * F_
    changes = 2 * rank * (2 * D + 2 * F_ + F_ + D)
    assert flops(experts, x, routing) == T * (dense + top_k * changes)
    ordinary = flops(experts.merged(), x, routing)
    assert ordinary == T * top_k * dense
    if top_k > 1:
        assert flops(experts, x, routing) < ordinary
    assert flops(lambda x: experts(x), x) == T * (dense + 4 * changes)


# --- torch.compile ---


def compile_and_compare():
    # In bfloat16, the one dtype in which torch 2.13 traces its grouped kernel; rank 8 is its 16 bytes. SwiGLU only
    # without gradients: torch does not trace its backward, which writes through `out=` into half a tensor.
    for layout, with_gradients in (("geglu", True), ("down_bias_only", True), ("swiglu_biases", False)):
        experts, routing = low_rank_of(8, 16, 8, std=0.25, dtype=torch.bfloat16, **LAYOUTS[layout]), regular(7, 5, 2)
        ways = {
            "forward": lambda x, e=experts, r=routing: e(x, r),
            "outputs": lambda x, e=experts, r=routing: e.outputs(x, r)[0],
            "everywhere": lambda x, e=experts: e(x),
        }
        for compute in ways.values():
            torch.compiler.reset()
            x = torch.randn(7, 8, dtype=torch.bfloat16, requires_grad=True)
            with torch.set_grad_enabled(with_gradients):
                mine, theirs = compute(x), torch.compile(compute, backend="aot_eager", fullgraph=True)(x)
            torch.testing.assert_close(mine, theirs, **BFLOAT16)
            if with_gradients:
                leaves = [x, *(experts.get_parameter(name) for name in sorted(LOW_RANK))]
                upstream = torch.randn_like(mine)
                wanted, grads = (torch.autograd.grad(y, leaves, upstream) for y in (mine, theirs))
                for grad, want in zip(grads, wanted, strict=True):
                    torch.testing.assert_close(grad, want, **BFLOAT16)


@pytest.mark.slow
def test_compiles_in_one_graph():
    # in a process of its own: TorchDynamo cannot trace the shape checks of the test run
    code = "import test_low_rank; test_low_rank.compile_and_compare(); print('compared')"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.stdout.strip() == "compared", run.stderr
