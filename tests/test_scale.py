"""The configurations for many GPUs: each is stepped by two processes at toy size."""

import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning_fixtures import run_script, tiny_llama, word_tokenizer, write_corpus
from transformers import Qwen3Config, Qwen3ForCausalLM

from lightning_moe import TopKRouter, UpcycleConfig, upcycle

SCALE = Path(__file__).parent.parent / "examples" / "scale"
OVERLAYS = sorted(path.name for path in SCALE.glob("*.yaml") if path.name != "base.yaml")

# a script and not one command each: the imports take longer than the steps
TOY = """
import os, pickle, sys
import strategy_fixtures
import torch
from lightning_moe.cli import MoECLI

torch.set_num_threads(1)
folder, scale, *overlays = sys.argv[1:]
found = {}
for overlay in overlays:
    settings = {
        "trainer.accelerator": "cpu", "trainer.devices": 2, "trainer.num_nodes": 1, "trainer.max_steps": 2,
        "trainer.val_check_interval": "null", "trainer.limit_val_batches": 1, "trainer.num_sanity_val_steps": 0,
        "trainer.logger": "false", "trainer.default_root_dir": f"{folder}/{overlay}",
        "trainer.accumulate_grad_batches": 1, "trainer.enable_progress_bar": "false",
        "trainer.callbacks.every_n_train_steps": 1,
        "model.model": f"{folder}/model", "data.tokenizer": f"{folder}/model", "data.separator": "<eos>",
        "data.data_files": f"{folder}/corpus.txt", "data.block_size": 16, "data.cache_dir": f"{folder}/cache",
        "data.val_fraction": 0.1, "data.num_proc": 1,
    }
    if "expert-parallel" in overlay:
        settings["trainer.strategy.expert_parallel_size"] = 2
    given = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    cli = MoECLI(["fit", "--config", f"{scale}/base.yaml", "--config", f"{scale}/{overlay}", *given])
    trainer = cli.trainer
    found[overlay] = {
        "steps": trainer.global_step, "strategy": type(trainer.strategy).__name__, "ranks": trainer.world_size,
        "loss": float(trainer.callback_metrics["train_loss"]),
        "checkpoint": trainer.checkpoint_callback.last_model_path,
        "experts": cli.model.model.model.layers[0].mlp.num_experts,
    }
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with open(f"{folder}/found.pkl", "wb") as file:
            pickle.dump(found, file)
"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """What came of each configuration, on a tiny model and text."""
    folder = tmp_path_factory.mktemp("toys")
    write_corpus(folder / "corpus.txt", count=2000)
    word_tokenizer().save_pretrained(folder / "model")
    tiny_llama().save_pretrained(folder / "model")
    run_script(TOY, folder, folder, SCALE, *OVERLAYS, timeout=240, environment={"DS_ACCELERATOR": "cpu"})
    return pickle.loads((folder / "found.pkl").read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_two_processes_step(toys, overlay):
    found = toys[overlay]
    wanted = yaml.safe_load((SCALE / overlay).read_text())["trainer"].get("strategy", "")
    named = {"moe_ddp": "MoEDDPStrategy", "moe_fsdp2": "MoEFSDP2Strategy"}
    if wanted:
        assert found["strategy"] == (named[wanted] if isinstance(wanted, str) else wanted["class_path"])
    assert (found["steps"], found["ranks"]) == (2, 2)
    assert 0 < found["loss"] < 10
    assert Path(found["checkpoint"]).exists()


# of the models that the configurations name, what decides their size
MODELS = {
    "Qwen/Qwen3-8B-Base": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
    "Qwen/Qwen3-0.6B-Base": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True},
}
GPU_MEMORY = 80e9


def merged(below, above):
    """As LightningCLI merges configurations: dictionaries by their keys, all else as a whole."""
    both = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = merged(below[key], above[key])
    return both


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_it_is_built_on_the_meta_device_and_what_is_kept_fits(overlay):
    settings = merged(*(yaml.safe_load((SCALE / name).read_text()) for name in ("base.yaml", overlay)))
    trainer, model = settings["trainer"], settings["model"]["init_args"]["model"]
    shape = MODELS[model] | {"head_dim": 128, "vocab_size": 151936}
    with torch.device("meta"):
        built = Qwen3ForCausalLM(Qwen3Config(**shape))
    config = trainer["callbacks"][0]["init_args"]["config"]
    experts, top_k = config["num_experts"], config["router"]["init_args"]["top_k"]
    upcycle(built, UpcycleConfig(num_experts=experts, router=partial(TopKRouter, top_k=top_k)))
    total = sum(parameter.numel() for parameter in built.parameters())
    ffn = 3 * shape["hidden_size"] * shape["intermediate_size"] * shape["num_hidden_layers"]
    assert total > experts * ffn
    gpus = trainer["devices"] * trainer.get("num_nodes", 1)
    strategy = trainer.get("strategy", "moe_ddp")
    options = {} if isinstance(strategy, str) else strategy["init_args"]
    assert experts % options.get("expert_parallel_size", 1) == 0
    assert gpus % options.get("expert_parallel_size", 1) == 0
    # weights, gradients and the two states of AdamW; HYBRID_SHARD shards within a machine
    shards = 1 if strategy == "moe_ddp" else gpus
    shards = trainer["devices"] if options.get("sharding_strategy") == "HYBRID_SHARD" else shards
    kept = total * 4 * (2 if trainer["precision"] == "bf16-true" else 4) / shards
    assert kept < 0.8 * GPU_MEMORY
