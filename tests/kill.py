"""Kills a run at random moments, again and again, and compares its result with that of an undisturbed run.

    python tests/kill.py                    # 20 kills, some minutes

Run by hand; the tests use a shorter form.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runs import ROOT, SMALL, assert_same_run

from slot_attention import CheckpointError, load_checkpoint


def kill_again_and_again(folder: Path, kills: int, images: int, seed: int) -> int:
    """Start `train.py --resume auto`, send SIGKILL, and again; then let it end.

    Raises AssertionError unless that comes to the same as an undisturbed run, to the bit. Returns how
    many of the kills found the run further on than the one before.
    """
    rng = random.Random(seed)
    flags = [*SMALL, '--train_size', str(images), '--epochs', '2', '--val_every', '2']
    flags += ['--save_minutes', '0.003', '--resume', 'auto']
    environment = os.environ | {'OMP_NUM_THREADS': '1'}

    def start(log_dir: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / 'train.py'), *flags, '--log_dir', log_dir]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)

    def wait_for_saving(process: subprocess.Popen, log_dir: str) -> None:
        path = folder / log_dir / 'checkpoints/last.pth'
        before = path.stat().st_mtime_ns if path.exists() else 0
        while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.01)

    begun = time.monotonic()
    straight = start('straight')
    wait_for_saving(straight, 'straight')
    starting = time.monotonic() - begun
    assert straight.wait() == 0
    training = time.monotonic() - begun - starting
    steps = []
    for n in range(kills):
        process = start('killed')
        if rng.random() < 0.2:  # while it starts, or reads its checkpoint
            time.sleep(rng.uniform(0, starting))
        else:  # while it trains: about half of the run in all, should it be faster now
            wait_for_saving(process, 'killed')
            time.sleep(rng.uniform(0, training / kills))
        process.kill()
        if process.wait() == 0:
            print(f'the run came to its end after {n} kills: more --images leave time for all')
            break
        try:
            steps.append(load_checkpoint(folder / 'killed/checkpoints/last.pth')['training']['progress']['step'])
        except CheckpointError:  # none was written yet
            steps.append(0)
        print(f'kill {n + 1}: the checkpoint is of step {steps[-1]}', flush=True)
    assert start('killed').wait() == 0
    assert_same_run(folder / 'straight', folder / 'killed')
    return sum(b > a for a, b in zip([0, *steps], steps, strict=False))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--images', type=int, default=24_000, help='to train on, twice (default: 24000)')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        further = kill_again_and_again(Path(folder), args.kills, args.images, args.seed)
    print(f'{further} kills after progress: the same weights, optimiser state and curves')
