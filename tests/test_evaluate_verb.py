"""The verb that evaluates a checkpoint: the command, its table, its file and its words."""

import json
import sys

import pytest
import yaml
from lightning_fixtures import small_config, tiny_llama, word_tokenizer, write_corpus
from zero_shot_fixtures import make_tasks

import lightning_moe
from lightning_moe import load_moe, save_moe, upcycle
from lightning_moe.cli import main
from lightning_moe.evaluation import LiveHFLM, evaluate_model, load_tasks, scores


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    make_tasks(folder)
    tiny_llama().save_pretrained(folder / "dense")
    word_tokenizer().save_pretrained(folder / "dense")
    moe = tiny_llama(1)
    upcycle(moe, small_config())
    save_moe(moe, folder / "moe")
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
        (["--model", "{}/dense"], "tasks"),
        (["--tasks", "guess"], "model"),
    ],
)
def test_mistakes_are_told_in_words(place, arguments, message, capsys):
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
