"""Whatever is typed or lies in a file, there is no traceback: an answer, or one of our errors."""

import copy
import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import SMALL, run
from test_sources import clevr_scene, example, frame

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


def places(value, path=()) -> list[tuple]:
    """The way to every entry of nested dicts and lists."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [where for key, entry in entries for where in ((*path, key), *places(entry, (*path, key)))]


JUNK = [None, 1.5, 'x', True, [], {}, torch.zeros(2, 3)]


@settings(max_examples=30)
@given(data=st.data())
def test_a_checkpoint_with_an_entry_of_another_type_or_without_it_is_used_or_refused(checkpoint, data):
    content = torch.load(io.BytesIO(checkpoint), weights_only=True)
    *path, last = data.draw(st.sampled_from(places(content)))
    parent = content
    for key in path:
        parent = parent[key]
    if data.draw(st.booleans()):
        parent[last] = copy.deepcopy(data.draw(st.sampled_from([j for j in JUNK if type(j) is not type(parent[last])])))
    else:
        del parent[last]
    file = io.BytesIO()
    torch.save(content, file)
    use(file.getvalue())


# Records


@st.composite
def damaged(draw, content: bytes) -> bytes:
    content = bytearray(content)
    for place in draw(st.lists(st.one_of(st.integers(0, 40), st.integers(0, len(content) - 1)), max_size=4)):
        content[place % len(content)] = draw(st.integers(0, 255))
    start = draw(st.integers(0, len(content)))
    content[start:start] = draw(st.binary(max_size=8))
    return bytes(content[: draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])


TETROMINOES = example(
    image=np.zeros((35, 35, 3), np.uint8), mask=np.zeros((4, 35, 35, 1), np.uint8), visibility=np.ones(4, np.float32)
)
CLEVR = clevr_scene(seed=0, num_objects=3)[2]


def read(content: bytes, name: str) -> None:
    Path('some.tfrecords').write_bytes(content)
    source = dataset.PUBLISHED[name]
    try:
        for scene in dataset.read_published(Path('some.tfrecords'), source, resolution=16):
            assert scene.image.shape[2] == 3 and scene.image.dtype == np.uint8
            assert scene.labels.shape == (16, 16)
    except dataset.DataError as error:
        assert '\n' not in str(error)


@settings(max_examples=200)
@given(damaged(TETROMINOES))
def test_any_payload_is_read_or_refused(payload):
    read(frame(payload), 'tetrominoes')


@settings(max_examples=50)
@given(damaged(frame(TETROMINOES) * 2), st.booleans())
def test_any_framing_is_read_or_refused(content, zipped):
    read(gzip.compress(content, 1) if zipped else content, 'tetrominoes')


@settings(max_examples=50)
@given(damaged(gzip.compress(frame(CLEVR), 1)))
def test_any_zipped_file_is_read_or_refused(content):
    read(content, 'clevr6')


@settings(max_examples=50)
@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
def test_any_number_of_channels_entities_and_visibilities(channels, entities, visible):
    payload = example(
        image=np.zeros((35, 35, channels), np.uint8), mask=np.zeros((entities, 35, 35, 1), np.uint8),
        visibility=np.ones(visible, np.float32),
    )  # fmt: skip
    read(frame(payload), 'tetrominoes')
