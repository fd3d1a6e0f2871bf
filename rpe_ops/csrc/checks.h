#pragma once

#include <ATen/core/Tensor.h>

#include "rpe_ops.h"

namespace rpe_ops {

// Validate the arguments and describe the call; TypeError or ValueError says what is wrong.
Problem check_rpe_index(const at::Tensor& input, const at::Tensor& index);
Problem check_rpe_index_by_key(const at::Tensor& input, const at::Tensor& index);
Problem check_rpe_bucket_sum(const at::Tensor& input, const at::Tensor& index, int64_t buckets);
void check_output(const char* op, const at::Tensor& output, at::IntArrayRef sizes);

} // namespace rpe_ops
