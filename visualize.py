"""Figures of what the slots hold, as functions of tensors and, from a checkpoint, as PNG files.

    python visualize.py                                    # newest checkpoint under logs/
    python visualize.py --checkpoint logs/checkpoints/best_model.pth --num_images 4

    from visualize import visualize_slots
    fig = visualize_slots(images, recons, masks, save_path='results.png')

Every figure function takes tensors (images in [-1, 1]) and returns a matplotlib Figure. A slot has
one number and one colour, the same in every panel of every figure. Shapes as in slot_attention.py.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from dataset import DataError, create_dataset
from slot_attention import (
    CheckpointError,
    ConfigError,
    ModelConfig,
    SlotAttentionAutoEncoder,
    build_model,
    fg_ari,
    load_checkpoint,
    segmentation,
)

# Petroff 2021 (arXiv 2107.02270): ten colours that stay apart for colour-blind readers.
PALETTE = np.array(
    [
        *((63, 144, 218), (255, 169, 14), (189, 31, 1), (148, 164, 162), (131, 45, 182)),
        *((169, 107, 89), (231, 99, 0), (185, 172, 112), (113, 117, 129), (146, 218, 221)),
    ]
)
PANEL_PIXELS = 144  # about the side of a panel in the saved file
DPI = 100


# --- Figures ---------------------------------------------------------------------------------


def visualize_slots(
    images: Tensor,
    recons: Tensor,
    masks: Tensor,
    save_path: str | os.PathLike | None = None,
    rgbs: Tensor | None = None,
    labels: Tensor | None = None,
) -> Figure:
    """One row per image: input, reconstruction, segmentation over the input, then every slot.

    images, recons  [B, 3, H, W] in [-1, 1]
    masks           [B, K, 1, H, W]
    rgbs            [B, K, 3, H, W] colours of the slots (model.decode); without them a slot shows
                    its part of the reconstruction
    labels          [B, H, W] true labels: adds the FG-ARI of every image, and their mean

    Raises ValueError for shapes that do not fit.
    """
    _check('images', images, 4)
    _check('recons', recons, 4)
    _check('masks', masks, 5)
    if rgbs is None:
        rgbs = recons[:, None].expand(-1, masks.shape[1], -1, -1, -1)
    rows, notes, title = [], None, None
    for image, recon, mask, rgb in zip(images, recons, masks, rgbs, strict=True):
        rows.append([_pixels(image), _pixels(recon), _overlay(image, mask), *_slot_panels(rgb, mask)])
    if labels is not None:
        scores = fg_ari(labels.cpu(), masks.cpu())
        notes = [f'FG-ARI {score:.2f}' for score in scores.tolist()]
        title = f'FG-ARI {scores.nanmean():.3f}, mean of {len(scores)} images'
    return _sheet(rows, _titles('input', 'reconstruction', 'segmentation', masks.shape[1]), notes, title, save_path)


def visualize_attention_evolution(
    attn: Tensor,
    save_path: str | os.PathLike | None = None,
    images: Tensor | None = None,
    index: int = 0,
) -> Figure:
    """T rows x K columns: where every slot looked in every iteration, for one image.

    attn    [B, T, K, h, w] (or [T, K, h, w]) attention on the encoder's grid
    images  [B, 3, H, W]: drawn under the attention
    index   which image of the batch

    Bright is 1: all of what is there goes to this slot. Raises ValueError for other shapes.
    """
    attn = attn[None] if attn.ndim == 4 else attn
    _check('attn', attn, 5)
    attn = attn[index].detach().float().cpu()  # [T, K, h, w]
    T, K = attn.shape[:2]
    ground = None
    if images is not None:
        _check('images', images, 4)
        ground = _pixels(images[index])
        attn = F.interpolate(attn, ground.shape[:2], mode='bilinear')
    rows = []
    for maps in attn.numpy():
        heat = [colormaps['magma'](m)[:, :, :3] for m in maps]
        if ground is not None:
            grey = ground.mean(axis=2, keepdims=True)
            # The picture shows through where attention is low, and never outshines it.
            heat = [h + (1 - m[:, :, None]) * 0.45 * grey * (1 - h) for h, m in zip(heat, maps, strict=True)]
        rows.append(([] if ground is None else [ground]) + heat)
    titles = _titles(*([] if ground is None else ['input']), K)
    return _sheet(rows, titles, [f'iteration {t + 1}' for t in range(T)], 'attention', save_path)


def visualize_slot_decomposition(
    original_image: Tensor,
    reconstructed_image: Tensor,
    masks: Tensor,
    save_path: str | os.PathLike | None = None,
    rgbs: Tensor | None = None,
    labels: Tensor | None = None,
) -> Figure:
    """One image taken apart: the whole, every slot's mask, every slot alone, and their sum so far.

    original_image, reconstructed_image  [3, H, W] (or a batch of one) in [-1, 1]
    masks   [K, 1, H, W] (or a batch of one)
    rgbs    [K, 3, H, W] colours of the slots (or a batch of one), see visualize_slots
    labels  [H, W] true labels (or a batch of one): adds the FG-ARI

    Raises ValueError for shapes that do not fit.
    """
    image, recon = (x[0] if x.ndim == 4 else x for x in (original_image, reconstructed_image))
    masks = masks[0] if masks.ndim == 5 else masks
    _check('original_image', image, 3)
    _check('reconstructed_image', recon, 3)
    _check('masks', masks, 4)
    rgbs = recon.expand(len(masks), -1, -1, -1) if rgbs is None else rgbs[0] if rgbs.ndim == 5 else rgbs
    masks = masks.detach().float().cpu()
    error = (recon - image).detach().float().cpu().abs().mean(dim=0).div(2).clamp(0, 1).numpy()
    # A sum that lacks slots shows the paper where they are missing.
    sums = torch.cumsum((_unit(rgbs) - 1) * masks, dim=0) + 1  # [K, 3, H, W]
    rows = [
        [_pixels(image), *masks.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()],
        [_pixels(recon), *_slot_panels(rgbs, masks)],
        [colormaps['magma'](error)[:, :, :3], *(s.permute(1, 2, 0).clamp(0, 1).numpy() for s in sums)],
    ]
    title = None
    if labels is not None:
        labels = labels[0] if labels.ndim == 3 else labels
        title = f'FG-ARI {fg_ari(labels[None].cpu(), masks[None]).item():.3f}'
    sheet_notes = ['input\nmasks', 'reconstruction\nslots', 'error\nsum so far']
    return _sheet(rows, _titles('image', len(masks)), sheet_notes, title, save_path)


# --- Panels ----------------------------------------------------------------------------------


def slot_colours(num_slots: int) -> np.ndarray:
    """Colours [K, 3] in [0, 1]: the palette, then lighter turns of it."""
    rounds = np.arange(num_slots) // len(PALETTE)
    base = PALETTE[np.arange(num_slots) % len(PALETTE)] / 255
    return 1 - (1 - base) * 0.6 ** rounds[:, None]


def _check(name: str, tensor: Tensor, ndim: int) -> None:
    if tensor.ndim != ndim:
        raise ValueError(f'{name} must have {ndim} dimensions, not shape {list(tensor.shape)}')


def _unit(images: Tensor) -> Tensor:
    """[-1, 1] on any device -> [0, 1] float32 on the CPU."""
    return images.detach().float().cpu().add(1).div(2).clamp(0, 1)


def _pixels(image: Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] -> [H, W, 3] in [0, 1]."""
    return _unit(image).permute(1, 2, 0).numpy()


