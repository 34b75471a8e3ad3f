"""Image sources for object discovery: one Dataset interface and one create_dataloader() for all of them.

    python dataset.py                                       # draws samples.png: images of shapes and their masks
    python dataset.py --prepare clevr6 --data_dir data      # writes data/clevr6_128_max6.h5 from the published file
    python dataset.py --dataset clevr6 --data_dir data      # draws samples.png from the prepared file
    python dataset.py --dataset images --data_dir pictures  # draws samples.png from a folder of pictures

    from dataset import create_dataloader
    train_loader, val_loader = create_dataloader(dataset_type='shapes', batch_size=32, resolution=64)

A batch is a dict with `image`, float32 [B, 3, H, W] in [-1, 1], and, if the source has masks, `mask`, int64 [B, H, W]:
0 is the background, 1 to 254 are objects, and 255 (IGNORE) marks pixels that every score leaves out, such as the
outlines in Pascal VOC. If some pictures of a folder have masks, a picture without one has the label 255 everywhere.
"""

import os
import signal
import sys

if __name__ == '__main__':  # Ctrl-C during the imports below, which take seconds
    signal.signal(signal.SIGINT, lambda *_: (print('interrupted', file=sys.stderr), os._exit(130)))

import argparse
import colorsys
import errno
import fnmatch
import gzip
import hashlib
import itertools
import json
import math
import platform
import re
import shutil
import struct
import time
import unicodedata
import urllib.error
import urllib.request
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import h5py
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm

SPLITS = ('train', 'val', 'test')
IGNORE = 255  # the label of pixels that are left out of every score
RESOLUTIONS = (16, 256)  # smallest and largest
SHAPES = ('circle', 'square', 'triangle')
SHAPES_SIZE = 10_000  # default number of training images


class DataError(ValueError):
    """Raised for a source or a request that yields no images; the message is one line for the user."""


def require(condition: bool, message: str) -> None:
    """Raises DataError unless the condition holds."""
    if not condition:
        raise DataError(message)


# --- In memory -------------------------------------------------------------------------------


class ImagesInMemory(Dataset):
    """Base class: `images` uint8 [N, H, W, 3] and `labels` uint8 [N, H, W], or None without masks."""

    images: np.ndarray
    labels: np.ndarray | None = None
    fingerprint: str  # identifies the images of all splits of the source

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


def fits_in_memory(count: int, resolution: int) -> bool:
    """Whether images and labels take less than half of the available memory."""
    return count * resolution**2 * 4 < psutil.virtual_memory().available / 2


def to_batch(images: np.ndarray, labels: np.ndarray | None = None) -> dict[str, Tensor]:
    """Converts uint8 images [B, H, W, 3] and labels [B, H, W] to a batch (see the module docstring)."""
    image = torch.from_numpy(images).permute(0, 3, 1, 2).float()  # (B, 3, H, W), channels_last in memory
    batch = {'image': image.mul_(2 / 255).sub_(1)}
    if labels is not None:
        batch['mask'] = torch.from_numpy(labels).long()
    return batch


def crop_box(width: int, height: int, dataset_type: str) -> tuple[float, float, float, float]:
    """Returns the square of a picture that the model sees: left, top, right and bottom in pixels.

    The centre. In landscape pictures of 'clevr6' it is the paper's crop, rows 29 to 221 of 240; other pictures of
    'clevr6' are taken to be cropped already.
    """
    side, middle = min(width, height), height / 2
    if dataset_type == 'clevr6' and width > height:
        side, middle = height * 192 / 240, height * 125 / 240
    return (width - side) / 2, middle - side / 2, (width + side) / 2, middle + side / 2


def digest(*parts: object) -> str:
    """Returns a hash of 16 hexadecimal digits."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def flip(batch: dict[str, Tensor], flipped: Tensor) -> dict[str, Tensor]:
    """Mirrors the images and masks of a batch left to right where `flipped` (bool [B]) is true."""
    flipped = flipped.to(batch['image'].device)[:, None, None]  # (B, 1, 1)
    where = {'image': flipped[:, None], 'mask': flipped}
    return {name: torch.where(where[name], values.flip(-1), values) for name, values in batch.items()}


# --- Shapes ----------------------------------------------------------------------------------


class ShapesDataset(ImagesInMemory):
    """Circles, squares and triangles on a grey background, with instance labels.

    The number of objects and their shape, position, size, rotation and colour are random. Objects may overlap, but at
    least MIN_VISIBLE of the area of each stays visible. Image i is a function of (data_seed, split, i): it does not
    depend on `size`, and no two splits share an image. All images are drawn in the constructor and kept in memory.
    Raises DataError for an unknown split, and for a size, resolution, number of objects or seed out of range, and
    MemoryError for a size that does not fit in memory.
    """

    # The size of an object is the radius of the disc of equal area, as a fraction of the image side.
    MIN_SIZE, MAX_SIZE = 0.09, 0.17
    MIN_VISIBLE = 0.6
    MIN_RADIUS = 1.3  # pixels; a smaller object may cover no pixel centre
    MAX_OBJECTS = 16

    def __init__(
        self, split: str = 'train', size: int | None = None, resolution: int = 64,
        max_objects: int = 6, min_objects: int = 2, data_seed: int = 0,
    ):  # fmt: skip
        size, (low, high) = SHAPES_SIZE if size is None else size, RESOLUTIONS
        require(split in SPLITS, f'split must be one of {", ".join(SPLITS)}, not {split!r}')
        require(size >= 1, f'the number of images must be at least 1, not {size}')
        require(low <= resolution <= high, f'the resolution of shapes must be from {low} to {high}, not {resolution}')
        limits = f'1 <= min_objects <= max_objects <= {self.MAX_OBJECTS}'
        valid = 1 <= min_objects <= max_objects <= self.MAX_OBJECTS
        require(valid, f'min_objects ({min_objects}) and max_objects ({max_objects}) must satisfy {limits}')
        require(data_seed >= 0, f'data_seed must not be negative, not {data_seed}')
        self.split, self.resolution, self.data_seed = split, resolution, data_seed
        self.min_objects, self.max_objects = min_objects, max_objects
        self.fingerprint = digest('shapes', resolution, max_objects, min_objects, data_seed)
        if not fits_in_memory(size, resolution):
            raise MemoryError
        self.images = np.empty((size, resolution, resolution, 3), np.uint8)
        self.labels = np.empty((size, resolution, resolution), np.uint8)
        # `delay` shows the bar only if drawing takes longer than two seconds.
        for i in tqdm(range(size), f'drawing {split} shapes', unit=' images', delay=2, disable=None, leave=False):
            self.images[i], self.labels[i] = self.draw(i)

    def draw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns image uint8 [H, W, 3] and labels uint8 [H, W] of sample `index`."""
        rng = np.random.default_rng([self.data_seed, SPLITS.index(self.split), index])
        image = np.full((3, self.resolution, self.resolution), 255 * rng.uniform(0.1, 0.9), np.float32)
        labels = np.zeros((self.resolution, self.resolution), np.uint8)
        count = rng.integers(self.min_objects, self.max_objects, endpoint=True)
        areas = np.zeros(count + 1, int)  # full area of each label in pixels; 0: the background may be hidden
        for label in range(1, count + 1):
            (rows, columns), coverage = self._place(rng, labels, areas)
            inside = coverage > 0.5
            hsv = rng.uniform((0, 0.6, 0.6), 1)  # saturated enough to stand out from any grey
            colour = 255 * np.array(colorsys.hsv_to_rgb(*hsv), np.float32)[:, None, None]  # (3, 1, 1)
            behind = image[:, rows, columns]
            behind += coverage * (colour - behind)
            labels[rows, columns][inside] = label
            areas[label] = np.count_nonzero(inside)
        return (image + 0.5).astype(np.uint8).transpose(1, 2, 0), labels  # (H, W, 3), (H, W)

    def _place(self, rng: np.random.Generator, labels: np.ndarray, areas: np.ndarray):
        """Chooses a random object that leaves MIN_VISIBLE of every earlier object visible. Returns as _rasterise()."""
        shape = SHAPES[rng.integers(len(SHAPES))]
        radius = max(rng.uniform(self.MIN_SIZE, self.MAX_SIZE) * self.resolution, self.MIN_RADIUS)
        visible = np.bincount(labels.ravel(), minlength=len(areas))  # pixels of each label
        while True:
            for _ in range(20):
                x, y = rng.uniform(radius, self.resolution - radius, 2)
                window, coverage = self._rasterise(shape, x, y, radius, rng.uniform(0, 2 * np.pi))
                hidden = np.bincount(labels[window][coverage > 0.5], minlength=len(areas))
                if (visible - hidden >= self.MIN_VISIBLE * areas).all():
                    return window, coverage
            radius = max(0.8 * radius, self.MIN_RADIUS)  # a smaller object fits into a crowded image

    def _rasterise(self, shape: str, x: float, y: float, radius: float, angle: float):
        """Returns the window that contains an object (two slices), and the coverage [h, w] of its pixels in [0, 1]."""
        reach = 1.6 * radius + 1  # the corners of a triangle are 1.56 radii from its centre
        rows, columns = (slice(max(int(c - reach), 0), min(int(c + reach) + 1, self.resolution)) for c in (y, x))
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
        return (rows, columns), (0.5 - distance).clip(0, 1)  # the edge is one pixel wide


