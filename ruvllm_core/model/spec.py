"""`ModelSpec`: everything a decoder needs to know of a decoder-only transformer, as data.

Families differ by what they put here, never by code in a decoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from ruvllm_core.errors import ModelError

RopeKind = Literal["none", "linear", "llama3", "yarn", "longrope"]
Activation = Literal["silu", "gelu_tanh", "gelu"]

#: Far above any real model; keeps a damaged file from asking for billions of tensor names.
MAX_LAYERS = 4096


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed to reach longer contexts.

    Attributes:
        kind: ``none``; ``linear`` (position interpolation, arXiv 2306.15595); ``llama3`` (Llama 3.1's by-parts rule);
            ``yarn`` (arXiv 2309.00071); ``longrope`` (arXiv 2402.13753).
        factor: context extension factor.
        original_context: context the model was first trained with.
        low_freq_factor, high_freq_factor: the band limits of ``llama3``.
        beta_fast, beta_slow: the band limits of ``yarn``.
        attention_factor: multiplies cos and sin; None lets the rule of `kind` decide.
        freq_factors: divisors of each of the ``rope_dim / 2`` frequencies, already worked out by whoever wrote the
            file (GGUF's ``rope_freqs.weight``); they replace the rule of ``llama3``.
        short_factors, long_factors: ``longrope`` divisors for sequences up to `original_context`, and beyond.
    """

    kind: RopeKind = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    freq_factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        def check(holds: bool, problem: str) -> None:
            if not holds:
                raise ModelError(f"rope scaling: {problem}")

        context, low, high = self.original_context, self.low_freq_factor, self.high_freq_factor
        check(self.factor > 0, f"factor is {self.factor}, but must be positive")
        original = self.kind in ("llama3", "yarn", "longrope")
        check(not original or context >= 2, f"original context is {context}, {self.kind} needs a real one")
        check(self.kind != "llama3" or high > low, f"high_freq_factor {high} must exceed low_freq_factor {low}")


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer with rotary positions, RMSNorm and a gated feed-forward.

    Attributes:
        architecture: name under which its family is registered, as in ``llama``.
        head_dim: width of one head (D); not always ``hidden_size / num_heads``.
        rope_dim: leading dimensions of a head that are rotated; even, at most `head_dim`.
        rope_interleaved: rotate pairs ``(2i, 2i+1)`` instead of ``(i, i + rope_dim/2)``. GGUF stores the query and key
            rows of Llama-like models in that order; low-rank deltas for those rows are in the same order.
        max_context: positions the model was made for.
        sliding_window: a query sees this many last positions, itself included; None sees all.
        sliding_layers: which layers use `sliding_window`; empty means every layer.
        attention_scale: multiplies ``q·k``; None is ``head_dim ** -0.5``.
        attention_softcap, logit_softcap: ``c * tanh(x / c)`` on scores and logits, None for no cap.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_context: int
    rope_theta: float = 10000.0
    rope_dim: int = 0
    rope_interleaved: bool = False
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    activation: Activation = "silu"
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        if not self.rope_dim:
            object.__setattr__(self, "rope_dim", self.head_dim)
        for name in (one.name for one in fields(self) if one.type == "int"):  # every integer is a count
            self._check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but must be positive")
        layers, heads, kv_heads, half = self.num_layers, self.num_heads, self.num_kv_heads, self.rope_dim // 2
        rotates = self.rope_dim % 2 == 0 and self.rope_dim <= self.head_dim
        window, pattern = self.sliding_window, len(self.sliding_layers)
        self._check(layers <= MAX_LAYERS, f"{layers} layers are more than any model has")
        self._check(heads % kv_heads == 0, f"{heads} query heads cannot share {kv_heads} key/value heads")
        self._check(rotates, f"rope_dim {self.rope_dim} must be even and at most {self.head_dim}")
        self._check(self.rope_theta > 1.0, f"rope_theta is {self.rope_theta}, but must exceed 1")
        self._check(0.0 < self.norm_eps < 1.0, f"norm_eps is {self.norm_eps}, expected a small positive number")
        self._check(window is None or window > 0, f"sliding_window is {window}, but must be positive")
        self._check(pattern in (0, layers), f"sliding_layers names {pattern} layers, not all")
        for name in ("freq_factors", "short_factors", "long_factors"):
            count = len(getattr(self.rope_scaling, name))
            self._check(count in (0, half), f"rope {name} has {count} entries, rope_dim needs {half}")

    def _check(self, holds: bool, problem: str) -> None:
        if not holds:
            raise ModelError(f"{self.architecture}: {problem}")

    @property
    def scale(self) -> float:
        return self.attention_scale if self.attention_scale is not None else float(self.head_dim) ** -0.5

    @property
    def parameters(self) -> int:
        """Number of weights, norms and biases included, tied embeddings counted once."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = 2 * hidden * (q + kv) + 3 * hidden * inner + 2 * hidden
        layer += self.qkv_bias * (q + 2 * kv) + self.attention_out_bias * hidden + self.mlp_bias * (2 * inner + hidden)
        return self.num_layers * layer + self.vocab_size * hidden * (1 if self.tied_embeddings else 2) + hidden

    def window_of(self, layer: int) -> int | None:
        """The sliding window of `layer`, or None."""
        if self.sliding_window is None or (self.sliding_layers and not self.sliding_layers[layer]):
            return None
        return self.sliding_window

    def rope_variant(self, capacity: int) -> int:
        """Which table of rotary frequencies a sequence of up to `capacity` tokens uses: 0, or 1 for long ``longrope``.

        It is fixed when a sequence opens, so that all its keys are rotated alike.
        """
        scaling = self.rope_scaling
        return int(scaling.kind == "longrope" and capacity > scaling.original_context)


@dataclass(frozen=True)
class TensorSource:
    """Where a canonical tensor is found in a file.

    Attributes:
        hf: name in a Hugging Face checkpoint.
        gguf: name in a GGUF file.
        shape: expected row-major shape.
        hf_rows, gguf_rows: the rows ``[start, stop)`` to take where the file fuses several tensors into one.
    """

    hf: str
    gguf: str
    shape: tuple[int, ...]
    hf_rows: tuple[int, int] | None = None
    gguf_rows: tuple[int, int] | None = None


def llama_tensor_names(spec: ModelSpec) -> dict[str, TensorSource]:
    """Canonical names of a Llama-like model, with their names in Hugging Face and GGUF files.

    Canonical: ``embed``, ``final_norm``, ``lm_head`` (absent when tied) and, per layer N, ``layers.N.`` followed by
    ``attn_norm``, ``attn.{q,k,v,o}``, ``mlp_norm``, ``mlp.{gate,up,down}``; a bias is its weight's name + ``.bias``.
    Low-rank adapters use the same names for their sites.
    """
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    names = {
        "embed": TensorSource("model.embed_tokens.weight", "token_embd.weight", (spec.vocab_size, hidden)),
        "final_norm": TensorSource("model.norm.weight", "output_norm.weight", (hidden,)),
    }
    if not spec.tied_embeddings:
        names["lm_head"] = TensorSource("lm_head.weight", "output.weight", (spec.vocab_size, hidden))
    sites = {
        "attn_norm": ("input_layernorm", "attn_norm", (hidden,), False),
        "mlp_norm": ("post_attention_layernorm", "ffn_norm", (hidden,), False),
        "attn.q": ("self_attn.q_proj", "attn_q", (q, hidden), spec.qkv_bias),
        "attn.k": ("self_attn.k_proj", "attn_k", (kv, hidden), spec.qkv_bias),
        "attn.v": ("self_attn.v_proj", "attn_v", (kv, hidden), spec.qkv_bias),
        "attn.o": ("self_attn.o_proj", "attn_output", (hidden, q), spec.attention_out_bias),
        "mlp.gate": ("mlp.gate_proj", "ffn_gate", (inner, hidden), spec.mlp_bias),
        "mlp.up": ("mlp.up_proj", "ffn_up", (inner, hidden), spec.mlp_bias),
        "mlp.down": ("mlp.down_proj", "ffn_down", (hidden, inner), spec.mlp_bias),
    }
    for n in range(spec.num_layers):
        hf, gguf, ours = f"model.layers.{n}.", f"blk.{n}.", f"layers.{n}."
        for site, (hf_site, gguf_site, shape, bias) in sites.items():
            names[ours + site] = TensorSource(f"{hf}{hf_site}.weight", f"{gguf}{gguf_site}.weight", shape)
            if bias:
                names[f"{ours}{site}.bias"] = TensorSource(f"{hf}{hf_site}.bias", f"{gguf}{gguf_site}.bias", shape[:1])
    return names
