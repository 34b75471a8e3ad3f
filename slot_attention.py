"""Slot Attention: the module, the autoencoder, test-time search, scores and checkpoints.

    from slot_attention import ModelConfig, create_model, load_model
    model = create_model(ModelConfig(resolution=64))                         # the fast variant, or:
    model = create_model(ModelConfig('paper', resolution=64, hidden_dim=32)) # the paper's model
    recons, masks, slots, attn = model(images)                               # images [B, 3, 64, 64] in [-1, 1]
    model = load_model('logs/checkpoints/last.pth')

Implements Locatello et al. 2020, "Object-Centric Learning with Slot Attention" (arXiv 2006.15055),
called "the paper" below. The file has five parts:

    1. The paper         Algorithm 1 and the autoencoder of Tables 4-7 (the loss is in loss_terms() in train.py);
                         tests/test_reference.py compares it with the authors' code
    2. The fast variant  StridedEncoder, FramedSlotAttention, KeepHead, Glimpse, ImplicitDecoder, FastAutoEncoder
    3. Search            refine: improves the slots of one image at test time
    4. Scores            FG-ARI, ARI, mBO, mIoU, and statistics that show how slots fail
    5. Checkpoints       ModelConfig, save_checkpoint, load_checkpoint, load_model

Letters in shape comments: B images, K slots, M = B * K, D slot size, T iterations, N = h * w
positions of the encoder's feature grid, C feature channels, H x W pixels.
"""

import io
import math
import os
import pickle
import platform
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

# =============================================================================================
# 1. The paper
# =============================================================================================

LAYER_NORM_EPS = 1e-3  # the default of Keras, which the authors' code uses; PyTorch's is 1e-5


class SlotAttention(nn.Module):
    """Iterative attention in which slots compete for the inputs (paper Section 2.1, Algorithm 1).

    The initial slots are samples of one Gaussian with learned mean and standard deviation, so slots
    are exchangeable and their number may change from call to call. Attention is [B, K, N], slots times
    inputs: the transpose of the paper's.

    input_dim       size of an input vector
    num_slots       K, number of slots if forward() gets none
    slot_dim        D, size of a slot
    num_iterations  T, number of iterations if forward() gets none
    """

    def __init__(self, input_dim: int, num_slots: int = 7, slot_dim: int = 64, num_iterations: int = 3):
        super().__init__()
        self.num_slots, self.slot_dim, self.num_iterations = num_slots, slot_dim, num_iterations
        self.slots_mu = nn.Parameter(torch.empty(1, 1, slot_dim))
        self.slots_log_sigma = nn.Parameter(torch.empty(1, 1, slot_dim))
        self.norm_inputs = nn.LayerNorm(input_dim, eps=LAYER_NORM_EPS)
        self.norm_slots = nn.LayerNorm(slot_dim, eps=LAYER_NORM_EPS)
        self.norm_mlp = nn.LayerNorm(slot_dim, eps=LAYER_NORM_EPS)
        self.project_q = nn.Linear(slot_dim, slot_dim, bias=False)
        self.project_k = nn.Linear(input_dim, slot_dim, bias=False)
        self.project_v = nn.Linear(input_dim, slot_dim, bias=False)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        self.mlp = nn.Sequential(nn.Linear(slot_dim, 2 * slot_dim), nn.ReLU(), nn.Linear(2 * slot_dim, slot_dim))
        keras_init(self)
        # As Keras does for a weight [1, 1, D], whose fan-in is 1 to it; PyTorch would take D.
        nn.init.xavier_uniform_(self.slots_mu.data.view(1, -1))
        nn.init.xavier_uniform_(self.slots_log_sigma.data.view(1, -1))

    def initial_slots(self, batch_size: int, num_slots: int, generator: torch.Generator | None = None) -> Tensor:
        """Samples slots ~ N(mu, diag(sigma^2)): [B, K, D], differentiable with respect to mu and log_sigma."""
        mu, sigma = self.slots_mu, self.slots_log_sigma.exp()
        shape = (batch_size, num_slots, self.slot_dim)
        return mu + sigma * torch.randn(shape, generator=generator, device=mu.device, dtype=mu.dtype)

    def forward(
        self, inputs: Tensor, slots: Tensor | None = None, num_iterations: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Maps inputs [B, N, D_in] to slots [B, K, D] and the attention of every iteration [B, T, K, N].

        slots           [B, K, D] initial slots; default: sampled by initial_slots()
        num_iterations  T; default: the constructor's

        The attention sums to 1 over the slots.
        """
        slots = self.initial_slots(inputs.shape[0], self.num_slots) if slots is None else slots
        T = self.num_iterations if num_iterations is None else num_iterations
        B, K, D = slots.shape
        attns = []

        inputs = self.norm_inputs(inputs)  # [B, N, D_in]
        k, v = self.project_k(inputs), self.project_v(inputs)  # [B, N, D] each
        for _ in range(T):
            slots_prev = slots
            q = self.project_q(self.norm_slots(slots))  # [B, K, D]
            logits = q @ k.transpose(1, 2) * D**-0.5  # [B, K, N]
            attn = logits.softmax(dim=1)  # Eq. 1: softmax over the slots, [B, K, N]
            weights = attn + 1e-8  # epsilon
            weights = weights / weights.sum(dim=2, keepdim=True)  # Eq. 2: mean over the inputs, [B, K, N]
            updates = weights @ v  # [B, K, D]
            slots = self.gru(updates.reshape(B * K, D), slots_prev.reshape(B * K, D)).reshape(B, K, D)
            slots = slots + self.mlp(self.norm_mlp(slots))  # [B, K, D]
            attns.append(attn)
        return slots, torch.stack(attns, dim=1)


class SoftPositionEmbed(nn.Module):
    """Adds a learned linear map of the coordinates (x, y, 1 - x, 1 - y), each in [0, 1] (paper Appendix E.2)."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.dense = nn.Linear(4, channels)
        y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing='ij')
        self.register_buffer('grid', torch.stack([x, y, 1 - x, 1 - y], dim=-1), persistent=False)  # [h, w, 4]

    def forward(self, features: Tensor) -> Tensor:
        """features [B, C, h, w], or [B, C, 1, 1] to broadcast a vector to the grid -> [B, C, h, w]."""
        return features + self.dense(self.grid).permute(2, 0, 1)  # [C, h, w]