# --- Published data sets ---------------------------------------------------------------------

BUCKET = 'https://storage.googleapis.com/multi-object-datasets'


@dataclass(frozen=True)
class Published:
    """A data set of github.com/google-deepmind/multi_object_datasets: GZIP TFRecords of tf.train.Example."""

    path: str  # within the bucket; {} stands for the variant
    gigabytes: float | None
    height: int
    width: int
    backgrounds: int = 1  # number of leading masks of a record that are background
    entities_last: bool = False  # masks are [H, W, N, 1] instead of [N, H, W, 1]


VARIANTS = ('colored_on_grayscale', 'colored_on_colored', 'binarized')  # of multi_dsprites
PUBLISHED = {
    'clevr6': Published('clevr_with_masks/clevr_with_masks_train.tfrecords', 10.5, 240, 320),
    'multi_dsprites': Published('multi_dsprites/multi_dsprites_{}.tfrecords', None, 64, 64, entities_last=True),
    'tetrominoes': Published('tetrominoes/tetrominoes_train.tfrecords', 0.3, 35, 35),
    'objects_room': Published('objects_room/objects_room_train.tfrecords', 7, 64, 64, backgrounds=4),
}
MAX_RECORDS = 100_000  # later records of a source are not used
SHARES = (0.7, 0.15)  # train, val; the rest is test. The paper trains on the first 70,000 records of CLEVR


class Scene(NamedTuple):
    image: np.ndarray  # uint8 [h, w, 3]
    labels: np.ndarray | None  # uint8 [resolution, resolution]
    num_objects: int
    record: int  # number within the source
    split: int = 0  # index into SPLITS, if the source itself has splits


