"""Runs of train.py: they learn, log, score, and refuse what makes no sense."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, SMALL, finished_run, run, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dataset
import train
from slot_attention import (
    DIAGNOSES,
    ModelConfig,
    create_model,
    diagnose,
    load_checkpoint,
    mask_statistics,
    save_checkpoint,
)

LAST = Path('logs/checkpoints/last.pth')


@pytest.fixture
def without_figures(monkeypatch):
    """They take most of the time of a small run."""
    monkeypatch.setattr(train, 'log_figures', lambda run: None)


# Optimisation


def rates(total_steps, **changes):
    args = train.parse_args(['--lr', '1e-3', '--warmup_steps', '10', '--cooldown', '0', '--decay_steps', '0'])
    vars(args).update(changes)
    return [train.learning_rate(args, step, total_steps) for step in range(total_steps)]


def test_learning_rate_warms_up_halves_and_cools_down():
    assert rates(20)[0] == pytest.approx(1e-4) and rates(20)[9:] == [1e-3] * 11
    halving = rates(301, decay_steps=100)
    assert halving[4] == pytest.approx(5e-4 * 0.5**0.04)
    assert halving[100] == pytest.approx(5e-4) and halving[300] == pytest.approx(1.25e-4)
    cooling = rates(200, cooldown=0.25)
    assert cooling[9:151] == [1e-3] * 142
    assert cooling[175] == pytest.approx(5e-4) and cooling[199] == pytest.approx(2e-5)
    assert rates(3, warmup_steps=0) == [1e-3] * 3


@pytest.mark.parametrize('shape', [(8, 30), (30, 8), (16, 16)])
def test_an_orthogonalised_matrix_has_like_singular_values_and_the_same_directions(shape):
    matrix = torch.randn(shape) * torch.linspace(0.1, 3, shape[1])
    u, singular, v = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.mT @ train.orthogonalise(matrix) @ v.mT  # diagonal: Newton-Schulz changes the singular values alone
    values = rotated.diagonal()
    assert (rotated - torch.diag(values)).abs().max() < 1e-3
    large = singular > 0.05 * matrix.norm()  # singular values near zero need more steps than five
    assert values[large].min() > 0.5 and values[large].max() < 1.25


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch before 2.9 has no Muon')
def test_muon_takes_the_steps_of_torch():
    ours, theirs = (torch.nn.Parameter(torch.randn(8, 24, generator=torch.Generator().manual_seed(0))) for _ in 'ab')
    start = ours.detach().clone()
    muon = train.Muon([ours], lr=0.01)
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.0, adjust_lr_fn='match_rms_adamw')
    for step in range(3):
        ours.grad = torch.randn(8, 24, generator=torch.Generator().manual_seed(step + 1))
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    assert (ours - start).abs().max() > 0.005
    assert (ours - theirs).norm() < 0.03 * (ours - start).norm()  # theirs is in bfloat16


def test_muon_takes_the_matrices_and_adam_the_rest():
    model = create_model(ModelConfig(resolution=16, hidden_dim=8, slot_dim=16))
    adam, muon = train.create_optimizers(model, 'muon')
    names = {p: name for name, p in model.named_parameters()}
    of_muon = {names[p] for p in muon.param_groups[0]['params']}
    assert {'encoder.conv.6.weight', 'slot_attention.project_q.weight', 'decoder.hyper.0.weight'} <= of_muon
    assert all(name.endswith(('weight', 'weight_ih', 'weight_hh')) for name in of_muon)
    assert len(of_muon) + len(adam.param_groups[0]['params']) == len(names)
    assert len(train.create_optimizers(model, 'adam')) == 1


@pytest.mark.parametrize('optimizer', ['adam', 'muon'])
def test_parameters_without_a_gradient_are_left_as_they_are(monkeypatch, without_figures, optimizer):
    """A frozen encoder, and a loss that a part of the model does not have in the first steps."""
    terms, create, steps = train.loss_terms, train.create_model, []

    def frozen(config):
        model = create(config)
        model.encoder.requires_grad_(False)
        return model

    def at_first_without_keep(*args):
        steps.append(1)
        return {name: term for name, term in terms(*args).items() if name != 'keep' or len(steps) > 3}

    monkeypatch.setattr(train, 'create_model', frozen)
    monkeypatch.setattr(train, 'loss_terms', at_first_without_keep)
    assert run(*SMALL, '--epochs', 2, '--optimizer', optimizer, '--log_every', 3) == 0
    torch.manual_seed(0)
    before = create(load_checkpoint(LAST)['config']).state_dict()
    after = load_checkpoint(LAST)['model']
    for name, value in before.items():
        assert torch.equal(after[name], value) == name.startswith('encoder'), name
    assert list(scalars('logs', 'train/keep')) == [6, 9, 12]
    monkeypatch.setattr(train, 'loss_terms', terms)
    assert run('--resume', 'logs', '--epochs', 3) == 0


@pytest.mark.parametrize('architecture', ['fast', 'paper'])
def test_the_loss_reaches_every_parameter_in_bfloat16(architecture):
    flags = '--resolution 16 --num_slots 3 --slot_dim 16 --hidden_dim 8 --num_iterations 2'.split()
    args = train.parse_args(['--architecture', architecture, *flags])
    context = train.DistributedContext.create('cpu', 'on')
    model = context.place(create_model(ModelConfig(**{name: getattr(args, name) for name in train.MODEL_FLAGS})))
    slots = model.slot_attention.initial_slots(4, 3)
    terms = train.loss_terms(model, torch.rand(4, 3, 16, 16), slots, np.random.default_rng(0), args, 1.0)
    sum(terms.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    if architecture == 'fast':
        assert model.encoder.conv(torch.rand(4, 3, 16, 16)).dtype == torch.bfloat16
    assert (model.decode(slots)[0].dtype == torch.bfloat16) == (architecture == 'paper')


# Training


def test_a_run_learns_logs_and_keeps_checkpoints(capsys):
    assert run(*SMALL, '--epochs', 4, '--save_every', 2, '--lr', 3e-3) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('step')]
    assert len(lines) == 4
    for word in ('train loss', 'MSE', 'FG-ARI', 'ARI', 'mBO', 'mIoU', 'consistency', 'images/s'):
        assert word in lines[-1]
    assert 'consistency' not in lines[0]  # a second pass, at the end only
    names = {'last.pth', 'best_model.pth', 'checkpoint_epoch_2.pth', 'checkpoint_epoch_4.pth'}
    assert set(os.listdir('logs/checkpoints')) == names
    loss = scalars('logs', 'train/loss')
    assert list(loss) == list(range(2, 25, 2))
    assert loss[24] < 0.8 * loss[2]
    for tag in ('train/lr', 'train/grad_norm', 'train/seconds', 'val/fg_ari', 'val/miou', 'slots/mask_entropy'):
        assert all(math.isfinite(value) for value in scalars('logs', tag).values())
    events = EventAccumulator('logs').Reload()
    assert {'slots/decomposition', 'slots/attention'} <= set(events.Tags()['images'])
    assert any(tag.startswith('_hparams_') for tag in events.summary_metadata)
    best = load_checkpoint('logs/checkpoints/best_model.pth')['training']['progress']
    scores = scalars('logs', 'val/fg_ari')
    assert best['best'][0] == pytest.approx(max(scores.values())) == pytest.approx(scores[best['step']])


def test_each_term_of_the_loss_is_logged_under_its_name_and_their_sum_is_trained_on(monkeypatch, without_figures):
    """A fork adds a term: it appears in TensorBoard, also when it comes in some steps only."""
    terms, steps = train.loss_terms, []

    def with_another(model, images, slots, rng, args, progress):
        steps.append(progress)
        assert slots.shape[1] == 3  # the spare slot is for inference
        found = terms(model, images, slots, rng, args, progress)
        return found | ({'mine': images.mean() * 0 + 3.0} if len(steps) % 2 else {})

    monkeypatch.setattr(train, 'loss_terms', with_another)
    assert run(*SMALL, '--epochs', 1, '--mixture_from', 0) == 0
    assert steps == pytest.approx([step / 6 for step in range(6)])
    curves = {name: scalars('logs', f'train/{name}') for name in ('loss', 'mse', 'mixture', 'keep', 'mine')}
    assert curves['mine'] == {2: 3.0, 4: 3.0, 6: 3.0}
    for step in (4, 6):  # `mine` is in one step of two
        sum_of_terms = curves['mse'][step] + curves['mixture'][step] + curves['keep'][step] + 1.5
        assert curves['loss'][step] == pytest.approx(sum_of_terms, rel=1e-5)


def test_the_length_of_a_run_and_the_validations(without_figures):
    assert run(*SMALL, '--steps', 9, '--log_every', 4, '--save_every', 1) == 0
    assert list(scalars('logs', 'val/mse')) == [6, 9]
    assert list(scalars('logs', 'train/loss')) == [4, 6, 8, 9]  # a validation ends a window
    assert 'checkpoint_epoch_1.pth' in os.listdir('logs/checkpoints')
    assert run('--resume', 'logs') == 2
    assert run(*SMALL, '--epochs', 5, '--val_every', 2) == 0
    assert list(scalars('logs', 'val/mse')) == [12, 24, 30]
    assert run(*SMALL, '--epochs', 2, '--val_every', 0) == 0  # every 1,000 steps
    assert list(scalars('logs', 'val/mse')) == [12]
    assert run(*SMALL, '--epochs', 1, '--batch_size', 1, '--train_size', 3) == 0


def test_number_formats(without_figures, capsys):
    for amp, expected in (('off', 'float32'), ('on', 'bfloat16')):
        assert run(*SMALL, '--epochs', 1, '--amp', amp) == 0
        assert f'CPU threads, {expected}' in capsys.readouterr().out
    assert train.parse_args(['--eval', '--resume', 'logs']).amp == 'off'  # scores depend on no hardware
    assert train.parse_args(['--eval', '--resume', 'logs', '--amp', 'auto']).amp == 'auto'


def test_a_run_that_diverges_ends_with_one_line_and_keeps_its_last_checkpoint(monkeypatch, without_figures, capsys):
    assert run(*SMALL, '--epochs', 2, '--lr', 1e3, '--clip', 0, '--optimizer', 'adam') == 2
    error = capsys.readouterr().err
    assert 'training has diverged: the validation MSE is' in error and 'lower --lr' in error and error.count('\n') == 1
    assert not LAST.exists() and 'checkpoint' not in error
    assert run(*SMALL, '--epochs', 1) == 0
    terms = train.loss_terms
    monkeypatch.setattr(
        train, 'loss_terms', lambda *args: {name: math.nan * term for name, term in terms(*args).items()}
    )
    assert run('--resume', 'logs', '--epochs', 9) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and '10 consecutive steps had no finite gradient: at step 16' in error
    assert load_checkpoint(LAST)['training']['progress']['step'] == 12  # of the validation, with the weights of step 6


def test_a_step_without_a_finite_gradient_is_skipped(monkeypatch, without_figures):
    terms, steps = train.loss_terms, []

    def poisoned(*args):
        steps.append(1)
        factor = math.nan if len(steps) in (3, 4, 8) else 1
        return {name: term * factor for name, term in terms(*args).items()}

    monkeypatch.setattr(train, 'loss_terms', poisoned)
    assert run(*SMALL, '--epochs', 2) == 0
    assert list(scalars('logs', 'train/skipped').values()) == [0, 1, 0, 0.5, 0, 0]
    losses = scalars('logs', 'train/loss')
    assert math.isnan(losses[4]) and math.isfinite(losses[8])
    assert all(value.isfinite().all() for value in load_checkpoint(LAST)['model'].values())


def test_a_new_run_moves_the_earlier_one_aside_and_nothing_else(without_figures, capsys):
    Path('logs/checkpoints').mkdir(parents=True)
    Path('logs/checkpoints/other.pt').write_text('not ours')
    for _ in range(3):
        run(*SMALL, '--epochs', 1, '--save_every', 0)
    assert set(os.listdir('logs/run_1/checkpoints')) == {'best_model.pth', 'last.pth'}
    assert Path('logs/run_2').exists() and not Path('logs/run_3').exists()
    assert 'the earlier run in logs is now in logs/run_2' in capsys.readouterr().out
    assert Path('logs/checkpoints/other.pt').read_text() == 'not ours'
    before = LAST.read_bytes()
    assert run('--resume', 'logs/run_1/checkpoints/last.pth', '--epochs', 2) == 0  # continues in its own folder
    assert LAST.read_bytes() == before


def test_a_figure_that_cannot_be_drawn_costs_a_message(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError('latex could not be found')

    monkeypatch.setattr(train, 'visualize_slots', broken)
    assert run(*SMALL, '--epochs', 1) == 0
    assert capsys.readouterr().err == (
        'the figures of step 6 cannot be drawn (latex could not be found); training continues without them\n'
    )


def pictures(number=40) -> list[str]:
    """Writes pictures without masks; returns the flags of a small run on them."""
    Path('pictures').mkdir()
    for i in range(number):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(f'pictures/{i}.png')
    small = ' '.join(SMALL).replace('--max_objects 2 --min_objects 1 --train_size 48 ', '').split()
    return [*small, '--dataset', 'images', '--data_dir', 'pictures', '--epochs', '1']


def test_pictures_without_masks_train_and_report_no_segmentation_score(without_figures, capsys):
    assert run(*pictures()) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith('step'))
    assert 'MSE' in line and 'consistency' in line and 'ARI' not in line and 'mBO' not in line
    best = load_checkpoint('logs/checkpoints/best_model.pth')['training']['progress']['best']
    assert best == pytest.approx(2 * [-min(scalars('logs', 'val/mse').values())])
    assert f'best validation MSE {-best[0]:.4f}' in printed


def test_other_data_than_those_of_the_training_are_warned_of(without_figures, capsys):
    assert run(*pictures()) == 0
    folder = Path('pictures').rename('moved')
    assert run('--eval', '--resume', 'logs', '--data_dir', folder) == 0
    assert 'warning' not in capsys.readouterr().err
    (folder / '7.png').unlink()
    for flags in (['--eval'], ['--epochs', 2]):
        assert run(*flags, '--resume', 'logs', '--data_dir', folder) == 0
        assert 'last.pth was trained on other data' in capsys.readouterr().err


def test_a_run_shorter_than_its_warm_up_is_warned_of(without_figures, capsys):
    for warmup, warned in ((6, True), (5, False)):
        assert run(*SMALL, '--epochs', 1, '--warmup_steps', warmup) == 0
        assert ('raise --steps' in capsys.readouterr().out) == warned


# Scoring


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The folder of a short run."""
    return finished_run(tmp_path_factory.mktemp('trained'), epochs=1)


