"""LightningModules that know nothing of this package, as users have them, and what is needed to train them."""

import csv
import functools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_moe import (
    MoEModule,
    MoEUpcycleCallback,
    TextDataModule,
    TopKRouter,
    UpcycleConfig,
    record_routing,
    upcycle,
)

VOCABULARY = 37
FFNS = ["net.inner.model.layers.0.mlp", "net.inner.model.layers.1.mlp"]
MOE_PARAMETERS = [
    f"{ffn}.{key}" for ffn in FFNS for key in ("router.gate", "experts.gate_up_proj", "experts.down_proj")
]


def tiny_llama(seed=0, **changes):
    """Two layers, 8 channels; weights large enough that the routers tell the tokens apart."""
    options = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    options |= {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.5}
    options |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**options))


def batches(count=8, batch_size=2, length=7, padding=False, seed=1):
    """Different batches of random tokens; with `padding` a different number of tokens is masked in each row."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(0, VOCABULARY, (batch_size, length), generator=generator)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if padding:
            mask = torch.ones_like(ids)
            for row in range(batch_size):
                kept = 2 + (number + 2 * row) % (length - 2)
                mask[row, kept:] = 0
            batch |= {"attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}
        made.append(batch)
    return made


def loader(made):
    """Yields these batches, in this order."""
    return DataLoader(made, batch_size=None)


class Net(nn.Module):
    """Somebody's wrapper: the model is two attributes deep."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


class ForeignModule(LightningModule):
    """A user's module: builds its model in `__init__`, Adam over all parameters."""

    def __init__(self, lr=1e-2, seed=0, **changes):
        super().__init__()
        self.lr = lr
        self.net = Net(tiny_llama(seed, **changes))

    def task_loss(self, batch):
        return self.net.inner(**batch).loss

    def training_step(self, batch, batch_idx):
        loss = self.task_loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.task_loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.task_loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.net.inner(input_ids=batch["input_ids"]).logits

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class LazyModule(ForeignModule):
    """Builds its model in `configure_model`, as sharded modules must."""

    def __init__(self, lr=1e-2, seed=0):
        LightningModule.__init__(self)
        self.lr, self.seed = lr, seed
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Net(tiny_llama(self.seed))


class DictModule(ForeignModule):
    """Returns a dictionary from its training step."""

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "extra": 1}


class SkippingModule(ForeignModule):
    """Returns None for every second batch, after a forward: Lightning then skips its backward."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 2 else loss


class ManualModule(ForeignModule):
    """Optimises by hand, with an accumulation that only it knows of."""

    def __init__(self, accumulation=1, **options):
        super().__init__(**options)
        self.automatic_optimization = False
        self.accumulation = accumulation

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / self.accumulation)
        if (batch_idx + 1) % self.accumulation == 0:
            for optimizer in self._all_optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def _all_optimizers(self):
        found = self.optimizers()
        return found if isinstance(found, list) else [found]


class TwoOptimizersModule(ManualModule):
    """One optimizer for the first decoder layer, one for everything else."""

    def configure_optimizers(self):
        first = list(self.net.inner.model.layers[0].parameters())
        known = {id(p) for p in first}
        rest = [p for p in self.parameters() if id(p) not in known]
        return [torch.optim.SGD(first, lr=self.lr), torch.optim.Adam(rest, lr=self.lr)]


class GroupsModule(ForeignModule):
    """Parameter groups by name, made when the optimizer is asked for: everything of an FFN without weight decay."""

    def configure_optimizers(self):
        ffn = [p for name, p in self.named_parameters() if ".mlp." in name]
        rest = [p for name, p in self.named_parameters() if ".mlp." not in name]
        return torch.optim.AdamW(
            [{"params": ffn, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.3}], lr=self.lr
        )


class EagerModule(ForeignModule):
    """Makes its optimizer in `__init__`, over the dense parameters: up and gate in one group, down in another."""

    def __init__(self, **options):
        super().__init__(**options)
        named = list(self.named_parameters())
        down = [p for name, p in named if "down_proj" in name]
        wide = [p for name, p in named if "gate_proj" in name or "up_proj" in name]
        rest = [p for name, p in named if ".mlp." not in name]
        self.made = torch.optim.AdamW(
            [
                {"params": wide, "weight_decay": 0.1, "lr": 0.02},
                {"params": down, "weight_decay": 0.0, "lr": 0.03},
                {"params": rest, "weight_decay": 0.2, "lr": 0.01},
            ]
        )

    def configure_optimizers(self):
        return self.made


def trainer_of(tmp_path, callbacks=(), **options):
    """A quiet Trainer on one CPU process that writes below `tmp_path` only."""
    defaults = {"logger": CSVLogger(tmp_path, name="logs"), "max_epochs": 1, "accelerator": "cpu", "devices": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **{**defaults, **quiet, **options})


class GradientRecorder(Callback):
    """Keeps the gradients that each optimizer step sees, unscaled and unclipped."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({k: p.grad.clone() for k, p in pl_module.named_parameters() if p.grad is not None})


