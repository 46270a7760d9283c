import copy
import inspect
import pickle
import warnings
from functools import partial

import pytest
import torch
from catalogue import (
    CORE_ROWS,
    FAMILY_ROWS,
    INIT_ROWS,
    ROUTER_ROWS,
    SPECIAL,
    TEXT_ROWS,
    VOCABULARY,
    Block,
    TwoLinear,
    logits,
    plain_model,
    sequential_ffn,
    token_ids,
)
from lightning_fixtures import run_script
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_moe import (
    INITIALIZERS,
    CopyInit,
    GranularInit,
    LowRankInit,
    MoELayer,
    TopKRouter,
    UpcycleConfig,
    ZeroOutputInit,
    expert_load,
    find_ffns,
    moe_layers,
    record_routing,
    upcycle,
)
from lightning_moe.calibration import generates
from lightning_moe.config import check_config, select_layers
from lightning_moe.routing import MoEWarning, is_observed, observe_routing

E = 5
CONFIG = UpcycleConfig(num_experts=E)
RAW = UpcycleConfig(num_experts=E, router=partial(TopKRouter, normalize=False))
# The promise of the package: the weights of a token sum to one up to 1e-7, and logits are of size one.
PROMISE = 1e-5

every_family = pytest.mark.parametrize("row", FAMILY_ROWS.values(), ids=FAMILY_ROWS)
core_families = pytest.mark.parametrize("row", CORE_ROWS.values(), ids=CORE_ROWS)
every_text_family = pytest.mark.parametrize("row", TEXT_ROWS.values(), ids=TEXT_ROWS)
both_checkpointings = pytest.mark.parametrize("use_reentrant", [True, False])


def dense_model(row, dtype=torch.float32):
    dense = row.build().to(dtype)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(std=0.3)  # initial weights of 0.02 and biases of 0 would hide mistakes
    return dense


def twins(row, config=CONFIG, dtype=torch.float32, batch=None):
    """The dense model, its upcycled copy, and the receipt."""
    dense = dense_model(row, dtype)
    moe = copy.deepcopy(dense)
    return dense, moe, upcycle(moe, config, batch=batch)


def llama():
    return TEXT_ROWS["llama"].build()


def test_initialisers_have_rows():
    assert {row.cls for row in INIT_ROWS.values()} == set(INITIALIZERS)


# --- step 0 is the dense model ---


# routers that look at later tokens say so when they are put into a causal language model
not_causal = pytest.mark.filterwarnings("ignore:.*routing depend on later tokens")
KEPT = [name for name, row in ROUTER_ROWS.items() if row(8, E).weights_sum is not None]
NOT_KEPT = [name for name in ROUTER_ROWS if name not in KEPT]


@every_family
def test_every_family_keeps_the_dense_outputs(row):
    dense, moe, receipt = twins(row)
    wanted = logits(dense, row.batch())
    assert wanted.abs().max() > 0.1  # nothing to compare otherwise
    assert (logits(moe, row.batch()) - wanted).abs().max() <= PROMISE * max(1.0, wanted.abs().max().item())
    assert receipt.preserved
    assert tuple(moe_layers(moe)) == row.names


# each with its init, its number of shared experts and a top_k that suits it
PRESERVING = {
    "copy": (CopyInit(), 0, 2),
    "copy, shared": (CopyInit(), 1, 2),
    "granular 2": (GranularInit(2), 0, 2),
    "granular 4": (GranularInit(4), 0, 4),
    "granular 2, shared": (GranularInit(2), 1, 2),
    "zero output, shared": (ZeroOutputInit(), 1, 2),
    "low rank": (LowRankInit(3), 0, 2),
    "low rank, shared": (LowRankInit(3), 1, 2),
}


