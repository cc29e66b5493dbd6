"""`Holding`: what one brain must not forget, EWC++ in the background loop.

After so many learned answers the adapters are noted as an anchor, with sketches of the Fisher information of the latest
rated answers' places (see `curvature`), as a moving average (RWalk: Chaudhry et al., arXiv 1801.10112). Labels are
drawn from the model itself, and verdicts weigh nothing: what matters is what the model says there now, not how good it
was. From then on every step of learning ends with a proximal step towards the anchor. PyTorch is imported by whoever
consolidates or loads, and not before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import FloatArray, LowRank
from ruvllm_sona.ewc import Anchor, Fisher
from ruvllm_sona.files import load_tensors, refused, save_tensors
from ruvllm_sona.records import Example
from ruvllm_sona.sites import Deltas

if TYPE_CHECKING:
    from ruvllm_sona.adapters import AdapterStack
    from ruvllm_sona.curvature import Hold, Sketch, Sketches
    from ruvllm_sona.network import Network

ANSWERS = 32  # the latest ones whose Fisher information is taken
_PLACES = 8  # of each
_COLUMNS = 32  # of the sketches: 41 MB for SmolLM2-135M, see docs/learning.md for what fewer would save and cost
_HORIZON = 5  # consolidations: their plain mean, and then a moving average of so long a memory
_AT_ONCE, _AVERAGED = 28, 7  # sites that are held, and averaged, in one slice
_KIND = "holding 2"
#: Has work done by a thread that may wait for the disk; yields until it is done, and returns what it returned.
Elsewhere = Callable[[Callable[[], Any]], Generator[object, None, Any]]


@dataclass(frozen=True, eq=False)
class Kept:
    """What a file holds.

    Attributes:
        anchor: factors of the learner, on top of what lay below it.
        fisher: sketches, images in numbers that float32 can hold.
        final: u and v of the Fisher information at the final site, for the preview: float32, nats² a token, not
            normalized.
        base: `digest` of what lay below.
        count: consolidations that the average is of; `answers` those of the latest, `time` when it was.
    """

    anchor: Deltas
    fisher: Sketches
    final: tuple[FloatArray, FloatArray]
    base: str
    count: int
    answers: int
    time: float


class Holding:
    """What a brain must not forget, in memory and in a file.

    Args:
        path: of the file. It is 16 float32 numbers for each input and output of a linear layer, twice that in memory.
        every: learned answers from one consolidation to the next.

    Attributes:
        holds: what proximal steps are made with, a part of the sites each; empty as long as nothing is held.
        preview: what the preview is to stay near to; None as long as nothing is held.
        since: answers that were learned since the last consolidation.
        looked: whether the file of an earlier process was read, or there is no more need to.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self._every = path, every
        self.holds: list[Hold] = []
        self.preview: Anchor | None = None
        self.since = 0
        self.looked = False

    @property
    def due(self) -> bool:
        """Whether it is time to consolidate."""
        return self.since >= self._every

    def drop(self) -> None:
        """Hold nothing any more, and delete the file: what it was taken from is to be forgotten."""
        self.holds, self.preview, self.since, self.looked = [], None, 0, True
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise refused("delete", self.path, error) from error

    def ask(self) -> None:
        """Consolidate as soon as there is time, since learning begins again from somewhere else.

        Until then nothing is held; the file stays for the average, and its anchor does not fit what lies below now.
        """
        self.holds, self.preview, self.since, self.looked = [], None, self._every, True

    def load(
        self, shapes: Mapping[str, tuple[int, int]], below: Deltas, elsewhere: Elsewhere
    ) -> Generator[object, None, None]:
        """Hold what the file says, if that is about adapters on top of `below`; yields between slices.

        Raises `LearningError` if the file is damaged or of another model; then nothing is held.
        """
        if self.path.exists():
            try:
                kept, base = yield from elsewhere(lambda: (load(self.path, shapes), digest(below)))
            except LearningError:
                self.looked = True
                raise
            if kept.base == base:
                yield from self._take(kept)
        self.looked = True

    def consolidate(
        self,
        network: Network,
        stack: AdapterStack,
        examples: Sequence[Example],
        below: Deltas,
        elsewhere: Elsewhere,
    ) -> Generator[object, None, Kept]:
        """Hold what `stack` says at places of the answers of `examples`; what is to be saved, once it is held.

        Args:
            stack: a copy of what was learned, with what lies below.
            below: the latter as deltas.

        Raises `LearningError` if there is no Fisher information, and holds what it held.
        """
        import torch

        from ruvllm_sona.curvature import averaged, normalized
        from ruvllm_sona.looking import AnswerProbe

        shapes = {name: (b.shape[1], a.shape[2]) for name, (a, b) in stack.sites.items()}
        before: Kept | None = None
        with contextlib.suppress(LearningError):  # what is wrong with the file was said; this makes it anew
            before = (yield from elsewhere(lambda: load(self.path, shapes))) if self.path.exists() else None
        count = before.count if before is not None else 0
        probe, random = AnswerProbe(stack, _COLUMNS, _PLACES), torch.Generator(network.device).manual_seed(count)
        for example in examples:
            yield from probe.look(network, example, random)
        found: dict[str, tuple[Sketch, Sketch]] = {}
        weight = 1.0 / min(count + 1, _HORIZON)
        for names in _portions(probe.found, _AVERAGED):
            part = normalized(probe.found, names)
            if before is not None:
                part = averaged({name: before.fisher[name] for name in names}, part, weight)
            found |= {name: (u.rounded(), v.rounded()) for name, (u, v) in part.items()}
            yield None
        base = yield from elsewhere(lambda: digest(below))
        kept = Kept(stack.deltas(), found, probe.final(), base, count + 1, len(examples), time.time())
        yield from self._take(kept)
        self.since = 0
        return kept

    def _take(self, kept: Kept) -> Iterator[None]:
        """Hold `kept`, all of it at once, when it has been worked out a part at a time."""
        from ruvllm_sona.adapters import AdapterStack
        from ruvllm_sona.curvature import Hold

        anchor, holds = AdapterStack.of([kept.anchor]), []
        for names in _portions(kept.fisher, _AT_ONCE):
            holds.append(Hold(anchor, {name: kept.fisher[name] for name in names}))
            yield
        self.holds, self.preview, self.looked = holds, resting(*kept.final), True


