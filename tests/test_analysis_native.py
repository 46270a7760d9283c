"""The analysis of models with MoE blocks of their own: likeness and studies against blocks written out by hand."""

import copy
import functools
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from analysis_fixtures import CLOSE, DATA, LENGTH, texts
from lightning_fixtures import tiny_llama, word_tokenizer
from test_native import native_model, routers_of
from torch.nn import functional as F

from lightning_moe import Experts, MoELayer, TopKRouter, analyze, record_routing, routed_layers, write_report
from lightning_moe.analysis import studies
from lightning_moe.analysis.interventions import (
    rerouted,
    tempered,
    with_next_best,
    with_random_experts,
    without_best,
)
from lightning_moe.analysis.texts import domain_batches
from lightning_moe.native import attach_native

TEXTS = {"num_tokens": 72, "sequence_length": LENGTH, "batch_size": 4}
KINDS = ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM")
K = 2


def model_of(kind, **changes):
    model = native_model(kind, **changes).eval()
    generator = torch.Generator().manual_seed(1)
    # what is zero at the start, and would hide a mistake
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("e_score_correction_bias", "proj_bias", "router.bias")):
            tensor.data.normal_(std=0.3, generator=generator)
    return model


@functools.cache
def analysed(kind):
    model = model_of(kind)
    return model, analyze(model, word_tokenizer(), data=DATA, min_count=4, **TEXTS)


def batches():
    return domain_batches(DATA, word_tokenizer(), separator=None, **TEXTS)


# --- written out ---


def expert_of(kind, experts, e, x):
    """What one expert makes of one token."""
    if kind == "GptOssForCausalLM":
        both = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ experts.down_proj[e] + experts.down_proj_bias[e]
    gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
    return experts.down_proj[e] @ (F.silu(gate) * up)


def routes_of(kind, router, x, factor=1.0):
    """The scores of one token, and its experts with their weights."""
    logits = factor * (router.weight @ x + getattr(router, "bias", 0.0))
    scores = logits.sigmoid() if kind == "DeepseekV3ForCausalLM" else logits.softmax(-1)
    if kind == "DeepseekV3ForCausalLM":
        groups = (scores + router.e_score_correction_bias).view(2, 4)
        best = int(groups.topk(2).values.sum(-1).argmax())
        chosen = [4 * best + e for e in groups[best].topk(K).indices.tolist()]
    else:
        chosen = scores.topk(K).indices.tolist()
    total = 1.0 if kind == "Qwen2MoeForCausalLM" else float(scores[chosen].sum())
    scale = 2.5 if kind == "DeepseekV3ForCausalLM" else 1.0
    return scores, {e: scale * float(scores[e]) / total for e in chosen}


def as_trained(scores, weights):
    return weights


def best_dropped(scores, weights):
    best = max(weights, key=weights.get)
    left = sum(weight for e, weight in weights.items() if e != best)
    return {e: weight * sum(weights.values()) / left for e, weight in weights.items() if e != best}


def next_for_best(scores, weights):
    best = max(weights, key=weights.get)
    following = max((e for e in range(len(scores)) if e not in weights), key=lambda e: scores[e])
    changed = {e: weight for e, weight in weights.items() if e != best}
    changed[following] = weights[best] * float(scores[following] / scores[best])
    return {e: weight * sum(weights.values()) / sum(changed.values()) for e, weight in changed.items()}


def write_out(kind, model, change, factor=1.0):
    """Puts a loop over the tokens in the place of each block's forward."""
    for decoder in model.model.layers:
        block = decoder.mlp
        (router,) = routers_of(block)

        def forward(hidden, block=block, router=router):
            rows = []
            for x in hidden.flatten(0, -2):
                routes = change(*routes_of(kind, router, x, factor))
                out = sum(weight * expert_of(kind, block.experts, e, x) for e, weight in routes.items())
                if kind == "Qwen2MoeForCausalLM":
                    out = out + block.shared_expert_gate(x).sigmoid() * block.shared_expert(x)
                if kind == "DeepseekV3ForCausalLM":
                    out = out + block.shared_experts(x)
                rows.append(out)
            out = torch.stack(rows).view_as(hidden)
            return (out, None) if kind == "GptOssForCausalLM" else out

        block.forward = forward


def losses_of(model):
    found = []
    for number in range(len(DATA)):
        ids = torch.cat([batch.input_ids for batch in batches() if batch.domain == number])
        found.append(float(model(input_ids=ids, labels=ids).loss))
    return found


