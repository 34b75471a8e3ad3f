"""Train a Slot Attention autoencoder, score it, log it to TensorBoard and keep its checkpoints.

    python train.py                                              # shapes, 64x64, 7 slots
    python train.py --epochs 4                                   # a first look, in minutes
    python train.py --architecture paper                         # the paper's model and schedule
    python train.py --resume logs/checkpoints/last.pth           # go on after a stop
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
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dataset import (
    DATASETS,
    SIZES,
    VARIANTS,
    DataError,
    create_dataloader,
    create_dataset,
    flip_at_random,
    wrap_in_loader,
)
from slot_attention import (
    CheckpointError,
    ConfigError,
    ModelConfig,
    SlotAttentionAutoEncoder,
    adjusted_rand_index,
    build_model,
    contingency_table,
    fg_ari,
    load_checkpoint,
    save_checkpoint,
    segmentation,
    segmentation_scores,
)
from visualize import visualize_attention_evolution, visualize_slots

# What a flag is when it is not given. 'paper' is Table 11 with Adam's learning rate halving
# every 100,000 steps; 'fast' is what was measured to learn shapes soonest (README, "What was tried").
RECIPES = {
    'fast': dict(
        hidden_dim=64, num_iterations=8, slot_init='learned', gradient='first_order', damping=1 / 32,
        eval_iterations=12, slot_worth=1e-3, optimizer='muon',
        epochs=5, batch_size=16, lr=2e-3, warmup_steps=300, decay_steps=2_500, clip=1.0, pixel_stride=2,
    ),
    'paper': dict(
        hidden_dim=64, num_iterations=3, slot_init='gaussian', gradient='full', damping=0.0,
        eval_iterations=0, slot_worth=0.0, optimizer='adam',
        epochs=100, batch_size=64, lr=4e-4, warmup_steps=10_000, decay_steps=100_000, clip=0.0, pixel_stride=1,
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
OPTIMISATION_FLAGS = ('epochs', 'batch_size', 'lr', 'warmup_steps', 'decay_steps', 'clip', 'pixel_stride')
FREE_IN_EVAL = ('num_slots', 'num_iterations', 'slot_worth', 'val_size', 'max_objects')
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


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do in one line."""


# --- Command line ----------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags as given; those of model, data and optimisation are None until settle() fills them."""
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n')[0], usage='python train.py [--help] [flags]', allow_abbrev=False
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
    group = parser.add_argument_group('optimisation')
    add(group, 'optimizer', str, 'muon: Muon for the matrices, Adam for the rest', choices=('adam', 'muon'))
    add(group, 'pixel_stride', at_least(1), 'the loss is that of every so many rows and columns, at random offsets')
    add(group, 'epochs', at_least(1), 'passes over the training images')
    add(group, 'batch_size', int, 'images per step')
    add(group, 'lr', at_least(0, float), 'peak learning rate')
    add(group, 'warmup_steps', at_least(0), 'steps of linear warm-up')
    add(group, 'decay_steps', at_least(0), 'steps in which the learning rate halves; 0: never')
    add(group, 'clip', at_least(0, float), 'largest norm of the gradient; 0: no clipping')
    add(group, 'seed', at_least(0), 'decides initial weights, order of the images and slot noise')
    group = parser.add_argument_group('logging')
    add(group, 'log_dir', Path, 'TensorBoard files, and checkpoints/ below it (default: logs, or where --resume lies)')
    add(group, 'log_every', at_least(1), 'steps between two points of the training curves', default=50)
    add(group, 'save_every', at_least(0), 'epochs between two checkpoint_epoch_N.pth; 0: none', default=10)
    add(group, 'resume', Path, 'checkpoint to go on from, or to score with --eval')
    group.add_argument('--eval', action='store_true', help='score --resume on the test images and stop')
    group = parser.add_argument_group('system')
    add(group, 'device', str, 'auto takes a GPU where there is one', default='auto', choices=('auto', 'cpu', 'cuda'))
    add(group, 'amp', str, 'bfloat16; auto: where it is fast', default='auto', choices=('auto', 'on', 'off'))
    add(group, 'num_workers', at_least(0), 'processes that load batches; 0: none, the data are in memory', default=0)

    args = parser.parse_args(argv)
    if args.eval and args.resume is None:
        parser.error('--eval needs --resume PATH, the checkpoint to score')
    return args


