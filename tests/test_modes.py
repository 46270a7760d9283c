"""In every mode of a Trainer: the gradient is the written-out one, the logs are the counts, and so is the bias.

One fit per mode, with all callbacks, two loggers, a router that balances by a bias, and modules that learn with a rate
of 0; beside it a twin of the module that runs the same forwards outside of any Trainer. What `test_gradients`,
`test_monitor` and `test_balancing` check of a mode in all three respects is not here again.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jaxtyping
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_fixtures import (
    FFNS,
    DictModule,
    ForeignModule,
    GradientRecorder,
    LazyModule,
    ManualModule,
    ScaledFloat32,
    SkippingModule,
    TwoOptimizersModule,
    batches,
    loader,
    logged,
    run_script,
    same_gradients,
    trainer_of,
    word_tokenizer,
    write_corpus,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_moe import (
    ExpertBiasCallback,
    ExpertUtilizationCallback,
    KMeansRouterInit,
    LoadBalancingLoss,
    LossFreeRouter,
    MoEUpcycleCallback,
    MoEWarning,
    TextDataModule,
    UpcycleConfig,
    ZLoss,
    moe_layers,
    record_routing,
    upcycle,
)

E, RATE, BALANCE, Z = 5, 0.25, 0.3, 0.05
EVERY = 2  # a log, in optimizer steps
LOSSES = [LoadBalancingLoss(BALANCE), ZLoss(Z)]


def config(rate=RATE):
    return UpcycleConfig(num_experts=E, router=partial(LossFreeRouter, bias_rate=rate, init_std=0.5), seed=3)


# A mode, and what it makes of a list of batches


@dataclass(frozen=True)
class Forward:
    """The batches of one `training_step`, and whether it has a backward."""

    batches: list[Any]
    trains: bool = True


Steps = list[list[Forward]]
"""The forwards of each optimizer step."""


def one_by_one(data: list[Any], accumulation: int = 1) -> Steps:
    return [[Forward([batch]) for batch in data[i : i + accumulation]] for i in range(0, len(data), accumulation)]


@dataclass(frozen=True)
class Mode:
    """How something is trained: module, data and Trainer; and which forwards each optimizer step then has.

    `divisor` is what the first step's losses are divided by; `optimizers` how many step for each; `cast` and `autocast`
    make the twin compute in the Trainer's precision.
    """

    module: Callable[[], Any] = lambda: ForeignModule(lr=0.0)
    steps: Callable[[list[Any]], Steps] = one_by_one
    trainer: Callable[..., Any] = trainer_of
    fit: Callable[..., None] = lambda trainer, module, data: trainer.fit(module, loader(data))
    options: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = list
    divisor: int = 1
    optimizers: int = 1
    count: int = 4
    relative: float = 1e-6
    cast: torch.dtype | None = None
    autocast: torch.dtype | None = None


class ManyLoaders(ForeignModule):
    """Takes what a `CombinedLoader` gives: lists of batches, with None where a loader has ended."""

    def training_step(self, batch, batch_idx):
        return sum(self.task_loss(one) for one in batch if one is not None)


class ManyValidations(ForeignModule):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


class EndsEpochs(ForeignModule):
    """Ends each epoch before its third batch, and looks at something of its own after it."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None

    def on_train_epoch_end(self):
        with torch.no_grad():
            self.task_loss(batches(1, seed=7)[0])


class Descending(ForeignModule):
    """Without Adam's epsilon of 1e-8, which is 0 in float16."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class OldName(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = ForeignModule().net

    def training_step(self, batch, batch_idx):
        return self.net.inner(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def old_trainer(tmp_path, callbacks, *, logger, **options):
    loggers = pytorch_lightning.loggers
    made = [getattr(loggers, type(one).__name__)(one.save_dir, name=one.name, version=one.version) for one in logger]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pytorch_lightning.Trainer(
        default_root_dir=tmp_path, callbacks=callbacks, logger=made, accelerator="cpu", max_epochs=1, **quiet, **options
    )


def combined(mode):
    return lambda trainer, module, data: trainer.fit(module, CombinedLoader([loader(data[:3]), loader(data[3:])], mode))


def zipped(data, count, cycle=False):
    """Of two loaders, the first with three batches and the second with the others, `count` times."""
    loaders = data[:3], data[3:]
    return [[Forward([one[i % len(one)] for one in loaders if cycle or i < len(one)])] for i in range(count)]


def checkpointed(reentrant):
    made = ForeignModule(lr=0.0)
    made.net.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return made


def compiled(way):
    """In place, as a part, or the whole LightningModule; over AOTAutograd, as any backend."""
    made = Silent(lr=0.0)
    if way == "in place":
        made.net.inner.compile(backend="aot_eager")
    elif way == "part":
        made.net.inner = torch.compile(made.net.inner, backend="aot_eager")
    else:
        made = torch.compile(made, backend="aot_eager")
    return made


class Silent(ForeignModule):
    """TorchDynamo of torch 2.13 fails in Lightning's own `log`."""

    def training_step(self, batch, batch_idx):
        return self.task_loss(batch)


