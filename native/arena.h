// Pages in shared memory: checksums of token rows, copies of open tails, seals. Knows where a page
// and its header lie; knows nothing of requests, leases or tokens' meaning.
#pragma once

#include <cstddef>
#include <cstdint>

namespace baton {

constexpr int kPageTokens = 64;
constexpr uint32_t kPageMagic = 0x31475042;  // "BPG1"

enum PageState : uint32_t { kFree = 0, kOpen = 1, kSealed = 2 };

// 384 bytes, six cache lines. Seals are written by the page's one writer, `state` last, with release.
// `owner`, `writer` and `quarantined` are the kv-store's own: a writer that wakes up late and seals a
// page that was taken from it cannot make it look trustworthy.
struct PageHeader {
  uint32_t magic;
  uint16_t version;
  uint16_t group;
  uint32_t state;
  uint32_t epoch;
  uint64_t owner;        // slot of the stream record that leased it, plus one
  unsigned char key[16]; // sealed: chained hash of the tokens
  uint32_t tokens;
  uint32_t checksum;     // sealed: CRC32C over row_crc
  uint32_t block;
  uint32_t quarantined;
  uint64_t stamp;        // last use, for eviction after a restart
  unsigned char writer[16];  // the worker that may write the page
  unsigned char padding[48];
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

  // CRC32C of one token's K and V over all layers and heads of the page's group. `seed` identifies
  // the tokens up to and including this one, so that foreign bytes fail even when they are intact.
  uint32_t row_crc(uint32_t page, int row, int group, uint32_t seed) const;
  void copy_rows(uint32_t from, uint32_t to, int rows, int group) const;
  void seal(uint32_t page, int group, int rows, const unsigned char key[16]) const;
  uint32_t seal_checksum(uint32_t page, int rows) const;

 private:
  unsigned char* base_;
  Geometry g_;
};

uint32_t crc32c(const void* data, size_t size, uint32_t seed);

// How the seed of the same token differs from one layer group to the next.
inline uint32_t group_seed(uint32_t seed, int group) {
  return seed ^ (uint32_t(group + 1) * 0x9E3779B1u);
}

}  // namespace baton
