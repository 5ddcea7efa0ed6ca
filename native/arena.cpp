#include "arena.h"

#include <algorithm>
#include <cstring>

#include "crc32c.h"

namespace baton {

// `count` rows, at most a page's worth, from `begin` on. All rows of one head before the next head:
// the order in which a page's rows lie in memory.
void Pages::row_crcs(const Rows& rows, ptrdiff_t begin, int count, int group, uint32_t* crcs) const {
  const unsigned char* at[kPageTokens];
  for (int i = 0; i < count; i++) {
    at[i] = payload(rows.pages[begin + i]) + size_t(rows.rows[begin + i]) * g_.row_bytes();
    crcs[i] = group_seed(rows.seeds[begin + i], group);
  }
  const int pieces = g_.layers_in(group) * 2 * g_.kv_heads;
  for (int piece = 0; piece < pieces; piece++) {
    crc32c_each(at, count, g_.row_bytes(), crcs);
    for (int i = 0; i < count; i++) at[i] += g_.head_bytes();
  }
}

void Pages::stamp_rows(const Rows& rows, int group) const {
  uint32_t crcs[kPageTokens];
  for (ptrdiff_t begin = 0; begin < rows.count; begin += kPageTokens) {
    const int count = int(std::min<ptrdiff_t>(kPageTokens, rows.count - begin));
    row_crcs(rows, begin, count, group, crcs);
    for (int i = 0; i < count; i++)
      header(rows.pages[begin + i])->row_crc[rows.rows[begin + i]] = crcs[i];
  }
}

ptrdiff_t Pages::verify_rows(const Rows& rows, int group) const {
  uint32_t crcs[kPageTokens];
  for (ptrdiff_t begin = 0; begin < rows.count; begin += kPageTokens) {
    const int count = int(std::min<ptrdiff_t>(kPageTokens, rows.count - begin));
    row_crcs(rows, begin, count, group, crcs);
    for (int i = 0; i < count; i++)
      if (header(rows.pages[begin + i])->row_crc[rows.rows[begin + i]] != crcs[i]) return begin + i;
  }
  return -1;
}

void Pages::copy_rows(uint32_t from, uint32_t to, int rows, int group) const {
  const int pieces = g_.layers_in(group) * 2 * g_.kv_heads;
  for (int i = 0; i < pieces; i++) {
    std::memcpy(payload(to) + size_t(i) * g_.head_bytes(),
                payload(from) + size_t(i) * g_.head_bytes(), size_t(rows) * g_.row_bytes());
  }
  std::memcpy(header(to)->row_crc, header(from)->row_crc, size_t(rows) * sizeof(uint32_t));
}

uint32_t Pages::seal_checksum(uint32_t page, int rows) const {
  return crc32c(header(page)->row_crc, size_t(rows) * sizeof(uint32_t), 0);
}

void Pages::seal(uint32_t page, int rows, const unsigned char key[16]) const {
  PageHeader* h = header(page);
  std::memcpy(h->key, key, 16);
  h->tokens = uint32_t(rows);
  h->checksum = seal_checksum(page, rows);
  __atomic_store_n(&h->state, uint32_t(kSealed), __ATOMIC_RELEASE);
}

}  // namespace baton
