"""The seams: what each kind of plugin has to provide. Nothing here is executed per token.

Letters of array shapes: T tokens of a ragged batch, B sequences, R rows wanted, C hidden size, H and K query and
key/value heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ruvllm_core.decode.batch import Batch
    from ruvllm_core.decode.kv import KVStorage, KVView
    from ruvllm_core.generate.request import Request, TokenEvent, Trajectory
    from ruvllm_core.generate.speculative import Speculator
    from ruvllm_core.model.quant import QuantTensor
    from ruvllm_core.model.spec import ModelSpec, TensorSource
    from ruvllm_core.model.tokenizer import Tokenizer
    from ruvllm_core.settings import CacheConfig

FloatArray = npt.NDArray[np.float32]
Weights = Mapping[str, "QuantTensor"]
TensorLookup = Callable[[str], "QuantTensor | None"]


class Architecture(Protocol):
    """A model family.

    Attributes:
        name: registered name.
        hf_names: ``architectures`` entries of a Hugging Face config that mean this family.
        gguf_names: values of ``general.architecture`` that mean this family.
    """

    name: str
    hf_names: tuple[str, ...]
    gguf_names: tuple[str, ...]

    def spec_from_hf(self, config: Mapping[str, Any]) -> ModelSpec:
        """The spec of a parsed ``config.json``. Raises `ModelError` naming the field that is wrong."""

    def spec_from_gguf(self, metadata: Mapping[str, Any], tensor: TensorLookup) -> ModelSpec:
        """The spec of a GGUF file; `tensor` returns a tensor by its name in the file, or None."""

    def tensor_names(self, spec: ModelSpec) -> Mapping[str, TensorSource]:
        """Canonical names (see `llama_tensor_names`) and where each is found in a file."""


class Quantizer(Protocol):
    """Floats to blocks.

    Attributes:
        name: a scheme (``q4_k``) or a mixed recipe (``q4_k_m``).
        file_type: GGUF's ``general.file_type`` for a file made by it.
    """

    name: str
    file_type: int

    def scheme_for(self, tensor_name: str, shape: tuple[int, ...], num_layers: int) -> str:
        """The scheme of one tensor, by its GGUF name."""

    def quantize(self, values: FloatArray, scheme: str, *, name: str = "") -> QuantTensor:
        """Encode ``[rows, columns]`` floats; `name` is for the error message."""


@dataclass(frozen=True)
class DecoderOptions:
    """How a decoder is to be built.

    Attributes:
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``: arithmetic of unquantized math.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        device_index: which GPU, where `device` does not say.
        threads: CPU threads; 0 follows the machine and its cgroup limits.
        max_context: longest sequence that will be asked for.
        plugin: settings of the provider's own plugin, an instance of its ``Settings`` model, or None if it has none.
    """

    dtype: str = "auto"
    device: str = "auto"
    device_index: int = 0
    threads: int = 0
    max_context: int = 4096
    plugin: Any = None


@runtime_checkable
class Decoder(Protocol):
    """Executes a model. Arrays that cross this seam are NumPy arrays in host memory.

    Attributes:
        spec: the model.
        kv_schemes: schemes its cache storage can have, the one it prefers first, quantized ones (``q8``, ``q4``) last.
    """

    spec: ModelSpec
    kv_schemes: tuple[str, ...]

    def allocate_kv(self, num_blocks: int, block_size: int, scheme: str) -> KVStorage:
        """Zeroed storage for every layer. Raises `OutOfMemoryError`."""

    def forward(self, batch: Batch) -> FloatArray:
        """Run the layers, write new keys and values; hidden states after the last norm, float32 ``[R, C]``.

        Adapter sites inside the layers are applied here, the ``final`` site by `logits`.
        """

    def logits(self, hidden: FloatArray, batch: Batch | None = None) -> FloatArray:
        """Output projection, float32 ``[R, V]``; of `batch`'s rows, if given, with their ``final`` adapter sites.

        What `ruvllm_core.decode.lora.apply_final` makes of them is what adapters mean.
        """

    def close(self) -> None:
        """Free everything; later calls are errors."""


@runtime_checkable
class FusedDecoder(Decoder, Protocol):
    """A decoder that can sample where the logits are, for devices where leaving costs more than the work."""

    def step(self, batch: Batch, requests: Sequence[Request]) -> npt.NDArray[np.int64]:
        """One token for each wanted row, int64 ``[R]``, final-site adapters applied."""


class KernelProvider(Protocol):
    """A device's operations, and optionally a whole-model executor.

    Attributes:
        device: what it runs on, as in ``cpu`` or ``cuda:0``.
    """

    device: str

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        """Operations by the names of `ruvllm_core.decode.ops.Ops`; the torch reference fills in the rest."""

    def decoder(self, spec: ModelSpec, weights: Weights, options: DecoderOptions) -> Decoder | None:
        """A decoder of its own, or None to have the eager decoder run over `ops`."""


@dataclass(frozen=True)
class CacheContext:
    """What a cache policy is built from.

    Attributes:
        max_step: most tokens that one step adds to a sequence; 0 is a whole context.
        options: the plugin's own settings, an instance of its ``Settings`` model, or None if it has none.
    """

    spec: ModelSpec
    decoder: Decoder
    config: CacheConfig
    max_context: int
    max_sequences: int
    max_step: int = 0
    options: Any = None


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds now. `allocated_bytes` is memory reserved, `used_bytes` that of live tokens."""

    sequences: int
    tokens: int
    allocated_bytes: int
    used_bytes: int
    extra: Mapping[str, float] = field(default_factory=dict)


