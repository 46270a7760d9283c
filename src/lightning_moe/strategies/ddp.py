"""DDP, set up for a Mixture of Experts."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy


class MoEDDPStrategy(DDPStrategy):
    """Data parallelism: every rank holds the whole model, and the gradients are averaged.

    The experts of a layer are stacked tensors, so that one without a token has a gradient of zeros and not none:
    ``find_unused_parameters``, which would search the graph in every step, stays off. Gradients live in the buckets
    that are reduced, and not beside them, which saves one copy of them.

    Args:
        gradient_as_bucket_view: whether gradients live in the buckets.
        kwargs: of `DDPStrategy` and of torch's `DistributedDataParallel`.

    Example:
        >>> MoEDDPStrategy(process_group_backend="gloo").process_group_backend
        'gloo'
    """

    def __init__(self, *, gradient_as_bucket_view: bool = True, **kwargs: Any) -> None:
        super().__init__(gradient_as_bucket_view=gradient_as_bucket_view, **kwargs)
