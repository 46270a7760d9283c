"""Evaluates the model on tasks of lm-eval while it trains."""

import json
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedTokenizerBase

from lightning_moe.callbacks.base import callbacks_of
from lightning_moe.callbacks.loggers import log_scalars
from lightning_moe.callbacks.monitor import ExpertUtilizationCallback
from lightning_moe.checks import check_choice, check_whole
from lightning_moe.corpus import load_tokenizer
from lightning_moe.routing import MoEWarning, unobserved

if TYPE_CHECKING:
    from lightning_moe.live_model import LiveHFLM

FILE = "zero_shot.json"

_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class ZeroShotEvalCallback(Callback):
    """Evaluates the model in ``fit`` on tasks of lm-eval, and leaves the training as it would have been without.

    Needs the extra ``eval``. Logged as ``zero_shot/<task>/<metric>``, the standard error with ``_stderr`` behind it, to
    every logger, at the number of optimizer steps done. ``ModelCheckpoint`` and ``EarlyStopping`` may monitor them: an
    evaluation at the end of an epoch comes before its validation. A table is printed, and ``zero_shot.json`` beside the
    logs holds one entry per evaluation: step, epoch, seconds, scores.

    No callback sees the routing of an evaluation, and its time is not in ``moe/tokens_per_second``. Several ranks share
    the documents, and each must hold the whole model, as in DDP.

    Args:
        tasks: names of tasks, groups or tags of lm-eval, or of tasks in ``include_path``; loaded once, before the model
            is built.
        tokenizer: name or folder of a Hugging Face tokenizer, or the tokenizer itself; None takes the attribute
            ``tokenizer`` of the LightningModule or the datamodule.
        every_n_epochs: evaluates at the end of every n-th epoch; None does not.
        every_n_steps: evaluates after every n optimizer steps; None does not.
        at_start: whether to evaluate before the first step.
        at_end: whether to evaluate when the training ends; not twice at the same step.
        limit: documents of each task, the first ones; None takes all.
        batch_size: texts per forward, on each rank.
        include_path: directory of YAML files with tasks of one's own.
        module: attribute path of the part of the LightningModule that holds the Hugging Face model, as ``"student"``;
            None looks everywhere.
        on_error: what to do if an evaluation fails: ``"raise"``, or ``"warn"`` and train on. What can be told before
            the first step is always raised.

    Raises:
        ModuleNotFoundError: if lm-eval is not installed.
        ValueError: if an argument is not one of those above; at setup, if a task does not exist; when the fit starts,
            if the LightningModule holds no language model, or several.
        MisconfigurationException: at setup, if there is no tokenizer, or if the strategy shards the parameters.

    Example:
        >>> callback = ZeroShotEvalCallback(["piqa", "arc_easy"], every_n_steps=500, limit=200)
        >>> callback.at_start, callback.every_n_epochs
        (True, 1)
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        at_start: bool = True,
        at_end: bool = True,
        limit: int | None = None,
        batch_size: int = 8,
        include_path: str | Path | None = None,
        module: str | None = None,
        on_error: Literal["raise", "warn"] = "raise",
    ) -> None:
        # now, and not after the model is loaded
        from lightning_moe import live_model  # noqa: F401

        numbers = {"every_n_epochs": every_n_epochs, "every_n_steps": every_n_steps, "limit": limit}
        check_whole(batch_size=batch_size, **{name: value for name, value in numbers.items() if value is not None})
        check_choice("on_error", on_error, ("raise", "warn"))
        self.tasks = tasks
        self.tokenizer = tokenizer
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.at_start = at_start
        self.at_end = at_end
        self.limit = limit
        self.batch_size = batch_size
        self.include_path = include_path
        self.module = module
        self.on_error = on_error
        self.scores: dict[str, dict[str, float]] = {}
        self._loaded: dict[str, Any] = {}
        self._lm: LiveHFLM | None = None
        # optimizer steps at the last evaluation, and at the last batch
        self._evaluated = -1
        self._seen = 0

    @property
    def state_key(self) -> str:
        """Of several callbacks, each for other tasks, each saves a state of its own."""
        return self._generate_state_key(tasks=list(self.tasks), module=self.module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Loads the tasks and the tokenizer, before anything takes time."""
        if stage != "fit":
            return
        from lightning_moe.evaluation import load_tasks

        _check_strategy(trainer)
        self._tokenizer = _tokenizer(self.tokenizer, trainer, pl_module)
        if not self._loaded:
            self._loaded = load_tasks(self.tasks, self.include_path)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the model."""
        from lightning_moe.live_model import LiveHFLM, find_language_model

        _, model = find_language_model(pl_module, self.module)
        dtype = _MIXED.get(str(trainer.precision))
        self._lm = LiveHFLM(model, self._tokenizer, batch_size=self.batch_size, mixed_precision_dtype=dtype)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluates, or takes up the scores of the checkpoint that the training goes on from."""
        self._seen = trainer.global_step
        if self.scores and self._evaluated == trainer.global_step:
            _publish(trainer, pl_module, self.scores)
            return
        self._evaluated = -1
        if self.at_start:
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluates, if it is time; at the end of an epoch here, so that what looks after its validation sees it."""
        step, seen = trainer.global_step, self._seen
        self._seen = step
        # several optimizers are several steps
        is_time = self.every_n_steps is not None and step // self.every_n_steps > seen // self.every_n_steps
        if is_time or (trainer.is_last_batch and self._ends_epoch(trainer)):
            self._evaluate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluates, if the epoch had no last batch that was known as such."""
        if self._ends_epoch(trainer):
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluates what came out."""
        if self.at_end:
            self._evaluate(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Does what `teardown` does, which Lightning does not call after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the model."""
        self._lm = None

    def state_dict(self) -> dict[str, Any]:
        """The last scores, and their step."""
        return {"step": self._evaluated, "scores": self.scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the last scores, for a training that goes on at their step."""
        self._evaluated, self.scores = state_dict["step"], state_dict["scores"]

    def _ends_epoch(self, trainer: Trainer) -> bool:
        return self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._evaluated == trainer.global_step:
            return
        self._evaluated = trainer.global_step
        since = time.perf_counter()
        try:
            self.scores = self._measure(trainer)
        except Exception as error:
            if self.on_error == "raise":
                raise
            # on every rank: the others may know nothing of it
            warnings.warn(
                f"ZeroShotEvalCallback: the evaluation at step {trainer.global_step} failed, and training goes on "
                f"({type(error).__name__}: {error}).",
                MoEWarning,
                stacklevel=2,
            )
            return
        _publish(trainer, pl_module, self.scores)
        log_scalars(trainer, _flat(self.scores), trainer.global_step)
        self._report(trainer, time.perf_counter() - since)

    def _measure(self, trainer: Trainer) -> dict[str, dict[str, float]]:
        from lightning_moe.evaluation import evaluate_model, scores

        assert self._lm is not None
        with ExitStack() as stack:
            # a callback behind this one in the Trainer's list still observes the batch that has just ended
            stack.enter_context(unobserved())
            for callback in callbacks_of(trainer):
                if isinstance(callback, ExpertUtilizationCallback):
                    stack.enter_context(callback.clock_stopped())
            return scores(evaluate_model(self._lm, self._loaded, self.limit))

    def _report(self, trainer: Trainer, seconds: float) -> None:
        from lightning_moe.evaluation import as_json, score_table

        # every rank asks, one answers
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        rank_zero_info(f"Zero-shot at step {trainer.global_step} ({seconds:.0f} s):\n{score_table(self.scores)}")
        if trainer.is_global_zero:
            entry = {"step": trainer.global_step, "epoch": trainer.current_epoch, "seconds": round(seconds, 3)}
            _append(folder / FILE, as_json(entry | {"scores": self.scores}))


def _flat(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"zero_shot/{task}/{name}": value for task, found in scores.items() for name, value in found.items()}


def _publish(trainer: Trainer, pl_module: LightningModule, scores: dict[str, dict[str, float]]) -> None:
    # Into the dictionary itself, which Lightning only adds to in a run: what is logged by pl_module.log in
    # on_train_start is not seen before the end of the epoch, and in on_train_end nothing may be logged so.
    trainer.callback_metrics.update(
        {name: torch.tensor(value, device=pl_module.device) for name, value in _flat(scores).items()}
    )


def _append(path: Path, entry: dict[str, Any]) -> None:
    entries = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    # whole or not at all, if the run ends just now
    new = path.with_suffix(".new")
    new.write_text(json.dumps([*entries, entry], indent=2) + "\n")
    new.replace(path)


def _tokenizer(
    given: str | PreTrainedTokenizerBase | None, trainer: Trainer, pl_module: LightningModule
) -> PreTrainedTokenizerBase:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    places = (given, getattr(pl_module, "tokenizer", None), getattr(datamodule, "tokenizer", None))
    found = next((place for place in places if place is not None), None)
    if found is None:
        raise MisconfigurationException(
            f"ZeroShotEvalCallback: neither {type(pl_module).__name__} nor a datamodule has an attribute `tokenizer`. "
            "Pass one, as ZeroShotEvalCallback(tasks, tokenizer='my-model')."
        )
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(found) if isinstance(found, str) else found
    return tokenizer


def _check_strategy(trainer: Trainer) -> None:
    strategy = trainer.strategy
    sharded = isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))
    if sharded or (isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3):
        raise MisconfigurationException(
            f"ZeroShotEvalCallback: {type(strategy).__name__} shards the parameters, and each rank needs the whole "
            "model to evaluate its share of the documents. Evaluate the checkpoints after the training."
        )
