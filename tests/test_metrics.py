import inspect
import math

import pytest
import reference
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from catalogue import METRIC_ROWS, NUM_EXPERTS, ROUTER_ROWS

from lightning_moe import ROUTING_METRICS, ExpertLoad, Routing, Tokens, TopKRouter, expert_load, metrics
from lightning_moe.routing import concatenate

E = NUM_EXPERTS
# The metrics come out in float32. Entropies are sums of a few float32 logarithms; cosines and CKA are of float32 inner
# products, and near 0 they have no relative precision.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}

every_metric = pytest.mark.parametrize("row", METRIC_ROWS.values(), ids=METRIC_ROWS)


def test_metrics_have_rows():
    assert {row.cls for row in METRIC_ROWS.values()} == set(ROUTING_METRICS)


def routings_of(seed=0):
    """All kinds of routing; an expert that nobody chose is among them, and padding holds nan."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    def regular(num_tokens, top_k, mask=None, **parts):
        logits = 2 * random(num_tokens, E)
        logits[:, 3] = -30
        scores = logits.softmax(-1)
        expert_ids = scores.topk(top_k).indices.reshape(-1)
        token_ids = torch.arange(num_tokens).repeat_interleave(top_k)
        if mask is not None:
            logits[~mask] = scores[~mask] = torch.nan
        return Routing(token_ids, expert_ids, torch.ones(len(token_ids)), logits, scores, mask, top_k, **parts)

    logits, wide_logits, signed_logits = random(3, E), random(4, E + 2), random(3, 2 * E)
    # token 1 has no expert, token 2 has one twice; scores that do not sum to one
    irregular = Routing(*torch.tensor([[2, 0, 2, 2], [4, 0, 4, 1]]), torch.ones(4), logits, logits.sigmoid())
    # 5 and 6 are no FFNs
    rows = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3], [0, 5, 6, 5, 1, 0, 4, 1]])
    null = Routing(*rows, torch.ones(8), wide_logits, wide_logits.softmax(-1), None, 2, num_ffn_experts=E)
    # two columns for each expert; token 0 has both of expert 1
    columns = torch.tensor([1, 6, 0, 7, 9, 4])
    rows = torch.arange(3).repeat_interleave(2), columns % E, torch.ones(6)
    signed = Routing(*rows, signed_logits, signed_logits.softmax(-1), None, 2, num_ffn_experts=E, choice_ids=columns)
    dropped = torch.arange(14) % 3 == 0
    return {
        "regular": regular(7, 2),
        "padded": regular(7, 2, torch.tensor([True, False, True, True, False, False, True])),
        "irregular": irregular,
        "dropped": regular(7, 2, dropped=dropped),
        # every expert is computed, the best two are chosen
        "gradient_only": regular(7, E, gradient_only=torch.arange(7 * E) % E > 1),
        "null": null,
        "several_columns": signed,
        "one_token": regular(1, 1),
        "no_token": regular(0, 2),
    }


NAMES = [name for name in routings_of() if name != "no_token"]


def update(metric, row, routings):
    for routing in routings:
        metric.update(*row.inputs(routing))


def truth_of(row, routings):
    columns = zip(*(row.inputs(routing) for routing in routings), strict=True)
    return torch.as_tensor(row.truth(*map(list, columns)), dtype=torch.float32)


@every_metric
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_brute_force_count(row, name):
    metric, routing = row(), routings_of()[name]
    update(metric, row, [routing])
    torch.testing.assert_close(metric.compute(), truth_of(row, [routing]), **FLOAT32)


@every_metric
def test_accumulates_over_updates(row):
    metric, routings = row(), list(routings_of().values())
    update(metric, row, routings)
    torch.testing.assert_close(metric.compute(), truth_of(row, routings), **FLOAT32)
    metric.reset()
    update(metric, row, routings[:1])
    torch.testing.assert_close(metric.compute(), truth_of(row, routings[:1]), **FLOAT32)


@every_metric
def test_forward_gives_the_batch_and_keeps_the_sum(row):
    metric, routings = row(), routings_of()
    first, second = routings["regular"], routings["padded"]
    torch.testing.assert_close(metric(*row.inputs(first)), truth_of(row, [first]), **FLOAT32)
    torch.testing.assert_close(metric(*row.inputs(second)), truth_of(row, [second]), **FLOAT32)
    torch.testing.assert_close(metric.compute(), truth_of(row, [first, second]), **FLOAT32)


@pytest.mark.parametrize("name", [name for name, row in METRIC_ROWS.items() if row.pools])
def test_one_concatenated_routing_is_many_updates(name):
    row = METRIC_ROWS[name]
    routings = [r for r in routings_of().values() if r.num_choices == E]
    metric = row()
    update(metric, row, [concatenate(routings)])
    torch.testing.assert_close(metric.compute(), truth_of(row, routings), **FLOAT32)


@every_metric
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_before_any_token_it_is_finite(row):
    metric = row()
    assert bool(metric.compute().isfinite().all())
    update(metric, row, [routings_of()["no_token"]])
    assert bool(metric.compute().isfinite().all())


@every_metric
def test_result_is_float32_and_states_are_float64(row):
    metric = row()
    update(metric, row, [routings_of()["regular"]])
    assert metric.compute().dtype == torch.float32
    assert {state.dtype for state in metric.metric_state.values()} == {torch.float64}


@every_metric
def test_keeps_no_graph(row):
    router = TopKRouter(6, E)

    def inputs():
        return row.inputs(router(torch.randn(7, 6)))

    metric = row()
    metric.update(*inputs())
    # with gradients, unlike update
    assert not metric(*inputs()).requires_grad
    assert not metric.compute().requires_grad
    assert not any(state.requires_grad for state in metric.metric_state.values())


@pytest.mark.parametrize("router", ROUTER_ROWS.values(), ids=ROUTER_ROWS)
def test_every_router_can_be_measured(router):
    tokens = Tokens(ids=torch.arange(9), mask=torch.arange(9) % 4 > 0)
    routing = router(6, E)(torch.randn(9, 6), tokens).detach()
    for row in METRIC_ROWS.values():
        metric = row()
        update(metric, row, [routing])
        assert bool(metric.compute().isfinite().all())
    # what depends on the rows alone, and so on every field that says what a row means
    for name in ("expert_load", "active_experts", "drop_rate", "router_saturation", "expert_coactivation"):
        row = METRIC_ROWS[name]
        metric = row()
        update(metric, row, [routing])
        torch.testing.assert_close(metric.compute(), truth_of(row, [routing]), **FLOAT32)


@every_metric
def test_keeps_its_arguments_under_their_names(row):
    metric = row()
    names = set(inspect.signature(row.cls).parameters) - {"kwargs"}
    assert row.arguments.keys() <= names
    for name in names:
        default = inspect.signature(row.cls).parameters[name].default
        assert getattr(metric, name) == row.arguments.get(name, default)


def test_the_load_counts_exactly_beyond_float32():
    metric = ExpertLoad(num_experts=1)
    metric.load.fill_(2**24)  # the next float32 is 2^24 + 2
    ids = torch.zeros(2, 1, dtype=torch.int64)
    metric.update(Routing(*ids, torch.ones(1), *torch.zeros(2, 1, 1)))
    assert metric.load.item() == 2**24 + 1


# --- the functions ---


@pytest.mark.parametrize("name", routings_of())
def test_expert_load_equals_the_brute_force_count(name):
    routing = routings_of()[name]
    load = expert_load(routing)
    assert load.tolist() == reference.load([routing])
    assert load.dtype == torch.float32


LOADS = torch.tensor([[4.0, 2, 1, 1], [2, 2, 2, 2], [8, 0, 0, 0], [3, 0, 5, 0]])


FUNCTIONS = (
    metrics.max_violation,
    metrics.min_violation,
    metrics.average_violation,
    metrics.load_imbalance,
    metrics.coefficient_of_variation,
    metrics.gini_coefficient,
    metrics.num_dead_experts,
    metrics.load_entropy,
    metrics.effective_experts,
)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_take_many_layers_at_once(function):
    assert function(LOADS).shape == (4,)
    torch.testing.assert_close(function(LOADS), torch.stack([function(row) for row in LOADS]))
    torch.testing.assert_close(function(LOADS.view(2, 2, 4)), function(LOADS).view(2, 2))


def test_quantiles_take_many_layers_at_once():
    quantiles = metrics.utilization_quantiles(LOADS.view(2, 2, 4), (0.0, 0.5, 1.0))
    wanted = [[0.5, 0.75, 2], [1, 1, 1], [0, 0, 4], [0, 0.75, 2.5]]
    torch.testing.assert_close(quantiles, torch.tensor(wanted).view(2, 2, 3), **FLOAT32)


def test_functions_by_hand():
    assert metrics.max_violation(LOADS).tolist() == [1, 0, 3, 1.5]
    assert metrics.load_imbalance(LOADS).tolist() == [2, 1, 4, 2.5]
    assert metrics.min_violation(LOADS).tolist() == [0.5, 0, 1, 1]
    assert metrics.average_violation(LOADS).tolist() == [0.5, 0, 1.5, 1]
    assert metrics.num_dead_experts(LOADS).tolist() == [0, 0, 3, 2]
    # at most half of the mean load of 2
    assert metrics.num_dead_experts(LOADS, threshold=0.5).tolist() == [2, 0, 3, 2]
    wanted = [1.75 / 2, 1, 0, -(0.375 * math.log2(0.375) + 0.625 * math.log2(0.625)) / 2]
    torch.testing.assert_close(metrics.load_entropy(LOADS), torch.tensor(wanted), **FLOAT32)
    torch.testing.assert_close(metrics.effective_experts(LOADS)[:3], torch.tensor([2**1.75, 4, 1]), **FLOAT32)
    torch.testing.assert_close(metrics.coefficient_of_variation(LOADS)[:3], torch.tensor([0.375, 0, 3]).sqrt())
    torch.testing.assert_close(metrics.gini_coefficient(LOADS)[:3], torch.tensor([10 / 32, 0, 0.75]), **FLOAT32)


# --- each by hand ---


def routing_from(rows, logits, **parts):
    """Of a list of each token's experts."""
    token_ids = [t for t, experts in enumerate(rows) for _ in experts]
    expert_ids = torch.tensor([e for experts in rows for e in experts])
    weights = torch.ones(len(token_ids))
    return Routing(torch.tensor(token_ids), expert_ids, weights, logits, logits.softmax(-1), **parts)


