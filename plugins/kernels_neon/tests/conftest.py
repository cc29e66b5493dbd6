"""Cross-compiles the kernels and their checks for ARM64, and runs them under qemu. Skips where that cannot be done."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("ruvllm_kernels_cpu") else ["test_*.py"]

HERE = Path(__file__).parent
NEON, CPU, CHECKS = HERE.parent / "native", HERE.parent.parent / "kernels_cpu" / "native", HERE / "native"
#: As in CMakeLists.txt, by name of the source.
FEATURES = {"dotprod": "dotprod", "i8mm": "dotprod+i8mm"}
LEVELS = {f"{what}_{level}": f for level, f in FEATURES.items() for what in ("products", "attention")}
KERNELS = ["neon", "processor", "products_plain", "attention_plain", *LEVELS]
PARTS = ("kernels", "products", "quantize", "elementwise", "moves", "attention")
PROGRAMS = {
    "check_kernels": [CHECKS / f"check_{name}.cpp" for name in PARTS],
    "run_model": [
        CHECKS / "run_model.cpp",
        *(CPU / f"{n}.cpp" for n in ("abi", "adapters", "decoder", "ops", "pool", "memory", "isa")),
    ],
}
COMMON = [*(NEON / f"{name}.cpp" for name in KERNELS), CPU / "kernels_generic.cpp"]
FLAGS = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unused-function", "-fno-math-errno"]
LINK = ["-static", "-pthread"]
#: SANITIZE=1 in the environment: every memory access and undefined operation is checked. With GCC; takes minutes.
SANITIZE = os.environ.get("SANITIZE", "") not in ("", "0")
if SANITIZE:
    LINK = ["-fsanitize=address,undefined", "-pthread"]
    FLAGS += [*LINK, "-fno-sanitize-recover=undefined", "-O1", "-Wno-maybe-uninitialized"]
    os.environ["ASAN_OPTIONS"] = "detect_leaks=0"  # needs to trace the process, which emulation cannot
SYSROOT = "/usr/aarch64-linux-gnu"  # where Debian's cross compiler has its libraries

Run = Callable[..., subprocess.CompletedProcess[str]]


def compiler() -> tuple[list[str], bool] | None:
    """A compiler for ARM64 Linux, and whether it is Zig's; GCC's is preferred."""
    if found := shutil.which("aarch64-linux-gnu-g++"):
        return [found], False
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl"], True
    return None


def _object(source: Path, folder: Path) -> Path:
    command, zig = compiler() or ([], False)
    features = LEVELS.get(source.stem)
    level = [f"-mcpu=generic+{features}" if zig else f"-march=armv8.2-a+{features}"]
    out = folder / f"{source.stem}.o"
    where = [f"-I{folder}" for folder in (CPU, NEON, CHECKS)]
    ran = subprocess.run(
        [*command, *FLAGS, *(level if features else []), *where, "-c", str(source), "-o", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return out


def _build(folder: Path) -> None:
    sources = list(dict.fromkeys([*COMMON, *PROGRAMS["check_kernels"], *PROGRAMS["run_model"]]))
    with ThreadPoolExecutor(2) as pool:
        objects = dict(zip(sources, pool.map(lambda source: _object(source, folder), sources), strict=True))
    command, _ = compiler() or ([], False)
    for program, own in PROGRAMS.items():
        linked = [str(objects[source]) for source in (*own, *COMMON)]
        subprocess.run([*command, *LINK, *linked, "-o", str(folder / program)], check=True)


@pytest.fixture(scope="session")
def arm64(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of `PROGRAMS` on an emulated processor: ``arm64(cpu, program, *arguments)``."""
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if compiler() is None:
        pytest.skip("no compiler for ARM64: install g++-aarch64-linux-gnu or the Python package ziglang")
    if emulator is None:
        pytest.skip("no emulator of ARM64: install qemu-user-static")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share one build
        folder = folder.parent
    folder /= "arm64"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "built").exists():
            _build(folder)
            (folder / "built").touch()

    def run(cpu: str, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [emulator, *(["-L", SYSROOT] if SANITIZE else []), "-cpu", cpu, folder / program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    return run
