"""What is logged is what a count by hand finds: selections, once per token, padding left out, over ranks and steps.

The modules learn with a rate of 0, so that a copy routes every batch as the trained module did.
"""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_fixtures import (
    FFNS,
    ForeignModule,
    LazyModule,
    ManualModule,
    batches,
    loader,
    logged,
    small_config,
    trainer_of,
    two_ranks,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_moe import (
    ExpertUtilizationCallback,
    LoadBalancingLoss,
    MoEUpcycleCallback,
    MoEWarning,
    ZLoss,
    record_routing,
    routing,
    upcycle,
)
from lightning_moe.callbacks.heatmap import load_heatmap
from lightning_moe.canvas import SCALE, text_width

# sums of a few hundred float32 numbers, in another order
RELATIVE = 1e-5


def routings_of(data, config=None):
    """For each batch, layer to routing, from a copy of the module."""
    module = ForeignModule()
    upcycle(module, config or small_config())
    found = []
    for batch in data:
        with torch.no_grad(), record_routing() as window:
            module.task_loss(batch)
        found.append({name: window[name] for name in window})
    return found


def count_by_hand(window):
    """The values that a log over these forwards should hold, one token and one assignment at a time."""
    per_layer = {}
    for layer in FFNS:
        load, entropies, margins, dropped, balance, z = None, [], [], [], [], []
        for forward in window:
            r = forward[layer]
            T, E = r.logits.shape
            real = [True] * T if r.token_mask is None else r.token_mask.tolist()
            own = [0] * E
            for token, expert in zip(r.token_ids.tolist(), r.expert_ids.tolist(), strict=True):
                own[expert] += real[token]
            load = own if load is None else [a + b for a, b in zip(load, own, strict=True)]
            scores = [row for row, keep in zip(r.scores.tolist(), real, strict=True) if keep]
            logits = [row for row, keep in zip(r.logits.tolist(), real, strict=True) if keep]
            entropies += [-sum(p * math.log(p) for p in row) / math.log(E) for row in scores]
            for row, keep, chosen in zip(r.logits.tolist(), real, r.expert_ids.view(T, -1).tolist(), strict=True):
                if keep and len(set(chosen)) < E:
                    ranked = sorted(row, reverse=True)
                    margins.append(ranked[len(set(chosen)) - 1] - ranked[len(set(chosen))])
            over = [False] * len(r.expert_ids) if r.dropped is None else r.dropped.tolist()
            dropped += [gone for token, gone in zip(r.token_ids.tolist(), over, strict=True) if real[token]]
            mean = [sum(row[e] for row in scores) / len(scores) for e in range(E)]
            balance.append(E * sum(n / sum(own) * p for n, p in zip(own, mean, strict=True)))
            z.append(sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits) / len(logits))
        fractions = [n / sum(load) for n in load]
        per_layer[layer] = {
            "max_violation": max(load) / (sum(load) / len(load)) - 1,
            "dead_experts": sum(n == 0 for n in load),
            "load_entropy": -sum(f * math.log(f) for f in fractions if f) / math.log(len(load)),
            "routing_entropy": sum(entropies) / len(entropies),
            "router_margin": sum(margins) / len(margins),
            "drop_rate": sum(dropped) / len(dropped),
            "load_balancing_loss": sum(balance) / len(balance),
            "z_loss": sum(z) / len(z),
        }
    values = {f"moe_{key}/{layer}": v for layer, measures in per_layer.items() for key, v in measures.items()}
    for key in next(iter(per_layer.values())):
        numbers = [measures[key] for measures in per_layer.values()]
        values[f"moe/{key}"] = sum(numbers) if key == "dead_experts" else sum(numbers) / len(numbers)
    values["moe/max_violation_worst"] = max(measures["max_violation"] for measures in per_layer.values())
    return values


def logs_of(tmp_path, data, module=None, *, callbacks=(), **options):
    """Fits and returns step to logged values."""
    losses = [LoadBalancingLoss(0.3), ZLoss(0.05)]
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config(), balance_losses=losses), *callbacks], **options)
    trainer.fit(module or ForeignModule(lr=0.0), loader(data))
    return logged(trainer.logger.log_dir)


def compare(found, windows):
    assert list(found) == list(windows)
    for step, window in windows.items():
        assert counted(found[step]) == pytest.approx(count_by_hand(window), rel=RELATIVE, abs=1e-6)


def counted(values):
    """What is counted of the steps' routing; speed, and change from log to log, have tests of their own."""
    return {key: value for key, value in values.items() if not ("_per_second" in key or "selection_change" in key)}


