#include "pass.h"

#include "attention.h"
#include "product.h"

#define BATON_JOIN2(a, b) a##b
#define BATON_JOIN(a, b) BATON_JOIN2(a, b)

namespace baton {
namespace {

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

template <class T>
void embed_row(const T* table, int token, int hidden, float* x) {
  const T* row = table + size_t(token) * hidden;
  for (int i = 0; i < hidden; i += 16) {
    const int n = hidden - i < 16 ? hidden - i : 16;
    narrow_some(n == 16 ? widen(row + i) : widen_some(row + i, n), x + i, n);
  }
}

// --- the pass, one member's share ------------------------------------------------------------------

// A product's results: y[row][n - from] = sum + bias, or added to what is there.
struct Output {
  const Matrix& w;
  const std::vector<float>& bias;
  float* y;
  int ld;
  bool add = false;
  int from = 0;

  // The same from this row on.
  Output below(int row) const { return {w, bias, y + size_t(row) * ld, ld, add, from}; }
};

// Cuts panels into runs. Those of a few rows are read as fast as memory gives: each member begins with
// a long one, so that it knows where it will read and jumps seldom, and short ones end together.
class Runs {
 public:
  Runs(int panels, int threads, int rows) : panels_(panels), threads_(threads) {
    if (!streams(rows)) return;
    first_ = panels * 3 / (threads * 4);
    const int left = panels - first_ * threads, aim = left / (threads * 4);
    if (first_ < 1) first_ = 1;
    each_ = aim < 1 ? 1 : aim < kLongest ? aim : kLongest;
  }
  static bool streams(int rows) { return rows <= 16; }

  int begin(int run) const {
    const int at = run < threads_ ? run * first_ : threads_ * first_ + (run - threads_) * each_;
    return at < panels_ ? at : panels_;
  }
  int count() const {
    const int left = panels_ - begin(threads_);
    return threads_ + (left + each_ - 1) / each_;
  }

 private:
  static constexpr int kLongest = 8;  // of the short ones
  const int panels_, threads_;
  int first_ = 1, each_ = 1;
};

class Member {
 public:
  Member(const Job& job, int member)
      : job_(job), m_(job.model), pages_(job.pages), p_(job.pass), team_(job.team), member_(member),
        scratch_(job.pass.scratch[member].data()) {}

  void run() {
    if (job_.first_group == 0 && job_.last_group > 0) embed();
    for (int group = job_.first_group; group < job_.last_group; group++) {
      const Geometry& g = pages_.geometry();
      for (int i = 0; i < g.layers_in(group); i++) {
        const Layer* layer = &m_.layer[size_t(group) * g.layers_per_group + i];
        const bool is_last = group + 1 == job_.last_group && i + 1 == g.layers_in(group);
        if (m_.kv_bf16)
          attention<uint16_t>(*layer, group, i);
        else
          attention<float>(*layer, group, i);
        mlp(*layer, is_last ? nullptr : layer + 1);
      }
      if (job_.seeds && member_ == 0) stamp(group);
    }
    if (job_.count) logits();
  }

 private:
  // Calls `work` with the numbers below `count` that fall to this member; all meet behind it.
  template <class Work>
  void share(int count, const Work& work) {
    for (int i = member_; i < count; i = team_.take()) work(i);
    team_.barrier(&ahead_);
  }

  // What this member reads first in the product to come is asked for while memory has nothing to do:
  // here and there in small phases, and at barriers.
  template <size_t N>
  void look_ahead(const Matrix* const (&matrices)[N], int rows) {
    ahead_.clear();
    if (!Runs::streams(rows)) return;
    int panels = 0;
    for (const Matrix* w : matrices) panels += w->panels();
    const Runs runs(panels, team_.threads(), rows);
    int begin = runs.begin(member_), end = runs.begin(member_ + 1);
    for (const Matrix* w : matrices) {
      add_panels(*w, begin, end);
      begin -= w->panels(), end -= w->panels();
    }
  }
  // Those of the panels [begin, end) that there are.
  void add_panels(const Matrix& w, int begin, int end) {
    const int from = begin > 0 ? begin : 0, to = end < w.panels() ? end : w.panels();
    if (is_packed(w.format) && from < to)
      ahead_.add(static_cast<const char*>(w.data) + size_t(from) * w.panel_bytes(),
                 size_t(to - from) * w.panel_bytes());
  }

