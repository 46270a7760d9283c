"""QLoRA for Mixtures of Experts: what is frozen and in 4 bit, what trains, what is saved; and 8-bit optimizers."""

import copy
import functools
import re
from pathlib import Path

import bitsandbytes
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_fixtures import (
    EagerModule,
    ForeignModule,
    LazyModule,
    batches,
    loader,
    small_config,
    tiny_llama,
    trainer_of,
)
from torch import nn

from lightning_moe import (
    HashRouter,
    LowRankInit,
    MoEModule,
    MoEUpcycleCallback,
    MoEWarning,
    XMoERouter,
    dequantize,
    expand,
    export_to_hf,
    load_moe,
    moe_layers,
    quantize_frozen,
    save_moe,
    train_only,
    upcycle,
)
from lightning_moe.callbacks.neighbours import check_quantization
from lightning_moe.cli import MoECLI
from lightning_moe.four_bit import Linear4bit
from lightning_moe.quantization import four_bit_weights
from lightning_moe.receipt import num_bytes

# rows of experts are no multiple of the block
SIZES = {"hidden_size": 32, "intermediate_size": 48}
CHANGES = {"first_a", "first_b", "down_a", "down_b"}
MLP = "model.layers.0.mlp"


def llama(**changes):
    return tiny_llama(**{**SIZES, **changes})


def qlora_config(**changes):
    return small_config(**{"init": LowRankInit(4), **changes})


def upcycled(model=None, **changes):
    model = llama() if model is None else model
    upcycle(model, qlora_config(**changes))
    return model.train()


def quantized(model=None, **changes):
    model = upcycled(model, **changes)
    quantize_frozen(model)
    return model


def logits(model):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(**batches(1)[0]).logits


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(tensor.equal(other[key]) for key, tensor in one.items())


# --- what goes into 4 bit ---


def test_frozen_experts_and_linear_layers_go_into_4_bit_and_nothing_else():
    model = upcycled()
    before = state(model)
    done = quantize_frozen(model)
    experts = [f"model.layers.{n}.mlp.experts.{name}" for n in (0, 1) for name in ("gate_up_proj", "down_proj")]
    linears = [f"model.layers.{n}.self_attn.{key}_proj.weight" for n in (0, 1) for key in "qkvo"]
    assert sorted(done.experts) == sorted(experts)
    assert sorted(done.linears) == sorted(linears)
    assert sorted(four_bit_weights(model)) == sorted(experts + linears)
    after = state(model)
    kept = before.keys() - set(experts + linears)
    assert kept == {name for name in after if not name.endswith((".packed", ".absmax"))}
    assert all(after[name].equal(before[name]) for name in kept)
    assert {name.rpartition(".")[2] for name in trainable(model)} == CHANGES | {"gate"}
    assert done.trainable_parameters[1] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_memory_is_as_computed():
    model = upcycled()
    done = quantize_frozen(model)
    num_weights = 2 * (3 * 32 * 48 + 4 * 32 * 32)
    assert done.num_weights == num_weights
    # 32 bits to 4 and a float32 for each 64: of all these the number of weights is a multiple
    assert done.memory[0] - done.memory[1] == num_weights * (32 - 4.5) / 8
    assert done.memory[1] == num_bytes(model)
    told = str(done)
    assert "at 4.5 bits" in told
    assert "4 tensors of experts, 8 linear layers" in told


def test_it_says_what_it_kept_and_why():
    done = quantize_frozen(upcycled(num_shared_experts=1), train=["router"], skip=["*.o_proj"])
    assert {name: done.kept[name] for name in done.kept if "layers.1" not in name} == {
        "model.embed_tokens.weight": "of Embedding",
        "lm_head.weight": "the output head",
        "model.layers.0.self_attn.o_proj.weight": "skipped",
        f"{MLP}.router.gate": "it trains",
        **{f"{MLP}.experts.{name}": "of LowRankExperts" for name in CHANGES},
    }
    assert f"{MLP}.shared_experts.down_proj" in done.experts
    assert done.to_dict()["kept"] == done.kept


def test_a_router_is_never_quantised_not_even_one_that_is_frozen_and_has_linear_layers():
    model = upcycled(init=None)
    layer = next(iter(moe_layers(model).values()))
    layer.router.projection = nn.Linear(32, 32)
    done = quantize_frozen(model, train=["experts"])
    assert not any(".router." in name for name in four_bit_weights(model))
    assert done.kept[f"{MLP}.router.gate"] == done.kept[f"{MLP}.router.projection.weight"] == "the router"
    assert trainable(model) == {
        f"model.layers.{n}.mlp.experts.{key}_proj" for n in (0, 1) for key in ("gate_up", "down")
    }


