"""Runs of train.py: they learn, stop, resume to the bit, and refuse what makes no sense."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, SMALL, run, same, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from slot_attention import (
    ALL_PIXELS,
    ModelConfig,
    SlotAttentionAutoEncoder,
    load_checkpoint,
    save_checkpoint,
)


def test_learning_rate_warms_up_and_halves():
    def rate(step):
        return train.learning_rate(step, lr=1e-3, warmup_steps=10, decay_steps=100)

    assert rate(0) == pytest.approx(1e-4)
    assert rate(4) == pytest.approx(5e-4 * 0.5**0.04)
    assert rate(100) == pytest.approx(5e-4) and rate(300) == pytest.approx(1.25e-4)
    assert train.learning_rate(10**6, lr=1e-3, warmup_steps=0, decay_steps=0) == 1e-3


def test_learning_rate_cools_down_to_nothing():
    rates = [train.learning_rate(step, 1e-3, 10, 0, cooldown=0.25, total_steps=200) for step in range(200)]
    assert rates[9:151] == [1e-3] * 142
    assert rates[175] == pytest.approx(5e-4) and rates[199] == pytest.approx(2e-5)


def test_orthogonalised_matrices_have_like_singular_values_and_the_same_directions():
    shapes = ((8, 30), (30, 8), (16, 16), (8, 30), (8, 12))
    matrices = [torch.randn(shape) * torch.linspace(0.1, 3, shape[1]) for shape in shapes]
    for matrix, found in zip(matrices, train.orthogonalise(matrices), strict=True):
        u, singular, v = torch.linalg.svd(matrix, full_matrices=False)
        rotated = u.mT @ found @ v.mT  # diagonal: Newton-Schulz changes the singular values alone
        values = rotated.diagonal()
        assert (rotated - torch.diag(values)).abs().max() < 1e-3
        # Singular values near zero need more steps than five.
        large = singular > 0.05 * matrix.norm()
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
    model = SlotAttentionAutoEncoder(ModelConfig(resolution=16, hidden_dim=8, slot_dim=16))
    adam, muon = train.create_optimizers(model, 'muon')
    names = {p: name for name, p in model.named_parameters()}
    of_muon = {names[p] for p in muon.param_groups[0]['params']}
    assert {'encoder.conv.6.weight', 'slot_attention.project_q.weight', 'decoder.hyper.0.weight'} <= of_muon
    assert all(name.endswith(('weight', 'weight_ih', 'weight_hh')) for name in of_muon)
    assert len(of_muon) + len(adam.param_groups[0]['params']) == len(names)
    assert len(train.create_optimizers(model, 'adam')) == 1


@pytest.mark.parametrize('architecture', ['fast', 'paper'])
def test_the_compiled_step_is_the_plain_one(architecture):
    try:
        context = train.DistributedContext.create('cpu', 'off', compiled=True)
    except train.ConfigError as error:
        pytest.skip(str(error))
    args = train.parse_args(['--architecture', architecture])
    sizes = dict(resolution=16, num_slots=3, slot_dim=8, num_iterations=6, hidden_dim=8)
    reallocation = dict(moves=1, drops=1) if architecture == 'fast' else {}
    config = ModelConfig(architecture, gradient=args.gradient, damping=args.damping, **sizes, **reallocation)
    model, counts = SlotAttentionAutoEncoder(config), torch._dynamo.utils.counters['stats']
    losses = [train.Loss(model, train.DistributedContext.create('cpu', 'off')), train.Loss(model, context)]
    programs = counts['unique_graphs']
    images, slots = torch.rand(2, 3, 16, 16), model.slot_attention.initial_slots(2, 3).detach()
    for step in range(3):
        results = []
        for loss in losses:
            rng = np.random.default_rng(step)
            pixels = train.choose_pixels(rng, 16, args.pixel_stride, context.device)
            model.zero_grad()
            values = loss(images, slots, pixels, rng, 1.0)
            sum(values).backward()
            results.append([*map(torch.as_tensor, values), *(p.grad for p in model.parameters() if p.grad is not None)])
        for plain, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)
    assert counts['unique_graphs'] == programs + 1  # other rows and columns need no other one


def test_where_nothing_can_be_compiled_one_line_says_so(monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError('raised:\nno compiler\n\nwith details')

    monkeypatch.setattr(torch, 'compile', broken)
    monkeypatch.setattr(train, 'COMPILER_FLOOR', '2.6')
    assert run(*SMALL, '--compile') == 2
    said = capsys.readouterr().err
    assert said == 'train.py: error: --compile does not work here (raised: no compiler); leave it out\n'
    assert not Path('logs').exists()


def test_compilers_that_write_outside_of_their_memory_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion('2.9.1+cu128'))
    assert run(*SMALL, '--compile') == 2
    said = capsys.readouterr().err
    assert said.startswith('train.py: error: --compile on a CPU needs PyTorch 2.10 or newer, this is 2.9.1+cu128, ')
    assert said.count('\n') == 1 and not Path('logs').exists()


def test_pixels_are_every_so_many_from_any_offset_on():
    seen = set()
    for step in range(50):
        rows, columns = train.choose_pixels(np.random.default_rng(step), 10, 3, torch.device('cpu'))
        for chosen in (rows, columns):
            assert chosen.tolist() == list(range(int(chosen[0]), 10, 3))
        seen.add((int(rows[0]), int(columns[0])))
    assert seen == {(i, j) for i in range(3) for j in range(3)}
    assert torch.arange(10)[train.choose_pixels(np.random.default_rng(0), 10, 1, torch.device('cpu'))[0]].numel() == 10


def test_a_run_learns_logs_and_keeps_checkpoints(capsys):
    assert run(*SMALL, '--epochs', 4, '--save_every', 2, '--lr', 3e-3) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith('epoch')]
    assert len(lines) == 4
    for word in ('train loss', 'MSE', 'FG-ARI', 'ARI', 'mBO', 'mIoU', 'consistency', 'images/s'):
        assert word in lines[-1]
    assert 'consistency' not in lines[0]  # a second pass, at the end only
    names = {'last.pth', 'best_model.pth', 'checkpoint_epoch_2.pth', 'checkpoint_epoch_4.pth'}
    assert set(os.listdir('logs/checkpoints')) == names
    loss = scalars('logs', 'train/loss')
    assert list(loss) == list(range(2, 25, 2))
    assert loss[24] < 0.8 * loss[2]
    for tag in ('train/lr', 'train/grad_norm', 'system/images_per_second', 'val/fg_ari', 'val/miou', 'val/consistency'):
        assert all(math.isfinite(value) for value in scalars('logs', tag).values())
    events = EventAccumulator('logs').Reload().Tags()
    assert {'slots/decomposition', 'slots/attention'} <= set(events['images'])
    assert 'configuration/text_summary' in events['tensors'] and 'val/fg_ari' in events['scalars']


def test_an_epoch_ends_with_a_point_of_the_curves(capsys):
    run(*SMALL, '--epochs', 2, '--log_every', 4)
    losses = scalars('logs', 'train/loss')
    assert list(losses) == [4, 6, 8, 12]
    assert f'train loss {(4 * losses[4] + 2 * losses[6]) / 6:.4f}' in capsys.readouterr().out


def test_eval_prints_a_table_and_may_use_other_slots_and_iterations(capsys):
    run(*SMALL, '--epochs', 1)
    before = Path('logs/checkpoints/last.pth').read_bytes()
    capsys.readouterr()
    assert run('--eval', '--resume', 'logs', '--num_slots', 5, '--num_iterations', 7) == 0
    printed = capsys.readouterr().out
    assert '16 test images of shapes, 5 slots, 7 iterations' in printed
    header, network = printed.splitlines()[-2:]
    assert header.split('  ')[-1] == 'consistency' and 'attn FG-ARI' in header
    assert network.startswith('network') and len(network.split()) == 8
    assert Path('logs/checkpoints/last.pth').read_bytes() == before


def test_eval_with_search_prints_the_network_and_the_refined_slots(capsys):
    run(*SMALL, '--epochs', 1)
    capsys.readouterr()
    rows = []
    for flags in ([], ['--search'], ['--search', '--refine_steps', 2]):
        assert run('--eval', '--resume', 'logs', *flags) == 0
        printed = capsys.readouterr().out
        rows.append([line for line in printed.splitlines() if line.startswith(('network', '+ '))])
        assert ('no scores of the network' in printed) == bool(flags)
    assert rows[0] == rows[1][:1] == rows[2][:1]
    assert [row[:10].strip() for row in rows[1]] == ['network', '+ refine']
    network, refined = (float(row[10:].split()[0]) for row in rows[1])
    assert refined < network and rows[2][1] != rows[1][1]


def test_the_length_of_a_run_may_be_given_in_steps(monkeypatch, capsys):
    """9 steps are one and a half epochs; the rest of the second one comes when the run is continued."""
    monkeypatch.setattr(train, 'HEADS_FROM', 0)  # else both would depend on the planned length
    monkeypatch.setattr(train, 'MIXTURE_FROM', (-1, 0))
    assert run(*SMALL, '--steps', 9, '--cooldown', 0) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('epoch')]
    assert len(lines) == 2
    progress = load_checkpoint('logs/checkpoints/last.pth')['training']['progress']
    assert (progress['step'], progress['epochs'], progress['seen'], progress['validated']) == (9, 1, 24, 9)
    assert run('--resume', 'logs') == 2
    assert 'give a larger --steps or --epochs' in capsys.readouterr().err
    assert run('--resume', 'logs', '--steps', 12) == 0
    assert run(*SMALL, '--epochs', 2, '--cooldown', 0, '--log_dir', 'straight') == 0
    models = [load_checkpoint(f'{folder}/checkpoints/last.pth')['model'] for folder in ('logs', 'straight')]
    assert same(*models)


def test_validation_comes_every_so_many_epochs_or_steps_and_at_the_end(monkeypatch):
    assert run(*SMALL, '--epochs', 5, '--val_every', 2) == 0
    assert list(scalars('logs', 'val/mse')) == [12, 24, 30]
    assert list(scalars('logs', 'train/loss')) == list(range(2, 31, 2))
    assert run(*SMALL, '--epochs', 5, '--val_every', 0) == 0  # at least 500 steps: at the end
    assert list(scalars('logs', 'val/mse')) == [30]
    monkeypatch.setattr(train, 'VAL_STEPS', 1)  # of the 6 in an epoch
    assert run(*SMALL, '--steps', 9, '--val_every', 0, '--log_every', 3) == 0
    assert list(scalars('logs', 'val/mse')) == [2, 4, 6, 8, 9]
    assert list(scalars('logs', 'train/loss')) == [2, 3, 4, 6, 8, 9]


def test_images_per_second_count_images(monkeypatch, capsys):
    """A resumed run with another batch size: the rate is of all images and all of the time."""
    run(*SMALL, '--epochs', 1)
    capsys.readouterr()
    assert run('--resume', 'logs', '--epochs', 2, '--batch_size', 2) == 0
    progress = load_checkpoint('logs/checkpoints/last.pth')['training']['progress']
    assert progress['images'] == 2 * 48
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('epoch   2'))
    assert int(line.split()[-2]) == pytest.approx(96 / progress['seconds'], abs=1)


def test_checkpoints_are_scored_in_float32(monkeypatch):
    run(*SMALL, '--epochs', 1)
    amps, create = [], train.DistributedContext.create
    monkeypatch.setattr(train.DistributedContext, 'create', lambda *args: amps.append(args[1]) or create(*args))
    for flags in ((), ('--amp', 'on'), ('--amp', 'auto')):
        assert run('--eval', '--resume', 'logs', *flags) == 0
    assert amps == ['off', 'on', 'auto']


def test_a_run_that_diverges_says_so(capsys):
    assert run(*SMALL, '--epochs', 2, '--lr', 1e3, '--clip', 0, '--optimizer', 'adam') == 2
    error = capsys.readouterr().err
    assert 'training has diverged: the validation MSE is' in error and 'lower --lr' in error and error.count('\n') == 1


def test_a_new_run_moves_the_earlier_one_aside(capsys):
    for _ in range(3):
        run(*SMALL, '--epochs', 1, '--save_every', 0)
    assert set(os.listdir('logs/run_1/checkpoints')) == {'best_model.pth', 'last.pth'}
    assert Path('logs/run_2').exists() and not Path('logs/run_3').exists()
    assert 'the earlier run in logs is now in logs/run_2' in capsys.readouterr().out
    before = Path('logs/checkpoints/last.pth').read_bytes()
    assert run('--resume', 'logs/run_1/checkpoints/last.pth', '--epochs', 2) == 0  # continues in its own folder
    assert Path('logs/checkpoints/last.pth').read_bytes() == before


def test_sources_without_masks_train_and_report_no_segmentation_score(monkeypatch, capsys):
    whole = train.create_dataloader.__globals__['to_batch']
    monkeypatch.setitem(train.create_dataloader.__globals__, 'to_batch', lambda images, labels: whole(images))
    assert run(*SMALL, '--epochs', 1) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('epoch'))
    assert 'MSE' in line and 'consistency' in line and 'ARI' not in line and 'mBO' not in line
    best = load_checkpoint('logs/checkpoints/best_model.pth')['training']['progress']['best']
    assert best == pytest.approx(2 * [-scalars('logs', 'val/mse')[6]])


def test_other_data_than_those_of_the_training_are_warned_of(capsys):
    folder = Path('pictures')
    folder.mkdir()
    for i in range(40):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f'{i}.png')
    small = ' '.join(SMALL).replace('--max_objects 2 --min_objects 1 --train_size 48 ', '').split()
    assert run(*small, '--dataset', 'images', '--data_dir', folder, '--epochs', 1) == 0
    folder = folder.rename('moved')
    assert run('--eval', '--resume', 'logs', '--data_dir', folder) == 0
    assert 'warning' not in capsys.readouterr().err
    (folder / '7.png').unlink()
    assert run('--eval', '--resume', 'logs', '--data_dir', folder) == 0
    assert 'last.pth was trained on other data' in capsys.readouterr().err
    assert run('--resume', 'logs', '--epochs', 2, '--data_dir', folder) == 0
    assert 'last.pth was trained on other data' in capsys.readouterr().err


def test_a_run_shorter_than_its_warm_up_is_warned_of(capsys):
    for warmup, warned in ((6, True), (5, False)):
        assert run(*SMALL, '--epochs', 1, '--warmup_steps', warmup) == 0
        assert ('raise --steps' in capsys.readouterr().out) == warned


def test_images_without_objects_are_counted_and_left_out_of_the_scores(monkeypatch, capsys):
    whole = train.create_dataloader.__globals__['to_batch']

    def half_ignored(images, labels):
        labels = labels.copy()
        labels[::2] = 255
        return whole(images, labels)

    monkeypatch.setitem(train.create_dataloader.__globals__, 'to_batch', half_ignored)
    assert run(*SMALL, '--epochs', 1) == 0
    capsys.readouterr()
    assert run('--eval', '--resume', 'logs') == 0
    assert '8 of the images have a mask with objects' in capsys.readouterr().out


@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_evaluation_says_so(monkeypatch, capsys, number, status):
    run(*SMALL, '--epochs', 1)
    scores = train.segmentation_scores

    def interrupted(*args):
        signal.raise_signal(number)
        return scores(*args)

    monkeypatch.setattr(train, 'segmentation_scores', interrupted)
    assert run('--eval', '--resume', 'logs') == status
    assert capsys.readouterr().err == 'interrupted\n'


def test_the_best_model_has_the_best_score_and_ties_go_to_the_lower_mse(monkeypatch):
    scores = iter([(0.5, 0.4), (0.6, 0.3), (0.6, 0.2), (0.6, 0.25), (math.nan, 0.1)])

    def evaluate(*args, **kwargs):
        fg_ari, mse = next(scores)
        return {'network': {'fg_ari': fg_ari, 'mse': mse}}

    monkeypatch.setattr(train, 'evaluate', evaluate)
    monkeypatch.setattr(train, 'log_figures', lambda *args: None)
    assert run(*SMALL, '--epochs', 5) == 0
    best = load_checkpoint('logs/checkpoints/best_model.pth')['training']['progress']
    assert best['best'] == [0.6, -0.2] and best['epochs'] == 3


def test_error_and_variance_of_the_slots_are_together_their_mean_error():
    model, images = SlotAttentionAutoEncoder(ModelConfig('fast', 16, 3, 16, 3, 8)), torch.rand(2, 3, 16, 16)
    slots = model.slot_attention.initial_slots(2, 3).detach()
    pixels = (slice(1, None, 2), slice(None, None, 2))
    error, variance = train.ReconstructionError(model)(images, slots, pixels, with_variance=True)
    recons, masks, found, _ = model(images, slots=slots)
    rgbs, _ = model.decode(found)
    assert torch.allclose(error, (recons - images).square().mean(1)[:, 1::2, ::2], atol=1e-6)
    of_slots = (masks * (rgbs - images[:, None]).square()).sum(1).mean(1)[:, 1::2, ::2]
    assert torch.allclose(error + variance, of_slots, atol=1e-6)


def test_the_mixture_and_the_iterations_of_the_heads_join_the_run_later(monkeypatch):
    """The variance is 1 everywhere, and the heads have no loss."""
    context = train.DistributedContext.create('cpu', 'off')
    config = ModelConfig('fast', 16, 3, 16, 12, 8, 'first_order', moves=6, drops=2)
    loss, seen = train.Loss(SlotAttentionAutoEncoder(config), context, mixture=0.5), []
    with_variances = []

    def error(images, slots, pixels, with_variance, **iterations):
        with_variances.append(with_variance)
        seen.append({name: iterations[name] for name in ('num_iterations', 'moves', 'drops')})
        return torch.zeros(2, 8, 8), torch.ones(2, 8, 8)

    monkeypatch.setattr(loss, 'error', error)
    monkeypatch.setattr(train, 'reallocation_loss', lambda *_: 0.0)
    rng = np.random.default_rng(0)
    rest = [float(loss(None, None, None, rng, progress)[1]) for progress in (0.0, 0.2, 0.5, 0.8)]
    assert rest == pytest.approx([0.0, 0.0, 0.25, 0.5]) and with_variances == [False, False, True, True]
    assert seen[0] == dict(num_iterations=4, moves=0, drops=0)
    seen.clear()
    for _ in range(80):
        loss(None, None, None, rng, 0.2)
    assert train.MOVES_IN_TRAINING == 4  # of 6
    with_drops, without = dict(num_iterations=10, moves=4, drops=2), dict(num_iterations=8, moves=4, drops=0)
    assert all(iterations in (with_drops, without) for iterations in seen) and 10 < seen.count(with_drops) < 30


def test_bfloat16_autocast_trains(capsys):
    assert run(*SMALL, '--epochs', 1, '--amp', 'on') == 0
    assert 'bfloat16' in capsys.readouterr().out


@pytest.mark.parametrize(('architecture', 'gradient'), [('fast', 'full'), ('fast', 'first_order'), ('paper', 'full')])
def test_the_gradient_reaches_every_parameter_in_bfloat16(architecture, gradient):
    context = train.DistributedContext.create('cpu', 'on')
    model = context.place(SlotAttentionAutoEncoder(ModelConfig(architecture, 16, 3, 16, 3, 8, gradient)))
    images = torch.rand(2, 3, 16, 16)
    with context.autocast():
        slots = model.slot_attention.initial_slots(2, 3)
        loss, _ = train.Loss(model, context)(images, slots, ALL_PIXELS, np.random.default_rng(0), 1.0)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


# A user's mistakes: one line, exit code 2, nothing written


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--architecture', 'paper', '--moves', 0, '--drops', 0, '--resolution', 100], 'multiple of 16 above 64'),
        (['--resolution', 300], 'argument --resolution: must be at least 16 and at most 256'),
        (['--min_objects', 5, '--max_objects', 3], 'min_objects (5) and max_objects (3)'),
        (['--num_slots', 0], 'argument --num_slots: must be at least 1'),
        (['--batch_size', 0], 'argument --batch_size: must be at least 1'),
        (['--batch_size', 64, '--train_size', 32], 'batch_size (64) must not exceed'),
        (['--resume', 'nowhere.pth'], 'no checkpoint at nowhere.pth'),
        (['--log_dir', 'file/logs'], 'cannot write to file/logs'),
        (['--pixel_stride', 17], '--pixel_stride 17 is larger than the image of 16 pixels'),
        pytest.param(
            ['--device', 'cuda'], 'finds no CUDA GPU', marks=pytest.mark.skipif(torch.cuda.is_available(), reason='GPU')
        ),
    ],
)
def test_mistakes_cost_one_line_and_nothing_is_written(capsys, flags, message):
    Path('file').write_text('in the way')
    assert run(*SMALL, '--epochs', 1, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith('train.py: error: ') and error.count('\n') == 1
    assert os.listdir() == ['file']


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--lr', -1], 'argument --lr: must be at least 0'),
        (['--lr', 'nan'], 'argument --lr: must be at least 0'),
        (['--cooldown', 2], 'argument --cooldown: must be at least 0 and at most 1'),
        (['--epochs', 0], 'one of them must be 0 and the other not'),
        (['--epochs', 2, '--steps', 10], '--steps 10 and --epochs 2: one of them must be 0'),
        (['--seed', -1], 'argument --seed: must be at least 0'),
        (['--clip', 'much'], "invalid float value: 'much'"),
        (['--eval'], '--eval needs --resume PATH'),
        (['--eval', '--resume', 'auto'], '--eval needs --resume PATH'),
        (['--pretrained', 'none'], "argument --pretrained: invalid choice: 'none'"),
        (['--search'], '--search has no effect without --eval'),
        (['--refine_steps', 3], '--refine_steps has no effect without --search'),
        (['--dataset', 'mnist'], "invalid choice: 'mnist'"),
        (['--epoch', 3], 'unrecognized arguments'),
        (['--resume', '.'], 'no checkpoint at .'),
        (['--dataset', 'images', '--data_dir', 'nowhere'], 'no folder nowhere'),
        (['--dataset', 'clevr6', '--min_objects', 3], '--min_objects has no effect with --dataset clevr6'),
        (['--data_dir', 'x'], '--data_dir has no effect with --dataset shapes'),
    ],
)
def test_flags_that_make_no_sense_are_refused_in_one_line(capsys, flags, message):
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith('train.py: error: ') and error.count('\n') == 1
    assert os.listdir() == []


def test_flags_of_training_have_no_effect_on_eval_and_are_refused(capsys):
    run(*SMALL, '--epochs', 1)
    for flag, value in (('lr', 1e-4), ('epochs', 3), ('log_dir', 'x')):
        assert run('--eval', '--resume', 'logs', f'--{flag}', value) == 2
        assert f'--{flag}' in capsys.readouterr().err
    assert run('--eval', '--resume', 'logs', '--num_slots', 0) == 2


def test_flags_that_contradict_the_checkpoint_are_refused_with_both_values(capsys):
    run(*SMALL, '--epochs', 1)
    before = Path('logs/checkpoints/last.pth').read_bytes()
    for flag, given, saved in (('num_slots', 5, 3), ('resolution', 32, 16), ('train_size', 64, 48), ('seed', 1, 0)):
        capsys.readouterr()
        assert run('--resume', 'logs/checkpoints/last.pth', '--epochs', 2, f'--{flag}', given) == 2
        error = capsys.readouterr().err
        assert f'--{flag} {given} contradicts' in error and f'{flag} {saved}' in error and error.count('\n') == 1
    assert run('--resume', 'logs/checkpoints/last.pth') == 2
    assert 'has done 6 steps, 1 epochs, of 6 steps; give a larger --steps or --epochs' in capsys.readouterr().err
    assert Path('logs/checkpoints/last.pth').read_bytes() == before
    assert run('--resume', 'logs/checkpoints/last.pth', '--epochs', 2, '--lr', 1e-5) == 0
    assert 'lr: 0.002 in the checkpoint, 1e-05 from now on' in capsys.readouterr().out


def test_a_run_is_not_resumed_to_a_step_behind_it(capsys):
    run(*SMALL, '--epochs', 2)
    checkpoint = torch.load('logs/checkpoints/last.pth')
    checkpoint['training']['progress']['validated'] = 6  # as if interrupted at step 12, before the validation
    torch.save(checkpoint, 'logs/checkpoints/last.pth')
    for steps in (4, 6, 8):
        capsys.readouterr()
        assert run('--resume', 'logs/checkpoints/last.pth', '--epochs', 0, '--steps', steps) == 2
        assert f'has done 12 steps, 2 epochs, of {steps} steps; give a larger' in capsys.readouterr().err


def test_single_images_are_a_batch(capsys):
    assert run(*SMALL, '--batch_size', 1, '--epochs', 1) == 0


def test_the_number_of_slots_follows_from_the_largest_number_of_objects():
    for flags, expected in (
        (['--max_objects', '10'], 15), (['--dataset', 'clevr6', '--max_objects', '10'], 15), ([], 11),
        (['--dataset', 'tetrominoes', '--max_objects', '10'], 8), (['--max_objects', '10', '--num_slots', '3'], 3),
        (['--architecture', 'paper', '--dataset', 'clevr6', '--max_objects', '10'], 11),
    ):  # fmt: skip
        assert train.parse_args(flags).num_slots == expected, flags


def test_a_model_without_training_state_is_not_resumed(capsys):
    save_checkpoint('model.pth', SlotAttentionAutoEncoder(ModelConfig(resolution=16, hidden_dim=8)))
    assert run('--resume', 'model.pth') == 2
    assert 'was not written by train.py' in capsys.readouterr().err


def test_a_checkpoint_of_another_version_is_named(capsys):
    run(*SMALL, '--epochs', 1)
    checkpoint = torch.load('logs/checkpoints/last.pth')
    del checkpoint['training']['args']['clip']
    torch.save(checkpoint, 'logs/checkpoints/last.pth')
    assert run('--resume', 'logs/checkpoints/last.pth', '--epochs', 2) == 2
    assert 'last.pth is damaged or of another version' in capsys.readouterr().err


def test_the_script_exits_with_2_and_no_traceback():
    flags = ['--min_objects', '9']
    result = subprocess.run([sys.executable, ROOT / 'train.py', *flags], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.count('\n') == 1 and 'Traceback' not in result.stderr


def test_help_prints_the_defaults_in_force(capsys):
    for flags in ([], ['--architecture', 'paper', '--dataset', 'tetrominoes']):
        defaults = vars(train.parse_args(flags))
        assert run(*flags, '--help') == 0
        entries = [' '.join(entry.split()) for entry in capsys.readouterr().out.split('\n  --')[1:]]
        entries = {entry.split()[0]: entry for entry in entries}
        for name in defaults.keys() - {'auto', 'resume', 'dataset', 'architecture'}:
            assert f'(default: {defaults[name]})' in entries[name]


def test_defaults_of_the_paper_are_table_11_and_tables_4_to_7():
    small, large = (train.parse_args(['--architecture', 'paper', '--dataset', d]) for d in ('tetrominoes', 'clevr6'))
    assert (small.resolution, small.num_slots, small.hidden_dim) == (35, 4, 32)
    assert (large.resolution, large.num_slots, large.hidden_dim) == (128, 7, 64)
    assert (large.steps, large.batch_size, large.lr, large.warmup_steps, large.decay_steps) == (
        500_000, 64, 4e-4, 10_000, 100_000,
    )  # fmt: skip
    assert (large.num_iterations, large.gradient, large.optimizer, large.clip) == (3, 'full', 'adam', 0.0)
    assert large.damping == large.moves == large.drops == 0


# Diagnosis: masks made to show each of the ways in which slots go wrong


def scene():
    """Labels [4, 16, 16] of four different images with two objects of 6x6 pixels each."""
    labels = torch.zeros(4, 16, 16, dtype=torch.long)
    for i, (a, b) in enumerate([((0, 0), (9, 9)), ((0, 9), (9, 0)), ((5, 0), (5, 9)), ((0, 5), (10, 5))]):
        labels[i, a[0] : a[0] + 6, a[1] : a[1] + 6] = 1
        labels[i, b[0] : b[0] + 6, b[1] : b[1] + 6] = 2
    return labels


def masks_of(slots, num_slots=5):
    """Hard masks [B, K, 1, H, W] of slot indices [B, H, W]."""
    return torch.nn.functional.one_hot(slots, num_slots).permute(0, 3, 1, 2)[:, :, None].float()


def mean_statistics(masks, labels):
    return {name: values.double().nanmean().item() for name, values in train.mask_statistics(masks, labels).items()}


def wrong_masks():
    labels = scene()
    columns = torch.arange(16)
    stripes = (columns // 4).expand(4, 16, 16).contiguous()
    halves = torch.where((labels > 0) & (columns % 3 == 0), labels + 2, labels)
    shared = torch.full((4, 5, 1, 16, 16), 0.2)
    return {
        '': masks_of(labels),
        'largest_slot': masks_of(torch.zeros_like(labels)),
        'mask_entropy': shared,
        'sameness': masks_of(stripes),
        'missed': masks_of(torch.where(labels == 2, 0, labels)),
        'split': masks_of(halves),
    }


@pytest.mark.parametrize('name', ['', *train.DIAGNOSES])
def test_every_diagnosis_is_made_from_masks_that_show_it(name):
    masks = wrong_masks()[name]
    assert train.diagnose(mean_statistics(masks, scene())) == name


def test_mask_statistics_are_those_counted_by_hand():
    labels, masks = scene(), wrong_masks()['split']
    figures = mean_statistics(masks, labels)
    split = sum(min((c % 3 == 0).sum().item(), (c % 3 != 0).sum().item()) * 6 for c in _columns_of(labels))
    assert figures['split'] == pytest.approx(split / (labels > 0).sum().item())
    assert figures['mask_entropy'] == 0 and figures['missed'] == 0
    assert mean_statistics(wrong_masks()['mask_entropy'], labels)['mask_entropy'] == pytest.approx(1)
    assert mean_statistics(wrong_masks()['missed'], labels)['missed'] == 0.5


def test_objects_in_slots_that_share_the_background_are_not_missed():
    labels = scene()
    divided = (torch.arange(16) // 6).expand_as(labels)  # 6, 6 and 4 columns: no slot has half of the background
    figures = mean_statistics(masks_of(torch.where(labels > 0, labels, divided)), labels)
    assert figures['missed'] == 0 and figures['split'] == 0


def _columns_of(labels):
    return [torch.where((image == label).any(0))[0] for image in labels for label in (1, 2)]


def test_without_labels_only_a_total_collapse_is_told():
    masks = wrong_masks()
    assert train.diagnose(mean_statistics(masks['largest_slot'], None)) == 'largest_slot'
    assert train.diagnose(mean_statistics(masks['mask_entropy'], None))
    assert train.diagnose(mean_statistics(masks[''], None)) == ''


def test_ignored_pixels_are_left_out_of_the_statistics():
    labels, masks = scene(), wrong_masks()['split']
    ignored = torch.cat([labels, torch.full((4, 16, 4), 255)], dim=2)
    wider = torch.cat([masks, masks[..., :4]], dim=4)
    for name, value in mean_statistics(masks, labels).items():
        if name != 'sameness':  # which is of the whole image
            assert mean_statistics(wider, ignored)[name] == pytest.approx(value), name


def test_one_object_is_no_collapse_and_one_image_no_comparison():
    labels = scene().clamp(max=1)[:1] * (scene()[:1] == 1)
    figures = train.mask_statistics(masks_of(labels), labels)
    assert figures['largest_slot'].isnan().all() and 'sameness' not in figures


def test_a_single_slot_gets_no_diagnosis():
    assert train.mask_statistics(torch.ones(2, 1, 1, 8, 8), torch.ones(2, 8, 8, dtype=torch.long)) == {}


def test_a_diagnosis_that_lasts_is_said_once_and_logged(capsys, monkeypatch):
    monkeypatch.setattr(train, 'diagnose', lambda figures: 'split')
    assert run(*SMALL, '--epochs', 5) == 0
    printed = capsys.readouterr().out
    assert printed.count('spare slots split objects') == 1
    assert printed.index('spare slots') > printed.index('epoch   3')
    events = EventAccumulator('logs').Reload()
    assert len(events.Tensors('diagnosis/text_summary')) == 1
    assert {f'slots/{figure}' for figure in train.DIAGNOSES} <= set(events.Tags()['scalars'])