def test_coactivation_counts_all_pairs_and_not_neighbours():
    # experts 0 and 2 are never neighbours in the top-k list, and come together always
    metric = metrics.ExpertCoactivation(num_experts=4)
    metric.update(routing_from([[0, 1, 2], [2, 3, 0]], torch.zeros(2, 4)))
    wanted = [[0, 0.5, 1, 0.5], [1, 0, 1, 0], [1, 0.5, 0, 0.5], [1, 0, 1, 0]]
    assert metric.compute().tolist() == wanted


def test_coactivation_of_independent_updates_is_that_of_all_tokens():
    metric = metrics.ExpertCoactivation(num_experts=2)
    for rows in ([[0, 1]], [[0]], [[0]], [[1]]):
        metric.update(routing_from(rows, torch.zeros(1, 2)))
    torch.testing.assert_close(metric.compute(), torch.tensor([[0, 1 / 3], [1 / 2, 0]]), **FLOAT32)


def test_saturation_is_of_sets_and_not_of_ordered_slots():
    logits = torch.randn(2, 4)
    routing = routing_from([[0, 1], [2, 3]], logits)
    same, half = routing_from([[1, 0], [3, 2]], logits), routing_from([[1, 2], [3, 0]], logits)
    assert metrics.RouterSaturation()(routing, same).item() == 1
    assert metrics.RoutingChangeRate()(routing, same).item() == 0
    assert metrics.RouterSaturation()(routing, half).item() == 0.5
    assert metrics.RoutingChangeRate()(routing, half).item() == 0.5


