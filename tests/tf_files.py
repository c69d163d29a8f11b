"""Writes TensorFlow checkpoints (format V2), as far as the tests need them."""

from pathlib import Path

import numpy as np

from bigbird_plus.crc32c import masked_crc32c

DATA_TYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "bool": 10, "float16": 19}
MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")


def write_checkpoint(prefix, arrays, *, num_shards=1, entries_per_block=7, compression=0, extra_entry=b"") -> Path:
    """Writes the index and `num_shards` data files of the variables in `arrays`, a dictionary of NumPy's arrays."""
    prefix = Path(prefix)
    entries = {b"": _number(1, num_shards) + _nested(3, _number(1, 1))}  # the version comes third
    contents = [b""] * num_shards
    for position, (name, array) in enumerate(sorted(arrays.items())):
        shard = position % num_shards
        array = np.asarray(array)
        shape = b"".join(_nested(2, _number(1, size)) for size in array.shape)
        entries[name.encode()] = (
            _number(1, DATA_TYPES[array.dtype.name])
            + _nested(2, shape)
            + _number(3, shard)
            + _number(4, len(contents[shard]))
            + _number(5, array.nbytes)
            + _varint(6 << 3 | 5)
            + _checksum(array.tobytes())
            + extra_entry
        )
        contents[shard] += array.tobytes()
    for shard, content in enumerate(contents):
        Path(f"{prefix}.data-{shard:05d}-of-{num_shards:05d}").write_bytes(content)
    Path(f"{prefix}.index").write_bytes(write_table(entries, entries_per_block, compression))
    return prefix


def write_table(entries, entries_per_block=7, compression=0) -> bytes:
    """A sorted string table: blocks of entries, an empty block of metadata, the block of their places, a footer."""
    content, places = b"", {}
    names = sorted(entries)
    for start in range(0, len(names), entries_per_block):
        group = names[start : start + entries_per_block]
        block = _block({name: entries[name] for name in group})
        places[group[-1]] = _varint(len(content)) + _varint(len(block))
        content += _with_trailer(block, compression)
    handles = b""
    for block in (_block({}), _block(places)):
        handles += _varint(len(content)) + _varint(len(block))
        content += _with_trailer(block)
    return content + handles.ljust(40, b"\0") + MAGIC


def _with_trailer(block, compression=0) -> bytes:
    block += bytes([compression])
    return block + _checksum(block)


def _checksum(content) -> bytes:
    return masked_crc32c(content).to_bytes(4, "little")


def _block(entries, restart_interval=4) -> bytes:
    """Entries whose keys share their beginning with the one before, save for every `restart_interval`-th."""
    content, restarts, last = b"", [], b""
    for position, (key, value) in enumerate(entries.items()):
        if position % restart_interval == 0:
            restarts.append(len(content))
            last = b""
        shared = next((i for i, (a, b) in enumerate(zip(last, key)) if a != b), min(len(last), len(key)))  # noqa: B905
        content += _varint(shared) + _varint(len(key) - shared) + _varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return content + b"".join(offset.to_bytes(4, "little") for offset in [*restarts, len(restarts)])


def _number(field, value) -> bytes:
    return _varint(field << 3) + _varint(value)


def _nested(field, message) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(message)) + message


def _varint(value) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
