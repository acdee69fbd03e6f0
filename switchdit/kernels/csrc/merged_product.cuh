// Forward pass and input gradient: rows times the merged matrix of their sample, and what is made of it on the spot.
//
//   forward:         mask_n   = 1 + z_n (sum_j g_nj W_j) + sum_j g_nj b_j,     routed_n = z_n * mask_n
//   input gradient:  dz_n     = dm_n (sum_j g_nj W_j)^T + d_routed_n * mask_n
//
// A CTA makes kRows tokens x kColumns columns of one sample, in steps of kDepth of the inner dimension. The tokens come
// by cp.async in a ring of kStages; the tile of the merged matrix is summed in registers from the tiles of the chosen
// experts, whose reads hide behind the products of the step before, and is rounded once, on its way into shared memory.
#pragma once

#include "tiles.cuh"

namespace expert_mix {

struct ProductArguments {
  const uint16_t* rows;    // (N, L, D): z; dm for the input gradient
  const uint16_t* weight;  // (M, D, D)
  const uint16_t* bias;    // (M, D), forward alone
  const float* gates;      // (N, M), or (1, M) with gate_stride 0
  size_t gate_stride;
  const uint16_t* factor;  // (N, L, D): z; d_routed for the input gradient
  const uint16_t* mask;    // (N, L, D), input gradient alone
  uint16_t* out;           // (N, L, D): routed; dz
  uint16_t* mask_out;      // (N, L, D), forward alone
  Shape shape;
};

struct ChosenExperts {  // in shared memory
  const uint16_t* matrix[kMaxExperts];
  float gate[kMaxExperts];
  int expert[kMaxExperts];
  int count;
};

template <int kRows_, int kColumns_, int kWarpsDown_>
struct ProductTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kWarpsDown = kWarpsDown_, kStages = 3;
  static constexpr int kWarpRows = kRows / kWarpsDown, kWarpColumns = kColumns / (kWarps / kWarpsDown);
  static constexpr int kRingStage = kRows * row_stride(kDepth);
  // half a warp writes 16 pairs of floats in 4 rows at once: rows that are 8 or 24 banks apart do not meet
  static constexpr int kStagedStride = kWarpColumns + 8;
  static constexpr int kStaged = 16 * kStagedStride;  // floats, of each warp

  template <bool kTransposed>
  struct Merged {  // the tile of the merged matrix: (kDepth, kColumns), or its transpose
    static constexpr int kTileRows = kTransposed ? kColumns : kDepth, kTileColumns = kTransposed ? kDepth : kColumns;
    static constexpr int kStride = row_stride(kTileColumns), kSize = kTileRows * kStride;
    // half a CTA fills a square of kDepth x kDepth at once, 8 elements a thread
    static constexpr int kSquares = kColumns / kDepth, kPieces = ceil_div(kSquares, 2);
    static constexpr bool kRowsInner = !kTransposed;
    static constexpr int kBytes = 2 * kSize * 2;  // two tiles of 16-bit elements
  };

  // the ring makes room for the staged products in the end
  static constexpr int kRingBytes = kStages * kRingStage * 2, kStagedBytes = kWarps * kStaged * 4;
  static constexpr int kFirstBytes = kRingBytes > kStagedBytes ? kRingBytes : kStagedBytes;

  template <bool kTransposed>
  static constexpr int shared_bytes() {
    return kFirstBytes + Merged<kTransposed>::kBytes + kColumns * 4 + static_cast<int>(sizeof(ChosenExperts));
  }
};

using WideTile = ProductTile<256, 128, 4>;
using NarrowTile = ProductTile<256, 96, 4>;  // less left over where 128 columns fill the last wave of CTAs badly
using LowTile = ProductTile<64, 128, 2>;     // few tokens

// The non-zero ones of the sample's gates, in order. One warp.
__device__ __forceinline__ void choose_experts(ChosenExperts* chosen, const float* gates,
                                               const ProductArguments& arguments) {
  const int lane = lane_index(), experts = arguments.shape.experts;
  const size_t size = static_cast<size_t>(arguments.shape.width) * arguments.shape.width;
  int count = 0;
  for (int first = 0; first < experts; first += 32) {
    const int expert = first + lane;
    const float gate = expert < experts ? read_global(gates + expert) : 0.0f;
    const unsigned found = __ballot_sync(0xffffffffu, gate != 0.0f);
    if (gate != 0.0f) {
      const int slot = count + __popc(found & ((1u << lane) - 1u));
      write_shared(&chosen->gate[slot], gate);
      write_shared(&chosen->expert[slot], expert);
      write_shared(&chosen->matrix[slot], arguments.weight + expert * size);
    }
    count += __popc(found);
  }
  if (lane == 0) write_shared(&chosen->count, count);
}

// A thread's share of one tile of the merged matrix, while it is summed. At most two experts are on their way at once.
template <class Element, class Merged>
struct MergedPieces {
  float sum[Merged::kPieces][kVector];
  uint4 raw[2][Merged::kPieces];
  int row, column, square;  // its place in the square, and the first of its squares
  int offset;               // of its first element, from the beginning of the tile in a matrix
  int square_offset;        // from one of its squares to the next
  int inside;               // how many of its squares lie inside of the matrix

