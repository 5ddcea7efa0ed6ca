#include "packed.h"

#include <algorithm>
#include <cstring>

namespace baton {
namespace {

constexpr int kQuad = 4;  // columns whose products one lane sums at a time

int zero_of(Format format) { return format == Format::kPackedInt8 ? 128 : 8; }

// Where the code of a panel's row and group's column lies in the group's codes.
size_t code_at(Format format, int row, int column) {
  const size_t line = format == Format::kPackedInt8 ? 128 : 64;
  const int lane = format == Format::kPackedInt8 ? row : row % 16;
  return size_t(column / kQuad) * line + size_t(lane) * kQuad + column % kQuad;
}

void put_code(Format format, unsigned char* codes, int row, int column, int code) {
  unsigned char* at = codes + code_at(format, row, column);
  const int value = code + zero_of(format);
  if (format == Format::kPackedInt8)
    *at = static_cast<unsigned char>(value);
  else if (row < 16)
    *at = static_cast<unsigned char>((*at & 0xF0) | value);
  else
    *at = static_cast<unsigned char>((*at & 0x0F) | (value << 4));
}

int get_code(Format format, const unsigned char* codes, int row, int column) {
  const int byte = codes[code_at(format, row, column)];
  if (format == Format::kPackedInt8) return byte - 128;
  return (row < 16 ? byte & 15 : byte >> 4) - 8;
}

float widened(uint16_t bits, bool half) {
  if (half) {
    Half h;
    std::memcpy(&h, &bits, sizeof h);
    return float(h);
  }
  const uint32_t wide = uint32_t(bits) << 16;
  float f;
  std::memcpy(&f, &wide, sizeof f);
  return f;
}

}  // namespace

void pack_int(const Matrix& m, const int8_t* codes, const uint16_t* scales, unsigned char* out) {
  const int groups = m.groups();
  const unsigned char none = m.format == Format::kPackedInt8 ? 0x80 : 0x88;
  for (int panel = 0; panel < m.panels(); panel++) {
    const int first = panel * kPanelRows, rows = std::min(kPanelRows, m.rows - first);
    for (int g = 0; g < groups; g++) {
      unsigned char* at = out + size_t(panel) * m.panel_bytes() + size_t(g) * m.group_bytes();
      std::memset(at, 0, kScaleBytes);
      std::memset(at + kScaleBytes, none, m.group_bytes() - kScaleBytes);
      const int begin = g * m.group, count = std::min(m.group, m.cols - begin);
      for (int r = 0; r < rows; r++) {
        std::memcpy(at + r * 2, scales + size_t(first + r) * groups + g, 2);
        const int8_t* row = codes + size_t(first + r) * m.cols + begin;
        for (int c = 0; c < count; c++) put_code(m.format, at + kScaleBytes, r, c, row[c]);
      }
    }
  }
}

void pack_bf16(const Matrix& m, const uint16_t* weights, unsigned char* out) {
  std::memset(out, 0, m.packed_bytes());
  for (int row = 0; row < m.rows; row++) {
    unsigned char* panel = out + size_t(row / kPanelRows) * m.panel_bytes();
    for (int c = 0; c < m.cols; c++) {
      unsigned char* at = panel + size_t(c / 2) * m.group_bytes() + (row % kPanelRows) * 4 + c % 2 * 2;
      std::memcpy(at, weights + size_t(row) * m.cols + c, 2);
    }
  }
}

void unpack(const Matrix& m, float* weights) {
  const unsigned char* base = static_cast<const unsigned char*>(m.data);
  for (int row = 0; row < m.rows; row++) {
    const unsigned char* panel = base + size_t(row / kPanelRows) * m.panel_bytes();
    const int r = row % kPanelRows;
    for (int c = 0; c < m.cols; c++) {
      float* to = weights + size_t(row) * m.cols + c;
      uint16_t bits;
      if (m.format == Format::kPackedBF16) {
        std::memcpy(&bits, panel + size_t(c / 2) * m.group_bytes() + r * 4 + c % 2 * 2, 2);
        *to = widened(bits, false);
        continue;
      }
      const unsigned char* group = panel + size_t(c / m.group) * m.group_bytes();
      std::memcpy(&bits, group + r * 2, 2);
      *to = widened(bits, true) * float(get_code(m.format, group + kScaleBytes, r, c % m.group));
    }
  }
}

}  // namespace baton
