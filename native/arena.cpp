#include "arena.h"

#include <array>
#include <cstring>

#if defined(__aarch64__)
#include <arm_acle.h>
#endif

namespace baton {
namespace {

std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; bit++) c = (c >> 1) ^ ((c & 1) ? 0x82F63B78u : 0);
    table[i] = c;
  }
  return table;
}

uint32_t crc_portable(const unsigned char* p, size_t n, uint32_t crc) {
  static const std::array<uint32_t, 256> table = make_table();
  while (n--) crc = (crc >> 8) ^ table[(crc ^ *p++) & 255];
  return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t crc_hardware(const unsigned char* p, size_t n,
                                                        uint32_t crc) {
  uint64_t wide = crc;
  for (; n >= 8; p += 8, n -= 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    wide = __builtin_ia32_crc32di(wide, word);
  }
  crc = uint32_t(wide);
  while (n--) crc = __builtin_ia32_crc32qi(crc, *p++);
  return crc;
}
bool have_hardware() { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
uint32_t crc_hardware(const unsigned char* p, size_t n, uint32_t crc) {
  for (; n >= 8; p += 8, n -= 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    crc = __crc32cd(crc, word);
  }
  while (n--) crc = __crc32cb(crc, *p++);
  return crc;
}
bool have_hardware() { return true; }
#else
uint32_t crc_hardware(const unsigned char* p, size_t n, uint32_t crc) {
  return crc_portable(p, n, crc);
}
bool have_hardware() { return false; }
#endif

const bool hardware = have_hardware();

}  // namespace

uint32_t crc32c(const void* data, size_t size, uint32_t seed) {
  const unsigned char* p = static_cast<const unsigned char*>(data);
  return ~(hardware ? crc_hardware(p, size, ~seed) : crc_portable(p, size, ~seed));
}

uint32_t Pages::row_crc(uint32_t page, int row, int group, uint32_t seed) const {
  const unsigned char* at = payload(page) + size_t(row) * g_.row_bytes();
  const int pieces = g_.layers_in(group) * 2 * g_.kv_heads;
  uint32_t crc = group_seed(seed, group);
  for (int i = 0; i < pieces; i++) crc = crc32c(at + size_t(i) * g_.head_bytes(), g_.row_bytes(), crc);
  return crc;
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

void Pages::seal(uint32_t page, int group, int rows, const unsigned char key[16]) const {
  PageHeader* h = header(page);
  std::memcpy(h->key, key, 16);
  h->group = uint16_t(group);
  h->tokens = uint32_t(rows);
  h->checksum = seal_checksum(page, rows);
  __atomic_store_n(&h->state, uint32_t(kSealed), __ATOMIC_RELEASE);
}

}  // namespace baton
