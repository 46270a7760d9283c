"""The verb ``lightning-moe plan``: a model's configuration in, what training it takes out; no weights are loaded."""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lightning_moe.checks import check_positive, check_whole
from lightning_moe.cli_verb import VerbParser, run_verb, verb_parser
from lightning_moe.config import UpcycleConfig
from lightning_moe.footprint import Footprint, OptimizerKind, Precision, plan_training
from lightning_moe.initializers import INITIALIZERS, ExpertInit
from lightning_moe.layer import moe_layers
from lightning_moe.module import load_model
from lightning_moe.routers import TopKRouter
from lightning_moe.saving import CONFIG_FILE
from lightning_moe.upcycle import upcycle


def plan_checkpoint(
    *,
    model: str,
    experts: int | None = None,
    top_k: int = 2,
    shared_experts: int = 0,
    init: ExpertInit | None = None,
    layers: str = "all",
    gpus: int = 1,
    memory: int | float = 80.0,
    precision: Precision = "bf16-mixed",
    optimizer: OptimizerKind = "adamw",
    activation_checkpointing: bool = False,
    batch_size: int = 1,
    sequence_length: int = 2048,
    expert_parallel_size: int = 1,
    freeze_dense: bool = False,
    quantize_frozen: bool = False,
    output: str | None = None,
) -> Footprint:
    """Tells what training a model takes: parameters, operations, memory by part, and what fits on which strategy.

    Only the configuration is read. docs/plan.md tells what is counted, and how.

    Args:
        model: name on the Hub or path of a Hugging Face model, or path of what save_moe or `lightning-moe upcycle`
            wrote.
        experts: experts per layer to upcycle a dense model to; None plans the model as it is.
        top_k: experts per token.
        shared_experts: experts that every token goes through besides.
        init: what makes the experts, as GranularInit for narrower ones or LowRankInit; None is CopyInit.
        layers: which of the dense FFNs, as a slice or a name pattern.
        gpus: number of GPUs.
        memory: GB of one GPU, of 1e9 bytes.
        precision: of the Trainer.
        optimizer: AdamW, AdamW with 8-bit states, or SGD with momentum.
        activation_checkpointing: whether to recompute the activations of each block in the backward.
        batch_size: sequences on each GPU.
        sequence_length: tokens of each.
        expert_parallel_size: GPUs that share out the experts.
        freeze_dense: whether only the routers and the experts train, not what is around them.
        quantize_frozen: whether frozen matrices are kept in 4 bits.
        output: a JSON file to write, which must not exist.

    Raises:
        FileNotFoundError: if the model does not exist.
        FileExistsError: if the file to write exists.
        ValueError: if there is no such model, if it is upcycled already, or if a number is none that can be.
    """
    # what is quickly told goes first
    file = None if output is None else Path(output).expanduser()
    if file is not None and file.exists():
        raise FileExistsError(f"output={output!r} exists. Remove it, or give another name with --output.")
    check_whole(gpus=gpus, batch_size=batch_size, sequence_length=sequence_length, top_k=top_k)
    check_positive(memory=memory)
    if experts is None and (shared_experts or init is not None or layers != "all"):
        raise ValueError(
            "experts: wanted a number, as --experts 8, with what is said of shared_experts, init or layers."
        )
    if experts is not None and (Path(model).expanduser() / CONFIG_FILE).is_file():
        raise ValueError(
            f"model={model!r} is upcycled already: it holds {CONFIG_FILE}. Leave --experts out to plan it."
        )
    loaded = load_model(model, "AutoModelForCausalLM", "auto", empty=True)
    if experts is not None:
        # one weight of a normalised softmax is always 1
        router = partial(TopKRouter, top_k=top_k, normalize=top_k > 1)
        config = UpcycleConfig(
            num_experts=experts, router=router, num_shared_experts=shared_experts, init=init, layers=layers
        )
        upcycle(loaded, config)
    if freeze_dense:
        _freeze_dense(loaded)
    footprint = plan_training(
        loaded,
        gpus=gpus,
        memory=memory,
        precision=precision,
        optimizer=optimizer,
        activation_checkpointing=activation_checkpointing,
        batch_size=batch_size,
        sequence_length=sequence_length,
        expert_parallel_size=expert_parallel_size,
        quantize_frozen=quantize_frozen,
    )
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(footprint.to_dict(), indent=2) + "\n")
    return footprint


class _Parser(VerbParser):
    verb = "plan"
    known = INITIALIZERS


def main(args: Sequence[str]) -> None:
    """Runs ``lightning-moe plan`` and prints the tables; ``--top-k`` is ``--top_k``."""
    parser = verb_parser(_Parser, plan_checkpoint, set())
    footprint, options = run_verb(parser, [_underscored(argument) for argument in args], plan_checkpoint)
    print(footprint)
    if options.output is not None:
        print(f"Written to {options.output}.", file=sys.stderr)


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _freeze_dense(model: nn.Module) -> None:
    layers = moe_layers(model).values()
    if not layers:
        raise ValueError("freeze_dense: the model is not upcycled, so nothing would train. Give --experts.")
    experts: list[Any] = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    for parameter in experts:
        parameter.requires_grad_(True)
