"""Balancing by a bias, and load balancing beyond one micro-batch: in the loss, in the Trainer, on two ranks."""

import dataclasses
import functools
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning_fixtures import (
    FFNS,
    MOE_PARAMETERS,
    ForeignModule,
    GradientRecorder,
    ManualModule,
    batches,
    loader,
    run_script,
    same_gradients,
    trainer_of,
)

from lightning_moe import (
    AdaptiveL1Loss,
    BalanceLossCallback,
    ExpertBiasCallback,
    LoadBalancingLoss,
    LossFreeRouter,
    MoEUpcycleCallback,
    MoEWarning,
    ReMoERouter,
    Routing,
    StepSchedule,
    TCMoERouter,
    TopKRouter,
    UpcycleConfig,
    load_balancing_loss,
    moe_layers,
    record_routing,
    upcycle,
)
from lightning_moe.losses import sequence_load_balancing_loss
from lightning_moe.metrics import max_violation
from lightning_moe.routing import expert_load

E = 5
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}

# --- the bias ---


def skewed_stream(count, num_tokens=256, hidden_size=16):
    """Hidden states with a common direction, so that a fixed gate prefers the same experts for nearly all of them."""
    generator = torch.Generator().manual_seed(5)
    common = torch.randn(hidden_size, generator=generator)
    for _ in range(count):
        yield 1.5 * common + torch.randn(num_tokens, hidden_size, generator=generator)


@pytest.mark.parametrize(("bias_rate", "balanced"), [(1e-3, True), (0.0, False)])
def test_loss_free_balancing_on_a_skewed_stream(bias_rate, balanced):
    router = LossFreeRouter(16, 8, top_k=2, bias_rate=bias_rate, init_std=0.1)
    violations = []
    with torch.no_grad():
        for x in skewed_stream(550):
            load = expert_load(router(x))
            violations.append(max_violation(load).item())
            router.adapt(load)
    assert violations[0] > 1.5
    # after 500 updates, the mean of 50 batches
    late = sum(violations[500:]) / 50
    assert late < 0.2 if balanced else late > 1.5


def bias_config(**options):
    router = functools.partial(LossFreeRouter, **{"bias_rate": 0.25, "init_std": 0.5, **options})
    return UpcycleConfig(num_experts=E, router=router, seed=3)


def biases(module):
    return {name: layer.router.expert_bias.clone() for name, layer in moe_layers(module).items()}


def by_hand(data, accumulation, schedule=lambda step: 1):
    """The biases after each step of a model that does not learn: counts by hand, one update per step."""
    module = ForeignModule(lr=0.0)
    upcycle(module, bias_config())
    steps = []
    for start in range(0, len(data), accumulation):
        counts = {name: torch.zeros(E) for name in FFNS}
        for batch in data[start : start + accumulation]:
            with record_routing() as window, torch.no_grad():
                module.task_loss(batch)
            for name, routing in window.items():
                for token, expert in zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True):
                    if routing.token_mask is None or routing.token_mask[token]:
                        counts[name][expert] += 1
        for name, layer in moe_layers(module).items():
            rate = 0.25 * schedule(len(steps))
            layer.router.expert_bias += rate * torch.sign(counts[name].mean() - counts[name])
        steps.append(biases(module))
    return steps


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_bias_moves_once_per_step_by_all_that_was_chosen(tmp_path, accumulation, manual):
    data = batches(8, padding=True)
    module = ManualModule(accumulation, lr=0.0) if manual else ForeignModule(lr=0.0)
    options = {} if manual else {"accumulate_grad_batches": accumulation}
    trainer_of(tmp_path, [MoEUpcycleCallback(bias_config())], **options).fit(module, loader(data))
    wanted = by_hand(data, accumulation)[-1]
    assert any(bias.any() for bias in wanted.values())
    for name, bias in biases(module).items():
        assert torch.equal(bias, wanted[name]), name


def test_the_bias_rate_follows_a_schedule(tmp_path):
    data, module, schedule = batches(4), ForeignModule(lr=0.0), StepSchedule({0: 1, 1: 0.5, 3: 0})
    callbacks = [MoEUpcycleCallback(bias_config()), ExpertBiasCallback(schedule=schedule)]
    trainer_of(tmp_path, callbacks).fit(module, loader(data))
    steps = by_hand(data, 1, schedule)
    for name, bias in biases(module).items():
        assert torch.equal(bias, steps[-1][name])
        assert not torch.equal(bias, by_hand(data, 1)[-1][name])


def test_the_bias_counts_once_under_activation_checkpointing(tmp_path):
    data = batches(4)
    module = ForeignModule(lr=0.0)
    module.net.inner.gradient_checkpointing_enable()
    trainer_of(tmp_path, [MoEUpcycleCallback(bias_config())]).fit(module, loader(data))
    for name, bias in biases(module).items():
        assert torch.equal(bias, by_hand(data, 1)[-1][name])


