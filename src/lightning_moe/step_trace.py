"""What a training step holds in memory, moment by moment: run on tensors without data, so for any model and any size.

Every operation of a forward and a backward is run by torch's fake tensors, which know shapes and dtypes only, and the
storages that come into being and go are counted.
"""

import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True)
class Moment:
    """The bytes alive at one moment of a step, beside parameters, buffers and optimizer states.

    Args:
        backward: whether it is in the backward.
        gradients: of the parameters, as far as they exist.
        weight_copies: parameters cast to another dtype, as autocast does.
        logits: whatever has the vocabulary as its last dimension.
        activations: all else.
    """

    backward: bool
    gradients: int
    weight_copies: int
    logits: int
    activations: int


def trace_step(
    model: nn.Module,
    batch_size: int,
    sequence_length: int,
    *,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    activation_checkpointing: bool = False,
    recast: Iterable[nn.Parameter] = (),
) -> list[Moment]:
    """Runs one forward and backward of a language model on tensors without data.

    Args:
        model: on the meta device or with memory; it is not changed.
        batch_size: sequences B, without padding.
        sequence_length: tokens of each, S.
        dtype: of the parameters; None leaves them as they are.
        autocast: the dtype of autocast; None for none.
        activation_checkpointing: whether each block is computed anew in the backward.
        recast: parameters whose copies in another dtype are not kept, but made anew in the backward.

    Returns:
        The moments after which more was alive than before.

    Raises:
        ValueError: if what is computed depends on numbers, as with routers that choose a variable number of experts.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=11,
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> moments = trace_step(model, batch_size=2, sequence_length=5)
        >>> moments[-1].gradients == sum(4 * p.numel() for p in model.parameters())
        True
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copy, marked = _without_data(model, mode, dtype, {id(parameter) for parameter in recast})
    if activation_checkpointing:
        _checkpoint(copy)
    ledger = _Ledger(copy, marked, copy.config.get_text_config().vocab_size)
    try:
        with mode:
            ids = torch.zeros(batch_size, sequence_length, dtype=torch.int64)
            with ledger:
                # autocast keeps no copies beyond its block, as Lightning's around the training step
                with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                    loss = copy(input_ids=ids, labels=ids).loss
                ledger.backward = True
                loss.backward()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"{type(model).__name__}: its memory depends on the numbers that it computes ({error}). Plan it with a "
            "router that sends each token to the same number of experts, as TopKRouter."
        ) from error
    return ledger.moments


def _without_data(
    model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None, recast: set[int]
) -> tuple[Any, set[int]]:
    # A copy whose parameters and buffers are fake ones on the CPU, and the ids of those in `recast`. Not on the meta
    # device: its attention and its autocast are none that anybody trains with.
    memo: dict[int, Any] = {}
    with mode:
        for tensor in (*model.parameters(), *model.buffers()):
            is_parameter = isinstance(tensor, nn.Parameter)
            cast = dtype is not None and is_parameter and tensor.is_floating_point()
            fake: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype if cast else tensor.dtype)
            memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    copy: Any = deepcopy(model, memo).train()
    return copy, {id(memo[number]) for number in recast}


def _checkpoint(model: Any) -> None:
    # what transformers would turn off itself, with a message
    model.config.use_cache = False
    with warnings.catch_warnings():
        # the name that transformers 5 had first
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()


class _Ledger(TorchDispatchMode):
    # the bytes of all storages alive, by what they hold
    def __init__(self, model: nn.Module, recast: set[int], vocabulary: int) -> None:
        super().__init__()
        self.moments: list[Moment] = []
        self.backward = False
        self._vocabulary = vocabulary
        self._alive: Counter[str] = Counter()
        self._kinds: dict[int, str] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        # of the tensors that say where each expert's rows end, the number of all rows
        self._ends: dict[int, int] = {}
        # the storages must stay in Python's hands: their addresses are their names here
        self._known = {_key(t): t for t in (*model.parameters(), *model.buffers())}
        self._recast = {_key(t) for t in model.parameters() if id(t) in recast}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._note_gradient)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default and (rows := self._ends.get(_key(args[0]))):
            # where one expert's rows end, as the loop over experts asks: each has the same share
            experts = args[0].untyped_storage().nbytes() // args[0].element_size()
            return (args[0].storage_offset() + 1) * rows // experts
        # fake tensors have no float32 grouped GEMM yet
        compute = _grouped_mm if func is aten._grouped_mm.default else func
        out = compute(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._note(tensor, func, args)
        if func is aten.searchsorted.Tensor:
            self._ends[_key(out)] = args[0].numel()
        elif func is aten._to_copy.default and (rows := self._ends.get(_key(args[0]))):
            self._ends[_key(out)] = rows
        return out

    def _note(self, tensor: Tensor, func: Any, args: tuple[Any, ...]) -> None:
        storage = tensor.untyped_storage()
        key, size = _key(tensor), storage.nbytes()
        if key in self._watched or key in self._known:
            return
        kind = "activations"
        if func is torch.ops.aten._to_copy.default and (source := _key(args[0])) in self._known:
            kind = "recast" if source in self._recast else "weight_copies"
        elif tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
            kind = "logits"
        self._watched[key], self._kinds[key] = weakref.ref(storage, partial(self._forget, key, size)), kind
        self._alive[kind] += size
        self._record()

    def _forget(self, key: int, size: int, reference: Any) -> None:
        del self._watched[key]
        self._ends.pop(key, None)
        self._alive[self._kinds.pop(key)] -= size

    def _note_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key, size = _key(parameter.grad), parameter.grad.untyped_storage().nbytes()
        if (kind := self._kinds.get(key)) is not None:
            self._alive[kind] -= size
            self._alive["gradients"] += size
            self._kinds[key] = "gradients"
            self._record()

    def _record(self) -> None:
        alive = self._alive
        held = (alive[kind] for kind in ("gradients", "weight_copies", "logits", "activations"))
        self.moments.append(Moment(self.backward, *held))


def _key(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    if a.dim() == 2 and b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])  # (N, I) x (E, I, O)
    assert offs is not None
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])  # (O, N) x (N, I), group by group
