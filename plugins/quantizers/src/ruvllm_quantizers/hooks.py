"""What this plugin registers: a quantizer for each scheme and recipe, and ``ruvllm quantize``."""

from __future__ import annotations

from ruvllm_core.hookspecs import Offer, hookimpl

RUVLLM_API_VERSION = 1

_QUANTIZERS = {
    "f32": "32-bit floats",
    "f16": "16-bit floats",
    "bf16": "16-bit floats with the range of 32-bit ones",
    "q8_0": "8.5 bits a weight; hardly a difference to f16",
    "q6_k": "6.6 bits a weight",
    "q5_k": "5.5 bits a weight, all matrices alike",
    "q5_k_s": "q5_k, output matrix in q6_k",
    "q5_k_m": "q5_k, the matrices that matter most in q6_k",
    "q5_0": "5.5 bits a weight, simple blocks",
    "q5_1": "6 bits a weight, simple blocks with a minimum",
    "q4_k": "4.5 bits a weight, all matrices alike",
    "q4_k_s": "q4_k, a few matrices in q5_k, output matrix in q6_k",
    "q4_k_m": "q4_k, the matrices that matter most in q6_k: the usual choice",
    "q4_0": "4.5 bits a weight, simple blocks",
    "q4_1": "5 bits a weight, simple blocks with a minimum",
    "q3_k": "3.4 bits a weight, all matrices alike",
    "q3_k_s": "q3_k, output matrix in q6_k",
    "q3_k_m": "q3_k, the matrices that matter most in q4_k and q5_k",
    "q3_k_l": "q3_k, the matrices that matter most in q5_k",
    "q2_k": "2.6 bits a weight, the matrices that matter most in q3_k: a visible loss",
}


@hookimpl
def quantizers() -> list[Offer]:
    return [Offer(name, f"ruvllm_quantizers.recipes:RECIPES.{name}", about) for name, about in _QUANTIZERS.items()]


@hookimpl
def commands() -> list[Offer]:
    return [Offer("quantize", "ruvllm_quantizers.command:command", "write a model as a smaller GGUF file")]
