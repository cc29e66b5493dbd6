"""`Pooler`: the state a prompt is routed by, from token embeddings alone, so that it is known before any layer runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ruvllm_core.errors import LearningError, TemplateError
from ruvllm_core.model.chat_template import ChatTemplate
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.protocols import FloatArray

if TYPE_CHECKING:
    from ruvllm_core.model.tokenizer import Tokenizer

_SMOOTHING = 1e-4  # `a` of smooth inverse frequency
_ZIPF_OFFSET = 100.0  # single bytes and letters come first in a vocabulary and are no more frequent than short words
_SAMPLE = 4096  # rows that stand for the whole embedding
_WORDS = 256  # the latest of a prompt that count: bounds the cost of a long one
_DECAY = 0.5  # of a turn's weight from one to the next: "shorter, please" needs what it is about
_UNKNOWN, _TEXT, _CONTROL = 0, 1, 2


class Pooler:
    """Prompt tokens to a unit vector: a weighted mean of the embeddings of what the user wrote.

    A token weighs a / (a + p), smooth inverse frequency (Arora et al., "A simple but tough-to-beat baseline for
    sentence embeddings", 2017). Its frequency p comes from Zipf's law, because ids of a byte-pair vocabulary are
    ordered by frequency. So the same prompt has the same state for ever: counting tokens of real prompts is no better
    and would move states under the centroids that were made of them. Embeddings lose their mean and first principal
    direction before, as in Mu & Viswanath (arXiv 1702.01417), and then their length.

    Only what the user wrote counts: what follows an opening of a user's turn, up to the next control token. Where a
    prompt has no such opening, because it is raw text or the model has no template, it is all but control tokens.

    Args:
        embed: the embedding, ``[V, C]`` of any scheme; rows are decoded as they are needed.
        tokenizer: tells control tokens and how a user's turn opens; None takes every token for text.
    """

    def __init__(self, embed: QuantTensor, tokenizer: Tokenizer | None = None) -> None:
        if len(embed.shape) != 2:
            raise LearningError(f"prompts are routed by token embeddings, a matrix; this one has shape {embed.shape}")
        self._embed, self._tokenizer = embed, tokenizer
        vocab = embed.shape[0]
        frequency = 1.0 / (np.arange(vocab) + _ZIPF_OFFSET)
        frequency /= frequency.sum()
        self._weights = (_SMOOTHING / (_SMOOTHING + frequency)).astype(np.float32)
        self._kinds = np.full(vocab, _TEXT if tokenizer is None else _UNKNOWN, np.uint8)
        sample = np.unique(np.linspace(0, vocab - 1, min(vocab, _SAMPLE)).astype(np.int64))
        rows, shares = self._rows(sample), (self._weights * frequency)[sample]
        self._mean = np.asarray(shares @ rows / shares.sum(), np.float32)
        self._common = _principal(rows - self._mean)
        self._opening = () if tokenizer is None else _opening(tokenizer, lambda ids: self._control(np.asarray(ids)))

    def __call__(self, prompt_ids: Sequence[int]) -> FloatArray:
        """The state, float32 ``[C]`` of norm 1, or all zeros if the user wrote nothing. Raises `LearningError`."""
        ids = np.asarray(prompt_ids, np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self._kinds):
            raise LearningError(f"a prompt has a token beyond the {len(self._kinds)} that the model embeds")
        words, weights = self._words(ids)
        if not len(words):
            return np.zeros(len(self._mean), np.float32)
        weights = weights * self._weights[words]
        rows = self._rows(words) - self._mean
        rows -= np.outer(rows @ self._common, self._common)
        norms = np.sqrt(np.einsum("nc,nc->n", rows, rows))
        total = (weights / np.where(norms > 0, norms, 1)) @ rows
        norm = np.sqrt(total @ total)
        return np.asarray(total / norm if norm > 0 else total, np.float32)

    def _words(self, ids: np.ndarray) -> tuple[np.ndarray, FloatArray]:
        """The latest tokens that the user wrote, and the weight of the turn each is in."""
        control = self._control(ids)
        text = ~control
        borders, size = np.flatnonzero(control), len(self._opening)
        listed = ids.tolist()
        starts = [at for at in borders.tolist() if size and tuple(listed[at : at + size]) == self._opening]
        back = np.zeros(len(ids), np.int64)
        if starts:
            inside = np.zeros(len(ids), bool)
            for turns, start in enumerate(reversed(starts)):
                later = borders[np.searchsorted(borders, start + size) :]
                stop = int(later[0]) if len(later) else len(ids)
                inside[start + size : stop], back[start + size : stop] = True, turns
            text &= inside
        found = np.flatnonzero(text)[-_WORDS:]
        return ids[found], np.power(np.float32(_DECAY), back[found], dtype=np.float32)

    def _control(self, ids: np.ndarray) -> np.ndarray:
        """Which of `ids` are markup; a token is looked up the first time it is seen."""
        kinds = self._kinds[ids]
        if self._tokenizer is not None and not kinds.all():
            for token in np.unique(ids[kinds == _UNKNOWN]).tolist():
                # What is left out of a text although it has bytes is markup; a leading space may be left out, too.
                named = self._tokenizer.token_bytes(token)
                hidden = named not in (b"", b" ") and not self._tokenizer.decode([token])
                self._kinds[token] = _CONTROL if hidden else _TEXT
            kinds = self._kinds[ids]
        return np.asarray(kinds == _CONTROL)

    def _rows(self, ids: np.ndarray) -> FloatArray:
        return QuantTensor(self._embed.scheme, (len(ids), self._embed.columns), self._embed.data[ids]).dequantize()


def _principal(centred: FloatArray) -> FloatArray:
    """The unit direction ``[C]`` in which the rows of `centred` vary most, by power iteration."""
    direction = centred[np.argmax(np.einsum("nc,nc->n", centred, centred))]
    for _ in range(30):
        direction = (centred @ direction) @ centred
        norm = np.linalg.norm(direction)
        if norm == 0.0:  # all rows are alike: nothing to take away
            break
        direction = direction / norm
    return np.asarray(direction, np.float32)


def _opening(tokenizer: Tokenizer, control: Callable[[Sequence[int]], np.ndarray]) -> tuple[int, ...]:
    """The tokens that open a user's turn and nothing else in the model's chat template; empty if there are none.

    Two prompts that differ in the user's word are alike up to it. The opening begins with a control token, and with as
    late a one as leaves it different from how the other turns open.
    """
    if tokenizer.chat_template is None:
        return ()
    ends = tokenizer.bos_id, tokenizer.eos_id
    names = ["" if token is None else tokenizer.decode([token], skip_special=False) for token in ends]
    try:
        template = ChatTemplate(tokenizer.chat_template, bos_token=names[0], eos_token=names[1])
        texts = [template.render([{"role": "user", "content": word}]) for word in ("one", "two")]
    except TemplateError:
        return ()  # a chat fails with it as well, and says why; raw prompts work
    one, two = (tokenizer.encode(text, add_special=False) for text in texts)
    same = next((at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)
    for start in np.flatnonzero(control(one[:same]))[::-1].tolist():
        opening = one[start:same]
        if sum(one[at : at + len(opening)] == opening for at in range(len(one))) == 1:
            return tuple(opening)
    return ()
