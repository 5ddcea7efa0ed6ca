// One transformer pass over paged KV, run by a team. Compiled once per instruction set; every build
// gives the same bits: 16 lanes, exact integers, fused multiply-adds by name, fixed orders.
//
// A row's K, V and logits depend on nothing but the tokens up to it: no kernel's arithmetic for one
// row looks at how many rows there are, where in the batch it stands, or which thread computes it.
#pragma once

#include "model.h"
#include "team.h"

namespace baton {

// What a team is asked to run of the pass that was begun.
struct Job {
  const Model& model;
  const Pages& pages;
  Pass& pass;
  Team& team;
  int first_group, last_group;  // layer groups [first, last); embeddings are looked up before group 0
  const uint32_t* seeds;        // if given: row checksums are stored as groups come to their end
  const int32_t* which;         // rows to give logits of, at most as many as the pass has
  int count;
  float* logits;                // [count][vocab]
};

struct Kernels {
  void (*run)(const Job&, int member);
  void (*read)(const Model&, Team&, int member);  // all weights, for nothing
  void (*product)(const Matrix& packed, const float* x, int rows, float* y);
  size_t (*scratch_bytes)(const Model&, int rows);  // of each member
};

const Kernels* kernels_base();
#if defined(__x86_64__)
const Kernels* kernels_v3();
const Kernels* kernels_v4();
const Kernels* kernels_vnni();
#elif defined(__aarch64__)
const Kernels* kernels_dotprod();
#endif

}  // namespace baton
