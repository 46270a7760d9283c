"""The command line: a YAML file and overrides, any module and router, errors that say what was meant."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule
from lightning_fixtures import (
    ForeignModule,
    batches,
    loader,
    logged,
    run_command,
    tiny_llama,
    word_tokenizer,
    write_corpus,
)

from lightning_moe import CopyInit, MoEModule, TextDataModule, TopKRouter, moe_layers
from lightning_moe.cli import MoECLI, lightning_main, main

LAYERS = ["model.model.layers.0.mlp", "model.model.layers.1.mlp"]


class Watch(Callback):
    """What the optimizer holds when training begins, and what has moved at its end."""

    def on_train_start(self, trainer, pl_module):
        held = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        own = {id(p): name for name, p in pl_module.named_parameters()}
        self.optimized = {own[id(p)] for p in held if id(p) in own}
        self.stale = sum(id(p) not in own for p in held)
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_end(self, trainer, pl_module):
        self.moved = {name for name, p in pl_module.named_parameters() if not p.equal(self.before[name])}


class OwnModule(ForeignModule):
    """A user's module with its own data and options."""

    def __init__(self, width: int = 12, lr: float = 1e-2) -> None:
        super().__init__(lr, intermediate_size=width)
        self.width = width

    def train_dataloader(self):
        return loader(batches(2))


class OwnRouter(TopKRouter):
    """A user's router."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def config(tmp_path, model_path):
    """What a user's run.yaml holds."""
    data = {"tokenizer": str(model_path), "data_files": str(write_corpus(tmp_path / "corpus.txt"))}
    data |= {
        "block_size": 16,
        "batch_size": 3,
        "val_fraction": 0.1,
        "num_proc": 1,
        "cache_dir": str(tmp_path / "cache"),
    }
    upcycling = {"num_experts": 4, "router": {"class_path": "TopKRouter", "init_args": {"top_k": 2}}}
    trainer = {"accelerator": "cpu", "devices": 1, "max_steps": 3, "log_every_n_steps": 1}
    trainer |= {"default_root_dir": str(tmp_path), "enable_progress_bar": False, "enable_model_summary": False}
    trainer |= {"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "logs"}}}
    trainer |= {"callbacks": [{"class_path": "MoEUpcycleCallback", "init_args": {"config": upcycling}}]}
    return {
        "model": {"class_path": "MoEModule", "init_args": {"model": str(model_path)}},
        "data": {"class_path": "TextDataModule", "init_args": data},
        "trainer": trainer,
    }


@pytest.fixture
def cli(tmp_path, config):
    """Runs the program on the configuration, changed by a function; returns the MoECLI."""

    def run(verb, *arguments, change=lambda config: None, watch=None):
        changed = copy.deepcopy(config)
        change(changed)
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(changed))
        defaults = {"callbacks": [watch]} if watch else None
        return MoECLI(args=[verb, "--config", str(path), *map(str, arguments)], trainer_defaults=defaults)

    return run


def test_fit_then_validate_its_checkpoint(cli, tmp_path):
    done = cli("fit")
    assert list(moe_layers(done.model)) == LAYERS
    assert done.trainer.global_step == 3
    path = done.trainer.checkpoint_callback.best_model_path
    steps = logged(done.trainer.logger.log_dir)
    assert all("moe/max_violation" in values for values in steps.values())
    assert len(steps) == 3
    validated = cli("validate", "--ckpt_path", path)
    batch = next(iter(done.datamodule.val_dataloader()[0]))
    # the small corpus makes one validation batch
    with torch.no_grad():
        expected = float(done.model.eval()(**batch).loss)
    assert float(validated.trainer.callback_metrics["val_loss"]) == pytest.approx(expected, rel=1e-6)
    assert list(moe_layers(validated.model)) == LAYERS


