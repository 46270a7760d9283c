"""The verb that makes an upcycled checkpoint directory of a dense one: the command, its receipt and its words."""

import gc
import json
import weakref
from functools import partial

import pytest
import torch
import yaml
from catalogue import TEXT_ROWS, TwoLinear, logits, plain_model, token_ids
from lightning_fixtures import ForeignModule, batches, loader, tiny_llama, trainer_of, word_tokenizer
from torch import nn
from transformers import AutoTokenizer

from lightning_moe import (
    ExpertInit,
    ExpertWeightCosine,
    MoEModule,
    MoEUpcycleCallback,
    SplitInit,
    TopKRouter,
    UpcycleConfig,
    load_moe,
    moe_layers,
    upcycle,
)
from lightning_moe.cli import main
from lightning_moe.cli_upcycle import upcycle_checkpoint
from lightning_moe.initializers.base import copy_neurons
from lightning_moe.saving import CONFIG_FILE, apply_recipe

IDS = {"input_ids": torch.arange(2, 23).view(3, 7)}


@pytest.fixture(scope="module")
def dense_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    model = tiny_llama()
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def text_files(tmp_path):
    files = [tmp_path / f"{name}.txt" for name in ("prose", "code")]
    for file, text in zip(files, ("w1 w2 w3 w1 w4 ", "w5 w1 w4 w6 w1 w3 "), strict=True):
        file.write_text(text * 9)
    return [str(file) for file in files]


def run(*arguments):
    main(["upcycle", *map(str, arguments)])


