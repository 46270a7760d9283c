"""Kill a run at any step, resume it, and the curve is the one it would have been: bit for bit."""

import signal
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_fixtures import ForeignModule, batches, logged, run_command, small_config, train_text, trainer_of
from torch.utils.data import DataLoader

from lightning_moe import MoEUpcycleCallback

pytestmark = pytest.mark.slow


class StopError(Exception):
    pass


def stop():
    raise StopError


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["plain", "noise"])
def whole(request, tmp_path_factory):
    """The run that nothing happens to; its routers draw random numbers, or none do."""
    folder = tmp_path_factory.mktemp("resume")
    trainer, module, losses = train_text(folder, "whole", noise=request.param)
    assert trainer.global_step == 14
    assert len(losses) == 14
    return folder, request.param, module.state_dict(), losses, logged(trainer.logger.log_dir)


def check_continuation(whole, resumed, first_step):
    """The steps after `first_step` are those of the whole run: losses, weights, statistics."""
    _, _, weights, losses, statistics = whole
    trainer, module, continued = resumed
    assert trainer.global_step == 14
    assert continued == {step: loss for step, loss in losses.items() if int(step) > first_step}
    for name, value in weights.items():
        assert module.state_dict()[name].equal(value), name
    # what is logged after the checkpoint, with the counts from before it that were not logged yet
    after = {step: values for step, values in statistics.items() if step >= first_step}
    assert after
    assert timeless(logged(trainer.logger.log_dir)) == timeless(after)


def timeless(statistics):
    """All but the speed of the run."""
    return {
        step: {key: value for key, value in values.items() if "_per_second" not in key}
        for step, values in statistics.items()
    }


def test_the_noise_matters(whole):
    """With noise the routers draw: the same run from another state of the generator is another run."""
    folder, noise, _, losses, _ = whole
    if not noise:
        pytest.skip("nothing is drawn")
    _, _, quiet = train_text(folder, "quiet", noise=0.0)
    assert quiet != losses


@pytest.mark.parametrize("end_at", [5, 10])
def test_resumed_after_an_exception(whole, end_at):
    """In the middle of the first epoch and of the second; step 9 is between two logs."""
    folder, noise, *_ = whole
    name = f"stopped{end_at}"
    with pytest.raises(StopError):
        train_text(folder, name, noise=noise, end=stop, end_at=end_at)
    saved = end_at // 3 * 3
    path = next((folder / name).glob(f"*step={saved}.ckpt"))
    (folder / f"{name}.txt").unlink()
    check_continuation(whole, train_text(folder, name, noise=noise, ckpt_path=str(path)), saved)


def test_resumed_at_the_end_of_an_epoch(whole):
    folder, noise, *_ = whole
    path = folder / "epoch_end.ckpt"
    with pytest.raises(StopError):
        train_text(folder, "epochs", noise=noise, end=stop, end_at=8)
    state = torch.load(next((folder / "epochs").glob("*step=6.ckpt")), weights_only=True)
    assert state["global_step"] == 6
    torch.save(state, path)
    (folder / "epochs.txt").unlink()
    check_continuation(whole, train_text(folder, "epochs", noise=noise, ckpt_path=str(path)), 6)


@pytest.mark.parametrize("validates", [False, True])
def test_a_foreign_run_with_a_shuffling_loader_resumed_at_the_end_of_an_epoch(tmp_path, validates):
    """The loader takes its seed for the next epoch from the global generator, after the checkpoint was written."""

    def fit(seed, ckpt_path=None):
        seed_everything(seed)
        module = ForeignModule(attention_dropout=0.2)
        callbacks = [MoEUpcycleCallback(small_config(router={"noise_std": 0.3}))]
        callbacks.append(ModelCheckpoint(tmp_path / str(seed), save_top_k=-1, filename="{epoch}"))
        trainer = trainer_of(tmp_path, callbacks, max_epochs=3, enable_checkpointing=True)
        shuffled = DataLoader(batches(5), batch_size=None, shuffle=True)
        val = DataLoader(batches(2, seed=8), batch_size=None) if validates else None
        trainer.fit(module, shuffled, val, ckpt_path=ckpt_path)
        return module.state_dict()

    whole = fit(1)
    # another seed: what is the same afterwards, the checkpoint has brought
    resumed = fit(2, ckpt_path=str(tmp_path / "1" / "epoch=0.ckpt"))
    assert all(resumed[name].equal(value) for name, value in whole.items())


KILLED = """
import sys
from lightning_fixtures import kill_self, train_text

train_text(sys.argv[1], "killed", noise=float(sys.argv[2]), end=kill_self, end_at=10)
"""


def test_resumed_after_sigkill(whole):
    """Another process is killed in its second epoch; this one goes on from its last checkpoint."""
    folder, noise, _, losses, _ = whole
    if not noise:
        pytest.skip("the harder case is enough for two more processes")
    script = Path(folder, "killed.py")
    script.write_text(KILLED)
    died = run_command([sys.executable, str(script), str(folder), str(noise)], timeout=120, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    diary = folder / "killed.txt"
    # two processes agree on the ten steps before
    assert dict(line.split() for line in diary.read_text().splitlines()) == dict(list(losses.items())[:10])
    diary.unlink()
    resumed = train_text(folder, "killed", noise=noise, ckpt_path=str(folder / "killed" / "last.ckpt"))
    check_continuation(whole, resumed, 9)
