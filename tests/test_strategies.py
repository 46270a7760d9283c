"""Each strategy: several gloo processes train what one does."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_fixtures import ForeignModule, run_script, same_gradients, small_config
from strategy_fixtures import CLIP, EXPERTS, STEPS, Adaptive, Native, explored, one_process
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_moe import MoEDDPStrategy, MoEFSDP2Strategy, MoEFSDPStrategy, quantize_frozen, upcycle
from lightning_moe.blocks import loose_layers, moe_blocks, moe_modules, sharding_units
from lightning_moe.checkpoints import read_checkpoint
from lightning_moe.cli import check_strategy
from lightning_moe.strategies import STRATEGIES
from lightning_moe.strategies.fsdp2 import _check_sharded

TORCH_TWO = """{
    "moe_ddp": lambda: "moe_ddp",
    "moe_fsdp": lambda: "moe_fsdp",
    "moe_fsdp2": lambda: "moe_fsdp2",
    "expert parallel": lambda: MoEFSDP2Strategy(expert_parallel_size=2),
}"""
ZERO_TWO = """{
    "zero 1": lambda: MoEDeepSpeedStrategy(stage=1, process_group_backend="gloo"),
    "zero 2": lambda: MoEDeepSpeedStrategy(stage=2, process_group_backend="gloo"),
    "zero 3": lambda: MoEDeepSpeedStrategy(stage=3, process_group_backend="gloo"),
}"""
TORCH_FOUR = """{
    "expert parallel": lambda: MoEFSDP2Strategy(expert_parallel_size=2),
    "moe_fsdp2": lambda: MoEFSDP2Strategy(reshard_after_forward=False),
}"""
TORCH = ("moe_ddp", "moe_fsdp", "moe_fsdp2", "expert parallel")
# what depends on the time that passed, and on what the first micro-batch is
OF_THE_RUN = ("per_second", "selection_change")
ZERO = ("zero 1", "zero 2", "zero 3")
TWO = [*TORCH, *(pytest.param(name, marks=pytest.mark.slow) for name in ZERO)]


@pytest.fixture(scope="module")
def torch_two(tmp_path_factory):
    return explored(tmp_path_factory.mktemp("torch"), TORCH_TWO)


@pytest.fixture(scope="module")
def zero_two(tmp_path_factory):
    return explored(tmp_path_factory.mktemp("zero"), ZERO_TWO, environment={"DS_ACCELERATOR": "cpu"})


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Two groups of two ranks: the experts are spread within a group and sharded over the groups."""
    return explored(tmp_path_factory.mktemp("four"), TORCH_FOUR, function="spread")


