"""Runs that are stopped, killed or starved continue as if nothing had happened."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill import kill_again_and_again
from runs import ROOT, SMALL, assert_same_run, finished_run, run, scalars

import train
from slot_attention import load_checkpoint

fcntl = pytest.importorskip('fcntl')
LAST = Path('logs/checkpoints/last.pth')
ONE_THREAD = os.environ | {'OMP_NUM_THREADS': '1'}


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr(train, 'log_figures', lambda run: None)  # most of the time, and not what is tested here


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """The folder of a run of two epochs that is never stopped."""
    return finished_run(tmp_path_factory.mktemp('straight'), epochs=2)


def script(*flags, env=(), **kwargs) -> subprocess.CompletedProcess:
    command, env = [sys.executable, ROOT / 'train.py', *map(str, flags)], ONE_THREAD | dict(env)
    return subprocess.run(command, env=env, **dict(capture_output=True, text=True, timeout=600) | kwargs)


def progress(path=LAST) -> dict:
    return load_checkpoint(path)['training']['progress']


def run_and_stop(*flags, step: int, number=signal.SIGTERM, place='loss_terms', times: int = 1) -> int:
    """As run(), with a signal in the given step, counted from 1 (or the given validation: place='evaluate')."""
    original, calls = getattr(train, place), []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            for _ in range(times):
                signal.raise_signal(number)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, place, signalled)
        return run(*flags)


# Exact continuation


@pytest.mark.parametrize('architecture', ['fast', 'paper'])
def test_a_resumed_run_equals_one_that_never_stopped(architecture):
    small = SMALL if architecture == 'fast' else ' '.join(SMALL).replace(' --drops 1 --spare_slots 1', '').split()
    flags = [*small, '--architecture', architecture, '--flip', 1, '--epochs', 3]
    assert run(*flags, '--log_dir', 'straight') == 0
    assert run_and_stop(*flags, '--log_dir', 'stopped', step=9) == 128 + signal.SIGTERM
    assert run('--resume', 'stopped/checkpoints/last.pth') == 0
    assert_same_run('straight', 'stopped')


# An epoch has 6 steps: the first one, within and at the end of a window of the curves, the last one of the epoch.
@pytest.mark.parametrize(
    ('place', 'number'),
    [('loss_terms', 1), ('loss_terms', 3), ('loss_terms', 4), ('loss_terms', 6), ('loss_terms', 11), ('evaluate', 1)],
)
def test_a_run_stopped_anywhere_continues_there(capsys, straight, place, number):
    flags = [*SMALL, '--epochs', 2, '--log_dir', 'stopped']
    assert run_and_stop(*flags, step=number, place=place) == 128 + signal.SIGTERM
    step = number if place == 'loss_terms' else 6
    command = 'python train.py --resume stopped/checkpoints/last.pth'
    assert f'interrupted at step {step}; to continue: {command}' in capsys.readouterr().out
    last = Path('stopped/checkpoints/last.pth')
    saved = last.read_bytes()
    assert run('--resume', last) == 0
    assert_same_run(straight, 'stopped')
    last.write_bytes(saved)  # as if that had been killed before it saved: its points are in the curves
    assert run('--resume', last) == 0
    assert_same_run(straight, 'stopped')


def test_a_signal_in_the_last_step_changes_nothing(straight):
    assert run_and_stop(*SMALL, '--epochs', 2, step=12) == 0
    assert_same_run(straight, 'logs')


def test_a_second_signal_exits(monkeypatch):
    exits = []
    monkeypatch.setattr(os, '_exit', exits.append)
    run_and_stop(*SMALL, '--epochs', 2, step=2, number=signal.SIGINT, times=2)
    assert exits == [130]


def test_a_signal_that_is_ignored_stays_so():
    """nohup starts a program so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_and_stop(*SMALL, '--epochs', 1, step=2, number=signal.SIGHUP) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_during_the_imports_is_one_line():
    """A module that is imported first interrupts the script."""
    Path('argparse.py').write_text('import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n')
    process = script('--epochs', 1, env={'PYTHONPATH': str(Path.cwd())})
    assert (process.returncode, process.stderr) == (130, 'interrupted\n')


@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_says_how_to_continue(number, status):
    command = [sys.executable, str(ROOT / 'train.py'), *SMALL, '--epochs', '1000', '--val_every', '500']
    before = signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored, and a child inherits that
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
    signal.signal(number, before)
    for line in process.stdout:
        if line.startswith('follow it'):
            break
    if number == signal.SIGHUP:  # the terminal is gone
        process.stdout.close()
        process.stderr.close()
    while not [*Path('logs').glob('events*')]:
        process.send_signal(0)
    process.send_signal(number)
    if number == signal.SIGINT:
        out, err = process.communicate(timeout=600)
        assert 'to continue: python train.py --resume logs/checkpoints/last.pth' in out
        assert 'Traceback' not in err
    assert process.wait(timeout=600) == status
    assert 0 <= progress()['step'] < 3000