def table(*flags, capsys) -> dict[str, list[float]]:
    """The rows of the table that --eval prints, by their names."""
    capsys.readouterr()
    assert run('--eval', *flags) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(('network', '+ '))]
    return {line[:10].strip(): [float(cell) for cell in line[10:].split()] for line in lines}


def test_eval_prints_a_table_and_may_use_other_slots_and_iterations(trained, capsys):
    before = (trained / 'checkpoints/last.pth').read_bytes()
    assert run('--eval', '--resume', trained, '--num_slots', 5, '--num_iterations', 3) == 0
    printed = capsys.readouterr().out
    assert 'last.pth, step 6\n16 test images of shapes, 5 + 1 slots, 3 iterations' in printed
    header = next(line for line in printed.splitlines() if 'attn FG-ARI' in line)
    assert header.split('  ')[-1] == 'consistency'
    assert printed.count('network ') == 1 and printed.count('several slots') <= 1
    assert (trained / 'checkpoints/last.pth').read_bytes() == before
    assert len(table('--resume', trained, capsys=capsys)['network']) == len(train.TITLES)


def test_eval_scores_the_split_that_is_asked_for(trained, capsys):
    scores = {split: table('--resume', trained, '--split', split, capsys=capsys) for split in ('train', 'val', 'test')}
    assert table('--resume', trained, capsys=capsys) == scores['test'] != scores['val'] != scores['train']
    last = scalars(trained, 'val/fg_ari')[6]
    assert scores['val']['network'][1] == pytest.approx(last, abs=0.2)  # in other batches, so with other noise
    assert run('--eval', '--resume', trained, '--split', 'val') == 0
    assert '16 val images' in capsys.readouterr().out


