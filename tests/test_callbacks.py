"""One callback in a plain Trainer makes a Mixture of Experts of a module that knows nothing of it, and trains it."""

import copy
import functools
import pickle

import jaxtyping
import pytest
import pytorch_lightning
import torch
from catalogue import INIT_ROWS
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_fixtures import (
    FFNS,
    MOE_PARAMETERS,
    DictModule,
    EagerModule,
    ForeignModule,
    GroupsModule,
    LazyModule,
    ManualModule,
    SkippingModule,
    TwoOptimizersModule,
    batches,
    loader,
    run_script,
    small_config,
    tiny_llama,
    trainer_of,
)
from torch.utils.data import DataLoader

from lightning_moe import (
    BalanceLossCallback,
    CentroidRouterInit,
    DropInit,
    ExpertUtilizationCallback,
    KMeansRouterInit,
    LoadBalancingLoss,
    LowRankInit,
    MoELayer,
    MoEUpcycleCallback,
    SplitInit,
    UpcycleConfig,
    ZLoss,
    moe_layers,
    record_routing,
    upcycle,
)

# as a user writes it; the other tests take one whose routers have more of an opinion
PLAIN = UpcycleConfig(num_experts=8)


def is_dense(module):
    return not moe_layers(module) and all(module.get_submodule(ffn).gate_proj.weight.shape == (12, 8) for ffn in FFNS)


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def in_optimizers(trainer):
    return {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}


class Watch(Callback):
    """What the optimizers hold and what the parameters are, when training begins."""

    def on_train_start(self, trainer, pl_module):
        named = dict(pl_module.named_parameters())
        self.optimized = {name for name, p in named.items() if id(p) in in_optimizers(trainer)}
        own = {id(p) for p in named.values()}
        self.stale = len(in_optimizers(trainer) - own)
        held = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        self.twice = len(held) - len({id(p) for p in held})
        self.before = values(pl_module)


def fitted(tmp_path, module, callback=None, data=None, **options):
    """Fits and asserts the criterion: every expert and router parameter is optimised, and moves."""
    watch = Watch()
    trainer = trainer_of(tmp_path, [callback or MoEUpcycleCallback(PLAIN), watch], **options)
    trainer.fit(module, loader(data or batches(6, batch_size=4)))
    assert set(moe_layers(module)) == set(FFNS)
    assert set(MOE_PARAMETERS) <= watch.optimized
    assert (watch.stale, watch.twice) == (0, 0)
    after = values(module)
    assert watch.before.keys() == after.keys()
    for name in MOE_PARAMETERS:
        # expert by expert: each was chosen by some token
        moved = (after[name] - watch.before[name]).flatten(1).abs().amax(1)
        assert (moved > 0).all(), f"{name}: experts {moved.eq(0).nonzero().flatten().tolist()} stayed as they were"
    return trainer


# The criterion


@pytest.mark.parametrize(
    "kind", [ForeignModule, LazyModule, ManualModule, DictModule, SkippingModule, TwoOptimizersModule, GroupsModule]
)
def test_every_expert_and_router_is_optimised_and_changes(tmp_path, kind):
    fitted(tmp_path, kind())


def test_step_zero_is_the_dense_model(tmp_path):
    data = batches(2)
    dense = ForeignModule()
    outputs = [trainer_of(tmp_path).predict(dense, loader(data))]
    outputs.append(trainer_of(tmp_path, [MoEUpcycleCallback(PLAIN)]).predict(dense, loader(data)))
    assert set(moe_layers(dense)) == set(FFNS)
    for before, after in zip(*outputs, strict=True):
        # fp32; the experts' products are added in another order
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_module_path(tmp_path):
    class Two(ForeignModule):
        def __init__(self):
            super().__init__()
            self.other = tiny_llama(5)

    module = Two()
    callback = MoEUpcycleCallback(PLAIN, module="net.inner")
    fitted(tmp_path, module, callback)
    assert callback.receipt.layers == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert {layer.name for layer in moe_layers(module).values()} == set(FFNS)


