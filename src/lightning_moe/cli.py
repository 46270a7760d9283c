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
from lightning_moe.callbacks import BalanceLossCallback, ExpertUtilizationCallback, MoEUpcycleCallback
from lightning_moe.data import TextDataModule
from lightning_moe.initializers import INITIALIZERS
from lightning_moe.losses import BALANCE_LOSSES
from lightning_moe.module import MoEModule
from lightning_moe.routers import ROUTERS
from lightning_moe.upcycle import UpcycleConfig

_CLASSES: tuple[type, ...] = (
    MoEModule,
    TextDataModule,
    MoEUpcycleCallback,
    BalanceLossCallback,
    ExpertUtilizationCallback,
    *ROUTERS,
    *INITIALIZERS,
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


def _explain(message: str) -> str:
    # jsonargparse reports each alternative of a union; the one that names a class_path is what the user wrote
    problem = re.search(r"- (Problem with given class_path .*?)(?=\n    - |\n  Given value|\Z)", message, re.DOTALL)
    key = message.splitlines()[0].rstrip(":")
    text = f"{key}: {problem.group(1)}" if problem else message
    lines = [line.strip() for line in text.splitlines() if line.strip() and "Union subtypes" not in line]
    unknown = re.search(r"does not accept option '([^']+)'|Expected a dot import path string: (\S+)", text)
    if unknown:
        name = (unknown.group(1) or unknown.group(2)).rpartition(".")[2]
        known = {cls.__name__ for cls in _CLASSES} | {
            parameter for cls in (*_CLASSES, UpcycleConfig, Trainer) for parameter in inspect.signature(cls).parameters
        }
        if close := get_close_matches(name, sorted(known), n=1):
            lines.append(f"Did you mean {close[0]!r}?")
    return "\n  ".join(lines)


class MoECLI(LightningCLI):
    """LightningCLI with this package's defaults: any LightningModule, any datamodule, a config saved with every run."""

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        kwargs.setdefault("parser_class", MoEArgumentParser)
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})
        kwargs.setdefault("seed_everything_default", 0)
        super().__init__(args=args, **kwargs)


def main(args: ArgsType = None) -> None:
    """Runs ``lightning-moe``: ``fit``, ``validate``, ``test`` and ``predict``, with ``--config`` and overrides."""
    MoECLI(args=args)


def lightning_main() -> None:
    """Runs ``lightning``: our verbs here, all others by lightning-sdk where it is installed.

    Lightning 2.6 has no ``lightning`` command of its own; lightning-sdk has one, for its cloud. Whichever package is
    installed last owns the script.
    """
    if not any(argument in _VERBS for argument in sys.argv[1:]):
        try:
            from lightning_sdk.cli.entrypoint import main_cli
        except ImportError:
            pass
        else:
            main_cli()
            return
    main()
