#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define BATON_JOIN2(a, b) a##b
#define BATON_JOIN(a, b) BATON_JOIN2(a, b)

namespace baton {
namespace {

// --- sixteen lanes -------------------------------------------------------------------------------

typedef float V __attribute__((vector_size(64)));
typedef float V8 __attribute__((vector_size(32)));
typedef float V4 __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));

inline V splat(float a) { return V{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a}; }

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }

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

// 16 weights or cached values as floats; `n` < 16 reads no further and fills with zeros.
inline V widen(const float* p) { return load(p); }
inline V widen(const uint16_t* p) {
  H h;
  std::memcpy(&h, p, sizeof h);
  return (V)(__builtin_convertvector(h, U) << 16);
}
inline V widen(const _Float16* p) {
  V v;
  for (int i = 0; i < 16; i++) v[i] = float(p[i]);
  return v;
}
template <class T>
inline V widen_some(const T* p, int n) {
  T some[16] = {};
  std::memcpy(some, p, size_t(n) * sizeof(T));
  return widen(some);
}

inline uint16_t to_bf16(float f) {  // round to nearest, ties to even
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7FFFFFFF) > 0x7F800000) return uint16_t((u >> 16) | 64);
  return uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}
inline void narrow(float f, float* out) { *out = f; }
inline void narrow(float f, uint16_t* out) { *out = to_bf16(f); }

// e^x to about one unit in the last place, by range reduction to [-ln2/2, ln2/2] and a polynomial.
inline V exp16(V x) {
  const V low = splat(-87.0f), high = splat(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  V n = fma(x, splat(1.44269504088896341f), magic) - magic;
  V r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  V p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  I e = (__builtin_convertvector(n, I) + 127) << 23;
  return p * (V)e;
}

// --- matrix product ------------------------------------------------------------------------------

// y[m][n] = sum over k of x[m][k] * w[n][k]; lane j sums k = j, j+16, ... in ascending order, so the
// order of one element's sum is the same for every tile size.
template <int M, int N, class T>
inline void tile(const float* x, int ldx, const T* w, int cols, float* y, int ldy) {
  V acc[M][N] = {};
  int k = 0;
  for (; k + 16 <= cols; k += 16) {
    V b[N];
    for (int n = 0; n < N; n++) b[n] = widen(w + size_t(n) * cols + k);
    for (int m = 0; m < M; m++) {
      V a = load(x + size_t(m) * ldx + k);
      for (int n = 0; n < N; n++) acc[m][n] = fma(a, b[n], acc[m][n]);
    }
  }
  if (k < cols) {
    for (int n = 0; n < N; n++) {
      V b = widen_some(w + size_t(n) * cols + k, cols - k);
      for (int m = 0; m < M; m++) acc[m][n] = fma(load(x + size_t(m) * ldx + k), b, acc[m][n]);
    }
  }
  for (int m = 0; m < M; m++) {
    if constexpr (N == 4) {
      const V4 sums = reduce4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
      std::memcpy(y + size_t(m) * ldy, &sums, sizeof sums);
    } else {
      for (int n = 0; n < N; n++) y[size_t(m) * ldy + n] = reduce(acc[m][n]);
    }
  }
}

template <int N, class T>
inline void panel(const float* x, int ldx, int rows, const T* w, int cols, float* y, int ldy) {
  int m = 0;
  for (; m + 4 <= rows; m += 4)
    tile<4, N>(x + size_t(m) * ldx, ldx, w, cols, y + size_t(m) * ldy, ldy);
  for (; m + 2 <= rows; m += 2)
    tile<2, N>(x + size_t(m) * ldx, ldx, w, cols, y + size_t(m) * ldy, ldy);
  for (; m < rows; m++) tile<1, N>(x + size_t(m) * ldx, ldx, w, cols, y + size_t(m) * ldy, ldy);
}

constexpr int kRowBlock = 64;  // rows of x that stay in the second-level cache

template <class T>
void product_of(const float* x, int ldx, int rows, const T* w, int outputs, int cols, float* y,
                int ldy) {
  for (int m = 0; m < rows; m += kRowBlock) {
    const int count = std::min(kRowBlock, rows - m);
    const float* xm = x + size_t(m) * ldx;
    float* ym = y + size_t(m) * ldy;
    int n = 0;
    for (; n + 4 <= outputs; n += 4)
      panel<4>(xm, ldx, count, w + size_t(n) * cols, cols, ym + n, ldy);
    for (; n < outputs; n++) panel<1>(xm, ldx, count, w + size_t(n) * cols, cols, ym + n, ldy);
  }
}

void product(const float* x, int ldx, int rows, const Matrix& w, const std::vector<float>& bias,
             float* y, int ldy) {
  switch (w.dtype) {
    case Dtype::kF32:
      product_of(x, ldx, rows, static_cast<const float*>(w.data), w.rows, w.cols, y, ldy);
      break;
    case Dtype::kBF16:
      product_of(x, ldx, rows, static_cast<const uint16_t*>(w.data), w.rows, w.cols, y, ldy);
      break;
    case Dtype::kF16:
      product_of(x, ldx, rows, static_cast<const _Float16*>(w.data), w.rows, w.cols, y, ldy);
      break;
  }
  if (bias.empty()) return;
  for (int m = 0; m < rows; m++)
    for (int n = 0; n < w.rows; n++) y[size_t(m) * ldy + n] += bias[n];
}

// --- elementwise ---------------------------------------------------------------------------------

// x / rms(x) * weight over `n` values; both arrays may be the same.
void rms_norm(const float* x, const float* weight, int n, float eps, float* y) {
  V sum = {};
  int i = 0;
  for (; i + 16 <= n; i += 16) sum = fma(load(x + i), load(x + i), sum);
  if (i < n) {
    V rest = widen_some(x + i, n - i);
    sum = fma(rest, rest, sum);
  }
  const float scale = 1.0f / std::sqrt(reduce(sum) / float(n) + eps);
  for (i = 0; i < n; i++) y[i] = (x[i] * scale) * weight[i];
}

// Rotates pairs (i, i + D/2), the "rotate half" convention of Hugging Face checkpoints.
void rotate(float* head, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; i++) {
    const float a = head[i], b = head[i + half];
    head[i] = __builtin_fmaf(a, cos[i], -(b * sin[i]));
    head[i + half] = __builtin_fmaf(b, cos[i], a * sin[i]);
  }
}

