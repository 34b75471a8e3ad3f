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
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TextIO

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

from dataset import (  # isort: skip
    DATASETS, RESOLUTIONS, SIZES, SOURCE_FLAGS, VARIANTS, DataError, Parser, create_dataloader, create_dataset,
    flip, wrap_in_loader,
)  # fmt: skip
from slot_attention import (  # isort: skip
    ALL_PIXELS, IGNORE_LABEL, MOVES_IN_TRAINING, PRETRAINED, AcceleratedBroadcastDecoder, CheckpointError, ConfigError,
    ModelConfig, Pixels, SlotAttentionAutoEncoder, SlotAttentionOutput, SpatialBroadcastDecoder, Trace,
    adjusted_rand_index, build_model, contingency_table, damaged, decode_partial, fg_ari, load_checkpoint,
    reallocation_loss, refine, save_checkpoint, segmentation, segmentation_scores,
)  # fmt: skip
from visualize import visualize_attention_evolution, visualize_slots

# The defaults of --architecture paper: Table 11.
PAPER_RECIPE = dict(
    num_iterations=3, gradient='full', damping=0.0, moves=0, drops=0, optimizer='adam', mixture=0.0, pixel_stride=1,
    steps=500_000, batch_size=64, lr=4e-4, warmup_steps=10_000, decay_steps=100_000, cooldown=0.0, clip=0.0,
)  # fmt: skip
SPARE_SLOTS = 4  # of the fast architecture: with them two objects less often share a slot
STEPS = {'multi_dsprites': 15_000, 'clevr6': 6_000}  # of the fast architecture, where it is not the default of --steps
MODEL_FLAGS = tuple(ModelConfig.__dataclass_fields__)  # saved as the configuration of the model
NOT_SAVED = (
    'resume', 'pretrained', 'auto', 'log_dir', 'eval', 'search', 'refine_steps', 'device', 'amp', 'compile',
    'num_workers',
)  # fmt: skip
FREE_ON_RESUME = (  # other saved flags must not contradict the checkpoint
    'data_dir', 'mask_dir', 'pixel_stride', 'steps', 'epochs', 'batch_size', 'lr', 'warmup_steps', 'decay_steps',
    'cooldown', 'clip', 'mixture', 'log_every', 'val_every', 'save_every', 'save_minutes',
)  # fmt: skip
FREE_IN_EVAL = ('data_dir', 'mask_dir', 'num_slots', 'num_iterations', 'val_size', 'max_objects')
SCORES = {
    'mse': 'MSE', 'fg_ari': 'FG-ARI', 'ari': 'ARI', 'mbo': 'mBO', 'miou': 'mIoU', 'attn_fg_ari': 'attn FG-ARI',
    'consistency': 'consistency',
}  # fmt: skip

# Failure modes: a statistic of mask_statistics(), the value above which it is a failure, and the advice.
DIAGNOSES = {
    'mask_entropy': (0.6, 'each object is spread over all slots: train longer, or raise --lr'),
    'largest_slot': (0.9, 'one slot holds nearly all objects: lower --lr, raise --warmup_steps or change --seed'),
    'sameness': (0.5, 'the masks do not depend on the image (stripes, blobs): raise --lr or change --seed'),
    'missed': (0.2, 'many objects are left to the background: raise --num_iterations, --num_slots or --steps'),
    'split': (0.15, 'spare slots split objects: raise --steps or lower --num_slots'),
}
REPORT_AFTER = 3  # a diagnosis is printed when this many consecutive validations agree
MAX_SKIPPED = 10  # consecutive steps without a finite gradient that end the run
MAX_MSE = 4.0  # the largest possible for reconstructions in [-1, 1]: above it the run has diverged
HEADS_FROM, MIXTURE_FROM = 0.2, (0.4, 0.6)  # shares of the run, see Loss
SHARE_OF_DROPS = 0.25  # share of the steps with drops, see Loss
VAL_STEPS = 500  # least steps between two validations, and a third of the most, with --val_every 0
COMPILER_FLOOR = '2.10'  # on CPUs: compiled code of PyTorch 2.6 to 2.9 writes outside of its memory or fails


class TrainingError(RuntimeError):
    """Training cannot continue; the message gives the reason and the remedy in one line."""


class Interrupted(Exception):
    """Raised on SIGINT or SIGTERM; `args[0]` is the signal number."""


def print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- Command line ----------------------------------------------------------------------------


