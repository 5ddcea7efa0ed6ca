// Sixteen lanes of 32 bits and what the kernels do with them, for every instruction set alike: the same
// bits, because a fused multiply-add is asked for by name and reductions are fixed trees.
//
// Included once per instruction set: everything here has internal linkage.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "packed.h"

// Loops over the registers of a tile; unrolled at once, or the compiler keeps the tile in memory.
#if defined(__x86_64__)
#define BATON_EACH _Pragma("GCC unroll 16") for
#else
#define BATON_EACH for
#endif

namespace baton {
namespace {

typedef float V __attribute__((vector_size(64)));
typedef float V8 __attribute__((vector_size(32)));
typedef float V4 __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(64)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
typedef int8_t B __attribute__((vector_size(16)));

inline V splat(float a) { return V{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a}; }
inline I splat(int32_t a) { return I{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a}; }
inline U splat(uint32_t a) { return U{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a}; }

template <class X>
inline X load_as(const void* p) {
  X x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline V load(const float* p) { return load_as<V>(p); }
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline U splat_at(const void* p) { return splat(load_as<uint32_t>(p)); }

inline V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  union Halves { V v; __m256 h[2]; } x{a}, y{b}, z{c};
  z.h[0] = _mm256_fmadd_ps(x.h[0], y.h[0], z.h[0]);
  z.h[1] = _mm256_fmadd_ps(x.h[1], y.h[1], z.h[1]);
  return z.v;
#elif defined(__aarch64__)
  union Quarters { V v; float32x4_t q[4]; } x{a}, y{b}, z{c};
  for (int i = 0; i < 4; i++) z.q[i] = vfmaq_f32(z.q[i], x.q[i], y.q[i]);
  return z.v;
#else
  for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

// a > b ? a : b and a < b ? a : b, lane by lane: of zeros, or beside a NaN, the second.
inline V larger(V a, V b) {
#if defined(__AVX512F__)
  return (V)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
inline V smaller(V a, V b) {
#if defined(__AVX512F__)
  return (V)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

// Eight lanes, and anything behind them.
inline V side_by_side(V4 a, V4 b) {
#if defined(__AVX512F__)
  return (V)_mm512_castps256_ps512(_mm256_set_m128((__m128)b, (__m128)a));
#else
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
#endif
}

// acc + a0 * b0 + a1 * b1 of the two bf16 in each lane: the upper pair first, each product and sum
// rounded once, denormals flushed. That is what vdpbf16ps does (checked by tests), spelled out where
// there is none.
inline V dot_bf16(V acc, U a, U b) {
#if defined(__AVX512BF16__)
  return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  const U upper = splat(0xFFFF0000u);
  return fma((V)(a << 16), (V)(b << 16), fma((V)(a & upper), (V)(b & upper), acc));
#endif
}

// Products of unsigned weights, `kZero` above their value, with signed activations. Only instruction
// sets with unsigned times signed keep the offset; they start a sum at minus kZero times the sum of
// the activations. The sums are exact integers, so both ways end at the same one.
#if defined(__aarch64__)
constexpr bool kOffset = false;
#else
constexpr bool kOffset = true;
#endif

// acc + the four products of bytes in each lane.
template <int kZero>
inline I dot_int(I acc, U w, U a) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)a);
#elif defined(__AVX512BW__)
  const __m512i x = (__m512i)w, y = (__m512i)a;
  if (kZero == 8)  // at most 2 * 15 * 127: fits 16 bits
    return acc + (I)_mm512_madd_epi16(_mm512_maddubs_epi16(x, y), _mm512_set1_epi16(1));
  const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(y, 8), 8), odd = _mm512_srai_epi16(y, 8);
  return acc + (I)_mm512_madd_epi16(_mm512_and_si512(x, _mm512_set1_epi16(255)), even) +
         (I)_mm512_madd_epi16(_mm512_srli_epi16(x, 8), odd);
#elif defined(__AVX2__)
  union Halves { U v; __m256i h[2]; } x{w}, y{a};
  union Sums { I v; __m256i h[2]; } z{acc};
  for (int i = 0; i < 2; i++) {
    if (kZero == 8) {
      const __m256i pairs = _mm256_maddubs_epi16(x.h[i], y.h[i]);
      z.h[i] = _mm256_add_epi32(z.h[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      continue;
    }
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(y.h[i], 8), 8);
    const __m256i odd = _mm256_srai_epi16(y.h[i], 8);
    const __m256i low = _mm256_and_si256(x.h[i], _mm256_set1_epi16(255));
    z.h[i] = _mm256_add_epi32(z.h[i], _mm256_madd_epi16(low, even));
    z.h[i] = _mm256_add_epi32(z.h[i], _mm256_madd_epi16(_mm256_srli_epi16(x.h[i], 8), odd));
  }
  return z.v;
#elif defined(__aarch64__)
  union Quarters { U v; uint8x16_t q[4]; } x{w}, y{a};
  union Sums { I v; int32x4_t q[4]; } z{acc};
  for (int i = 0; i < 4; i++) {
    const int8x16_t s = vreinterpretq_s8_u8(vsubq_u8(x.q[i], vdupq_n_u8(kZero)));
    const int8x16_t t = vreinterpretq_s8_u8(y.q[i]);
#if defined(__ARM_FEATURE_DOTPROD)
    z.q[i] = vdotq_s32(z.q[i], s, t);
#else
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(s), vget_low_s8(t)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(s, t));
    z.q[i] = vaddq_s32(z.q[i], vpaddq_s32(low, high));
#endif
  }
  return z.v;
#else
  for (int byte = 0; byte < 4; byte++)
    acc += (I)((w >> (8 * byte)) & 255) * ((I)(a << (24 - 8 * byte)) >> 24);
  return acc;
#endif
}

// Sums 16 lanes as a fixed tree: halves, quarters, pairs.
inline float reduce(V a) {
  V8 e = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7) +
         __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
  V4 f = __builtin_shufflevector(e, e, 0, 1, 2, 3) + __builtin_shufflevector(e, e, 4, 5, 6, 7);
  return (f[0] + f[2]) + (f[1] + f[3]);
}

