"""MoEModule: any Hugging Face model that returns a loss."""

import functools

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning_fixtures import VOCABULARY, batches, loader, small_config, tiny_llama, trainer_of
from transformers import LlamaConfig, LlamaModel

from lightning_moe import MoEModule, MoEUpcycleCallback, moe_layers, save_moe, upcycle

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def logits_of(module, batch):
    module.eval()
    with torch.no_grad():
        return module(input_ids=batch["input_ids"]).logits


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(folder)
    return str(folder)


class Domains(LightningDataModule):
    """Several validation loaders of different length, with or without names."""

    def __init__(self, *sizes, names=None):
        super().__init__()
        self.made = [batches(size, seed=size) for size in sizes]
        if names:
            self.val_names = names

    def val_dataloader(self):
        return [loader(made) for made in self.made]

    def test_dataloader(self):
        return self.val_dataloader()


def test_a_path_and_an_object_are_the_same_model(path):
    (batch,) = batches(1)
    assert logits_of(MoEModule(path), batch).equal(logits_of(MoEModule(tiny_llama()), batch))


def test_a_loaded_model_is_in_training_mode(path):
    assert all(module.training for module in MoEModule(path).modules())


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_model_dtype(path, dtype, expected):
    assert {p.dtype for p in MoEModule(path, model_dtype=dtype).parameters()} == {expected}


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_model_dtype_of_a_directory_of_save_moe(dtype, expected, tmp_path):
    model = tiny_llama()
    upcycle(model, small_config())
    save_moe(model, tmp_path / "moe")
    assert {p.dtype for p in MoEModule(str(tmp_path / "moe"), model_dtype=dtype).parameters()} == {expected}
    with pytest.raises(ValueError, match=r"dtype='float33': torch has no such dtype"):
        MoEModule(str(tmp_path / "moe"), model_dtype="float33")


def test_a_directory_of_save_moe(tmp_path):
    model = tiny_llama()
    upcycle(model, small_config())
    save_moe(model, tmp_path / "moe")
    module = MoEModule(str(tmp_path / "moe"))
    assert len(moe_layers(module)) == 2
    assert module.model.training
    (batch,) = batches(1)
    assert logits_of(module, batch).equal(logits_of(MoEModule(model), batch))


@pytest.mark.parametrize("name", ["./no/such", "/no/such", "~/no/such", "no/such/model"])
def test_a_missing_path_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"model='{name}'.*does not exist"):
        MoEModule(name)


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("cannot connect\nand more")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    with pytest.raises(ValueError, match=r"model='some/name' is no directory.*\(cannot connect\).*HF_HUB_OFFLINE"):
        MoEModule("some/name")


def test_an_unknown_auto_class(path):
    with pytest.raises(ValueError, match="auto_class='AutoModelForCausality'"):
        MoEModule(path, auto_class="AutoModelForCausality")


def test_batches_without_labels_are_named():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM returned no loss for a batch with input_ids.*`labels`"):
        MoEModule(tiny_llama()).training_step({"input_ids": torch.zeros(1, 3, dtype=torch.int64)}, 0)


def test_a_model_without_a_loss_is_named():
    config = LlamaConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=11)
    with pytest.raises(ValueError, match="LlamaModel returned no loss"):
        MoEModule(LlamaModel(config)).training_step({"input_ids": torch.zeros(1, 3, dtype=torch.int64)}, 0)


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize(("names", "expected"), [(["prose", "code"], ["prose", "code"]), (None, ["0", "1"])])
def test_the_mean_of_each_loader_and_of_all(tmp_path, stage, names, expected):
    data, module = Domains(1, 3, names=names), MoEModule(tiny_llama())
    trainer = trainer_of(tmp_path)
    getattr(trainer, stage)(module, datamodule=data, verbose=False)
    module.eval()
    with torch.no_grad():
        means = [sum(float(module(**batch).loss) for batch in made) / len(made) for made in data.made]
    prefix = {"validate": "val", "test": "test"}[stage]
    wanted = {f"{prefix}_loss/{name}": mean for name, mean in zip(expected, means, strict=True)}
    wanted[f"{prefix}_loss"] = sum(means) / 2
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    # float32 means in another order
    assert found == pytest.approx(wanted, rel=1e-6)


def test_one_loader_has_no_name_of_its_own_and_every_validation_starts_anew(tmp_path):
    module, trainer = MoEModule(tiny_llama()), trainer_of(tmp_path)
    (first,) = trainer.validate(module, datamodule=Domains(2, names=["prose"]), verbose=False)
    assert list(first) == ["val_loss"]
    (second,) = trainer.validate(module, datamodule=Domains(3), verbose=False)
    (third,) = trainer.validate(module, datamodule=Domains(2, names=["prose"]), verbose=False)
    assert third == first != second


