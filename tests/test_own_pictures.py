"""A new user with a folder of pictures and masks: train, score, draw."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from runs import run

import visualize

WIDTH, HEIGHT, NUMBER = 80, 60, 200
SMALL = (
    '--dataset images --data_dir holiday/images --resolution 32 --hidden_dim 8 --slot_dim 16 --num_slots 4 '
    '--num_iterations 6 --moves 1 --drops 1 --batch_size 8 --steps 20 --warmup_steps 4 --device cpu'
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
    assert run(*SMALL) == 0
    printed = capsys.readouterr()
    assert printed.err == ''
    number, masked = (
        int(line.split()[i]) for line in printed.out.splitlines() if 'with a mask' in line for i in (1, -4)
    )
    assert 0.7 * NUMBER < number < 0.9 * NUMBER and 0.8 * number < masked < number
    last_epoch = [line for line in printed.out.splitlines() if line.startswith('epoch')][-1]
    assert 'FG-ARI' in last_epoch and 'mIoU' in last_epoch

    assert run('--eval', '--search', '--resume', 'logs') == 0
    out = capsys.readouterr().out
    assert ' test images of images, 4 slots, 6 iterations' in out and 'of the images have a mask with objects' in out
    rows = [line.split('  ')[0] for line in out.splitlines() if line.startswith(('network', '+'))]
    assert rows == ['network', '+ refine']

    # The names are those of other pictures, whose masks must not score these.
    draw_pictures(Path('other'))
    assert run('--eval', '--resume', 'logs', '--data_dir', 'other/images') == 0
    assert 'FG-ARI' in capsys.readouterr().out
    Path('holiday/masks').rename('labels')
    assert run(*SMALL, '--mask_dir', 'labels') == 0
    Path('other/masks').rename('unknown')
    capsys.readouterr()
    assert run('--eval', '--resume', 'logs', '--data_dir', 'other/images') == 0
    assert 'FG-ARI' not in capsys.readouterr().out

    Image.open('holiday/images/IMG_3.JPG').save('mine.jpg')
    assert visualize.main(visualize.parse_args(['--image', 'mine.jpg'])) == 0
    with Image.open('visualizations/mine_0_full_mask.png') as mask:
        assert mask.size == (WIDTH, HEIGHT) and mask.mode == 'P'
        labels = np.asarray(mask)
    assert (labels[:, :10] == 255).all() and labels[:, 10:70].max() <= 4  # the model sees the central square
