// The scheduler and the instructions, and the interface to Python.
#include "launch.h"

namespace ptx {

u64 Launch::draw() {
  random ^= random << 13;
  random ^= random >> 7;
  random ^= random << 17;
  return random * 0x2545f4914f6cdd1dull >> 11;
}

void Launch::report(Kind kind, const Thread& t, i32 pc, i32 other_pc, i32 region, u64 offset,
                    u32 other) {
  const bool across = other != ~0u && other / threads != t.block->index;
  Finding& f = findings[{kind, pc, other_pc, region * 2 + across}];
  if (f.count++ > 0) return;
  f = {kind,           pc,       other_pc,        region,          offset,
       t.block->index, t.number, other / threads, other % threads, 1,
       across};
}

// Whether the thread lets others go first, before an instruction that they can see.
bool Launch::give_way(Thread& t) {
  if (t.resumed) {
    t.resumed = false;
    return false;
  }
  if (u32(draw()) >= yield_threshold) return false;
  t.resumed = true;
  ++switches;
  return true;
}

u64 Launch::divide(Thread& t, const Instruction& in, i32 pc) {
  const u64 a = t.r[in.o[1]], b = t.r[in.o[2]];
  const bool wide =
      in.op == op_div_s64 || in.op == op_div_u64 || in.op == op_rem_s64 || in.op == op_rem_u64;
  if ((wide ? b : u64(u32(b))) == 0) {
    report(kDivisionByZero, t, pc);
    return wide ? draw() : u32(draw());
  }
  switch (in.op) {
    case op_div_s32:
      return i32(b) == -1 ? u32(-a) : u32(i32(a) / i32(b));
    case op_rem_s32:
      return i32(b) == -1 ? 0 : u32(i32(a) % i32(b));
    case op_div_u32:
      return u32(a) / u32(b);
    case op_rem_u32:
      return u32(a) % u32(b);
    case op_div_s64:
      return i64(b) == -1 ? -a : u64(i64(a) / i64(b));
    case op_rem_s64:
      return i64(b) == -1 ? 0 : u64(i64(a) % i64(b));
    case op_div_u64:
      return a / b;
    default:
      return a % b;
  }
}

void Launch::exit(Thread& t) {
  Block& b = *t.block;
  t.state = kExited;
  ++b.exited;
  check_barrier(b);
  const u32 first = t.number & ~31u;
  for (u32 l = first; l < std::min(threads, first + 32); ++l)
    if (b.threads[l].state == kAtWarp) return check_warp(b.threads[l]);
}

// Runs the thread until it waits or ends (false) or gives way (true).
bool Launch::run(Thread& t) {
  u64* const r = t.r;
  for (;;) {
    const i32 pc = t.pc;
    const Instruction& in = code[pc];
    if (in.guard >= 0 && (r[in.guard] != 0) == bool(in.negated)) {
      ++t.pc;
      ++executed;
      continue;
    }
    switch (in.op) {
      case op_ld_global:
      case op_ld_shared:
      case op_st_global:
      case op_st_shared:
      case op_atom:
      case op_fence:
        if (give_way(t)) return true;
    }
    ++t.pc;
    ++executed;
    switch (in.op) {
#define D r[in.o[0]]
#define A r[in.o[1]]
#define B r[in.o[2]]
#define C r[in.o[3]]
#define X(name, ...) \
  case op_##name:    \
    __VA_ARGS__;     \
    break;
      REGISTER_OPS(X)
#undef X
      case op_nop:
        break;
      case op_bra:
        if (in.immediate <= pc && executed > budget) {
          report(kTooLong, t, pc);
          t.pc = i32(length) - 1;
          break;
        }
        t.pc = i32(in.immediate);
        break;
      case op_div_s32:
      case op_div_u32:
      case op_div_s64:
      case op_div_u64:
      case op_rem_s32:
      case op_rem_u32:
      case op_rem_s64:
      case op_rem_u64:
        D = divide(t, in, pc);
        break;
      case op_ld_param:
        load_parameter(t, in);
        break;
      case op_ld_global:
      case op_ld_shared:
        load(t, in, pc);
        break;
      case op_st_global:
      case op_st_shared:
        store(t, in, pc);
        break;
      case op_atom:
        atom(t, in, pc);
        break;
      case op_fence:
        fence(t, in);
        break;
      case op_bar:
        t.state = kAtBarrier;
        ++t.block->waiting;
        check_barrier(*t.block);
        return false;
      case op_shfl:
      case op_redux:
        t.value = A;
        t.operand = B;
        t.operand2 = C;
        t.mask = u32(r[in.o[4]]);
        t.state = kAtWarp;
        if (!(t.mask >> (t.number & 31) & 1)) report(kInactiveLane, t, pc);
        check_warp(t);
        return false;
      case op_ret:
        exit(t);
        return false;
      default:
        abort();
    }
  }
}

std::unique_ptr<Block> Launch::start(u32 index) {
  auto b = std::make_unique<Block>();
  b->index = index;
  b->registers.resize(u64(slots) * threads);
  b->threads.resize(threads);
  b->shared.assign(shared_bytes, 0xff);
  b->shared_state.assign(shared_bytes, kElement | kWritable);
  b->shadow.resize(shared_bytes);
  for (u32 i = 0; i < threads; ++i) {
    Thread& t = b->threads[i];
    t.r = &b->registers[u64(slots) * i];
    t.block = b.get();
    t.number = u16(i);
    t.id = index * threads + i;
    t.priority = u32(draw());
    memcpy(t.r, initial, 8 * u64(slots));
    if (tid >= 0) t.r[tid] = i;
    if (ctaid >= 0) t.r[ctaid] = index;
    b->runnable.push_back(u16(i));
  }
  return b;
}

void Launch::go() {
  yield_threshold = u32(std::min(1.0, yield) * 4294967295.0);
  shadows.resize(n_regions);
  for (i32 i = 0; i < n_regions; ++i)
    if (regions[i].writable) shadows[i].resize(regions[i].size);
  std::vector<u32> order(blocks);
  for (u32 i = 0; i < blocks; ++i) {
    order[i] = i;
    std::swap(order[i], order[draw() % (i + 1)]);
  }
  std::vector<std::unique_ptr<Block>> live;
  u32 next = 0;
  while (next < blocks || !live.empty()) {
    while (next < blocks && live.size() < in_flight) live.push_back(start(order[next++]));
    const size_t at = draw() % live.size();
    Block& b = *live[at];
    if (b.runnable.empty()) {
      for (Thread& t : b.threads)
        if (t.state != kExited) report(kDeadlock, t, t.pc - 1);
      live.erase(live.begin() + long(at));
      continue;
    }
    // Some threads of this block in turn, then perhaps another block.
    for (u64 turns = 1 + draw() % (2 * threads); turns > 0 && !b.runnable.empty(); --turns) {
      size_t choice = draw() % b.runnable.size();
      if (strategy == 1)
        for (size_t i = 0; i < b.runnable.size(); ++i)
          if (b.threads[b.runnable[i]].priority > b.threads[b.runnable[choice]].priority)
            choice = i;
      Thread& t = b.threads[b.runnable[choice]];
      if (strategy == 1 && draw() % 64 == 0) t.priority = u32(draw());
      b.runnable[choice] = b.runnable.back();
      b.runnable.pop_back();
      if (run(t)) b.runnable.push_back(t.number);
    }
  }
}

namespace {

const char* const kNames[] = {
#define X(name, ...) #name,
    REGISTER_OPS(X) SPECIAL_OPS(X)
#undef X
        nullptr};

}  // namespace
}  // namespace ptx

extern "C" {

const char* const* op_names() { return ptx::kNames; }

// Returns the number of findings, the first `capacity` of them in `out`; statistics: instructions
// and switches.
int launch(const ptx::Settings* settings, ptx::Finding* out, int capacity, uint64_t* statistics) {
  ptx::Launch launch(*settings);
  ptx::approximate_seed = settings->approximate;
  launch.random = ptx::mix(launch.random) | 1;
  launch.go();
  int n = 0;
  for (const auto& [key, finding] : launch.findings) {
    if (n < capacity) out[n] = finding;
    ++n;
  }
  statistics[0] = launch.executed;
  statistics[1] = launch.switches;
  return n;
}
}