class EveryStage(TextDataModule):
    """Tests and predicts on the validation data too."""

    def test_dataloader(self):
        return self.val_dataloader()

    def predict_dataloader(self):
        return self.val_dataloader()


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_test_and_predict(cli, verb):
    def change(config):
        config["data"]["class_path"] = "test_cli.EveryStage"

    path = cli("fit", change=change).trainer.checkpoint_callback.best_model_path
    done = cli(verb, "--ckpt_path", path, change=change)
    assert list(moe_layers(done.model)) == LAYERS
    if verb == "test":
        assert float(done.trainer.callback_metrics["test_loss"]) > 0
    else:
        (tokens,) = done.trainer.predict_loop.predictions
        (batch,) = done.datamodule.val_dataloader()[0]
        with torch.no_grad():
            assert tokens.equal(done.model.eval()(input_ids=batch["input_ids"]).logits.argmax(-1))


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_a_datamodule_without_these_loaders_is_named(cli, verb):
    """TextDataModule has training and validation data only: Lightning says what is missing."""
    with pytest.raises(SystemExit, match=f"{verb}_dataloader"):
        cli(verb)


def test_overrides_win_over_the_file(cli):
    done = cli(
        "fit",
        "--trainer.max_steps",
        1,
        "--data.init_args.batch_size",
        2,
        "--model.init_args.gradient_checkpointing",
        "true",
    )
    assert done.trainer.global_step == 1
    assert done.datamodule.batch_size == 2
    assert done.model.gradient_checkpointing


def test_all_that_the_callback_takes_can_be_written_in_yaml(cli):
    def change(config):
        options = config["trainer"]["callbacks"][0]["init_args"]
        options["config"] |= {"layers": "1::2", "seed": 4, "init": {"class_path": "CopyInit"}}
        options["config"]["router"]["init_args"] = {"top_k": 1, "normalize": False, "noise_std": 0.1}
        options["balance_losses"] = [{"class_path": "ZLoss", "init_args": {"coefficient": 0.5}}]
        own = {"class_path": "ExpertUtilizationCallback", "init_args": {"per_layer": False}}
        config["trainer"]["callbacks"].append(own)

    done = cli("fit", change=change)
    ((name, layer),) = moe_layers(done.model).items()
    assert name == LAYERS[1]
    assert (layer.router.top_k, layer.router.normalize, layer.router.noise_std) == (1, False, 0.1)
    values = set().union(*logged(done.trainer.logger.log_dir).values())
    assert "moe/z_loss" in values
    assert "moe/load_balancing_loss" not in values
    assert not any(key.startswith("moe_") for key in values)


@pytest.mark.parametrize("schedule", [False, True])
def test_the_programs_optimizer_trains_every_expert_and_router(cli, schedule):
    """LightningCLI makes it before the upcycling, over the dense parameters."""
    watch = Watch()
    # by its path: bitsandbytes, which another test may have imported, has an AdamW too
    arguments = ["--optimizer", "torch.optim.AdamW", "--optimizer.lr", "0.01"]
    if schedule:
        arguments += ["--lr_scheduler", "CosineAnnealingLR", "--lr_scheduler.T_max", "10"]
    with pytest.warns(UserWarning, match="will be overridden"):
        done = cli("fit", *arguments, watch=watch)
    (optimizer,) = done.trainer.optimizers
    assert optimizer.defaults["lr"] == 0.01
    expected = {
        f"{layer}.{key}" for layer in LAYERS for key in ("router.gate", "experts.gate_up_proj", "experts.down_proj")
    }
    assert watch.stale == 0
    assert watch.optimized == {name for name, _ in done.model.named_parameters()}
    assert expected <= watch.moved
    assert [type(config.scheduler).__name__ for config in done.trainer.lr_scheduler_configs] == (
        ["CosineAnnealingLR"] if schedule else []
    )


def test_the_optimizer_of_the_module_by_class_path(cli):
    def change(config):
        sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.3}}
        config["model"]["init_args"]["optimizer"] = sgd

    (optimizer,) = cli("fit", change=change).trainer.optimizers
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["lr"] == 0.3