def test_top_1_saturation_goes_by_the_scores():
    now, then = torch.tensor([[3.0, 2, 1], [3, 2, 1]]), torch.tensor([[3.0, 2, 1], [2, 3, 1]])
    rows = [[1, 0], [0, 1]]
    metric = metrics.RouterSaturation(top_k=1)
    assert metric(routing_from(rows, now), routing_from(rows, then)).item() == 0.5


def test_of_equal_scores_the_first_columns_come_first():
    # as a fixed router gives
    routing = routing_from([[6, 2, 4, 0], [5, 3]], torch.zeros(2, 7))
    chosen = metrics.chosen_choices(routing, top_k=2)
    assert chosen.nonzero().tolist() == [[0, 0], [0, 2], [1, 3], [1, 5]]


def test_saturation_of_sets_of_different_sizes_is_symmetric():
    one, three = routing_from([[0]], torch.zeros(1, 4)), routing_from([[0, 1, 2]], torch.zeros(1, 4))
    assert metrics.RouterSaturation()(one, three) == metrics.RouterSaturation()(three, one)
    assert metrics.RouterSaturation()(one, three).item() == pytest.approx(1 / 3)


def test_saturation_wants_the_same_tokens():
    with pytest.raises(ValueError, match="of 1 tokens and 4 columns, the reference of 2 and 4"):
        metrics.RouterSaturation()(routing_from([[0]], torch.zeros(1, 4)), routing_from([[0], [1]], torch.zeros(2, 4)))


