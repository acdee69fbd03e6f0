// One multiprocessor on a CPU: the threads of a CTA take turns, and each access to memory is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace machine {

constexpr int kLanes = 32;
constexpr int kMostShared = 163 * 1024;  // that a CTA may have on compute capability 8.0

struct Site {  // where in the sources a call stands
  const char* file;
  int line;
};

struct Now {  // who runs, and since which barriers
  int running, threads, launch, phase;
  std::vector<int> warp_phases;
  size_t shared_bytes;
};
extern Now now;

// Puts a complaint on record. False.
bool fail(const char* what, Site site);

// A fault of the given kind is asked for at this site: the caller then leaves out or spoils what it does there.
bool faulty(const char* kind, Site site);

// All 32 lanes meet; the last one acts on what the others brought, and all go on.
void meet(void* mine, void (*act)(void** all));

void block_barrier(Site site);
void warp_barrier(Site site);

// Each tells whether the access is one that may be made; if not, it is on record and the caller leaves it out.
bool check_shared(const void* at, size_t size, bool write, Site site);
bool check_global(const void* at, size_t size, bool write, Site site);

void start_copy(void* to, const void* from, bool valid, Site site);
void commit_copies(Site site);
void wait_for_copies(int pending, Site site);
void check_no_copies();

// For the next CTA, and for the next trial.
void forget_shared();
void forget_buffers();

// Runs `thread` as each thread of each CTA. An error code of CUDA.
int launch(const void* kernel, size_t blocks, int threads, size_t shared_bytes, const std::function<void()>& thread);
int allow_shared(const void* kernel, int bytes);
int multiprocessors();

}  // namespace machine
