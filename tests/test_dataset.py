"""Tests of shapes (repeatable, disjoint splits, labels as drawn), loaders (whole batches) and the command line."""

import os
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
    assert not np.array_equal(few.images[0], ShapesDataset(size=1, data_seed=1).images[0])


def test_splits_share_no_sample():
    images = np.concatenate([ShapesDataset(split, size=200, resolution=16).images for split in dataset.SPLITS])
    assert len(np.unique(images.reshape(600, -1), axis=0)) == 600


def test_counts_cover_the_range_asked_for_and_labels_are_consecutive():
    data = ShapesDataset(size=200, min_objects=1, max_objects=4)
    counts = {tuple(np.unique(labels)) for labels in data.labels}
    assert counts == {(0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4)}


def test_every_object_keeps_most_of_its_area_visible():
    data = ShapesDataset(size=100, max_objects=4, min_objects=4)
    areas = np.array([np.bincount(labels.ravel(), minlength=5)[1:] for labels in data.labels])
    smallest, largest = (np.pi * (size * 64) ** 2 for size in (data.MIN_SIZE, data.MAX_SIZE))  # discs of equal area
    assert areas.min() >= data.MIN_VISIBLE * smallest - 5 and areas.max() <= 1.05 * largest
    assert areas[:, -1].min() >= 0.9 * smallest  # the last is drawn in front
    assert areas.min() < 0.9 * smallest  # they do overlap


def test_edges_are_soft():
    data = ShapesDataset(size=30, min_objects=1, max_objects=1)
    for image, labels in zip(data.images.astype(int), data.labels, strict=True):
        channel = np.ptp(image, axis=(0, 1)).argmax()
        background, colour = (np.median(image[labels == label, channel]) for label in (0, 1))
        coverage = (image[..., channel] - background) / (colour - background)
        assert coverage.min() > -0.05 and coverage.max() < 1.05
        assert 10 < ((coverage > 0.05) & (coverage < 0.95)).sum() < 150
        assert ((coverage > 0.5) == (labels == 1)).mean() > 0.998


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
        (dict(data_seed=-1), 'must not be negative'),
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


def test_workers_give_the_same_batches():
    data = ShapesDataset(size=16, resolution=16)
    alone, helped = (list(wrap_in_loader(data, 4, shuffle=True, num_workers=n)) for n in (0, 2))
    assert all(torch.equal(a['image'], b['image']) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(dataset_type='mnist'), 'dataset_type must be one of shapes, clevr6'),
        (dict(dataset_type='clevr6'), 'clevr_with_masks_train.tfrecords'),
        (dict(data_dirr='x'), 'data_dirr is not an option of a data set'),
        (dict(batch_size=0), 'batch_size must be at least 1'),
        (dict(batch_size=9), 'must not exceed the 8 training images'),
    ],
)
def test_impossible_loaders_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        create_dataloader(**{'train_size': 8, 'val_size': 2, 'batch_size': 4, 'resolution': 16} | changes)


# Command line


def run(*flags) -> int:
    return dataset.main(dataset.parse_args([str(flag) for flag in flags]))


def test_preview_writes_a_sheet_and_counts_objects(capsys):
    assert run('--num_images', 64, '--output', 'sheet.png') == 0
    printed = capsys.readouterr().out
    assert 'sheet.png' in printed and 'images/s' in printed
    assert sum(int(line.split()[1]) for line in printed.splitlines()[1:6]) == 64
    with dataset.Image.open('sheet.png') as sheet:
        assert sheet.size == (2 * (8 * 66 + 2), 2 * (8 * 66 + 2))


