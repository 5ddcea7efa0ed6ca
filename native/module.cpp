// Python's door to the native code: `services._native`. Checks bounds here, so that a wrong index is
// an exception; keeps every buffer it was given alive; lets go of the interpreter lock for real work.
#include <linux/futex.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstring>
#include <ctime>
#include <vector>

#include "arena.h"
#include "crc32c.h"
#include "engine.h"

namespace py = pybind11;
using namespace baton;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

py::buffer_info writable(const py::buffer& buffer) {
  py::buffer_info info = buffer.request(true);
  if (info.itemsize * info.size < 1) throw py::value_error("buffer: empty");
  return info;
}

// Over so many bytes it pays to let other threads go on; for fewer, taking the lock again may cost
// more than the work.
constexpr size_t kLongBytes = 65536;

template <class Work>
void without_lock(size_t bytes, const Work& work) {
  if (bytes < kLongBytes) return work();
  py::gil_scoped_release release;
  work();
}

// --- 64-bit words in shared memory ---------------------------------------------------------------

// Loads acquire, stores release, compare-and-swap does both. The only way Python touches a word that
// another process writes.
class Words {
 public:
  Words(const py::buffer& buffer, size_t offset, size_t count) : info_(writable(buffer)), count_(count) {
    const size_t bytes = size_t(info_.size) * info_.itemsize;
    if (offset % 8 || offset > bytes || count > (bytes - offset) / 8)
      throw py::value_error("words: offset and count must lie in the buffer, on 8 bytes");
    words_ = reinterpret_cast<uint64_t*>(static_cast<char*>(info_.ptr) + offset);
  }
  uint64_t load(size_t i) const { return __atomic_load_n(at(i), __ATOMIC_ACQUIRE); }
  void store(size_t i, uint64_t v) { __atomic_store_n(at(i), v, __ATOMIC_RELEASE); }
  std::pair<bool, uint64_t> cas(size_t i, uint64_t expected, uint64_t desired) {
    const bool won = __atomic_compare_exchange_n(at(i), &expected, desired, false,
                                                 __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    return {won, won ? desired : expected};
  }
  uint64_t add(size_t i, uint64_t v) { return __atomic_add_fetch(at(i), v, __ATOMIC_ACQ_REL); }

  // Sleeps until the word's low half differs from `seen` or a wake comes; false after the timeout.
  bool wait(size_t i, uint32_t seen, double timeout_s) {
    timespec limit{time_t(timeout_s), long((timeout_s - double(time_t(timeout_s))) * 1e9)};
    uint64_t* word = at(i);
    py::gil_scoped_release release;
    return syscall(SYS_futex, low(word), FUTEX_WAIT, seen, &limit, nullptr, 0) == 0 ||
           errno == EAGAIN;
  }
  int wake(size_t i) {
    return int(syscall(SYS_futex, low(at(i)), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0));
  }
  size_t size() const { return count_; }

 private:
  static uint32_t* low(uint64_t* word) { return reinterpret_cast<uint32_t*>(word); }  // little endian
  uint64_t* at(size_t i) const {
    if (i >= count_) throw py::index_error("words: index out of range");
    return words_ + i;
  }
  py::buffer_info info_;
  uint64_t* words_;
  size_t count_;
};

// --- pages ---------------------------------------------------------------------------------------

class Arena {
 public:
  Arena(const py::buffer& buffer, const Geometry& g)
      : info_(writable(buffer)), pages_(static_cast<unsigned char*>(info_.ptr), g) {
    const size_t bytes = size_t(info_.size) * info_.itemsize;
    if (g.layers < 1 || g.layers_per_group < 1 || g.kv_heads < 1 || g.head_dim < 1 ||
        g.element_bytes < 1)
      throw py::value_error("arena: layers, heads and sizes must be positive");
    const size_t rows = size_t(g.layers_per_group) * 2 * g.kv_heads * g.head_bytes();
    if (g.page_bytes < rows)
      throw py::value_error("arena: page_bytes does not hold a layer group's rows");
    if (g.header_offset % 64 || g.pages_offset % 64 || g.page_bytes % 64)
      throw py::value_error("arena: headers and pages lie on cache lines");
    if (g.pages_offset > bytes || g.header_offset > g.pages_offset ||
        g.page_count > (g.pages_offset - g.header_offset) / sizeof(PageHeader) ||
        g.page_count > (bytes - g.pages_offset) / g.page_bytes)
      throw py::value_error("arena: the buffer is too small for its pages");
  }
  const Pages& pages() const { return pages_; }

