"""Rate answers, and later ones get more like those you liked. `python feedback_in_a_chat.py`"""

import re
import time

from ruvllm_core import Engine, GenerateParams

TOPICS = ("rain", "bread", "owls", "chess", "Rome", "tea")
ASKED_TWICE = "Tell me something about bicycles."


def params(seed: int) -> GenerateParams:
    return GenerateParams(max_tokens=40, temperature=0.8, seed=seed)


with Engine.load("smollm2") as engine:
    before = engine.generate(ASKED_TWICE, params(0)).text

    for seed, topic in enumerate(TOPICS, 1):
        answer = engine.generate(f"Tell me something about {topic}.", params(seed))
        # This user does not want to hear what the model thinks of itself.
        quality = 0.0 if re.search(r"\bI\b", answer.text) else 1.0
        for loop, result in engine.feedback(answer.request_id, quality).items():
            print(f"{topic}: rated {quality:g}, {loop} has {result.status} it. {result.reason}")
        time.sleep(1.5)  # while you read, the engine is idle and learns through the whole network

    time.sleep(10)  # whatever is left to be learned
    after = engine.generate(ASKED_TWICE, params(0)).text
    print(f"\nbefore: {before}\n\nafter: {after}\n\nanother answer: {before != after}")