# Numbers


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_each_log_counts_all_steps_since_the_last(tmp_path, every, padding):
    data = batches(6, batch_size=1, padding=padding)
    recorded = routings_of(data)
    windows = {last - 1: recorded[last - every : last] for last in range(every, 7, every)}
    compare(logs_of(tmp_path, data, log_every_n_steps=every), windows)


def test_the_data_can_show_a_mistake():
    """Some expert is dead in some step, and padding changes every measure by more than the tolerance."""
    data = batches(6, batch_size=1, padding=True)
    masked = routings_of(data)
    assert any(count_by_hand([step])["moe/dead_experts"] > 0 for step in masked)
    without = [{k: v for k, v in batch.items() if k != "attention_mask"} for batch in data]
    with_padding, without_padding = count_by_hand(routings_of(without)), count_by_hand(masked)
    for key, value in with_padding.items():
        if "drop_rate" in key:
            continue  # there is no capacity to be over
        assert "dead" in key or value != pytest.approx(without_padding[key], rel=10 * RELATIVE), key


def test_accumulated_micro_batches_are_counted_with_their_step(tmp_path):
    data = batches(8)
    recorded = routings_of(data)
    found = logs_of(tmp_path, data, accumulate_grad_batches=4, log_every_n_steps=1)
    compare(found, {0: recorded[:4], 1: recorded[4:]})


def test_manual_accumulation_counts_every_batch(tmp_path):
    data = batches(4)
    recorded = routings_of(data)
    compare(logs_of(tmp_path, data, ManualModule(2, lr=0.0), log_every_n_steps=2), {1: recorded[:2], 3: recorded[2:]})


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(tmp_path, reentrant):
    data = batches(4, padding=True)
    module = ForeignModule(lr=0.0)
    module.net.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    recorded = routings_of(data)
    compare(logs_of(tmp_path, data, module, log_every_n_steps=2), {1: recorded[:2], 3: recorded[2:]})


def test_lazy_modules_are_counted(tmp_path):
    data = batches(2)
    compare(logs_of(tmp_path, data, LazyModule(lr=0.0), log_every_n_steps=2), {1: routings_of(data)})


def test_validation_is_not_counted(tmp_path):
    data = batches(4)
    trainer = trainer_of(
        tmp_path,
        [MoEUpcycleCallback(small_config())],
        val_check_interval=1,
        log_every_n_steps=2,
        num_sanity_val_steps=1,
    )
    trainer.fit(ForeignModule(lr=0.0), loader(data), loader(batches(3, seed=5)))
    recorded = routings_of(data)
    compare(logged(trainer.logger.log_dir), {1: recorded[:2], 3: recorded[2:]})


@pytest.mark.slow
def test_two_processes_count_together(tmp_path):
    """Rank r has batches r, r + 2, ...; each log holds two steps of both ranks, four forwards."""
    recorded = routings_of(batches(8, padding=True))
    found = logged(Path(two_ranks()["metrics"]).parent)
    compare(found, {1: recorded[:4], 3: recorded[4:]})


def test_another_upcycled_model_in_the_step_is_not_counted(tmp_path):
    data = batches(2)
    teacher = ForeignModule(seed=9).net.inner
    upcycle(teacher, small_config(num_experts=3))

    class Student(ForeignModule):
        def training_step(self, batch, batch_idx):
            teacher(**batch)
            return super().training_step(batch, batch_idx)

    compare(logs_of(tmp_path, data, Student(lr=0.0), log_every_n_steps=2), {1: routings_of(data)})


# Keys


def test_without_layers_the_number_of_keys_is_bounded(tmp_path):
    callback = ExpertUtilizationCallback(per_layer=False)
    (values,) = logs_of(tmp_path, batches(1), callbacks=[callback], log_every_n_steps=1).values()
    assert {key.partition("/")[0] for key in values} == {"moe"}
    assert len(values) == 11


def test_more_than_64_layers_are_logged_as_aggregates_only(tmp_path):
    class Deep(ForeignModule):
        def __init__(self):
            super().__init__(num_hidden_layers=65)

    (values,) = logs_of(tmp_path, batches(1), Deep(), log_every_n_steps=1).values()
    assert len(values) == 11


def test_without_balance_losses_none_is_logged(tmp_path):
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config(), balance_losses=False)], log_every_n_steps=1)
    trainer.fit(ForeignModule(), loader(batches(1)))
    (values,) = logged(trainer.logger.log_dir).values()
    assert not any("loss" in key for key in values)
    assert "moe/max_violation" in values