  // The tile begins at column `first` (row, if transposed) of the matrix.
  __device__ __forceinline__ MergedPieces(int first, int width) {
    const int thread = static_cast<int>(threadIdx.x);
    row = spread_row(thread % (kThreads / 2) / 4);
    column = thread % 4 * kVector;
    square = thread / (kThreads / 2);
    square_offset = 2 * kDepth * (Merged::kRowsInner ? 1 : width);
    offset = row * width + column + square * square_offset / 2;
    const int outer = first + square * kDepth + (Merged::kRowsInner ? column : row);
    inside = min(Merged::kPieces - (Merged::kSquares % 2 && square), max(0, ceil_div(width - outer, 2 * kDepth)));
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int p = 0; p < Merged::kPieces; ++p)
#pragma unroll
      for (int v = 0; v < kVector; ++v) sum[p][v] = 0.0f;
  }

  // Starts to read the tile at `tile` elements into the matrices, with `inner_left` of the inner dimension left from
  // there on, of the experts that are chosen at `first` and `first + 1`.
  __device__ __forceinline__ void read(const ChosenExperts* chosen, int first, int count, size_t tile, int inner_left) {
    const int readable = (Merged::kRowsInner ? row : column) < inner_left ? inside : 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (first + e >= count) break;
      const uint16_t* from = read_shared(&chosen->matrix[first + e]) + tile + offset;
#pragma unroll
      for (int p = 0; p < Merged::kPieces; ++p) {
        raw[e][p] = p < readable ? read_once(from + p * square_offset) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  __device__ __forceinline__ void add(const ChosenExperts* chosen, int first, int count) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (first + e >= count) break;
      const float gate = read_shared(&chosen->gate[first + e]);
#pragma unroll
      for (int p = 0; p < Merged::kPieces; ++p) {
        if (beyond(p)) break;
        float values[kVector];
        unpack<Element>(values, raw[e][p]);
#pragma unroll
        for (int v = 0; v < kVector; ++v) sum[p][v] = fmaf(gate, values[v], sum[p][v]);
      }
    }
  }

  __device__ __forceinline__ void write(uint16_t* tile) const {
    uint16_t* to = tile + row * Merged::kStride + column;
#pragma unroll
    for (int p = 0; p < Merged::kPieces; ++p) {
      if (beyond(p)) break;
      const int shift = (square + 2 * p) * kDepth * (Merged::kRowsInner ? 1 : Merged::kStride);
      write_shared(reinterpret_cast<uint4*>(to + shift), pack<Element>(sum[p]));
    }
  }

 private:
  // With an odd number of squares the second half of the CTA has one less. The same for all of a warp.
  __device__ __forceinline__ bool beyond(int piece) const {
    return Merged::kSquares % 2 && piece == Merged::kPieces - 1 && square == 1;
  }
};

// What is made of 8 neighbouring columns of the product, at `offset` of the (N, L, D) tensors.
template <class Element, bool kTransposed>
__device__ __forceinline__ void finish(const ProductArguments& arguments, size_t offset, float (&product)[kVector],
                                       const float* merged_bias) {
  float factor[kVector];
  unpack<Element>(factor, read_once(arguments.factor + offset));
  if constexpr (kTransposed) {
    float mask[kVector];
    unpack<Element>(mask, read_once(arguments.mask + offset));
#pragma unroll
    for (int v = 0; v < kVector; ++v) product[v] = fmaf(factor[v], mask[v], product[v]);
  } else {
#pragma unroll
    for (int v = 0; v < kVector; ++v) product[v] += 1.0f + read_shared(merged_bias + v);
    write_global(reinterpret_cast<uint4*>(arguments.mask_out + offset), pack<Element>(product));
#pragma unroll
    for (int v = 0; v < kVector; ++v) product[v] *= factor[v];
  }
  write_global(reinterpret_cast<uint4*>(arguments.out + offset), pack<Element>(product));
}

