// A team of threads that work on one job together: who is awake begins, who wakes up late joins.
//
//   caller    step 0 | step 1 | step 2 | step 3 |      a step's work is cut into as many parts as the team could have
//   awake     step 0 | step 1 | step 2 | step 3 |      members, so results do not depend on how many there are;
//   asleep    ......... knocks| step 2 | step 3 |      newcomers are let in where a step begins
//
// A thread that has slept can come back later than a whole image takes: its core may be slow to wake, or the scheduler
// may queue it behind the caller on the caller's own core, for milliseconds, though another is idle. So the caller's
// core is closed to the others.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
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

template <typename Done>
void spin_until(const Done &done) {
  for (int spins = 0; !done();) {
    if (++spins < kSpins) relax();
    else std::this_thread::yield();  // more threads than cores: let the others come
  }
}

class Cores {
 public:
#if defined(__linux__)
  Cores() : known_(!sched_getaffinity(0, sizeof allowed_, &allowed_)), written_(allowed_) {}
  int at_most(int n) const { return known_ ? std::min(n, CPU_COUNT(&allowed_)) : n; }

  // Closes the core that the caller is on to threads, of which there are fewer than cores.
  void keep_off(std::vector<std::thread> &threads) {
    const int cpu = sched_getcpu();
    if (!known_ || cpu < 0 || cpu >= CPU_SETSIZE || cpu == closed_ || threads.empty()) return;
    cpu_set_t now;
    if (pthread_getaffinity_np(threads[0].native_handle(), sizeof now, &now)) return;
    if (!CPU_EQUAL(&now, &written_)) allowed_ = now;  // somebody else has moved the threads since, and knows better
    written_ = allowed_;
    CPU_CLR(cpu, &written_);
    if (CPU_COUNT(&written_) < static_cast<int>(threads.size())) written_ = allowed_;
    for (auto &thread : threads) pthread_setaffinity_np(thread.native_handle(), sizeof written_, &written_);
    closed_ = cpu;
  }

 private:
  cpu_set_t allowed_;  // those that the threads may run on
  bool known_;
  cpu_set_t written_;  // those that they were last told to run on
  int closed_ = -1;
#else
  int at_most(int n) const {
    const int all = static_cast<int>(std::thread::hardware_concurrency());  // 0: not known
    return all ? std::min(n, all) : n;
  }
  void keep_off(std::vector<std::thread> &) {}
#endif
};

class Team {
 public:
  // At most n members, and no more than there are cores: two that spin for each other on one core take twenty times as
  // long. Where the system grants fewer threads there are fewer: no one reads n_ before there is a job.
  explicit Team(int n) : n_(cores_.at_most(n)), seats_(std::make_unique<Seat[]>(n_)) {
    threads_.reserve(n_);
    try {
      for (int t = 1; t < n_; ++t) threads_.emplace_back([this, t] { work(t); });
    } catch (const std::system_error &) {
      n_ = 1 + static_cast<int>(threads_.size());
    }
  }
  ~Team() {
    stop_.store(true, std::memory_order_relaxed);
    open(kInStep);
    for (auto &thread : threads_) thread.join();
  }
  Team(const Team &) = delete;
  Team &operator=(const Team &) = delete;

  int most() const { return n_; }
  int size() const { return size_.load(std::memory_order_relaxed); }  // members now; the same for all within a step

  // Runs work(member, step) for all steps up to `steps` in each member, the caller being member 0; all members meet
  // after each step. One call of this or of `apart` at a time, which the caller sees to.
  void in_step(int64_t steps, const std::function<void(int, int64_t)> &work) {
    work_ = &work, steps_ = steps;
    size_.store(1, std::memory_order_relaxed);
    left_.store(0, std::memory_order_relaxed);
    if (n_ > 1) {
      const int awake = open(kInStep);
      for (int spins = 0; knocking() < awake && spins < kSpins / 4; ++spins) relax();  // the others come when they can
      let_in(admit(0));
    }
    steps_from(0, 0);
    spin_until([&] { return left_.load(std::memory_order_acquire) == size() - 1; });
  }

  // Runs work(t) once in each thread that is awake before the caller, t = 0, is done.
  void apart(const std::function<void(int)> &work) {
    apart_ = &work;
    inside_.store(0, std::memory_order_release);
    if (n_ > 1) open(kApart);
    work(0);
    if (n_ == 1) return;
    for (int none = 0; !inside_.compare_exchange_weak(none, kClosed, std::memory_order_acq_rel); none = 0) relax();
  }

