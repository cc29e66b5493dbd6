#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace {
constexpr size_t kLarge = size_t{2} << 20;
}

Pages::Pages(size_t bytes) : bytes_((bytes + kLarge - 1) / kLarge * kLarge) {
    if (!bytes_) return;
    void* found = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(found);
#ifdef MADV_HUGEPAGE
    madvise(found, bytes_, MADV_HUGEPAGE);  // fewer address translations; only advice
#endif
}

Pages::~Pages() {
    if (data_) munmap(data_, bytes_);
}

void release_mapped(const uint8_t* data, size_t bytes) {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}
