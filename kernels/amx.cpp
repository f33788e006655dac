// Convolutions on AMX: packing when a plan is read, and the loops.
//
//                rows and inputs always the same                   chosen for each image
//      weights   [row tile][block of up to 16 pairs][row][pair],   picked: [row][tap][active pair]
//                row tiles and blocks of equal size
//      pixels    1 x 1: planes of pairs, in place                  a panel [vector][tap][active pair]
//                others: a panel [vector][pair][tap]
#include "dispatch.h"
#include "engine.h"

namespace afds {

// A panel is as small as can be while all weights stay in the second cache, which they pass through for each; else as large as
// stays there itself, while they come from farther away. In bytes.
constexpr size_t kNearWeights = 1 << 20, kPanel = 512 << 10, kNearPanel = 24 << 10;
constexpr int kMostSteps = 1 << 16;   // so that a panel of a few vectors is megabytes
constexpr int kVecsEach = 4;          // from so many a thread on, pixels are cut between threads, else rows

// A chosen row's weights, in words: whole blocks, and what `pick` writes behind them.
static int amx_pitch(int steps) { return odd_lines(steps + kAmxDepth); }

static int amx_vecs(const Layout &out) { return ((out.height - 1) * out.pitch + out.width + kAmxVec - 1) / kAmxVec; }

void Engine::set_amx(Conv &c) {
  if (!amx_ || !c.halves || c.groups > 1) return;
  const bool all = c.rows == Rows::kAll || (c.rows == Rows::kDynamic && c.gate.k == c.out);
  const int steps = (c.in + 1) / 2 * c.taps;
  if (steps > kMostSteps) return;
  c.may_amx = true;
  if (!(all && full_[c.x])) {
    const size_t padded = round_up(steps, kAmxDepth), vecs = amx_vecs(layout(c.y));
    chosen_ = std::max(chosen_, size_t(round_up(c.out, kAmxRows)) * amx_pitch(steps) + kAmxRows);
    panel_ = std::max(panel_, std::max(kNearPanel / 4, padded * kAmxVec * std::min<size_t>(vecs, kVecsEach * threads_)));
  }
  if (!all) return;
  Amx &m = c.amx;
  m.tiles = (c.out + kAmxRows - 1) / kAmxRows;
  m.rows = round_up((c.out + m.tiles - 1) / m.tiles, 2);  // no pair of channels is cut
  m.tiles = (c.out + m.rows - 1) / m.rows;
  m.blocks = (steps + kAmxDepth - 1) / kAmxDepth;
  m.depth = (steps + m.blocks - 1) / m.blocks;
  m.panel = c.taps > 1 || c.tap[0].offset != 0;
  const int vecs = amx_vecs(layout(c.y));
  const size_t weights = size_t(m.tiles) * m.blocks * kAmxRows * kAmxDepth * 4;
  const size_t size_of = weights > kNearWeights ? kPanel : kNearPanel;
  const int most = static_cast<int>(size_of / (size_t(steps) * kAmxVec * sizeof(uint32_t)));
  m.group = vecs < kVecsEach * threads_ ? vecs : std::min(vecs, std::max(2, most / 2 * 2));
  if (m.panel) panel_ = std::max(panel_, size_t(steps) * kAmxVec * m.group);
  const size_t size = size_t(m.tiles) * m.blocks * m.rows * 2 * kAmxDepth;
  auto *to = reinterpret_cast<uint16_t *>(arena_.take((size + 1) / 2));
  m.weight = to;
  for (int tile = 0; tile < m.tiles; ++tile)
    for (int b = 0, done = 0; b < m.blocks; ++b) {
      const int first = std::min(b * m.depth, steps - m.depth);  // the last block begins among the steps of the one before
      if (tile == 0) m.block.push_back(first * (m.panel ? kAmxVec : plane_of(c)));
      for (int row = 0; row < m.rows; ++row, to += 2 * kAmxDepth) {
        const int k = tile * m.rows + row;
        for (int s = done; k < c.out && s < first + m.depth; ++s) {
          const int i = s / c.taps * 2;
          const uint16_t *from = c.halves + (size_t(k) * c.taps + s % c.taps) * c.in + i;
          to[(s - first) * 2] = from[0];
          if (i + 1 < c.in) to[(s - first) * 2 + 1] = from[1];
        }
      }
      done = first + m.depth;
    }
}

// A layer's winners on this image: their weights for its active inputs, side by side. Each thread picks some rows.
void Engine::pick_chosen(const Run &run, const Conv &c, int steps) const {
  Workspace &ws = run.ws;
  const Active &x = ws.active[c.x];
  const int pitch = amx_pitch(steps), pairs = x.n_pairs;
  run.parts([&](int part) {
    const Share mine = share(ws.n_rows, part, run.n);
    for (int i = mine.begin; i < mine.end; ++i) {
      const uint16_t *from = c.halves + size_t(ws.row[i]) * c.taps * c.columns;
      uint16_t *row = reinterpret_cast<uint16_t *>(ws.chosen_weights.data() + size_t(i) * pitch), *to = row;
      for (int t = 0; t < c.taps; ++t, from += c.columns, to += 2 * pairs) {
        pick(to, from, c.columns, ws.bits.data(), x.list.data(), x.n);
        if (x.by_list && x.n % 2) to[x.n] = 0;
      }
      std::fill(to, row + round_up(steps, kAmxDepth) * 2, uint16_t(0));
    }
  });
}

void Engine::amx_tiles(const Run &run, const Conv &c) const {
  Workspace &ws = run.ws;
  const bool chosen = !ws.on_amx;
  const Layout &out = layout(c.y);
  const Value &y = values_[c.y];
  const Active &x = ws.active[c.x], &made = ws.active[c.y];
  const Active *res = c.res >= 0 ? &ws.active[c.res] : nullptr;
  const bool res_floats = res && values_[c.res].floats;
  const bool res_pairs = res && !res_floats && !chosen && (res->n == c.out || res->whole);
  const bool halves = y.pairing != Pairing::kNone, whole = !chosen || made.by_list || ws.n_rows == c.out;
  const int rows = chosen ? ws.n_rows : c.out, vecs = amx_vecs(out);
  if (rows == 0) return;
  auto channel = [&](int i) { return chosen ? ws.row[i] : i; };

  AmxJob job{};
  int tiles, steps, group;
  bool in_panel = true;
  std::vector<int32_t> &block = ws.pointers[run.t].block;
  if (chosen) {
    steps = x.n_pairs * c.taps;
    tiles = (rows + kAmxRows - 1) / kAmxRows;
    job.rows = round_up((rows + tiles - 1) / tiles, 2);
    tiles = (rows + job.rows - 1) / job.rows;
    job.depth = kAmxDepth, job.blocks = (steps + kAmxDepth - 1) / kAmxDepth;
    job.a = reinterpret_cast<const uint16_t *>(ws.chosen_weights.data());
    job.a_row = amx_pitch(steps) * 2, job.a_block = 2 * kAmxDepth, job.a_tile = job.a_row * job.rows;
    block.clear();
    for (int b = 0; b < job.blocks; ++b) block.push_back(b * kAmxDepth * kAmxVec);
    job.block = block.data();
    pick_chosen(run, c, steps);
    if (run.n > 1) run.wait();
    const int near = static_cast<int>(kNearPanel / (size_t(std::max(1, round_up(steps, kAmxDepth))) * kAmxVec * 4)) / 2 * 2;
    group = vecs < kVecsEach * threads_ ? vecs : std::min(vecs, std::max(2, near));
  } else {
    const Amx &m = c.amx;
    steps = (c.in + 1) / 2 * c.taps;
    tiles = m.tiles, group = m.group, in_panel = m.panel;
    job.rows = m.rows, job.depth = m.depth, job.blocks = m.blocks, job.block = m.block.data();
    job.a = m.weight;
    job.a_row = 2 * kAmxDepth, job.a_block = job.a_row * m.rows, job.a_tile = job.a_block * m.blocks;
  }
  const int panel_steps = chosen ? job.blocks * kAmxDepth : steps;
  const bool by_px = run.n > 1 && (vecs >= kVecsEach * run.n || (halves && !whole));  // two threads write no word in common
  int units = 1;
  if (run.n > 1) units = by_px ? std::min(vecs / run.n / 2, sum_slots() / run.n) : (tiles / run.n + 1) / 2;
  units = std::max(units, 1);
  if (y.pooled && run.t == 0)
    for (int i = 0; i < rows; ++i) slots(ws, c.y, channel(i)) = by_px ? run.n * units : 1;

  Workspace::Pointers &ptr = ws.pointers[run.t];
  const Half no_half{reinterpret_cast<uint32_t *>(ws.zeros.data()), 0, 0};
  auto point = [&](Share part, int slot) {
    for (int i = part.begin; i < part.end; ++i) {
      const int k = channel(i);
      if (y.floats) ptr.out[i] = plane(ws, c.y, k);
      if (halves && !whole) ptr.half[i] = half(ws, c.y, i, k);
      else if (halves && i % 2 == 0) ptr.pair[i / 2] = chosen ? half(ws, c.y, i, k).words : words(ws, c.y, i / 2);
      if (res_floats) ptr.res[i] = res->on[k] ? plane(ws, c.res, k) : ws.zeros.data();
      else if (res_pairs) ptr.res_pair[i / 2] = words(ws, c.res, i / 2);
      else if (res) ptr.res_half[i] = res->on[k] ? half(ws, c.res, i, k) : no_half;
      if (!y.pooled) continue;
      ptr.sum[i] = sum(ws, c.y, k, slot);
      std::fill(ptr.sum[i], ptr.sum[i] + kSumLanes, 0.0f);
    }
  };
  const uint32_t *base = c.staged ? reinterpret_cast<const uint32_t *>(ws.staging.data() + c.stage.lead) : words(ws, c.x, 0);
  auto *panel = reinterpret_cast<uint32_t *>(ptr.panel.data());
  job.pair = in_panel ? kAmxVec : plane_of(c), job.vec = in_panel ? int64_t(panel_steps) * kAmxVec : kAmxVec;
  job.channels = rows;
  job.scale = ws.row_scale, job.shift = ws.row_shift;
  job.out = y.floats ? ptr.out.data() : nullptr;
  job.words = halves && whole ? ptr.pair.data() : nullptr;
  job.half = halves && !whole ? ptr.half.data() : nullptr;
  job.res = res_floats ? ptr.res.data() : nullptr;
  job.res_half = res && !res_floats && !res_pairs ? ptr.res_half.data() : nullptr;
  job.res_words = res_pairs ? ptr.res_pair.data() : nullptr;
  job.mask = buffers_[y.buffer].mask.data();
  job.sum = y.pooled ? ptr.sum.data() : nullptr;
  job.act = c.act;
  amx_->configure(job.rows, job.depth);
  int built = -1;  // the first vector of what is in the panel
  for (int i = 0; i < run.n; ++i) {
    const int h = (run.t + i) % run.n;
    const Share own = share(by_px ? vecs : tiles, h, run.n);
    for (int u; (u = ws.claims[h].take()) < units;) {
      const Share part = share(own.size(), u, units), mine{own.begin + part.begin, own.begin + part.end};
      const Share px = by_px ? mine : Share{0, vecs}, of = by_px ? Share{0, tiles} : mine;
      if (mine.size() == 0) {  // its sums are added too
        if (by_px) point({0, rows}, h * units + u);
        continue;
      }
      point({of.begin * job.rows, std::min(rows, of.end * job.rows)}, by_px ? h * units + u : 0);
      job.row_begin = of.begin, job.row_end = of.end;
      for (int v = px.begin; v < px.end; v += group) {
        const int n = std::min(group, px.end - v);
        if (in_panel && (by_px || built != v)) {
          amx_->panel(panel, base + v * kAmxVec, chosen ? ws.step_x : c.all_xoff.data(), steps, panel_steps, n);
          built = v;
        }
        job.b = in_panel ? panel : base;
        job.vec_first = in_panel ? v : 0;
        job.vec_begin = v, job.vec_end = v + n;
        amx_->product(job);
      }
    }
  }
  amx_->release();
}

}  // namespace afds
