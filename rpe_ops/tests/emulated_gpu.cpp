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
#define __shared__
#define __launch_bounds__(threads)
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

struct Case {
  int64_t batch, heads, queries, keys, buckets;
  bool transposed, bad_ids; // heads and queries swapped in memory; some ids out of range
};

template <typename T, typename Id>
int run(const Case& c, unsigned int grid_y, unsigned int threads, int64_t chunk) {
  std::mt19937 random(1);
  const auto draw = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  const int64_t planes = c.batch * c.heads;
  std::vector<Id> index(c.queries * c.keys);
  for (auto& id : index) {
    const bool bad = c.bad_ids && draw(9) == 0;
    id = static_cast<Id>(!bad ? draw(c.buckets) : draw(2) ? c.buckets + draw(3) : -1 - draw(3));
  }
  const auto problem = [&](int64_t last) {
    const int64_t row = c.heads * c.queries * last;
    return c.transposed ? Problem{c.heads, planes, c.queries, c.keys, c.buckets, row, last, c.heads * last, 1}
                        : Problem{c.heads, planes, c.queries, c.keys, c.buckets, row, c.queries * last, last, 1};
  };
  std::vector<T> x(planes * c.queries * c.buckets), y(planes * c.queries * c.keys, T(7));
  std::vector<float> p(planes * c.queries * c.keys), s(planes * c.queries * c.buckets, -1);
  for (auto& value : x) value = static_cast<T>(draw(1000));
  for (auto& value : p) value = static_cast<float>(draw(1000));

  const Problem gather = problem(c.buckets), sum = problem(c.keys);
  const auto queries = static_cast<unsigned int>(c.queries);
  const auto chunks = static_cast<unsigned int>((c.buckets + chunk - 1) / chunk);
  int wrong = 0;
  const auto check_gather = [&] {
    for (int64_t n = 0; n < planes; ++n)
      for (int64_t i = 0; i < c.queries; ++i)
        for (int64_t j = 0; j < c.keys; ++j) {
          const int64_t id = index[i * c.keys + j];
          const T truth = 0 <= id && id < c.buckets ? x[gather.offset(n, i) + id] : static_cast<T>(-1);
          wrong += y[(n * c.queries + i) * c.keys + j] != truth;
        }
    std::fill(y.begin(), y.end(), T(7));
  };
  launch({queries, grid_y}, threads, rpe_ops::gpu::index_shared_bytes<T>(c.buckets),
         [&] { rpe_ops::gpu::rpe_index_kernel<T, Id, true>(gather, x.data(), index.data(), y.data()); });
  check_gather();
  launch({queries, grid_y}, threads, 0,
         [&] { rpe_ops::gpu::rpe_index_kernel<T, Id, false>(gather, x.data(), index.data(), y.data()); });
  check_gather();
  launch({queries, grid_y, chunks}, rpe_ops::gpu::kWarp, rpe_ops::gpu::sum_shared_bytes<float>(chunk),
         [&] { rpe_ops::gpu::rpe_bucket_sum_kernel<float, float, Id>(sum, chunk, p.data(), index.data(), s.data()); });
  for (int64_t n = 0; n < planes; ++n)
    for (int64_t i = 0; i < c.queries; ++i) {
      std::vector<float> truth(c.buckets);
      for (int64_t j = 0; j < c.keys; ++j) {
        const int64_t id = index[i * c.keys + j];
        if (0 <= id && id < c.buckets) truth[id] += p[sum.offset(n, i) + j];
      }
      for (int64_t b = 0; b < c.buckets; ++b) wrong += s[(n * c.queries + i) * c.buckets + b] != truth[b];
    }
  std::printf("planes %ld queries %ld keys %ld buckets %ld: %d wrong\n", planes, c.queries, c.keys, c.buckets, wrong);
  return wrong;
}

int main() {
  int wrong = 0;
  wrong += run<uint32_t, int32_t>({2, 3, 3, 197, 50, false, false}, 1, 64, 50);
  wrong += run<uint16_t, int64_t>({3, 6, 2, 131, 49, true, true}, 2, 32, 20); // rounds over the grid, chunks of buckets
  wrong += run<uint64_t, int32_t>({1, 1, 4, 5, 1, false, true}, 1, 32, 1);
  wrong += run<uint32_t, int64_t>({1, 8, 2, 300, 169, true, false}, 1, 96, 169);
  return wrong != 0;
}