class Encoder(nn.Module):
    """CNN, position embedding and an MLP per position: images to a set of features (Tables 6 and 7)."""

    def __init__(self, resolution: int, hidden_dim: int):
        super().__init__()
        C, self.grid_size = hidden_dim, resolution
        self.conv = nn.Sequential(
            *(nn.Conv2d(3, C, 5, padding=2), nn.ReLU(True)),
            *(nn.Conv2d(C, C, 5, padding=2), nn.ReLU(True)),
            *(nn.Conv2d(C, C, 5, padding=2), nn.ReLU(True)),
            *(nn.Conv2d(C, C, 5, padding=2), nn.ReLU(True)),
        )
        self.position = SoftPositionEmbed(C, resolution)
        self.norm = nn.LayerNorm(C, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C))
        keras_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> features [B, N, C], N = grid_size^2."""
        features = self.position(self.conv(images))  # [B, C, h, w]
        features = features.flatten(2).transpose(1, 2)  # [B, N, C]
        return self.mlp(self.norm(features))


class ConvTranspose2dSame(nn.ConvTranspose2d):
    """Transposed convolution with TensorFlow's 'SAME' padding: the output is `stride` times the input.

    TensorFlow removes (kernel - stride) // 2 rows and columns before the image and the rest after it. Stride 1 is
    computed as a convolution with a flipped kernel: the same function, in two thirds of the time on CPUs.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=(kernel_size - stride) // 2)

    def forward(self, inputs: Tensor) -> Tensor:
        """[M, C_in, h, w] -> [M, C_out, stride * h, stride * w]."""
        if self.stride[0] == 1:
            kernel = self.weight.flip(2, 3).transpose(0, 1)
            return F.conv2d(inputs, kernel, self.bias, padding=self.kernel_size[0] // 2)
        size = self.stride[0] * inputs.shape[-1]
        return super().forward(inputs)[..., :size, :size]


class SpatialBroadcastDecoder(nn.Module):
    """Decodes each slot to colours and a mask logit (paper Section 2.2, Appendix E.3, Tables 4 and 5).

    Each slot is copied to every position of a grid, a position embedding is added, and a stack of
    transposed convolutions gives an image. Above 64 pixels it is Table 4, up to 64 Table 5. Raises ConfigError for a
    resolution above 64 that is no multiple of 16, as Table 4 doubles a grid four times.
    """

    def __init__(self, resolution: int, slot_dim: int, hidden_dim: int):
        super().__init__()
        if resolution > 64 and resolution % 16:
            raise ConfigError(f"resolution of the paper's decoder must be a multiple of 16 above 64: {resolution}")
        if resolution > 64:  # (kernel size, stride, channels)
            layers = 4 * [(5, 2, hidden_dim)] + [(5, 1, hidden_dim), (3, 1, 4)]  # Table 4
        else:
            layers = 3 * [(5, 1, hidden_dim)] + [(3, 1, 4)]  # Table 5
        self.position = SoftPositionEmbed(slot_dim, resolution // math.prod(stride for _, stride, _ in layers))
        modules, width = [], slot_dim
        for kernel_size, stride, channels in layers:
            modules += [ConvTranspose2dSame(width, channels, kernel_size, stride), nn.ReLU(True)]
            width = channels
        self.conv = nn.Sequential(*modules[:-1])  # the output is linear
        keras_init(self)

    def forward(self, slots: Tensor) -> Tensor:
        """slots [M, D] -> colours and mask logit [M, 4, H, W]."""
        grid = self.position(slots[:, :, None, None])  # [M, D, h, w]
        return self.conv(grid)


class SlotAttentionOutput(NamedTuple):
    recons: Tensor  # [B, 3, H, W]      the combined reconstruction
    masks: Tensor  # [B, K, 1, H, W]    sums to 1 over K
    slots: Tensor  # [B, K, D]
    attn: Tensor  # [B, T, K, h, w]     sums to 1 over K, one map per iteration


class SlotAttentionAutoEncoder(nn.Module):
    """Encodes an image to slots and reconstructs it from them (paper Section 2.2, Figure 1b).

    config  a ModelConfig of the architecture 'paper'; create_model() builds either architecture

    Above 64 pixels the parts are those of CLEVR6 (Tables 4 and 6, where hidden_dim is 64), up to 64 pixels those of
    Tetrominoes and Multi-dSprites (Tables 5 and 7, where it is 32).
    """

    def __init__(self, config: 'ModelConfig'):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.resolution, config.hidden_dim)
        self.slot_attention = SlotAttention(config.hidden_dim, config.num_slots, config.slot_dim, config.num_iterations)
        self.decoder = SpatialBroadcastDecoder(config.resolution, config.slot_dim, config.hidden_dim)

    def encode(
        self,
        images: Tensor,
        slots: Tensor | None = None,
        num_slots: int | None = None,
        num_iterations: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] in [-1, 1] -> slots [B, K, D], attn [B, T, K, h, w].

        slots           [B, K, D] initial slots; default: `num_slots` of them are sampled with `generator`
        num_slots       K, if no slots are given; default: the configuration's
        num_iterations  T; default: the configuration's
        generator       source of the noise of the initial slots, on the model's device

        Raises ValueError for images that are not of the model's resolution, and for no slots.
        """
        size = self.config.resolution
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f'images must be [B, 3, {size}, {size}], not {list(images.shape)}')
        if slots is None:
            num_slots = self.slot_attention.num_slots if num_slots is None else num_slots
            slots = self.slot_attention.initial_slots(images.shape[0], num_slots, generator)
        if slots.shape[1] < 1:
            raise ValueError('at least 1 slot is needed, not 0')
        features = self.encoder(images)  # [B, N, C]
        slots, attn = self.slot_attention(features, slots, num_iterations)  # [B, K, D], [B, T, K, N]
        return slots, attn.unflatten(-1, (self.encoder.grid_size, self.encoder.grid_size))

    def decode(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """slots [B, K, D] -> colours [B, K, 3, H, W] and masks [B, K, 1, H, W], a softmax over the slots.

        Each slot is decoded independently; the reconstruction is (rgbs * masks).sum(1).
        """
        B, K, D = slots.shape
        decoded = self.decoder(slots.reshape(B * K, D)).unflatten(0, (B, K))  # [B, K, 4, H, W]
        rgbs, logits = decoded.split([3, 1], dim=2)
        return rgbs, logits.softmax(dim=1)

    def forward(self, images: Tensor, **kwargs) -> SlotAttentionOutput:
        """Encodes, decodes and combines; arguments as in encode()."""
        slots, attn = self.encode(images, **kwargs)
        rgbs, masks = self.decode(slots)
        recons = (rgbs * masks).sum(dim=1)
        return SlotAttentionOutput(recons, masks, slots, attn)


def keras_init(module: nn.Module) -> None:
    """Initialises weights as Keras does by default: Glorot-uniform, zero biases, orthogonal recurrent weights."""
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


# =============================================================================================
# 2. The fast variant
# =============================================================================================

FRAME = 3  # the first entries of a framed slot: position x, y in [-1, 1], and scale
FRAME_LIMIT = 4.0  # largest coordinate in a slot's frame, in units of its scale


def coord_grid(size: int) -> Tensor:
    """Coordinates of the centres of `size` pixels along one axis of an image that spans [-1, 1]: [size]."""
    return (torch.arange(size) + 0.5) / size * 2 - 1


def to_slot_frame(grid: Tensor, positions: Tensor, scales: Tensor) -> Tensor:
    """Coordinates relative to each slot's position, in units of its scale.

    grid [R], positions [..., 2], scales [..., 1] -> [..., 2, R]: x of each column and y of each row. A tanh
    bounds them to +-FRAME_LIMIT, so that functions of them stay bounded far from the slot.
    """
    return FRAME_LIMIT * torch.tanh((grid - positions[..., None]) / scales[..., None] / FRAME_LIMIT)


class StridedEncoder(Encoder):
    """An Encoder with 3x3 kernels and strides 2, 1, 2, 1: features on a grid of a quarter of the resolution.

    Below 64 pixels the second stride is left out: adjacent objects of one colour merge on a grid of 9x9 (35 pixels).
    The first two layers have half the channels, so that both halves cost about the same.
    """

    def __init__(self, resolution: int, hidden_dim: int):
        nn.Module.__init__(self)
        C, half, stride = hidden_dim, math.ceil(hidden_dim / 2), 2 if resolution >= 64 else 1
        self.conv = nn.Sequential(
            *(nn.Conv2d(3, half, 3, stride=2, padding=1), nn.ReLU(True)),
            *(nn.Conv2d(half, half, 3, padding=1), nn.ReLU(True)),
            *(nn.Conv2d(half, C, 3, stride, padding=1), nn.ReLU(True)),
            *(nn.Conv2d(C, C, 3, padding=1), nn.ReLU(True)),
        )
        self.grid_size = math.ceil(math.ceil(resolution / 2) / stride)
        self.position = SoftPositionEmbed(C, self.grid_size)
        self.norm = nn.LayerNorm(C, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C))
        keras_init(self)


class State(NamedTuple):
    """Result of the iterations of FramedSlotAttention."""

    inputs: Tensor  # [B, N, D_in], normalised
    k: Tensor  # [B, N, D]
    v: Tensor  # [B, N, D]
    slots: Tensor  # [B, K, D]
    attn: Tensor  # [B, K, N], sums to 1 over the slots
    present: Tensor  # [B, K], bool: the slots that were not dropped


class FramedSlotAttention(SlotAttention):
    """Slot Attention with a position and a scale per slot (Invariant Slot Attention, Biza et al. 2023).

    It differs from Algorithm 1 in these points:

    frame          The first three entries of a slot are the mean position (x, y) and the standard deviation of its
                   attention. They are measured in every iteration; the GRU updates the rest.
    locality bias  A learned multiple of the squared distance to the slot, in its frame, is subtracted from the
                   logits: objects of similar colour are separated by their position.
    drops          There are more slots than needed, so that no object is left without one. After the T iterations
                   follow K - 1 more, at most `drops` + `spare_slots`. Before each of them the slot with the lowest
                   KeepHead logit, if that is below 0, is dropped, and another one takes over its positions. A dropped
                   slot wins no attention, and its scale is 0.
    gradient       With 'first_order' it passes through the last iteration only, and straight through to the initial
                   slots (Chang et al. 2022, arXiv 2207.00787; BO-QSA, Jia et al. 2023, arXiv 2210.08990); with 'full'
                   through all iterations, as in the paper.
    glimpse        After the last iteration each slot reads the features around it, see Glimpse.
    """

    MIN_SCALE = 0.05  # of a frame
    MIN_REACH = 0.08  # smallest scale for the locality bias and the glimpse

    def __init__(self, config: 'ModelConfig', input_dim: int, grid_size: int):
        super().__init__(input_dim, config.num_slots + config.spare_slots, config.slot_dim, config.num_iterations)
        self.config = config
        self.register_buffer('grid', coord_grid(grid_size), persistent=False)
        self.locality_bias = nn.Parameter(torch.tensor(-2.0))  # before a softplus
        self.keep_head = KeepHead(config.slot_dim)
        self.glimpse = Glimpse(input_dim, config.slot_dim)

    def forward(
        self, inputs: Tensor, slots: Tensor | None = None, num_iterations: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """As SlotAttention.forward(); N = h * w positions of a square grid, T counts the drops too."""
        state, attn = self.iterate(inputs, slots, num_iterations)
        return self.look(state), attn

    def iterate(
        self, inputs: Tensor, slots: Tensor | None = None, num_iterations: int | None = None, drops: int | None = None
    ) -> tuple[State, Tensor]:
        """Finds objects with more slots than needed, then drops slots: the last state, attention [B, T + drops, K, N].

        Arguments as in SlotAttention.forward(); `drops` is described above.
        """
        slots = self.initial_slots(inputs.shape[0], self.num_slots) if slots is None else slots
        T = self.num_iterations if num_iterations is None else num_iterations
        if drops is None:
            drops = self.config.drops and min(self.config.drops + self.config.spare_slots, slots.shape[1] - 1)
        first_order, with_grad = self.config.gradient == 'first_order', torch.is_grad_enabled()
        initial, slots, attns = slots, slots.detach() if first_order else slots, []
        present = torch.ones(slots.shape[:2], dtype=torch.bool, device=slots.device)  # [B, K]

        inputs = self.norm_inputs(inputs)  # [B, N, D_in]
        k, v = self.project_k(inputs), self.project_v(inputs)  # [B, N, D] each
        k = k.transpose(1, 2).contiguous().transpose(1, 2)  # faster in the products of all iterations
        for t in range(T + drops):
            if t >= T:
                present = present & ~self.redundant(slots, attns[-1], present)
            last = t == T + drops - 1
            if last and first_order:
                slots = slots + initial - initial.detach()  # the value of slots, the gradient of the initial ones
            # Without a graph for the iterations that get no gradient a training step takes four fifths of the time.
            with torch.set_grad_enabled(with_grad and (last or not first_order)):
                slots, attn = self.step(slots, k, v, present)
            attns.append(attn)
        return State(inputs, k, v, slots, attn, present), torch.stack(attns, dim=1)

    def step(self, slots: Tensor, k: Tensor, v: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """One iteration: slots [B, K, D], k and v [B, N, D], present [B, K] -> slots, attn [B, K, N]."""
        B, K, D = slots.shape
        q = self.project_q(self.norm_slots(slots))  # [B, K, D]
        scales = slots[..., 2:FRAME].clamp(min=self.MIN_REACH)
        squares = to_slot_frame(self.grid, slots[..., :2], scales).square()  # [B, K, 2, w]
        x, y = (F.softplus(self.locality_bias) * squares).unbind(2)  # [B, K, w] each
        distance = (x[:, :, None, :] + y[:, :, :, None]).flatten(2)  # [B, K, N], in the slot's frame, times the bias
        logits = (q * D**-0.5) @ k.transpose(1, 2) - distance  # [B, K, N]
        attn = logits.masked_fill(~present[:, :, None], -math.inf).softmax(dim=1)  # Eq. 1, [B, K, N]
        weights = attn / (attn.sum(dim=2, keepdim=True) + 1e-6)  # Eq. 2, [B, K, N]
        updates = weights @ v  # [B, K, D]
        slots = self.gru(updates.reshape(B * K, D), slots.reshape(B * K, D)).reshape(B, K, D)
        slots = slots + self.mlp(self.norm_mlp(slots))
        return torch.cat([*self.frame(attn), slots[..., FRAME:]], dim=2), attn

    @torch.no_grad()
    def redundant(self, slots: Tensor, attn: Tensor, present: Tensor) -> Tensor:
        """The least needed slot of each image, if KeepHead does not need it and others are present: bool [B, K]."""
        logits = self.keep_head(slots, attn, present).masked_fill(~present, math.inf)  # [B, K]
        lowest, index = logits.min(dim=1)  # [B] each
        redundant = (lowest < 0) & (present.sum(dim=1) > 1)  # [B]
        return F.one_hot(index, slots.shape[1]).bool() & redundant[:, None]

    def look(self, state: State) -> Tensor:
        """The slots to decode [B, K, D]: a glimpse is added to all but the frame, and absent slots get the scale 0."""
        positions, scales, _ = state.slots.split([2, 1, self.slot_dim - FRAME], dim=2)
        reach = scales.clamp(min=self.MIN_REACH)
        seen = self.glimpse(state.inputs, state.attn, positions, reach, self.grid, self.norm_slots(state.slots))
        scales = scales.masked_fill(~state.present[:, :, None], 0)
        return torch.cat([positions, scales, (state.slots + seen)[..., FRAME:]], dim=2)

    def frame(self, attn: Tensor) -> tuple[Tensor, Tensor]:
        """attn [B, K, N] -> positions [B, K, 2] and scales [B, K, 1] of the slots.

        The attention is squared first, so that a small attention to the whole image does not count.
        """
        weights = attn.to(self.grid.dtype).square()
        weights = weights.unflatten(2, (len(self.grid), len(self.grid)))  # [B, K, h, w]
        marginals = torch.stack([weights.sum(2), weights.sum(3)], dim=2)  # [B, K, 2, w], over x and y
        marginals = marginals / (marginals.sum(dim=3, keepdim=True) + 1e-6)
        # Without matrix products, which autocast would round: a small scale would be off by up to 10 %.
        positions = (marginals * self.grid).sum(dim=3)  # [B, K, 2]
        squares = (self.grid - positions[..., None]).square()  # [B, K, 2, w]
        variance = (marginals * squares).sum(dim=3).mean(dim=2, keepdim=True)  # [B, K, 1]
        scales = (variance + self.MIN_SCALE**2).sqrt()
        return positions, scales


class KeepHead(nn.Module):
    """Predicts which slots are needed: an MLP over a slot and the mean of its pairs with the other slots.

    A slot is described by its vector, the attention it won, its peak, and how clearly it won; a pair also by the share
    of each slot's attention that overlaps the other's, so the head can see that another slot covers the same positions.
    """

    def __init__(self, slot_dim: int, width: int = 64):
        super().__init__()
        self.norm = nn.LayerNorm(slot_dim)
        self.token = nn.Linear(slot_dim + 3, 3 * width)  # alone, first of a pair, second of a pair
        self.shared = nn.Linear(2, width)
        self.mlp = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))
        nn.init.constant_(self.mlp[-1].bias, 2.0)  # at first all slots are needed

    def forward(self, slots: Tensor, attn: Tensor, present: Tensor) -> Tensor:
        """slots [B, K, D], attn [B, K, N], present bool [B, K] -> logits [B, K] of being needed."""
        won = attn.sum(dim=2, keepdim=True) + 1e-2  # [B, K, 1]
        peak, clearly = attn.amax(dim=2, keepdim=True), attn.square().sum(dim=2, keepdim=True) / won
        tokens = torch.cat([self.norm(slots), (won / attn.shape[2]).log(), peak, clearly], dim=2)  # [B, K, D + 3]
        alone, first, second = self.token(tokens).chunk(3, dim=2)  # [B, K, width] each
        shared = (attn @ attn.transpose(1, 2) / won + 1e-3).log()  # [B, K, K], share of one that overlaps the other
        shared = self.shared(torch.stack([shared, shared.transpose(1, 2)], dim=3))  # [B, K, K, width]
        pairs = (first[:, :, None] + second[:, None] + shared).relu()
        others = (present / present.sum(dim=1, keepdim=True)).to(pairs.dtype)  # [B, K]
        pairs = (pairs * others[:, None, :, None]).sum(dim=2)  # [B, K, width]
        return self.mlp(torch.cat([alone.relu(), pairs], dim=2)).squeeze(2)


class Glimpse(nn.Module):
    """Reads the features around each slot into BINS x BINS bins of its frame, which reach REACH scales each way.

    A weighted mean of the inputs (Eq. 2) does not tell where they were, and so loses the outline of an object:
    without the glimpse the decoder draws discs. Each bin is the mean of the features near it, weighted by a
    bilinear kernel times the slot's attention: the transpose of the sampling of a spatial transformer (Jaderberg
    et al. 2015, arXiv 1506.02025).
    """

    BINS, REACH, CHANNELS = 7, 3.0, 32

    def __init__(self, input_dim: int, slot_dim: int):
        super().__init__()
        self.project = nn.Linear(input_dim, self.CHANNELS)
        self.bins = nn.Linear(self.BINS**2 * (self.CHANNELS + 1), slot_dim)
        width = 2 * slot_dim
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, slot_dim))
        self.register_buffer('centres', torch.arange(self.BINS) - (self.BINS - 1) / 2, persistent=False)
        keras_init(self)

    def forward(
        self, inputs: Tensor, attn: Tensor, positions: Tensor, scales: Tensor, grid: Tensor, slots: Tensor
    ) -> Tensor:
        """Returns the update of the slots [B, K, D].

        inputs [B, N, C], attn [B, K, N], positions [B, K, 2], scales [B, K, 1], grid [w], slots [B, K, D]
        """
        bin_width = scales * 2 * self.REACH / (self.BINS - 1)  # [B, K, 1]
        offsets = (grid - positions[..., None]) / bin_width[..., None]  # [B, K, 2, w], in bins
        kernel = (1 - (offsets[..., None, :] - self.centres[:, None]).abs()).clamp(min=0)  # [B, K, 2, BINS, w]
        x, y = kernel.unbind(2)  # [B, K, BINS, w] each
        attn = attn.unflatten(2, (len(grid), len(grid)))  # [B, K, h, w]
        features = F.pad(self.project(inputs), (0, 1), value=1)  # a channel of ones gives the weight in each bin
        features = features.unflatten(1, attn.shape[2:])  # [B, h, w, CHANNELS + 1]
        # The kernel is a product of one over x and one over y: summing over x first takes an eighth of the work.
        seen = torch.einsum('bkxhw,bhwc->bkhxc', x[:, :, :, None] * attn[:, :, None], features)
        seen = torch.einsum('bkyh,bkhxc->bkyxc', y, seen)  # [B, K, BINS, BINS, CHANNELS + 1]
        covered = y.sum(3)[:, :, :, None] * x.sum(3)[:, :, None]  # grid positions per bin, [B, K, BINS, BINS]
        seen = seen / (covered[..., None] + 0.1)
        return self.mlp(self.norm(torch.cat([slots, self.bins(seen.flatten(2))], dim=2)))


Pixels = tuple[slice | Tensor, slice | Tensor]  # rows and columns of an image, as slices or indices
ALL_PIXELS = (slice(None), slice(None))


class ImplicitDecoder(nn.Module):
    """Decodes a slot with a small network whose weights are a function of the slot (a hyper-network).

    It maps a pixel's coordinates in the slot's frame, see to_slot_frame(), to colours and a mask logit. Both are
    quadratic in the coordinates, and the logit is also a sum of UNITS half-planes. Colours are smooth, so only the
    mask can draw an edge: one slot cannot draw two objects, or an object and its background, as well as two slots
    can. Slots with a scale above WIDE, which are backgrounds, have half-planes in their colours too, for shadows and
    a horizon.

    Any rows and columns can be decoded alone, and an object looks the same wherever it lies (as in Invariant Slot
    Attention).
    """

    UNITS, WIDE, MIN_SCALE = 16, 0.4, 0.01

    def __init__(self, resolution: int, slot_dim: int, hidden_dim: int):
        super().__init__()
        self.register_buffer('grid', coord_grid(resolution), persistent=False)
        self.num_weights = [3 * self.UNITS, 4 * self.UNITS, 4 * 5]
        width = 3 * hidden_dim  # computed per slot, not per pixel: cheap
        self.hyper = nn.Sequential(nn.Linear(slot_dim, width), nn.ReLU(), nn.Linear(width, sum(self.num_weights)))
        keras_init(self)
        # The two generated layers multiply each other: at full scale the MSE of the first images is up to 10.
        self.hyper[-1].weight.data.mul_(0.3)

    def forward(self, slots: Tensor, pixels: Pixels = ALL_PIXELS) -> Tensor:
        """slots [M, D] -> colours and mask logit [M, 4, H, W] of the rows and columns in `pixels`."""
        positions, scales = slots[:, :2], slots[:, 2:FRAME].clamp(min=self.MIN_SCALE)  # [M, 2], [M, 1]
        rows, columns = pixels
        x = to_slot_frame(self.grid[columns], positions, scales)[:, 0:1]  # [M, 1, W]
        y = to_slot_frame(self.grid[rows], positions, scales)[:, 1:2]  # [M, 1, H]
        code = torch.cat([positions, scales.log(), slots[:, FRAME:]], dim=1)
        inner, outer, smooth = self.hyper(code).split(self.num_weights, dim=1)
        inner, outer, smooth = inner.unflatten(1, (-1, 3)), outer.unflatten(1, (4, -1)), smooth.unflatten(1, (4, 5))
        # Half-planes and quadratics are a function of x plus a function of y: no product per pixel is needed.
        along_x = inner[:, :, 0:1] * x + inner[:, :, 2:3]  # [M, UNITS, W]
        along_y = inner[:, :, 1:2] * y  # [M, UNITS, H]
        hidden = (along_x[:, :, None, :] + along_y[:, :, :, None]).relu_()  # [M, UNITS, H, W]
        x, y = x / FRAME_LIMIT, y / FRAME_LIMIT  # in [-1, 1]
        along_x = smooth[:, :, 0:1] * x + smooth[:, :, 1:2] * x.square() + smooth[:, :, 4:]  # [M, 4, W]
        along_y = smooth[:, :, 2:3] * y + smooth[:, :, 3:4] * y.square()  # [M, 4, H]
        quadratic = along_x[:, :, None, :] + along_y[:, :, :, None]  # [M, 4, H, W]
        wide = torch.sigmoid((scales - self.WIDE) / (0.1 * self.WIDE))[:, :, None]  # [M, 1, 1]
        weights = torch.cat([outer[:, :3] * wide, outer[:, 3:]], dim=1) * self.UNITS**-0.5  # [M, 4, UNITS]
        return torch.baddbmm(quadratic.flatten(2), weights, hidden.flatten(2)).view_as(quadratic)


class FastAutoEncoder(SlotAttentionAutoEncoder):
    """The autoencoder with the encoder, attention and decoder of the fast variant; `config` is a ModelConfig.

    Another decoder is a module of slots [M, D] and pixels, see ImplicitDecoder.forward(). It need not know of absent
    slots, nor of the softmax.
    """

    def __init__(self, config: 'ModelConfig'):
        nn.Module.__init__(self)
        self.config = config
        self.encoder = StridedEncoder(config.resolution, config.hidden_dim)
        self.slot_attention = FramedSlotAttention(config, config.hidden_dim, self.encoder.grid_size)
        self.decoder = ImplicitDecoder(config.resolution, config.slot_dim, config.hidden_dim)

    def decode(self, slots: Tensor, pixels: Pixels = ALL_PIXELS) -> tuple[Tensor, Tensor]:
        """As SlotAttentionAutoEncoder.decode(), for some rows and columns. A slot with a scale of 0 has no mask."""
        B, K, D = slots.shape
        decoded = self.decoder(slots.reshape(B * K, D), pixels).unflatten(0, (B, K))  # [B, K, 4, H, W]
        rgbs, logits = decoded.split([3, 1], dim=2)
        absent = slots[:, :, 2, None, None, None] <= 0  # [B, K, 1, 1, 1]
        return rgbs, logits.masked_fill(absent, torch.finfo(logits.dtype).min).softmax(dim=1)


def keep_loss(
    model: FastAutoEncoder, images: Tensor, state: State, masks: Tensor, errors: Tensor, pixels: Pixels,
    rng: np.random.Generator,
) -> Tensor:  # fmt: skip
    """The loss of KeepHead in a training step: cross entropy with is_needed(). Only the head gets a gradient.

    On half of the images one slot is removed: the one with the lowest logit, or any. The others get one iteration to
    take over its positions, and is_needed() judges the result at the pixels of the loss.

    images         [B, 3, H, W]
    state          of the forward pass
    masks, errors  masks [B, K, 1, h, w] and squared errors [B, h, w] of its reconstruction at the rows and columns
                   in `pixels`, two tensors of indices
    """
    attention = model.slot_attention
    half = slice(int(rng.integers(min(2, len(images)))), None, 2)
    inputs, k, v, slots, attn, present = (tensor[half].detach() for tensor in state)
    n, K = present.shape
    logits = attention.keep_head(slots, attn, present)  # [n, K]
    draw = torch.from_numpy(rng.random((n, K + 1))).to(slots)
    lowest = logits.detach().masked_fill(~present, math.inf).argmin(dim=1)  # [n]
    chosen = torch.where(draw[:, K] < 0.5, (draw[:, :K] * present).argmax(dim=1), lowest)  # [n]
    removed = F.one_hot(chosen, K).bool()  # [n, K]
    with torch.no_grad():
        others = present & ~removed
        after = attention.look(State(inputs, k, v, *attention.step(slots, k, v, others), others))  # [n, K, D]
        rgbs, masks_after = model.decode(after, pixels)
        target = images[half][:, :, pixels[0]][..., pixels[1]]
        errors_after = ((rgbs * masks_after).sum(dim=1) - target).square().mean(dim=1)
        mask = masks[half][removed].squeeze(1)  # of the removed slot, [n, h, w]
        needed = is_needed(target, errors[half], errors_after, mask)  # [n]
    terms = F.binary_cross_entropy_with_logits(logits[removed], needed.to(logits), reduction='none')
    return (terms * (present.sum(dim=1) > 1)).mean()


def is_needed(images: Tensor, before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """Whether each image needs a slot, judged by the squared error with it and without it: bool [n].

    images         [n, 3, h, w]
    before, after  squared error with the slot and without it, [n, h, w] each
    mask           the slot's mask, [n, h, w]

    By the rise of the MSE alone, objects and parts of objects differ little: a small object changes few pixels, and a
    part is missed along its whole outline. They differ in the share of the slot's own pixels that become wrong: nearly
    all for an object, few for a part, because the slot of the other part draws the rest. Together they are wrong 5
    times per 100 objects, the rise alone 10 times (means of four data sets). Thresholds are relative to the variance
    of the image.
    """
    variance = images.var(dim=(2, 3)).mean(dim=1)  # [n]
    worse = after - before > 0.01 * variance[:, None, None]  # [n, h, w]
    coverage = (mask * worse).sum(dim=(1, 2)) / (mask.sum(dim=(1, 2)) + 1e-6)  # share of the slot's pixels, [n]
    rise = (after - 1.05 * before).mean(dim=(1, 2))  # a poor reconstruction changes more, [n]
    return rise * coverage**4 > 0.002 * variance


# =============================================================================================
# 3. Search: improving the slots of one image at test time
# =============================================================================================


def refine(
    model: SlotAttentionAutoEncoder, images: Tensor, slots: Tensor, num_steps: int = 20, lr: float = 0.02
) -> Tensor:
    """Minimises each image's reconstruction error with respect to its slots: [B, K, D] -> [B, K, D].

    images [B, 3, H, W]. Semi-amortised inference (Kim et al. 2018, arXiv 1802.02550): the network's slots are the
    start of `num_steps` steps of Adam, with a learning rate that falls from `lr` to 0. An image whose error does not
    fall keeps its slots.
    """

    def errors(slots: Tensor) -> Tensor:
        rgbs, masks = model.decode(slots)
        return ((rgbs * masks).sum(dim=1) - images).float().square().mean(dim=(1, 2, 3))  # [B]

    with torch.inference_mode(False), torch.enable_grad():
        images, before = images.clone(), slots.detach().clone()  # tensors made in inference mode have no gradient
        slots = before.clone().requires_grad_()
        optimizer = torch.optim.Adam([slots], betas=(0.5, 0.9))  # a short memory, for there are few steps
        for step in range(num_steps):
            (slots.grad,) = torch.autograd.grad(errors(slots).sum(), slots)
            optimizer.param_groups[0]['lr'] = lr * (1 - step / num_steps)
            optimizer.step()
    with torch.no_grad():
        improved = errors(slots) < errors(before)  # [B]
        return torch.where(improved[:, None, None], slots.detach(), before)


# =============================================================================================
# 4. Scores
# =============================================================================================

IGNORE = 255  # pixels with this label count in no score (the border in PASCAL VOC)


def segmentation(masks: Tensor) -> Tensor:
    """Index of the strongest slot at each pixel: masks [B, K, 1, H, W] or attn [B, K, h, w] -> [B, H, W]."""
    return (masks.squeeze(2) if masks.ndim == 5 else masks).argmax(dim=1)


def contingency_table(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """Number of pixels with label i in `a` and label j in `b`: [B, I, J], int64.

    a, b   integer labels >= 0, [B, ...]
    where  bool [B, ...], the pixels to count; default: all
    """
    a, b = a.flatten(1).long(), b.flatten(1).long()
    I, J = int(a.max()) + 1, int(b.max()) + 1
    counted = torch.ones_like(a) if where is None else where.flatten(1).long()
    table = torch.zeros(len(a), I * J, dtype=torch.long, device=a.device)
    return table.scatter_add_(1, a * J + b, counted).unflatten(1, (I, J))


def ari(table: Tensor) -> Tensor:
    """Adjusted Rand index (Hubert and Arabie 1985) of a contingency table: [B, I, J] -> [B].

    1 for equal partitions, 0 on average for independent ones. Two equal trivial partitions (one object in one slot)
    score 1; an image without a counted pixel scores NaN.
    """

    def pairs(n: Tensor) -> Tensor:
        return n.double() * (n - 1) / 2  # exact in float64, below 2^53

    total = pairs(table.sum((1, 2)))
    together = pairs(table).sum((1, 2))
    in_a, in_b = pairs(table.sum(2)).sum(1), pairs(table.sum(1)).sum(1)
    expected = in_a * in_b / total.clamp(min=1)
    maximum = (in_a + in_b) / 2
    score = torch.where(maximum == expected, 1.0, (together - expected) / (maximum - expected))
    return torch.where(table.sum((1, 2)) > 0, score, torch.nan)


def iou(table: Tensor) -> Tensor:
    """IoU of each object with each slot; 0 for an object without pixels: [B, labels, slots] -> [B, objects, slots]."""
    union = table.sum(2, keepdim=True) + table.sum(1, keepdim=True) - table
    return (table.double() / union.clamp(min=1))[:, 1:]


def mean_best_overlap(table: Tensor) -> Tensor:
    """Mean over the objects of the best IoU of any slot: [B, labels, slots] -> [B]; NaN without objects."""
    return iou(table).amax(dim=2).sum(1) / (table.sum(2)[:, 1:] > 0).sum(1)


def matched_iou(table: Tensor) -> Tensor:
    """Mean IoU of objects and slots, matched one to one (Hungarian algorithm): [B, labels, slots] -> [B].

    An object without a slot counts 0; NaN without objects.
    """
    matched = [image[linear_sum_assignment(image, maximize=True)].sum() for image in iou(table).cpu().numpy()]
    return torch.tensor(matched, dtype=torch.double, device=table.device) / (table.sum(2)[:, 1:] > 0).sum(1)


# The scores of a segmentation: title, and function of the contingency table [B, labels, slots] -> [B].
SCORES = {
    'fg_ari': ('FG-ARI', lambda table: ari(table[:, 1:])),  # over the true foreground (paper Section 4.1)
    'ari': ('ARI', ari),  # over all pixels
    'mbo': ('mBO', mean_best_overlap),
    'miou': ('mIoU', matched_iou),
}


def adjusted_rand_index(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """ARI of two segmentations of each image, [B]; arguments as in contingency_table()."""
    return ari(contingency_table(a, b, where))


def table_of(labels: Tensor, masks: Tensor) -> Tensor:
    """Contingency table [B, labels, slots] of labels [B, H, W] and the strongest slots of masks [B, K, 1, H, W].

    Pixels with the label IGNORE are left out. Raises ValueError for negative labels and for other sizes.
    """
    found = segmentation(masks)  # [B, H, W]
    if labels.shape != found.shape:
        raise ValueError(f'labels {list(labels.shape)} and masks {list(masks.shape)} are of different sizes')
    if labels.min() < 0:
        raise ValueError(f'labels must not be negative, the smallest is {int(labels.min())}')
    counted = labels != IGNORE
    return contingency_table(labels.where(counted, 0), found, counted)


def segmentation_scores(labels: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """The SCORES of each image, [B] each; NaN for an image without objects (ARI: without pixels).

    labels  [B, H, W], 0 is the background, 1, 2, ... are objects, IGNORE is left out
    masks   [B, K, 1, H, W]; a pixel belongs to the slot with the largest mask

    Raises ValueError for negative labels and for labels and masks of different sizes.
    """
    table = table_of(labels, masks)
    return {name: score(table) for name, (_, score) in SCORES.items()}


def fg_ari(labels: Tensor, masks: Tensor) -> Tensor:
    """FG-ARI of each image, [B]; arguments as in segmentation_scores()."""
    return ari(table_of(labels, masks)[:, 1:])


# Failure modes: a statistic of mask_statistics(), the value above which it is a failure, and the advice.
DIAGNOSES = {
    'mask_entropy': (0.6, 'each object is spread over all slots: train longer, or raise --lr'),
    'largest_slot': (0.9, 'one slot holds nearly all objects: lower --lr, raise --warmup_steps or change --seed'),
    'sameness': (0.5, 'the masks do not depend on the image (stripes, blobs): raise --lr or change --seed'),
    'missed': (0.2, 'many objects are left to the background: raise --num_iterations, --num_slots or --steps'),
    'split': (0.15, 'several slots share an object: raise --steps or lower --num_slots'),
}


def mask_statistics(masks: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Statistics that show how the slots fail, of each image, [B] each.

    masks [B, K, 1, H, W], labels [B, H, W] with 0 = background. Without labels all of the image is foreground, and
    `missed` and `split` are left out. Empty for K = 1.

    mask_entropy  mean entropy of the masks at a pixel of the foreground, divided by log K; 1: all slots share all
    sameness      ARI with the segmentation of the next image, if there is one; 1: the image does not matter
    largest_slot  share of the foreground in the slot with most of it; NaN for one object, where it should be 1
    missed        share of the objects that lie mostly in the background's slot
    split         share of the foreground in neither the background's slot nor the main slot of its object

    The background's slot has more than half of its pixels; if the slots share the background, there is none.
    """
    if masks.shape[1] == 1:
        return {}
    found, labels_or_ones = segmentation(masks), torch.ones_like(masks[:, 0, 0]).long() if labels is None else labels
    where = (labels_or_ones > 0) & (labels_or_ones != IGNORE)
    table = table_of(labels_or_ones, masks).double()  # [B, labels, slots]
    objects, area = table[:, 1:], where.sum((1, 2))  # [B, objects, slots], [B]
    entropy = torch.special.entr(masks.squeeze(2).double()).sum(dim=1) / math.log(masks.shape[1])
    statistics = {'mask_entropy': (entropy * where).sum((1, 2)) / area, 'largest_slot': objects.sum(1).amax(1) / area}
    if len(found) > 1:
        statistics['sameness'] = adjusted_rand_index(found, found.roll(1, dims=0))
    if labels is not None:
        visible = objects.sum(2) > 0  # [B, objects]
        statistics['largest_slot'].masked_fill_(visible.sum(1) < 2, math.nan)
        background = table[:, :1] > table[:, :1].sum(dim=2, keepdim=True) / 2  # [B, 1, slots]
        missed = (background & (objects == objects.amax(dim=2, keepdim=True))).any(dim=2) & visible  # [B, objects]
        statistics['missed'] = missed.sum(1) / visible.sum(1)
        elsewhere = objects * ~background
        statistics['split'] = (elsewhere.sum(2) - elsewhere.amax(2)).sum(1) / area
    return statistics


