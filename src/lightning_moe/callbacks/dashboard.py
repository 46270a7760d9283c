"""What TensorBoard shows beside the numbers: what each of them means, and which belong together."""

import textwrap
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from lightning.pytorch import Trainer

from lightning_moe.callbacks.loggers import log_text
from lightning_moe.config import UpcycleConfig
from lightning_moe.initializers import CopyInit
from lightning_moe.receipt import Receipt
from lightning_moe.routers import Router
from lightning_moe.routers.base import init_arguments

HEALTH = {
    "max_violation": (
        "largest load of an expert over the mean load, minus 1; the mean of the layers, and the worst layer",
        "0 is even; above 1 an expert has more than twice its share",
    ),
    "dead_experts": ("experts without a single token since the last log, of all layers", "0"),
    "load_entropy": ("entropy of the load, as a fraction of log E", "near 1"),
    "routing_entropy": ("entropy of a token's scores, as a fraction of log E", "falls as routers become sure"),
    "router_margin": ("gap between the last logit that was chosen and the first that was not", "grows from near 0"),
    "selection_change": (
        "share of a token's experts that are others than at the last log, for hidden states kept from there",
        "falls towards 0 as routers settle",
    ),
    "drop_rate": ("share of the assignments that were over capacity", "0 without a capacity_factor"),
    "tokens_per_second": ("real tokens of all ranks; validation is not in it", ""),
    "tflops_per_second": ("10^12 operations per second and device, of the parameters that are active", ""),
    "mfu": ("the same, as a fraction of the device's peak, where that is known", "0.3 to 0.5 is good on GPUs"),
}
"""Name of a number under ``moe/``, to what it is and what to expect."""

_LOSSES = ("as the layers compute it, without its coefficient; the mean of the layers", "see the losses' documentation")


def about(loss_names: Sequence[str]) -> str:
    """Explains each number, as a table in Markdown."""
    rows = [*HEALTH.items(), *((name, _LOSSES) for name in loss_names)]
    table = [f"| {name} | {meaning} | {expected} |" for name, (meaning, expected) in rows]
    return "\n".join(
        [
            "Counted from the experts that tokens chose, once per token, padding left out, over all ranks and all "
            "steps since the last log.",
            "",
            "| moe/... | meaning | what to expect |",
            "|---|---|---|",
            *table,
            "",
            "Pictures: `moe/expert_load` is the load of each expert relative to its layer's mean, `moe/coactivation` "
            "how often the expert of a column comes with that of a row. `moe_<number>/<layer>` is one layer's.",
        ]
    )


def layout(loss_names: Sequence[str], *, per_layer: bool) -> dict[str, dict[str, list[Any]]]:
    """Arranges the numbers on the page of custom scalars: health on top, layers below."""
    charts = {
        "Load: largest over mean, minus 1": ["max_violation", "max_violation_worst"],
        "Dead experts": ["dead_experts"],
        "Entropy of load and of routing": ["load_entropy", "routing_entropy"],
        "Router margin": ["router_margin"],
        "Change of selections": ["selection_change"],
        **{f"Balance loss: {name}": [name] for name in loss_names},
        "Dropped assignments": ["drop_rate"],
        "Tokens per second": ["tokens_per_second"],
        "TFLOP/s per device": ["tflops_per_second"],
    }
    health = {title: ["Multiline", [f"moe/{name}$" for name in names]] for title, names in charts.items()}
    if not per_layer:
        return {"Is routing healthy?": health}
    names = ("max_violation", "dead_experts", "load_entropy", "routing_entropy", "router_margin", *loss_names)
    layers = {f"{name} of each layer": ["Multiline", [f"moe_{name}/.*"]] for name in names}
    return {"Is routing healthy?": health, "Layer by layer": layers}


def write_texts(trainer: Trainer, config: UpcycleConfig, router: Router, receipt: Receipt, module: str | None) -> None:
    """Writes the receipt and the configuration of an upcycling, as text, to the loggers that show text."""
    where = "" if module is None else f"/{module}"
    settings = "\n".join(f"{key}: {value}" for key, value in _settings(config, router).items())
    for name, text in (("moe/receipt", str(receipt)), ("moe/config", settings)):
        # Markdown, where four spaces keep the columns
        log_text(trainer, f"{name}{where}", textwrap.indent(text, "    "))


def _settings(config: UpcycleConfig, router: Router) -> dict[str, str]:
    # objects as they would be written; the router as it was made, whatever made it
    found = {field.name: repr(getattr(config, field.name)) for field in fields(config)}
    found["router"] = _as_call(router, skip=("hidden_size", "num_experts"))
    for name, value in (("init", config.init or CopyInit()), ("router_init", config.router_init)):
        found[name] = repr(None) if value is None else _as_call(value)
    return found


def _as_call(value: Any, skip: tuple[str, ...] = ()) -> str:
    arguments = init_arguments(value, skip)
    return f"{type(value).__name__}({', '.join(f'{key}={argument!r}' for key, argument in arguments.items())})"
