"""The benchmark's suites: what a cell is made of, what runs it, and that a reader's own router gets its row."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lightning_moe import MoELayer
from lightning_moe.layer import moe_layers

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from planned import meta_model, promised_operations, same_flops  # noqa: E402
from suites import SUITES, load_suite, merged  # noqa: E402

BASE = {
    "seeds": [0, 1],
    "steps": 4,
    "run": {
        "trainer": {"max_steps": "{steps}"},
        "model": {"class_path": "MoEModule", "init_args": {"model": "{model}"}},
        "data": {"class_path": "TextDataModule", "init_args": {"seed": "{seed}", "block_size": 16}},
    },
    "models": {"a": {"weights": "a", "seeds": [7]}, "b": {"weights": "b", "steps": 9}},
    "algorithms": {
        "dense": {},
        "smoe": {"upcycle": {"config": {"num_experts": 4, "router": {"class_path": "TopKRouter"}}}},
    },
}


def written(folder, settings, name="suite"):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_the_first_seed_of_all_comes_before_the_second_of_any(tmp_path):
    suite = load_suite(written(tmp_path, BASE))
    assert list(suite.order()) == [
        ("a", "dense", 7),
        ("b", "dense", 0),
        ("a", "smoe", 7),
        ("b", "smoe", 0),
        ("b", "dense", 1),
        ("b", "smoe", 1),
    ]
    assert suite.file("b", "smoe", 1) == tmp_path / "results" / "suite" / "b" / "smoe_seed1.json"


def test_a_cell_is_one_configuration(tmp_path):
    suite = load_suite(written(tmp_path, BASE | {"upcycle": {"balance_losses": False, "config": {"layers": "1::2"}}}))
    dense, smoe = (suite.config("b", name, 3, "weights/b", suite.steps("b")) for name in ("dense", "smoe"))
    assert dense == {
        "seed_everything": 3,
        "trainer": {"max_steps": 9},
        "model": {"class_path": "MoEModule", "init_args": {"model": "weights/b"}},
        "data": {"class_path": "TextDataModule", "init_args": {"seed": 3, "block_size": 16}},
    }
    (callback,) = smoe["trainer"].pop("callbacks")
    assert smoe == dense
    assert callback == {
        "class_path": "MoEUpcycleCallback",
        "init_args": {
            "balance_losses": False,
            "config": {"layers": "1::2", "num_experts": 4, "router": {"class_path": "TopKRouter"}},
        },
    }


def test_another_class_takes_none_of_the_arguments_of_the_one_before():
    old = {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 1, "fused": True}}}
    assert merged(old, {"optimizer": {"init_args": {"lr": 2}}})["optimizer"]["init_args"] == {"lr": 2, "fused": True}
    assert merged(old, {"optimizer": {"class_path": "SGD", "init_args": {"lr": 2}}})["optimizer"] == {
        "class_path": "SGD",
        "init_args": {"lr": 2},
    }
    assert old["optimizer"]["init_args"] == {"lr": 1, "fused": True}


def test_a_suite_extends_another_and_takes_away(tmp_path):
    written(tmp_path, BASE, "base")
    changes = {"extends": "base.yaml", "steps": 1, "models": {"a": None}, "algorithms": {"mine": {"title": "Mine"}}}
    suite = load_suite(written(tmp_path, changes))
    assert list(suite.models) == ["b"]
    assert list(suite.algorithms) == ["dense", "smoe", "mine"]
    assert suite.settings["steps"] == 1
    assert suite.settings["seeds"] == [0, 1]
    # what the other says of itself is not said of this one
    written(tmp_path, BASE | {"about": "On two models.", "baselines": {"tokens": "dense"}}, "base")
    suite = load_suite(written(tmp_path, changes | {"algorithms": {"dense": None}, "baselines": {"tokens": None}}))
    assert "about" not in suite.settings
    assert list(suite.algorithms) == ["smoe"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [0]}, r"no key 'sedes'. Did you mean 'seeds'"),
        ({"models": {"a": {"wieghts": "x"}}}, r"models.a: there is no key 'wieghts'. Did you mean 'weights'"),
        ({"algorithms": {"smoe": {"upcycling": {}}}}, r"algorithms.smoe: .*Did you mean 'upcycle'"),
        ({"algorithms": {"big": {"same_flops_as": "sme"}, "smoe": {}}}, r"no 'sme'. Did you mean 'smoe'"),
        ({"reference": "cosine"}, r"reference: there is no 'cosine'. There are dense, smoe"),
        ({"baselines": {"tokens": "dens"}}, r"baselines.tokens: there is no 'dens'. Did you mean 'dense'"),
        ({"seeds": []}, r"seeds is missing or empty"),
        ({"steps": "many"}, r"steps is 'many'; wanted a int"),
    ],
)
def test_a_mistake_in_a_suite_is_told(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_suite(written(tmp_path, BASE | changes))


def test_a_suite_that_does_not_exist_is_told():
    with pytest.raises(FileNotFoundError, match=r"suite 'mni' does not exist. There are mini, paper, smoke"):
        load_suite("mni")


@pytest.mark.parametrize("name", sorted(path.stem for path in SUITES.glob("*.yaml")))
def test_every_algorithm_of_every_suite_upcycles(name):
    """On one model; `run.py --toy` does it for all, in CI."""
    from materials import architecture

    suite = load_suite(name)
    for model, settings in list(suite.models.items())[-1:] if name == "paper" else suite.models.items():
        found = settings.get("pretrain", settings).get("architecture")
        if found is None:
            continue
        for algorithm in suite.algorithms:
            with torch.device("meta"):
                dense = AutoModelForCausalLM.from_config(architecture(found))
            before = sum(parameter.numel() for parameter in dense.parameters())
            config = suite.config(model, algorithm, 0, model, 4)
            made = meta_model(config, dense)
            layers = moe_layers(made)
            assert bool(layers) == ("upcycle" in suite.algorithms[algorithm])
            assert all(isinstance(layer, MoELayer) for layer in layers.values())
            assert (sum(parameter.numel() for parameter in made.parameters()) > before) == bool(layers)


def saved_llama(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_the_dense_baseline_takes_as_many_operations_as_the_moe(tmp_path):
    suite = load_suite(written(tmp_path, BASE))
    weights = saved_llama(tmp_path / "model")
    smoe, dense = (suite.config("b", name, 0, weights, 10) for name in ("smoe", "dense"))
    # counted by hand: two operations per weight in the forward and four in the backward, and attention
    attention, norms, ffn = 2 * 4 * 16 * 16, 5 * 16, 3 * 16 * 32
    gates = 2 * 4 * 16
    fixed = attention + norms + 16 * 50
    wanted = [6 * (fixed + 2 * used * ffn + extra) + 12 * 2 * 16 * 16 for used, extra in ((2, gates), (1, 0))]
    assert [promised_operations(smoe), promised_operations(dense)] == wanted
    assert same_flops(smoe, dense) == pytest.approx(wanted[0] / wanted[1])


def tiny_suite(tmp_path, routers):
    """A suite on a tiny model, whose cells take a second."""
    tokens = ["<|endoftext|>", *map(chr, range(32, 127))]
    _save_tiny(tmp_path / "model", tokens)
    lines = [json.dumps({"text": f"{i} is a number. " * 40}) for i in range(20)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    data = {
        "tokenizer": "{model}", "data_files": str(tmp_path / "corpus.jsonl"), "block_size": 16, "batch_size": 2,
        "val_fraction": 0.1, "num_proc": 1, "cache_dir": str(tmp_path / "blocks"), "seed": "{seed}",
    }  # fmt: skip
    trainer = {
        "accelerator": "cpu", "devices": 1, "max_steps": "{steps}", "val_check_interval": 2, "limit_val_batches": 1,
        "log_every_n_steps": 1, "num_sanity_val_steps": 0, "enable_checkpointing": False, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    upcycled = {
        name: {"upcycle": {"config": {"num_experts": 3, "router": {"class_path": path}}}}
        for name, path in routers.items()
    }
    return {
        "seeds": [0],
        "steps": 4,
        "reference": "smoe",
        "run": {
            "trainer": trainer,
            "model": {"class_path": "MoEModule", "init_args": {"model": "{model}"}},
            "data": {"class_path": "TextDataModule", "init_args": data},
        },
        "models": {"tiny": {"weights": str(tmp_path / "model")}},
        "algorithms": {"dense": {}, **upcycled},
    }


def test_a_cell_goes_on_from_its_checkpoint(tmp_path):
    from cell import run_cell
    from suites import Cell

    suite = load_suite(written(tmp_path, tiny_suite(tmp_path, {"smoe": "TopKRouter"})))

    def run(steps, folder):
        config = suite.config("tiny", "smoe", 0, str(tmp_path / "model"), steps)
        return run_cell(Cell("suite", "tiny", "smoe", 0, config, {}), tmp_path / folder, threads=1, every=2)

    whole = run(4, "whole")
    run(2, "parts")
    assert (tmp_path / "parts" / "last.ckpt").is_file()
    rest = run(4, "parts")
    for measure in ("losses", "expert_load", "expert_similarity", "expert_similarity_start", "final_routing", "tokens"):
        assert rest[measure] == whole[measure]
    assert [row["step"] for row in whole["losses"]["validation"]] == [0, 2, 4]
    assert [step for step, _ in whole["losses"]["train"]] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_router_of_ones_own_gets_its_row_and_a_run_goes_on(tmp_path):
    """Real processes: cells are run, kept, skipped; a failure is on record and may be tried again."""
    (tmp_path / "mine.py").write_text((ROOT / "examples" / "own_router" / "rms_norm_router.py").read_text())
    routers = {"smoe": "TopKRouter", "mine": "mine.RMSNormRouter", "broken": "mine.NoRouter"}
    suite = tiny_suite(tmp_path, routers)
    path = written(tmp_path, suite)
    done = _run(path)
    assert done.returncode == 1, done.stderr
    results = tmp_path / "results" / "suite" / "tiny"
    records = {file.stem: json.loads(file.read_text()) for file in results.glob("*.json")}
    assert sorted(records) == ["broken_seed0", "dense_seed0", "mine_seed0", "smoe_seed0"]
    assert "NoRouter" in records["broken_seed0"]["error"]
    for name in ("dense_seed0", "mine_seed0", "smoe_seed0"):
        record = records[name]
        assert record["error"] is None
        assert record["steps"] == 4
        assert record["tokens"] == 4 * 2 * 16
        assert [step for step, _ in record["losses"]["train"]] == [0, 1, 2, 3]
        assert [row["step"] for row in record["losses"]["validation"]][:1] == [0]
        assert record["training_flops"] == pytest.approx(record["flops_per_token"] * record["tokens"], rel=1e-6)
    # copies behind weights that sum to one are the dense model
    starts = [records[f"{name}_seed0"]["losses"]["validation"][0]["mean"] for name in ("dense", "mine", "smoe")]
    assert max(starts) - min(starts) <= 2e-5
    mine = records["mine_seed0"]
    assert mine["expert_similarity_start"] == pytest.approx(1, abs=1e-5)
    assert len(mine["expert_load"]) == 2
    assert all(sum(row) == pytest.approx(1, abs=1e-4) for row in mine["expert_load"])
    assert mine["final_routing"]["active_experts"] == 2
    # what is finished stays as it is, a failure too
    before = {file: file.read_bytes() for file in results.glob("*.json")}
    again = _run(path)
    assert again.returncode == 0
    assert "4 finished, 0 to run" in again.stdout
    assert {file: file.read_bytes() for file in results.glob("*.json")} == before
    (results / "dense_seed0.json").unlink()
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text() + "\n\nNoRouter = RMSNormRouter\n")
    mended = _run(path, "--retry_failed")
    assert mended.returncode == 0, mended.stdout
    assert "2 finished, 2 to run" in mended.stdout
    assert json.loads((results / "broken_seed0.json").read_text())["error"] is None
    # the same cell, in another process
    redone = json.loads((results / "dense_seed0.json").read_text())
    assert redone["losses"] == records["dense_seed0"]["losses"]
    # what was run with other settings is not taken for the suite's
    changed = _run(written(tmp_path, suite | {"steps": 6}))
    assert changed.returncode == 1
    assert "4 records" in changed.stderr
    assert "trainer.max_steps was 4 and is 6" in changed.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_a_killed_run_takes_its_cells_along(tmp_path):
    path = written(tmp_path, tiny_suite(tmp_path, {}) | {"steps": 1_000_000, "reference": "dense"})
    assert "there is no '7'. There are 0." in _run(path, "--seeds", "7").stderr
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--suite", path]
    run = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, stdout=subprocess.DEVNULL)
    rows = ROOT / "examples" / ".cache" / "benchmark" / "suite" / "tiny" / "dense_seed0" / "rows.jsonl"
    rows.unlink(missing_ok=True)
    _wait_for(lambda: rows.is_file() and rows.stat().st_size > 0)
    run.kill()
    run.wait()
    _wait_for(lambda: not _processes_of(tmp_path))
    assert not (tmp_path / "results").exists()


def _processes_of(folder):
    # its folder is in the environment of all that a run starts
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            ours = str(folder).encode() in environ.read_bytes()
        except OSError:
            continue
        if ours and int(environ.parent.name) != os.getpid():
            found.append(environ.parent.name)
    return found


def _wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def _save_tiny(folder, tokens):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, "<|endoftext|>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<|endoftext|>").save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokens),
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def _run(suite, *options):
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--suite", suite, "--workers", "2", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
