// The memory-bound rest of the backward pass: the gradient of the mask, and sums in a fixed order.
#pragma once

#include "tiles.cuh"

namespace expert_mix {

struct ReductionArguments {
  const uint16_t* d_routed;   // (N, L, D)
  const uint16_t* d_mask;     // (N, L, D), or null: zero
  const uint16_t* z;          // (N, L, D)
  const uint16_t* bias;       // (M, D)
  const float* gates;         // (gate_rows, M)
  int gate_rows;              // N, or 1
  uint16_t* dm;               // (N, L, D)
  float* dm_sums;             // (N, D): over the tokens
  const float* gate_parts;    // (N, M, tiles) of weight_gradient
  int tiles;
  const float* weight_parts;  // (splits, M, D, D)
  int splits;
  uint16_t* d_weight;         // (M, D, D)
  uint16_t* d_bias;           // (M, D)
  float* d_gates;             // (gate_rows, M)
  Shape shape;
};

constexpr int kBlockVectors = 8;                        // columns of a CTA of mask_gradient, in units of kVector
constexpr int kBlockRows = kThreads / kBlockVectors;    // tokens that it takes at once
constexpr int kBlockColumns = kBlockVectors * kVector;
constexpr int kMaskGradientBytes = kBlockRows * (kBlockColumns + 4) * 4;

// dm = d_routed * z + d_mask, the gradient of the mask, and its sums over the tokens. Grid: (column blocks, samples).
template <class Element>
__global__ void __launch_bounds__(kThreads) mask_gradient(const ReductionArguments arguments) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  float* sums = reinterpret_cast<float*>(shared_memory);  // (kBlockRows, kBlockColumns), rows 4 floats longer
  constexpr int kStride = kBlockColumns + 4;

  const int tokens = arguments.shape.tokens, width = arguments.shape.width;
  const int blocks = ceil_div(width, kBlockColumns);
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / kBlockVectors, c = thread % kBlockVectors * kVector;
  const int column = static_cast<int>(blockIdx.x) % blocks * kBlockColumns;
  const size_t sample = static_cast<size_t>(blockIdx.x) / blocks;

  float sum[kVector] = {};
  if (column + c < width) {
#pragma unroll 4
    for (int t = row; t < tokens; t += kBlockRows) {
      const size_t at = (sample * tokens + t) * width + column + c;
      float upstream[kVector], z[kVector], dm[kVector] = {};
      unpack<Element>(upstream, read_once(arguments.d_routed + at));
      unpack<Element>(z, read_once(arguments.z + at));
      if (arguments.d_mask != nullptr) unpack<Element>(dm, read_once(arguments.d_mask + at));
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        dm[v] = fmaf(upstream[v], z[v], dm[v]);
        sum[v] += dm[v];
      }
      write_global(reinterpret_cast<uint4*>(arguments.dm + at), pack<Element>(dm));
    }
  }
  float4* to = reinterpret_cast<float4*>(sums + row * kStride + c);
  write_shared(to, make_float4(sum[0], sum[1], sum[2], sum[3]));
  write_shared(to + 1, make_float4(sum[4], sum[5], sum[6], sum[7]));
  __syncthreads();
  if (thread < kBlockColumns && column + thread < width) {
    float total = 0.0f;
    for (int r = 0; r < kBlockRows; ++r) total += read_shared(sums + r * kStride + thread);
    write_global(arguments.dm_sums + sample * width + column + thread, total);
  }
}

// The sum of `value` over the threads of a CTA, in thread 0. `parts`: kThreads floats of shared memory.
__device__ __forceinline__ float sum_over_block(float value, float* parts) {
  write_shared(parts + threadIdx.x, value);
  __syncthreads();
  float total = 0.0f;
  if (threadIdx.x < 32) {
    for (int i = 0; i < kWarps; ++i) total += read_shared(parts + 32 * i + threadIdx.x);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
  }
  return total;
}

