"""Tests of published records, folders of pictures, masks and downloads: each value, and each error in one line."""

import gzip
import http.server
import json
import os
import resource
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import dataset
import train
import visualize
from dataset import (
    DataError,
    PictureFolder,
    PreparedDataset,
    ShapesDataset,
    create_dataloader,
    create_dataset,
    prepare,
)

SAMPLE = Path(__file__).resolve().parents[2] / 'shared' / 'clevr_sample'


# A writer of TFRecords that shares no code with the reader.


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack('<I', ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def example(**features) -> bytes:
    entries = b''
    for name, values in features.items():
        values = np.asarray(values)
        if values.dtype == np.uint8:  # one-byte strings, one by one
            value = field(1, b''.join(field(1, bytes([byte])) for byte in values.ravel().tolist()))
        else:
            value = field(2, field(1, values.astype('<f4').tobytes()))
        entries += field(1, field(1, name.encode()) + field(2, value))
    return field(1, entries)


def frame(payload: bytes) -> bytes:
    length = struct.pack('<Q', len(payload))
    return length + masked(length) + payload + b'\0\0\0\0'


def write_records(path: Path, payloads: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(b''.join(map(frame, payloads)), 1))


def clevr_scene(seed: int, num_objects: int) -> tuple[np.ndarray, np.ndarray, bytes]:
    """Image, labels and record: objects are boxes of pixels; the background is visible too."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (240, 320, 3), np.uint8)
    labels = np.zeros((240, 320), np.uint8)
    for label in range(1, num_objects + 1):
        y, x = rng.integers(30, 180), rng.integers(70, 220)
        labels[y : y + 30, x : x + 25] = label
    masks = np.where(labels == np.arange(11)[:, None, None], 255, 0).astype(np.uint8)
    visibility = (np.arange(11) <= num_objects).astype(np.float32)  # entry 0: the background
    return image, labels, example(image=image, mask=masks[..., None], visibility=visibility)


@pytest.fixture(scope='session')
def clevr(tmp_path_factory):
    """A folder with eight scenes of 3 to 10 objects as CLEVR with masks; and what they hold."""
    folder = tmp_path_factory.mktemp('clevr')
    scenes = [clevr_scene(seed, count) for seed, count in enumerate((3, 6, 7, 10, 6, 4, 5, 3))]
    write_records(folder / 'clevr_with_masks_train.tfrecords', [record for _, _, record in scenes])
    return folder, scenes


@pytest.fixture
def clevr_dir(clevr, tmp_path):
    """As `clevr`, in a folder of the test's own."""
    (tmp_path / 'data').mkdir()
    name = 'clevr_with_masks_train.tfrecords'
    (tmp_path / 'data' / name).symlink_to(clevr[0] / name)
    return tmp_path / 'data'


def refused(capsys, *flags) -> str:
    assert dataset.main(dataset.parse_args([str(flag) for flag in flags])) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1:]
    assert error and error[0].startswith('dataset.py: error: ')
    return error[0]


# CLEVR with masks


def test_clevr6_is_read_value_by_value(clevr, clevr_dir):
    path = prepare('clevr6', clevr_dir, resolution=192)  # the size of the window: nothing is resized
    kept = [0, 1, 4, 5, 6, 7]  # exactly 6 objects stay, 7 go
    with h5py.File(path) as file:
        assert file['record'][:].tolist() == kept
        assert file['num_objects'][:].tolist() == [3, 6, 6, 4, 5, 3]
        for row, record in enumerate(kept):
            image, labels, _ = clevr[1][record]
            assert np.array_equal(file['image'][row], image[29:221, 64:256])
            assert np.array_equal(file['mask'][row], labels[29:221, 64:256])
        assert file['image'].chunks == (1, 192, 192, 3)
        assert file.attrs['max_objects'] == 6 and file.attrs['resolution'] == 192
    assert sorted(file.suffix for file in clevr_dir.iterdir()) == ['.h5', '.tfrecords']


def test_images_are_bilinear_and_labels_nearest(clevr, clevr_dir):
    image, labels, _ = clevr[1][0]
    image, labels = image[29:221, 64:256], labels[29:221, 64:256]
    with h5py.File(prepare('clevr6', clevr_dir, resolution=128, limit=1)) as file:
        found, found_labels = file['image'][0], file['mask'][0]
    # Place i of 128 is at 1.5 i + 0.25 of 192: between two pixels, with weights 3 : 1 or 1 : 3.
    for i, j in ((0, 0), (1, 4), (127, 126)):
        y, x = 1.5 * i + 0.25, 1.5 * j + 0.25
        rows, columns = (np.clip([int(v), int(v) + 1], 0, 191) for v in (y, x))
        weights = [np.array([1 - v % 1, v % 1]) for v in (y, x)]
        expected = np.einsum('i,j,ijc->c', *weights, image[np.ix_(rows, columns)].astype(float))
        assert np.abs(found[i, j] - expected).max() <= 0.51
        assert found_labels[i, j] == labels[int(1.5 * (i + 0.5)), int(1.5 * (j + 0.5))]
    assert set(np.unique(found_labels)) == {0, 1, 2, 3}


def test_clevr10_keeps_all_in_another_file(clevr_dir):
    both = [prepare('clevr6', clevr_dir, 32, max_objects) for max_objects in (6, 10)]
    counts = []
    for path in both:
        with h5py.File(path) as file:
            counts.append(len(file['image']))
    assert counts == [6, 8] and both[0] != both[1]


