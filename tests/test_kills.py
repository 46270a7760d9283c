"""Two processes, one or all of them killed: the job ends with an error, and goes on as if nothing had happened."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_fixtures import STRATEGIES, run
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_fixtures import Diary, kill_self, run_command, run_script, small_config

from lightning_moe.checkpoints import read_checkpoint
from lightning_moe.replacing import UNFINISHED

pytestmark = pytest.mark.slow

EPOCHS, STEPS = 3, 5
# gloo's timeout is half an hour: what ends sooner has not waited for it
TIMEOUT = 60
# the strategy, and the rank that is killed in the second step of the second epoch; None: all, while they write
KILLS = [("moe_ddp", 1), ("moe_fsdp2", 0), ("moe_fsdp2", None)]


class EndInWriting(Callback):
    """From the second epoch on the kernel ends a process that writes a file of more than 30 kB."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))


def train(folder, strategy, victim="nobody", ckpt_path=None):
    """Three epochs of five steps; ``last.ckpt`` is written over at the end of each. Every rank keeps a diary."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    seed_everything(5)
    folder = Path(folder)
    diary = Diary(folder / f"diary{rank}.txt", kill_self, STEPS + 1 if victim == rank else -1)
    checkpoints = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    callbacks = [diary, checkpoints, *([EndInWriting()] if victim is None else [])]
    config = small_config(router={"noise_std": 0.3})
    run(folder, STRATEGIES[strategy](), config=config, epochs=EPOCHS, ckpt_path=ckpt_path, callbacks=callbacks,
        enable_checkpointing=True)  # fmt: skip


def straight_and_resumed(folder):
    """The runs that nothing happens to, with their first checkpoints; then those that were killed go on."""
    torch.set_num_threads(1)
    for strategy in dict(KILLS):
        train(Path(folder, strategy), strategy)
    for strategy, victim in KILLS:
        place = Path(folder, f"{strategy}-{victim}")
        train(place, strategy, ckpt_path="last")


KILLED = """
import sys
import torch
from test_kills import train

torch.set_num_threads(1)
train(sys.argv[1], sys.argv[2], victim=eval(sys.argv[3]))
"""


def diaries(place):
    return [dict(line.split() for line in (place / f"diary{rank}.txt").read_text().splitlines()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Each killed run: how it ended, after how many seconds, what it left; then the same runs to their end."""
    folder = tmp_path_factory.mktemp("kills")
    found = {}
    for strategy, victim in KILLS:
        place = folder / f"{strategy}-{victim}"
        place.mkdir()
        (folder / "killed.py").write_text(KILLED)
        begin = time.monotonic()
        command = [sys.executable, str(folder / "killed.py"), str(place), strategy, str(victim)]
        died = run_command(command, timeout=2 * TIMEOUT, check=False)
        state = read_checkpoint(place / "last.ckpt")
        left = sum(path.is_file() for path in (place / UNFINISHED).rglob("*"))
        found[strategy, victim] = (died.returncode, time.monotonic() - begin, state, left, diaries(place))
        for rank in (0, 1):
            (place / f"diary{rank}.txt").unlink()
    run_script("import sys\nfrom test_kills import straight_and_resumed as go\ngo(sys.argv[1])\n", folder, folder,
               timeout=240)  # fmt: skip
    return folder, found


@pytest.mark.parametrize(("strategy", "victim"), KILLS)
def test_the_job_ends_with_an_error_and_no_hang(killed, strategy, victim):
    code, seconds, *_ = killed[1][strategy, victim]
    assert code != 0
    assert seconds < TIMEOUT


@pytest.mark.parametrize(("strategy", "victim"), KILLS)
def test_the_checkpoint_before_is_whole(killed, strategy, victim):
    _, _, state, left, written = killed[1][strategy, victim]
    assert state["global_step"] == STEPS
    if victim is None:
        # the second one had begun
        assert left > 0
        assert list(written[0]) == [str(step) for step in range(1, 2 * STEPS + 1)]
    else:
        assert list(written[victim]) == [str(step) for step in range(1, STEPS + 2)]


@pytest.mark.parametrize(("strategy", "victim"), KILLS)
def test_it_goes_on_bit_for_bit(killed, strategy, victim):
    folder, found = killed
    whole, resumed = diaries(folder / strategy), diaries(folder / f"{strategy}-{victim}")
    before = found[strategy, victim][-1]
    for rank in (0, 1):
        assert before[rank].items() <= whole[rank].items()
        assert resumed[rank] == {step: loss for step, loss in whole[rank].items() if int(step) > STEPS}
    ends = [read_checkpoint(place / "last.ckpt") for place in (folder / strategy, folder / f"{strategy}-{victim}")]
    assert ends[0]["global_step"] == EPOCHS * STEPS
    assert all(torch.equal(ends[1]["state_dict"][name], value) for name, value in ends[0]["state_dict"].items())
    assert not (folder / f"{strategy}-{victim}" / UNFINISHED).exists()
