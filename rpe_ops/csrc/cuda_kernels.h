// What cuda.cpp asks of cuda_kernels.cu: launches on raw device pointers, so that nvcc reads no PyTorch header but
// those of the number types.
#pragma once

#include <cuda_runtime_api.h>

#include "rpe_ops.h"

namespace rpe_ops {

enum class Type { kDouble, kFloat, kHalf, kBFloat16 };

// index is contiguous (queries, keys), of int64 if wide_index, else of int32; outputs are contiguous but for the
// output's rows of rpe_index, of which each begins `row` elements after the one before.
void launch_rpe_index(const Problem& p, int64_t row, int element_size, bool wide_index, const void* input,
                      const void* index, void* output, cudaStream_t stream);
void launch_rpe_bucket_sum(const Problem& p, Type type, bool wide_index, const void* input, const void* index,
                           void* output, cudaStream_t stream);

} // namespace rpe_ops
