"""Upcycled models as native Hugging Face MoE models: loaded where this package cannot be, the same logits and text."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
import transformers
from lightning_fixtures import tiny_llama, word_tokenizer
from safetensors import safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_moe import (
    CosineRouter,
    GranularInit,
    LossFreeRouter,
    LowRankInit,
    SigmoidRouter,
    TopKRouter,
    UpcycleConfig,
    export_to_hf,
    moe_layers,
    record_routing,
    save_moe,
    upcycle,
)
from lightning_moe.cli import main
from lightning_moe.export_targets import EXPORT_TARGETS
from lightning_moe.saving import CONFIG_FILE

IDS = torch.arange(1, 41).view(2, 20)
E = 4
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 61,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
loss_free = partial(LossFreeRouter, top_k=2)
# name: dense model type, its settings, what to make of it, the class that holds it
ROWS = {
    "llama": ("llama", {}, {}, "MixtralForCausalLM"),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, {}, "MixtralForCausalLM"),
    "llama, rope scaled": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        {"router": partial(TopKRouter, top_k=3, temperature=0.7)},
        "MixtralForCausalLM",
    ),
    "llama, wide heads": ("llama", {"head_dim": 16}, {}, "MixtralForCausalLM"),
    "llama, granular": ("llama", {}, {"init": GranularInit(granularity=2), "num_experts": 8}, "MixtralForCausalLM"),
    "llama, low rank": ("llama", {}, {"init": LowRankInit(rank=2)}, "MixtralForCausalLM"),
    "llama, shared": ("llama", {}, {"num_shared_experts": 1}, "GraniteMoeSharedForCausalLM"),
    "llama, in part": ("llama", {}, {"layers": "1::2"}, "Qwen2MoeForCausalLM"),
    "llama, not normalised, shared, in part": (
        "llama",
        {},
        {"router": partial(TopKRouter, normalize=False), "num_shared_experts": 1, "layers": ":1"},
        "Qwen2MoeForCausalLM",
    ),
    "llama, sigmoid": ("llama", {}, {"router": SigmoidRouter}, "Glm4MoeForCausalLM"),
    "llama, bias, shared": (
        "llama",
        {},
        {"router": partial(loss_free, routed_scaling=2.5), "num_shared_experts": 2},
        "Glm4MoeForCausalLM",
    ),
    "mistral": ("mistral", {"sliding_window": 5}, {}, "MixtralForCausalLM"),
    "phi3": ("phi3", {}, {}, "MixtralForCausalLM"),
    "gemma": ("gemma", {}, {}, "MixtralForCausalLM"),
    "gemma, untied": ("gemma", {"tie_word_embeddings": False}, {}, "MixtralForCausalLM"),
    "qwen2": ("qwen2", {}, {}, "Qwen2MoeForCausalLM"),
    "qwen2, shared, in part": ("qwen2", {}, {"num_shared_experts": 2, "layers": "1::2"}, "Qwen2MoeForCausalLM"),
    "qwen2, bias": ("qwen2", {}, {"router": loss_free}, "Glm4MoeForCausalLM"),
    "qwen3": ("qwen3", {}, {}, "Qwen3MoeForCausalLM"),
    "qwen3, in part": ("qwen3", {}, {"layers": "1::2"}, "Qwen3MoeForCausalLM"),
    "qwen3, not normalised": (
        "qwen3",
        {},
        {"router": partial(TopKRouter, top_k=1, normalize=False)},
        "Qwen3MoeForCausalLM",
    ),
    "qwen3, bias, in part": ("qwen3", {}, {"router": loss_free, "layers": "1:"}, "Glm4MoeForCausalLM"),
    # two things that GLM-4-MoE has not: a window on some blocks, and a bias on all projections of the attention
    "qwen3, bias, window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        {"router": loss_free},
        "Dots1ForCausalLM",
    ),
    "qwen3, bias, attention bias": (
        "qwen3",
        {"attention_bias": True, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"router": partial(loss_free, routed_scaling=2.5), "num_shared_experts": 2, "layers": "1:"},
        "Dots1ForCausalLM",
    ),
    "olmo2": ("olmo2", {}, {}, "FlexOlmoForCausalLM"),
    "granite": ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5}, {}, "GraniteMoeForCausalLM"),
    "granite, shared": ("granite", {}, {"num_shared_experts": 2}, "GraniteMoeSharedForCausalLM"),
}
every_row = pytest.mark.parametrize("name", ROWS)
# what each architecture calls the tensors of one MoE block on disk; N is an expert
PER_EXPERT = {f"mlp.experts.{n}.{part}_proj.weight" for n in range(E) for part in ("gate", "up", "down")}
ON_DISK = {
    "llama": {f"block_sparse_moe.experts.{n}.{part}.weight" for n in range(E) for part in ("w1", "w2", "w3")}
    | {"block_sparse_moe.gate.weight"},
    "qwen2": PER_EXPERT
    | {"mlp.gate.weight", "mlp.shared_expert_gate.weight"}
    | {f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")},
    "qwen3": PER_EXPERT | {"mlp.gate.weight"},
    "olmo2": PER_EXPERT | {"mlp.gate.weight"},
    "llama, sigmoid": PER_EXPERT
    | {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
    | {f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")},
    "qwen3, bias, window": PER_EXPERT
    | {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
    | {f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")},
    "granite": {f"block_sparse_moe.{part}.weight" for part in ("input_linear", "output_linear", "router.layer")},
    "granite, shared": {f"block_sparse_moe.{part}.weight" for part in ("input_linear", "output_linear", "router.layer")}
    | {f"shared_mlp.{part}.weight" for part in ("input_linear", "output_linear")},
}


def dense_model(kind, **settings):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **settings})
    return transformers.AutoModelForCausalLM.from_config(config)


def trained(kind, settings, made):
    """An upcycled model after three steps of training, whose every tensor is a number of its own."""
    model = dense_model(kind, **settings)
    upcycle(model, UpcycleConfig(**{"num_experts": E, **made}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # biases and norms start at 0 and 1, and equal experts could change places unseen
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for layer in moe_layers(model).values():
            if layer.adapts_to_load:
                layer.router.expert_bias.copy_(torch.randn(layer.num_experts, generator=generator) * 0.3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


LOADS = """
import json, sys
# whoever serves the model has no such package
sys.modules["lightning_moe"] = None
import torch
from transformers import AutoModelForCausalLM
found = {}
for name, path in json.loads(sys.argv[1]).items():
    model, told = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(told.values()), (name, told)
    ids = torch.arange(1, 41).view(2, 20)
    text = model.generate(ids[:, :5], max_new_tokens=8, do_sample=False)
    found[name] = (type(model).__name__, model(input_ids=ids).logits.detach(), text)
