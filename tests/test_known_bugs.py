"""The defects of the seed and the bugs that other frameworks shipped, each a test that fails where it is made again.

Where it takes a line, the mistake itself is computed beside the right thing, so that the test can tell them apart.
"""

import copy
import math
import re
import subprocess
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import reference
import torch
from catalogue import FAMILY_ROWS, ROUTER_ROWS, Block, TwoLinear, logits
from lightning.pytorch import LightningModule
from lightning_fixtures import (
    FFNS,
    MOE_PARAMETERS,
    VOCABULARY,
    BalanceSum,
    ForeignModule,
    GradientRecorder,
    batches,
    loader,
    run_script,
    same_gradients,
    small_config,
    trainer_of,
    two_ranks,
)
from test_examples import CONFIGS
from test_scale import OVERLAYS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lightning_moe import (
    BALANCE_LOSSES,
    ROUTERS,
    AdaptiveL1Loss,
    BalanceLossCallback,
    CosineRouter,
    DropInit,
    Experts,
    LoadBalancingLoss,
    MoELayer,
    MoEUpcycleCallback,
    MoEWarning,
    Routing,
    TCMoERouter,
    Tokens,
    TopKRouter,
    UpcycleConfig,
    ZLoss,
    expert_load,
    load_balancing_loss,
    load_moe,
    moe_layers,
    record_routing,
    save_moe,
    upcycle,
    z_loss,
)
from lightning_moe.metrics import (
    ExpertCoactivation,
    MaxViolation,
    OutputSimilarity,
    RouterSaturation,
    RoutingChangeRate,
    RoutingEntropy,
)
from lightning_moe.routing import observe_routing

ROOT = Path(__file__).parents[1]
E = 5
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}
not_causal = pytest.mark.filterwarnings("ignore:.*routing depend on later tokens")


def routing_from(logits, top_k, mask=None):
    scores = logits.softmax(-1)
    expert_ids = scores.topk(top_k).indices
    token_ids = torch.arange(len(logits)).repeat_interleave(top_k)
    weights = scores.gather(1, expert_ids).flatten()
    return Routing(token_ids, expert_ids.flatten(), weights, logits, scores, mask, top_k)


def collapsed(expert, num_tokens=8, num_experts=4):
    logits = torch.full((num_tokens, num_experts), -30.0)
    logits[:, expert] = 0
    return routing_from(logits, 1)


@contextmanager
def observed(loss):
    """Keeps the values of one balance loss; a test that fails inside leaves no observer to the next."""
    seen = []
    stop = observe_routing(lambda name, routing, losses: seen.append(losses[loss].item()))
    try:
        yield seen
    finally:
        stop()


# --- the twelve defects of the seed ---


def test_seed_01_pretrained_ffns_are_not_drawn_anew():
    dense = FAMILY_ROWS["llama"].build()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(std=0.3)
    moe = copy.deepcopy(dense)
    upcycle(moe, UpcycleConfig(num_experts=E))
    for name, layer in moe_layers(moe).items():
        ffn = dense.get_submodule(name)
        for expert in range(E):
            assert torch.equal(
                layer.experts.gate_up_proj[expert], torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight])
            )
            assert torch.equal(layer.experts.down_proj[expert], ffn.down_proj.weight)


def test_seed_02_the_balance_loss_counts_every_choice_and_the_whole_batch():
    # first choices are even, second choices all go to expert 3
    logits = torch.tensor([[2.0, -9, -9, 1], [-9, 2, -9, 1], [-9, -9, 2, 1]])
    routing = routing_from(logits, 2)
    by_first_choice = routing_from(logits, 1)
    p = routing.scores.mean(0)
    assert load_balancing_loss(routing).item() == pytest.approx(4 * (p * torch.tensor([1, 1, 1, 3]) / 6).sum().item())
    assert load_balancing_loss(by_first_choice) < load_balancing_loss(routing)
    # two sequences, each on an expert of its own: even together, and each for itself as uneven as can be
    both = torch.cat([collapsed(0).logits, collapsed(1).logits])[:, :2]
    assert load_balancing_loss(routing_from(both, 1)).item() == pytest.approx(1.0, abs=1e-4)


