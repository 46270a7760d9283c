"""Initialisers of a router's rows."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.checks import check_positive, check_whole
from lightning_moe.initializers.base import gate_parameter, randn
from lightning_moe.routers import Router

Inputs = Sequence[Float[Tensor, "_ D"]]


class RouterInit(ABC):
    """Fills the rows of a router's gate, one per expert.

    Every argument of ``__init__`` is kept unchanged under its own name.

    Raises:
        ValueError: at `upcycle`, if the router has no rows of the hidden width, one per expert.
    """

    needs_inputs: ClassVar[bool] = False
    """Looks at hidden states of a calibration batch, see `upcycle`."""

    needs_domains: ClassVar[bool] = False
    """Takes each calibration batch for a domain: they are chosen, not drawn from the training data."""

    @abstractmethod
    def rows(
        self, num_experts: int, hidden_size: int, generator: torch.Generator, inputs: Inputs | None
    ) -> Float[Tensor, "E D"]:
        """Makes the rows, in float32.

        Args:
            num_experts: E.
            hidden_size: D.
            generator: the layer's own source of random numbers, on the CPU.
            inputs: hidden states that reached the FFN, one tensor for each calibration batch.
        """

    @torch.no_grad()
    def __call__(self, router: Router, generator: torch.Generator, inputs: Inputs | None = None) -> None:
        """Writes the rows into the router's gate."""
        gate = gate_parameter(router, router.num_experts)
        if gate is None or gate.shape[1] != router.hidden_size:
            raise ValueError(
                f"{type(self).__name__} fills a gate with one row of {router.hidden_size} numbers per expert, which "
                f"{type(router).__name__} has not. Leave router_init out, or take TopKRouter, SigmoidRouter, "
                "LossFreeRouter or NoisyTopKRouter."
            )
        gate.copy_(self.rows(router.num_experts, router.hidden_size, generator, inputs))


class NormalRouterInit(RouterInit):
    """Rows of normal numbers, ``N(0, std^2)``: what most routers begin with.

    Reference: Muennighoff et al., *OLMoE*, 2024, https://arxiv.org/abs/2409.02060, with a standard deviation of 0.02.

    Args:
        std: standard deviation.

    Raises:
        ValueError: if ``std`` is not above 0.

    Example:
        >>> NormalRouterInit(0.02).rows(4, 8, torch.Generator().manual_seed(0), None).shape
        torch.Size([4, 8])
    """

    def __init__(self, std: float = 0.02) -> None:
        if not 0 < std < math.inf:
            raise ValueError(f"std={std}: wanted a number > 0. For rows of zeros take ZeroRouterInit.")
        self.std = std

    def rows(
        self, num_experts: int, hidden_size: int, generator: torch.Generator, inputs: Inputs | None
    ) -> Float[Tensor, "E D"]:
        """Draws the rows."""
        return randn((num_experts, hidden_size), generator, torch.zeros(())) * self.std


class ZeroRouterInit(RouterInit):
    """Rows of zeros but for what breaks the ties: all scores are equal, and yet tokens choose differently.

    Rows of plain zeros would tie, and the tie be broken the same way for all tokens: the same K experts would get them
    all, and only these train. So the rows are normal numbers, small enough that no weight shows them.

    Reference: He et al., *Upcycling Large Language Models into Mixture of Experts*, 2024,
    https://arxiv.org/abs/2410.07524, for weights that are equal at the start, with which a softmax that is not
    normalised again is exact up to a factor.

    Args:
        tie_breaking: standard deviation of the rows.

    Raises:
        ValueError: if ``tie_breaking`` is not above 0.

    Example:
        >>> bool(ZeroRouterInit().rows(4, 8, torch.Generator().manual_seed(0), None).abs().max() < 1e-3)
        True
    """

    def __init__(self, tie_breaking: float = 1e-4) -> None:
        check_positive(tie_breaking=tie_breaking)
        self.tie_breaking = tie_breaking

    def rows(
        self, num_experts: int, hidden_size: int, generator: torch.Generator, inputs: Inputs | None
    ) -> Float[Tensor, "E D"]:
        """Draws the rows."""
        return randn((num_experts, hidden_size), generator, torch.zeros(())) * self.tie_breaking


class OrthogonalRouterInit(RouterInit):
    """Rows at right angles, each as long as a row of ``N(0, std^2)`` is on average.

    Reference: Saxe et al., *Exact Solutions to the Nonlinear Dynamics of Learning in Deep Linear Neural Networks*,
    2013, https://arxiv.org/abs/1312.6120, for orthogonal weights in general.

    Args:
        std: as of normal rows.

    Raises:
        ValueError: if ``std`` is not above 0; at `upcycle`, if there are more experts than channels.

    Example:
        >>> rows = OrthogonalRouterInit(1.0).rows(4, 4, torch.Generator().manual_seed(0), None)
        >>> bool(torch.allclose(rows @ rows.T, 4 * torch.eye(4), atol=1e-5))
        True
    """

    def __init__(self, std: float = 0.02) -> None:
        check_positive(std=std)
        self.std = std

    def rows(
        self, num_experts: int, hidden_size: int, generator: torch.Generator, inputs: Inputs | None
    ) -> Float[Tensor, "E D"]:
        """Draws normal rows and makes them orthogonal."""
        if num_experts > hidden_size:
            raise ValueError(
                f"OrthogonalRouterInit: {num_experts} experts cannot have orthogonal rows of {hidden_size} numbers. "
                f"Take at most {hidden_size} experts, or NormalRouterInit."
            )
        drawn = randn((hidden_size, num_experts), generator, torch.zeros(()))
        columns: Tensor = torch.linalg.qr(drawn).Q
        return columns.t() * self.std * math.sqrt(hidden_size)


