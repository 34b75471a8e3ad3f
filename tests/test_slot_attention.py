"""The model against the paper's equations and tables, the scores against brute force."""

import itertools
import math
import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slot_attention import (
    ALL_PIXELS,
    CheckpointError,
    ConfigError,
    FramedSlotAttention,
    Glimpse,
    ImplicitDecoder,
    ModelConfig,
    SlotAttention,
    SpatialBroadcastDecoder,
    adjusted_rand_index,
    coord_grid,
    create_model,
    fg_ari,
    find_checkpoint,
    is_needed,
    keep_loss,
    load_checkpoint,
    load_model,
    newest_checkpoint,
    refine,
    save_checkpoint,
    segmentation_scores,
)

ARCHITECTURES = ('fast', 'paper')
GRADIENTS = (('fast', 'full'), ('fast', 'first_order'), ('paper', 'full'))


def small_model(**changes):
    config = {'resolution': 16, 'hidden_dim': 8, 'slot_dim': 16, 'num_slots': 5, 'spare_slots': 0} | changes
    return create_model(ModelConfig(**config))


def framed(**changes):
    """The attention of the fast variant for 9 inputs of size 12, 4 slots of size 8, without drops."""
    config = ModelConfig(**{'num_slots': 4, 'spare_slots': 0, 'slot_dim': 8, 'num_iterations': 3, 'drops': 0} | changes)
    return FramedSlotAttention(config, input_dim=12, grid_size=3).double()


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


def test_gradient_modes_agree_in_the_forward_pass_and_in_the_last_iteration():
    full, first = (framed(gradient=gradient) for gradient in ('full', 'first_order'))
    first.load_state_dict(full.state_dict())
    inputs, start = torch.randn(2, 9, 12).double(), torch.randn(2, 4, 8).double()
    assert torch.allclose(full(inputs, start)[0], first(inputs, start)[0])

    first(inputs, start)[0].square().sum().backward()
    state, _ = full.iterate(inputs, start, num_iterations=2)
    full(inputs, state.slots.detach(), num_iterations=1)[0].square().sum().backward()
    for (name, a), b in zip(full.named_parameters(), first.parameters(), strict=True):
        assert a.grad is b.grad is None or torch.allclose(a.grad, b.grad), name


@pytest.mark.parametrize(('architecture', 'gradient'), GRADIENTS)
def test_gradient_reaches_every_parameter(architecture, gradient):
    model = small_model(architecture=architecture, gradient=gradient)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    (model(images).recons - images).square().mean().backward()
    for name, p in model.named_parameters():
        if 'keep_head' not in name:  # which learns from keep_loss() alone
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
    images, slots = torch.rand(2, 3, 16, 16), torch.randn(2, 5, 16)
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
            assert layer.eps == 1e-3 or 'keep_head' in name, name
        elif isinstance(getattr(layer, 'bias', None), torch.Tensor) and 'keep_head' not in name:
            assert layer.bias.abs().sum() == 0, name


# The autoencoder


def test_outputs_are_named_shaped_and_normalised_as_documented():
    model = small_model(num_iterations=2, drops=1)
    output = model(torch.rand(3, 3, 16, 16))
    recons, masks, slots, attn = output
    assert recons is output.recons and recons.shape == (3, 3, 16, 16)
    assert masks.shape == (3, 5, 1, 16, 16) and slots.shape == (3, 5, 16) and attn.shape == (3, 3, 5, 8, 8)
    assert torch.allclose(masks.sum(1), torch.ones(3, 1, 16, 16), atol=1e-6)
    rgbs, decoded_masks = model.decode(slots)
    assert torch.equal(masks, decoded_masks)
    assert torch.allclose((rgbs * masks).sum(1), recons)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('num_slots', [1, 2, 11])
def test_fewer_and_more_slots_and_iterations_at_test_time(architecture, num_slots):
    model = small_model(architecture=architecture)
    for T in (1, 5):
        output = model(torch.rand(2, 3, 16, 16), num_slots=num_slots, num_iterations=T)
        assert output.masks.shape[1] == output.slots.shape[1] == output.attn.shape[2] == num_slots
        assert output.attn.shape[1] >= T and output.recons.isfinite().all()