  void stamp_rows(const Array<uint32_t>& ids, const Array<int32_t>& rows,
                  const Array<uint32_t>& seeds, int group) const {
    const Pages::Rows which = check(ids, rows, seeds, group);
    without_lock(row_bytes(which, group), [&] { pages_.stamp_rows(which, group); });
  }
  // The first index whose stored checksum differs, or -1.
  py::ssize_t verify_rows(const Array<uint32_t>& ids, const Array<int32_t>& rows,
                          const Array<uint32_t>& seeds, int group) const {
    const Pages::Rows which = check(ids, rows, seeds, group);
    py::ssize_t bad = -1;
    without_lock(row_bytes(which, group), [&] { bad = pages_.verify_rows(which, group); });
    return bad;
  }
  // The same for the tokens [begin, begin + seeds.size) of a sequence with this block table.
  void stamp_tokens(const Array<uint32_t>& blocks, py::ssize_t begin, const Array<uint32_t>& seeds,
                    int group) const {
    const Tokens tokens = locate(blocks, begin, seeds, group);
    const Pages::Rows which = tokens.with(seeds);
    without_lock(row_bytes(which, group), [&] { pages_.stamp_rows(which, group); });
  }
  // The first token whose stored checksum differs, or -1.
  py::ssize_t verify_tokens(const Array<uint32_t>& blocks, py::ssize_t begin,
                            const Array<uint32_t>& seeds, int group) const {
    const Tokens tokens = locate(blocks, begin, seeds, group);
    const Pages::Rows which = tokens.with(seeds);
    py::ssize_t bad = -1;
    without_lock(row_bytes(which, group), [&] { bad = pages_.verify_rows(which, group); });
    return bad < 0 ? -1 : begin + bad;
  }
  void copy_rows(uint32_t from, uint32_t to, int rows, int group) const {
    check_page(from), check_page(to), check_group(group);
    if (rows < 0 || rows > kPageTokens) throw py::value_error("rows: 0 to 64");
    py::gil_scoped_release release;
    pages_.copy_rows(from, to, rows, group);
  }
  // Pages of these blocks out of `frames`, `skip_pages` into them, and their row checksums; verifies
  // the first seeds.size rows. The first that differs, or -1.
  py::ssize_t land(const Array<uint32_t>& blocks, int group, const py::sequence& frames,
                   size_t skip_pages, const Array<uint32_t>& row_crcs,
                   const Array<uint32_t>& seeds) const {
    const size_t count = size_t(blocks.size()), page_bytes = pages_.geometry().page_bytes;
    if (size_t(row_crcs.size()) != count * kPageTokens)
      throw py::value_error("row_crcs: 64 for each block");
    if (size_t(seeds.size()) > count * kPageTokens) throw py::value_error("seeds: more than rows");
    const std::vector<uint32_t> pages = pages_of(blocks, group);
    std::vector<py::buffer_info> held;
    std::vector<const unsigned char*> data;
    std::vector<size_t> bytes;
    size_t total = 0;
    for (const py::handle frame : frames) {
      held.push_back(frame.cast<py::buffer>().request());
      data.push_back(static_cast<const unsigned char*>(held.back().ptr));
      bytes.push_back(size_t(held.back().size) * size_t(held.back().itemsize));
      total += bytes.back();
    }
    if (skip_pages > total / page_bytes || count > total / page_bytes - skip_pages)
      throw py::value_error("frames: shorter than the blocks");
    const Pages::Pieces pieces{data.data(), bytes.data(), data.size()};
    py::ssize_t bad = -1;
    without_lock(count * page_bytes, [&] {
      bad = pages_.land(pages.data(), count, pieces, skip_pages * page_bytes, row_crcs.data(),
                        seeds.data(), size_t(seeds.size()), group);
    });
    return bad;
  }
  // `keys`: 16 bytes for each block, which is complete.
  void seal_blocks(const Array<uint32_t>& blocks, int group, const std::string& keys) const {
    const std::vector<uint32_t> pages = pages_of(blocks, group);
    if (keys.size() != 16 * pages.size()) throw py::value_error("keys: 16 bytes for each block");
    for (size_t i = 0; i < pages.size(); i++)
      pages_.seal(pages[i], kPageTokens,
                  reinterpret_cast<const unsigned char*>(keys.data() + 16 * i));
  }
  void seal(uint32_t page, int group, int rows, const std::string& key) const {
    check_page(page), check_group(group);
    if (rows < 0 || rows > kPageTokens) throw py::value_error("rows: 0 to 64");
    if (key.size() != 16) throw py::value_error("key: 16 bytes");
    pages_.seal(page, rows, reinterpret_cast<const unsigned char*>(key.data()));
  }
  uint32_t seal_checksum(uint32_t page, int rows) const {
    check_page(page);
    if (rows < 0 || rows > kPageTokens) throw py::value_error("rows: 0 to 64");
    return pages_.seal_checksum(page, rows);
  }
  // What the seals of whole pages should say.
  Array<uint32_t> seal_checksums(const Array<uint32_t>& ids) const {
    Array<uint32_t> sums(ids.size());
    for (py::ssize_t i = 0; i < ids.size(); i++)
      sums.mutable_data()[i] = seal_checksum(ids.data()[i], kPageTokens);
    return sums;
  }
  uint32_t state(uint32_t page) const {
    check_page(page);
    return __atomic_load_n(&pages_.header(page)->state, __ATOMIC_ACQUIRE);
  }

