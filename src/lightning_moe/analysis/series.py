"""How the routing of the same tokens changes over a series of checkpoints."""

from collections.abc import Mapping, Sequence

from lightning_moe.analysis.collect import LayerCounts
from lightning_moe.analysis.results import CheckpointAnalysis
from lightning_moe.metrics import RouterSaturation, RoutingChangeRate, max_violation


def compare_checkpoints(runs: Sequence[tuple[str, Mapping[str, LayerCounts]]]) -> list[CheckpointAnalysis]:
    """Compares each checkpoint with the last one and with the one before it.

    Args:
        runs: name and layers of each checkpoint, oldest first, all with the same batches and their selections kept.

    Raises:
        ValueError: if two checkpoints differ in their layers or in the number of their experts.
    """
    last_name, last = runs[-1]
    results = []
    previous: Mapping[str, LayerCounts] | None = None
    for name, layers in runs:
        if _shape(layers) != _shape(last):
            raise ValueError(
                f"{name} has {_told(layers)}, {last_name} has {_told(last)}: not checkpoints of one model. Give "
                "checkpoints of one run."
            )
        pairs = [(layers[key], last[key]) for key in last]
        steps = None if previous is None else [(layers[key], previous[key]) for key in last]
        results.append(
            CheckpointAnalysis(
                name=name,
                saturation=[_over_batches(RouterSaturation(), *pair) for pair in pairs],
                saturation_top1=[_over_batches(RouterSaturation(top_k=1), *pair) for pair in pairs],
                change=None if steps is None else [_over_batches(RoutingChangeRate(), *step) for step in steps],
                max_violation=[float(max_violation(layers[key].load.compute())) for key in last],
                routing_entropy=[float(layers[key].entropy.compute()) for key in last],
            )
        )
        previous = layers
    return results


def _over_batches(metric: RouterSaturation, layer: LayerCounts, reference: LayerCounts) -> float:
    for one, other in zip(layer.selections, reference.selections, strict=True):
        metric.update(one.routing(), other.routing())
    return float(metric.compute())


def _shape(layers: Mapping[str, LayerCounts]) -> dict[str, tuple[int, int]]:
    return {name: (counts.num_experts, counts.selections[0].chosen.shape[1]) for name, counts in layers.items()}


def _told(layers: Mapping[str, LayerCounts]) -> str:
    experts = sorted({counts.num_experts for counts in layers.values()})
    return f"{len(layers)} MoE layers of {' or '.join(map(str, experts))} experts, the first {next(iter(layers))}"