def at_least(lowest: int, number: type = int):
    """An argparse type: a finite number that is not below `lowest`."""

    def parse(text: str):
        value = number(text)
        if not (value >= lowest and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f'must be at least {lowest}, not {text}')
        return value

    parse.__name__ = number.__name__  # argparse names the type when the text is no number
    return parse


def settle(args: argparse.Namespace, saved: dict | None = None) -> argparse.Namespace:
    """Fill in what was not given: from the checkpoint's flags where there is one, else the recipe.

    Raises ConfigError for a flag that contradicts the checkpoint, CheckpointError for one that the
    checkpoint should hold and does not. Optimisation flags may change on resuming; the number of
    slots and iterations may in --eval.
    """
    if saved is None:
        recipe = RECIPES[args.architecture or DEFAULTS['architecture']] | DEFAULTS
        recipe |= zip(BY_DATASET, SIZES[args.dataset or DEFAULTS['dataset']], strict=True)
        args.log_dir = args.log_dir or Path('logs')
        if args.architecture == 'paper' and (args.resolution or recipe['resolution']) <= 64:
            recipe['hidden_dim'] = 32  # Tables 5 and 7
    else:
        missing = [name for name in MODEL_FLAGS + DATA_FLAGS + OPTIMISATION_FLAGS if name not in saved]
        if missing:
            raise CheckpointError(f'{args.resume} is of another version: it does not say {", ".join(missing)}')
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
    """Where and in which number format to compute; the only code that decides it."""

    device: torch.device
    bfloat16: bool

    @classmethod
    def choose(cls, device: str = 'auto', amp: str = 'auto') -> 'Place':
        """Raises ConfigError for a GPU that is not there."""
        if device == 'cuda' and not torch.cuda.is_available():
            raise ConfigError('--device cuda: PyTorch finds no CUDA GPU here; use --device cpu')
        if device == 'auto':
            device = 'cuda' if torch.cuda.is_available() else 'cpu'
        if device == 'cuda':
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # without these instructions bfloat16 is emulated, tens of times slower than float32
            checks = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
            fast = any(getattr(torch.cpu, check, bool)() for check in checks)
        return cls(torch.device(device), amp == 'on' or (amp == 'auto' and fast))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else contextlib.nullcontext()

    def generator(self, *key: int) -> torch.Generator:
        """Noise that is a function of `key`: torch's CPU generator uses 32 bits of a seed, so mix."""
        seed = np.random.SeedSequence(key).generate_state(1)[0]
        return torch.Generator(self.device).manual_seed(int(seed))

    def __str__(self) -> str:
        name = torch.cuda.get_device_name() if self.device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'
        return f'{name}, {"bfloat16" if self.bfloat16 else "float32"}'


# --- Optimiser -------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before each step (Jordan 2024; Liu et al. 2025, arXiv 2502.16982).

    Every direction of a matrix moves equally far: about 0.2 a root mean square of an entry, as Adam.
    Weights of convolutions count as matrices [out, in * kernel]. torch.optim.Muon (from 2.9) computes
    in bfloat16, which most CPUs only emulate; this one stays in float32, equal shapes in one batch.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            updates = {}  # by shape
            for p in group['params']:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]['momentum'] = torch.zeros_like(p)
                buffer = self.state[p]['momentum']
                buffer.lerp_(p.grad, 1 - group['momentum'])
                update = p.grad.lerp(buffer, group['momentum']).flatten(1)
                updates.setdefault(update.shape, []).append((p, update))
            for shape, pairs in updates.items():
                directions = orthogonalise(torch.stack([update for _, update in pairs]))
                for (p, _), direction in zip(pairs, directions, strict=True):
                    p.add_(direction.view_as(p), alpha=-0.2 * max(shape) ** 0.5 * group['lr'])


