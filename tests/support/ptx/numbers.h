// Numbers of the types that PTX has, as bits of 64-bit registers, and the arithmetic that C++
// lacks.
//
// Approximate instructions (ex2.approx, rsqrt.approx, div.full, div.approx) are off by up to one
// unit in the last place, by a hash of their operands; rcp.approx.ftz.f64 keeps 20 bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

template <class To, class From>
inline To cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
inline float f32(u64 x) { return cast<float>(u32(x)); }
inline double f64(u64 x) { return cast<double>(x); }
inline u64 bits(float x) { return x != x ? 0x7fffffffu : cast<u32>(x); }
inline u64 bits(double x) { return x != x ? 0x7fffffffffffffffull : cast<u64>(x); }
inline float bf16(u64 x) { return cast<float>(u32(x) << 16); }
inline float f16(u64 x) { return float(cast<_Float16>(u16(x))); }
inline u64 to_bf16(float x) {
  if (x != x) return 0x7fff;
  const u32 b = cast<u32>(x);
  return u16((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
inline u64 to_f16(float x) { return x != x ? 0x7fff : cast<u16>(_Float16(x)); }
inline float ftz(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

// max and min: a NaN loses, +0 is above -0.
template <class T>
inline T pmax(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
template <class T>
inline T pmin(T a, T b) {
  return -pmax<T>(-a, -b);
}

inline u64 mix(u64 x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9ull;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebull;
  return x ^ x >> 31;
}
inline u64 approximate_seed = 0;  // 0: exact
// One unit up, down or not at all; zero, infinities, NaN and the borders of the range stay.
inline float nudge(float x, u64 key) {
  if (!approximate_seed || x == 0 || !std::isfinite(x)) return x;
  const u32 b = cast<u32>(x) + u32(mix(key ^ approximate_seed) % 3) - 1;
  const float y = cast<float>(b);
  return std::isnormal(y) == std::isnormal(x) && std::isfinite(y) ? y : x;
}
inline float ex2(float x) {
  x = ftz(x);
  const float y = ftz(float(std::exp2(double(x))));
  return std::floor(x) == x ? y : nudge(y, cast<u32>(x));
}
inline float rsqrt(float x) {  // 1 / sqrt(-0) is -inf, where C++ has it too
  x = ftz(x);
  return nudge(ftz(float(1 / std::sqrt(double(x)))), cast<u32>(x));
}
inline float div_approx(float a, float b, bool full) {
  if (!full && std::fabs(b) > 0x1p126f && std::isfinite(b))
    return std::isinf(a) ? NAN : std::copysign(0.0f, a * b);
  return nudge(a / b, u64(cast<u32>(a)) << 32 | cast<u32>(b));
}
inline double rcp_approx(double x) {  // from and to the upper word
  const double high = cast<double>(cast<u64>(x) & ~0xffffffffull);
  if (std::fpclassify(high) == FP_SUBNORMAL || high == 0) return std::copysign(INFINITY, x);
  const double y = cast<double>((cast<u64>(1 / high) + 0x80000000ull) & ~0xffffffffull);
  return std::fpclassify(y) == FP_SUBNORMAL ? std::copysign(0.0, y) : y;
}
inline u32 prmt(u32 a, u32 b, u32 select) {
  const u64 bytes = u64(b) << 32 | a;
  u32 result = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 s = select >> 4 * k & 15;
    u8 byte = u8(bytes >> 8 * (s & 7));
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= u32(byte) << 8 * k;
  }
  return result;
}
template <class T>
inline T shr(T x, u32 n) {
  return n >= 8 * sizeof(T) ? (x < 0 ? T(-1) : T(0)) : T(x >> n);
}
template <class T>
inline T shl(T x, u32 n) {
  return n >= 8 * sizeof(T) ? T(0) : T(x << n);
}
template <class T>
inline i64 integer(double x) {  // cvt.rzi saturates, NaN gives 0
  if (x != x) return 0;
  if (x <= double(std::numeric_limits<T>::min())) return i64(std::numeric_limits<T>::min());
  if (x >= double(std::numeric_limits<T>::max())) return i64(std::numeric_limits<T>::max());
  return i64(T(x));
}

inline u32 extract(u32 x, u32 at, u32 count) {
  return shr(x, at) & (count >= 32 ? ~0u : (1u << count) - 1);
}

}  // namespace ptx
