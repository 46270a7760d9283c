"""Every number of an analysis from loops over the recorded routing."""

import copy
import itertools
import math
import weakref
from collections import Counter, defaultdict
from functools import partial

import numpy as np
import pytest
import torch
from analysis_fixtures import (
    CLOSE,
    DATA,
    LENGTH,
    SIZES,
    E,
    K,
    analysis,
    analysis_of_series,
    batches_of,
    moe,
    texts,
    trained,
)
from catalogue import ROUTER_ROWS
from lightning_fixtures import VOCABULARY, tiny_llama, word_tokenizer
from sklearn.metrics import mutual_info_score
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from lightning_moe import (
    ROUTERS,
    TopKRouter,
    UniformRouter,
    UpcycleConfig,
    analyze,
    moe_layers,
    record_routing,
    upcycle,
    write_report,
)
from lightning_moe.analysis import studies
from lightning_moe.analysis.interventions import (
    rerouted,
    tempered,
    with_next_best,
    with_random_experts,
    without_best,
)
from lightning_moe.analysis.texts import domain_batches, read_texts
from lightning_moe.routing import notify, observe_routing


@pytest.fixture(scope="module")
def model():
    return trained(60)


@pytest.fixture(scope="module")
def found():
    return analysis()


@pytest.fixture(scope="module")
def series():
    return analysis_of_series()


