#pragma once
#include <chrono>

#include "engine.h"

namespace afds {

struct Watch {  // seconds of thread 0, where they are asked for
  double *into;
  std::chrono::steady_clock::time_point last;
  Watch(const Run &run, int op) : into(run.ws.profile && run.t == 0 ? &run.ws.seconds[size_t(op) * kParts] : nullptr) {
    if (into) last = std::chrono::steady_clock::now();
  }
  Watch(const Run &run, int op, std::chrono::steady_clock::time_point from) : Watch(run, op) { last = from; }
  void lap(Part part) {
    if (!into) return;
    const auto now = std::chrono::steady_clock::now();
    into[part] += std::chrono::duration<double>(now - last).count();
    last = now;
  }
};

}  // namespace afds
