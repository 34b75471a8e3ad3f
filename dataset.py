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
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import math
import re
import shutil
import struct
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from shlex import quote

import h5py
import numpy as np
import psutil
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
IGNORE = 255  # the label of pixels that are left out of every score
RESOLUTIONS = (16, 256)  # smallest and largest
MANY_LABELS = 50  # in a mask: more are reported
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


def to_batch(images: np.ndarray, labels: np.ndarray | None = None) -> dict[str, Tensor]:
    """Converts uint8 images [B, H, W, 3] and labels [B, H, W] to a batch (see the module docstring)."""
    image = torch.from_numpy(images).permute(0, 3, 1, 2).float()  # (B, 3, H, W), channels_last in memory
    batch = {'image': image.mul_(2 / 255).sub_(1)}
    if labels is not None:
        batch['mask'] = torch.from_numpy(labels).long()
    return batch


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
    least MIN_VISIBLE of the area of each stays visible. Image i is a function of (seed, split, i): it does not depend
    on `size`, and no two splits share an image. All images are drawn in the constructor and kept in memory.
    Raises DataError for an unknown split, and for a size, resolution, number of objects or seed out of range.
    """

    # The size of an object is the radius of the disc of equal area, as a fraction of the image side.
    MIN_SIZE, MAX_SIZE = 0.09, 0.17
    MIN_VISIBLE = 0.6
    MIN_RADIUS = 1.3  # pixels; a smaller object may cover no pixel centre
    MAX_OBJECTS = 16

    def __init__(
        self, split: str = 'train', size: int = SHAPES_SIZE, resolution: int = 64,
        max_objects: int = 6, min_objects: int = 2, seed: int = 0,
    ):  # fmt: skip
        low, high = RESOLUTIONS
        require(split in SPLITS, f'split must be one of {", ".join(SPLITS)}, not {split!r}')
        require(size >= 1, f'the number of images must be at least 1, not {size}')
        require(low <= resolution <= high, f'the resolution of shapes must be from {low} to {high}, not {resolution}')
        limits = f'1 <= min_objects <= max_objects <= {self.MAX_OBJECTS}'
        valid = 1 <= min_objects <= max_objects <= self.MAX_OBJECTS
        require(valid, f'min_objects ({min_objects}) and max_objects ({max_objects}) must satisfy {limits}')
        require(seed >= 0, f'the seed of shapes must not be negative, not {seed}')
        self.split, self.resolution, self.seed = split, resolution, seed
        self.min_objects, self.max_objects = min_objects, max_objects
        self.fingerprint = digest('shapes', resolution, max_objects, min_objects, seed)
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


VARIANTS = ('colored_on_grayscale', 'colored_on_colored', 'binarized')  # of multi_dsprites
PUBLISHED = {
    'clevr6': Published('clevr_with_masks/clevr_with_masks_train.tfrecords', 10.5, 240, 320, window=CLEVR_WINDOW),
    'multi_dsprites': Published('multi_dsprites/multi_dsprites_{}.tfrecords', None, 64, 64, entities_last=True),
    'tetrominoes': Published('tetrominoes/tetrominoes_train.tfrecords', 0.3, 35, 35),
    'objects_room': Published('objects_room/objects_room_train.tfrecords', 7, 64, 64, backgrounds=4),
}
MAX_RECORDS = 100_000  # later records of a source are not used
SHARES = (0.7, 0.15)  # train, val; the rest is test. The paper trains on the first 70,000 records of CLEVR


@dataclass
class Scene:
    image: np.ndarray  # uint8 [h, w, 3]
    labels: np.ndarray | None  # uint8 [resolution, resolution]
    num_objects: int
    record: int  # number within the source
    split: int = 0  # index into SPLITS, if the source itself has splits


def read_records(path: Path) -> Iterator[bytes]:
    """Yields the payload of each record of a TFRecord file, GZIP or plain. Raises DataError for a damaged file."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c  # importing takes 0.5 s

    number, again = 0, 'delete the file and fetch it again'
    with open(path, 'rb') as file:
        zipped = file.read(2) == b'\x1f\x8b'
    with (gzip.open if zipped else open)(path, 'rb') as file:
        try:
            while header := file.read(12):
                length, checksum = struct.unpack('<QI', header)
                if masked_crc32c(header[:8]) != checksum:
                    raise zlib.error('its length does not match its checksum')
                payload = file.read(length)
                if len(payload) < length or len(file.read(4)) < 4:  # its checksum would take a second per megabyte
                    raise EOFError
                yield payload
                number += 1
        except (EOFError, struct.error) as error:
            raise DataError(f'{path} ends within record {number}: it is not complete; {again}') from error
        except (zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f'{path}: record {number} is damaged: {error}; {again}') from error
    require(number > 0, f'{path} holds no records; {again}')


# tf.train.Example, except that a BytesList stays serialised: one object instead of a million one-byte strings.
EXAMPLE = """
name: "example.proto" package: "published" syntax: "proto3"
message_type { name: "FloatList" field { name: "value" number: 1 type: TYPE_FLOAT label: LABEL_REPEATED } }
message_type { name: "Feature" field { name: "bytes_list" number: 1 type: TYPE_BYTES }
  field { name: "float_list" number: 2 type: TYPE_MESSAGE type_name: ".published.FloatList" } }
message_type { name: "Entry" field { name: "key" number: 1 type: TYPE_STRING }
  field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".published.Feature" } }
message_type { name: "Features"
  field { name: "feature" number: 1 type: TYPE_MESSAGE label: LABEL_REPEATED type_name: ".published.Entry" } }
message_type { name: "Example"
  field { name: "features" number: 1 type: TYPE_MESSAGE type_name: ".published.Features" } }
"""
POOL = descriptor_pool.DescriptorPool()
POOL.Add(text_format.Parse(EXAMPLE, descriptor_pb2.FileDescriptorProto()))
Example = message_factory.GetMessageClass(POOL.FindMessageTypeByName('published.Example'))