// dg_nj = sum over the tiles of <P_n, W_j> + sum_l dm_nl . b_j; summed over the samples where they share their gates;
// zero where the gate is. Grid: (gate_rows * M).
template <class Element>
__global__ void __launch_bounds__(kThreads) gate_gradient(const ReductionArguments arguments) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const Shape shape = arguments.shape;
  const int block = static_cast<int>(blockIdx.x), expert = block % shape.experts, gate_row = block / shape.experts;
  const bool shared_row = arguments.gate_rows == 1;
  const int begin = shared_row ? 0 : gate_row, end = shared_row ? shape.samples : gate_row + 1;
  const uint16_t* bias = arguments.bias + static_cast<size_t>(expert) * shape.width;

  float sum = 0.0f;
  if (read_global(arguments.gates + blockIdx.x) != 0.0f) {
    for (size_t n = begin; n < static_cast<size_t>(end); ++n) {
      for (int i = threadIdx.x; i < arguments.tiles; i += kThreads) {
        sum += read_global(arguments.gate_parts + (n * shape.experts + expert) * arguments.tiles + i);
      }
      for (int d = threadIdx.x; d < shape.width; d += kThreads) {
        const float b = Element::unpack(read_global(bias + d)).x;
        sum = fmaf(read_global(arguments.dm_sums + n * shape.width + d), b, sum);
      }
    }
  }
  const float total = sum_over_block(sum, reinterpret_cast<float*>(shared_memory));
  if (threadIdx.x == 0) write_global(arguments.d_gates + blockIdx.x, total);
}

// db_j = sum_n g_nj sum_l dm_nl: 32 columns of a CTA, each summed by kWarps threads. Grid: (column blocks, M).
template <class Element>
__global__ void __launch_bounds__(kThreads) bias_gradient(const ReductionArguments arguments) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  float* parts = reinterpret_cast<float*>(shared_memory);
  const Shape shape = arguments.shape;
  const int blocks = ceil_div(shape.width, 32), lane = lane_index(), warp = warp_index();
  const int column = static_cast<int>(blockIdx.x) % blocks * 32 + lane;
  const int expert = static_cast<int>(blockIdx.x) / blocks;
  const size_t gate_stride = arguments.gate_rows == 1 ? 0 : shape.experts;

  float sum = 0.0f;
  if (column < shape.width) {
#pragma unroll 4
    for (int n = warp; n < shape.samples; n += kWarps) {
      const float gate = read_global(arguments.gates + n * gate_stride + expert);
      sum = fmaf(gate, read_global(arguments.dm_sums + static_cast<size_t>(n) * shape.width + column), sum);
    }
  }
  write_shared(parts + threadIdx.x, sum);
  __syncthreads();
  if (warp == 0 && column < shape.width) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += read_shared(parts + 32 * w + lane);
    const uint32_t rounded = Element::pack(total, 0.0f);
    write_global(arguments.d_bias + static_cast<size_t>(expert) * shape.width + column, static_cast<uint16_t>(rounded));
  }
}

// dW = sum of the splits' parts. A thread takes kVector elements.
template <class Element>
__global__ void __launch_bounds__(kThreads) sum_weight_parts(const ReductionArguments arguments) {
  const Shape shape = arguments.shape;
  const size_t size = static_cast<size_t>(shape.experts) * shape.width * shape.width;
  const size_t at = (static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector;
  if (at >= size) return;
  float sum[kVector] = {};
  for (int split = 0; split < arguments.splits; ++split) {
    const float4* from = reinterpret_cast<const float4*>(arguments.weight_parts + split * size + at);
    const float4 low = read_global(from), high = read_global(from + 1);
    const float values[kVector] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int v = 0; v < kVector; ++v) sum[v] += values[v];
  }
  write_global(reinterpret_cast<uint4*>(arguments.d_weight + at), pack<Element>(sum));
}

}  // namespace expert_mix
