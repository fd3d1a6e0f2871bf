// Device code of both operators, free of CUDA's headers: tests/emulated_gpu.cpp runs it on the CPU, thread by thread.
// A block handles one query for groups of eight planes, which share that query's ids. No atomics: every sum is added in
// one fixed order, which depends on the numbers of keys and buckets alone.
#pragma once

#include <cstdint>
#include <cstring>

#include "rpe_ops.h"

namespace rpe_ops::gpu {

constexpr int kWarp = 32;
constexpr int kSegments = kWarp / kPlanes; // lanes of a warp that share a plane in the bucket sum
constexpr int kTile = 256;                 // keys of one plane that a block stages in shared memory at a time
constexpr int kBinStride = kWarp + 1;      // so that both reading by lane and reading by bucket are free of conflicts
constexpr int kMaxSumWarps = 4;
constexpr int64_t kBytesOfBins = 24 * 1024; // of a block, if one warp's are not more: eight blocks fit on an SM of 228 KB

// Bytes that a load may have, and by which it then must be aligned.
constexpr int kWide = 16;
struct alignas(kWide) Wide {
  uint32_t words[kWide / sizeof(uint32_t)];
};

// Bytes of shared memory per block.
template <typename T>
constexpr int64_t index_shared_bytes(int64_t buckets) {
  return buckets * kPlanes * sizeof(T);
}
// Bytes of a plane's staged keys: room for those of a tile and for as many as a row lies off kWide. They are kWide more
// than a multiple of 128, all banks of shared memory, so that planes side by side lie in other banks.
template <typename T>
constexpr int kTileBytes = kTile * sizeof(T) + kWide;
template <typename Sum>
constexpr int64_t bin_bytes(int64_t buckets) {
  return sizeof(Sum) * (buckets + 1) * kBinStride;
}
template <typename T, typename Sum>
constexpr int64_t sum_shared_bytes(int64_t buckets, int warps) {
  return kPlanes * (sizeof(T*) + kTileBytes<T>) + kTile * sizeof(int32_t) + warps * bin_bytes<Sum>(buckets);
}
// The most buckets for which a block of one warp gets by with so much shared memory.
template <typename T, typename Sum>
constexpr int64_t most_sum_buckets(int64_t shared_bytes) {
  return (shared_bytes - sum_shared_bytes<T, Sum>(0, 0)) / static_cast<int64_t>(sizeof(Sum) * kBinStride) - 1;
}
// Warps of a block of the bucket sum: many, to add few keys one after the other, but few enough for several blocks.
template <typename Sum>
constexpr int sum_warps(int64_t buckets) {
  const int64_t warps = kBytesOfBins / bin_bytes<Sum>(buckets);
  return static_cast<int>(warps < 1 ? 1 : warps > kMaxSumWarps ? kMaxSumWarps : warps);
}

// Y[plane,i,j] = X[plane,i,index[i,j]]; T is an unsigned integer of the element's size, since only bits move. An id out
// of range yields all ones, which is NaN in every floating type. Rows of Y begin `row_stride` elements after each other.
// Grid: (queries, any), blocks of whole warps. With kStaged the rows of X are read through shared memory.
template <typename T, typename Id, bool kStaged>
__global__ void rpe_index_kernel(Problem p, int64_t row_stride, const T* x, const Id* index, T* y) {
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
      T* to = y + (first * p.queries + query) * row_stride + j;
#pragma unroll
      for (int k = 0; k < kPlanes; ++k, to += p.queries * row_stride) {
        if (k >= planes) break;
        T value = static_cast<T>(~static_cast<T>(0));
        if (valid) value = kStaged ? rows[k * p.buckets + id] : x[p.offset(first + k, query) + id * p.stride_last];
        *to = value;
      }
    }
  }
}

// How many elements a row lies behind the last place that is aligned for wide loads.
template <typename T>
__device__ int misalignment(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % kWide / sizeof(T));
}

// Elements first, first + 1, ... of a row of `keys` elements that are `stride` apart, as many as one wide load has; zero
// where there are none. Read at once where they lie side by side, all in the row.
template <typename T>
__device__ Wide read(const T* row, int64_t stride, int first, int keys) {
  constexpr int kElements = kWide / sizeof(T);
  if (stride == 1 && 0 <= first && first + kElements <= keys) return *reinterpret_cast<const Wide*>(row + first);
  Wide result{};
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    const int j = first + k;
    if (0 <= j && j < keys) std::memcpy(reinterpret_cast<char*>(&result) + k * sizeof(T), row + j * stride, sizeof(T));
  }
  return result;
}

