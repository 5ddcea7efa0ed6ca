// What the parts of Python's door share. Checks bounds, so that a wrong index is an exception; keeps
// every buffer it was given alive; lets go of the interpreter lock for real work.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "arena.h"

namespace baton {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

inline py::buffer_info writable(const py::buffer& buffer) {
  py::buffer_info info = buffer.request(true);
  if (info.itemsize * info.size < 1) throw py::value_error("buffer: empty");
  return info;
}

// Whether its bytes lie in one piece, in the order of its indices.
inline bool contiguous(const py::buffer_info& info) {
  py::ssize_t stride = info.itemsize;
  for (size_t axis = size_t(info.ndim); axis-- > 0; stride *= info.shape[axis])
    if (info.shape[axis] > 1 && info.strides[axis] != stride) return false;
  return true;
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
      if (!contiguous(held.back())) throw py::value_error("frames: must be contiguous");
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

void bind_engine(py::module_& m);
void bind_zeromq(py::module_& m);

}  // namespace baton
