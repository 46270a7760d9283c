"""The global random generators: their state, and how to leave it alone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Reads the state of every global generator, as what a checkpoint can hold without pickled classes."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts every global generator where `random_state` found it."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numpy_keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(numpy_keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Whatever the ``with`` block draws, and however it seeds: afterwards every global generator is where it was.

    Example:
        >>> before = torch.get_rng_state()
        >>> with kept_random_state():
        ...     _ = torch.manual_seed(1), random.random()
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
