"""The planner: its memory is that of a real process, its counts are those of the model, and it refuses in one line."""

import importlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning_fixtures import tiny_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, MixtralConfig, MixtralForCausalLM

from lightning_moe import (
    LowRankInit,
    TopKRouter,
    TopPRouter,
    UpcycleConfig,
    moe_layers,
    plan_training,
    save_moe,
    upcycle,
)
from lightning_moe.cli import main
from lightning_moe.step_trace import trace_step

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 101, "bos_token_id": None, "eos_token_id": None}
plan_float32 = partial(plan_training, precision="32-true", sequence_length=16)


def llama(experts=4, init=None, **sizes):
    model = tiny_llama(**{**SIZES, **sizes})
    if experts:
        upcycle(model, UpcycleConfig(num_experts=experts, router=partial(TopKRouter, top_k=2), init=init))
    return model


def memory(strategy, model, **settings):
    (row,) = (row for row in plan_float32(model, **settings).memory if row.strategy == strategy)
    return row


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
        yield importlib.import_module("memory")


# --- memory ---


@pytest.mark.slow
def test_the_plan_is_within_a_tenth_of_the_measured_peak(benchmark):
    """Of a process that trains: all in float32, longer sequences with recomputation, low rank on a frozen model."""
    peaks = dict(zip(benchmark.SMALL, benchmark.measured_apart(*benchmark.SMALL.values()), strict=True))
    plans = {name: benchmark.planned(case)["total"] for name, case in benchmark.SMALL.items()}
    assert plans == {name: pytest.approx(peak, rel=0.1) for name, peak in peaks.items()}


def test_what_stays_is_counted_by_hand():
    model = llama()
    number = sum(p.numel() for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    row = memory("single GPU", model)
    assert (row.weights, row.optimizer) == (4 * number + buffers, 8 * number)
    assert memory("single GPU", model, optimizer="sgd").optimizer == 4 * number
    half = memory("single GPU", model, precision="bf16-true")
    assert (half.weights, half.optimizer) == (2 * number + buffers, 4 * number)
    last = trace_step(model, 1, 16)[-1]
    assert last.gradients == sum(4 * p.numel() for p in model.parameters())


def test_states_of_eight_bits_have_a_maximum_for_each_256():
    model = llama(experts=0, vocab_size=256)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)  # 8192 numbers: 32 maxima
    model.model.norm.requires_grad_(True)  # 32, too few: float32
    assert memory("single GPU", model, optimizer="adamw-8bit").optimizer == 2 * (8192 + 4 * 32) + 2 * 4 * 32


def test_the_logits_are_there_three_times():
    """At the fullest moment."""
    model = llama(experts=0, num_hidden_layers=1)
    B, S, V = 2, 16, 101
    fullest = max(moment.logits for moment in trace_step(model, B, S))
    # the logits themselves, their log-softmax and its gradient; no fourth copy
    assert fullest == 3 * 4 * B * S * V


def test_frozen_weights_take_half_a_byte_and_a_maximum_for_each_64():
    model = llama(init=LowRankInit(rank=4))
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen == 3 * 3 * 32 * 48
    whole, packed = (memory("single GPU", model, quantize_frozen=wanted) for wanted in (False, True))
    assert whole.weights - packed.weights == 4 * frozen - (frozen / 2 + frozen / 64 * 4)
    assert (whole.gathered, packed.gathered) == (0, 2 * 2 * 48 * 32)
    assert packed.gradients == whole.gradients


def test_copies_of_autocast_end_with_recomputation():
    model = llama()
    kept, again = (
        memory("single GPU", model, precision="bf16-mixed", activation_checkpointing=wanted) for wanted in (False, True)
    )
    experts = sum(p.numel() for layer in moe_layers(model).values() for p in layer.experts.parameters())
    assert kept.weight_copies >= 2 * experts > again.weight_copies


