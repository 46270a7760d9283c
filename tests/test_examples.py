"""Every YAML in the repository is built and stepped, on a tiny model and corpus in the place of the real ones."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_moe import UpcycleConfig, upcycle
from lightning_moe.cli import MoECLI

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for folder in ("examples", "benchmarks") for path in (ROOT / folder).glob("*.yaml"))
# as many layers as SmolLM2 has, so that the layers that the configurations choose exist
LAYERS = 30


@pytest.fixture
def stand_ins(tmp_path):
    letters = [chr(code) for code in range(32, 127)]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<|endoftext|>", *letters])}, "<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        vocab_size=len(letters) + 1,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": f"{i} is a number. " * 400}) for i in range(20)))
    return folder, corpus


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_configuration_steps(config, stand_ins, tmp_path):
    model, corpus = stand_ins
    settings = yaml.safe_load(config.read_text())
    settings["trainer"].update(
        max_steps=2, val_check_interval=1, log_every_n_steps=1, accelerator="cpu", default_root_dir=str(tmp_path)
    )
    settings["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    settings["model"]["init_args"]["model"] = str(model)
    data = settings["data"]["init_args"]
    data.update(
        tokenizer=str(model), cache_dir=str(tmp_path), data_files=dict.fromkeys(data["data_files"], str(corpus))
    )
    changed = tmp_path / "run.yaml"
    changed.write_text(yaml.safe_dump(settings))
    cli = MoECLI(["fit", "--config", str(changed)])
    assert cli.trainer.global_step == 2
    wanted = {"train_loss", "moe/max_violation", *(f"val_loss/{name}" for name in data["data_files"])}
    assert wanted <= set(cli.trainer.callback_metrics)


def test_the_router_of_the_readme_works():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "(Router)" in block]
    names: dict[str, object] = {}
    exec(block, names)
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)))
    receipt = upcycle(model, UpcycleConfig(num_experts=3, router=names["RandomRouter"]), batch=torch.randn(5, 8))
    # copies behind weights of one: the dense model up to rounding
    assert receipt.preserved
    assert receipt.measured_difference < 1e-6