class Save(Callback):
    """Writes a checkpoint at a step, as ModelCheckpoint does, while the run goes on."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_the_bias_goes_on_where_the_checkpoint_was_written(tmp_path):
    data, path = batches(7), tmp_path / "step4.ckpt"
    whole, resumed = ForeignModule(lr=0.0), ForeignModule(lr=0.0)
    trainer_of(tmp_path, [MoEUpcycleCallback(bias_config()), Save(path, 4)]).fit(whole, loader(data))
    saved = torch.load(path, weights_only=True)["state_dict"]
    trainer_of(tmp_path, [MoEUpcycleCallback(bias_config())]).fit(
        # Lightning begins the loader anew: the fifth step of the resumed run sees its first batch
        resumed,
        loader(data[4:] + data[:4]),
        ckpt_path=path,
    )
    for name, bias in biases(whole).items():
        assert not torch.equal(bias, saved[f"{name}.router.expert_bias"])
        assert torch.equal(bias, biases(resumed)[name])


def test_a_bias_callback_without_such_a_router_says_so(tmp_path):
    module = ForeignModule()
    upcycle(module, UpcycleConfig(num_experts=E))
    with pytest.warns(MoEWarning, match="ExpertBiasCallback has no effect"):
        trainer_of(tmp_path, [ExpertBiasCallback()]).fit(module, loader(batches(1)))


# --- the adaptive L1 loss ---


def test_the_multiplier_steers_the_number_of_experts(tmp_path):
    # one number per token and expert, on where it is above zero: the multiplier is to switch half of them off
    data = batches(8)
    module = ForeignModule(lr=3e-2)
    config = UpcycleConfig(num_experts=E, router=functools.partial(ReMoERouter, top_k=1, init_std=0.5), seed=3)
    loss = AdaptiveL1Loss(1e-3, top_k=1, rate=1.2)

    def active():
        with record_routing() as window, torch.no_grad():
            module.task_loss(data[0])
        return sum(len(routing.token_ids) / routing.num_tokens for routing in window.values()) / len(window)

    callback = MoEUpcycleCallback(config, balance_losses=[loss])
    trainer_of(tmp_path, [callback], max_epochs=1).fit(module, loader(data))
    before = active()
    trainer_of(tmp_path, [callback], max_epochs=25).fit(module, loader(data))
    assert before > 1.8
    assert 0.6 < active() < 1.4


def test_the_multiplier_moves_by_its_rate_and_by_all_layers_together():
    def routing(num_on):
        scores = torch.zeros(4, E)
        scores.view(-1)[:num_on] = 1.0
        token_ids, expert_ids = scores.nonzero(as_tuple=True)
        return Routing(token_ids, expert_ids, torch.ones(num_on), scores, scores)

    loss = AdaptiveL1Loss(1e-8, top_k=2, rate=1.5)
    for on, wanted in (((9, 10), 1.5), ((6, 7), 1.0), ((8, 8), 1.0)):
        for count in on:  # two layers of four tokens, wanted are two experts for each: sixteen
            loss(routing(count))
        loss.step()
        assert loss.multiplier.item() == pytest.approx(wanted)
    with torch.no_grad():
        loss.eval()(routing(20))  # validation is not to steer
    loss.step()
    assert loss.multiplier.item() == pytest.approx(1.0)


def test_the_multiplier_is_in_the_checkpoint(tmp_path):
    config = UpcycleConfig(num_experts=E, router=functools.partial(ReMoERouter, top_k=1, init_std=0.5), seed=3)

    def run(steps, checkpoint=None):
        look, save = Look("adaptive_l1_loss"), Save(tmp_path / f"{steps}.ckpt", 3)
        callbacks = [MoEUpcycleCallback(config), look, save]
        trainer_of(tmp_path, callbacks).fit(ForeignModule(lr=0.0), loader(batches(steps)), ckpt_path=checkpoint)
        assert look.losses[0] is look.losses[1]  # one for all layers
        return look.losses[0].multiplier.item()

    assert run(7) == pytest.approx(1.2**7, rel=1e-5)
    assert run(7, tmp_path / "7.ckpt") == pytest.approx(1.2**7, rel=1e-5)


def test_the_multiplier_is_in_a_checkpoint_written_after_the_run(tmp_path):
    config = UpcycleConfig(num_experts=E, router=functools.partial(ReMoERouter, top_k=1, init_std=0.5), seed=3)
    path, look = tmp_path / "after.ckpt", Look("adaptive_l1_loss")
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(config)], max_epochs=1)
    trainer.fit(ForeignModule(lr=0.0), loader(batches(4)))
    trainer.save_checkpoint(path)
    resumed = trainer_of(tmp_path, [MoEUpcycleCallback(config), look], max_epochs=2)
    resumed.fit(ForeignModule(lr=0.0), loader(batches(4)), ckpt_path=path)
    assert look.losses[0].multiplier.item() == pytest.approx(1.2**8, rel=1e-5)


class Look(Callback):
    """Keeps a loss of every layer at the end of training, before the losses are taken off."""

    def __init__(self, name):
        self.name, self.losses = name, []

    def on_train_end(self, trainer, pl_module):
        self.losses = [layer.balance_losses[self.name] for layer in moe_layers(pl_module).values()]


# --- the scopes of load balancing ---


def all_on(expert, num_tokens=8, num_experts=4, requires_grad=False):
    logits = torch.full((num_tokens, num_experts), -30.0)
    logits[:, expert] = 0
    logits.requires_grad_(requires_grad)
    scores = logits.softmax(-1)
    ids = torch.full((num_tokens,), expert)
    return Routing(torch.arange(num_tokens), ids, torch.ones(num_tokens), logits, scores, None, 1)


def test_domain_pure_micro_batches_that_are_balanced_together():
    by_step, by_batch = LoadBalancingLoss(scope="global_batch"), LoadBalancingLoss(scope="micro_batch")
    by_step.window = 4
    domains = [all_on(expert) for expert in range(4)]
    for routing in domains:  # the first step fills the window
        by_step(routing)
    assert [by_step(routing).item() for routing in domains] == pytest.approx([1.0] * 4)
    assert [by_batch(routing).item() for routing in domains] == pytest.approx([4.0] * 4)


def test_a_sequence_is_balanced_by_itself():
    routings = [all_on(expert, num_tokens=3) for expert in (1, 1, 2, 0)]
    logits = torch.cat([r.logits for r in routings])
    ids = torch.cat([r.expert_ids for r in routings])
    mask = torch.ones(12, dtype=torch.bool)
    mask[4:6] = False  # one real token in the second sequence
    mask[9:] = False  # none in the last
    joined = Routing(torch.arange(12), ids, torch.ones(12), logits, logits.softmax(-1), mask, 1, sequence_length=3)
    assert LoadBalancingLoss(scope="sequence")(joined).item() == pytest.approx(4.0)
    spread = dataclasses.replace(joined, logits=torch.zeros(12, 4), scores=torch.full((12, 4), 0.25), token_mask=None)
    spread = dataclasses.replace(spread, expert_ids=torch.arange(12) % 4)
    assert LoadBalancingLoss(scope="sequence")(spread).item() == pytest.approx(1.0)


def test_the_sequence_scope_is_the_mean_of_the_sequences():
    router = TopKRouter(6, E, init_std=1.0)
    x = torch.randn(4 * 7, 6)
    routing = dataclasses.replace(router(x), sequence_length=7)
    wanted = sum(load_balancing_loss(router(part)) for part in x.split(7)) / 4
    loss = sequence_load_balancing_loss(routing)
    torch.testing.assert_close(loss, wanted, **FLOAT32)
    (grad,), (wanted_grad,) = torch.autograd.grad(loss, router.gate), torch.autograd.grad(wanted, router.gate)
    torch.testing.assert_close(grad, wanted_grad, **FLOAT32)
    assert not torch.allclose(loss, load_balancing_loss(router(x)))


def test_the_sequence_scope_wants_whole_sequences():
    with pytest.raises(ValueError, match="12 tokens with sequence_length=5 are no whole sequences"):
        sequence_load_balancing_loss(dataclasses.replace(all_on(1, num_tokens=12), sequence_length=5))


def test_both_signs_of_an_expert_are_balanced_together():
    router = TCMoERouter(6, E, top_k=3, init_std=1.0, negative_offset=0.0, null_offset=0.0)
    routing = router(torch.randn(7, 6))
    assert bool((routing.expert_ids >= E).any())  # null choices, which do not count
    p = routing.scores[:, : 2 * E]
    p = (p / p.sum(1, keepdim=True)).view(7, 2, E).sum(1)
    counts = [sum(1 for e in routing.expert_ids.tolist() if e == expert) for expert in range(E)]
    wanted = E * sum(count / sum(counts) * p[:, e].mean() for e, count in enumerate(counts))
    torch.testing.assert_close(load_balancing_loss(routing), wanted, **FLOAT32)
    in_one = sequence_load_balancing_loss(dataclasses.replace(routing, sequence_length=7))
    torch.testing.assert_close(in_one, wanted, **FLOAT32)


def test_null_choices_count_with_their_mean():
    # by hand: 3 experts, 2 null ones; load 2, 1, 0 and 3, 0, of which each null counts 1.5
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.1]])
    ids = torch.tensor([0, 0, 1, 3, 3, 3])
    routing = Routing(torch.zeros(6, dtype=torch.int64), ids, torch.ones(6), scores, scores, num_ffn_experts=3)
    wanted = 5 * (2 * 0.1 + 1 * 0.2 + 0 * 0.3 + 1.5 * 0.3 + 1.5 * 0.1) / 6
    assert load_balancing_loss(routing).item() == pytest.approx(wanted, rel=1e-6)


GLOBAL = [LoadBalancingLoss(0.5, scope="global_batch")]


def config(**changes):
    return UpcycleConfig(num_experts=E, router=functools.partial(TopKRouter, init_std=0.5), seed=3, **changes)


def joined(data):
    return {key: torch.cat([batch[key] for batch in data]) for key in data[0]}


def recorded(tmp_path, data, losses=GLOBAL, epochs=1, **options):
    recorder, module = GradientRecorder(), ForeignModule(lr=0.0)
    callback = MoEUpcycleCallback(config(), balance_losses=losses)
    trainer_of(tmp_path, [callback, recorder], max_epochs=epochs, **options).fit(module, loader(data))
    return recorder.steps


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    """Once the window is full: the counts of the micro-batches to come are those of the step before."""
    data = batches(4, batch_size=2)
    (whole,) = recorded(tmp_path, [joined(data)])
    first, second = recorded(tmp_path, data, epochs=2, accumulate_grad_batches=4)
    same_gradients(second, whole, 2e-6)
    # the comparison can fail: by micro-batch, and in the first step, it is another gradient
    (by_batch,) = recorded(tmp_path, data, [LoadBalancingLoss(0.5)], accumulate_grad_batches=4)
    for other in (first, by_batch):
        gates = [name for name in MOE_PARAMETERS if name.endswith("gate")]
        assert any((other[n] - whole[n]).abs().max() > 1e-2 * whole[n].abs().max() for n in gates)


GLOBAL_ON_TWO_RANKS = """
import pickle, sys
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning_fixtures import ForeignModule, GradientRecorder, batches, trainer_of
from lightning_moe import MoEUpcycleCallback, moe_layers
import test_balancing

