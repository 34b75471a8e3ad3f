"""Image sources for object discovery: one Dataset interface and one create_dataloader() for all of them.

    python dataset.py                                       # draws samples.png: images of shapes and their masks
    python dataset.py --prepare clevr6 --data_dir data      # writes data/clevr6_128_max6.h5 from the published file
    python dataset.py --dataset clevr6 --data_dir data      # draws samples.png from the prepared file
    python dataset.py --dataset images --data_dir pictures  # draws samples.png from a folder of pictures

    from dataset import create_dataloader
    train_loader, val_loader = create_dataloader(dataset_type='shapes', batch_size=32, resolution=64)

A batch is a dict with `image`, float32 [B, 3, H, W] in [-1, 1], and, if the source has masks, `mask`,
int64 [B, H, W]. Label 0 is the background and 1, 2, ... are objects.
"""

import argparse
import colorsys
import gzip
import itertools
import json
import math
import os
import struct
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm

# Default resolution (side of the square images in pixels) and default number of slots of each source.
SIZES = {
    'shapes': (64, 7),
    'clevr6': (128, 7),
    'multi_dsprites': (64, 6),
    'tetrominoes': (35, 4),
    'objects_room': (64, 7),
    'images': (128, 7),
}
DATASETS = tuple(SIZES)
SPLITS = ('train', 'val', 'test')
SHAPES = ('circle', 'square', 'triangle')
SHAPES_SIZE = 10_000  # default number of training images


class DataError(ValueError):
    """Raised for a source or a request that yields no images; the message is one line for the user."""


# --- In memory -------------------------------------------------------------------------------


