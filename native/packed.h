// Weight formats and how a packed matrix lies in memory; knows nothing of models or instruction sets.
//
// A matrix [rows][cols] is cut into panels of 32 rows, one behind the other; what one product reads is
// one ascending stream of whole cache lines.
//
//   int8, int4:  panel = [ group 0 | group 1 | ... ]   a group: `group` columns
//                group = [ 32 scales, float16 | 4 columns of 32 rows | next 4 columns | ... ]
//                int8: 128 bytes a time, byte 4 r + c, the code plus 128
//                int4: 64 bytes a time, byte 4 r + c, low half row r, high half row r + 16, plus 8
//   bf16:        panel = [ 2 columns of 32 rows | next 2 columns | ... ], element 2 r + c
//
// Rows are padded to 32, columns to the group (bf16: to 2), with weight zero.
#pragma once

#include <cstddef>
#include <cstdint>

namespace baton {

#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif

enum class Format { kF32, kBF16, kF16, kPackedBF16, kPackedInt8, kPackedInt4 };

constexpr int kPackVersion = 1;
constexpr int kPanelRows = 32;
constexpr int kScaleBytes = kPanelRows * 2;

inline bool is_integer(Format f) { return f == Format::kPackedInt8 || f == Format::kPackedInt4; }
inline bool is_packed(Format f) { return f == Format::kPackedBF16 || is_integer(f); }

// A matrix of any format where it lies: plain ones are row-major.
struct Matrix {
  const void* data = nullptr;
  Format format = Format::kF32;
  int rows = 0, cols = 0, group = 0;

  int panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
  // Groups of columns, or for bf16 pairs of them. A group is a power of two.
  int groups() const {
    const int shift = format == Format::kPackedBF16 ? 1 : __builtin_ctz(unsigned(group));
    return (cols + (1 << shift) - 1) >> shift;
  }
  size_t group_bytes() const {
    if (format == Format::kPackedBF16) return kPanelRows * 4;
    const size_t codes = size_t(group) * kPanelRows;
    return kScaleBytes + (format == Format::kPackedInt8 ? codes : codes / 2);
  }
  size_t panel_bytes() const { return size_t(groups()) * group_bytes(); }
  size_t packed_bytes() const { return size_t(panels()) * panel_bytes(); }
  size_t bytes() const {
    if (is_packed(format)) return packed_bytes();
    return size_t(rows) * cols * (format == Format::kF32 ? 4 : 2);
  }
};

// `out` has packed_bytes(). scales: float16 bits [rows][groups].
void pack_int(const Matrix& shape, const int8_t* codes, const uint16_t* scales, unsigned char* out);
void pack_bf16(const Matrix& shape, const uint16_t* weights, unsigned char* out);
// weights: float32 [rows][cols].
void unpack(const Matrix& packed, float* weights);

}  // namespace baton
