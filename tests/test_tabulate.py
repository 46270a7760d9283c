"""Tables and plots of a suite, from made-up cells: figures against numpy and scipy, and what is missing is told."""

import doctest
import importlib
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import stats

from lightning_moe.canvas import SCALE

# behind all others: the package tabulate has the name of one of the scripts
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import model_tables
import pooled_tables
from cells import Results, documents_of, final_loss, load_by_rank, read_results, summarize
from contrasts import (
    document_pairs,
    friedman,
    least_sign_flip,
    loss_contrasts,
    loss_pairs,
    rank_ranges,
    ranks,
    score_contrasts,
    sole_best,
)
from panels import limits
from plots import pictures
from suite_page import page, write_page
from suites import load_suite
from typeset import Bold, Table, escape_markdown, escape_tex, latex, markdown, without_repeats

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODELS = {"big": {"title": "Big_model"}, "small": {}, "tiny": {"seeds": [0]}}
ALGORITHMS = {
    "dense": {"title": "dense, 100 % & more"},
    "dense-flops": {},
    "smoe": {"title": "SMoE"},
    "good": {"about": "Much better."},
    "same": {},
}
# of the loss; the noise is far smaller than that of the good one, and larger than that of the last
EFFECTS = {"dense": 0.0, "dense-flops": -0.05, "smoe": -0.05, "good": -0.5, "same": -0.0501}
TASKS = {"easy": 40, "hard_one": 25}
SEEDS = [0, 1, 2]


def noise(*key):
    return np.random.default_rng([sum(map(ord, str(part))) + 7 * place for place, part in enumerate(key)])


def loss_of(model, algorithm, seed):
    own = {"big": 3.0, "small": 4.0, "tiny": 2.0}[model]
    return round(own + 0.1 * seed + EFFECTS[algorithm] + noise(model, algorithm, seed).normal(0, 0.005), 5)


def answers_of(model, algorithm, seed, task):
    hardness = noise(model, task).uniform(size=TASKS[task])
    luck = noise(model, algorithm, seed, task).uniform(-0.1, 0.1, size=TASKS[task])
    return (hardness + luck < (0.9 if algorithm == "good" else 0.5)).astype(float).tolist()


def record_of(model, algorithm, seed):
    loss, is_dense = loss_of(model, algorithm, seed), algorithm.startswith("dense")
    documents = {task: answers_of(model, algorithm, seed, task) for task in TASKS}
    end = {task: {"acc": float(np.mean(answers)), "acc_stderr": 0.01} for task, answers in documents.items()}
    return {
        "model": model,
        "algorithm": algorithm,
        "seed": seed,
        "commit": "a" * 40,
        "src_differs_from_commit": False,
        "versions": {"torch": "2.13.0"},
        "hardware": "a processor",
        "threads": 1,
        "error": None,
        "parameters": 2_000_000,
        "active_parameters": 1_000_000,
        "training_flops": 2.5e12,
        "steps": 20,
        "tokens": 20_000,
        "losses": {
            "train": [],
            "validation": [{"step": step, "mean": loss + (20 - step) / 10} for step in (0, 10, 20)],
        },
        "routing": [] if is_dense else [{"step": 20, "max_violation": 0.5, "load_entropy": 0.9, "dead_experts": 0}],
        "expert_load": None if is_dense else [[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]],
        "expert_similarity_start": None if is_dense else 1.0,
        "expert_similarity": None if is_dense else 0.9,
        "scores": {"start": end if algorithm == "dense" else None, "end": end},
        "documents": documents,
        "main_metric": dict.fromkeys(TASKS, "acc"),
        "chance": {"easy": 0.5},
        "tokens_per_cpu_second": 1234.0,
        "peak_memory_bytes": 500_000_000,
    }


