// Tiles in shared memory and the products of their fragments, for all three matrix products.
#pragma once

#include <ptx.cuh>

namespace expert_mix {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kDepth = 32;      // of the inner dimension, per step
constexpr int kVector = 8;      // elements of 16 bits in an access of 16 bytes
constexpr int kPadding = 8;     // elements at the end of a row, see row_stride
constexpr int kMaxExperts = 64;
constexpr int kMaxWidth = 32768;  // offsets within a matrix fit into 32 bits

// A row is an odd number of 16-byte units long, so that eight rows that ldmatrix reads at once lie in eight different
// groups of banks. All widths of tiles are multiples of 16 elements.
__host__ __device__ constexpr int row_stride(int columns) { return columns + kPadding; }

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Shape {
  int samples, tokens, width, experts;  // N, L, D, M
};

__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / 32; }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % 32; }

template <class Element>
__device__ __forceinline__ void unpack(float (&values)[kVector], uint4 vector) {
  const uint32_t pairs[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 both = Element::unpack(pairs[i]);
    values[2 * i] = both.x;
    values[2 * i + 1] = both.y;
  }
}

template <class Element>
__device__ __forceinline__ uint4 pack(const float (&values)[kVector]) {
  return make_uint4(Element::pack(values[0], values[1]), Element::pack(values[2], values[3]),
                    Element::pack(values[4], values[5]), Element::pack(values[6], values[7]));
}

// Where threads that fill a tile stand in it, four to a row: rows 8 i + 1 and 8 i + 4, 8 i + 3 and 8 i + 6 have changed
// places. The two rows that eight threads write at once then lie four apart, in different groups of banks.
__device__ __forceinline__ int spread_row(int row) { return (row & ~5) | (row & 1) << 2 | (row & 4) >> 2; }

// Starts the copy of a tile that begins at `from`, in a matrix whose rows are `width` long and which ends `rows_left`
// rows below and `columns_left` columns beside it; what lies outside of the matrix becomes zero.
template <int kRows, int kColumns>
__device__ __forceinline__ void copy_tile(uint16_t* tile, const uint16_t* from, int rows_left, int columns_left,
                                          int width) {
  constexpr int kAcross = kColumns % 64 == 0 ? 8 : 4, kDown = kThreads / kAcross, kStep = kAcross * kVector;
  static_assert(kRows % kDown == 0 && kColumns % kStep == 0, "each thread copies as much");
  const int thread = static_cast<int>(threadIdx.x);
  const int row = kAcross == 8 ? thread / kAcross : spread_row(thread / kAcross), column = thread % kAcross * kVector;
  const int offset = row * width + column;
#pragma unroll
  for (int r = 0; r < kRows; r += kDown)
#pragma unroll
    for (int c = 0; c < kColumns; c += kStep) {
      copy_async(tile + (row + r) * row_stride(kColumns) + column + c, from + offset + r * width + c,
                 row + r < rows_left && column + c < columns_left);
    }
}

// How a tile lies in shared memory, as seen from a product's inner dimension.
enum class Inner { kAlongRows, kDownColumns };

// The 16 x 16 part at (outer, inner) of a tile whose rows are `stride` elements apart, in the order in which a product
// takes it as its left operand: matrices (outer, inner), (outer + 8, inner), (outer, inner + 8) and
// (outer + 8, inner + 8).
template <Inner kInner>
__device__ __forceinline__ void load_left(uint32_t (&part)[4], const uint16_t* tile, int stride, int outer, int inner) {
  const int lane = lane_index();
  if constexpr (kInner == Inner::kAlongRows) {
    load_matrices<false>(part, tile + (outer + lane % 16) * stride + inner + lane / 16 * 8);
  } else {
    load_matrices<true>(part, tile + (inner + lane % 8 + lane / 16 * 8) * stride + outer + lane / 8 % 2 * 8);
  }
}

// As load_left, for the right operand of two products: matrices (inner, outer), (inner + 8, outer), (inner, outer + 8),
// (inner + 8, outer + 8).
template <Inner kInner>
__device__ __forceinline__ void load_right(uint32_t (&part)[4], const uint16_t* tile, int stride, int outer,
                                           int inner) {
  const int lane = lane_index();
  if constexpr (kInner == Inner::kDownColumns) {
    load_matrices<true>(part, tile + (inner + lane % 16) * stride + outer + lane / 16 * 8);
  } else {
    load_matrices<false>(part, tile + (outer + lane % 8 + lane / 16 * 8) * stride + inner + lane / 8 % 2 * 8);
  }
}

// What a warp holds of a product: kDown x kAcross pieces of 16 x 8. Of a piece, lane l holds (row, column) =
// (l / 4, 2 (l % 4)), (l / 4, 2 (l % 4) + 1), and the same two columns of row l / 4 + 8.
template <int kDown, int kAcross>
struct Accumulator {
  float piece[kDown][kAcross][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int v = 0; v < 4; ++v) piece[i][j][v] = 0.0f;
  }

  // Adds left (16 kDown rows from `top`) times right (8 kAcross columns from `first`), 16 of the inner dimension.
  template <class Element, Inner kLeft, Inner kRight>
  __device__ __forceinline__ void add_product(const uint16_t* left, int left_stride, int top, const uint16_t* right,
                                              int right_stride, int first, int inner) {
    static_assert(kAcross % 2 == 0, "right operands are loaded in pairs");
    uint32_t a[kDown][4];
#pragma unroll
    for (int i = 0; i < kDown; ++i) load_left<kLeft>(a[i], left, left_stride, top + 16 * i, inner);
#pragma unroll
    for (int j = 0; j < kAcross; j += 2) {
      uint32_t b[4];
      load_right<kRight>(b, right, right_stride, first + 8 * j, inner);
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        Element::multiply_add(piece[i][j], a[i], b[0], b[1]);
        Element::multiply_add(piece[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
};

}  // namespace expert_mix
