"""Two processes come to what one comes to, and a process that dies costs nothing but time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, SMALL, assert_same_run, run, scalars

import train
from dataset import DataError, create_dataloader
from slot_attention import load_checkpoint

# A step an epoch, and a checkpoint of each. With --clip 0 Adam's first mean is a tenth of the gradient.
FLAGS = [*SMALL, *'--train_size 8 --epochs 4 --save_every 1 --save_minutes 0 --log_every 1'.split()]
# Heads of reallocation learn from other images for each number of processes.
# In bfloat16, which is the default where it is fast, rounding alone would make the runs differ by a percent.
FLAGS += '--val_size 17 --flip 1 --optimizer adam --clip 0 --amp off --moves 0 --drops 0'.split()

# train.py without its figures, which take most of the time; process 1 dies where `dies_at` says.
SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train

prepare_batch, dies_at = train.prepare_batch, {dies_at}

def dying(run, batch):
    if (run.progress.step, os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT']) == (dies_at, '1', '0'):
        os.kill(os.getpid(), signal.SIGKILL)
    return prepare_batch(run, batch)

train.prepare_batch = dying
train.log_figures = lambda *args: None
sys.exit(train.main(train.parse_args()))
"""


def torchrun(folder: Path, *flags, dies_at: int = -1, restarts: int = 0) -> subprocess.CompletedProcess:
    (folder / 'script.py').write_text(SCRIPT.format(root=str(ROOT), dies_at=dies_at))
    command = f'-m torch.distributed.run --standalone --nproc_per_node 2 --max_restarts {restarts} script.py'
    return subprocess.run(
        [sys.executable, *command.split(), *map(str, flags)],
        cwd=folder, env=os.environ | {'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    process = torchrun(folder, *FLAGS)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count('epoch   4') == 1  # only the first process speaks
    return folder / 'logs'


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp('one')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'log_figures', lambda *args: None)
        assert run(*FLAGS, '--log_dir', folder) == 0
    return folder


def test_gradients_of_two_processes_are_those_of_one(one, two):
    states = [
        load_checkpoint(folder / 'checkpoints/checkpoint_epoch_1.pth')['training']['optimizers'][0]
        for folder in (one, two)
    ]
    assert states[0].keys() == states[1].keys()
    for a, b in zip(states[0].values(), states[1].values(), strict=True):
        scale = a['exp_avg'].abs().max().item()
        assert scale > 0
        torch.testing.assert_close(b['exp_avg'], a['exp_avg'], rtol=1e-4, atol=1e-5 * scale)


def test_losses_and_scores_of_two_processes_are_those_of_one(one, two):
    for tag in ('train/loss', 'train/grad_norm', 'val/mse', 'val/fg_ari', 'val/consistency', 'slots/mask_entropy'):
        assert scalars(two, tag) == pytest.approx(scalars(one, tag), rel=1e-3, abs=1e-4), tag


def test_after_the_death_of_a_process_torchrun_goes_on_from_the_last_checkpoint(tmp_path, two):
    process = torchrun(tmp_path, *FLAGS, '--resume', 'auto', dies_at=2, restarts=1)
    assert process.returncode == 0, process.stderr
    assert 'exitcode: -9' in process.stderr
    assert process.stdout.count('epoch   1') == 1 and process.stdout.count('epoch   4') == 1
    assert_same_run(two, tmp_path / 'logs')


def test_a_signal_to_two_processes_saves_once_and_goes_on(tmp_path, two):
    (tmp_path / 'script.py').write_text(SCRIPT.format(root=str(ROOT), dies_at=-1))
    command = [sys.executable, *'-m torch.distributed.run --standalone --nproc_per_node 2 script.py'.split()]
    process = subprocess.Popen(
        [*command, *FLAGS, '--epochs', '1000'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=os.environ | {'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith('epoch   1'):
            break
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert out.count('to continue: python train.py --resume logs/checkpoints/last.pth') == 1
    assert load_checkpoint(tmp_path / 'logs/checkpoints/last.pth')['training']['progress']['step'] >= 1


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
