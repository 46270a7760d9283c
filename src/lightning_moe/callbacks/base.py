"""The seam into a foreign LightningModule: public hooks only.

Nothing here wraps ``training_step``. The balance losses live in the layers, which inject their gradient; what they must
be scaled by is known to `on_before_backward` (accumulation, loss scaler) and to a hook on the loss tensor (what the
strategy does to it later, as DeepSpeed).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_moe.layer import RoutedLayer, plain_name
from lightning_moe.native import attach_native, routed_layers, unknown_routers
from lightning_moe.randomness import kept_random_state
from lightning_moe.routing import Routing, observe_routing


def require_routed_layers(callback: Callback, pl_module: LightningModule) -> dict[str, RoutedLayer]:
    """Finds the module's MoE layers, and the MoE blocks that a Hugging Face model brings itself, by name.

    Raises:
        MisconfigurationException: if it has none.
    """
    attach_native(pl_module)
    if layers := routed_layers(pl_module):
        if len({layer.name for layer in layers.values()}) < len(layers):
            # parts of the module that were upcycled one by one; routings are recorded, and logged, by name
            for path, layer in layers.items():
                layer.name = plain_name(path)
        return layers
    place = f"{type(callback).__name__}: {type(pl_module).__name__}"
    if unknown := unknown_routers(pl_module):
        raise MisconfigurationException(
            f"{place} has MoE blocks of its own, but their router ({', '.join(unknown)}) is not one that is known. See "
            "lightning_moe.native.NATIVE_ROUTERS for those that are."
        )
    raise MisconfigurationException(
        f"{place} has no MoE layer. Upcycle the model first, or put MoEUpcycleCallback(UpcycleConfig(...)) before this "
        "callback in the Trainer's list. Models with MoE blocks of their own (Mixtral, Qwen3-MoE, OLMoE, ...) need "
        "neither."
    )


class RoutingCallback(Callback, ABC):
    """Sees each routing of its layers while a training batch runs; not in validation, nor that of another model.

    A subclass fills ``_layers`` when the fit starts, and says in ``_count`` what to make of a routing. A checkpoint
    written in the middle of a batch, as after an exception, has what was counted before it: the batch comes again.
    """

    def __init__(self) -> None:
        # by the name under which a layer records
        self._layers: dict[str, RoutedLayer] = {}
        self._stop: Callable[[], None] | None = None
        self._before: Any = None
        self._progress: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins to count."""
        self._end_observation()
        self._before = self._counts()
        self._progress = trainer.fit_loop.epoch_loop.batch_progress.current
        if self._layers:
            self._stop = observe_routing(self._observe)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops counting."""
        self._end_observation()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops counting, where the module's own ``on_train_batch_start`` has ended the epoch."""
        self._end_observation()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stops counting, and forgets the batch that was not finished."""
        self._set_counts(self._finished_counts())
        self._end_observation()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stops counting."""
        self._end_observation()

    @abstractmethod
    def _count(self, name: str, routing: Routing, losses: Mapping[str, Tensor]) -> None:
        """Takes what one forward of one layer decided; without gradients."""

    @abstractmethod
    def _counts(self) -> Any:
        """What was counted so far; later counts leave it as it is."""

    @abstractmethod
    def _set_counts(self, counts: Any) -> None:
        """Goes back to what ``_counts`` gave."""

    def _finished_counts(self) -> Any:
        # Lightning runs a batch again that had begun, and was not processed, when the checkpoint was written
        is_running = self._progress is not None and self._progress.processed < self._progress.ready
        return self._before if is_running else self._counts()

    @torch.no_grad()
    def _observe(self, name: str, routing: Routing, losses: Mapping[str, Tensor]) -> None:
        # another model may run in the same process
        if name in self._layers:
            self._count(name, routing, losses)

    def _end_observation(self) -> None:
        if self._stop is not None:
            self._stop()
            self._stop = None
        self._before = self._progress = None


