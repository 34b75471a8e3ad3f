"""How fast a training step is, beside the same layers done plainly and beside the machine's peak.

    python tests/benchmark.py                    # everything, in under five minutes on two cores
    python tests/benchmark.py --compile          # also the compiled step: a minute more for each row
    python tests/benchmark.py --device cuda

Run by hand, not collected by pytest. All rows are measured in one process, plain and ours in turns;
figures are medians of the repeats, the peak is the fastest. FLOP are those of convolutions and matrix
products, counted by torch.utils.flop_counter, forward and backward.
"""

import argparse
import dataclasses
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from dataset import create_dataset, wrap_in_loader
from slot_attention import (
    ConfigError,
    ModelConfig,
    SlotAttentionAutoEncoder,
    refine,
)
from train import MODEL_FLAGS, DistributedContext, Loss, choose_pixels, create_optimizers, parse_args
from visualize import visualize_slots


class Step:
    """A training step of train.py with these flags: __call__() does one.

    `plain`: float32, channels first, unfused Adam, every pixel, and the decoder as it is written in the paper's part.
    """

    def __init__(self, flags: dict, batch_size: int, context: DistributedContext, plain: bool = False):
        torch.manual_seed(0)
        args = parse_args([f'--{name}={value}' for name, value in flags.items()])
        self.num_slots = args.num_slots
        self.context = context = DistributedContext(context.device, False) if plain else context
        model = SlotAttentionAutoEncoder(ModelConfig(**{name: getattr(args, name) for name in MODEL_FLAGS}))
        self.model = model = model.to(context.device) if plain else context.place(model)
        if plain:
            self.optimizers = [torch.optim.Adam(model.parameters(), fused=False, foreach=False)]
        else:
            self.optimizers = create_optimizers(model, args.optimizer)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group['lr'] = 1e-4
        stride = 1 if plain else args.pixel_stride
        self.pixels = choose_pixels(np.random.default_rng(0), args.resolution, stride, context.device)
        self.loss, self.rng = Loss(model, context, args.mixture), np.random.default_rng(0)
        images = torch.rand(batch_size, 3, args.resolution, args.resolution, device=context.device) * 2 - 1
        layout = torch.contiguous_format if plain else torch.channels_last
        self.images = images.contiguous(memory_format=layout)

    def initial_slots(self) -> torch.Tensor:
        return self.model.slot_attention.initial_slots(len(self.images), self.num_slots)

    def __call__(self) -> None:
        with self.context.autocast():
            loss, rest = self.loss(self.images, self.initial_slots(), self.pixels, self.rng, progress=1.0)
        (loss + rest).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward(self) -> None:
        with self.context.autocast():
            self.model(self.images)

    @torch.no_grad()
    def search(self) -> None:
        """Network, refine and decode, as --eval --search does."""
        with self.context.autocast():
            slots, _ = self.model.encode(self.images, self.initial_slots())
            self.model.decode(refine(self.model, self.images, slots))

    def flop(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()


def seconds(calls: list, context: DistributedContext, repeats: int, of=statistics.median) -> list[float]:
    """Median (or another figure) `of` each call's durations; they take turns: a busy machine slows them alike."""
    times = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, kept in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if context.device.type == 'cuda':
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                kept.append(time.perf_counter() - start)
    return [of(kept) for kept in times]


def peak(dtype: torch.dtype, context: DistributedContext) -> float:
    """FLOP/s of a large matrix product, at its fastest: what can be had where nothing else disturbs."""
    n = 2048 if context.device.type == 'cpu' else 8192
    a = torch.rand(n, n, device=context.device).to(dtype)
    return 2 * n**3 / seconds([lambda: a @ a], context, 20, of=min)[0]


def memory(context: DistributedContext) -> float:
    """Most memory used so far, GB: of the process, or allocated on the GPU."""
    if context.device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    scale = 1e9 if sys.platform == 'darwin' else 1e6  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def steps_table(context: DistributedContext, repeats: int) -> dict[str, float]:
    """Rows of architecture x resolution: ours, plain, forward alone, compiled. Returns images/s of ours."""
    eager = dataclasses.replace(context, compiled=False)
    dtype = torch.bfloat16 if context.bfloat16 else torch.float32
    peaks = {dtype: peak(dtype, context), torch.float32: peak(torch.float32, context)}
    for name, value in peaks.items():
        print(f'matrix product peak, {str(name).removeprefix("torch.")}: {value / 1e9:,.0f} GFLOP/s')
    print(
        f'\n{"step":24}{"images/s":>10}{"GFLOP/s":>10}{"of peak":>9}{"plain":>9}{"ratio":>7}{"forward":>9}{"memory":>9}'
        + (f'{"compiled":>11}{"ratio":>7}' if context.compiled else '')
    )
    rates = {}
    on_gpu = context.device.type == 'cuda'
    for architecture, resolution, batch in (('fast', 64, 16), ('paper', 64, 4), ('paper', 128, 2)):
        batch *= 16 if on_gpu else 1
        flags = dict(architecture=architecture, resolution=resolution)
        ours, plain = Step(flags, batch, eager), Step(flags, batch, eager, plain=True)
        calls = [ours, plain, ours.forward] + ([Step(flags, batch, context)] if context.compiled else [])
        times = seconds(calls, context, repeats if architecture == 'fast' else max(repeats // 4, 3))
        rate, plain_rate, forward_rate, *compiled_rate = (batch / t for t in times)
        speed = ours.flop() / times[0]
        rates[f'{architecture} {resolution}'] = rate
        print(
            f'{f"{architecture} {resolution}x{resolution}, batch {batch}":24}{rate:10.1f}{speed / 1e9:10.0f}'
            f'{speed / peaks[dtype]:9.0%}{plain_rate:9.1f}{rate / plain_rate:7.2f}{forward_rate:9.1f}'
            f'{memory(context):6.1f} GB' + ''.join(f'{r:11.1f}{r / plain_rate:7.2f}' for r in compiled_rate),
            flush=True,
        )
    print(f'fast is {rates["fast 64"] / rates["paper 64"]:.1f} times as fast as paper at 64x64')
    return rates


def loaders_table(rates: dict[str, float]) -> None:
    """Images/s of the loader alone, beside the step that it feeds."""
    print(f'\n{"loader":24}{"images/s":>10}{"of step":>9}')
    for resolution, step in ((64, 'fast 64'), (128, 'paper 128')):
        dataset = create_dataset('shapes', 'train', 1024, resolution)
        loader = wrap_in_loader(dataset, 16, shuffle=True)
        start = time.perf_counter()
        images = sum(len(batch['image']) for _ in range(3) for batch in loader)
        rate = images / (time.perf_counter() - start)
        print(f'{f"shapes {resolution}x{resolution}":24}{rate:10,.0f}{rate / rates[step]:8.0f}x', flush=True)


def inference_table(context: DistributedContext, repeats: int) -> None:
    """Images/s of the network alone, and with the search on top, of `fast` at 64x64."""
    step = Step({}, 16, context)
    step.model.eval()
    network, search = (16 / t for t in seconds([step.forward, step.search], context, max(repeats // 2, 3)))
    print(f'\n{"inference, fast 64x64":24}{"images/s":>10}')
    print(f'{"network":24}{network:10.0f}\n{"with search":24}{search:10.0f}')


def figures_table() -> None:
    """Seconds to draw a sheet of 8 images of 64x64 with 7 slots."""
    images, masks = torch.rand(8, 3, 64, 64) * 2 - 1, torch.rand(8, 7, 1, 64, 64).softmax(dim=1)
    times = []
    for _ in range(3):  # the first call searches for fonts
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            visualize_slots(images, images, masks, Path(folder) / 'slots.png')
        times.append(time.perf_counter() - start)
    print(f'\nfigure of 8 images, 7 slots: {min(times):.2f} s')


def growth_table(context: DistributedContext, repeats: int) -> None:
    """Time of a step of `fast` as one thing at a time changes, relative to the default."""
    print(f'\n{"fast, one thing changed":24}{"ms/step":>10}{"relative":>10}')
    grid = dict(num_slots=(7, 15), num_iterations=(20, 32), resolution=(32, 128), batch_size=(4, 64))
    cases = [{}] + [{name: value} for name, values in grid.items() for value in values]
    steps = [
        Step({k: v for k, v in case.items() if k != 'batch_size'}, case.get('batch_size', 16), context)
        for case in cases
    ]
    durations = seconds(steps, context, repeats)
    for changes, duration in zip(cases, durations, strict=True):
        name = ', '.join(f'{k} {v}' for k, v in changes.items()) or 'default'
        print(f'{name:24}{1000 * duration:10.1f}{duration / durations[0]:10.2f}', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--device', default='auto', choices=('auto', 'cpu', 'cuda'))
    parser.add_argument('--amp', default='auto', choices=('auto', 'on', 'off'))
    parser.add_argument('--compile', action='store_true', help='also measure the compiled step')
    parser.add_argument('--repeats', type=int, default=12, help='measured calls per figure (default: 12)')
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        context = DistributedContext.create(args.device, args.amp, args.compile)
    except ConfigError as error:
        parser.error(str(error))
    print(f'{context}, torch {torch.__version__}')
    rates = steps_table(context, args.repeats)
    loaders_table(rates)
    eager = dataclasses.replace(context, compiled=False)
    inference_table(eager, args.repeats)
    figures_table()
    growth_table(eager, args.repeats)
    print(f'\n{time.perf_counter() - start:.0f} s')


if __name__ == '__main__':
    main()
