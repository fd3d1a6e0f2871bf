#include "cuda_kernels.h"
#include "cuda_kernels.cuh"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

namespace rpe_ops {
namespace {

constexpr int64_t kSharedBytes = 48 * 1024; // what every GPU gives a block without being asked
constexpr int64_t kMaxThreads = 256, kMaxGridY = 65535;

unsigned int plane_groups(const Problem& p) {
  return static_cast<unsigned int>(std::min((p.planes + kPlanes - 1) / kPlanes, kMaxGridY));
}

template <typename T, typename Id>
void rpe_index(const Problem& p, int64_t row, const void* x, const void* index, void* y, cudaStream_t stream) {
  const int64_t rounds = (p.keys + kMaxThreads - 1) / kMaxThreads, per_round = (p.keys + rounds - 1) / rounds;
  const auto threads = static_cast<unsigned int>((per_round + gpu::kWarp - 1) / gpu::kWarp * gpu::kWarp);
  const dim3 grid(static_cast<unsigned int>(p.queries), plane_groups(p));
  const auto* from = static_cast<const T*>(x);
  const auto* ids = static_cast<const Id*>(index);
  const int64_t shared = gpu::index_shared_bytes<T>(p.buckets);
  if (shared <= kSharedBytes) {
    gpu::rpe_index_kernel<T, Id, true><<<grid, threads, shared, stream>>>(p, row, from, ids, static_cast<T*>(y));
  } else {
    gpu::rpe_index_kernel<T, Id, false><<<grid, threads, 0, stream>>>(p, row, from, ids, static_cast<T*>(y));
  }
}

template <typename T, typename Sum, typename Id>
void rpe_bucket_sum(const Problem& p, const void* x, const void* index, void* y, cudaStream_t stream) {
  constexpr int64_t most = gpu::most_sum_buckets<T, Sum>(kSharedBytes);
  static_assert(most > 0 && gpu::sum_shared_bytes<T, Sum>(most, 1) <= kSharedBytes);
  const int64_t chunk = std::min(p.buckets, most), chunks = (p.buckets + chunk - 1) / chunk;
  const int warps = gpu::sum_warps<Sum>(chunk);
  const dim3 grid(static_cast<unsigned int>(p.queries), plane_groups(p), static_cast<unsigned int>(chunks));
  gpu::rpe_bucket_sum_kernel<T, Sum, Id>
      <<<grid, warps * gpu::kWarp, gpu::sum_shared_bytes<T, Sum>(chunk, warps), stream>>>(
          p, chunk, static_cast<const T*>(x), static_cast<const Id*>(index), static_cast<T*>(y));
}

} // namespace

void launch_rpe_index(const Problem& p, int64_t row, int element_size, bool wide_index, const void* x,
                      const void* index, void* y, cudaStream_t stream) {
  const auto launch = [&](auto id) {
    using Id = decltype(id);
    switch (element_size) {
      case 2: return rpe_index<uint16_t, Id>(p, row, x, index, y, stream);
      case 4: return rpe_index<uint32_t, Id>(p, row, x, index, y, stream);
      default: return rpe_index<uint64_t, Id>(p, row, x, index, y, stream);
    }
  };
  wide_index ? launch(int64_t()) : launch(int32_t());
}

void launch_rpe_bucket_sum(const Problem& p, Type type, bool wide_index, const void* x, const void* index, void* y,
                           cudaStream_t stream) {
  const auto launch = [&](auto id) {
    using Id = decltype(id);
    switch (type) {
      case Type::kDouble: return rpe_bucket_sum<double, double, Id>(p, x, index, y, stream);
      case Type::kFloat: return rpe_bucket_sum<float, float, Id>(p, x, index, y, stream);
      case Type::kHalf: return rpe_bucket_sum<c10::Half, float, Id>(p, x, index, y, stream);
      case Type::kBFloat16: return rpe_bucket_sum<c10::BFloat16, float, Id>(p, x, index, y, stream);
    }
  };
  wide_index ? launch(int64_t()) : launch(int32_t());
}

} // namespace rpe_ops