def read_records(path: Path) -> Iterator[bytes]:
    """Yields the payload of each record of a TFRecord file, GZIP or plain. Raises DataError for a damaged file.

    Checks the lengths of all records; their content only through GZIP: the checksums take a second per megabyte.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c  # importing takes 0.5 s

    number, again = 0, 'delete the file and fetch it again'
    try:
        with open(path, 'rb') as file:
            zipped = file.read(2) == b'\x1f\x8b'
        if not zipped:
            print(f'{path} is not compressed with GZIP: damaged images would not be noticed', file=sys.stderr)
        with (gzip.open if zipped else open)(path, 'rb') as file:
            while header := file.read(12):
                length, checksum = struct.unpack('<QI', header)
                if masked_crc32c(header[:8]) != checksum:
                    raise zlib.error('its length does not match its checksum')
                payload = file.read(length)
                if len(payload) < length or len(file.read(4)) < 4:
                    raise EOFError
                yield payload
                number += 1
    except (EOFError, struct.error) as error:
        raise DataError(f'{path} ends within record {number}: it is not complete; {again}') from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f'{path}: record {number} is damaged: {error}; {again}') from error
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error}') from error
    require(number > 0, f'{path} holds no records; {again}')


def parse_message(content: bytes) -> list[tuple[int, bytes]]:
    """Returns number and content of each field of a serialised protobuf message."""
    return [(field.field_number, field.data) for field in UnknownFieldSet(Empty.FromString(content))]


def bytes_of(features: dict[str, bytes], name: str, pixels: int) -> np.ndarray:
    """Returns the one-byte strings of a feature, uint8 [n * pixels]. Each is serialised as 0A 01 and the byte."""
    wire = np.frombuffer(features.get(name, b''), np.uint8)
    valid = len(wire) > 0 and len(wire) % (3 * pixels) == 0 and tuple(wire[:2]) == (10, 1)
    require(valid, f'it has no {name!r} of one byte for each of {pixels} pixels')
    return wire[2::3]


def decode_record(number: int, payload: bytes, source: Published, resolution: int) -> Scene:
    """Decodes record `number`, a tf.train.Example. Raises an error for one that does not hold what `source` says."""
    height, width = source.height, source.width
    ((_, content),) = parse_message(payload)
    entries = [dict(parse_message(entry)) for _, entry in parse_message(content)]  # 1: name, 2: Feature
    features = {entry[1].decode(): parse_message(entry[2])[0][1] for entry in entries}  # BytesList or FloatList
    left, top, right, bottom = map(int, crop_box(width, height, 'clevr6'))  # the others are square
    image = bytes_of(features, 'image', height * width).reshape(height, width, -1)[top:bottom, left:right]  # (h, w, C)
    require(image.shape[2] in (1, 3), f"its 'image' has {image.shape[2]} channels, not 1 or 3")
    masks = bytes_of(features, 'mask', height * width)
    if source.entities_last:
        masks = masks.reshape(height, width, -1).transpose(2, 0, 1)  # (N, H, W)
    else:
        masks = masks.reshape(-1, height, width)
    # Resizing to the nearest pixel first makes the argmax cheaper.
    rows, columns = (((np.arange(resolution) + 0.5) * side / resolution).astype(int) for side in image.shape[:2])
    strongest = masks[:, top + rows[:, None], left + columns].argmax(axis=0)
    labels = np.maximum(strongest - (source.backgrounds - 1), 0).astype(np.uint8)
    if 'visibility' in features:
        visible = np.frombuffer(parse_message(features['visibility'])[0][1], '<f4') > 0
    else:
        visible = masks.any(axis=(1, 2))  # a mask with a pixel is an object
    num_objects = int(visible[source.backgrounds :].sum())
    return Scene(np.repeat(image, 3 // image.shape[2], axis=2), labels, num_objects, number)


def read_published(path: Path, source: Published, resolution: int) -> Iterator[Scene]:
    """Yields the scenes of a published file. Raises DataError, with the number of the record, for a damaged one."""
    for number, payload in enumerate(itertools.islice(read_records(path), MAX_RECORDS)):
        try:
            scene = decode_record(number, payload, source, resolution)
        except (DecodeError, LookupError, TypeError, ValueError) as error:
            raise DataError(f'{path}: record {number} is damaged or not as expected: {error}') from error
        yield scene


def read_clevr_v1(folder: Path) -> Iterator[Scene]:
    """Yields the scenes of a CLEVR_v1.0 folder, without masks. Half of its val split becomes test. Raises DataError."""
    scenes = []  # picture, number of objects, split
    for name in ('train', 'val'):
        file = folder / 'scenes' / f'CLEVR_{name}_scenes.json'
        try:
            found = json.loads(file.read_text())['scenes'] if file.is_file() else []
            listed = [(folder / 'images' / name / s['image_filename'], len(s['objects'])) for s in found]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{file} is not a list of CLEVR scenes ({type(error).__name__}: {error})') from error
        missing = [picture for picture, _ in listed if not picture.is_file()]
        count = f'{len(missing)} of the {len(listed)} pictures that {file} names are missing'
        require(not missing, f'{count}, the first is {missing[0] if missing else None}; fetch them again')
        half = (len(listed) + 1) // 2
        scenes += [(*scene, 0 if name == 'train' else 1 + (i >= half)) for i, scene in enumerate(listed)]
    names = 'CLEVR_train_scenes.json or CLEVR_val_scenes.json'
    require(len(scenes) > 0, f'{folder / "scenes"} has no {names} that lists a scene; fetch them again')
    for number, (picture, num_objects, split) in enumerate(scenes):
        yield Scene(crop(open_picture(picture), 192, 'clevr6'), None, num_objects, number, split)


# --- Pictures --------------------------------------------------------------------------------

PICTURES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff', '.gif')
OTHER_FORMATS = ('.heic', '.heif', '.avif', '.jp2', '.jxl', '.ppm', '.pgm', '.tga')  # reported, but not read
MASKS = ('{name}_mask.png', '../masks/{name}.png')  # the patterns that are tried without --masks
SPLIT_FOLDERS = dict(train='train', val='val', valid='val', validation='val', test='test')
CREATOR = 'Slot Attention dataset.py'  # in the metadata of the sheet of samples
OUR_FIGURES = re.compile(rb'Slot Attention (dataset|visualize)\.py')
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # raised by PIL
Image.MAX_IMAGE_PIXELS = 10**9  # panoramas and scans exceed the default


def open_picture(path: Path) -> Image.Image:
    """Opens the first page of a picture as 8-bit RGB: upright by its EXIF orientation, transparent parts on white.

    The type of the pixels sets their scale: integers of more than 8 bits are from 0 to 65535, floats from 0 to 1.
    The attribute `pages` of the result is the number of pages or frames. Raises DataError.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in 'IF':
                full = 1 if image.mode == 'F' else 65535
                values = np.asarray(image) / full
                if not -0.5 <= values.min() <= values.max() <= 1.5:  # resizing overshoots by less; also NaN
                    raise ValueError(f'its values are not from 0 to {full}')
                image = Image.fromarray((values.clip(0, 1) * 255 + 0.5).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            image = image.convert('RGB')
            image.pages = getattr(file, 'n_frames', 1)
            return image
    except UNREADABLE as error:
        raise DataError(f'{path} cannot be read as a picture: {error}; repair or remove it') from error


def crop(image: Image.Image, size: int, dataset_type: str = 'images', method=Image.Resampling.BILINEAR) -> np.ndarray:
    """Resizes the part of a picture that the model sees, see crop_box(): uint8 [size, size] or [size, size, 3]."""
    return np.asarray(image.resize((size, size), method, crop_box(*image.size, dataset_type)), np.uint8)


def read_picture(path: Path, resolution: int, dataset_type: str = 'images') -> np.ndarray:
    """Reads a picture, crops and resizes it like the images of `dataset_type`: uint8 [R, R, 3]. Raises DataError."""
    if dataset_type == 'clevr6':
        return resize([crop(open_picture(path), 192, 'clevr6')], resolution)[0]
    return crop(open_picture(path), resolution)


def read_mask(path: Path, size: tuple[int, int], resolution: int, problems: list[str]) -> np.ndarray:
    """Reads the mask of a picture of `size` (width, height), cropped as the picture: uint8 [R, R].

    Raises DataError for a mask that cannot be used. Adds to `problems` if the labels seem to be wrong.
    """
    try:
        with Image.open(path) as file:
            mask, bands, mode = ImageOps.exif_transpose(file), len(file.getbands()), f'{file.format} mode {file.mode}'
    except UNREADABLE as error:
        raise DataError(f'mask {path} cannot be read: {error}; save it again') from error
    values = 'pixels' if bands == 1 else 'pixels.reshape(-1, pixels.shape[-1]), axis=0'
    remedy = f'number its values with np.unique({values}, return_inverse=True)[1].reshape(pixels.shape[:2])'
    valid = mask.mode in ('1', 'L', 'P') and not mode.startswith('JPEG')
    require(valid, f'mask {path} is a {mode}, not a PNG with one 8-bit channel of labels; {remedy}')
    (width, height), (mask_width, mask_height) = size, mask.size
    same = abs(mask_width * height - mask_height * width) <= max(*size, *mask.size)  # sides may be rounded by a pixel
    what = f'mask {path} is {mask_width}x{mask_height} and its picture {width}x{height}, of another aspect ratio'
    require(same, f'{what}; crop both in the same way')
    labels = np.asarray(mask, np.uint8)
    corner = labels[1:, 1:]
    thick = corner[(labels[:-1, :-1] == corner) & (labels[:-1, 1:] == corner) & (labels[1:, :-1] == corner)]
    every, wide = (set(np.unique(pixels)) - {IGNORE} for pixels in (labels, thick))
    if len(every - wide) > max(len(wide), 3):
        problems.append(f'most labels of mask {path} cover only edges; if it was resized, use Image.Resampling.NEAREST')
    if every <= {0} and IGNORE in labels:
        problems.append(f'mask {path} has no label but 0 and 255, which no score counts; number objects from 1')
    return crop(mask, resolution, method=Image.Resampling.NEAREST)


def walk(folder: Path, problems: list[str]) -> list[Path]:
    """Returns the picture files below a folder in natural order, and adds to `problems` the files that are left out.

    Follows symbolic links, visits a folder once, and skips hidden names.
    """
    files, visited = [], set()
    lost = '{} cannot be reached and is left out; repair the link or the permissions'.format
    for parent, folders, names in os.walk(folder, True, lambda error: problems.append(lost(error.filename)), True):
        if (real := os.path.realpath(parent)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for path in (Path(parent, name) for name in names if not name.startswith('.')):
            ending = path.suffix.lower()
            if not os.path.isfile(path):
                problems.append(lost(path))
            elif ending in OTHER_FORMATS:
                problems.append(f'{path} is in a format that is not read; convert it to PNG or JPEG')
            elif is_our_figure(path):
                problems.append(f'{path} is a figure of these scripts and is left out; move it to another folder')
            elif ending in PICTURES:
                files.append(path)
    return sorted(files, key=natural_key)


def is_our_figure(path: Path) -> bool:
    """Whether the metadata, which PNG and GIF files have at their start, name one of these scripts."""
    if path.suffix.lower() not in ('.png', '.gif') or not os.access(path, os.R_OK):
        return False
    with open(path, 'rb') as file:
        return OUR_FIGURES.search(file.read(2048)) is not None


def natural_key(path: Path) -> list[str | int]:
    """A sort key that compares the numbers in a path by value: frame2 before frame10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split('([0-9]+)', str(path)))]


def nfc(path: str | Path) -> str:
    """Composes accents: macOS writes names in another form than other systems."""
    return unicodedata.normalize('NFC', str(path))


def folders_of(path: Path, top: Path) -> list[tuple[str, str]]:
    """Returns each folder from that of a file up to `top`, with the path in it of the file, without its ending."""
    stem, first = os.path.splitext(path)[0], len(str(top))
    return [(stem[:i], stem[i + 1 :]) for i in range(len(stem) - 1, first - 1, -1) if stem[i] == os.sep]


def find_masks(
    folder: Path, files: list[Path], patterns: Sequence[str], problems: list[str]
) -> tuple[dict[Path, Path], set[Path]]:
    """Returns the mask of each picture that has one, and all files that have the name of a mask.

    In a pattern {name} is the path of the picture, without its ending, relative to its folder or to one above it, up
    to `folder`; the pattern is relative to the same folder. A mask whose name differs in case is used if it could
    belong to no other picture. Masks that cannot be reached are added to `problems`.
    """
    known = list(files)
    for root in {Path(os.path.normpath(folder / pattern.partition('{name}')[0])) for pattern in patterns}:
        if root not in folder.parents and folder not in (root, *root.parents):
            places = {place for place in root.parent.glob('*') if nfc(place).casefold() == nfc(root).casefold()}
            known += itertools.chain(*(walk(place, problems) for place in places | {root} if place.is_dir()))
    by_name, pictures = defaultdict(dict), Counter(nfc(os.path.splitext(path)[0]).casefold() for path in files)
    for path in known:
        by_name[nfc(path).casefold()][nfc(path)] = path
    mask_of: dict[Path, Path] = {}
    for path in files:
        alone = pictures[nfc(os.path.splitext(path)[0]).casefold()] == 1
        for pattern, (parent, name) in itertools.product(patterns, folders_of(path, folder)):
            place = nfc(os.path.normpath(os.path.join(parent, pattern.replace('{name}', name))))
            masks = by_name.get(place.casefold(), {})
            mask = masks.get(place) or (next(iter(masks.values())) if len(masks) == 1 and alone else path)
            if mask != path:
                mask_of.setdefault(path, mask)
    named = set(mask_of.values())
    for pattern in patterns:  # every NAME_mask, and all below a folder masks, unless there are no other pictures
        like = '*/' + os.path.splitext(nfc(pattern).casefold())[0].replace('../', '').replace('{name}', '*')
        found = {path for path in files if fnmatch.fnmatch('/' + nfc(folders_of(path, folder)[-1][1]).casefold(), like)}
        if len(found) < len(files):
            named |= found
    return mask_of, named


def find_labels(folder: Path, pictures: list[Path]) -> dict[Path, str]:
    """Returns the pictures that seem to be labels of others, each with the pattern that makes it their mask.

    A folder holds labels if a folder beside it has files of the same names, with more channels.
    """
    groups = defaultdict(dict)  # folder: file: its name in the folder
    for path in pictures:
        for parent, name in folders_of(path, folder)[:-1]:
            # Cityscapes: leftImg8bit/a_leftImg8bit.png and gtFine/a_gtFine_color.png are both named a.
            groups[Path(parent)][path] = name.split(f'_{os.path.basename(parent)}')[0]
    names = {group: set(files.values()) for group, files in groups.items()}
    one_channel = {  # or, with several files of a name, one of them
        group: (any if len(names[group]) < len(files) else all)(count_channels(path) == 1 for path in [*files][:9])
        for group, files in groups.items()
    }
    labels = {}
    for group in filter(one_channel.get, groups):
        beside = (other for other in groups if other.parent == group.parent and not one_channel[other])
        if any(names[group] <= names[other] for other in beside):
            labels |= {path: f'../{group.name}/{{name}}{path.suffix}' for path in groups[group]}
    return labels


def count_channels(path: Path) -> int:
    try:
        with Image.open(path) as file:
            return len(file.getbands())
    except UNREADABLE:
        return 0


def list_pictures(folder: Path, masks: str | None = None) -> tuple[dict[Path, Path | None], list[str]]:
    """Returns the pictures below a folder, each with its mask or None, and the problems of the other files."""
    problems: list[str] = []
    files = walk(folder, problems)
    patterns = MASKS if masks is None else (os.path.expanduser(masks),)
    mask_of, named = find_masks(folder, files, patterns, problems)
    pictures = [path for path in files if path not in named]
    labels = find_labels(folder, pictures)
    for path in named.difference(mask_of.values()):
        remedy = 'give it the name of its picture, or, if it is a picture, another name'
        problems.append(f'{path} is left out as a mask without a picture; {remedy}')
    for path, pattern in labels.items():
        remedy = f"if it is the mask of a picture of the same name, add --masks '{pattern}'"
        problems.append(f'{path} seems to hold labels and is left out; {remedy}')
    return {path: mask_of.get(path) for path in pictures if path not in labels}, problems


def find_pictures(folder: str | os.PathLike) -> list[Path]:
    """Lists the pictures below a folder, without masks, in natural order: frame2 before frame10."""
    return list(list_pictures(Path(os.path.abspath(folder)))[0])


def split_pictures(folder: Path, pictures: Iterable[Path]) -> tuple[dict[str, list[Path]], bool]:
    """Returns the pictures of each split, in the order of a hash of their paths, and whether folders make the splits.

    They do if there is a folder train and one of another split. A split without a folder is the lowest tenth of the
    hash (val) or the highest (test) of the pictures of train, or else of all pictures: adding or removing a picture
    moves no other one, except in a small folder, where a split takes at least one picture.
    """

    def place(path: Path) -> float:
        return int(hashlib.sha256(os.fsencode(path.relative_to(folder).as_posix())).hexdigest(), 16) / 2**256

    order, own = sorted(pictures, key=place), defaultdict(list)
    for path in order:
        parts = (SPLIT_FOLDERS.get(part.lower()) for part in path.relative_to(folder).parts[:-1])
        own[next(filter(None, parts), None)].append(path)
    by_folder = bool(own['train'] and (own['val'] or own['test']))
    train, val, test = (own[split] for split in SPLITS) if by_folder else (order, [], [])
    if not val:
        number = min(max(sum(place(path) < 0.1 for path in train), 1), len(train) - 1 - (not test))
        val, train = train[:number], train[number:]
    if not test:
        number = len(train) - min(max(sum(place(path) >= 0.9 for path in train), 1), len(train) - 1)
        train, test = train[:number], train[number:]
    return {'train': train, 'val': val, 'test': test, 'all': order}, by_folder


def report(problems: list[str]) -> None:
    """Prints problems, each of the form 'what is wrong; what to do', with one line for all that need the same."""
    by_remedy: dict[str, list[str]] = {}
    for what, _, remedy in (problem.rpartition('; ') for problem in sorted(problems)):
        by_remedy.setdefault(remedy, []).append(what)
    for remedy, whats in by_remedy.items():
        more = f' (and {len(whats) - 1} more)' if len(whats) > 1 else ''
        print(f'{whats[0]}{more}; {remedy}', file=sys.stderr)


class PictureFolder(ImagesInMemory):
    """Pictures below a folder, cropped to the central square and resized; labels from their masks, if any.

    `masks` is the pattern of the masks, see find_masks(); None: MASKS. A mask has one channel of 8 bits and the aspect
    ratio of its picture. A picture without a usable mask has the label IGNORE everywhere if others have masks. Pictures
    and masks that cannot be used are reported. split_pictures() chooses the splits. Raises DataError for a folder that
    is missing or has too few pictures, and for `masks` that lead to none.
    """

    def __init__(
        self, split: str, size: int | None = None, resolution: int = 128, data_dir: str | os.PathLike = 'data',
        masks: str | None = None,
    ):  # fmt: skip
        folder, self.resolution = Path(os.path.abspath(data_dir)), resolution
        require(folder.is_dir(), f'no folder {folder}; --data_dir must name a folder of pictures')
        require('{name}' in (masks or '{name}'), f'--masks {masks} must contain {{name}}, the name of the picture')
        mask_of, problems = list_pictures(folder, masks)
        least = 1 if split == 'all' else 3
        found = f'{folder} holds {len(mask_of)} pictures ({", ".join(PICTURES)})'
        require(len(mask_of) >= least, f'{found}; at least {least} are needed')
        found = f'--masks {masks} leads to no mask of a picture such as {next(iter(mask_of))}'
        require(masks is None or any(mask_of.values()), f'{found}; it is relative to the folder of the picture')
        sizes = {path: os.path.getsize(path) for pair in mask_of.items() for path in pair if path}
        files = [(path.relative_to(folder).as_posix(), sizes[path], sizes.get(mask)) for path, mask in mask_of.items()]
        self.fingerprint = digest(*sorted(files))
        splits, by_folder = split_pictures(folder, mask_of)
        paths = splits[split][:size]
        require(len(paths) > 0, f'{folder} has no {split} pictures; add some, or use its folders one by one')
        if not fits_in_memory(len(paths), resolution):
            raise MemoryError
        self.problems = [] if split == 'val' else problems  # once, not for both loaders of a training
        if by_folder and split != 'val':
            counts = ', '.join(f'{len(splits[name])} {name}' for name in SPLITS)
            unused = len(mask_of) - sum(len(splits[name]) for name in SPLITS)
            print(f'{folder}: its folders are the splits: {counts}, {unused} left out', file=sys.stderr)
        with ThreadPool() as pool:  # PIL decodes without holding the interpreter lock
            read = pool.imap(lambda path: self._read(path, mask_of[path]), paths)
            read = tqdm(read, f'reading {split}', len(paths), unit=' pictures', delay=2, disable=None, leave=False)
            found = [pair for pair in read if pair is not None]
        reason = 'remove or repair them, and other pictures take their place'
        require(len(found) > 0, f'none of the {len(paths)} {split} pictures in {folder} can be read; {reason}')
        images, labels = zip(*found, strict=True)
        self.images = np.stack(images)
        if self.images.max() <= 16:
            dark = f'no {split} picture uses more than a sixteenth of the range of its type'
            self.problems.append(f'{dark}; multiply 12 bits in 16 by 16')
        masks = [mask for mask in labels if mask is not None]
        self.objects = [len(set(np.unique(mask)) - {0, IGNORE}) for mask in masks]
        if masks:
            ignored = np.full((resolution, resolution), IGNORE, np.uint8)
            self.labels = np.stack([ignored if mask is None else mask for mask in labels])
        report(self.problems)

    def __str__(self) -> str:
        counts = self.objects
        objects = f' of {np.median(counts):.0f} objects (median; at most {max(counts)})' if counts else ''
        return f'{super().__str__()}, {len(counts):,} with a mask{objects}'

    def _read(self, path: Path, mask: Path | None) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Returns the image [R, R, 3] and labels [R, R] of a picture, or None for a picture that cannot be read."""
        picture = labels = None
        try:
            picture = open_picture(path)
            labels = read_mask(mask, picture.size, self.resolution, self.problems) if mask else None
        except DataError as error:
            self.problems.append(str(error))
        if picture is None:
            return None
        if picture.pages > 1:
            self.problems.append(f'{path} has {picture.pages} pages, of which the first is used; save each as a file')
        return crop(picture, self.resolution), labels


# --- Prepared files --------------------------------------------------------------------------

MIN_FREE = 1e8  # bytes on the disk; a preparation ends below


def prepared_path(dataset: str, folder: Path, size: int, max_objects: int, variant: str, limit: int | None) -> Path:
    """Returns the file that prepare() writes for these arguments."""
    name = f'{dataset}_{variant}' if dataset == 'multi_dsprites' else dataset
    return folder / f'{name}_{size}_max{max_objects}{"" if limit is None else f"_limit{limit}"}.h5'


def find_source(dataset: str, data_dir: Path, variant: str, url: str | None, fetch: bool) -> Path:
    """Returns the published file (or, for CLEVR, a folder CLEVR_v1.0) in `data_dir`.

    If there is none, downloads the file, or without `fetch` raises DataError, which says how to get it.
    """
    require(not data_dir.is_file(), f'--data_dir must name the folder that contains {data_dir}, not the file')
    published = PUBLISHED[dataset].path.format(variant)
    file = data_dir / Path(published).name
    candidates = [path for path in (file, data_dir / published) if path.exists()]
    if dataset == 'clevr6':
        candidates += [folder for folder in (data_dir / 'CLEVR_v1.0', data_dir) if (folder / 'scenes').is_dir()]
    if candidates:
        return candidates[0]
    if fetch:
        download(url or f'{BUCKET}/{published}', file)
        return file
    size = f' ({PUBLISHED[dataset].gigabytes} GB)' if PUBLISHED[dataset].gigabytes else ''
    folder = ' or the folder CLEVR_v1.0 (without masks)' if dataset == 'clevr6' else ''
    flag = f' --variant {variant}' if dataset == 'multi_dsprites' else ''
    command = f'python dataset.py --prepare {dataset}{flag} --data_dir {quote(str(data_dir))}'
    needed = f'{data_dir} has no {dataset}: it needs {file.name}{size}{folder}'
    raise DataError(f'{needed}; {command} downloads it from {BUCKET}/{published}')


def download(url: str, path: Path, attempts: int = 5) -> None:
    """Downloads `url` to `path`. Raises DataError if this fails; the next call continues from the file `path`.part."""
    part = path.with_name(f'{path.name}.part')
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(attempts):
        time.sleep(attempt)
        done = part.stat().st_size if part.exists() else 0  # bytes
        try:
            request = urllib.request.Request(url, headers={'Range': f'bytes={done}-'} if done else {})
            with urllib.request.urlopen(request, timeout=30) as response:
                done *= response.status == 206  # otherwise the server sends the whole file
                total = done + int(response.headers.get('Content-Length', -1 - done))  # -1: unknown
                options = dict(initial=done, total=max(total, 0) or None, desc=path.name, disable=None)
                with open(part, 'ab' if done else 'wb') as file, tqdm.wrapattr(response, 'read', **options) as stream:
                    shutil.copyfileobj(stream, file, 1 << 20)
                    done = file.tell()
            if total in (-1, done):
                os.replace(part, path)
                return
            reason = 'the connection was closed'
        except (ValueError, urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            code, reason = getattr(error, 'code', 0), getattr(error, 'reason', error)
            if code == 416:  # nothing lies beyond `done`: `part` is of another file
                part.unlink(missing_ok=True)
            elif isinstance(error, ValueError) or 400 <= code < 500:
                raise DataError(f'{url} cannot be downloaded: {error}; try another --url') from error
    raise DataError(f'{url}: {reason} after {done / 1e6:,.1f} MB; run the same command again to continue from there')


def prepare(
    dataset: str, data_dir: str | os.PathLike, resolution: int, max_objects: int = 6, variant: str = VARIANTS[0],
    limit: int | None = None, url: str | None = None, fetch: bool = True, output_dir: str | os.PathLike | None = None,
) -> Path:  # fmt: skip
    """Converts a published data set to one HDF5 file and returns its path. The file gets its name when it is complete.

    Stops after `limit` scenes, under a name that contains it. With `fetch`, a missing source is downloaded from `url`
    (None: the published one). `output_dir` None is `data_dir`. Scenes with more than `max_objects` are left out.

    The file holds `image` uint8 [N, R, R, 3] (resized bilinearly) and `mask` uint8 [N, R, R] (to the nearest; if the
    source has masks), and `num_objects`, `record` (number in the source) and `split` (0 train, 1 val, 2 test), all [N].
    The split depends on the number of the record only: of the first 100,000 records of the source, 70 % are train, the
    next 15 % val, the rest test. Raises DataError for a source or a folder that cannot be used.
    """
    source, data_dir = PUBLISHED[dataset], Path(data_dir)
    raw = find_source(dataset, data_dir, variant, url, fetch)
    scenes = read_published(raw, source, resolution) if raw.is_file() else read_clevr_v1(raw)
    path = prepared_path(dataset, Path(output_dir or data_dir), resolution, max_objects, variant, limit)
    part = path.with_name(f'.{path.name}.{platform.node()}.{os.getpid()}')  # differs from that of any other process
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f'.*.h5.{platform.node()}.*'):  # of killed preparations
            if not psutil.pid_exists(int(leftover.suffix[1:])):
                leftover.unlink()
        with h5py.File(part, 'w') as file:
            file.attrs.update(dataset=dataset, variant=variant, resolution=resolution, max_objects=max_objects)
            number = seen = write_scenes(file, scenes, resolution, max_objects, limit)
            if raw.is_file():
                if limit is not None:  # a file of the published size has all records
                    whole = source.gigabytes and raw.stat().st_size > 0.9e9 * source.gigabytes
                    records = tqdm(itertools.islice(read_records(raw), MAX_RECORDS), 'counting', disable=None)
                    number = MAX_RECORDS if whole else sum(1 for _ in records)
                ends = np.cumsum(SHARES) * number
                file['split'][:] = np.searchsorted(ends, file['record'][:], side='right')
            counts = np.bincount(file['split'][:], minlength=3)
        with open(part, 'r+b') as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else ' '.join(str(error).split())
        command = f'python dataset.py --prepare {dataset} --data_dir {quote(str(data_dir))} --output_dir FOLDER'
        raise DataError(f'{path} cannot be written: {reason}; prepare it in another folder: {command}') from error
    finally:
        if part.exists():
            part.unlink()
    images = ', '.join(f'{count} {split}' for count, split in zip(counts, SPLITS, strict=True))
    print(f'{path}: {images} images; {counts.sum()} of {seen} scenes kept')
    if limit is not None:
        print(f'to use this file instead of that of all scenes: --data_dir {quote(str(path))}')
    return path


def write_scenes(file: h5py.File, scenes: Iterator[Scene], size: int, max_objects: int, limit: int | None) -> int:
    """Writes the arrays described in prepare(). Returns the number of scenes read. Raises DataError if none is kept."""
    counter = itertools.count()
    scenes = zip(tqdm(scenes, 'preparing', unit=' scenes', disable=None), counter, strict=False)
    kept = itertools.islice((scene for scene, _ in scenes if scene.num_objects <= max_objects), limit)
    while batch := list(itertools.islice(kept, 64)):
        if shutil.disk_usage(Path(file.filename).parent).free < MIN_FREE:
            raise OSError(errno.ENOSPC, '')  # after a failed write HDF5 would crash at exit
        arrays = {
            'image': resize([scene.image for scene in batch], size),
            'num_objects': np.array([scene.num_objects for scene in batch], np.int32),
            'record': np.array([scene.record for scene in batch], np.int32),
            'split': np.array([scene.split for scene in batch], np.int8),
        }
        if batch[0].labels is not None:  # all scenes have labels or none has
            arrays['mask'] = np.stack([scene.labels for scene in batch])
        for name, array in arrays.items():
            if name not in file:
                shape = array.shape[1:]
                file.create_dataset(
                    name, (0, *shape), array.dtype, maxshape=(None, *shape), chunks=(1, *shape) if shape else (1024,),
                    compression='gzip' if name == 'mask' else None,  # makes masks a hundred times smaller
                )  # fmt: skip
            file[name].resize(len(file[name]) + len(array), axis=0)
            file[name][-len(array) :] = array
    seen = file.attrs['scenes_read'] = next(counter)
    require('image' in file, f'none of {seen} scenes has at most {max_objects} objects')
    return seen


def resize(images: list[np.ndarray], size: int) -> np.ndarray:
    """Resizes uint8 images of one shape [h, w, 3] to [B, size, size, 3], as the paper's tf.image.resize (bilinear)."""
    stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (B, 3, h, w)
    if stack.shape[-2:] != (size, size):
        stack = F.interpolate(stack.float(), (size, size), mode='bilinear').round().byte()
    return stack.permute(0, 2, 3, 1).numpy()


class PreparedDataset(ImagesInMemory):
    """One split of a file written by prepare(): in memory if it fits, else read batch by batch. Raises DataError.

    `wanted` are the attributes that the file must have, such as its resolution.
    """

    def __init__(self, path: str | os.PathLike, split: str, size: int | None = None, **wanted: object):
        self.path = Path(path)
        require(self.path.is_file(), f'no file {path}')
        try:
            with h5py.File(path) as file:
                ours = 'resolution' in file.attrs and {'image', 'record', 'split', 'num_objects'} <= set(file)
                require(ours, f'{path} was not written by python dataset.py --prepare; give another --data_dir')
                for name, value in wanted.items():
                    found = file.attrs.get(name, value)
                    reason = f'{path} was prepared with {name} {found}, not {value}; use --{name} {found}'
                    require(found == value, reason)
                self.resolution, self.names = int(file.attrs['resolution']), ['image', 'mask'][: 1 + ('mask' in file)]
                self.fingerprint = digest(*(file[name][:].tobytes() for name in ('record', 'split', 'num_objects')))
                splits = file['split'][:]
                self.rows = np.flatnonzero((splits == SPLITS.index(split)) if split in SPLITS else splits >= 0)[:size]
                reason = f'{path} has no {split} images; prepare more scenes (--limit, --max_objects)'
                require(len(self.rows) > 0, reason)
                self.in_memory = fits_in_memory(len(self.rows), self.resolution)
                if self.in_memory:
                    piece = slice(self.rows[0], self.rows[-1] + 1)  # a split is nearly contiguous
                    self.images, *labels = (file[name][piece][self.rows - piece.start] for name in self.names)
                    self.labels = labels[0] if labels else None
        except MemoryError:
            self.in_memory = False
        except OSError as error:
            reason = ' '.join(str(error).split())
            raise DataError(f'{path} cannot be read: {reason}; if it is damaged, prepare it again') from error

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return super().__str__() if self.in_memory else f'{len(self):,} images, read from {self.path}'

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        if self.in_memory:
            return super().__getitems__(indices)
        with h5py.File(self.path) as file:  # an open file cannot be shared with worker processes
            return to_batch(*(np.stack([file[name][row] for row in self.rows[indices]]) for name in self.names))


def open_prepared(
    dataset: str, split: str, size: int | None, resolution: int, data_dir: str | os.PathLike = 'data',
    max_objects: int = 6, variant: str = VARIANTS[0],
) -> Dataset:  # fmt: skip
    """Opens a published data set, or the prepared file that `data_dir` names; prepares it first where needed."""
    path = data_dir = Path(data_dir)
    if path.suffix != '.h5':
        path = prepared_path(dataset, data_dir, resolution, max_objects, variant, limit=None)
        if not path.exists():
            prepare(dataset, data_dir, resolution, max_objects, variant, fetch=False)
    wanted = dict(dataset=dataset, variant=variant, resolution=resolution, max_objects=max_objects)
    return PreparedDataset(path, split, size, **wanted)


# --- One interface for all sources -----------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A source of images: all that the three scripts know about it."""

    resolution: int  # default side of its images in pixels
    num_slots: int  # slots that its images need: one per object and one for the background
    flags: tuple[str, ...]  # the data flags that it uses besides --dataset and --resolution
    # create(split, size, resolution, **values of the flags): a Dataset with __len__, __getitems__(indices) -> a batch,
    # see to_batch(), and `fingerprint`, such as an ImagesInMemory. Raises DataError for a split that it does not have.
    create: Callable[..., Dataset]


PUBLISHED_FLAGS = ('data_dir', 'max_objects')
SOURCES = {
    'shapes': Source(64, 7, ('max_objects', 'min_objects', 'data_seed'), ShapesDataset),
    'clevr6': Source(128, 7, PUBLISHED_FLAGS, partial(open_prepared, 'clevr6')),
    'multi_dsprites': Source(64, 6, (*PUBLISHED_FLAGS, 'variant'), partial(open_prepared, 'multi_dsprites')),
    'tetrominoes': Source(35, 4, PUBLISHED_FLAGS, partial(open_prepared, 'tetrominoes')),
    'objects_room': Source(64, 7, PUBLISHED_FLAGS, partial(open_prepared, 'objects_room')),
    'images': Source(128, 7, ('data_dir', 'masks'), PictureFolder),
}
DATASETS = tuple(SOURCES)
DATA_FLAGS = tuple(dict.fromkeys(name for source in SOURCES.values() for name in source.flags))


def create_dataset(
    dataset_type: str, split: str, size: int | None = None, resolution: int | None = None, **options: object
) -> Dataset:
    """Creates one split ('train', 'val', 'test', or 'all') of a source with at most `size` images (None: all).

    `resolution` None is the default of the source. The options are those of create_dataloader(); a source ignores
    those of other sources. A published data set that is in `data_dir` as it was published is prepared first. The
    `fingerprint` of the result changes if the source does. Raises DataError.
    """
    require(split in (*SPLITS, 'all'), f'split must be one of {", ".join(SPLITS)} or all, not {split!r}')
    require(dataset_type in SOURCES, f'dataset_type must be one of {", ".join(SOURCES)}, not {dataset_type!r}')
    for name in options:
        require(name in DATA_FLAGS, f'{name} is not an option of a data set; these are: {", ".join(DATA_FLAGS)}')
    source = SOURCES[dataset_type]
    used = {name: value for name, value in options.items() if name in source.flags}
    try:
        return source.create(split, size, resolution or source.resolution, **used)
    except MemoryError as error:
        raise DataError(
            f'the {split} images of {dataset_type} do not fit in memory; use fewer images or a smaller --resolution'
        ) from error


def wrap_in_loader(
    dataset: Dataset, batch_size: int, shuffle: bool, seed: int = 0,
    num_workers: int = 0, pin_memory: bool = False, rank: int = 0, world_size: int = 1,
) -> DataLoader:  # fmt: skip
    """Creates a DataLoader that fetches whole batches.

    With `shuffle`, the order is a function of (seed, epoch) and incomplete batches are dropped: call
    `loader.sampler.set_epoch(n)` before each epoch. With several processes, each loads every `world_size`-th image
    of a batch, starting with image `rank`: every image is loaded exactly once.
    """
    if shuffle:
        sampler = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=seed, drop_last=True)
    else:
        sampler = range(rank, len(dataset), world_size)  # DistributedSampler would repeat images to even out
    return DataLoader(
        dataset, batch_size // world_size, sampler=sampler, drop_last=shuffle, pin_memory=pin_memory,
        num_workers=num_workers, persistent_workers=num_workers > 0,
        collate_fn=torch.nn.Identity(),  # __getitems__ returns a batch
    )  # fmt: skip


def create_dataloader(
    dataset_type: str = 'shapes', batch_size: int = 32, resolution: int = 64, max_objects: int = 6,
    min_objects: int = 2, train_size: int | None = None, val_size: int | None = 320, seed: int = 0,
    num_workers: int = 0, pin_memory: bool = False, rank: int = 0, world_size: int = 1, **options: object,
) -> tuple[DataLoader, DataLoader]:  # fmt: skip
    """Creates the loaders of the training and the validation split: (train_loader, val_loader).

    Args:
        dataset_type: one of DATASETS
        batch_size: images per batch, of all processes together
        resolution: side of the square images in pixels
        max_objects: largest number of objects in an image; not for 'images'
        min_objects: smallest number of objects in an image; for 'shapes' only
        train_size, val_size: largest number of images in each split (None: 10,000 for 'shapes', else all)
        seed: determines the order of the training images (see wrap_in_loader)
        num_workers, pin_memory: as in torch.utils.data.DataLoader
        rank, world_size: index of this process and number of processes (see wrap_in_loader)
        data_seed: determines which shapes are drawn
        data_dir: folder of a published data set or of pictures, or a file written by prepare()
        variant: of 'multi_dsprites', one of VARIANTS
        masks: pattern of the masks of 'images', see PictureFolder

    Raises DataError (a ValueError) for arguments that yield no images.
    """
    require(batch_size >= 1, f'batch_size must be at least 1, not {batch_size}')
    require(batch_size % world_size == 0, f'batch_size ({batch_size}) must be a multiple of the {world_size} processes')
    options |= dict(resolution=resolution, max_objects=max_objects, min_objects=min_objects)
    train = create_dataset(dataset_type, 'train', train_size, **options)
    val = create_dataset(dataset_type, 'val', val_size, **options)
    reason = f'batch_size ({batch_size}) must not exceed the {len(train)} training images; use a smaller --batch_size'
    require(batch_size <= len(train), reason)
    return (
        wrap_in_loader(train, batch_size, True, seed, num_workers, pin_memory, rank, world_size),
        wrap_in_loader(val, batch_size, False, pin_memory=pin_memory, rank=rank, world_size=world_size),
    )


# --- Command line ----------------------------------------------------------------------------


def plain_output() -> None:
    """Lets print() escape characters that the terminal's encoding does not have, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')


class HelpFormatter(argparse.HelpFormatter):
    """Adds the default in force to the help of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, '', argparse.SUPPRESS) and action.default is not False
        return action.help + (' (default: %(default)s)' if shown else '')


