// Attention over pages, every row the same bits in whatever company.
//
// A query row folds its pages in ascending order with a running softmax, eight pages (a span) at a
// time; spans are merged in ascending order. Spans lie at fixed positions, so threads may share a long
// context, and a prefill tile or a decode row comes to the same result.
//
// One page of one KV head, turned so that lanes are tokens for the scores and channels for the sum:
//
//   keys   [unit of channels][64 tokens]     a unit: 32 bits of K, one float or two bf16
//   values [unit of tokens][channels]        a unit: one float, or two tokens' bf16
//
// All query rows of a tile share them. With bf16 pages queries and weights are rounded to bf16.
#pragma once

#include "lanes.h"
#include "model.h"

namespace baton {
namespace {

#if defined(__AVX512F__)
constexpr int kTogether = 4;  // query rows whose sums fit the registers
#else
constexpr int kTogether = 1;
#endif
constexpr int kQueriesMax = 64;
constexpr int kSpanPages = 8;
constexpr int kSpanTokens = kSpanPages * kPageTokens;

template <class T>
constexpr int kUnit = int(4 / sizeof(T));  // cached values in 32 bits

template <class T>
inline V dot(V acc, U a, U b) {
  if constexpr (sizeof(T) == 2) return dot_bf16(acc, a, b);
  return fma((V)a, (V)b, acc);
}

template <class T>
struct Head {  // one KV head of one layer in one page, [64][dim]
  T* k;
  T* v;
};

template <class T>
inline Head<T> head_in(const Pages& pages, uint32_t page, int layer_in_group, int head) {
  const Geometry& g = pages.geometry();
  unsigned char* at =
      pages.payload(page) + (size_t(layer_in_group) * 2 * g.kv_heads + head) * g.head_bytes();
  return {reinterpret_cast<T*>(at),
          reinterpret_cast<T*>(at + size_t(g.kv_heads) * g.head_bytes())};
}

// --- turning a page ------------------------------------------------------------------------------

// out[c * stride + r] = in[r][c] for 16 x 16 units.
inline void transpose(const U (&in)[16], uint32_t* out, int stride) {
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
    _mm512_storeu_si512(out + size_t(i) * stride, _mm512_shuffle_i32x4(p, q, 0x88));
    _mm512_storeu_si512(out + size_t(8 + i) * stride, _mm512_shuffle_i32x4(p, q, 0xDD));
    _mm512_storeu_si512(out + size_t(4 + i) * stride, _mm512_shuffle_i32x4(r, s, 0x88));
    _mm512_storeu_si512(out + size_t(12 + i) * stride, _mm512_shuffle_i32x4(r, s, 0xDD));
  }
#else
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < 16; c++) out[size_t(c) * stride + r] = in[r][c];
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
      U block[16];
      const uint32_t* at = rows + size_t(t) * units + u;
      BATON_EACH (int r = 0; r < 16; r++) block[r] = some_units(at + size_t(r) * units, units - u);
      transpose(block, keys + size_t(u) * kPageTokens + t, kPageTokens);
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
  const char *ask[2] = {};  // the next page's K and V, asked for a few lines at a time
  size_t ask_lines = 0, ask_step = 0;

  // So many rows are about to be folded: asks for all of both on the way.
  void ask_for(const void* k, const void* v, size_t bytes, int rows) {
    ask[0] = static_cast<const char*>(k), ask[1] = static_cast<const char*>(v);
    ask_lines = bytes / 64;
    const size_t times = size_t(rows + kTogether - 1) / kTogether * size_t(units);
    ask_step = (ask_lines + times - 1) / times;
  }
  void ask_some() {
    if (!ask_lines) return;
    for (size_t i = 0; i < ask_step; i++, ask[0] += 64, ask[1] += 64)
      __builtin_prefetch(ask[0]), __builtin_prefetch(ask[1]);
    ask_lines -= ask_step < ask_lines ? ask_step : ask_lines;
  }

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
    const U b = to_bf16(p[i]);
    const H h = lower_half(b);
    std::memcpy(weights + 16 * i, &h, sizeof h);
    rounded[i] = (V)(b << 16);
  }
}

// Scores to weights: the running maximum moves, what was summed before is kept by the factor returned.
template <class T>
inline float soften(Queries& s, int row, V (&score)[4], float scale, T* weights) {
  const I first = splat(s.first[row]), last = splat(s.last[row]);
  V most = splat(-INFINITY);
  BATON_EACH (int i = 0; i < 4; i++) {
    const I token = lane_numbers() + 16 * i;
    const I seen = (token >= first) & (token < last);
    score[i] = seen ? score[i] * splat(scale) : splat(-INFINITY);
    most = score[i] > most ? score[i] : most;
  }
  const float before = s.top[row], here = greatest(most), top = here > before ? here : before;
  V p[4], rounded[4];
  BATON_EACH (int i = 0; i < 4; i++) {
    const V weight = exp16(score[i] - splat(top));
    p[i] = score[i] == splat(-INFINITY) ? V{} : weight;
  }
  put_weights(p, weights, rounded);
  const float keep = s.sum[row] == 0 ? 0.0f : keep_of(before, top)[0];
  s.sum[row] = __builtin_fmaf(s.sum[row], keep, reduce((rounded[0] + rounded[1]) + (rounded[2] + rounded[3])));
  s.top[row] = top;
  return keep;
}

