// Everything that is not a convolution.
#include <cmath>

#include "engine.h"
#include "watch.h"

namespace afds {

void Engine::pool(const Run &run, const PoolOp &p, int op) const {
  Watch watch(run, op);
  Workspace &ws = run.ws;
  if (run.t == 0) copy_active(ws, p.x, p.y), ws.macs[op] = 0;
  const Active &a = ws.active[p.x];
  const Layout &in = layout(p.x), &out = layout(p.y);
  const uint32_t *mask = buffers_[values_[p.y].buffer].mask.data();
  const bool sums = values_[p.y].pooled, halves = values_[p.y].pairing != Pairing::kNone;
  if (halves) run.wait();  // which pairs there are
  if (of_pairs(p)) {
    pool_pairs(run, p);
    return watch.lap(kRest);
  }
  constexpr int kWide = 1024;
  // The outputs [first, last) whose window's element d lies inside the map.
  auto inside = [&](int d, int n_in, int n_out) {
    const int q = d - p.pad;
    const int first = q >= 0 ? 0 : (-q + p.stride - 1) / p.stride;
    const int last = n_in - 1 - q < 0 ? 0 : std::min(n_out, (n_in - 1 - q) / p.stride + 1);
    return Share{std::min(first, n_out), std::max(last, std::min(first, n_out))};
  };
  auto channel = [&](int i) {
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
  };
  run.parts([&](int part) {
    const Share mine = share_pairs(a.n, part, run.n, [&](int i) { return a.list[i] / 2; });
    for (int i = mine.begin; i < mine.end; ++i) channel(i);
  });
  watch.lap(kRest);
}

// The largest of each window, both channels of a pair at once. Zeros around the map change nothing where no number is negative.
// Each thread makes some rows of all channels: it has most of what they read in its own cache.
void Engine::pool_pairs(const Run &run, const PoolOp &p) const {
  Workspace &ws = run.ws;
  const Active &a = ws.active[p.x];
  const Layout &in = layout(p.x), &out = layout(p.y);
  const bool sums = values_[p.y].pooled;
  auto *line = reinterpret_cast<uint32_t *>(ws.pointers[run.t].line.data());
  const int wide = in.width + p.pad + p.kernel + p.stride;
  auto pool = [&](int pair, int part) {
    const Share rows = share(out.height, part, run.n);
    const uint32_t *from = words(ws, p.x, pair);
    uint32_t *to = words(ws, p.y, pair);
    for (int y = rows.begin; y < rows.end; ++y) {
      const int first = y * p.stride - p.pad;
      std::fill(line, line + wide, 0u);
      for (int dy = std::max(first, 0); dy < std::min(first + p.kernel, in.height); ++dy)
        table_.max_words(line + p.pad, from + dy * in.pitch, in.width, 1);
      uint32_t *row = to + y * out.pitch;
      std::fill(row, row + out.width, 0u);
      for (int dx = 0; dx < p.kernel; ++dx) table_.max_words(row, line + dx, out.width, p.stride);
    }
    if (!sums) return;
    float none[kSumLanes] = {};
    auto sum_of = [&](int c) {
      if (c >= values_[p.y].channels) return none;
      if (part == 0) slots(ws, p.y, c) = run.n;
      float *s = sum(ws, p.y, c, part);
      std::fill(s, s + kSumLanes, 0.0f);
      return s;
    };
    float *lower = sum_of(2 * pair), *upper = sum_of(2 * pair + 1);
    table_.sum_words(lower, upper, to + rows.begin * out.pitch, rows.size() ? (rows.size() - 1) * out.pitch + out.width : 0);
  };
  run.parts([&](int part) {
    for (int i = 0; i < a.n_pairs; ++i) pool(a.pair[i], part);
  });
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
  const bool sums = values_[a.y].pooled;
  run.parts([&](int part) {
    const Share mine = share_pairs(ws.n_rows, part, run.n, [&](int i) { return ws.rows[i] / 2; });
    for (int i = mine.begin; i < mine.end; ++i) {
      const int k = ws.rows[i];
      const bool in_a = x.on[k], in_b = a.b >= 0 && ws.active[a.b].on[k];
      const float *first = plane(ws, in_a ? a.a : a.b, k);
      table_.eltwise(plane(ws, a.y, k), first, 1.0f, in_a && in_b ? plane(ws, a.b, k) : nullptr, mask, l.pixels, a.act,
                     sums ? one_sum(ws, a.y, k) : nullptr);
    }
  });
  run.wait();
  if (run.t == 0) {
    Active &y = ws.active[a.y];
    std::fill(y.on.begin(), y.on.end(), 0);
    y.n = ws.n_rows, y.whole = false;
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
  run.parts([&](int part) {
    const Share mine = share_pairs(a.n, part, run.n, [&](int i) { return a.list[i] / 2; });
    for (int i = mine.begin; i < mine.end; ++i)
      table_.halve(half(run.ws, value, i, a.list[i]), plane(run.ws, value, a.list[i]), layout(value).pixels);
  });
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
  run.parts([&](int part) {
    const Share mine = share(a.n, part, run.n);
    for (int i = mine.begin; i < mine.end; ++i) {
      const int k = a.list[i];
      table_.eltwise(plane(ws, s.y, k), plane(ws, s.x, k), ws.q[k], nullptr, mask, l.pixels, kNone, one_sum(ws, s.y, k));
    }
  });
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
  const int pitch = round_up(l.out, kRound);
  const float *rows[kChunk];
  run.parts([&](int part) {
    const Share mine = share_lines(l.out, part, run.n);
    std::copy(l.bias.data() + mine.begin, l.bias.data() + mine.end, out + mine.begin);
    for (int i = 0; i < a.n; i += kChunk) {
      const int count = std::min(kChunk, a.n - i);
      for (int j = 0; j < count; ++j) rows[j] = l.weight.data() + size_t(a.list[i + j]) * pitch + mine.begin;
      table_.axpy(out + mine.begin, mine.size(), rows, p + i, count);
    }
  });
  if (run.t == 0) ws.macs[op] = int64_t(a.n) * l.out;
  watch.lap(kConvolve);
}

}  // namespace afds
