// CRC32C (Castagnoli), alone or over many pieces side by side. Knows nothing of pages.
#pragma once

#include <cstddef>
#include <cstdint>

namespace baton {

uint32_t crc32c(const void* data, size_t size, uint32_t seed);

// crcs[i] goes from the checksum of what came before to that with `size` bytes at `at[i]` added. The
// instruction's result takes three cycles, but one or two can be issued every cycle: independent
// pieces side by side keep it busy. Pieces that lie one behind the other are read at memory speed.
void crc32c_each(const unsigned char* const* at, int count, size_t size, uint32_t* crcs);

// The same for pieces that lie one behind the other, and copies them to `to`: each byte is read from
// memory once. Long copies go past the cache, since whoever reads them is another core.
void crc32c_copy(const unsigned char* from, unsigned char* to, int count, size_t size,
                 uint32_t* crcs);

}  // namespace baton
