"""What one process and two train: a module, its batches and the callback."""

import torch
from lightning_fixtures import ForeignModule, batches, loader, small_config

from lightning_moe import LoadBalancingLoss, MoEUpcycleCallback, ZLoss

STEPS = 5


class Descending(ForeignModule):
    """By SGD, in which a gradient that is twice too large cannot hide."""

    def __init__(self):
        super().__init__(lr=0.1)
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def share(rank=0, ranks=1):
    """Of ten batches rank r of n takes r, r + n, ..."""
    return loader(batches(2 * STEPS, padding=True)[rank::ranks])


def callback():
    return MoEUpcycleCallback(small_config(), balance_losses=[LoadBalancingLoss(0.3), ZLoss(0.05)])
