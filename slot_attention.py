"""Slot Attention: the module, the autoencoder, test-time search, scores and checkpoints.

    from slot_attention import ModelConfig, SlotAttentionAutoEncoder, load_model
    model = SlotAttentionAutoEncoder(ModelConfig('paper', resolution=64, hidden_dim=32))  # the paper's model, or:
    model = SlotAttentionAutoEncoder(ModelConfig(resolution=64))                          # the fast variant
    recons, masks, slots, attn = model(images)           # images [B, 3, 64, 64] in [-1, 1]
    model = load_model('logs/checkpoints/last.pth')

Implements Locatello et al. 2020, "Object-Centric Learning with Slot Attention" (arXiv 2006.15055),
called "the paper" below. The file has five parts:

    1. The paper         Algorithm 1 and the autoencoder of Tables 4-7 (the loss is in ReconstructionError in train.py);
                         tests/test_reference.py compares it with the authors' code
    2. The fast variant  StridedEncoder, FramedSlotAttention, KeepHead, ErrorHead, Glimpse, ImplicitDecoder
    3. Search            refine: improves the slots of one image at test time
    4. Scores            FG-ARI, ARI, mBO, mIoU
    5. Checkpoints       ModelConfig, save_checkpoint, load_checkpoint, load_model

Letters in shape comments: B images, K slots, M = B * K, D slot size, T iterations, N = h * w
positions of the encoder's feature grid, C feature channels, H x W pixels.
"""

import io
import math
import os
import pickle
from dataclasses import asdict, dataclass, field
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
        slots = self.initial_slots(len(inputs), self.num_slots) if slots is None else slots
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

    TensorFlow removes (kernel - stride) // 2 rows and columns before the image and the rest after it.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=(kernel_size - stride) // 2)

    def forward(self, inputs: Tensor) -> Tensor:
        """[M, C_in, h, w] -> [M, C_out, stride * h, stride * w]."""
        size = self.stride[0] * inputs.shape[-1]
        return super().forward(inputs)[..., :size, :size]


class SpatialBroadcastDecoder(nn.Module):
    """Decodes each slot to colours and a mask logit (paper Section 2.2, Appendix E.3, Tables 4 and 5).

    Each slot is copied to every position of a grid, a position embedding is added, and a stack of
    transposed convolutions gives an image. Above 64 pixels it is Table 4, up to 64 Table 5.
    """

    def __init__(self, resolution: int, slot_dim: int, hidden_dim: int):
        super().__init__()
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

    config  a ModelConfig; its `architecture` selects the three parts: paper_parts() or fast_parts()
    """

    def __init__(self, config: 'ModelConfig | None' = None):
        super().__init__()
        self.config = config or ModelConfig()
        parts = {'paper': paper_parts, 'fast': fast_parts}[self.config.architecture]
        self.encoder, self.slot_attention, self.decoder = parts(self.config)

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

        Raises ValueError for images that are not of the model's resolution.
        """
        size = self.config.resolution
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f'images must be [B, 3, {size}, {size}], not {list(images.shape)}')
        if slots is None:
            num_slots = self.config.num_slots if num_slots is None else num_slots
            slots = self.slot_attention.initial_slots(len(images), num_slots, generator)
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


def paper_parts(config: 'ModelConfig') -> tuple[Encoder, SlotAttention, SpatialBroadcastDecoder]:
    """Encoder, Slot Attention and decoder of the paper.

    Above 64 pixels those of CLEVR6 (Tables 4 and 6, where hidden_dim is 64), up to 64 pixels those of Tetrominoes
    and Multi-dSprites (Tables 5 and 7, where it is 32).
    """
    return (
        Encoder(config.resolution, config.hidden_dim),
        SlotAttention(config.hidden_dim, config.num_slots, config.slot_dim, config.num_iterations),
        SpatialBroadcastDecoder(config.resolution, config.slot_dim, config.hidden_dim),
    )


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


def coord_grid(size: int) -> Tensor:
    """Coordinates of the centres of `size` pixels along one axis of an image that spans [-1, 1]: [size]."""
    return (torch.arange(size) + 0.5) / size * 2 - 1


FRAME_LIMIT = 4.0  # largest coordinate in a slot's frame, in units of its scale


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


