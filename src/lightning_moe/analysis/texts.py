"""Texts of several domains as blocks of tokens, read only as far as needed."""

import glob
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_moe.corpus import builder_of, separator_id

# no token is longer on average
_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True)
class Batch:
    """Sequences of one domain, without padding.

    Args:
        domain: the domain's number.
        input_ids: token ids.
    """

    domain: int
    input_ids: Int[Tensor, "B S"]


def read_texts(place: str, files: Iterable[Path], text_column: str) -> Iterator[str]:
    """The documents of files in their order, read only as far as they are asked for; empty ones are left out.

    Args:
        place: where the files were named, for the messages.
        files: JSONL or Parquet with one document a row; any other file is one document.
        text_column: column of JSONL and Parquet that holds the text.

    Raises:
        ValueError: if a file cannot be read as what its name says, or has no such column.
        TypeError: if the column holds something else than text.
    """
    for file in files:
        # the JSON builder fails on an empty file
        if not file.stat().st_size:
            continue
        builder = builder_of(file)
        options: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
        names = [glob.escape(str(file))]
        try:
            rows = iter(datasets.load_dataset(builder, data_files=names, split="train", streaming=True, **options))
            row = next(rows, None)
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(f"{place}: {str(file)!r} cannot be read as {builder}: {error}.") from error
        while row is not None:
            if text := _text(place, file, row, "text" if builder == "text" else text_column):
                yield text
            row = next(rows, None)


def domain_batches(
    texts: Mapping[str, Iterable[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int,
    sequence_length: int,
    batch_size: int,
    separator: str | None,
) -> list[Batch]:
    """Tokenises the beginning of each domain and cuts it into batches of sequences, domain by domain.

    Documents are joined with the separator; what does not fill a sequence at the end is left out, unless a domain has
    less than one sequence, which is then a shorter one.

    Args:
        texts: the documents of each domain.
        tokenizer: of the model.
        num_tokens: at most so many of each domain.
        sequence_length: tokens per sequence S.
        batch_size: sequences per batch B.
        separator: token between two documents; None takes the tokenizer's, and none where it has none.

    Raises:
        ValueError: if the separator is no token, or a domain has fewer than two tokens.
    """
    between = _separator(tokenizer, separator)
    batches = []
    for number, (domain, documents) in enumerate(texts.items()):
        ids = _tokens(documents, tokenizer, num_tokens, between)
        if len(ids) < 2:
            raise ValueError(
                f"data[{domain!r}]: {len(ids)} token(s) of text; wanted at least 2. Give a file that is not empty."
            )
        length = min(sequence_length, len(ids))
        rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
        batches += [Batch(number, part) for part in rows.split(batch_size)]
    return batches


def _tokens(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int, separator: list[int]
) -> list[int]:
    ids: list[int] = []
    for document in documents:
        beginning = document[: _CHARACTERS_PER_TOKEN * (num_tokens - len(ids))]
        # `verbose` would warn of documents that are longer than the model's context
        found = tokenizer(beginning, add_special_tokens=False, verbose=False)["input_ids"]
        ids += [*(separator if ids and found else []), *found]
        if len(ids) >= num_tokens:
            break
    return ids[:num_tokens]


def _separator(tokenizer: PreTrainedTokenizerBase, separator: str | None) -> list[int]:
    if separator is not None and separator not in tokenizer.get_vocab():
        raise ValueError(
            f"separator={separator!r} is no token of the tokenizer; give one of its vocabulary, such as one of its "
            f"special tokens {tokenizer.all_special_tokens}."
        )
    try:
        return [separator_id(tokenizer, separator)]
    except ValueError:
        return []


def _text(place: str, file: Path, row: Mapping[str, Any], column: str) -> str | None:
    if column not in row:
        raise ValueError(
            f"{place}: {str(file)!r} has no column text_column={column!r}; its columns are {', '.join(row)}. Pass one "
            "of them as `text_column`."
        )
    text = row[column]
    if not isinstance(text, str | None):
        raise TypeError(f"{place}: column {column!r} of {str(file)!r} holds {type(text).__name__}; wanted text.")
    return text
