"""Reading TensorFlow's checkpoints: one that TensorFlow has written, and such as it writes for larger models."""

import base64
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bigbird_plus.crc32c import crc32c
from bigbird_plus.tf_checkpoint import find_checkpoint, read_index

from .tf_files import write_checkpoint, write_table

pytestmark = pytest.mark.torch_only

# Written by tf.compat.v1.train.Saver of TensorFlow 2.21.0.
GENUINE_INDEX = (
    "eNpjYGDjYJRi4mBkkBdOSi0q0U/NTUpNScnMSy/WL88vSolH8DkYhTiEmDiYgJhZQ8LU9+QBc1ZBwYL8/JzUIv2U1LziVP2kzESQMhaQMgUJDQ7TJdX9"
    "Bgysgmk5iUD9XFAJBQ0m0/gN5xoZuHnTc/KTEnPii0tSCzg4hRgUlIB6LCamvGNgEcxIzEnjEIZq0dJgMZ2sb+wLFM/Lz0sF2sEmxACUYVHQM73xqmkR"
    "AwtvSWpFCQc70Aw9DS7TNw8OaDIAASOI2CG9dC+cc+DTwg0MjMylDI8Z4WLzixaef8HI8ZWRn4EgCP/d0K1S6n4bAAStQ/M="
)
GENUINE_DATA = "eNpjYACBBjsgYc/A4ADEDUC8AIgP7AeKOTAysIMUMAKxBcMB1pvH5jhnpObk5AMA1ngKcg=="


@pytest.fixture
def genuine(tmp_path):
    for ending, content in {"index": GENUINE_INDEX, "data-00000-of-00001": GENUINE_DATA}.items():
        (tmp_path / f"model.ckpt.{ending}").write_bytes(zlib.decompress(base64.b64decode(content)))
    return tmp_path / "model.ckpt"


def test_a_checkpoint_of_tensorflow(genuine):
    """All but the variable of text, which no weight is."""
    read = {name: variable.load() for name, variable in read_index(genuine).items()}
    expected = {
        "bert/embeddings/word_embeddings": torch.arange(6.0).reshape(2, 3) / 4,
        "bert/pooler/dense/bias": torch.tensor([-1.5, 2.0]),
        "flags": torch.tensor([True, False]),
        "global_step": torch.tensor(2**40 + 7),
        "half": torch.tensor([0.5, -2.0], dtype=torch.float16),
        "none": torch.empty(0, 4),
    }
    torch.testing.assert_close(read, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["model.ckpt", "model.ckpt.index", "."])
def test_the_ways_to_name_a_checkpoint(genuine, name):
    assert find_checkpoint(genuine.parent / name) == genuine


def test_what_is_no_checkpoint(tmp_path):
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint("bert-base-uncased") is None


@given(
    sizes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=40),
    entries_per_block=st.integers(1, 9),
    num_shards=st.integers(1, 3),
)
def test_any_number_of_variables_blocks_and_files(tmp_path_factory, sizes, entries_per_block, num_shards):
    random = np.random.default_rng(0)
    arrays = {f"layer_{i}/{'abc'[i % 3]}": random.normal(size=size).astype("float32") for i, size in enumerate(sizes)}
    prefix = tmp_path_factory.mktemp("checkpoint") / "model.ckpt-7"
    write_checkpoint(prefix, arrays, num_shards=num_shards, entries_per_block=entries_per_block)
    read = {name: variable.load().numpy() for name, variable in read_index(prefix).items()}
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)


def test_several_checkpoints_in_a_folder(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path / f"model.ckpt-{step}", {"x": np.zeros(1)})
    with pytest.raises(ValueError, match=r"model\.ckpt-1\.index, model\.ckpt-2\.index"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a table" * 10])
def test_what_is_no_index(tmp_path, content):
    (tmp_path / "model.index").write_bytes(content)
    with pytest.raises(ValueError, match="no index of a TensorFlow checkpoint"):
        read_index(tmp_path / "model")


def test_a_file_that_is_cut_off(tmp_path):
    prefix = write_checkpoint(tmp_path / "model", {"x": np.zeros(100)})
    data = tmp_path / "model.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not complete"):
        read_index(prefix)["x"].load()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint of several blocks, the contents of its two files, and its variables."""
    arrays = {f"layer_{i}/kernel": np.arange(i * 5, dtype="float32").reshape(i, 5) for i in range(5)}
    prefix = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", arrays, entries_per_block=2)
    paths = [prefix.with_name(name) for name in ("model.index", "model.data-00000-of-00001")]
    return prefix, [(path, path.read_bytes()) for path in paths], arrays


DAMAGES = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.tuples(st.just("more"), st.just(0.0), st.integers(1, 60)),
)


@given(in_index=st.booleans(), damages=st.lists(DAMAGES, min_size=1, max_size=3))
@example(in_index=True, damages=[("cut", 0.0, 0)])
@example(in_index=False, damages=[("cut", 0.0, 0)])
def test_a_damaged_file_is_noticed(whole, in_index, damages):
    """Whatever happened to it: either the numbers are those that were written, or a `ValueError` names the file."""
    prefix, files, arrays = whole
    for path, content in files:
        path.write_bytes(content)
    path, content = files[0 if in_index else 1]
    content = bytearray(content)
    for kind, place, value in damages:
        at = int(place * len(content))
        if kind == "flip" and content:
            content[at] ^= value
        elif kind == "cut":
            del content[at:]
        else:
            content += bytes(value)
    path.write_bytes(content)
    try:
        read = {name: variable.load().numpy() for name, variable in read_index(prefix).items()}
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert read.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(read[name], array)


@given(message=st.binary(max_size=40))
def test_an_index_with_right_checksums_and_wrong_entries(tmp_path_factory, message):
    """As another program may write it."""
    prefix = tmp_path_factory.mktemp("checkpoint") / "model"
    Path(f"{prefix}.index").write_bytes(write_table({b"": b"\x08\x01", b"\xff": message}))
    Path(f"{prefix}.data-00000-of-00001").write_bytes(bytes(100))
    try:
        variables = read_index(prefix)
    except ValueError:
        return
    assert variables.keys() <= {"\xff"}


def test_sizes_are_compared_with_the_file(tmp_path):
    """Before so much memory is asked for."""
    prefix = write_checkpoint(tmp_path / "model", {"x": np.zeros(10, dtype="float32")})
    variable = read_index(prefix)["x"]
    huge = variable._replace(shape=(2**50,), size=2**52)
    with pytest.raises(ValueError, match="is cut off"):
        huge.load()
    with pytest.raises(ValueError, match=r"has the shape \[11\]"):
        variable._replace(shape=(11,)).load()


@pytest.mark.parametrize("size", [0, 9, 4095, 4096, 4097, 20000])
def test_checksums(size):
    """Of CRC-32C as it is defined, a bit at a time."""
    content = np.random.default_rng(size).bytes(size)
    register = 0xFFFFFFFF
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (register & 1) * 0x82F63B78
    assert crc32c(content) == register ^ 0xFFFFFFFF
    assert crc32c(b"123456789") == 0xE3069283  # of the standard


def test_kinds_that_are_not_read(tmp_path):
    write_checkpoint(tmp_path / "compressed", {"x": np.zeros(1)}, compression=1)
    with pytest.raises(ValueError, match="compressed"):
        read_index(tmp_path / "compressed")
    write_checkpoint(tmp_path / "partitioned", {"x": np.zeros(1)}, extra_entry=b"\x3a\x00")
    with pytest.raises(ValueError, match="x is a partitioned variable"):
        read_index(tmp_path / "partitioned")
