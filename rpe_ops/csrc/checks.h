#pragma once

#include <ATen/core/Tensor.h>

#include "rpe_ops.h"

namespace rpe_ops {

// Validate the arguments and describe the call; TypeError or ValueError says what is wrong.
Problem check_rpe_index(const char* op, const at::Tensor& input, const at::Tensor& index);
Problem check_rpe_bucket_sum(const char* op, const at::Tensor& input, const at::Tensor& index, int64_t buckets);
// As check_rpe_index for tables that belong to keys: the rows of `input` are keys.
Problem check_by_key(const char* op, const at::Tensor& input, const at::Tensor& index);
// Raises unless `output` can be added to where it lies.
void check_output(const char* op, const at::Tensor& output, const at::Tensor& input, at::IntArrayRef sizes);

} // namespace rpe_ops
