"""A MoE model with more experts: which copies, which router, what step 0 computes, and what is refused."""

import copy
import dataclasses
import itertools
import json
from functools import partial

import pytest
import torch
from catalogue import FAMILY_ROWS, ROUTER_ROWS, Block, TwoLinear, logits, token_ids
from torch import nn
from torch.nn import functional as F

from lightning_moe import (
    CosineRouter,
    DenseMixerRouter,
    ExpertChoiceRouter,
    Experts,
    GShardRouter,
    HashRouter,
    LoadBalancingLoss,
    LossFreeRouter,
    MoELayer,
    MoEPlusPlusRouter,
    NoisyTopKRouter,
    PerturbedCosineRouter,
    SigmoidRouter,
    SparseMixerRouter,
    TopKRouter,
    UpcycleConfig,
    XMoERouter,
    ZLoss,
    load_moe,
    moe_layers,
    record_routing,
    save_moe,
    upcycle,
)
from lightning_moe.expansion import _apportion, _utilities, expand
from lightning_moe.low_rank import LowRankExperts

E, K = 4, 2
# the same sums in another order, in float32
PROMISE = 1e-5
LLAMA = FAMILY_ROWS["llama"]


def trained(router=TopKRouter, num_experts=E, **settings):
    """An upcycled Llama whose every parameter and buffer of a router is a number of its own, as after training."""
    torch.manual_seed(1)
    model = LLAMA.build()
    upcycle(model, UpcycleConfig(num_experts=num_experts, router=router, seed=3, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for layer in moe_layers(model).values():
            for name, buffer in layer.router.named_buffers():
                if name == "expert_bias":
                    buffer.normal_(std=0.01)
    return model.eval()


def batch(**changes):
    return {"input_ids": token_ids(4, 9), **changes}


def state_of(model):
    """Everything that expansion could have touched."""
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        [module.training for module in model.modules()],
        [
            (type(layer.router), layer.experts.num_experts, list(layer.balance_losses))
            for layer in moe_layers(model).values()
        ],
        torch.get_rng_state(),
    )


def same(one, other):
    return (
        one[0].keys() == other[0].keys()
        and all(torch.equal(one[0][key], other[0][key]) for key in one[0])
        and one[1:4] == other[1:4]
        and torch.equal(one[4], other[4])
    )


def loads(model, inputs):
    """Tokens per expert, of each layer."""
    with record_routing() as window, torch.no_grad():
        model(**inputs)
    return [torch.bincount(found.expert_ids, minlength=found.num_experts) for found in window.values()]


# --- which copies ---


def small_layer():
    layer = MoELayer(TopKRouter(3, 2, top_k=1, normalize=False), Experts(2, 3, 1, gated=False, down_bias=True))
    with torch.no_grad():
        layer.router.gate.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 9.0]]))
        layer.experts.up_proj.copy_(torch.tensor([[[1.0, 1.0, 1.0]], [[2.0, 2.0, 2.0]]]))
        layer.experts.down_proj.copy_(torch.tensor([[[1.0]] * 3, [[2.0]] * 3]))
        layer.experts.down_proj_bias.copy_(torch.tensor([[5.0] * 3, [6.0] * 3]))
    return nn.Sequential(layer)


def test_rows_and_experts_are_copied_side_by_side():
    model = small_layer()
    model[0].experts.down_proj.requires_grad_(False)
    expansion = expand(model, 6, row_noise=0.0, seed=0)
    layer = model[0]
    assert expansion.copies == {"0": (3, 3)}
    assert expansion.num_experts == (2, 6)
    assert layer.experts.num_experts == layer.router.num_experts == 6
    assert layer.router.gate.tolist() == [[1.0, 2.0, 3.0]] * 3 + [[4.0, 5.0, 9.0]] * 3
    assert layer.experts.up_proj.flatten(1).tolist() == [[1.0] * 3] * 3 + [[2.0] * 3] * 3
    assert layer.experts.down_proj_bias.tolist() == [[5.0] * 3] * 3 + [[6.0] * 3] * 3
    assert [p.requires_grad for _, p in sorted(layer.experts.named_parameters())] == [False, True, True]
    # by hand: up 2 * (3 + 3 + 12), down_bias 6 * 3, gate 2 * 3, before: three times as many after
    assert expansion.parameters == (2 * 3 + 2 * 3 + 2 * 3 + 2 * 3, 3 * 24)


