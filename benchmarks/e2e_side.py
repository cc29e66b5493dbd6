"""One side of a comparison, in a process of its own: it loads a model, and then measures whenever it is told to.

    python benchmarks/e2e_side.py ruvllm|llama-cpp

It is started and spoken to by `sides.py`, one JSON object a line: first the job (``model``, ``threads``, ``prefill``,
``decode``, ``depth``, and what the side alone understands), answered with what was loaded; then ``{"variant": …}`` for
each run, answered with its seconds. In between it waits for its standard input and computes nothing. Whatever libraries
print goes to standard error. Only NumPy and the side's own library have to be installed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[str], "tuple[float, float]"]  # of a variant: seconds for the prompt, seconds for the steps


def ruvllm_side(job: dict[str, Any]) -> tuple[dict[str, Any], Run]:
    """Ours, loaded as every command loads it; the environment's settings count. It has one variant."""
    from ruvllm_cli.bench import Runner, Workload
    from ruvllm_core.generate.load import load_parts
    from ruvllm_core.log import configure_logging
    from ruvllm_core.registry import Registry
    from ruvllm_core.settings import load_settings

    work = Workload(job["prefill"], job["decode"], job["depth"])
    chosen = {name: job[name] for name in ("model", "threads", "kernels")}
    settings = load_settings(max_context=work.capacity, log_level="warning", **chosen)
    configure_logging(settings.log_level)
    parts = load_parts(settings, Registry.discover(settings))
    runner = Runner(parts, work, settings.prefill_chunk)
    about = {name: getattr(parts.info, name) for name in ("architecture", "scheme", "kernels", "device", "load_s")}
    about |= {"path": str(parts.info.path), "kv_bytes": runner.kv_bytes, "variants": [""]}
    return about, lambda variant: runner.run(work.prefill, work.decode)


def llama_cpp_side(job: dict[str, Any]) -> tuple[dict[str, Any], Run]:
    """llama.cpp through ``llama_decode``, fed the same tokens; its variants are flash attention ``on`` and ``off``."""
    try:
        from llama_cpp_peer import LlamaCpp, version
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{sys.executable} has no module {error.name}: name another --peer-python") from None

    prefill, decode, depth = job["prefill"], job["decode"], job["depth"]
    started, found = time.perf_counter(), dict[str, LlamaCpp]()
    for variant in job["flash_attention"]:
        first = next(iter(found.values()), None)
        context = depth + prefill + decode
        found[variant] = LlamaCpp(
            Path(job["model"]), context, job["threads"], flash_attention=variant == "on", weights_of=first
        )
    load_s = time.perf_counter() - started
    vocab_size = next(iter(found.values())).vocab_size
    prompt = np.random.default_rng(0).integers(0, vocab_size, depth + prefill).tolist()

    def run(variant: str, prefill: int = prefill, decode: int = decode) -> tuple[float, float]:
        peer = found[variant]
        begin = time.perf_counter()
        token = int(peer.decode(prompt[depth : depth + prefill]).argmax())
        middle = time.perf_counter()
        for _ in range(decode):
            token = int(peer.decode([token]).argmax())
        end = time.perf_counter()
        peer.truncate(depth)
        return middle - begin, end - middle

    for variant, peer in found.items():
        if depth:
            peer.decode(prompt[:depth])
        run(variant, min(prefill, 32), min(decode, 2))
    return {"version": version(), "load_s": load_s, "variants": list(found)}, run


SIDES = {"ruvllm": ruvllm_side, "llama-cpp": llama_cpp_side}


def peak_bytes() -> int | None:
    """Most memory this process has had in use, mapped files included; None where the system does not say."""
    status = Path("/proc/self/status")
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 2**10 if status.exists() else None


def main(arguments: Sequence[str]) -> int:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(answer: dict[str, Any]) -> None:
        channel.write(json.dumps(answer) + "\n")
        channel.flush()

    try:
        about, run = SIDES[arguments[0]](json.loads(sys.stdin.readline()))
        send(about)
        for line in sys.stdin:
            prefill_s, decode_s = run(json.loads(line)["variant"])
            send({"prefill_s": prefill_s, "decode_s": decode_s, "peak_bytes": peak_bytes()})
    except Exception as error:  # told to whoever asked, who says it to the user
        send({"error": str(error) or type(error).__name__, "kind": type(error).__name__})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
