"""Train a Slot Attention autoencoder, score it, log it to TensorBoard and keep its checkpoints.

    python train.py                                              # shapes, 64x64, 7 slots
    python train.py --epochs 4                                   # a first look, in minutes
    python train.py --architecture paper                         # the paper's model and schedule
    python train.py --resume auto                                # go on where the last run stopped
    torchrun --nproc_per_node 2 train.py                         # two processes share every batch
    python train.py --eval --resume logs/checkpoints/best_model.pth --num_iterations 16

The order of the images is a function of (seed, epoch), the slot noise of (seed, step), the learning
rate of the step: a resumed run continues as if it had never stopped.
"""

import argparse
import contextlib
import itertools
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # not on Windows, where nothing stops two runs from sharing a folder
    fcntl = None

from dataset import (
    DATASETS,
    SIZES,
    VARIANTS,
    DataError,
    create_dataloader,
    create_dataset,
    flip,
    wrap_in_loader,
)
from slot_attention import (
    ALL,
    CheckpointError,
    ConfigError,
    ModelConfig,
    Pixels,
    SlotAttentionAutoEncoder,
    SlotAttentionOutput,
    adjusted_rand_index,
    build_model,
    contingency_table,
    fg_ari,
    load_checkpoint,
    same_form,
    save_checkpoint,
    segmentation,
    segmentation_scores,
)
from visualize import visualize_attention_evolution, visualize_slots

# What a flag is when it is not given. 'paper' is Table 11 with Adam's learning rate halving
# every 100,000 steps; 'fast' is what was measured to learn shapes soonest (README, "What was tried").
RECIPES = {
    'fast': dict(
        hidden_dim=64, num_iterations=8, slot_init='gaussian', gradient='first_order', damping=1 / 32,
        eval_iterations=12, slot_worth=1e-3, refine_steps=20, optimizer='muon',
        epochs=8, batch_size=16, lr=2e-3, warmup_steps=300, decay_steps=0, cooldown=0.5,
        clip=1.0, pixel_stride=2,
    ),
    'paper': dict(
        hidden_dim=64, num_iterations=3, slot_init='gaussian', gradient='full', damping=0.0,
        eval_iterations=0, slot_worth=0.0, refine_steps=0, optimizer='adam',
        epochs=100, batch_size=64, lr=4e-4, warmup_steps=10_000, decay_steps=100_000, cooldown=0.0,
        clip=0.0, pixel_stride=1,
    ),
}  # fmt: skip
DEFAULTS = dict(
    dataset='shapes', architecture='fast', slot_dim=64, max_objects=6, min_objects=2, train_size=0, val_size=320,
    data_seed=0, seed=0, data_dir='data', variant=VARIANTS[0], flip=0,
)  # fmt: skip
BY_DATASET = ('resolution', 'num_slots')  # see dataset.SIZES
MODEL_FLAGS = tuple(field.name for field in fields(ModelConfig))
DATA_FLAGS = (
    'dataset', 'data_dir', 'variant', 'max_objects', 'min_objects', 'train_size', 'val_size', 'data_seed', 'flip',
    'seed', 'optimizer',
)  # fmt: skip
OPTIMISATION_FLAGS = ('epochs', 'batch_size', 'lr', 'warmup_steps', 'decay_steps', 'cooldown', 'clip', 'pixel_stride')
FREE_IN_EVAL = ('num_slots', 'num_iterations', 'slot_worth', 'refine_steps', 'val_size', 'max_objects')
SCORES = {
    'mse': 'MSE', 'fg_ari': 'FG-ARI', 'ari': 'ARI', 'mbo': 'mBO', 'attn_fg_ari': 'attn FG-ARI',
    'consistency': 'consistency',
}  # fmt: skip