def test_margin_is_at_each_tokens_own_k():
    logits = torch.tensor([[9.0, 5, 4, 0], [9, 5, 4, 0], [9, 5, 4, 0], [9, 5, 4, 0]])
    # 9 - 5, 4 - 0; all chosen and none chosen have no margin
    routing = routing_from([[0], [2, 0, 1], [0, 1, 2, 3], []], logits)
    assert metrics.RouterMargin()(routing).item() == 4


def test_confidence_of_scores_without_any_mass_is_none():
    # as a ReLU router gives
    routing = Routing(torch.tensor([0]), torch.tensor([1]), torch.ones(1), *torch.zeros(2, 1, 3))
    assert metrics.RoutingConfidence()(routing).item() == 0
    assert metrics.RoutingEntropy()(routing).item() == 0


def test_a_row_for_the_gradient_only_hides_no_selection():
    # the same token and expert, once chosen and once not
    routing = routing_from([[1, 1]], torch.zeros(1, 3))
    for gradient_only in ([True, False], [False, True]):
        routing = routing_from([[1, 1]], torch.zeros(1, 3), gradient_only=torch.tensor(gradient_only))
        assert metrics.chosen_experts(routing).tolist() == [[False, True, False]]
        assert metrics.ActiveExperts()(routing).item() == 1


def test_batch_max_violation_is_not_that_of_the_pooled_load():
    per_batch, pooled = metrics.BatchMaxViolation(), metrics.MaxViolation(num_experts=2)
    for expert in (0, 1):
        routing = routing_from([[expert]], torch.zeros(1, 2))
        per_batch.update(routing)
        pooled.update(routing)
    assert per_batch.compute().item() == 1
    assert pooled.compute().item() == 0


def test_a_domain_may_be_that_of_the_whole_batch():
    routing = routing_from([[0], [1], [1]], torch.zeros(3, 2))
    one, each = (metrics.DomainSpecialization(num_experts=2, num_domains=2) for _ in range(2))
    one.update(routing, 1)
    each.update(routing, torch.ones(3, dtype=torch.int64))
    torch.testing.assert_close(one.compute(), torch.tensor([[0, 0], [1 / 3, 2 / 3]]))
    torch.testing.assert_close(one.compute(), each.compute())


def test_specialization_wants_one_number_per_token():
    metric = metrics.VocabularySpecialization(num_experts=2, vocab_size=9)
    with pytest.raises(ValueError, match=r"of 3 tokens, got numbers of shape \(4,\)"):
        metric.update(routing_from([[0], [1], [1]], torch.zeros(3, 2)), torch.zeros(4, dtype=torch.int64))


