// What the decoder knows of adapters: whose they are, and when memory is asked for their factors.
#include <algorithm>
#include <cstring>

#include "decoder.h"

namespace {

constexpr int64_t kFetchedFloats = 1 << 14;  // of adapters ahead, at most: a near cache has room for more than that
constexpr int kSharing[RV_SITES] = {3, 2, 1, 1, 2, 1, 1};  // sites from one on that read the same input

}  // namespace

void RvDecoder::find_deltas(const RvBatch& batch) {
    deltas_.clear();
    several_.clear();
    shrunk_width_ = 0;
    if (!batch.adapters) return;
    for (int64_t t = 0; t < batch.tokens_count; t++) {
        const RvAdapter* adapter = batch.adapters[owner_[(size_t)t]];
        const bool changes = adapter && adapter->widest;
        deltas_.push_back(changes ? adapter->sites : nullptr);
        if (!changes) continue;
        shrunk_width_ = std::max(shrunk_width_, adapter->widest);
        if (batch.tokens_count >= kSmallTokens) continue;
        if (std::find(several_.begin(), several_.end(), adapter->sites) == several_.end())
            several_.push_back(adapter->sites);
    }
    if (!shrunk_width_) deltas_.clear();
}

RvDecoder::Deltas RvDecoder::deltas(int layer, int site, int64_t first) const {
    return {deltas_.empty() ? nullptr : deltas_.data() + first, (int64_t)layer * RV_SITES + site};
}

// The factors a of the sites that read the same input as `site`, counted through all layers: what the first thread asks
// for while it computes its share of `panels`, a little with each. All at once they would hold up its own reading.
Ahead RvDecoder::look_ahead(int64_t site, int64_t panels) {
    runs_.clear();
    int64_t lines = 0;
    for (const RvLowRank* sites : several_) {
        const RvLowRank *first = sites + site, *end = first + kSharing[site % RV_SITES];
        while (first < end && !first->rank) first++;
        if (first == end) continue;
        const int64_t floats = std::min((int64_t)(first->b - first->a), kFetchedFloats);
        runs_.push_back({(const char*)first->a, (const char*)(first->a + floats)});
        lines += (floats + 15) / 16;
    }
    const int64_t own = std::max((int64_t)1, panels / pool_.threads());
    return {runs_.data(), runs_.data() + runs_.size(), (lines + own - 1) / own};
}

// Asks for the factors of the final sites, which a step of few tokens will need soon.
void RvDecoder::fetch_final(const RvBatch& batch) const {
    if (!batch.adapters || batch.tokens_count >= kSmallTokens) return;
    for (int64_t b = 0; b < batch.sequences; b++) {
        if (!batch.adapters[b]) continue;
        const RvLowRank& delta = batch.adapters[b]->sites[layers_.size() * RV_SITES];
        const int64_t floats = std::min(2 * delta.rank * (int64_t)model_.hidden, kFetchedFloats);
        for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(delta.a + i, 0, 2);
    }
}

// The states with the final site of each one's adapter; the same memory if nobody has one.
const float* RvDecoder::add_final(const float* hidden, int64_t count, const RvAdapter* const* adapters) {
    const int64_t site = (int64_t)layers_.size() * RV_SITES, width = model_.hidden;
    int64_t widest = 0;
    deltas_.clear();
    for (int64_t t = 0; t < count; t++) {
        const int32_t rank = adapters[t] ? adapters[t]->sites[site].rank : 0;
        deltas_.push_back(rank ? adapters[t]->sites : nullptr);
        widest = std::max(widest, (int64_t)rank);
    }
    if (!widest) return hidden;
    float *x = x_.room(count * width), *c = shrunk_.room(count * widest);
    memcpy(x, hidden, (size_t)(count * width) * 4);
    const Added added{deltas_.data(), site, 0, c, widest, false, nullptr};
    each_token(count, [&](int64_t t) {
        if (!deltas_[(size_t)t]) return;
        kernels_.shrink(deltas_[(size_t)t] + site, 1, hidden + t * width, width, c + t * widest);
        kernels_.add(added, t, 0, width, x + t * width);
    });
    return x;
}
