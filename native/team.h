// A few threads that run one function together and meet at barriers. Knows nothing of models.
//
// The thread that calls `run` is member 0; the others sleep between runs. A barrier spins for at most
// `kSpinNs`, then sleeps in a futex: two processes may share a core.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "ahead.h"

namespace baton {

constexpr int64_t kSpinNs = 50'000;
constexpr int kThreadsMax = 64;

// A number that threads wait for to change; only those that sleep cost the changer a system call.
struct alignas(64) Gate {
  std::atomic<uint32_t> word{0};
  std::atomic<int> sleepers{0};

  void await_change(uint32_t seen, Ahead* meanwhile = nullptr);
  void change();
};

class Team {
 public:
  using Work = void (*)(void* context, int member);

  // `cores`: where member i runs, by i modulo their number; empty leaves that to the system.
  Team(int threads, std::vector<int> cores);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return threads_; }

  // Calls `work` once on each member and returns when all are done. One caller at a time.
  void run(Work work, void* context);

  // For members inside `run`. All must come; a new phase begins behind it. Who waits asks for memory.
  void barrier(Ahead* meanwhile = nullptr);
  // The next item of the present phase: each number once, whoever asks, from `threads()` on. The items
  // below that belong to the members of these numbers.
  int take();

 private:
  void serve(int member);
  void pin(int member) const;

  const int threads_;
  const std::vector<int> cores_;
  int alone_ = 1;
  uint64_t pinned_ = 0;  // the thread that was pinned as member 0
  Work work_ = nullptr;
  void* context_ = nullptr;
  std::vector<std::thread> others_;
  std::atomic<bool> stop_{false};
  Gate run_, phase_;
  alignas(64) std::atomic<int> next_;
  alignas(64) std::atomic<int> arrived_{0};
};

}  // namespace baton