class ScaledFloat32(MixedPrecision):
    """GradScaler without autocast: the scaling is all that differs from plain float32."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    def forward_context(self):
        return nullcontext()


class BalanceSum:
    """The explicit total that balance losses stand for, written down and differentiated by autograd."""

    def __init__(self, module, config, losses):
        self.module, self.losses = module, losses
        upcycle(module, config)

    def total(self, batch):
        with record_routing() as window:
            loss = self.module.task_loss(batch)
        assert len(window) == len(FFNS)
        return loss + sum(fn.coefficient * fn(routing) for routing in window.values() for fn in self.losses)

    def gradients(self, micro_batches):
        """Of the mean of the totals of these micro-batches."""
        named = dict(self.module.named_parameters())
        total = sum(self.total(batch) / len(micro_batches) for batch in micro_batches)
        found = torch.autograd.grad(total, list(named.values()))
        return dict(zip(named, found, strict=True))


def same_gradients(found, expected, relative=1e-6):
    """Each parameter's largest difference is below `relative` times its largest gradient.

    1e-6 is eight float32 roundings: the balance losses enter the sum over the graph in another order.
    """
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert difference <= relative, f"{name}: {difference:.1e}"


def small_config(**changes):
    """Five experts, an odd number; a router sure enough that balancing has something to do."""
    router = functools.partial(_router, **changes.pop("router", {}))
    return UpcycleConfig(**{"num_experts": 5, "seed": 3, "router": router, **changes})


def _router(hidden_size, num_experts, **options):
    return TopKRouter(hidden_size, num_experts, **{"init_std": 0.5, **options})


def run_script(text, folder, *arguments, timeout=90, environment=None):
    """Runs a script in a process group of its own, which ends with it or at the timeout; returns its output."""
    script = Path(folder, "script.py")
    script.write_text(text)
    return run_command([sys.executable, str(script), *map(str, arguments)], timeout, environment)


def run_command(command: Iterable[str], timeout=90, environment=None, check=True):
    """Runs a command in a process group of its own; returns the completed process with its output as text."""
    here = str(Path(__file__).parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        list(command),
        env={**env, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if check:
        assert process.returncode == 0, f"exit code {process.returncode}\n{out}\n{err}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


TWO_RANKS = """
import pickle, sys
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DDPStrategy
from lightning_fixtures import ForeignModule, GradientRecorder, batches, small_config, trainer_of
from lightning_moe import LoadBalancingLoss, MoEUpcycleCallback, ZLoss

torch.set_num_threads(1)
folder = sys.argv[1]
made = batches(8, padding=True)  # rank r trains on batches r, r + 2, ...
recorder = GradientRecorder()
callback = MoEUpcycleCallback(small_config(), balance_losses=[LoadBalancingLoss(0.3), ZLoss(0.05)])
trainer = trainer_of(
    folder, [callback, recorder], strategy=DDPStrategy(process_group_backend="gloo"), devices=2, log_every_n_steps=2,
    use_distributed_sampler=False,
)


class Ranks:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return made[2 * index + trainer.global_rank]


module = ForeignModule(lr=0.0)
trainer.fit(module, torch.utils.data.DataLoader(Ranks(), batch_size=None))
if trainer.is_global_zero:
    with open(folder + "/result.pkl", "wb") as file:
        pickle.dump({"gradients": recorder.steps, "metrics": trainer.logger.log_dir + "/metrics.csv"}, file)
"""


@functools.cache
def two_ranks():
    """What two gloo processes found in four steps on eight batches, without learning: gradients and logged metrics."""
    folder = tempfile.mkdtemp()
    run_script(TWO_RANKS, folder, folder, timeout=120)
    return pickle.loads(Path(folder, "result.pkl").read_bytes())


WORDS = {"<eos>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}


def word_tokenizer():
    """One token per word."""
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def write_corpus(path, count=400, seed=0):
    """One text file of random words."""
    ids = torch.randint(1, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
    path.write_text(" ".join(f"w{i}" for i in ids.tolist()))
    return path


class Diary(Callback):
    """Writes each step's loss to a file at once, exactly; may end the run at the beginning of a step."""

    def __init__(self, path, end=None, end_at=-1):
        self.path, self.end, self.end_at = path, end, end_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.end_at:
            self.end()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with open(self.path, "a") as file:
            file.write(f"{trainer.global_step} {float(outputs['loss']).hex()}\n")

    def read(self):
        return dict(line.split() for line in Path(self.path).read_text().splitlines())


def kill_self():
    """What the kernel does to a process that needs too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def train_text(folder, name, *, noise, ckpt_path=None, end=None, end_at=-1):
    """Two epochs of seven steps with our module, our data and our callback; a checkpoint after every third step."""
    torch.set_num_threads(1)
    seed_everything(5)
    folder = Path(folder)
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        write_corpus(corpus)
    data = TextDataModule(
        tokenizer=word_tokenizer(),
        data_files=corpus,
        block_size=16,
        batch_size=3,
        val_fraction=0.1,
        num_proc=1,
        cache_dir=folder / "cache",
    )
    module = MoEModule(tiny_llama(), optimizer=functools.partial(torch.optim.AdamW, lr=1e-2))
    config = small_config(router={"noise_std": noise, "jitter": noise})
    checkpoints = ModelCheckpoint(folder / name, every_n_train_steps=3, save_top_k=-1, save_last=True)
    diary = Diary(folder / f"{name}.txt", end, end_at)
    trainer = trainer_of(
        folder, [MoEUpcycleCallback(config), diary, checkpoints],
        logger=CSVLogger(folder, name=name, flush_logs_every_n_steps=1), max_epochs=2, log_every_n_steps=2,
        enable_checkpointing=True, num_sanity_val_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer, module, diary.read()


def logged(log_dir, prefix="moe"):
    """What a CSVLogger holds: step to names to values, for names that begin with `prefix`."""
    found = {}
    with Path(log_dir, "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            values = {k: float(v) for k, v in row.items() if k.startswith(prefix) and v}
            if values:
                found.setdefault(int(row["step"]), {}).update(values)
    return found