def test_a_longer_sequence_takes_more_and_recomputation_less():
    model = llama()
    short, long = (memory("single GPU", model, sequence_length=length) for length in (128, 256))
    assert 1.9 < (long.activations + long.logits) / (short.activations + short.logits) < 2.1
    recomputed = memory("single GPU", model, sequence_length=256, activation_checkpointing=True)
    assert recomputed.total < long.total
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_strategies_divide_what_they_say():
    model, N = llama(), 4
    rows = {row.strategy: row for row in plan_float32(model, gpus=N, expert_parallel_size=2).memory}
    number, buffers = sum(p.numel() for p in model.parameters()), sum(b.nbytes for b in model.buffers())
    divided = {
        "single GPU": (1, 1),
        "ddp": (1, 1),
        "moe_ddp": (1, 1),
        "fsdp, fsdp2": (N, N),
        "fsdp2, experts over 2": (N, N),
    }
    divided |= {"ZeRO 1": (1, N), "ZeRO 2": (1, N), "ZeRO 3": (N, N)}
    assert {name: (row.weights - buffers, row.optimizer) for name, row in rows.items()} == {
        name: (4 * number / weights, 8 * number / states) for name, (weights, states) in divided.items()
    }
    assert rows["ddp"].gathered == 4 * number
    assert rows["moe_ddp"].gathered == 0
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    experts = sum(p.numel() for p in model.model.layers[0].mlp.experts.parameters())
    around = number - 3 * block
    assert rows["fsdp, fsdp2"].gathered == 4 * (around + 3 * block)
    # half of the experts' weights, twice, and of their gradients; rows of 16 tokens at 2 experts, sent and received
    assert rows["fsdp2, experts over 2"].gathered == 4 * (around + 3 * block - 1.5 * experts) + 2 * 4 * 16 * 2 * 32


def test_zero_in_half_precision_has_float32_weights():
    model = llama()
    number = sum(p.numel() for p in model.parameters())
    for precision in ("bf16-mixed", "bf16-true"):
        row = memory("ZeRO 2", model, gpus=2, precision=precision)
        assert row.weights - sum(b.nbytes for b in model.buffers()) == 2 * number
        assert row.weight_copies <= 4 * 3 * 4 * 32  # routers compute in float32; no autocast
        assert row.optimizer == (4 + 8) * number / 2


# --- counts ---


def test_parameters_and_operations_are_the_models():
    model = llama(tie_word_embeddings=True)
    footprint = plan_float32(model)
    experts = 3 * 3 * 32 * 48
    assert footprint.parameters == sum(p.numel() for p in model.parameters())
    assert footprint.parameters - footprint.active_parameters == 2 * experts
    norms_and_all = footprint.active_parameters  # tied: the embedding is multiplied as the output layer
    assert footprint.forward_flops == 2 * norms_and_all + 4 * 3 * 32 * 16
    assert footprint.training_flops == 3 * footprint.forward_flops


def test_a_native_model_is_planned_as_it_is():
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=1, **SIZES))
    footprint = plan_float32(model, gpus=2, expert_parallel_size=2)
    assert footprint.parameters - footprint.active_parameters == 3 * 3 * 3 * 32 * 48
    assert len(footprint.memory) == 8
    assert not any(module._forward_hooks for module in model.modules())


