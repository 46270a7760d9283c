"""What an initialiser makes of a dense FFN: which weights, which router, and what step 0 computes."""

import copy
import functools
import inspect
import math
import re

import pytest
import torch
from catalogue import FAMILY_ROWS, INIT_ROWS, ROUTER_INIT_ROWS, ROUTER_ROWS, logits, token_ids
from torch import nn

from lightning_moe import (
    ROUTER_INITIALIZERS,
    BranchTrainMixInit,
    CentroidRouterInit,
    CopyInit,
    CosineRouter,
    DropInit,
    ExpertLoad,
    GranularInit,
    HashRouter,
    KMeansRouterInit,
    LossFreeRouter,
    LowRankExperts,
    LowRankInit,
    MoEWarning,
    NoiseInit,
    NoisyTopKRouter,
    NormalRouterInit,
    OrthogonalRouterInit,
    SigmoidRouter,
    SplitInit,
    TopKRouter,
    UniformRouter,
    UpcycleConfig,
    ZeroOutputInit,
    ZeroRouterInit,
    find_ffns,
    load_moe,
    moe_layers,
    record_routing,
    save_moe,
    upcycle,
)
from lightning_moe.calibration import calibrate, check_batches
from lightning_moe.checks import check_whole
from lightning_moe.initializers.split import balanced_kmeans

E = 8
PROMISE = 1e-5
FAMILIES = {"gated": "llama", "gated with biases": "llama_biases", "not gated": "gpt2"}
every_init = pytest.mark.parametrize("row", INIT_ROWS.values(), ids=INIT_ROWS)
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def dense_model(family="llama"):
    """Weights large enough that a mistake shows, and a bias that is not zero."""
    torch.manual_seed(1)
    model = FAMILY_ROWS[family].build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def routed(cls, top_k, **arguments):
    def make(hidden_size, num_experts):
        return cls(hidden_size, num_experts, **{"top_k": min(top_k, num_experts), "init_std": 0.5, **arguments})

    return make


def made(init, family="llama", router=None, num_experts=E, **changes):
    """The dense model, what became of it, and the receipt, with a calibration batch for those that look at one."""
    dense = dense_model(family)
    moe = copy.deepcopy(dense)
    config = UpcycleConfig(
        num_experts=num_experts, router=router or routed(TopKRouter, 4), init=init, seed=3, **changes
    )
    return dense, moe, upcycle(moe, config, batch=FAMILY_ROWS[family].batch())


def made_of(row, family="llama", router=None, num_shared=0):
    """With a row of the catalogue, and as many experts as fit."""
    num_shared = max(num_shared, row.num_shared_experts)
    num_experts = E - num_shared if row.cls is SplitInit else E
    init = row(lambda: dense_model(family), num_experts)
    return made(init, family, router, num_experts, num_shared_experts=num_shared)