def test_seed_03_two_assignments_of_one_token_to_one_expert_add_up():
    torch.manual_seed(0)
    router = TCMoERouter(8, 2, top_k=4, num_null_choices=1, negative_offset=0.0, null_offset=30.0, init_std=1.0)
    layer = MoELayer(router, Experts(2, 8, 12))
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(3, 8)
    routing = router(x)
    pairs = list(zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True))
    assert len(pairs) == 2 * len(set(pairs))  # every expert with both signs
    wanted = torch.zeros(3, 8)
    for n, (token, expert) in enumerate(pairs):
        gate, up = (layer.experts.gate_up_proj[expert] @ x[token]).chunk(2)
        wanted[token] += routing.weights[n] * (layer.experts.down_proj[expert] @ (nn.functional.silu(gate) * up))
    torch.testing.assert_close(layer(x.unsqueeze(0))[0], wanted, **FLOAT32)


@not_causal
@pytest.mark.parametrize("cls", [cls for cls in ROUTERS if cls.learned], ids=lambda cls: cls.__name__)
def test_seed_04_every_layer_has_its_own_router(cls):
    name = next(name for name, row in ROUTER_ROWS.items() if row.cls is cls and row.arguments.get("init_std", 1) > 0)
    model = FAMILY_ROWS["llama"].build()
    upcycle(model, UpcycleConfig(num_experts=E, router=ROUTER_ROWS[name], seed=0))
    first, second = (layer.router.state_dict() for layer in moe_layers(model).values())
    assert any(not torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("loss", BALANCE_LOSSES, ids=lambda loss: loss.__name__)
def test_seed_05_the_balance_losses_can_be_seen_without_gradients(loss):
    name = {"LoadLoss": "noisy_top_k", "NullRewardLoss": "null_experts"}.get(loss.__name__, "top_k_3")
    layer = MoELayer(ROUTER_ROWS[name](6, E).eval(), Experts(E, 6, 8), name="mlp")
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter)
    layer.balance_losses["loss"] = loss(1.0)
    x = torch.randn(2, 7, 6)
    with observed("loss") as seen:
        layer(x)
        with torch.no_grad():
            layer(x)
    assert seen[0] == pytest.approx(seen[1], rel=1e-6)
    assert seen[0] > 0


@not_causal
@pytest.mark.parametrize("name", ROUTER_ROWS)
def test_seed_06_the_state_dict_holds_all_that_routing_depends_on(name, tmp_path):
    model = FAMILY_ROWS["llama"].build()
    upcycle(model, UpcycleConfig(num_experts=E, router=ROUTER_ROWS[name], seed=0))
    for layer in moe_layers(model).values():
        for tensor in (*layer.router.parameters(), *layer.router.buffers()):
            if tensor.is_floating_point():
                tensor.data.uniform_(-1, 1)  # no longer what its seed gives
    save_moe(model, tmp_path)
    batch = FAMILY_ROWS["llama"].batch()
    assert torch.equal(logits(load_moe(tmp_path), batch), logits(model.eval(), batch))


class Validated(ForeignModule):
    """Keeps what each layer's losses are in validation, and what they are in truth."""

    def __init__(self):
        super().__init__()
        self.seen, self.truth = [], []

    def validation_step(self, batch, batch_idx):
        assert not torch.is_grad_enabled()
        with record_routing() as window, observed("load_balancing_loss") as seen:
            super().validation_step(batch, batch_idx)
        self.seen += seen
        self.truth += [reference.load_balancing_loss(routing).item() for routing in window.values()]


def test_seed_05_validation_during_training_sees_the_balance_losses(tmp_path):
    module = Validated()
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())], num_sanity_val_steps=0)
    trainer.fit(module, loader(batches(2)), loader(batches(3, padding=True, seed=9)))
    assert module.seen == pytest.approx(module.truth, rel=1e-5)
    assert len(module.seen) == 3 * len(FFNS)
    assert min(module.seen) > 0.5


class Tower(ForeignModule):
    """An encoder of which some layer's hidden states are used: -1 are those behind the last, -2 those before it."""

    def __init__(self, layer):
        super().__init__()
        self.net = nn.ModuleList(Block(TwoLinear(8, 12)) for _ in range(2))
        self.head, self.layer = nn.Linear(8, 3), layer

    def training_step(self, batch, batch_idx):
        hidden = [batch]
        for block in self.net:
            hidden.append(block(hidden[-1]))
        return self.head(hidden[self.layer].mean(1)).square().sum()


