// Query rows and one page of one KV head: scores, a running softmax, weighted values.
#pragma once

#include "ahead.h"
#include "lanes.h"
#include "model.h"

namespace baton {
namespace {

#if defined(__AVX512F__)
constexpr int kTogether = 4;  // query rows whose sums fit the registers
#else
constexpr int kTogether = 1;
#endif
constexpr int kQueriesMax = 128;

template <class T>
constexpr int kUnit = int(4 / sizeof(T));  // cached values in 32 bits

template <class T>
inline V dot(V acc, U a, U b) {
  if constexpr (sizeof(T) == 2) return dot_bf16(acc, a, b);
  return fma((V)a, (V)b, acc);
}

// --- turning a page ------------------------------------------------------------------------------

// out[c] lane r = in[r] lane c.
inline void transpose(const U (&in)[16], U (&out)[16]) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
  BATON_EACH (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)in[i], (__m512i)in[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)in[i], (__m512i)in[i + 1]);
  }
  BATON_EACH (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  BATON_EACH (int i = 0; i < 4; i++) {  // columns i, 4 + i, 8 + i, 12 + i lie in the quarters of b[4 * _ + i]
    const __m512i p = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88);
    const __m512i q = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
    const __m512i r = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xDD);
    const __m512i s = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xDD);
    out[i] = (U)_mm512_shuffle_i32x4(p, q, 0x88), out[8 + i] = (U)_mm512_shuffle_i32x4(p, q, 0xDD);
    out[4 + i] = (U)_mm512_shuffle_i32x4(r, s, 0x88), out[12 + i] = (U)_mm512_shuffle_i32x4(r, s, 0xDD);
  }
#else
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < 16; c++) out[c][r] = in[r][c];
#endif
}

// The first `n` units at `at`, then zeros.
inline U some_units(const uint32_t* at, int n) {
  if (n >= 16) return load_as<U>(at);
  U units{};
  std::memcpy(&units, at, size_t(n) * 4);
  return units;
}

// keys[unit][64] from rows of `units` units; tokens from `last` on are garbage nobody looks at.
__attribute__((noinline)) void turn_keys(const void* k, int units, int last, uint32_t* keys) {
  const uint32_t* rows = static_cast<const uint32_t*>(k);
  for (int t = 0; t < last; t += 16) {
    for (int u = 0; u < units; u += 16) {
      U block[16], turned[16];
      const uint32_t* at = rows + size_t(t) * units + u;
      BATON_EACH (int r = 0; r < 16; r++) block[r] = some_units(at + size_t(r) * units, units - u);
      transpose(block, turned);
      uint32_t* to = keys + size_t(u) * kPageTokens + t;
      BATON_EACH (int c = 0; c < 16; c++) std::memcpy(to + size_t(c) * kPageTokens, &turned[c], 64);
    }
  }
}

inline void turn_values(const float* v, int dim, int wide, int last, uint32_t* values) {
  for (int t = 0; t < last; t++)
    std::memcpy(values + size_t(t) * wide, v + size_t(t) * dim, size_t(dim) * 4);
}

inline U some_values(const uint16_t* at, int n) {
  H h{};
  std::memcpy(&h, at, n >= 16 ? sizeof h : size_t(n) * 2);
  return widened(h);
}

// Two tokens' bf16 side by side; those from `last` on count as zero: what lies there may be anything.
__attribute__((noinline)) void turn_values(const uint16_t* v, int dim, int wide, int last,
                                           uint32_t* values) {
  for (int t = 0; t < last; t += 2) {
    const uint16_t* even = v + size_t(t) * dim;
    uint32_t* to = values + size_t(t / 2) * wide;
    int d = 0;
    if (t + 1 < last) {
      for (; d + 16 <= dim; d += 16) {
        const U pair = widened(load_as<H>(even + d)) |
                       (widened(load_as<H>(even + dim + d)) << 16);
        std::memcpy(to + d, &pair, sizeof pair);
      }
    }
    for (; d < dim; d += 16) {
      U pair = some_values(even + d, dim - d);
      if (t + 1 < last) pair |= some_values(even + dim + d, dim - d) << 16;
      std::memcpy(to + d, &pair, sizeof pair);
    }
  }
}

// --- query rows ----------------------------------------------------------------------------------

// One thread's room for a tile; every array has kQueriesMax rows.
struct Queries {
  uint32_t* keys;
  uint32_t* values;
  uint32_t* q;     // [units]
  float* out;      // [wide] of the span at hand
  float* total;    // [wide] of the spans before
  float *top, *sum, *total_top, *total_sum;
  int *first, *last;  // the tokens of the page at hand that the row sees
  int units, wide;    // wide: padded to lanes
  Ahead ahead;         // the K and V that come next
  int ask_lines = 0;   // of them, at each half of a fold