def bytes_of(features: dict, name: str, pixels: int) -> np.ndarray:
    """Returns the one-byte strings of a feature, uint8 [n * pixels]. Each is serialised as 0A 01 and the byte."""
    require(name in features, f'it has no {name!r}')
    wire = np.frombuffer(features[name].bytes_list, np.uint8)
    valid = len(wire) > 0 and len(wire) % (3 * pixels) == 0 and tuple(wire[:2]) == (10, 1)
    require(valid, f'its {name!r} does not hold one byte for each of {pixels} pixels')
    return wire[2::3]


def decode_record(number: int, payload: bytes, source: Published, resolution: int) -> Scene:
    """Decodes record `number`. Raises DataError for one that does not hold what `source` says."""
    try:
        features = {entry.key: entry.value for entry in Example.FromString(payload).features.feature}
    except DecodeError as error:
        raise DataError('it is damaged or not a tf.train.Example; fetch the file again') from error
    height, width = source.height, source.width
    image = bytes_of(features, 'image', height * width).reshape(height, width, -1)[source.window]  # (h, w, C)
    require(image.shape[2] in (1, 3), f"its 'image' has {image.shape[2]} channels, not 1 or 3")
    masks = bytes_of(features, 'mask', height * width)
    if source.entities_last:
        masks = masks.reshape(height, width, -1).transpose(2, 0, 1)  # (N, H, W)
    else:
        masks = masks.reshape(-1, height, width)
    # Labels are resized to the nearest pixel, before argmax: this leaves fewer pixels to take it of.
    rows, columns = (((np.arange(resolution) + 0.5) * side / resolution).astype(int) for side in image.shape[:2])
    strongest = masks[(slice(None), *source.window)][:, rows[:, None], columns].argmax(axis=0)
    labels = np.maximum(strongest - (source.backgrounds - 1), 0).astype(np.uint8)
    if 'visibility' in features:
        visible = np.array(features['visibility'].float_list.value) > 0
    else:
        visible = masks.any(axis=(1, 2))  # a mask with a pixel is an object
    num_objects = int(visible[source.backgrounds :].sum())
    return Scene(np.repeat(image, 3 // image.shape[2], axis=2), labels, num_objects, number)


def read_published(path: Path, source: Published, resolution: int) -> Iterator[Scene]:
    """Yields the scenes of a published file. Raises DataError, with the number of the record, for a damaged one."""
    for number, payload in enumerate(itertools.islice(read_records(path), MAX_RECORDS)):
        try:
            scene = decode_record(number, payload, source, resolution)
        except DataError as error:
            raise DataError(f'{path}: record {number} is not as expected: {error}') from error
        yield scene


def read_clevr_v1(folder: Path) -> Iterator[Scene]:
    """Yields the scenes of a CLEVR_v1.0 folder, without masks. Half of its val split becomes test. Raises DataError."""
    scenes = []  # picture, number of objects, split
    for name in ('train', 'val'):
        file = folder / 'scenes' / f'CLEVR_{name}_scenes.json'
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text())['scenes']
            listed = [(folder / 'images' / name / s['image_filename'], len(s['objects'])) for s in found]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{file} is not a list of CLEVR scenes ({type(error).__name__}: {error})') from error
        require(len(listed) > 0, f'{file} lists no scenes; fetch the file again')
        missing = [picture for picture, _ in listed if not picture.is_file()]
        if missing:
            count = f'{len(missing)} of the {len(listed)} pictures that {file} names are missing'
            raise DataError(f'{count}, the first is {missing[0]}; fetch them again')
        num_val = (len(listed) + 1) // 2
        splits = [0] * len(listed) if name == 'train' else [1] * num_val + [2] * (len(listed) - num_val)
        scenes += [(*scene, split) for scene, split in zip(listed, splits, strict=True)]
    require(len(scenes) > 0, f'{folder / "scenes"} has neither CLEVR_train_scenes.json nor CLEVR_val_scenes.json')
    for number, (picture, num_objects, split) in enumerate(scenes):
        yield Scene(crop_clevr(picture), None, num_objects, number, split)


def crop_clevr(path: Path) -> np.ndarray:
    """Reads a picture and crops it as the paper crops CLEVR's 320x240 images: uint8 [192, 192, 3]. Raises DataError."""
    image, rows = open_picture(path), CLEVR_WINDOW[0]
    if image.width <= image.height:  # it is cropped already
        return np.asarray(ImageOps.fit(image, (192, 192), Image.Resampling.BILINEAR))
    if image.size != (320, 240):  # such as the 480x320 of CLEVR_v1.0
        image = image.resize((round(image.width * 240 / image.height), 240), Image.Resampling.BILINEAR)
    left = (image.width - (rows.stop - rows.start)) // 2
    return np.asarray(image)[rows, left : left + rows.stop - rows.start]


# --- Pictures --------------------------------------------------------------------------------

PICTURES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff', '.gif')
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises


def open_picture(path: Path) -> Image.Image:
    """Opens a picture as 8-bit RGB: upright by its EXIF orientation, transparent parts on white. Raises DataError."""
    try:
        with Image.open(path) as file:
            sixteen_bits = 'RGB;16' in str(file.tile)  # PIL keeps the upper 8 bits
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in 'IF':
                image = Image.fromarray(to_8_bits(np.asarray(image)))
            if image.has_transparency_data:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            image = image.convert('RGB')
            if sixteen_bits and max(high for _, high in image.getextrema()) < 16:
                raise ValueError('it uses at most 12 bits of 16-bit channels; convert it to 8 bits')
            return image
    except UNREADABLE as error:
        raise DataError(f'{path} cannot be read as a picture: {error}') from error


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scales pixels to uint8: the first of 1 (floats only), 255, 4095 and 65535 that none exceeds becomes 255."""
    low, high = values.min(), values.max()
    full = next((full for full in (1, 255, 4095, 65535)[values.dtype.kind != 'f' :] if high <= full), None)
    if full is None or low < 0:
        raise ValueError(f'its values are from {low:g} to {high:g}; convert it to 8 bits')
    return (values * (255 / full) + 0.5).astype(np.uint8)


def read_picture(path: Path, resolution: int, dataset_type: str = 'images') -> np.ndarray:
    """Reads a picture, crops and resizes it like the images of `dataset_type`: uint8 [R, R, 3]. Raises DataError."""
    if dataset_type == 'clevr6':
        return resize([crop_clevr(path)], resolution)[0]
    return np.asarray(ImageOps.fit(open_picture(path), (resolution, resolution), Image.Resampling.BILINEAR))


def read_mask(path: Path, picture: Path, size: tuple[int, int], resolution: int) -> np.ndarray:
    """Reads the mask of a picture of `size` (width, height), cropped in the same way: [R, R]. Raises DataError."""
    try:
        with Image.open(path) as file:
            mask, mode = ImageOps.exif_transpose(file), f'{file.format} mode {file.mode}'
    except UNREADABLE as error:
        raise DataError(f'mask {path} cannot be read: {error}; save it again') from error
    labels = mask.mode in ('1', 'L', 'P') and not mode.startswith('JPEG')
    convert = "convert it with Image.fromarray(labels.astype('uint8')).save('NAME_mask.png')"
    require(labels, f'mask {path} is a {mode}, not a PNG with one 8-bit channel of labels; {convert}')
    width, height = size
    same = abs(mask.width * height - mask.height * width) <= max(*size, *mask.size)  # sides may be rounded by a pixel
    names = f'mask {path} ({mask.width}x{mask.height}) and picture {picture} ({width}x{height})'
    require(same, f'{names} differ in aspect ratio; crop both in the same way')
    return np.asarray(ImageOps.fit(mask, (resolution, resolution), Image.Resampling.NEAREST), np.uint8)


def find_pictures(folder: str | os.PathLike) -> list[Path]:
    """Lists the pictures below a folder, without masks, in natural order: frame2 before frame10."""
    return list(find_masks(Path(folder))[0])


def find_masks(folder: Path, mask_dir: Path | None = None) -> tuple[dict[Path, Path | None], list[Path]]:
    """Returns the mask of each picture below a folder (None: it has none), and the masks that have no picture.

    A mask lies beside its picture a/NAME.jpg as a/NAME_mask.png, or has the same name in a folder `masks`
    beside a folder `images`. Letter case does not matter. `mask_dir` replaces both: mask_dir/a/NAME.png.
    """
    if mask_dir is None and folder.name.lower() == 'images' and folder.is_dir():
        mask_dir = next((path for path in folder.parent.iterdir() if path.name.lower() == 'masks'), None)
    files = walk(folder, leave_out=mask_dir)
    folders = {str(parent) for key in files.values() for parent in PurePosixPath(key).parents}
    pictures, masks = {}, {}  # the key of each picture, and for each mask the key of its picture
    for path, key in files.items():
        parallel = re.match('(|.*/)masks/', key)
        if parallel and f'{parallel[1]}images' in folders:
            masks[path] = f'{parallel[1]}images/{key[parallel.end() :]}'
        elif key.endswith('_mask'):
            masks[path] = key
        else:
            pictures[path] = key
    by_key: dict[str, Path] = {}
    for mask, key in (walk(mask_dir) if mask_dir else masks).items():
        other = by_key.setdefault(key.removesuffix('_mask'), mask)
        require(other == mask, f'{other} and {mask} are masks of the same picture; remove one of them')
    # Below mask_dir, the folder `images` may be missing.
    shorter = {key: re.sub('(^|/)images/', r'\1', key) for key in pictures.values()}
    mask_of = {path: by_key.get(key) or by_key.get(shorter[key]) for path, key in pictures.items()}
    return mask_of, sorted(set(by_key.values()) - set(mask_of.values()))


def masks_by_name(folder: Path, pictures: list[Path]) -> list[Path]:
    """The pictures that seem to be masks: they are called so, or are the PNG of a name that another picture has."""
    keys = {path: path.relative_to(folder).with_suffix('').as_posix().lower() for path in pictures}
    counts = Counter(keys.values())
    called = re.compile('(^|[^a-z])(masks?|labels?|seg[a-z]*|gt)([^a-z]|$)')
    return [p for p, key in keys.items() if called.search(key) or (counts[key] > 1 and p.suffix.lower() == '.png')]


def walk(folder: Path, leave_out: Path | None = None) -> dict[Path, str]:
    """Returns picture files in natural order, each with its path relative to `folder` in lower case, without ending.

    Follows symbolic links, visits a folder once, and skips hidden names.
    """
    found, visited = [], {os.path.realpath(leave_out)} if leave_out else set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        found += [Path(parent, name) for name in names if not name.startswith('.')]
    found = sorted((path for path in found if path.suffix.lower() in PICTURES and path.is_file()), key=natural_key)
    return {path: path.relative_to(folder).with_suffix('').as_posix().lower() for path in found}


def natural_key(path: Path) -> list[str | int]:
    """A sort key that compares the numbers in a path by value: frame2 before frame10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split('([0-9]+)', str(path)))]


