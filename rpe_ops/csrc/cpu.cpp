// The CPU side of the operators: parallel loops over queries and groups of planes.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <string>
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
constexpr int64_t kAhead = 2048 / sizeof(T); // elements between a prefetch and its use

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

// Queries per unit of work, at most: enough to use the pages and lines that neighbouring rows share.
constexpr int64_t kQueries = 16;
// Keys per unit of work where tables belong to keys: their tables are to stay in a core's cache.
int64_t keys_per_block(const Problem& p) {
  const int64_t most = std::clamp<int64_t>(p.keys, 1, 64);
  return std::clamp<int64_t>(16384 / std::max<int64_t>(1, p.buckets), 1, most);
}

// RPE_OPS_BEST(kernel<types>) is that kernel for what PyTorch finds this processor able to (see ATEN_CPU_CAPABILITY).
#ifdef __x86_64__
bool has_avx2() {
  static const std::string capability = at::get_cpu_capability();
  return capability.rfind("AVX", 0) == 0; // AVX2 or AVX512
}
#define RPE_OPS_BEST(...) (has_avx2() ? avx2::__VA_ARGS__ : baseline::__VA_ARGS__)
#else
#define RPE_OPS_BEST(...) baseline::__VA_ARGS__
#endif

// Table offsets for the ids of one query and the keys `first` to `last` - 1; raises IndexError for an id that is no
// bucket.
template <typename Id>
void load_offsets(const at::Tensor& index, int64_t query, int64_t first, int64_t last, int64_t buckets,
                  int32_t* offsets) {
  const Id* ids = index.const_data_ptr<Id>() + query * index.stride(0);
  const auto load = RPE_OPS_BEST(load_offsets<Id>);
  if (load(ids + first * index.stride(1), index.stride(1), last - first, buckets, offsets)) return;
  for (int64_t j = first; j < last; ++j) {
    const Id id = ids[j * index.stride(1)];
    TORCH_CHECK_INDEX(0 <= id && id < buckets, "rpe_ops: id ", id, " at index[", query, ", ", j, "] is not one of the ",
                      buckets, " buckets (0 to ", buckets - 1, ")");
  }
}

auto offsets_loader(const at::Tensor& index) {
  return index.scalar_type() == at::kInt ? load_offsets<int32_t> : load_offsets<int64_t>;
}

// For every group of eight planes and every query, calls start(first plane) and then row(query, offsets) of a worker;
// each thread makes one of its own. Threads take the ids of a few queries through all planes.
template <typename MakeWorker>
void for_each_row(const Problem& p, const at::Tensor& index, const MakeWorker& make_worker) {
  const auto load = offsets_loader(index);
  const int64_t groups = at::divup(p.planes, kPlanes), blocks = at::divup(p.queries, kQueries);
  const int64_t unit = kQueries * kPlanes * std::max<int64_t>(1, std::max(p.keys, p.buckets));
  at::parallel_for(0, blocks * groups, at::divup(32768, unit), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> offsets(kQueries * p.keys);
    auto worker = make_worker();
    for (int64_t u = begin; u < end; ++u) {
      const int64_t block = u / groups, first = block * p.queries / blocks, last = (block + 1) * p.queries / blocks;
      if (u == begin || u % groups == 0) {
        for (int64_t i = first; i < last; ++i) {
          load(index, i, 0, p.keys, p.buckets, offsets.data() + (i - first) * p.keys);
        }
      }
      worker.start(u % groups * kPlanes);
      for (int64_t i = first; i < last; ++i) worker.row(i, offsets.data() + (i - first) * p.keys);
    }
  });
}