  static size_t bytes(int dim) {
    const size_t wide = size_t(to_lanes(dim));
    return 4 * (2 * wide * kPageTokens + kQueriesMax * (3 * wide + 6));
  }
  Queries(void* room, int units_, int wide_) : units(units_), wide(wide_) {
    uint32_t* at = static_cast<uint32_t*>(room);
    auto take = [&](size_t count) { return at += count, at - count; };
    auto floats = [&](size_t count) { return reinterpret_cast<float*>(take(count)); };
    auto ints = [&](size_t count) { return reinterpret_cast<int*>(take(count)); };
    keys = take(size_t(wide) * kPageTokens), values = take(size_t(wide) * kPageTokens);
    q = take(size_t(wide) * kQueriesMax), out = floats(size_t(wide) * kQueriesMax);
    total = floats(size_t(wide) * kQueriesMax);
    top = floats(kQueriesMax), sum = floats(kQueriesMax);
    total_top = floats(kQueriesMax), total_sum = floats(kQueriesMax);
    first = ints(kQueriesMax), last = ints(kQueriesMax);
  }
};

inline I lane_numbers() { return I{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

inline V keep_of(float before, float top) { return exp16(splat(before - top)); }

// The page's weights for one query row, in the form that multiplies values; 64 of them.
inline void put_weights(const V (&p)[4], float* weights, V (&rounded)[4]) {
  BATON_EACH (int i = 0; i < 4; i++) store(weights + 16 * i, rounded[i] = p[i]);
}
inline void put_weights(const V (&p)[4], uint16_t* weights, V (&rounded)[4]) {
  BATON_EACH (int i = 0; i < 4; i++) {
#if defined(__AVX512BF16__)  // rounds alike: a weight is never a denormal
    const H h = (H)_mm512_cvtneps_pbh((__m512)p[i]);
#else
    const H h = lower_half(to_bf16(p[i]));
#endif
    std::memcpy(weights + 16 * i, &h, sizeof h);
    rounded[i] = (V)(widened(h) << 16);
  }
}

// Lane m: what `four` makes of row m's lanes. Lanes behind the rows hold anything.
template <int M, class Four>
inline V by_row(const V (&row)[M], const Four& four) {
  static_assert(M <= 8, "two vectors of four");
  auto at = [&](int m) { return row[m < M ? m : M - 1]; };
  const V4 first = four(at(0), at(1), at(2), at(3));
  return side_by_side(first, M > 4 ? four(at(4), at(5), at(6), at(7)) : first);
}

template <int M>
inline void store_rows(float* to, V rows) {
  if constexpr (M == 4) {
    const V4 four = __builtin_shufflevector(rows, rows, 0, 1, 2, 3);
    std::memcpy(to, &four, sizeof four);
  } else {
    std::memcpy(to, &rows, M * sizeof(float));
  }
}

// The tokens of the page at hand that some of M rows sees, and whether all see all of it.
struct Sight {
  int begin = kPageTokens, end = 0;
  bool whole = true;

  template <int M>
  static Sight of(const Queries& s, int row) {
    Sight sight;
    BATON_EACH (int m = row; m < row + M; m++) {
      sight.begin = s.first[m] < sight.begin ? s.first[m] : sight.begin;
      sight.end = s.last[m] > sight.end ? s.last[m] : sight.end;
      sight.whole &= s.first[m] == 0 && s.last[m] == kPageTokens;
    }
    return sight;
  }
};

// Scores to weights: the running maximum moves, what was summed before is kept by `keep`.
template <class T, int M>
inline void soften(Queries& s, int row, bool whole, V (&score)[M][4], float scale,
                   T (*weights)[kPageTokens], float (&keep)[16]) {
  V each[M];
  BATON_EACH (int m = 0; m < M; m++)
    BATON_EACH (int i = 0; i < 4; i++) score[m][i] = score[m][i] * splat(scale);
  if (!whole) {
    BATON_EACH (int m = 0; m < M; m++) {
      const I first = splat(s.first[row + m]), last = splat(s.last[row + m]);
      BATON_EACH (int i = 0; i < 4; i++) {
        const I token = lane_numbers() + 16 * i;
        score[m][i] = (token >= first) & (token < last) ? score[m][i] : splat(-INFINITY);
      }
    }
  }
  BATON_EACH (int m = 0; m < M; m++) {
    each[m] = larger(larger(score[m][0], score[m][1]), larger(score[m][2], score[m][3]));
  }
  const V here = by_row(each, greatest4), before = load(s.top + row);
  const V top = larger(here, before), sum = load(s.sum + row);
  const V kept = sum == V{} ? V{} : exp_of_negative(before - top);
  store(keep, kept);
  BATON_EACH (int m = 0; m < M; m++) {
    V rounded[4];
    const V most = splat(top[m]);
    BATON_EACH (int i = 0; i < 4; i++) {
      const V weight = exp_of_negative(score[m][i] - most);
      score[m][i] = score[m][i] == splat(-INFINITY) ? V{} : weight;
    }
    put_weights(score[m], weights[m], rounded);
    each[m] = (rounded[0] + rounded[1]) + (rounded[2] + rounded[3]);
  }
  store_rows<M>(s.sum + row, fma(sum, kept, by_row(each, reduce4)));
  store_rows<M>(s.top + row, top);
}

// out = out * keep + weights * values for N * 16 neighbouring channels of M rows.
template <class T, int M, int N>
__attribute__((noinline)) void weigh(Queries& s, int row, int d, int begin, int end,
                                     const T (*weights)[kPageTokens], const float* keep) {
  V acc[M][N];
  BATON_EACH (int m = 0; m < M; m++)
    BATON_EACH (int i = 0; i < N; i++)
      acc[m][i] = load(s.out + size_t(row + m) * s.wide + d + 16 * i) * splat(keep[m]);
  for (int u = begin; u < end; u++) {
    const uint32_t* values = s.values + size_t(u) * s.wide + d;
    U v[N];
    BATON_EACH (int i = 0; i < N; i++) v[i] = load_as<U>(values + 16 * i);
    BATON_EACH (int m = 0; m < M; m++) {
      const U weight = splat_at(weights[m] + u * kUnit<T>);
      BATON_EACH (int i = 0; i < N; i++) acc[m][i] = dot<T>(acc[m][i], v[i], weight);
    }
  }
  BATON_EACH (int m = 0; m < M; m++)
    BATON_EACH (int i = 0; i < N; i++) store(s.out + size_t(row + m) * s.wide + d + 16 * i, acc[m][i]);
}

// score (+)= queries * keys for the first kQuarters * 16 tokens of the page at hand.
template <int kQuarters, class T, int M>
inline void score_tokens(const Queries& s, int row, V (&score)[M][4]) {
  for (int u = 0; u < s.units; u++) {
    U key[kQuarters];
    BATON_EACH (int i = 0; i < kQuarters; i++)
      key[i] = load_as<U>(s.keys + size_t(u) * kPageTokens + 16 * i);
    BATON_EACH (int m = 0; m < M; m++) {
      const U q = splat_at(s.q + size_t(row + m) * s.wide + u);
      BATON_EACH (int i = 0; i < kQuarters; i++) score[m][i] = dot<T>(score[m][i], key[i], q);
    }
  }
}

// Folds the page at hand into M query rows. Each sees at least one of its tokens.
template <class T, int M>
__attribute__((noinline)) void fold(Queries& s, int row, float scale) {
  const Sight sight = Sight::of<M>(s, row);
  V score[M][4] = {};
  s.ahead.ask(s.ask_lines);
  if (sight.end > 48)
    score_tokens<4, T>(s, row, score);
  else if (sight.end > 32)
    score_tokens<3, T>(s, row, score);
  else if (sight.end > 16)
    score_tokens<2, T>(s, row, score);
  else
    score_tokens<1, T>(s, row, score);
  alignas(64) T weights[M][kPageTokens];
  float keep[16];
  soften<T, M>(s, row, sight.whole, score, scale, weights, keep);
  s.ahead.ask(s.ask_lines);
  const int begin = sight.begin / kUnit<T>, end = (sight.end + kUnit<T> - 1) / kUnit<T>;
  int d = 0;
  for (; d + 64 <= s.wide; d += 64) weigh<T, M, 4>(s, row, d, begin, end, weights, keep);
  for (; d < s.wide; d += 16) weigh<T, M, 1>(s, row, d, begin, end, weights, keep);
}

// As many of the next rows as there are, at most M.
template <class T, int M>
inline void fold_some(Queries& s, int row, int rows, float scale) {
  if constexpr (M > 1) {
    if (rows < M) return fold_some<T, M - 1>(s, row, rows, scale);
  }
  fold<T, M>(s, row, scale);
}

}  // namespace
}  // namespace baton
