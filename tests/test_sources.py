"""Tests of published records, prepared files, folders of pictures and downloads: each value, each error in one line."""

import gzip
import http.server
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import dataset
from dataset import DataError, ShapesDataset, create_dataloader, create_dataset, prepare

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
            value = field(1, np.insert(values.reshape(-1, 1), 0, [[10], [1]], axis=1).tobytes())
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


NAME = 'clevr_with_masks_train.tfrecords'


@pytest.fixture(scope='session')
def clevr(tmp_path_factory):
    """A folder with eight scenes of 3 to 10 objects as CLEVR with masks; and what they hold."""
    folder = tmp_path_factory.mktemp('clevr')
    scenes = [clevr_scene(seed, count) for seed, count in enumerate((3, 6, 7, 10, 6, 4, 5, 3))]
    write_records(folder / NAME, [record for _, _, record in scenes])
    return folder, scenes


@pytest.fixture
def clevr_dir(clevr, tmp_path):
    """As `clevr`, in a folder of the test's own."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / NAME).symlink_to(clevr[0] / NAME)
    return tmp_path / 'data'


def run(*flags) -> int:
    return dataset.main(dataset.parse_args([str(flag) for flag in flags]))


def refused(capsys, *flags) -> str:
    capsys.readouterr()
    assert run(*flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('dataset.py: error: ')
    return error


def splits_of(path: Path) -> dict[int, int]:
    with h5py.File(path) as file:
        return dict(zip(file['record'][:].tolist(), file['split'][:].tolist(), strict=True))


# CLEVR with masks


def test_clevr6_is_read_value_by_value(clevr, clevr_dir):
    path = prepare('clevr6', clevr_dir, resolution=192)  # the size of the crop: nothing is resized
    kept = [0, 1, 4, 5, 6, 7]  # exactly 6 objects stay, 7 go
    with h5py.File(path) as file:
        assert file['record'][:].tolist() == kept
        assert file['num_objects'][:].tolist() == [3, 6, 6, 4, 5, 3]
        for row, record in enumerate(kept):
            image, labels, _ = clevr[1][record]
            assert np.array_equal(file['image'][row], image[29:221, 64:256])
            assert np.array_equal(file['mask'][row], labels[29:221, 64:256])
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


def test_the_split_of_a_record_is_the_same_in_every_prepared_file(clevr_dir):
    paths, splits = set(), {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 1, 7: 2}
    for max_objects, limit in ((10, None), (6, None), (10, 3), (6, 5), (10, 7)):
        path = prepare('clevr6', clevr_dir, 16, max_objects, limit=limit)
        assert splits_of(path).items() <= splits.items()
        paths.add(path)
    assert len(paths) == 5 and splits_of(prepare('clevr6', clevr_dir, 16, 10)) == splits


def test_limit_stops_early_under_a_name_of_its_own(clevr_dir):
    limited = prepare('clevr6', clevr_dir, 16, limit=3)
    assert limited.name == 'clevr6_16_max6_limit3.h5' and list(splits_of(limited)) == [0, 1, 4]
    assert len(create_dataset('clevr6', 'train', None, 16, data_dir=clevr_dir)) == 4  # of the whole file
    assert len(create_dataset('clevr6', 'train', None, 16, data_dir=limited)) == 3
    assert len(create_dataset('clevr6', 'all', None, 16, data_dir=clevr_dir)) == 6


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
        create_dataset('clevr6', 'train', None, 16, data_dir=clevr_dir / NAME)


def test_the_next_preparation_deletes_what_a_killed_one_left_on_this_computer(clevr_dir):
    ended = subprocess.Popen(['true'])
    ended.wait()
    (clevr_dir / f'.clevr6_32_max6.h5.{platform.node()}.{ended.pid}').write_bytes(b'unfinished')
    live = [f'.clevr6_32_max6.h5.{platform.node()}.{os.getppid()}', f'.clevr6_32_max6.h5.another-host.{ended.pid}']
    for name in live:
        (clevr_dir / name).write_bytes(b'of a process that may run')
    prepare('clevr6', clevr_dir, 16)
    assert sorted(path.name for path in clevr_dir.iterdir()) == sorted([*live, 'clevr6_16_max6.h5', NAME])


def test_a_source_in_a_read_only_folder_is_prepared_elsewhere(clevr_dir, capsys):
    prepare('clevr6', clevr_dir, 16, output_dir='else where/deep')
    assert len(create_dataset('clevr6', 'train', None, 16, data_dir='else where/deep')) == 4
    for folder in ('/proc', clevr_dir / NAME / 'folder'):  # not even root can write there
        error = refused(capsys, '--prepare', 'clevr6', '--data_dir', clevr_dir, '--output_dir', folder)
        assert 'cannot be written' in error and '--output_dir FOLDER' in error and 'h5py' not in error


def test_a_full_disk_is_one_line_and_nothing_stays(clevr_dir, capsys, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=1e6))
    error = refused(capsys, '--prepare', 'clevr6', '--data_dir', clevr_dir)
    assert 'clevr6_128_max6.h5 cannot be written: No space left on device' in error
    assert [path.suffix for path in clevr_dir.iterdir()] == ['.tfrecords']


def test_a_fingerprint_tells_prepared_files_apart(clevr_dir):
    prints = [
        create_dataset('clevr6', split, size, 16, max_objects=max_objects, data_dir=clevr_dir).fingerprint
        for split, size, max_objects in (('train', None, 6), ('train', 2, 6), ('val', None, 6), ('train', None, 10))
    ]
    assert prints[0] == prints[1] == prints[2] != prints[3]
    assert ShapesDataset(size=1).fingerprint == ShapesDataset('val', size=2).fingerprint
    assert ShapesDataset(size=1).fingerprint != ShapesDataset(size=1, data_seed=1).fingerprint


# The other published sets


@pytest.mark.parametrize(
    ('name', 'side', 'channels', 'entities', 'backgrounds', 'options'),
    [
        ('multi_dsprites', 64, 3, 6, 1, {}),
        ('multi_dsprites', 64, 1, 4, 1, {'variant': 'binarized'}),
        ('tetrominoes', 35, 3, 4, 1, {}),
        ('objects_room', 64, 3, 7, 4, {}),
    ],
)
def test_other_sets_are_read_value_by_value(name, side, channels, entities, backgrounds, options):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (side, side, channels), np.uint8)
    labels = rng.integers(0, entities, (side, side))
    masks = np.where(labels == np.arange(entities)[:, None, None], 255, 0).astype(np.uint8)[..., None]
    variant = options.get('variant', 'colored_on_grayscale')
    file = f'multi_dsprites_{variant}' if name == 'multi_dsprites' else f'{name}_train'
    if name == 'multi_dsprites':
        masks = masks.transpose(1, 2, 0, 3)
    write_records(Path(f'data/{file}.tfrecords'), [example(image=image, mask=masks)])
    with h5py.File(prepare(name, 'data', side, **options)) as file:
        assert np.array_equal(file['image'][0], np.broadcast_to(image, (side, side, 3)))
        assert np.array_equal(file['mask'][0], np.maximum(labels - backgrounds + 1, 0))
        assert file['num_objects'][0] == entities - backgrounds


# CLEVR v1.0


def write_clevr_v1(folder: Path, size=(480, 320), scenes=6) -> None:
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        listed = []
        for i in range(scenes):
            name = f'CLEVR_{split}_{i:06d}.png'
            picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).convert('RGBA')
            (folder / 'images' / split).mkdir(parents=True, exist_ok=True)
            picture.save(folder / 'images' / split / name)
            listed.append({'image_filename': name, 'objects': [{}] * (i + 3)})
        (folder / 'scenes').mkdir(exist_ok=True)
        (folder / 'scenes' / f'CLEVR_{split}_scenes.json').write_text(json.dumps({'scenes': listed}))


def test_clevr_v1_is_filtered_by_its_json_and_has_no_masks():
    write_clevr_v1(Path('data/CLEVR_v1.0'), size=(320, 240))
    with h5py.File(prepare('clevr6', 'data', 192)) as file:
        assert file['num_objects'][:].tolist() == [3, 4, 5, 6] * 2
        assert file['split'][:].tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
        with Image.open('data/CLEVR_v1.0/images/train/CLEVR_train_000002.png') as picture:
            assert np.array_equal(file['image'][2], np.asarray(picture.convert('RGB'))[29:221, 64:256])
    batch = next(iter(create_dataloader('clevr6', 2, 192, train_size=2, val_size=1)[0]))
    assert set(batch) == {'image'} and batch['image'].shape == (2, 3, 192, 192)


def test_large_pictures_are_cropped_at_the_centre():
    write_clevr_v1(Path('data/CLEVR_v1.0'), scenes=1)
    columns = np.repeat((np.arange(480) // 2).astype(np.uint8)[None], 320, axis=0)
    Image.fromarray(columns).save('data/CLEVR_v1.0/images/train/CLEVR_train_000000.png')  # one channel, too
    with h5py.File(prepare('clevr6', 'data', 192)) as file:
        row = file['image'][0, 90, :, 0].astype(float)
    # 480 columns become 360, of which 84 to 276 stay; one of them is 4/3 columns of the picture.
    assert np.allclose(row, (np.arange(84, 276) + 0.5) * 4 / 3 / 2 - 0.5, atol=1)


def test_a_picture_is_cropped_and_resized_as_in_the_training_data(clevr, clevr_dir):
    scene = clevr[1][1][0]
    Image.fromarray(scene).save('scene.png')
    Image.fromarray(scene[29:221, 64:256]).save('cropped.png')  # a picture that is cropped already
    with h5py.File(prepare('clevr6', clevr_dir, 128)) as file:
        for name in ('scene.png', 'cropped.png'):
            assert np.array_equal(dataset.read_picture(Path(name), 128, 'clevr6'), file['image'][1])
    assert dataset.crop_box(320, 240, 'clevr6') == (64, 29, 256, 221)
    assert dataset.crop_box(320, 240, 'images') == (40, 0, 280, 240)


def test_faults_of_clevr_v1_are_named(capsys):
    folder = Path('data/CLEVR_v1.0')
    write_clevr_v1(folder)
    flags = ('--prepare', 'clevr6', '--data_dir', 'data')
    for number in (1, 4, 5):
        (folder / f'images/train/CLEVR_train_00000{number}.png').unlink()
    error = refused(capsys, *flags)
    assert '3 of the 6 pictures' in error and 'first is data/CLEVR_v1.0/images/train/CLEVR_train_000001.png' in error
    for text in ('{"scenes": [{"objects": []}]}', '[1, 2', '{"info": 1}'):
        (folder / 'scenes/CLEVR_train_scenes.json').write_text(text)
        assert 'is not a list of CLEVR scenes' in refused(capsys, *flags)
    for split in ('train', 'val'):
        (folder / f'scenes/CLEVR_{split}_scenes.json').write_text('{"scenes": []}')
    assert 'has no CLEVR_train_scenes.json or CLEVR_val_scenes.json that lists a scene' in refused(capsys, *flags)
    assert not list(Path('data').glob('*.h5*'))


# Damaged records and prepared files


def flipped(content: bytes, place: float) -> bytes:
    i = int(place * len(content))
    return content[:i] + bytes([content[i] ^ 0x55]) + content[i + 1 :]


BLACK = np.zeros((240, 320, 3), np.uint8)
INCOMPLETE = 'it is not complete; delete the file and fetch it again'


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda record: gzip.compress(frame(record) * 2, 1)[:-2000], INCOMPLETE),
        (lambda record: flipped(gzip.compress(frame(record), 1), 0.5), 'is damaged'),
        (lambda record: gzip.compress(flipped(frame(record), 0), 1), 'length does not match its checksum'),
        (lambda record: (frame(record) * 2)[:-7], f'ends within record 1: {INCOMPLETE}'),
        (lambda record: frame(example(image=BLACK)), "record 0 is damaged or not as expected: it has no 'mask'"),
        (lambda record: frame(example(image=BLACK[:9], mask=BLACK[:9])), 'record 0 is damaged or not as expected'),
        (lambda record: frame(b'\xff' * 50), 'record 0 is damaged or not as expected'),
        (lambda record: b'', 'holds no records'),
    ],
)
def test_broken_records_leave_nothing_behind(clevr, capsys, change, message):
    Path('data').mkdir()
    (Path('data') / NAME).write_bytes(change(clevr[1][0][2]))
    assert message in refused(capsys, '--prepare', 'clevr6', '--data_dir', 'data')
    assert [path.name for path in Path('data').iterdir()] == [NAME]


def test_a_plain_file_is_said_to_be_unchecked(clevr, capsys):
    Path('data').mkdir()
    (Path('data') / NAME).write_bytes(frame(clevr[1][0][2]))
    prepare('clevr6', 'data', 16)
    assert 'is not compressed with GZIP: damaged images would not be noticed' in capsys.readouterr().err


def test_interrupted_preparation_leaves_nothing_and_can_be_repeated(clevr_dir, monkeypatch, capsys):
    def stopped(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'disk_usage', stopped)  # asked for before each write
        assert run('--prepare', 'clevr6', '--data_dir', clevr_dir) == 130
    assert [path.name for path in clevr_dir.iterdir()] == [NAME]
    assert run('--prepare', 'clevr6', '--data_dir', clevr_dir) == 0
    assert '6 of 8 scenes kept' in capsys.readouterr().out


def test_no_scene_within_the_limit_of_objects(clevr_dir, capsys):
    error = refused(capsys, '--prepare', 'clevr6', '--data_dir', clevr_dir, '--max_objects', 2)
    assert 'none of 8 scenes has at most 2 objects' in error


def test_a_prepared_file_that_cannot_be_read_is_never_to_be_deleted(clevr_dir, capsys):
    path = prepare('clevr6', clevr_dir, 16)
    flags = ('--dataset', 'clevr6', '--resolution', 16, '--data_dir')
    hold = 'import h5py, sys; file = h5py.File(sys.argv[1], "a"); print("open", flush=True); input()'
    command = [sys.executable, '-c', hold, path]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    errors = [refused(capsys, *flags, clevr_dir)]
    holder.communicate(b'\n')
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b'', b'no HDF5'):
        path.write_bytes(content)
        errors.append(refused(capsys, *flags, clevr_dir))
    for error, reason in zip(errors, ('lock', 'truncated', 'signature', 'signature'), strict=True):
        assert f'{path} cannot be read' in error and reason in error and 'if it is damaged, prepare it again' in error
    with h5py.File('mine.h5', 'w') as file:
        file['image'] = np.zeros(3)
    errors.append(refused(capsys, *flags, 'mine.h5'))
    assert 'mine.h5 was not written by python dataset.py --prepare' in errors[-1]
    assert not any('delete' in error for error in errors)


def test_an_empty_folder_says_what_to_do(capsys):
    Path('my data').mkdir()
    error = refused(capsys, '--dataset', 'clevr6', '--data_dir', 'my data')
    for part in (NAME, '10.5 GB', "python dataset.py --prepare clevr6 --data_dir 'my data'"):
        assert part in error


def test_memory_and_disk_give_the_same_with_and_without_workers(clevr_dir, monkeypatch):
    path = prepare('clevr6', clevr_dir, 16, max_objects=10)
    memory = create_dataset('clevr6', 'train', resolution=16, max_objects=10, data_dir=path)
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: SimpleNamespace(available=5_000))
    disk = create_dataset('clevr6', 'train', resolution=16, max_objects=10, data_dir=path)
    assert 'in memory' in str(memory) and f'read from {path}' in str(disk)
    batches = []
    for data, workers in ((memory, 0), (disk, 0), (disk, 2)):
        loader = dataset.wrap_in_loader(data, 2, shuffle=True, seed=1, num_workers=workers)
        batches.append(list(loader))
    for other in batches[1:]:
        for a, b in zip(batches[0], other, strict=True):
            assert torch.equal(a['image'], b['image']) and torch.equal(a['mask'], b['mask'])


def test_images_that_exceed_the_memory_are_refused(monkeypatch):
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    with pytest.raises(DataError, match='train images of shapes do not fit in memory; use fewer images'):
        create_dataset('shapes', 'train', 10**9)
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: SimpleNamespace(available=5_000))
    with pytest.raises(DataError, match='train images of images do not fit in memory'):
        create_dataset('images', 'train', data_dir='folder')


def test_a_memory_limit_is_respected():
    with h5py.File('large.h5', 'w') as file:
        file.attrs.update(dataset='clevr6', resolution=256, max_objects=6)
        file.create_dataset('image', (500, 256, 256, 3), 'u1', chunks=(1, 256, 256, 3))  # 98 MB, not written
        for name in ('record', 'split', 'num_objects'):
            file[name] = np.zeros(500, int)
    script = (
        'import os, resource, sys; sys.path.insert(0, sys.argv[1]); import dataset\n'
        'pages = int(open("/proc/self/statm").read().split()[0])\n'
        'resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 50_000_000,) * 2)\n'
        'data = dataset.create_dataset("clevr6", "train", resolution=256, data_dir="large.h5")\n'
        'print(data, len(data[499]["image"]))\n'
        'try: dataset.create_dataset("shapes", "train", 10_000)\n'
        'except dataset.DataError as error: print(error)\n'
    )
    command = [sys.executable, '-c', script, str(Path(dataset.__file__).parent)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert out == [
        '500 images, read from large.h5 3',
        'the train images of shapes do not fit in memory; use fewer images or a smaller --resolution',
    ]


# Folders of pictures


def draw(number: int, size=(48, 36)) -> tuple[Image.Image, Image.Image]:
    """A black picture with a white box, which no other number has, and its mask."""
    labels = np.zeros(size[::-1], np.uint8)
    y, x = divmod(number, 4)
    labels[y * 3 : y * 3 + 9, x * 6 + 6 : x * 6 + 18] = 1
    return Image.fromarray(labels * 255).convert('RGB'), Image.fromarray(labels)


def draw_folder(picture: str, *masks: str, numbers=range(12), masked=range(12)) -> None:
    """Pictures and masks in `folder`, with these names."""
    for number in numbers:
        image, labels = draw(number)
        for name, drawn in ((picture, image), *((mask, labels) for mask in masks if number in masked)):
            path = Path('folder', name.format(number))
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn.save(path)


def change_masks(change) -> None:
    for path in Path('folder').rglob('*_mask.png'):
        with Image.open(path) as mask:
            mask.load()
        change(mask).save(path)


def folder_of(split: str, folder='folder', resolution=36, **options) -> dataset.PictureFolder:
    return create_dataset('images', split, None, resolution, data_dir=folder, **options)


def all_splits(folder='folder', **options) -> list[dataset.PictureFolder]:
    return [folder_of(split, folder, **options) for split in dataset.SPLITS]


def assert_masked(parts: list[dataset.PictureFolder]) -> None:
    for part in parts:
        assert ((part.images[..., 0] > 127) == (part.labels == 1)).mean() > 0.95
        assert f'{len(part)} with a mask of 1 objects (median; at most 1)' in str(part)


def test_pictures_are_found_cropped_and_split():
    for i in range(12):
        pixels = np.zeros((40, 60, 3), np.uint8)
        pixels[:, 10:50] = 200  # the square in the middle
        path = Path(f'folder/deep/er/{i}.{("png", "jpg")[i % 2]}')
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    parts = all_splits(resolution=16)
    assert sum(map(len, parts)) == 12 and min(map(len, parts)) >= 1 and parts[0].labels is None
    assert all((part.images > 150).all() for part in parts)
    few = create_dataset('images', 'train', 4, 16, data_dir='folder')
    assert np.array_equal(few.images, parts[0].images[:4])
    assert len(folder_of('all', resolution=16)) == 12


@pytest.mark.parametrize(
    ('picture', 'mask', 'folder', 'masks'),
    [
        ('a{:02}.png', 'a{:02}_mask.png', 'folder', None),
        ('a{:02}.png', 'a{:02}_Mask.PNG', 'folder', None),
        ('images/a{:02}.png', 'masks/a{:02}.png', 'folder', None),
        ('Images/a{:02}.png', 'MASKS/A{:02}.png', 'folder', None),
        ('Images/a{:02}.png', 'MASKS/A{:02}.png', 'folder/Images', None),
        ('x/images/y/a{:02}.png', 'x/masks/y/a{:02}.png', 'folder', None),
        ('images/a{:02}.png', 'masks/a{:02}.png', 'folder/../folder/images', None),
        ('images/a{:02}.png', 'labels/a{:02}.png', 'folder', '../labels/{name}.png'),
        ('JPEGImages/480p/b/{:05}.bmp', 'Annotations/480p/b/{:05}.png', 'folder', '../Annotations/{name}.png'),
        ('J/480p/b/{:05}.bmp', 'A/480p/b/{:05}.png', 'folder/J/480p', '../../A/480p/{name}.png'),
        ('a{:02}.bmp', 'a{:02}.png', 'folder', '{name}.png'),
        ('a{:02}.bmp', 'deep/masks/a{:02}_1.tif', 'folder', 'deep/masks/{name}_1.tif'),
    ],
)
def test_masks_are_found_by_patterns(capsys, picture, mask, folder, masks):
    draw_folder(picture, mask)
    parts = all_splits(folder, masks=masks)
    assert sum(map(len, parts)) == 12  # a mask is not a picture
    assert_masked(parts)
    assert not capsys.readouterr().err


def test_a_pattern_that_leads_nowhere_is_refused(capsys):
    draw_folder('images/a{:02}.png', 'labels/b{:02}.png')
    flags = ('--dataset', 'images', '--data_dir', 'folder', '--masks')
    assert '--masks ../labels/{name}.png leads to no mask' in refused(capsys, *flags, '../labels/{name}.png')
    assert '--masks a.png must contain {name}' in refused(capsys, *flags, 'a.png')


@pytest.mark.parametrize(
    ('picture', 'labels', 'number'),
    [
        ('JPEGImages/2007_{:06}.jpg', ['SegmentationClass/2007_{:06}.png', 'SegmentationObject/2007_{:06}.png'], 12),
        ('JPEGImages/480p/bear/{:05}.jpg', ['Annotations/480p/bear/{:05}.png'], 12),
        (
            'leftImg8bit/{:02}_leftImg8bit.png',
            ['gtFine/{:02}_gtFine_color.png', 'gtFine/{:02}_gtFine_Ids.png'],
            12,
        ),
        ('p/a{:02}.jpg', ['p2/b{:02}.png'], 24),  # other names
    ],
)
def test_label_images_in_a_parallel_folder_are_no_pictures(capsys, picture, labels, number):
    draw_folder(picture, *labels, masked=range(0, 12, 2))
    for path in Path('folder').rglob('*_color.png'):
        Image.open(path).convert('RGBA').save(path)
    found = len(folder_of('all'))
    error = capsys.readouterr().err
    if number == 24:
        assert found == 18 and not error
        return
    assert found == 12 and '(and 5 more)' in error.replace('(and 11 more)', '(and 5 more)')
    for name in {label.split('/')[0] for label in labels}:
        pattern = f'../{name}/{{name}}.png'
        assert 'seems to hold labels' in error and f"add --masks '{pattern}'" in error
    if 'gtFine' not in error:
        assert len(folder_of('all', masks=pattern).objects) == 6


def test_folders_of_pictures_with_equal_names_are_all_pictures(capsys):
    draw_folder('cats/{}.jpg')
    draw_folder('dogs/{}.png')
    assert len(folder_of('all')) == 24
    shutil.rmtree('folder')
    draw_folder('masks/{}.jpg')  # photographs of masks
    assert len(folder_of('all')) == 12
    assert not capsys.readouterr().err


def test_masks_without_a_picture_are_named(capsys):
    draw_folder('images/a{:02}.png', 'masks/a{:02}.png')
    draw(1)[1].save('folder/masks/b01.png')
    draw(1)[0].save('folder/images/gas_mask.jpg')
    assert sum(map(len, all_splits())) == 12
    error = capsys.readouterr().err
    assert 'gas_mask.jpg is left out as a mask without a picture (and 1 more)' in error
    assert 'if it is a picture, another name' in error
    assert error.count('\n') == 2  # for train and for test


def test_names_match_in_their_case_first_and_in_any_unicode_form():
    Path('folder').mkdir()
    for i, name in enumerate(('yt0AB', 'yt0aB', 'x', 'Café')):
        image, labels = draw(i)
        image.save(f'folder/{name}.png')
        if name == 'Café':
            name = unicodedata.normalize('NFD', name)
        if name != 'yt0AB':
            labels.save(f'folder/{name}_mask.png')
    data = folder_of('all')
    masked = (data.labels != dataset.IGNORE).any(axis=(1, 2))
    assert masked.sum() == 3
    for image, labels in zip(data.images[masked], data.labels[masked], strict=True):
        assert np.array_equal(image[..., 0] > 127, labels == 1)


def test_folders_train_val_and_test_are_the_splits(capsys):
    for split, start, number in (('train', 0, 6), ('Valid', 6, 2), ('test', 8, 3), ('more', 11, 1)):
        draw_folder(f'{split}/images/{{}}.png', f'{split}/masks/{{}}.png', numbers=range(start, start + number))
    assert [len(part) for part in all_splits()] == [6, 2, 3]
    assert 'its folders are the splits: 6 train, 2 val, 3 test, 1 left out' in capsys.readouterr().err
    assert len(folder_of('all')) == 12 and len(folder_of('all', 'folder/test')) == 3
    shutil.rmtree('folder/Valid')
    shutil.rmtree('folder/more')
    assert [len(part) for part in all_splits()] == [5, 1, 3]  # val is taken from train
    assert_masked(all_splits())


def test_files_that_are_left_out_are_counted(capsys):
    draw_folder('a{:02}.png')
    for i in range(3):
        Path(f'folder/gone{i}.png').symlink_to('nowhere')
        Path(f'folder/phone{i}.HEIC').write_bytes(b'')
    pages = [draw(i)[0] for i in range(3)]
    pages[0].save('folder/pages.tif', save_all=True, append_images=pages[1:])
    assert len(folder_of('all')) == 13
    gone, pages, phone = sorted(capsys.readouterr().err.splitlines())
    assert 'gone0.png cannot be reached' in gone and '(and 2 more)' in gone
    assert 'pages.tif has 3 pages' in pages and 'phone0.HEIC' in phone and '(and 2 more)' in phone


def test_figures_of_the_scripts_are_no_pictures(capsys):
    draw_folder('a{:02}.png')
    assert run('--num_images', 8, '--output', 'folder/samples.png') == 0
    metadata = PngInfo()
    metadata.add_text('Creator', 'Slot Attention visualize.py')
    draw(1)[0].save('folder/slots.png', pnginfo=metadata)
    draw(1)[0].save('folder/frames.gif', comment=b'Slot Attention visualize.py')
    capsys.readouterr()
    assert len(folder_of('all')) == len(dataset.find_pictures('folder')) == 12
    assert '(and 2 more)' in capsys.readouterr().err


def test_folders_without_pictures_are_refused(capsys):
    Path('empty').mkdir()
    assert 'empty holds 0 pictures' in refused(capsys, '--dataset', 'images', '--data_dir', 'empty')
    assert 'no folder' in refused(capsys, '--dataset', 'images', '--data_dir', 'missing')


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
    # As in every version: a resumed run sees the same images in the same order.
    first = {split: [number for number in before if before[number] == split][:3] for split in dataset.SPLITS}
    assert first == {'train': [38, 18, 44], 'val': [68, 33, 6], 'test': [31, 49, 23]}
    for number in (13, 57):
        Path(f'folder/{number}.png').unlink()
    Image.new('L', (16, 16), 200).save('folder/new.png')
    after = splits()
    assert set(before) - set(after) == {13, 57} and set(after) - set(before) == {200}
    assert all(before[number] == after[number] for number in before.keys() & after.keys())


def test_no_split_is_empty():
    for number in range(3, 12):
        draw_folder('a{:02}.png', numbers=[number - 1] if number > 3 else range(3))
        parts = all_splits(resolution=16)
        assert min(map(len, parts)) > 0 and sum(map(len, parts)) == number


def test_a_fingerprint_tells_folders_apart():
    draw_folder('a{:02}.png', 'a{:02}_mask.png', masked=range(6))
    prints = {part.fingerprint for part in [*all_splits(), create_dataset('images', 'train', 3, 16, data_dir='folder')]}
    assert len(prints) == 1
    draw(6)[1].save('folder/a06_mask.png')
    prints.add(folder_of('val').fingerprint)
    Path('folder/a11.png').unlink()
    prints.add(folder_of('val').fingerprint)
    assert len(prints) == 3


# Masks


def test_a_picture_without_a_mask_is_ignored_and_not_background():
    draw_folder('a{:02}.png', 'a{:02}_mask.png', masked=range(0, 12, 2))
    data = folder_of('all')
    unmasked = (data.labels == dataset.IGNORE).all(axis=(1, 2))
    assert unmasked.sum() == 6 and (data.labels[~unmasked] <= 1).all() and '6 with a mask' in str(data)


def test_label_255_is_not_an_object(capsys):
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    change_masks(lambda mask: Image.fromarray(np.r_[np.full((1, 48), 255, np.uint8), np.asarray(mask)[1:]]))
    assert run('--dataset', 'images', '--data_dir', 'folder', '--resolution', 36) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ['1', lines[2].split()[0]] and 'of 1 objects (median; at most 1)' in lines[2]


def test_masks_of_0_and_255_alone_are_reported(capsys):
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    for path in list(Path('folder').glob('*_mask.png'))[::2]:
        Image.fromarray(np.array(Image.open(path)) * 255).save(path)  # the object is 255, which is ignored
    folder_of('all')
    error = capsys.readouterr().err
    assert 'has no label but 0 and 255, which no score counts (and 5 more)' in error and error.count('\n') == 1


def test_masks_that_were_interpolated_are_reported(capsys):
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    change_masks(lambda mask: mask.point(lambda label: label * 100).resize((160, 120), Image.Resampling.NEAREST))
    folder_of('all')
    assert not capsys.readouterr().err
    change_masks(lambda mask: mask.resize((100, 75), Image.Resampling.BICUBIC))
    folder_of('all')
    error = capsys.readouterr().err
    assert 'cover only edges (and 11 more); if it was resized, use Image.Resampling.NEAREST' in error


def test_a_mask_that_cannot_be_used_leaves_its_picture(capsys):
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    change_masks(lambda mask: Image.new('L', (36, 36), 1))
    data = folder_of('all')
    assert data.labels is None and len(data) == 12
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and '(and 11 more)' in error
    assert '_mask.png is 36x36 and its picture 48x36' in error
    for path in Path('folder').glob('*_mask.png'):
        path.write_text('text')
    assert len(folder_of('all')) == 12 and 'cannot be read' in capsys.readouterr().err


@pytest.mark.parametrize('size', [(24, 18), (25, 18), (480, 360)])
def test_a_mask_of_another_size_and_the_same_aspect_ratio_is_used(size, capsys):
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    change_masks(lambda mask: mask.resize(size, Image.Resampling.NEAREST))
    assert_masked(all_splits())
    assert not capsys.readouterr().err


@pytest.mark.parametrize('orientation', [3, 6, 8])
def test_exif_rotates_picture_and_mask(orientation):
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    upright = folder_of('all')
    for number, path in enumerate(sorted(Path('folder').iterdir())):
        if number % 2:  # some of the masks, some of the pictures
            Image.open(path).transpose(turn).save(path, exif=exif)
    turned = folder_of('all')
    assert np.array_equal(turned.images, upright.images) and np.array_equal(turned.labels, upright.labels)


def test_palette_masks_hold_their_indices():
    def with_palette(mask):
        mask.putpalette([0, 0, 0, 128, 0, 0])
        return mask

    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    change_masks(with_palette)
    assert_masked(all_splits())


@pytest.mark.parametrize(('mode', 'shown'), [('RGB', 'PNG mode RGB'), ('I;16', 'mode I;16'), ('JPEG', 'JPEG mode L')])
def test_masks_of_another_mode_are_reported_with_a_remedy_that_works(capsys, mode, shown):
    draw_folder('a{:02}.png', 'a{:02}_mask.png')
    for path in Path('folder').glob('*_mask.png'):
        mask = Image.open(path)
        if mode == 'JPEG':
            mask.save(path, format='JPEG')
        elif mode == 'RGB':
            Image.merge('RGB', [mask, mask, mask.point(lambda label: 1 - label)]).save(path)
        else:
            Image.fromarray(np.array(mask).astype(np.uint16) * 256).save(path)
    assert folder_of('all').labels is None
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and shown in error and '(and 11 more)' in error
    expression = error[error.index('np.unique') :]
    for path in Path('folder').glob('*_mask.png') if mode != 'JPEG' else ():
        labels = eval(expression, {'np': np, 'pixels': np.asarray(Image.open(path))})
        Image.fromarray(labels.astype('uint8')).save(path)
    if mode == 'I;16':
        assert_masked(all_splits())
    elif mode == 'RGB':
        assert set(np.unique(folder_of('all').labels)) == {0, 1}


# Pixels


def test_odd_pictures_are_read_and_broken_ones_named(capsys):
    draw_folder('a{:02}.jpg')
    grey = np.full((20, 20), 100, np.uint8)
    Image.fromarray(grey).save('folder/grey.png')
    Image.fromarray(np.dstack([grey] * 3 + [np.zeros_like(grey)])).save('folder/clear.png')
    assert np.asarray(dataset.open_picture(Path('folder/grey.png'))).tolist() == [[[100] * 3] * 20] * 20
    assert np.asarray(dataset.open_picture(Path('folder/clear.png'))).min() == 255
    Path('folder/text.png').write_text('not a picture')
    Path('folder/cut.jpg').write_bytes(Path('folder/a01.jpg').read_bytes()[:300])
    assert len(folder_of('all')) == 14
    error = capsys.readouterr().err
    assert 'cut.jpg cannot be read as a picture' in error and '(and 1 more); repair or remove it' in error


def test_the_type_of_the_pixels_sets_their_scale():
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for name, values, expected in (
        ('float.tif', ramp, ramp),
        ('overshoot.tif', ramp * 1.1 - 0.05, (ramp * 1.1 - 0.05).clip(0, 1)),
        ('dim.tif', ramp * 0.1, ramp * 0.1),
        ('bits16.png', (ramp * 65535).astype(np.uint16), ramp),
        ('bits12.png', (ramp * 4095).astype(np.uint16), ramp / 16),
        ('peak.tif', (ramp * 4100).astype(np.uint16), ramp / 16),
        ('int32.tif', (ramp * 65535).astype(np.int32), ramp),
    ):
        Image.fromarray(values).save(name)
        found = dataset.read_picture(Path(name), 8)[..., 0]
        assert np.abs(found - expected * 255).max() <= 1.01, name
    for name, values in {'nan.tif': ramp * np.nan, 'negative.tif': -ramp, 'float255.tif': ramp * 255}.items():
        Image.fromarray(values).save(name)
        with pytest.raises(DataError, match=f'{name} cannot be read as a picture: its values are not from 0 to 1'):
            dataset.read_picture(Path(name), 8)


def test_a_folder_of_12_bits_in_16_is_reported(capsys):
    Path('folder').mkdir()
    for i in range(6):
        Image.fromarray(np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)).save(f'folder/{i}.tif')
    folder_of('all')
    error = capsys.readouterr().err
    assert 'uses more than a sixteenth of the range' in error and error.count('\n') == 1


def test_a_picture_of_196_megapixels_is_no_attack():
    Image.new('1', (14_000, 14_000)).save('large.png')
    with Image.open('large.png') as picture:  # raises or warns if it exceeds the limit
        assert picture.size == (14_000, 14_000)


def test_pictures_are_listed_in_natural_order_through_links_and_without_hidden_ones():
    for name in ('b/frame10.png', 'b/frame2.png', 'b/frame1.PNG', 'b/._frame1.png', '.hidden/frame3.png', 'c2/a.png'):
        path = Path('folder', name)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(0)[0].save(path)
    Path('elsewhere').mkdir()
    draw(0)[0].save('elsewhere/linked.png')
    Path('folder/c10').symlink_to(Path('elsewhere').resolve())
    Path('folder/b/loop').symlink_to(Path('folder').resolve())
    found = [path.relative_to(Path('folder').resolve()).as_posix() for path in dataset.find_pictures('folder')]
    assert found == ['b/frame1.PNG', 'b/frame2.png', 'b/frame10.png', 'c2/a.png', 'c10/linked.png']


# Real renders, if the sample is present


@pytest.mark.skipif(not SAMPLE.exists(), reason='the sample of CLEVR renders is not here')
def test_real_renders_are_prepared():
    counts = [scene['objects'] for scene in json.loads((SAMPLE / 'index_tfrecord.json').read_text())['scenes']]
    with h5py.File(prepare('clevr6', SAMPLE, 32, output_dir='data')) as file:
        assert file['num_objects'][:].tolist() == [count for count in counts if count <= 6]
        for labels, count in zip(file['mask'][:], file['num_objects'][:], strict=True):
            assert labels.max() <= 10 and 1 <= len(np.unique(labels)) - 1 <= count


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


def test_a_download_continues_where_it_broke_off(server, clevr, capsys):
    server.content = (clevr[0] / NAME).read_bytes()
    server.breaks, server.broken_after = 5, 10_000
    flags = ('--prepare', 'clevr6', '--data_dir', 'data', '--url', server.url)
    assert 'run the same command again to continue from there' in refused(capsys, *flags)
    assert run(*flags) == 0
    assert server.log == [None, *(f'bytes={n}-' for n in range(10_000, 60_000, 10_000))]
    assert (Path('data') / NAME).read_bytes() == server.content and Path('data/clevr6_128_max6.h5').exists()


@pytest.mark.parametrize('there', [b'', b'0123', b'0123456789', b'0123456789 and more'])
@pytest.mark.parametrize('ranges', [True, False])
def test_an_earlier_download_becomes_whole(server, there, ranges):
    server.content, server.ranges = b'0123456789', ranges
    Path('file.part').write_bytes(there)
    dataset.download(server.url, Path('file'))
    assert Path('file').read_bytes() == server.content and not Path('file.part').exists()


def test_addresses_that_lead_nowhere_are_refused(server, capsys):
    for url in (server.url + '/none', 'http://127.0.0.1:1/file', 'nonsense'):
        assert url in refused(capsys, '--prepare', 'tetrominoes', '--data_dir', 'data', '--url', url)
    assert not list(Path('data').iterdir())
