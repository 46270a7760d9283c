"""Callbacks on Hugging Face models with MoE blocks of their own, unmodified.

What is right comes from a hook of the test's own on the router, from autograd on the written-out sum, and from counts
by hand.
"""

import copy
import functools
import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_fixtures import GradientRecorder, batches, loader, logged, run_script, same_gradients, trainer_of
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lightning_moe import (
    BalanceLossCallback,
    ExpertBiasCallback,
    ExpertOrthogonalityLoss,
    ExpertUtilizationCallback,
    Freeze,
    LoadBalancingLoss,
    MoEModule,
    MoEWarning,
    RouterOrthogonalityLoss,
    RouterScheduleCallback,
    StepSchedule,
    UpcycleConfig,
    ZLoss,
    load_balancing_loss,
    record_routing,
    upcycle,
)
from lightning_moe.metrics import max_violation
from lightning_moe.native import NATIVE_ROUTERS, attach_native, detach_native, routed_layers
from lightning_moe.native_routers import sigmoid_scores
from lightning_moe.routing import expert_load

VOCABULARY = 37
COMMON = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "num_experts_per_tok": 2,
}  # fmt: skip
FEW = {"num_local_experts": 5}
DEEPSEEK = {
    "moe_intermediate_size": 16, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0,
    "n_shared_experts": 1,
}  # fmt: skip
MLA = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
QWEN = {"num_experts": 5, "moe_intermediate_size": 12}

# model class to its configuration, beside what is common
MODELS = {
    "MixtralForCausalLM": FEW,
    "Qwen2MoeForCausalLM": {**QWEN, "shared_expert_intermediate_size": 12},
    "Qwen3MoeForCausalLM": QWEN,
    "OlmoeForCausalLM": {"num_experts": 5},
    "DeepseekV3ForCausalLM": {**DEEPSEEK, **MLA, "num_key_value_heads": 2, "head_dim": 8},
    "Glm4MoeForCausalLM": DEEPSEEK,
    "PhimoeForCausalLM": FEW,
    "GraniteMoeForCausalLM": FEW,
    "GptOssForCausalLM": {**FEW, "sliding_window": 8},
}
SIGMOID = ("DeepseekV3ForCausalLM", "Glm4MoeForCausalLM")
KINDS = ["MixtralForCausalLM", "DeepseekV3ForCausalLM"]