# Loggers


def events_of(folder):
    # no limit on the events that are kept
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "histograms": 0})
    return events.Reload()


def test_tensorboard_gets_scalars_an_image_and_a_histogram(tmp_path):
    data = batches(7)
    logger = TensorBoardLogger(tmp_path)
    callbacks = [MoEUpcycleCallback(small_config()), ExpertUtilizationCallback(images_every_n_logs=2)]
    trainer_of(tmp_path, callbacks, logger=logger, log_every_n_steps=2).fit(ForeignModule(lr=0.0), loader(data))
    events = events_of(logger.log_dir)
    recorded = routings_of(data)
    tags = events.Tags()
    expected = count_by_hand(recorded[2:4])
    assert expected.keys() <= set(tags["scalars"])
    for key, value in expected.items():
        by_step = {event.step: event.value for event in events.Scalars(key)}
        assert list(by_step) == [1, 3, 5]
        assert by_step[3] == pytest.approx(value, rel=RELATIVE, abs=1e-6)
    # the first log and the third, which is also the last
    assert [event.step for event in events.Images("moe/expert_load")] == [1, 5]
    assert [event.step for event in events.Histograms("moe/relative_load")] == [1, 5]
    image = events.Images("moe/expert_load")[0]
    assert image.encoded_image_string.startswith(b"\x89PNG")
    histogram = events.Histograms("moe/relative_load")[0].histogram_value
    # one value per expert and layer, of mean 1
    assert (histogram.num, histogram.sum) == (10, pytest.approx(10, rel=1e-6))


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [0, 1, 2]), (10, [0, 2])])
def test_how_often_pictures_are_drawn(tmp_path, every, steps):
    logger = TensorBoardLogger(tmp_path)
    callbacks = [MoEUpcycleCallback(small_config()), ExpertUtilizationCallback(images_every_n_logs=every)]
    trainer_of(tmp_path, callbacks, logger=logger, log_every_n_steps=1).fit(ForeignModule(), loader(batches(3)))
    events = events_of(logger.log_dir)
    pictures = ["moe/expert_load", "moe/coactivation"] if steps else []
    assert events.Tags()["images"] == pictures
    for picture in pictures:
        assert [event.step for event in events.Images(picture)] == steps


def test_a_negative_picture_interval_is_refused():
    with pytest.raises(ValueError, match="images_every_n_logs=-1"):
        ExpertUtilizationCallback(images_every_n_logs=-1)


def test_two_loggers(tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="board")]
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())], logger=loggers, log_every_n_steps=1)
    trainer.fit(ForeignModule(), loader(batches(2)))
    key = f"moe_max_violation/{FFNS[0]}"
    (csv_steps, board) = (logged(loggers[0].log_dir), events_of(loggers[1].log_dir))
    assert {event.step: event.value for event in board.Scalars(key)} == pytest.approx(
        {step: values[key] for step, values in csv_steps.items()}, rel=1e-6
    )


def test_without_a_logger_it_warns_once_and_can_be_monitored(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())], logger=False, log_every_n_steps=1)
        trainer.fit(ForeignModule(), loader(batches(3)))
    (warning,) = [w for w in caught if issubclass(w.category, MoEWarning)]
    assert "no logger" in str(warning.message)
    assert "moe/max_violation" in trainer.callback_metrics


def test_checkpoints_can_follow_it(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="moe/max_violation", every_n_train_steps=1)
    callbacks = [MoEUpcycleCallback(small_config()), best]
    trainer = trainer_of(tmp_path, callbacks, enable_checkpointing=True, log_every_n_steps=1)
    data = batches(6, batch_size=1)
    trainer.fit(ForeignModule(lr=0.0), loader(data))
    lowest = min(count_by_hand([step])["moe/max_violation"] for step in routings_of(data))
    assert float(best.best_model_score) == pytest.approx(lowest, rel=RELATIVE)


# State


def test_counts_survive_a_checkpoint_between_two_logs(tmp_path):
    data = batches(6)
    callbacks = [MoEUpcycleCallback(small_config())]
    saved = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer_of(tmp_path, [*callbacks, saved], enable_checkpointing=True, log_every_n_steps=3).fit(
        ForeignModule(lr=0.0), loader(data)
    )
    path = tmp_path / "saved" / "step=5.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["ExpertUtilizationCallback"]
    assert set(state["load"]) == set(FFNS)
    # 2 steps of 2 x 7 tokens with 2 experts each
    assert all(float(load.sum()) == 2 * 14 * 2 for load in state["load"].values())
    resumed = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())], log_every_n_steps=3)
    # Lightning does not skip batches: the sixth step of the resumed run sees the first batch of its loader
    resumed.fit(ForeignModule(lr=0.0), loader(data[5:] * 6), ckpt_path=str(path))
    compare(logged(resumed.logger.log_dir), {5: routings_of(data)[3:]})


