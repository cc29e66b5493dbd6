// What Python calls. It has checked every shape, index and scheme; nothing here can fail but memory.
#include "abi.h"

#include <new>
#include <system_error>

#include "decoder.h"

namespace {

enum Status : int32_t { kDone = 0, kNoMemory = 1, kNoThreads = 2, kFailed = 3 };

template <class F> int32_t guarded(F&& body) {
    try {
        body();
        return kDone;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    } catch (const std::system_error&) {
        return kNoThreads;
    } catch (...) {
        return kFailed;
    }
}

}  // namespace

RV_API int32_t rv_abi_version() { return RV_ABI_VERSION; }

// The kernels that `wanted` selects here, or null if this processor has not got them.
RV_API const Kernels* rv_kernels(const char* wanted) { return find_kernels(wanted); }

RV_API const char* rv_kernels_name(const Kernels* kernels) { return kernels->name; }

RV_API int32_t rv_open(const RvModel* model, const Kernels* kernels, int32_t threads, RvDecoder** out) {
    return guarded([&] { *out = new RvDecoder(*model, *kernels, threads); });
}

RV_API void rv_close(RvDecoder* decoder) { delete decoder; }

RV_API int32_t rv_forward(RvDecoder* decoder, const RvBatch* batch, float* hidden) {
    return guarded([&] { decoder->forward(*batch, hidden); });
}

RV_API int32_t rv_logits(RvDecoder* decoder, const float* hidden, int64_t count, float* out) {
    return guarded([&] { decoder->logits(hidden, count, out); });
}
