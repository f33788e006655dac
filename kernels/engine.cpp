// Threads, workspaces, images; what all ops share.
#include "engine.h"

#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "watch.h"

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace afds {

static int64_t this_process() {
#if defined(_WIN32)  // no fork there
  return 0;
#else
  return getpid();
#endif
}

Engine::Engine(int threads, const std::string &isa, bool bf16)
    : table_(choose_table(isa, bf16)),
      pairs_(bf16 ? &choose_pairs(isa, table_) : nullptr),
      amx_(bf16 ? choose_amx(isa) : nullptr),
      threads_(threads),
      crew_(new Crew(threads)) {}

Engine::~Engine() {
  Crew *crew = crew_.load();
  if (crew->process == this_process()) delete crew;
}

Crew::Crew(int threads) : process(this_process()), team(threads) {}

Crew &Engine::crew() {
  Crew *known = crew_.load(std::memory_order_acquire);
  if (known->process == this_process()) return *known;
  auto own = std::make_unique<Crew>(threads_);
  if (crew_.compare_exchange_strong(known, own.get(), std::memory_order_acq_rel)) return *own.release();
  return *known;  // another thread was here first
}

std::unique_ptr<Workspace> Engine::make_workspace() const {
  auto ws = std::make_unique<Workspace>();
  for (const Buffer &b : buffers_) {
    const size_t n = b.floats ? size_t(b.channels) * b.layout.plane : 0;
    const size_t sums = size_t(sum_slots()) * b.channels * kSumLanes;
    ws->memory.emplace_back(ws->arena.take(n), n);
    const size_t pairs = b.pairs ? size_t(b.channels + 1) / 2 * b.layout.plane : 0;
    ws->words.push_back(reinterpret_cast<uint32_t *>(ws->arena.take(pairs)));
    ws->sums.emplace_back(ws->arena.take(sums), sums);
    ws->slots.emplace_back(b.channels, 1);
  }
  ws->claims = std::make_unique<Claim[]>(threads_);
  ws->active.resize(values_.size());
  for (size_t v = 0; v < values_.size(); ++v) {
    ws->active[v].list.assign(values_[v].channels + 1, 0);
    ws->active[v].on.assign(values_[v].channels, 0);
    if (values_[v].pairing != Pairing::kNone) ws->active[v].pair.assign((values_[v].channels + 1) / 2 + 1, 0);
  }
  ws->staging = Floats(ws->arena.take(staging_), staging_);
  ws->zeros = Floats(longest_ + kSlack);
  for (Floats *f : {&ws->q, &ws->scale, &ws->shift}) *f = Floats(widest_ + kRound);
  for (Floats *f : {&ws->p, &ws->r, &ws->h}) *f = Floats(size_t(threads_) * round_up(widest_, kRound));
  for (auto *v : {&ws->keys, &ws->group_keys, &ws->rows, &ws->only}) v->assign(widest_ + 1, 0);
  ws->xoff.assign(most_steps_ + kAhead, 0);
  ws->woff.assign(most_steps_, 0);
  ws->group_steps.assign(most_groups_ + 1, 0);
  ws->group_rows.assign(most_groups_ + 1, 0);
  ws->bits.assign(widest_ / 32 + 1, 0);
  ws->pointers.resize(threads_);
  for (auto &p : ws->pointers) {
    p.w.assign(widest_ + kMaxRows, nullptr);
    p.res.assign(widest_, nullptr);
    p.out.assign(widest_, nullptr);
    p.sum.assign(widest_, nullptr);
    p.half.assign(widest_, Half{});
    p.res_half.assign(widest_, Half{});
    if (pairs_) p.line = Floats(longest_ + kSlack);
    p.picked.assign(picked_, 0);
    p.wide = Floats(wide_);
    p.transposed = Floats(transposed_);
    p.panel = Floats(panel_);
    if (amx_)
      for (auto *v : {&p.pair, &p.res_pair}) v->assign((widest_ + 1) / 2, nullptr);
  }
  ws->chosen_weights = Floats(chosen_);
  ws->macs.assign(ops_.size(), 0);
  ws->seconds.assign(ops_.size() * kParts, 0.0);
  ws->chosen.resize(ops_.size());
  return ws;
}

size_t Engine::workspace_bytes() const {
  size_t n = staging_;
  for (const Buffer &b : buffers_) {
    n += size_t(b.channels) * ((b.floats ? b.layout.plane : 0) + sum_slots() * kSumLanes);
    if (b.pairs) n += size_t(b.channels + 1) / 2 * b.layout.plane;
  }
  return n * sizeof(float);
}

std::unique_ptr<Workspace> Engine::take(Crew &crew) const {
  {
    std::lock_guard<std::mutex> lock(crew.mutex);
    if (!crew.idle.empty()) {
      auto ws = std::move(crew.idle.back());
      crew.idle.pop_back();
      return ws;
    }
  }
  return make_workspace();
}

void Engine::give(Crew &crew, std::unique_ptr<Workspace> ws) {
  std::lock_guard<std::mutex> lock(crew.mutex);
  crew.idle.push_back(std::move(ws));
}

void Engine::run(const float *x, int batch, float *out) { run_counted(x, batch, out, nullptr); }

void Engine::run_counted(const float *x, int batch, float *out, int64_t *macs) {
  Crew &crew = this->crew();
  Team &team = crew.team;
  const bool together = batch < threads_;  // all threads on one image after the other, or each on images of its own
  if (team.most() == 1) {                  // calls from several threads need not wait for each other
    auto ws = take(crew);
    const Run run{*ws, 0, together ? threads_ : 1, nullptr};
    for (int64_t i = 0; i < steps(batch); ++i) step(run, i, x, out, macs);
    return give(crew, std::move(ws));
  }
  std::lock_guard<std::mutex> turn(crew.turn);
  if (together) {
    auto ws = take(crew);
    team.in_step(steps(batch), [&](int t, int64_t i) { step(Run{*ws, t, threads_, &team}, i, x, out, macs); });
    return give(crew, std::move(ws));
  }
  std::vector<std::unique_ptr<Workspace>> own;
  for (int t = 0; t < team.most(); ++t) own.push_back(take(crew));
  std::atomic<int> next{0};
  team.apart([&](int t) {
    const Run run{*own[t], 0, 1, nullptr};
    for (int b; (b = next.fetch_add(1)) < batch;)
      for (int64_t i = steps(b); i < steps(b + 1); ++i) step(run, i, x, out, macs);
  });
  for (auto &ws : own) give(crew, std::move(ws));
}

void Engine::run_profiled(const float *x, int batch, float *out, double *seconds) {
  Crew &crew = this->crew();
  Team &team = crew.team;
  std::lock_guard<std::mutex> turn(crew.turn);
  auto ws = take(crew);
  ws->profile = true;
  std::fill(ws->seconds.begin(), ws->seconds.end(), 0.0);
  team.in_step(steps(batch), [&](int t, int64_t i) {
    const Run run{*ws, t, threads_, &team};
    const int op = static_cast<int>(i % (ops() + 1)) - 1;  // -1: the image is loaded
    if (i > 0 && op != 0) Watch(run, (op < 0 ? ops() : op) - 1, ws->done).lap(kWait);  // for the others, in the step before
    step(run, i, x, out, nullptr);
    if (t == 0) ws->done = std::chrono::steady_clock::now();
  });
  Watch(Run{*ws, 0, threads_, &team}, ops() - 1, ws->done).lap(kWait);
  ws->profile = false;
  std::copy(ws->seconds.begin(), ws->seconds.end(), seconds);
  give(crew, std::move(ws));
}

void Engine::run_recorded(const float *x, float *out, std::vector<std::vector<int32_t>> &chosen) {
  Crew &crew = this->crew();
  Team &team = crew.team;
  std::lock_guard<std::mutex> turn(crew.turn);
  auto ws = take(crew);
  ws->record = true;
  team.in_step(steps(1), [&](int t, int64_t i) { step(Run{*ws, t, threads_, &team}, i, x, out, nullptr); });
  ws->record = false;
  chosen = ws->chosen;
  give(crew, std::move(ws));
}

void Engine::step(const Run &run, int64_t step, const float *x, float *out, int64_t *macs) const {
  const int64_t b = step / (ops() + 1);
  const int op = static_cast<int>(step % (ops() + 1)) - 1;
  if (op < 0) return load(run, x + size_t(b) * channels() * height() * width());
  const int j = ops_[op].index;
  switch (ops_[op].kind) {
    case Op::kConv: conv(run, convs_[j], op); break;
    case Op::kPool: pool(run, pools_[j], op); break;
    case Op::kMean: mean(run, means_[j], op); break;
    case Op::kAdd: add(run, adds_[j], op); break;
    case Op::kSe: se(run, ses_[j], op); break;
    case Op::kLinear: linear(run, linears_[j], op, out + size_t(b) * classes_); break;
  }
  if (macs && op + 1 == ops() && run.t == 0) std::copy(run.ws.macs.begin(), run.ws.macs.end(), macs + b * ops());
}

void Engine::load(const Run &run, const float *x) const {
  const Layout &l = layout(input_);
  const int n = values_[input_].channels;
  if (run.t == 0) {
    set_all(run.ws, input_);
  }
  run.wait();  // which pairs there are
  if (!values_[input_].floats) return load_pairs(run, x);
  run.parts([&](int part) {
    const Share mine = share(l.height, part, run.n);
    for (int c = 0; c < n; ++c) {
      float *to = plane(run.ws, input_, c), *s = sum(run.ws, input_, c, part);
      std::fill(s, s + kSumLanes, 0.0f);
      if (part == 0) slots(run.ws, input_, c) = run.n;
      for (int y = mine.begin; y < mine.end; ++y) {
        const float *row = x + (size_t(c) * l.height + y) * l.width;
        float *at = to + y * l.pitch;
        std::memcpy(at, row, sizeof(float) * l.width);
        if (values_[input_].pooled) {
          float lanes[kSumLanes] = {};
          int i = 0;
          for (; i + kSumLanes <= l.width; i += kSumLanes)
            for (int j = 0; j < kSumLanes; ++j) lanes[j] += row[i + j];
          for (; i < l.width; ++i) lanes[0] += row[i];
          for (int j = 0; j < kSumLanes; ++j) s[j] += lanes[j];
        }
      }
      if (values_[input_].pairing != Pairing::kNone && mine.size()) {  // with the zeros between the rows
        Half to = half(run.ws, input_, c, c);
        const int first = mine.begin * l.pitch;
        to.words += first;
        table_.halve(to, plane(run.ws, input_, c) + first, (mine.size() - 1) * l.pitch + l.width);
      }
    }
  });
}

// Of an image that only products of pairs read.
void Engine::load_pairs(const Run &run, const float *x) const {
  const Layout &l = layout(input_);
  const int n = values_[input_].channels;
  run.parts([&](int part) {
    const Share mine = share(l.height, part, run.n);
    for (int c = 0; c < n; c += 2) {
      float sums[2 * kSumLanes] = {};
      for (int y = mine.begin; y < mine.end; ++y) {
        const float *lower = x + (size_t(c) * l.height + y) * l.width;
        const float *upper = c + 1 < n ? lower + size_t(l.height) * l.width : nullptr;
        table_.pair_rows(words(run.ws, input_, c / 2) + y * l.pitch, lower, upper, l.width, sums);
      }
      for (int k = c; k < std::min(c + 2, n); ++k) {
        if (part == 0) slots(run.ws, input_, k) = run.n;
        std::copy(sums + (k - c) * kSumLanes, sums + (k - c + 1) * kSumLanes, sum(run.ws, input_, k, part));
      }
    }
  });
}

Half Engine::half(Workspace &ws, int value, int i, int c) const {
  const Active &a = ws.active[value];
  const int place = a.by_list ? i : c, other = place ^ 1;
  const bool alone = a.by_list ? other >= a.n : other >= values_[value].channels || !a.on[other];
  const bool upper = place & 1;
  return {words(ws, value, place / 2), alone ? 0u : upper ? 0xffffu : 0xffff0000u, upper ? 16 : 0};
}

// One thread, when the active channels are known.
void Engine::set_pairs(Workspace &ws, int value) const {
  const Value &v = values_[value];
  if (v.pairing == Pairing::kNone) return;
  Active &a = ws.active[value];
  a.n_pairs = 0;
  for (int i = 0; i < a.n; ++i) {
    const int p = a.list[i] / 2;
    if (a.n_pairs == 0 || a.pair[a.n_pairs - 1] != p) a.pair[a.n_pairs++] = p;
  }
  // By the list every word is full, but weights have to be picked for each image.
  const int full = (a.n + 1) / 2;
  a.by_list = v.pairing == Pairing::kFree && !a.whole && a.n_pairs * 8 > full * 9;
  if (!a.by_list) return;
  a.n_pairs = full;
  for (int p = 0; p < full; ++p) a.pair[p] = p;
}

void Engine::set_all(Workspace &ws, int value) const {
  const int n = values_[value].channels;
  Active &a = ws.active[value];
  if (a.n == n) return;  // as it was after the image before
  std::fill(a.on.begin(), a.on.end(), 1);
  std::copy(first_.begin(), first_.begin() + n, a.list.begin());
  a.n = n;
  set_pairs(ws, value);
}

void Engine::pooled(const Run &run, int value, int begin, int end, float *p) const {
  const Active &a = run.ws.active[value];
  const Layout &l = layout(value);
  const float area = 1.0f / (float(l.height) * l.width);
  for (int i = begin; i < end; ++i) {
    float lanes[kSumLanes] = {};
    const int n = slots(run.ws, value, a.list[i]);
    for (int slot = 0; slot < n; ++slot) {
      const float *s = sum(run.ws, value, a.list[i], slot);
      for (int j = 0; j < kSumLanes; ++j) lanes[j] += s[j];
    }
    for (int half = kSumLanes / 2; half; half /= 2)
      for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    p[i] = lanes[0] * area;
  }
}

void Engine::copy_active(Workspace &ws, int from, int to) const {
  if (from == to) return;
  const Active &a = ws.active[from];
  Active &b = ws.active[to];
  b.n = a.n, b.whole = false;
  std::copy(a.list.begin(), a.list.begin() + a.n, b.list.begin());
  std::copy(a.on.begin(), a.on.end(), b.on.begin());
  set_pairs(ws, to);
}

}  // namespace afds
