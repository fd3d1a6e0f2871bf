// Schemas and checks of both operators. Autograd and the fake versions are in Python (rpe_index.py).
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "checks.h"

namespace rpe_ops {
namespace {

// The CPU kernels' int32 table offsets and the CUDA kernels' grids reach a little further.
constexpr int64_t kMaxBuckets = int64_t{1} << 22;

Problem check(const char* op, const at::Tensor& input, const at::Tensor& index, int64_t buckets) {
  const auto type = input.scalar_type(), id_type = index.scalar_type();
  TORCH_CHECK_VALUE(input.dim() == 4, op, ": input must have 4 dimensions (batch, heads, queries, ...), got shape ",
                    input.sizes());
  TORCH_CHECK_VALUE(index.dim() == 2, op, ": index must have 2 dimensions (queries, keys), got shape ", index.sizes());
  TORCH_CHECK_VALUE(input.size(2) == index.size(0), op, ": input has ", input.size(2), " queries and index has ",
                    index.size(0));
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
                   ": input must be float16, bfloat16, float32 or float64, got ", type);
  TORCH_CHECK_TYPE(id_type == at::kInt || id_type == at::kLong, op, ": index must be int32 or int64, got ", id_type);
  TORCH_CHECK_VALUE(input.device() == index.device(), op, ": input is on ", input.device(), " and index on ",
                    index.device());
  TORCH_CHECK_VALUE(0 <= buckets && buckets <= kMaxBuckets, op, ": the number of buckets must be between 0 and ",
                    kMaxBuckets, ", got ", buckets);
  return {input.size(1), input.size(0) * input.size(1), index.size(0), index.size(1), buckets,
          input.stride(0), input.stride(1), input.stride(2), input.stride(3)};
}

} // namespace

Problem check_rpe_index(const at::Tensor& input, const at::Tensor& index) {
  return check("rpe_index", input, index, input.dim() == 4 ? input.size(3) : 0);
}

Problem check_rpe_index_by_key(const at::Tensor& input, const at::Tensor& index) {
  Problem p = check("rpe_index_add_", input, index.dim() == 2 ? index.t() : index,
                    input.dim() == 4 ? input.size(3) : 0);
  std::swap(p.queries, p.keys);
  return p;
}

Problem check_rpe_bucket_sum(const at::Tensor& input, const at::Tensor& index, int64_t buckets) {
  const Problem p = check("rpe_bucket_sum", input, index, buckets);
  TORCH_CHECK_VALUE(input.size(3) == p.keys, "rpe_bucket_sum: input has ", input.size(3), " keys and index has ",
                    p.keys);
  return p;
}

void check_output(const char* op, const at::Tensor& output, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(output.sizes() == sizes, op, ": output must have shape ", sizes, ", got ", output.sizes());
}

} // namespace rpe_ops

TORCH_LIBRARY(rpe_ops, m) {
  m.def("rpe_index(Tensor input, Tensor index) -> Tensor");
  m.def("rpe_bucket_sum(Tensor input, Tensor index, SymInt num_buckets) -> Tensor");
  m.def("rpe_index_add_(Tensor(a!) output, Tensor input, Tensor index, bool by_key=False) -> ()");
  m.def("rpe_bucket_sum_add_(Tensor(a!) output, Tensor input, Tensor index) -> ()");
}

// Autocast changes no dtype here: a gather only moves numbers, and half types are summed in float32 anyway.
TORCH_LIBRARY_IMPL(rpe_ops, AutocastCPU, m) {
  m.impl("rpe_index", torch::CppFunction::makeFallthrough());
  m.impl("rpe_bucket_sum", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(rpe_ops, AutocastCUDA, m) {
  m.impl("rpe_index", torch::CppFunction::makeFallthrough());
  m.impl("rpe_bucket_sum", torch::CppFunction::makeFallthrough());
}

#ifndef RPE_OPS_CUDA
static void no_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(), ": rpe_ops was built without CUDA kernels; rebuild it where ",
                              "PyTorch sees a GPU and there is a CUDA toolkit, or with FORCE_CUDA=1");
}

TORCH_LIBRARY_IMPL(rpe_ops, CUDA, m) {
  m.impl("rpe_index", torch::CppFunction::makeFromBoxedFunction<&no_cuda>());
  m.impl("rpe_bucket_sum", torch::CppFunction::makeFromBoxedFunction<&no_cuda>());
}
#endif
