#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "packed.h"

namespace {

constexpr int64_t kInnerTokens = 264;   // whose inner activations are in memory together
constexpr int64_t kEmbedTokens = 16;    // after which the pages of their embeddings are let go
constexpr int64_t kPackedAtOnce = 1 << 20;  // bytes of a matrix that are in memory twice while they are packed
constexpr int64_t kMovedTokens = 64;    // of one task; fewer in all are not worth waking threads for
constexpr int64_t kFewTokens = 16;      // of a sequence, a draft for one
constexpr int64_t kSplitKeys = 128;     // keys of one task where tokens are few, at least
constexpr int64_t kSplits = 16;         // tasks of a head then, at most, whatever the number of threads

bool quantized(const Matrix& w) { return !is_float(w.source.scheme); }

}  // namespace

RvDecoder::RvDecoder(const RvModel& description, const Kernels& table, int threads)
    : model_(description), kernels_(table), pool_(threads) {
    for (int32_t n = 0; n < model_.layers; n++) {
        Layer layer{description.layer[n], {}};
        for (int site = 0; site < RV_SITES; site++) layer.sites[site].source = layer.source.sites[site];
        layers_.push_back(layer);
    }
    head_ = {model_.head, nullptr, 0};
    const int64_t cols = std::max(model_.hidden, std::max(model_.inner, model_.heads * model_.head_dim));
    const int64_t floats = std::max(matmul_scratch(cols) / 4, attention_scratch(model_));
    scratch_.assign((size_t)threads, std::vector<float>((size_t)floats));
    std::vector<Matrix*> all;
    for (Layer& layer : layers_)
        for (Matrix& w : layer.sites) all.push_back(&w);
    all.push_back(&head_);
    packed_ = pack(all);
}

// Fills in the panels of quantized matrices; returns the memory they are in.
std::unique_ptr<Pages> RvDecoder::pack(const std::vector<Matrix*>& matrices) {
    std::vector<std::pair<Matrix*, size_t>> found;
    size_t total = 0;
    const auto plan = [&](Matrix& w) {
        if (!quantized(w)) return;
        with_scheme(w.source.scheme, [&](auto s) {
            w.panel_bytes = Packed<decltype(s)::scheme>::panel_bytes(w.source.cols);
        });
        found.emplace_back(&w, total);
        total += (size_t)(w.panel_bytes * ((w.source.rows + kPanelRows - 1) / kPanelRows));
    };
    for (Matrix* w : matrices) plan(*w);
    auto pages = std::make_unique<Pages>(total);
    for (const auto& [w, at] : found) {
        w->panels = pages->data() + at;
        const RvMatrix& source = w->source;
        const int64_t panels = (source.rows + kPanelRows - 1) / kPanelRows;
        const int64_t step = std::max((int64_t)1, kPackedAtOnce / w->panel_bytes);
        pool_.run((panels + step - 1) / step, [&, w = w](int64_t task, int) {
            const int64_t begin = task * step, end = std::min(begin + step, panels);
            kernels_.pack(source, begin, end, const_cast<uint8_t*>(w->panels));
            const int64_t row = begin * kPanelRows, rows = std::min(end * kPanelRows, source.rows) - row;
            if (source.mapped) release_mapped(source.data + row * source.row_bytes, (size_t)(rows * source.row_bytes));
        });
    }
    return pages;
}

Activations RvDecoder::describe(const float* x, int64_t count, int64_t cols, bool quantized) {
    Activations found;
    found.x = x;
    found.count = count;
    found.cols = cols;
    if (quantized) {
        const int64_t room = count + kMaxTile, cells = cols / 32;
        found.q = bytes_.room(2 * room * cols);
        if (model_.activation_bits == 16) found.r = found.q + room * cols;
        found.d = scales_.room(4 * room * cells);
        found.s32 = found.d + room * cells;
        found.s16 = found.s32 + room * cells;
    }
    return found;
}