  Input input(const Room<float>& x, int width) const { return input(x, width, p_.codes); }
  Input input(const Room<float>& x, int width, const Codes& codes) const {
    return {x.data(), padded(width), codes.codes.data(), codes.scales.data(), codes.starts.data(),
            p_.code_stride, p_.group_stride};
  }

  void embed() {
    share(p_.rows, [&](int r) {
      float* x = p_.x.data() + size_t(r) * padded(m_.hidden);
      const int token = p_.tokens[r];
      switch (m_.embed.format) {
        case Format::kF32: return embed_row(static_cast<const float*>(m_.embed.data), token, m_.hidden, x);
        case Format::kF16: return embed_row(static_cast<const Half*>(m_.embed.data), token, m_.hidden, x);
        default: return embed_row(static_cast<const uint16_t*>(m_.embed.data), token, m_.hidden, x);
      }
    });
  }

  // normed[i] = norm of x[which[i]] (or of x[i]), ready for the product with `w`.
  void norm(const Matrix& w, const std::vector<float>& weight, const int32_t* which, int rows) {
    const int ld = padded(m_.hidden);
    const Input in = input(p_.normed, m_.hidden);
    share(rows, [&](int r) {
      const float* x = p_.x.data() + size_t(which ? which[r] : r) * ld;
      float* to = p_.normed.data() + size_t(r) * ld;
      ahead_.ask(kAskLines);
      rms_norm(x, weight.data(), m_.hidden, m_.eps, to);
      prepare(w, to, 0, m_.hidden, in, r);
    });
  }

  // All products of one input, part by part of the rows, so that members end together.
  template <size_t N>
  void products(const Output (&outputs)[N], const Input& in, int rows) {
    int panels = 0;
    for (const Output& output : outputs) panels += output.w.panels();
    const Runs runs(panels, team_.threads(), rows);
    const int parts = (rows + kPartRows - 1) / kPartRows;
    share(runs.count() * parts, [&](int item) {
      const int run = item / parts, row = item % parts * kPartRows;
      const int count = rows - row < kPartRows ? rows - row : kPartRows;
      int begin = runs.begin(run), end = runs.begin(run + 1);
      for (const Output& output : outputs) {
        multiply_panels(output.below(row), begin, end, in.from(row), count);
        begin -= output.w.panels(), end -= output.w.panels();
      }
    });
  }

  // Those of the panels [begin, end) that there are.
  void multiply_panels(const Output& output, int begin, int end, const Input& in, int rows) {
    const int to = end < output.w.panels() ? end : output.w.panels();
    for (int panel = begin > 0 ? begin : 0; panel < to; panel++) multiply(output, panel, in, rows);
  }

  void multiply(const Output& output, int panel, const Input& in, int rows) {
    const int first = panel * kPanelRows, left = output.w.rows - first;
    const int count = left < kPanelRows ? left : kPanelRows;
    const float* bias = output.bias.empty() ? nullptr : output.bias.data() + first;
    if (!bias && !output.add && count == kPanelRows)  // they are what y holds
      return panel_sums(output.w, panel, in, rows, {output.y + (first - output.from), output.ld});
    float* sums = reinterpret_cast<float*>(scratch_);
    panel_sums(output.w, panel, in, rows, {sums, kPanelRows});
    for (int n = 0; n < count; n += 16) {
      const int some = count - n < 16 ? count - n : 16;
      const V by = bias ? widen_some(bias + n, some) : V{};
      float* to = output.y + (first - output.from) + n;
      for (int r = 0; r < rows; r++, to += output.ld) {
        V sum = load(sums + size_t(r) * kPanelRows + n);
        if (bias) sum = sum + by;
        if (output.add) sum = widen_some(to, some) + sum;
        narrow_some(sum, to, some);
      }
    }
  }

  void rotate_heads(float* row, int heads, const std::vector<float>& norm, int position) {
    const int half = m_.head_dim / 2;
    const size_t at = size_t(position) * half;
    for (int h = 0; h < heads; h++) {
      float* head = row + h * m_.head_dim;
      if (!norm.empty()) rms_norm(head, norm.data(), m_.head_dim, m_.eps, head);
      rotate(head, m_.cos + at, m_.sin + at, half);
    }
  }