def test_noise_moves_the_rows_of_all_copies_but_the_first_by_a_fraction_of_their_deviation():
    model = nn.Sequential(MoELayer(TopKRouter(1000, 2, top_k=1, normalize=False), Experts(2, 1000, 1)))
    with torch.no_grad():
        model[0].router.gate.copy_(torch.stack([torch.randn(1000), 5 * torch.randn(1000)]))
    before = model[0].router.gate.detach().clone()
    expand(model, 6, row_noise=0.1, seed=0)
    moved = model[0].router.gate.detach() - before.repeat_interleave(3, 0)
    assert moved[[0, 3]].eq(0).all()
    # a standard deviation of 1000 numbers is known to about 2 %
    assert torch.allclose(moved[[1, 2, 4, 5]].std(1), torch.tensor([0.1, 0.1, 0.5, 0.5]), rtol=0.1)
    assert not torch.equal(moved[1], moved[2])


def test_buffers_are_copied_without_noise():
    model = trained(partial(LossFreeRouter, top_k=K))
    before = {name: layer.router.expert_bias.clone() for name, layer in moe_layers(model).items()}
    expand(model, 2 * E)
    for name, layer in moe_layers(model).items():
        assert torch.equal(layer.router.expert_bias, before[name].repeat_interleave(2))


def test_groups_stay_whole():
    model = trained(partial(LossFreeRouter, top_k=K, num_groups=2))
    gates = {name: layer.router.gate.detach().clone() for name, layer in moe_layers(model).items()}
    expand(model, 3 * E, row_noise=0.0)
    for name, layer in moe_layers(model).items():
        old, new = gates[name].chunk(2), layer.router.gate.chunk(layer.router.num_groups)
        assert [set(map(tuple, group.tolist())) for group in new] == [set(map(tuple, group.tolist())) for group in old]


def test_what_experts_share_is_kept():
    layer = MoELayer(TopKRouter(8, E, top_k=1, normalize=False), LowRankExperts(E, 8, 6, rank=2, up_bias=True))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    before = dict(layer.experts.named_parameters())
    x = torch.randn(7, 8)
    wanted = layer(x)
    expansion = expand(nn.Sequential(layer), 2 * E, top_k=2, row_noise=0.0)
    after = dict(layer.experts.named_parameters())
    assert {key for key in before if after[key] is before[key]} == {"gate_up_proj", "gate_up_proj_bias", "down_proj"}
    assert {key: len(after[key]) for key in before if after[key] is not before[key]} == dict.fromkeys(
        ("first_a", "first_b", "down_a", "down_b"), 2 * E
    )
    assert all(after[key].requires_grad == before[key].requires_grad for key in before)
    assert expansion.preserved
    assert torch.allclose(layer(x), wanted, rtol=PROMISE, atol=PROMISE * wanted.abs().max().item())