 private:
  void check_page(uint32_t page) const {
    if (!pages_.holds(page)) throw py::index_error("page: outside the arena");
  }
  void check_group(int group) const {
    if (group < 0 || group >= pages_.geometry().groups()) throw py::index_error("group: out of range");
  }
  // Page ids run group by group: group * blocks of the arena + block.
  std::vector<uint32_t> pages_of(const Array<uint32_t>& blocks, int group) const {
    check_group(group);
    const size_t per_group = blocks_per_group();
    std::vector<uint32_t> pages(blocks.data(), blocks.data() + blocks.size());
    for (uint32_t& page : pages) {
      if (page >= per_group) throw py::index_error("block: outside the arena");
      page += uint32_t(size_t(group) * per_group);
    }
    return pages;
  }
  size_t blocks_per_group() const {
    return pages_.geometry().page_count / size_t(pages_.geometry().groups());
  }
  struct Tokens {
    std::vector<uint32_t> pages;
    std::vector<int32_t> rows;
    Pages::Rows with(const Array<uint32_t>& seeds) const {
      return {pages.data(), rows.data(), seeds.data(), ptrdiff_t(pages.size())};
    }
  };
  Tokens locate(const Array<uint32_t>& blocks, py::ssize_t begin, const Array<uint32_t>& seeds,
                int group) const {
    check_group(group);
    const py::ssize_t end = begin + seeds.size();
    const size_t per_group = blocks_per_group();
    if (blocks.ndim() != 1 || begin < 0 || end > blocks.size() * kPageTokens)
      throw py::value_error("tokens: outside the block table");
    Tokens tokens;
    tokens.pages.reserve(size_t(seeds.size())), tokens.rows.reserve(size_t(seeds.size()));
    for (py::ssize_t token = begin; token < end; token++) {
      const uint32_t block = blocks.data()[token / kPageTokens];
      if (block >= per_group) throw py::index_error("block: outside the arena");
      tokens.pages.push_back(uint32_t(size_t(group) * per_group + block));
      tokens.rows.push_back(int32_t(token % kPageTokens));
    }
    return tokens;
  }
  size_t row_bytes(const Pages::Rows& rows, int group) const {
    const Geometry& g = pages_.geometry();
    return size_t(rows.count) * g.layers_in(group) * 2 * g.kv_heads * g.row_bytes();
  }
  Pages::Rows check(const Array<uint32_t>& ids, const Array<int32_t>& rows,
                    const Array<uint32_t>& seeds, int group) const {
    check_group(group);
    if (rows.size() != ids.size() || seeds.size() != ids.size())
      throw py::value_error("rows: page ids, rows and seeds differ in length");
    for (py::ssize_t i = 0; i < ids.size(); i++) {
      check_page(ids.data()[i]);
      if (rows.data()[i] < 0 || rows.data()[i] >= kPageTokens) throw py::index_error("rows: 0 to 63");
    }
    return {ids.data(), rows.data(), seeds.data(), ids.size()};
  }
  py::buffer_info info_;
  Pages pages_;
};

Geometry geometry(size_t header_offset, size_t pages_offset, size_t page_bytes, size_t page_count,
                  int layers, int layers_per_group, int kv_heads, int head_dim, int element_bytes) {
  return {header_offset, pages_offset, page_bytes, page_count, layers,
          layers_per_group, kv_heads, head_dim, element_bytes};
}

uint32_t checksum(const py::buffer& data, uint32_t seed) {
  py::buffer_info info = data.request();
  const size_t bytes = size_t(info.size) * info.itemsize;
  uint32_t crc = 0;
  without_lock(bytes, [&] { crc = crc32c(info.ptr, bytes, seed); });
  return crc;
}

// seeds[i] identifies the tokens up to and including tokens[i], from the seed before them.
Array<uint32_t> row_seeds(uint32_t seed, const Array<int32_t>& tokens) {
  Array<uint32_t> seeds(tokens.size());
  for (py::ssize_t i = 0; i < tokens.size(); i++)
    seeds.mutable_data()[i] = seed = crc32c(tokens.data() + i, sizeof(int32_t), seed);
  return seeds;
}

// --- the engine ----------------------------------------------------------------------------------

class PyEngine {
 public:
  PyEngine(const py::dict& config, const py::dict& weights, const Array<float>& cos,
           const Array<float>& sin, py::object arena, const std::string& level)
      : weights_(weights), cos_(cos), sin_(sin), arena_(arena),
        engine_(model(config), arena.cast<Arena&>().pages(), level) {}

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
  Array<float> logits(const Array<int32_t>& which) {
    Array<float> out({which.size(), py::ssize_t(engine_.vocab())});
    const int32_t* rows = which.data();
    float* to = out.mutable_data();
    const int count = int(which.size());
    {
      py::gil_scoped_release release;
      engine_.logits(rows, count, to);
    }
    return out;
  }
  const std::string& level() const { return engine_.level(); }

