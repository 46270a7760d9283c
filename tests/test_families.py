"""Every family from end to end, and what is refused in words."""

import copy
import re
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from catalogue import (
    FAMILY_ROWS,
    LIBRARY_ROWS,
    Block,
    TwoLinear,
    logits,
    plain_model,
    torchvision_ffn,
)
from lightning.pytorch import LightningModule
from lightning_fixtures import loader, trainer_of
from torch import nn
from torch.nn import functional as F

from lightning_moe import (
    FFNFamily,
    MoEUpcycleCallback,
    SigmoidRouter,
    TopKRouter,
    UpcycleConfig,
    find_ffns,
    load_moe,
    moe_layers,
    record_routing,
    save_moe,
    upcycle,
)

CONFIG = UpcycleConfig(num_experts=4)
# The weights of a token sum to one up to 1e-7, and outputs are of size one.
PROMISE = 1e-5

every_family = pytest.mark.parametrize("row", FAMILY_ROWS.values(), ids=FAMILY_ROWS)
every_library_family = pytest.mark.parametrize("row", LIBRARY_ROWS.values(), ids=LIBRARY_ROWS)


# --- from end to end ---


class Training(LightningModule):
    """A user's module around any model."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return logits(self.net, batch).float().square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@every_family
def test_trains_in_a_plain_trainer_and_comes_back(row, tmp_path):
    module = Training(row.build())
    batches = [row.batch(), row.batch(batch_size=2, length=6)]
    trainer_of(tmp_path, [MoEUpcycleCallback(CONFIG)]).fit(module, loader(batches))
    assert module.trainer.global_step == 2
    layers = moe_layers(module.net)
    assert tuple(layers) == row.names
    # the experts began as copies of one FFN, and Adam moves each of those that got a token
    assert all(bool((layer.experts.down_proj != layer.experts.down_proj[:1]).any()) for layer in layers.values())
    save_moe(module.net, tmp_path / "moe")
    loaded = load_moe(tmp_path / "moe", model=row.build() if row.inputs == "plain" else None)
    module.eval()
    for batch in batches:
        assert torch.equal(logits(loaded, batch), logits(module.net, batch))


@every_library_family
def test_recomputation_leaves_no_record_and_the_same_gradients(row):
    model = row.build().train()
    upcycle(model, CONFIG)
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    runs = []
    for layer in moe_layers(twin).values():
        layer.register_forward_pre_hook(lambda layer, args: runs.append(layer.name))
    recorded = []
    for each in (model, twin):
        torch.manual_seed(0)  # the same dropouts
        with record_routing() as window, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own, about the cache
            logits(each, row.batch()).square().mean().backward()
        recorded.append({name: routing.num_tokens for name, routing in window.items()})
    assert recorded[0] == recorded[1]
    inside = [name for name in row.names if "projector" not in name]  # which is in no checkpointed layer
    assert sorted(runs) == sorted([*inside, *row.names])
    for parameter, wanted in zip(twin.parameters(), model.parameters(), strict=True):
        assert (parameter.grad is None) == (wanted.grad is None)
        if wanted.grad is not None:
            # the same operations on the same numbers
            torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-6, atol=1e-6)


# --- which tokens are padding ---


def padded(length):
    mask = torch.ones(3, length, dtype=torch.int64)
    for row, missing in enumerate((0, 2, 4)):
        mask[row, length - missing :] = 0
    return mask


WITH_MASK = {name: row for name, row in LIBRARY_ROWS.items() if row.inputs in ("encoder", "seq2seq", "both")}


@pytest.mark.parametrize("row", WITH_MASK.values(), ids=WITH_MASK)
def test_each_tower_sees_its_own_padding(row):
    dense = row.build()
    moe = copy.deepcopy(dense)
    upcycle(moe, CONFIG)
    batch = row.batch()
    batch["attention_mask"] = padded(7)
    if row.inputs == "seq2seq":
        batch["decoder_attention_mask"] = padded(5)
    with record_routing() as window:
        out = logits(moe, batch)
    assert (out - logits(dense, batch)).abs().max() <= PROMISE * max(1.0, out.abs().max().item())
    assert set(window) == set(row.names)
    for name, routing in window.items():
        if "vision" in name:
            assert routing.token_mask is None
            assert routing.num_tokens == 3 * 5
        else:
            mask = batch["decoder_attention_mask" if ".decoder" in f".{name}" else "attention_mask"]
            assert routing.token_mask.tolist() == mask.flatten().bool().tolist()


def test_in_llava_the_text_has_padding_and_the_patches_have_none():
    row = FAMILY_ROWS["llava"]
    model = row.build()
    upcycle(model, UpcycleConfig(num_experts=4, layers=["*vision_tower*", "*language_model*"]))
    with record_routing() as window:
        model(**row.batch(), attention_mask=padded(7))
    text = padded(7).flatten().bool().tolist()
    masks = [None if routing.token_mask is None else routing.token_mask.tolist() for routing in window.values()]
    assert masks == [None, None, text, text]


def test_in_llava_the_projector_has_no_padding():
    row = FAMILY_ROWS["llava"]
    model = row.build()
    upcycle(model, UpcycleConfig(num_experts=4, layers="*projector"))
    with record_routing() as window:
        model(**row.batch(), attention_mask=padded(7))
    assert window["model.multi_modal_projector"].token_mask is None


# --- parts of a model ---


@pytest.mark.parametrize(
    ("part", "pattern", "count"),
    [
        ("model.vision_tower", "*vision_tower*", 2),
        ("model.language_model", "*language_model*", 2),
        (None, "*projector", 1),
    ],
)
def test_the_parts_of_llava_alone(part, pattern, count):
    row = FAMILY_ROWS["llava"]
    dense = row.build()
    wanted = logits(dense, row.batch())
    models = [copy.deepcopy(dense), copy.deepcopy(dense)]
    upcycle(models[0], UpcycleConfig(num_experts=4, layers=pattern))
    if part is not None:
        upcycle(models[1].get_submodule(part), CONFIG)
    for model in models if part else models[:1]:
        assert len(moe_layers(model)) == count
        assert all(part is None or name.startswith(part) for name in moe_layers(model))
        assert (logits(model, row.batch()) - wanted).abs().max() <= PROMISE


TOWER = UpcycleConfig(num_experts=4, router=SigmoidRouter, layers="*vision_tower*", seed=1)
TEXT = UpcycleConfig(
    num_experts=3,
    router=partial(TopKRouter, top_k=1, normalize="straight_through"),
    num_shared_experts=1,
    layers="*language_model*",
)


def test_the_parts_of_llava_each_with_its_own_configuration(tmp_path):
    row = FAMILY_ROWS["llava"]
    dense = row.build()
    moe = copy.deepcopy(dense)
    for config in (TOWER, TEXT):
        assert upcycle(moe, config, batch=row.batch()).preserved
    kinds = [(type(layer.router), layer.experts.num_experts) for layer in moe_layers(moe).values()]
    assert kinds == [(SigmoidRouter, 4)] * 2 + [(TopKRouter, 3)] * 2
    assert (logits(moe, row.batch()) - logits(dense, row.batch())).abs().max() <= PROMISE
    with record_routing() as window:
        moe(**row.batch(), attention_mask=padded(7))
    masks = [None if routing.token_mask is None else routing.token_mask.tolist() for routing in window.values()]
    assert masks == [None, None, *[padded(7).flatten().bool().tolist()] * 2]
    save_moe(moe, tmp_path)
    assert torch.equal(logits(load_moe(tmp_path), row.batch()), logits(moe, row.batch()))
    with pytest.raises(ValueError, match=r"already: model\.vision_tower.* name the layers"):
        upcycle(moe, CONFIG)


def test_two_callbacks_each_for_a_part(tmp_path):
    row = FAMILY_ROWS["llava"]

    def callbacks():
        parts = {"net.model.vision_tower": TOWER, "net.model.language_model": TEXT}
        return [MoEUpcycleCallback(replace(config, layers="all"), module=part) for part, config in parts.items()]

    class Eager(Training):
        def __init__(self):
            super().__init__(row.build())
            self.made = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self):
            return self.made

    trained, again = Eager(), Eager()
    trainer = trainer_of(tmp_path, callbacks(), max_steps=2)
    trainer.fit(trained, loader([row.batch()] * 2))
    kinds = [type(layer.router) for layer in moe_layers(trained).values()]
    assert kinds == [SigmoidRouter] * 2 + [TopKRouter] * 2
    assert not any(name in vars(trained) for name in ("configure_optimizers", "configure_model"))
    named = {id(p) for group in trained.made.param_groups for p in group["params"]}
    assert named >= {id(p) for layer in moe_layers(trained).values() for p in layer.parameters()}
    trainer.save_checkpoint(tmp_path / "moe.ckpt")
    saved = torch.load(tmp_path / "moe.ckpt", weights_only=True)["lightning_moe"]
    assert [len(receipt["layers"]) for receipt in saved["receipts"].values()] == [2, 2]
    assert len(saved["layers"]) == 4
    trainer_of(tmp_path, callbacks(), max_steps=2).fit(
        again, loader([row.batch()] * 2), ckpt_path=tmp_path / "moe.ckpt"
    )
    for one, other in zip(trained.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_projector_of_two_widths_is_left():
    class Projector(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear_1, self.act, self.linear_2 = nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8)

        def forward(self, x):
            return self.linear_2(self.act(self.linear_1(x)))

    assert list(find_ffns(nn.Sequential(Projector(), Block(TwoLinear(8, 12))))) == ["1.ffn"]


# --- dropout inside the FFN ---


def with_inner_dropout(name):
    if name == "sequential_dropout":
        return plain_model(lambda: torchvision_ffn(dropout=0.99))
    model = FAMILY_ROWS[name].build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.99
    return model


@pytest.mark.parametrize("name", ["t5", "t5_gated", "modernbert", "sequential_dropout"])
def test_the_inner_dropout_is_kept_in_training(name):
    model = with_inner_dropout(name)
    upcycle(model, CONFIG)
    layer = next(iter(moe_layers(model).values()))
    assert layer.experts.inner_dropout == 0.99
    layer.dropout.p = 0.0  # the one on the output is tested elsewhere
    if layer.experts.down_proj_bias is not None:
        layer.experts.down_proj_bias.data.zero_()
    x = torch.randn(400, layer.experts.hidden_size)
    assert bool((layer.eval()(x) != 0).any(1).all())
    # a token is left with something if a neuron of its two experts survives: with 12 that are not 0 (half of 24 after
    # ReLU) 1 - 0.99^24 = 21 % are, with 24 38 %
    assert 0.1 < (layer.train()(x) != 0).any(1).float().mean() < 0.5


def test_a_dropout_inside_a_decoder_layer_is_refused():
    model = FAMILY_ROWS["bart"].build()
    model.model.decoder.layers[1].activation_dropout = 0.1
    with pytest.raises(ValueError, match=r"decoder\.layers\.1: BartDecoderLayer has a dropout of 0\.1 between the pro"):
        upcycle(model, CONFIG)
    assert not moe_layers(model)


# --- what holds the weights ---


@every_family
def test_on_the_meta_device_nothing_is_allocated(row):
    with torch.device("meta"):
        model = row.build()
    upcycle(model, CONFIG)
    assert tuple(moe_layers(model)) == row.names
    assert all(parameter.is_meta for parameter in model.parameters())


class Adapter(nn.Module):
    """As peft puts it into the place of a linear layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(16, 2, bias=False), nn.Linear(2, base_layer.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_adapters_on_the_attention_work():
    row = FAMILY_ROWS["llama"]
    model = row.build().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    wanted = logits(model, row.batch())
    upcycle(model, CONFIG)
    assert (logits(model, row.batch()) - wanted).abs().max() <= PROMISE
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in trained} == {"lora_A", "lora_B", "router"}