def split_by_name(names: dict[Path, str]) -> dict[str, list[Path]]:
    """Splits 3 or more files by a hash of their names; each split is in the order of the hash."""
    hashes = {path: int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16) / 2**256 for path, name in names.items()}
    order = sorted(hashes, key=hashes.get)
    num_val = min(max(sum(value < 0.1 for value in hashes.values()), 1), len(order) - 2)
    num_test = min(max(sum(value >= 0.9 for value in hashes.values()), 1), len(order) - num_val - 1)
    end = len(order) - num_test
    return {'val': order[:num_val], 'train': order[num_val:end], 'test': order[end:]}


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

    `find_masks` says which file is the mask of a picture. A mask has one channel of 8 bits (PIL modes 1, L and P) and
    the aspect ratio of its picture. One that cannot be used is reported, and its picture is used without it. If other
    pictures have a mask, a picture without one has the label IGNORE everywhere.

    The split of a picture depends on a hash of its path relative to the folder: 80 % are for training, 10 % each for
    validation and test. Adding or removing a picture moves no other one, except in a small folder: a split that would
    be empty takes the picture with the nearest hash. A picture that cannot be read is reported and skipped.
    Raises DataError for a missing folder, fewer than 3 pictures, two masks of one picture, and too little memory.
    """

    def __init__(
        self, folder: str | os.PathLike, split: str, size: int | None = None, resolution: int = 128,
        mask_dir: str | os.PathLike | None = None,
    ):  # fmt: skip
        folder, mask_dir, self.resolution = Path(folder), Path(mask_dir) if mask_dir else None, resolution
        for flag, path in (('data_dir', folder), ('mask_dir', mask_dir)):
            require(path is None or path.is_dir(), f'no folder {path}; --{flag} must name an existing folder')
        if mask_dir and mask_dir.samefile(folder):  # masks beside the pictures
            mask_dir = None
        mask_of, alone = find_masks(folder, mask_dir)
        reason = f'no mask in {mask_dir} has the name of a picture in {folder}'
        require(mask_dir is None or any(mask_of.values()), f'{reason}; rename the masks or leave out --mask_dir')
        formats = ', '.join(PICTURES)
        require(len(mask_of) >= 3, f'{folder} holds {len(mask_of)} pictures ({formats}); at least 3 are needed')
        names = {path: path.relative_to(folder).as_posix() for path in mask_of}
        sizes = {file: file.stat().st_size for pair in mask_of.items() for file in pair if file}  # bytes
        files = [(name, sizes[path], sizes.get(mask_of[path])) for path, name in names.items()]
        self.fingerprint = digest(*sorted(files))
        paths = split_by_name(names)[split][:size]
        fits = len(paths) * resolution**2 * 4 <= psutil.virtual_memory().available / 2
        require(fits, f'{len(paths)} pictures do not fit in memory: use a smaller --resolution or --train_size')
        self.problems = []
        if split == 'train':  # report masks without a picture once, not for each split
            self.problems += [f'mask {mask} has no picture; give it the name of its picture' for mask in alone]
            if not any(mask_of.values()) and (alike := masks_by_name(folder, list(mask_of))):
                remedy = 'give their folder as --mask_dir, or call them NAME_mask.png'
                self.problems.append(f'{len(alike)} pictures such as {alike[0]} may be masks; if so, {remedy}')
        with ThreadPool() as pool:  # PIL decodes without holding the interpreter lock
            read = pool.imap(lambda path: self._read(path, mask_of[path]), paths)
            read = tqdm(read, f'reading {split}', len(paths), unit=' pictures', delay=2, disable=None, leave=False)
            found = [pair for pair in read if pair is not None]
        reason = 'delete or repair them, and other pictures take their place'
        require(len(found) > 0, f'none of the {len(paths)} {split} pictures in {folder} can be read; {reason}')
        images, labels = zip(*found, strict=True)
        self.images = np.stack(images)
        self.num_masks = sum(mask is not None for mask in labels)
        if self.num_masks:
            ignored = np.full((resolution, resolution), IGNORE, np.uint8)
            self.labels = np.stack([ignored if mask is None else mask for mask in labels])
            if not (self.labels % IGNORE).any():
                remedy = f'number objects from 1: 0 is the background, and {IGNORE} marks pixels that no score counts'
                self.problems.append(f'no {split} mask has an object; {remedy}')
            counts = [np.count_nonzero(np.bincount(mask.ravel())) for mask in labels if mask is not None]
            if smoothed := sum(count > MANY_LABELS for count in counts):
                remedy = 'if they were resized, do it again with Image.Resampling.NEAREST'
                self.problems.append(f'{smoothed} {split} masks have more than {MANY_LABELS} labels; {remedy}')
        report(self.problems)

    def __str__(self) -> str:
        return f'{super().__str__()}, {self.num_masks:,} with a mask'

    def _read(self, path: Path, mask: Path | None) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Returns the image [R, R, 3] and labels [R, R] of a picture, or None for a picture that cannot be read."""
        try:
            picture, labels = open_picture(path), None
        except DataError as error:
            print(f'skipped: {error}', file=sys.stderr)
            return None
        try:
            if mask is not None:
                labels = read_mask(mask, path, picture.size, self.resolution)
        except DataError as error:
            self.problems.append(f'{error} (the picture is used without it)')
        return np.asarray(ImageOps.fit(picture, (self.resolution,) * 2, Image.Resampling.BILINEAR)), labels


