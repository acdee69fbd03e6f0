// The threads of a CTA as coroutines: who goes on when, what barriers and meetings of a warp wait for, planted faults.
#include "machine.h"

#include <csetjmp>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <ucontext.h>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx;

namespace machine {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kInvalidValue = 1;

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Thread {
  ucontext_t first;
  jmp_buf here;
  bool started = false;
  State state = State::kReady;
  Site site = {"", 0};
  void* brought = nullptr;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

std::vector<std::unique_ptr<Thread>> threads;
std::map<const void*, int> allowed_shared;
std::map<std::tuple<const char*, const char*, int>, bool> wanted_at;  // of the sites that this trial has reached
std::set<std::string> sites;
std::string errors, fault;
int error_count, multiprocessor_count = 4;
std::mt19937 random_order;
const std::function<void()>* program;
jmp_buf scheduler;

std::string name_of(const char* kind, Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(kind) + " @ " + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

[[noreturn]] void to_scheduler() { _longjmp(scheduler, 1); }

void pause(State state, Site site) {
  Thread& thread = *threads[now.running];
  thread.state = state;
  thread.site = site;
  if (_setjmp(thread.here) == 0) to_scheduler();
}

void begin() {
  (*program)();
  Thread& thread = *threads[now.running];
  check_no_copies();
  thread.state = State::kDone;
  to_scheduler();
}

void resume(int index) {
  now.running = index;
  threadIdx = dim3(index);
  Thread& thread = *threads[index];
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.here, 1);
  thread.started = true;
  setcontext(&thread.first);
}

void release(int first, int count, State waiting) {
  for (int t = first; t < first + count; ++t) {
    if (threads[t]->state == waiting) threads[t]->state = State::kReady;
  }
}

bool all_at(State state, int first, int count) {
  for (int t = first; t < first + count; ++t) {
    if (threads[t]->state != state) return false;
  }
  return true;
}

void run_block() {
  for (int t = 0; t < now.threads; ++t) {
    Thread& thread = *threads[t];
    thread.started = false;
    thread.state = State::kReady;
    getcontext(&thread.first);
    thread.first.uc_stack = {thread.stack.get(), 0, kStack};
    thread.first.uc_link = nullptr;
    makecontext(&thread.first, begin, 0);
  }
  now.phase = 0;
  now.warp_phases.assign(now.threads / kLanes, 0);
  forget_shared();

  for (;;) {
    // a warp goes on, chosen by chance, and in it each lane that can
    std::vector<int> ready;
    for (int t = 0; t < now.threads; ++t) {
      if (threads[t]->state == State::kReady) {
        const int warp = t / kLanes;
        if (ready.empty() || ready.back() != warp) ready.push_back(warp);
      }
    }
    if (!ready.empty()) {
      const int warp = ready[random_order() % ready.size()];
      for (int lane = 0; lane < kLanes; ++lane) {
        if (threads[warp * kLanes + lane]->state == State::kReady) resume(warp * kLanes + lane);
      }
    } else if (all_at(State::kAtBlock, 0, now.threads)) {
      ++now.phase;
      for (int t = 1; t < now.threads; ++t) {
        const Site site = threads[t]->site;
        if (site.line != threads[0]->site.line) fail("threads meet at different barriers", site);
      }
      release(0, now.threads, State::kAtBlock);
    } else {
      for (int t = 0; t < now.threads; ++t) {
        if (threads[t]->state != State::kDone) {
          now.running = t;
          fail("this thread waits for ever", threads[t]->site);
          return;
        }
      }
      return;
    }
  }
}

}  // namespace

Now now;

bool fail(const char* what, Site site) {
  if (++error_count <= 10) {
    errors += name_of(what, site) + " (CTA " + std::to_string(blockIdx.x) + ", thread " +
              std::to_string(now.running) + ")\n";
  }
  return false;
}

bool faulty(const char* kind, Site site) {
  const auto key = std::make_tuple(kind, site.file, site.line);
  const auto known = wanted_at.find(key);
  if (known != wanted_at.end()) return known->second;
  const std::string name = name_of(kind, site);
  sites.insert(name);
  return wanted_at[key] = name == fault;
}

void meet(void* mine, void (*act)(void** all)) {
  const int warp = now.running / kLanes * kLanes;
  threads[now.running]->brought = mine;
  for (int l = 0; l < kLanes; ++l) {
    if (warp + l != now.running && threads[warp + l]->state != State::kAtWarp) {
      pause(State::kAtWarp, {"", 0});
      return;
    }
  }
  void* all[kLanes];
  for (int l = 0; l < kLanes; ++l) all[l] = threads[warp + l]->brought;
  act(all);
  release(warp, kLanes, State::kAtWarp);
}

void block_barrier(Site site) {
  if (!faulty("barrier is left out", site)) pause(State::kAtBlock, site);
}

void warp_barrier(Site site) {
  if (faulty("warp barrier is left out", site)) return;
  meet(nullptr, [](void**) { ++now.warp_phases[now.running / kLanes]; });
}

int launch(const void* kernel, size_t blocks, int count, size_t shared_bytes, const std::function<void()>& thread) {
  if (shared_bytes > 48 * 1024 && static_cast<int>(shared_bytes) > allowed_shared[kernel]) return kInvalidValue;
  ++now.launch;
  now.threads = count;
  now.shared_bytes = shared_bytes;
  program = &thread;
  while (threads.size() < static_cast<size_t>(count)) threads.push_back(std::make_unique<Thread>());
  std::vector<unsigned> order(blocks);
  for (size_t b = 0; b < blocks; ++b) order[b] = static_cast<unsigned>(b);
  std::shuffle(order.begin(), order.end(), random_order);
  for (unsigned block : order) {
    blockIdx = dim3(block);
    run_block();
  }
  return 0;
}

int allow_shared(const void* kernel, int bytes) {
  if (bytes > kMostShared) return kInvalidValue;
  allowed_shared[kernel] = bytes;
  return 0;
}

int multiprocessors() { return multiprocessor_count; }

}  // namespace machine

using namespace machine;

// A new trial: no buffers, no errors. Warps and CTAs take turns in an order that follows from the seed.
extern "C" void machine_reset(unsigned seed, int count, const char* wanted_fault) {
  forget_buffers();
  errors.clear();
  allowed_shared.clear();
  wanted_at.clear();
  error_count = 0;
  multiprocessor_count = count;
  fault = wanted_fault;
  random_order.seed(seed);
}

extern "C" const char* machine_errors() { return errors.c_str(); }

// All faults that can be asked for at the sites that were reached so far, one a line.
extern "C" const char* machine_sites() {
  static std::string list;
  list.clear();
  for (const std::string& name : sites) list += name + "\n";
  return list.c_str();
}
