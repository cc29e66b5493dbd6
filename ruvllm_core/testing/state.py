"""`CachePolicySuite` and `LearningLoopSuite`: what is kept between tokens, and between requests."""

import pickle
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ruvllm_core.errors import CacheFull, LearningError
from ruvllm_core.generate.request import Trajectory
from ruvllm_core.protocols import CacheContext, FloatArray, KVCachePolicy, LearningContext, LearningLoop
from ruvllm_core.testing import tiny


class CachePolicySuite:
    """Define `make_cache`. `tolerance` is what your storage costs in precision, relative to the largest logit.

    `rounding` is how much of that may depend on what tokens are batched with. Override `feeder` if your storage needs
    another decoder than the eager one.
    """

    tolerance = rounding = 1e-4

    def make_cache(self, context: CacheContext) -> KVCachePolicy:
        raise NotImplementedError

    def feeder(self, flavour: str = "plain") -> tiny.Feeder:
        decoder = tiny.tiny_decoder(tiny.FLAVOURS[flavour])
        return tiny.Feeder(decoder, self.make_cache(tiny.cache_context(decoder)))

    def check(self, feeder: tiny.Feeder, name: str, logits: FloatArray) -> None:
        """`logits` have to be those after the last tokens of a sequence, as a cache of core remembers it."""
        sequence = feeder.running[name]
        seen = sequence.token_ids[: sequence.computed]
        expected = tiny.whole(tiny.tiny_decoder(feeder.decoder.spec), seen, sequence.request.capacity)
        tiny.assert_close(logits, expected[-len(logits) :], self.tolerance, f"{name} after {len(seen)} tokens")

    @pytest.mark.parametrize("flavour", tiny.FLAVOURS)
    def test_ragged(self, flavour: str) -> None:
        feeder = self.feeder(flavour)
        for _ in range(2):  # the second time over what the first has left behind
            for name, logits in feeder.ragged().items():
                self.check(feeder, name, logits)
            stats = feeder.cache.stats()
            assert (stats.sequences, stats.tokens) == (3, sum(map(len, tiny.TEXTS.values())))
            storages = {id(s.storage): s.storage.nbytes for s in feeder.cache.view(list(tiny.TEXTS)).segments}
            assert 0 < stats.used_bytes <= sum(storages.values()) <= stats.allocated_bytes
            for name in tiny.TEXTS:
                feeder.cache.close(name)
            assert (feeder.cache.stats().sequences, feeder.cache.stats().tokens) == (0, 0)

    @pytest.mark.parametrize("kept", [0, 1, 7, 16, 29])
    def test_truncate(self, kept: int) -> None:
        """A draft that was thrown away has never been."""
        feeder, text = self.feeder(), tiny.TEXTS["c"]
        feeder.open("a", tiny.TEXTS["a"])
        feeder.open("c", [*text[:kept], *text[::-1]])
        feeder.feed(a=3, c=kept + 1)
        feeder.feed(a=1, c=9)
        feeder.cache.extend("c", 2)  # and not even computed
        feeder.cache.truncate("c", kept)
        assert feeder.cache.stats().tokens == 4 + kept
        feeder.running["c"].token_ids, feeder.running["c"].computed = text * 2, kept
        for counts in {"a": 4, "c": 1}, {"c": 11}, {"a": 6, "c": 3}:
            for name, logits in feeder.feed(**counts).items():
                self.check(feeder, name, logits)

    def test_drafts(self) -> None:
        """One to three tokens at a time, with up to eight wrong ones after them, are as good as one by one."""
        alone, drafting, text = self.feeder(), self.feeder(), (tiny.TEXTS["c"] * 2)[: tiny.CONTEXT]
        for feeder in (alone, drafting):
            feeder.open("c", text)
            feeder.open("b", tiny.TEXTS["b"] * 2)
        sequence, found = drafting.running["c"], [drafting.feed(c=2)["c"]]
        while room := tiny.CONTEXT - (at := sequence.computed):
            good = min(1 + len(found) % 3, room)
            wrong = min(len(found) * 5 % 9, room - good)
            sequence.token_ids[at + good :] = text[::-1][:wrong]
            found.append(drafting.feed(b=1, c=good + wrong)["c"][:good])
            drafting.cache.truncate("c", at + good)
            sequence.token_ids[at + good :], sequence.computed = text[at + good :], at + good
        expected = np.concatenate([alone.feed(c=1)["c"] for _ in text])
        tiny.assert_close(np.concatenate(found), expected, self.rounding, "with drafts against one by one")

    def test_full(self) -> None:
        """What does not fit is refused, everybody else goes on as before, and who leaves makes room."""
        feeder, text = self.feeder(), (tiny.TEXTS["c"] * 2)[: tiny.CONTEXT]
        with pytest.raises(CacheFull):
            for n in range(100):
                before = feeder.cache.stats()
                feeder.open(f"s{n}", np.roll(text, n).tolist())
                before = feeder.cache.stats()
                feeder.feed(**{f"s{n}": tiny.CONTEXT - 1})
        assert feeder.cache.stats() == before
        inside = [name for name, sequence in feeder.running.items() if sequence.computed]
        for name in feeder.running.keys() - set(inside):  # opened, but refused its tokens
            feeder.cache.close(name)
        for name in inside:
            self.check(feeder, name, feeder.feed(**{name: 1})[name])
            before = feeder.cache.stats()
            with pytest.raises(CacheFull):
                feeder.cache.extend(name, 1)
            assert feeder.cache.stats() == before
        feeder.cache.close(inside[0])
        feeder.open("new", text)
        self.check(feeder, "new", feeder.feed(new=9)["new"])

    def test_prefix(self) -> None:
        """Tokens found in the cache answer like fresh ones, and are found under their own key only."""
        feeder, text = self.feeder(), tiny.TEXTS["c"]
        for name, key in ("first", "mine"), ("second", "mine"), ("third", "theirs"):
            feeder.open(name, text, cache_key=key)
            assert 0 <= feeder.running[name].computed < (len(text) if name == "second" else 1)
            self.check(feeder, name, feeder.feed(**{name: feeder.running[name].pending})[name])
        for n, sequence in enumerate(feeder.running.values()):  # each goes on in its own way
            sequence.token_ids += text[2 * n :][:15]
        for count in (1, 9, 5):
            for name, logits in feeder.feed(first=count, second=count, third=count).items():
                self.check(feeder, name, logits)
        feeder.cache.truncate("second", 13)
        feeder.running["second"].computed = 13
        for name, tokens in ("fourth", [*text[:19], *text[:9]]), ("fifth", feeder.running["first"].token_ids):
            feeder.open(name, tokens, cache_key="mine")
            for other in (name, "second"):
                self.check(feeder, other, feeder.feed(**{other: min(feeder.running[other].pending, 20)})[other])
            feeder.cache.close({"fourth": "first", "fifth": "third"}[name])

    def test_turnover(self) -> None:
        """More prompts, one after the other, than there is room for at a time; some come again."""
        feeder = self.feeder()
        for n in (0, 1, 2, 3, 4, 5, 6, 5, 0, 7, 6, 0):
            feeder.open("s", np.roll(tiny.TEXTS["c"] + tiny.TEXTS["a"][:16], n).tolist(), cache_key="same")
            self.check(feeder, "s", feeder.feed(s=feeder.running["s"].pending)["s"])
            feeder.cache.close("s")