def validated(trainer, module, data):
    trainer.fit(module, loader(data), [loader(batches(3, seed=8)), loader(batches(1, seed=9, padding=True))])


def twice(trainer, module, data):
    trainer.fit(module, loader(data[:2]))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(data[2:]))


# float16 and bfloat16 keep 11 and 8 bits, 5e-4 and 4e-3 per rounding; the sums of the two backwards differ in order
HALF = 2e-2

MODES = {
    "dict": Mode(module=partial(DictModule, lr=0.0)),
    "none": Mode(
        module=partial(SkippingModule, lr=0.0),
        steps=lambda data: [[Forward([batch], trains=i % 2 == 0)] for i, batch in enumerate(data)],
    ),
    "lazy": Mode(module=partial(LazyModule, lr=0.0)),
    "accumulation, last window short": Mode(
        options={"accumulate_grad_batches": 3}, steps=partial(one_by_one, accumulation=3), count=11, divisor=3
    ),
    "accumulation, another in each epoch": Mode(
        options={"max_epochs": 2},
        callbacks=lambda: [GradientAccumulationScheduler({0: 2, 1: 4})],
        steps=lambda data: [*one_by_one(data, 2), *one_by_one(data, 4)],
        divisor=2,
    ),
    "two optimizers": Mode(module=partial(TwoOptimizersModule, lr=0.0), optimizers=2),
    "fp16 scaler": Mode(options={"plugins": ScaledFloat32}),
    "fp16 scaler, manual": Mode(module=partial(ManualModule, lr=0.0), options={"plugins": ScaledFloat32}),
    "fp16 scaler, two optimizers": Mode(
        module=partial(TwoOptimizersModule, lr=0.0), options={"plugins": ScaledFloat32}, optimizers=2
    ),
    "fp16 scaler, accumulation": Mode(
        options={"plugins": ScaledFloat32, "accumulate_grad_batches": 2},
        steps=partial(one_by_one, accumulation=2),
        divisor=2,
        count=8,
    ),
    "bf16-mixed": Mode(options={"precision": "bf16-mixed"}, autocast=torch.bfloat16, relative=HALF),
    "bf16-true": Mode(options={"precision": "bf16-true"}, cast=torch.bfloat16, relative=HALF),
    "16-true": Mode(
        module=partial(Descending, lr=0.0), options={"precision": "16-true"}, cast=torch.float16, relative=HALF
    ),
    "64-true": Mode(options={"precision": "64-true"}, cast=torch.float64),
    "clipping": Mode(options={"gradient_clip_val": 1e-3}),
    "clipping by value": Mode(options={"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
    "checkpointing, reentrant": Mode(module=partial(checkpointed, True)),
    "checkpointing, not reentrant": Mode(module=partial(checkpointed, False)),
    "loaders, min_size": Mode(
        module=partial(ManyLoaders, lr=0.0), fit=combined("min_size"), steps=partial(zipped, count=2), count=5
    ),
    "loaders, max_size": Mode(
        module=partial(ManyLoaders, lr=0.0), fit=combined("max_size"), steps=partial(zipped, count=3), count=5
    ),
    "loaders, max_size_cycle": Mode(
        module=partial(ManyLoaders, lr=0.0),
        fit=combined("max_size_cycle"),
        steps=partial(zipped, count=3, cycle=True),
        count=5,
    ),
    "validation and sanity check": Mode(
        module=partial(ManyValidations, lr=0.0),
        fit=validated,
        options={"val_check_interval": 1, "num_sanity_val_steps": 2},
    ),
    "overfit_batches": Mode(
        options={"overfit_batches": 2, "max_epochs": 2}, steps=lambda data: one_by_one([*data[:2], *data[:2]])
    ),
    "epochs ended early": Mode(
        module=partial(EndsEpochs, lr=0.0),
        options={"max_epochs": 2},
        steps=lambda data: one_by_one([*data[:2], *data[:2]]),
    ),
    "two fits": Mode(fit=twice),
    "pytorch_lightning": Mode(module=OldName, trainer=old_trainer),
}

# in a process without jaxtyping's checks, which TorchDynamo cannot trace
COMPILED = {way: Mode(module=partial(compiled, way), count=2) for way in ("in place", "part", "whole")}


# What it is to be


def balance_loss(routing):
    """``E * sum_e f_e P_e``, and the mean of ``logsumexp(logits)^2``, with their coefficients."""
    real = torch.ones(routing.num_tokens) if routing.token_mask is None else routing.token_mask.float()
    load = torch.tensor([sum(real[t] for t, e in pairs(routing) if e == expert) for expert in range(E)])
    share = routing.scores / routing.scores.sum(-1, keepdim=True)
    mean = (share * real.unsqueeze(1)).sum(0) / real.sum()
    z = (routing.logits.exp().sum(-1).log() ** 2 * real).sum() / real.sum()
    return BALANCE * E * (load / load.sum() * mean).sum() + Z * z


def pairs(routing):
    return list(zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True))


class Twin:
    """The same module outside of any Trainer: routes, differentiates and moves its biases by hand."""

    def __init__(self, mode):
        self.mode, self.module = mode, ForeignModule(lr=0.0)
        upcycle(self.module, config())
        if mode.cast is not None:
            self.module.to(mode.cast)

    def run(self, steps):
        """The gradients of the first step; of each step the loads by layer; and the last biases."""
        gradients, loads = {}, []
        for number, step in enumerate(steps):
            loads.append({name: [0] * E for name in FFNS})
            total = sum(self.loss(forward, loads[-1], number == 0) for forward in step)
            if number == 0:
                named = dict(self.module.named_parameters())
                gradients = dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))
            for name, layer in moe_layers(self.module).items():
                load = torch.tensor(loads[-1][name]).float()
                layer.router.expert_bias += RATE * (load.mean() - load).sign()
        return gradients, loads, {name: layer.router.expert_bias for name, layer in moe_layers(self.module).items()}

    def loss(self, forward, counts, with_gradients):
        """What the backward of this forward starts from, with the balance losses; counts its tokens."""
        total = torch.zeros(())
        for batch in forward.batches:
            autocast = torch.autocast("cpu", self.mode.autocast) if self.mode.autocast else nullcontext()
            with record_routing() as window, autocast, torch.set_grad_enabled(with_gradients and forward.trains):
                loss = self.module.task_loss(batch)
            for name, routing in window.items():
                for token, expert in pairs(routing):
                    counts[name][expert] += routing.token_mask is None or bool(routing.token_mask[token])
            if forward.trains:
                total = total + (loss + sum(map(balance_loss, window.values()))) / self.mode.divisor
        return total