def orthogonalise(matrices: Tensor) -> Tensor:
    """[n, R, C] -> the nearest (semi-)orthogonal matrices, roughly: singular values from 0.7 to 1.2.

    Five steps of a Newton-Schulz iteration with Jordan's coefficients.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalise(matrices.mT).mT
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


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
    seconds: float = 0.0  # spent training, without validation
    best: float = -math.inf  # best validation score so far
    epoch_loss: float = 0.0  # sum over the steps of the present epoch
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


def learning_rate(step: int, lr: float, warmup_steps: int, decay_steps: int) -> float:
    """Linear warm-up times exponential decay (paper Appendix E.3): a function of the step alone."""
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return lr * warmup * (0.5 ** (step / decay_steps) if decay_steps else 1.0)


def train_one_epoch(
    model: SlotAttentionAutoEncoder,
    loader: DataLoader,
    optimizers: list[torch.optim.Optimizer],
    progress: Progress,
    args: argparse.Namespace,
    place: Place,
    writer: SummaryWriter,
    stop: Stop,
) -> None:
    """Train to the end of the epoch that progress.step lies in, or until `stop` is set.

    Raises TrainingError when the loss is not finite; the step is named.
    """
    epoch, done = divmod(progress.step, len(loader))
    loader.sampler.set_epoch(epoch)
    model.train()
    waiting = []  # losses and gradient norms on the device, read back every log_every steps
    bar = tqdm(total=len(loader), initial=done, desc=f'epoch {epoch + 1}/{args.epochs}', disable=None, leave=False)
    start = time.perf_counter()
    for batch in itertools.islice(loader, done, None):
        lr = learning_rate(progress.step, args.lr, args.warmup_steps, args.decay_steps)
        for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
            group['lr'] = lr
        rng = np.random.default_rng([args.seed, progress.step])
        if args.flip:
            batch = flip_at_random(batch, rng)
        rows, columns = (slice(offset, None, args.pixel_stride) for offset in rng.integers(args.pixel_stride, size=2))
        images = batch['image'].to(place.device, non_blocking=True)
        with place.autocast():
            recons = model(images, (rows, columns), generator=place.generator(args.seed, progress.step)).recons
        loss = F.mse_loss(recons.float(), images[:, :, rows, columns])
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
        progress.step += 1
        waiting.append(torch.stack([loss.detach(), norm]))
        bar.update()

        stopping = stop.signal is not None  # looked at once: it may come at any moment
        if stopping or progress.step % args.log_every == 0 or progress.step % len(loader) == 0:
            losses, norms = torch.stack(waiting).double().cpu().T
            seconds = time.perf_counter() - start
            for i, value in enumerate(losses.tolist()):
                if not math.isfinite(value):
                    raise TrainingError(
                        f'the loss is {value} at step {progress.step - len(waiting) + i + 1} (learning rate {lr:.1e}); '
                        'the last checkpoint is untouched; try a lower --lr or --clip 1.0'
                    )
                progress.epoch_loss += value
            rate = len(waiting) * args.batch_size / seconds
            writer.add_scalar('train/loss', losses.mean().item(), progress.step)
            writer.add_scalar('train/lr', lr, progress.step)
            writer.add_scalar('train/grad_norm', norms.mean().item(), progress.step)
            writer.add_scalar('system/images_per_second', rate, progress.step)
            bar.set_postfix_str(f'loss {losses.mean():.4f}, {rate:.0f} images/s')
            progress.seconds += seconds
            waiting, start = [], time.perf_counter()
        if stopping:
            break
    bar.close()


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
    model: SlotAttentionAutoEncoder, loader: DataLoader, place: Place, **per_call
) -> tuple[dict[str, float], dict[str, float]]:
    """Means over the images: the SCORES (see segmentation_scores()), and mask_statistics().

    The attention's FG-ARI is that of the last iteration's maps, enlarged to the image.

    Consistency asks whether an object is given the same slot again: the ARI of the segmentations
    from two independent slot initialisations, over the true foreground (over the whole image
    where there are no masks; then the other segmentation scores are left out). Learned slots have
    one initialisation only. `per_call`: num_slots and num_iterations, as in SlotAttention.forward.
    """
    model.eval()
    scores = {}
    for i, batch in enumerate(loader):
        batch = {name: values.to(place.device, non_blocking=True) for name, values in batch.items()}
        images, labels = batch['image'], batch.get('mask')
        with place.autocast():
            first = second = model(images, generator=place.generator(0, i, 0), **per_call)
            if model.config.slot_init == 'gaussian':
                second = model(images, generator=place.generator(0, i, 1), **per_call)
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
            scores.setdefault(name, []).append(values.double())
    means = {name: torch.cat(values).nanmean().item() for name, values in scores.items()}
    return {name: means.pop(name) for name in SCORES if name in means}, means


@torch.no_grad()
def log_figures(model: SlotAttentionAutoEncoder, batch: dict[str, Tensor], place: Place, writer, step: int) -> None:
    """The same few images at every step, so that TensorBoard's slider shows their slots emerge."""
    model.eval()
    batch = {name: values[:6].to(place.device) for name, values in batch.items()}
    with place.autocast():
        recons, masks, slots, attn = model(batch['image'], generator=place.generator(0))
        rgbs, _ = model.decode(slots)
    figure = visualize_slots(batch['image'], recons, masks, rgbs=rgbs, labels=batch.get('mask'))
    writer.add_figure('slots/decomposition', figure, step)
    writer.add_figure('slots/attention', visualize_attention_evolution(attn, images=batch['image']), step)