def test_module_path_into_a_lazy_module(tmp_path):
    fitted(tmp_path, LazyModule(), MoEUpcycleCallback(PLAIN, module="net.inner"))


def test_a_wrong_module_path_is_named(tmp_path):
    module = ForeignModule()
    with pytest.raises(MisconfigurationException, match=r"module='net\.outer'.*ForeignModule.*It has: net"):
        trainer_of(tmp_path, [MoEUpcycleCallback(PLAIN, module="net.outer")]).fit(module, loader(batches(1)))
    assert is_dense(module)


def test_a_module_without_ffn_is_refused(tmp_path):
    class Line(ForeignModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(3, 3)

    with pytest.raises(TypeError, match="no FFN of a known family"):
        trainer_of(tmp_path, [MoEUpcycleCallback(PLAIN)]).fit(Line(), loader(batches(1)))


def test_only_the_chosen_layers(tmp_path):
    module = ForeignModule()
    trainer_of(tmp_path, [MoEUpcycleCallback(small_config(layers="1::2"))]).fit(module, loader(batches(2)))
    assert list(moe_layers(module)) == FFNS[1:]


def test_frozen_ffns_give_frozen_experts_and_trained_routers(tmp_path):
    module = ForeignModule()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(".mlp." not in name)
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config(init=DropInit(0.5)))])
    trainer.fit(module, loader(batches(2)))
    for layer in moe_layers(module).values():
        assert not any(p.requires_grad for p in layer.experts.parameters())
        assert id(layer.router.gate) in in_optimizers(trainer)


# The same module and callback again


def test_second_fit_goes_on_with_the_same_model(tmp_path):
    module, callback = ForeignModule(), MoEUpcycleCallback(small_config())
    trainer = trainer_of(tmp_path, [callback], max_epochs=1)
    trainer.fit(module, loader(batches(2)))
    layers, after_first = moe_layers(module), values(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(batches(2)))
    assert moe_layers(module) == layers
    assert len(trainer.callbacks) == 1
    assert all(not values(module)[name].equal(after_first[name]) for name in MOE_PARAMETERS)
    fitted(tmp_path, module, MoEUpcycleCallback(PLAIN))
    assert moe_layers(module) == layers


def test_an_upcycled_module_is_left_alone(tmp_path):
    module = ForeignModule()
    upcycle(module, small_config())
    callback = MoEUpcycleCallback(UpcycleConfig(num_experts=3))
    trainer_of(tmp_path, [callback]).fit(module, loader(batches(1)))
    assert {layer.experts.num_experts for layer in moe_layers(module).values()} == {5}
    assert callback.receipt is None


# Initialisers


@pytest.mark.parametrize("init", INIT_ROWS)
@pytest.mark.parametrize("kind", [ForeignModule, EagerModule])
def test_every_initialiser_trains_and_its_checkpoint_loads(tmp_path, init, kind):
    row = INIT_ROWS[init]
    changes = {"num_experts": 4 - row.num_shared_experts, "num_shared_experts": row.num_shared_experts}

    def callback():
        config = small_config(init=row(tiny_llama, 4), router={"top_k": 2, "normalize": False}, **changes)
        return MoEUpcycleCallback(config, module="net.inner", calibration=2)

    module = kind()
    trainer = trainer_of(tmp_path, [callback()])
    trainer.fit(module, loader(batches(2)))
    trainer.save_checkpoint(tmp_path / "moe.ckpt")
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [{named[id(parameter)] for parameter in group["params"]} for group in trainer.optimizers[0].param_groups]
    assert set().union(*groups) >= trained
    if kind is EagerModule:
        assert all(f"{ffn}.experts.{part}" in groups[1] for ffn in FFNS for part in down_parts(row))
    again = kind(seed=7)
    trainer_of(tmp_path, [callback()]).fit(again, loader(batches(2)), ckpt_path=tmp_path / "moe.ckpt")
    for one, other in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def down_parts(row):
    return ("down_a", "down_b") if row.cls is LowRankInit else ("down_proj",)


