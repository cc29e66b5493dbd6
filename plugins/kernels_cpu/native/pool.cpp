#include "pool.h"

#include <chrono>

namespace {

constexpr uint32_t kClosed = 0xffffffff;  // instead of the next task, while a job is being written down

constexpr int kSpins = 4000;  // some tens of microseconds: longer than the gap between two jobs of a step

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { serve(i); });
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        closing_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::start(Task task, void* context, int64_t count) {
    const uint32_t job = (uint32_t)(next_.load() >> 32) + 1;
    // Closed before anything else changes: a thread that still looks for tasks of the job before must not take one of it
    // on the strength of the new count.
    next_ = (uint64_t)job << 32 | kClosed;
    task_ = task;
    context_ = context;
    count_ = count;
    done_ = 0;
    next_ = (uint64_t)job << 32;
    if (sleeping_.load()) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    work(job, 0);
    // Only tasks that a worker has begun are waited for. Its core may have been given to another program: then this
    // thread must not burn its own.
    for (int spins = 0; done_.load() < count; spins++) {
        if (spins < kSpins) pause();
        else if (spins < kSpins + 100) std::this_thread::yield();
        else std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
}

bool Pool::open(uint32_t last) const {
    const uint64_t seen = next_.load();
    return (uint32_t)(seen >> 32) != last && (uint32_t)seen != kClosed;
}

void Pool::work(uint32_t job, int worker) {
    for (;;) {
        const Task task = task_.load();
        void* context = context_.load();
        const int64_t count = count_.load();
        uint64_t seen = next_.load();
        // What was read above belongs to this job if the number still stands when the task is taken.
        for (;;) {
            if ((uint32_t)(seen >> 32) != job || (int64_t)(uint32_t)seen >= count) return;
            if (next_.compare_exchange_weak(seen, seen + 1)) break;
        }
        task(context, (int64_t)(uint32_t)seen, worker);
        done_.fetch_add(1);
    }
}

void Pool::serve(int worker) {
    uint32_t last = 0;
    while (!closing_.load()) {
        bool found = false;
        for (int spins = 0; spins < kSpins && !found; spins++) {
            found = open(last);
            if (!found) pause();
        }
        if (found) {
            const uint32_t job = (uint32_t)(next_.load() >> 32);
            work(job, worker);
            last = job;
            continue;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return closing_.load() || open(last); });
        sleeping_.fetch_sub(1);
    }
}
