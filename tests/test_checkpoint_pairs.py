"""Saved with one strategy, gone on with another: for every pair the weights are those of a run without a stop."""

import re
from itertools import product

import pytest
import torch
from checkpoint_fixtures import SINGLE, STRATEGIES, Grouped, run, whole
from lightning_fixtures import run_script

from lightning_moe import consolidate, load_moe

pytestmark = pytest.mark.slow

ALL = (SINGLE, *STRATEGIES)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The weights after two epochs, by who saved after the first and who went on; and without a stop."""
    folder = tmp_path_factory.mktemp("pairs")
    run(folder, save=folder / f"{SINGLE}.ckpt")
    torch.save({"state_dict": Grouped().state_dict(), "optimizer_states": []}, folder / "dense.ckpt")
    script = "import sys\nfrom checkpoint_fixtures import all_pairs\nall_pairs(sys.argv[1])\n"
    run_script(script, folder, folder, timeout=240)
    found, told = torch.load(folder / "found.pt", weights_only=True)
    for writer in ALL:
        found[writer, SINGLE] = whole(*run(folder, epochs=2, ckpt_path=folder / f"{writer}.ckpt"))
    return found, whole(*run(folder, epochs=2)), folder, told


@pytest.mark.parametrize(("writer", "reader"), product(ALL, ALL))
def test_it_goes_on_where_another_stopped(pairs, writer, reader):
    found, straight, *_ = pairs
    assert found[writer, reader].keys() == straight.keys()
    for name, weight in straight.items():
        assert (found[writer, reader][name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name


def test_the_optimizers_state_matters(pairs, tmp_path):
    _, straight, folder, _ = pairs
    checkpoint = torch.load(folder / f"{SINGLE}.ckpt", weights_only=True)
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["momentum_buffer"].zero_()
    torch.save(checkpoint, tmp_path / "still.ckpt")
    found = whole(*run(tmp_path, epochs=2, ckpt_path=tmp_path / "still.ckpt"))
    assert any((found[name] - weight).abs().max() > 1e-3 for name, weight in straight.items())


LAYER = r"net\.inner\.model\.layers\.0\.mlp"
WAY_OUT = r"Upcycle with the configuration that the checkpoint was trained with\.$"


@pytest.mark.parametrize("writer", STRATEGIES)
def test_a_checkpoint_from_another_configuration_is_refused_in_one_line(pairs, writer):
    told = pairs[3]
    assert re.match(rf"{LAYER}: the checkpoint has num_experts=6, this model 4\. {WAY_OUT}", told[writer, "experts"])
    layers = rf"{LAYER} is a MoE layer in the checkpoint, and dense in the model\. {WAY_OUT}"
    assert re.match(layers, told[writer, "layers"])


def test_a_dense_checkpoint_is_refused_in_one_line(pairs):
    told = r"net\.inner\.model\.layers\.1\.mlp: the checkpoint is that of a dense model, .*dense_checkpoint=PATH.*$"
    assert re.match(told, pairs[3]["dense"])


# --- DeepSpeed, whose shards become one model ---

ZERO = """
import os, sys

os.environ["DS_ACCELERATOR"] = "cpu"
import torch
from checkpoint_fixtures import run

from lightning_moe import MoEDeepSpeedStrategy

torch.set_num_threads(1)
folder = sys.argv[1]
strategy = MoEDeepSpeedStrategy(stage=2, process_group_backend="gloo")
run(folder, strategy, save=folder + "/zero.ckpt")
torch.distributed.barrier()
"""


def test_the_shards_of_zero_become_one_model(pairs, tmp_path):
    run_script(ZERO, tmp_path, tmp_path, timeout=240, environment={"DS_ACCELERATOR": "cpu"})
    assert consolidate(tmp_path / "zero.ckpt", tmp_path / "moe").global_step == 5
    expected = torch.load(pairs[2] / f"{SINGLE}.ckpt", weights_only=True)["state_dict"]
    found = load_moe(tmp_path / "moe").state_dict()
    assert len(found) == len(expected)
    for name, weight in found.items():
        one = expected[f"net.inner.{name}"]
        assert (weight - one).abs().max() <= 1e-5 * one.abs().max(), name