def test_killed_again_and_again_it_ends_the_same(tmp_path):
    assert kill_again_and_again(tmp_path, kills=2, images=1200, seed=0) >= 1


def test_the_flags_of_logging_travel_with_the_checkpoint():
    run(*SMALL, '--epochs', 1, '--save_every', 1, '--log_every', 3, '--save_minutes', 7)
    args = train.parse_args(['--resume', str(LAST)])
    assert (args.save_every, args.log_every, args.save_minutes, args.log_dir) == (1, 3, 7.0, Path('logs'))


# Checkpoints of other versions


def edit(path, change) -> None:
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


def test_a_checkpoint_outlives_the_code_that_wrote_it(capsys, straight):
    assert run_and_stop(*SMALL, '--epochs', 2, '--log_dir', 'old', step=9) == 143

    def of_another_version(checkpoint):
        training = checkpoint['training']
        del training['args']['clip'], training['progress']['seconds'], training['progress']['curves']['grad_norm']
        training['args']['no_such_name'] = 0.5
        training['progress']['epochs'] = 1
        training['progress']['curves']['no_such_name'] = [0.5]

    edit('old/checkpoints/last.pth', of_another_version)
    capsys.readouterr()
    assert run('--resume', 'old') == 0
    printed = capsys.readouterr().out
    for line in (
        'last.pth has no clip: the default is used',
        'last.pth has no seconds: the default is used',
        'last.pth has no_such_name, which this version does not know: ignored',
        'last.pth has epochs, which this version does not know: ignored',
    ):
        assert printed.count(line) == 1, line
    models = [load_checkpoint(Path(folder) / 'checkpoints/last.pth')['model'] for folder in ('old', straight)]
    assert all(torch.equal(models[0][name], value) for name, value in models[1].items())
    assert scalars('old', 'train/loss') == scalars(straight, 'train/loss')
    assert run('--eval', '--resume', 'old') == 0


def test_a_model_with_an_unknown_part_is_refused_by_its_name(capsys):
    run(*SMALL, '--epochs', 1)
    edit(LAST, lambda checkpoint: checkpoint['config'].update(no_such_name=0.5))
    for flags in (['--epochs', 2], ['--eval']):
        assert run('--resume', LAST, *flags) == 2
        error = capsys.readouterr().err
        assert 'no_such_name' in error and 'last.pth' in error and error.count('\n') == 1


def test_optimiser_state_of_another_model_is_refused(capsys):
    run(*SMALL, '--epochs', 1)
    edit(LAST, lambda checkpoint: checkpoint['training']['optimizers'].reverse())
    assert run('--resume', LAST, '--epochs', 2) == 2
    error = capsys.readouterr().err
    assert 'last.pth is damaged or of another version' in error and error.count('\n') == 1


def test_the_best_model_is_named_only_where_there_is_one(capsys):
    assert run(*SMALL, '--epochs', 1, '--log_dir', 'one') == 0
    assert 'best validation FG-ARI' in capsys.readouterr().out
    edit('one/checkpoints/last.pth', lambda c: c['training']['progress'].update(best=[2.0, 0.0]))
    assert run('--resume', 'one', '--epochs', 2, '--log_dir', 'more') == 0
    assert 'best validation' not in capsys.readouterr().out


# --resume auto


def test_auto_starts_continues_and_ends_well(capsys):
    assert run(*SMALL, '--epochs', 1, '--resume', 'auto') == 0
    assert 'no checkpoint in logs/checkpoints to continue: starting a new run' in capsys.readouterr().out
    assert run(*SMALL, '--epochs', 2, '--resume', 'auto') == 0
    printed = capsys.readouterr().out
    assert 'continuing logs/checkpoints/last.pth at step 6' in printed and not Path('logs/run_1').exists()
    assert run(*SMALL, '--resume', 'auto') == 0
    assert 'nothing left to do' in capsys.readouterr().out


def test_auto_continues_from_the_most_steps_whatever_the_dates(capsys):
    run(*SMALL, '--epochs', 2, '--save_every', 1)
    os.utime('logs/checkpoints/checkpoint_epoch_1.pth')  # as `cp -r` may leave it
    shutil.copytree('logs', 'logs/run_1')  # an earlier run with as many steps is not looked at
    LAST.unlink()
    capsys.readouterr()
    assert run('--resume', 'auto', '--epochs', 3) == 0
    assert 'checkpoint_epoch_2.pth at step 12' in capsys.readouterr().out


