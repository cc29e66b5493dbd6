"""Stop strings that span pieces of text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ruvllm_core.generate.stopping import StopStrings


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.randoms())
def test_any_cut_gives_the_text_before_the_first_stop(text: str, stops: list[str], random: object) -> None:
    checker, out, place = StopStrings(stops), "", 0
    while place < len(text) and not checker.found:
        step = random.randint(1, 3)  # type: ignore[attr-defined]
        out += checker.push(text[place : place + step])
        place += step
    seen = text[:place]
    places = [seen.find(stop) for stop in stops if stop in seen]
    assert checker.found == bool(places)
    if not places:
        assert out + checker.flush() == seen
    else:
        # One of the stops begins exactly where the text ends, and no stop lies wholly before it.
        assert any(seen.startswith(stop, len(out)) for stop in stops)
        assert seen.startswith(out)
        assert not any(stop in out for stop in stops)


def test_holds_back_only_what_may_be_a_stop() -> None:
    checker = StopStrings(["</end>"])
    assert checker.push("hello <") == "hello "
    assert checker.push("b> and </en") == "<b> and "
    assert checker.push("d> rest") == ""
    assert checker.found
    assert checker.push("more") == ""


def test_nothing_to_stop_at() -> None:
    checker = StopStrings(())
    assert checker.push("as it is") == "as it is"
    assert checker.flush() == ""
