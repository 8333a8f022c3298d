// One launch of a PTX kernel: the threads of several blocks, each an instruction stream of its own,
// interleaved by a seeded scheduler, with every access to memory checked.
//
//   launch.cpp      the scheduler and the instructions
//   memory.cpp      loads, stores and atomics: addresses, alignment, initialised bytes
//   order.cpp       which accesses are ordered: data races
//   meetings.cpp    barriers, and warps' exchanges
#pragma once

#include <map>
#include <memory>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "instructions.h"

namespace ptx {

enum : u8 { kElement = 1, kInitialised = 2, kWritable = 4, kWritten = 8 };

// A tensor's storage. Its virtual address is 2^40 bytes from the next one's.
struct Region {
  u64 address, size;
  u8* data;
  u8* state;     // of each byte
  u64 writable;  // whether some bytes are: nobody races where nobody may write
};

// As KINDS in machine.py.
enum Kind : u32 {
  kOutside = 1,
  kMisaligned,
  kUninitialised,
  kReadOnly,
  kRaceReadWrite,
  kRaceWriteRead,
  kRaceWriteWrite,
  kRaceWriteWriteSame,
  kDivergentBarrier,
  kBarrierAfterExit,
  kDivergentWarp,
  kDeadlock,
  kDivisionByZero,
  kTooLong,
  kInactiveLane,
};

// A fault at instruction `pc`, with the access that it conflicts with, if any.
struct Finding {
  u32 kind;
  i32 pc, other_pc;
  i32 region;
  u64 offset;
  u32 block, thread, other_block, other_thread;
  u64 count;
  u32 across;  // whether the two accesses are of different blocks
};

// All that a thread knows to be over: for each block the intervals between barriers below `floor`,
// and for threads that released something all that they did up to a time.
struct Clock {
  std::vector<u32> floor;
  std::unordered_map<u32, u32> times;

  bool empty() const { return floor.empty(); }
  void join(const Clock& other);
  bool knows(u32 block, u32 thread, u32 interval, u32 time) const;
};

// The last write of a byte, and its reads since, a list in Launch::reads. Threads are counted over
// all blocks.
struct Write {
  u32 thread, interval, time;
  i32 pc;  // < 0: none
};
struct Read {
  u32 thread, interval, time;
  i32 pc, next;
};
struct Shadow {
  Write write{0, 0, 0, -1};
  i32 reads = -1;
  bool atomic = false;
};

enum State : u8 { kRunnable, kAtBarrier, kAtWarp, kExited };

struct Block;

struct Thread {
  u64* r;  // registers
  Block* block;
  u32 id;      // over all blocks
  u16 number;  // in the block
  State state = kRunnable;
  bool resumed = false;
  i32 pc = 0;
  u32 time = 1;  // counts the thread's own releases
  u32 priority = 0;
  u64 value = 0, operand = 0, operand2 = 0;  // at an exchange of the warp
  u32 mask = 0;
  // Knowledge acquired since the barrier, held at the last fence, and read by relaxed atomics
  // since then.
  std::unique_ptr<Clock> extra, fenced, pending;
};

struct Block {
  u32 index, interval = 1;
  std::vector<u64> registers;
  std::vector<Thread> threads;
  std::vector<u8> shared, shared_state;
  std::vector<Shadow> shadow;
  std::vector<u16> runnable;
  u32 waiting = 0, exited = 0;
  Clock base;  // known to all threads since the last barrier
};

// A launch, as machine.py packs it.
struct Settings {
  const Instruction* code;
  i64 length;
  const u64* initial;  // the registers' first values
  u32 slots;
  i32 tid, ctaid;  // the slots of %tid.x and %ctaid.x, or -1
  u32 blocks, threads, shared_bytes;
  const u8* parameters;
  Region* regions;
  i32 n_regions;
  u64 random;       // the scheduler's state
  double yield;     // how often a thread gives way before an instruction that others can see
  i32 strategy;     // 1: some threads run far ahead of the others
  u32 in_flight;    // blocks that run at the same time
  u64 approximate;  // the seed of approximate instructions' errors; 0: none
  u64 budget;       // of instructions, so that no loop is endless
};

struct Launch : Settings {
  std::vector<std::vector<Shadow>> shadows;  // of each region that may be written
  std::vector<Read> reads;
  std::map<u64, Clock> released;  // what was released at each address
  std::map<std::tuple<u32, i32, i32, i32>, Finding> findings;
  u64 executed = 0, switches = 0;
  u32 yield_threshold = 0;

  explicit Launch(const Settings& settings) : Settings(settings) {}
  void go();

  u64 draw();
  void report(Kind kind, const Thread& t, i32 pc, i32 other_pc = -1, i32 region = -1,
              u64 offset = 0, u32 other = ~0u);

  // order.cpp
  bool ordered(const Thread& t, u32 thread, u32 interval, u32 time) const;
  Clock snapshot(Thread& t);
  bool touch(Thread& t, Shadow& s, bool write, bool atomic, i32 pc, i32 region, u64 offset,
             bool same);
  void fence(Thread& t, const Instruction& in);

  // memory.cpp
  void garbage(u64* out, int count, int size);
  void access(Thread& t, bool global, u64 address, int count, int size, bool write, bool atomic,
              i32 pc, u64* values);
  void load(Thread& t, const Instruction& in, i32 pc);
  void store(Thread& t, const Instruction& in, i32 pc);
  void load_parameter(Thread& t, const Instruction& in);
  void atom(Thread& t, const Instruction& in, i32 pc);

  // meetings.cpp
  void wake(Thread& t);
  void check_barrier(Block& b);
  void check_warp(Thread& any);

  // launch.cpp
  std::unique_ptr<Block> start(u32 index);
  bool run(Thread& t);
  bool give_way(Thread& t);
  u64 divide(Thread& t, const Instruction& in, i32 pc);
  void exit(Thread& t);
};

void add(std::unique_ptr<Clock>& into, const Clock& clock);

}  // namespace ptx
