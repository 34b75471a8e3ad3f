"""Writes the weights and the configuration of a checkpoint as float16, without the optimiser: a quarter of its size.

    python tests/export.py logs/checkpoints/last.pth tests/pretrained/shapes.pth

The result can be scored and drawn (train.py --eval, visualize.py), but not resumed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slot_attention import build_model, load_checkpoint, save_checkpoint


def export(source: str, target: str) -> None:
    checkpoint = load_checkpoint(source)
    training = {name: checkpoint['training'][name] for name in ('args', 'data', 'fingerprint')}
    for arguments in (training['args'], training['data']):
        arguments['data_dir'] = 'data'  # not that of the machine it was trained on
    training['progress'] = {'step': checkpoint['training']['progress']['step']}
    save_checkpoint(target, build_model(checkpoint, source).half(), **training)
    print(f'{target}: {Path(target).stat().st_size / 1e6:.2f} MB')


if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    export(*sys.argv[1:])