# --- Runs ------------------------------------------------------------------------------------


def open_log_dir(log_dir: Path, resume: Path | None) -> Path:
    """Make the folder of the checkpoints and return it; a new run moves an earlier one aside.

    Raises ConfigError when the folder cannot be written.
    """
    checkpoints = log_dir / 'checkpoints'
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
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
    return checkpoints


def data_of(args: argparse.Namespace) -> dict:
    """What create_dataset() needs to give the same images again."""
    return dict(
        dataset_type=args.dataset, resolution=args.resolution, max_objects=args.max_objects,
        min_objects=args.min_objects, seed=args.data_seed, data_dir=args.data_dir, variant=args.variant,
    )  # fmt: skip


def evaluate_checkpoint(args: argparse.Namespace, checkpoint: dict, place: Place) -> int:
    """--eval: print the scores of a checkpoint on the test split as a table; returns the exit status."""
    checkpoint = checkpoint | {'config': replace(checkpoint['config'], slot_worth=args.slot_worth)}
    model = build_model(checkpoint, args.resume).to(place.device)
    test = create_dataset(split='test', size=args.val_size, **data_of(args))
    loader = wrap_in_loader(test, 32, shuffle=False)
    scores, figures = evaluate(model, loader, place, num_slots=args.num_slots, num_iterations=args.num_iterations)
    print(f'{args.resume}, step {checkpoint["training"]["progress"]["step"]}')
    print(f'{len(test)} test images of {args.dataset}, {args.num_slots} slots, {args.num_iterations} iterations\n')
    print('  '.join(f'{SCORES[name]:>11}' for name in scores))
    print('  '.join(f'{value:11.4f}' for value in scores.values()))
    if diagnosis := diagnose(figures):
        print(DIAGNOSES[diagnosis][1], file=sys.stderr)
    return 0