def test_resuming_with_other_balance_losses_between_two_logs(tmp_path):
    data = batches(4)
    saved = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    options = {"log_every_n_steps": 3, "enable_checkpointing": True}
    trainer_of(tmp_path, [MoEUpcycleCallback(small_config()), saved], **options).fit(ForeignModule(), loader(data))
    other = trainer_of(tmp_path, [MoEUpcycleCallback(small_config(), balance_losses=False)], log_every_n_steps=3)
    other.fit(ForeignModule(), loader(data), ckpt_path=str(tmp_path / "saved" / "step=2.ckpt"))
    assert other.global_step == 4
    assert "moe/max_violation" in other.callback_metrics


def test_one_callback_in_two_trainers(tmp_path):
    callback = ExpertUtilizationCallback()
    for name in ("first", "second"):
        logger = CSVLogger(tmp_path, name=name)
        callbacks = [MoEUpcycleCallback(small_config()), callback]
        trainer_of(tmp_path, callbacks, logger=logger, log_every_n_steps=2).fit(ForeignModule(), loader(batches(2)))
        assert list(logged(logger.log_dir)) == [1]


class FailsOnce(ForeignModule):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            raise RuntimeError("as users have it")
        return loss


def test_nothing_is_observed_after_an_exception(tmp_path):
    during = []

    class Look(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            during.append(len(routing._observers))

    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config()), Look()])
    with pytest.raises(RuntimeError, match="as users"):
        trainer.fit(FailsOnce(), loader(batches(3)))
    assert during == [1]
    assert routing._observers == []


def test_nothing_is_observed_after_training(tmp_path):
    trainer_of(tmp_path, [MoEUpcycleCallback(small_config())]).fit(ForeignModule(), loader(batches(2)))
    assert routing._observers == []


# The picture


def cells_of(load):
    """The colour of each cell near its corner, where no number is written, found by the layout of a heatmap."""
    picture = load_heatmap(load.double(), [str(i) for i in range(load.shape[0])])
    num_layers, num_experts = load.shape
    height, width = max(3, min(24, 760 // num_layers)), max(3, min(48, 760 // num_experts))
    left = max(text_width(text) for text in ("layer", str(num_layers - 1))) + 18
    rows = SCALE * (52 + height * np.arange(num_layers) + 1)
    columns = round(SCALE * left) + SCALE * (width * np.arange(num_experts) + 1)
    return picture, picture[rows][:, columns].astype(int)


def test_colours():
    """Mean 4: balanced is white, dead is dark blue, twice the mean and beyond dark red."""
    picture, cells = cells_of(torch.tensor([[4.0, 4.0, 4.0, 4.0], [0.0, 8.0, 6.0, 2.0], [16.0, 0.0, 0.0, 0.0]]))
    assert picture.dtype == np.uint8
    assert (cells[0] >= 245).all()
    (dead, double, more, less), (overloaded, *empty) = cells[1], cells[2]
    red, _, blue = range(3)
    assert dead[blue] > 2 * dead[red]
    assert less[blue] > less[red] > dead[red]
    assert more[red] > more[blue]
    assert double[red] > 2 * double[blue]
    assert (overloaded == double).all()
    assert all((cell == dead).all() for cell in empty)


@pytest.mark.parametrize("shape", [(1, 2), (2, 5), (64, 256), (200, 8)])
def test_pictures_of_all_sizes(shape):
    load = torch.ones(shape)
    load[-1, -1] = 0  # dead; the others of this row have a little more than the mean, twice it where they are one
    picture, cells = cells_of(load)
    assert max(picture.shape) < 1900
    assert picture.shape[2] == 3
    dead = cells[-1, -1]
    assert dead[2] > 2 * dead[0]
    assert cells[-1, 0, 0] > cells[-1, 0, 2]
    assert (cells[:-1] >= 245).all()


def test_a_layer_without_tokens_is_drawn_as_dead():
    _, cells = cells_of(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert (cells[1] == cells[1, 0]).all()
    assert cells[1, 0, 2] > 2 * cells[1, 0, 0]
