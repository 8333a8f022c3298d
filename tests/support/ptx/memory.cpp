// Loads, stores and atomics. An access of n bytes, a vector's as a whole, lies at a multiple of n
// and inside the elements of one tensor; what it reads was written before, and what it writes is
// not an input.
#include "launch.h"

namespace ptx {

namespace {

u64 extended(u64 value, const Instruction& in) {
  if (!in.sign) return value;
  switch (in.size) {
    case 1:
      return u64(i64(i8(value)));
    case 2:
      return u64(i64(i16(value)));
    case 4:
      return u64(i64(i32(value)));
  }
  return value;
}

template <class T>
u64 higher(u64 a, u64 b) {
  return u64(std::make_unsigned_t<T>(std::max(T(a), T(b))));
}

// The value that an atomic leaves behind.
u64 combined(const Instruction& in, u64 old, u64 operand) {
  const bool wide = in.size == 8;
  switch (in.function) {
    case 0:
      return wide ? old + operand : u32(old + operand);
    case 1:
      return operand;  // exch
    case 2:
      if (!in.sign) return std::max(old, operand);
      return wide ? higher<i64>(old, operand) : higher<i32>(old, operand);
  }
  abort();
}

}  // namespace

void Launch::garbage(u64* out, int count, int size) {
  for (int k = 0; k < count; ++k) out[k] = draw() & (size == 8 ? ~0ull : (1ull << 8 * size) - 1);
}

// Loads into, or stores from, values[0..count).
void Launch::access(Thread& t, bool global, u64 address, int count, int size, bool write,
                    bool atomic, i32 pc, u64* values) {
  const int total = count * size;
  const auto refuse = [&](Kind kind, i32 region, u64 offset) {
    report(kind, t, pc, -1, region, offset);
    if (!write) garbage(values, count, size);
  };
  u8 *data, *state;
  Shadow* shadow = nullptr;
  i32 region = -1;
  u64 offset = u32(address), limit;
  if (global) {
    region = i32(address >> 40) - 1;
    if (region < 0 || region >= n_regions) return refuse(kOutside, -1, address);
    // Addresses in front of a region are the end of the one before it: its offset is huge there.
    offset = address & ((1ull << 40) - 1);
    Region& g = regions[region];
    limit = g.size;
    data = g.data;
    state = g.state;
    if (!shadows[region].empty()) shadow = shadows[region].data();
  } else {
    Block& b = *t.block;
    limit = b.shared.size();
    data = b.shared.data();
    state = b.shared_state.data();
    shadow = b.shadow.data();
  }
  if (address % total) return refuse(kMisaligned, region, offset);
  if (offset + total > limit) return refuse(kOutside, region, offset);
  for (u64 at = offset; at < offset + total; ++at) {
    if (!(state[at] & kElement)) return refuse(kOutside, region, at);
    if (write && !(state[at] & kWritable)) return refuse(kReadOnly, region, at);
    if (!write && !(state[at] & kInitialised)) report(kUninitialised, t, pc, -1, region, at);
  }
  bool race = false;
  if (shadow)
    for (int k = 0; k < total; ++k) {
      const bool same = write && data[offset + k] == u8(values[k / size] >> 8 * (k % size));
      race |= touch(t, shadow[offset + k], write, atomic, pc, region, offset + k, same);
    }
  if (write) {
    for (int k = 0; k < total; ++k) state[offset + k] |= kInitialised | kWritten;
    for (int k = 0; k < count; ++k) memcpy(data + offset + k * size, &values[k], size);
    return;
  }
  for (int k = 0; k < count; ++k) {
    values[k] = 0;
    memcpy(&values[k], data + offset + k * size, size);
  }
  if (race) garbage(values, count, size);
}

void Launch::load(Thread& t, const Instruction& in, i32 pc) {
  u64 values[4];
  const u64 address = t.r[in.o[4]] + in.immediate;
  access(t, in.op == op_ld_global, address, in.count, in.size, false, false, pc, values);
  for (int k = 0; k < in.count; ++k) t.r[in.o[k]] = extended(values[k], in);
}

void Launch::store(Thread& t, const Instruction& in, i32 pc) {
  u64 values[4];
  const u64 address = t.r[in.o[4]] + in.immediate;
  for (int k = 0; k < in.count; ++k) values[k] = t.r[in.o[k]];
  access(t, in.op == op_st_global, address, in.count, in.size, true, false, pc, values);
  if (in.op == op_st_global && !released.empty()) released.erase(address);
}

void Launch::load_parameter(Thread& t, const Instruction& in) {
  const u8* from = parameters + in.immediate + (in.o[4] >= 0 ? t.r[in.o[4]] : 0);
  for (int k = 0; k < in.count; ++k) {
    u64 value = 0;
    memcpy(&value, from + k * in.size, in.size);
    t.r[in.o[k]] = extended(value, in);
  }
}

void Launch::atom(Thread& t, const Instruction& in, i32 pc) {
  const u64 address = t.r[in.o[4]] + in.immediate;
  const bool acquires = in.flags & 1, releases = in.flags & 2, wide = in.flags & 4;
  Clock& location = released[address];
  if (wide) add(acquires ? t.extra : t.pending, location);
  // Both halves touch as atomics: they race with plain accesses, not with each other.
  u64 old = 0;
  access(t, true, address, 1, in.size, false, wide, pc, &old);
  u64 value = combined(in, old, t.r[in.o[1]]);
  access(t, true, address, 1, in.size, true, wide, pc, &value);
  if (in.o[0] >= 0) t.r[in.o[0]] = old;
  if (!wide) return;
  if (releases) {
    location.join(snapshot(t));
    ++t.time;
  } else if (t.fenced) {
    location.join(*t.fenced);
  }
}

}  // namespace ptx
