import os

# before anything imports transformers or huggingface_hub: both read it once
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers for every test, alone or among others."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_configure(config):
    # Here and not in pyproject.toml: that is read, and the package imported, before jaxtyping can hook its imports.
    config.addinivalue_line("filterwarnings", "error::lightning_moe.routing.MoEWarning")
