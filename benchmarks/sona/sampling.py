"""Many answers at once, with many adapters: decoding over the learner's own kind of network, with a cache.

Draws are inverse transforms of uniform numbers given from outside, so that two arms that answer the same prompt are
told apart by what they learned, and as little as possible by luck.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.network import padded
from sona.subject import Subject

Uniforms = npt.NDArray[np.float64]
_LOOK = 8  # steps between looks at whether all answers have ended: each waits for the device


class Shared(AdapterStack):
    """Adapters of M cells over M x `rows` rows of a batch: as many rows after one another have the same one."""

    def __init__(self, stack: AdapterStack, rows: int) -> None:
        super().__init__(stack.sites, stack.scales)
        self.rows = rows

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        if (both := self.sites.get(name)) is None:
            return y
        a, b = both
        found = torch.bmm(torch.bmm(x.reshape(len(a), -1, x.shape[-1]), a.transpose(1, 2)), b.transpose(1, 2))
        return y + self.scales[name] * found.view(y.shape)


class Sampler:
    """Answers batches of one size with one set of adapters, which may be changed in place between two of them.

    Args:
        rows: prompts in a batch.
        room: most tokens of a prompt and its answer.
        temperature: of the whole distribution; nothing is cut off.
        adapters: one for each row (see `AdapterStack`); empty is the base model.
        max_tokens: of an answer; the token that ends it is one of them.
    """

    def __init__(
        self, subject: Subject, rows: int, room: int, adapters: AdapterStack, temperature: float, max_tokens: int
    ) -> None:
        self._subject, self._network, self._adapters = subject, subject.exact, adapters
        self._temperature, self._max_tokens = temperature, max_tokens
        network, spec = self._network, self._network.spec
        shape = (spec.num_layers, 2, rows, spec.num_kv_heads, room, spec.head_dim)
        device = network.device
        self._cache = torch.zeros(shape, device=device)
        self._rows, self._slots = torch.arange(rows, device=device), torch.arange(room, device=device)
        self._token = torch.zeros(rows, dtype=torch.int64, device=device)
        self._position = torch.zeros(rows, dtype=torch.int64, device=device)
        self._uniform = torch.zeros(rows, dtype=torch.float64, device=device)
        network.rope(room)  # its tables must not be made while a graph is recorded
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]], uniforms: Uniforms) -> list[tuple[int, ...]]:
        """One answer for each prompt; `uniforms` is ``[rows, max_tokens]`` in [0, 1)."""
        device, stops = self._network.device, self._subject.tokenizer.eos_ids
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        draws = torch.from_numpy(uniforms).to(device)
        ends = torch.tensor(sorted(stops), device=device)
        hidden = self._prefill(padded(prompts, device))[self._rows, lengths - 1]
        self._uniform.copy_(draws[:, 0])
        self._token.copy_(self._draw(hidden))
        self._position.copy_(lengths)
        found = [self._token.clone()]
        ended = torch.isin(self._token, ends)
        for step in range(1, self._max_tokens):
            if step % _LOOK == 0 and bool(ended.all()):
                break
            self._uniform.copy_(draws[:, step])
            self._step()
            found.append(self._token.clone())
            ended |= torch.isin(self._token, ends)
        answers = torch.stack(found, 1).tolist()
        return [_until(answer, stops) for answer in answers]

    def _prefill(self, tokens: Tensor) -> Tensor:
        network = self._network

        def attend(n: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._cache[n, 0, :, :, : key.shape[2]] = key
            self._cache[n, 1, :, :, : key.shape[2]] = value
            return network.causal(n, query, key, value)

        at = torch.arange(tokens.shape[1], device=network.device)[None]
        x, rope = self._subject.embed[tokens], network.rope(len(self._slots), at)
        for n in range(network.spec.num_layers):
            x = network.layer(n, x, rope, self._adapters, attend)
        return network.norm(x, self._adapters)

    def _step(self) -> None:
        """The next token of every row. On a GPU it is recorded once: a thousand launches become one."""
        if self._network.device.type != "cuda":
            self._advance()
        elif self._graph is not None:
            self._graph.replay()
        else:
            before = self._token.clone(), self._position.clone()
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._advance()
            torch.cuda.current_stream().wait_stream(side)
            self._token.copy_(before[0])
            self._position.copy_(before[1])
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._advance()
            self._graph = graph
            graph.replay()

    def _advance(self) -> None:
        network = self._network
        x, rope = self._subject.embed[self._token][:, None], network.rope(len(self._slots), self._position[:, None])
        for n in range(network.spec.num_layers):
            x = network.layer(n, x, rope, self._adapters, self._attend)
        hidden = network.norm(x, self._adapters)[:, 0]
        self._token.copy_(self._draw(hidden))
        self._position += 1

    def _attend(self, n: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One new token a row against its cache; query heads that share keys are rows of one product."""
        spec, keys, values = self._network.spec, self._cache[n, 0], self._cache[n, 1]
        keys[self._rows, :, self._position] = key[:, :, 0]
        values[self._rows, :, self._position] = value[:, :, 0]
        grouped = query.view(len(query), spec.num_kv_heads, -1, spec.head_dim)
        scores = (grouped @ keys.transpose(-1, -2)) * spec.scale
        if spec.attention_softcap is not None:
            scores = spec.attention_softcap * torch.tanh(scores / spec.attention_softcap)
        distance = self._position[:, None] - self._slots
        seen = distance >= 0
        if (window := spec.window_of(n)) is not None:
            seen &= distance < window
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        return (torch.softmax(scores, -1) @ values).view(query.shape)

    def _draw(self, hidden: Tensor) -> Tensor:
        logits = self._network.logits(hidden) / self._temperature
        mass = torch.softmax(logits, -1).cumsum(-1, dtype=torch.float64)
        wanted = (self._uniform * mass[:, -1])[:, None]
        return torch.searchsorted(mass, wanted, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def _until(answer: list[int], stops: frozenset[int]) -> tuple[int, ...]:
    for n, token in enumerate(answer):
        if token in stops:
            return tuple(answer[: n + 1])
    return tuple(answer)