// Four such sums at once, each by the same tree.
inline V4 reduce4(V a, V b, V c, V d) {
  auto quarter = [](V x) {
    V8 e = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(e, e, 0, 1, 2, 3) + __builtin_shufflevector(e, e, 4, 5, 6, 7);
  };
  const V4 p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
  const V4 pq_low = __builtin_shufflevector(p, q, 0, 4, 1, 5);   // p0 q0 p1 q1
  const V4 pq_high = __builtin_shufflevector(p, q, 2, 6, 3, 7);  // p2 q2 p3 q3
  const V4 rs_low = __builtin_shufflevector(r, s, 0, 4, 1, 5);
  const V4 rs_high = __builtin_shufflevector(r, s, 2, 6, 3, 7);
  const V4 pq = pq_low + pq_high, rs = rs_low + rs_high;  // x0 + x2 first, then x1 + x3
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

// The greatest lanes of four; the order of maxima does not matter, and there is no NaN among them.
inline V4 greatest4(V a, V b, V c, V d) {
  auto quarter = [](V x) {
    V8 l = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
    V8 h = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    V8 e = l > h ? l : h;
    V4 p = __builtin_shufflevector(e, e, 0, 1, 2, 3), q = __builtin_shufflevector(e, e, 4, 5, 6, 7);
    return p > q ? p : q;
  };
  auto pairs = [](V4 x, V4 y) {
    V4 l = __builtin_shufflevector(x, y, 0, 4, 1, 5), h = __builtin_shufflevector(x, y, 2, 6, 3, 7);
    return l > h ? l : h;
  };
  const V4 ab = pairs(quarter(a), quarter(b)), cd = pairs(quarter(c), quarter(d));
  V4 l = __builtin_shufflevector(ab, cd, 0, 1, 4, 5), h = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  return l > h ? l : h;
}

inline int32_t greatest(I a) {
  I8 l = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7);
  I8 h = __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
  I8 e = l > h ? l : h;
  I4 p = __builtin_shufflevector(e, e, 0, 1, 2, 3), q = __builtin_shufflevector(e, e, 4, 5, 6, 7);
  I4 f = p > q ? p : q, g = __builtin_shufflevector(f, f, 2, 3, 0, 1);
  f = f > g ? f : g, g = __builtin_shufflevector(f, f, 1, 0, 3, 2);
  f = f > g ? f : g;
  return f[0];
}

inline int32_t sum(I a) {
  I8 e = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7) +
         __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
  I4 f = __builtin_shufflevector(e, e, 0, 1, 2, 3) + __builtin_shufflevector(e, e, 4, 5, 6, 7);
  f += __builtin_shufflevector(f, f, 2, 3, 0, 1);
  f += __builtin_shufflevector(f, f, 1, 0, 3, 2);
  return f[0];
}