  template <class T>
  void write_row(int r, int group, int layer_in_group) {
    const int position = p_.positions[r], dim = m_.head_dim;
    const size_t block = size_t(p_.sequence[r]) * p_.blocks + position / kPageTokens;
    const uint32_t page = p_.tables[block * p_.groups + group];
    const size_t from = size_t(r) * padded(m_.kv_heads * dim);
    for (int h = 0; h < m_.kv_heads; h++) {
      const Head<T> head = head_in<T>(pages_, page, layer_in_group, h);
      T* k = head.k + size_t(position % kPageTokens) * dim;
      T* v = head.v + size_t(position % kPageTokens) * dim;
      for (int d = 0; d < dim; d += 16) {
        const int n = dim - d < 16 ? dim - d : 16;
        narrow_some(widen_some(p_.k.data() + from + h * dim + d, n), k + d, n);
        narrow_some(widen_some(p_.v.data() + from + h * dim + d, n), v + d, n);
      }
    }
  }

  template <class T>
  void attention(const Layer& layer, int group, int layer_in_group) {
    const int ldq = padded(m_.heads * m_.head_dim), ldkv = padded(m_.kv_heads * m_.head_dim);
    norm(layer.q, layer.attention_norm, nullptr, p_.rows);
    look_ahead_at_pages<T>(layer, group, layer_in_group);
    products<3>({{layer.q, layer.q_bias, p_.q.data(), ldq},
                 {layer.k, layer.k_bias, p_.k.data(), ldkv},
                 {layer.v, layer.v_bias, p_.v.data(), ldkv}},
                input(p_.normed, m_.hidden), p_.rows);
    share(p_.rows, [&](int r) {
      ahead_.ask(kAskLines);
      rotate_heads(p_.q.data() + size_t(r) * ldq, m_.heads, layer.q_norm, p_.positions[r]);
      rotate_heads(p_.k.data() + size_t(r) * ldkv, m_.kv_heads, layer.k_norm, p_.positions[r]);
      write_row<T>(r, group, layer_in_group);
    });
    look_ahead({&layer.o}, p_.rows);
    attend<T>(layer, group, layer_in_group);
    share(p_.rows, [&](int r) {
      float* row = p_.attended.data() + size_t(r) * ldq;
      const Tile& tile = p_.tile.data()[p_.tile_of.data()[r]];
      ahead_.ask(kAskLines);
      if (tile.partials >= 0) merge_spans(m_, p_, tile, layer.window, row);
      prepare(layer.o, row, 0, m_.heads * m_.head_dim, input(p_.attended, m_.heads * m_.head_dim), r);
    });
    look_ahead_at_gated(layer);
    products<1>({{layer.o, layer.o_bias, p_.x.data(), padded(m_.hidden), true}},
                input(p_.attended, m_.heads * m_.head_dim), p_.rows);
  }

  // Items: tile by tile, in each the KV heads, and the spans of a single row.
  template <class T>
  void attend(const Layer& layer, int group, int layer_in_group) {
    int tile = 0, before = 0;  // where the last item was: numbers only rise
    int items = 0;
    for (int i = 0; i < p_.tiles; i++) items += items_of(p_.tile.data()[i]);
    auto find = [&](int item, int& tile, int& before) {
      while (item - before >= items_of(p_.tile.data()[tile]))
        before += items_of(p_.tile.data()[tile++]);
      const int head = (item - before) % m_.kv_heads;
      return Seen{m_, pages_, p_, p_.tile.data()[tile], group, layer_in_group, head, layer.window};
    };
    share(items, [&](int item) {
      Seen seen = find(item, tile, before);
      const int span = (item - before) / m_.kv_heads;
      if (const int next = item + team_.threads(); next < items) {  // most likely this member's
        int at = tile, from = before;
        const Seen then = find(next, at, from);
        if (holds(then.tile, (next - from) / m_.kv_heads, layer.window))
          seen.keys_after = first_keys<T>(then, (next - from) / m_.kv_heads);
      }
      if (seen.tile.partials < 0) return attend_tile<T>(seen, scratch_);
      if (holds(seen.tile, span, layer.window)) attend_span<T>(seen, span, scratch_);
    });
  }