torch.save(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Of each row: what the model itself computes, what was told, its directory, and what plain transformers loads."""
    root, made = tmp_path_factory.mktemp("exports"), {}
    for number, (name, (kind, settings, upcycled, _)) in enumerate(ROWS.items()):
        model, path = trained(kind, settings, upcycled), root / str(number)
        told = export_to_hf(model, path)
        with torch.no_grad():
            text = model.generate(IDS[:, :5], max_new_tokens=8, do_sample=False)
            made[name] = [model(input_ids=IDS).logits, text, told, path]
    loaded = root / "loaded.pt"
    paths = json.dumps({name: str(path) for name, (_, _, _, path) in made.items()})
    subprocess.run([sys.executable, "-c", LOADS, paths, str(loaded)], check=True)
    return {name: (*made[name], *found) for name, found in torch.load(loaded).items()}


@every_row
def test_plain_transformers_loads_the_same_model(exports, name):
    logits, text, told, _, class_name, their_logits, their_text = exports[name]
    assert class_name == ROWS[name][3] == told.class_name
    assert (their_logits - logits).abs().max() <= 1e-4
    assert logits.abs().max() > 0.5
    assert torch.equal(their_text, text)
    assert told.measured_difference <= 1e-4


def test_every_target_has_a_row():
    classes = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[row.target] for row in EXPORT_TARGETS}
    assert classes == {row[3] for row in ROWS.values()}
    dense = {source for row in EXPORT_TARGETS for source in row.sources if source != row.target}
    assert dense == {row[0] for row in ROWS.values()}


@pytest.mark.parametrize("name", ON_DISK)
def test_tensors_have_the_names_that_engines_read(exports, name):
    with safe_open(exports[name][3] / "model.safetensors", "pt") as file:
        names = set(file.keys())
    block = {key.removeprefix("model.layers.1.") for key in names if key.startswith("model.layers.1.")}
    assert {key for key in block if "moe" in key or "mlp" in key} == ON_DISK[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gate_of_qwens_shared_expert_is_a_half_and_not_at_zero(exports, dtype):
    """llama.cpp computes its sigmoid as silu(x) / x."""
    with safe_open(exports["qwen2, shared, in part"][3] / "model.safetensors", "pt") as file:
        gate = file.get_tensor("model.layers.1.mlp.shared_expert_gate.weight").to(dtype)
    x = torch.randn(200, gate.shape[1], generator=torch.Generator().manual_seed(0)) @ gate.float().T
    as_llama_cpp = torch.nn.functional.silu(x) / x
    assert (as_llama_cpp - 0.5).abs().max() < 1e-6


def test_blocks_that_stay_dense_are_dense_there(exports):
    with safe_open(exports["qwen3, in part"][3] / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert "model.layers.1.mlp.experts.0.up_proj.weight" in names
    config = json.loads((exports["qwen3, in part"][3] / "config.json").read_text())
    assert config["mlp_only_layers"] == [0, 2]
    assert config["norm_topk_prob"] is True


def test_a_target_may_be_named_where_two_hold_the_model(tmp_path):
    model = trained("qwen3", {}, {"router": loss_free})
    assert export_to_hf(model, tmp_path / "first").class_name == "Glm4MoeForCausalLM"
    assert export_to_hf(model, tmp_path / "named", target="dots1").class_name == "Dots1ForCausalLM"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "named")
    # of all its settings the one that llama.cpp knows the sigmoid by
    assert json.loads((tmp_path / "named" / "config.json").read_text())["scoring_func"] == "sigmoid"
    with torch.no_grad():
        assert (loaded(input_ids=IDS).logits - model(input_ids=IDS).logits).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("kind", "settings", "class_name"),
    [("llama", {}, "Mixtral"), ("gemma", {}, "Mixtral"), ("phi3", {}, "Mixtral"), ("olmo2", {}, "FlexOlmo")],
)
def test_dense_blocks_may_become_equal_experts(tmp_path, kind, settings, class_name):
    model = trained(kind, settings, {"layers": "1::2", "router": partial(TopKRouter, top_k=3)})
    target = {"Mixtral": "mixtral", "FlexOlmo": "flex_olmo"}[class_name]
    told = export_to_hf(model, tmp_path / "out", target=target, dense_as_experts=True)
    assert told.class_name == f"{class_name}ForCausalLM"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    with torch.no_grad():
        assert (loaded(input_ids=IDS).logits - model(input_ids=IDS).logits).abs().max() <= 1e-4
    stacked = loaded.model.layers[0].mlp.experts.down_proj
    assert torch.equal(stacked, model.model.layers[0].mlp.down_proj.weight.expand_as(stacked))
    assert list(moe_layers(model)) == ["model.layers.1.mlp"]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"router": loss_free, "layers": "1:2"}, "where a softmax's weights sum to one"),
        ({"num_shared_experts": 1, "layers": "1:2"}, "no shared experts"),
        (
            {"init": GranularInit(granularity=2), "num_experts": 8, "layers": "1:2"},
            "block 0 has not the form .* width 12",
        ),
    ],
)
def test_where_equal_experts_are_not_the_dense_block_it_says_so(tmp_path, made, words):
    model = dense_model("llama")
    upcycle(model, UpcycleConfig(**{"num_experts": E, **made}))
    with pytest.raises(ValueError, match=words):
        export_to_hf(model, tmp_path / "out", target="mixtral", dense_as_experts=True)
    assert not (tmp_path / "out").exists()


def test_the_card_tells_what_it_is(tmp_path):
    export_to_hf(trained("llama", {}, {}), tmp_path / "out", facts={"tokens": "2 billion"})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "MixtralForCausalLM" in card
    assert "| experts | 4, 2 per token, width 24 |" in card
    assert "| tokens | 2 billion |" in card
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_the_model_is_left_as_it_was(tmp_path):
    model = trained("gemma", {}, {}).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    with record_routing() as window:
        export_to_hf(model, tmp_path / "out")
    assert model.training
    assert not window
    assert torch.equal(torch.get_rng_state(), state)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_half_precision_stays_so_bit_for_bit(tmp_path):
    model = trained("llama", {}, {}).to(torch.bfloat16)
    told = export_to_hf(model, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for number, layer in enumerate(moe_layers(model).values()):
        block = loaded.model.layers[number].mlp
        for ours, theirs in (
            (layer.router.gate, block.gate.weight),
            (layer.experts.gate_up_proj, block.experts.gate_up_proj),
            (layer.experts.down_proj, block.experts.down_proj),
        ):
            assert theirs.dtype == torch.bfloat16
            assert torch.equal(ours, theirs)
    # told, and not refused: there the router is in half precision too
    assert told.measured_difference > 1e-4


# --- what is refused, before anything is written ---


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (("llama", {}, {"router": CosineRouter}), "block 0: no MoE architecture .* routes as CosineRouter"),
        (
            ("mistral", {}, {"layers": "1:"}),
            "mixtral: none of its blocks can be dense, and here block 0 is .*_as_experts",
        ),
        (("llama", {"attention_bias": True}, {}), "mixtral: attention_bias=True"),
        (("mistral", {}, {"router": partial(TopKRouter, normalize=False)}), "its weights sum to one"),
        (("mistral", {}, {"router": SigmoidRouter}), "mixtral: its router has a softmax, this one a sigmoid"),
        (("mistral", {}, {"num_shared_experts": 1}), "mixtral: it has no shared experts"),
        (("qwen3", {}, {"router": loss_free, "layers": "::2"}), "only its first blocks can be dense, .* block 1"),
        (("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, {}), "use_sliding_window=True"),
        (("gemma", {"attention_bias": True}, {}), "attention_bias=True"),
        (("llama", {"mlp_bias": True}, {}), "its experts have biases"),
        (("granite", {"head_dim": 16}, {}), "head_dim=16 is not"),
        (
            ("gpt_neox", {}, {}),
            "known to hold an upcycled gpt_neox .* known of dots1, flex_olmo, gemma, granite, llama",
        ),
        (("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, {}), "partial_rotary_factor"),
    ],
    ids=lambda case: "" if isinstance(case, str) else case[0],
)
def test_what_no_architecture_holds_is_refused_in_words(tmp_path, case, words):
    kind, settings, made = case
    model = dense_model(kind, **settings)
    upcycle(model, UpcycleConfig(**{"num_experts": E, **made}))
    with pytest.raises(ValueError, match=words) as refused:
        export_to_hf(model, tmp_path / "out")
    assert "save_moe" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_layers_that_differ_are_refused(tmp_path):
    model = dense_model("qwen3")
    upcycle(model, UpcycleConfig(num_experts=4, layers=["model.layers.0.mlp"]))
    upcycle(model, UpcycleConfig(num_experts=8, layers=["model.layers.1.mlp", "model.layers.2.mlp"]))
    with pytest.raises(ValueError, match="num_experts is 4 in block 0 and 8 in block 1"):
        export_to_hf(model, tmp_path / "out")


def test_other_arguments_are_checked(tmp_path):
    dense = dense_model("llama")
    with pytest.raises(ValueError, match=r"no MoE layer to export; call upcycle"):
        export_to_hf(dense, tmp_path / "out")
    upcycle(dense, UpcycleConfig(num_experts=E))
    with pytest.raises(ValueError, match="target='qwen3_moe': a llama goes to mixtral or glm4_moe"):
        export_to_hf(dense, tmp_path / "out", target="qwen3_moe")
    with pytest.raises(ValueError, match="glm4_moe: its router has a sigmoid, this one a softmax"):
        export_to_hf(dense, tmp_path / "out", target="glm4_moe")
    with pytest.raises(TypeError, match="is no causal language model"):
        export_to_hf(dense.model, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        export_to_hf(dense, tmp_path / "full")
    assert not (tmp_path / "out").exists()


# --- the command ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "moe"
    model = tiny_llama()
    upcycle(model, UpcycleConfig(num_experts=E))
    save_moe(model, path)
    word_tokenizer().save_pretrained(path)
    return path


def test_the_command_writes_a_model_with_its_tokenizer(saved, tmp_path, capsys):
    main(["export", "--model", str(saved), "--output", str(tmp_path / "out"), "--dtype", "bfloat16"])
    said = capsys.readouterr().out
    assert "MixtralForCausalLM" in said
    assert f"Written to {tmp_path / 'out'}" in said
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w1 w2")["input_ids"] == word_tokenizer()("w1 w2")["input_ids"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere"], f"holds no {CONFIG_FILE}. Give the directory that save_moe"),
        (["--target", "qwen3_moe"], "a llama goes to mixtral"),
        (["--dtyp", "float32"], "dtyp"),
    ],
)
def test_the_command_refuses_in_a_few_lines(saved, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--model", str(saved), "--output", str(tmp_path / "out"), *arguments])
    code = stopped.value.code
    said = code if isinstance(code, str) else capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said
    assert len(said.splitlines()) <= 5
    assert not (tmp_path / "out").exists()
