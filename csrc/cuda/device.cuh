// The block of threads that the kernels are written for, on the GPU; host.h has the same names for
// the host.
//
// A kernel is a sequence of phases, each of them a function of the thread. Between phases all
// threads hold the same values. The result of `softmax` is the exception: thread 0 alone has it,
// and uses it in `once`.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

#define KTO_DEVICE __device__ __forceinline__
// For loops whose unrolling would cost registers and gain nothing.
#define KTO_ROLLED _Pragma("unroll 1")

namespace kto {

using Vector = uint4;  // what one instruction loads or stores

// 2^x, or 0 where that is below fp32's normal range.
KTO_DEVICE float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// a * b, which no compiler fuses with a sum.
KTO_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }

KTO_DEVICE float divide(float a, float b) { return __fdividef(a, b); }  // 2 ulp; 0 for huge b

// A kernel that reads each logit once lets the caches drop logits before anything else. One that
// reads them twice (kAgain) keeps them in L2 and out of L1, which is too small for a row.
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

  // Calls f on thread 0 and returns the result to all threads. Two calls with the same f need a
  // barrier between them.
  template <class F>
  KTO_DEVICE auto broadcast(F&& f) {
    __shared__ decltype(f()) value;
    if (threadIdx.x == 0) value = f();
    __syncthreads();
    return value;
  }

  // Calls f(thread), finds the highest origin among the results, and returns the sum of
  // share_at(result, origin), added in a fixed order. Thread 0 alone gets it.
  template <class F, class ShareAt>
  KTO_DEVICE auto softmax(F&& f, ShareAt&& share_at) {
    const auto found = f(int(threadIdx.x));
    float origin = found.origin;
    for (int lane = 16; lane > 0; lane /= 2)
      origin = fmaxf(origin, __shfl_xor_sync(~0u, origin, lane));
    __shared__ float origins[kSize / 32];
    if (threadIdx.x % 32 == 0) origins[threadIdx.x / 32] = origin;
    __syncthreads();
    for (int warp = 0; warp < kSize / 32; ++warp) origin = fmaxf(origin, origins[warp]);
    auto share = add_lanes(share_at(found, origin));
    __shared__ decltype(share) shares[kSize / 32];
    if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = share;
    __syncthreads();
    if (threadIdx.x == 0) KTO_ROLLED
    for (int warp = 1; warp < kSize / 32; ++warp) share = share + shares[warp];
    return share;
  }

  // Calls store(i, sum) for each i < n, with the sum of term(i, lane, 32) over the lanes of a warp.
  template <class Sum, class Term, class Store>
  KTO_DEVICE void sums(int64_t n, Term&& term, Store&& store) {
    for (int64_t i = threadIdx.x / 32; i < n; i += kSize / 32) {
      const Sum sum = add_lanes(term(i, int(threadIdx.x % 32), 32));
      if (threadIdx.x % 32 == 0) store(i, sum);
    }
    __syncthreads();
  }

  // The sum of term(thread) over the threads; every thread gets it.
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

  // Whether this is the last of `count` blocks to come here. The last one sees everything that the
  // others have written, and leaves the counter at 0.
  KTO_DEVICE bool arrive(unsigned* counter, int64_t count) {
    __syncthreads();
    // The fences make the atomic release what this block has written and acquire what the others
    // have; the barriers before and behind pass it on between this block's threads.
    return broadcast([&] {
      __threadfence();
      const bool last = atomicAdd(counter, 1u) == count - 1;
      __threadfence();
      if (last) *counter = 0;
      return last;
    });
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
