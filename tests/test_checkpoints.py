"""A checkpoint becomes one file, opens again, and starts other runs; what is none is refused in one line."""

import json
import pickle
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_fixtures import (
    EagerModule,
    ForeignModule,
    LazyModule,
    batches,
    loader,
    small_config,
    tiny_llama,
    trainer_of,
    word_tokenizer,
    write_corpus,
)
from safetensors import safe_open
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_moe import (
    LowRankInit,
    MoEModule,
    MoEUpcycleCallback,
    consolidate,
    export_to_hf,
    load_from_checkpoint,
    load_moe,
    moe_layers,
    save_moe,
    upcycle,
)
from lightning_moe.checkpoints import read_checkpoint, read_outline
from lightning_moe.cli import MoECLI, main
from lightning_moe.saving import moe_recipe

MODEL = "net.inner."


class Small(LightningModule):
    """Without any Hugging Face model."""

    def __init__(self, width=16):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8))

    def training_step(self, batch, batch_idx):
        return self.body(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, module, path=None, data=None, config=None, **options):
    """Trains two steps; returns the Trainer, which may write what came of it."""
    callback = MoEUpcycleCallback(config or small_config(), balance_losses=False, **options)
    trainer = trainer_of(folder, [callback], max_steps=2)
    trainer.fit(module, data or loader(batches(2)))
    if path is not None:
        trainer.save_checkpoint(path)
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A foreign module after two steps, and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    module = ForeignModule()
    fit(folder, module, folder / "moe.ckpt")
    return module, folder / "moe.ckpt"


def shard(file, directory, key):
    """The same checkpoint as a directory, as FSDP1 (`model`) or FSDP2 (`state_dict`) have it."""
    checkpoint = torch.load(file, weights_only=True)
    names = list(checkpoint["state_dict"])
    state = {key: checkpoint.pop("state_dict")}
    for number, optimizer in enumerate(checkpoint.pop("optimizer_states")):
        optimizer["state"] = {names[index]: value for index, value in optimizer["state"].items()}
        for group in optimizer["param_groups"]:
            group["params"] = [names[index] for index in group["params"]]
        state[f"optimizer_{number}"] = optimizer
    dcp.save(state, checkpoint_id=directory, no_dist=True)
    torch.save(checkpoint, directory / "meta.pt")
    return directory


@pytest.fixture(scope="module")
def kinds(trained, tmp_path_factory):
    """The same checkpoint in all its shapes."""
    _, file = trained
    folder = tmp_path_factory.mktemp("kinds")
    return {
        "file": file,
        "fsdp1": shard(file, folder / "fsdp1.ckpt", "model"),
        "fsdp2": shard(file, folder / "fsdp2.ckpt", "state_dict"),
    }


pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# --- consolidate ---


@pytest.mark.parametrize("kind", ["file", "fsdp1", "fsdp2"])
def test_a_checkpoint_becomes_a_model_that_loads_by_itself(trained, kinds, kind, tmp_path):
    module, _ = trained
    told = consolidate(kinds[kind], tmp_path / "moe")
    assert (told.model, told.global_step) == ("LlamaForCausalLM", 2)
    assert told.num_parameters == sum(p.numel() for p in module.parameters())
    loaded = load_moe(tmp_path / "moe")
    same(loaded.state_dict(), module.net.inner.state_dict())
    ids = batches(1)[0]["input_ids"]
    expected = module.net.inner.eval()(input_ids=ids).logits
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    module.train()


def test_it_keeps_the_facts_of_the_run(kinds, tmp_path):
    consolidate(kinds["fsdp2"], tmp_path / "moe")
    config = json.loads((tmp_path / "moe" / "moe_config.json").read_text())
    assert config["checkpoint"] == {"epoch": 1, "global_step": 2, "hyper_parameters": {}}
    assert config["receipt"]["num_experts"] == 5
    assert set(config["recipe"]["layers"]) == {"model.layers.0.mlp", "model.layers.1.mlp"}