# How slots go wrong: figure of mask_statistics(), value above which it is so, what to say. The first counts.
DIAGNOSES = {
    'mask_entropy': (0.6, 'every object is spread over the slots: train longer, or raise --lr'),
    'largest_slot': (0.9, 'one slot holds nearly all objects: try a lower --lr, a longer --warmup_steps or --seed'),
    'sameness': (0.5, 'the masks do not depend on the image (stripes, blobs): raise --lr or try another --seed'),
    'missed': (0.2, 'many objects are left to the background: try more --num_iterations, --num_slots or --epochs'),
    'split': (0.15, 'spare slots split objects: try a larger --slot_worth, fewer --num_slots or more --epochs'),
}
SETTLED = 3  # validations in a row with the same diagnosis, before it is said
MAX_SKIPPED = 10  # steps in a row without a finite gradient, before the run is given up
SAFE_COMPILER = '2.10'  # for CPUs: those of PyTorch 2.6, 2.8 and 2.9 write outside of their memory, that of 2.7 fails


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do in one line."""


class Stopped(Exception):
    """SIGINT or SIGTERM has come; its number is the argument."""


# --- Command line ----------------------------------------------------------------------------


def create_parser(**kwargs) -> argparse.ArgumentParser:
    """All flags; those of model, data and optimisation are None until settle() fills them."""
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n')[0], usage='python train.py [--help] [flags]', allow_abbrev=False, **kwargs
    )

    def add(group, name, type, help, **kwargs):
        if name in DEFAULTS:
            help += f' (default: {DEFAULTS[name]})'
        elif name in RECIPES['fast']:
            values = [f'{architecture} {recipe[name]}' for architecture, recipe in RECIPES.items()]
            help += f' (default by architecture: {", ".join(values)})'
        elif name in BY_DATASET:
            index = BY_DATASET.index(name)
            help += (
                f' (default by data set: {", ".join(f"{dataset} {sizes[index]}" for dataset, sizes in SIZES.items())})'
            )
        elif kwargs.get('default') is not None:
            help += f' (default: {kwargs["default"]})'
        if 'choices' not in kwargs:
            kwargs['metavar'] = {'int': 'N', 'float': 'X'}.get(type.__name__, 'PATH')
        group.add_argument(f'--{name}', type=type, help=help, **kwargs)

    group = parser.add_argument_group('data')
    add(group, 'dataset', str, 'source of the images', choices=DATASETS)
    add(group, 'data_dir', str, 'where sources other than shapes lie')
    add(group, 'variant', str, 'of multi_dsprites', choices=VARIANTS)
    add(group, 'resolution', int, 'side of the square images, pixels')
    add(group, 'max_objects', int, 'most objects in an image')
    add(group, 'min_objects', int, 'fewest objects in an image')
    add(group, 'train_size', at_least(0), 'training images at most; 0: all there are, and 10,000 shapes')
    add(group, 'val_size', at_least(1), 'validation images at most, and test images with --eval')
    add(group, 'data_seed', at_least(0), 'decides what is drawn')
    add(group, 'flip', int, '1: half of the training images are mirrored', choices=(0, 1))
    group = parser.add_argument_group('model')
    add(group, 'architecture', str, "layers: 'paper' has those of its Tables 4-7", choices=tuple(RECIPES))
    add(group, 'num_slots', int, 'slots: one for the background and one for each object at least')
    add(group, 'slot_dim', int, 'size of a slot')
    add(group, 'num_iterations', int, 'iterations of Slot Attention')
    add(group, 'hidden_dim', int, 'channels of encoder and decoder; paper up to 64 pixels: 32')
    add(group, 'slot_init', str, 'one Gaussian for all, or a learned vector each', choices=('gaussian', 'learned'))
    add(group, 'gradient', str, 'through all iterations, or the last one only', choices=('full', 'first_order'))
    add(group, 'damping', float, 'share of the image below which the attention that a slot wins hardly updates it')
    add(group, 'eval_iterations', at_least(0), 'iterations in evaluation; 0: as in training')
    add(group, 'slot_worth', float, 'MSE that a slot must take off its image to be used in evaluation; 0: all are')
    add(group, 'refine_steps', at_least(0), 'steps in which slots descend the error of their image in evaluation')
    group = parser.add_argument_group('optimisation')
    add(group, 'optimizer', str, 'muon: Muon for the matrices, Adam for the rest', choices=('adam', 'muon'))
    add(group, 'pixel_stride', at_least(1), 'the loss is that of every so many rows and columns, at random offsets')
    add(group, 'epochs', at_least(1), 'passes over the training images')
    add(group, 'batch_size', int, 'images per step')
    add(group, 'lr', at_least(0, float), 'peak learning rate')
    add(group, 'warmup_steps', at_least(0), 'steps of linear warm-up')
    add(group, 'decay_steps', at_least(0), 'steps in which the learning rate halves; 0: never')
    add(group, 'cooldown', at_least(0, float), 'share of the run at its end in which the learning rate falls to 0')
    add(group, 'clip', at_least(0, float), 'largest norm of the gradient; 0: no clipping')
    add(group, 'seed', at_least(0), 'decides initial weights, order of the images and slot noise')
    group = parser.add_argument_group('logging')
    add(group, 'log_dir', Path, 'TensorBoard files, and checkpoints/ below it (default: logs, or where --resume lies)')
    add(group, 'log_every', at_least(1), 'steps between two points of the training curves', default=50)
    add(group, 'save_every', at_least(0), 'epochs between two checkpoint_epoch_N.pth; 0: none', default=10)
    add(group, 'save_minutes', at_least(0, float), 'minutes between two savings of last.pth', default=5)
    add(group, 'resume', Path, 'checkpoint to go on from, or to score with --eval; auto: the newest in --log_dir')
    group.add_argument('--eval', action='store_true', help='score --resume on the test images and stop')
    group = parser.add_argument_group('system')
    add(group, 'device', str, 'auto takes a GPU where there is one', default='auto', choices=('auto', 'cpu', 'cuda'))
    add(group, 'amp', str, 'bfloat16; auto: where it is fast', default='auto', choices=('auto', 'on', 'off'))
    group.add_argument(
        '--compile', action='store_true', help='torch.compile the model: faster steps after a first one of a minute'
    )
    add(group, 'num_workers', at_least(0), 'processes that load batches; 0: none, the data are in memory', default=0)

    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser()
    args = parser.parse_args(argv)
    if args.eval and args.resume is None:
        parser.error('--eval needs --resume PATH, the checkpoint to score')
    return args


def at_least(lowest: int, number: type = int):
    """An argparse type: a number from `lowest` to what 63 bits hold."""

    def parse(text: str):
        value = number(text)
        if not lowest <= value < 2**63:  # the largest seed that torch takes
            raise argparse.ArgumentTypeError(f'must be at least {lowest} and below 2^63, not {text}')
        return value

    parse.__name__ = number.__name__  # argparse names the type when the text is no number
    return parse


def settle(args: argparse.Namespace, saved: dict | None = None) -> argparse.Namespace:
    """Fill in what was not given: from the checkpoint's flags where there is one, else the recipe.

    Raises ConfigError for a flag that contradicts the checkpoint. Optimisation flags may change on
    resuming; the number of slots and iterations may in --eval.
    """
    if saved is None:
        recipe = RECIPES[args.architecture or DEFAULTS['architecture']] | DEFAULTS
        recipe |= zip(BY_DATASET, SIZES[args.dataset or DEFAULTS['dataset']], strict=True)
        args.log_dir = args.log_dir or Path('logs')
        if args.architecture == 'paper' and (args.resolution or recipe['resolution']) <= 64:
            recipe['hidden_dim'] = 32  # Tables 5 and 7
    else:
        recipe = saved | {'num_iterations': saved['eval_iterations'] or saved['num_iterations']} if args.eval else saved
        folder = args.resume.parent
        args.log_dir = args.log_dir or (folder.parent if folder.name == 'checkpoints' else Path('logs'))
        free = ('data_dir', *(FREE_IN_EVAL if args.eval else ()))
        for name in MODEL_FLAGS + DATA_FLAGS:
            given = getattr(args, name)
            if name not in free and given is not None and given != saved[name]:
                raise ConfigError(
                    f'--{name} {given} contradicts {args.resume}, which has {name} {saved[name]}; leave the flag out'
                )
        for name in OPTIMISATION_FLAGS:
            given = getattr(args, name)
            if given is not None and given != saved[name] and not args.eval:
                print(f'{name}: {saved[name]} in the checkpoint, {given} from now on')
    for name in MODEL_FLAGS + DATA_FLAGS + OPTIMISATION_FLAGS:
        if getattr(args, name) is None:
            setattr(args, name, recipe[name])
    return args


# --- Device ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where and in which number format to compute, and which process of how many this is.

    The only code that decides it. Without torchrun there is one process, and what speaks of many does
    nothing. `control` is their group on the CPU, for what must not wait for a GPU.
    """

    device: torch.device
    bfloat16: bool
    compiled: bool = False
    rank: int = 0
    world_size: int = 1
    control: dist.ProcessGroup | None = None

    @classmethod
    def choose(cls, device: str = 'auto', amp: str = 'auto', compiled: bool = False) -> 'Place':
        """Joins the other processes where torchrun has started some.

        Raises ConfigError for a GPU that is not there, or where torch.compile does not work.
        """
        if device == 'cuda' and not torch.cuda.is_available():
            raise ConfigError('--device cuda: PyTorch finds no CUDA GPU here; use --device cpu')
        if device == 'auto':
            device = 'cuda' if torch.cuda.is_available() else 'cpu'
        if device == 'cuda':
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # without these instructions bfloat16 is emulated, tens of times slower than float32
            checks = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
            fast = any(getattr(torch.cpu, check, bool)() for check in checks)
        bfloat16 = amp == 'on' or (amp == 'auto' and fast)
        if compiled:
            if device == 'cpu' and torch.__version__ < SAFE_COMPILER:
                raise ConfigError(
                    f'--compile on a CPU needs PyTorch {SAFE_COMPILER} or newer, this is {torch.__version__}: what the '
                    'older ones compile may crash; leave it out'
                )
            try:  # something small: it needs a C++ compiler for CPUs, Triton for GPUs, and headers for both
                torch.compile(torch.relu)(torch.ones(1, device=device))
            except Exception as error:
                reason = ' '.join(str(error).split('\n\n')[0].split())  # the first paragraph, in one line
                raise ConfigError(f'--compile does not work here ({reason}); leave it out') from error
        if not dist.is_torchelastic_launched():
            return cls(torch.device(device), bfloat16, compiled)
        local_rank = int(os.environ['LOCAL_RANK'])
        if device == 'cuda':
            if local_rank >= torch.cuda.device_count():
                raise ConfigError(f'{torch.cuda.device_count()} GPUs here: --nproc_per_node must not be more')
            torch.cuda.set_device(local_rank)
        store, rank, world_size = next(dist.rendezvous('env://'))
        if os.environ['LOCAL_WORLD_SIZE'] == os.environ['WORLD_SIZE']:
            # torchrun keeps its store when it restarts the processes: without this they would find
            # the addresses of dead ones. Between nodes these counts may differ (see the README).
            store = dist.PrefixStore(f'attempt {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
        backend = 'nccl' if device == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        control = dist.new_group(backend='gloo', timeout=timedelta(hours=6))  # preparing a data set takes long
        device = torch.device(device, local_rank if device == 'cuda' else None)
        return cls(device, bfloat16, compiled, dist.get_rank(), dist.get_world_size(), control)

    def autocast(self) -> torch.autocast:
        # No cache of weights in bfloat16: that of torch 2.6 gives what was cast in iterations without gradient to
        # the last one too, and those weights would never learn.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16, cache_enabled=False)

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as training calls it: many processes average its gradients, and --compile compiles it."""
        if self.world_size > 1:
            model = DistributedDataParallel(model, [self.device] if self.device.type == 'cuda' else None)
        return torch.compile(model, dynamic=False) if self.compiled else model  # all batches have one size

    def generator(self, *key: int) -> torch.Generator:
        """Noise that is a function of `key`: torch's CPU generator uses 32 bits of a seed, so mix."""
        seed = np.random.SeedSequence(key).generate_state(1)[0]
        return torch.Generator(self.device).manual_seed(int(seed))

    def shard(self, batch: Tensor) -> Tensor:
        """This process's part of a batch, as the loaders deal it out: [B, ...] -> [B / world_size, ...]."""
        return batch[self.rank :: self.world_size]

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.world_size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.world_size

    def largest(self, number: int) -> int:
        """The largest that any process has, so that all decide alike."""
        if self.world_size > 1:
            found = torch.tensor(number)
            dist.all_reduce(found, dist.ReduceOp.MAX, self.control)
            number = int(found)
        return number

    def gather(self, value) -> list:
        """What each process has, by rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """The first process does what is inside before the others."""
        if self.rank > 0:
            self.gather(None)
        yield
        if self.rank == 0:
            self.gather(None)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name() if self.device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'
        many = f'{self.world_size} processes of ' if self.world_size > 1 else ''
        return f'{many}{name}, {"bfloat16" if self.bfloat16 else "float32"}'


# --- Optimiser -------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before each step (Jordan 2024; Liu et al. 2025, arXiv 2502.16982).

    Every direction of a matrix moves equally far: about 0.2 a root mean square of an entry, as Adam.
    Weights of convolutions count as matrices [out, in * kernel]. torch.optim.Muon (from 2.9) computes
    in bfloat16, which most CPUs only emulate; this one stays in float32.
    As in torch's fused optimisers, nothing changes in a step where the tensor `found_inf` is 1.
    """

    found_inf = torch.zeros(())

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            found_inf = self.found_inf.to(group['params'][0].device)
            parameters = [p for p in group['params'] if p.grad is not None]
            updates = []
            for p in parameters:
                if p not in self.state:
                    self.state[p]['momentum'] = torch.zeros_like(p)
                buffer = self.state[p]['momentum']
                grad = torch.where(found_inf > 0, buffer, p.grad)  # its own mean leaves the buffer as it is
                buffer.lerp_(grad, 1 - group['momentum'])
                updates.append(grad.lerp(buffer, group['momentum']).flatten(1))
            for p, direction in zip(parameters, orthogonalise(updates), strict=True):
                scale = -0.2 * max(direction.shape) ** 0.5 * group['lr']
                p.add_(direction.view_as(p) * (1 - found_inf), alpha=scale)


def orthogonalise(matrices: list[Tensor]) -> list[Tensor]:
    """Matrices [R, C] -> the nearest (semi-)orthogonal ones, roughly: singular values from 0.7 to 1.2.

    Five steps of a Newton-Schulz iteration with Jordan's coefficients, X <- (a + b XX' + c (XX')^2) X. All
    that ever multiplies X are polynomials of the first XX'. So these are iterated, those of one size in one
    batch, and the matrices themselves, which may be long, are multiplied only once, at the end.
    """

    def factor(gram: Tensor) -> Tensor:
        result = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        result.diagonal(dim1=1, dim2=2).add_(3.4445)
        return result

    wide = [(x if x.shape[0] <= x.shape[1] else x.mT) / (x.norm() + 1e-7) for x in matrices]
    products = {}  # by size
    for size in {len(x) for x in wide}:
        gram = torch.stack([x @ x.mT for x in wide if len(x) == size])  # [n, R, R]
        step = product = factor(gram)
        for _ in range(4):
            gram = step @ gram @ step
            step = factor(gram)
            product = step @ product
        products[size] = iter(product)
    directions = [next(products[len(x)]) @ x for x in wide]
    return [d if x.shape[0] <= x.shape[1] else d.mT for d, x in zip(directions, matrices, strict=True)]


def create_optimizers(model: SlotAttentionAutoEncoder, name: str) -> list[torch.optim.Optimizer]:
    """Adam, or Muon for the matrices and Adam for the rest; the learning rate is set at every step."""
    matrices, rest = [], list(model.parameters())
    if name == 'muon':  # what is narrow in one direction, as positions and slots, is no matrix to it
        wide = [p.ndim > 1 and min(p.flatten(1).shape) > 4 for p in rest]
        matrices = [p for p, is_wide in zip(rest, wide, strict=True) if is_wide]
        rest = [p for p, is_wide in zip(rest, wide, strict=True) if not is_wide]
    adam = torch.optim.Adam(rest, fused=True)
    return [adam, Muon(matrices, lr=0.0)] if matrices else [adam]


# --- Training --------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a run knows of itself besides the weights; it travels in the checkpoint."""

    step: int = 0  # steps done
    epochs: int = 0  # epochs done, with their validation
    seconds: float = 0.0  # spent training, without validation
    best: float = -math.inf  # best validation score so far
    window: list = field(default_factory=list)  # [loss, gradient norm] of the steps since the last point of the curves
    epoch_loss: float = 0.0  # sum over the steps of the present epoch that were not skipped
    epoch_steps: int = 0  # their number
    seen: int = 0  # images of the present epoch that were trained on
    skipped: int = 0  # steps of the run without a finite gradient
    skipped_in_row: int = 0
    diagnosis: str = ''  # the last one, see DIAGNOSES
    lasting: int = 0  # validations in a row that gave it


class Stop:
    """Turns the first SIGINT or SIGTERM into a flag that is looked at between steps."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.signal is not None:  # the second time: at once
            os._exit(128 + number)
        self.signal = number


def learning_rate(
    step: int, lr: float, warmup_steps: int, decay_steps: int, cooldown: float = 0.0, total_steps: int = 0
) -> float:
    """Linear warm-up times exponential decay (paper Appendix E.3): a function of the step alone.

    In the last `cooldown` (a share) of total_steps it also falls, linearly, to 0.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    decay = 0.5 ** (step / decay_steps) if decay_steps else 1.0
    cool = min(1.0, (total_steps - step) / (cooldown * total_steps)) if cooldown else 1.0
    return lr * warmup * decay * cool


def choose_pixels(rng: np.random.Generator, resolution: int, stride: int, device: torch.device) -> Pixels:
    """Every `stride`-th row and column from random ones on. As tensors, or each offset would be compiled anew."""
    offsets = rng.integers(stride, size=2)
    return ALL if stride == 1 else tuple(torch.arange(i, resolution, stride, device=device) for i in offsets.tolist())


@dataclass
class Run:
    """A training run: what it consists of, and how it goes on."""

    args: argparse.Namespace
    place: Place
    model: SlotAttentionAutoEncoder
    optimizers: list[torch.optim.Optimizer]
    loaders: tuple[DataLoader, DataLoader]
    progress: Progress
    log: 'Log'
    stop: Stop

    def __post_init__(self):
        self.prepared = self.place.prepare(self.model)
        self.saved_at = time.monotonic()
        self.failed = False  # the last saving

    def train_epoch(self) -> None:
        """Train to the end of the present epoch; the last point of its curves is left to validate().

        Raises Stopped when a signal has come, TrainingError after MAX_SKIPPED steps in a row without a
        finite gradient.
        """
        args, progress, loader = self.args, self.progress, self.loaders[0]
        done = progress.seen // args.batch_size  # which may have changed since
        self.total_steps = progress.step - done + (args.epochs - progress.epochs) * len(loader)
        loader.sampler.set_epoch(progress.epochs)
        self.model.train()
        # Of the steps since the last point of the curves, on the device: read back every log_every steps.
        waiting = [torch.tensor(pair, device=self.place.device) for pair in progress.window]
        self.clock, self.timed = time.monotonic(), 0  # since when, and the steps since then
        bar = tqdm(
            total=len(loader), initial=done, desc=f'epoch {progress.epochs + 1}/{args.epochs}', leave=False,
            disable=None if self.place.rank == 0 else True,
        )  # fmt: skip
        with bar:
            for position, batch in enumerate(itertools.islice(loader, done, None), done + 1):
                waiting.append(self.train_step(batch))
                progress.step, progress.seen = progress.step + 1, progress.seen + args.batch_size
                self.timed += 1
                bar.update()
                if progress.step % args.log_every == 0 and position < len(loader):
                    bar.set_postfix_str(self.log_window(torch.stack(waiting)))
                    waiting = []
                signal = self.place.largest(self.stop.signal or 0)  # looked at once: it may come at any moment
                due = time.monotonic() - self.saved_at > args.save_minutes * 60
                if signal or due or position == len(loader):
                    progress.window = torch.stack(waiting).tolist() if waiting else []
                if signal:
                    raise Stopped(signal)
                if due:
                    self.save('last.pth')

    def train_step(self, batch: dict[str, Tensor]) -> Tensor:
        """One step; returns loss and gradient norm [2]. Where they are not finite, nothing else changes."""
        args, place, step = self.args, self.place, self.progress.step
        lr = self.learning_rate(step)
        rng = np.random.default_rng([args.seed, step])
        if args.flip:
            batch = flip(batch, place.shard(torch.from_numpy(rng.random(args.batch_size) < 0.5)))
        pixels = rows, columns = choose_pixels(rng, args.resolution, args.pixel_stride, place.device)
        images = batch['image'].to(place.device, non_blocking=True)
        # Drawn for the whole batch, so that the noise of an image is the same for any number of processes.
        slots = self.model.slot_attention.initial_slots(
            args.batch_size, args.num_slots, place.generator(args.seed, step)
        )
        with place.autocast():
            recons = self.prepared(images, pixels, slots=place.shard(slots)).recons
        loss = F.mse_loss(recons.float(), images[:, :, rows][..., columns])
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.clip or math.inf)
        loss = place.mean(loss.detach())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group['lr'] = lr
            # The flag with which torch's GradScaler has a fused optimiser skip a step without a synchronisation.
            optimizer.found_inf = (~torch.isfinite(loss + norm)).float()
            optimizer.step()
        return torch.stack([loss, norm])

    def log_window(self, window: Tensor) -> str:
        """A point of the training curves: means over the steps since the last one, as a text for the bar.

        window [n, 2]: loss and gradient norm of each.
        """
        progress, args = self.progress, self.args
        losses, norms = window.double().cpu().T
        finite = torch.isfinite(losses + norms)
        lr = self.learning_rate(progress.step - 1)
        for i, good in enumerate(finite.tolist()):
            progress.skipped_in_row = 0 if good else progress.skipped_in_row + 1
            if progress.skipped_in_row == MAX_SKIPPED:
                step = progress.step - len(window) + i + 1
                raise TrainingError(
                    f'{MAX_SKIPPED} steps in a row could not be taken: at step {step} the loss is {losses[i]:.3g}, the '
                    f'gradient norm {norms[i]:.3g}, the learning rate {lr:.1e}; the last checkpoint is untouched; '
                    'try a lower --lr or --clip 1.0'
                )
        seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
        rate, self.timed = self.timed * args.batch_size / seconds, 0
        progress.seconds += seconds
        progress.skipped += int((~finite).sum())
        progress.epoch_steps += int(finite.sum())
        progress.epoch_loss += losses[finite].sum().item()
        if finite.any():
            self.log.add_scalar('train/loss', losses[finite].mean().item(), progress.step)
            self.log.add_scalar('train/grad_norm', norms[finite].mean().item(), progress.step)
        self.log.add_scalar('train/lr', lr, progress.step)
        self.log.add_scalar('train/skipped_steps', progress.skipped, progress.step)
        if rate:  # not where all these steps were taken before the run was stopped
            self.log.add_scalar('system/images_per_second', rate, progress.step)
        return f'loss {losses.mean():.4f}, {rate:.0f} images/s'

    def learning_rate(self, step: int) -> float:
        args = self.args
        return learning_rate(step, args.lr, args.warmup_steps, args.decay_steps, args.cooldown, self.total_steps)

    def validate(self) -> dict[str, float]:
        """Validate, log and print the epoch that has just ended; returns the scores. Raises Stopped."""
        progress, place, begun = self.progress, self.place, time.monotonic()
        scores, figures = evaluate(self.model, self.loaders[1], place, self.stop)
        self.clock += time.monotonic() - begun  # it measures training
        if progress.window:  # only now: a checkpoint from before this knows of no point of this step, and replaces all
            self.log_window(torch.tensor(progress.window))
        train_loss = progress.epoch_loss / max(progress.epoch_steps, 1)
        for group, values in (('val', scores), ('slots', figures)):
            for name, value in values.items():
                self.log.add_scalar(f'{group}/{name}', value, progress.step)
        if place.rank == 0:
            log_figures(self.model, self.loaders[1].dataset, place, self.log, progress.step)
        summary = '  '.join(f'{SCORES[name]} {scores[name]:.4f}' for name in scores)
        minutes, rate = progress.seconds / 60, progress.step * self.args.batch_size / max(progress.seconds, 1e-9)
        self.say(
            f'epoch {progress.epochs + 1:3d}  {minutes:5.1f} min  train loss {train_loss:.4f}  '
            f'val {summary}  {rate:.0f} images/s'
        )
        diagnosis = diagnose(figures)
        progress.lasting = progress.lasting + 1 if diagnosis == progress.diagnosis else 1
        progress.diagnosis = diagnosis
        if diagnosis and progress.lasting == SETTLED:
            text = f'{DIAGNOSES[diagnosis][1]} ({diagnosis} {figures[diagnosis]:.2f})'
            self.say(text)
            self.log.add_text('diagnosis', text, progress.step)
        progress.epochs, progress.seen, progress.window = progress.epochs + 1, 0, []
        progress.epoch_loss, progress.epoch_steps = 0.0, 0
        return scores

    def finish_epoch(self) -> dict[str, float]:
        """validate(), then write the checkpoints that are due."""
        scores = self.validate()
        score = scores.get('fg_ari', -scores['mse'])
        if score > self.progress.best:
            self.progress.best = score
            self.save('best_model.pth')
        if self.args.save_every and self.progress.epochs % self.args.save_every == 0:
            self.save(f'checkpoint_epoch_{self.progress.epochs}.pth')
        self.save('last.pth')
        return scores

    def save(self, name: str) -> None:
        """Write a checkpoint; where that fails, say so and go on: the next one is tried again."""
        self.saved_at = time.monotonic()
        if self.place.rank > 0:
            return
        self.log.flush()  # or the points before this checkpoint would be lost to a kill
        path = self.args.log_dir / 'checkpoints' / name
        states = [optimizer.state_dict()['state'] for optimizer in self.optimizers]
        try:
            save_checkpoint(
                path, self.model, args=self.flags(), data=data_of(self.args), progress=asdict(self.progress),
                optimizers=states,
            )  # fmt: skip
            self.failed = False
            self.log.reopen()
        except OSError as error:
            self.failed = True
            print(f'cannot write {path} ({error.strerror}); training goes on without', file=sys.stderr, flush=True)

    def flags(self) -> dict[str, int | float | str]:
        """The flags that make the run what it is; they travel in the checkpoint."""
        values = {name: getattr(self.args, name) for name in MODEL_FLAGS + DATA_FLAGS + OPTIMISATION_FLAGS}
        return {name: value if isinstance(value, int | float) else str(value) for name, value in values.items()}

    def say(self, text: str) -> None:
        if self.place.rank == 0:
            print(text, flush=True)