def test_splits_follow_the_records_and_do_not_depend_on_the_filter(clevr_dir):
    splits = {}
    for max_objects in (6, 10):
        with h5py.File(prepare('clevr6', clevr_dir, 16, max_objects)) as file:
            splits[max_objects] = dict(zip(file['record'][:].tolist(), file['split'][:].tolist(), strict=True))
    assert splits[10] == {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 1, 7: 2}
    assert splits[6] == {record: split for record, split in splits[10].items() if record not in (2, 3)}


def test_limit_stops_early_under_a_name_of_its_own(clevr_dir):
    whole = prepare('clevr6', clevr_dir, 16)
    limited = prepare('clevr6', clevr_dir, 16, limit=3)
    assert limited.name == 'clevr6_16_max6_limit3.h5' != whole.name
    with h5py.File(limited) as file:
        assert file['record'][:].tolist() == [0, 1, 4] and file.attrs['scenes_read'] == 5
    assert len(create_dataset('clevr6', 'train', None, 16, data_dir=clevr_dir)) == 4  # of the whole file
    assert len(create_dataset('clevr6', 'train', None, 16, data_dir=limited)) == 3


def test_the_split_of_a_record_is_the_same_in_every_prepared_file(clevr_dir):
    splits = {}
    for max_objects, limit in ((10, None), (6, None), (10, 3), (6, 5), (10, 7)):
        with h5py.File(prepare('clevr6', clevr_dir, 16, max_objects, limit=limit)) as file:
            for record, split in zip(file['record'][:].tolist(), file['split'][:].tolist(), strict=True):
                assert splits.setdefault(record, split) == split
    assert splits == {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 1, 7: 2}


def test_a_file_named_as_data_dir_must_match_the_request(clevr_dir):
    path = prepare('clevr6', clevr_dir, 16)
    with pytest.raises(DataError, match='was prepared with resolution 16, not 32; use --resolution 16'):
        create_dataset('clevr6', 'train', None, 32, data_dir=path)
    with pytest.raises(DataError, match='was prepared with max_objects 6, not 10'):
        create_dataset('clevr6', 'train', None, 16, max_objects=10, data_dir=path)
    with pytest.raises(DataError, match='was prepared with dataset clevr6, not objects_room; use --dataset clevr6'):
        create_dataset('objects_room', 'train', None, 16, data_dir=path)
    with h5py.File(path, 'a') as file:
        file.attrs.update(dataset='multi_dsprites', variant='binarized')
    with pytest.raises(DataError, match='was prepared with variant binarized, not colored_on_grayscale'):
        create_dataset('multi_dsprites', 'train', None, 16, data_dir=path)
    with h5py.File(path, 'a') as file:  # as prepared before the attribute existed
        del file.attrs['dataset']
    assert len(create_dataset('multi_dsprites', 'train', None, 16, data_dir=path, variant='binarized')) > 0
    with pytest.raises(DataError, match=r'no file .*other.h5'):
        create_dataset('clevr6', 'train', None, 16, data_dir=clevr_dir / 'other.h5')
    with pytest.raises(DataError, match=r'must name the folder that contains .*tfrecords, not the file'):
        create_dataset('clevr6', 'train', None, 16, data_dir=clevr_dir / 'clevr_with_masks_train.tfrecords')


def test_the_next_preparation_deletes_what_a_killed_one_left(clevr_dir):
    ended = subprocess.Popen(['true'])
    ended.wait()
    for name in (f'.clevr6_32_max6.h5.{ended.pid}', 'clevr_with_masks_train.tfrecords.part'):
        (clevr_dir / name).write_bytes(b'unfinished')
    (clevr_dir / f'.clevr6_32_max6.h5.{os.getppid()}').write_bytes(b'of a process that still runs')
    prepare('clevr6', clevr_dir, 16)
    assert sorted(path.name for path in clevr_dir.iterdir()) == [
        f'.clevr6_32_max6.h5.{os.getppid()}', 'clevr6_16_max6.h5', 'clevr_with_masks_train.tfrecords'
    ]  # fmt: skip


def test_a_source_in_a_read_only_folder_is_prepared_elsewhere(clevr_dir, capsys):
    prepare('clevr6', clevr_dir, 16, output_dir='else where/deep')
    assert len(create_dataset('clevr6', 'train', None, 16, data_dir='else where/deep')) == 4
    assert [path.suffix for path in clevr_dir.iterdir()] == ['.tfrecords']
    flags = ('--prepare', 'clevr6', '--data_dir', clevr_dir, '--output_dir')
    for folder in ('/proc', clevr_dir / 'clevr_with_masks_train.tfrecords' / 'folder'):  # not even root can write there
        error = refused(capsys, *flags, folder)
        assert '--output_dir FOLDER' in error and 'h5py' not in error and 'unable to' not in error.lower()


def test_a_full_disk_is_said_without_the_text_of_hdf5(clevr_dir):
    command = [sys.executable, dataset.__file__, '--prepare', 'clevr6', '--data_dir', clevr_dir]
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert process.returncode == 2  # HDF5 alone would crash
    assert process.stderr.count('\n') == 1
    assert 'clevr6_128_max6.h5 cannot be written' in process.stderr and 'disk is full' in process.stderr
    assert [path.suffix for path in clevr_dir.iterdir()] == ['.tfrecords']


def test_a_fingerprint_tells_prepared_files_apart(clevr_dir):
    prints = [
        create_dataset('clevr6', split, size, 16, max_objects, data_dir=clevr_dir).fingerprint
        for split, size, max_objects in (('train', None, 6), ('train', 2, 6), ('val', None, 6), ('train', None, 10))
    ]
    assert prints[0] == prints[1] == prints[2] != prints[3]
    assert ShapesDataset(size=1).fingerprint == ShapesDataset('val', size=2).fingerprint
    assert ShapesDataset(size=1).fingerprint != ShapesDataset(size=1, seed=1).fingerprint


