"""Every router in a language model that was pretrained as a dense one: what it trains, and what it starts from."""

import copy
import functools

import pytest
import reference
import torch
from catalogue import ROUTER_ROWS
from lightning_fixtures import VOCABULARY, loader, tiny_llama, trainer_of

from lightning_moe import (
    ROUTERS,
    LossFreeRouter,
    MoEUpcycleCallback,
    SigmoidRouter,
    TopKRouter,
    UpcycleConfig,
    moe_layers,
    record_routing,
    upcycle,
)
from lightning_moe.module import MoEModule

E = 5
ONE_ROW_EACH = {row.cls: name for name, row in reversed(ROUTER_ROWS.items())}
not_causal = pytest.mark.filterwarnings("ignore:.*routing depend on later tokens")


def sentences(seed, count, batch_size=8, length=16):
    """Batches of a language of its own: after each word come two others, one of them three times as often."""
    generator = torch.Generator().manual_seed(seed)
    after = torch.randint(0, VOCABULARY, (VOCABULARY, 2), generator=generator)
    made = []
    for _ in range(count):
        words = [torch.randint(0, VOCABULARY, (batch_size,), generator=generator)]
        for _ in range(length - 1):
            often = (torch.rand(batch_size, generator=generator) < 0.75).long()
            words.append(after[words[-1], often])
        ids = torch.stack(words, dim=1)
        made.append({"input_ids": ids, "labels": ids})
    return made


@functools.cache
def _pretrained():
    torch.manual_seed(0)
    model = tiny_llama(hidden_size=16, intermediate_size=24, initializer_range=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for batch in sentences(1, 150):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def pretrained():
    """A tiny dense language model that has learnt one language."""
    return copy.deepcopy(_pretrained())


def task_loss(model, data):
    return sum(model(**batch).loss for batch in data) / len(data)


def test_pretraining_has_learnt_the_language_and_not_the_other():
    model = pretrained()
    with torch.no_grad():
        # the entropy of the language is that of a biased coin, 0.56, and of the first word; an empty model says 3.6
        assert task_loss(model, sentences(1, 4)) < 1.2
        assert task_loss(model, sentences(2, 4)) > 3


def trained(tmp_path, router, seed=2, steps=60):
    """Trains the MoE layers, and nothing else, on another language with all that the callback brings along."""
    model = pretrained().requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.requires_grad_(True)
    module = MoEModule(model, optimizer=functools.partial(torch.optim.Adam, lr=3e-3))
    callback = MoEUpcycleCallback(UpcycleConfig(num_experts=E, router=router, seed=3), log_utilization=False)
    trainer_of(tmp_path, [callback], logger=False).fit(module, loader(sentences(seed, steps)))
    return model


@not_causal
@pytest.mark.parametrize("cls", ROUTERS, ids=lambda cls: cls.__name__)
def test_every_router_trains(tmp_path, cls):
    router, held_out = ROUTER_ROWS[ONE_ROW_EACH[cls]], sentences(2, 64)[-4:]
    start = pretrained()
    upcycle(start, UpcycleConfig(num_experts=E, router=router, seed=3))
    model = trained(tmp_path, router)
    with torch.no_grad():
        before, after = task_loss(start.eval(), held_out), task_loss(model.eval(), held_out)
    # by a third of a nat at least; the routers that choose by chance included
    assert after < before - 0.3

    model.train()
    task_loss(model, sentences(2, 2)).backward()
    for layer in moe_layers(model).values():
        assert all(parameter.grad.any() for parameter in layer.experts.parameters())
        for name, parameter in layer.router.named_parameters():
            assert layer.router.learned
            assert parameter.grad is not None, name
            if name == "residual_gate" and layer.position == 0:
                continue  # as the docstring says, the first layer has no logits before it
            assert parameter.grad.any(), name


@not_causal
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTER_ROWS)
def test_no_expert_output_is_lost(name, training):
    """The layer gives the weighted sum of all that its routing says, written out assignment by assignment."""
    model = pretrained()
    upcycle(model, UpcycleConfig(num_experts=E, router=ROUTER_ROWS[name], num_shared_experts=1, seed=3))
    model.train(training)
    inputs = {}
    for key, layer in moe_layers(model).items():
        for experts in (layer.experts, layer.shared_experts):
            with torch.no_grad():
                for parameter in experts.parameters():
                    parameter.mul_(1 + 0.5 * torch.randn_like(parameter))  # experts that differ
        layer.register_forward_hook(lambda _, given, out, key=key: inputs.update({key: (given[0], out)}))
    with record_routing() as window, torch.no_grad():
        model(**sentences(2, 1, batch_size=2, length=7)[0])
    for key, layer in moe_layers(model).items():
        (x, out), routing = inputs[key], window[key]
        x = x.view(-1, 16)
        kept = torch.ones_like(routing.token_ids).bool() if routing.computed() is None else routing.computed()
        rows = routing.token_ids[kept], routing.expert_ids[kept], routing.weights[kept]
        shared = sum(expert(x) for expert in reference.unstack(layer.shared_experts))
        wanted = reference.moe(x, *rows, reference.unstack(layer.experts)) + shared
        free = layer.router.zero_computation(x, routing)
        wanted = wanted if free is None else wanted + free
        torch.testing.assert_close(out.view_as(wanted), wanted, rtol=1e-4, atol=1e-5)


