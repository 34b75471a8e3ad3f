"""Speed of a training step and of inference.

    python tests/benchmark.py                    # about two minutes on two cores
    python tests/benchmark.py --device cuda

Run by hand, not collected by pytest. Rows are measured in turns, so that a busy machine slows them alike; figures are
medians of the repeats. A step is that of train.py with its default flags, in the middle of a run; the last two
columns are images/s of the step and of the network alone.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from slot_attention import ConfigError, ModelConfig, create_model
from train import MODEL_FLAGS, DistributedContext, create_optimizers, loss_terms, parse_args

ROWS = (('fast', 64, 16), ('paper', 64, 4), ('paper', 128, 2))  # architecture, resolution, batch; more on a GPU


class Step:
    """A training step of an architecture: __call__() does one, the methods its parts."""

    def __init__(self, architecture: str, resolution: int, batch_size: int, device: str, amp: str):
        torch.manual_seed(0)
        self.args = args = parse_args(['--architecture', architecture, '--resolution', str(resolution)])
        self.context = DistributedContext.create(device, amp)
        self.name = f'{architecture} {resolution}x{resolution}, batch {batch_size}'
        model = create_model(ModelConfig(**{name: getattr(args, name) for name in MODEL_FLAGS}))
        self.model = self.context.place(model)
        self.optimizers, self.rng = create_optimizers(model, args.optimizer), np.random.default_rng(0)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]['lr'] = 1e-4
        images = torch.rand(batch_size, 3, resolution, resolution, device=self.context.device) * 2 - 1
        self.images = images.contiguous(memory_format=torch.channels_last)

    def __call__(self) -> None:
        slots = self.model.slot_attention.initial_slots(len(self.images), self.args.num_slots)
        terms = loss_terms(self.model, self.images, slots, self.rng, self.args, progress=0.5)
        self.model.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        self.optimize()

    def optimize(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    @torch.no_grad()
    def network(self) -> None:
        self.model(self.images)


def seconds(calls: list[Callable], context: DistributedContext, repeats: int) -> list[float]:
    """Median time of each call; they take turns."""
    times = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, kept in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if context.device.type == 'cuda':
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--device', default='auto', choices=('auto', 'cpu', 'cuda'))
    parser.add_argument('--amp', default='auto', choices=('auto', 'on', 'off'))
    parser.add_argument('--repeats', type=int, default=12, help='measured calls per figure (default: 12)')
    args = parser.parse_args()
    try:
        on_gpu = DistributedContext.create(args.device).device.type == 'cuda'
        steps = [Step(*row, batch * (16 if on_gpu else 1), args.device, args.amp) for *row, batch in ROWS]
    except ConfigError as error:
        parser.error(str(error))
    print(f'{steps[0].context}, torch {torch.__version__}')
    print(f'{"":26}{"step":>9}{"optimiser":>13}{"images/s":>11}{"network":>11}')
    calls = [call for step in steps for call in (step, step.optimize, step.network)]
    times = seconds(calls, steps[0].context, args.repeats)
    for i, step in enumerate(steps):
        whole, optimizer, network = times[3 * i : 3 * i + 3]
        size = len(step.images)
        print(
            f'{step.name:26}{whole * 1e3:6.0f} ms{optimizer * 1e3:10.1f} ms{size / whole:11.1f}{size / network:11.1f}'
        )


if __name__ == '__main__':
    main()
