"""On a card: the rows of a tiny model, and their memory as torch's allocator tells it."""

from __future__ import annotations

import pytest
import torch

from framefit.bench import SCENARIOS, measure
from framefit.bench.variants import Variant, parse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card"),
]


FEW = parse(["stock", "framefit"])


@pytest.mark.parametrize(
    ("name", "rows"),
    [("tiny-wan", None), ("tiny-easyanimate", FEW), ("tiny-i2vgen", FEW), ("tiny-decode", FEW)],
)
def test_rows_are_measured_on_a_card(name: str, rows: list[Variant] | None) -> None:
    result = measure(SCENARIOS[name], variants=rows, device="cuda", repeats=3, profile=True)
    assert result.hardware == torch.cuda.get_device_name()
    assert result.ceiling_flops is not None
    for row in result.rows:
        if row.name == "cache-dit offload" and row.status == "left out":
            continue
        assert row.status == "measured", row.because
        assert row.peak_allocated_bytes is not None
        assert row.peak_reserved_bytes is not None
        assert 0 < row.measured["weights_bytes"] < row.peak_reserved_bytes >= row.peak_allocated_bytes > 0
        assert row.profile["kinds"]["elementwise"]["seconds"] > 0
        if row.name != "stock":
            assert row.quality["relative_l2"] is not None
            assert row.quality["relative_l2"] < 0.05
