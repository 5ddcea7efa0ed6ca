#include "arena.h"

#include <algorithm>
#include <cstring>
#include <numeric>

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

ptrdiff_t Pages::land(const uint32_t* pages, size_t count, const Pieces& from, size_t skip_bytes,
                      const uint32_t* row_crcs, const uint32_t* seeds, size_t rows, int group) const {
  size_t piece = 0, at = skip_bytes;
  for (size_t i = 0; i < count; i++) {
    const size_t first = i * kPageTokens;
    const int some = rows > first ? int(std::min<size_t>(kPageTokens, rows - first)) : 0;
    const uint32_t* crcs = row_crcs + first;
    std::memcpy(header(pages[i])->row_crc, crcs, sizeof(PageHeader::row_crc));
    while (at >= from.bytes[piece]) at -= from.bytes[piece++];
    ptrdiff_t bad = -1;
    if (from.bytes[piece] - at >= g_.page_bytes) {
      bad = copy_page(from.data[piece] + at, pages[i], crcs, seeds + first, some, group);
      at += g_.page_bytes;
    } else {
      gather_page(from, &piece, &at, pages[i]);
      if (some) bad = verify_page(pages[i], seeds + first, some, group);
    }
    if (bad >= 0) return ptrdiff_t(first) + bad;
  }
  return -1;
}

// Copies a page and looks at its first `rows` rows on the way. The first that is not what `row_crcs`
// says, or -1.
ptrdiff_t Pages::copy_page(const unsigned char* from, uint32_t page, const uint32_t* row_crcs,
                           const uint32_t* seeds, int rows, int group) const {
  uint32_t crcs[kPageTokens];
  for (int i = 0; i < rows; i++) crcs[i] = group_seed(seeds[i], group);
  unsigned char *to = payload(page), *end = to + g_.page_bytes;
  const size_t looked_at = size_t(rows) * g_.row_bytes();
  for (int piece = g_.layers_in(group) * 2 * g_.kv_heads; piece > 0 && rows > 0; piece--) {
    crc32c_copy(from, to, rows, g_.row_bytes(), crcs);
    std::memcpy(to + looked_at, from + looked_at, g_.head_bytes() - looked_at);
    from += g_.head_bytes(), to += g_.head_bytes();
  }
  std::memcpy(to, from, size_t(end - to));
  const ptrdiff_t bad = std::mismatch(crcs, crcs + rows, row_crcs).first - crcs;
  return bad < rows ? bad : -1;
}

// A page that is spread over several pieces.
void Pages::gather_page(const Pieces& from, size_t* piece, size_t* at, uint32_t page) const {
  unsigned char* to = payload(page);
  for (size_t left = g_.page_bytes; left > 0;) {
    while (*at >= from.bytes[*piece]) *at -= from.bytes[(*piece)++];
    const size_t some = std::min(left, from.bytes[*piece] - *at);
    std::memcpy(to, from.data[*piece] + *at, some);
    to += some, *at += some, left -= some;
  }
}

ptrdiff_t Pages::verify_page(uint32_t page, const uint32_t* seeds, int rows, int group) const {
  uint32_t pages[kPageTokens];
  int32_t numbers[kPageTokens];
  std::fill_n(pages, rows, page);
  std::iota(numbers, numbers + rows, 0);
  return verify_rows({pages, numbers, seeds, rows}, group);
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
