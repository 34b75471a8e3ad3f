"""Figures for any number of slots, a slot's colour in every panel, operations on slots, and the script."""

import csv
import gc
import os
import re
import resource
import runpy
import signal
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch.utils.tensorboard import SummaryWriter

import slot_attention
import visualize
from slot_attention import ModelConfig, SlotAttentionAutoEncoder, fg_ari, refine, save_checkpoint
from visualize import visualize_attention_evolution, visualize_slot_decomposition, visualize_slots


@pytest.fixture(autouse=True)
def without_a_screen(monkeypatch):
    monkeypatch.delenv('DISPLAY', raising=False)


def scene(B=2, K=7, size=16, T=3):
    images = torch.rand(B, 3, size, size) * 2 - 1
    rgbs = torch.rand(B, K, 3, size, size) * 2 - 1
    masks = torch.randn(B, K, 1, size, size).softmax(1)
    attn = torch.randn(B, T, K, size // 2, size // 2).softmax(2)
    return images, (rgbs * masks).sum(1), masks, attn, rgbs, torch.randint(0, 3, (B, size, size))


def run(*flags):
    return visualize.main(visualize.parse_args([str(flag) for flag in flags]))


def texts_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_the_calls_of_the_readme():
    images, recons, masks, attn, *_ = scene()
    figures = [
        visualize_slots(images, recons, masks, save_path='results.png'),
        visualize_attention_evolution(attn, save_path='attention_evolution.png'),
        visualize_slot_decomposition(images[0], recons[0], masks[0], save_path='decomposition.png'),
    ]
    assert all(isinstance(figure, Figure) for figure in figures)
    for name in ('results.png', 'attention_evolution.png', 'decomposition.png'):
        with Image.open(name) as picture:
            assert min(picture.size) > 300 and np.asarray(picture).std() > 10


@pytest.mark.parametrize('K', [*range(1, 12), 23])
def test_any_number_of_slots_iterations_and_images(K):
    for B in (1, 2):
        images, recons, masks, attn, rgbs, labels = scene(B, K, T=5)
        texts = texts_of(visualize_slots(images, recons, masks, None, rgbs, labels))
        assert sum(re.match(r'\d+(:.*%| empty)$', text) is not None for text in texts) == B * K
        assert sum(text.startswith('FG-ARI') for text in texts) == B + 1
    visualize_slot_decomposition(images[:1], recons[:1], masks[:1], None, rgbs[:1], labels[:1])
    for T in range(1, 6):
        texts = texts_of(visualize_attention_evolution(attn[:, :T], images=images, index=1))
        assert any(text.startswith(f'iteration {T}\nentropy') for text in texts) and f'slot {K}' in texts


def test_a_batch_on_another_device_type_or_number_format_is_drawn_alike():
    images, recons, masks, attn, rgbs, labels = (x.bfloat16() if x.is_floating_point() else x for x in scene())
    visualize_slots(images.requires_grad_(), recons, masks, None, rgbs, labels)
    visualize_attention_evolution(attn, images=images)
    visualize_slot_decomposition(images[0], recons[0], masks[0], None, rgbs[0], labels[0])


def one_hot(labels, K):
    """labels [B, H, W] -> masks [B, K, 1, H, W]"""
    return F.one_hot(labels, K).permute(0, 3, 1, 2)[:, :, None].float()


def test_a_slot_has_the_same_colour_everywhere_and_no_other_has_it():
    colours = visualize.slot_colours_of(30)
    assert np.array_equal(colours[:7], visualize.slot_colours_of(7))
    assert len(np.unique(colours.round(3), axis=0)) == 30
    labels = torch.zeros(1, 16, 16, dtype=torch.long)
    labels[0, 4:8, 4:8] = 2
    masks, images = one_hot(labels, 4), scene(1)[0]
    of_slot, tinted = visualize.slot_colours(masks[0]), visualize._overlay(images[0], masks[0])
    assert np.array_equal(of_slot[2], colours[2]) and np.array_equal(of_slot[0], visualize.BACKGROUND)
    grey = visualize._pixels(images[0]).mean(2, keepdims=True).repeat(4, 0).repeat(4, 1)
    assert np.allclose(tinted[20:28, 20:28], 0.35 * grey[20:28, 20:28] + 0.65 * colours[2])  # within
    assert np.allclose(tinted[16, 16:32], colours[2])  # the outline
    assert np.allclose(tinted[:15], grey[:15])  # the background
    (panels,) = visualize._attention_rows(masks[None, :, :, 0], None, 0)[1]
    assert [panel.title for panel in panels] == ['strongest', 'slot 2', 'slot 3', 'slot 4', 'slot 1']
    assert np.array_equal(panels[2].colour, colours[2]) and np.allclose(panels[2].pixels[5, 5], colours[2])


def test_the_background_is_last_and_empty_slots_are_dimmed_or_left_out():
    labels = torch.ones(1, 16, 16, dtype=torch.long)
    labels[0, :4, :4] = 3
    images, recons, *_ = scene(1)
    masks = one_hot(labels, 4)
    panels = visualize._slot_panels(visualize._alone(recons.expand(4, -1, -1, -1), masks[0]), masks[0])
    assert [panel.title for panel in panels] == ['1 empty', '3 empty', '4: 6.2 %', '2: 93.8 %']
    assert [panel.dim for panel in panels] == [True, True, False, False]
    figures = [visualize_slots(images, recons, masks, empty_slots=empty) for empty in (True, False)]
    alphas = [[drawn.get_alpha() for drawn in figure.axes[0].images] for figure in figures]
    assert alphas == [[1, 1, 1, 1, 0.35, 0.35, 1, 1], [1, 1, 1, 1, 1, 1]]


def test_the_last_running_sum_is_the_reconstruction():
    images, recons, masks, _, rgbs, _ = scene(1, 5)
    figure = visualize_slot_decomposition(images[0], recons[0], masks[0], None, rgbs[0])
    assert np.allclose(figure.axes[0].images[-1].get_array(), visualize._pixels(recons[0]), atol=1e-5)


def test_images_without_labelled_objects_have_no_score_and_do_not_count():
    images, recons, masks, _, rgbs, labels = scene(3)
    labels[0], labels[1] = 0, 255
    texts = texts_of(visualize_slots(images, recons, masks, None, rgbs, labels))
    score = fg_ari(labels, masks)[2]
    assert [text for text in texts if 'FG-ARI' in text] == [
        f'FG-ARI\n{score:.2f}',
        f'FG-ARI {score:.3f}, mean of 1 images',
    ]
    assert not any(
        'FG-ARI' in text for text in texts_of(visualize_slots(images[:2], recons[:2], masks[:2], labels=labels[:2]))
    )


def test_the_error_is_dark_where_the_picture_is_right():
    right, wrong = torch.zeros(3, 16, 16), torch.zeros(3, 16, 16)
    wrong[:, 3, 3] = 1
    bright = visualize._error(right, wrong).sum(2) > 1
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

    def peak_after(calls):
        for _ in range(calls):
            visualize_slots(images, recons, masks, 'slots.png')
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = peak_after(200)  # the allocator needs some calls to reach its peak
    assert peak_after(100) - before < 8_000  # kilobytes; a figure's canvas alone has 500
    assert not any(type(thing) is Figure for thing in gc.get_objects())


# Animations


def test_a_gif_has_a_frame_for_each_iteration():
    images, _, _, attn, *_ = scene(2, 3, T=4)
    visualize.animate_attention(attn, images, 'attention.gif', index=1)
    with Image.open('attention.gif') as gif:
        assert gif.n_frames == 4 and gif.info['loop'] == 0
        durations = []
        for frame in range(4):
            gif.seek(frame)
            durations.append(gif.info['duration'])
    assert durations == [600, 600, 600, 1800]


def test_frames_that_are_alike_are_kept():
    images, recons, masks, *_ = scene(1, 3)
    visualize.save_gif([visualize_slots(images, recons, masks) for _ in range(3)], 'still.gif', 100)
    with Image.open('still.gif') as gif:
        durations = [gif.seek(frame) or gif.info['duration'] for frame in range(gif.n_frames)]
    assert sum(durations) == 500


def test_a_gif_keeps_the_colour_of_flat_areas():
    """A grey background is grey, however many other colours there are."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pixels[16:, :] = 207
    fig = Figure(figsize=(1, 1), dpi=64)
    fig.figimage(pixels)
    visualize.save_gif([fig], 'grey.gif')
    with Image.open('grey.gif') as gif:
        assert np.abs(np.asarray(gif.convert('RGB'))[20:60, 4:60].astype(int) - 207).max() <= 1


# Operations on slots


@pytest.mark.parametrize('order', [[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]])
def test_matching_recovers_a_permutation(order):
    masks = torch.randn(3, 4, 1, 16, 16).mul(3).softmax(1)
    noisy = (masks[:, order] + 0.1 * torch.rand(3, 4, 1, 16, 16)).clamp(0, 1)
    found = visualize.match_slots(masks, noisy)
    inverse = torch.tensor(order).argsort()
    assert found.tolist() == [inverse.tolist()] * 3
    again = torch.stack([n[o] for n, o in zip(noisy, found, strict=True)])
    assert (again - masks).abs().max() < 0.2
    with pytest.raises(ValueError, match='cannot be matched'):
        visualize.match_slots(masks, noisy[:, :3])


def test_slots_are_put_in_the_order_of_others():
    """Each image has its own permutation."""
    masks, rgbs = torch.randn(2, 4, 1, 16, 16).mul(3).softmax(1), torch.rand(2, 4, 3, 16, 16)
    orders = torch.tensor([[2, 0, 3, 1], [3, 1, 0, 2]])[:, :, None, None, None]
    mixed = masks.take_along_dim(orders, 1), rgbs.take_along_dim(orders, 1)
    for mended, right in zip(visualize.reorder_slots(masks, *mixed), (masks, rgbs), strict=True):
        torch.testing.assert_close(mended, right, rtol=0, atol=0)


def small_model(**changes):
    torch.manual_seed(0)
    config = dict(resolution=16, hidden_dim=8, slot_dim=16, num_slots=4) | changes
    return SlotAttentionAutoEncoder(ModelConfig(**config)).eval()


@pytest.mark.parametrize('architecture', ['fast', 'paper'])
@torch.no_grad()
def test_removing_a_slot_changes_only_its_own_pixels(architecture):
    model = small_model(architecture=architecture)
    slots = torch.randn(1, 4, 16)
    slots[..., 2] = 0.5  # scales are positive
    rgbs, masks = model.decode(slots)
    before = (rgbs * masks).sum(1)[0]
    for k in range(4):
        rgbs_after, masks_after = model.decode(visualize.remove(slots[0], k)[None])
        after = (rgbs_after * masks_after).sum(1)[0]
        # Each pixel changes by the slot's mask, from the slot's colour to the reconstruction by the others.
        assert torch.allclose(before - after, masks[0, k] * (rgbs[0, k] - after), atol=1e-5)
        assert (before - after).abs().max() > 1e-4 and masks_after.shape[1] == 3


def test_pasting_adds_a_slot_and_removing_it_restores_the_others():
    slots, new = torch.randn(4, 16), torch.randn(16)
    assert torch.equal(visualize.paste(slots, new)[4], new)
    assert torch.equal(visualize.remove(visualize.paste(slots, new), 4), slots)


def test_largest_objects_leave_the_background_out():
    masks = one_hot(torch.tensor([0, 0, 0, 1, 1, 3]).view(1, 1, 6), 4)[0]
    assert visualize.largest_objects(masks, 2) == [1, 3]


def test_edits_show_before_the_slot_and_after():
    model = small_model()
    slots = torch.randn(2, 4, 16)
    slots[..., 2] = 0.5  # scales are positive
    for edit, columns in (('remove', 3), ('copy', 4), ('swap', 6), ('interpolate', 8)):
        panels = visualize.visualize_edit(model, slots, edit, f'{edit}.png').axes[0].images
        assert len(panels) == 2 * columns and Path(f'{edit}.png').is_file()
    different = [slots[0], torch.cat([slots[1], slots[1, :2]])]  # images may have different numbers of slots
    assert len(visualize.visualize_edit(model, different, 'swap').axes[0].images) == 12
    first, last = panels[2].get_array(), panels[6].get_array()  # of the interpolation: nothing yet, all of it
    assert np.allclose(first, panels[0].get_array(), atol=1e-6) and not np.allclose(last, first, atol=1e-3)
    with pytest.raises(ValueError, match='edit must be one of'):
        visualize.visualize_edit(model, slots, 'paint')
    with pytest.raises(ValueError, match='swap needs at least 2 slots and 2 images'):
        visualize.visualize_edit(model, slots[:1], 'swap')
    with pytest.raises(ValueError, match='remove needs at least 2 slots'):
        visualize.visualize_edit(model, slots[:, :1], 'remove')


def test_a_sweep_has_the_scores_of_every_call():
    model = small_model()
    images, *_, labels = scene(3)
    table = visualize.sweep(model, {'image': images, 'mask': labels}, (2, 6), (1, 3))
    assert [(row['num_slots'], row['num_iterations']) for row in table] == [(2, 1), (2, 3), (6, 1), (6, 3)]
    with torch.no_grad():
        recons, masks, *_ = model(images, num_slots=6, num_iterations=3, generator=torch.Generator().manual_seed(0))
    assert table[3]['mse'] == pytest.approx(F.mse_loss(recons, images).item())
    assert table[3]['fg_ari'] == pytest.approx(fg_ari(labels, masks).nanmean().item())
    visualize.visualize_sweep(table, 'sweep.png')
    visualize.visualize_sweep([{name: row[name] for name in row if name != 'fg_ari'} for row in table])


# Command line

DATA = dict(dataset_type='shapes', resolution=16, max_objects=3, min_objects=1)


def small_checkpoint(path, step=0, data=DATA):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, small_model(num_slots=3), data=data, progress={'step': step})
    return path


def test_the_newest_checkpoint_is_drawn(capsys):
    older = small_checkpoint(Path('logs/checkpoints/best_model.pth'))
    newer = small_checkpoint(Path('logs/run_1/checkpoints/last.pth'))
    os.utime(older, (1, 1))
    assert run('--num_images', 2) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f'rendering {newer}'
    assert len(printed) == 6 and all(Path(line).is_file() for line in printed[1:])
    names = {'slots.png'} | {f'{figure}_{i}.png' for figure in ('attention_evolution', 'decomposition') for i in (0, 1)}
    assert {Path(line).name for line in printed[1:]} == names


def test_without_a_checkpoint_the_weights_of_the_repository_are_drawn(monkeypatch, capsys):
    for flags in ((), ('--pretrained', 'shapes')):
        assert run('--num_images', 1, '--output_dir', 'elsewhere', *flags) == 0
        printed = capsys.readouterr().out
        assert 'rendering' in printed and 'tests/pretrained/shapes.pth' in printed
        assert ('no checkpoint under logs' in printed) == (not flags)
    assert Path('elsewhere/slots.png').is_file()
    monkeypatch.setattr(visualize, 'PRETRAINED', {})
    assert run('--num_images', 1) == 2
    assert 'no checkpoint under logs; python train.py writes one' in capsys.readouterr().err


def test_edits_leave_out_images_of_one_slot(capsys, monkeypatch):
    small_checkpoint(Path('logs/checkpoints/last.pth'))
    run_model, kept = visualize.Job.run_model, [4, 1, 4]

    def few_slots(self, images):
        *rest, slots, attn = run_model(self, images)
        return *rest, [s[:n] for s, n in zip(slots, kept, strict=True)], attn

    monkeypatch.setattr(visualize.Job, 'run_model', few_slots)
    assert run('--edit', '--num_images', 3) == 0
    assert 'left out 1 images' in capsys.readouterr().out
    kept[0] = 1
    assert run('--edit', '--num_images', 3) == 2
    assert '--edit needs two images' in capsys.readouterr().err


def test_edits_and_sweeps_of_a_checkpoint(capsys):
    small_checkpoint(Path('logs/checkpoints/last.pth'))
    assert run('--edit', '--num_images', 2, '--format', 'svg') == 0
    assert all(Path(f'visualizations/edit_{edit}.svg').is_file() for edit in visualize.EDITS)
    assert run('--sweep', '--num_images', 2) == 0
    with open('visualizations/sweep.csv') as file:
        rows = list(csv.DictReader(file))
    assert {row['num_slots'] for row in rows} == {'2', '3', '4', '5', '6', '7'}  # more than in training, too
    assert all(0 <= float(row['mse']) < 9 and -1 <= float(row['fg_ari']) <= 1 for row in rows)
    assert Path('visualizations/sweep.png').is_file()


def test_a_sweep_includes_the_iterations_of_the_model():
    path = Path('logs/checkpoints/last.pth')
    path.parent.mkdir(parents=True)
    save_checkpoint(path, small_model(num_slots=2, num_iterations=23), data=DATA, progress={'step': 0})
    assert run('--sweep', '--num_images', 1) == 0
    with open('visualizations/sweep.csv') as file:
        assert [int(row['num_iterations']) for row in csv.DictReader(file) if row['num_slots'] == '2'] == [
            1, 2, 3, 5, 8, 12, 16, 20, 23,
        ]  # fmt: skip


def test_pictures_of_your_own_get_figures_and_integer_labels(capsys):
    small_checkpoint(Path('logs/checkpoints/last.pth'))
    Image.new('RGB', (50, 30), 'red').save('a.jpg')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save('b.png')
    assert run('--image', 'a.jpg', 'b.png') == 0
    printed = [Path(line).name for line in capsys.readouterr().out.splitlines()[1:]]
    masks = {f'{name}_{kind}mask.png' for name in ('a_0', 'b_1') for kind in ('', 'full_')}
    assert {'slots.png', 'decomposition_1.png'} | masks <= set(printed)
    assert all(Path('visualizations', name).is_file() for name in printed)


def test_search_draws_the_refined_slots_that_are_present_and_says_so(monkeypatch, capsys):
    path = small_checkpoint(Path('logs/checkpoints/last.pth'))
    args = visualize.parse_args(['--search', '--num_images', '2'])
    job = visualize.open_checkpoint(path, args)
    images = job.load_batch()['image']

    def encode_with_absent_slots(*args, **kwargs):
        slots, attn = encode(*args, **kwargs)
        slots[0, 1, 2] = slots[1, 0, 2] = 0
        return slots, attn

    encode = job.model.encode
    monkeypatch.setattr(job.model, 'encode', encode_with_absent_slots)
    with torch.no_grad():
        recons, masks, rgbs, slots, _ = job.run_model(images)
        initial = job.model.slot_attention.initial_slots(2, 3, torch.Generator().manual_seed(0))
        found = refine(job.model, images, job.model.encode(images, initial)[0])
    slot_mask = found[..., 2] > 0
    assert slot_mask.tolist() == [[True, False, True], [False, True, True]]
    assert torch.equal(slots[0], found[0][slot_mask[0]]) and torch.equal(slots[1], found[1][slot_mask[1]])
    assert masks[~slot_mask].max() == 0 and torch.allclose(recons, (rgbs * masks).sum(1))
    titles = []
    monkeypatch.setattr(visualize, 'visualize_slots', lambda *args, **_: titles.append(args[-1]))
    assert visualize.main(args) == 0 and titles == ['refined slots']
    assert run('--edit', '--num_slots', 1, '--num_images', 2) == 2
    assert '--edit needs two images' in capsys.readouterr().err


def test_how_slots_emerged_has_a_frame_for_each_step():
    for step in (5, 20, 10):
        small_checkpoint(Path(f'logs/checkpoints/checkpoint_epoch_{step}.pth'), step)
    small_checkpoint(Path('logs/checkpoints/last.pth'), 20)  # the same step again
    assert run('--gif', '--checkpoint', 'logs/checkpoints', '--num_images', 1) == 0
    with Image.open('visualizations/emergence.gif') as gif:
        assert gif.n_frames == 3
    assert run('--gif', '--num_images', 2) == 0
    with Image.open('visualizations/attention_evolution_1.gif') as gif:
        assert gif.n_frames == 3  # iterations


def test_a_slot_keeps_its_number_from_frame_to_frame(monkeypatch):
    """The order of the slots is random in every call, but not in the figures."""
    path = small_checkpoint(Path('logs/checkpoints/last.pth'))
    rng, seen = np.random.default_rng(0), []
    Path('frames').mkdir()
    for n in range(4):
        picture = np.full((16, 16, 3), 90, np.uint8)
        picture[4:8, n : n + 5], picture[10:14, 9 - n : 14 - n] = (255, 0, 0), (0, 0, 255)
        Image.fromarray(picture).save(f'frames/{n:03d}.{"png" if n else "tif"}')
    Image.new('L', (16, 16)).save('frames/001_mask.png')  # a mask is no frame

    def run_model(job, images):
        red, blue = images[:, 0] > 0.5, images[:, 2] > 0.5
        masks = torch.stack([red, blue, ~(red | blue)], dim=1)[:, rng.permutation(3), None].float()
        return images, masks, images[:, None].expand(-1, 3, -1, -1, -1), None, None

    def watched(images, recons, masks, *args, **kwargs):
        seen.append([images[0, 0][masks[0, k, 0] > 0].mean().item() for k in range(3)])
        return visualize_slots(images, recons, masks, *args, **kwargs)

    monkeypatch.setattr(visualize.Job, 'run_model', run_model)
    monkeypatch.setattr(visualize, 'visualize_slots', watched)
    assert run('--frames', 'frames', '--checkpoint', path) == 0
    assert len(seen) == 4 and all(row == pytest.approx(seen[0]) for row in seen)
    with Image.open('visualizations/frames.gif') as gif:
        assert gif.n_frames == 4


def test_training_curves_of_several_runs_share_a_figure(capsys):
    for run_name in ('a', 'b'):
        with SummaryWriter(f'logs/{run_name}') as writer:
            for step in range(1, 4):
                writer.add_scalar('train/loss', 1 / step, step)
                if run_name == 'a':
                    writer.add_scalar('val/fg_ari', step / 4, step)
    assert run('--training') == 0 and Path('visualizations/training.png').is_file()
    figure = visualize.visualize_training(['logs/a', 'logs/b'])
    curves = [[list(line.get_ydata()) for line in ax.lines] for ax in figure.axes]
    assert curves[0] == [pytest.approx([1, 1 / 2, 1 / 3])] * 2 and curves[1][0] == [0.25, 0.5, 0.75]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['logs/a', 'logs/b']
    with pytest.raises(ValueError, match='no training curves in logs'):
        visualize.visualize_training(['logs'])


def test_training_curves_without_masks_show_the_error_instead_of_an_empty_score():
    def labels(tags):
        with SummaryWriter('logs/c') as writer:
            for tag in tags:
                writer.add_scalar(tag, 0.1, 5)
        return [ax.get_ylabel() for ax in visualize.visualize_training(['logs/c']).axes[:3]]

    assert labels(['train/loss']) == 2 * ['training loss']
    assert labels(['val/mse', 'train/lr']) == ['training loss', 'validation MSE', 'learning rate']
    assert labels(['val/fg_ari']) == ['training loss', 'validation FG-ARI', 'learning rate']


def test_training_curves_have_readable_ticks_and_need_no_points_of_every_kind():
    with SummaryWriter('logs/a$_$') as writer:
        writer.add_scalar('val/fg_ari', 0.5, 5)
        writer.add_scalar('train/loss', 0.5, 1)
    with SummaryWriter('logs/a$_$', purge_step=2) as writer:  # resumed before the validation
        writer.add_scalar('train/loss', 0.4, 2)
    visualize.visualize_training(['logs/a$_$'], save_path='training.svg')
    drawn = re.sub('<!--.*?-->', '', Path('training.svg').read_text())  # comments quote the formulas
    assert 'mathdefault' not in drawn


def test_many_runs_leave_the_plots_their_size():
    for n in range(18):
        with SummaryWriter(f'logs/{n:02d} with a rather long name') as writer:
            writer.add_scalar('train/loss', 1, 1)
    folders = sorted(Path('logs').iterdir())

    def inches(figure):
        figure.draw_without_rendering()
        return figure.axes[0].get_position().size * figure.get_size_inches()

    few, many = visualize.visualize_training(folders[:2]), visualize.visualize_training(folders)
    assert np.allclose(inches(few), inches(many), rtol=0.03)
    plots = many.axes[0].get_tightbbox().union([ax.get_tightbbox() for ax in many.axes])
    legend = many.legends[0].get_window_extent()
    assert not legend.overlaps(plots) and many.bbox.x0 <= legend.x0 and legend.x1 <= many.bbox.x1
    looks = {(tuple(line.get_color()), line.get_linestyle()) for line in many.axes[0].lines}
    assert len(looks) == 18


# Own pictures


def drawn_images(monkeypatch, *flags) -> torch.Tensor:
    """The images [B, 3, H, W] that a call of the script draws."""
    seen = []
    monkeypatch.setattr(visualize, 'visualize_slots', lambda images, *args, **kwargs: seen.append(images))
    assert run(*flags) == 0
    return seen[0]


@pytest.mark.parametrize('size', [(320, 240), (480, 320)])
def test_a_picture_for_a_model_of_clevr_is_cropped_and_resized_as_its_data(monkeypatch, size):
    """TFRecords hold 320 x 240 pixels, CLEVR_v1.0 480 x 320; both are cropped to rows 29:221 of 240."""
    path = small_checkpoint(Path('clevr.pth'), data=DATA | {'dataset_type': 'clevr6'})
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    picture.save('scene.png')
    if size != (320, 240):
        picture = picture.resize((360, 240), Image.Resampling.BILINEAR)
    left = (picture.width - 192) // 2
    window = torch.from_numpy(np.array(picture)[29:221, left : left + 192]).permute(2, 0, 1)[None].float()
    expected = F.interpolate(window, (16, 16), mode='bilinear')[0] / 127.5 - 1
    found = drawn_images(monkeypatch, '--image', 'scene.png', '--checkpoint', path)[0]
    assert (found - expected).abs().max() < 1.5 / 127.5


@pytest.mark.parametrize('dataset_type', ['shapes', 'images'])
def test_a_picture_for_other_models_is_cropped_at_the_centre(monkeypatch, dataset_type):
    path = small_checkpoint(Path('other.pth'), data=DATA | {'dataset_type': dataset_type})
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8))
    picture.save('picture.png')
    expected = ImageOps.fit(picture, (16, 16), Image.Resampling.BILINEAR)
    found = drawn_images(monkeypatch, '--image', 'picture.png', '--checkpoint', path)[0]
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_pictures_and_masks_that_were_moved_are_named_by_flags(monkeypatch, capsys):
    for folder in ('pictures', 'labels'):
        Path(folder).mkdir()
    for n in range(3):
        Image.new('RGB', (16, 16), 'red').save(f'pictures/{n}.png')
        Image.new('L', (16, 16), 1).save(f'labels/{n}.png')
    data = dict(dataset_type='images', data_dir='gone', mask_dir='gone', resolution=16)
    small_checkpoint(Path('logs/checkpoints/last.pth'), data=data)
    assert run('--data_dir', 'pictures', '--mask_dir', 'gone') == 2
    assert 'no folder gone; --mask_dir must name' in capsys.readouterr().err
    seen = []
    monkeypatch.setattr(visualize, 'visualize_slots', lambda *args, **kwargs: seen.append(args[5]))
    assert run('--data_dir', 'pictures', '--mask_dir', 'labels') == 0 and (seen.pop() == 1).all()
    assert run('--data_dir', 'pictures') == 0 and seen == [None]  # the saved masks are those of other pictures


@pytest.mark.parametrize('size', [(4, 1), (1, 3), (1, 1)])
def test_tiny_pictures_are_drawn(size):
    small_checkpoint(Path('logs/checkpoints/last.pth'))
    Image.new('RGB', size, 'red').save('tiny.png')
    assert run('--image', 'tiny.png') == 0
    with Image.open('visualizations/tiny_0_full_mask.png') as mask:
        assert mask.size == size


def two_slots_and_background(job, images):
    """Slot 1: the left quarter of the image, slot 3: the right quarter, slot 2: the rest."""
    labels = torch.ones(len(images), 16, 16, dtype=torch.long)
    labels[:, :, :4], labels[:, :, 12:] = 0, 2
    masks = one_hot(labels, 3)
    attn = masks[:, :, 0][:, None].expand(-1, 2, -1, -1, -1)
    return images, masks, images[:, None].expand(-1, 3, -1, -1, -1), None, attn


def test_masks_of_own_pictures_have_their_size_and_the_colours_of_the_slots(monkeypatch):
    """0 is the background's slot, 1 and 3 are slots; the model does not see the 10 columns at either side."""
    small_checkpoint(Path('logs/checkpoints/last.pth'))
    Image.new('RGB', (60, 40), 'red').save('a.jpg')
    monkeypatch.setattr(visualize.Job, 'run_model', two_slots_and_background)
    assert run('--image', 'a.jpg') == 0
    with Image.open('visualizations/a_0_mask.png') as mask:
        assert mask.mode == 'P' and mask.size == (16, 16)
        assert np.unique(np.asarray(mask)).tolist() == [0, 1, 3]
    with Image.open('visualizations/a_0_full_mask.png') as mask:
        labels, colours = np.asarray(mask), np.asarray(mask.convert('RGB')) / 255
    assert labels.shape == (40, 60)
    assert labels[20].tolist() == [255] * 10 + [1] * 10 + [0] * 20 + [3] * 10 + [255] * 10
    of_slots = visualize.slot_colours_of(3)
    for column, colour in ((15, of_slots[0]), (30, visualize.BACKGROUND), (45, of_slots[2])):
        assert np.allclose(colours[20, column], colour, atol=0.005)


def test_the_mask_of_a_clevr_scene_lies_where_its_window_lies(monkeypatch):
    path = small_checkpoint(Path('clevr.pth'), data=DATA | {'dataset_type': 'clevr6'})
    Image.new('RGB', (320, 240), 'red').save('a.png')
    monkeypatch.setattr(visualize.Job, 'run_model', two_slots_and_background)
    assert run('--image', 'a.png', '--checkpoint', path) == 0
    with Image.open('visualizations/a_0_full_mask.png') as mask:
        labels = np.asarray(mask)
    seen = labels != 255
    assert seen[29:221, 64:256].all() and seen.sum() == 192 * 192
    assert (labels[29:221, 64:112] == 1).all() and (labels[29:221, 112:208] == 0).all()


def test_frames_come_in_natural_order_without_unreadable_ones(monkeypatch, capsys):
    small_checkpoint(Path('logs/checkpoints/last.pth'))
    Path('frames').mkdir()
    for n in (1, 2, 10):
        Image.new('RGB', (16, 16), (20 * n, 0, 0)).save(f'frames/f$_${n}.png')  # no formula
    Path('frames/frame3.png').write_text('no picture')
    Image.new('RGB', (16, 16)).save('frames/z\n.png')
    seen = []

    def watched(images, *args, **kwargs):
        seen.append((round((images[0, 0, 0, 0].item() + 1) * 127.5), args[-1]))
        return visualize_slots(images, *args, **kwargs)

    monkeypatch.setattr(visualize, 'visualize_slots', watched)
    assert run('--frames', 'frames') == 0
    assert seen == [(20, 'f$_$1.png'), (40, 'f$_$2.png'), (200, 'f$_$10.png'), (0, 'z\n.png')]
    error = capsys.readouterr().err
    assert 'frames/frame3.png' in error and error.startswith('skipped') and error.count('\n') == 1


# Mistakes


def test_a_folder_means_its_last_checkpoint(capsys):
    small_checkpoint(Path('run/checkpoints/best_model.pth'))
    last = small_checkpoint(Path('run/checkpoints/last.pth'))
    os.utime(last, (1, 1))
    for folder in ('run', 'run/checkpoints'):
        assert run('--checkpoint', folder, '--num_images', 1) == 0
        assert f'rendering {last}' in capsys.readouterr().out
        assert run('--gif', '--checkpoint', folder, '--num_images', 1) == 0
    Path('empty').mkdir()
    assert run('--checkpoint', 'empty') == 2
    assert 'no checkpoint at empty' in capsys.readouterr().err


def test_figures_of_an_earlier_run_with_more_images_go_but_no_other_files(capsys):
    small_checkpoint(Path('logs/checkpoints/last.pth'))
    for suffix in ('png', 'svg', 'pdf'):
        assert run('--num_images', 3, '--format', suffix) == 0
        own = Path(f'visualizations/decomposition_3.{suffix}')
        own.write_bytes(b'of the user')
        assert run('--num_images', 1, '--format', suffix) == 0
        left = {path.name for path in Path('visualizations').glob(f'*.{suffix}')}
        assert left == {f'{name}.{suffix}' for name in ('slots', 'attention_evolution_0', 'decomposition_0')} | {
            own.name
        }
    for number in (2, 1):
        assert run('--gif', '--num_images', number) == 0
    assert [path.name for path in Path('visualizations').glob('*.gif')] == ['attention_evolution_0.gif']


@pytest.mark.parametrize(
    'argv',
    [
        '--frames F --image x.png', '--frames F --num_images 3', '--frames F --format svg', '--sweep --num_slots 3',
        '--sweep --num_iterations 3', '--sweep --search', '--training --num_slots 3', '--training --image x.png',
        '--training --checkpoint x.pth', '--image x.png --num_images 3', '--image x.png --data_dir data',
        '--gif --search', '--gif --format svg', '--checkpoint x.pth --log_dir elsewhere',
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
    ['--num_slots 0', '--num_slots -1', '--num_slots 300', '--num_iterations 0', '--num_images 0', '--seed -1',
     '--edit --num_images 1', '--edit --image x.png', '--wrong', '--num_slots x', '--sweep --edit'],
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
        (['--frames', 'my frames'], ['no pictures in my frames', '.png', '--frames']),
        (['--gif', '--checkpoint', 'my frames'], ['no checkpoints in my frames', 'python train.py --save_every 1']),
        (['--checkpoint', 'shapes.pth', '--data_dir', 'data'], ['--data_dir has no effect', 'shapes']),
        (['--checkpoint', 'shapes.pth', '--mask_dir', 'data'], ['--mask_dir has no effect', 'shapes']),
        (['--checkpoint', 'bare.pth'], ['bare.pth', '--image']),
        (['--checkpoint', 'newer.pth'], ['the data of the checkpoint', 'colours']),
    ],
)
def test_a_message_names_the_source_and_the_remedy(capsys, flags, parts):
    Path('my frames').mkdir()
    small_checkpoint(Path('shapes.pth'))
    small_checkpoint(Path('newer.pth'), data=DATA | {'colours': 3})
    save_checkpoint('bare.pth', small_model())
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and all(part in error for part in parts)
    assert not Path('visualizations').exists()


def test_a_command_to_train_quotes_its_folder(capsys):
    assert run('--log_dir', 'my logs', '--training') == 2
    assert "python train.py --log_dir 'my logs'" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--checkpoint', 'nowhere.pth'], 'no checkpoint at nowhere.pth'),
        (['--image', 'nowhere.png'], 'nowhere.png cannot be read as a picture'),
        (['--gif', '--checkpoint', '.'], 'no checkpoints in .'),
        (['--output_dir', 'file/figures'], 'file/figures'),
    ],
)
def test_mistakes_cost_one_line(capsys, flags, message):
    Path('file').write_text('in the way')
    small_checkpoint(Path('logs/checkpoints/last.pth'))
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith('visualize.py: error: ') and error.count('\n') == 1
