// Data races, by happens-before, with the rules of PTX's memory model.
//
// A thread's accesses are numbered by the barriers that its block has passed (`interval`) and by
// its own releases (`time`). If a block makes two accesses, the one of the earlier interval comes
// first. Between blocks, and inside an interval, only a release that was acquired orders them. A
// relaxed atomic releases with a fence in front of it and acquires with a fence behind it, of the
// same thread; what one thread has acquired, a barrier gives to the others of its block. Scope
// .cta orders nothing between blocks, and exchanges of a warp (shfl, redux) order nothing.
//
// Values themselves are sequentially consistent: what is free of races cannot see a stale cache,
// and what is not is reported. A load that races gives random bits.
#include "launch.h"

namespace ptx {

void Clock::join(const Clock& other) {
  if (other.empty()) return;
  if (floor.empty()) floor.resize(other.floor.size());
  for (size_t i = 0; i < floor.size(); ++i) floor[i] = std::max(floor[i], other.floor[i]);
  for (auto [thread, time] : other.times) {
    u32& mine = times[thread];
    mine = std::max(mine, time);
  }
}

bool Clock::knows(u32 block, u32 thread, u32 interval, u32 time) const {
  if (empty()) return false;
  if (floor[block] > interval) return true;
  const auto found = times.find(thread);
  return found != times.end() && found->second >= time;
}

void add(std::unique_ptr<Clock>& into, const Clock& clock) {
  if (!into) into = std::make_unique<Clock>();
  into->join(clock);
}

// Whether an access of `thread` comes before what t does next.
bool Launch::ordered(const Thread& t, u32 thread, u32 interval, u32 time) const {
  if (thread == t.id) return true;
  const u32 block = thread / threads;
  if (block == t.block->index && interval < t.block->interval) return true;
  if (t.block->base.knows(block, thread, interval, time)) return true;
  return t.extra && t.extra->knows(block, thread, interval, time);
}

// All that comes before what t does next.
Clock Launch::snapshot(Thread& t) {
  Clock clock;
  clock.floor.resize(blocks);
  clock.join(t.block->base);
  if (t.extra) clock.join(*t.extra);
  u32& own = clock.floor[t.block->index];
  own = std::max(own, t.block->interval);
  clock.times[t.id] = t.time;
  return clock;
}

// An access to one byte: whether it races. `same`: it writes what is there.
bool Launch::touch(Thread& t, Shadow& s, bool write, bool atomic, i32 pc, i32 region, u64 offset,
                   bool same) {
  bool race = false;
  const Write& w = s.write;
  if (w.pc >= 0 && !(atomic && s.atomic) && !ordered(t, w.thread, w.interval, w.time)) {
    race = true;
    const Kind kind = !write ? kRaceWriteRead : same ? kRaceWriteWriteSame : kRaceWriteWrite;
    report(kind, t, pc, w.pc, region, offset, w.thread);
  }
  const u32 interval = t.block->interval;
  if (write) {
    for (i32 i = s.reads; i >= 0; i = reads[i].next)
      if (!ordered(t, reads[i].thread, reads[i].interval, reads[i].time)) {
        race = true;
        report(kRaceReadWrite, t, pc, reads[i].pc, region, offset, reads[i].thread);
      }
    s.write = {t.id, interval, t.time, pc};
    s.atomic = atomic;
    s.reads = -1;
    return race;
  }
  if (atomic) return race;  // the write that follows stands for both
  if (s.reads >= 0 && reads[s.reads].thread == t.id) {
    Read& last = reads[s.reads];
    last = {t.id, interval, t.time, pc, last.next};
    return race;
  }
  // Reads of this block before its last barrier come before this one, which stands for them.
  const auto is_old = [&](const Read& read) {
    return read.thread / threads == t.block->index && read.interval < interval;
  };
  if (s.reads >= 0 && is_old(reads[s.reads])) {
    i32 kept = -1;
    for (i32 i = s.reads, next; i >= 0; i = next) {
      next = reads[i].next;
      if (is_old(reads[i])) continue;
      reads[i].next = kept;
      kept = i;
    }
    s.reads = kept;
  }
  reads.push_back({t.id, interval, t.time, pc, s.reads});
  s.reads = i32(reads.size()) - 1;
  return race;
}

void Launch::fence(Thread& t, const Instruction& in) {
  if (!(in.flags & 4)) return;
  if (t.pending) {
    add(t.extra, *t.pending);
    t.pending.reset();
  }
  t.fenced = std::make_unique<Clock>(snapshot(t));
  ++t.time;
}

}  // namespace ptx