@pytest.mark.parametrize("layers", [[0, 1], [1]])
def test_adapters_on_the_ffn_are_refused(layers):
    model = FAMILY_ROWS["llama"].build()
    for layer in layers:
        model.model.layers[layer].mlp.up_proj = Adapter(model.model.layers[layer].mlp.up_proj)
    with pytest.raises(TypeError, match=rf"layers\.{layers[0]}\.mlp\.up_proj: an adapter of peft .*merge_and_unload"):
        upcycle(model, CONFIG)
    assert not moe_layers(model)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype):
    model = FAMILY_ROWS["llama"].build()
    linear = model.model.layers[1].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=r"layers\.1\.mlp\.down_proj: the weight is quantised .*quantise after that"):
        upcycle(model, CONFIG)
    assert not moe_layers(model)


def test_weights_of_two_dtypes_are_refused():
    model = FAMILY_ROWS["t5"].build().half()
    for ffn in find_ffns(FAMILY_ROWS["t5"].build()):
        model.get_submodule(ffn).wo.float()  # as from_pretrained(dtype=torch.float16) leaves it
    with pytest.raises(
        ValueError, match=r"DenseReluDense: its weights differ in dtype \(torch\.float16, torch\.float32"
    ):
        upcycle(model, CONFIG)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_model_is_refused(one_process):
    model = FAMILY_ROWS["llama"].build()
    torch.distributed.fsdp.fully_shard(model, mesh=one_process)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj: the weight is sharded already\. Upcycle before"):
        upcycle(model, CONFIG)