@every_family
@pytest.mark.parametrize("name", PRESERVING)
def test_every_family_keeps_the_dense_outputs_under_every_initialiser_that_says_so(row, name):
    init, num_shared, top_k = PRESERVING[name]
    router = partial(TopKRouter, top_k=top_k, init_std=0.5)
    config = UpcycleConfig(num_experts=8, router=router, init=init, num_shared_experts=num_shared)
    dense, moe, receipt = twins(row, config, batch=row.batch())
    wanted = logits(dense, row.batch())
    assert wanted.abs().max() > 0.1  # nothing to compare otherwise
    assert (logits(moe, row.batch()) - wanted).abs().max() <= PROMISE * max(1.0, wanted.abs().max().item())
    assert receipt.preserved
    assert receipt.measured_difference <= PROMISE * max(1.0, wanted.abs().max().item())


@not_causal
@core_families
@pytest.mark.parametrize("router", KEPT)
@pytest.mark.parametrize("init", [n for n, i in INIT_ROWS.items() if i.cls.copies_dense])
def test_dense_logits_are_kept(row, router, init):
    if ROUTER_ROWS[router](8, E).uses_token_ids and not row.is_text:
        pytest.skip("routes by token ids, of which this model has none")
    config = UpcycleConfig(num_experts=E, router=ROUTER_ROWS[router], init=INIT_ROWS[init]())
    dense, moe, receipt = twins(row, config)
    batch = row.batch()
    wanted = logits(dense, batch)
    assert wanted.abs().max() > 0.1  # nothing to compare otherwise
    assert (logits(moe, batch) - wanted).abs().max() <= PROMISE * max(1.0, wanted.abs().max().item())
    assert receipt.preserved
    assert set(moe_layers(moe)) == set(row.names)


@not_causal
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("router", KEPT)
@pytest.mark.parametrize("num_shared", [1, 2])
def test_dense_logits_are_kept_with_shared_experts(router, family, num_shared):
    row = FAMILY_ROWS[family]
    config = UpcycleConfig(num_experts=E, router=ROUTER_ROWS[router], num_shared_experts=num_shared)
    dense, moe, receipt = twins(row, config)
    wanted = logits(dense, row.batch())
    assert (logits(moe, row.batch()) - wanted).abs().max() <= PROMISE * max(1.0, wanted.abs().max().item())
    assert receipt.preserved
    assert f"and {num_shared} shared" in str(receipt)
    assert receipt.parameters[1] - receipt.active_parameters[1] == pytest.approx(
        2 * row.ffn_parameters * (E - receipt.experts_per_token), abs=1
    )


@not_causal
@pytest.mark.parametrize("router", NOT_KEPT)
def test_the_receipt_says_where_the_dense_logits_are_not_kept(router):
    row = FAMILY_ROWS["llama"]
    dense, _, _ = twins(row)
    receipt = upcycle(dense, UpcycleConfig(num_experts=E, router=ROUTER_ROWS[router]), batch=row.batch())
    assert not receipt.preserved
    assert "NOT the dense model" in str(receipt)
    assert type(moe_layers(dense)["model.layers.0.mlp"].router).__name__ in receipt.reason
    assert receipt.measured_difference > 0


def test_capacity_keeps_the_dense_logits_in_evaluation_only():
    row = FAMILY_ROWS["llama"]
    dense, moe, receipt = twins(row, UpcycleConfig(num_experts=E, capacity_factor=0.5))
    assert torch.allclose(logits(moe.eval(), row.batch()), logits(dense, row.batch()), atol=PROMISE)
    assert not torch.allclose(logits(moe.train(), row.batch()), logits(dense, row.batch()), atol=100 * PROMISE)
    assert not receipt.preserved
    assert "capacity_factor=0.5" in receipt.reason


@every_family
def test_dense_logits_are_kept_in_bfloat16(row):
    dense, moe, _ = twins(row, dtype=torch.bfloat16)
    batch = row.batch(dtype=torch.bfloat16)
    wanted = logits(dense, batch)
    difference = (logits(moe, batch) - wanted).abs().max()
    # to the bit: each expert's output is the dense one's, and w1 y + w2 y, summed in float32, rounds back to it
    assert difference <= (0 if row.exact_in_bfloat16 else 2e-2 * wanted.abs().max())


