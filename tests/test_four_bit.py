"""Weights in 4 bit and what is computed with them, against a formula and against loops over plain weights."""

import copy
import sys

import pytest
import reference
import torch
from test_experts import BFLOAT16, FLOAT32, LAYOUTS, ROUTINGS, SIZES, experts_of, regular, spy_on_grouped_mm
from test_low_rank import LOW_RANK, of_size, written_out
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_moe import Experts
from lightning_moe.four_bit import Linear4bit, Weight4bit, linear

# Dettmers et al. 2023, appendix E
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
# by their bits: sign, two of exponent, one of mantissa; 0.0625 is the one below the exponents
FP4 = torch.tensor([s * m / 12 for s in (1, -1) for m in (0, 0.0625, 8, 12, 4, 6, 2, 3)])
CODES = {"nf4": NF4, "fp4": FP4}
# Rows of 96 are no multiple of the block; an odd number of weights; fewer than a block.
SHAPES = [(2, 64, 96), (4, 8, 64), (3, 5, 7), (1, 10, 6)]


def nearest(weight, quant_type, block_size):
    """Each weight as the nearest code times the largest of its block."""
    flat, codes = weight.float().flatten(), CODES[quant_type]
    blocks = []
    for block in flat.split(block_size):
        largest = block.abs().max()
        blocks.append(codes[(block[:, None] / largest - codes).abs().argmin(1)] * largest)
    return torch.cat(blocks).view(weight.shape)


