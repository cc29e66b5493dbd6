// Which table of micro-kernels this processor can run.
#include <cstring>
#include "kernels.h"

namespace {

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif

}  // namespace

const Kernels* find_kernels(const char* name) {
    const bool any = !strcmp(name, "auto");
#if defined(__x86_64__)
    __builtin_cpu_init();
    if ((any || !strcmp(name, "avx512")) && has_avx512()) return &kAvx512;
    if ((any || !strcmp(name, "avx2")) && has_avx2()) return &kAvx2;
#endif
    return any || !strcmp(name, "generic") ? &kGeneric : nullptr;
}
