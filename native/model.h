// What a pass works on: the model, the rows of the pass, and the room to compute them in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "arena.h"
#include "packed.h"

namespace baton {

struct Layer {
  Matrix q, k, v, o, gate, up, down;
  std::vector<float> q_bias, k_bias, v_bias, o_bias, gate_bias, up_bias, down_bias;
  std::vector<float> attention_norm, mlp_norm, q_norm, k_norm;
  int window = 0;  // sliding window in tokens; 0: none
};

struct Model {
  int vocab, hidden, layers, heads, kv_heads, head_dim, intermediate, max_context;
  float eps;
  bool kv_bf16;
  Matrix embed, head;
  std::vector<float> final_norm;
  std::vector<Layer> layer;
  const float* cos;  // [max_context][head_dim / 2]
  const float* sin;
};

// Rows of floats are padded with zeros to the widest group of columns; lanes to 16.
constexpr int kGroupMax = 128;
constexpr int padded(int n) { return (n + kGroupMax - 1) / kGroupMax * kGroupMax; }
constexpr int to_lanes(int n) { return (n + 15) & ~15; }

// Room that only grows, zeroed, on cache lines.
template <class T>
class Room {
 public:
  Room() = default;
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  ~Room() { std::free(data_); }

  void reserve(size_t count) {
    if (count <= count_) return;
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    void* fresh = std::aligned_alloc(64, bytes);
    if (!fresh) throw std::bad_alloc();
    __builtin_memset(fresh, 0, bytes);
    std::free(data_);
    data_ = static_cast<T*>(fresh), count_ = count;
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

// The rows that a product multiplies: as floats, and in the form that a packed matrix wants.
struct Input {
  const float* x;     // [rows][ld], padded with zeros
  int ld;
  int8_t* codes;      // int8, or bf16 in the same room
  float* scales;      // [rows][group_stride]
  int32_t* starts;
  int code_stride, group_stride;  // bytes of a row's codes; groups of a row

  // The rows from this one on.
  Input from(int row) const {
    const size_t codes_at = size_t(row) * code_stride, groups_at = size_t(row) * group_stride;
    return {x + size_t(row) * ld, ld, codes + codes_at, scales + groups_at, starts + groups_at,
            code_stride, group_stride};
  }
};

// Room for rows in the form that a packed matrix wants.
struct Codes {
  Room<int8_t> codes;
  Room<float> scales;
  Room<int32_t> starts;
};

// Neighbouring rows of one sequence whose attention is computed together.
struct Tile {
  int row, count;
  int spans;     // of pages up to the last row's, see attention.h
  int partials;  // where those of a single row are kept; -1: the rows are finished in one go
};

// One pass. The arrays of rows and tables belong to the caller.
struct Pass {
  int rows = 0, blocks = 0, groups = 0, tiles = 0;
  const int32_t* tokens = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* sequence = nullptr;
  const uint32_t* tables = nullptr;  // [sequence][blocks][groups]
  Room<float> x, normed, q, k, v, attended, gate, up, partials;
  Codes codes, gated;  // of the input at hand, and of what `down` multiplies
  Room<Tile> tile;
  Room<int> tile_of;  // by row
  int code_stride = 0, group_stride = 0;
  Room<unsigned char> scratch[64];  // by member of the team
};

}  // namespace baton
