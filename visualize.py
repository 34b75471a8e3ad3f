"""Draws the slots of a model: figure functions, and a script that renders a checkpoint.

    python visualize.py                                    # the checkpoint with the most steps under logs/
    python visualize.py --checkpoint logs/checkpoints/best_model.pth --num_images 4
    python visualize.py --search                           # slots refined by gradient descent
    python visualize.py --image a.jpg b.png                # your own pictures, and their segmentations
    python visualize.py --edit                             # remove, copy, swap and interpolate objects
    python visualize.py --gif                              # attention, iteration by iteration
    python visualize.py --gif --checkpoint logs            # the slots at each saved training step
    python visualize.py --frames folder                    # a GIF of a sequence of pictures
    python visualize.py --sweep                            # scores for each number of slots and iterations
    python visualize.py --training                         # FG-ARI of all runs over the minutes of training

    from visualize import visualize_slots
    fig = visualize_slots(images, recons, masks, save_path='results.png')

Figure functions take tensors (images in [-1, 1], shapes as in slot_attention.py) and return a matplotlib Figure,
which is saved if `save_path` is given (.png, .svg or .pdf). It does not depend on the user's matplotlib settings. A
slot has the same number and colour in every panel. The background's slot, the largest, is grey and drawn last; slots
that win less than 0.2 % of the image are left out or dimmed. Figures are transparent, with grey text that is readable
on light and dark pages.
"""

import argparse
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':  # before the other imports, which take seconds

    def exit_on_interrupt(*_):
        print('visualize.py: interrupted', file=sys.stderr)
        sys.exit(130)

    signal.signal(signal.SIGINT, exit_on_interrupt)