class Malicious:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def test_auto_falls_back_to_an_older_checkpoint_and_runs_no_code(capsys):
    run(*SMALL, '--epochs', 2, '--save_every', 1)
    older = LAST.with_name('checkpoint_epoch_1.pth')
    for path in LAST.parent.iterdir():
        if path != older:
            path.write_bytes(path.read_bytes()[:20_000])
    torch.save({'config': {}, 'model': Malicious()}, LAST)
    capsys.readouterr()
    assert run('--resume', 'auto', '--epochs', 3) == 0
    captured = capsys.readouterr()
    assert captured.err.count('.pth') == captured.err.count('\n') == 3  # each is named
    assert 'checkpoint_epoch_1.pth at step 6' in captured.out and not Path('executed').exists()
    assert progress()['step'] == 18


def test_where_every_checkpoint_is_damaged_auto_begins_anew_and_deletes_nothing(capsys):
    run(*SMALL, '--epochs', 1)
    for path in LAST.parent.iterdir():
        path.write_bytes(b'not a checkpoint')
    assert run(*SMALL, '--epochs', 1, '--resume', 'auto') == 0
    assert 'last.pth' in capsys.readouterr().err
    assert Path('logs/run_1/checkpoints/last.pth').read_bytes() == b'not a checkpoint'


# What stands in the way


def test_a_full_disk_ends_the_run_with_a_message():
    """A limit on the size of files is what can be had without rights: writing then fails in the middle."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    done = script(*SMALL, '--epochs', 3, preexec_fn=limit)
    assert done.returncode == 1  # the end of the run is lost
    assert 'cannot write logs/checkpoints/last.pth (File too large); training continues without it' in done.stderr
    assert 'stopped ([Errno 27] File too large) at step' in done.stdout and 'Traceback' not in done.stderr
    assert os.listdir('logs/checkpoints') == []  # nothing half written


def test_a_disk_that_is_full_for_the_curves_ends_the_run_and_the_next_one_mends_them(monkeypatch, straight, capsys):
    add_scalar = train.SummaryWriter.add_scalar

    def failing(self, tag, value, step):
        if step > 7:
            raise OSError(28, 'No space left on device')
        add_scalar(self, tag, value, step)

    with monkeypatch.context() as patch:
        patch.setattr(train.SummaryWriter, 'add_scalar', failing)
        assert run(*SMALL, '--epochs', 2) == 1
    printed = capsys.readouterr().out
    assert 'stopped ([Errno 28] No space left on device) at step 8; to continue:' in printed
    assert progress()['step'] == 6  # no checkpoint is ahead of the curves
    assert run('--resume', 'auto') == 0
    assert_same_run(straight, 'logs')


def test_saving_that_fails_leaves_the_last_good_one_and_the_next_is_tried(monkeypatch, capsys):
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
    assert progress()['step'] == 24


def test_a_second_run_into_the_same_folder_is_refused(capsys):
    run(*SMALL, '--epochs', 1)
    before = sorted(Path('logs').rglob('*'))
    with open('logs/.lock') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for flags in ([*SMALL, '--epochs', 1], ['--resume', LAST, '--epochs', 2]):
            assert run(*flags) == 2
            assert 'another run is writing to logs; choose another --log_dir' in capsys.readouterr().err
    assert sorted(Path('logs').rglob('*')) == before
    assert run('--resume', LAST, '--epochs', 2) == 0


def test_a_folder_that_cannot_be_locked_is_trained_in_with_a_warning(monkeypatch, capsys):
    def unsupported(*args):
        raise OSError(38, 'Function not implemented')

    monkeypatch.setattr(fcntl, 'flock', unsupported)
    assert run(*SMALL, '--epochs', 1) == 0
    error = capsys.readouterr().err
    assert 'warning: logs cannot be locked (Function not implemented)' in error and error.count('\n') == 1


def test_printing_never_ends_a_run():
    """Neither a full disk nor a name that the terminal cannot show."""
    ascii_only = {'PYTHONIOENCODING': 'ascii'}
    with open('/dev/full', 'w') as full:
        streams = dict(capture_output=False, stdout=full, stderr=full)
        done = script(*SMALL, '--epochs', 1, '--log_dir', 'Läufe', env=ascii_only, **streams)
    assert done.returncode == 0 and progress('Läufe/checkpoints/last.pth')['step'] == 6


def test_a_log_dir_that_tensorboard_cannot_open_is_refused_in_one_line(capsys):
    assert run(*SMALL, '--epochs', 1, '--log_dir', os.fsdecode(b'caf\xe9')) == 2
    error = capsys.readouterr().err
    assert 'TensorBoard needs a name in UTF-8' in error and error.count('\n') == 1 and os.listdir() == []