def native_model(kind, seed=0, **changes):
    """Two layers; routers sure enough that balancing has something to do."""
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**{**COMMON, **MODELS[kind], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        for router in routers_of(model):
            torch.nn.init.normal_(router.weight, std=0.3)
    return model


def routers_of(model):
    return [module for module in model.modules() if type(module).__name__ in NATIVE_ROUTERS]


def num_experts(model):
    return routers_of(model)[0].weight.shape[0]


class NativeModule(LightningModule):
    """A user's module that knows nothing of this package; `task` is a factor of its loss."""

    def __init__(self, kind, lr=0.0, task=1.0, **changes):
        super().__init__()
        self.lr, self.task = lr, task
        self.model = native_model(kind, **changes)

    def task_loss(self, batch):
        return self.model(**batch).loss * self.task

    def training_step(self, batch, batch_idx):
        loss = self.task_loss(batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Explicit:
    """The written-out sum, from what routers return to hooks of its own; none of this package's hooks are on the model.

    Logits come from the router's input and weights, ids are those that the router returned.
    """

    def __init__(self, kind, losses, **changes):
        self.kind, self.losses = kind, losses
        self.module = NativeModule(kind, **changes)
        self.seen = []
        for router in routers_of(self.module):
            router.register_forward_hook(lambda router, args, output: self.seen.append((router, args[0], output)))

    def logits(self, router, x):
        return F.linear(x.reshape(-1, x.shape[-1]).float(), router.weight.float(), getattr(router, "bias", None))

    def per_layer(self, mask):
        for router, x, (_, _, ids) in self.seen:
            logits = self.logits(router, x)
            scores = logits.sigmoid() if self.kind in SIGMOID else logits.softmax(-1)
            E, keep = logits.shape[1], mask.reshape(-1).bool()
            counts = sum(F.one_hot(ids[:, k], E)[keep].sum(0) for k in range(ids.shape[1]))
            P = (scores / scores.sum(1, keepdim=True))[keep].mean(0)
            yield {
                "load_balancing_loss": E * (counts / counts.sum() * P).sum(),
                "z_loss": logits[keep].logsumexp(-1).square().mean(),
            }

    def total(self, batch):
        self.seen.clear()
        loss = self.module.task_loss(batch)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        layers = list(self.per_layer(mask))
        assert len(layers) == 2
        return loss + sum(c * layer[name] for layer in layers for name, c in self.losses.items())

    def gradients(self, micro_batches):
        named = {k: p for k, p in self.module.named_parameters() if p.requires_grad}
        total = sum(self.total(batch) / len(micro_batches) for batch in micro_batches)
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        return {k: g for k, g in zip(named, found, strict=True) if g is not None}


LOSSES = {"load_balancing_loss": 0.3, "z_loss": 0.05}
OURS = [LoadBalancingLoss(0.3), ZLoss(0.05)]


def trained(tmp_path, module, data, losses=OURS, **options):
    recorder = GradientRecorder()
    trainer_of(tmp_path, [BalanceLossCallback(losses), recorder], **options).fit(module, loader(data))
    return recorder.steps


def compare(found, explicit, data, accumulation=1):
    assert len(found) == len(data) // accumulation
    for step, start in zip(found, range(0, len(data), accumulation), strict=True):
        wanted = explicit.gradients(data[start : start + accumulation])
        # an expert that no token chose has a gradient of zero
        wanted = {k: g for k, g in wanted.items() if g.abs().max() > 0}
        routers = {k for k in wanted if re.search(r"\.(gate|router)\.(weight|bias)$", k)}
        assert len(routers) >= 2
        same_gradients({k: step[k] for k in routers}, {k: wanted[k] for k in routers})
        # behind them more float32 sums in another order
        same_gradients({k: step[k] for k in wanted}, wanted, 4e-6)


# --- what is recorded ---


@pytest.mark.parametrize("kind", MODELS)
def test_the_record_is_what_the_router_did(kind):
    model = native_model(kind).train()
    (batch,) = batches(1, padding=True)
    seen = []
    for router in routers_of(model):
        router.register_forward_hook(lambda router, args, output: seen.append((router, args[0].clone(), output)))
    natives = attach_native(model)
    assert attach_native(model) == natives
    with record_routing() as window:
        model(**batch)
    assert list(window) == list(natives)
    assert len(window) == len(seen) == 2
    E, T = num_experts(model), batch["input_ids"].numel()
    for routing, native, (router, x, (_, weights, ids)) in zip(window.values(), natives.values(), seen, strict=True):
        logits = F.linear(x.reshape(-1, 32), router.weight, getattr(router, "bias", None))
        torch.testing.assert_close(routing.logits, logits, rtol=0, atol=1e-6)
        scores = logits.sigmoid() if kind in SIGMOID else logits.softmax(-1)
        torch.testing.assert_close(routing.scores, scores, rtol=0, atol=1e-6)
        assert (native.num_experts, routing.logits.dtype, routing.top_k) == (E, torch.float32, 2)
        assert routing.sequence_length == batch["input_ids"].shape[1]
        assert routing.token_mask.equal(batch["attention_mask"].bool().flatten())
        rows = [(t, ids[t, k].item(), weights[t, k].item()) for t in range(T) for k in range(2)]
        found = zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), routing.weights.tolist(), strict=True)
        assert list(found) == rows
        if kind != "PhimoeForCausalLM":
            # and the choice is the best two of these scores, in DeepSeek's kind within the better of two groups
            chooser = scores.detach().clone()
            if kind in SIGMOID:
                groups = chooser.view(T, 2, 4)
                worse = groups.topk(2).values.sum(-1).argmin(1)
                groups[torch.arange(T), worse] = -1
            assert chooser.topk(2).indices.sort().values.equal(ids.sort().values)


OVERRIDES = {"num_experts_per_tok": 2, "n_routed_experts": 8, "num_local_experts": 8}


