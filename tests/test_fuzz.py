"""Whatever is typed or lies in a file, there is no traceback: an answer, or one of our errors."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import SMALL, run
from test_sources import example, frame

import dataset
import train
import visualize
from slot_attention import ConfigError, ModelConfig

# The same examples each time; the machine may be slow; a folder may serve many examples.
settings.register_profile(
    'tests', derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile('tests')


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr(train, 'log_figures', lambda *args: None)


# Command lines

NUMBERS = st.one_of(st.integers(-2, 300), st.floats(), st.integers()).map(str)
VALUES = st.one_of(NUMBERS, st.sampled_from(['adam', 'paper', 'fast', 'clevr6', 'images', 'auto', '']), st.text())


def command_lines(parser):
    flags = [action.option_strings[-1] for action in parser._actions if action.option_strings[-1] != '--help']
    return st.lists(st.tuples(st.sampled_from(flags), VALUES).map('='.join), max_size=6)


@settings(max_examples=300)
@given(command_lines(train.create_parser()))
def test_any_command_line_of_train_is_understood_or_refused(argv):
    try:
        args = train.parse_args(argv)
        ModelConfig(**{name: getattr(args, name) for name in train.MODEL_FLAGS})
    except SystemExit as exit:
        assert exit.code == 2
    except ConfigError as error:
        assert '\n' not in str(error)


@pytest.mark.parametrize('module', [dataset, visualize])
@settings(max_examples=100)
@given(data=st.data())
def test_any_command_line_of_the_others_is_understood_or_refused(module, data):
    try:
        module.parse_args(data.draw(command_lines(module.create_parser())))
    except SystemExit as exit:
        assert exit.code == 2


# Checkpoints


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """The file of a small run, as bytes."""
    folder = tmp_path_factory.mktemp('run')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'log_figures', lambda *args: None)
        assert run(*SMALL, '--epochs', 1, '--train_size', 16, '--log_dir', folder) == 0
    return (folder / 'checkpoints/last.pth').read_bytes()


def use(content: bytes) -> None:
    """Score, continue and draw from a checkpoint of these bytes."""
    Path('some.pth').write_bytes(content)
    assert run('--eval', '--resume', 'some.pth', '--val_size', 4) in (0, 2)
    assert run('--resume', 'some.pth', '--epochs', 2, '--log_dir', 'logs') in (0, 2)
    assert visualize.main(visualize.parse_args(['--checkpoint', 'some.pth', '--num_images', '1'])) in (0, 2)


@settings(max_examples=20)
@given(data=st.data())
def test_a_damaged_checkpoint_is_used_or_refused(checkpoint, data):
    content = bytearray(checkpoint)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[place] ^= data.draw(st.integers(1, 255))
    use(bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]))


# Records


@st.composite
def damaged(draw, content: bytes) -> bytes:
    content = bytearray(content)
    for place in draw(st.lists(st.one_of(st.integers(0, 40), st.integers(0, len(content) - 1)), max_size=4)):
        content[place % len(content)] = draw(st.integers(0, 255))
    start = draw(st.integers(0, len(content)))
    content[start:start] = draw(st.binary(max_size=8))
    return bytes(content[: draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])


@st.composite
def scenes(draw) -> bytes:
    """A record of Tetrominoes with any number of channels, entities and visibilities."""
    channels, entities, visible = (draw(st.integers(0, 5)) for _ in range(3))
    return example(
        image=np.zeros((35, 35, channels), np.uint8), mask=np.zeros((entities, 35, 35, 1), np.uint8),
        visibility=np.ones(visible, np.float32),
    )  # fmt: skip


TETROMINOES = example(
    image=np.zeros((35, 35, 3), np.uint8), mask=np.zeros((4, 35, 35, 1), np.uint8), visibility=np.ones(4, np.float32)
)
FILES = st.one_of(
    scenes().map(frame), damaged(TETROMINOES).map(frame), damaged(frame(TETROMINOES) * 2),
    damaged(frame(TETROMINOES) * 2).map(gzip.compress), damaged(gzip.compress(frame(TETROMINOES))),
)  # fmt: skip


@settings(max_examples=200)
@given(FILES)
def test_any_published_file_is_prepared_or_refused(content):
    Path('data').mkdir(exist_ok=True)
    Path('data/tetrominoes_train.tfrecords').write_bytes(content)
    assert dataset.main(dataset.parse_args('--prepare tetrominoes --data_dir data'.split())) in (0, 2)