def write_suite(folder, algorithms=ALGORITHMS, models=MODELS, change=lambda record: record):
    """A suite's file, and beside it the record of each run, unless it was changed to None."""
    settings = {
        "about": "A | suite.",
        "seeds": SEEDS,
        "steps": 20,
        "run": {"trainer": {"max_steps": 20}},
        "models": models,
        "algorithms": algorithms,
        "baselines": {"tokens": "dense", "flops": "dense-flops"},
        "reference": "smoe",
    }
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    suite = load_suite(str(file))
    for key in suite.order():
        record = change(record_of(*key))
        if record is not None:
            suite.file(*key).parent.mkdir(parents=True, exist_ok=True)
            suite.file(*key).write_text(json.dumps(record))
    return file


def results_of(file):
    return read_results(load_suite(str(file)))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def results(file):
    return results_of(file)


def rows_of(table):
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def text_of(number, digits):
    return f"{number:+.{digits}f}".replace("-", "\u2212")


def holm_by_hand(p_values):
    """Each p times the number of those that are not smaller, and never below the one before."""
    order = np.argsort(p_values)
    corrected = np.maximum.accumulate(np.sort(p_values) * np.arange(len(p_values), 0, -1)).clip(max=1)
    return corrected[np.argsort(order)]


def pairs_of(first, second):
    seeds = {"big": SEEDS, "small": SEEDS, "tiny": [0]}
    return np.array([[loss_of(m, a, s) for m in MODELS for s in seeds[m]] for a in (first, second)])


def test_losses_are_those_of_numpy(results):
    rows = rows_of(model_tables.losses(results, "big"))
    for name in ALGORITHMS:
        values = [loss_of("big", name, seed) for seed in SEEDS]
        row = rows[results.title(name)]
        assert row["at the end"] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
        assert row["at the start"] == f"{np.mean(values) + 2:.4f}"
        assert row["seeds"] == "3 of 3"


def test_ranks_are_those_of_scipy(results):
    names = ["smoe", "good", "same"]
    means = {model: [results.summary(model, name, final_loss).mean for name in names] for model in MODELS}
    expected = {model: dict(zip(names, stats.rankdata(values), strict=True)) for model, values in means.items()}
    rows = rows_of(pooled_tables.ranking(results))
    for name in names:
        each = [expected[model][name] for model in MODELS]
        row = rows[results.title(name)]
        assert row["mean rank"] == f"{np.mean(each):.2f}"
        assert [row[results.model_title(model)] for model in MODELS] == [f"{rank:g}" for rank in each]
        assert rows_of(model_tables.losses(results, "big"))[results.title(name)]["rank"] == f"{expected['big'][name]:g}"
    assert "dense-flops" not in rows
    assert ranks({"a": 1.0, "b": math.nan, "c": 1.0}) == {"a": 1.5, "c": 1.5}


@pytest.mark.parametrize("reference", ["dense", "dense-flops", "smoe"])
def test_pooled_differences_are_those_of_scipy(results, reference):
    others = [name for name in ALGORITHMS if name != reference]
    tests = [stats.ttest_rel(*reversed(pairs_of(reference, other))) for other in others]
    corrected = holm_by_hand([test.pvalue for test in tests])
    found = loss_contrasts(results, reference, list(MODELS))
    rows = rows_of(pooled_tables.pooled_losses(results, reference))
    for other, test, p_value in zip(others, tests, corrected, strict=True):
        first, second = pairs_of(reference, other)
        interval = test.confidence_interval(0.95)
        assert found[other].p_value == pytest.approx(p_value, rel=1e-9)
        assert found[other].found.difference == pytest.approx(np.mean(second - first))
        row = rows[results.title(other)]
        assert row["pairs"] == "7"
        assert row["difference"] == text_of(np.mean(second - first), 4)
        assert row["95 % interval"] == f"{text_of(interval.low, 4)} to {text_of(interval.high, 4)}"
        verdict = "not resolved" if p_value >= 0.05 else "lower" if np.mean(second - first) < 0 else "higher"
        assert row["verdict"] == verdict


