"""The command line: LightningCLI that knows this package's classes by their short names.

``lightning-moe fit --config run.yaml`` and ``lightning fit --config run.yaml`` are the same program. Its verbs that
need no Trainer are ``upcycle``, in `lightning_moe.cli_upcycle`, ``analyze``, in `lightning_moe.cli_analyze`,
``evaluate``, in `lightning_moe.cli_evaluate`, ``export``, in `lightning_moe.cli_export`, ``consolidate``, in
`lightning_moe.cli_consolidate`, ``plan``, in `lightning_moe.cli_plan`, and ``tasks``, in `lightning_moe.cli_tasks`.
"""

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry

# imported so that jsonargparse finds them by their short names: class_path: MoEModule
from lightning_moe.callbacks import (
    BalanceLossCallback,
    ExpertBiasCallback,
    ExpertUtilizationCallback,
    MoEUpcycleCallback,
    ZeroShotEvalCallback,
)
from lightning_moe.cli_analyze import main as analyze_main
from lightning_moe.cli_consolidate import main as consolidate_main
from lightning_moe.cli_errors import config_error, exit_if_refused, nearest, wants_traceback
from lightning_moe.cli_evaluate import main as evaluate_main
from lightning_moe.cli_export import main as export_main
from lightning_moe.cli_plan import main as plan_main
from lightning_moe.cli_tasks import main as tasks_main
from lightning_moe.cli_upcycle import main as upcycle_main
from lightning_moe.config import UpcycleConfig
from lightning_moe.data import TextDataModule
from lightning_moe.initializers import INITIALIZERS, ROUTER_INITIALIZERS
from lightning_moe.losses import BALANCE_LOSSES
from lightning_moe.module import MoEModule
from lightning_moe.routers import ROUTERS
from lightning_moe.strategies import (
    MoEDDPStrategy,
    MoEDeepSpeedStrategy,
    MoEFSDP2Strategy,
    MoEFSDPStrategy,
)

_CLASSES: tuple[type, ...] = (
    UpcycleConfig,
    MoEModule,
    TextDataModule,
    MoEUpcycleCallback,
    BalanceLossCallback,
    ExpertBiasCallback,
    ExpertUtilizationCallback,
    ZeroShotEvalCallback,
    MoEDDPStrategy,
    MoEFSDPStrategy,
    MoEFSDP2Strategy,
    MoEDeepSpeedStrategy,
    *ROUTERS,
    *INITIALIZERS,
    *ROUTER_INITIALIZERS,
    *BALANCE_LOSSES,
    Trainer,
)

# those that need no Trainer
_OWN_VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "upcycle": upcycle_main,
    "analyze": analyze_main,
    "evaluate": evaluate_main,
    "export": export_main,
    "consolidate": consolidate_main,
    "plan": plan_main,
    "tasks": tasks_main,
}
# what the `lightning` command of lightning-sdk does not have, or means the same by
_VERBS = ("fit", "validate", "test", "predict", *_OWN_VERBS)


class MoEArgumentParser(LightningArgumentParser):
    """LightningCLI's parser with short errors: what is wrong and what was probably meant, not every alternative."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with one clear message."""
        found = config_error(self, message, ex, _CLASSES)
        if not self.exit_on_error:
            # the parser of one class's arguments: the keys around it are known further out, and maybe other choices
            raise found from ex
        if ex is not None and wants_traceback():
            raise ex
        text = str(found)
        if verb := re.search(r"invalid choice: '([^']*)'", message):
            text = f"invalid choice: {verb[1]!r} (choose from {', '.join(_VERBS)})"
            if meant := nearest(verb[1], _VERBS):
                text += f"\n  Did you mean {meant!r}?"
        verbs = ", ".join(f"lightning-moe {verb} --help" for verb in ("fit", *_OWN_VERBS))
        sys.stderr.write(f"error: {text}\nFor all options: {verbs}\n")
        sys.exit(2)


class MoECLI(LightningCLI):
    """LightningCLI with this package's defaults: any LightningModule, any datamodule, a config saved with every run."""

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        kwargs.setdefault("parser_class", MoEArgumentParser)
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})
        kwargs.setdefault("seed_everything_default", 0)
        # LightningCLI knows the Trainer's verbs only
        verbs = " and ".join(f"lightning-moe {verb} --help" for verb in _OWN_VERBS)
        description = (
            f"Trains Mixture-of-Experts models. Further verbs: {verbs}. What is refused is told in one line; with "
            "LIGHTNING_MOE_TRACEBACK=1 in the environment, also where."
        )
        kwargs["parser_kwargs"] = {"description": description, **kwargs.get("parser_kwargs", {})}
        try:
            super().__init__(args=args, **kwargs)
        except Exception as error:
            exit_if_refused(error, getattr(self, "config", None))
            raise

    def before_instantiate_classes(self) -> None:
        """Refuses the name of a strategy that does not exist before a model is loaded."""
        strategy = self._get(self.config, "trainer", default={}).get("strategy")
        if isinstance(strategy, str):
            check_strategy(strategy)


def check_strategy(name: str) -> None:
    """Raises if Lightning, with this package, has no strategy of this name.

    Raises:
        ValueError: with the names that there are.
    """
    known = [*StrategyRegistry.available_strategies(), "auto"]
    if name.lower() not in known:
        close = nearest(name, known)
        meant = f" Did you mean {close!r}?" if close else ""
        raise ValueError(f"strategy={name!r}: there is none of this name.{meant} Known: {', '.join(sorted(known))}.")


def main(args: ArgsType = None) -> None:
    """Runs ``lightning-moe``: the Trainer's verbs, or one of its own, such as ``upcycle``."""
    arguments = sys.argv[1:] if args is None else args
    if isinstance(arguments, list) and arguments and arguments[0] in _OWN_VERBS:
        _OWN_VERBS[arguments[0]](arguments[1:])
    else:
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
