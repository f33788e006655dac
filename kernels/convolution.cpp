// Convolutions, step by step: predict, choose, copy by phase, multiply in tiles, finish.
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "engine.h"
#include "tiling.h"
#include "watch.h"

namespace afds {

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

// h = W p + b in parts: each reads the sums of a share of the inputs, and their rows from end to end.
void Engine::predict(const Run &run, const Conv &c) const {
  const Gate &g = c.gate;
  Workspace &ws = run.ws;
  const Active &a = ws.active[c.x];
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
  run.parts([&](int i) {
    const Share inputs = share(a.n, i, run.n);
    float *p = part(ws.p, i), *h = part(ws.h, i), *r = part(ws.r, i);
    pooled(run, c.x, inputs.begin, inputs.end, p);
    for (int j = inputs.begin; j < inputs.end; ++j) p[j] *= g.scale.data()[a.list[j]];
    if (i == 0) std::copy(g.bias.data(), g.bias.data() + n, h);
    else std::fill(h, h + n, 0.0f);
    if (!g.rank) return product(h, n, inputs, g.weight_rows, p, a.list.data());
    std::fill(r, r + g.rank, 0.0f);
    product(r, g.rank, inputs, g.reduce_rows, p, a.list.data());
  });
  if (!g.rank) return;
  run.wait();
  run.parts([&](int i) {
    const Share mine = share(g.rank, i, run.n);
    float *p = part(ws.p, i);
    std::fill(p + mine.begin, p + mine.end, 0.0f);
    for (int t = 0; t < run.n; ++t)
      for (int j = mine.begin; j < mine.end; ++j) p[j] += part(ws.r, t)[j];
    product(part(ws.h, i), n, mine, g.weight_rows, p, nullptr);
  });
}

// Keys of groups: the bits of the sums of their channels' scores.
static void sum_groups(Workspace &ws, int groups, int size) {
  for (int i = 0; i < groups; ++i) {
    float sum = 0, score;
    for (int k = i * size; k < (i + 1) * size; ++k) {
      std::memcpy(&score, &ws.keys[k], sizeof score);
      sum += score;
    }
    std::memcpy(&ws.group_keys[i], &sum, sizeof sum);
  }
}

// One thread: the winners, their scales, the steps of the product, and what all this costs.
void Engine::choose(const Run &run, const Conv &c, int op) const {
  Workspace &ws = run.ws;
  for (int t = 0; t < run.n; ++t) ws.claims[t].next.store(0, std::memory_order_relaxed);
  const Active &x = ws.active[c.x];
  Active &y = ws.active[c.y];
  // All rows at once then, also those of channels that lose on this image: with a scale of zero.
  ws.on_amx = c.amx.weight && (x.n == c.in || x.whole);
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
    float ceiling = g.ceiling;
    if (predicted < c.out) {  // what is predicted is capped, constants are not
      std::copy(g.constant.data(), g.constant.data() + c.out, q);
      for (int j = 0; j < predicted; ++j) q[g.dynamic[j]] = ws.h[j] > ceiling ? ceiling : ws.h[j];
      h = q;
      ceiling = INFINITY;
    }
    table_.score(keys, q, h, g.importance.data(), ceiling, c.out);
    const bool grouped = g.group > 1 && g.k < c.out;
    if (grouped) sum_groups(ws, c.out / g.group, g.group);
    const int32_t *ranked = grouped ? ws.group_keys.data() : keys;
    const int of = grouped ? c.out / g.group : c.out, most = grouped ? g.k / g.group : g.k;
    int32_t low = 1;
    int ties = of;  // winners that equal `low` and may still be taken
    const int positive = table_.count_ge(ranked, of, low);
    if (positive > most) {
      int32_t high = 0x7f800001;
      int count = -1, above = 0;  // keys >= low, keys >= high
      while (high - low > 1 && count != most) {
        const int32_t middle = low + (high - low) / 2;
        const int m = table_.count_ge(ranked, of, middle);
        if (m >= most) low = middle, count = m;
        else high = middle, above = m;
      }
      if (count != most) ties = most - above;
    }
    if (positive == of && most == of) {  // settled: all win, as in every image
      n = c.out;
      ws.row = first_.data();
    } else if (grouped) {
      for (int group = 0; group < of; ++group) {
        if (ranked[group] < low || (ranked[group] == low && ties-- <= 0)) continue;
        for (int k = group * g.group; k < (group + 1) * g.group; ++k) {
          rows[n] = k;
          n += keys[k] > 0;
        }
      }
    } else if (ties == of) {
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
    if (n < c.out && ws.on_amx) {
      std::fill(scale, scale + c.out, 0.0f);
      std::fill(shift, shift + c.out, 0.0f);
    }
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
        const int at = ws.on_amx ? k : i;
        scale[at] = pi;
        shift[at] = c.bias[k] * pi + c.beta[k];
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
    for (int i = 0; i < n; ++i) ws.scale[ws.on_amx ? ws.row[i] : i] *= c.factor[ws.row[i]];

  const int64_t pairs = list_steps(ws, c, n);
  ws.macs[op] = pairs * layout(c.y).height * layout(c.y).width + extra;
  if (ws.record) ws.chosen[op].assign(ws.row, ws.row + n);
  const bool by_pair = chosen_on_amx(ws, c) && !x.by_list;  // then both halves of a pair are picked
  if (c.halves && (x.by_list || by_pair)) {
    std::fill(ws.bits.begin(), ws.bits.end(), 0u);
    for (int j = 0; j < (by_pair ? x.n_pairs : x.n); ++j) {
      const int at = by_pair ? 2 * x.pair[j] : x.list[j];
      ws.bits[at / 32] |= (by_pair ? 3u : 1u) << (at % 32);
    }
  }

  // Active afterwards: the winners, and what the residual branch brings.
  ws.n_only = 0;
  y.whole = ws.on_amx;
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
  if (ws.on_amx) ws.n_only = 0;
  set_pairs(ws, c.y);
}

// The steps of the product, by channel and so by group; products a pixel. One thread.
int64_t Engine::list_steps(Workspace &ws, const Conv &c, int n) const {
  const Active &x = ws.active[c.x];
  const int32_t *rows = ws.row;
  const int per_in = c.in / c.groups, per_out = c.out / c.groups;
  if (chosen_on_amx(ws, c)) {  // by tap, then by pair, as their weights are picked
    int32_t *to = ws.xoff.data();
    ws.step_x = to;
    const int plane = plane_of(c);
    for (const Tap &t : c.tap)
      for (int i = 0; i < x.n_pairs; ++i)
        *to++ = (c.staged ? i : x.pair[i]) * plane + t.offset + (c.staged ? t.phase * c.stage.plane : 0);
    return int64_t(x.n) * c.taps * n;
  }
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
  const bool all = c.amx.weight && x.whole;  // pairs that are not active are read too
  const int copies = all ? (c.in + 1) / 2 : c.halves ? x.n_pairs : x.n;
  auto copy = [&](int j) {
    const int i = j / phases, ph = c.phases[j % phases], dy = ph / c.stride, dx = ph % c.stride;
    const float *from = c.halves ? reinterpret_cast<const float *>(words(run.ws, c.x, all ? i : x.pair[i]))
                                 : plane(run.ws, c.x, x.list[i]);
    float *to = run.ws.staging.data() + size_t(j) * s.plane;
    std::fill(to, to + s.lead, 0.0f);
    const int height = std::min(s.height, (l.height - dy + c.stride - 1) / c.stride);
    const int width = std::max(0, std::min(s.width, (l.width - dx + c.stride - 1) / c.stride));
    table_.stage(to + s.lead, s.pitch, from + dy * l.pitch + dx, l.pitch * c.stride, height, width, c.stride);
    std::fill(to + s.lead + height * s.pitch, to + s.plane, 0.0f);
  };
  run.parts([&](int part) {
    const Share mine = share(copies * phases, part, run.n);
    for (int j = mine.begin; j < mine.end; ++j) copy(j);
  });
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
  if (ws.on_amx || chosen_on_amx(ws, c)) return amx_tiles(run, c);
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
      const float channels = steps / c.taps * c.groups + ws.n_rows * (c.res >= 0 ? 2 : 1) * (floats ? 1.0f : 0.5f);
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
  const bool res_floats = res && values_[c.res].floats;
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
  const Half no_half{reinterpret_cast<uint32_t *>(ws.zeros.data()), 0, 0};
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
      if (res_floats) ptr.res[i] = res->on[k] ? plane(ws, c.res, k) : ws.zeros.data();
      else if (res) ptr.res_half[i] = res->on[k] ? half(ws, c.res, i, k) : no_half;
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
      tile.res = !begins ? ptr.out.data() + row : res_floats ? ptr.res.data() + row : nullptr;
      tile.res_half = res && !res_floats ? ptr.res_half.data() + row : nullptr;
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

static void floats_of(const Half &from, float *to, int n) {
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = (from.words[i] << (16 - from.shift)) & 0xffff0000u;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

// See set_lanes. Whoever multiplies a block of channels also brings it into their planes.
void Engine::channel_tiles(const Run &run, const Conv &c) const {
  Workspace &ws = run.ws;
  const Layout &out = layout(c.y);
  const int lanes = table_.lanes, pixels = static_cast<int>(c.at.size());
  const int pitch = (c.out + lanes - 1) / lanes * lanes;
  const float *base = c.staged   ? ws.staging.data() + c.stage.lead
                      : c.halves ? reinterpret_cast<const float *>(words(ws, c.x, 0))
                                 : plane(ws, c.x, 0);
  float *made = ws.pointers[run.t].transposed.data(), *line = made + size_t(pixels) * pitch;
  float *other = line + out.pixels + kSlack;  // what the residual brings, in floats
  const auto &tile_of = c.halves ? pairs_->tile : table_.tile;
  const int steps = (c.halves ? c.columns / 2 : c.in) * c.taps;
  static constexpr float kOnes[kMaxRows] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, kZeros[kMaxRows] = {};
  const float *x[kMaxRows], *sums[kMaxRows];
  float *to[kMaxRows];
  Tile tile{};
  tile.w = x, tile.out = to, tile.scale = kOnes, tile.shift = kZeros, tile.act = kNone, tile.mask = ones_.data();
  const uint32_t *mask = buffers_[values_[c.y].buffer].mask.data();
  const Active *res = c.res >= 0 ? &ws.active[c.res] : nullptr;
  const Value &y = values_[c.y];
  const bool halves = y.pairing != Pairing::kNone;
  std::fill(line, line + out.pixels, 0.0f);
  auto residual_of = [&](int k) -> const float * {
    if (!res || !res->on[k]) return nullptr;
    if (values_[c.res].floats) return plane(ws, c.res, k);
    floats_of(half(ws, c.res, k, k), other, out.pixels);
    return other;
  };
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
        tile_of[i == 0 ? kFetchPixels : kPlain][part.size()][block.size()](tile);
      }
    }
    const int begin = block.begin * lanes, end = std::min(c.out, block.end * lanes);
    for (int p = 0; p < pixels; ++p) {
      float *row = made + size_t(p) * pitch;
      for (int k = begin; k < end; ++k) row[k] = row[k] * ws.row_scale[k] + ws.row_shift[k];
    }
    for (int k = begin; k < end; ++k) {
      for (int p = 0; p < pixels; ++p) line[c.at[p]] = made[size_t(p) * pitch + k];
      float *done = y.floats ? plane(ws, c.y, k) : line;
      table_.eltwise(done, line, 1.0f, residual_of(k), mask, out.pixels, c.act,
                     y.pooled ? one_sum(ws, c.y, k) : nullptr);
      if (halves) table_.halve(half(ws, c.y, k, k), done, out.pixels);
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
  const Value &res = values_[c.res], &y = values_[c.y];
  const bool halves = y.pairing != Pairing::kNone;
  const uint32_t *mask = buffers_[y.buffer].mask.data();
  const int pixels = layout(c.y).pixels;
  float *line = ws.pointers[run.t].line.data();
  auto channel = [&](int i) {
    const int k = ws.only[i];
    const float *from = line;
    if (res.floats) from = plane(ws, c.res, k);
    else floats_of(half(ws, c.res, i, k), line, pixels);
    float *to = y.floats ? plane(ws, c.y, k) : line;
    table_.eltwise(to, from, 1.0f, nullptr, mask, pixels, c.act, y.pooled ? one_sum(ws, c.y, k) : nullptr);
    if (halves) table_.halve(half(ws, c.y, i, k), to, pixels);
  };
  run.parts([&](int part) {
    const Share mine = share_pairs(ws.n_only, part, run.n, [&](int i) { return ws.only[i] / 2; });
    for (int i = mine.begin; i < mine.end; ++i) channel(i);
  });
}

}  // namespace afds
