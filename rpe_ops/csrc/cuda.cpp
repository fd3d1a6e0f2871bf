// The CUDA side of both operators.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>

#include "checks.h"
#include "cuda_kernels.h"

namespace rpe_ops {
namespace {

void check_grid(const Problem& p) {
  TORCH_CHECK_VALUE(p.queries <= std::numeric_limits<int32_t>::max(), "rpe_ops: at most 2^31-1 queries on CUDA, got ",
                    p.queries);
}

at::Tensor rpe_index_cuda(const at::Tensor& input, const at::Tensor& index) {
  const Problem p = check_rpe_index("rpe_index", input, index);
  check_grid(p);
  const c10::cuda::CUDAGuard guard(input.device());
  // PyTorch's attention copies a mask whose rows are not aligned, forward and backward
  const int64_t row = (p.keys + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
  const at::Tensor output = at::empty({input.size(0), input.size(1), p.queries, row}, input.options())
                                .slice(3, 0, p.keys);
  if (output.numel() == 0) return output;
  const at::Tensor ids = index.contiguous();
  launch_rpe_index(p, row, static_cast<int>(input.element_size()), ids.scalar_type() == at::kLong,
                   input.const_data_ptr(), ids.const_data_ptr(), output.mutable_data_ptr(),
                   c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

Type type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return Type::kDouble;
    case at::kFloat: return Type::kFloat;
    case at::kHalf: return Type::kHalf;
    default: return Type::kBFloat16;
  }
}

at::Tensor rpe_bucket_sum_cuda(const at::Tensor& input, const at::Tensor& index, int64_t num_buckets) {
  const Problem p = check_rpe_bucket_sum("rpe_bucket_sum", input, index, num_buckets);
  check_grid(p);
  const c10::cuda::CUDAGuard guard(input.device());
  at::Tensor output = at::empty({input.size(0), input.size(1), p.queries, p.buckets}, input.options());
  if (output.numel() == 0) return output;
  const at::Tensor ids = index.contiguous();
  launch_rpe_bucket_sum(p, type_of(input), ids.scalar_type() == at::kLong, input.const_data_ptr(), ids.const_data_ptr(),
                        output.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

} // namespace
} // namespace rpe_ops

TORCH_LIBRARY_IMPL(rpe_ops, CUDA, m) {
  m.impl("rpe_index", rpe_ops::rpe_index_cuda);
  m.impl("rpe_bucket_sum", rpe_ops::rpe_bucket_sum_cuda);
}