# The other published sets


def test_multi_dsprites_has_its_entities_last():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (64, 64))
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    masks = np.where(labels[..., None] == np.arange(6), 255, 0).astype(np.uint8)[..., None]
    record = example(image=image, mask=masks, visibility=np.array([1, 1, 1, 1, 0, 0], np.float32))
    write_records(Path('data/multi_dsprites_colored_on_grayscale.tfrecords'), [record])
    with h5py.File(prepare('multi_dsprites', 'data', 64)) as file:
        assert np.array_equal(file['image'][0], image) and np.array_equal(file['mask'][0], labels)
        assert file['num_objects'][0] == 3


def test_binarized_pictures_have_one_channel():
    image = np.random.default_rng(0).integers(0, 2, (64, 64, 1)).astype(np.uint8) * 255
    masks = np.where(image[..., None] // 255 == np.arange(4)[:, None], 255, 0).astype(np.uint8)  # [64, 64, 4, 1]
    write_records(Path('data/multi_dsprites_binarized.tfrecords'), [example(image=image, mask=masks)])
    with h5py.File(prepare('multi_dsprites', 'data', 64, variant='binarized')) as file:
        assert np.array_equal(file['image'][0], image.repeat(3, axis=2))
        assert np.array_equal(file['mask'][0], image[:, :, 0] // 255) and file['num_objects'][0] == 1


def test_tetrominoes_and_the_four_backgrounds_of_objects_room():
    rng = np.random.default_rng(0)
    for name, side, entities, backgrounds in (('tetrominoes', 35, 4, 1), ('objects_room', 64, 7, 4)):
        labels = rng.integers(0, entities, (side, side))
        image = rng.integers(0, 256, (side, side, 3), np.uint8)
        masks = np.where(labels == np.arange(entities)[:, None, None], 255, 0).astype(np.uint8)[..., None]
        write_records(Path(f'data/{name}_train.tfrecords'), [example(image=image, mask=masks)])
        with h5py.File(prepare(name, 'data', side)) as file:
            assert np.array_equal(file['image'][0], image)
            assert np.array_equal(file['mask'][0], np.maximum(labels - backgrounds + 1, 0))
            assert file['num_objects'][0] == 3


# CLEVR v1.0


def write_clevr_v1(folder: Path, size=(480, 320), mode='RGBA', scenes=6) -> None:
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        listed = []
        for i in range(scenes):
            name = f'CLEVR_{split}_{i:06d}.png'
            picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(mode)
            (folder / 'images' / split).mkdir(parents=True, exist_ok=True)
            picture.save(folder / 'images' / split / name)
            listed.append({'image_filename': name, 'objects': [{}] * (i + 3)})
        (folder / 'scenes').mkdir(exist_ok=True)
        (folder / 'scenes' / f'CLEVR_{split}_scenes.json').write_text(json.dumps({'scenes': listed}))


def test_clevr_v1_is_filtered_by_its_json_and_has_no_masks():
    write_clevr_v1(Path('data/CLEVR_v1.0'), size=(320, 240))
    with h5py.File(prepare('clevr6', 'data', 192)) as file:
        assert 'mask' not in file
        assert file['num_objects'][:].tolist() == [3, 4, 5, 6] * 2
        assert file['split'][:].tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
        with Image.open('data/CLEVR_v1.0/images/train/CLEVR_train_000002.png') as picture:
            assert np.array_equal(file['image'][2], np.asarray(picture.convert('RGB'))[29:221, 64:256])
    batch = next(iter(create_dataloader('clevr6', 2, 192, train_size=2, val_size=1)[0]))
    assert set(batch) == {'image'} and batch['image'].shape == (2, 3, 192, 192)


def test_large_pictures_are_cropped_at_the_centre():
    folder = Path('data/CLEVR_v1.0')
    write_clevr_v1(folder, scenes=1)
    columns = np.repeat((np.arange(480) // 2).astype(np.uint8)[None], 320, axis=0)
    Image.fromarray(columns).save(folder / 'images/train/CLEVR_train_000000.png')  # one channel, too
    with h5py.File(prepare('clevr6', 'data', 192)) as file:
        row = file['image'][0, 90, :, 0].astype(float)
    # 480 columns become 360, of which 84 to 276 stay; one of them is 4/3 columns of the picture.
    assert np.allclose(row, (np.arange(84, 276) + 0.5) * 4 / 3 / 2 - 0.5, atol=1)


def test_a_picture_is_cropped_and_resized_as_in_the_training_data(clevr, clevr_dir):
    Image.fromarray(clevr[1][1][0]).save('scene.png')
    with h5py.File(prepare('clevr6', clevr_dir, 128)) as file:
        file_image = file['image'][1]
    assert np.array_equal(dataset.read_picture(Path('scene.png'), 128, 'clevr6'), file_image)
    window = Image.fromarray(clevr[1][1][0][29:221, 64:256])  # a picture that is cropped already
    window.save('window.png')
    assert np.array_equal(dataset.read_picture(Path('window.png'), 128, 'clevr6'), file_image)


def test_missing_pictures_are_counted_before_any_is_read(capsys, monkeypatch):
    write_clevr_v1(Path('data/CLEVR_v1.0'))
    for number in (1, 4, 5):
        Path(f'data/CLEVR_v1.0/images/train/CLEVR_train_00000{number}.png').unlink()
    monkeypatch.setattr(dataset, 'open_picture', None)
    error = refused(capsys, '--prepare', 'clevr6', '--data_dir', 'data')
    assert '3 of the 6 pictures' in error and 'CLEVR_train_scenes.json' in error
    assert 'first is data/CLEVR_v1.0/images/train/CLEVR_train_000001.png' in error
    assert not list(Path('data').glob('*.h5*'))


def test_empty_lists_of_scenes_are_named(capsys):
    write_clevr_v1(Path('data/CLEVR_v1.0'))
    for split in ('val', 'train'):
        Path(f'data/CLEVR_v1.0/scenes/CLEVR_{split}_scenes.json').write_text('{"scenes": []}')
        error = refused(capsys, '--prepare', 'clevr6', '--data_dir', 'data')
        assert f'CLEVR_{split}_scenes.json lists no scenes' in error
    for file in Path('data/CLEVR_v1.0/scenes').iterdir():
        file.unlink()
    assert 'has neither CLEVR_train_scenes.json' in refused(capsys, '--prepare', 'clevr6', '--data_dir', 'data')


def test_a_json_of_something_else_is_named(capsys):
    write_clevr_v1(Path('data/CLEVR_v1.0'))
    for text in ('{"scenes": [{"objects": []}]}', '[1, 2', '{"info": 1}'):
        Path('data/CLEVR_v1.0/scenes/CLEVR_train_scenes.json').write_text(text)
        assert 'is not a list of CLEVR scenes' in refused(capsys, '--prepare', 'clevr6', '--data_dir', 'data')


# Damaged records and prepared files


def broken(kind: str, path: Path, record: bytes) -> None:
    whole = frame(record) + frame(record)
    if kind == 'truncated gzip':
        path.write_bytes(gzip.compress(whole, 1)[:-2000])
    elif kind == 'flipped byte in the gzip':
        packed = bytearray(gzip.compress(whole, 1))
        packed[len(packed) // 2] ^= 0x55
        path.write_bytes(packed)
    elif kind == 'flipped byte in the framing':
        path.write_bytes(gzip.compress(bytes([whole[0] ^ 1]) + whole[1:], 1))
    elif kind == 'cut plain file':
        path.write_bytes(whole[:-7])
    elif kind == 'no mask':
        write_records(path, [example(image=np.zeros((240, 320, 3), np.uint8))])
    elif kind == 'another size':
        write_records(path, [example(image=np.zeros((100, 100, 3), np.uint8), mask=np.zeros((2, 100, 100), np.uint8))])
    elif kind == 'no example':
        write_records(path, [b'\xff' * 50])
    elif kind == 'nothing':
        path.write_bytes(b'')


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('truncated gzip', 'not complete; delete the file and fetch it again'),
        ('flipped byte in the gzip', 'fetch the file again'),
        ('flipped byte in the framing', 'length does not match its checksum'),
        ('cut plain file', 'ends within record 1: it is not complete; delete the file and fetch it again'),
        ('no mask', "record 0 is not as expected: it has no 'mask'"),
        ('another size', 'record 0 is not as expected'),
        ('no example', 'damaged or not a tf.train.Example'),
        ('nothing', 'holds no records'),
    ],
)
def test_broken_records_leave_nothing_behind(clevr, capsys, kind, message):
    Path('data').mkdir()
    broken(kind, Path('data/clevr_with_masks_train.tfrecords'), clevr[1][0][2])
    assert message in refused(capsys, '--prepare', 'clevr6', '--data_dir', 'data')
    assert [path.name for path in Path('data').iterdir()] == ['clevr_with_masks_train.tfrecords']


def test_interrupted_preparation_leaves_nothing_and_can_be_repeated(clevr_dir, monkeypatch, capsys):
    def stopped(images, size):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataset, 'resize', stopped)
        assert dataset.main(dataset.parse_args(['--prepare', 'clevr6', '--data_dir', str(clevr_dir)])) == 130
    assert not list(clevr_dir.glob('*.h5*'))
    assert dataset.main(dataset.parse_args(['--prepare', 'clevr6', '--data_dir', str(clevr_dir)])) == 0
    assert '6 of 8 scenes kept' in capsys.readouterr().out


def test_no_scene_within_the_limit_of_objects(clevr_dir, capsys):
    error = refused(capsys, '--prepare', 'clevr6', '--data_dir', clevr_dir, '--max_objects', 2)
    assert 'none of 8 scenes has at most 2 objects' in error


def test_a_prepared_file_half_written_is_refused(clevr_dir):
    path = prepare('clevr6', clevr_dir, 16)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b'', b'no HDF5'):
        path.write_bytes(content)
        with pytest.raises(DataError, match='is damaged or was not prepared here; delete it'):
            create_dataset('clevr6', 'train', None, 16, data_dir=clevr_dir)


def test_an_empty_folder_says_what_to_download_and_how(capsys):
    Path('data').mkdir()
    assert dataset.main(dataset.parse_args(['--dataset', 'clevr6'])) == 2
    error = capsys.readouterr().err
    for part in ('clevr_with_masks_train.tfrecords', '10.5 GB', 'python dataset.py --prepare clevr6 --data_dir data'):
        assert part in error
    assert error.count('\n') <= 4


def test_printed_commands_quote_a_path_with_blanks():
    with pytest.raises(DataError, match="--prepare clevr6 --data_dir 'my data'"):
        create_dataset('clevr6', 'train', None, data_dir='my data')


# Prepared files as data sets


def test_memory_and_disk_give_the_same_with_and_without_workers(clevr_dir):
    path = prepare('clevr6', clevr_dir, 16, max_objects=10)
    memory, disk = (PreparedDataset(path, 'train', in_memory=where) for where in (True, False))
    assert 'in memory' in str(memory) and str(path) in str(disk)
    batches = []
    for data, workers in ((memory, 0), (disk, 0), (disk, 2)):
        loader = dataset.wrap_in_loader(data, 2, shuffle=True, seed=1, num_workers=workers)
        batches.append(list(loader))
    for other in batches[1:]:
        for a, b in zip(batches[0], other, strict=True):
            assert torch.equal(a['image'], b['image']) and torch.equal(a['mask'], b['mask'])


def test_flips_turn_images_and_labels_together():
    batch = {'image': torch.rand(40, 3, 4, 6), 'mask': torch.randint(5, (40, 4, 6))}
    batch['image'][:, 0] = batch['mask']
    same = torch.rand(40) < 0.5
    turned = dataset.flip(batch, ~same)
    assert torch.equal(turned['image'][:, 0], turned['mask'].float())
    assert torch.equal(turned['image'][same], batch['image'][same])
    assert torch.equal(turned['image'][~same], batch['image'][~same].flip(-1))


# Folders of pictures


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / 'pictures' / 'deep' / 'er'
    folder.mkdir(parents=True)
    for i in range(12):
        image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
        image.save(folder / f'{i}.{("png", "jpg")[i % 2]}')
    return tmp_path / 'pictures'


def test_pictures_are_found_cropped_and_split(pictures):
    wide = np.zeros((40, 60, 3), np.uint8)
    wide[:, 10:50] = 200  # the square in the middle
    for path in pictures.rglob('*.png'):
        Image.fromarray(wide).save(path)
    parts = [PictureFolder(pictures, split, resolution=16) for split in dataset.SPLITS]
    assert sum(len(part) for part in parts) == 12 and min(len(part) for part in parts) >= 1
    assert any((image > 170).all() for image in parts[0].images)
    assert parts[0].labels is None
    assert np.array_equal(PictureFolder(pictures, 'train', 4, 16).images, parts[0].images[:4])


def test_masks_beside_pictures_are_labels(pictures):
    labels = np.zeros((40, 60), np.uint8)
    labels[10:30, 20:40] = 7
    for path in list(pictures.rglob('*.png')):
        Image.fromarray(labels).save(path.with_name(path.stem + '_mask.png'))
    data = PictureFolder(pictures, 'train', resolution=20)
    assert sum(len(PictureFolder(pictures, split, resolution=20)) for split in dataset.SPLITS) == 12  # not the masks
    with_mask = (data.labels != dataset.IGNORE).any(axis=(1, 2))
    assert with_mask.any() and not with_mask.all()
    assert (data.labels[~with_mask] == dataset.IGNORE).all()  # no mask: no label, not all background
    expected = np.zeros((20, 20), np.uint8)
    expected[5:15, 5:15] = 7
    assert (data.labels[with_mask] == expected).all()


def test_odd_pictures_are_read_and_broken_ones_named(pictures, capsys):
    deep = pictures / 'deep'
    grey = np.full((20, 20), 100, np.uint8)
    Image.fromarray(grey).save(deep / 'grey.png')
    Image.fromarray(np.dstack([grey] * 3 + [np.zeros_like(grey)])).save(deep / 'clear.png')
    Image.fromarray(grey.astype(np.uint16) * 257).save(deep / 'deep.png')
    assert np.asarray(dataset.open_picture(deep / 'grey.png')).tolist() == [[[100] * 3] * 20] * 20
    assert np.asarray(dataset.open_picture(deep / 'clear.png')).min() == 255
    assert np.asarray(dataset.open_picture(deep / 'deep.png'))[0, 0].tolist() == [100] * 3
    (deep / 'text.png').write_text('not a picture')
    (deep / 'cut.jpg').write_bytes((deep / 'er' / '1.jpg').read_bytes()[:300])
    total = sum(len(PictureFolder(pictures, split, resolution=16)) for split in dataset.SPLITS)
    assert total == 15
    error = capsys.readouterr().err
    assert 'skipped' in error and 'text.png' in error and 'cut.jpg' in error


def test_folders_without_pictures_are_refused(tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(DataError, match='holds 0 pictures'):
        create_dataset('images', 'train', None, 16, data_dir=tmp_path / 'empty')
    with pytest.raises(DataError, match='no folder'):
        create_dataset('images', 'train', None, 16, data_dir=tmp_path / 'missing')
    with pytest.raises(DataError, match=r'no folder .*gone; --mask_dir'):
        create_dataset('images', 'train', None, 16, data_dir=tmp_path / 'empty', mask_dir=tmp_path / 'gone')
    with pytest.raises(DataError, match="mask_dir is for 'images' only"):
        create_dataset('shapes', 'train', 1, mask_dir=tmp_path)


def draw(number: int, size=(48, 36)) -> tuple[Image.Image, Image.Image]:
    """A black picture with a white box, which no other number has, and its mask."""
    labels = np.zeros(size[::-1], np.uint8)
    y, x = divmod(number, 4)
    labels[y * 3 : y * 3 + 9, x * 6 + 6 : x * 6 + 18] = 1
    return Image.fromarray(labels * 255), Image.fromarray(labels)


def draw_folder(picture: str, mask: str, numbers=range(12), masked=range(12)) -> None:
    """Pictures and masks in `folder`, with these names."""
    for number in numbers:
        image, labels = draw(number)
        for name, drawn in ((picture, image), *(((mask, labels),) if number in masked else ())):
            path = Path('folder', name.format(number))
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn.save(path)


def all_splits(folder='folder', resolution=36, **kwargs) -> list[PictureFolder]:
    return [PictureFolder(folder, split, resolution=resolution, **kwargs) for split in dataset.SPLITS]


@pytest.mark.parametrize(
    ('picture', 'mask', 'folder', 'mask_dir'),
    [
        ('a{:02}.png', 'a{:02}_mask.png', 'folder', None),
        ('a{:02}.png', 'a{:02}_mask.png', 'folder', 'folder'),
        ('a{:02}.png', 'a{:02}_Mask.PNG', 'folder', None),
        ('images/a{:02}.png', 'masks/a{:02}.png', 'folder', None),
        ('Images/a{:02}.png', 'MASKS/a{:02}_mask.png', 'folder', None),
        ('x/images/y/a{:02}.png', 'x/masks/y/a{:02}.png', 'folder', None),
        ('images/a{:02}.png', 'masks/a{:02}.png', 'folder/images', None),
        ('images/a{:02}.png', 'labels/a{:02}.png', 'folder', 'folder/labels'),
        ('images/a{:02}.png', 'labels/images/a{:02}.png', 'folder', 'folder/labels'),
        ('JPEGImages/a{:02}.bmp', 'Segmentation/a{:02}.png', 'folder/JPEGImages', 'folder/Segmentation'),
    ],
)
def test_masks_are_found_beside_and_in_a_parallel_folder(capsys, picture, mask, folder, mask_dir):
    draw_folder(picture, mask)
    parts = all_splits(folder, **({'mask_dir': mask_dir} if mask_dir else {}))
    assert sum(len(part) for part in parts) == 12  # a mask is not a picture
    for part in parts:
        assert ((part.images[..., 0] > 127) == (part.labels == 1)).mean() > 0.99
        assert f'{len(part)} with a mask' in str(part)
    assert not capsys.readouterr().err


def test_a_mask_dir_without_the_mask_of_any_picture_is_refused():
    draw_folder('images/a{:02}.png', 'labels/b{:02}.png')
    with pytest.raises(DataError, match=r'no mask in folder/labels has the name of a picture in folder/images'):
        PictureFolder('folder/images', 'train', resolution=36, mask_dir='folder/labels')


@pytest.mark.parametrize(
    'mask', ['masks/a{:02}.png', 'labels/a{:02}.png', 'SegmentationClass/a{:02}.png', 'p/a{:02}.png']
)
def test_pictures_that_may_be_masks_are_reported(capsys, mask):
    draw_folder('p/a{:02}.jpg', mask)
    assert sum(len(part) for part in all_splits()) == 24
    error = capsys.readouterr().err
    assert '12 pictures such as folder/' in error and 'may be masks' in error and error.count('\n') == 1


def test_smoothed_masks_are_reported(capsys):
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    for path in Path('folder').glob('*_mask.png'):
        Image.fromarray(np.arange(48 * 36, dtype=np.uint16).reshape(36, 48).astype(np.uint8)).save(path)
    all_splits()
    error = capsys.readouterr().err
    assert 'train masks have more than 50 labels' in error and 'NEAREST' in error


def test_photographs_of_masks_are_pictures():
    draw_folder('masks/a{:02}.png', '', masked=())
    assert sum(len(part) for part in all_splits()) == 12


def test_masks_without_a_picture_are_named(capsys):
    draw_folder('images/a{:02}.png', 'masks/a{:02}.png')
    draw(1)[1].save('folder/masks/b01.png')
    draw(1)[1].save('folder/images/c01_mask.png')
    assert sum(len(part) for part in all_splits()) == 12
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'c01_mask.png has no picture' in error and '(and 1 more)' in error


def test_two_masks_of_one_picture_are_refused():
    draw_folder('images/a{:02}.png', 'masks/a{:02}.png')
    draw(1)[1].save('folder/images/a01_mask.png')
    with pytest.raises(DataError, match=r'a01(_mask)?.png and .*a01(_mask)?.png are masks of the same picture'):
        PictureFolder('folder', 'train')


def test_a_removed_or_added_picture_moves_no_other():
    def splits() -> dict[int, str]:
        found = {}
        for part, split in zip(all_splits(resolution=16), dataset.SPLITS, strict=True):
            found |= {int(image[0, 0, 0]): split for image in part.images}
        return found

    Path('folder').mkdir()
    for number in range(100):
        Image.new('L', (16, 16), number).save(f'folder/{number}.png')
    before = splits()
    assert len(before) == 100 and min(list(before.values()).count(split) for split in ('val', 'test')) > 2
    for number in (13, 57):
        Path(f'folder/{number}.png').unlink()
    Image.new('L', (16, 16), 200).save('folder/new.png')
    after = splits()
    assert set(before) - set(after) == {13, 57} and set(after) - set(before) == {200}
    assert all(before[number] == after[number] for number in before.keys() & after.keys())


def test_no_split_is_empty():
    for number in range(3, 40):
        parts = dataset.split_by_name({Path(f'{i}'): f'{i}' for i in range(number)})
        assert all(parts.values()) and sum(map(len, parts.values())) == len(set().union(*parts.values())) == number


def test_a_fingerprint_tells_folders_apart():
    draw_folder('a{:02}.png', 'a{:02}_mask.png', masked=range(6))
    prints = {part.fingerprint for part in [*all_splits(), PictureFolder('folder', 'train', 3, 16)]}
    assert len(prints) == 1
    draw(6)[1].save('folder/a06_mask.png')
    prints.add(PictureFolder('folder', 'val').fingerprint)
    Path('folder/a11.png').unlink()
    prints.add(PictureFolder('folder', 'val').fingerprint)
    assert len(prints) == 3


def test_a_picture_without_a_mask_is_ignored_and_not_background(capsys):
    draw_folder('a{:02}.png', 'a{:02}_mask.png', numbers=range(12), masked=range(0, 12, 2))
    parts = all_splits()
    labels = np.concatenate([part.labels for part in parts if part.labels is not None])
    unmasked = (labels == dataset.IGNORE).all(axis=(1, 2))
    assert unmasked.sum() == len(labels) - sum(part.num_masks for part in parts)
    assert unmasked.any() and (labels[~unmasked] <= 1).all()


def test_label_255_is_not_an_object(capsys):
    draw_folder('a{:02}.png', 'a{:02}_mask.png', masked=range(0, 12, 2))
    for path in Path('folder').glob('*_mask.png'):
        labels = np.array(Image.open(path))
        labels[0] = 255
        Image.fromarray(labels).save(path)
    flags = '--dataset images --data_dir folder --resolution 36'.split()
    assert dataset.main(dataset.parse_args(flags)) == 0
    lines = capsys.readouterr().out.splitlines()
    number = PictureFolder('folder', 'train').num_masks
    assert lines[1].split()[:2] == ['1', str(number)] and f'{number} with a mask' in lines[2]


def test_masks_without_any_object_are_reported(capsys):
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    for path in Path('folder').glob('*_mask.png'):
        Image.fromarray(np.array(Image.open(path)) * 255).save(path)  # the object is 255, which is ignored
    PictureFolder('folder', 'train')
    error = capsys.readouterr().err
    assert 'no train mask has an object' in error and '255' in error and error.count('\n') == 1


def test_a_mask_of_another_aspect_ratio_is_not_used(capsys):
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    for path in Path('folder').glob('*_mask.png'):
        Image.new('L', (36, 36), 1).save(path)
    data = PictureFolder('folder', 'train')
    assert data.labels is None and len(data) > 6
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and f'(and {len(data) - 1} more)' in error
    assert '_mask.png (36x36) and picture' in error and '(48x36) differ in aspect ratio' in error


@pytest.mark.parametrize('size', [(24, 18), (25, 18), (480, 360)])
def test_a_mask_of_another_size_and_the_same_aspect_ratio_is_used(size, capsys):
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    for path in Path('folder').glob('*_mask.png'):
        Image.open(path).resize(size, Image.Resampling.NEAREST).save(path)
    for part in all_splits():
        assert ((part.images[..., 0] > 127) == (part.labels == 1)).mean() > 0.95
    assert not capsys.readouterr().err


@pytest.mark.parametrize('orientation', [3, 6, 8])
def test_exif_rotates_picture_and_mask(orientation):
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    upright = all_splits()
    for number, path in enumerate(sorted(Path('folder').iterdir())):
        if number % 2:  # some of the masks, some of the pictures
            Image.open(path).transpose(turn).save(path, exif=exif)
    for part, same in zip(all_splits(), upright, strict=True):
        assert np.array_equal(part.images, same.images) and np.array_equal(part.labels, same.labels)


def test_palette_masks_hold_their_indices():
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    for path in Path('folder').glob('*_mask.png'):
        mask = Image.open(path).convert('P')
        mask.putdata(np.array(Image.open(path)).ravel())
        mask.putpalette([0, 0, 0, 128, 0, 0])
        mask.save(path)
    for part in all_splits():
        assert ((part.images[..., 0] > 127) == (part.labels == 1)).all()


@pytest.mark.parametrize(('mode', 'shown'), [('RGB', 'PNG mode RGB'), ('I;16', 'mode I;16'), ('JPEG', 'JPEG mode L')])
def test_masks_of_another_mode_are_reported_in_one_line(capsys, mode, shown):
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    for path in Path('folder').glob('*_mask.png'):
        mask = Image.open(path)
        if mode == 'JPEG':
            mask.save(path, format='JPEG')
        else:
            (mask.convert('RGB') if mode == 'RGB' else Image.fromarray(np.array(mask).astype(np.uint16))).save(path)
    data = PictureFolder('folder', 'train')
    assert data.labels is None and len(data) > 6
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and shown in error and f'(and {len(data) - 1} more)' in error
    assert "Image.fromarray(labels.astype('uint8')).save" in error


def test_a_mask_that_cannot_be_read_leaves_its_picture(capsys):
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    for path in Path('folder').glob('*_mask.png'):
        path.write_text('text')
    assert sum(len(part) for part in all_splits()) == 12
    assert 'cannot be read' in capsys.readouterr().err


def png_of_16_bits(values: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel, which PIL cannot write: [h, w, 3]."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    height, width, _ = values.shape
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values)
    header = struct.pack('>IIBBBBB', width, height, 16, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def test_deep_pictures_are_scaled_or_refused_but_never_black():
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for name, values in {
        'float.tif': ramp,
        'float255.tif': ramp * 255,
        'bits12.png': (ramp * 4095).astype(np.uint16),
        'bits12.tif': (ramp * 4095).astype(np.uint16),
        'bits16.png': (ramp * 65535).astype(np.uint16),
        'int32.tif': (ramp * 255).astype(np.int32),
    }.items():
        Image.fromarray(values).save(name)
        found = dataset.read_picture(Path(name), 8)[..., 0]
        assert np.abs(found - ramp * 255).max() <= 1.01, name
    for name, values in {'nan.tif': ramp * np.nan, 'negative.tif': -ramp, 'large.tif': ramp * 1e6}.items():
        Image.fromarray(values).save(name)
        with pytest.raises(DataError, match=f'{name} cannot be read as a picture: its values are from'):
            dataset.read_picture(Path(name), 8)
    colours = np.repeat(ramp[..., None], 3, axis=2)
    Path('rgb16.png').write_bytes(png_of_16_bits(colours * 65535))
    assert dataset.read_picture(Path('rgb16.png'), 8).max() == 255
    Path('rgb12.png').write_bytes(png_of_16_bits(colours * 4095))
    with pytest.raises(DataError, match=r'rgb12.png .* at most 12 bits'):
        dataset.read_picture(Path('rgb12.png'), 8)


def test_pictures_are_listed_in_natural_order_through_links_and_without_hidden_ones():
    for name in ('b/frame10.png', 'b/frame2.png', 'b/frame1.PNG', 'b/._frame1.png', '.hidden/frame3.png', 'c2/a.png'):
        path = Path('folder', name)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(0)[0].save(path)
    Path('elsewhere').mkdir()
    draw(0)[0].save('elsewhere/linked.png')
    Path('folder/c10').symlink_to(Path('elsewhere').resolve())
    Path('folder/b/loop').symlink_to(Path('folder').resolve())
    found = [path.relative_to('folder').as_posix() for path in dataset.find_pictures(Path('folder'))]
    assert found == ['b/frame1.PNG', 'b/frame2.png', 'b/frame10.png', 'c2/a.png', 'c10/linked.png']


def test_what_exceeds_the_available_memory_is_refused_or_read_from_disk(pictures, clevr_dir, monkeypatch):
    path = prepare('clevr6', clevr_dir, 16)
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: SimpleNamespace(available=5_000))
    with pytest.raises(DataError, match='do not fit in memory'):
        PictureFolder(pictures, 'train', resolution=128)
    assert not PreparedDataset(path, 'train').in_memory


# Downloads


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`; breaks off after `broken_after` bytes while there are `breaks` left."""

    content, ranges, broken_after, breaks, log = b'', True, 0, 0, []

    def do_GET(self):
        start = 0
        self.log.append(self.headers.get('Range'))
        if self.path != '/file':
            return self.send_error(404)
        if self.ranges and self.headers.get('Range'):
            start = int(self.headers['Range'].removeprefix('bytes=').removesuffix('-'))
            if start >= len(self.content):
                self.send_response(416)
                self.send_header('Content-Range', f'bytes */{len(self.content)}')
                return self.end_headers()
            self.send_response(206)
        else:
            self.send_response(200)
        body = self.content[start:]
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if type(self).breaks > 0:
            type(self).breaks -= 1
            body = body[: self.broken_after]
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(dataset.time, 'sleep', lambda seconds: None)
    handler = type('Handler', (Server,), {'log': []})
    running = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    handler.url = f'http://127.0.0.1:{running.server_address[1]}/file'
    yield handler
    running.shutdown()
    running.server_close()


def test_a_download_goes_on_where_it_broke_off(server, clevr, capsys):
    server.content = (clevr[0] / 'clevr_with_masks_train.tfrecords').read_bytes()
    server.breaks, server.broken_after = 5, 10_000
    error = refused(capsys, '--prepare', 'clevr6', '--data_dir', 'data', '--url', server.url)
    assert 'run the same command again to continue from there' in error
    assert Path('data/clevr_with_masks_train.tfrecords.part').stat().st_size == 50_000
    flags = ['--prepare', 'clevr6', '--data_dir', 'data', '--url', server.url]
    assert dataset.main(dataset.parse_args(flags)) == 0
    assert server.log == [None, *(f'bytes={n}-' for n in range(10_000, 60_000, 10_000))]
    assert Path('data/clevr_with_masks_train.tfrecords').read_bytes() == server.content
    assert Path('data/clevr6_128_max6.h5').exists()


@pytest.mark.parametrize('there', [b'', b'0123', b'0123456789', b'0123456789 and more'])
@pytest.mark.parametrize('ranges', [True, False])
def test_whatever_came_before_the_file_becomes_whole(server, there, ranges):
    server.content, server.ranges = b'0123456789', ranges
    Path('file.part').write_bytes(there)
    dataset.download(server.url, Path('file'))
    assert Path('file').read_bytes() == server.content and not Path('file.part').exists()


def test_addresses_that_lead_nowhere_are_refused(server, capsys):
    for url in (server.url + '/none', 'http://127.0.0.1:1/file', 'nonsense'):
        assert url in refused(capsys, '--prepare', 'tetrominoes', '--data_dir', 'data', '--url', url)
    assert not list(Path('data').iterdir())


# Real renders, if the sample is present


@pytest.mark.skipif(not SAMPLE.exists(), reason='the sample of CLEVR renders is not here')
def test_real_renders_are_prepared_trained_on_scored_and_drawn(capsys):
    Path('data').mkdir()
    (Path('data') / 'clevr_with_masks_train.tfrecords').symlink_to(SAMPLE / 'clevr_with_masks_train.tfrecords')
    counts = [scene['objects'] for scene in json.loads((SAMPLE / 'index_tfrecord.json').read_text())['scenes']]
    small = '--dataset clevr6 --resolution 32 --hidden_dim 8 --slot_dim 16 --batch_size 16 --epochs 1'.split()
    assert train.main(train.parse_args(small)) == 0
    with h5py.File('data/clevr6_32_max6.h5') as file:
        assert file['num_objects'][:].tolist() == [count for count in counts if count <= 6]
        for labels, count in zip(file['mask'][:], file['num_objects'][:], strict=True):
            assert labels.max() <= 10 and 1 <= len(np.unique(labels)) - 1 <= count
    flags = '--eval --resume logs/checkpoints/best_model.pth --max_objects 10 --num_slots 11'
    assert train.main(train.parse_args(flags.split())) == 0
    printed = capsys.readouterr().out
    assert '45 test images of clevr6, 11 slots' in printed
    assert visualize.main(visualize.parse_args(['--num_images', '2'])) == 0
    assert Path('visualizations/slots.png').stat().st_size > 5000