def router_class(name):
    """Finds a class by name, and its configurations, in transformers' own files."""
    models = Path(transformers.__file__).parent / "models"
    for file in models.glob("*/modeling_*.py"):
        if re.search(rf"^class {name}\(", file.read_text(), re.M):
            folder = f"transformers.models.{file.parent.name}"
            module = importlib.import_module(f"{folder}.modeling_{file.parent.name}")
            configs = importlib.import_module(f"{folder}.configuration_{file.parent.name}")
            kinds = [v for k, v in vars(configs).items() if k.endswith("Config") and hasattr(v, "model_type")]
            return getattr(module, name), sorted(kinds, key=lambda kind: "Text" not in kind.__name__)
    raise LookupError(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NATIVE_ROUTERS) - {"PhimoeTopKRouter"}))
def test_each_row_of_the_table(name):
    """Weights are the scores of the chosen, times one number per token; so the scores are those of the table."""
    cls, configs = router_class(name)
    for config_class in configs:
        try:
            config = config_class()
            for key in {"num_experts_per_tok", "n_routed_experts"} & {k for k, v in vars(config).items() if v is None}:
                setattr(config, key, OVERRIDES[key])
            router = cls(config)
            break
        except (AttributeError, TypeError):
            continue
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x = torch.randn(6, config.hidden_size)
    bias = [torch.zeros(router.num_experts)] if "bias" in str(cls.forward.__code__.co_varnames[:3]) else []
    logits, weights, ids = router(x, *bias)
    assert logits.shape == (6, router.num_experts)
    ratio = weights.float() / NATIVE_ROUTERS[name](logits.float()).gather(1, ids)
    assert ((ratio.amax(1) - ratio.amin(1)) / ratio.mean(1)).max() < 1e-5
    other = torch.softmax(logits.float(), -1) if NATIVE_ROUTERS[name] is sigmoid_scores else logits.float().sigmoid()
    ratio = weights.float() / other.gather(1, ids)
    assert ((ratio.amax(1) - ratio.amin(1)) / ratio.mean(1)).max() > 1e-2, "the test cannot tell"


# --- the model stays as it is ---


@pytest.mark.parametrize("kind", MODELS)
def test_attaching_changes_nothing_of_the_model(kind, tmp_path):
    model = native_model(kind).eval()
    (batch,) = batches(1, padding=True)

    def names():
        return [
            list(model.state_dict()),
            [k for k, _ in model.named_parameters()],
            [k for k, _ in model.named_modules()],
        ]

    before, logits = names(), model(**batch).logits
    natives = attach_native(model)
    for native in natives.values():
        native.balance_losses["load_balancing_loss"] = LoadBalancingLoss(0.1)
    assert names() == before
    assert model(**batch).logits.equal(logits)
    twin = copy.deepcopy(model)
    twins = attach_native(twin)
    assert [native is not other for native, other in zip(twins.values(), natives.values(), strict=True)] == [True] * 2
    assert all(native.router in list(twin.modules()) for native in twins.values())
    detach_native(model)
    assert routed_layers(model) == {}
    with record_routing() as window:
        twin(**batch)
    assert len(window) == 2
    assert next(iter(window.values())).token_mask is not None
    with record_routing() as window:
        model(**batch)
    assert len(window) == 0
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path)(**batch).logits.equal(logits)


# --- the gradient ---