def _slot_panels(rgbs: Tensor, masks: Tensor) -> list[np.ndarray]:
    """rgbs [K, 3, H, W], masks [K, 1, H, W] -> every slot alone on white, [H, W, 3] each."""
    masks = masks.detach().float().cpu()
    alone = _unit(rgbs) * masks + (1 - masks)
    return list(alone.permute(0, 2, 3, 1).numpy())


def _overlay(image: Tensor, masks: Tensor, scale: int = 4) -> np.ndarray:
    """Image [3, H, W] tinted and outlined in the colour of the strongest slot of masks [K, 1, H, W].

    Enlarged by `scale`, so that the outline is finer than a pixel: [scale H, scale W, 3].
    """
    labels = segmentation(masks.detach()[None])[0].cpu().numpy().repeat(scale, 0).repeat(scale, 1)
    picture = _pixels(image).repeat(scale, 0).repeat(scale, 1)
    colours = slot_colours(len(masks))[labels]
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        for shift in (1, -1):
            edge |= labels != np.roll(labels, shift, axis)
    edge[0] = edge[-1] = edge[:, 0] = edge[:, -1] = False
    return np.where(edge[:, :, None], colours, 0.5 * picture + 0.5 * colours)


def _titles(*parts: str | int) -> list[tuple[str, np.ndarray | None]]:
    """Column titles with their colours: the names given, then one for each of the K slots."""
    *names, num_slots = parts
    slots = [(f'slot {k + 1}', colour) for k, colour in enumerate(slot_colours(num_slots))]
    return [(name, None) for name in names] + slots


