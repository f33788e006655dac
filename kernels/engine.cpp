#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace afds {

namespace {

using Clock = std::chrono::steady_clock;

Share share(int total, int t, int n) {
  return {static_cast<int>(int64_t(total) * t / n), static_cast<int>(int64_t(total) * (t + 1) / n)};
}

Share share_lines(int floats, int t, int n) {  // whole cache lines, so that two threads write none in common
  const Share s = share((floats + kRound - 1) / kRound, t, n);
  return {std::min(floats, s.begin * kRound), std::min(floats, s.end * kRound)};
}

// The first boundary from `at` on that does not cut a pair in two: two threads may not write halves of one word.
template <typename PairOf>
int whole(Share all, int at, const PairOf &pair) {
  while (at > all.begin && at < all.end && pair(at) == pair(at - 1)) ++at;
  return at;
}

template <typename PairOf>
Share share_pairs(int total, int t, int n, const PairOf &pair) {
  const Share s = share(total, t, n);
  return {whole({0, total}, s.begin, pair), whole({0, total}, s.end, pair)};
}

struct Steps {  // `total` in `parts` of nearly equal size, the larger ones first; no division in the loop
  int unit, small, larger;
  Steps(int total, int parts, int unit = 1)
      : unit(unit), small(total / unit / parts), larger(total / unit - small * parts) {}
  Share operator[](int i) const {
    const int begin = i * small + std::min(i, larger);
    return {begin * unit, (begin + small + (i < larger)) * unit};
  }
};

constexpr int kChunk = 1024;  // rows of a matrix-vector product handed over at a time
constexpr size_t kSlack = 4 * kRound;  // floats behind each array: the loops over pixels read whole vectors

int round_up(int n, int to) { return (n + to - 1) / to * to; }

// An odd number of cache lines: the taps and rows of a tile, read side by side, would else meet in the same few sets.
int odd_lines(int n) { return ((n + kRound - 1) / kRound | 1) * kRound; }

void check(bool good, const std::string &what) {
  if (!good) throw std::invalid_argument("plan: " + what);
}

// Time of one product step of an r x v tile, in units of one fused multiply-add a cycle: two of them and two loads
// start each cycle, an unaligned load counts twice, and a sum waits four cycles for its last.
float step_cost(int r, int v) {
  return std::max({r * v * 0.5f, (r + 2 * v + 2) * 0.5f, 4.0f}) + 0.25f;
}

// Cycles that a cache line costs beside the product: of features that another core has just written, and of weights,
// whose rows lie far apart. Measured with two threads on ResNet-50.
constexpr float kFarPixels = 4.0f, kFarWeights = 16.0f;

// Floats of weights that stay in the first cache beside what else is read.
constexpr int kNear = 4096;

// Floats of pixels that stay in the second cache while rows of weights pass by; the fewest steps that are worth bringing
// the sums in and out once more.
constexpr int kSecond = 64 * 1024, kFewestSteps = 256;

// Of a layer whose channels are lanes: cycles to bring one output into its plane, and how much faster such a layer's
// product has to look: on a Zen 3, 4 x 4 maps looked 1.46 times as fast and were level, 3 x 3 maps 1.65 times and were
// faster.
constexpr float kTransposed = 3.0f, kWorth = 1.5f;

struct Split {
  int rows, vecs;
  float cost;
};

// Parts of nearly equal size: how a count is cut into at most `most` at a time.
float parts_cost(int total, int most, int other, bool rows) {
  const int parts = (total + most - 1) / most, small = total / parts, large = total - small * parts;
  auto one = [&](int n) { return rows ? step_cost(n, other) : step_cost(other, n); };
  return large * (large ? one(small + 1) : 0.0f) + (parts - large) * one(small);
}

// unit: 2 where rows go in pairs, of which none is to be cut, else 1.
Split best_split(const Table &table, int rows, int vecs, int unit = 1) {
  Split best{1, 1, 1e30f};
  for (int r = unit; r <= std::min(rows, kMaxRows); r += unit) {
    int most = 0;
    for (int v = 1; v <= kMaxVecs; ++v)
      if (table.tile[kPlain][r][v]) most = v;
    if (!most) continue;
    const int row_parts = (rows + r - 1) / r, small = rows / unit / row_parts, large = rows / unit - small * row_parts;
    float cost = (row_parts - large) * parts_cost(vecs, most, small * unit, false);
    if (large) cost += large * parts_cost(vecs, most, (small + 1) * unit, false);
    if (cost < best.cost) best = {r, most, cost};
  }
  return best;
}

}  // namespace

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