class Writer(SummaryWriter):
    def add_hparams(self, flags: dict, scores: dict[str, float]) -> None:
        """As SummaryWriter's, but in this run and without points: TensorBoard takes the last ones of the curves."""
        for summary in hparams(flags, scores):
            self.file_writer.add_summary(summary)


class Log:
    """A Writer of the first process only, which a full disk silences but does not break.

    Points of an earlier part of the run from `first_step` on are replaced: those that a killed one wrote
    after its checkpoint.
    """

    def __init__(self, log_dir: Path, first_step: int, place: Place):
        self.log_dir, self.failed = log_dir, False
        threading.excepthook = self.excepthook
        self.writer = Writer(log_dir, purge_step=first_step) if place.rank == 0 else None

    def __getattr__(self, name: str) -> Callable[..., None]:
        """add_scalar(), add_figure(), flush() ... of the writer."""

        def call(*args, **kwargs) -> None:
            if self.writer is None or self.failed:
                return
            try:
                getattr(self.writer, name)(*args, **kwargs)
            except OSError as error:
                self.failed = True
                print(
                    f'cannot write TensorBoard files ({error.strerror}); training goes on', file=sys.stderr, flush=True
                )

        return call

    @staticmethod
    def excepthook(args) -> None:
        """The writer's thread hands its OSError on to the next call; it need not print a traceback too."""
        if not issubclass(args.exc_type, OSError):
            threading.__excepthook__(args)

    def reopen(self) -> None:
        """Try again, in a new file, where writing has failed."""
        if self.failed:
            with contextlib.suppress(OSError):  # it was said before
                self.writer, self.failed = Writer(self.log_dir), False