class ImagesInMemory(Dataset):
    """Base class: `images` uint8 [N, H, W, 3] and `labels` uint8 [N, H, W], or None without masks."""

    images: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __str__(self) -> str:
        size = self.images.nbytes + (0 if self.labels is None else self.labels.nbytes)
        return f'{len(self):,} images, {size / 1e9:.2f} GB in memory'

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Returns a whole batch; DataLoader calls this instead of `__getitem__` B times."""
        return to_batch(self.images[indices], None if self.labels is None else self.labels[indices])


def to_batch(images: np.ndarray, labels: np.ndarray | None = None) -> dict[str, Tensor]:
    """Converts uint8 images [B, H, W, 3] and labels [B, H, W] to a batch (see the module docstring)."""
    image = torch.from_numpy(images).permute(0, 3, 1, 2).float()  # (B, 3, H, W), channels_last in memory
    batch = {'image': image.mul_(2 / 255).sub_(1)}
    if labels is not None:
        batch['mask'] = torch.from_numpy(labels).long()
    return batch


def flip(batch: dict[str, Tensor], flipped: Tensor) -> dict[str, Tensor]:
    """Mirrors the images and masks of a batch left to right where `flipped` (bool [B]) is true."""
    out = {}
    for name, values in batch.items():
        where = flipped.to(values.device).view(-1, *(1,) * (values.ndim - 1))  # (B, 1, ..., 1)
        out[name] = torch.where(where, values.flip(-1), values)
    return out


# --- Shapes ----------------------------------------------------------------------------------


class ShapesDataset(ImagesInMemory):
    """Circles, squares and triangles on a grey background, with instance labels.

    The number of objects and their shape, position, size, rotation and colour are random. Objects may
    overlap, but at least MIN_VISIBLE of the area of each stays visible. Image i is a function of (seed,
    split, i): it does not depend on `size`, and no two splits share an image. All images are drawn in the
    constructor and kept in memory.

    Raises DataError for an unknown split, and for a size, resolution (16 to 256 pixels), number of objects
    (1 to 16) or seed out of range.
    """

    # The size of an object is the radius of the disc of equal area, as a fraction of the image side.
    MIN_SIZE, MAX_SIZE = 0.09, 0.17
    MIN_VISIBLE = 0.6
    MIN_RADIUS = 1.3  # pixels; a smaller object may cover no pixel centre
    MAX_OBJECTS = 16

    def __init__(
        self,
        split: str = 'train',
        size: int = SHAPES_SIZE,
        resolution: int = 64,
        max_objects: int = 6,
        min_objects: int = 2,
        seed: int = 0,
    ):
        if split not in SPLITS:
            raise DataError(f'split must be one of {", ".join(SPLITS)}, not {split!r}')
        if size < 1:
            raise DataError(f'the number of images must be at least 1, not {size}')
        if not 16 <= resolution <= 256:
            raise DataError(f'the resolution of shapes must be from 16 to 256, not {resolution}')
        if not 1 <= min_objects <= max_objects <= self.MAX_OBJECTS:
            raise DataError(
                f'min_objects ({min_objects}) and max_objects ({max_objects}) must satisfy '
                f'1 <= min_objects <= max_objects <= {self.MAX_OBJECTS}'
            )
        if seed < 0:
            raise DataError(f'the seed of shapes must not be negative, not {seed}')
        self.split, self.resolution, self.seed = split, resolution, seed
        self.min_objects, self.max_objects = min_objects, max_objects
        self.images = np.empty((size, resolution, resolution, 3), np.uint8)
        self.labels = np.empty((size, resolution, resolution), np.uint8)
        # `delay` shows the bar only if drawing takes longer than two seconds.
        for i in tqdm(range(size), f'drawing {split} shapes', unit=' images', delay=2, disable=None, leave=False):
            self.images[i], self.labels[i] = self.draw(i)

    def draw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns image uint8 [H, W, 3] and labels uint8 [H, W] of sample `index`."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        image = np.full((3, self.resolution, self.resolution), 255 * rng.uniform(0.1, 0.9), np.float32)
        labels = np.zeros((self.resolution, self.resolution), np.uint8)
        count = rng.integers(self.min_objects, self.max_objects, endpoint=True)
        areas = np.zeros(count + 1, int)  # full area of label 1, 2, ... in pixels
        visible = np.zeros(count + 1, int)  # area that is not hidden by later objects
        for label in range(1, count + 1):
            (rows, columns), coverage, hidden = self._place(rng, labels, areas, visible)
            inside = coverage > 0.5
            behind = image[:, rows, columns]
            behind += coverage * (255 * random_colour(rng)[:, None, None] - behind)
            labels[rows, columns][inside] = label
            visible -= hidden
            areas[label] = visible[label] = np.count_nonzero(inside)
        return (image + 0.5).astype(np.uint8).transpose(1, 2, 0), labels  # (H, W, 3), (H, W)

    def _place(self, rng: np.random.Generator, labels: np.ndarray, areas: np.ndarray, visible: np.ndarray):
        """Chooses a random object that leaves MIN_VISIBLE of every earlier object visible.

        Returns the window of the image that contains it (two slices), the coverage [h, w] in [0, 1] of
        the pixels of the window, and the number of pixels that the object hides of each label.
        """
        shape = SHAPES[rng.integers(len(SHAPES))]
        radius = max(rng.uniform(self.MIN_SIZE, self.MAX_SIZE) * self.resolution, self.MIN_RADIUS)
        while True:
            for _ in range(20):
                x, y = rng.uniform(radius, self.resolution - radius, 2)
                window, coverage = self._rasterise(shape, x, y, radius, rng.uniform(0, 2 * np.pi))
                hidden = np.bincount(labels[window][coverage > 0.5], minlength=len(areas))
                hidden[0] = 0  # the background may be hidden
                if (visible - hidden >= self.MIN_VISIBLE * areas).all():
                    return window, coverage, hidden
            radius = max(0.8 * radius, self.MIN_RADIUS)  # a smaller object fits into a crowded image

    def _rasterise(self, shape: str, x: float, y: float, radius: float, angle: float):
        """Returns window and coverage of one object: its signed distance from the edge, clipped to one pixel."""
        reach = 1.6 * radius + 1  # the corners of a triangle are 1.56 radii from its centre
        rows, columns = (
            slice(max(int(centre - reach), 0), min(int(centre + reach) + 1, self.resolution)) for centre in (y, x)
        )
        dy = np.arange(rows.start + 0.5 - y, rows.stop - y, dtype=np.float32)[:, None]
        dx = np.arange(columns.start + 0.5 - x, columns.stop - x, dtype=np.float32)
        if shape == 'circle':
            distance = np.sqrt(dx * dx + dy * dy) - radius
        else:
            sides = 3 if shape == 'triangle' else 4
            apothem = radius * math.sqrt(math.pi / (sides * math.tan(math.pi / sides)))  # for the area of the disc
            normals = [angle + side * 2 * math.pi / sides for side in range(sides)]
            edges = [math.cos(normal) * dx + math.sin(normal) * dy for normal in normals]
            distance = np.maximum.reduce(edges) - apothem
        return (rows, columns), (0.5 - distance).clip(0, 1)


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """Returns a random RGB colour in [0, 1], saturated enough to stand out from any grey."""
    hue, saturation, value = rng.uniform((0, 0.6, 0.6), 1)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)


# --- Published data sets ---------------------------------------------------------------------

BUCKET = 'https://storage.googleapis.com/multi-object-datasets'
CLEVR_WINDOW = (slice(29, 221), slice(64, 256))  # rows and columns of a 240x320 image that the paper crops to


@dataclass(frozen=True)
class Published:
    """A data set of github.com/google-deepmind/multi_object_datasets: GZIP TFRecords of tf.train.Example."""

    path: str  # within the bucket; {} stands for the variant
    gigabytes: float | None
    height: int
    width: int
    backgrounds: int = 1  # number of leading masks of a record that are background
    entities_last: bool = False  # masks are [H, W, N, 1] instead of [N, H, W, 1]
    window: tuple[slice, slice] = (slice(None), slice(None))  # rows and columns that are kept
    records: int = 100_000  # later records are not used

    def url(self, variant: str) -> str:
        return f'{BUCKET}/{self.path.format(variant)}'


VARIANTS = ('colored_on_grayscale', 'colored_on_colored', 'binarized')  # of multi_dsprites
PUBLISHED = {
    'clevr6': Published('clevr_with_masks/clevr_with_masks_train.tfrecords', 10.5, 240, 320, window=CLEVR_WINDOW),
    'multi_dsprites': Published('multi_dsprites/multi_dsprites_{}.tfrecords', None, 64, 64, entities_last=True),
    'tetrominoes': Published('tetrominoes/tetrominoes_train.tfrecords', 0.3, 35, 35),
    'objects_room': Published('objects_room/objects_room_train.tfrecords', 7, 64, 64, backgrounds=4),
}
SHARES = (0.7, 0.15, 0.15)  # train, val, test; of CLEVR's 100,000 records the paper trains on the first 70,000


@dataclass
class Scene:
    image: np.ndarray  # uint8 [h, w, 3]
    labels: np.ndarray | None  # uint8 [resolution, resolution]
    num_objects: int
    record: int  # number within the source
    done: float  # fraction of the source that has been read
    split: int | None = None  # index into SPLITS, if the source itself has splits


def read_records(path: Path) -> Iterator[tuple[bytes, float]]:
    """Yields the payload of each record of a TFRecord file, GZIP or plain, and the fraction read so far.

    Checks the checksum of each length. The checksum of a payload is left to GZIP, because a CRC-32C in
    Python takes a second per megabyte. Raises DataError for a damaged, incomplete or empty file.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c  # importing takes 0.5 s

    number = 0
    with open(path, 'rb') as raw:
        zipped = raw.read(2) == b'\x1f\x8b'
        raw.seek(0)
        file = gzip.GzipFile(fileobj=raw) if zipped else raw
        size = max(os.fstat(raw.fileno()).st_size, 1)
        try:
            while header := file.read(12):
                length, checksum = struct.unpack('<QI', header)
                if masked_crc32c(header[:8]) != checksum:
                    raise DataError(f'{path}: record {number} is damaged: its length does not match its checksum')
                payload = file.read(length)
                if len(payload) < length or len(file.read(4)) < 4:
                    raise EOFError
                yield payload, raw.tell() / size
                number += 1
        except (EOFError, struct.error) as error:
            raise DataError(f'{path} ends within record {number}: the file is not complete') from error
        except (zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f'{path} is damaged after record {number}: {error}') from error
    if not number:
        raise DataError(f'{path} holds no records')