def _sheet(
    rows: list[list[np.ndarray]],
    titles: list[tuple[str, np.ndarray | None]],
    notes: list[str] | None,
    title: str | None,
    save_path: str | os.PathLike | None,
) -> Figure:
    """Panels [H, W, 3] in a grid under coloured column titles, a note at the left of every row."""
    height, width = rows[0][0].shape[:2]
    # A whole number of dots to a pixel keeps panels crisp.
    panel = max(1, round(PANEL_PIXELS / max(height, width))) * max(height, width) / DPI  # inches
    gap, left, top = 0.08, 1.1 if notes else 0.08, 0.62 if title else 0.32
    step = panel + gap
    size = (left + step * len(titles), top + step * len(rows))
    fig = Figure(figsize=size, dpi=DPI, facecolor='white')
    ax = fig.add_axes((0, 0, 1, 1))
    for i, row in enumerate(rows):
        for j, pixels in enumerate(row):
            x, y = left + j * step, top + i * step
            ax.imshow(pixels, extent=(x, x + panel, y + panel, y), interpolation='nearest', vmin=0, vmax=1)
            colour = titles[j][1]
            edge = dict(edgecolor='0.75', linewidth=0.8) if colour is None else dict(edgecolor=colour, linewidth=2)
            ax.add_patch(Rectangle((x, y), panel, panel, fill=False, **edge))
    for j, (name, colour) in enumerate(titles):
        x = left + j * step
        ax.text(x + panel / 2, top - 0.1, name, ha='center', va='bottom', fontsize=10)
        if colour is not None:
            ax.add_patch(Rectangle((x, top - 0.07), panel, 0.05, color=colour))
    for i, note in enumerate(notes or []):
        ax.text(left - 0.1, top + i * step + panel / 2, note, ha='right', va='center', fontsize=9)
    if title:
        ax.text(size[0] / 2, 0.16, title, ha='center', va='center', fontsize=12, weight='bold')
    ax.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect='equal')
    ax.set_axis_off()
    if save_path is not None:
        fig.savefig(save_path, dpi=DPI)
    return fig


# --- Command line ----------------------------------------------------------------------------


def newest_checkpoint(log_dir: str | os.PathLike) -> Path | None:
    """The checkpoint under `log_dir` that was written last, or None."""
    return max(Path(log_dir).rglob('*.pth'), key=lambda path: path.stat().st_mtime, default=None)


@torch.no_grad()
def render(
    model: SlotAttentionAutoEncoder,
    batch: dict[str, Tensor],
    output_dir: Path,
    num_slots: int | None = None,
    num_iterations: int | None = None,
    seed: int = 0,
) -> list[Path]:
    """All figures of a batch; returns their paths. Raises ValueError and OSError."""
    images, labels = batch['image'], batch.get('mask')
    generator = torch.Generator().manual_seed(seed)
    recons, masks, slots, attn = model(images, num_slots=num_slots, num_iterations=num_iterations, generator=generator)
    rgbs, _ = model.decode(slots)
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = [output_dir / 'slots.png']
    visualize_slots(images, recons, masks, paths[-1], rgbs, labels)
    for i in range(len(images)):
        paths += [output_dir / f'attention_evolution_{i}.png', output_dir / f'decomposition_{i}.png']
        visualize_attention_evolution(attn, paths[-2], images, i)
        label = None if labels is None else labels[i]
        visualize_slot_decomposition(images[i], recons[i], masks[i], paths[-1], rgbs[i], label)
    return paths


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Render what the slots of a checkpoint hold.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        usage='python visualize.py [--help] [flags]',
    )
    parser.add_argument('--checkpoint', type=Path, help='checkpoint to render (default: the newest under --log_dir)')
    parser.add_argument('--log_dir', type=Path, default=Path('logs'), help='where to look for the newest checkpoint')
    parser.add_argument('--output_dir', type=Path, default=Path('visualizations'), help='where the figures go')
    parser.add_argument('--data_dir', type=Path, help='where the images lie (default: where they were in training)')
    parser.add_argument('--num_images', type=int, default=8, help='validation images to render')
    parser.add_argument('--num_slots', type=int, help='slots at test time (default: as in training)')
    parser.add_argument('--num_iterations', type=int, help='iterations at test time (default: as in training)')
    parser.add_argument('--seed', type=int, default=0, help='seed of the slot initialisation')
    args = parser.parse_args(argv)
    if args.num_images < 1:
        parser.error(f'--num_images must be at least 1, not {args.num_images}')
    return args


def main(args: argparse.Namespace) -> int:
    """Returns the exit status; a user's mistake becomes one line and a 2."""
    try:
        path = args.checkpoint or newest_checkpoint(args.log_dir)
        if path is None:
            print(f'no checkpoint under {args.log_dir}: rendering an UNTRAINED model (python train.py trains one)')
            torch.manual_seed(args.seed)
            model = SlotAttentionAutoEncoder(ModelConfig()).eval()
            data = {'dataset_type': 'shapes', 'resolution': model.config.resolution}
        else:
            print(f'rendering {path}')
            checkpoint = load_checkpoint(path)
            model = build_model(checkpoint, path)
            data = checkpoint['training'].get('data')
            if data is None:
                raise CheckpointError(
                    f'{path} does not say what data it was trained on; call the functions from Python'
                )
        if args.data_dir is not None:
            data = data | {'data_dir': args.data_dir}
        dataset = create_dataset(split='val', size=args.num_images, **data)
        batch = dataset.__getitems__(list(range(len(dataset))))
        for path in render(model, batch, args.output_dir, args.num_slots, args.num_iterations, args.seed):
            print(path)
    except (ConfigError, CheckpointError, DataError, OSError) as error:
        print(f'visualize.py: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(parse_args()))