def test_routers_with_several_parameters_keep_them():
    model = upcycled()
    for layer in moe_layers(model).values():
        layer.router = XMoERouter(32, 5)
    quantize_frozen(model)
    learned = {name for name, _ in model.named_parameters() if ".router." in name}
    assert len(learned) > 2
    assert learned <= trainable(model)


def test_tied_weights_stay_as_they_are():
    model = upcycled(llama(tie_word_embeddings=True))
    first, second = (block.self_attn for block in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    done = quantize_frozen(model)
    assert done.kept["model.layers.0.self_attn.q_proj.weight"] == "tied to another layer"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(done.linears) == 6


def test_a_layer_used_twice_is_quantised_once():
    model = upcycled()
    first, second = (block.self_attn for block in model.model.layers)
    second.q_proj = first.q_proj
    done = quantize_frozen(model)
    assert len(done.linears) == 7
    assert second.q_proj is first.q_proj
    assert isinstance(second.q_proj, Linear4bit)


def test_what_was_frozen_already_goes_into_4_bit_without_parts():
    model = upcycled()
    model.model.layers[0].self_attn.q_proj.requires_grad_(False)
    done = quantize_frozen(model, train=None, quant_type="fp4", block_size=32)
    assert done.linears == ("model.layers.0.self_attn.q_proj.weight",)
    assert len(done.experts) == 4
    assert "model.norm.weight" in trainable(model)
    assert {(w.quant_type, w.block_size) for w in four_bit_weights(model).values()} == {("fp4", 32)}
    assert "at 5 bits" in str(done)


def test_a_model_on_the_meta_device_is_planned():
    with torch.device("meta"):
        model = upcycled()
        before = num_bytes(model)
        done = quantize_frozen(model)
    assert done.memory[0] == before
    assert done.memory[1] == num_bytes(quantized())


def test_it_computes_what_the_rounded_weights_do():
    model = quantized()
    for layer in moe_layers(model).values():
        nn.init.normal_(layer.experts.first_b)
        nn.init.normal_(layer.experts.down_b)
    plain = copy.deepcopy(model)
    dequantize(plain)
    assert not four_bit_weights(plain)
    assert trainable(plain) == trainable(model)
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    gradients = []
    for one in (model, plain):
        loss = one(**batches(1)[0]).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == trainable(model)
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


def test_4_bits_are_close_to_the_weights_they_came_from():
    start, rounded = (logits(make(llama(initializer_range=0.05))) for make in (upcycled, quantized))
    # a weight is off by 9 %, and the residual stream of so small a model consists of a few of them
    assert 0.001 < (start - rounded).norm() / start.norm() < 0.2


# --- what is refused ---


def on_parts(train):
    return functools.partial(quantize_frozen, train=train)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (llama, quantize_frozen, r"LlamaForCausalLM has no MoE layer of ours\. Call upcycle"),
        (quantized, quantize_frozen, r"is in 4 bit already; dequantize\(model\) takes it back"),
        (upcycled, on_parts(["experts"]), r"low-rank experts, which share one frozen FFN; .* is \"low_rank\""),
        (upcycled, on_parts(["shared_experts"]), r"no such parameters, so nothing would train\..*LowRankInit"),
        (upcycled, functools.partial(quantize_frozen, quant_type="int4"), r"quant_type='int4': wanted one of 'nf4'"),
        (upcycled, functools.partial(quantize_frozen, block_size=100), r"block_size=100: wanted one of 32, 64"),
        (upcycled, functools.partial(quantize_frozen, skip=["*score*"]), r"skip: '\*score\*' matches no parameter"),
        (upcycled, functools.partial(quantize_frozen, skip=["*"]), r"nothing to quantise.*Is skip too wide"),
        (lambda: upcycled().double(), quantize_frozen, r"is torch\.float64, and bitsandbytes takes float32, bfloat16"),
        (lambda: upcycled(init=None), on_parts(None), r"nothing to quantise \(.*: it trains\)\. Freeze it"),
        (upcycled, lambda model: train_only(model, ["adapters"]), r"nothing would train"),
    ],
)
def test_it_is_refused_in_words_and_nothing_is_changed(make, change, message):
    model = make()
    before, trained = state(model), trainable(model)
    with pytest.raises(ValueError, match=message):
        change(model)
    assert same(state(model), before)
    assert trainable(model) == trained


def test_nothing_trains_where_nothing_is_to_train():
    model = upcycled()
    assert quantize_frozen(model, train=()).trainable_parameters[1] == 0


