"""Writes the pages of the catalogues from the code: ``python docs/generate.py``; with ``--check`` it only compares.

Beside the introductions a page has nothing that is not in a catalogue, a signature, a flag or a docstring, so that they
cannot drift apart.
"""

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from reading import (
    NUM_EXPERTS,
    address,
    default_router,
    docstring,
    literal,
    one_line,
    package_of,
    parameters,
    signature,
)
from rendering import Page, argument_table, fence, markdown, raised, render

import lightning_moe
from lightning_moe import ROUTERS, BalanceLoss, ExpertInit, Router, TopKRouter

FOLDER = Path(__file__).parent
WIDTH = 100


def yes(value: bool) -> str:
    """Yes or no."""
    return "yes" if value else "no"


def default_losses(cls: type) -> str:
    """The balance losses that a router brings along, with what of their arguments is not the default."""
    calls = []
    for loss in default_router(cls).balance_losses():
        kind = type(loss)
        arguments = [literal(loss.coefficient)]
        for parameter in parameters(kind):
            value = getattr(loss, parameter.name)
            if parameter.name != "coefficient" and value != parameter.default:
                arguments.append(f"{parameter.name}={literal(value)}")
        calls.append(f"[`{kind.__name__}({', '.join(arguments)})`]({address(kind)})")
    return ", ".join(calls) or "none"


def flag(name: str) -> Callable[[type], str]:
    """Reads a flag of the class."""
    return lambda cls: yes(getattr(cls, name))


def router_flag(name: str) -> Callable[[type], str]:
    """Reads a flag of the router with default arguments."""
    return lambda cls: yes(getattr(default_router(cls), name))


# what stands in an example for an argument without a default
_ARGUMENTS: dict[str, Any] = {"models": ["math", "code", "law", "news", "prose", "chat", "logic"]}


def defaults(cls: type) -> dict[str, Any]:
    """The arguments that need not be given, and examples of those that must."""
    values = {p.name: _ARGUMENTS.get(p.name, p.default) if p.default is p.empty else p.default for p in parameters(cls)}
    return {name: value for name, value in values.items() if value is not inspect.Parameter.empty}


def python_call(function: str, values: dict[str, Any], first: str = "") -> str:
    """A call on one line, or one argument per line."""
    arguments = [first] * bool(first) + [f"{name}={literal(value)}" for name, value in values.items()]
    short = f"{function}({', '.join(arguments)})"
    return short if len(short) <= WIDTH else f"{function}(\n    " + ",\n    ".join(arguments) + ",\n)"


def yaml_choice(cls: type) -> str:
    """``class_path`` and ``init_args``, as the command line takes them."""
    lines = [f"class_path: {cls.__name__}"]
    if values := defaults(cls):
        short = f"init_args: {yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=10**6).strip()}"
        block = yaml.safe_dump(values, sort_keys=False).strip().replace("\n", "\n  ")
        lines.append(short if len(short) <= WIDTH else f"init_args:\n  {block}")
    return "\n".join(lines)


def indented(text: str, first: str = "  ") -> str:
    """Moves a block to the right; ``first`` begins its first line."""
    return first + text.replace("\n", "\n" + " " * len(first))


def router_usage(cls: type) -> str:
    """In Python and in YAML."""
    code = f"from functools import partial\n\nfrom lightning_moe import {cls.__name__}, UpcycleConfig\n\n"
    code += f"router = {python_call('partial', defaults(cls), cls.__name__)}\n"
    code += f"config = UpcycleConfig(num_experts={NUM_EXPERTS}, router=router)"
    return fence("python", code) + "\n\n" + fence("yaml", f"router:\n{indented(yaml_choice(cls))}")


def loss_usage(cls: type) -> str:
    """In Python and in YAML."""
    code = f"from lightning_moe import {cls.__name__}\n\n"
    code += f"loss = {python_call(cls.__name__, defaults(cls))}\nbalance_losses = [loss]"
    return fence("python", code) + "\n\n" + fence("yaml", f"balance_losses:\n{indented(yaml_choice(cls), '  - ')}")


