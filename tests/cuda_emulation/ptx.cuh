// The twin of switchdit/kernels/csrc/ptx.cuh: the same functions, as the PTX ISA describes their instructions.
#pragma once

#include <cuda_runtime.h>

namespace expert_mix {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// mma.m16n8k16. In lane l, with g = l / 4 and q = l % 4: A holds the pairs of columns 2q, 2q + 1 of rows g and g + 8,
// then of columns 2q + 8, 2q + 9; B the pairs of rows 2q, 2q + 1 and 2q + 8, 2q + 9 of column g; C and D columns 2q,
// 2q + 1 of row g, then of row g + 8.
template <class Element>
void multiply_add_of_warp(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, machine::Site site) {
  struct Lane {
    float* sum;
    uint32_t a[4], b[2];
  } mine = {sum, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  if (machine::faulty("mma: halves of B change places", site)) std::swap(mine.b[0], mine.b[1]);
  if (machine::faulty("mma: rows of A change places", site)) std::swap(mine.a[0], mine.a[1]);
  machine::meet(&mine, [](void** all) {
    float left[16][16], right[16][8];
    for (int l = 0; l < machine::kLanes; ++l) {
      const Lane& lane = *static_cast<Lane*>(all[l]);
      const int g = l / 4, q = l % 4;
      for (int i = 0; i < 4; ++i) {
        const float2 pair = Element::unpack(lane.a[i]);
        left[g + i % 2 * 8][2 * q + i / 2 * 8] = pair.x;
        left[g + i % 2 * 8][2 * q + i / 2 * 8 + 1] = pair.y;
      }
      for (int i = 0; i < 2; ++i) {
        const float2 pair = Element::unpack(lane.b[i]);
        right[2 * q + 8 * i][g] = pair.x;
        right[2 * q + 8 * i + 1][g] = pair.y;
      }
    }
    for (int l = 0; l < machine::kLanes; ++l) {
      const int g = l / 4, q = l % 4;
      for (int i = 0; i < 4; ++i) {
        float& to = static_cast<Lane*>(all[l])->sum[i];
        for (int k = 0; k < 16; ++k) to += left[g + i / 2 * 8][k] * right[k][2 * q + i % 2];
      }
    }
  });
}

struct Bf16 {
  static float2 unpack(uint32_t pair) { return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)}; }

  static uint32_t round(float value) {
    const uint32_t bits = bits_of(value);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }

  static uint32_t pack(float low, float high) { return round(low) | round(high) << 16; }

  static void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, HERE_) {
    multiply_add_of_warp<Bf16>(sum, a, b0, b1, {file, line});
  }
};

struct Fp16 {
  static float widen(uint32_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    float value = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    if (exponent == 31) value = fraction ? NAN : INFINITY;
    return half & 0x8000 ? -value : value;
  }

  static float2 unpack(uint32_t pair) { return {widen(pair & 0xffff), widen(pair >> 16)}; }

  static uint32_t round(float value) {
    if (value != value) return 0x7fff;
    const uint32_t sign = bits_of(value) >> 16 & 0x8000;
    const float size = std::fabs(value);
    if (size >= 65520.0f) return sign | 0x7c00;
    const int exponent = std::max(size > 0.0f ? std::ilogb(size) : -14, -14);
    const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return sign + (static_cast<uint32_t>(exponent + 14) << 10) + units;  // 1024 units carry into the exponent
  }

  static uint32_t pack(float low, float high) { return round(low) | round(high) << 16; }

  static void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, HERE_) {
    multiply_add_of_warp<Fp16>(sum, a, b0, b1, {file, line});
  }
};

template <class T>
T poison() {
  T value;
  std::memset(&value, 0xff, sizeof(T));  // NaN in each type of float
  return value;
}

template <class T>
T read_shared(const T* from, HERE_) {
  return machine::check_shared(from, sizeof(T), false, {file, line}) ? *from : poison<T>();
}

template <class T>
void write_shared(T* to, T value, HERE_) {
  if (machine::faulty("write_shared is left out", {file, line})) return;
  if (machine::check_shared(to, sizeof(T), true, {file, line})) *to = value;
}

template <class T>
T read_global(const T* from, HERE_) {
  return machine::check_global(from, sizeof(T), false, {file, line}) ? *from : poison<T>();
}

template <class T>
void write_global(T* to, T value, HERE_) {
  if (machine::faulty("write_global is left out", {file, line})) return;
  if (machine::check_global(to, sizeof(T), true, {file, line})) *to = value;
}

inline uint4 read_once(const void* from, HERE_) { return read_global(static_cast<const uint4*>(from), file, line); }

inline void copy_async(void* to, const void* from, bool valid, HERE_) {
  machine::start_copy(to, from, valid, {file, line});
}

inline void commit_copies(HERE_) { machine::commit_copies({file, line}); }

template <int kPending>
void wait_for_copies(HERE_) {
  machine::wait_for_copies(kPending, {file, line});
}

// ldmatrix.m8n8.x4: lane 8 i + r names row r of matrix i. Lane l gets elements 2 (l % 4) and 2 (l % 4) + 1 of row
// l / 4, or of column l / 4 with .trans.
template <bool kTransposed>
void load_matrices(uint32_t (&matrices)[4], const void* row, HERE_) {
  struct Lane {
    uint16_t row[8];
    uint32_t* matrices;
  } mine;
  mine.matrices = matrices;
  const auto* from = static_cast<const uint16_t*>(row);
  const bool readable = machine::check_shared(from, 16, false, {file, line});
  for (int i = 0; i < 8; ++i) mine.row[i] = readable ? from[i] : 0xffff;
  machine::meet(&mine, [](void** all) {
    const auto element = [&](int matrix, int r, int c) -> uint32_t {
      return static_cast<Lane*>(all[8 * matrix + r])->row[c];
    };
    for (int l = 0; l < machine::kLanes; ++l) {
      const int major = l / 4, minor = l % 4 * 2;
      for (int m = 0; m < 4; ++m) {
        static_cast<Lane*>(all[l])->matrices[m] =
            kTransposed ? element(m, minor, major) | element(m, minor + 1, major) << 16
                        : element(m, major, minor) | element(m, major, minor + 1) << 16;
      }
    }
  });
  if (machine::faulty("ldmatrix: second and third matrix change places", {file, line})) {
    std::swap(matrices[1], matrices[2]);
  }
}

}  // namespace expert_mix
