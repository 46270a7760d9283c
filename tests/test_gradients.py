"""The gradient of a step is that of the task loss plus the balance losses, as autograd finds it on the written-out sum.

The modules learn with a rate of 0, so that every step has the same weights and can be compared.
"""

import pytest
import torch
from lightning_fixtures import (
    MOE_PARAMETERS,
    BalanceSum,
    DictModule,
    ForeignModule,
    GradientRecorder,
    GroupsModule,
    LazyModule,
    ManualModule,
    ScaledFloat32,
    SkippingModule,
    TwoOptimizersModule,
    batches,
    loader,
    same_gradients,
    small_config,
    trainer_of,
    two_ranks,
)

from lightning_moe import (
    BalanceLossCallback,
    LoadBalancingLoss,
    MoEUpcycleCallback,
    MoEWarning,
    ZLoss,
    moe_layers,
    upcycle,
)

LOSSES = [LoadBalancingLoss(0.3), ZLoss(0.05)]


def trained_gradients(tmp_path, module, data, *, losses=LOSSES, manual_accumulation=1, **options):
    """What the optimizer steps of a fit with our callbacks see."""
    recorder = GradientRecorder()
    callbacks = [MoEUpcycleCallback(small_config(), balance_losses=losses), recorder]
    if manual_accumulation > 1:
        callbacks.append(BalanceLossCallback(losses, manual_accumulation=manual_accumulation))
    trainer_of(tmp_path, callbacks, **options).fit(module, loader(data))
    return recorder.steps


def explicit_gradients(data, accumulation=1, losses=LOSSES):
    """The same of the written-out sum, on a model of its own."""
    explicit = BalanceSum(ForeignModule(), small_config(), losses)
    return [explicit.gradients(data[i : i + accumulation]) for i in range(0, len(data), accumulation)]


def compare(found, expected, relative=1e-6):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        same_gradients(one, other, relative)


def test_the_comparison_can_fail():
    """Without the balance losses the routers' gradients differ by far more than the tolerance."""
    data = batches(1)
    (plain,), (balanced,) = explicit_gradients(data, losses=[]), explicit_gradients(data)
    for name in MOE_PARAMETERS:
        if name.endswith("router.gate"):
            assert (plain[name] - balanced[name]).abs().max() > 0.01 * balanced[name].abs().max()
    with pytest.raises(AssertionError):
        same_gradients(plain, balanced)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("scaled", [False, True])
def test_accumulation_and_loss_scaling(tmp_path, accumulation, scaled, padding):
    data = batches(8, padding=padding)
    options = {"plugins": [ScaledFloat32()]} if scaled else {}
    found = trained_gradients(tmp_path, ForeignModule(lr=0.0), data, accumulate_grad_batches=accumulation, **options)
    compare(found, explicit_gradients(data, accumulation))


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("accumulation", "scaled"), [(1, False), (2, True)])
def test_activation_checkpointing(tmp_path, reentrant, accumulation, scaled, padding):
    data = batches(4, padding=padding)
    module = ForeignModule(lr=0.0)
    module.net.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    module.net.inner.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(None))
    options = {"plugins": [ScaledFloat32()]} if scaled else {}
    found = trained_gradients(tmp_path, module, data, accumulate_grad_batches=accumulation, **options)
    assert len(calls) == 2 * len(data), "activations were not recomputed; the test shows nothing"
    compare(found, explicit_gradients(data, accumulation))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_manual_optimisation(tmp_path, accumulation, scaled):
    data = batches(8)
    options = {"plugins": [ScaledFloat32()]} if scaled else {}
    module = ManualModule(accumulation, lr=0.0)
    found = trained_gradients(tmp_path, module, data, manual_accumulation=accumulation, **options)
    compare(found, explicit_gradients(data, accumulation))


def test_two_optimizers(tmp_path):
    data = batches(3)
    found = trained_gradients(tmp_path, TwoOptimizersModule(lr=0.0), data)
    expected = explicit_gradients(data)
    # the first of the two steps sees all gradients; the second only what its zero_grad has left
    compare(found[::2], expected)
    for step, reference in zip(found[1::2], expected, strict=True):
        same_gradients(step, {name: reference[name] for name in step})
        assert any("layers.1.mlp.router" in name for name in step)


@pytest.mark.parametrize("kind", [DictModule, GroupsModule, LazyModule])
def test_other_modules(tmp_path, kind):
    data = batches(3)
    compare(trained_gradients(tmp_path, kind(lr=0.0), data), explicit_gradients(data))


def test_a_skipped_batch_leaves_nothing_behind(tmp_path):
    data = batches(4)
    found = [step for step in trained_gradients(tmp_path, SkippingModule(lr=0.0), data) if step]
    compare(found, explicit_gradients(data[::2]))


def test_gradient_clipping_clips_the_whole_sum(tmp_path):
    """The norm that is clipped is that of the explicit sum; clipped far, so that no gradient stays as it was."""
    data = batches(1)
    clipped = {}

    class Clipped(ForeignModule):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            clipped.update({k: p.grad.clone() for k, p in self.named_parameters()})

    trained_gradients(tmp_path, Clipped(lr=0.0), data, gradient_clip_val=1e-2)
    (expected,) = explicit_gradients(data)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    # torch adds 1e-6 to the norm before it divides: 1e-6 of a norm of about 1
    same_gradients(clipped, {k: g * 1e-2 / (norm + 1e-6) for k, g in expected.items()}, relative=2e-6)


