"""Frozen weights in 4 bit, and the linear maps by them.

A weight is dequantised where it is used, in the forward and once more in the backward: between the two only its 4-bit
form is kept. It takes no gradient itself and passes that of the hidden states on.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

QUANT_TYPES = ("nf4", "fp4")
# what bitsandbytes takes
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class Weight4bit(nn.Module):
    """A frozen weight of any shape in 4 bit, by bitsandbytes: blocks of the flattened weight, each with its largest.

    ``weight = code[index] * absmax of its block``, with one of 16 codes between -1 and 1. Two indices are a byte of
    ``packed``; ``absmax`` holds one float32 per block, as bytes, so that casting the module leaves them as they are.
    With blocks of 64 that is 4.5 bits per weight.

    Reference: Dettmers et al., *QLoRA*, 2023, https://arxiv.org/abs/2305.14314, without its double quantisation.

    Args:
        shape: of the weight.
        dtype: of the weight.
        quant_type: ``"nf4"``, codes at the quantiles of a normal distribution, or ``"fp4"``, floating-point numbers.
        block_size: weights per block.
        device: of the bytes, which are zeros, and so is the weight.

    Example:
        >>> weight = Weight4bit(torch.Size([4, 32, 64]), torch.float32)
        >>> weight.packed.numel() + weight.absmax.numel(), weight.numel()
        (4608, 8192)
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.dtype = dtype
        self.quant_type = quant_type
        self.block_size = block_size
        packed, absmax = -(-shape.numel() // 2), 4 * -(-shape.numel() // block_size)
        # Parameters and not buffers: DDP would send buffers to all ranks before each forward.
        self.packed = _frozen(torch.zeros(packed, dtype=torch.uint8, device=device))
        self.absmax = _frozen(torch.zeros(absmax, dtype=torch.uint8, device=device))

    @classmethod
    def of(cls, weight: Tensor, *, quant_type: str = "nf4", block_size: int = 64) -> "Weight4bit":
        """Quantises a weight of float32, float16 or bfloat16.

        Example:
            >>> weight = torch.randn(2, 8, 64)
            >>> bool((Weight4bit.of(weight).dequantize() - weight).abs().max() < 0.5 * weight.abs().max())
            True
        """
        made = cls(weight.shape, weight.dtype, quant_type=quant_type, block_size=block_size, device=weight.device)
        if not weight.is_meta:
            flat = weight.detach().reshape(-1).contiguous()
            packed, state = bitsandbytes_functional().quantize_4bit(flat, blocksize=block_size, quant_type=quant_type)
            made.packed, made.absmax = _frozen(packed.view(-1)), _frozen(state.absmax.float().view(torch.uint8))
        return made

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.packed.device

    @property
    def data(self) -> Tensor:
        """There is none: adapters would be merged into it."""
        raise TypeError("A weight in 4 bit takes no adapter. Call dequantize(model) before merging.")

    def numel(self) -> int:
        """The number of weights."""
        return self.shape.numel()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a tensor, a new one each time, by default in its own dtype."""
        if self.packed.is_meta:
            return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")
        functional = bitsandbytes_functional()
        # As one row: where rows are no multiple of the block, as 96 for 64, the kernel of bitsandbytes 0.50 for CPUs
        # with AVX-512 gives wrong numbers without a word.
        state = functional.QuantState(
            self.absmax.view(torch.float32),
            shape=torch.Size([self.numel()]),
            blocksize=self.block_size,
            quant_type=self.quant_type,
            dtype=dtype or self.dtype,
        )
        dequantized: Tensor = functional.dequantize_4bit(self.packed.view(-1, 1), state)
        return dequantized.reshape(self.shape)

    def multiply(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``product(x, weight)`` in the dtype of ``x``, for which nothing but the 4 bits is kept until the backward.

        Args:
            x: what is mapped.
            product: linear in ``x``, with a weight whose last two dimensions are (out, in); with these two exchanged it
                is the product that takes the gradient back, as ``F.linear`` is.
        """
        y: Tensor = _product(x, self, product)
        return y

    def extra_repr(self) -> str:
        """The shape, for ``print(model)``."""
        return f"{tuple(self.shape)}, {self.dtype}, {self.quant_type}, block_size={self.block_size}"


class Linear4bit(nn.Linear):
    """A frozen ``nn.Linear`` in 4 bit; the bias stays as it is.

    An adapter of peft stands on it as on any ``nn.Linear``. It is not that of bitsandbytes 0.50, which does not load
    its own ``state_dict``, and on some CPUs computes and saves in another precision once it was in evaluation mode.
    """

    def __init__(self) -> None:
        raise TypeError("Linear4bit is made of an nn.Linear: Linear4bit.convert(linear, weight).")

    @classmethod
    def convert(cls, dense: nn.Linear, weight: Weight4bit) -> None:
        """Makes one of a linear layer, in place.

        Args:
            dense: the layer: whoever holds it, or has hooks on it, keeps it.
            weight: (out_features, in_features).
        """
        del dense.weight
        dense.__class__ = cls
        dense.add_module("weight", weight)

    def revert(self) -> None:
        """Makes an ordinary linear layer of it again, in place and frozen."""
        weight = self.four_bit.dequantize()
        del self._modules["weight"]
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self.register_parameter("weight", _frozen(weight))

    @property
    def four_bit(self) -> Weight4bit:
        """The weight."""
        weight = self._modules["weight"]
        assert isinstance(weight, Weight4bit)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """As that of the dense layer."""
        return linear(x, self.four_bit, self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        check_loaded(state_dict, f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *others)


def linear(x: Tensor, weight: Tensor | Weight4bit, bias: Tensor | None = None, index: int | None = None) -> Tensor:
    """``F.linear`` in the dtype of autocast.

    Args:
        x: (..., in).
        weight: (out, in); or one in 4 bit, which may be several.
        bias: (out,).
        index: which one of several in 4 bit.
    """
    if not isinstance(weight, Weight4bit):
        return F.linear(x, weight, bias)
    y = weight.multiply(to_autocast(x), lambda x, w: F.linear(x, w if index is None else w[index]))
    return y if bias is None else y + bias.to(y.dtype)


def to_autocast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of autocast, where that is on: for what is no autocast operation, as ``grouped_mm``."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def weight_of(weight: Tensor | Weight4bit) -> Tensor:
    """The weight as a tensor, dequantised if need be."""
    return weight.dequantize() if isinstance(weight, Weight4bit) else weight


def check_loaded(state_dict: Mapping[str, Any], name: str) -> None:
    """Raises if a checkpoint holds in full precision what is in 4 bit here, for which torch would list missing keys.

    Args:
        state_dict: that is loaded.
        name: of the weight, in it.
    """
    if name in state_dict:
        raise ValueError(
            f"{name}: the checkpoint holds this weight in full precision, and this model has it in 4 bit. Load the "
            "checkpoint first and quantise after that, with quantize_frozen(model)."
        )


def bitsandbytes_functional() -> Any:
    """``bitsandbytes.functional``.

    Raises:
        ImportError: if bitsandbytes is not installed; it names the extra.
    """
    try:
        return import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ImportError(f"4-bit weights need bitsandbytes ({error}): pip install 'lightning-moe[bnb]'.") from error


class _Product(torch.autograd.Function):
    # the module and not its tensors: a strategy may have replaced these by the time of the backward
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight4bit, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.weight, ctx.product = weight, product
        return product(x, weight.dequantize(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.weight.dequantize(grad.dtype)
        return ctx.product(grad, weight.transpose(-2, -1)), None, None


# a graph break, as the kernels of bitsandbytes are
_product = torch.compiler.disable(_Product.apply)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