@every_family
def test_gradients_are_the_dense_ones(row):
    dense, moe, _ = twins(row)
    batch = row.batch()
    out, wanted = logits(moe, batch), logits(dense, batch)
    upstream = torch.randn_like(wanted)
    out.backward(upstream)
    wanted.backward(upstream)
    theirs = {n: p for n, p in dense.named_parameters() if p.grad is not None}
    of_ffns = {id(p) for weights in find_ffns(dense).values() for _, p in weights.sources}
    # sums over the 21 tokens of a batch, through two layers, of gradients of size 1 to 100
    scale = max(p.grad.abs().max().item() for p in theirs.values())
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5 * scale)
    within = tuple(f"{name}." for name in row.names)
    others = {n for n, p in moe.named_parameters() if not n.startswith(within) and p.grad is not None}
    assert others == {n for n, p in theirs.items() if id(p) not in of_ffns}
    for name in others:
        close(moe.get_parameter(name).grad, theirs[name].grad)
    # as weights sum to one, the gradients of the copies add up to the dense FFN's own
    for parameter in theirs.values():
        parameter.data = parameter.grad
    for name, wanted_ffn in find_ffns(dense).items():
        first = [wanted_ffn.up] if wanted_ffn.gate is None else [wanted_ffn.gate, wanted_ffn.up]
        experts = moe.get_submodule(name).experts
        close(experts.down_proj.grad.sum(0), wanted_ffn.down)
        close(experts.first_proj.grad.sum(0), torch.cat(first))
        if wanted_ffn.down_bias is not None:
            close(experts.down_proj_bias.grad.sum(0), wanted_ffn.down_bias)
        if wanted_ffn.up_bias is not None:
            first = [wanted_ffn.up_bias] if wanted_ffn.gate is None else [wanted_ffn.gate_bias, wanted_ffn.up_bias]
            close(experts.first_proj_bias.grad.sum(0), torch.cat(first))


@every_family
def test_every_router_and_expert_gets_a_gradient(row):
    # raw weights: with equal experts and weights that sum to one the task tells the router nothing
    _, moe, _ = twins(row, RAW)
    logits(moe, row.batch()).square().sum().backward()
    for name, layer in moe_layers(moe).items():
        assert all(parameter.grad is not None for parameter in layer.parameters()), name
        assert bool(layer.router.gate.grad.any())
        assert bool(layer.experts.down_proj.grad.any())


@pytest.mark.parametrize("init", INIT_ROWS)
@core_families
def test_an_initialiser_fills_every_parameter(row, init):
    init_row = INIT_ROWS[init]
    if init_row.arguments.get("method") == "gradient" and not generates(row.build()):
        pytest.skip("has no loss without labels")
    config = UpcycleConfig(num_experts=4, init=init_row(row.build, 4), num_shared_experts=init_row.num_shared_experts)
    _, moe, _ = twins(row, config, batch=row.batch())
    for layer in moe_layers(moe).values():
        assert all(bool(parameter.isfinite().all()) for parameter in layer.parameters())
    assert bool(logits(moe, row.batch()).isfinite().all())


def test_dropout_of_the_ffn_is_kept():
    # four layers, every dropout of GPT-2 on: as the router draws nothing, both models draw the same masks
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=4, n_head=2, resid_pdrop=0.3, **SPECIAL)
    dense = GPT2LMHeadModel(config).train()
    moe = copy.deepcopy(dense)
    upcycle(moe, CONFIG)
    assert [layer.dropout.p for layer in moe_layers(moe).values()] == [0.3] * 4
    batch = {"input_ids": token_ids()}
    torch.manual_seed(1)
    wanted = logits(dense, batch)
    torch.manual_seed(1)
    assert (logits(moe, batch) - wanted).abs().max() <= PROMISE
    torch.manual_seed(2)
    assert (logits(moe, batch) - wanted).abs().max() > 1e-3