// As `for_each_row`, where it is the keys that own the tables: threads take a few keys through all planes, and a worker
// gets start(first plane, first key, keys), row(query, offsets) for every query, and finish().
template <typename MakeWorker>
void for_each_block_of_keys(const Problem& p, const at::Tensor& index, const MakeWorker& make_worker) {
  const auto load = offsets_loader(index);
  const int64_t width = keys_per_block(p), groups = at::divup(p.planes, kPlanes), blocks = at::divup(p.keys, width);
  const int64_t unit = width * kPlanes * std::max<int64_t>(1, std::max(p.queries, p.buckets));
  at::parallel_for(0, blocks * groups, at::divup(32768, unit), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> offsets(width * p.queries);
    auto worker = make_worker();
    for (int64_t u = begin; u < end; ++u) {
      const int64_t block = u / groups, first = block * p.keys / blocks, last = (block + 1) * p.keys / blocks;
      if (u == begin || u % groups == 0) {
        for (int64_t i = 0; i < p.queries; ++i) load(index, i, first, last, p.buckets, offsets.data() + i * width);
      }
      worker.start(u % groups * kPlanes, first, last - first);
      for (int64_t i = 0; i < p.queries; ++i) worker.row(i, offsets.data() + i * width);
      worker.finish();
    }
  });
}

// Eight rows in memory, one per plane. Past the last plane it comes again, to be read or written (not added to) once
// more.
template <typename T>
struct Rows {
  T* of[kPlanes] = {};

  Rows() = default;

  template <typename Place>
  Rows(int64_t planes, const Place& place) {
    for (int64_t k = 0; k < kPlanes; ++k) of[k] = place(std::min(k, planes - 1));
  }

  Rows operator+(int64_t elements) const {
    return Rows(kPlanes, [&](int64_t k) { return of[k] + elements; });
  }
};

// What the eight planes hold for one bucket. Aligned, so that no vector straddles two cache lines.
template <typename T>
struct alignas(kPlanes * sizeof(T)) TableRow {
  T values[kPlanes];
};

// With kAdd, += in place of =.
template <typename T, bool kAdd = false>
struct IndexWorker {
  const Problem& p;
  const T* input;
  T* output;
  decltype(&baseline::interleave<T>) interleave = RPE_OPS_BEST(interleave<T>);
  decltype(&baseline::gather<T>) gather = RPE_OPS_BEST(gather<T>);
  decltype(&baseline::gather_add<T>) gather_add = RPE_OPS_BEST(gather_add<T>);
  std::vector<TableRow<T>> table = std::vector<TableRow<T>>(p.buckets);
  int64_t planes = 0;
  Rows<const T> from;
  Rows<T> to;

  void start(int64_t plane) {
    planes = std::min<int64_t>(p.planes - plane, kPlanes);
    from = Rows<const T>(p.planes - plane, [&](int64_t k) { return input + p.offset(plane + k, 0); });
    to = Rows<T>(p.planes - plane, [&](int64_t k) { return output + (plane + k) * p.queries * p.keys; });
  }

  void row(int64_t query, const int32_t* offsets) {
    interleave((from + query * p.stride_query).of, p.stride_last, p.buckets, table.data()->values);
    if constexpr (kAdd) {
      gather_add(table.data()->values, 0, offsets, p.keys, (to + query * p.keys).of, planes);
    } else {
      gather(table.data()->values, offsets, p.keys, (to + query * p.keys).of);
    }
  }
};

// Half types are widened to float row by row, and their sums rounded once.
template <typename T, typename Sum>
struct SumWorker {
  static constexpr bool kNarrow = !std::is_same_v<T, Sum>;
  const Problem& p;
  const T* input;
  T* output;
  decltype(&baseline::accumulate<Sum>) accumulate = RPE_OPS_BEST(accumulate<Sum>);
  decltype(&baseline::write_sums<Sum>) write_sums = RPE_OPS_BEST(write_sums<Sum>);
  decltype(&baseline::convert<T, Sum>) widen = RPE_OPS_BEST(convert<T, Sum>);
  decltype(&baseline::convert<Sum, T>) round = RPE_OPS_BEST(convert<Sum, T>);
  std::vector<TableRow<Sum>> even = std::vector<TableRow<Sum>>(p.buckets), odd = even;
  std::vector<Sum> wide = std::vector<Sum>(kNarrow ? kPlanes * std::max(p.keys, p.buckets) : 0);
  Rows<const T> from;
  Rows<T> to;