def test_what_is_not_resolved_is_marked(results):
    rows = rows_of(pooled_tables.pooled_losses(results, "smoe"))
    assert rows["same"]["verdict"] == "not resolved"
    assert rows["good"]["verdict"] == "lower"
    assert rows["good"]["lower in"] == "3 of 3"
    brief = rows_of(model_tables.losses(results, "big"))
    assert brief["same"]["against SMoE"].endswith("n.r.")
    assert not brief["good"]["against SMoE"].endswith("n.r.")
    # a single seed cannot be tested
    assert rows_of(model_tables.losses(results, "tiny"))["good"]["against SMoE"].endswith("(one pair)")


def test_ranges_of_ranks_hold_what_is_resolved(results):
    assert rank_ranges(results, list(MODELS)) == {"smoe": (2, 3), "good": (1, 1), "same": (2, 3)}
    rows = rows_of(pooled_tables.ranking(results))
    assert rows["good"]["resolved rank"] == "1"
    assert rows["SMoE"]["resolved rank"] == "2 to 3"
    bold = [row[0] for row in pooled_tables.ranking(results).rows if isinstance(row[0], Bold)]
    assert bold == ["good"]


def test_friedman_is_scipys(results):
    names = ["smoe", "good", "same"]
    blocks = [(model, seed) for model in MODELS for seed in (SEEDS if model != "tiny" else [0])]
    expected = stats.friedmanchisquare(*([loss_of(m, name, s) for m, s in blocks] for name in names))
    found = friedman(results, list(MODELS))
    assert (found.statistic, found.p_value) == pytest.approx((expected.statistic, expected.pvalue))
    assert (found.algorithms, found.blocks) == (3, 7)
    assert math.isnan(friedman(results, ["tiny"]).p_value)


def test_seldom_resolves_what_is_chance(results):
    draw = np.random.default_rng(0)
    wrong, rounds = np.zeros(2), 300
    for _ in range(rounds):
        cells = {key: {"losses": {"validation": [{"step": 1, "mean": draw.normal()}]}} for key in results.suite.order()}
        chance = Results(results.suite, cells, {})
        wrong += np.array(
            [
                any(contrast.is_resolved for contrast in loss_contrasts(chance, "smoe", list(MODELS)).values()),
                any(found != (1, 3) for found in rank_ranges(chance, list(MODELS)).values()),
            ]
        )
    # 5 %, and two standard errors
    assert max(wrong) / rounds < 0.05 + 2 * math.sqrt(0.05 * 0.95 / rounds)


def test_scores_are_paired_by_document(results):
    def mean_of(algorithm, task):
        return np.mean([answers_of("big", algorithm, seed, task) for seed in SEEDS], axis=0)

    first, second = document_pairs(results, "dense", "good", ["big"])
    assert len(first) == 65
    # each task counts the same, however many documents it has
    expected = np.mean([np.mean(mean_of("good", task) - mean_of("dense", task)) for task in TASKS])
    assert np.mean(second - first) == pytest.approx(expected)
    # 65 pairs, of two tasks
    weighed = [65 / (2 * count) * (mean_of("good", t) - mean_of("dense", t)) for t, count in TASKS.items()]
    contrasts = score_contrasts(results, "dense", ["big"])
    assert contrasts["good"].found.p_value == pytest.approx(stats.ttest_1samp(np.concatenate(weighed), 0).pvalue)
    assert rows_of(pooled_tables.pooled_scores(results, "dense"))["good"]["verdict"] == "higher"
    row = rows_of(model_tables.scores(results, "big"))["good"]
    values = [100 * np.mean([np.mean(answers_of("big", "good", seed, task)) for task in TASKS]) for seed in SEEDS]
    assert row["score"] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def test_documents_over_models_are_averaged_first(results):
    pooled = document_pairs(results, "dense", "good", ["big", "tiny"])[1]
    each = [document_pairs(results, "dense", "good", [model])[1] for model in ("big", "tiny")]
    assert pooled == pytest.approx(np.mean(each, axis=0))


