"""The verb that evaluates a checkpoint: the command, its table, its file and its words."""

import json
import math
import shutil
import sys
import weakref

import numpy as np
import pytest
import yaml
from lightning_fixtures import small_config, tiny_llama, word_tokenizer, write_corpus
from lm_eval.tasks import TaskManager
from scipy import stats
from zero_shot_fixtures import DOCUMENTS, make_tasks

import lightning_moe
from lightning_moe import cli_evaluate, load_moe, save_moe, upcycle
from lightning_moe.cli import main
from lightning_moe.comparison import PairedDifference, holm
from lightning_moe.evaluation import LiveHFLM, as_json, evaluate_model, load_tasks, scores
from lightning_moe.side_by_side import Comparison, compare_results, comparison_table


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    make_tasks(folder)
    tiny_llama().save_pretrained(folder / "dense")
    word_tokenizer().save_pretrained(folder / "dense")
    # the dense model upcycled, and another one
    for name, seed in (("copy", 0), ("moe", 1)):
        moe = tiny_llama(seed)
        upcycle(moe, small_config())
        save_moe(moe, folder / name)
    (folder / "taken.json").touch()
    return folder


def run(folder, *arguments):
    main(["evaluate", "--include_path", str(folder), *(str(argument).format(folder) for argument in arguments)])


def test_the_verb_gives_what_the_functions_do(place, tmp_path, capsys):
    options = ["--tokenizer", "{}/dense", "--limit", 9, "--batch_size", 3, "--output", tmp_path / "new" / "scores.json"]
    run(place, "--model", "{}/moe", "--tasks", "choose", "recite", *options)
    said = capsys.readouterr().out
    lm = LiveHFLM(load_moe(place / "moe"), word_tokenizer(), batch_size=3)
    wanted = scores(evaluate_model(lm, load_tasks(["choose", "recite"], place), 9))
    written = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert written == {"model": f"{place}/moe", "limit": 9, "scores": wanted}
    acc, error = wanted["choose"]["acc"], wanted["choose"]["acc_stderr"]
    assert ["choose", "acc", f"{acc:.4f}", f"{error:.4f}"] in [line.split() for line in said.splitlines()]
    assert f"Written to {tmp_path}/new/scores.json." in said