def test_eval_with_search_prints_the_network_and_the_refined_slots(trained, capsys):
    plain = table('--resume', trained, capsys=capsys)
    few, many = (table('--resume', trained, '--search', '--refine_steps', n, capsys=capsys) for n in (2, 20))
    assert few['network'] == many['network'] == plain['network']
    assert many['+ refine'][0] < few['+ refine'][0] < plain['network'][0]
    assert run('--eval', '--resume', trained, '--search') == 0
    assert 'these are no scores of the network' in capsys.readouterr().out


def test_eval_finds_the_checkpoint_of_a_copied_folder(trained, capsys):
    Path('copy').symlink_to(trained)
    assert table('--resume', 'auto', '--log_dir', 'copy', capsys=capsys) == table('--resume', trained, capsys=capsys)
    assert run('--eval', '--resume', 'auto', '--log_dir', 'empty') == 2
    assert capsys.readouterr().err == 'train.py: error: no checkpoint in empty/checkpoints to score\n'
    assert not Path('empty').exists()


def test_images_without_objects_are_counted_and_left_out_of_the_scores(trained, monkeypatch, capsys):
    to_batch = dataset.to_batch

    def half_ignored(images, labels):
        labels = labels.copy()
        labels[::2] = dataset.IGNORE
        return to_batch(images, labels)

    monkeypatch.setattr(dataset, 'to_batch', half_ignored)
    assert run('--eval', '--resume', trained) == 0
    assert '8 of the images have a mask with objects' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('place', 'number', 'status'),
    [
        ('create_dataset', signal.SIGINT, 130),
        ('segmentation_scores', signal.SIGINT, 130),
        ('segmentation_scores', signal.SIGTERM, 143),
    ],
)
def test_an_interrupted_evaluation_says_so(trained, monkeypatch, capsys, place, number, status):
    original = getattr(train, place)

    def interrupted(*args, **kwargs):
        signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(train, place, interrupted)
    assert run('--eval', '--resume', trained) == status
    assert capsys.readouterr().err == 'interrupted\n'