torch.set_num_threads(1)
folder, made = sys.argv[1], batches(4, padding=True)
found = {}
for name, callback in {
    "global": MoEUpcycleCallback(test_balancing.config(), balance_losses=test_balancing.GLOBAL),
    "bias": MoEUpcycleCallback(test_balancing.bias_config()),
}.items():
    recorder = GradientRecorder()
    trainer = trainer_of(
        folder, [callback, recorder], strategy=DDPStrategy(process_group_backend="gloo"), devices=2, logger=False,
        use_distributed_sampler=False,
    )

    class Ranks:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return made[2 * index + trainer.global_rank]

    module = ForeignModule(lr=0.0)
    trainer.fit(module, torch.utils.data.DataLoader(Ranks(), batch_size=None))
    found[name] = recorder.steps
    found[name + " biases"] = {
        key: layer.router.expert_bias for key, layer in moe_layers(module).items() if layer.router.adapts_to_load
    }
    found["rank"] = trainer.global_rank
with open(f"{folder}/{found['rank']}.pkl", "wb") as file:
    pickle.dump(found, file)
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_script(GLOBAL_ON_TWO_RANKS, folder, folder, timeout=120)
    return [pickle.loads(Path(folder, f"{rank}.pkl").read_bytes()) for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_give_the_balance_gradient_of_the_whole_batch(two_ranks):
    data = batches(4, padding=True)
    for step, found in enumerate(two_ranks[0]["global"]):
        module = ForeignModule(lr=0.0)
        upcycle(module, config())
        mine = data[2 * step : 2 * step + 2]
        # the mean of the ranks' task losses, as DDP has it; the balance loss of all tokens together
        losses = [module.task_loss(batch) for batch in mine]
        with record_routing() as window:
            module.task_loss(joined(mine))
        total = sum(losses) / 2 + sum(0.5 * load_balancing_loss(routing) for routing in window.values())
        named = dict(module.named_parameters())
        wanted = dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))
        same_gradients(found, wanted, 2e-6)


@pytest.mark.slow
def test_two_ranks_have_the_bias_of_one(two_ranks):
    data = batches(4, padding=True)
    wanted = by_hand(data, 2)[-1]
    for found in two_ranks:
        for name, bias in found["bias biases"].items():
            assert torch.equal(bias, wanted[name])


def test_each_layer_has_a_window_of_its_own(tmp_path):
    module, callback = ForeignModule(lr=0.0), BalanceLossCallback(GLOBAL)
    upcycle(module, config())
    look = Look("load_balancing_loss")
    trainer_of(tmp_path, [callback, look], accumulate_grad_batches=2).fit(module, loader(batches(4)))
    assert look.losses[0] is not look.losses[1]
    assert [loss.window for loss in look.losses] == [2, 2]
    assert not torch.equal(*(loss.training_state()["recent"] for loss in look.losses))