@torch.no_grad()
def choices(model, data=DATA):
    """For each layer and token: domain, sequence, token id, experts in the order of their logits, logits."""
    records = defaultdict(list)
    for number, batch in enumerate(batches_of(data)):
        with record_routing() as window:
            model(input_ids=batch.input_ids)
        for name in window:
            ids = window[name].expert_ids.view(-1, K).tolist()
            for token, (experts, logits) in enumerate(zip(ids, window[name].logits.tolist(), strict=True)):
                sequence = (number, token // LENGTH)
                token_id = int(batch.input_ids.flatten()[token])
                records[name].append((batch.domain, sequence, token_id, experts, logits))
    return records


# --- counts ---


def test_load_entropy_and_margin_are_those_of_loops(model, found):
    for layer in found.layers:
        tokens = choices(model)[layer.name]
        load = Counter(expert for _, _, _, experts, _ in tokens for expert in experts)
        counts = [load[expert] for expert in range(E)]
        mean = len(tokens) * K / E
        assert layer.load == counts
        assert layer.experts_per_token == K
        assert layer.max_violation == CLOSE(max(counts) / mean - 1)
        assert layer.dead_experts == counts.count(0)
        entropy = -sum(c / sum(counts) * math.log(c / sum(counts)) for c in counts if c)
        assert (layer.load_entropy, layer.effective_experts) == CLOSE((entropy / math.log(E), math.exp(entropy)))
        entropies, margins = [], []
        for *_, logits in tokens:
            total = sum(math.exp(z) for z in logits)
            p = [math.exp(z) / total for z in logits]
            entropies.append(-sum(q * math.log(q) for q in p) / math.log(E))
            ranked = sorted(logits, reverse=True)
            margins.append(ranked[K - 1] - ranked[K])
        assert layer.routing_entropy == CLOSE(sum(entropies) / len(tokens))
        assert layer.router_margin == CLOSE(sum(margins) / len(tokens))


def test_load_of_each_batch_by_itself(model, found):
    for layer in found.layers:
        batches = defaultdict(Counter)
        for _, (batch, _), _, experts, _ in choices(model)[layer.name]:
            batches[batch].update(experts)
        violations = [max(load.values()) / (load.total() / E) - 1 for load in batches.values()]
        assert layer.batch_max_violation == CLOSE(sum(violations) / len(violations))


def test_domain_specialisation_is_that_of_loops(model, found):
    for layer in found.layers:
        tokens = choices(model)[layer.name]
        shares = [[0.0] * E for _ in DATA]
        sizes = Counter(domain for domain, *_ in tokens)
        for domain, _, _, experts, _ in tokens:
            for expert in experts:
                shares[domain][expert] += 1 / sizes[domain]
        assert np.array(layer.domain_shares) == CLOSE(np.array(shares))
        variation = sum(abs(a - b) / K for a, b in zip(*shares, strict=True)) / 2
        assert layer.domain_total_variation.value == CLOSE(variation)
        rows = [(domain, expert) for domain, _, _, experts, _ in tokens for expert in experts]
        assert layer.domain_mutual_information.value == CLOSE(mutual_info_score(*zip(*rows, strict=True)))


def test_vocabulary_specialisation_is_that_of_loops(model, found):
    for layer in found.layers:
        first, seen = Counter(), Counter()
        for _, _, token_id, experts, _ in choices(model)[layer.name]:
            first[token_id, experts[0]] += 1
            seen[token_id] += 1
        often = [token_id for token_id, count in seen.items() if count >= SIZES["min_count"]]
        strongest = [max(first[token_id, expert] for expert in range(E)) / seen[token_id] for token_id in often]
        assert layer.vocabulary_specialization.value == CLOSE(sum(strongest) / len(strongest))
        for expert, tokens in enumerate(layer.specialized_tokens):
            ranked = sorted((-first[x, expert] / seen[x], -seen[x], x) for x in often if first[x, expert])
            assert [(one.token_id, one.count) for one in tokens] == [(x, -count) for _, count, x in ranked[:10]]
            assert [one.share for one in tokens] == CLOSE([-share for share, _, _ in ranked[:10]])
            assert all(one.text == word_tokenizer().decode([one.token_id]) for one in tokens)


def test_coactivation_is_that_of_loops(model, found):
    for layer in found.layers:
        alone, together = Counter(), Counter()
        for *_, experts, _ in choices(model)[layer.name]:
            alone.update(experts)
            together.update(itertools.permutations(experts, 2))
        wanted = [[together[i, j] / alone[i] if alone[i] else 0.0 for j in range(E)] for i in range(E)]
        assert np.array(layer.coactivation) == CLOSE(np.array(wanted))


def test_saturation_and_change_are_those_of_loops(model, series):
    assert [one.name for one in series.checkpoints] == ["step 0", "step 10", "step 60"]
    runs = [choices(trained(0)), choices(trained(10)), choices(model)]
    for place, layer in enumerate(series.layers):
        for number, (run, checkpoint) in enumerate(zip(runs, series.checkpoints, strict=True)):
            pairs = [(now[3], last[3]) for now, last in zip(run[layer.name], runs[-1][layer.name], strict=True)]
            assert checkpoint.saturation[place] == CLOSE(sum(len({*a} & {*b}) / K for a, b in pairs) / len(pairs))
            assert checkpoint.saturation_top1[place] == CLOSE(sum(a[0] == b[0] for a, b in pairs) / len(pairs))
            if number:
                before = zip(run[layer.name], runs[number - 1][layer.name], strict=True)
                moved = [1 - len({*now[3]} & {*was[3]}) / K for now, was in before]
                assert checkpoint.change[place] == CLOSE(sum(moved) / len(moved))
            load = Counter(expert for token in run[layer.name] for expert in token[3])
            assert checkpoint.max_violation[place] == CLOSE(max(load.values()) / (load.total() / E) - 1)
    assert series.checkpoints[0].change is None
    assert series.checkpoints[-1].saturation == [1.0] * len(series.layers)


@torch.no_grad()
def test_likeness_of_weights_and_outputs(model, found):
    for layer in found.layers:
        moe_layer = moe_layers(model)[layer.name]
        experts = moe_layer.experts
        vectors = [torch.cat([w[e].flatten() for w in (experts.gate_up_proj, experts.down_proj)]) for e in range(E)]
        pairs = list(itertools.combinations(range(E), 2))
        cosines = [float(F.cosine_similarity(vectors[i], vectors[j], dim=0)) for i, j in pairs]
        assert layer.weight_cosine == CLOSE(sum(cosines) / len(pairs))
        rows = moe_layer.router.gate
        cosines = [float(F.cosine_similarity(rows[i], rows[j], dim=0)) for i, j in pairs]
        assert layer.router_row_cosine == CLOSE(sum(cosines) / len(pairs))
    x = torch.randn(7, 8)
    outputs = moe_layer.expert_outputs(x)
    for e in range(E):
        gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
        torch.testing.assert_close(outputs[e], (F.silu(gate) * up) @ experts.down_proj[e].T)


@torch.no_grad()
def test_outputs_are_compared_on_tokens_of_every_domain(model, found):
    first = {batch.domain: batch.input_ids for batch in reversed(batches_of())}
    inputs = defaultdict(list)
    for layer in moe_layers(model).values():
        layer.register_forward_pre_hook(lambda layer, given: inputs[layer.name].append(given[0].flatten(0, 1)))
    for domain in sorted(first):
        model(input_ids=first[domain])
    for layer in moe_layers(model).values():
        layer._forward_pre_hooks.clear()
    for layer in found.layers:
        outputs = moe_layers(model)[layer.name].expert_outputs(torch.cat(inputs[layer.name]))
        pairs = [F.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.combinations(outputs, 2)]
        assert layer.output_cosine == CLOSE(float(sum(pairs) / len(pairs)), abs=1e-5)
        assert layer.output_cka_chance < layer.output_cka <= 1 + 1e-5


# --- chance ---


def test_a_trained_router_is_specialised_above_chance(found):
    # the second layer is near the limit of chance after so few steps, and rounding decides on which side
    assert found.layers[0].domain_total_variation.is_above
    assert all(layer.domain_mutual_information.is_above for layer in found.layers)
    assert all(layer.vocabulary_specialization.is_above for layer in found.layers)


def test_a_router_that_looks_at_nothing_is_not():
    model = moe(router=partial(UniformRouter, top_k=K))
    layers = analyze(model, word_tokenizer(), data=DATA, studies=False, **SIZES).layers
    assert not any(layer.domain_total_variation.is_above for layer in layers)
    for layer in layers:
        assert layer.domain_total_variation.mean > 0
        # few tokens of an id look specialised by chance, and chance is what they are compared with
        assert layer.vocabulary_specialization.value > 1 / E
        assert layer.vocabulary_specialization.value == pytest.approx(layer.vocabulary_specialization.mean, abs=0.03)


def test_chance_is_the_same_every_time(model, found):
    assert analyze(model, word_tokenizer(), data=DATA, name="tiny", **SIZES) == found


# --- studies ---


class WrittenOut(torch.nn.Module):
    """An MoE layer as a loop over tokens, whose routing is a function of the logits of one token."""

    def __init__(self, layer, route):
        super().__init__()
        self.gate, self.experts, self.route = layer.router.gate, layer.experts, route

    def forward(self, hidden):
        rows = []
        for x in hidden.flatten(0, -2):
            out = torch.zeros_like(x)
            for expert, weight in self.route(self.gate @ x):
                gate, up = (self.experts.gate_up_proj[expert] @ x).chunk(2)
                out = out + weight * (self.experts.down_proj[expert] @ (F.silu(gate) * up))
            rows.append(out)
        return torch.stack(rows).view_as(hidden)


def second_only(logits):
    return [(int(logits.argsort(descending=True)[1]), 1.0)]


def second_and_third(logits):
    experts = logits.argsort(descending=True)[1:3]
    return zip(experts.tolist(), logits[experts].softmax(-1), strict=True)


def top_two(factor, logits):
    experts = logits.topk(2).indices
    return zip(experts.tolist(), (factor * logits[experts]).softmax(-1), strict=True)


@pytest.mark.parametrize(
    ("label", "route"),
    {
        studies.UNDISTURBED: partial(top_two, 1.0),
        studies.WITHOUT_BEST: second_only,
        studies.NEXT_BEST: second_and_third,
        f"{studies.TEMPERATURE} 0.5": partial(top_two, 0.5),
        f"{studies.TEMPERATURE} 2": partial(top_two, 2.0),
    }.items(),
)
@torch.no_grad()
def test_a_studys_loss_is_that_of_the_written_out_layer(model, found, label, route):
    study = next(one for one in found.studies if one.label == label)
    other = copy.deepcopy(model)
    for decoder in other.model.layers:
        decoder.mlp = WrittenOut(decoder.mlp, route)
    for number, domain in enumerate(DATA):
        ids = torch.cat([batch.input_ids for batch in batches_of() if batch.domain == number])
        assert study.loss[domain] == pytest.approx(float(other(input_ids=ids, labels=ids).loss), rel=1e-5)


def test_routing_is_worth_something_in_a_trained_model(found):
    losses = {study.label: study.mean_loss for study in found.studies}
    assert losses[studies.UNDISTURBED] < losses[studies.NEXT_BEST]
    assert losses[studies.UNDISTURBED] < losses[studies.RANDOM]


def test_random_experts_are_as_many_different_ones(model):
    layer = next(iter(moe_layers(model).values()))
    x = torch.randn(500, 8)
    own = layer.router(x)
    drawn = with_random_experts(torch.Generator().manual_seed(0))(layer, own)
    pairs = drawn.expert_ids.view(-1, K)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert torch.equal(drawn.weights, own.weights)
    assert (drawn.expert_ids.bincount(minlength=E) - 250).abs().max() < 60


def test_with_one_expert_a_token_nothing_is_left():
    model = moe(router=partial(TopKRouter, top_k=1, normalize=False))
    with rerouted(model, without_best), record_routing() as window:
        model(input_ids=batches_of()[0].input_ids)
    assert all(not window[name].weights.any() for name in window)


INTERFERING = {
    "without_best": partial(rerouted, change=without_best),
    "with_next_best": partial(rerouted, change=with_next_best),
    "tempered": partial(tempered, factor=2.0),
}


@pytest.mark.parametrize("interfering", INTERFERING.values(), ids=INTERFERING)
def test_the_model_is_as_before_whatever_happens(model, interfering):
    ids = batches_of()[0].input_ids
    before, state = model(input_ids=ids).logits, {k: v.clone() for k, v in model.state_dict().items()}
    other = None
    try:
        with interfering(model):
            other = model(input_ids=ids).logits
            raise RuntimeError("in the middle")
    except RuntimeError:
        pass
    assert not torch.equal(other, before)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(layer.router._forward_hooks for layer in moe_layers(model).values())


def test_modes_and_random_state_stay(model):
    model.train()
    state = torch.get_rng_state()
    analyze(model, word_tokenizer(), data=DATA, **SIZES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    model.eval()
    assert not any(layer._forward_pre_hooks for layer in moe_layers(model).values())


ONE_ROW_EACH = {row.cls.__name__: row for row in reversed(ROUTER_ROWS.values())}


@pytest.mark.filterwarnings("ignore:.*lets a token's routing depend on later tokens")
@pytest.mark.parametrize("router", ONE_ROW_EACH.values(), ids=ONE_ROW_EACH)
def test_every_router_is_analysed(router, tmp_path):
    model = moe(router=router)
    result = analyze(model, word_tokenizer(), data={"prose": texts("prose")}, **{**SIZES, "num_tokens": 48})
    assert {studies.UNDISTURBED, studies.WITHOUT_BEST, studies.RANDOM} <= {study.name for study in result.studies}
    assert all(math.isfinite(study.mean_loss) for study in result.studies)
    assert write_report(result, tmp_path).is_file()


def test_every_router_has_a_row():
    assert {router.__name__ for router in ROUTERS} == set(ONE_ROW_EACH)


# --- what cannot be measured ---


def test_one_domain_has_no_specialisation_and_the_page_says_so(model, tmp_path):
    result = analyze(model, word_tokenizer(), data={"prose": texts("prose")}, studies=False, **SIZES)
    assert all(layer.domain_total_variation is None for layer in result.layers)
    text = write_report(result, tmp_path).read_text()
    assert "Only one domain was given (prose)" in text
    assert "Left out: Not asked for." in text
    assert not (tmp_path / "studies.csv").exists()


def test_an_encoder_has_no_next_token_loss(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))
    upcycle(encoder, UpcycleConfig(num_experts=E))
    result = analyze(encoder, word_tokenizer(), data=DATA, **SIZES)
    assert "no causal language model" in result.skipped["studies"]
    assert "no causal language model" in write_report(result, tmp_path).read_text()


def unknown_moe():
    """A model whose MoE layers are of no known kind, and whose routing is seen all the same."""
    model, router = tiny_llama(), TopKRouter(8, E, top_k=K)
    for place, decoder in enumerate(model.model.layers):

        def tell(ffn, given, output, name=f"native.{place}"):
            notify(name, router(given[0].flatten(0, 1)), {})

        decoder.mlp.register_forward_hook(tell)
    return model


def test_of_an_unknown_model_the_page_says_what_is_left_out(tmp_path):
    result = analyze(unknown_moe(), word_tokenizer(), data=DATA, **SIZES)
    assert [layer.name for layer in result.layers] == ["native.0", "native.1"]
    assert result.layers[0].domain_total_variation is not None
    assert result.layers[0].output_cka is None
    assert result.studies == []
    text = write_report(result, tmp_path).read_text()
    assert "of LlamaForCausalLM are not known here: their routes cannot be changed." in text
    assert "of LlamaForCausalLM are not known here, and cannot be looked into." in text


def test_layers_that_do_not_run_are_left_out():
    model = moe()
    model.unused = moe().model.layers[0]
    model.unused.mlp.name = "unused.mlp"
    result = analyze(model, word_tokenizer(), data=DATA, studies=False, **SIZES)
    assert [layer.name for layer in result.layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert result.layers[0].output_cka is not None


def test_a_router_without_such_scores_says_so():
    result = analyze(moe(router=ROUTER_ROWS["sparse_mixer"]), word_tokenizer(), data=DATA, **SIZES)
    assert "SparseMixerRouter" in result.skipped["some studies"]
    assert studies.TEMPERATURE not in {study.name for study in result.studies}


def test_a_dense_model_is_refused_after_one_batch():
    dense, forwards = tiny_llama(), []
    dense.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE layer that ran"):
        analyze(dense, word_tokenizer(), data=DATA, **SIZES)
    assert len(forwards) == 1


def test_checkpoints_of_another_model_are_refused(model):
    other = moe(num_hidden_layers=1)
    with pytest.raises(ValueError, match="step 1 has 1 MoE layers of 4 experts"):
        analyze(model, word_tokenizer(), data=DATA, earlier=[("step 1", other)], **SIZES)


def test_sequences_are_no_longer_than_the_model_has_positions_for(model):
    result = analyze(model, word_tokenizer(), data=DATA, studies=False, num_tokens=256, sequence_length=100)
    assert result.sequence_length == model.config.max_position_embeddings == 64
    assert result.tokens == {"prose": 256, "code": 256}


def test_logits_are_not_kept(model):
    seen, alive = [], []

    def count(batches, what):
        for batch in batches:
            alive.append(sum(logits() is not None for logits in seen))
            yield batch

    stop = observe_routing(lambda name, routing, losses: seen.append(weakref.ref(routing.logits)))
    analyze(model, word_tokenizer(), data=DATA, earlier=[("step", model)], progress=count, **SIZES)
    stop()
    assert len(seen) > 100
    assert max(alive) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": {}}, "data: no domain"),
        ({"data": {"prose": []}}, r"data\['prose'\]: 0 token"),
        ({"num_tokens": 1}, "num_tokens=1: wanted at least 2"),
        ({"sequence_length": 1}, "sequence_length=1: wanted at least 2"),
        ({"batch_size": 0}, "batch_size=0: wanted at least 1"),
        ({"temperatures": [0.0]}, r"temperatures=\[0.0\]: wanted factors"),
        ({"separator": "<sep>"}, "separator='<sep>' is no token"),
    ],
)
def test_what_analyze_refuses(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        analyze(model, word_tokenizer(), **{"data": DATA, **SIZES, **arguments})


# --- texts ---


def test_batches_hold_the_documents_with_separators_between():
    batches = domain_batches(
        {"a": ["w1 w2 w3", "w4 w5"], "b": ["w6 w7"]},
        word_tokenizer(), num_tokens=100, sequence_length=3, batch_size=1, separator=None,
    )  # fmt: skip
    told = [(batch.domain, batch.input_ids.tolist()) for batch in batches]
    assert told == [(0, [[1, 2, 3]]), (0, [[0, 4, 5]]), (1, [[6, 7]])]


def test_documents_are_read_only_as_far_as_needed():
    def documents():
        yield "w1 " * 50
        raise AssertionError("asked for more")

    sizes = {"num_tokens": 20, "sequence_length": 10, "batch_size": 4, "separator": None}
    (batch,) = domain_batches({"a": documents()}, word_tokenizer(), **sizes)
    assert batch.input_ids.shape == (2, 10)


def test_files_are_documents_or_rows(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": ""}\n{"text": "four"}\n')
    (tmp_path / "c.txt").touch()
    (tmp_path / "d.jsonl").write_text('{"words": "five"}\n')
    (tmp_path / "e.jsonl").write_text("no json")
    paths = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.txt")]
    assert list(read_texts("data", paths, "text")) == ["one\n\ntwo", "three", "four"]
    with pytest.raises(ValueError, match="no column text_column='text'; its columns are words"):
        list(read_texts("data", [tmp_path / "d.jsonl"], "text"))
    with pytest.raises(ValueError, match=r"e.jsonl' cannot be read as json"):
        list(read_texts("data", [tmp_path / "e.jsonl"], "text"))
