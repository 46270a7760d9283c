"""What a cell's configuration makes: its objects, or its model on the meta device and what a token of it costs."""

import sys
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import nn

from lightning_moe import MoEUpcycleCallback, upcycle
from lightning_moe.callbacks.throughput import Throughput
from lightning_moe.cli import MoECLI
from lightning_moe.layer import moe_layers
from lightning_moe.module import load_model


def instantiate(config: dict[str, Any]) -> Any:
    """Makes Trainer, module and data of a configuration, as the command line would, and runs nothing."""
    # it warns of arguments that are not its own, and the parser puts what it parsed into a configuration
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        return MoECLI(args=deepcopy(config), run=False, save_config_callback=None)
    finally:
        sys.argv = arguments


def same_flops(wanted: dict[str, Any], other: dict[str, Any]) -> float:
    """How many steps of the second run take the operations of one step of the first, of equally many tokens."""
    return promised_operations(wanted) / promised_operations(other)


def promised_operations(config: dict[str, Any]) -> float:
    """Operations of a token of training, from a cell's configuration and what its routers promise."""
    model = meta_model(config)
    active = [float(layer.router.experts_per_token) for layer in moe_layers(model).values()]
    return operations_per_token(model, active, int(config["data"]["init_args"]["block_size"]))


def operations_per_token(model: nn.Module, active: Sequence[int | float], length: int) -> float:
    """Floating-point operations of a token of training.

    Args:
        model: with weights or without.
        active: experts that compute for a token, in each MoE layer.
        length: tokens of a sequence.
    """
    return Throughput(model, moe_layers(model)).operations_per_token(torch.tensor(active), length)


def meta_model(config: dict[str, Any], dense: nn.Module | None = None) -> nn.Module:
    """The cell's model without weights, upcycled as the run would.

    Args:
        config: the cell's configuration.
        dense: the model, where there are no files to read its shape from.
    """
    arguments = config["model"]["init_args"]
    if dense is None:
        dense = load_model(arguments["model"], arguments.get("auto_class", "AutoModelForCausalLM"), "auto", empty=True)
    for settings in config["trainer"].get("callbacks", []):
        if settings["class_path"].rpartition(".")[2] == "MoEUpcycleCallback":
            upcycle(dense, _instance(settings).config)
    return dense


def _instance(settings: dict[str, Any]) -> MoEUpcycleCallback:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MoEUpcycleCallback, "callback")
    made: MoEUpcycleCallback = parser.instantiate(parser.parse_object({"callback": settings})).callback
    return made
