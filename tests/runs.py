"""Small runs of train.py in the current folder, and comparisons of what they write."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from slot_attention import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    '--resolution 16 --hidden_dim 8 --slot_dim 16 --num_slots 3 --max_objects 2 --min_objects 1 --train_size 48 '
    '--val_size 16 --batch_size 8 --log_every 2 --val_every 1 --warmup_steps 4 --device cpu '
    '--num_iterations 2 --drops 1 --spare_slots 1'
).split()


def run(*flags) -> int:
    """The exit status of train.py with these flags."""
    try:
        return train.main(train.parse_args([str(flag) for flag in flags]))
    except SystemExit as exit:
        return exit.code


def finished_run(folder: Path, epochs: int) -> Path:
    """The folder, with a run in it that has ended; without figures, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'log_figures', lambda run: None)
        assert run(*SMALL, '--epochs', epochs, '--log_dir', folder) == 0
    return folder


def scalars(folder, tag) -> dict[int, float]:
    events = EventAccumulator(str(folder), size_guidance={'scalars': 0}).Reload()
    points = events.Scalars(tag)
    assert len({point.step for point in points}) == len(points)  # none twice
    return {point.step: point.value for point in points}


def same(a, b) -> bool:
    """Whether two values of a checkpoint are the same, tensors to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(a, b) -> None:
    """Asserts that two runs have the same weights, optimiser state, progress and training curves."""
    first, second = (load_checkpoint(Path(folder) / 'checkpoints/last.pth') for folder in (a, b))
    assert same(first['model'], second['model'])
    assert same(first['training']['optimizers'], second['training']['optimizers'])
    for progress in (checkpoint['training']['progress'] for checkpoint in (first, second)):
        del progress['seconds']
        progress['curves'].pop('seconds', None)
    assert first['training']['progress'] == second['training']['progress']
    for tag in ('train/loss', 'train/grad_norm', 'train/lr', 'val/mse', 'val/fg_ari'):
        assert scalars(a, tag) == scalars(b, tag), tag