if 'matplotlib' not in sys.modules and (backend := os.environ.pop('MPLBACKEND', None)):
    # Its import fails if this names a backend that is not installed, as in `!python visualize.py` in a notebook.
    import matplotlib

    os.environ['MPLBACKEND'] = backend
    with suppress(ValueError):
        matplotlib.rcParams['backend'] = backend

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from dataset import (  # isort: skip
    DATA_FLAGS, IGNORE, PICTURES, SOURCES, DataError, Parser, create_dataset, crop_box, find_pictures, natural_key,
    open_picture, plain_output, read_picture, to_batch,
)  # fmt: skip
from slot_attention import (  # isort: skip
    PRETRAINED, CheckpointError, SlotAttentionAutoEncoder, adjusted_rand_index, build_model, damaged, fg_ari,
    find_checkpoint, load_checkpoint, newest_checkpoint, refine, segmentation,
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
CURVES = {'val/fg_ari': 'FG-ARI', 'val/mse': 'MSE', 'train/loss': 'training loss'}  # the first that a run has is drawn
LINES = [dict(marker=m, linestyle=l, color=c) for m, l, c in product('.x^sv+D*', ('-', '--', ':', '-.'), PALETTE)]
EDITS = {
    'remove': 'the largest object is removed',
    'copy': 'the largest object of the next image is added',
    'swap': 'the largest objects of two images change places',
    'interpolate': 'the largest object turns into that of the next image',
}


# --- Figures ---------------------------------------------------------------------------------

styled = style.context(['default', STYLE])  # a decorator: matplotlib's defaults and STYLE, not the user's settings


class Drawing(Figure):
    """A Figure that is drawn and saved in STYLE, and that a notebook shows."""

    draw, savefig = styled(Figure.draw), styled(Figure.savefig)

    def _repr_png_(self) -> bytes:
        self.savefig(buffer := io.BytesIO())
        return buffer.getvalue()


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
        rows.append([*map(Panel, pixels, titles), *_slot_panels(_alone(rgb, mask), mask, empty_slots=empty_slots)])
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
    order, sums = slot_order(masks), np.empty_like(alone)
    sums[order] = 1 + np.cumsum(alone[order] - 1, axis=0)  # on white, in drawing order
    rows = [
        [Panel(_pixels(image), 'input'), *_slot_panels(1 - alpha * (1 - colours[:, None, None]), masks)],
        [Panel(_pixels(recon), 'reconstruction'), *_slot_panels(alone, masks, named=False)],
        [Panel(_error(image, recon), 'error'), *_slot_panels(sums.clip(0, 1), masks, named=False)],
    ]
    if labels is not None:
        score = fg_ari(labels.reshape(-1, *labels.shape[-2:])[:1].cpu(), masks[None].detach().cpu()).item()
        title = f'{title}: FG-ARI {score:.3f}' if title else f'FG-ARI {score:.3f}'
    return _sheet(rows, ['masks', 'slots\nalone', 'running\nsum'], title, save_path)


@styled
def visualize_training(log_dirs: Iterable[str | os.PathLike], save_path: SavePath = None) -> Figure:
    """Validation FG-ARI of several runs over the minutes of training, without pauses (see read_curve).

    If no run has an FG-ARI, as without masks, the validation MSE takes its place, or else the training loss.

    log_dirs  folders of TensorBoard files, one per run

    Raises ValueError if no folder has curves.
    """
    runs = {folder: EventAccumulator(str(folder), size_guidance={'scalars': 0}).Reload() for folder in log_dirs}
    tags = {tag for run in runs.values() for tag in run.Tags()['scalars'] if run.Scalars(tag)}  # none after a restart
    shown = next((tag for tag in CURVES if tag in tags), None)
    if shown is None:
        raise ValueError(f'no training curves in {", ".join(map(str, runs))}')
    fig = Drawing(figsize=(8, 4.2 + 0.2 * len(runs)), layout='constrained')
    ax = fig.add_subplot()
    for line, (folder, run) in zip(cycle(LINES), runs.items(), strict=False):
        minutes, values = read_curve(run, shown)
        end = f'{values[-1]:#.3g} after {minutes[-1]:.1f} minutes' if values else f'no {CURVES[shown]} yet'
        ax.plot(minutes, values, label=_printable(f'{folder}: {end}').replace('$', r'\$'), **line)
    ax.set(xlabel='minutes', ylabel=CURVES[shown], yscale='linear' if shown == 'val/fg_ari' else 'log')
    ax.tick_params(colors=TEXT, which='both')
    ax.grid(color=TEXT, alpha=0.2)
    fig.legend(loc='outside lower left', frameon=False, fontsize=9)
    return _saved(fig, save_path)


def read_curve(run: EventAccumulator, tag: str) -> tuple[list[float], list[float]]:
    """Minutes since the start of a run, and values of a curve; empty if the run has no such curve.

    A gap between two logged steps of more than a minute and more than 20 times the median gap is a pause, as between
    a run and its continuation by --resume. It counts as the median gap.
    """
    logged = run.Tags()['scalars']
    points = {name: run.Scalars(name) for name in ('train/loss', tag) if name in logged}
    if not points.get(tag):
        return [], []
    times = {point.step: point.wall_time for curve in points.values() for point in curve}
    gaps = np.diff([run.FirstEventTimestamp(), *(times[step] for step in sorted(times))])
    gaps[1:][gaps[1:] > max(60, 20 * np.median(gaps))] = np.median(gaps)
    minutes = dict(zip(sorted(times), gaps.cumsum() / 60, strict=True))
    return [minutes[point.step] for point in points[tag]], [point.value for point in points[tag]]


@styled
def visualize_sweep(table: list[dict[str, float]], save_path: SavePath = None) -> Figure:
    """Heat map of scores over the number of slots and iterations: of the FG-ARI, or without masks of the MSE.

    table  rows with num_slots, num_iterations, mse and perhaps fg_ari, for each combination
    """
    name = 'fg_ari' if 'fg_ari' in table[0] else 'mse'
    title, cmap, digits = {'fg_ari': ('FG-ARI', 'viridis', 2), 'mse': ('MSE', 'viridis_r', 4)}[name]
    K, T = (sorted({row[name] for row in table}) for name in ('num_slots', 'num_iterations'))
    found = {(row['num_iterations'], row['num_slots']): row[name] for row in table}
    fig = Drawing(figsize=(1.6 + 0.62 * len(K), 1.3 + 0.42 * len(T)), layout='constrained')
    ax = fig.add_subplot(title=title, xlabel='slots', ylabel='iterations', frame_on=False)
    drawn = ax.imshow([[found[t, k] for k in K] for t in T], cmap=cmap, aspect='auto')
    for (i, t), (j, k) in product(enumerate(T), enumerate(K)):
        colour = 'black' if drawn.cmap(drawn.norm(found[t, k]))[1] > 0.55 else 'white'
        ax.text(j, i, f'{found[t, k]:.{digits}f}', ha='center', va='center', color=colour)
    ax.set(xticks=range(len(K)), xticklabels=K, yticks=range(len(T)), yticklabels=T)
    ax.tick_params(colors=TEXT, length=0)
    return _saved(fig, save_path)


def animate_attention(attn: Tensor, images: Tensor, save_path: str | os.PathLike, index: int = 0) -> None:
    """Writes a GIF with one frame per iteration; arguments as in visualize_attention_evolution()."""
    _, rows = _attention_rows(attn, images, index)
    save_gif([_sheet([row], None, f'iteration {t}') for t, row in enumerate(rows, 1)], save_path)


def save_gif(figures: Iterable[Figure], save_path: str | os.PathLike, milliseconds: int = 600) -> None:
    """Writes figures of one size as an endless GIF; the last frame is shown three times as long.

    Raises ValueError for fewer than two figures, and OSError.
    """
    frames = []
    for fig in figures:
        fig.set_facecolor('white')
        canvas = FigureCanvasAgg(fig)
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())
    if len(frames) < 2:
        raise ValueError(f'{save_path} needs at least two frames, not {len(frames)}')
    # One palette for all frames and no dithering: a colour does not flicker, and flat areas compress well. MAXCOVERAGE
    # includes rare colours; one step of k-means then includes frequent ones, such as the grey of the background.
    sample = np.concatenate(frames[:: max(1, len(frames) // 8)] + frames[-1:])
    palette = Image.fromarray(sample).quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    frames = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [milliseconds] * (len(frames) - 1) + [3 * milliseconds]
    frames[0].save(save_path, save_all=True, append_images=frames[1:], duration=durations, loop=0, comment=CREATOR)


@torch.no_grad()
def visualize_edit(
    model: SlotAttentionAutoEncoder, slots: Sequence[Tensor], edit: str, save_path: SavePath = None
) -> Figure:
    """One row per image: before the edit, the slots that it uses, and after it.

    slots  [B, K, D] from model(images), or a list of B tensors [K, D] with different K
    edit   one of EDITS; all but 'remove' take an object from the next image

    Raises ValueError for an unknown edit, a single slot, or one image where two are needed.
    """
    if edit not in EDITS:
        raise ValueError(f'edit must be one of {", ".join(EDITS)}, not {edit!r}')
    if min(map(len, slots)) < 2 or (len(slots) < 2 and edit != 'remove'):
        raise ValueError(f'{edit} needs at least 2 slots and {1 if edit == "remove" else 2} images')

    def draw(title: str, *parts: Tensor) -> Panel:
        rgbs, masks = model.decode(torch.cat(parts)[None])
        return Panel(_pixels((rgbs * masks).sum(1)[0]), title)

    scenes = []  # of each image: its slots without the largest object, the object's slot [1, D], and its picture
    for image in slots:
        rgbs, masks = model.decode(image[None])
        k = slot_shares(masks[0]).argsort(descending=True)[1].item()  # the background's slot comes first
        scenes.append((torch.cat([image[:k], image[k + 1 :]]), image[k : k + 1], _alone(rgbs[0], masks[0])[k]))
    rows = []
    for i, (rest, mine, picture) in enumerate(scenes):
        next_rest, theirs, next_picture = scenes[(i + 1) % len(scenes)]
        before, next_before = draw('image', rest, mine), draw('next image', next_rest, theirs)
        alone, next_alone = Panel(picture, 'object'), Panel(next_picture, 'next object')
        if edit == 'remove':
            row = [before, alone, draw('edited', rest)]
        elif edit == 'copy':
            row = [before, next_before, next_alone, draw('edited', rest, mine, theirs)]
        elif edit == 'swap':
            edited, next_edited = draw('edited', rest, theirs), draw('next edited', next_rest, mine)
            row = [before, next_before, alone, next_alone, edited, next_edited]
        else:
            blends = [draw(f'{share:.0%}', rest, torch.lerp(mine, theirs, share)) for share in (0, 0.25, 0.5, 0.75, 1)]
            row = [before, alone, *blends, next_alone]
        rows.append(row)
    return _sheet(_titles_once(rows), None, f'{edit}: {EDITS[edit]}', save_path)


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


def slot_colours(masks: Tensor) -> np.ndarray:
    """Colours [K, 3] in [0, 1] of the slots of masks [K, 1, H, W]: the palette, then lighter tints; background grey."""
    index = np.arange(len(masks))
    colours = 1 - (1 - PALETTE[index % len(PALETTE)]) * 0.6 ** (index // len(PALETTE))[:, None]
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


def _slot_panels(pictures: np.ndarray, masks: Tensor, named: bool = True, empty_slots: bool = False) -> list[Panel]:
    """A panel for each slot's picture, of [K, H, W, 3], with its number, share and colour, in drawing order."""
    shares, colours, panels = slot_shares(masks).tolist(), slot_colours(masks), []
    for k in slot_order(masks):
        empty = shares[k] < EMPTY
        title = f'{k + 1} empty' if empty else f'{k + 1}: {100 * shares[k]:.1f} %'
        if empty_slots or not empty:
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


@styled
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
    fig = Drawing(figsize=(width, tops[-1] + 0.04))
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
        title = _printable(title)
        ax.text(width / 2, 0.2, title, ha='center', va='center', fontsize=14, weight='bold', parse_math=False)
    ax.set(xlim=(0, width), ylim=(tops[-1] + 0.04, 0), aspect='equal')
    ax.set_axis_off()
    return _saved(fig, save_path)


def _printable(text: str) -> str:
    """A text without characters that cannot be drawn, which file names may have."""
    return ''.join(c if c.isprintable() else '?' for c in text)


def _saved(fig: Figure, save_path: SavePath) -> Figure:
    if save_path is not None:
        metadata = {'Creator': CREATOR} if Path(save_path).suffix[1:] in FORMATS else None
        fig.savefig(save_path, metadata=metadata)
    return fig


def save_segmentation(masks: Tensor, save_path: str | os.PathLike, size: Sequence[int], box: Sequence[float]) -> None:
    """Writes the strongest slot at each pixel of a picture as a PNG with a palette.

    masks  [K, 1, H, W]
    size   width and height of the picture, pixels
    box    the part of the picture that the masks cover, see dataset.crop_box()

    Values: 0 for the background's slot, the number in the figures for the others, IGNORE outside of the box.
    """
    K, left, top = len(masks), round(box[0]), round(box[1])
    right, bottom = (start + round(box[2] - box[0]) for start in (left, top))  # a square
    enlarged = F.interpolate(masks.transpose(0, 1), (bottom - top, right - left), mode='bilinear')  # [1, K, h, w]
    numbers = torch.arange(1, K + 1)
    numbers[slot_order(masks)[-1]] = 0
    labels = torch.full(size[::-1], IGNORE, dtype=torch.uint8)
    labels[top:bottom, left:right] = numbers[segmentation(enlarged)[0]]
    palette = np.ones((256, 3))
    palette[: K + 1] = BACKGROUND, *slot_colours(masks)
    image = Image.fromarray(labels.numpy())
    image.putpalette((255 * palette).round().astype(np.uint8).tobytes())
    metadata = PngInfo()
    metadata.add_text('Creator', CREATOR)
    image.save(save_path, pnginfo=metadata)


# --- Command line ----------------------------------------------------------------------------


@dataclass
class Job:
    """A model, its data and the flags of the script."""

    model: SlotAttentionAutoEncoder
    data: dict  # arguments of create_dataset()
    step: int  # of the training
    args: argparse.Namespace

    def load_batch(self) -> dict[str, Tensor]:
        """The pictures of --image, or validation images of the data set of the training."""
        if self.args.image:
            return self.read_images(self.args.image)
        try:
            dataset = create_dataset(split='val', size=self.args.num_images, **self.data)
        except (TypeError, ArithmeticError) as error:  # of another version
            raise CheckpointError(f'the data of the checkpoint, {self.data}, cannot be drawn: {error}') from error
        return dataset.__getitems__(list(range(len(dataset))))

    def read_images(self, paths: Iterable[Path]) -> dict[str, Tensor]:
        """Pictures of any size as a batch. Raises DataError."""
        kind = self.data.get('dataset_type', 'images')
        return to_batch(np.stack([read_picture(path, self.model.config.resolution, kind) for path in paths]))

    def initial_slots(self, batch_size: int) -> Tensor:
        """[B, K, D], from the same noise in every call."""
        num_slots, generator = self.args.num_slots or self.model.slot_attention.num_slots, torch.Generator()
        return self.model.slot_attention.initial_slots(batch_size, num_slots, generator.manual_seed(self.args.seed))

    def run_model(self, images: Tensor, initial: Tensor | None = None) -> tuple[Tensor, ...]:
        """recons, masks, rgbs, slots and attn of images [B, 3, H, W]; with --search all but attn after refine()."""
        initial = self.initial_slots(len(images)) if initial is None else initial
        slots, attn = self.model.encode(images, initial, num_iterations=self.args.num_iterations)
        if self.args.search:
            slots = refine(self.model, images, slots)
        rgbs, masks = self.model.decode(slots)
        return (rgbs * masks).sum(1), masks, rgbs, slots, attn


def write(args: argparse.Namespace, name: str, draw: Callable, *arguments, **options) -> None:
    """Calls draw(..., save_path=PATH) with a file in --output_dir, in --format if `name` has no suffix."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / (name if Path(name).suffix else f'{name}.{args.format}')
    draw(*arguments, save_path=path, **options)
    print(path)


def render_images(job: Job) -> None:
    """Slots, and attention and decomposition of each image; the segmentations of the pictures of --image."""
    args, batch = job.args, job.load_batch()
    images, labels, title = batch['image'], batch.get('mask'), 'refined slots' if args.search else None
    recons, masks, rgbs, _, attn = job.run_model(images)
    write(args, 'slots', visualize_slots, images, recons, masks, rgbs=rgbs, labels=labels, title=title)
    for i, image in enumerate(images):
        options = dict(rgbs=rgbs[i], labels=None if labels is None else labels[i], title=title)
        write(args, f'attention_evolution_{i}', visualize_attention_evolution, attn, images=images, index=i)
        write(args, f'decomposition_{i}', visualize_slot_decomposition, image, recons[i], masks[i], **options)
    for i, path in enumerate(args.image or ()):
        size = open_picture(path).size
        box = crop_box(*size, job.data.get('dataset_type', 'images'))
        write(args, f'{path.stem}_{i}_mask.png', save_segmentation, masks[i], size=size, box=box)


def render_edits(job: Job) -> None:
    """One figure per edit, of the images of which the model keeps more than one slot."""
    _, masks, _, slots, _ = job.run_model(job.load_batch()['image'])
    present = masks.amax((2, 3, 4)) > 0  # [B, K]
    several = [s[p] for s, p in zip(slots, present, strict=True) if p.sum() > 1]
    if len(several) < 2:
        raise ValueError('--edit needs two images of which the model keeps two slots; give other images or more slots')
    if len(several) < len(slots):
        print(f'left out {len(slots) - len(several)} images of which the model kept one slot: nothing to edit')
    for edit in EDITS:
        write(job.args, f'edit_{edit}', visualize_edit, job.model, several, edit)


def render_attention_gifs(job: Job) -> None:
    images = job.load_batch()['image']
    attn = job.run_model(images)[4]
    for i in range(len(images)):
        write(job.args, f'attention_evolution_{i}.gif', animate_attention, attn, images, index=i)


def render_emergence(args: argparse.Namespace) -> None:
    """A GIF of the same images, from the same noise, with the models of several steps."""
    folder = args.checkpoint / 'checkpoints' if (args.checkpoint / 'checkpoints').is_dir() else args.checkpoint
    jobs = {job.step: job for job in (open_checkpoint(path, args) for path in sorted(folder.glob('*.pth')))}
    if len(jobs) < 2:
        raise CheckpointError(
            f'--gif needs checkpoints of at least two steps; {args.checkpoint} has {len(jobs)}. python train.py '
            '--save_every 1 writes one an epoch; for a GIF of the attention name a file, not a folder'
        )
    figures, batch = [], jobs[max(jobs)].load_batch()
    for step in sorted(jobs):
        recons, masks, rgbs, *_ = jobs[step].run_model(batch['image'])
        options = dict(rgbs=rgbs, labels=batch.get('mask'), title=f'step {step:,}', empty_slots=True)
        figures.append(visualize_slots(batch['image'], recons, masks, **options))
    write(args, 'emergence.gif', save_gif, figures)


def render_frames(job: Job) -> None:
    """A GIF of the pictures in --frames, in the natural order of their names: frame2 before frame10.

    Each frame starts from the slots of the frame before, so slots keep their numbers (as in SAVi, Kipf et al. 2022,
    arXiv 2111.12594). Absent slots stay absent, except that one of them is drawn anew in each frame and is used if it
    lowers the reconstruction error by more than a tenth: for an object that appears, or whose slot was dropped.
    """
    frames, start = [], job.initial_slots(1)
    present, initial = torch.ones(start.shape[1], dtype=torch.bool), start
    for n, path in enumerate(find_pictures(job.args.frames)):
        try:
            images = job.read_images([path])['image']
        except DataError as error:
            print(f'skipped: {error}', file=sys.stderr)
            continue
        one_more = present | (torch.arange(len(present)) == present.int().argmin())  # the first absent slot, if any
        outputs = [job.run_model(images, start[:, used]) for used in (present, one_more)]
        before, after = (F.mse_loss(recons, images) for recons, *_ in outputs)
        (recons, *found, _), used = (outputs[1], one_more) if after < 0.9 * before else (outputs[0], present)
        index = used.nonzero()[:, 0]
        masks, rgbs, slots = (x.new_zeros(1, len(used), *x.shape[2:]).index_copy(1, index, x) for x in found)
        frames.append((images, recons, masks, rgbs, path.name[:24]))  # a longer title could widen the frame
        present = masks.amax((0, 2, 3, 4)) > 0  # [K]
        start = torch.where(present[:, None], slots, initial.roll(n, 1))
    if len(frames) < 2:
        reason = f'--frames needs a folder with at least two pictures ({", ".join(PICTURES)})'
        raise DataError(f'{reason}; {job.args.frames} has {len(frames)}')
    used = torch.cat([masks for _, _, masks, *_ in frames]).amax((0, 2, 3, 4)) > 0  # [K], in any frame
    figures = [
        visualize_slots(images, recons, masks[:, used], None, rgbs[:, used], None, title, empty_slots=True)
        for images, recons, masks, rgbs, title in frames
    ]
    write(job.args, 'frames.gif', save_gif, figures, milliseconds=200)


def render_sweep(job: Job) -> None:
    """Mean scores for each number of slots and iterations: a heat map and a CSV file."""
    batch, config, table = job.load_batch(), job.model.config, []
    iterations = sorted({1, 2, 3, 5, 8, 12, 16, 20, config.num_iterations})
    for K, T in product(range(2, job.model.slot_attention.num_slots + 1), iterations):
        generator = torch.Generator().manual_seed(job.args.seed)
        recons, masks, *_ = job.model(batch['image'], num_slots=K, num_iterations=T, generator=generator)
        table.append({'num_slots': K, 'num_iterations': T, 'mse': F.mse_loss(recons, batch['image']).item()})
        if 'mask' in batch:
            table[-1]['fg_ari'] = fg_ari(batch['mask'], masks).nanmean().item()
    write(job.args, 'sweep', visualize_sweep, table)
    rows, options = [list(row.values()) for row in table], dict(fmt='%.6g', delimiter=',', comments='')
    write(job.args, 'sweep.csv', lambda save_path: np.savetxt(save_path, rows, header=','.join(table[0]), **options))


def render_training(args: argparse.Namespace) -> None:
    folders = sorted({file.parent for file in args.log_dir.rglob('events.out.tfevents.*')}, key=natural_key)
    if not folders:
        command = f'python train.py --log_dir {shlex.quote(str(args.log_dir))}'
        raise DataError(f'no training curves under {args.log_dir}; {command} writes some')
    write(args, 'training', visualize_training, folders)


def open_checkpoint(path: Path, args: argparse.Namespace) -> Job:
    """The model and the data of a checkpoint. Raises CheckpointError."""
    checkpoint = load_checkpoint(path)
    model = build_model(checkpoint, path)
    try:
        data = dict(checkpoint['training'].get('data', {}))  # empty if the checkpoint was written by other code
        step = int(checkpoint['training'].get('progress', {}).get('step', 0))
    except (TypeError, ValueError, AttributeError) as error:
        raise damaged(path, error) from error
    print(f'drawing {path} at step {step:,}')
    if not data and not (args.image or args.frames):
        raise CheckpointError(f'{path} does not say what data it was trained on; give pictures with --image')
    if unknown := data.keys() - {'dataset_type', 'resolution', *DATA_FLAGS}:
        print(f'ignored {", ".join(sorted(unknown))} in the data of {path}: this version does not have them')
        data = {name: value for name, value in data.items() if name not in unknown}
    source = data.get('dataset_type')
    if args.data_dir is not None:
        data.pop('masks', None)  # the pattern of other pictures
    for name in ('data_dir', 'masks'):
        if (value := getattr(args, name)) is not None:
            if source not in SOURCES or name not in SOURCES[source].flags:
                raise CheckpointError(f'--{name} has no effect: {path} was trained on {source}; leave it out')
            data[name] = str(value)
    return Job(model, data, step, args)


def choose_checkpoint(args: argparse.Namespace) -> Path:
    """--checkpoint, --pretrained, the checkpoint of the most steps under --log_dir, or weights of the repository."""
    path = args.checkpoint or PRETRAINED.get(args.pretrained) or newest_checkpoint(args.log_dir)
    if path is None and args.log_dir == Path('logs') and (path := PRETRAINED.get('shapes')):
        print(f'no checkpoint under {args.log_dir}: drawing the weights of shapes that come with the repository')
    if path is None:
        raise CheckpointError(f'no checkpoint under {args.log_dir}; python train.py writes one')
    return find_checkpoint(path)


def create_parser() -> Parser:
    parser = Parser('visualize.py', 'Draws the slots of a checkpoint for validation images or your own pictures.')
    # fmt: off
    parser.section('figures (default: slots, attention and decomposition of each image)')
    parser.flag('edit', bool, False, 'images with objects removed, copied, swapped and interpolated')
    parser.flag('gif', bool, False, 'GIFs of the attention; or, of a folder as --checkpoint, of the slots at each step')
    parser.flag('frames', Path, None, 'a GIF of the pictures in this folder', metavar='FOLDER')
    parser.flag('sweep', bool, False, 'scores for each number of slots and iterations, also as CSV')
    parser.flag('training', bool, False, 'FG-ARI of all runs under --log_dir over the minutes of training')
    parser.section('input')
    parser.flag('checkpoint', Path, None, 'file or folder of a run (default: that of the most steps under --log_dir)')
    parser.flag('pretrained', str, None, 'weights of the repository, by data set and architecture', choices=PRETRAINED)
    parser.flag('log_dir', Path, Path('logs'), 'folder of the runs')
    parser.flag('image', Path, None, 'pictures to draw instead of validation images; their segmentations are also '
                f'written, at the size of the pictures (0: background, {IGNORE}: not seen by the model)', nargs='+')
    parser.flag('data_dir', Path, None, 'folder of the data (default: as in training)')
    parser.flag('masks', str, None, 'pattern of the masks of your own pictures (default: as in training, but with '
                '--data_dir that of train.py)', metavar='PATTERN')
    parser.flag('num_images', int, 8, 'number of validation images', 1, 100)
    parser.flag('num_slots', int, None, 'number of slots, spare ones included (default: of the checkpoint)', 1, 254)
    parser.flag('num_iterations', int, None, 'iterations of Slot Attention (default: of the checkpoint)', 1, 1000)
    parser.flag('search', bool, False, 'refine the slots by gradient descent on the reconstruction error')
    parser.flag('seed', int, 0, 'seed of the initial slots', 0)
    parser.section('output')
    parser.flag('output_dir', Path, Path('visualizations'), 'folder of the figures')
    parser.flag('format', str, 'png', 'file format of the figures', choices=FORMATS)
    # fmt: on
    return parser


# Flags that have no effect with another flag.
UNUSED = {
    'edit': 'gif frames sweep training',
    'gif': 'frames sweep training search format',
    'frames': 'sweep training image data_dir masks num_images format',
    'sweep': 'training num_slots num_iterations search',
    'training': 'checkpoint pretrained image data_dir masks num_images num_slots num_iterations search seed',
    'checkpoint': 'log_dir pretrained',
    'pretrained': 'log_dir',
    'image': 'data_dir masks num_images',
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a mistake ends the program with one line and status 2."""
    parser = create_parser()
    given = parser.given(argv)
    if 'sweep' in given:
        parser.set_defaults(num_images=32)
    args = parser.parse_args(argv)
    for flag in [flag for flag in UNUSED if flag in given]:
        parser.refuse(given, UNUSED[flag].split(), f'with --{flag}')
    return args


@torch.no_grad()
def main(args: argparse.Namespace) -> int:
    """Draws the figures; returns the exit status. A user's mistake gives one line and 2."""
    modes = {'edit': render_edits, 'gif': render_attention_gifs, 'frames': render_frames, 'sweep': render_sweep}
    try:
        if args.training:
            render_training(args)
        elif args.gif and args.checkpoint is not None and args.checkpoint.is_dir():
            render_emergence(args)
        else:
            draw = next((mode for flag, mode in modes.items() if getattr(args, flag)), render_images)
            draw(open_checkpoint(choose_checkpoint(args), args))
    except (ValueError, OSError, MemoryError) as error:
        print(f'visualize.py: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    plain_output()
    sys.exit(main(parse_args()))
