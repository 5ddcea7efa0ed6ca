// One transformer pass over paged KV. Written once, compiled per instruction set; every build rounds
// alike: 16 lanes, fused multiply-adds by name, fixed reduction trees, pages in ascending order.
//
// A row's K, V and logits depend on nothing but the tokens up to it: no kernel's arithmetic for one
// row looks at how many rows there are or where in the batch it stands.
#pragma once

#include <cstdint>
#include <vector>

#include "arena.h"

namespace baton {

enum class Dtype { kF32, kBF16, kF16 };

// A row-major [rows][cols] matrix as it lies in the mapped checkpoint.
struct Matrix {
  const void* data = nullptr;
  Dtype dtype = Dtype::kF32;
  int rows = 0, cols = 0;
};

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

// The rows of one pass and the room to compute them in; strides are padded to 16 floats.
struct Pass {
  int rows = 0, blocks = 0, groups = 0;
  const int32_t* tokens = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* sequence = nullptr;
  const uint32_t* tables = nullptr;  // [sequence][blocks][groups]
  std::vector<float> x, normed, q, k, v, attended, projected, gate, up;
};

struct Kernels {
  void (*embed)(const Model&, Pass&);
  void (*run_group)(const Model&, const Pages&, Pass&, int group);
  void (*logits)(const Model&, Pass&, const int32_t* which, int count, float* out);
};

inline int padded(int n) { return (n + 15) & ~15; }

const Kernels* kernels_base();
#if defined(__x86_64__)
const Kernels* kernels_v3();
const Kernels* kernels_v4();
#endif

}  // namespace baton