class KVCachePolicy(Protocol):
    """Where keys and values live. A sequence is open, extend, view, commit, …, close."""

    def open(self, sequence: str, token_ids: Sequence[int], capacity: int, key: str = "") -> int:
        """Start a sequence of at most `capacity` tokens.

        Returns how many leading tokens of `token_ids` are cached already; at least one is always left to compute.
        `key` tells apart what must not share a prefix (adapter version, tenant). Raises `CacheFull`.
        """

    def extend(self, sequence: str, count: int) -> None:
        """Make room for the next `count` tokens. Raises `CacheFull`, leaving every sequence as it was."""

    def view(self, sequences: Sequence[str]) -> KVView:
        """What attention sees, with slots for the tokens last made room for."""

    def commit(self, sequence: str, token_ids: Sequence[int] = ()) -> None:
        """The tokens last made room for have been written. If told which they are, others may find them."""

    def truncate(self, sequence: str, length: int) -> None:
        """Forget all but the first `length` tokens."""

    def close(self, sequence: str) -> None:
        """Free a sequence."""

    def stats(self) -> CacheStats:
        """What is held now."""


@dataclass(frozen=True)
class BackendContext:
    """What a backend is built from.

    Attributes:
        cache: builds the cache policy for a number of sequences, since only the backend knows how many it runs.
        options: the plugin's own settings, an instance of its ``Settings`` model, or None if it has none.
        speculator: to be passed on to `run_batch`; None is no speculation.
    """

    spec: ModelSpec
    decoder: Decoder
    cache: Callable[[int], KVCachePolicy]
    prefill_chunk: int
    options: Any = None
    speculator: Speculator | None = None


class Backend(Protocol):
    """How requests are executed. All calls come from one thread."""

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `PromptTooLong` or `CacheFull` for one that can never run."""

    def cancel(self, request_id: str) -> None:
        """Drop a request, running or queued; one that is gone already is ignored."""

    def step(self) -> list[TokenEvent]:
        """Do one unit of work. Nothing queued: an empty list, at once."""

    @property
    def busy(self) -> bool:
        """Whether `step` has work to do."""

    def cache_stats(self) -> CacheStats:
        """What the cache holds now."""

    def close(self) -> None:
        """Drop all requests and free the cache."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """``y += scale * (x Aᵀ) Bᵀ`` with `a` float32 ``[r, in]`` and `b` float32 ``[out, r]`` (LoRA, arXiv 2106.09685)."""

    a: FloatArray
    b: FloatArray
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank deltas at named sites: ``final`` (hidden to hidden, before the output projection) or a weight's name.

    `version` changes whenever the numbers do: caches are keyed by it. `key_sites` is whether keys and values change.
    """

    version: str
    sites: Mapping[str, LowRank]

    @property
    def changes_cache(self) -> bool:
        return any(site != "final" for site in self.sites)


@dataclass(frozen=True, eq=False)
class Draft:
    """Tokens that may come next, and the distributions float32 ``[k, V]`` each was drawn from; None is for certain.

    A proposer that can tell says in `likely` of each token how likely it is right if all before it are, which must not
    depend on what was drawn for itself. Then it is asked for as many as may be, and of them computed what pays.
    """

    tokens: Sequence[int]
    probabilities: FloatArray | None = None
    likely: Sequence[float] | None = None


class Proposer(Protocol):
    """Drafts tokens for speculative decoding. Good drafts make it fast; no draft changes what comes out."""

    def propose(self, request: Request, token_ids: Sequence[int], k: int, hidden: FloatArray) -> Draft:
        """At most `k` tokens to follow `token_ids`, prompt and answer so far, which grow from call to call.

        `hidden` is float32 ``[C]``, the state that the last of them was drawn from, before any adapter. With a request
        that is `repeatable`, drafts are judged as certain ones, whatever they were drawn from.
        """

    def forget(self, request_id: str) -> None:
        """A request has ended; it may be one that `propose` has never seen."""

    def close(self) -> None:
        """Free everything that is the proposer's own."""


@dataclass(frozen=True)
class LearningContext:
    """What a learning loop is built from.

    Attributes:
        state_dir: its own folder, which may not exist yet.
        weights: the model's, by canonical name, for loops that need a gradient.
        tokenizer: the model's; None where texts are never needed.
    """

    spec: ModelSpec
    decoder: Decoder
    model: str
    state_dir: Path
    options: Any = None
    weights: Weights = field(default_factory=dict)
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class FeedbackResult:
    """What became of feedback.

    Attributes:
        status: ``applied`` if the adapter of the next request is another one already; ``deferred`` if that is left to
            idle time; ``refused`` if it will never change anything.
        version: of the adapter that is in force now; empty is the base model.
        reason: why it was not applied at once.
    """

    status: Literal["applied", "deferred", "refused"]
    version: str = ""
    reason: str = ""


class LearningLoop(Protocol):
    """Observes finished requests and adapts. All calls come from the thread that runs the backend.

    Attributes:
        wants_hidden: record hidden states of every request, and what its tokens were drawn from.
    """

    wants_hidden: bool

    def adapter(self, request: Request) -> Adapter | None:
        """The adapter a new request runs with; None is the base model, bit for bit."""

    def observe(self, trajectory: Trajectory) -> None:
        """A request has finished."""

    def feedback(self, request_id: str, quality: float) -> FeedbackResult:
        """The user's verdict in ``[0, 1]``. Raises `LearningError` for a request it does not remember."""

    def tick(self, budget_s: float) -> bool:
        """Idle time, or a little of a busy engine's: work for at most `budget_s` seconds; True if more is waiting."""

    def state_dict(self) -> dict[str, Any]:
        """All that was learned."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def proposer(self) -> Proposer | None:
        """A learned draft for speculation, or None."""

    def close(self) -> None:
        """Put what was learned where it lasts, and free everything."""