namespace {

#if defined(__x86_64__) || defined(_M_X64)
bool has_dot() { return __builtin_cpu_supports("avx512bf16"); }
bool has_pick() { return __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("popcnt"); }
#endif

// Seconds of one middling tile, all of it in the first cache.
double time_tile(TileFn tile) {
  constexpr int kRows = 6, kVecs = 4, kSteps = 128, kPlane = kVecs * 16;
  Floats x(kPlane * 8), w(kSteps), out(kPlane * kRows);
  std::vector<uint32_t> mask(kPlane, 0);
  std::vector<int32_t> xoff(kSteps + kAhead), woff(kSteps + kAhead);
  for (int i = 0; i < kSteps; ++i) xoff[i] = i % 8 * kPlane, woff[i] = i;
  const float *rows[kRows], *fetch[8] = {};
  float *outs[kRows], factor[kRows] = {};
  for (int r = 0; r < kRows; ++r) rows[r] = w.data(), outs[r] = out.data() + r * kPlane;
  Tile t{};
  t.x = x.data(), t.xoff = xoff.data(), t.woff = woff.data(), t.steps = kSteps, t.w = rows, t.scale = t.shift = factor;
  t.out = outs, t.mask = mask.data(), t.fetch = fetch;
  double best = 1.0;
  for (int i = 0; i < 20; ++i) {  // the least of many: something else may run in between
    const auto start = Clock::now();
    tile(t);
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

const PairTable &choose_pairs(const std::string &isa, const Table &table) {
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == kPairsDot.name) return kPairsDot;
  if (&table == &kTableAvx512) {
    // Some CPUs do 32 products an instruction in half the time of 16 in float32, others in four times as much.
    if (isa == "auto" && has_dot() &&
        time_tile(kPairsDot.tile[kPlain][6][4]) < time_tile(kPairsAvx512.tile[kPlain][6][4]))
      return kPairsDot;
    return kPairsAvx512;
  }
  if (&table == &kTableAvx2) return kPairsAvx2;
#endif
  (void)isa, (void)table;
  return kPairsBase;
}

// Of from[0..n), those whose bit is set in `on`, one after the other; writes up to 31 numbers more.
void pick(uint16_t *to, const uint16_t *from, int n, const uint32_t *on, const int32_t *list, int picked) {
#if defined(__x86_64__) || defined(_M_X64)
  static const bool fast = has_pick();
  if (fast) return pick_vbmi2(to, from, n, on);
#endif
  (void)n, (void)on;
  for (int i = 0; i < picked; ++i) to[i] = from[list[i]];
}

}  // namespace

std::vector<std::string> usable_tables(bool bf16) {
  std::vector<std::string> names;
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  if (bf16 && has_dot()) names.push_back(kPairsDot.name);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
    names.push_back(kTableAvx512.name);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.push_back(kTableAvx2.name);
#endif
  names.push_back(kTableBase.name);
  return names;
}

const Table &choose_table(const std::string &isa, bool bf16) {
  const auto usable = usable_tables(bf16);
  const std::string name = isa == "auto" ? usable_tables(false).front() : isa;
  if (std::find(usable.begin(), usable.end(), name) != usable.end()) {
#if defined(__x86_64__) || defined(_M_X64)
    if (name == kTableAvx512.name || name == kPairsDot.name) return kTableAvx512;
    if (name == kTableAvx2.name) return kTableAvx2;
#endif
    return kTableBase;
  }
  std::string all;
  for (const auto &n : usable) all += (all.empty() ? "" : ", ") + n;
  throw std::invalid_argument("this CPU cannot run the instruction set " + isa + "; it can run: " + all);
}

Engine::Engine(int threads, const std::string &isa, bool bf16)
    : table_(choose_table(isa, bf16)),
      pairs_(bf16 ? &choose_pairs(isa, table_) : nullptr),
      threads_(threads),
      pool_(threads) {}

// ---------------------------------------------------------------- building

int Engine::check_value(int v) const {
  check(v >= 0 && v < static_cast<int>(values_.size()), "no value " + std::to_string(v));
  return v;
}

int Engine::add_buffer(const Layout &layout, int channels) {
  Buffer b;
  b.layout = layout;
  Layout &l = b.layout;
  check(l.height > 0 && l.width > 0 && l.pitch >= l.width && channels > 0, "a buffer's sizes");
  check(int64_t(l.plane) * channels < (int64_t(1) << 31), "a buffer of 2^31 numbers or more");
  l.pixels = round_up((l.height - 1) * l.pitch + l.width, kRound);
  check(l.lead >= 0 && l.lead % kRound == 0 && l.plane % kRound == 0 && l.plane >= l.lead + l.pixels,
        "a buffer's planes");
  b.channels = channels;
  b.mask.assign(l.pixels, 0);
  for (int y = 0; y < l.height; ++y)
    for (int x = 0; x < l.width; ++x) b.mask[y * l.pitch + x] = ~0u;
  longest_ = std::max(longest_, l.plane);
  buffers_.push_back(std::move(b));
  return static_cast<int>(buffers_.size()) - 1;
}

int Engine::add_value(const Value &v) {
  check(v.buffer >= 0 && v.buffer < static_cast<int>(buffers_.size()), "no buffer " + std::to_string(v.buffer));
  Buffer &b = buffers_[v.buffer];
  check(v.channels > 0 && v.channels <= b.channels, "a value wider than its buffer");
  b.floats |= v.floats;
  b.pairs |= v.pairing != Pairing::kNone;
  values_.push_back(v);
  full_.push_back(false);
  widest_ = std::max(widest_, v.channels);
  for (int k = static_cast<int>(first_.size()); k < v.channels; ++k) first_.push_back(k);
  return static_cast<int>(values_.size()) - 1;
}

void Engine::set_input(int value) {
  check(values_[check_value(value)].floats, "an input that is not in float32");
  input_ = value;
  full_[value] = true;
}

void Engine::check_ready() const { check(input_ >= 0 && classes_ > 0, "no input or no classifier yet"); }

int Engine::channels() const { return values_[input_].channels; }
int Engine::height() const { return layout(input_).height; }
int Engine::width() const { return layout(input_).width; }

// [rows][columns] with each row padded to whole cache lines.
void Engine::pad_rows(Floats &w, int rows, int columns) {
  const int pitch = round_up(columns, kRound);
  if (pitch == columns) {
    w = arena_.keep(w);
    return;
  }
  Floats out(arena_.take(size_t(rows) * pitch), size_t(rows) * pitch);
  for (int r = 0; r < rows; ++r)
    std::copy(w.data() + size_t(r) * columns, w.data() + size_t(r + 1) * columns, out.data() + size_t(r) * pitch);
  w = std::move(out);
}

PredictorRows Engine::pack_rows(Floats w, int rows, int columns) {
  PredictorRows out;
  out.pitch = round_up(columns, kRound);
  const size_t n = size_t(rows) * columns, size = size_t(rows) * out.pitch;
  auto bits = [&](size_t i) {
    uint32_t b;
    std::memcpy(&b, w.data() + i, sizeof b);
    return b;
  };
  bool fits = true;
  for (size_t i = 0; i < n && fits; ++i) fits = (bits(i) & 0xffff) == 0;
  if (!fits) {
    pad_rows(w, rows, columns);
    out.f32 = w.data();
    return out;
  }
  auto *to = reinterpret_cast<uint16_t *>(arena_.take(size / 2));
  for (int r = 0; r < rows; ++r) {
    uint16_t *row = to + size_t(r) * out.pitch;
    for (int j = 0; j < columns; ++j) row[j] = static_cast<uint16_t>(bits(size_t(r) * columns + j) >> 16);
    std::fill(row + columns, row + out.pitch, uint16_t(0));
  }
  out.bf16 = to;
  return out;
}

void Engine::add_conv(Conv c, int kh, int kw, int stride, int pad_h, int pad_w, int dilation) {
  check_value(c.x), check_value(c.y);
  check(c.in == values_[c.x].channels && c.out == values_[c.y].channels, c.name + ": channels");
  check(kh > 0 && kw > 0 && stride > 0 && dilation > 0 && pad_h >= 0 && pad_w >= 0, c.name + ": geometry");
  check(c.groups > 0 && c.in % c.groups == 0 && c.out % c.groups == 0, c.name + ": groups");
  const Layout &in = layout(c.x), &out = layout(c.y);
  auto side = [&](int n, int k, int pad) { return (n + 2 * pad - dilation * (k - 1) - 1) / stride + 1; };
  check(out.height == side(in.height, kh, pad_h) && out.width == side(in.width, kw, pad_w), c.name + ": output size");
  c.taps = kh * kw;
  const size_t row = size_t(c.in / c.groups) * c.taps;
  check((c.halves || c.weight.size() == row * c.out) && c.bias.size() == size_t(c.out), c.name + ": weights");
  check(row < (size_t(1) << 31), c.name + ": weights");
  const Value &x = values_[c.x], &y = values_[c.y];
  if (c.res >= 0) {
    const Value &res = values_[check_value(c.res)];
    check(res.channels == c.out && layout(c.res) == out, c.name + ": residual");
    check(res.floats && y.floats && y.pairing != Pairing::kFree, c.name + ": a residual that is not in float32");
    check(res.pairing != Pairing::kNone || y.pairing == Pairing::kNone || !untouched(c), c.name + ": residual's pairs");
  }
  if (c.halves) {
    check(pairs_, c.name + ": bf16 weights in a plan of float32");
    check(x.pairing != Pairing::kNone && c.factor.size() == size_t(c.out), c.name + ": pairs");
    check(c.groups == 1 || (c.in / c.groups % 2 == 0 && x.pairing == Pairing::kNumbers), c.name + ": pairs of groups");
  } else {
    check(x.floats, c.name + ": an input that is not in float32");
  }
  c.stride = stride;
  auto floor_div = [](int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); };
  const bool direct = stride == 1 && in.pitch == out.pitch && in.height == out.height && in.width == out.width;
  c.staged = !direct;
  int low = 0, high = 0, top = 0, right = 0;
  std::vector<int> phase_of(stride * stride, -1);
  c.tap.clear();
  for (int dy = 0; dy < kh; ++dy)
    for (int dx = 0; dx < kw; ++dx) {
      const int qy = dy * dilation - pad_h, qx = dx * dilation - pad_w;
      const int sy = floor_div(qy, stride), sx = floor_div(qx, stride);
      const int phase = (qy - sy * stride) * stride + (qx - sx * stride);
      if (phase_of[phase] < 0) {
        phase_of[phase] = static_cast<int>(c.phases.size());
        c.phases.push_back(phase);
      }
      const int offset = sy * out.pitch + sx;
      c.tap.push_back({phase_of[phase], offset});
      low = std::min(low, offset), high = std::max(high, offset);
      top = std::max(top, sy), right = std::max(right, sx);
    }
  // What a row reads left and right of itself must be the padding between rows, of which the pitch is to leave enough.
  const int left = -floor_div(-pad_w, stride);
  const int columns = std::min((in.width + stride - 1) / stride, out.width + right);
  check(out.pitch >= std::max(out.width + right, columns + left), c.name + ": pitch");
  if (direct) {
    check(in.lead + low >= 0 && in.lead + in.pixels + high <= in.plane, c.name + ": padding");
    c.phases.clear();
  } else {
    Layout &s = c.stage;
    s.height = std::min((in.height + stride - 1) / stride, out.height + top);
    s.width = columns;
    s.pitch = out.pitch;
    s.lead = round_up(-low, kRound);
    s.plane = round_up(s.lead + std::max(out.pixels + high, s.height * s.pitch + kRound), kRound);
    if (s.plane / kRound % 2 == 0) s.plane += kRound;
    const int64_t size = int64_t(s.plane) * c.in * c.phases.size();
    check(size < (int64_t(1) << 31), c.name + ": staging");
    staging_ = std::max(staging_, size_t(size));
    longest_ = std::max(longest_, s.plane);
  }
  if (c.rows == Rows::kDynamic) {
    Gate &g = c.gate;
    const size_t n = g.dynamic.size(), in_rows = g.rank ? g.rank : c.in;
    check(g.bias.size() == n && g.weight.size() == n * in_rows, c.name + ": predictor");
    check(g.rank == 0 || g.reduce.size() == size_t(c.in) * g.rank, c.name + ": low-rank predictor");
    check(g.constant.size() == size_t(c.out) && g.importance.size() == size_t(c.out) &&
              g.sign.size() == size_t(c.out) && g.scaled.size() == size_t(c.out) && c.beta.size() == size_t(c.out),
          c.name + ": gate");
    check(g.k >= 1 && g.k <= c.out, c.name + ": k");
    for (int32_t k : g.dynamic) check(k >= 0 && k < c.out, c.name + ": dynamic");
    check(values_[c.x].pooled, c.name + ": its input is not pooled");
    widest_ = std::max({widest_, g.rank, static_cast<int>(n)});
    check(g.scale.size() == size_t(c.in), c.name + ": predictor's scale");
    g.weight_rows = pack_rows(std::move(g.weight), static_cast<int>(in_rows), static_cast<int>(n));
    if (g.rank) g.reduce_rows = pack_rows(std::move(g.reduce), c.in, g.rank);
  }
  if (c.rows == Rows::kFixed)
    for (size_t i = 0; i < c.fixed.size(); ++i)
      check(c.fixed[i] >= 0 && c.fixed[i] < c.out && (i == 0 || c.fixed[i] > c.fixed[i - 1]), c.name + ": rows");
  if (c.rows == Rows::kFollow) check(c.in == c.out, c.name + ": a depthwise unit with other channels");
  if (c.halves) {
    const int width = c.in / c.groups;
    const size_t lines = size_t(c.out) * c.taps;
    c.columns = (width + 1) / 2 * 2;
    auto *kept = reinterpret_cast<uint16_t *>(arena_.take((lines * c.columns + 1) / 2));
    for (size_t i = 0; i < lines; ++i)
      std::memcpy(kept + i * c.columns, c.halves + i * width, sizeof(uint16_t) * width);
    c.halves = kept;
    const size_t most = size_t(kMaxRows) * c.taps * odd_lines(c.columns / 2) * 2;
    if (!pairs_->words) wide_ = std::max(wide_, most + kRound);
    if (x.pairing == Pairing::kFree) picked_ = std::max(picked_, most + 64);
    const int plane = plane_of(c), tap_width = pairs_->words ? c.columns / 2 : odd_lines(c.columns / 2);
    for (int i = 0; i < (c.in + 1) / 2; ++i)
      for (int t = 0; t < c.taps; ++t) {
        c.all_xoff.push_back(i * plane + c.tap[t].offset + (c.staged ? c.tap[t].phase * c.stage.plane : 0));
        c.all_woff.push_back(t * tap_width + i % (c.columns / 2));
      }
  } else {
    const int per_in = c.in / c.groups, plane = plane_of(c);
    for (int i = 0; i < c.in; ++i)
      for (int t = 0; t < c.taps; ++t) {
        c.all_xoff.push_back(i * plane + c.tap[t].offset + (c.staged ? c.tap[t].phase * c.stage.plane : 0));
        c.all_woff.push_back(i % per_in * c.taps + t);
      }
  }
  c.all_xoff.resize(c.all_xoff.size() + kAhead);
  if (!c.halves) {
    set_lanes(c);
    if (c.streams.size() && c.rows == Rows::kAll && full_[c.x]) c.weight = Floats();
    else c.weight = arena_.keep(c.weight);
  }
  full_[c.y] = c.rows == Rows::kAll || (c.rows == Rows::kFollow && full_[c.x]);
  if (c.rows == Rows::kAll) {
    c.all_scale = Floats(c.out);
    for (int k = 0; k < c.out; ++k) c.all_scale[k] = c.halves ? c.factor[k] : 1.0f;
  }
  if (c.rows == Rows::kDynamic) c.gate.n_scaled = std::count_if(c.gate.scaled.begin(), c.gate.scaled.end(), [](uint8_t b) { return b != 0; });
  most_steps_ = std::max(most_steps_, c.in * c.taps);
  most_groups_ = std::max(most_groups_, c.groups);
  widest_ = std::max(widest_, c.out);
  names_.push_back(c.name);
  ops_.push_back({Op::kConv, static_cast<int>(convs_.size())});
  convs_.push_back(std::move(c));
}

