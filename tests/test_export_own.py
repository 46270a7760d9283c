"""Upcycled models in our own format: transformers' auto classes load the same model, bit for bit."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import transformers
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning_fixtures import VOCABULARY, batches, tiny_llama, word_tokenizer
from torch import nn

from lightning_moe import (
    ROUTERS,
    BalanceLossCallback,
    CosineRouter,
    ExpertUtilizationCallback,
    LossFreeRouter,
    LowRankInit,
    MoEModule,
    NoiseInit,
    TopKRouter,
    UpcycleConfig,
    export_to_hf,
    load_moe,
    moe_layers,
    record_routing,
    save_moe,
    upcycle,
)
from lightning_moe.auto_model import MODEL_TYPE, auto_classes
from lightning_moe.cli import main
from lightning_moe.module import load_model

IDS = torch.arange(1, 37).view(2, 18)
E = 4
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# class of transformers: its settings, what to make of it, the auto class that loads it, and whether it generates
ROWS = {
    "LlamaForCausalLM": ({}, {"router": CosineRouter}, "AutoModelForCausalLM", True),
    "Gemma2ForCausalLM": (
        {"head_dim": 8, "num_key_value_heads": 2},
        {"num_shared_experts": 1},
        "AutoModelForCausalLM",
        True,
    ),
    "GPTNeoXForCausalLM": ({}, {"layers": "1:"}, "AutoModelForCausalLM", True),
    "GPT2LMHeadModel": ({}, {"init": LowRankInit(rank=2)}, "AutoModelForCausalLM", True),
    # its body is made by AutoModel
    "LlamaForSequenceClassification": ({}, {}, "AutoModelForSequenceClassification", False),
    "BertForSequenceClassification": ({}, {"capacity_factor": 1.5}, "AutoModelForSequenceClassification", False),
    "ModernBertForMaskedLM": ({"cls_token_id": 1, "sep_token_id": 2}, {}, "AutoModelForMaskedLM", False),
    "BertModel": ({}, {}, "AutoModel", False),
    "ViTForImageClassification": ({"image_size": 8, "patch_size": 4}, {}, "AutoModelForImageClassification", False),
}
every_row = pytest.mark.parametrize("name", ROWS)


def upcycled(name="LlamaForCausalLM", settings=None, made=None, dtype=torch.float32):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls._from_config(cls.config_class(**{**SIZES, **(settings or {})}), dtype=dtype)
    upcycle(model, UpcycleConfig(**{"num_experts": E, "init": NoiseInit(), **(made or {})}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.1)
        for layer in moe_layers(model).values():
            if type(layer.router) is LossFreeRouter:
                layer.router.expert_bias.copy_(torch.randn(E, generator=generator) * 0.3)
    return model.eval()


def inputs(model):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.linspace(-1, 1, 384).view(2, 3, 8, 8)}
    return {"input_ids": IDS}


@torch.no_grad()
def output(model):
    return model(**inputs(model))[0]


LOADS = """
import json, sys
import torch, transformers
found = {}
for name, (auto, path, inputs, generates) in torch.load(sys.argv[1]).items():
    assert "lightning_moe" not in sys.modules or found
    model, told = getattr(transformers, auto).from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    assert not any(told.values()), (name, told)
    with torch.no_grad():
        output = model(**inputs)[0]
    text = model.generate(inputs["input_ids"][:, :5], max_new_tokens=8, do_sample=False) if generates else None
    frozen = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
    found[name] = (type(model).__name__, output, text, frozen)
    model.save_pretrained(path + "-again")
