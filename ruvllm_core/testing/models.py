"""`ArchitectureSuite` and `QuantizerSuite`: how models are read and written."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ruvllm_core.errors import ModelError, QuantizationError
from ruvllm_core.model.loader import open_model
from ruvllm_core.model.quant import FLOAT_SCHEMES, SCHEMES, QuantTensor
from ruvllm_core.model.spec import ModelSpec, llama_tensor_names
from ruvllm_core.protocols import Architecture, Quantizer, Weights
from ruvllm_core.registry import Registry
from ruvllm_core.testing import tiny

_REQUIRED = {name: name for name in ("hidden_size", "intermediate_size", "vocab_size")}
_REQUIRED |= {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "rms_norm_eps": "norm_eps"}


class ArchitectureSuite:
    """Set `architecture` and `hf_configs`, parsed ``config.json`` of tiny models with every variant of the family.

    `gguf_metadata` is what GGUF files of these models say, as far as there are any. `required` are the fields without
    which a configuration means nothing, and what `ModelSpec` calls them.
    """

    architecture: Architecture
    hf_configs: Sequence[Mapping[str, Any]]
    gguf_metadata: Sequence[Mapping[str, Any]] = ()
    required: Mapping[str, str] = _REQUIRED

    def test_models(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from safetensors.numpy import save_file

        monkeypatch.setattr(Registry, "load_all", lambda *_: {"mine": self.architecture})
        for n, config in enumerate(self.hf_configs):
            spec = self.architecture.spec_from_hf(config)
            for field, name in self.required.items():
                assert getattr(spec, name) == config[field], field
            weights, folder = tiny.tiny_weights(spec), tmp_path / str(n)
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config))
            save_file(self.fuse(spec, weights, "hf"), folder / "model.safetensors")
            model = open_model(folder, Registry())
            for name, tensor in weights.items():
                np.testing.assert_array_equal(model.weights[name].dequantize(), tensor.dequantize(), name)
            specs, files = [model.spec], self.fuse(spec, weights, "gguf")
            for metadata in self.gguf_metadata[n : n + 1]:
                tensors = {name: QuantTensor.from_float(values) for name, values in files.items()}
                specs.append(self.architecture.spec_from_gguf(metadata, tensors.get))
                assert self.fuse(specs[-1], weights, "gguf").keys() == files.keys()
            for spec in specs:
                assert spec.architecture == self.architecture.name
                assert np.isfinite(tiny.whole(tiny.tiny_decoder(spec, weights), [0, 1, 2, 3, 4, 5], 6)).all()

    def test_wrong_fields_are_named(self) -> None:
        for config in self.hf_configs:
            for field in self.required:
                for wrong in ({key: value for key, value in config.items() if key != field}, {**config, field: "x"}):
                    with pytest.raises(ModelError, match=field):
                        self.architecture.spec_from_hf(wrong)

    def fuse(self, spec: ModelSpec, weights: Weights, kind: str) -> dict[str, Any]:
        """The tensors of a file; what shares one has to fit together by its rows without a gap."""
        sources, parts = self.architecture.tensor_names(spec), defaultdict(list)
        assert {n: s.shape for n, s in sources.items()} == {n: s.shape for n, s in llama_tensor_names(spec).items()}
        for name, source in sources.items():
            rows = getattr(source, f"{kind}_rows") or (0, source.shape[0])
            parts[getattr(source, kind)].append((*rows, weights[name].dequantize()))
        for file_name, found in parts.items():
            found.sort(key=lambda part: part[0])
            assert [part[0] for part in found] == [0, *(part[1] for part in found[:-1])], f"rows of {file_name}"
        return {file_name: np.concatenate([part[2] for part in found]) for file_name, found in parts.items()}


class QuantizerSuite:
    """Set `quantizer`; `exact_again` are schemes in which quantizing a decoded tensor gives it back exactly."""

    quantizer: Quantizer
    exact_again: frozenset[str] = FLOAT_SCHEMES

    @pytest.fixture
    def schemes(self) -> set[str]:
        """All that occur in a model whose rows fill every block, and in one whose rows do not."""
        found = set()
        for size in (256, 100):
            for source in llama_tensor_names(tiny.tiny_spec(hidden_size=size, num_layers=9)).values():
                found.add(scheme := self.quantizer.scheme_for(source.gguf, source.shape, 9))
                assert len(source.shape) == 2 or scheme in FLOAT_SCHEMES, f"the vector {source.gguf} in {scheme}"
                SCHEMES[scheme].row_bytes(source.shape[-1])
        return found

    def test_round_trip(self, schemes: set[str]) -> None:
        rng = np.random.default_rng(2)
        normal = rng.normal(size=(6, 1024)) * 10.0 ** np.arange(-2, 4)[:, None]  # rows of very different size
        flat = np.tile([[0.0], [1.0], [-0.37], [6e4]], 512)
        for scheme in sorted(schemes):
            bound = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8}.get(scheme, 2 ** (1.5 - SCHEMES[scheme].bits_per_weight))
            for values in (x.astype(np.float32) for x in (normal, abs(normal), rng.uniform(-1, 1, (6, 1024)), flat)):
                once = self.quantizer.quantize(values, scheme)
                again = self.quantizer.quantize(once.dequantize(), scheme)
                assert (once.scheme, once.shape) == (scheme, values.shape)
                repeated = 0.0 if scheme in self.exact_again else bound
                for got, want, most in (once, values, bound), (again, once.dequantize(), repeated):
                    off = np.linalg.norm(got.dequantize() - want, axis=1)
                    assert (off <= most * np.linalg.norm(want, axis=1)).all(), f"{scheme}: off by {off}"
                alone = [self.quantizer.quantize(row[None], scheme).data for row in values]
                np.testing.assert_array_equal(np.concatenate(alone), once.data, f"{scheme}: rows are not independent")

    def test_what_cannot_be_quantized(self, schemes: set[str]) -> None:
        for scheme in sorted(schemes):
            for bad in (np.nan, np.inf, 1e30, 1e-30):
                values = np.ones((3, 256), dtype=np.float32)
                values[1] = bad
                try:
                    decoded = self.quantizer.quantize(values, scheme, name="weights").dequantize()
                    assert np.isfinite(bad) and np.isfinite(decoded).all(), f"{scheme} of {bad}"
                except QuantizationError as error:
                    assert bad > 1 or np.isnan(bad)
                    assert "weights" in str(error)