// On a map of few pixels most lanes of a vector would hold padding. There the output channels are the lanes and the
// pixels the scalars, of the same tiles: the weights, in the order of the product's steps, are a stream that is read
// once for a dozen pixels. That needs rows and inputs that are always the same.
//
//   acc[pixel][v] += x[step, pixel] * stream[step][v]
void Engine::set_lanes(Conv &c) {
  const Layout &out = layout(c.y);
  const bool all = c.rows == Rows::kAll || (c.rows == Rows::kDynamic && c.gate.k == c.out);
  if (c.groups > 1 || !all || !values_[c.y].floats || values_[c.y].pairing != Pairing::kNone) return;
  const int lanes = table_.lanes, steps = c.in * c.taps, pixels = out.height * out.width;
  const int vecs = (c.out + lanes - 1) / lanes, flat = ((out.height - 1) * out.pitch + out.width + lanes - 1) / lanes;
  auto part = [&](int n) { return (n + threads_ - 1) / threads_; };
  const Split split = best_split(table_, pixels, part(vecs));
  const float other =
      std::min(best_split(table_, part(c.out), flat).cost, best_split(table_, c.out, part(flat)).cost);
  if ((split.cost + kTransposed * pixels * part(c.out) / steps) * kWorth >= other) return;
  for (int t = 0; t < threads_; ++t) {
    const Share mine = share(vecs, t, threads_);
    const int parts = (mine.size() + split.vecs - 1) / split.vecs;
    const Steps part_of(mine.size(), std::max(1, parts));
    for (int i = 0; i < parts; ++i) {
      const Share block{mine.begin + part_of[i].begin, mine.begin + part_of[i].end};
      c.blocks.push_back({block, best_split(table_, pixels, block.size()).rows});
    }
  }
  const size_t size = size_t(steps) * vecs * lanes;
  c.streams = Floats(arena_.take(size), size);
  float *to = c.streams.data();
  for (const Block &block : c.blocks)
    for (int s = 0; s < steps; ++s)
      for (int k = block.vecs.begin * lanes; k < block.vecs.end * lanes; ++k)
        *to++ = k < c.out ? c.weight[size_t(k) * steps + s] : 0.0f;
  for (int y = 0; y < out.height; ++y)
    for (int x = 0; x < out.width; ++x) c.at.push_back(y * out.pitch + x);
  for (const Block &block : c.blocks) {
    auto &stream = stream_[block.vecs.size()];
    for (int s = static_cast<int>(stream.size()); s < steps + kAhead; ++s)
      stream.push_back(s * block.vecs.size() * lanes);
  }
  if (ones_.size() < size_t(vecs) * lanes) ones_.assign(size_t(vecs) * lanes, ~0u);
  transposed_ = std::max(transposed_, size_t(pixels) * vecs * lanes + out.pixels + 2 * kSlack);
}

// Whether channels that only the residual branch brings are what they were, in the memory where they are.
bool Engine::untouched(const Conv &c) const {
  const bool in_place = values_[c.res].buffer == values_[c.y].buffer;
  return in_place && (c.act == kNone || (c.act == kRelu && c.res_nonnegative));
}

void Engine::check_floats(int x, int y, const std::string &name) const {
  check(values_[x].floats && values_[y].floats && values_[y].pairing != Pairing::kFree,
        name + ": a value that is not in float32");
}

void Engine::add_pool(PoolOp p) {
  check(values_[check_value(p.x)].channels == values_[check_value(p.y)].channels, p.name + ": channels");
  const Layout &in = layout(p.x), &out = layout(p.y);
  check(values_[p.x].buffer != values_[p.y].buffer, p.name + ": cannot run in place");
  check_floats(p.x, p.y, p.name);
  check(p.kernel > 0 && p.stride > 0 && p.pad >= 0 && p.pad < p.kernel, p.name + ": geometry");
  auto fits = [&](int n_in, int n_out) {
    return n_out > 0 && (n_out - 1) * p.stride - p.pad < n_in && (n_out - 1) * p.stride - p.pad + p.kernel > 0;
  };
  check(fits(in.height, out.height) && fits(in.width, out.width), p.name + ": output size");
  names_.push_back(p.name);
  full_[p.y] = full_[p.x];
  ops_.push_back({Op::kPool, static_cast<int>(pools_.size())});
  pools_.push_back(std::move(p));
}

void Engine::add_mean(MeanOp m) {
  check(values_[check_value(m.x)].channels == values_[check_value(m.y)].channels && values_[m.x].pooled &&
            layout(m.y).height == 1 && layout(m.y).width == 1,
        m.name + ": shapes");
  check_floats(m.y, m.y, m.name);
  names_.push_back(m.name);
  full_[m.y] = full_[m.x];
  ops_.push_back({Op::kMean, static_cast<int>(means_.size())});
  means_.push_back(std::move(m));
}

void Engine::add_add(AddOp a) {
  check(values_[check_value(a.a)].channels == values_[check_value(a.y)].channels && layout(a.a) == layout(a.y),
        a.name + ": shapes");
  if (a.b >= 0)
    check(values_[check_value(a.b)].channels == values_[a.y].channels && layout(a.b) == layout(a.y),
          a.name + ": shapes");
  check_floats(a.a, a.y, a.name);
  if (a.b >= 0) check_floats(a.b, a.y, a.name);
  names_.push_back(a.name);
  full_[a.y] = full_[a.a] || (a.b >= 0 && full_[a.b]);
  ops_.push_back({Op::kAdd, static_cast<int>(adds_.size())});
  adds_.push_back(std::move(a));
}

void Engine::add_se(SqueezeExcite s) {
  check(values_[check_value(s.x)].buffer == values_[check_value(s.y)].buffer, s.name + ": runs in place");
  check(values_[s.x].channels == s.in && values_[s.y].channels == s.in && values_[s.x].pooled, s.name + ": input");
  check_floats(s.x, s.y, s.name);
  check(s.hidden > 0 && s.weight1.size() == size_t(s.in) * s.hidden && s.bias1.size() == size_t(s.hidden) &&
            s.weight2.size() == size_t(s.in) * s.hidden && s.bias2.size() == size_t(s.in),
        s.name + ": weights");
  widest_ = std::max(widest_, s.hidden);
  names_.push_back(s.name);
  full_[s.y] = full_[s.x];
  ops_.push_back({Op::kSe, static_cast<int>(ses_.size())});
  ses_.push_back(std::move(s));
}