def test_experts_with_biases_in_half_precision():
    """They are computed in a loop, which asks how many rows each has."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=101, bos_token_id=1, eos_token_id=1))
    upcycle(model, UpcycleConfig(num_experts=4))
    both = [plan_training(model, precision=p, sequence_length=64).memory[0] for p in ("32-true", "bf16-true")]
    assert 1.4 < both[0].activations / both[1].activations < 2  # indices stay as they are


def test_what_it_plans_is_left_alone():
    model = llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    plan_float32(model, gpus=2, activation_checkpointing=True)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert model.config.use_cache


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"memory": 0}, "memory=0: wanted a number > 0"),
        ({"gpus": 0}, "gpus=0: wanted a whole number"),
        ({"precision": "16"}, "precision='16': wanted one of"),
        ({"optimizer": "adam"}, "optimizer='adam': wanted one of"),
        ({"gpus": 3, "expert_parallel_size": 2}, "expert_parallel_size=2 with gpus=3"),
        ({"gpus": 3, "expert_parallel_size": 3}, "has 4 experts, which 3 devices"),
        ({"quantize_frozen": True}, "no frozen matrix"),
    ],
)
def test_refusals(settings, words):
    call = getattr(plan_training, "__wrapped__", plan_training)
    with pytest.raises(Exception, match=words) as caught:
        call(llama(), **{"sequence_length": 8, **settings})
    assert type(caught.value).__name__ in ("ValueError", "JaxtypingTypeError", "BeartypeCallHintParamViolation")


def test_a_router_whose_number_of_experts_varies_is_refused():
    model = llama(experts=0)
    upcycle(model, UpcycleConfig(num_experts=4, router=TopPRouter))
    with pytest.raises(ValueError, match="its memory depends on the numbers that it computes"):
        plan_float32(model)


def test_what_is_no_language_model_is_refused():
    with pytest.raises(TypeError, match="Linear: wanted a language model of transformers"):
        plan_float32(nn.Linear(2, 2))


# --- the verb ---


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    LlamaConfig(architectures=["LlamaForCausalLM"], **SIZES).save_pretrained(path)
    return path


def test_the_verb_prints_and_writes_what_the_function_says(directory, tmp_path, capsys):
    file = tmp_path / "plan.json"
    options = ["--experts", "4", "--top-k", "2", "--gpus", "2", "--memory", "0.0005", "--sequence-length=16"]
    main(["plan", "--model", str(directory), *options, "--precision", "32-true", "--output", str(file)])
    lines = capsys.readouterr().out.splitlines()
    expected = plan_float32(llama(), gpus=2, memory=0.0005)
    assert json.loads(file.read_text()) == json.loads(json.dumps(expected.to_dict()))
    assert lines == str(expected).splitlines()
    verdicts = [row.total <= 5e5 for row in expected.memory]
    assert (
        [line.endswith("| yes |") for line in lines[6:]]
        == verdicts
        == [row["fits"] for row in expected.to_dict()["memory"]]
    )


def test_the_verb_freezes_what_is_around_the_experts(directory, capsys, tmp_path):
    options = ["--experts", "4", "--init", "LowRankInit", "--init.rank", "4", "--freeze_dense", "true"]
    file = tmp_path / "plan.json"
    main(["plan", "--model", str(directory), *options, "--sequence_length", "16", "--output", str(file)])
    of_one = 4 * (32 + 2 * 48 + 32) + 4 * (48 + 32)  # A of gate and up, B of each, A and B of down; rank 4
    assert json.loads(file.read_text())["trainable_parameters"] == 3 * (4 * of_one + 4 * 32)


def test_the_verb_plans_what_save_moe_wrote_and_reads_no_weights(tmp_path, capsys):
    model = llama()
    save_moe(model, tmp_path / "moe")
    for file in (tmp_path / "moe").glob("*.safetensors"):
        file.unlink()
    main(["plan", "--model", str(tmp_path / "moe"), "--sequence_length", "16", "--precision", "32-true"])
    assert capsys.readouterr().out.strip() == str(plan_float32(model))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--experts", "4", "--top-k", "9"], "top_k=9 with num_experts=4"),
        (["--memory", "-1"], "memory=-1: wanted a number > 0"),
        (["--shared_experts", "1"], "experts: wanted a number"),
        (["--freeze_dense", "true"], "freeze_dense: the model is not upcycled"),
        (["--model", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_the_verb_refuses_in_one_line(options, words, directory, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--model", str(directory), *options])
    assert words in str(ended.value.code)
    assert "\n" not in str(ended.value.code)