class LearningLoopSuite:
    """Define `make_loop`. Whatever it learns, only the adapters that it gives may change what the model says."""

    def make_loop(self, context: LearningContext) -> LearningLoop:
        raise NotImplementedError

    def test_observes_and_remembers(self, tmp_path: Path) -> None:
        decoder, rng = tiny.tiny_decoder(tiny.tiny_spec()), np.random.default_rng(0)
        weights = tiny.tiny_weights(decoder.spec)
        context = LearningContext(decoder.spec, decoder, "tiny", tmp_path / "learned", weights=weights)
        loop, untouched = self.make_loop(context), tiny.whole(decoder, tiny.TEXTS["c"])
        for n, (name, text) in enumerate(tiny.TEXTS.items()):
            asked = tiny.tiny_request(text[:9], id=name, seed=n)
            version = given.version if (given := loop.adapter(asked)) else None
            hidden = rng.normal(size=(len(text) - 9, 64)).astype(np.float32) if loop.wants_hidden else None
            ids = asked.prompt_ids, tuple(text[9:])
            loop.observe(Trajectory(name, *ids, "text", "length", asked.params, version, hidden=hidden))
            assert loop.feedback(name, n / 2).status in ("applied", "deferred", "refused")  # from 0 to 1
        with pytest.raises(LearningError, match="nobody"):
            loop.feedback("nobody", 0.5)
        ends = time.monotonic() + 10.0  # it may wait for a thread of its own
        while loop.tick(0.05):
            assert time.monotonic() < ends, "there is always more to do"
        restored = self.make_loop(replace(context, state_dir=tmp_path / "restored"))
        restored.load_state_dict(pickle.loads(pickle.dumps(loop.state_dict())))
        np.testing.assert_equal(restored.state_dict(), loop.state_dict())
        mine, theirs, places = loop.adapter(asked), restored.adapter(asked), tiny.tiny_adapter(decoder.spec).sites
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.version == theirs.version
            for site, delta in mine.sites.items():
                np.testing.assert_array_equal(delta.b @ delta.a, theirs.sites[site].b @ theirs.sites[site].a, site)
                assert (delta.b @ delta.a).shape == (places[site].b @ places[site].a).shape, site
        np.testing.assert_array_equal(tiny.whole(decoder, tiny.TEXTS["c"]), untouched)
        loop.close()
        restored.close()