class Seen(ForeignModule):
    """Notes the tokens it trains on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"])
        return super().training_step(batch, batch_idx)


def test_training_batches_calibrate_and_the_training_data_stay_as_they_are(tmp_path):
    data, orders, config = batches(6), [], small_config(num_experts=4, init=SplitInit("activation"))
    for init in (config, small_config(num_experts=4)):
        torch.manual_seed(5)
        module = Seen()
        callback = MoEUpcycleCallback(init, module="net.inner", calibration=2)
        shuffled = DataLoader(data, batch_size=None, shuffle=True)
        trainer_of(tmp_path, [callback], limit_train_batches=4).fit(module, shuffled)
        orders.append(torch.stack(module.seen))
    assert torch.equal(*orders)
    # what it is calibrated with are the first of these
    one, other = Seen(), Seen()
    callback = MoEUpcycleCallback(config, module="net.inner", calibration=2)
    trainer_of(tmp_path, [callback], limit_train_batches=0).fit(one, loader(data))
    upcycle(other.net.inner, config, calibration=data[:2])
    for ours, wanted in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, wanted)


CALIBRATED_RANKS = """
import sys

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning_fixtures import ForeignModule, batches, small_config, trainer_of

from lightning_moe import MoEUpcycleCallback, SplitInit, moe_layers

folder = sys.argv[1]
made = batches(8)


class Ranks:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return made[2 * index + trainer.global_rank]


class Save(Callback):
    # before DDP gives every rank the weights of rank 0
    def setup(self, trainer, pl_module, stage):
        experts = [layer.experts.down_proj for layer in moe_layers(pl_module).values()]
        torch.save(torch.stack([weight.detach() for weight in experts]), f"{folder}/{trainer.global_rank}.pt")