# tf.train.Example, except that a BytesList stays serialised: one object instead of a million one-byte strings.
EXAMPLE = """
name: "example.proto" package: "published" syntax: "proto3"
message_type { name: "FloatList" field { name: "value" number: 1 type: TYPE_FLOAT label: LABEL_REPEATED } }
message_type {
  name: "Feature"
  field { name: "bytes_list" number: 1 type: TYPE_BYTES }
  field { name: "float_list" number: 2 type: TYPE_MESSAGE type_name: ".published.FloatList" }
}
message_type {
  name: "Features"
  field {
    name: "feature" number: 1 type: TYPE_MESSAGE label: LABEL_REPEATED type_name: ".published.Features.FeatureEntry"
  }
  nested_type {
    name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".published.Feature" }
  }
}
message_type {
  name: "Example"
  field { name: "features" number: 1 type: TYPE_MESSAGE type_name: ".published.Features" }
}
"""


@cache
def example_class() -> type:
    """Returns the protobuf message class that EXAMPLE describes."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(EXAMPLE, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName('published.Example'))


def bytes_of(features, name: str, pixels: int) -> np.ndarray:
    """Returns the one-byte strings of a feature, uint8 [n * pixels]. Each is serialised as 0A 01 and the byte."""
    if name not in features:
        raise DataError(f'it has no {name!r}')
    wire = np.frombuffer(features[name].bytes_list, np.uint8)
    if not len(wire) or len(wire) % (3 * pixels) or tuple(wire[:2]) != (10, 1):
        raise DataError(f'its {name!r} does not hold one byte for each of {pixels} pixels')
    return wire[2::3]


def decode_record(payload: bytes, source: Published, resolution: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the image [h, w, 3] within the window, labels [resolution, resolution] and the number of objects.

    `visibility` has entries for the backgrounds too, which are not counted. Without `visibility`, an
    object is counted if its mask has a pixel.
    """
    try:
        features = example_class().FromString(payload).features.feature
    except DecodeError as error:
        raise DataError('it is damaged or not a tf.train.Example') from error
    height, width = source.height, source.width
    image = bytes_of(features, 'image', height * width).reshape(height, width, -1)[source.window]  # (h, w, C)
    if image.shape[2] not in (1, 3):
        raise DataError(f"its 'image' has {image.shape[2]} channels, not 1 or 3")
    masks = bytes_of(features, 'mask', height * width)
    if source.entities_last:
        masks = masks.reshape(height, width, -1).transpose(2, 0, 1)  # (N, H, W)
    else:
        masks = masks.reshape(-1, height, width)
    rows, columns = (nearest(length, resolution) for length in image.shape[:2])
    # Resizing before argmax leaves fewer pixels to take the argmax of.
    strongest = masks[(slice(None), *source.window)][:, rows[:, None], columns].argmax(axis=0)
    labels = np.maximum(strongest - (source.backgrounds - 1), 0).astype(np.uint8)
    if 'visibility' in features:
        visible = np.array(features['visibility'].float_list.value)[source.backgrounds :] > 0
    else:
        visible = masks[source.backgrounds :].any(axis=(1, 2))
    return np.repeat(image, 3 // image.shape[2], axis=2), labels, int(visible.sum())


def nearest(length: int, size: int) -> np.ndarray:
    """Returns the indices [size] that nearest-neighbour resizing takes from `length` pixels."""
    return ((np.arange(size) + 0.5) * length / size).astype(int)


def read_published(path: Path, source: Published, resolution: int) -> Iterator[Scene]:
    """Yields the scenes of a published file. Raises DataError, with the number of the record, for a damaged one."""
    for number, (payload, done) in enumerate(read_records(path)):
        try:
            image, labels, count = decode_record(payload, source, resolution)
        except DataError as error:
            raise DataError(f'{path}: record {number} is not as expected: {error}') from error
        yield Scene(image, labels, count, number, done)


def read_clevr_v1(folder: Path) -> Iterator[Scene]:
    """Yields the scenes of a CLEVR_v1.0 folder: pictures and JSON, no masks. Half of its val split becomes test.

    Images are resized to height 240 and cropped to the rows of CLEVR_WINDOW and the 192 central columns.
    Raises DataError for a JSON file that does not list scenes, and for missing pictures.
    """
    files = [(name, folder / 'scenes' / f'CLEVR_{name}_scenes.json') for name in ('train', 'val')]
    scenes = []
    for name, file in files:
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text())['scenes']
            listed = [(folder / 'images' / name / s['image_filename'], len(s['objects'])) for s in found]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{file} is not a list of CLEVR scenes ({type(error).__name__}: {error})') from error
        for index, (picture, count) in enumerate(listed):
            split = 0 if name == 'train' else 1 + (index >= len(listed) / 2)
            scenes.append((picture, count, split, file))
    for number, (picture, count, split, file) in enumerate(scenes):
        if not picture.is_file():
            raise DataError(f'{file} names {picture}, which is not there')
        image = open_picture(picture)
        if (image.width, image.height) != (320, 240):  # published: 480x320
            image = image.resize((round(image.width * 240 / image.height), 240), Image.Resampling.BILINEAR)
        rows = CLEVR_WINDOW[0]
        left = (image.width - (rows.stop - rows.start)) // 2
        pixels = np.asarray(image)[rows, left : left + rows.stop - rows.start]
        yield Scene(pixels, None, count, number, (number + 1) / len(scenes), split)


