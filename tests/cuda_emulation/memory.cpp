// What the machine knows of each unit of memory, and which accesses it lets pass.
#include <algorithm>
#include <cstring>
#include <deque>
#include <vector>

#include "cuda_runtime.h"

namespace expert_mix {
alignas(128) unsigned char shared_memory[machine::kMostShared];
}  // namespace expert_mix

namespace machine {
namespace {

using expert_mix::shared_memory;
constexpr size_t kUnit = 2;  // bytes for which accesses are told apart

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  bool valid;
  Site site;
};

struct Copies {  // of a thread
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
};

// The latest accesses to a unit of shared memory. Threads are ordered by barriers alone: of the CTA, or of the warp.
struct SharedUnit {
  bool written = false, in_flight = false;
  int writer = -1, write_phase = -1, write_warp_phase = -1;
  int reader = -1, read_warp = -1, read_phase = -1, read_warp_phase = -1;
};
constexpr int kManyLanes = -2, kManyWarps = -3;  // as reader

struct Buffer {
  unsigned char* base;
  size_t size;
  bool writable;
  std::vector<bool> written;
  std::vector<int> writer_launch, reader_launch;
  std::vector<size_t> writer, reader;
};

std::vector<Buffer> buffers;
std::vector<SharedUnit> shared_units(sizeof(shared_memory) / kUnit);
std::vector<Copies> copies;

void poison(void* at, size_t size) { std::memset(at, 0xff, size); }

void finish_copy(const Copy& copy) {
  const size_t first = (copy.to - shared_memory) / kUnit;
  for (size_t u = first; u < first + 16 / kUnit; ++u) shared_units[u].in_flight = false;
  if (!check_shared(copy.to, 16, true, copy.site)) return;
  if (!copy.valid) {
    std::memset(copy.to, 0, 16);
  } else if (check_global(copy.from, 16, false, copy.site)) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    poison(copy.to, 16);
  }
}

}  // namespace

bool check_shared(const void* at, size_t size, bool write, Site site) {
  const size_t offset = static_cast<const unsigned char*>(at) - shared_memory;
  if (offset + size > now.shared_bytes) return fail("shared memory ends before this access", site);
  if (offset % size) return fail("an access to shared memory is not aligned", site);
  const int warp = now.running / kLanes, warp_phase = now.warp_phases[warp];
  const auto ordered = [&](int other_warp, int other_warp_phase) {
    return other_warp == warp && other_warp_phase < warp_phase;
  };
  for (size_t u = offset / kUnit; u < (offset + size) / kUnit; ++u) {
    SharedUnit& unit = shared_units[u];
    if (unit.in_flight) return fail("shared memory is used while a copy to it is under way", site);
    if (!write && !unit.written) return fail("shared memory is read that nothing wrote", site);
    if (unit.write_phase == now.phase && unit.writer != now.running &&
        !ordered(unit.writer / kLanes, unit.write_warp_phase)) {
      return fail(write ? "two threads write with no barrier between" : "a read and a write with no barrier between",
                  site);
    }
    if (write) {
      if (unit.read_phase == now.phase && unit.reader != now.running &&
          (unit.reader == kManyWarps || !ordered(unit.read_warp, unit.read_warp_phase))) {
        return fail("a write and a read with no barrier between", site);
      }
      unit.written = true;
      unit.writer = now.running;
      unit.write_phase = now.phase;
      unit.write_warp_phase = warp_phase;
    } else {
      const bool first = unit.read_phase != now.phase;
      const bool alone = first || unit.reader == now.running;
      const bool same_warp = first || (unit.reader != kManyWarps && unit.read_warp == warp);
      unit.reader = alone ? now.running : same_warp ? kManyLanes : kManyWarps;
      unit.read_warp = warp;
      unit.read_phase = now.phase;
      unit.read_warp_phase = warp_phase;
    }
  }
  return true;
}

bool check_global(const void* at, size_t size, bool write, Site site) {
  if (buffers.empty()) return true;  // nobody has said what there is
  const auto* byte = static_cast<const unsigned char*>(at);
  if (reinterpret_cast<uintptr_t>(at) % size) return fail("an access to device memory is not aligned", site);
  const size_t me = static_cast<size_t>(blockIdx.x) * now.threads + now.running;
  for (Buffer& buffer : buffers) {
    if (byte < buffer.base || byte + size > buffer.base + buffer.size) continue;
    if (write && !buffer.writable) return fail("an input is written", site);
    for (size_t u = (byte - buffer.base) / kUnit; u < (byte - buffer.base + size) / kUnit; ++u) {
      if (!write && !buffer.written[u]) return fail("device memory is read that nothing wrote", site);
      if (buffer.writer_launch[u] == now.launch && (buffer.writer[u] != me || !write)) {
        return fail(write ? "two threads write the same" : "device memory is read in the launch that writes it", site);
      }
      if (write && buffer.reader_launch[u] == now.launch) {
        return fail("device memory is written in the launch that reads it", site);
      }
      (write ? buffer.writer_launch : buffer.reader_launch)[u] = now.launch;
      (write ? buffer.writer : buffer.reader)[u] = me;
      if (write) buffer.written[u] = true;
    }
    return true;
  }
  return fail("no buffer of device memory holds this access", site);
}

void start_copy(void* to, const void* from, bool valid, Site site) {
  if (!check_shared(to, 16, true, site)) return;
  if (faulty("copy is left out", site)) return;
  poison(to, 16);
  const size_t first = (static_cast<unsigned char*>(to) - shared_memory) / kUnit;
  for (size_t u = first; u < first + 16 / kUnit; ++u) shared_units[u].in_flight = true;
  copies[now.running].open.push_back(
      {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), valid, site});
}

void commit_copies(Site site) {
  if (faulty("commit is left out", site)) return;
  Copies& mine = copies[now.running];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void wait_for_copies(int pending, Site site) {
  if (faulty("wait is left out", site)) return;
  if (pending > 0 && faulty("wait leaves one group more", site)) ++pending;
  auto& groups = copies[now.running].groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : groups.front()) finish_copy(copy);
    groups.pop_front();
  }
}

void check_no_copies() {
  Copies& mine = copies[now.running];
  mine.groups.push_back(mine.open);
  for (const auto& group : mine.groups) {
    for (const Copy& copy : group) fail("a copy is under way when its thread ends", copy.site);
  }
}

void forget_shared() {
  std::fill(shared_units.begin(), shared_units.end(), SharedUnit());
  poison(shared_memory, sizeof(shared_memory));
  copies.assign(now.threads, Copies());
}

void forget_buffers() { buffers.clear(); }

}  // namespace machine

using namespace machine;

// What a kernel may touch: inputs, which hold values, and outputs, which do not.
extern "C" void machine_add_buffer(void* base, size_t size, int writable) {
  const size_t units = size / kUnit;
  Buffer buffer = {static_cast<unsigned char*>(base), size, writable != 0, {}, {}, {}, {}, {}};
  buffer.written.assign(units, !writable);
  buffer.writer_launch.assign(units, -1);
  buffer.reader_launch.assign(units, -1);
  buffer.writer.assign(units, 0);
  buffer.reader.assign(units, 0);
  if (writable) poison(base, size);
  buffers.push_back(std::move(buffer));
}