def test_a_router_without_parameters_and_frozen_experts_would_not_train():
    model = llama()
    upcycle(model, small_config(init=None))
    for layer in moe_layers(model).values():
        layer.router = HashRouter(32, 5)
    with pytest.raises(ValueError, match=r"nothing would train"):
        quantize_frozen(model)


def test_what_comes_after_is_refused_in_words(tmp_path):
    model = quantized(layers=[0])
    with pytest.raises(TypeError, match=r"the weight is quantised \(4 bit\).*upcycle it, and quantise after that"):
        upcycle(model, small_config(layers="*"))
    with pytest.raises(ValueError, match=r"its experts are in 4 bit\. Expand first"):
        expand(quantized(init=None), 10)
    model = quantized()
    with pytest.raises(ValueError, match=r"in 4 bit.*Call dequantize\(model\) first"):
        export_to_hf(model, tmp_path / "native")
    dequantize(model)
    assert export_to_hf(model, tmp_path / "native").class_name == "MixtralForCausalLM"


# --- training ---


def qlora_module(model=None, optimizer=torch.optim.AdamW):
    return MoEModule(llama() if model is None else model, optimizer=functools.partial(optimizer, lr=1e-2))


def fit(module, folder, config=None, callbacks=(), ckpt_path=None, quantize="nf4", count=4, **options):
    callback = MoEUpcycleCallback(config or qlora_config(), quantize=quantize)
    trainer = trainer_of(folder, [callback, *callbacks], **options)
    trainer.fit(module, loader(batches(count)), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("make", [qlora_module, ForeignModule, LazyModule])
def test_routers_and_low_rank_experts_move_and_the_4_bits_do_not(make, tmp_path):
    module = make(**SIZES) if make is ForeignModule else make()
    callback = MoEUpcycleCallback(qlora_config(), quantize="nf4")
    start = copy.deepcopy(module)
    if make is LazyModule:
        start.configure_model()
    upcycle(start, qlora_config())
    quantize_frozen(start)
    trainer = trainer_of(tmp_path, [callback])
    trainer.fit(module, loader(batches(4)))
    before, after = state(start), state(module)
    assert before.keys() == after.keys()
    moved = {name for name in after if not after[name].equal(before[name])}
    assert moved == trainable(module)
    assert {name.rpartition(".")[2] for name in moved} == CHANGES | {"gate"}
    assert callback.quantization.quant_type == "nf4"


def test_an_optimizer_made_before_lets_go_of_what_is_frozen(tmp_path):
    module = EagerModule(**SIZES)
    trainer = fit(module, tmp_path)
    groups = trainer.optimizers[0].param_groups
    names = {id(p): name for name, p in module.named_parameters()}
    held = [[names[id(p)].rpartition(".")[2] for p in group["params"]] for group in groups]
    assert held == [["first_a", "first_b", "gate"] * 2, ["down_a", "down_b"] * 2, []]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.2]


def test_a_resumed_run_ends_where_one_without_a_stop_does(tmp_path):
    stopped = qlora_module()
    trainer = fit(stopped, tmp_path)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed, straight = qlora_module(), qlora_module()
    fit(resumed, tmp_path, ckpt_path=tmp_path / "run.ckpt", max_epochs=2)
    fit(straight, tmp_path, max_epochs=2)
    assert same(state(resumed), state(straight))
    assert not same(state(resumed), state(stopped))


def test_a_second_fit_and_a_test_leave_the_4_bits(tmp_path):
    module = qlora_module()
    fit(module, tmp_path)
    before = {name: tensor for name, tensor in state(module).items() if name.endswith("packed")}
    fit(module, tmp_path)
    trainer_of(tmp_path, [MoEUpcycleCallback(qlora_config(), quantize="nf4")]).test(module, loader(batches(1)))
    assert all(state(module)[name].equal(tensor) for name, tensor in before.items())
    with pytest.warns(MoEWarning, match=r"quantize='fp4' has no effect: the model is in nf4 already"):
        fit(module, tmp_path, quantize="fp4")


def test_a_dense_module_is_tested_from_its_checkpoint(tmp_path):
    module = qlora_module()
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    found = trainer_of(tmp_path, [MoEUpcycleCallback(qlora_config(), quantize="nf4")]).test(
        other := qlora_module(), loader(batches(1)), ckpt_path=tmp_path / "run.ckpt"
    )
    assert same(state(other), state(module))
    assert found[0]["test_loss"] > 0


def test_experts_that_are_frozen_copies_are_warned_of(tmp_path):
    with pytest.warns(MoEWarning, match=r"are copies and frozen.*LowRankInit"):
        fit(qlora_module(), tmp_path, small_config())