def open_picture(path: Path) -> Image.Image:
    """Any picture as RGB: upright, 16 bits reduced to 8, what is transparent on white. Raises DataError."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith('I'):  # 16 bits: PIL would clip them at 255
                image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            return image.convert('RGB')
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f'{path} cannot be read as a picture ({type(error).__name__})') from error


# --- Preparing -------------------------------------------------------------------------------


def prepared_path(dataset: str, data_dir: Path, resolution: int, max_objects: int, variant: str) -> Path:
    name = f'{dataset}_{variant}' if dataset == 'multi_dsprites' else dataset
    return data_dir / f'{name}_{resolution}_max{max_objects}.h5'


def find_source(dataset: str, data_dir: Path, variant: str) -> Path | None:
    """The published file (or, for CLEVR, a folder CLEVR_v1.0) in `data_dir`, None where there is none."""
    path = Path(PUBLISHED[dataset].path.format(variant))
    candidates = [data_dir / path.name, data_dir / path]
    if dataset == 'clevr6':
        candidates += [folder for folder in (data_dir / 'CLEVR_v1.0', data_dir) if (folder / 'scenes').is_dir()]
    return next((candidate for candidate in candidates if candidate.exists()), None)


def download(url: str, path: Path, attempts: int = 5) -> None:
    """Fetch `url` to `path` through `path`.part, from where an earlier attempt broke off.

    Raises DataError when it stays broken; what has come is kept for the next call.
    """
    part = path.with_name(path.name + '.part')
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(attempts):
        try:
            total = _fetch(url, part)
            if part.exists() and part.stat().st_size == total:
                os.replace(part, path)
                return
            reason = 'the connection broke off'
        except ValueError as error:
            raise DataError(f'{url} cannot be fetched: {error}') from error
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            if isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500:
                raise DataError(f'{url} cannot be fetched: {error}; try another --url') from error
            reason = str(getattr(error, 'reason', error))
        time.sleep(attempt)
    have = part.stat().st_size / 1e6 if part.exists() else 0
    raise DataError(f'{url}: {reason}; {have:,.1f} MB have come and are kept: the same command goes on from there')


def _fetch(url: str, part: Path) -> int | None:
    """Append what is missing to `part`; returns the size that the whole should have."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={done}-'} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        total = (error.headers.get('Content-Range') or '').rpartition('/')[2]
        if error.code == 416 and total.isdigit() and int(total) == done:
            return done  # it had come whole
        if error.code == 416:  # the file there is another one: begin anew
            part.unlink()
            return None
        raise
    with response:
        if response.status != 206:
            done = 0  # this server cannot continue
        left = response.headers.get('Content-Length')
        total = done + int(left) if left else None
        bar = tqdm(total=total, initial=done, desc=part.stem, unit='B', unit_scale=True, disable=None)
        with open(part, 'ab' if done else 'wb') as file, bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    return part.stat().st_size if total is None else total


