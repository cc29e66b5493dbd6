// Memory for packed weights, and the way back for the mapped pages they came from.
#pragma once
#include <cstddef>
#include <cstdint>

// One run of zeroed pages, large ones where the system gives them. Throws std::bad_alloc.
class Pages {
  public:
    explicit Pages(size_t bytes);
    ~Pages();
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    uint8_t* data() const { return data_; }

  private:
    uint8_t* data_ = nullptr;
    size_t bytes_ = 0;
};

// Lets the whole pages inside of a read-only file mapping leave memory; they are read again when they are touched.
void release_mapped(const uint8_t* data, size_t bytes);