  // Whether the tile's rows see any of the span; a tile of several rows has one item for all of them.
  bool holds(const Tile& tile, int span, int window) const {
    return tile.partials < 0 || span < span_count(p_.positions[tile.row], window);
  }

  // The same for the pages that this member looks at first, if the first tile is a single row.
  template <class T>
  void look_ahead_at_pages(const Layer& layer, int group, int layer_in_group) {
    ahead_.clear();
    const Tile& tile = p_.tile.data()[0];
    const int head = member_ % m_.kv_heads, span = member_ / m_.kv_heads;
    if (tile.partials < 0 || !holds(tile, span, layer.window)) return;
    const Seen seen{m_, pages_, p_, tile, group, layer_in_group, head, layer.window};
    add_span<T>(seen, span, ahead_);
  }

  int items_of(const Tile& tile) const {
    return m_.kv_heads * (tile.partials < 0 ? 1 : tile.spans);
  }

  void mlp(const Layer& layer, const Layer* next) {
    norm(layer.gate, layer.mlp_norm, nullptr, p_.rows);
    look_ahead({&layer.down}, p_.rows);
    gated(layer);
    if (next)
      look_ahead({&next->q, &next->k, &next->v}, p_.rows);
    else if (job_.count)
      look_ahead({&m_.head}, job_.count);
    else
      ahead_.clear();
    products<1>({{layer.down, layer.down_bias, p_.x.data(), padded(m_.hidden), true}},
                input(p_.gate, m_.intermediate, p_.gated), p_.rows);
  }

  // Columns of gate and up that one member computes together: whole panels, and whole groups of down.
  static int unit(const Layer& layer) {
    return is_integer(layer.down.format) && layer.down.group > kPanelRows ? layer.down.group : kPanelRows;
  }
  Runs gated_runs(const Layer& layer) const {
    const int columns = unit(layer);
    return Runs((m_.intermediate + columns - 1) / columns, team_.threads(), p_.rows);
  }
  void look_ahead_at_gated(const Layer& layer) {
    ahead_.clear();
    if (!Runs::streams(p_.rows)) return;
    const Runs runs = gated_runs(layer);
    const int panels = unit(layer) / kPanelRows;
    const int begin = runs.begin(member_) * panels, end = runs.begin(member_ + 1) * panels;
    add_panels(layer.gate, begin, end);
    add_panels(layer.up, begin, end);
  }

  // gate = silu(gate) * up, ready for the product with down. Of many rows a unit's columns stay in the
  // member's own room, and only what down multiplies is written.
  void gated(const Layer& layer) {
    const Runs runs = gated_runs(layer);
    const int columns = unit(layer), panels = columns / kPanelRows;
    const Input in = input(p_.normed, m_.hidden), out = input(p_.gate, m_.intermediate, p_.gated);
    const bool own = !Runs::streams(p_.rows) && is_packed(layer.down.format);
    float* room = reinterpret_cast<float*>(scratch_) + size_t(p_.rows) * kPanelRows;
    share(runs.count(), [&](int run) {
      const int first = runs.begin(run) * panels, last = runs.begin(run + 1) * panels;
      const int begin = first * kPanelRows;
      const int end = last * kPanelRows < m_.intermediate ? last * kPanelRows : m_.intermediate;
      const int from = own ? begin : 0, ld = own ? columns : padded(m_.intermediate);
      float* gate = own ? room : p_.gate.data();
      float* up = own ? room + size_t(p_.rows) * columns : p_.up.data();
      if (own && end - begin < columns) std::memset(room, 0, size_t(p_.rows) * columns * 2 * sizeof(float));
      multiply_panels({layer.gate, layer.gate_bias, gate, ld, false, from}, first, last, in, p_.rows);
      multiply_panels({layer.up, layer.up_bias, up, ld, false, from}, first, last, in, p_.rows);
      const size_t at = size_t(begin - from);
      for (int r = 0; r < p_.rows; r += kAtAStretch) {
        const int until = r + kAtAStretch < p_.rows ? r + kAtAStretch : p_.rows;
        for (int i = r; i < until; i++)
          silu_times(gate + size_t(i) * ld + at, up + size_t(i) * ld + at, end - begin);
        for (int i = r; i < until; i++)
          prepare(layer.down, gate + size_t(i) * ld + at, begin, end, out, i);
      }
    });
  }

