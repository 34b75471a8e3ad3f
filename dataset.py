"""Where the images come from: every source as one Dataset shape and one create_dataloader.

    python dataset.py                                  # a sheet of samples, and how fast they come
    python dataset.py --max_objects 10 --resolution 128 --output shapes.png

    from dataset import create_dataloader
    train_loader, val_loader = create_dataloader(dataset_type='shapes', batch_size=32, resolution=64)

A batch is a dict: `image` float32 [B, 3, H, W] in [-1, 1] and, where the source has masks, `mask`
int64 [B, H, W] with 0 for the background and 1, 2, ... for the objects.
"""

import argparse
import colorsys
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm

DATASETS = ('shapes', 'clevr6')
SPLITS = ('train', 'val', 'test')
SHAPES = ('circle', 'square', 'triangle')

CLEVR6_IS_MISSING = """\
clevr6 cannot be read yet: it needs the CLEVR scenes with masks (clevr_with_masks_train.tfrecords, \
10.5 GB) and a reader for them, which this version does not have; use --dataset shapes"""


class DataError(ValueError):
    """A source or a request that gives no images; the message says why in one line."""


# --- Shapes ----------------------------------------------------------------------------------


class ShapesDataset(Dataset):
    """Circles, squares and triangles on a grey background, with instance labels.

    Place, size, rotation, colour and number are random; objects may overlap, but each keeps at
    least MIN_VISIBLE of its area in sight. Image i depends on (seed, split, i) alone: it is the
    same in a data set of any size, and no two splits share a sample. Everything is drawn once
    and kept in memory: `images` uint8 [N, H, W, 3], `labels` uint8 [N, H, W].

    Raises DataError for a split, size, resolution or number of objects that cannot be drawn.
    """

    # The size of an object is the radius of the disc of equal area, as a share of the image side.
    MIN_SIZE, MAX_SIZE = 0.09, 0.17
    MIN_VISIBLE = 0.6
    MIN_RADIUS = 1.3  # pixels; what is smaller may cover no pixel's centre
    MAX_OBJECTS = 16

    def __init__(
        self,
        split: str = 'train',
        size: int = 10_000,
        resolution: int = 64,
        max_objects: int = 6,
        min_objects: int = 2,
        seed: int = 0,
    ):
        if split not in SPLITS:
            raise DataError(f'split must be one of {", ".join(SPLITS)}, not {split!r}')
        if size < 1:
            raise DataError(f'a data set needs at least 1 image, not {size}')
        if not 16 <= resolution <= 256:
            raise DataError(f'shapes are drawn at a resolution from 16 to 256, not {resolution}')
        if not 1 <= min_objects <= max_objects <= self.MAX_OBJECTS:
            raise DataError(
                f'min_objects ({min_objects}) and max_objects ({max_objects}) must satisfy '
                f'1 <= min_objects <= max_objects <= {self.MAX_OBJECTS}'
            )
        if seed < 0:
            raise DataError(f'a seed must not be negative, as {seed} is')
        self.split, self.resolution, self.seed = split, resolution, seed
        self.min_objects, self.max_objects = min_objects, max_objects
        self.images = np.empty((size, resolution, resolution, 3), np.uint8)
        self.labels = np.empty((size, resolution, resolution), np.uint8)
        # `delay` keeps the bar away from what is done in two seconds.
        for i in tqdm(range(size), f'drawing {split} shapes', unit=' images', delay=2, disable=None, leave=False):
            self.images[i], self.labels[i] = self.draw(i)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A whole batch at once; DataLoader calls this instead of `__getitem__` B times."""
        return to_batch(self.images[indices], self.labels[indices])

    def draw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 [H, W, 3] and labels uint8 [H, W] of sample `index`."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        image = np.full((3, self.resolution, self.resolution), 255 * rng.uniform(0.1, 0.9), np.float32)
        labels = np.zeros((self.resolution, self.resolution), np.uint8)
        count = rng.integers(self.min_objects, self.max_objects, endpoint=True)
        areas = np.zeros(count + 1, int)  # of label 1, 2, ... in pixels, with nothing in front
        visible = np.zeros(count + 1, int)  # what is left of it in sight
        for label in range(1, count + 1):
            (rows, columns), coverage, hidden = self._place(rng, labels, areas, visible)
            inside = coverage > 0.5
            behind = image[:, rows, columns]
            behind += coverage * (255 * random_colour(rng)[:, None, None] - behind)
            labels[rows, columns][inside] = label
            visible -= hidden
            areas[label] = visible[label] = np.count_nonzero(inside)
        return (image + 0.5).astype(np.uint8).transpose(1, 2, 0), labels

    def _place(self, rng, labels, areas, visible):
        """A random object that hides none of the earlier ones too much.

        Returns the window of the image it lies in (two slices), its coverage [h, w] in [0, 1]
        of the window's pixels, and how many pixels it hides of every label.
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
            radius = max(0.8 * radius, self.MIN_RADIUS)  # crowded: smaller objects find a place

    def _rasterise(self, shape: str, x: float, y: float, radius: float, angle: float):
        """Window and coverage of one object: the distance to its edge, clipped to a pixel."""
        reach = 1.6 * radius + 1  # the corners of a triangle are at 1.56 radii
        rows, columns = (
            slice(max(int(centre - reach), 0), min(int(centre + reach) + 1, self.resolution)) for centre in (y, x)
        )
        dy = np.arange(rows.start + 0.5 - y, rows.stop - y, dtype=np.float32)[:, None]
        dx = np.arange(columns.start + 0.5 - x, columns.stop - x, dtype=np.float32)
        if shape == 'circle':
            distance = np.sqrt(dx * dx + dy * dy) - radius
        else:
            sides = 3 if shape == 'triangle' else 4
            apothem = radius * math.sqrt(math.pi / (sides * math.tan(math.pi / sides)))  # equal area
            normals = [angle + side * 2 * math.pi / sides for side in range(sides)]
            edges = [math.cos(normal) * dx + math.sin(normal) * dy for normal in normals]
            distance = np.maximum.reduce(edges) - apothem
        return (rows, columns), (0.5 - distance).clip(0, 1)


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """A random RGB colour in [0, 1], saturated enough to stand out from any grey."""
    hue, saturation, value = rng.uniform((0, 0.6, 0.6), 1)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)