def mask_statistics(masks: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Figures that tell whether, and how, the slots went wrong; each of every image, [B].

    mask_entropy  of the slots at a pixel, mean over the true foreground (without labels: all
                  pixels), as a share of log K; 1: all slots share everything
    sameness      ARI with the segmentation of the next image, which has nothing to do with it;
                  1: the masks do not depend on the image; only for two images or more
    largest_slot  share of the true foreground (without labels: of the image) of the slot that holds
                  most of it; NaN for an image with one object, where it ought to be 1
    missed        share of the objects most of which lies in the slot of the background
    split         share of the foreground in neither that slot nor its object's main slot

    masks [B, K, 1, H, W], labels [B, H, W] with 0 = background; the last two need labels.
    """
    found = segmentation(masks)
    where = torch.ones_like(found) if labels is None else labels > 0
    table = contingency_table(where.long() if labels is None else labels, found).double()  # [B, labels, slots]
    objects = table[:, 1:]
    area = objects.sum((1, 2))
    entropy = torch.special.entr(masks.squeeze(2).double()).sum(dim=1) / math.log(max(masks.shape[1], 2))
    statistics = {
        'mask_entropy': (entropy * where).sum((1, 2)) / area,
        'largest_slot': objects.sum(1).amax(1) / area,
    }
    if len(found) > 1:
        statistics['sameness'] = adjusted_rand_index(found, found.roll(1, dims=0))
    if labels is not None:
        in_sight = objects.sum(2) > 0
        statistics['largest_slot'].masked_fill_(in_sight.sum(1) < 2, math.nan)
        background = table[:, :1].argmax(dim=2)  # [B, 1]
        statistics['missed'] = ((objects.argmax(2) == background) & in_sight).sum(1) / in_sight.sum(1)
        elsewhere = objects * (torch.arange(objects.shape[2], device=objects.device) != background)[:, None]
        statistics['split'] = (elsewhere.sum(2) - elsewhere.amax(2)).sum(1) / area
    return statistics


def diagnose(figures: dict[str, float]) -> str:
    """The first of DIAGNOSES that the means of mask_statistics() show, '' for none.

    Without labels the largest slot is the background's, and rightly large: only all of it counts.
    """
    for figure, (limit, _) in DIAGNOSES.items():
        if figure == 'largest_slot' and 'missed' not in figures:
            limit = 0.999
        if figures.get(figure, -math.inf) > limit:
            return figure
    return ''


@torch.no_grad()
def evaluate(
    model: SlotAttentionAutoEncoder,
    loader: DataLoader,
    place: Place,
    stop: Stop | None = None,
    num_slots: int | None = None,
    num_iterations: int | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Means over the images of all processes: the SCORES (see segmentation_scores()), and mask_statistics().

    The attention's FG-ARI is that of the last iteration's maps, enlarged to the image.

    Consistency asks whether an object is given the same slot again: the ARI of the segmentations
    from two independent slot initialisations, over the true foreground (over the whole image
    where there are no masks; then the other segmentation scores are left out). Learned slots have
    one initialisation only. num_slots and num_iterations: as in SlotAttention.forward. Raises Stopped
    when a signal has come to `stop`.
    """
    model.eval()
    scores = {}
    batch_size = loader.batch_size * place.world_size

    def see(images: Tensor, *key: int) -> SlotAttentionOutput:
        slots = model.slot_attention.initial_slots(
            batch_size, num_slots or model.config.num_slots, place.generator(0, *key)
        )
        with place.autocast():
            return model(images, slots=place.shard(slots)[: len(images)], num_iterations=num_iterations)

    def score(batch: dict[str, Tensor], i: int) -> None:
        batch = {name: values.to(place.device, non_blocking=True) for name, values in batch.items()}
        images, labels = batch['image'], batch.get('mask')
        first = second = see(images, i, 0)
        if model.config.slot_init == 'gaussian':
            second = see(images, i, 1)
        found = {'mse': (first.recons.float() - images).square().mean((1, 2, 3))}
        if labels is not None:
            found |= segmentation_scores(labels, first.masks)
            attn = F.interpolate(first.attn[:, -1].float(), labels.shape[1:], mode='bilinear')
            found['attn_fg_ari'] = fg_ari(labels, attn)
        found['consistency'] = adjusted_rand_index(
            segmentation(first.masks), segmentation(second.masks), None if labels is None else labels > 0
        )
        found |= mask_statistics(first.masks, labels)
        for name, values in found.items():
            scores.setdefault(name, []).append(values.double().cpu())

    batches = iter(loader)
    for i in range(math.ceil(len(loader.dataset) / batch_size)):  # of the last, a process may have no part
        if (batch := next(batches, None)) is not None:
            score(batch, i)
        if stop is not None and (signal := place.largest(stop.signal or 0)):
            raise Stopped(signal)
    parts = place.gather({name: torch.cat(values) for name, values in scores.items()})
    means = {name: torch.cat([part[name] for part in parts if name in part]).nanmean().item() for name in parts[0]}
    return {name: means.pop(name) for name in SCORES if name in means}, means


@torch.no_grad()
def log_figures(model: SlotAttentionAutoEncoder, dataset: Dataset, place: Place, log: Log, step: int) -> None:
    """The same few images at every step, so that TensorBoard's slider shows their slots emerge.

    The histogram is of the slots' shares of the image, of up to 64 images: one slot for each object
    gives a peak at 0, the empty slots, one at the size of objects, and one of the backgrounds.
    """
    model.eval()
    batch = dataset.__getitems__(list(range(min(64, len(dataset)))))
    batch = {name: values.to(place.device) for name, values in batch.items()}
    with place.autocast():
        output = model(batch['image'], generator=place.generator(0))
        log.add_histogram('slots/mask_size', output.masks.float().mean((2, 3, 4)), step)
        recons, masks, slots, attn = (values[:6] for values in output)
        rgbs, _ = model.decode(slots)
    images, labels = batch['image'][:6], batch['mask'][:6] if 'mask' in batch else None
    decomposition = visualize_slots(images, recons, masks, rgbs=rgbs, labels=labels)
    attention = visualize_attention_evolution(attn, images=images)
    for name, figure in (('decomposition', decomposition), ('attention', attention)):
        figure.set_facecolor('white')  # TensorBoard would drop what is transparent, and roughen the text
        log.add_figure(f'slots/{name}', figure, step)


# --- Runs ------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(log_dir: Path) -> Iterator[None]:
    """The folder, made if need be, is this run's alone. Raises ConfigError when it cannot be."""
    with contextlib.ExitStack() as stack:
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(log_dir / '.lock', 'a'))
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however a run ends
        except BlockingIOError:
            raise ConfigError(f'another run is writing to {log_dir}; choose another --log_dir') from None
        except OSError as error:
            raise ConfigError(f'cannot write to {log_dir} ({error.strerror}); choose another --log_dir') from error
        yield


