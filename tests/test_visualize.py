"""Figures for any number of slots, a slot's colour in every panel, edits and sequences, and the script."""

import csv
import gc
import io
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import slot_attention
import visualize
from dataset import create_dataset
from slot_attention import ModelConfig, create_model, fg_ari, save_checkpoint
from visualize import visualize_attention_evolution, visualize_slot_decomposition, visualize_slots


def scene(B=2, K=7, size=16, T=3):
    images = torch.rand(B, 3, size, size) * 2 - 1
    rgbs = torch.rand(B, K, 3, size, size) * 2 - 1
    masks = torch.randn(B, K, 1, size, size).softmax(1)
    attn = torch.randn(B, T, K, size // 2, size // 2).softmax(2)
    return images, (rgbs * masks).sum(1), masks, attn, rgbs, torch.randint(0, 3, (B, size, size))


def one_hot(labels, K):
    """labels [B, H, W] -> masks [B, K, 1, H, W]"""
    return F.one_hot(labels, K).permute(0, 3, 1, 2)[:, :, None].float()


def run(*flags):
    return visualize.main(visualize.parse_args([str(flag) for flag in flags]))


def texts_of(figure):
    return [text.get_text() for text in figure.axes[0].texts if text.get_text()]


def panels_of(figure):
    return [np.asarray(panel.get_array()) for panel in figure.axes[0].images]


def strips_of(figure):
    """Colours of the strips above the panels of slots."""
    return [tuple(np.round(p.get_facecolor()[:3], 3)) for p in figure.axes[0].patches if p.get_fill()]


# Figures


def test_the_calls_of_the_readme():
    images, recons, masks, attn, *_ = scene()
    figures = [
        visualize_slots(images, recons, masks, save_path='results.png'),
        visualize_attention_evolution(attn, save_path='attention_evolution.png'),
        visualize_slot_decomposition(images[0], recons[0], masks[0], save_path='decomposition.png'),
    ]
    for figure, name in zip(figures, ('results.png', 'attention_evolution.png', 'decomposition.png'), strict=True):
        in_a_notebook = Image.open(io.BytesIO(figure._repr_png_()))  # Jupyter calls this for a cell that ends in `fig`
        assert isinstance(figure, Figure) and np.asarray(in_a_notebook).std() > 10
        with Image.open(name) as picture:
            assert min(picture.size) > 300 and np.array_equal(picture, in_a_notebook)


@pytest.mark.parametrize('K', [1, 7, 23])
def test_any_number_of_slots_iterations_and_images(K):
    for B in (1, 2):
        images, recons, masks, attn, rgbs, labels = scene(B, K, T=3)
        texts = texts_of(visualize_slots(images, recons, masks, None, rgbs, labels, empty_slots=True))
        assert sum(re.match(r'\d+(:.*%| empty)$', text) is not None for text in texts) == B * K
        assert sum(text.startswith('FG-ARI') for text in texts) == B + 1
    visualize_slot_decomposition(images[:1], recons[:1], masks[:1], None, rgbs[:1], labels[:1])
    for T in (1, 3):
        texts = texts_of(visualize_attention_evolution(attn[:, :T], images=images, index=1))
        assert any(text.startswith(f'iteration {T}\nentropy') for text in texts) and f'slot {K}' in texts


def test_a_batch_of_another_number_format_with_a_gradient_is_drawn_alike():
    images, recons, masks, attn, rgbs, labels = (x.bfloat16() if x.is_floating_point() else x for x in scene())
    visualize_slots(images.requires_grad_(), recons, masks, None, rgbs, labels)
    visualize_attention_evolution(attn, images=images)
    visualize_slot_decomposition(images[0], recons[0], masks[0], None, rgbs[0], labels[0])


@pytest.mark.parametrize('K', [4, 30])
def test_a_slot_has_the_same_colour_in_every_figure_and_no_other_has_it(K):
    labels = torch.arange(36).clamp(max=K - 1).view(1, 6, 6)  # the last slot is the background or the last pixels
    images, recons, *_ = scene(1, size=6)
    masks = one_hot(labels, K)
    figures = [
        visualize_slots(images, recons, masks),
        visualize_attention_evolution(masks[:, None, :, 0], images=images),
        visualize_slot_decomposition(images[0], recons[0], masks[0]),
    ]
    colours = strips_of(figures[0])
    assert len(set(colours)) == K and colours[-1] == tuple(visualize.BACKGROUND)
    assert all(strips_of(figure)[:K] == colours for figure in figures)
    tinted = panels_of(figures[0])[3].reshape(-1, 3).round(3)  # with outlines in the colours of the slots
    assert set(colours[:-1]) <= set(map(tuple, tinted))


def test_the_background_is_last_and_empty_slots_are_left_out_or_dimmed():
    labels = torch.ones(1, 16, 16, dtype=torch.long)
    labels[0, :4, :4] = 3
    images, recons, *_ = scene(1)
    masks = one_hot(labels, 4)
    panels = ['input', 'reconstruction', 'error', 'segmentation']
    assert texts_of(visualize_slots(images, recons, masks)) == [*panels, '4: 6.2 %', '2: 93.8 %']
    figure = visualize_slots(images, recons, masks, empty_slots=True)
    assert texts_of(figure) == [*panels, '1 empty', '3 empty', '4: 6.2 %', '2: 93.8 %']
    assert [panel.get_alpha() for panel in figure.axes[0].images] == [1, 1, 1, 1, 0.35, 0.35, 1, 1]
    assert len(panels_of(visualize_slot_decomposition(images[0], recons[0], masks[0]))) == 3 * 3


def test_the_last_running_sum_is_the_reconstruction():
    images, recons, masks, _, rgbs, _ = scene(1, 5)
    panels = panels_of(visualize_slot_decomposition(images[0], recons[0], masks[0], None, rgbs[0]))
    assert np.allclose(panels[-1], panels[len(panels) // 3], atol=1e-5)


def test_images_without_labelled_objects_have_no_score_and_do_not_count():
    images, recons, masks, _, rgbs, labels = scene(3)
    labels[0], labels[1] = 0, 255
    texts = texts_of(visualize_slots(images, recons, masks, None, rgbs, labels))
    score = fg_ari(labels, masks)[2]
    assert [text for text in texts if 'FG-ARI' in text] == [
        f'FG-ARI\n{score:.2f}',
        f'FG-ARI {score:.3f}, mean of 1 images',
    ]
    unlabelled = visualize_slots(images[:2], recons[:2], masks[:2], labels=labels[:2])
    assert not any('FG-ARI' in text for text in texts_of(unlabelled))


def test_the_error_is_dark_where_the_picture_is_right():
    images, recons = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    recons[:, :, 3, 3] = 1
    bright = panels_of(visualize_slots(images, recons, torch.ones(1, 1, 1, 16, 16)))[2].sum(2) > 1
    assert bright[3, 3] and bright.sum() == 1


def test_of_many_iterations_ten_are_drawn_from_the_first_to_the_last():
    texts = texts_of(visualize_attention_evolution(torch.rand(1, 20, 3, 8, 8).softmax(2)))
    shown = [int(text.split()[1]) for text in texts if text.startswith('iteration')]
    assert len(shown) == 10 and shown == sorted(shown) and (shown[0], shown[-1]) == (1, 20)


def test_each_iteration_shows_its_entropy_and_its_ari_with_the_previous_one():
    attn = one_hot(torch.randint(0, 3, (1, 8, 8)), 3)[:, :, 0][:, None].repeat(1, 3, 1, 1, 1)
    attn[:, 0] = 1 / 3
    texts = texts_of(visualize_attention_evolution(attn))
    assert 'iteration 1\nentropy 1.00' in texts and 'iteration 3\nentropy 0.00\nARI 1.00' in texts


def test_shapes_that_do_not_fit_are_named():
    images, recons, masks, attn, *_ = scene()
    with pytest.raises(ValueError, match='masks must have 5 dimensions'):
        visualize_slots(images, recons, masks[:, :, 0])
    with pytest.raises(ValueError, match='attn must have 5 dimensions'):
        visualize_attention_evolution(attn[0, 0])
    with pytest.raises(ValueError, match='attn must be square, not 8 x 7'):
        visualize_attention_evolution(attn[..., :7])
    with pytest.raises(ValueError, match='images must be square, not 16 x 12'):
        visualize_slots(images[..., :12], recons, masks)
    with pytest.raises(ValueError, match='masks must be square'):
        visualize_slot_decomposition(images[0], recons[0], masks[0, ..., :12])


def test_text_of_vector_files_is_text():
    images, recons, masks, *_ = scene(1, 3)
    visualize_slots(images, recons, masks, 'slots.svg')
    assert '>reconstruction</text>' in Path('slots.svg').read_text()
    visualize_slots(images, recons, masks, 'slots.pdf')
    assert Path('slots.pdf').read_bytes().startswith(b'%PDF')


def test_figures_leave_no_memory_behind():
    images, recons, masks, *_ = scene(1, 2)
    figure = weakref.ref(visualize_slots(images, recons, masks, 'slots.png'))
    gc.collect()
    assert figure() is None


def test_the_settings_of_the_user_change_no_figure():
    images, recons, masks, attn, rgbs, labels = scene(1, 3)
    model, slots = small_model(), torch.randn(2, 4, 16)
    slots[..., 2] = 0.5  # scales are positive
    log_curves('logs/a', {'val/fg_ari': [(60, 0.5), (120, 0.6)]})
    table = [dict(num_slots=K, num_iterations=T, mse=0.1, fg_ari=0.2 * K) for K in (2, 3) for T in (1, 2)]

    def draw():
        visualize_slots(images, recons, masks, 'slots.png', rgbs, labels)
        visualize_attention_evolution(attn, 'attention.png', images)
        visualize_slot_decomposition(images[0], recons[0], masks[0], 'decomposition.png', rgbs[0])
        visualize.visualize_edit(model, slots, 'swap', 'edit.png')
        visualize.visualize_training(['logs/a'], 'training.png')
        visualize.visualize_sweep(table, 'sweep.png')
        visualize.animate_attention(attn, images, 'attention.gif')
        Path('notebook.png').write_bytes(visualize_slots(images, recons, masks)._repr_png_())
        return {path: path.read_bytes() for path in Path().glob('*.*')}

    ours = draw()
    settings = {
        'image.origin': 'lower', 'text.usetex': True, 'font.size': 20, 'font.family': 'monospace', 'axes.grid': True,
        'figure.dpi': 50, 'savefig.dpi': 30, 'savefig.bbox': 'tight', 'savefig.facecolor': 'red',
        'figure.autolayout': True, 'axes.titlesize': 40, 'lines.linewidth': 9,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        assert draw() == ours and len(ours) == 8
        assert matplotlib.rcParams['figure.dpi'] == 50  # and the settings stay the user's


# Animations and operations on slots


def test_a_gif_has_a_frame_for_each_iteration():
    images, _, _, attn, *_ = scene(2, 3, T=4)
    visualize.animate_attention(attn, images, 'attention.gif', index=1)
    with Image.open('attention.gif') as gif:
        assert gif.n_frames == 4 and gif.info['loop'] == 0
        assert [gif.seek(frame) or gif.info['duration'] for frame in range(4)] == [600, 600, 600, 1800]
    with pytest.raises(ValueError, match=r'attention\.gif needs at least two frames, not 1'):
        visualize.animate_attention(attn[:, :1], images, 'attention.gif')


def test_frames_that_are_alike_are_kept():
    images, recons, masks, *_ = scene(1, 3)
    visualize.save_gif([visualize_slots(images, recons, masks) for _ in range(3)], 'still.gif', 100)
    with Image.open('still.gif') as gif:
        assert sum(gif.seek(frame) or gif.info['duration'] for frame in range(gif.n_frames)) == 500


def test_a_gif_keeps_the_colour_of_flat_areas():
    """A grey background is grey, however many other colours there are."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pixels[16:, :] = 207
    fig = Figure(figsize=(1, 1), dpi=64)
    fig.figimage(pixels)
    visualize.save_gif([fig, fig], 'grey.gif')
    with Image.open('grey.gif') as gif:
        assert np.abs(np.asarray(gif.convert('RGB'))[20:60, 4:60].astype(int) - 207).max() <= 1


def small_model(**changes):
    torch.manual_seed(0)
    config = dict(resolution=16, hidden_dim=8, slot_dim=16, num_slots=4, num_iterations=3) | changes
    return create_model(ModelConfig(**config)).eval()


@pytest.mark.parametrize('architecture', ['fast', 'paper'])
def test_edits_show_before_the_slot_and_after(architecture):
    model, slots = small_model(architecture=architecture), torch.randn(2, 4, 16)
    slots[..., 2] = 0.5  # scales are positive
    edits = {edit: panels_of(visualize.visualize_edit(model, slots, edit)) for edit in visualize.EDITS}
    assert [len(edits[edit]) // 2 for edit in ('remove', 'copy', 'swap', 'interpolate')] == [3, 4, 6, 8]
    with torch.no_grad():
        masks = model.decode(slots[:1])[1][0, :, 0]
    k = masks.flatten(1).argmax(0).bincount(minlength=4).argsort(descending=True)[1]  # the largest but the background
    before, _, removed = edits['remove'][:3]
    changed = np.abs(before - removed).max(2)
    assert changed.max() > 1e-3 and changed[masks[k] < 1e-3].max(initial=0) < 0.01
    first, last = edits['interpolate'][2], edits['interpolate'][6]  # nothing yet, all of it
    assert np.allclose(first, before, atol=1e-6) and not np.allclose(last, before, atol=1e-3)
    assert np.allclose(last, edits['swap'][4], atol=1e-6)  # the object of the next image in place of its own


def test_edits_need_slots_and_images():
    model, slots = small_model(), torch.randn(2, 4, 16)
    slots[..., 2] = 0.5  # scales are positive
    different = [slots[0], torch.cat([slots[1], slots[1, :2]])]  # images may have different numbers of slots
    assert len(panels_of(visualize.visualize_edit(model, different, 'swap'))) == 12
    with pytest.raises(ValueError, match='edit must be one of'):
        visualize.visualize_edit(model, slots, 'paint')
    with pytest.raises(ValueError, match='swap needs at least 2 slots and 2 images'):
        visualize.visualize_edit(model, slots[:1], 'swap')
    with pytest.raises(ValueError, match='remove needs at least 2 slots'):
        visualize.visualize_edit(model, slots[:, :1], 'remove')


# Training curves


def log_curves(folder, curves):
    """Writes curves {tag: [(seconds since the start, value), ...]} as TensorBoard files."""
    start = time.time()
    with SummaryWriter(folder) as writer:
        for tag, points in curves.items():
            for seconds, value in points:
                writer.add_scalar(tag, value, int(seconds), walltime=start + seconds)


def curves_of(figure):
    return {
        text.get_text(): (np.round(line.get_xdata(), 1).tolist(), np.round(line.get_ydata(), 3).tolist())
        for text, line in zip(figure.legends[0].get_texts(), figure.axes[0].lines, strict=True)
    }


def test_training_curves_show_the_score_over_minutes(capsys):
    log_curves('logs/fast', {'val/fg_ari': [(60, 0.5), (120, 0.75)], 'train/lr': [(1, 1)]})
    log_curves('logs/paper', {'val/fg_ari': [(180, 0.25)]})
    log_curves('logs/unmasked', {'val/mse': [(60, 0.1)]})
    assert run('--training') == 0 and Path('visualizations/training.png').is_file()
    figure = visualize.visualize_training(['logs/fast', 'logs/paper', 'logs/unmasked'])
    assert curves_of(figure) == {
        'logs/fast: 0.750 after 2.0 minutes': ([1, 2], [0.5, 0.75]),
        'logs/paper: 0.250 after 3.0 minutes': ([3], [0.25]),
        'logs/unmasked: no FG-ARI yet': ([], []),
    }
    assert figure.axes[0].get_ylabel() == 'FG-ARI'
    assert visualize.visualize_training(['logs/unmasked']).axes[0].get_ylabel() == 'MSE'
    with pytest.raises(ValueError, match='no training curves in logs'):
        visualize.visualize_training(['logs'])


def test_a_pause_is_not_drawn_as_training_but_a_long_validation_is():
    """A loss every 10 seconds, a validation of 50 seconds every minute, and a pause of ten hours after 3 minutes."""
    start, loss, scores, now = time.time(), [], [], 0
    for minute in range(6):
        now += 36_000 * (minute == 3)
        for _ in range(6):
            now += 10
            loss.append((now, 1))
        now += 50
        scores.append((now, minute / 10))
    log_curves('logs', {'train/loss': loss, 'val/fg_ari': scores})
    ((minutes, _),) = curves_of(visualize.visualize_training(['logs'])).values()
    assert minutes == pytest.approx([110 / 60 * (n + 1) for n in range(6)], abs=0.2 + (time.time() - start) / 60)


def test_curves_of_many_runs_look_different_and_leave_the_plot_its_size():
    for n in range(40):
        log_curves(f'logs/{n:02d} with a rather long name', {'val/fg_ari': [(60, n / 40)]})
    figure = visualize.visualize_training(sorted(Path('logs').iterdir()))
    looks = {(tuple(line.get_color()), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines}
    figure.draw_without_rendering()
    plot, legend = figure.axes[0].get_tightbbox(), figure.legends[0].get_window_extent()
    assert len(looks) == 40 and plot.height > 250 and not legend.overlaps(plot) and legend.y0 >= 0


def test_names_of_runs_are_no_formulas():
    log_curves('logs/a$_$\n', {'val/fg_ari': [(60, 0.5)]})
    visualize.visualize_training(['logs/a$_$\n'], save_path='training.svg')
    assert 'logs/a$_$?' in Path('training.svg').read_text()


# Command line

DATA = dict(dataset_type='shapes', resolution=16, max_objects=3, min_objects=1)


def small_checkpoint(path, step=0, data=DATA, **config):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, small_model(**dict(num_slots=3) | config), data=data, progress={'step': step})
    return Path(path)


def test_the_checkpoint_of_the_most_steps_is_drawn_whatever_the_dates(capsys):
    older = small_checkpoint('logs/run_1/checkpoints/last.pth', 5)
    newer = small_checkpoint('logs/checkpoints/best_model.pth', 20)
    os.utime(newer, (1, 1))  # copying a folder changes the dates
    assert older.stat().st_mtime > newer.stat().st_mtime and run('--num_images', 2) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f'drawing {newer} at step 20'
    names = {'slots.png'} | {f'{figure}_{i}.png' for figure in ('attention_evolution', 'decomposition') for i in (0, 1)}
    assert {Path(line).name for line in printed[1:]} == names and all(Path(line).is_file() for line in printed[1:])
    assert run('--checkpoint', 'logs/run_1', '--num_images', 1) == 0  # a folder means its last.pth
    assert f'drawing {older} at step 5' in capsys.readouterr().out


def test_without_a_checkpoint_the_weights_of_the_repository_are_drawn(monkeypatch, capsys):
    weights = small_checkpoint('repository/shapes.pth')
    monkeypatch.setattr(visualize, 'PRETRAINED', {'shapes': weights})
    monkeypatch.setenv('HOME', os.getcwd())
    for flags in ((), ('--pretrained', 'shapes')):
        assert run('--num_images', 1, '--output_dir', '~/elsewhere', *flags) == 0
        printed = capsys.readouterr().out
        assert f'drawing {weights}' in printed and ('no checkpoint under logs' in printed) == (not flags)
    assert Path('elsewhere/slots.png').is_file()
    assert run('--log_dir', 'copy') == 2  # a folder that is named is not replaced by something else
    assert 'no checkpoint under copy; python train.py writes one' in capsys.readouterr().err
    monkeypatch.setattr(visualize, 'PRETRAINED', {})
    assert run() == 2
    assert 'no checkpoint under logs' in capsys.readouterr().err


@pytest.mark.skipif(sys.platform in ('darwin', 'win32'), reason='file names are Unicode there')
def test_a_notebook_a_latin_1_folder_and_an_ascii_terminal_do_not_matter():
    """As `!python visualize.py` in a notebook whose environment has another matplotlib."""
    folder = os.fsdecode(b'M\xfcnchen')
    small_checkpoint(f'{folder}/last.pth')
    environment = os.environ | {'MPLBACKEND': 'module://not_installed.backend', 'PYTHONIOENCODING': 'ascii'}
    command = [sys.executable, visualize.__file__, '--log_dir', folder, '--output_dir', folder, '--num_images', '1']
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0 and Path(folder, 'slots.png').is_file(), done.stderr


def test_edits_of_a_checkpoint():
    small_checkpoint('logs/checkpoints/last.pth')
    assert run('--edit', '--num_images', 2, '--format', 'svg', '--num_slots', 4) == 0
    assert all(Path(f'visualizations/edit_{edit}.svg').is_file() for edit in visualize.EDITS)


def test_a_sweep_has_the_scores_of_every_call():
    model = slot_attention.load_model(small_checkpoint('logs/last.pth', num_slots=2, spare_slots=4, num_iterations=4))
    batch = create_dataset(split='val', size=3, **DATA).__getitems__(range(3))
    assert run('--sweep', '--num_images', 3) == 0
    with open('visualizations/sweep.csv') as file:
        rows = list(csv.DictReader(file))
    assert {row['num_slots'] for row in rows} == {'2', '3', '4', '5', '6'}  # more than in training, too
    (row,) = (row for row in rows if (row['num_slots'], row['num_iterations']) == ('5', '4'))  # 4: of the model
    with torch.no_grad():
        options = dict(num_slots=5, num_iterations=4, generator=torch.Generator().manual_seed(0))
        recons, masks, *_ = model(batch['image'], **options)
    assert float(row['mse']) == pytest.approx(F.mse_loss(recons, batch['image']).item(), rel=1e-4)
    assert float(row['fg_ari']) == pytest.approx(fg_ari(batch['mask'], masks).nanmean().item(), abs=1e-4)
    table = [{name: float(value) for name, value in row.items()} for row in rows]
    assert f'{table[-1]["fg_ari"]:.2f}' in texts_of(visualize.visualize_sweep(table, 'sweep.png'))
    mse = table[-1]['mse']
    for row in table:
        del row['fg_ari']  # as without masks
    assert f'{mse:.4f}' in texts_of(visualize.visualize_sweep(table))


def test_search_refines_the_slots_and_says_so():
    small_checkpoint('logs/checkpoints/last.pth')
    for flags in ((), ('--search',)):
        assert run('--num_images', 1, '--format', 'svg', '--output_dir', f'out{len(flags)}', *flags) == 0
    plain, refined = (Path(folder, 'slots.svg').read_text() for folder in ('out0', 'out1'))
    assert 'refined slots' in refined and 'refined slots' not in plain


def test_how_slots_emerged_has_a_frame_for_each_step(capsys):
    small_checkpoint('logs/checkpoints/last.pth', 20)
    assert run('--gif', '--checkpoint', 'logs') == 2  # one frame is no animation
    assert '--save_every 1' in capsys.readouterr().err and not Path('visualizations').exists()
    for step in (5, 20, 10):
        small_checkpoint(f'logs/checkpoints/checkpoint_epoch_{step}.pth', step)  # 20: the same step again
    for folder in ('logs', 'logs/checkpoints'):
        assert run('--gif', '--checkpoint', folder, '--num_images', 1) == 0
        with Image.open('visualizations/emergence.gif') as gif:
            assert gif.n_frames == 3
            panels = [gif.seek(n) or np.asarray(gif.convert('RGB'))[40:] for n in range(3)]
    assert all(np.array_equal(panels[0], other) for other in panels)  # the weights are equal, and so is the noise
    assert run('--gif', '--num_images', 2) == 0
    with Image.open('visualizations/attention_evolution_1.gif') as gif:
        assert gif.n_frames >= 3  # iterations


# Own pictures and sequences


class Colours:
    """A model for pictures in four flat colours. A slot is the number of a colour, NEW or ABSENT.

    A slot keeps its colour while the picture has it; a new slot takes one that no other slot has. Attention and masks
    are the pixels of the colour.
    """

    NEW, ABSENT = -1, -2
    palette = torch.tensor([[128, 128, 128], [255, 0, 0], [0, 255, 0], [0, 0, 255]]) / 127.5 - 1  # 0: grey
    config = SimpleNamespace(resolution=16)

    def __init__(self, order=(0, 1, 2, 3)):
        self.slot_attention, self.order, self.num_slots = self, order, 5

    def initial_slots(self, batch_size, num_slots, generator):
        return torch.full((batch_size, num_slots, 1), float(self.NEW))

    def encode(self, images, slots, num_iterations=None):
        difference = (images[:, None] - self.palette[None, :, :, None, None]).square().sum(2)  # [B, 4, H, W]
        self.labels, slots = difference.argmin(1), slots.clone()
        for labels, of_image in zip(self.labels, slots, strict=True):
            free = [colour for colour in self.order if (labels == colour).any() and colour not in of_image]
            for k, slot in enumerate(of_image.flatten().tolist()):
                if slot == self.NEW:
                    of_image[k] = free.pop(0) if free else self.ABSENT
                elif not (labels == slot).any():
                    of_image[k] = self.ABSENT
        return slots, (self.labels[:, None] == slots[..., None]).float()[:, None].expand(-1, 2, -1, -1, -1)

    def decode(self, slots):
        masks = (self.labels[:, None] == slots[..., None]).float()[:, :, None]
        return self.palette[slots.clamp(min=0).long().squeeze(2)][..., None, None].expand(-1, -1, -1, 16, 16), masks


def draw_with(monkeypatch, model, *flags):
    """Runs the script with another model; returns what it draws as slots: the arguments of visualize_slots()."""
    seen = []

    def watched(images, recons, masks, *args, **kwargs):
        seen.append((images, masks, *args, kwargs.get('labels')))
        return visualize_slots(images, recons, masks, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(visualize, 'build_model', lambda *args: model)
        patch.setattr(visualize, 'visualize_slots', watched)
        assert run(*flags) == 0
    return seen


def picture(width, height, *boxes):
    """A grey picture with boxes (left, top, right, bottom, colour)."""
    image = Image.new('RGB', (width, height), (128, 128, 128))
    for left, top, right, bottom, colour in boxes:
        image.paste(colour, (left, top, right, bottom))
    return image


def test_a_slot_keeps_its_number_from_frame_to_frame(monkeypatch):
    """Red moves, blue comes, red goes and comes back; slots that are absent in every frame are left out."""
    path = small_checkpoint('logs/checkpoints/last.pth')
    red, blue = (lambda x: (x, 2, x + 4, 6, '#ff0000')), (lambda x: (x, 9, x + 4, 13, '#0000ff'))
    sequence = [[red(1)], [red(3)], [red(5), blue(2)], [blue(4)], [blue(6)], [red(9), blue(8)]]
    Path('frames').mkdir()
    for n, boxes in enumerate(sequence):
        picture(16, 16, *boxes).save(f'frames/f{n + 8}.png')  # natural order: f9 before f10
    Path('frames/f9_mask.png').write_bytes(Path('frames/f8.png').read_bytes())  # a mask is no frame
    seen = draw_with(monkeypatch, Colours(order=(1, 0, 3, 2)), '--frames', 'frames', '--checkpoint', path)
    drawn = []
    for _, masks, *_ in seen:
        colours = [(mask[0] > 0).any().item() for mask in masks[0]]
        drawn.append(''.join(f'{k}' for k, there in enumerate(colours) if there))
    assert drawn == ['01', '01', '012', '12', '12', '012'] and seen[0][1].shape[1] == 3
    for images, masks, *_ in seen:
        assert (images[0, 0][masks[0, 0, 0] > 0] > 0.5).all() and (images[0, 2][masks[0, 2, 0] > 0] > 0.5).all()
    with Image.open('visualizations/frames.gif') as gif:
        assert gif.n_frames == 6


@pytest.mark.parametrize('architecture', ['fast', 'paper'])
def test_frames_come_in_natural_order_without_unreadable_ones(capsys, monkeypatch, architecture):
    small_checkpoint('logs/checkpoints/last.pth', architecture=architecture)
    Path('frames').mkdir()
    for n in (1, 2, 10):
        Image.new('RGB', (16, 16), (20 * n, 0, 0)).save(f'frames/f$_${n}.png')  # no formula
    Path('frames/frame3.png').write_text('no picture')
    seen = draw_with(monkeypatch, slot_attention.load_model('logs/checkpoints/last.pth'), '--frames', 'frames')
    assert [round((images[0, 0, 0, 0].item() + 1) * 127.5) for images, *_ in seen] == [20, 40, 200]
    error = capsys.readouterr().err
    assert 'frames/frame3.png' in error and error.startswith('skipped') and error.count('\n') == 1


def test_edits_leave_out_images_of_one_slot(capsys, monkeypatch):
    small_checkpoint('logs/checkpoints/last.pth')
    for n, colour in enumerate(('#ff0000', '#0000ff', '#808080')):
        picture(16, 16, (2, 2, 9, 9, colour)).save(f'{n}.png')
    draw_with(monkeypatch, Colours(), '--edit', '--image', '0.png', '2.png', '1.png')
    assert 'left out 1 images' in capsys.readouterr().out
    monkeypatch.setattr(visualize, 'build_model', lambda *args: Colours())
    assert run('--edit', '--image', '0.png', '2.png') == 2
    assert '--edit needs two images' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('kind', 'size', 'box'),
    [('shapes', (60, 40), (10, 0, 50, 40)), ('clevr6', (320, 240), (64, 29, 256, 221)),
     ('clevr6', (480, 360), (96, 44, 384, 332))],
)  # fmt: skip
def test_the_mask_of_a_picture_has_its_size_and_the_numbers_and_colours_of_the_slots(monkeypatch, kind, size, box):
    """0 is the background's slot, others have the numbers of the figures, 255 is not seen: CLEVR has a window."""
    path = small_checkpoint('some.pth', data=DATA | {'dataset_type': kind})
    left, top, right, bottom = box
    quarter = (right - left) // 4
    boxes = (left, top, left + quarter, bottom, '#ff0000'), (right - quarter, top, right, bottom, '#0000ff')
    picture(*size, *boxes).save('a.jpg', quality=95)
    ((_, masks, *_),) = draw_with(monkeypatch, Colours(), '--image', 'a.jpg', '--checkpoint', path)
    assert masks[0, 1, 0, :, 0].all() and masks[0, 2, 0, :, -1].all()  # the model sees the window only
    (file,) = Path('visualizations').glob('*mask*')
    with Image.open(file) as mask:
        labels, colours = np.asarray(mask), np.asarray(mask.convert('RGB')) / 255
        assert mask.mode == 'P' and mask.size == size
        assert 'visualize.py' in mask.info['Creator']  # dataset.py does not take it for a label
    seen = labels != 255
    rows, columns = (np.flatnonzero(seen.any(axis)) for axis in (1, 0))
    assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == box and seen.sum() == len(rows) * len(columns)
    middle = labels[(top + bottom) // 2, left:right]
    assert (middle[: quarter - 9] == 2).all() and (middle[quarter + 9 : -quarter - 9] == 0).all()
    assert (middle[9 - quarter :] == 3).all()
    strips = strips_of(visualize_slots(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), masks))
    assert np.allclose(colours[(top + bottom) // 2, left + 2], strips[0], atol=0.005)


def test_masks_of_pictures_of_the_same_name_and_of_tiny_ones_are_written():
    small_checkpoint('logs/checkpoints/last.pth')
    paths = []
    for n, size in enumerate([(4, 1), (1, 3), (1, 1)]):
        Path(f'{n}').mkdir()
        paths.append(f'{n}/tiny.png')
        Image.new('RGB', size, 'red').save(paths[-1])
    assert run('--image', *paths) == 0
    sizes = sorted(Image.open(path).size for path in Path('visualizations').glob('tiny*_mask.png'))
    assert sizes == [(1, 1), (1, 3), (4, 1)]


def test_pictures_and_masks_that_were_moved_are_named_by_flags(monkeypatch):
    for folder in ('pictures', 'labels'):
        Path(folder).mkdir()
    for n in range(3):
        picture(16, 16, (2, 2, 9, 9, 'red')).save(f'pictures/{n}.png')
        Image.new('L', (16, 16), 1).save(f'labels/{n}.png')
    data = dict(dataset_type='images', data_dir='gone', masks='../gone/{name}.png', resolution=16)
    small_checkpoint('logs/checkpoints/last.pth', data=data)
    model = slot_attention.load_model('logs/checkpoints/last.pth')
    labels = draw_with(monkeypatch, model, '--data_dir', 'pictures', '--masks', '../labels/{name}.png')[0][-1]
    assert (labels == 1).all()
    assert run('--data_dir', 'pictures') == 0  # the saved pattern is that of other pictures


# Mistakes


@pytest.mark.parametrize(
    'argv',
    [
        '--frames F --image x.png', '--frames F --num_images 3', '--frames F --format svg', '--sweep --num_slots 3',
        '--sweep --search', '--training --num_slots 3', '--training --checkpoint x.pth', '--image x.png --num_images 3',
        '--image x.png --data_dir data', '--gif --search', '--gif --format svg', '--checkpoint x.pth --log_dir other',
        '--sweep --edit', '--gif --frames F',
    ],
)  # fmt: skip
def test_flags_without_effect_are_refused(capsys, argv):
    with pytest.raises(SystemExit) as exit:
        run(*argv.split())
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count('\n') == 1
    assert error.startswith('visualize.py: error: ') and 'has no effect' in error


@pytest.mark.parametrize(
    'argv',
    ['--num_slots 0', '--num_slots 300', '--num_iterations 0', '--num_images 0', '--num_images 1000000000', '--seed -1',
     '--wrong', '--num_slots x'],
)  # fmt: skip
def test_mistakes_on_the_command_line_cost_one_line(capsys, argv):
    with pytest.raises(SystemExit) as exit:
        run(*argv.split())
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count('\n') == 1 and error.startswith('visualize.py: error: ')


@pytest.mark.parametrize(
    ('flags', 'parts'),
    [
        (['--training', '--log_dir', 'my logs'], ["python train.py --log_dir 'my logs'"]),
        (
            ['--checkpoint', 'shapes.pth', '--frames', 'my frames'],
            ['--frames needs a folder', '.png', 'my frames has 0'],
        ),
        (['--gif', '--checkpoint', 'my frames'], ['my frames has 0', '--save_every 1']),
        (['--checkpoint', 'my frames'], ['no checkpoint at my frames']),
        (['--checkpoint', 'nowhere.pth'], ['no checkpoint at nowhere.pth']),
        (['--checkpoint', 'shapes.pth', '--data_dir', 'data'], ['--data_dir has no effect', 'shapes']),
        (['--checkpoint', 'shapes.pth', '--masks', '{name}.png'], ['--masks has no effect', 'shapes']),
        (['--checkpoint', 'bare.pth'], ['bare.pth', '--image']),
        (['--checkpoint', 'shapes.pth', '--edit', '--num_images', 1], ['--edit needs two images']),
        (['--checkpoint', 'shapes.pth', '--output_dir', 'shapes.pth/figures'], ['shapes.pth/figures']),
        (['--checkpoint', 'shapes.pth', '--image', 'nowhere.png'], ['nowhere.png cannot be read as a picture']),
    ],
)
def test_a_mistake_costs_one_line_that_names_the_source_and_the_remedy(capsys, flags, parts):
    Path('my frames').mkdir()
    small_checkpoint('shapes.pth')
    save_checkpoint('bare.pth', small_model())
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert error.startswith('visualize.py: error: ') and error.count('\n') == 1
    assert all(part in error for part in parts) and not Path('visualizations').exists()


def test_data_of_an_older_version_are_drawn_with_what_is_known(capsys):
    small_checkpoint('older.pth', data=DATA | {'colours': 3})
    assert run('--checkpoint', 'older.pth', '--num_images', 1) == 0
    assert 'ignored colours in the data of older.pth' in capsys.readouterr().out


class Interrupting(ModuleType):
    """A module during whose import Ctrl-C is pressed."""

    def __getattr__(self, name):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize('when', ['import', 'run'])
def test_ctrl_c_is_one_line_and_130(monkeypatch, capsys, when):
    monkeypatch.setattr(sys, 'argv', ['visualize.py', '--checkpoint', 'any.pth'])
    if when == 'import':
        monkeypatch.setitem(sys.modules, 'dataset', Interrupting('dataset'))
    else:
        monkeypatch.setattr(slot_attention, 'load_checkpoint', lambda path: signal.raise_signal(signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)) as exit:
            runpy.run_path(visualize.__file__, run_name='__main__')
    finally:
        signal.signal(signal.SIGINT, before)
    assert exit.type is SystemExit and exit.value.code == 130
    assert capsys.readouterr().err == 'visualize.py: interrupted\n'