// Copy `keys` elements of every plane's row, from the begin-th on, to a tile a plane: element j to tile[shift + j] with
// shift = misalignment(of the begin-th), so that what is read at once is aligned. All threads of the block take part, and
// each reads four times before it writes, which the compiler may not do by itself.
template <typename T>
__device__ void stage(const T* const* rows, int planes, int64_t begin, int64_t stride, int keys, T* tile, int thread,
                      int threads) {
  constexpr int kElements = kWide / sizeof(T), kAhead = 4, kTileStride = kTileBytes<T> / sizeof(T);
  const int reads = (keys + kElements - 1) / kElements + 1; // one more where a row is not aligned
  for (int item = thread; item < planes * reads; item += kAhead * threads) {
    Wide values[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int plane = (item + k * threads) / reads, at = (item + k * threads) % reads * kElements;
      if (plane >= planes) break;
      const T* row = rows[plane] + begin * stride;
      values[k] = read(row, stride, at - misalignment(row), keys);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int plane = (item + k * threads) / reads, at = (item + k * threads) % reads * kElements;
      if (plane >= planes) break;
      *reinterpret_cast<Wide*>(tile + plane * kTileStride + at) = values[k];
    }
  }
}

// S[plane,i,c] = sum over index[i,j] = c of P[plane,i,j], for c in [blockIdx.z * chunk, ...). Lane (segment, plane) of a
// warp has bins of its own for some keys of its plane: every n-th, where n is the number of segments in all warps. The
// bins are added at the end. An id out of range, or of another chunk, falls into one bin more that nobody reads. Grid:
// (queries, any, chunks), blocks of up to kMaxSumWarps warps.
template <typename T, typename Sum, typename Id>
__global__ void __launch_bounds__(kMaxSumWarps * kWarp) rpe_bucket_sum_kernel(Problem p, int64_t chunk, const T* x,
                                                                              const Id* index, T* y) {
  extern __shared__ uint64_t shared[];
  constexpr int kTileStride = kTileBytes<T> / sizeof(T);
  const int64_t query = blockIdx.x, start = blockIdx.z * chunk;
  const int buckets = static_cast<int>(p.buckets - start < chunk ? p.buckets - start : chunk);
  const int thread = threadIdx.x, threads = blockDim.x, warps = threads / kWarp, lane = thread % kWarp;
  const int plane = lane % kPlanes, segments = warps * kSegments, segment = thread / kPlanes;
  const T** const rows = reinterpret_cast<const T**>(shared);
  T* const tile = reinterpret_cast<T*>(rows + kPlanes);
  int32_t* const slots = reinterpret_cast<int32_t*>(tile + kPlanes * kTileStride);
  Sum* const all_bins = reinterpret_cast<Sum*>(slots + kTile);
  const int bins_of_warp = static_cast<int>(chunk + 1) * kBinStride;
  Sum* const bins = all_bins + thread / kWarp * bins_of_warp + lane; // this lane's
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kPlanes; first < p.planes;
       first += static_cast<int64_t>(gridDim.y) * kPlanes) {
    const int planes = p.planes - first < kPlanes ? static_cast<int>(p.planes - first) : kPlanes;
    if (thread < planes) rows[thread] = x + p.offset(first + thread, query);
    for (int c = 0; c <= buckets; ++c) bins[c * kBinStride] = 0;
    for (int64_t begin = 0; begin < p.keys; begin += kTile) {
      const int keys = p.keys - begin < kTile ? static_cast<int>(p.keys - begin) : kTile;
      __syncthreads(); // the rows are known, and the tile before has been read
      for (int j = thread; j < keys; j += threads) {
        const int64_t id = static_cast<int64_t>(index[query * p.keys + begin + j]) - start;
        slots[j] = (0 <= id && id < buckets ? static_cast<int32_t>(id) : buckets) * kBinStride;
      }
      stage(rows, planes, begin, p.stride_last, keys, tile, thread, threads);
      __syncthreads();
      if (plane >= planes) continue;
      const T* const row = tile + plane * kTileStride + misalignment(rows[plane] + begin * p.stride_last);
      // Four keys are read ahead, since the compiler may not move these reads over the writes to the bins.
      for (int j = segment; j < keys; j += 4 * segments) {
        Sum values[4];
        int32_t slot[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int at = j + k * segments;
          const bool inside = at < keys;
          values[k] = static_cast<Sum>(row[inside ? at : j]);
          slot[k] = inside ? slots[at] : buckets * kBinStride;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) bins[slot[k]] += values[k];
      }
    }
    __syncthreads();
    for (int item = thread; item < planes * buckets; item += threads) {
      const int k = item / buckets, c = item % buckets;
      const Sum* bin = all_bins + c * kBinStride + k;
      Sum sum = 0;
      for (int w = 0; w < warps; ++w, bin += bins_of_warp) {
        sum += (bin[0] + bin[kPlanes]) + (bin[2 * kPlanes] + bin[3 * kPlanes]);
      }
      y[((first + k) * p.queries + query) * p.buckets + start + c] = static_cast<T>(sum);
    }
    __syncthreads();
  }
}

} // namespace rpe_ops::gpu