# --- the receipt ---


@every_family
def test_the_receipt_counts(row):
    dense, moe, receipt = twins(row)
    before = sum(p.numel() for p in dense.parameters())
    gates, ffns = len(row.names) * E * row.hidden_size, sum(row.counts)
    assert receipt.layers == row.names
    assert receipt.kept == ()
    assert receipt.num_experts == E
    assert receipt.experts_per_token == 2
    assert receipt.parameters == (before, before + (E - 1) * ffns + gates)
    assert receipt.parameters[1] == sum(p.numel() for p in moe.parameters())
    # of each layer two experts and the whole gate are active, where there was one FFN
    assert receipt.active_parameters == (before, before + ffns + gates)
    assert receipt.measured_difference is None
    assert receipt.to_dict()["layers"] == row.names


def measured(row, config):
    """The receipt, what it should have measured, and the size of the outputs."""
    dense = dense_model(row)
    moe = copy.deepcopy(dense)
    # as the receipt does: some models take other kernels with gradients
    with torch.no_grad():
        wanted = logits(dense, row.batch())
        receipt = upcycle(moe, config, batch=row.batch().get("input", row.batch()))
        return receipt, (logits(moe, row.batch()) - wanted).abs().max().item(), max(1.0, wanted.abs().max().item())


measurable = pytest.mark.parametrize(
    "row",
    FAMILY_ROWS.values(),
    ids=FAMILY_ROWS,
)


@measurable
def test_the_receipt_measures(row):
    receipt, difference, size = measured(row, CONFIG)
    assert receipt.measured_difference == difference
    assert difference <= PROMISE * size


def test_a_batch_whose_output_has_no_logits_is_refused_and_leaves_the_model_as_it_was():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn = sequential_ffn()

        def forward(self, x):
            return {"first": self.ffn(x)}

    model = Pair()
    with pytest.raises(TypeError, match="Pair returned dict; wanted a tensor"):
        upcycle(model, CONFIG, batch=torch.randn(3, 8))
    assert not moe_layers(model)


@measurable
def test_raw_weights_do_not_preserve_and_the_receipt_says_so(row):
    receipt, difference, _ = measured(row, RAW)
    assert not receipt.preserved
    assert "do not sum to one" in receipt.reason
    assert receipt.measured_difference == difference
    # zero would be a lie, and so would be what rounding alone gives
    assert receipt.measured_difference > (0 if row.normalised else 10 * PROMISE)
    assert "NOT the dense model" in str(receipt)


def test_measuring_keeps_every_mode():
    model = llama().train()
    model.model.norm.eval()
    upcycle(model, CONFIG, batch={"input_ids": token_ids()})
    assert model.training
    assert not model.model.norm.training
    assert all(layer.training for layer in moe_layers(model).values())


# --- which layers ---


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("all", [0, 1, 2]),
        ("1::2", [1]),
        ("-1:", [2]),
        ("::2", [0, 2]),
        ([0, 2], [0, 2]),
        ([-1], [2]),
        ("*.1.mlp", [1]),
        (["*.0.mlp", -1], [0, 2]),
        ([2, 0, "0:1"], [0, 2]),
    ],
)
def test_selection(layers, chosen):
    names = [f"h.{i}.mlp" for i in range(3)]
    assert select_layers(names, layers) == [names[i] for i in chosen]


@pytest.mark.parametrize("layers", ["nothing.*", [3], [-4], "5:", ["*.0.mlp", "typo"], []])
def test_a_selection_that_chooses_nothing_is_refused(layers):
    with pytest.raises(ValueError, match="layers="):
        select_layers([f"h.{i}.mlp" for i in range(3)], layers)