def test_models_may_have_different_numbers_of_documents(tmp_path):
    def cut(record):
        if record["model"] == "tiny":
            record["documents"]["easy"] = record["documents"]["easy"][:10]
        return record

    results = results_of(write_suite(tmp_path, change=cut))
    first, _ = document_pairs(results, "dense", "good", ["big", "tiny"])
    easy = np.array([np.mean([answers_of("big", "dense", s, "easy")[place] for s in SEEDS]) for place in range(40)])
    easy[:10] = (easy[:10] + answers_of("tiny", "dense", 0, "easy")[:10]) / 2
    assert first[:40] == pytest.approx(easy * 65 / 80)


def test_tasks_show_chance_and_the_best_where_resolved(results):
    table = model_tables.tasks(results, "big")
    rows = rows_of(table)
    assert rows["chance"] == {"algorithm": "chance", "easy": "50.0", "hard_one": "\u2013"}
    values = [100 * np.mean(answers_of("big", "good", seed, "easy")) for seed in SEEDS]
    assert rows["good"]["easy"] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert isinstance(rows["good"]["easy"], Bold)
    assert not any(isinstance(cell, Bold) for name in ("smoe", "same") for cell in rows.get(name, {}).values())


def test_best_is_none_if_two_are_level():
    draw = np.random.default_rng(0)
    low, high = draw.uniform(size=50), 5 + draw.uniform(size=50)
    assert sole_best({"low": low, "high": high}) == "high"
    assert sole_best({"low": low, "high": high, "also": high + 0.01 * draw.normal(size=50)}) is None
    assert sole_best({"high": high, "twin": high.copy(), "low": low}) is None
    assert sole_best({"only": high}) is None
    # resolved of two, not of three, which are three pairs
    second = draw.normal(size=40)
    first = second + draw.normal(size=40)
    first += 2.4 * np.std(first - second, ddof=1) / math.sqrt(40) - np.mean(first - second)
    assert 0.05 / 3 < stats.ttest_rel(first, second).pvalue < 0.05
    assert sole_best({"second": second, "first": first}) == "first"
    assert sole_best({"second": second, "first": first, "third": second - 5}) is None


def test_few_pairs_are_told(results):
    text = markdown("", page(results))
    assert "never gives a p below 0.25 within one model" in text
    # 4 comparisons of 7 pairs: 4 * 2 / 2^7
    assert least_sign_flip(7, 4) == 0.0625
    assert "p is never below 0.062" in text


def test_incomplete_suite_tells_what_is_missing(tmp_path):
    def change(record):
        key = (record["model"], record["algorithm"], record["seed"])
        if key == ("big", "good", 1):
            return {**record, "error": "RuntimeError: out | of\nmemory", "losses": None}
        if key == ("small", "good", 2):
            record["losses"]["validation"][-1]["mean"] = math.nan
        if key[0] == "small" and key[1] == "smoe" and key[2] > 0:
            return None
        return None if key[0] == "tiny" else record

    results = results_of(write_suite(tmp_path, change=change))
    text = markdown("", page(results))
    assert "26 of 35 runs finished; failed: 2; missing: 7." in text
    assert "Big\\_model, good, seed 1: RuntimeError: out \\| of memory" in text
    assert "small, good, seed 2: the last validation loss is no finite number" in text
    assert "small: 2 of 3 seeds of smoe." in text
    assert "tiny: all." in text
    assert rows_of(model_tables.losses(results, "big"))["good"]["seeds"] == "2 of 3"
    # of the good one seeds 0 and 2 on one model, 0 and 1 on the other; of the reference all, and seed 0
    assert rows_of(pooled_tables.pooled_losses(results, "smoe"))["good"]["pairs"] == "3"
    pairs = loss_pairs(results, "smoe", "good", ["big"])
    assert [side.tolist() for side in pairs] == [[loss_of("big", n, seed) for seed in (0, 2)] for n in ("smoe", "good")]
    values = [loss_of("big", "good", seed) for seed in (0, 2)]
    row = rows_of(model_tables.losses(results, "big"))["good"]
    assert row["at the end"] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    assert pictures(results)


