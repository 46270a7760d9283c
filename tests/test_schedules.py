"""Numbers that change by the optimizer step: of routers, of balance losses, and of what trains at all."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_fixtures import (
    FFNS,
    ForeignModule,
    ManualModule,
    batches,
    loader,
    small_config,
    trainer_of,
)

from lightning_moe import (
    AdaptiveL1Loss,
    BalanceLossCallback,
    CosineRouter,
    CosineSchedule,
    Freeze,
    LinearSchedule,
    LoadBalancingLoss,
    MoEUpcycleCallback,
    RouterScheduleCallback,
    StepSchedule,
    UpcycleConfig,
    XMoERouter,
    ZLoss,
    moe_layers,
    record_routing,
    upcycle,
)
from lightning_moe.cli import MoECLI


@pytest.mark.parametrize("step", [0, 3, 4, 7, 9, 100])
def test_schedules_by_hand(step):
    way = min(max(step - 3, 0) / 4, 1)
    assert LinearSchedule(2.0, 4.0, 4, begin=3)(step) == pytest.approx(2 + 2 * way)
    assert CosineSchedule(2.0, 4.0, 4, begin=3)(step) == pytest.approx(3 - math.cos(math.pi * way))
    assert StepSchedule({0: 8, 4: 2, 9: 1})(step) == (8 if step < 4 else 2 if step < 9 else 1)


class Notes(Callback):
    """Notes something at every batch, once all others have had their turn."""

    def __init__(self, look):
        self.look, self.found = look, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append(self.look(pl_module))


def routers_of(module):
    return [layer.router for layer in moe_layers(module).values()]


def test_the_temperature_follows_the_optimizer_steps_and_is_what_the_scores_are_made_with(tmp_path):
    data = batches(3)
    callback = RouterScheduleCallback({"temperature": LinearSchedule(4.0, 1.0, 2)})
    seen = []

    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with torch.no_grad(), record_routing() as window:
                pl_module.task_loss(batch)
            for name, layer in moe_layers(pl_module).items():
                scores = window[name].scores
                seen.append((layer.router.temperature, scores))

    trainer_of(tmp_path, [MoEUpcycleCallback(small_config()), callback, Looks()]).fit(
        ForeignModule(lr=0.0), loader(data)
    )
    module = ForeignModule()
    upcycle(module, small_config())
    for step, temperature in enumerate((4.0, 2.5, 1.0)):
        with torch.no_grad(), record_routing() as window:
            module.task_loss(data[step])
        for place, name in enumerate(FFNS):
            found, scores = seen[2 * step + place]
            assert found == temperature
            if place == 0:  # what comes later sees other hidden states
                torch.testing.assert_close(scores, (window[name].logits / temperature).softmax(-1))


@pytest.mark.parametrize("router", [CosineRouter, XMoERouter])
def test_a_temperature_that_is_learnt_cannot_be_scheduled(router, tmp_path):
    callback = RouterScheduleCallback({"temperature": LinearSchedule(1, 0, 2)})
    config = UpcycleConfig(num_experts=4, router=router)
    with pytest.raises(MisconfigurationException, match="has no number 'temperature' to schedule"):
        trainer_of(tmp_path, [MoEUpcycleCallback(config), callback]).fit(ForeignModule(), loader(batches(1)))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_router_numbers_follow_the_optimizer_steps(tmp_path, accumulation):
    callback = RouterScheduleCallback({"noise_std": LinearSchedule(1.0, 0.0, 4), "top_k": StepSchedule({0: 3, 2: 1})})
    notes = Notes(lambda module: [(router.noise_std, router.top_k) for router in routers_of(module)])
    config = small_config(router={"normalize": False})
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(config), callback, notes], accumulate_grad_batches=accumulation)
    trainer.fit(ForeignModule(), loader(batches(5 * accumulation)))
    wanted = [[(value, top_k)] * 2 for value, top_k in zip((1.0, 0.75, 0.5, 0.25, 0.0), (3, 3, 1, 1, 1), strict=True)]
    assert notes.found == [entry for entry in wanted for _ in range(accumulation)]
    assert all(type(router.top_k) is int for router in routers_of(trainer.lightning_module))


def test_a_resumed_run_goes_on_where_the_schedule_was(tmp_path):
    def run(epochs, path=None):
        notes = Notes(lambda module: routers_of(module)[0].noise_std)
        callbacks = [MoEUpcycleCallback(small_config()), RouterScheduleCallback({"noise_std": LinearSchedule(1, 0, 8)})]
        trainer = trainer_of(tmp_path, [*callbacks, notes], max_epochs=epochs)
        trainer.fit(ForeignModule(), loader(batches(4)), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        return notes.found

    first, rest = run(1), run(2, tmp_path / "half.ckpt")
    assert first + rest == [1 - step / 8 for step in range(8)]


PARTS = {
    "routers": lambda name: ".router." in name,
    "experts": lambda name: ".experts." in name,
    "shared_experts": lambda name: ".shared_experts." in name,
    "dense": lambda name: ".mlp." not in name,
}


@pytest.mark.parametrize("kind", [ForeignModule, ManualModule])
@pytest.mark.parametrize("part", PARTS)
def test_what_is_frozen_stays_bit_for_bit_and_the_rest_trains(tmp_path, part, kind):
    """Two steps free, so that Adam has momentum, two frozen, one free."""

    def values(module):
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    notes = Notes(values)
    callback = RouterScheduleCallback(freeze=[Freeze(part, begin=2, end=4)])
    config = small_config(num_shared_experts=1, router={"normalize": False})
    options = {} if kind is ManualModule else {"gradient_clip_val": 0.1}
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(config), callback, notes], **options)
    trainer.fit(kind(), loader(batches(5)))
    found = notes.found
    assert len(found) == 5
    for name in found[0]:
        moved = [not torch.equal(found[step][name], found[step + 1][name]) for step in range(4)]
        # between the notes after steps 0..4 lie steps 1, 2, 3 and 4
        wanted = [True, not PARTS[part](name), not PARTS[part](name), True]
        if moved != [False] * 4:
            assert moved == wanted, name
    assert any(PARTS[part](name) for name in found[0])


def test_clipping_does_not_count_what_is_frozen(tmp_path):
    """The clipped norm is that of the rest alone."""
    norms = []

    class Clipped(ForeignModule):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())

    callback = RouterScheduleCallback(freeze=[Freeze("dense")])
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config()), callback], gradient_clip_val=1e-3)
    trainer.fit(Clipped(), loader(batches(2)))
    assert norms == pytest.approx([1e-3] * 2, rel=1e-3)


def test_coefficients_are_scheduled_and_weighed_by_layer(tmp_path):
    losses = [LoadBalancingLoss(0.5), ZLoss(0.25)]
    callback = BalanceLossCallback(
        losses, schedules={"load_balancing_loss": LinearSchedule(1.0, 0.0, 2)}, layer_weights=[1.0, 2.0]
    )
    notes = Notes(
        lambda module: [
            [layer.balance_losses[name].coefficient for name in ("load_balancing_loss", "z_loss")]
            for layer in moe_layers(module).values()
        ]
    )
    trainer_of(tmp_path, [MoEUpcycleCallback(small_config()), callback, notes]).fit(ForeignModule(), loader(batches(3)))
    assert notes.found == [[[0.5 * way, 0.25], [1.0 * way, 0.5]] for way in (1.0, 0.5, 0.0)]
    assert [loss.coefficient for loss in losses] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RouterScheduleCallback({"temperture": LinearSchedule(1, 0, 2)}), r"no number 'temperture' .* top_k"),
        (lambda: RouterScheduleCallback({"normalize": LinearSchedule(1, 0, 2)}), "no number 'normalize'"),
        # only what a router begins with: to schedule it would do nothing
        (lambda: RouterScheduleCallback({"init_std": LinearSchedule(1, 0, 2)}), "no number 'init_std' .* temperature"),
        (lambda: RouterScheduleCallback({"top_k": StepSchedule({0: 9})}), "gives 9 to .* wanted 1 to 5"),
        (
            lambda: BalanceLossCallback([ZLoss()], schedules={"zloss": StepSchedule({0: 1})}),
            "no loss 'zloss'",
        ),
        (lambda: BalanceLossCallback([ZLoss()], layer_weights=[1.0]), "1 numbers for 2 MoE layers"),
        (lambda: BalanceLossCallback([AdaptiveL1Loss()], layer_weights=[1.0, 1.0]), "one loss for all layers"),
    ],
)
def test_what_cannot_be_scheduled_is_refused_in_words(tmp_path, make, message):
    with pytest.raises(MisconfigurationException, match=message):
        trainer_of(tmp_path, [MoEUpcycleCallback(small_config()), make()]).fit(ForeignModule(), loader(batches(1)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (RouterScheduleCallback, "wanted values="),
        (lambda: Freeze("dense", begin=3, end=3), "0 <= begin < end"),
        (lambda: LinearSchedule(1, 0, 0), "num_steps=0"),
        (lambda: StepSchedule({5: 1}), "wanted steps from 0 on"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_from_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text(
        """
model: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}
trainer:
  logger: false
  accelerator: cpu
  callbacks:
    - class_path: RouterScheduleCallback
      init_args:
        values:
          noise_std: {class_path: LinearSchedule, init_args: {start: 1.0, end: 0.0, num_steps: 10}}
        freeze:
          - {part: dense, end: 100}
    - class_path: BalanceLossCallback
      init_args:
        losses: [{class_path: ZLoss}]
        schedules:
          z_loss: {class_path: CosineSchedule, init_args: {start: 1.0, end: 0.0, num_steps: 10}}
"""
    )
    router, balance = MoECLI(args=["--config", str(tmp_path / "run.yaml")], run=False).trainer.callbacks[:2]
    assert router.values["noise_std"](5) == 0.5
    assert router.freeze[0].holds(99)
    assert balance.schedules["z_loss"](10) == pytest.approx(0.0)