 private:
  Matrix matrix(const std::string& name) const {
    auto array = weights_[name.c_str()].cast<py::array>();
    Matrix m;
    m.rows = int(array.shape(0)), m.cols = int(array.shape(1)), m.data = array.data();
    const char kind = array.dtype().kind();
    const auto size = array.dtype().itemsize();
    if (kind == 'f' && size == 4) m.dtype = Dtype::kF32;
    else if (kind == 'f' && size == 2) m.dtype = Dtype::kF16;
    else if (kind == 'u' && size == 2) m.dtype = Dtype::kBF16;
    else throw py::value_error(name + ": dtype must be float32, float16 or bfloat16 as uint16");
    if (!(array.flags() & py::array::c_style)) throw py::value_error(name + ": must be contiguous");
    return m;
  }
  std::vector<float> vector(const std::string& name) const {
    if (!weights_.contains(name.c_str())) return {};
    auto array = weights_[name.c_str()].cast<Array<float>>();
    return std::vector<float>(array.data(), array.data() + array.size());
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
    m.embed = matrix("embed"), m.head = matrix("head"), m.final_norm = vector("final_norm");
    auto windows = c["windows"].cast<std::vector<int>>();
    for (int i = 0; i < m.layers; i++) {
      const std::string p = std::to_string(i) + ".";
      Layer l;
      l.q = matrix(p + "q"), l.k = matrix(p + "k"), l.v = matrix(p + "v"), l.o = matrix(p + "o");
      l.gate = matrix(p + "gate"), l.up = matrix(p + "up"), l.down = matrix(p + "down");
      l.q_bias = vector(p + "q_bias"), l.k_bias = vector(p + "k_bias");
      l.v_bias = vector(p + "v_bias"), l.o_bias = vector(p + "o_bias");
      l.gate_bias = vector(p + "gate_bias"), l.up_bias = vector(p + "up_bias");
      l.down_bias = vector(p + "down_bias");
      l.attention_norm = vector(p + "attention_norm"), l.mlp_norm = vector(p + "mlp_norm");
      l.q_norm = vector(p + "q_norm"), l.k_norm = vector(p + "k_norm");
      l.window = windows[size_t(i)];
      m.layer.push_back(std::move(l));
    }
    return m;
  }