void silu_times(float* gate, const float* up, int n) {
  for (int i = 0; i < n; i += 16) {
    V g = load(gate + i);
    store(gate + i, g / (splat(1.0f) + exp16(-g)) * load(up + i));
  }
}

void add(float* x, const float* y, int n) {
  for (int i = 0; i < n; i++) x[i] += y[i];
}

// --- attention over pages ------------------------------------------------------------------------

template <class T>
struct Head {  // one KV head of one layer in one page
  const T* k;
  const T* v;
};

// Scores of one query against tokens [first, last) of a page; the others stay at minus infinity.
template <class T>
inline void page_scores(const float* q, const T* k, int dim, int first, int last, float scale,
                        float* scores) {
  for (int t = 0; t < kPageTokens; t++) scores[t] = -INFINITY;
  auto dot = [&](int t) {
    const T* row = k + size_t(t) * dim;
    V acc = {};
    int d = 0;
    for (; d + 16 <= dim; d += 16) acc = fma(load(q + d), widen(row + d), acc);
    if (d < dim) acc = fma(load(q + d), widen_some(row + d, dim - d), acc);
    return acc;
  };
  int t = first;
  for (; t + 4 <= last; t += 4) {
    const V4 four = reduce4(dot(t), dot(t + 1), dot(t + 2), dot(t + 3)) * V4{scale, scale, scale, scale};
    std::memcpy(scores + t, &four, sizeof four);
  }
  for (; t < last; t++) scores[t] = reduce(dot(t)) * scale;
}

struct Softmax {  // running maximum and sum over the pages so far
  float top = -INFINITY, sum = 0;
};

// out = out * keep + sum over t of weights[t] * v[t], for 16 * N neighbouring channels.
template <int N, class T>
inline void weigh(const float* weights, const T* v, int dim, int first, int last, float keep,
                  float* out) {
  V acc[N];
  for (int i = 0; i < N; i++) acc[i] = load(out + 16 * i) * splat(keep);
  for (int t = first; t < last; t++) {
    const V weight = splat(weights[t]);
    for (int i = 0; i < N; i++) acc[i] = fma(weight, widen(v + size_t(t) * dim + 16 * i), acc[i]);
  }
  for (int i = 0; i < N; i++) store(out + 16 * i, acc[i]);
}

