"""Figures of what the slots hold, and slots as handles: from tensors, or as files from a checkpoint.

    python visualize.py                                    # newest checkpoint under logs/
    python visualize.py --checkpoint logs/checkpoints/best_model.pth --num_images 4
    python visualize.py --image a.jpg b.png                # pictures of your own
    python visualize.py --edit                             # take objects out, copy, swap, blend them
    python visualize.py --gif --checkpoint logs/checkpoints    # how the slots emerged in training
    python visualize.py --frames folder                    # a GIF of a sequence, with stable colours
    python visualize.py --sweep                            # scores over slots and iterations
    python visualize.py --training                         # loss, FG-ARI and learning rate of all runs

    from visualize import visualize_slots
    fig = visualize_slots(images, recons, masks, save_path='results.png')

Every figure function takes tensors (images in [-1, 1]) and returns a matplotlib Figure, saved as the
ending of save_path says (.png, .svg, .pdf). A slot has one number and one colour, the same in every
panel; the background's slot is grey and comes last, empty slots are dimmed. The ground is transparent
and the text of a grey that can be read on light and on dark. Shapes as in slot_attention.py.
"""

import argparse
import csv
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from scipy.optimize import linear_sum_assignment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from dataset import VARIANTS, DataError, create_dataset, find_pictures, read_picture, to_batch
from slot_attention import (
    CheckpointError,
    ConfigError,
    ModelConfig,
    SlotAttentionAutoEncoder,
    adjusted_rand_index,
    build_model,
    fg_ari,
    load_checkpoint,
    segmentation,
)

# Petroff 2021 (arXiv 2107.02270): colours that stay apart for colour-blind readers, without the greys.
PALETTE = np.array(
    [
        *((63, 144, 218), (255, 169, 14), (189, 31, 1), (131, 45, 182)),
        *((169, 107, 89), (231, 99, 0), (185, 172, 112), (146, 218, 221)),
    ]
)
BACKGROUND = np.full(3, 0.62)  # colour of the background's slot
TEXT = '#767676'  # as far from white as from black
EMPTY = 0.002  # a slot that is strongest in a smaller share of the image is empty
ERROR_SCALE = 4  # errors are small: a quarter of the range is already drawn brightest
PANEL_PIXELS = 128  # about the side of a panel in the saved file
DPI = 100
# What an untrained model sees; a checkpoint says it of its own data in the same form.
DATA = dict(
    dataset_type='shapes', resolution=64, max_objects=6, min_objects=2, seed=0, data_dir='data', variant=VARIANTS[0]
)


# --- Figures ---------------------------------------------------------------------------------


def visualize_slots(
    images: Tensor,
    recons: Tensor,
    masks: Tensor,
    save_path: str | os.PathLike | None = None,
    rgbs: Tensor | None = None,
    labels: Tensor | None = None,
    title: str | None = None,
) -> Figure:
    """One row per image: input, reconstruction, error, segmentation over the input, then every slot.

    images, recons  [B, 3, H, W] in [-1, 1]
    masks           [B, K, 1, H, W]
    rgbs            [B, K, 3, H, W] colours of the slots (model.decode); without them a slot shows
                    its part of the reconstruction
    labels          [B, H, W] true labels: adds the FG-ARI of every image, and their mean

    A slot's panel shows its colour times its mask, and says its share of the image. Raises ValueError
    for shapes that do not fit.
    """
    _check('images', images, 4)
    _check('recons', recons, 4)
    _check('masks', masks, 5)
    if rgbs is None:
        rgbs = recons[:, None].expand(-1, masks.shape[1], -1, -1, -1)
    rows, notes = [], None
    for image, recon, mask, rgb in zip(images, recons, masks, rgbs, strict=True):
        row = [_pixels(image), _pixels(recon), _error(image, recon), _overlay(image, mask)]
        rows.append([*map(Panel, row), *_slot_panels(_alone(rgb, mask), mask)])
    rows[0][:4] = [
        panel._replace(title=name)
        for panel, name in zip(rows[0], ('input', 'reconstruction', 'error', 'segmentation'), strict=False)
    ]
    if labels is not None:
        scores = fg_ari(labels.cpu(), masks.detach().cpu())
        notes = [f'FG-ARI\n{score:.2f}' for score in scores.tolist()]
        mean = f'FG-ARI {scores.nanmean():.3f}, mean of {len(scores)} images'
        title = mean if title is None else f'{title}: {mean}'
    return _sheet(rows, notes, title, save_path)