def test_bfloat16_training_leaves_the_scales_exact(tmp_path):
    module = qlora_module()
    trainer = fit(module, tmp_path, precision="bf16-true")
    start = quantized()
    assert trainer.precision == "bf16-true"
    after = state(module.model)
    for name, tensor in state(start).items():
        if name.endswith((".packed", ".absmax")):
            assert after[name].equal(tensor), name


# --- what must not stand beside it ---


def test_lightnings_plugin_is_refused_for_it_passes_over_the_experts(tmp_path):
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())])
    # on a CPU Lightning itself refuses it, when the Trainer is made
    trainer.strategy._precision_plugin = BitsandbytesPrecision("nf4", dtype=torch.bfloat16)
    with pytest.raises(MisconfigurationException, match=r"passes over the experts.*quantize='nf4'"):
        trainer.fit(qlora_module(), loader(batches(1)))


def test_averaging_weights_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"EMAWeightAveraging averages all parameters.*quantize='nf4'"):
        fit(qlora_module(), tmp_path, callbacks=[EMAWeightAveraging()])


def test_deepspeed_is_refused(tmp_path):
    class DeepSpeedStrategy:
        precision_plugin = None

    trainer = trainer_of(tmp_path)
    trainer._accelerator_connector.strategy = DeepSpeedStrategy()
    check_quantization(trainer, None)
    with pytest.raises(MisconfigurationException, match=r"DeepSpeed casts and flattens"):
        check_quantization(trainer, "nf4")


def unchecked(function):
    """Without the type checker that the tests put around it."""
    return getattr(function, "__wrapped__", function)


def test_an_unknown_type_is_refused_at_once():
    with pytest.raises(ValueError, match=r"quantize='int8': wanted one of 'nf4', 'fp4'"):
        unchecked(MoEUpcycleCallback.__init__)(object.__new__(MoEUpcycleCallback), qlora_config(), quantize="int8")
    with pytest.raises(ValueError, match=r"train='lora': wanted one of 'router', 'low_rank', 'shared_experts'"):
        unchecked(quantize_frozen)(upcycled(), train=["lora"])


# --- saving ---


def trained(folder, **options):
    module = qlora_module()
    trainer = fit(module, folder, **options)
    trainer.save_checkpoint(folder / "run.ckpt")
    return module


def test_a_saved_model_loads_to_equal_logits(tmp_path):
    module = trained(tmp_path)
    save_moe(module.model, tmp_path / "moe")
    loaded = load_moe(tmp_path / "moe")
    assert same(state(loaded), state(module.model))
    assert logits(loaded).equal(logits(module.model))
    assert trainable(loaded) == trainable(module.model)
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    again = MoEModule.load_from_checkpoint(tmp_path / "run.ckpt", model=llama(), weights_only=True)
    assert checkpoint["lightning_moe"]["format"] == 2
    assert logits(again.model).equal(logits(module.model))
    assert trainable(again) == trainable(module)


def test_a_module_made_of_a_saved_model_goes_on_training_the_same_parts(tmp_path):
    save_moe(quantized(), tmp_path / "moe")
    module = qlora_module(str(tmp_path / "moe"))
    before = state(module)
    fit(module, tmp_path, quantize=None)
    after = state(module)
    assert {name for name in after if not after[name].equal(before[name])} == trainable(module)
    assert {name.rpartition(".")[2] for name in trainable(module)} == CHANGES | {"gate"}


def test_a_recipe_without_4_bit_weights_stays_readable_by_older_versions(tmp_path):
    trained(tmp_path, quantize=None)
    recipe = torch.load(tmp_path / "run.ckpt", weights_only=True)["lightning_moe"]
    assert recipe["format"] == 1
    assert "four_bit" not in recipe


def test_another_configuration_fails_in_one_line(tmp_path):
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: the checkpoint holds this weight in 4 bit, and this"):
        fit(qlora_module(), tmp_path, quantize=None, ckpt_path=tmp_path / "run.ckpt")
    trained(tmp_path, quantize=None)
    with pytest.raises(ValueError, match=r"q_proj\.weight: the checkpoint holds this weight in full precision, and"):
        fit(qlora_module(), tmp_path, ckpt_path=tmp_path / "run.ckpt")
    model = llama()
    upcycle(model, small_config(init=None))
    full = model.state_dict()
    quantize_frozen(model, train=["router"], skip=["*self_attn*"])
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: the checkpoint holds this weight in full precision"):
        model.load_state_dict(full)


# --- 8-bit optimizers ---

ADAMW_8BIT = {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 1e-2}}
# the gate has 4096 numbers, from which on bitsandbytes takes 8 bits
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}