// Grid: column tiles fastest, then token tiles, then samples: the CTAs that run together read the tokens of few samples
// and, of the experts, all that these chose; both stay in L2.
template <class Element, class Tile, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 1) merged_product(const ProductArguments arguments) {
  using Merged = typename Tile::template Merged<kTransposed>;
  constexpr Inner kRight = kTransposed ? Inner::kAlongRows : Inner::kDownColumns;

  extern __shared__ __align__(128) unsigned char shared_memory[];
  uint16_t* ring = reinterpret_cast<uint16_t*>(shared_memory);
  uint16_t* merged = reinterpret_cast<uint16_t*>(shared_memory + Tile::kFirstBytes);
  float* merged_bias = reinterpret_cast<float*>(shared_memory + Tile::kFirstBytes + Merged::kBytes);
  ChosenExperts* chosen = reinterpret_cast<ChosenExperts*>(merged_bias + Tile::kColumns);

  const Shape shape = arguments.shape;
  const int width = shape.width;
  const int column_tiles = ceil_div(width, Tile::kColumns), token_tiles = ceil_div(shape.tokens, Tile::kRows);
  const int block = static_cast<int>(blockIdx.x);
  const int column = block % column_tiles * Tile::kColumns;
  const int token = block / column_tiles % token_tiles * Tile::kRows;
  const size_t sample = static_cast<size_t>(block / column_tiles / token_tiles);
  const size_t sample_offset = sample * shape.tokens * width;

  const uint16_t* rows = arguments.rows + sample_offset + static_cast<size_t>(token) * width;
  const int steps = ceil_div(width, kDepth);
  auto copy_rows = [&](int step) {
    if (step < steps) {
      copy_tile<Tile::kRows, kDepth>(ring + step % Tile::kStages * Tile::kRingStage, rows + step * kDepth,
                                     shape.tokens - token, width - step * kDepth, width);
    }
    commit_copies();
  };
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) copy_rows(step);

  if (warp_index() == 0) choose_experts(chosen, arguments.gates + sample * arguments.gate_stride, arguments);
  __syncthreads();
  const int count = read_shared(&chosen->count);
  if (!kTransposed && static_cast<int>(threadIdx.x) < Tile::kColumns) {
    const int c = column + static_cast<int>(threadIdx.x);
    float sum = 0.0f;
    for (int i = 0; i < count && c < width; ++i) {
      const size_t at = static_cast<size_t>(read_shared(&chosen->expert[i])) * width + c;
      sum = fmaf(read_shared(&chosen->gate[i]), Element::unpack(read_global(arguments.bias + at)).x, sum);
    }
    write_shared(merged_bias + threadIdx.x, sum);
  }

  MergedPieces<Element, Merged> pieces(column, width);
  auto read_experts = [&](int step, int first) {
    const int inner = step * kDepth;
    const size_t tile = kTransposed ? static_cast<size_t>(column) * width + inner
                                    : static_cast<size_t>(inner) * width + column;
    pieces.read(chosen, first, count, tile, width - inner);
  };
  pieces.clear();
  for (int first = 0; first < count; first += 2) {
    read_experts(0, first);
    pieces.add(chosen, first, count);
  }
  pieces.write(merged);

  constexpr int kAcrossWarps = kWarps / Tile::kWarpsDown;
  const int warp_top = warp_index() / kAcrossWarps * Tile::kWarpRows;
  const int warp_first = warp_index() % kAcrossWarps * Tile::kWarpColumns;
  Accumulator<Tile::kWarpRows / 16, Tile::kWarpColumns / 8> product;
  product.clear();
  for (int step = 0; step < steps; ++step) {
    // this step's tokens have come and its merged tile is written; the places that are filled next are read no more
    wait_for_copies<Tile::kStages - 2>();
    __syncthreads();
    copy_rows(step + Tile::kStages - 1);

    const uint16_t* left = ring + step % Tile::kStages * Tile::kRingStage;
    const uint16_t* right = merged + step % 2 * Merged::kSize;
    const int ahead = step + 1 < steps ? count : 0;  // experts to read for the next step
    pieces.clear();
#pragma unroll
    for (int half = 0; half < kDepth / 16; ++half) {
      if (2 * half < ahead) read_experts(step + 1, 2 * half);
      product.template add_product<Element, Inner::kAlongRows, kRight>(left, row_stride(kDepth), warp_top, right,
                                                                       Merged::kStride, warp_first, 16 * half);
      pieces.add(chosen, 2 * half, ahead);
    }
    for (int first = 2 * (kDepth / 16); first < ahead; first += 2) {
      read_experts(step + 1, first);
      pieces.add(chosen, first, ahead);
    }
    pieces.write(merged + (step + 1) % 2 * Merged::kSize);
  }

  // From fragments to whole rows, 16 at a time, so that each access to device memory has 16 bytes.
  __syncthreads();
  float* staged = reinterpret_cast<float*>(shared_memory) + warp_index() * Tile::kStaged;
  const int lane = lane_index();
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows / 16; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kWarpColumns / 8; ++j) {
      const float(&piece)[4] = product.piece[i][j];
      float* to = staged + lane / 4 * Tile::kStagedStride + 8 * j + lane % 4 * 2;
      write_shared(reinterpret_cast<float2*>(to), make_float2(piece[0], piece[1]));
      write_shared(reinterpret_cast<float2*>(to + 8 * Tile::kStagedStride), make_float2(piece[2], piece[3]));
    }
    __syncwarp();
    constexpr int kRowVectors = Tile::kWarpColumns / kVector;
#pragma unroll
    for (int vector = lane; vector < 16 * kRowVectors; vector += 32) {
      const int r = vector / kRowVectors, c = vector % kRowVectors * kVector;
      const int t = token + warp_top + 16 * i + r, d = column + warp_first + c;
      if (t < shape.tokens && d < width) {
        const float4* from = reinterpret_cast<const float4*>(staged + r * Tile::kStagedStride + c);
        const float4 low = read_shared(from), high = read_shared(from + 1);
        float values[kVector] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        finish<Element, kTransposed>(arguments, sample_offset + static_cast<size_t>(t) * width + d, values,
                                     merged_bias + warp_first + c);
      }
    }
    __syncwarp();
  }
}

}  // namespace expert_mix