def fills(cls: type) -> str:
    """What an initialiser initialises."""
    return "the experts" if issubclass(cls, ExpertInit) else "the router's rows"


def keeps_step_zero(cls: type) -> str:
    """Whether copies, or shards of copies, are chosen together."""
    if not issubclass(cls, ExpertInit):
        return "as the experts do"
    router = TopKRouter(8, NUM_EXPERTS, top_k=2)
    init = cls(**defaults(cls))
    init.init_router(router, torch.Generator())
    return yes(init.step_zero(router)[0])


def init_usage(cls: type) -> str:
    """In Python and in YAML."""
    name = "init" if issubclass(cls, ExpertInit) else "router_init"
    code = f"from lightning_moe import {cls.__name__}, UpcycleConfig\n\n"
    code += f"{name} = {python_call(cls.__name__, defaults(cls))}\n"
    code += f"config = UpcycleConfig(num_experts={NUM_EXPERTS}, {name}={name})"
    return fence("python", code) + "\n\n" + fence("yaml", f"{name}:\n{indented(yaml_choice(cls))}")


def metric_usage(cls: type) -> str:
    """What ``update`` takes and ``compute`` returns."""
    update, compute = cls.update, cls.compute  # type: ignore[attr-defined]
    named = [p for p in inspect.signature(update).parameters.values() if p.name != "self"]
    meanings = {p.arg_name: one_line(p.description) for p in docstring(update).params}
    place = "lightning_moe" if hasattr(lightning_moe, cls.__name__) else f"lightning_moe.{package_of(cls)}"
    parts = [
        fence("python", f"from {place} import {cls.__name__}"),
        f"`{signature(update, 'update')}`: {markdown(one_line(docstring(update).short_description))}",
    ]
    if meanings:
        parts.append(argument_table(named, meanings))
    parts += raised(update)
    parts.append(f"`compute()`: {markdown(one_line(docstring(compute).short_description))}")
    return "\n\n".join(parts)


def update_arguments(cls: type) -> str:
    """The names of what ``update`` takes."""
    named = [p for p in inspect.signature(cls.update).parameters.values() if p.name != "self"]  # type: ignore[attr-defined]
    return ", ".join(f"`{p.name}`" + ("" if p.default is p.empty else " (optional)") for p in named)


def brought_by(cls: type) -> str:
    """The routers that train with a loss unless told otherwise."""
    names = [r for r in ROUTERS if any(type(loss) is cls for loss in default_router(r).balance_losses())]
    return ", ".join(f"[{r.__name__}]({address(r)})" for r in names) or "none"


def in_callback(lines: str) -> str:
    """A YAML file with lines in the place where the callback's arguments stand."""
    head = "trainer:\n  callbacks:\n    - class_path: MoEUpcycleCallback\n      init_args:\n        config:\n"
    return fence("yaml", f"{head}          num_experts: {NUM_EXPERTS}\n{lines}")


_PAPERS = "Entries name their sources, and where they differ from them."
_EXAMPLES = "The examples take `torch` and the names of this package as imported;\nthe tests run them."
_NOTES = f"""{_PAPERS} The snippets write out all arguments with their
defaults; leave out what you do not change. {_EXAMPLES}"""
_ROUTER_IN_YAML = in_callback(
    "          router:\n            class_path: TopKRouter\n            init_args: {top_k: 2}"
)
_LOSSES_IN_YAML = in_callback(
    "        balance_losses:\n          - class_path: LoadBalancingLoss\n            init_args: {coefficient: 0.01}"
)