def test_an_activation_that_several_layers_share_is_refused():
    model = FAMILY_ROWS["opt"].build()
    first, second = model.model.decoder.layers
    second.activation_fn = first.activation_fn
    with pytest.raises(ValueError, match=r"layers\.0\.activation_fn: several modules share it.*copy\.deepcopy"):
        upcycle(model, CONFIG)
    assert not moe_layers(model)


# --- a module of no known family ---


class Inline(nn.Module):
    """As the first Llama had it: the activation is called, not held."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(i, o, bias=False) for i, o in ((8, 12), (12, 8), (8, 12)))

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Held(nn.Module):
    """Odd names, a function for activation, dropouts on both sides."""

    def __init__(self):
        super().__init__()
        self.after, self.inside = nn.Dropout(0.2), nn.Dropout(0.1)
        self.shrink, self.widen, self.bend = nn.Linear(12, 8), nn.Linear(8, 12), torch.tanh

    def forward(self, x):
        return self.after(self.shrink(self.inside(self.bend(self.widen(x)))))


class Fused(nn.Module):
    """Gate and up in one weight."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.sigma = nn.Linear(8, 24), nn.Linear(12, 8), nn.Sigmoid()

    def forward(self, x):
        gate, up = self.inner(x).chunk(2, -1)
        return self.outer(self.sigma(gate) * up)


