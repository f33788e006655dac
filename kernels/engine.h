// The engine: runs a plan image by image. See docs/runtime.md for the figure.
//
//   buffer   memory for planes of one layout; a plane is one channel with zero padding around and between its rows:
//
//            |-- lead --|row 0|0|row 1|0| ... |row H-1|0|-- tail --|      pitch = W + padding
//
//            so that a tap of a convolution is the same flat run of pixels at another offset
//   value    one feature map in a buffer; values may share one in place (a residual stream)
//   active   the channels of a value that are not zero, as a sorted list: all others hold no data and are not read
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "memory.h"
#include "share.h"
#include "table.h"
#include "threads.h"

namespace afds {

struct Layout {
  int height = 0, width = 0, pitch = 0, lead = 0, plane = 0;  // in floats
  int pixels = 0;                                             // flat pixels from the first to the last, rounded up
  bool operator==(const Layout &o) const {
    return height == o.height && width == o.width && pitch == o.pitch && lead == o.lead && plane == o.plane;
  }
};

constexpr int kSlots = 8;  // of pooled sums, at least, with more than one thread

struct Buffer {
  Layout layout;
  int channels = 0;
  bool floats = false, pairs = false;  // what its values are kept as: float32, or bf16 in pairs of channels, or both
  std::vector<uint32_t> mask;  // [layout.pixels]
};

// How a value's channels form pairs: by their numbers, (0, 1), (2, 3), ...; or, where that would leave many halves
// empty, by their places in the list of active channels.
enum class Pairing { kNone, kNumbers, kFree };

struct Value {
  int buffer = 0, channels = 0;
  bool pooled = false;  // its writers keep sums per channel
  bool floats = true;   // its planes are there in float32
  Pairing pairing = Pairing::kNone;
};

enum class Rows { kAll, kFixed, kDynamic, kFollow };

// Rows of weights, each from a multiple of kRound; where bf16 holds all of them exactly, kept as such: half the bytes
// to read, the same products.
struct PredictorRows {
  const float *f32 = nullptr;
  const uint16_t *bf16 = nullptr;
  int pitch = 0;
};

struct Gate {  // h = W (p * scale) + b over the dynamic channels, low-rank where reduce is there
  Floats weight;  // [in or rank][dynamic]
  Floats bias;    // [dynamic]
  Floats reduce;  // [in][rank] or empty
  Floats scale;   // [in]
  PredictorRows weight_rows, reduce_rows;  // the same, as they are kept
  int rank = 0;
  std::vector<int32_t> dynamic;  // channels that are predicted
  Floats constant;               // [K] saliency of the static channels, 0 for pruned and dynamic ones
  Floats importance, sign;       // [K]
  std::vector<uint8_t> scaled;   // [K] whether pi is multiplied in at run time (it is not folded)
  int64_t n_scaled = 0;          // of these
  float ceiling = 0;
  int k = 0, group = 1;          // winners, and how many neighbours win together
};

struct Tap {
  int phase, offset;
};

struct Block {
  Share vecs;
  int pixels;  // at most, of one tile
};

struct Amx {  // how a convolution is multiplied on AMX; see amx.cpp
  const uint16_t *weight = nullptr;  // [tile][block][rows][2 kAmxDepth], or null: it is not
  int rows = 0, tiles = 0, depth = 0, blocks = 0;
  bool panel = false;
  int group = 0;               // vectors of pixels that are in the panel at a time
  std::vector<int32_t> block;  // words to a block's first pair
};

struct Conv {
  std::string name;
  int x = 0, y = 0, res = -1;  // values
  int in = 0, out = 0, groups = 1, taps = 1, act = 0;
  bool res_nonnegative = false;
  Floats weight;  // [out][in / groups * taps], batch norm folded
  // In place of it, for a product of pairs: [out][taps][columns], columns = in / groups or one more; not folded, but
  // multiplied by `factor` [out] as the sums are stored.
  const uint16_t *halves = nullptr;
  int columns = 0;
  Floats factor;
  Floats bias;    // [out] folded, before pi
  Floats beta;    // [out] after pi
  Rows rows = Rows::kAll;
  std::vector<int32_t> fixed;
  Gate gate;
  // Input that cannot be read in place (strides, other sizes) is copied once per active channel, by phase.
  bool staged = false;
  int stride = 1;
  std::vector<Tap> tap;
  std::vector<int> phases;  // [phase] -> dy * stride + dx
  Layout stage;             // height, width: rows and columns that are copied
  std::vector<int32_t> all_xoff, all_woff;  // steps with all inputs active
  // Where channels are the lanes: the blocks' vectors of output channels, and [block][step][its channels].
  std::vector<Block> blocks;
  Floats streams;
  std::vector<int32_t> at;  // [pixel] its place in a plane
  bool may_amx = false;
  Amx amx;
  Floats all_scale;                         // where all rows are computed and none is predicted; the shift is `bias`
};

struct PoolOp {
  std::string name;
  int x = 0, y = 0, kernel = 2, stride = 2, pad = 0;
  bool max = true, include_pad = true;
  bool nonnegative = false;  // what it reads; then it may read and write pairs
};

struct MeanOp {  // y, one pixel, = mean of x
  std::string name;
  int x = 0, y = 0;
};

struct AddOp {  // y = act(a + b); b < 0: y = act(a)
  std::string name;
  int a = 0, b = -1, y = 0, act = 0;
};

struct SqueezeExcite {  // y = x * gate(fc2(act(fc1(mean x)))), in place
  std::string name;
  int x = 0, y = 0, in = 0, hidden = 0, act = 0, gate = 0;
  Floats weight1, bias1, weight2, bias2;  // [in][hidden], [hidden][in]
};

struct Linear {  // of the pooled value
  std::string name;
  int x = 0, in = 0, out = 0;
  Floats weight, bias;  // [in][out]
};

struct Op {
  enum Kind { kConv, kPool, kMean, kAdd, kSe, kLinear } kind;
  int index;
};

struct Active {
  std::vector<int32_t> list;
  std::vector<uint8_t> on;
  int n = 0;
  std::vector<int32_t> pair;  // numbers of the pairs that hold an active channel, sorted
  int n_pairs = 0;
  bool by_list = false;       // pair i: the active channels 2 i and 2 i + 1, not the channels of these numbers
  bool whole = false;         // planes of channels that are not active hold zeros
};

enum Part { kPredictor, kSelect, kWait, kConvolve, kRest, kParts };

// A layer's work is cut into one share a thread, each into units. A thread takes the units of its own share one by one,
// then what others have left of theirs: cores are not equally fast at all times (neighbours on a virtual machine,
// efficiency cores), and a layer ends when its last unit does.
struct alignas(64) Claim {
  std::atomic<int> next{0};
  int take() { return next.fetch_add(1, std::memory_order_relaxed); }
};

struct Workspace {
  Arena arena;
  std::vector<Floats> memory;  // by buffer
  std::vector<uint32_t *> words;  // by buffer: planes of pairs
  std::vector<Floats> sums;    // by buffer: [slots][channels][kSumLanes]
  std::vector<std::vector<int32_t>> slots;  // by buffer and channel: over how many of them its latest sums are spread
  std::unique_ptr<Claim[]> claims;          // [threads]
  std::vector<Active> active;  // by value
  Floats staging, p, r, h, q, scale, shift, zeros;  // p, r, h: one for each thread
  std::vector<int32_t> keys, group_keys, rows, xoff, woff, group_steps, group_rows, only;
  std::vector<uint32_t> bits;  // active inputs of the present layer, one bit each
  struct Pointers {  // of one thread, by row
    std::vector<const float *> w, res;
    std::vector<float *> out, sum;
    std::vector<Half> half, res_half;
    Floats line;                   // one plane on its way between floats and halves
    std::vector<uint16_t> picked;  // weights of active inputs of the rows of one tile
    Floats transposed;             // [pixel][channel] of a layer whose channels are lanes
    std::vector<int32_t> block;    // of a product on AMX whose inputs are chosen
    std::vector<uint32_t *> pair, res_pair;  // planes that rows 2 i and 2 i + 1 share
    Floats panel;                  // pixels of all steps, for AMX
    Floats wide;                   // all weights of these rows as floats, for products that do not read pairs
  };
  std::vector<Pointers> pointers;
  const int32_t *step_x = nullptr, *step_w = nullptr;  // steps of the present layer: xoff and woff, or all of them
  const int32_t *row = nullptr;                        // its rows, with scales and shifts: those above, or all of them
  const float *row_scale = nullptr, *row_shift = nullptr;
  int n_rows = 0, n_only = 0;
  std::vector<int64_t> macs;                // by op, of the latest image
  std::vector<double> seconds;              // by op and part, summed over images
  std::chrono::steady_clock::time_point done;  // when thread 0 had done its part of the latest step
  std::vector<std::vector<int32_t>> chosen; // by op: the winners of the latest image, where they are recorded
  bool profile = false, record = false;
  bool on_amx = false;  // the present convolution, with all rows and inputs
  Floats chosen_weights;  // halves, where they are chosen
};

// One thread's view of one image: member t of a team that cuts its work into n parts, however many it has.
struct Run {
  Workspace &ws;
  int t, n;
  Team *team;  // null: alone
  template <typename Part>
  void parts(const Part &part) const {  // those of this member
    for (int i = t, size = team ? team->size() : 1; i < n; i += size) part(i);
  }
  void wait() const {
    if (team) team->meet();
  }
  template <typename Alone>
  void wait(const Alone &alone) const {
    if (team) team->meet(alone);
    else alone();
  }
};

// Threads, and what images are worked on in. A forked child has neither its parent's threads nor the holders of its locks:
// it makes a crew of its own, and leaves the parent's where it lies.
struct Crew {
  explicit Crew(int threads);
  const int64_t process;  // that has made it
  std::mutex turn;        // of the team: it does one call at a time
  Team team;
  std::mutex mutex;
  std::vector<std::unique_ptr<Workspace>> idle;  // under `mutex`
};

class Engine {
 public:
  // bf16: convolutions given with `halves` are products of pairs; `auto` then takes the way that this CPU does fastest.
  Engine(int threads, const std::string &isa, bool bf16);
  ~Engine();

