"""What is measured on a GPU, run once, in small. Triton's interpreter does where there is none, and says nothing of
speed."""

import pytest
import torch

from bigbird_plus import Sparsity
from bigbird_plus.attention import engines

measure_kernels = pytest.importorskip("tests.attention.measure_kernels", reason="needs Triton")
triton = pytest.importorskip("bigbird_plus.attention.impl.triton")

pytestmark = [pytest.mark.gpu, pytest.mark.torch_only]


def test_rates_count_the_blocks_that_are_read(monkeypatch, capsys):
    """Of two that take the same time, the one that reads a part works at that part of the rate."""
    results = []

    def seconds(call):
        results.append(call())
        return 1.0

    sizes = {"HEADS": 1, "BLOCK_SIZE": 16, "WIDTH": 8, "SHAPES": [(1, 192, 16)], "TOKENS": [4], "seconds": seconds}
    for name, value in sizes.items():
        monkeypatch.setattr(measure_kernels, name, value)
    monkeypatch.setitem(engines._engines, "triton", triton)
    monkeypatch.setattr(triton, "reason", lambda call: None)
    measure_kernels.main(device="cuda" if torch.cuda.is_available() else "cpu", dtype=torch.float16)
    share = (Sparsity(1, 16).pattern(12, training=True).counts > 0).mean()
    _, attention, norm = capsys.readouterr().out.splitlines()
    assert attention.endswith(f"heads of 16: forward {share:.2f}, with backward {share:.2f}")
    assert norm == "norm of 3.05176e-05 x 2^20 numbers: forward 1.00, with backward 1.00"
    dense, ours = results[0], results[1]
    assert 0.5 < share < 1 and dense.shape == ours.shape == (1, 1, 192, 16)
    torch.testing.assert_close(ours[:, :, :16], dense[:, :, :16], atol=1e-2, rtol=1e-2)  # a block that reads all
    assert not torch.allclose(ours, dense, atol=1e-2)