def test_a_dense_model_brings_its_tokenizer(place, capsys):
    run(place, "--model", "{}/dense", "--tasks", "guess")
    wanted = scores(evaluate_model(LiveHFLM(tiny_llama(), word_tokenizer()), load_tasks(["guess"], place)))
    assert f"{wanted['guess']['acc']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{}/moe", "--tasks", "guess"], "tokenizer: "),
        (["--model", "{}/none", "--tasks", "guess", "--tokenizer", "{}/dense"], "none does not exist"),
        (["--model", "{}/dense", "--tasks", "guess", "--limit", "0"], "limit=0: wanted a whole number, 1 or more"),
        (["--model", "{}/dense", "--tasks", "guess", "--output", "{}/taken.json"], "taken.json' exists"),
        (["--model", "{}/dense", "--tasks", "guess", "--include_path", "{}/no"], "no' is no directory"),
        (["--model", "{}/dense", "--tasks", "guess", "--batch_sise", "8"], "Did you mean 'batch_size'?"),
        (["--model", "{}/dense", "--tasks", "guess", "--compare", "{}/no"], "compare='"),
        (["--model", "{}/dense", "--tasks", "guess", "--compare", "{}/moe", "{}/no"], "no does not exist"),
        (["--model", "{}/no", "--tasks", "guess", "--compare", "{}/moe"], "model='"),
        (["--model", "{}/dense", "--tasks", "guess", "--compare", "{}"], "holds no model"),
        (["--model", "{}/dense", "--tasks", "guess", "--compare", "no-such-model"], "the Hub did not give it"),
        (["--model", "{}/dense", "--tasks", "guess", "--compare", "{}/moe/../dense"], "is the same model as"),
        (["--model", "{}/dense", "--tasks", "guess", "--compare", "{}/moe", "{}/moe"], "Give each model once."),
        (["--model", "{}/dense", "--tasks", "guess", "--compare", "{}/moe"], "tokenizer: "),
        (["--model", "{}/dense", "--tasks", "guess", "--compare"], "compare"),
        (["--model", "{}/dense"], "tasks"),
        (["--tasks", "guess"], "model"),
    ],
)
def test_mistakes_are_told_in_words_and_before_anything_is_evaluated(place, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.evaluate", None)
    with pytest.raises(SystemExit) as stopped:
        run(place, *arguments)
    code = stopped.value.code
    said = code if isinstance(code, str) else capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert len(said.splitlines()) <= 5


def test_a_missing_extra_is_one_line(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    for name in ("live_model", "evaluation"):
        monkeypatch.delitem(sys.modules, f"lightning_moe.{name}")
        monkeypatch.delattr(lightning_moe, name)
    with pytest.raises(SystemExit) as stopped:
        run(place, "--model", "{}/dense", "--tasks", "guess")
    assert str(stopped.value.code).startswith("error: Zero-shot evaluation needs lm-eval")
    assert "pip install 'lightning-moe[eval]'" in stopped.value.code


def test_the_callback_is_configured_in_yaml_by_its_short_name(place, tmp_path):
    callback = {"tasks": ["guess"], "include_path": str(place), "every_n_steps": 2, "limit": 5}
    config = {
        "model": {"class_path": "MoEModule", "init_args": {"model": str(place / "dense")}},
        "data": {
            "class_path": "TextDataModule",
            "init_args": {
                "tokenizer": str(place / "dense"),
                "data_files": str(write_corpus(tmp_path / "corpus.txt")),
                "block_size": 16,
                "batch_size": 2,
                "num_proc": 1,
                "cache_dir": str(tmp_path / "cache"),
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "default_root_dir": str(tmp_path),
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}},
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "callbacks": [{"class_path": "ZeroShotEvalCallback", "init_args": callback}],
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    written = next(tmp_path.rglob("zero_shot.json"))
    assert [entry["step"] for entry in json.loads(written.read_text())] == [0, 2, 3]


# --- side by side ---

TASKS = ["choose", "recite", "read", "judge"]


def values_of(model, tasks, limit=None):
    """By task and document what a separate evaluation finds, and its scores."""
    results = evaluate_model(LiveHFLM(model, word_tokenizer()), tasks, limit, log_samples=True)
    found = {task: sorted(rows, key=lambda row: row["doc_id"]) for task, rows in results["samples"].items()}
    return found, scores(results)


@pytest.fixture(scope="module")
def compared(place):
    """The dense model, its upcycled copy and another model, by the command, and what separate evaluations find."""
    options = ["--tasks", *TASKS, "--tokenizer", "{}/dense", "--output", "{}/compared.json"]
    run(place, "--model", "{}/dense", "--compare", "{}/copy", "{}/moe", *options)
    tasks = load_tasks(TASKS, place)
    models = {"dense": tiny_llama(), "copy": load_moe(place / "copy"), "moe": load_moe(place / "moe")}
    alone = {f"{place}/{name}": values_of(model, tasks) for name, model in models.items()}
    return json.loads((place / "compared.json").read_text()), alone


def found_for(compared, place, model):
    rows = [row for row in compared[0]["comparisons"] if row["model"] == f"{place}/{model}"]
    return {(row["task"], row["metric"]): row for row in rows}


def test_the_values_are_those_of_separate_evaluations_document_by_document(compared, place):
    written, alone = compared
    assert (written["model"], written["limit"]) == (f"{place}/dense", None)
    by_model = {f"{place}/dense": written["scores"], **written["compared"]}
    assert list(by_model) == list(alone)
    for model, (documents, found) in alone.items():
        assert by_model[model] == found
        for task, rows in documents.items():
            entry = written["documents"][task]
            assert entry["doc_id"] == list(range(DOCUMENTS))
            assert entry["doc_hash"] == [row["doc_hash"] for row in rows]
            for metric, values in entry["values"].items():
                assert values[model] == as_json([row[metric] for row in rows])
    assert set(written["documents"]) == set(TASKS)


def test_means_are_compared_by_the_paired_differences_of_their_documents(compared, place):
    first, second = (compared[1][f"{place}/{name}"][0] for name in ("dense", "moe"))
    found = found_for(compared, place, "moe")
    for task, metric in (("choose", "acc"), ("choose", "acc_norm"), ("recite", "acc")):
        differences = [b[metric] - a[metric] for a, b in zip(first[task], second[task], strict=True)]
        row = found[task, metric]
        assert row["difference"] == pytest.approx(np.mean(differences))
        assert row["count"] == DOCUMENTS
        assert not row["is_ratio"]
        plus, minus = differences.count(1), differences.count(-1)
        if plus + minus:
            low, high = stats.ttest_1samp(differences, 0).confidence_interval()
            assert (row["low"], row["high"]) == pytest.approx((low, high))
            assert row["p_value"] == pytest.approx(stats.binomtest(plus, plus + minus).pvalue)
    # else nothing was compared
    assert sum(found["choose", metric]["difference"] != 0 for metric in ("acc", "acc_norm")) > 0


def test_perplexities_are_compared_by_their_ratio(compared, place):
    first, second = (compared[1][f"{place}/{name}"] for name in ("dense", "moe"))
    row = found_for(compared, place, "moe")["recite", "perplexity"]
    losses = [[-one["perplexity"] for one in rows[0]["recite"]] for rows in (first, second)]
    truth = stats.ttest_rel(losses[1], losses[0])
    assert row["is_ratio"]
    assert row["difference"] == pytest.approx(second[1]["recite"]["perplexity"] / first[1]["recite"]["perplexity"])
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.exp(truth.confidence_interval())))
    assert row["p_value"] == pytest.approx(truth.pvalue)


def test_what_is_no_mean_of_documents_is_compared_by_its_own_aggregation(compared, place):
    first, second = (compared[1][f"{place}/{name}"] for name in ("dense", "moe"))
    found = found_for(compared, place, "moe")
    for metric in ("word_perplexity", "byte_perplexity"):
        row = found["read", metric]
        assert row["difference"] == pytest.approx(second[1]["read"][metric] / first[1]["read"][metric])
        losses = [[-row[metric][0] for row in rows[0]["read"]] for rows in (first, second)]
        weights = np.array([row[metric][1] for row in first[0]["read"]])
        # scipy's bootstrap of the ratio of sums, over documents
        moved = np.subtract(losses[1], losses[0])
        low, high = stats.bootstrap(
            (moved, weights), lambda d, w: d.sum(-1) / w.sum(-1), paired=True, vectorized=False, method="percentile",
            rng=0,
        ).confidence_interval  # fmt: skip
        assert (row["low"], row["high"]) == pytest.approx((math.exp(low), math.exp(high)), rel=0.02)
        assert row["is_ratio"]
    for task, metric in (("read", "bits_per_byte"), ("judge", "brier_score")):
        row = found[task, metric]
        assert row["difference"] == pytest.approx(second[1][task][metric] - first[1][task][metric])
        assert row["low"] <= row["difference"] <= row["high"]
        assert not row["is_ratio"]


def test_a_dense_model_and_its_upcycled_copy_are_not_told_apart(compared, place):
    for (task, metric), row in found_for(compared, place, "copy").items():
        assert row["difference"] == pytest.approx(1 if row["is_ratio"] else 0, abs=1e-6), (task, metric)
        assert row["verdict"] == "not resolved"
        # rounding is no difference, however small its spread
        if task != "judge":
            assert (row["low"], row["high"], row["p_value"]) == (*[1 if row["is_ratio"] else 0] * 2, 1)


def test_p_values_are_corrected_over_the_whole_table(compared):
    rows = compared[0]["comparisons"]
    # choose 2, recite 2, read 3, judge 1
    assert len(rows) == 2 * 8
    assert [row["corrected_p"] for row in rows] == pytest.approx(holm([row["p_value"] for row in rows]))


def test_the_table_says_it_all(place, capsys):
    run(place, "--model", "{}/dense", "--compare", "{}/moe", "--tasks", "recite", "--tokenizer", "{}/dense")
    said = capsys.readouterr().out
    loaded = load_tasks(["recite"], place)
    models = {"dense": tiny_llama(), "moe": load_moe(place / "moe")}
    results = {name: evaluate_model(LiveHFLM(model, word_tokenizer()), loaded, log_samples=True)
               for name, model in models.items()}  # fmt: skip
    table = comparison_table({name: scores(one) for name, one in results.items()}, compare_results(results, loaded))
    assert said.endswith(f"{table}\n")
    lines = table.splitlines()
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["recite", metric, model] for metric in ("perplexity", "acc") for model in models
    ]
    assert lines[2].split()[5].startswith("x")
    assert "p is corrected for 2 comparisons" in said