def difference(dense, moe, family="llama"):
    batch = FAMILY_ROWS[family].batch()
    wanted = logits(dense, batch)
    return ((logits(moe, batch) - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()


# --- step 0, and the receipt ---

ROUTERS = {
    "softmax": routed(TopKRouter, 4),
    "softmax, straight through": routed(TopKRouter, 4, normalize="straight_through"),
    "softmax, raw": routed(TopKRouter, 4, normalize=False),
    "softmax, three experts": routed(TopKRouter, 3),
    "softmax with noise": routed(TopKRouter, 4, noise_std=1.0),
    "softmax, all experts": routed(TopKRouter, 8),
    "sigmoid": routed(SigmoidRouter, 4),
    "sigmoid with dropped experts": routed(SigmoidRouter, 4, expert_dropout=0.5),
    "bias and scale": routed(LossFreeRouter, 4, routed_scaling=2.5),
    "learnt noise": routed(NoisyTopKRouter, 4),
    "cosine": lambda hidden_size, num_experts: CosineRouter(hidden_size, num_experts, top_k=4, projection_size=8),
}


@every_init
@every_family
@pytest.mark.parametrize("num_shared", [0, 1])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_receipt_tells_the_truth_about_step_zero(row, family, router, num_shared):
    dense, moe, receipt = made_of(row, family, ROUTERS[router], num_shared)
    batch = FAMILY_ROWS[family].batch()
    torch.manual_seed(0)
    for layer in moe_layers(moe).values():
        layer.router.train()  # and not the model, which has dropouts of its own
    in_training = difference(dense, moe, family)
    kept = max(difference(dense, moe.eval(), family), in_training) <= PROMISE
    assert receipt.preserved == kept, receipt
    assert receipt.measured_difference == pytest.approx(
        (logits(moe, batch) - logits(dense, batch)).abs().max().item(), rel=1e-3, abs=1e-6
    )


def test_what_is_kept_is_not_nothing():
    kept = [name for name, row in INIT_ROWS.items() if made_of(row)[2].preserved]
    assert kept == ["copy", "granular", "granular_4", "zero_output", "low_rank", "low_rank_scaled"]


@every_family
@pytest.mark.parametrize(("granularity", "top_k"), [(2, 2), (2, 4), (2, 6), (4, 4), (4, 8)])
def test_granular_experts_are_the_dense_ffn_together(family, granularity, top_k):
    dense, moe, receipt = made(GranularInit(granularity), family, routed(TopKRouter, top_k))
    assert receipt.preserved
    assert "whole copies" in receipt.reason
    assert difference(dense, moe, family) <= PROMISE


@every_init
@every_family
def test_trains_saves_and_loads(row, family, tmp_path):
    _, moe, _ = made_of(row, family)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    ids = token_ids(3, 7)
    for _ in range(2):
        moe(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_moe(moe, tmp_path)
    assert torch.equal(logits(load_moe(tmp_path), {"input_ids": ids}), logits(moe.eval(), {"input_ids": ids}))


@every_init
def test_layers_differ_and_the_seed_repeats_them(row):
    first, again, other = (made_of(row)[1], made_of(row)[1], dense_model())
    config = UpcycleConfig(
        num_experts=E,
        router=routed(TopKRouter, 4),
        init=row(dense_model),
        seed=4,
        num_shared_experts=row.num_shared_experts,
    )
    upcycle(other, config, batch=FAMILY_ROWS["llama"].batch())
    for one, same in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, same)
    layers, others = (list(moe_layers(model).values()) for model in (first, other))
    assert not torch.equal(layers[0].router.gate, layers[1].router.gate)
    draws = row.cls not in (CopyInit, GranularInit, ZeroOutputInit, BranchTrainMixInit)
    if draws and row.arguments.get("method") != "kmeans":
        assert any(
            not torch.equal(one, two)
            for one, two in zip(layers[0].experts.parameters(), others[0].experts.parameters(), strict=True)
        )


# --- the weights ---


def weights_of(model, layer="model.layers.0.mlp"):
    ffn = find_ffns(model)[layer]
    return [weight for weight in (ffn.gate, ffn.up, ffn.down) if weight is not None]


def expert_weights(moe, layer="model.layers.0.mlp"):
    """Gate, up and down of each expert: lists of (E, F, D), the down projection turned so that rows are neurons."""
    experts = moe_layers(moe)[layer].experts
    gate, up = experts.gate_up_proj.split(experts.expert_size, dim=1)
    return [gate, up, experts.down_proj.transpose(1, 2)]


def wide_model(width=256, hidden_size=32):
    """One SwiGLU FFN, wide enough for statistics."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj = nn.Linear(hidden_size, width, bias=False)
            self.up_proj = nn.Linear(hidden_size, width, bias=False)
            self.down_proj = nn.Linear(width, hidden_size, bias=False)
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    return nn.Sequential(Gated())


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_dropped_experts_have_so_much_in_common(ratio):
    torch.manual_seed(0)
    model = wide_model()
    upcycle(model, UpcycleConfig(num_experts=6, init=DropInit(ratio), seed=0))
    for weight in expert_weights(model, "0"):
        flat = nn.functional.normalize(weight.flatten(1), dim=1)
        cosines = (flat @ flat.T)[~torch.eye(6, dtype=torch.bool)]
        assert (cosines - (1 - ratio) ** 2).abs().max() < 0.05


def test_dropped_neurons_are_the_same_in_all_projections_and_keep_their_statistics():
    torch.manual_seed(0)
    model = wide_model()
    dense = weights_of(model, "0")
    dense[2] = dense[2].t()
    upcycle(model, UpcycleConfig(num_experts=4, init=DropInit(0.5), seed=0))
    for expert in range(4):
        changed = []
        for weight, source in zip(expert_weights(model, "0"), dense, strict=True):
            rows = (weight[expert] != source).any(1)
            changed.append(rows)
            assert int(rows.sum()) == 128
            # 4096 numbers: a mean off by a standard error of 1/64 of the deviation, times four
            assert abs(weight[expert][rows].mean() - source.mean()) < 4 / 64 * source.std()
            assert abs(weight[expert][rows].std() / source.std() - 1) < 4 / 64
        assert torch.equal(changed[0], changed[1])
        assert torch.equal(changed[0], changed[2])


def test_the_variant_of_the_repository_leaves_an_eighth_whole():
    torch.manual_seed(0)
    model = wide_model(width=1024)
    dense = weights_of(model, "0")
    dense[2] = dense[2].t()
    upcycle(model, UpcycleConfig(num_experts=2, init=DropInit(0.5, variant="repo"), seed=0))
    whole = torch.ones(2, 1024, dtype=torch.bool)
    for weight, source in zip(expert_weights(model, "0"), dense, strict=True):
        kept = (weight == source).all(-1)
        assert kept.sum(1).tolist() == [512, 512]
        whole &= kept
    # 1024 times (1/2)^3, with a standard deviation of about 10
    assert all(90 < count < 170 for count in whole.sum(1).tolist())


@pytest.mark.parametrize(("fraction", "replaced"), [(1.0, False), (0.5, False), (0.5, True)])
def test_noise_has_the_size_it_says(fraction, replaced):
    torch.manual_seed(0)
    model = wide_model()
    dense = weights_of(model, "0")
    dense[2] = dense[2].t()
    upcycle(model, UpcycleConfig(num_experts=2, init=NoiseInit(0.1, fraction, replaced), seed=0))
    for weight, source in zip(expert_weights(model, "0"), dense, strict=True):
        hit = weight[0] != source
        assert abs(hit.float().mean() - fraction) < 0.03
        noise, wanted = (weight[0][hit], 0.1) if replaced else ((weight[0] - source)[hit], 0.1 * source.std().item())
        assert noise.std().item() == pytest.approx(wanted, rel=0.05)
        assert not torch.equal(weight[0], weight[1])


@pytest.mark.parametrize("method", ["random", "kmeans", "activation"])
@every_family
def test_splitting_shares_every_neuron_out_once(method, family):
    dense, moe, receipt = made(SplitInit(method), family, num_experts=4, router=routed(TopKRouter, 2))
    name = FAMILY_ROWS[family].names[0]
    experts, ffn = moe_layers(moe)[name].experts, find_ffns(dense)[name]
    rows = experts.first_proj[:, : experts.expert_size].reshape(-1, 16)  # the gate's where there is one
    source = ffn.up if ffn.gate is None else ffn.gate
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, source.tolist()))
    router = sum(p.numel() for layer in moe_layers(moe).values() for p in layer.router.parameters())
    biases = 0 if ffn.down_bias is None else 3 * 16 * len(moe_layers(moe))  # the down bias, four times
    assert receipt.parameters[1] == receipt.parameters[0] + router + biases


@every_family
@pytest.mark.parametrize("method", ["random", "kmeans"])
def test_splitting_is_the_dense_model_if_every_expert_is_taken_alike(method, family):
    for router in (routed(TopKRouter, 4, init_std=0.0), functools.partial(UniformRouter, top_k=4)):
        dense, moe, receipt = made(SplitInit(method), family, num_experts=4, router=router)
        assert difference(dense, moe, family) <= PROMISE
        assert receipt.preserved
        assert "a token has all of them with equal weights" in receipt.reason


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        (routed(TopKRouter, 2), "a token has not all experts"),
        (routed(TopKRouter, 4, init_std=0.5), "TopKRouter does not weigh them equally"),
    ],
)
@every_family
def test_splitting_is_not_the_dense_model_otherwise(router, reason, family):
    dense, moe, receipt = made(SplitInit(), family, num_experts=4, router=router)
    assert difference(dense, moe, family) > 1e-3
    assert not receipt.preserved
    assert reason in receipt.reason


@pytest.mark.parametrize("init", [NoiseInit(std=0.0), DropInit(ratio=0.0)])
@every_family
def test_an_initialiser_that_changes_nothing_is_told_to_be_the_dense_model(init, family):
    dense, moe, receipt = made(init, family)
    assert difference(dense, moe, family) <= PROMISE
    assert receipt.preserved


@pytest.mark.parametrize("method", ["random", "kmeans", "activation", "gradient"])
@every_family
def test_splitting_gives_the_shared_experts_neurons_of_their_own(method, family):
    dense, moe, receipt = made(SplitInit(method), family, num_experts=4, num_shared_experts=2)
    name = FAMILY_ROWS[family].names[0]
    layer, ffn = moe_layers(moe)[name], find_ffns(dense)[name]
    stacks = [layer.experts, layer.shared_experts]
    assert [experts.expert_size for experts in stacks] == [4, 4]
    source = (ffn.up if ffn.gate is None else ffn.gate).tolist()
    rows = [experts.first_proj[:, :4].reshape(-1, 16).tolist() for experts in stacks]
    assert sorted(rows[0] + rows[1]) == sorted(source)
    router = sum(p.numel() for moe_layer in moe_layers(moe).values() for p in moe_layer.router.parameters())
    biases = 0 if ffn.down_bias is None else 5 * 16 * len(moe_layers(moe))
    assert receipt.parameters[1] == receipt.parameters[0] + router + biases
    if method in ("activation", "gradient"):
        h, gradient = hidden_and_gradient(dense, name, FAMILY_ROWS[family].batch())
        effect = h.abs().mean(0) * ffn.down.norm(dim=0) if method == "activation" else (h * gradient).abs().mean(0)
        assert sorted(rows[1]) == sorted(source[neuron] for neuron in effect.topk(8).indices.tolist())


@every_family
def test_splitting_with_shared_experts_is_the_dense_model_if_every_expert_is_taken_alike(family):
    everything = routed(TopKRouter, 4, init_std=0.0)
    dense, moe, _ = made(SplitInit(), family, num_experts=4, router=everything, num_shared_experts=2)
    assert difference(dense, moe, family) <= PROMISE


def hidden_and_gradient(dense, name, batch):
    """The neurons' activations and the loss's gradient by them, from the explicit FFN with a leaf in its middle."""
    ffn, held = find_ffns(dense)[name], {}
    dropout = getattr(dense.get_submodule(name), "dropout", nn.Identity())

    def explicit(_, given, __):
        held["h"] = ffn.hidden(given[0]).detach().requires_grad_()
        return dropout(nn.functional.linear(held["h"], ffn.down, ffn.down_bias))

    handle = dense.eval().get_submodule(name).register_forward_hook(explicit)
    dense(**batch, labels=batch["input_ids"]).loss.backward()
    handle.remove()
    return (tensor.reshape(-1, ffn.expert_size) for tensor in (held["h"].detach(), held["h"].grad))


def test_a_loss_that_is_no_number_gives_no_importance():
    dense, batch = dense_model(), FAMILY_ROWS["llama"].batch()
    config = UpcycleConfig(num_experts=4, init=SplitInit("gradient"))
    nothing = {**batch, "labels": torch.full_like(batch["input_ids"], -100)}
    with pytest.raises(ValueError, match=r"calibration\[1\]: the loss is nan, .* labels that are not all -100"):
        upcycle(dense, config, calibration=[batch, nothing])
    assert moe_layers(dense) == {}


@pytest.mark.parametrize("changes", [{"init": SplitInit("activation")}, {"router_init": KMeansRouterInit()}])
def test_hidden_states_that_are_no_numbers_are_refused(changes):
    dense, batch = dense_model(), FAMILY_ROWS["llama"].batch()
    dense.model.layers[0].input_layernorm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match=r"calibration\[0\]: the hidden states before model.layers.0.mlp are not all"):
        upcycle(dense, UpcycleConfig(num_experts=4, **changes), calibration=[batch])
    assert moe_layers(dense) == {}


@pytest.mark.parametrize("mask", [torch.zeros(3, 7).long(), None])
def test_a_batch_without_a_token_is_refused(mask):
    whole = {"input_ids": token_ids()}
    empty = {**whole, "attention_mask": mask} if mask is not None else {"input_ids": token_ids()[:0]}
    dense = dense_model()
    with pytest.raises(ValueError, match=r"calibration\[1\] holds no token, or padding only"):
        upcycle(dense, UpcycleConfig(num_experts=2, router_init=CentroidRouterInit()), calibration=[whole, empty])
    assert moe_layers(dense) == {}


def test_domains_that_are_alike_are_refused():
    batches = [{"input_ids": token_ids(generator_seed=seed)} for seed in (0, 1, 1)]
    dense = dense_model()
    with pytest.raises(ValueError, match="calibration batches 1 and 2 have the same mean hidden state"):
        upcycle(dense, UpcycleConfig(num_experts=3, router_init=CentroidRouterInit()), calibration=batches)
    assert moe_layers(dense) == {}


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (2, "calibration is 2; wanted a list of inputs of the model"),
        ("text", "calibration is 'text'; wanted a list"),
        ({"input_ids": torch.zeros(1, 3).long()}, "calibration is one batch; wanted a list"),
        (torch.zeros(1, 3).long(), "calibration is one batch; wanted a list"),
        (["text"], r"calibration\[0\] is 'text', a str; wanted inputs of the model"),
    ],
)
def test_what_is_no_list_of_batches_is_told_in_words(calibration, message):
    # past the type checks of the tests, which users do not have
    with pytest.raises(TypeError, match=message):
        inspect.unwrap(check_batches)("calibration", calibration)


@pytest.mark.parametrize("frozen", [False, True])
@every_family
def test_saliency_is_that_of_the_explicit_ffn_and_leaves_no_trace(frozen, family):
    dense = dense_model(family).train().requires_grad_(not frozen)
    batch = FAMILY_ROWS[family].batch()
    ffns = find_ffns(dense)
    state = torch.get_rng_state()
    states = calibrate(dense, ffns, [SplitInit("gradient")], [batch, batch])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in dense.modules())
    assert all(p.grad is None and p.requires_grad != frozen for p in dense.parameters())
    assert not any(module._forward_pre_hooks for module in dense.modules())
    for name in ffns:
        h, gradient = hidden_and_gradient(dense_model(family), name, batch)
        wanted = (h * gradient).repeat(2, 1)
        torch.testing.assert_close(states[name].saliency, wanted, rtol=1e-4, atol=1e-7)


def test_saliency_leaves_padding_out_and_wants_a_loss():
    dense = dense_model()
    ids, mask = token_ids(2, 5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    states = calibrate(dense, find_ffns(dense), [SplitInit("gradient")], [{"input_ids": ids, "attention_mask": mask}])
    assert [len(found.saliency) for found in states.values()] == [8, 8]
    model = wide_model()
    with pytest.raises(ValueError, match="Sequential gives no loss on batches that are no mappings"):
        upcycle(model, UpcycleConfig(num_experts=4, init=SplitInit("gradient")), batch=torch.randn(3, 32))


# --- shared and routed, low rank ---


@pytest.mark.filterwarnings("ignore:.*routing depend on later tokens")
@pytest.mark.parametrize("router", ROUTER_ROWS)
def test_zero_outputs_keep_the_dense_model_whatever_the_router_does(router):
    dense, moe, receipt = made(ZeroOutputInit(), router=ROUTER_ROWS[router], num_experts=4, num_shared_experts=2)
    free = type(next(iter(moe_layers(moe).values())).router).__name__ == "MoEPlusPlusRouter"
    assert receipt.preserved != free
    if not free:
        torch.manual_seed(0)
        assert max(difference(dense, moe), difference(dense, moe.train())) <= PROMISE


def test_zero_outputs_train():
    _, moe, _ = made(ZeroOutputInit(), num_shared_experts=1)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    ids, grads = token_ids(3, 7), []
    for _ in range(2):
        moe(input_ids=ids, labels=ids).loss.backward()
        experts = moe_layers(moe)["model.layers.0.mlp"].experts
        grads.append([bool(weight.grad.any()) for weight in (experts.first_proj, experts.down_proj)])
        optimizer.step()
        optimizer.zero_grad()
    assert grads == [[False, True], [True, True]]


@every_family
@pytest.mark.parametrize("frozen", [False, True])
def test_low_rank_experts_train_their_changes_and_nothing_of_the_ffn(family, frozen):
    dense = dense_model(family).requires_grad_(not frozen)
    upcycle(dense, UpcycleConfig(num_experts=4, router=routed(TopKRouter, 2, normalize=False), init=LowRankInit(3)))
    for layer in moe_layers(dense).values():
        assert isinstance(layer.experts, LowRankExperts)
        trains = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
        assert trains == {"router.gate", *(f"experts.{name}" for name in ("first_a", "first_b", "down_a", "down_b"))}
    if frozen:
        assert sum(p.requires_grad for p in dense.parameters()) == 5 * len(moe_layers(dense))


def test_the_receipt_counts_low_rank_parameters():
    dense, _, receipt = made(LowRankInit(rank=4), router=routed(TopKRouter, 2))
    # 16 channels, 24 neurons, rank 4: A and B of gate, up and down are 4 x (16 + 24) each
    changes, router = 3 * 4 * (16 + 24), 16 * E
    assert receipt.parameters_added == 2 * (E * changes + router)
    assert receipt.active_parameters[1] - receipt.active_parameters[0] == 2 * (2 * changes + router)
    ffns = sum(parameter.numel() for name, parameter in dense.named_parameters() if ".mlp." in name)
    assert receipt.trainable_parameters == (
        receipt.parameters[0],
        receipt.parameters[0] - ffns + 2 * (E * changes + router),
    )
    assert "  trainable " in str(receipt)
    assert receipt.expert_similarity == 1.0


# --- branch, train, mix ---


def branches_of(family="llama", number=2):
    found = []
    for seed in range(number):
        torch.manual_seed(10 + seed)
        found.append(dense_model(family))
        for parameter in found[-1].parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return found


@every_family
@pytest.mark.parametrize("include_dense", [True, False])
def test_branches_become_experts_and_the_rest_their_mean(family, include_dense):
    branches, dense = branches_of(family), dense_model(family)
    sources = [dense, *branches] if include_dense else branches
    moe, name = copy.deepcopy(dense), FAMILY_ROWS[family].names[1]
    init = BranchTrainMixInit(branches, include_dense)
    receipt = upcycle(moe, UpcycleConfig(num_experts=len(sources), init=init, layers=1))
    experts = moe_layers(moe)[name].experts
    for expert, source in enumerate(sources):
        ffn = find_ffns(source)[name]
        parts = [ffn.up] if ffn.gate is None else [ffn.gate, ffn.up]
        assert torch.equal(experts.first_proj[expert], torch.cat(parts))
        assert torch.equal(experts.down_proj[expert], ffn.down)
        if ffn.down_bias is not None:
            assert torch.equal(experts.down_proj_bias[expert], ffn.down_bias)
    # all but the one layer, and so the other's FFN too
    others = {key: value for key, value in moe.named_parameters() if not key.startswith(name)}
    assert any(FAMILY_ROWS[family].names[0] in key for key in others)
    for key, value in others.items():
        wanted = sum(dict(source.named_parameters())[key] for source in sources) / len(sources)
        torch.testing.assert_close(value, wanted)
    assert not receipt.preserved
    assert "the rest is these models' mean" in receipt.reason


def test_branches_that_are_the_dense_model_change_nothing():
    dense = dense_model()
    moe = copy.deepcopy(dense)
    init = BranchTrainMixInit([copy.deepcopy(dense) for _ in range(3)])
    receipt = upcycle(moe, UpcycleConfig(num_experts=4, init=init), batch=FAMILY_ROWS["llama"].batch())
    assert receipt.measured_difference <= PROMISE
    assert difference(dense, moe) <= PROMISE


def test_branches_by_path_into_a_part_of_a_module(tmp_path):
    paths, branches = [str(tmp_path / name) for name in "ab"], branches_of()
    for path, branch in zip(paths, branches, strict=True):
        branch.save_pretrained(path)
    by_path, by_module = (nn.ModuleDict({"model": dense_model()}) for _ in range(2))
    upcycle(by_path, UpcycleConfig(num_experts=3, init=BranchTrainMixInit(paths), seed=1))
    upcycle(by_module, UpcycleConfig(num_experts=3, init=BranchTrainMixInit(branches), seed=1))
    for one, other in zip(by_path.parameters(), by_module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_branch_of_another_architecture_is_refused_before_anything_changes(tmp_path):
    short = FAMILY_ROWS["llama"].build()
    short.model.layers = short.model.layers[:1]
    short.config.num_hidden_layers = 1
    short.save_pretrained(tmp_path / "short")
    FAMILY_ROWS["gpt2"].build().save_pretrained(tmp_path / "gpt2")
    dense = dense_model()
    before = copy.deepcopy(dense.state_dict())
    for branch, message in (
        (short, "number 0, a LlamaForCausalLM, is of another architecture: model.layers.1"),
        (dense, "number 0, a LlamaForCausalLM, is the model that is upcycled, or shares"),
        (str(tmp_path / "short"), "is of another architecture: model.layers.1"),
        (str(tmp_path / "gpt2"), "gpt2' is of another architecture"),
    ):
        with pytest.raises(ValueError, match=message):
            upcycle(dense, UpcycleConfig(num_experts=2, init=BranchTrainMixInit([branch])))
    assert moe_layers(dense) == {}
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "config.hidden_act is gelu, and in the LlamaForCausalLM that is upcycled silu"),
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}, "is of another architecture: config."),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta is 500000"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001"),
    ],
)
@pytest.mark.parametrize("by_path", [True, False])
def test_a_branch_that_computes_something_else_with_weights_of_the_same_shapes_is_refused(
    changes, message, by_path, tmp_path
):
    dense = dense_model()
    config = type(dense.config)(**(dense.config.to_dict() | changes))
    branch = type(dense)(config)
    for one, other in zip(branch.parameters(), dense.parameters(), strict=True):
        assert one.shape == other.shape
    branch.save_pretrained(tmp_path)
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        upcycle(dense, UpcycleConfig(num_experts=2, init=BranchTrainMixInit([str(tmp_path) if by_path else branch])))
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def test_what_does_not_change_the_computation_may_differ_between_branches(tmp_path):
    dense, branch = dense_model(), branches_of()[0]
    branch.config.use_cache, branch.config.bos_token_id, branch.config.attention_dropout = False, 7, 0.1
    branch.config.pad_token_id = branch.model.embed_tokens.padding_idx = 3
    branch.save_pretrained(tmp_path)
    upcycle(dense, UpcycleConfig(num_experts=2, init=BranchTrainMixInit([str(tmp_path)])))
    assert len(moe_layers(dense)) == 2


@pytest.mark.parametrize(("activation", "eps"), [(nn.ReLU(), 1e-5), (nn.GELU("tanh"), 1e-5), (nn.GELU(), 1e-3)])
def test_a_branch_of_a_plain_module_is_compared_by_what_its_parts_are(activation, eps):
    def plain(act, norm_eps=1e-5):
        return nn.Sequential(nn.Sequential(nn.Linear(8, 16), act, nn.Linear(16, 8)), nn.LayerNorm(8, eps=norm_eps))

    with pytest.raises(ValueError, match="is of another architecture"):
        upcycle(plain(nn.GELU()), UpcycleConfig(num_experts=2, init=BranchTrainMixInit([plain(activation, eps)])))
    upcycle(plain(nn.GELU()), UpcycleConfig(num_experts=2, init=BranchTrainMixInit([plain(nn.GELU())])))


def test_a_wrong_number_of_experts_is_told_before_any_branch_is_loaded():
    init = BranchTrainMixInit(["nowhere/at-all"])
    with pytest.raises(ValueError, match="has 1 model and the dense model itself; set num_experts=2"):
        upcycle(dense_model(), UpcycleConfig(num_experts=4, init=init))


def test_an_empty_directory_is_no_branch(tmp_path):
    with pytest.raises(ValueError, match=r"holds no model: there is no config\.json in it"):
        upcycle(dense_model(), UpcycleConfig(num_experts=2, init=BranchTrainMixInit([str(tmp_path)])))


def test_what_a_branch_has_not_stays_and_is_told():
    dense = dense_model()
    head = dense.lm_head.weight.clone()
    with pytest.warns(MoEWarning, match=r"lm_head.weight and 0 other parameters are no part of the branches"):
        upcycle(dense, UpcycleConfig(num_experts=2, init=BranchTrainMixInit([branches_of()[0].model])))
    assert torch.equal(dense.lm_head.weight, head)


def test_a_mixture_of_experts_is_no_branch(tmp_path):
    moe = dense_model()
    upcycle(moe, UpcycleConfig(num_experts=2))
    save_moe(moe, tmp_path)
    with pytest.raises(ValueError, match="holds a Mixture-of-Experts model; branches are dense models"):
        upcycle(dense_model(), UpcycleConfig(num_experts=2, init=BranchTrainMixInit([str(tmp_path)])))


def test_balanced_kmeans_finds_clusters_of_equal_size():
    torch.manual_seed(0)
    centres = 10 * torch.eye(4, 6)
    points = centres.repeat_interleave(5, 0) + 0.1 * torch.randn(20, 6)
    shuffled = torch.randperm(20)
    best = min(
        (balanced_kmeans(points[shuffled], 4, 10, torch.Generator().manual_seed(seed)) for seed in range(8)),
        key=lambda found: sum(points[shuffled][found == c].var(0).sum() for c in range(4)),
    )
    assert torch.bincount(best).tolist() == [5] * 4
    groups = [set((shuffled[best == c] // 5).tolist()) for c in range(4)]
    assert sorted(groups, key=min) == [{0}, {1}, {2}, {3}]


def test_granular_selects_whole_groups_of_low_precision_states():
    torch.manual_seed(0)
    model = nn.Sequential(*wide_model(width=64, hidden_size=64)).bfloat16()
    model = nn.Sequential(model)
    upcycle(model, UpcycleConfig(num_experts=32, router=routed(TopKRouter, 8, init_std=0.02), init=GranularInit(4)))
    router = next(iter(moe_layers(model).values())).router
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        groups = router(x).expert_ids.view(20_000, 8) // 4
        counts = torch.zeros(20_000, 8).scatter_add_(1, groups, torch.ones(20_000, 8))
        assert sorted(set(counts.flatten().tolist())) == [0, 4]


# --- the router's rows ---


def test_router_initialisers_have_rows():
    assert {row.cls for row in ROUTER_INIT_ROWS.values()} == set(ROUTER_INITIALIZERS)


def with_rows(init, calibration=None, num_experts=4, router=None):
    model = dense_model()
    config = UpcycleConfig(num_experts=num_experts, router=router or TopKRouter, router_init=init, seed=3)
    receipt = upcycle(model, config, calibration=calibration)
    return model, receipt


@pytest.mark.parametrize("row", ROUTER_INIT_ROWS.values(), ids=ROUTER_INIT_ROWS)
def test_rows_are_of_the_size_asked_for_and_each_layer_has_its_own(row):
    calibration = [FAMILY_ROWS["llama"].batch(length=5 + n) for n in range(4)]
    model, receipt = with_rows(row(), calibration)
    gates = [layer.router.gate for layer in moe_layers(model).values()]
    assert receipt.preserved
    assert not torch.equal(gates[0], gates[1])
    for gate in gates:
        if row.cls is ZeroRouterInit:
            assert 0 < gate.abs().max() < 1e-3
        elif row.cls is NormalRouterInit:
            assert gate.std().item() == pytest.approx(0.1, rel=0.3)
        else:
            torch.testing.assert_close(gate.norm(dim=1), torch.full((4,), 0.1 * math.sqrt(16)))
    again, _ = with_rows(row(), calibration)
    for gate, layer in zip(gates, moe_layers(again).values(), strict=True):
        assert torch.equal(gate, layer.router.gate)


def test_orthogonal_rows():
    model, _ = with_rows(OrthogonalRouterInit(0.1))
    for layer in moe_layers(model).values():
        torch.testing.assert_close(
            layer.router.gate @ layer.router.gate.T, 0.01 * 16 * torch.eye(4), rtol=1e-5, atol=1e-6
        )


def test_almost_equal_scores_and_yet_no_tie():
    model, _ = with_rows(ZeroRouterInit())
    with record_routing() as window, torch.no_grad():
        model(**FAMILY_ROWS["llama"].batch(16, 16))
    for routing in window.values():
        assert (routing.scores - 0.25).abs().max() < 1e-3
        load = ExpertLoad(4)
        load.update(routing)
        assert bool((load.compute() > 0).all())


@pytest.mark.parametrize("masked", [False, True])
def test_each_domain_goes_to_its_expert(masked):
    # domains of two words each; padding is a word of its own, which must not count
    domains = [torch.tensor([[5 + 10 * d, 6 + 10 * d] * 4]) for d in range(4)]
    batches = [{"input_ids": ids} for ids in domains]
    if masked:
        pad = torch.full((1, 8), 3)
        mask = torch.tensor([[1] * 8 + [0] * 8])
        batches = [{"input_ids": torch.cat([ids, pad], 1), "attention_mask": mask} for ids in domains]
    model, _ = with_rows(CentroidRouterInit(1.0), batches)
    plain, _ = with_rows(CentroidRouterInit(1.0), [{"input_ids": ids} for ids in domains])
    hits = 0
    for domain, ids in enumerate(domains):
        with record_routing() as window, torch.no_grad():
            model(input_ids=ids)
        best = window["model.layers.0.mlp"].expert_ids.view(8, 2)[:, 0]
        hits += int((best == domain).sum())
    assert hits >= 20  # of 32; by chance 8
    if masked:
        gates = (m.model.layers[0].mlp.router.gate for m in (model, plain))
        torch.testing.assert_close(*gates, rtol=1e-4, atol=1e-5)


def test_kmeans_rows_spread_the_tokens_they_were_made_of():
    batch = FAMILY_ROWS["llama"].batch(16, 16)
    loads = {}
    for init in (KMeansRouterInit(0.5), NormalRouterInit(0.5)):
        model, _ = with_rows(init, [batch])
        with record_routing() as window, torch.no_grad():
            model(**batch)
        entropies = [routing.scores.mean(0) for routing in window.values()]
        loads[type(init)] = min(float(-(p * p.log()).sum()) for p in entropies)
    assert loads[KMeansRouterInit] > 0.9 * math.log(4)


# --- refused in words ---


@pytest.mark.parametrize(
    ("init", "changes", "message"),
    [
        (GranularInit(3), {}, r"model\.layers\.0\.mlp: granularity=3 does not divide num_experts, 8"),
        (GranularInit(5), {"num_experts": 5}, r"granularity=5 does not divide the FFN's width, 24"),
        (GranularInit(2), {"router": HashRouter}, "HashRouter has not one row per expert"),
        (SplitInit(), {"num_experts": 7}, "num_experts=7 does not divide the FFN's width, 24"),
        (SplitInit(), {"num_shared_experts": 1}, "num_experts=8 and 1 shared, together, does not divide"),
        (ZeroOutputInit(), {}, r"model\.layers\.0\.mlp: ZeroOutputInit leaves .* set num_shared_experts=1"),
        (BranchTrainMixInit([dense_model()]), {}, "has 1 model and the dense model itself; set num_experts=2"),
        (BranchTrainMixInit([dense_model("gpt2")], False), {"num_experts": 1}, "number 0, a GPT2LMHeadModel, is of an"),
        (
            BranchTrainMixInit(["nowhere/at-all"]),
            {"num_experts": 2},
            "'nowhere/at-all' is no directory here, and from the Hub cannot be loaded as Llama",
        ),
        (None, {"router_init": CentroidRouterInit()}, "1 calibration batch for 8 experts"),
        (None, {"router_init": OrthogonalRouterInit(), "num_experts": 17}, "17 experts cannot have orthogonal rows"),
        (None, {"router_init": NormalRouterInit(), "router": ROUTERS["cosine"]}, "CosineRouter has not"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(init, changes, message):
    dense = dense_model()
    before = [name for name, _ in dense.named_modules()]
    config = UpcycleConfig(**{"num_experts": E, "router": routed(TopKRouter, 4), "init": init, **changes})
    with pytest.raises(ValueError, match=message):
        upcycle(dense, config, batch=FAMILY_ROWS["llama"].batch())
    assert [name for name, _ in dense.named_modules()] == before


@pytest.mark.parametrize("changes", [{"init": SplitInit("activation")}, {"router_init": KMeansRouterInit()}])
def test_what_looks_at_hidden_states_wants_a_batch(changes):
    with pytest.raises(ValueError, match=r"looks at what passes through the model: give upcycle\(\.\.\., calibration="):
        upcycle(dense_model(), UpcycleConfig(num_experts=4, **changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseInit(std=-1.0), "std=-1"),
        (lambda: NoiseInit(fraction=0.0), "fraction=0"),
        (lambda: DropInit(ratio=1.5), r"ratio=1\.5"),
        (lambda: GranularInit(0), "granularity=0"),
        (lambda: NormalRouterInit(0.0), "std=0"),
        (lambda: ZeroRouterInit(0.0), "tie_breaking=0"),
        (lambda: LowRankInit(rank=0), "rank=0"),
        (lambda: LowRankInit(alpha=-1.0), "alpha=-1"),
        (lambda: BranchTrainMixInit([]), r"models=\[\]: wanted a list"),
        (lambda: NoiseInit(std=math.nan), "std=nan"),
        (lambda: NoiseInit(std=math.inf), "std=inf"),
        (lambda: NormalRouterInit(math.inf), "std=inf"),
        (lambda: OrthogonalRouterInit(math.nan), "std=nan"),
        (lambda: LowRankInit(alpha=math.nan), "alpha=nan"),
        (lambda: SplitInit("kmeans", 0), "num_iterations=0"),
        (lambda: SplitInit(num_iterations=-3), "num_iterations=-3"),
        (lambda: check_whole(granularity=2.0), r"granularity=2\.0: wanted a whole number"),
        (lambda: check_whole(num_iterations=True), "num_iterations=True: wanted a whole number"),
        (lambda: OrthogonalRouterInit(-1.0), "std=-1"),
        (lambda: CentroidRouterInit(0.0), "std=0"),
        (lambda: KMeansRouterInit(num_iterations=0), "num_iterations=0"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("models", ["one", 3, nn.Linear(2, 2), [1]])
def test_branches_are_a_list_of_names_and_modules(models):
    # past the type checks of the tests, which users do not have
    with pytest.raises(TypeError, match="wanted a list of one model or more: names, paths, or the modules"):
        inspect.unwrap(BranchTrainMixInit.__init__)(object.__new__(BranchTrainMixInit), models)
