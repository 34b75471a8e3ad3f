"""The model against the paper's equations and tables, the scores against brute force."""

import itertools
import math
import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import slot_attention
from slot_attention import (
    FRAME,
    AcceleratedBroadcastDecoder,
    CheckpointError,
    ConfigError,
    FramedSlotAttention,
    Glimpse,
    ImplicitDecoder,
    ModelConfig,
    SlotAttention,
    SlotAttentionAutoEncoder,
    Trace,
    adjusted_rand_index,
    around_maximum,
    coord_grid,
    decode_partial,
    fg_ari,
    is_needed,
    load_checkpoint,
    load_model,
    reallocation_loss,
    reconstruction_error,
    refine,
    save_checkpoint,
    segmentation_scores,
    try_without,
)

ARCHITECTURES = ('fast', 'paper')
GRADIENTS = (('fast', 'full'), ('fast', 'first_order'), ('paper', 'full'))


def small_model(**changes):
    return SlotAttentionAutoEncoder(ModelConfig(**{'resolution': 16, 'hidden_dim': 8, 'slot_dim': 16} | changes))


def module(**changes):
    return SlotAttention(**{'input_dim': 12, 'num_slots': 4, 'slot_dim': 8} | changes).double()


# Algorithm 1


def test_one_iteration_follows_algorithm_1_written_out_number_by_number():
    sa = module()
    for p in sa.parameters():  # biases and gains too must matter
        torch.nn.init.normal_(p, std=0.5)
    inputs, start = torch.randn(2, 5, 12).double(), torch.randn(2, 4, 8).double()
    slots, attn = sa(inputs, num_iterations=1, slots=start)

    def norm(x, layer):
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-3).sqrt()
        return x * layer.weight + layer.bias

    gru = sa.gru
    for b in range(2):
        x = torch.stack([norm(v, sa.norm_inputs) for v in inputs[b]])
        k, v = x @ sa.project_k.weight.T, x @ sa.project_v.weight.T
        q = torch.stack([norm(s, sa.norm_slots) for s in start[b]]) @ sa.project_q.weight.T
        M = torch.stack([torch.stack([(k[n] @ q[j]) / math.sqrt(8) for j in range(4)]) for n in range(5)])  # [N, K]
        A = M.exp() / M.exp().sum(dim=1, keepdim=True)
        assert torch.allclose(attn[b, 0], A.T)
        W = (A + 1e-8) / (A + 1e-8).sum(dim=0, keepdim=True)
        for j in range(4):
            u, h = (W[:, j : j + 1] * v).sum(0), start[b, j]
            i = (gru.weight_ih @ u + gru.bias_ih).chunk(3)
            g = (gru.weight_hh @ h + gru.bias_hh).chunk(3)
            reset, update = torch.sigmoid(i[0] + g[0]), torch.sigmoid(i[1] + g[1])
            h = (1 - update) * torch.tanh(i[2] + reset * g[2]) + update * h
            y = norm(h, sa.norm_mlp)
            hidden = torch.relu(sa.mlp[0].weight @ y + sa.mlp[0].bias)
            expected = h + sa.mlp[2].weight @ hidden + sa.mlp[2].bias
            assert torch.allclose(slots[b, j], expected)


def test_permuting_slots_permutes_outputs_and_permuting_inputs_changes_nothing():
    sa = module()
    inputs, start = torch.randn(2, 9, 12).double(), torch.randn(2, 4, 8).double()
    slots, attn = sa(inputs, slots=start)
    order = torch.tensor([2, 0, 3, 1])
    permuted, permuted_attn = sa(inputs, slots=start[:, order])
    assert torch.allclose(permuted, slots[:, order])
    assert torch.allclose(permuted_attn, attn[:, :, order])
    places = torch.randperm(9)
    shuffled, shuffled_attn = sa(inputs[:, places], slots=start)
    assert torch.allclose(shuffled, slots)
    assert torch.allclose(shuffled_attn, attn[..., places])


def test_attention_of_every_iteration_sums_to_one_over_the_slots():
    _, attn = module()(torch.randn(2, 9, 12).double(), torch.randn(2, 6, 8).double(), num_iterations=5)
    assert attn.shape == (2, 5, 6, 9)
    assert torch.allclose(attn.sum(2), torch.ones(2, 5, 9).double())
    assert not torch.allclose(attn[:, 0], attn[:, 4])


def test_damping_leaves_alone_what_wins_little_and_hardly_touches_what_wins_much():
    sa = FramedSlotAttention(12, 3, 4, 8, damping=0.5).double()
    torch.nn.init.zeros_(sa.project_k.weight)
    sa.locality_bias.data.fill_(-math.inf)  # equal logits: every slot wins 9 / 4 inputs
    inputs, start = torch.randn(1, 9, 12).double(), torch.randn(1, 4, 8).double()
    mean = sa.project_v(sa.norm_inputs(inputs)).mean(1)
    received = []
    sa.gru.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    _, attn = sa(inputs, start, num_iterations=1)
    assert torch.allclose(attn, torch.full_like(attn, 1 / 4))
    assert torch.allclose(received[0], mean.expand(4, 8) * 2.25 / (2.25 + 0.5 * 9))
    sa.damping = 0.0
    sa(inputs, start, num_iterations=1)
    assert torch.allclose(received[1], mean.expand(4, 8))


