import copy
import dataclasses
import math

import pytest
import torch
from catalogue import LOSS_ROWS
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func as olmoe_loss_func

from lightning_moe import (
    BALANCE_LOSSES,
    Experts,
    LoadBalancingLoss,
    MoELayer,
    Routing,
    Tokens,
    TopKRouter,
    ZLoss,
    load_balancing_loss,
    z_loss,
)
from lightning_moe.losses import BalanceLoss
from lightning_moe.routers import top_k_assignment
from lightning_moe.routers.base import init_arguments

# float32 sums of a few dozen numbers of size one, in another order
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}

every_loss = pytest.mark.parametrize("row", LOSS_ROWS.values(), ids=LOSS_ROWS)
BALANCE_ROWS = {name: row for name, row in LOSS_ROWS.items() if row.measures_balance}
balance_loss = pytest.mark.parametrize("row", BALANCE_ROWS.values(), ids=BALANCE_ROWS)


def test_losses_have_rows():
    assert {row.cls for row in LOSS_ROWS.values()} == set(BALANCE_LOSSES)
    assert {name: row.cls.name for name, row in LOSS_ROWS.items()} == {name: name for name in LOSS_ROWS}


def routing_from(logits, top_k, mask=None, scores=None):
    scores = logits.softmax(-1) if scores is None else scores
    token_ids, expert_ids = top_k_assignment(scores, top_k)
    return Routing(token_ids, expert_ids, scores[token_ids, expert_ids], logits, scores, mask, top_k)


def uniform(num_tokens, num_experts, top_k):
    """Equal scores, and experts in turn: token t has t*K, t*K + 1, ... modulo E."""
    expert_ids = torch.arange(num_tokens * top_k) % num_experts
    token_ids = torch.arange(num_tokens).repeat_interleave(top_k)
    logits = torch.zeros(num_tokens, num_experts)
    return Routing(token_ids, expert_ids, torch.ones(len(token_ids)), logits, logits.softmax(-1), None, top_k)


@balance_loss
@pytest.mark.parametrize("num_experts", [4, 5])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balanced_is_one_for_every_k(row, top_k, num_experts):
    # E tokens give each expert K assignments; a float32 sum of E numbers 1 / E
    assert row(uniform(num_experts, num_experts, top_k)).item() == pytest.approx(1, abs=1e-6)


@balance_loss
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_collapsed_is_experts_over_k(row, top_k):
    logits = torch.full((7, 5), -100.0)
    logits[:, :top_k] = 0  # exp(-100) is no float32 number beside 1
    assert row(routing_from(logits, top_k)).item() == pytest.approx(5 / top_k, rel=1e-6)


@balance_loss
def test_four_layers_collapsed_on_different_experts_are_all_seen(row):
    # pooled over the layers the load would be even and the loss 1
    losses = []
    for layer in range(4):
        logits = torch.full((7, 4), -20.0)
        logits[:, layer] = 0
        losses.append(row(routing_from(logits, 1)).item())
    assert sum(losses) / 4 >= 3.9


def test_z_loss_of_a_uniform_router_is_log_e_squared():
    logits = torch.zeros(7, 5)
    assert z_loss(routing_from(logits, 2)).item() == pytest.approx(torch.tensor(5.0).log().item() ** 2, rel=1e-6)


@every_loss
@pytest.mark.parametrize("masked", [False, True])
def test_the_default_dtype_changes_nothing(row, masked):
    # precision="bf16-true" sets it in the forward, and not where activation checkpointing repeats that
    mask = torch.arange(261) % 7 > 0 if masked else None
    routing = row.prepare(routing_from(torch.randn(261, 4), 2, mask))
    expected = row(routing)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = row(routing)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert found.equal(expected)


@every_loss
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_written_out_sum(row, num_tokens, top_k, masked):
    mask = torch.tensor([True, False, True, True, False, False, True])[:num_tokens] if masked else None
    logits = (3 * torch.randn(num_tokens, 5)).requires_grad_()
    loss, truth = row(routing_from(logits, top_k, mask)), row.truth(routing_from(logits, top_k, mask))
    assert loss.shape == ()
    torch.testing.assert_close(loss, truth, **FLOAT32)
    (grad,) = torch.autograd.grad(loss, logits)
    (wanted,) = torch.autograd.grad(truth, logits)
    torch.testing.assert_close(grad, wanted, **FLOAT32)


