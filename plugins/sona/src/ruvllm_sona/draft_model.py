"""The draft head as PyTorch sees it while it is trained: `Rows`, `Model`. For `ruvllm_sona.draft_train` only."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from ruvllm_core.errors import LearningError
from ruvllm_sona.draft import DraftHead, Embeddings
from ruvllm_sona.draft_start import gram, leading, solve
from ruvllm_sona.draft_store import Answer

if TYPE_CHECKING:
    from ruvllm_sona.draft_train import Checkpoint, IntArray, TrainConfig

_CHUNK = 128
_WARMUP = 0.1  # of all steps, while the learning rate rises


class Rows:
    """What a head sees and what it is to say, N rows; those of an answer follow each other.

    Attributes:
        hidden: float16 ``[N, C]``.
        tokens: distinct tokens ``[U]``; `embedding` float32 ``[U, C]`` are theirs.
        newest, previous: places in `tokens` of the last token and of the one before it, ``[N]``.
        ids, probabilities: the teacher, ``[N, 16]``, as places in the vocabulary; probability 0 for tokens not in it.
        follows: whether the next row is of the same answer, ``[N]``.
    """

    def __init__(self, answers: Sequence[Answer], vocabulary: IntArray, embeddings: Embeddings) -> None:
        def all_rows(parts: list[npt.NDArray[np.float16]]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(parts))

        self.hidden = all_rows([answer.hidden[:-1] for answer in answers])
        self.after = all_rows([answer.hidden[1:] for answer in answers])
        newest = np.concatenate([answer.tokens[1:-1] for answer in answers])
        previous = np.concatenate([answer.tokens[:-2] for answer in answers])
        self.tokens, places = np.unique(np.concatenate([newest, previous]), return_inverse=True)
        self.embedding = torch.from_numpy(embeddings.embed(self.tokens))
        self.newest, self.previous = torch.from_numpy(places.astype(np.int64).reshape(2, -1))
        ids = np.concatenate([answer.ids[1:] for answer in answers])
        known = np.minimum(np.searchsorted(vocabulary, ids), len(vocabulary) - 1)
        inside = vocabulary[known] == ids
        p = np.concatenate([answer.probabilities[1:] for answer in answers]).astype(np.float32)
        self.ids, self.probabilities = torch.from_numpy(known), torch.from_numpy(p * inside)
        self.follows = torch.ones(len(newest), dtype=torch.bool)
        self.follows[np.cumsum([len(answer.hidden) - 1 for answer in answers]) - 1] = False

    def __len__(self) -> int:
        return len(self.hidden)

    def fingerprint(self) -> int:
        """Tells apart other rows."""
        return len(self) * 1_000_003 + int(self.ids.sum()) + int(self.newest.sum())


class Model:
    """Parameters, optimizer, and how far training has come.

    The parameters see normalized inputs: states less their mean by their deviation, embeddings by their deviation.
    `head` undoes that.
    """

    def __init__(self, vocabulary: IntArray, hidden_size: int, config: TrainConfig) -> None:
        self.vocabulary, self.config, self.hidden_size = vocabulary, config, hidden_size
        r, wide, size = config.width, config.width + 2 * config.gates, len(vocabulary)
        self.noise = torch.Generator().manual_seed(config.seed)
        bound = (3 * hidden_size) ** -0.5
        shapes = {"w": (wide, 3 * hidden_size), "c": (wide,), "g": (wide, r), "gc": (wide,), "b": (r, config.gates)}
        shapes |= {"u": (size, r), "d": (size,)}
        self.p = {name: torch.zeros(shape) for name, shape in shapes.items()}
        self.p["w"].uniform_(-bound, bound, generator=self.noise)
        self.mean, self.deviation = torch.zeros(hidden_size), torch.ones(hidden_size)
        self.scale = torch.ones(1)
        self.optimizer = self._make_optimizer()
        self.epoch, self.steps, self.stale, self.loss = 0, 0, 0, 0.0
        self.best_score = -1.0
        self.best: dict[str, torch.Tensor] = {}

    def _make_optimizer(self) -> torch.optim.AdamW:
        for values in self.p.values():
            values.requires_grad_(True)
        matrices = [values for values in self.p.values() if values.ndim == 2]
        vectors = [values for values in self.p.values() if values.ndim == 1]
        groups = [{"params": matrices, "weight_decay": self.config.decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.config.rate)

    @torch.no_grad()
    def start(self, rows: Rows, embeddings: Embeddings) -> Generator[None, None, None]:
        """Begin at the linear guess of the next state (see `draft_start`), in slices."""
        r, hidden, chunks = self.config.width, self.hidden_size, range(0, len(rows), _CHUNK)
        states = rows.hidden[:: max(len(rows) // 4096, 1)].float()
        self.mean, self.deviation = states.mean(0), states.std(0) + 1e-3
        self.scale = rows.embedding[:4096].std().reshape(1) + 1e-6
        yield
        # The space in which a next state shows in the logits: leading directions of E L, where L Lᵀ is its covariance.
        second = torch.zeros(hidden, hidden)
        for j in chunks:
            part = rows.after[j : j + _CHUNK].float()
            second.addmm_(part.T, part, alpha=1 / len(rows))
            yield
        root = torch.linalg.cholesky(second + 1e-3 * second.trace() / hidden * torch.eye(hidden))
        yield
        output, said = torch.from_numpy(embeddings.output(self.vocabulary)), torch.zeros(len(self.vocabulary))
        said.index_add_(0, rows.ids.flatten(), rows.probabilities.flatten())
        yield
        spread = torch.zeros(hidden, hidden)
        for j in range(0, len(output), _CHUNK):
            part = (output[j : j + _CHUNK] @ root) * (said[j : j + _CHUNK, None] + 1).sqrt()
            spread.addmm_(part.T, part)
            yield
        basis = yield from leading(spread, r, self.config.seed)
        lift = root @ basis  # from s to a state
        project = torch.linalg.solve_triangular(root.T, basis, upper=True)  # from a state to s, as rows times this
        yield
        self.p["u"].copy_(output @ lift)
        yield

        def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for j in chunks:
                x = self._inputs(rows, torch.arange(j, min(j + _CHUNK, len(rows))))
                yield torch.cat([x, torch.ones(len(x), 1)], 1), rows.after[j : j + _CHUNK].float() @ project

        square, product = yield from gram(pairs())
        square.diagonal().add_(self.config.ridge)
        weights = yield from solve(square, product)
        self.p["w"][:r].copy_(weights[:-1].T)
        self.p["c"][:r].copy_(weights[-1])
        of_state = self.p["w"][:, :hidden] / self.deviation
        self.p["g"].copy_(of_state @ lift)
        self.p["gc"].copy_(self.p["c"] - of_state @ self.mean)
        yield

    def fit(self, rows: Rows) -> Iterator[float]:
        """One pass over `rows`; yields the mean loss so far."""
        config, count = self.config, len(rows) // self.config.batch or 1
        self.noise.manual_seed(config.seed + 7919 * (self.epoch + 1))  # so that an interrupted training goes on alike
        order, total = torch.randperm(len(rows), generator=self.noise), 0.0
        for step in range(count):
            batch = order[step * config.batch : (step + 1) * config.batch]
            for begin in range(0, len(batch), config.half):
                half = batch[begin : begin + config.half]
                loss = self._loss(rows, half) * (len(half) / len(batch))
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.item()
                yield total / (step + 1)
            self._set_rate(self.steps / (count * config.epochs))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)
            self.steps += 1
            yield total / (step + 1)
        self.epoch, self.loss = self.epoch + 1, total / count

    @torch.no_grad()
    def score(self, rows: Rows) -> Generator[None, None, float]:
        """Right tokens to expect of a draft of two."""
        first = second = 0.0
        for j in range(0, len(rows), self.config.half):
            index = torch.arange(j, min(j + self.config.half, len(rows)))
            s = self._combine(self._inputs(rows, index) @ self.p["w"].T + self.p["c"])
            right = self._right(s, rows, index)
            first += float(right.sum())
            ahead, pairs = self._again(s, rows, index)
            second += float((right[ahead] * self._right(pairs, rows, index[ahead] + 1)).sum())
            yield
        return (first + second) / max(len(rows), 1)

    def remember(self, score: float) -> None:
        """Keep these parameters if they are the best so far."""
        if score > self.best_score:
            self.best_score, self.stale = score, 0
            self.best = {name: values.detach().clone() for name, values in self.p.items()}
        else:
            self.stale += 1

    @torch.no_grad()
    def head(self, rows: Rows, embeddings: Embeddings) -> Generator[None, None, DraftHead]:
        """The best parameters so far, for inputs as they are, without n-grams. In slices."""
        p, c = self.best, self.hidden_size
        state = p["w"][:, :c] / self.deviation
        heard = torch.from_numpy(~np.isin(rows.tokens, self.vocabulary)).float()
        count = heard * torch.bincount(torch.cat([rows.newest, rows.previous]), minlength=len(heard))
        others = (count @ rows.embedding) / count.sum().clamp(min=1)
        read = torch.cat([torch.from_numpy(embeddings.embed(self.vocabulary)), others[None]]) / self.scale
        yield
        tables = []
        for columns in (slice(c, 2 * c), slice(2 * c, None)):
            parts = []
            for j in range(0, len(read), _CHUNK):
                parts.append(read[j : j + _CHUNK] @ p["w"][:, columns].T)
                yield
            tables.append(torch.cat(parts).numpy().astype(np.float16))

        def plain(values: torch.Tensor) -> npt.NDArray[np.float32]:
            return np.ascontiguousarray(values.numpy(), dtype=np.float32)

        return DraftHead(
            vocabulary=np.ascontiguousarray(self.vocabulary, dtype=np.int64),
            state=plain(state),
            bias=plain(p["c"] - state @ self.mean),
            newest=tables[0],
            previous=tables[1],
            again=plain(p["g"]),
            again_bias=plain(p["gc"]),
            mix=plain(p["b"]),
            output=plain(p["u"]),
            output_bias=plain(p["d"]),
        )

    def checkpoint(self, rows: Rows) -> Checkpoint:
        """Copies of everything, as arrays."""
        numbers = [self.epoch, self.steps, self.stale, rows.fingerprint(), self.config.width, self.config.gates]
        found: dict[str, Any] = {"numbers": numbers, "floats": [self.loss, self.best_score]}
        found |= {"mean": self.mean, "deviation": self.deviation, "scale": self.scale, "vocabulary": self.vocabulary}
        for name, values in self.p.items():
            state = self.optimizer.state[values]
            found |= {f"p.{name}": values, f"m.{name}": state["exp_avg"], f"v.{name}": state["exp_avg_sq"]}
            found[f"best.{name}"] = self.best[name]
        plain = {n: x.detach().numpy() if isinstance(x, torch.Tensor) else x for n, x in found.items()}
        return {name: np.array(value) for name, value in plain.items()}

    @torch.no_grad()
    def restore(self, saved: Checkpoint, rows: Rows) -> None:
        """Go on from what `checkpoint` returned. Raises `LearningError` for one of other answers or sizes."""
        numbers = [int(number) for number in saved["numbers"]]
        same = numbers[3:] == [rows.fingerprint(), self.config.width, self.config.gates]
        if not same or not np.array_equal(saved["vocabulary"], self.vocabulary):
            raise LearningError("this checkpoint is of other answers or sizes", hint="train from the start")
        self.epoch, self.steps, self.stale = numbers[:3]
        self.loss, self.best_score = (float(number) for number in saved["floats"])
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in saved.items()}
        self.mean, self.deviation, self.scale = (tensors[name] for name in ("mean", "deviation", "scale"))
        for name, values in self.p.items():
            values.copy_(tensors[f"p.{name}"])
            self.best[name] = tensors[f"best.{name}"]
            moments = {"exp_avg": tensors[f"m.{name}"], "exp_avg_sq": tensors[f"v.{name}"]}
            self.optimizer.state[values] = {"step": torch.tensor(float(self.steps)), **moments}

    def _inputs(self, rows: Rows, index: torch.Tensor) -> torch.Tensor:
        hidden = (rows.hidden[index].float() - self.mean) / self.deviation
        return torch.cat([hidden, self._words(rows, index)], 1)

    def _words(self, rows: Rows, index: torch.Tensor) -> torch.Tensor:
        newest, previous = rows.embedding[rows.newest[index]], rows.embedding[rows.previous[index]]
        return torch.cat([newest, previous], 1) / self.scale

    def _combine(self, a: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        r, m = self.config.width, self.config.gates
        z = a[:, r : r + m] * functional.silu(a[:, r + m :])
        if dropout:
            z = z * (torch.rand(z.shape, generator=self.noise) >= dropout) / (1.0 - dropout)
        return a[:, :r] + z @ self.p["b"].T

    def _again(
        self, s: torch.Tensor, rows: Rows, index: torch.Tensor, dropout: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the rows have a next one, and s for the token after the one drafted there."""
        ahead = rows.follows[index].nonzero()[:, 0]
        words = self._words(rows, index[ahead] + 1) @ self.p["w"][:, self.hidden_size :].T
        return ahead, self._combine(s[ahead] @ self.p["g"].T + self.p["gc"] + words, dropout)

    def _logits(self, s: torch.Tensor) -> torch.Tensor:
        return s @ self.p["u"].T + self.p["d"]

    def _right(self, s: torch.Tensor, rows: Rows, index: torch.Tensor) -> torch.Tensor:
        """The teacher's probability of the likeliest token."""
        likeliest = self._logits(s).argmax(1, keepdim=True)
        return (rows.probabilities[index] * (rows.ids[index] == likeliest)).sum(1)

    def _loss(self, rows: Rows, index: torch.Tensor) -> torch.Tensor:
        s = self._combine(self._inputs(rows, index) @ self.p["w"].T + self.p["c"], self.config.dropout)
        ahead, later = self._again(s, rows, index, self.config.dropout)
        loss = self._cross_entropy(s, rows, index).mean()
        if len(ahead):
            loss = loss + self.config.second * self._cross_entropy(later, rows, index[ahead] + 1).mean()
        return loss

    def _cross_entropy(self, s: torch.Tensor, rows: Rows, index: torch.Tensor) -> torch.Tensor:
        logits, p = self._logits(s), rows.probabilities[index]
        return p.sum(1) * logits.logsumexp(1) - (p * logits.gather(1, rows.ids[index])).sum(1)

    def _set_rate(self, done: float) -> None:
        rise = min(done / _WARMUP, 1.0)
        fall = 0.5 + 0.5 * math.cos(math.pi * max(done - _WARMUP, 0.0) / (1.0 - _WARMUP))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate * max(rise * fall, 1e-3)
