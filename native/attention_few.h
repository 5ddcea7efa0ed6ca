// Few query rows and one page, as a decode step has them: the page is turned in registers on the way,
// not in memory, for turning is then half of the work. Each result is summed in the same order.
#pragma once

#include "attention_rows.h"

namespace baton {
namespace {

#if defined(__AVX512BW__)
constexpr int kFew = 8;  // rows whose sums fit the registers
#else
constexpr int kFew = 0;
#endif
template <class T>
inline bool are_few(int rows) { return sizeof(T) == 2 && rows <= kFew; }

#if defined(__AVX512BW__)

typedef uint16_t W __attribute__((vector_size(64)));

// The first `n` of 16 or 32 lanes, as a mask: others are not read and count as zero.
inline uint32_t first_lanes(int n) { return n >= 32 ? ~0u : (1u << n) - 1; }

// scores[row][token]: M rows times the keys of the page, 16 tokens and 16 units at a time.
template <int M>
__attribute__((noinline)) void score_few(Queries& s, int row, const uint16_t* k, int last,
                                         V (&score)[M][4]) {
  const uint32_t* keys = reinterpret_cast<const uint32_t*>(k);
  for (int t = 0; t < last; t += 16) {
    V sum[M] = {};
    for (int u = 0; u < s.units; u += 16) {
      U block[16], turned[16];
      const uint32_t* at = keys + size_t(t) * s.units + u;
      const int left = s.units - u;
      const __mmask16 there = __mmask16(first_lanes(left));
      BATON_EACH (int r = 0; r < 16; r++)
        block[r] = (U)_mm512_maskz_loadu_epi32(there, at + size_t(r) * s.units);
      transpose(block, turned);
      BATON_EACH (int i = 0; i < 16; i++) {
        if (i == left) break;
        s.ahead.ask(1);  // a line of K and one of V lie ahead of each
        BATON_EACH (int m = 0; m < M; m++)
          sum[m] = dot_bf16(sum[m], turned[i], splat_at(s.q + size_t(row + m) * s.wide + u + i));
      }
    }
    BATON_EACH (int m = 0; m < M; m++) score[m][t / 16] = sum[m];
  }
}

// out = out * keep + weights * values for 32 channels of M rows, two tokens at a time.
template <int M>
__attribute__((noinline)) void weigh_few(Queries& s, int row, const uint16_t* v, int dim, int d,
                                         int begin, int end, const uint16_t (*weights)[kPageTokens],
                                         const float* keep) {
  const __mmask32 there = first_lanes(dim - d);
  const bool both = d + 16 < s.wide;
  V acc[M][2];
  BATON_EACH (int m = 0; m < M; m++) {
    const float* out = s.out + size_t(row + m) * s.wide + d;
    acc[m][0] = load(out) * splat(keep[m]);
    acc[m][1] = both ? load(out + 16) * splat(keep[m]) : V{};
  }
  for (int t = begin / 2 * 2; t < end; t += 2) {
    s.ahead.ask(2);
    const uint16_t* at = v + size_t(t) * dim + d;
    const W even = (W)_mm512_maskz_loadu_epi16(there, at);
    const W odd = (W)_mm512_maskz_loadu_epi16(t + 1 < end ? there : 0, at + dim);
    const U low = (U)__builtin_shufflevector(
        even, odd, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43,
        12, 44, 13, 45, 14, 46, 15, 47);
    const U high = (U)__builtin_shufflevector(
        even, odd, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26,
        58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
    BATON_EACH (int m = 0; m < M; m++) {
      const U weight = splat_at(weights[m] + t);
      acc[m][0] = dot_bf16(acc[m][0], low, weight);
      acc[m][1] = dot_bf16(acc[m][1], high, weight);
    }
  }
  BATON_EACH (int m = 0; m < M; m++) {
    float* out = s.out + size_t(row + m) * s.wide + d;
    store(out, acc[m][0]);
    if (both) store(out + 16, acc[m][1]);
  }
}

// Folds the page at hand into M query rows. Each sees at least one of its tokens.
template <int M>
__attribute__((noinline)) void fold_few(Queries& s, int row, const uint16_t* k, const uint16_t* v,
                                        int dim, float scale) {
  const Sight sight = Sight::of<M>(s, row);
  V score[M][4] = {};
  score_few<M>(s, row, k, sight.end, score);
  alignas(64) uint16_t weights[M][kPageTokens];
  float keep[16];
  soften<uint16_t, M>(s, row, sight.whole, score, scale, weights, keep);
  for (int d = 0; d < dim; d += 32)
    weigh_few<M>(s, row, v, dim, d, sight.begin, sight.end, weights, keep);
}

template <int M>
inline void fold_few_of(Queries& s, int row, int rows, const uint16_t* k, const uint16_t* v, int dim,
                        float scale) {
  if constexpr (M > 1) {
    if (rows < M) return fold_few_of<M - 1>(s, row, rows, k, v, dim, scale);
  }
  fold_few<M>(s, row, k, v, dim, scale);
}
#endif

// The same for all of `rows` rows, which are few.
inline void fold_few(Queries& s, int row, int rows, const uint16_t* k, const uint16_t* v, int dim,
                     float scale) {
#if defined(__AVX512BW__)
  fold_few_of<kFew>(s, row, rows, k, v, dim, scale);
#else
  (void)s, (void)row, (void)rows, (void)k, (void)v, (void)dim, (void)scale;
#endif
}

}  // namespace
}  // namespace baton