def visualize_attention_evolution(
    attn: Tensor,
    save_path: str | os.PathLike | None = None,
    images: Tensor | None = None,
    index: int = 0,
) -> Figure:
    """T rows x K columns: where every slot looked in every iteration, for one image.

    attn    [B, T, K, h, w] (or [T, K, h, w]) attention on the encoder's grid
    images  [B, 3, H, W]: drawn, dimmed, under the attention
    index   which image of the batch

    In full colour all of what is there goes to this slot. Each row says the entropy of the slots at a
    place, as a share of log K, and the ARI of its segmentation with that of the iteration before.
    Raises ValueError for other shapes.
    """
    attn, image = _attention(attn, images, index)
    rows = [_attention_row(maps, attn[-1], image, named=t == 0) for t, maps in enumerate(attn)]
    entropy = torch.special.entr(attn).sum(1).mean((1, 2)) / np.log(max(attn.shape[1], 2))
    found = segmentation(attn)
    notes = [f'iteration {t + 1}\nentropy {entropy[t]:.2f}' for t in range(len(attn))]
    for t in range(1, len(attn)):
        notes[t] += f'\nARI {adjusted_rand_index(found[t - 1 : t], found[t : t + 1]).item():.2f}'
    return _sheet(rows, notes, 'attention; ARI: with the iteration before', save_path)


