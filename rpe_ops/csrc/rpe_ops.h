// The two operators of iRPE, each the other's adjoint (ids are shared by every batch and head):
//   rpe_index       Y[b,h,i,j] = X[b,h,i,index[i,j]]                 X (B,H,Lq,buckets) -> Y (B,H,Lq,Lk)
//   rpe_bucket_sum  S[b,h,i,c] = sum of P[b,h,i,j] over index[i,j]=c P (B,H,Lq,Lk)      -> S (B,H,Lq,buckets)
// and, for attention that goes block by block on the CPU, two that add in place:
//   rpe_index_add_       Y[b,h,i,j] += X[b,h,i,index[i,j]], or by key  Y[b,h,i,j] += X[b,h,j,index[i,j]]
//   rpe_bucket_sum_add_  by key alone, S[b,h,j,index[i,j]] += P[b,h,i,j]
#pragma once

#include <cstdint>

namespace rpe_ops {

// A "plane" is one (batch, head) pair. Planes are handled eight at a time because they share the ids of a query.
constexpr int kPlanes = 8;

// On CUDA a row of rpe_index's output begins at a multiple of so many elements.
constexpr int64_t kRowAlignment = 16;

// Sizes of one call, and the strides (in elements) of the tensor that is read.
struct Problem {
  int64_t heads, planes, queries, keys, buckets;
  int64_t stride_batch, stride_head, stride_query, stride_last;

#ifdef __CUDACC__
  __host__ __device__
#endif
  int64_t offset(int64_t plane, int64_t query) const {
    return plane / heads * stride_batch + plane % heads * stride_head + query * stride_query;
  }
};

} // namespace rpe_ops