  void start(int64_t plane) {
    from = Rows<const T>(p.planes - plane, [&](int64_t k) { return input + p.offset(plane + k, 0); });
    to = Rows<T>(p.planes - plane, [&](int64_t k) { return output + (plane + k) * p.queries * p.buckets; });
  }

  void row(int64_t query, const int32_t* offsets) {
    const Rows<const T> in = from + query * p.stride_query;
    const Rows<T> out = to + query * p.buckets;
    Sum *const evens = even.data()->values, *const odds = odd.data()->values;
    if constexpr (kNarrow) {
      const Rows<const Sum> keys(kPlanes, [&](int64_t k) { return wide.data() + k * p.keys; });
      const Rows<Sum> sums(kPlanes, [&](int64_t k) { return wide.data() + k * p.buckets; });
      for (int k = 0; k < kPlanes; ++k) widen(in.of[k], p.keys, wide.data() + k * p.keys);
      accumulate(keys.of, offsets, p.keys, p.buckets, evens, odds);
      write_sums(evens, odds, p.buckets, sums.of);
      for (int k = 0; k < kPlanes; ++k) round(sums.of[k], p.buckets, out.of[k]);
    } else {
      accumulate(in.of, offsets, p.keys, p.buckets, evens, odds);
      write_sums(evens, odds, p.buckets, out.of);
    }
  }
};

// output[plane, i, j] += input[plane, j, index[i, j]]; the rows of the input, p's "queries" in its strides, are keys
template <typename T>
struct KeyIndexAddWorker {
  const Problem& p;
  const T* input;
  T* output;
  decltype(&baseline::interleave<T>) interleave = RPE_OPS_BEST(interleave<T>);
  decltype(&baseline::gather_add<T>) gather_add = RPE_OPS_BEST(gather_add<T>);
  std::vector<TableRow<T>> table = std::vector<TableRow<T>>(keys_per_block(p) * p.buckets);
  int64_t keys = 0, planes = 0;
  Rows<T> to;

  void start(int64_t plane, int64_t key, int64_t count) {
    keys = count;
    planes = std::min<int64_t>(p.planes - plane, kPlanes);
    for (int64_t j = 0; j < keys; ++j) {
      const Rows<const T> from(p.planes - plane, [&](int64_t k) { return input + p.offset(plane + k, key + j); });
      interleave(from.of, p.stride_last, p.buckets, table[j * p.buckets].values);
    }
    to = Rows<T>(p.planes - plane, [&](int64_t k) { return output + (plane + k) * p.queries * p.keys + key; });
  }

  void row(int64_t query, const int32_t* offsets) {
    gather_add(table.data()->values, p.buckets * kPlanes, offsets, keys, (to + query * p.keys).of, planes);
  }

  void finish() {}
};

// output[plane, j, index[i, j]] += input[plane, i, j]
template <typename T>
struct KeySumAddWorker {
  const Problem& p;
  const T* input;
  T* output;
  decltype(&baseline::scatter_add<T>) scatter_add = RPE_OPS_BEST(scatter_add<T>);
  decltype(&baseline::add_sums<T>) add_sums = RPE_OPS_BEST(add_sums<T>);
  std::vector<TableRow<T>> table = std::vector<TableRow<T>>(keys_per_block(p) * p.buckets);
  int64_t keys = 0, planes = 0;
  Rows<const T> from;
  Rows<T> to;

  void start(int64_t plane, int64_t key, int64_t count) {
    keys = count;
    planes = std::min<int64_t>(p.planes - plane, kPlanes);
    std::fill_n(table.begin(), keys * p.buckets, TableRow<T>{});
    from = Rows<const T>(p.planes - plane, [&](int64_t k) { return input + p.offset(plane + k, 0) + key; });
    to = Rows<T>(p.planes - plane, [&](int64_t k) { return output + ((plane + k) * p.keys + key) * p.buckets; });
  }

  void row(int64_t query, const int32_t* offsets) {
    scatter_add((from + query * p.stride_query).of, p.buckets * kPlanes, offsets, keys, table.data()->values);
  }

  void finish() { add_sums(table.data()->values, keys * p.buckets, to.of, planes); }
};

