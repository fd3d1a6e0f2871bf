// CPU kernels on raw pointers, compiled once per instruction set: cpu.cpp includes this file with RPE_OPS_ISA (a
// namespace), RPE_OPS_TARGET (a function attribute) and RPE_OPS_BYTES (of a vector register) defined.
//
// Eight planes are interleaved into a table with one row per bucket, so that each id moves eight numbers at once;
// transposes in registers lead from that table to the planes' own rows and back. The order in which a sum is added
// depends on the keys alone: not on threads, batch or instruction set.

namespace rpe_ops::RPE_OPS_ISA {

template <typename T>
constexpr int kLanes = sizeof(T) == 8 ? 4 : RPE_OPS_BYTES / 4;

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kLanes<T> * sizeof(T))));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
RPE_OPS_TARGET RPE_OPS_INLINE inline Vector<T> load(const T* from) {
  Vector<T> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename T>
RPE_OPS_TARGET RPE_OPS_INLINE inline void store(T* to, Vector<T> v) {
  std::memcpy(to, &v, sizeof(v));
}

template <typename T>
RPE_OPS_TARGET RPE_OPS_INLINE inline void transpose(Vector<T> (&v)[4]) {
  const Vector<T> a = RPE_OPS_SHUFFLE(T, v[0], v[1], 0, 4, 1, 5), b = RPE_OPS_SHUFFLE(T, v[0], v[1], 2, 6, 3, 7);
  const Vector<T> c = RPE_OPS_SHUFFLE(T, v[2], v[3], 0, 4, 1, 5), d = RPE_OPS_SHUFFLE(T, v[2], v[3], 2, 6, 3, 7);
  v[0] = RPE_OPS_SHUFFLE(T, a, c, 0, 1, 4, 5);
  v[1] = RPE_OPS_SHUFFLE(T, a, c, 2, 3, 6, 7);
  v[2] = RPE_OPS_SHUFFLE(T, b, d, 0, 1, 4, 5);
  v[3] = RPE_OPS_SHUFFLE(T, b, d, 2, 3, 6, 7);
}

// Each shuffle is one instruction of AVX2: within the two halves of a register, and then across them.
template <typename T>
RPE_OPS_TARGET RPE_OPS_INLINE inline void transpose(Vector<T> (&v)[8]) {
  Vector<T> u[8];
  for (int i = 0; i < 8; i += 2) {
    u[i] = RPE_OPS_SHUFFLE(T, v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    u[i + 1] = RPE_OPS_SHUFFLE(T, v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; ++k) {
      v[i + 2 * k] = RPE_OPS_SHUFFLE(T, u[i + k], u[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      v[i + 2 * k + 1] = RPE_OPS_SHUFFLE(T, u[i + k], u[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    u[i] = RPE_OPS_SHUFFLE(T, v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    u[i + 4] = RPE_OPS_SHUFFLE(T, v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  std::copy_n(u, 8, v);
}

// table[c][k] = planes[k][c * stride] for c < n
template <typename T>
RPE_OPS_TARGET void interleave(const T* const (&planes)[kPlanes], int64_t stride, int64_t n, T* table) {
  constexpr int lanes = kLanes<T>;
  int64_t c = 0;
  for (; stride == 1 && c + lanes <= n; c += lanes) {
    for (int part = 0; part < kPlanes; part += lanes) {
      Vector<T> v[lanes];
      for (int k = 0; k < lanes; ++k) v[k] = load(planes[part + k] + c);
      transpose<T>(v);
      for (int k = 0; k < lanes; ++k) store(table + (c + k) * kPlanes + part, v[k]);
    }
  }
  for (; c < n; ++c) {
    for (int k = 0; k < kPlanes; ++k) table[c * kPlanes + k] = planes[k][c * stride];
  }
}

// planes[part + k][j] = column(j, part)[k] for j < n, with part a multiple of kLanes<T>; with kAdd += and, since what
// is added twice is wrong, only in the first `count` planes
template <typename T, bool kAdd = false, typename Column>
RPE_OPS_TARGET RPE_OPS_INLINE inline void write_columns(int64_t n, T* const (&planes)[kPlanes], const Column& column,
                                                        int64_t count = kPlanes) {
  constexpr int lanes = kLanes<T>;
  T* rows[kPlanes]; // a copy whose address nobody has, so that it can stay in registers
  std::copy_n(planes, kPlanes, rows);
  const auto write = [&](int64_t j) RPE_OPS_TARGET RPE_OPS_INLINE {
    for (int part = 0; part < kPlanes; part += lanes) {
      Vector<T> v[lanes];
      for (int k = 0; k < lanes; ++k) v[k] = column(j + k, part);
      transpose<T>(v);
      for (int k = 0; k < lanes; ++k) {
        if constexpr (kAdd) {
          if (part + k >= count) return;
          v[k] += load(rows[part + k] + j);
        }
        store(rows[part + k] + j, v[k]);
      }
    }
  };
  int64_t j = 0;
  for (; j + kLine<T> <= n; j += kLine<T>) {
    for (int k = 0; k < kPlanes; ++k) __builtin_prefetch(rows[k] + j + kAhead<T>, 1);
    for (int i = 0; i < kLine<T>; i += lanes) write(j + i);
  }
  for (; j + lanes <= n; j += lanes) write(j);
  if (!kAdd && j < n && n >= lanes) {
    write(n - lanes); // some of them a second time
    j = n;
  }
  for (; j < n; ++j) {
    for (int k = 0; k < count; ++k) {
      const T value = column(j, k / lanes * lanes)[k % lanes];
      rows[k][j] = kAdd ? rows[k][j] + value : value;
    }
  }
}

// planes[k][j] = table[offsets[j] + k] for j < n
template <typename T>
RPE_OPS_TARGET void gather(const T* __restrict table, const int32_t* __restrict offsets, int64_t n,
                           T* const (&planes)[kPlanes]) {
  write_columns<T>(n, planes, [&](int64_t j, int part) RPE_OPS_TARGET RPE_OPS_INLINE {
    return load(table + offsets[j] + part);
  });
}

// planes[k][j] += table[j * step + offsets[j] + k] for j < n and k < count
template <typename T>
RPE_OPS_TARGET void gather_add(const T* __restrict table, int64_t step, const int32_t* __restrict offsets, int64_t n,
                               T* const (&planes)[kPlanes], int64_t count) {
  write_columns<T, true>(n, planes, [&](int64_t j, int part) RPE_OPS_TARGET RPE_OPS_INLINE {
    return load(table + j * step + offsets[j] + part);
  }, count);
}

// planes[k][c] += sums[c][k] for c < n and k < count
template <typename T>
RPE_OPS_TARGET void add_sums(const T* __restrict sums, int64_t n, T* const (&planes)[kPlanes], int64_t count) {
  write_columns<T, true>(n, planes, [&](int64_t c, int part) RPE_OPS_TARGET RPE_OPS_INLINE {
    return load(sums + c * kPlanes + part);
  }, count);
}

// sums[j * step + offsets[j] + k] += planes[k][j] for j < n, with places of their own for every j
template <typename T>
RPE_OPS_TARGET void scatter_add(const T* const (&planes)[kPlanes], int64_t step, const int32_t* __restrict offsets,
                                int64_t n, T* __restrict sums) {
  constexpr int lanes = kLanes<T>;
  const T* rows[kPlanes];
  std::copy_n(planes, kPlanes, rows);
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    for (int part = 0; part < kPlanes; part += lanes) {
      Vector<T> v[lanes];
      for (int k = 0; k < lanes; ++k) v[k] = load(rows[part + k] + j);
      transpose<T>(v);
      for (int k = 0; k < lanes; ++k) {
        T* at = sums + (j + k) * step + offsets[j + k] + part;
        store(at, load(at) + v[k]);
      }
    }
  }
  for (; j < n; ++j) {
    for (int k = 0; k < kPlanes; ++k) sums[j * step + offsets[j] + k] += rows[k][j];
  }
}

// planes[k][c] = even[c][k] + odd[c][k] for c < n
template <typename T>
RPE_OPS_TARGET void write_sums(const T* __restrict even, const T* __restrict odd, int64_t n,
                               T* const (&planes)[kPlanes]) {
  write_columns<T>(n, planes, [&](int64_t c, int part) RPE_OPS_TARGET RPE_OPS_INLINE {
    return load(even + c * kPlanes + part) + load(odd + c * kPlanes + part);
  });
}

// even[c][k] = sum of planes[k][j] over the even j < n with offsets[j] = c * kPlanes, odd[c][k] over the odd ones:
// neighbours often share a bucket, and one addition would have to wait for the other.
template <typename T>
RPE_OPS_TARGET void accumulate(const T* const (&planes)[kPlanes], const int32_t* __restrict offsets, int64_t n,
                               int64_t buckets, T* even, T* odd) {
  constexpr int lanes = kLanes<T>;
  const T* rows[kPlanes];
  std::copy_n(planes, kPlanes, rows);
  std::memset(even, 0, sizeof(T) * buckets * kPlanes);
  std::memset(odd, 0, sizeof(T) * buckets * kPlanes);
  // Adds those of the keys j to j + lanes - 1 that are not before `first`; `parity` is that of j.
  const auto add = [&](int64_t j, int64_t first, int64_t parity) RPE_OPS_TARGET RPE_OPS_INLINE {
    for (int part = 0; part < kPlanes; part += lanes) {
      Vector<T> v[lanes];
      for (int k = 0; k < lanes; ++k) v[k] = load(rows[part + k] + j);
      transpose<T>(v);
      for (int k = 0; k < lanes; ++k) {
        if (j + k < first) continue;
        T* sums = ((parity + k) % 2 ? odd : even) + offsets[j + k] + part;
        store(sums, load(sums) + v[k]);
      }
    }
  };
  int64_t j = 0;
  for (; j + kLine<T> <= n; j += kLine<T>) {
    for (int k = 0; k < kPlanes; ++k) __builtin_prefetch(rows[k] + j + kAhead<T>);
    for (int i = 0; i < kLine<T>; i += lanes) add(j + i, j + i, 0);
  }
  for (; j + lanes <= n; j += lanes) add(j, j, 0);
  if (j < n && n >= lanes) {
    add(n - lanes, j, n - lanes);
    j = n;
  }
  for (; j < n; ++j) {
    T* sums = (j % 2 ? odd : even) + offsets[j];
    for (int k = 0; k < kPlanes; ++k) sums[k] += rows[k][j];
  }
}

// offsets[j] = ids[j * stride] * kPlanes for j < n; false if an id is no bucket.
template <typename Id>
RPE_OPS_TARGET bool load_offsets(const Id* __restrict ids, int64_t stride, int64_t n, int64_t buckets,
                                 int32_t* __restrict offsets) {
  using Unsigned = std::make_unsigned_t<Id>;
  const auto limit = static_cast<Unsigned>(buckets);
  Unsigned bad = 0;
  const auto convert = [&](int64_t step) RPE_OPS_TARGET RPE_OPS_INLINE {
    for (int64_t j = 0; j < n; ++j) {
      const auto id = static_cast<Unsigned>(ids[j * step]);
      bad |= static_cast<Unsigned>(id >= limit);
      offsets[j] = static_cast<int32_t>(static_cast<uint32_t>(id) * kPlanes);
    }
  };
  stride == 1 ? convert(1) : convert(stride); // the former becomes vector instructions
  return bad == 0;
}

// to[j] = from[j] for j < n
template <typename From, typename To>
RPE_OPS_TARGET void convert(const From* __restrict from, int64_t n, To* __restrict to) {
  for (int64_t j = 0; j < n; ++j) to[j] = from[j];
}

} // namespace rpe_ops::RPE_OPS_ISA

#undef RPE_OPS_ISA
#undef RPE_OPS_TARGET
#undef RPE_OPS_BYTES
