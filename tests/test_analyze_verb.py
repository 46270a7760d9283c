"""The verb that analyses checkpoints: the command, its files and its words."""

import json

import pytest
from analysis_fixtures import SIZES, texts, trained
from lightning_fixtures import tiny_llama, word_tokenizer
from test_native import native_model

from lightning_moe import analyze, save_moe
from lightning_moe.analysis.verdict import summary
from lightning_moe.cli import main


@pytest.fixture(scope="module")
def model():
    return trained(60)


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for name, one in {"early": trained(10), "late": model}.items():
        save_moe(one, folder / name)
        word_tokenizer().save_pretrained(folder / name)
    tiny_llama().save_pretrained(folder / "dense")
    word_tokenizer().save_pretrained(folder / "dense")
    for name, seed in {"native-early": 1, "native": 0}.items():
        native_model("MixtralForCausalLM", seed).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    (folder / "prose.txt").write_text(" ".join(texts("prose")))
    (folder / "code.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts("code")))
    (folder / "empty.txt").touch()
    return folder


def run(folder, *arguments):
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    main(["analyze", *sizes, *(str(argument).format(folder) for argument in arguments)])


def test_the_verb_writes_the_report_of_a_series(place, tmp_path, capsys):
    out = tmp_path / "out"
    domains = ["--data", "prose={}/prose.txt", "--data", "code={}/code.jsonl", "--temperatures", 0.5, 4]
    run(place, "--model", "{}/early", "--model", "{}/late", *domains, "--output", out)
    said = capsys.readouterr().out
    result = json.loads((out / "analysis.json").read_text())
    assert [one["name"] for one in result["checkpoints"]] == ["early", "late"]
    assert [one["setting"] for one in result["studies"] if one["setting"]] == [0.5, 4.0]
    assert result["tokens"] == {"prose": 360, "code": 360}
    assert f"Written to {out}: open {out}/report.html." in said
    assert "balance: In the most uneven layer" in said
    assert "Routing of late" in (out / "report.html").read_text()


def test_the_verb_gives_what_the_function_does(place, tmp_path, model):
    run(place, "--model", "{}/late", "--data", "prose={}/prose.txt", "--studies=false", "--output", tmp_path / "out")
    documents = {"prose": [(place / "prose.txt").read_text()]}
    wanted = analyze(model, word_tokenizer(), data=documents, name="late", studies=False, **SIZES)
    assert json.loads((tmp_path / "out" / "analysis.json").read_text()) == wanted.to_dict()
    assert summary(wanted).startswith(("Routing is", "Routing works"))


PROSE = ["--data", "prose={}/prose.txt"]


def test_the_verb_on_models_that_are_moe_already(place, tmp_path):
    out = tmp_path / "out"
    domains = [*PROSE, "--data", "code={}/code.jsonl", "--num_tokens", 72]
    run(place, "--model", "{}/native-early", "--model", "{}/native", *domains, "--output", out)
    result = json.loads((out / "analysis.json").read_text())
    assert [one["name"] for one in result["checkpoints"]] == ["native-early", "native"]
    assert [layer["name"] for layer in result["layers"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert result["skipped"] == {}
    assert len(result["studies"]) == 6
    model, length = native_model("MixtralForCausalLM"), SIZES["sequence_length"]
    ids = word_tokenizer()((place / "prose.txt").read_text(), return_tensors="pt").input_ids[0, :72].view(-1, length)
    wanted = model(input_ids=ids, labels=ids).loss.item()
    assert result["studies"][0]["loss"]["prose"] == pytest.approx(wanted, rel=1e-5)
    assert "Left out" not in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{}/late", "--data", "prose={}/none.txt"], "data prose: no file is or matches"),
        (["--model", "{}/late", "--data", "prose={}/empty.txt"], "empty.txt' is empty"),
        (["--model", "{}/late", "--data", "{}/prose.txt"], "is no name=file"),
        (["--model", "{}/late", "--data", "=x.txt"], "is no name=file"),
        (["--model", "{}/late", *PROSE, *PROSE], "the domain 'prose' is given twice"),
        (["--model", "{}/dense", *PROSE], "has no MoE layer that ran"),
        (["--model", "{}/none", *PROSE], "none does not exist"),
        (["--model", "{}/late", *PROSE, "--tokenizer", "{}"], "tokenizer: "),
        (["--model", "{}/late", *PROSE, "--output", "{}"], "exists and is not an empty directory"),
        (["--model", "{}/late", *PROSE, "--num_token", "8"], "Did you mean 'num_tokens'?"),
        (["--model", "{}/late"], "data"),
        (PROSE, "model"),
    ],
)
def test_mistakes_are_told_in_words(place, tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(place, "--output", tmp_path / "out", *arguments)
    code = stopped.value.code
    said = code if isinstance(code, str) else capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert len(said.splitlines()) <= 5
    assert not (tmp_path / "out").exists()