def test_an_image_does_not_depend_on_its_batch():
    model, images, slots = small_model(), torch.rand(4, 3, 16, 16), torch.randn(4, 5, 16)
    whole, alone = model(images, slots=slots), model(images[2:3], slots=slots[2:3])
    assert torch.allclose(whole.recons[2:3], alone.recons, atol=1e-5)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r'must be \[B, 3, 16, 16\], not \[1, 3, 32, 32\]'):
        small_model()(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match='at least 1 slot'):
        small_model()(torch.rand(1, 3, 16, 16), num_slots=0)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_any_number_format_and_an_empty_batch(architecture):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        output = small_model(architecture=architecture).to(dtype)(torch.rand(2, 3, 16, 16, dtype=dtype))
        assert output.recons.dtype == dtype and output.recons.isfinite().all(), dtype
    assert small_model(architecture=architecture)(torch.rand(0, 3, 16, 16)).recons.shape == (0, 3, 16, 16)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_an_exported_model_takes_any_batch(architecture):
    class Exported(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small_model(architecture=architecture)

        def forward(self, images, slots):
            return self.model(images, slots=slots).recons

    model, size = Exported(), torch.export.Dim('batch')
    example = torch.rand(2, 3, 16, 16), torch.randn(2, 5, 16)
    program = torch.export.export(model, example, dynamic_shapes={'images': {0: size}, 'slots': {0: size}})
    batch = torch.rand(4, 3, 16, 16), torch.randn(4, 5, 16)
    assert torch.allclose(program.module()(*batch), model(*batch), atol=1e-5)


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
    model = create_model(ModelConfig('paper', resolution, hidden_dim=hidden))

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
    model = create_model(ModelConfig(architecture, resolution, num_slots=2, hidden_dim=4))
    output = model(torch.rand(1, 3, resolution, resolution))
    assert output.recons.shape == (1, 3, resolution, resolution)
    assert output.attn.shape[-2:] == (grid_size, grid_size)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(resolution=8), 'resolution must be at least 16 and at most 256, not 8'),
        (dict(num_slots=0), 'num_slots must be at least 1'),
        (dict(num_iterations=0), 'num_iterations must be at least 1'),
        (dict(slot_dim=3), 'slot_dim must be at least 4'),
        (dict(drops=-1), 'drops must be at least 0'),
        (dict(architecture='slow'), 'architecture must be one of fast, paper'),
        (dict(gradient='none'), 'gradient must be one of full, first_order'),
        (dict(architecture='paper', drops=1), "drops 1 belongs to the 'fast' architecture"),
        (dict(architecture='paper', gradient='first_order'), "gradient first_order belongs to the 'fast'"),
        (dict(architecture='paper', resolution=100), 'multiple of 16 above 64: 100'),
    ],
)
def test_configurations_that_make_no_model_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        create_model(ModelConfig(**changes))


def test_a_field_that_is_not_given_takes_the_default_of_its_architecture():
    assert ModelConfig('paper').num_iterations == 3 and ModelConfig('paper').drops == 0
    assert ModelConfig(num_slots=5).num_slots == 5
    for architecture in ARCHITECTURES:
        assert ModelConfig(**ModelConfig.defaults(architecture)) == ModelConfig(architecture)


def test_the_implicit_decoder_draws_edges_with_masks_and_with_the_colours_of_backgrounds():
    """Colours of a small slot are quadratic along each axis of its frame; those of a wide one have kinks."""
    decoder = ImplicitDecoder(resolution=64, slot_dim=8, hidden_dim=8)
    slots = torch.randn(20, 8)
    for scale, smooth in ((0.2, True), (0.9, False)):
        slots[:, 2] = scale
        # In the frame the columns are not equidistant: place them so that they are.
        u = torch.linspace(-0.9, 0.9, 31)
        decoder.grid = torch.cat([scale * 4 * torch.atanh(u), torch.zeros(1)])
        slots[:, :2] = 0
        with torch.no_grad():
            rgbs, logits = decoder(slots, (torch.tensor([31]), torch.arange(31))).split([3, 1], dim=1)
        third = rgbs.diff(n=3, dim=3).abs().amax(3)  # 0 for a quadratic
        assert (third < 1e-4).all() == smooth
        assert (logits.diff(n=3, dim=3).abs().amax(3) > 1e-3).any()


def test_a_frame_is_the_place_and_the_size_of_what_a_slot_attends_to():
    attention = FramedSlotAttention(ModelConfig(slot_dim=8), input_dim=8, grid_size=16)
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
    model = create_model(ModelConfig(resolution=32, drops=0))
    _, _, slots, attn = model(torch.rand(2, 3, 32, 32))
    frame = torch.cat(model.slot_attention.frame(attn[:, -1].flatten(2)), dim=2)
    assert torch.allclose(slots[..., :3], frame, atol=1e-6)


def test_an_object_moves_with_the_frame_of_its_slot():
    decoder = create_model(ModelConfig(resolution=32)).decoder
    decoder.hyper[0].weight.data[:, :2] = 0  # what the slot draws shall not depend on where
    slot = torch.randn(1, 64)
    slot[0, :3] = torch.tensor([-0.25, 0.0, 0.2])
    moved = slot.clone()
    moved[0, 0] += 8 / 16  # 8 pixels to the right: the image is 2 wide
    assert torch.allclose(decoder(slot)[..., :24], decoder(moved)[..., 8:], atol=1e-5)


