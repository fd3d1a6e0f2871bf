// Runs the CUDA kernels without a GPU: a CPU thread per CUDA thread, one barrier for __syncthreads and __syncwarp.
// Built with -fsanitize=address it finds accesses out of bounds, with -fsanitize=thread missing barriers. Exits with 0
// if every result equals the definition; sums of small integers are exact, so comparisons are too.
#include <barrier>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(from, bytes)
#endif

struct Dim {
  unsigned int x = 1, y = 1, z = 1;
};
static thread_local Dim threadIdx, blockIdx;
static Dim blockDim, gridDim;
static std::unique_ptr<std::barrier<>> block_barrier;
static void __syncthreads() { block_barrier->arrive_and_wait(); }
static void __syncwarp() { block_barrier->arrive_and_wait(); }
#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(threads)
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cuda_kernels.cuh"

namespace rpe_ops::gpu {
uint64_t shared[48 * 1024 / 8];
}

using rpe_ops::kPlanes;
using rpe_ops::Problem;

template <typename Kernel>
void launch(Dim grid, unsigned int threads, int64_t shared_bytes, const Kernel& kernel) {
  gridDim = grid;
  blockDim = {threads};
  std::vector<Dim> blocks;
  for (unsigned int z = 0; z < grid.z; ++z)
    for (unsigned int y = 0; y < grid.y; ++y)
      for (unsigned int x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
  ASAN_POISON_MEMORY_REGION(rpe_ops::gpu::shared, sizeof(rpe_ops::gpu::shared));
  ASAN_UNPOISON_MEMORY_REGION(rpe_ops::gpu::shared, shared_bytes);
  block_barrier = std::make_unique<std::barrier<>>(threads);
  std::vector<std::thread> pool;
  for (unsigned int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      threadIdx = {t, 0, 0};
      for (const Dim& block : blocks) {
        blockIdx = block;
        kernel();
        block_barrier->arrive_and_wait();
      }
    });
  }
  for (auto& thread : pool) thread.join();
}

enum class Layout { kPlain, kHeadsLast, kKeysApart };

struct Case {
  int64_t batch, heads, queries, keys, buckets;
  Layout layout;   // of what is read
  bool bad_ids;    // some are out of range
  int64_t padding; // elements between the end of a row and the next
};

std::mt19937 random_number(1);
int64_t draw(int64_t n) { return static_cast<int64_t>(random_number() % n); }

// What is read, in rows of `last` elements, and how it lies in memory of `size` elements.
Problem describe(const Case& c, int64_t last, int64_t* size) {
  const int64_t row = last + c.padding, rows = c.heads * c.queries;
  *size = c.batch * rows * row;
  Problem p{c.heads, c.batch * c.heads, c.queries, c.keys, c.buckets, rows * row, c.queries * row, row, 1};
  if (c.layout == Layout::kHeadsLast) {
    p.stride_head = row;
    p.stride_query = c.heads * row;
  } else if (c.layout == Layout::kKeysApart) {
    p.stride_query = 1;
    p.stride_last = c.queries;
  }
  return p;
}

template <typename Id>
std::vector<Id> draw_ids(const Case& c) {
  std::vector<Id> index(c.queries * c.keys);
  for (auto& id : index) {
    const bool bad = c.bad_ids && draw(9) == 0;
    id = static_cast<Id>(!bad ? draw(c.buckets) : draw(2) ? c.buckets + draw(3) : -1 - draw(3));
  }
  return index;
}

template <typename T, typename Id>
int run_gather(const Case& c, unsigned int grid_y, unsigned int threads) {
  int64_t size;
  const Problem p = describe(c, c.buckets, &size);
  const auto index = draw_ids<Id>(c);
  const int64_t row = (c.keys + rpe_ops::kRowAlignment - 1) / rpe_ops::kRowAlignment * rpe_ops::kRowAlignment;
  std::vector<T> x(size), y(p.planes * c.queries * row);
  for (auto& value : x) value = static_cast<T>(draw(1000));
  int wrong = 0;
  for (const bool staged : {true, false}) {
    std::fill(y.begin(), y.end(), T(7));
    launch({static_cast<unsigned int>(c.queries), grid_y}, threads,
           staged ? rpe_ops::gpu::index_shared_bytes<T>(c.buckets) : 0, [&] {
             if (staged) {
               rpe_ops::gpu::rpe_index_kernel<T, Id, true>(p, row, x.data(), index.data(), y.data());
             } else {
               rpe_ops::gpu::rpe_index_kernel<T, Id, false>(p, row, x.data(), index.data(), y.data());
             }
           });
    for (int64_t n = 0; n < p.planes; ++n)
      for (int64_t i = 0; i < c.queries; ++i)
        for (int64_t j = 0; j < row; ++j) {
          const int64_t id = j < c.keys ? index[i * c.keys + j] : 0;
          const T read = 0 <= id && id < c.buckets ? x[p.offset(n, i) + id * p.stride_last] : static_cast<T>(-1);
          wrong += y[(n * c.queries + i) * row + j] != (j < c.keys ? read : T(7)); // nothing behind the keys
        }
  }
  std::printf("gather, %zu bytes, planes %ld queries %ld keys %ld buckets %ld: %d wrong\n", sizeof(T),
              static_cast<long>(p.planes), static_cast<long>(c.queries), static_cast<long>(c.keys),
              static_cast<long>(c.buckets), wrong);
  return wrong;
}