def test_a_group_has_a_score_and_is_compared_by_its_tasks(place):
    # by itself, as load_tasks reads the index of all tasks where a group is asked for
    tasks = TaskManager(include_path=str(place), include_defaults=False).load(["both"])
    results = {name: evaluate_model(LiveHFLM(tiny_llama(name), word_tokenizer()), tasks, 3, log_samples=True)
               for name in range(2)}  # fmt: skip
    assert "acc" in scores(results[0])["both"]
    found = compare_results({str(name): one for name, one in results.items()}, tasks)
    assert [(one.task, one.metric) for one in found] == [
        (task, metric) for task in ("choose", "guess") for metric in ("acc", "acc_norm")
    ]


def test_a_comparison_is_written_flat(compared):
    keys = {"task", "metric", "model", "difference", "low", "high", "p_value", "count", "corrected_p", "verdict"}
    assert all(set(row) == keys | {"is_ratio", "higher_is_better"} for row in compared[0]["comparisons"])


def comparison(difference, low, high, p, is_ratio=False, better=True):
    return Comparison("task", "metric", "model", PairedDifference(difference, low, high, p, 9), is_ratio, better, p)


@pytest.mark.parametrize(
    ("arguments", "verdict"),
    [
        ((0.2, 0.1, 0.3, 0.01), "better"),
        ((-0.2, -0.3, -0.1, 0.01), "worse"),
        ((0.2, 0.1, 0.3, 0.01, False, False), "worse"),
        ((0.8, 0.7, 0.9, 0.01, True, False), "better"),
        ((0.2, 0.1, 0.3, 0.01, False, None), "higher"),
        ((0.8, 0.7, 0.9, 0.01, True, None), "lower"),
        # the interval and the p value must both say so
        ((0.2, 0.1, 0.3, 0.06), "not resolved"),
        ((0.2, -0.1, 0.3, 0.01), "not resolved"),
        ((1.1, 0.9, 1.3, 0.01, True, True), "not resolved"),
        ((0.0, 0.0, 0.0, 1.0), "not resolved"),
    ],
)
def test_the_verdict(arguments, verdict):
    assert comparison(*arguments).verdict == verdict