void Engine::add_linear(Linear l) {
  check(classes_ == 0, l.name + ": a second classifier");
  check(values_[check_value(l.x)].channels == l.in && values_[l.x].pooled, l.name + ": input");
  check(l.out > 0 && l.weight.size() == size_t(l.in) * l.out && l.bias.size() == size_t(l.out), l.name + ": weights");
  classes_ = l.out;
  pad_rows(l.weight, l.in, l.out);
  widest_ = std::max(widest_, l.out);
  names_.push_back(l.name);
  ops_.push_back({Op::kLinear, static_cast<int>(linears_.size())});
  linears_.push_back(std::move(l));
}

// ---------------------------------------------------------------- running

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
  for (auto *v : {&ws->keys, &ws->rows, &ws->only}) v->assign(widest_ + 1, 0);
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
    p.picked.assign(picked_, 0);
    p.wide = Floats(wide_);
    p.transposed = Floats(transposed_);
  }
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

std::unique_ptr<Workspace> Engine::take() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      auto ws = std::move(idle_.back());
      idle_.pop_back();
      return ws;
    }
  }
  return make_workspace();
}

void Engine::give(std::unique_ptr<Workspace> ws) {
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(ws));
}

void Engine::run(const float *x, int batch, float *out) { run_counted(x, batch, out, nullptr); }

void Engine::run_counted(const float *x, int batch, float *out, int64_t *macs) {
  const size_t pixels = size_t(channels()) * height() * width(), n_ops = ops_.size();
  if (batch < threads_ || threads_ == 1) {  // all threads on one image after the other
    auto ws = take();
    pool_.run([&](int t) {
      const Run run{*ws, t, threads_, &pool_.barrier()};
      for (int b = 0; b < batch; ++b) {
        image(run, x + b * pixels, out + size_t(b) * classes_);
        if (macs && t == 0) std::copy(ws->macs.begin(), ws->macs.end(), macs + b * n_ops);
      }
    });
    return give(std::move(ws));
  }
  std::vector<std::unique_ptr<Workspace>> own;  // each thread on images of its own
  for (int t = 0; t < threads_; ++t) own.push_back(take());
  std::atomic<int> next{0};
  pool_.run([&](int t) {
    const Run run{*own[t], 0, 1, nullptr};
    for (int b; (b = next.fetch_add(1)) < batch;) {
      image(run, x + b * pixels, out + size_t(b) * classes_);
      if (macs) std::copy(own[t]->macs.begin(), own[t]->macs.end(), macs + b * n_ops);
    }
  });
  for (auto &ws : own) give(std::move(ws));
}

void Engine::run_profiled(const float *x, int batch, float *out, double *seconds) {
  const size_t pixels = size_t(channels()) * height() * width();
  auto ws = take();
  ws->profile = true;
  std::fill(ws->seconds.begin(), ws->seconds.end(), 0.0);
  pool_.run([&](int t) {
    const Run run{*ws, t, threads_, &pool_.barrier()};
    for (int b = 0; b < batch; ++b) image(run, x + b * pixels, out + size_t(b) * classes_);
  });
  ws->profile = false;
  std::copy(ws->seconds.begin(), ws->seconds.end(), seconds);
  give(std::move(ws));
}

void Engine::run_recorded(const float *x, float *out, std::vector<std::vector<int32_t>> &chosen) {
  auto ws = take();
  ws->record = true;
  pool_.run([&](int t) { image(Run{*ws, t, threads_, &pool_.barrier()}, x, out); });
  ws->record = false;
  chosen = ws->chosen;
  give(std::move(ws));
}

namespace {

struct Watch {  // seconds of thread 0, where they are asked for
  double *into;
  Clock::time_point last;
  Watch(const Run &run, int op) : into(run.ws.profile && run.t == 0 ? &run.ws.seconds[size_t(op) * kParts] : nullptr) {
    if (into) last = Clock::now();
  }
  void lap(Part part) {
    if (!into) return;
    const auto now = Clock::now();
    into[part] += std::chrono::duration<double>(now - last).count();
    last = now;
  }
};

}  // namespace

void Engine::image(const Run &run, const float *x, float *out) const {
  load(run, x);
  run.wait();
  for (size_t i = 0; i < ops_.size(); ++i) {
    const int op = static_cast<int>(i), j = ops_[i].index;
    switch (ops_[i].kind) {
      case Op::kConv: conv(run, convs_[j], op); break;
      case Op::kPool: pool(run, pools_[j], op); break;
      case Op::kMean: mean(run, means_[j], op); break;
      case Op::kAdd: add(run, adds_[j], op); break;
      case Op::kSe: se(run, ses_[j], op); break;
      case Op::kLinear: linear(run, linears_[j], op, out); break;
    }
    Watch watch(run, op);
    run.wait();
    watch.lap(kWait);
  }
}

