"""What the dashboard shows beside the counts of a log: speed, change, pairs of experts, text; and in which logger."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning_fixtures import FFNS, ForeignModule, batches, loader, logged, small_config, tiny_llama, trainer_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from lightning_moe import (
    ExpertUtilizationCallback,
    HashRouter,
    LowRankInit,
    MoEUpcycleCallback,
    UpcycleConfig,
    moe_layers,
    record_routing,
    upcycle,
)
from lightning_moe.callbacks import monitor, throughput
from lightning_moe.callbacks.heatmap import coactivation_heatmaps, load_heatmap
from lightning_moe.callbacks.throughput import Throughput
from lightning_moe.canvas import SCALE, text_width
from lightning_moe.heatmap import SHARE

MEASURES = ("max_violation", "dead_experts", "load_entropy", "routing_entropy", "router_margin", "drop_rate")


def values_of(tmp_path, data, module, callbacks, **options):
    trainer = trainer_of(tmp_path, callbacks, **{"log_every_n_steps": 1, **options})
    trainer.fit(module, loader(data))
    return logged(trainer.logger.log_dir)


# Speed


def test_operations_are_those_that_torch_counts():
    """Forward and backward of the dense model, whose attention is written out: every product is one of matrices."""
    model = tiny_llama(attn_implementation="eager", vocab_size=96, hidden_size=32, intermediate_size=64)
    ids = torch.randint(0, 96, (3, 10))
    with FlopCounterMode(display=False) as counter:
        # the inputs want a gradient, as behind an embedding that is trained
        model(inputs_embeds=model.get_input_embeddings()(ids), labels=ids).loss.backward()
    own = Throughput(model, {}).operations_per_token(torch.zeros(0), sequence_length=10)
    # the weights of the norms, which multiply no matrix, are among the parameters: 0.4 %
    assert own == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.01)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("init", [None, LowRankInit(rank=2)])
def test_only_experts_that_compute_are_counted(frozen, init):
    model = tiny_llama(vocab_size=96)
    upcycle(model, UpcycleConfig(num_experts=4, init=init))
    if frozen:
        for layer in moe_layers(model).values():
            layer.experts.requires_grad_(False)
    speed = Throughput(model, moe_layers(model))
    none, some = (speed.operations_per_token(torch.tensor([k, k]), 0) for k in (0.0, 1.5))
    # gate, up and down of 8 by 12, or the A and B of rank 2 beside each
    of_one = 3 * 8 * 12 if init is None else 3 * 2 * (8 + 12)
    assert some - none == pytest.approx(2 * 1.5 * (4 if frozen else 6) * of_one)
    outside = {
        name: p for name, p in model.named_parameters() if ".experts." not in name and "embed_tokens" not in name
    }
    shared = 0 if init is None else 2 * 4 * 3 * 8 * 12  # frozen, in both layers
    assert none == 6 * sum(p.numel() for p in outside.values()) + shared


def test_an_embedding_counts_where_it_is_the_output_layer_too():
    untied, tied = (Throughput(tiny_llama(tie_word_embeddings=tie), {}) for tie in (False, True))
    assert untied.operations_per_token(torch.zeros(0), 5) == tied.operations_per_token(torch.zeros(0), 5)


class Clock:
    """Time goes on by what the test says, not by what passes."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


