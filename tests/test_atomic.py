"""A checkpoint is whole or not there, whenever the process is killed."""

import os
import signal
import sys
import time

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from lightning_fixtures import ForeignModule, batches, loader, run_command, small_config, trainer_of

from lightning_moe import MoEUpcycleCallback, replacing
from lightning_moe.atomic import AtomicCheckpointIO
from lightning_moe.replacing import UNFINISHED, begin, finish


class StopError(Exception):
    pass


def stop(*_):
    raise StopError


def put(path, text):
    """One file, or a directory of two."""
    if path.suffix == ".dir":
        (path / "inner").mkdir(parents=True)
        (path / "a").write_text(text)
        (path / "inner" / "b").write_text(text)
    else:
        path.write_text(text)


def text_of(path):
    if path.is_dir():
        texts = {(path / "a").read_text(), (path / "inner" / "b").read_text()}
        assert len(texts) == 1
        return texts.pop()
    return path.read_text()


def write(target, name, text):
    """Content of the kind that `name` says, in the place of whatever is there."""
    with replacing.replacing(target) as temporary:
        put(temporary.with_name(name), text)
        os.rename(temporary.with_name(name), temporary) if name != temporary.name else None


KINDS = ["x", "x.dir"]


@pytest.fixture(params=["at once", "in two steps"])
def exchange(request, monkeypatch):
    if request.param == "in two steps":
        monkeypatch.setattr(replacing, "_exchange_at_once", lambda first, second: False)


@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", [None, *KINDS])
def test_the_new_takes_the_place_of_the_old(tmp_path, old, new, exchange):
    target = tmp_path / "last.ckpt"
    if old is not None:
        write(target, old, "old")
        assert text_of(target) == "old"
    write(target, new, "new")
    assert text_of(target) == "new"
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_an_error_leaves_the_old(tmp_path, old, new, monkeypatch):
    target = tmp_path / "last.ckpt"
    write(target, old, "old")
    monkeypatch.setattr(os, "rename", stop)
    with pytest.raises(StopError):
        write(target, f"other{new}", "half")
    assert text_of(target) == "old"


def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path):
    (tmp_path / "first.ckpt").write_text("first")
    (tmp_path / "last.ckpt").symlink_to("first.ckpt")
    write(tmp_path / "last.ckpt", "x", "new")
    assert (tmp_path / "first.ckpt").read_text() == "first"
    assert not (tmp_path / "last.ckpt").is_symlink()


def test_what_an_earlier_run_left_is_removed_and_what_another_writes_is_not(tmp_path):
    folder = tmp_path / UNFINISHED
    put(folder / "old.dir", "half")
    (folder / "mine.ckpt").write_text("half")
    (folder / "other.ckpt").write_text("half")
    long_ago = time.time() - 1e6
    for path in [folder / "old.dir", *(folder / "old.dir").rglob("*")]:
        os.utime(path, (long_ago, long_ago))
    assert begin(tmp_path / "mine.ckpt") == folder / "mine.ckpt"
    assert os.listdir(folder) == ["other.ckpt"]


def test_killed_between_two_renames_the_old_one_is_found_again(tmp_path, monkeypatch):
    target, real = tmp_path / "last.ckpt", os.replace
    write(target, "x.dir", "old")
    monkeypatch.setattr(replacing, "_exchange_at_once", lambda first, second: False)
    temporary = begin(target)
    put(temporary.with_suffix(".dir"), "new")
    os.rename(temporary.with_suffix(".dir"), temporary)

    def stop(source, place):
        if source == temporary:
            raise StopError
        real(source, place)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(StopError):
        finish(temporary, target)
    monkeypatch.setattr(os, "replace", real)
    assert not target.exists()
    begin(tmp_path / "another.ckpt")
    assert text_of(target) == "old"


@pytest.mark.parametrize("kind", KINDS)
def test_removed_is_removed_at_once(tmp_path, kind, monkeypatch):
    write(tmp_path / "last.ckpt", kind, "old")
    seen = []
    monkeypatch.setattr(replacing, "_remove", lambda path: seen.append((tmp_path / "last.ckpt").exists()))
    replacing.remove(tmp_path / "last.ckpt")
    assert seen
    assert not any(seen)
    replacing.remove(tmp_path / "nothing")


# --- in a Trainer ---


def trained(folder, callbacks=(), steps=2, **options):
    trainer = trainer_of(
        folder, [MoEUpcycleCallback(small_config()), *callbacks], max_steps=steps, enable_checkpointing=True, **options
    )
    trainer.fit(ForeignModule(), loader(batches(4)))
    return trainer


def test_the_callback_brings_it_and_leaves_the_users_own(tmp_path):
    class Own(TorchCheckpointIO):
        pass

    assert type(trained(tmp_path).strategy.checkpoint_io) is AtomicCheckpointIO
    for own in (Own, AsyncCheckpointIO):
        assert type(trained(tmp_path, plugins=[own()]).strategy.checkpoint_io) is own


def test_the_file_is_what_lightning_writes(tmp_path):
    trainer = trained(tmp_path)
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    trainer.strategy.checkpoint_io = TorchCheckpointIO()
    trainer.save_checkpoint(tmp_path / "theirs.ckpt")
    ours, theirs = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())


@pytest.mark.parametrize("save_last", [True, "link"])
def test_the_one_before_is_removed_after_the_new_one_is_whole(tmp_path, save_last, monkeypatch):
    states = []
    names = lambda: {path.name for path in tmp_path.glob("*.ckpt")}  # noqa: E731
    real = torch.save

    def save(content, place):
        states.append(names())
        real(content, place)

    monkeypatch.setattr(torch, "save", save)
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=1, save_last=save_last)
    trained(tmp_path, [checkpoints], steps=3)
    assert names() == {"step=3.ckpt", "last.ckpt"}
    # whenever one is written, one is there
    assert states[0] == set()
    assert all(states[1:])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_what_is_unfinished_is_not_the_last_checkpoint(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / "last.ckpt").write_bytes(b"half")
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config()), checkpoints], max_steps=1,
                         enable_checkpointing=True)  # fmt: skip
    with pytest.warns(UserWarning, match="there is no last checkpoint available"):
        trainer.fit(ForeignModule(), loader(batches(1)), ckpt_path="last")
    assert trainer.global_step == 1
    assert not (tmp_path / UNFINISHED).exists()


def test_other_file_systems_are_lightnings_to_write(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", lambda self, checkpoint, path, options: seen.append(path))
    monkeypatch.setattr(TorchCheckpointIO, "remove_checkpoint", lambda self, path: seen.append(path))
    AtomicCheckpointIO().save_checkpoint({}, "memory://last.ckpt")
    AtomicCheckpointIO().remove_checkpoint("memory://last.ckpt")
    assert seen == ["memory://last.ckpt"] * 2


KILLED = """
import resource, signal, sys
import torch
from lightning_moe.atomic import AtomicCheckpointIO

torch.set_num_threads(1)
AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.full((50000,), 1.0)}}, sys.argv[1])
# the kernel ends the process in the middle of the next one
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))
AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.full((50000,), 2.0)}}, sys.argv[1])
"""


def test_killed_in_the_middle_of_a_write(tmp_path):
    path = tmp_path / "last.ckpt"
    died = run_command([sys.executable, "-c", KILLED, str(path)], check=False)
    assert died.returncode == -signal.SIGXFSZ, died.stderr
    assert (tmp_path / UNFINISHED / "last.ckpt").stat().st_size == 100000
    assert float(torch.load(path, weights_only=True)["state_dict"]["weight"][7]) == 1.0