@pytest.fixture
def two(request):
    """What the two processes of a strategy found."""

    def found(name):
        return request.getfixturevalue("torch_two" if name in TORCH else "zero_two")[name]

    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds, once for each way to train."""
    made = {}

    def found(**options):
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = one_process(tmp_path_factory.mktemp("alone"), **options)
        return made[key]

    return found


def close(found, expected, relative=1e-5):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= relative * weight.abs().max(), name


def differ(found, other):
    return any((found[name] - weight).abs().max() > 1e-3 for name, weight in other.items())


@pytest.mark.parametrize("name", TWO)
def test_two_processes_train_what_one_does(two, alone, name):
    expected, found = alone(), two(name)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    # of the largest of each: gradients of layers far from the loss are small sums of large terms
    same_gradients(found["gradients"], expected["gradients"], relative=1e-5)
    close(found["weights"], expected["weights"])
    start = ForeignModule()
    upcycle(start, small_config(num_experts=EXPERTS))
    assert all((found["weights"][key] - p).abs().max() > 1e-3 for key, p in start.named_parameters())


@pytest.mark.parametrize("name", TWO)
def test_activation_checkpointing_changes_nothing(two, name):
    found = two(name)
    close(found["recomputed"], found["weights"], relative=1e-6)


@pytest.mark.parametrize("name", TWO)
def test_an_expert_may_be_idle_on_one_rank(two, name):
    loads = two(name)["loads"]
    assert loads.shape == (2, 2 * STEPS, EXPERTS)
    idle = loads == 0
    assert bool((idle[0] & ~idle[1]).any())
    assert bool((idle[1] & ~idle[0]).any())


@pytest.mark.parametrize("name", TWO)
def test_gradients_are_clipped_by_the_norm_of_all_shards(two, alone, name):
    found = two(name)
    close(found["clipped"], alone(clip=CLIP)["weights"])
    assert differ(found["clipped"], found["weights"])


@pytest.mark.parametrize("name", TWO)
def test_accumulated_gradients_are_divided_once_and_biases_move_once(two, alone, name):
    found, expected = two(name)["accumulated"], alone(accumulate=2, biased=True)["weights"]
    close(found, expected)
    biases = [bias for key, bias in found.items() if key.endswith("expert_bias")]
    # four batches, two steps
    assert len(biases) == 2
    assert all(bias.abs().max() == pytest.approx(0.1) for bias in biases)


@pytest.mark.parametrize("name", TWO)
def test_statistics_are_those_of_all_ranks(two, alone, name):
    found, expected = two(name)["logged"], alone()["logged"]
    assert found.keys() == expected.keys()
    assert len(found) == STEPS
    for step, values in expected.items():
        for key in (key for key in values if not any(part in key for part in OF_THE_RUN)):
            assert found[step][key] == pytest.approx(values[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", TWO)
def test_global_batch_losses_count_all_ranks(two, torch_two, name):
    # DDP's own is compared with one process and the whole batch in tests/test_balancing.py
    found = two(name)
    close(found["global"], torch_two["moe_ddp"]["global"])
    assert differ(found["global"], found["weights"])


@pytest.mark.parametrize("name", [name for name in TWO if name != TORCH[-1]])
def test_models_with_blocks_of_their_own_train_as_on_one_process(two, alone, name):
    expected = alone(native=True)["weights"]
    close(two(name)["native"], expected)
    assert differ(expected, Native().state_dict())


def test_expert_parallelism_is_the_same_to_rounding(torch_two, four):
    for found in (torch_two, four):
        plain, spread = found["moe_fsdp2"], found["expert parallel"]
        for part in {"weights", "clipped", "accumulated"} & plain.keys():
            close(spread[part], plain[part], relative=1e-6)
        same_gradients(spread["gradients"], plain["gradients"], relative=1e-6)


def test_four_processes_train_what_one_does(four, alone):
    for found in four.values():
        close(found["weights"], alone(ranks=4)["weights"])
        close(found["clipped"], alone(ranks=4, clip=CLIP)["weights"])


def test_each_process_holds_its_share_of_the_experts(torch_two, four):
    shape = (EXPERTS, 24, 8)
    for found, halves in (
        (torch_two["moe_fsdp2"], (3, 24, 8)),
        (torch_two["expert parallel"], (3, 24, 8)),
        # six experts over four ranks: two, two and two
        (four["moe_fsdp2"], (2, 24, 8)),
        # three experts a rank of the group, of each half the rows in either group
        (four["expert parallel"], (3, 12, 8)),
    ):
        experts = [name for name in found["weights"] if name.endswith("gate_up_proj")]
        assert len(experts) == 2
        for name in experts:
            assert (tuple(found["weights"][name].shape), found["local"][name]) == (shape, halves)


# --- DeepSpeed's checkpoints; the others' are in tests/test_checkpoint_pairs.py ---


@pytest.fixture(scope="module")
def zero_resumed(tmp_path_factory):
    """What runs that went on from a checkpoint found, and where they are."""
    folder = tmp_path_factory.mktemp("resumed")
    one_process(folder, kind=Adaptive)
    return folder, explored(folder, ZERO_TWO, environment={"DS_ACCELERATOR": "cpu"}, function="go_on")


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["itself", "single", "fsdp2", *ZERO])
@pytest.mark.parametrize("name", ZERO)
def test_zero_goes_on_where_it_or_another_stopped(zero_resumed, two, name, writer):
    found = zero_resumed[1][name]
    writer = name if writer == "itself" else writer
    if writer not in found:
        pytest.skip("stages are met once, the later one going on")
    close(found[writer], found["straight"], relative=1e-6 if writer == name else 1e-5)
    assert differ(found["straight"], two(name)["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ZERO)
def test_others_go_on_where_zero_stopped(zero_resumed, name):
    close(zero_resumed[1][name]["read by moe_fsdp2"], zero_resumed[1][name]["straight"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ZERO)
def test_zero_becomes_what_one_process_writes(zero_resumed, name):
    folder, _ = zero_resumed
    checkpoint = read_checkpoint(folder / f"{name}.ckpt")
    one = read_checkpoint(folder / "single.ckpt")
    close(checkpoint["state_dict"], one["state_dict"])
    (found,), (expected,) = checkpoint["optimizer_states"], one["optimizer_states"]
    labels = [label for group in expected["param_groups"] for label in group["params"]]
    names = [name for group in found["param_groups"] for name in group["params"]]
    for label, own in zip(labels, names, strict=True):
        assert found["state"][own]["step"] == expected["state"][label]["step"] == STEPS
        for key in ("exp_avg", "exp_avg_sq"):
            state = expected["state"][label][key]
            assert (found["state"][own][key] - state).abs().max() <= 1e-5 * state.abs().max(), own
    assert len(checkpoint["lightning_moe"]["layers"]) == 2
    assert not (folder / ".unfinished").exists()


# --- what is refused ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoEFSDP2Strategy(expert_parallel_size=0), "expert_parallel_size=0: wanted a number of ranks"),
        (lambda: MoEFSDPStrategy(auto_wrap_policy={nn.Linear}), "what is wrapped is this strategy's to say"),
        (lambda: MoEFSDPStrategy(use_orig_params=False), "use_orig_params=False would flatten"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        make()


def test_fsdp1_refuses_weights_in_4_bit():
    module = upcycled(ForeignModule())
    quantize_frozen(module)
    with pytest.raises(MisconfigurationException, match=r"weights in 4 bit are bytes\. Take moe_fsdp2 or moe_ddp"):
        MoEFSDPStrategy()._setup_model(module)


def test_ddp_gradients_live_in_the_buckets():
    assert MoEDDPStrategy()._ddp_kwargs == {"gradient_as_bucket_view": True}
    assert MoEDDPStrategy(gradient_as_bucket_view=False, static_graph=True)._ddp_kwargs == {
        "gradient_as_bucket_view": False,
        "static_graph": True,
    }


def test_a_parameter_of_the_module_itself_is_refused():
    module = nn.Module()
    module.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(MisconfigurationException, match=r"scale is a parameter of Module itself.*into a submodule"):
        _check_sharded(module)


# --- what becomes a unit ---


class WithHead(ForeignModule):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))


def upcycled(module, **changes):
    upcycle(module, small_config(**changes))
    return module


def names_of(module, parts):
    names = {id(part): name for name, part in module.named_modules()}
    return [names[id(part)] for part in parts]


def units(module, **changes):
    module = upcycled(module, **changes)
    return names_of(module, sharding_units(module))


def test_units_are_blocks_then_the_model_then_what_is_left():
    blocks = [f"net.inner.model.layers.{n}" for n in (0, 1)]
    assert units(WithHead()) == [*blocks, "net.inner", "head.0", "head.2"]
    # a block that stays dense is a unit as its siblings are
    assert units(WithHead(), layers="1:") == [*blocks, "net.inner", "head.0", "head.2"]


def test_blocks_of_the_model_itself_count():
    config = MixtralConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=17, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    layers = [f"model.layers.{n}" for n in (0, 1)]
    assert list(moe_modules(model)) == [f"{layer}.mlp" for layer in layers]
    assert names_of(model, moe_blocks(model)) == layers


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def test_a_layer_outside_of_any_list_is_a_unit_itself():
    assert units(Plain()) == ["ffn", "first"]
    module = upcycled(Plain())
    assert (moe_blocks(module), names_of(module, loose_layers(module))) == ([], ["ffn"])


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


@pytest.mark.parametrize("imports", ["import lightning_moe", "from lightning_moe import MoEUpcycleCallback"])
def test_the_names_are_known_after_the_import(tmp_path, imports):
    told = run_script(
        f"from lightning.pytorch import Trainer\n{imports}\n"
        "trainer = Trainer(strategy='moe_fsdp2', accelerator='cpu', devices=2, logger=False)\n"
        "print(type(trainer.strategy).__name__)\n",
        tmp_path,
    )
    assert told.stdout.split()[-1] == "MoEFSDP2Strategy"


def test_the_torch_world_comes_without_lightning(tmp_path):
    told = run_script("import sys, lightning_moe\nprint('lightning' in sys.modules)\n", tmp_path)
    assert told.stdout.split() == ["False"]


def test_a_name_that_is_none_is_told_what_was_meant():
    with pytest.raises(
        ValueError, match=r"'moe_fdsp2': there is none of this name\. Did you mean 'moe_fsdp2'\? Known: auto"
    ):
        check_strategy("moe_fdsp2")
    for name in (*STRATEGIES, "auto", "DDP"):
        check_strategy(name)