def test_gradient_modes_agree_in_the_forward_pass_and_in_the_last_iteration():
    full, first = (FramedSlotAttention(12, 3, 4, 8, gradient=g).double() for g in ('full', 'first_order'))
    first.load_state_dict(full.state_dict())
    inputs, start = torch.randn(2, 9, 12).double(), torch.randn(2, 4, 8).double()
    assert torch.allclose(full(inputs, start)[0], first(inputs, start)[0])

    first(inputs, start)[0].square().sum().backward()
    full(inputs, start, num_iterations=2, trace=(trace := Trace()))
    full(inputs, trace.last[0], num_iterations=1)[0].square().sum().backward()
    for (name, a), b in zip(full.named_parameters(), first.parameters(), strict=True):
        assert a.grad is b.grad is None or torch.allclose(a.grad, b.grad), name


@pytest.mark.parametrize(('architecture', 'gradient'), GRADIENTS)
def test_gradient_reaches_every_parameter(architecture, gradient):
    model = small_model(architecture=architecture, gradient=gradient)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    (model(images).recons - images).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize(('architecture', 'gradient'), GRADIENTS)
def test_flop_of_a_step_can_be_counted(architecture, gradient):
    """The counter's hooks expect a gradient function of every tensor that requires a gradient."""
    model = small_model(architecture=architecture, gradient=gradient)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 16, 16)).recons.sum().backward()
    assert counter.get_total_flops() > 10**6


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_training_and_evaluation_mode_compute_the_same(architecture):
    model = small_model(architecture=architecture)
    images, slots = torch.rand(2, 3, 16, 16), torch.randn(2, 4, 16)
    for a, b in zip(model.train()(images, slots=slots), model.eval()(images, slots=slots), strict=True):
        assert torch.equal(a, b)


def test_gaussian_slots_have_the_mean_and_the_spread_they_learned():
    sa = module()
    sa.slots_mu.data.fill_(3.0)
    sa.slots_log_sigma.data.fill_(-1.0)
    slots = sa.initial_slots(500, 40)
    assert abs(slots.mean() - 3) < 0.01
    assert abs(slots.std() - math.exp(-1)) < 0.01


def test_a_generator_decides_the_noise():
    model, images = small_model(), torch.rand(1, 3, 16, 16)
    draws = [model(images, generator=torch.Generator().manual_seed(seed)).slots for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_initialisation_is_that_of_the_reference_code():
    sa = SlotAttention(input_dim=32, slot_dim=64)
    limit = math.sqrt(6 / 65)  # Glorot with fan_in 1 and fan_out D
    for p in (sa.slots_mu, sa.slots_log_sigma):
        assert 0.8 * limit < p.abs().max() <= limit
    assert torch.allclose(sa.gru.weight_hh.T @ sa.gru.weight_hh, torch.eye(64), atol=1e-5)
    assert sa.gru.weight_ih.abs().max() <= math.sqrt(6 / (64 + 3 * 64))
    model = small_model()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.LayerNorm):
            assert layer.eps == 1e-3, name
        elif isinstance(getattr(layer, 'bias', None), torch.Tensor):
            assert layer.bias.abs().sum() == 0, name


# The autoencoder


def test_outputs_are_named_shaped_and_normalised_as_documented():
    model = small_model(num_slots=5)
    output = model(torch.rand(3, 3, 16, 16))
    recons, masks, slots, attn = output
    assert recons is output.recons and recons.shape == (3, 3, 16, 16)
    assert masks.shape == (3, 5, 1, 16, 16) and slots.shape == (3, 5, 16) and attn.shape == (3, 3, 5, 8, 8)
    assert torch.allclose(masks.sum(1), torch.ones(3, 1, 16, 16), atol=1e-6)
    rgbs, decoded_masks = model.decode(slots)
    assert torch.equal(masks, decoded_masks)
    assert torch.allclose((rgbs * masks).sum(1), recons)


@pytest.mark.parametrize('num_slots', [1, 2, 11])
def test_fewer_and_more_slots_and_iterations_at_test_time(num_slots):
    output = small_model()(torch.rand(2, 3, 16, 16), num_slots=num_slots, num_iterations=5)
    assert output.masks.shape[1] == output.slots.shape[1] == num_slots
    assert output.attn.shape[1:3] == (5, num_slots)


def test_an_image_does_not_depend_on_its_batch():
    model, images, slots = small_model(), torch.rand(4, 3, 16, 16), torch.randn(4, 7, 16)
    whole, alone = model(images, slots=slots), model(images[2:3], slots=slots[2:3])
    assert torch.allclose(whole.recons[2:3], alone.recons, atol=1e-5)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r'must be \[B, 3, 16, 16\], not \[1, 3, 32, 32\]'):
        small_model()(torch.rand(1, 3, 32, 32))


def conv(kernel, inputs, outputs):
    return kernel * kernel * inputs * outputs + outputs


def dense(inputs, outputs):
    return inputs * outputs + outputs


# Encoder: Tables 6 and 7, 4 convolutions, position embedding, layer norm, MLP.
# Decoder: Table 4 (4 with stride 2, 1 with stride 1, the last 3x3) and Table 5 (3 and the last).
CLEVR = ([conv(5, 3, 64)] + 3 * [conv(5, 64, 64)], 5 * [conv(5, 64, 64)] + [conv(3, 64, 4)])
SPRITES = (
    [conv(5, 3, 32)] + 3 * [conv(5, 32, 32)],
    [conv(5, 64, 32)] + 2 * [conv(5, 32, 32)] + [conv(3, 32, 4)],
)
PAPER = [(128, 64, *CLEVR, 8), (64, 32, *SPRITES, 64), (35, 32, *SPRITES, 35)]


