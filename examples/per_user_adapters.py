"""What one user teaches changes nothing for another. `python per_user_adapters.py`"""

import time

from ruvllm_core import Engine, GenerateParams

QUESTION = "How do I make good coffee?"


def ask(engine: Engine, user: str) -> str:
    """The same question with the same luck: answers differ only if the models do."""
    return engine.generate(QUESTION, GenerateParams(max_tokens=32, temperature=0.8, seed=7, user=user)).text


with Engine.load("smollm2") as engine:
    first = {user: ask(engine, user) for user in ("ann", "ben")}
    print("at first both hear the same:", first["ann"] == first["ben"])

    for seed in range(6):  # Ann likes nothing that she hears
        params = GenerateParams(max_tokens=32, temperature=0.8, seed=seed, user="ann")
        answer = engine.generate(QUESTION, params)
        result = engine.feedback(answer.request_id, quality=0.0)["sona"]
        print(f"Ann's verdict is {result.status}, her adapter is {result.version}")
    time.sleep(3)  # idle: the engine learns through the whole network

    print("Ann hears something else now:", ask(engine, "ann") != first["ann"])
    print("Ben hears what he heard before:", ask(engine, "ben") == first["ben"])
