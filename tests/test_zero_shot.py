"""Zero-shot scores are what a written-out loop finds, and a model in training is left as it was found."""

import copy
import itertools
import json
import pickle
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_fixtures import (
    VOCABULARY,
    Diary,
    ForeignModule,
    LazyModule,
    batches,
    loader,
    logged,
    run_script,
    small_config,
    tiny_llama,
    trainer_of,
    word_tokenizer,
    write_corpus,
)
from lm_eval.api.instance import Instance
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader
from transformers import MixtralConfig, MixtralForCausalLM
from zero_shot_fixtures import DOCUMENTS, make_tasks, words

import lightning_moe
from lightning_moe import (
    MoEModule,
    MoEUpcycleCallback,
    MoEWarning,
    TextDataModule,
    ZeroShotEvalCallback,
    attach_native,
    evaluation,
    record_routing,
    upcycle,
)
from lightning_moe.evaluation import LiveHFLM, evaluate_model, find_language_model, load_tasks, score_table, scores

TASKS = ["choose", "recite", "guess"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return folder, make_tasks(folder)


@pytest.fixture(scope="module")
def tasks(place):
    return load_tasks(TASKS, place[0])


@pytest.fixture
def documents(place):
    return place[1]


@pytest.fixture
def callback(place):
    """Makes a callback for these tasks."""

    def make(**options):
        chosen = {"tokenizer": word_tokenizer(), "include_path": place[0], "batch_size": 4, **options}
        return ZeroShotEvalCallback(chosen.pop("tasks", ["choose"]), **chosen)

    return make


def upcycled(dense=None, **changes):
    model = tiny_llama() if dense is None else copy.deepcopy(dense)
    upcycle(model, small_config(**changes))
    return model


def mixtral():
    config = MixtralConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, num_local_experts=4, initializer_range=0.5, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    attach_native(model)
    return model


MODELS = {"dense": tiny_llama, "upcycled": upcycled, "native": mixtral}


# --- the scores ---


@torch.no_grad()
def log_likelihood(model, text, continuation):
    """One forward of one text, without padding: the sum, and whether each word is the most probable."""
    tokenizer = word_tokenizer()
    ids, known = tokenizer(f"{text} {continuation}")["input_ids"], len(tokenizer(text)["input_ids"])
    log_probs = model.eval()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    says = [(log_probs[place - 1, ids[place]].item(), log_probs[place - 1].argmax() == ids[place]) for place in
            range(known, len(ids))]  # fmt: skip
    return sum(one for one, _ in says), all(best for _, best in says)


def written_out(model, documents):
    """All scores, and the log-likelihoods of each document."""
    sums = {"choose": [], "guess": [], "recite": []}
    for document in documents:
        for task, key in (("choose", "choices"), ("guess", "single")):
            sums[task].append([log_likelihood(model, document["text"], choice)[0] for choice in document[key]])
        sums["recite"].append(log_likelihood(model, document["text"], document["end"]))
    found = {}
    for task, key in (("choose", "choices"), ("guess", "single")):
        lengths = [[len(choice) for choice in document[key]] for document in documents]
        labels = [document["label"] for document in documents]
        right = [np.argmax(row) == label for row, label in zip(sums[task], labels, strict=True)]
        normed = [np.argmax(np.divide(row, n)) == label
                  for row, n, label in zip(sums[task], lengths, labels, strict=True)]  # fmt: skip
        found[task] = {"acc": np.mean(right), "acc_norm": np.mean(normed)}
        found[task]["acc_stderr"] = np.std(right, ddof=1) / len(right) ** 0.5
    found["recite"] = {"perplexity": np.exp(-np.mean([one for one, _ in sums["recite"]]))}
    found["recite"]["acc"] = np.mean([exact for _, exact in sums["recite"]])
    return found, sums


def responses(results, task):
    """Of each document, in order: the log-likelihood of each continuation."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [[answer[0] for answer in sample["filtered_resps"]] for sample in samples]


@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_those_of_a_written_out_loop(kind, tasks, documents):
    model = MODELS[kind]()
    results = evaluate_model(LiveHFLM(model, word_tokenizer(), batch_size=4), tasks, log_samples=True)
    found, (expected, sums) = scores(results), written_out(model, documents)
    for task, values in expected.items():
        for metric, value in values.items():
            # float32 sums of a few log-probabilities, in batches of other sizes
            assert found[task][metric] == pytest.approx(value, rel=1e-5), (task, metric)
    for task in ("choose", "guess"):
        np.testing.assert_allclose(responses(results, task), sums[task], rtol=1e-5)
    np.testing.assert_allclose(responses(results, "recite"), [[one] for one, _ in sums["recite"]], rtol=1e-5)
    # a bootstrap of 1,000 samples against one of 20,000; the perplexity of 21 texts is skewed
    single = np.array([one for one, _ in sums["recite"]])
    samples = np.random.default_rng(0).choice(single, (20_000, DOCUMENTS))
    assert found["recite"]["perplexity_stderr"] == pytest.approx(np.exp(-samples.mean(1)).std(), rel=0.3)


@pytest.mark.parametrize("changes", [{}, {"capacity_factor": 0.25}, {"router": {"noise_std": 1.0, "jitter": 0.2}}])
def test_at_step_0_an_upcycled_copy_scores_as_the_dense_model_document_by_document(changes, tasks):
    dense = tiny_llama()
    before = evaluate_model(LiveHFLM(dense, word_tokenizer()), tasks, log_samples=True)
    moe = upcycled(dense, **changes).train()
    after = evaluate_model(LiveHFLM(moe, word_tokenizer()), tasks, log_samples=True)
    for task in ("choose", "guess"):
        for one, other in zip(before["samples"][task], after["samples"][task], strict=True):
            assert (one["doc_id"], one["acc"], one["acc_norm"]) == (other["doc_id"], other["acc"], other["acc_norm"])
    for task in TASKS:
        np.testing.assert_allclose(responses(after, task), responses(before, task), atol=1e-4)


def test_texts_are_scored_up_to_the_longest_the_model_can_read(place, tasks, documents):
    model = tiny_llama()
    results = evaluate_model(LiveHFLM(model, word_tokenizer(), max_length=5), tasks, log_samples=True)
    ends = [words(*[int(w[1:]) if w != "<eos>" else 0 for w in d["text"].split()][-5:]) for d in documents]
    for document, end, sample in zip(documents, ends, responses(results, "guess"), strict=True):
        for choice, answer in zip(document["single"], sample, strict=True):
            assert answer == pytest.approx(log_likelihood(model, end, choice)[0], rel=1e-5)
    with pytest.raises(ValueError, match=r"longer than max_length=2"):
        evaluate_model(LiveHFLM(model, word_tokenizer(), max_length=2), load_tasks(["recite"], place[0]))


def instances(kind, arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_whole_texts_and_generated_ones_are_those_of_a_written_out_loop(kind, documents):
    model, tokenizer = MODELS[kind]().train(), word_tokenizer()
    model.generation_config.eos_token_id = 0
    lm = LiveHFLM(model, tokenizer, batch_size=4)
    texts = [document["text"] for document in documents]
    read = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))
    options = {"until": ["w1"], "max_gen_toks": 4, "do_sample": False}
    said = lm.generate_until(instances("generate_until", [(text, dict(options)) for text in texts]))
    assert model.training
    assert model.model.layers[1].training
    model.eval()
    for text, value, more in zip(texts, read, said, strict=True):
        ids = tokenizer(text)["input_ids"]
        # after the end of a text
        log_probs = model(input_ids=torch.tensor([[0, *ids]])).logits[0].log_softmax(-1)
        assert value == pytest.approx(sum(log_probs[i, token].item() for i, token in enumerate(ids)), rel=1e-5)
        for _ in range(4):
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        # it ends before the end of a text, and before the word it is told to stop at
        new = itertools.takewhile(lambda i: i not in (0, 1), ids[-4:])
        # a word that begins like the other, as w12, ends it too
        assert more.split() == words(*new).partition("w1")[0].split()


def test_few_shot_examples_are_the_same_at_every_evaluation(place, tmp_path):
    task = yaml.safe_load((place[0] / "guess.yaml").read_text())
    task |= {"task": "shots", "num_fewshot": 2, "fewshot_split": "test"}
    (tmp_path / "shots.yaml").write_text(yaml.safe_dump(task))
    lm, loaded = LiveHFLM(tiny_llama(), word_tokenizer()), load_tasks(["shots"], tmp_path)
    first, again = (evaluate_model(lm, loaded, log_samples=True)["samples"]["shots"] for _ in range(2))
    asked = [sample["arguments"] for sample in first]
    assert len({arguments[0][0].split()[0] for arguments in asked}) > 3
    assert [sample["arguments"] for sample in again] == asked


def test_the_limit_takes_the_first_documents_and_the_table_shows_the_errors(tasks, documents):
    model = tiny_llama()
    found = scores(evaluate_model(LiveHFLM(model, word_tokenizer()), tasks, limit=6))
    assert found["guess"]["acc"] == pytest.approx(written_out(model, documents[:6])[0]["guess"]["acc"])
    lines = score_table(found).splitlines()
    assert lines[0].split() == ["task", "metric", "value", "std.", "error"]
    assert len(lines) == 1 + 2 + 2 + 2
    acc, error = found["guess"]["acc"], found["guess"]["acc_stderr"]
    assert ["guess", "acc", f"{acc:.4f}", f"{error:.4f}"] in [line.split() for line in lines]


def test_mixed_precision_is_that_of_the_forward_and_the_softmax_is_float32(tasks):
    model, seen = tiny_llama(), []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    lm = LiveHFLM(model, word_tokenizer(), mixed_precision_dtype=torch.bfloat16)
    low = evaluate_model(lm, tasks, log_samples=True)
    high = evaluate_model(LiveHFLM(model, word_tokenizer()), tasks, log_samples=True)
    assert set(seen) == {torch.bfloat16, torch.float32}
    low, high = np.array(responses(low, "choose")), np.array(responses(high, "choose"))
    # three digits of bfloat16; its softmax would give sums that are multiples of 1/32
    np.testing.assert_allclose(low, high, atol=0.5)
    assert (np.abs(low * 32 - np.round(low * 32)) > 1e-3).mean() > 0.5


# --- what is left alone ---


@pytest.mark.parametrize("kind", ["upcycled", "native"])
def test_padding_reaches_no_statistic_of_a_router(kind, place):
    model = MODELS[kind]()
    with record_routing() as window:
        evaluate_model(LiveHFLM(model, word_tokenizer(), batch_size=8), load_tasks(["choose"], place[0]))
    tokenizer = word_tokenizer()
    texts = {
        tuple(tokenizer(f"{document['text']} {choice}")["input_ids"][:-1])
        for document in place[1]
        for choice in document["choices"]
    }
    assert len(window) == 2
    for routing in window.values():
        assert routing.token_mask is not None
        assert not routing.token_mask.all()
        assert routing.token_mask.sum() == sum(map(len, texts))


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("out of everything")


def draw(*_):
    random.random(), np.random.rand(), torch.rand(1)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_random_states_are_as_before(fails, tasks):
    model = upcycled(router={"noise_std": 1.0}).train()
    model.model.layers[0].eval()
    # something that draws, and in evaluation mode too
    model.lm_head.register_forward_hook(draw)
    if fails:
        model.lm_head = Broken()
    modes = [module.training for module in model.modules()]
    weights = {name: id(parameter) for name, parameter in model.named_parameters()}
    tokenizer = word_tokenizer()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    lm = LiveHFLM(model, tokenizer)
    for task in tasks["tasks"]:
        one = {"tasks": {task: tasks["tasks"][task]}}
        if fails:
            with pytest.raises(RuntimeError, match="out of everything"):
                evaluate_model(lm, one)
        else:
            evaluate_model(lm, one)
    assert [module.training for module in model.modules()] == modes
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == weights
    assert random.getstate() == states[0]
    np.testing.assert_equal(np.random.get_state(), states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert tokenizer.pad_token is None


class Shuffled(ForeignModule):
    """Dropout in the attention, validation in the middle of the epoch."""

    def __init__(self):
        super().__init__(attention_dropout=0.2)


def train(folder, name, zero_shot, first=False):
    seed_everything(5)
    config = small_config(router={"noise_std": 0.5, "jitter": 0.2}, capacity_factor=1.0)
    diary = Diary(folder / f"{name}.txt")
    callbacks = [MoEUpcycleCallback(config), diary]
    if zero_shot is not None:
        callbacks.insert(0 if first else 2, zero_shot)
    trainer = trainer_of(folder, callbacks, logger=CSVLogger(folder, name=name), max_epochs=2, log_every_n_steps=2)
    # the order of the data is drawn from the global generator
    data = DataLoader([batch["input_ids"][0] for batch in batches(12)], batch_size=2, shuffle=True, collate_fn=collate)
    module = Shuffled()
    trainer.fit(module, data)
    return module, diary.read(), logged(trainer.logger.log_dir, "moe/")


def collate(rows):
    return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}


def test_training_is_the_same_bit_for_bit(tmp_path, callback):
    module, losses, statistics = train(tmp_path, "without", None)
    assert len(losses) == 12
    for first in (True, False):
        zero_shot = callback(tasks=TASKS, every_n_steps=1)
        other, others, counted = train(tmp_path, f"with-{first}", zero_shot, first)
        assert others == losses
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
        # the same selections are counted: an evaluation is no part of them
        for step, values in statistics.items():
            timeless = {k: v for k, v in values.items() if "second" not in k}
            assert {k: counted[step][k] for k in timeless} == timeless
        entries = json.loads((tmp_path / f"with-{first}" / "version_0" / "zero_shot.json").read_text())
        assert [entry["step"] for entry in entries] == list(range(13))


@pytest.mark.parametrize("first", [False, True])
def test_the_time_of_an_evaluation_is_not_that_of_the_training(first, tmp_path, callback, monkeypatch):
    def sleep(*arguments, **options):
        time.sleep(0.5)
        return {"results": {}}

    monkeypatch.setattr(evaluation, "evaluate_model", sleep)
    callbacks = [MoEUpcycleCallback(small_config())]
    callbacks.insert(0 if first else 1, callback(every_n_steps=1, at_start=False))
    trainer = trainer_of(tmp_path, callbacks, log_every_n_steps=1)
    trainer.fit(ForeignModule(), loader(batches(4)))
    speeds = [values["moe/tokens_per_second"] for values in logged(trainer.logger.log_dir, "moe/").values()]
    assert len(speeds) == 4
    # 14 tokens a step; one step may be slow, for whatever reason
    assert sorted(speeds)[1] > 14 / 0.5


# --- the callback ---


def test_every_logger_the_json_and_the_metrics_hold_the_scores(tmp_path, callback, tasks, documents):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="board")]
    zero_shot = callback(tasks=TASKS, every_n_epochs=None, every_n_steps=3)
    module = ForeignModule()
    dense = copy.deepcopy(module.net.inner)
    trainer = trainer_of(tmp_path, [zero_shot], logger=loggers)
    trainer.fit(module, loader(batches(8)))
    entries = json.loads((tmp_path / "csv" / "version_0" / "zero_shot.json").read_text())
    assert [entry["step"] for entry in entries] == [0, 3, 6, 8]
    expected = written_out(dense, documents)[0]
    assert entries[0]["scores"]["guess"]["acc"] == pytest.approx(expected["guess"]["acc"])
    board = EventAccumulator(str(tmp_path / "board" / "version_0")).Reload()
    rows = logged(loggers[0].log_dir, "zero_shot/")
    for entry in entries:
        flat = {f"zero_shot/{task}/{m}": v for task, found in entry["scores"].items() for m, v in found.items()}
        assert rows[entry["step"]] == pytest.approx(flat)
        for name, value in flat.items():
            seen = {event.step: event.value for event in board.Scalars(name)}
            assert seen[entry["step"]] == pytest.approx(value)
    assert {"zero_shot/choose/acc", "zero_shot/choose/acc_stderr", "zero_shot/recite/perplexity"} <= set(flat)
    now = scores(evaluate_model(LiveHFLM(module.net.inner, word_tokenizer()), tasks))
    assert entries[-1]["scores"]["recite"]["perplexity"] == pytest.approx(now["recite"]["perplexity"])
    assert {k: float(v) for k, v in trainer.callback_metrics.items() if k in flat} == pytest.approx(flat)


# when they look: at the end of the epoch, after validation, after validation in the middle of the epoch
@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": 2}, {"val_check_interval": 0.5}])
def test_checkpoints_and_early_stopping_monitor_the_score_of_their_step(options, tmp_path, callback):
    name = "zero_shot/recite/perplexity"
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", monitor=name, save_top_k=-1)
    patience = EarlyStopping(name, patience=100)
    zero_shot = callback(tasks=["recite"], every_n_steps=4 if "val_check_interval" in options else None)
    # the callback comes last, and yet is first to know
    trainer = trainer_of(
        tmp_path, [checkpoints, patience, zero_shot], max_epochs=4, enable_checkpointing=True,
        num_sanity_val_steps=1, **options,
    )  # fmt: skip
    trainer.fit(ForeignModule(), loader(batches(8)), loader(batches(1)))
    entries = json.loads(Path(trainer.log_dir, "zero_shot.json").read_text())
    wanted = {entry["step"]: entry["scores"]["recite"]["perplexity"] for entry in entries}
    saved = {int(Path(path).stem.partition("=")[2]): float(v) for path, v in checkpoints.best_k_models.items()}
    assert len(saved) == {"check_val_every_n_epoch": 2, "val_check_interval": 8}.get(next(iter(options), ""), 4)
    assert saved == pytest.approx({step: wanted[step] for step in saved})
    assert float(patience.best_score) == pytest.approx(min(saved.values()))
    assert float(checkpoints.best_model_score) == pytest.approx(min(saved.values()))


def test_checkpoints_every_few_steps_monitor_it_too(tmp_path, callback):
    checkpoints = ModelCheckpoint(
        tmp_path, filename="{step}", monitor="zero_shot/recite/perplexity", save_top_k=-1, every_n_train_steps=2
    )
    zero_shot = callback(tasks=["recite"], every_n_steps=2, at_start=False)
    trainer = trainer_of(tmp_path, [checkpoints, zero_shot], enable_checkpointing=True)
    trainer.fit(ForeignModule(), loader(batches(6)))
    entries = json.loads(Path(trainer.log_dir, "zero_shot.json").read_text())
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    saved = [float(value) for value in checkpoints.best_k_models.values()]
    assert saved == pytest.approx([entry["scores"]["recite"]["perplexity"] for entry in entries])


def test_a_resumed_run_goes_on_with_the_scores_of_its_checkpoint(tmp_path, callback):
    def fit(epochs, **options):
        zero_shot = callback(tasks=["recite"])
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="zero_shot/recite/perplexity", save_top_k=-1)
        trainer = trainer_of(
            tmp_path, [zero_shot, saving], max_epochs=epochs, enable_checkpointing=True, accumulate_grad_batches=3,
            logger=CSVLogger(tmp_path, name="logs", version=0),
        )  # fmt: skip
        trainer.fit(ForeignModule(), loader(batches(7)), **options)
        return json.loads(Path(trainer.log_dir, "zero_shot.json").read_text()), zero_shot

    first, zero_shot = fit(1)
    assert [(entry["step"], entry["epoch"]) for entry in first] == [(0, 0), (3, 0)]
    again, _ = fit(2, ckpt_path=tmp_path / "epoch=0.ckpt")
    # nothing is measured twice, and the file goes on
    assert again[:2] == first
    assert [(entry["step"], entry["epoch"]) for entry in again[2:]] == [(6, 1)]
    assert zero_shot.scores == first[-1]["scores"]


def test_the_last_epoch_of_an_interrupted_one_is_evaluated(tmp_path, callback):
    trainer = trainer_of(tmp_path, [callback(tasks=["recite"], at_start=False, at_end=False)], max_steps=3)
    trainer.fit(ForeignModule(), loader(batches(8)))
    assert [e["step"] for e in json.loads(Path(trainer.log_dir, "zero_shot.json").read_text())] == [3]


def test_mixed_precision_of_the_trainer_is_taken_over(tmp_path, callback):
    module, seen = ForeignModule(), []

    def look(head, args, out):
        if not head.training:
            seen.append(out.dtype)

    module.net.inner.lm_head.register_forward_hook(look)
    trainer = trainer_of(tmp_path, [callback(tasks=["recite"])], precision="bf16-mixed", max_steps=1)
    trainer.fit(module, loader(batches(1)))
    assert set(seen) == {torch.bfloat16}


def test_the_tokenizer_of_the_datamodule_is_taken_and_a_model_that_is_built_late_is_found(tmp_path, callback):
    data = TextDataModule(
        tokenizer=word_tokenizer(), data_files=write_corpus(tmp_path / "corpus.txt"), block_size=16, batch_size=3,
        val_fraction=0.1, num_proc=1, cache_dir=tmp_path / "cache",
    )  # fmt: skip
    trainer = trainer_of(tmp_path, [callback(tokenizer=None)], max_steps=1)
    trainer.fit(MoEModule(tiny_llama()), datamodule=data)
    assert "zero_shot/choose/acc" in trainer.callback_metrics
    word_tokenizer().save_pretrained(tmp_path / "words")
    lazy = LazyModule()
    lazy.tokenizer = str(tmp_path / "words")
    other = trainer_of(tmp_path, [callback(tokenizer=None)], max_steps=1)
    other.fit(lazy, loader(batches(1)))
    assert "zero_shot/choose/acc" in other.callback_metrics


def test_without_a_tokenizer_it_says_where_it_looked(tmp_path, callback):
    with pytest.raises(MisconfigurationException, match="neither ForeignModule nor a datamodule has an attribute"):
        trainer_of(tmp_path, [callback(tokenizer=None)]).fit(ForeignModule(), loader(batches(1)))


class Pair(LightningModule):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = tiny_llama(), tiny_llama(1)


def test_of_several_models_one_is_named(tmp_path, callback):
    with pytest.raises(ValueError, match=r"several language models \(student, teacher\).*module='student'"):
        find_language_model(Pair())
    assert find_language_model(Pair(), "teacher")[0] == "teacher"
    with pytest.raises(ValueError, match=r"module='pupil': Pair has no such part .* It has: student, teacher"):
        find_language_model(Pair(), "pupil")
    with pytest.raises(ValueError, match=r"Linear holds no Hugging Face model that predicts tokens"):
        find_language_model(nn.Linear(2, 2))
    assert find_language_model(tiny_llama())[0] == ""
    module = Pair()
    with pytest.raises(ValueError, match=r"holds no Hugging Face model"):
        trainer_of(tmp_path, [callback(module="student.model")]).fit(Trained(module.student), loader(batches(1)))


class Trained(ForeignModule):
    def __init__(self, student):
        LightningModule.__init__(self)
        self.lr, self.student = 0.1, student

    def task_loss(self, batch):
        return self.student(**batch).loss


# --- what goes wrong ---


class Unmoved(ForeignModule):
    def training_step(self, batch, batch_idx):
        raise AssertionError("a step was taken")


@pytest.mark.slow
def test_an_unknown_task_stops_the_run_before_the_first_step(tmp_path, callback):
    # of all tasks, lm-eval's own among them
    with pytest.raises(ValueError, match=r"there is no 'hellasvag'. Did you mean 'hellaswag'"):
        trainer_of(tmp_path, [callback(tasks=["choose", "hellasvag"], on_error="warn")]).fit(
            Unmoved(), loader(batches(1))
        )


@pytest.mark.parametrize("names", [[], ["choose"]])
def test_what_cannot_be_loaded_is_said(names, tmp_path):
    wanted = (ValueError, "at least one name") if not names else (FileNotFoundError, "is no directory")
    with pytest.raises(wanted[0], match=wanted[1]):
        load_tasks(names, tmp_path / "nowhere" if names else None)


def test_arguments_are_checked(callback):
    for wrong in ({"every_n_steps": 0}, {"every_n_epochs": 0}, {"limit": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            callback(**wrong)


def test_a_missing_extra_is_named_before_anything_is_loaded(monkeypatch, callback):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.delitem(sys.modules, "lightning_moe.live_model")
    monkeypatch.delattr(lightning_moe, "live_model")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-moe\[eval\]'"):
        callback()


def test_a_sharded_strategy_is_refused(tmp_path, callback):
    trainer = trainer_of(tmp_path, [])
    trainer.strategy.__class__ = type("Sharded", (FSDPStrategy,), {"teardown": lambda self: None})
    with pytest.raises(MisconfigurationException, match="Sharded shards the parameters"):
        callback().setup(trainer, ForeignModule(), "fit")


def test_a_failing_evaluation_ends_the_run_or_is_warned_of(tmp_path, callback, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("out of everything")

    monkeypatch.setattr(evaluation, "evaluate_model", fail)
    with pytest.raises(RuntimeError, match="out of everything"):
        trainer_of(tmp_path, [callback()]).fit(ForeignModule(), loader(batches(2)))
    trainer = trainer_of(tmp_path, [callback(on_error="warn")])
    with pytest.warns(MoEWarning) as told:
        trainer.fit(ForeignModule(), loader(batches(2)))
    said = [str(one.message) for one in told if one.category is MoEWarning]
    assert [text.partition(" at ")[2] for text in said] == [
        f"step {step} failed, and training goes on (RuntimeError: out of everything)." for step in (0, 2)
    ]
    assert trainer.global_step == 2
    assert not Path(trainer.log_dir, "zero_shot.json").exists()


@pytest.mark.parametrize("strict", [True, False])
def test_early_stopping_waits_for_a_score_only_if_it_is_not_strict(strict, tmp_path, callback, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate_model", None)
    stopping = EarlyStopping("zero_shot/choose/acc", strict=strict)
    trainer = trainer_of(tmp_path, [callback(on_error="warn"), stopping], max_epochs=2)
    missing = pytest.raises(RuntimeError, match="`zero_shot/choose/acc` which is not available")
    with pytest.warns(MoEWarning, match="training goes on"), missing if strict else nullcontext():
        trainer.fit(ForeignModule(), loader(batches(2)))
    assert trainer.current_epoch == (0 if strict else 2)


# --- several ranks ---

TWO_RANKS = """
import pickle, sys
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning_fixtures import ForeignModule, batches, loader, small_config, trainer_of, word_tokenizer
from lightning_moe import MoEUpcycleCallback, ZeroShotEvalCallback

torch.set_num_threads(1)
folder, tasks = sys.argv[1], sys.argv[2]
zero_shot = ZeroShotEvalCallback(
    ["choose", "guess", "recite"], tokenizer=word_tokenizer(), include_path=tasks, batch_size=4, at_end=False,
    every_n_epochs=None,
)
trainer = trainer_of(
    folder, [MoEUpcycleCallback(small_config()), zero_shot], strategy=DDPStrategy(process_group_backend="gloo"),
    devices=2, max_steps=1, use_distributed_sampler=False,
)
trainer.fit(ForeignModule(), loader(batches(1)))
metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("zero_shot")}
with open(f"{folder}/{trainer.global_rank}.pkl", "wb") as file:
    pickle.dump({"scores": zero_shot.scores, "metrics": metrics, "log_dir": trainer.log_dir}, file)
"""


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path, place, tasks):
    run_script(TWO_RANKS, tmp_path, tmp_path, place[0], timeout=120)
    ranks = [pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    one = scores(evaluate_model(LiveHFLM(upcycled(), word_tokenizer(), batch_size=4), tasks))
    assert set(ranks[0]["scores"]) == set(TASKS)
    for task, values in one.items():
        exact = {k: v for k, v in values.items() if not k.startswith("perplexity")}
        assert {k: ranks[0]["scores"][task][k] for k in exact} == pytest.approx(exact)
        if "perplexity" in values:
            assert ranks[0]["scores"][task]["perplexity"] == pytest.approx(values["perplexity"], rel=1e-5)
    entries = json.loads(Path(ranks[0]["log_dir"], "zero_shot.json").read_text())
    assert [entry["scores"] for entry in entries] == [ranks[0]["scores"]]


def test_a_task_smaller_than_the_ranks_is_refused(tasks):
    lm = LiveHFLM(tiny_llama(), word_tokenizer())
    lm._world_size = 4
    with pytest.raises(ValueError, match="choose: 3 documents are too few for 4 ranks"):
        evaluate_model(lm, tasks, limit=3)