// Folds one page into the running softmax and the output, tokens in ascending order.
template <class T>
inline void fold_page(Softmax& s, const float* scores, const T* v, int dim, int first, int last,
                      float* out) {
  float top = s.top;
  for (int t = first; t < last; t++) top = std::max(top, scores[t]);
  V p[4];
  for (int i = 0; i < 4; i++) {
    V score = load(scores + 16 * i);
    V weight = exp16(score - splat(top));
    p[i] = score == splat(-INFINITY) ? V{} : weight;
  }
  const float keep = s.sum == 0 ? 0.0f : exp16(splat(s.top - top))[0];
  s.sum = __builtin_fmaf(s.sum, keep, reduce((p[0] + p[1]) + (p[2] + p[3])));
  s.top = top;
  float weights[kPageTokens];
  for (int i = 0; i < 4; i++) store(weights + 16 * i, p[i]);
  int d = 0;
  for (; d + 64 <= dim; d += 64) weigh<4>(weights, v + d, dim, first, last, keep, out + d);
  for (; d + 16 <= dim; d += 16) weigh<1>(weights, v + d, dim, first, last, keep, out + d);
  if (d == dim) return;
  V acc = load(out + d) * splat(keep);
  for (int t = first; t < last; t++)
    acc = fma(splat(weights[t]), widen_some(v + size_t(t) * dim + d, dim - d), acc);
  store(out + d, acc);
}

template <class T>
inline Head<T> head_in(const Pages& pages, uint32_t page, int layer_in_group, int head) {
  const Geometry& g = pages.geometry();
  const unsigned char* at =
      pages.payload(page) + (size_t(layer_in_group) * 2 * g.kv_heads + head) * g.head_bytes();
  return {reinterpret_cast<const T*>(at),
          reinterpret_cast<const T*>(at + size_t(g.kv_heads) * g.head_bytes())};
}

template <class T>
void write_row(const Model& model, const Pages& pages, const Pass& pass, int r, int group,
               int layer_in_group) {
  const int position = pass.positions[r], dim = model.head_dim;
  const uint32_t page = pass.tables[(size_t(pass.sequence[r]) * pass.blocks + position / kPageTokens) *
                                        pass.groups + group];
  const size_t row = size_t(position % kPageTokens) * dim;
  const int ld = padded(model.kv_heads * dim);
  for (int h = 0; h < model.kv_heads; h++) {
    Head<T> head = head_in<T>(pages, page, layer_in_group, h);
    T* k = const_cast<T*>(head.k) + row;
    T* v = const_cast<T*>(head.v) + row;
    const float* from_k = pass.k.data() + size_t(r) * ld + h * dim;
    const float* from_v = pass.v.data() + size_t(r) * ld + h * dim;
    for (int d = 0; d < dim; d++) narrow(from_k[d], k + d);
    for (int d = 0; d < dim; d++) narrow(from_v[d], v + d);
  }
}

template <class T>
void attend_row(const Model& model, const Pages& pages, Pass& pass, int r, int group,
                int layer_in_group, int window) {
  const int dim = model.head_dim, wide = padded(dim), repeat = model.heads / model.kv_heads;
  const int end = pass.positions[r] + 1, begin = window > 0 ? std::max(0, end - window) : 0;
  const uint32_t* table = pass.tables + size_t(pass.sequence[r]) * pass.blocks * pass.groups;
  const float scale = 1.0f / std::sqrt(float(dim));
  const int ld = padded(model.heads * dim);
  alignas(64) float q[1024], out[1024], scores[kPageTokens];
  for (int h = 0; h < model.kv_heads; h++) {
    for (int n = 0; n < repeat; n++) {
      std::memset(q, 0, size_t(wide) * sizeof(float));
      std::memset(out, 0, size_t(wide) * sizeof(float));
      float* row = pass.q.data() + size_t(r) * ld + (h * repeat + n) * dim;
      std::memcpy(q, row, size_t(dim) * sizeof(float));
      Softmax softmax;
      for (int block = begin / kPageTokens; block * kPageTokens < end; block++) {
        const int base = block * kPageTokens;
        const int first = std::max(0, begin - base), last = std::min(kPageTokens, end - base);
        Head<T> head = head_in<T>(pages, table[size_t(block) * pass.groups + group], layer_in_group, h);
        page_scores(q, head.k, dim, first, last, scale, scores);
        fold_page(softmax, scores, head.v, dim, first, last, out);
      }
      float* to = pass.attended.data() + size_t(r) * ld + (h * repeat + n) * dim;
      for (int d = 0; d < dim; d++) to[d] = out[d] / softmax.sum;
    }
  }
}

// --- the pass ------------------------------------------------------------------------------------

void norm_rows(const Model& m, Pass& pass, const std::vector<float>& weight) {
  const int ld = padded(m.hidden);
  for (int r = 0; r < pass.rows; r++)
    rms_norm(&pass.x[size_t(r) * ld], weight.data(), m.hidden, m.eps, &pass.normed[size_t(r) * ld]);
}

void rotate_heads(const Model& m, float* rows, int heads, const std::vector<float>& norm,
                  const Pass& pass) {
  const int ld = padded(heads * m.head_dim), half = m.head_dim / 2;
  for (int r = 0; r < pass.rows; r++) {
    const size_t at = size_t(pass.positions[r]) * half;
    for (int h = 0; h < heads; h++) {
      float* head = rows + size_t(r) * ld + h * m.head_dim;
      if (!norm.empty()) rms_norm(head, norm.data(), m.head_dim, m.eps, head);
      rotate(head, m.cos + at, m.sin + at, half);
    }
  }
}