# --- Prepared files --------------------------------------------------------------------------


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
    folder = ' or the folder CLEVR_v1.0 (no masks, so no segmentation score)' if dataset == 'clevr6' else ''
    flag = f' --variant {variant}' if dataset == 'multi_dsprites' else ''
    raise DataError(
        f'{data_dir} has no {dataset}: it needs {file.name}{size}{folder}.\n'
        f'  to download and prepare it: python dataset.py --prepare {dataset}{flag} --data_dir {quote(str(data_dir))}\n'
        f'  to download it yourself: {BUCKET}/{published}'
    )


def download(url: str, path: Path, attempts: int = 5) -> None:
    """Downloads `url` to `path`. Raises DataError if this fails; the next call continues from the file `path`.part."""
    part = path.with_name(f'{path.name}.part')
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(attempts):
        done = part.stat().st_size if part.exists() else 0  # bytes
        try:
            request = urllib.request.Request(url, headers={'Range': f'bytes={done}-'} if done else {})
            with urllib.request.urlopen(request, timeout=30) as response:
                if response.status != 206:
                    done = 0  # the server sends the whole file
                left = response.headers.get('Content-Length')
                total = done + int(left) if left else None
                options = dict(initial=done, total=total, desc=path.name, disable=None)
                with open(part, 'ab' if done else 'wb') as file, tqdm.wrapattr(response, 'read', **options) as stream:
                    shutil.copyfileobj(stream, file, 1 << 20)
                    done = file.tell()
            if total is None or done == total:
                os.replace(part, path)
                return
            reason = 'the connection was closed'
        except (ValueError, urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            code, reason = getattr(error, 'code', 0), getattr(error, 'reason', error)
            if code == 416:  # nothing lies beyond `done`: `part` is of another file
                part.unlink(missing_ok=True)
            elif isinstance(error, ValueError) or 400 <= code < 500:
                raise DataError(f'{url} cannot be downloaded: {error}; try another --url') from error
        time.sleep(attempt)
    done = part.stat().st_size / 1e6 if part.exists() else 0
    raise DataError(f'{url}: {reason} after {done:,.1f} MB; run the same command again to continue from there')


class FileForHDF5(io.FileIO):
    """Keeps the first error of writing instead of raising it: HDF5 would print it many times and crash at exit."""

    error: OSError | None = None

    def write(self, data) -> int:
        left = memoryview(data).cast('B')
        try:
            while len(left) and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size

    def flush(self) -> None:
        """Nothing is buffered; h5py calls it."""

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error


def prepare(
    dataset: str, data_dir: str | os.PathLike, resolution: int, max_objects: int = 6, variant: str = VARIANTS[0],
    limit: int | None = None, url: str | None = None, fetch: bool = True, output_dir: str | os.PathLike | None = None,
) -> Path:  # fmt: skip
    """Converts a published data set to one HDF5 file and returns its path. The file gets its name when it is complete.

    The first arguments are those of create_dataloader(); scenes with more than `max_objects` are left out.

    Args:
        limit: number of scenes after which to stop; the file has a name of its own, which contains the number
        url, fetch: address to download a missing source from (None: the published one), and whether to do so
        output_dir: folder of the prepared file (None: `data_dir`)

    The file holds `image` uint8 [N, R, R, 3] (resized bilinearly) and `mask` uint8 [N, R, R] (to the nearest; if the
    source has masks), and `num_objects`, `record` (number in the source) and `split` (0 train, 1 val, 2 test), all [N].
    The split depends on the number of the record only: of the first 100,000 records of the source, 70 % are train, the
    next 15 % val, the rest test.

    Raises DataError for a source that is missing, damaged, or without a scene of at most `max_objects`, and for a
    folder that cannot be written to.
    """
    source, data_dir = PUBLISHED[dataset], Path(data_dir)
    raw = find_source(dataset, data_dir, variant, url, fetch)
    require(os.access(raw, os.R_OK), f'{raw} cannot be read; check its permissions')
    scenes = read_published(raw, source, resolution) if raw.is_file() else read_clevr_v1(raw)
    path = prepared_path(dataset, Path(output_dir or data_dir), resolution, max_objects, variant, limit)
    part = path.with_name(f'.{path.name}.{os.getpid()}')  # differs from that of any other process
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, raw)
        with FileForHDF5(part, 'w+') as output:
            with h5py.File(output, 'w') as file:
                file.attrs.update(dataset=dataset, variant=variant, resolution=resolution, max_objects=max_objects)
                seen = write_scenes(file, scenes, resolution, max_objects, limit, check=output.raise_error)
                if raw.is_file():
                    ends = np.cumsum(SHARES) * (seen if limit is None else count_records(raw, source))
                    file['split'][:] = np.searchsorted(ends, file['record'][:], side='right')
            output.raise_error()
            os.fsync(output.fileno())
        os.replace(part, path)
    except OSError as error:  # the text of h5py has many lines
        reason = f'{path} cannot be written: the folder is read-only or the disk is full'
        command = f'python dataset.py --prepare {dataset} --data_dir {quote(str(data_dir))} --output_dir FOLDER'
        raise DataError(f'{reason}; prepare it in another folder: {command}') from error
    finally:
        if part.exists():
            part.unlink()
    return path


