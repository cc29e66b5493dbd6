"""Implementations that are wrong in one point have to fail the conformance suites, in the test that is about it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from ruvllm_core.testing import tiny

KERNELS = """
    from dataclasses import replace
    import torch
    from ruvllm_core.decode.reference import TorchKernels, reference_ops
    from ruvllm_core.testing import KernelSuite

    CPU = reference_ops(torch.device("cpu"), torch.float32)

    class Kernels(TorchKernels):
        def ops(self):
            return {{"{name}": {name}}}

    class TestBroken(KernelSuite):
        def make_provider(self, options):
            return Kernels(options)

    def {name}{body}
"""
BROKEN_KERNELS = {
    "window ignored": (
        "attention",
        "(call): return CPU.attention(replace(call, window=None))",
        "test_model[window in one layer]",
    ),
    "newest segment only": (
        "attention",
        """(call):
        segments = call.view.segments[-1:]
        return CPU.attention(replace(call, view=replace(call.view, segments=segments)))""",
        "test_model[plain]",
    ),
    "softcap ignored": (
        "attention",
        "(call): return CPU.attention(replace(call, softcap=None))",
        "test_model[softcaps and gelu]",
    ),
    "one slot off": (
        "kv_append",
        """(view, layer, key, value):
        CPU.kv_append(replace(view, slots=view.slots[::-1].copy()), layer, key, value)""",
        "test_model[plain]",
    ),
    "halves for pairs": (
        "rope",
        "(x, cos, sin, interleaved): return CPU.rope(x, cos, sin, False)",
        "test_model[interleaved partial rope]",
    ),
    "another gelu": (
        "gated",
        "(x, activation): return CPU.gated(x, activation.split('_')[0])",
        "test_model[softcaps and gelu]",
    ),
    "epsilon forgotten": ("rms_norm", "(x, weight, eps): return CPU.rms_norm(x, weight, 0.1)", "test_model[plain]"),
}
PROVIDER = """
    from dataclasses import replace
    import numpy as np
    import torch
    from ruvllm_core.decode.decoder import EagerDecoder
    from ruvllm_core.decode.reference import TorchKernels, reference_ops
    from ruvllm_core.testing import KernelSuite

    CPU = reference_ops(torch.device("cpu"), torch.float32)

    class Decoder(EagerDecoder):
        def forward(self, batch):
            return super().forward(replace(batch, {changed}))

    class Kernels(TorchKernels):
        def ops(self):
            return {ops}

        def decoder(self, spec, weights, options):
            return Decoder(spec, weights, TorchKernels(options), options)

    class TestBroken(KernelSuite):
        def make_provider(self, options):
            return Kernels(options)
"""
STACKED = "{'prepare': lambda tensors: CPU.prepare(tensors[::-1]), 'linear': CPU.linear, 'embed': CPU.embed}"
BROKEN_PROVIDERS = {
    "adapters ignored": ("adapters=()", "{}", "test_model[plain]"),
    "adapters of the first for all": (
        "adapters=tuple(next((a for a in batch.adapters if a), None) for _ in batch.adapters)",
        "{}",
        "test_model[plain]",
    ),
    "one table of frequencies": ("rope_variants=np.ones_like(batch.rope_variants)", "{}", "test_model[longrope]"),
    "positions from zero": (
        "positions=np.concatenate([np.arange(n) for n in np.diff(batch.cu_q)])",
        "{}",
        "test_model[plain]",
    ),
    "stacked in another order": ("adapters=batch.adapters", STACKED, "test_model[mixed]"),
}
CACHE = """
    from ruvllm_core.decode.contiguous import ContiguousCache
    from ruvllm_core.testing import CachePolicySuite

    class Cache(ContiguousCache):
        {body}

    class TestBroken(CachePolicySuite):
        def make_cache(self, context):
            return Cache(context)