// Between widths of integers; the compiler's own way takes halves.
inline U widened(H h) {
#if defined(__AVX512F__)
  return (U)_mm512_cvtepu16_epi32((__m256i)h);
#else
  return __builtin_convertvector(h, U);
#endif
}
inline H lower_half(U u) {
#if defined(__AVX512F__)
  return (H)_mm512_cvtepi32_epi16((__m512i)u);
#else
  return __builtin_convertvector(u, H);
#endif
}
// The low bytes of four vectors, in order; each number fits a signed byte.
inline U lower_bytes(const I (&i)[4]) {
#if defined(__AVX512BW__)
  const __m512i low = _mm512_packs_epi32((__m512i)i[0], (__m512i)i[1]);
  const __m512i high = _mm512_packs_epi32((__m512i)i[2], (__m512i)i[3]);
  const I in_order = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  return (U)_mm512_permutexvar_epi32((__m512i)in_order, _mm512_packs_epi16(low, high));
#else
  B bytes[4];
  for (int j = 0; j < 4; j++) bytes[j] = __builtin_convertvector(i[j], B);
  return load_as<U>(bytes);
#endif
}
// To the nearest integer, ties to even, of less than 2^22.
inline I nearest(V x) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtps_epi32((__m512)x);
#else
  const V magic = splat(12582912.0f);  // 1.5 * 2^23
  return (I)(x + magic) - (I)magic;
#endif
}

// 16 weights or cached values as floats; `n` < 16 reads no further and fills with zeros.
inline V widen(const float* p) { return load(p); }
inline V widen(const uint16_t* p) { return (V)(widened(load_as<H>(p)) << 16); }
inline V widen(const Half* p) {
#if defined(__AVX512F__)
  return (V)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__)
  union Halves { V v; __m256 h[2]; } x;
  for (int i = 0; i < 2; i++) x.h[i] = _mm256_cvtph_ps(load_as<__m128i>(p + 8 * i));
  return x.v;
#elif defined(__aarch64__)
  union Quarters { V v; float32x4_t q[4]; } x;
  for (int i = 0; i < 4; i++) x.q[i] = vcvt_f32_f16(load_as<float16x4_t>(p + 4 * i));
  return x.v;
#else
  V v;
  for (int i = 0; i < 16; i++) v[i] = float(p[i]);
  return v;
#endif
}
template <class T>
inline V widen_some(const T* p, int n) {
  if (n == 16) return widen(p);
  T some[16] = {};
  std::memcpy(some, p, size_t(n) * sizeof(T));
  return widen(some);
}

// bf16 by rounding to nearest, ties to even; a NaN stays one.
inline U to_bf16(V f) {
  const U u = (U)f;
  const U rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  return (u & 0x7FFFFFFF) > 0x7F800000 ? (u >> 16) | 64 : rounded;
}
inline void narrow(V f, float* out) { store(out, f); }
inline void narrow(V f, uint16_t* out) {
  const H h = lower_half(to_bf16(f));
  std::memcpy(out, &h, sizeof h);
}
template <class T>
inline void narrow_some(V f, T* out, int n) {
  if (n == 16) return narrow(f, out);
  T some[16];
  narrow(f, some);
  std::memcpy(out, some, size_t(n) * sizeof(T));
}

// e^x of -87 to 88, to about one unit in the last place, by range reduction to [-ln2/2, ln2/2] and a
// polynomial.
inline V exp_in_range(V x) {
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V whole = fma(x, splat(1.44269504088896341f), magic), n = whole - magic;
  V r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  V p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  const U e = ((U)whole << 23) + (127u << 23);  // the lowest bits of `whole` are n
  return p * (V)e;
}
inline V exp16(V x) { return exp_in_range(smaller(splat(88.0f), larger(splat(-87.0f), x))); }
inline V exp_of_negative(V x) { return exp_in_range(larger(splat(-87.0f), x)); }

// Denormals count as zero while it lives, as the bf16 product has it anyway, so that every
// instruction set agrees on them.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : old_(_mm_getcsr()) { _mm_setcsr(old_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(old_); }
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(old_));
    asm volatile("msr fpcr, %0" ::"r"(old_ | (1ul << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(old_)); }
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__x86_64__)
  unsigned old_;
#elif defined(__aarch64__)
  unsigned long old_;
#endif
};

}  // namespace
}  // namespace baton