def set_loss_scale(
    trainer: Trainer, pl_module: LightningModule, layers: Sequence[RoutedLayer], loss: Tensor, manual_accumulation: int
) -> None:
    """Makes the layers inject their balance losses as if these had been added to ``loss``.

    Args:
        trainer: knows accumulation and loss scaler.
        pl_module: knows whether optimisation is automatic.
        layers: whose ``loss_scale`` is set.
        loss: what `on_before_backward` got: already divided and scaled.
        manual_accumulation: what the user divides a manually optimised loss by.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    factor = 1.0 if scaler is None else float(scaler.get_scale())
    factor /= trainer.accumulate_grad_batches if pl_module.automatic_optimization else manual_accumulation

    def write(grad: Tensor) -> None:
        # 1, or what the strategy multiplied the loss by after this hook was set
        scale = grad.detach().float().reshape(()) * factor
        for layer in layers:
            layer.loss_scale.copy_(scale)

    if loss.requires_grad:
        loss.register_hook(write)


def has_training_batches(trainer: Any) -> bool:
    """Whether there is training data to take batches of: in ``fit``, or with a datamodule."""
    if trainer.state.fn == "fit":
        return bool(trainer.fit_loop._data_source.is_defined())
    return trainer.datamodule is not None


def training_batches(trainer: Any, number: int) -> list[Any]:
    """Takes the first batches of the training data, rank 0's; the order that the Trainer draws stays the same.

    Raises:
        MisconfigurationException: if this is no ``fit`` and there is no datamodule, or if the training data is not one
            loader.
    """
    fitting = trainer.state.fn == "fit"
    source = trainer.fit_loop._data_source if fitting else trainer.datamodule
    if not has_training_batches(trainer):
        raise MisconfigurationException(
            f"calibration={number} takes batches of the training data, which there are only in fit(...), or with a "
            "datamodule. Give the batches themselves, or call upcycle(model, config, calibration=[batch, ...]) before."
        )
    with kept_random_state():
        if not fitting:
            source.setup("fit")
        loader = source.dataloader() if fitting else source.train_dataloader()
        if isinstance(loader, (Mapping, list, tuple)):
            raise MisconfigurationException(
                f"calibration={number}: the training data is a {type(loader).__name__} of loaders. Give the batches."
            )
        # every rank may have data of its own, and all must make the same model
        batches: list[Any] = trainer.strategy.broadcast(list(islice(loader, number)))
        return batches


def overrides(module: nn.Module, name: str) -> bool:
    """Whether a module's class has a method of its own, that of LightningModule not counted.

    By where it is defined, and not by identity: a module may be of ``lightning.pytorch`` or ``pytorch_lightning``.
    """
    place = str(getattr(getattr(type(module), name), "__module__", ""))
    return not place.startswith(("lightning.pytorch.core.", "pytorch_lightning.core.", "torch.nn.modules.module"))


def run_after(pl_module: LightningModule, name: str, then: Callable[..., None]) -> None:
    """Calls ``then(returned, *given)`` after each call of a module's hook, until `restore_hook`."""
    # On the instance; Lightning calls the hook through the instance, and is_overridden() stays true. A callback for
    # another part of the module may have done the same before.
    original = getattr(pl_module, name)

    def hook(*given: Any) -> Any:
        made = original(*given)
        then(made, *given)
        return made

    hook._lightning_moe_original = pl_module.__dict__.get(name)  # type: ignore[attr-defined]
    pl_module.__dict__[name] = hook


def restore_hook(pl_module: LightningModule, name: str) -> None:
    """Gives a module its own hook back, however many times `run_after` was called."""
    while hasattr(hook := pl_module.__dict__.get(name), "_lightning_moe_original"):
        del pl_module.__dict__[name]
        if hook._lightning_moe_original is not None:  # type: ignore[union-attr]
            pl_module.__dict__[name] = hook._lightning_moe_original  # type: ignore[union-attr]


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's own list, which Lightning sets without declaring it."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def on(state: Any, device: torch.device | str) -> Any:
    """The same nested dictionaries with their tensors on a device."""
    if isinstance(state, Mapping):
        return {key: on(value, device) for key, value in state.items()}
    return state.to(device) if isinstance(state, Tensor) else state


def kinds(thing: Any) -> set[str]:
    """The names of an object's class and of those above it, whichever of Lightning's two packages it is of."""
    return {cls.__name__ for cls in type(thing).__mro__}


def uses_deepspeed(trainer: Any) -> bool:
    """Whether the strategy is DeepSpeed's, whose optimizers hold flattened copies of the parameters."""
    return any("DeepSpeed" in name for name in kinds(trainer.strategy))


def steps_now(trainer: Any) -> bool:
    """Whether an optimizer step follows the hook ``on_before_optimizer_step``.

    Lightning calls it with every batch where the strategy accumulates gradients itself, as DeepSpeed's does.
    """
    return not uses_deepspeed(trainer) or bool(trainer.strategy.deepspeed_engine.is_gradient_accumulation_boundary())


def steps_done(trainer: Any) -> int:
    """Optimizer steps done; ``trainer.global_step`` counts batches where the strategy accumulates itself."""
    per_step = trainer.accumulate_grad_batches if trainer.strategy.handles_gradient_accumulation else 1
    return int(trainer.global_step) // int(per_step)
