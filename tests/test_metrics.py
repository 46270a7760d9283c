import math

import pytest
import reference
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from catalogue import METRIC_ROWS

from lightning_moe import ROUTING_METRICS, ExpertLoad, Routing, TopKRouter, expert_load
from lightning_moe.metrics import load_entropy, max_violation, num_dead_experts
from lightning_moe.routing import concatenate

E = 5
# the metrics come out in float32; entropies are sums of a few float32 logarithms
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}

every_metric = pytest.mark.parametrize("row", METRIC_ROWS.values(), ids=METRIC_ROWS)


def test_metrics_have_rows():
    assert {row.cls for row in METRIC_ROWS.values()} == set(ROUTING_METRICS)


def routings_of(seed=0):
    """Regular, padded, irregular, of one token, and without any; an expert that nobody chose is among them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    def regular(num_tokens, top_k, mask=None):
        logits = 2 * random(num_tokens, E)
        logits[:, 3] = -30
        scores = logits.softmax(-1)
        expert_ids = scores.topk(top_k).indices.reshape(-1)
        token_ids = torch.arange(num_tokens).repeat_interleave(top_k)
        return Routing(token_ids, expert_ids, torch.ones(len(token_ids)), logits, scores, mask, top_k)

    logits = random(3, E)
    rows = torch.tensor([2, 0, 2, 2]), torch.tensor([4, 0, 4, 1])
    irregular = Routing(*rows, torch.ones(4), logits, logits.sigmoid())  # scores that do not sum to one
    return {
        "regular": regular(7, 2),
        "padded": regular(7, 2, torch.tensor([True, False, True, True, False, False, True])),
        "irregular": irregular,
        "one_token": regular(1, 1),
        "no_token": regular(0, 2),
    }


NAMES = [name for name in routings_of() if name != "no_token"]


def truth_of(row, routings):
    return torch.as_tensor(row.truth(routings), dtype=torch.float32)


@every_metric
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_brute_force_count(row, name):
    metric, routing = row(E), routings_of()[name]
    metric.update(routing)
    torch.testing.assert_close(metric.compute(), truth_of(row, [routing]), **FLOAT32)


@every_metric
def test_accumulates_over_updates(row):
    metric, routings = row(E), list(routings_of().values())
    for routing in routings:
        metric.update(routing)
    torch.testing.assert_close(metric.compute(), truth_of(row, routings), **FLOAT32)
    metric.reset()
    metric.update(routings[0])
    torch.testing.assert_close(metric.compute(), truth_of(row, routings[:1]), **FLOAT32)


@every_metric
def test_forward_gives_the_batch_and_keeps_the_sum(row):
    metric, routings = row(E), routings_of()
    first, second = routings["regular"], routings["padded"]
    torch.testing.assert_close(metric(first), truth_of(row, [first]), **FLOAT32)
    torch.testing.assert_close(metric(second), truth_of(row, [second]), **FLOAT32)
    torch.testing.assert_close(metric.compute(), truth_of(row, [first, second]), **FLOAT32)


@every_metric
def test_one_concatenated_routing_is_many_updates(row):
    routings = [r for name, r in routings_of().items() if name != "irregular"]
    metric = row(E)
    metric.update(concatenate(routings))
    torch.testing.assert_close(metric.compute(), truth_of(row, routings), **FLOAT32)


@every_metric
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_before_any_token_it_is_finite(row):
    metric = row(E)
    metric.update(routings_of()["no_token"])
    assert bool(metric.compute().isfinite().all())


@every_metric
def test_keeps_no_graph(row):
    router, metric = TopKRouter(6, E), row(E)
    metric.update(router(torch.randn(7, 6)))
    assert not metric.compute().requires_grad
    assert not any(isinstance(v, torch.Tensor) and v.requires_grad for v in metric.metric_state.values())


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


def test_functions_take_many_layers_at_once():
    for function in (max_violation, num_dead_experts, load_entropy):
        assert function(LOADS).shape == (4,)
        torch.testing.assert_close(function(LOADS), torch.stack([function(row) for row in LOADS]))
        torch.testing.assert_close(function(LOADS.view(2, 2, 4)), function(LOADS).view(2, 2))


def test_functions_by_hand():
    assert max_violation(LOADS).tolist() == [1, 0, 3, 1.5]
    assert num_dead_experts(LOADS).tolist() == [0, 0, 3, 2]
    # at most half of the mean load of 2
    assert num_dead_experts(LOADS, threshold=0.5).tolist() == [2, 0, 3, 2]
    wanted = [1.75 / 2, 1, 0, -(0.375 * math.log2(0.375) + 0.625 * math.log2(0.625)) / 2]
    torch.testing.assert_close(load_entropy(LOADS), torch.tensor(wanted), **FLOAT32)


# --- several processes ---


def update_and_compute(rank, world_size, path):
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=world_size)
    results = {}
    for name, row in METRIC_ROWS.items():
        metric = row(E)
        for routing in list(routings_of().values())[rank::world_size]:
            metric.update(routing)
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