def test_layers_have_noise_of_their_own_and_the_seed_repeats():
    models = [trained() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        assert expand(model, 2 * E, seed=seed).seed == seed
    gates = [[layer.router.gate for layer in moe_layers(model).values()] for model in models]
    assert all(torch.equal(a, b) for a, b in zip(gates[0], gates[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(gates[0], gates[2], strict=True))
    twins = nn.Sequential(small_layer()[0], small_layer()[0])
    expand(twins, 4, row_noise=0.1, seed=0)
    assert not torch.equal(twins[0].router.gate, twins[1].router.gate)


# --- step 0, and the receipt ---

EXACT = {
    "normalised": partial(TopKRouter, top_k=K),
    "raw": partial(TopKRouter, top_k=K, normalize=False),
    "raw top-1": partial(TopKRouter, top_k=1, normalize=False),
    "straight-through top-1": partial(TopKRouter, top_k=1, normalize="straight_through"),
    "sigmoid": partial(SigmoidRouter, top_k=K),
    "loss-free": partial(LossFreeRouter, top_k=K),
    "loss-free, scaled": partial(LossFreeRouter, top_k=K, routed_scaling=2.5),
    "loss-free, one group": partial(LossFreeRouter, top_k=K, num_groups=2, top_k_groups=2),
    "cosine": partial(CosineRouter, top_k=K, projection_size=6),
    "perturbed cosine": partial(PerturbedCosineRouter, top_k=K, projection_size=6),
    "xmoe": partial(XMoERouter, top_k=K, projection_size=5),
    "noisy": partial(NoisyTopKRouter, top_k=K),
    "dense mixer": partial(DenseMixerRouter, top_k=K),
}
INEXACT = {
    "raw sigmoid": partial(SigmoidRouter, top_k=K, normalize=False),
    "loss-free, raw": partial(LossFreeRouter, top_k=K, normalize=False),
    "loss-free, groups": partial(LossFreeRouter, top_k=K, num_groups=2),
    "sparse mixer": partial(SparseMixerRouter, top_k=K, threshold=10.0),
}


def top_k_of(router):
    return router.keywords["top_k"]


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("router", EXACT.values(), ids=EXACT)
def test_with_top_k_multiplied_as_the_experts_step_0_is_the_model_before(router, factor):
    model = trained(router)
    wanted = logits(model, batch())
    expansion = expand(model, factor * E, row_noise=0.0, top_k=factor * top_k_of(router), batch=batch())
    measured = (logits(model, batch()) - wanted).abs().max()
    assert measured <= PROMISE * wanted.abs().max().clamp(min=1)
    assert expansion.measured_difference == measured.item()
    assert expansion.preserved
    assert "together get the weight" in expansion.reason


@pytest.mark.parametrize("router", INEXACT.values(), ids=INEXACT)
def test_where_weights_do_not_share_out_the_receipt_says_so(router):
    model = trained(router)
    expansion = expand(model, 2 * E, row_noise=0.0, top_k=2 * K, batch=batch())
    assert not expansion.preserved
    assert expansion.measured_difference > 1e-3
    assert "top_k=4" in expansion.reason


@pytest.mark.parametrize("router", ["normalised", "raw", "raw top-1", "sigmoid", "loss-free", "cosine"])
@pytest.mark.parametrize("row_noise", [0.0, 0.01])
def test_with_top_k_fixed_step_0_is_not_the_model_before(router, row_noise):
    expansion = expand(trained(EXACT[router]), 2 * E, row_noise=row_noise, batch=batch(), seed=0)
    assert not expansion.preserved
    assert expansion.measured_difference > 1e-3
    assert f"top_k={top_k_of(EXACT[router])}" in expansion.reason


def test_noise_costs_the_promise():
    expansion = expand(trained(), 2 * E, top_k=2 * K, row_noise=0.5, batch=batch(), seed=0)
    assert not expansion.preserved
    assert expansion.measured_difference > 1e-3
    assert "row_noise=0.5" in expansion.reason


def test_a_capacity_costs_the_promise_in_training():
    expansion = expand(trained(capacity_factor=1.5), 2 * E, top_k=2 * K, row_noise=0.0, batch=batch())
    assert not expansion.preserved
    assert "capacity_factor=1.5" in expansion.reason
    assert expansion.measured_difference <= PROMISE


def test_top_k_and_the_compute_per_token_stay_unless_told_otherwise():
    model = trained(partial(TopKRouter, top_k=3))
    expand(model, 2 * E)
    assert [layer.router.top_k for layer in moe_layers(model).values()] == [3, 3]
    assert [int(load.sum()) for load in loads(model, batch())] == [3 * 36] * 2


def test_other_arguments_of_the_router_stay():
    model = trained(partial(TopKRouter, top_k=1, normalize=False, jitter=0.1, init_std=0.5))
    model.train()
    expand(model, 2 * E)
    router = next(iter(moe_layers(model).values())).router
    assert (router.top_k, router.normalize, router.jitter, router.init_std) == (1, False, 0.1, 0.5)
    assert router.training


def test_the_receipt_in_words_and_for_json():
    expansion = expand(trained(), 2 * E, batch=batch(), seed=7)
    text = str(expansion)
    assert text.startswith("Expanded 2 MoE layers from 4 to 8 experts.")
    assert "2 of each expert" in text
    assert "NOT the model before" in text
    assert "max |logit difference|" in text
    loaded = json.loads(json.dumps(expansion.to_dict()))
    assert loaded["copies"] == {name: [2] * E for name in LLAMA.names}
    assert loaded["seed"] == 7
    uneven = dataclasses.replace(expansion, copies={LLAMA.names[0]: (1, 2, 1, 4), LLAMA.names[1]: (2, 2, 2, 2)})
    assert "1 to 4 of each expert" in str(uneven)


# --- symmetry ---


def test_without_noise_some_copies_are_never_chosen_with_noise_all_are():
    inputs = {"input_ids": token_ids(64, 32)}
    for row_noise, wanted in ((0.0, False), (0.01, True)):
        # a softmax that is not peaked, so that every expert has tokens
        model = trained(partial(TopKRouter, top_k=1, normalize=False))
        assert all((load > 0).all() for load in loads(model, inputs))
        expand(model, 2 * E, row_noise=row_noise, seed=0)
        assert all(bool((load > 0).all()) == wanted for load in loads(model, inputs))


@pytest.mark.parametrize("router", ["raw top-1", "normalised", "loss-free", "cosine"])
def test_two_steps_of_training_tell_all_copies_apart(router):
    model = trained(EXACT[router])
    expand(model, 2 * E, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = token_ids(64, 32)
    model.train()
    for layer in moe_layers(model).values():
        for weight in layer.experts.parameters():
            assert torch.equal(weight[::2], weight[1::2])
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for layer in moe_layers(model).values():
        for weight in layer.experts.parameters():
            assert (weight[::2] - weight[1::2]).flatten(1).abs().amax(1).gt(0).all()


# --- utility ---


def test_apportion_by_hand():
    # 6 2 1: 6/1 first; then 6/2 = 3, 6/3 = 2 ties with 2/1, where fewer copies go first; then 6/3, and 6/4 over 2/2
    assert _apportion([6.0, 2.0, 1.0], 4) == (2, 1, 1)
    assert _apportion([6.0, 2.0, 1.0], 5) == (3, 1, 1)
    assert _apportion([6.0, 2.0, 1.0], 6) == (3, 2, 1)
    assert _apportion([6.0, 2.0, 1.0], 7) == (4, 2, 1)
    assert _apportion([6.0, 2.0, 1.0], 8) == (5, 2, 1)
    assert _apportion([0.0, 0.0, 0.0], 7) == (3, 2, 2)


def best_by_force(utilities, total):
    """The allocation whose sorted list of utilities per copy is the smallest, of all there are."""
    options = [
        counts for counts in itertools.product(range(1, total + 1), repeat=len(utilities)) if sum(counts) == total
    ]
    return min(
        options, key=lambda counts: sorted((u / c for u, c in zip(utilities, counts, strict=True)), reverse=True)
    )


@pytest.mark.parametrize("total", range(4, 10))
def test_apportion_keeps_the_largest_utility_per_copy_small(total):
    utilities = [5.3, 0.7, 2.9, 1.1]
    largest = max(u / c for u, c in zip(utilities, _apportion(utilities, total), strict=True))
    best = max(u / c for u, c in zip(utilities, best_by_force(utilities, total), strict=True))
    assert largest == best


def test_utility_is_the_squared_gradient_of_each_batch():
    model = trained()
    batches = [batch(), batch(input_ids=token_ids(2, 7, 1))]
    found = _utilities(model, moe_layers(model), batches)
    for name, layer in moe_layers(model).items():
        wanted = torch.zeros(E)
        for inputs in batches:
            twin = copy.deepcopy(model)
            out = twin(**inputs).logits[:, :-1]
            F.cross_entropy(out.flatten(0, 1), inputs["input_ids"][:, 1:].flatten()).backward()
            experts = twin.get_submodule(name).experts
            for e in range(E):
                wanted[e] += sum(p.grad[e].square().sum() for p in experts.parameters())
        assert found[name].shape == (layer.experts.num_experts,)
        assert torch.allclose(found[name].float(), wanted, rtol=1e-4)


def test_more_copies_of_the_more_useful():
    model = trained()
    utilities = _utilities(model, moe_layers(model), [batch()])
    before = {name: layer.experts.down_proj.detach().clone() for name, layer in moe_layers(model).items()}
    expansion = expand(model, 7, method="utility", calibration=[batch()], seed=0)
    for name, layer in moe_layers(model).items():
        copies = expansion.copies[name]
        assert sum(copies) == 7
        assert min(copies) >= 1
        assert copies == _apportion(utilities[name].tolist(), 7)
        assert copies[utilities[name].argmax()] == max(copies) > 1
        assert torch.equal(layer.experts.down_proj, before[name].repeat_interleave(torch.tensor(copies), 0))
    assert not expansion.preserved
    model(**batch(labels=token_ids(4, 9))).loss.backward()


def test_padding_is_no_label():
    model, ids = trained(), token_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    labels = torch.where(mask == 1, ids, -100)
    found, wanted = (
        _utilities(model, moe_layers(model), [{"input_ids": ids, "attention_mask": mask, **given}])
        for given in ({}, {"labels": labels})
    )
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_utility_leaves_the_model_as_it_was_and_the_balance_losses_out():
    model = trained(partial(TopKRouter, top_k=K, jitter=0.1))
    alone = _utilities(model, moe_layers(model), [batch()])
    for layer in moe_layers(model).values():
        layer.balance_losses.update({"load_balancing_loss": LoadBalancingLoss(100.0), "z_loss": ZLoss(100.0)})
        layer.experts.requires_grad_(False)
    model.train()
    model.model.layers[0].eval()
    before = state_of(model)
    contexts = [dict(vars(layer.context)) for layer in moe_layers(model).values()]
    found = _utilities(model, moe_layers(model), [batch(), batch()])
    assert same(before, state_of(model))
    assert all(torch.allclose(found[name], 2 * alone[name]) for name in found)
    after = [dict(vars(layer.context)) for layer in moe_layers(model).values()]
    assert all(
        one.keys() == other.keys() and all(one[k] is other[k] for k in one)
        for one, other in zip(contexts, after, strict=True)
    )


# --- refusals ---

REFUSED_ROUTERS = {
    "moe++": (ROUTER_ROWS["moe_plus_plus"], "MoEPlusPlusRouter cannot be expanded: gate of shape"),
    "moe++ without free experts": (
        partial(MoEPlusPlusRouter, num_zero_experts=0, num_copy_experts=0, num_constant_experts=0),
        "MoEPlusPlusRouter cannot be expanded: residual_gate of shape",
    ),
    "null experts": (ROUTER_ROWS["null_experts"], "NullExpertsRouter cannot be expanded: gate of shape"),
    "tc-moe": (ROUTER_ROWS["tc_moe"], "TCMoERouter cannot be expanded: gate of shape"),
    "hyper": (ROUTER_ROWS["hyper"], "HyperRouter cannot be expanded: output_weight of shape"),
    "xmoe": (ROUTER_ROWS["xmoe"], "XMoERouter cannot be expanded: projection of shape"),
    "hash": (ROUTER_ROWS["hash"], "HashRouter cannot be expanded: it does not choose by hidden states alone"),
    "uniform": (ROUTER_ROWS["uniform"], "UniformRouter cannot be expanded: it does not choose by hidden states alone"),
    "top-p": (ROUTER_ROWS["top_p"], "TopPRouter cannot be expanded: it gives tokens no fixed number"),
    "remoe": (ROUTER_ROWS["remoe"], "ReMoERouter cannot be expanded: it gives tokens no fixed number"),
}


def counted(loss, model):
    for layer in moe_layers(model).values():
        layer.balance_losses["counting"] = loss
    model.train()
    model(**batch())
    return model


REFUSED = {
    "method": (trained, {"method": "all"}, "method='all': wanted one of 'even', 'utility'"),
    "noise": (trained, {"row_noise": -1.0}, "row_noise=-1.0"),
    "half an expert": (trained, {"top_k": 2.5}, r"top_k=2\.5: wanted a whole number"),
    "fewer": (trained, {"num_experts": 3}, "num_experts=3: the model has 4"),
    "no multiple": (trained, {"num_experts": 6}, "num_experts=6 is no multiple of the 4 .*give 8 or 12"),
    "no batches": (trained, {"method": "utility"}, 'method="utility" measures gradients of the loss: give calibration'),
    "idle batches": (trained, {"calibration": [{"labels": None}]}, 'method="even" has no use for calibration'),
    "no labels": (
        trained,
        {"method": "utility", "calibration": [{"input_ids": token_ids()}, {"pixel_values": None}]},
        r"calibration\[1\]: got \['pixel_values'\]",
    ),
    "a tensor": (trained, {"method": "utility", "calibration": [token_ids()]}, r"calibration\[0\]: got Tensor"),
    "top_k too large": (trained, {"top_k": 9}, "model.layers.0.mlp.router: TopKRouter .*top_k=9 with num_experts=8"),
    "no top_k": (partial(trained, GShardRouter), {"top_k": 4}, "GShardRouter cannot be expanded: it takes no top_k=4"),
    "groups": (
        partial(trained, partial(LossFreeRouter, num_groups=2)),
        {"method": "utility", "calibration": [batch()]},
        "over the bounds of the router's groups",
    ),
    "counts": (
        lambda: counted(LoadBalancingLoss(scope="global_batch"), trained()),
        {},
        "model.layers.0.mlp: LoadBalancingLoss has counted 4 experts",
    ),
    **{
        name: (partial(trained, router), {}, f"model.layers.0.mlp.router: {message}")
        for name, (router, message) in REFUSED_ROUTERS.items()
    },
}


@pytest.mark.parametrize(("build", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_the_model_untouched(build, arguments, message):
    # the type checker of the tests would refuse some of it first
    plain = getattr(expand, "__wrapped__", expand)
    model = build()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        plain(model, **{"num_experts": 2 * E, **arguments})
    assert same(before, state_of(model))


@pytest.mark.parametrize("router", [HashRouter, ExpertChoiceRouter])
def test_a_later_layer_that_is_refused_leaves_the_first_untouched(router):
    model = nn.Sequential(*(MoELayer(kind(8, E), Experts(E, 8, 3)) for kind in (TopKRouter, router)))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"1\.router: {router.__name__} cannot be expanded: it"):
        expand(model, 8)
    assert same(before, state_of(model))


def test_no_moe_layers_different_numbers_and_no_loss_are_refused():
    with pytest.raises(ValueError, match="upcycle"):
        expand(LLAMA.build(), 8)
    layers = [MoELayer(TopKRouter(8, n), Experts(n, 8, 3)) for n in (2, 4)]
    with pytest.raises(ValueError, match="have 2 and 4 experts"):
        expand(nn.Sequential(*layers), 8)

    class Lossless(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layers[0]

        def forward(self, labels):
            return self.layer(labels)

    with pytest.raises(ValueError, match=r"calibration\[0\]: loss=None"):
        expand(Lossless(), 4, method="utility", calibration=[{"labels": torch.randn(3, 8)}])
    with pytest.raises(ValueError, match="meta device"):
        expand(nn.Sequential(layers[1]).to("meta"), 8)


def test_a_loss_without_counts_stays():
    model = trained()
    for layer in moe_layers(model).values():
        layer.balance_losses["load_balancing_loss"] = LoadBalancingLoss()
    expand(model, 2 * E)
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(
        len(layer.balance_losses) == 1 and layer.router.gate.grad is not None for layer in moe_layers(model).values()
    )


# --- what comes after ---


@pytest.mark.parametrize("method", ["even", "utility"])
def test_an_expanded_model_is_saved_and_loaded(method, tmp_path):
    model = trained(partial(LossFreeRouter, top_k=K), num_shared_experts=1)
    calibration = {"calibration": [batch()]} if method == "utility" else {}
    expand(model, 2 * E, method=method, top_k=3, **calibration)
    save_moe(model, tmp_path)
    loaded = load_moe(tmp_path)
    assert torch.equal(logits(loaded, batch()), logits(model, batch()))
    assert {layer.router.top_k for layer in moe_layers(loaded).values()} == {3}


def test_a_plain_model_in_half_precision_is_expanded_twice():
    model = nn.Sequential(Block(TwoLinear(8, 12)), Block(TwoLinear(8, 12)))
    upcycle(model, UpcycleConfig(num_experts=3, router=partial(LossFreeRouter, top_k=1, normalize=False)))
    model.to(torch.bfloat16)
    expand(model, 6)
    expand(model, 12)
    for layer in moe_layers(model).values():
        assert layer.experts.down_proj.dtype == layer.router.gate.dtype == torch.bfloat16
        # as exact as it was
        assert layer.router.expert_bias.dtype == torch.float32
        assert layer.experts.num_experts == 12
    assert model(torch.randn(5, 8, dtype=torch.bfloat16)).isfinite().all()