@pytest.mark.parametrize("kind", MODELS)
def test_the_gradient_of_the_balance_losses_alone(tmp_path, kind):
    data = batches(1, padding=True)
    module = NativeModule(kind, lr=1e-2, task=0.0)
    before = {k: p.clone() for k, p in module.named_parameters()}
    torch.manual_seed(1)
    found = trained(tmp_path, module, data)
    torch.manual_seed(1)
    compare(found, Explicit(kind, LOSSES, task=0.0), data)
    for router in routers_of(module):
        name = next(k for k, p in module.named_parameters() if p is router.weight)
        assert (router.weight - before[name]).abs().max() > 1e-5
    assert all(not layer.balance_losses and layer.loss_scale == 1 for layer in routed_layers(module).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_accumulation_and_activation_checkpointing(tmp_path, kind, reentrant, accumulation):
    data = batches(2, padding=True)
    module = NativeModule(kind)
    if reentrant is not None:
        module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls, records = [], []
    routers_of(module)[0].register_forward_hook(lambda *_: calls.append(None))

    class Records(Callback):
        def on_train_batch_start(self, *_):
            self.context = record_routing()
            self.window = self.context.__enter__()

        def on_train_batch_end(self, *_):
            self.context.__exit__(None, None, None)
            records.append([routing.num_tokens for routing in self.window.values()])

    recorder = GradientRecorder()
    callbacks = [BalanceLossCallback(OURS), recorder, Records()]
    trainer_of(tmp_path, callbacks, accumulate_grad_batches=accumulation).fit(module, loader(data))
    assert len(calls) == len(data) * (1 if reentrant is None else 2), "activations were not recomputed"
    assert records == [[14, 14]] * 2
    compare(recorder.steps, Explicit(kind, LOSSES), data, accumulation)


def test_the_models_own_loss_does_not_count_twice(tmp_path):
    data = batches(1)
    on = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    module = NativeModule("MixtralForCausalLM", **on)
    with pytest.warns(
        MoEWarning, match=r"MixtralForCausalLM has a balance loss of its own \(output_router_logits=True"
    ):
        found = trained(tmp_path, module, data)
    compare(found, Explicit("MixtralForCausalLM", LOSSES), data)
    assert module.model.router_aux_loss_coef == 0.5
    # without the callback it stays on: the comparison can fail
    recorder = GradientRecorder()
    trainer_of(tmp_path, [recorder]).fit(module, loader(data))
    with pytest.raises(AssertionError):
        compare(recorder.steps, Explicit("MixtralForCausalLM", {}), data)
    compare(recorder.steps, Explicit("MixtralForCausalLM", {}, **on), data)


def test_the_models_own_loss_comes_back_after_an_exception(tmp_path):
    class Failing(NativeModule):
        def training_step(self, batch, batch_idx):
            assert self.model.router_aux_loss_coef == 0
            raise RuntimeError("out of memory")

    module = Failing("OlmoeForCausalLM")
    with pytest.raises(RuntimeError, match="out of memory"):
        trained(tmp_path, module, batches(1))
    assert module.model.router_aux_loss_coef == 0.01
    assert not any(layer.balance_losses for layer in routed_layers(module).values())


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("MixtralForCausalLM", [("load_balancing_loss", 0.001, "micro_batch")]),
        ("OlmoeForCausalLM", [("load_balancing_loss", 0.01, "micro_batch")]),
        ("DeepseekV3ForCausalLM", [("load_balancing_loss", 1e-4, "sequence")]),
    ],
)
def test_losses_that_nobody_named(tmp_path, kind, wanted):
    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            self.found = [list(layer.balance_losses.values()) for layer in routed_layers(pl_module).values()]

    look = Look()
    trainer_of(tmp_path, [BalanceLossCallback(), look]).fit(NativeModule(kind), loader(batches(1)))
    for losses in look.found:
        assert [(loss.name, loss.coefficient, loss.scope) for loss in losses] == wanted