def test_a_last_smaller_batch_weighs_less(tmp_path):
    data = [*batches(1, batch_size=3), *batches(1, batch_size=1, seed=2)]
    module = MoEModule(tiny_llama())
    (found,) = trainer_of(tmp_path).validate(module, loader(data), verbose=False)
    with torch.no_grad():
        large, small = (float(module.eval()(**batch).loss) for batch in data)
    assert found["val_loss"] == pytest.approx((3 * large + small) / 4, rel=1e-6)


def test_predict_gives_the_most_probable_tokens(tmp_path):
    data = batches(2)
    module = MoEModule(tiny_llama())
    found = trainer_of(tmp_path).predict(module, loader(data))
    for batch, tokens in zip(data, found, strict=True):
        assert tokens.equal(logits_of(module, batch).argmax(-1))
        assert tokens.max() < VOCABULARY


def test_the_optimizer_holds_what_trains(tmp_path):
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    module = MoEModule(model, optimizer=SGD)
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())])
    trainer.fit(module, loader(batches(1)))
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}


def test_the_default_optimizer(tmp_path):
    optimizer = MoEModule(tiny_llama()).configure_optimizers()
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-4, 0.01)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_scheduler_steps_with_the_optimizer(tmp_path, accumulation):
    module = MoEModule(
        tiny_llama(), optimizer=SGD, lr_scheduler=functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    )
    trainer = trainer_of(tmp_path, accumulate_grad_batches=accumulation)
    trainer.fit(module, loader(batches(4)))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 ** (4 // accumulation))


def test_gradient_checkpointing_recomputes(tmp_path):
    plain, checkpointed = (
        MoEModule(tiny_llama(), optimizer=SGD),
        MoEModule(tiny_llama(), optimizer=SGD, gradient_checkpointing=True),
    )
    calls = []
    checkpointed.model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(None))
    for module in (plain, checkpointed):
        trainer_of(tmp_path, [MoEUpcycleCallback(small_config())]).fit(module, loader(batches(2)))
    assert len(calls) == 4
    for name, value in plain.state_dict().items():
        assert checkpointed.state_dict()[name].equal(value), name


def test_the_default_optimizer_is_clipped_under_autocast(tmp_path):
    # it is fused, which Lightning does not clip where a loss scaler might be
    module = MoEModule(tiny_llama())
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())], precision="bf16-mixed", gradient_clip_val=0.1)
    trainer.fit(module, loader(batches(1)))
    assert trainer.global_step == 1
    norms = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None])
    assert norms.norm() == pytest.approx(0.1, rel=1e-4)


def test_load_from_checkpoint_of_an_upcycled_run_needs_no_callback(tmp_path, path):
    module = MoEModule(path, optimizer=SGD)
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config(router={"top_k": 3}, layers=[1]))])
    trainer.fit(module, loader(batches(2)))
    trainer.save_checkpoint(tmp_path / "moe.ckpt")
    loaded = MoEModule.load_from_checkpoint(tmp_path / "moe.ckpt", model=path)
    assert list(moe_layers(loaded)) == ["model.model.layers.1.mlp"]
    assert moe_layers(loaded)["model.model.layers.1.mlp"].router.top_k == 3
    (batch,) = batches(1, padding=True)
    assert logits_of(loaded, batch).equal(logits_of(module, batch))


def test_load_from_checkpoint_of_a_dense_run(tmp_path, path):
    trainer = trainer_of(tmp_path)
    module = MoEModule(path, optimizer=SGD)
    trainer.fit(module, loader(batches(1)))
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    loaded = MoEModule.load_from_checkpoint(tmp_path / "dense.ckpt", model=path)
    assert not moe_layers(loaded)
    (batch,) = batches(1)
    assert logits_of(loaded, batch).equal(logits_of(module, batch))


def test_a_trainer_resumes_an_upcycled_checkpoint_without_the_callback(tmp_path, path):
    """The checkpoint's recipe upcycles the module before the optimizer is made."""
    module = MoEModule(path, optimizer=SGD)
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config(), balance_losses=False)])
    trainer.fit(module, loader(batches(2)))
    trainer.save_checkpoint(tmp_path / "moe.ckpt")
    resumed = MoEModule(path, optimizer=SGD)
    again = trainer_of(tmp_path, max_epochs=2)
    again.fit(resumed, loader(batches(2)), ckpt_path=str(tmp_path / "moe.ckpt"))
    held = {id(p) for group in again.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in resumed.parameters()}
    assert not logits_of(resumed, batches(1)[0]).equal(logits_of(module, batches(1)[0]))
