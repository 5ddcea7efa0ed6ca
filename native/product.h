// Matrix products, row by row the same bits: y[row][n] = sum over k of x[row][k] * w[n][k].
//
// One output element is summed in one fixed order, whatever the tile, the thread or the batch:
//   int8, int4: exact integers within a group of columns, groups folded in ascending order
//   bf16:       pairs of columns in ascending order (dot_bf16)
//   plain:      16 lanes, lane j takes columns j, j + 16, ..., then a fixed tree
#pragma once

#include "lanes.h"
#include "model.h"
#include "packed.h"

namespace baton {
namespace {

// Rows in one register tile: as many as the registers hold. A tile for all rows at once may be higher:
// it reads the weights only once, and that is worth more than the registers it lacks.
#if defined(__AVX512F__)
constexpr int kIntRows = 8, kIntRowsAtOnce = 12, kBf16Rows = 12;
#else
constexpr int kIntRows = 2, kIntRowsAtOnce = 2, kBf16Rows = 4;
#endif
constexpr int kTileRows = kIntRowsAtOnce > kBf16Rows ? kIntRowsAtOnce : kBf16Rows;
constexpr int kBlockColumns = 1024;  // of a panel, so that a block stays in the nearest cache

// How many bytes before it is read a stream of weights is asked for: near where the processor's own
// prefetcher keeps up with it, far beside the arithmetic of more rows (docs/decisions/0015).
constexpr size_t kAheadNear = 512, kAheadFar = 6144;
inline size_t ahead_of(const Matrix& w, int rows) {
  const int few = w.format == Format::kPackedInt4 ? 3 : w.format == Format::kPackedInt8 ? 4 : 6;
  return rows <= few ? kAheadNear : kAheadFar;
}

// --- activations ---------------------------------------------------------------------------------

// One group of a row: codes, scale, and what the integer sums start at. x is padded with zeros.
// A group with a value that is not finite gets the scale NaN, so that the row fails visibly.
template <int kGroup>
inline void quantise_group(const float* x, int zero, int8_t* codes, float* scale, int32_t* start) {
  I most = {};
  BATON_EACH (int i = 0; i < kGroup; i += 16) {
    const I size = (I)load(x + i) & 0x7FFFFFFF;
    most = size > most ? size : most;
  }
  const int32_t bits = greatest(most);  // of positive floats, and NaN above them
  float top;
  std::memcpy(&top, &bits, 4);
  const bool finite = bits < 0x7F800000;
  if (!finite || top < 1e-30f) {
    std::memset(codes, 0, kGroup);
    *scale = finite ? 0.0f : NAN, *start = 0;
    return;
  }
  const V inverse = splat(127.0f / top);
  I total = {};
  constexpr int kAtOnce = kGroup < 64 ? kGroup : 64;
  BATON_EACH (int i = 0; i < kGroup; i += kAtOnce) {
    I code[4] = {};
    BATON_EACH (int j = 0; j < kAtOnce / 16; j++) code[j] = nearest(load(x + i + 16 * j) * inverse);
    const U bytes = lower_bytes(code);
    std::memcpy(codes + i, &bytes, kAtOnce);
    if (kOffset) total = dot_int<8>(total, splat(0x01010101u), bytes);
  }
  *scale = top / 127.0f;
  *start = kOffset ? -zero * sum(total) : 0;
}

template <int kGroup>
inline void quantise(const float* x, int begin, int end, int zero, const Input& in, int row) {
  int8_t* codes = in.codes + size_t(row) * in.code_stride + begin;
  size_t at = size_t(row) * in.group_stride + begin / kGroup;
  for (int k = 0; k < end - begin; k += kGroup, at++)
    quantise_group<kGroup>(x + k, zero, codes + k, in.scales + at, in.starts + at);
}

// Brings columns [begin, end) of one row into the form that `w` multiplies. x: these columns, padded
// with zeros.
void prepare(const Matrix& w, const float* x, int begin, int end, const Input& in, int row) {
  if (w.format == Format::kPackedBF16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(in.codes + size_t(row) * in.code_stride) + begin;
    for (int k = 0; k < end - begin; k += 16) narrow(load(x + k), to + k);
  } else if (is_integer(w.format)) {
    const int zero = w.format == Format::kPackedInt8 ? 128 : 8;
    if (w.group == 32) return quantise<32>(x, begin, end, zero, in, row);
    if (w.group == 64) return quantise<64>(x, begin, end, zero, in, row);
    quantise<128>(x, begin, end, zero, in, row);
  }
}

// --- packed panels -------------------------------------------------------------------------------

// What will be read later is asked for at `at`, `step` bytes on for every line that is read now: into
// the second cache, from where the processor itself brings it nearer.
struct Ask {
  const unsigned char* at;
  size_t step;

  void line() {
    __builtin_prefetch(at, 0, 2);
    at += step;
  }
};

// Where the 32 sums of each row go.
struct Sums {
  float* at;
  ptrdiff_t ld;

