import json
from functools import partial

import pytest
import torch
from catalogue import FAMILY_ROWS, LIBRARY_ROWS, ROUTER_ROWS, TEXT_ROWS, Block, TwoLinear, logits, plain_model
from huggingface_hub import save_torch_model
from torch import nn

from lightning_moe import (
    FFNFamily,
    MoELayer,
    TopKRouter,
    UpcycleConfig,
    load_moe,
    moe_layers,
    record_routing,
    save_moe,
    upcycle,
)
from lightning_moe.saving import CONFIG_FILE, WEIGHTS_FILES, apply_recipe, moe_recipe

E = 4
every_text_family = pytest.mark.parametrize("row", TEXT_ROWS.values(), ids=TEXT_ROWS)
every_library_family = pytest.mark.parametrize("row", LIBRARY_ROWS.values(), ids=LIBRARY_ROWS)
PLAIN_ROWS = {name: row for name, row in FAMILY_ROWS.items() if row.inputs == "plain"}
every_plain_family = pytest.mark.parametrize("row", PLAIN_ROWS.values(), ids=PLAIN_ROWS)


class LoudRouter(TopKRouter):
    """A user's own router, in a module that can be imported."""

    def __init__(self, hidden_size, num_experts, *, volume=1.0, top_k=2):
        super().__init__(hidden_size, num_experts, top_k=top_k)
        self.volume = volume
        self.offset = nn.Parameter(torch.randn(hidden_size))

    def forward(self, x, tokens=None):
        return super().forward(self.volume * x + self.offset, tokens)


def trained(model, config):
    """An upcycled model whose every parameter is a number of its own, as after training."""
    upcycle(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def build_in(dtype, row):
    """A dense model as from_pretrained(dtype=...) makes it: `.to` would cast the rotary embedding's buffers as well."""
    torch.set_default_dtype(dtype)
    try:
        return row.build()
    finally:
        torch.set_default_dtype(torch.float32)


def config_of(router=TopKRouter, **settings):
    return UpcycleConfig(num_experts=E, router=router, **settings)


def assert_same(loaded, saved, batch):
    assert torch.equal(logits(loaded, batch), logits(saved, batch))
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in saved.state_dict().items()}
    assert not any(module.training for module in loaded.modules())


# --- there and back ---


@every_library_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_models_load_to_equal_logits(row, dtype, tmp_path):
    saved = trained(build_in(dtype, row), config_of())
    save_moe(saved, tmp_path)
    loaded = load_moe(tmp_path)
    assert type(loaded) is type(saved)
    assert_same(loaded, saved, row.batch(dtype=dtype))
    if row.is_text:
        assert loaded.generation_config.to_dict() == saved.generation_config.to_dict()
    assert all(p.requires_grad for p in loaded.parameters())