def test_one_file_of_weights_has_its_recipe_beside_it(trained, kinds, tmp_path):
    module, _ = trained
    consolidate(kinds["fsdp2"], tmp_path / "moe.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"moe.safetensors", "moe.json"}
    with safe_open(tmp_path / "moe.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        same({name: file.get_tensor(name) for name in file.keys()}, module.net.inner.state_dict())  # noqa: SIM118
    assert json.loads((tmp_path / "moe.json").read_text())["model"]["class"] == "LlamaForCausalLM"


@pytest.mark.parametrize("kind", ["file", "fsdp1", "fsdp2"])
def test_a_file_to_go_on_from_has_the_optimizer_states(kinds, kind, tmp_path):
    consolidate(kinds[kind], tmp_path / "one.ckpt")
    whole, found = (torch.load(path, weights_only=True) for path in (kinds["file"], tmp_path / "one.ckpt"))
    same(found["state_dict"], whole["state_dict"])
    assert found.keys() == whole.keys()
    for states in (whole, found):
        states["optimizer_states"] = [list(one["state"].values()) for one in states["optimizer_states"]]
    for ours, theirs in zip(found["optimizer_states"][0], whole["optimizer_states"][0], strict=True):
        same(ours, theirs)


def test_tied_weights_are_written_once(tmp_path):
    module = MoEModule(tiny_llama(tie_word_embeddings=True))
    fit(tmp_path, module, tmp_path / "tied.ckpt")
    told = consolidate(tmp_path / "tied.ckpt", tmp_path / "moe")
    assert told.num_parameters == sum(p.numel() for p in module.parameters())
    loaded = load_moe(tmp_path / "moe")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    same(loaded.state_dict(), module.model.state_dict())


def test_the_dtype_is_that_of_the_weights(tmp_path):
    module = ForeignModule().to(torch.bfloat16)
    fit(tmp_path, module, tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    del checkpoint["lightning_moe"]["models"]
    torch.save(checkpoint, tmp_path / "half.ckpt")
    consolidate(tmp_path / "half.ckpt", tmp_path / "moe", model=tiny_llama())
    assert load_moe(tmp_path / "moe").dtype == torch.bfloat16


def test_it_goes_on_to_another_architecture(kinds, tmp_path):
    consolidate(kinds["fsdp2"], tmp_path / "moe")
    assert export_to_hf(load_moe(tmp_path / "moe"), tmp_path / "mixtral").target == "mixtral"


def test_what_is_no_hugging_face_model_keeps_its_names(tmp_path):
    module = Small(width=24)
    fit(tmp_path, module, tmp_path / "small.ckpt", data=loader([torch.randn(3, 8) for _ in range(2)]))
    told = consolidate(tmp_path / "small.ckpt", tmp_path / "moe")
    assert told.model is None
    same(load_moe(tmp_path / "moe", model=Small(width=24)).state_dict(), module.state_dict())
    config = json.loads((tmp_path / "moe" / "moe_config.json").read_text())
    assert config["checkpoint"]["hyper_parameters"] == {"width": 24}


def test_an_older_checkpoint_wants_the_dense_model(trained, kinds, tmp_path):
    module, _ = trained
    checkpoint = torch.load(kinds["file"], weights_only=True)
    del checkpoint["lightning_moe"]["models"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    consolidate(tmp_path / "old.ckpt", tmp_path / "moe", model=tiny_llama(seed=4))
    same(load_moe(tmp_path / "moe").state_dict(), module.net.inner.state_dict())
    with pytest.raises(ValueError, match=r"does not fit LlamaForCausalLM: .*\(37, 8\), not \(37, 16\)"):
        consolidate(tmp_path / "old.ckpt", tmp_path / "other", model=tiny_llama(hidden_size=16))
    with pytest.raises(ValueError, match=r"it has no model\.layers\.2\."):
        consolidate(tmp_path / "old.ckpt", tmp_path / "other", model=tiny_llama(num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no module that is net\.inner\.model\.layers\.0\.mlp"):
        consolidate(tmp_path / "old.ckpt", tmp_path / "other", model=tiny_llama(num_hidden_layers=1))
    assert not (tmp_path / "other").exists()


def test_a_model_that_came_upcycled_needs_no_callback(tmp_path, trained):
    save_moe(trained[0].net.inner, tmp_path / "start")
    module = MoEModule(str(tmp_path / "start"))
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.fit(module, loader(batches(1)))
    trainer.save_checkpoint(tmp_path / "on.ckpt")
    consolidate(tmp_path / "on.ckpt", tmp_path / "moe")
    same(load_moe(tmp_path / "moe").state_dict(), module.model.state_dict())


class Object:
    """Of a class that is not plain Python."""


def write(path, content):
    path.parent.mkdir(exist_ok=True, parents=True)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no checkpoint", "x.ckpt is no checkpoint: torch.save writes another kind of file"),
        ([1, 2], "holds a list, where a checkpoint is a dictionary"),
        ({"optimizer_states": [], "epoch": 3}, "holds no weights, only: epoch, optimizer_states"),
        ({"state_dict": {}}, "holds no weights, only: nothing"),
        ({"weight": torch.ones(2)}, "holds tensors only. Wanted what Trainer.save_checkpoint"),
        ({"state_dict": {"weight": torch.ones(2)}}, "is that of a dense model"),
        ({"state_dict": {"mlp.experts.down_proj": torch.ones(2)}}, "has experts, but no recipe of them"),
        ({"state_dict": {}, "hyper_parameters": Object()}, "Object, and loading it could run code"),
    ],
)
def test_what_is_no_checkpoint_is_told_in_one_line(tmp_path, content, told):
    if isinstance(content, bytes):
        (tmp_path / "x.ckpt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        consolidate(tmp_path / "x.ckpt", tmp_path / "moe")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"x.ckpt"}


def test_a_shard_that_is_missing_or_cut_short_is_told_in_one_line(kinds, tmp_path):
    shutil.copytree(kinds["fsdp2"], tmp_path / "cut.ckpt")
    shard = next((tmp_path / "cut.ckpt").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:20000])
    with pytest.raises(ValueError, match=r"cut\.ckpt cannot be read, it may be cut short: .+"):
        consolidate(tmp_path / "cut.ckpt", tmp_path / "moe")
    shard.unlink()
    with pytest.raises(ValueError, match=r"cut\.ckpt cannot be read, it may be cut short: .*distcp"):
        consolidate(tmp_path / "cut.ckpt", tmp_path / "moe")


def test_without_deepspeed_its_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "zero.ckpt" / "checkpoint").mkdir(parents=True)
    (tmp_path / "zero.ckpt" / "checkpoint" / "mp_rank_00_model_states.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "deepspeed.utils.zero_to_fp32", None)
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.fp16.loss_scaler", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-moe\[deepspeed\]'"):
        consolidate(tmp_path / "zero.ckpt", tmp_path / "moe")


def test_paths_are_checked_first(kinds, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist\. Give a checkpoint"):
        consolidate(tmp_path / "nowhere", tmp_path / "moe")
    (tmp_path / "taken.ckpt").write_text("")
    with pytest.raises(FileExistsError, match=r"taken\.ckpt' exists"):
        consolidate(kinds["file"], tmp_path / "taken.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is a directory, but no checkpoint"):
        consolidate(tmp_path / "empty", tmp_path / "moe")


class Wicked:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("where", ["metadata", "meta", "file", "shard"])
def test_no_object_is_unpickled(kinds, where, tmp_path):
    place = tmp_path / "copy.ckpt"
    bad = Wicked(tmp_path / "written")
    if where == "file":
        torch.save({"state_dict": {"weight": torch.ones(2)}, "bad": bad}, place)
    elif where == "shard":
        dcp.save(
            {"state_dict": {"weight": torch.ones(2)}, "optimizer_0": {"bad": bad}}, checkpoint_id=place, no_dist=True
        )
    else:
        shutil.copytree(kinds["fsdp2"], place)
        if where == "metadata":
            (place / ".metadata").write_bytes(pickle.dumps(bad))
        else:
            torch.save(bad, place / "meta.pt")
    with pytest.raises(ValueError, match=r"io\.open|is not what torch"):
        read_checkpoint(place)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("kind", ["file", "fsdp1", "fsdp2"])
def test_an_outline_has_recipe_and_shapes(trained, kinds, kind):
    recipe, shapes = read_outline(kinds[kind])
    assert set(recipe["layers"]) == {f"{MODEL}model.layers.{number}.mlp" for number in (0, 1)}
    assert shapes == {name: value.shape for name, value in trained[0].state_dict().items()}


def test_the_verb_writes_what_export_reads(kinds, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "dense")
    word_tokenizer().save_pretrained(tmp_path / "dense")
    main(["consolidate", "--checkpoint", str(kinds["fsdp2"]), "--output", str(tmp_path / "moe"), "--tokenizer",
          str(tmp_path / "dense")])  # fmt: skip
    assert f"{tmp_path / 'moe'}: LlamaForCausalLM" in capsys.readouterr().out
    main(["export", "--model", str(tmp_path / "moe"), "--output", str(tmp_path / "mixtral")])
    assert (tmp_path / "mixtral" / "tokenizer.json").is_file()
    with pytest.raises(SystemExit, match=r"^error: output='.*moe' exists"):
        main(["consolidate", "--checkpoint", str(kinds["file"]), "--output", str(tmp_path / "moe")])


# --- load_from_checkpoint ---


class WithHook(ForeignModule):
    """Has hyper-parameters, and a hook of its own."""

    def __init__(self, lr=1e-2, seed=0, scale=2.0):
        super().__init__(lr=lr, seed=seed)
        self.save_hyperparameters()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["seen"] = self.hparams.scale

    def on_load_checkpoint(self, checkpoint):
        self.seen = (checkpoint["seen"], len(moe_layers(self)))


@pytest.mark.parametrize("kind", ["file", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("cls", [ForeignModule, LazyModule], ids=lambda cls: cls.__name__)
def test_a_foreign_module_is_loaded(trained, kinds, kind, cls):
    module = load_from_checkpoint(cls, kinds[kind], seed=7)
    same(module.state_dict(), trained[0].state_dict())
    assert type(module) is cls
    assert "on_load_checkpoint" not in vars(cls)


def test_hyper_parameters_and_hooks_are_the_users_own(tmp_path):
    module = WithHook(scale=3.0)
    fit(tmp_path, module, tmp_path / "moe.ckpt")
    loaded = load_from_checkpoint(WithHook, tmp_path / "moe.ckpt", lr=0.5)
    assert (loaded.hparams.scale, loaded.lr, loaded.seen) == (3.0, 0.5, (3.0, 2))
    same(loaded.state_dict(), module.state_dict())
    # the class is as it was
    assert WithHook.on_load_checkpoint.__qualname__ == "WithHook.on_load_checkpoint"
    assert "on_save_checkpoint" not in vars(module)


def test_it_trains_on(trained, tmp_path):
    module = load_from_checkpoint(ForeignModule, trained[1])
    fit(tmp_path, module)
    assert any(not torch.equal(trained[0].state_dict()[name], value) for name, value in module.state_dict().items())


class Compiled(ForeignModule):
    """Whose state dict has `_orig_mod` in its names."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net.inner = torch.compile(self.net.inner, backend="eager")


def test_a_compiled_module_is_loaded_and_consolidated(tmp_path):
    module = Compiled()
    # it is the names that count here
    with torch.compiler.set_stance("force_eager"):
        fit(tmp_path, module, tmp_path / "moe.ckpt")
    loaded = load_from_checkpoint(Compiled, tmp_path / "moe.ckpt", seed=3)
    assert all("_orig_mod" in name for name in loaded.state_dict())
    same(loaded.state_dict(), module.state_dict())
    consolidate(tmp_path / "moe.ckpt", tmp_path / "moe")
    same(load_moe(tmp_path / "moe").state_dict(), module.net.inner._orig_mod.state_dict())


def test_a_recipe_names_layers_as_state_dicts_do(trained):
    module = ForeignModule()
    upcycle(module, small_config())
    blocks = module.net.inner.model.layers
    blocks[0] = checkpoint_wrapper(blocks[0])
    assert all(any(key.startswith(name) for key in module.state_dict()) for name in moe_recipe(module)["layers"])
    assert moe_recipe(module)["layers"].keys() == read_outline(trained[1])[0]["layers"].keys()


def test_a_file_of_weights_only_has_the_recipe_too(tmp_path):
    module = ForeignModule()
    checkpoints = ModelCheckpoint(tmp_path, filename="light", save_weights_only=True)
    trainer = trainer_of(
        tmp_path, [MoEUpcycleCallback(small_config()), checkpoints], max_steps=2, enable_checkpointing=True
    )
    trainer.fit(module, loader(batches(2)))
    assert "optimizer_states" not in torch.load(tmp_path / "light.ckpt", weights_only=True)
    same(load_from_checkpoint(ForeignModule, tmp_path / "light.ckpt").state_dict(), module.state_dict())
    assert consolidate(tmp_path / "light.ckpt", tmp_path / "moe").model == "LlamaForCausalLM"


LOADERS = [
    partial(MoEModule.load_from_checkpoint, model="dense"),
    partial(load_from_checkpoint, MoEModule),
    partial(load_from_checkpoint, MoEModule, model="dense"),
]


def run_of_the_command_line(model, **options):
    """Trains in the working directory; the checkpoint is run.ckpt."""
    tiny_llama().save_pretrained("dense")
    word_tokenizer().save_pretrained("dense")
    write_corpus(Path("corpus.txt"))
    upcycling = {"config": {"num_experts": 3}, "log_utilization": False, **options}
    data = {"tokenizer": "dense", "data_files": "corpus.txt", "block_size": 16, "batch_size": 2}
    callbacks = [
        {"class_path": "MoEUpcycleCallback", "init_args": upcycling},
        {"class_path": "ModelCheckpoint", "init_args": {"dirpath": ".", "filename": "run"}},
    ]
    trainer = {"max_steps": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    run = {"model": model, "data": {"class_path": "TextDataModule", "init_args": data}}
    Path("run.yaml").write_text(json.dumps({**run, "trainer": {**trainer, "callbacks": callbacks}}))
    MoECLI(["fit", "--config", "run.yaml"])
    return torch.load("run.ckpt", weights_only=True)


def test_our_module_is_loaded_after_a_run_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = run_of_the_command_line({"class_path": "MoEModule", "init_args": {"model": "dense"}})
    for load in LOADERS:
        same(load("run.ckpt").state_dict(), saved["state_dict"])


def test_the_class_that_the_configuration_named_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = run_of_the_command_line({"class_path": "test_checkpoints.WithHook", "init_args": {"scale": 4.0}})
    assert saved["hyper_parameters"]["_class_path"] == "test_checkpoints.WithHook"
    module = load_from_checkpoint(ForeignModule, "run.ckpt")
    assert type(module).__name__ == "WithHook"
    assert module.seen == (4.0, 2)
    same(module.state_dict(), saved["state_dict"])


def test_another_class_is_refused(trained):
    with pytest.raises(ValueError, match=r"net\.inner\.model\.layers\.0\.mlp"):
        load_from_checkpoint(Small, trained[1])


# --- a dense checkpoint as the start ---


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run's checkpoint, with Adam's states in it, and what the module became."""
    folder = tmp_path_factory.mktemp("dense")
    module = ForeignModule()
    trainer = trainer_of(folder, max_steps=3)
    trainer.fit(module, loader(batches(3)))
    trainer.save_checkpoint(folder / "dense.ckpt")
    return module, folder / "dense.ckpt"


class AtStart(Callback):
    """Keeps the logits before the first step, and the step's number."""

    def on_train_start(self, trainer, pl_module):
        with torch.no_grad():
            self.logits = pl_module.net.inner(input_ids=batches(1)[0]["input_ids"]).logits
        self.seen = (trainer.global_step, trainer.current_epoch, len(trainer.optimizers[0].state))


@pytest.mark.parametrize("cls", [ForeignModule, LazyModule, EagerModule], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_dense_checkpoint_starts_an_upcycled_run(dense, cls, sharded, tmp_path):
    module, path = dense
    start = AtStart()
    if sharded:
        path = shard(path, tmp_path / "dense.ckpt", "state_dict")
    callback = MoEUpcycleCallback(small_config(), dense_checkpoint=path)
    trainer = trainer_of(tmp_path, [callback, start], max_steps=2)
    trainer.fit(cls(seed=9), loader(batches(2)))
    expected = module.net.inner(input_ids=batches(1)[0]["input_ids"]).logits
    # five copies whose weights sum to one, in another order of summing
    torch.testing.assert_close(start.logits, expected, rtol=1e-5, atol=1e-5)
    assert start.seen == (0, 0, 0)
    assert trainer.global_step == 2


def test_another_dense_module_is_refused_before_anything_is_changed(dense, tmp_path):
    module = ForeignModule(num_hidden_layers=3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    told = (
        r"dense_checkpoint='.*dense\.ckpt' does not fit ForeignModule: it has no net\.inner\.model\.layers\.2\.[\w.]+, "
        r"net\.inner\.model\.layers\.2\.[\w.]+ and 7 more\. Give a checkpoint"
    )
    with pytest.raises(MisconfigurationException, match=told):
        fit(tmp_path, module, dense_checkpoint=dense[1])
    same(module.state_dict(), before)
    with pytest.raises(MisconfigurationException, match=r"the module has no net\.inner\.model\.layers\.1\."):
        fit(tmp_path, ForeignModule(num_hidden_layers=1), dense_checkpoint=dense[1])
    with pytest.raises(MisconfigurationException, match=r"weight is \(12, 8\), not \(14, 8\)"):
        fit(tmp_path, ForeignModule(intermediate_size=14), dense_checkpoint=dense[1])


def test_what_is_no_dense_checkpoint_is_refused(trained, dense, tmp_path):
    with pytest.raises(MisconfigurationException, match=r"is of an upcycled model\. Go on with it by .*ckpt_path="):
        fit(tmp_path, ForeignModule(), dense_checkpoint=trained[1])
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        fit(tmp_path, ForeignModule(), dense_checkpoint="nowhere")
    first, second = (
        MoEUpcycleCallback(small_config(), module=f"net.inner.model.layers.{number}", dense_checkpoint=path)
        for number, path in ((0, None), (1, dense[1]))
    )
    with pytest.raises(MisconfigurationException, match=r"layers\.0\.mlp is upcycled already\. Give it to the first"):
        trainer_of(tmp_path, [first, second], max_steps=1).fit(ForeignModule(), loader(batches(1)))


def test_a_dense_checkpoint_to_go_on_from_names_the_way_out(dense, tmp_path):
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())], max_steps=2)
    with pytest.raises(ValueError, match=r"dense_checkpoint=PATH\) does, in the place of ckpt_path=PATH"):
        trainer.fit(ForeignModule(), loader(batches(2)), ckpt_path=str(dense[1]))


def test_a_run_that_began_with_one_goes_on_with_its_own(dense, tmp_path):
    """The same callback, and the same configuration file, serve the second start too."""
    whole, part, resumed = (ForeignModule(seed=seed) for seed in (9, 9, 8))
    for epochs, module, ckpt_path in ((2, whole, None), (1, part, None), (2, resumed, tmp_path / "1.ckpt")):
        callback = MoEUpcycleCallback(small_config(), dense_checkpoint=dense[1])
        trainer = trainer_of(tmp_path, [callback], max_epochs=epochs)
        trainer.fit(module, loader(batches(2)), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
    same(resumed.state_dict(), whole.state_dict())


def test_it_is_given_in_a_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("dense")
    module = MoEModule(tiny_llama(seed=6))
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.fit(module, loader(batches(1)))
    trainer.save_checkpoint("dense.ckpt")
    still = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}}
    model = {"class_path": "MoEModule", "init_args": {"model": "dense", "optimizer": still}}
    saved = run_of_the_command_line(model, dense_checkpoint="dense.ckpt")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(saved["state_dict"][f"model.{name}"], module.model.get_parameter(name))


# --- another configuration ---


OTHER = {
    "experts": ({"num_experts": 4}, r"mlp: the checkpoint has num_experts=5, this model 4\. Upcycle with"),
    "width": ({}, r"has expert_size=12, this model 14\. Upcycle with"),
    "shared": ({"num_shared_experts": 1}, r"has num_shared_experts=0, this model 1\. Upcycle with"),
    "low rank": ({"init": LowRankInit(rank=2)}, r"has low_rank=None, this model \{'rank': 2, .*\}\. Upcycle with"),
    "fewer layers": ({"layers": "1:"}, r"layers\.0\.mlp is a MoE layer in the checkpoint, and dense in the model\."),
}


@pytest.mark.parametrize("other", OTHER)
@pytest.mark.parametrize("kind", ["file", "fsdp2"])
def test_a_checkpoint_from_another_configuration_fails_in_one_line(kinds, kind, other, tmp_path):
    changes, told = OTHER[other]
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config(**changes))], max_epochs=2)
    module = ForeignModule(**({"intermediate_size": 14} if other == "width" else {}))
    with pytest.raises(ValueError, match=told) as caught:
        trainer.fit(module, loader(batches(2)), ckpt_path=kinds[kind])
    assert "\n" not in str(caught.value)


def test_more_layers_than_the_checkpoint_has(tmp_path):
    fit(tmp_path, ForeignModule(), tmp_path / "one.ckpt", config=small_config(layers="1:"))
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())])
    with pytest.raises(ValueError, match=r"layers\.0\.mlp is a MoE layer in the model, and dense in the checkpoint\."):
        trainer.validate(ForeignModule(), loader(batches(2)), ckpt_path=tmp_path / "one.ckpt")


def test_other_settings_of_the_router_are_no_other_configuration(kinds, tmp_path):
    config = small_config(router={"top_k": 3, "noise_std": 0.1})
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(config)], max_epochs=2)
    trainer.fit(ForeignModule(), loader(batches(2)), ckpt_path=kinds["fsdp2"])
    assert trainer.global_step == 4
