"""Slot Attention: the module, the autoencoder around it, its checkpoints and its scores.

    from slot_attention import ModelConfig, SlotAttentionAutoEncoder, load_model
    model = SlotAttentionAutoEncoder(ModelConfig(resolution=64))
    recons, masks, slots, attn = model(images)           # images [B, 3, 64, 64] in [-1, 1]
    model = load_model('logs/checkpoints/best_model.pth')

Follows Locatello et al. 2020, "Object-Centric Learning with Slot Attention" (arXiv 2006.15055),
called "the paper" below. Letters in shape comments: B images, K slots, M = B * K, D slot size, T
iterations, N = h * w places of the encoder's grid, C feature channels, H x W pixels.
"""

import io
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-3  # Keras' default, which the reference code uses; PyTorch's is 1e-5
MIN_RESOLUTION, MAX_RESOLUTION = 16, 256


class ConfigError(ValueError):
    """A model that cannot be built or used as asked; the message says why in one line."""


# --- Configuration ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """Everything that is needed to rebuild a model; it travels in every checkpoint.

    architecture   'fast': strided encoder, slots with a frame, and a decoder without convolutions;
                   'paper': Tables 4 and 6 of the paper above 64 pixels, Tables 5 and 7 up to 64
    resolution     side of the square images, pixels
    num_slots      slots K in training; another number can be given per call
    slot_dim       size D of a slot
    num_iterations iterations T of Slot Attention
    hidden_dim     channels of the encoder's and the decoder's hidden layers
    slot_init      'gaussian': every slot drawn from one learned Gaussian (the paper);
                   'learned': one learned vector per slot (BO-QSA, arXiv 2210.08990)
    gradient       'full': through all T iterations (the paper); 'first_order': through the last
                   one only (Chang et al. 2022, arXiv 2207.00787)
    damping        keeps slots empty that win little attention, see SlotAttention; 0: the paper
    eval_iterations  iterations in evaluation mode; 0: as in training
    slot_worth     what a slot must take off the mean squared error of its image to be used in
                   evaluation mode, see SlotAttention.revise; 0: slots stay as they are (the paper)
    refine_steps   steps in which slots descend the error of their image in evaluation mode, see
                   SlotAttentionAutoEncoder.refine; 0: the paper

    Raises ConfigError, in one line that names the field, for values that make no model.
    """

    architecture: str = 'fast'
    resolution: int = 64
    num_slots: int = 7
    slot_dim: int = 64
    num_iterations: int = 3
    hidden_dim: int = 64
    slot_init: str = 'gaussian'
    gradient: str = 'full'
    damping: float = 0.0
    eval_iterations: int = 0
    slot_worth: float = 0.0
    refine_steps: int = 0

    def __post_init__(self):
        for field in fields(self):
            value, wanted = getattr(self, field.name), type(field.default)
            if type(value) is not wanted and not (wanted is float and type(value) is int):
                raise ConfigError(f'{field.name} must be of type {wanted.__name__}, not {value!r}'.replace('\n', ' '))
        for name, allowed in (
            ('architecture', ('fast', 'paper')),
            ('slot_init', ('gaussian', 'learned')),
            ('gradient', ('full', 'first_order')),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f'{name} must be one of {", ".join(allowed)}, not {getattr(self, name)!r}')
        for name in ('num_slots', 'slot_dim', 'num_iterations', 'hidden_dim'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name} must be at least 1, not {getattr(self, name)}')
        if self.architecture == 'fast' and self.slot_dim <= FRAME:
            raise ConfigError(f"the 'fast' architecture keeps {FRAME} entries for the frame: slot_dim must be larger")
        for name in ('damping', 'eval_iterations', 'slot_worth', 'refine_steps'):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f'{name} must be at least 0, not {getattr(self, name)}')
        possible = [r for r in range(MIN_RESOLUTION, MAX_RESOLUTION + 1) if _can_produce(self.architecture, r)]
        if self.resolution not in possible:
            nearest = sorted(sorted(possible, key=lambda r: abs(r - self.resolution))[:2])
            raise ConfigError(
                f"the '{self.architecture}' architecture cannot produce resolution {self.resolution}; "
                f'the nearest that work: {", ".join(map(str, nearest))}'
            )


def _can_produce(architecture: str, resolution: int) -> bool:
    """The paper's CLEVR decoder (above 64 pixels) doubles four times; all else fits any size."""
    return architecture == 'fast' or resolution <= 64 or resolution % 16 == 0


# --- Slot Attention (paper Algorithm 1) ------------------------------------------------------


