// The door to the CPU engine: its weights, its passes, and the packing of matrices.
#include <pybind11/stl.h>

#include <chrono>

#include "engine.h"
#include "module.h"

namespace baton {
namespace {

// --- packed matrices -----------------------------------------------------------------------------

Format packed_format(const std::string& name) {
  if (name == "bf16") return Format::kPackedBF16;
  if (name == "int8") return Format::kPackedInt8;
  if (name == "int4") return Format::kPackedInt4;
  throw py::value_error("format: '" + name + "' is none of bf16, int8, int4");
}

Matrix packed_shape(const std::string& format, int rows, int cols, int group) {
  Matrix m{nullptr, packed_format(format), rows, cols, group};
  if (rows < 1 || cols < 1) throw py::value_error("matrix: rows and cols must be positive");
  if (is_integer(m.format) && group != 32 && group != 64 && group != 128)
    throw py::value_error("group: 32, 64 or 128 columns");
  if (!is_integer(m.format) && group) throw py::value_error("group: bf16 has none");
  return m;
}

size_t packed_bytes(const std::string& format, int rows, int cols, int group) {
  return packed_shape(format, rows, cols, group).packed_bytes();
}

using Bytes = Array<uint8_t>;

void check_codes(const int8_t* codes, size_t count, Format format) {
  const int low = format == Format::kPackedInt4 ? -8 : -127, high = format == Format::kPackedInt4 ? 7 : 127;
  for (size_t i = 0; i < count; i++)
    if (codes[i] < low || codes[i] > high) throw py::value_error("codes: out of the format's range");
}

Bytes pack(const std::string& format, const py::array& matrix, const std::optional<py::array>& scales,
           int group, std::optional<Bytes> out) {
  if (matrix.ndim() != 2) throw py::value_error("matrix: [rows, cols]");
  if (!(matrix.flags() & py::array::c_style)) throw py::value_error("matrix: must be contiguous");
  const Matrix m = packed_shape(format, int(matrix.shape(0)), int(matrix.shape(1)), group);
  const char kind = matrix.dtype().kind();
  if (matrix.itemsize() != (is_integer(m.format) ? 1 : 2) || kind != (is_integer(m.format) ? 'i' : 'u'))
    throw py::value_error("matrix: uint16 for bf16, int8 for int8 and int4");
  if (is_integer(m.format)) {
    if (!scales || scales->ndim() != 2 || scales->shape(0) != m.rows || scales->shape(1) != m.groups() ||
        scales->dtype().kind() != 'f' || scales->itemsize() != 2 ||
        !(scales->flags() & py::array::c_style))
      throw py::value_error("scales: contiguous float16[rows, groups]");
    check_codes(static_cast<const int8_t*>(matrix.data()), size_t(matrix.size()), m.format);
  }
  Bytes packed = out ? *out : Bytes(py::ssize_t(m.packed_bytes()));
  if (packed.size() != py::ssize_t(m.packed_bytes())) throw py::value_error("out: wrong size");
  unsigned char* to = packed.mutable_data();
  const void* from = matrix.data();
  const uint16_t* by = scales ? static_cast<const uint16_t*>(scales->data()) : nullptr;
  py::gil_scoped_release release;
  if (is_integer(m.format))
    pack_int(m, static_cast<const int8_t*>(from), by, to);
  else
    pack_bf16(m, static_cast<const uint16_t*>(from), to);
  return packed;
}

Array<float> unpack_all(const std::string& format, const Bytes& packed, int rows, int cols, int group) {
  Matrix m = packed_shape(format, rows, cols, group);
  if (packed.size() != py::ssize_t(m.packed_bytes())) throw py::value_error("packed: wrong size");
  m.data = packed.data();
  Array<float> weights({rows, cols});
  float* to = weights.mutable_data();
  py::gil_scoped_release release;
  unpack(m, to);
  return weights;
}

// (format, rows, cols, group, bytes): must lie on cache lines.
Matrix packed_matrix(const std::string& name, const py::tuple& value) {
  Matrix m = packed_shape(value[0].cast<std::string>(), value[1].cast<int>(), value[2].cast<int>(),
                          value[3].cast<int>());
  const py::array bytes = value[4].cast<py::array>();
  if (bytes.nbytes() != py::ssize_t(m.packed_bytes()) || !(bytes.flags() & py::array::c_style))
    throw py::value_error(name + ": packed bytes of another size");
  if (reinterpret_cast<uintptr_t>(bytes.data()) % 64)
    throw py::value_error(name + ": packed bytes must lie on 64 bytes");
  m.data = bytes.data();
  return m;
}

// y = x times a packed matrix, on one thread: for tests and measurements.
Array<float> product_of(const py::tuple& packed, const Array<float>& x, std::string level) {
  const Matrix w = packed_matrix("packed", packed);
  if (x.ndim() != 2 || x.shape(0) < 1 || x.shape(1) != w.cols)
    throw py::value_error("x: [rows, cols of the matrix]");
  const Kernels* kernels = kernels_for(level);
  Array<float> y({x.shape(0), py::ssize_t(w.rows)});
  const int rows = int(x.shape(0));
  const float* from = x.data();
  float* to = y.mutable_data();
  py::gil_scoped_release release;
  kernels->product(w, from, rows, to);
  return y;
}

// --- the engine ----------------------------------------------------------------------------------

class PyEngine {
 public:
  PyEngine(const py::dict& config, const py::dict& weights, const Array<float>& cos,
           const Array<float>& sin, py::object arena, const std::string& level, int threads,
           std::vector<int> cores)
      : weights_(weights), cos_(cos), sin_(sin), arena_(arena),
        engine_(model(config), arena.cast<Arena&>().pages(), level, threads, std::move(cores)) {}