void Engine::load(const Run &run, const float *x) const {
  const Layout &l = layout(input_);
  const int n = values_[input_].channels;
  if (run.t == 0) {
    set_all(run.ws, input_);
  }
  run.wait();  // which pairs there are
  const Share mine = share(l.height, run.t, run.n);
  for (int c = 0; c < n; ++c) {
    float *to = plane(run.ws, input_, c), *s = sum(run.ws, input_, c, run.t);
    std::fill(s, s + kSumLanes, 0.0f);
    if (run.t == 0) slots(run.ws, input_, c) = run.n;
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
  a.by_list = v.pairing == Pairing::kFree && a.n_pairs * 8 > full * 9;
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
  b.n = a.n;
  std::copy(a.list.begin(), a.list.begin() + a.n, b.list.begin());
  std::copy(a.on.begin(), a.on.end(), b.on.begin());
  set_pairs(ws, to);
}

void Engine::conv(const Run &run, const Conv &c, int op) const {
  Watch watch(run, op);
  if (c.rows == Rows::kDynamic) predict(run, c);
  watch.lap(kPredictor);
  if (c.staged) stage(run, c);
  run.wait([&] { choose(run, c, op); });
  watch.lap(kSelect);
  tiles(run, c);
  watch.lap(kConvolve);
  if (c.res >= 0 && run.ws.n_only && values_[c.y].pairing != Pairing::kNone && !untouched(c))
    run.wait();  // it writes other halves of words
  finish(run, c);
  watch.lap(kRest);
}

float *Engine::part(Floats &of, int t) const { return of.data() + size_t(t) * round_up(widest_, kRound); }

// h = W p + b in parts, one a thread: each reads the sums of a share of the inputs, and their rows from end to end.
void Engine::predict(const Run &run, const Conv &c) const {
  const Gate &g = c.gate;
  Workspace &ws = run.ws;
  const Active &a = ws.active[c.x];
  float *p = part(ws.p, run.t), *h = part(ws.h, run.t);
  auto product = [&](float *h, int n, Share mine, const PredictorRows &w, const float *p, const int32_t *list) {
    const float *rows[kChunk];
    const uint16_t *halves[kChunk];
    const int columns = round_up(n, kRound);
    for (int i = mine.begin; i < mine.end; i += kChunk) {
      const int count = std::min(kChunk, mine.end - i);
      for (int j = 0; j < count; ++j) {
        const size_t at = size_t(list ? list[i + j] : i + j) * w.pitch;
        if (w.bf16) halves[j] = w.bf16 + at;
        else rows[j] = w.f32 + at;
      }
      if (w.bf16) table_.axpy_bf16(h, columns, halves, p + i, count);
      else table_.axpy(h, columns, rows, p + i, count);
    }
  };
  const int n = static_cast<int>(g.dynamic.size());
  const Share inputs = share(a.n, run.t, run.n);
  pooled(run, c.x, inputs.begin, inputs.end, p);
  for (int i = inputs.begin; i < inputs.end; ++i) p[i] *= g.scale.data()[a.list[i]];
  if (run.t == 0) std::copy(g.bias.data(), g.bias.data() + n, h);
  else std::fill(h, h + n, 0.0f);
  if (!g.rank) return product(h, n, inputs, g.weight_rows, p, a.list.data());
  float *r = part(ws.r, run.t);
  std::fill(r, r + g.rank, 0.0f);
  product(r, g.rank, inputs, g.reduce_rows, p, a.list.data());
  run.wait();
  const Share mine = share(g.rank, run.t, run.n);
  std::fill(p + mine.begin, p + mine.end, 0.0f);
  for (int t = 0; t < run.n; ++t)
    for (int i = mine.begin; i < mine.end; ++i) p[i] += part(ws.r, t)[i];
  product(h, n, mine, g.weight_rows, p, nullptr);
}

// One thread: the winners, their scales, the steps of the product, and what all this costs.
void Engine::choose(const Run &run, const Conv &c, int op) const {
  Workspace &ws = run.ws;
  for (int t = 0; t < run.n; ++t) ws.claims[t].next.store(0, std::memory_order_relaxed);
  const Active &x = ws.active[c.x];
  Active &y = ws.active[c.y];
  int32_t *rows = ws.rows.data();
  int n = 0;
  int64_t extra = 0;  // MACs of predictor and scaling
  ws.row = rows, ws.row_scale = ws.scale.data(), ws.row_shift = ws.shift.data();
  if (c.rows == Rows::kAll) {
    n = c.out;
    ws.row = first_.data(), ws.row_scale = c.all_scale.data(), ws.row_shift = c.bias.data();
  } else if (c.rows == Rows::kFixed) {
    std::copy(c.fixed.begin(), c.fixed.end(), rows);
    n = static_cast<int>(c.fixed.size());
  } else if (c.rows == Rows::kFollow) {
    std::copy(x.list.begin(), x.list.begin() + x.n, rows);
    n = x.n;
  } else {
    const Gate &g = c.gate;
    float *q = ws.q.data();
    const int predicted = static_cast<int>(g.dynamic.size());
    for (int t = 1; t < run.n; ++t) {
      const float *of = part(ws.h, t);
      for (int j = 0; j < predicted; ++j) ws.h.data()[j] += of[j];
    }
    int32_t *keys = ws.keys.data();  // positive floats are ordered as their bits are
    const float *h = ws.h.data();
    if (predicted < c.out) {
      std::copy(g.constant.data(), g.constant.data() + c.out, q);
      for (int j = 0; j < predicted; ++j) q[g.dynamic[j]] = ws.h[j];
      h = q;
    }
    table_.score(keys, q, h, g.importance.data(), g.ceiling, c.out);
    int32_t low = 1;
    int ties = c.out;  // winners that equal `low` and may still be taken
    const int positive = table_.count_ge(keys, c.out, low);
    if (positive > g.k) {
      int32_t high = 0x7f800001;
      int count = -1, above = 0;  // keys >= low, keys >= high
      while (high - low > 1 && count != g.k) {
        const int32_t middle = low + (high - low) / 2;
        const int m = table_.count_ge(keys, c.out, middle);
        if (m >= g.k) low = middle, count = m;
        else high = middle, above = m;
      }
      if (count != g.k) ties = g.k - above;
    }
    if (positive == c.out && g.k == c.out) {  // settled: all win, as in every image
      n = c.out;
      ws.row = first_.data();
    } else if (ties == c.out) {
      for (int k = 0; k < c.out; ++k) {  // no branch: it could not be foreseen
        rows[n] = k;
        n += keys[k] >= low;
      }
    } else {
      for (int k = 0; k < c.out; ++k) {
        const bool wins = keys[k] > low || (keys[k] == low && ties-- > 0);
        rows[n] = k;
        n += wins;
      }
    }
    float *scale = ws.scale.data(), *shift = ws.shift.data();
    int64_t scaled = g.n_scaled;
    if (n == c.out) {  // in order, so the compiler can take several at a time
      const float *sign = g.sign.data(), *bias = c.bias.data(), *beta = c.beta.data();
      const uint8_t *is_scaled = g.scaled.data();
      for (int k = 0; k < n; ++k) scale[k] = is_scaled[k] ? q[k] * sign[k] : 1.0f;
      for (int k = 0; k < n; ++k) shift[k] = bias[k] * scale[k] + beta[k];
    } else {
      scaled = 0;
      for (int i = 0; i < n; ++i) {
        const int k = rows[i];
        const float pi = g.scaled[k] ? q[k] * g.sign[k] : 1.0f;
        scale[i] = pi;
        shift[i] = c.bias[k] * pi + c.beta[k];
        scaled += g.scaled[k];
      }
    }
    extra = int64_t(g.rank ? int64_t(x.n) * g.rank + int64_t(g.rank) * predicted : int64_t(x.n) * predicted) + predicted;
    extra += scaled * layout(c.y).height * layout(c.y).width;
  }
  ws.n_rows = n;
  if (c.rows == Rows::kFixed || c.rows == Rows::kFollow)
    for (int i = 0; i < n; ++i) ws.scale[i] = 1.0f, ws.shift[i] = c.bias[rows[i]];
  if (c.halves && c.rows != Rows::kAll)
    for (int i = 0; i < n; ++i) ws.scale[i] *= c.factor[ws.row[i]];

  const int64_t pairs = list_steps(ws, c, n);
  ws.macs[op] = pairs * layout(c.y).height * layout(c.y).width + extra;
  if (ws.record) ws.chosen[op].assign(ws.row, ws.row + n);
  if (c.halves && x.by_list) {
    std::fill(ws.bits.begin(), ws.bits.end(), 0u);
    for (int j = 0; j < x.n; ++j) ws.bits[x.list[j] / 32] |= 1u << (x.list[j] % 32);
  }

  // Active afterwards: the winners, and what the residual branch brings.
  ws.n_only = 0;
  if (n == c.out) return set_all(ws, c.y);
  if (c.res < 0) {
    std::fill(y.on.begin(), y.on.end(), 0);
    std::copy(rows, rows + n, y.list.begin());
    for (int i = 0; i < n; ++i) y.on[rows[i]] = 1;
    y.n = n;
    set_pairs(ws, c.y);
    return;
  }
  const Active &res = ws.active[c.res];
  std::copy(res.on.begin(), res.on.end(), y.on.begin());
  for (int i = 0; i < n; ++i) y.on[rows[i]] = 2;
  y.n = 0;
  for (int k = 0; k < c.out; ++k) {
    y.list[y.n] = ws.only[ws.n_only] = k;
    y.n += y.on[k] != 0;
    ws.n_only += y.on[k] == 1;
  }
  for (int k = 0; k < c.out; ++k) y.on[k] = y.on[k] != 0;
  set_pairs(ws, c.y);
}

// The steps of the product, by channel and so by group; products a pixel. One thread.
int64_t Engine::list_steps(Workspace &ws, const Conv &c, int n) const {
  const Active &x = ws.active[c.x];
  const int32_t *rows = ws.row;
  const int per_in = c.in / c.groups, per_out = c.out / c.groups;
  if (x.n == c.in && n == c.out) {  // known from the start
    ws.step_x = c.all_xoff.data(), ws.step_w = c.all_woff.data();
    const int steps = c.halves ? c.columns / 2 * c.taps : per_in * c.taps;
    for (int group = 0; group <= c.groups; ++group)
      ws.group_steps[group] = group * steps, ws.group_rows[group] = group * per_out;
    return int64_t(c.in) * c.taps * per_out;
  }
  int32_t *xo = ws.xoff.data(), *wo = ws.woff.data();
  ws.step_x = xo, ws.step_w = wo;
  const int plane_floats = plane_of(c);
  int s = 0, i = 0, r = 0, first = 0;  // first: input of the group
  int64_t pairs = 0;
  for (int group = 0; group < c.groups; ++group) {
    ws.group_steps[group] = s;
    ws.group_rows[group] = r;
    int inputs = 0;
    if (c.halves) {
      for (; inputs < x.n - first && x.list[first + inputs] < (group + 1) * per_in;) ++inputs;
      first += inputs;
      const int before = x.by_list ? 0 : group * per_in / 2, width = tap_words(c, x);
      const int end = x.by_list ? x.n_pairs : (group + 1) * per_in - 1;
      for (; i < x.n_pairs && (x.by_list || x.pair[i] * 2 <= end); ++i) {
        const int base = (c.staged ? i : x.pair[i]) * plane_floats;
        for (int t = 0; t < c.taps; ++t, ++s) {
          xo[s] = base + c.tap[t].offset + (c.staged ? c.tap[t].phase * c.stage.plane : 0);
          wo[s] = t * width + x.pair[i] - before;
        }
      }
    }
    for (; !c.halves && i < x.n && x.list[i] < (group + 1) * per_in; ++i, ++inputs) {
      const int base = (c.staged ? i : x.list[i]) * plane_floats, w = (x.list[i] - group * per_in) * c.taps;
      for (int t = 0; t < c.taps; ++t, ++s) {
        xo[s] = base + c.tap[t].offset + (c.staged ? c.tap[t].phase * c.stage.plane : 0);
        wo[s] = w + t;
      }
    }
    while (r < n && rows[r] < (group + 1) * per_out) ++r;
    pairs += int64_t(inputs) * c.taps * (r - ws.group_rows[group]);
  }
  ws.group_steps[c.groups] = s;
  ws.group_rows[c.groups] = r;
  return pairs;
}

void Engine::stage(const Run &run, const Conv &c) const {
  const Layout &l = layout(c.x), &s = c.stage;
  const Active &x = run.ws.active[c.x];
  const int phases = static_cast<int>(c.phases.size());
  const Share mine = share((c.halves ? x.n_pairs : x.n) * phases, run.t, run.n);
  for (int j = mine.begin; j < mine.end; ++j) {
    const int i = j / phases, ph = c.phases[j % phases], dy = ph / c.stride, dx = ph % c.stride;
    const float *from = c.halves ? reinterpret_cast<const float *>(words(run.ws, c.x, x.pair[i]))
                                 : plane(run.ws, c.x, x.list[i]);
    float *to = run.ws.staging.data() + size_t(j) * s.plane;
    std::fill(to, to + s.lead, 0.0f);
    const int height = std::min(s.height, (l.height - dy + c.stride - 1) / c.stride);
    const int width = std::max(0, std::min(s.width, (l.width - dx + c.stride - 1) / c.stride));
    table_.stage(to + s.lead, s.pitch, from + dy * l.pitch + dx, l.pitch * c.stride, height, width, c.stride);
    std::fill(to + s.lead + height * s.pitch, to + s.plane, 0.0f);
  }
}

bool Engine::makes_weights(const Active &x) const { return x.by_list || !pairs_->words; }

// Pairs of weights from one tap to the next.
int Engine::tap_words(const Conv &c, const Active &x) const {
  return makes_weights(x) ? odd_lines(x.by_list ? x.n_pairs : c.columns / 2) : c.columns / 2;
}

// The weights of a few rows, from `row` on, as the product reads them: those of the active inputs picked where pairs go
// by the list, and as floats where the product wants these.
void Engine::make_weights(const Run &run, const Conv &c, int row, int rows, const float **to) const {
  Workspace &ws = run.ws;
  const Active &x = ws.active[c.x];
  Workspace::Pointers &own = ws.pointers[run.t];
  const int width = tap_words(c, x), upper = c.taps * width, n = x.by_list ? x.n_pairs : c.columns / 2;
  for (int r = 0; r < rows; ++r) {
    const uint16_t *from = c.halves + size_t(ws.row[row + r]) * c.taps * c.columns;
    for (int t = 0; t < c.taps; ++t, from += c.columns) {
      const size_t at = (size_t(r) * c.taps + t) * width * 2;
      const uint16_t *pairs = from;
      if (x.by_list) {
        uint16_t *picked = own.picked.data() + at;
        pick(picked, from, c.in, ws.bits.data(), x.list.data(), x.n);
        if (x.n % 2) picked[x.n] = 0;
        pairs = picked;
      }
      if (pairs_->words) continue;
      float *lower = own.wide.data() + size_t(r) * upper * 2 + t * width;
      pairs_->widen(lower, lower + upper, reinterpret_cast<const uint32_t *>(pairs), n);
    }
    const size_t first = size_t(r) * upper * 2;
    to[r] = pairs_->words ? reinterpret_cast<const float *>(own.picked.data() + first) : own.wide.data() + first;
  }
}

// The loops over one group's tiles: rows outside or pixels outside, each in so many parts.
struct Engine::Loops {
  Share rows;
  int unit, row_parts, px_parts, max_vecs;
  bool rows_outside;
  int pieces;  // of the input channels, where rows are outside and all pixels do not stay in the second cache
};

void Engine::tiles(const Run &run, const Conv &c) const {
  Workspace &ws = run.ws;
  const Layout &out = layout(c.y);
  const bool pool = values_[c.y].pooled;
  const int lanes = table_.lanes;
  if (c.streams.size() && ws.n_rows == c.out && ws.active[c.x].n == c.in) return channel_tiles(run, c);
  // How the work is shared: pixels, rows or groups are cut, whatever leaves the longest share shortest.
  const int vecs = ((out.height - 1) * out.pitch + out.width + lanes - 1) / lanes;
  enum { kWhole, kPixels, kRows, kGroups } cut = kWhole;
  const bool halves = values_[c.y].pairing != Pairing::kNone, floats = values_[c.y].floats;
  const Active &x = ws.active[c.x], &y = ws.active[c.y];
  // Row i is channel i, or goes into place i: rows 2 i and 2 i + 1 are the halves of one word, and stay together.
  const bool whole_pairs = halves && (c.groups == 1 ? y.by_list || ws.n_rows == c.out
                                                    : ws.n_rows == c.out && c.out / c.groups % 2 == 0);
  auto unit_of = [&](int rows) { return whole_pairs && rows % 2 == 0 ? 2 : 1; };
  const bool joined = halves && c.groups > 1 && (y.by_list || c.out / c.groups % 2);  // pairs across groups
  if (run.n > 1) {
    if (c.groups >= 2 * run.n && !joined) {
      cut = kGroups;
    } else {
      const int rows = std::max(1, ws.n_rows / c.groups);
      // Cut by pixels each thread reads all weights; cut by rows it reads all pixels, which another thread has just
      // written and holds in its cache, and leaves the next layer its own in the same way.
      const float steps = float(ws.group_steps[c.groups]) / c.groups, far = float(run.n - 1) / run.n;
      const float channels = steps / c.taps * c.groups + ws.n_rows * (c.res >= 0 ? 2 : 1);
      const float pixel_lines = channels * vecs * lanes / kRound, weight_lines = steps * ws.n_rows / kRound;
      auto cost = [&](int rows, int vecs) { return steps * best_split(table_, rows, vecs, unit_of(rows)).cost; };
      const float cut_px = cost(rows, (vecs + run.n - 1) / run.n) + far * kFarWeights * weight_lines;
      const float cut_rows = cost((rows + run.n - 1) / run.n, vecs) + far * kFarPixels * pixel_lines;
      cut = cut_rows <= cut_px && !joined ? kRows : kPixels;
    }
  }
  const int shares = cut == kPixels ? std::min(run.n, vecs) : run.n;
  const float *base = c.staged   ? ws.staging.data() + c.stage.lead
                      : c.halves ? reinterpret_cast<const float *>(words(ws, c.x, 0))
                                 : plane(ws, c.x, 0);
  const uint32_t *mask = buffers_[values_[c.y].buffer].mask.data();
  const size_t row_floats = size_t(c.in / c.groups) * c.taps;
  const Active *res = c.res >= 0 ? &ws.active[c.res] : nullptr;
  const bool made = c.halves && makes_weights(x);

  auto pair = [&](int i) { return y.by_list ? i / 2 : ws.row[i] / 2; };
  auto rows_of = [&](int group, int h) {
    const Share all{ws.group_rows[group], ws.group_rows[group + 1]};
    if (cut != kRows) return all;
    const Share part = share(all.size(), h, shares);
    const Share rows{all.begin + part.begin, all.begin + part.end};
    return halves ? Share{whole(all, rows.begin, pair), whole(all, rows.end, pair)} : rows;
  };
  auto loops_of = [&](int group, Share rows, int px) {
    const int steps = ws.group_steps[group + 1] - ws.group_steps[group], unit = unit_of(rows.size());
    if (rows.size() == 0) return Loops{rows, unit, 0, 0, 1, true, 1};
    const Split split = best_split(table_, rows.size(), px, unit);
    // The operand that is read again and again should be the one that stays in the cache.
    const int64_t weights = int64_t(rows.size()) * steps, pixels = int64_t(steps) / c.taps * px * lanes;
    const bool rows_outside = weights > pixels || made;
    const int row_parts = (rows.size() + split.rows - 1) / split.rows, px_parts = (px + split.vecs - 1) / split.vecs;
    const int64_t all = pixels * (c.staged ? int64_t(c.phases.size()) : 1);
    const bool may = !c.halves && !halves && rows_outside && row_parts > 4;  // of bf16 the planes are half as large
    const int most = may ? steps / kFewestSteps : 1;
    const int pieces = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>((all + kSecond - 1) / kSecond, most)));
    return Loops{rows, unit, row_parts, px_parts, split.vecs, rows_outside, pieces};
  };
  // Units of a share: rows, groups or pixels that are done in one go. The same for all shares, so that sums, which are
  // kept apart where units share their rows, do not depend on who did what.
  const int first_px = cut == kPixels ? vecs / shares : vecs;
  const Loops typical = c.groups == 1 ? loops_of(0, rows_of(0, 0), first_px) : Loops{};
  const bool rows_outside = c.groups > 1 || typical.rows_outside, by_px = cut == kPixels;
  int units = 1;
  if (shares > 1) {
    if (c.groups > 1) units = joined ? 1 : kSlots;
    else if (rows_outside) units = typical.pieces > 1 ? std::min(typical.row_parts, 4) : typical.row_parts;
    else units = std::min(first_px / typical.max_vecs, pool ? sum_slots() / (by_px ? shares : 1) : kSlots);
    units = std::max(units, 1);
  }
  if (pool && run.t == 0) {
    const int n = (by_px ? shares : 1) * (rows_outside ? 1 : units);
    for (int i = 0; i < ws.n_rows; ++i) slots(ws, c.y, ws.row[i]) = n;
  }

  Workspace::Pointers &ptr = ws.pointers[run.t];
  auto weights_of = [&](int k) {
    return c.halves ? reinterpret_cast<const float *>(c.halves + size_t(k) * c.taps * c.columns)
                    : c.weight.data() + size_t(k) * row_floats;
  };
  auto point = [&](Share rows) {
    for (int i = rows.begin; i < rows.end; ++i) {
      const int k = ws.row[i];
      ptr.w[i] = weights_of(k);
      if (floats) ptr.out[i] = plane(ws, c.y, k);
      if (halves) ptr.half[i] = half(ws, c.y, i, k);
      if (res) ptr.res[i] = res->on[k] ? plane(ws, c.res, k) : ws.zeros.data();
    }
    for (int i = rows.end; i < rows.end + kMaxRows && rows.size(); ++i)  // asked for ahead, as rows are
      ptr.w[i] = ptr.w[rows.end - 1];
  };
  const float *own[kMaxRows], *fetch[8];
  Tile tile{};
  tile.mask = mask;
  tile.upper = c.halves ? int64_t(c.taps) * tap_words(c, x) : 0;
  tile.fetch = fetch;
  static constexpr float kZeros[kMaxRows] = {};
  // Parts [rp) of the rows and [pp) of the pixels of a group.
  auto run_group = [&](int g, Share px, const Loops &l, Share rp, Share pp, int slot) {
    const Steps piece_of(ws.group_steps[g + 1] - ws.group_steps[g], l.pieces, c.taps);
    bool begins = true, ends = true;  // the sums; between their pieces they wait where the output will be
    auto set_piece = [&](int i) {
      const Share piece = piece_of[i];
      const int first = ws.group_steps[g] + piece.begin;
      begins = i == 0, ends = i == l.pieces - 1;
      tile.steps = piece.size();
      tile.xoff = ws.step_x + first;
      tile.woff = ws.step_w + first;
      tile.act = ends ? c.act : int(kNone);
    };
    const Steps row_steps(l.rows.size(), std::max(1, l.row_parts), l.unit), px_steps(px.size(), std::max(1, l.px_parts));
    if (pool && rp.size())
      for (int i = l.rows.begin + row_steps[rp.begin].begin; i < l.rows.begin + row_steps[rp.end - 1].end; ++i) {
        ptr.sum[i] = sum(ws, c.y, ws.row[i], slot);
        std::fill(ptr.sum[i], ptr.sum[i] + kSumLanes, 0.0f);
      }
    auto block = [&](Share r, Share v) {
      const int at = (px.begin + v.begin) * lanes, row = l.rows.begin + r.begin;
      const bool weights_new = v.begin == 0;  // the first pixels of a row meet its weights in memory far away
      if (weights_new)
        for (int i = 0, j = 0; i < 8; ++i, j = j + 1 < r.size() ? j + 1 : 0) fetch[i] = ptr.w[row + r.size() + j];
      tile.at = at;
      tile.x = base + at;
      tile.w = made ? own : ptr.w.data() + row;
      tile.out = floats ? ptr.out.data() + row : nullptr;
      tile.half = halves ? ptr.half.data() + row : nullptr;
      tile.whole = l.unit == 2;
      tile.res = !begins ? ptr.out.data() + row : res ? ptr.res.data() + row : nullptr;
      tile.sum = pool && ends ? ptr.sum.data() + row : nullptr;
      tile.scale = ws.row_scale + row;
      tile.shift = begins ? ws.row_shift + row : kZeros;
      const int mode = c.taps == 1 ? (weights_new ? kFetchBoth : kFetchPixels) : weights_new ? kFetchWeights : kPlain;
      (c.halves ? pairs_->tile : table_.tile)[mode][r.size()][v.size()](tile);
    };
    if (l.rows_outside) {
      for (int k = 0; k < l.pieces; ++k) {
        set_piece(k);
        for (int i = rp.begin; i < rp.end; ++i) {
          const Share r = row_steps[i];
          if (made) make_weights(run, c, l.rows.begin + r.begin, r.size(), own);
          for (int j = pp.begin; j < pp.end; ++j) block(r, px_steps[j]);
        }
      }
    } else {
      set_piece(0);
      for (int j = pp.begin; j < pp.end; ++j)
        for (int i = rp.begin; i < rp.end; ++i) block(row_steps[i], px_steps[j]);
    }
  };
  for (int i = 0; i < shares; ++i) {
    const int h = (run.t + i) % shares;
    const Share px = by_px ? share(vecs, h, shares) : Share{0, vecs};
    const Share groups = cut == kGroups ? share(c.groups, h, shares) : Share{0, c.groups};
    Loops l{};
    bool begun = false;
    for (int u; (u = ws.claims[h].take()) < units;) {
      if (!begun) point({rows_of(groups.begin, h).begin, rows_of(groups.end - 1, h).end});
      if (c.groups > 1) {
        begun = true;
        const Share mine = share(groups.size(), u, units);
        for (int g = groups.begin + mine.begin; g < groups.begin + mine.end; ++g) {
          const Share rows = rows_of(g, h);
          if (rows.size() == 0) continue;
          l = loops_of(g, rows, px.size());
          run_group(g, px, l, {0, l.row_parts}, {0, l.px_parts}, by_px ? h : 0);
        }
        continue;
      }
      if (!begun) {
        begun = true;
        l = loops_of(0, rows_of(0, h), px.size());
        l.rows_outside = rows_outside;
        if (!rows_outside) l.pieces = 1;
      }
      if (rows_outside) {
        // Rows that are not cut in pairs may share a word with those of the unit before: all in the first unit then.
        const Share parts = !halves || l.unit == 2 ? share(l.row_parts, u, units) : Share{0, u == 0 ? l.row_parts : 0};
        run_group(0, px, l, parts, {0, l.px_parts}, by_px ? h : 0);
      } else {
        run_group(0, px, l, {0, l.row_parts}, share(l.px_parts, u, units), by_px ? h * units + u : u);
      }
    }
  }
}