def diagnose(statistics: dict[str, float]) -> str:
    """The first of DIAGNOSES that the means of mask_statistics() show, '' if there is none."""
    for name, (limit, _) in DIAGNOSES.items():
        if name == 'largest_slot' and 'missed' not in statistics:
            limit = 0.999  # without labels the largest slot is the background's, which may be large
        if statistics.get(name, -math.inf) > limit:
            return name
    return ''


# =============================================================================================
# 5. Configuration and checkpoints
# =============================================================================================

# Trained weights that come with the repository, by the name of their data set; those of `paper` begin with paper_.
PRETRAINED = {path.stem: path for path in sorted((Path(__file__).parent / 'tests' / 'pretrained').glob('*.pth'))}


class ConfigError(ValueError):
    """A model that cannot be built or used this way; the message gives the reason in one line."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message gives the file and the reason in one line."""


def option(default, help: str, low=None, high=None, choices=None, paper=None, fast_only: bool = False):
    """A field of ModelConfig; its flag, its check and its help follow from it.

    default    of the fast architecture; `paper` is that of the paper's, where it is another
    low, high  range of a number, both included
    choices    the values of a field that has few
    fast_only  the paper's architecture has no such choice: it allows no value but `paper`
    """
    paper = default if paper is None else paper
    metadata = dict(help=help, low=low, high=high, choices=choices, fast=default, paper=paper, fast_only=fast_only)
    return field(default=None, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to build a model; saved in every checkpoint. Each field is described by its help.

    A field that is None takes the default of the architecture. Raises ConfigError, which names the field, for a value
    out of range.
    """

    architecture: str = option(
        'fast', 'paper: Locatello et al. 2020, Tables 4-7; fast: a variant that learns in minutes on a CPU',
        choices=('fast', 'paper'), paper='paper',
    )  # fmt: skip
    resolution: int = option(64, 'side of the square images in pixels', 16, 256)
    num_slots: int = option(7, 'number of slots: one per object and one for the background', 1, 200)
    spare_slots: int = option(
        8, 'more slots at inference than in training: fewer objects share one; redundant slots are dropped', 0, 54,
        paper=0, fast_only=True,
    )  # fmt: skip
    slot_dim: int = option(64, 'size of a slot', 4, 4096)
    hidden_dim: int = option(64, 'channels of the hidden layers of encoder and decoder', 1, 4096)
    num_iterations: int = option(8, 'iterations of Slot Attention', 1, 1000, paper=3)
    drops: int = option(
        8, 'iterations that follow, and one more for each spare slot; before each a redundant slot is dropped', 0, 1000,
        paper=0, fast_only=True,
    )  # fmt: skip
    gradient: str = option(
        'first_order', 'backpropagate through all iterations (full) or the last one only (first_order)',
        choices=('full', 'first_order'), paper='full', fast_only=True,
    )  # fmt: skip

    def __post_init__(self):
        for item in fields(self):
            name, meta = item.name, item.metadata
            if getattr(self, name) is None:
                object.__setattr__(self, name, meta['paper' if self.architecture == 'paper' else 'fast'])
            value, low, high = getattr(self, name), meta['low'], meta['high']
            if meta['choices'] and value not in meta['choices']:
                raise ConfigError(f'{name} must be one of {", ".join(meta["choices"])}, not {value!r}')
            low, high = -math.inf if low is None else low, math.inf if high is None else high
            if not meta['choices'] and not low <= value <= high:
                raise ConfigError(f'{name} must be at least {low} and at most {high}, not {value}')
            if meta['fast_only'] and self.architecture == 'paper' and value != meta['paper']:
                raise ConfigError(f"{name} {value} belongs to the 'fast' architecture; leave it out for 'paper'")

    @classmethod
    def defaults(cls, architecture: str) -> dict:
        """The value of each field that an architecture takes if it is told nothing else."""
        return asdict(cls(architecture))


def save_checkpoint(path: str | os.PathLike, model: SlotAttentionAutoEncoder, **training) -> None:
    """Writes the model's configuration and weights and `training` (tensors and plain values) to `path`.

    The file is written under a temporary name, flushed to disk and renamed, so it is never incomplete. Raises
    OSError if that fails; an earlier file at `path` is then unchanged.
    """
    path = Path(path)
    checkpoint = {
        'config': asdict(model.config),
        'model': model.state_dict(),
        'training': training,
    }
    buffer = io.BytesIO()  # torch.save to a file reports a full disk as a RuntimeError, or not at all
    torch.save(checkpoint, buffer)
    temporary = path.with_name(f'.{path.name}.{platform.node()}.{os.getpid()}')
    try:
        with open(temporary, 'wb') as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Reads what save_checkpoint() wrote: a dict with 'config' (a ModelConfig), 'model' and 'training'.

    Tensors are on the CPU; no code in the file is executed (torch.load with weights_only=True). A field of the
    configuration that the file lacks, because it is older, takes its default; 'assumed' lists their names.
    Raises CheckpointError if the file is missing or damaged, or if its model has a field that this code does not know.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'no checkpoint at {path}')
    try:
        content = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read ({error.strerror})') from error
    try:
        checkpoint = torch.load(content, map_location='cpu', weights_only=True)
        config, names = dict(checkpoint['config']), {item.name for item in fields(ModelConfig)}
        if unknown := sorted(config.keys() - names):
            raise CheckpointError(f'{path} holds a model with {", ".join(unknown)}, which this version does not have')
        found = {'config': ModelConfig(**config), 'model': dict(checkpoint['model'])}
        return found | {'training': dict(checkpoint['training']), 'assumed': sorted(names - config.keys())}
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:  # whose text advises to load it without weights_only
        raise damaged(path, ValueError('no checkpoint of train.py')) from error
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise damaged(path, error) from error


def damaged(path: str | os.PathLike, error: Exception) -> CheckpointError:
    """The one message for whatever goes wrong while a checkpoint is read or restored."""
    reason = ' '.join(str(error).split())[:200]
    return CheckpointError(f'{path} is damaged or of another version ({type(error).__name__}: {reason})')


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The checkpoint file that `path` means: the file itself, or last.pth of the folder of a run."""
    path = Path(path)
    return next(filter(Path.is_file, (path, path / 'last.pth', path / 'checkpoints' / 'last.pth')), path)


def newest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The readable checkpoint of the most training steps below a folder, None if there is none.

    The steps are those in the file: a copy of a folder has new dates. Among equals last.pth is taken. A file that is
    not readable is named on stderr.
    """
    found = []
    for path in sorted(Path(folder).rglob('*.pth')):
        try:
            step = load_checkpoint(path)['training'].get('progress', {}).get('step', 0)  # 0: written by other code
            found.append((step, path.name == 'last.pth', path))
        except (CheckpointError, AttributeError) as error:
            print(error, file=sys.stderr)
    return max(found)[2] if found else None


def create_model(config: ModelConfig) -> SlotAttentionAutoEncoder:
    """A new model: the paper's, or the fast variant."""
    return {'paper': SlotAttentionAutoEncoder, 'fast': FastAutoEncoder}[config.architecture](config)


def load_model(path: str | os.PathLike) -> SlotAttentionAutoEncoder:
    """The model of a checkpoint, on the CPU, in evaluation mode. Raises CheckpointError."""
    return build_model(load_checkpoint(path), path)


def build_model(checkpoint: dict, path: str | os.PathLike) -> SlotAttentionAutoEncoder:
    """As load_model(), for a loaded checkpoint. Prints a line for each field that it lacks; `path` is named."""
    try:
        model = create_model(checkpoint['config'])
        model.load_state_dict(checkpoint['model'])
    except Exception as error:
        raise damaged(path, error) from error
    for name in checkpoint['assumed']:
        print(f'{path} has no {name}: {getattr(model.config, name)} is assumed')
    return model.eval()
