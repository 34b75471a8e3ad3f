"""Figures come out for any number of slots, colours stay with their slots, the script finds its way."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import visualize
from slot_attention import ModelConfig, SlotAttentionAutoEncoder, save_checkpoint
from visualize import visualize_attention_evolution, visualize_slot_decomposition, visualize_slots


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('DISPLAY', raising=False)


def scene(B=2, K=7, size=16, T=3):
    images = torch.rand(B, 3, size, size) * 2 - 1
    rgbs = torch.rand(B, K, 3, size, size) * 2 - 1
    masks = torch.randn(B, K, 1, size, size).softmax(1)
    attn = torch.randn(B, T, K, size // 2, size // 2).softmax(2)
    return images, (rgbs * masks).sum(1), masks, attn, rgbs, torch.randint(0, 3, (B, size, size))


def run(*flags):
    return visualize.main(visualize.parse_args([str(flag) for flag in flags]))


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


@pytest.mark.parametrize(('K', 'T', 'B'), [(1, 1, 1), (4, 5, 1), (11, 2, 3), (23, 1, 1)])
def test_any_number_of_slots_iterations_and_images(K, T, B):
    images, recons, masks, attn, rgbs, labels = scene(B, K, T=T)
    texts = [text.get_text() for text in visualize_slots(images, recons, masks, None, rgbs, labels).axes[0].texts]
    assert f'slot {K}' in texts and f'slot {K + 1}' not in texts
    assert sum(text.startswith('FG-ARI') for text in texts) == B + 1
    texts = [text.get_text() for text in visualize_attention_evolution(attn, images=images).axes[0].texts]
    assert f'iteration {T}' in texts and f'slot {K}' in texts
    visualize_slot_decomposition(images[:1], recons[:1], masks[:1], None, rgbs[:1], labels[:1])


def test_a_batch_on_another_device_type_or_number_format_is_drawn_alike():
    images, recons, masks, attn, rgbs, labels = (x.bfloat16() if x.is_floating_point() else x for x in scene())
    visualize_slots(images.requires_grad_(), recons, masks, None, rgbs, labels)
    visualize_attention_evolution(attn, images=images)
    visualize_slot_decomposition(images[0], recons[0], masks[0], None, rgbs[0], labels[0])


def test_a_slot_has_the_same_colour_everywhere_and_no_other_has_it():
    colours = visualize.slot_colours(30)
    assert np.array_equal(colours[:7], visualize.slot_colours(7))
    assert len(np.unique(colours.round(3), axis=0)) == 30
    images, _, masks, *_ = scene(1, 4)
    masks = torch.zeros_like(masks)
    masks[0, 2] = 1
    tinted = visualize._overlay(images[0], masks[0])
    picture = visualize._pixels(images[0]).repeat(4, 0).repeat(4, 1)
    assert np.allclose(tinted, 0.5 * picture + 0.5 * colours[2])


def test_the_last_running_sum_is_the_reconstruction():
    images, recons, masks, _, rgbs, _ = scene(1, 5)
    figure = visualize_slot_decomposition(images[0], recons[0], masks[0], None, rgbs[0])
    assert np.allclose(figure.axes[0].images[-1].get_array(), visualize._pixels(recons[0]), atol=1e-5)


def test_shapes_that_do_not_fit_are_named():
    images, recons, masks, attn, *_ = scene()
    with pytest.raises(ValueError, match='masks must have 5 dimensions'):
        visualize_slots(images, recons, masks[:, :, 0])
    with pytest.raises(ValueError, match='attn must have 5 dimensions'):
        visualize_attention_evolution(attn[0, 0])


# Command line

DATA = dict(dataset_type='shapes', resolution=16, max_objects=3, min_objects=1, seed=0)


def small_checkpoint(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    model = SlotAttentionAutoEncoder(ModelConfig(resolution=16, hidden_dim=8, slot_dim=16, num_slots=3))
    save_checkpoint(path, model, data=DATA)
    return path


def test_the_newest_checkpoint_is_rendered(capsys):
    older = small_checkpoint(Path('logs/checkpoints/best_model.pth'))
    newer = small_checkpoint(Path('logs/run_1/checkpoints/last.pth'))
    os.utime(older, (1, 1))
    assert run('--num_images', 2) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f'rendering {newer}'
    assert len(printed) == 6 and all(Path(line).is_file() for line in printed[1:])
    names = {'slots.png'} | {f'{figure}_{i}.png' for figure in ('attention_evolution', 'decomposition') for i in (0, 1)}
    assert {Path(line).name for line in printed[1:]} == names


def test_without_a_checkpoint_the_model_is_untrained_and_said_to_be(capsys):
    assert run('--num_images', 1, '--output_dir', 'elsewhere') == 0
    assert 'UNTRAINED' in capsys.readouterr().out
    assert Path('elsewhere/slots.png').is_file()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--checkpoint', 'nowhere.pth'], 'no checkpoint at nowhere.pth'),
        (['--num_slots', 0], 'at least 1 slot'),
        (['--output_dir', 'file/figures'], 'file/figures'),
    ],
)
def test_mistakes_cost_one_line(capsys, flags, message):
    Path('file').write_text('in the way')
    small_checkpoint(Path('logs/checkpoints/last.pth'))
    assert run('--num_images', 1, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith('visualize.py: error: ') and error.count('\n') == 1
