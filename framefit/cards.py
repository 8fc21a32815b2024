"""Cards that can be planned for without having one: what their data sheets say, row by row, each with its source.

Tensor rates are dense and with fp32 accumulation, as models compute; GeForce cards do that at half the rate that is
advertised for fp16 accumulation, and sparse figures, twice as high, are left out. What a card attains of these is in
`framefit.rates`. The table in docs/cards.md is `table()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["CARDS", "Card", "table"]

UNSEEN_SHARE = 0.965
"""Of the nominal memory, where no total was found: the least that was seen of the others (RTX 5080: 15.47 of 16)."""

GB_PER_S_PER_LANE = {3: 0.985, 4: 1.969, 5: 3.938}
"""PCIe generation -> one way, after its line code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One row."""

    id: str
    """What `--device` takes."""
    name: str
    """What torch calls it."""
    vram_bytes: int
    """What torch reports in all: less than the nominal size, by what driver and error correction keep."""
    compute_capability: tuple[int, int]
    tflops: Mapping[str, float]
    """"fp32" outside the tensor cores, "fp16", "bf16", "fp8", "int8" on them -> dense peak; absent: not in hardware."""
    memory_gb_per_s: float
    pcie: tuple[int, int]
    """Generation, lanes."""
    source: str
    """Of rates and bandwidth."""
    inferred: str
    """What is not in the source, and how it was come by."""

    @property
    def pcie_gb_per_s(self) -> float:
        """One way."""
        generation, lanes = self.pcie
        return GB_PER_S_PER_LANE[generation] * lanes


def table() -> str:
    """All rows, as Markdown."""
    lines = [
        "| id | in torch | GiB | compute | fp32 | fp16 | bf16 | fp8 | int8 | GB/s | PCIe | source | inferred |",
        f"|{'---|' * 13}",
    ]
    for card in CARDS.values():
        rates = (f"{card.tflops[p]:.4g}" if p in card.tflops else "-" for p in ("fp32", "fp16", "bf16", "fp8", "int8"))
        capability, (generation, lanes) = ".".join(map(str, card.compute_capability)), card.pcie
        cells = (
            f"`{card.id}`", card.name, f"{card.vram_bytes / 2**30:.2f}", capability, *rates,
            f"{card.memory_gb_per_s:g}", f"{generation} x{lanes}", card.source, card.inferred or "-",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _vram(nominal_gib: float, seen_gib: float | None) -> int:
    return int((nominal_gib * UNSEEN_SHARE if seen_gib is None else seen_gib) * 2**30)


def _geforce(
    id: str,
    *,
    gib: float,
    sms: int,
    boost_ghz: float,
    memory: float,
    compute: tuple[int, int],
    source: str,
    seen: float | None = None,
    pcie: tuple[int, int] = (4, 16),
) -> Card:
    """From Ampere on each multiprocessor does 512 dense fp16 operations a clock into fp32, and 256 of fp32.

    The products are the whitepapers' own figures: 71.2 for the RTX 3090, 165.2 for the 4090, 209.5 for the 5090.
    """
    name = " ".join(part.upper() if part == "rtx" else part.capitalize() for part in id.split("-") if "gb" not in part)
    half = sms * boost_ghz * 0.512
    tflops = {"fp32": half / 2, "fp16": half, "bf16": half}
    if compute >= (8, 9):
        tflops["fp8"] = 2 * half
    tflops["int8"] = 4 * half
    inferred = f"rates: {sms} multiprocessors x {boost_ghz:g} GHz"
    if seen is None:
        inferred += f"; memory: {UNSEEN_SHARE:.1%} of {gib:g} GiB"
    return Card(
        id=id, name=f"NVIDIA GeForce {name}", vram_bytes=_vram(gib, seen), compute_capability=compute, tflops=tflops,
        memory_gb_per_s=memory, pcie=pcie, source=source, inferred=inferred,
    )  # fmt: skip


def _data_centre(
    id: str,
    name: str,
    *,
    gib: float,
    tflops: Mapping[str, float],
    memory: float,
    compute: tuple[int, int],
    source: str,
    seen: float | None = None,
    pcie: tuple[int, int] = (4, 16),
    inferred: str = "",
) -> Card:
    if seen is None:
        inferred = "; ".join(filter(None, (inferred, f"memory: {UNSEEN_SHARE:.1%} of {gib:g} GiB")))
    return Card(
        id=id, name=name, vram_bytes=_vram(gib, seen), compute_capability=compute, tflops=tflops,
        memory_gb_per_s=memory, pcie=pcie, source=source, inferred=inferred,
    )  # fmt: skip


AMPERE = (
    "[GA102 whitepaper](https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf)"
)
ADA = "[Ada whitepaper](https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf)"
BLACKWELL = (
    "[RTX Blackwell whitepaper]"
    "(https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf)"
)
GEFORCE = "[specifications](https://www.nvidia.com/en-us/geforce/graphics-cards/{})"
A100 = (
    "[A100 data sheet](https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-nvidia-us-2188504-web.pdf)"
)
PRODUCT = "[{0} data sheet](https://www.nvidia.com/en-us/data-center/{1}/)"
HALVED = "tensor rates: half of the sparse ones"
HOPPER = {"fp32": 67.0, "fp16": 989.5, "bf16": 989.5, "fp8": 1979.0, "int8": 1979.0}


def _rows() -> Iterator[Card]:
    """`seen`: total in torch's public out-of-memory messages (issues, logs), the least of those found for the card."""
    # fmt: off
    yield _geforce("rtx-3060-12gb", gib=12, seen=11.75, sms=28, boost_ghz=1.777, memory=360, compute=(8, 6),
                   source=GEFORCE.format("30-series/rtx-3060-3060ti/"))
    yield _geforce("rtx-3070", gib=8, seen=7.76, sms=46, boost_ghz=1.725, memory=448, compute=(8, 6), source=AMPERE)
    yield _geforce("rtx-3080-10gb", gib=10, seen=9.78, sms=68, boost_ghz=1.71, memory=760, compute=(8, 6),
                   source=AMPERE)
    yield _geforce("rtx-3090", gib=24, seen=23.69, sms=82, boost_ghz=1.695, memory=936, compute=(8, 6), source=AMPERE)
    yield _geforce("rtx-4060-ti-16gb", gib=16, sms=34, boost_ghz=2.535, memory=288, compute=(8, 9), pcie=(4, 8),
                   source=GEFORCE.format("40-series/rtx-4060-4060ti/"))
    yield _geforce("rtx-4070", gib=12, sms=46, boost_ghz=2.475, memory=504, compute=(8, 9),
                   source=GEFORCE.format("40-series/rtx-4070-family/"))
    yield _geforce("rtx-4080", gib=16, sms=76, boost_ghz=2.505, memory=717, compute=(8, 9), source=ADA)
    yield _geforce("rtx-4090", gib=24, seen=23.52, sms=128, boost_ghz=2.52, memory=1008, compute=(8, 9), source=ADA)
    yield _geforce("rtx-5070-ti", gib=16, sms=70, boost_ghz=2.452, memory=896, compute=(12, 0), pcie=(5, 16),
                   source=BLACKWELL)
    yield _geforce("rtx-5080", gib=16, seen=15.47, sms=84, boost_ghz=2.617, memory=960, compute=(12, 0), pcie=(5, 16),
                   source=BLACKWELL)
    yield _geforce("rtx-5090", gib=32, seen=31.34, sms=170, boost_ghz=2.407, memory=1792, compute=(12, 0),
                   pcie=(5, 16), source=BLACKWELL)
    yield _data_centre("t4", "Tesla T4", gib=16, seen=14.57, memory=320, compute=(7, 5), pcie=(3, 16),
                       tflops={"fp32": 8.1, "fp16": 65.0, "int8": 130.0}, source=PRODUCT.format("T4", "tesla-t4"))
    yield _data_centre("v100-16gb", "Tesla V100-SXM2-16GB", gib=16, memory=900, compute=(7, 0), pcie=(3, 16),
                       tflops={"fp32": 15.7, "fp16": 125.0}, source=PRODUCT.format("V100", "v100"))
    yield _data_centre("a10", "NVIDIA A10", gib=24, seen=22.06, memory=600, compute=(8, 6),
                       tflops={"fp32": 31.2, "fp16": 125.0, "bf16": 125.0, "int8": 250.0},
                       source=PRODUCT.format("A10", "products/a10-gpu"))
    yield _data_centre("l4", "NVIDIA L4", gib=24, seen=22.03, memory=300, compute=(8, 9), inferred=HALVED,
                       tflops={"fp32": 30.3, "fp16": 121.0, "bf16": 121.0, "fp8": 242.5, "int8": 242.5},
                       source=PRODUCT.format("L4", "l4"))
    yield _data_centre("l40s", "NVIDIA L40S", gib=48, seen=44.40, memory=864, compute=(8, 9),
                       tflops={"fp32": 91.6, "fp16": 362.0, "bf16": 362.0, "fp8": 733.0, "int8": 733.0},
                       source=PRODUCT.format("L40S", "l40s"))
    ampere = {"fp32": 19.5, "fp16": 312.0, "bf16": 312.0, "int8": 624.0}
    yield _data_centre("a100-40gb", "NVIDIA A100-SXM4-40GB", gib=40, memory=1555, compute=(8, 0), tflops=ampere,
                       source=A100)
    yield _data_centre("a100-80gb", "NVIDIA A100-SXM4-80GB", gib=80, seen=79.35, memory=2039, compute=(8, 0),
                       tflops=ampere, source=A100)
    yield _data_centre("h100-80gb", "NVIDIA H100 80GB HBM3", gib=80, seen=79.11, memory=3350, compute=(9, 0),
                       pcie=(5, 16), tflops=HOPPER, inferred=HALVED, source=PRODUCT.format("H100", "h100"))
    yield _data_centre("h200", "NVIDIA H200", gib=141, seen=139.80, memory=4800, compute=(9, 0), pcie=(5, 16),
                       tflops=HOPPER, inferred=HALVED, source=PRODUCT.format("H200", "h200"))
    # fmt: on


CARDS: Mapping[str, Card] = {card.id: card for card in _rows()}
"""By id, consumer cards first."""