@pytest.mark.parametrize("quant_type", CODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_weight_is_the_nearest_code_times_the_largest_of_its_block(shape, quant_type):
    weight = torch.randn(shape)
    for block_size in (64, 128):
        made = Weight4bit.of(weight, quant_type=quant_type, block_size=block_size)
        torch.testing.assert_close(made.dequantize(), nearest(weight, quant_type, block_size), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_comes_back_in_its_dtype_or_another(dtype):
    weight = torch.randn(2, 64, 96).to(dtype)
    made = Weight4bit.of(weight)
    assert made.dequantize().dtype == dtype
    truth = nearest(weight, "nf4", 64)
    for wanted in (torch.float32, torch.bfloat16):
        assert made.dequantize(wanted).equal(truth.to(wanted))


@pytest.mark.parametrize(("block_size", "bits"), [(64, 4.5), (32, 5.0), (256, 4.125)])
def test_a_weight_takes_4_bits_and_one_float32_a_block(block_size, bits):
    made = Weight4bit.of(torch.randn(8, 64, 64), block_size=block_size)
    stored = sum(p.numel() * p.element_size() for p in made.parameters())
    assert stored == 8 * 64 * 64 * bits / 8
    assert not list(made.buffers())


def test_casting_a_module_leaves_its_scales_exact():
    made = Weight4bit.of(torch.randn(2, 8, 64))
    before = made.dequantize()
    assert made.to(torch.bfloat16).dequantize().equal(before)
    assert copy.deepcopy(made).dequantize().equal(before)


def test_on_the_meta_device_it_has_its_size():
    made = Weight4bit.of(torch.empty(2, 8, 64, device="meta"))
    assert (made.packed.shape, made.absmax.shape, made.dequantize().shape) == ((512,), (64,), (2, 8, 64))
    assert made.device.type == made.dequantize().device.type == "meta"


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-moe\[bnb\]'"):
        Weight4bit.of(torch.randn(2, 64))


# --- experts ---


def in_4_bit(experts):
    """The same experts with their projections in 4 bit; and plain ones whose weights are what these stand for."""
    quantised, plain = copy.deepcopy(experts), copy.deepcopy(experts)
    for name, weight in experts.projections.items():
        stored = Weight4bit.of(weight)
        delattr(quantised, name)
        quantised.add_module(name, stored)
        getattr(plain, name).data = nearest(weight.detach(), "nf4", 64).to(weight.dtype)
    return quantised, plain


def assert_equals_plain(quantised, plain, routing, compute=None, **tolerance):
    """Output, gradients of tokens, routing weights and biases against the loop over plain weights."""
    slow, x = reference.unstack(plain), torch.randn(routing.num_tokens, plain.hidden_size, dtype=plain.down_proj.dtype)
    slow_x, x = x.clone().requires_grad_(), x.clone().requires_grad_()
    slow_weights = routing.weights.detach().clone().requires_grad_()
    truth = reference.moe(slow_x, routing.token_ids, routing.expert_ids, slow_weights, slow)
    y = (compute or quantised)(x, routing)
    assert y.dtype == truth.dtype
    torch.testing.assert_close(y, truth, **tolerance)
    upstream = torch.randn_like(truth)
    truth.backward(upstream)
    y.backward(upstream)
    torch.testing.assert_close(x.grad, slow_x.grad, **tolerance)
    if slow_weights.grad is not None:
        torch.testing.assert_close(routing.weights.grad, slow_weights.grad, **tolerance)
    wanted = reference.stacked_gradients(slow)
    for name, parameter in quantised.named_parameters():
        if name.endswith("bias"):
            torch.testing.assert_close(parameter.grad, wanted[name], **tolerance)
        else:
            assert parameter.dtype == torch.uint8
            assert parameter.grad is None


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["swiglu", "relu_biases"])
def test_4_bit_experts_equal_the_loop_for_every_routing(layout, size, routing):
    experts = experts_of(5, *SIZES[size], **LAYOUTS[layout])
    assert_equals_plain(*in_4_bit(experts), ROUTINGS[routing](), **FLOAT32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_4_bit_experts_equal_the_loop_for_every_layout(layout):
    experts = experts_of(5, 8, 16, **LAYOUTS[layout])
    assert_equals_plain(*in_4_bit(experts), regular(7, 5, 2), **FLOAT32)
    quantised, plain = in_4_bit(experts)
    assert_equals_plain(quantised, plain, regular(7, 5, 2), compute=quantised.loop, **FLOAT32)


def test_4_bit_experts_in_bfloat16():
    experts = experts_of(5, 8, 16, dtype=torch.bfloat16)
    assert_equals_plain(*in_4_bit(experts), regular(7, 5, 2), **BFLOAT16)


def test_the_grouped_kernel_takes_the_gradient_back_too(monkeypatch):
    quantised, _ = in_4_bit(experts_of(5, 8, 16))
    seen = spy_on_grouped_mm(monkeypatch)
    x = torch.randn(7, 8, requires_grad=True)
    quantised(x, regular(7, 5, 2)).sum().backward()
    assert len(seen) == 4


def test_under_autocast_they_compute_in_its_dtype(monkeypatch):
    quantised, plain = in_4_bit(experts_of(5, 8, 16, up_bias=True, down_bias=True))
    routing, x = regular(7, 5, 2), torch.randn(7, 8, requires_grad=True)
    seen = spy_on_grouped_mm(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantised(x, routing)
    y.float().sum().backward()
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    torch.testing.assert_close(y.float(), plain(x, routing), **BFLOAT16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_experts_in_4_bit(layout):
    quantised, plain = in_4_bit(experts_of(2, 8, 16, **LAYOUTS[layout]))
    x = torch.randn(7, 8, requires_grad=True)
    slow_x = x.detach().clone().requires_grad_()
    truth = sum(expert(slow_x) for expert in reference.unstack(plain))
    y = quantised(x)
    torch.testing.assert_close(y, truth, **FLOAT32)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    truth.backward(upstream)
    torch.testing.assert_close(x.grad, slow_x.grad, **FLOAT32)


@pytest.mark.parametrize("way", ["forward", "outputs", "loop"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_low_rank_experts_of_a_4_bit_ffn(layout, size, way):
    quantised, plain = in_4_bit(of_size(size, **LAYOUTS[layout]))
    leaves, slow = written_out(plain)
    routing, x = regular(7, 5, 2), torch.randn(7, plain.hidden_size, requires_grad=True)
    slow_x, slow_weights = x.detach().clone().requires_grad_(), routing.weights.detach().clone().requires_grad_()
    truth = reference.moe(slow_x, routing.token_ids, routing.expert_ids, slow_weights, slow)
    if way == "outputs":
        outputs, rows = quantised.outputs(x, routing)
        weighted = outputs * routing.weights[rows.order, None]
        y = torch.zeros_like(x).index_add(0, routing.token_ids[rows.order], weighted)
    else:
        y = (quantised if way == "forward" else quantised.loop)(x, routing)
    tolerance = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(y, truth, **tolerance)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    truth.backward(upstream)
    torch.testing.assert_close(x.grad, slow_x.grad, **tolerance)
    torch.testing.assert_close(routing.weights.grad, slow_weights.grad, **tolerance)
    for name in LOW_RANK:
        torch.testing.assert_close(getattr(quantised, name).grad, leaves[name].grad, **tolerance)


def test_they_count_and_show_the_weights_they_stand_for():
    quantised, plain = in_4_bit(experts_of(5, 8, 16, up_bias=True))
    assert quantised.parameters_per_expert == plain.parameters_per_expert
    for shown, weight in zip(quantised.weights(), plain.weights(), strict=True):
        torch.testing.assert_close(shown, weight.detach(), rtol=1e-6, atol=1e-6)
    assert quantised.parameters_for("down") == []
    assert quantised.parameters_for("up_bias") == [quantised.gate_up_proj_bias]


# --- memory ---


class Live(TorchDispatchMode):
    """The bytes of the tensors that were made since it began and are still there; and the most there were at once."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in before:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self):
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        return sum(size for _, size in self.storages.values())


LARGEST = 8 * 2 * 256 * 64 * 4  # bytes of the gate and up projections in float32
ALL = LARGEST * 3 // 2


def step_memory(experts, checkpointed=False):
    """Live after the forward, and at most in the whole step, both of what the step made."""
    routing, x = regular(16, 8, 2), torch.randn(16, 64, requires_grad=True)
    with Live() as live:
        y = checkpoint(experts, x, routing, use_reentrant=False) if checkpointed else experts(x, routing)
        kept = live.bytes()
        y.sum().backward()
        return kept, live.peak


def test_nothing_that_was_dequantised_is_kept_for_the_backward():
    quantised, plain = in_4_bit(experts_of(8, 64, 256))
    plain.requires_grad_(False)
    activations, _ = step_memory(plain)
    kept, peak = step_memory(quantised)
    # what plain frozen weights keep too: no dequantised one, of which each is at least as large as all of this
    assert activations < ALL / 3
    assert kept <= activations
    # two are never there together
    assert LARGEST <= peak < LARGEST + activations + kept


def test_so_a_dequantised_copy_would_be_seen():
    quantised, _ = in_4_bit(experts_of(8, 64, 256))

    class Naive(nn.Module):
        def forward(self, x, routing):
            copied = Experts(8, 64, 256)
            for name, weight in quantised.projections.items():
                setattr(copied, name, nn.Parameter(weight.dequantize(), requires_grad=False))
            return copied(x, routing)

    kept, _ = step_memory(Naive())
    assert kept > ALL


def test_checkpointing_keeps_its_sense():
    quantised, _ = in_4_bit(experts_of(8, 64, 256))
    kept, _ = step_memory(quantised)
    checkpointed, _ = step_memory(quantised, checkpointed=True)
    assert checkpointed < kept / 2


# --- linear layers ---


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_in_4_bit_equals_the_one_of_its_weight(bias):
    dense = nn.Linear(96, 10, bias=bias)
    truth = copy.deepcopy(dense)
    truth.weight.data = nearest(dense.weight.detach(), "nf4", 64)
    calls = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    Linear4bit.convert(dense, Weight4bit.of(dense.weight))
    x = torch.randn(2, 3, 96, requires_grad=True)
    slow_x = x.detach().clone().requires_grad_()
    torch.testing.assert_close(dense(x), truth(slow_x))
    dense(x).square().sum().backward()
    truth(slow_x).square().sum().backward()
    torch.testing.assert_close(x.grad, slow_x.grad)
    if bias:
        torch.testing.assert_close(dense.bias.grad, truth.bias.grad)
    assert isinstance(dense, nn.Linear)
    assert len(calls) == 2
    dense.revert()
    assert type(dense) is nn.Linear
    torch.testing.assert_close(dense(x), truth(x))


def test_in_evaluation_mode_it_computes_the_same_and_stays_as_it_is():
    dense = nn.Linear(64, 64)
    Linear4bit.convert(dense, Weight4bit.of(dense.weight))
    x, before = torch.randn(3, 64), {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    trained = dense(x.requires_grad_())
    with torch.no_grad():
        assert dense.eval()(x).equal(trained)
    assert all(tensor.equal(before[key]) for key, tensor in dense.state_dict().items())
    dense.train()(x).sum().backward()
    assert x.grad is not None


def test_a_linear_layer_follows_its_input_and_autocast():
    dense = nn.Linear(64, 64)
    Linear4bit.convert(dense, Weight4bit.of(dense.weight))
    x = torch.randn(3, 64)
    assert dense(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert dense(x).dtype == torch.bfloat16
        assert linear(x, torch.randn(5, 64)).dtype == torch.bfloat16


def test_it_is_made_of_a_linear_layer_only():
    with pytest.raises(TypeError, match=r"Linear4bit\.convert\(linear, weight\)"):
        Linear4bit()
