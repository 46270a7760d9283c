"""Native MoE checkpoints on disk, served by our module, callbacks, verbs and configs; and ours, exported and back."""

import json
from functools import partial

import pytest
import torch
import transformers
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning_fixtures import VOCABULARY, batches, loader, tiny_llama, word_tokenizer, write_corpus
from zero_shot_fixtures import make_tasks

from lightning_moe import (
    BalanceLossCallback,
    ExpertUtilizationCallback,
    LoadBalancingLoss,
    LossFreeRouter,
    MoEModule,
    NoiseInit,
    TopKRouter,
    UpcycleConfig,
    ZeroShotEvalCallback,
    attach_native,
    export_to_hf,
    import_native,
    moe_layers,
    record_routing,
    routed_layers,
    save_moe,
    upcycle,
)
from lightning_moe.cli import main
from lightning_moe.module import load_model

E = 5
SIZES = {
    "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
    "num_key_value_heads": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS = {
    "MixtralForCausalLM": {"num_local_experts": E},
    "Qwen3MoeForCausalLM": {"num_experts": E, "moe_intermediate_size": 12},
    "OlmoeForCausalLM": {"num_experts": E},
    "Glm4MoeForCausalLM": {
        "n_routed_experts": E, "moe_intermediate_size": 12, "n_shared_experts": 1, "first_k_dense_replace": 0,
        "n_group": 1, "topk_group": 1,
    },
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory of each kind with a tokenizer, tasks for lm-eval, and a text."""
    folder = tmp_path_factory.mktemp("native")
    make_tasks(folder)
    write_corpus(folder / "corpus.txt")
    for kind, settings in MODELS.items():
        model_class = getattr(transformers, kind)
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**{**SIZES, **settings}))
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / kind)
        word_tokenizer().save_pretrained(folder / kind)
    return folder


@every_kind
def test_a_directory_is_trained_with_all_callbacks(place, kind, tmp_path):
    module = MoEModule(str(place / kind))
    assert type(module.model).__name__ == kind
    zero_shot = ZeroShotEvalCallback(["guess"], tokenizer=word_tokenizer(), include_path=place, limit=5)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BalanceLossCallback([LoadBalancingLoss(0.01)]), ExpertUtilizationCallback(), zero_shot],
    )
    trainer.fit(module, loader(batches(3)))
    metrics = trainer.callback_metrics
    assert {"train_loss", "moe/max_violation", "moe/load_balancing_loss"} <= set(metrics)
    # balanced is 1: more is what a loss of each layer by itself sees
    assert 0.9 < float(metrics["moe/load_balancing_loss"]) < E
    assert next(tmp_path.rglob("zero_shot.json")).is_file()


@every_kind
def test_the_verbs_take_a_directory(place, kind, tmp_path, capsys):
    data = f"text={place / 'corpus.txt'}"
    options = ["--data", data, "--sequence_length", "16", "--num_tokens", "256", "--studies", "false"]
    main(["analyze", "--model", str(place / kind), "--output", str(tmp_path / "page"), *options])
    assert (tmp_path / "page" / "report.html").is_file()
    layers = json.loads((tmp_path / "page" / "analysis.json").read_text())["layers"]
    assert [layer["name"] for layer in layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    scores = tmp_path / "scores.json"
    options = ["--tasks", "guess", "--include_path", str(place), "--limit", "5", "--output", str(scores)]
    main(["evaluate", "--model", str(place / kind), *options])
    assert "acc" in json.loads(scores.read_text())["scores"]["guess"]


def test_a_config_file_trains_a_directory(place, tmp_path):
    corpus = {"tokenizer": str(place / "Qwen3MoeForCausalLM"), "data_files": str(place / "corpus.txt")}
    config = {
        "model": {"class_path": "MoEModule", "init_args": {"model": str(place / "Qwen3MoeForCausalLM")}},
        "data": {
            "class_path": "TextDataModule",
            "init_args": {**corpus, "block_size": 16, "batch_size": 2, "num_proc": 1, "cache_dir": str(tmp_path / "c")},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "log_every_n_steps": 1,
            "default_root_dir": str(tmp_path),
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}},
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "callbacks": [{"class_path": "BalanceLossCallback"}, {"class_path": "ExpertUtilizationCallback"}],
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    assert "moe/max_violation" in next(tmp_path.rglob("metrics.csv")).read_text()


# --- there and back ---


def there_and_back(folder, router):
    """An upcycled model, and what plain transformers loads of its export, attached."""
    ours = tiny_llama()
    upcycle(ours, UpcycleConfig(num_experts=E, router=router, init=NoiseInit(std=0.3)))
    for layer in moe_layers(ours).values():
        if layer.adapts_to_load:
            layer.router.expert_bias.copy_(torch.linspace(-0.2, 0.2, E))
    export_to_hf(ours, folder)
    # the grouped kernel wants rows of 16 bytes
    native = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    attach_native(native)
    return ours, native


ROUTERS = {
    "MixtralForCausalLM": partial(TopKRouter, top_k=2, init_std=0.5),
    "Glm4MoeForCausalLM": partial(LossFreeRouter, top_k=2, init_std=0.5),
}


@pytest.mark.parametrize("kind", ROUTERS)
def test_every_token_takes_the_same_way(tmp_path, kind):
    ours, native = there_and_back(tmp_path / "out", ROUTERS[kind])
    assert type(native).__name__ == kind
    records = []
    for model in (ours, native):
        with torch.no_grad(), record_routing() as window:
            logits = model(input_ids=batches(1)[0]["input_ids"]).logits
        records.append((logits, window))
    (logits, window), (native_logits, native_window) = records
    assert (logits - native_logits).abs().max() <= 1e-5
    assert list(window) == list(native_window) == list(routed_layers(native))
    for name, routing in window.items():
        # within a token the order of the experts is free
        way, native_way = (record.expert_ids.view(-1, 2).sort(-1) for record in (routing, native_window[name]))
        assert torch.equal(way.values, native_way.values)
        weights, native_weights = (
            record.weights.view(-1, 2).gather(1, order.indices)
            for record, order in ((routing, way), (native_window[name], native_way))
        )
        assert (weights - native_weights).abs().max() <= 1e-6
    assert len({tuple(row) for row in window["model.layers.0.mlp"].expert_ids.view(-1, 2).tolist()}) > 2


@pytest.mark.parametrize("kind", ROUTERS)
def test_training_goes_on_with_the_same_gradients(tmp_path, kind):
    ours, native = there_and_back(tmp_path / "out", ROUTERS[kind])
    losses = [LoadBalancingLoss(0.1)]
    for number, model in enumerate((ours, native)):
        module = MoEModule(model, optimizer=partial(torch.optim.SGD, lr=0.0))
        trainer = Trainer(
            accelerator="cpu",
            max_steps=1,
            logger=CSVLogger(tmp_path / str(number)),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[BalanceLossCallback(losses)],
        )
        trainer.fit(module, loader(batches(1)))
    for block, native_block in zip(ours.model.layers, native.model.layers, strict=True):
        pairs = [
            (block.mlp.router.gate, native_block.mlp.gate.weight),
            (block.mlp.experts.gate_up_proj, native_block.mlp.experts.gate_up_proj),
            (block.mlp.experts.down_proj, native_block.mlp.experts.down_proj),
            (block.self_attn.q_proj.weight, native_block.self_attn.q_proj.weight),
        ]
        for own, theirs in pairs:
            assert own.grad.abs().max() > 0
            assert (own.grad - theirs.grad).abs().max() <= 1e-5 * own.grad.abs().max()


# --- native blocks as our layers ---

IMPORTED = {
    **MODELS,
    "Qwen3MoeForCausalLM": {**MODELS["Qwen3MoeForCausalLM"], "norm_topk_prob": True, "mlp_only_layers": [0]},
    "FlexOlmoForCausalLM": {"num_experts": E},
    "Dots1ForCausalLM": {**MODELS["Glm4MoeForCausalLM"], "routed_scaling_factor": 2.5, "norm_topk_prob": True},
    "DeepseekV3ForCausalLM": {
        "n_routed_experts": 8, "moe_intermediate_size": 12, "n_shared_experts": 2, "first_k_dense_replace": 1,
        "n_group": 2, "topk_group": 1, "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 2,
    },
}  # fmt: skip
every_imported = pytest.mark.parametrize("kind", IMPORTED)


def native_model(kind, **changes):
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**{**SIZES, **IMPORTED.get(kind, {}), **changes})
    torch.manual_seed(0)
    model = model_class._from_config(config, experts_implementation="eager")
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(tensor, std=0.3)
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.linspace(-0.2, 0.2, len(tensor)))
    return model.eval()


@every_imported
def test_imported_blocks_compute_and_learn_the_same(kind):
    native, ours = native_model(kind), native_model(kind)
    attach_native(native)
    names = import_native(ours)
    assert list(moe_layers(ours)) == list(names) == list(routed_layers(native))
    batch = batches(1)[0]
    for model in (native, ours):
        with record_routing() as window:
            out = model(**batch)
        out.loss.backward()
        model.seen = out.logits.detach(), {name: routing.expert_ids for name, routing in window.items()}
    (logits, ids), (our_logits, our_ids) = native.seen, ours.seen
    assert (logits - our_logits).abs().max() <= 1e-5 * logits.abs().max()
    for name in names:
        assert torch.equal(ids[name].view(-1, 2).sort(-1).values, our_ids[name].view(-1, 2).sort(-1).values)
        block, layer = native.get_submodule(name), ours.get_submodule(name)
        pairs = [
            (block.gate.weight, layer.router.gate),
            (block.experts.gate_up_proj, layer.experts.gate_up_proj),
            (block.experts.down_proj, layer.experts.down_proj),
        ]
        if layer.shared_experts is not None:
            pairs.append((block.shared_experts.down_proj.weight, layer.shared_experts.down_proj[0]))
        for theirs, own in pairs:
            # of a parameter the gradient, of a view of one that of the parameter
            grad = own.grad if own.is_leaf else layer.shared_experts.down_proj.grad[0]
            assert theirs.grad.abs().max() > 0
            assert (theirs.grad - grad).abs().max() <= 1e-5 * theirs.grad.abs().max()


@every_imported
def test_an_imported_model_is_saved_and_loaded_in_both_formats(kind, tmp_path):
    model = native_model(kind)
    import_native(model)
    moe_layers(model)["model.layers.1.mlp"].router.top_k = 3
    ids = batches(1)[0]["input_ids"]
    save_moe(model, tmp_path / "saved")
    told = export_to_hf(model, tmp_path / "own", target="lightning_moe")
    assert told.class_name == f"Upcycled{kind}"
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        for path in ("saved", "own"):
            loaded = load_model(str(tmp_path / path), "AutoModelForCausalLM", "auto")
            assert list(moe_layers(loaded)) == list(moe_layers(model))
            assert torch.equal(loaded(input_ids=ids).logits, wanted)


@pytest.mark.parametrize(
    "kind", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "FlexOlmoForCausalLM", "Dots1ForCausalLM"]
)
def test_an_imported_model_goes_back_where_it_came_from(kind, tmp_path):
    native, ours = native_model(kind), native_model(kind)
    import_native(ours)
    assert export_to_hf(ours, tmp_path / "out").class_name == kind
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    assert again.state_dict().keys() == native.state_dict().keys()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, native.state_dict()[key]), key


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("Qwen2MoeForCausalLM", {"num_experts": E, "moe_intermediate_size": 12}, "has a gate of its own"),
        ("GptOssForCausalLM", {"num_local_experts": E}, "are not stacked SwiGLU FFNs without biases"),
        ("MixtralForCausalLM", {"router_jitter_noise": 0.1}, "set router_jitter_noise=0"),
        ("PhimoeForCausalLM", {"num_local_experts": E}, "Phimoe.* is not what our layer computes|is known to route"),
        ("LlamaForCausalLM", {}, "has no MoE blocks whose router is known"),
    ],
)
def test_blocks_that_are_no_layer_of_ours_are_left_alone(kind, changes, words):
    model = native_model(kind, **changes)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=words) as refused:
        import_native(model)
    assert "docs/native.md" in str(refused.value) or "jitter" in words
    assert [type(module) for module in model.modules()] == before
