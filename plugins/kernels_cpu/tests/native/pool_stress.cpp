// Many short jobs of changing size: every task of every job runs once, on its own job's data, and none besides.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "pool.h"

int main(int argc, char** argv) {
    const int threads = std::atoi(argv[1]);
    const long jobs = argc > 2 ? std::atol(argv[2]) : 200000;
    Pool pool(threads);
    for (long job = 0; job < jobs; job++) {
        const int64_t count = 2 + job * 7 % 13;
        std::unique_ptr<std::atomic<int>[]> ran(new std::atomic<int>[16]());
        pool.run(count, [&, job](int64_t task, int worker) {
            if (task >= count || worker < 0 || worker >= threads) std::abort();
            ran[(size_t)task].fetch_add(1);
        });
        for (int64_t task = 0; task < count; task++)
            if (ran[(size_t)task].load() != 1) {
                std::printf("job %ld: task %ld of %ld ran %d times\n", job, (long)task, (long)count, ran[(size_t)task].load());
                return 1;
            }
    }
    std::puts("every task ran once");
    return 0;
}