def visualize_slot_decomposition(
    original_image: Tensor,
    reconstructed_image: Tensor,
    masks: Tensor,
    save_path: str | os.PathLike | None = None,
    rgbs: Tensor | None = None,
    labels: Tensor | None = None,
) -> Figure:
    """One image taken apart and put together again: every slot's mask, every slot alone, and their sum so far.

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
    order, colours = slot_order(masks), slot_colours(masks)
    masks = masks.detach().float().cpu()
    # A sum that lacks slots shows the paper where they are missing.
    sums = torch.cumsum((_unit(rgbs)[order] - 1) * masks[order], dim=0) + 1  # [K, 3, H, W], in the order drawn
    sums = [Panel(s.permute(1, 2, 0).clamp(0, 1).numpy()) for s in sums]
    shapes = [1 - mask[0, :, :, None].numpy() * (1 - colour) for mask, colour in zip(masks, colours, strict=True)]
    rows = [
        [Panel(_pixels(image), 'input'), *_slot_panels(shapes, masks)],
        [Panel(_pixels(recon), 'reconstruction'), *_slot_panels(_alone(rgbs, masks), masks, named=False)],
        [Panel(_error(image, recon), 'error'), *sums],
    ]
    title = None
    if labels is not None:
        labels = labels[0] if labels.ndim == 3 else labels
        title = f'FG-ARI {fg_ari(labels[None].cpu(), masks[None]).item():.3f}'
    return _sheet(rows, ['masks', 'slots\nalone', 'sum\nso far'], title, save_path)


def visualize_training(log_dirs: Iterable[str | os.PathLike], save_path: str | os.PathLike | None = None) -> Figure:
    """Loss, FG-ARI (where it was measured) and learning rate of runs, against steps and minutes.

    log_dirs are folders of TensorBoard files, each a run. Minutes are those of the clock since the
    first point. Raises ValueError where there is nothing to draw.
    """
    runs = {}
    for folder in log_dirs:
        events = EventAccumulator(str(folder), size_guidance={'scalars': 0}).Reload()
        known = events.Tags()['scalars']
        if points := {tag: events.Scalars(tag) for tag in ('train/loss', 'val/fg_ari', 'train/lr') if tag in known}:
            runs[str(folder)] = points
    if not runs:
        raise ValueError('no training curves to draw')
    fig = Figure(figsize=(12, 6), dpi=DPI, facecolor='none', layout='constrained')
    axes = fig.subplots(2, 3, sharex='row')
    for colour, (name, points) in zip(slot_colours_of(len(runs)), runs.items(), strict=True):
        start = min(p[0].wall_time for p in points.values() if p)
        for column, (tag, label) in enumerate(
            (('train/loss', 'training loss'), ('val/fg_ari', 'validation FG-ARI'), ('train/lr', 'learning rate'))
        ):
            curve = points.get(tag, [])
            for ax, unit in zip(axes[:, column], ('steps', 'minutes'), strict=True):
                x = [p.step if unit == 'steps' else (p.wall_time - start) / 60 for p in curve]
                ax.plot(x, [p.value for p in curve], color=colour, label=name, marker='.' * (tag == 'val/fg_ari'))
                ax.set(xlabel=unit, ylabel=label, yscale='log' if tag == 'train/loss' else 'linear')
    for ax in axes.flat:
        ax.set_facecolor('none')
        ax.spines[['top', 'right']].set_visible(False)
        ax.spines[['left', 'bottom']].set_color(TEXT)
        ax.tick_params(colors=TEXT, which='both')
        ax.xaxis.label.set_color(TEXT)
        ax.yaxis.label.set_color(TEXT)
        ax.grid(color=TEXT, alpha=0.2)
    axes[0, 0].legend(labelcolor=TEXT, frameon=False, fontsize=9)
    return _saved(fig, save_path)


def visualize_sweep(table: list[dict[str, float]], save_path: str | os.PathLike | None = None) -> Figure:
    """The table of sweep() as heat maps: a column for each number of slots, a row for each of iterations."""
    names = [name for name in ('fg_ari', 'mse') if name in table[0]]
    K, T = (sorted({row[name] for row in table}) for name in ('num_slots', 'num_iterations'))
    fig = Figure(figsize=(len(names) * (1.6 + 0.62 * len(K)), 1.3 + 0.42 * len(T)), dpi=DPI, facecolor='none',
                 layout='constrained')  # fmt: skip
    for ax, name in zip(np.atleast_1d(fig.subplots(1, len(names))), names, strict=True):
        found = {(row['num_iterations'], row['num_slots']): row[name] for row in table}
        values = np.array([[found[t, k] for k in K] for t in T])
        drawn = ax.imshow(values, cmap='viridis' if name == 'fg_ari' else 'viridis_r', aspect='auto')
        for (i, j), value in np.ndenumerate(values):
            bright = drawn.cmap(drawn.norm(value))[1] > 0.55
            text = f'{value:.2f}' if name == 'fg_ari' else f'{value:.4f}'
            ax.text(j, i, text, ha='center', va='center', fontsize=9, color='black' if bright else 'white')
        ax.set_title({'fg_ari': 'FG-ARI', 'mse': 'MSE'}[name], color=TEXT)
        ax.set_xticks(range(len(K)), K)
        ax.set_yticks(range(len(T)), T)
        ax.set_xlabel('slots', color=TEXT)
        ax.set_ylabel('iterations', color=TEXT)
        ax.tick_params(colors=TEXT, length=0)
        ax.spines[:].set_visible(False)
    return _saved(fig, save_path)


# --- Animations ------------------------------------------------------------------------------


def animate_attention(attn: Tensor, images: Tensor, save_path: str | os.PathLike, index: int = 0) -> None:
    """A GIF with a frame for each iteration; arguments as in visualize_attention_evolution()."""
    attn, image = _attention(attn, images, index)
    save_gif(
        [_sheet([_attention_row(maps, attn[-1], image)], None, f'iteration {t + 1}') for t, maps in enumerate(attn)],
        save_path,
    )


def save_gif(figures: Iterable[Figure], save_path: str | os.PathLike, milliseconds: int = 600) -> None:
    """Figures of one size as an endless GIF, the last frame shown three times as long. Raises OSError."""
    frames = []
    for fig in figures:
        fig.set_facecolor('white')
        canvas = FigureCanvasAgg(fig)
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())
    # One palette for all, without dithering: a colour stays what it is, and flat areas small. It covers rare colours
    # too; kmeans then moves it to where most pixels are, or the grey of a background would not be in it.
    some = np.concatenate(frames[:: max(1, len(frames) // 8)] + frames[-1:])
    palette = Image.fromarray(some).quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    frames = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [milliseconds] * (len(frames) - 1) + [3 * milliseconds]
    frames[0].save(save_path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


# --- Slots as handles ------------------------------------------------------------------------


def match_slots(masks: Tensor, others: Tensor) -> Tensor:
    """Which slot of `others` is which of `masks`: order [B, K] with others[b, order[b]] like masks[b].

    Both [B, K, 1, H, W] (or without the 1). The pairs with the largest sum of IoUs, by the Hungarian
    algorithm; the IoU of soft masks is the sum of minima over that of maxima. Raises ValueError for
    shapes that differ.
    """
    if masks.shape != others.shape:
        raise ValueError(f'masks of {list(masks.shape)} cannot be matched with {list(others.shape)}')
    a, b = (x.detach().float().flatten(2).cpu() for x in (masks, others))  # [B, K, H * W]
    orders = []
    for ours, theirs in zip(a, b, strict=True):
        both = torch.minimum(ours[:, None], theirs).sum(2)  # [K, K]
        iou = both / (ours.sum(1)[:, None] + theirs.sum(1) - both + 1e-8)
        orders.append(torch.from_numpy(linear_sum_assignment(iou, maximize=True)[1]))
    return torch.stack(orders)


def in_order_of(like: Tensor, masks: Tensor, rgbs: Tensor) -> tuple[Tensor, Tensor]:
    """masks [B, K, 1, H, W] and rgbs [B, K, 3, H, W] with slots in the order of those in `like`, other masks."""
    orders = match_slots(like, masks).to(masks.device)[:, :, None, None, None]
    return masks.take_along_dim(orders, 1), rgbs.take_along_dim(orders, 1)


def remove(slots: Tensor, k: int) -> Tensor:
    """slots [K, D] with slot k empty: what it drew is gone, and the others fill its place."""
    slots = slots.clone()
    slots[k] = 0
    return slots


def paste(slots: Tensor, masks: Tensor, slot: Tensor) -> Tensor:
    """slots [K, D] with one more, `slot` [D], in place of the one that draws least by masks [K, 1, H, W]."""
    slots = slots.clone()
    slots[shares(masks).argmin()] = slot
    return slots


def largest_objects(masks: Tensor, number: int = 1) -> list[int]:
    """The slots of the largest objects, the largest first; without the background's: masks [K, 1, H, W]."""
    return shares(masks).argsort(descending=True)[1 : 1 + number].tolist()


