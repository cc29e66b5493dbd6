"""The model that learns: its network, on a device, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ruvllm_core.model.hub import resolve
from ruvllm_core.model.loader import open_model
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.model.tokenizer import Tokenizer
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings
from ruvllm_sona.network import Network


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with all weights decoded, and its tokenizer."""

    network: Network
    tokenizer: Tokenizer

    @property
    def spec(self) -> ModelSpec:
        return self.network.spec

    @classmethod
    def load(cls, name: str, device: str, dtype: str) -> Subject:
        """`dtype` is of products with weights: auto, float32 or bfloat16."""
        settings = Settings()
        file = open_model(resolve(name, settings), Registry.discover(settings))
        chosen = None if dtype == "auto" else getattr(torch, dtype)
        network = Network(file.spec, file.weights, device=device, dtype=chosen, resident=True)
        for _ in network.load():
            pass
        return cls(network, file.tokenizer())