  py::dict weights_;
  Array<float> cos_, sin_;
  py::object arena_;
  Array<int32_t> tokens_, positions_, sequence_;
  Array<uint32_t> tables_;
  Engine engine_;
};

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Shared-memory words, page checksums and the CPU engine.";
  m.attr("PAGE_HEADER_BYTES") = sizeof(PageHeader);
  m.attr("PAGE_TOKENS") = kPageTokens;
  m.def("crc32c", &checksum, py::arg("data"), py::arg("seed") = 0);
  m.def("row_seeds", &row_seeds, py::arg("seed"), py::arg("tokens"));

  py::class_<Words>(m, "Words")
      .def(py::init<const py::buffer&, size_t, size_t>(), py::arg("buffer"), py::arg("offset"),
           py::arg("count"))
      .def("load", &Words::load)
      .def("store", &Words::store)
      .def("cas", &Words::cas, py::arg("index"), py::arg("expected"), py::arg("desired"))
      .def("add", &Words::add)
      .def("wait", &Words::wait, py::arg("index"), py::arg("seen"), py::arg("timeout_s"))
      .def("wake", &Words::wake)
      .def("__len__", &Words::size);

  py::class_<Geometry>(m, "Geometry")
      .def(py::init(&geometry), py::kw_only(), py::arg("header_offset"), py::arg("pages_offset"),
           py::arg("page_bytes"), py::arg("page_count"), py::arg("layers"),
           py::arg("layers_per_group"), py::arg("kv_heads"), py::arg("head_dim"),
           py::arg("element_bytes"));

  py::class_<Arena>(m, "Arena")
      .def(py::init<const py::buffer&, const Geometry&>())
      .def("stamp_rows", &Arena::stamp_rows, py::arg("pages"), py::arg("rows"), py::arg("seeds"),
           py::arg("group"))
      .def("verify_rows", &Arena::verify_rows, py::arg("pages"), py::arg("rows"), py::arg("seeds"),
           py::arg("group"))
      .def("stamp_tokens", &Arena::stamp_tokens, py::arg("blocks"), py::arg("begin"),
           py::arg("seeds"), py::arg("group"))
      .def("verify_tokens", &Arena::verify_tokens, py::arg("blocks"), py::arg("begin"),
           py::arg("seeds"), py::arg("group"))
      .def("copy_rows", &Arena::copy_rows, py::arg("source"), py::arg("target"), py::arg("rows"),
           py::arg("group"))
      .def("land", &Arena::land, py::arg("blocks"), py::arg("group"), py::arg("frames"),
           py::arg("skip_pages"), py::arg("row_crcs"), py::arg("seeds"))
      .def("seal_blocks", &Arena::seal_blocks, py::arg("blocks"), py::arg("group"), py::arg("keys"))
      .def("seal", &Arena::seal, py::arg("page"), py::arg("group"), py::arg("rows"), py::arg("key"))
      .def("seal_checksum", &Arena::seal_checksum, py::arg("page"), py::arg("rows"))
      .def("seal_checksums", &Arena::seal_checksums, py::arg("pages"))
      .def("state", &Arena::state);

  py::class_<PyEngine>(m, "Engine")
      .def(py::init<const py::dict&, const py::dict&, const Array<float>&, const Array<float>&,
                    py::object, const std::string&>(),
           py::arg("config"), py::arg("weights"), py::arg("cos"), py::arg("sin"), py::arg("arena"),
           py::arg("level") = "")
      .def("begin", &PyEngine::begin)
      .def("run_group", &PyEngine::run_group)
      .def("logits", &PyEngine::logits)
      .def_property_readonly("level", &PyEngine::level);
}
