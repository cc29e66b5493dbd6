"""Everything from one file, as `ruvllm run --config run.toml` does it. `python config_file_run.py [FILE]`"""

import sys
from pathlib import Path

from ruvllm_core import Engine, load_settings

file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("run.toml")
settings = load_settings(file)

with Engine.load(settings.model, settings=settings) as engine:
    for prompt in settings.run.prompts:
        messages = [{"role": "system", "content": settings.run.system}] if settings.run.system else []
        messages.append({"role": "user", "content": prompt})
        print(f"{prompt}\n  {engine.generate(messages).text}\n")