def test_algorithm_that_never_ran(tmp_path):
    results = results_of(write_suite(tmp_path, change=lambda r: r if r["algorithm"] != "same" else None))
    assert rows_of(model_tables.losses(results, "big"))["same"]["seeds"] == "0 of 3"
    assert "same" not in rows_of(pooled_tables.ranking(results))
    assert friedman(results, list(MODELS)).algorithms == 2
    assert pictures(results)


def test_dense_alone_has_a_page(tmp_path):
    file = write_suite(tmp_path, change=lambda r: r if r["algorithm"] == "dense" and r["seed"] == 0 else None)
    names = {path.name for path in write_page(str(file))}
    assert names == {"tables.md", "tables.tex", *(f"losses_{model}.png" for model in MODELS)}
    text = load_suite(str(file)).results.joinpath("tables.md").read_text()
    assert set(re.findall(r"\]\((.*?)\)", text)) == {name for name in names if name.endswith(".png")}


def test_suite_without_tasks_or_baselines(tmp_path):
    def change(record):
        for key in ("scores", "documents", "main_metric", "chance"):
            del record[key]
        return record

    file = write_suite(tmp_path, change=change)
    settings = yaml.safe_load(file.read_text())
    del settings["baselines"], settings["reference"]
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    names = {path.name for path in write_page(str(file))}
    assert "final_loss.png" in names
    assert not {"scores.png", "differences.png"} & names


def test_nothing_finished_is_an_error(tmp_path):
    file = write_suite(tmp_path, change=lambda record: None)
    with pytest.raises(ValueError, match="no run of the suite has finished"):
        write_page(str(file))


def test_cells_of_different_origin_are_told(tmp_path):
    def change(record):
        if record["seed"] == 0:
            record |= {"commit": "b" * 40, "hardware": "another", "src_differs_from_commit": True}
        return record

    text = markdown("", page(results_of(write_suite(tmp_path, change=change))))
    assert "Different commit: aaaaaaaa (20 runs); bbbbbbbb with uncommitted changes (15 runs)." in text
    assert "Different hardware: a processor (20 runs); another (15 runs)." in text
    assert "Speed and memory compare only" in text
    assert "The same number of threads for all: 1." in text


def test_experts_and_cost(results):
    row = rows_of(model_tables.experts(results, "big"))["SMoE"]
    assert (row["max violation"], row["similarity"]) == ("0.50 ± 0.00", "1.000 → 0.900")
    assert "dense-flops" not in rows_of(model_tables.experts(results, "big"))
    row = rows_of(model_tables.cost(results, "big"))["SMoE"]
    assert list(row.values())[1:] == ["2.0", "1.0", "20", "20", "2.50", "1234", "500"]
    # sorted in each layer, times 4 experts, mean over layers
    assert load_by_rank(record_of("big", "smoe", 0)) == pytest.approx([2.2, 0.8, 0.6, 0.4])
    assert load_by_rank({"expert_load": [[1.0, 0.0], [0.25, 0.25, 0.5]]}) == pytest.approx([1.75, 0.375, 0.75])


def test_summary_of_none_and_one():
    assert math.isnan(summarize([]).mean)
    assert math.isnan(summarize([1.0]).deviation)


def test_documents_that_differ_in_number_are_left_out(results):
    whole = dict(results.cells)
    whole["big", "smoe", 1] = {**record_of("big", "smoe", 1), "documents": {"easy": [1.0], "hard_one": [1.0] * 25}}
    found = documents_of(Results(results.suite, whole, {}), "big", "smoe", SEEDS)
    assert list(found) == ["hard_one"]


def test_every_table_is_whole_in_markdown(results):
    text = markdown("Suite", without_repeats(page(results)))
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(blocks) == 1 + 2 * 3 + 5 * 3
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    # explained once
    assert text.count("**p**:") == 1
    assert "<" not in re.sub(r"&lt;", "", text)