EDITS = ('remove', 'copy', 'swap', 'interpolate')


@torch.no_grad()
def visualize_edit(
    model: SlotAttentionAutoEncoder,
    slots: Tensor,
    edit: str,
    save_path: str | os.PathLike | None = None,
    steps: int = 5,
) -> Figure:
    """Before, the slot, after: one row per image, which takes from the next one where two are needed.

    remove       the largest object goes
    copy         the largest object of the other image comes
    swap         the largest objects of the two change places
    interpolate  the slot of the largest object becomes that of the other image's, in `steps`

    slots [B, K, D] of model(images), B >= 2 where two are needed. Raises ValueError for another edit,
    for one image too few, and for a single slot.
    """
    if edit not in EDITS:
        raise ValueError(f'edit must be one of {", ".join(EDITS)}, not {edit!r}')
    B, K, _ = slots.shape
    if K < 2 or (B < 2 and edit != 'remove'):
        raise ValueError(f'{edit} needs {"2 slots" if K < 2 else "2 images"} at least')
    rgbs, masks = model.decode(slots)
    recons = (rgbs * masks).sum(1)

    def draw(*edited: Tensor, title: str = 'after') -> list[Panel]:
        colours, alpha = model.decode(torch.stack(edited))
        return [Panel(_pixels(image), title) for image in (colours * alpha).sum(1)]

    def alone(i: int, k: int) -> Panel:
        return _slot_panels(_alone(rgbs[i], masks[i]), masks[i], ordered=False)[k]

    rows = []
    for i in range(B):
        j = (i + 1) % B
        (k,), (l,) = largest_objects(masks[i]), largest_objects(masks[j])
        before, other = (Panel(_pixels(recons[n]), name) for n, name in ((i, 'before'), (j, 'the other')))
        if edit == 'remove':
            rows.append([before, alone(i, k), *draw(remove(slots[i], k))])
        elif edit == 'copy':
            rows.append([before, alone(j, l), other, *draw(paste(slots[i], masks[i], slots[j, l]))])
        elif edit == 'swap':
            ours, theirs = slots[i].clone(), slots[j].clone()
            ours[k], theirs[l] = slots[j, l], slots[i, k]
            rows.append([before, other, alone(i, k), alone(j, l), *draw(ours), *draw(theirs, title='the other, after')])
        else:
            ways = []
            for share in torch.linspace(0, 1, steps):
                ways.append(slots[i].clone())
                ways[-1][k] = torch.lerp(slots[i, k], slots[j, l], share.item())
            rows.append([before, alone(i, k), *draw(*ways, title=''), alone(j, l)])
    return _sheet(rows, None, edit, save_path)


@torch.no_grad()
def sweep(
    model: SlotAttentionAutoEncoder,
    batch: dict[str, Tensor],
    num_slots: Iterable[int],
    num_iterations: Iterable[int],
    seed: int = 0,
) -> list[dict[str, float]]:
    """Mean scores of a batch for every number of slots and iterations: rows num_slots, num_iterations, mse, fg_ari.

    fg_ari is left out where there are no masks. Raises ConfigError for slots that the model does not have.
    """
    table, iterations = [], list(num_iterations)
    for K in num_slots:
        for T in iterations:
            generator = torch.Generator().manual_seed(seed)
            recons, masks, *_ = model(batch['image'], num_slots=K, num_iterations=T, generator=generator)
            row = {'num_slots': K, 'num_iterations': T, 'mse': F.mse_loss(recons, batch['image']).item()}
            if 'mask' in batch:
                row['fg_ari'] = fg_ari(batch['mask'], masks).nanmean().item()
            table.append(row)
    return table


# --- Panels ----------------------------------------------------------------------------------


class Panel(NamedTuple):
    pixels: np.ndarray  # [H, W, 3] in [0, 1]
    title: str = ''
    colour: np.ndarray | None = None  # [3], of its slot
    dim: bool = False