// Where adapters add to the products, x is multiplied by their rows of a, which are few, before threads meet, and every
// task adds b to its own rows. Of few tokens, the next a is fetched by the first thread, which will read it.
void RvDecoder::products(const Activations& x, const Product* wanted, int count, const Deltas& deltas) {
    int64_t total = 0;
    for (int i = 0; i < count; i++) total += wanted[i].matrix->source.rows;
    const int64_t aim = total / (pool_.threads() * kTasksPerThread) + 1;
    const int64_t step = (aim + kPanelRows - 1) / kPanelRows * kPanelRows;
    int64_t tasks = 0;
    for (int i = 0; i < count; i++) tasks += (wanted[i].matrix->source.rows + step - 1) / step;

    Ahead ahead{};
    float* shrunk = nullptr;
    const bool few = !several_.empty();
    if (deltas.of) {
        shrunk = shrunk_.room(x.count * shrunk_width_);
        const int64_t next = deltas.first + count;
        if (few && next < (int64_t)layers_.size() * RV_SITES) ahead = look_ahead(next, total / kPanelRows);
        each_token(x.count, [&](int64_t t) {
            if (!deltas.of[t]) return;
            kernels_.shrink(deltas.of[t] + deltas.first, count, x.x + t * x.cols, x.cols, shrunk + t * shrunk_width_);
        });
    }
    pool_.run(tasks, [&](int64_t task, int worker) {
        int i = 0;
        for (int64_t own; task >= (own = (wanted[i].matrix->source.rows + step - 1) / step); i++) task -= own;
        const Product& product = wanted[i];
        const int64_t begin = task * step, end = std::min(begin + step, product.matrix->source.rows);
        for (const RvLowRank* sites : several_) __builtin_prefetch(sites + deltas.first + count + i);
        const Added added{deltas.of, deltas.first, i, shrunk, shrunk_width_, few, worker ? nullptr : &ahead};
        kernels_.matmul(*product.matrix, x, begin, end, product.out, product.stride, deltas.of ? &added : nullptr,
                        scratch_[(size_t)worker].data());
    });
}

// Rotates queries and keys in place, and stores keys and values.
void RvDecoder::append(const RvBatch& batch, int layer, float* qkv, int64_t width) {
    const RvSegment& newest = batch.segments[batch.segments_count - 1];
    const int64_t dim = model_.head_dim, q = model_.heads * dim, kv = model_.kv_heads * dim;
    const int64_t bytes = newest.type == RV_KV_F32 ? 4 : 2;  // new tokens are written one by one, so never quantized
    each_token(batch.tokens_count, [&](int64_t t) {
        const int32_t b = owner_[(size_t)t];
        const int64_t at = batch.positions[t] * (model_.rope_dim / 2);
        float* row = qkv + t * width;
        kernels_.rope(row, model_.heads + model_.kv_heads, model_, batch.cos[b] + at, batch.sin[b] + at);
        const int64_t size = newest.block_size, block = batch.slots[t] / size, offset = batch.slots[t] % size;
        for (int64_t k = 0; k < model_.kv_heads; k++) {
            const int64_t to = ((block * model_.kv_heads + k) * size + offset) * dim * bytes;
            kernels_.store_kv(row + q + k * dim, dim, newest.type, (uint8_t*)newest.keys[layer] + to);
            kernels_.store_kv(row + q + kv + k * dim, dim, newest.type, (uint8_t*)newest.values[layer] + to);
        }
    });
}

// One move after the other, each a block or a few tokens of one head at a time: those of one move write different bytes.
void RvDecoder::carry_out(const RvBatch& batch, int layer) {
    const float* bias = model_.center_keys ? layers_[(size_t)layer].source.sites[RV_K].bias : nullptr;
    for (const RvMove* move = batch.moves; move < batch.moves + batch.moves_count; move++) {
        const int64_t step = is_coded(move->target.type) ? move->target.block_size : kMovedTokens;
        const int64_t pieces = (move->count + step - 1) / step, tasks = pieces * model_.kv_heads;
        const auto run = [&](int64_t task, int worker) {
            const int32_t head = (int32_t)(task / pieces);
            const int64_t begin = task % pieces * step;
            kernels_.move({&model_, move, layer, head, begin, std::min(begin + step, move->count),
                           bias ? bias + head * model_.head_dim : nullptr, batch.cos[0], batch.sin[0],
                           scratch_[(size_t)worker].data()});
        };
        if (move->count < kMovedTokens)
            for (int64_t task = 0; task < tasks; task++) run(task, 0);
        else pool_.run(tasks, run);
    }
}

