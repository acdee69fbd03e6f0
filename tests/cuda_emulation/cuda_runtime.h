// What the kernels use of CUDA, for g++: words without meaning, built-in variables and functions, and the runtime.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define HERE_ const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx;

using std::max;
using std::min;
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void __syncthreads(HERE_) { machine::block_barrier({file, line}); }
inline void __syncwarp(HERE_) { machine::warp_barrier({file, line}); }

inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned mine = vote;
  machine::meet(&mine, [](void** all) {
    unsigned votes = 0;
    for (int l = 0; l < machine::kLanes; ++l) votes |= *static_cast<unsigned*>(all[l]) << l;
    for (int l = 0; l < machine::kLanes; ++l) *static_cast<unsigned*>(all[l]) = votes;
  });
  return mine;
}

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  struct Lane {
    float value;
    int distance;
  } mine = {value, distance};
  machine::meet(&mine, [](void** all) {
    float values[machine::kLanes];
    for (int l = 0; l < machine::kLanes; ++l) values[l] = static_cast<Lane*>(all[l])->value;
    for (int l = 0; l < machine::kLanes; ++l) {
      Lane* lane = static_cast<Lane*>(all[l]);
      lane->value = values[l ^ lane->distance];
    }
  });
  return mine.value;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaDevAttrMultiProcessorCount };
using cudaStream_t = struct Stream*;

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid value"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  return *value = machine::multiprocessors(), cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, int, int bytes) {
  return static_cast<cudaError_t>(machine::allow_shared(kernel, bytes));
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments), Arguments arguments) {
  return static_cast<cudaError_t>(machine::launch(reinterpret_cast<const void*>(kernel), config->gridDim.x,
                                                  config->blockDim.x, config->dynamicSmemBytes,
                                                  [=] { kernel(arguments); }));
}