# A user's mistakes: one line, exit code 2, nothing written


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ([*SMALL, '--resolution', 300], '--resolution must be at least 16 and at most 256'),
        ([*SMALL, '--min_objects', 5, '--max_objects', 3], 'min_objects (5) and max_objects (3)'),
        ([*SMALL, '--batch_size', 64, '--train_size', 32], 'batch_size (64) must not exceed'),
        ([*SMALL, '--log_dir', 'file/logs'], 'cannot write to file/logs'),
        ([*SMALL, '--log_dir', 'file'], 'cannot write to file'),
        ([*SMALL, '--train_size', 10**12], 'do not fit in memory'),
        (['--architecture', 'paper', '--drops', 2, '--train_size', 64], "belongs to the 'fast' architecture"),
        (['--architecture', 'paper', '--mixture', 1], '--mixture has no effect with --architecture paper'),
        (['--num_slots', 0], '--num_slots must be at least 1'),
        (['--lr', -1], '--lr must be at least 0'),
        (['--lr', 'nan'], '--lr must be at least 0'),
        (['--cooldown', 2], '--cooldown must be at least 0 and at most 1'),
        (['--epochs', 0], 'one of them must be 0 and the other not'),
        (['--epochs', 2, '--steps', 10], '--steps 10 and --epochs 2: one of them must be 0'),
        (['--clip', 'much'], "invalid float value: 'much'"),
        (['--eval'], '--eval needs --resume PATH'),
        (['--pretrained', 'none'], "argument --pretrained: invalid choice: 'none'"),
        (['--pretrained', 'shapes'], '--pretrained has no effect without --eval'),
        (['--search'], '--search has no effect without --eval'),
        (['--split', 'val'], '--split has no effect without --eval'),
        (['--dataset', 'mnist'], "invalid choice: 'mnist'"),
        (['--epoch', 3], 'unrecognized arguments'),
        (['--resume', 'nowhere.pth'], 'no checkpoint at nowhere.pth'),
        (['--dataset', 'images', '--data_dir', 'nowhere'], 'nowhere'),
        (['--dataset', 'clevr6', '--min_objects', 3], '--min_objects has no effect with --dataset clevr6'),
        (['--data_dir', 'x'], '--data_dir has no effect with --dataset shapes'),
        pytest.param(
            ['--device', 'cuda'], 'finds no CUDA GPU', marks=pytest.mark.skipif(torch.cuda.is_available(), reason='GPU')
        ),
    ],
)
def test_mistakes_cost_one_line_and_nothing_is_written(capsys, flags, message):
    Path('file').write_text('in the way')
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith('train.py: error: ') and error.count('\n') == 1
    assert os.listdir() == ['file']