def wide_module(optimizer=bitsandbytes.optim.AdamW8bit):
    return qlora_module(llama(**WIDE), optimizer)


def wide_config():
    return small_config(num_experts=64)


def optimizer_states(trainer, module):
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)]: state for optimizer in trainer.optimizers for p, state in optimizer.state.items()}


def test_8_bit_states_are_of_the_experts_and_not_of_the_router(tmp_path):
    module = wide_module()
    states = optimizer_states(fit(module, tmp_path, wide_config(), quantize=None), module)
    dtypes = {name.partition("mlp.")[2]: state["state1"].dtype for name, state in states.items() if "mlp." in name}
    assert dtypes == {
        "router.gate": torch.float32,
        "experts.gate_up_proj": torch.uint8,
        "experts.down_proj": torch.uint8,
    }
    # what bitsandbytes does by itself, and still does to another optimizer
    gate = nn.Parameter(torch.randn(64, 64))
    gate.grad = torch.randn(64, 64)
    alone = bitsandbytes.optim.AdamW8bit([gate])
    alone.step()
    assert alone.state[gate]["state1"].dtype == torch.uint8


def test_8_bit_training_resumes_bit_for_bit(tmp_path):
    fit(wide_module(), tmp_path, wide_config(), quantize=None).save_checkpoint(tmp_path / "run.ckpt")
    resumed, straight = wide_module(), wide_module()
    ends = [
        fit(resumed, tmp_path, wide_config(), quantize=None, max_epochs=2, ckpt_path=tmp_path / "run.ckpt"),
        fit(straight, tmp_path, wide_config(), quantize=None, max_epochs=2),
    ]
    assert same(state(resumed), state(straight))
    one, other = (optimizer_states(trainer, m) for trainer, m in zip(ends, (resumed, straight), strict=True))
    for name in one:
        assert one[name]["state1"].dtype == other[name]["state1"].dtype
        assert one[name]["state1"].equal(other[name]["state1"])


def test_8_bit_steps_are_those_of_adamw_but_for_their_rounding(tmp_path):
    eight, full = wide_module(), wide_module(torch.optim.AdamW)
    start = wide_module()
    upcycle(start, wide_config())
    for module in (eight, full):
        fit(module, tmp_path, wide_config(), quantize=None, count=3)
    begin, ends = state(start), [state(eight), state(full)]
    for name, tensor in begin.items():
        moved = (ends[1][name] - tensor).norm()
        # 8 bits keep about two digits of the largest moment of a block, and of small ones less; 1 is another direction
        assert (ends[0][name] - ends[1][name]).norm() <= 0.25 * moved, name
        assert moved > 0


def test_the_command_line_takes_both(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    upcycling = {"num_experts": 4, "init": {"class_path": "LowRankInit", "init_args": {"rank": 4}}}
    callback = {"class_path": "MoEUpcycleCallback", "init_args": {"config": upcycling, "quantize": "nf4"}}
    callback["init_args"]["log_utilization"] = False
    trainer = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "logger": False, "enable_progress_bar": False}
    trainer |= {"default_root_dir": str(tmp_path), "callbacks": [callback], "enable_model_summary": False}
    module = {"class_path": "test_quantization.Fed", "init_args": {"model": str(tmp_path / "dense")}}
    module["init_args"]["optimizer"] = ADAMW_8BIT
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": module, "trainer": trainer}))
    done = MoECLI(args=["fit", "--config", str(tmp_path / "run.yaml")])
    assert type(done.trainer.optimizers[0]) is bitsandbytes.optim.AdamW8bit
    assert done.trainer.optimizers[0].param_groups[0]["lr"] == 1e-2
    assert len(four_bit_weights(done.model)) == 12
    assert {name.rpartition(".")[2] for name in trainable(done.model)} == CHANGES | {"gate"}


class Fed(MoEModule):
    """Brings its own data."""

    def train_dataloader(self):
        return loader(batches(2))


def test_the_page_on_memory_runs(capsys):
    page = (Path(__file__).parent.parent / "docs" / "memory.md").read_text()
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        exec(code, names)
        told = capsys.readouterr().out.splitlines()
        shown = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# ")]
        assert set(shown) - {"  ..."} <= set(told)
    assert four_bit_weights(names["model"])
    assert names["module"].configure_optimizers().defaults["lr"] == 1e-4
    whole, part = (yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    assert whole["trainer"]["callbacks"][0]["init_args"]["quantize"] == "nf4"
    assert part["model"]["init_args"]["optimizer"] == ADAMW_8BIT | {"init_args": {"lr": "1e-4"}}
