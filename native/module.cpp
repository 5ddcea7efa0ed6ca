// Python's door to the native code: `services._native`. Checks bounds here, so that a wrong index is
// an exception; keeps every buffer it was given alive; lets go of the interpreter lock for real work.
#include <linux/futex.h>
#include <pybind11/stl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstring>
#include <ctime>

#include "crc32c.h"
#include "module.h"

namespace py = pybind11;
using namespace baton;

namespace {

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

// --- pages and checksums ----------------------------------------------------------------------------

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

  bind_engine(m);
  bind_zeromq(m);
}
