// A few threads that run the same function and meet at barriers: spin briefly, then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace afds {

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kSpins = 4000;  // about 50 to 100 us: longer than one layer, shorter than a pause between images

class Barrier {
 public:
  explicit Barrier(int n) : n_(n) {}
  void wait() {
    wait([] {});
  }
  // The last to arrive runs `alone` while the others still wait: what one thread has to do needs no barrier of its own.
  template <typename Alone>
  void wait(const Alone &alone) {
    if (n_ == 1) return alone();
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_) {
      alone();
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    int spins = 0;
    while (round_.load(std::memory_order_acquire) == round) {
      if (++spins < kSpins) relax();
      else std::this_thread::yield();  // more threads than cores: let the others come
    }
  }

 private:
  const int n_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

class Pool {
 public:
  explicit Pool(int n) : n_(n), barrier_(n) {
    for (int t = 1; t < n; ++t) threads_.emplace_back([this, t] { work(t); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      epoch_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto &thread : threads_) thread.join();
  }
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  int size() const { return n_; }
  Barrier &barrier() { return barrier_; }

  // Runs f(0) here and f(1) .. f(n - 1) in the others; one call at a time.
  void run(const std::function<void(int)> &f) {
    if (n_ == 1) return f(0);
    std::lock_guard<std::mutex> one(calls_);
    job_ = &f;
    left_.store(n_ - 1, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      epoch_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load() > 0) wake_.notify_all();
    f(0);
    int spins = 0;
    while (left_.load(std::memory_order_acquire) > 0) {
      if (++spins < kSpins) relax();
      else std::this_thread::yield();
    }
  }

 private:
  void work(int t) {
    int seen = 0;
    for (;;) {
      int spins = 0;
      while (epoch_.load(std::memory_order_acquire) == seen && ++spins < kSpins) relax();
      if (epoch_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        sleeping_.fetch_sub(1);
      }
      ++seen;
      if (stop_) return;
      (*job_)(t);
      left_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  const int n_;
  Barrier barrier_;
  std::vector<std::thread> threads_;
  std::mutex calls_, mutex_;
  std::condition_variable wake_;
  std::atomic<int> epoch_{0}, left_{0}, sleeping_{0};
  std::atomic<bool> stop_{false};
  const std::function<void(int)> *job_ = nullptr;
};

}  // namespace afds
