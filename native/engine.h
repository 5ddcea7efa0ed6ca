// The CPU engine: a model over mapped weights and the passes it runs. One thread owns an engine.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace baton {

class Engine {
 public:
  Engine(Model model, const Pages& pages, const std::string& level);

  // Takes the rows of a new pass; the arrays must stay valid and unchanged until it ends.
  // Throws std::invalid_argument naming the field when a row is out of range.
  void begin(const int32_t* tokens, const int32_t* positions, const int32_t* sequence, int rows,
             const uint32_t* tables, int sequences, int blocks, int groups);
  void run_group(int group);
  void logits(const int32_t* which, int count, float* out);

  const std::string& level() const { return level_; }
  int vocab() const { return model_.vocab; }
  int rows() const { return pass_.rows; }

 private:
  void reserve(int rows);

  Model model_;
  Pages pages_;
  Pass pass_;
  const Kernels* kernels_;
  std::string level_;
  int next_group_ = 0, room_ = 0;
};

}  // namespace baton
