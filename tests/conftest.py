"""Tests run in an empty folder each, on one thread, and draw the same random numbers each time."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ['OMP_NUM_THREADS'] = '1'  # of the scripts that tests start
torch.set_num_threads(1)  # tiny tensors: a second thread only costs; here, as module fixtures run before repeatable()


@pytest.fixture(autouse=True)
def repeatable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