def test_slots_of_any_origin_can_be_decoded():
    model = create_model(ModelConfig(resolution=32))
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
    assert all(value.item() == 1 for value in perfect.values())
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


def test_a_checkpoint_outlives_the_code(tmp_path, capsys):
    """A field that it lacks takes its default and is named; one that the code does not know is refused by name."""
    path = tmp_path / 'a.pth'
    save_checkpoint(path, small_model(), step=1)
    checkpoint = torch.load(path)
    del checkpoint['config']['gradient']
    torch.save(checkpoint, path)
    assert load_model(path).config.gradient == 'first_order'
    assert capsys.readouterr().out == f'{path} has no gradient: first_order is assumed\n'
    checkpoint['config']['no_such_field'] = 2.0
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match='holds a model with no_such_field, which this version does not have'):
        load_model(path)


def test_the_newest_checkpoint_is_the_one_with_the_most_steps(tmp_path, capsys):
    assert newest_checkpoint(tmp_path) is None
    folder = tmp_path / 'checkpoints'
    folder.mkdir()
    for name, step in (('last.pth', 7), ('best_model.pth', 7), ('checkpoint_epoch_1.pth', 5)):
        save_checkpoint(folder / name, small_model(), progress={'step': step})
        os.utime(folder / name, (0, 10 - step))  # as after a copy, dates say nothing
    (folder / 'broken.pth').write_bytes(b'x')
    assert newest_checkpoint(tmp_path) == folder / 'last.pth'
    assert 'broken.pth is damaged' in capsys.readouterr().err
    assert find_checkpoint(tmp_path) == find_checkpoint(folder) == find_checkpoint(folder / 'last.pth')


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


def test_some_rows_and_columns_decode_as_in_the_whole():
    model, slots = small_model(resolution=32), torch.randn(2, 3, 16)
    rows, columns = slice(1, None, 2), slice(2, 20, 3)
    with torch.no_grad():
        whole, part = model.decode(slots), model.decode(slots, (rows, columns))
    for a, b in zip(whole, part, strict=True):
        assert torch.allclose(a[..., rows, columns], b, atol=1e-5)


class BroadcastDecoder(SpatialBroadcastDecoder):
    """The paper's decoder in the fast variant: it knows nothing of absent slots."""

    def forward(self, slots, pixels=ALL_PIXELS):
        return super().forward(slots)[:, :, pixels[0]][..., pixels[1]]


@pytest.mark.parametrize('decoder', [ImplicitDecoder, BroadcastDecoder])
def test_an_absent_slot_is_decoded_as_if_it_were_not_there(decoder):
    model, slots = small_model(), torch.randn(2, 4, 16)
    model.decoder = decoder(16, 16, 8)
    slots[..., 2] = torch.tensor([0.3, 0.0, 0.2, 0.1])
    with torch.no_grad():
        rgbs, masks = model.decode(slots)
        others_rgbs, others_masks = model.decode(slots[:, [0, 2, 3]])
    assert (masks[:, 1] == 0).all()
    assert torch.allclose(masks[:, [0, 2, 3]], others_masks, atol=1e-5)
    assert torch.allclose(rgbs[:, [0, 2, 3]], others_rgbs, atol=1e-5)


def test_an_absent_slot_wins_no_attention_and_changes_no_other():
    attention, inputs, slots = small_model().slot_attention, torch.randn(2, 64, 8), torch.randn(2, 4, 16)
    present = torch.tensor([[True, False, True, True]] * 2)
    with torch.no_grad():
        k, v = attention.project_k(inputs), attention.project_v(inputs)
        updated, attn = attention.step(slots, k, v, present)
        others, others_attn = attention.step(slots[:, [0, 2, 3]], k, v, present[:, [0, 2, 3]])
    assert (attn[:, 1] == 0).all()
    assert torch.allclose(attn[:, [0, 2, 3]], others_attn, atol=1e-5)
    assert torch.allclose(updated[:, [0, 2, 3]], others, atol=1e-5)


# Drops


def judge(model, logit):
    """KeepHead gives this logit to every slot."""
    for p in model.slot_attention.keep_head.parameters():
        torch.nn.init.zeros_(p)
    model.slot_attention.keep_head.mlp[-1].bias.data.fill_(logit)


