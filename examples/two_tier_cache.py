"""A long context in two caches: all floats, and older tokens in 4 bits. `python two_tier_cache.py`"""

from ruvllm_core import CacheConfig, Engine, GenerateParams, ModelConfig

FACTS = [f"The {ordinal} box holds {10 * n + 7} coins." for n, ordinal in enumerate(("red", "green", "blue"), 1)]
FILLER = "The market opens at nine, closes at five, and on Sundays nobody comes. "
PROMPT = " ".join(FACTS) + " " + FILLER * 60 + "How many coins are in the green box? Repeat the sentence that says so."


def ask(policy: str) -> str:
    """Ask the question with one of the policies, and say what the cache takes meanwhile."""
    config = ModelConfig(max_context=2048, cache=CacheConfig(policy=policy))
    with Engine.load("smollm2", config=config) as engine:
        answer, stats = "", engine.cache_stats()
        for event in engine.stream(PROMPT, GenerateParams(max_tokens=16, temperature=0)):
            answer += event.text
            stats = max(stats, engine.cache_stats(), key=lambda one: one.tokens)
    print(f"{policy}: {stats.tokens} tokens in {stats.used_bytes / 2**20:.1f} MiB")
    print(f"  {answer.strip()}")
    return answer


floats, tiers = ask("contiguous"), ask("two_tier")
same = next((n for n, (a, b) in enumerate(zip(floats, tiers, strict=False)) if a != b), min(len(floats), len(tiers)))
print(f"the answers agree in their first {same} of {len(floats)} characters")