@pytest.mark.parametrize(("layer", "unused"), [(-1, False), (-2, True)])
def test_seed_07_a_layer_that_the_loss_does_not_reach_is_told_of(tmp_path, layer, unused, recwarn):
    module, callback = Tower(layer), MoEUpcycleCallback(small_config())
    if unused:
        with pytest.warns(MoEWarning, match=r"1 MoE layer got no gradient in the first step: .*net\.1\.ffn"):
            trainer_of(tmp_path, [callback]).fit(module, loader(images()))
    else:
        trainer_of(tmp_path, [callback]).fit(module, loader(images()))
        assert not [w for w in recwarn if issubclass(w.category, MoEWarning)]
    assert len(moe_layers(module)) == 2


def images(count=3):
    return [torch.randn(2, 4, 8) for _ in range(count)]


def test_seed_07_the_way_out_of_the_message_is_one(tmp_path, recwarn):
    module = Tower(-2)
    trainer_of(tmp_path, [MoEUpcycleCallback(small_config(layers=":-1"))]).fit(module, loader(images()))
    assert list(moe_layers(module)) == ["net.0.ffn"]
    assert not [w for w in recwarn if issubclass(w.category, MoEWarning)]


class FrozenTower(Tower):
    """Its FFNs, and so its experts, stay as they are; the routers learn."""

    def __init__(self, layer):
        super().__init__(layer)
        self.net.requires_grad_(False)


class WatchedTower(Tower):
    """Adds a loss on the routing itself: the router has a gradient then, and the experts have none."""

    def training_step(self, batch, batch_idx):
        with record_routing() as window:
            loss = super().training_step(batch, batch_idx)
        return loss + sum(z_loss(routing) for routing in window.values())