  void begin(const Array<int32_t>& tokens, const Array<int32_t>& positions,
             const Array<int32_t>& sequence, const Array<uint32_t>& tables) {
    if (positions.size() != tokens.size() || sequence.size() != tokens.size())
      throw py::value_error("rows: tokens, positions and sequence differ in length");
    if (tables.ndim() != 3) throw py::value_error("tables: [sequences, blocks, groups]");
    tokens_ = tokens, positions_ = positions, sequence_ = sequence, tables_ = tables;
    engine_.begin(tokens.data(), positions.data(), sequence.data(), int(tokens.size()),
                  tables.data(), int(tables.shape(0)), int(tables.shape(1)), int(tables.shape(2)));
  }
  void run_group(int group) {
    py::gil_scoped_release release;
    engine_.run_group(group);
  }
  py::object logits(const Array<int32_t>& which) {
    const py::ssize_t count = which.size();
    float* to = room_for(count);
    const int32_t* rows = which.data();
    {
      py::gil_scoped_release release;
      engine_.logits(rows, int(count), to);
    }
    return out_[py::slice(0, count, 1)];
  }
  py::object step(const std::optional<Array<uint32_t>>& seeds) {
    const py::ssize_t rows = engine_.rows();
    if (seeds && seeds->size() != rows) throw py::value_error("seeds: one for each row");
    float* to = room_for(rows);
    const uint32_t* of = seeds ? seeds->data() : nullptr;
    {
      py::gil_scoped_release release;
      const auto start = std::chrono::steady_clock::now();
      engine_.step(of, to);
      step_ns_ = std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
    }
    return out_[py::slice(0, rows, 1)];
  }
  size_t read_weights() {
    py::gil_scoped_release release;
    return engine_.read_weights();
  }
  size_t weight_bytes() const { return engine_.weight_bytes(); }
  int64_t step_ns() const { return step_ns_; }
  const std::string& level() const { return engine_.level(); }
  int threads() const { return engine_.threads(); }

