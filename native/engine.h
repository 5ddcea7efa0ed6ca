// The CPU engine: a model over mapped weights and the passes it runs. One thread owns an engine.
#pragma once

#include <string>
#include <vector>

#include "pass.h"

namespace baton {

// The kernels of an instruction set; "" picks the best and writes its name. Throws
// std::invalid_argument for one that this processor does not have.
const Kernels* kernels_for(std::string& level);

class Engine {
 public:
  // `cores` pins the team, the calling thread as its first member; empty pins nobody.
  Engine(Model model, const Pages& pages, const std::string& level, int threads,
         std::vector<int> cores);

  // Takes the rows of a new pass; the arrays must stay valid and unchanged until it ends.
  // Throws std::invalid_argument naming the field when a row is out of range.
  void begin(const int32_t* tokens, const int32_t* positions, const int32_t* sequence, int rows,
             const uint32_t* tables, int sequences, int blocks, int groups);
  void run_group(int group);
  // `out` is [count][vocab], for rows that may repeat.
  void logits(const int32_t* which, int count, float* out);
  // All layer groups and the logits of every row, after `begin`; `seeds`, if given, one for each row,
  // are those of the row checksums to store.
  void step(const uint32_t* seeds, float* out);

  // Reads the bytes of all matrices that a step reads, by the same members in the same order, and does
  // nothing with them: the measure of what memory can give. Returns their number.
  size_t read_weights();
  size_t weight_bytes() const;

  const std::string& level() const { return level_; }
  int vocab() const { return model_.vocab; }
  int rows() const { return pass_.rows; }
  int threads() const { return team_.threads(); }

 private:
  void reserve(int rows);
  void cut_tiles();
  void run(int first_group, int last_group, const uint32_t* seeds, const int32_t* which, int count,
           float* out);

  Model model_;
  Pages pages_;
  Pass pass_;
  Team team_;
  const Kernels* kernels_;
  std::string level_;
  std::vector<int32_t> all_;  // 0, 1, 2, ...
  int next_group_ = 0, room_ = 0, widest_ = 0;
};

}  // namespace baton
