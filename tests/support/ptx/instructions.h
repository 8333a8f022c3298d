// The instructions that the kernels use: their names, their form in memory, and what those do that
// touch only registers.
#pragma once

#include "numbers.h"

namespace ptx {

// clang-format off
// Instructions that touch only registers: a name, and how the operands A, B and C make D.
#define COMPARE(X, type, get) \
  X(setp_eq_##type, D = get(A) == get(B)) X(setp_ne_##type, D = get(A) != get(B)) \
  X(setp_lt_##type, D = get(A) < get(B)) X(setp_le_##type, D = get(A) <= get(B)) \
  X(setp_gt_##type, D = get(A) > get(B)) X(setp_ge_##type, D = get(A) >= get(B))
#define ORDERED(a, b) (!((a) != (a) || (b) != (b)))
#define COMPARE_FLOATS(X, type, get) \
  X(setp_eq_##type, D = get(A) == get(B)) \
    X(setp_ne_##type, D = ORDERED(get(A), get(B)) && get(A) != get(B)) \
  X(setp_lt_##type, D = get(A) < get(B)) X(setp_le_##type, D = get(A) <= get(B)) \
  X(setp_gt_##type, D = get(A) > get(B)) X(setp_ge_##type, D = get(A) >= get(B)) \
  X(setp_equ_##type, D = !(ORDERED(get(A), get(B)) && get(A) != get(B))) \
    X(setp_neu_##type, D = !(get(A) == get(B))) \
  X(setp_ltu_##type, D = !(get(A) >= get(B))) X(setp_leu_##type, D = !(get(A) > get(B))) \
  X(setp_gtu_##type, D = !(get(A) <= get(B))) X(setp_geu_##type, D = !(get(A) < get(B))) \
  X(setp_num_##type, D = ORDERED(get(A), get(B))) X(setp_nan_##type, D = !ORDERED(get(A), get(B)))
#define REGISTER_OPS(X) \
  X(mov, D = A) X(mov_16, D = u16(A)) X(mov_32, D = u32(A)) \
  X(unpack_16, { const u64 v = A; D = u16(v); r[in.o[2]] = u16(v >> 16); }) \
  X(pack_16, D = u16(A) | u32(u16(B)) << 16) \
  X(unpack_32, { const u64 v = A; D = u32(v); r[in.o[2]] = u32(v >> 32); }) \
  X(pack_32, D = u32(A) | B << 32) \
  X(add_32, D = u32(A + B)) X(add_64, D = A + B) X(sub_32, D = u32(A - B)) X(sub_64, D = A - B) \
  X(add_16, D = u16(A + B)) X(sub_16, D = u16(A - B)) \
  X(mul_lo_16, D = u16(A * B)) X(mul_lo_32, D = u32(A * B)) X(mul_lo_64, D = A * B) \
  X(mul_wide_s32, D = u64(i64(i32(A)) * i32(B))) X(mul_wide_u32, D = u64(u32(A)) * u32(B)) \
  X(mul_wide_s16, D = u32(i32(i16(A)) * i16(B))) X(mul_wide_u16, D = u32(u16(A)) * u16(B)) \
  X(mul_hi_s32, D = u32(i64(i32(A)) * i32(B) >> 32)) X(mul_hi_u32, D = u64(u32(A)) * u32(B) >> 32) \
  X(mul_hi_s64, D = u64(__int128(i64(A)) * i64(B) >> 64)) \
    X(mul_hi_u64, D = u64((unsigned __int128)(A) * B >> 64)) \
  X(mad_lo_32, D = u32(A * B + C)) X(mad_lo_64, D = A * B + C) \
  X(mad_wide_s32, D = u64(i64(i32(A)) * i32(B)) + C) X(mad_wide_u32, D = u64(u32(A)) * u32(B) + C) \
  X(neg_32, D = u32(-A)) X(neg_64, D = -A) X(abs_s32, D = u32(std::abs(i64(i32(A))))) \
    X(abs_s64, D = i64(A) < 0 ? -A : A) \
  X(min_s32, D = u32(std::min(i32(A), i32(B)))) X(max_s32, D = u32(std::max(i32(A), i32(B)))) \
  X(min_u32, D = std::min(u32(A), u32(B))) X(max_u32, D = std::max(u32(A), u32(B))) \
  X(min_s64, D = u64(std::min(i64(A), i64(B)))) X(max_s64, D = u64(std::max(i64(A), i64(B)))) \
  X(min_u64, D = std::min(A, B)) X(max_u64, D = std::max(A, B)) \
  X(and, D = A & B) X(or, D = A | B) X(xor, D = A ^ B) \
  X(not_pred, D = !A) X(not_16, D = u16(~A)) X(not_32, D = u32(~A)) X(not_64, D = ~A) \
  X(shl_16, D = shl(u16(A), u32(B))) X(shl_32, D = shl(u32(A), u32(B))) \
    X(shl_64, D = shl(A, u32(B))) \
  X(shr_u16, D = shr(u16(A), u32(B))) X(shr_s16, D = u16(shr(i16(A), u32(B)))) \
  X(shr_u32, D = shr(u32(A), u32(B))) X(shr_s32, D = u32(shr(i32(A), u32(B)))) \
  X(shr_u64, D = shr(A, u32(B))) X(shr_s64, D = u64(shr(i64(A), u32(B)))) \
  X(bfe_u32, D = extract(u32(A), u32(B) & 255, u32(C) & 255)) \
  X(prmt, D = prmt(u32(A), u32(B), u32(C))) \
  X(selp, D = C ? A : B) X(selp_16, D = u16(C ? A : B)) X(selp_32, D = u32(C ? A : B)) \
  COMPARE(X, s16, i16) COMPARE(X, u16, u16) COMPARE(X, s32, i32) COMPARE(X, u32, u32) \
    COMPARE(X, s64, i64) \
  COMPARE(X, u64, u64) COMPARE_FLOATS(X, f32, f32) COMPARE_FLOATS(X, f64, f64) \
    COMPARE_FLOATS(X, bf16, bf16) \
  COMPARE_FLOATS(X, f16, f16) \
  X(add_f32, D = bits(f32(A) + f32(B))) X(sub_f32, D = bits(f32(A) - f32(B))) \
    X(mul_f32, D = bits(f32(A) * f32(B))) \
  X(fma_f32, D = bits(std::fma(f32(A), f32(B), f32(C)))) \
    X(fms_f32, D = bits(std::fma(f32(A), f32(B), -f32(C)))) \
  X(fnma_f32, D = bits(std::fma(-f32(A), f32(B), f32(C)))) \
    X(fms_f64, D = bits(std::fma(f64(A), f64(B), -f64(C)))) \
  X(fnma_f64, D = bits(std::fma(-f64(A), f64(B), f64(C)))) \
    X(div_rn_f32, D = bits(f32(A) / f32(B))) \
  X(div_full_f32, D = bits(div_approx(f32(A), f32(B), true))) \
  X(div_approx_f32, D = bits(div_approx(f32(A), f32(B), false))) \
  X(max_f32, D = bits(pmax(f32(A), f32(B)))) X(min_f32, D = bits(pmin(f32(A), f32(B)))) \
  X(abs_f32, D = bits(std::fabs(f32(A)))) X(abs_ftz_f32, D = bits(std::fabs(ftz(f32(A))))) \
    X(neg_f32, D = bits(-f32(A))) \
  X(copysign_f32, D = bits(std::copysign(f32(B), f32(A)))) X(ex2_f32, D = bits(ex2(f32(A)))) \
  X(rsqrt_f32, D = bits(rsqrt(f32(A)))) \
  X(add_f64, D = bits(f64(A) + f64(B))) X(sub_f64, D = bits(f64(A) - f64(B))) \
    X(mul_f64, D = bits(f64(A) * f64(B))) \
  X(fma_f64, D = bits(std::fma(f64(A), f64(B), f64(C)))) X(div_rn_f64, D = bits(f64(A) / f64(B))) \
  X(rcp_rn_f64, D = bits(1 / f64(A))) X(rcp_approx_f64, D = bits(rcp_approx(f64(A)))) \
  X(max_f64, D = bits(pmax(f64(A), f64(B)))) X(min_f64, D = bits(pmin(f64(A), f64(B)))) \
  X(abs_f64, D = bits(std::fabs(f64(A)))) X(neg_f64, D = bits(-f64(A))) \
    X(copysign_f64, D = bits(std::copysign(f64(B), f64(A)))) \
  X(cvt_f64_f32, D = bits(double(f32(A)))) X(cvt_f32_f64, D = bits(float(f64(A)))) \
  X(cvt_f32_bf16, D = bits(bf16(A))) X(cvt_f32_f16, D = bits(f16(A))) \
  X(cvt_f64_bf16, D = bits(double(bf16(A)))) X(cvt_f64_f16, D = bits(double(f16(A)))) \
  X(cvt_bf16_f32, D = to_bf16(f32(A))) X(cvt_f16_f32, D = to_f16(f32(A))) \
  X(cvt_bf16x2_f32, D = to_bf16(f32(A)) << 16 | to_bf16(f32(B))) \
    X(cvt_f16x2_f32, D = to_f16(f32(A)) << 16 | to_f16(f32(B))) \
  X(cvt_f64_s16, D = bits(double(i16(A)))) X(cvt_f64_s32, D = bits(double(i32(A)))) \
    X(cvt_f64_u32, D = bits(double(u32(A)))) \
  X(cvt_f64_s64, D = bits(double(i64(A)))) X(cvt_f64_u64, D = bits(double(A))) \
  X(cvt_f32_s32, D = bits(float(i32(A)))) X(cvt_f32_u32, D = bits(float(u32(A)))) \
    X(cvt_f32_s64, D = bits(float(i64(A)))) \
  X(cvt_s32_f32, D = u32(integer<i32>(std::trunc(f32(A))))) \
    X(cvt_s32_f64, D = u32(integer<i32>(std::trunc(f64(A))))) \
  X(cvt_s64_s32, D = u64(i64(i32(A)))) X(cvt_s64_s16, D = u64(i64(i16(A)))) \
    X(cvt_s64_s8, D = u64(i64(i8(A)))) \
  X(cvt_s32_s16, D = u32(i32(i16(A)))) X(cvt_s32_s8, D = u32(i32(i8(A)))) \
    X(cvt_s16_s8, D = u16(i16(i8(A)))) \
  X(cvt_u8, D = u8(A)) X(cvt_u16, D = u16(A)) X(cvt_u32, D = u32(A))
// The others, which Launch::run executes.
#define SPECIAL_OPS(X) \
  X(nop) X(bra) X(ret) X(div_s32) X(div_u32) X(div_s64) X(div_u64) X(rem_s32) X(rem_u32) \
    X(rem_s64) X(rem_u64) \
  X(ld_param) X(ld_global) X(st_global) X(ld_shared) X(st_shared) X(atom) X(fence) X(bar) \
    X(shfl) X(redux)
// clang-format on

enum Op : u16 {
#define X(name, ...) op_##name,
  REGISTER_OPS(X) SPECIAL_OPS(X)
#undef X
};

struct Instruction {  // as parser.py packs it
  u16 op;
  u8 count, size, sign;  // of memory accesses: lanes, bytes of each, whether loads extend the sign
  u8 negated;            // the guard
  u8 flags;     // atom: 1 acquire, 2 release; atom, fence: 4 wider than the block; shfl: its mode
  u8 function;  // atom, redux: which
  i32 guard;    // slot, or -1
  i32 o[6];     // slots; D, A, B, C. Memory: o[0..3] data, o[4] address
  i32 unused;
  i64 immediate;  // offset, or target of a branch
};
static_assert(sizeof(Instruction) == 48);

}  // namespace ptx