def refused(capsys, *arguments):
    """What the verb says before it ends."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    code = stopped.value.code
    said = code if isinstance(code, str) else capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 5
    return said


# --- there and back ---


def test_what_it_writes_loads_and_is_the_dense_model(dense_path, tmp_path, capsys):
    out = tmp_path / "moe"
    run("--model", dense_path, "--output", out, "--config.num_experts", 8, "--config.router", "TopKRouter")
    said = capsys.readouterr().out
    assert "Upcycled 2 of 2 FFNs to 8 experts, 2 per token." in said
    assert f"Written to {out}" in said
    loaded = load_moe(out)
    assert (logits(loaded, IDS) - logits(tiny_llama(), IDS)).abs().max() <= 1e-5
    assert loaded.generation_config.max_new_tokens == 5
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 5
    assert AutoTokenizer.from_pretrained(out).get_vocab() == word_tokenizer().get_vocab()
    receipt = json.loads((out / CONFIG_FILE).read_text())["receipt"]
    assert receipt["num_experts"] == 8
    assert receipt["parameters_added"] == receipt["parameters"][1] - receipt["parameters"][0]
    assert receipt["seed"] == 0


def test_what_it_writes_is_a_model_for_the_module(dense_path, tmp_path):
    run("--model", dense_path, "--output", tmp_path / "moe", "--config.num_experts", 4)
    module = MoEModule(str(tmp_path / "moe"))
    assert len(moe_layers(module)) == 2
    assert float(module(**batches(1)[0]).loss) > 0


def test_router_and_initialiser_by_their_short_names(dense_path, tmp_path):
    options = ["--config.router", "TopKRouter", "--config.router.top_k", 4, "--dtype", "bfloat16"]
    options += ["--config.init", "GranularInit", "--config.init.granularity", 2]
    run("--model", dense_path, "--output", tmp_path / "moe", "--config.num_experts", 8, *options)
    layers = moe_layers(load_moe(tmp_path / "moe")).values()
    assert [(layer.experts.expert_size, layer.router.top_k) for layer in layers] == [(6, 4)] * 2
    assert {layer.experts.down_proj.dtype for layer in layers} == {torch.bfloat16}


def test_from_a_file_with_an_override(dense_path, tmp_path, capsys):
    config = {"num_experts": 6, "router": {"class_path": "SigmoidRouter", "init_args": {"top_k": 3}}, "layers": "1::2"}
    file = tmp_path / "upcycle.yaml"
    file.write_text(yaml.safe_dump({"model": str(dense_path), "output": str(tmp_path / "moe"), "config": config}))
    run("--config_file", file, "--config.num_experts", 5)
    ((name, layer),) = moe_layers(load_moe(tmp_path / "moe")).items()
    assert (name, layer.experts.num_experts, layer.router.top_k) == ("model.layers.1.mlp", 5, 3)
    assert "model.layers.0.mlp: not chosen by layers='1::2'" in capsys.readouterr().out


def test_calibration_files_are_the_domains_and_measure_step_zero(dense_path, tmp_path, text_files, capsys):
    options = ["--config.num_experts", 2, "--config.router_init", "CentroidRouterInit"]
    run("--model", dense_path, "--output", tmp_path / "moe", *options, "--calibration_files", *text_files)
    assert "measured     max |logit difference| = " in capsys.readouterr().out
    model, config = tiny_llama(), UpcycleConfig(num_experts=2, seed=0)
    upcycle(model, config)
    for name, layer in moe_layers(load_moe(tmp_path / "moe")).items():
        gate = layer.router.gate
        # rows off the mean of all: of two domains they are opposite
        torch.testing.assert_close(gate[0], -gate[1])
        assert not torch.equal(gate, moe_layers(model)[name].router.gate)


@pytest.mark.parametrize("method", ["activation", "gradient"])
def test_calibration_files_tell_which_neurons_matter(dense_path, tmp_path, text_files, method):
    options = ["--config.num_experts", 2, "--config.num_shared_experts", 1, "--config.init", "SplitInit"]
    options += ["--config.init.method", method, "--calibration_files", *text_files]
    run("--model", dense_path, "--output", tmp_path / "moe", *options)
    layers = moe_layers(load_moe(tmp_path / "moe")).values()
    assert [(layer.experts.expert_size, layer.shared_experts.expert_size) for layer in layers] == [(4, 4)] * 2


def test_branches_by_path(dense_path, tmp_path):
    tiny_llama(seed=1).save_pretrained(tmp_path / "branch")
    options = ["--config.num_experts", 2, "--config.init", "BranchTrainMixInit"]
    run("--model", dense_path, "--output", tmp_path / "moe", *options, "--config.init.models", f"[{tmp_path}/branch]")
    experts = load_moe(tmp_path / "moe").model.layers[0].mlp.experts
    assert torch.equal(experts.down_proj[0], tiny_llama().model.layers[0].mlp.down_proj.weight)
    assert torch.equal(experts.down_proj[1], tiny_llama(seed=1).model.layers[0].mlp.down_proj.weight)


# --- a dry run ---


@pytest.mark.parametrize("init", ["CopyInit", "GranularInit", "NoiseInit", "SplitInit"])
def test_a_dry_run_tells_the_same_and_touches_nothing(dense_path, tmp_path, init, capsys, monkeypatch):
    options = ["--model", dense_path, "--config.num_experts", 4, "--config.init", init]
    options += ["--config.num_shared_experts", 1] if init == "CopyInit" else []
    run(*options, "--output", tmp_path / "moe")
    real = capsys.readouterr().out.splitlines()
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    run(*options, "--output", tmp_path / "none", "--dry_run", "true")
    dry = capsys.readouterr().out.splitlines()
    assert dry[:-1] == [line for line in real[:-1] if not line.startswith("  similarity")]
    assert dry[-1] == "A dry run: no weights were loaded and nothing was written."
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("method", ["kmeans", "activation"])
def test_a_dry_run_needs_no_numbers(dense_path, text_files, method):
    receipt = upcycle_checkpoint(
        model=str(dense_path),
        config=UpcycleConfig(num_experts=4, init=SplitInit(method)),
        calibration_files=text_files if method == "activation" else None,
        dry_run=True,
        dtype="bfloat16",
    )
    assert receipt.memory[0] > 2 * receipt.parameters[0]  # the rotary embedding stays in float32
    assert receipt.expert_similarity is None


def test_a_dry_run_refuses_what_the_real_one_would(dense_path, capsys):
    options = ["--model", dense_path, "--config.num_experts", 5, "--config.init", "SplitInit", "--dry_run", "true"]
    assert "num_experts=5 does not divide the FFN's width, 12" in refused(capsys, *options)


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such"], "/no/such does not exist"),
        (["--config.router", "TopkRouter"], "Did you mean 'TopKRouter'?"),
        (["--config.init", "CopyInitt"], "Did you mean 'CopyInit'?"),
        (["--config.num_expert", "4"], "Did you mean 'num_experts'?"),
        (["--outptu", "x"], "Did you mean 'output'?"),
        (["--config.router.topk", "4"], "Did you mean 'top_k'?"),
        (["--dtype", "bf16"], "bfloat16"),
        (["--config.num_experts", "0"], "num_experts=0: wanted a whole number"),
        (["--config.num_experts", "1"], "top_k=2 with num_experts=1"),
        (["--config.layers", "7"], "matches none of the model's 2 FFNs"),
        (["--config.init", "GranularInit", "--config.init.granularity", "0"], "granularity=0: wanted"),
        (["--config.init", "DropInit", "--config.init.ratio", "3"], "config.init: ratio=3.0: wanted a number"),
        (["--config.init", "KMeansRouterInit"], "'KMeansRouterInit' belongs under 'router_init'"),
        (["--num_experts", "4"], "Did you mean 'config.num_experts'?"),
        (["--config.calibration", "x"], "Did you mean 'calibration_files', outside 'config'?"),
        (["--calibration_files", "/no/such.txt"], "calibration_files: no file is or matches '/no/such.txt'"),
        (["--config_file", "no_such.yaml"], "no_such.yaml"),
        (["--auto_class", "AutoConfig"], "auto_class='AutoConfig': transformers has no such class of models"),
        (["--config.init.method", "kmeans"], "config.init: Wanted a class, with its arguments under init_args, as {"),
    ],
)
def test_mistakes_are_told_in_words_and_nothing_is_written(dense_path, tmp_path, arguments, message, capsys):
    given = ["--model", dense_path, "--output", tmp_path / "moe", "--config.num_experts", 4, *arguments]
    assert message in refused(capsys, *given)
    assert not (tmp_path / "moe").exists()


def test_an_empty_directory_is_no_model(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    given = ["--model", tmp_path / "empty", "--output", tmp_path / "moe", "--config.num_experts", 4]
    assert "holds no model: there is no config.json in it" in refused(capsys, *given)


def test_calibration_files_are_globs_and_jsonl_too(dense_path, tmp_path):
    """The same text gives the same model, whatever file it stands in."""
    (tmp_path / "one.txt").write_text("the sea and the old man")
    (tmp_path / "one.jsonl").write_text('{"text": "the sea and the old man"}\n')
    models = []
    for number, pattern in enumerate(("o*.txt", "one.jsonl")):
        options = ["--config.num_experts", 4, "--config.seed", 1, "--config.init", "SplitInit"]
        options += ["--config.init.method", "activation", "--calibration_files", tmp_path / pattern]
        run("--model", dense_path, "--output", tmp_path / str(number), *options)
        models.append(load_moe(tmp_path / str(number)).state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


@pytest.mark.parametrize("dry_run", ["false", "true"])
@pytest.mark.parametrize(
    ("options", "texts", "message"),
    [
        (["--config.router_init", "CentroidRouterInit"], [], "config.router_init: CentroidRouterInit looks at hidden"),
        (["--config.init", "SplitInit", "--config.init.method", "gradient"], [], "text files, as --calibration_files"),
        ([], [None], "is a folder; give its files"),
        ([], [""], "holds no text"),
        ([], [" \n"], "holds no text"),
        ([], [b"\xff\xfe\x00"], "is no UTF-8 text"),
        (["--config.router_init", "KMeansRouterInit"], ["the old man"], "3 tokens for 4 experts; give more text"),
        (["--config.router_init", "CentroidRouterInit"], ["the sea", "the man"], "for 4 experts; give one batch for"),
        (["--config.init", "SplitInit", "--config.init.method", "gradient"], ["sea"], "holds 1 token"),
    ],
)
def test_calibration_is_refused_before_the_weights_are_loaded(
    dense_path, tmp_path, options, texts, message, dry_run, capsys, monkeypatch
):
    monkeypatch.setattr("lightning_moe.cli_upcycle.load_model", None)
    files = [tmp_path / f"{number}.txt" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        if text is None:
            file.mkdir()
        else:
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
    given = ["--model", dense_path, "--output", tmp_path / "moe", "--config.num_experts", 4, "--dry_run", dry_run]
    assert message in refused(capsys, *given, *options, *(["--calibration_files", *files] if files else []))


def test_without_a_tokenizer_there_is_no_calibration(tmp_path, text_files, capsys):
    tiny_llama().save_pretrained(tmp_path / "bare")
    given = ["--model", tmp_path / "bare", "--output", tmp_path / "moe", "--config.num_experts", 4]
    assert "has no tokenizer" in refused(capsys, *given, "--calibration_files", *text_files)
    gone = ["--model", tmp_path / "gone", *given[2:]]
    assert "gone does not exist" in refused(capsys, *gone, "--calibration_files", *text_files)


def test_a_bug_keeps_its_traceback(dense_path, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_moe.cli_upcycle.save_moe", lambda *args, **kwargs: int("a bug"))
    with pytest.raises(ValueError, match="invalid literal"):
        run("--model", dense_path, "--output", tmp_path / "moe", "--config.num_experts", 4)


def test_a_traceback_can_be_asked_for(dense_path, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_MOE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="matches none of"):
        run("--model", dense_path, "--output", tmp_path / "moe", "--config.num_experts", 4, "--config.layers", 7)


def test_a_directory_that_holds_something_is_not_written_to(dense_path, tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    said = refused(capsys, "--model", dense_path, "--output", tmp_path, "--config.num_experts", 4)
    assert "exists and is not an empty directory" in said
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_without_a_place_to_write_to(dense_path, capsys):
    assert "output: wanted a directory" in refused(capsys, "--model", dense_path, "--config.num_experts", 4)


def test_an_upcycled_model_is_not_upcycled_again(dense_path, tmp_path, capsys):
    run("--model", dense_path, "--output", tmp_path / "moe", "--config.num_experts", 4)
    given = ["--model", tmp_path / "moe", "--output", tmp_path / "again", "--config.num_experts", 4]
    assert "is upcycled already" in refused(capsys, *given)


def test_the_verb_is_named_where_another_is_misspelled(capsys):
    with pytest.raises(SystemExit):
        main(["upcyle"])
    assert "Did you mean 'upcycle'?" in capsys.readouterr().err


# --- layer by layer ---


class Gone:
    """Wraps the layers' names, and counts the dense FFNs that are alive when each layer is begun."""

    def __init__(self, model):
        self.ffns = [weakref.ref(layer.mlp.up_proj.weight) for layer in model.model.layers]
        self.alive = []

    def __call__(self, names):
        for name in names:
            gc.collect()
            self.alive.append(sum(ffn() is not None for ffn in self.ffns))
            yield name


