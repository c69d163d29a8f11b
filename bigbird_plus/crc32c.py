"""CRC-32C, the checksum in TensorFlow's files, by NumPy: some ten seconds for a gigabyte."""

import numpy as np

POLYNOMIAL = 0x82F63B78  # Castagnoli's, its bits in reverse order
LANES = 4096  # runs of bytes that are read at the same time
PIECE = 4096 * LANES


def masked_crc32c(content) -> int:
    """The checksum of bytes as TensorFlow stores it: turned and shifted, so that a checksum of checksums is none."""
    crc = crc32c(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(content) -> int:
    """The checksum of anything that has bytes."""
    data = np.frombuffer(content, np.uint8)
    register = np.uint32(0xFFFFFFFF)
    for start in range(0, len(data), PIECE):
        register = _read(register, data[start : start + PIECE])
    return int(~register)


def _read(register: np.uint32, data: np.ndarray) -> np.uint32:
    """The register after `data`, which `LANES` registers read at first, each a run of its own.

    A register that reads zeros changes by a linear map of its bits; two runs become one as that of the first reads as
    many zeros as the second is long, and the two are added.
    """
    steps = len(data) // LANES
    lanes = np.zeros(LANES, np.uint32)
    lanes[0] = register
    of_bits = np.uint32(1) << np.arange(32, dtype=np.uint32)  # what becomes of each bit when zeros are read
    for column in np.ascontiguousarray(data[: steps * LANES].reshape(LANES, steps).T):
        lanes, of_bits = _step(lanes, column), _step(of_bits, 0)
    while len(lanes) > 1:
        lanes = _read_zeros(lanes[::2], of_bits) ^ lanes[1::2]
        of_bits = _read_zeros(of_bits, of_bits)
    register = lanes[0]
    for byte in data[steps * LANES :]:
        register = _step(register, byte)
    return register


def _step(registers, new_bytes):
    return TABLE[(registers ^ new_bytes) & 0xFF] ^ (registers >> 8)


def _read_zeros(registers: np.ndarray, of_bits: np.ndarray) -> np.ndarray:
    bits = registers[:, None] >> np.arange(32, dtype=np.uint32) & 1
    return np.bitwise_xor.reduce(bits * of_bits, axis=1)


def _make_table() -> np.ndarray:
    registers: np.ndarray = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        registers = registers >> 1 ^ (registers & 1) * np.uint32(POLYNOMIAL)
    return registers


TABLE = _make_table()