// Tiles of every sequence for each key/value head, those that see most keys first. Where tokens are few, their keys are
// split, for the sake of the threads, into runs that depend on nothing but positions; and tiles are so small that a token
// is computed to the last bit as it would be alone: a draft changes nothing of what it is compared with.
void RvDecoder::plan_attention(const RvBatch& batch, int layer, const float* query, int64_t stride, float* out) {
    const int64_t window = layers_[(size_t)layer].source.window, group = model_.heads / model_.kv_heads;
    const auto run_of = [&](int64_t t) {
        return ((batch.positions[t] + 1) / kSplits + kSplitKeys) / kSplitKeys * kSplitKeys;
    };
    const auto alike = [&](int64_t a, int64_t b) {
        return run_of(a) == run_of(b) && batch.positions[a] / run_of(a) == batch.positions[b] / run_of(b);
    };
    tasks_.clear();
    for (int64_t b = batch.sequences; b-- > 0;) {
        const int64_t first = batch.cu_q[b], last = batch.cu_q[b + 1];
        const bool few = last - first <= kFewTokens;
        const int64_t most = few ? std::max((int64_t)1, kFewRows / group) : kQueryTile;
        for (int64_t end = last, begin; end > first; end = begin) {
            begin = first + (end - first - 1) / most * most;
            while (few && !alike(begin, end - 1)) begin++;
            const int64_t high = batch.positions[end - 1] + 1;
            const int64_t low = window ? std::max((int64_t)0, batch.positions[begin] - window + 1) : 0;
            const int64_t keys = few ? run_of(begin) : high;
            for (int32_t head = 0; head < model_.kv_heads; head++)
                for (int64_t from = low, to; from < high; from = to) {
                    to = std::min(high, (from / keys + 1) * keys);
                    tasks_.push_back({&model_, &batch, layer, (int32_t)b, head, begin, end, from, to, window, query,
                                      stride, out, nullptr, nullptr});
                }
        }
    }
}

void RvDecoder::attention(const RvBatch& batch, int layer, const float* query, int64_t stride, float* out) {
    plan_attention(batch, layer, query, stride, out);
    const int64_t dim = model_.head_dim, group = model_.heads / model_.kv_heads, width = dim + 2;
    const auto same = [](const AttentionTask& a, const AttentionTask& b) {
        return a.sequence == b.sequence && a.begin == b.begin && a.kv_head == b.kv_head;
    };
    const auto split = [&](size_t i) {
        return (i > 0 && same(tasks_[i - 1], tasks_[i])) || (i + 1 < tasks_.size() && same(tasks_[i], tasks_[i + 1]));
    };
    int64_t rows = 0;
    for (size_t i = 0; i < tasks_.size(); i++)
        if (split(i)) rows += (tasks_[i].end - tasks_[i].begin) * group;
    float* partial = rows ? partial_.room(rows * width) : nullptr;
    for (size_t i = 0; i < tasks_.size(); i++) {
        if (!split(i)) continue;
        tasks_[i].partial = partial;
        partial += (tasks_[i].end - tasks_[i].begin) * group * width;
    }
    pool_.run((int64_t)tasks_.size(), [&](int64_t i, int worker) {
        AttentionTask task = tasks_[(size_t)i];
        task.scratch = scratch_[(size_t)worker].data();
        kernels_.attend(task);
    });
    for (size_t first = 0, last; first < tasks_.size(); first = last) {
        const AttentionTask& task = tasks_[first];
        for (last = first + 1; last < tasks_.size() && same(task, tasks_[last]); last++) {
        }
        if (!task.partial) continue;
        for (int64_t r = 0; r < (task.end - task.begin) * group; r++) {
            float* to = out + ((task.begin + r / group) * model_.heads + task.kv_head * group + r % group) * dim;
            float best = -INFINITY, weight = 0;
            for (size_t i = first; i < last; i++) best = std::max(best, tasks_[i].partial[r * width + dim]);
            std::fill(to, to + dim, 0.0f);
            for (size_t i = first; i < last; i++) {
                const float* part = tasks_[i].partial + r * width;
                const float share = std::exp(part[dim] - best);
                weight += share * part[dim + 1];
                for (int64_t k = 0; k < dim; k++) to[k] += share * part[k];
            }
            for (int64_t k = 0; k < dim; k++) to[k] /= weight;
        }
    }
}

// The gated products of `count` tokens from `first` on, in place of their normed states.
void RvDecoder::feed_forward(const RvBatch& batch, int n, int64_t first, int64_t count) {
    const Matrix* w = layers_[(size_t)n].sites;
    const int64_t hidden = model_.hidden, inner = model_.inner;
    float* x = x_.room(batch.tokens_count * hidden) + first * hidden;
    float *both = inner_.room(count * 2 * inner), *gated = gated_.room(count * inner);

    Activations in = describe(x, count, hidden, quantized(w[RV_GATE]) || quantized(w[RV_UP]));
    if (in.q) each_tile(in, [](int64_t) {});
    const Product halves[] = {{&w[RV_GATE], both, 2 * inner}, {&w[RV_UP], both + inner, 2 * inner}};
    products(in, halves, 2, deltas(n, RV_GATE, first));

    in = describe(gated, count, inner, quantized(w[RV_DOWN]));
    each_tile(in, [&](int64_t t) {
        float* gate = both + t * 2 * inner;
        kernels_.gated(gate, gate + inner, inner, model_.activation, gated + t * inner);
    });
    const Product down{&w[RV_DOWN], x, hidden};
    products(in, &down, 1, deltas(n, RV_DOWN, first));
}

