"""A LightningModule around any Hugging Face model that returns a loss."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from lightning_moe.auto_model import is_own_format, load_own_format
from lightning_moe.checkpoints import RECIPE_KEY
from lightning_moe.description import describe_models
from lightning_moe.layer import moe_layers
from lightning_moe.saving import CONFIG_FILE, apply_recipe, empty_moe, load_moe, moe_recipe


def adamw(params: Iterable[Any]) -> Optimizer:
    """AdamW with ``lr=1e-4``, ``weight_decay=0.01``, fused: on a CPU 3 to 6 times as fast as the other variants."""
    return AdamW(params, lr=1e-4, weight_decay=0.01, fused=True)


class MoEModule(LightningModule):
    """Trains any Hugging Face model that returns a loss, dense or upcycled.

    Logs ``train_loss``; ``val_loss`` and ``test_loss`` as means over the data loaders, and with several of them also
    ``val_loss/<name>``, the names being the datamodule's ``val_names`` where it has them.

    Args:
        model: name on the Hub or path of a Hugging Face model, path of what `save_moe` or `export_to_hf` wrote, or a
            model object.
        auto_class: transformers' class that loads a model by name; what we wrote knows its own.
        model_dtype: of the loaded weights: ``"auto"`` as they were saved, or ``"float32"``, ``"bfloat16"``, ...
        optimizer: makes the optimizer from the parameters, once the model is upcycled.
        lr_scheduler: makes the learning-rate scheduler from the optimizer; it steps with every optimizer step.
        gradient_checkpointing: whether to recompute activations in the backward instead of keeping them.

    Raises:
        FileNotFoundError: if ``model`` is a path that does not exist.
        ValueError: if ``model`` cannot be loaded by name.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=11,
        ...     bos_token_id=None, eos_token_id=None,
        ... )
        >>> module = MoEModule(LlamaForCausalLM(config))
        >>> ids = torch.randint(0, 11, (2, 5))
        >>> module(input_ids=ids, labels=ids).loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        model: str | nn.Module,
        *,
        auto_class: str = "AutoModelForCausalLM",
        model_dtype: str = "auto",
        optimizer: Callable[[Iterable[Any]], Optimizer] = adamw,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.auto_class = auto_class
        self.model_dtype = model_dtype
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.gradient_checkpointing = gradient_checkpointing
        # from_pretrained leaves a model in evaluation mode, and Lightning trains it in the mode it finds
        loaded: Any = load_model(model, auto_class, model_dtype) if isinstance(model, str) else model
        self.model = loaded.train()
        if gradient_checkpointing:
            loaded.gradient_checkpointing_enable()
        self._means: dict[str, list[MeanMetric]] = {}

    def forward(self, **inputs: Any) -> Any:
        """Calls the model."""
        return self.model(**inputs)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Returns the model's own loss; balance losses are not in it, callbacks add them to the gradient."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forgets the last validation."""
        self._means["val"] = []

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds one batch to the mean loss of its data loader."""
        self._evaluate("val", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs the mean losses."""
        self._log_means("val")

    def on_test_epoch_start(self) -> None:
        """Forgets the last test."""
        self._means["test"] = []

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds one batch to the mean loss of its data loader."""
        self._evaluate("test", batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Logs the mean losses."""
        self._log_means("test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Returns the most probable next token at each position, (B, S)."""
        predicted: Tensor = self.model(**{k: v for k, v in batch.items() if k != "labels"}).logits.argmax(-1)
        return predicted

    def configure_optimizers(self) -> Any:
        """Makes the optimizer from the parameters that train, and its scheduler."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self._trainer is not None and getattr(self._trainer.precision_plugin, "scaler", None) is None:
            # Fused optimizers can unscale gradients themselves, and Lightning therefore does not clip them under
            # autocast. Without a loss scaler, as in bfloat16, there is nothing to unscale.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Upcycles a dense model as the checkpoint's was, so that ``load_from_checkpoint`` needs no callback."""
        if RECIPE_KEY in checkpoint and not moe_layers(self):
            apply_recipe(self, checkpoint[RECIPE_KEY])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes the recipe of the MoE layers, where `MoEUpcycleCallback` has not: of a model that came upcycled."""
        if RECIPE_KEY not in checkpoint and moe_layers(self):
            checkpoint[RECIPE_KEY] = moe_recipe(self) | {"models": describe_models(self)}

    def _loss(self, batch: Mapping[str, Any]) -> Tensor:
        loss = getattr(self.model(**batch), "loss", None)
        if loss is None:
            raise ValueError(
                f"{type(self.model).__name__} returned no loss for a batch with {', '.join(batch)}. Give the batches "
                "`labels`, or a model with a task head."
            )
        assert isinstance(loss, Tensor)
        return loss

    def _evaluate(self, stage: str, batch: Mapping[str, Any], dataloader_idx: int) -> None:
        means = self._means[stage]
        while len(means) <= dataloader_idx:
            means.append(MeanMetric().to(self.device))
        means[dataloader_idx].update(self._loss(batch), weight=next(iter(batch.values())).shape[0])

    def _log_means(self, stage: str) -> None:
        values = [mean.compute() for mean in self._means[stage]]
        if not values:
            return
        self.log(f"{stage}_loss", torch.stack(values).mean(), prog_bar=True)
        names = getattr(getattr(self.trainer, "datamodule", None), "val_names", None)
        if names is None or len(names) != len(values):
            names = [str(index) for index in range(len(values))]
        if len(values) > 1:
            self.log_dict({f"{stage}_loss/{name}": value for name, value in zip(names, values, strict=True)})


def load_model(name: str, auto_class: str, dtype: str, *, empty: bool = False) -> nn.Module:
    """Loads a Hugging Face model, or what `save_moe` or `export_to_hf` wrote.

    Args:
        name: name on the Hub, or path.
        auto_class: transformers' class that loads a model by name.
        dtype: of the weights: ``"auto"`` as they were saved, or ``"float32"``, ``"bfloat16"``, ...
        empty: whether to build it on the meta device instead, from its configuration alone.

    Raises:
        FileNotFoundError: if it is a path that does not exist.
        ValueError: if it cannot be loaded by name.
    """
    check_model_path(name)
    path = Path(name).expanduser()
    if (path / CONFIG_FILE).is_file():
        made = empty_moe(path) if empty else load_moe(path)
        return made if dtype == "auto" else made.to(_dtype(dtype))
    if is_own_format(path) and not empty:
        own: nn.Module = load_own_format(path, dtype)
        return own
    loader = getattr(transformers, auto_class, None)
    if loader is None or not hasattr(loader, "from_config"):
        raise ValueError(
            f"auto_class={auto_class!r}: transformers has no such class of models. Try 'AutoModelForCausalLM'."
        )
    source = str(path) if path.exists() else name
    try:
        model: nn.Module = _empty(loader, source, dtype) if empty else loader.from_pretrained(source, dtype=dtype)
    except OSError as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(
            f"model={name!r} is no directory here, and the Hub did not give it ({first_line}). Check the name, the "
            "connection and HF_HUB_OFFLINE, or give the path of a model directory."
        ) from error
    return model


def check_model_path(name: str, argument: str = "model") -> None:
    """Raises if this is a path that `load_model` finds no model at; a name on the Hub is not looked up.

    Args:
        name: name on the Hub, or path.
        argument: what the user gave it as.

    Raises:
        FileNotFoundError: if it is a path that does not exist.
        ValueError: if it is a directory that holds no model.
    """
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(
            f"{argument}={name!r}: {path.resolve()} does not exist. Give a model directory or a Hub name."
        )
    if path.is_dir() and not any((path / file).is_file() for file in (CONFIG_FILE, "config.json")):
        raise ValueError(f"{argument}={name!r} holds no model: there is no config.json in it.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={name!r}: torch has no such dtype. Give 'auto', 'float32', 'bfloat16' or 'float16'.")
    return found


def _empty(loader: Any, source: str, dtype: str) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(source)
    if dtype != "auto":
        config.dtype = dtype
    with torch.device("meta"):
        model: nn.Module = loader.from_config(config)
    return model.eval()