def shares(masks: Tensor) -> Tensor:
    """Share of the image in which each slot is strongest: [K] from masks [K, 1, H, W] or [K, h, w]."""
    found = segmentation(masks.detach()[None]).flatten().cpu()
    return torch.bincount(found, minlength=len(masks)).float() / len(found)


def slot_order(masks: Tensor) -> list[int]:
    """Slots of masks [K, 1, H, W] as they are drawn: by number, but the background, the largest, last."""
    background = int(shares(masks).argmax())
    return [k for k in range(len(masks)) if k != background] + [background]


def slot_colours_of(num_slots: int) -> np.ndarray:
    """Colours [K, 3] in [0, 1]: the palette, then lighter turns of it."""
    rounds = np.arange(num_slots) // len(PALETTE)
    base = PALETTE[np.arange(num_slots) % len(PALETTE)] / 255
    return 1 - (1 - base) * 0.6 ** rounds[:, None]


def slot_colours(masks: Tensor) -> np.ndarray:
    """Colours [K, 3] in [0, 1] of the slots of masks [K, 1, H, W]: by number, the background's grey."""
    colours = slot_colours_of(len(masks))
    colours[slot_order(masks)[-1]] = BACKGROUND
    return colours


def _check(name: str, tensor: Tensor, ndim: int) -> None:
    if tensor.ndim != ndim:
        raise ValueError(f'{name} must have {ndim} dimensions, not shape {list(tensor.shape)}')
    if tensor.shape[-1] != tensor.shape[-2]:
        raise ValueError(f'{name} must be square, not {tensor.shape[-2]} x {tensor.shape[-1]}')


def _unit(images: Tensor) -> Tensor:
    """[-1, 1] on any device -> [0, 1] float32 on the CPU."""
    return images.detach().float().cpu().add(1).div(2).clamp(0, 1)