  float* row(int m) const { return at + m * ld; }
  Sums from(int m) const { return {row(m), ld}; }
};

// Where the rows of a tile are read. Four share a pointer: the registers would not hold one for each.
template <int M>
struct Rows {
  static constexpr int kQuads = (M + 3) / 4;
  const int8_t* quad[kQuads];
  ptrdiff_t stride, thrice;

  Rows(const Input& in, int row, size_t offset) : stride(in.code_stride), thrice(3 * stride) {
    BATON_EACH (int i = 0; i < kQuads; i++) quad[i] = in.codes + (row + 4 * i) * stride + offset;
    asm("" : "+r"(thrice));
  }
  const int8_t* operator[](int m) const {
    return quad[m / 4] + (m % 4 == 3 ? thrice : m % 4 * stride);
  }
  void advance() {
    BATON_EACH (int i = 0; i < kQuads; i++) {
      quad[i] += 4;
      asm("" : "+r"(quad[i]));  // or the compiler makes a pointer for each row
    }
  }
};

// sums (+)= groups [begin, end) of a panel, whose bytes start at `w`. The registers are for the
// integer sums of a group; totals that do not fit beside them are touched once a group.
template <int kZero, int M>
__attribute__((noinline)) void int_tile(const unsigned char* w, int group, int begin, int end,
                                        const Input& in, int row, Sums sums, Ask ask) {
  V total[M][2];
  BATON_EACH (int m = 0; m < M; m++)
    BATON_EACH (int i = 0; i < 2; i++) total[m][i] = begin ? load(sums.row(m) + 16 * i) : V{};
  Rows<M> a(in, row, size_t(begin) * group);
  const size_t first = size_t(row) * in.group_stride;
  for (int g = begin; g < end; g++) {
    const Half* scale = reinterpret_cast<const Half*>(w);
    ask.line();
    w += kScaleBytes;
    I acc[M][2];
    BATON_EACH (int m = 0; m < M; m++)
      acc[m][0] = acc[m][1] = splat(in.starts[first + size_t(m) * in.group_stride + g]);
    for (int k = 0; k < group; k += 4) {
      U low, high;
      if (kZero == 8) {
        const U both = load_as<U>(w);
        low = both & 0x0F0F0F0Fu, high = (both >> 4) & 0x0F0F0F0Fu;
        ask.line();
        w += 64;
      } else {
        low = load_as<U>(w), high = load_as<U>(w + 64);
        ask.line();
        ask.line();
        w += 128;
      }
      BATON_EACH (int m = 0; m < M; m++) {
        const U four = splat_at(a[m]);
        acc[m][0] = dot_int<kZero>(acc[m][0], low, four);
        acc[m][1] = dot_int<kZero>(acc[m][1], high, four);
      }
      a.advance();
    }
    const V scale0 = widen(scale), scale1 = widen(scale + 16);
    BATON_EACH (int m = 0; m < M; m++) {
      const V by = splat(in.scales[first + size_t(m) * in.group_stride + g]);
      total[m][0] = fma(__builtin_convertvector(acc[m][0], V), scale0 * by, total[m][0]);
      total[m][1] = fma(__builtin_convertvector(acc[m][1], V), scale1 * by, total[m][1]);
    }
  }
  BATON_EACH (int m = 0; m < M; m++)
    BATON_EACH (int i = 0; i < 2; i++) store(sums.row(m) + 16 * i, total[m][i]);
}

template <int M>
__attribute__((noinline)) void bf16_tile(const unsigned char* w, int begin, int end,
                                         const Input& in, int row, Sums sums, Ask ask) {
  V total[M][2];
  Rows<M> a(in, row, size_t(begin) * 4);
  BATON_EACH (int m = 0; m < M; m++)
    BATON_EACH (int i = 0; i < 2; i++) total[m][i] = begin ? load(sums.row(m) + 16 * i) : V{};
#pragma GCC unroll 4
  for (int pair = begin; pair < end; pair++) {
    const U w0 = load_as<U>(w), w1 = load_as<U>(w + 64);
    ask.line();
    ask.line();
    w += 128;
    BATON_EACH (int m = 0; m < M; m++) {
      const U two = splat_at(a[m]);
      total[m][0] = dot_bf16(total[m][0], w0, two);
      total[m][1] = dot_bf16(total[m][1], w1, two);
    }
    a.advance();
  }
  BATON_EACH (int m = 0; m < M; m++)
    BATON_EACH (int i = 0; i < 2; i++) store(sums.row(m) + 16 * i, total[m][i]);
}

// Calls the tile for `rows` rows, which is at most M.
template <int M>
inline void tile_of(const Matrix& w, const unsigned char* at, int begin, int end, const Input& in,
                    int row, int rows, Sums sums, Ask ask) {
  if constexpr (M > 1) {
    if (rows < M) return tile_of<M - 1>(w, at, begin, end, in, row, rows, sums, ask);
  }
  if constexpr (M <= kBf16Rows) {
    if (w.format == Format::kPackedBF16) return bf16_tile<M>(at, begin, end, in, row, sums, ask);
  }
  if constexpr (M <= kIntRowsAtOnce) {
    if (w.format == Format::kPackedInt4)
      int_tile<8, M>(at, w.group, begin, end, in, row, sums, ask);
    else
      int_tile<128, M>(at, w.group, begin, end, in, row, sums, ask);
  }
}

// Rows of the tiles that `rows` rows are cut into.
inline int tile_height(const Matrix& w, int rows) {
  const bool bf16 = w.format == Format::kPackedBF16;
  const int most = bf16 ? kBf16Rows : rows <= kIntRowsAtOnce ? kIntRowsAtOnce : kIntRows;
  if (rows <= most) return rows;
  const int tiles = (rows + most - 1) / most;
  return (rows + tiles - 1) / tiles;
}

// sums: one panel times all rows. A block of the panel stays in the cache for all rows, and
// each tile asks for its share of the block behind it, so that memory is busy all the time.
void packed_panel(const Matrix& w, int panel, const Input& in, int rows, Sums sums) {
  const int height = tile_height(w, rows), tiles = height < rows ? (rows + height - 1) / height : 1;
  const int width = w.format == Format::kPackedBF16 ? 2 : w.group, groups = w.groups();
  const int block = tiles == 1 ? groups : kBlockColumns / width;
  const size_t step = tiles == 1 ? 64 : (64 + size_t(tiles) - 1) / size_t(tiles);
  const size_t ahead = ahead_of(w, rows);
  const unsigned char* at = static_cast<const unsigned char*>(w.data) + size_t(panel) * w.panel_bytes();
  for (int begin = 0; begin < groups; begin += block) {
    const int end = begin + block < groups ? begin + block : groups;
    const size_t bytes = size_t(end - begin) * w.group_bytes();
    for (int row = 0, tile = 0; row < rows; row += height, tile++) {
      const int count = rows - row < height ? rows - row : height;
      const Ask ask{at + (tiles == 1 ? ahead : bytes + bytes * size_t(tile) / size_t(tiles)), step};
      tile_of<kTileRows>(w, at, begin, end, in, row, count, sums.from(row), ask);
    }
    at += bytes;
  }
}

// --- plain matrices ------------------------------------------------------------------------------

template <int M, int N, class T>
inline void plain_tile(const float* x, int ldx, const T* w, int cols, Sums sums) {
  V acc[M][N] = {};
  int k = 0;
  for (; k + 16 <= cols; k += 16) {
    V b[N];
    BATON_EACH (int n = 0; n < N; n++) b[n] = widen(w + size_t(n) * cols + k);
    BATON_EACH (int m = 0; m < M; m++) {
      V a = load(x + size_t(m) * ldx + k);
      BATON_EACH (int n = 0; n < N; n++) acc[m][n] = fma(a, b[n], acc[m][n]);
    }
  }
  if (k < cols) {
    BATON_EACH (int n = 0; n < N; n++) {
      V b = widen_some(w + size_t(n) * cols + k, cols - k);
      BATON_EACH (int m = 0; m < M; m++) acc[m][n] = fma(load(x + size_t(m) * ldx + k), b, acc[m][n]);
    }
  }
  BATON_EACH (int m = 0; m < M; m++) {
    if constexpr (N == 4) {
      const V4 four = reduce4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
      std::memcpy(sums.row(m), &four, sizeof four);
    } else {
      BATON_EACH (int n = 0; n < N; n++) sums.row(m)[n] = reduce(acc[m][n]);
    }
  }
}

template <int N, class T>
inline void plain_columns(const Input& in, int rows, const T* w, int cols, Sums sums) {
  const int ld = in.ld;
  int m = 0;
  for (; m + 4 <= rows; m += 4)
    plain_tile<4, N>(in.x + size_t(m) * ld, ld, w, cols, sums.from(m));
  for (; m < rows; m++) plain_tile<1, N>(in.x + size_t(m) * ld, ld, w, cols, sums.from(m));
}

template <class T>
void plain_panel(const Matrix& w, int panel, const Input& in, int rows, Sums sums) {
  const int first = panel * kPanelRows;
  const int count = w.rows - first < kPanelRows ? w.rows - first : kPanelRows;
  const T* at = static_cast<const T*>(w.data) + size_t(first) * w.cols;
  int n = 0;
  auto some = [&] { return Sums{sums.at + n, sums.ld}; };
  for (; n + 4 <= count; n += 4) plain_columns<4>(in, rows, at + size_t(n) * w.cols, w.cols, some());
  for (; n < count; n++) plain_columns<1>(in, rows, at + size_t(n) * w.cols, w.cols, some());
}

// sums: outputs [32 panel, 32 panel + 32) of all rows; those past the last are not defined.
void panel_sums(const Matrix& w, int panel, const Input& in, int rows, Sums sums) {
  switch (w.format) {
    case Format::kF32: return plain_panel<float>(w, panel, in, rows, sums);
    case Format::kBF16: return plain_panel<uint16_t>(w, panel, in, rows, sums);
    case Format::kF16: return plain_panel<Half>(w, panel, in, rows, sums);
    default: return packed_panel(w, panel, in, rows, sums);
  }
}

}  // namespace
}  // namespace baton