def counts_logged(loads):
    """The values of a log that are ratios and numbers of counts, over the loads of some steps."""
    sums = {name: [sum(step[name][e] for step in loads) for e in range(E)] for name in FFNS}
    violations = {name: max(load) / (sum(load) / E) - 1 for name, load in sums.items()}
    entropies = {
        name: -sum(n / sum(load) * math.log(n / sum(load)) for n in load if n) / math.log(E)
        for name, load in sums.items()
    }
    dead = {name: sum(n == 0 for n in load) for name, load in sums.items()}
    values = {f"moe_max_violation/{name}": value for name, value in violations.items()}
    values |= {f"moe_load_entropy/{name}": value for name, value in entropies.items()}
    values |= {f"moe_dead_experts/{name}": value for name, value in dead.items()}
    values["moe/max_violation"] = sum(violations.values()) / len(FFNS)
    values["moe/max_violation_worst"] = max(violations.values())
    values["moe/dead_experts"] = sum(dead.values())
    return values


# float64 where they are logged by layer; Lightning's own log_dict makes float32 of the aggregates
def exact(values):
    return pytest.approx(values, rel=1e-7, abs=1e-12)


def plain(path):
    return path.replace("_orig_mod.", "")


def check(tmp_path, mode):
    data = batches(mode.count, padding=True)
    loggers = [CSVLogger(tmp_path, name="csv", version=0), TensorBoardLogger(tmp_path, name="board", version=0)]
    module, recorder = mode.module(), GradientRecorder()
    callbacks = [MoEUpcycleCallback(config(), balance_losses=LOSSES), *mode.callbacks(), recorder]
    options = dict(mode.options)
    if "plugins" in options:
        options["plugins"] = [options["plugins"]()]
    mode.fit(mode.trainer(tmp_path, callbacks, logger=loggers, log_every_n_steps=EVERY, **options), module, data)

    steps = mode.steps(data)
    gradients, loads, biases = Twin(mode).run(steps)
    # of several optimizers each unscales its own gradients, and clears them before the next one steps
    first = {plain(key): grad for step in recorder.steps[: mode.optimizers] for key, grad in step.items()}
    same_gradients(first, gradients, mode.relative)
    assert len(recorder.steps) == len(steps) * mode.optimizers
    found = {plain(key): value for key, value in module.state_dict().items()}
    for name, bias in biases.items():
        assert found[f"{name}.router.expert_bias"].equal(bias), name

    expected = {i: counts_logged(loads[i + 1 - EVERY : i + 1]) for i in range(EVERY - 1, len(steps), EVERY)}
    table = logged(loggers[0].log_dir)
    board = EventAccumulator(str(loggers[1].log_dir), size_guidance={"scalars": 0}).Reload()
    assert list(table) == list(expected)
    for step, values in expected.items():
        assert {key: table[step][key] for key in values} == exact(values)
        assert {key: {e.step: e.value for e in board.Scalars(key)}[step] for key in values} == exact(values)


