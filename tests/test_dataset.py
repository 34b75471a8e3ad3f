"""Tests of shapes (repeatable, disjoint splits, labels as drawn), loaders (whole batches) and the command line."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset
from dataset import DataError, ShapesDataset, create_dataloader, wrap_in_loader


def test_a_sample_depends_on_seed_split_and_index_alone():
    few, many = ShapesDataset(size=5), ShapesDataset(size=9)
    assert np.array_equal(few.images, many.images[:5]) and np.array_equal(few.labels, many.labels[:5])
    image, labels = many.draw(3)
    assert np.array_equal(image, few.images[3]) and np.array_equal(labels, few.labels[3])
    assert not np.array_equal(few.images[0], ShapesDataset(size=1, seed=1).images[0])


def test_splits_share_no_sample():
    images = np.concatenate([ShapesDataset(split, size=200, resolution=16).images for split in dataset.SPLITS])
    assert len(np.unique(images.reshape(600, -1), axis=0)) == 600


def test_counts_cover_the_range_asked_for_and_labels_are_consecutive():
    data = ShapesDataset(size=200, min_objects=1, max_objects=4)
    counts = {tuple(np.unique(labels)) for labels in data.labels}
    assert counts == {(0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4)}


def test_every_object_keeps_most_of_its_area_in_sight(monkeypatch):
    full = []
    place = ShapesDataset._place

    def record(self, *args):
        window, coverage = place(self, *args)
        full.append(np.count_nonzero(coverage > 0.5))
        return window, coverage

    monkeypatch.setattr(ShapesDataset, '_place', record)
    data = ShapesDataset(size=100, max_objects=8, min_objects=8)
    visible = np.array([np.bincount(labels.ravel(), minlength=9)[1:] for labels in data.labels])
    ratio = visible / np.array(full).reshape(100, 8)
    assert ratio.min() >= 0.6
    assert ratio.min() < 0.9  # they do overlap
    assert (ratio[:, -1] == 1).all()  # the last is drawn in front


@pytest.mark.parametrize('shape', dataset.SHAPES)
def test_objects_have_the_area_of_their_size_and_soft_edges(shape):
    data = ShapesDataset(size=1, resolution=64)
    areas = []
    for angle in np.linspace(0, 2, 7):
        _, coverage = data._rasterise(shape, 31.3, 32.1, 9.0, angle)
        areas.append(coverage.sum())
        assert coverage.max() == 1 and 10 < ((coverage > 0.05) & (coverage < 0.95)).sum() < 120
    assert np.allclose(areas, np.pi * 81, rtol=0.02)


def test_objects_stand_out_from_the_background():
    data = ShapesDataset(size=100, min_objects=1, max_objects=1)
    for image, labels in zip(data.images.astype(int), data.labels, strict=True):
        background = image[labels == 0]
        assert np.ptp(np.median(background, axis=0)) <= 1  # grey
        assert np.ptp(np.median(image[labels == 1], axis=0)) > 80  # coloured


def test_a_crowded_small_image_still_holds_all_objects():
    data = ShapesDataset(size=10, resolution=16, min_objects=16, max_objects=16)
    assert all(len(np.unique(labels)) == 17 for labels in data.labels)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(min_objects=5, max_objects=3), 'min_objects .5. and max_objects .3.'),
        (dict(min_objects=0), 'min_objects'),
        (dict(max_objects=99), 'max_objects'),
        (dict(split='all'), 'split'),
        (dict(size=0), 'number of images must be at least 1'),
        (dict(resolution=8), 'resolution'),
        (dict(seed=-1), 'must not be negative'),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        ShapesDataset(**changes)


# Loaders


def test_loaders_as_in_the_readme():
    train_loader, val_loader = create_dataloader(
        dataset_type='shapes', batch_size=32, resolution=64, max_objects=6, min_objects=2, train_size=70, val_size=40
    )
    batches = list(train_loader)
    assert [len(b['image']) for b in batches] == [32, 32]  # incomplete batches are left out
    assert [len(b['image']) for b in val_loader] == [32, 8]
    image, mask = batches[0]['image'], batches[0]['mask']
    assert image.shape == (32, 3, 64, 64) and image.dtype == torch.float32
    assert mask.shape == (32, 64, 64) and mask.dtype == torch.int64
    assert -1 <= image.min() < -0.5 and 0.5 < image.max() <= 1
    assert mask.min() == 0 and 2 <= mask.max() <= 6


def test_batches_hold_the_images_of_the_data_set():
    data = ShapesDataset(size=4, resolution=16)
    batch = next(iter(wrap_in_loader(data, 4, shuffle=False)))
    pixels = ((batch['image'] + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    assert np.array_equal(pixels, data.images)
    assert np.array_equal(batch['mask'], data.labels)
    assert torch.equal(data[2]['image'], batch['image'][2])


def test_the_order_is_a_function_of_seed_and_epoch():
    data = ShapesDataset(size=20, resolution=16)

    def order(seed, epoch):
        loader = wrap_in_loader(data, 5, shuffle=True, seed=seed)
        loader.sampler.set_epoch(epoch)
        return list(loader.sampler)

    assert order(0, 3) == order(0, 3)
    assert sorted(order(0, 3)) == list(range(20))
    assert order(0, 3) != order(0, 4) and order(0, 3) != order(5, 3)


def test_a_batch_is_fetched_in_one_piece(monkeypatch):
    data = ShapesDataset(size=20, resolution=16)
    monkeypatch.setattr(ShapesDataset, '__getitem__', None)
    assert sum(len(b['image']) for b in wrap_in_loader(data, 6, shuffle=False)) == 20


def test_workers_give_the_same_batches():
    data = ShapesDataset(size=16, resolution=16)
    alone, helped = (list(wrap_in_loader(data, 4, shuffle=True, num_workers=n)) for n in (0, 2))
    assert all(torch.equal(a['image'], b['image']) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(dataset_type='mnist'), 'dataset_type must be one of shapes, clevr6'),
        (dict(dataset_type='clevr6'), 'clevr_with_masks_train.tfrecords'),
        (dict(batch_size=0), 'batch_size must be at least 1'),
        (dict(batch_size=9), 'must not exceed the 8 training images'),
    ],
)
def test_impossible_loaders_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        create_dataloader(**{'train_size': 8, 'val_size': 2, 'batch_size': 4, 'resolution': 16} | changes)


# Command line


def test_preview_writes_a_sheet_and_counts_objects(tmp_path, capsys):
    output = tmp_path / 'sheet.png'
    status = dataset.main(dataset.parse_args(['--num_images', '64', '--output', str(output)]))
    printed = capsys.readouterr().out
    assert status == 0 and str(output) in printed and 'images/s' in printed
    counted = [int(line.split()[1]) for line in printed.splitlines()[1:6]]
    assert sum(counted) == 64
    with dataset.Image.open(output) as sheet:
        assert sheet.size == (8 * 66 * 2, 8 * 66 * 2)


@pytest.mark.parametrize(
    'flags', [['--dataset', 'images'], ['--min_objects', '7'], ['--output', 'no/such/folder/sheet.png']]
)
def test_preview_refuses_in_one_line(capsys, flags):
    assert dataset.main(dataset.parse_args(['--num_images', '32', *flags])) == 2
    error = capsys.readouterr().err
    assert error.startswith('dataset.py: error: ') and error.count('\n') == 1


def test_a_sheet_that_cannot_be_saved_is_refused_before_drawing(capsys, monkeypatch):
    monkeypatch.setattr(dataset, 'create_dataset', None)
    for output in ('s.xyz', 'no/such/folder/sheet.png'):
        assert dataset.main(dataset.parse_args(['--output', output])) == 2
        error = capsys.readouterr().err
        assert f'--output {output}' in error and error.count('\n') == 1


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--dataset clevr6 --min_objects 2', '--min_objects has no effect with --dataset clevr6'),
        ('--dataset tetrominoes --variant binarized', '--variant has no effect with --dataset tetrominoes'),
        ('--prepare tetrominoes --variant binarized', '--variant has no effect with --prepare tetrominoes'),
        ('--prepare clevr6 --num_images 64', '--num_images has no effect with --prepare clevr6'),
        ('--prepare clevr6 --dataset clevr6', '--dataset has no effect with --prepare clevr6'),
        ('--dataset images --max_objects 6', '--max_objects has no effect with --dataset images'),
        ('--mask_dir masks', '--mask_dir has no effect with --dataset shapes'),
        ('--data_dir data', '--data_dir has no effect with --dataset shapes'),
        ('--dataset clevr6 --limit 3', '--limit is for --prepare only'),
        ('--url http://some', '--url is for --prepare only'),
        ('--prepare clevr6 --resolution 8', '--resolution must be from 16 to 256, not 8'),
        ('--prepare clevr6 --resolution 512', '--resolution must be from 16 to 256, not 512'),
        ('--prepare clevr6 --limit 0', '--limit must be at least 1'),
    ],
)
def test_flags_without_effect_and_out_of_range_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        dataset.parse_args(flags.split())
    assert exit.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_flags_with_an_effect_are_accepted():
    for flags in (
        '--dataset multi_dsprites --variant binarized --data_dir d --max_objects 3 --resolution 32 --output a.png',
        '--dataset images --data_dir d --mask_dir m --num_images 40',
        '--min_objects 2 --max_objects 2 --data_seed 1',
        '--prepare multi_dsprites --variant binarized --data_dir d --output_dir o --url u --limit 3 --max_objects 3',
    ):
        dataset.parse_args(flags.split())


def test_ctrl_c_during_the_imports_is_one_line():
    Path('h5py.py').write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    run = subprocess.Popen(
        [sys.executable, dataset.__file__], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={'PYTHONPATH': str(Path.cwd())},
    )  # fmt: skip
    assert run.stdout.readline() == 'importing\n'
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=30)[1] == 'interrupted\n' and run.returncode == 130