  int add_buffer(const Layout &layout, int channels);
  int add_value(const Value &value);
  void set_input(int value);
  // Weights that are kept are copied, so that those of ops may be borrowed; all else in an op is moved. `halves` are
  // [out][taps][in / groups] here.
  void add_conv(Conv conv, int kh, int kw, int stride, int pad_h, int pad_w, int dilation);
  void add_pool(PoolOp op);
  void add_mean(MeanOp op);
  void add_add(AddOp op);
  void add_se(SqueezeExcite op);
  void add_linear(Linear op);

  // x: (batch, channels, height, width), out: (batch, classes). Safe from several threads at once.
  void run(const float *x, int batch, float *out);
  // As run, with (batch, ops) MACs that were executed.
  void run_counted(const float *x, int batch, float *out, int64_t *macs);
  // As run, with seconds by op and part, summed over the images.
  void run_profiled(const float *x, int batch, float *out, double *seconds);
  // One image, and for each op the channels that it computed.
  void run_recorded(const float *x, float *out, std::vector<std::vector<int32_t>> &chosen);

  void check_ready() const;  // to run

  const std::string &op_name(int i) const { return names_[i]; }
  int ops() const { return static_cast<int>(ops_.size()); }
  int classes() const { return classes_; }
  int channels() const;
  int height() const;
  int width() const;
  int threads() const { return threads_; }
  const char *isa() const { return amx_ ? amx_->name : pairs_ ? pairs_->name : table_.name; }
  size_t weight_bytes() const { return arena_.bytes(); }
  size_t workspace_bytes() const;