def test_only_the_chosen_layers_are_replaced():
    model = llama()
    dense_ffn = model.model.layers[0].mlp
    receipt = upcycle(model, UpcycleConfig(num_experts=E, layers="1::2"))
    assert receipt.layers == ("model.layers.1.mlp",)
    assert receipt.kept == ("model.layers.0.mlp",)
    assert model.model.layers[0].mlp is dense_ffn
    assert isinstance(model.model.layers[1].mlp, MoELayer)


# --- randomness ---


def gates(model):
    return [layer.router.gate.detach() for layer in moe_layers(model).values()]


def test_the_same_seed_gives_the_same_model():
    dense = llama()
    models = [copy.deepcopy(dense) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(3)  # the state of the global generator does not matter
        assert upcycle(model, UpcycleConfig(num_experts=E, seed=seed)).seed == seed
    first, again, other = (gates(model) for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_numbers_of_a_layer_do_not_depend_on_the_others():
    dense = llama()
    both, one = copy.deepcopy(dense), copy.deepcopy(dense)
    upcycle(both, UpcycleConfig(num_experts=E, seed=1))
    upcycle(one, UpcycleConfig(num_experts=E, seed=1, layers=[1]))
    assert torch.equal(gates(both)[1], gates(one)[0])


def test_layers_draw_different_numbers():
    model = llama()
    upcycle(model, CONFIG)
    first, second = gates(model)
    assert not torch.equal(first, second)


def test_without_a_seed_the_global_one_counts():
    dense = llama()
    models = [copy.deepcopy(dense) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.manual_seed(seed)
        assert upcycle(model, CONFIG).seed == seed
    assert torch.equal(gates(models[0])[0], gates(models[1])[0])
    assert not torch.equal(gates(models[0])[0], gates(models[2])[0])


def test_the_global_generator_is_left_alone():
    model = llama()
    before = torch.get_rng_state()
    upcycle(model, CONFIG, batch={"input_ids": token_ids()})
    assert torch.equal(torch.get_rng_state(), before)


# --- what is kept of the dense FFN ---


@pytest.mark.parametrize("training", [True, False])
def test_mode_dtype_and_names_are_kept(training):
    model = llama().bfloat16().train(training)
    upcycle(model, CONFIG)
    for name, layer in moe_layers(model).items():
        assert layer.name == name
        assert all(module.training == training for module in layer.modules())
        assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}


def test_a_frozen_ffn_gives_frozen_experts_and_a_router_that_trains():
    model = llama().requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    upcycle(model, CONFIG)
    frozen, free = moe_layers(model).values()
    assert not any(p.requires_grad for p in frozen.experts.parameters())
    assert all(p.requires_grad for p in free.experts.parameters())
    assert all(p.requires_grad for layer in (frozen, free) for p in layer.router.parameters())


def test_a_shared_ffn_becomes_one_shared_layer():
    ffn = TwoLinear(8, 12)
    model = nn.Sequential(Block(ffn), nn.Linear(8, 8), Block(ffn))
    wanted = model(x := torch.randn(7, 8))
    receipt = upcycle(model, CONFIG)
    assert receipt.layers == ("0.ffn",)
    assert isinstance(model[0].ffn, MoELayer)
    assert model[2].ffn is model[0].ffn
    with record_routing() as window:
        assert (model(x) - wanted).abs().max() <= PROMISE
    assert list(window) == ["0.ffn"]
    assert window["0.ffn"].num_tokens == 14


def test_an_ffn_that_one_parent_has_twice_becomes_one_shared_layer():
    ffn = TwoLinear(8, 12)
    model = nn.Sequential(ffn, nn.LayerNorm(8), ffn)
    upcycle(model, CONFIG)
    assert isinstance(model[0], MoELayer)
    assert model[2] is model[0]


@every_family
def test_a_deep_copy_computes_the_same_and_shares_nothing(row):
    _, moe, _ = twins(row, RAW)
    twin = copy.deepcopy(moe)
    batch = row.batch()
    wanted = logits(moe, batch)
    assert torch.equal(logits(twin, batch), wanted)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(moe, batch), wanted)


def test_the_padding_mask_reaches_the_layers_of_a_deep_copy():
    moe = llama()
    upcycle(moe, CONFIG)
    twin = copy.deepcopy(moe)
    ids, mask = padded("left")
    with record_routing() as window:
        twin(input_ids=ids, attention_mask=mask)
    assert [r.token_mask is not None for r in window.values()] == [True, True]
    assert not next(iter(moe_layers(moe).values())).context.inputs


def test_an_upcycled_model_can_be_pickled():
    moe = llama()
    upcycle(moe, CONFIG)
    batch = {"input_ids": token_ids()}
    assert torch.equal(logits(pickle.loads(pickle.dumps(moe)), batch), logits(moe, batch))


# --- bad input leaves the model as it was ---


class OtherMaths(TwoLinear):
    def forward(self, x):
        return super().forward(x) * 2


def mixed_maths():
    """Its first FFN is fine, the second is not."""
    return nn.Sequential(Block(TwoLinear(8, 12)), Block(OtherMaths(8, 12)))


def upcycled():
    model = llama()
    upcycle(model, UpcycleConfig(num_experts=E, layers=[0]))
    return model


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_experts": 0}, ValueError, "num_experts=0: wanted"),
        ({"num_experts": -2}, ValueError, "num_experts=-2: wanted"),
        ({"num_experts": 4, "router": TopKRouter(8, 4)}, TypeError, "not a router or its name"),
    ],
)
def test_a_bad_configuration_is_refused_where_it_is_made(arguments, error, message):
    with pytest.raises(error, match=message):
        UpcycleConfig(**arguments)