"""
BROKEN_CACHES = {
    "truncate forgotten": ("def truncate(self, sequence, length): pass", "test_truncate[7]"),
    "truncate one short": (
        "def truncate(self, sequence, length): super().truncate(sequence, max(length - 1, 0))",
        "test_truncate[7]",
    ),
    "commit forgotten": (
        "def commit(self, sequence, token_ids=()): self._held[sequence].reserved = 0",
        "test_ragged[plain]",
    ),
    "a token too much taken back, seldom": (
        "def truncate(self, sequence, length): super().truncate(sequence, length - (length == 22))",
        "test_drafts",
    ),
    "a refusal leaves a trace": (
        """def extend(self, sequence, count):
            held = self._held[sequence]
            held.length -= held.length + count > held.capacity
            super().extend(sequence, count)""",
        "test_full",
    ),
    "what others left is found": (
        """def open(self, sequence, token_ids, capacity, key=""):
            super().open(sequence, token_ids, capacity, key)
            self._held[sequence].length = length = 3 * (key == "same")
            return length""",
        "test_turnover",
    ),
    "never freed": ("def close(self, sequence): self._held.pop(sequence)", "test_full"),
    "kept after close": (
        "def close(self, sequence): self._free.append(self._held[sequence].block)",
        "test_ragged[plain]",
    ),
    "full cache not told": (
        """def extend(self, sequence, count):
            held = self._held[sequence]
            held.reserved = min(count, held.capacity - held.length)""",
        "test_full",
    ),
    "stale prefix": (
        """def open(self, sequence, token_ids, capacity, key=""):
            super().open(sequence, token_ids, capacity, key)
            self._held[sequence].length = length = len(self._free) == 2 and sequence == "second"
            return int(length and len(token_ids) // 2)""",
        "test_prefix",
    ),
}
BACKEND = """
    from dataclasses import replace
    from ruvllm_candle_like.backend import CandleBackend
    from ruvllm_core.testing import BackendSuite

    class Backend(CandleBackend):
        {body}

    class TestBroken(BackendSuite):
        def make_backend(self, context):
            return Backend(context)
"""
CHANGED = "def submit(self, request): super().submit(replace(request, {}))"
BROKEN_BACKENDS = {
    "seed ignored": (CHANGED.format("params=request.params.model_copy(update={'seed': None})"), "test_answers[5]"),
    "one seed for all": (CHANGED.format("params=request.params.model_copy(update={'seed': 5})"), "test_answers[5]"),
    "stop ids ignored": (CHANGED.format("stop_ids=frozenset()"), "test_answers[5]"),
    "adapter ignored": (CHANGED.format("adapter=None"), "test_answers[5]"),
    "one token too many": (
        CHANGED.format("params=request.params.model_copy(update={'max_tokens': 1 + request.params.max_tokens})"),
        "test_answers[5]",
    ),
    "cancel ignored": ("def cancel(self, request_id): pass", "test_cancel[5]"),
    "no drafts": (
        "def __init__(self, context): super().__init__(replace(context, speculator=None))",
        "test_drafts_change_no_answer[5-1.0]",
    ),
    "cancel of the queue ignored": (
        "def cancel(self, name): [self._drop(s) for s in list(self._running) if s.request.id == name]",
        "test_cancel[5]",
    ),
    "all down with one": (
        """def step(self):
            events = super().step()
            for event in events:
                if event.error is not None:
                    self.close()
            return events""",
        "test_a_full_cache_hits_nobody_else[5]",
    ),
    "close forgets the cache": (
        """def close(self):
            self._queue.clear()
            self._running.clear()""",
        "test_close[5]",
    ),
}
QUANTIZER = """
    import numpy as np
    from ruvllm_quantizers.recipes import RECIPES
    from ruvllm_core.model.quant import QuantTensor
    from ruvllm_core.testing import QuantizerSuite

    class Quantizer:
        name, file_type = "q8_0", 7
        scheme_for = staticmethod(RECIPES.q8_0.scheme_for)

        def quantize(self, values, scheme, *, name=""):
            if scheme != "q8_0":
                return RECIPES.q8_0.quantize(values, scheme, name=name)
            {body}

    class TestBroken(QuantizerSuite):
        quantizer = Quantizer()
"""
BROKEN_QUANTIZERS = {
    "scale off": ("return RECIPES.q8_0.quantize(values * np.float32(1.02), scheme, name=name)", "test_round_trip"),
    "NaN accepted": (
        "return RECIPES.q8_0.quantize(np.nan_to_num(values), scheme, name=name)",
        "test_what_cannot_be_quantized",
    ),
    "rows mixed up": (
        """tensor = RECIPES.q8_0.quantize(values, scheme, name=name)
            return QuantTensor(scheme, tensor.shape, np.roll(tensor.data, 1, axis=0))""",
        "test_round_trip",
    ),
    "scale of the whole tensor": (
        """size = np.abs(values).max() or np.float32(1)
            return RECIPES.q8_0.quantize(np.rint(values / size * 127) * size / 127, scheme, name=name)""",
        "test_round_trip",
    ),
    "another scheme": ("return RECIPES.q4_0.quantize(values, 'q4_0', name=name)", "test_round_trip"),
}
ARCHITECTURE = """
    from dataclasses import replace
    from ruvllm_candle_like.phi3 import Phi3
    from ruvllm_core.testing import ArchitectureSuite

    class Family(Phi3):
        {body}

    class TestBroken(ArchitectureSuite):
        architecture = Family()
        hf_configs = [{{
            "architectures": ["Phi3ForCausalLM"], "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32,
        }}]
"""
NAMES = """def tensor_names(self, spec):
            names = super().tensor_names(spec)
            {}
            return names"""
