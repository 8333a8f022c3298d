// The block of threads that the kernels are written against, on the GPU. host.h has the same names.
//
// A kernel is a sequence of phases. What a phase does, it does in a function of the thread; between
// phases all threads know the same, but what `softmax` returns, which thread 0 alone knows
// (`once`).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

#define KTO_DEVICE __device__ __forceinline__
// For loops whose unrolling would cost registers and gain nothing.
#define KTO_ROLLED _Pragma("unroll 1")

namespace kto {

using Vector = uint4;  // of one load or store

// 2^x; below fp32's normal range 0.
KTO_DEVICE float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

KTO_DEVICE float divide(float a, float b) { return __fdividef(a, b); }  // 2 ulp; 0 for huge b

// Logits are the first that the caches may drop, unless the kernel reads them `again`: L2 keeps
// those, and L1, which is too small for a row, leaves them alone.
template <bool kAgain>
KTO_DEVICE Vector load_vector(const void* p) {
  const auto* vector = static_cast<const Vector*>(p);
  return kAgain ? __ldcg(vector) : __ldcs(vector);
}
KTO_DEVICE void store_vector(void* p, Vector v) { __stcs(static_cast<Vector*>(p), v); }

template <DType kType>
struct Codec;

template <>
struct Codec<DType::f32> {
  using Element = uint32_t;
  static KTO_DEVICE void unpack(uint32_t word, float* u) { u[0] = __uint_as_float(word); }
  static KTO_DEVICE uint32_t pack(const float* u) { return __float_as_uint(u[0]); }
};

template <>
struct Codec<DType::bf16> {
  using Element = uint16_t;
  static KTO_DEVICE void unpack(uint32_t word, float* u) {
    u[0] = __uint_as_float(word << 16);
    u[1] = __uint_as_float(word & 0xffff0000u);
  }
  static KTO_DEVICE uint32_t pack(const float* u) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(u[0], u[1]);
    return uint32_t(__bfloat16_as_ushort(pair.y)) << 16 | __bfloat16_as_ushort(pair.x);
  }
};

template <>
struct Codec<DType::f16> {
  using Element = uint16_t;
  static KTO_DEVICE void unpack(uint32_t word, float* u) {
    u[0] = __half2float(__ushort_as_half(uint16_t(word)));
    u[1] = __half2float(__ushort_as_half(uint16_t(word >> 16)));
  }
  static KTO_DEVICE uint32_t pack(const float* u) {
    const __half2 pair = __floats2half2_rn(u[0], u[1]);
    return uint32_t(__half_as_ushort(pair.y)) << 16 | __half_as_ushort(pair.x);
  }
};

template <int kSize>
class Block {
 public:
  static constexpr int kThreads = kSize;

  KTO_DEVICE unsigned index() const { return blockIdx.x; }
  KTO_DEVICE void barrier() { __syncthreads(); }

  template <class F>
  KTO_DEVICE void each(F&& f) {
    f(int(threadIdx.x));
  }

  template <class F>
  KTO_DEVICE void once(F&& f) {
    if (threadIdx.x == 0) f();
  }

  // What f returns to thread 0, for all threads. Between two of the same f there is a barrier.
  template <class F>
  KTO_DEVICE auto broadcast(F&& f) {
    __shared__ decltype(f()) value;
    if (threadIdx.x == 0) value = f();
    __syncthreads();
    return value;
  }

  // The sum of share_at(found, maximum) of what the threads found, in one order, at the maximum of
  // all; for thread 0.
  template <class F, class ShareAt>
  KTO_DEVICE auto softmax(F&& f, ShareAt&& share_at) {
    const auto found = f(int(threadIdx.x));
    float maximum = found.maximum;
    for (int lane = 16; lane > 0; lane /= 2)
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, lane));
    __shared__ float maxima[kSize / 32];
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = maximum;
    __syncthreads();
    for (int warp = 0; warp < kSize / 32; ++warp) maximum = fmaxf(maximum, maxima[warp]);
    auto share = add_lanes(share_at(found, maximum));
    __shared__ decltype(share) shares[kSize / 32];
    if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = share;
    __syncthreads();
    if (threadIdx.x == 0)
      for (int warp = 1; warp < kSize / 32; ++warp) share = share + shares[warp];
    return share;
  }

  // store(i, sum over a warp's lanes of term(i, lane, 32)) for each i < n.
  template <class Sum, class Term, class Store>
  KTO_DEVICE void sums(int64_t n, Term&& term, Store&& store) {
    for (int64_t i = threadIdx.x / 32; i < n; i += kSize / 32) {
      const Sum sum = add_lanes(term(i, int(threadIdx.x % 32), 32));
      if (threadIdx.x % 32 == 0) store(i, sum);
    }
    __syncthreads();
  }

  // The sum of term(thread), for all threads.
  template <class Term>
  KTO_DEVICE double total(Term&& term) {
    const double sum = add_lanes(term(int(threadIdx.x)));
    __shared__ double sums[kSize / 32];
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    double all = 0;
    for (int warp = 0; warp < kSize / 32; ++warp) all += sums[warp];
    __syncthreads();  // the next total may overwrite them
    return all;
  }

  // Whether this is the last of `count` blocks to come here; to that one all that the others wrote
  // before is visible. The counter is 0 again afterwards.
  KTO_DEVICE bool arrive(unsigned* counter, int64_t count) {
    __syncthreads();
    const bool last = broadcast([&] {
      __threadfence();
      const bool arrived_last = atomicAdd(counter, 1u) == count - 1;
      if (arrived_last) *counter = 0;
      return arrived_last;
    });
    if (last) __threadfence();
    return last;
  }

 private:
  template <class Sum>
  static KTO_DEVICE Sum add_lanes(Sum sum) {
    for (int lane = 16; lane > 0; lane /= 2) sum = sum + shuffle(sum, lane);
    return sum;
  }
  template <class Sum>
  static KTO_DEVICE Sum shuffle(Sum value, int lane) {
    unsigned parts[sizeof(Sum) / sizeof(unsigned)];
    memcpy(parts, &value, sizeof(Sum));
    for (unsigned& part : parts) part = __shfl_xor_sync(~0u, part, lane);
    memcpy(&value, parts, sizeof(Sum));
    return value;
  }
};

}  // namespace kto
