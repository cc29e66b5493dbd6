// The table of micro-kernels for ARM64, and what Python calls.
#include "neon.h"

#include <new>
#include <vector>

#include "float_products.h"
#include "gated.h"
#include "levels.h"
#include "low_rank.h"
#include "norm.h"
#include "rope.h"

namespace {

template <const Level& LEVEL>
void matmul(const Matrix& w, const Activations& x, int64_t begin, int64_t end, float* out, int64_t stride,
            const Added* added, void* scratch) {
    const bool far = added && added->far;
    for (int64_t from = begin, to; from < end; from = to) {
        to = far ? least(from + kPanelRows, end) : end;
        if (far) ask(*added, 0, x.count, from);
        if (is_float(w.source.scheme)) float_matmul(w.source, x, from, to, out, stride);
        else LEVEL.matmul(w, x, from, to, out, stride, scratch);
        for (int64_t t = 0; added && t < x.count; t++) add_rows(*added, t, from, to, out + t * stride);
    }
}

template <const Level& LEVEL> const Kernels& table_of(const Kernels& base, const char* name) {
    static const Kernels table = [&] {
        Kernels made = base;
        made.name = name;
        made.tile = kTokens;
        made.norm = norm;
        made.quantize = LEVEL.quantize;
        made.matmul = matmul<LEVEL>;
        made.rope = rope;
        made.gated = gated;
        made.attend = LEVEL.attend;
        return made;
    }();
    return table;
}

}  // namespace

int32_t rvneon_abi_version() { return RV_ABI_VERSION; }

int32_t rvneon_level() { return best_level(); }

const Kernels* rvneon_kernels(const Kernels* base, int32_t level) {
    if (level < 0) level = best_level();
    if (level > best_level()) return nullptr;
    if (level == kPlainLevel) return &table_of<kPlain>(*base, "neon");
    if (level == kDotprodLevel) return &table_of<kDotprod>(*base, "neon-dotprod");
    return &table_of<kI8mm>(*base, "neon-i8mm");
}

int32_t rvneon_attention(const RvNeonAttention* call) try {
    RvModel model{};
    model.heads = call->heads;
    model.kv_heads = call->kv_heads;
    model.head_dim = call->head_dim;
    model.scale = call->scale;
    model.attention_softcap = call->softcap;

    // One segment that is one block. A token that sees every key is one at the last position.
    std::vector<int64_t> positions((size_t)call->tokens, call->keys - 1);
    for (int64_t t = 0; call->causal && t < call->tokens; t++)
        positions[(size_t)t] = call->keys - call->tokens + t;
    const int32_t block = 0, length = (int32_t)call->keys, start = 0;
    void *key = const_cast<float*>(call->key), *value = const_cast<float*>(call->value);
    const RvSegment segment{RV_KV_F32, length, 1, 0, &block, &length, &start, &key, &value, nullptr};
    RvBatch batch{};
    batch.positions = positions.data();
    batch.segments_count = 1;
    batch.segments = &segment;

    std::vector<float> scratch((size_t)attention_scratch(model));
    AttentionTask task{};
    task.model = &model;
    task.batch = &batch;
    task.window = call->window;
    task.query = call->query;
    task.stride = (int64_t)call->heads * call->head_dim;
    task.out = call->out;
    task.scratch = scratch.data();
    for (task.kv_head = 0; task.kv_head < call->kv_heads; task.kv_head++)
        for (task.begin = 0; task.begin < call->tokens; task.begin = task.end) {
            task.end = least(task.begin + kQueryTile, call->tokens);
            const int64_t first = positions[(size_t)task.begin];
            task.low = call->window ? most(0, first - call->window + 1) : 0;
            task.high = positions[(size_t)task.end - 1] + 1;
            attend_plain(task);
        }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
