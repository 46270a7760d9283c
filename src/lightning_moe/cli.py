"""The command line: LightningCLI that knows this package's classes by their short names.

``lightning-moe fit --config run.yaml`` and ``lightning fit --config run.yaml`` are the same program.
"""

import inspect
import re
import sys
from difflib import get_close_matches
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

# imported so that jsonargparse finds them by their short names: class_path: MoEModule
from lightning_moe.callbacks import (
    BalanceLossCallback,
    ExpertBiasCallback,
    ExpertUtilizationCallback,
    MoEUpcycleCallback,
)
from lightning_moe.data import TextDataModule
from lightning_moe.initializers import INITIALIZERS, ROUTER_INITIALIZERS
from lightning_moe.losses import BALANCE_LOSSES
from lightning_moe.module import MoEModule
from lightning_moe.routers import ROUTERS
from lightning_moe.upcycle import UpcycleConfig

_CLASSES: tuple[type, ...] = (
    MoEModule,
    TextDataModule,
    MoEUpcycleCallback,
    BalanceLossCallback,
    ExpertBiasCallback,
    ExpertUtilizationCallback,
    *ROUTERS,
    *INITIALIZERS,
    *ROUTER_INITIALIZERS,
    *BALANCE_LOSSES,
)

# what the `lightning` command of lightning-sdk does not have, or means the same by
_VERBS = ("fit", "validate", "test", "predict")


class MoEArgumentParser(LightningArgumentParser):
    """LightningCLI's parser with short errors: what is wrong and what was probably meant, not every alternative."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with one clear message."""
        sys.stderr.write(f"error: {_explain(message)}\nFor all options: lightning-moe fit --help\n")
        sys.exit(2)


# What jsonargparse says of a name that it does not know, in its several places.
_UNKNOWN = re.compile(r"option '([^']+)'|Option '([^']+)' is not accepted|Expected a dot import path string: (\S+)")


def _explain(message: str) -> str:
    # jsonargparse reports every alternative of a union; what the user meant is the one that names a class_path, or else
    # the first that says more than what kind of thing was expected
    place = message.splitlines()[0].rstrip(":")
    problem = re.search(r"- (Problem with given class_path .*?)(?=\n    - |\n  Given value|\Z)", message, re.DOTALL)
    unknown_class = re.search(r"- (Expected a dot import path string: \S+)", message)
    found = problem or unknown_class
    text = f"{place}: {found.group(1)}" if found else message
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if unknown := _UNKNOWN.search(text):
        name = next(group for group in unknown.groups() if group).rpartition(".")[2]
        # a wrong capital is no wrong letter
        known = {known.lower(): known for known in sorted(_known_names())}
        if close := get_close_matches(name.lower(), known, n=1):
            lines.append(f"Did you mean {known[close[0]]!r}?")
    return "\n  ".join(lines)


def _known_names() -> set[str]:
    classes = (*_CLASSES, UpcycleConfig, Trainer)
    return {cls.__name__ for cls in classes} | {
        parameter for cls in classes for parameter in inspect.signature(cls).parameters
    }


class MoECLI(LightningCLI):
    """LightningCLI with this package's defaults: any LightningModule, any datamodule, a config saved with every run."""

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        kwargs.setdefault("parser_class", MoEArgumentParser)
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})
        kwargs.setdefault("seed_everything_default", 0)
        super().__init__(args=args, **kwargs)

    def instantiate_classes(self) -> None:
        """Makes the objects of the configuration; what one of them refuses is told in its own words."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps it into the list of the alternatives that it tried
            told = re.search(r"Errors:\n\s+- (?!Expected a)(.+?)(?=\n\s+- |\n\s*Given value)", str(error), re.DOTALL)
            if told is None:
                raise
            sys.exit(f"error: {told.group(1)}")


def main(args: ArgsType = None) -> None:
    """Runs ``lightning-moe``: ``fit``, ``validate``, ``test`` and ``predict``, with ``--config`` and overrides."""
    MoECLI(args=args)


def lightning_main() -> None:
    """Runs ``lightning``: our verbs here, all others by lightning-sdk where it is installed.

    Lightning 2.6 has no ``lightning`` command of its own; lightning-sdk has one, for its cloud. Whichever package is
    installed last owns the script.
    """
    # the verb comes first, but for options before it: `lightning job run fit` is not ours
    arguments = sys.argv[1:]
    leading = arguments if arguments and arguments[0].startswith("-") else arguments[:1]
    if not any(argument in _VERBS for argument in leading):
        try:
            from lightning_sdk.cli.entrypoint import main_cli
        except ImportError:
            pass
        else:
            main_cli()
            return
    main()
