// Python's view of the engine: build it op by op from the plan, then run it with the GIL released.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstring>
#include <exception>
#include <thread>

#include "dispatch.h"
#include "engine.h"

namespace nb = nanobind;
using namespace afds;

namespace {

using FloatArray = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using HalfArray = nb::ndarray<const uint16_t, nb::c_contig, nb::device::cpu>;
using Images = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

template <typename T>
T get(const nb::dict &d, const char *key) {
  if (!d.contains(key)) throw std::invalid_argument(std::string("plan: an op without ") + key);
  return nb::cast<T>(d[key]);
}

// As it lies in memory: a converted copy would be gone before it is read.
template <typename Array>
Array array_of(const nb::dict &d, const char *key) {
  Array array;
  if (!d.contains(key)) throw std::invalid_argument(std::string("plan: an op without ") + key);
  if (!nb::try_cast(d[key], array, false))
    throw std::invalid_argument(std::string("plan: ") + key + " is of another type or not contiguous");
  return array;
}

Floats floats(const nb::dict &d, const char *key) {
  const auto array = array_of<FloatArray>(d, key);
  Floats out(array.size());
  if (array.size()) std::memcpy(out.data(), array.data(), array.size() * sizeof(float));
  return out;
}

// Of an array that outlives the call; the engine copies it to where it is kept.
Floats borrowed(const nb::dict &d, const char *key) {
  const auto array = array_of<FloatArray>(d, key);
  return Floats(const_cast<float *>(array.data()), array.size());
}

template <typename T>
nb::object owned(std::vector<T> data, std::initializer_list<size_t> shape) {
  auto *keep = new std::vector<T>(std::move(data));
  nb::capsule owner(keep, [](void *p) noexcept { delete static_cast<std::vector<T> *>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(keep->data(), shape, owner));
}

// Runs `work` while other Python threads may run. A thread that comes back when the interpreter has been torn down CPython
// ends by unwinding, through frames that must not throw, and with that the program: it stays here instead.
template <typename Work>
void without_gil(const Work &work) {
  PyThreadState *state = PyEval_SaveThread();
  std::exception_ptr error;
  try {
    work();
  } catch (...) {
    error = std::current_exception();
  }
  try {
    PyEval_RestoreThread(state);
  } catch (...) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
  if (error) std::rethrow_exception(error);
}

void check(const Engine &e, const Images &x) {
  e.check_ready();
  if (x.shape(0) < 1 || int64_t(x.shape(1)) != e.channels() || int64_t(x.shape(2)) != e.height() ||
      int64_t(x.shape(3)) != e.width())
    throw std::invalid_argument("images of another shape than the plan's input");
}

Conv conv_of(const nb::dict &d) {
  Conv c;
  c.name = get<std::string>(d, "name");
  c.x = get<int>(d, "x");
  c.y = get<int>(d, "y");
  c.res = get<int>(d, "residual");
  c.in = get<int>(d, "in_channels");
  c.out = get<int>(d, "out_channels");
  c.groups = get<int>(d, "groups");
  c.act = get<int>(d, "act");
  c.res_nonnegative = get<bool>(d, "residual_nonnegative");
  if (d.contains("halves")) {
    const auto array = array_of<HalfArray>(d, "halves");
    const int64_t size = int64_t(c.out) * (c.groups > 0 ? c.in / c.groups : 0) * get<int>(d, "kernel_h") * get<int>(d, "kernel_w");
    if (int64_t(array.size()) != size) throw std::invalid_argument("plan: " + c.name + ": weights");
    c.halves = array.data();
    c.factor = floats(d, "factor");
  } else {
    c.weight = borrowed(d, "weight");
  }
  c.bias = floats(d, "bias");
  const auto rows = get<std::string>(d, "rows");
  if (rows == "all") {
    c.rows = Rows::kAll;
  } else if (rows == "follow") {
    c.rows = Rows::kFollow;
  } else if (rows == "fixed") {
    c.rows = Rows::kFixed;
    c.fixed = get<std::vector<int32_t>>(d, "fixed");
  } else if (rows == "dynamic") {
    c.rows = Rows::kDynamic;
    Gate &g = c.gate;
    c.beta = floats(d, "beta");
    g.weight = borrowed(d, "predictor_weight");
    g.bias = floats(d, "predictor_bias");
    g.scale = floats(d, "predictor_scale");
    g.rank = get<int>(d, "rank");
    if (g.rank < 0) throw std::invalid_argument("plan: a negative rank");
    if (g.rank) g.reduce = borrowed(d, "predictor_reduce");
    g.dynamic = get<std::vector<int32_t>>(d, "dynamic");
    g.constant = floats(d, "constant");
    g.importance = floats(d, "importance");
    g.sign = floats(d, "sign");
    g.scaled.assign(c.out > 0 ? c.out : 0, 0);
    for (int32_t k : g.dynamic)
      if (k >= 0 && k < c.out) g.scaled[k] = 1;
    g.ceiling = get<float>(d, "ceiling");
    g.k = get<int>(d, "k");
    g.group = get<int>(d, "group");
  } else {
    throw std::invalid_argument("plan: rows " + rows);
  }
  return c;
}

const char *kPartNames[kParts] = {"predictor", "select", "wait", "conv", "rest"};

}  // namespace

NB_MODULE(_kernels, m) {
  m.doc() = "Kernels that compute the selected channels only.";
  m.def("usable_isas", &usable_tables, nb::arg("bf16"), "Instruction sets that this CPU can run, the fastest first.");
  m.attr("parts") = nb::make_tuple(kPartNames[0], kPartNames[1], kPartNames[2], kPartNames[3], kPartNames[4]);
  nb::class_<Engine>(m, "Engine")
      .def(nb::init<int, const std::string &, bool>(), nb::arg("threads"), nb::arg("isa"), nb::arg("bf16"))
      .def("add_buffer",
           [](Engine &e, const nb::dict &d) {
             Layout l;
             l.height = get<int>(d, "height");
             l.width = get<int>(d, "width");
             l.pitch = get<int>(d, "pitch");
             l.lead = get<int>(d, "lead");
             l.plane = get<int>(d, "plane");
             return e.add_buffer(l, get<int>(d, "channels"));
           })
      .def("add_value",
           [](Engine &e, const nb::dict &d) {
             Value v{get<int>(d, "buffer"), get<int>(d, "channels"), get<bool>(d, "pooled"), get<bool>(d, "floats")};
             const auto pairs = get<std::string>(d, "pairs");
             v.pairing = pairs == "numbers" ? Pairing::kNumbers : pairs == "free" ? Pairing::kFree : Pairing::kNone;
             return e.add_value(v);
           })
      .def("set_input", &Engine::set_input)
      .def("check_ready", &Engine::check_ready)
      .def("add_conv",
           [](Engine &e, const nb::dict &d) {
             e.add_conv(conv_of(d), get<int>(d, "kernel_h"), get<int>(d, "kernel_w"), get<int>(d, "stride"),
                        get<int>(d, "pad_h"), get<int>(d, "pad_w"), get<int>(d, "dilation"));
           })
      .def("add_pool",
           [](Engine &e, const nb::dict &d) {
             PoolOp p;
             p.name = get<std::string>(d, "name");
             p.x = get<int>(d, "x");
             p.y = get<int>(d, "y");
             p.kernel = get<int>(d, "kernel");
             p.stride = get<int>(d, "stride");
             p.pad = get<int>(d, "pad");
             p.max = get<bool>(d, "max");
             p.include_pad = get<bool>(d, "include_pad");
             p.nonnegative = get<bool>(d, "nonnegative");
             e.add_pool(std::move(p));
           })
      .def("add_gap",
           [](Engine &e, const nb::dict &d) {
             e.add_mean({get<std::string>(d, "name"), get<int>(d, "x"), get<int>(d, "y")});
           })
      .def("add_add",
           [](Engine &e, const nb::dict &d) {
             AddOp a;
             a.name = get<std::string>(d, "name");
             a.a = get<int>(d, "a");
             a.b = get<int>(d, "b");
             a.y = get<int>(d, "y");
             a.act = get<int>(d, "act");
             e.add_add(std::move(a));
           })
      .def("add_se",
           [](Engine &e, const nb::dict &d) {
             SqueezeExcite s;
             s.name = get<std::string>(d, "name");
             s.x = get<int>(d, "x");
             s.y = get<int>(d, "y");
             s.in = get<int>(d, "in_channels");
             s.hidden = get<int>(d, "hidden");
             s.act = get<int>(d, "act");
             s.gate = get<int>(d, "gate");
             s.weight1 = floats(d, "weight1");
             s.bias1 = floats(d, "bias1");
             s.weight2 = floats(d, "weight2");
             s.bias2 = floats(d, "bias2");
             e.add_se(std::move(s));
           })
      .def("add_linear",
           [](Engine &e, const nb::dict &d) {
             Linear l;
             l.name = get<std::string>(d, "name");
             l.x = get<int>(d, "x");
             l.in = get<int>(d, "in_channels");
             l.out = get<int>(d, "out_channels");
             l.weight = borrowed(d, "weight");
             l.bias = floats(d, "bias");
             e.add_linear(std::move(l));
           })
      .def_prop_ro("threads", &Engine::threads)
      .def_prop_ro("isa", &Engine::isa)
      .def_prop_ro("weight_bytes", &Engine::weight_bytes)
      .def_prop_ro("workspace_bytes", &Engine::workspace_bytes)
      .def("run",
           [](Engine &e, Images x) {
             check(e, x);
             std::vector<float> out(x.shape(0) * e.classes());
             without_gil([&] { e.run(x.data(), int(x.shape(0)), out.data()); });
             return owned(std::move(out), {x.shape(0), size_t(e.classes())});
           })
      .def("run_counted",
           [](Engine &e, Images x) {
             check(e, x);
             std::vector<float> out(x.shape(0) * e.classes());
             std::vector<int64_t> macs(x.shape(0) * e.ops());
             without_gil([&] { e.run_counted(x.data(), int(x.shape(0)), out.data(), macs.data()); });
             return nb::make_tuple(owned(std::move(out), {x.shape(0), size_t(e.classes())}),
                                   owned(std::move(macs), {x.shape(0), size_t(e.ops())}));
           })
      .def("run_profiled",
           [](Engine &e, Images x) {
             check(e, x);
             std::vector<float> out(x.shape(0) * e.classes());
             std::vector<double> seconds(size_t(e.ops()) * kParts);
             without_gil([&] { e.run_profiled(x.data(), int(x.shape(0)), out.data(), seconds.data()); });
             return owned(std::move(seconds), {size_t(e.ops()), size_t(kParts)});
           })
      .def("run_recorded", [](Engine &e, Images x) {
        check(e, x);
        std::vector<float> out(e.classes());
        std::vector<std::vector<int32_t>> chosen;
        without_gil([&] { e.run_recorded(x.data(), out.data(), chosen); });
        return chosen;
      });
}
