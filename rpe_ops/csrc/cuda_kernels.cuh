// Device code of both operators, free of CUDA's headers: tests/emulated_gpu.cpp runs it on the CPU, thread by thread.
// A block handles one query for groups of eight planes, which share that query's ids. No atomics: every sum is added in
// one fixed order, which depends on the number of keys alone.
#pragma once

#include <cstdint>

#include "rpe_ops.h"

namespace rpe_ops::gpu {

constexpr int kWarp = 32;
constexpr int kSegments = kWarp / kPlanes; // lanes that share a plane in the bucket sum; each takes every fourth key
constexpr int kTile = 128;                 // keys of one plane that a warp stages in shared memory at a time
constexpr int kTileStride = kTile + kSegments; // lane (segment, plane) then reads a bank of its own
constexpr int kBinStride = kWarp + 1;      // so that both reading by lane and reading by bucket are free of conflicts

// Bytes of shared memory per block.
template <typename T>
constexpr int64_t index_shared_bytes(int64_t buckets) {
  return buckets * kPlanes * sizeof(T);
}
template <typename Sum>
constexpr int64_t sum_shared_bytes(int64_t buckets) {
  return sizeof(Sum) * ((buckets + 1) * kBinStride + kPlanes * kTileStride) + kTile * sizeof(int32_t);
}

// Y[plane,i,j] = X[plane,i,index[i,j]]; T is an unsigned integer of the element's size, since only bits move. An id out
// of range yields all ones, which is NaN in every floating type. Grid: (queries, any), blocks of whole warps. With
// kStaged the rows of X are read through shared memory.
template <typename T, typename Id, bool kStaged>
__global__ void rpe_index_kernel(Problem p, const T* x, const Id* index, T* y) {
  extern __shared__ uint64_t shared[];
  T* const rows = reinterpret_cast<T*>(shared);
  const int64_t query = blockIdx.x;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kPlanes; first < p.planes;
       first += static_cast<int64_t>(gridDim.y) * kPlanes) {
    const int planes = p.planes - first < kPlanes ? static_cast<int>(p.planes - first) : kPlanes;
    if (kStaged) {
      __syncthreads();
      for (int k = warp; k < planes; k += warps) {
        const T* row = x + p.offset(first + k, query);
        for (int64_t c = lane; c < p.buckets; c += kWarp) rows[k * p.buckets + c] = row[c * p.stride_last];
      }
      __syncthreads();
    }
    for (int64_t j = threadIdx.x; j < p.keys; j += blockDim.x) {
      const int64_t id = index[query * p.keys + j];
      const bool valid = 0 <= id && id < p.buckets;
      T* to = y + (first * p.queries + query) * p.keys + j;
#pragma unroll
      for (int k = 0; k < kPlanes; ++k, to += p.queries * p.keys) {
        if (k >= planes) break;
        T value = static_cast<T>(~static_cast<T>(0));
        if (valid) value = kStaged ? rows[k * p.buckets + id] : x[p.offset(first + k, query) + id * p.stride_last];
        *to = value;
      }
    }
  }
}

// S[plane,i,c] = sum over index[i,j] = c of P[plane,i,j], for c in [blockIdx.z * chunk, ...). One warp per block; lane
// (segment, plane) has bins of its own for every fourth key of its plane, and the four are added at the end. An id out
// of range, or of another chunk, falls into one bin more that nobody reads. Grid: (queries, any, chunks).
template <typename T, typename Sum, typename Id>
__global__ void __launch_bounds__(kWarp) rpe_bucket_sum_kernel(Problem p, int64_t chunk, const T* x, const Id* index,
                                                               T* y) {
  extern __shared__ uint64_t shared[];
  const int64_t query = blockIdx.x, start = blockIdx.z * chunk;
  const int buckets = static_cast<int>(p.buckets - start < chunk ? p.buckets - start : chunk);
  Sum* const bins = reinterpret_cast<Sum*>(shared);
  Sum* const tile = bins + (chunk + 1) * kBinStride;
  int32_t* const slots = reinterpret_cast<int32_t*>(tile + kPlanes * kTileStride);
  const int lane = threadIdx.x, plane = lane % kPlanes, segment = lane / kPlanes;
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kPlanes; first < p.planes;
       first += static_cast<int64_t>(gridDim.y) * kPlanes) {
    const int planes = p.planes - first < kPlanes ? static_cast<int>(p.planes - first) : kPlanes;
    for (int c = 0; c <= buckets; ++c) bins[c * kBinStride + lane] = 0;
    for (int64_t begin = 0; begin < p.keys; begin += kTile) {
      const int keys = p.keys - begin < kTile ? static_cast<int>(p.keys - begin) : kTile;
      __syncwarp();
#pragma unroll
      for (int j = lane; j < kTile; j += kWarp) {
        const int64_t id = j < keys ? static_cast<int64_t>(index[query * p.keys + begin + j]) - start : -1;
        slots[j] = (0 <= id && id < buckets ? static_cast<int32_t>(id) : buckets) * kBinStride;
      }
#pragma unroll
      for (int k = 0; k < kPlanes; ++k) {
        const T* row = x + p.offset(first + (k < planes ? k : 0), query) + begin * p.stride_last;
#pragma unroll
        for (int j = lane; j < kTile; j += kWarp) {
          tile[k * kTileStride + j] = j < keys ? static_cast<Sum>(row[j * p.stride_last]) : Sum(0);
        }
      }
      __syncwarp();
      // Four keys are read ahead, since the compiler may not move these reads over the writes to the bins.
      for (int j = segment; j < keys; j += 4 * kSegments) {
        Sum values[4];
        int32_t bin[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          values[k] = tile[plane * kTileStride + j + k * kSegments];
          bin[k] = slots[j + k * kSegments] + lane;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) bins[bin[k]] += values[k];
      }
    }
    __syncwarp();
    for (int k = 0; k < planes; ++k) {
      T* row = y + ((first + k) * p.queries + query) * p.buckets + start;
      for (int c = lane; c < buckets; c += kWarp) {
        const Sum* b = bins + c * kBinStride + k;
        row[c] = static_cast<T>((b[0] + b[kPlanes]) + (b[2 * kPlanes] + b[3 * kPlanes]));
      }
    }
    __syncwarp();
  }
}

} // namespace rpe_ops::gpu
