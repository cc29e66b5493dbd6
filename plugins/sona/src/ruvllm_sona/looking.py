"""`AnswerProbe`: the Fisher information of rated answers at every site, and at the final one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import FloatArray
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.consolidate import answer_fisher
from ruvllm_sona.curvature import DirectionProbe
from ruvllm_sona.network import Network, padded
from ruvllm_sona.records import Example

_PIECE = 1 << 19  # logits that are looked at in one slice


class AnswerProbe(DirectionProbe):
    """Sketches directions at the sites of a stack, and sums squares after the last norm, where the preview is.

    Args:
        stack: adapters of one row; their ``grad`` is left alone if they are not trainable.
        columns: of the sketches.
        places: most of an answer that are looked at.
    """

    def __init__(self, stack: AdapterStack, columns: int, places: int) -> None:
        super().__init__(stack, columns)
        self._most, self._seen = places, 0
        self._final: tuple[Tensor, Tensor] | None = None

    def look(self, network: Network, example: Example, random: torch.Generator) -> Iterator[None]:
        """Look at places of one answer, drawn without regard to its verdict.

        Labels of different places are drawn apart, so what one place's gradient has to do with another's is zero in
        the mean, and one way back serves all of them.
        """
        count = min(self._most, len(example.output_ids), max(1, _PIECE // network.spec.vocab_size))
        drawn = torch.randperm(len(example.output_ids), generator=random, device=network.device)[:count]
        places = drawn.sort().values + len(example.prompt_ids) - 1
        text = [*example.prompt_ids, *example.output_ids][: int(places[-1]) + 1]
        yield from answer_fisher(network, self, padded([text], network.device), places[None], random)
        self._seen += count

    def final(self) -> tuple[FloatArray, FloatArray]:
        """``F_ij = u_i v_j`` at the final site, float32, in nats² a place; v adds up to 1.

        Raises `LearningError` if it is zero.
        """
        if self._final is None or not float(self._final[1].sum()) > 0.0:
            raise LearningError("there is no Fisher information after the last norm")
        u, v = self._final
        return (u / self._seen).float().cpu().numpy(), (v / v.sum()).float().cpu().numpy()

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        if name != FINAL_SITE or not y.requires_grad:
            return super().add(name, x, y)
        y, x = super().add(name, x, y), x.detach()

        def back(grad: Tensor) -> None:
            g, s = (one.double().square().flatten(0, -2) for one in (grad, x))
            rows, columns = s.sum(1) @ g, g.sum(1) @ s
            old = self._final
            self._final = (rows, columns) if old is None else (old[0] + rows, old[1] + columns)

        y.register_hook(back)  # type: ignore[no-untyped-call]
        return y
