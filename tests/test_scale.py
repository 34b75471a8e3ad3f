"""Two processes come to what one comes to, and a process that dies costs nothing but time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from runs import ROOT, SMALL, assert_same_run, run, scalars

from dataset import DataError, create_dataloader
from slot_attention import load_checkpoint

# A step an epoch, and a checkpoint of each. With --clip 0 Adam's first mean is a tenth of the gradient. KeepHead learns
# from other images for each number of processes.
FLAGS = [*SMALL, *'--save_minutes 0 --log_every 1 --val_every 4 --epochs 12 --save_every 1 --amp off'.split()]
FLAGS += '--val_size 17 --flip 1 --optimizer adam --clip 0 --keep_weight 0 --drop_share 0 --train_size 8'.split()


def torchrun(folder: Path, *flags, restarts: int = 0) -> subprocess.Popen:
    command = f'-m torch.distributed.run --standalone --nproc_per_node 2 --max_restarts {restarts} {ROOT / "train.py"}'
    return subprocess.Popen(
        [sys.executable, *command.split(), *map(str, flags)], cwd=folder, env=os.environ | {'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp('one')
    assert run(*FLAGS, '--log_dir', folder) == 0
    return folder


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    process = torchrun(folder, *FLAGS)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.count('step     12') == 1  # only the first process speaks
    return folder / 'logs'


def test_gradients_of_two_processes_are_those_of_one(one, two):
    states = [
        load_checkpoint(folder / 'checkpoints/checkpoint_epoch_1.pth')['training']['optimizers'][0]
        for folder in (one, two)
    ]
    assert states[0].keys() == states[1].keys()
    for a, b in zip(states[0].values(), states[1].values(), strict=True):
        scale = a['exp_avg'].abs().max().item()
        torch.testing.assert_close(b['exp_avg'], a['exp_avg'], rtol=1e-4, atol=1e-5 * scale + 1e-12)


def test_losses_and_scores_of_two_processes_are_those_of_one(one, two):
    for tag in ('train/loss', 'train/mse', 'train/grad_norm', 'val/mse', 'val/fg_ari', 'val/consistency'):
        first = [{step: value for step, value in scalars(run, tag).items() if step < 5} for run in (one, two)]
        assert first[0] == pytest.approx(first[1], rel=1e-3, abs=1e-4), tag


def test_after_the_death_of_a_process_torchrun_continues_from_the_last_checkpoint(tmp_path, two):
    process = torchrun(tmp_path, *FLAGS, '--resume', 'auto', restarts=1)
    while not (tmp_path / 'logs/checkpoints/last.pth').exists() and process.poll() is None:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    next(child for child in children if child.environ().get('RANK') == '1').kill()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and 'exitcode: -9' in err, err
    assert out.count('continuing logs/checkpoints/last.pth at step') == 1 and out.count('step     12') == 1
    assert_same_run(two, tmp_path / 'logs')


def test_a_signal_to_two_processes_saves_once(tmp_path):
    process = torchrun(tmp_path, *FLAGS, '--epochs', '1000')
    for line in process.stdout:
        if line.startswith('step      4'):
            break
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=600)
    assert out.count('to continue: python train.py --resume logs/checkpoints/last.pth') == 1
    assert 4 <= load_checkpoint(tmp_path / 'logs/checkpoints/last.pth')['training']['progress']['step'] < 1000


def test_a_batch_is_dealt_out_whole_and_none_twice():
    whole = create_dataloader(train_size=24, val_size=17, batch_size=8, resolution=16)
    parts = [
        create_dataloader(train_size=24, val_size=17, batch_size=8, resolution=16, rank=rank, world_size=2)
        for rank in range(2)
    ]
    for batch, *shards in zip(whole[0], parts[0][0], parts[1][0], strict=True):
        for rank, shard in enumerate(shards):
            assert torch.equal(shard['image'], batch['image'][rank::2])
    images = [torch.cat([batch['image'] for batch in loaders[1]]) for loaders in (whole, *parts)]
    assert [len(each) for each in images] == [17, 9, 8]
    for rank in range(2):
        assert torch.equal(images[1 + rank], images[0][rank::2])


def test_a_batch_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(DataError, match=r'batch_size \(9\) must be a multiple of the 2 processes'):
        create_dataloader(train_size=16, val_size=2, batch_size=9, resolution=16, world_size=2)
