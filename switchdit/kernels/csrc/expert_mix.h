// The fused expert mix as plain C functions: no header of PyTorch is needed to compile them.
//
//   z, routed, mask, d_* of these (N, L, D), weight (M, D, D), bias (M, D): of 16-bit elements, contiguous, aligned to
//   16 bytes, D % 8 == 0.   gates, d_gates (gate_rows, M) float32; gate_rows is N or 1.   M <= 64.
//   All work is queued on `stream` (a cudaStream_t). Returns a cudaError_t; cudaErrorInvalidValue (1) for sizes that
//   are not supported.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum ExpertMixType { EXPERT_MIX_BF16 = 0, EXPERT_MIX_FP16 = 1 };

struct ExpertMixSizes {
  int samples, tokens, width, experts;  // N, L, D, M
  int gate_rows;
  int type;  // ExpertMixType
};

int expert_mix_forward(struct ExpertMixSizes sizes, const void* z, const void* weight, const void* bias,
                       const float* gates, void* routed, void* mask, void* stream);

// Bytes of device memory that expert_mix_backward needs for its own use on the current device; 0 if it cannot run.
size_t expert_mix_workspace(struct ExpertMixSizes sizes);

// d_gates is zero where gates are zero; a null d_mask stands for zeros. Every run gives the same bits.
int expert_mix_backward(struct ExpertMixSizes sizes, const void* d_routed, const void* d_mask, const void* z,
                        const void* weight, const void* bias, const float* gates, const void* mask, void* dz,
                        void* d_weight, void* d_bias, float* d_gates, void* workspace, void* stream);

// What a cudaError_t means.
const char* expert_mix_error(int code);

#ifdef __cplusplus
}
#endif
