"""Draws what the slots of a model represent: figure functions, and a script that renders a checkpoint.

    python visualize.py                                    # the newest checkpoint under logs/
    python visualize.py --checkpoint logs/checkpoints/best_model.pth --num_images 4
    python visualize.py --search                           # slots refined by gradient descent
    python visualize.py --image a.jpg b.png                # your own pictures, and their segmentations
    python visualize.py --edit                             # remove, copy, swap and interpolate objects
    python visualize.py --gif                              # attention, iteration by iteration
    python visualize.py --gif --checkpoint logs/checkpoints    # the slots at each saved training step
    python visualize.py --frames folder                    # a GIF of a sequence of pictures
    python visualize.py --sweep                            # scores for each number of slots and iterations
    python visualize.py --training                         # loss, FG-ARI and learning rate of all runs

    from visualize import visualize_slots
    fig = visualize_slots(images, recons, masks, save_path='results.png')

Figure functions take tensors (images in [-1, 1], shapes as in slot_attention.py) and return a matplotlib
Figure, which is saved if `save_path` is given (.png, .svg or .pdf). A slot has the same number and colour in
every panel. The background's slot, the largest, is grey and drawn last; slots that win less than 0.2 % of the
image are left out or dimmed. The figures are transparent, with grey text that is readable on light and dark pages.
"""

import argparse
import csv
import os
import shlex
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle, product
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':  # before the other imports, which take seconds

    def exit_on_interrupt(*_):
        print('visualize.py: interrupted', file=sys.stderr)
        sys.exit(130)

    signal.signal(signal.SIGINT, exit_on_interrupt)

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from scipy.optimize import linear_sum_assignment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from dataset import (  # isort: skip
    PICTURES, SOURCE_FLAGS, DataError, Parser, create_dataset, find_pictures, natural_key, open_picture,
    read_picture, to_batch,
)  # fmt: skip
from slot_attention import (  # isort: skip
    IGNORE_LABEL, PRETRAINED, CheckpointError, SlotAttentionAutoEncoder, adjusted_rand_index, build_model, damaged,
    fg_ari, load_checkpoint, refine, segmentation,
)  # fmt: skip

SavePath = str | os.PathLike | None
# Petroff 2021 (arXiv 2107.02270): distinguishable with colour-vision deficiencies; its two greys are left out.
PALETTE = to_rgba_array(['#3f90da', '#ffa90e', '#bd1f01', '#832db6', '#a96b59', '#e76300', '#b9ac70', '#92dadd'])[:, :3]
BACKGROUND = np.full(3, 0.62)  # colour of the background's slot
TEXT = '#767676'  # equal contrast to white and black
STYLE = {
    'figure.dpi': 100, 'figure.facecolor': 'none', 'axes.facecolor': 'none', 'axes.edgecolor': TEXT,
    'axes.spines.top': False, 'axes.spines.right': False, 'text.color': TEXT, 'axes.labelcolor': TEXT,
    'svg.fonttype': 'none', 'pdf.fonttype': 42,  # text in vector files remains text
}  # fmt: skip
EMPTY = 0.002  # a slot is empty if its mask is the largest in a smaller share of the image
ERROR_SCALE = 4  # errors are multiplied by this to be visible
MAX_ROWS = 10  # iterations in a figure of the attention
PANEL_PIXELS = 128  # approximate side of a panel in the saved file
FORMATS = ('png', 'svg', 'pdf')
CREATOR = 'Slot Attention visualize.py'  # in the metadata of the figures
CURVES = {
    'train/loss': 'training loss', 'val/fg_ari': 'validation FG-ARI', 'val/mse': 'validation MSE',
    'train/lr': 'learning rate',
}  # fmt: skip
EDITS = {
    'remove': 'the largest object is removed',
    'copy': 'the largest object of the next image is added',
    'swap': 'the largest objects of two images change places',
    'interpolate': 'the largest object turns into that of the next image',
}


# --- Figures ---------------------------------------------------------------------------------


def visualize_slots(
    images: Tensor, recons: Tensor, masks: Tensor, save_path: SavePath = None, rgbs: Tensor | None = None,
    labels: Tensor | None = None, title: str | None = None, empty_slots: bool = False,
) -> Figure:  # fmt: skip
    """One row per image: input, reconstruction, error, segmentation, and each slot with its share of the image.

    images, recons  [B, 3, H, W] in [-1, 1]
    masks           [B, K, 1, H, W]
    rgbs            [B, K, 3, H, W], colours of each slot (from model.decode); default: the reconstruction's
    labels          [B, H, W], true labels; adds the FG-ARI of each image and its mean
    empty_slots     draw slots with less than EMPTY of the pixels too, so that figures of any masks have the same size

    A slot's panel shows its colours times its mask on white. Raises ValueError for other shapes.
    """
    _check(4, images=images, recons=recons)
    _check(5, masks=masks)
    if rgbs is None:
        rgbs = recons[:, None].expand(-1, masks.shape[1], -1, -1, -1)
    rows, notes = [], None
    for image, recon, mask, rgb in zip(images, recons, masks, rgbs, strict=True):
        titles = ('', '', '', '') if rows else ('input', 'reconstruction', 'error', 'segmentation')
        pixels = (_pixels(image), _pixels(recon), _error(image, recon), _overlay(image, mask))
        slots = [panel for panel in _slot_panels(_alone(rgb, mask), mask) if empty_slots or not panel.dim]
        rows.append([*map(Panel, pixels, titles), *slots])
    if labels is not None:
        scores = fg_ari(labels.cpu(), masks.detach().cpu())  # NaN for images without labelled objects
        notes = ['' if score.isnan() else f'FG-ARI\n{score:.2f}' for score in scores]
        if any(notes):
            mean = f'FG-ARI {scores.nanmean():.3f}, mean of {(~scores.isnan()).sum()} images'
            title = f'{title}: {mean}' if title else mean
    return _sheet(rows, notes, title, save_path)