def create_parser() -> Parser:
    """All flags but --help, with the defaults of a new run of the fast architecture on shapes."""
    parser = Parser(
        prog='train.py', usage='python train.py [flags]', description=__doc__.split('\n')[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, add_help=False,
    )  # fmt: skip

    def add(name, type, default, help, choices=None):
        metavar = None if choices else {'int': 'N', 'float': 'X'}.get(type.__name__, 'PATH')
        group.add_argument(f'--{name}', type=type, default=default, help=help, choices=choices, metavar=metavar)

    def add_switch(name, help):
        group.add_argument(f'--{name}', action='store_true', help=help)

    # fmt: off
    group = parser.add_argument_group('data')
    add('dataset', str, 'shapes', 'source of the images', DATASETS)
    add('data_dir', str, 'data', 'folder of the data, or a prepared .h5 file; not for shapes, which are drawn')
    add('mask_dir', str, '', 'images: folder of the masks, with the names of the pictures; if empty: '
        'NAME_mask.png beside NAME.jpg, or masks/NAME.png for images/NAME.jpg')
    add('variant', str, VARIANTS[0], 'multi_dsprites: which of its three files', VARIANTS)
    add('resolution', number(*RESOLUTIONS), 64, 'side of the square images in pixels')
    add('max_objects', number(1), 6, 'most objects in an image; scenes with more are left out; not for images')
    add('min_objects', number(1), 2, 'shapes: fewest objects in an image')
    add('train_size', number(0), 0, 'most training images to use; 0: all, and 10,000 for shapes')
    add('val_size', number(1), 320, 'most validation images to use; with --eval: test images')
    add('data_seed', number(0), 0, 'shapes: seed of the drawing')
    add('flip', int, 0, '1: mirror each training image left to right with probability 0.5', (0, 1))
    group = parser.add_argument_group('model')
    add('architecture', str, 'fast',
        'paper: Locatello et al. 2020, Tables 4-7; fast: a variant that learns in minutes on a CPU', ('fast', 'paper'))
    add('num_slots', number(1), 7 + SPARE_SLOTS,
        'number of slots: at least one per object and one for the background; spare ones are dropped again')
    add('slot_dim', number(1), 64, 'size of a slot')
    add('num_iterations', number(1), 24, 'iterations of Slot Attention')
    add('hidden_dim', number(1), 64, 'channels of the hidden layers of encoder and decoder')
    add('gradient', str, 'first_order',
        'backpropagate through all iterations (full) or the last one only (first_order)', ('full', 'first_order'))
    add('damping', number(0, kind=float), 1 / 32,
        "share of the image's attention below which a slot is hardly updated, 'fast' only; 0: a plain weighted mean")
    add('moves', number(0), 8, 'iterations after which a redundant slot is moved to the largest predicted error, '
        f"'fast' only; training does the first {MOVES_IN_TRAINING} of them")
    add('drops', number(0), 8, "iterations after which a redundant slot is dropped, 'fast' only")
    group = parser.add_argument_group('optimisation')
    add('steps', number(0), 5000, 'length of the run in steps; 0: use --epochs')
    add('epochs', number(0), 0, 'length of the run in passes over the training images; 0: use --steps')
    add('batch_size', number(1), 16, 'images per step, of all processes together')
    add('lr', number(0, kind=float), 2e-3, 'peak learning rate')
    add('warmup_steps', number(0), 300, 'steps of linear warm-up of the learning rate')
    add('decay_steps', number(0), 0, 'steps in which the learning rate halves; 0: it does not')
    add('cooldown', number(0, 1, float), 0.5, 'share of the run, at its end, in which the rate falls to 0')
    add('clip', number(0, kind=float), 1.0, 'largest gradient norm; 0: no clipping')
    add('optimizer', str, 'muon', 'adam, or muon: Muon for the matrices and Adam for the rest', ('adam', 'muon'))
    add('mixture', number(0, kind=float), 0.5,
        'weight in the loss of the variance of the slots\' colours at a pixel, from the middle of the run on')
    add('pixel_stride', number(1), 2, 'compute the loss on every N-th row and column, at random offsets')
    add('seed', number(0), 0, 'seed of the weights, the order of the images and the noise of the slots')
    group = parser.add_argument_group('logging')
    add('log_dir', Path, Path('logs'), 'folder of the TensorBoard files, with checkpoints/ in it')
    add('log_every', number(1), 50, 'steps between two points of the training curves')
    add('val_every', number(0), 0, 'epochs between two validations; 0: one every '
        f'{VAL_STEPS} to {3 * VAL_STEPS:,} steps')
    add('save_every', number(0), 10, 'epochs between two files checkpoint_epoch_N.pth; 0: none')
    add('save_minutes', number(0, kind=float), 5.0, 'minutes between two writes of last.pth')
    add('pretrained', str, None, 'with --eval: weights that come with the repository, by data set; paper_: of the '
        "paper's architecture", tuple(PRETRAINED))
    add('resume', Path, None,
        'checkpoint, or folder of a run, to continue or to score with --eval; auto: the newest in --log_dir. '
        'best_model.pth has the highest validation FG-ARI, so labels chose it; quote results from last.pth')
    group = parser.add_argument_group('evaluation')
    add_switch('eval', 'score --resume on the test images and exit')
    add_switch('search', 'with --eval: also score slots after gradient descent on the reconstruction error of each '
        'test image')
    add('refine_steps', number(0), 20, 'with --search: steps of gradient descent on the slots')
    group = parser.add_argument_group('system')
    add('device', str, 'auto', 'auto: a CUDA GPU if there is one', ('auto', 'cpu', 'cuda'))
    add('amp', str, 'auto', 'bfloat16 autocast; auto: where the hardware supports it', ('auto', 'on', 'off'))
    add_switch('compile', 'torch.compile the training step: takes minutes at the first step, and helps little on CPUs')
    add('num_workers', number(0), 0, 'processes that load batches; 0: load in the training process')
    # fmt: on
    return parser


def number(lowest: int, highest: float = 2**63 - 1, kind: type = int) -> Callable[[str], float]:
    """An argparse type: a number of `kind` from `lowest` to `highest` (the default: the largest seed of torch)."""

    def parse(text: str) -> float:
        value = kind(text)
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f'must be at least {lowest} and at most {highest}, not {text}')
        return value

    parse.__name__ = kind.__name__  # argparse names the type if the text is no number
    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line twice: first to choose the defaults, then with these. A mistake ends the program."""
    parser = create_parser()
    defaults = vars(parser.parse_args([]))
    flags, _ = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(defaults)))
    given = {name: value for name, value in vars(flags).items() if value is not None}  # on the command line
    parser.add_argument('-h', '--help', action='help', help='show this help message and exit')
    path = given.get('resume', PRETRAINED.get(given.get('pretrained')))
    auto = path == Path('auto')
    try:
        if auto:
            path = newest_checkpoint(given.get('log_dir', defaults['log_dir']))
        if path is None:  # a new run
            defaults |= recipe_defaults(given, defaults)
        else:
            candidates = (path, path / 'last.pth', path / 'checkpoints' / 'last.pth')
            path = next(filter(Path.is_file, candidates), path)
            defaults |= checkpoint_defaults(path, given)
        if 'eval' in given:
            defaults |= dict(amp='off')  # the scores depend on no hardware
        if 'epochs' in given or 'steps' in given:
            defaults |= dict(epochs=0, steps=0)
        parser.set_defaults(**defaults)
        args = parser.parse_args(argv)
        args.resume, args.auto = path, auto
        check_combination(args, given)
    except (CheckpointError, ConfigError) as error:
        parser.error(str(error))
    return args


def recipe_defaults(given: dict, defaults: dict) -> dict:
    """Defaults of a new run that differ with the architecture or the data set."""
    flags = defaults | given
    resolution, num_slots = SIZES[flags['dataset']]
    if flags['dataset'] in ('shapes', 'clevr6'):  # which have as many objects as the flag allows
        num_slots = flags['max_objects'] + 1
    recipe = dict(
        resolution=resolution, num_slots=num_slots + SPARE_SLOTS, steps=STEPS.get(flags['dataset'], defaults['steps'])
    )
    if flags['architecture'] == 'paper':
        recipe['num_slots'] = num_slots
        recipe |= PAPER_RECIPE | dict(hidden_dim=64 if given.get('resolution', resolution) > 64 else 32)  # Tables 4-7
    return recipe


def checkpoint_defaults(path: Path, given: dict) -> dict:
    """Defaults of a resumed run: its own flags. Raises CheckpointError, and ConfigError for a contradiction."""
    saved = load_flags(path)
    scoring = 'eval' in given
    if 'data_dir' in given and Path(given['data_dir']) != Path(saved['data_dir']):
        saved['mask_dir'] = ''  # the masks in the saved one are those of other pictures
    for name, value in saved.items():
        new = given.get(name, value)
        if new == value:
            continue
        if name not in (FREE_IN_EVAL if scoring else FREE_ON_RESUME):
            raise ConfigError(f'--{name} {new} contradicts {path}, which has {name} {value}; leave it out')
        if not scoring:
            print(f'{name}: {value} in the checkpoint, {new} from now on')
    return saved | (dict(log_dir=path.parent.parent) if path.parent.name == 'checkpoints' else {})


def check_combination(args: argparse.Namespace, given: dict) -> None:
    """Raises ConfigError for flags that need another one, or have no effect with another one."""
    if args.eval and args.resume is None:
        raise ConfigError('--eval needs --resume PATH, the checkpoint to score, or --pretrained')
    if args.pretrained and ('resume' in given or not args.eval):
        raise ConfigError('--pretrained needs --eval, and excludes --resume')
    if not args.eval and bool(args.steps) == bool(args.epochs):
        raise ConfigError(f'--steps {args.steps} and --epochs {args.epochs}: one of them must be 0 and the other not')
    if args.pixel_stride > args.resolution:
        raise ConfigError(f'--pixel_stride {args.pixel_stride} is larger than the image of {args.resolution} pixels')
    every_source = {name for names in SOURCE_FLAGS.values() for name in names}
    useless = dict.fromkeys(every_source - {*SOURCE_FLAGS[args.dataset]}, f'with --dataset {args.dataset}')
    if args.eval:
        training = {*FREE_ON_RESUME, 'compile', 'log_dir', 'num_workers'} - {*FREE_IN_EVAL}
        useless |= dict.fromkeys(training, 'with --eval')
    else:
        useless['search'] = 'without --eval'
    if not args.search:
        useless['refine_steps'] = 'without --search'
    for name in sorted(useless.keys() & given.keys()):
        raise ConfigError(f'--{name} has no effect {useless[name]}; leave it out')


# --- Device and processes --------------------------------------------------------------------


@dataclass(frozen=True)
class DistributedContext:
    """Device, number format and process group: the only code that decides them.

    Without torchrun there is one process, and the collective operations return their argument.
    """

    device: torch.device
    bfloat16: bool
    compiled: bool = False
    rank: int = 0
    world_size: int = 1
    control: dist.ProcessGroup | None = None  # on the CPU, for what must not wait for a GPU

    @classmethod
    def create(cls, device: str = 'auto', amp: str = 'auto', compiled: bool = False) -> 'DistributedContext':
        """Reads the flags, and joins the other processes if torchrun has started some. Raises ConfigError."""
        if device == 'cuda' and not torch.cuda.is_available():
            raise ConfigError('--device cuda: PyTorch finds no CUDA GPU here; use --device cpu')
        if device == 'auto':
            device = 'cuda' if torch.cuda.is_available() else 'cpu'
        if device == 'cuda':
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # without these instructions bfloat16 is emulated, tens of times slower than float32
            checks = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
            supported = any(getattr(torch.cpu, check, bool)() for check in checks)
        bfloat16 = amp == 'on' or (amp == 'auto' and supported)
        if compiled:
            check_compiler(device)
        if not dist.is_torchelastic_launched():
            return cls(torch.device(device), bfloat16, compiled)
        index, backend = None, 'gloo'
        if device == 'cuda':
            index, backend = int(os.environ['LOCAL_RANK']), 'nccl'
            if index >= torch.cuda.device_count():
                raise ConfigError(f'--nproc_per_node must be at most {torch.cuda.device_count()}, the GPUs here')
            torch.cuda.set_device(index)
        store, rank, world_size = next(dist.rendezvous('env://'))
        if os.environ['LOCAL_WORLD_SIZE'] == os.environ['WORLD_SIZE']:
            # torchrun keeps its store when it restarts the processes, with the addresses of the dead ones. Between
            # nodes the counts of restarts may differ, so this is for one node (see README).
            store = dist.PrefixStore(f'attempt {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        control = dist.new_group(backend='gloo', timeout=timedelta(hours=6))  # preparing a data set may take hours
        return cls(torch.device(device, index), bfloat16, compiled, rank, world_size, control)

    def autocast(self) -> torch.autocast:
        # No cache of cast weights: in PyTorch 2.6 a weight first cast without gradient never gets one.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16, cache_enabled=False)

    def place(self, model: SlotAttentionAutoEncoder) -> SlotAttentionAutoEncoder:
        """Moves the model to the device, in the memory layout and with the decoder that are fastest there."""
        if isinstance(model.decoder, SpatialBroadcastDecoder):
            model.decoder = AcceleratedBroadcastDecoder(model.decoder)
        return model.to(self.device, memory_format=torch.channels_last)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module for training: averages gradients over the processes, and is compiled with --compile."""
        if self.world_size > 1:
            module = DistributedDataParallel(module, [self.device] if self.device.type == 'cuda' else None)
        return torch.compile(module, dynamic=False) if self.compiled else module  # all batches have one size

    def generator(self, *key: int) -> torch.Generator:
        """A generator seeded with a hash of `key`."""
        seed = np.random.SeedSequence(key).generate_state(1)[0]
        return torch.Generator(self.device).manual_seed(int(seed))

    def shard(self, batch: Tensor) -> Tensor:
        """This process's part of a batch, in the order of the loaders: [B, ...] -> [B / world_size, ...]."""
        return batch[self.rank :: self.world_size]

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.world_size > 1:
            value = value / self.world_size
            dist.all_reduce(value)
        return value

    def max(self, value: int) -> int:
        """Maximum over the processes."""
        if self.world_size == 1:
            return value
        maximum = torch.tensor(value)
        dist.all_reduce(maximum, dist.ReduceOp.MAX, self.control)
        return int(maximum)

    def gather(self, value) -> list:
        """The values of all processes, by rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The main process executes the body before the others do."""
        if self.rank > 0:
            self.gather(None)
        yield
        if self.rank == 0:
            self.gather(None)

    def print0(self, text: str) -> None:
        """Prints from the main process only."""
        if self.rank == 0:
            print(text, flush=True)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name() if self.device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'
        many = f'{self.world_size} processes of ' if self.world_size > 1 else ''
        return f'{many}{name}, {"bfloat16" if self.bfloat16 else "float32"}'