def _pixels(image: Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] -> [H, W, 3] in [0, 1]."""
    return _unit(image).permute(1, 2, 0).numpy()


def _error(image: Tensor, recon: Tensor) -> np.ndarray:
    """Where two images [3, H, W] differ, mean over the channels, dark to bright: [H, W, 3]."""
    error = (_unit(recon) - _unit(image)).abs().mean(dim=0)
    return colormaps['inferno']((error * ERROR_SCALE).clamp(0, 1).numpy())[:, :, :3]


def _alone(rgbs: Tensor, masks: Tensor) -> list[np.ndarray]:
    """rgbs [K, 3, H, W], masks [K, 1, H, W] -> every slot alone on white, [H, W, 3] each."""
    masks = masks.detach().float().cpu()
    alone = _unit(rgbs) * masks + (1 - masks)
    return list(alone.permute(0, 2, 3, 1).numpy())


def _slot_panels(pictures: list[np.ndarray], masks: Tensor, named: bool = True, ordered: bool = True) -> list[Panel]:
    """A panel for each slot from its picture [H, W, 3], with its number, share and colour; in the order drawn."""
    size, colours = shares(masks), slot_colours(masks)
    panels = []
    for k in slot_order(masks) if ordered else range(len(masks)):
        empty = size[k].item() < EMPTY
        title = (f'{k + 1} empty' if empty else f'{k + 1}: {100 * size[k]:.1f} %') if named else ''
        panels.append(Panel(pictures[k], title, colours[k], empty))
    return panels


def _overlay(image: Tensor, masks: Tensor, scale: int = 4) -> np.ndarray:
    """Image [3, H, W] tinted and outlined in the colour of the strongest slot of masks [K, 1, H, W].

    Enlarged by `scale`, so that the outline is finer than a pixel: [scale H, scale W, 3]. Without the
    image's own colours, which would mix with those of the slots; the background is not tinted.
    """
    labels = segmentation(masks.detach()[None])[0].cpu().numpy().repeat(scale, 0).repeat(scale, 1)
    picture = _pixels(image).mean(2, keepdims=True).repeat(scale, 0).repeat(scale, 1)
    colours, background = slot_colours(masks)[labels], slot_order(masks)[-1]
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        for shift in (1, -1):
            edge |= labels != np.roll(labels, shift, axis)
    edge[0] = edge[-1] = edge[:, 0] = edge[:, -1] = False
    edge &= labels != background
    tint = np.where(edge, 1, np.where(labels == background, 0, 0.65))[:, :, None]
    return (1 - tint) * picture + tint * colours


def _attention(attn: Tensor, images: Tensor | None, index: int) -> tuple[Tensor, Tensor | None]:
    """Attention [T, K, H, W] of one image, enlarged to it, and the image [3, H, W]; from batches of them."""
    attn = attn[None] if attn.ndim == 4 else attn
    _check('attn', attn, 5)
    attn = attn[index].detach().float().cpu()
    if images is None:
        return attn, None
    _check('images', images, 4)
    return F.interpolate(attn, images.shape[2:], mode='bilinear'), images[index]


def _attention_row(maps: Tensor, last: Tensor, image: Tensor | None, named: bool = True) -> list[Panel]:
    """Segmentation and attention maps [K, H, W] of an iteration; order and colours are those of the `last`."""
    ground = np.zeros((*maps.shape[1:], 1)) if image is None else 0.45 * _pixels(image).mean(2, keepdims=True)
    colours, order = slot_colours(last), slot_order(last)
    heat = [ground + a[:, :, None] * (colour - ground) for a, colour in zip(maps.numpy(), colours, strict=True)]
    strongest = Panel(colours[segmentation(maps[None])[0].numpy()], 'strongest' * named)
    return [strongest, *(Panel(heat[k], f'slot {k + 1}' * named, colours[k]) for k in order)]


def _sheet(
    rows: list[list[Panel]], notes: list[str] | None, title: str | None, save_path: str | os.PathLike | None = None
) -> Figure:
    """Panels in a grid, each under its title and the colour of its slot; a note at the left of every row."""
    side = max(rows[0][0].pixels.shape)
    # A whole number of dots to a pixel keeps panels crisp.
    panel = max(1, round(PANEL_PIXELS / side)) * side / DPI  # inches
    gap, strip, left, top = 0.1, 0.27, 1.3 if notes else 0.08, 0.36 if title else 0.04
    strips = [strip if any(p.title for p in row) else 0.1 for row in rows]
    tops = np.cumsum([top] + [s + panel + 0.04 for s in strips])
    size = (left + (panel + gap) * max(map(len, rows)), tops[-1] + 0.04)
    fig = Figure(figsize=size, dpi=DPI, facecolor='none')
    ax = fig.add_axes((0, 0, 1, 1))
    for i, row in enumerate(rows):
        y = tops[i] + strips[i]
        for j, (pixels, name, colour, dim) in enumerate(row):
            x = left + j * (panel + gap)
            alpha = 0.35 if dim else 1
            # 'none' leaves the pixels as they are, also in vector files.
            ax.imshow(pixels, extent=(x, x + panel, y + panel, y), interpolation='none', vmin=0, vmax=1, alpha=alpha)
            ax.text(x + panel / 2, y - 0.07, name, ha='center', va='bottom', fontsize=12, color=TEXT, alpha=alpha)
            if colour is not None:
                ax.add_patch(Rectangle((x, y - 0.06), panel, 0.05, color=colour, alpha=alpha, linewidth=0))
            ax.add_patch(Rectangle((x, y), panel, panel, fill=False, edgecolor=TEXT, linewidth=0.5, alpha=alpha))
        if notes:
            ax.text(left - 0.1, y + panel / 2, notes[i], ha='right', va='center', fontsize=12, color=TEXT)
    if title:
        ax.text(size[0] / 2, 0.2, title, ha='center', va='center', fontsize=14, color=TEXT, weight='bold')
    ax.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect='equal')
    ax.set_axis_off()
    return _saved(fig, save_path)


def _saved(fig: Figure, save_path: str | os.PathLike | None) -> Figure:
    if save_path is not None:
        with rc_context({'svg.fonttype': 'none', 'pdf.fonttype': 42}):  # text stays text
            fig.savefig(save_path, dpi=DPI)
    return fig


# --- Command line ----------------------------------------------------------------------------


class Job(NamedTuple):
    """What the command line asks for: a model, and how to call it."""

    model: SlotAttentionAutoEncoder
    data: dict
    args: argparse.Namespace

    def images(self) -> dict[str, Tensor]:
        """--image, or validation images of the data that the model was trained on."""
        if self.args.image:
            return self.read(self.args.image)
        dataset = create_dataset(split='val', size=self.args.num_images, **self.data)
        return dataset.__getitems__(list(range(len(dataset))))

    def read(self, paths: Iterable[Path]) -> dict[str, Tensor]:
        """Pictures of any size as a batch of the model's resolution. Raises DataError."""
        return to_batch(np.stack([read_picture(path, self.model.config.resolution) for path in paths]))

    def see(self, images: Tensor):
        """The model's output for images [B, 3, H, W], and the colours of its slots."""
        generator = torch.Generator().manual_seed(self.args.seed)
        output = self.model(
            images, num_slots=self.args.num_slots, num_iterations=self.args.num_iterations, generator=generator
        )
        return (*output, self.model.decode(output.slots)[0])

    def path(self, name: str) -> Path:
        """A file of the output folder, in the format asked for unless the name has an ending."""
        self.args.output_dir.mkdir(parents=True, exist_ok=True)
        return self.args.output_dir / (name if Path(name).suffix else f'{name}.{self.args.format}')


