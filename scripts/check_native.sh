#!/usr/bin/env bash
# The tests of the native CPU kernels, with every memory access and every undefined operation of the library checked.
# Builds the library anew into a temporary folder. Usage: check_native.sh PYTHON [pytest arguments]. Linux with GCC.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$scratch/site" \
    --config-settings=cmake.define.RUVLLM_SANITIZE=ON --config-settings=install.strip=false ./plugins/kernels_cpu

# -S: the environment's own, editable copy would come first. The sanitizers have to be loaded before Python, and the C++
# library before them, or they cannot see what is thrown.
path=$scratch/site:$PWD
for source in plugins/*/src; do path=$path:$PWD/$source; done
path=$path:$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sep=":")')
compiler=${CXX:-g++}
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 PYTHONMALLOC=malloc OMP_NUM_THREADS=1
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so.6)"
"$python" -S -c 'from ruvllm_kernels_cpu.library import find; print("library:", find())' | grep "$scratch/site"
tests=plugins/kernels_cpu/tests store=plugins/kernels_cpu/tests/test_cpu_store.py
check() {
    "$python" -S -m pytest -q -p no:cacheprovider \
        --ignore $tests/test_cpu_start.py --ignore $tests/test_cpu_smollm2.py "$@"
}
if [ $# -gt 0 ]; then
    check $tests "$@"
    exit
fi
# Two processes side by side: the checks take their time.
check $store > "$scratch/store.log" 2>&1 & beside=$!
check $tests --ignore $store
wait $beside || { cat "$scratch/store.log"; exit 1; }
cat "$scratch/store.log"