def open_log_dir(log_dir: Path, resume: Path | None) -> None:
    """Make the folder of the checkpoints; a new run moves an earlier one aside.

    Raises ConfigError when the folder cannot be written.
    """
    checkpoints = log_dir / 'checkpoints'
    try:
        checkpoints.mkdir(exist_ok=True)
        for leftover in checkpoints.glob('.*.pth.*'):  # of a run that was killed while it was saving
            leftover.unlink()
        if resume is None or resume.resolve().parent != checkpoints.resolve():
            earlier = list(log_dir.glob('events.out.tfevents.*'))
            if earlier or any(checkpoints.iterdir()):
                aside = next(log_dir / f'run_{n}' for n in itertools.count(1) if not (log_dir / f'run_{n}').exists())
                aside.mkdir()
                for path in (*earlier, checkpoints):
                    shutil.move(path, aside)
                checkpoints.mkdir()
                print(f'the earlier run in {log_dir} is now in {aside}')
        tempfile.TemporaryFile(dir=checkpoints).close()
    except OSError as error:
        raise ConfigError(f'cannot write to {checkpoints} ({error.strerror}); choose another --log_dir') from error


def newest_run(log_dir: Path) -> Path | None:
    """--resume auto: the newest checkpoint of a run that can be read, None where there is none; others are named."""
    checkpoints = log_dir / 'checkpoints'
    for path in sorted(checkpoints.glob('*.pth'), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            load_run(path)
            return path
        except CheckpointError as error:
            print(f'{error}; trying an older one', file=sys.stderr)
    print(f'no checkpoint to go on from in {checkpoints}: a new run')
    return None


def load_run(path: Path) -> dict:
    """As load_checkpoint(), but 'progress' as a Progress, and 'args' as settle() takes them.

    Raises CheckpointError also where there is a model, but no run to go on with.
    """
    checkpoint = load_checkpoint(path)
    training = checkpoint['training']
    if not {'args', 'progress', 'optimizers'} <= training.keys():
        raise CheckpointError(f'{path} holds a model but no training state: it cannot be resumed or scored')
    flags, progress = training['args'], training['progress']
    if not isinstance(flags, dict) or not isinstance(progress, dict):
        raise CheckpointError(f'{path} is damaged: its training state is none')
    missing = [name for name in MODEL_FLAGS + DATA_FLAGS + OPTIMISATION_FLAGS if name not in flags]
    missing += [field.name for field in fields(Progress) if field.name not in progress]
    if missing:
        raise CheckpointError(f'{path} is of another version: it does not say {", ".join(missing)}')
    for name, value in asdict(Progress()).items():
        found = progress[name]
        pairs = name == 'window' and isinstance(found, list) and all(same_form(pair, [0.0, 0.0]) for pair in found)
        if not (pairs or same_form(found, value)) or (isinstance(found, int) and found < 0):
            raise CheckpointError(f'{path} is damaged: its {name} is {str(found).splitlines()[:1]}')
    try:  # what the command line would refuse, a checkpoint may not bring
        flags = create_parser(exit_on_error=False).parse_args([f'--{name}={value}' for name, value in flags.items()])
    except (argparse.ArgumentError, SystemExit) as error:
        raise CheckpointError(f'{path} is damaged: {str(error).splitlines()[:1]}') from error
    if asdict(checkpoint['config']) != {name: getattr(flags, name) for name in MODEL_FLAGS}:
        raise CheckpointError(f'{path} is damaged: its model is not the one of its flags')
    training['args'], training['progress'] = vars(flags), Progress(**progress)
    return checkpoint


def data_of(args: argparse.Namespace) -> dict:
    """What create_dataset() needs to give the same images again."""
    return dict(
        dataset_type=args.dataset, resolution=args.resolution, max_objects=args.max_objects,
        min_objects=args.min_objects, seed=args.data_seed, data_dir=args.data_dir, variant=args.variant,
    )  # fmt: skip


def evaluate_checkpoint(args: argparse.Namespace, checkpoint: dict, place: Place) -> int:
    """--eval: print the scores of a checkpoint on the test split as a table; returns the exit status."""
    config = replace(checkpoint['config'], slot_worth=args.slot_worth, refine_steps=args.refine_steps)
    checkpoint = checkpoint | {'config': config}
    model = build_model(checkpoint, args.resume).to(place.device)
    with place.first():
        test = create_dataset(split='test', size=args.val_size, **data_of(args))
    loader = wrap_in_loader(test, 32 * place.world_size, False, rank=place.rank, world_size=place.world_size)
    scores, figures = evaluate(model, loader, place, num_slots=args.num_slots, num_iterations=args.num_iterations)
    if place.rank == 0:
        print(f'{args.resume}, step {checkpoint["training"]["progress"].step}')
        print(f'{len(test)} test images of {args.dataset}, {args.num_slots} slots, {args.num_iterations} iterations\n')
        print('  '.join(f'{SCORES[name]:>11}' for name in scores))
        print('  '.join(f'{value:11.4f}' for value in scores.values()))
        if diagnosis := diagnose(figures):
            print(DIAGNOSES[diagnosis][1], file=sys.stderr)
    return 0


def create_run(args: argparse.Namespace, checkpoint: dict | None, place: Place, stop: Stop) -> Run:
    """A run, new or as it was when the checkpoint was written. Raises what main() reports."""
    torch.manual_seed(args.seed)
    config = ModelConfig(**{name: getattr(args, name) for name in MODEL_FLAGS})
    model = SlotAttentionAutoEncoder(config) if checkpoint is None else build_model(checkpoint, args.resume)
    model = model.to(place.device, memory_format=torch.channels_last)
    optimizers, progress = create_optimizers(model, args.optimizer), Progress()
    if checkpoint is not None:
        progress = checkpoint['training']['progress']
        load_optimizers(optimizers, checkpoint['training']['optimizers'], args.resume)
    with place.first():  # it may have to be prepared
        loaders = create_dataloader(
            args.dataset, args.batch_size, args.resolution, args.max_objects, args.min_objects,
            args.train_size or None, args.val_size, args.seed, args.data_seed, args.num_workers,
            place.device.type == 'cuda', args.data_dir, args.variant, place.rank, place.world_size,
        )  # fmt: skip
    return Run(args, place, model, optimizers, loaders, progress, log=None, stop=stop)


def load_optimizers(optimizers: list[torch.optim.Optimizer], states: list[dict], path: Path) -> None:
    """Give each the state that it had. Raises CheckpointError where it does not fit: torch would crash in a step."""
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            for group in optimizer.param_groups:
                for p in group['params']:
                    p.grad = torch.zeros_like(p)
            optimizer.step()  # nothing moves without a gradient, but the state takes its form
            expected = optimizer.state_dict()
            optimizer.load_state_dict(expected | {'state': state})
            if not same_form(optimizer.state_dict()['state'], expected['state']):
                raise ValueError('other keys, types or shapes')
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise CheckpointError(f'{path}: the state of the optimiser does not fit the model') from error


def train(args: argparse.Namespace, checkpoint: dict | None, place: Place) -> int:
    """A whole run, new or resumed; returns the exit status."""
    with contextlib.ExitStack() as stack:
        stop = Stop()
        run = create_run(args, checkpoint, place, stop)
        progress = run.progress
        if progress.epochs >= args.epochs:
            if args.auto:  # a loop around this command is to end well
                run.say(f'{args.resume} is the end of its run of {args.epochs} epochs: nothing left to do')
                return 0
            raise ConfigError(
                f'{args.resume} has {progress.epochs} epochs behind it: --epochs {args.epochs} leaves none to do'
            )
        if place.rank == 0:
            stack.enter_context(locked(args.log_dir))
            open_log_dir(args.log_dir, args.resume)
        run.log = Log(args.log_dir, progress.step - len(progress.window) + 1, place)
        stack.callback(run.log.close)
        stack.enter_context(stop)
        parameters = sum(p.numel() for p in run.model.parameters())
        run.say(f'{args.architecture} model of {parameters:,} parameters on {place}')
        run.say(f'{args.dataset}: {run.loaders[0].dataset}')
        run.say(f'watch it with: tensorboard --logdir {args.log_dir}')
        table = ['|flag|value|', '|-|-|', *(f'|{name}|{value}|' for name, value in vars(args).items())]
        run.log.add_text('configuration', '\n'.join(table))
        last = args.log_dir / 'checkpoints' / 'last.pth'
        try:
            while progress.epochs < args.epochs:
                run.train_epoch()
                scores = run.finish_epoch()
        except Stopped as stopped:
            run.save('last.pth')
            if not run.failed:
                run.say(f'stopped at step {progress.step}; to go on: python train.py --resume {last}')
            return 128 + stopped.args[0]
        run.log.add_hparams(run.flags(), {f'val/{name}': value for name, value in scores.items()})
        run.say(f'best validation score {progress.best:.4f}: {last.with_name("best_model.pth")}')
        return int(run.failed)  # a run whose end could not be saved has not gone well


def main(args: argparse.Namespace) -> int:
    """Train or score as asked; returns the exit status. A user's mistake becomes one line and a 2."""
    try:
        place = Place.choose(args.device, args.amp, args.compile and not args.eval)  # which has no step to compile
        args.auto = str(args.resume) == 'auto'
        if args.auto:
            with place.first():
                found = newest_run(args.log_dir or Path('logs')) if place.rank == 0 else None
            args.resume = place.gather(found)[0]
        checkpoint = None if args.resume is None else load_run(args.resume)
        args = settle(args, checkpoint and checkpoint['training']['args'])
        status = (evaluate_checkpoint if args.eval else train)(args, checkpoint, place)
        if place.world_size > 1:
            dist.destroy_process_group()
        return status
    except (ConfigError, CheckpointError, DataError, TrainingError, OSError) as error:
        print(f'train.py: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted before the first step: nothing to save', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main(parse_args()))