def render(job: Job) -> list[Path]:
    """slots, and the attention and decomposition of every image; of --image also the segmentation."""
    batch = job.images()
    images, labels = batch['image'], batch.get('mask')
    recons, masks, _, attn, rgbs = job.see(images)
    paths = [job.path('slots')]
    visualize_slots(images, recons, masks, paths[-1], rgbs, labels)
    for i in range(len(images)):
        paths += [job.path(f'attention_evolution_{i}'), job.path(f'decomposition_{i}')]
        visualize_attention_evolution(attn, paths[-2], images, i)
        label = None if labels is None else labels[i]
        visualize_slot_decomposition(images[i], recons[i], masks[i], paths[-1], rgbs[i], label)
    for i, path in enumerate(job.args.image or ()):
        paths.append(job.path(f'{path.stem}_{i}_mask.png'))
        Image.fromarray(segmentation(masks)[i].to(torch.uint8).numpy()).save(paths[-1])
    return paths


def render_edits(job: Job) -> list[Path]:
    slots = job.see(job.images()['image'])[2]
    paths = [job.path(f'edit_{edit}') for edit in EDITS]
    for edit, path in zip(EDITS, paths, strict=True):
        visualize_edit(job.model, slots, edit, path)
    return paths


def render_attention_gifs(job: Job) -> list[Path]:
    images = job.images()['image']
    attn = job.see(images)[3]
    paths = [job.path(f'attention_evolution_{i}.gif') for i in range(len(images))]
    for i, path in enumerate(paths):
        animate_attention(attn, images, path, i)
    return paths


def render_emergence(jobs: Iterable[tuple[int, Job]]) -> list[Path]:
    """A GIF of the same images at every step for which there is a checkpoint.

    A slot has the number that it has in the last frame, where objects are most apart.
    """

    def frame(step: int, job: Job) -> Figure:
        recons, masks, _, _, rgbs = job.see(batch['image'])
        masks, rgbs = in_order_of(last, masks, rgbs)
        return visualize_slots(batch['image'], recons, masks, None, rgbs, batch.get('mask'), f'step {step:,}')

    jobs = sorted(jobs, key=lambda pair: pair[0])
    batch = jobs[-1][1].images()
    last = jobs[-1][1].see(batch['image'])[1]
    path = jobs[-1][1].path('emergence.gif')
    save_gif((frame(step, job) for step, job in jobs), path)
    return [path]


def render_frames(job: Job) -> list[Path]:
    """A GIF of a folder of pictures in the order of their names; a slot keeps its number from frame to frame."""
    names = find_pictures(job.args.frames)
    if not names:
        raise DataError(f'{job.args.frames} holds no pictures')
    figures, before = [], None
    for number, name in enumerate(names):
        images = job.read([name])['image']
        recons, masks, _, _, rgbs = job.see(images)
        if before is not None:
            masks, rgbs = in_order_of(before, masks, rgbs)
        before = masks
        figures.append(visualize_slots(images, recons, masks, None, rgbs, title=f'frame {number + 1}'))
    path = job.path('frames.gif')
    save_gif(figures, path, milliseconds=200)
    return [path]


def render_sweep(job: Job) -> list[Path]:
    config = job.model.config
    largest = config.num_slots + (4 if config.slot_init == 'gaussian' else 0)
    table = sweep(job.model, job.images(), range(2, largest + 1), (1, 2, 3, 5, 8, 12, 16), job.args.seed)
    paths = [job.path('sweep.csv'), job.path('sweep')]
    with open(paths[0], 'w', newline='') as file:
        writer = csv.DictWriter(file, table[0].keys())
        writer.writeheader()
        writer.writerows(table)
    visualize_sweep(table, paths[1])
    return paths


def newest_checkpoint(log_dir: str | os.PathLike) -> Path | None:
    """The checkpoint under `log_dir` that was written last, or None."""
    return max(Path(log_dir).rglob('*.pth'), key=lambda path: path.stat().st_mtime, default=None)


