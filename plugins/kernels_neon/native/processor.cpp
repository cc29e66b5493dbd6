// Which optional instructions this processor has.
#include "levels.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>

static bool has(const char* name) {
    int32_t value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
static bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
static bool has_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__linux__)
#include <sys/auxv.h>

// Bits of Linux's arch/arm64 interface, which is stable; old headers lack the second.
static bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }
static bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }
#else
static bool has_dotprod() { return false; }
static bool has_i8mm() { return false; }
#endif

int32_t best_level() {
    if (!has_dotprod()) return kPlainLevel;
    return has_i8mm() ? kI8mmLevel : kDotprodLevel;
}