def test_what_is_no_initialiser_is_refused_in_words(tmp_path):
    """In a process of its own, where no test's type check comes first."""
    script = """
from lightning_moe import CopyInit, TopKRouter, UpcycleConfig
for given in ("CopyInit", CopyInit, TopKRouter(8, 4)):
    try:
        UpcycleConfig(num_experts=4, init=given)
    except TypeError as error:
        print(error)
"""
    told = run_script(script, tmp_path).stdout.splitlines()
    assert len(told) == 3
    assert all("wanted an initialiser, not its class or name, as init=DropInit(0.5)" in line for line in told)


def test_what_is_no_configuration_is_refused():
    with pytest.raises(TypeError, match="config is a dict; wanted UpcycleConfig"):
        check_config({"num_experts": 4})


def test_one_layer_by_its_number():
    assert select_layers(["a", "b", "c"], 1) == select_layers(["a", "b", "c"], "-2") == ["b"]


BAD = {
    "no_family": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()), CONFIG, TypeError, "no FFN of a known family"),
    "top_k": (llama, UpcycleConfig(num_experts=1), ValueError, "top_k=2 with num_experts=1"),
    "top_1": (llama, UpcycleConfig(num_experts=4, router=partial(TopKRouter, top_k=1)), ValueError, "normalize=False"),
    "pattern": (llama, UpcycleConfig(num_experts=4, layers=["*.0.mlp", "typo"]), ValueError, "'typo' matches none"),
    "twice": (upcycled, CONFIG, ValueError, "upcycled already"),
    "maths": (mixed_maths, CONFIG, ValueError, r"1\.ffn: OtherMaths .* computes something else"),
    "no_router": (llama, UpcycleConfig(num_experts=4, router=nn.Linear), TypeError, "not a Router"),
    "is_an_ffn": (lambda: sequential_ffn(), CONFIG, ValueError, "put it into a module"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_leaves_the_model_as_it_was(case):
    build, config, error, message = BAD[case]
    model = build()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [(name, module) for name, module in model.named_modules()]
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(error, match=message):
        upcycle(model, config)
    assert [(name, module) for name, module in model.named_modules()] == modules
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("batch", "error"),
    [({}, ValueError), ({"input_ids": torch.full((1, 3), 10**6)}, IndexError)],
)
def test_a_bad_batch_leaves_the_model_as_it_was(batch, error):
    model = llama()
    types = [type(module) for module in model.modules()]
    with pytest.raises(error):
        upcycle(model, CONFIG, batch=batch)
    assert [type(module) for module in model.modules()] == types


