// Entry points of the fused expert mix: which tiles, how many CTAs, in which order.
//   merged_product.cuh   forward pass and input gradient
//   weight_gradient.cuh  gradients of matrices and gates
//   reductions.cuh       gradient of the mask, and the sums
#include "expert_mix.h"

#include "merged_product.cuh"
#include "reductions.cuh"
#include "weight_gradient.cuh"

namespace expert_mix {
namespace {

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), size_t blocks, size_t shared_bytes, cudaStream_t stream,
                   const Arguments& arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  error = cudaLaunchKernelEx(&config, kernel, Arguments(arguments));
  return error != cudaSuccess ? error : cudaGetLastError();
}

cudaError_t count_multiprocessors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

bool supported(const ExpertMixSizes& sizes) {
  return sizes.samples >= 0 && sizes.tokens >= 1 && sizes.width >= kVector && sizes.width % kVector == 0 &&
         sizes.width <= kMaxWidth &&         sizes.experts >= 1 && sizes.experts <= kMaxExperts &&
         (sizes.gate_rows == sizes.samples || sizes.gate_rows == 1) &&
         (sizes.type == EXPERT_MIX_BF16 || sizes.type == EXPERT_MIX_FP16);
}

template <class Tile>
size_t product_blocks(const Shape& shape) {
  return static_cast<size_t>(ceil_div(shape.width, Tile::kColumns)) * ceil_div(shape.tokens, Tile::kRows) *
         shape.samples;
}

template <class Element, class Tile, bool kTransposed>
cudaError_t launch_tile(const ProductArguments& arguments, cudaStream_t stream) {
  return launch(merged_product<Element, Tile, kTransposed>, product_blocks<Tile>(arguments.shape),
                Tile::template shared_bytes<kTransposed>(), stream, arguments);
}

template <class Element, bool kTransposed>
cudaError_t launch_product(const ProductArguments& arguments, cudaStream_t stream) {
  if (arguments.shape.tokens <= LowTile::kRows) return launch_tile<Element, LowTile, kTransposed>(arguments, stream);
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  // one CTA at a time on each multiprocessor: waves of CTAs times the work of one
  const auto waves = [&](size_t blocks) { return (blocks + multiprocessors - 1) / multiprocessors; };
  const size_t wide = waves(product_blocks<WideTile>(arguments.shape)) * WideTile::kColumns;
  const size_t narrow = waves(product_blocks<NarrowTile>(arguments.shape)) * NarrowTile::kColumns;
  return narrow < wide ? launch_tile<Element, NarrowTile, kTransposed>(arguments, stream)
                       : launch_tile<Element, WideTile, kTransposed>(arguments, stream);
}

// How weight_gradient is spread over the device, and where its parts of sums lie in the workspace.
struct BackwardPlan {
  int tiles, groups, splits;
  size_t dm, dm_sums, gate_parts, weight_parts, bytes;  // offsets
};

template <class Tile>
BackwardPlan plan_backward(const Shape& shape, int multiprocessors) {
  BackwardPlan plan = {};
  plan.tiles = Tile::down(shape.width) * Tile::across(shape.width);
  plan.groups = Tile::groups(shape.experts);
  const int blocks = plan.tiles * plan.groups;
  // Waves of CTAs times the samples of one. A split costs its sums written and read: about those of one sample more.
  int best = 0;
  for (int splits = 1; splits <= 16 && (splits == 1 || splits <= shape.samples); ++splits) {
    const int cost = ceil_div(blocks * splits, multiprocessors) * (ceil_div(shape.samples, splits) + (splits > 1));
    if (splits == 1 || cost < best) {
      best = cost;
      plan.splits = splits;
    }
  }
  const auto place = [&](size_t bytes) {
    const size_t offset = plan.bytes;
    plan.bytes += (bytes + 255) / 256 * 256;
    return offset;
  };
  const size_t samples = shape.samples, width = shape.width, experts = shape.experts;
  plan.dm = place(samples * shape.tokens * width * 2);
  plan.dm_sums = place(samples * width * 4);
  plan.gate_parts = place(samples * experts * plan.tiles * 4);
  plan.weight_parts = place(plan.splits == 1 ? 0 : plan.splits * experts * width * width * 4);
  return plan;
}

cudaError_t plan_backward(const Shape& shape, BackwardPlan* plan) {
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(&multiprocessors);
  if (error == cudaSuccess) {
    *plan = shape.experts <= ThreeExperts::kExperts ? plan_backward<ThreeExperts>(shape, multiprocessors)
                                                    : plan_backward<FourExperts>(shape, multiprocessors);
  }
  return error;
}