@every_loss
def test_equals_the_written_out_sum_on_irregular_rows(row):
    # token 1 has three experts, token 2 none; scores that do not sum to one, as a sigmoid gives
    logits = torch.randn(3, 5, requires_grad=True)
    token_ids, expert_ids = torch.tensor([1, 0, 1, 1]), torch.tensor([4, 0, 0, 2])
    scores = logits.sigmoid()
    routing = Routing(token_ids, expert_ids, scores[token_ids, expert_ids], logits, scores)
    loss, truth = row(routing), row.truth(routing)
    torch.testing.assert_close(loss, truth, **FLOAT32)
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(truth, logits)
    torch.testing.assert_close(grad, wanted, **FLOAT32)


@every_loss
@pytest.mark.parametrize("padding", [0.0, 1e4])
def test_padding_changes_nothing(row, padding):
    router = TopKRouter(6, 5)
    x = torch.randn(4, 6)
    padded = torch.cat([x[:2], torch.full((3, 6), padding), x[2:]])
    mask = torch.tensor([True, True, False, False, False, True, True])
    loss, loss_padded = row(router(x)), row(router(padded, Tokens(mask=mask)))
    torch.testing.assert_close(loss_padded, loss, **FLOAT32)
    (grad,) = torch.autograd.grad(loss, router.gate)
    (grad_padded,) = torch.autograd.grad(loss_padded, router.gate)
    torch.testing.assert_close(grad_padded, grad, **FLOAT32)


@every_loss
@pytest.mark.parametrize("padding", [float("inf"), float("nan")])
def test_padding_that_is_no_number_leaves_the_value_alone(row, padding):
    router = TopKRouter(6, 5)
    x, mask = torch.randn(4, 6), torch.tensor([True, True, False, True])
    x[2] = padding
    loss = row(router(x, Tokens(mask=mask)))
    torch.testing.assert_close(loss, row(router(x[mask])), **FLOAT32)


@every_loss
@pytest.mark.parametrize("padding", [float("inf"), float("nan")])
def test_padding_that_is_no_number_gets_no_gradient(row, padding):
    # with regard to what the loss is given: behind it, in the router, 0 * nan is out of its hands
    mask = torch.tensor([True, True, False, True])
    rows = torch.arange(4), torch.tensor([0, 1, 1, 4])
    given = [torch.randn(4, 5), torch.rand(4, 5)]
    for table in given:
        table[2] = padding
        table.requires_grad_()
    routing = Routing(*rows, given[1][rows], *given, mask, 1)
    loss, truth = row(routing), row.truth(routing)
    got = torch.autograd.grad(loss, given, retain_graph=True, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(truth, given, allow_unused=True, materialize_grads=True)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, **FLOAT32)


@every_loss
def test_all_padding_is_finite(row):
    logits = torch.randn(3, 5, requires_grad=True)
    loss = row(routing_from(logits, 2, torch.zeros(3, dtype=torch.bool)))
    assert math.isfinite(loss.item())
    assert not torch.autograd.grad(loss, logits)[0].any()


@every_loss
def test_no_token_is_finite(row):
    logits = torch.zeros(0, 5, requires_grad=True)
    assert math.isfinite(row(routing_from(logits, 2)).item())


@every_loss
def test_the_scale_of_the_batch_does_not_matter(row):
    logits = torch.randn(7, 5)
    once, thrice = routing_from(logits, 2), routing_from(logits.repeat(3, 1), 2)
    torch.testing.assert_close(row(once), row(thrice), **FLOAT32)


@every_loss
def test_gradient_of_the_router_equals_finite_differences(row):
    router = TopKRouter(4, 3, top_k=2).double()
    with torch.no_grad():
        router.gate.normal_()
    x = torch.randn(5, 4, dtype=torch.float64)

    def value(gate):
        return row(torch.func.functional_call(router, {"gate": gate}, (x,)))

    (grad,) = torch.autograd.grad(value(router.gate), router.gate)
    # central differences: an error of step^2; the step is too small to change a choice
    step, wanted = 1e-5, torch.zeros_like(grad)
    for index in range(grad.numel()):
        shift = torch.zeros(grad.numel(), dtype=torch.float64)
        shift[index] = step
        shift = shift.view_as(grad)
        with torch.no_grad():
            wanted.view(-1)[index] = (value(router.gate + shift) - value(router.gate - shift)) / (2 * step)
    # f of the load balancing loss is a float32 fraction, which is off by 6e-8 on both sides alike
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-7)
    assert bool(grad.any())


