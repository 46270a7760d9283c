import gzip
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_moe import corpus
from lightning_moe.data import TextDataModule
from lightning_moe.routing import MoEWarning

WORDS = {"<unk>": 0, "<eos>": 1, "<bos>": 2, "<sep>": 3, **{f"w{i}": i + 4 for i in range(200)}}


def tokenizer_of(words=WORDS, eos_token="<eos>", **special):
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=eos_token, **special)


def documents_of(count, longest=13, seed=0):
    """Documents of 1 to `longest` words; document i has no other word than w<i>."""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, count)
    return [" ".join([f"w{i}"] * length) for i, length in enumerate(lengths)]


def pack(documents, block_size, separator=1):
    """The rule written out: tokens, a separator between documents, blocks, no incomplete block."""
    row = []
    for number, document in enumerate(documents):
        row += [separator] * (number > 0) + [WORDS[word] for word in document.split()]
    return [row[i : i + block_size] for i in range(0, len(row) - block_size + 1, block_size)]


def write_jsonl(path, documents, column="text"):
    path.write_text("".join(json.dumps({column: document, "id": 7}) + "\n" for document in documents))
    return path


def blocks_of(loader):
    return [block for batch in loader for block in batch["input_ids"].tolist()]


@pytest.fixture
def module(tmp_path):
    """Makes a TextDataModule over 60 documents, small in everything, unless told otherwise."""

    def make(setup=True, **changes):
        if not {"data_files", "dataset"} & changes.keys():
            changes["data_files"] = write_jsonl(tmp_path / "corpus.jsonl", documents_of(60))
        options = {"tokenizer": tokenizer_of(), "block_size": 8, "batch_size": 2, "val_fraction": 0.2, "num_proc": 1}
        made = TextDataModule(**{**options, "cache_dir": tmp_path / "cache", **changes})
        if setup:
            made.setup("fit")
        return made

    return make


# Packing


@pytest.mark.parametrize("block_size", [2, 7, 8, 64])
def test_blocks_are_the_documents_with_separators_between(module, tmp_path, block_size):
    documents = documents_of(60)
    made = module(
        data_files=write_jsonl(tmp_path / "train.jsonl", documents),
        val_files=str(write_jsonl(tmp_path / "val.jsonl", documents[:40])),
        block_size=block_size,
        batch_size=1,
    )
    assert sorted(blocks_of(made.train_dataloader())) == sorted(pack(documents, block_size))
    (val,) = made.val_dataloader()
    assert blocks_of(val) == pack(documents[:40], block_size)


def test_row_that_fills_its_blocks_exactly_has_no_separator_at_its_end(module, tmp_path):
    documents = ["w1 w2 w3 w4", "w5 w6 w7"]
    made = module(data_files=write_jsonl(tmp_path / "a.jsonl", documents), block_size=4, batch_size=1, val_fraction=0.0)
    assert sorted(blocks_of(made.train_dataloader())) == [[1, 9, 10, 11], [5, 6, 7, 8]]


def test_batch_is_ids_and_equal_labels(module):
    batch = next(iter(module().train_dataloader()))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (2, 8)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    batch["labels"][:] = -100
    assert (batch["input_ids"] != -100).all()


def test_empty_documents_are_left_out(module, tmp_path):
    documents = ["w1 w2", "", None, "   ", "w3 w4"]
    made = module(data_files=write_jsonl(tmp_path / "a.jsonl", documents), block_size=5, batch_size=1, val_fraction=0.0)
    assert blocks_of(made.train_dataloader()) == [[5, 6, 1, 7, 8]]