 private:
  int check_value(int v) const;
  void check_floats(int x, int y, const std::string &name) const;
  bool untouched(const Conv &c) const;
  // Floats from one input channel of a convolution to the next, where it reads them.
  int plane_of(const Conv &c) const {
    return c.staged ? c.stage.plane * static_cast<int>(c.phases.size()) : layout(c.x).plane;
  }
  const Layout &layout(int value) const { return buffers_[values_[value].buffer].layout; }
  float *plane(Workspace &ws, int value, int c) const {
    const Buffer &b = buffers_[values_[value].buffer];
    return ws.memory[values_[value].buffer].data() + size_t(c) * b.layout.plane + b.layout.lead;
  }
  uint32_t *words(Workspace &ws, int value, int pair) const {
    const Buffer &b = buffers_[values_[value].buffer];
    return ws.words[values_[value].buffer] + size_t(pair) * b.layout.plane + b.layout.lead;
  }
  Half half(Workspace &ws, int value, int i, int c) const;  // of its i-th active channel, which is c
  void set_pairs(Workspace &ws, int value) const;
  void set_all(Workspace &ws, int value) const;  // all channels are active
  float *sum(Workspace &ws, int value, int c, int slot) const {
    const int b = values_[value].buffer;
    return ws.sums[b].data() + (size_t(slot) * buffers_[b].channels + c) * kSumLanes;
  }
  int32_t &slots(Workspace &ws, int value, int c) const { return ws.slots[values_[value].buffer][c]; }
  // Sums of one channel that are all in the first slot, at 0: of a channel that one thread makes from end to end.
  float *one_sum(Workspace &ws, int value, int c) const {
    float *s = sum(ws, value, c, 0);
    std::fill(s, s + kSumLanes, 0.0f);
    slots(ws, value, c) = 1;
    return s;
  }
  std::unique_ptr<Workspace> make_workspace() const;
  Crew &crew();
  std::unique_ptr<Workspace> take(Crew &crew) const;
  static void give(Crew &crew, std::unique_ptr<Workspace> ws);