PAGES = (
    Page(
        name="routers",
        title="Routers",
        introduction=f"""
A router decides which token goes to which expert, and with what weight. [Which router](which-router.md) helps to
choose one.

{_NOTES}

Notation: x is a token of D numbers, E the number of experts, K that of the experts per token, T that of the tokens of a
batch. `upcycle` gives `hidden_size` and `num_experts` to the router; the rest is yours, in Python with
`functools.partial`, in YAML under `config`:

{_ROUTER_IN_YAML}

The balance losses are those that a router brings along and that `MoEUpcycleCallback` trains with unless told otherwise.
The values of the table are those with default arguments and E = {NUM_EXPERTS}; arguments change some of them.
""",
        base=Router,
        columns={
            "causal": router_flag("causal"),
            "static_shapes": router_flag("static_shapes"),
            "learned": router_flag("learned"),
            "weights_sum_to_one": router_flag("weights_sum_to_one"),
            "experts_per_token": lambda cls: f"{default_router(cls).experts_per_token:.3g}",
            "balance losses": default_losses,
        },
        usage=router_usage,
        legend={
            name: inspect.getdoc(getattr(Router, name)) or "" for name in ("weights_sum_to_one", "experts_per_token")
        },
    ),
    Page(
        name="losses",
        title="Balance losses",
        introduction=f"""
A balance loss looks at the routing of one layer. Its coefficient times its value, summed over the layers, is added to
the training loss by `MoEUpcycleCallback(balance_losses=[...])`, or by a `BalanceLossCallback` of your own. Without
`balance_losses` each router's own are taken; `False` takes none.

{_NOTES}

{_LOSSES_IN_YAML}
""",
        base=BalanceLoss,
        columns={
            "logged as": lambda cls: f"`{cls.name}`",  # type: ignore[attr-defined]
            "coefficient": lambda cls: f"`{literal(defaults(cls).get('coefficient'))}`",
            "measures_balance": flag("measures_balance"),
        },
        details={"brought along by": brought_by},
        usage=loss_usage,
    ),
    Page(
        name="metrics",
        title="Routing metrics",
        introduction=f"""
Each is a [torchmetrics](https://lightning.ai/docs/torchmetrics/) `Metric`: it adds up over updates and ranks, padding
left out; `**kwargs` are those of `Metric`. Most take the `Routing` of one layer.

{_PAPERS} {_EXAMPLES}

```python
from lightning_moe import MaxViolation, record_routing


def max_violations(model, batches, num_experts):
    metrics = {{}}
    for batch in batches:
        with record_routing() as window:
            model(**batch)
        for name in window:
            metrics.setdefault(name, MaxViolation(num_experts=num_experts)).update(window[name])
    return {{name: float(metric.compute()) for name, metric in metrics.items()}}
```
""",
        base=None,
        columns={"update takes": update_arguments},
        usage=metric_usage,
    ),
    Page(
        name="initializers",
        title="Initialisers",
        introduction=f"""
An initialiser fills the experts of a layer from the dense FFN that they replace (`init=`), or the rows of the router's
gate, one for each expert (`router_init=`). Those that look at hidden states or gradients take calibration batches:
`upcycle(..., calibration=[batch, ...])`, `MoEUpcycleCallback(..., calibration=...)`, or
`lightning-moe upcycle --calibration_files`.

{_NOTES}
""",
        base=ExpertInit,
        columns={"fills": fills, "step 0 kept": keeps_step_zero},
        usage=init_usage,
        legend={
            "step 0 kept": (
                "whether the experts can be the dense FFN at step 0; the router's weights must then sum to the same "
                "for every token, but where the entry says otherwise. The receipt of `upcycle` tells for a "
                "combination."
            )
        },
    ),
)


def pages() -> dict[Path, str]:
    """The text of every page."""
    return {FOLDER / f"{page.name}.md": render(page) for page in PAGES}


def main() -> None:
    """Writes the pages, or names those that are not what they should be."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    check = parser.parse_args().check
    stale = {path: text for path, text in pages().items() if not path.exists() or path.read_text("utf-8") != text}
    if check and stale:
        sys.exit(f"Stale: {', '.join(path.name for path in stale)}. Run python docs/generate.py")
    for path, text in stale.items():
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