def prepare(
    dataset: str,
    data_dir: str | os.PathLike,
    resolution: int,
    max_objects: int = 6,
    variant: str = VARIANTS[0],
    limit: int | None = None,
    url: str | None = None,
    fetch: bool = True,
) -> Path:
    """Turn a published data set into one HDF5 file and return its path.

    dataset      one of PUBLISHED
    data_dir     where the source lies, and the prepared file goes
    resolution   side of the square images, pixels; bilinear, labels nearest neighbour
    max_objects  scenes with more objects are left out
    variant      of multi_dsprites, one of VARIANTS
    limit        scenes to keep; None: as many as the data set calls for
    url, fetch   where to download from when the source is not there, and whether to

    The file holds `image` uint8 [N, R, R, 3], `mask` uint8 [N, R, R] (where the source has masks),
    `num_objects`, `record` (number in the source) and `split` (0 train, 1 val, 2 test), each [N], in
    chunks of one image. Only when it is finished does it take its name. Raises DataError and OSError.
    """
    source, data_dir = PUBLISHED[dataset], Path(data_dir)
    raw = find_source(dataset, data_dir, variant)
    if raw is None:
        if not fetch:
            raise DataError(missing_source(dataset, data_dir, variant))
        raw = data_dir / Path(source.path.format(variant)).name
        download(url or source.url(variant), raw)
    if raw.is_dir():
        scenes = read_clevr_v1(raw)
    else:
        scenes = read_published(raw, source, resolution)
        scenes = itertools.islice(scenes, source.records)
    path = prepared_path(dataset, data_dir, resolution, max_objects, variant)
    part = path.with_name(f'.{path.name}.{os.getpid()}')  # no other process's
    try:
        with h5py.File(part, 'w') as file:
            file.attrs.update(source=str(raw), resolution=resolution, max_objects=max_objects, variant=variant)
            file.attrs['window'] = str(source.window)
            _write_scenes(file, scenes, resolution, max_objects, limit)
            file.flush()
        with open(part, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _write_scenes(file: h5py.File, scenes: Iterator[Scene], size: int, max_objects: int, limit: int | None) -> None:
    """Stream scenes into `file`, 64 at a time. Raises DataError when none is left."""
    kept = seen = 0
    split_given = False
    waiting: list[Scene] = []
    bar = tqdm(total=1.0, bar_format='{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}', disable=None)
    bar.set_description('preparing')
    with bar:
        for scene in scenes:
            seen += 1
            split_given = scene.split is not None
            if scene.num_objects <= max_objects:
                kept += 1
                waiting.append(scene)
            if len(waiting) == 64:
                _append_scenes(file, waiting, size)
                waiting.clear()
            bar.set_postfix_str(f'{kept} of {seen} scenes kept', refresh=False)
            bar.update(scene.done - bar.n)
            if kept == limit:
                break
        if waiting:
            _append_scenes(file, waiting, size)
    if not kept:
        raise DataError(f'none of {seen} scenes has at most {max_objects} objects')
    if not split_given:  # in the order of the source, so that a split is the same for any filter
        ends = np.cumsum(SHARES[:-1]) * seen
        file['split'][:] = np.searchsorted(ends, file['record'][:], side='right')
    file.attrs['scenes_read'] = seen


def _append_scenes(file: h5py.File, scenes: list[Scene], size: int) -> None:
    """The arrays of prepare(), grown by scenes that all have labels, or all have none."""
    values = {'image': resize([scene.image for scene in scenes], size)}
    if scenes[0].labels is not None:
        values['mask'] = np.stack([scene.labels for scene in scenes])
    values['num_objects'] = np.array([scene.num_objects for scene in scenes], np.int32)
    values['record'] = np.array([scene.record for scene in scenes], np.int32)
    values['split'] = np.array([-1 if scene.split is None else scene.split for scene in scenes], np.int8)
    for name, array in values.items():
        if name not in file:
            shape = array.shape[1:]
            chunks = (1, *shape) if shape else (1024,)
            packed = 'gzip' if name == 'mask' else None  # labels shrink a hundredfold
            file.create_dataset(
                name, (0, *shape), array.dtype, maxshape=(None, *shape), chunks=chunks, compression=packed
            )
        before = len(file[name])
        file[name].resize(before + len(array), axis=0)
        file[name][before:] = array


def resize(images: list[np.ndarray], size: int) -> np.ndarray:
    """uint8 images of one shape [h, w, 3] -> [B, size, size, 3], bilinear as tf.image.resize of the paper's code."""
    stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    if stack.shape[-2:] != (size, size):
        stack = F.interpolate(stack.float(), (size, size), mode='bilinear').round().byte()
    return stack.permute(0, 2, 3, 1).numpy()


def missing_source(dataset: str, data_dir: Path, variant: str) -> str:
    source = PUBLISHED[dataset]
    or_folder = ' or the folder CLEVR_v1.0 (no masks, so no segmentation score)' if dataset == 'clevr6' else ''
    size = '' if source.gigabytes is None else f' ({source.gigabytes} GB)'
    flag = f' --variant {variant}' if dataset == 'multi_dsprites' else ''
    return (
        f'no {dataset} in {data_dir}: it needs {Path(source.path.format(variant)).name}'
        f'{size}{or_folder}.\n'
        f'  to download and prepare it: python dataset.py --prepare {dataset}{flag} --data_dir {data_dir}\n'
        f'  or fetch it yourself: {source.url(variant)}'
    )


# --- Reading what was prepared, and folders of pictures -----------------------------------------


def memory_for_data() -> float:
    """Bytes that a data set may take: half of what is free now."""
    try:
        return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2
    except (AttributeError, OSError, ValueError):  # not on this system
        return 4e9


class PreparedDataset(ImagesInMemory):
    """One split of a file that prepare() wrote: in memory where it fits, else read batch by batch.

    Raises DataError for a file that is damaged or has no images in this split.
    """

    def __init__(self, path: str | os.PathLike, split: str, size: int | None = None, in_memory: bool | None = None):
        self.path, self.file, self.owner = Path(path), None, None
        try:
            with h5py.File(path) as file:
                self.resolution, masked = int(file.attrs['resolution']), 'mask' in file
                self.rows = np.flatnonzero(file['split'][:] == SPLITS.index(split))[:size]
                self.nbytes = len(self.rows) * self.resolution**2 * (4 if masked else 3)
                self.in_memory = self.nbytes < memory_for_data() if in_memory is None else in_memory
                self.names = ('image', 'mask') if masked else ('image',)
                if self.in_memory:
                    arrays = [self._load(file[name], name) for name in self.names]
                    self.images, self.labels = arrays if masked else (*arrays, None)
        except (OSError, KeyError) as error:
            raise DataError(f'{path} is damaged or was not prepared here; delete it and prepare it again') from error
        if not len(self.rows):
            raise DataError(f'{path} has no {split} images; prepare more scenes')

    def _load(self, stored: h5py.Dataset, name: str) -> np.ndarray:
        out = np.empty((len(self.rows), *stored.shape[1:]), np.uint8)
        blocks = range(0, len(self.rows), 1024)
        for start in tqdm(blocks, f'loading {name}', unit='k images', delay=2, disable=None, leave=False):
            rows = self.rows[start : start + 1024]
            # A split lies nearly in one piece: read the piece, then pick.
            out[start : start + 1024] = stored[rows[0] : rows[-1] + 1][rows - rows[0]]
        return out

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return super().__str__() if self.in_memory else f'{len(self):,} images, read from {self.path}'

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        if self.in_memory:
            return super().__getitems__(indices)
        if self.owner != os.getpid():  # HDF5 files do not survive a fork: one for every process
            self.file, self.owner = h5py.File(self.path), os.getpid()
        rows = self.rows[indices]
        return to_batch(*(np.stack([self.file[name][row] for row in rows]) for name in self.names))

    def __getstate__(self) -> dict:
        return self.__dict__ | {'file': None, 'owner': None}


PICTURES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff', '.gif')


def find_pictures(folder: Path) -> list[Path]:
    """All pictures below a folder, sorted, without the labels beside them: NAME_mask.png."""
    files = (path for path in folder.rglob('*') if path.suffix.lower() in PICTURES and path.is_file())
    return sorted(path for path in files if not path.stem.endswith('_mask'))


def read_picture(path: Path, resolution: int) -> np.ndarray:
    """A picture of any size, cropped at the centre and resized: uint8 [R, R, 3]. Raises DataError."""
    return np.asarray(ImageOps.fit(open_picture(path), (resolution, resolution), Image.Resampling.BILINEAR))


class PictureFolder(ImagesInMemory):
    """All pictures below a folder, cropped at the centre and resized; labels from NAME_mask.png beside them.

    A tenth each is kept for validation and test, by a shuffle of the sorted names. Files that cannot
    be read are named and skipped; a picture without a mask counts as background where others have one.
    Raises DataError for a folder with fewer than three pictures, and for one that does not fit in memory.
    """

    def __init__(self, folder: str | os.PathLike, split: str, size: int | None = None, resolution: int = 128):
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f'no folder {folder}; --data_dir names the folder of the pictures')
        names = find_pictures(folder)
        if len(names) < 3:
            raise DataError(f'{folder} holds {len(names)} pictures ({", ".join(PICTURES)}); at least 3 are needed')
        shuffled = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
        tenth = max(1, len(names) // 10)
        parts = {'val': shuffled[:tenth], 'test': shuffled[tenth : 2 * tenth], 'train': shuffled[2 * tenth :]}
        paths = parts[split][:size]
        if len(paths) * resolution**2 * 4 > memory_for_data():
            raise DataError(
                f'{len(paths)} pictures do not fit in memory: ask for a smaller --resolution or --train_size'
            )
        self.resolution = resolution
        with ThreadPoolExecutor() as pool:  # PIL decodes without holding the interpreter
            read = pool.map(self._read, paths)
            read = list(
                tqdm(read, f'reading {split}', len(paths), unit=' pictures', delay=2, disable=None, leave=False)
            )
        found = [pair for pair in read if pair is not None]
        if not found:
            raise DataError(f'none of the {len(paths)} {split} pictures in {folder} can be read')
        self.images = np.stack([image for image, _ in found])
        if any(labels is not None for _, labels in found):
            empty = np.zeros((resolution, resolution), np.uint8)
            self.labels = np.stack([empty if labels is None else labels for _, labels in found])

    def _read(self, path: Path) -> tuple[np.ndarray, np.ndarray | None] | None:
        mask = path.with_name(path.stem + '_mask.png')
        try:
            image = read_picture(path, self.resolution)
            return image, self._read_mask(mask) if mask.is_file() else None
        except DataError as error:
            print(f'skipped: {error}', file=sys.stderr)
            return None

    def _read_mask(self, path: Path) -> np.ndarray:
        try:
            with Image.open(path) as file:
                labels = np.asarray(ImageOps.fit(file, (self.resolution, self.resolution), Image.Resampling.NEAREST))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f'{path} cannot be read as a mask ({type(error).__name__})') from error
        if labels.ndim != 2 or labels.max() > 255:
            raise DataError(f'{path} must have one channel of labels up to 255')
        return labels.astype(np.uint8)