def test_flags_of_training_have_no_effect_on_eval_and_are_refused(trained, capsys):
    for flag, value in (('lr', 1e-4), ('epochs', 3), ('log_dir', 'x'), ('num_workers', 1), ('mixture', 1)):
        assert run('--eval', '--resume', trained, f'--{flag}', value) == 2
        assert f'--{flag} has no effect with --eval' in capsys.readouterr().err
    assert run('--eval', '--resume', trained, '--refine_steps', 3) == 2
    assert '--refine_steps has no effect without --search' in capsys.readouterr().err
    assert run('--eval', '--resume', trained, '--pretrained', 'shapes') == 2
    assert '--pretrained excludes --resume' in capsys.readouterr().err


def test_flags_that_contradict_the_checkpoint_are_refused_with_both_values(without_figures, capsys):
    run(*SMALL, '--epochs', 1)
    before = LAST.read_bytes()
    for flag, given, saved in (('num_slots', 5, 3), ('resolution', 32, 16), ('batch_size', 4, 8), ('seed', 1, 0)):
        capsys.readouterr()
        assert run('--resume', LAST, '--epochs', 2, f'--{flag}', given) == 2
        error = capsys.readouterr().err
        assert f'--{flag} {given} contradicts' in error and f'{flag} {saved}' in error and error.count('\n') == 1
    for steps in ([], ['--steps', 6], ['--steps', 4]):
        assert run('--resume', LAST, *steps) == 2
        assert f'has done 6 steps of {(steps or [0, 6])[1]}; give a larger' in capsys.readouterr().err
    assert LAST.read_bytes() == before
    assert run('--resume', LAST, '--epochs', 2, '--lr', 1e-5) == 0
    printed = capsys.readouterr().out
    assert 'lr: 0.002 in the checkpoint, 1e-05 from now on' in printed
    assert 'continuing logs/checkpoints/last.pth at step 6' in printed


