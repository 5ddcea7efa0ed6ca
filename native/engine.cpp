#include "engine.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace baton {
namespace {

constexpr int kTileQueries = 128;  // query rows of a tile, all heads of one KV head counted
constexpr int kSpan = 8 * kPageTokens;

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

int checked_threads(int threads) {
  require(threads >= 1 && threads <= kThreadsMax, "threads: 1 to 64");
  return threads;
}

}  // namespace

const Kernels* kernels_for(std::string& level) {
#if defined(__x86_64__)
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512cd");
  const bool vnni = v4 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (level.empty()) level = vnni ? "vnni" : v4 ? "v4" : v3 ? "v3" : "base";
  if (level == "vnni" && vnni) return kernels_vnni();
  if (level == "v4" && v4) return kernels_v4();
  if (level == "v3" && v3) return kernels_v3();
#elif defined(__aarch64__)
  const bool dotprod = getauxval(AT_HWCAP) & (1 << 20);  // HWCAP_ASIMDDP
  if (level.empty()) level = dotprod ? "dotprod" : "base";
  if (level == "dotprod" && dotprod) return kernels_dotprod();
#else
  if (level.empty()) level = "base";
#endif
  if (level == "base") return kernels_base();
  throw std::invalid_argument("level: this processor does not run '" + level + "' kernels");
}

Engine::Engine(Model model, const Pages& pages, const std::string& level, int threads,
               std::vector<int> cores)
    : model_(std::move(model)), pages_(pages), team_(checked_threads(threads), std::move(cores)),
      level_(level) {
  const Model& m = model_;
  kernels_ = kernels_for(level_);
  require(m.head_dim <= 1024 && m.head_dim % 2 == 0, "head_dim: even and at most 1024");
  require(m.heads % m.kv_heads == 0, "heads: a multiple of kv_heads");
  require(m.heads / m.kv_heads <= kTileQueries, "heads: at most 128 for each KV head");
  for (const Layer& l : m.layer) {
    require(l.q.format == l.k.format && l.q.format == l.v.format && l.q.group == l.k.group &&
                l.q.group == l.v.group, "weights: q, k and v differ in format or group");
    require(l.gate.format == l.up.format && l.gate.group == l.up.group,
            "weights: gate and up differ in format or group");
  }
  widest_ = padded(std::max({m.hidden, m.heads * m.head_dim, m.intermediate}));
}

void Engine::reserve(int rows) {
  if (rows <= room_) return;
  const Model& m = model_;
  const size_t n = size_t(rows);
  pass_.x.reserve(n * padded(m.hidden));
  pass_.normed.reserve(n * padded(m.hidden));
  pass_.q.reserve(n * padded(m.heads * m.head_dim));
  pass_.attended.reserve(n * padded(m.heads * m.head_dim));
  pass_.k.reserve(n * padded(m.kv_heads * m.head_dim));
  pass_.v.reserve(n * padded(m.kv_heads * m.head_dim));
  pass_.gate.reserve(n * padded(m.intermediate));
  pass_.up.reserve(n * padded(m.intermediate));
  pass_.code_stride = widest_ * 2 + 64;  // bf16 at most; not a multiple of a page
  pass_.group_stride = widest_ / 32;
  for (Codes* codes : {&pass_.codes, &pass_.gated}) {
    codes->codes.reserve(n * pass_.code_stride);
    codes->scales.reserve(n * pass_.group_stride);
    codes->starts.reserve(n * pass_.group_stride);
  }
  pass_.tile.reserve(n);
  pass_.tile_of.reserve(n);
  for (int i = 0; i < team_.threads(); i++)
    pass_.scratch[i].reserve(kernels_->scratch_bytes(m, rows));
  all_.resize(n);
  std::iota(all_.begin(), all_.end(), 0);
  room_ = rows;
}