# --- One way to ask for any source -----------------------------------------------------------


def create_dataset(
    dataset_type: str,
    split: str,
    size: int | None,
    resolution: int = 64,
    max_objects: int = 6,
    min_objects: int = 2,
    seed: int = 0,
    data_dir: str | os.PathLike = 'data',
    variant: str = VARIANTS[0],
) -> Dataset:
    """One split of a source; arguments as in create_dataloader(), size None: all. Raises DataError.

    A published data set that lies in `data_dir` as it was published is prepared first.
    """
    if split not in SPLITS:
        raise DataError(f'split must be one of {", ".join(SPLITS)}, not {split!r}')
    if dataset_type == 'shapes':
        return ShapesDataset(split, SHAPES_SIZE if size is None else size, resolution, max_objects, min_objects, seed)
    if dataset_type == 'images':
        return PictureFolder(data_dir, split, size, resolution)
    if dataset_type in PUBLISHED:
        path = prepared_path(dataset_type, Path(data_dir), resolution, max_objects, variant)
        if not path.exists():
            prepare(dataset_type, data_dir, resolution, max_objects, variant, fetch=False)
        return PreparedDataset(path, split, size)
    raise DataError(f'dataset_type must be one of {", ".join(DATASETS)}, not {dataset_type!r}')