 private:
  // Logits are megabytes, and fresh ones cost more than a step: they are used again once the caller has
  // let go of them.
  float* room_for(py::ssize_t rows) {
    if (rows > out_.shape(0) || out_.ref_count() > 1)
      out_ = Array<float>(std::vector<py::ssize_t>{std::max(rows, out_.shape(0)), engine_.vocab()});
    return out_.mutable_data();
  }
  Matrix matrix(const std::string& name) const {
    const py::object value = weights_[name.c_str()];
    return py::isinstance<py::tuple>(value) ? packed_matrix(name, value) : plain(name, value.cast<py::array>());
  }
  static Matrix plain(const std::string& name, const py::array& array) {
    if (array.ndim() != 2) throw py::value_error(name + ": [rows, cols]");
    Matrix m{array.data(), Format::kF32, int(array.shape(0)), int(array.shape(1)), 0};
    const char kind = array.dtype().kind();
    const auto size = array.dtype().itemsize();
    if (kind == 'f' && size == 4) m.format = Format::kF32;
    else if (kind == 'f' && size == 2) m.format = Format::kF16;
    else if (kind == 'u' && size == 2) m.format = Format::kBF16;
    else throw py::value_error(name + ": dtype must be float32, float16 or bfloat16 as uint16");
    if (!(array.flags() & py::array::c_style)) throw py::value_error(name + ": must be contiguous");
    return m;
  }
  Matrix matrix(const std::string& name, int rows, int cols) const {
    const Matrix m = matrix(name);
    if (m.rows != rows || m.cols != cols) throw py::value_error(name + ": wrong shape");
    return m;
  }
  std::vector<float> vector(const std::string& name) const {
    if (!weights_.contains(name.c_str())) return {};
    auto array = weights_[name.c_str()].cast<Array<float>>();
    return std::vector<float>(array.data(), array.data() + array.size());
  }
  Layer layer(const Model& m, int i, int window) const {
    const std::string p = std::to_string(i) + ".";
    const int wide = m.heads * m.head_dim, narrow = m.kv_heads * m.head_dim;
    Layer l;
    l.q = matrix(p + "q", wide, m.hidden), l.k = matrix(p + "k", narrow, m.hidden);
    l.v = matrix(p + "v", narrow, m.hidden), l.o = matrix(p + "o", m.hidden, wide);
    l.gate = matrix(p + "gate", m.intermediate, m.hidden);
    l.up = matrix(p + "up", m.intermediate, m.hidden);
    l.down = matrix(p + "down", m.hidden, m.intermediate);
    l.q_bias = vector(p + "q_bias"), l.k_bias = vector(p + "k_bias");
    l.v_bias = vector(p + "v_bias"), l.o_bias = vector(p + "o_bias");
    l.gate_bias = vector(p + "gate_bias"), l.up_bias = vector(p + "up_bias");
    l.down_bias = vector(p + "down_bias");
    l.attention_norm = vector(p + "attention_norm"), l.mlp_norm = vector(p + "mlp_norm");
    l.q_norm = vector(p + "q_norm"), l.k_norm = vector(p + "k_norm");
    l.window = window;
    return l;
  }
  Model model(const py::dict& c) const {
    auto number = [&](const char* name) { return c[name].cast<int>(); };
    Model m;
    m.vocab = number("vocab_size"), m.hidden = number("hidden"), m.layers = number("layers");
    m.heads = number("heads"), m.kv_heads = number("kv_heads"), m.head_dim = number("head_dim");
    m.intermediate = number("intermediate"), m.eps = c["rms_eps"].cast<float>();
    m.kv_bf16 = c["kv_bf16"].cast<bool>();
    m.max_context = int(cos_.shape(0));
    m.cos = cos_.data(), m.sin = sin_.data();
    m.embed = matrix("embed", m.vocab, m.hidden), m.head = matrix("head", m.vocab, m.hidden);
    if (is_packed(m.embed.format)) throw py::value_error("embed: must be plain, rows are looked up");
    m.final_norm = vector("final_norm");
    auto windows = c["windows"].cast<std::vector<int>>();
    for (int i = 0; i < m.layers; i++) m.layer.push_back(layer(m, i, windows[size_t(i)]));
    return m;
  }

  py::dict weights_;
  Array<float> cos_, sin_;
  int64_t step_ns_ = 0;
  Array<float> out_ = Array<float>(std::vector<py::ssize_t>{0, 0});
  py::object arena_;
  Array<int32_t> tokens_, positions_, sequence_;
  Array<uint32_t> tables_;
  Engine engine_;
};

}  // namespace

void bind_engine(py::module_& m) {
  m.attr("PACK_VERSION") = kPackVersion;
  m.def("packed_bytes", &packed_bytes, py::arg("format"), py::arg("rows"), py::arg("cols"),
        py::arg("group") = 0);
  m.def("pack", &pack, py::arg("format"), py::arg("matrix"), py::arg("scales") = py::none(),
        py::arg("group") = 0, py::arg("out") = py::none());
  m.def("product", &product_of, py::arg("packed"), py::arg("x"), py::arg("level") = "");
  m.def("unpack", &unpack_all, py::arg("format"), py::arg("packed"), py::arg("rows"), py::arg("cols"),
        py::arg("group") = 0);

  py::class_<PyEngine>(m, "Engine")
      .def(py::init<const py::dict&, const py::dict&, const Array<float>&, const Array<float>&,
                    py::object, const std::string&, int, std::vector<int>>(),
           py::arg("config"), py::arg("weights"), py::arg("cos"), py::arg("sin"), py::arg("arena"),
           py::arg("level") = "", py::arg("threads") = 1, py::arg("cores") = std::vector<int>())
      .def("begin", &PyEngine::begin)
      .def("run_group", &PyEngine::run_group)
      .def("logits", &PyEngine::logits)
      .def("step", &PyEngine::step, py::arg("seeds") = py::none())
      .def("read_weights", &PyEngine::read_weights)
      .def_property_readonly("weight_bytes", &PyEngine::weight_bytes)
      .def_property_readonly("step_ns", &PyEngine::step_ns)
      .def_property_readonly("threads", &PyEngine::threads)
      .def_property_readonly("level", &PyEngine::level);
}

}  // namespace baton