torch.save(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Of each row: the model, its directory, and what a process loads that has not imported this package."""
    root, made, asked = tmp_path_factory.mktemp("own"), {}, {}
    for name, (settings, options, auto, generates) in ROWS.items():
        model, path = upcycled(name, settings, options), root / name
        told = export_to_hf(model, path, target=MODEL_TYPE)
        made[name], asked[name] = (model, path, told), (auto, str(path), inputs(model), generates)
    torch.save(asked, root / "asked.pt")
    # transformers copies the file beside the weights there
    places = {"HF_MODULES_CACHE": str(root / "modules")}
    command = [sys.executable, "-c", LOADS, str(root / "asked.pt"), str(root / "found.pt")]
    subprocess.run(command, check=True, env=os.environ | places)
    return {name: (*made[name], *found) for name, found in torch.load(root / "found.pt").items()}


@every_row
def test_the_auto_class_loads_the_same_model(written, name):
    model, _, told, class_name, theirs, text, frozen = written[name]
    assert class_name == f"Upcycled{name}" == told.class_name
    assert torch.equal(theirs, output(model))
    assert theirs.std() > 0.01
    if text is not None:
        assert torch.equal(text, model.generate(IDS[:, :5], max_new_tokens=8, do_sample=False))
    assert frozen == [key for key, parameter in model.named_parameters() if not parameter.requires_grad]


@every_row
def test_saving_again_writes_the_same(written, name):
    model, path = written[name][:2]
    again = path.with_name(f"{name}-again")
    files = {file.name for file in again.iterdir()}
    assert files >= {"config.json", "model.safetensors", "modeling_lightning_moe.py"}
    assert files == {file.name for file in path.iterdir()} - {"README.md"}
    for file in ("config.json", "modeling_lightning_moe.py"):
        assert (again / file).read_text() == (path / file).read_text()
    loaded = getattr(transformers, ROWS[name][2]).from_pretrained(again)
    assert torch.equal(output(loaded), output(model))


def test_the_auto_classes_are_those_of_the_dense_class():
    found = {name: next(auto.__name__ for auto in auto_classes(getattr(transformers, name))) for name in ROWS}
    assert found == {name: row[2] for name, row in ROWS.items()}


@pytest.mark.filterwarnings("ignore:.* depend on later tokens.*")
@pytest.mark.parametrize("router", ROUTERS, ids=lambda cls: cls.__name__)
def test_every_router_comes_back_in_its_dtypes(tmp_path, router):
    model = upcycled(made={"router": router}, dtype=torch.bfloat16)
    export_to_hf(model, tmp_path / "own", target=MODEL_TYPE)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key]), key
    assert torch.equal(output(loaded), output(model))


def test_another_dtype_may_be_asked_for(tmp_path):
    export_to_hf(upcycled(made={"router": LossFreeRouter}), tmp_path / "own", target=MODEL_TYPE)
    layer = moe_layers(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=torch.bfloat16))
    layer = layer["model.layers.0.mlp"]
    assert layer.experts.down_proj.dtype == layer.router.gate.dtype == torch.bfloat16
    # in half precision it would swallow its own updates
    assert layer.router.expert_bias.dtype == torch.float32


def test_the_configuration_is_one_for_all_modules(tmp_path):
    export_to_hf(upcycled(), tmp_path / "own", target=MODEL_TYPE)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own", attn_implementation="eager")
    assert loaded.model.layers[0].self_attn.config is loaded.model.config is loaded.config
    assert loaded.config._attn_implementation == "eager"
    assert (loaded.config.model_type, loaded.config.architectures) == (MODEL_TYPE, ["UpcycledLlamaForCausalLM"])
    dense = loaded.config.dense_config()
    assert type(dense) is transformers.LlamaConfig
    assert dense.model_type == "llama"
    assert not hasattr(dense, "moe_recipe")


def test_the_recipe_is_that_of_the_layers_when_saved(tmp_path):
    export_to_hf(upcycled(), tmp_path / "own", target=MODEL_TYPE)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    for layer in moe_layers(loaded).values():
        layer.router.top_k = 3
    loaded.save_pretrained(tmp_path / "changed")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "changed")
    assert {layer.router.top_k for layer in moe_layers(again).values()} == {3}
    assert torch.equal(output(again), output(loaded))


def test_without_this_package_nothing_is_loaded_and_the_error_names_it(tmp_path):
    export_to_hf(upcycled(), tmp_path / "own", target=MODEL_TYPE)
    code = (
        "import sys; sys.modules['lightning_moe'] = None\nfrom transformers import AutoModelForCausalLM as auto\n"
        "for trust in (None, True):\n  try: auto.from_pretrained(sys.argv[1], trust_remote_code=trust)\n"
        "  except Exception as error: print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "own")]
    places = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, check=True, input="")
    assert "contains custom code" in done.stdout
    assert "ModuleNotFoundError import of lightning_moe halted" in done.stdout


# --- our own doors ---


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same model in the format of `save_moe` and in that of the auto classes, with a tokenizer."""
    root = tmp_path_factory.mktemp("both")
    model = tiny_llama()
    upcycle(model, UpcycleConfig(num_experts=E, router=partial(TopKRouter, top_k=2), init=NoiseInit()))
    save_moe(model, root / "saved")
    word_tokenizer().save_pretrained(root / "saved")
    main(["export", "--model", str(root / "saved"), "--output", str(root / "own"), "--target", MODEL_TYPE])
    return root / "saved", root / "own"


def quiet_trainer(path):
    callbacks = [BalanceLossCallback(), ExpertUtilizationCallback()]
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    logger = CSVLogger(path)
    return Trainer(accelerator="cpu", max_steps=4, log_every_n_steps=1, logger=logger, callbacks=callbacks, **quiet)


def test_our_module_trains_it_as_what_save_moe_wrote(both, tmp_path):
    curves = []
    for path in both:
        seed_everything(0)
        module = MoEModule(str(path))
        layers = moe_layers(module)
        assert len(layers) == 2
        trainer = quiet_trainer(tmp_path)
        trainer.fit(module, torch.utils.data.DataLoader(batches(4), batch_size=None))
        curves.append((trainer.callback_metrics["train_loss"], layers["model.model.layers.0.mlp"].router.gate.detach()))
        assert "moe/max_violation" in trainer.callback_metrics
    (loss, gate), (own_loss, own_gate) = curves
    assert torch.equal(loss, own_loss)
    assert torch.equal(gate, own_gate)


def test_the_analysis_reads_it(both, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number % 30}" for number in range(300)))
    found = []
    for number, path in enumerate(both):
        out = tmp_path / str(number)
        main(
            ["analyze", "--model", str(path), "--data", f"text={text}", "--output", str(out), "--sequence_length", "16"]
        )
        numbers = json.loads((out / "analysis.json").read_text())
        found.append({key: value for key, value in numbers.items() if key not in ("model", "names")})
    assert found[0] == found[1]


def test_it_goes_on_to_a_native_architecture_and_back_to_save_moe(both, tmp_path):
    saved, own = both
    for number, path in enumerate(both):
        main(["export", "--model", str(path), "--output", str(tmp_path / str(number))])
    ours, theirs = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(number)) for number in (0, 1))
    assert type(ours) is type(theirs) is transformers.MixtralForCausalLM
    assert torch.equal(output(ours), output(theirs))
    save_moe(load_model(str(own), "AutoModelForCausalLM", "auto"), tmp_path / "saved")
    again = load_moe(tmp_path / "saved")
    assert type(again) is transformers.LlamaForCausalLM
    assert torch.equal(output(again), output(load_moe(saved)))


