"""The paper's architecture against the authors' code: outputs, loss and gradients for the same weights and inputs.

reference.npz holds what google-research/slot_attention (TensorFlow 2.15, float64) computes. Weights and inputs are
not stored: numpy draws them again from a seed, by the rules below.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from slot_attention import ModelConfig, create_model

STORED = np.load(Path(__file__).parent / 'reference.npz')
CASES = {35: dict(num_slots=4, hidden_dim=32), 128: dict(num_slots=7, hidden_dim=64)}
BLOCK = {35: 5, 128: 16}  # side of the areas of one colour in the images, pixels
NO_GRADIENT = 'slot_attention.norm_slots.bias'  # adds the same to the logits of all slots: its gradient is rounding


def draw(resolution: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Parameters by name, images [2, 3, H, W] and the noise of the initial slots [2, K, 64], float32."""
    case, block = CASES[resolution], BLOCK[resolution]
    model = create_model(ModelConfig('paper', resolution, **case))
    names, scales = (STORED[f'{resolution}/{key}'] for key in ('names', 'scales'))
    assert sorted(model.state_dict()) == list(names)
    weights = {}
    for i, (name, scale) in enumerate(zip(names, scales, strict=True)):
        shape = tuple(model.state_dict()[name].shape)
        is_gain = name.endswith('.weight') and len(shape) == 1  # of a LayerNorm
        weights[name] = is_gain + scale * np.random.default_rng([resolution, i]).standard_normal(shape)
    rng = np.random.default_rng([resolution, 100])
    blocks = rng.uniform(-1, 1, (2, 3, resolution // block, resolution // block)).repeat(block, 2).repeat(block, 3)
    images = 0.8 * blocks + 0.2 * rng.uniform(-1, 1, (2, 3, resolution, resolution))
    noise = np.random.default_rng([resolution, 101]).standard_normal((2, case['num_slots'], 64))
    weights = {name: w.astype(np.float32) for name, w in weights.items()}
    return weights, images.astype(np.float32), noise.astype(np.float32)


@pytest.mark.parametrize(('resolution', 'dtype', 'tolerance'), [(35, torch.float64, 1e-6), (128, torch.float32, 1e-4)])
def test_the_paper_architecture_equals_the_authors_code(monkeypatch, resolution, dtype, tolerance):
    def stored(key):
        return STORED[f'{resolution}/{key}']

    weights, images, noise = draw(resolution)
    norms = [np.linalg.norm(value.astype(float)) for value in (*weights.values(), images, noise)]
    np.testing.assert_allclose(norms, stored('drawn'), rtol=1e-6, err_msg='this numpy draws other numbers')

    model = create_model(ModelConfig('paper', resolution, **CASES[resolution]))
    model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
    model.to(dtype)
    images, noise = torch.from_numpy(images).to(dtype), torch.from_numpy(noise).to(dtype)
    monkeypatch.setattr(torch, 'randn', lambda shape, **kwargs: noise)
    output = model(images)
    loss = (output.recons - images).square().mean()
    loss.backward()

    places = stored('places')
    computed = {
        'slots': output.slots,
        'attn': output.attn[:, -1][..., places[:, None], places],
        'recons': output.recons[..., places[:, None], places],
        'masks': output.masks[..., places[:, None], places],
        'loss': loss,
    }
    for name, value in computed.items():
        expected = stored(name).astype(float)
        difference = np.abs(value.detach().double().numpy() - expected).max()
        assert difference < tolerance * np.abs(expected).max(), name
    for name, expected in zip(stored('names'), stored('gradients').astype(float), strict=True):
        if name != NO_GRADIENT:
            assert model.get_parameter(name).grad.double().norm().item() == pytest.approx(expected, rel=tolerance), name