BROKEN_FAMILIES = {
    "default for a missing field": (
        "def spec_from_hf(self, config): return super().spec_from_hf({'rms_norm_eps': 1e-5, **config})",
        "test_wrong_fields_are_named",
    ),
    "KeyError for a missing field": (
        "def spec_from_hf(self, config): config['hidden_size']; return super().spec_from_hf(config)",
        "test_wrong_fields_are_named",
    ),
    "another epsilon": (
        "def spec_from_hf(self, config): return replace(super().spec_from_hf(config), norm_eps=1e-6)",
        "test_models",
    ),
    "overlapping rows": (
        NAMES.format("names['layers.0.mlp.up'] = replace(names['layers.0.mlp.up'], hf_rows=(0, 48))"),
        "test_models",
    ),
    "one name twice": (
        NAMES.format("names['final_norm'] = replace(names['final_norm'], hf=names['layers.0.attn_norm'].hf)"),
        "test_models",
    ),
    "transposed": (
        NAMES.format("names['lm_head'] = replace(names['lm_head'], shape=names['lm_head'].shape + (1,))"),
        "test_models",
    ),
    "under another name": (
        "def spec_from_hf(self, config): return replace(super().spec_from_hf(config), architecture='llama')",
        "test_models",
    ),
}
LOOP = """
    from ruvllm_core.errors import LearningError
    from ruvllm_core.protocols import FeedbackResult
    from ruvllm_core.testing import LearningLoopSuite

    class Loop:
        wants_hidden = False

        def __init__(self, context):
            self.context, self.seen = context, {{}}
        def adapter(self, request): return None
        def observe(self, trajectory): self.seen[trajectory.request_id] = None
        def feedback(self, request_id, quality):
            if request_id not in self.seen:
                raise LearningError(f"no request {{request_id}}")
            self.seen[request_id] = quality
            return FeedbackResult("deferred")
        def tick(self, budget_s): return False
        def state_dict(self): return {{"seen": self.seen}}
        def load_state_dict(self, state): self.seen = dict(state["seen"])
        def proposer(self): return None
        def close(self): pass

    class Changed(Loop):
        {body}

    class TestBroken(LearningLoopSuite):
        def make_loop(self, context):
            return Changed(context)
"""
BROKEN_LOOPS = {
    "state forgotten": ("def load_state_dict(self, state): pass", "test_observes_and_remembers"),
    "unknown requests rated": (
        "def feedback(self, request_id, quality): return FeedbackResult('deferred')",
        "test_observes_and_remembers",
    ),
    "never done": ("def tick(self, budget_s): return True", "test_observes_and_remembers"),
    "weights touched": (
        "def tick(self, budget_s): self.context.decoder._final_norm.mul_(1.01)",
        "test_observes_and_remembers",
    ),
}
CASES = [
    *((name, KERNELS.format(name=op, body=body), test) for name, (op, body, test) in BROKEN_KERNELS.items()),
    *((name, PROVIDER.format(changed=body, ops=o), test) for name, (body, o, test) in BROKEN_PROVIDERS.items()),
    *((name, CACHE.format(body=body), test) for name, (body, test) in BROKEN_CACHES.items()),
    *((name, BACKEND.format(body=body), test) for name, (body, test) in BROKEN_BACKENDS.items()),
    *((name, QUANTIZER.format(body=body), test) for name, (body, test) in BROKEN_QUANTIZERS.items()),
    *((name, ARCHITECTURE.format(body=body), test) for name, (body, test) in BROKEN_FAMILIES.items()),
    *((name, LOOP.format(body=body), test) for name, (body, test) in BROKEN_LOOPS.items()),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What became of each case: all of them run in one process of their own."""
    folder = tmp_path_factory.mktemp("broken")
    tests = []
    for n, (_, source, test) in enumerate(CASES):
        (folder / f"test_broken{n}.py").write_text(textwrap.dedent(source))
        tests.append(f"test_broken{n}.py::TestBroken::{test}")
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", ".", "-c", "/dev/null", "--junitxml", "outcomes.xml")
    command = [sys.executable, "-m", "pytest", *options, *tests]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    found = {}
    for case in ElementTree.parse(folder / "outcomes.xml").iter("testcase"):
        failure = case.find("failure")
        found[case.attrib["classname"].split(".")[0]] = "passed" if failure is None else failure.attrib["message"]
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case[0] for case in CASES])
def test_it_is_found(outcomes: dict[str, str], number: int) -> None:
    message = outcomes[f"test_broken{number}"]
    assert message != "passed"
    assert not message.startswith(("NameError", "SyntaxError", "TypeError", "AttributeError", "ImportError")), message


def test_outliers_are_few_rows_and_never_nan() -> None:
    expected = np.ones((20, 3), np.float32)
    for wrong, value, outliers, passes in (
        (0, 9.0, 0.0, True),
        (1, 9.0, 0.0, False),
        (2, 9.0, 0.1, True),
        (3, 9.0, 0.1, False),
        (1, np.nan, 0.1, False),
    ):
        got = expected.copy()
        got[:wrong, 1] = value
        with contextlib.nullcontext() if passes else pytest.raises(AssertionError, match="off by"):
            tiny.assert_close(got, expected, 0.05, "rows", outliers)
