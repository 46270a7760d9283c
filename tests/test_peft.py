"""Adapters of peft where a user brings them: on the attention beside MoE layers, and on the experts."""

import copy

import pytest
import reference
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_fixtures import batches, loader, small_config, trainer_of
from peft import LoraConfig, get_peft_model
from test_experts import FLOAT32, experts_of, regular
from test_quantization import CHANGES, fit, llama, logits, qlora_config, qlora_module, quantized, same, state, trainable
from torch import nn

from lightning_moe import (
    CopyInit,
    MoELayer,
    MoEUpcycleCallback,
    MoEWarning,
    TopKRouter,
    dequantize,
    load_moe,
    moe_layers,
    quantize_frozen,
    save_moe,
    train_only,
    upcycle,
)
from lightning_moe.four_bit import Linear4bit
from lightning_moe.quantization import four_bit_weights

LORA = {"lora_A", "lora_B"}


def adapted(model, targets=("q_proj", "v_proj"), **options):
    """With adapters that change something already."""
    model = get_peft_model(model, LoraConfig(r=4, target_modules=list(targets), **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def kinds(names):
    """What of a parameter's name says which it is."""
    return {next((kind for kind in LORA if kind in name), name.rpartition(".")[2]) for name in names}


def moved(before, after):
    return {name for name in after if name in before and not after[name].equal(before[name])}


# --- adapters on the attention ---


def test_adapters_that_were_there_before_train_beside_routers_and_low_rank_experts(tmp_path):
    module = qlora_module(adapted(llama()))
    start = copy.deepcopy(module)
    upcycle(start, qlora_config())
    quantize_frozen(start)
    fit(module, tmp_path)
    assert kinds(trainable(module)) == LORA | CHANGES | {"gate"}
    assert moved(state(start), state(module)) == trainable(module)
    q_proj = module.model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(q_proj.base_layer, Linear4bit)
    assert type(q_proj.lora_A["default"]) is nn.Linear
    assert len(four_bit_weights(module)) == 12


def test_such_a_run_resumes(tmp_path):
    stopped, resumed = (qlora_module(adapted(llama())) for _ in range(2))
    straight = copy.deepcopy(stopped)
    fit(stopped, tmp_path).save_checkpoint(tmp_path / "run.ckpt")
    assert not same(state(resumed), state(stopped))
    fit(resumed, tmp_path, max_epochs=2, ckpt_path=tmp_path / "run.ckpt")
    fit(straight, tmp_path, max_epochs=2)
    assert same(state(resumed), state(straight))


def test_peft_freezes_the_moe_layers_and_train_only_lets_them_train(tmp_path):
    model = llama()
    upcycle(model, qlora_config())
    wrapped = adapted(model)
    assert kinds(trainable(wrapped)) == LORA
    with pytest.warns(MoEWarning, match=r"Nothing of the MoE layers trains.*get_peft_model.*train_only\(model\)"):
        fit(qlora_module(copy.deepcopy(wrapped)), tmp_path, quantize=None)
    train_only(wrapped)
    assert kinds(trainable(wrapped)) == LORA | CHANGES | {"gate"}
    fit(qlora_module(wrapped), tmp_path, quantize=None)


def test_adapters_on_linear_layers_in_4_bit_compute_what_they_do_on_the_rounded_weights():
    model = adapted(quantized())
    train_only(model)
    plain = copy.deepcopy(model)
    dequantize(plain)
    gradients = []
    for one in (model, plain):
        one(**batches(1)[0]).loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert kinds(gradients[0]) == LORA | CHANGES | {"gate"}
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match=r"4 bit takes no adapter\. Call dequantize\(model\) before merging"):
        model.merge_and_unload()
    merged = plain.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


def test_adapters_on_an_ffn_are_refused_in_words():
    with pytest.raises(TypeError, match=r"mlp\.gate_proj: an adapter of peft stands here.*Merge it first"):
        upcycle(adapted(llama(), ["gate_proj"]), small_config())


def test_a_model_with_adapters_is_saved_and_loaded_into_one_with_adapters(tmp_path):
    model = llama()
    upcycle(model, qlora_config())
    wrapped = adapted(model)
    quantize_frozen(wrapped)
    save_moe(wrapped, tmp_path / "moe")
    loaded = load_moe(tmp_path / "moe", model=adapted(llama()))
    assert same(state(loaded), state(wrapped))
    assert logits(loaded).equal(logits(wrapped))
    assert trainable(loaded) == trainable(wrapped)


def test_a_copy_of_the_router_by_peft_is_refused_in_words(tmp_path):
    model = llama()
    upcycle(model, qlora_config())
    wrapped = adapted(model, modules_to_save=["router"])
    with pytest.raises(MisconfigurationException, match=r"ModulesToSaveWrapper stands in its place\..*train_only"):
        fit(qlora_module(wrapped), tmp_path, quantize=None)


# --- adapters on the experts, by target_parameters ---

ON_EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


class Holder(nn.Module):
    """peft looks for what it adapts below the model."""

    def __init__(self):
        super().__init__()
        self.layer = MoELayer(TopKRouter(8, 5), experts_of(5, 8, 16))

    def forward(self, x):
        return self.layer(x)


def test_adapters_on_the_experts_change_each_by_a_matrix_of_low_rank():
    model = adapted(Holder(), (), **ON_EXPERTS, lora_alpha=8)
    layer = model.base_model.model.layer
    truth = copy.deepcopy(layer.plain_experts)
    wrapper = layer.experts
    for _ in range(2):
        # peft lays the experts' B out with the experts last
        a = wrapper.lora_A["default"].weight.detach().view(5, 4, -1)
        b = wrapper.lora_B["default"].weight.detach().view(-1, 4, 5)
        for e in range(5):
            getattr(truth, wrapper.parameter_name).data[e] += 8 / 4 * b[:, :, e] @ a[e]
        wrapper = wrapper.base_layer
    routing, x = regular(7, 5, 2), torch.randn(7, 8)
    slow = reference.moe(x, routing.token_ids, routing.expert_ids, routing.weights, reference.unstack(truth))
    torch.testing.assert_close(layer.experts(x, routing), slow, **FLOAT32)
    with pytest.raises(TypeError, match=r"an adapter of peft stands on the experts.*Merge it first"):
        layer.expert_weights()
    assert layer.parameters_per_expert == 3 * 8 * 16
    merged = model.merge_and_unload().layer
    assert not hasattr(merged.experts, "base_layer")
    torch.testing.assert_close(merged.experts(x, routing), slow, **FLOAT32)


def test_adapters_on_the_experts_train_under_the_callback_and_resume(tmp_path):
    def module():
        model = llama()
        upcycle(model, small_config(init=CopyInit()))
        wrapped = adapted(model, (), **ON_EXPERTS)
        train_only(wrapped)
        return qlora_module(wrapped)

    first = module()
    before = state(first)
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())])
    trainer.fit(first, loader(batches(4)))
    assert kinds(trainable(first)) == LORA | {"gate"}
    assert moved(before, state(first)) == trainable(first)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    second = module()
    trainer_of(tmp_path, [MoEUpcycleCallback(small_config())]).test(
        second, loader(batches(1)), ckpt_path=tmp_path / "run.ckpt"
    )
    assert same(state(second), state(first))


def test_experts_with_adapters_stay_in_full_precision():
    model = llama()
    upcycle(model, small_config())
    wrapped = adapted(model, (), **ON_EXPERTS)
    with pytest.raises(ValueError, match=r"an adapter of peft stands on the experts.*LowRankInit\(rank=8\)"):
        quantize_frozen(wrapped)
    assert moe_layers(wrapped)