def check_compiler(device: str) -> None:
    """Raises ConfigError if torch.compile does not work here: it needs a C++ compiler (CPU) or Triton (GPU)."""
    if device == 'cpu' and torch.__version__ < COMPILER_FLOOR:
        raise ConfigError(
            f'--compile on a CPU needs PyTorch {COMPILER_FLOOR} or newer, this is {torch.__version__}, whose compiled '
            'code may crash; leave it out'
        )
    try:
        torch.compile(torch.relu)(torch.ones(1, device=device))
    except Exception as error:
        reason = ' '.join(str(error).split('\n\n')[0].split())  # the first paragraph, in one line
        raise ConfigError(f'--compile does not work here ({reason}); leave it out') from error


# --- Optimiser -------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised before each step (Jordan 2024; Liu et al. 2025, arXiv 2502.16982).

    An update changes every direction of a matrix equally, by an RMS of 0.2 * lr per entry, as Adam. Weights of
    convolutions are matrices [out, in * kernel]. torch.optim.Muon (from 2.9) computes in bfloat16, which most
    CPUs only emulate; this one computes in float32. As in torch's fused optimisers, a step in which the tensor
    `found_inf` is 1 changes nothing.
    """

    MOMENTUM = 0.95
    found_inf = torch.zeros(())

    def __init__(self, params, lr: float):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        found_inf = self.found_inf.to(group['params'][0].device)
        updates = []
        for p in group['params']:
            if p not in self.state:
                self.state[p]['momentum'] = torch.zeros_like(p)
            buffer = self.state[p]['momentum']
            grad = torch.where(found_inf > 0, buffer, p.grad)  # averaging the buffer with itself changes nothing
            buffer.lerp_(grad, 1 - self.MOMENTUM)
            updates.append(grad.lerp(buffer, self.MOMENTUM).flatten(1))
        for p, direction in zip(group['params'], orthogonalise(updates), strict=True):
            scale = -0.2 * max(direction.shape) ** 0.5 * group['lr']
            p.add_(direction.view_as(p) * (1 - found_inf), alpha=scale)


def orthogonalise(matrices: list[Tensor]) -> list[Tensor]:
    """Approximates the nearest semi-orthogonal matrices: [R, C] each, singular values between 0.7 and 1.2.

    Five steps of a Newton-Schulz iteration with Jordan's coefficients, X <- (a + b XX' + c (XX')^2) X. All factors
    of X are polynomials of the first XX', so only Gram matrices are iterated, those of one size in one batch;
    the matrices themselves, which may be long, are multiplied once, at the end.
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
    """Adam, or Muon for the matrices and Adam for the rest; the learning rate is set in every step."""
    matrices, rest = [], []
    for p in model.parameters():
        is_matrix = p.ndim > 1 and min(p.flatten(1).shape) > 4  # not position embeddings, mu, sigma
        (matrices if name == 'muon' and is_matrix else rest).append(p)
    adam = torch.optim.Adam(rest, fused=True)
    return [adam, Muon(matrices, lr=0.0)] if matrices else [adam]


# --- Training --------------------------------------------------------------------------------


@dataclass
class Progress:
    """Training state that is saved in checkpoints, besides weights and optimisers."""

    step: int = 0  # steps done
    images: int = 0  # images trained on
    epochs: int = 0  # complete epochs
    seen: int = 0  # images of the current epoch that were trained on
    validated: int = 0  # step of the last validation
    seconds: float = 0.0  # time spent training, without validation
    best: list = field(default_factory=lambda: [-math.inf, -math.inf])  # highest FG-ARI (else -MSE) and its -MSE
    window: list = field(default_factory=list)  # [loss, gradient norm] of each step since the last point, on the device
    loss_sum: float = 0.0  # over the finite steps since the last validation
    loss_steps: int = 0  # their number
    skipped: int = 0  # steps of the run without a finite gradient
    skipped_in_row: int = 0
    diagnosis: str = ''  # of the last validation, see DIAGNOSES
    diagnosis_count: int = 0  # consecutive validations with this diagnosis


class Stop:
    """Turns the first SIGINT or SIGTERM into a flag that is checked between steps; the second one exits."""

    signal = None  # number of the first signal

    def __enter__(self):
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number

    def check(self, context: DistributedContext) -> None:
        """Raises Interrupted in all processes if one of them got a signal."""
        if number := context.max(self.signal or 0):
            raise Interrupted(number)


class ReconstructionError(nn.Module):
    """Squared error of the reconstruction (paper Section 2.2), as one module to compile and to distribute.

    An addition beside it is the variance of the slots' colours at a pixel, weighted by the masks. The error is that of
    the slots' mean; error and variance together are the mean of the slots' errors. See Loss.
    """

    def __init__(self, model: SlotAttentionAutoEncoder):
        super().__init__()
        self.model = model

    def forward(
        self, images: Tensor, slots: Tensor, pixels: Pixels, with_variance: bool, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W], initial slots [B, K, D], rows and columns -> error and variance [B, h, w].

        Both are means over the channels; without the variance, which takes time, it is 0. `kwargs` are further
        arguments of the model's Slot Attention module.
        """
        slots, _ = self.model.slot_attention(self.model.encoder(images), slots, **kwargs)
        rgbs, masks = decode_partial(self.model, slots, pixels)
        recons = (rgbs * masks).sum(dim=1)
        rows, columns = pixels
        error = F.mse_loss(recons.float(), images[:, :, rows][..., columns], reduction='none').mean(dim=1)
        if not with_variance:
            return error, torch.zeros_like(error)
        return error, (masks * (rgbs - recons[:, None]).square()).sum(dim=1).float().mean(dim=1)


class Loss:
    """The training loss: MSE, `mixture` times the variance of the slots' colours, and the loss of the heads.

    With the MSE alone two slots may draw an object half-transparently, or one slot and the background, as well as one
    can. A mixture of 1 would be the mean error of the slots, the likelihood of a mixture model as in N-EM (Greff et
    al. 2017, arXiv 1708.03498) and IODINE (Greff et al. 2019, arXiv 1903.00450). It makes slots specialise, but from
    the first step on one of them wins everything, so its weight rises from 0 while the run passes MIXTURE_FROM.
    """

    def __init__(self, model: SlotAttentionAutoEncoder, context: DistributedContext, mixture: float = 0.0):
        self.model, self.mixture, self.error = model, mixture, context.wrap(ReconstructionError(model))

    def __call__(
        self, images: Tensor, slots: Tensor, pixels: Pixels, rng: np.random.Generator, progress: float
    ) -> tuple[Tensor, Tensor | float]:
        """images [B, 3, H, W], initial slots [B, K, D], rows and columns, share of the run -> MSE [], the rest [].

        The heads learn from the first step, and act from HEADS_FROM of the run on: moves in every step, but only
        MOVES_IN_TRAINING of them to save time; drops in a quarter of the steps. With drops in every step the decoder
        learns to draw two objects with the slot that is left, with none to share an object among the spare slots.
        Iterations reserved for inactive moves or drops are skipped: more iterations delay the first steps of learning.
        """
        config, (begin, end) = self.model.config, MIXTURE_FROM
        weight = self.mixture * min(max((progress - begin) / (end - begin), 0.0), 1.0)
        if not config.moves and not config.drops:
            error, variance = self.error(images, slots, pixels, weight > 0)
            return error.mean(), weight * variance.mean()
        moves = min(config.moves, MOVES_IN_TRAINING) if progress >= HEADS_FROM else 0
        drops = config.drops if progress >= HEADS_FROM and rng.random() < SHARE_OF_DROPS else 0
        iterations = config.num_iterations - config.moves - config.drops + moves + drops
        trace = Trace()
        error, variance = self.error(
            images, slots, pixels, weight > 0, num_iterations=iterations, moves=moves, drops=drops, trace=trace
        )
        return error.mean(), weight * variance.mean() + reallocation_loss(self.model, images, error, trace, rng)


class Run:
    """A training run, new or as it was when --resume was written: its parts, and its state between two checkpoints."""

    def __init__(self, args: argparse.Namespace, context: DistributedContext):
        torch.manual_seed(args.seed)
        config = ModelConfig(**{name: getattr(args, name) for name in MODEL_FLAGS})
        checkpoint = load_checkpoint(args.resume) if args.resume else None
        model = build_model(checkpoint, args.resume) if checkpoint else SlotAttentionAutoEncoder(config)
        self.args, self.context, self.model, self.stop = args, context, context.place(model), Stop()
        with context.main_process_first():  # the data may have to be prepared
            self.train_loader, self.val_loader = create_dataloader(
                **data_of(args) | dict(seed=args.seed, data_seed=args.data_seed), batch_size=args.batch_size,
                train_size=args.train_size or None, val_size=args.val_size, num_workers=args.num_workers,
                pin_memory=context.device.type == 'cuda', rank=context.rank, world_size=context.world_size,
            )  # fmt: skip
        self.optimizers = create_optimizers(model, args.optimizer)
        self.loss = Loss(model, context, args.mixture)
        progress = Progress()
        if checkpoint:
            progress = restore_training(self.optimizers, checkpoint['training'], args.resume)
            check_fingerprint(self.train_loader.dataset, checkpoint, args.resume)
        self.progress = progress
        begin_of_epoch = progress.step - progress.seen // args.batch_size  # --batch_size may have changed
        self.total_steps = args.steps or begin_of_epoch + (args.epochs - progress.epochs) * len(self.train_loader)
        self.clock, self.timed = 0.0, 0  # time of the last logged point, and images trained on since then
        self.saved_at, self.save_failed = 0.0, False  # time of the last write of a checkpoint

    @property
    def num_epochs(self) -> int:
        """Epochs of the whole run, the last of which may be incomplete."""
        left = self.progress.seen // self.args.batch_size + self.total_steps - self.progress.step
        return self.progress.epochs + math.ceil(left / len(self.train_loader))

    def validates_after(self, epoch: int, i: int) -> bool:
        """Whether a validation follows step i, counted from 1, of an epoch, counted from 0."""
        size, every = len(self.train_loader), self.args.val_every
        if i < size and self.progress.step < self.total_steps:  # within the epoch, if it is long
            parts = 1 if every else max(1, round(size / (2 * VAL_STEPS)))
            return i > 0 and i % math.ceil(size / parts) == 0
        every = every or math.ceil(VAL_STEPS / size)
        return (epoch + 1) % every == 0 or epoch + 1 == self.num_epochs

    def learning_rate(self, step: int) -> float:
        args = self.args
        return learning_rate(step, args.lr, args.warmup_steps, args.decay_steps, args.cooldown, self.total_steps)


def train_one_epoch(run: Run, epoch: int) -> None:
    """Trains to the end of the epoch, or of the run, from where it stopped. Raises Interrupted and TrainingError."""
    args, context, model, progress = run.args, run.context, run.model, run.progress
    run.train_loader.sampler.set_epoch(epoch)
    model.train()
    first, last = progress.seen // args.batch_size, len(run.train_loader)
    last = min(last, first + run.total_steps - progress.step)
    run.clock, run.timed = time.monotonic(), 0
    bar = tqdm(
        itertools.islice(run.train_loader, first, last), f'epoch {epoch + 1}/{run.num_epochs}', last, initial=first,
        leave=False, disable=context.rank > 0 or None,  # None: if the output is no terminal
    )  # fmt: skip
    for i, batch in enumerate(bar, first + 1):
        # Before the next step, not after this one: a run may have been interrupted in between.
        if run.validates_after(epoch, i - 1) and progress.validated < progress.step:
            keep_checkpoints(run, validate(run))
            model.train()
        images, slots, pixels, rng = prepare_batch(run, batch)
        with context.autocast():
            loss, rest = run.loss(images, slots, pixels, rng, progress.step / run.total_steps)
        model.zero_grad(set_to_none=True)
        (loss + rest).backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        loss = context.mean(loss.detach())
        # The flag by which torch's GradScaler makes a fused optimiser skip a step without a synchronisation.
        found_inf = (~torch.isfinite(loss + grad_norm)).float()
        for optimizer in run.optimizers:
            optimizer.param_groups[0]['lr'] = run.learning_rate(progress.step)
            optimizer.found_inf = found_inf
            optimizer.step()

        progress.window.append(torch.stack([loss, grad_norm]))
        progress.step += 1
        progress.seen += args.batch_size
        progress.images += args.batch_size
        run.timed += args.batch_size
        # A validation logs the last point itself.
        if progress.step % args.log_every == 0 and not run.validates_after(epoch, i):
            bar.set_postfix_str(log_window(run))
        run.stop.check(context)
        if time.monotonic() - run.saved_at > args.save_minutes * 60:
            save(run, 'last.pth')


def prepare_batch(run: Run, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Pixels, np.random.Generator]:
    """Images [B, 3, H, W] and initial slots [B, K, D] on the device, the pixels of the loss, and a generator.

    All that is random is a function of (seed, step), and the same for any number of processes.
    """
    args, context, step = run.args, run.context, run.progress.step
    rng = np.random.default_rng([args.seed, step])
    if args.flip:
        batch = flip(batch, context.shard(torch.from_numpy(rng.random(args.batch_size) < 0.5)))
    images = batch['image'].to(context.device, non_blocking=True)
    slots = run.model.slot_attention.initial_slots(args.batch_size, args.num_slots, context.generator(args.seed, step))
    return images, context.shard(slots), choose_pixels(rng, args.resolution, args.pixel_stride, context.device), rng


def choose_pixels(rng: np.random.Generator, resolution: int, stride: int, device: torch.device) -> Pixels:
    """Every `stride`-th row and column from random offsets, as tensors: slices would be compiled one by one."""
    if stride == 1:
        return ALL_PIXELS
    return tuple(torch.arange(i, resolution, stride, device=device) for i in rng.integers(stride, size=2).tolist())


def learning_rate(
    step: int, lr: float, warmup_steps: int, decay_steps: int, cooldown: float = 0.0, total_steps: int = 0
) -> float:
    """Linear warm-up times exponential decay (paper Appendix E.3); in the last `cooldown` share also a fall to 0."""
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    decay = 0.5 ** (step / decay_steps) if decay_steps else 1.0
    cool = min(1.0, (total_steps - step) / (cooldown * total_steps)) if cooldown else 1.0
    return lr * warmup * decay * cool


def log_window(run: Run) -> str:
    """Logs the means over the steps since the last point, and returns them as text. Raises TrainingError."""
    progress = run.progress
    losses, norms = torch.stack([pair.cpu() for pair in progress.window]).double().T  # [n] each
    progress.window = []
    finite = torch.isfinite(losses + norms)
    lr = run.learning_rate(progress.step - 1)
    for step, good in enumerate(finite.tolist(), progress.step - len(finite) + 1):
        progress.skipped_in_row = 0 if good else progress.skipped_in_row + 1
        if progress.skipped_in_row == MAX_SKIPPED:
            i = step - progress.step - 1
            raise TrainingError(
                f'{MAX_SKIPPED} consecutive steps had no finite gradient: at step {step} the loss is {losses[i]:.3g}, '
                f'the gradient norm {norms[i]:.3g}, the learning rate {lr:.1e}; the last checkpoint is unchanged; '
                'lower --lr or set --clip 1.0'
            )
    seconds, run.clock = time.monotonic() - run.clock, time.monotonic()
    rate, run.timed = run.timed / seconds, 0
    progress.seconds += seconds
    progress.skipped += int((~finite).sum())
    progress.loss_steps += int(finite.sum())
    progress.loss_sum += losses[finite].sum().item()
    if finite.any():
        run.log.add_scalar('train/loss', losses[finite].mean().item(), progress.step)
        run.log.add_scalar('train/grad_norm', norms[finite].mean().item(), progress.step)
    run.log.add_scalar('train/lr', lr, progress.step)
    run.log.add_scalar('train/skipped_steps', progress.skipped, progress.step)
    if rate:  # not if these steps were taken before the run was interrupted
        run.log.add_scalar('system/images_per_second', rate, progress.step)
    return f'loss {losses.mean():.4f}, {rate:.0f} images/s'


def save(run: Run, name: str) -> None:
    """Writes a checkpoint. If that fails, training continues, and the next one is tried."""
    run.saved_at = time.monotonic()
    if run.context.rank > 0:
        return
    run.log.flush()  # or a kill would lose the points before this checkpoint
    path = run.args.log_dir / 'checkpoints' / name
    progress = asdict(run.progress) | dict(window=[pair.tolist() for pair in run.progress.window])
    states = [optimizer.state_dict()['state'] for optimizer in run.optimizers]
    try:
        save_checkpoint(
            path, run.model, args=saved_flags(run.args), data=data_of(run.args), progress=progress, optimizers=states,
            fingerprint=run.train_loader.dataset.fingerprint,
        )  # fmt: skip
        run.save_failed = False
        run.log.reopen()
    except OSError as error:
        run.save_failed = True
        print_error(f'cannot write {path} ({error.strerror}); training continues without it')


# --- Validation and logging ------------------------------------------------------------------


def validate(run: Run) -> dict[str, float]:
    """Scores the network on the validation images, logs and prints the scores. Raises Interrupted."""
    progress, context, start = run.progress, run.context, time.monotonic()
    final = progress.step == run.total_steps
    scores = evaluate(run.model, run.val_loader, context, run.stop, run.args, consistency=final)['network']
    run.clock += time.monotonic() - start  # it measures training only
    if not scores['mse'] <= MAX_MSE:
        raise TrainingError(
            f'training has diverged: the validation MSE is {scores["mse"]:.3g}; lower --lr or raise --warmup_steps'
        )
    if progress.window:
        log_window(run)
    for name, value in scores.items():
        run.log.add_scalar(f'{"val" if name in SCORES else "slots"}/{name}', value, progress.step)
    if context.rank == 0:
        log_figures(run)
    summary = '  '.join(f'{title} {scores[name]:.4f}' for name, title in SCORES.items() if name in scores)
    context.print0(
        f'epoch {progress.epochs + 1:3d}  step {progress.step:6d}  {progress.seconds / 60:5.1f} min  '
        f'train loss {progress.loss_sum / max(progress.loss_steps, 1):.4f}  val {summary}  '
        f'{progress.images / max(progress.seconds, 1e-9):.0f} images/s'
    )
    diagnosis = diagnose(scores)
    progress.diagnosis_count = progress.diagnosis_count + 1 if diagnosis == progress.diagnosis else 1
    progress.diagnosis = diagnosis
    if diagnosis and progress.diagnosis_count == REPORT_AFTER:
        text = f'{DIAGNOSES[diagnosis][1]} ({diagnosis} {scores[diagnosis]:.2f})'
        context.print0(text)
        run.log.add_text('diagnosis', text, progress.step)
    progress.validated, progress.loss_sum, progress.loss_steps = progress.step, 0.0, 0
    return scores


@torch.no_grad()
def evaluate(
    model: SlotAttentionAutoEncoder, loader: DataLoader, context: DistributedContext, stop: Stop,
    args: argparse.Namespace, consistency: bool,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Mean scores over the images of all processes: rows 'network' and, with --search, '+ refine'.

    A row has the SCORES (see segmentation_scores(); without masks only the MSE and the consistency) and
    mask_statistics(). attn_fg_ari is the FG-ARI of the last iteration's attention, enlarged to the image; scored is
    the share of the images that have an FG-ARI. `consistency` adds the ARI of the segmentations from two independent
    samples of the initial slots, over the true foreground: does an object get the same slot again? Raises Interrupted.
    """
    model.eval()
    batch_size = loader.batch_size * context.world_size
    values = defaultdict(list)  # of each image, by (row, name)

    def run_model(images: Tensor, *key: int) -> SlotAttentionOutput:
        slots = model.slot_attention.initial_slots(batch_size, args.num_slots, context.generator(0, *key))
        return model(images, slots=context.shard(slots)[: len(images)], num_iterations=args.num_iterations)

    def score(row: str, images: Tensor, labels: Tensor | None, recons: Tensor, masks: Tensor) -> None:
        values[row, 'mse'] += (recons.float() - images).square().mean((1, 2, 3)).tolist()
        scores = mask_statistics(masks, labels)
        if labels is not None:
            scores |= segmentation_scores(labels, masks)
            scores['scored'] = ~scores['fg_ari'].isnan()
        for name, value in scores.items():
            values[row, name] += value.tolist()

    def score_batch(images: Tensor, labels: Tensor | None, i: int) -> None:
        output = run_model(images, i, 0)
        score('network', images, labels, output.recons, output.masks)
        if labels is not None:
            attn = F.interpolate(output.attn[:, -1].float(), labels.shape[1:], mode='bilinear')
            values['network', 'attn_fg_ari'] += fg_ari(labels, attn).tolist()
        if consistency:
            found, again = segmentation(output.masks), segmentation(run_model(images, i, 1).masks)
            where = None if labels is None else (labels > 0) & (labels != IGNORE_LABEL)
            values['network', 'consistency'] += adjusted_rand_index(found, again, where).tolist()
        if args.search:
            rgbs, masks = model.decode(refine(model, images, output.slots, args.refine_steps))
            score('+ refine', images, labels, (rgbs * masks).sum(1), masks)

    count = math.ceil(len(loader.dataset) / batch_size)
    batches = itertools.zip_longest(range(count), loader)  # a process may have no part of the last batch
    for i, batch in tqdm(batches, 'evaluating', count, delay=2, leave=False, disable=context.rank > 0 or None):
        if batch is not None:
            batch = {name: value.to(context.device, non_blocking=True) for name, value in batch.items()}
            with context.autocast():
                score_batch(batch['image'], batch.get('mask'), i)
        stop.check(context)

    parts, rows = context.gather(values), defaultdict(dict)
    for row, name in parts[0]:
        numbers = [number for part in parts for number in part[row, name]]
        rows[row][name] = torch.tensor(numbers, dtype=torch.double).nanmean().item()
    return rows


def mask_statistics(masks: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Statistics that show how the slots fail, of each image, [B] each.

    masks [B, K, 1, H, W], labels [B, H, W] with 0 = background; without labels all of the image is foreground, and
    `missed` and `split` are left out. Empty for K = 1.

    mask_entropy  mean entropy of the masks at a pixel of the true foreground, divided by log K; 1: all slots share all
    sameness      ARI with the segmentation of the next image, if there is one; 1: the image does not matter
    largest_slot  share of the foreground in the slot with most of it; NaN for one object, where it should be 1
    missed        share of the objects that lie mostly in the background's slot
    split         share of the foreground in neither the background's slot nor the main slot of its object

    The background's slot has more than half of its pixels. The paper's architecture often divides the background among
    all slots: then there is none.
    """
    if masks.shape[1] == 1:
        return {}
    found, has_labels = segmentation(masks), labels is not None
    if not has_labels:
        labels = torch.ones_like(found)
    counted = labels != IGNORE_LABEL
    where = counted & (labels > 0)
    entropy = torch.special.entr(masks.squeeze(2).double()).sum(dim=1) / math.log(masks.shape[1])
    area = where.sum((1, 2))
    table = contingency_table(labels.where(counted, 0), found, counted).double()  # [B, labels, slots]
    objects = table[:, 1:]  # [B, objects, slots]
    statistics = {'mask_entropy': (entropy * where).sum((1, 2)) / area, 'largest_slot': objects.sum(1).amax(1) / area}
    if len(found) > 1:
        statistics['sameness'] = adjusted_rand_index(found, found.roll(1, dims=0))
    if has_labels:
        visible = objects.sum(2) > 0  # [B, objects]
        statistics['largest_slot'].masked_fill_(visible.sum(1) < 2, math.nan)
        background = table[:, :1] > table[:, :1].sum(dim=2, keepdim=True) / 2  # [B, 1, slots]
        missed = (background & (objects == objects.amax(dim=2, keepdim=True))).any(dim=2) & visible  # [B, objects]
        statistics['missed'] = missed.sum(1) / visible.sum(1)
        elsewhere = objects * ~background
        statistics['split'] = (elsewhere.sum(2) - elsewhere.amax(2)).sum(1) / area
    return statistics


def diagnose(statistics: dict[str, float]) -> str:
    """The first of DIAGNOSES that the means of mask_statistics() show, '' if there is none."""
    for name, (limit, _) in DIAGNOSES.items():
        if name == 'largest_slot' and 'missed' not in statistics:
            limit = 0.999  # without labels the largest slot is the background's, which may be large
        if statistics.get(name, -math.inf) > limit:
            return name
    return ''


@torch.no_grad()
def log_figures(run: Run) -> None:
    """Logs figures of the first validation images, and a histogram of the slots' shares of up to 64 images.

    The images and the noise are the same at every step, so TensorBoard's slider shows how the slots develop.
    """
    context, dataset, step = run.context, run.val_loader.dataset, run.progress.step
    run.model.eval()
    batch = dataset.__getitems__(list(range(min(64, len(dataset)))))
    batch = {name: values.to(context.device) for name, values in batch.items()}
    with context.autocast():
        output = run.model(batch['image'], generator=context.generator(0))
        run.log.add_histogram('slots/mask_size', output.masks.float().mean((2, 3, 4)), step)
        recons, masks, slots, attn = (values[:6] for values in output)
        rgbs, _ = run.model.decode(slots)
    images, labels = batch['image'][:6], batch['mask'][:6] if 'mask' in batch else None
    figures = {
        'decomposition': visualize_slots(images, recons, masks, rgbs=rgbs, labels=labels),
        'attention': visualize_attention_evolution(attn, images=images),
    }
    for name, figure in figures.items():
        figure.set_facecolor('white')  # TensorBoard drops transparency, which roughens the text
        run.log.add_figure(f'slots/{name}', figure, step)


class Writer(SummaryWriter):
    def __init__(self, log_dir: Path, **kwargs):
        # TensorBoard reads files in the order of their names, which begin with the second of their creation. Within a
        # second the order is arbitrary, and the curves of a run that resumes at once could be purged.
        while [*log_dir.glob(f'events.out.tfevents.{int(time.time())}.*')]:
            time.sleep(0.05)
        super().__init__(log_dir, **kwargs)

    def add_hparams(self, flags: dict, scores: dict[str, float]) -> None:
        """Adds the flags to this run, not to a run of their own; the scores are the last points of their curves."""
        for summary in hparams(flags, scores):
            self.file_writer.add_summary(summary)


class Log:
    """A SummaryWriter in the main process only; a full disk silences it but does not end the run."""

    def __init__(self, log_dir: Path, first_step: int, context: DistributedContext):
        self.log_dir = log_dir
        # Points at or after first_step that an earlier, killed part of the run wrote are replaced.
        self.writer = Writer(log_dir, purge_step=first_step) if context.rank == 0 else None
        threading.excepthook = self.excepthook

    def __getattr__(self, name: str) -> Callable[..., None]:
        """add_scalar(), add_figure(), flush(), ... of the writer."""

        def call(*args, **kwargs) -> None:
            if self.writer is None:
                return
            try:
                getattr(self.writer, name)(*args, **kwargs)
            except OSError as error:
                self.writer = None
                print_error(f'cannot write TensorBoard files ({error.strerror}); training continues')

        return call

    @staticmethod
    def excepthook(args) -> None:
        """The writer's thread passes its OSError to the next call, so its own traceback is not printed."""
        if not issubclass(args.exc_type, OSError):
            threading.__excepthook__(args)

    def reopen(self) -> None:
        """Tries again, in a new file, after a failure in the main process."""
        if self.writer is None:
            with contextlib.suppress(OSError):
                self.writer = Writer(self.log_dir)


# --- Runs ------------------------------------------------------------------------------------


def open_log_dir(log_dir: Path, resume: Path | None) -> TextIO:
    """Creates log_dir/checkpoints, and moves an earlier run to log_dir/run_N unless that one is resumed.

    Returns a file that locks the folder until it is closed. Raises ConfigError if the folder is not writable, or
    locked by another run.
    """
    checkpoints = log_dir / 'checkpoints'
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        lock = open(log_dir / '.lock', 'a')  # noqa: SIM115 (the caller closes it)
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it however a run ends
        checkpoints.mkdir(exist_ok=True)
        for leftover in checkpoints.glob('.*.pth.*'):  # of a run that was killed while it saved
            leftover.unlink()
        earlier = [*log_dir.glob('events.out.tfevents.*'), checkpoints]
        continued = resume is not None and resume.resolve().parent == checkpoints.resolve()
        if not continued and (len(earlier) > 1 or any(checkpoints.iterdir())):
            target = next(log_dir / f'run_{n}' for n in itertools.count(1) if not (log_dir / f'run_{n}').exists())
            target.mkdir()
            for path in earlier:
                shutil.move(path, target)
            checkpoints.mkdir()
            print(f'the earlier run in {log_dir} is now in {target}')
        tempfile.TemporaryFile(dir=checkpoints).close()
        return lock
    except BlockingIOError:
        raise ConfigError(f'another run is writing to {log_dir}; choose another --log_dir') from None
    except OSError as error:
        raise ConfigError(f'cannot write to {checkpoints} ({error.strerror}); choose another --log_dir') from error


def newest_checkpoint(log_dir: Path) -> Path | None:
    """The newest readable checkpoint of the run in log_dir, None if there is none; unreadable ones are named."""
    checkpoints = log_dir / 'checkpoints'
    for path in sorted(checkpoints.glob('*.pth'), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            load_flags(path)
            return path
        except CheckpointError as error:
            print_error(f'{error}; trying an older one')
    print(f'no checkpoint to continue in {checkpoints}: starting a new run')
    return None


def load_flags(path: Path) -> dict:
    """The flags of the run that wrote a checkpoint. Raises CheckpointError if it was not written by a run."""
    checkpoint = load_checkpoint(path)
    if 'args' not in checkpoint['training']:
        raise CheckpointError(f'{path} was not written by train.py: its data are unknown, so it cannot be scored')
    try:
        check_types(checkpoint['training']['args'], saved_flags(create_parser().parse_args([])))
    except Exception as error:
        raise damaged(path, error) from error
    return asdict(checkpoint['config']) | checkpoint['training']['args']


def saved_flags(args: argparse.Namespace) -> dict:
    """The flags that are saved with the training state."""
    return {name: value for name, value in vars(args).items() if name not in (*NOT_SAVED, *MODEL_FLAGS)}


def check_types(values: dict, like: dict) -> None:
    """Raises TypeError unless `values` has the keys of `like`, with values of the same types."""
    if {name: type(value) for name, value in values.items()} != {name: type(value) for name, value in like.items()}:
        raise TypeError('other fields or types than expected')


def restore_training(optimizers: list[torch.optim.Optimizer], training: dict, path: Path) -> Progress:
    """Restores the states of the optimisers, and returns the progress. Raises CheckpointError."""
    if 'optimizers' not in training:
        raise CheckpointError(f'{path} holds no optimiser state: it can be scored and drawn, but not resumed')
    try:
        check_types(training['progress'], asdict(Progress()))
        progress = Progress(**training['progress'])
        progress.best = [float(score) for score in progress.best]
        progress.window = [*torch.tensor(progress.window).reshape(-1, 2)]
        for optimizer, state in zip(optimizers, training['optimizers'], strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {'state': state})
            names = ('momentum',) if isinstance(optimizer, Muon) else ('step', 'exp_avg', 'exp_avg_sq')
            for p in optimizer.param_groups[0]['params']:
                shapes = {name: value.shape for name, value in optimizer.state[p].items()}
                # With other shapes torch's fused step would crash.
                if shapes != {name: torch.Size() if name == 'step' else p.shape for name in names}:
                    raise TypeError('the optimiser state does not fit the model')
        return progress
    except Exception as error:
        raise damaged(path, error) from error


def data_of(args: argparse.Namespace) -> dict:
    """The arguments of create_dataset() that describe the data."""
    return dict(
        dataset_type=args.dataset, resolution=args.resolution, max_objects=args.max_objects,
        min_objects=args.min_objects, seed=args.data_seed, data_dir=args.data_dir, variant=args.variant,
        mask_dir=args.mask_dir or None,
    )  # fmt: skip


def check_fingerprint(dataset: Dataset, checkpoint: dict, path: Path) -> None:
    """Prints a warning if the data are not those that the checkpoint was trained on."""
    if dataset.fingerprint != checkpoint['training'].get('fingerprint'):
        print_error(
            f'warning: {path} was trained on other data: images have been added, removed or changed, or were prepared '
            'in another way'
        )


def evaluate_checkpoint(args: argparse.Namespace, context: DistributedContext) -> int:
    """--eval: prints the scores of a checkpoint on the test split as a table; returns the exit status."""
    checkpoint = load_checkpoint(args.resume)
    model = context.place(build_model(checkpoint, args.resume))
    with context.main_process_first():
        test = create_dataset(split='test', size=args.val_size, **data_of(args))
    if args.max_objects == checkpoint['training']['args']['max_objects']:
        check_fingerprint(test, checkpoint, args.resume)
    loader = wrap_in_loader(test, 32 * context.world_size, False, rank=context.rank, world_size=context.world_size)
    with Stop() as stop:
        rows = evaluate(model, loader, context, stop, args, consistency=True)
    network = rows['network']
    names = [name for name in SCORES if name in network]
    context.print0(
        f'{args.resume}, step {checkpoint["training"]["progress"]["step"]}\n'
        f'{len(test)} test images of {args.dataset}, {args.num_slots} slots, {args.num_iterations} iterations'
    )
    if (scored := round(len(test) * network.get('scored', 1))) < len(test):
        context.print0(f'{scored} of the images have a mask with objects: FG-ARI, mBO and mIoU are of these')
    context.print0('\n' + ' ' * 10 + ''.join(f'{SCORES[name]:>13}' for name in names))
    for row, scores in rows.items():
        cells = (f'{scores[name]:13.4f}' if name in scores else f'{"":13}' for name in names)
        context.print0(f'{row:10}{"".join(cells)}')
    if args.search:
        context.print0('\nrefine: gradient descent on the slots of each test image; these are no scores of the network')
    if (diagnosis := diagnose(network)) and context.rank == 0:
        print_error(DIAGNOSES[diagnosis][1])
    return 0


def keep_checkpoints(run: Run, scores: dict[str, float] | None) -> None:
    """Counts a complete epoch, keeps the best model and writes the checkpoints that are due."""
    args, progress = run.args, run.progress
    complete = progress.seen >= len(run.train_loader) * args.batch_size
    if complete:
        progress.epochs, progress.seen = progress.epochs + 1, 0
    if scores is not None:
        fg_ari = scores.get('fg_ari', math.nan)
        # Without a segmentation score the best model is the one with the lowest MSE, which also decides ties.
        candidate = [-scores['mse'] if math.isnan(fg_ari) else fg_ari, -scores['mse']]
        if candidate > progress.best:
            progress.best = candidate
            save(run, 'best_model.pth')
        save(run, 'last.pth')
    if complete and args.save_every and progress.epochs % args.save_every == 0:
        save(run, f'checkpoint_epoch_{progress.epochs}.pth')


def train(args: argparse.Namespace, context: DistributedContext) -> int:
    """Trains from the start or from a checkpoint to the end of the run; returns the exit status."""
    run = Run(args, context)
    progress = run.progress
    if progress.step > run.total_steps or progress.step == run.total_steps == progress.validated:
        end = f'{args.resume} has done {progress.step} steps, {progress.epochs} epochs, of {run.total_steps} steps'
        if args.auto:  # a loop around this command shall end with status 0
            context.print0(f'{end}: nothing left to do')
            return 0
        raise ConfigError(f'{end}; give a larger --steps or --epochs to continue')
    lock = open_log_dir(args.log_dir, args.resume) if context.rank == 0 else contextlib.nullcontext()
    log = Log(args.log_dir, progress.step - len(progress.window) + 1, context)
    with lock, contextlib.closing(log) as run.log, run.stop:
        parameters = sum(p.numel() for p in run.model.parameters())
        context.print0(f'{args.architecture} model with {parameters:,} parameters on {context}')
        context.print0(f'{args.dataset}: {run.train_loader.dataset}')
        context.print0(f'{run.total_steps:,} steps of {args.batch_size} images, {len(run.train_loader):,} per epoch')
        context.print0(f'follow it with: tensorboard --logdir {shlex.quote(str(args.log_dir))}')
        if run.total_steps <= args.warmup_steps:
            context.print0(
                f'warning: {run.total_steps} steps are not more than the {args.warmup_steps} of the warm-up: the run '
                'will learn little; raise --steps or lower --warmup_steps'
            )
        if args.compile:
            context.print0('compiling the training step: the first one takes a minute or more')
        table = ['|flag|value|', '|-|-|', *(f'|{name}|{value}|' for name, value in vars(args).items())]
        run.log.add_text('configuration', '\n'.join(table))
        checkpoints = args.log_dir / 'checkpoints'
        run.saved_at = time.monotonic()
        try:
            for epoch in range(progress.epochs, run.num_epochs):
                train_one_epoch(run, epoch)
                scores = validate(run) if run.validates_after(epoch, len(run.train_loader)) else None
                keep_checkpoints(run, scores)
        except Interrupted as interrupted:
            save(run, 'last.pth')
            if run.save_failed:
                return 1
            last = shlex.quote(str(checkpoints / 'last.pth'))
            context.print0(f'interrupted at step {progress.step}; to continue: python train.py --resume {last}')
            return 128 + interrupted.args[0]
        flags = {name: value for name, value in vars(args).items() if name not in NOT_SAVED}
        run.log.add_hparams(flags, {f'val/{name}': value for name, value in scores.items() if name in SCORES})
        if (checkpoints / 'best_model.pth').exists():
            unscored = math.isnan(scores.get('fg_ari', math.nan))
            name, value = ('MSE', -progress.best[1]) if unscored else ('FG-ARI', progress.best[0])
            context.print0(f'best validation {name} {value:.4f}: {checkpoints / "best_model.pth"}')
        return int(run.save_failed)  # 1 if the final checkpoint could not be written


def main(args: argparse.Namespace) -> int:
    """Trains or evaluates; returns the exit status. A user's mistake gives one line and status 2."""
    try:
        context = DistributedContext.create(args.device, args.amp, args.compile)
        status = (evaluate_checkpoint if args.eval else train)(args, context)
        if context.world_size > 1:
            dist.destroy_process_group()
        return status
    except (ConfigError, CheckpointError, DataError, TrainingError, OSError) as error:
        print_error(f'train.py: error: {error}')
        return 2
    except Interrupted as interrupted:
        print_error('interrupted')
        return 128 + interrupted.args[0]
    except KeyboardInterrupt:
        print_error('interrupted before the first step: there is nothing to save')
        return 130


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(parse_args()))