def test_a_model_without_training_state_is_not_resumed(capsys):
    save_checkpoint('model.pth', create_model(ModelConfig(resolution=16, hidden_dim=8)))
    assert run('--resume', 'model.pth') == 2
    assert 'was not written by train.py' in capsys.readouterr().err


def test_the_script_exits_with_2_and_no_traceback():
    result = subprocess.run(
        [sys.executable, ROOT / 'train.py', '--min_objects', '9'], capture_output=True, text=True, timeout=6000
    )
    assert result.returncode == 2
    assert result.stderr.count('\n') == 1 and 'Traceback' not in result.stderr


def test_paths_may_start_with_the_home_folder(monkeypatch, trained):
    monkeypatch.setenv('HOME', str(trained.parent))
    monkeypatch.setenv('USERPROFILE', str(trained.parent))
    args = train.parse_args(['--resume', f'~/{trained.name}', '--eval'])
    assert args.resume == trained / 'checkpoints/last.pth'
    assert train.parse_args(['--log_dir=~/logs']).log_dir == trained.parent / 'logs'


# Defaults


def test_the_number_of_slots_follows_from_the_largest_number_of_objects():
    for flags, expected in (
        (['--max_objects', '10'], 11), (['--dataset', 'clevr6', '--max_objects', '10'], 11), ([], 7),
        (['--dataset', 'tetrominoes', '--max_objects', '10'], 6), (['--max_objects', '10', '--num_slots', '3'], 3),
        (['--architecture', 'paper', '--dataset', 'clevr6', '--max_objects', '10'], 11),
    ):  # fmt: skip
        assert train.parse_args(flags).num_slots == expected, flags


@pytest.mark.parametrize('flags', [[], ['--architecture', 'paper', '--dataset', 'tetrominoes']])
def test_help_prints_the_defaults_in_force(capsys, flags):
    defaults = vars(train.parse_args(flags))
    assert run(*flags, '--help') == 0
    entries = [' '.join(entry.split()) for entry in capsys.readouterr().out.split('\n  --')[1:]]
    entries = {entry.split()[0]: entry for entry in entries}
    for item in fields(ModelConfig):
        assert item.metadata['help'].split(':')[0] in entries[item.name]
    for name, value in defaults.items():
        if name in entries and value not in (None, False) and name not in ('dataset', 'architecture'):
            assert f'(default: {value})' in entries[name]


def test_help_prints_the_flags_of_the_checkpoint(trained, capsys):
    assert run('--resume', trained, '--help') == 0
    assert 'images per step, of all processes together (default: 8)' in ' '.join(capsys.readouterr().out.split())