def wrap_in_loader(
    dataset: Dataset,
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """A DataLoader that fetches whole batches.

    With `shuffle`, its order is a function of (seed, epoch): call `loader.sampler.set_epoch(n)`
    before each epoch, and incomplete batches are left out. Of several processes each takes every
    world_size-th image of every batch, from its rank on: no image twice, none left out.
    """
    if shuffle:
        sampler = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=seed, drop_last=True)
    else:
        sampler = range(rank, len(dataset), world_size)  # DistributedSampler would repeat images to even out
    return DataLoader(
        dataset,
        batch_size // world_size,
        sampler=sampler,
        drop_last=shuffle,
        collate_fn=_as_fetched,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )


def _as_fetched(batch):
    """`__getitems__` has already put the batch together."""
    return batch


def create_dataloader(
    dataset_type: str = 'shapes',
    batch_size: int = 32,
    resolution: int = 64,
    max_objects: int = 6,
    min_objects: int = 2,
    train_size: int | None = None,
    val_size: int = 320,
    seed: int = 0,
    data_seed: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    data_dir: str | os.PathLike = 'data',
    variant: str = VARIANTS[0],
    rank: int = 0,
    world_size: int = 1,
) -> tuple[DataLoader, DataLoader]:
    """Loaders of the training and the validation split: (train_loader, val_loader).

    dataset_type  one of DATASETS
    batch_size    images per batch, of all processes together
    resolution    side of the square images, pixels
    max_objects   most objects in an image; not for 'images'
    min_objects   fewest objects in an image; of shapes only
    train_size, val_size      images in each split at most; None: 10,000 shapes, all of other sources
    seed          decides the order of the training images (see wrap_in_loader)
    data_seed     decides what is drawn, of shapes only
    num_workers, pin_memory   as in torch.utils.data.DataLoader
    data_dir      where sources other than shapes lie
    variant       of multi_dsprites, one of VARIANTS
    rank, world_size          which process of how many this is, see wrap_in_loader

    Raises DataError (a ValueError) for a request that gives no images.
    """
    if batch_size < 1:
        raise DataError(f'batch_size must be at least 1, not {batch_size}')
    if batch_size % world_size:
        raise DataError(f'batch_size ({batch_size}) must be a multiple of the {world_size} processes that share it')
    train, val = (
        create_dataset(dataset_type, split, size, resolution, max_objects, min_objects, data_seed, data_dir, variant)
        for split, size in (('train', train_size), ('val', val_size))
    )
    if batch_size > len(train):
        raise DataError(f'batch_size ({batch_size}) must not exceed the {len(train)} training images')
    return (
        wrap_in_loader(train, batch_size, True, seed, num_workers, pin_memory, rank, world_size),
        wrap_in_loader(val, batch_size, False, pin_memory=pin_memory, rank=rank, world_size=world_size),
    )


# --- Command line ----------------------------------------------------------------------------