class SlotAttention(nn.Module):
    """Iterative attention in which slots compete for the inputs (paper Section 2.1, Algorithm 1).

    Slots of the 'gaussian' initialisation are exchangeable, so their number may change from call
    to call; with 'learned' there are as many vectors as slots in training, and no more.

    Algorithm 1 gives every slot a weighted mean of the inputs, however little attention it won: a
    spare slot then lands on an object that another slot holds already. With `damping` c > 0 the sum
    is divided by (attention won + c N) instead, so a slot that wins little stays as it was (in the
    spirit of Krimmel et al. 2024, arXiv 2407.04170); 0 is Algorithm 1.

    A slot of zeros is empty: it wins no attention, draws nothing, and stays as it is.
    """

    def __init__(
        self,
        input_dim: int,
        num_slots: int = 7,
        slot_dim: int = 64,
        num_iterations: int = 3,
        slot_init: str = 'gaussian',
        gradient: str = 'full',
        damping: float = 0.0,
        eval_iterations: int = 0,
        slot_worth: float = 0.0,
    ):
        super().__init__()
        self.num_slots, self.slot_dim, self.num_iterations = num_slots, slot_dim, num_iterations
        self.slot_init, self.gradient = slot_init, gradient
        self.damping, self.slot_worth, self.eval_iterations = damping, slot_worth, eval_iterations or num_iterations

        if slot_init == 'gaussian':
            self.slots_mu = nn.Parameter(torch.empty(1, 1, slot_dim))
            self.slots_log_sigma = nn.Parameter(torch.empty(1, 1, slot_dim))
        else:
            self.slots_init = nn.Parameter(torch.empty(1, num_slots, slot_dim))

        self.norm_inputs = nn.LayerNorm(input_dim, eps=LAYER_NORM_EPS)
        self.norm_slots = nn.LayerNorm(slot_dim, eps=LAYER_NORM_EPS)
        self.norm_mlp = nn.LayerNorm(slot_dim, eps=LAYER_NORM_EPS)
        self.project_q = nn.Linear(slot_dim, slot_dim, bias=False)
        self.project_k = nn.Linear(input_dim, slot_dim, bias=False)
        self.project_v = nn.Linear(input_dim, slot_dim, bias=False)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        self.mlp = nn.Sequential(nn.Linear(slot_dim, 2 * slot_dim), nn.ReLU(), nn.Linear(2 * slot_dim, slot_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The reference code's (Keras') initialisation, where PyTorch's default differs."""
        _keras_init(self)
        if self.slot_init == 'gaussian':
            # Keras takes fan_in 1 and fan_out D for a [1, 1, D] weight; torch would take D and D.
            nn.init.xavier_uniform_(self.slots_mu.data.view(1, -1))
            nn.init.xavier_uniform_(self.slots_log_sigma.data.view(1, -1))
        else:
            nn.init.xavier_uniform_(self.slots_init.data[0])

    def initial_slots(self, batch_size: int, num_slots: int, generator: torch.Generator | None = None) -> Tensor:
        """Slots before the first iteration, [B, K, D], with gradient to what they are drawn from.

        Raises ConfigError for more slots than there are learned vectors.
        """
        if self.slot_init == 'gaussian':
            mu, sigma = self.slots_mu, self.slots_log_sigma.exp()
            shape = (batch_size, num_slots, self.slot_dim)
            noise = torch.randn(shape, generator=generator, device=mu.device, dtype=mu.dtype)
            return mu + sigma * noise
        if num_slots > self.num_slots:
            raise ConfigError(
                f'this model has {self.num_slots} learned slots and cannot use {num_slots}; '
                'a model trained with --slot_init gaussian can'
            )
        return self.slots_init[:, :num_slots].expand(batch_size, -1, -1)

    def forward(
        self,
        inputs: Tensor,
        num_slots: int | None = None,
        num_iterations: int | None = None,
        slots: Tensor | None = None,
        generator: torch.Generator | None = None,
        faults: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Bind inputs to slots.

        inputs          [B, N, D_in]
        num_slots       K, instead of the one in training
        num_iterations  T, instead of the one in training
        slots           [B, K, D] to start from, instead of initial_slots()
        generator       source of the Gaussian noise, on the module's device
        faults          of what is drawn from slots, by which they are revised, see revise()

        Returns slots [B, K, D] and the attention of every iteration [B, T, K, N], which sums to
        1 over K. Raises ConfigError for fewer than one slot or iteration.
        """
        num_slots = self.num_slots if num_slots is None else num_slots
        if num_iterations is None:
            num_iterations = self.num_iterations if self.training else self.eval_iterations
        if num_slots < 1 or num_iterations < 1:
            raise ConfigError(f'at least 1 slot and 1 iteration are needed, not {num_slots} and {num_iterations}')

        inputs = self.norm_inputs(inputs)
        k = self.project_k(inputs)  # [B, N, D]
        v = self.project_v(inputs)  # [B, N, D]
        if slots is None:
            slots = self.initial_slots(inputs.shape[0], num_slots, generator)

        attns, initial = [], slots
        if self.gradient == 'first_order':
            with torch.no_grad():
                slots = slots.detach()
                for _ in range(num_iterations - 1):
                    slots, attn = self.step(slots, k, v)
                    attns.append(attn)
            # Straight through: the value of the refined slots, the gradient of the initial ones.
            # Without it neither mu and log_sigma nor learned slots would learn (BO-QSA, Eq. 6).
            slots = slots.detach() + initial - initial.detach()
            num_iterations = 1
        for _ in range(num_iterations):
            slots, attn = self.step(slots, k, v)
            attns.append(attn)
        if self.slot_worth and faults is not None and not self.training:
            slots, attns[-1] = self.revise(slots, attns[-1], initial, inputs, k, v, faults)
        return self.finish(slots, attns[-1], inputs), torch.stack(attns, dim=1)

    def step(self, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """One iteration: slots [B, K, D], k and v [B, N, D] -> slots [B, K, D], attn [B, K, N]."""
        empty = is_empty(slots)
        attn = softmax_of_present(self.logits(slots, k), empty)  # [B, K, N], over the slots: they compete
        return self.update(slots, attn, v).masked_fill(empty, 0), attn

    def update(self, slots: Tensor, attn: Tensor, v: Tensor) -> Tensor:
        """Slots [B, K, D] after they have attended by attn [B, K, N] to v [B, N, D]."""
        B, K, D = slots.shape
        weights = attn + 1e-8
        won = weights.sum(dim=2, keepdim=True)  # [B, K, 1]
        weights = weights / (won + self.damping * attn.shape[2])  # over the inputs: a weighted mean
        updates = weights @ v  # [B, K, D]
        slots = self.gru(updates.reshape(B * K, D), slots.reshape(B * K, D)).reshape(B, K, D)
        return slots + self.mlp(self.norm_mlp(slots))

    def finish(self, slots: Tensor, attn: Tensor, inputs: Tensor) -> Tensor:
        """What is done to slots [B, K, D] after the last iteration: nothing in Algorithm 1.

        attn [B, K, N] is the last iteration's, inputs [B, N, D_in] are normalised.
        """
        return slots

    def revise(
        self,
        slots: Tensor,
        attn: Tensor,
        initial: Tensor,
        inputs: Tensor,
        k: Tensor,
        v: Tensor,
        faults: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Look for fewer slots, then for better ones: slots [B, K, D], attn [B, K, N] -> the same.

        `initial` slots [B, K, D], normalised inputs [B, N, D_in], k and v [B, N, D] are those of forward().
        Two slots draw an object a little better than one, so the loss teaches spare slots to share
        objects; and a slot that has settled on two objects stays there. The loss of the image itself
        tells both, without labels, as the likelihood does in split-and-merge EM (Ueda et al. 2000).
        `faults` takes finished slots and returns the error of what they draw [B], and the attention of
        one that would look where it is worst [B, N].

        1. Each slot in turn, from the one that won least, is emptied, and the others have one iteration
           to take over. Only where the error rises by `slot_worth` or more does it come back.
        2. Twice, an empty slot is put where the image is drawn worst. Only where the error falls by
           `slot_worth` or more after num_iterations does it stay.
        """

        def judge(slots: Tensor, attn: Tensor) -> tuple[Tensor, Tensor]:
            return faults(self.finish(slots, attn, inputs))

        def where(choice: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(torch.where(choice.view(-1, *(1,) * (x.ndim - 1)), x, y) for x, y in zip(a, b, strict=True))

        best = slots, attn, *judge(slots, attn)
        for weakest in attn.sum(dim=2).argsort(dim=1)[:, :-1].T:  # [B], never the strongest
            slots = best[0].scatter(1, weakest[:, None, None].expand(-1, 1, best[0].shape[2]), 0)
            slots, attn = self.step(slots, k, v)
            trial = slots, attn, *judge(slots, attn)
            best = where(trial[2] < best[2] + self.slot_worth, trial, best)

        for _ in range(2):
            empty = is_empty(best[0]) & ~is_empty(initial)  # what the caller has emptied stays so
            first = empty & (empty.cumsum(dim=1) == 1)  # [B, K, 1]
            attn = best[3][:, None].expand_as(attn)
            slots = torch.where(first, self.update(initial, attn, v), best[0])
            for _ in range(self.num_iterations):
                slots, attn = self.step(slots, k, v)
            trial = slots, attn, *judge(slots, attn)
            best = where(first.any(dim=1).squeeze(1) & (trial[2] <= best[2] - self.slot_worth), trial, best)
        return best[:2]

    def logits(self, slots: Tensor, k: Tensor) -> Tensor:
        """How much each slot asks for each input: slots [B, K, D], k [B, N, D] -> [B, K, N]."""
        q = self.project_q(self.norm_slots(slots))  # [B, K, D]
        return q @ k.transpose(1, 2) * slots.shape[2] ** -0.5


def is_empty(slots: Tensor) -> Tensor:
    """Which slots [B, K, D] are empty, that is zeros: bool [B, K, 1]."""
    return (slots == 0).all(dim=2, keepdim=True)


def softmax_of_present(logits: Tensor, empty: Tensor) -> Tensor:
    """Softmax of logits [B, K, ...] over the K slots, 0 for those that are empty [B, K, ones]."""
    return logits.masked_fill(empty, torch.finfo(logits.dtype).min).softmax(dim=1)


FRAME = 3  # the first entries of a framed slot: its x and y in [-1, 1] and its size


def place_centres(size: int) -> Tensor:
    """Coordinates of the centres of `size` places along one axis of the image, in (-1, 1): [size]."""
    return (torch.arange(size) + 0.5) / size * 2 - 1


def in_frame(axis: Tensor, frame: Tensor, min_size: float, far: float = 4.0) -> Tensor:
    """Places along both axes as a slot sees them, in its sizes from its centre.

    axis [R], frame [..., 3] -> [..., 2, R], x and y. A tanh draws far places in to `far` sizes, so
    that nothing that is computed from them grows without bound.
    """
    centre, size = frame[..., :2, None], frame[..., 2:3, None].clamp(min=min_size)
    return far * torch.tanh((axis - centre) / size / far)


class FramedSlotAttention(SlotAttention):
    """Slot Attention whose slots know where they are, and look once more around them at the end.

    After every iteration the first three entries of a slot are its frame, measured from what it
    attends to: mean place (x, y) and standard deviation (Invariant Slot Attention, Biza et al.
    2023, arXiv 2302.04973). The attention is squared for it, so that a little of it spread over the
    whole image does not count. A slot asks less for what is far from it, in its own frame, so that
    objects of like colour are told apart by place. After the last iteration a glimpse of the features is
    added: a weighted mean of the inputs forgets where they were, and with it the outline of the object.
    """

    MIN_SIZE = 0.05

    def __init__(self, input_dim: int, grid_size: int, **kwargs):
        super().__init__(input_dim, **kwargs)
        self.register_buffer('axis', place_centres(grid_size), persistent=False)
        self.nearness = nn.Parameter(torch.tensor(-2.0))  # before a softplus
        self.glimpse = Glimpse(input_dim, self.slot_dim)

    def frame(self, attn: Tensor) -> Tensor:
        """attn [B, K, N] -> x, y and size of each slot [B, K, 3]."""
        weights = attn.square()
        weights = weights / (weights.sum(dim=2, keepdim=True) + 1e-6)
        weights = weights.unflatten(2, (len(self.axis), len(self.axis)))  # [B, K, h, w]
        marginals = torch.stack([weights.sum(2), weights.sum(3)], dim=2)  # [B, K, 2, w], over x and y
        centre = marginals @ self.axis  # [B, K, 2]
        variance = (marginals @ self.axis.square() - centre.square()).mean(dim=2, keepdim=True)
        size = (variance + self.MIN_SIZE**2).clamp(min=1e-6).sqrt()
        return torch.cat([centre, size], dim=2)

    def logits(self, slots: Tensor, k: Tensor) -> Tensor:
        """As SlotAttention.logits(), less a multiple of the squared distance in the slot's frame."""
        squares = in_frame(self.axis, slots[..., :FRAME], Glimpse.MIN_SIZE).square()  # [B, K, 2, w]
        distance = (squares[:, :, 0, None, :] + squares[:, :, 1, :, None]).flatten(2)  # [B, K, N]
        return super().logits(slots, k) - F.softplus(self.nearness) * distance

    def update(self, slots: Tensor, attn: Tensor, v: Tensor) -> Tensor:
        """As SlotAttention.update(); the frame of what was attended to takes its entries of the slots."""
        return torch.cat([self.frame(attn), super().update(slots, attn, v)[..., FRAME:]], dim=2)

    def finish(self, slots: Tensor, attn: Tensor, inputs: Tensor) -> Tensor:
        """As SlotAttention.finish(): adds the glimpse; N = h * w inputs of a square grid."""
        frame = slots[..., :FRAME]
        seen = self.glimpse(inputs, attn, frame, self.axis, self.norm_slots(slots))
        return torch.cat([frame, (slots + seen)[..., FRAME:]], dim=2).masked_fill(is_empty(slots), 0)


class Glimpse(nn.Module):
    """What lies around a slot, in its own frame: BINS x BINS bins that reach REACH sizes each way.

    Each bin is a weighted mean of the features near it, a bilinear hat times the slot's attention
    (a spatial transformer in reverse, Jaderberg et al. 2015, arXiv 1506.02025).
    """

    BINS, REACH, CHANNELS, MIN_SIZE = 7, 3.0, 32, 0.08

    def __init__(self, input_dim: int, slot_dim: int):
        super().__init__()
        self.project = nn.Linear(input_dim, self.CHANNELS)
        self.bins = nn.Linear(self.BINS**2 * (self.CHANNELS + 1), slot_dim)
        width = 2 * slot_dim
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, slot_dim))
        self.register_buffer('centres', torch.arange(self.BINS) - (self.BINS - 1) / 2, persistent=False)
        _keras_init(self)

    def forward(self, inputs: Tensor, attn: Tensor, frame: Tensor, axis: Tensor, slots: Tensor) -> Tensor:
        """inputs [B, N, C], attn [B, K, N], frame [B, K, 3], axis [w], slots [B, K, D] -> [B, K, D]."""
        width = frame[..., 2:].clamp(min=self.MIN_SIZE) * 2 * self.REACH / (self.BINS - 1)  # of a bin
        place = (axis - frame[..., :2, None]) / width[..., None]  # [B, K, 2, w], in bins
        hats = (1 - (place[..., None, :] - self.centres[:, None]).abs()).clamp(min=0)  # [B, K, 2, BINS, w]
        x, y = hats.unbind(2)  # [B, K, BINS, w]
        attn = attn.unflatten(2, (len(axis), len(axis)))  # [B, K, h, w]
        features = F.pad(self.project(inputs), (0, 1), value=1)  # one that is 1 gives the weight in each bin
        features = features.unflatten(1, attn.shape[2:])  # [B, h, w, CHANNELS + 1]
        # A hat is a product: all of a row into its bins first, then the rows, for an eighth of the work.
        seen = torch.einsum('bkxhw,bhwc->bkhxc', x[:, :, :, None] * attn[:, :, None], features)
        seen = torch.einsum('bkyh,bkhxc->bkyxc', y, seen)  # [B, K, BINS, BINS, CHANNELS + 1]
        covered = y.sum(3)[:, :, :, None] * x.sum(3)[:, :, None]  # places in a bin
        seen = seen / (covered[..., None] + 0.1)
        return self.mlp(self.norm(torch.cat([slots, self.bins(seen.flatten(2))], dim=2)))


def _keras_init(module: nn.Module) -> None:
    """Glorot-uniform weights, zero biases, orthogonal recurrent weights (paper Appendix E)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.GRUCell):
            nn.init.xavier_uniform_(layer.weight_ih)
            nn.init.orthogonal_(layer.weight_hh)
            nn.init.zeros_(layer.bias_ih)
            nn.init.zeros_(layer.bias_hh)


# --- Encoder and decoder (paper Appendix E.3, Tables 4-7) ------------------------------------


class SoftPositionEmbed(nn.Module):
    """Adds a learned linear map of (x, y, 1 - x, 1 - y), each in [0, 1] (paper Appendix E.2)."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.dense = nn.Linear(4, channels)
        y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing='ij')
        self.register_buffer('grid', torch.stack([x, y, 1 - x, 1 - y], dim=-1), persistent=False)  # [h, w, 4]

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, h, w] (or anything that broadcasts to it, as [B, C, 1, 1]) -> [B, C, h, w]."""
        return features + self.dense(self.grid).permute(2, 0, 1)  # [C, h, w]


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> one vector per place of the grid [B, N, C] (Tables 6 and 7)."""

    def __init__(self, resolution: int, channels: list[int], strides: list[int], kernel_size: int):
        super().__init__()
        layers, size = [], resolution
        for inputs, outputs, stride in zip([3, *channels], channels, strides, strict=False):
            layers += [nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2), nn.ReLU(inplace=True)]
            size = -(-size // stride)
        self.conv = nn.Sequential(*layers)
        self.grid_size, width = size, channels[-1]
        self.position = SoftPositionEmbed(width, size)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        _keras_init(self)

    def forward(self, images: Tensor) -> Tensor:
        features = self.position(self.conv(images))  # [B, C, h, w]
        return self.mlp(self.norm(features.flatten(2).transpose(1, 2)))  # [B, N, C]


Pixels = tuple[slice | Tensor, slice | Tensor]  # rows and columns of an image, as slices or indices
ALL = (slice(None), slice(None))


class TurnedConv(nn.ConvTranspose2d):
    """A transposed convolution of stride 1 as what it is: a convolution with its kernel turned by half a circle.

    The same numbers; forward and backward together, CPUs need 0.88 (bfloat16) and 0.93 (float32) of the time.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """[M, C_in, h, w] -> [M, C_out, h, w]."""
        return F.conv2d(inputs, self.weight.flip(2, 3).transpose(0, 1), self.bias, padding=self.padding)


class Decoder(nn.Module):
    """Spatial broadcast decoder: slots [M, D] -> colours and mask logit [M, 4, H, W] (Tables 4, 5).

    Every slot is copied to all places of a coarse grid, given its position, and upsampled by
    transposed convolutions of (kernel, stride, channels). `pixels` picks rows and columns of the whole.

    The first layer is linear in a slot that is the same everywhere plus positions that are the same for
    all slots. Where its stride is 1, as in Table 5, it is computed once for the positions, and for each
    slot at the border and at one place inside: half of that decoder's work is saved.
    """

    def __init__(self, resolution: int, slot_dim: int, layers: list[tuple[int, int, int]]):
        super().__init__()
        self.position = SoftPositionEmbed(slot_dim, resolution // math.prod(stride for _, stride, _ in layers))
        modules, width = [], slot_dim
        for kernel, stride, channels in layers:
            # Not the last one: with 4 channels to come from it is slower turned.
            layer = TurnedConv if stride == 1 and channels > 4 else nn.ConvTranspose2d
            modules += [layer(width, channels, kernel, stride, kernel // 2, stride - 1), nn.ReLU(inplace=True)]
            width = channels
        self.conv = nn.Sequential(*modules[:-1])  # colours and logits are linear
        _keras_init(self)

    def forward(self, slots: Tensor, pixels: Pixels = ALL) -> Tensor:
        rows, columns = pixels
        return self.conv[1:](self.first(slots[:, :, None, None]))[:, :, rows][..., columns]

    def first(self, slots: Tensor) -> Tensor:
        """self.conv[0](self.position(slots)): slots [M, D, 1, 1] -> [M, C, h, w]."""
        layer, (size, _, _) = self.conv[0], self.position.grid.shape
        kernel = layer.kernel_size[0]
        if layer.stride[0] > 1:
            return layer(self.position(slots))
        # A slot on a grid as large as the kernel meets every border; only in the middle are all taps inside.
        alone = F.conv_transpose2d(slots.expand(-1, -1, kernel, kernel), layer.weight, padding=kernel // 2)
        alone = alone.permute(0, 2, 3, 1)  # cat() gives its result the order of its dimensions: channels last
        for dim in (1, 2):
            before, middle, after = alone.split([kernel // 2, 1, kernel // 2], dim)
            shape = list(middle.shape)
            shape[dim] = size - kernel + 1
            alone = torch.cat([before, middle.expand(shape), after], dim)
        return alone.permute(0, 3, 1, 2) + layer(self.position(torch.zeros_like(slots[:1])))


class ImplicitDecoder(nn.Module):
    """Slots [M, D] -> colours and mask logit [M, 4, H, W]: every slot writes a small network.

    The network takes a pixel's place in the slot's own frame, see in_frame(), through one hidden layer
    of UNITS half-planes, which the slot turns and shifts as it likes: what outlines are made of. There
    is no convolution, so any rows and columns can be had alone, and an object looks the same wherever
    it lies (as in Biza et al. 2023).
    """

    UNITS, MIN_SIZE = 16, 0.01  # slots of any origin may be decoded, with sizes below zero too

    def __init__(self, resolution: int, slot_dim: int, channels: int):
        super().__init__()
        self.register_buffer('axis', place_centres(resolution), persistent=False)
        sizes = 3 * self.UNITS + 4 * (self.UNITS + 1)
        width = 3 * channels  # per slot, not per pixel: cheap
        self.hyper = nn.Sequential(nn.Linear(slot_dim, width), nn.ReLU(), nn.Linear(width, sizes))
        _keras_init(self)
        # What it writes is multiplied with each other: from full-sized weights a first image has an MSE of up to 10.
        self.hyper[-1].weight.data.mul_(0.3)

    def forward(self, slots: Tensor, pixels: Pixels = ALL) -> Tensor:
        frame = slots[:, :FRAME]
        rows, columns = pixels  # picked before there is a gradient, which would have to be scattered back
        x = in_frame(self.axis[columns], frame, self.MIN_SIZE)[:, 0:1]  # [M, 1, w]
        y = in_frame(self.axis[rows], frame, self.MIN_SIZE)[:, 1:2]  # [M, 1, h]
        code = torch.cat([frame[:, :2], frame[:, 2:].clamp(min=self.MIN_SIZE).log(), slots[:, FRAME:]], dim=1)
        inner, outer = self.hyper(code).split([3 * self.UNITS, 4 * (self.UNITS + 1)], dim=1)
        inner, outer = inner.unflatten(1, (self.UNITS, 3)), outer.unflatten(1, (4, self.UNITS + 1))
        # A half-plane is a sum of a function of x and one of y: cheaper than a product per pixel.
        along_x = inner[:, :, 0:1] * x + inner[:, :, 2:3]  # [M, U, w]
        along_y = inner[:, :, 1:2] * y  # [M, U, h]
        hidden = (along_x[:, :, None, :] + along_y[:, :, :, None]).to(outer.dtype)  # rounded before: half to read
        hidden = hidden.relu_().flatten(2)  # [M, U, h * w]
        decoded = torch.baddbmm(outer[:, :, -1:], outer[:, :, :-1] * self.UNITS**-0.5, hidden)  # [M, 4, h * w]
        return decoded.unflatten(2, (y.shape[2], x.shape[2]))


def _build_encoder(config: ModelConfig) -> Encoder:
    C = config.hidden_dim
    if config.architecture == 'paper':
        return Encoder(config.resolution, [C, C, C, C], strides=[1, 1, 1, 1], kernel_size=5)
    # Half the channels where there are four times the places: both halves cost about the same.
    return Encoder(config.resolution, [-(-C // 2), -(-C // 2), C, C], strides=[2, 1, 2, 1], kernel_size=3)


def _build_decoder(config: ModelConfig) -> nn.Module:
    C = config.hidden_dim
    if config.architecture == 'fast':
        return ImplicitDecoder(config.resolution, config.slot_dim, C)
    clevr = 4 * [(5, 2, C)] + [(5, 1, C), (3, 1, 4)]  # Table 4
    small = 3 * [(5, 1, C)] + [(3, 1, 4)]  # Table 5
    layers = clevr if config.resolution > 64 else small
    return Decoder(config.resolution, config.slot_dim, layers)


# --- Autoencoder (paper Section 2.2) ---------------------------------------------------------


class SlotAttentionOutput(NamedTuple):
    recons: Tensor  # [B, 3, H, W]      the combined reconstruction
    masks: Tensor  # [B, K, 1, H, W]    sums to 1 over K
    slots: Tensor  # [B, K, D]
    attn: Tensor  # [B, T, K, h, w]     sums to 1 over K, one map per iteration


class SlotAttentionAutoEncoder(nn.Module):
    """Takes an image apart into slots and puts it together again (paper Section 2.2, Figure 1)."""

    REFINE_LR = 0.02  # at first, see refine()

    def __init__(self, config: ModelConfig | None = None):
        super().__init__()
        self.config = config = config or ModelConfig()
        self.encoder = _build_encoder(config)
        shared = asdict(config)
        for name in ('architecture', 'resolution', 'hidden_dim', 'refine_steps'):
            del shared[name]
        if config.architecture == 'fast':
            self.slot_attention = FramedSlotAttention(config.hidden_dim, self.encoder.grid_size, **shared)
        else:
            self.slot_attention = SlotAttention(config.hidden_dim, **shared)
        self.decoder = _build_decoder(config)

    def encode(self, images: Tensor, **per_call) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] in [-1, 1] -> slots [B, K, D], attn [B, T, K, h, w].

        `per_call` are the keywords of SlotAttention.forward: num_slots, num_iterations, slots,
        generator. In evaluation mode slots are refined, see refine(). Raises ValueError for images
        that are not of the model's resolution.
        """
        size = self.config.resolution
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f'images must be [B, 3, {size}, {size}], not {list(images.shape)}')
        features = self.encoder(images)  # [B, N, C]
        slots, attn = self.slot_attention(features, faults=partial(self.faults, images), **per_call)
        if self.config.refine_steps and not self.training:
            slots = self.refine(images, slots)
        return slots, attn.unflatten(-1, (self.encoder.grid_size, self.encoder.grid_size))

    def decode(self, slots: Tensor, pixels: Pixels = ALL) -> tuple[Tensor, Tensor]:
        """slots [B, K, D] -> colours [B, K, 3, H, W] and masks [B, K, 1, H, W]; each slot alone.

        `pixels` are the rows and columns wanted, which H and W then count. The image is their sum
        (rgbs * masks).sum(1); masks are a softmax over the slots. A slot of zeros is empty, its mask 0:
        `slots[:, k] = 0` takes an object out.
        """
        B, K, D = slots.shape
        decoded = self.decoder(slots.reshape(B * K, D), pixels).unflatten(0, (B, K))  # [B, K, 4, H, W]
        rgbs, logits = decoded.split([3, 1], dim=2)
        return rgbs, softmax_of_present(logits, is_empty(slots)[..., None, None])

    def faults(self, images: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """What is wrong with the images that slots [B, K, D] draw: MSE [B], and where, as attention [B, N].

        The attention is that of a slot which would look where it is worst: the error around that
        place, its largest value 1. Every second row and column is enough to tell.
        """
        size, second = self.encoder.grid_size, slice(None, None, 2)
        rgbs, masks = self.decode(slots, (second, second))
        error = ((rgbs * masks).sum(dim=1) - images[:, :, second, second]).float().square().mean(dim=1)
        coarse = F.adaptive_avg_pool2d(error, size)  # [B, h, w]
        axis = place_centres(size).to(coarse)
        near = torch.exp(-0.5 * ((axis[:, None] - axis) / 0.125).square())  # [w, w]; an object is about as wide
        worst = (near @ coarse @ near).flatten(1).argmax(dim=1)  # [B]
        around = coarse * near[worst // size][:, :, None] * near[worst % size][:, None, :]
        around = around.flatten(1)
        return error.mean(dim=(1, 2)), around / (around.amax(dim=1, keepdim=True) + 1e-12)

    def refine(self, images: Tensor, slots: Tensor) -> Tensor:
        """Slots [B, K, D] by which images [B, 3, H, W] are drawn better, each image by itself.

        The slots that a network guesses in one pass are a start from which a few steps of the gradient,
        with respect to them, go further: semi-amortised inference (Kim et al. 2018, arXiv 1802.02550). Adam
        with a short memory, for there are few steps, and a rate that falls to 0; a quarter of the pixels at
        a time, all four in turn. Where that does not lower the error, slots stay as they were; empty ones
        have no gradient.
        """
        steps = self.config.refine_steps
        with torch.inference_mode(False), torch.enable_grad():
            images, before = images.clone(), slots.detach().clone()  # what inference mode made has no gradient
            slots = before.clone().requires_grad_()
            optimizer = torch.optim.Adam([slots], betas=(0.5, 0.9))
            for step in range(steps):
                rows, columns = slice(step % 2, None, 2), slice(step // 2 % 2, None, 2)
                rgbs, masks = self.decode(slots, (rows, columns))
                error = ((rgbs * masks).sum(dim=1) - images[:, :, rows, columns]).float().square()
                (slots.grad,) = torch.autograd.grad(error.mean(dim=(1, 2, 3)).sum(), slots)
                optimizer.param_groups[0]['lr'] = self.REFINE_LR * (1 - step / steps)
                optimizer.step()
            slots = slots.detach()
        with torch.no_grad():
            better = self.faults(images, slots)[0] < self.faults(images, before)[0]  # [B]
            return torch.where(better[:, None, None], slots, before)

    def forward(self, images: Tensor, pixels: Pixels = ALL, **per_call) -> SlotAttentionOutput:
        """encode, decode, combine; arguments as in encode() and decode()."""
        slots, attn = self.encode(images, **per_call)
        rgbs, masks = self.decode(slots, pixels)
        return SlotAttentionOutput((rgbs * masks).sum(dim=1), masks, slots, attn)


# --- Scores ----------------------------------------------------------------------------------


def segmentation(masks: Tensor) -> Tensor:
    """masks [B, K, 1, H, W] (or attn [B, K, h, w]) -> index of the strongest slot [B, H, W]."""
    return (masks.squeeze(2) if masks.ndim == 5 else masks).argmax(dim=1)


def contingency_table(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """How many places carry label i in `a` and label j in `b`: integer [B, I, J].

    a, b   integer labels >= 0 [B, ...]
    where  bool [B, ...], the places that count (default: all)
    """
    a, b = a.flatten(1).long(), b.flatten(1).long()
    I, J = int(a.max()) + 1, int(b.max()) + 1
    counted = torch.ones_like(a) if where is None else where.flatten(1).long()
    table = torch.zeros(len(a), I * J, dtype=torch.long, device=a.device)
    return table.scatter_add_(1, a * J + b, counted).unflatten(1, (I, J))


def adjusted_rand_index(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """Agreement of two segmentations of each image beyond chance (Hubert & Arabie 1985): [B].

    1 for the same partition, 0 on average for independent ones. Two trivial partitions that
    agree (one object, found whole) score 1; an image where no place counts gives NaN.
    Arguments as in contingency_table().
    """
    return _ari_of_counts(contingency_table(a, b, where))


def _ari_of_counts(table: Tensor) -> Tensor:
    """contingency_table() [B, I, J] -> [B]. In float64 counts of pairs are exact, below 2^53."""

    def pairs(n: Tensor) -> Tensor:
        return n.double() * (n - 1) / 2

    total = pairs(table.sum((1, 2)))
    together = pairs(table).sum((1, 2))
    in_a, in_b = pairs(table.sum(2)).sum(1), pairs(table.sum(1)).sum(1)
    expected = in_a * in_b / total.clamp(min=1)
    maximum = (in_a + in_b) / 2
    score = torch.where(maximum == expected, 1.0, (together - expected) / (maximum - expected))
    return torch.where(table.sum((1, 2)) > 0, score, torch.nan)


def _mbo_of_counts(table: Tensor) -> Tensor:
    """Counts of labels x slots [B, I, J] -> mean best IoU of the labels in sight but the first, [B]."""
    union = table.sum(2, keepdim=True) + table.sum(1, keepdim=True) - table
    best = (table.double() / union.clamp(min=1)).amax(dim=2)[:, 1:]  # [B, objects]
    in_sight = table.sum(2)[:, 1:] > 0
    return (best * in_sight).sum(1) / in_sight.sum(1)  # 0 / 0 = NaN


def segmentation_scores(labels: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Scores of each image, each [B]; labels [B, H, W], 0 = background; masks [B, K, 1, H, W].

    fg_ari  ARI over the true foreground only (paper Section 4), NaN without foreground
    ari     ARI over the whole image
    mbo     mean over the objects in sight of the best IoU that any slot has, NaN without objects
    """
    table = contingency_table(labels, segmentation(masks))  # [B, labels, slots]
    return {'fg_ari': _ari_of_counts(table[:, 1:]), 'ari': _ari_of_counts(table), 'mbo': _mbo_of_counts(table)}


def fg_ari(labels: Tensor, masks: Tensor) -> Tensor:
    """FG-ARI of each image, [B]; arguments as in segmentation_scores()."""
    return segmentation_scores(labels, masks)['fg_ari']


# --- Checkpoints -----------------------------------------------------------------------------

CHECKPOINT_FORMAT = 'slot-attention/1'


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which and why in one line."""


def save_checkpoint(path: str | os.PathLike, model: SlotAttentionAutoEncoder, **training) -> None:
    """Write the model, its configuration and `training` (tensors and plain values) to `path`.

    The file appears whole or not at all: it is written beside its final name, flushed to disk and
    renamed. Raises OSError when that fails; what was at `path` is then untouched.
    """
    path = Path(path)
    checkpoint = {
        'format': CHECKPOINT_FORMAT,
        'config': asdict(model.config),
        'model': model.state_dict(),
        'training': training,
    }
    buffer = io.BytesIO()  # torch reports a full disk as a RuntimeError of its archive, or not at all
    torch.save(checkpoint, buffer)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        with open(temporary, 'wb') as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike) -> dict:
    """The dictionary that save_checkpoint() wrote, on the CPU, 'config' as a ModelConfig.

    Raises CheckpointError when the file is missing, damaged or not one of ours. Nothing in the
    file is executed (torch.load with weights_only=True).
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'no checkpoint at {path}')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises whatever the damage happens to trip over
        raise CheckpointError(f'{path} is damaged or no PyTorch checkpoint ({type(error).__name__})') from error
    if not isinstance(checkpoint, dict) or checkpoint.get('format') != CHECKPOINT_FORMAT:
        raise CheckpointError(f'{path} is not a checkpoint of this program (format {CHECKPOINT_FORMAT!r})')
    try:
        if missing := {field.name for field in fields(ModelConfig)} - checkpoint['config'].keys():
            raise KeyError(f'its configuration has no {", ".join(sorted(missing))}')
        checkpoint['config'] = ModelConfig(**checkpoint['config'])
        checkpoint['model'], checkpoint['training'].keys()
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f'{path} does not hold a model this version can build: {error}') from error
    return checkpoint


def same_form(value, like) -> bool:
    """Whether a value of a checkpoint has the types, keys, lengths and shapes of another."""
    if type(value) is not type(like):
        return False
    if isinstance(value, dict):
        return value.keys() == like.keys() and all(same_form(value[key], like[key]) for key in like)
    if isinstance(value, list):
        return len(value) == len(like) and all(map(same_form, value, like))
    return not isinstance(value, Tensor) or (value.shape, value.dtype) == (like.shape, like.dtype)


def load_model(path: str | os.PathLike) -> SlotAttentionAutoEncoder:
    """The model of a checkpoint, on the CPU, in evaluation mode. Raises CheckpointError."""
    return build_model(load_checkpoint(path), path)


def build_model(checkpoint: dict, path: str | os.PathLike) -> SlotAttentionAutoEncoder:
    """The model of a loaded checkpoint; `path` is for the error message."""
    model = SlotAttentionAutoEncoder(checkpoint['config'])
    try:
        model.load_state_dict(checkpoint['model'])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f'{path}: the weights do not fit the configuration beside them') from error
    return model.eval()
