// Ops are checked and made ready as a plan is read.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "engine.h"
#include "tiling.h"

namespace afds {

// What a plan may ask for: positions are 32-bit numbers, and a plan may come from anywhere.
constexpr int64_t kMost = int64_t(1) << 31;
constexpr int kMostSide = 1 << 10;  // of kernels, strides, dilations and paddings

int Engine::check_value(int v) const {
  check(v >= 0 && v < static_cast<int>(values_.size()), "no value " + std::to_string(v));
  return v;
}

int Engine::add_buffer(const Layout &layout, int channels) {
  Buffer b;
  b.layout = layout;
  Layout &l = b.layout;
  check(l.height > 0 && l.width > 0 && l.pitch >= l.width && channels > 0 && l.lead >= 0, "a buffer's sizes");
  const int64_t pixels = int64_t(l.height - 1) * l.pitch + l.width;
  check(int64_t(l.plane) * channels < kMost && l.lead + pixels < kMost - kRound, "a buffer of 2^31 numbers or more");
  l.pixels = round_up(static_cast<int>(pixels), kRound);
  check(l.lead % kRound == 0 && l.plane % kRound == 0 && l.plane >= l.lead + l.pixels,
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
  check(v.floats || v.pairing != Pairing::kNone, "a value that is kept in no form");
  check(v.pairing == Pairing::kNone || pairs_, "pairs of bf16 in a plan of float32");
  b.floats |= v.floats;
  b.pairs |= v.pairing != Pairing::kNone;
  values_.push_back(v);
  full_.push_back(false);
  widest_ = std::max(widest_, v.channels);
  for (int k = static_cast<int>(first_.size()); k < v.channels; ++k) first_.push_back(k);
  return static_cast<int>(values_.size()) - 1;
}

void Engine::set_input(int value) {
  const Value &v = values_[check_value(value)];
  check(v.floats || v.pairing == Pairing::kNumbers, "an input neither in float32 nor in pairs of fixed channels");
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
  for (int side : {kh, kw, stride, dilation, pad_h, pad_w}) check(side <= kMostSide, c.name + ": geometry");
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
    const bool read = res.floats || (c.halves && res.pairing == Pairing::kNumbers);
    const bool kept = y.pairing == Pairing::kNumbers || (y.floats && y.pairing == Pairing::kNone);
    check(read && kept, c.name + ": a residual neither in float32 nor in pairs of fixed channels");
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
      const int64_t far = int64_t(sy) * out.pitch + sx;
      check(std::abs(far) < kMost / 2, c.name + ": a tap too far away");
      const int offset = static_cast<int>(far);
      c.tap.push_back({phase_of[phase], offset});
      low = std::min(low, offset), high = std::max(high, offset);
      top = std::max(top, sy), right = std::max(right, sx);
    }
  // What a row reads left and right of itself must be the padding between rows, of which the pitch is to leave enough.
  const int left = -floor_div(-pad_w, stride);
  const int columns = std::min((in.width + stride - 1) / stride, out.width + right);
  check(out.pitch >= std::max(out.width + right, columns + left), c.name + ": pitch");
  if (direct) {
    check(in.lead + low >= 0 && int64_t(in.lead) + in.pixels + high <= in.plane, c.name + ": padding");
    c.phases.clear();
  } else {
    Layout &s = c.stage;
    s.height = std::min((in.height + stride - 1) / stride, out.height + top);
    s.width = columns;
    s.pitch = out.pitch;
    s.lead = round_up(-low, kRound);
    const int64_t longest = std::max(int64_t(out.pixels) + high, int64_t(s.height) * s.pitch + kRound);
    check(s.lead + longest < kMost - 2 * kRound, c.name + ": staging");
    s.plane = round_up(static_cast<int>(s.lead + longest), kRound);
    if (s.plane / kRound % 2 == 0) s.plane += kRound;
    const int64_t size = int64_t(s.plane) * c.in * c.phases.size();
    check(size < kMost, c.name + ": staging");
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
    check(g.group >= 1 && (g.k == c.out || (g.k % g.group == 0 && c.out % g.group == 0)), c.name + ": group");
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
  const bool alone = c.rows == Rows::kAll && full_[c.x];  // its weights are read in one way only
  if (c.halves) {
    const int width = c.in / c.groups;
    const size_t lines = size_t(c.out) * c.taps;
    c.columns = (width + 1) / 2 * 2;
    set_amx(c);
    if (!c.amx.weight) set_lanes(c);
    const void *packed = c.amx.weight ? static_cast<const void *>(c.amx.weight) : c.streams.data();
    if (!(packed && alone)) {
      auto *kept = reinterpret_cast<uint16_t *>(arena_.take((lines * c.columns + 1) / 2));
      for (size_t i = 0; i < lines; ++i)
        std::memcpy(kept + i * c.columns, c.halves + i * width, sizeof(uint16_t) * width);
      c.halves = kept;
    } else {
      c.halves = static_cast<const uint16_t *>(packed);  // not read as rows
    }
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
    if (c.streams.size() && alone) c.weight = Floats();
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
//
// In a product of pairs both are words, where the product reads weights as such.
void Engine::set_lanes(Conv &c) {
  const Layout &out = layout(c.y);
  const Value &y = values_[c.y];
  const bool all = c.rows == Rows::kAll || (c.rows == Rows::kDynamic && c.gate.k == c.out);
  const bool can = c.halves ? pairs_->words : y.floats && y.pairing == Pairing::kNone;
  if (c.groups > 1 || !all || !can) return;
  const int inputs = c.halves ? c.columns / 2 : c.in;
  const int lanes = table_.lanes, steps = inputs * c.taps, pixels = out.height * out.width;
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
  auto weight_of = [&](int k, int s) {
    if (!c.halves) return c.weight[size_t(k) * steps + s];
    const int i = s / c.taps * 2;
    const uint16_t *from = c.halves + (size_t(k) * c.taps + s % c.taps) * c.in + i;
    const uint32_t word = from[0] | (i + 1 < c.in ? uint32_t(from[1]) << 16 : 0u);
    float as_float;
    std::memcpy(&as_float, &word, sizeof word);
    return as_float;
  };
  for (const Block &block : c.blocks)
    for (int s = 0; s < steps; ++s)
      for (int k = block.vecs.begin * lanes; k < block.vecs.end * lanes; ++k)
        *to++ = k < c.out ? weight_of(k, s) : 0.0f;
  for (int y = 0; y < out.height; ++y)
    for (int x = 0; x < out.width; ++x) c.at.push_back(y * out.pitch + x);
  for (const Block &block : c.blocks) {
    auto &stream = stream_[block.vecs.size()];
    for (int s = static_cast<int>(stream.size()); s < steps + kAhead; ++s)
      stream.push_back(s * block.vecs.size() * lanes);
  }
  if (ones_.size() < size_t(vecs) * lanes) ones_.assign(size_t(vecs) * lanes, ~0u);
  transposed_ = std::max(transposed_, size_t(pixels) * vecs * lanes + 2 * (out.pixels + kSlack));
}

// Whether channels that only the residual branch brings are what they were, in the memory where they are.
bool Engine::untouched(const Conv &c) const {
  const bool in_place = values_[c.res].buffer == values_[c.y].buffer;
  const bool same_form = values_[c.res].floats || !values_[c.y].floats;
  return in_place && same_form && (c.act == kNone || (c.act == kRelu && c.res_nonnegative));
}

void Engine::check_floats(int x, int y, const std::string &name) const {
  check(values_[x].floats && values_[y].floats && values_[y].pairing != Pairing::kFree,
        name + ": a value that is not in float32");
}

void Engine::add_pool(PoolOp p) {
  check(values_[check_value(p.x)].channels == values_[check_value(p.y)].channels, p.name + ": channels");
  const Layout &in = layout(p.x), &out = layout(p.y);
  check(values_[p.x].buffer != values_[p.y].buffer, p.name + ": cannot run in place");
  if (of_pairs(p))
    check(p.max && p.nonnegative && values_[p.x].pairing == Pairing::kNumbers && values_[p.y].pairing == Pairing::kNumbers &&
              !values_[p.y].floats,
          p.name + ": pairs that it cannot pool");
  else
    check_floats(p.x, p.y, p.name);
  check(p.kernel > 0 && p.stride > 0 && p.pad >= 0 && p.pad < p.kernel && p.kernel <= kMostSide && p.stride <= kMostSide,
        p.name + ": geometry");
  auto fits = [&](int64_t n_in, int64_t n_out) {
    const int64_t last = (n_out - 1) * p.stride - p.pad;
    return n_out > 0 && last < n_in && last + p.kernel > 0;
  };
  check(fits(in.height, out.height) && fits(in.width, out.width), p.name + ": output size");
  longest_ = std::max(longest_, out.width * p.stride + 2 * p.kernel + in.width);  // a row with what is around it
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

}  // namespace afds