// `pending` is what the next norm adds to the residual: the output of the last product.
void RvDecoder::layer(const RvBatch& batch, int n, const float** pending) {
    const RvLayer& layer = layers_[(size_t)n].source;
    const Matrix* w = layers_[(size_t)n].sites;
    const int64_t count = batch.tokens_count, hidden = model_.hidden, dim = model_.head_dim;
    const int64_t q = model_.heads * dim, kv = model_.kv_heads * dim, width = q + 2 * kv;
    float *residual = residual_.room(count * hidden), *x = x_.room(count * hidden);
    float *qkv = qkv_.room(count * width), *mixed = mixed_.room(count * q);

    Activations in = describe(x, count, hidden, quantized(w[RV_Q]) || quantized(w[RV_K]) || quantized(w[RV_V]));
    const float* add = *pending;
    each_tile(in, [&](int64_t t) {
        kernels_.norm(residual + t * hidden, add ? add + t * hidden : nullptr, layer.attn_norm, hidden, model_.eps,
                      x + t * hidden);
    });
    const Product heads[] = {{&w[RV_Q], qkv, width}, {&w[RV_K], qkv + q, width}, {&w[RV_V], qkv + q + kv, width}};
    products(in, heads, 3, deltas(n, RV_Q));
    append(batch, n, qkv, width);
    carry_out(batch, n);
    attention(batch, n, qkv, width, mixed);

    in = describe(mixed, count, q, quantized(w[RV_O]));
    if (in.q) each_tile(in, [](int64_t) {});
    const Product out{&w[RV_O], x, hidden};
    products(in, &out, 1, deltas(n, RV_O));

    each_token(count, [&](int64_t t) {
        kernels_.norm(residual + t * hidden, x + t * hidden, layer.mlp_norm, hidden, model_.eps, x + t * hidden);
    });
    const int64_t pieces = (count + kInnerTokens - 1) / kInnerTokens;
    const int64_t piece = ((count + pieces - 1) / pieces + kernels_.tile - 1) / kernels_.tile * kernels_.tile;
    for (int64_t t = 0; t < count; t += piece) feed_forward(batch, n, t, std::min(piece, count - t));
    *pending = x;
}

void RvDecoder::forward(const RvBatch& batch, float* hidden) {
    const int64_t count = batch.tokens_count, width = model_.hidden;
    float* residual = residual_.room(count * width);
    owner_.resize((size_t)count);
    for (int64_t b = 0; b < batch.sequences; b++)
        std::fill(owner_.begin() + batch.cu_q[b], owner_.begin() + batch.cu_q[b + 1], (int32_t)b);
    find_deltas(batch);
    for (int64_t from = 0; from < count; from += kEmbedTokens) {
        const int64_t found = std::min(kEmbedTokens, count - from);
        each_token(found, [&](int64_t t) {
            kernels_.decode_row(model_.embed, batch.tokens[from + t], residual + (from + t) * width);
        });
        // The system maps much around every row that is read.
        if (!model_.embed.mapped || (embedded_ += found) < kEmbedTokens) continue;
        release_mapped(model_.embed.data, (size_t)(model_.embed.rows * model_.embed.row_bytes));
        embedded_ = 0;
    }
    const float* pending = nullptr;
    for (int n = 0; n < model_.layers; n++) {
        if (n + 1 == model_.layers) fetch_final(batch);
        layer(batch, n, &pending);
    }
    // A row may be wanted twice: the sum is formed apart, the residual stays as it is.
    float* total = qkv_.room(width);
    for (int64_t r = 0; r < batch.rows_count; r++) {
        memcpy(total, residual + batch.rows[r] * width, (size_t)width * 4);
        kernels_.norm(total, pending + batch.rows[r] * width, model_.final_norm, width, model_.eps, hidden + r * width);
    }
}

void RvDecoder::logits(const float* hidden, int64_t count, const RvAdapter* const* adapters, float* out) {
    if (adapters) hidden = add_final(hidden, count, adapters);
    const Activations in = describe(hidden, count, model_.hidden, quantized(head_));
    if (in.q) each_tile(in, [](int64_t) {});
    const Product product{&head_, out, model_.vocab};
    products(in, &product, 1, {});
    if (model_.logit_softcap > 0)
        each_token(count, [&](int64_t t) {
            kernels_.softcap(out + t * model_.vocab, model_.vocab, model_.logit_softcap);
        });
}