STUDIES = {
    studies.UNDISTURBED: (as_trained, 1.0),
    studies.WITHOUT_BEST: (best_dropped, 1.0),
    studies.NEXT_BEST: (next_for_best, 1.0),
    f"{studies.TEMPERATURE} 0.5": (as_trained, 0.5),
    f"{studies.TEMPERATURE} 2": (as_trained, 2.0),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_studys_loss_is_that_of_the_written_out_blocks(kind):
    model, found = analysed(kind)
    losses = {study.label: list(study.loss.values()) for study in found.studies}
    assert list(losses) == [*STUDIES, studies.RANDOM]
    for label, (change, factor) in STUDIES.items():
        other = copy.deepcopy(model)
        write_out(kind, other, change, factor)
        # sums in another order, and weights that went through Python's floats
        assert losses[label] == pytest.approx(losses_of(other), rel=1e-5), label
    assert all(losses[label] != losses[studies.UNDISTURBED] for label in losses if label != studies.UNDISTURBED)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_temperature_is_the_model_with_its_router_scaled_by_hand(kind):
    model, factor = model_of(kind), 1.7
    other = copy.deepcopy(model)
    for router in routers_of(other):
        router.weight *= factor
        if kind == "GptOssForCausalLM":
            router.bias *= factor
    attach_native(model)
    ids = batches()[0].input_ids
    with tempered(model, factor), record_routing() as window:
        logits = model(input_ids=ids).logits
    assert logits.equal(other(input_ids=ids).logits)
    with record_routing() as before:
        model(input_ids=ids)
    first = next(iter(window))
    torch.testing.assert_close(window[first].logits, factor * before[first].logits, rtol=1e-5, atol=1e-6)


# --- likeness ---


def pairs_mean(values, likeness):
    pairs = [float(likeness(a, b)) for a, b in itertools.combinations(values, 2)]
    return sum(pairs) / len(pairs)


def centred_likeness(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_likeness_of_weights_and_outputs(kind):
    model, found = analysed(kind)
    cosine = partial(F.cosine_similarity, dim=0)
    other, inputs = copy.deepcopy(model), {}
    for place, decoder in enumerate(other.model.layers):
        decoder.mlp.experts.register_forward_pre_hook(
            lambda _, given, place=place: inputs.setdefault(place, []).append(given[0])
        )
    first = {batch.domain: batch.input_ids for batch in reversed(batches())}
    for domain in sorted(first):
        other(input_ids=first[domain])
    names = ["gate_up_proj", "down_proj"]
    if kind == "GptOssForCausalLM":
        names += ["gate_up_proj_bias", "down_proj_bias"]
    for place, (decoder, layer) in enumerate(zip(model.model.layers, found.layers, strict=True)):
        experts, (router,) = decoder.mlp.experts, routers_of(decoder)
        assert layer.name == f"model.layers.{place}.mlp"
        E = layer.num_experts
        vectors = [torch.cat([getattr(experts, name)[e].flatten() for name in names]) for e in range(E)]
        assert layer.weight_cosine == CLOSE(pairs_mean(vectors, cosine))
        assert layer.router_row_cosine == CLOSE(pairs_mean(router.weight, cosine))
        x = torch.cat(inputs[place])
        assert len(x) == 2 * 4 * LENGTH
        outputs = [torch.stack([expert_of(kind, experts, e, row) for row in x]) for e in range(E)]
        by_tokens = pairs_mean(outputs, lambda a, b: F.cosine_similarity(a, b, dim=-1).mean())
        assert layer.output_cosine == pytest.approx(by_tokens, abs=1e-5)
        assert layer.output_cka == pytest.approx(pairs_mean(outputs, centred_likeness), abs=1e-5)
        assert layer.output_cka_chance < 1


@torch.no_grad()
def test_experts_are_compared_on_the_states_that_reach_them():
    """As in a block that projects the states for its experts, and not for its router."""
    model = model_of("MixtralForCausalLM", num_hidden_layers=1)
    block, seen = model.model.layers[0].mlp, []

    def forward(hidden):
        x = hidden.flatten(0, 1)
        _, weights, expert_ids = block.gate(x)
        seen.append(3 * x.flip(-1))
        return block.experts(seen[-1], expert_ids, weights).view_as(hidden)

    block.forward = forward
    sizes = {**TEXTS, "num_tokens": 48}
    (layer,) = analyze(model, word_tokenizer(), data={"prose": DATA["prose"]}, studies=False, **sizes).layers
    outputs = [torch.stack([expert_of("MixtralForCausalLM", block.experts, e, x) for x in seen[-1]]) for e in range(5)]
    wanted = pairs_mean(outputs, lambda a, b: F.cosine_similarity(a, b, dim=-1).mean())
    assert layer.output_cosine == pytest.approx(wanted, abs=1e-5)


# --- what is computed is recorded, and nothing stays ---


CHANGES = {
    "without_best": lambda: without_best,
    "with_next_best": lambda: with_next_best,
    "with_random_experts": lambda: with_random_experts(torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_what_is_recorded_is_what_is_computed(change, dtype):
    # in bfloat16 its weights are bfloat16 too; grouped GEMMs want rows of 16 bytes
    model = model_of("Qwen2MoeForCausalLM", moe_intermediate_size=16).to(dtype)
    natives, seen = attach_native(model), {}
    for name, native in natives.items():
        # a hook that returned something would change what the experts get
        native.experts.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[1:]}))
    ids = batches()[0].input_ids
    with record_routing() as own:
        model(input_ids=ids)
    with rerouted(model, change()), record_routing() as window:
        model(input_ids=ids)
    assert list(window) == list(natives)
    for name, routing in window.items():
        expert_ids, weights = seen[name]
        assert routing.expert_ids.view(-1, K).equal(expert_ids)
        assert routing.weights.view(-1, K).equal(weights)
        assert weights.dtype == own[name].weights.dtype == dtype
        assert (expert_ids[:, 0] != expert_ids[:, 1]).all()
    # the first layer's router saw the same states, and each token's weights have the sum that they had
    (first, *_), (was, *_) = window.values(), own.values()
    assert first.logits.equal(was.logits)
    assert first.expert_ids.equal(was.expert_ids) == (change() is without_best)
    sums = [one.weights.view(-1, K).float().sum(1) for one in (first, was)]
    torch.testing.assert_close(*sums, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)


def test_the_change_made_last_comes_first():
    model = model_of("MixtralForCausalLM")
    attach_native(model)
    own = MoELayer(TopKRouter(32, 5, top_k=2), Experts(5, 32, 24))
    for one, given in ((model, {"input_ids": batches()[0].input_ids}), (own, {"hidden_states": torch.randn(1, 3, 32)})):
        order = []

        def note(layer, routing, number, order=order):
            order.append(number)
            return routing

        with rerouted(one, partial(note, number=1)), rerouted(one, partial(note, number=2)):
            one(**given)
        assert order[:2] == [2, 1]


INTERFERING = {name: lambda model, change=change: rerouted(model, change()) for name, change in CHANGES.items()}


@pytest.mark.parametrize(
    "interfering", [*INTERFERING.values(), partial(tempered, factor=1.7)], ids=[*CHANGES, "tempered"]
)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_model_is_as_before_whatever_happens(kind, interfering):
    model, ids = model_of(kind), batches()[0].input_ids
    attach_native(model)
    before, state = model(input_ids=ids).logits, copy.deepcopy(model.state_dict())
    places = [parameter.data_ptr() for parameter in model.parameters()]
    hooks = [len(router._forward_hooks) for router in routers_of(model)]
    other = None
    try:
        with interfering(model):
            other = model(input_ids=ids).logits
            raise RuntimeError("in the middle")
    except RuntimeError:
        pass
    assert not other.equal(before)
    assert model(input_ids=ids).logits.equal(before)
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert [len(router._forward_hooks) for router in routers_of(model)] == hooks


def test_a_change_to_uneven_rows_says_so():
    model = model_of("MixtralForCausalLM")
    attach_native(model)
    change = lambda layer, routing: replace(routing, top_k=None)  # noqa: E731
    with rerouted(model, change), pytest.raises(ValueError, match=r"model.layers.0.mlp: its experts take the same"):
        model(input_ids=batches()[0].input_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_analysis_the_model_is_what_it_was(kind, tmp_path):
    model, found = analysed(kind)
    assert all(value.equal(model_of(kind).state_dict()[key]) for key, value in model.state_dict().items())
    assert routed_layers(model) == {}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # and nothing is left out but what needs more checkpoints
    assert list(found.skipped) == ["checkpoints"]
    page = write_report(found, tmp_path).read_text()
    assert page.count("Left out") == 1
    assert (tmp_path / "studies.csv").is_file()


def test_a_model_that_was_attached_stays_so():
    model = model_of("MixtralForCausalLM", num_hidden_layers=1)
    natives = attach_native(model)
    analyze(model, word_tokenizer(), data={"prose": texts("prose")}, studies=False, **{**TEXTS, "num_tokens": 24})
    assert routed_layers(model) == natives


@torch.no_grad()
def test_a_model_with_both_kinds():
    model = model_of("MixtralForCausalLM")
    name = "model.layers.0.mlp"
    router = TopKRouter(32, 5, top_k=2, init_std=0.3)
    experts = Experts(5, 32, 24)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.model.layers[0].mlp = MoELayer(router, experts, name=name)
    found = analyze(model, word_tokenizer(), data=DATA, min_count=4, **TEXTS)
    assert [layer.name for layer in found.layers] == [name, "model.layers.1.mlp"]
    assert all(None not in (layer.weight_cosine, layer.output_cka) for layer in found.layers)
    assert list(found.skipped) == ["checkpoints"]
    assert len({study.mean_loss for study in found.studies}) == len(found.studies) == 6
    # each of the two by itself changes less than both
    sharper = next(study for study in found.studies if study.label == f"{studies.TEMPERATURE} 2")
    router.gate.mul_(2)
    for native in attach_native(model).values():
        native.router.weight.mul_(2)
    assert list(sharper.loss.values()) == pytest.approx(losses_of(model), rel=1e-5)


def test_of_a_model_whose_router_is_unknown_the_class_is_named():
    dense = tiny_llama()
    dense._can_record_outputs = transformers.DbrxPreTrainedModel._can_record_outputs
    with pytest.raises(ValueError, match=r"no MoE layer that ran. Its router \(DbrxRouter\) is not one that is known"):
        analyze(dense, word_tokenizer(), data=DATA, **TEXTS)
