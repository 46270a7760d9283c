"""Text corpora as tokens on disk: finds files, tokenises them once, and cuts blocks from the result.

A corpus is kept in a folder named by a hash of its content and of what tokenised it, as one row of tokens and the
lengths of its documents.
"""

import functools
import glob
import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

Files = str | Path | list[str | Path]

# What the `datasets` builders are called by; every other suffix is read as plain text.
_BUILDERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4")


class Blocks(Dataset):
    """Blocks of one corpus, cut from its documents in a given order with a separator between two."""

    def __init__(self, folder: Path, lengths: np.ndarray, order: np.ndarray, block_size: int, separator: int) -> None:
        self.folder = folder
        self.block_size = block_size
        self.separator = separator
        # Where each document starts in the file, and where it ends, with its separator, in the row of all documents.
        self.starts = (np.cumsum(lengths) - lengths)[order]
        self.lengths = lengths[order]
        self.ends = np.cumsum(self.lengths + 1)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """All tokens of the corpus, mapped from disk."""
        return np.memmap(self.folder / "tokens.bin", dtype=np.int32, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens the file itself; a pickled memory map would carry the whole corpus.
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}

    def __getitem__(self, index: int) -> Int[Tensor, " S"]:
        begin = index * self.block_size
        block = np.full(self.block_size, self.separator, dtype=np.int64)
        document = int(np.searchsorted(self.ends, begin, side="right"))
        skip = begin - (self.ends[document] - self.lengths[document] - 1)
        filled = 0
        while filled < self.block_size:
            start, stop = self.starts[document] + skip, self.starts[document] + self.lengths[document]
            piece = self.tokens[start:stop][: self.block_size - filled]
            block[filled : filled + len(piece)] = piece
            filled += len(piece) + 1
            document, skip = document + 1, 0
        return torch.from_numpy(block)


class TokenCache:
    """Tokenised corpora on disk, each in a folder named by a hash of its content and of what tokenised it."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, text_column: str, num_proc: int) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.num_proc = num_proc
        self.identity = [_tokenizer_digest(tokenizer), text_column]

    def of_files(self, place: str, files: list[Path]) -> Path:
        """The folder with the tokens of local files."""
        content = [[builder_of(file), _file_digest(file)] for file in files]
        return self._get(content, place, functools.partial(_read_files, place, files, self.text_column))

    def of_dataset(self, name: str, config: str | None) -> Path:
        """The folder with the tokens of a data set of the Hub."""
        place = f"dataset={name!r}"
        table = _load_hub(name, config)
        # The local copy in Arrow files; nothing is downloaded a second time.
        content = ["hub", *(_file_digest(Path(file["filename"])) for file in table.cache_files)]
        return self._get(content, place, lambda _: iter([_texts(place, table, self.text_column)]))

    def _get(self, content: list, place: str, read: Callable[[str], Iterator[datasets.Dataset]]) -> Path:
        folder = self.folder / hashlib.sha256(json.dumps([self.identity, content]).encode()).hexdigest()[:32]
        if folder.is_dir():
            return folder
        self.folder.mkdir(parents=True, exist_ok=True)
        # The folder gets its name when it is complete: neither a killed preparation nor two at once leave a half one.
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=self.folder, ignore_cleanup_errors=True) as scratch:
            complete = Path(scratch, "complete")
            complete.mkdir()
            _write_tokens(place, read(scratch), self.tokenizer, self.num_proc, complete)
            try:
                complete.rename(folder)
            except OSError:
                # Another process was faster.
                if not folder.is_dir():
                    raise
        return folder


def draw_last(lengths: np.ndarray, num_tokens: int, seed: int) -> np.ndarray:
    """An order of the documents in which documents drawn at random make up the last ``num_tokens`` tokens.

    The rest keeps its order. The document in which these tokens begin comes first of those drawn.
    """
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    # k documents have k - 1 separators between them.
    num_drawn = int(np.searchsorted(np.cumsum(lengths[shuffled] + 1) - 1, num_tokens)) + 1
    drawn, rest = shuffled[:num_drawn], shuffled[num_drawn:]
    return np.concatenate([np.sort(rest), drawn[-1:], np.sort(drawn[:-1])])


def find_files(argument: str, files: Files | dict[str, Files] | None) -> dict[str, list[Path]]:
    """The files of each corpus, by its place in the arguments."""
    if files is None:
        return {}
    corpora = (
        {f"{argument}[{name!r}]": f for name, f in files.items()} if isinstance(files, dict) else {argument: files}
    )
    if not corpora:
        raise ValueError(f"{argument}: the dictionary has no domain; give at least one.")
    return {place: _expand(place, f if isinstance(f, list) else [f]) for place, f in corpora.items()}


def _expand(place: str, patterns: list[str | Path]) -> list[Path]:
    """The files behind paths and globs, each once, in a fixed order."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise ValueError(f"{place}: {str(pattern)!r} is a folder; give its files, such as '{pattern}/*.jsonl'.")
        matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise ValueError(f"{place}: no file is or matches {str(pattern)!r} from {Path.cwd()}; check the path.")
        found.update(dict.fromkeys(files))
    if not found:
        raise ValueError(f"{place}: the list has no file; give at least one.")
    return list(found)


