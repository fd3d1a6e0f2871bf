// The CPU side of both operators: parallel loops over queries and groups of planes.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "checks.h"

#define RPE_OPS_INLINE __attribute__((always_inline))
#if defined(__clang__) || __GNUC__ >= 12
#define RPE_OPS_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RPE_OPS_SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, decltype((a) == (b)){__VA_ARGS__})
#endif

namespace rpe_ops {

template <typename T>
constexpr int64_t kLine = 64 / sizeof(T); // elements in a cache line
template <typename T>
constexpr int64_t kAhead = 1024 / sizeof(T); // elements between a prefetch and its use

} // namespace rpe_ops

#define RPE_OPS_ISA baseline
#define RPE_OPS_TARGET
#define RPE_OPS_BYTES 16
#include "cpu_kernels.h"
#ifdef __x86_64__
#define RPE_OPS_ISA avx2
#define RPE_OPS_TARGET __attribute__((target("avx2")))
#define RPE_OPS_BYTES 32
#include "cpu_kernels.h"
#endif

namespace rpe_ops {
namespace {

// Rows of ids per unit of work: enough to use the pages and lines that neighbouring rows share while they are near.
constexpr int64_t kRows = 16;
// Beyond what caches hold, prefetching pays; within them it costs.
constexpr size_t kCacheBytes = 16 << 20;

// RPE_OPS_BEST(kernel<types>) is that kernel for the instruction set of this processor.
#ifdef __x86_64__
#define RPE_OPS_BEST(...) (__builtin_cpu_supports("avx2") ? avx2::__VA_ARGS__ : baseline::__VA_ARGS__)
#else
#define RPE_OPS_BEST(...) baseline::__VA_ARGS__
#endif

// Table offsets for one row of ids; raises IndexError for an id that is no bucket.
template <typename Id>
void load_offsets(const at::Tensor& index, int64_t query, int64_t buckets, int32_t* offsets) {
  const int64_t stride = index.stride(1), keys = index.size(1);
  const Id* ids = index.const_data_ptr<Id>() + query * index.stride(0);
  bool bad = false;
  const auto convert = [&](int64_t step) {
    for (int64_t j = 0; j < keys; ++j) {
      const auto id = static_cast<std::make_unsigned_t<Id>>(ids[j * step]);
      bad |= id >= static_cast<std::make_unsigned_t<Id>>(buckets);
      offsets[j] = static_cast<int32_t>(static_cast<uint32_t>(id) * kPlanes);
    }
  };
  stride == 1 ? convert(1) : convert(stride); // the former is vectorised
  for (int64_t j = 0; bad && j < keys; ++j) {
    const Id id = ids[j * stride];
    TORCH_CHECK_INDEX(0 <= id && id < buckets, "rpe_ops: id ", id, " at index[", query, ", ", j, "] is not one of the ",
                      buckets, " buckets (0 to ", buckets - 1, ")");
  }
}

// Calls row(query, first plane, offsets) for every query and group of planes. Each thread makes a row function of its own
// with make_row() and takes the ids of a few queries through all planes.
template <typename MakeRow>
void for_each_row(const Problem& p, const at::Tensor& index, const MakeRow& make_row) {
  const auto load = index.scalar_type() == at::kInt ? load_offsets<int32_t> : load_offsets<int64_t>;
  const int64_t groups = at::divup(p.planes, kPlanes), blocks = at::divup(p.queries, kRows);
  const int64_t unit = kRows * kPlanes * std::max<int64_t>(1, std::max(p.keys, p.buckets));
  at::parallel_for(0, blocks * groups, at::divup(32768, unit), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> offsets(kRows * p.keys);
    auto row = make_row();
    for (int64_t u = begin; u < end; ++u) {
      const int64_t first = u / groups * kRows, last = std::min(first + kRows, p.queries);
      if (u == begin || u % groups == 0) {
        for (int64_t i = first; i < last; ++i) load(index, i, p.buckets, offsets.data() + (i - first) * p.keys);
      }
      for (int64_t i = first; i < last; ++i) row(i, u % groups * kPlanes, offsets.data() + (i - first) * p.keys);
    }
  });
}

// place(plane) for the eight planes of a group; past the last plane it comes again, to be read or written once more.
template <typename Pointer, typename Place>
void place_planes(Pointer (&pointers)[kPlanes], int64_t first, int64_t planes, const Place& place) {
  for (int k = 0; k < kPlanes; ++k) pointers[k] = place(std::min(first + k, planes - 1));
}

template <typename T>
struct alignas(kPlanes * sizeof(T)) TableRow {
  T values[kPlanes];
};

template <typename T>
struct IndexRow {
  const Problem& p;
  const T* input;
  T* output;
  const bool prefetch = p.planes * p.queries * p.keys * sizeof(T) > kCacheBytes;
  decltype(&baseline::interleave<T>) interleave = RPE_OPS_BEST(interleave<T>);
  decltype(&baseline::gather<T>) gather = RPE_OPS_BEST(gather<T>);
  std::vector<TableRow<T>> table = std::vector<TableRow<T>>(p.buckets);

