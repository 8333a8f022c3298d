// Vectors of KTO_VECTOR_BYTES, by the vector extensions of GCC and Clang: the same source is
// compiled for every instruction set, so that no kernel is written twice.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__F16C__)
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // in GCC's own intrinsics (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#ifndef KTO_VECTOR_BYTES
#error "KTO_VECTOR_BYTES: compile with the vector width of the instruction set"
#endif

// Everything here has internal linkage: of two inline functions with external linkage the linker
// keeps one, and the copy compiled for AVX-512 must not end up on a baseline machine.
namespace {

constexpr int kLanes = KTO_VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(KTO_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(KTO_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(KTO_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(KTO_VECTOR_BYTES / 2)));

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

inline Floats splat(float value) { return Floats{} + value; }

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

inline Floats to_float(Halves h, bf16) { return (Floats)(__builtin_convertvector(h, Words) << 16); }

// Rounds to the nearest (even) bf16, in the upper half of each word. A NaN whose payload is in the
// lower half alone would become an infinity or a number.
inline Words round_to_bf16(Floats f) {
  const Words bits = (Words)f;
  return bits + (((bits >> 16) & 1u) + 0x7fffu);
}

inline Halves from_float(Floats f, bf16) {
  return __builtin_convertvector(round_to_bf16(f) >> 16, Halves);
}

inline Floats to_float(Halves h, f16) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps((__m128i)h);
#else
  const Words w = __builtin_convertvector(h, Words);
  const Floats scaled =
      (Floats)((w & 0x7fffu) << 13) * 0x1p112f;  // makes subnormals normal numbers
  const Words finite = (Words)scaled;
  const Words special = ((w & 0x7fffu) << 13) | 0x7f800000u;  // inf and NaN
  return (Floats)(((w & 0x7c00u) == 0x7c00u ? special : finite) | ((w & 0x8000u) << 16));
#endif
}

inline Halves from_float(Floats f, f16) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (Halves)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT);
#else
  const Words sign = (Words)f & 0x80000000u;
  const Words bits = (Words)f ^ sign;
  const Words normal = (bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13;
  const Words subnormal = (Words)((Floats)bits + splat(0.5f)) - 0x3f000000u;
  const Words nan = Words{} + 0x7e00u, inf = Words{} + 0x7c00u;
  const Words large = bits > 0x7f800000u ? nan : inf;
  const Words half = bits >= 0x47800000u ? large : bits < 0x38800000u ? subnormal : normal;
  return __builtin_convertvector(half | (sign >> 16), Halves);
#endif
}

inline Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

template <class T>
inline Floats load(const T* p) {
  Halves h;
  memcpy(&h, p, sizeof h);
  return to_float(h, T{});
}
template <class T>
inline void store(T* p, Floats v) {
  const Halves h = from_float(v, T{});
  memcpy(p, &h, sizeof h);
}

// Load and store 2 * kLanes values. The order of the values in the two vectors depends on the type:
// for bf16 one holds the even and one the odd ones, which costs no shuffle.
template <class T>
inline void load2(const T* p, Floats& a, Floats& b) {
  a = load(p);
  b = load(p + kLanes);
}
template <class T>
inline void store2(T* p, Floats a, Floats b) {
  store(p, a);
  store(p + kLanes, b);
}
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
template <>
inline void load2(const bf16* p, Floats& a, Floats& b) {
  Words pairs;
  memcpy(&pairs, p, sizeof pairs);
  a = (Floats)(pairs << 16);
  b = (Floats)(pairs & 0xffff0000u);
}
template <>
inline void store2(bf16* p, Floats a, Floats b) {
  const Words pairs = (round_to_bf16(a) >> 16) | (round_to_bf16(b) & 0xffff0000u);
  memcpy(p, &pairs, sizeof pairs);
}
#endif

// Load and store the last n < kLanes values of a row. Lanes behind the end are loaded as -inf,
// which adds nothing to a softmax.
template <class T>
inline Floats load_tail(const T* p, int64_t n) {
  T values[kLanes];
  store(values, splat(-INFINITY));
  memcpy(values, p, n * sizeof(T));
  return load(values);
}
template <class T>
inline void store_tail(T* p, Floats v, int64_t n) {
  T values[kLanes];
  store(values, v);
  memcpy(p, values, n * sizeof(T));
}

template <class T>
inline float load_one(const T* p) {
  return load_tail(p, 1)[0];
}
template <class T>
inline void store_one(T* p, float value) {
  store_tail(p, splat(value), 1);
}

inline Floats power_of_two(Ints n) { return (Floats)((n + 127) << 23); }

inline float reduce_max(Floats v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}
inline double reduce_sum(Floats v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

inline bool any(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  Ints word = mask;
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= word[i];
  return bits != 0;
#endif
}

// Writes x as n ln2 + r with |r| <= ln2 / 2, and returns n and expm1(r): Cody-Waite reduction with
// the two-part ln2 and the degree-6 polynomial of Cephes' expf (Moshier), accurate to about one
// unit in the last place.
struct Reduced {
  Floats expm1, n;
};
inline Reduced reduce(Floats x) {
#if defined(__AVX512F__)
  const Floats n = (Floats)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), 0);
#else
  const Floats magic = splat(0x1.8p23f);  // adding it rounds to an integer
  const Floats n = (x * 1.44269504088896341f + magic) - magic;
#endif
  Floats r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r;
  return {p, n};
}

// x, or a finite number where x is so low (or -inf) that exp of either is 0; NaN stays NaN.
inline Floats finite_exponent(Floats x) { return x < -104.0f ? splat(-104.0f) : x; }

// exp(x) for x < 88, also where it is subnormal; NaN stays NaN.
inline Floats exp(Floats x) {
  const Reduced e = reduce(finite_exponent(x));
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)(e.expm1 + 1.0f), (__m512)e.n);
#else
  const Ints n = __builtin_convertvector(e.n, Ints);
  const Ints half = n >> 1;  // two factors, as 2^n alone may be subnormal
  return (e.expm1 + 1.0f) * power_of_two(half) * power_of_two(n - half);
#endif
}

// tanh(|x|) = e / (e + 2) with e = expm1(2|x|), which is accurate near 0 too.
inline Floats tanh(Floats x) {
  const Words sign = (Words)x & 0x80000000u;
  Floats a = (Floats)((Words)x ^ sign);
  a = a > 10.0f ? splat(10.0f) : a;  // tanh(10) is 1 in fp32
  const Reduced reduced = reduce(a + a);
  const Floats power = power_of_two(__builtin_convertvector(reduced.n, Ints));
  const Floats e = reduced.expm1 * power + (power - 1.0f);
  return (Floats)((Words)(e / (e + 2.0f)) | sign);
}

}  // namespace
