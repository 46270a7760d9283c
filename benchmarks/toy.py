"""A suite at toy size: each model shrunk to a few thousand random weights, two steps, no evaluation, on the CPU.

Whether every cell of a suite that needs GPUs can be built and run is known so without one.
"""

from pathlib import Path
from typing import Any

import torch
from materials import architecture
from planned import meta_model
from suites import Cell, Suite, merged
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

STEPS = 2
_RUN = {
    "trainer": {
        "accelerator": "cpu",
        "val_check_interval": 1,
        "accumulate_grad_batches": 1,
        "limit_val_batches": 1,
        "log_every_n_steps": 1,
    },
    "data": {
        "init_args": {
            "dataset": None,
            "dataset_config": None,
            "data_files": "benchmarks/*.py",
            "val_files": None,
            "val_fraction": 0.1,
            "block_size": 16,
            "batch_size": 2,
            "num_proc": 1,
        }
    },
}


def toy_cell(suite: Suite, model: str, algorithm: str, folder: Path) -> Cell:
    """A cell at toy size, once its model at full size was built on the meta device.

    Args:
        suite: the suite.
        model: one of its models, with an ``architecture`` and what is ``toy`` about it.
        algorithm: one of its algorithms.
        folder: where the toy models are written.

    Raises:
        ValueError: if the model has no ``architecture``.
    """
    settings = suite.models[model]
    # one that the suite pretrains is small already
    settings = settings.get("pretrain", settings)
    if "architecture" not in settings:
        raise ValueError(f"--toy: models.{model} has no architecture to shrink.")
    seed = suite.seeds(model)[0]
    with torch.device("meta"):
        sizes = {"vocab_size": settings["vocab_size"]} if "vocab_size" in settings else {}
        dense: Any = AutoModelForCausalLM.from_config(architecture(settings["architecture"], **sizes))
    meta_model(suite.config(model, algorithm, seed, model, STEPS), dense)
    weights = _toy_model(settings, folder / model)
    config = merged(suite.config(model, algorithm, seed, str(weights), STEPS), _RUN)
    return Cell(f"{suite.name}-toy", model, algorithm, seed, _all_layers(config), {})


def _all_layers(config: dict[str, Any]) -> dict[str, Any]:
    # a slice may begin behind the last of a toy's few layers
    for callback in config["trainer"].get("callbacks", []):
        callback["init_args"].get("config", {}).pop("layers", None)
    return config


def _toy_model(settings: dict[str, Any], target: Path) -> Path:
    if not (target / "config.json").is_file():
        tokens = {token: number for number, token in enumerate(["<|endoftext|>", *map(chr, range(32, 127))])}
        letters = Tokenizer(models.WordLevel(tokens, "<|endoftext|>"))
        letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<|endoftext|>").save_pretrained(target)
        changes = {"vocab_size": len(tokens), "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
        config = architecture(settings["architecture"], **changes, **settings.get("toy", {}))
        AutoModelForCausalLM.from_config(config).save_pretrained(target)
    return target
