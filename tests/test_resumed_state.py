"""A run that is stopped somewhere and resumed is the uninterrupted one: weights, logs, and all that callbacks keep.

Lightning begins its loader anew in the middle of an epoch: the resumed runs get the batches that are left first.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning_fixtures import (
    ForeignModule,
    TwoOptimizersModule,
    batches,
    loader,
    logged,
    small_config,
    trainer_of,
)

from lightning_moe import (
    AdaptiveL1Loss,
    BalanceLossCallback,
    ExpertBiasCallback,
    ExpertUtilizationCallback,
    Freeze,
    LinearSchedule,
    LoadBalancingLoss,
    LossFreeRouter,
    MoEUpcycleCallback,
    RouterScheduleCallback,
    StepSchedule,
    UpcycleConfig,
    ZLoss,
    moe_layers,
)

NUM_BATCHES, STOP = 12, 5


def by_bias():
    """A bias whose rate follows a schedule, a scheduled number of the router, experts that rest for a while."""
    router = partial(LossFreeRouter, bias_rate=0.1, init_std=0.5)
    return [
        MoEUpcycleCallback(UpcycleConfig(num_experts=5, router=router, seed=3)),
        ExpertBiasCallback(schedule=StepSchedule({0: 1, 4: 0.5, 7: 0.25})),
        RouterScheduleCallback(
            {"routed_scaling": LinearSchedule(1.0, 2.0, 10)}, freeze=[Freeze("experts", begin=3, end=7)]
        ),
        ExpertUtilizationCallback(images_every_n_logs=3),
    ]


def by_losses():
    """Noise that fades, losses that keep a state and follow a schedule, a dense rest that rests for a while."""
    losses = [LoadBalancingLoss(0.3, scope="global_batch"), ZLoss(0.05), AdaptiveL1Loss(1e-3, rate=1.1)]
    return [
        MoEUpcycleCallback(small_config(router={"noise_std": 0.3})),
        BalanceLossCallback(losses, schedules={"load_balancing_loss": LinearSchedule(1.0, 0.0, 9)}),
        RouterScheduleCallback({"noise_std": LinearSchedule(0.5, 0.0, 10)}, freeze=[Freeze("dense", begin=2, end=6)]),
        ExpertUtilizationCallback(images_every_n_logs=3),
    ]


class Save(Callback):
    """Writes a checkpoint after so many batches, behind or before all other callbacks, or at the end of validation."""

    def __init__(self, path, when="on_train_batch_end", number=STOP):
        self.path, self.number, self.seen = path, number, 0
        setattr(self, when, self.save)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen = batch_idx + 1

    def save(self, trainer, *_):
        if self.seen == self.number:
            trainer.save_checkpoint(self.path)


class StopError(Exception):
    pass


class Stops(ForeignModule):
    """Fails after the forward of a batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == STOP:
            raise StopError
        return loss