def open_job(path: Path | None, args: argparse.Namespace) -> tuple[int, Job]:
    """The step of a checkpoint, and its model; an untrained one for None. Raises CheckpointError."""
    if path is None:
        print(f'no checkpoint under {args.log_dir}: rendering an UNTRAINED model (python train.py trains one)')
        torch.manual_seed(args.seed)
        return 0, Job(SlotAttentionAutoEncoder(ModelConfig()).eval(), DATA, args)
    checkpoint = load_checkpoint(path)
    model = build_model(checkpoint, path)
    data, progress = (checkpoint['training'].get(name) for name in ('data', 'progress'))
    if not isinstance(data, dict) or data.keys() != DATA.keys():
        raise CheckpointError(f'{path} does not say what data it was trained on; call the functions from Python')
    if args.data_dir is not None:
        data = data | {'data_dir': str(args.data_dir)}
    step = progress.get('step', 0) if isinstance(progress, dict) else 0
    return step if isinstance(step, int) else 0, Job(model, data, args)


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Render what the slots of a checkpoint hold: a sheet of slots, and the attention and the '
        'decomposition of every image.',
        usage='python visualize.py [--help] [flags]',
    )

    def add(group, name, help, **kwargs):
        if kwargs.get('default') is not None:
            help += f' (default: {kwargs["default"]})'
        group.add_argument(f'--{name}', help=help, **kwargs)

    group = parser.add_argument_group('what to render instead')
    modes = group.add_mutually_exclusive_group()
    add(modes, 'edit', 'objects taken out, copied, swapped and blended', action='store_true')
    add(modes, 'gif', 'attention as animations; how slots emerged, of a folder', action='store_true')
    add(modes, 'frames', 'an animation of this folder of pictures, with stable colours', type=Path, metavar='FOLDER')
    add(modes, 'sweep', 'scores over numbers of slots and iterations, also as CSV', action='store_true')
    add(modes, 'training', 'the curves of all runs under --log_dir', action='store_true')
    group = parser.add_argument_group('input')
    add(group, 'checkpoint', 'file, or a folder with --gif (default: the newest under --log_dir)', type=Path)
    add(group, 'log_dir', 'where runs are looked for', type=Path, default=Path('logs'))
    add(group, 'image', 'pictures of your own instead of validation images', type=Path, nargs='+', metavar='PATH')
    add(group, 'data_dir', 'where the images lie (default: where they were in training)', type=Path)
    add(group, 'num_images', 'validation images (default: 8, with --sweep 32)', type=int, metavar='N')
    add(group, 'num_slots', 'slots at test time (default: as in training)', type=int, metavar='N')
    add(group, 'num_iterations', 'iterations at test time (default: as in validation)', type=int, metavar='N')
    add(group, 'seed', 'of the slot initialisation', type=int, default=0, metavar='N')
    group = parser.add_argument_group('output')
    add(group, 'output_dir', 'where the files go', type=Path, default=Path('visualizations'))
    add(group, 'format', 'of the figures', default='png', choices=('png', 'svg', 'pdf'))
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser()
    args = parser.parse_args(argv)
    if args.num_images is None:
        args.num_images = 32 if args.sweep else 8
    if args.num_images < 1:
        parser.error(f'--num_images must be at least 1, not {args.num_images}')
    if args.edit and len(args.image or range(args.num_images)) < 2:
        parser.error('--edit needs two images at least')
    if not 0 <= args.seed < 2**63:
        parser.error(f'--seed must be at least 0 and below 2^63, not {args.seed}')
    return args


@torch.no_grad()
def render_as_asked(args: argparse.Namespace) -> list[Path]:
    """Raises what main() reports."""
    if args.training:
        path = args.output_dir / f'training.{args.format}'
        args.output_dir.mkdir(parents=True, exist_ok=True)
        folders = sorted({file.parent for file in args.log_dir.rglob('events.out.tfevents.*')})
        visualize_training(folders, path)
        return [path]
    if args.gif and args.checkpoint is not None and args.checkpoint.is_dir():
        checkpoints = list(args.checkpoint.glob('checkpoint_epoch_*.pth')) + list(args.checkpoint.glob('last.pth'))
        if not checkpoints:
            raise CheckpointError(f'no checkpoints in {args.checkpoint}; python train.py --save_every 1 writes some')
        jobs = dict(open_job(path, args) for path in checkpoints)  # one for each step
        return render_emergence(jobs.items())
    path = args.checkpoint or newest_checkpoint(args.log_dir)
    if path is not None:
        print(f'rendering {path}')
    job = open_job(path, args)[1]
    modes = (
        (args.edit, render_edits), (args.gif, render_attention_gifs), (args.frames, render_frames),
        (args.sweep, render_sweep), (True, render),
    )  # fmt: skip
    return next(mode for asked, mode in modes if asked)(job)


def main(args: argparse.Namespace) -> int:
    """Returns the exit status; a user's mistake becomes one line and a 2."""
    try:
        for path in render_as_asked(args):
            print(path)
    except (ConfigError, CheckpointError, DataError, ValueError, OSError) as error:
        print(f'visualize.py: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(parse_args()))