def remove_leftovers(folder: Path, raw: Path) -> None:
    """Deletes unfinished files of preparations and downloads that were killed."""
    for path in (*folder.glob('.*.h5.*'), raw.with_name(f'{raw.name}.part')):
        process = path.suffix[1:]
        if process == 'part' or (process.isdecimal() and not psutil.pid_exists(int(process))):
            with contextlib.suppress(OSError):
                path.unlink()


def count_records(path: Path, source: Published) -> int:
    """Returns the number of records, at most MAX_RECORDS. A file of the published size is not read: it has all."""
    if source.gigabytes and path.stat().st_size > 0.9e9 * source.gigabytes:
        return MAX_RECORDS
    records = itertools.islice(read_records(path), MAX_RECORDS)
    return sum(1 for _ in tqdm(records, 'counting', unit=' records', delay=2, disable=None, leave=False))


def write_scenes(
    file: h5py.File, scenes: Iterator[Scene], size: int, max_objects: int, limit: int | None, check: Callable[[], None]
) -> int:
    """Writes the arrays described in prepare(). Returns the number of scenes read. Raises DataError if none is kept.

    `check` is called after every 64 scenes, and may raise.
    """
    seen = 0

    def within_max_objects() -> Iterator[Scene]:
        nonlocal seen
        for scene in tqdm(scenes, 'preparing', unit=' scenes', disable=None):
            seen += 1
            if scene.num_objects <= max_objects:
                yield scene

    kept = itertools.islice(within_max_objects(), limit)
    while batch := list(itertools.islice(kept, 64)):
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
        check()
    require('image' in file, f'none of {seen} scenes has at most {max_objects} objects')
    file.attrs['scenes_read'] = seen
    return seen