class Parser(argparse.ArgumentParser):
    """The parser of the three scripts: errors of one line, checked ranges, help with the defaults in force."""

    def __init__(self, script: str, description: str):
        super().__init__(
            prog=script, usage=f'python {script} [flags]', description=description, allow_abbrev=False,
            formatter_class=HelpFormatter,
        )  # fmt: skip
        self.group = self  # receives the next flag

    def error(self, message: str):
        message = re.sub(r'^argument (--\w+): must', r'\1 must', message)
        self.exit(2, f'{self.prog}: error: {message}\n')

    def section(self, title: str) -> None:
        """Starts a group: the flags that follow are listed under `title` in the help."""
        self.group = self.add_argument_group(title)

    def flag(
        self, name: str, type: type, default: object, help: str, low: float | None = None, high: float | None = None,
        choices: Sequence[str] | None = None, **options: object,
    ) -> None:  # fmt: skip
        """Adds --NAME of type int, float, str, Path or bool (a switch).

        A number must be from `low` to `high`; the defaults are those of an int64. `~` at the start of a Path is the
        home folder. `options` are those of argparse.ArgumentParser.add_argument().
        """
        if None not in (low, high):
            help += f', {low} to {high}'
        if type is bool:
            self.group.add_argument(f'--{name}', action='store_true', default=default, help=help, **options)
            return
        low, high = -(2**63) if low is None else low, 2**63 - 1 if high is None else high

        def convert(text: str):
            value = type(os.path.expanduser(text) if type is Path else text)
            if type in (int, float) and not low <= value <= high:
                raise argparse.ArgumentTypeError(f'must be at least {low} and at most {high}, not {text}')
            return value

        convert.__name__ = type.__name__  # argparse names the type if `text` is not a number
        options.setdefault('metavar', None if choices else {int: 'N', float: 'X', Path: 'PATH'}.get(type, 'TEXT'))
        self.group.add_argument(f'--{name}', type=convert, default=default, help=help, choices=choices, **options)

    def given(self, argv: Sequence[str] | None = None) -> dict[str, object]:
        """Returns the flags that stand on the command line, by name, without the defaults. Ignores --help."""
        argv = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ('-h', '--help')]
        unset = argparse.Namespace(**{action.dest: None for action in self._actions})
        return {name: value for name, value in vars(self.parse_known_args(argv, unset)[0]).items() if value is not None}

    def refuse(self, given: Iterable[str], names: Iterable[str], reason: str) -> None:
        """Ends the program if one of `names` is in `given`; `reason` completes '--NAME has no effect'."""
        for name in names:
            if name in given:
                self.error(f'--{name} has no effect {reason}; leave it out')


