#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "share.h"

namespace afds {

Floats::Floats(size_t n) : size_(n) {
  if (!n) return;
  const size_t bytes = (n * sizeof(float) + 63) / 64 * 64;
  data_ = static_cast<float *>(std::aligned_alloc(64, bytes));
  if (!data_) throw std::bad_alloc();
  std::memset(data_, 0, bytes);
}

Floats &Floats::operator=(Floats &&other) noexcept {
  if (this != &other) {
    if (owned_) std::free(data_);
    data_ = other.data_, size_ = other.size_, owned_ = other.owned_;
    other.data_ = nullptr, other.size_ = 0;
  }
  return *this;
}

Floats::~Floats() {
  if (owned_) std::free(data_);
}

Arena::~Arena() {
  for (void *chunk : chunks_) std::free(chunk);
}

namespace {

size_t lines(size_t n) { return (n * sizeof(float) + 63) / 64 * 64; }  // bytes of n floats in whole cache lines

}  // namespace

float *Arena::cut(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)  // each piece by itself, or reading past one would be reading the next, unseen
  constexpr size_t kPage = 64, kFewest = 0;
  left_ = 0;
#else
  constexpr size_t kPage = size_t(2) << 20, kFewest = 4 * kPage;  // bytes; large pages
#endif
  if (bytes > left_) {
    const size_t size = (std::max(bytes, kFewest) + kPage - 1) / kPage * kPage;
    void *chunk = std::aligned_alloc(kPage, size);
    if (!chunk) throw std::bad_alloc();
    chunks_.push_back(chunk);
#if defined(__linux__)
    madvise(chunk, size, MADV_HUGEPAGE);  // where it is refused, small pages do
#endif
    at_ = static_cast<char *>(chunk);
    left_ = size;
  }
  float *out = reinterpret_cast<float *>(at_);
  at_ += bytes;
  left_ -= bytes;
  bytes_ += bytes;
  return out;
}

float *Arena::take(size_t n) {
  const size_t bytes = lines(n) + kSlack * sizeof(float);
  float *out = cut(bytes);
  std::memset(out, 0, bytes);
  return out;
}

Floats Arena::keep(const Floats &from) {
  const size_t n = from.size();
  if (!n) return Floats();
  const size_t bytes = lines(n) + kSlack * sizeof(float);
  float *to = cut(bytes);
  std::memcpy(to, from.data(), n * sizeof(float));
  std::memset(to + n, 0, bytes - n * sizeof(float));
  return Floats(to, n);
}

}  // namespace afds
