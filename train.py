"""Trains a Slot Attention autoencoder, scores it, logs to TensorBoard and writes checkpoints.

    python train.py                                              # shapes, 64x64, up to 6 objects
    python train.py --epochs 4                                   # a first look, in minutes
    python train.py --architecture paper --dataset tetrominoes   # the paper's model and schedule
    python train.py --resume auto                                # continue the last run
    torchrun --nproc_per_node 2 train.py                         # two processes share every batch
    python train.py --eval --search --resume logs/checkpoints/last.pth

The order of the images is a function of (seed, epoch), the noise of the slots of (seed, step), the
learning rate of the step: a resumed run continues as if it had never stopped.
"""

import os
import signal
import sys

if __name__ == '__main__':  # Ctrl-C during the imports below, which take seconds
    signal.signal(signal.SIGINT, lambda *_: (print('interrupted', file=sys.stderr), os._exit(130)))

import argparse
import contextlib
import itertools
import math
import shlex
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # not on Windows, where nothing stops two runs from sharing a folder
    fcntl = None

from dataset import (  # isort: skip
    SOURCES, SPLITS, DataError, Parser, add_data_flags, check_data_flags, create_dataloader, create_dataset,
    data_options, flip, plain_output, wrap_in_loader,
)  # fmt: skip
from slot_attention import (  # isort: skip
    DIAGNOSES, IGNORE, PRETRAINED, SCORES, CheckpointError, ConfigError, ModelConfig, SlotAttentionAutoEncoder,
    SlotAttentionOutput, adjusted_rand_index, build_model, create_model, damaged, diagnose, fg_ari, find_checkpoint,
    keep_loss, load_checkpoint, mask_statistics, newest_checkpoint, refine, save_checkpoint, segmentation,
    segmentation_scores,
)  # fmt: skip
from visualize import visualize_attention_evolution, visualize_slots

MODEL_FLAGS = tuple(item.name for item in fields(ModelConfig))  # saved as the configuration of the model
# Weights and settings of loss_terms(): they may change on resume, and `paper` has none of them.
FAST_LOSS_FLAGS = ('mixture', 'mixture_from', 'drop_from', 'drop_share', 'keep_weight', 'pixel_stride')
# The defaults of --architecture paper: Table 11. Those of the model are in ModelConfig.
PAPER_RECIPE = dict(
    optimizer='adam', steps=500_000, batch_size=64, lr=4e-4, warmup_steps=10_000, decay_steps=100_000, cooldown=0.0,
    clip=0.0,
)  # fmt: skip
# Defaults of the fast architecture that differ with the data set. All Tetrominoes images have three objects: with four
# slots training would see no redundant one.
FAST_RECIPES = {
    'tetrominoes': dict(num_slots=6), 'multi_dsprites': dict(steps=18_000), 'clevr6': dict(steps=6_000),
}  # fmt: skip
# Which flags may differ from the checkpoint: 'r' when a run is resumed, 'e' with --eval; '-' are not saved in it.
FREE = {
    **dict.fromkeys(('data_dir', 'masks'), 're'),
    **dict.fromkeys(('num_slots', 'spare_slots', 'num_iterations', 'max_objects', 'val_size'), 'e'),
    **dict.fromkeys(('steps', 'epochs', 'lr', 'warmup_steps', 'decay_steps', 'cooldown', 'clip'), 'r'),
    **dict.fromkeys(FAST_LOSS_FLAGS, 'r'),
    **dict.fromkeys(('log_every', 'val_every', 'save_every', 'save_minutes'), 'r'),
    **dict.fromkeys(('log_dir', 'resume', 'auto', 'pretrained', 'eval', 'split', 'search', 'refine_steps'), '-'),
    **dict.fromkeys(('device', 'amp', 'num_workers'), '-'),
}
# Titles of the scores of an image; the names are those of the curves.
TITLES = {
    'mse': 'MSE', **{name: title for name, (title, _) in SCORES.items()}, 'attn_fg_ari': 'attn FG-ARI',
    'consistency': 'consistency',
}  # fmt: skip
VAL_STEPS = 1000  # between two validations with --val_every 0
MAX_SKIPPED = 10  # consecutive steps without a finite gradient that end the run
MAX_MSE = 4.0  # the largest possible for reconstructions in [-1, 1]: above it the run has diverged


class TrainingError(RuntimeError):
    """Training cannot continue; the message gives the reason and the remedy in one line."""


class Interrupted(Exception):
    """Raised on SIGINT, SIGTERM or SIGHUP; `args[0]` is the signal number."""


def print0(text: str) -> None:
    """Prints from the main process only."""
    if os.environ.get('RANK', '0') == '0':
        print(text, flush=True)


def print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- Command line ----------------------------------------------------------------------------