def add_data_flags(parser: Parser) -> None:
    """Adds the flags that describe the data, in a section of their own."""
    parser.section('data')
    parser.flag('dataset', str, 'shapes', 'source of the images: shapes are drawn, images are pictures of your own',
                choices=DATASETS)  # fmt: skip
    parser.flag('data_dir', Path, Path('data'), 'folder of the pictures (images) or of the published or prepared '
                'file; or a prepared .h5 file; not for shapes')  # fmt: skip
    parser.flag('masks', str, None, "images: file of the mask, relative to the folder of its picture, such as "
                "'../Annotations/{name}.png' (default: '{name}_mask.png' or '../masks/{name}.png')",
                metavar='PATTERN')  # fmt: skip
    parser.flag('variant', str, VARIANTS[0], 'multi_dsprites: the file to use', choices=VARIANTS)
    parser.flag('resolution', int, 64, 'side of the square images in pixels', *RESOLUTIONS)
    parser.flag('max_objects', int, 6, 'largest number of objects in an image, for shapes at most 16; published '
                'scenes with more are left out; not for images', 1)  # fmt: skip
    parser.flag('min_objects', int, 2, 'shapes: smallest number of objects in an image', 1)
    parser.flag('data_seed', int, 0, 'shapes: seed of the drawing', 0)