config = small_config(num_experts=4, init=SplitInit("activation"))
callback = MoEUpcycleCallback(config, module="net.inner", calibration=2)
strategy = DDPStrategy(process_group_backend="gloo")
options = {"devices": 2, "use_distributed_sampler": False, "limit_train_batches": 1}
trainer = trainer_of(folder, [callback, Save()], strategy=strategy, **options)
trainer.fit(ForeignModule(), torch.utils.data.DataLoader(Ranks(), batch_size=None))
"""


def test_ranks_with_other_data_calibrate_alike(tmp_path):
    run_script(CALIBRATED_RANKS, tmp_path, tmp_path, timeout=120)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    module, data = ForeignModule(), batches(8)
    config = small_config(num_experts=4, init=SplitInit("activation"))
    upcycle(module.net.inner, config, calibration=[data[0], data[2]])
    assert torch.equal(first, torch.stack([layer.experts.down_proj for layer in moe_layers(module).values()]))


def test_calibration_that_cannot_be_is_refused_in_words(tmp_path):
    config = small_config(num_experts=4, init=SplitInit("activation"))
    module = ForeignModule()
    with pytest.raises(MisconfigurationException, match=r"ForeignModule has no forward .* module='net\.inner'"):
        trainer_of(tmp_path, [MoEUpcycleCallback(config, calibration=2)]).fit(module, loader(batches(2)))
    callback = MoEUpcycleCallback(config, module="net.inner", calibration=2)
    with pytest.raises(MisconfigurationException, match=r"validate\(\.\.\.\) has none, nor was a checkpoint loaded"):
        trainer_of(tmp_path, [callback]).validate(ForeignModule(), loader(batches(2)))
    with pytest.raises(MisconfigurationException, match="is a list of loaders"):
        trainer_of(tmp_path, [callback]).fit(module, [loader(batches(2)), loader(batches(2))])
    with pytest.raises(ValueError, match="looks at what passes through the model"):
        trainer_of(tmp_path, [MoEUpcycleCallback(config)]).fit(module, loader(batches(2)))
    with pytest.raises(ValueError, match="calibration=0"):
        MoEUpcycleCallback(config, calibration=0)
    domains = small_config(num_experts=2, router_init=CentroidRouterInit())
    with pytest.raises(ValueError, match="CentroidRouterInit takes each batch for a domain"):
        MoEUpcycleCallback(domains, calibration=2)
    assert is_dense(module)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_checkpoint_needs_no_calibration(stage, tmp_path):
    config = small_config(num_experts=4, init=SplitInit("activation"), router_init=KMeansRouterInit())

    def callback():
        return MoEUpcycleCallback(config, module="net.inner", calibration=2)

    module, path = ForeignModule(), str(tmp_path / "trained.ckpt")
    trainer = trainer_of(tmp_path, [callback()])
    trainer.fit(module, loader(batches(3)))
    trainer.save_checkpoint(path)
    fresh = ForeignModule()
    getattr(trainer_of(tmp_path, [callback()]), stage)(fresh, loader(batches(2)), ckpt_path=path)
    trained, loaded = module.state_dict(), fresh.state_dict()
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(trained[key], loaded[key]) for key in trained)


def test_a_datamodule_has_training_batches_in_every_stage(tmp_path):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader(batches(3))

        def val_dataloader(self):
            return loader(batches(1, seed=4))

    config = small_config(num_experts=4, init=SplitInit("activation"))
    experts = []
    for stage in ("fit", "validate"):
        module = ForeignModule(lr=0.0)
        trainer = trainer_of(tmp_path, [MoEUpcycleCallback(config, module="net.inner", calibration=2)])
        getattr(trainer, stage)(module, datamodule=Data())
        experts.append(moe_layers(module)[FFNS[0]].experts.down_proj)
    assert torch.equal(*experts)


# Checkpoints


def checkpoint_of(tmp_path, kind=ForeignModule, **config):
    """Trains two steps; returns the module and the path of its checkpoint."""
    module = kind()
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config(**config))])
    trainer.fit(module, loader(batches(2)))
    trainer.save_checkpoint(tmp_path / "moe.ckpt")
    return module, str(tmp_path / "moe.ckpt")


@pytest.mark.parametrize("kind", [ForeignModule, LazyModule])
def test_a_fresh_dense_module_takes_the_checkpoint_in_every_stage(tmp_path, kind):
    trained, path = checkpoint_of(tmp_path, kind)
    data = batches(3, seed=4)
    trained.eval()
    with torch.no_grad():
        losses = torch.stack([trained.task_loss(batch) for batch in data])
        logits = [trained.net.inner(input_ids=batch["input_ids"]).logits for batch in data]
    for stage in ("validate", "test"):
        trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())])
        (found,) = getattr(trainer, stage)(kind(seed=7), loader(data), ckpt_path=path, verbose=False)
        # a float32 mean in another order
        assert found[{"validate": "val_loss", "test": "test_loss"}[stage]] == pytest.approx(
            float(losses.mean()), rel=1e-6
        )
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())])
    predicted = trainer.predict(kind(seed=7), loader(data), ckpt_path=path)
    assert all(one.equal(other) for one, other in zip(predicted, logits, strict=True))


@pytest.mark.parametrize("kind", [ForeignModule, LazyModule, EagerModule, TwoOptimizersModule])
def test_resuming_is_as_if_never_interrupted(tmp_path, kind):
    data = batches(3)
    whole, first, second = kind(), kind(), kind(seed=7)
    trainer_of(tmp_path, [MoEUpcycleCallback(small_config())], max_epochs=2).fit(whole, loader(data))
    half = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())], max_epochs=1)
    half.fit(first, loader(data))
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())], max_epochs=2)
    rest.fit(second, loader(data), ckpt_path=str(tmp_path / "half.ckpt"))
    assert rest.global_step == (12 if kind is TwoOptimizersModule else 6)
    for name, value in values(whole).items():
        assert values(second)[name].equal(value), name


def test_a_checkpoint_with_another_number_of_experts_is_refused_in_words(tmp_path):
    _, path = checkpoint_of(tmp_path)
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(UpcycleConfig(num_experts=4))])
    with pytest.raises(ValueError, match=r"has num_experts=5, this model 4\. Upcycle with the configuration"):
        trainer.validate(ForeignModule(), loader(batches(1)), ckpt_path=path, verbose=False)


def test_a_dense_checkpoint_is_refused_in_words(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.fit(ForeignModule(), loader(batches(1)))
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    for stage in ("fit", "validate"):
        trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())], max_epochs=2)
        with pytest.raises(ValueError, match=r"layers\.0\.mlp: the checkpoint is that of a dense model.*before upcyc"):
            getattr(trainer, stage)(ForeignModule(), loader(batches(1)), ckpt_path=str(tmp_path / "dense.ckpt"))


def test_the_checkpoint_is_plain(tmp_path):
    _, path = checkpoint_of(tmp_path, router={"noise_std": 0.1})
    saved = torch.load(path, weights_only=True)
    recipe = saved["lightning_moe"]
    assert list(recipe["layers"]) == FFNS
    layer = recipe["layers"][FFNS[0]]
    assert (layer["num_experts"], layer["expert_size"]) == (5, 12)
    assert layer["router"]["class_path"] == "lightning_moe.routers.top_k.TopKRouter"
    assert layer["router"]["init_args"]["noise_std"] == 0.1
    assert set(MOE_PARAMETERS) <= set(saved["state_dict"])
    assert not any("balance_losses" in key or "loss_scale" in key for key in saved["state_dict"])


# Optimizers


def test_an_eager_optimizer_is_pointed_at_the_experts(tmp_path):
    """Groups keep their settings; what replaced a dense parameter is where that parameter was."""
    module = EagerModule()
    kept = [{k: v for k, v in group.items() if k != "params"} for group in module.made.param_groups]
    fitted(tmp_path, module)
    assert [{k: v for k, v in group.items() if k != "params"} for group in module.made.param_groups] == kept
    names = {id(p): name for name, p in module.named_parameters()}
    wide, down, rest = ({names[id(p)] for p in group["params"]} for group in module.made.param_groups)
    assert wide == {f"{ffn}.{key}" for ffn in FFNS for key in ("experts.gate_up_proj", "router.gate")}
    assert down == {f"{ffn}.experts.down_proj" for ffn in FFNS}
    assert rest == set(names.values()) - wide - down


def test_an_eager_optimizer_over_all_parameters_and_its_scheduler(tmp_path):
    class Eager(ForeignModule):
        def __init__(self):
            super().__init__()
            self.made = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
            self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.made, 0.5)

        def configure_optimizers(self):
            return [self.made], [{"scheduler": self.schedule, "interval": "step"}]

    module = Eager()
    fitted(tmp_path, module)
    assert module.made.param_groups[0]["lr"] == pytest.approx(0.5**7)


def test_partly_upcycled_layers_keep_the_other_dense_parameters_in_the_optimizer(tmp_path):
    module = EagerModule()
    trainer_of(tmp_path, [MoEUpcycleCallback(small_config(layers=[1]))]).fit(module, loader(batches(1)))
    names = {id(p): name for name, p in module.named_parameters()}
    held = [names[id(p)] for group in module.made.param_groups for p in group["params"]]
    assert sorted(held) == sorted(names.values())


@pytest.mark.parametrize("missing", ["router", "experts"])
def test_an_optimizer_without_the_experts_is_refused(tmp_path, missing):
    class Forgetful(ForeignModule):
        def configure_optimizers(self):
            return torch.optim.Adam(p for name, p in self.named_parameters() if missing not in name)

    with pytest.raises(MisconfigurationException, match=rf"MoE parameters are in no optimizer.*layers.0.mlp.{missing}"):
        trainer_of(tmp_path, [MoEUpcycleCallback(small_config())]).fit(Forgetful(), loader(batches(1)))


def test_no_optimizer_at_all_is_refused(tmp_path):
    class Without(ForeignModule):
        def configure_optimizers(self):
            return None

    with pytest.warns(UserWarning, match="no optimizer"), pytest.raises(MisconfigurationException, match="6 MoE param"):
        trainer_of(tmp_path, [MoEUpcycleCallback(small_config())]).fit(Without(), loader(batches(1)))


# What it refuses


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_spawning_strategies_are_refused_before_anything_is_changed(tmp_path, strategy):
    module, callback = ForeignModule(), MoEUpcycleCallback(PLAIN)
    trainer = trainer_of(tmp_path, [callback], strategy=strategy, devices=2)
    with pytest.raises(MisconfigurationException, match=r"spawns or forks.*strategy='ddp'.*upcycle\(model, config\)"):
        callback.setup(trainer, module, "fit")
    assert is_dense(module)
    assert trainer.callbacks == [callback]
    assert "configure_optimizers" not in vars(module)


SPAWN = """
import sys
from lightning_fixtures import MOE_PARAMETERS, ForeignModule, batches, loader, small_config, trainer_of
from lightning_moe import MoEUpcycleCallback, moe_layers, upcycle

