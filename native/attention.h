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

#include "ahead.h"
#include "attention_few.h"

namespace baton {
namespace {

constexpr int kSpanPages = 8;
constexpr int kSpanTokens = kSpanPages * kPageTokens;

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
  const void* keys_after = nullptr;  // what the thread will read after these pages, if that is known

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

// Which memory is asked for while the page of `block` is folded. A few rows go over it once, `turns` is 0:
// its V and the next page's K lie half a page ahead of what is read. More rows turn it first.
template <class T>
void ask_ahead(Queries& s, const Seen& seen, int block, int turns) {
  const size_t bytes = size_t(seen.m.head_dim) * sizeof(T) * kPageTokens;
  auto head = [&](int at) {
    return head_in<T>(seen.pages, seen.page(at), seen.layer_in_group, seen.head);
  };
  s.ahead.clear();
  if (!turns) s.ahead.add(head(block).v, bytes);
  const bool is_last = (block + 1) * kPageTokens >= seen.end(seen.tile.count - 1) ||
                       (seen.tile.partials >= 0 && (block + 1) % kSpanPages == 0);
  if (is_last) {
    if (!turns && seen.keys_after) s.ahead.add(seen.keys_after, bytes);
    return;
  }
  s.ahead.add(head(block + 1).k, bytes);
  if (!turns) return;
  s.ahead.add(head(block + 1).v, bytes);
  const size_t lines = 2 * bytes / 64, times = 2 * size_t(turns);
  s.ask_lines = int((lines + times - 1) / times);
}

// Folds the pages of one span into every query row of the tile that sees any of it.
template <class T>
void fold_span(Queries& s, const Seen& seen, int span, float scale) {
  const int repeat = seen.repeat(), rows = seen.tile.count * repeat, dim = seen.m.head_dim;
  std::memset(s.out, 0, size_t(rows) * s.wide * 4);
  for (int r = 0; r < rows; r++) s.top[r] = -INFINITY, s.sum[r] = 0;
  for (int block = span * kSpanPages; block < (span + 1) * kSpanPages; block++) {
    const int base = block * kPageTokens;
    int last = 0, low = rows, high = 0;
    for (int token = 0, r = 0; token < seen.tile.count; token++, r += repeat) {
      const int first = seen.begin(token) - base, end = seen.end(token) - base;
      const int from = first > 0 ? first : 0, to = end < kPageTokens ? end : kPageTokens;
      for (int n = 0; n < repeat; n++) s.first[r + n] = from, s.last[r + n] = to;
      if (from >= to) continue;
      low = r < low ? r : low, high = r + repeat;
      last = to > last ? to : last;
    }
    if (low >= high) continue;
    const Head<T> head = head_in<T>(seen.pages, seen.page(block), seen.layer_in_group, seen.head);
    const bool few = are_few<T>(high - low);
    ask_ahead<T>(s, seen, block, few ? 0 : (high - low + kTogether - 1) / kTogether);
    if constexpr (sizeof(T) == 2) {
      if (few) {
        fold_few(s, low, high - low, head.k, head.v, dim, scale);
        continue;
      }
    }
    turn_keys(head.k, s.units, last, s.keys);
    turn_values(head.v, dim, s.wide, last, s.values);
    for (int r = low; r < high; r += kTogether)  // rows that see the page lie side by side
      fold_some<T, kTogether>(s, r, high - r, scale);
  }
}

// The keys that are read first: of a tile, or of one span of a single row.
template <class T>
const void* first_keys(const Seen& seen, int span) {
  const int from = seen.begin(0) / kPageTokens;
  const int block = (first_span(seen.end(0) - 1, seen.window) + span) * kSpanPages;
  return head_in<T>(seen.pages, seen.page(block > from ? block : from), seen.layer_in_group, seen.head).k;
}

// A partial of a single row: [heads][spans] of {out[wide], top, sum, 14 floats of padding}.
inline size_t partial_at(const Tile& tile, int wide, int head, int span) {
  return size_t(tile.partials) + (size_t(head) * tile.spans + span) * size_t(wide + 16);
}

// The pages of one span of a single row, as far as it sees them.
template <class T>
void add_span(const Seen& seen, int span, Ahead& ahead) {
  const size_t bytes = size_t(seen.m.head_dim) * sizeof(T) * kPageTokens;
  const int first = first_span(seen.end(0) - 1, seen.window) + span;
  for (int block = first * kSpanPages; block < (first + 1) * kSpanPages; block++) {
    if ((block + 1) * kPageTokens <= seen.begin(0) || block * kPageTokens >= seen.end(0)) continue;
    const Head<T> head = head_in<T>(seen.pages, seen.page(block), seen.layer_in_group, seen.head);
    ahead.add(head.k, bytes), ahead.add(head.v, bytes);
  }
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
