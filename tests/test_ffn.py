import pytest
import torch
from catalogue import FAMILY_ROWS, VOCABULARY, Block, TwoLinear, plain_model, sequential_ffn
from torch import nn
from torch.nn import functional as F

from lightning_moe import FFN_FAMILIES, FFNFamily, find_ffns

# two ways to the same dozen float32 products, which sum to 10 or so; transformers fuses gate and up in Phi-3 and
# ModernBERT, and adds biases in Conv1D
FLOAT32 = {"rtol": 1e-5, "atol": 5e-6}

every_family = pytest.mark.parametrize("row", FAMILY_ROWS.values(), ids=FAMILY_ROWS)


def test_families_have_rows():
    assert {row.family for row in FAMILY_ROWS.values()} == set(FFN_FAMILIES)


@every_family
def test_finds_every_ffn_and_nothing_else(row):
    model = row.build()
    assert tuple(find_ffns(model)) == row.names
    of_family = tuple(find_ffns(model, FFN_FAMILIES[row.family]))
    assert of_family == (tuple(n for n in row.names if n in of_family) if row.mixed else row.names)


def dense_ffn(model, name, family):
    """The FFN as the model computes it, of parts that stand in different modules too."""
    path, _, place = name.rpartition(".")
    module = model.get_submodule(path)
    if family == "bert":
        return lambda x: module.output.dense(module.intermediate(x))
    if family == "bloom":
        return lambda x: module(x, torch.zeros_like(x))
    if family == "opt":
        return lambda x: module.fc2(module.activation_fn(module.fc1(x)))
    return getattr(module, place)


@every_family
def test_the_canonical_weights_compute_what_the_module_does(row):
    model = row.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)  # biases that are not zero
    for name, weights in find_ffns(model).items():
        x = torch.randn(1, 7, row.hidden_size)
        torch.testing.assert_close(weights(x[0]), dense_ffn(model, name, row.family)(x)[0], **FLOAT32)


@every_family
def test_sizes_and_sources(row):
    model = row.build()
    for (name, weights), count in zip(find_ffns(model).items(), row.counts, strict=True):
        module = model.get_submodule(name)
        assert weights.hidden_size == row.hidden_size
        assert weights.up.shape == (weights.expert_size, row.hidden_size)
        assert weights.down.shape == (row.hidden_size, weights.expert_size)
        # and those of what becomes an identity with it
        parts = [module, *(model.get_submodule(part) for part in weights.absorbed)]
        assert {id(p) for _, p in weights.sources} == {id(p) for part in parts for p in part.parameters()}
        assert sum(p.numel() for _, p in weights.sources) == count


@every_family
def test_reading_copies_nothing(row):
    model = row.build()
    weights = next(iter(find_ffns(model).values()))
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
        tensor = getattr(weights, name)
        assert tensor is None or (tensor.untyped_storage().data_ptr() in storages and not tensor.requires_grad)


@every_family
def test_looking_changes_nothing(row):
    model = row.build().train()
    model.get_submodule(row.names[0]).eval()
    next(model.children()).training = False
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    find_ffns(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


def test_the_dropout_of_the_output_is_read():
    assert [w.dropout for w in find_ffns(plain_model(lambda: sequential_ffn(dropout=0.3))).values()] == [0.3, 0.3]
    assert [w.dropout for w in find_ffns(plain_model(lambda: sequential_ffn())).values()] == [0.0, 0.0]


def test_heads_of_another_width_are_left():
    model = nn.Sequential(Block(TwoLinear(8, 12)), TwoLinear(8, 12, out_size=3))
    assert list(find_ffns(model)) == ["0.ffn"]


def test_a_module_used_twice_appears_once():
    ffn = TwoLinear(8, 12)
    assert list(find_ffns(nn.Sequential(Block(ffn), Block(ffn)))) == ["0.ffn"]


def test_a_meta_model_is_read():
    with torch.device("meta"):
        model = FAMILY_ROWS["llama"].build()
    assert tuple(find_ffns(model)) == FAMILY_ROWS["llama"].names


def test_a_users_own_family():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w_in, self.w_gate, self.w_out = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            return self.w_out(self.func(self.w_gate(x)) * self.w_in(x))

        def func(self, x):
            return F.silu(x)

    model = plain_model(Own)
    with pytest.raises(TypeError, match=r"no FFN of a known family[\s\S]*Own\(w_in, w_gate, w_out\)"):
        find_ffns(model)
    family = FFNFamily(gate="w_gate", up="w_in", down="w_out", activation="func")
    weights = find_ffns(model, family)
    assert list(weights) == ["1.ffn", "2.ffn"]
    x = torch.randn(7, 8)
    torch.testing.assert_close(weights["1.ffn"](x), model[1].ffn(x), **FLOAT32)


class OtherMaths(TwoLinear):
    def forward(self, x):
        return super().forward(x) * 1.1


class MoreParts(TwoLinear):
    def __init__(self, *args):
        super().__init__(*args)
        self.norm = nn.LayerNorm(12)

    def forward(self, x):
        return self.fc2(self.norm(self.act(self.fc1(x))))


def test_the_parts_of_a_family_with_other_maths_are_refused():
    with pytest.raises(ValueError, match=r"1\.ffn: OtherMaths has the parts .* but computes something else"):
        find_ffns(plain_model(lambda: OtherMaths(8, 12)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_probe_takes_every_dtype(dtype):
    assert list(find_ffns(plain_model(lambda: TwoLinear(8, 12)).to(dtype))) == ["1.ffn", "2.ffn"]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-3), (torch.bfloat16, 1.0), (torch.float16, 1.0)])
def test_the_probe_tells_small_outputs_apart(dtype, size):
    def small():
        ffn = OtherMaths(8, 12)
        ffn.fc2.weight.data.mul_(size)
        ffn.fc2.bias.data.zero_()
        return ffn

    with pytest.raises(ValueError, match="computes something else"):
        find_ffns(plain_model(small).to(dtype))


def test_more_parameters_than_the_family_has_are_no_match():
    with pytest.raises(TypeError, match="no FFN of a known family"):
        find_ffns(plain_model(lambda: MoreParts(8, 12)))


def test_a_model_without_an_ffn_is_refused_in_words():
    with pytest.raises(TypeError, match="Linear: no FFN of a known family"):
        find_ffns(nn.Linear(VOCABULARY, 3))


def test_an_ffn_whose_inner_dropout_would_be_lost_is_refused():
    class WithDropout(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.fc1, self.act, self.drop, self.fc2 = nn.Linear(4, 8), nn.GELU(), nn.Dropout(p), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc2(self.drop(self.act(self.fc1(x))))

    with pytest.raises(TypeError, match="no FFN of a known family"):
        find_ffns(nn.Sequential(WithDropout(0.1)))
    assert list(find_ffns(nn.Sequential(WithDropout(0.0)))) == ["0"]