@pytest.fixture
def untyped():
    """Without the run-time check of annotations, which name the classes of `lightning` alone; users do not have it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.usefixtures("untyped")
def test_gradient_counts_and_bias(tmp_path, name):
    check(tmp_path, MODES[name])


@pytest.mark.slow
@pytest.mark.parametrize("way", COMPILED)
def test_compiled(tmp_path, way):
    code = f"import test_modes as t; t.check({str(tmp_path)!r}, t.COMPILED[{way!r}]); print('checked')"
    assert "checked" in run_script(code, tmp_path, timeout=200).stdout


TWO_RANKS = """
import sys
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning_fixtures import ForeignModule, GradientRecorder, batches, trainer_of
from lightning_moe import MoEUpcycleCallback
from test_resumed_state import Save
from test_modes import LOSSES, config

torch.set_num_threads(1)
folder, made = sys.argv[1], batches(16, padding=True)


def fit(module, first=0, path=None, callbacks=()):
    trainer = trainer_of(
        folder, [MoEUpcycleCallback(config(), balance_losses=LOSSES), *callbacks], devices=2, log_every_n_steps=2,
        strategy=DDPStrategy(process_group_backend="gloo"), accumulate_grad_batches=2, use_distributed_sampler=False,
    )

    class Ranks:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return made[(2 * (index + first) + trainer.global_rank) % 16]

    trainer.fit(module, torch.utils.data.DataLoader(Ranks(), batch_size=None), ckpt_path=path)
    return trainer, {name: value.clone() for name, value in module.state_dict().items()}


recorder = GradientRecorder()
trainer, weights = fit(ForeignModule(lr=0.0), callbacks=[recorder])
trained, whole = fit(ForeignModule(), callbacks=[Save(folder + "/half.ckpt", number=4)])
resumed, again = fit(ForeignModule(seed=5), 4, folder + "/half.ckpt")
assert resumed.global_step == trained.global_step == 4
assert all(again[name].equal(value) for name, value in whole.items())
if trainer.is_global_zero:
    found = {"gradients": recorder.steps[0], "weights": weights}
    torch.save(found | {"logs": [one.logger.log_dir for one in (trainer, trained, resumed)]}, folder + "/found.pt")