class Slow(ForeignModule):
    """A training batch takes 2 seconds, one of validation 50."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def training_step(self, batch, batch_idx):
        self.clock.now += 2
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.clock.now += 50
        super().validation_step(batch, batch_idx)


def test_tokens_per_second_leave_validation_and_padding_out(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    data = batches(4, padding=True)
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())], val_check_interval=1, log_every_n_steps=2)
    module = Slow(clock)
    trainer.fit(module, loader(data), loader(batches(1)))
    found = logged(trainer.logger.log_dir)
    assert list(found) == [1, 3]
    for step, values in found.items():
        tokens = sum(int(batch["attention_mask"].sum()) for batch in data[step - 1 : step + 1])
        assert values["moe/tokens_per_second"] == pytest.approx(tokens / 4, rel=1e-5)
        per_token = Throughput(module, moe_layers(module)).operations_per_token(torch.full((2,), 2.0), 7)
        assert values["moe/tflops_per_second"] == pytest.approx(per_token * tokens / 4 / 1e12, rel=1e-5)
        assert "moe/mfu" not in values  # nobody knows the peak of this CPU


def test_mfu_is_the_share_of_a_known_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "_peak", lambda trainer, module: 10**9)
    (values,) = values_of(tmp_path, batches(1), ForeignModule(), [MoEUpcycleCallback(small_config())]).values()
    assert values["moe/mfu"] == pytest.approx(values["moe/tflops_per_second"] * 1e12 / 1e9, rel=1e-5)


# Change


class KeepsGates(Callback):
    """The first hidden states that reach each router in each step, and its gate there."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        for name, layer in moe_layers(pl_module).items():
            layer.router.register_forward_pre_hook(partial(self.look, name))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append({})

    def look(self, name, router, given):
        if not router.training:
            return  # asked by the callback itself
        x, tokens = given[0].detach(), given[1] if len(given) > 1 else None
        if tokens is not None and tokens.mask is not None:
            x = x[tokens.mask]
        self.seen[-1].setdefault(name, (x[:128].clone(), router.gate.detach().clone()))


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_change_is_that_of_the_hidden_states_kept_from_the_last_log(every, padding, tmp_path):
    kept = KeepsGates()
    callbacks = [MoEUpcycleCallback(small_config(router={"noise_std": 0.5})), kept]
    data = batches(6, padding=padding)
    found = values_of(tmp_path, data, ForeignModule(lr=0.3), callbacks, log_every_n_steps=every)
    changes = []
    for step in list(found)[1:]:
        now, before = kept.seen[step], kept.seen[step - every]
        for name in FFNS:
            x, gate = before[name]
            sets = [[set(row.topk(2).indices.tolist()) for row in x @ g.T] for g in (gate, now[name][1])]
            change = sum(1 - len(a & b) / 2 for a, b in zip(*sets, strict=True)) / len(x)
            assert found[step][f"moe_selection_change/{name}"] == pytest.approx(change, abs=1e-6)
            changes.append(change)
        assert found[step]["moe/selection_change"] == pytest.approx(sum(changes[-2:]) / 2, abs=1e-6)
    assert 0 < max(changes) < 1
    assert "moe/selection_change" not in found[every - 1]


def test_looking_at_the_routers_changes_nothing_of_training(tmp_path):
    """Routers with noise: whoever draws a number more, or leaves evaluation mode on, trains another model."""
    weights = []
    for watch in (False, True):
        module = ForeignModule()
        torch.manual_seed(3)
        config = small_config(router={"noise_std": 0.5})
        callbacks = [MoEUpcycleCallback(config, log_utilization=watch)]
        trainer_of(tmp_path, callbacks, log_every_n_steps=1).fit(module, loader(batches(4)))
        weights.append(torch.cat([parameter.flatten() for parameter in module.parameters()]).detach())
    assert torch.equal(*weights)


def test_routers_by_token_ids_have_no_such_change(tmp_path):
    callbacks = [MoEUpcycleCallback(UpcycleConfig(num_experts=5, router=HashRouter))]
    found = values_of(tmp_path, batches(2), ForeignModule(), callbacks)
    assert not any("selection_change" in key for values in found.values() for key in values)
    assert "moe/max_violation" in found[1]


# Drops, pairs, parts


def test_what_is_over_capacity_is_counted(tmp_path):
    config, data = small_config(num_experts=3, capacity_factor=0.7), batches(2, padding=True)
    module = ForeignModule(lr=0.0)
    found = values_of(tmp_path, data, module, [MoEUpcycleCallback(config)], log_every_n_steps=2)[1]
    twin = ForeignModule()
    upcycle(twin, config)
    for layer in moe_layers(twin).values():
        layer.train()
    dropped, chosen = dict.fromkeys(FFNS, 0), dict.fromkeys(FFNS, 0)
    for batch in data:
        with torch.no_grad(), record_routing() as window:
            twin.task_loss(batch)
        for name in FFNS:
            for token, gone in zip(window[name].token_ids.tolist(), window[name].dropped.tolist(), strict=True):
                real = bool(batch["attention_mask"].flatten()[token])
                chosen[name] += real
                dropped[name] += real and gone
    for name in FFNS:
        assert 0 < dropped[name] < chosen[name]
        assert found[f"moe_drop_rate/{name}"] == pytest.approx(dropped[name] / chosen[name], rel=1e-5)