def resize(images: list[np.ndarray], size: int) -> np.ndarray:
    """Resizes uint8 images of one shape [h, w, 3] to [B, size, size, 3], as the paper's tf.image.resize (bilinear)."""
    stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (B, 3, h, w)
    if stack.shape[-2:] != (size, size):
        stack = F.interpolate(stack.float(), (size, size), mode='bilinear').round().byte()
    return stack.permute(0, 2, 3, 1).numpy()


class PreparedDataset(ImagesInMemory):
    """One split of a file written by prepare(): in memory if it fits, else read batch by batch. Raises DataError."""

    def __init__(self, path: str | os.PathLike, split: str, size: int | None = None, in_memory: bool | None = None):
        self.path = Path(path)
        require(self.path.is_file(), f'no file {path}')
        try:
            with h5py.File(path) as file:
                self.resolution, self.max_objects = int(file.attrs['resolution']), int(file.attrs['max_objects'])
                self.variant = file.attrs['variant']
                self.dataset = file.attrs.get('dataset')  # None: prepared by an older version
                self.names = ('image', 'mask') if 'mask' in file else ('image',)
                self.fingerprint = digest(*(file[name][:].tobytes() for name in ('record', 'split', 'num_objects')))
                self.rows = np.flatnonzero(file['split'][:] == SPLITS.index(split))[:size]
                count = len(self.rows)
                require(count > 0, f'{path} has no {split} images; prepare more scenes (--limit, --max_objects)')
                fits = count * self.resolution**2 * 4 < psutil.virtual_memory().available / 2
                self.in_memory = fits if in_memory is None else in_memory
                if self.in_memory:
                    piece = slice(self.rows[0], self.rows[-1] + 1)  # a split is nearly contiguous
                    self.images, *labels = (file[name][piece][self.rows - piece.start] for name in self.names)
                    self.labels = labels[0] if labels else None
        except (OSError, KeyError) as error:
            raise DataError(f'{path} is damaged or was not prepared here; delete it and prepare it again') from error

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return super().__str__() if self.in_memory else f'{len(self):,} images, read from {self.path}'

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        if self.in_memory:
            return super().__getitems__(indices)
        with h5py.File(self.path) as file:  # an open file cannot be shared with worker processes
            return to_batch(*(np.stack([file[name][row] for row in self.rows[indices]]) for name in self.names))


# --- One interface for all sources -----------------------------------------------------------


