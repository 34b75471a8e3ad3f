"""Runs that are stopped, killed or starved go on as if nothing had happened."""

import math
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from kill import kill_again_and_again
from runs import ROOT, SMALL, assert_same_run, run, same, scalars

import train
from slot_attention import CHECKPOINT_FORMAT, ModelConfig, SlotAttentionAutoEncoder, load_checkpoint

LAST = Path('logs/checkpoints/last.pth')


def all_of_the_loss_from_the_start(monkeypatch):
    """Else it would depend on the planned length of a run, which tests change."""
    monkeypatch.setattr(train, 'HEADS_FROM', 0)
    monkeypatch.setattr(train, 'MIXTURE_FROM', (-1, 0))


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr(threading, 'excepthook', threading.excepthook)  # restored after each test
    monkeypatch.setattr(train, 'log_figures', lambda *args: None)  # most of the time, and not what is tested here
    all_of_the_loss_from_the_start(monkeypatch)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """The folder of a run of two epochs that is never stopped."""
    folder = tmp_path_factory.mktemp('straight')
    with pytest.MonkeyPatch.context() as patch:
        all_of_the_loss_from_the_start(patch)
        assert run(*SMALL, '--epochs', 2, '--log_dir', folder) == 0
    return folder


def script(*flags, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / 'train.py', *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


# Exact continuation


@pytest.mark.parametrize('architecture', ['fast', 'paper'])
def test_a_resumed_run_equals_one_that_never_stopped(architecture):
    flags = [*SMALL, '--architecture', architecture, '--flip', 1, '--cooldown', 0]
    if architecture == 'paper':
        flags += ['--moves', 0, '--drops', 0]
    run(*flags, '--epochs', 3, '--log_dir', 'straight')
    run(*flags, '--epochs', 1, '--log_dir', 'stopped')
    assert run('--epochs', 3, '--resume', 'stopped/checkpoints/last.pth', '--log_every', 2) == 0
    assert_same_run('straight', 'stopped')


def test_the_files_of_a_run_that_resumes_at_once_are_read_in_the_order_of_their_creation():
    names = []
    for step in range(3):  # without a pause all three can have the same second in their names
        log = train.Log(Path('logs'), step, train.DistributedContext(torch.device('cpu'), False))
        log.close()
        (new,) = {path.name for path in Path('logs').iterdir()} - {*names}
        names.append(new)
    assert len({name.split('.')[3] for name in names}) == 3 and names == sorted(names)


def stop_at(look):
    """A Stop that finds SIGTERM at its n-th look: one a step, and one for every batch of the validation."""

    class StopAt(train.Stop):
        def __init__(self):
            self.looks = 0

        @property
        def signal(self):
            self.looks += 1
            return signal.SIGTERM if self.looks >= look else None

    return StopAt


# An epoch has 6 steps and 2 batches of validation: the first step, within the window of a point of the curves
# and at its end, the last step, the validation, the second epoch.
@pytest.mark.parametrize('look', [1, 3, 4, 6, 7, 11])
def test_a_run_stopped_anywhere_continues_there(monkeypatch, capsys, straight, look):
    with monkeypatch.context() as patch:
        patch.setattr(train, 'Stop', stop_at(look))
        assert run(*SMALL, '--epochs', 2, '--log_dir', 'stopped') == 128 + signal.SIGTERM
    assert 'python train.py --resume stopped/checkpoints/last.pth' in capsys.readouterr().out
    last = Path('stopped/checkpoints/last.pth')
    saved = last.read_bytes()
    assert run('--resume', last, '--log_every', 2) == 0
    assert_same_run(straight, 'stopped')
    last.write_bytes(saved)  # as if that had been killed before it saved: its points are in the curves
    assert run('--resume', last, '--log_every', 2) == 0
    assert_same_run(straight, 'stopped')


@pytest.mark.parametrize('look', [2, 3, 4, 5])  # the step before a validation within the epoch, in it, and after it
def test_a_run_stopped_at_a_validation_within_an_epoch_continues_there(monkeypatch, look):
    monkeypatch.setattr(train, 'VAL_STEPS', 1)
    flags = [*SMALL, '--val_every', 0, '--epochs', 2]
    assert run(*flags, '--log_dir', 'straight') == 0
    assert list(scalars('straight', 'val/mse')) == list(range(2, 13, 2))
    with monkeypatch.context() as patch:
        patch.setattr(train, 'Stop', stop_at(look))
        assert run(*flags, '--log_dir', 'stopped') == 128 + signal.SIGTERM
    assert run('--resume', 'stopped', '--log_every', 2, '--val_every', 0) == 0
    assert_same_run('straight', 'stopped')


def test_ctrl_c_during_the_imports_is_one_line():
    """A module that is imported first interrupts the script."""
    Path('argparse.py').write_text('import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n')
    process = script('--epochs', 1, env=os.environ | {'PYTHONPATH': str(Path.cwd())})
    assert (process.returncode, process.stderr) == (130, 'interrupted\n')


@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number, status):
    command = [sys.executable, str(ROOT / 'train.py'), *SMALL, '--epochs', '1000']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('epoch   1'):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert 'to continue: python train.py --resume logs/checkpoints/last.pth' in out
    assert 'Traceback' not in err
    assert load_checkpoint(LAST)['training']['progress']['step'] >= 6