def to_batch(images: np.ndarray, labels: np.ndarray | None = None) -> dict[str, torch.Tensor]:
    """uint8 [B, H, W, 3] and labels [B, H, W] -> a batch as described at the top of this file."""
    image = torch.from_numpy(images).permute(0, 3, 1, 2).float()  # stays channels_last in memory
    batch = {'image': image.mul_(2 / 255).sub_(1)}
    if labels is not None:
        batch['mask'] = torch.from_numpy(labels).long()
    return batch


# --- One way to ask for any source -----------------------------------------------------------


def create_dataset(
    dataset_type: str,
    split: str,
    size: int,
    resolution: int = 64,
    max_objects: int = 6,
    min_objects: int = 2,
    seed: int = 0,
) -> Dataset:
    """One split of a source; arguments as in create_dataloader(). Raises DataError."""
    if dataset_type == 'shapes':
        return ShapesDataset(split, size, resolution, max_objects, min_objects, seed)
    if dataset_type == 'clevr6':
        raise DataError(CLEVR6_IS_MISSING)
    raise DataError(f'dataset_type must be one of {", ".join(DATASETS)}, not {dataset_type!r}')


def wrap_in_loader(
    dataset: Dataset, batch_size: int, shuffle: bool, seed: int = 0, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """A DataLoader that fetches whole batches.

    With `shuffle`, its order is a function of (seed, epoch): call `loader.sampler.set_epoch(n)`
    before each epoch, and incomplete batches are left out.
    """
    return DataLoader(
        dataset,
        batch_size,
        sampler=DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=seed),
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
    train_size: int = 10_000,
    val_size: int = 320,
    seed: int = 0,
    data_seed: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> tuple[DataLoader, DataLoader]:
    """Loaders of the training and the validation split: (train_loader, val_loader).

    dataset_type  'shapes'
    batch_size    images per batch
    resolution    side of the square images, pixels
    max_objects, min_objects  how many objects an image holds
    train_size, val_size      images in each split
    seed          decides the order of the training images (see wrap_in_loader)
    data_seed     decides what is drawn
    num_workers, pin_memory   as in torch.utils.data.DataLoader

    Raises DataError (a ValueError) for a request that gives no images.
    """
    if batch_size < 1:
        raise DataError(f'batch_size must be at least 1, not {batch_size}')
    if batch_size > train_size:
        raise DataError(f'batch_size ({batch_size}) must not exceed the {train_size} training images')
    train, val = (
        create_dataset(dataset_type, split, size, resolution, max_objects, min_objects, data_seed)
        for split, size in (('train', train_size), ('val', val_size))
    )
    return (
        wrap_in_loader(train, batch_size, True, seed, num_workers, pin_memory),
        wrap_in_loader(val, batch_size, False, pin_memory=pin_memory),
    )


# --- Preview ---------------------------------------------------------------------------------


def sample_sheet(dataset: Dataset, columns: int = 8, rows: int = 4, scale: int = 2) -> Image.Image:
    """Samples and, under each row, their labels in colours; every pixel scale x scale large."""
    lines = []
    for row in range(rows):
        batch = dataset.__getitems__(list(range(row * columns, (row + 1) * columns)))
        lines.append(((batch['image'] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
        if 'mask' in batch:
            # Hues a golden angle apart: neighbouring labels never look alike.
            hues = [colorsys.hsv_to_rgb(label * 0.618 % 1, 0.65, 0.95) for label in range(int(batch['mask'].max()) + 1)]
            hues[0] = (0.15, 0.15, 0.15)
            lines.append((np.array(hues)[batch['mask'].numpy()] * 255).astype(np.uint8))
    pad = [(0, 0), (0, 2), (0, 2), (0, 0)]  # a white line between neighbours
    sheet = np.concatenate([np.concatenate(list(np.pad(line, pad, constant_values=255)), axis=1) for line in lines])
    return Image.fromarray(sheet.repeat(scale, axis=0).repeat(scale, axis=1))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Draw a sheet of samples with their masks, and measure how fast they come.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        usage='python dataset.py [--help] [flags]',
    )
    parser.add_argument('--dataset', default='shapes', choices=DATASETS, help='source of the images')
    parser.add_argument('--resolution', type=int, default=64, help='side of the square images, pixels')
    parser.add_argument('--max_objects', type=int, default=6, help='most objects in an image')
    parser.add_argument('--min_objects', type=int, default=2, help='fewest objects in an image')
    parser.add_argument('--data_seed', type=int, default=0, help='decides what is drawn')
    parser.add_argument('--num_images', type=int, default=1000, help='images to draw and count, at least 32')
    parser.add_argument('--output', type=Path, default=Path('samples.png'), help='where the sheet goes')
    args = parser.parse_args(argv)
    if args.num_images < 32:
        parser.error(f'--num_images must be at least 32, a sheet, not {args.num_images}')
    return args


def main(args: argparse.Namespace) -> int:
    """Returns the exit status; a user's mistake becomes one line and a 2."""
    try:
        start = time.perf_counter()
        dataset = create_dataset(
            args.dataset, 'train', args.num_images, args.resolution, args.max_objects, args.min_objects, args.data_seed
        )
        drawing = time.perf_counter() - start
        loader = wrap_in_loader(dataset, 32, shuffle=True)
        start = time.perf_counter()
        counts = torch.cat([batch['mask'].amax((1, 2)) for batch in loader])
        loading = time.perf_counter() - start
        print('objects  images')
        for number, images in enumerate(torch.bincount(counts).tolist()):
            if images:
                print(f'{number:7d}  {images:6d}  {"#" * round(60 * images / len(counts))}')
        print(f'drawing {len(dataset) / drawing:,.0f} images/s, loading {len(counts) / loading:,.0f} images/s')
        sample_sheet(dataset).save(args.output)
        print(f'sheet of samples and masks: {args.output}')
    except (DataError, OSError) as error:
        print(f'dataset.py: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(parse_args()))