@pytest.mark.parametrize(('resolution', 'hidden', 'encoder', 'decoder', 'broadcast'), PAPER)
def test_paper_architecture_has_the_parameters_of_its_tables(resolution, hidden, encoder, decoder, broadcast):
    model = SlotAttentionAutoEncoder(ModelConfig('paper', resolution, hidden_dim=hidden))

    def counts(layers):
        return [sum(p.numel() for p in layer.parameters()) for layer in layers if list(layer.parameters())]

    assert counts(model.encoder.conv) == encoder
    assert counts(model.encoder.mlp) == 2 * [dense(hidden, hidden)]
    assert counts([model.encoder.position, model.encoder.norm]) == [dense(4, hidden), 2 * hidden]
    assert counts(model.decoder.conv) == decoder
    assert model.decoder.position.grid.shape == (broadcast, broadcast, 4)
    D = 64
    attention = 2 * D + 2 * hidden + 2 * D + 2 * D  # mu and log sigma; three layer norms
    attention += D * D + 2 * hidden * D  # q, k, v
    attention += 2 * (3 * D * D + 3 * D)  # GRU
    attention += dense(D, 128) + dense(128, D)
    assert counts([model.slot_attention]) == [attention]


FAST_GRIDS = {16: 8, 17: 9, 30: 15, 35: 18, 63: 32, 64: 16, 101: 26, 128: 32, 256: 64}


@pytest.mark.parametrize(
    ('architecture', 'resolution', 'grid_size'),
    [('fast', *sizes) for sizes in FAST_GRIDS.items()] + [('paper', r, r) for r in (16, 35, 64, 80, 128)],
)
def test_resolutions_that_can_be_produced(architecture, resolution, grid_size):
    model = SlotAttentionAutoEncoder(ModelConfig(architecture, resolution, num_slots=2, hidden_dim=4))
    output = model(torch.rand(1, 3, resolution, resolution))
    assert output.recons.shape == (1, 3, resolution, resolution)
    assert output.attn.shape[-2:] == (grid_size, grid_size)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(architecture='paper', resolution=100), 'multiple of 16 above 64 .* not 100'),
        (dict(resolution=8), 'resolution must be from 16 to 256 pixels'),
        (dict(resolution=300), 'resolution must be from 16 to 256 pixels'),
        (dict(num_slots=0), 'num_slots must be at least 1'),
        (dict(num_iterations=0), 'num_iterations must be at least 1'),
        (dict(architecture='slow'), 'architecture must be one of fast, paper'),
        (dict(gradient='none'), 'gradient must be one of full, first_order'),
        (dict(slot_dim=3), 'slot_dim must be larger'),
        (dict(damping=-1.0), 'damping must be at least 0'),
        (dict(architecture='paper', damping=0.1), "damping belongs to the 'fast' architecture"),
        (dict(architecture='paper', moves=1), "moves belongs to the 'fast' architecture"),
        (dict(moves=4, drops=4, gradient='first_order', num_iterations=8), 'num_iterations of at least 12'),
        (dict(moves=1, num_iterations=8), "need gradient 'first_order'"),
        (dict(architecture='paper', gradient='first_order'), "gradient 'first_order' belongs to the 'fast'"),
    ],
)
def test_configurations_that_make_no_model_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**changes)


@pytest.mark.parametrize('scale', [0.3, 0.9])
@pytest.mark.parametrize(('bfloat16', 'tolerance'), [(False, 1e-5), (True, 5e-3)])
def test_the_implicit_decoder_is_a_network_per_pixel(bfloat16, tolerance, scale):
    """Wide slots have half-planes in their colours, small ones colours that are quadratic in x and y."""
    decoder = ImplicitDecoder(resolution=10, slot_dim=6, hidden_dim=8)
    slots = torch.randn(2, 6)
    slots[:, 2] = scale
    with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
        image, units = decoder(slots).float(), decoder.UNITS
    x, y = slots[1, :2]
    code = torch.cat([x[None], y[None], slots[1, 2:3].log(), slots[1, 3:]])
    inner, outer, colour = decoder.hyper(code).split([3 * units, 4 * (units + 1), 12])
    row, column = 7, 2
    position = torch.stack([(column + 0.5) / 5 - 1 - x, (row + 0.5) / 5 - 1 - y]) / scale
    u, v = position = 4 * torch.tanh(position / 4)
    hidden = torch.relu(inner.view(units, 3) @ torch.cat([position, torch.ones(1)]))
    outer = outer.view(4, units + 1)
    planes = outer[:, :-1] @ hidden / units**0.5
    quadratic = colour.view(3, 4) @ torch.stack([u / 4, (u / 4) ** 2, v / 4, (v / 4) ** 2])
    wide = torch.sigmoid(torch.tensor((scale - 0.4) / 0.04))
    assert image.shape == (2, 4, 10, 10)
    assert torch.allclose(image[1, :3, row, column], outer[:3, -1] + wide * planes[:3] + quadratic, atol=tolerance)
    assert torch.allclose(image[1, 3, row, column], outer[3, -1] + planes[3], atol=tolerance)


