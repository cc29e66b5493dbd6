"""The single operations of ``native/abi.h`` for ctypes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p

from ruvllm_kernels_cpu import abi


class Shape(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("heads", "kv_heads", "head_dim", "rope_dim", "rope_interleaved", "unused")),
        ("window", c_int64),
        *((name, c_float) for name in ("scale", "softcap")),
    ]


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, argument and result types of its operations declared."""
    count, floats, shape = c_int64, c_void_p, POINTER(Shape)
    signatures: dict[str, list[object]] = {
        "rv_ops_open": [c_void_p, c_int32, c_int32, POINTER(c_void_p)],
        "rv_ops_close": [c_void_p],
        "rv_op_prepare": [c_void_p, POINTER(abi.Matrix), count, POINTER(c_void_p)],
        "rv_op_release": [c_void_p],
        "rv_op_linear": [c_void_p, c_void_p, floats, count, floats],
        "rv_op_embed": [c_void_p, POINTER(abi.Matrix), c_void_p, count, floats],
        "rv_op_norm": [c_void_p, floats, floats, floats, count, count, c_float, floats],
        "rv_op_rope": [c_void_p, floats, count, shape, floats, floats],
        "rv_op_gated": [c_void_p, floats, count, count, c_int32, floats],
        "rv_op_kv_append": [c_void_p, POINTER(abi.Segment), shape, c_void_p, count, floats, floats],
        "rv_op_attention": [c_void_p, POINTER(abi.BatchArgs), shape, floats, floats],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = None if name in ("rv_ops_close", "rv_op_release") else c_int32
    return library