  void logits() {
    static const std::vector<float> none;
    norm(m_.head, m_.final_norm, job_.which, job_.count);
    products<1>({{m_.head, none, job_.logits, m_.vocab}}, input(p_.normed, m_.hidden), job_.count);
  }

  void stamp(int group) {
    for (int r = 0; r < p_.rows; r++) {
      const int32_t in_page = p_.positions[r] % kPageTokens;
      const size_t block = size_t(p_.sequence[r]) * p_.blocks + p_.positions[r] / kPageTokens;
      pages_.stamp_rows({p_.tables + block * p_.groups + group, &in_page, job_.seeds + r, 1}, group);
    }
  }

  static constexpr int kPartRows = 128;  // at most, of one item of a product
  static constexpr int kAtAStretch = 16;  // rows, so that many are under way together
  static constexpr int kAskLines = 128;  // before an item of a small phase

  const Job& job_;
  const Model& m_;
  const Pages& pages_;
  Pass& p_;
  Team& team_;
  const int member_;
  unsigned char* scratch_;
  Ahead ahead_;
};

void run(const Job& job, int member) {
  FlushDenormals flush;
  Member(job, member).run();
}

size_t scratch_bytes(const Model& m, int rows) {
  const size_t columns = kPanelRows + 2 * kGroupMax;  // a panel's sums, and a unit of gate and up
  const size_t sums = size_t(rows) * columns * sizeof(float), queries = Queries::bytes(m.head_dim);
  return sums > queries ? sums : queries;
}

void read(const Model& m, Team& team, int member) {
  auto pass_over = [&](const Matrix& w) {
    const unsigned char* data = static_cast<const unsigned char*>(w.data);
    const size_t bytes = w.bytes(), items = size_t(team.threads()) * 8;
    const size_t run = (bytes / items + 63) / 64 * 64 + 64;
    for (size_t i = size_t(member); i < items; i = size_t(team.take())) {
      const size_t begin = i * run < bytes ? i * run : bytes;
      const size_t end = begin + run < bytes ? begin + run : bytes;
      U all[4] = {};
      for (size_t at = begin; at + 256 <= end; at += 256) {
        for (int j = 0; j < 4; j++) {
          __builtin_prefetch(data + at + 64 * j + kAheadNear, 0, 2);
          all[j] |= load_as<U>(data + at + 64 * j);
        }
      }
      asm volatile("" ::"m"(all));
    }
    team.barrier();
  };
  for (const Layer& l : m.layer)
    for (const Matrix* w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) pass_over(*w);
  pass_over(m.head);
}

// One product of x [rows][w.cols] by itself.
void product(const Matrix& w, const float* x, int rows, float* y) {
  FlushDenormals flush;
  const int ld = padded(w.cols), stride = ld * 2, groups = ld / 32;
  Room<float> padded_x, scales, sums;
  Room<int8_t> codes;
  Room<int32_t> starts;
  padded_x.reserve(size_t(rows) * ld), codes.reserve(size_t(rows) * stride);
  scales.reserve(size_t(rows) * groups), starts.reserve(size_t(rows) * groups);
  sums.reserve(size_t(rows) * kPanelRows);
  const Input in{padded_x.data(), ld, codes.data(), scales.data(), starts.data(), stride, groups};
  for (int r = 0; r < rows; r++) {
    float* row = padded_x.data() + size_t(r) * ld;
    std::memcpy(row, x + size_t(r) * w.cols, size_t(w.cols) * sizeof(float));
    prepare(w, row, 0, w.cols, in, r);
  }
  for (int panel = 0; panel < w.panels(); panel++) {
    panel_sums(w, panel, in, rows, {sums.data(), kPanelRows});
    const int first = panel * kPanelRows, left = w.rows - first;
    const int count = left < kPanelRows ? left : kPanelRows;
    for (int r = 0; r < rows; r++)
      std::memcpy(y + size_t(r) * w.rows + first, sums.data() + size_t(r) * kPanelRows,
                  size_t(count) * sizeof(float));
  }
}

const Kernels table = {run, read, product, scratch_bytes};

}  // namespace

const Kernels* BATON_JOIN(kernels_, BATON_LEVEL)() { return &table; }

}  // namespace baton