@pytest.mark.parametrize("theirs", [load_balancing_loss_func, olmoe_loss_func], ids=["mixtral", "olmoe"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_equals_that_of_transformers_over_k(top_k, padded, theirs):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]) if padded else None
    logits = torch.randn(8, 5, requires_grad=True)
    ours = load_balancing_loss(routing_from(logits, top_k, None if mask is None else mask.flatten().bool()))
    wanted = theirs((logits,), num_experts=5, top_k=top_k, attention_mask=mask) / top_k
    torch.testing.assert_close(ours, wanted, **FLOAT32)
    (grad,) = torch.autograd.grad(ours, logits)
    (their_grad,) = torch.autograd.grad(wanted, logits)
    torch.testing.assert_close(grad, their_grad, **FLOAT32)


# --- the modules ---


@every_loss
def test_the_coefficient_is_kept_and_not_applied(row):
    routing = row.prepare(routing_from(torch.randn(7, 5), 2))
    assert torch.equal(row.make(coefficient=0.5)(routing), row.make(coefficient=2.0)(routing))
    assert row.make(coefficient=0.5).coefficient == 0.5
    assert row.make(coefficient=0.0).coefficient == 0
    assert isinstance(row.make(), BalanceLoss)
    assert not list(row.make().parameters())


@every_loss
def test_every_argument_is_kept_and_every_loss_can_be_copied(row):
    loss = row.make(coefficient=0.25)
    assert init_arguments(loss) == {**init_arguments(row.make()), **row.arguments, "coefficient": 0.25}
    routing = row.prepare(routing_from(torch.randn(7, 5), 2))
    assert torch.equal(copy.deepcopy(loss)(routing), loss(routing))


@every_loss
def test_measures_balance_is_declared(row):
    assert row.cls.measures_balance == row.measures_balance


@every_loss
def test_a_negative_coefficient_is_refused(row):
    with pytest.raises(ValueError, match=r"coefficient=-1\.0, wanted >= 0"):
        row.cls(coefficient=-1.0)


# --- in the layer ---


def layer_of(dtype=torch.float32):
    router, experts = TopKRouter(6, 5, init_std=1.0), Experts(5, 6, 10)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return MoELayer(router, experts, name="mlp").to(dtype)


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 65536.0])
def test_the_layer_injects_the_gradient_of_the_written_out_sum(scale):
    layer = layer_of()
    layer.balance_losses["load_balancing_loss"] = LoadBalancingLoss(0.5)
    layer.balance_losses["z_loss"] = ZLoss(0.25)
    x = torch.randn(2, 7, 6, requires_grad=True)
    task = layer(x).square().sum()
    layer.loss_scale.fill_(scale)  # written between forward and backward, as callbacks do
    injected = torch.autograd.grad(task, [x, *layer.parameters()])

    routing = layer.router(x.view(14, 6))
    task = layer.experts(x.view(14, 6), routing).square().sum()
    total = task + scale * (0.5 * load_balancing_loss(routing) + 0.25 * z_loss(routing))
    written_out = torch.autograd.grad(total, [x, *layer.parameters()])
    for got, wanted in zip(injected, written_out, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * max(scale, 1))


def test_the_layer_leaves_the_task_loss_alone():
    layer, x = layer_of(), torch.randn(2, 7, 6)
    plain = layer(x)
    layer.balance_losses["z_loss"] = ZLoss(1e6)
    assert torch.equal(layer(x), plain)


def test_without_gradients_nothing_is_injected():
    layer, x = layer_of(), torch.randn(2, 7, 6)

    class Refuses(ZLoss):
        def forward(self, routing):
            raise AssertionError("computed, though nobody asked")

    layer.balance_losses["z_loss"] = Refuses()
    with torch.no_grad():
        layer(x)


def test_the_layer_leaves_padding_out_of_its_losses():
    layer = layer_of()
    layer.balance_losses["load_balancing_loss"] = LoadBalancingLoss(1.0)
    x, mask = torch.randn(2, 4, 6), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    layer.context.inputs = {"attention_mask": mask}
    (got,) = torch.autograd.grad((0 * layer(x)).sum(), layer.router.gate)
    routing = dataclasses.replace(layer.router(x.view(8, 6)), token_mask=mask.flatten().bool())
    (wanted,) = torch.autograd.grad(load_balancing_loss(routing), layer.router.gate)
    torch.testing.assert_close(got, wanted, **FLOAT32)
    (unmasked,) = torch.autograd.grad(load_balancing_loss(layer.router(x.view(8, 6))), layer.router.gate)
    assert not torch.allclose(got, unmasked)