template <typename T>
void gather(const Problem& p, const at::Tensor& input, const at::Tensor& index, at::Tensor& output) {
  const T* from = static_cast<const T*>(input.const_data_ptr());
  T* to = static_cast<T*>(output.mutable_data_ptr());
  for_each_row(p, index, [&] { return IndexWorker<T>{p, from, to}; });
}

template <typename T, typename Sum>
void bucket_sum(const Problem& p, const at::Tensor& input, const at::Tensor& index, at::Tensor& output) {
  const T* from = input.const_data_ptr<T>();
  T* to = output.mutable_data_ptr<T>();
  for_each_row(p, index, [&] { return SumWorker<T, Sum>{p, from, to}; });
}

at::Tensor rpe_index_cpu(const at::Tensor& input, const at::Tensor& index) {
  const Problem p = check_rpe_index("rpe_index", input, index);
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
  const Problem p = check_rpe_bucket_sum("rpe_bucket_sum", input, index, num_buckets);
  at::Tensor output = at::empty({input.size(0), input.size(1), p.queries, p.buckets}, input.options());
  switch (input.scalar_type()) {
    case at::kDouble: bucket_sum<double, double>(p, input, index, output); break;
    case at::kFloat: bucket_sum<float, float>(p, input, index, output); break;
    case at::kHalf: bucket_sum<c10::Half, float>(p, input, index, output); break;
    default: bucket_sum<c10::BFloat16, float>(p, input, index, output);
  }
  return output;
}

// add(a zero of the type)
template <typename Add>
void dispatch_add(const char* op, const at::Tensor& input, const Add& add) {
  switch (input.scalar_type()) {
    case at::kDouble: return add(double());
    case at::kFloat: return add(float());
    default: TORCH_CHECK_TYPE(false, op, ": input must be float32 or float64, got ", input.scalar_type());
  }
}

void rpe_index_add_cpu(at::Tensor& output, const at::Tensor& input, const at::Tensor& index, bool by_key) {
  constexpr auto op = "rpe_index_add_";
  const Problem p = by_key ? check_by_key(op, input, index) : check_rpe_index(op, input, index);
  check_output(op, output, input, {input.size(0), input.size(1), p.queries, p.keys});
  dispatch_add(op, input, [&](auto zero) {
    using T = decltype(zero);
    const T* from = input.const_data_ptr<T>();
    T* to = output.mutable_data_ptr<T>();
    if (by_key) {
      for_each_block_of_keys(p, index, [&] { return KeyIndexAddWorker<T>{p, from, to}; });
    } else {
      for_each_row(p, index, [&] { return IndexWorker<T, true>{p, from, to}; });
    }
  });
}

void rpe_bucket_sum_add_cpu(at::Tensor& output, const at::Tensor& any_strides, const at::Tensor& index) {
  constexpr auto op = "rpe_bucket_sum_add_";
  const bool dense_rows = any_strides.dim() == 4 && any_strides.stride(3) == 1;
  const at::Tensor input = dense_rows ? any_strides : any_strides.contiguous();
  const Problem p = check_rpe_bucket_sum(op, input, index, output.dim() == 4 ? output.size(3) : 0);
  check_output(op, output, any_strides, {input.size(0), input.size(1), p.keys, p.buckets});
  dispatch_add(op, input, [&](auto zero) {
    using T = decltype(zero);
    const T* from = input.const_data_ptr<T>();
    T* to = output.mutable_data_ptr<T>();
    for_each_block_of_keys(p, index, [&] { return KeySumAddWorker<T>{p, from, to}; });
  });
}

} // namespace
} // namespace rpe_ops

TORCH_LIBRARY_IMPL(rpe_ops, CPU, m) {
  m.impl("rpe_index_add_", rpe_ops::rpe_index_add_cpu);
  m.impl("rpe_bucket_sum_add_", rpe_ops::rpe_bucket_sum_add_cpu);
  m.impl("rpe_index", rpe_ops::rpe_index_cpu);
  m.impl("rpe_bucket_sum", rpe_ops::rpe_bucket_sum_cpu);
}