@dataclass(frozen=True)
class Stop:
    """Where a run is stopped: what writes the checkpoint, before or behind the other callbacks, and in which run."""

    save: Callable[[Any], Callback] = Save
    first: bool = False
    module: Callable[[], Any] = ForeignModule
    stopping: Callable[[], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def on_exception(path):
    return OnExceptionCheckpoint(path.parent, path.stem)


# Lightning 2.6 counts one step for its loggers too many where it goes on in the middle of a batch
NO_LOGS = {"log_every_n_steps": 100, "enable_checkpointing": True}

# Lightning does not save the gradients of an accumulated step that is not finished: nothing is learnt there
STOPS = {
    "between two logs": Stop(),
    "by a callback before ours": Stop(first=True),
    "inside an accumulated step": Stop(module=lambda: ForeignModule(lr=0.0), options={"accumulate_grad_batches": 2}),
    "after validation": Stop(save=partial(Save, when="on_validation_end"), options={"val_check_interval": STOP}),
    "two optimizers": Stop(module=TwoOptimizersModule),
    "exception": Stop(save=on_exception, stopping=Stops, options=NO_LOGS),
    "exception inside an accumulated step": Stop(
        save=on_exception,
        stopping=lambda: Stops(lr=0.0),
        module=lambda: ForeignModule(lr=0.0),
        options={**NO_LOGS, "accumulate_grad_batches": 2},
    ),
}


class AtTheEnd(Callback):
    """What a checkpoint at the end of training holds."""

    def on_train_end(self, trainer, pl_module):
        self.held = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        self.numbers = [
            [
                *(getattr(layer.router, key, None) for key in ("noise_std", "routed_scaling")),
                *(loss.coefficient for loss in layer.balance_losses.values()),
            ]
            for layer in moe_layers(pl_module).values()
        ]


def flat(state, path=""):
    """Every leaf of nested states, by its path; without Python's generator, of which writing a file draws a name."""
    if isinstance(state, dict):
        return {
            k: v for key, value in state.items() if key != "python" for k, v in flat(value, f"{path}/{key}").items()
        }
    if isinstance(state, (list, tuple)):
        return {k: v for i, value in enumerate(state) for k, v in flat(value, f"{path}/{i}").items()}
    return {path: state}


def same(found, expected):
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        equal = torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
        assert equal, key


def counted(values):
    return {key: value for key, value in values.items() if "_per_second" not in key}


def run(tmp_path, callbacks, module, data, path=None, **options):
    end = AtTheEnd()
    options = {"log_every_n_steps": 2, "num_sanity_val_steps": 0, **options}
    trainer = trainer_of(tmp_path, [*callbacks, end], **options)
    with suppress(StopError):
        trainer.fit(module, loader(data), loader(data[:1]), ckpt_path=path)
    return trainer, end


# a batch that fails has drawn its noise
@pytest.mark.parametrize(
    ("name", "balanced"),
    [(name, way) for name in STOPS for way in (by_bias, by_losses) if way is by_bias or "exception" not in name],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, balanced, name):
    stop, data, path = STOPS[name], batches(NUM_BATCHES, padding=True), tmp_path / "stop.ckpt"
    saver = stop.save(path)

    def callbacks():
        return [saver, *balanced()] if stop.first else [*balanced(), saver]

    if stop.stopping is not None:
        torch.manual_seed(1)
        run(tmp_path, callbacks(), stop.stopping(), data, **stop.options)
        saver = Callback()
    torch.manual_seed(1)
    whole, end = run(tmp_path, callbacks(), stop.module(), data, **stop.options)
    torch.manual_seed(2)
    left = data[STOP:] + data[:STOP]
    again, other = run(tmp_path, balanced(), stop.module(), left, path, **stop.options)

    assert again.global_step == whole.global_step
    same(other.held["state_dict"], end.held["state_dict"])
    if "inside an accumulated step" not in name:
        same(other.held["optimizer_states"], end.held["optimizer_states"])
    assert other.numbers == end.numbers
    for callback in balanced():
        same(*(held["callbacks"].get(callback.state_key) for held in (other.held, end.held)))
    before, after = (logged(trainer.logger.log_dir) for trainer in (whole, again))
    assert after or "exception" in name
    assert {k: counted(v) for k, v in after.items()} == {k: counted(v) for k, v in before.items() if k >= min(after)}


def test_what_losses_have_learnt_is_in_a_checkpoint_written_after_the_run(tmp_path):
    def fit(epochs, path=None):
        callback = BalanceLossCallback(AdaptiveL1Loss(1e-3, top_k=1))
        callbacks = [MoEUpcycleCallback(small_config()), callback]
        trainer = trainer_of(tmp_path, callbacks, max_epochs=epochs, log_every_n_steps=1)
        trainer.fit(ForeignModule(lr=0.0), loader(batches(3)), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "after.ckpt")
        return next(iter(callback.state_dict()["losses"].values()))["multiplier"].item()

    # two experts for each token where one was wanted: up by a factor of 1.2 with every step
    assert fit(1) == pytest.approx(1.2**3, rel=1e-5)
    assert fit(2, tmp_path / "after.ckpt") == pytest.approx(1.2**6, rel=1e-5)


def test_a_second_fit_draws_no_picture_of_one_that_failed(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(ExpertUtilizationCallback, "_draw", lambda self, trainer, load, step: drawn.append(step))
    callback = ExpertUtilizationCallback(images_every_n_logs=2)
    run(tmp_path, [MoEUpcycleCallback(small_config()), callback], Stops(), batches(NUM_BATCHES))
    assert drawn == [1]
    run(tmp_path, [MoEUpcycleCallback(small_config()), callback], ForeignModule(), batches(1))
    assert drawn == [1]
