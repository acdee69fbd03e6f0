// The fused expert mix for Python: checks, allocations, one call of expert_mix.h each. The stream comes as a number, so
// that no CUDA header is needed here. Tensors that are not contiguous or not aligned to 16 bytes are copied.
#include <torch/extension.h>

#include <c10/core/DeviceGuard.h>

#include <optional>
#include <tuple>

#include "expert_mix.h"

namespace {

using torch::Tensor;

Tensor checked(const Tensor& tensor, const char* name, at::IntArrayRef shape, at::ScalarType type,
               const Tensor& z) {
  TORCH_CHECK(tensor.sizes() == shape, name, " is ", tensor.sizes(), ", expected ", shape);
  TORCH_CHECK(tensor.scalar_type() == type, name, " is ", tensor.scalar_type(), ", expected ", type);
  TORCH_CHECK(tensor.device() == z.device(), name, " is on ", tensor.device(), ", z on ", z.device());
  const Tensor contiguous = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(contiguous.const_data_ptr()) % 16 == 0 ? contiguous : contiguous.clone();
}

struct Inputs {
  Tensor z, weight, bias, gates;
  ExpertMixSizes sizes;

  Tensor checked_as_z(const Tensor& tensor, const char* name) const {
    return checked(tensor, name, z.sizes(), z.scalar_type(), z);
  }
};

Inputs checked_inputs(const Tensor& z, const Tensor& weight, const Tensor& bias, const Tensor& gates) {
  const at::ScalarType type = z.scalar_type();
  TORCH_CHECK(z.dim() == 3, "z is ", z.sizes(), ", expected (N, L, D)");
  TORCH_CHECK(type == at::kBFloat16 || type == at::kHalf, "z is ", type, ", expected bfloat16 or float16");
  TORCH_CHECK(gates.dim() == 2, "gates is ", gates.sizes(), ", expected (N, M) or (1, M)");
  const int64_t samples = z.size(0), tokens = z.size(1), width = z.size(2), experts = gates.size(1);
  const int64_t gate_rows = gates.size(0) == 1 ? 1 : samples;
  TORCH_CHECK(samples <= INT32_MAX && tokens <= INT32_MAX && width <= INT32_MAX, "z is too large: ", z.sizes());
  const auto small = [](int64_t size) { return static_cast<int>(size); };
  return {checked(z, "z", z.sizes(), type, z),
          checked(weight, "weight", {experts, width, width}, type, z),
          checked(bias, "bias", {experts, width}, type, z),
          checked(gates, "gates", {gate_rows, experts}, at::kFloat, z),
          {small(samples), small(tokens), small(width), small(experts), small(gate_rows),
           type == at::kHalf ? EXPERT_MIX_FP16 : EXPERT_MIX_BF16}};
}

void check_ran(int error, const ExpertMixSizes& sizes) {
  TORCH_CHECK(error == 0, "expert_mix failed: ", expert_mix_error(error), " (N = ", sizes.samples,
              ", L = ", sizes.tokens, ", D = ", sizes.width, ", M = ", sizes.experts, ")");
}

void* stream_of(int64_t stream) { return reinterpret_cast<void*>(static_cast<intptr_t>(stream)); }

std::tuple<Tensor, Tensor> forward(const Tensor& z, const Tensor& weight, const Tensor& bias, const Tensor& gates,
                                   int64_t stream) {
  const Inputs in = checked_inputs(z, weight, bias, gates);
  const c10::DeviceGuard guard(z.device());
  Tensor routed = at::empty_like(in.z), mask = at::empty_like(in.z);
  check_ran(expert_mix_forward(in.sizes, in.z.const_data_ptr(), in.weight.const_data_ptr(), in.bias.const_data_ptr(),
                               in.gates.const_data_ptr<float>(), routed.mutable_data_ptr(), mask.mutable_data_ptr(),
                               stream_of(stream)),
            in.sizes);
  return {routed, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& d_routed, const std::optional<Tensor>& d_mask,
                                                    const Tensor& z,
                                                    const Tensor& weight, const Tensor& bias, const Tensor& gates,
                                                    const Tensor& mask, bool /*deterministic: it always is*/,
                                                    int64_t stream) {
  const Inputs in = checked_inputs(z, weight, bias, gates);
  const Tensor up_routed = in.checked_as_z(d_routed, "d_routed"), made_mask = in.checked_as_z(mask, "mask");
  const Tensor up_mask = d_mask ? in.checked_as_z(*d_mask, "d_mask") : Tensor();
  const c10::DeviceGuard guard(z.device());
  Tensor dz = at::empty_like(in.z), d_weight = at::empty_like(in.weight), d_bias = at::empty_like(in.bias),
         d_gates = at::empty_like(in.gates);
  const auto bytes = static_cast<int64_t>(expert_mix_workspace(in.sizes));
  Tensor workspace = at::empty({bytes}, z.options().dtype(at::kByte));
  check_ran(expert_mix_backward(in.sizes, up_routed.const_data_ptr(), d_mask ? up_mask.const_data_ptr() : nullptr,
                                in.z.const_data_ptr(), in.weight.const_data_ptr(), in.bias.const_data_ptr(),
                                in.gates.const_data_ptr<float>(), made_mask.const_data_ptr(), dz.mutable_data_ptr(),
                                d_weight.mutable_data_ptr(), d_bias.mutable_data_ptr(),
                                d_gates.mutable_data_ptr<float>(), workspace.mutable_data_ptr(), stream_of(stream)),
            in.sizes);
  return {dz, d_weight, d_bias, d_gates};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("forward", &forward, "(z, weight, bias, gates, stream) -> (routed, mask)");
  module.def("backward", &backward,
             "(d_routed, d_mask, z, weight, bias, gates, mask, deterministic, stream) -> "
             "(dz, d_weight, d_bias, d_gates)");
}