def test_pairs_of_experts_are_those_of_all_steps_since_the_last_picture(tmp_path, monkeypatch):
    drawn = []

    def draw(shares):
        drawn.append(shares)
        return coactivation_heatmaps(shares)

    monkeypatch.setattr(monitor, "coactivation_heatmaps", draw)
    data, config = batches(6, padding=True), small_config(num_experts=5)
    callbacks = [MoEUpcycleCallback(config), ExpertUtilizationCallback(images_every_n_logs=2)]
    values_of(tmp_path, data, ForeignModule(lr=0.0), callbacks)
    twin = ForeignModule()
    upcycle(twin, config)
    # logs 0, 2 and 4 draw, and the end draws the last once more
    for shares, steps in zip(drawn, (data[:1], data[1:3], data[3:5], data[5:]), strict=True):
        pairs = {name: np.zeros((5, 5)) for name in FFNS}
        for batch in steps:
            with torch.no_grad(), record_routing() as window:
                twin.task_loss(batch)
            for name in FFNS:
                experts = window[name].expert_ids.view(-1, 2).tolist()
                for (one, other), real in zip(experts, batch["attention_mask"].flatten().tolist(), strict=True):
                    for i, j in ((one, other), (other, one)):
                        pairs[name][i, j] += real
        assert list(shares) == ["0", "1"]
        for share, counts in zip(shares.values(), pairs.values(), strict=True):
            # with two experts a token, the tokens of i are the pairs of its row
            expected = counts / np.maximum(counts.sum(1, keepdims=True), 1)
            np.testing.assert_allclose(share.numpy(), expected, rtol=1e-6)


def test_layers_of_different_numbers_of_experts(tmp_path):
    """Nothing is filled up: an expert that a layer has not is not dead."""

    class Mixed(ForeignModule):
        def __init__(self):
            super().__init__(lr=0.0)
            upcycle(self.net, small_config(num_experts=5, layers=["inner.model.layers.0.mlp"]))
            upcycle(self.net, small_config(num_experts=2, layers=["inner.model.layers.1.mlp"]))
            for name, layer in moe_layers(self).items():
                layer.name = name

    data = batches(1, batch_size=4)
    found = values_of(tmp_path, data, Mixed(), [ExpertUtilizationCallback()])[0]
    twin = Mixed()
    with torch.no_grad(), record_routing() as window:
        twin.task_loss(data[0])
    dead = 0
    for name, size in zip(FFNS, (5, 2), strict=True):
        counts = torch.bincount(window[name].expert_ids, minlength=size)
        assert found[f"moe_max_violation/{name}"] == pytest.approx(
            float(counts.max() / counts.float().mean() - 1), rel=1e-5
        )
        assert found[f"moe_dead_experts/{name}"] == int((counts == 0).sum())
        dead += int((counts == 0).sum())
    assert found["moe/dead_experts"] == dead
    assert found["moe_max_violation/" + FFNS[1]] == 0  # both experts of two get every token
    assert all(math.isfinite(value) for value in found.values())


def test_an_expert_that_a_layer_has_not_is_grey():
    picture = load_heatmap(torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, float("nan")]]), ["0", "1"])
    left = SCALE * (text_width("layer") + 18)
    cells = picture[[SCALE * (52 + 2), SCALE * (52 + 24 + 2)]][
        :, [round(left) + SCALE * (48 * e + 2) for e in range(3)]
    ]
    assert (cells[0] >= 245).all()
    assert (cells[1, :2] >= 245).all()
    assert tuple(cells[1, 2]) == (225, 225, 225)


@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 2), (5, 8), (12, 256)])
def test_pictures_of_pairs_of_all_sizes(num_layers, num_experts):
    share = torch.zeros(num_experts, num_experts)
    share[0, -1] = 1.0
    picture = coactivation_heatmaps({str(i): share for i in range(num_layers)})
    assert max(picture.shape) < 2000
    side, top, left = SCALE * 150, SCALE * 88, SCALE * 44
    centre = int(side / num_experts / 2)
    assert tuple(picture[top + centre, left + side - 1 - centre]) == SHARE.colours[-1]
    assert tuple(picture[top + side - 1 - centre, left + centre]) == SHARE.colours[0]


# State