def test_special_tokens_of_the_tokenizer_are_not_added(module, tmp_path):
    tokenizer = tokenizer_of(bos_token="<bos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 2)])
    assert tokenizer("w1")["input_ids"] == [2, 5]
    files = write_jsonl(tmp_path / "a.jsonl", ["w1", "w2"])
    made = module(tokenizer=tokenizer, data_files=files, block_size=3, batch_size=1, val_fraction=0.0)
    assert blocks_of(made.train_dataloader()) == [[5, 1, 6]]


@pytest.mark.parametrize(
    ("tokenizer", "separator", "wanted"),
    [
        (tokenizer_of(), None, 1),
        (tokenizer_of(bos_token="<bos>"), "<sep>", 3),
        (tokenizer_of(eos_token=None, bos_token="<bos>"), None, 2),
        (tokenizer_of({**WORDS, "<|endoftext|>": 900}, eos_token=None), None, 900),
    ],
)
def test_separator(module, tmp_path, tokenizer, separator, wanted):
    files = write_jsonl(tmp_path / "a.jsonl", ["w1", "w2"])
    made = module(
        tokenizer=tokenizer, separator=separator, data_files=files, block_size=3, batch_size=1, val_fraction=0.0
    )
    assert blocks_of(made.train_dataloader()) == [[5, wanted, 6]]


def test_separator_that_does_not_exist(module):
    with pytest.raises(ValueError, match=r"separator=None.*no eos or bos.*pass a token"):
        module(tokenizer=tokenizer_of(eos_token=None))
    with pytest.raises(ValueError, match=r"'<nope>'.*no token of the tokenizer.*<eos>"):
        module(separator="<nope>")


# Files


def test_every_kind_of_file_in_the_given_order(module, tmp_path):
    (tmp_path / "1.txt").write_text("w1\n\nw2 w3\n")
    (tmp_path / "2.py").write_text("w4\r\nw5")
    with gzip.open(tmp_path / "3.txt.gz", "wt") as file:
        file.write("w6 w7")
    with gzip.open(tmp_path / "4.jsonl.gz", "wt") as file:
        file.write('{"text": "w8"}\n{"text": "w9"}\n')
    datasets.Dataset.from_dict({"text": ["w10", "w11"]}).to_parquet(tmp_path / "5.parquet")
    (tmp_path / "6 [x].txt").write_text("w12")
    (tmp_path / "7.jsonl").write_text("")
    files = [tmp_path / "[1-5].*", str(tmp_path / "6 [x].txt"), tmp_path / "7.jsonl", tmp_path / "1.txt"]
    documents = ["w1 w2 w3", "w4 w5", "w6 w7", "w8", "w9", "w10", "w11", "w12"]
    made = module(data_files=files, block_size=19, batch_size=1, val_fraction=0.0)
    assert blocks_of(made.train_dataloader()) == pack(documents, 19)


def test_dataset_takes_the_train_split_and_the_named_column(module, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", documents_of(60), column="body")
    write_jsonl(tmp_path / "set" / "test.jsonl", ["w150 w150"], column="body")
    made = module(dataset=str(tmp_path / "set"), text_column="body", val_fraction=0.0, batch_size=1)
    assert sorted(blocks_of(made.train_dataloader())) == sorted(pack(documents_of(60), 8))
    assert not list((tmp_path / "hub").rglob("cache-*")), "tokens were left in the cache of `datasets`"


@pytest.mark.slow
def test_several_processes_give_the_tokens_of_one(module):
    one = module()
    three = module(cache_dir=one.cache_dir / "three", num_proc=3)
    assert len(list(three.cache_dir.iterdir())) == 1
    assert blocks_of(three.train_dataloader()) == blocks_of(one.train_dataloader())


# Splits and domains


def test_split_is_by_document_and_follows_the_seed(module):
    def split(seed):
        made = module(seed=seed)
        return blocks_of(made.train_dataloader()), blocks_of(made.val_dataloader()[0])

    everything = pack(documents_of(60), 8)
    train, val = split(0)
    assert len(val) == round(0.2 * len(everything))
    # An odd last block would not fill a batch of two.
    assert len(everything) - len(val) - len(train) in (0, 1)
    # The separator, and the one document that is cut.
    shared = {token for block in train for token in block} & {token for block in val for token in block}
    assert len(shared - {1}) <= 1
    assert split(0) == (train, val)
    assert split(1)[1] != val


@pytest.mark.parametrize("seed", range(5))
def test_drawn_documents_come_last(seed):
    lengths = np.random.default_rng(9).integers(1, 14, 60)
    order = corpus.draw_last(lengths, 70, seed).tolist()
    assert sorted(order) == list(range(60))
    # Back from the end until the documents, and the separators between them, have 70 tokens.
    num_drawn = next(k for k in range(1, 61) if sum(lengths[order[-k:]]) + k - 1 >= 70)
    rest, drawn = order[:-num_drawn], order[-num_drawn:]
    assert rest == sorted(rest)
    assert drawn[1:] == sorted(drawn[1:])
    assert drawn != list(range(60 - num_drawn, 60))


def test_split_of_one_document_cuts_it(module, tmp_path):
    (tmp_path / "one.txt").write_text(" ".join(f"w{i}" for i in range(43)))
    made = module(data_files=tmp_path / "one.txt", block_size=4, batch_size=1)
    train, val = sorted(blocks_of(made.train_dataloader())), blocks_of(made.val_dataloader()[0])
    assert train + val == pack([" ".join(f"w{i}" for i in range(43))], 4)
    assert len(val) == 2


def test_domains_train_together_and_validate_apart(module, tmp_path):
    documents = documents_of(60)
    files = {
        "odd": write_jsonl(tmp_path / "odd.jsonl", documents[1::2]),
        "even": [write_jsonl(tmp_path / "even.jsonl", documents[::2])],
    }
    made = module(data_files=files, batch_size=1)
    assert made.val_names == ["odd", "even"]
    for parity, loader in zip((1, 0), made.val_dataloader(), strict=True):
        words = {token - 4 for block in blocks_of(loader) for token in block if token > 3}
        assert words
        assert {word % 2 for word in words} == {parity}
    train = blocks_of(made.train_dataloader())
    wanted = sum(len(pack(d, 8)) - round(0.2 * len(pack(d, 8))) for d in (documents[1::2], documents[::2]))
    assert len(train) == wanted
    parities = [next(token % 2 for token in block if token > 3) for block in train]
    assert 0 < sum(parities[: wanted // 2]) < wanted // 2, "the domains are not mixed"


def test_val_names(module, tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", documents_of(20))
    assert module(setup=False).val_names == ["val"]
    assert module(val_files={"x": corpus, "y": corpus}, setup=False).val_names == ["x", "y"]
    assert module(data_files={"x": corpus}, val_files=corpus, setup=False).val_names == ["val"]
    made = module(val_fraction=0.0)
    assert made.val_names == made.val_dataloader() == []


# Cache


def test_cache_is_used_for_the_same_content_and_any_split(module, tmp_path, monkeypatch):
    first = blocks_of(module().train_dataloader())
    shutil.copy(tmp_path / "corpus.jsonl", tmp_path / "copy.jsonl")
    monkeypatch.setattr(corpus, "_write_tokens", lambda *_: pytest.fail("tokenised again"))
    assert blocks_of(module(data_files=tmp_path / "copy.jsonl").train_dataloader()) == first
    module(block_size=5, seed=3, separator="<sep>", val_fraction=0.5, batch_size=1)


def test_cache_is_not_used_for_other_content_tokenizer_or_column(module, tmp_path):
    path = tmp_path / "a.jsonl"
    options = {"data_files": path, "block_size": 2, "batch_size": 1, "val_fraction": 0.0}
    path.write_text('{"text": "w1 w2", "more": "w5 w6"}\n')
    status = path.stat()
    assert blocks_of(module(**options).train_dataloader()) == [[5, 6]]
    assert blocks_of(module(**options, text_column="more").train_dataloader()) == [[9, 10]]
    other = {word: 300 - number for word, number in WORDS.items()}
    assert blocks_of(module(**options, tokenizer=tokenizer_of(other)).train_dataloader()) == [[295, 294]]
    # Same name, size and time of change.
    path.write_text('{"text": "w3 w4", "more": "w5 w6"}\n')
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert blocks_of(module(**options).train_dataloader()) == [[7, 8]]


def test_killed_preparation_leaves_no_half_cache(module, monkeypatch):
    made = module(setup=False)
    child = os.fork()
    if child == 0:
        # As by SIGKILL: after the tokens are written, before their lengths are.
        monkeypatch.setattr(np, "save", lambda *_: os._exit(9))
        made.prepare_data()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [entry.name[:12] for entry in made.cache_dir.iterdir()] == [".unfinished-"]
    made.setup()
    assert len(blocks_of(made.train_dataloader())) > 0


def test_two_preparations_at_once(module, monkeypatch):
    made, write = module(setup=False), corpus._write_tokens

    def write_and_lose_the_race(*args):
        write(*args)
        monkeypatch.setattr(corpus, "_write_tokens", write)
        made.prepare_data()

    monkeypatch.setattr(corpus, "_write_tokens", write_and_lose_the_race)
    made.setup()
    assert len(list(made.cache_dir.iterdir())) == 1
    assert blocks_of(made.train_dataloader()) == blocks_of(module().train_dataloader())


def test_blocks_are_pickled_without_their_tokens(module):
    blocks = module().val_dataloader()[0].dataset
    first = blocks[0]
    copy = pickle.loads(pickle.dumps(blocks))
    assert "tokens" not in vars(copy.dataset)
    assert torch.equal(copy[0], first)


# Order


def test_order_follows_seed_and_epoch_alone(module):
    def order(epoch, seed=0, **changes):
        loader = module(seed=seed, val_fraction=0.0, **changes).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return blocks_of(loader)

    torch.manual_seed(1)
    first = order(0)
    torch.manual_seed(2)
    assert order(0) == first == order(0, num_workers=2)
    assert order(1) != first
    assert order(0, seed=1) not in (first, order(1))
    assert sorted(order(0, batch_size=1)) == sorted(order(1, batch_size=1)) == sorted(pack(documents_of(60), 8))


def test_global_random_state_is_left_alone(module):
    made = module()
    before = torch.get_rng_state()
    blocks_of(made.train_dataloader())
    blocks_of(made.val_dataloader()[0])
    assert torch.equal(torch.get_rng_state(), before)


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_files": None}, "data_files=None and dataset=None; give exactly one"),
        ({"dataset": "x", "data_files": "y"}, "data_files='y' and dataset='x'; give exactly one"),
        ({"data_files": "nowhere.txt"}, "data_files: no file is or matches 'nowhere.txt'"),
        ({"data_files": {"code": ["nowhere/*.py"]}}, r"data_files\['code'\]: no file .*'nowhere/\*.py'"),
        ({"data_files": {}}, "data_files: the dictionary has no domain"),
        ({"data_files": []}, "data_files: the list has no file"),
        ({"val_files": "nowhere.txt"}, "val_files: no file is or matches 'nowhere.txt'"),
        ({"text_column": "body"}, "no column text_column='body'; the columns are text, id"),
        ({"block_size": 100_000}, r"data_files: \d+ tokens make 0 block\(s\) of block_size=100000, fewer than the 2"),
        ({"block_size": 300}, r"data_files: \d+ tokens make 1 block\(s\) of block_size=300, fewer than the 2"),
        ({"block_size": 1}, "block_size=1; give at least 2"),
        ({"batch_size": 0}, "batch_size=0; give at least 1"),
        ({"num_proc": 0}, "num_proc=0; give at least 1"),
        ({"seed": -1}, "seed=-1; give at least 0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0; give 0 <= val_fraction < 1"),
    ],
)
def test_errors(module, changes, message):
    with pytest.raises(ValueError, match=message):
        module(**changes)


def test_errors_in_files(module, tmp_path):
    for name, content, message in [
        ("empty.txt", b"", "holds no text"),
        ("blank.jsonl", b'{"text": ""}\n', "holds no text"),
        ("bytes.txt", b"\xff\xfe\x00\x81", "bytes.txt.*cannot be read as text.*utf-8"),
        ("broken.jsonl", b'{"text": ', "broken.jsonl.*cannot be read as json"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            module(data_files=tmp_path / name)
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(TypeError, match="text_column='text' holds int64, not text"):
        module(data_files=tmp_path / "numbers.jsonl")
    with pytest.raises(ValueError, match=r"is a folder; give its files, such as '.*/\*\.jsonl'"):
        module(data_files=tmp_path)


def test_dataset_out_of_reach(module):
    with pytest.raises(ValueError, match=r"dataset='no/where', dataset_config=None: cannot be loaded: .*data_files"):
        module(dataset="no/where")


def test_batch_that_cannot_be_filled(module):
    with pytest.raises(ValueError, match=r"\d+ training block\(s\) make no batch of batch_size=999 on 1 rank\(s\)"):
        module(batch_size=999).train_dataloader()


def test_setting_without_effect_warns(module):
    with pytest.warns(MoEWarning, match="dataset_config='en' has no effect without `dataset`"):
        module(dataset_config="en", setup=False)


@pytest.mark.slow
def test_lightning_cli_builds_it(tmp_path):
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    config = tmp_path / "run.yaml"
    config.write_text(
        "data:\n  class_path: lightning_moe.data.TextDataModule\n  init_args:\n    tokenizer: some/name\n"
        "    data_files: {code: [a.py, 'src/*.py'], prose: b.txt}\n    val_files: c.txt\n    cache_dir: here\n"
        "    separator: '<|endoftext|>'\n    block_size: 16\n"
    )
    args = [f"--config={config}", "--data.batch_size=3", "--trainer.logger=false"]
    made = LightningCLI(BoringModel, save_config_callback=None, run=False, args=args).datamodule
    assert isinstance(made, TextDataModule)
    assert made.data_files == {"code": ["a.py", "src/*.py"], "prose": "b.txt"}
    assert (made.val_files, made.batch_size, made.block_size) == ("c.txt", 3, 16)
    assert (made.tokenizer, made.separator) == ("some/name", "<|endoftext|>")


# Resuming


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Recorder(LightningModule):
    """Trains one number and keeps the batches that it trained on; checkpoints say how many they came after."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.fail_at = [], fail_at

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append(batch["input_ids"].tolist())
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["seen"] = len(self.seen)


def fit(datamodule, *, ckpt_path=None, callbacks=(), fail_at=None, **options):
    recorder = Recorder(fail_at)
    trainer = Trainer(**QUIET, callbacks=list(callbacks), enable_checkpointing=bool(callbacks), **options)
    trainer.fit(recorder, datamodule=datamodule, ckpt_path=ckpt_path)
    return recorder.seen


class SaveAtValidation(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"val-{trainer.fit_loop.total_batch_idx}.ckpt")


def every_checkpoint(folder):
    """Checkpoints of every step, every epoch's end and every validation."""
    options = {"dirpath": folder, "save_top_k": -1, "auto_insert_metric_name": False}
    return [
        SaveAtValidation(folder),
        ModelCheckpoint(**options, filename="step-{epoch}-{step}", every_n_train_steps=1),
        ModelCheckpoint(**options, filename="epoch-{epoch}-{step}", every_n_epochs=1, save_on_train_epoch_end=True),
    ]


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        pytest.param({}, {"max_epochs": 3}, id="epochs"),
        pytest.param({}, {"max_steps": 11}, id="steps"),
        pytest.param({}, {"max_epochs": 3, "limit_val_batches": 0}, id="epochs, no validation"),
        pytest.param({}, {"max_steps": 11, "limit_val_batches": 0}, id="steps, no validation"),
        pytest.param({}, {"max_epochs": 3, "val_check_interval": 2}, id="validation in the epoch"),
        pytest.param({}, {"max_epochs": 3, "accumulate_grad_batches": 2}, id="accumulation"),
        pytest.param({}, {"max_epochs": 3, "limit_train_batches": 3}, id="limit, epochs"),
        pytest.param({}, {"max_epochs": 3, "limit_train_batches": 1}, id="one batch"),
        pytest.param({}, {"max_steps": 9, "limit_train_batches": 3, "limit_val_batches": 0}, id="limit, steps"),
        pytest.param({"val_fraction": 0.0}, {"max_steps": 14}, id="nothing to validate"),
        pytest.param({}, {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}, id="reloading"),
        pytest.param({"num_workers": 2}, {"max_epochs": 3}, id="workers", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_sees_the_batches_it_would_have_seen(module, tmp_path, changes, options):
    changes = {"batch_size": 10, **changes}
    whole = fit(module(setup=False, **changes), callbacks=every_checkpoint(tmp_path / "ckpt"), **options)
    per_epoch = options.get("limit_train_batches", len(module(**changes).train_dataloader()))
    assert len(whole) > 2 * per_epoch, "three epochs are wanted"
    assert whole[:per_epoch] != whole[per_epoch : 2 * per_epoch] != whole[2 * per_epoch :]
    checkpoints = sorted((tmp_path / "ckpt").iterdir())
    assert len(checkpoints) > 5
    # Starting workers is slow; the checkpoints that are left are of all three kinds.
    for checkpoint in checkpoints[:: 4 if "num_workers" in changes else 1]:
        seen = torch.load(checkpoint)["seen"]
        resumed = fit(module(setup=False, **changes), ckpt_path=checkpoint, **options)
        assert resumed == whole[seen:], f"{checkpoint.name}, saved after {seen} batches"


@pytest.mark.parametrize("fail_at", [0, 2, 7, 8, 9])
def test_interrupted_step_is_done_again(module, tmp_path, fail_at):
    whole = fit(module(setup=False, batch_size=6), max_epochs=3)
    assert len(whole) == 3 * 8, "the ninth step is the first of an epoch"
    saving = OnExceptionCheckpoint(tmp_path)
    # Without it the Trainer removes the checkpoint that it resumes from.
    saving.teardown = lambda *_, **__: None
    with pytest.raises(SystemExit):
        fit(module(setup=False, batch_size=6), max_epochs=3, callbacks=[saving], fail_at=fail_at)
    resumed = fit(module(setup=False, batch_size=6), max_epochs=3, ckpt_path=saving.ckpt_path)
    assert resumed == whole[fail_at:]


@pytest.mark.parametrize("options", [{"max_epochs": 4}, {"max_steps": 18}, {"max_steps": 18, "limit_val_batches": 0}])
def test_run_that_is_resumed_again_and_again(module, tmp_path, options):
    changes = {"batch_size": 9}
    whole = fit(module(setup=False, **changes), **options)
    seen, checkpoint = [], None
    for life, kind in enumerate(["epoch", "step", "epoch", "step"]):
        folder = tmp_path / str(life)
        lived = fit(module(setup=False, **changes), callbacks=every_checkpoint(folder), ckpt_path=checkpoint, **options)
        checkpoint = sorted(folder.glob(f"{kind}-*"), key=lambda path: path.stat().st_mtime_ns)[0]
        seen += lived[: torch.load(checkpoint)["seen"]]
    seen += fit(module(setup=False, **changes), ckpt_path=checkpoint, **options)
    assert seen == whole


def test_second_run_with_the_same_datamodule_starts_anew(module):
    made = module(setup=False)
    first = fit(made, max_epochs=2)
    assert fit(made, max_epochs=2) == first
    assert len(blocks_of(made.train_dataloader())) == len(first), "after the fit, by hand"


def test_resume_with_other_settings(module, tmp_path):
    fit(module(setup=False), callbacks=every_checkpoint(tmp_path / "ckpt"), max_epochs=1)
    middle, end = tmp_path / "ckpt" / "step-0-2.ckpt", next((tmp_path / "ckpt").glob("epoch-0-*"))
    for change, words in [
        ({"batch_size": 3}, "batch_size was 2 and is 3"),
        ({"block_size": 7}, "block_size was 8 and is 7"),
        ({"seed": 5}, "seed was 0 and is 5"),
        ({"separator": "<sep>"}, "separator was 1 and is 3"),
        ({"val_fraction": 0.4}, "num_blocks was"),
        ({"data_files": write_jsonl(tmp_path / "b.jsonl", documents_of(60, seed=1))}, "corpus was"),
    ]:
        with pytest.raises(ValueError, match=rf"other data: .*{words}.*middle of an epoch.*restore the settings"):
            fit(module(setup=False, **change), ckpt_path=middle, max_epochs=2)
    with pytest.warns(MoEWarning, match=r"batch_size was 2 and is 3. Training goes on with the new data"):
        assert fit(module(setup=False, batch_size=3), ckpt_path=end, max_epochs=2)
    trainer = Trainer(**QUIET, enable_checkpointing=False)
    trainer.validate(Recorder(), datamodule=module(setup=False, batch_size=3), ckpt_path=middle, verbose=False)


# Ranks


RANKS = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_data import TextDataModule, every_checkpoint, fit, tokenizer_of

folder, rank = Path({folder!r}), sys.argv[1]
def run(**options):
    made = TextDataModule(tokenizer=tokenizer_of(), data_files=folder / "corpus.jsonl", block_size=8, batch_size=2,
                          val_fraction=0.2, cache_dir=folder / "cache", num_proc=1, num_workers={workers})
    seen = fit(made, strategy="ddp", devices=2, max_epochs=2, **options)
    sampler = type(made.trainer.train_dataloader.sampler).__name__
    val = [batch["input_ids"].tolist() for loader in made.trainer.val_dataloaders for batch in loader]
    return {{"seen": seen, "val": val, "sampler": sampler}}
whole = run(callbacks=every_checkpoint(folder / "ckpt"))
resumed = run(ckpt_path=folder / "ckpt" / "step-0-3.ckpt")
(folder / f"{{rank}}.json").write_text(json.dumps([whole, resumed]))
"""


@pytest.mark.slow
def test_ranks_share_one_permutation(module, tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", documents_of(60))
    script = tmp_path / "script.py"
    script.write_text(RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path), workers=0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "PYTHONPATH": ":".join(sys.path)}
    ranks = [
        subprocess.Popen([sys.executable, script, rank], env={**os.environ, **common, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    (first, first_again), (second, second_again) = (json.loads((tmp_path / f"{r}.json").read_text()) for r in "01")

    alone = fit(module(setup=False, batch_size=4), max_epochs=2)
    steps = len(alone) // 2
    assert first["sampler"] == second["sampler"] == "_RankSampler", "Lightning has replaced the sampler"
    assert len(first["seen"]) == len(second["seen"]) == 2 * steps
    for ours, theirs, together in zip(first["seen"], second["seen"], alone, strict=True):
        assert sorted(ours + theirs) == sorted(together)
    assert first_again["seen"] == first["seen"][3:]
    assert second_again["seen"] == second["seen"][3:]
    assert len(first["val"]) == len(second["val"])
    halves = [block for run in (first, second) for batch in run["val"] for block in batch]
    whole = blocks_of(module().val_dataloader()[0])
    assert sorted(halves) == sorted(whole[: len(whole) // 2 * 2])

    with pytest.raises(ValueError, match="num_ranks was 2 and is 1"):
        fit(module(setup=False), ckpt_path=tmp_path / "ckpt" / "step-0-3.ckpt", max_epochs=2)