# --- what the router learns from at step 0, where the experts are copies ---


def at_step_zero(router, fold=1.0):
    """How far the logits are from the dense model's, and the largest gradient of a router, as fractions."""
    dense, moe = pretrained(), pretrained()
    batch = sentences(1, 1)[0]
    upcycle(moe, UpcycleConfig(num_experts=4, router=router, seed=3))
    for layer in moe_layers(moe).values():
        layer.experts.down_proj.data.mul_(fold)
    out = moe(**batch)
    out.loss.backward()
    gradients = [p.grad for layer in moe_layers(moe).values() for p in layer.router.parameters()]
    scale = max(p.grad.abs().max() for p in moe.model.layers[0].self_attn.parameters())
    wanted = dense(**batch).logits.detach()
    difference = ((out.logits - wanted).abs().max() / wanted.abs().max()).item()
    return difference, (max(g.abs().max() for g in gradients) / scale).item()


def softmax_router(normalize, init_std=0.2, top_k=2):
    return functools.partial(TopKRouter, top_k=top_k, normalize=normalize, init_std=init_std)


def sigmoid_router(normalize, init_std=0.2):
    return functools.partial(SigmoidRouter, top_k=2, normalize=normalize, init_std=init_std)


# router, factor on the experts, whether step 0 is the dense model, whether the task trains the router
STEP_ZERO = {
    "softmax, renormalised": (softmax_router(True), 1, True, False),
    "softmax, straight-through unit sum": (softmax_router("straight_through"), 1, True, True),
    "softmax over all experts": (softmax_router(False, top_k=4), 1, True, False),
    "softmax, raw": (softmax_router(False), 1, False, True),
    "softmax, raw, scaled": (softmax_router(False), 4 / 2, False, True),
    "softmax, raw, scaled, router of zeros": (softmax_router(False, init_std=0.0), 4 / 2, True, True),
    "softmax, raw, router of zeros": (softmax_router(False, init_std=0.0), 1, False, True),
    "one expert, straight-through": (softmax_router("straight_through", top_k=1), 1, True, True),
    "sigmoid, renormalised": (sigmoid_router(True), 1, True, False),
    "sigmoid, straight-through unit sum": (sigmoid_router("straight_through"), 1, True, True),
    "sigmoid, raw": (sigmoid_router(False), 1, False, True),
    "sigmoid, raw, scaled, router of zeros": (sigmoid_router(False, init_std=0.0), 2 / 2, True, True),
    "sigmoid, renormalised, scaled": (functools.partial(LossFreeRouter, routed_scaling=2.5), 1, True, False),
    "noisy top-k": (ROUTER_ROWS["noisy_top_k"], 1, True, False),
    "cosine": (ROUTER_ROWS["cosine"], 1, True, False),
    "dense mixer": (ROUTER_ROWS["dense_mixer"], 1, True, True),
    "expert choice": (ROUTER_ROWS["expert_choice"], 1, False, True),
    "ReLU": (ROUTER_ROWS["remoe"], 1, False, True),
    "zero, copy and constant experts": (ROUTER_ROWS["moe_plus_plus"], 1, False, True),
}


@not_causal
@pytest.mark.parametrize("name", STEP_ZERO)
def test_router_gradient_at_step_zero(name):
    """Equal experts give a router with normalised weights nothing to learn from, unless the unit sum is passed through.

    The table of the docs page "which router".
    """
    router, fold, is_dense, learns = STEP_ZERO[name]
    torch.manual_seed(0)
    difference, gradient = at_step_zero(router, fold)
    # a few float32 roundings, against effects of a percent and more
    assert (difference < 1e-5) == is_dense, difference
    assert (difference > 1e-3) == (not is_dense), difference
    assert (gradient > 1e-3) == learns, gradient
    assert (gradient < 1e-5) == (not learns), gradient
