"""Expert parallelism: a layer spread over two ranks computes what the whole layer does."""

import json
from pathlib import Path

import pytest
from catalogue import ROUTER_ROWS
from lightning_fixtures import run_script, small_config, tiny_llama
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_moe import LowRankInit, quantize_frozen, upcycle
from lightning_moe.expert_parallel import _layers_to_spread

TWO_RANKS = """
import os, subprocess, sys

if "RANK" in os.environ:
    from expert_parallel_fixtures import main

    main(sys.argv[1])
else:
    both = [subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "RANK": rank}) for rank in "01"]
    sys.exit(max(abs(process.wait()) for process in both))
"""
SPECIAL = ("uneven", "one rank empty", "bfloat16", "float64", "biases", "checkpointed")
ROUTERS = tuple(name for name, row in ROUTER_ROWS.items() if not row.cls.uses_token_ids)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The largest differences between the whole layer and the spread one."""
    folder = tmp_path_factory.mktemp("spread")
    run_script(TWO_RANKS, folder, folder, timeout=120)
    return json.loads(Path(folder, "found.json").read_text())


@pytest.mark.parametrize("case", [*ROUTERS, *SPECIAL])
def test_a_spread_layer_computes_what_the_whole_one_does(found, case):
    differences = found[case]
    assert {"out", "x", "experts.down_proj"} <= differences.keys()
    # bfloat16: the sum over ranks rounds once more, and so does the mean
    limit = {"bfloat16": 0.02, "float64": 1e-12}.get(case, 2e-6)
    assert max(differences.values()) <= limit, differences


# --- what is refused, before anything is changed ---


def refused(model, ranks=2):
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r".+") as error:
        _layers_to_spread(model, ranks)
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}
    return str(error.value)


def test_experts_that_the_ranks_cannot_share_evenly_are_refused():
    model = tiny_llama()
    upcycle(model, small_config())
    assert refused(model) == (
        "model.layers.0.mlp: num_experts=5 is not divisible by expert_parallel_size=2; choose a divisor."
    )


def test_low_rank_experts_are_refused():
    model = tiny_llama()
    upcycle(model, small_config(num_experts=4, init=LowRankInit(rank=2)))
    assert "low-rank experts share one FFN" in refused(model)


def test_experts_in_4_bit_are_refused():
    model = tiny_llama()
    upcycle(model, small_config(num_experts=4))
    quantize_frozen(model)
    assert "the experts are in 4 bit" in refused(model)


def test_a_dense_model_is_refused():
    assert refused(nn.Linear(2, 2)) == "Linear has no MoE layer whose experts could be spread. Upcycle it first."


def test_blocks_of_the_model_itself_are_refused():
    config = MixtralConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=17, num_local_experts=4,
    )  # fmt: skip
    assert "this block is the model's own" in refused(MixtralForCausalLM(config))