template <class T>
void attention(const Model& m, const Pages& pages, Pass& pass, const Layer& layer, int group,
               int layer_in_group) {
  const int ld = padded(m.hidden), ldq = padded(m.heads * m.head_dim);
  const int ldkv = padded(m.kv_heads * m.head_dim);
  norm_rows(m, pass, layer.attention_norm);
  product(pass.normed.data(), ld, pass.rows, layer.q, layer.q_bias, pass.q.data(), ldq);
  product(pass.normed.data(), ld, pass.rows, layer.k, layer.k_bias, pass.k.data(), ldkv);
  product(pass.normed.data(), ld, pass.rows, layer.v, layer.v_bias, pass.v.data(), ldkv);
  rotate_heads(m, pass.q.data(), m.heads, layer.q_norm, pass);
  rotate_heads(m, pass.k.data(), m.kv_heads, layer.k_norm, pass);
  for (int r = 0; r < pass.rows; r++) write_row<T>(m, pages, pass, r, group, layer_in_group);
  for (int r = 0; r < pass.rows; r++)
    attend_row<T>(m, pages, pass, r, group, layer_in_group, layer.window);
  product(pass.attended.data(), ldq, pass.rows, layer.o, layer.o_bias, pass.projected.data(), ld);
  for (int r = 0; r < pass.rows; r++)
    add(&pass.x[size_t(r) * ld], &pass.projected[size_t(r) * ld], m.hidden);
}

void mlp(const Model& m, Pass& pass, const Layer& layer) {
  const int ld = padded(m.hidden), ldi = padded(m.intermediate);
  norm_rows(m, pass, layer.mlp_norm);
  product(pass.normed.data(), ld, pass.rows, layer.gate, layer.gate_bias, pass.gate.data(), ldi);
  product(pass.normed.data(), ld, pass.rows, layer.up, layer.up_bias, pass.up.data(), ldi);
  for (int r = 0; r < pass.rows; r++)
    silu_times(&pass.gate[size_t(r) * ldi], &pass.up[size_t(r) * ldi], m.intermediate);
  product(pass.gate.data(), ldi, pass.rows, layer.down, layer.down_bias, pass.projected.data(), ld);
  for (int r = 0; r < pass.rows; r++)
    add(&pass.x[size_t(r) * ld], &pass.projected[size_t(r) * ld], m.hidden);
}

template <class T>
void embed_row(const T* table, int token, int hidden, float* x) {
  const T* row = table + size_t(token) * hidden;
  for (int i = 0; i < hidden; i += 16) {
    const int n = std::min(16, hidden - i);
    store(x + i, n == 16 ? widen(row + i) : widen_some(row + i, n));
  }
}

void embed(const Model& m, Pass& pass) {
  const int ld = padded(m.hidden);
  for (int r = 0; r < pass.rows; r++) {
    float* x = &pass.x[size_t(r) * ld];
    const int token = pass.tokens[r];
    switch (m.embed.dtype) {
      case Dtype::kF32: embed_row(static_cast<const float*>(m.embed.data), token, m.hidden, x); break;
      case Dtype::kBF16: embed_row(static_cast<const uint16_t*>(m.embed.data), token, m.hidden, x); break;
      case Dtype::kF16: embed_row(static_cast<const _Float16*>(m.embed.data), token, m.hidden, x); break;
    }
  }
}

void run_group(const Model& m, const Pages& pages, Pass& pass, int group) {
  const Geometry& g = pages.geometry();
  for (int i = 0; i < g.layers_in(group); i++) {
    const Layer& layer = m.layer[size_t(group) * g.layers_per_group + i];
    if (m.kv_bf16)
      attention<uint16_t>(m, pages, pass, layer, group, i);
    else
      attention<float>(m, pages, pass, layer, group, i);
    mlp(m, pass, layer);
  }
}

void logits(const Model& m, Pass& pass, const int32_t* which, int count, float* out) {
  static const std::vector<float> none;
  const int ld = padded(m.hidden);
  for (int i = 0; i < count; i++)
    rms_norm(&pass.x[size_t(which[i]) * ld], m.final_norm.data(), m.hidden, m.eps,
             &pass.normed[size_t(i) * ld]);
  product(pass.normed.data(), ld, count, m.head, none, out, m.vocab);
}

const Kernels table = {embed, run_group, logits};

}  // namespace

const Kernels* BATON_JOIN(kernels_, BATON_LEVEL)() { return &table; }

}  // namespace baton