class KeepHead(nn.Module):
    """Predicts which slots are needed: a small transformer over the slots of an image.

    A token is a slot, the attention it won, its peak, and how clearly it won. The attention between two tokens is
    biased by what both slots attend to: a duplicate has a partner that can take over.
    """

    def __init__(self, slot_dim: int, width: int = 96, num_heads: int = 4, num_layers: int = 2):
        super().__init__()
        self.num_heads = num_heads
        self.embed = nn.Linear(slot_dim + 3, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                dict(
                    norm_attention=nn.LayerNorm(width), qkv=nn.Linear(width, 3 * width), bias=nn.Linear(2, num_heads),
                    out=nn.Linear(width, width), norm_mlp=nn.LayerNorm(width),
                    mlp=nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)),
                )
            )
            for _ in range(num_layers)
        )  # fmt: skip
        self.logit = nn.Linear(width, 1)
        nn.init.constant_(self.logit.bias, 2.0)  # at first all slots are needed

    def forward(self, slots: Tensor, attn: Tensor, slot_mask: Tensor) -> Tensor:
        """slots [B, K, D], attn [B, K, N], slot_mask [B, K] -> logits [B, K] of being needed, +inf for absent slots."""
        B, K, _ = slots.shape
        attn = attn.float().clamp(1e-4, 1 - 1e-4)
        won = attn.sum(dim=2, keepdim=True)  # [B, K, 1]
        clearly = (attn * torch.logit(attn)).sum(dim=2, keepdim=True) / won
        shared = (attn @ attn.transpose(1, 2) / won + 1e-3).log()  # [B, K, K], share of one that overlaps the other
        shared = torch.stack([shared, shared.transpose(1, 2)], dim=3)  # [B, K, K, 2]
        x = torch.cat([slots, (won / attn.shape[2]).log(), attn.amax(dim=2, keepdim=True), clearly], dim=2)
        x = self.embed(x)  # [B, K, width]
        for layer in self.layers:
            qkv = layer['qkv'](layer['norm_attention'](x)).view(B, K, 3, self.num_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, K, width / heads] each
            bias = layer['bias'](shared).permute(0, 3, 1, 2)  # [B, heads, K, K]
            bias = bias.masked_fill(~slot_mask[:, None, None], -1e4).to(q.dtype)
            x = x + layer['out'](F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
            x = x + layer['mlp'](layer['norm_mlp'](x))
        return self.logit(x).squeeze(2).float().masked_fill(~slot_mask, math.inf)


class ErrorHead(nn.Module):
    """Predicts where the reconstruction will be wrong, without decoding it: a small MLP at every position."""

    def __init__(self, input_dim: int, slot_dim: int, width: int = 64):
        super().__init__()
        self.of_inputs = nn.Linear(input_dim, width)
        self.of_slots = nn.Linear(slot_dim, width)
        self.of_attn = nn.Linear(3, width)
        self.mlp = nn.Sequential(nn.ReLU(True), nn.Linear(width, width), nn.ReLU(True), nn.Linear(width, 1))

    def forward(self, inputs: Tensor, slots: Tensor, attn: Tensor, evidence: Tensor) -> Tensor:
        """inputs [B, N, D_in], slots [B, K, D], attn [B, K, N], evidence [B, N] -> log squared error [B, N].

        The evidence is the logsumexp of the attention logits over the slots: how well any slot fits the position.
        """
        highest = attn.amax(dim=1, keepdim=True)  # [B, 1, N]
        second = attn.masked_fill(attn == highest, 0).amax(dim=1, keepdim=True)  # topk takes three times as long
        # One product for all that depends on the slots: an operation on [B, N, width] takes as long as the product.
        # As the attention sums to 1 over the slots, a bias can be added to theirs.
        summary = torch.cat([attn, highest, second, evidence[:, None]], dim=1)  # [B, K + 3, N]
        weights = self.of_attn.weight.T.expand(len(slots), -1, -1)  # [B, 3, width]
        weights = torch.cat([self.of_slots(slots) + self.of_attn.bias, weights], dim=1)  # [B, K + 3, width]
        hidden = torch.baddbmm(self.of_inputs(inputs), summary.transpose(1, 2), weights)  # [B, N, width]
        return self.mlp(hidden).squeeze(2).float()


MOVES_IN_TRAINING = 4  # at most; more take time


@dataclass
class Trace:
    """Intermediate results of FramedSlotAttention.forward(), without gradient, for reallocation_loss()."""

    inputs: Tensor | None = None  # [B, N, D_in], normalised
    k: Tensor | None = None  # [B, N, D]
    v: Tensor | None = None  # [B, N, D]
    states: list = field(default_factory=list)  # (slots, attn, slot_mask) where training moves or drops a slot
    last: tuple = ()  # slots, attn and slot_mask after the last iteration


class FramedSlotAttention(SlotAttention):
    """Slot Attention with a position and a scale per slot (Invariant Slot Attention, Biza et al. 2023).

    It differs from Algorithm 1 in six points:

    frame          The first three entries of a slot are the mean position (x, y) and the standard deviation
                   of its attention. They are measured in every iteration; the rest is updated by the GRU.
                   A scale of 0 means that the slot is absent: its mask is 0.
    locality bias  A learned multiple of the squared distance to the slot, in its frame, is subtracted from
                   the logits: objects of similar colour are separated by their position.
    damping        The sum over the inputs is divided by (attention won + damping * N) instead of (attention
                   won), so a slot that wins little changes little. In Algorithm 1 every spare slot gets a
                   full mean of the inputs and moves onto an object that another slot already represents
                   (see also Krimmel et al. 2024, arXiv 2407.04170).
    reallocation   Two slots may share an object while another slot holds two. After each of `moves` iterations
                   from the fourth on, the slot that KeepHead needs least, if it is redundant, is moved to where
                   ErrorHead predicts the largest error. After each of the last `drops` iterations before the last
                   one, it is dropped instead: one slot at a time, so that another can take over. With more slots than
                   in training there are as many more drops, and if the iterations do not suffice for both, fewer moves
                   and then fewer drops. See reallocation_loss().
    gradient       With 'first_order' it passes through the last iteration only, and straight through to the initial
                   slots (Chang et al. 2022, arXiv 2207.00787; BO-QSA, Jia et al. 2023, arXiv 2210.08990); with 'full'
                   through all iterations, as in the paper.
    glimpse        After the last iteration each slot reads the features around it, see Glimpse.
    """

    MIN_SCALE = 0.05

    def __init__(
        self, input_dim: int, grid_size: int, *args,
        gradient: str = 'full', damping: float = 0.0, moves: int = 0, drops: int = 0, **kwargs,
    ):  # fmt: skip
        super().__init__(input_dim, *args, **kwargs)
        self.gradient, self.damping, self.moves, self.drops = gradient, damping, moves, drops
        if moves or drops:
            self.keep_head = KeepHead(self.slot_dim)
            self.error_head = ErrorHead(input_dim, self.slot_dim)
        self.register_buffer('grid', coord_grid(grid_size), persistent=False)
        self.locality_bias = nn.Parameter(torch.tensor(-2.0))  # before a softplus
        self.glimpse = Glimpse(input_dim, self.slot_dim)

    def forward(
        self,
        inputs: Tensor,
        slots: Tensor | None = None,
        num_iterations: int | None = None,
        moves: int | None = None,
        drops: int | None = None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Arguments and shapes as SlotAttention.forward; N = h * w positions of a square grid.

        moves, drops  fewer in training; default: the constructor's
        trace         is filled for reallocation_loss()
        """
        slots = self.initial_slots(len(inputs), self.num_slots) if slots is None else slots
        T = self.num_iterations if num_iterations is None else num_iterations
        moves, drops = self.moves if moves is None else moves, self.drops if drops is None else drops
        free = max(T - 4, 0)  # iterations after the first three and before the last
        drops = min(drops + max(slots.shape[1] - self.num_slots, 0), free) if drops else 0
        moves = min(moves, free - drops)
        initial, attns = slots, []
        slot_mask = torch.ones(slots.shape[:2], dtype=torch.bool, device=slots.device)  # all are present, [B, K]

        inputs = self.norm_inputs(inputs)  # [B, N, D_in]
        k, v = self.project_k(inputs), self.project_v(inputs)  # [B, N, D] each
        k = k.transpose(1, 2).contiguous().transpose(1, 2)  # faster in the products of all iterations
        for t in range(T):
            last = t == T - 1
            if self.gradient == 'first_order':
                slots = slots.detach()
                if last:  # the value of slots, the gradient of the initial ones
                    slots = slots + initial - initial.detach()
            # Without a graph for the iterations that get no gradient a training step takes four fifths of the time.
            with torch.set_grad_enabled(torch.is_grad_enabled() and (last or self.gradient == 'full')):
                slots, attn = self.step(slots, k, v, slot_mask)
                if trace is not None and (3 <= t < 3 + MOVES_IN_TRAINING or T - 1 - self.drops <= t < T - 1):
                    trace.states.append((slots, attn, slot_mask))
                if moves or drops:
                    slots, slot_mask = self.reallocate(slots, attn, slot_mask, inputs, k, v, t, T, moves, drops)
            attns.append(attn)
        if trace is not None:
            trace.inputs, trace.k, trace.v = inputs.detach(), k.detach(), v.detach()
            trace.last = slots.detach(), attn.detach(), slot_mask
        return self.add_glimpse(inputs, slots, attn, slot_mask), torch.stack(attns, dim=1)

    def step(self, slots: Tensor, k: Tensor, v: Tensor, slot_mask: Tensor) -> tuple[Tensor, Tensor]:
        """One iteration: slots [B, K, D], k and v [B, N, D], slot_mask [B, K] -> slots, attn [B, K, N]."""
        attn = self.logits(slots, k, slot_mask).softmax(dim=1)  # Eq. 1, [B, K, N]
        return self.update(slots, attn, v), attn

    def logits(self, slots: Tensor, k: Tensor, slot_mask: Tensor) -> Tensor:
        """Attention logits with locality bias [B, K, N]: slots [B, K, D], k [B, N, D], slot_mask [B, K]."""
        q = self.project_q(self.norm_slots(slots))  # [B, K, D]
        scales = slots[..., 2:FRAME].clamp(min=Glimpse.MIN_SCALE)
        squares = to_slot_frame(self.grid, slots[..., :2], scales).square()  # [B, K, 2, w]
        x, y = (F.softplus(self.locality_bias) * squares).unbind(2)  # [B, K, w] each
        y = y.masked_fill(~slot_mask[:, :, None], torch.finfo(y.dtype).max)
        distance = (x[:, :, None, :] + y[:, :, :, None]).flatten(2)  # [B, K, N], in the slot's frame, times the bias
        return (q * slots.shape[2] ** -0.5) @ k.transpose(1, 2) - distance

    def update(self, slots: Tensor, attn: Tensor, v: Tensor) -> Tensor:
        """Slots [B, K, D] updated with what they attend to: attn [B, K, N], v [B, N, D]."""
        B, K, D = slots.shape
        won = attn.sum(dim=2, keepdim=True)  # [B, K, 1]
        updates = attn @ v / (won + (self.damping + 1e-8) * attn.shape[2])  # Eq. 2, damped, [B, K, D]
        slots = self.gru(updates.reshape(B * K, D), slots.reshape(B * K, D)).reshape(B, K, D)
        slots = slots + self.mlp(self.norm_mlp(slots))
        return torch.cat([*self.frame(attn), slots[..., FRAME:]], dim=2)

    def reallocate(
        self, slots: Tensor, attn: Tensor, slot_mask: Tensor, inputs: Tensor, k: Tensor, v: Tensor, t: int, T: int,
        moves: int, drops: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Moves or drops the least needed slot after iteration t of T, if it is due: slots [B, K, D], slot_mask [B, K].

        moves, drops  how many there are in all, at most T - 4
        """
        moving, dropping = 3 <= t < 3 + moves, T - 1 - drops <= t < T - 1
        if not (moving or dropping):
            return slots, slot_mask
        chosen = self.redundant_slot(slots, attn, slot_mask)
        if dropping:
            return slots, slot_mask & ~chosen
        worst = around_maximum(self.predicted_error(inputs, slots, attn, slot_mask, k).exp(), self.grid)  # [B, N]
        return torch.where(chosen[:, :, None], self.update(slots, worst[:, None].expand_as(attn), v), slots), slot_mask

    def redundant_slot(self, slots: Tensor, attn: Tensor, slot_mask: Tensor) -> Tensor:
        """The least needed slot of each image, if it is more likely not needed and others exist: bool [B, K]."""
        logit, index = self.keep_head(slots, attn, slot_mask).min(dim=1)  # [B] each
        redundant = (logit < 0) & (slot_mask.sum(dim=1) > 1)  # [B]
        return F.one_hot(index, slots.shape[1]).bool() & redundant[:, None]

    def predicted_error(self, inputs: Tensor, slots: Tensor, attn: Tensor, slot_mask: Tensor, k: Tensor) -> Tensor:
        """The logarithm of the squared error that ErrorHead predicts at each position: [B, N]."""
        with torch.no_grad():  # only the head learns from its loss
            evidence = self.logits(slots, k, slot_mask).logsumexp(dim=1)  # [B, N]
        return self.error_head(inputs, slots, attn, evidence)

    def add_glimpse(self, inputs: Tensor, slots: Tensor, attn: Tensor, slot_mask: Tensor) -> Tensor:
        """The slots to decode: normalised inputs [B, N, D_in], slots [B, K, D], attn [B, K, N], slot_mask [B, K].

        The glimpse is added to all but the frame; absent slots get the scale 0.
        """
        positions, scales, _ = slots.split([2, 1, self.slot_dim - FRAME], dim=2)
        seen = self.glimpse(inputs, attn, positions, scales, self.grid, self.norm_slots(slots))
        scales = scales.masked_fill(~slot_mask[:, :, None], 0)
        return torch.cat([positions, scales, (slots + seen)[..., FRAME:]], dim=2)

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


class Glimpse(nn.Module):
    """Reads the features around each slot into BINS x BINS bins of its frame, which reach REACH scales each way.

    A weighted mean of the inputs (Eq. 2) does not tell where they were, and so loses the outline of an object:
    without the glimpse the decoder draws discs. Each bin is the mean of the features near it, weighted by a
    bilinear kernel times the slot's attention: the transpose of the sampling of a spatial transformer (Jaderberg
    et al. 2015, arXiv 1506.02025).
    """

    BINS, REACH, CHANNELS, MIN_SCALE = 7, 3.0, 32, 0.08

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
        bin_width = scales.clamp(min=self.MIN_SCALE) * 2 * self.REACH / (self.BINS - 1)  # [B, K, 1]
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

    It maps a pixel's coordinates in the slot's frame, see to_slot_frame(), to colours and a mask logit. The logit is a
    sum of UNITS half-planes. Colours are quadratic in the coordinates: smooth, so an outline must be one of the mask,
    and one slot cannot draw two objects, or an object and its background, as well as two slots can. Only slots with
    a scale above WIDE, which are backgrounds, have half-planes in their colours too, for shadows and a horizon.

    Any rows and columns can be decoded alone, and an object looks the same wherever it lies (as in Invariant Slot
    Attention). A slot with a scale of 0 or below is absent: its logit is the lowest number.
    """

    UNITS, WIDE, MIN_SCALE = 16, 0.4, 0.01

    def __init__(self, resolution: int, slot_dim: int, hidden_dim: int):
        super().__init__()
        self.register_buffer('grid', coord_grid(resolution), persistent=False)
        self.num_weights = [3 * self.UNITS, 4 * (self.UNITS + 1), 3 * 4]
        width = 3 * hidden_dim  # computed per slot, not per pixel: cheap
        self.hyper = nn.Sequential(nn.Linear(slot_dim, width), nn.ReLU(), nn.Linear(width, sum(self.num_weights)))
        keras_init(self)
        # The two generated layers multiply each other: at full scale the MSE of the first images is up to 10.
        self.hyper[-1].weight.data.mul_(0.3)

    def forward(self, slots: Tensor, pixels: Pixels = ALL_PIXELS) -> Tensor:
        """slots [M, D] -> colours and mask logit [M, 4, H, W] of the rows and columns in `pixels`."""
        positions, scales = slots[:, :2], slots[:, 2:FRAME]
        present, scales = scales > 0, scales.clamp(min=self.MIN_SCALE)  # [M, 1] each
        rows, columns = pixels
        x = to_slot_frame(self.grid[columns], positions, scales)[:, 0:1]  # [M, 1, W]
        y = to_slot_frame(self.grid[rows], positions, scales)[:, 1:2]  # [M, 1, H]
        code = torch.cat([positions, scales.log(), slots[:, FRAME:]], dim=1)
        inner, outer, colour = self.hyper(code).split(self.num_weights, dim=1)
        inner, outer, colour = (w.unflatten(1, (n, -1)) for w, n in ((inner, self.UNITS), (outer, 4), (colour, 3)))
        # Half-planes and colours are a function of x plus a function of y: no product per pixel is needed.
        along_x = inner[:, :, 0:1] * x + inner[:, :, 2:3]  # [M, UNITS, W]
        along_y = inner[:, :, 1:2] * y  # [M, UNITS, H]
        # Rounding to the dtype of autocast before the ReLU, not after it, halves the memory traffic.
        hidden = (along_x[:, :, None, :] + along_y[:, :, :, None]).to(outer.dtype)  # [M, UNITS, H, W]
        hidden = hidden.relu_().flatten(2)  # [M, UNITS, H * W]
        wide = torch.sigmoid((scales - self.WIDE) / (0.1 * self.WIDE)).to(outer.dtype)[:, :, None]  # [M, 1, 1]
        weights = torch.cat([outer[:, :3, :-1] * wide, outer[:, 3:, :-1]], dim=1) * self.UNITS**-0.5  # [M, 4, UNITS]
        decoded = torch.baddbmm(outer[:, :, -1:], weights, hidden)  # [M, 4, H * W]
        rgbs, logit = decoded.unflatten(2, (y.shape[2], x.shape[2])).split([3, 1], dim=1)
        x, y = x / FRAME_LIMIT, y / FRAME_LIMIT  # in [-1, 1]
        along_x = colour[:, :, 0:1] * x + colour[:, :, 1:2] * x.square()  # [M, 3, W]
        along_y = colour[:, :, 2:3] * y + colour[:, :, 3:4] * y.square()  # [M, 3, H]
        smooth = (along_x[:, :, None, :] + along_y[:, :, :, None]).to(rgbs.dtype)
        logit = logit.masked_fill(~present[:, :, None, None], torch.finfo(logit.dtype).min)
        return torch.cat([rgbs + smooth, logit], dim=1)


def fast_parts(config: 'ModelConfig') -> tuple[StridedEncoder, FramedSlotAttention, ImplicitDecoder]:
    """Encoder, Slot Attention and decoder of the fast variant."""
    encoder = StridedEncoder(config.resolution, config.hidden_dim)
    attention = FramedSlotAttention(
        config.hidden_dim, encoder.grid_size, config.num_slots, config.slot_dim, config.num_iterations,
        gradient=config.gradient, damping=config.damping, moves=config.moves, drops=config.drops,
    )  # fmt: skip
    return encoder, attention, ImplicitDecoder(config.resolution, config.slot_dim, config.hidden_dim)


def decode_partial(
    model: SlotAttentionAutoEncoder, slots: Tensor, pixels: Pixels = ALL_PIXELS
) -> tuple[Tensor, Tensor]:
    """As model.decode(), for some of the pixels: slots [B, K, D] -> colours [B, K, 3, H, W], masks [B, K, 1, H, W].

    pixels  the rows and columns to decode, H and W of them
    """
    flat = slots.flatten(0, 1)  # [M, D]
    if isinstance(model.decoder, ImplicitDecoder):
        decoded = model.decoder(flat, pixels)
    else:  # a convolution needs its neighbours: decode the whole image
        decoded = model.decoder(flat)[:, :, pixels[0]][..., pixels[1]]
    rgbs, logits = decoded.unflatten(0, slots.shape[:2]).split([3, 1], dim=2)
    return rgbs, logits.softmax(dim=1)


def around_maximum(values: Tensor, grid: Tensor) -> Tensor:
    """Values >= 0 on the feature grid [B, N] -> a window around their maximum, [B, N], whose largest entry is 1.

    The values are smoothed before the maximum is taken, with a kernel about as wide as an object.
    """
    size, values = len(grid), values.unflatten(1, (len(grid), len(grid)))  # [B, h, w]
    kernel = torch.exp(-0.5 * ((grid[:, None] - grid) / 0.125).square()).to(values)  # [w, w]
    worst = (kernel @ values @ kernel).flatten(1).argmax(dim=1)  # [B]
    window = (values * kernel[worst // size][:, :, None] * kernel[worst % size][:, None, :]).flatten(1)
    return window / (window.amax(dim=1, keepdim=True) + 1e-12)


def is_needed(images: Tensor, before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """Whether each image needs a slot, judged by the squared error with it and without it: bool [n].

    images         [n, 3, H, W]
    before, after  squared error with the slot and without it at the decoded pixels, [n, h, w] each
    mask           the slot's mask at these pixels, [n, h, w]

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


def reallocation_loss(
    model: SlotAttentionAutoEncoder, images: Tensor, errors: Tensor, trace: Trace, rng: np.random.Generator
) -> Tensor:
    """The loss of KeepHead and ErrorHead in a training step; the rest of the model gets no gradient from it.

    images  [B, 3, H, W]
    errors  [B, h, w], squared errors of their reconstruction, of any rows and columns
    trace   of the forward pass
    """
    attention, size = model.slot_attention, model.encoder.grid_size
    target = (F.adaptive_avg_pool2d(errors.detach(), size).flatten(1) + 1e-5).log()  # [B, N]
    predicted = attention.predicted_error(trace.inputs, *trace.last, trace.k)
    # The likelihood of an exponential distribution: lowest where the predicted error is the mean error.
    loss = 0.01 * (predicted + (target - predicted).clamp(max=6).exp() - target - 1).mean()
    slots, attn, slot_mask, chosen, needed = try_without(model, images, trace, rng)
    logits = attention.keep_head(slots, attn, slot_mask).gather(1, chosen[:, None]).squeeze(1)  # [n]
    terms = F.binary_cross_entropy_with_logits(logits, needed.float(), reduction='none')
    return loss + 0.1 * (terms * (slot_mask.sum(dim=1) > 1)).mean()


@torch.no_grad()
def try_without(
    model: SlotAttentionAutoEncoder, images: Tensor, trace: Trace, rng: np.random.Generator
) -> tuple[Tensor, ...]:
    """Tests on half of the images whether one slot is needed: slots [n, K, D], attn [n, K, N], slot_mask [n, K], the
    index of the slot [n], and bool [n].

    From a random state of the forward pass a few slots are dropped one after the other, as later in the pass, then
    one more: the one that KeepHead needs least, or any. The others get one iteration to take over, and is_needed()
    judges the result.
    """
    attention = model.slot_attention
    half = slice(int(rng.integers(min(2, len(images)))), None, 2)
    state = trace.states[rng.integers(len(trace.states))]
    images, slots, attn, slot_mask, inputs, k, v = (x[half] for x in (images, *state, trace.inputs, trace.k, trace.v))
    n, K = slots.shape[:2]
    for _ in range(int(rng.integers(1 + attention.drops))):
        slot_mask = slot_mask & ~attention.redundant_slot(slots, attn, slot_mask)
        slots, attn = attention.step(slots, k, v, slot_mask)
    draw = torch.from_numpy(rng.random((n, K + 1))).to(slots)
    any_slot = (draw[:, :K] * slot_mask).argmax(dim=1)  # [n]
    chosen = torch.where(draw[:, K] < 0.5, any_slot, attention.keep_head(slots, attn, slot_mask).argmin(dim=1))
    masks_tried = torch.cat([slot_mask, slot_mask & ~F.one_hot(chosen, K).bool()])  # [2 n, K]
    inputs, k, v = (torch.cat([x, x]) for x in (inputs, k, v))
    tried, tried_attn = attention.step(torch.cat([slots, slots]), k, v, masks_tried)
    rows, columns = pixels = tuple(slice(int(i), None, 3) for i in rng.integers(3, size=2))
    rgbs, masks = decode_partial(model, attention.add_glimpse(inputs, tried, tried_attn, masks_tried), pixels)
    target = images[:, :, rows, columns]
    error = ((rgbs * masks).sum(dim=1).float() - torch.cat([target, target])).square().mean(dim=1)
    before, after = error.chunk(2)  # [n, h, w] each
    mask = masks[torch.arange(n, device=chosen.device), chosen].squeeze(1).float()  # with the slot, [n, h, w]
    return slots, attn, slot_mask, chosen, is_needed(images, before, after, mask)


class AcceleratedBroadcastDecoder(SpatialBroadcastDecoder):
    """The layers of a SpatialBroadcastDecoder, computed faster on CPUs; equal to rounding, with the same state_dict.

    First layer: it is linear in the sum of a slot, the same at every position, and the position embedding, the
    same for every slot. At stride 1 (Table 5) it is computed once for the positions, and for each slot only at
    the border and at one position inside, which saves half of that decoder's work.

    Mirror image: all is computed with flipped kernels on a flipped grid, and the result is flipped back. There
    the padding of ConvTranspose2dSame is PyTorch's output_padding, without a copy to crop, and a transposed
    convolution of stride 1 is a convolution with the kernel as stored.
    """

    def __init__(self, decoder: SpatialBroadcastDecoder):
        nn.Module.__init__(self)
        self.position, self.conv = decoder.position, decoder.conv

    def forward(self, slots: Tensor) -> Tensor:
        """slots [M, D] -> colours and mask logit [M, 4, H, W]."""
        first, *layers = self.conv
        slots = slots[:, :, None, None]  # [M, D, 1, 1]
        if first.stride[0] > 1:
            x = self._mirrored(first, self.position(slots).flip(2, 3))
        else:
            x = self._first_layer(first, slots)
        for layer in layers:
            x = layer(x) if isinstance(layer, nn.ReLU) else self._mirrored(layer, x)
        return x.flip(2, 3)

    @staticmethod
    def _mirrored(layer: ConvTranspose2dSame, x: Tensor) -> Tensor:
        """The layer in the mirror image: [M, C_in, h, w] -> [M, C_out, stride * h, stride * w]."""
        stride, padding = layer.stride[0], layer.kernel_size[0] // 2
        if stride == 1 and layer.out_channels > 4:  # with 4 channels the transposed convolution is faster
            return F.conv2d(x, layer.weight.transpose(0, 1), layer.bias, padding=padding)
        return F.conv_transpose2d(x, layer.weight.flip(2, 3), layer.bias, stride, padding, stride - 1)

    def _first_layer(self, layer: ConvTranspose2dSame, slots: Tensor) -> Tensor:
        """layer(self.position(slots)) in the mirror image, for stride 1: slots [M, D, 1, 1] -> [M, C, h, w]."""
        kernel, size = layer.kernel_size[0], len(self.position.grid)
        # On a grid as large as the kernel a slot meets every border; only in the middle all taps are inside.
        x = F.conv_transpose2d(slots.expand(-1, -1, kernel, kernel), layer.weight.flip(2, 3), padding=kernel // 2)
        x = x.permute(0, 2, 3, 1)  # cat() orders the memory of its result by dimension: channels last
        for dim in (1, 2):
            before, middle, after = x.split([kernel // 2, 1, kernel // 2], dim)
            shape = list(middle.shape)
            shape[dim] = size - kernel + 1
            x = torch.cat([before, middle.expand(shape), after], dim)
        positions = self.position(torch.zeros_like(slots[:1])).flip(2, 3)  # [1, D, h, w]
        return x.permute(0, 3, 1, 2) + self._mirrored(layer, positions)


# =============================================================================================
# 3. Search: improving the slots of one image at test time
# =============================================================================================


def reconstruction_error(model: SlotAttentionAutoEncoder, images: Tensor, slots: Tensor) -> Tensor:
    """MSE of each image on every second row and column: images [B, 3, H, W], slots [B, K, D] -> [B]."""
    every_second = slice(None, None, 2)
    rgbs, masks = decode_partial(model, slots, (every_second, every_second))
    return ((rgbs * masks).sum(dim=1) - images[:, :, every_second, every_second]).float().square().mean(dim=(1, 2, 3))


def refine(
    model: SlotAttentionAutoEncoder, images: Tensor, slots: Tensor, num_steps: int = 20, lr: float = 0.02
) -> Tensor:
    """Minimises each image's reconstruction error with respect to its slots: [B, K, D] -> [B, K, D].

    images [B, 3, H, W]. Semi-amortised inference (Kim et al. 2018, arXiv 1802.02550): the network's slots are the
    start of `num_steps` steps of Adam, each on a quarter of the pixels, with a learning rate that falls from `lr` to
    0. An image whose error does not fall keeps its slots.
    """
    with torch.inference_mode(False), torch.enable_grad():
        images, before = images.clone(), slots.detach().clone()  # tensors made in inference mode have no gradient
        slots = before.clone().requires_grad_()
        optimizer = torch.optim.Adam([slots], betas=(0.5, 0.9))  # a short memory, for there are few steps
        for step in range(num_steps):
            rows, columns = slice(step % 2, None, 2), slice(step // 2 % 2, None, 2)
            rgbs, masks = decode_partial(model, slots, (rows, columns))
            error = ((rgbs * masks).sum(dim=1) - images[:, :, rows, columns]).float().square()
            (slots.grad,) = torch.autograd.grad(error.mean(dim=(1, 2, 3)).sum(), slots)
            optimizer.param_groups[0]['lr'] = lr * (1 - step / num_steps)
            optimizer.step()
        slots = slots.detach()
    with torch.no_grad():
        improved = reconstruction_error(model, images, slots) < reconstruction_error(model, images, before)  # [B]
        return torch.where(improved[:, None, None], slots, before)


# =============================================================================================
# 4. Scores
# =============================================================================================

IGNORE_LABEL = 255  # pixels with this label count in no score (the border in PASCAL VOC)


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


def adjusted_rand_index(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """Adjusted Rand index of two segmentations of each image, [B] (Hubert and Arabie 1985).

    1 for equal partitions, 0 on average for independent ones. Two equal trivial partitions (one object,
    found whole) score 1; an image without a counted pixel scores NaN. Arguments as in contingency_table().
    """
    return _ari(contingency_table(a, b, where))


def _ari(table: Tensor) -> Tensor:
    """Contingency table [B, I, J] -> ARI [B]. Counts of pairs are exact in float64, below 2^53."""

    def pairs(n: Tensor) -> Tensor:
        return n.double() * (n - 1) / 2

    total = pairs(table.sum((1, 2)))
    together = pairs(table).sum((1, 2))
    in_a, in_b = pairs(table.sum(2)).sum(1), pairs(table.sum(1)).sum(1)
    expected = in_a * in_b / total.clamp(min=1)
    maximum = (in_a + in_b) / 2
    score = torch.where(maximum == expected, 1.0, (together - expected) / (maximum - expected))
    return torch.where(table.sum((1, 2)) > 0, score, torch.nan)


def _best_and_matched_iou(table: Tensor) -> tuple[Tensor, Tensor]:
    """Contingency table [B, labels, slots] -> mBO [B] and mIoU [B] of the labels above 0; NaN without objects."""
    union = table.sum(2, keepdim=True) + table.sum(1, keepdim=True) - table
    iou = (table.double() / union.clamp(min=1))[:, 1:]  # [B, objects, slots]; 0 for an object without pixels
    num_objects = (table.sum(2)[:, 1:] > 0).sum(1)  # [B]
    best = iou.amax(dim=2).sum(1) / num_objects  # 0 / 0 is NaN
    matched = [image[linear_sum_assignment(image, maximize=True)].sum() for image in iou.cpu().numpy()]
    return best, torch.tensor(matched, dtype=iou.dtype, device=iou.device) / num_objects


def segmentation_scores(labels: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Scores of each image, [B] each.

    labels  [B, H, W], 0 is the background, 1, 2, ... are objects, 255 is ignored
    masks   [B, K, 1, H, W]; a pixel belongs to the slot with the largest mask

    fg_ari  ARI over the pixels of the true foreground (paper Section 4.1); NaN without foreground
    ari     ARI over all pixels
    mbo     mean over the objects of the best IoU that any slot has with them; NaN without objects
    miou    mean IoU of objects and slots, matched one to one (Hungarian algorithm); an object without a slot
            counts 0; NaN without objects

    Raises ValueError for negative labels and for labels and masks of different sizes.
    """
    found = segmentation(masks)  # [B, H, W]
    if labels.shape != found.shape:
        raise ValueError(f'labels {list(labels.shape)} and masks {list(masks.shape)} are of different sizes')
    if labels.min() < 0:
        raise ValueError(f'labels must not be negative, the smallest is {int(labels.min())}')
    counted = labels != IGNORE_LABEL
    table = contingency_table(labels.where(counted, 0), found, counted)  # [B, labels, slots]
    mbo, miou = _best_and_matched_iou(table)
    return {'fg_ari': _ari(table[:, 1:]), 'ari': _ari(table), 'mbo': mbo, 'miou': miou}


def fg_ari(labels: Tensor, masks: Tensor) -> Tensor:
    """FG-ARI of each image, [B]; arguments as in segmentation_scores()."""
    return segmentation_scores(labels, masks)['fg_ari']


# =============================================================================================
# 5. Configuration and checkpoints
# =============================================================================================

MIN_RESOLUTION, MAX_RESOLUTION = 16, 256
CHECKPOINT_FORMAT = 'slot-attention/4'
# Trained weights that come with the repository, by the name of their data set; those of `paper` begin with paper_.
PRETRAINED = {path.stem: path for path in sorted((Path(__file__).parent / 'tests' / 'pretrained').glob('*.pth'))}


class ConfigError(ValueError):
    """A model that cannot be built or used this way; the message gives the reason in one line."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message gives the file and the reason in one line."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build a model; saved in every checkpoint.

    architecture    'fast': part 2 of this file; 'paper': part 1
    resolution      side of the square images, pixels
    num_slots       K, slots in training; another number can be given per call
    slot_dim        D, size of a slot
    num_iterations  T, iterations of Slot Attention; another number can be given per call
    hidden_dim      channels of the hidden layers of encoder and decoder
    gradient        'full', or 'first_order' of the fast variant, see FramedSlotAttention
    damping         of the fast variant, see FramedSlotAttention; 0: a mean of the inputs as in Algorithm 1
    moves, drops    of the fast variant: how often a redundant slot is moved or dropped, see FramedSlotAttention

    Raises ConfigError for values that make no model, naming the field.
    """

    architecture: str = 'fast'
    resolution: int = 64
    num_slots: int = 7
    slot_dim: int = 64
    num_iterations: int = 3
    hidden_dim: int = 64
    gradient: str = 'full'
    damping: float = 0.0
    moves: int = 0
    drops: int = 0

    def __post_init__(self):
        for name, allowed in (('architecture', ('fast', 'paper')), ('gradient', ('full', 'first_order'))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f'{name} must be one of {", ".join(allowed)}, not {getattr(self, name)!r}')
        if (self.architecture, self.gradient) == ('paper', 'first_order'):
            raise ConfigError("gradient 'first_order' belongs to the 'fast' architecture; leave it 'full' for 'paper'")
        for name in ('num_slots', 'slot_dim', 'num_iterations', 'hidden_dim'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name} must be at least 1, not {getattr(self, name)}')
        for name in ('damping', 'moves', 'drops'):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f'{name} must be at least 0, not {getattr(self, name)}')
            if self.architecture == 'paper' and getattr(self, name):
                raise ConfigError(f"{name} belongs to the 'fast' architecture; leave it 0 for 'paper'")
        if self.moves or self.drops:
            needed = 4 + self.moves + self.drops
            if self.gradient != 'first_order' or self.num_iterations < needed:
                raise ConfigError(
                    f"{self.moves} moves and {self.drops} drops need gradient 'first_order' and num_iterations of at "
                    f'least {needed}'
                )
        if self.architecture == 'fast' and self.slot_dim <= FRAME:
            raise ConfigError(f"slot_dim must be larger than {FRAME} for the 'fast' architecture, not {self.slot_dim}")
        step = 16 if self.architecture == 'paper' and self.resolution > 64 else 1  # Table 4 doubles an 8x8 grid
        if not MIN_RESOLUTION <= self.resolution <= MAX_RESOLUTION or self.resolution % step:
            raise ConfigError(
                f'resolution must be from {MIN_RESOLUTION} to {MAX_RESOLUTION} pixels, and a multiple of 16 above 64 '
                f"for the 'paper' architecture, not {self.resolution}"
            )


def save_checkpoint(path: str | os.PathLike, model: SlotAttentionAutoEncoder, **training) -> None:
    """Writes the model's configuration and weights and `training` (tensors and plain values) to `path`.

    The file is written under a temporary name, flushed to disk and renamed, so it is never incomplete. Raises
    OSError if that fails; an earlier file at `path` is then unchanged.
    """
    path = Path(path)
    checkpoint = {
        'format': CHECKPOINT_FORMAT,
        'config': asdict(model.config),
        'model': model.state_dict(),
        'training': training,
    }
    buffer = io.BytesIO()  # torch.save to a file reports a full disk as a RuntimeError, or not at all
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
    """Reads what save_checkpoint() wrote: a dict with 'config' (a ModelConfig), 'model' and 'training'.

    Tensors are on the CPU; no code in the file is executed (torch.load with weights_only=True). Raises
    CheckpointError if the file is missing, damaged, or not a checkpoint of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'no checkpoint at {path}')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if checkpoint['format'] != CHECKPOINT_FORMAT:
            raise ValueError(f'its format is not {CHECKPOINT_FORMAT!r}')
        return {
            'config': ModelConfig(**checkpoint['config']),
            'model': dict(checkpoint['model']),
            'training': dict(checkpoint['training']),
        }
    except pickle.UnpicklingError as error:  # whose text advises to load it without weights_only
        raise damaged(path, ValueError('no checkpoint of train.py')) from error
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise damaged(path, error) from error


def damaged(path: str | os.PathLike, error: Exception) -> CheckpointError:
    """The one message for whatever goes wrong while a checkpoint is read or restored."""
    reason = ' '.join(str(error).split())[:200]
    return CheckpointError(f'{path} is damaged or of another version ({type(error).__name__}: {reason})')


def load_model(path: str | os.PathLike) -> SlotAttentionAutoEncoder:
    """The model of a checkpoint, on the CPU, in evaluation mode. Raises CheckpointError."""
    return build_model(load_checkpoint(path), path)


def build_model(checkpoint: dict, path: str | os.PathLike) -> SlotAttentionAutoEncoder:
    """As load_model(), for a loaded checkpoint; `path` is named in the error message."""
    try:
        model = SlotAttentionAutoEncoder(checkpoint['config'])
        model.load_state_dict(checkpoint['model'])
    except Exception as error:
        raise damaged(path, error) from error
    return model.eval()
