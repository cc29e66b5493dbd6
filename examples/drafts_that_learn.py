"""Drafts for speculative decoding that learn from the answers given so far. `python drafts_that_learn.py`"""

import time

from ruvllm_core import Engine, GenerateParams, ModelConfig

THINGS = "cat dog fox bee cow hen pig bat cod yak ram doe koi gnu jay rat hare crab seal frog goat lion wolf swan bear"
ASKED_TWICE = "Write one sentence about a whale."


def answer(engine: Engine, prompt: str) -> str:
    """Answer a prompt, and say how many tokens each step of the model brought."""
    found = engine.generate(prompt, GenerateParams(max_tokens=32, temperature=0))
    made = found.speculation
    print(f"{made.proposed} drafted, {made.accepted} right, {made.tokens_per_step:.2f} tokens a step: {prompt}")
    return found.text


with Engine.load("smollm2", config=ModelConfig(speculative="learned")) as engine:
    before = answer(engine, ASKED_TWICE)
    for thing in THINGS.split():
        answer(engine, f"Write one sentence about a {thing}.")
    time.sleep(30)  # idle: 25 answers are enough to train a first draft head, which is used as soon as it is better
    after = answer(engine, ASKED_TWICE)
    print("same answer:", before == after)
