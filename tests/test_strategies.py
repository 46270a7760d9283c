"""Sharded training: two gloo processes train what one does, and go on where they stopped."""

import pickle

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_fixtures import ForeignModule, run_script, small_config, trainer_of
from strategy_fixtures import Descending, callback, share
from torch import nn

from lightning_moe import upcycle
from lightning_moe.strategies import _check_sharded, _units

TWO_RANKS = """
import os, pickle, sys
import torch
import torch.distributed as dist
from lightning_fixtures import trainer_of
from strategy_fixtures import Descending, callback, share
from torch.distributed.tensor import DTensor

from lightning_moe import MoEFSDP2Strategy

torch.set_num_threads(1)
folder = sys.argv[1]


def fit(strategy, epochs=1, ckpt_path=None, clip=None):
    trainer = trainer_of(
        folder, [callback()], strategy=strategy, devices=2, use_distributed_sampler=False, max_epochs=epochs,
        gradient_clip_val=clip,
    )
    module = Descending()
    trainer.fit(module, share(int(os.environ.get("LOCAL_RANK", 0)), 2), ckpt_path=ckpt_path)
    return trainer, module


def whole(module):
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    return {name: parameter.full_tensor().detach().clone() for name, parameter in module.named_parameters()}


trainer, module = fit("moe_fsdp2")
losses = [None, None]
dist.all_gather_object(losses, module.losses)
local = {name: tuple(parameter.to_local().shape) for name, parameter in module.named_parameters()}
found = {"losses": losses, "weights": whole(module), "local": local}
found["clipped"] = whole(fit(MoEFSDP2Strategy(reshard_after_forward=False), clip=0.05)[1])
found["straight"] = whole(fit("moe_fsdp2", 2)[1])
for kind, sharded in (("directory", True), ("file", False)):
    made, _ = fit(MoEFSDP2Strategy(save_distributed_checkpoint=sharded))
    path = f"{folder}/{kind}.ckpt"
    made.save_checkpoint(path)
    dist.barrier()
    found[kind] = whole(fit(MoEFSDP2Strategy(save_distributed_checkpoint=sharded), 2, path)[1])
if trainer.is_global_zero:
    with open(folder + "/result.pkl", "wb") as file:
        pickle.dump(found, file)
dist.barrier()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two sharded processes found."""
    folder = tmp_path_factory.mktemp("two")
    run_script(TWO_RANKS, folder, folder, timeout=240)
    return pickle.loads((folder / "result.pkl").read_bytes()) | {"path": folder / "file.ckpt"}


def one_process(folder, **options):
    trainer = trainer_of(folder, [callback()], accumulate_grad_batches=2, **options)
    module = Descending()
    trainer.fit(module, share())
    return module


def weights(module):
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def close(found, expected, relative=1e-5):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= relative * weight.abs().max(), name


def test_two_sharded_processes_train_what_one_does(two, tmp_path):
    module = one_process(tmp_path)
    ranks = [loss for pair in zip(*two["losses"], strict=True) for loss in pair]
    assert ranks == pytest.approx(module.losses, rel=1e-5)
    close(two["weights"], weights(module))
    start = ForeignModule()
    upcycle(start, small_config())
    assert all((two["weights"][name] - weight).abs().max() > 1e-3 for name, weight in weights(start).items())


def test_each_process_holds_its_share_of_the_experts(two):
    experts = [name for name in two["weights"] if name.endswith("gate_up_proj")]
    assert len(experts) == 2
    for name in experts:
        # five experts on two ranks: three and two
        assert (two["weights"][name].shape[0], two["local"][name][0]) == (5, 3)


def test_gradients_are_clipped_by_the_norm_of_all_shards(two, tmp_path):
    module = one_process(tmp_path, gradient_clip_val=0.05)
    close(two["clipped"], weights(module))
    assert any((two["clipped"][name] - weight).abs().max() > 1e-3 for name, weight in two["weights"].items())


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_it_goes_on_where_it_stopped(two, kind):
    close(two[kind], two["straight"], relative=1e-6)
    assert any((two[kind][name] - weight).abs().max() > 1e-3 for name, weight in two["weights"].items())


def test_what_two_wrote_one_reads(two):
    checkpoint = torch.load(two["path"], weights_only=True)
    assert set(checkpoint["lightning_moe"]["layers"]) == {f"net.inner.model.layers.{n}.mlp" for n in (0, 1)}
    module = Descending()
    upcycle(module, small_config())
    module.load_state_dict(checkpoint["state_dict"])


# --- what becomes a unit ---


class WithHead(ForeignModule):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))


def units(module, **changes):
    upcycle(module, small_config(**changes))
    names = {id(part): name for name, part in module.named_modules()}
    return [names[id(unit)] for unit in _units(module)]


def test_units_are_blocks_then_the_model_then_what_is_left():
    blocks = [f"net.inner.model.layers.{n}" for n in (0, 1)]
    assert units(WithHead()) == [*blocks, "net.inner", "head.0", "head.2"]
    # a block that stays dense is a unit as its siblings are
    assert units(WithHead(), layers="1:") == [*blocks, "net.inner", "head.0", "head.2"]


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def test_a_layer_outside_of_any_list_is_a_unit_itself():
    assert units(Plain()) == ["ffn", "first"]


class Scaled(nn.Module):
    """Has a parameter and parts with parameters."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.inner = nn.Linear(8, 8)


def test_what_stands_inside_of_a_unit_is_none_itself():
    module = Plain()
    module.first = Scaled()
    assert units(module) == ["ffn", "first"]


def test_a_parameter_of_the_module_itself_is_refused():
    module = nn.Module()
    module.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(MisconfigurationException, match=r"scale is a parameter of Module itself.*into a submodule"):
        _check_sharded(module)


def test_the_name_is_known_where_a_callback_is_imported(tmp_path):
    told = run_script(
        "from lightning.pytorch.strategies import StrategyRegistry\n"
        "from lightning_moe import MoEUpcycleCallback\n"
        "print(type(StrategyRegistry.get('moe_fsdp2')).__name__)\n",
        tmp_path,
    )
    assert told.stdout.strip() == "MoEFSDP2Strategy"
