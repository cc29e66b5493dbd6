"""What one user teaches changes nothing for another. `python per_user_adapters.py`"""

from ruvllm_core import Engine, GenerateParams, Generation

QUESTION = "How do I make good coffee?"


def ask(engine: Engine, user: str) -> Generation:
    """The same question with the same luck: answers differ only if the models do."""
    return engine.generate(QUESTION, GenerateParams(max_tokens=32, temperature=0.8, seed=7, user=user))


with Engine.load("smollm2") as engine:
    for_ann, for_ben = ask(engine, "ann"), ask(engine, "ben")
    print("at first both hear the same:", for_ann.text == for_ben.text)

    for _ in range(8):  # Ann says no until she hears something else
        result = engine.feedback(ask(engine, "ann").request_id, quality=0.0)["sona"]
        now = ask(engine, "ann").text
        print(f"Ann's verdict is {result.status}, her adapter is {result.version}, {now == for_ann.text=}")
        if now != for_ann.text:
            break

    print("Ben hears what he heard before:", ask(engine, "ben").text == for_ben.text)