class CentroidRouterInit(RouterInit):
    """Rows that point to domains: row e is the mean hidden state of domain e, off the mean of all.

    The hidden states are those that reach the FFN, normalised; ``upcycle(..., calibration=[batch, ...])`` gives one
    batch for each expert: prompts that describe a domain, or texts of it.

    Reference: the hidden-state initialisation of mergekit's ``mergekit-moe``,
    https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md, taken behind the norm, where the router reads.

    Args:
        std: the rows are as long as those of ``N(0, std^2)`` are on average.

    Raises:
        ValueError: if ``std`` is not above 0; at `upcycle`, if there are not as many batches as experts, or two of
            them are alike.

    Example:
        >>> inputs = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
        >>> rows = CentroidRouterInit(1.0).rows(2, 2, torch.Generator(), inputs)
        >>> (inputs[0] @ rows.T).argmax().item(), (inputs[1] @ rows.T).argmax().item()
        (0, 1)
    """

    needs_inputs = True
    needs_domains = True

    def __init__(self, std: float = 0.02) -> None:
        check_positive(std=std)
        self.std = std

    def rows(
        self, num_experts: int, hidden_size: int, generator: torch.Generator, inputs: Inputs | None
    ) -> Float[Tensor, "E D"]:
        """Takes the mean of each batch."""
        assert inputs is not None
        if len(inputs) != num_experts:
            raise ValueError(
                f"CentroidRouterInit: {len(inputs)} calibration batch{'' if len(inputs) == 1 else 'es'} for "
                f"{num_experts} experts; give one batch for "
                "each expert."
            )
        means = torch.stack([F.normalize(domain.float(), dim=1).mean(0) for domain in inputs])
        _check_distinct(means)
        return _scaled(means - means.mean(0), self.std)


class KMeansRouterInit(RouterInit):
    """Rows that point to clusters of the layer's own inputs, found by k-means on a calibration batch.

    Reference: Chu et al., *Enhancing Mixture-of-Experts Specialization via Cluster-Aware Upcycling*, 2026,
    https://arxiv.org/abs/2604.13508, for rows from clusters. Differs from it: centroids are taken off the mean of all,
    and the experts are another initialiser's.

    Args:
        std: the rows are as long as those of ``N(0, std^2)`` are on average.
        num_iterations: iterations of k-means.

    Raises:
        ValueError: if a number is not above 0; at `upcycle`, if there are fewer tokens than experts.

    Example:
        >>> KMeansRouterInit(num_iterations=5).needs_inputs
        True
    """

    needs_inputs = True

    def __init__(self, std: float = 0.02, num_iterations: int = 10) -> None:
        check_positive(std=std)
        check_whole(num_iterations=num_iterations)
        self.std = std
        self.num_iterations = num_iterations

    def rows(
        self, num_experts: int, hidden_size: int, generator: torch.Generator, inputs: Inputs | None
    ) -> Float[Tensor, "E D"]:
        """Clusters the normalised inputs."""
        assert inputs is not None
        points = F.normalize(torch.cat(list(inputs)).float(), dim=1)
        if len(points) < num_experts:
            raise ValueError(f"KMeansRouterInit: {len(points)} tokens for {num_experts} experts; give more text.")
        centres = points[torch.randperm(len(points), generator=generator)[:num_experts].to(points.device)]
        for _ in range(self.num_iterations):
            nearest = torch.cdist(points, centres).argmin(1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, points)
            counts = torch.bincount(nearest, minlength=num_experts).unsqueeze(1)
            # a centre without a point stays where it is
            centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        return _scaled(centres - points.mean(0), self.std)


def _check_distinct(means: Float[Tensor, "E D"]) -> None:
    # experts with equal rows tie for every token; a row that is the mean of all points nowhere
    apart = torch.cdist(means, means).fill_diagonal_(math.inf)
    if len(means) > 1 and bool(apart.min() < 1e-5):
        one, other = divmod(int(apart.argmin()), len(means))
        raise ValueError(
            f"CentroidRouterInit: calibration batches {one} and {other} have the same mean hidden state, so their "
            "experts would have equal rows. Give each expert text of a domain of its own."
        )


def _scaled(rows: Float[Tensor, "E D"], std: float) -> Float[Tensor, "E D"]:
    return F.normalize(rows, dim=1) * std * math.sqrt(rows.shape[1])


ROUTER_INITIALIZERS: tuple[type[RouterInit], ...] = (
    NormalRouterInit,
    ZeroRouterInit,
    OrthogonalRouterInit,
    CentroidRouterInit,
    KMeansRouterInit,
)