def test_a_picture_after_a_resume_has_all_pairs_since_the_last(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        monitor, "coactivation_heatmaps", lambda shares: drawn.append(shares) or np.zeros((4, 4, 3), np.uint8)
    )
    data = batches(4)
    saved = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")

    def callbacks():
        return [MoEUpcycleCallback(small_config()), ExpertUtilizationCallback(images_every_n_logs=2)]

    options = {"log_every_n_steps": 2, "enable_checkpointing": True, "max_epochs": 1}
    trainer_of(tmp_path, [*callbacks(), saved], **options).fit(ForeignModule(lr=0.0), loader(data))
    whole = drawn[-1]
    drawn.clear()
    # Lightning does not skip batches: the fourth step of the resumed run sees the first batch of its loader
    trainer_of(tmp_path, callbacks(), **options).fit(
        ForeignModule(lr=0.0), loader(data[3:] * 4), ckpt_path=str(tmp_path / "saved" / "step=3.ckpt")
    )
    (again,) = drawn
    assert whole.keys() == again.keys()
    for label, share in whole.items():
        assert torch.equal(share, again[label])


# Loggers


def test_tensorboard_is_told_what_each_number_means_and_which_belong_together(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())], logger=logger, log_every_n_steps=1)
    trainer.fit(ForeignModule(), loader(batches(3)))
    events = EventAccumulator(str(logger.log_dir), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    tags = events.Tags()
    text = events.Tensors("moe/about/text_summary")[0].tensor_proto.string_val[0].decode()
    for key in tags["scalars"]:
        if key.startswith("moe/"):
            assert f"| {key.removeprefix('moe/')} |" in text or key == "moe/max_violation_worst"
    config = events.Tensors("moe/config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "num_experts" in config
    assert "TopKRouter" in config
    receipt = events.Tensors("moe/receipt/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "Upcycled 2 of 2 FFNs" in receipt
    assert "custom_scalars__config__" in tags["tensors"]
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    # every chart has a number to show
    patterns = [match.decode() for match in re.findall(rb"moe[\w/$.*]+", layout)]
    assert len(patterns) > 10
    for pattern in patterns:
        assert any(re.match(pattern, key) for key in tags["scalars"]), pattern


class Elsewhere(Logger):
    """A logger of another service: what it is given is kept."""

    name, version, root_dir = "elsewhere", "0", None

    def __init__(self, experiment=None):
        super().__init__()
        self.given, self._experiment = {}, experiment

    @property
    def experiment(self):
        return self._experiment

    def log_metrics(self, metrics, step=None):
        self.given.update(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class LikeWandb(Elsewhere):
    def log_image(self, key, images, step=None):
        self.given[key] = images

    def log_text(self, key, columns, data, step=None):
        self.given[key] = data


class MlflowClient:
    def __init__(self):
        self.given = {}

    def log_image(self, run_id, image, artifact_file):
        self.given[artifact_file] = (run_id, image)

    def log_text(self, run_id, text, artifact_file):
        self.given[artifact_file] = (run_id, text)


class LikeMlflow(Elsewhere):
    run_id = "a-run"


def test_other_loggers_get_what_they_can_show(tmp_path):
    wandb, mlflow, plain = LikeWandb(), LikeMlflow(MlflowClient()), CSVLogger(tmp_path)
    trainer = trainer_of(
        tmp_path, [MoEUpcycleCallback(small_config())], logger=[wandb, mlflow, plain], log_every_n_steps=1
    )
    trainer.fit(ForeignModule(), loader(batches(1)))
    for logger in (wandb, mlflow):
        assert {f"moe_{name}/{FFNS[0]}" for name in MEASURES} <= set(logger.given)
    for picture in ("moe/expert_load", "moe/coactivation"):
        (image,) = wandb.given[picture]
        assert image.shape[2] == 3
        run, same = mlflow.experiment.given[f"{picture}_0.png"]
        assert run == "a-run"
        assert np.array_equal(image, same)
    assert "| max_violation |" in wandb.given["moe/about"][0][0]
    assert "Upcycled 2 of 2" in mlflow.experiment.given["moe/receipt.md"][1]


def test_keys_are_bounded_whatever_the_number_of_experts(tmp_path):
    """64 layers of 256 experts: what is logged grows with neither the experts nor the steps."""
    counts = []
    for num_experts in (4, 256):
        callbacks = [MoEUpcycleCallback(small_config(num_experts=num_experts))]
        found = values_of(tmp_path, batches(2), ForeignModule(num_hidden_layers=64), callbacks)
        counts.append(len(set().union(*found.values())))
    assert counts[0] == counts[1] < 64 * 10 + 20
