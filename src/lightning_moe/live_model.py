"""A live Hugging Face model, dense, upcycled or MoE by itself, as lm-eval asks it. Needs the extra ``eval``."""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_moe.calibration import evaluating
from lightning_moe.checks import check_whole
from lightning_moe.randomness import kept_random_state

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    # lm-eval itself, or accelerate, without which it runs no model
    raise ModuleNotFoundError(
        f"Zero-shot evaluation needs lm-eval and what it runs models with ({error}). Install it: "
        "pip install 'lightning-moe[eval]'"
    ) from error


class LiveHFLM(HFLM):
    """A live Hugging Face model, as lm-eval asks it: in evaluation mode while it answers, and untouched afterwards.

    ``log p(continuation | context) = sum of log p(token | all tokens before it)``, the softmax in float32. Texts of a
    batch are padded on the right, and the padding is masked, so that it reaches no statistic of a router; in evaluation
    mode an expert takes all the tokens that are sent to it. Where ``torch.distributed`` runs, the ranks share the
    documents; each must hold the whole model.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; a copy is used, since lm-eval chooses a padding token.
        batch_size: texts per forward.
        max_length: tokens of the longest text, longer ones lose their beginning; None takes what the model knows.
        mixed_precision_dtype: what the forward is autocast to; None runs it in the dtype of the weights.

    Raises:
        ValueError: if the model is no decoder, or if the batch size is no whole number of 1 or more.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> config = LlamaConfig(
        ...     hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=3,
        ...     bos_token_id=None, eos_token_id=None,
        ... )
        >>> words = Tokenizer(models.WordLevel({"<eos>": 0, "yes": 1, "no": 2}, unk_token="<eos>"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
        >>> LiveHFLM(LlamaForCausalLM(config), tokenizer).world_size
        1
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        mixed_precision_dtype: torch.dtype | str | None = None,
    ) -> None:
        check_whole(batch_size=batch_size)
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(model).__name__} has an encoder. Give a causal language model.")
        # HFLM calls eval(), and warns that it knows of one process only
        with evaluating(model), _quiet("lm_eval.models.huggingface"):
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                backend="causal",
                batch_size=batch_size,
                max_length=max_length,
                softmax_dtype="float32",
                mixed_precision_dtype=mixed_precision_dtype,
            )
        if dist.is_available() and dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    @property
    def device(self) -> torch.device:
        """Where the model is now: a strategy may have moved it."""
        found: torch.device = self.model.device
        return found

    def all_gather(self, tensor: Tensor) -> Tensor:
        """One number of each rank, in the order of the ranks."""
        if self.world_size == 1:
            return tensor
        gathered = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered).flatten()

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """How probable each continuation is after its context, and whether it is what the model would say."""
        with self._untouched():
            answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """How probable each text is."""
        with self._untouched():
            answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context."""
        with self._untouched():
            answers: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return answers

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        with kept_random_state(), evaluating(self.model):
            yield

    def _model_call(
        self, inps: Int[Tensor, "B S"], attn_mask: Int[Tensor, "B S"] | None = None, labels: Tensor | None = None
    ) -> Float[Tensor, "B positions vocabulary"]:
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            logits: Tensor = self.model(input_ids=inps, attention_mask=attn_mask).logits
        return logits

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        # HFLM's own pads with token 0, without a mask, and forgets where the padding begins before it asks the model.
        # What several requests share, as the one-word answers of a question, is computed once.
        asked: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            asked.setdefault(self._input(context, continuation), []).append(number)
        # the longest first: where the memory is too small, one knows at once
        rows = sorted(asked, key=len, reverse=True)
        answers: dict[int, tuple[float, bool]] = {}
        silent = True if disable_tqdm or self.rank > 0 else None
        for start in tqdm(range(0, len(rows), self.batch_size), "Log-likelihoods", disable=silent, unit="batch"):
            batch = rows[start : start + self.batch_size]
            numbers = [(place, number) for place, row in enumerate(batch) for number in asked[row]]
            scored = self._score(batch, [(place, requests[number][2]) for place, number in numbers])
            answers.update(zip((number for _, number in numbers), scored, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _input(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        # what the model must read: the last token is only predicted
        if len(continuation) > self.max_length:
            raise ValueError(
                f"A continuation of {len(continuation)} tokens is longer than max_length={self.max_length}. Leave the "
                "task out, or take a model with a longer context."
            )
        return tuple((context + continuation)[-(self.max_length + 1) : -1])

    def _score(
        self, rows: Sequence[tuple[int, ...]], continuations: Sequence[tuple[int, list[int]]]
    ) -> list[tuple[float, bool]]:
        # each continuation with the place of its row in the batch
        length = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=self.device)
        logits = self._model_call(ids, mask)
        # prompt tuning puts tokens of its own before
        ahead = logits.shape[1] - length
        sums, exact = [], []
        for place, continuation in continuations:
            end = ahead + len(rows[place])
            predicted, wanted = (
                logits[place, end - len(continuation) : end],
                torch.tensor(continuation).to(logits.device),
            )
            log_probs = F.log_softmax(predicted, dim=-1, dtype=self.softmax_dtype)
            sums.append(log_probs.gather(1, wanted[:, None]).sum())
            exact.append((predicted.argmax(-1) == wanted).all())
        # one synchronisation per batch
        return list(zip(torch.stack(sums).tolist(), torch.stack(exact).tolist(), strict=True))


def find_language_model(root: nn.Module, path: str | None = None) -> tuple[str, PreTrainedModel]:
    """Finds the one Hugging Face model in a module that predicts tokens, and its path.

    Args:
        root: holds the model, anywhere inside.
        path: of the part to look in, as ``"student"``; None looks everywhere.

    Raises:
        ValueError: if there is no such part, no such model, or more than one.
    """
    try:
        part = root.get_submodule(path or "")
    except AttributeError as error:
        names = ", ".join(name for name, _ in root.named_children())
        raise ValueError(
            f"module={path!r}: {type(root).__name__} has no such part ({error}). It has: {names}."
        ) from error
    found: dict[str, PreTrainedModel] = {}
    for name, module in part.named_modules(prefix=path or ""):
        inside = any(name.startswith(f"{outer}." if outer else "") for outer in found)
        if isinstance(module, PreTrainedModel) and not inside and module.get_output_embeddings() is not None:
            found[name] = module
    if len(found) != 1:
        what = (
            f"several language models ({', '.join(found)})" if found else "no Hugging Face model that predicts tokens"
        )
        raise ValueError(
            f"{type(root).__name__} holds {what}. Say which part to evaluate, as module={next(iter(found), 'model')!r}."
        )
    return next(iter(found.items()))


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(level)