@pytest.mark.parametrize('T', [1, 4])
def test_redundant_slots_are_dropped_one_at_a_time_after_the_iterations(T):
    model, images = small_model(drops=2, num_iterations=T), torch.rand(2, 3, 16, 16)
    judge(model, -1)
    _, masks, slots, attn = model(images)
    absent = (attn.amax((3, 4)) == 0).sum(dim=2)  # [B, T + drops]
    assert absent.tolist() == [[0] * T + [1, 2]] * 2
    assert torch.equal(slots[..., 2] > 0, masks.amax((2, 3, 4)) > 0)
    assert (slots[..., 2] > 0).sum(1).tolist() == [3, 3]
    judge(model, 0.1)
    assert (model(images).slots[..., 2] > 0).all()


def test_inference_has_more_slots_and_as_many_more_drops():
    model, images = small_model(spare_slots=3, drops=2), torch.rand(2, 3, 16, 16)
    judge(model, -1)
    slots = model(images).slots
    assert slots.shape[1] == 8 and (slots[..., 2] > 0).sum(1).tolist() == [3, 3]
    assert small_model(architecture='paper')(images).slots.shape[1] == 5


def test_the_last_slot_stays():
    model, images = small_model(drops=2), torch.rand(2, 3, 16, 16)
    judge(model, -1)
    for K, left in ((1, 1), (2, 1), (4, 2), (5, 3), (8, 6)):
        assert (model(images, num_slots=K).slots[..., 2] > 0).sum(1).tolist() == [left, left], K
    model = small_model(drops=0)
    judge(model, -1)
    assert (model(images, num_slots=8).slots[..., 2] > 0).all()


def keep_head_loss(model, images, seed=0):
    pixels = torch.arange(0, 16, 2), torch.arange(1, 16, 2)
    state, _ = model.slot_attention.iterate(model.encoder(images), drops=1)
    rgbs, masks = model.decode(model.slot_attention.look(state), pixels)
    errors = ((rgbs * masks).sum(1) - images[:, :, pixels[0]][..., pixels[1]]).square().mean(1)
    return keep_loss(model, images, state, masks, errors, pixels, np.random.default_rng(seed))


def test_only_the_head_learns_from_its_loss_and_all_of_it():
    model = small_model()
    sum(keep_head_loss(model, torch.rand(4, 3, 16, 16) * 2 - 1, seed) for seed in range(4)).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == ('keep_head' in name), name


def test_the_head_learns_that_slots_without_pixels_are_not_needed():
    """Every slot draws the same grey image: any one of them can go."""
    model, images = small_model(), torch.zeros(4, 3, 16, 16) + 0.1 * torch.randn(4, 3, 16, 16)
    torch.nn.init.zeros_(model.decoder.hyper[-1].weight)
    before = keep_head_loss(model, images).item()
    judge(model, -2)
    assert keep_head_loss(model, images).item() < 0.2 < 1 < before


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


# Search


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_refining_lowers_the_error_and_touches_nothing_else(architecture):
    model = small_model(architecture=architecture)
    images, slots = torch.rand(5, 3, 16, 16) * 2 - 1, torch.randn(5, 7, 16)
    slots[:, :, 2] = 0.3
    slots[:, 2, 2] = 0.0

    def error(slots):
        rgbs, masks = model.decode(slots)
        return ((rgbs * masks).sum(1) - images).square().mean((1, 2, 3))

    with torch.no_grad():
        refined = refine(model, images, slots, num_steps=8)
        before, after = error(slots), error(refined)
        torch.testing.assert_close(refine(model, images[1:2], slots[1:2], 8), refined[1:2], rtol=1e-3, atol=1e-4)
    assert (after <= before).all() and after.mean() < 0.99 * before.mean()
    if architecture == 'fast':
        assert torch.equal(refined[:, 2], slots[:, 2])  # an absent slot has no gradient
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(refine(model, images.clone(), slots.clone(), 8), refined)


def test_refining_that_does_not_help_is_undone():
    model, images, slots = small_model(), torch.rand(2, 3, 16, 16), torch.randn(2, 7, 16)
    assert torch.equal(refine(model, images, slots, num_steps=2, lr=1e6), slots)


def test_a_framed_slot_attends_to_what_is_near():
    attention = small_model(slot_dim=8).slot_attention
    torch.nn.init.zeros_(attention.project_q.weight)
    slots = torch.zeros(1, 2, 8)
    slots[0, 0, :3] = torch.tensor([0.5, -0.5, 0.3])  # right, above
    slots[0, 1, :3] = torch.tensor([-0.5, 0.5, 0.3])
    with torch.no_grad():
        _, attn = attention.step(slots, *torch.zeros(2, 1, 64, 8), torch.ones(1, 2, dtype=torch.bool))
    first = attn[0, 0].view(8, 8)
    assert first[2, 5] > 0.75 and first[5, 2] < 0.25
    assert first[1, 6] > first[3, 5] > first[5, 4]