def builder_of(file: Path) -> str:
    """Name of the `datasets` builder that reads this file."""
    suffixes = [suffix for suffix in file.suffixes if suffix not in _COMPRESSIONS]
    return _BUILDERS.get(suffixes[-1], "text") if suffixes else "text"


def _read_files(place: str, files: list[Path], column: str, scratch: str) -> Iterator[datasets.Dataset]:
    """The texts of the files in their order, as tables with one row per document."""
    for builder, group in itertools.groupby(files, key=builder_of):
        # An empty file holds no document, and the JSON builder fails on it.
        names = [glob.escape(str(file)) for file in group if file.stat().st_size]
        if not names:
            continue
        options = {"sample_by": "document"} if builder == "text" else {}
        try:
            table = datasets.load_dataset(builder, data_files=names, split="train", cache_dir=scratch, **options)
        except (datasets.exceptions.DatasetGenerationError, StopIteration) as error:
            # of a binary file the cause quotes all bytes
            cause = str(error.__cause__ or repr(error))[:200]
            raise ValueError(f"{place}: {names} cannot be read as {builder}: {cause}.") from error
        yield _texts(place, table, "text" if builder == "text" else column)


def _load_hub(name: str, config: str | None) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, config, split="train", keep_in_memory=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"dataset={name!r}, dataset_config={config!r}: cannot be loaded: {error} Check the names and the "
            "network (HF_HUB_OFFLINE, HF_TOKEN), or give local files as `data_files`."
        ) from error


def _texts(place: str, table: datasets.Dataset, column: str) -> datasets.Dataset:
    if column not in table.column_names:
        raise ValueError(
            f"{place}: no column text_column={column!r}; the columns are {', '.join(table.column_names)}. Pass one of "
            "them as `text_column`."
        )
    kind = getattr(table.features[column], "dtype", table.features[column])
    if kind not in ("string", "large_string"):
        raise TypeError(f"{place}: column text_column={column!r} holds {kind}, not text; pass a column of strings.")
    return table.select_columns([column])


def _tokenize(texts: list[str | None], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    documents = [text for text in texts if text]
    if not documents:
        return {"tokens": []}
    # `verbose` would warn of documents that are longer than the model's context.
    rows = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return {"tokens": [row for row in rows if len(row)]}


def _write_tokens(
    place: str, texts: Iterator[datasets.Dataset], tokenizer: PreTrainedTokenizerBase, num_proc: int, folder: Path
) -> None:
    """Writes the tokens of all documents end to end, and the number of tokens of each document."""
    lengths = [np.zeros(0, dtype=np.int64)]
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("int32"))})
    with (folder / "tokens.bin").open("wb") as file:
        for number, table in enumerate(texts):
            processes = min(num_proc, len(table))
            table = table.map(
                _tokenize,
                input_columns=table.column_names,
                fn_kwargs={"tokenizer": tokenizer},
                batched=True,
                remove_columns=table.column_names,
                features=features,
                num_proc=processes if processes > 1 else None,
                # Next to the result, which is the cache; nothing is left in that of `datasets`.
                cache_file_name=str(folder.parent / f"{number}.arrow"),
                new_fingerprint=f"tokens{number}",
                desc=f"Tokenising {place}",
            )
            for batch in table.with_format("arrow").iter(batch_size=1000):
                rows = batch.column("tokens").combine_chunks()
                rows.flatten().to_numpy().tofile(file)
                lengths.append(rows.value_lengths().to_numpy().astype(np.int64))
    if not sum(map(len, lengths)):
        raise ValueError(f"{place}: holds no text; give files or a data set with at least one document.")
    np.save(folder / "lengths.npy", np.concatenate(lengths))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer by its name on the Hub or its directory.

    Raises:
        ValueError: if there is none.
    """
    path = Path(name).expanduser()
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path if path.exists() else name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer: {name!r} holds none ({str(error).splitlines()[0]}). Give one that does, such as the dense "
            "model's directory."
        ) from error
    return found


def separator_id(tokenizer: PreTrainedTokenizerBase, separator: str | None) -> int:
    """Id of the token between two documents; see `TextDataModule`.

    Raises:
        ValueError: if there is no such token.
    """
    vocabulary = tokenizer.get_vocab()
    defaults = [tokenizer.eos_token, tokenizer.bos_token, "<|endoftext|>"]
    for token in defaults if separator is None else [separator]:
        if token in vocabulary:
            return int(vocabulary[token])
    problem = "the tokenizer has no eos or bos token" if separator is None else "is no token of the tokenizer"
    raise ValueError(
        f"TextDataModule: separator={separator!r}: {problem}; pass a token of its vocabulary as `separator`, such as "
        f"one of its special tokens {tokenizer.all_special_tokens}."
    )


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that the tokens of a text follow from."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left over from the last call of the tokenizer; ours sets neither.
        state = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
        content = json.dumps([state, tokenizer.split_special_tokens], sort_keys=True).encode()
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            content = b"".join(file.name.encode() + file.read_bytes() for file in sorted(Path(folder).iterdir()))
    return hashlib.sha256(type(tokenizer).__name__.encode() + content).hexdigest()


def _file_digest(file: Path) -> str:
    status = file.stat()
    return _content_digest(file, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.cache
def _content_digest(file: Path, size: int, mtime: int, ctime: int) -> str:
    """Hash of a file's content; size and times are there so that a changed file is read again."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
