"""Turns the model of any LightningModule into a Mixture-of-Experts model, by being in the Trainer's list."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from lightning_moe.atomic import make_atomic
from lightning_moe.calibration import Batch, check_batches, looks_at_states
from lightning_moe.callbacks.balancing import BalanceLossCallback
from lightning_moe.callbacks.base import (
    callbacks_of,
    has_training_batches,
    overrides,
    restore_hook,
    run_after,
    training_batches,
    uses_deepspeed,
)
from lightning_moe.callbacks.dashboard import write_texts
from lightning_moe.callbacks.dense_checkpoint import load_dense
from lightning_moe.callbacks.expert_bias import ExpertBiasCallback
from lightning_moe.callbacks.frozen import check_frozen
from lightning_moe.callbacks.monitor import ExpertUtilizationCallback
from lightning_moe.callbacks.neighbours import check_launcher, check_order, check_quantization
from lightning_moe.callbacks.optimizers import (
    check_trained,
    dense_sources,
    drop_frozen,
    keep_routers_in_32_bits,
    repoint,
)
from lightning_moe.callbacks.recomputing import check_recomputing, checkpoint_activations
from lightning_moe.callbacks.unreached import check_reached
from lightning_moe.checkpoints import RECIPE_KEY
from lightning_moe.checks import check_choice
from lightning_moe.config import UpcycleConfig, check_config
from lightning_moe.description import describe_models
from lightning_moe.ffn_search import find_ffns
from lightning_moe.four_bit import QUANT_TYPES
from lightning_moe.layer import MoELayer, moe_layers, plain_name
from lightning_moe.losses import BalanceLoss
from lightning_moe.quantization import Quantization, four_bit_weights, quantize_frozen
from lightning_moe.randomness import random_state, set_random_state
from lightning_moe.receipt import Receipt
from lightning_moe.routers import Router
from lightning_moe.routing import MoEWarning
from lightning_moe.saving import check_recipe, moe_recipe, unfilled
from lightning_moe.upcycle import upcycle


class MoEUpcycleCallback(Callback):
    """Upcycles a LightningModule's model before the strategy wraps it, and trains, balances and watches the experts.

    Adding this one callback to an existing Trainer is enough. The model may be built in ``__init__`` or in
    ``configure_model``; several callbacks, each with another ``module``, give each part of a model a configuration of
    its own. The callback serves ``fit`` (also from a checkpoint), ``validate``, ``test`` and ``predict``. A
    module that is upcycled already is left alone. It brings a `BalanceLossCallback`, an `ExpertBiasCallback` and an
    `ExpertUtilizationCallback` with it, unless the Trainer has its own.

    Args:
        config: what to make of the model.
        balance_losses: losses to train with, each with its coefficient; True takes those of the router's paper (see
            `Router.balance_losses`; mostly ``LoadBalancingLoss(0.01)`` and ``ZLoss(0.001)``), False none.
        log_utilization: whether to log how the experts are used.
        module: attribute path of the part of the LightningModule to upcycle, as ``"model.language_model"``; None takes
            all of it.
        calibration: batches for initialisers that look at hidden states or gradients: inputs of the model, or a number,
            which takes so many batches of the training data. They go to the ``forward`` of what is upcycled: a mapping
            as keyword arguments, of a tuple the first entry.
        activation_checkpointing: whether each block around a MoE layer, and its siblings, recomputes its activations in
            the backward instead of keeping them: less memory, for one more forward in each step.
        dense_checkpoint: what a run of the same module wrote before it was upcycled, a file or a directory of shards:
            its weights are loaded right before the upcycling. Optimizers, schedulers and steps begin anew.
        quantize: ``"nf4"`` or ``"fp4"`` freezes all but the routers, low-rank experts, shared experts and peft's
            adapters, and puts the frozen weights into 4 bit, see `quantize_frozen`; with ``LowRankInit`` this is QLoRA
            for a Mixture of Experts. None leaves them.

    Raises:
        TypeError: if ``calibration`` is neither a number nor a list of batches.
        ValueError: if ``calibration`` is a number below 1, or one where each batch is to be a domain.
        MisconfigurationException: at setup, if the Trainer's launcher would lose the trained experts (``ddp_spawn``),
            if there are no training batches to calibrate with, if another callback has copied the dense module before,
            if the dense checkpoint does not fit, or if ``BitsandbytesPrecision`` is to quantise the model, which passes
            over the experts; when training starts, if blocks that are to be recomputed are in evaluation mode.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MoEUpcycleCallback(UpcycleConfig(num_experts=8))], logger=False)
    """

    def __init__(
        self,
        config: UpcycleConfig,
        *,
        balance_losses: list[BalanceLoss] | bool = True,
        log_utilization: bool = True,
        module: str | None = None,
        calibration: Sequence[Batch] | int | None = None,
        activation_checkpointing: bool = False,
        dense_checkpoint: str | Path | None = None,
        quantize: Literal["nf4", "fp4"] | None = None,
    ) -> None:
        check_config(config)
        if quantize is not None:
            check_choice("quantize", quantize, QUANT_TYPES)
        self.config = config
        self.balance_losses = balance_losses
        self.log_utilization = log_utilization
        self.module = module
        if isinstance(calibration, int):
            if calibration < 1:
                raise ValueError(f"calibration={calibration}: wanted a number of batches, 1 or more, or the batches.")
            if config.router_init is not None and config.router_init.needs_domains:
                raise ValueError(
                    f"calibration={calibration}: {type(config.router_init).__name__} takes each batch for a domain, "
                    "and batches of the training data are none. Give a list of batches, one for each expert."
                )
        else:
            check_batches("calibration", calibration)
        self.calibration = calibration
        self.activation_checkpointing = activation_checkpointing
        self.dense_checkpoint = dense_checkpoint
        self.quantize = quantize
        self.receipt: Receipt | None = None
        self.quantization: Quantization | None = None
        self._receipt_written = False
        self._saved_receipt: dict[str, Any] | None = None
        self._sources: dict[int, tuple[weakref.ref[nn.Parameter], str]] = {}
        self._parts: list[Callback] = []
        self._parts_state: dict[str, Any] = {}
        self._random_state: dict[str, Any] | None = None
        self._unchecked: dict[str, MoELayer] = {}
        self._unfilled = False
        self._keep_activations: Callable[[], None] | None = None
        self._fit_started = False

    @property
    def state_key(self) -> str:
        """Of several callbacks, each for another ``module``, each saves a state of its own."""
        return super().state_key if self.module is None else self._generate_state_key(module=self.module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Upcycles the model, now or, if it is built in ``configure_model``, right after that."""
        check_launcher(trainer, pl_module)
        check_order(trainer, self)
        make_atomic(trainer)
        check_quantization(trainer, self.quantize)
        self._add_parts(trainer)
        if self._is_lazy(pl_module):
            run_after(pl_module, "configure_model", lambda _: self._prepare(trainer, pl_module))
        else:
            self._prepare(trainer, pl_module)
        if stage == "fit":
            run_after(pl_module, "configure_optimizers", lambda made: self._set_up_optimizers(pl_module, made))
            # for ModelCheckpoint(save_weights_only=True), which asks no callback
            run_after(pl_module, "on_save_checkpoint", lambda _, saved: self._write_recipe(pl_module, saved))
        # before the weights are loaded, and after the module's own hook, which may change names
        run_after(pl_module, "on_load_checkpoint", lambda _, loaded: _check_loaded(pl_module, loaded))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes sure that every expert and router is trained."""
        self._fit_started = True
        if self._random_state is not None:
            # before the loader of a new epoch draws its order
            set_random_state(self._random_state)
        if self.receipt is not None and not self._receipt_written:
            router = pl_module.get_submodule(f"{self._prefix()}{self.receipt.layers[0]}.router")
            assert isinstance(router, Router)
            write_texts(trainer, self.config, router, self.receipt, self.module)
            self._receipt_written = True
        if self.activation_checkpointing:
            check_recomputing(pl_module)
        self._unchecked = moe_layers(pl_module)
        check_frozen(self._unchecked, self.receipt)
        for layer in self._unchecked.values():
            # from_pretrained leaves a model in evaluation mode and Lightning keeps it so: a router's noise would be off
            layer.train()
        if uses_deepspeed(trainer):
            # its optimizers hold flattened copies, made from the parameters that configure_optimizers named
            self._unchecked = {}
            return
        check_trained(self._unchecked, trainer.optimizers)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Warns, at the first step only, of layers that the loss does not reach."""
        if self._unchecked:
            self._unchecked = check_reached(pl_module, self._unchecked, optimizer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes the recipe of the MoE layers, and the receipt, into the checkpoint, as plain Python."""
        self._write_recipe(pl_module, checkpoint)

    def _write_recipe(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # another callback may have written the receipt of another part
        written = checkpoint.get(RECIPE_KEY, {})
        receipt = self._saved_receipt if self.receipt is None else self.receipt.to_dict()
        receipts = written.get("receipts", {}) | ({} if receipt is None else {self.module or "": receipt})
        models = describe_models(pl_module)
        checkpoint[RECIPE_KEY] = moe_recipe(pl_module, self.config.family) | {
            "receipts": receipts,
            "models": models,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the receipt of a model that was upcycled in an earlier run."""
        # with strict loading, which is the default, all weights come from it
        self._unfilled = self._unfilled and not pl_module.strict_loading
        self._saved_receipt = checkpoint.get(RECIPE_KEY, {}).get("receipts", {}).get(self.module or "")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes sure that the experts have weights."""
        self._require_weights(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes sure that the experts have weights."""
        self._require_weights(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes sure that the experts have weights."""
        self._require_weights(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The state of the random generators, which Lightning does not save.

        With it, dropout and router noise go on as if the run had never stopped. Of several ranks it is that of rank 0.
        """
        # the parts that this callback brought save their own state, but after the run they are gone from the Trainer
        return {"random_state": random_state(), "parts": {} if self._parts else self._parts_state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the saved state until the first batch."""
        self._random_state = state_dict.get("random_state")
        if self._fit_started and self._random_state is not None:
            # sharded strategies read the checkpoint after on_fit_start
            set_random_state(self._random_state)
        for part in self._parts:
            if state := state_dict.get("parts", {}).get(type(part).__name__):
                part.load_state_dict(state)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restores the random state in the middle of an epoch, after all that setting up a run draws."""
        if self._random_state is not None:
            if batch_idx > 0:
                set_random_state(self._random_state)
            self._random_state = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Does what `teardown` does, which Lightning does not call after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the module its own methods back and takes the parts out of the Trainer."""
        for name in ("configure_model", "configure_optimizers", "on_save_checkpoint", "on_load_checkpoint"):
            restore_hook(pl_module, name)
        if self._keep_activations is not None:
            self._keep_activations()
            self._keep_activations = None
        if self._parts:
            self._parts_state = {type(part).__name__: part.state_dict() for part in self._parts}
        for part in self._parts:
            part.teardown(trainer, pl_module, stage)
            if part in callbacks_of(trainer):
                callbacks_of(trainer).remove(part)
        self._parts, self._unchecked, self._fit_started = [], {}, False

    def _add_parts(self, trainer: Trainer) -> None:
        # Right behind this callback, so that their setup and every later hook run as if the user had listed them.
        wanted: list[Callback] = []
        if self.balance_losses and not _has(trainer, BalanceLossCallback):
            wanted.append(BalanceLossCallback(None if self.balance_losses is True else self.balance_losses))
        if not _has(trainer, ExpertBiasCallback):
            wanted.append(ExpertBiasCallback(warn=False))
        if self.log_utilization and not _has(trainer, ExpertUtilizationCallback):
            wanted.append(ExpertUtilizationCallback())
        place = callbacks_of(trainer).index(self) + 1
        callbacks_of(trainer)[place:place] = wanted
        self._parts = wanted

    def _set_up_optimizers(self, pl_module: LightningModule, made: Any) -> None:
        repoint(pl_module, made, self._sources)
        if self.quantize is not None:
            drop_frozen(made)
        keep_routers_in_32_bits(pl_module, made)

    def _is_lazy(self, pl_module: LightningModule) -> bool:
        # whether the model is yet to be built, in configure_model
        if not overrides(pl_module, "configure_model") or moe_layers(pl_module):
            return False
        try:
            find_ffns(pl_module.get_submodule(self.module or ""), self.config.family)
        except (AttributeError, TypeError):
            return True
        return False

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._upcycle(trainer, pl_module)
        if self.activation_checkpointing and self._keep_activations is None:
            self._keep_activations = checkpoint_activations(pl_module)

    def _upcycle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        target: nn.Module = pl_module
        if self.module is not None:
            try:
                target = pl_module.get_submodule(self.module)
            except AttributeError as error:
                names = ", ".join(name for name, _ in pl_module.named_children())
                raise MisconfigurationException(
                    f"module={self.module!r}: {type(pl_module).__name__} has no such part ({error}). It has: {names}."
                ) from error
        if layers := moe_layers(target):
            rank_zero_info(
                f"MoEUpcycleCallback: the model has MoE layers already ({len(layers)}) and is left as it is."
            )
        else:
            self._make_layers(trainer, pl_module, target)
        self._quantize(target)

    def _quantize(self, target: nn.Module) -> None:
        if self.quantize is None:
            return
        if present := {weight.quant_type for weight in four_bit_weights(target).values()}:
            if present != {self.quantize}:
                rank_zero_warn(
                    f"quantize={self.quantize!r} has no effect: the model is in {', '.join(sorted(present))} already.",
                    category=MoEWarning,
                )
            return
        self.quantization = quantize_frozen(target, quant_type=self.quantize)
        rank_zero_info(str(self.quantization))

    def _make_layers(self, trainer: Trainer, pl_module: LightningModule, target: nn.Module) -> None:
        if self.dense_checkpoint is not None:
            load_dense(pl_module, self.dense_checkpoint)
        self._sources.update(dense_sources(target, self.config.family, self._prefix()))
        if self._needs_training_batches() and trainer.state.fn != "fit" and not has_training_batches(trainer):
            # a checkpoint may hold all of it; whether there is one is known only when it is loaded
            upcycle(target, unfilled(self.config))
            self._unfilled = True
        else:
            self.receipt = upcycle(target, self.config, calibration=self._calibration(trainer, target))
            rank_zero_info(str(self.receipt))
        self._receipt_written = False
        for name, layer in moe_layers(pl_module).items():
            layer.name = plain_name(name)

    def _prefix(self) -> str:
        return "" if self.module is None else f"{self.module}."

    def _needs_training_batches(self) -> bool:
        looks = looks_at_states(self.config.init) or looks_at_states(self.config.router_init)
        return looks and isinstance(self.calibration, int)

    def _require_weights(self, trainer: Trainer) -> None:
        if self._unfilled:
            stage = trainer.state.fn.value if trainer.state.fn else "this"
            raise MisconfigurationException(
                f"calibration={self.calibration} takes batches of the training data, and {stage}(...) has "
                "none, nor was a checkpoint loaded: the experts are zeros. Give ckpt_path=, a datamodule, or the "
                "batches themselves."
            )

    def _calibration(self, trainer: Trainer, target: nn.Module) -> Sequence[Batch] | None:
        if not (looks_at_states(self.config.init) or looks_at_states(self.config.router_init)):
            return None
        if self.calibration is not None and not overrides(target, "forward"):
            inner = next((name for name, part in target.named_modules() if hasattr(part, "from_pretrained")), "model")
            raise MisconfigurationException(
                f"calibration: {type(target).__name__} has no forward that could take a batch. Name the part that has "
                f"one: MoEUpcycleCallback(..., module={inner!r})."
            )
        batches = self.calibration
        return training_batches(trainer, batches) if isinstance(batches, int) else batches


def _has(trainer: Trainer, kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks_of(trainer))


def _check_loaded(pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
    # sharded strategies have loaded the weights by now, and taken them out
    if pl_module.strict_loading and "state_dict" in checkpoint:
        check_recipe(pl_module, checkpoint.get(RECIPE_KEY), checkpoint["state_dict"])
