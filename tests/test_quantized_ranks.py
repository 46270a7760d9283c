"""4-bit weights on two processes: DDP, and FSDP2, which shards them as well."""

import pickle

import pytest
import torch
from lightning_fixtures import run_script
from test_quantization import fit, qlora_config, qlora_module

from lightning_moe import quantize_frozen, upcycle

TWO_RANKS = """
import os, pickle, sys
import torch
import torch.distributed as dist
from lightning_fixtures import batches, loader
from test_quantization import fit, qlora_module

torch.set_num_threads(1)
folder, found = sys.argv[1], {}
for strategy in ("ddp", "moe_fsdp2"):
    module = qlora_module(optimizer=torch.optim.SGD)
    trainer = fit(module, folder, strategy=strategy, devices=2, use_distributed_sampler=False, count=4)
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in module.named_parameters()}
    found[strategy] = {name: p.detach().clone() for name, p in whole.items()}
    sizes = {name: (p.to_local() if hasattr(p, "to_local") else p).numel() for name, p in module.named_parameters()}
    found[strategy + " sizes"] = sizes
if trainer.is_global_zero:
    with open(folder + "/result.pkl", "wb") as file:
        pickle.dump(found, file)
dist.barrier()
"""


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    # both ranks read the same batches, so their mean gradient is that of one
    run_script(TWO_RANKS, tmp_path, tmp_path, timeout=240)
    found = pickle.loads((tmp_path / "result.pkl").read_bytes())
    module = qlora_module(optimizer=torch.optim.SGD)
    fit(module, tmp_path)
    start = qlora_module()
    upcycle(start, qlora_config())
    quantize_frozen(start)
    before = dict(start.named_parameters())
    for name, parameter in module.named_parameters():
        for strategy in ("ddp", "moe_fsdp2"):
            torch.testing.assert_close(found[strategy][name], parameter.detach(), rtol=1e-5, atol=1e-7)
        assert parameter.requires_grad != parameter.equal(before[name]), name
        if name.endswith("packed"):
            assert found["moe_fsdp2 sizes"][name] == found["ddp sizes"][name] / 2