@pytest.mark.parametrize(("init", "alive"), [(None, [4, 3, 2, 1]), (SplitInit("kmeans"), [4, 4, 4, 4])])
def test_a_dense_ffn_goes_when_its_layer_stands(init, alive):
    model = tiny_llama(num_hidden_layers=4)
    watch = Gone(model)
    upcycle(model, UpcycleConfig(num_experts=4, init=init), progress=watch)
    assert watch.alive == alive
    assert sum(ffn() is not None for ffn in watch.ffns) == 0


class LateInit(ExpertInit):
    """Refuses the second layer, by its numbers or by its shapes."""

    def __init__(self, looks):
        self.looks = looks

    def __call__(self, experts, dense, generator, states=None):
        if (self.looks and float(dense.up.sum()) == 0) or (not self.looks and dense.expert_size == 13):
            raise ValueError("no second layer")
        for expert in range(experts.num_experts):
            copy_neurons(experts, expert, dense, slice(None))


@pytest.mark.parametrize("looks", [True, False])
def test_an_initialiser_that_refuses_late_leaves_the_model_as_it_was(looks):
    widths = iter((12, 13))
    model = plain_model(lambda: TwoLinear(8, next(widths)))
    model[2].ffn.fc1.weight.data.zero_()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="no second layer"):
        upcycle(model, UpcycleConfig(num_experts=4, init=LateInit(looks)))
    assert dict(model.named_modules()) == before


