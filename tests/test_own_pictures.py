"""A new user with a folder of pictures and masks: train, score, draw."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from runs import run

import visualize

WIDTH, HEIGHT, NUMBER = 80, 60, 200
SMALL = (
    '--dataset images --resolution 32 --hidden_dim 8 --slot_dim 16 --num_slots 4 --num_iterations 3 --drops 1 '
    '--spare_slots 1 --batch_size 8 --steps 20 --warmup_steps 4 --device cpu --data_dir'
).split()


def draw_pictures(folder: Path) -> None:
    """Noisy skies and grounds with one to three fuzzy ellipses; every tenth picture has no mask."""
    for kind in ('images', 'masks'):
        (folder / kind).mkdir(parents=True)
    for i in range(NUMBER):
        rng = np.random.default_rng(i)
        ground = np.linspace(*rng.integers(60, 200, (2, 3)), HEIGHT)[:, None].repeat(WIDTH, axis=1)
        picture = Image.fromarray((ground + rng.normal(0, 8, ground.shape)).clip(0, 255).astype(np.uint8))
        mask = Image.new('L', (WIDTH, HEIGHT))
        for label in range(1, rng.integers(2, 5)):
            x, y, w, h = rng.integers((0, 0, 12, 12), (WIDTH - 24, HEIGHT - 24, 24, 24))
            box = [int(v) for v in (x, y, x + w, y + h)]
            ImageDraw.Draw(picture).ellipse(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
            ImageDraw.Draw(mask).ellipse(box, fill=label)
        picture.filter(ImageFilter.GaussianBlur(0.7)).save(folder / 'images' / f'IMG_{i}.JPG', quality=90)
        if i % 10:
            mask.save(folder / 'masks' / f'img_{i}.png')


def test_pictures_with_masks_are_trained_on_scored_and_drawn(capsys):
    draw_pictures(Path('holiday'))
    assert run(*SMALL, 'holiday/images') == 0
    printed = capsys.readouterr()
    assert printed.err == ''
    line = next(line for line in printed.out.splitlines() if 'with a mask of' in line)
    number, masked = (int(line[: line.index(end)].split()[-1]) for end in (' images, ', ' with a mask'))
    assert 0.7 * NUMBER < number < 0.9 * NUMBER and 0.8 * number < masked < number
    assert 'objects (median; at most 3)' in line and 'FG-ARI' in printed.out and 'mIoU' in printed.out

    assert run('--eval', '--resume', 'logs') == 0
    out = capsys.readouterr().out
    assert ' test images of images, 4 + 1 slots, 3' in out and 'of the images have a mask with objects' in out

    Path('holiday/masks').rename('labels')  # a pattern of the user's own; pictures elsewhere have masks elsewhere
    pattern = '../../labels/{name}.png'
    assert run(*SMALL, 'holiday/images', '--masks', pattern, '--log_dir', 'again') == 0
    draw_pictures(Path('other'))
    capsys.readouterr()
    assert run('--eval', '--resume', 'again', '--data_dir', 'other/images') == 0
    assert 'FG-ARI' in capsys.readouterr().out

    Image.open('holiday/images/IMG_3.JPG').save('mine.jpg')
    assert visualize.main(visualize.parse_args(['--log_dir', 'again', '--image', 'mine.jpg'])) == 0
    (written,) = Path('visualizations').glob('*_mask.png')
    with Image.open(written) as mask:
        assert mask.size == (WIDTH, HEIGHT) and mask.mode == 'P'
        labels = np.asarray(mask)
    assert (labels[:, :10] == 255).all() and labels[:, 10:70].max() <= 4  # the model sees the central square
