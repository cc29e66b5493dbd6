"""How far to draft: far where drafts are right, not at all where they do not pay, whatever the clock's noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from speculation import Clock, CountingCache, Knowing, TableDecoder, answer

from ruvllm_core.generate.depth import Costs, Depth
from ruvllm_core.generate.request import Request, SpeculationStats
from ruvllm_core.generate.speculative import Speculator
from ruvllm_core.protocols import Draft, FloatArray
from ruvllm_core.testing import tiny

TABLE = np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32)
TOKENS = 1500
PLAIN = 1.0  # seconds of a step without a draft


def cost(tokens: int) -> float:
    """Of a decoder for which a drafted token costs a fifth of a step."""
    return PLAIN + 0.2 * (tokens - 1)


class Telling(Knowing):
    """Says how likely its tokens are, as `says` has it; asked for them it takes time even where it drafts none."""

    says: Callable[[int], float]
    least = 0.0

    def propose(self, request: Request, token_ids: Sequence[int], k: int, hidden: FloatArray) -> Draft:
        draft, done = super().propose(request, token_ids, k, hidden), len(token_ids) - len(request.prompt_ids)
        likely = [self.says(done + n) for n in range(len(draft.tokens))]
        count = int(np.cumprod([p >= self.least for p in likely]).sum())
        return Draft(draft.tokens[:count], None, likely[:count])


def run(
    right: Callable[[int], float],
    cost: Callable[[int], float] = cost,
    seconds: float = 0.0,
    most: int = 8,
    says: Callable[[int], float] | None = None,
    least: float = 0.0,
) -> tuple[list[tuple[float, int]], SpeculationStats]:
    """When each token was there, and the size of the step it came from; drafted tokens take `seconds` each."""
    clock = Clock()
    decoder = TableDecoder(TABLE, clock, cost)
    request = tiny.tiny_request([1], TOKENS + 1, max_tokens=TOKENS, temperature=1.0, top_p=1.0, seed=1)
    tokens = [event.token_id or 0 for event in answer(TableDecoder(TABLE), CountingCache(), request)]
    times: list[tuple[float, int]] = []

    class Watch(CountingCache):
        def commit(self, sequence: str, token_ids: Sequence[int] = ()) -> None:
            before = self.lengths[sequence]
            super().commit(sequence)
            times.append((clock.now, self.lengths[sequence] - before))

    knowing = (Knowing if says is None else Telling)({request.id: tokens}, right, clock, seconds, vocab_size=40)
    if says is not None:
        vars(knowing).update(says=says, least=least)
    events = answer(decoder, Watch(), request, Speculator(knowing, most, clock=clock))
    assert [event.token_id for event in events] == tokens
    assert knowing.forgotten == [request.id]
    stats = events[-1].speculation
    assert stats is not None
    return times, stats


def test_off_where_drafts_are_wrong() -> None:
    times, stats = run(lambda position: 0.0)
    assert times[-1][0] < 1.02 * TOKENS * PLAIN
    wasted = [n for n, (_, size) in enumerate(times) if size > 1]
    assert len(wasted) < 20 + TOKENS / 64
    assert max(size for _, size in times[100:]) <= 3, "a trial is short"
    gaps = np.diff(wasted)
    assert gaps.max() == 65 and sorted(set(gaps[gaps > 1])) == [9, 17, 33, 65], "pauses double, up to 64 steps"
    assert stats.accepted == 0 and stats.tokens_per_step == 1.0
    assert stats.speedup_estimate == pytest.approx(TOKENS * PLAIN / times[-1][0], rel=0.01)


def test_far_where_drafts_are_right() -> None:
    times, stats = run(lambda position: 1.0)
    assert [size for _, size in times[1:5]] == [1, 1, 1, 1], "nothing to compare with yet"
    assert [size for _, size in times[10:-2]] == [9] * len(times[10:-2]), "as far as it may"
    assert stats.accepted == stats.proposed
    assert stats.tokens_per_step > 8.5
    assert stats.speedup_estimate == pytest.approx(9 / cost(9), rel=0.05)
    assert times[-1][0] == pytest.approx(TOKENS * PLAIN / stats.speedup_estimate, rel=0.02)


def test_as_far_as_pays() -> None:
    """With seven of ten tokens right, the best depth is the one that a calculation finds, or beside it."""
    times, _ = run(lambda position: 0.7)
    rates = [sum(0.7**i for i in range(k + 1)) / cost(1 + k) for k in range(9)]
    sizes = [size for _, size in times[40:]]
    assert abs(np.median(sizes) - 1 - int(np.argmax(rates))) <= 1
    assert TOKENS / times[-1][0] > 0.93 * max(rates)


def test_no_drafts_that_take_longer_than_they_save() -> None:
    times, stats = run(lambda position: 1.0, seconds=0.9)
    assert times[-1][0] < 1.01 * TOKENS * PLAIN
    assert stats.proposed < 20
    _, stats = run(lambda position: 1.0, seconds=0.1)
    assert stats.tokens_per_step > 8


def test_no_drafts_where_every_token_costs_a_step() -> None:
    times, stats = run(lambda position: 1.0, lambda tokens: PLAIN * tokens**1.05)
    assert times[-1][0] < 1.02 * TOKENS * PLAIN
    assert stats.proposed < 0.2 * TOKENS, "until it is known what they cost, and a few trials"


def test_what_became_right_is_found() -> None:
    times, _ = run(lambda position: float(position > 700))
    (start,) = [n for n, (at, _) in enumerate(times) if at >= 700 * 1.02][:1]
    assert {size for _, size in times[start + 80 : -2]} == {9}
    times, _ = run(lambda position: float(position < 700))
    late = [(at, size) for at, size in times if at > 700 / 3]
    assert np.mean([size > 1 for _, size in late]) < 0.06


@pytest.mark.parametrize("seed", range(4))
def test_noise_changes_little(seed: int) -> None:
    random = np.random.default_rng(seed)

    def noisy(tokens: int) -> float:
        hiccup = 10.0 if random.random() < 0.01 else 1.0
        return cost(tokens) * hiccup * float(random.lognormal(0.0, 0.1))

    per_token = PLAIN * (1 + 0.01 * 9) * math.exp(0.005)
    times, _ = run(lambda position: 0.0, noisy)
    assert times[-1][0] < 1.06 * TOKENS * per_token
    assert np.mean([size > 1 for _, size in times]) < 0.04
    times, _ = run(lambda position: 1.0, noisy)
    assert TOKENS * per_token / times[-1][0] > 0.8 * 9 / cost(9)


def test_costs_between_and_beyond_measurements() -> None:
    costs = Costs()
    costs.add(1, 2.0)
    np.testing.assert_allclose(costs(np.array([1, 2, 5])), [2.0, 2.3, 3.2])  # an assumption until there is more
    for _ in range(40):
        costs.add(5, 4.0)
    np.testing.assert_allclose(costs(np.array([1, 3, 5, 9])), [2.0, 3.0, 4.0, 6.0], rtol=1e-3)
    costs.add(5, 400.0)  # one hiccup
    assert costs(np.array([5]))[0] < 4.5
    costs.add(9, 600.0)  # and a first measurement
    assert costs(np.array([9]))[0] < 10.5
    for _ in range(60):
        costs.add(9, 20.0)
    assert costs(np.array([9]))[0] == pytest.approx(20.0, rel=0.01)


def test_a_draft_is_cut_where_a_token_more_takes_longer_than_it_is_worth() -> None:
    """Against the definition: seconds a token of every length; and what comes later changes nothing."""
    random, lengths = np.random.default_rng(0), set()
    for _ in range(300):
        likely = random.random(6) ** random.choice([0.2, 0.5, 1.0])
        costs = 1.0 + np.cumsum([0.0, *random.random(6) * 0.4])
        seconds = costs / np.cumsum([1.0, *np.cumprod(likely)])
        expected = next((n for n in range(6) if seconds[n + 1] > seconds[n]), 6)
        assert Depth().cut(likely.tolist(), costs.tolist()) == expected
        if expected < 5:
            assert Depth().cut([*likely[: expected + 1].tolist(), *[1.0] * (5 - expected)], costs.tolist()) == expected
        lengths.add(expected)
    assert lengths == set(range(7))


def test_where_it_is_known_what_is_right_only_that_is_computed() -> None:
    """Runs of six sure tokens and then six hopeless ones: each step is as long as what is sure of it."""

    def chance(position: int) -> float:
        return 0.97 if position // 6 % 2 else 0.03

    times, stats = run(chance, says=chance)
    assert stats.accepted > 0.83 * stats.proposed, "a wrong one takes those after it with it"
    per_cycle = 6 * PLAIN + cost(7) - PLAIN  # six hopeless ones, of which the last comes with the six that are sure
    assert times[-1][0] < 1.1 * TOKENS / 12 * per_cycle
    _, blind = run(chance)
    assert stats.tokens_per_step > 1.3 * blind.tokens_per_step


def test_whoever_promises_too_much_is_believed_less() -> None:
    times, stats = run(lambda position: 0.1, says=lambda position: 0.95)
    assert times[-1][0] < 1.03 * TOKENS * PLAIN
    assert stats.proposed < 100
    times, stats = run(lambda position: 0.9, says=lambda position: 0.3)
    late = [size for _, size in times[100:-2]]
    assert np.median(late) >= 6, "and whoever promises too little, more"


def test_asking_in_vain_is_left_off_for_a_while() -> None:
    times, stats = run(lambda position: 0.0, says=lambda position: 0.1, seconds=0.02, least=0.3)
    assert stats.proposed == 0
    always = TOKENS * (PLAIN + 8 * 0.02)
    assert times[-1][0] - TOKENS * PLAIN < 0.35 * (always - TOKENS * PLAIN)
    assert stats.speedup_estimate is not None and stats.speedup_estimate > 0.93