class Unlike(nn.Module):
    """Two linear layers of fitting widths, and something that no family computes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.b(self.a(x).cos())


@pytest.mark.parametrize(
    ("kind", "suggestion"),
    [
        (Inline, 'FFNFamily(up="w3", down="w2", activation="silu", gate="w1")'),
        (
            Held,
            'FFNFamily(up="widen", down="shrink", activation="bend", dropout="after", inner_dropout="inside")',
        ),
        (Fused, 'FFNFamily(up="inner", down="outer", activation="sigma", fused_gate=True)'),
    ],
)
def test_the_error_shows_the_one_line_that_fits(kind, suggestion):
    model = plain_model(kind).eval()
    wanted = f"This one fits {kind.__name__}: UpcycleConfig(family={suggestion})."
    with pytest.raises(TypeError, match=re.escape(wanted)):
        upcycle(model, CONFIG)
    batch = FAMILY_ROWS["two_linear"].batch()
    dense = logits(model, batch)
    family = eval(suggestion, {"FFNFamily": FFNFamily})
    upcycle(model, UpcycleConfig(num_experts=4, family=family))
    assert tuple(moe_layers(model)) == ("1.ffn", "2.ffn")
    assert (logits(model, batch) - dense).abs().max() <= PROMISE


def test_the_error_suggests_nothing_that_does_not_fit():
    with pytest.raises(TypeError, match=r"Unlike\(a, b\)\. Describe yours in one line and pass it: UpcycleConfig\(fam"):
        find_ffns(plain_model(Unlike))


def test_a_family_whose_activation_is_called_comes_back(tmp_path):
    family = FFNFamily(gate="w1", up="w3", down="w2", activation="silu")
    model = plain_model(Inline).eval()
    upcycle(model, UpcycleConfig(num_experts=4, family=family))
    save_moe(model, tmp_path, family=family)
    batch = FAMILY_ROWS["two_linear"].batch()
    assert torch.equal(logits(load_moe(tmp_path, model=plain_model(Inline)), batch), logits(model, batch))


def test_a_users_family_with_a_place(tmp_path):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = nn.LayerNorm(8), nn.ReLU()
            self.grow, self.fold = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            return x + self.fold(self.act(self.grow(self.norm(x))))

    family = FFNFamily(up="grow", down="fold", activation="act", place="grow", beside=("norm",))

    def build():
        return nn.Sequential(nn.Linear(5, 8), Layer(), Layer()).eval()

    model = build()
    batch = FAMILY_ROWS["two_linear"].batch()
    dense = logits(model, batch)
    upcycle(model, UpcycleConfig(num_experts=4, family=family, layers=[1]))
    assert tuple(moe_layers(model)) == ("2.grow",)
    assert (logits(model, batch) - dense).abs().max() <= PROMISE
    save_moe(model, tmp_path, family=family)
    assert torch.equal(logits(load_moe(tmp_path, model=build()), batch), logits(model, batch))
