#include "engine.h"

#include <stdexcept>

namespace baton {
namespace {

const Kernels* kernels_for(std::string& level) {
#if defined(__x86_64__)
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512cd");
  if (level.empty()) level = v4 ? "v4" : v3 ? "v3" : "base";
  if (level == "v4" && v4) return kernels_v4();
  if (level == "v3" && v3) return kernels_v3();
#else
  if (level.empty()) level = "base";
#endif
  if (level == "base") return kernels_base();
  throw std::invalid_argument("level: this processor does not run '" + level + "' kernels");
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

}  // namespace

Engine::Engine(Model model, const Pages& pages, const std::string& level)
    : model_(std::move(model)), pages_(pages), level_(level) {
  kernels_ = kernels_for(level_);
  require(model_.head_dim <= 1024 && model_.head_dim % 2 == 0, "head_dim: even and at most 1024");
  require(model_.heads % model_.kv_heads == 0, "heads: a multiple of kv_heads");
}

void Engine::reserve(int rows) {
  if (rows <= room_) return;
  const Model& m = model_;
  const size_t n = size_t(rows);
  pass_.x.assign(n * padded(m.hidden), 0);
  pass_.normed.assign(n * padded(m.hidden), 0);
  pass_.projected.assign(n * padded(m.hidden), 0);
  pass_.q.assign(n * padded(m.heads * m.head_dim), 0);
  pass_.attended.assign(n * padded(m.heads * m.head_dim), 0);
  pass_.k.assign(n * padded(m.kv_heads * m.head_dim), 0);
  pass_.v.assign(n * padded(m.kv_heads * m.head_dim), 0);
  pass_.gate.assign(n * padded(m.intermediate), 0);
  pass_.up.assign(n * padded(m.intermediate), 0);
  room_ = rows;
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
  kernels_->embed(model_, pass_);
}

void Engine::run_group(int group) {
  require(pass_.rows > 0 && group == next_group_, "group: layer groups run in ascending order");
  kernels_->run_group(model_, pages_, pass_, group);
  next_group_++;
}

void Engine::logits(const int32_t* which, int count, float* out) {
  require(next_group_ == pages_.geometry().groups(), "logits: layer groups are still to run");
  for (int i = 0; i < count; i++)
    require(which[i] >= 0 && which[i] < pass_.rows, "which: not a row of this pass");
  require(count <= pass_.rows, "which: more entries than rows");
  kernels_->logits(model_, pass_, which, count, out);
}

}  // namespace baton
