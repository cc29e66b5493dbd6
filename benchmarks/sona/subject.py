"""The model that learns: its network, tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ruvllm_core.model.chat_template import ChatTemplate
from ruvllm_core.model.hub import resolve
from ruvllm_core.model.loader import ModelFile, open_model
from ruvllm_core.model.tokenizer import Tokenizer
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings
from ruvllm_sona.network import Network


@dataclass(frozen=True, eq=False)
class Subject:
    """A model as this benchmark uses it.

    Attributes:
        network: gradients flow through it, with all weights decoded; products as the plugin computes them.
        exact: the same in float32, for answers and for measuring.
        embed: input embeddings, float32 ``[V, C]``, on the network's device.
    """

    network: Network
    exact: Network
    embed: Tensor
    tokenizer: Tokenizer
    template: ChatTemplate
    file: ModelFile

    @classmethod
    def load(cls, name: str, device: str, dtype: str = "auto") -> Subject:
        """Raises what the engine raises for a model that is not there."""
        file = open_file(name)
        tokenizer = file.tokenizer()
        marks = (tokenizer.bos_id, tokenizer.eos_id)
        bos, eos = (tokenizer.decode([one], skip_special=False) if one is not None else "" for one in marks)
        if tokenizer.chat_template is None:
            raise SystemExit(f"{name} has no chat template; the tasks are chats")
        network = load_network(file, device, dtype)
        exact = network if network.dtype == torch.float32 else load_network(file, device, "float32")
        embed = torch.from_numpy(file.weights["embed"].dequantize().copy()).to(network.device)
        template = ChatTemplate(tokenizer.chat_template, bos_token=bos, eos_token=eos)
        return cls(network, exact, embed, tokenizer, template, file)

    def chat(self, text: str) -> tuple[int, ...]:
        """The tokens of a chat's first message, up to where the answer begins."""
        rendered = self.template.render([{"role": "user", "content": text}])
        return tuple(self.tokenizer.encode(rendered, add_special=False))

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)


def open_file(name: str) -> ModelFile:
    settings = Settings()
    return open_model(resolve(name, settings), Registry.discover(settings))


def load_network(file: ModelFile, device: str, dtype: str) -> Network:
    """With all weights decoded; ``auto`` leaves the type to the plugin."""
    chosen = None if dtype == "auto" else getattr(torch, dtype)
    network = Network(file.spec, file.weights, device=device, dtype=chosen, resident=True)
    for _ in network.load():
        pass
    return network
