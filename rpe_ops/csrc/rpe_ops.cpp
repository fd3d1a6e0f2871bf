// Schemas and checks of all operators. Derivatives and the fake versions are in Python (rpe_index.py).
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/MemoryOverlap.h>
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

Problem check_rpe_index(const char* op, const at::Tensor& input, const at::Tensor& index) {
  return check(op, input, index, input.dim() == 4 ? input.size(3) : 0);
}

Problem check_rpe_bucket_sum(const char* op, const at::Tensor& input, const at::Tensor& index, int64_t buckets) {
  const Problem p = check(op, input, index, buckets);
  TORCH_CHECK_VALUE(input.size(3) == p.keys, op, ": input has ", input.size(3), " keys and index has ", p.keys);
  return p;
}

Problem check_by_key(const char* op, const at::Tensor& input, const at::Tensor& index) {
  TORCH_CHECK_VALUE(input.dim() == 4 && index.dim() == 2 && input.size(2) == index.size(1), op, " by key: input has "
                    "shape ", input.sizes(), " and index ", index.sizes(), ", but must be (batch, heads, keys, "
                    "buckets) and (queries, keys)");
  Problem p = check(op, input, index.t(), input.size(3));
  std::swap(p.queries, p.keys);
  return p;
}

void check_output(const char* op, const at::Tensor& output, const at::Tensor& input, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(output.sizes() == sizes, op, ": output must have shape ", sizes, ", got ", output.sizes());
  TORCH_CHECK_VALUE(output.is_contiguous(), op, ": output must be contiguous");
  TORCH_CHECK_VALUE(output.device() == input.device(), op, ": output is on ", output.device(), " and input on ",
                    input.device());
  TORCH_CHECK_TYPE(output.scalar_type() == input.scalar_type(), op, ": output is ", output.scalar_type(),
                   " and input is ", input.scalar_type());
  at::assert_no_overlap(output, input);
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

// What adds in place has no derivatives: it refuses tensors that ask for them, and tells autograd what has changed.
template <typename... Flags>
static void add_without_derivatives(const char* op, at::Tensor& output, const at::Tensor& input,
                                    const at::Tensor& index, Flags... flags) {
  TORCH_CHECK(!at::GradMode::is_enabled() || !(output.requires_grad() || input.requires_grad()), op, " has no "
              "derivatives: call it under torch.no_grad(), or use rpe_index and rpe_bucket_sum");
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(op, "");
  {
    at::AutoDispatchBelowADInplaceOrView below;
    handle.typed<void(at::Tensor&, const at::Tensor&, const at::Tensor&, Flags...)>().call(output, input, index,
                                                                                            flags...);
  }
  output.unsafeGetTensorImpl()->bump_version();
}

static void index_add(at::Tensor& output, const at::Tensor& input, const at::Tensor& index, bool by_key) {
  add_without_derivatives("rpe_ops::rpe_index_add_", output, input, index, by_key);
}

static void bucket_sum_add(at::Tensor& output, const at::Tensor& input, const at::Tensor& index) {
  add_without_derivatives("rpe_ops::rpe_bucket_sum_add_", output, input, index);
}

TORCH_LIBRARY_IMPL(rpe_ops, Autograd, m) {
  m.impl("rpe_index_add_", index_add);
  m.impl("rpe_bucket_sum_add_", bucket_sum_add);
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