class SkippingTower(Tower):
    """Has no loss for the first batch, so that nothing has a gradient at the first step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if batch_idx else None


@pytest.mark.parametrize("kind", [FrozenTower, WatchedTower, SkippingTower])
@pytest.mark.parametrize(("layer", "told"), [(-1, 0), (-2, 1)])
def test_seed_07_what_else_has_a_gradient_does_not_matter(tmp_path, kind, layer, told, recwarn):
    options = {"accumulate_grad_batches": 2} if kind is WatchedTower else {}
    with warnings.catch_warnings():
        warnings.simplefilter("default", MoEWarning)
        # frozen copies would be warned of
        callback = MoEUpcycleCallback(small_config(init=DropInit(0.5)))
        trainer_of(tmp_path, [callback], **options).fit(kind(layer), loader(images(4)))
    # once, and not at every step
    assert len([w for w in recwarn if issubclass(w.category, MoEWarning)]) == told


class Turns(Tower):
    """Two towers with an optimizer each, which train in turns: each step one half of the model has no gradient."""

    def __init__(self):
        super().__init__(-1)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        optimizer = optimizers[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(self.net[batch_idx % 2](batch).square().sum())
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=1e-3) for part in self.net]


def test_seed_07_a_layer_is_judged_by_the_step_of_its_own_optimizer(tmp_path, recwarn):
    trainer_of(tmp_path, [MoEUpcycleCallback(small_config())]).fit(Turns(), loader(images(4)))
    assert not [w for w in recwarn if issubclass(w.category, MoEWarning)]


@not_causal
@pytest.mark.parametrize(
    ("name", "shared", "active"),
    [
        ("top_k", 0, 2),
        ("top_k", 1, 3),
        ("switch", 0, 1),
        ("null_experts", 0, 3 * 5 / 7),
        # of 3 choices; 4 experts without computation take 1 / 0.75 of the tokens of an FFN
        ("moe_plus_plus", 0, 3 * 5 / (5 + 4 / 0.75)),
        ("moe_plus_plus", 2, 3 * 5 / (5 + 4 / 0.75) + 2),
        ("hash", 0, 1),
        ("hash_3", 1, 4),
    ],
)
def test_seed_08_only_active_experts_count(name, shared, active):
    row = FAMILY_ROWS["llama"]
    model = row.build()
    receipt = upcycle(model, UpcycleConfig(num_experts=E, router=ROUTER_ROWS[name], num_shared_experts=shared))
    outside = receipt.parameters[0] - 2 * row.ffn_parameters
    routers = sum(p.numel() for layer in moe_layers(model).values() for p in layer.router.parameters())
    assert receipt.active_parameters[1] == pytest.approx(outside + routers + 2 * active * row.ffn_parameters, abs=2)
    assert receipt.parameters[1] == outside + routers + 2 * (E + shared) * row.ffn_parameters


@pytest.mark.parametrize("num_experts", [5, 20])
@pytest.mark.parametrize("shared", [0, 2])
def test_seed_08_only_active_experts_compute(num_experts, shared):
    layer = MoELayer(
        TopKRouter(8, num_experts, top_k=2, init_std=1.0),
        Experts(num_experts, 8, 12),
        shared_experts=Experts(shared, 8, 12) if shared else None,
    )
    for name, parameter in layer.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.3)
    # in float64 the experts are looped over, and torch counts what each multiplication costs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer.double()(torch.randn(1, 7, 8, dtype=torch.float64))
    ffn = 2 * 3 * 8 * 12
    assert counter.get_total_flops() == 7 * ((2 + shared) * ffn + 2 * 8 * num_experts)


def test_seed_09_every_configuration_in_the_repository_is_stepped_in_ci():
    script = (ROOT / ".ci" / "run").read_text()
    loop = re.search(r"^for config in \$\((.*)\); do\n(.*?)^done", script, re.MULTILINE | re.DOTALL)
    assert 'lightning-moe fit --config "$config"' in loop[2]
    assert "--trainer.max_steps 2" in loop[2]
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("a source archive has no git to list the files")

    def listed(command):
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    texts = {name: (ROOT / name).read_text() for name in listed("git ls-files") if name.endswith((".yaml", ".yml"))}
    # the suites of the benchmark, each with one configuration per cell
    suites = {name for name, text in texts.items() if re.search(r"^algorithms:", text, re.MULTILINE)}
    suites |= {name for name, text in texts.items() if re.search(r"^extends:", text, re.MULTILINE)}
    run = re.findall(r"run\.py --suite (\S+)", script)
    assert {name.removeprefix("benchmarks/suites/").removesuffix(".yaml") for name in suites} == {
        name.removesuffix(".yaml") for name in run
    }
    # every other file of ours that says what to train
    wanted = {name for name, text in texts.items() if re.search(r"^\W*trainer\W*:", text, re.MULTILINE)} - suites
    assert "examples/smollm2.yaml" in wanted
    # those for many GPUs are stepped by two processes, in tests/test_scale.py
    scale = {name for name in wanted if name.startswith("examples/scale/")}
    assert {Path(name).name for name in scale} == {"base.yaml", *OVERLAYS}
    wanted -= scale
    assert listed(loop[1]) == wanted
    # and on tiny models, in the tests
    assert wanted <= {path.relative_to(ROOT).as_posix() for path in CONFIGS}


def test_seed_10_saturation_compares_sets_and_not_ordered_slots():
    forward, backward = torch.tensor([[3.0, 2, 1, 0]]), torch.tensor([[2.0, 3, 1, 0]])
    saturation = RouterSaturation()
    saturation.update(routing_from(forward, 2), routing_from(backward, 2))
    assert routing_from(forward, 2).expert_ids.tolist() != routing_from(backward, 2).expert_ids.tolist()
    assert saturation.compute() == 1
    change = RoutingChangeRate()
    change.update(routing_from(forward, 2), routing_from(backward, 2))
    assert change.compute() == 0
    # the third choice for the second, and the slots turned: one of two is another
    change.update(routing_from(forward, 2), routing_from(torch.tensor([[2.0, 0, 3, 1]]), 2))
    assert change.compute() == pytest.approx(1 / 4)


def test_seed_11_diversity_is_the_mean_over_pairs_of_different_experts():
    same = torch.ones(3, 4, 2)  # (experts, tokens, channels), all equal
    metric = OutputSimilarity()
    metric.update(torch.stack([same[0], -same[0], same[0]]))
    # of the three pairs one is alike and two are opposite; over k * k it would be (3 + 2 * (-1)) / 9
    assert metric.compute().item() == pytest.approx((1 - 1 - 1) / 3)


def recorded_window(seed=7):
    torch.manual_seed(seed)
    module = ForeignModule()
    upcycle(module, UpcycleConfig(num_experts=E, router=ROUTER_ROWS["top_k_3"]))
    with record_routing() as window, torch.no_grad():
        for batch in batches(3, padding=True):
            module.task_loss(batch)
    return window


ANOTHER_PROCESS = """
import sys, torch
import test_known_bugs

