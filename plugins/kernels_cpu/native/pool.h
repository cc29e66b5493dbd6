// A few persistent threads that share the tasks of one job after the other.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

class Pool {
  public:
    using Task = void (*)(void* context, int64_t task, int worker);

    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return (int)workers_.size() + 1; }

    // Calls run(task, worker) for every task in [0, count), on any thread; returns when all are done. One caller.
    template <class F> void run(int64_t count, F&& body) {
        if (count == 1 || workers_.empty()) {
            for (int64_t i = 0; i < count; i++) body(i, 0);
            return;
        }
        start([](void* f, int64_t task, int worker) { (*static_cast<std::remove_reference_t<F>*>(f))(task, worker); },
              (void*)&body, count);
    }

  private:
    void start(Task task, void* context, int64_t count);
    bool open(uint32_t last) const;  // whether there is a job after `last` to be worked on
    void work(uint32_t job, int worker);
    void serve(int worker);

    // The job's number above, the next task below: a thread that comes late cannot take a task of another job.
    std::atomic<uint64_t> next_{0};
    std::atomic<int64_t> count_{0}, done_{0};
    std::atomic<Task> task_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<int> sleeping_{0};
    std::atomic<bool> closing_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};