// Neighbouring rows of a sequence go into one tile; single rows are cut by spans of pages instead, and
// leave partial results. The last rows come first: they have the most to do.
void Engine::cut_tiles() {
  const int high = std::max(1, kTileQueries / (model_.heads / model_.kv_heads));
  size_t partials = 0;
  pass_.tiles = 0;
  for (int end = pass_.rows; end > 0;) {
    int row = end - 1;
    while (row > 0 && end - row < high && pass_.sequence[row - 1] == pass_.sequence[row] &&
           pass_.positions[row - 1] == pass_.positions[row] - 1)
      row--;
    const int spans = pass_.positions[row] / kSpan + 1;
    const bool single = end - row == 1;
    for (int r = row; r < end; r++) pass_.tile_of.data()[r] = pass_.tiles;
    pass_.tile.data()[pass_.tiles++] = {row, end - row, spans, single ? int(partials) : -1};
    if (single) partials += size_t(model_.heads) * spans * (to_lanes(model_.head_dim) + 16);
    end = row;
  }
  require(partials < (size_t(1) << 31), "rows: too many of them at too long a context");
  pass_.partials.reserve(partials);
}

void Engine::begin(const int32_t* tokens, const int32_t* positions, const int32_t* sequence,
                   int rows, const uint32_t* tables, int sequences, int blocks, int groups) {
  require(rows > 0, "rows: a pass needs at least one");
  require(groups == pages_.geometry().groups(), "tables: wrong number of layer groups");
  for (int r = 0; r < rows; r++) {
    require(tokens[r] >= 0 && tokens[r] < model_.vocab, "tokens: outside the vocabulary");
    require(sequence[r] >= 0 && sequence[r] < sequences, "sequence: outside the tables");
    require(positions[r] >= 0 && positions[r] < model_.max_context, "positions: past the context");
    require(positions[r] / kPageTokens < blocks, "positions: past the sequence's last block");
    if (r > 0 && sequence[r] == sequence[r - 1] && positions[r] / kPageTokens == positions[r - 1] / kPageTokens)
      continue;  // the same pages as the row before
    const uint32_t* table = tables + size_t(sequence[r]) * blocks * groups;
    for (int i = 0; i < (positions[r] / kPageTokens + 1) * groups; i++)
      require(pages_.holds(table[i]), "tables: a page outside the arena");
  }
  reserve(rows);
  pass_.rows = rows;
  pass_.blocks = blocks;
  pass_.groups = groups;
  pass_.tokens = tokens;
  pass_.positions = positions;
  pass_.sequence = sequence;
  pass_.tables = tables;
  next_group_ = 0;
  cut_tiles();
}

void Engine::run(int first_group, int last_group, const uint32_t* seeds, const int32_t* which,
                 int count, float* out) {
  struct Work {
    const Kernels* kernels;
    Job job;
  } work{kernels_, {model_, pages_, pass_, team_, first_group, last_group, seeds, which, count, out}};
  team_.run([](void* context, int member) {
    const Work* w = static_cast<const Work*>(context);
    w->kernels->run(w->job, member);
  }, &work);
}

void Engine::run_group(int group) {
  require(pass_.rows > 0 && group == next_group_, "group: layer groups run in ascending order");
  run(group, group + 1, nullptr, nullptr, 0, nullptr);
  next_group_++;
}

void Engine::logits(const int32_t* which, int count, float* out) {
  const int groups = pages_.geometry().groups();
  require(next_group_ == groups, "logits: layer groups are still to run");
  for (int i = 0; i < count; i++)
    require(which[i] >= 0 && which[i] < pass_.rows, "which: not a row of this pass");
  require(count <= pass_.rows, "which: more entries than rows");
  if (count) run(groups, groups, nullptr, which, count, out);
}

size_t Engine::read_weights() {
  struct Work {
    const Kernels* kernels;
    const Model& model;
    Team& team;
  } work{kernels_, model_, team_};
  team_.run([](void* context, int member) {
    const Work* w = static_cast<const Work*>(context);
    w->kernels->read(w->model, w->team, member);
  }, &work);
  return weight_bytes();
}

size_t Engine::weight_bytes() const {
  size_t bytes = model_.head.bytes();
  for (const Layer& l : model_.layer)
    for (const Matrix* m : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) bytes += m->bytes();
  return bytes;
}

void Engine::step(const uint32_t* seeds, float* out) {
  require(pass_.rows > 0 && next_group_ == 0, "step: a pass that has begun and run no group");
  next_group_ = pages_.geometry().groups();
  run(0, next_group_, seeds, all_.data(), pass_.rows, out);
}

}  // namespace baton