def test_a_model_on_the_meta_device_becomes_one_there():
    with torch.device("meta"):
        model = tiny_llama()
    receipt = upcycle(model, UpcycleConfig(num_experts=4, num_shared_experts=1))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert receipt.parameters == upcycle(tiny_llama(), UpcycleConfig(num_experts=4, num_shared_experts=1)).parameters


# --- the receipt ---


def noisy(model):
    for layer in moe_layers(model).values():
        for parameter in layer.experts.parameters():
            parameter.data.normal_()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_similarity_is_that_of_the_metric(family, dtype):
    from lightning_moe import DropInit

    model = TEXT_ROWS[family].build().to(dtype)
    receipt = upcycle(model, UpcycleConfig(num_experts=5, init=DropInit(0.5)))
    metric = ExpertWeightCosine()
    wanted = [float(metric(list(layer.experts.parameters()))) for layer in moe_layers(model).values()]
    assert receipt.expert_similarity == pytest.approx(sum(wanted) / 2, abs=1e-5)
    assert f"similarity   {receipt.expert_similarity:.3f}" in str(receipt)


def test_copies_are_alike_and_one_expert_is_like_none():
    assert upcycle(tiny_llama(), UpcycleConfig(num_experts=4)).expert_similarity == pytest.approx(1, abs=1e-6)
    one = UpcycleConfig(num_experts=1, router=partial(TopKRouter, top_k=1, normalize=False))
    assert upcycle(tiny_llama(), one).expert_similarity is None