def test_a_second_signal_exits_at_once(monkeypatch):
    exits, stop = [], train.Stop()
    monkeypatch.setattr(os, '_exit', exits.append)
    stop.handle(signal.SIGTERM, None)
    assert stop.signal == signal.SIGTERM and exits == []
    stop.handle(signal.SIGINT, None)
    assert exits == [130]


def test_killed_again_and_again_it_ends_the_same(tmp_path):
    assert kill_again_and_again(tmp_path, kills=2, images=2400, seed=0) >= 1


def test_the_batch_size_may_change_on_the_way(monkeypatch, capsys):
    monkeypatch.setattr(train.Stop, 'signal', None, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'Stop', stop_at(9))  # 6 steps, 2 batches of validation, and 1 step of the second epoch
        assert run(*SMALL, '--epochs', 3) == 143
    assert run('--resume', LAST, '--batch_size', 4, '--log_every', 1) == 0
    assert 'batch_size: 8 in the checkpoint, 4 from now on' in capsys.readouterr().out
    assert load_checkpoint(LAST)['training']['progress']['step'] == 7 + 10 + 12  # 40 images of 48 were left
    rates = scalars('logs', 'train/lr')
    assert min(rates.values()) > 0 and rates[29] == min(rates[step] for step in range(8, 30))


def test_the_flags_of_logging_travel_with_the_checkpoint():
    run(*SMALL, '--epochs', 1, '--save_every', 1, '--log_every', 3, '--save_minutes', 7)
    args = train.parse_args(['--resume', str(LAST)])
    assert (args.save_every, args.log_every, args.save_minutes, args.log_dir) == (1, 3, 7.0, Path('logs'))


def test_the_best_model_is_named_only_where_there_is_one(monkeypatch, capsys):
    scores = iter([0.9, 0.1])
    monkeypatch.setattr(train, 'evaluate', lambda *a, **k: {'network': {'fg_ari': next(scores), 'mse': 0.1}})
    assert run(*SMALL, '--epochs', 1, '--log_dir', 'one') == 0
    assert 'best validation FG-ARI 0.9000: one/checkpoints/best_model.pth' in capsys.readouterr().out
    assert run('--resume', 'one', '--epochs', 2, '--log_dir', 'more') == 0
    assert 'best validation' not in capsys.readouterr().out


# --resume auto


def test_auto_starts_goes_on_and_ends_well(capsys):
    assert run(*SMALL, '--epochs', 1, '--resume', 'auto') == 0
    assert 'a new run' in capsys.readouterr().out
    assert run(*SMALL, '--epochs', 2, '--resume', 'auto') == 0
    printed = capsys.readouterr().out
    assert 'epoch   2' in printed and 'epoch   1' not in printed and not Path('logs/run_1').exists()
    assert run(*SMALL, '--resume', 'auto') == 0
    assert 'nothing left to do' in capsys.readouterr().out
    assert run('--eval', '--resume', 'auto') == 0
    assert 'FG-ARI' in capsys.readouterr().out