  int64_t steps(int batch) const { return int64_t(batch) * (ops() + 1); }
  void step(const Run &run, int64_t step, const float *x, float *out, int64_t *macs) const;  // of the images
  void load(const Run &run, const float *x) const;
  void load_pairs(const Run &run, const float *x) const;
  void conv(const Run &run, const Conv &c, int op) const;
  void predict(const Run &run, const Conv &c) const;
  void choose(const Run &run, const Conv &c, int op) const;
  int64_t list_steps(Workspace &ws, const Conv &c, int n) const;
  void stage(const Run &run, const Conv &c) const;
  struct Loops;
  void tiles(const Run &run, const Conv &c) const;
  int sum_slots() const { return threads_ == 1 ? 1 : std::max(threads_, kSlots); }
  void set_lanes(Conv &c);
  void set_amx(Conv &c);
  void amx_tiles(const Run &run, const Conv &c) const;
  void pick_chosen(const Run &run, const Conv &c, int steps) const;
  bool chosen_on_amx(const Workspace &ws, const Conv &c) const { return c.may_amx && !ws.on_amx; }
  void channel_tiles(const Run &run, const Conv &c) const;
  bool makes_weights(const Active &x) const;  // a few rows at a time, for each image
  int tap_words(const Conv &c, const Active &x) const;
  void make_weights(const Run &run, const Conv &c, int row, int rows, const float **to) const;
  void finish(const Run &run, const Conv &c) const;
  void pool(const Run &run, const PoolOp &p, int op) const;
  bool of_pairs(const PoolOp &p) const { return !values_[p.x].floats || !values_[p.y].floats; }
  void pool_pairs(const Run &run, const PoolOp &p) const;
  void mean(const Run &run, const MeanOp &m, int op) const;
  void add(const Run &run, const AddOp &a, int op) const;
  void se(const Run &run, const SqueezeExcite &s, int op) const;
  void linear(const Run &run, const Linear &l, int op, float *out) const;
  void pooled(const Run &run, int value, int begin, int end, float *p) const;  // means of its active channels
  float *part(Floats &of, int t) const;  // of what is kept for each thread apart
  void copy_active(Workspace &ws, int from, int to) const;
  void halve_all(const Run &run, int value) const;

  void pad_rows(Floats &w, int rows, int columns);
  PredictorRows pack_rows(Floats w, int rows, int columns);

  const Table &table_;
  const PairTable *const pairs_;  // or null
  const AmxTable *const amx_;     // or null
  const int threads_;
  Arena arena_;
  std::atomic<Crew *> crew_;
  std::vector<Buffer> buffers_;
  std::vector<Value> values_;
  std::vector<Op> ops_;
  std::vector<std::string> names_;
  std::vector<Conv> convs_;
  std::vector<PoolOp> pools_;
  std::vector<MeanOp> means_;
  std::vector<AddOp> adds_;
  std::vector<SqueezeExcite> ses_;
  std::vector<Linear> linears_;
  std::vector<int32_t> first_;  // 0, 1, 2, ...: the channels where all are active
  std::vector<bool> full_;      // by value: all channels are active in every image
  std::vector<int32_t> stream_[kMaxVecs + 1];  // by vectors of a block: where its steps are, 0, v * lanes, ...
  std::vector<uint32_t> ones_;                 // a mask of channels
  size_t transposed_ = 0, panel_ = 0, chosen_ = 0;
  int input_ = -1, classes_ = 0;
  size_t staging_ = 0, picked_ = 0, wide_ = 0;
  int widest_ = 1, most_steps_ = 1, most_groups_ = 1, longest_ = kRound;
};

}  // namespace afds