def create_dataset(
    dataset_type: str, split: str, size: int | None, resolution: int = 64, max_objects: int = 6, min_objects: int = 2,
    seed: int = 0, data_dir: str | os.PathLike = 'data', variant: str = VARIANTS[0],
    mask_dir: str | os.PathLike | None = None,
) -> Dataset:  # fmt: skip
    """Creates one split ('train', 'val' or 'test') of a source with at most `size` images (None: all).

    The other arguments are those of create_dataloader(). A published data set that is in `data_dir` as it was
    published is prepared first. The `fingerprint` of the result changes if the source does. Raises DataError.
    """
    data_dir = Path(data_dir)
    require(split in SPLITS, f'split must be one of {", ".join(SPLITS)}, not {split!r}')
    require(dataset_type in DATASETS, f'dataset_type must be one of {", ".join(DATASETS)}, not {dataset_type!r}')
    require(mask_dir is None or dataset_type == 'images', f"mask_dir is for 'images' only, not {dataset_type!r}")
    if dataset_type == 'shapes':
        return ShapesDataset(split, SHAPES_SIZE if size is None else size, resolution, max_objects, min_objects, seed)
    if dataset_type == 'images':
        return PictureFolder(data_dir, split, size, resolution, mask_dir)
    path = data_dir
    if path.suffix != '.h5':
        path = prepared_path(dataset_type, data_dir, resolution, max_objects, variant, limit=None)
        if not path.exists():
            prepare(dataset_type, data_dir, resolution, max_objects, variant, fetch=False)
    dataset = PreparedDataset(path, split, size)
    wanted = dict(dataset=dataset_type, variant=variant, resolution=resolution, max_objects=max_objects)
    for name, value in wanted.items():
        found = getattr(dataset, name)
        require(found in (value, None), f'{path} was prepared with {name} {found}, not {value}; use --{name} {found}')
    return dataset


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
    min_objects: int = 2, train_size: int | None = None, val_size: int = 320, seed: int = 0, data_seed: int = 0,
    num_workers: int = 0, pin_memory: bool = False, data_dir: str | os.PathLike = 'data', variant: str = VARIANTS[0],
    rank: int = 0, world_size: int = 1, mask_dir: str | os.PathLike | None = None,
) -> tuple[DataLoader, DataLoader]:  # fmt: skip
    """Creates the loaders of the training and the validation split: (train_loader, val_loader).

    Args:
        dataset_type: one of DATASETS
        batch_size: images per batch, summed over all processes
        resolution: side of the square images in pixels
        max_objects: largest number of objects in an image; not for 'images'
        min_objects: smallest number of objects in an image; for 'shapes' only
        train_size, val_size: largest number of images in each split (None: 10,000 for 'shapes', else all)
        seed: determines the order of the training images (see wrap_in_loader)
        data_seed: determines which shapes are drawn
        num_workers, pin_memory: as in torch.utils.data.DataLoader
        data_dir: folder of a published data set or of pictures, or a file written by prepare()
        variant: of 'multi_dsprites', one of VARIANTS
        rank, world_size: index of this process and number of processes (see wrap_in_loader)
        mask_dir: folder of the masks of 'images', if they are not where PictureFolder finds them

    Raises DataError (a ValueError) for arguments that yield no images.
    """
    require(batch_size >= 1, f'batch_size must be at least 1, not {batch_size}')
    require(batch_size % world_size == 0, f'batch_size ({batch_size}) must be a multiple of the {world_size} processes')
    options = (resolution, max_objects, min_objects, data_seed, data_dir, variant, mask_dir)
    train = create_dataset(dataset_type, 'train', train_size, *options)
    val = create_dataset(dataset_type, 'val', val_size, *options)
    reason = f'batch_size ({batch_size}) must not exceed the {len(train)} training images; use a smaller --batch_size'
    require(batch_size <= len(train), reason)
    return (
        wrap_in_loader(train, batch_size, True, seed, num_workers, pin_memory, rank, world_size),
        wrap_in_loader(val, batch_size, False, pin_memory=pin_memory, rank=rank, world_size=world_size),
    )


# --- Command line ----------------------------------------------------------------------------

# The flags that each source uses, besides --dataset and --resolution.
SOURCE_FLAGS = dict.fromkeys(PUBLISHED, ('data_dir', 'max_objects')) | {
    'shapes': ('max_objects', 'min_objects', 'data_seed'),
    'multi_dsprites': ('data_dir', 'max_objects', 'variant'),
    'images': ('data_dir', 'mask_dir'),
}


def sample_sheet(dataset: Dataset, columns: int = 8, rows: int = 4, scale: int = 2) -> Image.Image:
    """Draws images and, below each row, their masks in colours; a pixel becomes scale x scale pixels."""
    columns = min(columns, len(dataset))
    rows = min(rows, len(dataset) // columns)
    batch = dataset.__getitems__(list(range(rows * columns)))
    drawn = [batch['image'].permute(0, 2, 3, 1) / 2 + 0.5]  # (rows * columns, H, W, 3)
    if 'mask' in batch:
        # Hues differ by the golden angle, so that adjacent labels have different colours.
        colours = torch.tensor([colorsys.hsv_to_rgb(label * 0.618 % 1, 0.65, 0.95) for label in range(256)])
        colours[0], colours[IGNORE] = 0.15, 1  # dark grey, white
        drawn.append(colours[batch['mask']])
    sheet = F.pad(torch.stack(drawn), (0, 0, 0, 2, 0, 2), value=1)  # a white line between neighbours
    sheet = sheet.unflatten(1, (rows, columns)).permute(1, 0, 3, 2, 4, 5)  # (rows, 1 or 2, H, columns, W, 3)
    sheet = (sheet.flatten(0, 2).flatten(1, 2) * 255).round().byte().numpy()  # (height, width, 3)
    return Image.fromarray(sheet.repeat(scale, axis=0).repeat(scale, axis=1))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f'{self.prog}: error: {message}\n')