// See set_lanes. Whoever multiplies a block of channels also brings it into their planes.
void Engine::channel_tiles(const Run &run, const Conv &c) const {
  Workspace &ws = run.ws;
  const Layout &out = layout(c.y);
  const int lanes = table_.lanes, pixels = static_cast<int>(c.at.size());
  const int pitch = (c.out + lanes - 1) / lanes * lanes;
  const float *base = c.staged ? ws.staging.data() + c.stage.lead : plane(ws, c.x, 0);
  float *made = ws.pointers[run.t].transposed.data(), *line = made + size_t(pixels) * pitch;
  const int steps = c.in * c.taps;
  static constexpr float kOnes[kMaxRows] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, kZeros[kMaxRows] = {};
  const float *x[kMaxRows], *sums[kMaxRows];
  float *to[kMaxRows];
  Tile tile{};
  tile.w = x, tile.out = to, tile.scale = kOnes, tile.shift = kZeros, tile.act = kNone, tile.mask = ones_.data();
  const uint32_t *mask = buffers_[values_[c.y].buffer].mask.data();
  const Active *res = c.res >= 0 ? &ws.active[c.res] : nullptr;
  const bool pool = values_[c.y].pooled;
  std::fill(line, line + out.pixels, 0.0f);
  auto run_block = [&](const Block &of) {
    const Share block = of.vecs;
    tile.x = c.streams.data() + size_t(steps) * block.begin * lanes;
    tile.at = block.begin * lanes;
    const int parts = (pixels + of.pixels - 1) / of.pixels;
    const Steps part_of(pixels, parts);
    // Where the weights are read more than once, a piece of them at a time, which stays in the first cache; the sums
    // wait in `made` meanwhile.
    const int most = parts > 1 ? std::max(1, kNear / (block.size() * lanes)) : steps, pieces = (steps + most - 1) / most;
    const Steps piece_of(steps, pieces);
    for (int j = 0; j < pieces; ++j) {
      const Share piece = piece_of[j];
      tile.steps = piece.size();
      tile.xoff = stream_[block.size()].data() + piece.begin;
      tile.woff = c.all_xoff.data() + piece.begin;
      tile.res = j ? sums : nullptr;
      for (int i = 0; i < parts; ++i) {
        const Share part = part_of[i];
        for (int p = part.begin; p < part.end; ++p) {
          x[p - part.begin] = base + c.at[p];
          sums[p - part.begin] = to[p - part.begin] = made + size_t(p) * pitch;
        }
        table_.tile[i == 0 ? kFetchPixels : kPlain][part.size()][block.size()](tile);
      }
    }
    const int begin = block.begin * lanes, end = std::min(c.out, block.end * lanes);
    for (int p = 0; p < pixels; ++p) {
      float *row = made + size_t(p) * pitch;
      for (int k = begin; k < end; ++k) row[k] = row[k] * ws.row_scale[k] + ws.row_shift[k];
    }
    for (int k = begin; k < end; ++k) {
      for (int p = 0; p < pixels; ++p) line[c.at[p]] = made[size_t(p) * pitch + k];
      table_.eltwise(plane(ws, c.y, k), line, 1.0f, res && res->on[k] ? plane(ws, c.res, k) : nullptr, mask, out.pixels,
                     c.act, pool ? one_sum(ws, c.y, k) : nullptr);
    }
  };
  for (int i = 0; i < run.n; ++i) {
    const int h = (run.t + i) % run.n;
    const Share own = share(static_cast<int>(c.blocks.size()), h, run.n);
    for (int b; (b = ws.claims[h].take()) < own.size();) run_block(c.blocks[own.begin + b]);
  }
}

