"""Several answers at once from asyncio; the event loop is never blocked. `python async_inference.py`"""

import asyncio

from ruvllm_core import Engine, GenerateParams

PROMPTS = ("Name three colours.", "Name three planets.", "Name three fruits.")


async def answer(engine: Engine, prompt: str) -> str:
    params = GenerateParams(max_tokens=24, temperature=0)
    return "".join([event.text async for event in engine.astream(prompt, params)])


async def main() -> None:
    with Engine.load("smollm2") as engine:
        answers = await asyncio.gather(*(answer(engine, prompt) for prompt in PROMPTS))
    for prompt, text in zip(PROMPTS, answers, strict=True):
        print(f"{prompt}\n  {text}\n")


asyncio.run(main())