def fit(module, strategy):
    callback = MoEUpcycleCallback(small_config(), log_utilization=False)
    trainer_of(sys.argv[1], [callback], strategy=strategy, logger=False).fit(module, loader(batches(1)))

if __name__ == "__main__":
    module = ForeignModule()
    try:
        fit(module, "ddp_fork")
    except Exception as error:
        assert "spawns or forks" in str(error), error
        assert not moe_layers(module)
        print("refused")
    # the way out that the message names
    upcycle(module, small_config())
    before = {k: v.clone() for k, v in module.state_dict().items()}
    fit(module, "ddp_spawn")
    assert all(not module.state_dict()[k].equal(before[k]) for k in MOE_PARAMETERS)
    print("trained")
"""


@pytest.mark.slow
def test_a_forking_fit_is_refused_and_a_spawning_one_trains_an_upcycled_module(tmp_path):
    assert run_script(SPAWN, tmp_path, tmp_path, timeout=120).stdout.split() == ["refused", "trained"]


@pytest.mark.parametrize(
    "early",
    [
        functools.partial(EMAWeightAveraging, decay=0.5),
        WeightAveraging,
        functools.partial(StochasticWeightAveraging, swa_lrs=1e-2),
    ],
)
def test_weight_averaging_before_ours_is_refused_and_after_ours_works(tmp_path, early):
    module = ForeignModule()
    with pytest.raises(
        MisconfigurationException, match=r"stands before MoEUpcycleCallback.*Put MoEUpcycleCallback fir"
    ):
        trainer_of(tmp_path, [early(), MoEUpcycleCallback(small_config())]).fit(module, loader(batches(1)))
    assert is_dense(module)
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config()), early()], max_epochs=2)
    trainer.fit(module, loader(batches(3)), loader(batches(1)))
    assert set(moe_layers(module)) == set(FFNS)


def test_the_average_is_that_of_the_experts(tmp_path):
    """With decay 0.5 after steps 1 and 2, the average is the starting point of each expert mixed with its values."""
    seen = []

    class Seen(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(values(pl_module))

    module = ForeignModule()
    callbacks = [MoEUpcycleCallback(small_config()), Seen(), EMAWeightAveraging(decay=0.5)]
    trainer_of(tmp_path, callbacks).fit(module, loader(batches(2)))
    for name in MOE_PARAMETERS:
        # the first update of an AveragedModel copies
        torch.testing.assert_close(values(module)[name], (seen[0][name] + seen[1][name]) / 2, rtol=1e-6, atol=1e-7)


# Its parts


class Parts(Callback):
    def on_train_start(self, trainer, pl_module):
        self.kinds = [type(callback).__name__ for callback in trainer.callbacks]
        self.losses = {name: list(layer.balance_losses) for name, layer in moe_layers(pl_module).items()}
        self.coefficients = [
            loss.coefficient for layer in moe_layers(pl_module).values() for loss in layer.balance_losses.values()
        ]


def parts_of(tmp_path, *callbacks):
    parts = Parts()
    trainer = trainer_of(tmp_path, [*callbacks, parts])
    module = ForeignModule()
    trainer.fit(module, loader(batches(1)))
    assert trainer.callbacks == [*callbacks, parts]
    assert all(not layer.balance_losses for layer in moe_layers(module).values())
    return parts


def test_the_defaults_are_there_while_it_trains(tmp_path):
    parts = parts_of(tmp_path, MoEUpcycleCallback(PLAIN))
    assert parts.kinds == [
        "MoEUpcycleCallback",
        "BalanceLossCallback",
        "ExpertBiasCallback",
        "ExpertUtilizationCallback",
        "Parts",
    ]
    assert parts.losses == {name: ["load_balancing_loss", "z_loss"] for name in FFNS}
    assert parts.coefficients == [0.01, 0.001] * 2


@pytest.mark.parametrize("first", [False, True])
def test_the_users_own_callbacks_win(tmp_path, first):
    own = [BalanceLossCallback(ZLoss(0.5)), ExpertUtilizationCallback(images_every_n_logs=0)]
    ours = [MoEUpcycleCallback(PLAIN)]
    parts = parts_of(tmp_path, *(own + ours if first else ours + own))
    assert sorted(parts.kinds) == sorted(
        ["MoEUpcycleCallback", "BalanceLossCallback", "ExpertBiasCallback", "ExpertUtilizationCallback", "Parts"]
    )
    assert parts.losses == {name: ["z_loss"] for name in FFNS}
    assert parts.coefficients == [0.5, 0.5]


def test_the_parts_can_be_turned_off(tmp_path):
    parts = parts_of(tmp_path, MoEUpcycleCallback(PLAIN, balance_losses=False, log_utilization=False))
    assert parts.kinds == ["MoEUpcycleCallback", "ExpertBiasCallback", "Parts"]
    assert parts.losses == {name: [] for name in FFNS}


def test_balancing_and_monitoring_alone_on_an_upcycled_module(tmp_path):
    module = ForeignModule()
    upcycle(module, small_config())
    parts = Parts()
    callbacks = [BalanceLossCallback([LoadBalancingLoss(0.2)]), ExpertUtilizationCallback(), parts]
    trainer_of(tmp_path, callbacks).fit(module, loader(batches(1)))
    assert parts.losses == {name: ["load_balancing_loss"] for name in FFNS}


@pytest.mark.parametrize("callback", [BalanceLossCallback(), ExpertUtilizationCallback()])
def test_balancing_and_monitoring_want_moe_layers(tmp_path, callback):
    with pytest.raises(MisconfigurationException, match=f"{type(callback).__name__}: ForeignModule has no MoE layer"):
        trainer_of(tmp_path, [callback]).fit(ForeignModule(), loader(batches(1)))


def test_arguments_of_the_balance_callback_are_checked():
    with pytest.raises(ValueError, match="manual_accumulation=0"):
        BalanceLossCallback(manual_accumulation=0)
    with pytest.raises(ValueError, match="names a loss twice"):
        BalanceLossCallback([ZLoss(0.1), ZLoss(0.2)])


@pytest.mark.parametrize("kind", [ForeignModule, LazyModule])
def test_teardown_gives_the_module_its_methods_back(tmp_path, kind):
    module = kind()
    trainer_of(tmp_path, [MoEUpcycleCallback(small_config())]).fit(module, loader(batches(1)))
    assert not {"configure_model", "configure_optimizers", "training_step"} & vars(module).keys()


def test_teardown_gives_back_a_method_that_was_set_on_the_instance(tmp_path):
    module = ForeignModule()
    own = functools.partial(ForeignModule.configure_optimizers, module)
    module.configure_optimizers = own
    fitted(tmp_path, module)
    assert module.configure_optimizers is own


def test_an_exception_leaves_no_losses_and_no_wrapped_method(tmp_path):
    class Failing(ForeignModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("as users have it")
            return super().training_step(batch, batch_idx)

    module = Failing()
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())])
    with pytest.raises(RuntimeError, match="as users"):
        trainer.fit(module, loader(batches(2)))
    assert all(not layer.balance_losses for layer in moe_layers(module).values())
    assert "configure_optimizers" not in vars(module)
    assert len(trainer.callbacks) == 1


def test_training_without_the_callback_afterwards(tmp_path):
    module = ForeignModule()
    trainer_of(tmp_path, [MoEUpcycleCallback(small_config())]).fit(module, loader(batches(1)))
    before = values(module)
    trainer_of(tmp_path).fit(module, loader(batches(2)))
    assert all(not values(module)[name].equal(before[name]) for name in MOE_PARAMETERS)
    trainer_of(tmp_path).test(module, loader(batches(1)), verbose=False)


# Copies of the module


def masks_of(module, batch):
    with torch.no_grad(), record_routing() as window:
        module.task_loss(batch)
    return [routing.token_mask for routing in window.values()]


def test_a_copy_of_an_upcycled_module_sees_its_own_padding():
    first, second = batches(2, padding=True)
    module = ForeignModule()
    upcycle(module, small_config())
    masks_of(module, first)
    for mask in masks_of(copy.deepcopy(module), second):
        assert mask.equal(second["attention_mask"].flatten().bool())


def test_an_upcycled_model_can_be_pickled():
    first, second = batches(2, padding=True)
    module = ForeignModule()
    upcycle(module.net.inner, UpcycleConfig(num_experts=3))
    masks_of(module, first)
    module.net.inner = pickle.loads(pickle.dumps(module.net.inner))
    for mask in masks_of(module, second):
        assert mask.equal(second["attention_mask"].flatten().bool())


# The other name of Lightning


class OldName(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = ForeignModule().net

    def training_step(self, batch, batch_idx):
        return self.net.inner(**batch).loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.fixture
def untyped():
    """Without the run-time check of annotations, which name the classes of `lightning` alone; users do not have it."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("untyped")
