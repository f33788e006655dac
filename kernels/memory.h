// Arrays of floats: aligned, and many of them together in large pages.
#pragma once
#include <cstddef>
#include <vector>

namespace afds {

class Floats {  // aligned to a cache line, zero at the start
 public:
  Floats() = default;
  explicit Floats(size_t n);
  Floats(float *borrowed, size_t n) : data_(borrowed), size_(n), owned_(false) {}
  Floats(Floats &&other) noexcept : data_(other.data_), size_(other.size_), owned_(other.owned_) {
    other.data_ = nullptr, other.size_ = 0;
  }
  Floats &operator=(Floats &&other) noexcept;
  ~Floats();
  float *data() { return data_; }
  const float *data() const { return data_; }
  size_t size() const { return size_; }
  float &operator[](size_t i) { return data_[i]; }
  float operator[](size_t i) const { return data_[i]; }

 private:
  float *data_ = nullptr;
  size_t size_ = 0;
  bool owned_ = true;
};

class Arena {  // memory in large pages: the weights of a network are far more than the TLB covers in small ones
 public:
  ~Arena();
  Floats keep(const Floats &from);  // a copy that lives as long as the arena
  float *take(size_t n);            // zero at the start
  size_t bytes() const { return bytes_; }

 private:
  float *cut(size_t bytes);

  std::vector<void *> chunks_;
  char *at_ = nullptr;
  size_t left_ = 0, bytes_ = 0;
};

}  // namespace afds