def test_a_tiny_p_value_is_not_0():
    found = {"a": {"task": {"metric": 0.0}}, "model": {"task": {"metric": 0.2}}}
    assert comparison_table(found, [comparison(0.2, 0.1, 0.3, 1e-9)]).splitlines()[2].split()[-2:] == [
        "<0.0001",
        "better",
    ]


def test_models_of_the_same_name_are_told_apart(place, tmp_path, capsys):
    shutil.copytree(place / "moe", tmp_path / "moe")
    options = ["--tasks", "guess", "--limit", 3, "--tokenizer", "{}/dense"]
    run(place, "--model", "{}/moe", "--compare", tmp_path / "moe", *options)
    lines = capsys.readouterr().out.splitlines()
    assert sum(f"{place}/moe" in line for line in lines) >= 2
    assert sum(f"{tmp_path}/moe" in line for line in lines) == 2


def test_one_model_is_in_memory_at_a_time(place, monkeypatch):
    alive, seen = [], []

    def load(*arguments, **options):
        seen.append(sum(model() is not None for model in alive))
        model = load_model(*arguments, **options)
        alive.append(weakref.ref(model))
        return model

    load_model = cli_evaluate.load_model
    monkeypatch.setattr(cli_evaluate, "load_model", load)
    options = ["--tasks", "guess", "--limit", 3, "--tokenizer", "{}/dense"]
    run(place, "--model", "{}/moe", "--compare", "{}/dense", "{}/copy", *options)
    assert seen == [0, 0, 0]


def test_a_yaml_file_may_name_the_models(place, tmp_path, capsys):
    config = {"model": f"{place}/dense", "compare": [f"{place}/copy"], "tasks": ["guess"], "limit": 3}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, "tokenizer": f"{place}/dense"}))
    run(place, "--config_file", tmp_path / "run.yaml")
    assert "not resolved" in capsys.readouterr().out


def test_other_documents_are_no_comparison(place):
    tasks = load_tasks(["guess"], place)
    results = {n: evaluate_model(LiveHFLM(tiny_llama(), word_tokenizer()), tasks, log_samples=True) for n in "ab"}
    results["b"]["samples"]["guess"][3]["doc_hash"] = "another"
    with pytest.raises(AssertionError, match="guess: the models were not given the same documents"):
        compare_results(results, tasks)