def create_parser() -> Parser:
    """All flags, with the defaults of a new run of the fast architecture on shapes."""
    parser = Parser('train.py', __doc__.split('\n')[0])
    flag = parser.flag
    # fmt: off
    add_data_flags(parser)
    flag('train_size', int, 0, 'most training images to use; 0: all, and 10,000 for shapes', 0)
    flag('val_size', int, 320, 'most validation images to use; with --eval: most images of --split', 1)
    flag('flip', int, 0, '1: mirror each training image left to right with probability 0.5',
         choices=(0, 1))
    parser.section('model')
    for item in fields(ModelConfig):
        if item.name != 'resolution':  # which describes the data, too
            meta = item.metadata
            flag(item.name, item.type, meta['fast'], meta['help'], meta['low'], meta['high'], meta['choices'])
    parser.section('loss')
    flag('mixture', float, 0.1, "weight of the variance of the slots' colours at a pixel", 0)
    flag('mixture_from', float, 0.4, 'share of the run after which the mixture rises, within a fifth of it', 0, 1)
    flag('drop_from', float, 0.2, 'share of the run without drops, at its beginning', 0, 1)
    flag('drop_share', float, 0.5, 'share of the later steps with drops', 0, 1)
    flag('keep_weight', float, 0.1, 'weight of the loss of KeepHead', 0)
    flag('pixel_stride', int, 2, 'compute the loss on every N-th row and column, at random offsets', 1, 16)
    parser.section('optimisation')
    flag('steps', int, 7000, 'length of the run in steps; 0: use --epochs', 0)
    flag('epochs', int, 0, 'length of the run in passes over the training images; 0: use --steps', 0)
    flag('batch_size', int, 16, 'images per step, of all processes together', 1)
    flag('lr', float, 2e-3, 'peak learning rate', 0)
    flag('warmup_steps', int, 300, 'steps of linear warm-up of the learning rate', 0)
    flag('decay_steps', int, 0, 'steps in which the learning rate halves; 0: it does not', 0)
    flag('cooldown', float, 0.5, 'share of the run, at its end, in which the learning rate falls to 0', 0, 1)
    flag('clip', float, 1.0, 'largest gradient norm; 0: no clipping', 0)
    flag('optimizer', str, 'muon', 'adam, or muon: Muon for the matrices and Adam for the rest',
         choices=('adam', 'muon'))
    flag('seed', int, 0, 'seed of the weights, the order of the images and the noise of the slots', 0)
    parser.section('logging')
    flag('log_dir', Path, Path('logs'), 'folder of the TensorBoard files, with checkpoints/ in it')
    flag('log_every', int, 50, 'steps between two points of the training curves', 1)
    flag('val_every', int, 0, f'epochs between two validations; 0: {VAL_STEPS:,} steps', 0)
    flag('save_every', int, 10, 'epochs between two files checkpoint_epoch_N.pth; 0: none', 0)
    flag('save_minutes', float, 5.0, 'minutes between two writes of last.pth', 0)
    flag('resume', Path, None, 'checkpoint, or folder of a run, to continue or to score with --eval; auto: the '
         'checkpoint of the most steps in --log_dir')
    parser.section('evaluation')
    flag('eval', bool, False, 'score the checkpoint --resume and exit')
    flag('pretrained', str, None, 'with --eval: weights that come with the repository, by data set; paper_: of the '
         "paper's architecture", choices=tuple(PRETRAINED))
    flag('split', str, 'test', 'with --eval: the images to score', choices=(*SPLITS, 'all'))
    flag('search', bool, False, 'with --eval: also score slots after gradient descent on the reconstruction error of '
         'each image')
    flag('refine_steps', int, 20, 'with --search: steps of gradient descent on the slots', 0)
    parser.section('system')
    flag('device', str, 'auto', 'auto: a CUDA GPU if there is one', choices=('auto', 'cpu', 'cuda'))
    flag('amp', str, 'auto', 'bfloat16 autocast, with fast for the convolutions; auto: if the hardware computes in it; '
         'off with --eval', choices=('auto', 'on', 'off'))
    flag('num_workers', int, 0, 'processes that load batches; 0: load in the training process', 0)
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line twice: first to choose the defaults, then with these. A mistake ends the program.

    Of the result, `resume` is the file of the checkpoint, and `auto` tells whether --resume was auto.
    """
    parser = create_parser()
    given = parser.given(argv)
    check_given(parser, given)
    try:
        path = resumed_file(parser, given)
        parser.set_defaults(**(checkpoint_defaults(parser, path, given) if path else recipe_defaults(given)))
    except (CheckpointError, ConfigError) as error:
        parser.error(str(error))
    if 'eval' in given:
        parser.set_defaults(amp='off')  # the scores depend on no hardware
    if 'epochs' in given or 'steps' in given:
        parser.set_defaults(epochs=0, steps=0)
    args = parser.parse_args(argv)
    args.resume, args.auto = path, given.get('resume') == Path('auto')
    check_data_flags(parser, args, given)
    if args.architecture == 'paper':
        parser.refuse(given, FAST_LOSS_FLAGS, 'with --architecture paper')
    if bool(args.steps) == bool(args.epochs) and not args.eval:
        parser.error(f'--steps {args.steps} and --epochs {args.epochs}: one of them must be 0 and the other not')
    return args


def resumed_file(parser: Parser, given: dict) -> Path | None:
    """The checkpoint that --resume or --pretrained names, None for a new run."""
    if given.get('resume') != Path('auto'):
        return find_checkpoint(given['resume']) if 'resume' in given else PRETRAINED.get(given.get('pretrained'))
    folder = given.get('log_dir', parser.get_default('log_dir')) / 'checkpoints'
    path = newest_checkpoint(folder)
    if path is None and 'eval' in given:
        raise CheckpointError(f'no checkpoint in {folder} to score')
    if path is None:
        print0(f'no checkpoint in {folder} to continue: starting a new run')
    return path


def recipe_defaults(flags: dict) -> dict:
    """The defaults of a new run that differ with the architecture or the data set."""
    architecture, dataset = flags.get('architecture', 'fast'), flags.get('dataset', 'shapes')
    if dataset not in SOURCES:
        raise ConfigError(f'this version has no --dataset {dataset}')
    source = SOURCES[dataset]
    num_slots = source.num_slots
    if dataset in ('shapes', 'clevr6'):  # which have as many objects as the flag allows
        num_slots = flags.get('max_objects', 6) + 1
    recipe = ModelConfig.defaults(architecture) | dict(resolution=source.resolution)
    resolution = flags.get('resolution', source.resolution)
    if architecture == 'paper':
        hidden_dim = 64 if resolution > 64 else 32  # Tables 4-7
        return recipe | PAPER_RECIPE | dict(num_slots=num_slots, hidden_dim=hidden_dim)
    recipe |= dict(num_slots=num_slots, pixel_stride=2 if resolution <= 64 else 3)
    return recipe | FAST_RECIPES.get(dataset, {})


def checkpoint_defaults(parser: Parser, path: Path, given: dict) -> dict:
    """The defaults of a resumed run: its own flags. Raises CheckpointError, and ConfigError for a contradiction."""
    checkpoint = load_checkpoint(path)
    if 'args' not in checkpoint['training']:
        raise CheckpointError(f'{path} was not written by train.py: its data are unknown, so it cannot be scored')
    config, flags = asdict(checkpoint['config']), checkpoint['training']['args']
    defaults = vars(parser.parse_args([])) | recipe_defaults(config | flags)
    saved = config | fill(saved_flags(defaults), flags, path)
    changed = {name: given[name] for name, old in saved.items() if str(given.get(name, old)) != str(old)}
    for name, new in changed.items():
        if ('e' if 'eval' in given else 'r') not in FREE.get(name, ''):
            raise ConfigError(f'--{name} {new} contradicts {path}, which has {name} {saved[name]}; leave it out')
    for name, new in changed.items() if 'eval' not in given else ():
        print0(f'{name}: {saved[name]} in the checkpoint, {new} from now on')
    return saved | (dict(log_dir=path.parent.parent) if path.parent.name == 'checkpoints' else {})


def fill(defaults: dict, saved: dict, path: Path) -> dict:
    """`defaults` with the values that a checkpoint has; prints which names it lacks and which are not known."""
    if lacking := sorted(defaults.keys() - saved.keys()):
        print0(f'{path} has no {", ".join(lacking)}: the default is used')
    if unknown := sorted(saved.keys() - defaults.keys()):
        print0(f'{path} has {", ".join(unknown)}, which this version does not know: ignored')
    return {name: saved.get(name, value) for name, value in defaults.items()}


def saved_flags(flags: dict) -> dict:
    """The flags that are saved with the training state; those of the model are saved with the model."""
    saved = {name: value for name, value in flags.items() if name not in MODEL_FLAGS and FREE.get(name) != '-'}
    return {name: str(value) if isinstance(value, Path) else value for name, value in saved.items()}


def check_given(parser: Parser, given: dict) -> None:
    """Refuses flags that need another one, or have no effect with another one."""
    if 'eval' in given:
        if 'resume' not in given and 'pretrained' not in given:
            parser.error('--eval needs --resume PATH, the checkpoint to score, or --pretrained NAME')
        if 'resume' in given and 'pretrained' in given:
            parser.error('--pretrained excludes --resume')
        of_training = [name for name, use in FREE.items() if use == 'r'] + ['num_workers']
        of_training += [] if given.get('resume') == Path('auto') else ['log_dir']
        parser.refuse(given, of_training, 'with --eval')
    else:
        parser.refuse(given, ('pretrained', 'split', 'search'), 'without --eval')
    if 'search' not in given:
        parser.refuse(given, ('refine_steps',), 'without --search')


# --- Device and processes --------------------------------------------------------------------


@dataclass(frozen=True)
class DistributedContext:
    """Device, number format, memory layout and processes: the only code that decides them.

    Without torchrun there is one process, and the collective operations return their argument.
    """

    device: torch.device
    bfloat16: bool = False
    rank: int = 0
    world_size: int = 1

    @classmethod
    def create(cls, device: str = 'auto', amp: str = 'auto') -> 'DistributedContext':
        """Reads the flags, and joins the other processes if torchrun has started some. Raises ConfigError."""
        if device == 'cuda' and not torch.cuda.is_available():
            raise ConfigError('--device cuda: PyTorch finds no CUDA GPU here; use --device cpu')
        if device == 'auto':
            device = 'cuda' if torch.cuda.is_available() else 'cpu'
        if device == 'cuda':
            pays = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            checks = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
            pays = any(getattr(torch.cpu, check, bool)() for check in checks)
        bfloat16 = amp == 'on' or (amp == 'auto' and pays)
        if not dist.is_torchelastic_launched():
            return cls(torch.device(device), bfloat16)
        index = None
        if device == 'cuda':
            index = int(os.environ['LOCAL_RANK'])
            if index >= torch.cuda.device_count():
                raise ConfigError(f'--nproc_per_node must be at most {torch.cuda.device_count()}, the GPUs here')
            torch.cuda.set_device(index)
        store, rank, world_size = next(dist.rendezvous('env://'))
        if os.environ['LOCAL_WORLD_SIZE'] == os.environ['WORLD_SIZE']:
            # One node: its store outlives processes that torchrun restarts, and holds the addresses of the dead ones.
            store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
        dist.init_process_group(store=store, rank=rank, world_size=world_size, timeout=timedelta(hours=6))
        return cls(torch.device(device, index), bfloat16, rank, world_size)

    def place(self, model: SlotAttentionAutoEncoder) -> SlotAttentionAutoEncoder:
        """Moves the model to the device, in the memory layout and number format that are fastest there."""
        if self.bfloat16:
            # The casts of the many small products of the fast architecture cost more than they gain.
            paper = model.config.architecture == 'paper'
            parts = [(model, 'encode'), (model, 'decode')] if paper else [(model.encoder.conv, 'forward')]
            for part, name in parts:
                # No cache of cast weights: in PyTorch 2.6 a weight first cast without gradient never gets one.
                autocast = torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
                setattr(part, name, autocast(getattr(part, name)))
        return model.to(self.device, memory_format=torch.channels_last)

    def generator(self, *key: int) -> torch.Generator:
        """A generator seeded with a hash of `key`."""
        seed = np.random.SeedSequence(key).generate_state(1)[0]
        return torch.Generator(self.device).manual_seed(int(seed))

    def shard(self, batch: Tensor) -> Tensor:
        """This process's part of a batch, in the order of the loaders: [B, ...] -> [B / world_size, ...]."""
        return batch[self.rank :: self.world_size]

    def average(self, tensors: list[Tensor]) -> None:
        """Replaces tensors by their means over the processes, in one operation."""
        if self.world_size > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors]) / self.world_size
            dist.all_reduce(flat)
            for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def gather(self, value) -> list:
        """The values of all processes, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The main process executes the body before the others do."""
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
    """Momentum, orthogonalised before each step (Jordan 2024; Liu et al. 2025, arXiv 2502.16982).

    An update changes every direction of a matrix equally, by an RMS of 0.2 * lr per entry, as Adam. Weights of
    convolutions are matrices [out, in * kernel]. torch.optim.Muon computes in bfloat16, which most CPUs only emulate.
    """

    MOMENTUM = 0.95

    def __init__(self, params, lr: float):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]['momentum'] = torch.zeros_like(p)
                momentum = self.state[p]['momentum'].lerp_(p.grad, 1 - self.MOMENTUM)
                update = orthogonalise(p.grad.lerp(momentum, self.MOMENTUM).flatten(1))
                p.add_(update.view_as(p), alpha=-0.2 * max(update.shape) ** 0.5 * group['lr'])