def test_own_module_and_own_router(cli):
    def change(config):
        del config["data"]
        config["model"] = {"class_path": "test_cli.OwnModule", "init_args": {"width": 16}}
        config["trainer"]["callbacks"][0]["init_args"]["config"]["router"]["class_path"] = "test_cli.OwnRouter"

    done = cli("fit", change=change)
    assert isinstance(done.model, LightningModule)
    assert not isinstance(done.model, MoEModule)
    assert done.model.width == 16
    assert [type(layer.router).__name__ for layer in moe_layers(done.model).values()] == ["OwnRouter"] * 2


def test_print_config_holds_what_was_given_and_the_defaults(cli, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli("fit", "--trainer.max_steps", 5, "--print_config")
    assert stopped.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_steps"] == 5
    assert printed["seed_everything"] == 0
    callback = printed["trainer"]["callbacks"][0]["init_args"]
    assert callback["config"]["num_experts"] == 4
    assert callback["log_utilization"] is True


@pytest.mark.filterwarnings("error:.*Unable to serialize instance.*")
def test_the_saved_configuration_runs_again(cli, tmp_path):
    first = cli("fit")
    saved = tmp_path / "saved.yaml"
    saved.write_text((tmp_path / "logs" / "version_0" / "config.yaml").read_text())
    again = MoECLI(args=["fit", "--config", str(saved)])
    assert all(again.model.state_dict()[name].equal(value) for name, value in first.model.state_dict().items())


# Errors


def explained(cli, capsys, *arguments, change=lambda config: None):
    """What the program writes before it ends with code 2."""
    with pytest.raises(SystemExit) as stopped:
        cli("fit", *arguments, change=change)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    return message[message.index("error:") :]


def rename(*path, old, new):
    """A change that misspells one key."""

    def change(config):
        for part in path:
            config = config[part]
        config[new] = config.pop(old)

    return change


def callback_typo(config):
    config["trainer"]["callbacks"][0]["class_path"] = "MoEUpcycleCalback"


def router_typo(config):
    config["trainer"]["callbacks"][0]["init_args"]["config"]["router"]["class_path"] = "TopkRouter"


def model_typo(config):
    config["model"]["class_path"] = "MoEModul"


CALLBACK = ("trainer", "callbacks", 0, "init_args")
TYPOS = {
    "key of the trainer": (rename("trainer", old="max_steps", new="max_stpes"), "max_stpes", "max_steps"),
    "key of the config": (
        rename(*CALLBACK, "config", old="num_experts", new="num_expert"),
        "num_expert",
        "num_experts",
    ),
    "key of the router": (rename(*CALLBACK, "config", "router", "init_args", old="top_k", new="topk"), "topk", "top_k"),
    "key of the data": (rename("data", "init_args", old="data_files", new="data_file"), "data_file", "data_files"),
    "router": (router_typo, "TopkRouter", "TopKRouter"),
    "callback": (callback_typo, "MoEUpcycleCalback", "MoEUpcycleCallback"),
    "model": (model_typo, "MoEModul", "MoEModule"),
}


@pytest.mark.parametrize("name", TYPOS)
def test_typos_are_answered_with_the_nearest_name(cli, capsys, name):
    change, wrong, right = TYPOS[name]
    message = explained(cli, capsys, change=change)
    assert wrong in message
    assert f"Did you mean {right!r}?" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("name", TYPOS)
def test_typos_are_answered_briefly(cli, capsys, name):
    assert len(explained(cli, capsys, change=TYPOS[name][0]).splitlines()) <= 8


INIT = "trainer.callbacks.config.init"
CONFIG = [*CALLBACK, "config"]


def setting(*path, **values):
    """A change that sets keys at one place."""

    def change(config):
        for part in path:
            config = config[part]
        config.update(copy.deepcopy(values))

    return change


def of(class_path, **init_args):
    return {"class_path": class_path, "init_args": init_args}


MISPLACED = {
    "key of another class, like one here": (
        setting(*CONFIG, init=of("DropInit", rate=0.5)),
        [f"{INIT}: Option 'rate'", "Did you mean 'ratio'?"],
    ),
    "initialiser of the router": (
        setting(*CONFIG, init=of("KMeansRouterInit")),
        [f"{INIT}: ", "'KMeansRouterInit' belongs under 'router_init'", "Known here: CopyInit, NoiseInit"],
    ),
    "initialiser of the router, by its path": (
        setting(*CONFIG, init=of("lightning_moe.KMeansRouterInit")),
        [f"{INIT}: ", "'KMeansRouterInit' belongs under 'router_init'"],
    ),
    "loss as initialiser": (
        setting(*CONFIG, init="ZLoss"),
        ["'ZLoss' belongs under 'MoEUpcycleCallback.balance_losses'"],
    ),
    "initialiser as router": (setting(*CONFIG, router=of("DropInit")), ["'DropInit' belongs under 'init'"]),
    "key from around the config": (
        setting(*CONFIG, calibration=2),
        ["trainer.callbacks: Group 'config'", "Did you mean 'calibration', outside 'config'?"],
    ),
    "key of the config beside it": (setting(*CALLBACK, num_experts=4), ["Did you mean 'config.num_experts'?"]),
    "key of the router in the config": (
        setting(*CONFIG, top_k=4),
        ["'top_k' belongs to TopKRouter and others, under 'router'", "Known here: num_experts, router, init"],
    ),
    "key of the config in the trainer": (
        setting("trainer", num_experts=4),
        ["'num_experts' belongs to UpcycleConfig, under 'MoEUpcycleCallback.config'"],
    ),
    "key of the data in the model": (
        setting("model", "init_args", data_files="corpus.txt"),
        ["model: Option 'data_files'", "'data_files' belongs to TextDataModule, under 'data'", "Known here: model,"],
    ),
    "key of the trainer beside it": (setting(max_steps=1), ["Did you mean 'trainer.max_steps'?"]),
    "a word from nowhere": (setting(*CONFIG, xyzzy=1), ["Known here: num_experts, router, init"]),
    "a class from nowhere": (setting(*CONFIG, init="Xyzzy"), ["Known here: CopyInit", "as my_package.MyClass"]),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_a_word_in_the_wrong_place_is_sent_to_the_right_one(cli, capsys, name):
    change, parts = MISPLACED[name]
    message = explained(cli, capsys, change=change)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) <= 5


def test_an_option_of_the_config_is_none_of_the_program(cli, capsys):
    message = explained(cli, capsys, "--num_experts", 4)
    assert "'num_experts' belongs to UpcycleConfig, under 'MoEUpcycleCallback.config'" in message
    assert "Did you mean" not in message
    assert "Did you mean 'trainer.max_steps'?" in explained(cli, capsys, "--max_stpes", 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting(*CONFIG, init=of("DropInit", ratio="half")), f"{INIT}.ratio: Expected a float"),
        (setting(*CONFIG, router=of("TopKRouter", top_k="two")), "trainer.callbacks.config.router.top_k: Expected"),
        (setting(*CONFIG, init=of("BranchTrainMixInit")), f"{INIT}: the following arguments are required: models"),
        (setting(*CONFIG, num_experts="many"), "trainer.callbacks.config.num_experts: Expected"),
        (setting(*CONFIG, init=of("BranchTrainMixInit", models=[False])), f"{INIT}.models: Expected one of str"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_with_its_whole_key(cli, capsys, change, message):
    assert message in explained(cli, capsys, change=change)


class PickyInit(CopyInit):
    """A user's initialiser that refuses its arguments."""

    def __init__(self, depth: int = 1) -> None:
        raise ValueError(f"depth={depth}: no.")


class BrokenInit(CopyInit):
    """A user's initialiser with a bug."""

    def __init__(self) -> None:
        list(zip([1], [1, 2], strict=True))


class BrokenLateInit(CopyInit):
    """A user's initialiser with a bug that shows when it is called."""

    def __call__(self, *args, **kwargs):
        list(zip([1], [1, 2], strict=True))


REFUSED = {
    "init": (setting(*CONFIG, init=of("DropInit", ratio=3)), f"{INIT}: ratio=3.0: wanted a number from 0 to 1."),
    "own init": (setting(*CONFIG, init=of("test_cli.PickyInit", depth=4)), f"{INIT}: depth=4: no."),
    "router_init": (
        setting(*CONFIG, router_init=of("NormalRouterInit", std=-1)),
        "trainer.callbacks.config.router_init: std=-1.0: wanted a number > 0.",
    ),
    "router": (
        setting(*CONFIG, router=of("TopKRouter", top_k=9)),
        "trainer.callbacks.config.router: model.model.layers.0.mlp: top_k=9 with num_experts=4",
    ),
    "config": (setting(*CONFIG, num_experts=0), "trainer.callbacks.config: num_experts=0: wanted a whole number"),
    "loss": (
        setting(*CALLBACK, balance_losses=[of("ZLoss", coefficient=-1)]),
        "trainer.callbacks.balance_losses: ZLoss: coefficient=-1.0, wanted >= 0.",
    ),
    "callback": (setting(*CALLBACK, calibration=0), "trainer.callbacks: calibration=0: wanted a number"),
    "data": (setting("data", "init_args", batch_size=0), "data: TextDataModule: batch_size=0; give at least 1."),
    "model": (setting("model", "init_args", model="/no/such"), "model='/no/such': /no/such does not exist."),
    "optimizer": (
        setting("model", "init_args", optimizer=of("torch.optim.AdamW", lr=-1.0)),
        "model.optimizer: Invalid learning rate: -1.0",
    ),
    "layers, at setup": (setting(*CONFIG, layers=[7]), "layers=[7]: 7 matches none of the model's 2 FFNs"),
    "part, at setup": (setting(*CALLBACK, module="head"), "module='head': MoEModule has no such part"),
    "corpus, at setup": (setting("data", "init_args", data_files="/no/such.txt"), "data_files: no file is or matches"),
    "Lightning's": (setting("trainer", devices=0), "trainer: `Trainer(devices=0)` value is not a valid input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_told_in_one_line_with_its_key(cli, name):
    change, message = REFUSED[name]
    with pytest.raises(SystemExit) as stopped:
        cli("fit", change=change)
    assert stopped.value.code.startswith(f"error: {message}")
    assert "\n" not in stopped.value.code


def test_a_single_callback_is_heard_too(cli):
    """The first alternative is a list, and jsonargparse keeps the others' words only."""

    def change(config):
        setting(*CONFIG, init=of("DropInit", ratio=3))(config)
        (config["trainer"]["callbacks"],) = config["trainer"]["callbacks"]

    with pytest.raises(SystemExit, match=r"^error: ratio=3\.0: wanted a number from 0 to 1\.$"):
        cli("fit", change=change)


@pytest.mark.parametrize("name", ["BrokenInit", "BrokenLateInit"])
def test_a_bug_keeps_its_traceback(cli, name):
    """Also where it is a ValueError, which we raise on purpose elsewhere."""
    with pytest.raises(ValueError, match="argument 2 is longer"):
        cli("fit", change=setting(*CONFIG, init=of(f"test_cli.{name}")))


def test_a_traceback_can_be_asked_for(cli, monkeypatch):
    monkeypatch.setenv("LIGHTNING_MOE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="matches none of the model's 2 FFNs"):
        cli("fit", change=setting(*CONFIG, layers=[7]))
    with pytest.raises(Exception, match="not accepted"):
        cli("fit", change=setting(*CONFIG, init=of("DropInit", rate=1)))


def test_the_command_shows_no_traceback(config, tmp_path):
    setting(*CONFIG, layers=[7])(config)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, *COMMANDS["module"], "fit", "--config", str(tmp_path / "run.yaml")]
    done = run_command(command, timeout=120, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: layers=[7]: 7 matches none")


def test_an_unknown_verb_names_the_known(capsys):
    with pytest.raises(SystemExit):
        main(["fti"])
    message = capsys.readouterr().err
    assert "fti" in message
    assert "fit" in message.replace("fti", "")


def test_a_missing_configuration_file_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "no_such.yaml"])
    assert "no_such.yaml" in capsys.readouterr().err


def test_a_missing_model_path_is_named(cli):
    with pytest.raises(SystemExit, match=r"^error: model='/no/such/model': .* does not exist\. Give a model directory"):
        cli("fit", "--model.init_args.model", "/no/such/model")


def test_an_empty_corpus_is_named(cli, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(SystemExit, match="data_files: holds no text"):
        cli("fit", "--data.init_args.data_files", tmp_path / "empty.txt")


# The commands


FAKE_SDK = """
import sys

def main_cli():
    print("sdk", *sys.argv[1:])
"""


@pytest.fixture
def fake_sdk(tmp_path):
    package = tmp_path / "sdk" / "lightning_sdk" / "cli"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "entrypoint.py").write_text(FAKE_SDK)
    return package.parents[1]


@pytest.mark.parametrize("arguments", [["studio", "list"], ["job", "run", "fit"], ["--help"], []])
def test_other_verbs_of_lightning_go_to_the_sdk(fake_sdk, monkeypatch, capsys, arguments):
    monkeypatch.syspath_prepend(fake_sdk)
    monkeypatch.setattr(sys, "argv", ["lightning", *arguments])
    try:
        lightning_main()
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "lightning_sdk"]:
            del sys.modules[name]
    assert capsys.readouterr().out.split() == ["sdk", *arguments]


def test_without_the_sdk_all_verbs_are_ours(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightning_sdk", None)
    monkeypatch.setattr(sys, "argv", ["lightning", "studio"])
    with pytest.raises(SystemExit) as stopped:
        lightning_main()
    assert stopped.value.code == 2
    assert "invalid choice: 'studio'" in capsys.readouterr().err


SCRIPT = "import sys; from lightning_moe.cli import {0}; sys.argv[0] = '{1}'; {0}()"
COMMANDS = {
    "lightning-moe": ["-c", SCRIPT.format("main", "lightning-moe")],
    "module": ["-m", "lightning_moe"],
    "lightning": ["-c", SCRIPT.format("lightning_main", "lightning")],
}


@pytest.mark.slow
def test_the_three_commands_train(config, tmp_path, fake_sdk):
    """`lightning` with the SDK beside it still trains. All at once: each takes seconds to import."""

    def run(name):
        own = {**config, "trainer": {**config["trainer"], "default_root_dir": str(tmp_path / name), "max_steps": 1}}
        own["trainer"]["logger"] = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / name)}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(own))
        command = [sys.executable, *COMMANDS[name], "fit", "--config", str(tmp_path / f"{name}.yaml")]
        environment = {"PYTHONPATH": str(fake_sdk)} if name == "lightning" else {}
        return run_command(command, timeout=120, environment=environment)

    with ThreadPoolExecutor() as pool:
        for name, done in zip(COMMANDS, pool.map(run, COMMANDS), strict=True):
            assert "sdk" not in done.stdout.split()
            assert "Upcycled 2 of 2 FFNs to 4 experts" in done.stdout + done.stderr
            assert list((tmp_path / name).rglob("*.ckpt"))


def test_the_installed_commands_are_these():
    ours = {
        entry.name: entry.value for entry in entry_points(group="console_scripts") if "lightning_moe" in entry.value
    }
    assert ours == {"lightning-moe": "lightning_moe.cli:main", "lightning": "lightning_moe.cli:lightning_main"}