def data_options(args: argparse.Namespace) -> dict[str, object]:
    """Returns the arguments of create_dataset() that describe the data, as str, int and None only.

    `args` may be the flags that a run has saved: flags that the source does not use may be missing or unknown.
    """
    used = {name: value for name, value in vars(args).items() if name in ('resolution', *SOURCES[args.dataset].flags)}
    return {'dataset_type': args.dataset} | {n: str(v) if isinstance(v, Path) else v for n, v in used.items()}


def check_data_flags(parser: Parser, args: argparse.Namespace, given: Iterable[str]) -> None:
    """Refuses the flags of other sources than args.dataset."""
    unused = [name for name in DATA_FLAGS if name not in SOURCES[args.dataset].flags]
    parser.refuse(given, unused, f'with --dataset {args.dataset}')


def sample_sheet(dataset: Dataset, columns: int = 8, rows: int = 4, scale: int = 2) -> Image.Image:
    """Draws images and, below each row, their masks in colours; a pixel becomes scale x scale pixels."""
    from torchvision.utils import make_grid  # importing takes seconds

    columns = min(columns, len(dataset))
    rows = min(rows, len(dataset) // columns)
    batch = dataset.__getitems__(list(range(rows * columns)))
    drawn = [batch['image'] / 2 + 0.5]  # (rows * columns, 3, H, W)
    if 'mask' in batch:
        # Hues differ by the golden angle, so that adjacent labels have different colours.
        colours = torch.tensor([colorsys.hsv_to_rgb(label * 0.618 % 1, 0.65, 0.95) for label in range(256)])
        colours[0], colours[IGNORE] = 0.15, 1  # dark grey, white
        drawn.append(colours[batch['mask']].permute(0, 3, 1, 2))
    tiles = torch.stack([images.unflatten(0, (rows, columns)) for images in drawn], 1)  # (rows, 1 or 2, columns, ...)
    sheet = make_grid(tiles.flatten(0, 2), nrow=columns, pad_value=1).permute(1, 2, 0)  # (height, width, 3)
    image = Image.fromarray((sheet * 255).round().byte().numpy())
    return image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


def create_parser() -> Parser:
    parser = Parser(
        'dataset.py', 'Draw a sheet of sample images with their masks and count the objects; '
        'or, with --prepare, convert a published data set to the file that train.py reads.'
    )  # fmt: skip
    add_data_flags(parser)
    parser.section('sample sheet')
    parser.flag('num_images', int, 1000, 'number of images to load and count', 1)
    parser.flag('output', Path, Path('samples.png'), 'file of the sheet, a .png')
    parser.section('preparing')
    parser.flag('prepare', str, None, 'convert this data set to one .h5 file; downloads the published file if '
                '--data_dir has none', choices=tuple(PUBLISHED))  # fmt: skip
    parser.flag('output_dir', Path, None, 'folder of the .h5 file; then train with this folder as --data_dir '
                '(default: --data_dir)')  # fmt: skip
    parser.flag('url', str, None, 'address to download the published file from', metavar='URL')
    parser.flag('limit', int, None, 'stop after this many scenes and add the number to the name of the file. Training '
                'needs scenes of all splits: the first 70 %% of the source are train, the next 15 %% val, the rest '
                'test', 1)  # fmt: skip
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser()
    given = parser.given(argv)
    source = given.get('prepare', given.get('dataset', 'shapes'))
    parser.set_defaults(dataset=source, resolution=SOURCES[source].resolution)
    args = parser.parse_args(argv)
    if args.prepare:
        parser.refuse(given, ('dataset', 'num_images', 'output'), f'with --prepare {source}')
    else:
        parser.refuse(given, ('output_dir', 'url', 'limit'), 'without --prepare')
    check_data_flags(parser, args, given)
    return args


def preview(args: argparse.Namespace) -> None:
    """Draws the sheet of samples, and counts objects and images/s."""
    savable = args.output.suffix.lower() == '.png' and args.output.parent.is_dir()
    require(savable, f'--output {args.output} must be a .png file in an existing folder')
    start = time.perf_counter()
    dataset = create_dataset(split='train', size=args.num_images, **data_options(args))
    seconds = time.perf_counter() - start
    batches = wrap_in_loader(dataset, min(32, len(dataset)), shuffle=False)
    masks = (mask for batch in batches for mask in batch.get('mask', ()) if (mask != IGNORE).any())
    counts = Counter(len(set(mask.unique().tolist()) - {0, IGNORE}) for mask in masks)
    if counts:
        print('objects  images')
    for number, images in sorted(counts.items()):
        print(f'{number:7d}  {images:6d}  {"#" * round(60 * images / counts.total())}')
    print(dataset)
    print(f'{"drawing" if args.dataset == "shapes" else "reading"} {len(dataset) / seconds:,.0f} images/s')
    metadata = PngInfo()
    metadata.add_text('Software', CREATOR)
    sample_sheet(dataset).save(args.output, pnginfo=metadata)
    print(f'samples{" and masks" if counts else ""}: {args.output}')


def main(args: argparse.Namespace) -> int:
    """Returns the exit status: 2 after a user's mistake and 130 after Ctrl-C, with one line on stderr."""
    names = ('data_dir', 'resolution', 'max_objects', 'variant', 'limit', 'url', 'output_dir')
    try:
        if args.prepare:
            prepare(args.prepare, **{name: getattr(args, name) for name in names})
        else:
            preview(args)
    except (DataError, OSError) as error:
        print(f'dataset.py: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'interrupted{"; the same command continues a download" if args.prepare else ""}', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plain_output()
    sys.exit(main(parse_args()))