def test_bf16_mixed(tmp_path):
    """bfloat16 keeps 8 bits: 2^-8 = 4e-3 per rounding.

    The explicit sum runs under the same autocast, so routings agree; what differs is the order of the backward's sums.
    """
    data = batches(2)
    found = trained_gradients(tmp_path, ForeignModule(lr=0.0), data, precision="bf16-mixed")
    explicit = BalanceSum(ForeignModule(), small_config(), LOSSES)
    for step, batch in zip(found, data, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            total = explicit.total(batch)
        named = dict(explicit.module.named_parameters())
        expected = dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))
        same_gradients(step, expected, relative=2e-2)


@pytest.mark.parametrize("losses", [False, []])
def test_without_balance_losses_the_gradient_is_the_plain_one(tmp_path, losses):
    data = batches(2)
    compare(
        trained_gradients(tmp_path, ForeignModule(lr=0.0), data, losses=losses), explicit_gradients(data, losses=[])
    )


def test_coefficient_zero_changes_nothing(tmp_path):
    data = batches(2)
    found = trained_gradients(tmp_path, ForeignModule(lr=0.0), data, losses=[LoadBalancingLoss(0.0), ZLoss(0.0)])
    compare(found, explicit_gradients(data, losses=[]))


def test_the_logged_loss_is_the_task_loss_alone(tmp_path):
    (batch,) = batches(1)
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config(), balance_losses=LOSSES)], log_every_n_steps=1)
    trainer.fit(ForeignModule(lr=0.0), loader([batch]))
    explicit = BalanceSum(ForeignModule(), small_config(), LOSSES)
    with torch.no_grad():
        task, total = explicit.module.task_loss(batch), explicit.total(batch)
    assert total - task > 0.1
    torch.testing.assert_close(trainer.callback_metrics["train_loss"], task, rtol=1e-6, atol=0)


def test_a_model_in_evaluation_mode_is_balanced_too(tmp_path):
    """transformers' from_pretrained leaves its model in evaluation mode, and Lightning trains it so."""
    data = batches(2)
    module = ForeignModule(lr=0.0)
    module.net.inner.eval()
    with pytest.warns(UserWarning, match="eval mode"):
        found = trained_gradients(tmp_path, module, data)
    assert not module.net.inner.training
    compare(found, explicit_gradients(data))


def test_other_uses_of_the_model_stay_out_of_the_gradient(tmp_path):
    """Sanity check, validation in the epoch, and a forward without gradients inside the training step."""
    data = batches(4)

    class Looking(ForeignModule):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.task_loss(data[0])
            return super().training_step(batch, batch_idx)

    recorder = GradientRecorder()
    callbacks = [MoEUpcycleCallback(small_config(), balance_losses=LOSSES), recorder]
    trainer = trainer_of(tmp_path, callbacks, val_check_interval=1, num_sanity_val_steps=2)
    trainer.fit(Looking(lr=0.0), loader(data), loader(batches(2, seed=9)))
    compare(recorder.steps, explicit_gradients(data))


def test_nothing_is_computed_for_balancing_where_nothing_is_trained(tmp_path):
    """In validation no layer injects: the output of a layer is not that of the injecting autograd function."""
    module = ForeignModule()
    upcycle(module, small_config())
    calls = []

    class Loud(LoadBalancingLoss):
        def forward(self, routing):
            calls.append(torch.is_grad_enabled())
            return super().forward(routing)

    for layer in moe_layers(module).values():
        layer.balance_losses["loud"] = Loud(1.0)
    trainer = trainer_of(tmp_path)
    trainer.validate(module, loader(batches(2)), verbose=False)
    assert calls == []
    module.task_loss(batches(1)[0])
    assert calls == [True, True]


def test_the_last_scale_of_one_run_does_not_reach_the_next(tmp_path):
    """After a fit with a loss scaler and accumulation, a fit without them has the plain gradient again."""
    data = batches(4)
    module = ForeignModule(lr=0.0)
    trained_gradients(tmp_path, module, data, accumulate_grad_batches=4, plugins=[ScaledFloat32()])
    assert all(layer.loss_scale == 1 and not layer.balance_losses for layer in moe_layers(module).values())
    compare(trained_gradients(tmp_path, module, data), explicit_gradients(data))


class Pair(ForeignModule):
    """Two forwards with different masks before one backward, as in preference optimisation."""

    data = batches(2, padding=True)

    def training_step(self, batch, batch_idx):
        return self.task_loss(self.data[0]) + self.task_loss(self.data[1])


def test_two_forwards_with_different_masks_before_one_backward(tmp_path):
    assert not Pair.data[0]["attention_mask"].equal(Pair.data[1]["attention_mask"])
    found = trained_gradients(tmp_path, Pair(lr=0.0), Pair.data[:1])
    (mean,) = explicit_gradients(Pair.data, 2)
    compare(found, [{name: 2 * gradient for name, gradient in mean.items()}])


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_cannot_be_exact_warns(tmp_path, reentrant):
    """Checkpointing recomputes the first forward when only the second's mask is known."""
    module = Pair(lr=0.0)
    module.net.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with pytest.warns(MoEWarning, match="recomputes the MoE layers of two forwards with different attention masks"):
        trained_gradients(tmp_path, module, Pair.data[:1])


@pytest.mark.slow
def test_two_processes():
    """DDP averages the gradients of the ranks; each rank's balance losses are those of its own micro-batch."""
    expected = explicit_gradients(batches(8, padding=True), 2)
    compare(two_ranks()["gradients"], expected)