// out = out * keep + weights * values for N * 16 neighbouring channels of M rows.
template <class T, int M, int N>
__attribute__((noinline)) void weigh(Queries& s, int row, int d, int begin, int end, const T (*weights)[kPageTokens],
                  const float* keep) {
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

// Folds the page at hand into M query rows. Each sees at least one of its tokens.
template <class T, int M>
__attribute__((noinline)) void fold(Queries& s, int row, float scale) {
  V score[M][4] = {};
  for (int u = 0; u < s.units; u++) {
    s.ask_some();
    U key[4];
    BATON_EACH (int i = 0; i < 4; i++) key[i] = load_as<U>(s.keys + size_t(u) * kPageTokens + 16 * i);
    BATON_EACH (int m = 0; m < M; m++) {
      const U q = splat_at(s.q + size_t(row + m) * s.wide + u);
      BATON_EACH (int i = 0; i < 4; i++) score[m][i] = dot<T>(score[m][i], key[i], q);
    }
  }
  alignas(64) T weights[M][kPageTokens];
  float keep[M];
  int begin = kPageTokens, end = 0;
  BATON_EACH (int m = 0; m < M; m++) {
    keep[m] = soften(s, row + m, score[m], scale, weights[m]);
    begin = s.first[row + m] < begin ? s.first[row + m] : begin;
    end = s.last[row + m] > end ? s.last[row + m] : end;
  }
  begin /= kUnit<T>, end = (end + kUnit<T> - 1) / kUnit<T>;
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

// (total, its maximum and sum) with the span at hand behind it.
inline void merge(const float* out, float top, float sum, int wide, bool is_first, float* total,
                  float* total_top, float* total_sum) {
  if (is_first) {
    std::memcpy(total, out, size_t(wide) * 4);
    *total_top = top, *total_sum = sum;
    return;
  }
  const float most = top > *total_top ? top : *total_top;
  const V before = keep_of(*total_top, most), here = keep_of(top, most);
  for (int d = 0; d < wide; d += 16)
    store(total + d, fma(load(total + d), before, load(out + d) * here));
  *total_sum = __builtin_fmaf(*total_sum, before[0], sum * here[0]);
  *total_top = most;
}

// Writes one finished row of a head; adding zero leaves no negative one.
inline void finish(const float* total, float sum, int dim, float* to) {
  for (int d = 0; d < dim; d++) to[d] = total[d] / sum + 0.0f;
}

// --- a tile --------------------------------------------------------------------------------------

// The first span that a row at `position` sees, and how many there are.
inline int first_span(int position, int window) {
  const int first = position + 1 - window;
  return window > 0 && first > 0 ? first / kSpanTokens : 0;
}
inline int span_count(int position, int window) {
  return position / kSpanTokens - first_span(position, window) + 1;
}

// What one attention item is about: a tile's rows, all query heads of one KV head.
struct Seen {
  const Model& m;
  const Pages& pages;
  const Pass& pass;
  const Tile& tile;
  int group, layer_in_group, head, window;

  int repeat() const { return m.heads / m.kv_heads; }
  int end(int token) const { return pass.positions[tile.row + token] + 1; }
  int begin(int token) const {
    const int first = end(token) - window;
    return window > 0 && first > 0 ? first : 0;
  }
  uint32_t page(int block) const {
    return pass.tables[(size_t(pass.sequence[tile.row]) * pass.blocks + block) * pass.groups + group];
  }
};

template <class T>
void load_queries(Queries& s, const Seen& seen) {
  const Model& m = seen.m;
  const int ld = padded(m.heads * m.head_dim);
  for (int i = 0; i < seen.tile.count; i++) {
    for (int n = 0; n < seen.repeat(); n++) {
      const float* from = seen.pass.q.data() + size_t(seen.tile.row + i) * ld +
                          size_t(seen.head * seen.repeat() + n) * m.head_dim;
      T* to = reinterpret_cast<T*>(s.q + size_t(i * seen.repeat() + n) * s.wide);
      for (int d = 0; d < m.head_dim; d += 16) {
        const int some = m.head_dim - d < 16 ? m.head_dim - d : 16;
        narrow_some(widen_some(from + d, some), to + d, some);
      }
    }
  }
}

// Folds the pages of one span into every query row of the tile that sees any of it.
template <class T>
void fold_span(Queries& s, const Seen& seen, int span, float scale) {
  const int rows = seen.tile.count * seen.repeat(), dim = seen.m.head_dim;
  const int until = seen.end(seen.tile.count - 1);
  std::memset(s.out, 0, size_t(rows) * s.wide * 4);
  for (int r = 0; r < rows; r++) s.top[r] = -INFINITY, s.sum[r] = 0;
  for (int block = span * kSpanPages; block < (span + 1) * kSpanPages; block++) {
    const int base = block * kPageTokens;
    int last = 0, low = rows, high = 0;
    for (int r = 0; r < rows; r++) {
      const int token = r / seen.repeat();
      const int first = seen.begin(token) - base, end = seen.end(token) - base;
      s.first[r] = first > 0 ? first : 0;
      s.last[r] = end < kPageTokens ? end : kPageTokens;
      if (s.first[r] >= s.last[r]) continue;
      low = r < low ? r : low, high = r + 1;
      last = s.last[r] > last ? s.last[r] : last;
    }
    if (low >= high) continue;
    const Head<T> head = head_in<T>(seen.pages, seen.page(block), seen.layer_in_group, seen.head);
    turn_keys(head.k, s.units, last, s.keys);
    turn_values(head.v, dim, s.wide, last, s.values);
    if (base + kPageTokens < until) {
      const uint32_t next = seen.page(block + 1);
      const Head<T> then = head_in<T>(seen.pages, next, seen.layer_in_group, seen.head);
      s.ask_for(then.k, then.v, size_t(dim) * sizeof(T) * kPageTokens, high - low);
    }
    for (int r = low; r < high; r += kTogether)  // rows that see the page lie side by side
      fold_some<T, kTogether>(s, r, high - r, scale);
  }
}

// A partial of a single row: [heads][spans] of {out[wide], top, sum, 14 floats of padding}.
inline size_t partial_at(const Tile& tile, int wide, int head, int span) {
  return size_t(tile.partials) + (size_t(head) * tile.spans + span) * size_t(wide + 16);
}

// One span of a single row; the partials are merged when all are there.
template <class T>
void attend_span(const Seen& seen, int span, void* room) {
  const int dim = seen.m.head_dim, wide = to_lanes(dim), repeat = seen.repeat();
  Queries s(room, dim / kUnit<T>, wide);
  load_queries<T>(s, seen);
  const int first = first_span(seen.pass.positions[seen.tile.row], seen.window);
  fold_span<T>(s, seen, first + span, 1.0f / std::sqrt(float(dim)));
  for (int n = 0; n < repeat; n++) {
    float* to = seen.pass.partials.data() + partial_at(seen.tile, wide, seen.head * repeat + n, span);
    std::memcpy(to, s.out + size_t(n) * wide, size_t(wide) * 4);
    to[wide] = s.top[n], to[wide + 1] = s.sum[n];
  }
}

// The single row of a tile, once its partials are there. They are used up.
inline void merge_spans(const Model& m, const Pass& pass, const Tile& tile, int window, float* to) {
  const int wide = to_lanes(m.head_dim), spans = span_count(pass.positions[tile.row], window);
  for (int head = 0; head < m.heads; head++) {
    float* total = pass.partials.data() + partial_at(tile, wide, head, 0);
    float top = total[wide], sum = total[wide + 1];
    for (int span = 1; span < spans; span++) {
      const float* next = pass.partials.data() + partial_at(tile, wide, head, span);
      merge(next, next[wide], next[wide + 1], wide, false, total, &top, &sum);
    }
    finish(total, sum, m.head_dim, to + size_t(head) * m.head_dim);
  }
}

// All rows of a tile, all query heads of one KV head.
template <class T>
void attend_tile(const Seen& seen, void* room) {
  const Model& m = seen.m;
  const int dim = m.head_dim, wide = to_lanes(dim), repeat = seen.repeat();
  const int rows = seen.tile.count * repeat, last = seen.end(seen.tile.count - 1);
  Queries s(room, dim / kUnit<T>, wide);
  load_queries<T>(s, seen);
  for (int r = 0; r < rows; r++) s.total_sum[r] = 0;
  for (int span = seen.begin(0) / kSpanTokens; span * kSpanTokens < last; span++) {
    fold_span<T>(s, seen, span, 1.0f / std::sqrt(float(dim)));
    for (int r = 0; r < rows; r++)
      if (s.sum[r] != 0)
        merge(s.out + size_t(r) * wide, s.top[r], s.sum[r], wide, s.total_sum[r] == 0,
              s.total + size_t(r) * wide, s.total_top + r, s.total_sum + r);
  }
  for (int r = 0; r < rows; r++) {
    float* to = seen.pass.attended.data() +
                size_t(seen.tile.row + r / repeat) * padded(m.heads * dim) +
                size_t(seen.head * repeat + r % repeat) * dim;
    finish(s.total + size_t(r) * wide, s.total_sum[r], dim, to);
  }
}

}  // namespace
}  // namespace baton