def test_escapes():
    assert escape_tex("a_b & 50% {x} #1 $ \\ ~ ^ < |") == (
        r"a\_b \& 50\% \{x\} \#1 \$ \textbackslash{} \textasciitilde{} \textasciicircum{} \textless{} \textbar{}"
    )
    assert escape_tex("[1] → \u22122 ± ☃ é") == r"{[}1{]} $\to$ $-$2 $\pm$ ? é"
    assert escape_tex(Bold("a_b")) == r"\textbf{a\_b}"
    assert escape_markdown(Bold("a_b|c")) == r"**a\_b\|c**"


def test_wide_tables_break_in_latex():
    columns = {"name": "of it", **{f"column {number}": "" for number in range(20)}}
    table = Table("wide", "Wide.", columns, [["first", *["123456789"] * 20]], "A note.")
    text = latex("", [table])
    assert text.count(r"\begin{tabular}") == text.count("first &") > 1
    assert text.count("column ") == 20
    assert text.count("A note.") == 1
    assert len(set(re.findall(r"\\label\{(.*?)\}", text))) == text.count(r"\label")
    assert "Wide, continued." in text


def test_latex_is_balanced_and_compiles(file, tmp_path):
    folder = load_suite(str(file)).results
    write_page(str(file))
    text = (folder / "tables.tex").read_text()
    for begin, end in ((r"\begin{table}", r"\end{table}"), ("{", "}")):
        clean = re.sub(r"\\[{}]", "", text)
        assert clean.count(begin) == clean.count(end) > 0
    assert not re.search(r"(?<!\\)[%&#](?=\w)", text.split("\n", 4)[4].replace(" & ", " "))
    if (
        shutil.which("kpsewhich") is None
        or subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).returncode
    ):
        pytest.skip("there is no LaTeX with booktabs")
    main = tmp_path / "main.tex"
    packages = r"\usepackage{booktabs}\usepackage{graphicx}"
    main.write_text(
        rf"\documentclass{{article}}{packages}\begin{{document}}\input{{{folder / 'tables.tex'}}}\end{{document}}"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", main.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull \\hbox" not in done.stdout


def test_pictures_are_drawn_and_shown(file, results):
    written = {path.name: path for path in write_page(str(file))}
    drawn = pictures(results)
    expected = {"final_loss.png", "differences.png", "scores.png"}
    expected |= {f"{kind}_{model}.png" for kind in ("losses", "scores", "load") for model in MODELS}
    assert set(drawn) == expected == {name for name in written if name.endswith(".png")}
    for name, canvas in drawn.items():
        with Image.open(written[name]) as image:
            assert image.size == (canvas.width * SCALE, canvas.height * SCALE)
            assert len(image.getcolors(1 << 20)) > 10
    assert set(re.findall(r"\]\((.*?)\)", written["tables.md"].read_text())) == expected


def test_same_cells_give_the_same_files(file):
    first = {path: path.read_bytes() for path in write_page(str(file))}
    assert first == {path: path.read_bytes() for path in write_page(str(file))}


def test_one_far_value_does_not_flatten_the_others():
    low, high = limits([1.0, 1.1, 1.2, 1.3, 9.0])
    assert 0.9 < low < 1.0
    assert 1.3 < high < 1.4
    low, high = limits([2.0])
    assert low < 2.0 < high


def test_command(file, monkeypatch):
    script = str(BENCHMARKS / "tabulate.py")
    done = subprocess.run([sys.executable, script, "--suite", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tables.md" in done.stdout
    assert done.stderr == ""
    monkeypatch.setattr(sys, "argv", [script, "--suite", "none"])
    with pytest.raises(SystemExit, match="error: suite 'none' does not exist"):
        runpy.run_path(script, run_name="__main__")


def test_script_gives_way_to_the_package_of_its_name():
    # as in a script of the same folder, which comes first in sys.path
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import tabulate; print(tabulate.tabulate([['x']]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[1:2] == ["x"], done.stderr


@pytest.mark.parametrize("name", ["cells", "contrasts", "panels", "typeset"])
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
