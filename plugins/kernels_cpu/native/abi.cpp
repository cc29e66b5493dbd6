// What Python calls. It has checked every shape, index and scheme; nothing here can fail but memory.
#include "abi.h"

#include <new>
#include <system_error>

#include "decoder.h"
#include "ops.h"

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

// adapters: null, or one for each of the `count` states, each may be null; their final sites are added.
RV_API int32_t rv_logits(RvDecoder* decoder, const float* hidden, int64_t count, const RvAdapter* const* adapters,
                         float* out) {
    return guarded([&] { decoder->logits(hidden, count, adapters, out); });
}

// Single operations, for eager models; arrays are row by row, [tokens, ...].
RV_API int32_t rv_ops_open(const Kernels* kernels, int32_t threads, int32_t activation_bits, RvOps** out) {
    return guarded([&] { *out = new RvOps(*kernels, threads, activation_bits); });
}

RV_API void rv_ops_close(RvOps* ops) { delete ops; }

RV_API int32_t rv_op_prepare(RvOps* ops, const RvMatrix* parts, int64_t count, RvWeight** out) {
    return guarded([&] { *out = ops->prepare(parts, count).release(); });
}

RV_API void rv_op_release(RvWeight* weight) { delete weight; }

RV_API int32_t rv_op_linear(RvOps* ops, const RvWeight* weight, const float* x, int64_t count, float* out) {
    return guarded([&] { ops->linear(*weight, x, count, out); });
}

RV_API int32_t rv_op_embed(RvOps* ops, const RvMatrix* weight, const int64_t* tokens, int64_t count, float* out) {
    return guarded([&] { ops->embed(*weight, tokens, count, out); });
}

// total += add (may be null, then total is only read); out is the norm of total.
RV_API int32_t rv_op_norm(RvOps* ops, float* total, const float* add, const float* weight, int64_t count, int64_t cols,
                          float eps, float* out) {
    return guarded([&] { ops->norm(total, add, weight, count, cols, eps, out); });
}

// In place; cos and sin are [count, rope_dim / 2].
RV_API int32_t rv_op_rope(RvOps* ops, float* x, int64_t count, const RvShape* shape, const float* cos,
                          const float* sin) {
    return guarded([&] { ops->rope(x, count, *shape, cos, sin); });
}

RV_API int32_t rv_op_gated(RvOps* ops, const float* gate_up, int64_t count, int64_t inner, int32_t activation,
                           float* out) {
    return guarded([&] { ops->gated(gate_up, count, inner, activation, out); });
}

RV_API int32_t rv_op_kv_append(RvOps* ops, const RvSegment* to, const RvShape* shape, const int64_t* slots,
                               int64_t count, const float* key, const float* value) {
    return guarded([&] { ops->append(*to, *shape, slots, count, key, value); });
}

// Of the batch: counts, positions, cu_q and segments.
RV_API int32_t rv_op_attention(RvOps* ops, const RvBatch* batch, const RvShape* shape, const float* query, float* out) {
    return guarded([&] { ops->attend(*batch, *shape, query, out); });
}
