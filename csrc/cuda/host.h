// The block of threads of device.cuh on the host: a phase is a loop over the threads. Tests shuffle
// the order of the threads, to find code that relies on one.
#pragma once

#include <vector>

#define KTO_VECTOR_BYTES 16
#include "../cpu/vector.h"
#include "launch.h"

#define KTO_DEVICE inline
#define KTO_ROLLED

namespace kto {

struct alignas(16) Vector {
  uint32_t x, y, z, w;
};

inline float power_of_two(float x) { return exp2f(x); }

// a * b, which no compiler fuses with a sum.
inline float rounded_product(float a, float b) {
  const volatile float product = a * b;
  return product;
}

inline float divide(float a, float b) { return a / b; }

// Traps on an address that is not aligned as a GPU requires.
inline void check_aligned(const void* p) {
  if (uintptr_t(p) % sizeof(Vector) != 0) __builtin_trap();
}
template <bool>
Vector load_vector(const void* p) {
  check_aligned(p);
  return *static_cast<const Vector*>(p);
}
inline void store_vector(void* p, Vector v) {
  check_aligned(p);
  *static_cast<Vector*>(p) = v;
}

template <DType kType>
struct Codec;

template <>
struct Codec<DType::f32> {
  using Element = uint32_t;
  static void unpack(uint32_t word, float* u) { memcpy(u, &word, 4); }
  static uint32_t pack(const float* u) {
    uint32_t word;
    memcpy(&word, u, 4);
    return word;
  }
};

template <class Half>
void unpack_halves(uint32_t word, float* u) {
  const Half pair[2] = {{uint16_t(word)}, {uint16_t(word >> 16)}};
  for (int k = 0; k < 2; ++k) u[k] = load_one(pair + k);
}
template <class Half>
uint32_t pack_halves(const float* u) {
  Half pair[2];
  for (int k = 0; k < 2; ++k) store_one(pair + k, u[k]);
  return uint32_t(pair[1].bits) << 16 | pair[0].bits;
}

template <>
struct Codec<DType::f16> {
  using Element = uint16_t;
  static void unpack(uint32_t word, float* u) { unpack_halves<f16>(word, u); }
  static uint32_t pack(const float* u) { return pack_halves<f16>(u); }
};

template <>
struct Codec<DType::bf16> {
  using Element = uint16_t;
  static void unpack(uint32_t word, float* u) { unpack_halves<bf16>(word, u); }
  static uint32_t pack(const float* u) { return pack_halves<bf16>(u); }
};

template <int kSize>
class Block {
 public:
  static constexpr int kThreads = kSize;

  // `order` lists the numbers of the threads in the order in which they run.
  Block(unsigned index, const std::vector<int>& order) : index_(index), order_(order) {}

  unsigned index() const { return index_; }
  void barrier() {}

  template <class F>
  void each(F&& f) {
    for (int thread : order_) f(thread);
  }

  template <class F>
  void once(F&& f) {
    f();
  }

  template <class F>
  auto broadcast(F&& f) {
    return f();
  }

  template <class F, class ShareAt>
  auto softmax(F&& f, ShareAt&& share_at) {
    decltype(f(0)) found[kSize];
    for (int thread : order_) found[thread] = f(thread);
    float origin = found[0].origin;
    for (int thread = 1; thread < kSize; ++thread) origin = fmaxf(origin, found[thread].origin);
    decltype(share_at(found[0], origin)) shares[kSize];
    for (int thread = 0; thread < kSize; ++thread) shares[thread] = share_at(found[thread], origin);
    auto share = add_lanes(shares);
    for (int warp = 32; warp < kSize; warp += 32) share = share + add_lanes(shares + warp);
    return share;
  }

  template <class Sum, class Term, class Store>
  void sums(int64_t n, Term&& term, Store&& store) {
    for (int64_t i = 0; i < n; ++i) {
      Sum sums[32];
      for (int lane = 0; lane < 32; ++lane) sums[lane] = term(i, lane, 32);
      store(i, add_lanes(sums));
    }
  }

  template <class Term>
  double total(Term&& term) {
    double sums[kSize];
    for (int thread : order_) sums[thread] = term(thread);
    double all = 0;
    for (int warp = 0; warp < kSize; warp += 32) all += add_lanes(sums + warp);
    return all;
  }

  bool arrive(unsigned* counter, int64_t count) {
    const bool last = (*counter)++ == count - 1;
    if (last) *counter = 0;
    return last;
  }

 private:
  template <class Sum>
  static Sum add_lanes(Sum* sums) {  // in the order in which a warp's shuffles add
    for (int half = 16; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) sums[lane] = sums[lane] + sums[lane + half];
    return sums[0];
  }

  unsigned index_;
  const std::vector<int>& order_;
};

}  // namespace kto