def test_defaults_of_the_paper_are_table_11_and_tables_4_to_7():
    small, large = (train.parse_args(['--architecture', 'paper', '--dataset', d]) for d in ('tetrominoes', 'clevr6'))
    assert (small.resolution, small.num_slots, small.hidden_dim) == (35, 4, 32)
    assert (large.resolution, large.num_slots, large.hidden_dim) == (128, 7, 64)
    assert (large.steps, large.batch_size, large.lr, large.warmup_steps, large.decay_steps) == (
        500_000, 64, 4e-4, 10_000, 100_000,
    )  # fmt: skip
    assert (large.num_iterations, large.optimizer, large.clip, large.cooldown) == (3, 'adam', 0.0, 0.0)


# Diagnosis: masks that show each of the ways in which slots go wrong


def scene():
    """Labels [4, 16, 16] of four different images with two objects of 6x6 pixels each."""
    labels = torch.zeros(4, 16, 16, dtype=torch.long)
    for i, (a, b) in enumerate([((0, 0), (9, 9)), ((0, 9), (9, 0)), ((5, 0), (5, 9)), ((0, 5), (10, 5))]):
        labels[i, a[0] : a[0] + 6, a[1] : a[1] + 6] = 1
        labels[i, b[0] : b[0] + 6, b[1] : b[1] + 6] = 2
    return labels


def masks_of(slots):
    """Masks [B, 5, 1, H, W] of slot indices [B, H, W]."""
    return torch.nn.functional.one_hot(slots, 5).permute(0, 3, 1, 2)[:, :, None].float()


def statistics_of(masks, labels):
    return {name: values.double().nanmean().item() for name, values in mask_statistics(masks, labels).items()}


LABELS, COLUMNS = scene(), torch.arange(16)
SPLIT = masks_of(torch.where((LABELS > 0) & (COLUMNS % 3 == 0), LABELS + 2, LABELS))  # two of six columns


@pytest.mark.parametrize(
    ('name', 'masks', 'value'),
    [
        ('', masks_of(LABELS), None),
        ('largest_slot', masks_of(torch.zeros_like(LABELS)), 1),
        ('mask_entropy', torch.full((4, 5, 1, 16, 16), 0.2), 1),
        ('sameness', masks_of((COLUMNS // 4).expand(4, 16, 16).contiguous()), 1),
        ('missed', masks_of(torch.where(LABELS == 2, 0, LABELS)), 0.5),
        ('split', SPLIT, 1 / 3),
    ],
)
def test_every_diagnosis_is_made_from_masks_that_show_it(name, masks, value):
    statistics = statistics_of(masks, LABELS)
    assert diagnose(statistics) == name and statistics.get(name) == pytest.approx(value)
    without_labels = {'largest_slot', 'mask_entropy', 'sameness'} & {name}  # only a total collapse
    assert diagnose(statistics_of(masks, None)) == ''.join(without_labels)


def test_objects_in_slots_that_share_the_background_are_not_missed():
    divided = (COLUMNS // 6).expand_as(LABELS)  # 6, 6 and 4 columns: no slot has half of the background
    statistics = statistics_of(masks_of(torch.where(LABELS > 0, LABELS, divided)), LABELS)
    assert statistics['missed'] == 0 and statistics['split'] == 0


def test_ignored_pixels_are_left_out_of_the_statistics():
    ignored = torch.cat([LABELS, torch.full((4, 16, 4), 255)], dim=2)
    wider = torch.cat([SPLIT, SPLIT[..., :4]], dim=4)
    for name, value in statistics_of(SPLIT, LABELS).items():
        if name != 'sameness':  # which is of the whole image
            assert statistics_of(wider, ignored)[name] == pytest.approx(value), name


def test_one_object_is_no_collapse_one_image_no_comparison_and_one_slot_no_failure():
    one = (LABELS[:1] == 1).long()
    statistics = mask_statistics(masks_of(one), one)
    assert statistics['largest_slot'].isnan().all() and 'sameness' not in statistics
    assert mask_statistics(torch.ones(2, 1, 1, 16, 16), LABELS[:2]) == {}


def test_the_advice_is_printed_once_at_the_end(without_figures, capsys):
    flags = [*SMALL, '--epochs', 5]
    assert run(*flags) == 0  # so short a run spreads each object over all slots
    printed = capsys.readouterr().out
    assert printed.count(DIAGNOSES['mask_entropy'][1]) == 1
    assert printed.index(DIAGNOSES['mask_entropy'][1]) > printed.index('best validation')
    assert run('--eval', '--resume', 'logs') == 0
    assert capsys.readouterr().out.count(DIAGNOSES['mask_entropy'][1]) == 1