def test_a_frame_is_the_place_and_the_size_of_what_a_slot_attends_to():
    attention = FramedSlotAttention(8, 16, num_slots=2, slot_dim=8)
    attn = torch.zeros(1, 2, 16, 16)
    attn[0, 0, 2:4, 8:16] = 1  # two rows, the right half
    attn[0, 1] = 1
    small, whole = torch.cat(attention.frame(attn.flatten(2)), dim=2)[0]
    variance = ((torch.tensor([1.0, 3, 5, 7]) / 16).square().mean() + (1 / 16) ** 2) / 2
    assert torch.allclose(small, torch.stack([torch.tensor(0.5), torch.tensor(-0.625), (variance + 0.05**2).sqrt()]))
    assert torch.allclose(whole[:2], torch.zeros(2), atol=1e-6)
    leak = torch.cat(attention.frame((0.95 * attn + 0.05).flatten(2)), dim=2)[0, 0]  # a little attention everywhere
    assert (leak - small).abs().max() < 0.06
    with torch.autocast('cpu', torch.bfloat16):  # E[x^2] - E[x]^2 would lose a small variance
        rounded = torch.cat(attention.frame(attn.flatten(2)), dim=2)[0, 0]
    assert torch.equal(rounded, small)


def test_slots_carry_the_frame_of_the_last_attention():
    model = SlotAttentionAutoEncoder(ModelConfig(resolution=32))
    _, _, slots, attn = model(torch.rand(2, 3, 32, 32))
    frame = torch.cat(model.slot_attention.frame(attn[:, -1].flatten(2)), dim=2)
    assert torch.allclose(slots[..., :3], frame, atol=1e-6)


def test_an_object_moves_with_the_frame_of_its_slot():
    decoder = SlotAttentionAutoEncoder(ModelConfig(resolution=32)).decoder
    decoder.hyper[0].weight.data[:, :2] = 0  # what the slot draws shall not depend on where
    slot = torch.randn(1, 64)
    slot[0, :3] = torch.tensor([-0.25, 0.0, 0.2])
    moved = slot.clone()
    moved[0, 0] += 8 / 16  # 8 pixels to the right: the image is 2 wide
    assert torch.allclose(decoder(slot)[..., :24], decoder(moved)[..., 8:], atol=1e-5)


def test_slots_of_any_origin_can_be_decoded():
    model = SlotAttentionAutoEncoder(ModelConfig(resolution=32))
    rgbs, masks = model.decode(torch.randn(4, 5, 64))  # sizes below zero among them
    assert rgbs.isfinite().all() and torch.allclose(masks.sum(1), torch.ones(4, 1, 32, 32))


def test_a_glimpse_bins_what_is_attended_to_around_the_slot():
    glimpse = Glimpse(input_dim=5, slot_dim=4)
    seen = {}
    glimpse.bins.register_forward_pre_hook(lambda module, args: seen.update(bins=args[0]))
    grid = coord_grid(16)
    inputs, attn = torch.randn(1, 256, 5), torch.rand(1, 2, 256)
    frame = torch.tensor([[[0.1, -0.2, 0.15], [0.0, 0.0, 0.3]]])
    glimpse(inputs, attn, frame[..., :2], frame[..., 2:], grid, torch.randn(1, 2, 4))
    bins = seen['bins'].view(2, 7, 7, 33)
    values = glimpse.project(inputs)[0].view(16, 16, 32)
    for slot, row, column in ((0, 3, 3), (0, 5, 1), (1, 2, 4)):
        x0, y0, size = frame[0, slot]
        width = size * 2 * Glimpse.REACH / 6
        hat_x = (1 - ((grid - x0) / width - (column - 3)).abs()).clamp(min=0)
        hat_y = (1 - ((grid - y0) / width - (row - 3)).abs()).clamp(min=0)
        hat = hat_y[:, None] * hat_x
        weight = hat * attn[0, slot].view(16, 16)
        expected = (weight[..., None] * values).sum((0, 1)) / (hat.sum() + 0.1)
        assert torch.allclose(bins[slot, row, column, :32], expected, atol=1e-5)
        assert torch.allclose(bins[slot, row, column, 32], weight.sum() / (hat.sum() + 0.1), atol=1e-5)


# Scores


def brute_force_ari(a, b):
    """Every pair of places is together or apart in a and in b (Hubert & Arabie 1985)."""
    both = only_a = only_b = neither = 0
    for i, j in itertools.combinations(range(len(a)), 2):
        together = (a[i] == a[j], b[i] == b[j])
        both += together == (True, True)
        only_a += together == (True, False)
        only_b += together == (False, True)
        neither += together == (False, False)
    pairs = both + only_a + only_b + neither
    expected = (both + only_a) * (both + only_b) / pairs
    maximum = (2 * both + only_a + only_b) / 2
    return 1.0 if maximum == expected else (both - expected) / (maximum - expected)


def test_ari_equals_a_count_of_all_pairs():
    a, b = torch.randint(0, 4, (20, 6, 5)), torch.randint(0, 3, (20, 6, 5))
    b[:10] = torch.where(torch.rand(10, 6, 5) < 0.7, a[:10], b[:10])
    where = torch.rand(20, 6, 5) < 0.8
    for i, score in enumerate(adjusted_rand_index(a, b, where).tolist()):
        assert score == pytest.approx(brute_force_ari(a[i][where[i]].tolist(), b[i][where[i]].tolist()))


