"""Which kind of work an operator or a kernel does.

Operators tell more than kernels: a layout change inside a convolution is a part of the convolution. So the outermost
operator that the table knows decides, and the kernel's own name where none is known, as in compiled code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Literal, get_args

__all__ = ["KINDS", "Kind", "direction", "kernel_kind", "kind_of", "op_kind"]

Kind = Literal["attention", "matmul", "convolution", "elementwise", "transfer"]
"""elementwise: everything that memory bounds: arithmetic, norms, softmax, reductions, copies on the device."""

KINDS: tuple[Kind, ...] = get_args(Kind)

OPS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("attention", re.compile(r"::_?(scaled_dot_product|(flash|efficient|cudnn)_attention|flash_attn)")),
    ("attention", re.compile(r"^(flash_attn|sageattention|xformers)\w*::|::_?(sageattn|flex_attention|fmha)")),
    ("convolution", re.compile(r"^aten::_?(slow_|thnn_|cudnn_|mkldnn_|miopen_)?conv(olution|_transpose|_depth|\dd)")),
    ("matmul", re.compile(r"^aten::_?(add|scaled_|grouped_|int_|scaled_grouped_|b|badd)?(mm|bmm|mv)(_\w+)?$")),
    ("matmul", re.compile(r"^aten::(linear|matmul|dot|vdot|inner|_addmm_activation)$")),
)  # fmt: skip
"""Operators with their namespace, in order; what is not here leaves the decision to the kernel."""

KERNELS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("transfer", re.compile(r"^Memcpy (HtoD|DtoH|PtoP)|^nccl")),
    ("elementwise", re.compile(r"^Mem(cpy|set)|^triton_(poi|red|per|for|split_scan)_|cudnn::bn_")),
    ("attention", re.compile(r"fmha|flash|sdpa|attention|_attn_|sageattn|qk_int8", re.IGNORECASE)),
    ("convolution", re.compile(r"fprop|dgrad|wgrad|implicit_gemm|winograd|convolve|(?<![a-z])conv(olution|\dd|_)")),
    ("convolution", re.compile(r"im2col|vol2col|n(c|d?h)w\w*To\w+Kernel|cudnn", re.IGNORECASE)),
    ("matmul", re.compile(r"gemm|nvjet|cublas|gemv|split_?k_?reduce|xmma|cutlass|wgmma|dot_kernel", re.IGNORECASE)),
    ("matmul", re.compile(r"^triton_(tem_\w*)?(add|b|badd|scaled_)?mm|^triton_tem_\w*mm")),
)
"""Device activities in order; what is not here is elementwise. The names are CUPTI's, cuDNN's, CUTLASS's, Triton's."""


@cache
def op_kind(name: str) -> Kind | None:
    """What an operator's name decides; None: nothing. Without a namespace it is somebody's label, not an operator."""
    if "::" not in name:
        return None
    return next((kind for kind, pattern in OPS if pattern.search(name)), None)


def kernel_kind(name: str) -> Kind:
    return next((kind for kind, pattern in KERNELS if pattern.search(name)), "elementwise")


def kind_of(ops: Iterable[str], kernel: str | None = None) -> Kind:
    """The kind of work under the operators `ops`, outermost first; `kernel` is what ran on a card."""
    own = "elementwise" if kernel is None else kernel_kind(kernel)
    if own == "transfer":
        return own
    return next((kind for kind in map(op_kind, ops) if kind), own)


def direction(kernel: str) -> str:
    """Of a transfer: "host_to_device", "device_to_host", or "device_to_device" between cards."""
    ends = {"Memcpy HtoD": "host_to_device", "Memcpy DtoH": "device_to_host"}
    return ends.get(kernel[:11], "device_to_device")
