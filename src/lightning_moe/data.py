"""Token blocks for causal language modelling, from Hub data sets and local files, as a Lightning DataModule.

Documents are tokenised once and kept on disk as one row of tokens; blocks are cut from it when they are read. So one
cached corpus serves every block size, separator, split and seed. The order of the blocks is a function of the seed and
the epoch alone, and the place in it comes from the Trainer's own counters, so that a resumed run goes on where it was.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, Subset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_moe.corpus import Blocks, Files, TokenCache, draw_last, find_files, separator_id
from lightning_moe.routing import MoEWarning

Batch = dict[str, Int[Tensor, "B S"]]


class TextDataModule(LightningDataModule):
    """Blocks of ``block_size`` tokens for training and validating causal language models.

    Documents are tokenised without special tokens, joined with one ``separator`` between two documents, and cut into
    blocks; the incomplete last block of a domain is dropped. One document is one row of a JSONL, Parquet or Hub data
    set, or one whole file of any other kind (``.txt``, ``.py``, ..., read as UTF-8). A document is tokenised in one
    piece, so give a corpus of many documents as JSONL or Parquet, which several processes tokenise. Files may be
    compressed (``.gz``, ``.bz2``, ``.xz``, ...). Empty documents are left out.

    A batch is ``{"input_ids": (B, S), "labels": (B, S)}`` in int64, both with the same tokens: Hugging Face models
    shift the labels themselves. There is no ``attention_mask``, as blocks have no padding.

    The training order is one permutation of all blocks of all domains, a function of ``seed`` and the epoch alone;
    each rank reads its own share, and what does not fill a batch on every rank is left out of that epoch. The
    validation documents are drawn by ``seed``, in each domain, until they fill ``val_fraction`` of the blocks; the last
    document drawn is cut in two, and its first part trains. Domains are validated in one dataloader each, named by
    ``val_names``; up to (number of ranks - 1) blocks are left out, so that all ranks have equally many.

    Tokens are cached under a hash of the files' contents, the tokenizer and ``text_column``.

    Pass the DataModule itself to the Trainer (``datamodule=``), not its dataloaders: then a run that is resumed from a
    checkpoint (``ckpt_path=``) at any step sees the batches that it would have seen. Changed settings are an error in
    the middle of an epoch and a warning at its end.

    Args:
        tokenizer: name or folder of a Hugging Face tokenizer, or the tokenizer itself.
        data_files: local files to train on: a path, a glob, or a list of these; or a dictionary from domain name to
            these. Either this or ``dataset``.
        dataset: name of a data set on the Hub, or a local folder of that form; its ``train`` split is used.
        dataset_config: configuration of ``dataset``.
        text_column: column of JSONL, Parquet and Hub data that holds the text.
        block_size: tokens per block S, at least 2.
        batch_size: blocks per batch B on each rank.
        val_fraction: part of each domain's blocks that validate, 0 <= val_fraction < 1, at least one block; 0 for no
            validation. Without effect if ``val_files`` is given.
        val_files: files to validate on, in the form of ``data_files``; then all of ``data_files`` is trained on.
        separator: token between two documents; None takes the tokenizer's ``eos_token``, else its ``bos_token``, else
            ``<|endoftext|>``. For SmolLM2-Instruct pass ``<|endoftext|>``, which its pretraining used: its
            ``eos_token`` ends a chat turn.
        num_proc: processes that tokenise; None takes one per CPU, at most 8.
        num_workers: processes that load batches, per dataloader.
        cache_dir: folder of the tokenised corpora; None takes ``lightning_moe`` in the user's cache folder.
        seed: of the validation split and of the training order, >= 0.

    Raises:
        ValueError: if an argument is out of range, a file or column does not exist, a data set cannot be loaded or has
            no text, the tokenizer has no separator, or a domain is too small for one block of each kind.
        TypeError: if the text column holds something else than text.

    Example:
        >>> import tempfile
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> backend = Tokenizer(models.WordLevel({"<eos>": 0, "to": 1, "be": 2}, unk_token="<eos>"))
        >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "corpus.txt").write_text("to be " * 50)
        >>> files = {"plays": folder / "*.txt"}
        >>> data = TextDataModule(tokenizer=tokenizer, data_files=files, block_size=10, batch_size=2, cache_dir=folder)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))["input_ids"].shape, data.val_names
        (torch.Size([2, 10]), ['plays'])
    """

    def __init__(
        self,
        *,
        tokenizer: str | PreTrainedTokenizerBase,
        data_files: Files | dict[str, Files] | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        text_column: str = "text",
        block_size: int = 512,
        batch_size: int = 8,
        val_fraction: float = 0.02,
        val_files: Files | dict[str, Files] | None = None,
        separator: str | None = None,
        num_proc: int | None = None,
        num_workers: int = 0,
        cache_dir: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.data_files = data_files
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.text_column = text_column
        self.block_size = block_size
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.val_files = val_files
        self.separator = separator
        self.num_proc = num_proc
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.seed = seed
        self._check_arguments()
        self.val_names = self._validation_names()
        # The training pass that runs or ran last, and whether any batch of it was trained on.
        self._epoch = 0
        self._begun = False

    @property
    def trainer(self) -> Trainer | None:
        """The Trainer that this is attached to."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        # else Lightning says "Expected a parent", and not of whom
        if trainer is not None and not isinstance(trainer, Trainer):
            raise TypeError(
                f"{type(self).__name__} is a LightningDataModule of lightning.pytorch, which a Trainer of "
                f"{type(trainer).__module__.partition('.')[0]} does not take. Write `import lightning.pytorch as pl` "
                "instead of `import pytorch_lightning as pl` everywhere, or give the Trainer dataloaders."
            )
        self._trainer: Trainer | None = trainer

    def prepare_data(self) -> None:
        """Tokenises what is not in the cache yet."""
        self._prepare()

    def setup(self, stage: str | None = None) -> None:
        """Opens the cached tokens and cuts them into blocks."""
        separator, train, val = self._prepare()
        fraction = 0.0 if val else self.val_fraction
        splits = [self._split(place, folder, separator, fraction) for place, folder in train.items()]
        self._train: ConcatDataset = ConcatDataset([blocks for blocks, _ in splits])
        self._val = [self._split(place, folder, separator, 0.0)[0] for place, folder in val.items()]
        self._val += [blocks for _, blocks in splits if len(blocks)]
        corpus = hashlib.sha256(" ".join(folder.name for folder in train.values()).encode()).hexdigest()[:16]
        self._source = {"corpus": corpus, "separator": separator, "num_blocks": len(self._train)}

    def train_dataloader(self) -> DataLoader:
        """This rank's batches of the current epoch."""
        ranks = self._ranks()
        needed = ranks["num_replicas"] * self.batch_size
        if len(self._train) < needed:
            raise ValueError(
                f"TextDataModule: {len(self._train)} training block(s) make no batch of batch_size={self.batch_size} "
                f"on {ranks['num_replicas']} rank(s), which needs {needed}; give more text, or lower batch_size or "
                f"block_size={self.block_size}."
            )
        sampler = _RankSampler(self._train, batch_size=self.batch_size, begin=self._begin_pass, seed=self.seed, **ranks)
        # Without a Trainer nobody says how far the run is; a plain DataLoader makes Lightning warn of that on a resume.
        loader = DataLoader if self.trainer is None else _ResumableLoader
        return loader(self._train, sampler=sampler, drop_last=True, **self._loader_options())

    def val_dataloader(self) -> list[DataLoader]:
        """One dataloader per name in ``val_names``, in the same order."""
        ranks = self._ranks()
        for name, blocks in zip(self.val_names, self._val, strict=True):
            if len(blocks) < ranks["num_replicas"]:
                raise ValueError(
                    f"TextDataModule: {name!r} has {len(blocks)} validation block(s) for {ranks['num_replicas']} "
                    "ranks, each of which needs one; give more text, a larger val_fraction or a smaller block_size."
                )
        options = self._loader_options()
        return [
            DataLoader(blocks, sampler=DistributedSampler(blocks, shuffle=False, drop_last=True, **ranks), **options)
            for blocks in self._val
        ]

    def state_dict(self) -> dict[str, Any]:
        """The place in the training order, and the settings that make this order."""
        total = 0 if self.trainer is None else self.trainer.num_training_batches
        place = {"epoch": self._epoch, "batches": self._batches_done(), "epoch_batches": total}
        return {**place, "settings": self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to the saved place in the training order.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: if it was saved in the middle of an epoch and with other settings.
        """
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        saved, now = state_dict["settings"], self._settings()
        changes = [f"{key} was {saved.get(key)!r} and is {now[key]!r}" for key in now if saved.get(key) != now[key]]
        message = f"TextDataModule: the checkpoint was made with other data: {', '.join(changes)}."
        if changes and 0 < state_dict["batches"] < state_dict["epoch_batches"]:
            raise ValueError(
                f"{message} It is from the middle of an epoch, which cannot go on with these; restore the settings, "
                "resume from a checkpoint of an epoch's end, or start a new run from the weights."
            )
        if changes:
            rank_zero_warn(f"{message} Training goes on with the new data.", category=MoEWarning)
        self._epoch, self._begun = state_dict["epoch"], state_dict["batches"] > 0

    def _check_arguments(self) -> None:
        if (self.data_files is None) == (self.dataset is None):
            raise ValueError(
                f"TextDataModule: got data_files={self.data_files!r} and dataset={self.dataset!r}; give exactly one."
            )
        if self.dataset is None and self.dataset_config is not None:
            message = f"TextDataModule: dataset_config={self.dataset_config!r} has no effect without `dataset`."
            rank_zero_warn(message, category=MoEWarning)
        for name, least in {"block_size": 2, "batch_size": 1, "num_proc": 1, "num_workers": 0, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"TextDataModule: {name}={value}; give at least {least}.")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"TextDataModule: val_fraction={self.val_fraction}; give 0 <= val_fraction < 1.")

    def _validation_names(self) -> list[str]:
        if self.val_files is None and self.val_fraction == 0:
            return []
        files = self.data_files if self.val_files is None else self.val_files
        return list(files) if isinstance(files, dict) else ["val"]

    def _settings(self) -> dict[str, Any]:
        """What the training order follows from. Plain values, so that checkpoints load with ``weights_only``."""
        own = {name: getattr(self, name) for name in ("block_size", "batch_size", "seed")}
        return {**own, "num_ranks": self._ranks()["num_replicas"], **self._source}

    def _ranks(self) -> dict[str, int]:
        """Number of data-parallel ranks and which this one is: with tensor parallelism not the same as all ranks."""
        if self.trainer is not None:
            ranks = self.trainer.distributed_sampler_kwargs
        elif distributed.is_available() and distributed.is_initialized():
            ranks = {"num_replicas": distributed.get_world_size(), "rank": distributed.get_rank()}
        else:
            ranks = None
        return ranks or {"num_replicas": 1, "rank": 0}

    def _loader_options(self) -> dict[str, Any]:
        # Each iterator of a DataLoader draws a seed for its workers, by default from the global generator: a validation
        # run would change the dropout of the training steps after it.
        options = {"batch_size": self.batch_size, "num_workers": self.num_workers, "collate_fn": _collate}
        return {**options, "generator": torch.Generator().manual_seed(self.seed)}

    def _batches_done(self) -> int:
        """Batches of the running epoch that the Trainer has trained on."""
        if self.trainer is None:
            return 0
        # `completed` is one behind where checkpoints are saved, and `ready` one ahead when a step was interrupted.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.processed)

    def _begin_pass(self, epoch: int) -> tuple[int, int, int]:
        """Epoch, first batch and end of the pass over the training data that begins now.

        Passes are counted here and not taken from Lightning: a run with ``max_steps`` that resumes from a checkpoint of
        an epoch's end goes through an empty epoch first, so that Lightning's number is one too high (2.6.6).
        """
        trainer = self.trainer
        if trainer is None or not trainer.training:
            return epoch, 0, sys.maxsize
        done = self._batches_done()
        if done == 0 and trainer.current_epoch == 0:
            self._epoch = 0
        elif done == 0 and self._begun:
            self._epoch += 1
        self._begun = True
        return self._epoch, done, int(min(trainer.num_training_batches, sys.maxsize))

    def _prepare(self) -> tuple[int, dict[str, Path], dict[str, Path]]:
        """Id of the separator, and the folder with the tokens of each training and each validation corpus."""
        tokenizer = self.tokenizer
        if isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        separator = separator_id(tokenizer, self.separator)
        folder = self.cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lightning_moe")
        num_proc = self.num_proc or min(os.cpu_count() or 1, 8)
        cache = TokenCache(Path(folder).expanduser(), tokenizer, self.text_column, num_proc)
        train, val = (
            {place: cache.of_files(place, files) for place, files in find_files(argument, found).items()}
            for argument, found in (("data_files", self.data_files), ("val_files", self.val_files))
        )
        if self.dataset is not None:
            train = {f"dataset={self.dataset!r}": cache.of_dataset(self.dataset, self.dataset_config)}
        return separator, train, val

    def _split(self, place: str, folder: Path, separator: int, val_fraction: float) -> tuple[Subset, Subset]:
        """Training blocks and validation blocks of one corpus."""
        lengths = np.load(folder / "lengths.npy")
        num_tokens = int(lengths.sum()) + len(lengths) - 1
        num_blocks = num_tokens // self.block_size
        needed = 1 + (val_fraction > 0)
        if num_blocks < needed:
            raise ValueError(
                f"{place}: {num_tokens} tokens make {num_blocks} block(s) of block_size={self.block_size}, fewer than "
                f"the {needed} that training{' and validation from it need' if needed > 1 else ' needs'}; give more "
                "text or a smaller block_size."
            )
        num_train = num_blocks
        order = np.arange(len(lengths))
        if val_fraction > 0:
            num_train -= min(max(1, round(val_fraction * num_blocks)), num_blocks - 1)
            order = draw_last(lengths, num_tokens - num_train * self.block_size, self.seed)
        blocks = Blocks(folder, lengths, order, self.block_size, separator)
        return Subset(blocks, range(num_train)), Subset(blocks, range(num_train, num_blocks))


class _RankSampler(DistributedSampler):
    """This rank's share of a permutation of all blocks that is the same on every rank.

    A `DistributedSampler`, since Lightning leaves only these in place with ``use_distributed_sampler=True``.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        begin: Callable[[int], tuple[int, int, int]],
        num_replicas: int,
        rank: int,
        seed: int,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=True)
        self.batch_size = batch_size
        self.begin = begin

    def __iter__(self) -> Iterator[int]:
        epoch, first, stop = self.begin(self.epoch)
        # Not `seed + epoch`: then the second epoch of one seed would be the first of the next.
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))  # type: ignore[arg-type]
        share = order[: self.total_size][self.rank :: self.num_replicas]
        yield from share[first * self.batch_size : stop * self.batch_size].tolist()


class _ResumableLoader(DataLoader):
    """A DataLoader that begins where the Trainer's counters are."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator waits for the first batch. Lightning asks for the first iterator before it has set its counters
        # (2.6.6), and worker processes would read the sampler there and then.
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: Lightning asks for it to see that this loader can be resumed; the DataModule holds the state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


def _collate(blocks: list[Int[Tensor, " S"]]) -> Batch:
    input_ids = torch.stack(blocks)
    return {"input_ids": input_ids, "labels": input_ids.clone()}