@every_text_family
def test_padding_reaches_the_layers_of_a_loaded_model(row, tmp_path):
    save_moe(trained(row.build(), config_of()), tmp_path)
    ids, mask = row.batch()["input_ids"], torch.ones(3, 7, dtype=torch.int64)
    mask[0, :3] = 0
    with record_routing() as window:
        load_moe(tmp_path)(input_ids=ids, attention_mask=mask)
    assert [r.token_mask.tolist() for r in window.values()] == [mask.flatten().bool().tolist()] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_embeddings_stay_tied(dtype, tmp_path):
    row = TEXT_ROWS["qwen2"]
    saved = trained(build_in(dtype, row), config_of())
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    save_moe(saved, tmp_path)
    loaded = load_moe(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(loaded, saved, row.batch())


@every_plain_family
def test_plain_modules_load_on_the_dense_one(row, tmp_path):
    saved = trained(row.build(), config_of())
    save_moe(saved, tmp_path)
    dense = row.build().train()
    loaded = load_moe(tmp_path, model=dense)
    assert loaded is dense
    assert_same(loaded, saved, row.batch())


def test_a_transformers_model_loads_on_the_dense_one_too(tmp_path):
    row = TEXT_ROWS["llama"]
    saved = trained(row.build(), config_of())
    save_moe(saved, tmp_path)
    assert_same(load_moe(tmp_path, model=row.build()), saved, row.batch())


def test_the_chosen_layers_come_back(tmp_path):
    row = TEXT_ROWS["llama"]
    saved = trained(row.build(), config_of(layers=[1]))
    save_moe(saved, tmp_path)
    loaded = load_moe(tmp_path)
    assert list(moe_layers(loaded)) == ["model.layers.1.mlp"]
    assert_same(loaded, saved, row.batch())


def test_a_family_of_ones_own_comes_back(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc_in, self.func, self.fc_out = nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)

        def forward(self, x):
            return self.fc_out(self.func(self.fc_in(x)))

    family = FFNFamily(up="fc_in", activation="func", down="fc_out")
    saved = trained(plain_model(Own), config_of(family=family))
    save_moe(saved, tmp_path, family=family)
    assert_same(load_moe(tmp_path, model=plain_model(Own)), saved, FAMILY_ROWS["two_linear"].batch())


def test_a_shared_layer_comes_back_shared(tmp_path):
    def build():
        ffn = TwoLinear(8, 12)
        return nn.Sequential(nn.Linear(5, 8), Block(ffn), Block(ffn))

    saved = trained(build(), config_of())
    save_moe(saved, tmp_path)
    loaded = load_moe(tmp_path, model=build())
    assert loaded[1].ffn is loaded[2].ffn
    assert_same(loaded, saved, FAMILY_ROWS["two_linear"].batch())


def test_loading_moves_no_random_numbers(tmp_path):
    save_moe(trained(TEXT_ROWS["llama"].build(), config_of()), tmp_path)
    before = torch.get_rng_state()
    load_moe(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32


def test_several_files(tmp_path):
    row = TEXT_ROWS["llama"]
    saved = trained(row.build(), config_of())
    save_moe(saved, tmp_path)
    (tmp_path / "moe_model.safetensors").unlink()
    save_torch_model(saved, tmp_path, max_shard_size="20KB", filename_pattern=WEIGHTS_FILES)
    assert len(list(tmp_path.glob("moe_model-*.safetensors"))) > 1
    assert not (tmp_path / "moe_model.safetensors").exists()
    assert_same(load_moe(tmp_path), saved, row.batch())


# --- routers ---


@pytest.mark.filterwarnings("ignore:.*routing depend on later tokens")
@pytest.mark.parametrize("name", [n for n in ROUTER_ROWS if n != "top_k"])
def test_the_arguments_of_every_router_come_back(name, tmp_path):
    row = TEXT_ROWS["llama"]
    saved = trained(row.build(), config_of(router=ROUTER_ROWS[name]))
    save_moe(saved, tmp_path)
    loaded = load_moe(tmp_path)
    assert_same(loaded, saved, row.batch())
    for layer, wanted in zip(moe_layers(loaded).values(), moe_layers(saved).values(), strict=True):
        assert type(layer.router) is type(wanted.router)
        for argument, value in ROUTER_ROWS[name].arguments.items():
            assert getattr(layer.router, argument) == value


def test_shared_experts_and_capacity_come_back(tmp_path):
    row = TEXT_ROWS["llama"]
    saved = trained(row.build(), config_of(num_shared_experts=2, capacity_factor=1.5))
    save_moe(saved, tmp_path)
    loaded = load_moe(tmp_path)
    assert_same(loaded, saved, row.batch())
    for layer in moe_layers(loaded).values():
        assert (layer.shared_experts.num_experts, layer.capacity_factor) == (2, 1.5)


def test_a_custom_router_comes_back(tmp_path):
    row = TEXT_ROWS["llama"]
    saved = trained(row.build(), config_of(router=partial(LoudRouter, volume=3.0)))
    save_moe(saved, tmp_path)
    loaded = load_moe(tmp_path)
    assert [(type(layer.router), layer.router.volume) for layer in moe_layers(loaded).values()] == [
        (LoudRouter, 3.0)
    ] * 2
    assert_same(loaded, saved, row.batch())


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("no_such_module.Router", "cannot be imported here"),
        ("test_saving.NoSuchRouter", "cannot be imported here"),
        ("JustAName", "cannot be imported here"),
        ("torch.nn.Linear", "is no Router"),
        ("os.system", "is no Router"),
    ],
)
def test_a_router_that_is_not_there_is_refused(class_path, message, tmp_path):
    save_moe(trained(TEXT_ROWS["llama"].build(), config_of()), tmp_path)
    edit(tmp_path, lambda config: [set_class(layer, class_path) for layer in config["recipe"]["layers"].values()])
    with pytest.raises(ValueError, match=message):
        load_moe(tmp_path)


def set_class(layer, class_path):
    layer["router"]["class_path"] = class_path


