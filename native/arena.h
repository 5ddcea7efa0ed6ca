// Pages in shared memory: checksums of token rows, copies of open tails, seals. Knows where a page
// and its header lie; knows nothing of requests, leases or tokens' meaning.
#pragma once

#include <cstddef>
#include <cstdint>

namespace baton {

constexpr int kPageTokens = 64;
constexpr uint32_t kPageMagic = 0x31475042;  // "BPG1"

enum PageState : uint32_t { kFree = 0, kOpen = 1, kSealed = 2 };

// 384 bytes, six cache lines. The first is the kv-store's own, with a checksum that it alone keeps: a
// writer that wakes up late and seals a page that was taken from it cannot make it look trustworthy.
// The second is written by the page's one writer, `state` last, with release; the store sets `state`
// when it leases a page and when it frees it.
struct PageHeader {
  uint32_t magic;
  uint16_t version;
  uint16_t group;
  uint32_t block;
  uint32_t lease;        // 0: free
  uint64_t owner;        // slot of the stream record that leased it, plus one; 0: free or cached
  uint64_t stamp;        // when it was leased, for eviction after a restart
  unsigned char writer[16];  // the worker that may write the page
  uint32_t epoch;
  uint32_t quarantined;
  uint32_t own_crc;      // CRC32C over all before
  uint32_t own_padding;

  uint32_t state;
  uint32_t tokens;
  unsigned char key[16]; // sealed: chained hash of the tokens
  uint32_t checksum;     // sealed: CRC32C over row_crc
  unsigned char padding[36];

  uint32_t row_crc[kPageTokens];
};
static_assert(sizeof(PageHeader) == 384, "six cache lines");

struct Geometry {
  size_t header_offset, pages_offset, page_bytes, page_count;
  int layers, layers_per_group, kv_heads, head_dim, element_bytes;

  int groups() const { return (layers + layers_per_group - 1) / layers_per_group; }
  int layers_in(int group) const {
    int left = layers - group * layers_per_group;
    return left < layers_per_group ? left : layers_per_group;
  }
  size_t row_bytes() const { return size_t(head_dim) * element_bytes; }
  size_t head_bytes() const { return row_bytes() * kPageTokens; }
};

class Pages {
 public:
  Pages(unsigned char* base, const Geometry& geometry) : base_(base), g_(geometry) {}

  const Geometry& geometry() const { return g_; }
  bool holds(uint32_t page) const { return page < g_.page_count; }
  unsigned char* payload(uint32_t page) const {
    return base_ + g_.pages_offset + size_t(page) * g_.page_bytes;
  }
  PageHeader* header(uint32_t page) const {
    return reinterpret_cast<PageHeader*>(base_ + g_.header_offset) + page;
  }

  // A row's checksum is the CRC32C of one token's K and V over all layers and heads of the page's
  // group. Its seed identifies the tokens up to and including this one, so that foreign bytes fail
  // even when they are intact. Rows are given by page and row in it.
  struct Rows {
    const uint32_t* pages;
    const int32_t* rows;
    const uint32_t* seeds;
    ptrdiff_t count;
  };
  void stamp_rows(const Rows& rows, int group) const;
  // The first index whose stored checksum differs, or -1.
  ptrdiff_t verify_rows(const Rows& rows, int group) const;
  void copy_rows(uint32_t from, uint32_t to, int rows, int group) const;
  // Whole pages and their row checksums from another arena, `bytes` into `pieces`; rows are verified as
  // they are copied. `seeds` are of the rows to verify, from the first page's first one on.
  // The first that differs, or -1; pages after that one's are not copied.
  struct Pieces {
    const unsigned char* const* data;
    const size_t* bytes;
    size_t count;
  };
  ptrdiff_t land(const uint32_t* pages, size_t count, const Pieces& from, size_t skip_bytes,
                 const uint32_t* row_crcs, const uint32_t* seeds, size_t rows, int group) const;
  void seal(uint32_t page, int rows, const unsigned char key[16]) const;
  uint32_t seal_checksum(uint32_t page, int rows) const;

 private:
  ptrdiff_t copy_page(const unsigned char* from, uint32_t page, const uint32_t* row_crcs,
                      const uint32_t* seeds, int rows, int group) const;
  void gather_page(const Pieces& from, size_t* piece, size_t* at, uint32_t page) const;
  ptrdiff_t verify_page(uint32_t page, const uint32_t* seeds, int rows, int group) const;
  void row_crcs(const Rows& rows, ptrdiff_t begin, int count, int group, uint32_t* crcs) const;

  unsigned char* base_;
  Geometry g_;
};

// How the seed of the same token differs from one layer group to the next.
inline uint32_t group_seed(uint32_t seed, int group) {
  return seed ^ (uint32_t(group + 1) * 0x9E3779B1u);
}

}  // namespace baton