def test_a_loss_on_the_gate_works_and_one_on_the_experts_outputs_says_why_not(tmp_path):
    module = NativeModule("MixtralForCausalLM", task=0.0)
    (step,) = trained(tmp_path, module, batches(1), [RouterOrthogonalityLoss(0.1)])
    for router in routers_of(module):
        name = next(k for k, p in module.named_parameters() if p is router.weight)
        W = router.weight.detach().clone().requires_grad_()
        (wanted,) = torch.autograd.grad(0.1 * (W @ W.t() - torch.eye(5)).abs().sum(), W)
        torch.testing.assert_close(step[name], wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(MisconfigurationException, match="looks at the experts' outputs"):
        trained(tmp_path, module, batches(1), [ExpertOrthogonalityLoss(0.1)])
    assert not any(layer.balance_losses for layer in routed_layers(module).values())


def test_collapsed_layers_are_seen_where_transformers_own_loss_sees_none():
    """Each of four layers sends all tokens to one expert, each to another: mixed together they look balanced."""
    model = native_model("MixtralForCausalLM", num_hidden_layers=4, num_local_experts=4, num_experts_per_tok=1)
    for layer, router in enumerate(routers_of(model)):
        # RMSNorm keeps the length; a row along one common direction would need one, so the input is set
        router.register_forward_pre_hook(lambda _, args: (torch.ones_like(args[0]),))
        router.weight.data = 30 / 32 * F.one_hot(torch.tensor(layer), 4).float().unsqueeze(1).expand(4, 32)
    attach_native(model)
    (batch,) = batches(1)
    with record_routing() as window:
        out = model(**batch, output_router_logits=True)
    losses = [load_balancing_loss(routing).item() for routing in window.values()]
    assert len(losses) == 4
    assert min(losses) >= 3.9
    theirs = load_balancing_loss_func(out.router_logits, 4, 1, torch.ones_like(batch["input_ids"])).item()
    assert theirs == pytest.approx(1.0, abs=1e-3)
    assert out.aux_loss.item() == pytest.approx(theirs)


def test_the_two_losses_differ_by_k_on_one_layer():
    model = native_model("MixtralForCausalLM", num_hidden_layers=1)
    attach_native(model)
    (batch,) = batches(1, padding=True)
    with record_routing() as window:
        theirs = model(**batch, output_router_logits=True).aux_loss
    torch.testing.assert_close(theirs, 2 * load_balancing_loss(*window.values()), rtol=1e-6, atol=0)


# --- the bias ---


def biases(module):
    return {name: layer.expert_bias.clone() for name, layer in attach_native(module).items()}


def by_hand(kind, data, accumulation=1, rate=lambda step: 0.25):
    """The biases of a model that does not learn: counts by hand, one update per step."""
    explicit = Explicit(kind, {})
    for step, start in enumerate(range(0, len(data), accumulation)):
        counts = [torch.zeros(8), torch.zeros(8)]
        for batch in data[start : start + accumulation]:
            explicit.seen.clear()
            with torch.no_grad():
                explicit.module.task_loss(batch)
            keep = batch["attention_mask"].flatten().tolist()
            for count, (_, _, (_, _, ids)) in zip(counts, explicit.seen, strict=True):
                for kept, row in zip(keep, ids.tolist(), strict=True):
                    for expert in row:
                        count[expert] += kept
        for count, router in zip(counts, routers_of(explicit.module), strict=True):
            router.e_score_correction_bias += rate(step) * torch.sign(count.mean() - count)
    return biases(explicit.module)


@pytest.mark.parametrize("kind", SIGMOID)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_bias_moves_once_per_step_by_all_that_was_chosen(tmp_path, kind, accumulation):
    # an odd number of steps either way, so that no bias is back at zero
    data, module = batches(9, padding=True), NativeModule(kind)
    callback = ExpertBiasCallback(bias_rate=0.25)
    trainer_of(tmp_path, [callback], accumulate_grad_batches=accumulation).fit(module, loader(data))
    for name, bias in by_hand(kind, data, accumulation).items():
        assert bias.any()
        assert biases(module)[name].equal(bias)


def test_the_bias_rate_follows_a_schedule(tmp_path):
    data, module = batches(4, padding=True), NativeModule("DeepseekV3ForCausalLM")
    schedule = StepSchedule({0: 1, 1: 0.5, 3: 0})
    trainer_of(tmp_path, [ExpertBiasCallback(bias_rate=0.25, schedule=schedule)]).fit(module, loader(data))
    wanted = by_hand("DeepseekV3ForCausalLM", data, rate=lambda step: 0.25 * schedule(step))
    assert all(bias.equal(wanted[name]) for name, bias in biases(module).items())


@pytest.mark.parametrize("kind", SIGMOID)
def test_the_load_becomes_even(tmp_path, kind):
    data = batches(1, batch_size=8, length=32) * 60
    module = NativeModule(kind)
    for router in routers_of(module):
        # one expert of each group is preferred by far
        router.e_score_correction_bias[[0, 4]] = 0.5

    def violation():
        attach_native(module)
        with torch.no_grad(), record_routing() as window:
            module.task_loss(data[0])
        return torch.stack([max_violation(expert_load(routing)) for routing in window.values()]).mean().item()

    before = violation()
    schedule = StepSchedule({0: 1, 40: 0.2})
    trainer_of(tmp_path, [ExpertBiasCallback(bias_rate=0.02, schedule=schedule)]).fit(module, loader(data))
    assert before > 1
    assert violation() < 0.2


class KilledError(Exception):
    """What ends a run."""


class Kill(Callback):
    """Saves at a step and ends the run two steps later."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3:
            trainer.save_checkpoint(self.path)
        if batch_idx == 5:
            raise KilledError


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("kind", SIGMOID)
def test_a_killed_run_goes_on_with_the_same_biases(tmp_path, kind, precision):
    data, path = batches(8, padding=True), tmp_path / "half.ckpt"
    # of the size of no bfloat16 number: eight steps of it from 1.0 on would all be lost there
    start = 1.0 + 0.001 * torch.arange(8)

    def run(callbacks, ckpt_path=None):
        module = NativeModule(kind)
        for router in routers_of(module):
            router.e_score_correction_bias.copy_(start)
        callbacks = [ExpertBiasCallback(), *callbacks]
        # of a loader without a state Lightning takes the first batches again: here those that come next
        made = data if ckpt_path is None else data[4:] * 2
        trainer_of(tmp_path, callbacks, precision=precision).fit(module, loader(made), ckpt_path=ckpt_path)
        return biases(module)

    whole = run([])
    with pytest.raises(KilledError):
        run([Kill(path)])
    resumed = run([], path)
    for name, bias in whole.items():
        assert bias.dtype == torch.float32
        assert 0.001 < (bias - start).abs().max() < 0.0081
        assert resumed[name].equal(bias)


def test_a_model_without_a_bias_says_so(tmp_path):
    with pytest.warns(MoEWarning, match="ExpertBiasCallback has no effect"):
        trainer_of(tmp_path, [ExpertBiasCallback()]).fit(NativeModule("MixtralForCausalLM"), loader(batches(1)))


# --- statistics, schedules, other ways to run ---


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_logged_is_what_was_chosen(tmp_path, kind):
    data = batches(2, padding=True)
    callbacks = [ExpertUtilizationCallback(), BalanceLossCallback(OURS)]
    trainer = trainer_of(tmp_path, callbacks, log_every_n_steps=2)
    module = MoEModule(native_model(kind), optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    trainer.fit(module, loader(data))
    explicit, counts, losses = Explicit(kind, LOSSES), 0, []
    for batch in data:
        explicit.total(batch)
        losses.append([layer["load_balancing_loss"].item() for layer in explicit.per_layer(batch["attention_mask"])])
        keep = batch["attention_mask"].flatten().bool()
        counts = counts + torch.stack([F.one_hot(ids, 8)[keep].sum((0, 1)) for _, _, (_, _, ids) in explicit.seen])
    (found,) = logged(trainer.logger.log_dir).values()
    E = num_experts(explicit.module)
    for row, name in enumerate(("model.model.layers.0.mlp", "model.model.layers.1.mlp")):
        load = counts[row, :E].double()
        assert found[f"moe_max_violation/{name}"] == pytest.approx((load.max() / load.mean() - 1).item(), rel=1e-5)
        assert found[f"moe_dead_experts/{name}"] == (load == 0).sum().item()
        mean = sum(layers[row] for layers in losses) / 2
        assert found[f"moe_load_balancing_loss/{name}"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    ("part", "inside"),
    [
        ("routers", (".gate.",)),
        ("experts", (".experts.",)),
        ("shared_experts", ("shared_expert.", "shared_expert_gate.")),
    ],
)
def test_what_is_frozen_stays(tmp_path, part, inside):
    module = NativeModule("Qwen2MoeForCausalLM", lr=1e-2)
    before = {k: p.clone() for k, p in module.named_parameters()}
    trainer_of(tmp_path, [RouterScheduleCallback(freeze=[Freeze(part)])]).fit(module, loader(batches(1)))
    for name, parameter in module.named_parameters():
        assert parameter.equal(before[name]) == any(key in name for key in inside), name
    trainer_of(tmp_path, [RouterScheduleCallback(freeze=[Freeze("dense")])]).fit(module, loader(batches(1)))
    assert module.model.lm_head.weight.equal(module.model.lm_head.weight)


def test_the_dense_rest_can_be_frozen(tmp_path):
    module = NativeModule("Qwen2MoeForCausalLM", lr=1e-2)
    before = {k: p.clone() for k, p in module.named_parameters()}
    trainer_of(tmp_path, [RouterScheduleCallback(freeze=[Freeze("dense")])]).fit(module, loader(batches(1)))
    for name, parameter in module.named_parameters():
        assert parameter.equal(before[name]) == (".mlp." not in name), name


def test_a_number_of_the_router_follows_a_schedule(tmp_path):
    module, seen = NativeModule("MixtralForCausalLM"), []
    routers_of(module)[0].register_forward_hook(lambda router, args, output: seen.append(output[2].shape[1]))
    callback = RouterScheduleCallback({"top_k": StepSchedule({0: 3, 1: 1})})
    trainer_of(tmp_path, [callback]).fit(module, loader(batches(2)))
    assert seen == [3, 1]
    with pytest.raises(MisconfigurationException, match=r"has no number 'noise_std' to schedule. It has: top_k."):
        trainer_of(tmp_path, [RouterScheduleCallback({"noise_std": StepSchedule({0: 0})})]).fit(
            module, loader(batches(1))
        )


class Dense(LightningModule):
    """Without any MoE block, or with one of an unknown kind."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def training_step(self, batch, batch_idx):
        raise AssertionError

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_model_with_neither_says_what_would_help(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"has no MoE layer. Upcycle .*blocks of their own \(Mixtral"):
        trainer_of(tmp_path, [BalanceLossCallback()]).fit(Dense(torch.nn.Linear(2, 2)), loader(batches(1)))

    class Unknown(torch.nn.Linear):
        _can_record_outputs = transformers.DbrxPreTrainedModel._can_record_outputs

    with pytest.raises(MisconfigurationException, match=r"their router \(DbrxRouter\) is not one that is known"):
        trainer_of(tmp_path, [BalanceLossCallback()]).fit(Dense(Unknown(2, 2)), loader(batches(1)))


def test_a_model_that_is_moe_already_is_not_upcycled():
    for name in ("MixtralForCausalLM", "DeepseekV3ForCausalLM"):
        model = NativeModule(name).model
        before = [*model.state_dict()]
        with pytest.raises(ValueError, match=r"is a Mixture of Experts already: .* is a block of it.*docs/native.md"):
            upcycle(model, UpcycleConfig(num_experts=2))
        assert [*model.state_dict()] == before


@pytest.mark.parametrize("padding", [False, True])
def test_watching_leaves_a_model_that_collects_its_router_logits_alone(padding, tmp_path):
    """transformers collects what routers return: whoever asks one more must not be among them."""
    weights, data = [], batches(3, padding=padding)
    for callbacks in ([], [ExpertUtilizationCallback()]):
        module = NativeModule("MixtralForCausalLM", lr=0.5)
        module.model.config.output_router_logits = True
        module.model.router_aux_loss_coef = 0.5
        trainer_of(tmp_path, callbacks, log_every_n_steps=1).fit(module, loader(data))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", ["native.md", "dashboard.md"])
def test_the_example_of_the_documentation(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / name).read_text()
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], {})
    assert "tensor(" in capsys.readouterr().out


# --- torch.compile ---


def compile_and_compare(folder):
    """Over AOTAutograd, as any backend; in pieces, as an observer or Lightning breaks the graph."""
    data = batches(1, padding=True)
    for kind in KINDS:
        module = NativeModule(kind)
        module.model.compile(backend="aot_eager")
        compare(trained(folder, module, data), Explicit(kind, LOSSES), data)


@pytest.mark.slow
def test_a_compiled_model_has_the_same_gradient(tmp_path):
    # in a process without jaxtyping's checks, which Dynamo cannot trace
    code = f"import test_native; test_native.compile_and_compare({str(tmp_path)!r}); print('compared')"
    assert "compared" in run_script(code, tmp_path, timeout=200).stdout