# --- padding ---


def padded(side):
    ids, mask = token_ids(3, 7), torch.ones(3, 7, dtype=torch.int64)
    for row, missing in enumerate((0, 2, 5)):
        where = slice(0, missing) if side == "left" else slice(7 - missing, 7)
        mask[row, where] = 0
        ids[row, where] = 0
    return ids, mask


@every_text_family
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positional", [True, False])
def test_the_padding_mask_reaches_the_layers(row, side, positional):
    dense, moe, _ = twins(row)
    ids, mask = padded(side)
    # some take their cache second
    order = list(inspect.signature(dense.forward).parameters)
    by_position = (ids, *[None] * (order.index("attention_mask") - 1), mask)
    with record_routing() as window:
        out = moe(*by_position) if positional else moe(input_ids=ids, attention_mask=mask)
    wanted = dense(input_ids=ids, attention_mask=mask).logits
    assert (out.logits - wanted)[mask.bool()].abs().max() <= PROMISE * max(1.0, wanted.abs().max().item())
    assert tuple(window) == row.names
    for routing in window.values():
        assert routing.token_mask.tolist() == mask.flatten().bool().tolist()
        assert expert_load(routing).sum() == 2 * mask.sum()


@every_text_family
def test_a_mask_is_forgotten_by_the_next_forward(row):
    _, moe, _ = twins(row)
    ids, mask = padded("left")
    moe(input_ids=ids, attention_mask=mask)
    with record_routing() as window:
        moe(input_ids=ids)
    assert all(routing.token_mask is None for routing in window.values())


@every_text_family
def test_the_mask_fits_in_generation_with_a_cache(row):
    _, moe, _ = twins(row)
    ids, mask = padded("left")
    with record_routing() as window:
        moe.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    for routing in window.values():
        # the prompt's 3 x 7 tokens at once, then three steps of 3 tokens: the fourth new token is not read again
        assert routing.token_mask.tolist() == mask.flatten().bool().tolist() + [True] * 9


@every_text_family
def test_greedy_text_is_the_dense_models(row):
    # argmax over 61 logits of size one: a tie within 1e-5 is out of the question
    dense, moe, _ = twins(row)
    ids, mask = padded("left")
    wanted, text = (
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False) for model in (dense, moe)
    )
    assert wanted.shape == (3, 19)
    assert text.tolist() == wanted.tolist()


def test_a_plain_module_has_no_mask():
    model = plain_model(lambda: TwoLinear(8, 12))
    upcycle(model, CONFIG)
    with record_routing() as window:
        model(torch.randn(2, 7, 5))
    assert [routing.token_mask for routing in window.values()] == [None, None]
    assert [routing.num_tokens for routing in window.values()] == [14, 14]


# --- recording ---


def test_one_record_per_forward_in_the_order_of_the_layers():
    moe = llama()
    upcycle(moe, CONFIG)
    ids = token_ids()
    with record_routing() as window:
        assert len(window) == 0
        moe(input_ids=ids)
    assert list(window) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for routing in window.values():
        assert routing.num_tokens == ids.numel()
        assert routing.expert_ids.numel() == 2 * ids.numel()
        assert routing.top_k == 2
    moe(input_ids=ids)
    assert window["model.layers.0.mlp"].num_tokens == ids.numel()
    assert not is_observed()