def test_domains_with_experts_of_their_own_tell_everything():
    routing = routing_from([[0], [1], [0], [1]], torch.zeros(4, 3))
    domains = torch.tensor([0, 1, 0, 1])
    variation = metrics.DomainTotalVariation(num_experts=3, num_domains=5)
    information = metrics.DomainMutualInformation(num_experts=3, num_domains=5)
    assert variation(routing, domains).item() == 1
    assert information(routing, domains).item() == pytest.approx(math.log(2))
    assert variation(routing, domains.flip(0).sort().values).item() == 0
    assert information(routing, domains.sort().values).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_diversity_averages_over_k_times_k_minus_1_pairs(k):
    # over k * k pairs, with an expert's similarity to itself among them, orthogonal outputs would have 1 / k
    outputs = torch.eye(k).unsqueeze(1)
    assert metrics.OutputSimilarity()(outputs).item() == 0
    assert metrics.ExpertWeightCosine()([outputs]).item() == 0
    assert metrics.RouterRowCosine()(torch.eye(k)).item() == 0
    one_pair = outputs.clone()
    one_pair[1] = one_pair[0]
    assert metrics.OutputSimilarity()(one_pair).item() == pytest.approx(1 / (k * (k - 1) / 2))


def test_copies_are_alike_in_everything():
    copies = torch.randn(1, 7, 3).expand(4, 7, 3)
    assert metrics.OutputSimilarity()(copies).item() == pytest.approx(1, abs=1e-6)
    assert metrics.OutputCKA()(copies).item() == pytest.approx(1, abs=1e-6)
    assert metrics.ExpertWeightCosine()([copies]).item() == pytest.approx(1, abs=1e-6)
    assert metrics.ExpertWeightDistance()([copies], [copies]).item() == 0


def test_cka_sees_through_rotation_scale_and_shift_which_the_cosine_does_not():
    x = torch.randn(20, 3)
    rotation = torch.linalg.qr(torch.randn(3, 3)).Q
    outputs = torch.stack([x, 4 * x @ rotation + 5])
    assert metrics.OutputCKA()(outputs).item() == pytest.approx(1, abs=1e-5)
    assert metrics.OutputSimilarity()(outputs).item() < 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_and_outputs_are_compared_in_float32(dtype):
    weights = torch.randn(3, 7, 5).to(dtype)
    for metric in (metrics.OutputSimilarity, metrics.OutputCKA):
        torch.testing.assert_close(metric()(weights), metric()(weights.float()))
    torch.testing.assert_close(metrics.ExpertWeightCosine()([weights]), metrics.ExpertWeightCosine()([weights.float()]))
    assert metrics.ExpertWeightDistance()([weights], [weights.float()]).item() == 0


def test_one_expert_has_no_pair():
    assert metrics.OutputSimilarity()(torch.randn(1, 4, 3)).item() == 0
    assert metrics.ExpertWeightCosine()([torch.randn(1, 4, 3)]).item() == 0


def test_an_expert_that_was_zero_has_no_relative_distance():
    initial = torch.tensor([[0.0, 0], [1, 0]])
    assert metrics.ExpertWeightDistance()([torch.tensor([[5.0, 5], [1, 2]])], [initial]).item() == 2


def test_counterfactual_gain_takes_batches_of_sequences():
    own, other = torch.zeros(2, 3), torch.arange(6.0).view(2, 3)
    assert metrics.CounterfactualRoutingGain()(own, other).item() == 2.5
    assert metrics.CounterfactualRoutingGain()(own, other, other > 3).item() == 4.5


# --- several processes ---


def update_and_compute(rank, world_size, path):
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=world_size)
    results = {}
    for name, row in METRIC_ROWS.items():
        metric = row()
        update(metric, row, list(routings_of().values())[rank::world_size])
        results[name] = metric.compute()
    torch.save(results, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_does(tmp_path):
    mp.spawn(update_and_compute, args=(2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        for name, row in METRIC_ROWS.items():
            truth = truth_of(row, list(routings_of().values()))
            torch.testing.assert_close(results[name], truth, **FLOAT32)