def edit(path, change):
    file = path / CONFIG_FILE
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def test_arguments_that_are_no_json_are_refused_before_anything_is_written(tmp_path):
    model = trained(TEXT_ROWS["llama"].build(), config_of(router=partial(LoudRouter, volume=torch.ones(1))))
    with pytest.raises(ValueError, match=r"LoudRouter cannot be written as JSON"):
        save_moe(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- the files ---


def test_no_pickle(tmp_path):
    save_moe(trained(TEXT_ROWS["llama"].build(), config_of()), tmp_path / "a" / "b")
    files = {file.name for file in (tmp_path / "a" / "b").iterdir()}
    assert files == {"moe_model.safetensors", CONFIG_FILE}
    config = json.loads((tmp_path / "a" / "b" / CONFIG_FILE).read_text())
    assert config["recipe"]["format"] == 1
    assert config["model"]["class"] == "LlamaForCausalLM"
    assert list(config["recipe"]["layers"]) == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_a_recipe_is_plain_python():
    row = TEXT_ROWS["llama"]
    model = trained(row.build(), config_of())
    recipe = json.loads(json.dumps(moe_recipe(model)))
    again = row.build()
    apply_recipe(again, recipe)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, row.batch()), logits(model, row.batch()))


# --- errors ---


def test_a_dense_model_has_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="no MoE layer to save"):
        save_moe(TEXT_ROWS["llama"].build(), tmp_path)


def test_the_wrong_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{CONFIG_FILE} does not exist\. Give the directory"):
        load_moe(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    save_moe(trained(TEXT_ROWS["llama"].build(), config_of()), tmp_path)
    edit(tmp_path, lambda config: config["recipe"].update(format=3, lightning_moe="9.0"))
    with pytest.raises(ValueError, match=r"format 3 was written by lightning-moe 9\.0; .* Upgrade"):
        load_moe(tmp_path)


def test_a_plain_module_needs_the_dense_one(tmp_path):
    save_moe(trained(plain_model(lambda: TwoLinear(8, 12)), config_of()), tmp_path)
    with pytest.raises(ValueError, match="pass model="):
        load_moe(tmp_path)


def deeper():
    return nn.Sequential(*plain_model(lambda: TwoLinear(8, 12)), nn.Linear(3, 3))


def headless():
    return plain_model(lambda: TwoLinear(8, 12))[:3]


@pytest.mark.parametrize("build", [deeper, headless])
def test_a_dense_model_with_other_parameters_does_not_fit(build, tmp_path):
    save_moe(trained(plain_model(lambda: TwoLinear(8, 12)), config_of()), tmp_path)
    with pytest.raises(ValueError, match="the weights do not fit"):
        load_moe(tmp_path, model=build())


def test_a_dense_model_without_the_layers_does_not_fit(tmp_path):
    save_moe(trained(plain_model(lambda: TwoLinear(8, 12)), config_of()), tmp_path)
    with pytest.raises(ValueError, match=r"'2\.ffn' matches none"):
        load_moe(tmp_path, model=plain_model(lambda: TwoLinear(8, 12))[:2])


def test_the_width_of_the_dense_model_does_not_matter(tmp_path):
    # nothing of its FFNs is left
    saved = trained(plain_model(lambda: TwoLinear(8, 12)), config_of())
    save_moe(saved, tmp_path)
    loaded = load_moe(tmp_path, model=plain_model(lambda: TwoLinear(8, 16)))
    assert_same(loaded, saved, FAMILY_ROWS["two_linear"].batch())


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_another_number_of_experts_gives_one_clear_error(strict):
    row = TEXT_ROWS["llama"]
    four, six = row.build(), row.build()
    upcycle(four, config_of())
    upcycle(six, UpcycleConfig(num_experts=6))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp.*that is 6 experts; this model has \(4, 48, 16\)"):
        four.load_state_dict(six.state_dict(), strict=strict)


def test_a_dense_checkpoint_gives_one_clear_error():
    row = TEXT_ROWS["llama"]
    dense, moe = row.build(), row.build()
    upcycle(moe, config_of())
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp: the checkpoint is that of a dense model"):
        moe.load_state_dict(dense.state_dict())


def test_a_part_of_a_checkpoint_loads():
    row = TEXT_ROWS["llama"]
    first, second = (trained(row.build(), config_of()) for _ in range(2))
    gates = {key: value for key, value in first.state_dict().items() if key.endswith("router.gate")}
    assert len(gates) == 2
    assert not second.load_state_dict(gates, strict=False).unexpected_keys
    assert all(torch.equal(second.state_dict()[key], gate) for key, gate in gates.items())


def test_the_right_checkpoint_loads():
    row = TEXT_ROWS["llama"]
    first, second = (trained(row.build(), config_of()) for _ in range(2))
    assert not torch.equal(logits(first, row.batch()), logits(second, row.batch()))
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(first, row.batch()), logits(second, row.batch()))
    assert all(isinstance(second.get_submodule(name), MoELayer) for name in row.names)