// Channels that only the residual branch brings.
void Engine::finish(const Run &run, const Conv &c) const {
  if (c.res < 0) return;
  Workspace &ws = run.ws;
  if (untouched(c)) return;
  const bool pool = values_[c.y].pooled, halves = values_[c.y].pairing != Pairing::kNone;
  const uint32_t *mask = buffers_[values_[c.y].buffer].mask.data();
  const Share mine = share_pairs(ws.n_only, run.t, run.n, [&](int i) { return ws.only[i] / 2; });
  for (int i = mine.begin; i < mine.end; ++i) {
    const int k = ws.only[i];
    table_.eltwise(plane(ws, c.y, k), plane(ws, c.res, k), 1.0f, nullptr, mask, layout(c.y).pixels, c.act,
                   pool ? one_sum(ws, c.y, k) : nullptr);
    if (halves) table_.halve(half(ws, c.y, -1, k), plane(ws, c.y, k), layout(c.y).pixels);
  }
}

void Engine::pool(const Run &run, const PoolOp &p, int op) const {
  Watch watch(run, op);
  Workspace &ws = run.ws;
  if (run.t == 0) copy_active(ws, p.x, p.y), ws.macs[op] = 0;
  const Active &a = ws.active[p.x];
  const Layout &in = layout(p.x), &out = layout(p.y);
  const uint32_t *mask = buffers_[values_[p.y].buffer].mask.data();
  const bool sums = values_[p.y].pooled, halves = values_[p.y].pairing != Pairing::kNone;
  if (halves) run.wait();  // which pairs there are
  const Share mine = share_pairs(a.n, run.t, run.n, [&](int i) { return a.list[i] / 2; });
  constexpr int kWide = 1024;
  // The outputs [first, last) whose window's element d lies inside the map.
  auto inside = [&](int d, int n_in, int n_out) {
    const int q = d - p.pad;
    const int first = q >= 0 ? 0 : (-q + p.stride - 1) / p.stride;
    const int last = n_in - 1 - q < 0 ? 0 : std::min(n_out, (n_in - 1 - q) / p.stride + 1);
    return Share{std::min(first, n_out), std::max(last, std::min(first, n_out))};
  };
  for (int i = mine.begin; i < mine.end; ++i) {
    const float *from = plane(ws, p.x, a.list[i]);
    float *to = plane(ws, p.y, a.list[i]);
    for (int y = 0; y < out.height; ++y) {
      float *row = to + y * out.pitch;
      const int first = y * p.stride - p.pad;
      if (p.max && p.kernel == 3 && in.width <= kWide) {  // rows first, then columns
        const float *r[3];
        for (int d = 0; d < 3; ++d) r[d] = from + std::min(std::max(first + d, 0), in.height - 1) * in.pitch;
        float line[kWide];
        table_.max3(line, r[0], r[1], r[2], in.width);
        std::fill(row, row + out.width, -INFINITY);
        for (int dx = 0; dx < 3; ++dx) {
          const Share cols = inside(dx, in.width, out.width);
          table_.stride_max(row + cols.begin, line + cols.begin * p.stride + dx - p.pad, cols.size(), p.stride);
        }
        continue;
      }
      std::fill(row, row + out.width, p.max ? -INFINITY : 0.0f);
      const int y0 = y * p.stride - p.pad;
      for (int dy = std::max(0, -y0); dy < p.kernel && y0 + dy < in.height; ++dy)
        for (int dx = 0; dx < p.kernel; ++dx) {
          const Share cols = inside(dx, in.width, out.width);
          const float *src = from + (y0 + dy) * in.pitch + cols.begin * p.stride + dx - p.pad;
          (p.max ? table_.stride_max : table_.stride_add)(row + cols.begin, src, cols.size(), p.stride);
        }
      if (!p.max) {
        auto count = [&](int at, int n) {  // torch counts padding, but nothing beyond it
          const int begin = at * p.stride - p.pad, end = std::min(begin + p.kernel, n + p.pad);
          return p.include_pad ? end - begin : std::min(end, n) - std::max(begin, 0);
        };
        const int rows = count(y, in.height);
        for (int x = 0; x < out.width; ++x) row[x] /= float(rows * count(x, in.width));
      }
    }
    if (sums) table_.eltwise(to, to, 1.0f, nullptr, mask, out.pixels, kNone, one_sum(ws, p.y, a.list[i]));
    if (halves) table_.halve(half(ws, p.y, i, a.list[i]), to, out.pixels);
  }
  watch.lap(kRest);
}