def test_the_record_is_what_the_layer_computed_with():
    moe = llama()
    upcycle(moe, CONFIG)
    layer, seen = moe.model.layers[0].mlp, []
    layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with record_routing() as window:
        moe(input_ids=token_ids())
    ((hidden, out),) = seen
    x = hidden.view(-1, 16)
    torch.testing.assert_close(layer.experts.loop(x, window["model.layers.0.mlp"]).view_as(out), out)


def test_several_forwards_are_joined():
    moe = llama()
    upcycle(moe, CONFIG)
    ids, mask = padded("right")
    batches = [{"input_ids": ids[:1, :4]}, {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:2]}]
    parts = []
    with record_routing() as whole:
        for batch in batches:
            with record_routing() as window:
                moe(**batch)
            parts.append(window["model.layers.1.mlp"])
    routing = whole["model.layers.1.mlp"]
    assert [part.num_tokens for part in parts] == [4, 21, 14]
    assert routing.num_tokens == 39
    starts = [0, 4, 25]
    assert routing.token_ids.tolist() == [
        i + s for p, s in zip(parts, starts, strict=True) for i in p.token_ids.tolist()
    ]
    for name in ("expert_ids", "weights", "logits", "scores"):
        assert torch.equal(getattr(routing, name), torch.cat([getattr(part, name) for part in parts]))
    assert routing.token_mask.tolist() == [True] * 4 + mask.flatten().bool().tolist() + [True] * 14
    assert torch.equal(expert_load(routing), sum(expert_load(part) for part in parts))


def test_nested_windows_each_see_everything_while_they_are_open():
    moe = llama()
    upcycle(moe, CONFIG)
    ids = token_ids()
    with record_routing() as outer:
        moe(input_ids=ids)
        with record_routing() as inner:
            moe(input_ids=ids)
        moe(input_ids=ids)
    assert {r.num_tokens for r in inner.values()} == {ids.numel()}
    assert {r.num_tokens for r in outer.values()} == {3 * ids.numel()}


def test_a_window_closes_when_something_fails():
    with pytest.raises(RuntimeError, match="on purpose"), record_routing():
        raise RuntimeError("on purpose")
    assert not is_observed()


def test_an_observer_may_stop_twice():
    stop = observe_routing(lambda name, routing, losses: None)
    other = observe_routing(lambda name, routing, losses: None)
    stop()
    stop()
    assert is_observed()
    other()
    assert not is_observed()


@both_checkpointings
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_recomputation_leaves_no_record_and_the_same_gradients(name, use_reentrant):
    _, moe, _ = twins(TEXT_ROWS[name], RAW)
    moe.train()
    for module in moe.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    twin = copy.deepcopy(moe)
    ids, mask = padded("right")
    batch = {"input_ids": ids, "attention_mask": mask}
    moe(**batch).logits.square().mean().backward()
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    runs = []
    for layer in moe_layers(twin).values():
        layer.register_forward_pre_hook(lambda module, args: runs.append(module.name))
    with record_routing() as window, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, about the cache
        twin(**batch).logits.square().mean().backward()
    assert sorted(runs) == sorted(2 * list(window))  # it did recompute
    assert {routing.num_tokens for routing in window.values()} == {ids.numel()}
    for parameter, wanted in zip(twin.parameters(), moe.parameters(), strict=True):
        # the same operations on the same numbers
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-6, atol=1e-6)


@both_checkpointings
def test_two_forwards_before_one_backward_are_told_of(use_reentrant):
    # as in preference learning: chosen and rejected texts, each with its own padding
    _, model, _ = twins(TEXT_ROWS["llama"], RAW)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    chosen, rejected = (dict(zip(("input_ids", "attention_mask"), padded(s), strict=True)) for s in ("left", "right"))
    for batch in (chosen, rejected):
        model(**batch).logits.sum().backward()  # one backward each: nothing to tell
    with pytest.warns(MoEWarning, match="different attention masks"):
        (model(**chosen).logits.sum() + model(**rejected).logits.sum()).backward()
