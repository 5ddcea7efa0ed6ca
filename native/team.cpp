#include "team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace baton {
namespace {

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

constexpr int kAskLines = 4;  // by one round of a spin: about what memory gives in that time

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

// Returns once the word differs from `seen`.
void Gate::await_change(uint32_t seen, Ahead* meanwhile) {
  const int64_t limit = now_ns() + kSpinNs;
  do {
    for (int i = 0; i < 32; i++) {
      if (word.load(std::memory_order_acquire) != seen) return;
      if (meanwhile) meanwhile->ask(kAskLines);
      relax();
    }
  } while (now_ns() < limit);
  sleepers.fetch_add(1);
  while (word.load() == seen)
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
  sleepers.fetch_sub(1);
}

void Gate::change() {
  word.fetch_add(1);
  if (sleepers.load()) syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

Team::Team(int threads, std::vector<int> cores)
    : threads_(threads), cores_(std::move(cores)), next_(threads) {
  for (int member = 1; member < threads_; member++)
    others_.emplace_back([this, member] { serve(member); });
}

Team::~Team() {
  stop_.store(true, std::memory_order_release);
  run_.change();
  for (std::thread& other : others_) other.join();
}

void Team::pin(int member) const {
  if (cores_.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cores_[size_t(member) % cores_.size()], &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

void Team::serve(int member) {
  pin(member);
  for (uint32_t seen = 0;; seen++) {
    run_.await_change(seen);
    if (stop_.load(std::memory_order_acquire)) return;
    work_(context_, member);
    barrier();
  }
}

void Team::run(Work work, void* context) {
  const uint64_t self = uint64_t(pthread_self());
  if (pinned_ != self) pin(0), pinned_ = self;
  alone_ = 1;
  if (threads_ == 1) return work(context, 0);
  work_ = work, context_ = context;
  next_.store(threads_, std::memory_order_relaxed);
  run_.change();
  work(context, 0);
  barrier();
}

int Team::take() {
  return threads_ == 1 ? alone_++ : next_.fetch_add(1, std::memory_order_relaxed);
}

void Team::barrier(Ahead* meanwhile) {
  if (threads_ == 1) {
    alone_ = 1;
    return;
  }
  const uint32_t seen = phase_.word.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < threads_)
    return phase_.await_change(seen, meanwhile);
  arrived_.store(0, std::memory_order_relaxed);
  next_.store(threads_, std::memory_order_relaxed);
  phase_.change();
}

}  // namespace baton
