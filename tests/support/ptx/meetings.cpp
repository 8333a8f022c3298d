// Where threads wait for each other: barriers, and warps' exchanges. All reach one at the same
// place.
#include "launch.h"

namespace ptx {

namespace {

// redux: 0 add, 1 max, 2 min, 3 and, 4 or, 5 xor.
u32 reduced(const Instruction& in, u32 a, u32 b) {
  switch (in.function) {
    case 0:
      return a + b;
    case 1:
      return in.sign ? u32(std::max(i32(a), i32(b))) : std::max(a, b);
    case 2:
      return in.sign ? u32(std::min(i32(a), i32(b))) : std::min(a, b);
    case 3:
      return a & b;
    case 4:
      return a | b;
    case 5:
      return a ^ b;
  }
  abort();
}

struct Source {
  u32 lane;
  bool inside;
};

// The lane whose value shfl gives to lane l: modes 0 bfly, 1 up, 2 down, 3 idx.
Source source_of(const Instruction& in, const Thread& t, u32 l) {
  const u32 by = u32(t.operand) & 31, clamp = u32(t.operand2), segment = clamp >> 8 & 31;
  const u32 low = l & segment;
  const i32 high = i32(low | (clamp & 31 & ~segment));
  i32 lane = 0;
  switch (in.flags) {
    case 0:
      lane = i32(l ^ by);
      break;
    case 1:
      lane = i32(l - by);
      break;
    case 2:
      lane = i32(l + by);
      break;
    case 3:
      lane = i32(low | (by & ~segment));
      break;
  }
  const bool inside = in.flags == 1 ? lane >= high : lane <= high;
  return {inside ? u32(lane) : l, inside};
}

}  // namespace

void Launch::wake(Thread& t) {
  t.state = kRunnable;
  t.block->runnable.push_back(t.number);
}

// Lets the threads pass the barrier that all of them have reached.
void Launch::check_barrier(Block& b) {
  if (b.waiting == 0 || b.waiting + b.exited < threads) return;
  i32 pc = -1;
  for (Thread& t : b.threads) {
    if (t.state != kAtBarrier) continue;
    if (b.exited) report(kBarrierAfterExit, t, t.pc - 1);
    if (pc >= 0 && pc != t.pc) report(kDivergentBarrier, t, t.pc - 1, pc - 1);
    pc = t.pc;
  }
  for (Thread& t : b.threads)
    if (t.extra) {
      b.base.join(*t.extra);
      t.extra.reset();
    }
  ++b.interval;
  b.waiting = 0;
  for (Thread& t : b.threads)
    if (t.state == kAtBarrier) wake(t);
}

// Does the exchange that this thread waits at, once all lanes of its mask have reached it.
void Launch::check_warp(Thread& any) {
  const u32 first = any.number & ~31u, width = std::min<u32>(32, threads - first);
  Thread* lanes = &any.block->threads[first];
  u32 present = 0;
  for (u32 l = 0; l < width; ++l)
    if (any.mask >> l & 1 && lanes[l].state != kExited) present |= 1u << l;
  const auto takes_part = [&](u32 l) { return bool(present >> l & 1); };
  for (u32 l = 0; l < width; ++l)
    if (takes_part(l) && lanes[l].state != kAtWarp) return;
  for (u32 l = 0; l < width; ++l)
    if (takes_part(l) && (lanes[l].pc != any.pc || lanes[l].mask != any.mask))
      return report(kDivergentWarp, any, any.pc - 1, lanes[l].pc - 1);
  const Instruction& in = code[any.pc - 1];
  u64 found[32];
  bool inside[32];
  u32 all = 0;
  if (in.op == op_redux) {
    bool first_one = true;
    for (u32 l = 0; l < width; ++l) {
      if (!takes_part(l)) continue;
      all = first_one ? u32(lanes[l].value) : reduced(in, all, u32(lanes[l].value));
      first_one = false;
    }
  }
  for (u32 l = 0; l < width; ++l) {
    if (!takes_part(l)) continue;
    if (in.op == op_redux) {
      found[l] = all;
      continue;
    }
    const Source source = source_of(in, lanes[l], l);
    inside[l] = source.inside;
    if (takes_part(source.lane)) {
      found[l] = lanes[source.lane].value;
    } else {
      report(kInactiveLane, lanes[l], any.pc - 1);
      found[l] = draw();
    }
  }
  for (u32 l = 0; l < width; ++l) {
    if (!takes_part(l)) continue;
    lanes[l].r[in.o[0]] = u32(found[l]);
    if (in.op == op_shfl && in.o[5] >= 0) lanes[l].r[in.o[5]] = inside[l];
    wake(lanes[l]);
  }
}

}  // namespace ptx
