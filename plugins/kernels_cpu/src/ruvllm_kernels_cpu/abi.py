"""The structures and functions of ``native/abi.h`` for ctypes; fields in the same order, of the same types."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p

VERSION = 6
#: Matrices of a layer in the order of the C structure.
SITES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


class Matrix(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("row_bytes", c_int64),
        ("scheme", c_int32),
        ("mapped", c_int32),
    ]


class Layer(Structure):
    _fields_ = [
        ("attn_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("sites", Matrix * len(SITES)),
        ("window", c_int64),
    ]


class Model(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("vocab", "hidden", "inner", "layers", "heads", "kv_heads", "head_dim")),
        *((name, c_int32) for name in ("rope_dim", "rope_interleaved", "activation")),
        *((name, c_float) for name in ("eps", "scale", "attention_softcap", "logit_softcap")),
        *((name, c_int32) for name in ("activation_bits", "center_keys")),
        ("embed", Matrix),
        ("head", Matrix),
        ("final_norm", c_void_p),
        ("layer", POINTER(Layer)),
    ]


class Segment(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("type", "block_size", "table_stride", "num_blocks")),
        *((name, c_void_p) for name in ("table", "lengths", "starts", "keys", "values", "means")),
    ]


class Move(Structure):
    _fields_ = [
        ("source", Segment),
        ("target", Segment),
        ("count", c_int64),
        *((name, c_void_p) for name in ("from_slots", "to_slots", "positions")),
    ]


class LowRank(Structure):
    _fields_ = [("a", c_void_p), ("b", c_void_p), ("scale", c_float), ("rank", c_int32)]


class Adapter(Structure):
    _fields_ = [("sites", c_void_p), ("widest", c_int64)]


class BatchArgs(Structure):
    _fields_ = [
        *((f"{name}_count", c_int64) for name in ("tokens",)),
        ("sequences", c_int64),
        *((f"{name}_count", c_int64) for name in ("rows", "segments")),
        *((name, c_void_p) for name in ("tokens", "positions", "cu_q", "rows", "slots", "cos", "sin")),
        *((name, c_void_p) for name in ("segments", "adapters", "boundary", "moves")),
        ("moves_count", c_int64),
    ]


def declare(library: ctypes.CDLL) -> None:
    """Argument and result types of every function. Raises `AttributeError` for one that is not there."""
    signatures: dict[str, tuple[object, list[object]]] = {
        "rv_abi_version": (c_int32, []),
        "rv_kernels": (c_void_p, [c_char_p]),
        "rv_kernels_name": (c_char_p, [c_void_p]),
        "rv_open": (c_int32, [POINTER(Model), c_void_p, c_int32, POINTER(c_void_p)]),
        "rv_close": (None, [c_void_p]),
        "rv_forward": (c_int32, [c_void_p, POINTER(BatchArgs), c_void_p]),
        "rv_logits": (c_int32, [c_void_p, c_void_p, c_int64, c_void_p, c_void_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