def test_pytorch_lightning(tmp_path):
    module, watch = OldName(), Watch()
    trainer = pytorch_lightning.Trainer(
        callbacks=[MoEUpcycleCallback(PLAIN), watch],
        default_root_dir=tmp_path,
        logger=pytorch_lightning.loggers.CSVLogger(tmp_path),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=1,
    )
    trainer.fit(module, loader(batches(4, batch_size=4)))
    assert all(isinstance(module.get_submodule(ffn), MoELayer) for ffn in FFNS)
    assert set(MOE_PARAMETERS) <= watch.optimized
    assert all(not values(module)[name].equal(watch.before[name]) for name in MOE_PARAMETERS)
    assert "moe/max_violation" in trainer.callback_metrics


def test_checkpoints_follow_the_monitored_violation(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="moe/max_violation", every_n_train_steps=1, save_top_k=1)
    trainer = trainer_of(
        tmp_path,
        [MoEUpcycleCallback(small_config()), best],
        enable_checkpointing=True,
        log_every_n_steps=1,
        logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1),
    )
    trainer.fit(ForeignModule(), loader(batches(6)))
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("moe/max_violation")
    logged = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert len(logged) == 6
    # CSV holds the shortest text of the float32
    assert float(best.best_model_score) == pytest.approx(min(logged), rel=1e-6)