def test_the_class_is_the_directorys_own(tmp_path):
    model = upcycled("BertForSequenceClassification")
    export_to_hf(model, tmp_path / "own", target=MODEL_TYPE)
    loaded = load_model(str(tmp_path / "own"), "AutoModelForCausalLM", "auto")
    assert isinstance(loaded, transformers.BertForSequenceClassification)
    with record_routing() as window:
        assert torch.equal(output(loaded), output(model))
    assert len(window) == 2


def test_the_tokenizer_is_found_beside_it(both):
    tokenizer = transformers.AutoTokenizer.from_pretrained(both[1])
    assert tokenizer("w1 w2")["input_ids"] == word_tokenizer()("w1 w2")["input_ids"]


def test_the_card_says_how_to_load_it(tmp_path):
    export_to_hf(upcycled("BertModel"), tmp_path / "own", target=MODEL_TYPE, facts={"tokens": "2 billion"})
    card = (tmp_path / "own" / "README.md").read_text()
    assert "`AutoModel.from_pretrained(..., trust_remote_code=True)`" in card
    assert "| upcycled from | BertModel, 2 blocks |" in card
    assert "| tokens | 2 billion |" in card
    assert "pipeline_tag" not in card


# --- what is refused ---


def test_a_model_without_a_native_home_is_told_of_this_one(tmp_path):
    model = upcycled("GPTNeoXForCausalLM")
    with pytest.raises(ValueError, match=f'target="{MODEL_TYPE}" writes it as it is'):
        export_to_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Wider(transformers.LlamaForCausalLM):
    pass


def test_what_would_not_load_again_is_refused(tmp_path):
    config = transformers.LlamaConfig(**SIZES)
    foreign, changed = Wider(config), transformers.LlamaForCausalLM(config)
    changed.lm_head = nn.Linear(32, VOCABULARY + 1)
    for model, words in ((foreign, "Wider is no class of transformers"), (changed, "other weights, as lm_head.bias")):
        upcycle(model, UpcycleConfig(num_experts=E))
        with pytest.raises(ValueError, match=words):
            export_to_hf(model, tmp_path / "out", target=MODEL_TYPE)
    assert not (tmp_path / "out").exists()