def one_hot_masks(labels, num_slots):
    return torch.nn.functional.one_hot(labels, num_slots).permute(0, 3, 1, 2)[:, :, None].float()


def test_scores_of_a_perfect_a_blind_and_an_empty_scene():
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[0, :2], labels[0, 4:6, :4] = 1, 2
    perfect = segmentation_scores(labels, one_hot_masks((labels + 1) % 3, 3))
    assert {name: value.item() for name, value in perfect.items()} == {'fg_ari': 1, 'ari': 1, 'mbo': 1, 'miou': 1}
    blind = one_hot_masks(torch.zeros_like(labels), 3)  # one slot takes everything
    assert fg_ari(labels, blind).item() == 0
    assert segmentation_scores(labels, blind)['mbo'].item() == pytest.approx((16 / 64 + 8 / 64) / 2)
    single = (labels == 1).long()
    assert fg_ari(single, one_hot_masks(single, 2)).item() == 1  # one object, found whole
    assert fg_ari(single, one_hot_masks(torch.arange(64).view(1, 8, 8) % 2, 2)).item() == 0  # split
    for score in segmentation_scores(torch.zeros_like(labels), blind).values():
        assert score.isnan().item() or score.item() == 1  # no foreground: only ARI has an answer


def test_mean_best_overlap_by_hand():
    labels = torch.tensor([[[1, 1, 1, 1, 2, 2, 0, 0]]])
    slots = torch.tensor([[[0, 0, 0, 1, 1, 1, 2, 2]]])
    # object 1: slot 0 has 3 of 4 and nothing else; object 2: slot 1 has both and one more
    assert segmentation_scores(labels, one_hot_masks(slots, 3))['mbo'].item() == pytest.approx((3 / 4 + 2 / 3) / 2)


def test_mean_iou_matches_objects_and_slots_one_to_one():
    """Against every assignment of slots to objects."""
    labels, slots = torch.randint(0, 4, (10, 6, 6)), torch.randint(0, 3, (10, 6, 6))
    labels[0] = labels[0].clamp(max=1)
    for i, score in enumerate(segmentation_scores(labels, one_hot_masks(slots, 3))['miou'].tolist()):
        objects = [o for o in range(1, 4) if (labels[i] == o).any()]
        iou = {
            (o, k): ((labels[i] == o) & (slots[i] == k)).sum() / ((labels[i] == o) | (slots[i] == k)).sum()
            for o in objects
            for k in range(3)
        }
        ways = itertools.permutations([0, 1, 2], len(objects))
        best = max(sum(iou[pair] for pair in zip(objects, way, strict=True)) for way in ways)
        assert score == pytest.approx(best.item() / len(objects))
    one_slot = segmentation_scores(labels, one_hot_masks(slots * 0, 3))
    assert (one_slot['miou'] < one_slot['mbo'])[1:].all()  # objects without a slot of their own count 0


def test_ignored_pixels_count_in_no_score():
    labels, masks = torch.randint(0, 4, (3, 8, 8)), torch.rand(3, 5, 1, 8, 8)
    ignored = labels.clone()
    ignored[:, :, 5:] = 255
    cut = segmentation_scores(labels[:, :, :5], masks[..., :5])
    for name, score in segmentation_scores(ignored, masks).items():
        assert torch.allclose(score, cut[name]), name
    for score in segmentation_scores(torch.full((3, 8, 8), 255), masks).values():
        assert score.isnan().all()


def test_labels_that_do_not_fit_the_masks_are_refused():
    masks = torch.rand(2, 3, 1, 8, 8)
    with pytest.raises(ValueError, match=r'labels \[2, 4, 4\] and masks \[2, 3, 1, 8, 8\]'):
        segmentation_scores(torch.zeros(2, 4, 4, dtype=torch.long), masks)
    with pytest.raises(ValueError, match='must not be negative, the smallest is -1'):
        segmentation_scores(torch.full((2, 8, 8), -1), masks)


def test_scores_do_not_depend_on_how_slots_and_objects_are_numbered():
    labels, slots = torch.randint(0, 5, (4, 8, 8)), torch.randint(0, 6, (4, 8, 8))
    renamed = torch.tensor([0, 3, 1, 4, 2])[labels]
    moved = torch.tensor([5, 2, 0, 1, 3, 4])[slots]
    first = segmentation_scores(labels, one_hot_masks(slots, 6))
    second = segmentation_scores(renamed, one_hot_masks(moved, 6))
    for name in first:
        assert torch.allclose(first[name], second[name]), name


# Checkpoints


def test_a_checkpoint_brings_back_model_and_training_state(tmp_path):
    model = small_model(num_slots=3).eval()
    save_checkpoint(tmp_path / 'a.pth', model, step=7)
    assert load_checkpoint(tmp_path / 'a.pth')['training'] == {'step': 7}
    images, slots = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16)
    restored = load_model(tmp_path / 'a.pth')
    assert restored.config == model.config
    assert torch.equal(restored(images, slots=slots).recons, model(images, slots=slots).recons)
    assert os.listdir(tmp_path) == ['a.pth']


