// Convolutions on AMX, where rows and inputs are always the same: packing when a plan is read, and the loops.
//
//      weights   [row tile][block of up to 16 pairs][row][pair]       row tiles and blocks of equal size
//      pixels    1 x 1: planes of pairs, in place      others: a panel [vector][step], steps as in a product of pairs
#include "engine.h"

namespace afds {

// A panel is as small as can be while all weights stay in the second cache, which they pass through for each; else as large as
// stays there itself, while they come from farther away. In bytes.
constexpr size_t kNearWeights = 1 << 20, kPanel = 512 << 10, kNearPanel = 24 << 10;
constexpr int kVecsEach = 4;          // from so many a thread on, pixels are cut between threads, else rows

static int amx_vecs(const Layout &out) { return ((out.height - 1) * out.pitch + out.width + kAmxVec - 1) / kAmxVec; }

void Engine::set_amx(Conv &c) {
  const bool all = c.rows == Rows::kAll || (c.rows == Rows::kDynamic && c.gate.k == c.out);
  if (!amx_ || !c.halves || c.groups > 1 || !all) return;
  Amx &m = c.amx;
  const int steps = (c.in + 1) / 2 * c.taps;
  m.tiles = (c.out + kAmxRows - 1) / kAmxRows;
  m.rows = round_up((c.out + m.tiles - 1) / m.tiles, 2);  // no pair of channels is cut
  m.tiles = (c.out + m.rows - 1) / m.rows;
  m.blocks = (steps + kAmxDepth - 1) / kAmxDepth;
  m.depth = (steps + m.blocks - 1) / m.blocks;
  m.panel = c.taps > 1 || c.tap[0].offset != 0;
  const int vecs = amx_vecs(layout(c.y)), weights = m.tiles * m.blocks * kAmxRows * kAmxDepth * 4;
  const size_t size_of = weights > int(kNearWeights) ? kPanel : kNearPanel;
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

void Engine::amx_tiles(const Run &run, const Conv &c) const {
  Workspace &ws = run.ws;
  const Amx &m = c.amx;
  const Layout &out = layout(c.y);
  const Value &y = values_[c.y];
  const Active *res = c.res >= 0 ? &ws.active[c.res] : nullptr;
  const bool res_floats = res && values_[c.res].floats, res_pairs = res && !res_floats && (res->n == c.out || res->whole);
  const int vecs = amx_vecs(out), steps = (c.in + 1) / 2 * c.taps;
  const bool by_px = run.n > 1 && vecs >= kVecsEach * run.n;
  int units = 1;
  if (run.n > 1) units = by_px ? std::min(vecs / run.n / 2, sum_slots() / run.n) : (m.tiles / run.n + 1) / 2;
  units = std::max(units, 1);
  if (y.pooled && run.t == 0)
    for (int k = 0; k < c.out; ++k) slots(ws, c.y, k) = by_px ? run.n * units : 1;

  Workspace::Pointers &ptr = ws.pointers[run.t];
  const Half no_half{reinterpret_cast<uint32_t *>(ws.zeros.data()), 0, 0};
  auto point = [&](Share rows, int slot) {
    for (int k = rows.begin; k < rows.end; ++k) {
      if (y.floats) ptr.out[k] = plane(ws, c.y, k);
      if (k % 2 == 0 && y.pairing != Pairing::kNone) ptr.pair[k / 2] = words(ws, c.y, k / 2);
      if (res_floats) ptr.res[k] = res->on[k] ? plane(ws, c.res, k) : ws.zeros.data();
      else if (res_pairs) ptr.res_pair[k / 2] = words(ws, c.res, k / 2);
      else if (res) ptr.res_half[k] = res->on[k] ? half(ws, c.res, k, k) : no_half;
      if (!y.pooled) continue;
      ptr.sum[k] = sum(ws, c.y, k, slot);
      std::fill(ptr.sum[k], ptr.sum[k] + kSumLanes, 0.0f);
    }
  };
  const uint32_t *base = c.staged ? reinterpret_cast<const uint32_t *>(ws.staging.data() + c.stage.lead) : words(ws, c.x, 0);
  auto *panel = reinterpret_cast<uint32_t *>(ptr.panel.data());
  AmxJob job{};
  job.a = m.weight, job.rows = m.rows, job.blocks = m.blocks, job.depth = m.depth, job.block = m.block.data();
  job.pair = m.panel ? kAmxVec : plane_of(c), job.vec = m.panel ? int64_t(steps) * kAmxVec : kAmxVec;
  job.channels = c.out;
  job.scale = ws.row_scale, job.shift = ws.row_shift;
  job.out = y.floats ? ptr.out.data() : nullptr;
  job.words = y.pairing != Pairing::kNone ? ptr.pair.data() : nullptr;
  job.res = res_floats ? ptr.res.data() : nullptr;
  job.res_half = res && !res_floats && !res_pairs ? ptr.res_half.data() : nullptr;
  job.res_words = res_pairs ? ptr.res_pair.data() : nullptr;
  job.mask = buffers_[y.buffer].mask.data();
  job.sum = y.pooled ? ptr.sum.data() : nullptr;
  job.act = c.act;
  amx_->configure(m.rows, m.depth);
  int built = -1;  // the first vector of what is in the panel
  for (int i = 0; i < run.n; ++i) {
    const int h = (run.t + i) % run.n;
    const Share own = share(by_px ? vecs : m.tiles, h, run.n);
    for (int u; (u = ws.claims[h].take()) < units;) {
      const Share part = share(own.size(), u, units), mine{own.begin + part.begin, own.begin + part.end};
      const Share px = by_px ? mine : Share{0, vecs}, tiles = by_px ? Share{0, m.tiles} : mine;
      if (mine.size() == 0) continue;
      point({tiles.begin * m.rows, std::min(c.out, tiles.end * m.rows)}, by_px ? h * units + u : 0);
      job.row_begin = tiles.begin, job.row_end = tiles.end;
      for (int v = px.begin; v < px.end; v += m.group) {
        const int n = std::min(m.group, px.end - v);
        if (m.panel && (by_px || built != v)) amx_->panel(panel, base + v * kAmxVec, c.all_xoff.data(), steps, n), built = v;
        job.b = m.panel ? panel : base;
        job.vec_first = m.panel ? v : 0;
        job.vec_begin = v, job.vec_end = v + n;
        amx_->product(job);
      }
    }
  }
  amx_->release();
}

}  // namespace afds