void Engine::mean(const Run &run, const MeanOp &m, int op) const {
  Watch watch(run, op);
  Workspace &ws = run.ws;
  const Active &a = ws.active[m.x];
  if (run.t == 0) {
    pooled(run, m.x, 0, a.n, ws.p.data());
    copy_active(ws, m.x, m.y);
    for (int i = 0; i < a.n; ++i) {
      *plane(ws, m.y, a.list[i]) = *one_sum(ws, m.y, a.list[i]) = ws.p[i];
      if (values_[m.y].pairing != Pairing::kNone) table_.halve(half(ws, m.y, i, a.list[i]), plane(ws, m.y, a.list[i]), 1);
    }
    ws.macs[op] = 0;
  }
  watch.lap(kRest);
}

void Engine::add(const Run &run, const AddOp &a, int op) const {
  Watch watch(run, op);
  Workspace &ws = run.ws;
  const Active &x = ws.active[a.a];
  if (run.t == 0) {
    ws.macs[op] = 0;
    int n = 0;  // the union, in a list of its own: y may be a or b
    for (int k = 0; k < values_[a.y].channels; ++k) {
      ws.rows[n] = k;
      n += x.on[k] | (a.b >= 0 ? ws.active[a.b].on[k] : 0);
    }
    ws.n_rows = n;
  }
  run.wait();
  const Layout &l = layout(a.y);
  const uint32_t *mask = buffers_[values_[a.y].buffer].mask.data();
  const Share mine = share_pairs(ws.n_rows, run.t, run.n, [&](int i) { return ws.rows[i] / 2; });
  const bool sums = values_[a.y].pooled;
  for (int i = mine.begin; i < mine.end; ++i) {
    const int k = ws.rows[i];
    const bool in_a = x.on[k], in_b = a.b >= 0 && ws.active[a.b].on[k];
    const float *first = plane(ws, in_a ? a.a : a.b, k);
    table_.eltwise(plane(ws, a.y, k), first, 1.0f, in_a && in_b ? plane(ws, a.b, k) : nullptr, mask, l.pixels, a.act,
                   sums ? one_sum(ws, a.y, k) : nullptr);
  }
  run.wait();
  if (run.t == 0) {
    Active &y = ws.active[a.y];
    std::fill(y.on.begin(), y.on.end(), 0);
    y.n = ws.n_rows;
    for (int i = 0; i < y.n; ++i) y.list[i] = ws.rows[i], y.on[ws.rows[i]] = 1;
    set_pairs(ws, a.y);
  }
  halve_all(run, a.y);
  watch.lap(kRest);
}

// All active channels of a value that is there in float32, as halves of pairs.
void Engine::halve_all(const Run &run, int value) const {
  if (values_[value].pairing == Pairing::kNone) return;
  run.wait();  // which pairs there are
  const Active &a = run.ws.active[value];
  const Share mine = share_pairs(a.n, run.t, run.n, [&](int i) { return a.list[i] / 2; });
  for (int i = mine.begin; i < mine.end; ++i)
    table_.halve(half(run.ws, value, i, a.list[i]), plane(run.ws, value, a.list[i]), layout(value).pixels);
}

void Engine::se(const Run &run, const SqueezeExcite &s, int op) const {
  Watch watch(run, op);
  Workspace &ws = run.ws;
  const Active &a = ws.active[s.x];
  if (run.t == 0) {
    float *p = ws.p.data(), *h = ws.h.data(), *q = ws.q.data();
    pooled(run, s.x, 0, a.n, p);
    std::copy(s.bias1.data(), s.bias1.data() + s.hidden, h);
    for (int i = 0; i < a.n; ++i) {
      const float *row = s.weight1.data() + size_t(a.list[i]) * s.hidden;
      table_.axpy(h, s.hidden, &row, p + i, 1);
    }
    table_.activate(h, s.hidden, s.act);
    std::copy(s.bias2.data(), s.bias2.data() + s.in, q);
    for (int i = 0; i < s.hidden; ++i) {
      const float *row = s.weight2.data() + size_t(i) * s.in;
      table_.axpy(q, s.in, &row, h + i, 1);
    }
    table_.activate(q, s.in, s.gate);
    ws.macs[op] = int64_t(a.n) * s.hidden + int64_t(s.hidden) * s.in;
  }
  run.wait();
  const Layout &l = layout(s.y);
  const uint32_t *mask = buffers_[values_[s.y].buffer].mask.data();
  const Share mine = share(a.n, run.t, run.n);
  for (int i = mine.begin; i < mine.end; ++i) {
    const int k = a.list[i];
    table_.eltwise(plane(ws, s.y, k), plane(ws, s.x, k), ws.q[k], nullptr, mask, l.pixels, kNone, one_sum(ws, s.y, k));
  }
  run.wait();
  if (run.t == 0) copy_active(ws, s.x, s.y);
  halve_all(run, s.y);
  watch.lap(kRest);
}

void Engine::linear(const Run &run, const Linear &l, int op, float *out) const {
  Watch watch(run, op);
  Workspace &ws = run.ws;
  const Active &a = ws.active[l.x];
  float *p = part(ws.p, run.t);
  pooled(run, l.x, 0, a.n, p);
  const Share mine = share_lines(l.out, run.t, run.n);
  const int pitch = round_up(l.out, kRound);
  std::copy(l.bias.data() + mine.begin, l.bias.data() + mine.end, out + mine.begin);
  const float *rows[kChunk];
  for (int i = 0; i < a.n; i += kChunk) {
    const int count = std::min(kChunk, a.n - i);
    for (int j = 0; j < count; ++j) rows[j] = l.weight.data() + size_t(a.list[i + j]) * pitch + mine.begin;
    table_.axpy(out + mine.begin, mine.size(), rows, p + i, count);
  }
  if (run.t == 0) ws.macs[op] = int64_t(a.n) * l.out;
  watch.lap(kConvolve);
}

}  // namespace afds
