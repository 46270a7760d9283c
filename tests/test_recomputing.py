"""Activation checkpointing by one argument: less is kept, and the same is trained."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_fixtures import VOCABULARY, ForeignModule, LazyModule, batches, loader, small_config, trainer_of
from torch import nn
from torch.nn import functional as F

from lightning_moe import LoadBalancingLoss, MoEUpcycleCallback, moe_layers


class Block(nn.Module):
    """None of transformers'."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        x = x + torch.tanh(self.mix(x))
        return x + self.ffn(x)


class Plain(LightningModule):
    """A list of blocks, and an FFN that stands alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def training_step(self, batch, batch_idx):
        x = self.embed(batch["input_ids"])
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy((self.head(x) @ self.embed.weight.T).flatten(0, 1), batch["input_ids"].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(tmp_path, kind, watched, **options):
    """The module after a fit, how often `watched` ran, and how many numbers autograd kept in the largest step."""
    module, calls, kept = kind(), [], []
    callback = MoEUpcycleCallback(small_config(), balance_losses=[LoadBalancingLoss(0.3)], **options)
    step = module.training_step

    def counted(batch, batch_idx):
        if not calls:
            watched(module).register_forward_hook(lambda *_: calls.append(None))
        sizes = {}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = step(batch, batch_idx)
        kept.append(sum(sizes.values()))
        return loss

    module.training_step = counted
    trainer = trainer_of(tmp_path, [callback])
    trainer.fit(module, loader(batches(3)))
    return module, len(calls), max(kept), trainer


CASES = {
    "hugging face": (ForeignModule, lambda module: module.net.inner.model.layers[0].self_attn),
    "built late": (LazyModule, lambda module: module.net.inner.model.layers[0].self_attn),
    "blocks of somebody": (Plain, lambda module: module.get_submodule(_path(module, "blocks.1.mix"))),
    "alone": (Plain, lambda module: module.get_submodule(_path(module, "head.router"))),
}


def _path(module, ending):
    plain = {name.replace("._checkpoint_wrapped_module", ""): name for name, _ in module.named_modules()}
    return plain[ending]


@pytest.mark.parametrize("case", CASES)
def test_it_recomputes_and_trains_the_same(tmp_path, case):
    kind, watched = CASES[case]
    plain, once, much, _ = trained(tmp_path, kind, watched)
    module, twice, little, _ = trained(tmp_path, kind, watched, activation_checkpointing=True)
    # three batches; each forward once more in the backward
    assert (once, twice) == (3, 6)
    assert little < 0.7 * much
    state = module.state_dict()
    assert list(state) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert state[name].equal(value), name
    assert list(moe_layers(module)) == list(moe_layers(plain))


def test_in_half_precision_what_is_repeated_has_the_same_dtypes(tmp_path):
    # Lightning's default dtype is bfloat16 in the forward, and float32 again in the backward
    states = []
    for recomputed in (False, True):
        callback = MoEUpcycleCallback(small_config(), activation_checkpointing=recomputed)
        module = ForeignModule()
        trainer_of(tmp_path, [callback], precision="bf16-true").fit(module, loader(batches(3)))
        states.append(module.state_dict())
    for name, value in states[0].items():
        assert value.dtype == torch.bfloat16
        assert states[1][name].equal(value), name


def test_the_module_is_as_it_was_after_the_fit(tmp_path):
    module, _, _, trainer = trained(tmp_path, *CASES["hugging face"], activation_checkpointing=True)
    assert not module.net.inner.is_gradient_checkpointing
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert list(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]) == list(module.state_dict())


def test_what_the_user_switched_on_stays_on(tmp_path):
    module = ForeignModule()
    module.net.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    trainer_of(tmp_path, [MoEUpcycleCallback(small_config(), activation_checkpointing=True)]).fit(
        module, loader(batches(1))
    )
    assert module.net.inner.is_gradient_checkpointing


def test_blocks_in_evaluation_mode_are_refused(tmp_path):
    # transformers would keep all activations, and say nothing
    module = ForeignModule()
    module.net.inner.eval()
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config(), activation_checkpointing=True)])
    with pytest.raises(MisconfigurationException, match=r"layers\.0 is in evaluation mode.*Call \.train\(\)"):
        trainer.fit(module, loader(batches(1)))
    assert not module.net.inner.is_gradient_checkpointing