def visualize_attention_evolution(
    attn: Tensor, save_path: SavePath = None, images: Tensor | None = None, index: int = 0
) -> Figure:
    """One row per iteration: the strongest slot at each position, and the attention of each slot, for one image.

    Of more than MAX_ROWS iterations as many are drawn, from the first to the last.

    attn    [B, T, K, h, w] (or [T, K, h, w]), attention on the encoder's grid
    images  [B, 3, H, W]; drawn, darkened, below the attention
    index   which image of the batch

    A position in a slot's full colour is assigned to this slot alone. Each row gives the mean entropy over the
    slots, divided by log K, and the ARI with the row above. Raises ValueError for other shapes.
    """
    attn, rows = _attention_rows(attn, images, index)
    drawn = np.unique(np.linspace(0, len(rows) - 1, MAX_ROWS).round().astype(int))
    attn, rows = attn[drawn], [rows[t] for t in drawn]
    entropy = torch.special.entr(attn).sum(1).mean((1, 2)) / np.log(max(attn.shape[1], 2))
    found = segmentation(attn)
    notes = [f'iteration {t + 1}\nentropy {value:.2f}' for t, value in zip(drawn, entropy, strict=True)]
    for t in range(1, len(attn)):
        notes[t] += f'\nARI {adjusted_rand_index(found[t - 1 : t], found[t : t + 1]).item():.2f}'
    title = 'attention of the network (ARI: with the row above)'
    return _sheet(_titles_once(rows), notes, title, save_path)


def visualize_slot_decomposition(
    original_image: Tensor, reconstructed_image: Tensor, masks: Tensor, save_path: SavePath = None,
    rgbs: Tensor | None = None, labels: Tensor | None = None, title: str | None = None,
) -> Figure:  # fmt: skip
    """Three rows for one image: the mask of each slot, each slot alone, and the running sum of the slots.

    original_image, reconstructed_image  [3, H, W] in [-1, 1]
    masks   [K, 1, H, W]
    rgbs    [K, 3, H, W], see visualize_slots()
    labels  [H, W], true labels; adds the FG-ARI

    All may have a batch dimension in front; the first image is drawn. Raises ValueError for other shapes.
    """
    image, recon = (x[0] if x.ndim == 4 else x for x in (original_image, reconstructed_image))
    masks = masks[0] if masks.ndim == 5 else masks
    _check(3, original_image=image, reconstructed_image=recon)
    _check(4, masks=masks)
    rgbs = recon.expand(len(masks), -1, -1, -1) if rgbs is None else rgbs[0] if rgbs.ndim == 5 else rgbs
    alone, alpha, colours = _alone(rgbs, masks), _channels_last(masks), slot_colours(masks)
    sums = 1 + np.cumsum(alone[slot_order(masks)] - 1, axis=0)  # [K, H, W, 3], on white, in drawing order
    rows = [
        [Panel(_pixels(image), 'input'), *_slot_panels(1 - alpha * (1 - colours[:, None, None]), masks)],
        [Panel(_pixels(recon), 'reconstruction'), *_slot_panels(alone, masks, named=False)],
        [Panel(_error(image, recon), 'error'), *map(Panel, sums.clip(0, 1))],
    ]
    if labels is not None:
        score = fg_ari(labels.reshape(-1, *labels.shape[-2:])[:1].cpu(), masks[None].detach().cpu()).item()
        title = f'{title}: FG-ARI {score:.3f}' if title else f'FG-ARI {score:.3f}'
    return _sheet(rows, ['masks', 'slots\nalone', 'running\nsum'], title, save_path)