  // All members. The last to arrive runs `alone` while the others still wait: what one thread has to do needs no meeting
  // of its own.
  template <typename Alone>
  void meet(const Alone &alone) {
    const int size = this->size();
    if (size == 1) return alone();
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      alone();
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    spin_until([&] { return round_.load(std::memory_order_acquire) != round; });
  }
  void meet() {
    meet([] {});
  }

 private:
  enum Kind { kInStep, kApart };  // the last bit of a job's number
  static constexpr int kClosed = -1;
  struct alignas(64) Seat {  // of one thread
    std::atomic<int64_t> knocks{0};     // the job that it waits to be let into
    std::atomic<int64_t> admitted{0};   // the job that it has been let into,
    int member = 0;                     // as whom
    int64_t step = 0;                   // and where that begins
  };

  // Returns how many of the others are awake, and so will come at once.
  int open(Kind kind) {
    int asleep;
    cores_.keep_off(threads_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_.store((job_.load() / 2 + 1) * 2 + kind, std::memory_order_release);
      asleep = sleeping_;
    }
    if (asleep) wake_.notify_all();
    return n_ - 1 - asleep;
  }

  int knocking() const {
    const int64_t job = job_.load(std::memory_order_relaxed);
    int n = 0;
    for (int t = 1; t < n_; ++t) n += seats_[t].knocks.load(std::memory_order_acquire) == job;
    return n;
  }

  // Seats for those who knock: one thread, while no other is between its steps. Returns how many.
  int admit(int64_t step) {
    const int64_t job = job_.load(std::memory_order_relaxed);
    int size = this->size();
    newcomers_.clear();
    for (int t = 1; t < n_; ++t) {
      Seat &seat = seats_[t];
      if (seat.knocks.load(std::memory_order_acquire) != job) continue;
      seat.knocks.store(0, std::memory_order_relaxed);
      seat.member = size++, seat.step = step;
      newcomers_.push_back(t);
    }
    size_.store(size, std::memory_order_relaxed);
    return static_cast<int>(newcomers_.size());
  }

  void let_in(int newcomers) {  // after the meeting has ended: they go to the next one
    const int64_t job = job_.load(std::memory_order_relaxed);
    for (int i = 0; i < newcomers; ++i) seats_[newcomers_[i]].admitted.store(job, std::memory_order_release);
  }

  void steps_from(int64_t step, int member) {
    while (step < steps_) {
      (*work_)(member, step++);
      int newcomers = 0;
      meet([&] {
        if (step == steps_) closed_.store(job_.load(std::memory_order_relaxed), std::memory_order_release);
        else newcomers = size() < n_ ? admit(step) : 0;
      });
      let_in(newcomers);
    }
  }

  void work(int t) {
    Seat &seat = seats_[t];
    for (int64_t seen = 0;;) {
      int spins = 0;
      while (job_.load(std::memory_order_acquire) == seen && ++spins < kSpins) relax();
      if (job_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, [&] { return job_.load() != seen; });
        --sleeping_;
      }
      seen = job_.load(std::memory_order_acquire);
      if (stop_.load(std::memory_order_relaxed)) return;
      if (seen % 2 == kInStep) {
        seat.knocks.store(seen, std::memory_order_release);
        bool in = false;
        spin_until([&] {
          in = seat.admitted.load(std::memory_order_acquire) == seen;
          return in || closed_.load(std::memory_order_acquire) >= seen;
        });
        if (!in) continue;
        steps_from(seat.step, seat.member);
        left_.fetch_add(1, std::memory_order_acq_rel);
        continue;
      }
      for (int inside = 0; inside != kClosed;) {
        if (!inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acq_rel)) continue;
        (*apart_)(t);
        inside_.fetch_sub(1, std::memory_order_acq_rel);
        break;
      }
    }
  }

  Cores cores_;
  int n_;
  std::unique_ptr<Seat[]> seats_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  int sleeping_ = 0;  // under mutex_
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> job_{0}, closed_{0};
  std::atomic<int> size_{1}, left_{0};
  std::vector<int> newcomers_;  // threads, let in after the present meeting
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
  std::atomic<int> inside_{0};  // of a job done apart
  int64_t steps_ = 0;
  const std::function<void(int, int64_t)> *work_ = nullptr;
  const std::function<void(int)> *apart_ = nullptr;
};

}  // namespace afds
