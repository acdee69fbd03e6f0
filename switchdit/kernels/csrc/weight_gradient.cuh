// Gradients of the experts' matrices and of the gates, from one product per sample:
//
//   P_n = z_n^T dm_n,     dW_j = sum_n g_nj P_n,     dg_nj = <P_n, W_j>   (its part in the bias: reductions.cuh)
//
// A CTA owns a tile of kRows x kColumns of up to kExperts matrices and walks over samples. P_n and the running sums of
// the kExperts gradients all stay in registers, the tiles of W_j in shared memory: nothing but the tokens is read, and
// no sum is shared between CTAs, so that no atomic is needed and every run gives the same bits. With more than kExperts
// experts, groups of them go to different CTAs, which skip the samples that chose none of the group.
#pragma once

#include "tiles.cuh"

namespace expert_mix {

struct WeightGradientArguments {
  const uint16_t* z;         // (N, L, D)
  const uint16_t* dm;        // (N, L, D)
  const uint16_t* weight;    // (M, D, D)
  const float* gates;        // (N, M), or (1, M) with gate_stride 0
  size_t gate_stride;
  float* gate_parts;         // (N, M, tiles), written where a gate is not zero
  uint16_t* d_weight;        // (M, D, D), written where splits is 1
  float* weight_parts;       // (splits, M, D, D), written otherwise
  int splits;                // of the samples
  Shape shape;
};

template <int kExperts_, int kRows_, int kColumns_, int kWarpsDown_>
struct GradientTile {
  static constexpr int kExperts = kExperts_, kRows = kRows_, kColumns = kColumns_, kStages = 3;
  static constexpr int kWarpsAcross = kWarps / kWarpsDown_;
  static constexpr int kWarpRows = kRows / kWarpsDown_, kWarpColumns = kColumns / kWarpsAcross;
  static constexpr int kLeftSize = kDepth * row_stride(kRows), kRightSize = kDepth * row_stride(kColumns);
  static constexpr int kStageSize = kLeftSize + kRightSize;
  static constexpr int kWeightSize = kRows * row_stride(kColumns);  // of one expert
  static constexpr int kSharedBytes = (kStages * kStageSize + kExperts * kWeightSize) * 2 + kWarps * kExperts * 4;

  static __host__ __device__ constexpr int down(int width) { return ceil_div(width, kRows); }
  static __host__ __device__ constexpr int across(int width) { return ceil_div(width, kColumns); }
  static __host__ __device__ constexpr int groups(int experts) { return ceil_div(experts, kExperts); }
};

using ThreeExperts = GradientTile<3, 192, 64, 4>;  // 48 x 32 of a warp: 192 of its threads' registers hold sums
using FourExperts = GradientTile<4, 128, 64, 4>;   // 32 x 32 of a warp: 160

// Where a CTA is on its way over the samples that chose an expert of its group, kDepth tokens at a time.
struct Walk {
  int sample, token;