  void operator()(int64_t query, int64_t plane, const int32_t* offsets) {
    const T* from[kPlanes];
    T* to[kPlanes];
    place_planes(from, plane, p.planes, [&](int64_t k) { return input + p.offset(k, query); });
    place_planes(to, plane, p.planes, [&](int64_t k) { return output + (k * p.queries + query) * p.keys; });
    interleave(from, p.stride_last, p.buckets, table.data()->values);
    gather(table.data()->values, offsets, p.keys, prefetch, to);
  }
};

// Half types are widened to float row by row, and their sums rounded once. Bits is what T is moved as.
template <typename T, typename Sum, typename Bits>
struct SumRow {
  const Problem& p;
  const T* input;
  Bits* output;
  const int32_t* every_bucket;
  static constexpr bool kNarrow = !std::is_same_v<T, Sum>;
  const bool prefetch = !kNarrow && p.planes * p.queries * p.keys * sizeof(T) > kCacheBytes;
  decltype(&baseline::accumulate<Sum>) accumulate = RPE_OPS_BEST(accumulate<Sum>);
  decltype(&baseline::gather<Bits>) gather = RPE_OPS_BEST(gather<Bits>);
  decltype(&baseline::convert<T, Sum>) widen = RPE_OPS_BEST(convert<T, Sum>);
  decltype(&baseline::convert<Sum, T>) round = RPE_OPS_BEST(convert<Sum, T>);
  std::vector<Sum> wide = std::vector<Sum>(kNarrow ? p.keys * kPlanes : 0);
  std::vector<TableRow<Sum>> even = std::vector<TableRow<Sum>>(p.buckets), odd = even;
  std::vector<TableRow<T>> rounded = std::vector<TableRow<T>>(kNarrow ? p.buckets : 0);

  void operator()(int64_t query, int64_t plane, const int32_t* offsets) {
    Bits* to[kPlanes];
    place_planes(to, plane, p.planes, [&](int64_t k) { return output + (k * p.queries + query) * p.buckets; });
    const Sum* from[kPlanes];
    const T* sums;
    if constexpr (kNarrow) {
      const int64_t planes = std::min<int64_t>(kPlanes, p.planes - plane);
      for (int64_t k = 0; k < planes; ++k) {
        widen(input + p.offset(plane + k, query), p.keys, wide.data() + k * p.keys);
      }
      place_planes(from, 0, planes, [&](int64_t k) { return wide.data() + k * p.keys; });
      accumulate(from, offsets, p.keys, prefetch, p.buckets, even.data()->values, odd.data()->values);
      round(even.data()->values, p.buckets * kPlanes, rounded.data()->values);
      sums = rounded.data()->values;
    } else {
      place_planes(from, plane, p.planes, [&](int64_t k) { return input + p.offset(k, query); });
      accumulate(from, offsets, p.keys, prefetch, p.buckets, even.data()->values, odd.data()->values);
      sums = even.data()->values;
    }
    gather(reinterpret_cast<const Bits*>(sums), every_bucket, p.buckets, false, to);
  }
};

template <typename T>
void gather(const Problem& p, const at::Tensor& input, const at::Tensor& index, at::Tensor& output) {
  const T* from = static_cast<const T*>(input.const_data_ptr());
  T* to = static_cast<T*>(output.mutable_data_ptr());
  for_each_row(p, index, [&] { return IndexRow<T>{p, from, to}; });
}

template <typename T, typename Sum, typename Bits>
void bucket_sum(const Problem& p, const at::Tensor& input, const at::Tensor& index, at::Tensor& output) {
  const T* from = input.const_data_ptr<T>();
  Bits* to = static_cast<Bits*>(output.mutable_data_ptr());
  std::vector<int32_t> every_bucket(p.buckets);
  for (int64_t c = 0; c < p.buckets; ++c) every_bucket[c] = static_cast<int32_t>(c * kPlanes);
  for_each_row(p, index, [&] { return SumRow<T, Sum, Bits>{p, from, to, every_bucket.data()}; });
}

at::Tensor rpe_index_cpu(const at::Tensor& input, const at::Tensor& index) {
  const Problem p = check_rpe_index(input, index);
  at::Tensor output = at::empty({input.size(0), input.size(1), p.queries, p.keys}, input.options());
  switch (input.element_size()) { // a gather moves bits, whatever they stand for
    case 2: gather<uint16_t>(p, input, index, output); break;
    case 4: gather<uint32_t>(p, input, index, output); break;
    case 8: gather<uint64_t>(p, input, index, output); break;
  }
  return output;
}

at::Tensor rpe_bucket_sum_cpu(const at::Tensor& any_strides, const at::Tensor& index, int64_t num_buckets) {
  const bool dense_rows = any_strides.dim() == 4 && any_strides.stride(3) == 1;
  const at::Tensor input = dense_rows ? any_strides : any_strides.contiguous();
  const Problem p = check_rpe_bucket_sum(input, index, num_buckets);
  at::Tensor output = at::empty({input.size(0), input.size(1), p.queries, p.buckets}, input.options());
  switch (input.scalar_type()) {
    case at::kDouble: bucket_sum<double, double, double>(p, input, index, output); break;
    case at::kFloat: bucket_sum<float, float, float>(p, input, index, output); break;
    case at::kHalf: bucket_sum<c10::Half, float, uint16_t>(p, input, index, output); break;
    default: bucket_sum<c10::BFloat16, float, uint16_t>(p, input, index, output);
  }
  return output;
}

} // namespace
} // namespace rpe_ops

TORCH_LIBRARY_IMPL(rpe_ops, CPU, m) {
  m.impl("rpe_index", rpe_ops::rpe_index_cpu);
  m.impl("rpe_bucket_sum", rpe_ops::rpe_bucket_sum_cpu);
}