def train(args: argparse.Namespace, checkpoint: dict | None, place: Place) -> int:
    """A whole run, new or resumed; returns the exit status."""
    torch.manual_seed(args.seed)
    config = ModelConfig(**{name: getattr(args, name) for name in MODEL_FLAGS})
    model = SlotAttentionAutoEncoder(config) if checkpoint is None else build_model(checkpoint, args.resume)
    model = model.to(place.device, memory_format=torch.channels_last)
    optimizers = create_optimizers(model, args.optimizer)
    progress = Progress()
    if checkpoint is not None:
        for optimizer, state in zip(optimizers, checkpoint['training']['optimizers'], strict=True):
            optimizer.load_state_dict(state)
        progress = Progress(**checkpoint['training']['progress'])
    loaders = create_dataloader(
        args.dataset, args.batch_size, args.resolution, args.max_objects, args.min_objects,
        args.train_size or None, args.val_size, args.seed, args.data_seed, args.num_workers,
        place.device.type == 'cuda', args.data_dir, args.variant,
    )  # fmt: skip
    first_epoch = progress.step // len(loaders[0])
    if first_epoch >= args.epochs:
        raise ConfigError(f'{args.resume} has {first_epoch} epochs behind it: --epochs {args.epochs} leaves none to do')
    checkpoints = open_log_dir(args.log_dir, args.resume)

    parameters = sum(p.numel() for p in model.parameters())
    print(f'{args.architecture} model of {parameters:,} parameters on {place}; {args.dataset}: {loaders[0].dataset}')
    print(f'watch it with: tensorboard --logdir {args.log_dir}', flush=True)
    flags = {name: value if isinstance(value, int | float) else str(value) for name, value in vars(args).items()}
    saved_flags = {name: flags[name] for name in MODEL_FLAGS + DATA_FLAGS + OPTIMISATION_FLAGS}

    def save(name: str) -> None:
        states = [optimizer.state_dict() for optimizer in optimizers]
        training = dict(args=saved_flags, data=data_of(args), progress=asdict(progress), optimizers=states)
        save_checkpoint(checkpoints / name, model, **training)

    with SummaryWriter(args.log_dir, purge_step=progress.step + 1 if checkpoint else None) as writer, Stop() as stop:
        writer.add_text(
            'configuration', '\n'.join(['|flag|value|', '|-|-|', *(f'|{k}|{v}|' for k, v in flags.items())])
        )
        for epoch in range(first_epoch, args.epochs):
            train_one_epoch(model, loaders[0], optimizers, progress, args, place, writer, stop)
            if progress.step % len(loaders[0]) == 0:
                scores = finish_epoch(model, loaders, progress, args, place, writer)
                score = scores.get('fg_ari', -scores['mse'])
                if score > progress.best:
                    progress.best = score
                    save('best_model.pth')
                if args.save_every and (epoch + 1) % args.save_every == 0:
                    save(f'checkpoint_epoch_{epoch + 1}.pth')
            save('last.pth')
            if stop.signal is not None:
                last = checkpoints / 'last.pth'
                print(f'stopped at step {progress.step}; to go on: python train.py --resume {last}')
                return 128 + stop.signal
        writer.add_hparams(saved_flags, {f'final/{name}': value for name, value in scores.items()}, run_name='.')
    print(f'best validation score {progress.best:.4f}: {checkpoints / "best_model.pth"}')
    return 0


def finish_epoch(
    model: SlotAttentionAutoEncoder,
    loaders: tuple[DataLoader, DataLoader],
    progress: Progress,
    args: argparse.Namespace,
    place: Place,
    writer: SummaryWriter,
) -> dict[str, float]:
    """Validate, log and print the epoch that has just ended; returns the validation scores."""
    train_loader, val_loader = loaders
    train_loss, progress.epoch_loss = progress.epoch_loss / len(train_loader), 0.0
    scores, figures = evaluate(model, val_loader, place)
    for group, values in (('val', scores), ('diagnosis', figures)):
        for name, value in values.items():
            writer.add_scalar(f'{group}/{name}', value, progress.step)
    log_figures(model, next(iter(val_loader)), place, writer, progress.step)
    summary = '  '.join(f'{SCORES[name]} {scores[name]:.4f}' for name in scores)
    minutes, rate = progress.seconds / 60, progress.step * args.batch_size / progress.seconds
    print(
        f'epoch {progress.step // len(train_loader):3d}  {minutes:5.1f} min  train loss {train_loss:.4f}  '
        f'val {summary}  {rate:.0f} images/s',
        flush=True,
    )
    diagnosis = diagnose(figures)
    progress.lasting = progress.lasting + 1 if diagnosis == progress.diagnosis else 1
    progress.diagnosis = diagnosis
    if diagnosis and progress.lasting == SETTLED:
        text = f'{DIAGNOSES[diagnosis][1]} ({diagnosis} {figures[diagnosis]:.2f})'
        print(text, flush=True)
        writer.add_text('diagnosis', text, progress.step)
    return scores


def main(args: argparse.Namespace) -> int:
    """Train or score as asked; returns the exit status. A user's mistake becomes one line and a 2."""
    try:
        place = Place.choose(args.device, args.amp)
        checkpoint = None if args.resume is None else load_checkpoint(args.resume)
        if checkpoint is not None and not {'args', 'progress', 'optimizers'} <= checkpoint['training'].keys():
            raise CheckpointError(f'{args.resume} holds a model but no training state: it cannot be resumed or scored')
        args = settle(args, checkpoint and checkpoint['training']['args'])
        return (evaluate_checkpoint if args.eval else train)(args, checkpoint, place)
    except (ConfigError, CheckpointError, DataError, TrainingError, OSError) as error:
        print(f'train.py: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted before the first step: nothing to save', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main(parse_args()))