// `offset` elements lie before the input, so that its rows are not aligned as those of a new tensor are.
template <typename T, typename Sum, typename Id>
int run_sum(const Case& c, unsigned int grid_y, int64_t chunk, int64_t offset) {
  int64_t size;
  const Problem p = describe(c, c.keys, &size);
  const auto index = draw_ids<Id>(c);
  std::vector<T> memory(offset + size), s(p.planes * c.queries * c.buckets, T(-1.0f));
  T* const x = memory.data() + offset;
  for (auto& value : memory) value = static_cast<T>(static_cast<float>(draw(100)));
  const auto chunks = static_cast<unsigned int>((c.buckets + chunk - 1) / chunk);
  const int warps = rpe_ops::gpu::sum_warps<Sum>(chunk);
  launch({static_cast<unsigned int>(c.queries), grid_y, chunks}, warps * rpe_ops::gpu::kWarp,
         rpe_ops::gpu::sum_shared_bytes<T, Sum>(chunk, warps),
         [&] { rpe_ops::gpu::rpe_bucket_sum_kernel<T, Sum, Id>(p, chunk, x, index.data(), s.data()); });
  int wrong = 0;
  for (int64_t n = 0; n < p.planes; ++n)
    for (int64_t i = 0; i < c.queries; ++i) {
      std::vector<Sum> truth(c.buckets);
      for (int64_t j = 0; j < c.keys; ++j) {
        const int64_t id = index[i * c.keys + j];
        if (0 <= id && id < c.buckets) truth[id] += static_cast<Sum>(x[p.offset(n, i) + j * p.stride_last]);
      }
      for (int64_t b = 0; b < c.buckets; ++b) wrong += s[(n * c.queries + i) * c.buckets + b] != static_cast<T>(truth[b]);
    }
  std::printf("sum, %zu bytes, planes %ld queries %ld keys %ld buckets %ld, %d warps: %d wrong\n", sizeof(T),
              static_cast<long>(p.planes), static_cast<long>(c.queries), static_cast<long>(c.keys),
              static_cast<long>(c.buckets), warps, wrong);
  return wrong;
}

int main() {
  using c10::BFloat16;
  using c10::Half;
  using enum Layout;
  int wrong = 0;
  wrong += run_gather<uint32_t, int32_t>({2, 3, 3, 197, 50, kPlain, false, 0}, 1, 64);
  wrong += run_gather<uint16_t, int64_t>({3, 6, 2, 131, 49, kHeadsLast, true, 3}, 2, 32); // rounds over the grid
  wrong += run_gather<uint64_t, int32_t>({1, 1, 4, 5, 1, kPlain, true, 0}, 1, 32);
  wrong += run_gather<uint32_t, int64_t>({1, 8, 2, 300, 169, kHeadsLast, false, 0}, 1, 96);
  wrong += run_gather<uint16_t, int32_t>({1, 2, 3, 16, 7, kKeysApart, true, 0}, 1, 32);
  // rows of odd lengths, of which each is aligned in another way; aligned ones; apart; more keys than a tile
  wrong += run_sum<float, float, int32_t>({2, 3, 3, 197, 50, kPlain, false, 0}, 1, 50, 0);
  wrong += run_sum<Half, float, int32_t>({2, 6, 3, 197, 50, kPlain, true, 0}, 1, 50, 0);
  wrong += run_sum<Half, float, int64_t>({1, 9, 2, 197, 50, kPlain, false, 11}, 2, 50, 0); // rows of 208
  wrong += run_sum<Half, float, int32_t>({1, 3, 2, 300, 81, kPlain, true, 1}, 1, 81, 5);
  wrong += run_sum<BFloat16, float, int64_t>({3, 6, 2, 131, 49, kHeadsLast, true, 0}, 2, 20, 1); // chunks of buckets
  wrong += run_sum<BFloat16, float, int32_t>({1, 2, 5, 33, 7, kKeysApart, true, 0}, 1, 7, 3);
  wrong += run_sum<float, float, int64_t>({1, 8, 2, 600, 169, kHeadsLast, false, 2}, 1, 169, 1);
  wrong += run_sum<float, float, int32_t>({1, 3, 4, 256, 9, kKeysApart, true, 0}, 1, 9, 0);
  wrong += run_sum<double, double, int64_t>({2, 2, 3, 259, 25, kPlain, true, 0}, 1, 25, 1);
  wrong += run_sum<double, double, int32_t>({1, 1, 4, 5, 1, kPlain, true, 0}, 1, 1, 0);
  wrong += run_sum<Half, float, int32_t>({1, 1, 1, 1, 1, kPlain, false, 0}, 1, 1, 7);
  return wrong != 0;
}