"""


@pytest.mark.slow
def test_two_ranks_with_accumulation_and_a_resume_between_two_steps(tmp_path):
    run_script(TWO_RANKS, tmp_path, tmp_path, timeout=200)
    found = torch.load(tmp_path / "found.pt")
    gradients, loads, biases = Twin(Mode(divisor=4)).run(one_by_one(batches(16, padding=True), 4))
    # DDP sums the ranks last
    same_gradients(found["gradients"], gradients, 2e-6)
    for name, bias in biases.items():
        assert found["weights"][f"{name}.router.expert_bias"].equal(bias), name
    table, whole, again = map(logged, found["logs"])
    for step, values in ((1, counts_logged(loads[:2])), (3, counts_logged(loads[2:]))):
        assert {key: table[step][key] for key in values} == exact(values)
        # of the learning run, whose checkpoint was written at its first log
        assert step == 1 or {key: again[step][key] for key in values} == {key: whole[step][key] for key in values}


# Where nothing is written


@pytest.mark.parametrize("mode", ["tensor", "two optimizers", "fast_dev_run"])
def test_without_a_logger_the_aggregates_are_there_to_monitor(tmp_path, mode):
    data = batches(3, padding=True)
    module = TwoOptimizersModule(lr=0.0) if mode == "two optimizers" else ForeignModule(lr=0.0)
    # which turns a logger off
    options = {"fast_dev_run": 3, "logger": True} if mode == "fast_dev_run" else {"logger": False}
    trainer = trainer_of(
        tmp_path, [MoEUpcycleCallback(config(), balance_losses=LOSSES)], log_every_n_steps=1, **options
    )
    with pytest.warns(MoEWarning, match="no logger") if mode != "fast_dev_run" else nullcontext():
        trainer.fit(module, loader(data))
    values = counts_logged(Twin(Mode()).run(one_by_one(data))[1][2:])
    found = {key: float(trainer.callback_metrics[key]) for key in values if key.startswith("moe/")}
    assert found == exact({key: values[key] for key in found})
    assert list(tmp_path.iterdir()) == []


# What other modes alone show


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_small_steps_of_the_bias_are_not_rounded_away(tmp_path, precision):
    module = Descending(lr=0.0)
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(config(rate=1e-3))], precision=precision, max_epochs=3)
    trainer.fit(module, loader(batches(2)))
    for layer in moe_layers(module).values():
        steps = layer.router.expert_bias.double() / 1e-3
        assert steps.any()
        # a float32 rounding of each of six steps; one of bfloat16 is 4e-3
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=2e-6)


def test_the_global_window_follows_a_scheduled_accumulation(tmp_path):
    found = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses = [layer.balance_losses["load_balancing_loss"] for layer in moe_layers(pl_module).values()]
            found.append([len(loss.training_state()["recent"]) for loss in losses])

    callbacks = [
        MoEUpcycleCallback(config(), balance_losses=[LoadBalancingLoss(BALANCE, scope="global_batch")]),
        GradientAccumulationScheduler({0: 2, 1: 4}),
        Look(),
    ]
    trainer_of(tmp_path, callbacks, max_epochs=2).fit(ForeignModule(), loader(batches(4)))
    assert found == [[n, n] for n in (1, 2, 2, 2, 3, 4, 4, 4)]


def test_parts_that_were_upcycled_one_by_one_are_told_apart(tmp_path):
    class Pair(ForeignModule):
        def __init__(self):
            super().__init__(lr=0.0)
            self.other = ForeignModule(seed=4).net.inner
            for model in (self.net.inner, self.other):
                upcycle(model, config())

        def task_loss(self, batch):
            return super().task_loss(batch) + self.other(**batch).loss

    module, names = Pair(), [*FFNS, *(name.replace("net.inner", "other") for name in FFNS)]
    trainer = trainer_of(tmp_path, [ExpertBiasCallback(), ExpertUtilizationCallback()], log_every_n_steps=1)
    trainer.fit(module, loader(batches(1)))
    found = logged(trainer.logger.log_dir)[0]
    assert {f"moe_load_entropy/{name}" for name in names} <= found.keys()
    assert all(module.get_submodule(name).router.expert_bias.any() for name in names)


# lightning.pytorch and pytorch_lightning


@pytest.mark.usefixtures("untyped")
def test_our_data_in_a_trainer_of_the_other_name_says_so(tmp_path):
    data = TextDataModule(tokenizer=word_tokenizer(), data_files=write_corpus(tmp_path / "corpus.txt"), block_size=8)
    trainer = old_trainer(tmp_path, [MoEUpcycleCallback(config())], logger=[])
    with pytest.raises(TypeError, match=r"TextDataModule is .* lightning.pytorch.*import lightning.pytorch as pl"):
        trainer.fit(OldName(), datamodule=data)


@pytest.mark.usefixtures("untyped")
def test_calibration_without_a_forward_is_refused_alike(tmp_path):
    callback = MoEUpcycleCallback(UpcycleConfig(num_experts=E, router_init=KMeansRouterInit()), calibration=1)
    with pytest.raises(MisconfigurationException, match=r"OldName has no forward .* module='net.inner'"):
        old_trainer(tmp_path, [callback], logger=[]).fit(OldName(), loader(batches(1)))