def orthogonalise(x: Tensor) -> Tensor:
    """Approximates the nearest semi-orthogonal matrix: [R, C], singular values between 0.7 and 1.2.

    Five steps of a Newton-Schulz iteration with Jordan's coefficients, X <- (a + b XX' + c (XX')^2) X.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonalise(x.mT).mT
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT  # [R, R]
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def create_optimizers(model: SlotAttentionAutoEncoder, name: str) -> list[torch.optim.Optimizer]:
    """Adam, or Muon for the matrices and Adam for the rest; the learning rate is set in every step."""
    matrices, rest = [], []
    for p in model.parameters():
        is_matrix = p.ndim > 1 and min(p.flatten(1).shape) > 4  # not position embeddings, mu, sigma
        (matrices if name == 'muon' and is_matrix else rest).append(p)
    adam = torch.optim.Adam(rest, fused=True)
    return [adam, Muon(matrices, lr=0.0)] if matrices else [adam]


def learning_rate(args: argparse.Namespace, step: int, total_steps: int) -> float:
    """Linear warm-up times exponential decay (paper Appendix E.3); in the last `cooldown` share also a fall to 0."""
    warmup = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    decay = 0.5 ** (step / args.decay_steps) if args.decay_steps else 1.0
    cool = min(1.0, (total_steps - step) / (args.cooldown * total_steps)) if args.cooldown else 1.0
    return args.lr * warmup * decay * cool


# --- Loss ------------------------------------------------------------------------------------


def loss_terms(
    model: SlotAttentionAutoEncoder, images: Tensor, slots: Tensor, rng: np.random.Generator,
    args: argparse.Namespace, progress: float,
) -> dict[str, Tensor]:  # fmt: skip
    """The weighted terms of the loss by name, [] each; their sum is trained on, and each is logged as train/NAME.

    images    [B, 3, H, W]
    slots     [B, K, D], initial slots
    rng       generator of this step
    progress  share of the run that is done
    """
    if args.architecture == 'paper':  # Section 2.2
        return {'mse': F.mse_loss(model(images, slots=slots).recons.float(), images)}
    offsets = rng.integers(args.pixel_stride, size=2).tolist()
    rows, columns = (torch.arange(i, args.resolution, args.pixel_stride, device=images.device) for i in offsets)
    drops, most = 0, min(args.drops, slots.shape[1] - 1)
    if most and progress >= args.drop_from and rng.random() < args.drop_share:
        drops = int(rng.integers(1, most + 1))
    attention = model.slot_attention
    state, _ = attention.iterate(model.encoder(images), slots, drops=drops)
    # [B, K, 3, h, w] and [B, K, 1, h, w]; the masks of dropped slots are 0: clamp them before a logarithm
    rgbs, masks = model.decode(attention.look(state), (rows, columns))
    recons = (rgbs * masks).sum(dim=1)  # [B, 3, h, w]
    errors = F.mse_loss(recons, images[:, :, rows][..., columns], reduction='none').mean(dim=1)  # [B, h, w]
    terms = {'mse': errors.mean()}
    if weight := args.mixture * min(max((progress - args.mixture_from) / 0.2, 0.0), 1.0):
        squares = rgbs.square().mean(dim=2, keepdim=True)  # [B, K, 1, h, w]
        terms['mixture'] = weight * ((masks * squares).sum(dim=1) - recons.square().mean(dim=1, keepdim=True)).mean()
    if args.drops:
        terms['keep'] = args.keep_weight * keep_loss(model, images, state, masks, errors, (rows, columns), rng)
    return terms


# --- Training --------------------------------------------------------------------------------


@dataclass
class Progress:
    """Training state that is saved in checkpoints, besides weights and optimisers; the epoch follows from the step."""

    step: int = 0  # steps done
    seconds: float = 0.0  # time spent training, without validation
    best: list = field(default_factory=lambda: [-math.inf, -math.inf])  # highest FG-ARI (else -MSE) and its -MSE
    curves: dict[str, list] = field(default_factory=dict)  # the value of each step since the last point, by name

    def record(self, values: dict[str, Tensor], **more: float) -> None:
        """Adds the values of a step to the curves."""
        self.seconds += more['seconds']
        for name, value in (values | more).items():
            self.curves.setdefault(name, []).append(float(value))


class Stop:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a flag that is checked between steps; the second one exits."""

    SIGNALS = tuple(getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name))
    received = 0  # number of the first signal

    def __enter__(self):
        self.before = {number: signal.getsignal(number) for number in self.SIGNALS}
        for number, handler in self.before.items():
            if handler is not signal.SIG_IGN:  # as nohup ignores SIGHUP
                signal.signal(number, self.handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.received:
            os._exit(128 + number)
        self.received = number

    def check(self, context: DistributedContext) -> None:
        """Raises Interrupted in all processes if one of them got a signal."""
        number = torch.tensor(self.received)
        if context.world_size > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        if number:
            raise Interrupted(int(number))


class Run:
    """A training run, new or as it was when --resume was written: its parts, and its state between two checkpoints."""

    def __init__(self, args: argparse.Namespace, context: DistributedContext):
        torch.manual_seed(args.seed)
        checkpoint = load_checkpoint(args.resume) if args.resume else None
        if checkpoint:
            model = build_model(checkpoint, args.resume).train()
        else:
            model = create_model(ModelConfig(**{name: getattr(args, name) for name in MODEL_FLAGS}))
        self.args, self.context, self.model, self.stop = args, context, context.place(model), Stop()
        with context.main_process_first():  # the data may have to be prepared
            self.train_loader, self.val_loader = create_dataloader(
                **data_options(args), batch_size=args.batch_size, train_size=args.train_size or None,
                val_size=args.val_size, seed=args.seed, num_workers=args.num_workers,
                pin_memory=context.device.type == 'cuda', rank=context.rank, world_size=context.world_size,
            )  # fmt: skip
        self.optimizers = create_optimizers(model, args.optimizer)
        self.progress = restore(self.optimizers, checkpoint, args.resume) if checkpoint else Progress()
        if checkpoint:
            check_fingerprint(self.train_loader.dataset, checkpoint, args.resume)
        self.total_steps = args.steps or args.epochs * len(self.train_loader)
        self.writer: SummaryWriter | None = None  # of the main process, see train()
        self.scores: dict[str, float] = {}  # of the last validation
        self.saved_at, self.save_failed = time.monotonic(), False  # time of the last write of a checkpoint

    def validates(self) -> bool:
        """Whether a validation follows the step."""
        every = self.args.val_every * len(self.train_loader) or VAL_STEPS
        return self.progress.step % every == 0 or self.progress.step == self.total_steps


def train_loop(run: Run) -> None:
    """Trains to the end of the run, from where it stopped. Raises Interrupted and TrainingError."""
    args, context, model, progress = run.args, run.context, run.model, run.progress
    size, total = len(run.train_loader), run.total_steps  # steps of an epoch, and of the run
    skipped = 0  # consecutive steps without a finite gradient
    for epoch in range(progress.step // size, math.ceil(total / size)):
        run.train_loader.sampler.set_epoch(epoch)
        first, last = progress.step - epoch * size, min(size, total - epoch * size)
        bar = tqdm(
            itertools.islice(run.train_loader, first, last), f'epoch {epoch + 1}', last, initial=first, leave=False,
            disable=context.rank > 0 or None,  # None: if the output is no terminal
        )  # fmt: skip
        start = time.monotonic()
        for batch in bar:
            run.stop.check(context)
            images, slots, rng = prepare_batch(run, batch)
            terms = loss_terms(model, images, slots, rng, args, progress.step / total)
            loss = sum(terms.values())
            model.zero_grad(set_to_none=True)
            loss.backward()
            terms = {name: term.detach() for name, term in (terms | {'loss': loss}).items()}
            context.average([p.grad for p in model.parameters() if p.grad is not None] + [*terms.values()])
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf).item()
            skipped, lr = 0 if math.isfinite(grad_norm) else skipped + 1, learning_rate(args, progress.step, total)
            for optimizer in run.optimizers if not skipped else ():
                for group in optimizer.param_groups:
                    group['lr'] = lr
                optimizer.step()

            progress.step += 1
            seconds = time.monotonic() - start
            progress.record(terms, grad_norm=grad_norm, skipped=skipped > 0, lr=lr, seconds=seconds)
            if skipped == MAX_SKIPPED:
                raise TrainingError(
                    f'{skipped} consecutive steps had no finite gradient: at step {progress.step} the loss is '
                    f'{terms["loss"]:.3g}; lower --lr or raise --warmup_steps'
                )
            if run.validates():
                validate(run)
                save(run, 'last.pth')
            elif progress.step % args.log_every == 0:
                means = log_curves(run)
                bar.set_postfix_str(f'loss {means["loss"]:.4f}, {args.batch_size / means["seconds"]:.0f} images/s')
            if args.save_every and progress.step % (args.save_every * size) == 0:
                save(run, f'checkpoint_epoch_{epoch + 1}.pth')
            if time.monotonic() - run.saved_at > args.save_minutes * 60:
                save(run, 'last.pth')
            start = time.monotonic()


def prepare_batch(run: Run, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, np.random.Generator]:
    """Images [B, 3, H, W] and initial slots [B, K, D] on the device, and the generator of the step.

    All that is random is a function of (seed, step), and the same for any number of processes.
    """
    args, context, key = run.args, run.context, (run.args.seed, run.progress.step)
    rng = np.random.default_rng(key)
    if args.flip:
        batch = flip(batch, context.shard(torch.from_numpy(rng.random(args.batch_size) < 0.5)))
    slots = run.model.slot_attention.initial_slots(args.batch_size, args.num_slots, context.generator(*key))
    return batch['image'].to(context.device, non_blocking=True), context.shard(slots), rng


def log_curves(run: Run) -> dict[str, float]:
    """Logs the means over the steps since the last point, without values that are not finite, and returns them."""
    means = {}
    for name, values in run.progress.curves.items():
        finite = [value for value in values if math.isfinite(value)]
        means[name] = sum(finite) / len(finite) if finite else math.nan
    run.progress.curves = {}
    if run.writer:
        for name, mean in means.items():
            run.writer.add_scalar(f'train/{name}', mean, run.progress.step)
    return means


def save(run: Run, name: str) -> None:
    """Writes a checkpoint. If that fails, training continues, and the next one is tried."""
    run.saved_at = time.monotonic()
    if run.writer is None:
        return
    path = run.args.log_dir / 'checkpoints' / name
    try:
        run.writer.flush()  # so that the curves are never behind a checkpoint
        save_checkpoint(
            path, run.model, args=saved_flags(vars(run.args)), data=data_options(run.args),
            progress=asdict(run.progress), fingerprint=run.train_loader.dataset.fingerprint,
            optimizers=[optimizer.state_dict()['state'] for optimizer in run.optimizers],
        )  # fmt: skip
        run.save_failed = False
    except OSError as error:
        run.save_failed = True
        print_error(f'cannot write {path} ({error.strerror}); training continues without it')


def restore(optimizers: list[torch.optim.Optimizer], checkpoint: dict, path: Path) -> Progress:
    """Restores the states of the optimisers, and returns the progress. Raises CheckpointError."""
    training = checkpoint['training']
    if 'optimizers' not in training:
        raise CheckpointError(f'{path} holds no optimiser state: it can be scored and drawn, but not resumed')
    try:
        for optimizer, state in zip(optimizers, training['optimizers'], strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {'state': state})
            for p, values in optimizer.state.items():
                if any(value.shape not in (p.shape, ()) for value in values.values()):  # torch would crash
                    raise TypeError('the optimiser state does not fit the model')
        return Progress(**fill(asdict(Progress()), training['progress'], path))
    except Exception as error:
        raise damaged(path, error) from error


# --- Validation and logging ------------------------------------------------------------------


def validate(run: Run) -> None:
    """Scores the network on the validation images, logs and prints the scores, and keeps the best model."""
    args, context, progress, step = run.args, run.context, run.progress, run.progress.step
    final = step == run.total_steps
    run.scores = scores = evaluate(run.model, run.val_loader, context, args, consistency=final)['network']
    run.model.train()
    if not scores['mse'] <= MAX_MSE:
        raise TrainingError(
            f'training has diverged: the validation MSE is {scores["mse"]:.3g}; lower --lr or raise --warmup_steps'
        )
    means = log_curves(run)
    if run.writer:
        for name, value in scores.items():
            run.writer.add_scalar(f'{"val" if name in TITLES else "slots"}/{name}', value, step)
        log_figures(run)
    summary = '  '.join(f'{title} {scores[name]:.4f}' for name, title in TITLES.items() if name in scores)
    print0(
        f'step {step:6d}  epoch {step / len(run.train_loader):5.1f}  {progress.seconds / 60:5.1f} min  train loss '
        f'{means["loss"]:.4f}  val {summary}  {args.batch_size / means["seconds"]:.0f} images/s'
    )
    # Without a segmentation score the best model is the one with the lowest MSE, which also decides ties.
    fg_ari = scores.get('fg_ari', math.nan)
    candidate = [-scores['mse'] if math.isnan(fg_ari) else fg_ari, -scores['mse']]
    if candidate > progress.best:
        progress.best = candidate
        save(run, 'best_model.pth')


@torch.no_grad()
def evaluate(
    model: SlotAttentionAutoEncoder, loader: DataLoader, context: DistributedContext, args: argparse.Namespace,
    consistency: bool, stop: Stop | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Mean scores over the images of all processes: rows 'network' and, with --search, '+ refine'.

    A row has the values of score_images(). Beside them the network has attn_fg_ari, the FG-ARI of the last iteration's
    attention, enlarged to the image, and with `consistency` the ARI of the segmentations from two independent samples
    of the initial slots, over the true foreground: does an object get the same slot again? Raises Interrupted if `stop`
    gets a signal.
    """
    model.eval()
    batch_size = loader.batch_size * context.world_size
    count = math.ceil(len(loader.dataset) / batch_size)
    values = defaultdict(list)  # of each image, by (row, name)
    num_slots = args.num_slots + args.spare_slots

    def run_model(images: Tensor, *key: int) -> SlotAttentionOutput:
        slots = model.slot_attention.initial_slots(batch_size, num_slots, context.generator(0, *key))
        return model(images, slots=context.shard(slots)[: len(images)], num_iterations=args.num_iterations)

    def score_batch(images: Tensor, labels: Tensor | None, i: int) -> dict[str, dict[str, Tensor]]:
        output = run_model(images, i, 0)
        rows = {'network': score_images(images, labels, output.recons, output.masks)}
        if labels is not None:
            attn = F.interpolate(output.attn[:, -1].float(), labels.shape[1:], mode='bilinear')
            rows['network']['attn_fg_ari'] = fg_ari(labels, attn)
        if consistency:
            found, again = segmentation(output.masks), segmentation(run_model(images, i, 1).masks)
            where = None if labels is None else (labels > 0) & (labels != IGNORE)
            rows['network']['consistency'] = adjusted_rand_index(found, again, where)
        if args.search:
            rgbs, masks = model.decode(refine(model, images, output.slots, args.refine_steps))
            rows['+ refine'] = score_images(images, labels, (rgbs * masks).sum(1), masks)
        return rows

    batches = itertools.zip_longest(range(count), loader)  # a process may have no part of the last batch
    for i, batch in tqdm(batches, 'evaluating', count, delay=2, leave=False, disable=context.rank > 0 or None):
        if batch is not None:
            batch = {name: value.to(context.device, non_blocking=True) for name, value in batch.items()}
            rows = score_batch(batch['image'], batch.get('mask'), i)
            for row, scores in rows.items():
                for name, value in scores.items():
                    values[row, name] += value.tolist()
        if stop:
            stop.check(context)

    parts, means = context.gather(values), defaultdict(dict)
    for row, name in parts[0]:
        numbers = [number for part in parts for number in part[row, name]]
        means[row][name] = torch.tensor(numbers, dtype=torch.double).nanmean().item()
    return means


def score_images(images: Tensor, labels: Tensor | None, recons: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """The MSE, mask_statistics() and, with labels, segmentation_scores() of each image, [B] each.

    `scored` tells whether an image has an FG-ARI, that is, a mask with objects.
    """
    scores = {'mse': (recons.float() - images).square().mean((1, 2, 3))} | mask_statistics(masks, labels)
    if labels is not None:
        scores |= segmentation_scores(labels, masks)
        scores['scored'] = ~scores['fg_ari'].isnan()
    return scores


@torch.no_grad()
def log_figures(run: Run) -> None:
    """Logs figures of the first validation images; the images and the noise are the same at every step."""
    context, dataset, step = run.context, run.val_loader.dataset, run.progress.step
    batch = dataset.__getitems__(list(range(min(6, len(dataset)))))
    batch = {name: values.to(context.device) for name, values in batch.items()}
    recons, masks, slots, attn = run.model(batch['image'], generator=context.generator(0))
    rgbs, _ = run.model.decode(slots)
    try:
        figures = {
            'decomposition': visualize_slots(batch['image'], recons, masks, rgbs=rgbs, labels=batch.get('mask')),
            'attention': visualize_attention_evolution(attn, images=batch['image']),
        }
        for name, figure in figures.items():
            figure.set_facecolor('white')  # TensorBoard drops transparency, which roughens the text
            run.writer.add_figure(f'slots/{name}', figure, step)
    except Exception as error:
        print_error(f'the figures of step {step} cannot be drawn ({error}); training continues without them')


# --- Runs ------------------------------------------------------------------------------------


def open_log_dir(log_dir: Path, resume: Path | None) -> TextIO:
    """Creates log_dir/checkpoints, and moves an earlier run to log_dir/run_N unless that one is resumed.

    Returns a file that locks the folder until it is closed. Raises ConfigError if the folder is not writable, or
    locked by another run.
    """
    checkpoints = log_dir / 'checkpoints'
    if not str(log_dir).isprintable():
        raise ConfigError(f'--log_dir {str(log_dir)!a}: TensorBoard needs a name in UTF-8; choose another one')
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        lock = open(log_dir / '.lock', 'a')  # noqa: SIM115 (the caller closes it)
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it however a run ends
        except BlockingIOError:
            raise ConfigError(f'another run is writing to {log_dir}; choose another --log_dir') from None
        except OSError as error:
            print_error(f'warning: {log_dir} cannot be locked ({error.strerror}): start no second run in it')
        for leftover in checkpoints.glob('.*.pth.*'):  # of a run that was killed while it saved
            leftover.unlink()
        names = ('events.out.tfevents.*', 'checkpoints/last.pth', 'checkpoints/best_model.pth',
                 'checkpoints/checkpoint_epoch_*.pth')  # fmt: skip
        earlier = [path for name in names for path in log_dir.glob(name)]
        if earlier and (resume is None or resume.resolve().parent != checkpoints.resolve()):
            target = next(log_dir / f'run_{n}' for n in itertools.count(1) if not (log_dir / f'run_{n}').exists())
            (target / 'checkpoints').mkdir(parents=True)
            for path in earlier:
                path.rename(target / path.relative_to(log_dir))
            print0(f'the earlier run in {log_dir} is now in {target}')
        return lock
    except OSError as error:
        raise ConfigError(f'cannot write to {checkpoints} ({error.strerror}); choose another --log_dir') from error


@contextlib.contextmanager
def open_writer(run: Run) -> Iterator[SummaryWriter]:
    """A writer for TensorBoard that has logged the flags.

    It replaces the points that a killed part of the run wrote after those that the checkpoint knows of.
    """
    args, progress = run.args, run.progress
    # TensorBoard reads files in the order of their names, which begin with the second of their creation.
    while [*args.log_dir.glob(f'events.out.tfevents.{int(time.time())}.*')]:
        time.sleep(0.05)
    open_window = max(map(len, progress.curves.values()), default=0)
    writer = SummaryWriter(args.log_dir, purge_step=progress.step - open_window + 1)
    try:
        flags = {name: value for name, value in saved_flags(vars(args)).items() if value is not None}
        flags |= asdict(run.model.config) | dict(data_dir=ascii(str(args.data_dir)))  # whose name may not be UTF-8
        for summary in hparams(flags, {f'val/{name}': 0 for name in TITLES}):
            writer.file_writer.add_summary(summary)
        yield writer
    finally:
        with contextlib.suppress(OSError):
            writer.close()


def check_fingerprint(dataset: Dataset, checkpoint: dict, path: Path) -> None:
    """Prints a warning if the data are not those that the checkpoint was trained on."""
    if dataset.fingerprint != checkpoint['training'].get('fingerprint'):
        print_error(
            f'warning: {path} was trained on other data: images have been added, removed or changed, or were prepared '
            'in another way'
        )


def evaluate_checkpoint(args: argparse.Namespace, context: DistributedContext) -> int:
    """--eval: prints the scores of a checkpoint on a split as a table; returns the exit status."""
    checkpoint = load_checkpoint(args.resume)
    model = context.place(build_model(checkpoint, args.resume))
    with context.main_process_first():
        dataset = create_dataset(split=args.split, size=args.val_size, **data_options(args))
    if args.max_objects == checkpoint['training']['args'].get('max_objects'):
        check_fingerprint(dataset, checkpoint, args.resume)
    size = context.world_size
    loader = wrap_in_loader(dataset, 32 * size, False, rank=context.rank, world_size=size)
    with Stop() as stop:
        rows = evaluate(model, loader, context, args, consistency=True, stop=stop)
    network = rows['network']
    names = [name for name in TITLES if name in network]
    split = '' if args.split == 'all' else f'{args.split} '
    print0(
        f'{args.resume}, step {checkpoint["training"]["progress"]["step"]}\n'
        f'{len(dataset)} {split}images of {args.dataset}, {args.num_slots} + {args.spare_slots} slots, '
        f'{args.num_iterations} iterations'
    )
    if (scored := round(len(dataset) * network.get('scored', 1))) < len(dataset):
        print0(f'{scored} of the images have a mask with objects: FG-ARI, mBO and mIoU are of these')
    print0('\n' + ' ' * 10 + ''.join(f'{TITLES[name]:>13}' for name in names))
    for row, scores in rows.items():
        cells = (f'{scores[name]:13.4f}' if name in scores else f'{"":13}' for name in names)
        print0(f'{row:10}{"".join(cells)}')
    if args.search:
        print0('\nrefine: gradient descent on the slots of each image; these are no scores of the network')
    print_advice(network)
    return 0


def print_advice(scores: dict[str, float]) -> None:
    """Prints which failure the masks show, if any, and the flag to change."""
    if name := diagnose(scores):
        print0(f'{DIAGNOSES[name][1]} ({name} {scores[name]:.2f})')


def train(args: argparse.Namespace, context: DistributedContext) -> int:
    """Trains from the start or from a checkpoint to the end of the run; returns the exit status."""
    run = Run(args, context)
    progress, checkpoints = run.progress, args.log_dir / 'checkpoints'
    if progress.step >= run.total_steps:
        end = f'{args.resume} has done {progress.step} steps of {run.total_steps}'
        if args.auto:  # a loop around this command shall end with status 0
            print0(f'{end}: nothing left to do')
            return 0
        raise ConfigError(f'{end}; give a larger --steps or --epochs to continue')
    with contextlib.ExitStack() as stack:
        if context.rank == 0:
            stack.enter_context(open_log_dir(args.log_dir, args.resume))
            run.writer = stack.enter_context(open_writer(run))
        stack.enter_context(run.stop)
        print_header(run)
        try:
            train_loop(run)
            if run.writer:
                run.writer.flush()
        except (Interrupted, OSError) as error:  # OSError: TensorBoard's file cannot be written
            interrupted, last = isinstance(error, Interrupted), checkpoints / 'last.pth'
            if interrupted:
                save(run, last.name)
            command = f'; to continue: python train.py --resume {shlex.quote(str(last))}' if last.exists() else ''
            print0(f'{"interrupted" if interrupted else f"stopped ({error})"} at step {progress.step}{command}')
            return 128 + error.args[0] if interrupted and not run.save_failed else 1
    if (checkpoints / 'best_model.pth').exists():
        unscored = math.isnan(run.scores.get('fg_ari', math.nan))
        name, value = ('MSE', -progress.best[1]) if unscored else ('FG-ARI', progress.best[0])
        print0(f'best validation {name} {value:.4f}: {checkpoints / "best_model.pth"}')
    print_advice(run.scores)
    return int(run.save_failed)  # 1 if the final checkpoint could not be written


def print_header(run: Run) -> None:
    """Prints what is trained, on what and for how long."""
    args, total = run.args, run.total_steps
    parameters = sum(p.numel() for p in run.model.parameters())
    print0(
        f'{args.architecture} model with {parameters:,} parameters on {run.context}\n'
        f'{args.dataset}: {run.train_loader.dataset}\n'
        f'{total:,} steps of {args.batch_size} images, {len(run.train_loader):,} per epoch\n'
        f'follow it with: tensorboard --logdir {shlex.quote(str(args.log_dir))}'
    )
    if args.resume:
        print0(f'continuing {args.resume} at step {run.progress.step}')
    if total <= args.warmup_steps:
        print0(
            f'warning: {total} steps are not more than the {args.warmup_steps} of the warm-up: the run will learn '
            'little; raise --steps or lower --warmup_steps'
        )


def main(args: argparse.Namespace) -> int:
    """Trains or evaluates; returns the exit status. A user's mistake gives one line and status 2."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        context = DistributedContext.create(args.device, args.amp)
        status = (evaluate_checkpoint if args.eval else train)(args, context)
        if context.world_size > 1:
            dist.destroy_process_group()
        return status
    except (ConfigError, CheckpointError, DataError, TrainingError, OSError) as error:
        print_error(f'train.py: error: {error}')
        return 2
    except (MemoryError, torch.OutOfMemoryError):
        print_error('train.py: error: out of memory; use a smaller --batch_size, --train_size or --val_size')
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        print_error('interrupted')
        return 128 + (error.args[0] if error.args else signal.SIGINT)


def unfailing(call: Callable) -> Callable:
    """The same function, which returns None instead of raising an OSError."""

    def wrapper(*args):
        with contextlib.suppress(OSError):
            return call(*args)

    return wrapper


if __name__ == '__main__':
    plain_output()
    for stream in (sys.stdout, sys.stderr):  # a full disk or a closed terminal must not end a run
        stream.write, stream.flush = unfailing(stream.write), unfailing(stream.flush)
    threading.excepthook = lambda args: None  # TensorBoard's thread passes its error to the next call
    sys.exit(main(parse_args()))