def test_a_save_that_fails_leaves_the_earlier_checkpoint(tmp_path):
    path = tmp_path / 'a.pth'
    save_checkpoint(path, small_model(), step=1)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, small_model(), step=lambda: 2)  # cannot be pickled
    assert load_checkpoint(path)['training'] == {'step': 1}
    assert os.listdir(tmp_path) == ['a.pth']


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ('executed',)


@pytest.mark.parametrize('damage', ['missing', 'empty', 'truncated', 'text', 'foreign', 'code', 'config', 'weights'])
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, damage):
    path = tmp_path / 'a.pth'
    save_checkpoint(path, small_model(), step=1)
    whole = path.read_bytes()
    checkpoint = torch.load(path)
    if damage == 'missing':
        path.unlink()
    elif damage == 'empty':
        path.write_bytes(b'')
    elif damage == 'truncated':
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == 'text':
        path.write_text('not a checkpoint')
    elif damage == 'foreign':
        torch.save({'state_dict': {}}, path)
    elif damage == 'code':
        torch.save({'format': RunsCode()}, path)
    elif damage == 'config':
        torch.save(checkpoint | {'config': {'layers': 3}}, path)
    elif damage == 'weights':
        torch.save(checkpoint | {'model': {}}, path)
    with pytest.raises(CheckpointError, match=r'a\.pth') as error:
        load_model(path)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'executed').exists()


# Parts of an image, and search


