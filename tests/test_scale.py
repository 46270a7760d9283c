"""The configurations for many GPUs: each is stepped by two processes at toy size."""

import pickle
import shutil
from pathlib import Path

import pytest
import yaml
from lightning_fixtures import run_script, tiny_llama, word_tokenizer, write_corpus

SCALE = Path(__file__).parent.parent / "examples" / "scale"
OVERLAYS = sorted(path.name for path in SCALE.glob("*.yaml") if path.name != "base.yaml")

# a script and not one command each: the imports take longer than the steps
TOY = """
import os, pickle, sys
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
    overlays = [name for name in OVERLAYS if "deepspeed" not in name or shutil.which("c++")]
    run_script(TOY, folder, folder, SCALE, *overlays, timeout=240, environment={"DS_ACCELERATOR": "cpu"})
    return pickle.loads((folder / "found.pkl").read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_two_processes_step(toys, overlay):
    if overlay not in toys:
        pytest.skip("DeepSpeed on the CPU needs a C++ compiler")
    found = toys[overlay]
    wanted = yaml.safe_load((SCALE / overlay).read_text())["trainer"].get("strategy", "")
    named = {"moe_ddp": "MoEDDPStrategy", "moe_fsdp2": "MoEFSDP2Strategy"}
    if wanted:
        assert found["strategy"] == (named[wanted] if isinstance(wanted, str) else wanted["class_path"])
    assert (found["steps"], found["ranks"]) == (2, 2)
    assert 0 < found["loss"] < 10
    assert Path(found["checkpoint"]).exists()