def refused(capsys, *flags) -> str:
    """The one line on stderr."""
    try:
        status = run(*flags)
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith('dataset.py: error: ') and error.count('\n') == 1
    return error


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--dataset clevr6 --min_objects 2', '--min_objects has no effect with --dataset clevr6; leave it out'),
        ('--prepare tetrominoes --variant binarized', '--variant has no effect with --dataset tetrominoes'),
        ('--prepare clevr6 --num_images 64', '--num_images has no effect with --prepare clevr6'),
        ('--prepare clevr6 --dataset clevr6', '--dataset has no effect with --prepare clevr6'),
        ('--dataset images --max_objects 6', '--max_objects has no effect with --dataset images'),
        ('--masks m', '--masks has no effect with --dataset shapes'),
        ('--data_dir data', '--data_dir has no effect with --dataset shapes'),
        ('--dataset clevr6 --limit 3', '--limit has no effect without --prepare'),
        ('--prepare clevr6 --resolution 8', '--resolution must be at least 16 and at most 256, not 8'),
        ('--prepare clevr6 --limit 0', '--limit must be at least 1'),
        ('--min_objects nan', "--min_objects: invalid int value: 'nan'"),
        ('--min_objects 7', 'min_objects (7) and max_objects (6) must satisfy'),
        ('--data_see 1', 'unrecognized arguments: --data_see 1'),
        ('--dataset mnist', 'invalid choice'),
        ('--output s.xyz', '--output s.xyz must be a .png file in an existing folder'),
        ('--output no/such/folder/sheet.png', '--output no/such/folder/sheet.png must be'),
        ('--num_images 1000000000', 'do not fit in memory; use fewer images'),
    ],
)
def test_mistakes_are_one_line(capsys, flags, message):
    assert message in refused(capsys, *flags.split())


def test_flags_with_an_effect_are_accepted():
    for flags in (
        '--dataset multi_dsprites --variant binarized --data_dir d --max_objects 3 --resolution 32 --output a.png',
        '--dataset images --data_dir d --masks {name}.png --num_images 40',
        '--min_objects 2 --max_objects 2 --data_seed 1',
        '--prepare multi_dsprites --variant binarized --data_dir d --output_dir o --url u --limit 3 --max_objects 3',
    ):
        dataset.parse_args(flags.split())


def test_help_shows_the_defaults_in_force_and_paths_may_start_with_a_tilde(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '500')
    with pytest.raises(SystemExit) as exit:
        dataset.parse_args('--dataset clevr6 --help'.split())
    out = capsys.readouterr().out
    assert exit.value.code == 0 and '16 to 256 (default: 128)' in out and '70 % of the source' in out
    assert 'None' not in out and 'False' not in out
    monkeypatch.setenv('HOME', '/home/me')
    args = dataset.parse_args(['--dataset', 'images', '--data_dir=~/pictures', '--output', '~/a.png'])
    assert args.data_dir == Path('/home/me/pictures') and args.output == Path('/home/me/a.png')


def test_the_shared_parser():
    parser = dataset.Parser('some.py', 'Some script.')
    dataset.add_data_flags(parser)
    parser.flag('lr', float, 0.1, 'rate', 0)
    parser.flag('eval', bool, False, 'score')
    assert parser.given(['--lr', '0.1', '--help', '--eval']) == {'lr': 0.1, 'eval': True}
    args = parser.parse_args(['--dataset', 'images', '--masks', '{name}.png'])
    assert dataset.data_options(args) == dict(dataset_type='images', resolution=64, data_dir='data', masks='{name}.png')
    for argv in (['--lr', 'nan'], ['--lr', '-1'], ['--lr', 'inf']):
        with pytest.raises(SystemExit):
            parser.parse_args(argv)


@pytest.mark.skipif(sys.platform != 'linux', reason='file names are bytes on Linux')
def test_any_name_and_any_terminal(tmp_path):
    folder = tmp_path / os.fsdecode('Fotos_K\xf6ln'.encode('latin-1'))
    folder.mkdir()
    for i in range(5):
        dataset.Image.new('RGB', (20, 20), (i, 100, 200)).save(folder / f'Bl\xfcte{i}.png')
    command = [
        sys.executable,
        dataset.__file__,
        '--dataset',
        'images',
        '--data_dir',
        folder,
        '--output',
        folder / 's.png',
    ]
    process = subprocess.run(command, capture_output=True, env={'PYTHONIOENCODING': 'ascii'})
    assert process.returncode == 0 and b's.png' in process.stdout, process.stderr


def test_ctrl_c_during_the_imports_is_one_line():
    Path('h5py.py').write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    run = subprocess.Popen(
        [sys.executable, dataset.__file__], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={'PYTHONPATH': str(Path.cwd())},
    )  # fmt: skip
    assert run.stdout.readline() == 'importing\n'
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=30)[1] == 'interrupted\n' and run.returncode == 130


def test_without_a_size_shapes_has_the_default_number_of_images(monkeypatch):
    monkeypatch.setattr(dataset, 'SHAPES_SIZE', 5)
    assert len(dataset.create_dataset('shapes', 'val')) == len(dataset.create_dataset('shapes', 'train', None)) == 5