@rc_context(STYLE)
def visualize_training(log_dirs: Iterable[str | os.PathLike], save_path: SavePath = None) -> Figure:
    """Loss, FG-ARI and learning rate of several runs, against steps and minutes since the first point.

    If no run has an FG-ARI, as without masks, the validation MSE takes its place. What no run has is left out.

    log_dirs  folders of TensorBoard files, one per run; those without curves are left out

    Raises ValueError if no folder has curves.
    """
    runs = {}
    for folder in log_dirs:
        events = EventAccumulator(str(folder), size_guidance={'scalars': 0}).Reload()
        tags = [tag for tag in CURVES if tag in events.Tags()['scalars']]
        if curves := {tag: points for tag in tags if (points := events.Scalars(tag))}:  # none after an earlier restart
            runs[str(folder).replace('$', r'\$')] = curves  # a name is no formula
    if not runs:
        raise ValueError(f'no training curves in {", ".join(map(str, log_dirs))}')
    recorded = set().union(*runs.values())  # tags
    shown = [tag for tag in CURVES if tag in recorded and not (tag == 'val/mse' and 'val/fg_ari' in recorded)]
    columns = max(1, int(12 / (0.8 + 0.08 * max(map(len, runs)))))  # of the legend, which is below the plots
    fig = Figure(figsize=(12, 6.1 + 0.19 * -(-len(runs) // columns)), layout='constrained')
    axes = fig.subplots(2, len(shown), sharex='row', squeeze=False)
    styles = cycle([dict(color=colour, linestyle=line) for line in ('-', '--', ':', '-.') for colour in PALETTE])
    for (name, curves), style in zip(runs.items(), styles, strict=False):
        start = min(points[0].wall_time for points in curves.values())
        for column, tag in enumerate(shown):
            points = curves.get(tag, [])
            steps, minutes = [p.step for p in points], [(p.wall_time - start) / 60 for p in points]
            for ax, x in zip(axes[:, column], (steps, minutes), strict=True):
                marker = '.' if tag.startswith('val/') or len(points) == 1 else ''
                ax.plot(x, [p.value for p in points], label=name, marker=marker, **style)
    for (row, column), ax in np.ndenumerate(axes):
        tag = shown[column]
        scale = 'log' if tag in ('train/loss', 'val/mse') else 'linear'
        ax.set(xlabel=('steps', 'minutes')[row], ylabel=CURVES[tag], yscale=scale)
        ax.tick_params(colors=TEXT, which='both')
        ax.grid(color=TEXT, alpha=0.2)
    fig.legend(handles=axes[0, 0].lines, loc='outside lower center', ncols=columns, frameon=False, fontsize=9)
    return _saved(fig, save_path)


@rc_context(STYLE)
def visualize_sweep(table: list[dict[str, float]], save_path: SavePath = None) -> Figure:
    """Heat maps of sweep()'s table: a column for each number of slots, a row for each number of iterations."""
    scores = [name for name in ('fg_ari', 'mse') if name in table[0]]
    K, T = (sorted({row[name] for row in table}) for name in ('num_slots', 'num_iterations'))
    fig = Figure(figsize=(len(scores) * (1.6 + 0.62 * len(K)), 1.3 + 0.42 * len(T)), layout='constrained')
    for ax, name in zip(np.atleast_1d(fig.subplots(1, len(scores))), scores, strict=True):
        title, cmap, digits = {'fg_ari': ('FG-ARI', 'viridis', 2), 'mse': ('MSE', 'viridis_r', 4)}[name]
        found = {(row['num_iterations'], row['num_slots']): row[name] for row in table}
        values = np.array([[found[t, k] for k in K] for t in T])
        drawn = ax.imshow(values, cmap=cmap, aspect='auto')
        for (i, j), value in np.ndenumerate(values):
            colour = 'black' if drawn.cmap(drawn.norm(value))[1] > 0.55 else 'white'
            ax.text(j, i, f'{value:.{digits}f}', ha='center', va='center', fontsize=9, color=colour)
        ax.set(title=title, xlabel='slots', ylabel='iterations')
        ax.set(xticks=range(len(K)), xticklabels=K, yticks=range(len(T)), yticklabels=T)
        ax.tick_params(colors=TEXT, length=0)
        ax.spines[:].set_visible(False)
    return _saved(fig, save_path)


# --- Animations ------------------------------------------------------------------------------


def animate_attention(attn: Tensor, images: Tensor, save_path: str | os.PathLike, index: int = 0) -> None:
    """Writes a GIF with one frame per iteration; arguments as in visualize_attention_evolution()."""
    _, rows = _attention_rows(attn, images, index)
    save_gif([_sheet([row], None, f'iteration {t}') for t, row in enumerate(rows, 1)], save_path)


def save_gif(figures: Iterable[Figure], save_path: str | os.PathLike, milliseconds: int = 600) -> None:
    """Writes figures of one size as an endless GIF; the last frame is shown three times as long. Raises OSError."""
    frames = []
    for fig in figures:
        fig.set_facecolor('white')
        canvas = FigureCanvasAgg(fig)
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())
    # One palette for all frames and no dithering: a colour does not flicker, and flat areas compress well. MAXCOVERAGE
    # includes rare colours; one step of k-means then includes frequent ones, such as the grey of the background.
    sample = np.concatenate(frames[:: max(1, len(frames) // 8)] + frames[-1:])
    palette = Image.fromarray(sample).quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    frames = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [milliseconds] * (len(frames) - 1) + [3 * milliseconds]
    frames[0].save(save_path, save_all=True, append_images=frames[1:], duration=durations, loop=0, comment=CREATOR)


# --- Operations on slots ---------------------------------------------------------------------


def match_slots(masks: Tensor, others: Tensor) -> Tensor:
    """Matches the slots of two sets of masks: order [B, K] such that others[b, order[b]] resembles masks[b].

    masks, others  [B, K, 1, H, W] or [B, K, H, W]

    Maximises the sum of IoUs (Hungarian algorithm); the IoU of soft masks is the sum of the minima divided by
    the sum of the maxima. Raises ValueError if the shapes differ.
    """
    if masks.shape != others.shape:
        raise ValueError(f'masks of {list(masks.shape)} cannot be matched with {list(others.shape)}')
    a, b = (x.detach().float().flatten(2).cpu() for x in (masks, others))  # [B, K, H * W]
    orders = []
    for x, y in zip(a, b, strict=True):
        minima = torch.minimum(x[:, None], y).sum(2)  # [K, K]
        iou = minima / (x.sum(1)[:, None] + y.sum(1) - minima + 1e-8)
        orders.append(torch.from_numpy(linear_sum_assignment(iou, maximize=True)[1]))
    return torch.stack(orders)


def reorder_slots(reference: Tensor, masks: Tensor, rgbs: Tensor) -> tuple[Tensor, Tensor]:
    """masks [B, K, 1, H, W] and rgbs [B, K, 3, H, W] in the order of the slots in `reference`, other masks."""
    order = match_slots(reference, masks).to(masks.device)[:, :, None, None, None]
    return masks.take_along_dim(order, 1), rgbs.take_along_dim(order, 1)


def remove(slots: Tensor, k: int) -> Tensor:
    """slots [K, D] without slot k: [K - 1, D]. The other slots fill its pixels when they are decoded."""
    return torch.cat([slots[:k], slots[k + 1 :]])


def paste(slots: Tensor, slot: Tensor) -> Tensor:
    """slots [K, D] and one more, `slot` [D]: [K + 1, D]."""
    return torch.cat([slots, slot[None]])


def largest_objects(masks: Tensor, number: int = 1) -> list[int]:
    """Indices of the slots of the largest objects, largest first, without the background: masks [K, 1, H, W]."""
    return slot_shares(masks).argsort(descending=True)[1 : 1 + number].tolist()


@torch.no_grad()
def visualize_edit(
    model: SlotAttentionAutoEncoder, slots: Sequence[Tensor], edit: str, save_path: SavePath = None, steps: int = 5,
    title: str | None = None,
) -> Figure:  # fmt: skip
    """One row per image: before the edit, the slots that it uses, and after it.

    slots  [B, K, D] from model(images), or a list of B tensors [K, D] with different K
    edit   one of EDITS; all but 'remove' take an object from the next image
    steps  of 'interpolate'

    Raises ValueError for an unknown edit, a single slot, or one image where two are needed.
    """
    if edit not in EDITS:
        raise ValueError(f'edit must be one of {", ".join(EDITS)}, not {edit!r}')
    if min(map(len, slots)) < 2 or (len(slots) < 2 and edit != 'remove'):
        raise ValueError(f'{edit} needs at least 2 slots and {1 if edit == "remove" else 2} images')

    def decode(slots: Tensor) -> tuple[Tensor, Tensor]:
        rgbs, masks = model.decode(slots[None])
        return rgbs[0], masks[0]  # [K, 3, H, W], [K, 1, H, W]

    def draw(slots: Tensor, title: str = '') -> Panel:
        rgbs, masks = decode(slots)
        return Panel(_pixels((rgbs * masks).sum(0)), title)

    def largest(slots: Tensor, title: str) -> tuple[int, Panel]:
        rgbs, masks = decode(slots)
        (k,) = largest_objects(masks)
        return k, Panel(_alone(rgbs, masks)[k], title)

    rows = []
    for i, ours in enumerate(slots):
        theirs = slots[(i + 1) % len(slots)]
        (k, mine), (l, next_object) = largest(ours, 'object'), largest(theirs, 'next object')
        image, next_image = draw(ours, 'image'), draw(theirs, 'next image')
        if edit == 'remove':
            row = [image, mine, draw(remove(ours, k), 'edited')]
        elif edit == 'copy':
            row = [image, next_image, next_object, draw(paste(ours, theirs[l]), 'edited')]
        elif edit == 'swap':
            edited, next_edited = paste(remove(ours, k), theirs[l]), paste(remove(theirs, l), ours[k])
            row = [image, next_image, mine, next_object, draw(edited, 'edited'), draw(next_edited, 'next edited')]
        else:
            blends = [torch.lerp(ours[k], theirs[l], weight) for weight in torch.linspace(0, 1, steps).tolist()]
            row = [image, mine, *(draw(paste(remove(ours, k), blend)) for blend in blends), next_object]
        rows.append(row)
    return _sheet(_titles_once(rows), None, title or f'{edit}: {EDITS[edit]}', save_path)


@torch.no_grad()
def sweep(
    model: SlotAttentionAutoEncoder, batch: dict[str, Tensor], num_slots: Iterable[int],
    num_iterations: Iterable[int], seed: int = 0,
) -> list[dict[str, float]]:  # fmt: skip
    """Mean scores of a batch for each number of slots and iterations.

    Returns a list of rows num_slots, num_iterations, mse and, if the batch has masks, fg_ari.
    """
    table = []
    for K, T in product(num_slots, num_iterations):
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


def slot_shares(masks: Tensor) -> Tensor:
    """Share of the image in which each slot is the strongest: masks [K, 1, H, W] or attn [K, h, w] -> [K]."""
    found = segmentation(masks.detach()[None]).flatten().cpu()
    return torch.bincount(found, minlength=len(masks)).float() / len(found)


def slot_order(masks: Tensor) -> list[int]:
    """Drawing order of the slots: by index, with the background, the largest one, last."""
    background = int(slot_shares(masks).argmax())
    return [k for k in range(len(masks)) if k != background] + [background]


def slot_colours_of(num_slots: int) -> np.ndarray:
    """Colours [K, 3] in [0, 1]: the palette, repeated in lighter tints."""
    index = np.arange(num_slots)
    return 1 - (1 - PALETTE[index % len(PALETTE)]) * 0.6 ** (index // len(PALETTE))[:, None]


def slot_colours(masks: Tensor) -> np.ndarray:
    """Colours [K, 3] in [0, 1] of the slots of masks [K, 1, H, W]: by index, the background's grey."""
    colours = slot_colours_of(len(masks))
    colours[slot_order(masks)[-1]] = BACKGROUND
    return colours


def _check(ndim: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim != ndim:
            raise ValueError(f'{name} must have {ndim} dimensions, not shape {list(tensor.shape)}')
        if tensor.shape[-1] != tensor.shape[-2]:
            raise ValueError(f'{name} must be square, not {tensor.shape[-2]} x {tensor.shape[-1]}')


def _channels_last(tensor: Tensor) -> np.ndarray:
    """[..., C, H, W] of any device and float type -> [..., H, W, C] float32."""
    return tensor.detach().float().cpu().movedim(-3, -1).numpy()


def _pixels(images: Tensor) -> np.ndarray:
    """[..., 3, H, W] in [-1, 1] -> [..., H, W, 3] in [0, 1]."""
    return ((_channels_last(images) + 1) / 2).clip(0, 1)


def _error(image: Tensor, recon: Tensor) -> np.ndarray:
    """Absolute difference of two images [3, H, W], averaged over the channels, as colours [H, W, 3]."""
    error = np.abs(_pixels(recon) - _pixels(image)).mean(axis=2)
    return colormaps['inferno']((ERROR_SCALE * error).clip(0, 1))[:, :, :3]


def _alone(rgbs: Tensor, masks: Tensor) -> np.ndarray:
    """Each slot on white: rgbs [K, 3, H, W], masks [K, 1, H, W] -> [K, H, W, 3]."""
    return 1 - _channels_last(masks) * (1 - _pixels(rgbs))


def _slot_panels(pictures: np.ndarray, masks: Tensor, named: bool = True) -> list[Panel]:
    """A panel for each slot's picture, of [K, H, W, 3], with its number, share and colour, in drawing order."""
    shares, colours = slot_shares(masks).tolist(), slot_colours(masks)
    panels = []
    for k in slot_order(masks):
        empty = shares[k] < EMPTY
        title = f'{k + 1} empty' if empty else f'{k + 1}: {100 * shares[k]:.1f} %'
        panels.append(Panel(pictures[k], title * named, colours[k], empty))
    return panels


def _overlay(image: Tensor, masks: Tensor, scale: int = 4) -> np.ndarray:
    """Grey image [3, H, W], tinted and outlined in the colours of the slots of masks [K, 1, H, W].

    Enlarged by `scale`, so that outlines are thinner than a pixel: [scale * H, scale * W, 3]. The image is grey
    because its colours would mix with those of the slots; the background is not tinted.
    """

    def enlarge(x: np.ndarray) -> np.ndarray:
        return x.repeat(scale, 0).repeat(scale, 1)

    labels = enlarge(segmentation(masks.detach()[None])[0].cpu().numpy())
    grey = enlarge(_pixels(image).mean(2, keepdims=True))
    padded = np.pad(labels, 1, mode='edge')
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    outline = np.any([labels != neighbour for neighbour in neighbours], axis=0)
    tint = np.where(outline, 1, 0.65) * (labels != slot_order(masks)[-1])
    return grey + tint[:, :, None] * (slot_colours(masks)[labels] - grey)


def _attention_rows(attn: Tensor, images: Tensor | None, index: int) -> tuple[Tensor, list[list[Panel]]]:
    """The attention of one image, [T, K, H, W], enlarged to the image if there is one, and a row per iteration.

    A row has the strongest slot and each slot's attention, in the order and colours of the last iteration.
    """
    attn = attn[None] if attn.ndim == 4 else attn
    _check(5, attn=attn)
    attn, ground = attn[index].detach().float().cpu(), np.zeros((1, 1, 1))
    if images is not None:
        _check(4, images=images)
        attn = F.interpolate(attn, images.shape[2:], mode='bilinear')
        ground = 0.45 * _pixels(images[index]).mean(2, keepdims=True)  # dark grey
    colours, order, rows = slot_colours(attn[-1]), slot_order(attn[-1]), []
    for maps, found in zip(attn.numpy(), segmentation(attn).numpy(), strict=True):
        heat = ground + maps[..., None] * (colours[:, None, None] - ground)  # [K, H, W, 3]
        rows.append([Panel(colours[found], 'strongest'), *(Panel(heat[k], f'slot {k + 1}', colours[k]) for k in order)])
    return attn, rows


def _titles_once(rows: list[list[Panel]]) -> list[list[Panel]]:
    """The same panels with titles in the first row only."""
    return rows[:1] + [[panel._replace(title='') for panel in row] for row in rows[1:]]


@rc_context(STYLE)
def _sheet(rows: list[list[Panel]], notes: list[str] | None, title: str | None, save_path: SavePath = None) -> Figure:
    """A grid of panels, each below its title and the colour of its slot, with a note to the left of each row."""
    dpi = STYLE['figure.dpi']
    side = max(rows[0][0].pixels.shape)
    panel = max(1, round(PANEL_PIXELS / side)) * side / dpi  # inches; whole dots per pixel keep panels crisp
    gap, strip, left, top = 0.1, 0.27, 1.3 if notes else 0.08, 0.36 if title else 0.04
    strips = [strip if any(p.title for p in row) else 0.1 for row in rows]
    tops = np.cumsum([top] + [s + panel + 0.04 for s in strips])
    natural = left + (panel + gap) * max(map(len, rows))
    width = max(natural, 0.13 * len(title or ''))
    left += (width - natural) / 2
    fig = Figure(figsize=(width, tops[-1] + 0.04))
    ax = fig.add_axes((0, 0, 1, 1))
    for i, row in enumerate(rows):
        y = tops[i] + strips[i]
        for j, (pixels, name, colour, dim) in enumerate(row):
            x = left + j * (panel + gap)
            alpha = 0.35 if dim else 1
            # interpolation='none' embeds the original pixels in vector files.
            ax.imshow(pixels, extent=(x, x + panel, y + panel, y), interpolation='none', vmin=0, vmax=1, alpha=alpha)
            ax.text(x + panel / 2, y - 0.07, name, ha='center', va='bottom', fontsize=12, alpha=alpha)
            if colour is not None:
                ax.add_patch(Rectangle((x, y - 0.06), panel, 0.05, color=colour, alpha=alpha, linewidth=0))
            ax.add_patch(Rectangle((x, y), panel, panel, fill=False, edgecolor=TEXT, linewidth=0.5, alpha=alpha))
        if notes:
            ax.text(left - 0.1, y + panel / 2, notes[i], ha='right', va='center', fontsize=12)
    if title:
        # A title may be a file name: no formula, and no character that cannot be drawn.
        title = ''.join(c if c.isprintable() else '?' for c in title)
        ax.text(width / 2, 0.2, title, ha='center', va='center', fontsize=14, weight='bold', parse_math=False)
    ax.set(xlim=(0, width), ylim=(tops[-1] + 0.04, 0), aspect='equal')
    ax.set_axis_off()
    return _saved(fig, save_path)


@rc_context(STYLE)
def _saved(fig: Figure, save_path: SavePath) -> Figure:
    if save_path is not None:
        metadata = {'Creator': CREATOR} if Path(save_path).suffix[1:] in FORMATS else None
        fig.savefig(save_path, metadata=metadata)
    return fig


# --- Own pictures ----------------------------------------------------------------------------


def crop_box(width: int, height: int, dataset_type: str | None) -> tuple[float, float, float, float]:
    """The square of a picture that dataset.read_picture() keeps: left, top, right and bottom in pixels.

    The centre. Of landscape pictures for a CLEVR model it is the paper's crop, rows 29 to 221 of 240; others are
    taken to be cropped already.
    """
    side, middle = min(width, height), height / 2
    if dataset_type == 'clevr6' and width > height:
        side, middle = height * 192 / 240, height * 125 / 240
    return (width - side) / 2, middle - side / 2, (width + side) / 2, middle + side / 2


def save_segmentation(
    masks: Tensor, save_path: str | os.PathLike, size: tuple[int, int], box: tuple[float, float, float, float]
) -> None:
    """Writes the strongest slot at each pixel of a picture as a PNG with a palette.

    masks  [K, 1, H, W]
    size   width and height of the picture, pixels
    box    the part of the picture that the masks cover, see crop_box()

    Values: 0 for the background's slot, the number in the figures for the others, IGNORE_LABEL outside of the box.
    """
    K, left, top = len(masks), round(box[0]), round(box[1])
    right, bottom = (start + max(1, round(box[2] - box[0])) for start in (left, top))  # a square
    enlarged = F.interpolate(masks.transpose(0, 1), (bottom - top, right - left), mode='bilinear')  # [1, K, h, w]
    numbers = torch.arange(1, K + 1)
    numbers[slot_order(masks)[-1]] = 0
    labels = torch.full(size[::-1], IGNORE_LABEL, dtype=torch.uint8)
    labels[top:bottom, left:right] = numbers[segmentation(enlarged)[0]]
    palette = np.ones((256, 3))
    palette[: K + 1] = BACKGROUND, *slot_colours_of(K)
    image = Image.fromarray(labels.numpy())
    image.putpalette((255 * palette).round().astype(np.uint8).tobytes())
    image.save(save_path)


# --- Command line ----------------------------------------------------------------------------


@dataclass
class Job:
    """A model, its data and the paths of its figures."""

    model: SlotAttentionAutoEncoder
    data: dict  # arguments of create_dataset()
    step: int  # of the training
    args: argparse.Namespace
    paths: list[Path] = field(default_factory=list)  # of the figures, see path()

    def load_batch(self) -> dict[str, Tensor]:
        """The pictures of --image, or validation images of the data set of the training."""
        if self.args.image:
            return self.read_images(self.args.image)
        try:
            dataset = create_dataset(split='val', size=self.args.num_images, **self.data)
        except (TypeError, ArithmeticError) as error:  # of another version
            raise CheckpointError(f'the data of the checkpoint, {self.data}, cannot be created: {error}') from error
        return dataset.__getitems__(list(range(len(dataset))))

    def read_images(self, paths: Iterable[Path]) -> dict[str, Tensor]:
        """Pictures of any size as a batch. Raises DataError."""
        kind = self.data.get('dataset_type')
        return to_batch(np.stack([read_picture(path, self.model.config.resolution, kind) for path in paths]))

    def run_model(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
        """recons, masks, rgbs, slots and attn of images [B, 3, H, W].

        slots is a list of B tensors [K, D]. With --search, recons, masks, rgbs and slots are those after refine();
        attn is the network's, and slots holds the present ones only.
        """
        args, model = self.args, self.model
        generator = torch.Generator().manual_seed(args.seed)
        num_slots = args.num_slots or model.config.num_slots
        initial = model.slot_attention.initial_slots(len(images), num_slots, generator)
        slots, attn = model.encode(images, initial, num_iterations=args.num_iterations)
        if args.search:
            slots = refine(model, images, slots)
        rgbs, masks = model.decode(slots)
        present = [s[mask.amax((1, 2, 3)) > 0] for s, mask in zip(slots, masks, strict=True)]
        return (rgbs * masks).sum(1), masks, rgbs, present, attn

    def title(self, *parts: str) -> str | None:
        """The title of a figure, which tells whether the slots were refined."""
        return ', '.join([*parts, *['refined slots'] * self.args.search]) or None

    def path(self, name: str) -> Path:
        """Adds a file in the output folder to `paths`; without a suffix it gets that of --format."""
        self.args.output_dir.mkdir(parents=True, exist_ok=True)
        self.paths.append(self.args.output_dir / (name if Path(name).suffix else f'{name}.{self.args.format}'))
        return self.paths[-1]


def render_images(job: Job) -> None:
    """Slots, and attention and decomposition of each image; the segmentations of the pictures of --image."""
    batch = job.load_batch()
    images, labels = batch['image'], batch.get('mask')
    recons, masks, rgbs, _, attn = job.run_model(images)
    visualize_slots(images, recons, masks, job.path('slots'), rgbs, labels, job.title())
    for i, image in enumerate(images):
        visualize_attention_evolution(attn, job.path(f'attention_evolution_{i}'), images, i)
        path, label = job.path(f'decomposition_{i}'), None if labels is None else labels[i]
        visualize_slot_decomposition(image, recons[i], masks[i], path, rgbs[i], label, job.title())
    for i, path in enumerate(job.args.image or ()):
        (width, height), R = open_picture(path).size, images.shape[-1]
        box = crop_box(width, height, job.data.get('dataset_type'))
        save_segmentation(masks[i], job.path(f'{path.stem}_{i}_mask.png'), (R, R), (0, 0, R, R))
        save_segmentation(masks[i], job.path(f'{path.stem}_{i}_full_mask.png'), (width, height), box)


def render_edits(job: Job) -> None:
    """One figure per edit, of the images of which the model keeps more than one slot."""
    all_slots = job.run_model(job.load_batch()['image'])[3]
    slots = [s for s in all_slots if len(s) > 1]
    if len(slots) < 2:
        raise ValueError('--edit needs two images of which the model keeps two slots; give other images or more slots')
    if len(slots) < len(all_slots):
        print(f'left out {len(all_slots) - len(slots)} images of which the model kept one slot: nothing to edit')
    for edit in EDITS:
        title = job.title(f'{edit}: {EDITS[edit]}')
        visualize_edit(job.model, slots, edit, job.path(f'edit_{edit}'), title=title)


def render_attention_gifs(job: Job) -> None:
    images = job.load_batch()['image']
    attn = job.run_model(images)[4]
    for i in range(len(images)):
        animate_attention(attn, images, job.path(f'attention_evolution_{i}.gif'), i)


def render_emergence(jobs: list[Job]) -> None:
    """A GIF of the same images with the models of several steps."""
    batch = jobs[-1].load_batch()
    frames = [(job, batch, f'step {job.step:,}') for job in reversed(jobs)]  # slots are numbered as in the last one
    save_gif(draw_sequence(frames)[::-1], jobs[-1].path('emergence.gif'))


def render_frames(job: Job) -> None:
    """A GIF of the pictures in --frames, in the natural order of their names: frame2 before frame10."""
    frames, folder = [], job.args.frames
    if not folder.is_dir():
        raise DataError(f'no folder {folder}; --frames needs a folder of pictures')
    for path in find_pictures(folder):
        try:
            frames.append((job, job.read_images([path]), job.title(path.name[:24])))  # frames must have one size
        except DataError as error:
            print(f'skipped: {error}', file=sys.stderr)
    if not frames:
        raise DataError(f'no pictures in {folder}; --frames needs a folder with {", ".join(PICTURES)} files')
    save_gif(draw_sequence(frames), job.path('frames.gif'), milliseconds=200)


def draw_sequence(frames: Iterable[tuple[Job, dict[str, Tensor], str]]) -> list[Figure]:
    """A sheet of slots for each job, batch and title; slots are numbered as the most similar ones of the previous."""
    figures, previous = [], None
    for job, batch, title in frames:
        recons, masks, rgbs, *_ = job.run_model(batch['image'])
        if previous is not None:
            masks, rgbs = reorder_slots(previous, masks, rgbs)
        previous = masks
        figures.append(
            visualize_slots(batch['image'], recons, masks, None, rgbs, batch.get('mask'), title, empty_slots=True)
        )
    return figures


def render_sweep(job: Job) -> None:
    config = job.model.config
    num_slots = range(2, config.num_slots + 5)
    num_iterations = sorted({1, 2, 3, 5, 8, 12, 16, 20, config.num_iterations})
    table = sweep(job.model, job.load_batch(), num_slots, num_iterations, job.args.seed)
    with open(job.path('sweep.csv'), 'w', newline='') as file:
        writer = csv.DictWriter(file, table[0].keys())
        writer.writeheader()
        writer.writerows(table)
    visualize_sweep(table, job.path('sweep'))


def remove_stale(paths: list[Path]) -> None:
    """Deletes the figures NAME_N with higher numbers than in `paths`: those of an earlier run with more images."""
    for path in paths:
        name, _, number = path.stem.rpartition('_')
        for n in count(int(number) + 1) if number.isdecimal() else ():
            stale = path.with_stem(f'{name}_{n}')
            if stale in paths or not stale.is_file() or CREATOR.encode() not in stale.read_bytes():
                break  # the next figure of this run, or not a figure of this script
            stale.unlink()


def open_checkpoint(path: Path | None, args: argparse.Namespace) -> Job:
    """The model of a checkpoint file or the folder of a run. Raises CheckpointError.

    Default: --pretrained, else the newest file under --log_dir, else the weights of shapes in PRETRAINED.
    """
    path = path or PRETRAINED.get(args.pretrained)
    if path is None:
        path = max(args.log_dir.rglob('*.pth'), key=lambda file: file.stat().st_mtime, default=None)
    if path is None:
        if 'shapes' not in PRETRAINED:
            raise CheckpointError(f'no checkpoint under {args.log_dir}; python train.py writes one')
        path = PRETRAINED['shapes']
        print(f'no checkpoint under {args.log_dir}: drawing the weights of shapes that come with the repository')
    path = next((file for file in (path / 'last.pth', path / 'checkpoints/last.pth') if file.is_file()), path)
    print(f'rendering {path}')
    checkpoint = load_checkpoint(path)
    model = build_model(checkpoint, path)
    try:
        data = dict(checkpoint['training'].get('data', {}))  # empty if the checkpoint was written by other code
        step = int(checkpoint['training'].get('progress', {}).get('step', 0))
    except (TypeError, ValueError, AttributeError) as error:
        raise damaged(path, error) from error
    if not data and not (args.image or args.frames):
        raise CheckpointError(f'{path} does not say what data it was trained on; give pictures with --image')
    if args.mask_dir is None and args.data_dir is not None and args.data_dir != Path(data.get('data_dir') or ''):
        data['mask_dir'] = None  # of other pictures
    for name in ('data_dir', 'mask_dir'):
        if (value := getattr(args, name)) is not None:
            source = data.get('dataset_type')
            if name not in SOURCE_FLAGS.get(source, ()):
                raise CheckpointError(f'--{name} has no effect: {path} was trained on {source}; leave it out')
            data[name] = str(value) if value else None
    return Job(model, data, step, args)


def create_parser() -> Parser:
    parser = Parser(
        prog='visualize.py', usage='python visualize.py [flags]', allow_abbrev=False,
        description='Draws the slots of a checkpoint for validation images or your own pictures.',
    )  # fmt: skip

    def add(group, name, help, **kwargs):
        default = '' if kwargs.get('default') is None else f' (default: {kwargs["default"]})'
        group.add_argument(f'--{name}', help=help + default, **kwargs)

    # fmt: off
    group = parser.add_argument_group('figures (default: slots, attention and decomposition of each image)')
    modes = group.add_mutually_exclusive_group()
    add(modes, 'edit', 'images with objects removed, copied, swapped and interpolated', action='store_true')
    add(modes, 'gif', 'GIFs of the attention; if --checkpoint is a folder, a GIF of the slots at each saved step',
        action='store_true')
    add(modes, 'frames', 'a GIF of the pictures in this folder', type=Path, metavar='FOLDER')
    add(modes, 'sweep', 'scores for each number of slots and iterations, also as CSV', action='store_true')
    add(modes, 'training', 'training curves of all runs under --log_dir', action='store_true')
    group = parser.add_argument_group('input')
    add(group, 'checkpoint', 'file or folder of a run (default: the newest under --log_dir)', type=Path, metavar='PATH')
    add(group, 'pretrained', "weights that come with the repository, by data set; paper_: of the paper's architecture",
        choices=PRETRAINED)
    add(group, 'log_dir', 'folder of the runs', type=Path, default=Path('logs'), metavar='PATH')
    add(group, 'image', 'pictures to draw instead of validation images; their segmentations are also written, at the '
        'size of the pictures (0: background, 255: not seen by the model)', type=Path, nargs='+', metavar='PATH')
    add(group, 'data_dir', 'folder of the data (default: as in training)', type=Path, metavar='PATH')
    add(group, 'mask_dir', 'folder of the masks of your own pictures (default: as in training, without --data_dir)',
        metavar='PATH')
    add(group, 'num_images', 'number of validation images (default: 8; with --sweep 32)', type=int, metavar='N')
    add(group, 'num_slots', 'number of slots (default: of the checkpoint)', type=int, metavar='N')
    add(group, 'num_iterations', 'iterations of Slot Attention (default: of the checkpoint)', type=int, metavar='N')
    add(group, 'search', 'improve the slots of each image by gradient descent on its reconstruction error',
        action='store_true')
    add(group, 'seed', 'seed of the initial slots', type=int, default=0, metavar='N')
    group = parser.add_argument_group('output')
    add(group, 'output_dir', 'folder of the figures', type=Path, default=Path('visualizations'), metavar='PATH')
    add(group, 'format', 'file format of the figures', default='png', choices=FORMATS)
    # fmt: on
    return parser


# Flags that have no effect with another flag.
UNUSED = {
    'gif': ('search', 'format'),
    'frames': ('image', 'data_dir', 'mask_dir', 'num_images', 'format'),
    'sweep': ('num_slots', 'num_iterations', 'search'),
    'training': (
        'checkpoint', 'pretrained', 'image', 'data_dir', 'mask_dir', 'num_images', 'num_slots', 'num_iterations',
        'search', 'seed',
    ),
    'checkpoint': ('log_dir', 'pretrained'),
    'pretrained': ('log_dir',),
    'image': ('data_dir', 'mask_dir', 'num_images'),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a mistake ends the program with one line and status 2."""
    parser = create_parser()
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    for flag, names in UNUSED.items():
        for name in names:
            if flag in given and name in given:
                parser.error(f'--{name} has no effect with --{flag}; leave it out')
    limits = {'num_images': (1, 1000), 'num_slots': (1, 254), 'num_iterations': (1, 1000), 'seed': (0, 2**63 - 1)}
    for name in limits.keys() & given.keys():
        lowest, highest = limits[name]
        if not lowest <= given[name] <= highest:
            parser.error(f'--{name} must be at least {lowest} and at most {highest}, not {given[name]}')
    if args.num_images is None:
        args.num_images = 32 if args.sweep else 8
    if args.edit and len(args.image or range(args.num_images)) < 2:
        parser.error('--edit needs at least two images')
    return args


@torch.no_grad()
def render(args: argparse.Namespace) -> list[Path]:
    """Writes the figures and returns their paths. Raises ValueError and OSError."""
    if args.training:
        folders = sorted({file.parent for file in args.log_dir.rglob('events.out.tfevents.*')}, key=natural_key)
        if not folders:
            command = f'python train.py --log_dir {shlex.quote(str(args.log_dir))}'
            raise DataError(f'no training curves under {args.log_dir}; {command} writes some')
        args.output_dir.mkdir(parents=True, exist_ok=True)
        path = args.output_dir / f'training.{args.format}'
        visualize_training(folders, path)
        return [path]
    if args.gif and args.checkpoint is not None and args.checkpoint.is_dir():
        folder = args.checkpoint / 'checkpoints' if (args.checkpoint / 'checkpoints').is_dir() else args.checkpoint
        files = [*folder.glob('checkpoint_epoch_*.pth'), *folder.glob('last.pth')]
        if not files:
            raise CheckpointError(f'no checkpoints in {args.checkpoint}; python train.py --save_every 1 writes some')
        jobs = {job.step: job for job in (open_checkpoint(file, args) for file in files)}  # one for each step
        jobs = [jobs[step] for step in sorted(jobs)]
        render_emergence(jobs)
        return jobs[-1].paths
    job = open_checkpoint(args.checkpoint, args)
    modes = {'edit': render_edits, 'gif': render_attention_gifs, 'frames': render_frames, 'sweep': render_sweep}
    next((mode for flag, mode in modes.items() if getattr(args, flag)), render_images)(job)
    remove_stale(job.paths)
    return job.paths


def main(args: argparse.Namespace) -> int:
    """Draws and prints the paths of the figures; returns the exit status. A user's mistake gives one line and 2."""
    try:
        for path in render(args):
            print(path)
    except (ValueError, OSError) as error:
        print(f'visualize.py: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(parse_args()))