template <class Element>
cudaError_t backward(const BackwardPlan& plan, const ReductionArguments& reduction, const ProductArguments& product,
                     const WeightGradientArguments& gradient, cudaStream_t stream) {
  const Shape shape = reduction.shape;
  const size_t samples = shape.samples, width = shape.width, experts = shape.experts;
  const size_t vectors = experts * width * (width / kVector);
  const auto in_turn = [](cudaError_t before, auto next) { return before != cudaSuccess ? before : next(); };
  cudaError_t error = launch(mask_gradient<Element>, samples * ceil_div(shape.width, kBlockColumns),
                             kMaskGradientBytes, stream, reduction);
  error = in_turn(error, [&] { return launch_product<Element, true>(product, stream); });
  error = in_turn(error, [&] {
    const size_t blocks = static_cast<size_t>(plan.tiles) * plan.groups * plan.splits;
    return shape.experts <= ThreeExperts::kExperts
               ? launch(weight_gradient<Element, ThreeExperts>, blocks, ThreeExperts::kSharedBytes, stream, gradient)
               : launch(weight_gradient<Element, FourExperts>, blocks, FourExperts::kSharedBytes, stream, gradient);
  });
  if (plan.splits > 1) {
    error = in_turn(error, [&] {
      return launch(sum_weight_parts<Element>, (vectors + kThreads - 1) / kThreads, 0, stream, reduction);
    });
  }
  error = in_turn(error, [&] {
    return launch(bias_gradient<Element>, experts * ceil_div(shape.width, 32), kThreads * 4, stream, reduction);
  });
  return in_turn(error, [&] {
    return launch(gate_gradient<Element>, reduction.gate_rows * experts, kThreads * 4, stream, reduction);
  });
}

const uint16_t* elements(const void* pointer) { return static_cast<const uint16_t*>(pointer); }
uint16_t* elements(void* pointer) { return static_cast<uint16_t*>(pointer); }

}  // namespace
}  // namespace expert_mix

using namespace expert_mix;

extern "C" int expert_mix_forward(ExpertMixSizes sizes, const void* z, const void* weight, const void* bias,
                                  const float* gates, void* routed, void* mask, void* stream) {
  if (!supported(sizes)) return cudaErrorInvalidValue;
  ProductArguments arguments = {};
  arguments.shape = {sizes.samples, sizes.tokens, sizes.width, sizes.experts};
  arguments.rows = arguments.factor = elements(z);
  arguments.weight = elements(weight);
  arguments.bias = elements(bias);
  arguments.gates = gates;
  arguments.gate_stride = sizes.gate_rows == 1 ? 0 : sizes.experts;
  arguments.out = elements(routed);
  arguments.mask_out = elements(mask);
  const auto on = static_cast<cudaStream_t>(stream);
  return sizes.type == EXPERT_MIX_BF16 ? launch_product<Bf16, false>(arguments, on)
                                       : launch_product<Fp16, false>(arguments, on);
}

extern "C" size_t expert_mix_workspace(ExpertMixSizes sizes) {
  BackwardPlan plan = {};
  const bool possible = supported(sizes) &&
                        plan_backward({sizes.samples, sizes.tokens, sizes.width, sizes.experts}, &plan) == cudaSuccess;
  return possible ? plan.bytes : 0;
}

extern "C" int expert_mix_backward(ExpertMixSizes sizes, const void* d_routed, const void* d_mask, const void* z,
                                   const void* weight, const void* bias, const float* gates, const void* mask,
                                   void* dz, void* d_weight, void* d_bias, float* d_gates, void* workspace,
                                   void* stream) {
  if (!supported(sizes)) return cudaErrorInvalidValue;
  const Shape shape = {sizes.samples, sizes.tokens, sizes.width, sizes.experts};
  BackwardPlan plan = {};
  const cudaError_t error = plan_backward(shape, &plan);
  if (error != cudaSuccess) return error;
  char* base = static_cast<char*>(workspace);

  ReductionArguments reduction = {};
  reduction.shape = shape;
  reduction.d_routed = elements(d_routed);
  reduction.d_mask = elements(d_mask);
  reduction.z = elements(z);
  reduction.bias = elements(bias);
  reduction.gates = gates;
  reduction.gate_rows = sizes.gate_rows;
  reduction.dm = reinterpret_cast<uint16_t*>(base + plan.dm);
  reduction.dm_sums = reinterpret_cast<float*>(base + plan.dm_sums);
  reduction.gate_parts = reinterpret_cast<float*>(base + plan.gate_parts);
  reduction.tiles = plan.tiles;
  reduction.weight_parts = reinterpret_cast<float*>(base + plan.weight_parts);
  reduction.splits = plan.splits;
  reduction.d_weight = elements(d_weight);
  reduction.d_bias = elements(d_bias);
  reduction.d_gates = d_gates;

  ProductArguments product = {};
  product.shape = shape;
  product.rows = reduction.dm;
  product.weight = elements(weight);
  product.gates = gates;
  product.gate_stride = sizes.gate_rows == 1 ? 0 : sizes.experts;
  product.factor = elements(d_routed);
  product.mask = elements(mask);
  product.out = elements(dz);

  WeightGradientArguments gradient = {};
  gradient.shape = shape;
  gradient.z = elements(z);
  gradient.dm = reduction.dm;
  gradient.weight = elements(weight);
  gradient.gates = gates;
  gradient.gate_stride = product.gate_stride;
  gradient.gate_parts = reinterpret_cast<float*>(base + plan.gate_parts);
  gradient.d_weight = elements(d_weight);
  gradient.weight_parts = reinterpret_cast<float*>(base + plan.weight_parts);
  gradient.splits = plan.splits;

  const auto on = static_cast<cudaStream_t>(stream);
  return sizes.type == EXPERT_MIX_BF16 ? backward<Bf16>(plan, reduction, product, gradient, on)
                                       : backward<Fp16>(plan, reduction, product, gradient, on);
}

extern "C" const char* expert_mix_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
