"""Reads TensorFlow checkpoints (format V2: one `.index` file, and `.data-*` files) without TensorFlow.

The index is a sorted string table, the file format of LevelDB: blocks of entries whose keys share prefixes, a block
that points to all others, and a footer that points to that one. Each key is the name of a variable, each value a
protocol buffer that says where in which data file the numbers are. The key that sorts first is empty; it belongs to
the header.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .crc32c import masked_crc32c

FOOTER_SIZE = 48
BLOCK_TRAILER_SIZE = 5  # a byte for the compression, and a checksum
TABLE_MAGIC = 0xDB4775248B80FB57
UNCOMPRESSED = 0

# Values of TensorFlow's DataType.
DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    5: torch.int16,
    6: torch.int8,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    19: torch.float16,
}

# Field numbers of the protocol buffers BundleHeaderProto, BundleEntryProto, and TensorShapeProto with its Dim.
HEADER_NUM_SHARDS, HEADER_ENDIANNESS = 1, 2
ENTRY_DTYPE, ENTRY_SHAPE, ENTRY_SHARD, ENTRY_OFFSET, ENTRY_SIZE, ENTRY_CHECKSUM, ENTRY_SLICES = range(1, 8)
SHAPE_DIM, DIM_SIZE = 2, 1


class Variable(NamedTuple):
    """Where a variable is: `size` bytes at `offset` of the file `path`, with a checksum."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size: int
    checksum: int

    def load(self) -> Tensor:
        """The numbers.

        Raises:
            ValueError: if the file is damaged: it ends before them, or they are not those that were written.
        """
        damage = f"{self.path} is damaged or not complete: a variable of {self.size} bytes at byte {self.offset}"
        if self.size != math.prod(self.shape) * self.dtype.itemsize:
            raise ValueError(f"{damage} has the shape {list(self.shape)}.")
        if self.path.stat().st_size < self.offset + self.size:
            raise ValueError(f"{damage} is cut off.")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = bytearray(file.read(self.size))
        if masked_crc32c(content) != self.checksum:
            raise ValueError(f"{damage} does not have its checksum.")
        if not content:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(content, dtype=self.dtype).reshape(self.shape)


def find_checkpoint(source) -> Path | None:
    """The prefix of the checkpoint that `source` names: a prefix, an index file, or a folder with one index file.
    None if there is no such checkpoint.

    Raises:
        ValueError: for a folder with several checkpoints.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{path} holds several TensorFlow checkpoints: {names}. Give the path of one of them.")
        return found[0].with_suffix("") if found else None
    if path.suffix == ".index" and path.is_file():
        return path.with_suffix("")
    return path if Path(f"{path}.index").is_file() else None


def read_index(prefix) -> dict[str, Variable]:
    """The variables of the checkpoint `<prefix>.index`, by name. Variables of text are left out.

    Raises:
        ValueError: if the file is damaged, no index of a checkpoint, or one of a kind that is not read here.
    """
    path = Path(f"{prefix}.index")
    try:
        return _read_variables(prefix, _read_table(path), path)
    except (IndexError, KeyError, TypeError, UnicodeDecodeError) as error:  # numbers that lead nowhere
        raise ValueError(f"{path} is damaged, or no index of a TensorFlow checkpoint: {error!r}") from error


def _read_variables(prefix, table: dict[bytes, bytes], path: Path) -> dict[str, Variable]:
    header = _fields(table.pop(b"", b""))
    if HEADER_NUM_SHARDS not in header:
        raise ValueError(f"{path} is no index of a TensorFlow checkpoint: it has no header.")
    if header.get(HEADER_ENDIANNESS, [0]) != [0]:
        raise ValueError(f"{path} belongs to a checkpoint of a big-endian machine, which cannot be read here.")
    num_shards = header[HEADER_NUM_SHARDS][0]
    variables = {}
    for key, value in table.items():
        entry = _fields(value)
        if ENTRY_SLICES in entry:
            raise ValueError(f"{key.decode()} is a partitioned variable, which cannot be read. Save it in one piece.")
        if entry.get(ENTRY_DTYPE, [0])[0] in DTYPES:
            variables[key.decode()] = _variable(prefix, entry, num_shards)
    return variables


def _variable(prefix, entry, num_shards) -> Variable:
    def number(field):
        return entry.get(field, [0])[0]

    dims = _fields(entry.get(ENTRY_SHAPE, [b""])[0]).get(SHAPE_DIM, [])
    return Variable(
        path=Path(f"{prefix}.data-{number(ENTRY_SHARD):05d}-of-{num_shards:05d}"),
        dtype=DTYPES[number(ENTRY_DTYPE)],
        shape=tuple(_fields(dim).get(DIM_SIZE, [0])[0] for dim in dims),
        offset=number(ENTRY_OFFSET),
        size=number(ENTRY_SIZE),
        checksum=int.from_bytes(entry[ENTRY_CHECKSUM][0], "little"),
    )


def _read_table(path: Path) -> dict[bytes, bytes]:
    """All entries of a sorted string table."""
    content = path.read_bytes()
    footer = content[-FOOTER_SIZE:]
    if len(footer) < FOOTER_SIZE or int.from_bytes(footer[-8:], "little") != TABLE_MAGIC:
        raise ValueError(f"{path} is no index of a TensorFlow checkpoint (format V2), or not complete.")
    position = 0
    for _ in range(2):  # the place of a block of metadata that is not needed
        _, position = _varint(footer, position)
    entries = {}
    for _, handle in _block_entries(path, content, footer[position:]):
        entries.update(_block_entries(path, content, handle))
    return entries


def _block_entries(path, content: bytes, handle: bytes):
    """Yields the keys and values of the block whose offset and size are encoded in `handle`."""
    start, position = _varint(handle, 0)
    size, _ = _varint(handle, position)
    block, trailer = _take(content, start, size), _take(content, start + size, BLOCK_TRAILER_SIZE)
    if masked_crc32c(block + trailer[:1]) != int.from_bytes(trailer[1:], "little"):
        raise ValueError(f"{path} is damaged: its block at byte {start} does not have its checksum.")
    if trailer[0] != UNCOMPRESSED:
        raise ValueError(f"{path} is compressed, which cannot be read here. TensorFlow itself writes no such index.")
    num_restarts = int.from_bytes(block[-4:], "little")
    end = size - 4 * (num_restarts + 1)
    key, position = b"", 0
    while position < end:
        shared, position = _varint(block, position)
        added, position = _varint(block, position)
        length, position = _varint(block, position)
        key = _take(key, 0, shared) + _take(block, position, added)
        yield key, _take(block, position + added, length)
        position += added + length


def _fields(message: bytes) -> dict[int, list]:
    """The fields of a protocol buffer by their number: integers, or bytes for what is nested."""
    fields: dict[int, list[int | bytes]] = {}
    position = 0
    while position < len(message):
        value: int | bytes
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _varint(message, position)
        else:
            length = {1: 8, 5: 4}.get(wire_type)
            if length is None:
                length, position = _varint(message, position)
            value, position = _take(message, position, length), position + length
        fields.setdefault(number, []).append(value)
    return fields


def _take(content: bytes, start: int, size: int) -> bytes:
    taken = content[start : start + size]
    if len(taken) != size:
        raise IndexError(f"{size} bytes at {start} of {len(content)}")
    return taken


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """An integer in groups of seven bits, the lowest first, and the position behind it."""
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