class Malicious:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def test_auto_falls_back_to_an_older_checkpoint_and_runs_no_code(capsys):
    run(*SMALL, '--epochs', 2, '--save_every', 1)
    whole = LAST.read_bytes()
    older = LAST.with_name('checkpoint_epoch_1.pth')
    for path in LAST.parent.iterdir():
        if path != older:
            path.write_bytes(whole[: len(whole) // 2])
    torch.save({'format': CHECKPOINT_FORMAT, 'model': Malicious()}, LAST)
    capsys.readouterr()
    assert run('--resume', 'auto', '--epochs', 3) == 0
    captured = capsys.readouterr()
    assert captured.err.count('damaged or of another version') == 3 and 'trying an older one' in captured.err
    assert 'epoch   2' in captured.out and not Path('executed').exists()
    assert load_checkpoint(LAST)['training']['progress']['epochs'] == 3


def test_where_every_checkpoint_is_damaged_auto_begins_anew_and_deletes_nothing(capsys):
    run(*SMALL, '--epochs', 1)
    for path in LAST.parent.iterdir():
        path.write_bytes(b'not a checkpoint')
    assert run(*SMALL, '--epochs', 1, '--resume', 'auto') == 0
    assert 'trying an older one' in capsys.readouterr().err
    assert Path('logs/run_1/checkpoints/last.pth').read_bytes() == b'not a checkpoint'


# What stands in the way


def test_a_full_disk_is_reported_and_the_run_goes_on():
    """A limit on the size of files is what can be had without rights: writing then fails in the middle."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    done = script(*SMALL, '--epochs', 3, preexec_fn=limit)
    assert done.returncode == 1  # the end of the run is lost
    assert 'cannot write logs/checkpoints/last.pth (File too large); training continues without it' in done.stderr
    assert 'cannot write TensorBoard files (File too large)' in done.stderr and 'Traceback' not in done.stderr
    assert 'epoch   3' in done.stdout
    assert os.listdir('logs/checkpoints') == []  # nothing half written


def test_a_saving_that_fails_leaves_the_last_good_one_and_the_next_is_tried(monkeypatch, capsys):
    saving, calls = train.save_checkpoint, []

    def failing(path, *args, **kwargs):
        calls.append(path.name)
        if 2 < len(calls) < 5:
            raise OSError(28, 'No space left on device')
        saving(path, *args, **kwargs)

    monkeypatch.setattr(train, 'save_checkpoint', failing)
    assert run(*SMALL, '--epochs', 4) == 0
    assert calls.count('last.pth') == 4
    assert 'No space left on device' in capsys.readouterr().err
    assert load_checkpoint(LAST)['training']['progress']['epochs'] == 4


def test_a_second_run_into_the_same_folder_is_refused(capsys):
    run(*SMALL, '--epochs', 1)
    before = sorted(Path('logs').rglob('*'))
    with train.open_log_dir(Path('logs'), LAST):
        assert run(*SMALL, '--epochs', 1) == 2
        assert 'another run is writing to logs; choose another --log_dir' in capsys.readouterr().err
        assert run('--resume', LAST, '--epochs', 2) == 2
    assert sorted(Path('logs').rglob('*')) == before
    assert run('--resume', LAST, '--epochs', 2) == 0


# Steps that are not finite


@pytest.mark.parametrize('name', ['adam', 'muon'])
def test_a_step_without_finite_gradient_changes_nothing(name):
    model = SlotAttentionAutoEncoder(ModelConfig(resolution=16, hidden_dim=8, slot_dim=16))
    optimizers = train.create_optimizers(model, name)

    def step(skip, gradient):
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient) + torch.randn_like(p)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = 0.01
            optimizer.found_inf = torch.tensor(float(skip))
            optimizer.step()
        states = [optimizer.state_dict()['state'] for optimizer in optimizers]
        return [p.detach().clone() for p in model.parameters()], torch.utils._pytree.tree_map(torch.clone, states)

    before, after, later = step(False, 0.1), step(True, math.nan), step(False, 0.1)
    assert all(map(same, before, after))
    assert not any(map(torch.equal, after[0], later[0]))


def poison(monkeypatch, bad):
    """The loss is NaN in the steps given, counted from 1."""
    mse, calls = train.F.mse_loss, []

    def poisoned(*args, **kwargs):
        calls.append(1)
        return mse(*args, **kwargs) * (math.nan if len(calls) in bad else 1)

    monkeypatch.setattr(train.F, 'mse_loss', poisoned)


def test_steps_that_are_not_finite_are_skipped_and_counted(monkeypatch):
    poison(monkeypatch, {3, 4, 8})
    assert run(*SMALL, '--epochs', 2) == 0
    assert scalars('logs', 'train/skipped_steps')[12] == 3
    assert list(scalars('logs', 'train/loss')) == [2, 6, 8, 10, 12]  # none of steps 3 and 4
    progress = load_checkpoint(LAST)['training']['progress']
    assert progress['skipped'] == 3 and progress['step'] == 12
    assert all(value.isfinite().all() for value in load_checkpoint(LAST)['model'].values())


def test_many_in_a_row_end_the_run_and_name_the_step(monkeypatch, capsys):
    run(*SMALL, '--epochs', 1)
    poison(monkeypatch, range(3, 100))
    assert run('--resume', LAST, '--epochs', 9) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert 'at step 18 the loss is nan, the gradient norm nan, the learning rate 2.0e-03' in error
    assert load_checkpoint(LAST)['training']['progress']['step'] == 12  # the end of the epoch before