window = test_known_bugs.recorded_window()
kept = {name: [r.token_ids, r.expert_ids, r.logits, r.scores, r.token_mask] for name, r in window.items()}
torch.save(kept, sys.argv[1] + "/record.pt")
"""


@pytest.mark.slow
def test_seed_12_an_analysis_can_be_run_again(tmp_path):
    # by another process, in which hash() gives other numbers, from a file of plain tensors
    run_script(ANOTHER_PROCESS, tmp_path, tmp_path, environment={"PYTHONHASHSEED": "12"})
    kept, window = torch.load(tmp_path / "record.pt", weights_only=True), recorded_window()
    assert list(kept) == list(window) == FFNS
    for name, (token_ids, expert_ids, gate, scores, mask) in kept.items():
        assert torch.equal(expert_ids, window[name].expert_ids)
        again = Routing(token_ids, expert_ids, torch.ones(len(token_ids)), gate, scores, mask)
        for metric, truth in (
            (MaxViolation(E), reference.max_violation),
            (RoutingEntropy(), reference.routing_entropy),
        ):
            metric.update(window[name])
            assert metric.compute().item() == pytest.approx(truth([again]), rel=1e-5)
    assert not torch.equal(recorded_window(seed=8)[FFNS[0]].expert_ids, window[FFNS[0]].expert_ids)


# --- the bugs that others shipped ---


def test_bug_layers_are_not_mixed_before_the_product():
    # transformers#28255, transformers#31464
    layers = [collapsed(expert) for expert in range(4)]
    theirs = load_balancing_loss_func(tuple(r.logits for r in layers), num_experts=4, top_k=1)
    assert theirs.item() == pytest.approx(1.0, abs=1e-4)
    assert sum(load_balancing_loss(r).item() for r in layers) / 4 >= 3.9


def without_task(module):
    module.task_loss = lambda batch: 0 * module.net.inner(**batch).loss
    return module


def test_bug_the_losses_are_on_by_default(tmp_path):
    # transformers#44242, transformers#44586, ms-swift#10190, LlamaFactory#8054, marin#7212
    recorder = GradientRecorder()
    trainer_of(tmp_path, [MoEUpcycleCallback(small_config()), recorder]).fit(
        without_task(ForeignModule(lr=0.0)), loader(batches(1))
    )
    for name in FFNS:
        assert recorder.steps[0][f"{name}.router.gate"].any()


def test_bug_the_gradient_flows_and_has_the_right_scale(tmp_path):
    # NeMo Automodel#1408, mLoRA#54
    (batch,) = data = batches(1)
    recorder, losses = GradientRecorder(), [LoadBalancingLoss(0.3), ZLoss(0.05)]
    callbacks = [MoEUpcycleCallback(small_config(), balance_losses=losses), recorder]
    module = without_task(ForeignModule(lr=0.0))
    trainer_of(tmp_path, callbacks).fit(module, loader(data))
    module = module.double()
    for name in FFNS:
        gate = moe_layers(module)[name].router.gate
        found = recorder.steps[0][f"{name}.router.gate"]

        def value():
            with record_routing() as window, torch.no_grad():
                module.net.inner(**batch)
            return sum(0.3 * load_balancing_loss(r) + 0.05 * z_loss(r) for r in window.values()).item()

        for index in (0, 7, 23):
            at, step = divmod(index, gate.shape[1]), 1e-6
            with torch.no_grad():
                gate[at] += step
                above = value()
                gate[at] -= 2 * step
                below = value()
                gate[at] += step
            assert found[at].item() == pytest.approx((above - below) / (2 * step), rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_bug_the_losses_do_not_grow_with_the_number_of_ranks():
    # transformers#48690
    data, found = batches(8, padding=True), two_ranks()["gradients"]
    explicit = BalanceSum(ForeignModule(), small_config(), [LoadBalancingLoss(0.3), ZLoss(0.05)])
    for step, gradients in enumerate(found):
        same_gradients(gradients, explicit.gradients(data[2 * step : 2 * step + 2]))


@pytest.mark.parametrize("order", [1, -1])
def test_bug_the_losses_are_added_once(tmp_path, order):
    # ms-swift#5375; with two callbacks that could bring them, in a second fit with the same ones, and the loss logged
    (batch,) = data = batches(1)
    recorder, losses = GradientRecorder(), [LoadBalancingLoss(0.3)]
    callbacks = [MoEUpcycleCallback(small_config(), balance_losses=losses), BalanceLossCallback(losses)][::order]
    explicit = BalanceSum(ForeignModule(), small_config(), losses)
    module = ForeignModule(lr=0.0)
    for _ in range(2):
        trainer = trainer_of(tmp_path, [*callbacks, recorder])
        trainer.fit(module, loader(data))
        task = explicit.module.task_loss(batch).item()
        assert trainer.callback_metrics["train_loss"].item() == pytest.approx(task, rel=1e-6)
    for step in recorder.steps:
        same_gradients(step, explicit.gradients(data))
    twice = BalanceSum(ForeignModule(), small_config(), [LoadBalancingLoss(0.6)]).gradients(data)
    with pytest.raises(AssertionError):
        same_gradients(recorder.steps[0], twice)


def test_bug_the_losses_are_not_summed_over_accumulated_batches(tmp_path):
    (batch,), found = batches(1), {}
    for accumulation in (1, 4):
        recorder = GradientRecorder()
        callbacks = [MoEUpcycleCallback(small_config(), balance_losses=[LoadBalancingLoss(0.3)]), recorder]
        trainer = trainer_of(tmp_path, callbacks, accumulate_grad_batches=accumulation)
        trainer.fit(ForeignModule(lr=0.0), loader([batch] * accumulation))
        (found[accumulation],) = recorder.steps
    same_gradients(found[4], found[1])


def checkpointed(reentrant, losses):
    """Three forwards and backwards, the last layer recomputed or not (None); its window, and the tokens it saw."""
    module, runs, data = ForeignModule(), [], batches(3)
    upcycle(module, small_config())
    if reentrant is not None:
        module.net.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    module.net.inner.train().enable_input_require_grads()
    layer = moe_layers(module)[FFNS[1]]
    # before and not after: the recomputation stops as soon as it has all that it needs
    layer.register_forward_pre_hook(lambda *_: runs.append(None))
    layer.balance_losses.update({loss.name: loss for loss in losses})
    with record_routing() as window:
        for batch in data:
            module.task_loss(batch).backward()
    assert len(runs) == (3 if reentrant is None else 6), "activations were not recomputed; the test shows nothing"
    return window[FFNS[1]], sum(batch["input_ids"].numel() for batch in data)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_bug_activation_checkpointing_counts_nothing_twice(reentrant):
    # torchtitan's optimizer, megablocks#113
    routing, num_tokens = checkpointed(reentrant, [])
    assert routing.num_tokens == num_tokens
    assert expert_load(routing).tolist() == expert_load(checkpointed(None, [])[0]).tolist()


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_bug_activation_checkpointing_counts_nothing_twice_in_losses_with_a_state(reentrant):
    # torchtitan's optimizer, megablocks#113
    adaptive, overall = AdaptiveL1Loss(top_k=1), LoadBalancingLoss(scope="global_batch")
    overall.window = 4
    routing, num_tokens = checkpointed(reentrant, [adaptive, overall])
    assert overall.training_state()["recent"][:, :-1].sum(0).tolist() == expert_load(routing).tolist()
    assert adaptive.training_state()["counts"].tolist() == [2 * num_tokens, num_tokens]


@pytest.mark.parametrize("loss", BALANCE_LOSSES, ids=lambda loss: loss.__name__)
def test_bug_padding_is_in_no_loss(loss):
    # Megatron-LM#2142, ms-swift#9350
    name = {"LoadLoss": "noisy_top_k", "NullRewardLoss": "null_experts"}.get(loss.__name__, "top_k_3")
    layer = MoELayer(ROUTER_ROWS[name](6, E).eval(), Experts(E, 6, 8), name="mlp")
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter)
    layer.balance_losses["loss"] = loss(1.0)
    x = torch.randn(1, 4, 6)
    with observed("loss") as seen:
        layer(x)
        layer.context.inputs = {"attention_mask": torch.tensor([[1, 1, 0, 1, 0, 1]])}
        layer(torch.cat([x[:, :2], 5 * torch.randn(1, 1, 6), x[:, 2:3], 5 * torch.randn(1, 1, 6), x[:, 3:]], dim=1))
    assert seen[0] == pytest.approx(seen[1], rel=1e-5, abs=1e-6)


def test_bug_padding_is_in_no_gradient_and_no_count(tmp_path):
    # Megatron-LM#2142, ms-swift#9350
    (short,) = batches(1, length=5)
    fill = torch.randint(0, VOCABULARY, (2, 4))
    padded = {key: torch.cat([value, fill], dim=1) for key, value in short.items()}
    padded["labels"][:, 5:] = -100
    mask = torch.ones_like(padded["input_ids"])
    mask[:, 5:] = 0
    found = []
    for batch in (short, padded | {"attention_mask": mask}, padded):
        recorder, losses = GradientRecorder(), [LoadBalancingLoss(0.3), ZLoss(0.05)]
        callbacks = [MoEUpcycleCallback(small_config(), balance_losses=losses), recorder]
        trainer = trainer_of(tmp_path, callbacks, log_every_n_steps=1)
        trainer.fit(ForeignModule(lr=0.0), loader([batch]))
        logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("moe/")}
        # what the clock says is another matter
        metrics = {k: v for k, v in logged.items() if not k.endswith("_per_second")}
        found.append((recorder.steps[0], metrics))
    (plain, counts), (masked, masked_counts), (unmasked, unmasked_counts) = found
    # the attention sums over masked columns too, in another order
    same_gradients(masked, plain, 1e-5)
    assert masked_counts == pytest.approx(counts, rel=1e-5)
    # without the mask, the padding would be seen
    assert unmasked_counts["moe/load_balancing_loss"] != pytest.approx(counts["moe/load_balancing_loss"], rel=1e-2)
    with pytest.raises(AssertionError):
        same_gradients(unmasked, plain, 1e-2)


class Domains(LightningModule):
    """One layer that sends each domain to an expert of its own."""

    def __init__(self):
        super().__init__()
        self.layer = MoELayer(TopKRouter(4, 4, top_k=1, normalize=False), Experts(4, 4, 8))
        for parameter in self.layer.experts.parameters():
            nn.init.normal_(parameter)
        self.layer.router.gate.data = 30 * torch.eye(4)
        self.seen = []

    def training_step(self, batch, batch_idx):
        with observed("load_balancing_loss") as seen:
            loss = self.layer(batch).square().sum()
        self.seen += seen
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(("scope", "value"), [("global_batch", 1.0), ("micro_batch", 4.0), ("sequence", 4.0)])
def test_bug_the_global_scope_is_global_in_the_trainer(tmp_path, scope, value):
    # ms-swift#6787: a step of four micro-batches, each of one domain; the second epoch knows all four
    module, data = Domains(), [row.expand(2, 3, 4) for row in torch.eye(4)]
    callback = BalanceLossCallback([LoadBalancingLoss(0.1, scope=scope)])
    trainer_of(tmp_path, [callback], accumulate_grad_batches=4, max_epochs=2).fit(module, loader(data))
    assert module.seen[4:] == pytest.approx([value] * 4, rel=1e-5)


def test_bug_the_global_scope_is_global():
    # ms-swift#6787
    loss, micro = LoadBalancingLoss(scope="global_batch"), LoadBalancingLoss(scope="micro_batch")
    loss.window = 4
    for _ in range(2):
        values = [(loss(collapsed(domain)).item(), micro(collapsed(domain)).item()) for domain in range(4)]
    assert values == [(pytest.approx(1.0), pytest.approx(4.0))] * 4


@pytest.mark.parametrize("cls", [c for c in BALANCE_LOSSES if c.measures_balance], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_bug_balanced_is_one_for_every_kind_of_loss(cls, top_k):
    # Megatron-LM#3672
    expert_ids = torch.arange(8 * top_k) % 4
    flat = torch.zeros(8, 4)
    token_ids = torch.arange(8).repeat_interleave(top_k)
    load = torch.full((4,), 2.0 * top_k)
    routing = Routing(
        token_ids, expert_ids, torch.ones(8 * top_k), flat, flat.softmax(-1), None, top_k, expected_load=load
    )
    assert cls()(routing).item() == pytest.approx(1.0)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
@pytest.mark.parametrize("scores_of", [torch.sigmoid, lambda logits: logits.softmax(-1)], ids=["sigmoid", "softmax"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_bug_balanced_is_one_in_every_scope(scope, scores_of, top_k):
    # Megatron-LM#3672; three sequences of four tokens
    expert_ids, flat = torch.arange(12 * top_k) % 4, torch.zeros(12, 4)
    rows = torch.arange(12).repeat_interleave(top_k), expert_ids, torch.ones(12 * top_k)
    loss = LoadBalancingLoss(scope=scope)
    loss.window = 2
    routing = Routing(*rows, flat, scores_of(flat), None, top_k, sequence_length=4)
    assert [loss(routing).item() for _ in range(3)] == pytest.approx([1.0] * 3)


def test_bug_co_activation_counts_all_pairs_and_not_only_neighbours():
    # OLMoE's analysis script
    logits = torch.tensor([[9.0, 8, 7, 0], [9, 0, 8, 7]])
    metric = ExpertCoactivation(4)
    metric.update(routing_from(logits, 3))
    together = metric.compute()
    assert together[0, 2] == 1  # first and third choice of token 0
    assert together[2, 0] == 1
    assert together[1, 2] == 1
    assert together[1, 3] == 0


def test_bug_recorded_logits_are_logits_and_scores_are_softmaxed_once():
    # transformers#45120, transformers#45315
    router, x = TopKRouter(6, E, init_std=1.0), torch.randn(7, 6)
    layer = MoELayer(router, Experts(E, 6, 8), name="mlp")
    with record_routing() as window, torch.no_grad():
        layer(x.unsqueeze(0))
    routing = window["mlp"]
    torch.testing.assert_close(routing.logits, x @ router.gate.T, **FLOAT32)
    torch.testing.assert_close(routing.scores, (x @ router.gate.T).softmax(-1), **FLOAT32)
    # the seed's cosine router took a softmax of a softmax, and its scores stayed near uniform
    cosine = CosineRouter(6, 4, projection_size=16, temperature=0.05)
    scores = cosine(torch.randn(64, 6), Tokens()).scores
    entropy = -(scores * scores.log()).sum(-1).mean().item()
    twice = scores.softmax(-1)
    assert -(twice * twice.log()).sum(-1).mean().item() > 0.9 * math.log(4)
    assert entropy < 0.6 * math.log(4)


@pytest.mark.parametrize("name", ["top_k", "cosine", "perturbed_cosine", "xmoe", "hyper", "dense_mixer"])
def test_bug_scores_are_one_softmax_of_the_recorded_logits(name):
    # transformers#45120, transformers#45315, and the seed's cosine router
    layer = MoELayer(ROUTER_ROWS[name](6, E), Experts(E, 6, 8), name="mlp").eval()
    with record_routing() as window, torch.no_grad():
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        layer(torch.randn(1, 9, 6))
    logits, scores = window["mlp"].logits, window["mlp"].scores
    torch.testing.assert_close(scores, logits.exp() / logits.exp().sum(-1, keepdim=True), **FLOAT32)
    # what is softmaxed already is not below zero, and sums to one
    assert (logits < 0).any()
    assert ((logits.sum(-1) - 1).abs() > 1e-3).any()


def test_every_bug_of_the_gradient_would_show():
    """The gradients compared above differ by far more than the tolerance where the losses are left out."""
    data = batches(1)
    plain = BalanceSum(ForeignModule(), small_config(), []).gradients(data)
    balanced = BalanceSum(ForeignModule(), small_config(), [LoadBalancingLoss(0.3)]).gradients(data)
    gates = [name for name in MOE_PARAMETERS if name.endswith("gate")]
    assert all((plain[n] - balanced[n]).abs().max() > 0.01 * balanced[n].abs().max() for n in gates)