def test_the_memory_is_that_of_parameters_and_buffers():
    model = tiny_llama().bfloat16()
    model.register_buffer("table", torch.zeros(100, dtype=torch.int64))

    def stored():
        return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])

    before = stored()
    receipt = upcycle(model, UpcycleConfig(num_experts=4))
    assert receipt.memory == (before, stored())
    assert receipt.parameters_added == receipt.parameters[1] - receipt.parameters[0]


class Odd(nn.Module):
    """Widens and comes back, by names that no family has."""

    def __init__(self):
        super().__init__()
        self.widen, self.come_back = nn.Linear(8, 32), nn.Linear(32, 8)


def test_what_was_left_dense_and_why():
    model = plain_model(lambda: TwoLinear(8, 12))
    model.odd, model.head, model.plain = Odd(), TwoLinear(8, 12, 3), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    receipt = upcycle(model, UpcycleConfig(num_experts=4, layers=[0]))
    assert receipt.kept == ("2.ffn",)
    assert receipt.left_dense == {
        "2.ffn": "not chosen by layers=[0]",
        "odd": "of no known family: Odd",
        "head": "leads from width 8 to 3",
    }
    assert "  left dense   head: leads from width 8 to 3" in str(receipt)


@pytest.mark.parametrize("family", TEXT_ROWS)
def test_of_a_known_model_nothing_else_looks_like_an_ffn(family):
    assert upcycle(TEXT_ROWS[family].build(), UpcycleConfig(num_experts=4)).left_dense == {}


def test_the_receipt_fits_on_a_screen():
    model = nn.Sequential(*(nn.Sequential(TwoLinear(8, 12, 8)) for _ in range(3)))
    for width in range(9, 40):
        model.append(TwoLinear(8, 12, width))
    text = str(upcycle(model, UpcycleConfig(num_experts=4, layers=[0], num_shared_experts=1), batch=None))
    assert len(text.splitlines()) <= 12
    assert "for 28 other reasons" in text


# --- in the Trainer ---


class Writer:
    """Stands for TensorBoard's SummaryWriter."""

    def __init__(self):
        self.texts = []

    def add_text(self, tag, text, step):
        self.texts.append((tag, text, step))


def test_the_receipt_is_written_once_and_stands_in_the_checkpoint(tmp_path, monkeypatch):
    from lightning.pytorch.loggers import CSVLogger

    logger, writer = CSVLogger(tmp_path), Writer()
    monkeypatch.setattr(CSVLogger, "experiment", property(lambda self: writer))
    monkeypatch.setattr(CSVLogger, "log_metrics", lambda *args, **kwargs: None)
    monkeypatch.setattr(CSVLogger, "save", lambda self: None)
    callback = MoEUpcycleCallback(UpcycleConfig(num_experts=4))
    module, made = ForeignModule(), loader(batches(2))
    trainer = trainer_of(tmp_path, [callback], logger=logger)
    trainer.fit(module, made)
    trainer.fit(module, made)
    ((tag, text, step),) = [written for written in writer.texts if written[0] == "moe/receipt"]
    assert (tag, step) == ("moe/receipt", 0)
    assert text.splitlines() == [f"    {line}" for line in str(callback.receipt).splitlines()]
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["lightning_moe"]
    assert saved["receipts"] == {"": callback.receipt.to_dict()}
    assert json.loads(json.dumps(saved["receipts"]))[""]["num_experts"] == 4


@pytest.mark.parametrize("present", [True, False])
def test_a_recipe_loads_with_and_without_a_receipt(dense_path, tmp_path, present):
    run("--model", dense_path, "--output", tmp_path / "moe", "--config.num_experts", 4)
    saved = json.loads((tmp_path / "moe" / CONFIG_FILE).read_text())
    recipe = {**saved["recipe"], **({"receipt": saved["receipt"]} if present else {})}
    if not present:
        del saved["receipt"]
        (tmp_path / "moe" / CONFIG_FILE).write_text(json.dumps(saved))
    model = tiny_llama()
    apply_recipe(model, recipe)
    model.load_state_dict(load_moe(tmp_path / "moe").state_dict())
    ids = {"input_ids": token_ids() % 37}
    assert (logits(model, ids) - logits(tiny_llama(), ids)).abs().max() <= 1e-5
