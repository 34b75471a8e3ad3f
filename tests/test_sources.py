"""Published records, folders of pictures and downloads: read value by value, and refused in one line."""

import gzip
import http.server
import json
import struct
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import train
import visualize
from dataset import DataError, PictureFolder, PreparedDataset, create_dataloader, create_dataset, prepare

SAMPLE = Path(__file__).resolve().parents[2] / 'shared' / 'clevr_sample'


# A writer of its own: nothing here is shared with the reader.


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


def test_limit_stops_early(clevr_dir):
    with h5py.File(prepare('clevr6', clevr_dir, 16, limit=3)) as file:
        assert file['record'][:].tolist() == [0, 1, 4] and file.attrs['scenes_read'] == 5


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


def test_a_missing_picture_is_named(capsys):
    write_clevr_v1(Path('data/CLEVR_v1.0'))
    Path('data/CLEVR_v1.0/images/train/CLEVR_train_000001.png').unlink()
    error = refused(capsys, '--prepare', 'clevr6', '--data_dir', 'data')
    assert 'CLEVR_train_scenes.json names' in error and 'CLEVR_train_000001.png' in error
    assert not list(Path('data').glob('*.h5*'))


def test_a_json_of_something_else_is_named(capsys):
    write_clevr_v1(Path('data/CLEVR_v1.0'))
    for text in ('{"scenes": [{"objects": []}]}', '[1, 2', '{"info": 1}'):
        Path('data/CLEVR_v1.0/scenes/CLEVR_train_scenes.json').write_text(text)
        assert 'is not a list of CLEVR scenes' in refused(capsys, '--prepare', 'clevr6', '--data_dir', 'data')


# What can be wrong with records and prepared files


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
        ('truncated gzip', 'not complete'),
        ('flipped byte in the gzip', 'damaged'),
        ('flipped byte in the framing', 'length does not match its checksum'),
        ('cut plain file', 'ends within record 1'),
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
    assert train.main(train.parse_args(['--dataset', 'clevr6'])) == 2
    error = capsys.readouterr().err
    for part in ('clevr_with_masks_train.tfrecords', '10.5 GB', 'python dataset.py --prepare clevr6 --data_dir data'):
        assert part in error
    assert error.count('\n') <= 4


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


# Pictures of one's own


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
    assert [len(part) for part in parts] == [10, 1, 1]
    assert any((image > 170).all() for image in parts[0].images)
    assert parts[0].labels is None
    assert np.array_equal(PictureFolder(pictures, 'train', 4, 16).images, parts[0].images[:4])


def test_masks_beside_pictures_are_labels(pictures):
    labels = np.zeros((40, 60), np.uint8)
    labels[10:30, 20:40] = 7
    for path in list(pictures.rglob('*.png')):
        Image.fromarray(labels).save(path.with_name(path.stem + '_mask.png'))
    data = PictureFolder(pictures, 'train', resolution=20)
    assert len(data) == 10  # masks are no pictures
    with_mask = data.labels.any(axis=(1, 2))
    assert with_mask.any() and not with_mask.all()
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
    threading.Thread(target=running.serve_forever, daemon=True).start()
    handler.url = f'http://127.0.0.1:{running.server_address[1]}/file'
    yield handler
    running.shutdown()
    running.server_close()


def test_a_download_goes_on_where_it_broke_off(server, clevr, capsys):
    server.content = (clevr[0] / 'clevr_with_masks_train.tfrecords').read_bytes()
    server.breaks, server.broken_after = 5, 10_000
    error = refused(capsys, '--prepare', 'clevr6', '--data_dir', 'data', '--url', server.url)
    assert 'the same command goes on from there' in error
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


# Real renders, where they are at hand


@pytest.mark.skipif(not SAMPLE.exists(), reason='the sample of CLEVR renders is not here')
def test_real_renders_are_prepared_trained_on_scored_and_drawn(capsys):
    Path('data').mkdir()
    (Path('data') / 'clevr_with_masks_train.tfrecords').symlink_to(SAMPLE / 'clevr_with_masks_train.tfrecords')
    counts = [scene['objects'] for scene in json.loads((SAMPLE / 'index_tfrecord.json').read_text())['scenes']]
    small = '--dataset clevr6 --resolution 32 --hidden_dim 8 --slot_dim 16 --batch_size 16 --epochs 1'.split()
    assert train.main(train.parse_args([*small, '--slot_init', 'gaussian', '--flip', '1'])) == 0
    with h5py.File('data/clevr6_32_max6.h5') as file:
        assert file['num_objects'][:].tolist() == [count for count in counts if count <= 6]
        for labels, count in zip(file['mask'][:], file['num_objects'][:], strict=True):
            assert labels.max() <= 10 and 1 <= len(np.unique(labels)) - 1 <= count
    flags = '--eval --resume logs/checkpoints/best_model.pth --max_objects 10 --num_slots 11 --num_iterations 5'
    assert train.main(train.parse_args(flags.split())) == 0
    printed = capsys.readouterr().out
    assert '45 test images of clevr6, 11 slots, 5 iterations' in printed and 'attn FG-ARI' in printed
    assert visualize.main(visualize.parse_args(['--num_images', '2'])) == 0
    assert Path('visualizations/slots.png').stat().st_size > 5000