def resting(u: FloatArray, v: FloatArray) -> Anchor:
    """A preview of nothing as the anchor, with the Fisher information ``u_i v_j`` at the final site."""
    nothing = LowRank(np.zeros((1, len(v)), np.float32), np.zeros((len(u), 1), np.float32))
    return Anchor({FINAL_SITE: nothing}, Fisher({FINAL_SITE: (u.astype(np.float64), v.astype(np.float64))}))


def save(path: Path, kept: Kept) -> None:
    """Write what is held, whole or not at all. Raises `LearningError` if the file system refuses."""
    arrays: dict[str, Any] = {"final.u": kept.final[0], "final.v": kept.final[1]}
    for name, both in kept.fisher.items():
        arrays[f"{name}.a"], arrays[f"{name}.b"] = kept.anchor[name].a, kept.anchor[name].b
        for letter, sketch in zip("uv", both, strict=True):
            arrays[f"{name}.{letter}"] = sketch.image[0].float().cpu().numpy()
        arrays[f"{name}.traces"] = np.array([float(sketch.trace[0]) for sketch in both])
    facts = {"base": kept.base, "count": kept.count, "answers": kept.answers, "time": kept.time}
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise refused("make", path.parent, error) from error
    save_tensors(path, arrays, {"kind": _KIND, "facts": json.dumps(facts)})


def load(path: Path, shapes: Mapping[str, tuple[int, int]]) -> Kept:
    """What `save` wrote, to the last bit. Raises `LearningError` if it is damaged, or not of sites of these shapes."""
    from torch import from_numpy

    from ruvllm_sona.curvature import Sketch

    arrays, metadata = load_tensors(path)
    try:
        if metadata["kind"] != _KIND:
            raise ValueError(f"it is of the kind {metadata['kind']!r}")
        facts, anchor, fisher = json.loads(metadata["facts"]), {}, {}
        if (names := {name[:-2] for name in arrays if name.endswith(".u")} - {FINAL_SITE}) != set(shapes):
            raise ValueError(f"its sites are not those of this model, such as {min(names ^ set(shapes))}")
        for name, (rows, columns) in shapes.items():
            a, b, u, v, traces = (arrays[f"{name}.{letter}"] for letter in ("a", "b", "u", "v", "traces"))
            found = a.shape[1], b.shape[0], v.shape[0], u.shape[0], a.shape[0], *traces.shape
            if found != (columns, rows, columns, rows, b.shape[1], 2) or not all(
                np.isfinite(one).all() for one in (a, b, u, v, traces)
            ):
                raise ValueError(f"what it says of {name} does not fit, or is not finite")
            anchor[name] = LowRank(a, b)
            images = (from_numpy(image)[None].double() for image in (u, v))
            fisher[name] = Sketch(next(images), from_numpy(traces[:1])), Sketch(next(images), from_numpy(traces[1:]))
        final = arrays["final.u"], arrays["final.v"]
        width = next(iter(shapes.values()))[1]  # what goes into the first site is as wide as the hidden states
        if any(one.shape != (width,) or not np.isfinite(one).all() for one in final):
            raise ValueError("what it says of the final site does not fit, or is not finite")
        base, count, answers, when = (facts[name] for name in ("base", "count", "answers", "time"))
        return Kept(anchor, fisher, final, str(base), int(count), int(answers), float(when))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise LearningError(
            f"{path} does not say what must not be forgotten: {error}",
            hint="delete it: the next consolidation makes it anew",
        ) from error


def digest(below: Deltas) -> str:
    """Tells sets of deltas apart; it is the same for equal ones."""
    found = hashlib.blake2b(digest_size=16)
    for site, delta in sorted(below.items()):
        found.update(f"{site} {delta.a.shape}".encode())
        for factor in (delta.a, delta.b * np.float32(delta.scale)):
            found.update(factor.tobytes())
    return found.hexdigest()


def _portions(names: Mapping[str, object], size: int) -> list[list[str]]:
    every = list(names)
    return [every[at : at + size] for at in range(0, len(every), size)]