def create_parser() -> Parser:
    parser = Parser(
        prog='dataset.py',
        description='Draw a sheet of sample images with their masks, count the objects and measure the loading speed; '
        'or, with --prepare, convert a published data set to the file that train.py reads.',
        usage='python dataset.py [flags]',
    )

    def add(flag, help, default=None, **options):
        shown = '' if default is None else f' (default: {default})'
        group.add_argument(flag, help=help + shown, default=default, **options)

    # fmt: off
    low, high = RESOLUTIONS
    sizes = ', '.join(f'{name} {size}' for name, (size, _) in SIZES.items())
    masked = 'NAME_mask.png beside NAME.jpg, or masks/NAME.png for images/NAME.jpg'
    group = parser.add_argument_group('data')
    add('--dataset', 'source of the images; shapes are drawn, images are pictures of your own', 'shapes',
        choices=DATASETS)
    add('--data_dir', 'folder of the pictures (images), or of the published or prepared file '
        f'({", ".join(PUBLISHED)}); may also name a prepared .h5 file', Path('data'), type=Path)
    add('--mask_dir', f'images: folder of the masks, with the names of the pictures (default: {masked})', type=Path)
    add('--variant', 'multi_dsprites: which of its three files', VARIANTS[0], choices=VARIANTS)
    add('--resolution', f'side of the square images in pixels, {low} to {high} (default: {sizes})', type=int)
    add('--max_objects', 'largest number of objects in an image, 1 to 16 for shapes; published scenes with more are '
        'left out; not for images', 6, type=int)
    add('--min_objects', 'shapes: smallest number of objects in an image, 1 to 16', 2, type=int)
    add('--data_seed', 'shapes: seed of the drawing, 0 or larger', 0, type=int)
    group = parser.add_argument_group('sample sheet')
    add('--num_images', 'number of images to load and count, at least 32', 1000, type=int)
    add('--output', f'file of the sheet: {", ".join(PICTURES)}', Path('samples.png'), type=Path)
    group = parser.add_argument_group('preparing')
    add('--prepare', 'convert this data set to one .h5 file; downloads the published file if --data_dir has none',
        choices=tuple(PUBLISHED))
    add('--output_dir', 'folder of the .h5 file; then train with this folder as --data_dir (default: --data_dir)',
        type=Path)
    add('--url', 'address to download the published file from')
    add('--limit', 'stop after this many scenes and add the number to the name of the file. Training needs scenes of '
        'all splits: the first 70 %% of the source are train, the next 15 %% val, the rest test', type=int)
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser()
    args = parser.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))
    given = {name for name, value in vars(parser.parse_args(argv, unset)).items() if value is not None}
    preparing = {'prepare', 'output_dir', 'url', 'limit'}
    mode, used = ('prepare', preparing) if args.prepare else ('dataset', {'dataset', 'num_images', 'output'})
    source = args.prepare or args.dataset
    for name in sorted(given - used - {'resolution', *SOURCE_FLAGS[source]}):
        reason = 'is for --prepare only' if name in preparing else f'has no effect with --{mode} {source}'
        parser.error(f'--{name} {reason}')
    low, high = RESOLUTIONS
    if args.resolution is None:
        args.resolution = SIZES[source][0]
    if not low <= args.resolution <= high:
        parser.error(f'--resolution must be from {low} to {high}, not {args.resolution}')
    if args.num_images < 32:
        parser.error(f'--num_images must be at least 32, not {args.num_images}')
    if args.limit is not None and args.limit < 1:
        parser.error(f'--limit must be at least 1, not {args.limit}')
    return args


def preview(args: argparse.Namespace) -> None:
    """Draws the sheet of samples, counts the objects and measures images/s."""
    savable = args.output.suffix.lower() in PICTURES and args.output.parent.is_dir()
    require(savable, f'--output {args.output} must lie in an existing folder and end in {", ".join(PICTURES)}')
    start = time.perf_counter()
    dataset = create_dataset(
        args.dataset, 'train', args.num_images, args.resolution, args.max_objects, args.min_objects, args.data_seed,
        args.data_dir, args.variant, args.mask_dir,
    )  # fmt: skip
    drawing = time.perf_counter() - start
    start = time.perf_counter()
    batches = list(wrap_in_loader(dataset, min(32, len(dataset)), shuffle=False))
    loading = time.perf_counter() - start
    masks = [mask for batch in batches for mask in batch.get('mask', ()) if (mask != IGNORE).any()]
    if masks:
        counts = Counter(len(set(mask.unique().tolist()) - {0, IGNORE}) for mask in masks)
        print('objects  images')
        for number, images in sorted(counts.items()):
            print(f'{number:7d}  {images:6d}  {"#" * round(60 * images / len(masks))}')
    print(dataset)
    verb = 'drawing' if args.dataset == 'shapes' else 'reading'
    print(f'{verb} {len(dataset) / drawing:,.0f} images/s, loading {len(dataset) / loading:,.0f} images/s')
    sample_sheet(dataset).save(args.output)
    print(f'samples{" and masks" if masks else ""}: {args.output}')


def main(args: argparse.Namespace) -> int:
    """Returns the exit status: 2 after a user's mistake and 130 after Ctrl-C, with one line on stderr."""
    try:
        if not args.prepare:
            preview(args)
            return 0
        start = time.perf_counter()
        path = prepare(
            args.prepare, args.data_dir, args.resolution, args.max_objects, args.variant, args.limit, args.url,
            output_dir=args.output_dir,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        with h5py.File(path) as file:
            splits, read = np.bincount(file['split'][:], minlength=3), int(file.attrs['scenes_read'])
        megabytes = path.stat().st_size / 1e6
        print(f'{path}: {", ".join(f"{n} {split}" for n, split in zip(splits, SPLITS, strict=True))} images')
        print(f'{splits.sum()} of {read} scenes kept, {megabytes:,.1f} MB, {read / seconds:.0f} scenes/s')
        if args.limit:
            print(f'to use this file instead of that of all scenes: --data_dir {quote(str(path))}')
    except (DataError, OSError) as error:
        print(f'dataset.py: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'interrupted{"; the same command continues a download" if args.prepare else ""}', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(parse_args()))
