"""Changes routers, and what of the model trains, by the optimizer step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from lightning_moe.callbacks.base import require_routed_layers, steps_done, uses_deepspeed
from lightning_moe.layer import RoutedLayer
from lightning_moe.schedules import AnySchedule

# numbers of a router that say how large it is
_SIZES = {"hidden_size", "hidden_dim", "num_experts", "in_features", "out_features"}

Part = Literal["routers", "experts", "shared_experts", "dense"]


@dataclass(frozen=True)
class Freeze:
    """A part of the model that does not train for some optimizer steps.

    Args:
        part: ``"routers"``, ``"experts"``, ``"shared_experts"`` or ``"dense"``, all that is in no MoE layer.
        begin: the first optimizer step that leaves it as it is.
        end: the first that changes it again; None is never.

    Raises:
        ValueError: if the part is not known, or the steps are no interval.

    Example:
        >>> Freeze("dense", end=1000).holds(999), Freeze("dense", end=1000).holds(1000)
        (True, False)
    """

    part: Part
    begin: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise ValueError(f"part={self.part!r}: wanted routers, experts, shared_experts or dense.")
        if self.begin < 0 or (self.end is not None and self.end <= self.begin):
            raise ValueError(f"begin={self.begin}, end={self.end}: wanted 0 <= begin < end, or end=None.")

    def holds(self, step: int) -> bool:
        """Whether it is frozen after ``step`` optimizer steps."""
        return self.begin <= step and (self.end is None or step < self.end)


class RouterScheduleCallback(Callback):
    """Sets numbers of every router by the optimizer step, and freezes parts of the model for a while.

    A router's numbers are its arguments: ``temperature``, ``noise_std`` or ``top_k`` of `TopKRouter`, ``bias_rate`` of
    `LossFreeRouter`; not what only says how it begins, as ``init_std``, or the temperature of a router that learns it.
    A frozen part loses its gradients before each optimizer step, so neither gradient nor momentum nor weight decay
    moves it and no clipping counts it; ``requires_grad`` stays, so that it works under DDP. Put this callback behind
    `MoEUpcycleCallback`.

    Args:
        values: name of a router's argument to its schedule: any function of the number of optimizer steps done.
        freeze: what does not train, and when.

    Raises:
        ValueError: if there is neither.
        MisconfigurationException: when training starts, if a router has no such number, or if something is to be frozen
            under DeepSpeed, whose optimizers see no gradients of single parameters.

    Example:
        >>> from lightning_moe import LinearSchedule
        >>> callback = RouterScheduleCallback(
        ...     {"noise_std": LinearSchedule(1.0, 0.0, num_steps=1000)}, freeze=[Freeze("dense", end=200)]
        ... )
    """

    def __init__(self, values: Mapping[str, AnySchedule] | None = None, freeze: Sequence[Freeze] = ()) -> None:
        if not values and not freeze:
            raise ValueError(
                'RouterScheduleCallback: wanted values={"top_k": ...}, or freeze=[Freeze("dense", end=100)].'
            )
        self.values = values
        self.freeze = freeze
        self._layers: dict[str, RoutedLayer] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks whether every router has these numbers and takes all that they will be."""
        self._layers = require_routed_layers(self, pl_module)
        if self.freeze and uses_deepspeed(trainer):
            raise MisconfigurationException(
                "RouterScheduleCallback: freeze has no effect under DeepSpeed, whose optimizers hold flattened copies. "
                "Set requires_grad=False on what shall never train, before fit."
            )
        for name, layer in self._layers.items():
            for key in self.values or {}:
                self._check(name, layer, key)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets the numbers for this step."""
        for key, schedule in (self.values or {}).items():
            value = schedule(steps_done(trainer))
            for name, layer in self._layers.items():
                setattr(layer.router, key, self._fitting(name, layer, key, value))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Takes the gradients of what is frozen."""
        parts = {freeze.part for freeze in self.freeze if freeze.holds(steps_done(trainer))}
        for part in sorted(parts):
            for parameter in self._parameters(pl_module, part):
                parameter.grad = None

    def _check(self, name: str, layer: RoutedLayer, key: str) -> None:
        value = getattr(layer.router, key, None)
        idle = getattr(layer.router, "only_at_start", ())
        if isinstance(value, bool) or not isinstance(value, (int, float)) or key in idle:
            numbers = [k for k, v in vars(layer.router).items() if type(v) in (int, float) and not k.startswith("_")]
            known = sorted(set(numbers) - _SIZES - set(idle))
            raise MisconfigurationException(
                f"values: {name}.router, a {type(layer.router).__name__}, has no number {key!r} to schedule. It has: "
                f"{', '.join(known) or 'none'}."
            )

    def _fitting(self, name: str, layer: RoutedLayer, key: str, value: int | float) -> int | float:
        if not isinstance(getattr(layer.router, key), int):
            return float(value)
        whole = round(value)
        if key == "top_k" and not 1 <= whole <= layer.num_experts:
            raise MisconfigurationException(
                f"values: the schedule of top_k gives {value} to {name}; wanted 1 to {layer.num_experts}."
            )
        return whole

    def _parameters(self, pl_module: LightningModule, part: Part) -> list[nn.Parameter]:
        layers = self._layers.values()
        places = {
            "routers": [layer.router for layer in layers],
            "experts": [layer.experts for layer in layers],
            "shared_experts": [layer.shared_experts for layer in layers if layer.shared_experts is not None],
        }
        if part == "dense":
            moe = {id(p) for modules in places.values() for module in modules for p in module.parameters()}
            return [p for p in pl_module.parameters() if id(p) not in moe]
        return [p for module in places[part] for p in module.parameters()]