@pytest.mark.parametrize('resolution', (16, 35, 80))
def test_the_accelerated_decoder_is_the_plain_one(resolution):
    plain = small_model(architecture='paper', resolution=resolution).double().decoder
    for layer in plain.conv[::2]:
        torch.nn.init.normal_(layer.bias)
    accelerated = AcceleratedBroadcastDecoder(plain)
    assert accelerated.state_dict().keys() == plain.state_dict().keys()
    slots = torch.randn(3, 16, dtype=torch.double, requires_grad=True)
    results = []
    for decoder in (plain, accelerated):
        output = decoder(slots)
        results.append((output, *torch.autograd.grad(output.square().sum(), (slots, *plain.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_some_rows_and_columns_decode_as_in_the_whole(architecture):
    model = SlotAttentionAutoEncoder(ModelConfig(architecture, resolution=32, hidden_dim=8, slot_dim=8))
    slots = torch.randn(2, 3, 8)
    rows, columns = slice(1, None, 2), slice(2, 20, 3)
    with torch.no_grad():
        whole, part = model.decode(slots), decode_partial(model, slots, (rows, columns))
    for a, b in zip(whole, part, strict=True):
        assert torch.allclose(a[..., rows, columns], b, atol=1e-5)


def test_an_absent_slot_is_decoded_as_if_it_were_not_there():
    model, slots = small_model(), torch.randn(2, 4, 16)
    slots[..., 2] = torch.tensor([0.3, 0.0, 0.2, 0.1])
    with torch.no_grad():
        rgbs, masks = model.decode(slots)
        others_rgbs, others_masks = model.decode(slots[:, [0, 2, 3]])
    assert (masks[:, 1] == 0).all()
    assert torch.allclose(masks[:, [0, 2, 3]], others_masks, atol=1e-5)
    assert torch.allclose(rgbs[:, [0, 2, 3]], others_rgbs, atol=1e-5)


def test_an_absent_slot_wins_no_attention_and_changes_no_other():
    attention, inputs, slots = small_model().slot_attention, torch.randn(2, 64, 8), torch.randn(2, 4, 16)
    slot_mask = torch.tensor([[True, False, True, True]] * 2)
    with torch.no_grad():
        k, v = attention.project_k(inputs), attention.project_v(inputs)
        updated, attn = attention.step(slots, k, v, slot_mask)
        others, others_attn = attention.step(slots[:, [0, 2, 3]], k, v, slot_mask[:, [0, 2, 3]])
        glimpsed = attention.add_glimpse(inputs, updated, attn, slot_mask)
    assert (attn[:, 1] == 0).all()
    assert torch.allclose(attn[:, [0, 2, 3]], others_attn, atol=1e-5)
    assert torch.allclose(updated[:, [0, 2, 3]], others, atol=1e-5)
    assert torch.equal(glimpsed[..., 2] > 0, slot_mask)


# Reallocation


def reallocating_model(**changes):
    """3 moves, 2 drops and 9 iterations, of 5 slots."""
    return small_model(**dict(gradient='first_order', num_iterations=9, num_slots=5, moves=3, drops=2) | changes)


def decide(monkeypatch, attention, logits):
    """KeepHead gives these logits [K], and +inf to absent slots; ErrorHead predicts the error at position 21."""
    monkeypatch.setattr(attention.keep_head, 'forward', lambda slots, attn, slot_mask: (
        logits.expand(len(slots), -1).masked_fill(~slot_mask, math.inf)))  # fmt: skip
    error = torch.zeros(64)
    error[21] = 5.0  # third row, sixth column of 8 x 8: x 0.375, y -0.375
    monkeypatch.setattr(attention.error_head, 'forward', lambda inputs, *_: error.expand(len(inputs), -1))


def test_redundant_slots_are_dropped_one_at_a_time_the_least_needed_first(monkeypatch):
    model, images, start = reallocating_model(moves=0), torch.rand(2, 3, 16, 16), torch.randn(2, 5, 16)
    decide(monkeypatch, model.slot_attention, torch.tensor([-1.0, 2.0, -3.0, 0.5, -2.0]))
    with torch.no_grad():
        _, masks, slots, attn = model(images, slots=start)
        _, early_masks, *_ = model(images, slots=start, num_iterations=6)
    assert (masks.amax((2, 3, 4)) > 0).equal(torch.tensor([[True, True, False, True, False]] * 2))
    assert (slots[..., 2] > 0).equal(masks.amax((2, 3, 4)) > 0)
    absent = (attn.amax((3, 4)) == 0)[0]  # [T, K]
    assert absent[:7].sum() == 0 and absent[7].tolist() == [False, False, True, False, False]
    assert absent[8].tolist() == [False, False, True, False, True]
    assert torch.equal(early_masks.amax((2, 3, 4)) > 0, masks.amax((2, 3, 4)) > 0)


def test_with_more_slots_than_in_training_as_many_more_are_dropped(monkeypatch):
    model, images = reallocating_model(num_iterations=12), torch.rand(2, 3, 16, 16)
    for K, left in ((4, 2), (5, 3), (8, 3), (11, 3), (14, 6)):  # 2 + (K - 5) drops, at most 8 of 12 iterations
        decide(monkeypatch, model.slot_attention, torch.full((K,), -1.0))
        slots = model(images, num_slots=K).slots
        assert (slots[..., 2] > 0).sum(1).tolist() == [left, left], K


def test_reallocation_leaves_the_first_and_the_last_iterations_alone(monkeypatch):
    """With few iterations there are fewer moves, then fewer drops: a slot that has just moved has no attention yet."""
    model, images = reallocating_model(moves=3, drops=2), torch.rand(2, 3, 16, 16)
    attention, reallocate = model.slot_attention, model.slot_attention.reallocate
    decide(monkeypatch, attention, torch.full((5,), -1.0))

    def watched(slots, attn, slot_mask, *args):
        new, new_mask = reallocate(slots, attn, slot_mask, *args)
        if not torch.equal(new, slots):
            moved.append(args[3])
        if not torch.equal(new_mask, slot_mask):
            dropped.append(args[3])
        return new, new_mask

    monkeypatch.setattr(attention, 'reallocate', watched)
    moves_and_drops = {3: ([], []), 4: ([], []), 5: ([], [3]), 6: ([], [3, 4]), 8: ([3, 4], [5, 6])}
    for T, expected in moves_and_drops.items():
        moved, dropped = [], []
        model(images, num_iterations=T)
        assert (moved, dropped) == expected, T


def test_needed_slots_and_the_last_one_stay(monkeypatch):
    model, images = reallocating_model(moves=0), torch.rand(2, 3, 16, 16)
    decide(monkeypatch, model.slot_attention, torch.full((5,), 0.1))
    assert (model(images).slots[..., 2] > 0).all()
    decide(monkeypatch, model.slot_attention, torch.full((1,), -1.0))
    assert (model(images, num_slots=1).slots[..., 2] > 0).all()


def test_a_redundant_slot_is_moved_to_the_largest_predicted_error(monkeypatch):
    model, images, start = reallocating_model(drops=0), torch.rand(1, 3, 16, 16), torch.randn(1, 5, 16)
    attention, moved = model.slot_attention, []
    decide(monkeypatch, attention, torch.tensor([2.0, 2.0, -1.0, 2.0, 2.0]))
    step = attention.step

    def watched(slots, k, v, slot_mask):
        moved.append(slots[0, 2, :2].tolist())
        return step(slots, k, v, slot_mask)

    monkeypatch.setattr(attention, 'step', watched)
    with torch.no_grad():
        slots = model(images, slots=start).slots
        assert (slots[..., 2] > 0).all()
        there = [t for t, position in enumerate(moved) if position == pytest.approx([0.375, -0.375], abs=0.02)]
        assert there[:3] == [4, 5, 6]  # after iterations 3, 4 and 5, counted from 0
        moved.clear()
        attention(model.encoder(images), start, moves=0)
        assert not [position for position in moved if position == pytest.approx([0.375, -0.375], abs=0.02)]


def test_only_the_heads_learn_from_the_reallocation_loss_and_all_of_them():
    model, images, trace = reallocating_model(), torch.rand(4, 3, 16, 16), Trace()
    model.slot_attention(model.encoder(images), torch.randn(4, 5, 16), trace=trace)
    assert len(trace.states) == 5  # after iterations 3 to 7 of 9, counted from 0
    loss = reallocation_loss(model, images, torch.rand(4, 8, 8), trace, np.random.default_rng(0))
    loss.backward()
    for name, p in model.named_parameters():
        is_head = '_head.' in name
        assert (p.grad is not None and p.grad.abs().sum() > 0) == is_head, name


def test_a_slot_is_needed_if_the_error_rises_without_it(monkeypatch):
    """Each slot draws one colour everywhere: without the slot of a colour its place has the wrong colour."""
    model, trace = reallocating_model(num_slots=3, moves=0, num_iterations=9), Trace()
    images = torch.full((2, 3, 16, 16), -1.0)
    images[..., 8:] = 1.0
    model.slot_attention(model.encoder(images), torch.randn(2, 3, 16), trace=trace)
    rng, seen = np.random.default_rng(0), {}

    def decode(model, slots, pixels):  # slot 0 has the left half, slot 1 the right half, slot 2 nothing
        rows, columns = pixels
        present = slots[..., 2] > 0
        logits = torch.full((len(slots), 3, 1, 16, 16), -20.0)
        logits[:, 0, :, :, :8], logits[:, 1, :, :, 8:] = 20.0, 20.0
        logits = logits.masked_fill(~present[:, :, None, None, None], -1e9)[..., rows, columns]
        rgbs = torch.tensor([-1.0, 1.0, 0.0]).view(1, 3, 1, 1, 1).expand(len(slots), 3, 3, *logits.shape[3:])
        return rgbs, logits.softmax(dim=1)

    monkeypatch.setattr(slot_attention, 'decode_partial', decode)
    for _ in range(40):
        *_, slot_mask, chosen, needed = try_without(model, images, trace, rng)
        for mask, slot, need in zip(slot_mask, chosen.tolist(), needed.tolist(), strict=True):
            assert mask[slot]
            if mask.all():
                seen.setdefault(slot, set()).add(need)
    assert seen == {0: {True}, 1: {True}, 2: {False}}


def test_an_object_is_needed_and_a_part_of_one_with_the_same_rise_is_not():
    images = torch.randn(3, 3, 16, 16)
    variance = images.var(dim=(2, 3)).mean(dim=1)  # [3]
    mask = torch.zeros(3, 16, 16)
    mask[:, 4:8, 4:8] = 1.0  # 16 of 256 pixels
    before = torch.full((3, 16, 16), 0.01) * variance[:, None, None]
    after = before.clone()
    after[0, 4:8, 4:8] += 0.1 * variance[0]  # all pixels of the slot become wrong
    after[1, 4:8, 4:6] += 0.2 * variance[1]  # half of them, twice as wrong
    after[2, 4:8, 4:8] += 0.005 * variance[2]  # all of them, a little
    assert is_needed(images, before, after, mask).tolist() == [True, False, False]
    # The rise of the first is 0.1 / 16 of the variance, less 0.05 of the error of 0.01; it must be above 0.002.
    assert is_needed(images, before, before + (after - before) * 0.42, mask).tolist() == [True, False, False]
    assert is_needed(images, before, before + (after - before) * 0.38, mask).tolist() == [False, False, False]


def test_whether_a_slot_is_needed_depends_on_no_unit_of_the_image():
    images, before, mask = torch.randn(64, 3, 16, 16), torch.rand(64, 16, 16), torch.rand(64, 16, 16)
    after = before + torch.rand(64, 1, 1) * torch.rand(64, 16, 16)
    needed = is_needed(images, before, after, mask)
    assert 0 < needed.sum() < 64
    assert torch.equal(is_needed(2 * images + 1, 4 * before, 4 * after, mask), needed)
    assert torch.equal(is_needed(images, before, after, mask / 2), needed)
    assert not is_needed(images, before, after, 0 * mask).any()  # a slot without pixels


def test_a_window_around_the_largest_error_is_one_there_and_nothing_far_away():
    values = torch.zeros(2, 8, 8)
    values[0, 1:3, 5:7], values[0, 6, 1] = 1.0, 1.2  # a spot, and a higher but smaller one
    window = around_maximum(values.flatten(1), coord_grid(8)).view(2, 8, 8)
    assert window[0].max() == window[0, 1:3, 5:7].max() == pytest.approx(1) and window[0, 4:].max() < 0.01
    assert window[1].max() == 0  # no error anywhere


# Search


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_refining_lowers_the_error_and_touches_nothing_else(architecture):
    model = small_model(architecture=architecture)
    images, slots = torch.rand(5, 3, 16, 16) * 2 - 1, torch.randn(5, 7, 16)
    slots[:, :, 2] = 0.3
    slots[:, 2, 2] = 0.0
    with torch.no_grad():
        refined = refine(model, images, slots, num_steps=8)
        before, after = (reconstruction_error(model, images, x) for x in (slots, refined))
        torch.testing.assert_close(refine(model, images[1:2], slots[1:2], 8), refined[1:2], rtol=1e-3, atol=1e-4)
    assert (after <= before).all() and after.mean() < 0.98 * before.mean()
    if architecture == 'fast':
        assert torch.equal(refined[:, 2], slots[:, 2])  # an absent slot has no gradient
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(refine(model, images.clone(), slots.clone(), 8), refined)


def test_refining_that_does_not_help_is_undone():
    model, images, slots = small_model(), torch.rand(2, 3, 16, 16), torch.randn(2, 7, 16)
    assert torch.equal(refine(model, images, slots, num_steps=2, lr=1e6), slots)


def test_a_framed_slot_attends_to_what_is_near():
    attention = SlotAttentionAutoEncoder(ModelConfig(resolution=16, slot_dim=8, hidden_dim=8)).slot_attention
    slots = torch.zeros(1, 1, 8)
    slots[..., :FRAME] = torch.tensor([0.5, -0.5, 0.3])  # right, above
    with torch.no_grad():
        logits = attention.logits(slots, torch.zeros(1, 64, 8), torch.ones(1, 1, dtype=torch.bool)).view(8, 8)
    y, x = divmod(int(logits.argmax()), 8)
    assert abs(attention.grid[x] - 0.5) < 0.13 and abs(attention.grid[y] + 0.5) < 0.13
    assert logits[1, 5] > logits[3, 5] > logits[6, 5]