def sample_sheet(dataset: Dataset, columns: int = 8, rows: int = 4, scale: int = 2) -> Image.Image:
    """Samples and, under each row, their labels in colours; every pixel scale x scale large."""
    lines = []
    rows = min(rows, len(dataset) // columns) or 1
    for row in range(rows):
        batch = dataset.__getitems__(list(range(row * columns, min((row + 1) * columns, len(dataset)))))
        lines.append(((batch['image'] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
        if 'mask' in batch:
            # Hues a golden angle apart: neighbouring labels never look alike.
            hues = [colorsys.hsv_to_rgb(label * 0.618 % 1, 0.65, 0.95) for label in range(int(batch['mask'].max()) + 1)]
            hues[0] = (0.15, 0.15, 0.15)
            lines.append((np.array(hues)[batch['mask'].numpy()] * 255).astype(np.uint8))
    pad = [(0, 0), (0, 2), (0, 2), (0, 0)]  # a white line between neighbours
    sheet = np.concatenate([np.concatenate(list(np.pad(line, pad, constant_values=255)), axis=1) for line in lines])
    return Image.fromarray(sheet.repeat(scale, axis=0).repeat(scale, axis=1))


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Draw a sheet of samples with their masks and measure how fast they come, or prepare a data set.',
        usage='python dataset.py [--help] [flags]',
    )

    def add(name, help, default=None, group=parser, **kwargs):
        shown = '' if default is None else f' (default: {default})'
        group.add_argument(name, help=help + shown, default=default, **kwargs)

    add('--dataset', 'source of the images', 'shapes', choices=DATASETS)
    add('--data_dir', 'where sources other than shapes lie', Path('data'), type=Path)
    add('--variant', 'of multi_dsprites', VARIANTS[0], choices=VARIANTS)
    add('--resolution', 'side of the square images, pixels (default: set by the data set)', type=int)
    add('--max_objects', 'most objects in an image', 6, type=int)
    add('--min_objects', 'fewest objects in an image, of shapes only', 2, type=int)
    add('--data_seed', 'decides what is drawn', 0, type=int)
    add('--num_images', 'images to draw and count, at least 32', 1000, type=int)
    add('--output', 'where the sheet goes', Path('samples.png'), type=Path)
    group = parser.add_argument_group('preparing')
    add('--prepare', 'turn this data set into one HDF5 file in --data_dir', group=group, choices=tuple(PUBLISHED))
    add('--url', 'where to download it from, if it is not in --data_dir', group=group)
    add('--limit', 'stop after so many scenes', group=group, type=int)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser()
    args = parser.parse_args(argv)
    if args.num_images < 32:
        parser.error(f'--num_images must be at least 32, a sheet, not {args.num_images}')
    if args.limit is not None and args.limit < 1:
        parser.error(f'--limit must be at least 1, not {args.limit}')
    if args.resolution is None:
        args.resolution = SIZES[args.prepare or args.dataset][0]
    if not 1 <= args.resolution <= 1024:
        parser.error(f'--resolution must be from 1 to 1024, not {args.resolution}')
    return args


def preview(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    dataset = create_dataset(
        args.dataset, 'train', args.num_images, args.resolution, args.max_objects, args.min_objects, args.data_seed,
        args.data_dir, args.variant,
    )  # fmt: skip
    drawing = time.perf_counter() - start
    start = time.perf_counter()
    batches = list(wrap_in_loader(dataset, min(32, len(dataset)), shuffle=False))
    loading = time.perf_counter() - start
    if 'mask' in batches[0]:
        counts = torch.cat([torch.tensor([len(mask.unique()) - 1 for mask in batch['mask']]) for batch in batches])
        print('objects  images')
        for number, images in enumerate(torch.bincount(counts).tolist()):
            if images:
                print(f'{number:7d}  {images:6d}  {"#" * round(60 * images / len(counts))}')
    verb = 'drawing' if args.dataset == 'shapes' else 'reading'
    print(f'{verb} {len(dataset) / drawing:,.0f} images/s, loading {len(dataset) / loading:,.0f} images/s')
    sample_sheet(dataset).save(args.output)
    print(f'sheet of samples{" and masks" if "mask" in batches[0] else ""}: {args.output}')


def main(args: argparse.Namespace) -> int:
    """Returns the exit status; a user's mistake becomes one line and a 2."""
    try:
        if not args.prepare:
            preview(args)
            return 0
        start = time.perf_counter()
        path = prepare(
            args.prepare, args.data_dir, args.resolution, args.max_objects, args.variant, args.limit, args.url
        )
        seconds = time.perf_counter() - start
        with h5py.File(path) as file:
            splits = np.bincount(file['split'][:], minlength=3)
            read = int(file.attrs['scenes_read'])
        print(f'{path}: {", ".join(f"{n} {split}" for n, split in zip(splits, SPLITS, strict=True))} images')
        print(
            f'{splits.sum()} of {read} scenes kept, {path.stat().st_size / 1e6:,.1f} MB, {read / seconds:.0f} scenes/s'
        )
    except (DataError, OSError) as error:
        print(f'dataset.py: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted: nothing was left behind but a download to go on with', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main(parse_args()))