  __device__ __forceinline__ void skip_unchosen(const WeightGradientArguments& arguments, int first, int experts,
                                                int end) {
    for (; sample < end; ++sample) {
      for (int e = 0; e < experts; ++e) {
        if (read_global(arguments.gates + sample * arguments.gate_stride + first + e) != 0.0f) return;
      }
    }
  }
};

// Grid: tiles fastest, then groups of experts, then splits: the CTAs that run together read the same samples.
template <class Element, class Tile>
__global__ void __launch_bounds__(kThreads, 1) weight_gradient(const WeightGradientArguments arguments) {
  constexpr int kLeftStride = row_stride(Tile::kRows), kRightStride = row_stride(Tile::kColumns);
  extern __shared__ __align__(128) unsigned char shared_memory[];
  uint16_t* ring = reinterpret_cast<uint16_t*>(shared_memory);
  uint16_t* weights = ring + Tile::kStages * Tile::kStageSize;
  float* dots = reinterpret_cast<float*>(weights + Tile::kExperts * Tile::kWeightSize);  // (kWarps, kExperts)

  const Shape shape = arguments.shape;
  const int width = shape.width;
  const int across = Tile::across(width), tiles = Tile::down(width) * across, groups = Tile::groups(shape.experts);
  const int block = static_cast<int>(blockIdx.x);
  const int tile = block % tiles, split = block / tiles / groups;
  const int row = tile / across * Tile::kRows, column = tile % across * Tile::kColumns;
  const int first_expert = block / tiles % groups * Tile::kExperts;
  const int experts = min(Tile::kExperts, shape.experts - first_expert);
  const int begin = static_cast<int>(static_cast<long long>(shape.samples) * split / arguments.splits);
  const int end = static_cast<int>(static_cast<long long>(shape.samples) * (split + 1) / arguments.splits);
  const size_t matrix = static_cast<size_t>(width) * width, sample_size = static_cast<size_t>(shape.tokens) * width;

  const int thread = static_cast<int>(threadIdx.x), warp = warp_index(), lane = lane_index();
  const int warp_top = warp / Tile::kWarpsAcross * Tile::kWarpRows;
  const int warp_first = warp % Tile::kWarpsAcross * Tile::kWarpColumns;
  using Sums = Accumulator<Tile::kWarpRows / 16, Tile::kWarpColumns / 8>;

  Walk loading{begin, 0};
  loading.skip_unchosen(arguments, first_expert, experts, end);
  Walk computing = loading;
  auto copy_tokens = [&](int slot) {
    if (loading.sample < end) {
      uint16_t* left = ring + slot * Tile::kStageSize;
      const size_t offset = loading.sample * sample_size + static_cast<size_t>(loading.token) * width;
      const int tokens_left = shape.tokens - loading.token;
      copy_tile<kDepth, Tile::kRows>(left, arguments.z + offset + row, tokens_left, width - row, width);
      copy_tile<kDepth, Tile::kColumns>(left + Tile::kLeftSize, arguments.dm + offset + column, tokens_left,
                                        width - column, width);
      loading.token += kDepth;
      if (loading.token >= shape.tokens) {
        loading = {loading.sample + 1, 0};
        loading.skip_unchosen(arguments, first_expert, experts, end);
      }
    }
    commit_copies();
  };
  for (int e = 0; e < experts; ++e) {
    const uint16_t* from = arguments.weight + (first_expert + e) * matrix + static_cast<size_t>(row) * width + column;
    copy_tile<Tile::kRows, Tile::kColumns>(weights + e * Tile::kWeightSize, from, width - row, width - column, width);
  }
#pragma unroll
  for (int slot = 0; slot < Tile::kStages - 1; ++slot) copy_tokens(slot);

  Sums product, totals[Tile::kExperts];
  product.clear();
#pragma unroll
  for (int e = 0; e < Tile::kExperts; ++e) totals[e].clear();

  for (int slot = 0; computing.sample < end; slot = slot + 1 == Tile::kStages ? 0 : slot + 1) {
    // these tokens have come; the place that is filled next is read no more
    wait_for_copies<Tile::kStages - 2>();
    __syncthreads();
    copy_tokens(slot == 0 ? Tile::kStages - 1 : slot - 1);
    const uint16_t* left = ring + slot * Tile::kStageSize;
#pragma unroll
    for (int inner = 0; inner < kDepth; inner += 16) {
      product.template add_product<Element, Inner::kDownColumns, Inner::kDownColumns>(
          left, kLeftStride, warp_top, left + Tile::kLeftSize, kRightStride, warp_first, inner);
    }
    computing.token += kDepth;
    if (computing.token < shape.tokens) continue;

    const float* gates = arguments.gates + computing.sample * arguments.gate_stride + first_expert;
#pragma unroll
    for (int e = 0; e < Tile::kExperts; ++e) {
      const float gate = e < experts ? read_global(gates + e) : 0.0f;
      if (gate == 0.0f) continue;
      float2 halves = make_float2(0.0f, 0.0f);  // two chains of additions, half as long
#pragma unroll
      for (int i = 0; i < Tile::kWarpRows / 16; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kWarpColumns / 8; j += 2) {
          uint32_t pairs[4];  // of W_j, where this lane holds P_n: upper and lower half of piece j, then of piece j + 1
          load_left<Inner::kAlongRows>(pairs, weights + e * Tile::kWeightSize, kRightStride, warp_top + 16 * i,
                                       warp_first + 8 * j);
#pragma unroll
          for (int p = 0; p < 4; ++p) {
            const float* piece = &product.piece[i][j + p / 2][p % 2 * 2];
            float* total = &totals[e].piece[i][j + p / 2][p % 2 * 2];
            const float2 pair = Element::unpack(pairs[p]);
            halves.x = fmaf(piece[0], pair.x, halves.x);
            halves.y = fmaf(piece[1], pair.y, halves.y);
            total[0] = fmaf(gate, piece[0], total[0]);
            total[1] = fmaf(gate, piece[1], total[1]);
          }
        }
      float dot = halves.x + halves.y;
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, distance);
      if (lane == 0) write_shared(dots + warp * Tile::kExperts + e, dot);
    }
    __syncthreads();
    if (thread < experts && read_global(gates + thread) != 0.0f) {
      float dot = 0.0f;
      for (int w = 0; w < kWarps; ++w) dot += read_shared(dots + w * Tile::kExperts + thread);
      const size_t gate = static_cast<size_t>(computing.sample) * shape.experts + first_expert + thread;
      write_global(arguments.gate_parts + gate * tiles + tile, dot);
    }
    product.clear();
    computing = {computing.sample + 1, 0};
    computing.skip_unchosen(arguments, first_expert, experts, end);
  }
  wait_for_copies<0>();  // where no sample chose an expert of this group

#pragma unroll
  for (int e = 0; e < Tile::kExperts; ++e) {
    if (e >= experts) break;
#pragma unroll
    for (int i = 0; i < Tile::kWarpRows / 16; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kWarpColumns / 8; ++j)
#pragma unroll
        for (int low = 0; low < 2; ++low) {
          const int r = row + warp_top + 16 * i + lane / 4 + 8 * low, c = column + warp_first + 8 * j + lane % 4 * 2;
          if (r >= width || c >= width) continue;
          const float2 pair = make_float2(totals[e].piece[i][j][2 * low], totals[e].piece[i][j][2 * low + 1]);
          const size_t at = (first_expert + e) * matrix + static_cast<size_t>(r) * width + c;
          if (arguments.splits == 1) {
            write_global(reinterpret_cast<uint32_t*>(arguments.d_weight + at), Element::pack(pair.x, pair.y));
          } else {
            write_global(reinterpret_cast<float2*>(arguments.weight_parts + split * shape.experts * matrix + at), pair);
          }
        }
  }
}

}  // namespace expert_mix
