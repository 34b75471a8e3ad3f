"""The weights in tests/pretrained still give the scores that were recorded when they were added."""

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT

from dataset import create_dataset
from slot_attention import PRETRAINED, load_model, segmentation_scores


def network_fg_ari(name: str, batch: dict[str, torch.Tensor]) -> float:
    model = load_model(PRETRAINED[name])
    slots = model.slot_attention.initial_slots(
        len(batch['image']), model.slot_attention.num_slots, torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        masks = model(batch['image'], slots=slots).masks
    return segmentation_scores(batch['mask'], masks)['fg_ari'].nanmean().item()


@pytest.mark.parametrize('name', PRETRAINED)
def test_the_weights_are_small_and_make_a_model(name):
    assert PRETRAINED[name].stat().st_size < 1e6
    config = load_model(PRETRAINED[name]).config
    assert (config.architecture == 'paper') == name.startswith('paper_')


def test_shapes():
    dataset = create_dataset('shapes', 'test', 64)
    assert network_fg_ari('shapes', dataset.__getitems__(list(range(64)))) == pytest.approx(0.9434, abs=0.005)


def test_clevr6_on_eight_scenes():
    """Scenes of the CLEVR generator that the model was not trained on, as PNGs with their masks."""
    images, labels = (
        np.stack([np.asarray(Image.open(ROOT / f'tests/pretrained/clevr_{i}{kind}.png')) for i in range(8)])
        for kind in ('', '_mask')
    )
    images = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    batch = {'image': images, 'mask': torch.from_numpy(labels).long()}
    assert network_fg_ari('clevr6', batch) == pytest.approx(0.9470, abs=0.005)
